"""SRPO in verl: a trainer registered as "srpo". Tested with verl 0.9.1 and TransferQueue 0.1.11.

    cp srpo.py extras/host.py extras/verl_srpo.py my_project/ && cd my_project
    VERL_USE_EXTERNAL_MODULES=verl_srpo PYTHONPATH=. python -m verl.trainer.main_ppo \\
        trainer.v1.trainer_mode=srpo algorithm.adv_estimator=grpo ...

A whole command is in extras/README.md; lam and others are set by +trainer.srpo.lam=0.5.

verl computes advantages on the driver, where an advantage estimator sees neither images nor responses. So
this lets verl compute its own (with `grpo` it keeps one number a response: token-level ones would be lost
there), has the actor's workers score the responses twice more, with corrupted images and with the perception
cut out, and multiplies the weights into the advantages, step 7, before they go to the actor.
"""

import torch
import transfer_queue as tq
import verl
from tensordict import TensorDict
from torch.nn.utils.rnn import pad_sequence
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.utils.padding import response_from_nested

from host import corrupt_pixels, roles_of, weigh
from srpo import without_perception

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
        f"verl {verl.__version__}: PPOTrainerSync._compute_advantage is gone; verl_srpo.py needs verl==0.9.1"
    )


def corrupted(row: dict, p: float, seed: int) -> dict:
    """The same response with its images corrupted, one draw for all responses to a prompt."""
    inputs = row["multi_modal_inputs"]
    pixels = corrupt_pixels(inputs["pixel_values"], inputs["image_grid_thw"], p, seed)
    return row | {"multi_modal_inputs": dict(inputs) | {"pixel_values": pixels}}


def blank(row: dict, roles: torch.Tensor) -> tuple[dict, torch.Tensor]:
    """The same response without its perception, step 3, and which of its tokens are left ([T_i] bool).

    verl packs rows without padding and has no mask to zero: the tokens are cut out, and the positions of what
    follows move up by as many.
    """
    kept = without_perception(torch.ones_like(roles)[None], roles[None])[0].bool()
    whole = torch.cat([torch.ones(len(row["prompts"]), dtype=torch.bool), kept])
    positions = row["position_ids"] - (~whole).long().cumsum(0)  # [..., L]
    cut = {name: row[name][kept] for name in ("responses", "response_mask", "loss_mask")}
    return row | cut | {"input_ids": row["input_ids"][whole], "position_ids": positions[..., whole]}, kept


@register_trainer("srpo")
class SRPOTrainer(PPOTrainerSync):
    """verl's synchronous trainer with role-aware advantages.

    Options, all optional: +trainer.srpo.{lam,corruption_p} and the arguments of `srpo.token_weights`, such as
    +trainer.srpo.tau.
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
                "SRPO compares log-probs of one engine: set algorithm.rollout_correction.bypass_mode=False"
            )
        batch = super()._compute_advantage(batch, metrics)  # verl's own, one number a response
        options = dict(self.config.trainer.get("srpo", {}))
        p, lam = options.pop("corruption_p", 0.6), options.pop("lam", 1.0)
        where = {"keys": batch.keys, "partition_id": batch.partition_id}
        data = tq.kv_batch_get(**where, select_fields=[*FIELDS, "advantages", "old_log_probs"])
        rows = [{name: plain(data[name][i]) for name in FIELDS} for i in range(len(batch))]
        lengths = [len(row["responses"]) for row in rows]
        shown = ["image_grid_thw" in (row["multi_modal_inputs"] or {}) for row in rows]
        ids = pad(row["responses"] for row in rows)  # [B, T]
        mask = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
        roles = roles_of(ids, mask, shown, self.tokenizer)

        seen = [
            corrupted(row, p, self.global_steps) if role.any() else row
            for row, role in zip(rows, roles, strict=True)
        ]
        cut, kept = zip(*(blank(row, role[:n]) for row, role, n in zip(rows, roles, lengths, strict=True)))
        logp_corrupted = self._score(batch, seen)
        logp_blank = []
        for k, logp in zip(kept, self._score(batch, cut), strict=True):
            logp_blank.append(torch.zeros(len(k)).masked_scatter(k, logp.float()))  # back to where they were

        A, logp = (pad(data[name].unbind()).float() for name in ("advantages", "old_log_probs"))
        A_hat, *_ = weigh(A, roles, logp, pad(logp_corrupted).float(), pad(logp_blank), lam, **options)
        used = A != 0
        metrics["srpo/weight_std"] = (A_hat[used] / A[used]).std(correction=0).item() if used.any() else 0.0
        A_hat = [a[:n] for a, n in zip(A_hat, lengths, strict=True)]
        fields = {"advantages": torch.nested.as_nested_tensor(A_hat, layout=torch.jagged)}
        return tq.kv_batch_put(**where, fields=TensorDict(fields, batch_size=len(batch)))

    def _score(self, batch, rows) -> list[torch.Tensor]:
        """Log-probs [T_i] of changed rows, by the actor's workers.

        The rows stay in a partition of their own meanwhile.
        """
        where = {"keys": [f"{key}_counterfactual" for key in batch.keys], "partition_id": "srpo"}
        meta = tq.kv_batch_put(**where, fields=list_of_dict_to_tensordict(list(rows)), tags=batch.tags)
        temperature = self.config.actor_rollout_ref.rollout.temperature
        wanted = {"calculate_entropy": False, "compute_loss": False, "temperature": temperature}
        meta.extra_info.update(batch.extra_info | wanted)
        self.actor_rollout_wg.compute_log_prob(meta)
        found = tq.kv_batch_get(**where, select_fields=["log_probs", "response_mask"])
        tq.kv_clear(**where)
        return list(response_from_nested(found["log_probs"], found["response_mask"]).unbind())


def pad(rows) -> torch.Tensor:
    """[T_i] each -> [B, T], 0 at padding."""
    return pad_sequence(list(rows), batch_first=True)


def plain(value):
    """A field of one row as it was put."""
    return value.data if not isinstance(value, torch.Tensor) and hasattr(value, "data") else value
