"""Live curves: what `--log` takes. Each function starts a logger for a run and returns (numbers, step) -> None.

python train.py --log extras/loggers.py:wandb          or tensorboard, trackio
"""

import os

from data import InputError


def tensorboard(folder, options: dict):
    """Needs pip install tensorboard; then tensorboard --logdir out"""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--log: not installed; pip install tensorboard") from None
    board = SummaryWriter(folder)

    def send(numbers: dict, step: int) -> None:
        for name, x in numbers.items():
            board.add_scalar(name, x, step)

    return send


def wandb(folder, options: dict):
    """Needs pip install wandb. A resumed run goes on in the same curves."""
    try:
        import wandb as tracker
    except ImportError:
        raise InputError("--log: not installed; pip install wandb") from None
    os.environ["WANDB_RUN_ID"] = folder.name
    return started(tracker, folder, options)


def trackio(folder, options: dict):
    """Needs pip install trackio. A resumed run goes on in the same curves."""
    try:
        import trackio as tracker
    except ImportError:
        raise InputError("--log: not installed; pip install trackio") from None
    return started(tracker, folder, options)


def started(tracker, folder, options: dict):
    tracker.init(project="srpo", name=folder.name, config=options, resume="allow")

    def send(numbers: dict, step: int) -> None:
        tracker.log(numbers, step=step)

    return send
