"""A cold start: a model imitates demonstrations until it writes the three blocks.

    python extras/cold_start.py --model Qwen/Qwen2-VL-2B-Instruct --out cold
    python train.py --model cold                 SRPO from there
    python train.py --model cold --algo grpo     and the baseline, from the same start

It imitates perfect responses to a drawn task, or your own: --demonstrations FILE has rows as for
--data, each with a `response`, too. Give --data as well if you train on another file: rows with an
image that train.py will hold out of it, byte by byte, are not shown.

Every ten steps it samples 16 responses, and ends when all of them have the form. With
--train-vision it makes all its steps: a vision tower is to learn more than the form. Ctrl-C keeps
nothing.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import credit  # noqa: E402
import transformers  # noqa: E402
from script import exit_code  # noqa: E402
from tqdm import tqdm  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402
from data import InputError, blame  # noqa: E402

# Options of train.py that have a part here.
OPTIONS = "--model --data --system --task --lora --prompts --max-new-tokens --train-vision --seed"
OPTIONS += " --temperature --micro-batch --max-pixels --recompute --device --dtype --image-size"


def options(argv: list[str] | None) -> tuple[argparse.Namespace, argparse.Namespace]:
    """Those of this script, and those of train.py."""
    parser = train.Parser(
        allow_abbrev=False,
        description="A model imitates demonstrations until it writes the three blocks.",
        epilog=f"And of train.py, whose --help explains them: {OPTIONS}",
    )
    positive = train.number(float, 1e-12, 1e12)
    count = train.number(int, 1, 10**6)
    file = train.filled
    add = parser.add_argument
    add("--out", type=file, required=True, help="folder of the model, new or empty", metavar="DIR")
    add("--demonstrations", type=file, help="your own rows, with a response", metavar="FILE")
    add("--steps", type=count, default=100, help="at most this many (default: 100)")
    add("--lr", type=positive, help="learning rate (default: 5e-5, with adapters 2e-4)")
    mine, others = parser.parse_known_args(argv)
    args = credit.resolve_options(others, OPTIONS, "cold_start.py")
    if args.model == "tiny":
        raise InputError("--model: give a folder or a hub name; train.py warms the tiny one up")
    if mine.lr is None:
        mine.lr = 2e-4 if args.lora else 5e-5
    args.warmup_steps = mine.steps
    args.warmup_lr = mine.lr
    args.warmup_noise = 0.0
    args.eval_temperature = args.temperature  # the form is looked for as training will sample
    return mine, args


def claim(path: str) -> Path:
    """The folder to write to, made now: what cannot be written is said before the first step."""
    folder = Path(path)
    with blame(f"--out {folder}: cannot be used"):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InputError(f"--out {folder}: not empty; give a new folder")
        if folder.is_mount():
            raise InputError(f"--out {folder}: cannot be replaced; give a folder inside it")
    return folder.resolve()


def read_tasks(path: str | None, args) -> tuple:
    """What is imitated, and what the form is looked for in.

    Without rows of your own the drawn task is imitated, also beside --data, whose rows need not
    show a response.
    """
    asked = train.build_task(args)
    if path is None:
        return train.drawn_task(args), asked
    rows = {"system": args.system}
    if args.data:
        rows["held_out"] = asked.held_out
    demonstrations = data.OwnTask(path, args.seed, **rows)
    for _, example in demonstrations.train_rows:
        if not example.response:
            raise InputError(f"{example.source}: needs a response, to be imitated")
    if not args.data:
        asked = demonstrations
    return demonstrations, asked


def check_lengths(policy, demonstrations, args) -> None:
    """InputError where a demonstration is longer than what the model may write."""
    if isinstance(demonstrations, data.DrawnTask):
        return
    for _, example in demonstrations.train_rows:
        length = len(policy.tokenizer(example.response)["input_ids"]) + 1  # and EOS
        if length > args.max_new_tokens:
            said = f"the response has {length} tokens; raise --max-new-tokens {args.max_new_tokens}"
            raise InputError(f"{example.source}: {said}")


def count_with_form(policy, task, args, step: int) -> int:
    """How many of 16 sampled responses to training examples have the form."""
    examples = task.train_batch(step, 16)
    record = train.evaluate(policy, examples, data.verify, args, step)
    return round(16 * record["eval"]["format"])


def make(argv: list[str] | None) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    mine, args = options(argv)
    out = claim(mine.out)
    demonstrations, asked = read_tasks(mine.demonstrations, args)
    policy = train.load_policy(args, args.model)
    parameters = train.trainable(policy, args)
    train.check_prompts(policy, [*asked.prompts, *demonstrations.prompts], args)
    check_lengths(policy, demonstrations, args)
    for step in train.imitate(policy, parameters, demonstrations, args.prompts, args):
        last = step == mine.steps
        if not last and step % 10 != 0:
            continue
        formed = count_with_form(policy, asked, args, step)
        said = f"step {step}: {formed} of 16 sampled responses have the form"
        if last and formed < 8:
            said += "; raise --steps, --lr, or --max-new-tokens if they are cut off"
        tqdm.write(said, file=sys.stderr)
        if formed == 16 and not args.train_vision:
            break
    train.write_folder(out, policy.save)
    same = "with the same --data or --task, --system, --image-size and --max-new-tokens"
    print(f"go on {same}: python train.py --model {mine.out}")


def main(argv: list[str] | None = None) -> int:
    return exit_code(make, argv, "stopped; nothing was kept")


if __name__ == "__main__":
    sys.exit(main())
