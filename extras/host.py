"""What the adapters to TRL, verl and EasyR1 share. Copy it and srpo.py with the adapter.

An adapter takes three things from its trainer: the sampled ids, the advantages, and log-probs of
the same tokens in three contexts. Here they become roles and A_hat.
"""

import sys

if __name__ == "__main__":
    print(
        "error: no script: trl_srpo.py, verl_srpo.py and easyr1_srpo.py import it", file=sys.stderr
    )
    sys.exit(2)

import torch
from torch import Tensor

from srpo import (
    Role,
    Tags,
    contrast_scores,
    role_aware_advantages,
    text_and_offsets,
    token_bytes,
    token_roles,
    token_weights,
)

TAGS = Tags()

# -------------------------------------------------------------------------------------------- roles


def roles_of(ids: Tensor, mask: Tensor, has_image, tokenizer, tags: Tags = TAGS) -> Tensor:
    """Roles of sampled responses.

    Args:
        ids: [B, T].
        mask: [B, T], 1 at response tokens, 0 at the padding after them.
        has_image: B truth values; a response to a prompt without an image is all OTHER (step 9).
        tokenizer: of Hugging Face, with a byte-level vocabulary.
        tags: names of the blocks.
    Returns:
        [B, T] long of `Role` values, on the device of `ids`.
    Raises:
        ValueError: the vocabulary is not byte-level.
    """
    added = tokenizer.get_added_vocab()
    special = tokenizer.all_special_tokens
    lengths = mask.sum(dim=1).tolist()
    roles = torch.full_like(ids, Role.OTHER, dtype=torch.long)
    for row, (length, shown) in enumerate(zip(lengths, has_image, strict=True)):
        if not shown:
            continue
        tokens = tokenizer.convert_ids_to_tokens(ids[row, :length].tolist())
        pieces = [bytes_of(token, added, special) for token in tokens]
        text, offsets = text_and_offsets(pieces)
        roles[row, :length] = token_roles(text, offsets, tags).to(roles.device)
    return roles


def bytes_of(token: str | None, added, special) -> bytes:
    """The bytes of a token; none for a special one, and none for an id beyond the tokenizer."""
    if token is None or token in special:
        return b""
    if token in added:
        return token.encode()
    return token_bytes(token)


# ------------------------------------------------------------------------------------------ weights


def weigh(
    advantages: Tensor,
    roles: Tensor,
    logp: Tensor,
    logp_corrupted: Tensor,
    logp_blank: Tensor,
    lam: float = 1.0,
    *,
    arrived: bool = False,
    **weight_options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Steps 2 to 7, and 9, from the log-probs that a trainer computed.

    Args:
        advantages: A, [B], or [B, T] from a trainer that has them per token.
        roles: [B, T], from `roles_of`.
        logp, logp_corrupted, logp_blank: [B, T], as in `srpo.contrast_scores`.
        lam: lambda of step 7; 0 is GRPO, bit for bit.
        arrived: do not check again that corrupted pixels reach the model.
        weight_options: tau, w_min and w_max of `srpo.token_weights`.
    Returns:
        A_hat, w and delta, each [B, T].
    Raises:
        RuntimeError: perception tokens have contrasts and every one is 0. The corrupted pixels were
            lost on their way, and without this check nothing would say so.
        ValueError: shapes, lam or options that srpo.py refuses.
    """
    delta = contrast_scores(logp, logp_corrupted, logp_blank, roles)
    if not arrived:
        contrasts = perception_contrasts(delta, roles)
        if len(contrasts) > 0 and not contrasts.any():
            raise RuntimeError(
                "no perception token's log-prob depends on the image: "
                "the corrupted pixels do not reach the model"
            )
    w = token_weights(delta, roles, **weight_options)
    A_hat = role_aware_advantages(advantages, w, lam)
    return A_hat, w, delta


def perception_contrasts(delta: Tensor, roles: Tensor) -> Tensor:
    """[n]: the contrasts of perception tokens, without NaN, which says nothing of the image."""
    return delta[(roles == Role.PERCEPTION) & delta.isfinite()]


# --------------------------------------------------------------------------------- corrupted pixels


def corrupt_pixels(pixel_values: Tensor, image_grid_thw: Tensor, p: float, seed: int) -> Tensor:
    """`corrupt_patches` for images that lie one after the other, as the Qwen-VL family keeps them.

    Args:
        pixel_values: [patches of all images, channels * pixels].
        image_grid_thw: [images, 3], the patches of each image in time, height and width.
    Returns:
        The shape of `pixel_values`; a new tensor.
    """
    patches_of_image = image_grid_thw.prod(dim=1).tolist()
    images = pixel_values.split(patches_of_image)
    return torch.cat([corrupt_patches(image, p, seed) for image in images])


def corrupt_patches(patches: Tensor, p: float, seed: int) -> Tensor:
    """A patch mask for a processed image: a share p of the patches in its mean color (step 2).

    The draw depends on the image and the seed alone, so all responses to one prompt share it, on
    whatever process.

    Args:
        patches: [patches, channels * pixels] of one image, three channels.
        p: in (0, 1]; at least one patch is hit.
        seed: another one in every training step.
    Returns:
        [patches, channels * pixels], a new tensor.
    Raises:
        ValueError: p is not a share, or 0, which corrupts nothing.
    """
    if not 0 < p <= 1:
        raise ValueError(f"p must lie in (0, 1], got {p}")
    n = len(patches)
    generator = torch.Generator().manual_seed((digest(patches) + seed * 1000003) % 2**63)
    hit = torch.zeros(n, 1, dtype=torch.bool)
    hit[torch.randperm(n, generator=generator)[: max(1, round(p * n))]] = True
    by_channel = patches.reshape(n, 3, -1)  # [patches, channels, pixels]
    mean_color = by_channel.mean(dim=(0, 2))[None, :, None]  # [1, channels, 1]
    filled = mean_color.expand_as(by_channel).reshape(patches.shape)
    return torch.where(hit.to(patches.device), filled, patches)


def digest(patches: Tensor) -> int:
    """A number that tells images apart, for the seed."""
    bits = patches.detach().float().contiguous().view(torch.int32).flatten().long()
    place = torch.arange(len(bits), device=bits.device)
    return (bits * (place * 2654435761 + 1)).sum().item()  # int64 sums wrap around, modulo 2^64
