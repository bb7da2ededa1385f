"""One HTML page about runs of train.py: learning curves, and responses with every token's credit.

    pip install matplotlib
    python extras/report.py out/tiny-srpo-seed0 out/tiny-grpo-seed0     writes report.html there
    python extras/report.py out/study/count-*-seed*      runs of different seeds share a band
    python extras/report.py RUN_DIR --png credit.png     also one response, as a picture
    python extras/report.py RUN_DIR ... --curves curves.png  also the curves, or .svg

The responses are sampled for the page: of each kind of run the last checkpoint of the first one
answers the questions that would come next, and is given credit as in training. The page is one file
that needs no network. Perception tokens are blue with a solid line under them, reasoning tokens
orange with a dotted one; the darker a token, the larger its weight, which stands under it. Touch a
token, or point at it, for its other numbers.
"""

import base64
import io
import os
import sys
from dataclasses import asdict
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import charts  # noqa: E402
import credit  # noqa: E402
import pictures  # noqa: E402
from PIL import Image  # noqa: E402

import train  # noqa: E402
from data import InputError, first_line  # noqa: E402
from srpo import Role, shared_baseline  # noqa: E402

GROUPS = 2  # of a kind of run
BATCHES = 10  # that are looked at for a group whose rewards differ


# ---- runs and responses


def read_run(folder: Path) -> dict:
    """Options and records of one run."""
    args = credit.read_options(folder)
    try:
        records = train.Run(folder).log()
        for record in records:
            check(record)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: its metrics.jsonl is damaged ({error})") from None
    return {"name": folder.name, "path": folder, "args": args, "records": records}


def check(record) -> None:
    """ValueError where it is not one that train.py writes."""
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError(f"a record without its step: {str(record)[:40]}")
    figures = record.get("eval", record)
    if not isinstance(figures, dict):
        raise ValueError(f"step {record['step']}: an evaluation without figures")
    for name, value in figures.items():
        if value is not None and not isinstance(value, int | float | list):
            raise ValueError(f"step {record['step']}: {name} is not a number: {value!r}")


def sample_groups(folder: Path) -> list[dict]:
    """Groups of responses, as the page shows them.

    They are the first with a spread of rewards after the last checkpoint, answered by its policy.
    What is not measured is None: contrasts under GRPO, and where A = 0.
    """
    args, policy, done = credit.finished(folder)
    task = train.build_task(args)
    groups = []
    for step in range(done + 1, done + 1 + BATCHES):
        examples = task.train_batch(step - 1, args.prompts)
        batch = credit.sample(policy, examples, args, step)
        has_spread = batch.A.view(-1, args.group_size).any(dim=1)  # [N]
        chosen = has_spread.nonzero()[: GROUPS - len(groups), 0].tolist()
        if chosen:
            found = credit.credit(policy, batch, args, step)
            corrupted = train.corrupted_copies(examples, policy, args, step)
            for g in chosen:
                group = group_shown(policy, batch, found, g, args)
                if args.algo == "srpo":
                    group["corrupted"] = [png(image) for image in corrupted[g].images]
                groups.append({"step": done, **group})
        if len(groups) == GROUPS:
            break
    if not groups:
        said = f"in the next {BATCHES} batches no group has a spread of rewards"
        raise InputError(f"{folder}: {said}, so there is no credit to show")
    return groups


def group_shown(policy, batch: credit.Batch, found: credit.Credit, g: int, args) -> dict:
    """The g-th prompt and its responses, without corrupted images."""
    example = batch.examples[g]
    rows = range(g * args.group_size, (g + 1) * args.group_size)
    return {
        "question": example.question,
        "answer": example.answer,
        "images": [png(policy.fit(image)) for image in example.images],
        "corrupted": [],
        "responses": [as_shown(batch, found, row, args) for row in rows],
    }


def as_shown(batch: credit.Batch, found: credit.Credit, row: int, args) -> dict:
    """One response, token by token."""
    text, offsets = batch.responses[row]
    mask = batch.rollout.mask[row]
    A = batch.A[row].item()
    shown = {"text": text, "offsets": offsets, "advantage": A, **asdict(batch.verdicts[row])}
    shown["roles"] = batch.roles[row][mask].tolist()
    shown["weights"] = found.w[row][mask].tolist()
    shown["advantages"] = found.A_hat[row][mask].tolist()
    shown["delta"] = None
    shown["baseline"] = None
    if args.algo == "srpo" and A != 0:
        shown["delta"] = found.delta[row][mask].tolist()
        shown["baseline"] = shared_baseline(found.delta, batch.roles)[row].item()
    return shown


def png(image: Image.Image) -> str:
    """Bytes of the picture as text, no larger than is needed to look at it."""
    small = image.copy()
    small.thumbnail((448, 448))
    file = io.BytesIO()
    small.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def add_groups(runs: list[dict]) -> None:
    """Responses of the first run of each kind that has a checkpoint; else why there are none."""
    for members in charts.label_runs(runs).values():
        for run in members:
            try:
                run["groups"] = sample_groups(run["path"])
                break
            except InputError as error:
                run["missing"] = str(error)
            except (TypeError, KeyError, ValueError) as error:  # options changed by hand
                said = f"its args.json does not hold the options of a run ({first_line(error)})"
                run["missing"] = f"{run['path']}: {said}"


# ---- credit, as HTML


def verdict(response: dict) -> str:
    said = "wrong"
    if response["accuracy"]:
        said = "right"
        if response.get("grounded") == 1:
            said += ", grounded"
        elif response.get("grounded") == 0:
            said += " for the wrong reason"
    if not response["format"]:
        said += ", malformed"
    return said


def token_html(response: dict, t: int, text: str) -> str:
    """A token with its weight under it. Where the text breaks the line, so does the page."""
    role = Role(response["roles"][t])
    weight = response["weights"][t]
    tip = f"{role.name.capitalize()}: w {weight:.2f}, Â {response['advantages'][t]:+.2f}"
    style = ""
    under = ""
    if role != Role.OTHER:
        style = f' style="--s:{100 * pictures.strength(weight):.0f}%"'
        under = f"<small>{weight:.2f}</small>"
        if response["delta"] is not None:
            tip += f", Δ {response['delta'][t]:+.2f}"
    shown = escape(text).replace("\n", "↵")
    if shown == "":
        shown = "·"
    attributes = f'class="{role.name.lower()}" tabindex="0" data-tip="{escape(tip)}"{style}'
    breaks = "\n" * text.count("\n")
    return f"<span {attributes}>{shown}{under}</span>{breaks}"


def response_html(response: dict) -> str:
    mark = "✗"
    if response["accuracy"]:
        mark = "✓"
    told = f"reward {response['reward']:.2f}, A {response['advantage']:+.2f}"
    if response["baseline"] is not None:
        told += f", b {response['baseline']:+.2f}"
    head = f"<b>{mark} {escape(verdict(response))}</b> {escape(told)}"
    count = len(response["weights"])
    texts = pictures.token_texts(response["text"], response["offsets"], count)
    spans = "".join(token_html(response, t, text) for t, text in enumerate(texts))
    return f'<div class="r"><p>{head}</p><pre>{spans}</pre></div>'


def group_html(group: dict) -> str:
    shown = ""
    for kind, caption in (("images", "original"), ("corrupted", "corrupted")):
        for data in group[kind]:
            base64.b64decode(data, validate=True)  # nothing but a picture enters the attribute
            picture = f'<img alt="{caption} image" src="data:image/png;base64,{data}">'
            shown += f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"
    question = f"step {int(group['step'])}: {group['question']} (answer: {group['answer']})"
    head = f'<h4>{escape(question)}</h4><div class="pics">{shown}</div>'
    responses = "".join(response_html(response) for response in group["responses"])
    return f'<section class="group">{head}{responses}</section>'


# ---- the page

CSS = """
body{margin:0 auto;max-width:1000px;padding:12px;background:#fff;color:#1b1b1b}
body{font:15px/1.45 system-ui,sans-serif}
h1{font-size:1.4em}
h4{margin:.6em 0 .3em}
summary{cursor:pointer;font-weight:bold}
.charts svg{width:100%;height:auto}
.group{border-top:1px solid #ddd;padding-bottom:10px}
.pics{display:flex;flex-wrap:wrap;gap:10px}
figure{margin:0}
figcaption{color:#666;font-size:12px}
img{width:144px;max-width:45vw;image-rendering:pixelated;border:1px solid #ddd}
.r{margin:8px 0}
.r p{margin:0;font-size:13px}
pre{margin:4px 0;white-space:pre-wrap;overflow-wrap:anywhere}
pre{font:14px/1.5 ui-monospace,monospace}
pre span{position:relative;display:inline-block;vertical-align:top;margin:0 1px 3px 0}
small{display:block;text-align:center;font-size:10px;line-height:1.3;background:#fff;padding:0 3px}
.other{color:#666}
pre span:hover::after,pre span:focus::after{
content:attr(data-tip);position:absolute;left:0;top:2.6em;z-index:9;white-space:pre;
padding:2px 7px;border-radius:4px;background:#222;color:#fff;font:12px/1.5 system-ui,sans-serif}
"""
for role, shape in ((Role.PERCEPTION, "solid"), (Role.REASONING, "dotted")):
    color = pictures.COLORS[role]
    mixed = f"color-mix(in srgb,{color} calc(var(--s)*.75),white)"
    CSS += f".{role.name.lower()}{{background:{mixed}}}\n"
    CSS += f".{role.name.lower()} small{{border-top:2px {shape} {color}}}\n"
HEAD = (
    '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    f"<title>SRPO report</title><style>{CSS}</style>"
)
EXPLAINED = (
    '<h2>Credit, token by token</h2><p><span class="perception" style="--s:50%">perception</span> '
    'and <span class="reasoning" style="--s:50%">reasoning</span> tokens are darker the larger '
    "their weight w, which stands under them; all others have weight 1. Point at a token, or touch "
    "it, for its contrast Δ and advantage Â. A is the response's advantage, b its baseline.</p>"
)


def page(runs: list[dict]) -> str:
    """The whole report as HTML. Everything that came from a run is escaped."""
    labelled = charts.label_runs(runs)
    body = [f"<h1>SRPO: {charts.count(runs)}</h1>"]
    if len(runs) > len(labelled):
        said = "Lines are means over seeds, and bands a standard error of the mean."
        said += " Beside GRPO there are no bands, but a row of paired differences to it below."
        body.append(f"<p>{said}</p>")
    curves = charts.figure_of(labelled, charts.EVALS + charts.STEPS)
    body.append(f'<div class="charts">{charts.svg(curves)}</div>{EXPLAINED}')
    is_open = ""
    if len(labelled) < 4:
        is_open = " open"
    for label, members in labelled.items():
        for run in members:
            if "groups" in run:
                groups = "".join(group_html(group) for group in run["groups"])
                name = f"<summary>{escape(label)}, {escape(run['name'])}</summary>"
                body.append(f"<details{is_open}>{name}{groups}</details>")
        if all("missing" in run for run in members):
            body.append(f"<p>No responses: {escape(members[0]['missing'])}</p>")
    content = f"<head>{HEAD}</head><body>{''.join(body)}</body>"
    return f'<!doctype html><html lang="en">{content}</html>\n'


# ---- a picture


def credit_picture(group: dict, response: dict) -> pictures.Figure:
    """A response with the weight and the contrast of each token, and its two images beside it."""
    texts = pictures.token_texts(response["text"], response["offsets"], len(response["weights"]))
    tokens = []
    for t, text in enumerate(texts):
        token = pictures.Token(text, Role(response["roles"][t]))
        if token.role != Role.OTHER:
            token.shade = pictures.strength(response["weights"][t])
            token.numbers = (f"{response['weights'][t]:.2f}",)
            if response["delta"] is not None:
                token.numbers += (f"{round(response['delta'][t], 1) + 0.0:+.1f}",)  # no -0.0
        tokens.append(token)
    columns = 98
    side = 1.2  # of an image, in inches
    left = side + 0.3
    top = 0.85
    width = left + columns * pictures.COLUMN + 0.1
    height = max(2 * side + 0.55, top + pictures.tokens_height(tokens, columns))
    figure = pictures.Figure((width, height), dpi=170)
    y = 0.08
    for kind, caption in (("images", "original"), ("corrupted", "corrupted")):
        for data in group[kind][:1]:
            image = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
            place = (0.08 / width, 1 - (y + side) / height, side / width, side / height)
            axes = figure.add_axes(place)
            axes.imshow(image, interpolation="nearest")
            axes.set_axis_off()
            figure.text(0.08 / width, 1 - (y + side + 0.13) / height, caption, va="center")
            y += side + 0.26
    axes = pictures.draw_tokens(figure, tokens, columns, left, top)
    pictures.role_legend(axes)
    question = " ".join(group["question"].split())[:60]
    asked = f"{question}  (answer: {group['answer'][:20]})"
    told = f"{verdict(response)}; advantage {response['advantage']:+.2f}."
    under = "Under each token: its weight"
    if response["delta"] is not None:
        under += f", and its contrast in nats (their mean is {response['baseline']:+.1f})"
    plain = {"va": "center", "parse_math": False}
    figure.text(left / width, 1 - 0.2 / height, asked, fontsize=13, fontweight="bold", **plain)
    figure.text(left / width, 1 - 0.43 / height, told, color="#333333", **plain)
    figure.text(left / width, 1 - 0.63 / height, under, color="#333333", **plain)
    return figure


def pick(run: dict) -> tuple[dict, dict]:
    """The most telling response: right, for the right reason, of widely spread weights."""

    def telling(pair):
        _, response = pair
        grounded = response["grounded"]
        if grounded is None:
            grounded = 0.0
        spread = max(response["weights"]) - min(response["weights"])
        return (response["accuracy"], grounded, spread)

    pairs = []
    for group in run["groups"]:
        for response in group["responses"]:
            pairs.append((group, response))
    return max(pairs, key=telling)


def main(argv: list[str] | None = None) -> int:
    parser = train.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folders of runs of train.py")
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="the page (default: report.html in the first folder)",
    )
    add("--png", type=Path, metavar="FILE", help="also a response of the first run, as a picture")
    add("--curves", type=Path, metavar="FILE", help="also those of accuracy and grounding")
    args = parser.parse_args(argv)
    out = args.out
    if out is None:
        out = args.runs[0] / "report.html"
    here = Path.cwd()
    try:
        runs = [read_run(here / folder) for folder in args.runs]
        add_groups(runs)
        os.chdir(here)
        out.write_text(page(runs), encoding="utf-8")
        if args.curves:
            curves = charts.figure_of(charts.label_runs(runs), charts.SHOWN)
            curves.savefig(args.curves, dpi=150)
        if args.png:
            if "missing" in runs[0]:
                raise InputError(runs[0]["missing"])
            credit_picture(*pick(runs[0])).savefig(args.png)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:  # ValueError: a picture of an unknown kind
        print(f"error: cannot be written: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
