"""A data set of the Hugging Face hub as JSON lines and images, which `train.py --data` reads.

    pip install datasets
    python extras/from_hub.py hiyouga/geometry3k geometry3k     rows.jsonl and images/ in geometry3k/
    python extras/from_hub.py FOLDER DIR --split test           a folder that `datasets` wrote

Columns may have the names in use: image or images; problem or question; answer or solution. Of a worked
solution the last \\boxed{...}, or what stands between <answer> tags, is the answer. Images keep their bytes.
"""

import io
import json
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from PIL import Image  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data import InputError, first_line, unboxed  # noqa: E402
from train import Parser  # noqa: E402


def load(name: str, split: str):
    """Rows of a data set whose images are not decoded, and the names of the three columns."""
    try:
        import datasets
    except ImportError:
        raise InputError("from_hub.py needs datasets: pip install datasets") from None
    try:
        if any((Path(name) / file).exists() for file in ("state.json", "dataset_dict.json")):
            rows = datasets.load_from_disk(name)
            rows = rows[split] if isinstance(rows, datasets.DatasetDict) else rows
        else:
            rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # not found, no such split, no network ...
        raise InputError(f"{name}: cannot be loaded, split {split} ({first_line(error)})") from None

    def column(*names):
        if found := [n for n in names if n in rows.column_names]:
            return found[0]
        raise InputError(f"{name}: has no column {' or '.join(names)}, only {', '.join(rows.column_names)}")

    seen, asked, told = column("images", "image"), column("problem", "question"), column("answer", "solution")
    kind, raw = rows.features[seen], datasets.Image(decode=False)
    if isinstance(kind, datasets.Image):
        rows = rows.cast_column(seen, raw)
    elif isinstance(getattr(kind, "feature", None), datasets.Image):
        rows = rows.cast_column(seen, type(kind)(raw))
    return rows, seen, asked, told


def answer_of(row: dict, told: str, source: str) -> str:
    answer = str(row[told])
    marked = "\\boxed{" in answer or "<answer>" in answer
    if told == "solution" and len(answer.split()) > 5 and not marked:
        raise InputError(
            f"{source}: the solution has no \\boxed{{...}} and no <answer>: what is right cannot be told"
        )
    return unboxed(answer.split("<answer>")[-1].split("</answer>")[0])


def write(name: str, split: str, folder: Path) -> int:
    """Fill `folder`; returns the number of rows.

    Raises:
        InputError: naming the data set, or its row.
    """
    rows, seen, asked, told = load(name, split)
    (folder / "images").mkdir(parents=True)
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for number, row in enumerate(tqdm(rows, desc=name, disable=None)):
            source, images = f"{name} row {number}", row[seen] if isinstance(row[seen], list) else [row[seen]]
            wrong = not images or None in images or not isinstance(row[asked], str)
            if wrong or isinstance(row[told], list | dict | None):
                raise InputError(
                    f"{source}: expected an image in {seen}, text in {asked}, one answer in {told}"
                )
            paths = []
            for i, image in enumerate(images):
                place = image if isinstance(image, str) else image["path"]
                content = image.get("bytes") if isinstance(image, dict) else None
                try:
                    content = content or Path(place).read_bytes()
                    suffix = Image.open(io.BytesIO(content)).format.lower()
                except Exception as error:  # decoders raise nearly anything
                    raise InputError(f"{source}: image {i} cannot be read ({first_line(error)})") from None
                paths.append(f"images/{number:06d}-{i}.{suffix}")
                (folder / paths[-1]).write_bytes(content)
            answer = answer_of(row, told, source)
            file.write(json.dumps({"images": paths, "question": row[asked], "answer": answer}) + "\n")
    return len(rows)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of a data set on the hub, or a folder that `datasets` wrote")
    parser.add_argument("dir", type=Path, help="where rows.jsonl and images/ go; new or empty")
    parser.add_argument("--split", default="train", help="of the data set (default: train)")
    args = parser.parse_args(argv)
    beside = args.dir.with_name(f"{args.dir.name}.{os.getpid()}.tmp")  # whole or not at all
    try:
        if args.dir.exists() and (not args.dir.is_dir() or any(args.dir.iterdir())):
            raise InputError(f"{args.dir}: not empty; name another folder")
        count = write(args.name, args.split, beside)
        os.replace(beside, args.dir)
        print(f"{count} rows: python train.py --data {args.dir / 'rows.jsonl'} --model ...")
        return 0
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(beside, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
