"""Tests of images: every corruption on every kind of image, and how files are opened.

pip install pytest, then python -m pytest -q extras/test_images.py
"""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from corrupt import CORRUPTIONS, corrupt, open_image  # noqa: E402


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
@pytest.mark.parametrize("size", [(1, 1), (48, 48), (31, 17)])
def test_corruptions_keep_size_and_mode_and_follow_the_seed(kind, mode, size):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    before = image.tobytes()
    first = corrupt(image, kind, patch=8, seed=5)
    again = corrupt(image, kind, patch=8, seed=5)
    other = corrupt(image, kind, patch=8, seed=6)
    assert first.size == size
    assert first.mode == mode
    assert image.tobytes() == before
    assert first.tobytes() == again.tobytes()
    if size == (1, 1):
        return
    if mode != "L":  # grey changes nothing that is grey
        assert first.convert("RGB").tobytes() != image.convert("RGB").tobytes()
    if kind in ("patch", "noise", "shuffle"):
        assert first.tobytes() != other.tobytes()


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruptions_leave_transparency_as_it_is(kind):
    image = Image.new("RGBA", (48, 48), (200, 10, 10, 77))
    assert corrupt(image, kind, patch=8).getchannel("A").getextrema() == (77, 77)


@pytest.mark.parametrize("options", [{"kind": "melt"}, {"p": 2.0}, {"patch": 0}])
def test_a_corruption_that_cannot_be_is_refused(options):
    with pytest.raises(ValueError, match="corruption|need patch"):
        corrupt(Image.new("RGB", (8, 8)), **options)


def test_images_of_16_bits_are_scaled(tmp_path):
    deep = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert len(set(open_image(tmp_path / "deep.png").getchannel(0).tobytes())) > 50


def test_images_of_fractions_are_scaled(tmp_path):
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "fractions.tiff")
    assert open_image(tmp_path / "fractions.tiff").getpixel((0, 0)) == (127, 127, 127)


def test_transparent_images_lie_on_white(tmp_path):
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
