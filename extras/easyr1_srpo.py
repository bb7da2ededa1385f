"""SRPO in EasyR1: in `RayPPOTrainer.fit` (verl/trainer/ray_trainer.py), after the call of
`compute_advantage`, add

    from easyr1_srpo import role_aware
    A_hat = role_aware(batch, self.actor_rollout_ref_wg, self.tokenizer, self.global_step)
    batch.batch["advantages"] = A_hat

Copy this file, host.py, srpo.py and corrupt.py to where Python finds them. Written for EasyR1
v0.3.2; other versions may name the workers otherwise. EasyR1 is not on PyPI, so the test runs on
stand-ins that behave as its batch and workers do.
"""

import copy
import hashlib
import io
import sys

if __name__ == "__main__":
    where = "RayPPOTrainer.fit of EasyR1 calls it, with the three lines at its top"
    print(f"error: no script: {where}", file=sys.stderr)
    sys.exit(2)

import numpy as np
from host import roles_of, weigh
from PIL import Image
from torch import Tensor

from corrupt import corrupt
from srpo import without_perception

NEEDED = (
    "advantages",
    "old_log_probs",
    "responses",
    "response_mask",
    "attention_mask",
    "position_ids",
    "uid",
    "multi_modal_data",
)


def role_aware(
    batch,
    workers,
    tokenizer,
    step: int,
    lam: float = 1.0,
    corruption_p: float = 0.6,
    **weight_options,
) -> Tensor:
    """A_hat [B, T], steps 2 to 7.

    Args:
        batch: EasyR1's DataProto, as it is after `compute_advantage`; it stays as it is.
        workers: the actor's worker group, for `compute_log_probs`.
        tokenizer: of Hugging Face, byte-level.
        step: of training; the corrupted images depend on it and on the prompt.
        lam: lambda of step 7.
        corruption_p: share of the image's patches painted in its mean color (step 2).
        weight_options: tau, w_min and w_max of `srpo.token_weights`.
    Raises:
        KeyError: EasyR1 has renamed what is needed here.
        RuntimeError: the corrupted pixels do not reach the model.
    """
    check_fields(batch)
    b = batch.batch
    images_and_more = batch.non_tensor_batch["multi_modal_data"]
    if any("image" in data for data in images_and_more):  # all would count as without one
        raise KeyError('this EasyR1 keeps images under "image", not "images"; take v0.3.2')
    has_image = [bool(data.get("images")) for data in images_and_more]
    roles = roles_of(b["responses"], b["response_mask"], has_image, tokenizer)  # [B, T]
    # The workers still have the pixels of this batch, so what needs the same ones is scored first.
    blank_scores = workers.compute_log_probs(blank(batch, roles))
    corrupted_scores = workers.compute_log_probs(corrupted(batch, step, corruption_p))
    A_hat, _, _ = weigh(
        b["advantages"],
        roles,
        b["old_log_probs"],
        corrupted_scores.batch["old_log_probs"],
        blank_scores.batch["old_log_probs"],
        lam,
        **weight_options,
    )
    return A_hat


def check_fields(batch) -> None:
    """KeyError with the names of what the batch lacks."""
    present = set(batch.batch.keys()) | set(batch.non_tensor_batch)
    missing = [name for name in NEEDED if name not in present]
    if missing:
        lacks = f"this batch lacks {', '.join(missing)}"
        raise KeyError(f"easyr1_srpo.py was written for EasyR1 v0.3.2; {lacks}")


def changed(batch, tensors: dict, columns: dict):
    """The batch with some of its fields replaced; the given one stays as it is."""
    new = copy.copy(batch)
    new.batch = batch.batch.clone(recurse=False)
    for name, x in tensors.items():
        new.batch[name] = x
    new.non_tensor_batch = {**batch.non_tensor_batch, **columns}
    return new


def blank(batch, roles: Tensor):
    """The batch with the perception hidden, step 3: masked, and positions count what remains."""
    T = roles.shape[1]
    mask = batch.batch["attention_mask"]  # [B, P + T]
    visible = mask.clone()
    visible[:, -T:] = without_perception(mask[:, -T:], roles)
    hidden_so_far = (mask - visible).cumsum(dim=1)  # [B, P + T]
    positions = batch.batch["position_ids"]  # [B, P + T], or [B, 3 or 4, P + T] with M-RoPE
    if positions.dim() == 3:
        hidden_so_far = hidden_so_far[:, None]
    tensors = {"attention_mask": visible, "position_ids": positions - hidden_so_far}
    return changed(batch, tensors, {})


def corrupted(batch, step: int, p: float):
    """The batch with its images corrupted, one draw for all responses to a prompt.

    Squares of 28 pixels are masked, one visual token each, of the image as EasyR1 will resize it.
    The uids change too: workers keep processed pixels by uid, and would take the clean ones again.
    """
    uids = batch.non_tensor_batch["uid"]
    old = batch.non_tensor_batch["multi_modal_data"]
    low = pixel_limit(batch.meta_info, "min")
    high = pixel_limit(batch.meta_info, "max")
    new = np.empty(len(uids), dtype=object)
    for row, uid in enumerate(uids):
        key = hashlib.sha256(f"{uid} {step}".encode()).digest()
        seed = int.from_bytes(key[:7], "big")
        new[row] = dict(old[row])
        if old[row].get("images"):
            images = [resized(opened(image), low, high) for image in old[row]["images"]]
            images = [corrupt(image, "patch", patch=28, p=p, seed=seed) for image in images]
            new[row]["images"] = images
    new_batch = changed(batch, {}, {"multi_modal_data": new, "uid": uids + " corrupted"})
    # They have their size; rounding could put it below the limits, and it would be changed again.
    no_limits = {"min_pixels": None, "max_pixels": None}
    new_batch.meta_info = {**batch.meta_info, **no_limits}
    return new_batch


def pixel_limit(meta_info: dict, end: str) -> int | None:
    """The smallest ("min") or largest ("max") area of an image, by either of its names; or none."""
    for name in (f"{end}_pixels", f"image_{end}_pixels"):
        if meta_info.get(name):
            return meta_info[name]
    return None


def opened(image) -> Image.Image:
    """EasyR1 takes images, paths, bytes, and dicts with bytes."""
    if isinstance(image, dict):
        image = image["bytes"]
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, bytes):
        image = io.BytesIO(image)
    return Image.open(image).convert("RGB")


def resized(image: Image.Image, low: int | None, high: int | None) -> Image.Image:
    """To an area within EasyR1's limits, so that it leaves the size as it is."""
    area = image.width * image.height
    if high and area > high:
        scale = (high / area) ** 0.5
    elif low and area < low:
        scale = (low / area) ** 0.5
    else:
        return image
    return image.resize((int(image.width * scale), int(image.height * scale)))
