"""SRPO in EasyR1: one call after `compute_advantage` in `RayPPOTrainer.fit` (verl/trainer/ray_trainer.py).

    batch.batch["advantages"] = role_aware(batch, self.actor_rollout_wg, self.tokenizer, self.global_step)

Copy this file, srpo.py and corrupt.py to where Python finds them. Written against EasyR1 at commit 26dfd97, with names that
later ones keep; EasyR1 is not on PyPI, so the test runs on stand-ins that behave as its batch and workers do.
"""

import copy
import hashlib
import io

import numpy as np
import torch
from PIL import Image

from corrupt import corrupt
from srpo import (
    Role,
    contrast_scores,
    role_aware_advantages,
    text_and_offsets,
    token_bytes,
    token_roles,
    token_weights,
    without_perception,
)


def role_aware(batch, workers, tokenizer, step: int, lam: float = 1.0, corruption_p: float = 0.6, **weight_options) -> torch.Tensor:
    """A-hat [B, T], Eq. (2) to (7).

    Args:
        batch: EasyR1's DataProto with `advantages`, `old_log_probs`, `responses`, `response_mask`, `multi_modal_data`.
        workers: the actor's worker group, for `compute_log_probs`.
        step: of training; the corrupted images depend on it and on the prompt.
        weight_options: arguments of `srpo.token_weights`.
    Raises:
        KeyError: EasyR1 has renamed what is needed here.
        RuntimeError: no perception token depends on the image: the corrupted pixels never arrived.
    """
    needed = {"advantages", "old_log_probs", "responses", "response_mask", "attention_mask", "position_ids"}
    if missing := (needed - set(batch.batch.keys())) | ({"uid", "multi_modal_data"} - set(batch.non_tensor_batch)):
        raise KeyError(f"easyr1_srpo.py was written for EasyR1 at 26dfd97; this batch lacks {', '.join(sorted(missing))}")
    mask, added, special = batch.batch["response_mask"], tokenizer.get_added_vocab(), {None, *tokenizer.all_special_tokens}
    roles = torch.zeros_like(mask, dtype=torch.long)
    for row, n in enumerate(mask.sum(1).tolist()):
        if not batch.non_tensor_batch["multi_modal_data"][row].get("images"):
            continue  # without an image, Eq. (9)
        tokens = tokenizer.convert_ids_to_tokens(batch.batch["responses"][row, :n].tolist())
        pieces = [b"" if t in special else t.encode() if t in added else token_bytes(t) for t in tokens]  # EOS has no text
        roles[row, :n] = token_roles(*text_and_offsets(pieces))
    logp_blank = workers.compute_log_probs(blank(batch, roles)).batch["old_log_probs"]  # first: its pixels are in the cache
    logp_corrupted = workers.compute_log_probs(corrupted(batch, step, corruption_p)).batch["old_log_probs"]
    delta = contrast_scores(batch.batch["old_log_probs"], logp_corrupted, logp_blank, roles)
    seen = roles == Role.PERCEPTION
    if seen.any() and not delta[seen].any():
        raise RuntimeError("no perception token's log-prob depends on the image: the corrupted pixels do not reach the model")
    return role_aware_advantages(batch.batch["advantages"], token_weights(delta, roles, **weight_options), lam)


def changed(batch, tensors: dict, others: dict):
    """The batch with some of its fields replaced; the given one stays as it is."""
    new = copy.copy(batch)
    new.batch = batch.batch.clone(recurse=False)
    for name, x in tensors.items():
        new.batch[name] = x
    new.non_tensor_batch = batch.non_tensor_batch | others
    return new


def blank(batch, roles: torch.Tensor):
    """The perception hidden, Eq. (3): its attention mask at 0, and positions counted over what remains."""
    mask = batch.batch["attention_mask"].clone()  # [B, P + T]
    mask[:, -roles.shape[1] :] = without_perception(mask[:, -roles.shape[1] :], roles)
    gone = (batch.batch["attention_mask"] - mask).cumsum(1)
    positions = batch.batch["position_ids"]  # [B, P + T], or [B, 3 or 4, P + T] with M-RoPE
    return changed(batch, {"attention_mask": mask, "position_ids": positions - (gone if positions.dim() == 2 else gone[:, None])}, {})


def corrupted(batch, step: int, p: float):
    """Corrupted images, one draw for all responses to a prompt: squares of 28 pixels, one visual token each, of the image
    as EasyR1 will resize it. Under uids of their own: workers keep processed pixels by uid, and would take the clean ones
    again."""
    data, limits = [], [batch.meta_info.get(f"{end}_pixels") or batch.meta_info.get(f"image_{end}_pixels") for end in ("min", "max")]
    for uid, old in zip(batch.non_tensor_batch["uid"], batch.non_tensor_batch["multi_modal_data"], strict=True):
        seed = int.from_bytes(hashlib.sha256(f"{uid} {step}".encode()).digest()[:7], "big")
        images = [corrupt(resized(opened(image), *limits), "patch", patch=28, p=p, seed=seed) for image in old.get("images") or []]
        data.append(dict(old) | ({"images": images} if images else {}))
    column = np.empty(len(data), dtype=object)
    column[:] = data
    return changed(batch, {}, {"multi_modal_data": column, "uid": batch.non_tensor_batch["uid"] + " corrupted"})


def opened(image) -> Image.Image:
    """EasyR1 takes images, paths, bytes, and dicts with bytes."""
    image = image["bytes"] if isinstance(image, dict) else image
    return image if isinstance(image, Image.Image) else Image.open(io.BytesIO(image) if isinstance(image, bytes) else image).convert("RGB")


def resized(image: Image.Image, low: int | None, high: int | None) -> Image.Image:
    """To an area within EasyR1's limits, so that it leaves the size as it is."""
    area = image.width * image.height
    scale = (high / area) ** 0.5 if high and area > high else (low / area) ** 0.5 if low and area < low else 1
    return image if scale == 1 else image.resize((int(image.width * scale), int(image.height * scale)))
