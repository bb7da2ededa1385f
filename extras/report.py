"""One HTML page about runs of train.py: learning curves, and responses with the credit of every token.

    python extras/report.py out/tiny-srpo-seed0 out/tiny-grpo-seed0 --out report.html
    python extras/report.py out/study/count-*-seed* --out study.html     runs of different seeds share a band
    python extras/report.py RUN_DIR --png credit.png                     also one response, as a picture
    python extras/report.py RUN_DIR ... --svg curves.svg                 also the curves

The responses are sampled for the page: of each kind of run the first one's last checkpoint answers the
questions that would come next, and is given credit as in training. The page is one file that needs no
network. Perception tokens are blue with a solid line under them, reasoning tokens orange with a dotted one;
the darker a token, the larger its weight. Touch a token, or point at it, for its numbers. A checkpoint knows
nothing of weights that extras/study.py puts in the place of SRPO's: their runs are shown with SRPO's.
"""

import argparse
import base64
import html
import io
import json
import math
import re
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from PIL import Image, ImageDraw, ImageFont  # noqa: E402

import credit  # noqa: E402
import train  # noqa: E402
from data import InputError  # noqa: E402
from srpo import Role, shared_baseline  # noqa: E402

EVALS = ("accuracy", "grounded", "wrong reason", "perception", "consistent")
STEPS = ("reward", "w_perception", "w_reasoning", "entropy", "length", "grad_norm")
# Okabe and Ito: told apart by the color-blind; and, by the dashes, without color
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")
DASHES = ("", "7 3", "2 3", "9 3 2 3", "1 5", "12 4")
BLUE, ORANGE = (0, 114, 178), (213, 94, 0)
esc = html.escape


# ---------------------------------------------------------------------------------------------------- reading


def read_run(folder: Path) -> dict:
    """Options and records of one run."""
    try:
        args = json.loads((folder / "args.json").read_text(encoding="utf-8"))
        return {"name": folder.name, "path": folder, "args": args, "records": train.Run(folder).log()}
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: not the folder of a run of train.py ({error})") from None


def label_runs(runs: list[dict]) -> dict[str, list[dict]]:
    """Runs that differ in their seed alone, under the name of their folders without it, and the options that
    tell it apart."""
    stems = [re.sub(r"-seed\d+(-\d+)?$", "", run["name"]) for run in runs]
    options = [run["args"] | run["args"].get("choice", {}) for run in runs]
    options = [{k: v for k, v in o.items() if k not in ("seed", "argv", "out", "choice")} for o in options]
    labelled = {}
    for run, stem, o in zip(runs, stems, options, strict=True):
        others = [x for x, s in zip(options, stems, strict=True) if s == stem]
        telling = [k for k in o if len({json.dumps(x.get(k)) for x in others}) > 1]
        label = ", ".join([stem] + [f"{k.replace('_', ' ')} {o[k]}" for k in telling])
        labelled.setdefault(label, []).append(run)
    return labelled


def sample_groups(folder: Path) -> list[dict]:
    """The first two groups with a spread of rewards in the batch after the last checkpoint, as its policy
    answers it. What is not measured is None: contrasts under GRPO, and where A = 0."""
    args, policy, step = credit.finished(folder)
    examples = credit.task_of(args).train_batch(step, args.prompts)
    corruption = credit.corruption(policy, args, step + 1)
    prompts = policy.encode(examples, corruption)
    found = credit.credit(policy, prompts, examples, args, train.generator(args, step + 1))
    groups = []
    for g in found.A.view(-1, args.group_size).any(1).nonzero()[:2, 0].tolist():
        images = [policy.fit(image) for image in examples[g].images]
        shown = {"step": step, "question": examples[g].question, "answer": examples[g].answer}
        shown["images"] = [png(image) for image in images]
        shown["corrupted"] = [png(corruption(g, image)) for image in images if args.algo == "srpo"]
        rows = range(g * args.group_size, (g + 1) * args.group_size)
        groups.append(shown | {"responses": [as_shown(found, row, args) for row in rows]})
    if not groups:
        raise InputError(f"{folder}: no group of the next batch has a spread of rewards")
    return groups


def as_shown(found: credit.Credit, row: int, args) -> dict:
    """One response, token by token."""
    (text, offsets), mask, A = found.responses[row], found.rollout.mask[row], found.A[row].item()
    tokens = {"roles": found.roles, "delta": found.delta, "weights": found.w, "advantages": found.A_hat}
    b = shared_baseline(found.delta, found.scored, role_balanced=args.choice["role_balanced"])[row].item()
    shown = {"text": text, "offsets": offsets, "advantage": A, "baseline": b, **asdict(found.verdicts[row])}
    shown |= {name: x[row][mask].tolist() for name, x in tokens.items()}
    return shown | ({} if args.algo == "srpo" and A else {"delta": None, "baseline": None})


def png(image: Image.Image) -> str:
    file, image = io.BytesIO(), image.copy()
    image.thumbnail((448, 448))  # enough to look at
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def curve(runs: list[dict], name: str) -> list[tuple[float, float, float, float]]:
    """(step, mean, low, high) over runs at the steps that all have; the band is 95 % of the mean's error."""
    series = []
    for run in runs:
        found = {}
        for r in run["records"]:
            v = r["eval"] if "eval" in r and name in EVALS else r if name in STEPS else {}
            x = v.get(name)
            if name == "wrong reason" and v.get("grounded") is not None:
                x = v["accuracy"] - v["grounded"]
            if x is not None and math.isfinite(x):
                found[r["step"]] = x
        series.append(found)
    points = []
    for step in sorted(set.intersection(*map(set, series))):
        xs = [s[step] for s in series]
        mean = sum(xs) / len(xs)
        error = 1.96 * math.sqrt(sum((x - mean) ** 2 for x in xs) / max(1, len(xs) - 1) / len(xs))
        points.append((step, mean, mean - error, mean + error))
    return points


# ----------------------------------------------------------------------------------------------------- curves


def chart(labelled: dict[str, list[dict]], name: str) -> str:
    """An SVG of one metric; empty when no run has it."""
    curves = {label: curve(runs, name) for label, runs in labelled.items()}
    points = [p for c in curves.values() for p in c]
    if not points:
        return ""
    W, H, left, bottom, top = 340, 220, 42, 26, 24
    x1 = max(max(p[0] for p in points), 1)
    low, high = min(p[2] for p in points), max(p[3] for p in points)
    pad = (high - low) * 0.05 or max(abs(high), 1) * 0.05
    # round numbers on the axis, three to seven of them
    step = 10 ** math.floor(math.log10((high - low + 2 * pad) / 3))
    step *= max(k for k in (1, 2, 5) if (high - low + 2 * pad) / (k * step) >= 3)
    low, high = math.floor((low - pad) / step) * step, math.ceil((high + pad) / step) * step
    X = lambda x: left + x / x1 * (W - left - 8)  # noqa: E731
    Y = lambda y: H - bottom - (y - low) / (high - low) * (H - bottom - top)  # noqa: E731
    parts = [f'<svg viewBox="0 0 {W} {H}" role="img" aria-label="{esc(name)}">']
    parts.append(f'<text x="{left}" y="14" class="t">{esc(name)}</text>')
    for i in range(round((high - low) / step) + 1):
        y = low + i * step
        parts.append(f'<line x1="{left}" x2="{W - 8}" y1="{Y(y):.1f}" y2="{Y(y):.1f}" class="g"/>')
        parts.append(f'<text x="{left - 4}" y="{Y(y) + 4:.1f}" text-anchor="end">{round(y, 9):.4g}</text>')
    for x in (0, x1 / 2, x1):
        parts.append(f'<text x="{X(x):.1f}" y="{H - 8}" text-anchor="middle">{x:.4g}</text>')
    for i, c in enumerate(curves.values()):
        if not c:
            continue
        at = lambda p, k: f"{X(p[0]):.1f},{Y(p[k]):.1f}"  # noqa: E731
        band = [at(p, 2) for p in c] + [at(p, 3) for p in reversed(c)]
        parts.append(f'<polygon points="{" ".join(band)}" fill="{COLORS[i % len(COLORS)]}" opacity="0.15"/>')
        parts.append(f'<polyline points="{" ".join(at(p, 1) for p in c)}" fill="none" {stroke(i, 2)}/>')
    return "".join(parts) + "</svg>"


def stroke(i: int, width: int) -> str:
    """What the i-th curve is drawn with."""
    color, dash = COLORS[i % len(COLORS)], DASHES[i % len(DASHES)]
    return f'stroke="{color}" stroke-width="{width}" stroke-dasharray="{dash}"'


def legend(labelled: dict[str, list[dict]]) -> str:
    rows = []
    for i, (label, runs) in enumerate(labelled.items()):
        line = f'<line x1="0" x2="34" y1="6" y2="6" {stroke(i, 3)}/>'
        key = f'<svg class="key" viewBox="0 0 34 12">{line}</svg>'
        rows.append(f"<li>{key} {esc(label)} ({len(runs)} run{'s' * (len(runs) > 1)})</li>")
    return f'<ul class="legend">{"".join(rows)}</ul>'


def curves_svg(labelled: dict[str, list[dict]], names=("accuracy", "grounded", "wrong reason")) -> str:
    """Charts side by side in one SVG file with its legend, on white: for a README."""
    charts = [svg for svg in (chart(labelled, name) for name in names) if svg]
    style = "text{font:11px sans-serif;fill:#333}.t{font-weight:bold;font-size:13px}.g{stroke:#ddd}"
    width, height = 350 * len(charts), 230 + 18 * len(labelled)
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>']
    parts.append(f'<rect width="{width}" height="{height}" fill="white"/>')
    for i, svg in enumerate(charts):
        parts.append(svg.replace("<svg ", f'<svg x="{350 * i}" y="0" width="340" height="220" ', 1))
    for i, (label, runs) in enumerate(labelled.items()):
        y = 238 + 18 * i
        parts.append(f'<line x1="42" x2="82" y1="{y}" y2="{y}" {stroke(i, 3)}/>')
        said = f"{esc(label)} ({len(runs)} runs; steps along the x axis)"
        parts.append(f'<text x="90" y="{y + 4}">{said}</text>')
    return "".join(parts) + "</svg>\n"


# ----------------------------------------------------------------------------------------------------- credit


def tokens_of(response: dict) -> list[dict]:
    """Text and numbers of each token, EOS too. A character in several tokens shows at the first."""
    tokens, shown = [], 0
    for t, weight in enumerate(response["weights"]):
        start, end = response["offsets"][t] if t < len(response["offsets"]) else (None, None)
        text = "EOS" if start is None else response["text"][max(start, shown) : end]
        shown = shown if end is None else max(shown, end)
        token = {"text": text, "role": Role(response["roles"][t]), "eos": start is None, "weight": weight}
        token |= {"delta": response["delta"] and response["delta"][t], "advantage": response["advantages"][t]}
        tokens.append(token)
    return tokens


def strength(weight: float) -> float:
    """Share of color: 0 at weight 2/3, the least there is with the default range, 1 at 3/2."""
    return min(1.0, max(0.0, 0.5 + math.log(max(weight, 1e-9)) / math.log(1.5) / 2))


def verdict(response: dict) -> str:
    right = "right" if response["accuracy"] else "wrong"
    if response["accuracy"] and response.get("grounded") is not None:
        right += ", grounded" if response["grounded"] else " for the wrong reason"
    return right if response["format"] else right + ", malformed"


def response_html(response: dict) -> str:
    spans = []
    for token in tokens_of(response):
        role = token["role"].name.lower()
        tip = f"{token['role'].name.capitalize()}: w {token['weight']:.2f}, Â {token['advantage']:+.2f}"
        style = ""
        if token["role"] != Role.OTHER:
            tip += "" if token["delta"] is None else f", Δ {token['delta']:+.2f}"
            style = f' style="--s:{100 * strength(token["weight"]):.0f}%"'
        text = esc(token["text"]).replace("\n", "↵\n") or "·"
        spans.append(f'<span class="{role}" tabindex="0" data-tip="{esc(tip)}"{style}>{text}</span>')
    told = f"reward {response['reward']:.2f}, A {response['advantage']:+.2f}"
    told += "" if response["baseline"] is None else f", b {response['baseline']:+.2f}"
    mark = "✓" if response["accuracy"] else "✗"
    head = f"<b>{mark} {esc(verdict(response))}</b> {esc(told)}"
    return f'<div class="r"><p>{head}</p><pre>{"".join(spans)}</pre></div>'


def group_html(group: dict) -> str:
    pictures = ""
    for kind in ("images", "corrupted"):
        for data in group[kind]:
            base64.b64decode(data, validate=True)  # nothing but a picture may enter the attribute
            caption = "original" if kind == "images" else "corrupted"
            picture = f'<img alt="{caption} image" src="data:image/png;base64,{data}">'
            pictures += f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"
    question = f"step {int(group['step'])}: {group['question']} (answer: {group['answer']})"
    shown = f'<h4>{esc(question)}</h4><div class="pics">{pictures}</div>'
    return f'<section class="group">{shown}{"".join(response_html(r) for r in group["responses"])}</section>'


# ------------------------------------------------------------------------------------------------------- page

CSS = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1b1b;--soft:#666;--line:#ddd;--p:0,114,178;--r:213,94,0}
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
pre span:hover::after,pre span:focus::after{content:attr(data-tip);position:absolute;left:0;top:1.7em}
pre span:hover::after,pre span:focus::after{z-index:9;white-space:pre;padding:2px 7px;border-radius:4px}
pre span:hover::after,pre span:focus::after{background:var(--fg);color:var(--bg)}
pre span:hover::after,pre span:focus::after{font:12px/1.5 system-ui,sans-serif}
summary{cursor:pointer;font-weight:bold}.other{color:var(--soft)}
"""
HEAD = (
    '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    f"<title>SRPO report</title><style>{CSS}</style>"
)
EXPLAINED = (
    '<h2>Credit, token by token</h2><p><span class="perception" style="--s:50%">perception</span> and '
    '<span class="reasoning" style="--s:50%">reasoning</span> tokens are darker the larger their weight w; '
    "all others have weight 1. Point at a token, or touch it, for its contrast Δ, weight w and "
    "advantage Â. A is the response's advantage, b its baseline.</p>"
)


def page(runs: list[dict]) -> str:
    """The whole report as HTML. Everything that came from a run is escaped."""
    labelled = label_runs(runs)
    charts = "".join(chart(labelled, name) for name in (*EVALS, *STEPS))
    body = [f"<h1>SRPO: {len(runs)} run{'s' * (len(runs) > 1)}</h1>", legend(labelled)]
    if any(len(r) > 1 for r in labelled.values()):
        body.append("<p>Lines are means over seeds; bands are 95 % of the error of the mean.</p>")
    body.append(f'<div class="charts">{charts}</div>{EXPLAINED}')
    for label, members in labelled.items():
        for run in [run for run in members if run.get("groups")]:
            groups = "".join(map(group_html, run["groups"]))
            is_open = " open" if len(labelled) < 4 else ""
            name = f"<summary>{esc(label)}, {esc(run['name'])}</summary>"
            body.append(f"<details{is_open}>{name}{groups}</details>")
        if all("missing" in run for run in members):
            body.append(f"<p>No responses: {esc(members[0]['missing'])}</p>")
    return f'<!doctype html><html lang="en"><head>{HEAD}</head><body>{"".join(body)}</body></html>\n'


def add_groups(runs: list[dict]) -> None:
    """Responses of the first run of each kind that has a checkpoint; of the others why there are none."""
    for members in label_runs(runs).values():
        for run in members:
            try:
                run["groups"] = sample_groups(run["path"])
                break
            except InputError as error:
                run["missing"] = str(error)


def credit_png(group: dict, response: dict, scale: int = 2) -> Image.Image:
    """A response with the credit of each token, and the two images beside it."""
    W, side, gap = 860 * scale, 118 * scale, 12 * scale
    font, small, bold = (ImageFont.load_default(size * scale) for size in (16, 11, 15))
    room = (300 + 60 * len(response["weights"])) * scale  # cropped in the end
    canvas = Image.new("RGB", (W, room), "white")
    draw = ImageDraw.Draw(canvas)
    y = gap
    for kind, caption in (("images", "original"), ("corrupted", "corrupted")):
        for data in group[kind][:1]:
            image = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
            canvas.paste(image.resize((side, side), Image.Resampling.NEAREST), (gap, y))
            draw.text((gap, y + side + 2 * scale), caption, font=small, fill="#555")
            y += side + 22 * scale
    left = side + 3 * gap
    x, line = left, 64 * scale
    asked = f"{' '.join(group['question'].split())[:80]}  (answer: {group['answer'][:20]})"
    draw.text((left, gap), asked, font=bold, fill="black")
    told = f"{verdict(response)}; reward {response['reward']:.2f}, advantage {response['advantage']:+.2f}. "
    told += "Under each token: weight" + ("" if response["delta"] is None else ", contrast in nats")
    told += "" if response["baseline"] is None else f" (baseline {response['baseline']:+.1f})"
    draw.text((left, gap + 22 * scale), told, font=small, fill="#555")
    row = gap + 50 * scale
    for token in tokens_of(response):
        has_role = token["role"] != Role.OTHER
        for part in token["text"].splitlines(keepends=True) or [""]:
            text = part.rstrip("\n")
            width = max(draw.textlength(text, font), 22 * scale * has_role) + 2 * scale
            if x + width > W - gap:
                x, row = left, row + line
            if has_role:
                color, right = BLUE if token["role"] == Role.PERCEPTION else ORANGE, x + width - 2 * scale
                mixed = tuple(int(255 + (c - 255) * 0.75 * strength(token["weight"])) for c in color)
                draw.rectangle((x, row - 2 * scale, right, row + 22 * scale), fill=mixed)
                draw.rectangle((x, row + 22 * scale, right, row + 24 * scale), fill=color)
                draw.text((x, row + 26 * scale), f"{token['weight']:.1f}", font=small, fill="#333")
                if token["delta"] is not None:
                    draw.text((x, row + 38 * scale), f"{token['delta']:+.1f}", font=small, fill="#888")
            draw.text((x, row), text, font=font, fill="black" if has_role else "#888")
            x += width
            if part.endswith("\n"):
                x, row = left, row + line
    return canvas.crop((0, 0, W, max(y, row + line) + gap))


def pick(run: dict) -> tuple[dict, dict]:
    """The most telling response: right, for the right reason, a wide spread of weights; in this order."""
    found = [(g, r) for g in run["groups"] for r in g["responses"]]
    spread = lambda r: max(r["weights"]) - min(r["weights"])  # noqa: E731
    return max(found, key=lambda x: (x[1]["accuracy"], x[1]["grounded"] or 0, spread(x[1])))


def main(argv: list[str] | None = None) -> int:
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = train.Parser(description=__doc__.splitlines()[0], formatter_class=form)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folders of runs of train.py")
    add("--out", type=Path, default=Path("report.html"), help="the page")
    add("--png", type=Path, metavar="FILE", help="also one response of the first run, as a picture")
    add("--svg", type=Path, metavar="FILE", help="also the curves of accuracy and grounding")
    args = parser.parse_args(argv)
    try:
        runs = [read_run(folder) for folder in args.runs]
        add_groups(runs)
        args.out.write_text(page(runs), encoding="utf-8")
        if args.svg:
            args.svg.write_text(curves_svg(label_runs(runs)), encoding="utf-8")
        if args.png:
            if "missing" in runs[0]:
                raise InputError(runs[0]["missing"])
            credit_png(*pick(runs[0])).save(args.png)
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
