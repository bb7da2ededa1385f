"""The corrupted image of step 2, a PIL image of the same size and mode; and image files.

The same size means the same number of visual tokens, so that one response can be scored under both
images. What each corruption destroys, and what it keeps:

    kind      destroys                                      keeps
    patch     everything inside a share p of the patches    the other patches (default, p = 0.6)
    noise     fine detail, faint contrasts                  large shapes and strong colors
    blur      edges, texture, small text, fine shape        colors, places, coarse layout
    grey      color                                         brightness, shape, text, places
    shuffle   where things are, shapes beyond a patch       the content of every patch
    pixelate  everything finer than a patch                 each patch's mean color, layout

Every function depends on its seed alone. In training one corrupted image is drawn for each prompt
and shared by its whole group, so that the contrasts of its responses can be compared.
"""

import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter, ImageOps

# Each corruption takes colors as float32 [H, W, 3] from 0 to 255, the side of a patch in pixels,
# the strength p and a generator of random numbers. It returns colors of the same shape.


def patch_mask(pixels: np.ndarray, patch: int, p: float, rng: np.random.Generator) -> np.ndarray:
    """Paint a share p of all patches (rounded to a whole number) in the image's mean color."""
    height, width, _ = pixels.shape
    rows = -(-height // patch)  # rounded up: a patch that the edge cuts off counts, too
    columns = -(-width // patch)
    hit = np.zeros(rows * columns, dtype=bool)
    hit[rng.permutation(rows * columns)[: round(p * rows * columns)]] = True
    hit = hit.reshape(rows, columns)
    hit = hit.repeat(patch, axis=0).repeat(patch, axis=1)[:height, :width]
    return np.where(hit[..., None], pixels.mean((0, 1)), pixels)


def gaussian_noise(
    pixels: np.ndarray, patch: int, p: float, rng: np.random.Generator
) -> np.ndarray:
    """Add normal noise with standard deviation 255 p to every channel of every pixel."""
    return pixels + rng.normal(0, 255 * p, pixels.shape)


def blur(pixels: np.ndarray, patch: int, p: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian blur with a radius of p patches."""
    image = Image.fromarray(pixels.astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(p * patch)))


def grey(pixels: np.ndarray, patch: int, p: float, rng: np.random.Generator) -> np.ndarray:
    """Replace every color by its brightness (ITU-R 601)."""
    brightness = pixels @ np.float32([0.299, 0.587, 0.114])
    return brightness[..., None].repeat(3, axis=-1)


def patch_shuffle(pixels: np.ndarray, patch: int, p: float, rng: np.random.Generator) -> np.ndarray:
    """Permute the whole patches of the image; an edge that is cut off stays where it is."""
    rows = pixels.shape[0] // patch
    columns = pixels.shape[1] // patch
    shuffled = pixels.copy()
    for target, source in enumerate(rng.permutation(rows * columns)):
        y, x = divmod(target, columns)
        from_y, from_x = divmod(source, columns)
        square = pixels[
            from_y * patch : (from_y + 1) * patch, from_x * patch : (from_x + 1) * patch
        ]
        shuffled[y * patch : (y + 1) * patch, x * patch : (x + 1) * patch] = square
    return shuffled


def pixelate(pixels: np.ndarray, patch: int, p: float, rng: np.random.Generator) -> np.ndarray:
    """Fill every patch, also one that is cut off, with its mean color."""
    height, width, _ = pixels.shape
    small = np.asarray(Image.fromarray(pixels.astype(np.uint8)).reduce(patch))
    return small.repeat(patch, axis=0).repeat(patch, axis=1)[:height, :width]


CORRUPTIONS: dict[str, Callable[[np.ndarray, int, float, np.random.Generator], np.ndarray]] = {
    "patch": patch_mask,
    "noise": gaussian_noise,
    "blur": blur,
    "grey": grey,
    "shuffle": patch_shuffle,
    "pixelate": pixelate,
}


def corrupt(
    image: Image.Image, kind: str = "patch", *, patch: int = 14, p: float = 0.6, seed=0
) -> Image.Image:
    """The corrupted image of step 2.

    Args:
        image: any 8-bit PIL image. An alpha channel stays as it is; a palette is made again, so
            that its colors, and its transparency, are about those of before.
        kind: one of CORRUPTIONS.
        patch: side of a patch in pixels. Give the model's own, and an image that is already
            resized for it (`Policy.fit`): then a masked patch is one patch of the vision encoder.
        p: strength in [0, 1]: the share of masked patches, the level of noise, the radius of the
            blur. The other corruptions have no strength.
        seed: of the random draw; an int, or a sequence of them.
    Returns:
        A new image of the same size and mode.
    Raises ValueError: unknown kind, patch < 1, or p outside [0, 1].
    """
    if kind not in CORRUPTIONS:
        raise ValueError(f"unknown corruption {kind!r}; choose from {', '.join(CORRUPTIONS)}")
    if patch < 1 or not 0 <= p <= 1:
        raise ValueError(f"need patch >= 1 and p in [0, 1], got patch={patch}, p={p}")
    colors = np.asarray(image.convert("RGB"), dtype=np.float32)
    rng = np.random.default_rng(seed)
    pixels = CORRUPTIONS[kind](colors, patch, p, rng)
    result = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    result.putalpha(image.convert("RGBA").getchannel("A"))
    if image.mode == "P":
        # A new palette: the fill color need not be in the old one.
        return result.quantize(method=Image.Quantize.FASTOCTREE)
    return result.convert(image.mode)


def open_image(file) -> Image.Image:
    """Decode an image to RGB, upright, over white where it is transparent.

    Raises ValueError where it has too many pixels or is far too long, and Pillow's own errors
    where it is broken.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # see the limit below
        image = Image.open(file)
    size = f"{image.width}x{image.height} pixels"
    limit = Image.MAX_IMAGE_PIXELS
    if limit and image.width * image.height > limit:
        raise ValueError(f"too large: {size}, over {limit}; shrink it")
    if max(image.size) > 200 * min(image.size):
        raise ValueError(f"too long: {size}, over 200 to 1; crop it")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        # Over 8 bits, or fractions: Pillow would clip, so scale.
        values = np.asarray(image, dtype=np.float32)
        largest = max(255, values.max())
        if image.mode == "F" and values.max() <= 1:
            largest = 1
        values = values * (255 / largest)
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")
