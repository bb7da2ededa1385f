"""What scripts here share: a fault that the user can put right is one line and exit code 2."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import InputError, is_out_of_memory  # noqa: E402


def exit_code(work: Callable, argv: list[str] | None, stopped: str = "stopped") -> int:
    """The exit code of work(argv), whatever happens to it; `stopped` is said after Ctrl-C."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not have all characters
    try:
        work(argv)
        return 0
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # nobody reads the output to its end, as with | head
        return 0
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print("error: out of memory: ask for less at a time", file=sys.stderr)
        return 2
    finally:
        settle_stdout()


def settle_stdout() -> None:
    """Write what was printed; where that fails, drop it, or it would fail again at the exit."""
    if sys.stdout is None:  # closed before the start
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def in_one_line(error: BaseException) -> str:
    """Its message, and its type where that is not for users."""
    message = " ".join(str(error).split())
    if isinstance(error, InputError):
        return message
    return f"{type(error).__name__}, {message[:200]}".removesuffix(", ")
