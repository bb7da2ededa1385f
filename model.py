"""The policy: a vision-language model that samples responses and scores them. Qwen2-VL and its relatives.

    policy = load("tiny")                            or a folder, or a hub name: "Qwen/Qwen2-VL-2B-Instruct"
    prompts = policy.encode(examples, corruption)    N prompts, their images, the corrupted images
    rollout = policy.sample(prompts, G, ...)         B = N * G responses, [B, T]
    policy.log_probs(prompts, rollout, ...)          log pi of the sampled tokens, [B, T]; corrupted=True:
                                                     step 2, visible=without_perception(...): step 3
"""

import copy
import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, LinearAttentionLayer, StaticLayer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from corrupt import CELLS, COLORS, SHAPES, Example
from data import INSTRUCTION, MARK, TAGS, InputError, first_line
from srpo import text_and_offsets, token_bytes

FAMILY = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")


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
    """A model, its tokenizer and its image processor. The model stays in eval mode: no dropout, ever."""

    adapter = None  # peft's wrapper around `model` when LoRA is in use
    micro_batch = 16384  # tokens in memory at a time, in scoring and in the update

    def __init__(self, model, tokenizer, image_processor, *, dtype=torch.float32, max_pixels=None):
        self.model, self.tokenizer, self.image_processor = model.eval(), tokenizer, image_processor
        self.dtype, self.device, config = dtype, model.device, model.config
        self.image_token = config.image_token_id
        self.instruction = getattr(config, "instruction", INSTRUCTION)  # tiny knows the form, and needs none
        self.patch = image_processor.patch_size
        self.factor = self.patch * image_processor.merge_size  # pixels along a side of a visual token
        low, high = (image_processor.size[edge] for edge in ("shortest_edge", "longest_edge"))  # areas
        high = min(high, max(max_pixels or high, self.factor**2))
        self.pixels = min(low, high), high
        eos = model.generation_config.eos_token_id
        self.eos = sorted({tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None})
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos[0]
        # Neither sampled nor counted: placeholders, which would need image features in the next pass, and
        # ids beyond the tokenizer, which have no text.
        vocabulary = config.get_text_config().vocab_size
        forbidden = {config.image_token_id, config.video_token_id, *range(len(tokenizer), vocabulary)}
        self.forbidden = torch.tensor(sorted(forbidden), device=self.device)
        self.chunk = max(1, 2**25 // vocabulary)  # positions whose logits exist at one time
        added, words = tokenizer.get_added_vocab(), tokenizer.get_vocab().items()
        self.bytes_of = {i: word.encode() if word in added else token_bytes(word) for word, i in words}

    def fit(self, image: Image.Image) -> Image.Image:
        """RGB image as the model wants it: whole patches, as many as the processor's limits allow."""
        height, width = smart_resize(image.height, image.width, self.factor, *self.pixels)
        return image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)

    def encode(self, examples: list[Example], corruption=None) -> Prompts:
        """Tokens, positions and pixels of the prompts; InputError where a text holds an image placeholder.

        Args:
            corruption: (i, image) -> image, of the example's index and each image as resized for the model.
        """
        images = [[self.fit(image) for image in example.images] for example in examples]
        (pixels, grids), corrupted = self._patches(images), []
        if corruption:
            images = [[corruption(i, image) for image in row] for i, row in enumerate(images)]
            corrupted, _ = self._patches(images)
        rows = [self._tokenize(example, grid) for example, grid in zip(examples, grids, strict=True)]
        ids = pad_sequence(rows, True, self.pad, "left").to(self.device)  # [N, L]
        mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left").to(self.device)
        kinds = (ids == self.image_token).int()
        positions, _ = self.model.model.get_rope_index(
            input_ids=ids, mm_token_type_ids=kinds, image_grid_thw=torch.cat(grids), attention_mask=mask
        )
        return Prompts(ids, mask, positions, pixels, corrupted, grids)

    def _patches(self, images: list[list[Image.Image]]) -> tuple[list[Tensor], list[Tensor]]:
        out = self.image_processor(images=sum(images, []), do_resize=False, return_tensors="pt")
        grids = out["image_grid_thw"].to(self.device).split([len(row) for row in images])
        pixels = out["pixel_values"].to(self.device).split([int(grid.prod(1).sum()) for grid in grids])
        return list(pixels), list(grids)

    def _tokenize(self, example: Example, grid: Tensor) -> Tensor:
        parts = example.question, *(self.instruction and (example.hint, self.instruction))
        question = "\n".join(filter(None, parts))
        image, pieces = {"type": "image"}, question.split(MARK)
        content = [image] * (len(grid) if len(pieces) == 1 else 0)  # in front, if unmarked
        for i, piece in enumerate(pieces):
            content += [image] * (i > 0) + [{"type": "text", "text": piece}] * bool(piece)
        chat = [{"role": "user", "content": content}]
        how = {"add_generation_prompt": True, "enable_thinking": False}
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, **how)
        text += "</think>\n\n" * text.rstrip().endswith("<think>")  # opened whatever was asked
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids.count(self.image_token) != len(grid):
            mark = self.tokenizer.convert_ids_to_tokens(self.image_token)
            raise InputError(f"{example.source or 'question'}: take {mark} out of the text")
        visual_tokens = iter((grid.prod(1) // self.image_processor.merge_size**2).tolist())
        times = [next(visual_tokens) if i == self.image_token else 1 for i in ids]
        return torch.tensor(ids).repeat_interleave(torch.tensor(times))

    @torch.no_grad()
    def sample(self, prompts: Prompts, group_size: int, *, max_new_tokens, temperature, generator) -> Rollout:
        """Sample G responses a prompt from pi at `temperature`: no top-k, no top-p, no penalties, whatever
        generation_config says. Raises InputError when the policy has diverged."""
        N, L = prompts.ids.shape
        read = self._read(prompts, torch.arange(N, device=self.device))
        which = torch.arange(N, device=self.device).repeat_interleave(group_size)  # [B]
        cache, hidden = _for_rows(read, which, room=max_new_tokens)  # hidden: [B, H]
        logp = torch.zeros(len(which), max_new_tokens, device=self.device)  # [B, T]
        ids = torch.full(logp.shape, self.pad, device=self.device)  # [B, T]
        mask = torch.zeros(logp.shape, dtype=torch.bool, device=self.device)  # [B, T]
        attention = torch.cat([prompts.mask[which].bool(), mask], 1)[:, None, None]  # [B, 1, 1, L + T]
        position = self._positions(prompts, which, ~mask)  # [3, B, T]
        alive, eos = ~mask[:, 0], torch.tensor(self.eos, device=self.device)
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if hidden.numel() < 2**13 else threads)  # sharing a small product costs more
        with self._autocast():  # around the loop: weights are cast once
            for t in range(max_new_tokens):
                logprobs = self._log_softmax(hidden, temperature)  # [B, vocabulary]
                token = draw(logprobs.exp(), generator)  # [B, 1]
                ids[:, t] = torch.where(alive, token[:, 0], self.pad)
                logp[:, t] = torch.where(alive, logprobs.gather(1, token)[:, 0], 0.0)
                mask[:, t] = alive
                alive = alive & ~torch.isin(token[:, 0], eos)
                if t + 1 == max_new_tokens or not alive.any():
                    break
                attention[..., L + t] = True
                inputs = {"attention_mask": attention, "position_ids": position[:, :, t : t + 1]}
                out = self.model.model.language_model(ids[:, t : t + 1], past_key_values=cache, **inputs)
                hidden = out.last_hidden_state[:, -1]
        torch.set_num_threads(threads)
        if not logp.isfinite().all():
            raise InputError("the policy has diverged: its log-probs are not finite; start with a lower --lr")
        T = int(mask.sum(1).max())
        return Rollout(ids[:, :T], mask[:, :T], logp[:, :T], which, read)

    def decode(self, rollout: Rollout) -> list[tuple[str, list[tuple[int, int]]]]:
        """Text of each response without EOS, and the characters that each of its tokens touches."""
        rows = [ids[mask].tolist() for ids, mask in zip(rollout.ids.cpu(), rollout.mask.cpu(), strict=True)]
        rows = [row[:-1] if row and row[-1] in self.eos else row for row in rows]
        return [text_and_offsets([self.bytes_of[i] for i in row]) for row in rows]

    def as_rollout(self, texts: list[str]) -> Rollout:
        """Given texts as if sampled, one a prompt, each closed by EOS. Their `logp` is unknown and left 0."""
        rows = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows = [torch.tensor([*row, self.tokenizer.eos_token_id]) for row in rows]
        ids = pad_sequence(rows, True, self.pad).to(self.device)  # [B, T]
        mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], True).to(self.device)
        return Rollout(ids, mask, mask.float() * 0, torch.arange(len(ids), device=self.device))

    def log_probs(
        self, prompts, rollout, *, temperature, corrupted=False, visible=None, wanted=None, reuse=False
    ) -> tuple[Tensor, Tensor]:
        """Log-probs of the sampled tokens, fp32, and the entropy of pi, a micro-batch of rows at a time.

        Args:
            corrupted: use the corrupted images, step 2.
            visible: [B, T], response tokens that later ones can see, by default all; `without_perception` for
                step 3. Hidden tokens are taken out, and positions counted over the visible ones.
            wanted: [B, T], visible tokens whose log-prob is asked for, by default all.
            reuse: take the prompts as read for sampling; without gradient, while the weights have not moved.
        Returns:
            logp [B, T] with gradient (outside no_grad), entropy [B, T] without, in nats; 0 where not wanted.
        """
        visible = rollout.mask if visible is None else visible.bool()
        wanted = visible if wanted is None else visible & wanted.bool()
        kept = visible & (wanted.flip(1).cumsum(1).flip(1) > 0)  # and what comes after, not read
        logp = entropy = torch.zeros(wanted.shape, device=self.device)
        for rows in self.micro_batches(prompts, rollout, wanted.any(1)):
            order = kept[rows].long().argsort(dim=1, descending=True, stable=True)  # kept tokens first
            order = order[:, : int(kept[rows].sum(1).max())]  # [b, K]
            ids, there, asked = (x[rows].gather(1, order) for x in (rollout.ids, kept, wanted))
            read = rollout.read if reuse else None
            hidden = self._states(prompts, ids, there, rollout.prompt[rows], corrupted, read)  # [b, K, H]
            scores = self._score(hidden[asked], ids[asked], temperature)
            place = rows[:, None].expand_as(order)[asked], order[asked]
            logp, entropy = (x.index_put(place, y) for x, y in zip((logp, entropy), scores, strict=True))
        return logp, entropy

    def micro_batches(self, prompts: Prompts, rollout: Rollout, used: Tensor) -> list[Tensor]:
        """Split the rows `used` [B] so that no part reads over `micro_batch` tokens: its prompts once, its
        responses padded to the longest. One row goes whatever it costs."""
        length, prompt, L = rollout.mask.sum(1).tolist(), rollout.prompt.tolist(), prompts.ids.shape[1]
        batches = []
        for b in used.nonzero()[:, 0].tolist():
            batch = [*batches[-1], b] if batches else [b]
            cost = len({prompt[i] for i in batch}) * L + len(batch) * max(length[i] for i in batch)
            full = cost > self.micro_batch and len(batch) > 1
            batches = [*batches, [b]] if full else [*batches[:-1], batch]
        return [torch.tensor(batch, device=self.device) for batch in batches]

    def _states(self, prompts, ids: Tensor, visible: Tensor, which: Tensor, corrupted: bool, read) -> Tensor:
        """[b, K, H], the state that predicts each response token; each prompt is read once, with gradient."""
        named, row = which.unique(return_inverse=True) if read is None else (None, which)
        cache, last = _for_rows(read or self._read(prompts, named, corrupted), row)
        if ids.shape[1] == 1:
            return last[:, None]
        inputs = {"attention_mask": torch.cat([prompts.mask[which], visible[:, :-1].long()], 1)}
        inputs["position_ids"] = self._positions(prompts, which, visible)[:, :, :-1]
        with self._autocast():
            rest = self.model.model(ids[:, :-1], past_key_values=cache, **inputs).last_hidden_state
        return torch.cat([last[:, None], rest], 1)  # the prompt's last state predicts the first token

    def _read(self, prompts: Prompts, which: Tensor, corrupted: bool = False) -> tuple[Cache, Tensor]:
        """Keys and values of the prompts `which` [n], and their last states [n, H]."""
        pixels, rows = prompts.corrupted if corrupted else prompts.pixels, which.tolist()
        inputs = {"input_ids": prompts.ids[which], "attention_mask": prompts.mask[which]}
        inputs |= {"pixel_values": torch.cat([pixels[i] for i in rows])}
        inputs |= {"image_grid_thw": torch.cat([prompts.grids[i] for i in rows])}
        with self._autocast():
            out = self.model.model(**inputs, position_ids=prompts.positions[:, which], use_cache=True)
        return out.past_key_values, out.last_hidden_state[:, -1]

    def _score(self, hidden: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """[n, H], [n] -> log-probs [n], entropies [n]. Logits exist a chunk at a time, and again in the
        backward pass: with a vocabulary of 152 000 they would otherwise be most of the memory."""

        def score(h, i):
            logprobs = self._log_softmax(h, temperature)
            with torch.no_grad():
                entropy = -(logprobs.exp() * logprobs.clamp(min=-1e4)).sum(1)  # 0 * -inf at forbidden tokens
            return logprobs.gather(1, i[:, None])[:, 0], entropy

        chunks = list(zip(hidden.split(self.chunk), ids.split(self.chunk), strict=True))
        if len(chunks) == 1:  # a single chunk may be kept: computing it again would need the same room
            return score(hidden, ids)
        scored = [checkpoint(score, h, i, use_reentrant=False) for h, i in chunks]
        return torch.cat([s[0] for s in scored]), torch.cat([s[1] for s in scored])

    def _log_softmax(self, hidden: Tensor, temperature: float) -> Tensor:
        """[n, H] -> [n, vocabulary] float32: the one place where pi is defined, in sampling and scoring."""
        with self._autocast():
            logits = self.model.lm_head(hidden)
        return (logits.float() / temperature).index_fill(1, self.forbidden, float("-inf")).log_softmax(1)

    def _positions(self, prompts: Prompts, which: Tensor, visible: Tensor) -> Tensor:
        """[3, B, T]: M-RoPE positions of response tokens, the same on all axes: from one past the prompt's
        largest, counted over visible tokens."""
        first = prompts.positions[:, which].amax((0, 2))[:, None] + 1
        return (first + visible.long().cumsum(1) - visible.long()).expand(3, -1, -1)

    def _autocast(self):
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def add_lora(self, rank: int, folder: str | None = None) -> None:
        """Freeze all but fp32 low-rank adapters on the language model's layers, new or from `folder`."""
        try:
            import peft
        except ImportError:
            raise InputError("--lora and its folders need peft: pip install peft") from None
        layers = r".*language_model.*_proj\w*"  # of attention, of delta nets, of the MLP
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=layers)
        self.model.to(self.dtype)  # frozen weights need no fp32 masters
        old = folder and peft.PeftModel.from_pretrained(self.model, folder, is_trainable=True)
        self.adapter = (old or peft.get_peft_model(self.model, config)).eval()

    def as_reference(self, policy: "Policy"):
        """Context in which this is the reference of `policy`: of itself, its adapters are off."""
        return self.adapter.disable_adapter() if self is policy and self.adapter else nullcontext()

    def save(self, folder: str | Path) -> None:
        """Hugging Face layout; with LoRA the weights are the adapters, in peft's."""
        for part in (self.adapter or self.model, self.tokenizer, self.image_processor):
            part.save_pretrained(folder)


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """[n, vocabulary] -> a drawn index a row, [n, 1]. `multinomial` draws a number an index."""
    cumulative = probabilities.double().cumsum(1)  # in float32 the sum over a large vocabulary bends the tail
    u = torch.rand(len(cumulative), 1, dtype=torch.float64, device=cumulative.device, generator=generator)
    index = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
    return index.clamp(max=cumulative.shape[1] - 1)


class RoomyLayer(StaticLayer):  # room made once for the tokens to come, where a growing cache copies all
    def update(self, keys: Tensor, values: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        return super().update(keys, values.to(keys.dtype))  # under autocast they differ


class StateLayer(LinearAttentionLayer):  # a state replaced: writing over it would spoil the backward pass
    def update_recurrent_state(self, new: Tensor, state_idx: int = 0, **_) -> Tensor:
        self.recurrent_states[state_idx] = new
        return new


def _for_rows(read: tuple[Cache, Tensor], rows: Tensor, room: int = 0) -> tuple[Cache, Tensor]:
    """A copy of the prompts' cache and last states, one entry a row; differentiable, or with room."""
    cache = copy.copy(read[0])
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionLayer):
            layer.__class__ = StateLayer
            vars(layer).update({k: dict(v) for k, v in vars(layer).items() if isinstance(v, dict)})
        layer.reorder_cache(rows)
        if room and not isinstance(layer, LinearAttentionLayer):
            cache.layers[i] = RoomyLayer(layer.keys.shape[2] + room)
            cache.layers[i].update(layer.keys, layer.values)
    return cache, read[1][rows]


def load(name: str, *, device="cpu", dtype=torch.float32, seed=0, max_pixels=None, frozen=False) -> Policy:
    """The model tiny, random from `seed`, a folder, or a hub name, as fp32 masters; else InputError.

    Args:
        dtype: of computing; anything but float32 runs under autocast. With `frozen`, of the weights too.
        max_pixels: area that images are shrunk to, below the image processor's own limit.
    """
    if name == "tiny":
        return build_tiny(seed, device=device, dtype=dtype)
    try:
        if (file := Path(name) / "adapter_config.json").exists():
            base = json.loads(file.read_text())["base_model_name_or_path"]
            policy = load(base, device=device, dtype=dtype, max_pixels=max_pixels, frozen=True)
            policy.add_lora(1, folder=name)
            return policy
        config = transformers.AutoConfig.from_pretrained(name)
        if config.model_type not in FAMILY:
            raise ValueError(f"a {config.model_type} model, not one of {', '.join(FAMILY)}")
        model, info = transformers.AutoModelForImageTextToText.from_pretrained(
            name, config=config, dtype=dtype if frozen else torch.float32, output_loading_info=True
        )
        if broken := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):  # else random
            raise ValueError(f"{len(broken)} weights are missing or misshapen, like {broken[0]}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        # Older folders keep the template for images apart from the tokenizer's own, text-only one.
        template = transformers.ProcessorMixin.get_processor_dict(name)[0].get("chat_template")
        tokenizer.chat_template = template or tokenizer.chat_template
        if "image" not in str(tokenizer.chat_template):
            raise ValueError("no chat template with images (chat_template.json or .jinja)")
        eyes = Qwen2VLImageProcessorPil.from_pretrained(name)
        return Policy(model.to(device), tokenizer, eyes, dtype=dtype, max_pixels=max_pixels)
    except Exception as error:  # what is not there, not whole, or not of this kind fails in many ways
        raise InputError(f"--model {name}: cannot be used ({first_line(error)})") from None


def is_tiny(name: str) -> bool:
    """Whether `name` is the built-in model, or a folder made from it, of adapters, too."""
    if name == "tiny":
        return True
    try:
        if (adapters := Path(name) / "adapter_config.json").exists():
            return is_tiny(json.loads(adapters.read_text())["base_model_name_or_path"])
        return json.loads((Path(name) / "config.json").read_text()).get("instruction") == ""
    except (OSError, ValueError, KeyError, AttributeError):  # not a folder of a model: `load` says so
        return False


TINY_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>"
    "{% endfor %}<|im_start|>"
)


def build_tiny(seed: int = 0, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Policy:
    """A Qwen2-VL of 0.63 million random weights whose words are those of the drawn tasks; 8-pixel patches."""
    special = "endoftext im_start im_end vision_start vision_end image_pad video_pad".split()
    tags = [f"<{end}{tag}>" for tag in (TAGS.perception, TAGS.reasoning, TAGS.answer) for end in ("", "/")]
    words = "What color is at How many More or more plus no so same".split()
    words = [*COLORS, *SHAPES, *CELLS, *"0123456789", *words]
    special = [*(f"<|{name}|>" for name in special), "<unk>"]
    vocabulary = [*special, *tags, *words, *("Ġ" + word for word in words), *",.?", "Ċ", "Ġ"]
    ids = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    cut = pre_tokenizers.Split(Regex(r"</?[a-z]+>| ?[A-Za-z0-9]+|\s|[^\sA-Za-z0-9]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=TINY_TEMPLATE, clean_up_tokenization_spaces=False,
        eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<unk>",
    )  # fmt: skip
    spread = {"initializer_range": 0.08}  # about 1 / sqrt(hidden_size); the usual 0.02 is for wide models
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 6, 6]}
    text = {"vocab_size": len(ids), "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    text |= {"bos_token_id": None, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    vision = {"depth": 1, "embed_dim": 64, "hidden_size": 128, "num_heads": 4, "patch_size": 8}
    config = transformers.Qwen2VLConfig(
        text_config=text | spread | {"rope_parameters": rope}, vision_config=vision | spread,
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True, instruction="", **spread,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.Qwen2VLForConditionalGeneration(config)
    eyes = Qwen2VLImageProcessorPil(patch_size=8, size={"shortest_edge": 16**2, "longest_edge": 96**2})
    return Policy(model.to(device), tokenizer, eyes, dtype=dtype)
