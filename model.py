"""The policy: a vision-language model that samples responses and scores them. Qwen2-VL and what shares its interface.

    policy = load("tiny")                         or a folder, or a hub name such as "Qwen/Qwen2-VL-2B-Instruct"
    prompts = policy.encode(examples, corruption)                     N prompts, their images, the corrupted images
    rollout = policy.sample(prompts, G, ...)                          B = N * G responses, [B, T]
    policy.log_probs(prompts, rollout, ...)                           log pi of the sampled tokens, [B, T]
    policy.log_probs(prompts, rollout, ..., corrupted=True)           Eq. (2): the same tokens, corrupted image
    policy.log_probs(prompts, rollout, ..., visible=without_perception(mask, roles))       Eq. (3): perception hidden

Sampling and scoring share one function from hidden states to log-probs, so temperature and the set of allowed tokens
cannot differ between them. Prompts are padded on the left, responses on the right.
"""

import copy
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Cache,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.cache_utils import DynamicLayer
from transformers.utils import cached_file
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from data import CELLS, COLORS, MARK, SHAPES, Example, InputError
from srpo import Tags, text_and_offsets, token_bytes

TAGS = Tags()
INSTRUCTION = (
    f"Reply in exactly this form: <{TAGS.perception}>what you see that matters for the question</{TAGS.perception}>"
    f"<{TAGS.reasoning}>how the answer follows from it</{TAGS.reasoning}><{TAGS.answer}>the answer alone</{TAGS.answer}>"
)


@dataclass
class Prompts:
    """N prompts, padded on the left to L tokens."""

    ids: Tensor  # [N, L]
    mask: Tensor  # [N, L], 0 at padding
    positions: Tensor  # [3, N, L], M-RoPE: time, height, width
    pixels: list[Tensor]  # per prompt [patches, values]
    corrupted: list[Tensor]  # the same, of the corrupted images; empty without corruption
    grids: list[Tensor]  # per prompt [images, 3]: patches in time, height, width


@dataclass
class Rollout:
    """B = N * G sampled responses, those of a prompt next to each other, padded on the right to T tokens."""

    ids: Tensor  # [B, T]
    mask: Tensor  # [B, T] bool, True up to and including EOS
    logp: Tensor  # [B, T] float32, as sampled; 0 at padding
    prompt: Tensor  # [B], which prompt each row answers
    read: tuple[Cache, Tensor] | None = None  # the prompts as the policy read them when it sampled

    def __getitem__(self, rows: Tensor) -> "Rollout":
        return Rollout(self.ids[rows], self.mask[rows], self.logp[rows], self.prompt[rows], self.read)


class Policy:
    """A model, its tokenizer and its image processor. The model stays in eval mode: no dropout, ever.

    With `share_prompts` a prompt is read once for the responses to it, in scoring and in the update as in sampling;
    without, each response is scored with a prompt of its own: slower, the same numbers, and simpler to read (`_states`).
    """

    share_prompts = True
    adapter = None  # peft's wrapper around `model` when LoRA is in use

    def __init__(self, model, tokenizer, image_processor, *, dtype: torch.dtype = torch.float32, max_pixels: int | None = None):
        self.model, self.tokenizer, self.image_processor, self.dtype = model.eval(), tokenizer, image_processor, dtype
        self.device = model.device
        config = model.config
        self.image_token = config.image_token_id
        self.instruction = getattr(config, "instruction", INSTRUCTION)  # tiny has learned the form and needs none
        self.patch = image_processor.patch_size
        self.factor = self.patch * image_processor.merge_size
        low, high = image_processor.size["shortest_edge"], image_processor.size["longest_edge"]  # areas, despite the names
        high = min(high, max(max_pixels or high, self.factor**2))
        self.pixels = min(low, high), high
        eos = model.generation_config.eos_token_id
        self.eos = sorted({tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None})
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos[0]
        # A sampled placeholder would need image features in the next forward pass, and ids beyond the tokenizer have no
        # text. Neither is sampled, and neither has a share of the probability when sampled tokens are scored.
        vocabulary = config.get_text_config().vocab_size
        placeholders = {config.image_token_id, config.video_token_id}
        self.forbidden = torch.tensor(sorted(placeholders | set(range(len(tokenizer), vocabulary))), device=self.device)
        self.chunk = max(1, 2**25 // vocabulary)  # positions whose logits exist at one time
        self.bytes_of = _token_bytes(tokenizer)

    # -------------------------------------------------------------------------------------------------------- prompts

    def fit(self, image: Image.Image) -> Image.Image:
        """RGB image resized as the model wants it: whole patches, and a number of them within the processor's limits."""
        height, width = smart_resize(image.height, image.width, self.factor, *self.pixels)
        image = image.convert("RGB")
        return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)

    def encode(self, examples: list[Example], corruption: Callable[[int, Image.Image], Image.Image] | None = None) -> Prompts:
        """Tokens, positions and pixels of the prompts.

        Args:
            corruption: called with the example's index and each of its images, already resized, so that patches of the
                image are patches of the model.
        Raises:
            InputError: the text of an example holds an image placeholder of its own.
        """
        rows, pixels, corrupted, grids = [], [], [], []
        for i, example in enumerate(examples):
            images = [self.fit(image) for image in example.images]
            values, grid = self._patches(images)
            pixels.append(values)
            grids.append(grid)
            if corruption is not None:
                corrupted.append(self._patches([corruption(i, image) for image in images])[0])
            rows.append(self._tokenize(example, grid))
        L = max(map(len, rows))
        ids = torch.tensor([[self.pad] * (L - len(r)) + r for r in rows])
        mask = torch.tensor([[0] * (L - len(r)) + [1] * len(r) for r in rows])
        positions, _ = self.model.model.get_rope_index(
            input_ids=ids,
            mm_token_type_ids=(ids == self.image_token).int(),
            image_grid_thw=torch.cat(grids),
            attention_mask=mask,
        )
        to = self.device
        pixels, corrupted, grids = ([x.to(to) for x in xs] for xs in (pixels, corrupted, grids))
        return Prompts(ids.to(to), mask.to(to), positions.to(to), pixels, corrupted, grids)

    def _patches(self, images: list[Image.Image]) -> tuple[Tensor, Tensor]:
        out = self.image_processor(images=images, do_resize=False, return_tensors="pt")
        return out["pixel_values"], out["image_grid_thw"]

    def _tokenize(self, example: Example, grid: Tensor) -> list[int]:
        question = example.question
        if self.instruction:
            question = "\n".join(part for part in (question, example.hint, self.instruction) if part)
        image, pieces = {"type": "image"}, question.split(MARK)
        content = [image] * (len(grid) if len(pieces) == 1 else 0)  # in front, unless the question marks their places
        for i, piece in enumerate(pieces):
            content += [image] * (i > 0) + [{"type": "text", "text": piece}] * bool(piece)
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        visual_tokens = iter((grid.prod(1) // self.image_processor.merge_size**2).tolist())
        if ids.count(self.image_token) != len(grid):
            placeholder = self.tokenizer.convert_ids_to_tokens(self.image_token)
            raise InputError(f"{example.source or 'question'}: take {placeholder} out of the text; images are added in front")
        return [token for i in ids for token in ([i] * next(visual_tokens) if i == self.image_token else [i])]

    # ------------------------------------------------------------------------------------------------------- sampling

    @torch.no_grad()
    def sample(
        self, prompts: Prompts, group_size: int, *, max_new_tokens: int, temperature: float, generator: torch.Generator
    ) -> Rollout:
        """Sample G responses a prompt from pi at `temperature`: no top-k, no top-p, no penalties, whatever the model's
        generation_config says. The prompt is read once and its cache repeated for the group."""
        N, L = prompts.ids.shape
        read = self._read(prompts, torch.arange(N, device=self.device))
        which = torch.arange(N, device=self.device).repeat_interleave(group_size)  # [B]
        cache, hidden = _for_rows(read, which, room=max_new_tokens)  # hidden: [B, H]
        B = len(which)
        ids = torch.full((B, max_new_tokens), self.pad, device=self.device)
        logp = torch.zeros(B, max_new_tokens, device=self.device)
        mask = torch.zeros(B, max_new_tokens, dtype=torch.bool, device=self.device)
        attention = None  # everything is visible, unless prompts are padded: then [B, 1, 1, L + max_new_tokens]
        if not prompts.mask.all():
            attention = torch.cat([prompts.mask[which].bool(), mask.logical_not()], 1)[:, None, None]
        position = self._positions(prompts, which, mask.logical_not())  # [3, B, max_new_tokens]
        alive = torch.ones(B, dtype=torch.bool, device=self.device)
        eos = torch.tensor(self.eos, device=self.device)
        small = self.device.type == "cpu" and hidden.numel() < 2**13
        with self._autocast(), one_thread() if small else nullcontext():  # around the loop: weights are cast once
            for t in range(max_new_tokens):
                logprobs = self._log_softmax(hidden, temperature)  # [B, vocabulary]
                token = draw(logprobs.exp(), generator)  # [B, 1]
                ids[:, t] = torch.where(alive, token[:, 0], self.pad)
                logp[:, t] = torch.where(alive, logprobs.gather(1, token)[:, 0], 0.0)
                mask[:, t] = alive
                alive = alive & ~torch.isin(token[:, 0], eos)
                if t + 1 == max_new_tokens or not alive.any():
                    break
                hidden = self.model.model.language_model(
                    input_ids=ids[:, t : t + 1],
                    attention_mask=None if attention is None else attention[..., : L + t + 1],
                    position_ids=position[:, :, t : t + 1],
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state[:, -1]
        if not logp.isfinite().all():
            raise InputError("the policy has diverged: its log-probs are not finite; start again with a lower --lr")
        T = int(mask.sum(1).max())
        return Rollout(ids[:, :T], mask[:, :T], logp[:, :T], which, read)

    def decode(self, rollout: Rollout) -> list[tuple[str, list[tuple[int, int]]]]:
        """Text of each response without EOS, and the characters that each of its tokens touches."""
        rows = [ids[mask].tolist() for ids, mask in zip(rollout.ids.cpu(), rollout.mask.cpu(), strict=True)]
        rows = [row[:-1] if row and row[-1] in self.eos else row for row in rows]
        return [text_and_offsets([self.bytes_of[i] for i in row]) for row in rows]

    def as_rollout(self, texts: list[str]) -> Rollout:
        """Given texts as if sampled, one a prompt, each closed by EOS. Their `logp` is unknown and left 0."""
        rows = [self.tokenizer(text, add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id] for text in texts]
        T = max(map(len, rows))
        ids = torch.tensor([row + [self.pad] * (T - len(row)) for row in rows], device=self.device)
        mask = torch.tensor([[True] * len(row) + [False] * (T - len(row)) for row in rows], device=self.device)
        return Rollout(ids, mask, torch.zeros(mask.shape, device=self.device), torch.arange(len(rows), device=self.device))

    # -------------------------------------------------------------------------------------------------------- scoring

    def log_probs(
        self,
        prompts: Prompts,
        rollout: Rollout,
        *,
        temperature: float,
        corrupted: bool = False,
        visible: Tensor | None = None,
        wanted: Tensor | None = None,
        reuse: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs of the sampled tokens, fp32, and the entropy of pi at each position.

        Logits are computed at wanted positions only, a chunk at a time, and again in the backward pass instead of
        being kept: with a vocabulary of 152 000 they would otherwise be most of the memory.

        Args:
            corrupted: use the corrupted images, Eq. (2).
            visible: [B, T], response tokens that later ones may attend to, by default all; `without_perception` for
                Eq. (3). Positions are counted over visible tokens, so hidden ones leave no gap.
            wanted: [B, T], visible tokens whose log-prob is asked for, by default all of the response.
            reuse: take the prompts as they were read for sampling. Right only while the weights have not moved since,
                without gradient, and with the original images.
        Returns:
            logp [B, T] with gradient (outside no_grad), entropy [B, T] without, in nats; both 0 where not wanted.
        """
        visible = rollout.mask if visible is None else visible.bool()
        wanted = rollout.mask if wanted is None else wanted.bool()
        empty = torch.zeros(wanted.shape, device=self.device)
        if not wanted.any():
            return empty, empty
        if not self.share_prompts:
            hidden = self._states(prompts, rollout.ids, visible, rollout.prompt, corrupted)  # [B, T, H]
            logp, entropy = self._score(hidden[wanted], rollout.ids[wanted], temperature)
            return empty.masked_scatter(wanted, logp), empty.masked_scatter(wanted, entropy)
        # Leave out what no wanted token can see: hidden tokens, and all after the last wanted one.
        kept = visible & (wanted.flip(1).cumsum(1).flip(1) > 0)
        order = kept.long().argsort(dim=1, descending=True, stable=True)[:, : int(kept.sum(1).max())]  # [B, K], kept first
        ids, kept, picked = (x.gather(1, order) for x in (rollout.ids, kept, wanted & visible))
        hidden = self._states_sharing_prompts(
            prompts, ids, kept, rollout.prompt, corrupted, rollout.read if reuse else None
        )  # [B, K, H]
        scores = self._score(hidden[picked], ids[picked], temperature)
        logp, entropy = (empty.scatter(1, order, empty[:, : order.shape[1]].masked_scatter(picked, x)) for x in scores)
        return logp, entropy

    def _states(self, prompts: Prompts, ids: Tensor, visible: Tensor, which: Tensor, corrupted: bool) -> Tensor:
        """[B, T, H], the state that predicts each response token. The plain way: every row with a prompt of its own,
        hidden tokens in their place with their attention mask at 0."""
        inputs, L = self._prompt_inputs(prompts, which, corrupted), prompts.ids.shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)  # [B, L + T]
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], visible.long()], 1)
        inputs["position_ids"] = torch.cat([inputs["position_ids"], self._positions(prompts, which, visible)], 2)
        with self._autocast():
            hidden = self.model.model(**inputs, use_cache=False).last_hidden_state
        return hidden[:, L - 1 : -1]  # the state before token t predicts token t

    def _states_sharing_prompts(
        self, prompts: Prompts, ids: Tensor, visible: Tensor, which: Tensor, corrupted: bool, read
    ) -> Tensor:
        """The same states and gradients, with each prompt and image read once for all responses to it."""
        if read is None:
            named, which_read = which.unique(return_inverse=True)
            read = self._read(prompts, named, corrupted)
        else:
            which_read = which
        cache, last = _for_rows(read, which_read)
        first = last[:, None]  # [B, 1, H]: the prompt's last state predicts the first token
        if ids.shape[1] == 1:
            return first
        with self._autocast():
            rest = self.model.model(
                input_ids=ids[:, :-1],
                attention_mask=torch.cat([prompts.mask[which], visible[:, :-1].long()], 1),
                position_ids=self._positions(prompts, which, visible)[:, :, :-1],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        return torch.cat([first, rest], 1)

    def _read(self, prompts: Prompts, which: Tensor, corrupted: bool = False) -> tuple[Cache, Tensor]:
        """Keys and values of the prompts `which` [n], and their last states [n, H]; they end at L - 1, padded on the left."""
        with self._autocast():
            out = self.model.model(**self._prompt_inputs(prompts, which, corrupted), use_cache=True)
        return out.past_key_values, out.last_hidden_state[:, -1]

    def _score(self, hidden: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """[n, H], [n] -> log-probs [n], entropies [n]."""

        def score(h, i):
            logprobs = self._log_softmax(h, temperature)
            with torch.no_grad():
                entropy = -(logprobs.exp() * logprobs.clamp(min=-1e4)).sum(1)  # 0 * -inf at forbidden tokens
            return logprobs.gather(1, i[:, None])[:, 0], entropy

        chunks = list(zip(hidden.split(self.chunk), ids.split(self.chunk), strict=True))
        if len(chunks) == 1:  # the logits of one chunk may be kept: computing them again would need the same room
            return score(hidden, ids)
        scored = [checkpoint(score, h, i, use_reentrant=False) for h, i in chunks]
        return torch.cat([s[0] for s in scored]), torch.cat([s[1] for s in scored])

    def _log_softmax(self, hidden: Tensor, temperature: float) -> Tensor:
        """[n, H] -> [n, vocabulary] float32: the one place where pi is defined, for sampling and scoring alike."""
        with self._autocast():
            logits = self.model.lm_head(hidden)
        logits = logits.float() / temperature
        return logits.index_fill(1, self.forbidden, float("-inf")).log_softmax(1)

    def _prompt_inputs(self, prompts: Prompts, which: Tensor, corrupted: bool = False) -> dict:
        """Model inputs of the prompts `which` [B], repeated as often as they are named."""
        pixels, rows = prompts.corrupted if corrupted else prompts.pixels, which.tolist()
        return {
            "input_ids": prompts.ids[which],
            "attention_mask": prompts.mask[which],
            "position_ids": prompts.positions[:, which],
            "pixel_values": torch.cat([pixels[i] for i in rows]),
            "image_grid_thw": torch.cat([prompts.grids[i] for i in rows]),
        }

    def _positions(self, prompts: Prompts, which: Tensor, visible: Tensor) -> Tensor:
        """[3, B, T]: M-RoPE positions of response tokens. They count up from one past the largest of the prompt on any
        axis, the same on all three, over visible tokens only."""
        first = prompts.positions[:, which].amax((0, 2))[:, None] + 1
        return (first + visible.long().cumsum(1) - visible.long()).expand(3, -1, -1)

    def _autocast(self):
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    # ---------------------------------------------------------------------------------------------- weights and files

    def add_lora(self, rank: int) -> None:
        """Freeze everything and put trainable fp32 low-rank adapters on the language model's linear layers."""
        layers = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
        config = import_peft().LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=layers)
        self.model.to(self.dtype)  # frozen weights need no fp32 masters
        self.adapter = import_peft().get_peft_model(self.model, config)
        self.model.eval()

    def as_reference(self):
        """Context in which this policy is the reference: with adapters, the same model with them off."""
        return self.adapter.disable_adapter() if self.adapter else nullcontext()

    def save(self, folder: str | Path, merged: bool = False) -> None:
        """Hugging Face layout: weights, configs, tokenizer with its chat template, image processor.

        With LoRA the weights are the adapters, in peft's own layout, or with `merged` those of the whole model.
        """
        weights = self.adapter or self.model
        weights = copy.deepcopy(weights).merge_and_unload() if self.adapter and merged else weights
        weights.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)


@contextmanager
def one_thread():
    """For products of so few rows that sharing them between cores costs more than it gains."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """[n, vocabulary] -> one drawn index a row, [n, 1]. `torch.multinomial` draws a number for each index, this one a row."""
    cumulative = probabilities.double().cumsum(1)  # in float32 the sum over a large vocabulary would bend the tail
    u = torch.rand(len(cumulative), 1, dtype=torch.float64, device=cumulative.device, generator=generator)
    return torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True).clamp(max=cumulative.shape[1] - 1)


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer with room for `room` more positions: a sampled token is written into it, where
    `DynamicLayer` copies all that is there to a tensor one longer."""

    def __init__(self, keys: Tensor, values: Tensor, room: int):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.length = keys.shape[2]
        self.all_keys, self.all_values = (torch.cat([x, x.new_empty(*x.shape[:2], room, x.shape[3])], 2) for x in (keys, values))
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        start, self.length = self.length, self.length + keys.shape[2]
        self.all_keys[:, :, start : self.length] = keys
        self.all_values[:, :, start : self.length] = values
        self.keys, self.values = self.all_keys[:, :, : self.length], self.all_values[:, :, : self.length]
        return self.keys, self.values


def _for_rows(read: tuple[Cache, Tensor], rows: Tensor, room: int = 0) -> tuple[Cache, Tensor]:
    """A copy of the prompts' cache and last states with one entry for each of `rows`; differentiable without `room`."""
    cache, last = copy.copy(read[0]), read[1]
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    cache.batch_select_indices(rows)
    if room:
        cache.layers = [RoomyLayer(layer.keys, layer.values, room) for layer in cache.layers]
    return cache, last[rows]


def _token_bytes(tokenizer) -> list[bytes]:
    """Raw bytes of every token."""
    added = tokenizer.get_added_vocab()
    pieces = [b""] * len(tokenizer)
    try:
        for token, i in tokenizer.get_vocab().items():
            pieces[i] = token.encode() if token in added else token_bytes(token)
    except ValueError as error:
        raise InputError(str(error)) from None
    return pieces


# ------------------------------------------------------------------------------------------------------------- loading


def load(
    name: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0, max_pixels: int | None = None
) -> Policy:
    """The built-in model ("tiny", random weights from `seed`), a folder, or a hub name; weights are always fp32 masters.

    Args:
        dtype: of computing; anything but float32 runs under autocast.
        max_pixels: area that images are shrunk to, below the image processor's own limit; one visual token covers
            28 x 28 pixels in Qwen2-VL and Qwen2.5-VL, 32 x 32 in Qwen3-VL.
    Raises:
        InputError: it cannot be found, is not a vision-language model of this family, or its weights do not match.
    """
    if name == "tiny":
        return build_tiny(seed, device=device, dtype=dtype)
    if (Path(name) / "adapter_config.json").exists():  # saved with LoRA: the base that it names, and the adapters
        base = json.loads((Path(name) / "adapter_config.json").read_text())["base_model_name_or_path"]
        policy = load(base, device=device, dtype=dtype, max_pixels=max_pixels)
        policy.model.to(dtype)
        policy.adapter = import_peft().PeftModel.from_pretrained(policy.model, name, is_trainable=True)
        policy.model.eval()
        return policy
    local = Path(name).is_dir() or not hub_answers()
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=local)
    except Exception as error:
        where = "is not a model folder" if Path(name).exists() else "no such folder"
        where += ", and the hub does not answer" if local and not Path(name).is_dir() else ""
        raise InputError(f"--model {name}: {where} ({first_line(error)})") from None
    if not hasattr(config, "vision_config"):
        raise InputError(f"--model {name}: a {config.model_type} model sees no images; take a Qwen-VL model")
    if not hasattr(config, "video_token_id"):
        raise InputError(f"--model {name}: a {config.model_type} model is not of the Qwen-VL family")
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True, local_files_only=local
        )
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
        tokenizer.chat_template = chat_template(name, local) or tokenizer.chat_template
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(name, local_files_only=local)
    except Exception as error:
        raise InputError(f"--model {name}: cannot be loaded ({first_line(error)})") from None
    if info["missing_keys"] or info["mismatched_keys"]:  # else they would silently stay random
        broken = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise InputError(f"--model {name}: {len(broken)} weights are missing or misshapen, like {broken[0]}")
    if "image" not in str(tokenizer.chat_template):
        raise InputError(f"--model {name}: has no chat template with images (chat_template.json or chat_template.jinja)")
    return Policy(model.to(device), tokenizer, image_processor, dtype=dtype, max_pixels=max_pixels)


def is_tiny(name: str) -> bool:
    """Whether `name` is the built-in model or a folder made from it."""
    try:
        adapter, config = Path(name) / "adapter_config.json", Path(name) / "config.json"
        if adapter.exists():
            return is_tiny(json.loads(adapter.read_text())["base_model_name_or_path"])
        return name == "tiny" or json.loads(config.read_text()).get("instruction") == ""
    except (OSError, ValueError):
        return False


def chat_template(name: str, local: bool) -> str | None:
    """The template for images, which older folders keep apart from the tokenizer's own, text-only one."""
    for file in ("chat_template.jinja", "chat_template.json"):
        path = cached_file(name, file, local_files_only=local, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            text = Path(path).read_text(encoding="utf-8")
            return json.loads(text)["chat_template"] if file.endswith(".json") else text
    return None


def import_peft():
    try:
        import peft
    except ImportError:
        raise InputError("--lora and adapter folders need peft: pip install peft") from None
    return peft


def hub_answers(timeout: float = 5.0) -> bool:
    """Ask once, instead of letting every download retry for half a minute. Without an answer only cached files are used."""
    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=timeout).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError, http.client.HTTPException):
        return False
    return True


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


TINY_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}<|im_start|>"
)


def build_tiny(seed: int = 0, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Policy:
    """A Qwen2-VL of 1.02 million random weights whose words are those of the drawn tasks; 8-pixel patches."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    special += ["<|video_pad|>", "<unk>"]
    words = [*COLORS, *SHAPES, *CELLS, *map(str, range(10)), *"What color is at How many More or more plus no so same".split()]
    tags = [f"<{slash}{tag}>" for tag in (TAGS.perception, TAGS.reasoning, TAGS.answer) for slash in ("", "/")]
    vocabulary = dict.fromkeys([*special, *tags, *words, *("Ġ" + w for w in words), *",.?", "Ċ", "Ġ"])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    words_and_marks = Regex(r"</?[a-z]+>| ?[A-Za-z0-9]+|\s|[^\sA-Za-z0-9]")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words_and_marks, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        chat_template=TINY_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    ids = {name: i for i, name in enumerate(vocabulary)}
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(vocabulary),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 6, 6]},
            "initializer_range": 0.08,  # 1 / sqrt(hidden_size): the usual 0.02 is for models ten times as wide
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 2,
            "embed_dim": 64,
            "hidden_size": 128,
            "num_heads": 4,
            "patch_size": 8,
            "initializer_range": 0.08,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        initializer_range=0.08,
        instruction="",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(config)
    image_processor = Qwen2VLImageProcessorPil(patch_size=8, size={"shortest_edge": 16 * 16, "longest_edge": 96 * 96})
    return Policy(model.to(device), tokenizer, image_processor, dtype=dtype)
