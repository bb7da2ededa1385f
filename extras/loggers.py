"""Live curves: what `--log` takes, a function for each place where the metrics can go, too.

    python train.py --log extras/loggers.py:wandb          or tensorboard, trackio

Each starts a log for the run in `folder` and returns a function (numbers, step) that sends to it. A
resumed run goes on in the same curves. Whatever goes wrong at the start, and these packages fail in
many ways, is one line; what goes wrong later is said by train.py, which goes on without the log.
"""

import functools
import importlib.util
import os
import secrets
import sys
from pathlib import Path

if __name__ == "__main__":
    print("error: no script: python train.py --log extras/loggers.py:wandb", file=sys.stderr)
    sys.exit(2)

from script import in_one_line

from data import InputError

WAYS_OUT = {
    "tensorboard": "pip install -U tensorboard",
    "wandb": "wandb login, or WANDB_MODE=offline, or pip install -U wandb",
    "trackio": "another TRACKIO_DIR, _SERVER_URL or _SPACE_ID, or pip install -U trackio",
}


def logger(start):
    """The function `start`, named as its package; InputError whatever goes wrong in it."""
    package = start.__name__

    @functools.wraps(start)
    def started(folder: Path, options: dict):
        place = f"--log extras/loggers.py:{package}"
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:  # a folder of that name is no package
            raise InputError(f"{place}: not installed; pip install {package}")
        try:
            return start(Path(folder), options)
        except (Exception, SystemExit) as error:
            said = f"cannot start ({in_one_line(error)})"
            raise InputError(f"{place}: {said}; try {WAYS_OUT[package]}") from None

    return started


@logger
def tensorboard(folder: Path, options: dict):
    """pip install tensorboard; watch with: tensorboard --logdir out"""
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(folder)

    def send(numbers: dict, step: int) -> None:
        for name, x in numbers.items():
            board.add_scalar(name, x, step)
        board.flush()

    return send


@logger
def wandb(folder: Path, options: dict):
    """pip install wandb"""
    import wandb as tracker

    names = {"project": "srpo", "name": folder.name, "id": own_id(folder)}
    tracker.init(**names, config=options, resume="allow")

    def send(numbers: dict, step: int) -> None:
        tracker.log(numbers, step=step)

    return send


@logger
def trackio(folder: Path, options: dict):
    """pip install trackio"""
    import trackio as tracker

    if "TRACKIO_DIR" in os.environ:  # trackio only warns where it cannot write
        Path(os.environ["TRACKIO_DIR"]).mkdir(parents=True, exist_ok=True)
    name = f"{folder.name}-{own_id(folder)}"
    tracker.init(project="srpo", name=name, config=options, resume="allow")

    def send(numbers: dict, step: int) -> None:
        tracker.log(numbers, step=step)

    return send


def own_id(folder: Path) -> str:
    """The run's own, kept in its folder: a run elsewhere may have a folder of the same name, and
    would go on in its curves."""
    file = folder / "log-id"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(secrets.token_hex(4))
    return file.read_text()
