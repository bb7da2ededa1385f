"""A trained policy as a plain Hugging Face folder, for transformers, vLLM, or `--model`.

    python extras/merge.py out/my-run served                   the last checkpoint of a run
    python extras/merge.py out/my-run/best served --dtype bfloat16

Adapters are merged into their base model, in float32, and saved in the dtype of that model. A
checkpoint of all weights stays as it is, float32, unless --dtype is given. Images are shrunk to the
size that training saw.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import transformers  # noqa: E402

import model  # noqa: E402
import train  # noqa: E402
from data import InputError  # noqa: E402

PROCESSORS = {  # for AutoProcessor: the class, and that of its part for videos, which must be there
    "qwen2_vl": ("Qwen2VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen3_vl": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
    "qwen3_5": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
}


def find_checkpoint(path: Path) -> Path:
    """The last checkpoint of the run in `path`, or `path` itself where that is a checkpoint.

    From here on the working folder is that in which the run began: there begins the path of the
    base model, as adapters keep it.
    """
    for folder in (path, path.parent):
        if (folder / "args.json").exists():
            train.Run(folder).go_back()
            break
    if (path / "args.json").exists():
        checkpoint = train.Run(path).checkpoint()
        if checkpoint is None:
            raise InputError(f"{path}: a run without a checkpoint yet")
        return checkpoint
    for name in ("config.json", "adapter_config.json"):
        if (path / name).exists():
            return path
    raise InputError(f"{path}: no run there, and no checkpoint")


def load_merged(checkpoint: Path, dtype: str | None) -> model.Policy:
    """The policy of a checkpoint as one model, its weights in `dtype`."""
    adapters = model.adapter_config(str(checkpoint))
    if adapters is not None:
        base = adapters["base_model_name_or_path"]
        if Path(base).is_absolute() and not Path(base).is_dir():
            raise InputError(f"{checkpoint}: the base model of its adapters is gone: {base}")
    policy = model.load(str(checkpoint))  # float32, whatever it was saved in
    if adapters is not None:
        policy.model = policy.adapter.merge_and_unload()
        policy.adapter = None
        if dtype is None:
            dtype = dtype_of(base)
    if dtype is not None:
        for parameter in policy.model.parameters():
            parameter.data = parameter.data.to(getattr(torch, dtype))
    # Those of the checkpoint, which has the size of images in training.
    policy.tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    policy.image_processor = model.Qwen2VLImageProcessorPil.from_pretrained(checkpoint)
    return policy


def dtype_of(base: str) -> str:
    """In which the base model was saved."""
    dtype = transformers.AutoConfig.from_pretrained(base).dtype
    if dtype is None:
        return "float32"
    return str(dtype).removeprefix("torch.")


def write(policy: model.Policy, folder: Path) -> None:
    """All files that AutoProcessor, vLLM and `model.load` look for."""
    config = policy.model.config
    for part in (config.text_config, config.vision_config):
        part.dtype = policy.model.dtype  # else it says what the base was loaded in
    policy.save(folder)
    processor, video_processor = PROCESSORS[config.model_type]
    update_json(folder / "processor_config.json", processor_class=processor)
    update_json(folder / "tokenizer_config.json", processor_class=processor)
    images = folder / "preprocessor_config.json"
    smallest = policy.image_processor.size["shortest_edge"]
    largest = policy.image_processor.size["longest_edge"]
    # Areas; readers before transformers 4.50 know them by these names.
    update_json(images, processor_class=processor, min_pixels=smallest, max_pixels=largest)
    videos = {"video_processor_type": video_processor, "processor_class": processor}
    for name in ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std"):
        videos[name] = json.loads(images.read_text())[name]
    update_json(folder / "video_preprocessor_config.json", **videos)


def update_json(file: Path, **entries) -> None:
    """Write entries into a JSON file, beside those that it has."""
    found = {}
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
    found.update(entries)
    file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def merge(run: str, folder: str, dtype: str | None) -> None:
    out = Path(folder).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{folder}: not an empty folder; give a new one")
    checkpoint = find_checkpoint(Path(run).resolve())
    policy = load_merged(checkpoint, dtype)

    def fill(beside):
        write(policy, beside)

    train.write_folder(out, fill)
    millions = sum(x.numel() for x in policy.model.parameters()) / 1e6
    said = f"{millions:,.1f} million weights in {str(policy.model.dtype).removeprefix('torch.')}"
    area = policy.image_processor.size["longest_edge"]
    print(f"{checkpoint} -> {out}: {said}, images of at most {area:,} pixels")


def main(argv: list[str] | None = None) -> int:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    parser = train.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", help="folder of a run, or a checkpoint of it")
    parser.add_argument("folder", metavar="DIR", help="what to write: a new folder, or empty")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, help="of the weights")
    args = parser.parse_args(argv)
    try:
        merge(args.run, args.folder, args.dtype)
        return 0
    except (InputError, OSError) as error:
        said = str(error).removeprefix("--model ")  # not an option here
        print(f"error: {said}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
