"""SRPO in verl: a trainer registered as "srpo". Tested with verl 0.9.1 and TransferQueue 0.1.11.

    cp srpo.py extras/host.py extras/verl_srpo.py my_project/ && cd my_project
    VERL_USE_EXTERNAL_MODULES=verl_srpo PYTHONPATH=. python -m verl.trainer.main_ppo \\
        trainer.v1.trainer_mode=srpo algorithm.adv_estimator=grpo ...

A whole command is in extras/README.md; lam and others are set by +trainer.srpo.lam=0.5.

verl computes advantages on the driver, where an advantage estimator sees neither images nor
responses. With the estimator `grpo` it keeps one number a response, and what an estimator returned
for single tokens would be lost. So this trainer lets verl compute its own advantages and has the
actor's workers score the responses twice more, with corrupted images and with the perception cut
out. Then it puts A_hat, step 7, in the place of the advantages, before they go to the actor.
"""

import sys

if __name__ == "__main__":
    how = "VERL_USE_EXTERNAL_MODULES=verl_srpo python -m verl.trainer.main_ppo ..."
    print(f"error: no script: {how}, as in its first lines", file=sys.stderr)
    sys.exit(2)

import torch
import transfer_queue as tq
import verl
from host import corrupt_pixels, roles_of, weigh
from tensordict import TensorDict
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.utils.padding import response_from_nested

from srpo import Role, without_perception

# What is read of every response; the changed copies of it that are scored have the same.
FIELDS = (
    "prompts",
    "responses",
    "response_mask",
    "loss_mask",
    "input_ids",
    "position_ids",
    "multi_modal_inputs",
)
if not hasattr(PPOTrainerSync, "_compute_advantage"):
    raise ImportError(
        f"verl {verl.__version__}: PPOTrainerSync._compute_advantage is gone; "
        "verl_srpo.py needs verl==0.9.1"
    )


@register_trainer("srpo")
class SRPOTrainer(PPOTrainerSync):
    """verl's synchronous trainer with role-aware advantages.

    Options, all optional: lam, corruption_p, and tau, w_min and w_max of `srpo.token_weights`, each
    as in +trainer.srpo.tau=0.5.
    """

    def _compute_advantage(self, batch, metrics: dict):
        """Put A_hat in the place of verl's advantages.

        Raises:
            RuntimeError: the corrupted pixels do not reach the model.
            ValueError: bypass_mode is on.
        """
        correction = self.config.algorithm.get("rollout_correction", None)
        if correction and correction.get("bypass_mode", False):
            raise ValueError(
                "SRPO compares log-probs of one engine: "
                "set algorithm.rollout_correction.bypass_mode=False"
            )
        weight_options = dict(self.config.trainer.get("srpo", {}))
        lam = weight_options.pop("lam", 1.0)
        corruption_p = weight_options.pop("corruption_p", 0.6)

        batch = super()._compute_advantage(batch, metrics)  # verl's own, one number a response
        where = {"keys": batch.keys, "partition_id": batch.partition_id}
        data = tq.kv_batch_get(**where, select_fields=[*FIELDS, "advantages", "old_log_probs"])
        rows = [{name: plain(data[name][i]) for name in FIELDS} for i in range(len(batch))]
        A = pad(data["advantages"].unbind()).float()  # [B, T]
        logp = pad(data["old_log_probs"].unbind()).float()  # [B, T]
        roles = self._roles(rows)  # [B, T]
        logp_corrupted = self._score_corrupted(batch, rows, roles, corruption_p)  # [B, T]
        logp_blank = self._score_blank(batch, rows, roles)  # [B, T]
        trained = pad(row["response_mask"] for row in rows)  # 0 at tokens of tools
        roles = roles.masked_fill(trained == 0, Role.OTHER)
        A_hat, _, _ = weigh(A, roles, logp, logp_corrupted, logp_blank, lam, **weight_options)

        metrics["srpo/weight_std"] = 0.0
        used = A != 0
        if used.any():
            factor = A_hat[used] / A[used]
            metrics["srpo/weight_std"] = factor.std(correction=0).item()
        without_padding = [a[: length_of(row)] for a, row in zip(A_hat, rows, strict=True)]
        nested = torch.nested.as_nested_tensor(without_padding, layout=torch.jagged)
        fields = TensorDict({"advantages": nested}, batch_size=len(batch))
        return tq.kv_batch_put(**where, fields=fields)

    def _roles(self, rows: list[dict]) -> Tensor:
        """[B, T]"""
        ids = pad(row["responses"] for row in rows)
        mask = pad(torch.ones(length_of(row), dtype=torch.long) for row in rows)
        return roles_of(ids, mask, [has_image(row) for row in rows], self.tokenizer)

    def _score_corrupted(self, batch, rows: list[dict], roles: Tensor, p: float) -> Tensor:
        """Log-probs [B, T] with corrupted images. A response without roles keeps its own."""
        changed_rows = []
        for row, role in zip(rows, roles, strict=True):
            if role.any():
                row = corrupted(row, p, self.global_steps)
            changed_rows.append(row)
        return pad(self._score(batch, changed_rows)).float()

    def _score_blank(self, batch, rows: list[dict], roles: Tensor) -> Tensor:
        """Log-probs [B, T] without the perception; 0 at the tokens that are cut out."""
        visible = []
        changed_rows = []
        for row, role in zip(rows, roles, strict=True):
            role = role[: length_of(row)]
            is_visible = without_perception(torch.ones_like(role)[None], role[None])[0].bool()
            visible.append(is_visible)
            changed_rows.append(cut(row, is_visible))
        in_place = []
        for is_visible, logp in zip(visible, self._score(batch, changed_rows), strict=True):
            zeros = torch.zeros(len(is_visible))
            in_place.append(zeros.masked_scatter(is_visible, logp.float()))
        return pad(in_place)

    def _score(self, batch, rows: list[dict]) -> list[Tensor]:
        """Log-probs [T_i] of changed rows, by the actor's workers.

        The rows stay in a partition of their own meanwhile.
        """
        keys = [f"{key}_counterfactual" for key in batch.keys]
        where = {"keys": keys, "partition_id": "srpo"}
        meta = tq.kv_batch_put(**where, fields=list_of_dict_to_tensordict(rows), tags=batch.tags)
        meta.extra_info.update(batch.extra_info)
        meta.extra_info["calculate_entropy"] = False
        meta.extra_info["compute_loss"] = False
        meta.extra_info["temperature"] = self.config.actor_rollout_ref.rollout.temperature
        self.actor_rollout_wg.compute_log_prob(meta)
        found = tq.kv_batch_get(**where, select_fields=["log_probs", "response_mask"])
        tq.kv_clear(**where)
        return list(response_from_nested(found["log_probs"], found["response_mask"]).unbind())


def corrupted(row: dict, p: float, seed: int) -> dict:
    """The response with its images corrupted, one draw for all responses to a prompt."""
    inputs = dict(row["multi_modal_inputs"])
    inputs["pixel_values"] = corrupt_pixels(
        inputs["pixel_values"], inputs["image_grid_thw"], p, seed
    )
    return {**row, "multi_modal_inputs": inputs}


def cut(row: dict, is_visible: Tensor) -> dict:
    """The response without the tokens that are not visible, [T_i] bool: step 3.

    verl packs rows without padding and has no mask to zero. So tokens are cut out, and the
    positions of those that follow move up by as many.
    """
    prompt = torch.ones(len(row["prompts"]), dtype=torch.bool)
    whole = torch.cat([prompt, is_visible])  # [L], of prompt and response
    cut_so_far = (~whole).long().cumsum(dim=0)  # [L]
    positions = row["position_ids"] - cut_so_far  # [L], or [axes, L] with M-RoPE
    new = dict(row)
    new["input_ids"] = row["input_ids"][whole]
    new["position_ids"] = positions[..., whole]
    for name in ("responses", "response_mask", "loss_mask"):
        new[name] = row[name][is_visible]
    return new


def has_image(row: dict) -> bool:
    inputs = row["multi_modal_inputs"]
    return inputs is not None and "image_grid_thw" in inputs


def length_of(row: dict) -> int:
    """T_i, tokens of the response."""
    return len(row["responses"])


def pad(rows) -> Tensor:
    """[T_i] each -> [B, T], 0 at padding."""
    return pad_sequence(list(rows), batch_first=True)


def plain(value):
    """A field of one row as it was put."""
    if not isinstance(value, Tensor) and hasattr(value, "data"):
        return value.data
    return value
