"""Make walkthrough.ipynb from walkthrough.py: convert, execute, write with outputs.

    pip install jupytext nbclient ipykernel matplotlib scipy
    python extras/notebook.py            writes extras/walkthrough.ipynb
    python extras/notebook.py --check    writes nothing: fails where a cell fails, or where the
                                         notebook there has other sources than walkthrough.py

The same sources give the same file on one machine: no times and no random names are kept.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "walkthrough.py"
NOTEBOOK = HERE / "walkthrough.ipynb"
NEEDED = "pip install jupytext nbclient ipykernel matplotlib scipy"
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def converted():
    """The notebook without outputs."""
    import jupytext

    notebook = jupytext.read(SOURCE)
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i:02}"  # else they are random
        cell.metadata = {}
    notebook.metadata = {"kernelspec": KERNEL}
    return notebook


def execute(notebook, timeout: int = 600) -> None:
    """Run all cells, in the folder of the notebook; the outputs are put into it.

    Raises RuntimeError with the message of the first cell that fails.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    where = {"metadata": {"path": str(HERE)}}
    once = {"record_timing": False, "coalesce_streams": True}  # the same text whatever the speed
    client = NotebookClient(notebook, timeout=timeout, resources=where, **once)
    try:
        client.execute()
    except CellExecutionError as error:
        failed = f"{error.ename}: {error.evalue}"
        raise RuntimeError(f"{SOURCE.name}: a cell fails: {failed}") from None
    notebook.metadata = {"kernelspec": KERNEL}  # without the version of Python


def sources(notebook) -> list[tuple[str, str]]:
    """Kind and text of each cell."""
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    try:
        import ipykernel  # noqa: F401
        import matplotlib  # noqa: F401
        import nbformat
        import scipy  # noqa: F401

        notebook = converted()
        if args.check and sources(notebook) != sources(nbformat.read(NOTEBOOK, as_version=4)):
            raise RuntimeError(f"{NOTEBOOK} has other sources than {SOURCE.name}: make it again")
        execute(notebook)
        if not args.check:
            nbformat.write(notebook, NOTEBOOK)
            print(NOTEBOOK)
        return 0
    except ImportError as error:
        print(f"error: {error.name} is missing: {NEEDED}", file=sys.stderr)
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
