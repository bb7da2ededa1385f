"""What the adapters to TRL, verl and EasyR1 share. Copy it, srpo.py and one adapter beside your script.

An adapter takes three things from its trainer: the sampled ids, the advantages, and log-probs of the same
tokens in three contexts. Here they become roles and A_hat.
"""

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


def roles_of(ids: Tensor, mask: Tensor, shown, tokenizer, tags: Tags = Tags()) -> Tensor:
    """Roles of sampled responses.

    Args:
        ids: [B, T].
        mask: [B, T], 1 at response tokens, 0 at the padding after them.
        shown: B truth values, whether there is an image; without one a response is all OTHER (step 9).
        tokenizer: of Hugging Face, with a byte-level vocabulary.
        tags: names of the blocks.
    Returns:
        [B, T] long of `Role` values, on the device of `ids`.
    Raises:
        ValueError: the vocabulary is not byte-level.
    """
    added, special = tokenizer.get_added_vocab(), {None, *tokenizer.all_special_tokens}
    roles = torch.full_like(ids, Role.OTHER, dtype=torch.long)
    for row, (n, has_image) in enumerate(zip(mask.sum(1).tolist(), shown, strict=True)):
        if not has_image:
            continue
        tokens = tokenizer.convert_ids_to_tokens(ids[row, :n].tolist())
        pieces = [b"" if t in special else t.encode() if t in added else token_bytes(t) for t in tokens]
        roles[row, :n] = token_roles(*text_and_offsets(pieces), tags).to(roles.device)
    return roles


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
        weight_options: arguments of `srpo.token_weights`.
    Returns:
        A_hat, w and delta, each [B, T].
    Raises:
        RuntimeError: perception tokens have contrasts and every one is 0, the silent failure of this method.
        ValueError: shapes, lam or options that srpo.py refuses.
    """
    delta = contrast_scores(logp, logp_corrupted, logp_blank, roles)
    seen = delta[(roles == Role.PERCEPTION) & delta.isfinite()]  # NaN tells neither of a change nor of none
    if not arrived and len(seen) and not seen.any():
        raise RuntimeError(
            "no perception token's log-prob depends on the image: the corrupted pixels do not reach the model"
        )
    w = token_weights(delta, roles, **weight_options)
    return role_aware_advantages(advantages, w, lam), w, delta


def corrupt_pixels(pixel_values: Tensor, image_grid_thw: Tensor, p: float, seed: int) -> Tensor:
    """`corrupt_patches` for images that lie one after the other, as the Qwen-VL family keeps them.

    Args:
        pixel_values: [patches of all images, channels * pixels].
        image_grid_thw: [images, 3], the patches of each image in time, height and width.
    Returns:
        The shape of `pixel_values`; a new tensor.
    """
    images = pixel_values.split(image_grid_thw.prod(1).tolist())
    return torch.cat([corrupt_patches(image, p, seed) for image in images])


def corrupt_patches(patches: Tensor, p: float, seed: int) -> Tensor:
    """A patch mask for processed images: a share p of the patches in the image's mean color (step 2).

    The draw depends on the image and the seed alone, so all responses to one prompt share it, on whatever
    process.

    Args:
        patches: [patches, channels * pixels] of one image, three channels.
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
    position = torch.arange(len(bits), device=bits.device)
    digest = (bits * (position * 2654435761 + 1)).sum().item()  # of the image, modulo 2^64
    generator = torch.Generator().manual_seed((digest + seed * 1000003) % 2**63)
    hit = torch.zeros(len(patches), 1, dtype=torch.bool)
    hit[torch.randperm(len(patches), generator=generator)[: round(p * len(patches))]] = True
    channels = patches.reshape(len(patches), 3, -1)
    mean = channels.mean((0, 2))[None, :, None].expand_as(channels).reshape(patches.shape)
    return torch.where(hit.to(patches.device), mean, patches)
