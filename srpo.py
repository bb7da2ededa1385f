"""SRPO, Structured Role-Aware Policy Optimization, as pure tensor functions (arXiv 2605.07274).

GRPO gives every token of a response the same advantage. SRPO splits a response

    <perception> what is seen </perception> <reasoning> what follows </reasoning> <answer> ... </answer>

into perception and reasoning tokens and scales the advantage of each one by a positive weight: perception
tokens count more where they depend on the image, reasoning tokens where they follow from the perception.

    step 1     A       group_advantages         one advantage a response, exactly GRPO's
    steps 2-4  delta   contrast_scores          how much the image, or the perception, explains a token
    step 5     b       shared_baseline          one number a response, common to both roles
    step 6, 9  w       token_weights            positive, mean 1 over a response's scored tokens
    step 7     A_hat   role_aware_advantages    one advantage a token
    step 8     loss    policy_loss              GRPO's clipped surrogate, with A_hat in the place of A

A reconstruction from the paper's abstract: the numbers of the steps are this project's, and the README lists
what the abstract leaves open. To copy the file, take it whole: it needs torch alone. [B, T] is responses x
response positions; entry t of a log-prob is log pi(o_t | everything before o_t), already shifted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor


class Role(IntEnum):
    """What a response token is for. Tags, the answer, white space, EOS and padding are OTHER."""

    OTHER = 0
    PERCEPTION = 1
    REASONING = 2


# --------------------------------------------------------------------------------------------- the nine steps


def group_advantages(rewards, group_size: int, eps: float = 1e-4) -> Tensor:
    """Step 1, the GRPO advantage: A_i = (r_i - mean r) / (std r + eps) over the responses of one prompt.

    Args:
        rewards: [B], the G responses of a prompt next to each other; a tensor or a sequence of numbers.
        group_size: G, at least 2.
        eps: keeps the division finite. std is the sample one (divided by G - 1), as in the common trainers:
            for rewards 1, 0, 0, 0 the first advantage is 1.50, not the 1.73 of the population std.
    Returns:
        A, [B] float32 (float64 for float64 rewards); exactly 0 in a group whose rewards are all equal.
        ValueError where rewards are not [B], or do not divide into groups of two or more.
    """
    r = _groups(rewards, group_size)  # [N, G]
    A = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True, unbiased=True) + eps)  # [N, G], step 1
    no_spread = (r == r[:, :1]).all(1, keepdim=True)  # rounding of the mean must not leave a residue
    return A.masked_fill(no_spread, 0).flatten()  # [B]


def contrast_scores(
    logp: Tensor, logp_corrupted: Tensor, logp_blank: Tensor, roles: Tensor,
    max_abs: float = 5.0, *, contrast: str = "log-ratio",
) -> Tensor:  # fmt: skip
    """Steps 2 to 4, the self-distilled contrasts delta. Without gradient.

    All log-probs are of the same sampled tokens, by the policy that sampled them, at the sampling temperature
    and over the tokens that sampling allowed, with dropout off.

    Args:
        logp: [B, T], given the image and all earlier tokens.
        logp_corrupted: [B, T], the same with the corrupted image; read at perception tokens.
        logp_blank: [B, T], the perception text hidden (`without_perception`); read at reasoning tokens.
        roles: [B, T] of `Role` values, OTHER at padding.
        max_abs: Delta_max of step 4, in nats.
        contrast: what is made of the log-ratio before step 4. "log-ratio": nothing; "absolute": its size;
            "k3": r - 1 - log r with r = exp(-delta), the one-sample estimate of a divergence that PAPO
            (arXiv 2507.06448), VPPO (2510.09285) and PGPO (2604.01840) use.
    Returns:
        delta, [B, T] float32 (float64 for float64), within +-max_abs; 0 where OTHER; NaN where a log-ratio is
        not finite, for step 9 to see.
        ValueError where shapes differ or the contrast is unknown.
    """
    _same_shape(logp=logp, logp_corrupted=logp_corrupted, logp_blank=logp_blank, roles=roles)
    logp, logp_corrupted, logp_blank = (_float(x.detach()) for x in (logp, logp_corrupted, logp_blank))
    delta = torch.zeros_like(logp)
    delta = torch.where(roles == Role.PERCEPTION, logp - logp_corrupted, delta)  # [B, T], step 2
    delta = torch.where(roles == Role.REASONING, logp - logp_blank, delta)  # [B, T], step 3
    finite = delta.isfinite()
    if contrast == "absolute":
        delta = delta.abs()
    elif contrast == "k3":
        delta = torch.exp(-delta) - 1 + delta
    elif contrast != "log-ratio":
        raise ValueError(f"contrast must be log-ratio, absolute or k3, got {contrast!r}")
    return delta.clamp(-max_abs, max_abs).masked_fill(~finite, float("nan"))  # [B, T], step 4


def without_perception(attention_mask: Tensor, roles: Tensor) -> Tensor:
    """The empty perception of step 3: a response attention mask with the perception text out, its tags kept.

    All from the first to the last perception token goes, white space too: its amount tells what was seen.
    Recompute position ids from the result; no later token of an attention model can tell it from removal.

    Args:
        attention_mask: [B, T], 1 where a response token may be attended to.
        roles: [B, T] of `Role` values.
    Returns:
        [B, T], dtype of `attention_mask`; a new tensor.
    """
    _same_shape(attention_mask=attention_mask, roles=roles)
    seen = (roles == Role.PERCEPTION).long()
    inside = (seen.cumsum(1) > 0) & (seen.flip(1).cumsum(1).flip(1) > 0)  # [B, T]
    return attention_mask.masked_fill(inside, 0)


def shared_baseline(scores: Tensor, roles: Tensor, *, role_balanced: bool = False) -> Tensor:
    """Step 5, the trajectory's baseline b: the mean contrast over perception and reasoning tokens together.

    Args:
        scores: delta, [B, T].
        roles: [B, T] of `Role` values.
        role_balanced: instead, the mean of the two roles' means, whichever has more tokens.
    Returns:
        b, [B, 1] float32 or better; 0 for a response without scored tokens.
    """
    _same_shape(scores=scores, roles=roles)
    delta, P, R = _float(scores), roles == Role.PERCEPTION, roles == Role.REASONING
    if role_balanced:
        return (_mean_over(delta, P) + _mean_over(delta, R)) / 2
    return _mean_over(delta, P | R)  # [B, 1], step 5


def token_weights(
    scores: Tensor, roles: Tensor, *, tau: float = 1.0, w_min: float = 0.8, w_max: float = 1.2,
    normalize: bool = True, role_balanced: bool = False, flip: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Steps 5, 6 and 9, the positive token weights w. Without gradient.

    Args:
        scores: delta, [B, T].
        roles: [B, T] of `Role` values.
        tau: temperature in nats; the larger, the closer every weight is to 1.
        w_min, w_max: range, by default RLSD's; once normalized it is [w_min / w_max, w_max / w_min].
        normalize: scale to mean 1 over the scored tokens, so that a response keeps its total advantage.
        role_balanced: as in `shared_baseline`.
        flip: [B] bool, responses whose emphasis is turned round: tokens of low contrast weigh more. With
            `advantages < 0` the weights are sign-aware, as in RLSD (arXiv 2604.03128). By default none.
    Returns:
        w, [B, T] float32 (float64 for float64); 1 at OTHER tokens, and everywhere in a response that lacks
        perception or reasoning tokens or has a contrast that is not finite (step 9). ValueError where shapes
        differ, tau <= 0, or not 0 < w_min <= w_max.
    """
    _same_shape(scores=scores, roles=roles)
    if not (tau > 0 and 0 < w_min <= w_max):
        raise ValueError(f"need tau > 0 and 0 < w_min <= w_max, got tau={tau}, w_min={w_min}, w_max={w_max}")
    delta, P, R = _float(scores.detach()), roles == Role.PERCEPTION, roles == Role.REASONING
    S = P | R  # [B, T], the scored positions
    relative = delta - shared_baseline(delta, roles, role_balanced=role_balanced)  # [B, T], step 5
    if flip is not None:
        relative = torch.where(flip[:, None], -relative, relative)
    w_tilde = torch.exp((relative / tau).clamp(math.log(w_min), math.log(w_max)))  # [B, T], step 6
    w = w_tilde / _mean_over(w_tilde, S) if normalize else w_tilde  # [B, T], step 6, its second line
    usable = P.any(1) & R.any(1) & (delta.isfinite() | ~S).all(1)  # [B]
    return torch.where(S & usable[:, None], w, torch.ones_like(w))  # [B, T], step 9


def role_aware_advantages(advantages: Tensor, weights: Tensor, lam: float = 1.0) -> Tensor:
    """Step 7, the role-aware token-level advantage: A_hat = A ((1 - lam) + lam w).

    Args:
        advantages: A, [B], or [B, T] from a trainer that has them per token.
        weights: w, [B, T].
        lam: in [0, 1]; 0 is GRPO, bit for bit.
    Returns:
        A_hat, [B, T], without gradient; its sign is everywhere that of A. ValueError for other shapes or lam.
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must lie in [0, 1], got {lam}")
    A, w = _per_token("advantages", advantages.detach(), weights), _float(weights.detach())
    return A * ((1 - lam) + lam * w)  # [B, T], step 7


def policy_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, *,
    clip_low: float = 0.2, clip_high: float = 0.2, denominator=None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Step 8, the clipped surrogate, as a loss to minimize. The KL term is separate: `kl_to_reference`.

    Args:
        logp, old_logp: [B, T], of the policy being trained, with gradient, and of the one that sampled.
        advantages: A_hat, [B, T], from `role_aware_advantages`, or A, [B], for plain GRPO.
        mask: [B, T], non-zero at response tokens, EOS included, padding excluded; any dtype.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        denominator: response tokens of the whole optimizer step. Give it when the step is split into
            micro-batches, so that the split does not matter; by default the tokens of this call.
    Returns:
        loss: scalar, float32 or better; 0 when the mask is empty.
        stats: detached scalars that add up over micro-batches: clip_frac, the share of tokens whose gradient
            is clipped away, and ratio, the mean probability ratio.
    """
    _same_shape(logp=logp, old_logp=old_logp, mask=mask)
    mask = mask != 0
    A_hat = _per_token("advantages", advantages.detach(), logp)
    A_hat = A_hat.masked_fill(~mask, 0)  # [B, T]; padding may hold anything
    log_rho = (_float(logp) - _float(old_logp.detach())).masked_fill(~mask, 0)
    rho = log_rho.clamp(-20, 20).exp()  # [B, T], 1 at padding; unclamped it can overflow, and inf * 0 is NaN
    unclipped, clipped = rho * A_hat, rho.clamp(1 - clip_low, 1 + clip_high) * A_hat
    objective = torch.minimum(unclipped, clipped)  # [B, T], step 8; 0 at padding, where A_hat is 0
    denominator = mask.sum().clamp(min=1) if denominator is None else denominator
    stats = {"clip_frac": (clipped < unclipped).sum(), "ratio": (rho * mask).sum()}
    return -objective.sum() / denominator, {k: (x / denominator).detach() for k, x in stats.items()}


def kl_to_reference(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """KL[pi || pi_ref] of step 8: token mean of k3 = r - 1 - log r, r = pi_ref / pi (Schulman 2020).

    Args:
        logp, ref_logp: [B, T], of the policy being trained, with gradient, and of the reference.
        mask: [B, T], as in `policy_loss`. The term is the same for every role: it is not weighted.
    Returns:
        Scalar in nats a token, >= 0; 0 when the mask is empty. Of a micro-batch, scale it by its share of the
        tokens.
    """
    _same_shape(logp=logp, ref_logp=ref_logp, mask=mask)
    mask = mask != 0
    log_r = (_float(ref_logp.detach()) - _float(logp)).masked_fill(~mask, 0).clamp(-20, 20)  # [B, T]
    return (log_r.exp() - 1 - log_r).sum() / mask.sum().clamp(min=1)


# What the abstract leaves open, under the keyword argument that sets it here or in a trainer: clause, what is
# open, default, alternatives (of a number, examples).
CHOICES = {
    "answer_is_reasoning": ("reasoning tokens for deriving answers", "is the answer in R?", False, (True,)),
    "corruption": ("corrupted visual inputs", "how", "patch",
                   ("noise", "blur", "grey", "shuffle", "pixelate")),
    "p": ("corrupted visual inputs", "how strong", 0.6, (0.3, 1.0)),
    "contrast": ("visual dependency", "what is made of the log-ratio", "log-ratio", ("absolute", "k3")),
    "corrupt_both": ("consistency with the generated perception", "the image of step 3 too?", False, (True,)),
    "role_balanced": ("shared trajectory-level baseline", "mean of the roles' means?", False, (True,)),
    "tau": ("positive token weights", "temperature of step 6", 1.0, (0.3, 3.0)),
    "w_min": ("positive token weights", "smallest, before they are normalized", 0.8, (0.5, 1e-6)),
    "w_max": ("positive token weights", "largest, before they are normalized", 1.2, (2.0, 1e6)),
    "normalize": ("adjust relative update magnitudes", "is the mean over S made 1?", True, (False,)),
    "lam": ("adjust relative update magnitudes", "how far from weight 1; 0 is GRPO", 1.0, (0.5,)),
    "sign_aware": ("optimization direction", "is the emphasis turned round where A < 0?", False, (True,)),
}


# --------------------------------------------------------------------------------------- text: tags and roles


@dataclass(frozen=True)
class Tags:
    """Names of the three blocks, in order: plain text, which need not be special tokens of the tokenizer."""

    perception: str = "perception"
    reasoning: str = "reasoning"
    answer: str = "answer"

    def __post_init__(self):
        if len({self.perception, self.reasoning, self.answer} - {""}) < 3:
            raise ValueError(f"Tags must be three different, non-empty names, got {self}")


@dataclass(frozen=True)
class Response:
    """A well-formed response: the (start, end) characters of the text inside each block, tags excluded."""

    perception: tuple[int, int]
    reasoning: tuple[int, int]
    answer: tuple[int, int]


def parse_response(text: str, tags: Tags = Tags()) -> Response | None:
    """Find the three blocks, or return None unless `text` is exactly

        <perception>...</perception> <reasoning>...</reasoning> <answer>...</answer>

    with each tag once, in this order, and nothing but white space outside the blocks. Inside a block any text
    goes, over any number of lines, also none at all. Linear in the length of `text`.
    """
    spans, end = [], 0
    for name in (tags.perception, tags.reasoning, tags.answer):
        opening, closing = f"<{name}>", f"</{name}>"
        if text.count(opening) != 1 or text.count(closing) != 1:
            return None
        start, stop = text.find(opening, end), text.find(closing, end)
        if start < 0 or stop < start + len(opening) or text[end:start].strip():
            return None
        spans.append((start + len(opening), stop))
        end = stop + len(closing)
    return None if text[end:].strip() else Response(*spans)


def token_roles(
    text: str, offsets: Sequence[tuple[int, int]], tags: Tags = Tags(), *, answer_is_reasoning: bool = False
) -> Tensor:
    """Role of every token of a response.

    A token has a block's role when it shares at least one non-space character with the text inside, also when
    it straddles the tag, like the BPE token ">a" at the start of a block (of two blocks, the first wins).

    Args:
        text: the decoded response.
        offsets: one (start, end) character span per token, from the sampled ids (`text_and_offsets`).
        answer_is_reasoning: give the text of the answer the role REASONING too.
    Returns:
        [T] long of `Role` values; all OTHER when the response is not well-formed, for step 9.
    """
    spans = torch.as_tensor(offsets, dtype=torch.long).reshape(-1, 2)
    roles = torch.full((len(spans),), int(Role.OTHER))
    response = parse_response(text, tags)
    if response is None:
        return roles
    ink = torch.tensor([0, *(not c.isspace() for c in text)]).cumsum(0)  # [k]: non-space characters before k
    blocks = [(Role.REASONING, response.answer)] if answer_is_reasoning else []
    blocks += [(Role.REASONING, response.reasoning), (Role.PERCEPTION, response.perception)]
    for role, (start, end) in blocks:
        inside = spans.clamp(start, end)  # the part of each token that lies inside the block
        roles[ink[inside[:, 1]] > ink[inside[:, 0]]] = int(role)
    return roles


def text_and_offsets(pieces: Sequence[bytes]) -> tuple[str, list[tuple[int, int]]]:
    """Text of sampled tokens, and the characters that each token touches, from the bytes of each token.

    Encoding the decoded text again would not do: a sampled sequence need not be the tokenization that the
    tokenizer itself would choose. A token that holds part of a multi-byte character touches the whole
    character; bytes that are not UTF-8 read as U+FFFD, one each.

    Args:
        pieces: the raw bytes of each sampled token, without EOS and padding.
    Returns:
        The text, and one (start, end) character span a token.
    """
    text = b"".join(pieces).decode("utf-8", "surrogateescape")  # one stand-in character per invalid byte
    widths = [len(c.encode("utf-8", "surrogateescape")) for c in text]
    char_of = [i for i, width in enumerate(widths) for _ in range(width)]  # byte -> character
    offsets, byte = [], 0
    for piece in pieces:
        first, byte = byte, byte + len(piece)
        offsets.append((char_of[first], char_of[byte - 1] + 1) if piece else (len(text), len(text)))
    return "".join("\ufffd" if "\udc80" <= c <= "\udcff" else c for c in text), offsets


def token_bytes(token: str) -> bytes:
    """Bytes of a token of a byte-level vocabulary (GPT-2's, Qwen's): each character stands for one byte.

    Tokens added to the vocabulary, such as "<|im_end|>", are plain text instead: take `token.encode()`.
    ValueError where a character stands for no byte: then the vocabulary is not byte-level.
    """
    if not set(token) <= _BYTE_OF.keys():
        raise ValueError(f"not a byte-level tokenizer: its token {token!r} has no bytes")
    return bytes(_BYTE_OF[c] for c in token)


# Printable bytes stand for themselves, the others for the characters from 256 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE_OF = {chr(b): b for b in _PRINTABLE} | {
    chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in _PRINTABLE)
}


# ------------------------------------------------------------------------------------------ shapes and checks


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _mean_over(x: Tensor, where: Tensor) -> Tensor:
    """Row mean of x over `where`: [B, T] -> [B, 1]; 0 for a row without any. Values elsewhere may be NaN."""
    return x.masked_fill(~where, 0).sum(1, keepdim=True) / where.sum(1, keepdim=True).clamp(min=1)


def _groups(rewards, group_size: int) -> Tensor:
    """[B] -> [N, G], float32 or better."""
    rewards = _float(torch.as_tensor(rewards))
    if rewards.dim() != 1 or rewards.numel() == 0 or group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"rewards {list(rewards.shape)} must be [B], in groups of {group_size} >= 2")
    return rewards.view(-1, group_size)


def _per_token(name: str, x: Tensor, like: Tensor) -> Tensor:
    """[B] or [B, T] -> a view [B, T], float32 or better."""
    x = x.unsqueeze(1) if x.dim() == 1 and like.dim() == 2 else x
    if like.dim() != 2 or x.dim() != 2 or x.shape[0] != like.shape[0] or x.shape[1] not in (1, like.shape[1]):
        raise ValueError(f"{name} {list(x.shape)} do not fit [B, T] = {list(like.shape)}")
    return _float(x).expand(like.shape)


def _same_shape(**tensors: Tensor) -> None:
    (first, a), *others = tensors.items()
    for name, x in [(first, a), *others]:
        if x.dim() != 2 or x.shape != a.shape:
            raise ValueError(f"{first} {list(a.shape)} and {name} {list(x.shape)} must have one shape [B, T]")
