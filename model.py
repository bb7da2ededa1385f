"""The policy: a vision-language model that samples responses and scores them. The Qwen-VL family.

    prompts = policy.encode(examples)             N prompts and their images
    rollout = policy.sample(prompts, G, ...)      B = N * G responses, [B, T]
    policy.log_probs(prompts, rollout, ...)       log pi of the sampled tokens, [B, T]

One row of a batch, a prompt of L columns and a response of T:

    column     0    1    2   ...  L-1  |   L    L+1   L+2   L+3
    token     pad  pad   q1  ...   qn  |  o_1   o_2   EOS   pad    prompts are padded left
    mask       0    0    1   ...   1   |   1     1     1     0     EOS is trained, padding not

The state at a column predicts the next one: that of qn predicts o_1, that of o_1 predicts o_2. A
prompt is read once for all G responses. The *prompt cache* holds its keys and values, columns 0
to L-1, and the state of qn. Sampling adds one column at a time to a copy of it; scoring feeds o_1
.. o_(T-1) at once, and puts the state of qn in front of the states that come out.

M-RoPE gives every token three positions. Text counts up on all three axes; the visual tokens of
an image, here 2 rows of 3, share one time and differ in height and width; text goes on one past
the largest:

    token    <|im_start|>  v  v  v  v  v  v  How  many  |  o_1  o_2
    time           0       1  1  1  1  1  1   4    5    |   6    7
    height         0       1  1  1  2  2  2   4    5    |   6    7
    width          0       1  2  3  1  2  3   4    5    |   6    7
"""

import copy
import json
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    LinearAttentionLayer,
    StaticLayer,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)

from data import CELLS, COLORS, IMAGE_MARK, INSTRUCTION, SHAPES, TAGS, Example, InputError, blame
from srpo import text_and_offsets, token_bytes

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
LOGITS_AT_A_TIME = 2**25  # 128 MiB in float32


@dataclass
class Prompts:
    """N prompts, padded on the left to L tokens."""

    ids: Tensor  # [N, L]
    mask: Tensor  # [N, L], 0 at padding
    positions: Tensor  # [3, N, L], M-RoPE: time, height, width
    pixels: Sequence[Tensor]  # per prompt [patches, values]
    grids: Sequence[Tensor]  # per prompt [images, 3]: patches in time, height, width


@dataclass
class PromptCache:
    """N prompts as the policy read them."""

    keys_and_values: Cache  # of columns 0 to L-1
    last_state: Tensor  # [N, H], of column L-1


@dataclass
class Rollout:
    """B = N * G responses, those of a prompt next to each other, padded on the right to T."""

    ids: Tensor  # [B, T]
    mask: Tensor  # [B, T] bool, True up to and including EOS
    logp: Tensor  # [B, T] float32, as sampled; 0 at padding
    entropy: Tensor  # [B, T] float32, of the policy at each sampled position, nats; 0 at padding
    prompt: Tensor  # [B], which prompt each row answers
    prompt_cache: PromptCache | None = None  # of all prompts, by the policy that sampled

    def __getitem__(self, rows: Tensor | slice) -> "Rollout":
        per_row = (self.ids, self.mask, self.logp, self.entropy, self.prompt)
        return Rollout(*[x[rows] for x in per_row], self.prompt_cache)


class Policy:
    """A model, its tokenizer and its image processor. Always in eval mode: no dropout, ever."""

    def __init__(self, model, tokenizer, image_processor, *, dtype=torch.float32, max_pixels=None):
        self.model = model.eval()
        self.adapter = None  # peft's wrapper around `model` when LoRA is in use
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.dtype = dtype
        self.device = model.device
        self.image_token = model.config.image_token_id
        # The tiny model knows the form and needs no instruction.
        self.instruction = getattr(model.config, "instruction", INSTRUCTION)

        self.patch = image_processor.patch_size
        self.factor = self.patch * image_processor.merge_size  # side of a visual token in pixels
        largest = image_processor.size["longest_edge"]  # an area, whatever its name says
        if max_pixels is not None:
            largest = min(largest, max(max_pixels, self.factor**2))
        smallest = min(largest, image_processor.size["shortest_edge"])
        self.pixel_limits = (smallest, largest)
        # Saved with the policy, so that whoever serves it sees what training saw.
        image_processor.size = {"shortest_edge": smallest, "longest_edge": largest}

        eos = model.generation_config.eos_token_id
        eos = eos if isinstance(eos, list) else [eos]
        self.eos = sorted({tokenizer.eos_token_id, *eos} - {None})
        self.pad = tokenizer.pad_token_id
        if self.pad is None:
            self.pad = self.eos[0]
        added = tokenizer.get_added_vocab()
        self.bytes_of = {}
        for word, index in tokenizer.get_vocab().items():
            self.bytes_of[index] = word.encode() if word in added else token_bytes(word)
        # Neither sampled nor counted: placeholders, which would need image features in the next
        # pass, and ids that the tokenizer has no text for.
        vocabulary = model.config.get_text_config().vocab_size
        placeholders = {self.image_token, model.config.video_token_id}
        textless = set(range(vocabulary)) - set(self.bytes_of)
        self.forbidden = torch.tensor(sorted(placeholders | textless), device=self.device)
        self.logit_chunk = max(1, LOGITS_AT_A_TIME // vocabulary)  # rows of [n, V] at a time

    def fit(self, image: Image.Image) -> Image.Image:
        """RGB image as the model wants it: whole patches, within the processor's limits."""
        height, width = smart_resize(image.height, image.width, self.factor, *self.pixel_limits)
        return image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)

    def prompt_length(self, example: Example, sizes: list[tuple[int, int]]) -> tuple[int, int]:
        """Tokens of a prompt, and how many of them are visual, from the sizes of its images."""
        count = self.image_processor.get_number_of_image_patches
        patches = torch.tensor([[count(height, width)] for width, height in sizes])
        (ids,) = self._tokenize([example], [patches])
        return len(ids), int((ids == self.image_token).sum())

    def encode(self, examples: list[Example], fitted: bool = False) -> Prompts:
        """Tokens, positions and pixels. InputError where a text holds an image placeholder.

        With `fitted` the images are as `fit` makes them, which a second time could change them.
        """
        images = [image for example in examples for image in example.images]
        if not fitted:
            images = [self.fit(image) for image in images]
        out = self.image_processor(images=images, do_resize=False, return_tensors="pt")
        counts = [len(example.images) for example in examples]
        grids = out["image_grid_thw"].split(counts)
        ids, mask = self._pad(self._tokenize(examples, grids), side="left")
        positions, _ = self.model.model.get_rope_index(
            input_ids=ids,
            mm_token_type_ids=(ids == self.image_token).int(),
            image_grid_thw=torch.cat(grids),
            attention_mask=mask,
        )
        patches = [int(grid.prod(1).sum()) for grid in grids]
        return Prompts(
            ids=ids.to(self.device),
            mask=mask.to(self.device),
            positions=positions.to(self.device),
            pixels=out["pixel_values"].to(self.device).split(patches),
            grids=out["image_grid_thw"].to(self.device).split(counts),
        )

    def _pad(self, rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
        """Token ids of each row -> ids and mask, [rows, longest], the mask 0 at padding."""
        ids = pad_sequence(rows, True, self.pad, padding_side=side)
        mask = pad_sequence([torch.ones_like(row) for row in rows], True, padding_side=side)
        return ids, mask

    def _tokenize(self, examples: list[Example], grids: list[Tensor]) -> list[Tensor]:
        """Token ids of each prompt, with a placeholder for each visual token of its images."""
        texts = [self._chat(e, len(grid)) for e, grid in zip(examples, grids, strict=True)]
        rows = []
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        for ids, example, grid in zip(encoded, examples, grids, strict=True):
            if ids.count(self.image_token) != len(grid):
                placeholder = self.tokenizer.convert_ids_to_tokens(self.image_token)
                source = example.source or "question"
                raise InputError(f"{source}: take {placeholder} out of the text")
            ids = torch.tensor(ids)
            times = torch.ones_like(ids)
            times[ids == self.image_token] = grid.prod(1) // self.image_processor.merge_size**2
            rows.append(ids.repeat_interleave(times))
        return rows

    def _chat(self, example: Example, n_images: int) -> str:
        """The prompt as text, up to where the response begins."""
        question = example.question
        if self.instruction:
            parts = [example.question, example.hint, self.instruction]
            question = "\n".join(part for part in parts if part)
        chat = [{"role": "user", "content": chat_content(question, n_images)}]
        if example.system:
            said = {"type": "text", "text": example.system}
            chat.insert(0, {"role": "system", "content": [said]})
        options = {"add_generation_prompt": True, "enable_thinking": False}
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, **options)
        if text.rstrip().endswith("<think>"):  # opened whatever was asked: it would eat the tags
            text += "</think>\n\n"
        return text

    def decode(self, rollout: Rollout) -> list[tuple[str, list[tuple[int, int]]]]:
        """Text of each response without EOS, and the characters that each of its tokens touches."""
        responses = []
        for ids, mask in zip(rollout.ids.cpu(), rollout.mask.cpu(), strict=True):
            tokens = ids[mask].tolist()
            if tokens and tokens[-1] in self.eos:
                tokens.pop()
            responses.append(text_and_offsets([self.bytes_of[token] for token in tokens]))
        return responses

    def ended(self, rollout: Rollout) -> Tensor:
        """[B] bool: whether a response ends with EOS, and not where its room ended."""
        last = rollout.mask.sum(dim=1, keepdim=True) - 1
        last_tokens = rollout.ids.gather(1, last)[:, 0]  # [B]
        return torch.isin(last_tokens, torch.tensor(self.eos, device=self.device))

    def as_rollout(self, texts: list[str]) -> Rollout:
        """Given texts as if sampled, one per prompt, each closed by EOS; log-probs are left 0."""
        rows = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows = [torch.tensor([*row, self.tokenizer.eos_token_id]) for row in rows]
        ids, mask = self._pad(rows, side="right")
        unknown = torch.zeros(ids.shape, device=self.device)
        prompt = torch.arange(len(ids), device=self.device)
        return Rollout(ids.to(self.device), mask.bool().to(self.device), unknown, unknown, prompt)

    @torch.no_grad()
    def sample(
        self, prompts: Prompts, group_size: int, *, max_new_tokens, temperature, generator
    ) -> Rollout:
        """Sample G responses per prompt from pi at `temperature`: no top-k, no top-p, no penalties,
        whatever generation_config says. At temperature 0 the likeliest token is taken, and
        log-probs are those of temperature 1. Raises InputError when the policy has diverged."""
        N, L = prompts.ids.shape
        prompt = torch.arange(N, device=self.device).repeat_interleave(group_size)  # [B]
        B = len(prompt)
        T = max_new_tokens
        ids = torch.full((B, T), self.pad, device=self.device)
        mask = torch.zeros(B, T, dtype=torch.bool, device=self.device)
        logp = torch.zeros(B, T, device=self.device)
        entropy = torch.zeros(B, T, device=self.device)
        attention = torch.cat([prompts.mask[prompt].bool(), mask], dim=1)  # [B, L + T]
        positions = self._response_positions(prompts, prompt, torch.ones_like(mask))  # [3, B, T]
        alive = torch.ones(B, dtype=torch.bool, device=self.device)
        eos = torch.tensor(self.eos, device=self.device)
        # Autocast is around all of it, so that weights are cast once.
        with self._autocast():
            prompt_cache = self.read_prompts(prompts, torch.arange(N, device=self.device))
            cache = sampling_cache(prompt_cache.keys_and_values, prompt, max_new_tokens, self.dtype)
            state = prompt_cache.last_state[prompt]  # [B, H]
            with threads_for(B * self.model.config.get_text_config().hidden_size):
                for t in range(T):
                    logprobs = self._log_softmax(state, temperature)  # [B, V]
                    probabilities = logprobs.exp()
                    if temperature == 0:
                        token = probabilities.argmax(dim=1, keepdim=True)  # [B, 1]
                    else:
                        token = draw(probabilities, generator)  # [B, 1]
                    ids[:, t] = token[:, 0].where(alive, self.pad)
                    mask[:, t] = alive
                    logp[:, t] = logprobs.gather(1, token)[:, 0]
                    # Where a word cannot be sampled, 0 * -inf would be NaN.
                    entropy[:, t] = -(probabilities * logprobs.clamp(min=-1e4)).sum(1)
                    alive = alive & ~torch.isin(token[:, 0], eos)
                    if t + 1 == T or not alive.any():
                        break
                    attention[:, L + t] = True
                    out = self.model.model.language_model(
                        ids[:, t : t + 1],
                        attention_mask=attention[:, None, None],
                        position_ids=positions[:, :, t : t + 1],
                        past_key_values=cache,
                    )
                    state = out.last_hidden_state[:, -1]
        if not logp.isfinite().all():
            problem = "the policy has diverged: its log-probs are not finite"
            raise InputError(f"{problem}; lower --lr, or take another --dtype than float16")
        logp = logp.masked_fill(~mask, 0)
        entropy = entropy.masked_fill(~mask, 0)
        longest = int(mask.sum(dim=1).max())
        return Rollout(*[x[:, :longest] for x in (ids, mask, logp, entropy)], prompt, prompt_cache)

    def log_probs(
        self, prompts: Prompts, rollout: Rollout, temperature, visible=None, prompt_cache=None
    ) -> Tensor:
        """Log-probs of the sampled tokens, float32, with gradient unless under no_grad.

        Args:
            visible: [B, T], response tokens that later ones can see; by default all. For step 3
                `without_perception`. Hidden tokens are taken out; positions count visible ones.
            prompt_cache: of all prompts, by this policy as it is; by default they are read.
        Returns:
            [B, T]; 0 at padding and at hidden tokens.
        """
        if visible is None:
            visible = rollout.mask
        visible = visible.bool()
        # Visible tokens first, in their order; as many columns as the longest row has.
        order = visible.long().argsort(dim=1, descending=True, stable=True)  # [B, T]
        order = order[:, : int(visible.sum(dim=1).max())]  # [B, K]
        ids = rollout.ids.gather(1, order)
        mask = visible.gather(1, order)
        with self._autocast():  # around both, so that weights are cast once
            states = self._response_states(prompts, ids, mask, rollout.prompt, prompt_cache)
            logp = self._score(states[mask], ids[mask], temperature)  # [B, K, H], [B, K] -> [n]
        # The n log-probs of the visible tokens, row by row, go to the columns they came from.
        return torch.zeros_like(rollout.logp).masked_scatter(visible, logp)

    def _response_states(self, prompts, ids, mask, prompt, prompt_cache) -> Tensor:
        """[B, K, H]: the states that predict the response tokens `ids` [B, K]."""
        row_of_prompt = prompt  # where in the cache each response finds its prompt
        if prompt_cache is None:
            needed, row_of_prompt = prompt.unique(return_inverse=True)
            prompt_cache = self.read_prompts(prompts, needed)
        first = prompt_cache.last_state[row_of_prompt][:, None]  # [B, 1, H]
        if ids.shape[1] == 1:
            return first
        positions = self._response_positions(prompts, prompt, mask)  # [3, B, K]
        out = self.model.model(
            ids[:, :-1],
            attention_mask=torch.cat([prompts.mask[prompt], mask[:, :-1].long()], dim=1),
            position_ids=positions[:, :, :-1],
            past_key_values=scoring_cache(prompt_cache.keys_and_values, row_of_prompt),
        )
        return torch.cat([first, out.last_hidden_state], dim=1)

    def read_prompts(self, prompts: Prompts, which: Tensor) -> PromptCache:
        """The prompts `which` [n], read with their images."""
        indices = which.tolist()
        out = self.model.model(
            input_ids=prompts.ids[which],
            attention_mask=prompts.mask[which],
            position_ids=prompts.positions[:, which],
            pixel_values=torch.cat([prompts.pixels[i] for i in indices]),
            image_grid_thw=torch.cat([prompts.grids[i] for i in indices]),
            use_cache=True,
        )
        return PromptCache(out.past_key_values, out.last_hidden_state[:, -1])

    def _score(self, states: Tensor, ids: Tensor, temperature: float) -> Tensor:
        """[n, H], [n] -> log-probs [n]. Logits exist a chunk at a time, and again in the backward
        pass: with a vocabulary of 152,000 they would otherwise be most of the memory."""

        def score_chunk(states, ids):
            logprobs = self._log_softmax(states, temperature)
            return logprobs.gather(1, ids[:, None])[:, 0]

        if len(ids) <= self.logit_chunk:  # computing a single chunk again would need the same room
            return score_chunk(states, ids)
        chunks = zip(states.split(self.logit_chunk), ids.split(self.logit_chunk), strict=True)
        scored = [checkpoint(score_chunk, s, i, use_reentrant=False) for s, i in chunks]
        return torch.cat(scored)

    def _log_softmax(self, states: Tensor, temperature: float) -> Tensor:
        """[n, H] -> [n, V] float32: the one place where pi is defined, to sample and to score."""
        logits = self.model.lm_head(states).float()
        if temperature > 0:
            logits /= temperature
        logits.index_fill_(1, self.forbidden, float("-inf"))
        return logits.log_softmax(dim=1)

    def _response_positions(self, prompts: Prompts, prompt: Tensor, mask: Tensor) -> Tensor:
        """[3, B, T]: M-RoPE positions of response tokens, counted over `mask` [B, T]."""
        largest = prompts.positions.amax(dim=(0, 2))[prompt]  # [B]
        count = mask.long().cumsum(dim=1) - mask.long()  # [B, T], tokens before this one
        return (largest[:, None] + 1 + count).expand(3, -1, -1)

    def _autocast(self):
        in_half = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=in_half)

    def add_lora(self, rank: int, seed: int = 0, folder: str | None = None) -> None:
        """Freeze all but float32 low-rank adapters on the language model, new or from `folder`."""
        peft = import_peft()
        for parameter in self.model.parameters():  # frozen weights need no float32 masters
            parameter.data = parameter.data.to(self.dtype)  # but buffers do: rotary frequencies
        if folder is not None:
            options = {"is_trainable": True, "torch_device": str(self.device)}
            adapter = peft.PeftModel.from_pretrained(self.model, folder, **options)
            saved = set(peft.load_peft_weights(folder, device="cpu"))
            wanted = set(peft.get_peft_model_state_dict(adapter))
            if saved != wanted:  # peft leaves those that it does not find at random
                name = min(saved ^ wanted)
                raise ValueError(f"its adapters are not those of the model, see {name}")
        else:
            layers = r".*language_model.*_proj\w*"  # of attention, delta nets and MLP
            options = {"lora_alpha": 2 * rank, "lora_dropout": 0.0, "target_modules": layers}
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                adapter = peft.get_peft_model(self.model, peft.LoraConfig(r=rank, **options))
        for parameter in adapter.parameters():
            if parameter.requires_grad:  # those of other trainers may hold whole layers, too
                parameter.data = parameter.data.float()
        self.adapter = adapter.eval()

    def adapts(self, name: str) -> bool:
        """Whether it becomes the model `name` without its adapters: `name` has none of its own."""
        if Path(name).is_dir():
            return adapter_config(name) is None
        return self.adapter.peft_config["default"].base_model_name_or_path == name

    def save(self, folder: str | Path) -> None:
        """Hugging Face layout. With LoRA the weights are the adapters, in peft's layout."""
        weights = self.model if self.adapter is None else self.adapter
        weights.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)


def import_peft():
    try:
        import peft
    except ImportError:
        raise InputError("--lora and its folders need peft: pip install peft") from None
    return peft


def chat_content(question: str, n_images: int) -> list[dict]:
    """The user's turn: images stand where the question marks them, or else in front of it."""
    pieces = question.split(IMAGE_MARK)
    content = []
    if len(pieces) == 1:
        content += [{"type": "image"}] * n_images
    for index, piece in enumerate(pieces):
        if index > 0:
            content.append({"type": "image"})
        if piece:
            content.append({"type": "text", "text": piece})
    return content


@contextmanager
def threads_for(numbers: int):
    """One thread where a step computes with so few numbers that sharing them does not pay."""
    threads = torch.get_num_threads()
    if numbers < 2**13:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """[n, V] -> a drawn index per row, [n, 1]. `multinomial` would draw a number per index."""
    # In float32 the sum over a large vocabulary would bend the tail.
    cumulative = probabilities.double().cumsum(dim=1)  # [n, V]
    options = {"dtype": torch.float64, "device": cumulative.device, "generator": generator}
    u = torch.rand(len(cumulative), 1, **options)
    index = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
    return index.clamp(max=cumulative.shape[1] - 1)


# ---- the caches


class SamplingLayer(StaticLayer):
    """Keys and values of an attention layer, with room for the tokens to come."""

    def __init__(self, columns: int, dtype: torch.dtype):
        super().__init__(columns)
        self.kept_as = dtype  # that of computing: under autocast float32 ones come in, too

    def update(self, keys, values, *args, **kwargs):
        return super().update(keys.to(self.kept_as), values.to(self.kept_as))


class ScoringLayer(DynamicLayer):
    """Keys and values of the prompts; those of responses are returned behind them, and not kept."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.keys = keys
        self.values = values
        self.is_initialized = True

    def update(self, keys, values, *args, **kwargs):
        return torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)


class ScoringState(LinearAttentionLayer):
    """The same for the state of a recurrent layer, as Qwen3.5 has them."""

    def update_conv_state(self, conv_states, state_idx=0, **kwargs):
        return torch.cat([self.conv_states[state_idx], conv_states], dim=-1)

    def update_recurrent_state(self, recurrent_states, state_idx=0, **kwargs):
        return recurrent_states


def recompute_layers(model) -> None:
    """From now on keep the input of a decoder layer alone: the backward pass computes it again.

    What is inside, most of the memory of an update, then exists for one layer at a time. Gradients
    stay as they are. The checkpoints of transformers go without a cache, which responses need.
    """
    for index, layer in enumerate(model.model.language_model.layers):
        layer.forward = partial(_recomputed, layer.forward, index)


def _recomputed(forward, index: int, hidden: Tensor, *, past_key_values: Cache, **inputs) -> Tensor:
    """Layer `index` on hidden [b, T, H], kept alone if a gradient is to come."""
    if not torch.is_grad_enabled():
        return forward(hidden, past_key_values=past_key_values, **inputs)
    layer_before = past_key_values.layers[index]

    def compute(hidden):
        if isinstance(past_key_values, DynamicCache):  # of prompts being read: filled on the way
            past_key_values.layers[index] = copy.deepcopy(layer_before)
        return forward(hidden, past_key_values=past_key_values, **inputs)

    return checkpoint(compute, hidden, use_reentrant=False)


def sampling_cache(cache: Cache, rows: Tensor, new_tokens: int, dtype: torch.dtype) -> Cache:
    """The prompts' cache, an entry for each of the prompts `rows` [B], with room for new tokens."""
    layers = []
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionLayer):
            copied = copy_states(layer, rows, LinearAttentionLayer())
        else:
            copied = SamplingLayer(layer.keys.shape[2] + new_tokens, dtype)
            copied.update(layer.keys[rows], layer.values[rows])
        layers.append(copied)
    return Cache(layers=layers)


def scoring_cache(cache: Cache, rows: Tensor) -> Cache:
    """The same for a pass over whole responses, which has a gradient and leaves it as it is."""
    layers = []
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionLayer):
            copied = copy_states(layer, rows, ScoringState())
            copied.record_past = True  # else a pass over one token writes over the state
        else:
            copied = ScoringLayer(layer.keys[rows], layer.values[rows])
        layers.append(copied)
    return Cache(layers=layers)


def copy_states(layer: LinearAttentionLayer, rows: Tensor, into: LinearAttentionLayer):
    LinearAttentionLayer.update_conv_state(into, layer.conv_states[0][rows])
    LinearAttentionLayer.update_recurrent_state(into, layer.recurrent_states[0][rows])
    return into


# ---- loading


def load(
    name: str, *, device="cpu", dtype=torch.float32, seed=0, max_pixels=None, frozen=False
) -> Policy:
    """The model tiny, random from `seed`, a folder, or a hub name; else InputError.

    Args:
        dtype: of computing; all but float32 under autocast. With `frozen`, of the weights, too.
        max_pixels: area that images are shrunk to, below the image processor's own limit.
    """
    if name == "tiny":
        return build_tiny(seed, device=device, dtype=dtype)
    with blame(f"--model {name}: cannot be used"):
        if (Path(name) / "args.json").exists():
            raise ValueError("the folder of a run; take its checkpoint-... folder")
        if name.startswith((".", "/", "~")) and not Path(name).is_dir():
            raise ValueError("no such folder")
        adapters = adapter_config(name)
        if adapters is not None:
            base = adapters["base_model_name_or_path"]
            if (Path(name) / "preprocessor_config.json").exists():  # what their training saw
                seen = Qwen2VLImageProcessorPil.from_pretrained(name).size["longest_edge"]
                if max_pixels is None or seen < max_pixels:
                    max_pixels = seen
            policy = load(base, device=device, dtype=dtype, max_pixels=max_pixels, frozen=True)
            policy.add_lora(adapters["r"], folder=name)
            return policy
        if Path(name).is_dir():
            name = str(Path(name).resolve())  # adapters keep it, and may be loaded from elsewhere
        config = transformers.AutoConfig.from_pretrained(name)
        if config.model_type not in FAMILIES:
            raise ValueError(f"a {config.model_type} model, not one of {', '.join(FAMILIES)}")
        model, info = transformers.AutoModelForImageTextToText.from_pretrained(
            name,
            config=config,
            attn_implementation="sdpa",  # `sample` masks by booleans, which "eager" would add
            dtype=dtype if frozen else torch.float32,
            output_loading_info=True,
        )
        missing = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
        if missing:  # they would be random
            raise ValueError(f"{len(missing)} weights are missing or misshapen, like {missing[0]}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        # Older folders keep the template for images apart from the tokenizer's own, text-only one.
        processor = transformers.ProcessorMixin.get_processor_dict(name)[0]
        if processor.get("chat_template"):
            tokenizer.chat_template = processor["chat_template"]
        if "image" not in str(tokenizer.chat_template):
            raise ValueError("no chat template with images (chat_template.json or .jinja)")
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(name)
        options = {"dtype": dtype, "max_pixels": max_pixels}
        return Policy(model.to(device), tokenizer, image_processor, **options)


def adapter_config(name: str) -> dict | None:
    """What peft says of the adapters in a folder: their rank r, and the model that they belong to.

    None where the folder holds no adapters; InputError where that cannot be read.
    """
    file = Path(name) / "adapter_config.json"
    if not file.exists():
        return None
    with blame(f"{file}: not the configuration of adapters"):
        config = json.loads(file.read_text(encoding="utf-8"))
        if config["base_model_name_or_path"] is None:
            raise ValueError("it names no base model")
        return {key: config[key] for key in ("r", "base_model_name_or_path")}


def is_tiny(name: str) -> bool:
    """Whether `name` is the built-in model, or a folder made from it, of adapters, too."""
    adapters = adapter_config(name)
    if adapters is not None:
        name = adapters["base_model_name_or_path"]
    if name == "tiny":
        return True
    try:
        config = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
        return config.get("instruction") == ""
    except (OSError, ValueError, AttributeError):  # no folder of a model: `load` says so
        return False


# ---- the tiny model

TINY_TEMPLATE = (
    "{% for message in messages %}<|im_start|>"
    "{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "<|im_end|>{% endfor %}<|im_start|>"
)
TINY_WORDS = [*COLORS, *SHAPES, *CELLS, *"0123456789"]
TINY_WORDS += "What color is at How many More or more plus no so same".split()


def tiny_tokenizer():
    """Whole words with a byte-level spelling, as in the drawn tasks."""
    special = "endoftext im_start im_end vision_start vision_end image_pad video_pad".split()
    special = [f"<|{name}|>" for name in special] + ["<unk>"]
    tags = []
    for name in (TAGS.perception, TAGS.reasoning, TAGS.answer):
        tags += [f"<{name}>", f"</{name}>"]
    words = [*TINY_WORDS, *("Ġ" + word for word in TINY_WORDS)]  # Ġ is the space before a word
    vocabulary = [*special, *tags, *words, *",.?", "Ċ", "Ġ"]
    ids = {word: index for index, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    word = pre_tokenizers.Split(Regex(r"</?[a-z]+>| ?[A-Za-z0-9]+|\s|[^\sA-Za-z0-9]"), "isolated")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([word, spell])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=TINY_TEMPLATE,
        clean_up_tokenization_spaces=False,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
    )


def build_tiny(seed: int = 0, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Policy:
    """A Qwen2-VL of 0.63 million random weights whose words are those of the drawn tasks."""
    tokenizer = tiny_tokenizer()
    spread = 0.08  # about 1 / sqrt(hidden_size); the usual 0.02 is for wide models
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 6, 6]}
    text = {"vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 256}
    text.update(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    text.update(max_position_embeddings=1024, rope_parameters=rope, initializer_range=spread)
    text.update(bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    text.update(pad_token_id=tokenizer.pad_token_id)
    vision = {"depth": 1, "embed_dim": 64, "hidden_size": 128, "num_heads": 4, "patch_size": 8}
    vision.update(initializer_range=spread)
    id_of = tokenizer.convert_tokens_to_ids
    marks = {"image_token_id": id_of("<|image_pad|>"), "video_token_id": id_of("<|video_pad|>")}
    marks["vision_start_token_id"] = id_of("<|vision_start|>")
    marks["vision_end_token_id"] = id_of("<|vision_end|>")
    common = {"tie_word_embeddings": True, "initializer_range": spread, "instruction": ""}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **marks, **common)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.Qwen2VLForConditionalGeneration(config)
    limits = {"shortest_edge": 256, "longest_edge": 9216}  # areas in pixels
    image_processor = Qwen2VLImageProcessorPil(patch_size=8, size=limits)
    return Policy(model.to(device), tokenizer, image_processor, dtype=dtype)
