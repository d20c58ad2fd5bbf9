"""Pages: one template each, filled by jinja2 with everything escaped; pictures are embedded, nothing is
fetched.

Imports no torch. The frame is page.html, its style page.css, its script page.js, its parts parts.html.
"""

import base64
import io
import json
import math
import struct
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from analysis.pages import charts, words
from configs import UserError
from configs.errors import cut

FOLDER = Path(__file__).parent
KINDS = {".png": "image/png", ".gif": "image/gif", ".webp": "image/webp", ".jpg": "image/jpeg"}
TILE_PX = 256  # a page is mailed: wider tiles of a sheet are embedded at this width
TINY_PX = 200  # below this a tile is shown as pixels, not smoothed


def render(template: str, **values: Any) -> str:
    """A page as text."""
    return ENVIRONMENT.get_template(template).render(**values)


def source(name: str) -> Markup:
    """A file of this folder as it is: a style, a script."""
    return Markup((FOLDER / name).read_text(encoding="utf-8"))


def hue(weight: float, more: bool) -> str:
    """A style: blue for more, orange for less, the stronger the larger its weight, from 0 to 1."""
    return f"--hue: var(--{'more' if more else 'less'}); --weight: {0.04 + 0.46 * min(weight, 1.0):.2f}"


def lacking(value: float | None) -> str:
    """Orange for what 1 lacks."""
    return "" if value is None else hue(max(1 - value, 0), False)


def around_one(value: float | None) -> str:
    """Orange below 1, blue above, full at half and at double."""
    if value is None:
        return ""
    return hue(abs(math.log2(value)) if value > 0 else 1.0, value >= 1)


def around_zero(value: float | None) -> str:
    """Orange below 0, blue above, full at ±1."""
    return "" if value is None else hue(abs(value), value >= 0)


def png_size(data: bytes) -> tuple[int, int]:
    """Width and height of a PNG in pixels, from its header. Raises UserError for another format."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 24:
        raise UserError("a picture of the run is not a PNG file; draw it again with overwrite=true")
    width, height = struct.unpack(">II", data[16:24])
    if not (width and height):
        raise UserError("a picture of the run has no pixels; draw it again with overwrite=true")
    return width, height


def embedded(path: Path, width_px: int | None = None) -> str:
    """A picture file as an image's src; one wider than width_px is embedded smaller, as WebP.

    Raises UserError.
    """
    if path.suffix not in KINDS:
        raise UserError(f"{path} is no picture of a page; those are {', '.join(KINDS)}")
    data, kind = path.read_bytes(), KINDS[path.suffix]
    if width_px and png_size(data)[0] > width_px:
        data, kind = smaller(data, width_px, path), KINDS[".webp"]
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def smaller(data: bytes, width_px: int, path: Path) -> bytes:
    """A PNG as a WebP of another width; path: what a damaged one is called."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            size = (width_px, max(1, round(picture.height * width_px / picture.width)))
            small = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        why = cut(str(error), 100)
        raise UserError(f"{path} is damaged ({why}); draw it again with overwrite=true") from None
    small.save(file := io.BytesIO(), "WEBP", quality=85)
    return file.getvalue()


def sheet(path: Path, columns: int) -> dict:
    """A PNG sheet of so many columns: its src, its size, and whether its pixels are to be seen."""
    width, height = png_size(path.read_bytes())
    src = embedded(path, TILE_PX * columns)
    return {"src": src, "width": width, "height": height, "pixels": width < TINY_PX * columns}


def indented(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


ENVIRONMENT = Environment(
    loader=FileSystemLoader(FOLDER),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters |= {
    name: getattr(words, name)
    for name in ("number", "ranged", "shown", "percent", "signed", "brackets", "small")
}
ENVIRONMENT.filters |= {
    "lacking": lacking,
    "around_one": around_one,
    "around_zero": around_zero,
    "json": json.dumps,
}
ENVIRONMENT.tests |= {"verdict": words.is_verdict}
ENVIRONMENT.globals |= {
    **{"source": source, "embedded": embedded, "sheet": sheet, "indented": indented},
    **{"words": words, "charts": charts, "DASH": words.DASH},
}
