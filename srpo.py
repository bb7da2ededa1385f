"""SRPO, Structured Role-Aware Policy Optimization, as pure tensor functions (arXiv 2605.07274).

GRPO gives every token of a response the same advantage. SRPO splits a response

    <perception> what is seen </perception> <reasoning> what follows </reasoning> <answer> ... </answer>

into perception and reasoning tokens and scales the advantage of each one by a positive weight: perception tokens
count more where they depend on the image, reasoning tokens where they follow from the perception. In order of use:

    text_and_offsets, parse_response, token_roles    which token has which role
    group_advantages          Eq. (1)      A      one advantage a response, exactly GRPO's
    contrast_scores           Eq. (2)-(4)  Delta  how much the image, or the perception, explains a token
    shared_baseline           Eq. (5)      b      one number a response, common to both roles
    token_weights             Eq. (6), (9) w      positive, mean 1 over a response's scored tokens
    role_aware_advantages     Eq. (7)      A-hat  one advantage a token
    policy_loss               Eq. (8)             GRPO's clipped surrogate, with A-hat in the place of A

This is an independent reconstruction from the paper's abstract: the equation numbers are this project's own, and what
the abstract leaves open is listed in the README ("What the abstract leaves open"). To copy this file elsewhere, take
it whole: it needs torch and nothing else. [B, T] stands for responses x response positions throughout; a position is
a response token, so index t of a log-prob is log pi(o_t | everything before o_t), already shifted.
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


@dataclass(frozen=True)
class Tags:
    """Names of the three blocks, in order. Plain text: they need not be special tokens of the tokenizer."""

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


# ------------------------------------------------------------------------------------------------ text: tags and roles


def parse_response(text: str, tags: Tags = Tags()) -> Response | None:
    """Find the three blocks, or return None unless `text` is exactly

        <perception>...</perception> <reasoning>...</reasoning> <answer>...</answer>

    with each tag once, in this order, and nothing but white space outside the blocks. Inside a block any text goes, over
    any number of lines, also none at all. Linear in the length of `text`.
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


def token_bytes(token: str) -> bytes:
    """Bytes of a token of a byte-level vocabulary (GPT-2's and Qwen's), where each character stands for one byte.

    Tokens that were added to the vocabulary, such as "<|im_end|>", are plain text instead: take `token.encode()`.

    Raises:
        ValueError: the token has a character that stands for no byte, so its vocabulary is not byte-level.
    """
    if not set(token) <= _BYTE_OF.keys():
        raise ValueError(f"the tokenizer is not byte-level (its token {token!r} has no bytes); Qwen-VL tokenizers are")
    return bytes(_BYTE_OF[c] for c in token)


# Printable bytes stand for themselves, the others for the characters from 256 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE_OF = {chr(b): b for b in _PRINTABLE} | {
    chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in _PRINTABLE)
}


def text_and_offsets(pieces: Sequence[bytes]) -> tuple[str, list[tuple[int, int]]]:
    """Text of sampled tokens, and the characters that each token touches, from the bytes of each token.

    Encoding the decoded text again would not do: a sampled sequence need not be the tokenization that the tokenizer
    itself would choose. A token that holds part of a multi-byte character touches the whole character; bytes that are
    not UTF-8 read as U+FFFD, one each.

    Args:
        pieces: the raw bytes of each sampled token, without EOS and padding.
    Returns:
        The text, and one (start, end) character span a token.
    """
    text = b"".join(pieces).decode("utf-8", "surrogateescape")  # one stand-in character per invalid byte
    char_of = [i for i, c in enumerate(text) for _ in c.encode("utf-8", "surrogateescape")]  # byte -> character
    offsets, byte = [], 0
    for piece in pieces:
        first, byte = byte, byte + len(piece)
        offsets.append((char_of[first], char_of[byte - 1] + 1) if piece else (len(text), len(text)))
    return "".join("\ufffd" if "\udc80" <= c <= "\udcff" else c for c in text), offsets


def token_roles(
    text: str, offsets: Sequence[tuple[int, int]], tags: Tags = Tags(), *, answer_is_reasoning: bool = False
) -> Tensor:
    """Role of every token of a response.

    A token has a block's role when it shares at least one non-space character with the text inside that block, also
    when it straddles the tag, like the BPE token ">a" at the start of a block (of two blocks, the first wins).

    Args:
        text: the decoded response.
        offsets: one (start, end) character span per token, from the sampled ids (`text_and_offsets`).
        answer_is_reasoning: give the text of the answer the role REASONING too.
    Returns:
        [T] long of `Role` values; all OTHER when the response is not well-formed (Eq. (9) then falls back to GRPO).
    """
    spans = torch.as_tensor(offsets, dtype=torch.long).reshape(-1, 2)
    roles = torch.full((len(spans),), int(Role.OTHER))
    response = parse_response(text, tags)
    if response is None:
        return roles
    ink = torch.tensor([0] + [not c.isspace() for c in text]).cumsum(0)  # ink[k]: non-space characters before k
    blocks = [(Role.REASONING, response.answer)] if answer_is_reasoning else []
    blocks += [(Role.REASONING, response.reasoning), (Role.PERCEPTION, response.perception)]
    for role, (start, end) in blocks:
        inside = spans.clamp(start, end)  # the part of each token that lies inside the block
        roles[ink[inside[:, 1]] > ink[inside[:, 0]]] = int(role)
    return roles


def without_perception(attention_mask: Tensor, roles: Tensor) -> Tensor:
    """The empty perception of Eq. (3): a response attention mask with the perception text blanked out, tags kept
    (but for the piece of a tag that shares a token with the text).

    Everything from the first to the last perception token goes, white-space tokens between them included (their number
    alone would tell how much was seen). Recompute position ids from the result, and no later token can tell it from
    physical removal.

    Args:
        attention_mask: [B, T], 1 where a response token may be attended to.
        roles: [B, T] of `Role` values.
    Returns:
        [B, T], dtype of `attention_mask`; a new tensor.
    """
    _same_shape(attention_mask=attention_mask, roles=roles)
    seen = (roles == Role.PERCEPTION).long()
    inside = (seen.cumsum(1) > 0) & (seen.flip(1).cumsum(1).flip(1) > 0)
    return attention_mask.masked_fill(inside, 0)


# ------------------------------------------------------------------------------------------- tensors: from Eq. (1) on


def group_advantages(rewards, group_size: int, eps: float = 1e-4) -> Tensor:
    """GRPO advantage, Eq. (1): A_i = (r_i - mean r) / (std r + eps) over the responses of one prompt.

    Args:
        rewards: [B], the G responses of a prompt next to each other; a tensor or a sequence of numbers.
        group_size: G, at least 2.
        eps: keeps the division finite. std is the sample one (divided by G - 1), as in the common trainers: for
            rewards 1, 0, 0, 0 the first advantage is 1.50, not the 1.73 of the population std.
    Returns:
        [B] float32 (float64 for float64 rewards); exactly 0 in a group whose rewards are all equal.
    Raises:
        ValueError: rewards not [B], a group of one, or B not divisible by G.
    """
    rewards = _at_least_float32(torch.as_tensor(rewards))
    if rewards.dim() != 1 or len(rewards) == 0:
        raise ValueError(f"rewards must be [B] with B > 0, got shape {list(rewards.shape)}")
    if group_size < 2:
        raise ValueError(f"group_size must be at least 2, got {group_size}: one response has nothing to compare with")
    if len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards do not divide into groups of group_size {group_size}")
    r = rewards.view(-1, group_size)
    A = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True, unbiased=True) + eps)  # Eq. (1)
    no_spread = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)  # rounding of the mean must not leave a residue
    return torch.where(no_spread, torch.zeros_like(A), A).flatten()


def contrast_scores(
    logp: Tensor, logp_corrupted: Tensor, logp_blank: Tensor, roles: Tensor, max_abs: float = 5.0
) -> Tensor:
    """Self-distilled contrasts Delta, Eq. (2) to (4). Without gradient.

    All three log-probs are of the same sampled tokens, by the policy that sampled them, at the sampling temperature
    and over the tokens that sampling allowed, with dropout off.

    Args:
        logp: [B, T], given the image and all earlier tokens.
        logp_corrupted: [B, T], the same with the corrupted image.
        logp_blank: [B, T], with the image, and with the perception text hidden (`without_perception`).
        roles: [B, T] of `Role` values, OTHER at padding.
        max_abs: Delta_max of Eq. (4).
    Returns:
        [B, T] float32 (float64 for float64 log-probs), within +-max_abs; 0 where OTHER and where the contrast is NaN.
    """
    _same_shape(logp=logp, logp_corrupted=logp_corrupted, logp_blank=logp_blank, roles=roles)
    logp, logp_corrupted, logp_blank = (_at_least_float32(x.detach()) for x in (logp, logp_corrupted, logp_blank))
    delta = torch.zeros_like(logp)
    delta = torch.where(roles == Role.PERCEPTION, logp - logp_corrupted, delta)  # Eq. (2)
    delta = torch.where(roles == Role.REASONING, logp - logp_blank, delta)  # Eq. (3)
    return delta.nan_to_num(nan=0.0, posinf=max_abs, neginf=-max_abs).clamp(-max_abs, max_abs)  # Eq. (4)


def shared_baseline(scores: Tensor, roles: Tensor, *, role_balanced: bool = False) -> Tensor:
    """Trajectory baseline b, Eq. (5): the mean contrast over perception and reasoning tokens together.

    Args:
        scores: [B, T], Delta.
        roles: [B, T] of `Role` values.
        role_balanced: instead, the mean of the two roles' means, whichever has more tokens.
    Returns:
        [B, 1] float32 or better; 0 for a response without scored tokens.
    """
    _same_shape(scores=scores, roles=roles)
    scores = _at_least_float32(scores)
    if role_balanced:
        return (_mean_over(scores, roles == Role.PERCEPTION) + _mean_over(scores, roles == Role.REASONING)) / 2
    return _mean_over(scores, roles != Role.OTHER)  # Eq. (5)


def token_weights(
    scores: Tensor,
    roles: Tensor,
    *,
    tau: float = 1.0,
    w_min: float = 0.5,
    w_max: float = 2.0,
    normalize: bool = True,
    role_balanced: bool = False,
    flip: Tensor | None = None,
) -> Tensor:
    """Positive token weights w, Eq. (5), (6) and (9). Without gradient.

    Args:
        scores: [B, T], Delta.
        roles: [B, T] of `Role` values.
        tau: temperature in nats; the larger, the closer every weight is to 1.
        w_min, w_max: range of the weights before they are normalized; afterwards they lie in [w_min/w_max, w_max/w_min].
        normalize: scale the weights to mean 1 over the scored tokens, so that a response keeps its total advantage.
        role_balanced: as in `shared_baseline`.
        flip: [B] bool, responses whose emphasis is turned round, so that tokens of low contrast weigh more. With
            `advantages < 0` the weights are sign-aware: blame goes to what neither image nor perception explains
            (as in RLSD, arXiv 2604.03128). By default none.
    Returns:
        [B, T] float32 (float64 for float64 scores); 1 at OTHER tokens, and everywhere in a response that lacks
        perception or reasoning tokens, or has a non-finite score, Eq. (9).
    Raises:
        ValueError: shapes differ, tau <= 0, or not 0 < w_min <= w_max.
    """
    _same_shape(scores=scores, roles=roles)
    if not (tau > 0 and 0 < w_min <= w_max):
        raise ValueError(f"need tau > 0 and 0 < w_min <= w_max, got tau={tau}, w_min={w_min}, w_max={w_max}")
    scores = _at_least_float32(scores.detach())
    scored = roles != Role.OTHER  # S = P u R
    b = shared_baseline(scores, roles, role_balanced=role_balanced)  # Eq. (5)
    relative = scores - b if flip is None else torch.where(flip[:, None], b - scores, scores - b)
    w = torch.exp((relative / tau).clamp(math.log(w_min), math.log(w_max)))  # Eq. (6), first line
    if normalize:
        w = w / _mean_over(w, scored)  # Eq. (6), second line
    both_roles = (roles == Role.PERCEPTION).any(1, keepdim=True) & (roles == Role.REASONING).any(1, keepdim=True)
    usable = both_roles & (scores.isfinite() | ~scored).all(1, keepdim=True)
    return torch.where(scored & usable, w, torch.ones_like(w))  # Eq. (9)


def role_aware_advantages(advantages: Tensor, weights: Tensor, lam: float = 1.0) -> Tensor:
    """Role-aware token-level advantages, Eq. (7): A-hat = A * ((1 - lam) + lam * w).

    Args:
        advantages: [B], or [B, T] from a trainer that has them per token.
        weights: [B, T], w.
        lam: in [0, 1]; 0 is GRPO, bit for bit.
    Returns:
        [B, T], without gradient; the sign is everywhere that of the advantage.
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must lie in [0, 1], got {lam}")
    A, w = _per_token("advantages", advantages.detach(), weights), _at_least_float32(weights.detach())
    return A * ((1 - lam) + lam * w)  # Eq. (7)


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    denominator=None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate, Eq. (8), as a loss to minimize. The KL term is separate: `kl_to_reference`.

    Args:
        logp: [B, T], of the policy being trained, with gradient.
        old_logp: [B, T], of the policy that sampled.
        advantages: [B, T] from `role_aware_advantages`, or [B] for plain GRPO.
        mask: [B, T], non-zero at response tokens, EOS included, padding excluded; any dtype.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        denominator: number of response tokens in the whole optimizer step. Give it when the step is split into
            micro-batches, so that the split does not matter; by default the tokens of this call.
    Returns:
        loss: scalar, float32 or better; 0 when the mask is empty.
        stats: detached scalars, each a sum over tokens / denominator, so those of micro-batches add up:
            clip_frac (share of tokens whose gradient is clipped away) and ratio (mean probability ratio).
    """
    _same_shape(logp=logp, old_logp=old_logp, mask=mask)
    mask = mask != 0
    A = _per_token("advantages", advantages.detach(), logp).masked_fill(~mask, 0)  # padding may hold anything
    log_ratio = (_at_least_float32(logp) - _at_least_float32(old_logp.detach())).masked_fill(~mask, 0)
    rho = log_ratio.clamp(-20, 20).exp()  # [B, T], 1 at padding; unclamped it can overflow, and inf * 0 is NaN
    unclipped, clipped = rho * A, rho.clamp(1 - clip_low, 1 + clip_high) * A
    objective = torch.minimum(unclipped, clipped)  # Eq. (8); 0 at padding, where A is 0
    denominator = mask.sum().clamp(min=1) if denominator is None else denominator
    stats = {"clip_frac": (clipped < unclipped).sum() / denominator, "ratio": (rho * mask).sum() / denominator}
    return -objective.sum() / denominator, {name: value.detach() for name, value in stats.items()}


def kl_to_reference(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """KL[pi || pi_ref] of Eq. (8), token mean of the k3 estimator r - 1 - log r, r = pi_ref / pi (Schulman 2020).

    Args:
        logp: [B, T], of the policy being trained, with gradient.
        ref_logp: [B, T], of the reference.
        mask: [B, T], as in `policy_loss`. The term is the same for every role: it is not weighted.
    Returns:
        Scalar in nats per token, >= 0; 0 when the mask is empty. Of a micro-batch, scale it by its share of the tokens.
    """
    _same_shape(logp=logp, ref_logp=ref_logp, mask=mask)
    mask = mask != 0
    log_r = (_at_least_float32(ref_logp.detach()) - _at_least_float32(logp)).masked_fill(~mask, 0).clamp(-20, 20)
    return (log_r.exp() - 1 - log_r).sum() / mask.sum().clamp(min=1)


# ------------------------------------------------------------------------------------- corrupted images, for other hosts


def corrupt_patches(patches: Tensor, p: float, seed: int) -> Tensor:
    """The patch mask for a trainer that holds processed images: a share p of the patches in the image's mean color, Eq. (2).

    The draw depends on the image and the seed alone, so all responses to one prompt share it, on whatever process.

    Args:
        patches: [patches, channels * pixels] of one image, three channels, as image processors of the Qwen-VL family make it.
        p: in [0, 1].
        seed: another one in every training step.
    Returns:
        [patches, channels * pixels], a new tensor.
    Raises:
        ValueError: p is not a share.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p must lie in [0, 1], got {p}")
    bits = patches.detach().float().contiguous().view(torch.int32).flatten().long()
    digest = (bits * (torch.arange(len(bits), device=bits.device) * 2654435761 + 1)).sum().item()  # of the image, modulo 2^64
    generator = torch.Generator().manual_seed((digest + seed * 1000003) % 2**63)
    hit = torch.zeros(len(patches), 1, dtype=torch.bool)
    hit[torch.randperm(len(patches), generator=generator)[: round(p * len(patches))]] = True
    channels = patches.reshape(len(patches), 3, -1)
    mean = channels.mean((0, 2))[None, :, None].expand_as(channels).reshape(patches.shape)
    return torch.where(hit.to(patches.device), mean, patches)


# --------------------------------------------------------------------------------------------------------------- parts


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _mean_over(x: Tensor, where: Tensor) -> Tensor:
    """Row mean of x over `where`: [B, T] -> [B, 1]; 0 for a row without any. Values elsewhere may be NaN."""
    return x.masked_fill(~where, 0).sum(1, keepdim=True) / where.sum(1, keepdim=True).clamp(min=1)


def _per_token(name: str, x: Tensor, like: Tensor) -> Tensor:
    """[B] or [B, T] -> a view [B, T], float32 or better."""
    x = x.unsqueeze(1) if x.dim() == 1 and like.dim() == 2 else x
    if like.dim() != 2 or x.dim() != 2 or x.shape[0] != like.shape[0] or x.shape[1] not in (1, like.shape[1]):
        raise ValueError(f"{name} {list(x.shape)} do not fit [B, T] = {list(like.shape)}")
    return _at_least_float32(x).expand(like.shape)


def _same_shape(**tensors: Tensor) -> None:
    (first, a), *others = tensors.items()
    for name, x in [(first, a), *others]:
        if x.dim() != 2 or x.shape != a.shape:
            raise ValueError(f"{first} {list(a.shape)} and {name} {list(x.shape)} must have one shape [B, T]")
