"""One HTML page about runs of train.py: learning curves, and responses with every token's credit.

    python extras/report.py out/tiny-srpo-seed0 out/tiny-grpo-seed0 --out report.html
    python extras/report.py out/study/count-*-seed*      runs of different seeds share a band
    python extras/report.py RUN_DIR --png credit.png     also one response, as a picture
    python extras/report.py RUN_DIR ... --svg curves.svg     also the curves

The responses are sampled for the page: of each kind of run the last checkpoint of the first one
answers the questions that would come next, and is given credit as in training. The page is one file
that needs no network. Perception tokens are blue with a solid line under them, reasoning tokens
orange with a dotted one; the darker a token, the larger its weight. Touch a token, or point at it,
for its numbers.
"""

import argparse
import base64
import io
import math
import sys
from dataclasses import asdict
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import charts  # noqa: E402
import credit  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402

import train  # noqa: E402
from data import InputError  # noqa: E402
from srpo import Role, shared_baseline  # noqa: E402

BLUE = (0, 114, 178)
ORANGE = (213, 94, 0)


# ---- runs and responses


def read_run(folder: Path) -> dict:
    """Options and records of one run."""
    args = credit.read_options(folder)
    try:
        records = train.Run(folder).log()
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: its metrics.jsonl is damaged ({error})") from None
    return {"name": folder.name, "path": folder, "args": args, "records": records}


def sample_groups(folder: Path) -> list[dict]:
    """Two groups of responses, as the page shows them.

    They are the first with a spread of rewards in the batch after the last checkpoint, answered by
    its policy. What is not measured is None: contrasts under GRPO, and where A = 0.
    """
    args, policy, step = credit.finished(folder)
    examples = train.build_task(args).train_batch(step, args.prompts)
    batch = credit.sample(policy, examples, args, step + 1)
    found = credit.credit(policy, batch, args, step + 1)
    corrupted = []
    if args.algo == "srpo":
        corrupted = train.corrupted_copies(examples, policy, args, step + 1)
    has_spread = batch.A.view(-1, args.group_size).any(dim=1)  # [N]
    groups = []
    for g in has_spread.nonzero()[:2, 0].tolist():
        group = {"step": step, "question": examples[g].question, "answer": examples[g].answer}
        group["images"] = [png(policy.fit(image)) for image in examples[g].images]
        group["corrupted"] = []
        if corrupted:
            group["corrupted"] = [png(image) for image in corrupted[g].images]
        rows = range(g * args.group_size, (g + 1) * args.group_size)
        group["responses"] = [as_shown(batch, found, row, args) for row in rows]
        groups.append(group)
    if not groups:
        raise InputError(f"{folder}: no group of the next batch has a spread of rewards")
    return groups


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


# ---- credit, as HTML


def tokens_of(response: dict) -> list[dict]:
    """Text and numbers of each token, EOS too. A character in several tokens shows at the first."""
    tokens = []
    shown = 0  # characters so far
    for t, weight in enumerate(response["weights"]):
        text = "EOS"
        if t < len(response["offsets"]):
            start, end = response["offsets"][t]
            text = response["text"][max(start, shown) : end]
            shown = max(shown, end)
        delta = None
        if response["delta"] is not None:
            delta = response["delta"][t]
        role = Role(response["roles"][t])
        advantage = response["advantages"][t]
        token = {"text": text, "role": role, "weight": weight, "delta": delta}
        tokens.append({**token, "advantage": advantage})
    return tokens


def strength(weight: float) -> float:
    """Share of color: 0 at weight 2/3, the least there is with the default range, 1 at 3/2."""
    share = 0.5 + math.log(max(weight, 1e-9)) / math.log(1.5) / 2
    return min(1.0, max(0.0, share))


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


def token_html(token: dict) -> str:
    role = token["role"].name
    tip = f"{role.capitalize()}: w {token['weight']:.2f}, Â {token['advantage']:+.2f}"
    style = ""
    if token["role"] != Role.OTHER:
        style = f' style="--s:{100 * strength(token["weight"]):.0f}%"'
        if token["delta"] is not None:
            tip += f", Δ {token['delta']:+.2f}"
    text = escape(token["text"]).replace("\n", "↵\n")
    if text == "":
        text = "·"
    attributes = f'class="{role.lower()}" tabindex="0" data-tip="{escape(tip)}"{style}'
    return f"<span {attributes}>{text}</span>"


def response_html(response: dict) -> str:
    mark = "✗"
    if response["accuracy"]:
        mark = "✓"
    told = f"reward {response['reward']:.2f}, A {response['advantage']:+.2f}"
    if response["baseline"] is not None:
        told += f", b {response['baseline']:+.2f}"
    head = f"<b>{mark} {escape(verdict(response))}</b> {escape(told)}"
    spans = "".join(token_html(token) for token in tokens_of(response))
    return f'<div class="r"><p>{head}</p><pre>{spans}</pre></div>'


def group_html(group: dict) -> str:
    pictures = ""
    for kind, caption in (("images", "original"), ("corrupted", "corrupted")):
        for data in group[kind]:
            base64.b64decode(data, validate=True)  # nothing but a picture enters the attribute
            picture = f'<img alt="{caption} image" src="data:image/png;base64,{data}">'
            pictures += f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"
    question = f"step {int(group['step'])}: {group['question']} (answer: {group['answer']})"
    head = f'<h4>{escape(question)}</h4><div class="pics">{pictures}</div>'
    responses = "".join(response_html(response) for response in group["responses"])
    return f'<section class="group">{head}{responses}</section>'


# ---- the page

CSS = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1b1b;--soft:#666;--line:#ddd}
:root{--p:0,114,178;--r:213,94,0}
@media(prefers-color-scheme:dark){:root{--bg:#14161a;--fg:#e8e8e8;--soft:#a0a0a0;--line:#383c44}}
@media(prefers-color-scheme:dark){:root{--p:86,180,233;--r:230,145,50}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1100px;padding:12px;background:var(--bg);color:var(--fg)}
body{font:15px/1.45 system-ui,sans-serif}
h1{font-size:1.4em}h4{margin:.6em 0 .3em}
svg text{font-size:11px;fill:var(--soft)}svg .t{font-size:13px;font-weight:bold;fill:var(--fg)}
svg .g{stroke:var(--line)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(280px,1fr));gap:8px}
.charts svg{width:100%;height:auto}
.legend{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:4px 18px}
.key{width:34px;height:12px;vertical-align:middle}
.group{border-top:1px solid var(--line);padding-bottom:10px}
.pics{display:flex;flex-wrap:wrap;gap:10px}figure{margin:0}
@media(prefers-color-scheme:dark){polyline,.key line{filter:brightness(1.5)}}
figcaption{color:var(--soft);font-size:12px}
img{width:144px;max-width:45vw;image-rendering:pixelated;border:1px solid var(--line)}
.r{margin:8px 0}.r p{margin:0;font-size:13px}
pre{margin:2px 0;white-space:pre-wrap;overflow-wrap:anywhere;font:14px/1.9 ui-monospace,monospace}
pre span{position:relative}
.perception{background:rgb(var(--p),calc(var(--s)*.75));border-bottom:2px solid rgb(var(--p))}
.reasoning{background:rgb(var(--r),calc(var(--s)*.75));border-bottom:2px dotted rgb(var(--r))}
pre span:hover::after,pre span:focus::after{content:attr(data-tip);position:absolute}
pre span:hover::after,pre span:focus::after{left:0;top:1.7em}
pre span:hover::after,pre span:focus::after{z-index:9;white-space:pre}
pre span:hover::after,pre span:focus::after{padding:2px 7px;border-radius:4px}
pre span:hover::after,pre span:focus::after{background:var(--fg);color:var(--bg)}
pre span:hover::after,pre span:focus::after{font:12px/1.5 system-ui,sans-serif}
summary{cursor:pointer;font-weight:bold}.other{color:var(--soft)}
"""
HEAD = (
    '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    f"<title>SRPO report</title><style>{CSS}</style>"
)
EXPLAINED = (
    '<h2>Credit, token by token</h2><p><span class="perception" style="--s:50%">perception</span> '
    'and <span class="reasoning" style="--s:50%">reasoning</span> tokens are darker the larger '
    "their weight w; all others have weight 1. Point at a token, or touch it, for its contrast Δ, "
    "weight w and advantage Â. A is the response's advantage, b its baseline.</p>"
)


def page(runs: list[dict]) -> str:
    """The whole report as HTML. Everything that came from a run is escaped."""
    labelled = charts.label_runs(runs)
    body = [f"<h1>SRPO: {charts.count(runs)}</h1>", charts.legend(labelled)]
    if len(runs) > len(labelled):
        body.append("<p>Lines are means over seeds; bands are 95 % of the error of the mean.</p>")
    curves = [charts.chart(labelled, name) for name in charts.EVALS + charts.STEPS]
    body.append(f'<div class="charts">{"".join(curves)}</div>{EXPLAINED}')
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


def credit_png(group: dict, response: dict, scale: int = 2) -> Image.Image:
    """A response with the credit of each token, and the two images beside it."""
    width = 860 * scale
    side = 118 * scale  # of the two images
    gap = 12 * scale
    small = ImageFont.load_default(11 * scale)
    bold = ImageFont.load_default(15 * scale)
    room = (300 + 60 * len(response["weights"])) * scale  # cropped in the end
    canvas = Image.new("RGB", (width, room), "white")
    draw = ImageDraw.Draw(canvas)
    bottom = gap
    for kind, caption in (("images", "original"), ("corrupted", "corrupted")):
        for data in group[kind][:1]:
            image = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
            canvas.paste(image.resize((side, side), Image.Resampling.NEAREST), (gap, bottom))
            draw.text((gap, bottom + side + 2 * scale), caption, font=small, fill="#555")
            bottom += side + 22 * scale
    left = side + 3 * gap
    question = " ".join(group["question"].split())[:80]
    asked = f"{question}  (answer: {group['answer'][:20]})"
    draw.text((left, gap), asked, font=bold, fill="black")
    told = f"{verdict(response)}; reward {response['reward']:.2f}, "
    told += f"advantage {response['advantage']:+.2f}. Under each token: weight"
    if response["delta"] is not None:
        told += f", contrast in nats (baseline {response['baseline']:+.1f})"
    draw.text((left, gap + 22 * scale), told, font=small, fill="#555")
    box = (left, gap + 50 * scale, width - gap)
    bottom = max(bottom, draw_tokens(draw, tokens_of(response), box, scale))
    return canvas.crop((0, 0, width, bottom + gap))


def draw_tokens(draw, tokens: list[dict], box: tuple[int, int, int], scale: int) -> int:
    """Lines of tokens inside box = (left, top, right), on their colors; returns where they end."""
    left, y, right = box
    x = left
    line = 64 * scale
    font = ImageFont.load_default(16 * scale)
    small = ImageFont.load_default(11 * scale)
    for token in tokens:
        color = {Role.PERCEPTION: BLUE, Role.REASONING: ORANGE}.get(token["role"])
        parts = token["text"].splitlines(keepends=True)
        if not parts:
            parts = [""]
        for part in parts:
            text = part.rstrip("\n")
            width = draw.textlength(text, font)
            if color is not None:
                width = max(width, 22 * scale)  # room for the numbers
            if x + width + 2 * scale > right:
                x = left
                y += line
            if color is not None:
                share = 0.75 * strength(token["weight"])
                mixed = tuple(int(255 + (c - 255) * share) for c in color)
                draw.rectangle((x, y - 2 * scale, x + width, y + 22 * scale), fill=mixed)
                draw.rectangle((x, y + 22 * scale, x + width, y + 24 * scale), fill=color)
                weight = f"{token['weight']:.1f}"
                draw.text((x, y + 26 * scale), weight, font=small, fill="#333")
                draw.text((x, y), text, font=font, fill="black")
            else:
                draw.text((x, y), text, font=font, fill="#888")
            if color is not None and token["delta"] is not None:
                delta = f"{token['delta']:+.1f}"
                draw.text((x, y + 38 * scale), delta, font=small, fill="#888")
            x += width + 2 * scale
            if part.endswith("\n"):
                x = left
                y += line
    return y + line


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
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = train.Parser(description=__doc__.splitlines()[0], formatter_class=form)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folders of runs of train.py")
    add("--out", type=Path, default=Path("report.html"), help="the page")
    add("--png", type=Path, metavar="FILE", help="also a response of the first run, as a picture")
    add("--svg", type=Path, metavar="FILE", help="also the curves of accuracy and grounding")
    args = parser.parse_args(argv)
    try:
        runs = [read_run(folder) for folder in args.runs]
        add_groups(runs)
        args.out.write_text(page(runs), encoding="utf-8")
        if args.svg:
            svg = charts.curves_svg(charts.label_runs(runs))
            args.svg.write_text(svg, encoding="utf-8")
        if args.png:
            if "missing" in runs[0]:
                raise InputError(runs[0]["missing"])
            group, response = pick(runs[0])
            credit_png(group, response).save(args.png)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:  # ValueError: a picture of an unknown kind
        print(f"error: cannot be written: {error}", file=sys.stderr)
        return 2
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
