"""One HTML page about runs of train.py: learning curves, and sampled responses with the credit of every token.

    python extras/report.py out/tiny-srpo-seed0 out/tiny-grpo-seed0 --out report.html
    python extras/report.py out/study/count-*-seed* --out study.html          runs that differ in their seed alone share a band
    python extras/report.py RUN_DIR --png credit.png                          also one response, as a picture
    python extras/report.py RUN_DIR ... --svg curves.svg                      also the curves

The page is one file that needs no network. Perception tokens are blue with a solid line under them, reasoning tokens
orange with a dotted one; the darker a token, the larger its weight. Touch a token, or point at it, for its numbers.
"""

import argparse
import base64
import html
import io
import json
import math
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from PIL import Image, ImageDraw, ImageFont  # noqa: E402

import train  # noqa: E402
from data import InputError  # noqa: E402
from srpo import Role  # noqa: E402

EVALS = ("accuracy", "grounded", "wrong reason", "perception", "consistent")
STEPS = ("reward", "w_perception", "w_reasoning", "entropy", "length", "grad_norm")
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")  # Okabe & Ito: told apart by the colour-blind
DASHES = ("", "7 3", "2 3", "9 3 2 3", "1 5", "12 4")  # and told apart without color
BLUE, ORANGE = (0, 114, 178), (213, 94, 0)
esc = html.escape


# ------------------------------------------------------------------------------------------------------------- reading


def read_run(folder: Path) -> dict:
    """Options, records and kept groups of one run."""
    try:
        args = json.loads((folder / "args.json").read_text(encoding="utf-8"))
        return {"name": folder.name, "args": args, "records": train.read_log(folder), "groups": train.read_log(folder, "samples.jsonl")}
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: not the folder of a run of train.py ({error})") from None


def label_runs(runs: list[dict]) -> dict[str, list[dict]]:
    """Runs that differ in their seed alone, under the name of their folders without it, and the options that tell it apart."""
    stems = [re.sub(r"-seed\d+(-\d+)?$", "", run["name"]) for run in runs]
    options = [{k: v for k, v in run["args"].items() if k not in ("seed", "cache")} for run in runs]
    labelled = {}
    for run, stem, o in zip(runs, stems, options, strict=True):
        others = [x for x, s in zip(options, stems, strict=True) if s == stem]
        telling = [k for k in o if len({json.dumps(x.get(k)) for x in others}) > 1]
        labelled.setdefault(", ".join([stem] + [f"{k.replace('_', ' ')} {o[k]}" for k in telling]), []).append(run)
    return labelled


def curve(runs: list[dict], name: str) -> list[tuple[float, float, float, float]]:
    """(step, mean, low, high) over runs at the steps that all of them have; the band is 95 % of the mean's error."""
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


# -------------------------------------------------------------------------------------------------------------- curves


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
    step = 10 ** math.floor(math.log10((high - low + 2 * pad) / 3))  # round numbers on the axis, three to seven of them
    step *= max(k for k in (1, 2, 5) if (high - low + 2 * pad) / (k * step) >= 3)
    low, high = math.floor((low - pad) / step) * step, math.ceil((high + pad) / step) * step
    X = lambda x: left + x / x1 * (W - left - 8)  # noqa: E731
    Y = lambda y: H - bottom - (y - low) / (high - low) * (H - bottom - top)  # noqa: E731
    parts = [f'<svg viewBox="0 0 {W} {H}" role="img" aria-label="{esc(name)}"><text x="{left}" y="14" class="t">{esc(name)}</text>']
    for i in range(round((high - low) / step) + 1):
        y = low + i * step
        parts.append(f'<line x1="{left}" x2="{W - 8}" y1="{Y(y):.1f}" y2="{Y(y):.1f}" class="g"/>')
        parts.append(f'<text x="{left - 4}" y="{Y(y) + 4:.1f}" text-anchor="end">{round(y, 9):.4g}</text>')
    for x in (0, x1 / 2, x1):
        parts.append(f'<text x="{X(x):.1f}" y="{H - 8}" text-anchor="middle">{x:.4g}</text>')
    for i, c in enumerate(curves.values()):
        if not c:
            continue
        color, dash = COLORS[i % len(COLORS)], DASHES[i % len(DASHES)]
        band = [f"{X(p[0]):.1f},{Y(p[2]):.1f}" for p in c] + [f"{X(p[0]):.1f},{Y(p[3]):.1f}" for p in reversed(c)]
        line = " ".join(f"{X(p[0]):.1f},{Y(p[1]):.1f}" for p in c)
        parts.append(f'<polygon points="{" ".join(band)}" fill="{color}" opacity="0.15"/>')
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{dash}"/>')
    return "".join(parts) + "</svg>"


def legend(labelled: dict[str, list[dict]]) -> str:
    rows = []
    for i, (label, runs) in enumerate(labelled.items()):
        line = f'<line x1="0" x2="34" y1="6" y2="6" stroke="{COLORS[i % len(COLORS)]}" stroke-width="3" stroke-dasharray="{DASHES[i % len(DASHES)]}"/>'
        rows.append(f'<li><svg class="key" viewBox="0 0 34 12">{line}</svg> {esc(label)} ({len(runs)} run{"s" * (len(runs) > 1)})</li>')
    return f'<ul class="legend">{"".join(rows)}</ul>'


def curves_svg(labelled: dict[str, list[dict]], names=("accuracy", "grounded", "wrong reason")) -> str:
    """Charts side by side in one SVG file with its legend, on white: for a README."""
    charts = [svg for svg in (chart(labelled, name) for name in names) if svg]
    style = "<style>text{font:11px sans-serif;fill:#333}.t{font-weight:bold;font-size:13px}.g{stroke:#ddd}</style>"
    width, height = 350 * len(charts), 230 + 18 * len(labelled)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">{style}']
    parts.append(f'<rect width="{width}" height="{height}" fill="white"/>')
    for i, svg in enumerate(charts):
        parts.append(svg.replace("<svg ", f'<svg x="{350 * i}" y="0" width="340" height="220" ', 1))
    for i, (label, runs) in enumerate(labelled.items()):
        y = 238 + 18 * i
        parts.append(f'<line x1="42" x2="82" y1="{y}" y2="{y}" stroke="{COLORS[i % len(COLORS)]}" stroke-width="3" stroke-dasharray="{DASHES[i % len(DASHES)]}"/>')
        parts.append(f'<text x="90" y="{y + 4}">{esc(label)} ({len(runs)} runs; steps along the x axis)</text>')
    return "".join(parts) + "</svg>\n"


# ------------------------------------------------------------------------------------------------------------- credit


def tokens_of(response: dict) -> list[dict]:
    """Text and numbers of each token, in order. Bytes of one character in several tokens show at the first; then EOS."""
    tokens, shown = [], 0
    for t, weight in enumerate(response["weights"]):
        start, end = response["offsets"][t] if t < len(response["offsets"]) else (None, None)
        text = "EOS" if start is None else response["text"][max(start, shown) : end]
        shown = shown if end is None else max(shown, end)
        numbers = {"delta": response["delta"] and response["delta"][t], "weight": weight, "advantage": response["advantages"][t]}
        tokens.append({"text": text, "role": Role(response["roles"][t]), "eos": start is None, **numbers})
    return tokens


def strength(weight: float) -> float:
    """Share of color: 0 at weight 1/4, the least there is with the default range, 1 at 4."""
    return min(1.0, max(0.0, 0.5 + math.log2(max(weight, 1e-9)) / 4))


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
        tip += f", Δ {token['delta']:+.2f}" if token["role"] != Role.OTHER and token["delta"] is not None else ""
        text = esc(token["text"]).replace("\n", "↵\n") or "·"
        style = f' style="--s:{100 * strength(token["weight"]):.0f}%"' if token["role"] != Role.OTHER else ""
        spans.append(f'<span class="{role}" tabindex="0" data-tip="{esc(tip)}"{style}>{text}</span>')
    told = f"reward {response['reward']:.2f}, A {response['advantage']:+.2f}"
    told += "" if response["baseline"] is None else f", b {response['baseline']:+.2f}"
    mark = "✓" if response["accuracy"] else "✗"
    return f'<div class="r"><p><b>{mark} {esc(verdict(response))}</b> {esc(told)}</p><pre>{"".join(spans)}</pre></div>'


def group_html(group: dict) -> str:
    pictures = ""
    for kind in ("images", "corrupted"):
        for data in group[kind]:
            base64.b64decode(data, validate=True)  # nothing but a picture may enter the attribute
            caption = "original" if kind == "images" else "corrupted"
            pictures += f'<figure><img alt="{caption} image" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    question = f"{group['question']} (answer: {group['answer']})"
    responses = "".join(response_html(r) for r in group["responses"])
    return f'<section class="group"><h4>step {int(group["step"])}: {esc(question)}</h4><div class="pics">{pictures}</div>{responses}</section>'


# ---------------------------------------------------------------------------------------------------------------- page

CSS = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1b1b;--soft:#666;--line:#ddd;--p:0,114,178;--r:213,94,0}
@media(prefers-color-scheme:dark){:root{--bg:#14161a;--fg:#e8e8e8;--soft:#a0a0a0;--line:#383c44;--p:86,180,233;--r:230,145,50}}
*{box-sizing:border-box}body{margin:0 auto;max-width:1100px;padding:12px;background:var(--bg);color:var(--fg);font:15px/1.45 system-ui,sans-serif}
h1{font-size:1.4em}h4{margin:.6em 0 .3em}svg text{font-size:11px;fill:var(--soft)}svg .t{font-size:13px;font-weight:bold;fill:var(--fg)}svg .g{stroke:var(--line)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(280px,1fr));gap:8px}.charts svg{width:100%;height:auto}
.legend{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:4px 18px}.key{width:34px;height:12px;vertical-align:middle}
.group{border-top:1px solid var(--line);padding-bottom:10px}.pics{display:flex;flex-wrap:wrap;gap:10px}figure{margin:0}
@media(prefers-color-scheme:dark){polyline,.key line{filter:brightness(1.5)}}
figcaption{color:var(--soft);font-size:12px}img{width:144px;max-width:45vw;image-rendering:pixelated;border:1px solid var(--line)}
.r{margin:8px 0}.r p{margin:0;font-size:13px}pre{margin:2px 0;white-space:pre-wrap;overflow-wrap:anywhere;font:14px/1.9 ui-monospace,monospace}
pre span{position:relative}.perception{background:rgb(var(--p),calc(var(--s)*.75));border-bottom:2px solid rgb(var(--p))}
.reasoning{background:rgb(var(--r),calc(var(--s)*.75));border-bottom:2px dotted rgb(var(--r))}
pre span:hover::after,pre span:focus::after{content:attr(data-tip);position:absolute;left:0;top:1.7em;z-index:9;white-space:pre;padding:2px 7px;
background:var(--fg);color:var(--bg);font:12px/1.5 system-ui,sans-serif;border-radius:4px}summary{cursor:pointer;font-weight:bold}.other{color:var(--soft)}
"""


def page(runs: list[dict]) -> str:
    """The whole report as HTML. Everything that came from a run is escaped."""
    labelled = label_runs(runs)
    charts = "".join(chart(labelled, name) for name in (*EVALS, *STEPS))
    body = [f"<h1>SRPO: {len(runs)} run{'s' * (len(runs) > 1)}</h1>", legend(labelled)]
    if any(len(r) > 1 for r in labelled.values()):
        body.append("<p>Lines are means over seeds; bands are 95 % of the error of the mean.</p>")
    body.append(f'<div class="charts">{charts}</div><h2>Credit, token by token</h2><p><span class="perception" style="--s:50%">perception</span> and ')
    body.append('<span class="reasoning" style="--s:50%">reasoning</span> tokens are darker the larger their weight w; all others have weight 1. ')
    body.append("Point at a token, or touch it, for its contrast Δ, weight w and advantage Â. A is the response's advantage, b its baseline.</p>")
    for label, members in labelled.items():
        kept = [run for run in members if run["groups"]][:1]
        for run in kept:
            last = max(g["step"] for g in run["groups"])
            for step in sorted({g["step"] for g in run["groups"]}):
                groups = "".join(group_html(g) for g in run["groups"] if g["step"] == step)
                is_open = " open" if step == last and len(labelled) < 4 else ""
                body.append(f"<details{is_open}><summary>{esc(label)}, {esc(run['name'])}, step {int(step)}</summary>{groups}</details>")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><title>SRPO report</title>'
    return f'<!doctype html><html lang="en"><head>{head}<style>{CSS}</style></head><body>{"".join(body)}</body></html>\n'


def credit_png(group: dict, response: dict, scale: int = 2) -> Image.Image:
    """A response with the credit of each token, and the two images beside it."""
    W, side, gap = 860 * scale, 118 * scale, 12 * scale
    font, small, bold = (ImageFont.load_default(size * scale) for size in (16, 11, 15))
    canvas = Image.new("RGB", (W, (300 + 60 * len(response["weights"])) * scale), "white")  # cropped in the end
    draw = ImageDraw.Draw(canvas)
    y = gap
    for kind, caption in (("images", "original"), ("corrupted", "corrupted")):
        for data in group[kind][:1]:
            image = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB").resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(image, (gap, y))
            draw.text((gap, y + side + 2 * scale), caption, font=small, fill="#555")
            y += side + 22 * scale
    left = side + 3 * gap
    x, line = left, 50 * scale
    asked = f"{' '.join(group['question'].split())[:80]}  (answer: {group['answer'][:20]})"
    draw.text((left, gap), asked, font=bold, fill="black")
    told = f"{verdict(response)}; reward {response['reward']:.2f}, advantage {response['advantage']:+.2f}. Under each token: its weight."
    draw.text((left, gap + 22 * scale), told, font=small, fill="#555")
    row = gap + 50 * scale
    for token in tokens_of(response):
        for part in token["text"].splitlines(keepends=True) or [""]:
            text = part.rstrip("\n")
            width = max(draw.textlength(text, font), (22 if token["role"] != Role.OTHER else 0) * scale) + 2 * scale
            if x + width > W - gap:
                x, row = left, row + line
            if token["role"] != Role.OTHER:
                color = BLUE if token["role"] == Role.PERCEPTION else ORANGE
                mixed = tuple(int(255 + (c - 255) * 0.75 * strength(token["weight"])) for c in color)
                draw.rectangle((x, row - 2 * scale, x + width - 2 * scale, row + 22 * scale), fill=mixed)
                draw.rectangle((x, row + 22 * scale, x + width - 2 * scale, row + 24 * scale), fill=color)
                draw.text((x, row + 26 * scale), f"{token['weight']:.1f}", font=small, fill="#333")
            draw.text((x, row), text, font=font, fill="black" if token["role"] != Role.OTHER else "#888")
            x += width
            if part.endswith("\n"):
                x, row = left, row + line
    return canvas.crop((0, 0, W, max(y, row + line) + gap))


def pick(run: dict) -> tuple[dict, dict]:
    """The most telling of the kept responses: the last step's with the widest spread of weights, a right one if there is one."""
    last = max(g["step"] for g in run["groups"])
    found = [(g, r) for g in run["groups"] if g["step"] == last for r in g["responses"]]
    return max(found, key=lambda x: (x[1]["accuracy"], max(x[1]["weights"]) - min(x[1]["weights"])))


def main(argv: list[str] | None = None) -> int:
    parser = train.Parser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folders of runs of train.py")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also one response of the first run, as a picture")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="also the curves of accuracy and grounding")
    args = parser.parse_args(argv)
    try:
        runs = [read_run(folder) for folder in args.runs]
        args.out.write_text(page(runs), encoding="utf-8")
        if args.svg:
            args.svg.write_text(curves_svg(label_runs(runs)), encoding="utf-8")
        if args.png:
            if not runs[0]["groups"]:
                raise InputError(f"{args.runs[0]}: kept no responses; run train.py with --sample-every above 0")
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
