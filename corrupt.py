"""Images: opened with care, and corrupted for step 2 (a PIL image in, one of the same size and mode out).

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

import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter, ImageOps

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
    for to, source in enumerate(order):
        (y, x), (v, u) = divmod(to, cols), divmod(int(source), cols)
        tile = pixels[v * patch : (v + 1) * patch, u * patch : (u + 1) * patch]
        out[y * patch : (y + 1) * patch, x * patch : (x + 1) * patch] = tile
    return out


def pixelate(pixels: np.ndarray, patch: int, p: float, rng: np.random.Generator) -> np.ndarray:
    """Fill every patch with its mean color."""
    out = pixels.copy()
    for y in range(0, pixels.shape[0], patch):
        for x in range(0, pixels.shape[1], patch):
            out[y : y + patch, x : x + patch] = pixels[y : y + patch, x : x + patch].mean((0, 1))
    return out


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
        A new image of the same size and mode.
    Raises:
        ValueError: unknown kind, patch < 1, or p outside [0, 1].
    """
    if kind not in CORRUPTIONS:
        raise ValueError(f"unknown corruption {kind!r}; choose from {', '.join(CORRUPTIONS)}")
    if patch < 1 or not 0 <= p <= 1:
        raise ValueError(f"need patch >= 1 and p in [0, 1], got patch={patch}, p={p}")
    mode, image = image.mode, image.convert("RGBA") if image.has_transparency_data else image
    colors = np.asarray(image.convert("RGB"), dtype=np.float32)
    pixels = CORRUPTIONS[kind](colors, patch, p, np.random.default_rng(seed))
    result = Image.fromarray(np.asarray(pixels).round().clip(0, 255).astype(np.uint8))
    if image.mode == "RGBA":
        result.putalpha(image.getchannel("A"))
    if mode == "P":  # a palette of its own: the fill color need not be in the old one
        return result.quantize(method=Image.Quantize.FASTOCTREE)
    return result.convert(mode)


def open_image(file) -> Image.Image:
    """Decode an image file to RGB, upright, and over white where it is transparent.

    Raises:
        ValueError: too many pixels, or far too long; Pillow's own errors where it is broken.
    """
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
