"""A step of TRL's GRPOTrainer on a model of bench.py, for comparison. pip install trl==1.16.0"""

import sys
import tempfile
import time

if __name__ == "__main__":
    print("error: no script: python extras/bench.py --conditions trl-grpo", file=sys.stderr)
    sys.exit(2)

import numpy as np
import torch
import transformers

import model


def run(folder: str, examples: list, prompts: int, group_size: int, new_tokens: int, device: str):
    """Seconds of the phases of each step: generate, score, update. A step takes `prompts` examples.

    The trainer is as it comes, less what would slow it down: gradient checkpointing and logging.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    policy = model.load(folder)
    net = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    net.model.visual.requires_grad_(False)  # as train.py leaves it
    rng = np.random.default_rng(0)
    clock = []
    seconds_of_generate = []
    phases = []

    class Timed(GRPOTrainer):
        def _generate(self, *args, **kwargs):
            start = time.perf_counter()
            result = super()._generate(*args, **kwargs)
            seconds_of_generate.append(time.perf_counter() - start)
            return result

        def _generate_and_score_completions(self, *args, **kwargs):
            clock.append(time.perf_counter())
            result = super()._generate_and_score_completions(*args, **kwargs)
            clock.append(time.perf_counter())
            return result

    class StepEnd(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            begin, scored = clock[-2:]
            generate = seconds_of_generate[-1]
            update = time.perf_counter() - scored
            phases.append([generate, scored - begin - generate, update])

    def reward(completions, **_):
        return rng.random(len(completions)).tolist()

    rows = []
    for example in examples:
        prompt = [{"role": "user", "content": example.question}]
        rows.append({"prompt": prompt, "image": example.images[0]})
    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            out,
            per_device_train_batch_size=prompts * group_size,
            num_generations=group_size,
            max_steps=len(examples) // prompts,
            max_completion_length=new_tokens,
            temperature=1.0,
            learning_rate=1e-6,
            beta=0.0,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=device == "cpu",
            report_to=[],
            save_strategy="no",
            logging_steps=10**6,
            disable_tqdm=True,
            seed=0,
        )
        more = {"processing_class": Processor(policy), "callbacks": [StepEnd()]}
        Timed(net, reward, config, Dataset.from_list(rows), **more).train()
    return phases


class Processor(transformers.ProcessorMixin):
    """What GRPOTrainer asks of a Qwen2-VL processor. The video part would need torchvision."""

    def __init__(self, policy: model.Policy):
        self.policy = policy
        self.tokenizer = policy.tokenizer
        self.image_processor = policy.image_processor
        self.chat_template = policy.tokenizer.chat_template

    def apply_chat_template(
        self, conversation, tokenize=False, return_dict=False, add_generation_prompt=True, **_
    ):
        is_single = isinstance(conversation[0], dict)
        conversations = conversation
        if is_single:
            conversations = [conversation]
        options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        texts = [self.tokenizer.apply_chat_template(c, **options) for c in conversations]
        if tokenize:
            return self(images=[images_of(c) for c in conversations], text=texts)
        if is_single:
            return texts[0]
        return texts

    def __call__(self, images=None, text=None, padding=False, return_tensors=None, **_):
        pictures = [image for row in images for image in row]
        vision = self.image_processor(pictures, return_tensors="pt")
        sizes = vision["image_grid_thw"].prod(1) // self.image_processor.merge_size**2
        sizes = sizes.tolist()  # visual tokens of each image, in their order
        image_token = self.policy.image_token
        rows = []
        for ids in self.tokenizer(text, add_special_tokens=False)["input_ids"]:
            row = []
            for token in ids:
                if token == image_token:
                    row += [token] * sizes.pop(0)
                else:
                    row.append(token)
            rows.append(row)
        fields = {"input_ids": rows}
        fields["attention_mask"] = [[1] * len(row) for row in rows]
        fields["mm_token_type_ids"] = [[int(x == image_token) for x in row] for row in rows]
        if return_tensors:
            filler = {"input_ids": self.policy.pad}
            for name, values in fields.items():
                fields[name] = padded_left(values, filler.get(name, 0))
        return {**fields, **vision}

    def batch_decode(self, *args, **kwargs):
        return self.tokenizer.batch_decode(*args, **kwargs)

    def save_pretrained(self, *args, **kwargs):
        pass


def images_of(conversation: list[dict]) -> list:
    images = []
    for turn in conversation:
        images += [part["image"] for part in turn["content"] if part["type"] == "image"]
    return images


def padded_left(rows: list[list[int]], filler: int) -> torch.Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([[filler] * (longest - len(row)) + row for row in rows])
