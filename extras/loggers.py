"""Live curves: what `--log` takes, a function for each place where the metrics can go, too.

    python train.py --log extras/loggers.py:wandb          or tensorboard, trackio

Each starts a log for the run in `folder` and returns a function (numbers, step) that sends to it. A
resumed run goes on in the same curves.
"""

from pathlib import Path

from data import InputError


def tensorboard(folder: Path, options: dict):
    """pip install tensorboard; watch with: tensorboard --logdir out"""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise not_installed("tensorboard") from None
    board = SummaryWriter(folder)

    def send(numbers: dict, step: int) -> None:
        for name, x in numbers.items():
            board.add_scalar(name, x, step)
        board.flush()

    return send


def wandb(folder: Path, options: dict):
    """pip install wandb"""
    try:
        import wandb as tracker
    except ImportError:
        raise not_installed("wandb") from None
    names = {"project": "srpo", "name": folder.name, "id": folder.name}
    tracker.init(**names, config=options, resume="allow")

    def send(numbers: dict, step: int) -> None:
        tracker.log(numbers, step=step)

    return send


def trackio(folder: Path, options: dict):
    """pip install trackio"""
    try:
        import trackio as tracker
    except ImportError:
        raise not_installed("trackio") from None
    tracker.init(project="srpo", name=folder.name, config=options, resume="allow")

    def send(numbers: dict, step: int) -> None:
        tracker.log(numbers, step=step)

    return send


def not_installed(package: str) -> InputError:
    return InputError(f"--log extras/loggers.py:{package}: not installed; pip install {package}")
