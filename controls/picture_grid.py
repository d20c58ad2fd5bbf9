"""Labelled grids of pictures, the only ones of the project."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from configs import replacing

LEFT_PX, TOP_PX = 150, 22  # for the rows' names, and for heads
Row = tuple[str, Sequence[str], Sequence[Tensor | None]]  # name, heads, pictures


def picture_grid(rows: Sequence[Row], path: Path, size_px: int) -> Path:
    """Writes a grid of pictures, heads above the first row and wherever they change; returns its path.

    Pictures are uint8 (3, H, W), or None for an empty place; all are shown size_px wide.
    """
    new_heads = [k == 0 or list(heads) != list(rows[k - 1][1]) for k, (_, heads, _) in enumerate(rows)]
    width = LEFT_PX + size_px * max(len(pictures) for *_, pictures in rows)
    page = Image.new("RGB", (width, TOP_PX * sum(new_heads) + size_px * len(rows)), "white")
    pen, font, y = ImageDraw.Draw(page), ImageFont.load_default(13), 0
    for new, (name, heads, pictures) in zip(new_heads, rows, strict=True):
        for k, head in enumerate(heads if new else ()):
            pen.text((LEFT_PX + (k + 0.5) * size_px, y + TOP_PX / 2), head, "black", font, anchor="mm")
        y += TOP_PX if new else 0
        pen.text((LEFT_PX - 8, y + size_px / 2), name, "black", font, anchor="rm")
        for k, picture in enumerate(pictures):
            if picture is not None:
                page.paste(tile(picture, size_px), (LEFT_PX + k * size_px, y))
        y += size_px
    with replacing(path) as file:
        page.save(file, compress_level=1)  # at 6 a third of a run with nothing new
    return path


def to_image(picture: Tensor) -> Image.Image:
    """A uint8 picture (3, H, W)."""
    return Image.fromarray(picture.permute(1, 2, 0).cpu().numpy())


def tile(picture: Tensor, size_px: int) -> Image.Image:
    """A picture at another size, its pixels seen where it is enlarged."""
    image = to_image(picture)
    how = Image.Resampling.NEAREST if image.width <= size_px else Image.Resampling.LANCZOS
    return image.resize((size_px, size_px), how)


def to_uint8(pictures: Tensor) -> Tensor:
    """Pictures in [-1, 1] as uint8."""
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()


def scale_heads(scales: Sequence[float]) -> list[str]:
    return [f"{scale:+g}" if scale else "0" for scale in scales]
