"""A cold start: a model imitates demonstrations until it writes the three blocks.

    python extras/cold_start.py --model Qwen/Qwen2-VL-2B-Instruct --out cold
    python train.py --model cold                 SRPO from there
    python train.py --model cold --algo grpo     and the baseline, from the same start

It imitates perfect responses to a drawn task, or with --demonstrations FILE your own rows: those of
--data with a `response`. Rows with an image that train.py holds out of --data are not shown.

Every ten steps it samples 16 responses and ends when all of them have the form. With
--train-vision it makes all its steps: a vision tower is to learn more than the form.
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
from data import InputError  # noqa: E402

# Options of train.py that have a part here.
OPTIONS = "--model --data --system --task --lora --prompts --max-new-tokens --train-vision --seed"
OPTIONS += " --temperature --micro-batch --max-pixels --recompute --device --dtype --image-size"


def options(argv: list[str] | None) -> tuple[argparse.Namespace, argparse.Namespace]:
    """Those of this script, and those of train.py."""
    parser = train.Parser(
        allow_abbrev=False,
        description="A model imitates demonstrations until it writes the three blocks.",
        epilog=f"And of train.py: {OPTIONS}",
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
    if mine.lr is None:
        mine.lr = 2e-4 if args.lora else 5e-5
    args.warmup_steps = mine.steps
    args.warmup_lr = mine.lr
    args.warmup_noise = 0.0
    args.eval_temperature = args.temperature  # the form is looked for as training will sample
    return mine, args


def read_demonstrations(path: str | None, task, args):
    """The task to imitate: rows of a file, all with a response, or the drawn one.

    The drawn one also beside --data, whose rows need not show a response.
    """
    if path is None:
        return train.drawn_task(args)
    rows = {"system": args.system, "held_out": task.held_out}
    demonstrations = data.OwnTask(path, args.seed, **rows)
    for _, example in demonstrations.train_rows:
        if not example.response:
            raise InputError(f"{example.source}: needs a response, to be imitated")
    return demonstrations


def count_with_form(policy, task, args, step: int) -> int:
    """How many of 16 sampled responses to training examples have the form."""
    examples = task.train_batch(step, 16)
    record = train.evaluate(policy, examples, data.verify, args, step)
    return round(16 * record["eval"]["format"])


def make(argv: list[str] | None) -> None:
    transformers.utils.logging.disable_progress_bar()
    mine, args = options(argv)
    out = Path(mine.out)
    if any(out.glob("*")):
        raise InputError(f"--out {out}: not empty; give a new folder")
    task = train.build_task(args)
    demonstrations = read_demonstrations(mine.demonstrations, task, args)
    policy = train.load_policy(args, args.model)
    parameters = train.trainable(policy, args)
    train.check_prompts(policy, task, args)
    for step in train.imitate(policy, parameters, demonstrations, args.prompts, args):
        last = step == mine.steps
        if not last and (step % 10 != 0 or args.train_vision):
            continue
        formed = count_with_form(policy, task, args, step)
        said = f"step {step}: {formed} of 16 sampled responses have the form"
        if last and formed < 8:
            said += "; raise --steps, --lr, or --max-new-tokens if they are cut off"
        tqdm.write(said, file=sys.stderr)
        if formed == 16:
            break
    train.write_folder(out, policy.save)
    print(f"go on with: python train.py --model {out}")


def main(argv: list[str] | None = None) -> int:
    return exit_code(make, argv, "stopped; nothing was kept")


if __name__ == "__main__":
    sys.exit(main())
