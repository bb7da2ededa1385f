"""SRPO, Structured Role-Aware Policy Optimization, as pure tensor functions (arXiv 2605.07274).

GRPO gives every token of a response the same advantage. SRPO splits a response

    <perception> what is seen </perception>
    <reasoning> what follows from it </reasoning>
    <answer> ... </answer>

into perception and reasoning tokens and scales the advantage of each by a positive weight.
Perception tokens count more where they depend on the image, reasoning tokens where they
follow from the perception.

    step 1      A       group_advantages         one advantage per response, exactly GRPO's
    steps 2-4   delta   contrast_scores          what image, or perception, explains of a token
    step 5      b       shared_baseline          one number per response, common to both roles
    steps 6, 9  w       token_weights            positive, with mean 1 over the scored tokens
    step 7      A_hat   role_aware_advantages    one advantage per token
    step 8      loss    policy_loss              GRPO's clipped surrogate, with A_hat in place of A

This is a reconstruction from the paper's abstract. The numbers of the steps are this project's;
section 9 of extras/walkthrough.ipynb lists what the abstract leaves open, and what was chosen.
To copy the file, take it whole: it needs torch alone.

Shapes: [B, T] is responses x response positions. Entry t of a log-prob is log pi(o_t | everything
before o_t), already shifted.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor


class Role(IntEnum):
    """What a response token is for. Tags, answer, white space, EOS and padding are OTHER."""

    OTHER = 0
    PERCEPTION = 1
    REASONING = 2


# ---- the nine steps


def group_advantages(rewards, group_size: int, eps: float = 1e-4) -> Tensor:
    """Step 1, the GRPO advantage: A_i = (r_i - mean r) / (std r + eps) over one prompt's responses.

    Args:
        rewards: [B], the G responses of a prompt next to each other; a tensor or numbers.
        group_size: G, at least 2.
        eps: keeps the division finite. The std is the sample one (divided by G - 1), as in the
            common trainers: for rewards 1, 0, 0, 0 the first advantage is 1.50, not the 1.73 of
            the population std.
    Returns:
        A, [B] float32 (float64 for float64 rewards); exactly 0 in a group whose rewards are all
        equal.
    Raises ValueError: rewards are not [B], or do not divide into groups of two or more.
    """
    dtype = torch.float32
    if isinstance(rewards, Tensor) and rewards.dtype == torch.float64:
        dtype = torch.float64
    r = torch.as_tensor(rewards, dtype=torch.float64)  # in float32, 1e9 + 1 would be 1e9
    if r.dim() != 1 or r.numel() == 0 or group_size < 2 or len(r) % group_size != 0:
        shape = list(r.shape)
        raise ValueError(f"rewards {shape} must be [B], in groups of {group_size} >= 2")
    r = r.view(-1, group_size)  # [N, G]
    mean = r.mean(dim=1, keepdim=True)  # [N, 1]
    std = r.std(dim=1, keepdim=True, unbiased=True)  # [N, 1]
    A = (r - mean) / (std + eps)  # [N, G], step 1
    # Equal rewards teach nothing: rounding of the mean must not leave a residue.
    no_spread = (r == r[:, :1]).all(dim=1, keepdim=True)  # [N, 1]
    return A.masked_fill(no_spread, 0).flatten().to(dtype)  # [B]


def contrast_scores(
    logp: Tensor, logp_corrupted: Tensor, logp_blank: Tensor, roles: Tensor, max_abs: float = 5.0
) -> Tensor:
    """Steps 2 to 4, the self-distilled contrasts delta. Without gradient.

    All log-probs are of the same sampled tokens, by the policy that sampled them, at the sampling
    temperature, over the tokens that sampling allowed, and with dropout off.

    Args:
        logp: [B, T], given the image and all earlier tokens.
        logp_corrupted: [B, T], with the corrupted image; read at perception tokens.
        logp_blank: [B, T], without the perception text; read at reasoning tokens.
        roles: [B, T] of `Role` values, OTHER at padding.
        max_abs: Delta_max of step 4, in nats.
    Returns:
        delta, [B, T] float32 (float64 for float64), within +-max_abs; 0 where OTHER; NaN where a
        log-ratio is not finite, so that step 9 can see it.
    Raises ValueError where the shapes differ.
    """
    _check_same_shape(logp=logp, logp_corrupted=logp_corrupted, logp_blank=logp_blank, roles=roles)
    logp = _at_least_float32(logp.detach())
    perception_contrast = logp - _at_least_float32(logp_corrupted.detach())  # [B, T], step 2
    reasoning_contrast = logp - _at_least_float32(logp_blank.detach())  # [B, T], step 3
    delta = torch.zeros_like(logp)
    delta = torch.where(roles == Role.PERCEPTION, perception_contrast, delta)
    delta = torch.where(roles == Role.REASONING, reasoning_contrast, delta)
    clamped = delta.clamp(-max_abs, max_abs)  # [B, T], step 4
    return clamped.masked_fill(~delta.isfinite(), float("nan"))


def without_perception(attention_mask: Tensor, roles: Tensor) -> Tensor:
    """The empty perception of step 3: the attention mask of a response without the perception text.

    Everything from the first to the last perception token is hidden, white space too: its amount
    tells what was seen. A token that holds the end of the perception and a part of the closing tag
    is hidden whole. Compute position ids from the mask of prompt and response together (a running
    sum): then no later token of an attention model can tell hidden tokens from removed ones. A
    recurrent model needs them removed.

    Args:
        attention_mask: [B, T], of the response alone, 1 where a token may be attended to.
        roles: [B, T] of `Role` values.
    Returns:
        [B, T], dtype of `attention_mask`; a new tensor.
    Raises ValueError where the shapes differ.
    """
    _check_same_shape(attention_mask=attention_mask, roles=roles)
    is_perception = (roles == Role.PERCEPTION).long()
    at_or_after_first = is_perception.cumsum(dim=1) > 0  # [B, T]
    at_or_before_last = is_perception.flip(1).cumsum(dim=1).flip(1) > 0  # [B, T]
    return attention_mask.masked_fill(at_or_after_first & at_or_before_last, 0)


def shared_baseline(delta: Tensor, roles: Tensor) -> Tensor:
    """Step 5, the trajectory's baseline b: the mean contrast over both roles together.

    Args:
        delta: [B, T], the contrasts.
        roles: [B, T] of `Role` values.
    Returns:
        b, [B, 1] float32 or better; 0 for a response without scored tokens.
    Raises ValueError where the shapes differ.
    """
    _check_same_shape(delta=delta, roles=roles)
    return _mean_over(_at_least_float32(delta), roles != Role.OTHER)  # [B, 1], step 5


def token_weights(
    delta: Tensor, roles: Tensor, *, tau: float = 1.0, w_min: float = 0.8, w_max: float = 1.2
) -> Tensor:
    """Steps 5, 6 and 9, the positive token weights w. Without gradient.

    Args:
        delta: [B, T], the contrasts.
        roles: [B, T] of `Role` values.
        tau: temperature in nats; the larger, the closer every weight is to 1.
        w_min, w_max: limits of a weight before normalizing, by default those of RLSD (arXiv
            2604.03128); normalized weights lie in [w_min / w_max, w_max / w_min].
    Returns:
        w, [B, T] float32 (float64 for float64), with mean 1 over a response's scored tokens, so
        that it keeps its total advantage; 1 at OTHER tokens, and everywhere in a response that
        lacks perception or reasoning tokens or has a contrast that is not finite (step 9).
    Raises ValueError: the shapes differ; a number is not within 1e-15 and 1e15; w_min > w_max.
    """
    _check_same_shape(delta=delta, roles=roles)
    if not (1e-15 <= tau <= 1e15 and 1e-15 <= w_min <= w_max <= 1e15):  # ratios fit float32
        limits = f"tau={tau}, w_min={w_min}, w_max={w_max}"
        raise ValueError(f"need tau > 0 and 0 < w_min <= w_max, all finite, got {limits}")
    delta = _at_least_float32(delta.detach())
    P = roles == Role.PERCEPTION  # [B, T]
    R = roles == Role.REASONING  # [B, T]
    S = P | R  # [B, T], the scored positions
    b = shared_baseline(delta, roles)  # [B, 1], step 5
    relative = (delta - b) / tau  # [B, T]
    w_tilde = torch.exp(relative.clamp(math.log(w_min), math.log(w_max)))  # [B, T], step 6
    w = w_tilde / _mean_over(w_tilde, S)  # [B, T], step 6, second line
    finite = (delta.isfinite() | ~S).all(dim=1)  # [B]
    usable = P.any(dim=1) & R.any(dim=1) & finite  # [B]
    return torch.where(S & usable[:, None], w, torch.ones_like(w))  # [B, T], step 9


def role_aware_advantages(advantages: Tensor, weights: Tensor, lam: float = 1.0) -> Tensor:
    """Step 7, the role-aware token-level advantage: A_hat = A ((1 - lam) + lam w).

    Args:
        advantages: A, [B], or [B, T] from a trainer that has them per token.
        weights: w, [B, T].
        lam: in [0, 1]; 0 is GRPO, bit for bit.
    Returns:
        A_hat, [B, T], without gradient; its sign is everywhere that of A.
    Raises ValueError: the shapes do not fit, or lam lies outside [0, 1].
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must lie in [0, 1], got {lam}")
    A = _per_token(advantages.detach(), weights)  # [B, T]
    w = _at_least_float32(weights.detach())  # [B, T]
    return A * ((1 - lam) + lam * w)  # [B, T], step 7


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
    """Step 8, the clipped surrogate, as a loss to minimize. For the KL term: `kl_to_reference`.

    A ratio beyond e^20 counts as e^20, without gradient: it could overflow, and inf * 0 is NaN.

    Args:
        logp: [B, T], of the policy in training, with gradient.
        old_logp: [B, T], of the policy that sampled.
        advantages: A_hat, [B, T], from `role_aware_advantages`, or A, [B], for plain GRPO.
        mask: [B, T], non-zero at response tokens, EOS included, padding excluded; any dtype.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        denominator: response tokens of the whole optimizer step. Give it when the step is split
            into micro-batches, so that the split does not matter; by default those of this call.
    Returns:
        loss: scalar, float32 or better; 0 when the mask is empty.
        stats: detached scalars: clip_frac, the share of tokens whose gradient is clipped away, and
            ratio, the mean probability ratio. With `denominator` they add up over micro-batches.
    Raises ValueError: the shapes do not fit.
    """
    _check_same_shape(logp=logp, old_logp=old_logp, mask=mask)
    is_response = mask != 0
    if denominator is None:
        denominator = is_response.sum().clamp(min=1)
    A_hat = _per_token(advantages.detach(), logp)
    A_hat = A_hat.masked_fill(~is_response, 0)  # [B, T]; padding may hold anything
    log_rho = _at_least_float32(logp) - _at_least_float32(old_logp.detach())
    log_rho = log_rho.masked_fill(~is_response, 0)
    rho = log_rho.clamp(-20, 20).exp()  # [B, T]
    unclipped = rho * A_hat
    clipped = rho.clamp(1 - clip_low, 1 + clip_high) * A_hat
    objective = torch.minimum(unclipped, clipped)  # [B, T], step 8; 0 at padding
    loss = -objective.sum() / denominator
    clip_frac = (clipped < unclipped).sum() / denominator
    mean_ratio = (rho * is_response).sum().detach() / denominator
    return loss, {"clip_frac": clip_frac, "ratio": mean_ratio}


def kl_to_reference(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """KL[pi || pi_ref] of step 8: token mean of k3 = r - 1 - log r, r = pi_ref / pi (Schulman).

    Args:
        logp, ref_logp: [B, T], of the policy in training, with gradient, and of the reference.
        mask: [B, T], as in `policy_loss`. The term is the same for every role: it is not weighted.
    Returns:
        Scalar in nats per token, >= 0; 0 when the mask is empty. Of a micro-batch, scale it by
        its share of the tokens.
    Raises ValueError where the shapes differ.
    """
    _check_same_shape(logp=logp, ref_logp=ref_logp, mask=mask)
    is_response = mask != 0
    log_r = _at_least_float32(ref_logp.detach()) - _at_least_float32(logp)
    log_r = log_r.masked_fill(~is_response, 0).clamp(-20, 20)  # [B, T]
    k3 = log_r.exp() - 1 - log_r  # [B, T]
    return k3.sum() / is_response.sum().clamp(min=1)


# ---- text: tags and token roles


@dataclass(frozen=True)
class Tags:
    """Names of the three blocks. Plain text, which need not be special tokens of the tokenizer."""

    perception: str = "perception"
    reasoning: str = "reasoning"
    answer: str = "answer"

    def __post_init__(self):
        names = {self.perception, self.reasoning, self.answer}
        if len(names) < 3 or "" in names:
            raise ValueError(f"Tags must be three different, non-empty names, got {self}")


@dataclass(frozen=True)
class Response:
    """A well-formed response: the (start, end) characters of the text inside each block."""

    perception: tuple[int, int]
    reasoning: tuple[int, int]
    answer: tuple[int, int]


def parse_response(text: str, tags: Tags = Tags()) -> Response | None:
    """Find the three blocks, or return None unless `text` is exactly

        <perception>...</perception> <reasoning>...</reasoning> <answer>...</answer>

    with each tag once, in this order, and nothing but white space outside the blocks. Inside a
    block any text goes, over any number of lines, also none at all. Takes time linear in the
    length of `text`.
    """
    spans = []
    end = 0  # where the block before this one ends
    for name in (tags.perception, tags.reasoning, tags.answer):
        opening = f"<{name}>"
        closing = f"</{name}>"
        if text.count(opening) != 1 or text.count(closing) != 1:
            return None
        start = text.find(opening, end)
        inside = start + len(opening)
        stop = text.find(closing, end)
        if start < 0 or stop < inside or text[end:start].strip():
            return None
        spans.append((inside, stop))
        end = stop + len(closing)
    if text[end:].strip():
        return None
    return Response(*spans)


def token_roles(text: str, offsets: Sequence[tuple[int, int]], tags: Tags = Tags()) -> Tensor:
    """Role of every token of a response.

    A token has a block's role when it shares at least one non-space character with the text
    inside, also when it straddles the tag, like the BPE token ">a" at the start of a block. Of
    two blocks, the first wins.

    Args:
        text: the decoded response.
        offsets: one (start, end) character span per token, from the sampled ids
            (`text_and_offsets`).
        tags: names of the blocks.
    Returns:
        [T] long of `Role` values; all OTHER when the response is not well-formed, for step 9.
    """
    spans = torch.as_tensor(offsets, dtype=torch.long).reshape(-1, 2)  # [T, 2]
    roles = torch.full((len(spans),), int(Role.OTHER))
    response = parse_response(text, tags)
    if response is None:
        return roles
    is_ink = [not character.isspace() for character in text]
    ink_before = torch.tensor([0, *is_ink]).cumsum(dim=0)  # [k]: non-space characters before k
    # Perception comes last, and so has the tokens that touch both blocks.
    blocks = [(Role.REASONING, response.reasoning), (Role.PERCEPTION, response.perception)]
    for role, (start, end) in blocks:
        inside = spans.clamp(start, end)  # [T, 2], the part of each token inside the block
        touches = ink_before[inside[:, 1]] > ink_before[inside[:, 0]]  # [T]
        roles[touches] = int(role)
    return roles


def text_and_offsets(pieces: Sequence[bytes]) -> tuple[str, list[tuple[int, int]]]:
    """Text of sampled tokens, and the characters that each of them touches, from their bytes.

    Encoding the decoded text again would not do: a sampled sequence need not be the tokenization
    that the tokenizer itself would choose. A token that holds part of a multi-byte character
    touches the whole character. Bytes that are not UTF-8 read as U+FFFD, one each.

    Args:
        pieces: the raw bytes of each sampled token, without EOS and padding.
    Returns:
        The text, and one (start, end) character span per token.
    """
    text = b"".join(pieces).decode("utf-8", "surrogateescape")  # a stand-in for each invalid byte
    character_of_byte = []
    for index, character in enumerate(text):
        width = len(character.encode("utf-8", "surrogateescape"))
        character_of_byte.extend([index] * width)
    offsets = []
    first = 0
    for piece in pieces:
        end = first + len(piece)
        if piece:
            offsets.append((character_of_byte[first], character_of_byte[end - 1] + 1))
        else:
            offsets.append((len(text), len(text)))
        first = end
    readable = re.sub("[\udc80-\udcff]", "\ufffd", text)
    return readable, offsets


def token_bytes(token: str) -> bytes:
    """Bytes of a token of a byte-level vocabulary (GPT-2's, Qwen's): each character is one byte.

    Tokens added to the vocabulary, such as "<|im_end|>", are plain text: take `token.encode()`.

    Raises ValueError: a character stands for no byte, so the vocabulary is not byte-level.
    """
    if not set(token) <= _BYTE_OF_CHARACTER.keys():
        raise ValueError(f"not a byte-level tokenizer: its token {token!r} has no bytes")
    return bytes(_BYTE_OF_CHARACTER[character] for character in token)


def _byte_level_alphabet() -> dict[str, int]:
    """Printable bytes stand for themselves, the others for the characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of_character = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    for index, byte in enumerate(others):
        byte_of_character[chr(256 + index)] = byte
    return byte_of_character


_BYTE_OF_CHARACTER = _byte_level_alphabet()

# ---- shapes and checks


def _at_least_float32(x: Tensor) -> Tensor:
    if x.dtype == torch.float64:
        return x
    return x.float()


def _mean_over(x: Tensor, where: Tensor) -> Tensor:
    """Row mean of x over `where`: [B, T] -> [B, 1]; 0 without any. Elsewhere x may be NaN."""
    total = x.masked_fill(~where, 0).sum(dim=1, keepdim=True)
    return total / where.sum(dim=1, keepdim=True).clamp(min=1)


def _per_token(A: Tensor, like: Tensor) -> Tensor:
    """Advantages [B] or [B, T] -> a view [B, T], float32 or better."""
    if A.dim() == 1:
        A = A[:, None]
    fits = A.dim() == 2 and A.shape[0] == like.shape[0] and A.shape[1] in (1, like.shape[-1])
    if like.dim() != 2 or not fits:
        raise ValueError(f"advantages {list(A.shape)} do not fit [B, T] = {list(like.shape)}")
    return _at_least_float32(A).expand(like.shape)


def _check_same_shape(**tensors: Tensor) -> None:
    first = next(iter(tensors))
    shape = tensors[first].shape
    for name, x in tensors.items():
        if x.dim() != 2 or x.shape != shape:
            shapes = f"{first} {list(shape)} and {name} {list(x.shape)}"
            raise ValueError(f"{shapes} must have one shape [B, T]")
