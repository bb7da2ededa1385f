"""Images: corrupted for step 2 (a PIL image in, one of the same size and mode out), opened, and drawn.

The same size means the same number of visual tokens, so a response can be scored under both images. What each
corruption destroys, and what it keeps:

    kind      destroys                                        keeps
    patch     everything inside a share p of the patches      the other patches (the default, p = 0.6)
    noise     fine detail, faint contrasts                    large shapes and strong colors, at any place
    blur      edges, texture, small text, fine shape          colors, places, coarse layout
    grey      color                                          brightness, shape, text, places
    shuffle   where things are, shapes larger than a patch    the content of every patch, all colors
    pixelate  everything finer than a patch                   each patch's mean color, coarse layout

Every function is deterministic in its seed. In training one corrupted image is drawn a prompt, for the whole
group, so that the contrasts of its responses can be compared.
"""

import hashlib
import re
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

# A corruption takes colors as float32 [H, W, 3] in 0..255, a patch side in pixels, the share p, a generator.


def patch_mask(pixels: np.ndarray, patch: int, p: float, rng: np.random.Generator) -> np.ndarray:
    """Paint a share p of the patch x patch squares (their rounded number) in the image's mean color."""
    rows, cols = -(-pixels.shape[0] // patch), -(-pixels.shape[1] // patch)  # cut-off ones too
    hit = np.zeros(rows * cols, bool)
    hit[rng.permutation(rows * cols)[: round(p * rows * cols)]] = True
    hit = hit.reshape(rows, cols).repeat(patch, 0).repeat(patch, 1)[: pixels.shape[0], : pixels.shape[1]]
    return np.where(hit[..., None], pixels.mean((0, 1)), pixels)


def gaussian_noise(pixels: np.ndarray, patch: int, p: float, rng: np.random.Generator) -> np.ndarray:
    """Add normal noise with standard deviation 255 p to every channel of every pixel."""
    return pixels + rng.normal(0, 255 * p, pixels.shape)


def blur(pixels: np.ndarray, patch: int, p: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian blur with a radius of p patches."""
    image = Image.fromarray(pixels.astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(p * patch)))


def grey(pixels: np.ndarray, patch: int, p: float, rng: np.random.Generator) -> np.ndarray:
    """Replace every color by its brightness (ITU-R 601)."""
    return (pixels @ np.float32([0.299, 0.587, 0.114]))[..., None].repeat(3, -1)


def patch_shuffle(pixels: np.ndarray, patch: int, p: float, rng: np.random.Generator) -> np.ndarray:
    """Permute the whole patches of the image among themselves; a cut-off edge stays where it is."""
    rows, cols = pixels.shape[0] // patch, pixels.shape[1] // patch
    out, order = pixels.copy(), rng.permutation(rows * cols)
    squares = [slice(i * patch, (i + 1) * patch) for i in range(max(rows, cols))]
    for to, source in enumerate(order):
        (y, x), (v, u) = divmod(to, cols), divmod(source, cols)
        out[squares[y], squares[x]] = pixels[squares[v], squares[u]]
    return out


def pixelate(pixels: np.ndarray, patch: int, p: float, rng: np.random.Generator) -> np.ndarray:
    """Fill every patch, a cut-off one too, with its mean color."""
    small = np.asarray(Image.fromarray(pixels.astype(np.uint8)).reduce(patch))
    return small.repeat(patch, 0).repeat(patch, 1)[: pixels.shape[0], : pixels.shape[1]]


CORRUPTIONS: dict[str, Callable[[np.ndarray, int, float, np.random.Generator], np.ndarray]] = {
    "patch": patch_mask,
    "noise": gaussian_noise,
    "blur": blur,
    "grey": grey,
    "shuffle": patch_shuffle,
    "pixelate": pixelate,
}


def corrupt(image: Image.Image, kind="patch", *, patch: int = 14, p: float = 0.6, seed=0) -> Image.Image:
    """The corrupted image of step 2.

    Args:
        image: any 8-bit PIL image; transparency stays as it is.
        kind: one of CORRUPTIONS.
        patch: side of a patch in pixels. Give the model's own, on an image already resized for the model
            (`Policy.fit`): then a masked patch is exactly one patch of the vision encoder.
        p: strength in [0, 1]: share of masked patches, noise level, blur radius; the others have none.
        seed: of the draw; an int, or a sequence of them.
    Returns:
        A new image of the same size and mode. ValueError for an unknown kind, patch < 1 or p not in [0, 1].
    """
    if kind not in CORRUPTIONS:
        raise ValueError(f"unknown corruption {kind!r}; choose from {', '.join(CORRUPTIONS)}")
    if patch < 1 or not 0 <= p <= 1:
        raise ValueError(f"need patch >= 1 and p in [0, 1], got patch={patch}, p={p}")
    colors = np.asarray(image.convert("RGB"), dtype=np.float32)
    pixels = CORRUPTIONS[kind](colors, patch, p, np.random.default_rng(seed))
    result = Image.fromarray(np.asarray(pixels).round().clip(0, 255).astype(np.uint8))
    result.putalpha(image.convert("RGBA").getchannel("A"))
    if image.mode == "P":  # a palette of its own: the fill color need not be in the old one
        return result.quantize(method=Image.Quantize.FASTOCTREE)
    return result.convert(image.mode)


def open_image(file) -> Image.Image:
    """Decode an image file to RGB, upright, and over white where it is transparent. ValueError where it has
    too many pixels or is far too long, Pillow's own errors where it is broken."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is checked below
        image = Image.open(file)
    with image:
        size, limit = f"{image.width}x{image.height} pixels", Image.MAX_IMAGE_PIXELS or float("inf")
        if image.width * image.height > limit:
            raise ValueError(f"too large: {size}, over {limit}; shrink it")
        if max(image.size) > 200 * min(image.size):
            raise ValueError(f"too long: {size}, over 200 to 1; crop it")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":  # over 8 bits: scale, not clip
            values = np.asarray(image, dtype=np.float32)
            image = Image.fromarray((values * (255 / max(255, values.max()))).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")


# ----------------------------------------------------------------------------------------------- drawn scenes

COLORS = {"red": (220, 40, 40), "green": (40, 170, 70), "blue": (50, 80, 220), "yellow": (235, 200, 40)}
SHAPES = ("circle", "square", "triangle")
CELLS = tuple(column + row for row in "123" for column in "abc")
HINT = (
    "The image is a grid of 3 columns a, b, c from left to right and 3 rows 1, 2, 3 from top to bottom. In "
    "the perception list every object as its cell, color and shape, like: a1 red circle c2 blue square. "
    f"Colors: {', '.join(COLORS)}."
)


@dataclass(frozen=True)
class Fact:
    cell: str
    color: str
    shape: str

    def __str__(self):
        return f"{self.cell} {self.color} {self.shape}"


@dataclass(frozen=True)
class Query:
    """What is asked: about one color or shape in count, about two in compare and add."""

    task: str
    args: tuple[str, ...]

    def text(self) -> str:
        forms = {"count": "How many {}?", "compare": "More {} or more {}?", "add": "How many {} plus {}?"}
        return forms[self.task].format(*self.args)

    def evidence(self, facts: Collection[Fact]) -> tuple[frozenset, ...]:
        """All that the answer depends on: for each argument, the cells of the things that it is true of."""
        return tuple(frozenset(f.cell for f in facts if arg in (f.color, f.shape)) for arg in self.args)

    def solve(self, facts: Collection[Fact]) -> str:
        """The answer that follows from `facts`, right or wrong."""
        counts = [len(cells) for cells in self.evidence(facts)]
        if self.task == "compare":
            return "same" if counts[0] == counts[1] else self.args[counts[0] < counts[1]]
        return str(sum(counts))

    def reasoning(self, facts: Sequence[Fact]) -> str:
        parts = []
        for arg, cells in zip(self.args, self.evidence(facts), strict=True):
            marks = [f" {f.cell} {arg if f.cell in cells else 'no'}" for f in facts]
            parts.append("".join(marks) + f" so {len(cells)}")
        return ",".join(parts)


@dataclass(frozen=True)
class Example:
    """One question. Drawn tasks know `scene` and `query`; `source` names file and line of a user's row."""

    images: tuple[Image.Image, ...]
    question: str
    answer: str
    scene: tuple[Fact, ...] | None = None
    query: Query | None = None
    hint: str = ""
    source: str = ""
    response: str = ""  # to imitate


def draw_scene(scene: Sequence[Fact], size: int, rng: np.random.Generator) -> Image.Image:
    """A scene, size x size pixels; place, radius, shade and background vary a little from draw to draw."""
    y, x = np.indices((size, size)) * 160 // size  # less red to the right, less green below: places show
    image = Image.fromarray((rng.integers(235, 255, 3) - np.dstack([x, y, 0 * x])).astype(np.uint8))
    draw, cell = ImageDraw.Draw(image), size / 3
    for fact in scene:
        x, y = (np.array(divmod(CELLS.index(fact.cell), 3))[::-1] + 0.5 + rng.uniform(-0.06, 0.06, 2)) * cell
        r = cell * rng.uniform(0.32, 0.40)
        fill = tuple(int(v) for v in np.clip(np.array(COLORS[fact.color]) + rng.integers(-15, 16, 3), 0, 255))
        if fact.shape == "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        elif fact.shape == "square":
            draw.rectangle((x - r * 0.9, y - r * 0.9, x + r * 0.9, y + r * 0.9), fill=fill)
        else:
            draw.polygon([(x, y - r), (x + r, y + r * 0.9), (x - r, y + r * 0.9)], fill=fill)
    return image


def is_held_out(scene: Sequence[Fact]) -> bool:
    """One scene in ten belongs to the evaluation, by its content: no scene is ever in both splits."""
    return hashlib.sha256(";".join(map(str, scene)).encode()).digest()[0] % 10 == 0


def draw_example(task: str, rng, *, held_out: bool, size: int, objects: tuple[int, int]) -> Example:
    """An example of `task`, from training or held-out scenes, with `objects` = (fewest, most) shapes."""
    kinds = [(color, shape) for color in COLORS for shape in SHAPES]
    while True:
        n = int(rng.integers(objects[0], objects[1] + 1))
        args = tuple(str(a) for a in rng.choice([*COLORS, *SHAPES], 2, replace=False))
        args = args[: 1 if task == "count" else 2]
        match = [k for k in kinds if args[0] in k]
        other = [k for k in kinds if args[0] not in k]
        wanted = int(rng.integers(1, n + 1))  # so that no count is much more common than another
        pools = [match] * wanted + [other] * (n - wanted)
        cells = sorted(int(c) for c in rng.permutation(len(CELLS))[:n])
        pools = [pools[i] for i in rng.permutation(n)]
        facts = zip(cells, pools, strict=True)
        scene = tuple(Fact(CELLS[c], *pool[rng.integers(len(pool))]) for c, pool in facts)
        query = Query(task, args)
        if is_held_out(scene) == held_out and all(query.evidence(scene)):  # there is something to see
            image = draw_scene(scene, size, rng)
            return Example((image,), query.text(), str(query.solve(scene)), scene, query, hint=HINT)


def parse_facts(text: str) -> set[Fact]:
    """The facts stated in a perception: cell, color, shape, in any sentence that has them in this order."""
    cell, color, shape = ("|".join(words) for words in (CELLS, COLORS, SHAPES))
    form = rf"\b({cell})\W+(?:(?:is|has|a|an|the)\W+)*({color})\W+({shape})\b"
    return {Fact(*map(str.lower, found)) for found in re.findall(form, text, re.IGNORECASE)}
