"""Pictures of tokens and their credit, by matplotlib: for the report and for the walkthrough.

Perception is blue with a solid line, reasoning is orange with a dotted one, everywhere. The colors
are Okabe and Ito's, which the color-blind can tell apart.
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch, Rectangle
except ImportError:
    print("error: pictures need matplotlib: pip install matplotlib", file=sys.stderr)
    sys.exit(2)

from srpo import Role  # noqa: E402

COLORS = {Role.PERCEPTION: "#0072B2", Role.REASONING: "#D55E00", Role.OTHER: "#767676"}
LINES = {Role.PERCEPTION: "solid", Role.REASONING: "dotted", Role.OTHER: "none"}
MONO = "DejaVu Sans Mono"  # comes with matplotlib; every character has the same width
SIZE = 10.5  # of a token's text, in points
SMALL = 8  # of the numbers under it
COLUMN = 0.602 * SIZE / 72  # width of a character in inches
ROW = 0.25  # height of a token in inches
NUMBER_ROW = 0.15  # of a line of numbers
GAP = 0.12  # between lines of tokens
# Plain settings, on white whatever the reader's own are.
STYLE = {"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False}
STYLE.update({"figure.facecolor": "white", "savefig.facecolor": "white", "axes.axisbelow": True})
matplotlib.rcParams.update(STYLE)


# ---- tokens in the colors of their roles


@dataclass
class Token:
    """What is drawn of a token."""

    text: str
    role: Role
    shade: float = 0.4  # how strong its color is, 0 to 1
    numbers: tuple[str, ...] = ()  # under it


def strength(weight: float) -> float:
    """Shade of a weight: 0 at 2/3, the least there is with the default range, and 1 at 3/2."""
    share = 0.5 + math.log(max(weight, 1e-9)) / math.log(1.5) / 2
    return min(1.0, max(0.0, share))


def token_texts(text: str, offsets, count: int) -> list[str]:
    """The text of each of `count` tokens; those without an offset are EOS.

    A character that several tokens touch is shown at the first.
    """
    texts = []
    shown = 0  # characters so far
    for start, end in offsets:
        texts.append(text[max(start, shown) : end])
        shown = max(shown, end)
    return texts + ["EOS"] * (count - len(texts))


def readable(text: str) -> str:
    """A token's text without white space around it; a dot where nothing else is left."""
    shown = text.strip()
    if shown == "":
        shown = "·"
    return shown


def place_tokens(tokens: list[Token], columns: int) -> list[tuple[Token, int, float]]:
    """(token, line, column) of each, with a new line where one is full or a token holds one."""
    places = []
    line = 0
    column = 0.0
    for token in tokens:
        width = width_of(token)
        if column > 0 and column + width > columns:
            line += 1
            column = 0.0
        places.append((token, line, column))
        column += width + 0.5
        if "\n" in token.text:
            line += token.text.count("\n")
            column = 0.0
    return places


def width_of(token: Token) -> float:
    """In characters of the token's size."""
    widths = [len(readable(token.text)) + 0.6]
    for number in token.numbers:
        widths.append(len(number) * SMALL / SIZE + 0.4)
    return max(widths)


def line_height(tokens: list[Token]) -> float:
    """In inches, with the numbers and the gap below."""
    most = max((len(token.numbers) for token in tokens), default=0)
    return ROW + NUMBER_ROW * most + GAP


def tokens_height(tokens: list[Token], columns: int) -> float:
    """In inches, of all lines."""
    lines = 1
    for _, line, _ in place_tokens(tokens, columns):
        lines = max(lines, line + 1)
    return lines * line_height(tokens)


def draw_tokens(figure: Figure, tokens: list[Token], columns: int, left: float, top: float):
    """Tokens from `left` and `top` on, in inches from the figure's upper left corner; the axes."""
    width = columns * COLUMN
    height = tokens_height(tokens, columns)
    full_width, full_height = figure.get_size_inches()
    bottom = full_height - top - height
    place = (left / full_width, bottom / full_height, width / full_width, height / full_height)
    axes = figure.add_axes(place)
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)  # inches, downwards
    for token, line, column in place_tokens(tokens, columns):
        draw_token(axes, token, column * COLUMN, line * line_height(tokens))
    return axes


def draw_token(axes, token: Token, x: float, y: float) -> None:
    """One token, its upper left corner at x and y inches."""
    width = width_of(token) * COLUMN
    color = COLORS[token.role]
    ink = "#555555"
    if token.role != Role.OTHER:
        ink = "black"
        alpha = 0.08 + 0.62 * token.shade
        axes.add_patch(Rectangle((x, y), width, ROW - 0.03, color=color, alpha=alpha, lw=0))
        ends = [x, x + width]
        axes.plot(ends, [y + ROW - 0.02] * 2, color=color, lw=2, ls=LINES[token.role])
    middle = x + width / 2
    text = readable(token.text)
    put = {"ha": "center", "va": "center", "family": MONO, "parse_math": False}
    axes.text(middle, y + ROW * 0.44, text, fontsize=SIZE, color=ink, **put)
    for i, number in enumerate(token.numbers):
        under = y + ROW + NUMBER_ROW * (i + 0.5)
        axes.text(middle, under, number, fontsize=SMALL, color="#333333", **put)


def token_picture(tokens: list[Token], title: str = "", columns: int = 96) -> Figure:
    """A response, with a line above it that says what is seen."""
    top = 0.0
    if title:
        top = 0.3
    height = top + tokens_height(tokens, columns)
    figure = Figure((columns * COLUMN, height), dpi=100)
    axes = draw_tokens(figure, tokens, columns, 0, top)
    if title:
        axes.text(0, -0.12, title, fontsize=SIZE, va="center", parse_math=False)
        if any(token.role != Role.OTHER for token in tokens):
            role_legend(axes)
    return figure


def role_legend(axes) -> None:
    """The two colors, above the axes on the right."""
    keys = []
    for role in (Role.PERCEPTION, Role.REASONING):
        keys.append(Patch(color=COLORS[role], label=role.name.lower()))
    where = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.2}
    axes.legend(handles=keys, ncols=2, frameon=False, fontsize=SMALL + 1, **where)


# ---- numbers over the tokens of a response


@dataclass
class Bars:
    """One row of bars, a bar for each token."""

    label: str
    values: list[float]
    start: float = 0.0  # where the bars begin
    lines: dict[str, float] = field(default_factory=dict)  # horizontal ones, with what they are


def bars_under_tokens(texts, roles, rows: list[Bars], title: str = "", marked=()) -> Figure:
    """Rows of bars over the same tokens; tokens of the indices `marked` are hatched."""
    width = max(5.0, 0.29 * len(texts) + 1.2)
    figure = Figure((width, 0.9 + 1.15 * len(rows)), dpi=100, layout="constrained")
    all_axes = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    colors = [COLORS[Role(role)] for role in roles]
    places = range(len(texts))
    for axes, row in zip(all_axes, rows, strict=True):
        heights = [value - row.start for value in row.values]
        drawn = axes.bar(places, heights, 0.75, bottom=row.start, color=colors)
        for index in marked:
            drawn[index].set(hatch="////", edgecolor="white")
        axes.axhline(row.start, color="black", lw=0.6)
        for label, y in row.lines.items():
            axes.axhline(y, color="black", lw=1.2, ls="--")
            axes.annotate(label, (1.005, y), xycoords=("axes fraction", "data"), va="center")
        axes.set_ylabel(row.label, rotation=0, ha="right", va="center", fontsize=11)
        axes.margins(x=0.01)
    label_tokens(all_axes[-1], texts, colors)
    all_axes[0].set_title(title, loc="left", fontsize=10, parse_math=False)
    role_legend(all_axes[0])
    return figure


def label_tokens(axes, texts, colors) -> None:
    """The tokens along the x axis, upright, in their colors."""
    shown = [readable(text) for text in texts]
    axes.set_xticks(range(len(shown)), shown, rotation=90, family=MONO, fontsize=8.5)
    for label, color in zip(axes.get_xticklabels(), colors, strict=True):
        label.set(color=color, parse_math=False)


def two_contexts(texts, roles, logp, other, title: str = "", limit: float = 5.0) -> Figure:
    """Log-probs of the same tokens in two contexts; the bar between them is the contrast.

    `other` is None at tokens that have no contrast. What is more than `limit` nats away from the
    dot is drawn thin, and a stroke marks where step 4 cuts it off.
    """
    figure = Figure((max(5.0, 0.29 * len(texts) + 1.2), 3.8), dpi=100, layout="constrained")
    axes = figure.subplots()
    colors = [COLORS[Role(role)] for role in roles]
    for t, there in enumerate(other):
        if there is None:
            continue
        kept = min(logp[t] + limit, max(logp[t] - limit, there))
        axes.plot([t, t], [kept, logp[t]], color=colors[t], lw=5, alpha=0.45)
        if kept != there:
            axes.plot([t, t], [there, kept], color=colors[t], lw=1.2, ls=":")
            axes.plot([t - 0.35, t + 0.35], [kept, kept], color="black", lw=1.5)
        axes.scatter([t], [there], s=26, color=colors[t], marker="x", zorder=3)
    axes.scatter(range(len(texts)), logp, s=26, color="black", zorder=3)
    axes.set_ylabel("log-prob, nats")
    axes.margins(x=0.01)
    axes.grid(axis="y", color="#dddddd")
    where = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
    axes.legend(handles=keys_of_contexts(limit), frameon=False, ncols=4, **where)
    axes.set_title(title, loc="left", fontsize=10, pad=26, parse_math=False)
    label_tokens(axes, texts, colors)
    return figure


def keys_of_contexts(limit: float) -> list[Line2D]:
    """What stands for what in `two_contexts`."""
    cross = {"marker": "x", "ls": "none"}
    corrupted = COLORS[Role.PERCEPTION]
    hidden = COLORS[Role.REASONING]
    return [
        Line2D([], [], color="black", marker="o", ms=5, ls="none", label="as sampled"),
        Line2D([], [], color=corrupted, **cross, label="under the corrupted image"),
        Line2D([], [], color=hidden, **cross, label="without the perception"),
        Line2D([], [], color="black", lw=1.5, label=f"step 4 cuts off here, at {limit:.0f} nats"),
    ]


# ---- distributions and intervals


def histogram(values: dict[Role, list[float]], limits: tuple[float, float], xlabel: str) -> Figure:
    """How the numbers of each role lie to the limits; the last bars hold what is beyond them."""
    figure = Figure((8.2, 2.8), dpi=100, layout="constrained")
    axes = figure.subplots()
    edges = [-4 + 0.2 * i for i in range(41)]
    clipped = []
    for numbers in values.values():
        clipped.append([min(3.99, max(-3.99, x)) for x in numbers])
    colors = [COLORS[role] for role in values]
    names = [role.name.lower() for role in values]
    axes.hist(clipped, edges, stacked=True, color=colors, label=names)
    axes.axvspan(*limits, color="black", alpha=0.15, lw=0, label="room between the limits")
    axes.set_xlabel(xlabel)
    axes.set_ylabel("tokens (stacked)")
    axes.legend(frameon=False)
    return figure


def intervals(rows: list[tuple], xlabel: str, height: float = 0.27) -> Figure:
    """A line a row, (label, low, middle, high, color), from top to bottom."""
    figure = Figure((8.2, 0.8 + height * len(rows)), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="black", lw=0.8, ls="--")
    for y, (_, low, middle, high, color) in enumerate(rows):
        draw_interval(axes, y, (low, middle, high), color)
    labels = [row[0] for row in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(xlabel)
    axes.grid(axis="x", color="#dddddd")
    return figure


def draw_interval(axes, y: float, found: tuple[float, float, float], color: str) -> None:
    """Low, middle and high as a line with a dot."""
    low, middle, high = found
    axes.plot([low, high], [y, y], color=color, lw=2.5, solid_capstyle="butt")
    axes.plot([middle], [y], "o", color=color, ms=5)


@dataclass
class Compared:
    """A row of a forest plot. One without intervals is the title of those below it."""

    label: str
    pairs: int = 0
    found: tuple = ()  # (low, middle, high) in each panel
    color: str = "black"


def forest(rows: list[Compared], heads: list[str], limits, lines: list[tuple], first: int):
    """Rows of intervals in a panel for each head, and the number of pairs at the right.

    `limits` are those of the x axes; rows outside are written as numbers at the edge. `lines` are
    vertical ones from the row `first` on: (color, place in each panel).
    """
    figure = Figure((9.2, 0.8 + 0.2 * len(rows)), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(heads))
    for i, (axes, head) in enumerate(zip(panels, heads, strict=True)):
        axes.axvline(0, color="black", lw=0.8, ls="--")
        for color, *places in lines:
            axes.plot([places[i]] * 2, [first - 0.5, len(rows) - 0.4], color=color, lw=1)
        for y, row in enumerate(rows):
            if row.found:
                draw_compared(axes, y, row.found[i], limits, row.color)
        axes.set_xlim(*limits)
        axes.locator_params(axis="x", nbins=5)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_title(head, loc="left", fontsize=9.5)
        axes.grid(axis="x", color="#dddddd")
        axes.set_yticks([])
        axes.tick_params(axis="both", length=0, labelsize=8.5)
    panels[0].set_yticks(range(len(rows)), [row.label for row in rows])
    for label, row in zip(panels[0].get_yticklabels(), rows, strict=True):
        if not row.found:
            label.set_fontweight("bold")
    panels[-1].yaxis.tick_right()
    numbered = [y for y, row in enumerate(rows) if row.found]
    panels[-1].set_yticks(numbered, [rows[y].pairs for y in numbered])
    panels[-1].set_title("pairs", loc="right", fontsize=8.5, x=1.08)
    panels[-1].tick_params(axis="both", length=0)
    return figure


def draw_compared(axes, y: int, found, limits: tuple[float, float], color: str) -> None:
    """The interval of a row, or its numbers where its middle lies below the axis."""
    low, middle, high = found
    if middle >= limits[0]:
        draw_interval(axes, y, found, color)
        return
    said = f"← {middle:.2f} [{low:.2f}, {high:.2f}]"
    place = (0.01, y)
    axes.annotate(said, place, xycoords=("axes fraction", "data"), va="center", fontsize=8.5)


def surrogate(weights, clip: float) -> Figure:
    """Step 8 for one token: the objective over the ratio, for A = 1 and for A = -1."""
    figure = Figure((8.4, 2.8), dpi=100, layout="constrained")
    ratios = [0.5 + 0.01 * i for i in range(101)]
    styles = (":", "-", "--")
    for axes, A in zip(figure.subplots(1, 2), (1.0, -1.0), strict=True):
        for weight, style in zip(weights, styles, strict=True):
            objective = []
            for ratio in ratios:
                clipped = min(1 + clip, max(1 - clip, ratio))
                objective.append(min(ratio * A * weight, clipped * A * weight))
            axes.plot(ratios, objective, color="black", ls=style, label=f"w = {weight}")
        axes.axvspan(1 - clip, 1 + clip, color="black", alpha=0.08, lw=0)
        axes.set_title(f"A = {A:+.0f}", loc="left")
        axes.set_xlabel("ratio")
        axes.set_ylabel("objective of a token")
        axes.legend(frameon=False)
    return figure


# ---- images


def image_table(rows: list[tuple], heads: list[str]) -> Figure:
    """(text, images) of each row: a sentence, and images beside it under their heads.

    In the place of an image None leaves a gap.
    """
    side = 1.05  # inches
    text_width = 3.4
    width = text_width + side * len(heads)
    figure = Figure((width, 0.25 + side * len(rows)), dpi=100, layout="constrained")
    ratios = [text_width] + [side] * len(heads)
    all_axes = figure.subplots(len(rows), len(ratios), squeeze=False, width_ratios=ratios)
    for row, (text, images) in zip(all_axes, rows, strict=True):
        row[0].text(0, 0.5, text, va="center", linespacing=1.4, transform=row[0].transAxes)
        for axes in row:
            axes.set_axis_off()
        for axes, image in zip(row[1:], images, strict=True):
            if image is not None:
                axes.imshow(image, interpolation="nearest")
    for axes, head in zip(all_axes[0, 1:], heads, strict=True):
        axes.set_title(head, fontsize=9.5)
    return figure


def image_grids(panels: list[tuple], side: int) -> Figure:
    """Images side by side, each (title, image, texts), with squares of `side` pixels over them.

    `texts` has rows of a text for each square.
    """
    figure = Figure((3.1 * len(panels), 3.1), dpi=100, layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, image, texts) in zip(all_axes, panels, strict=True):
        axes.imshow(image, interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(title, fontsize=10)
        for y, row in enumerate(texts):
            for x, text in enumerate(row):
                left = x * side - 0.5
                top = y * side - 0.5
                axes.add_patch(Rectangle((left, top), side, side, fill=False, lw=1.5))
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
                axes.text(left + 1, top + 1, text, ha="left", va="top", bbox=box)
    return figure
