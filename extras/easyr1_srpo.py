"""SRPO in EasyR1: after `compute_advantage` in `RayPPOTrainer.fit` (verl/trainer/ray_trainer.py) add

    from easyr1_srpo import role_aware
    A_hat = role_aware(batch, self.actor_rollout_wg, self.tokenizer, self.global_step)
    batch.batch["advantages"] = A_hat

Copy this file, host.py, srpo.py and corrupt.py to where Python finds them. Written against EasyR1 at commit
26dfd97 (other versions may name the workers otherwise); EasyR1 is not on PyPI, so the test runs on stand-ins
that behave as its batch and workers do.
"""

import copy
import hashlib
import io

import numpy as np
import torch
from PIL import Image

from corrupt import corrupt
from host import roles_of, weigh
from srpo import without_perception


def role_aware(
    batch, workers, tokenizer, step: int, lam: float = 1.0, corruption_p: float = 0.6, **weight_options
) -> torch.Tensor:
    """A_hat [B, T], steps 2 to 7.

    Args:
        batch: EasyR1's DataProto, as it is after `compute_advantage`; it stays as it is.
        workers: the actor's worker group, for `compute_log_probs`.
        tokenizer: of Hugging Face, byte-level.
        step: of training; the corrupted images depend on it and on the prompt.
        lam: lambda of step 7.
        corruption_p: share of the image's patches painted in its mean color (step 2).
        weight_options: arguments of `srpo.token_weights`.
    Raises:
        KeyError: EasyR1 has renamed what is needed here.
        RuntimeError: the corrupted pixels do not reach the model.
    """
    needed = {"advantages", "old_log_probs", "responses", "response_mask", "attention_mask", "position_ids"}
    needed |= {"uid", "multi_modal_data"}
    if missing := needed - {*batch.batch.keys(), *batch.non_tensor_batch}:
        names = ", ".join(sorted(missing))
        raise KeyError(f"easyr1_srpo.py was written for EasyR1 at 26dfd97; this batch lacks {names}")
    b = batch.batch
    shown = [bool(data.get("images")) for data in batch.non_tensor_batch["multi_modal_data"]]
    roles = roles_of(b["responses"], b["response_mask"], shown, tokenizer)  # [B, T]
    # The blank first: the workers still have its pixels.
    logp_blank = workers.compute_log_probs(blank(batch, roles)).batch["old_log_probs"]
    logp_corrupted = workers.compute_log_probs(corrupted(batch, step, corruption_p)).batch["old_log_probs"]
    logp = b["old_log_probs"]
    A_hat, *_ = weigh(b["advantages"], roles, logp, logp_corrupted, logp_blank, lam, **weight_options)
    return A_hat


def changed(batch, tensors: dict, others: dict):
    """The batch with some of its fields replaced; the given one stays as it is."""
    new = copy.copy(batch)
    new.batch = batch.batch.clone(recurse=False)
    for name, x in tensors.items():
        new.batch[name] = x
    new.non_tensor_batch = batch.non_tensor_batch | others
    return new


def blank(batch, roles: torch.Tensor):
    """The perception hidden, step 3: its attention mask at 0, and positions counted over what remains."""
    mask = batch.batch["attention_mask"].clone()  # [B, P + T]
    mask[:, -roles.shape[1] :] = without_perception(mask[:, -roles.shape[1] :], roles)
    gone = (batch.batch["attention_mask"] - mask).cumsum(1)
    positions = batch.batch["position_ids"]  # [B, P + T], or [B, 3 or 4, P + T] with M-RoPE
    positions = positions - (gone if positions.dim() == 2 else gone[:, None])
    return changed(batch, {"attention_mask": mask, "position_ids": positions}, {})


def corrupted(batch, step: int, p: float):
    """Corrupted images, one draw for all responses to a prompt.

    Squares of 28 pixels, one visual token each, of the image as EasyR1 will resize it. Under uids of their
    own: workers keep processed pixels by uid, and would take the clean ones again.
    """
    uids, meta = batch.non_tensor_batch["uid"], batch.meta_info
    low, high = (meta.get(f"{end}_pixels") or meta.get(f"image_{end}_pixels") for end in ("min", "max"))
    column = np.empty(len(uids), dtype=object)
    for row, (uid, old) in enumerate(zip(uids, batch.non_tensor_batch["multi_modal_data"], strict=True)):
        seed = int.from_bytes(hashlib.sha256(f"{uid} {step}".encode()).digest()[:7], "big")
        images = [resized(opened(image), low, high) for image in old.get("images") or []]
        images = [corrupt(image, "patch", patch=28, p=p, seed=seed) for image in images]
        column[row] = dict(old) | ({"images": images} if images else {})
    return changed(batch, {}, {"multi_modal_data": column, "uid": uids + " corrupted"})


def opened(image) -> Image.Image:
    """EasyR1 takes images, paths, bytes, and dicts with bytes."""
    image = image["bytes"] if isinstance(image, dict) else image
    if isinstance(image, Image.Image):
        return image
    return Image.open(io.BytesIO(image) if isinstance(image, bytes) else image).convert("RGB")


def resized(image: Image.Image, low: int | None, high: int | None) -> Image.Image:
    """To an area within EasyR1's limits, so that it leaves the size as it is."""
    area, scale = image.width * image.height, 1
    if high and area > high:
        scale = (high / area) ** 0.5
    elif low and area < low:
        scale = (low / area) ** 0.5
    return image if scale == 1 else image.resize((int(image.width * scale), int(image.height * scale)))
