"""SRPO in verl: a trainer registered as "srpo". Tested with verl 0.9.1 and TransferQueue 0.1.11.

    cp srpo.py extras/verl_srpo.py my_project/ && cd my_project
    VERL_USE_EXTERNAL_MODULES=verl_srpo PYTHONPATH=. python -m verl.trainer.main_ppo trainer.v1.trainer_mode=srpo \\
        algorithm.adv_estimator=grpo ...       (a whole command is in the README; lam and others: +trainer.srpo.lam=0.5)

verl computes advantages on the driver, and an advantage estimator sees neither images nor responses. So this lets verl
compute its own (with `grpo` it keeps one number a response: token-level ones would be lost there), has the actor's
workers score the responses twice more, with corrupted images and with the perception cut out, and multiplies the
weights into the advantages, Eq. (7), before they go to the actor.
"""

import torch
import transfer_queue as tq
import verl
from tensordict import TensorDict
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.utils.padding import response_from_nested

from srpo import (
    Role,
    contrast_scores,
    corrupt_patches,
    role_aware_advantages,
    text_and_offsets,
    token_bytes,
    token_roles,
    token_weights,
    without_perception,
)

FIELDS = ("prompts", "responses", "response_mask", "loss_mask", "input_ids", "position_ids", "multi_modal_inputs")
if not hasattr(PPOTrainerSync, "_compute_advantage"):
    raise ImportError(f"verl {verl.__version__}: PPOTrainerSync._compute_advantage is gone; verl_srpo.py needs verl==0.9.1")


def roles_of(responses: list[torch.Tensor], tokenizer) -> list[torch.Tensor]:
    """Roles [T_i] of sampled responses (1-D ids)."""
    added, special = tokenizer.get_added_vocab(), {None, *tokenizer.all_special_tokens}
    roles = []
    for ids in responses:
        tokens = tokenizer.convert_ids_to_tokens(ids.tolist())
        pieces = [b"" if t in special else t.encode() if t in added else token_bytes(t) for t in tokens]  # EOS has no text
        roles.append(token_roles(*text_and_offsets(pieces)))
    return roles


def corrupted(row: dict, p: float, seed: int) -> dict:
    """The same response with its images corrupted, one draw for all responses to a prompt."""
    inputs = dict(row["multi_modal_inputs"])
    images = inputs["pixel_values"].split(inputs["image_grid_thw"].prod(1).tolist())
    inputs["pixel_values"] = torch.cat([corrupt_patches(image, p, seed) for image in images])
    return row | {"multi_modal_inputs": inputs}


def blank(row: dict, roles: torch.Tensor) -> tuple[dict, torch.Tensor]:
    """The same response without its perception, Eq. (3), and which response tokens are left ([T_i] bool).

    verl packs rows without padding and has no mask to zero: the tokens are cut out, and the positions of what follows
    move up by as many.
    """
    kept = without_perception(torch.ones_like(roles)[None], roles[None])[0].bool()
    whole = torch.cat([torch.ones(len(row["prompts"]), dtype=torch.bool), kept])
    positions = row["position_ids"] - (~whole).long().cumsum(0)  # [..., L]
    cut = {name: row[name][kept] for name in ("responses", "response_mask", "loss_mask")}
    return row | cut | {"input_ids": row["input_ids"][whole], "position_ids": positions[..., whole]}, kept


def role_aware(advantages, roles, logp, logp_corrupted, logp_blank, lam: float = 1.0, **weight_options) -> torch.Tensor:
    """verl's advantages [B, T] -> Eq. (7). All [B, T], 0 at padding.

    Raises:
        RuntimeError: there are perception tokens, and none depends on the image: the corrupted pixels never arrived.
    """
    delta = contrast_scores(logp, logp_corrupted, logp_blank, roles)
    seen = roles == Role.PERCEPTION
    if seen.any() and not delta[seen].any():
        raise RuntimeError("no perception token's log-prob depends on the image: the corrupted pixels do not reach the model")
    return role_aware_advantages(advantages, token_weights(delta, roles, **weight_options), lam)


@register_trainer("srpo")
class SRPOTrainer(PPOTrainerSync):
    """verl's synchronous trainer with role-aware advantages. Options, all optional: +trainer.srpo.{lam,corruption_p,tau,w_min,w_max}."""

    def _compute_advantage(self, batch, metrics: dict):
        correction = self.config.algorithm.get("rollout_correction", None)
        if correction and correction.get("bypass_mode", False):
            raise ValueError("SRPO compares log-probs of one engine: set algorithm.rollout_correction.bypass_mode=False")
        batch = super()._compute_advantage(batch, metrics)  # verl's own, one number a response
        options = dict(self.config.trainer.get("srpo", {}))
        p, lam = options.pop("corruption_p", 0.6), options.pop("lam", 1.0)
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=[*FIELDS, "advantages", "old_log_probs"])
        rows = [{name: plain(data[name][i]) for name in FIELDS} for i in range(len(batch))]
        roles = roles_of([row["responses"] for row in rows], self.tokenizer)
        for row, role in zip(rows, roles, strict=True):
            if "image_grid_thw" not in (row["multi_modal_inputs"] or {}):
                role[:] = Role.OTHER  # without an image, Eq. (9)

        seen = [corrupted(row, p, self.global_steps) if role.any() else row for row, role in zip(rows, roles, strict=True)]
        cut, kept = zip(*(blank(row, role) for row, role in zip(rows, roles, strict=True)), strict=True)
        logp_corrupted = self._score(batch, seen)
        logp_blank = []
        for k, logp in zip(kept, self._score(batch, cut), strict=True):
            logp_blank.append(torch.zeros(len(k)).masked_scatter(k, logp.float()))  # back to where the tokens were

        pad = lambda xs: torch.nn.utils.rnn.pad_sequence(list(xs), batch_first=True)  # noqa: E731
        columns = [pad(data[name].unbind()).float() for name in ("advantages", "old_log_probs")]
        A_hat = role_aware(columns[0], pad(roles), columns[1], pad(logp_corrupted).float(), pad(logp_blank), lam, **options)
        used = columns[0] != 0
        metrics["srpo/weight_std"] = (A_hat[used] / columns[0][used]).std(correction=0).item() if used.any() else 0.0
        A_hat = torch.nested.as_nested_tensor([a[: len(r)] for a, r in zip(A_hat, roles, strict=True)], layout=torch.jagged)
        return tq.kv_batch_put(
            keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict({"advantages": A_hat}, batch_size=len(batch))
        )

    def _score(self, batch, rows) -> list[torch.Tensor]:
        """Log-probs [T_i] of changed rows, by the actor's workers. The rows stay in a partition of their own while they do."""
        keys = [f"{key}_counterfactual" for key in batch.keys]
        meta = tq.kv_batch_put(keys=keys, partition_id="srpo", fields=list_of_dict_to_tensordict(list(rows)), tags=batch.tags)
        temperature = self.config.actor_rollout_ref.rollout.temperature
        meta.extra_info.update(batch.extra_info | {"calculate_entropy": False, "compute_loss": False, "temperature": temperature})
        self.actor_rollout_wg.compute_log_prob(meta)
        found = tq.kv_batch_get(keys=keys, partition_id="srpo", select_fields=["log_probs", "response_mask"])
        tq.kv_clear(keys=keys, partition_id="srpo")
        return list(response_from_nested(found["log_probs"], found["response_mask"]).unbind())


def plain(value):
    """A field of one row as it was put."""
    return value.data if not isinstance(value, torch.Tensor) and hasattr(value, "data") else value
