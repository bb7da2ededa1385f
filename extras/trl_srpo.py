"""SRPO in TRL: `GRPOTrainer` with one method overridden. Tested with TRL 1.16.0 (`pip install trl==1.16.0`).

    from trl_srpo import SRPOTrainer                     # copy this file and srpo.py beside your script
    SRPOTrainer(model, reward_funcs, args, train_dataset, processing_class=processor).train()

Everything GRPOTrainer does stays: generation, rewards, loss types, KL, accumulation, accelerate, DeepSpeed, PEFT. After
it has sampled and scored, the responses are scored three times more without gradient (as they are, with a corrupted
image, without the perception), and `advantages` [B] becomes A-hat [B, T], Eq. (7), which TRL's loss takes as it is.
What is trained is the response's structure as in `srpo.py`: ask for <perception>, <reasoning> and <answer> blocks.
"""

import inspect

import torch
import trl
from trl import GRPOTrainer

from srpo import (
    Role,
    Tags,
    contrast_scores,
    corrupt_patches,
    role_aware_advantages,
    text_and_offsets,
    token_bytes,
    token_roles,
    token_weights,
    without_perception,
)

SCORE = "_get_per_token_logps_and_entropies"
HOOKS = {  # what is called below, and the arguments that it must take
    SCORE: {"model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "pixel_values", "image_grid_thw", "num_images"},
    "_generate_and_score_completions": {"inputs"},
}
for name, expected in HOOKS.items():
    if not expected <= set(inspect.signature(getattr(GRPOTrainer, name, lambda: None)).parameters):
        raise ImportError(f"trl {trl.__version__}: GRPOTrainer.{name} has changed; trl_srpo.py needs trl==1.16.0")


class SRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose advantages are role-aware. `lam=0` is GRPO, bit for bit.

    Args:
        lam: lambda of Eq. (7).
        corruption_p: share of the image's patches painted in its mean color, Eq. (2).
        tags: names of the blocks.
        weight_options: arguments of `srpo.token_weights`, such as {"tau": 0.5}.
    Raises:
        ValueError: the trainer is set up so that weights of mean 1 would cancel.
    """

    def __init__(self, *args, lam: float = 1.0, corruption_p: float = 0.6, tags: Tags = Tags(), weight_options=None, **kwargs):
        super().__init__(*args, **kwargs)
        if self.importance_sampling_level != "token":
            raise ValueError(
                'importance_sampling_level="sequence" multiplies a response\'s tokens by one ratio: their weights, of mean 1, '
                'would cancel and leave GRPO; take importance_sampling_level="token"'
            )
        self.lam, self.corruption_p, self.tags, self.weight_options = lam, corruption_p, tags, weight_options or {}
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        added = tokenizer.get_added_vocab()
        self.bytes_of = {i: t.encode() if t in added else token_bytes(t) for t, i in tokenizer.get_vocab().items()}
        self.arrived = False  # whether a corrupted image has ever changed a log-prob

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return batch
        with torch.no_grad():
            self.model.eval()  # no dropout, of LoRA for instance: the scores differ by what is shown alone
            try:
                batch["advantages"] = self.role_aware(batch)
            finally:
                self.model.train()
        return batch

    def role_aware(self, batch: dict) -> torch.Tensor:
        """A-hat [B, T], Eq. (2) to (7), of a batch as GRPOTrainer scored it."""
        if "pixel_values" not in batch or "image_grid_thw" not in batch:
            raise ValueError("SRPO needs questions with images, processed as in the Qwen-VL family (pixel_values, image_grid_thw)")
        ids, mask = batch["completion_ids"], batch["completion_mask"]  # [B, T]
        roles = torch.zeros_like(ids)
        for row, n in enumerate(mask.sum(1).tolist()):
            tokens = [i for i in ids[row, :n].tolist() if i not in self.eos_token_ids]
            text, offsets = text_and_offsets([self.bytes_of.get(i, b"") for i in tokens])
            roles[row, : len(offsets)] = token_roles(text, offsets, self.tags)
        roles = roles.to(ids.device)
        roles[(mask == 0) | (torch.tensor(batch["num_images"], device=ids.device) == 0)[:, None]] = Role.OTHER  # Eq. (9)

        logp = self.score(batch, mask)
        corrupted = self.score(batch, mask, self.corrupt(batch))
        blank = self.score(batch, without_perception(mask, roles))
        delta = contrast_scores(logp, corrupted, blank, roles)
        self.check(delta, roles)
        w = token_weights(delta, roles, **self.weight_options)
        for name, x in (("contrast", delta), ("weight", w)):
            for role in (Role.PERCEPTION, Role.REASONING):
                total = torch.stack([x[roles == role].sum(), (roles == role).sum().to(x.dtype)])
                total, count = self.accelerator.reduce(total).tolist()  # over all processes
                self._metrics["train"][f"srpo/{name}_{role.name.lower()}"].append(total / count if count else float("nan"))
        return role_aware_advantages(batch["advantages"], w, self.lam)

    def score(self, batch: dict, completion_mask: torch.Tensor, pixel_values: torch.Tensor | None = None) -> torch.Tensor:
        """Log-probs [B, T] of the responses. Positions are counted over what the mask leaves visible."""
        logp, *_ = getattr(self, SCORE)(
            self.model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
            torch.cat([batch["prompt_mask"], completion_mask], 1),
            batch["completion_ids"].shape[1],
            batch_size=self.args.per_device_train_batch_size,
            pixel_values=batch["pixel_values"] if pixel_values is None else pixel_values,
            image_grid_thw=batch["image_grid_thw"],
            num_images=batch["num_images"],
            mm_token_type_ids=batch.get("mm_token_type_ids"),
        )
        return logp

    def corrupt(self, batch: dict) -> torch.Tensor:
        """pixel_values with a share of each image's patches painted in its mean color. The draw depends on the image and
        the step, so that the responses to one prompt share it, on whatever process they are."""
        images = batch["pixel_values"].split(batch["image_grid_thw"].prod(1).tolist())
        return torch.cat([corrupt_patches(image, self.corruption_p, seed=self.state.global_step) for image in images])

    def check(self, delta: torch.Tensor, roles: torch.Tensor) -> None:
        """The silent failure of this field: the corrupted pixels never reach the model, and every contrast is 0."""
        seen = roles == Role.PERCEPTION
        if not self.arrived and seen.any():
            self.arrived = bool(delta[seen].any())
            if not self.arrived:
                raise RuntimeError("no perception token's log-prob depends on the image: the corrupted pixels do not reach the model")
