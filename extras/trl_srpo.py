"""SRPO in TRL: `GRPOTrainer` with one method overridden. Tested with TRL 1.16.0 (`pip install trl==1.16.0`).

    from trl_srpo import SRPOTrainer                 # srpo.py, host.py and this file lie beside your script
    SRPOTrainer(model, reward_funcs, args, train_dataset, processing_class=processor).train()

Everything GRPOTrainer does stays: generation, rewards, loss types, KL, accumulation, accelerate, DeepSpeed,
PEFT. After it has sampled and scored, the responses are scored three times more without gradient (as they
are, with a corrupted image, without the perception), and `advantages` [B] becomes A_hat [B, T] of step 7,
which TRL's loss takes as it is. Ask for <perception>, <reasoning> and <answer> blocks, as in srpo.py.
"""

import inspect

import torch
import trl
from trl import GRPOTrainer

from host import corrupt_pixels, roles_of, weigh
from srpo import Role, Tags, without_perception

SCORE = "_get_per_token_logps_and_entropies"
HOOKS = {  # what is called below, and the arguments that it must take
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
for name, expected in HOOKS.items():
    if not expected <= set(inspect.signature(getattr(GRPOTrainer, name, lambda: None)).parameters):
        raise ImportError(
            f"trl {trl.__version__}: GRPOTrainer.{name} has changed; trl_srpo.py needs trl==1.16.0"
        )


class SRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose advantages are role-aware. `lam=0` is GRPO, bit for bit.

    Args:
        lam: lambda of step 7.
        corruption_p: share of the image's patches painted in its mean color (step 2).
        tags: names of the blocks.
        weight_options: arguments of `srpo.token_weights`, such as {"tau": 0.5}.
    Raises:
        ValueError: the trainer is set up so that weights of mean 1 would cancel.
    """

    def __init__(
        self,
        *args,
        lam: float = 1.0,
        corruption_p: float = 0.6,
        tags: Tags = Tags(),
        weight_options: dict | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        if self.importance_sampling_level != "token":
            raise ValueError(
                'importance_sampling_level="sequence" multiplies the tokens of a response by one ratio: '
                "their weights, of mean 1, would cancel and leave GRPO; take "
                'importance_sampling_level="token"'
            )
        self.lam, self.corruption_p, self.tags = lam, corruption_p, tags
        self.weight_options = weight_options or {}
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
        """A_hat [B, T], steps 2 to 7, of a batch as GRPOTrainer scored it.

        Raises:
            ValueError: the batch has no image, or one not processed as in the Qwen-VL family.
            RuntimeError: the corrupted pixels do not reach the model (checked until they once did).
        """
        if "pixel_values" not in batch or "image_grid_thw" not in batch:
            raise ValueError(
                "SRPO needs questions with images, processed as in the Qwen-VL family "
                "(pixel_values, image_grid_thw)"
            )
        mask, A = batch["completion_mask"], batch["advantages"]  # [B, T], [B]
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        roles = roles_of(batch["completion_ids"], mask, batch["num_images"], tokenizer, self.tags)
        pixels = corrupt_pixels(
            batch["pixel_values"], batch["image_grid_thw"], self.corruption_p, self.state.global_step
        )
        logp, corrupted = self.score(batch, mask), self.score(batch, mask, pixels)
        blank = self.score(batch, without_perception(mask, roles))
        A_hat, w, delta = weigh(
            A, roles, logp, corrupted, blank, self.lam, arrived=self.arrived, **self.weight_options
        )
        self.arrived |= bool((delta[roles == Role.PERCEPTION].abs() > 0).any())  # NaN is no change
        self.record("contrast", delta, roles)
        self.record("weight", w, roles)
        return A_hat

    def score(
        self, batch: dict, completion_mask: torch.Tensor, pixel_values: torch.Tensor | None = None
    ) -> torch.Tensor:
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

    def record(self, name: str, x: torch.Tensor, roles: torch.Tensor) -> None:
        """Log the mean of x [B, T] by role, over all processes, without what is not finite."""
        for role in (Role.PERCEPTION, Role.REASONING):
            of_role = x[(roles == role) & x.isfinite()]
            total = torch.stack([of_role.sum(), of_role.new_tensor(len(of_role))])
            total, count = self.accelerator.reduce(total).tolist()
            mean = total / count if count else float("nan")
            self._metrics["train"][f"srpo/{name}_{role.name.lower()}"].append(mean)
