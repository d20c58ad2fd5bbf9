"""Pictures of traces: labelled sheets, sprites for the scrubber, an animation.

Pictures are uint8 (3, H, W) or None for an empty place.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from configs import replacing

THUMB_PX = 192  # the largest side at which a picture is kept
LEFT_PX, TOP_PX = 150, 22


def thumbs(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] as uint8, made smaller where they are larger than THUMB_PX."""
    if images.shape[-1] > THUMB_PX:
        images = F.interpolate(images, (THUMB_PX, THUMB_PX), mode="area")
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def to_image(picture: Tensor) -> Image.Image:
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


def sheet(
    rows: Sequence[tuple[str, Sequence[Tensor | None]]], heads: Sequence[str], path: Path, zoom: int = 1
) -> Path:
    """A PNG of (name, pictures) in rows under heads. All pictures have one size."""
    size = zoom * next(picture for _, row in rows for picture in row if picture is not None).shape[-1]
    page = Image.new(
        "RGB", (LEFT_PX + size * max(len(row) for _, row in rows), TOP_PX + size * len(rows)), "white"
    )
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for c, head in enumerate(heads):
        pen.text((LEFT_PX + (c + 0.5) * size, TOP_PX / 2), head, "black", font, anchor="mm")
    for r, (name, row) in enumerate(rows):
        pen.text((LEFT_PX - 8, TOP_PX + (r + 0.5) * size), name, "black", font, anchor="rm")
        for c, picture in enumerate(row):
            if picture is not None:
                page.paste(
                    to_image(picture).resize((size, size), Image.Resampling.NEAREST),
                    (LEFT_PX + c * size, TOP_PX + r * size),
                )
    with replacing(path) as new:
        page.save(new)
    return path


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
