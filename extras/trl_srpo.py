"""SRPO in TRL: `GRPOTrainer` with one method overridden. Tested with TRL 1.16.0.

    from trl_srpo import SRPOTrainer        # srpo.py, host.py and this file lie beside your script
    SRPOTrainer(model, reward_funcs, args, train_dataset, processing_class=processor).train()

Everything GRPOTrainer does stays: generation, rewards, loss types, KL, accumulation, accelerate,
DeepSpeed, PEFT. After it has sampled responses and computed their advantages, the responses are
scored three times more without gradient: as they are, with corrupted images, and without the
perception. Then `advantages` [B] become A_hat [B, T] of step 7, which TRL's loss takes as it is.
The prompts must ask for <perception>, <reasoning> and <answer> blocks, as in srpo.py.
"""

import inspect
import sys

if __name__ == "__main__":
    print(
        "error: no script: in a training script `from trl_srpo import SRPOTrainer`", file=sys.stderr
    )
    sys.exit(2)

import torch
import trl
from host import TAGS, corrupt_patches, corrupt_pixels, perception_contrasts, roles_of, weigh
from torch import Tensor
from trl import GRPOTrainer

from srpo import Role, Tags, without_perception

SCORE = "_get_per_token_logps_and_entropies"
# The methods of GRPOTrainer that are called below, and the arguments that they must take.
NEEDED = {
    SCORE: {
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "pixel_values",
        "image_grid_thw",
        "num_images",
    },
    "_generate_and_score_completions": {"inputs"},
}


def check_trl() -> None:
    """ImportError where TRL has changed what is needed here."""
    for name, arguments in NEEDED.items():
        method = getattr(GRPOTrainer, name, None)
        if method is None or not arguments <= set(inspect.signature(method).parameters):
            changed = f"trl {trl.__version__}: GRPOTrainer.{name} has changed"
            raise ImportError(f"{changed}; trl_srpo.py needs trl==1.16.0")


check_trl()


class SRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose advantages are role-aware. `lam=0` is GRPO, bit for bit.

    Args:
        lam: lambda of step 7.
        corruption_p: share of the image's patches painted in its mean color (step 2).
        tags: names of the blocks.
        weight_options: tau, w_min and w_max of `srpo.token_weights`, such as {"tau": 0.5}.
    Raises:
        ValueError: the trainer is set up so that weights of mean 1 would cancel.
    """

    def __init__(
        self,
        *args,
        lam: float = 1.0,
        corruption_p: float = 0.6,
        tags: Tags = TAGS,
        weight_options: dict | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        if self.importance_sampling_level != "token":
            raise ValueError(
                'importance_sampling_level="sequence" multiplies the tokens of a response by one '
                "ratio: their weights, of mean 1, would cancel and leave GRPO; take "
                'importance_sampling_level="token"'
            )
        self.lam = lam
        self.corruption_p = corruption_p
        self.tags = tags
        self.weight_options = weight_options or {}
        # Options that make no sense are refused now, and not after the first generation.
        corrupt_patches(torch.ones(4, 3), corruption_p, seed=0)
        one = torch.ones(1, 1)
        weigh(one, one.long(), one, 0 * one, one, lam, **self.weight_options)
        self.arrived = False  # whether a corrupted image has ever changed a log-prob

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return batch
        # No dropout, of LoRA for instance: log-probs shall differ by what is shown alone.
        self.model.eval()
        try:
            with torch.no_grad():
                batch["advantages"] = self.role_aware(batch)
        finally:
            self.model.train()
        return batch

    def role_aware(self, batch: dict) -> Tensor:
        """A_hat [B, T], steps 2 to 7, of a batch as GRPOTrainer made it.

        Raises:
            ValueError: the batch has no image, or one not processed as in the Qwen-VL family.
            RuntimeError: the corrupted pixels do not reach the model (checked until they once did).
        """
        if "pixel_values" not in batch or "image_grid_thw" not in batch:
            raise ValueError(
                "SRPO needs questions with images, processed as in the Qwen-VL family "
                "(pixel_values, image_grid_thw)"
            )
        ids = batch["completion_ids"]  # [B, T]
        mask = batch["completion_mask"]  # [B, T]
        A = batch["advantages"]  # [B]
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        roles = roles_of(ids, mask, batch["num_images"], tokenizer, self.tags)  # [B, T]
        corrupted_pixels = corrupt_pixels(
            batch["pixel_values"],
            batch["image_grid_thw"],
            self.corruption_p,
            seed=self.state.global_step,
        )

        logp = self.score(batch, mask)  # [B, T]
        logp_corrupted = self.score(batch, mask, corrupted_pixels)
        logp_blank = self.score(batch, without_perception(mask, roles))
        if "tool_mask" in batch:  # the trainer leaves these tokens out of the loss
            roles = roles.masked_fill(batch["tool_mask"] == 0, Role.OTHER)
        A_hat, w, delta = weigh(
            A,
            roles,
            logp,
            logp_corrupted,
            logp_blank,
            self.lam,
            arrived=self.arrived,
            **self.weight_options,
        )

        if perception_contrasts(delta, roles).any():
            self.arrived = True
        self.record("contrast", delta, roles)
        self.record("weight", w, roles)
        return A_hat

    def score(
        self, batch: dict, completion_mask: Tensor, pixel_values: Tensor | None = None
    ) -> Tensor:
        """Log-probs [B, T] of the responses, by default with the batch's own pixels.

        The model counts positions over the tokens that the mask leaves visible.
        """
        if pixel_values is None:
            pixel_values = batch["pixel_values"]
        ids = batch["completion_ids"]
        logp, *_ = getattr(self, SCORE)(
            self.model,
            torch.cat([batch["prompt_ids"], ids], dim=1),
            torch.cat([batch["prompt_mask"], completion_mask], dim=1),
            ids.shape[1],
            batch_size=self.args.per_device_train_batch_size,
            pixel_values=pixel_values,
            image_grid_thw=batch["image_grid_thw"],
            num_images=batch["num_images"],
            mm_token_type_ids=batch.get("mm_token_type_ids"),
        )
        return logp

    def record(self, name: str, x: Tensor, roles: Tensor) -> None:
        """Log the mean of x [B, T] by role, over all processes, without what is not finite."""
        for role in (Role.PERCEPTION, Role.REASONING):
            of_role = x[(roles == role) & x.isfinite()]
            sum_and_count = torch.stack([of_role.sum(), of_role.new_tensor(len(of_role))])
            total, count = self.accelerator.reduce(sum_and_count).tolist()
            mean = float("nan")
            if count > 0:
                mean = total / count
            self._metrics["train"][f"srpo/{name}_{role.name.lower()}"].append(mean)
