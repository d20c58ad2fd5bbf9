"""Picture files: the one reader of those that people have, to train on and to compare with."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from configs import UserError

SUFFIXES = (".png", ".apng", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "AVIF",
    "BMP",
    "GIF",
    "TIFF",
)  # by content; others may start programs, as EPS does
WHITE = (255, 255, 255, 255)

logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what it says of a broken file is said in the one line


def load(source: Path | bytes, name: str = "") -> Image.Image:
    """A picture as one sees it: RGB, upright, white where it is transparent; of several in one file the
    first.

    name: what to call it, where it is no path. Raises UserError in one line for what is no picture or too
    large to be a harmless one.
    """
    with _one_line(name or str(source)):
        with Image.open(
            io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS
        ) as image:
            return _on_white(_eight_bits(ImageOps.exif_transpose(image)))


def check(path: Path) -> None:
    """Raises UserError as `load` does for what can be seen without decoding."""
    with _one_line(str(path)), Image.open(path, formats=FORMATS) as image:
        image.verify()


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures and odd tags, which are read all the same
            yield
    except Exception as error:  # a decoder raises whatever it stumbles over
        said = (
            "cannot identify it"
            if "cannot identify" in str(error)
            else " ".join(str(error).split())[:130] or type(error).__name__
        )
        raise UserError(f"{name} is not a picture that can be read: {said}") from None


def square(image: Image.Image, size_px: int) -> Tensor:
    """The middle of a picture, (3, size_px, size_px) in [-1, 1]."""
    fitted = ImageOps.fit(image, (size_px, size_px), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """16 bits of grey, and floats from 0 to 1, as 8; everything else as it is.

    Raises ValueError for other numbers.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    grey, clear = np.asarray(image, dtype=np.float64), image.info.get("transparency")
    most = 1.0 if image.mode == "F" else 65535.0
    if not (np.isfinite(grey).all() and 0 <= grey.min() and grey.max() <= most):
        raise ValueError(
            f"its grey goes from {grey.min():g} to {grey.max():g}; from 0 to {most:g} is read, or 8 bits"
        )
    if isinstance(clear, int):
        grey[grey == clear] = most
    return Image.fromarray((grey * (255 / most)).round().astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    """Without the colours that transparency hides."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image.convert("RGBA")).convert("RGB")
