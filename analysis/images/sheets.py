"""Pictures of traces: thumbnails, sprites for the scrubber, an animation.

Pictures are uint8 (3, H, W) or None for an empty place.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from configs import replacing
from controls.picture_grid import to_image, to_uint8

THUMB_PX = 192  # the largest side at which a picture is kept


def thumbs(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] as uint8, made smaller where they are larger than THUMB_PX."""
    if images.shape[-1] > THUMB_PX:
        images = F.interpolate(images, (THUMB_PX, THUMB_PX), mode="area")
    return to_uint8(images)


def sprite(above: Tensor, below: Tensor, path: Path) -> Path:
    """One WebP with the steps from left to right, x_t (T, 3, H, W) above and x0 below; lossless where
    pictures are small.
    """
    strip = torch.cat([torch.cat(list(above), -1), torch.cat(list(below), -1)], -2)
    with replacing(path) as new:
        to_image(strip).save(new, format="WEBP", lossless=above.shape[-1] < THUMB_PX, quality=85)
    return path


def animation(
    frames: Sequence[Sequence[Sequence[Tensor]]], path: Path, zoom: int = 1, milliseconds: int = 400
) -> Path:
    """A GIF; a frame is rows of pictures. The last frame stands longer."""
    pages = [to_image(torch.cat([torch.cat(list(row), -1) for row in rows], -2)) for rows in frames]
    pages = [page.resize((page.width * zoom, page.height * zoom), Image.Resampling.NEAREST) for page in pages]
    with replacing(path) as new:
        pages[0].save(
            new,
            format="GIF",
            save_all=True,
            append_images=pages[1:],
            loop=0,
            duration=[milliseconds] * (len(pages) - 1) + [4 * milliseconds],
        )
    return path


def reached(steps: int, share: float) -> int:
    """The last of so many steps that is done after a share of the run, 0 before the first is: what every
    member shows at that moment.
    """
    return max(0, int(share * steps + 1e-9) - 1)
