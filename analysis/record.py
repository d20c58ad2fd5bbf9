"""Results to their folder and to W&B; pictures beside them."""

import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from configs import replacing
from configs.tracking import Tracker


def write(results: dict, folder: Path) -> Path:
    """results.json, whole or not at all. Raises ValueError for a number that JSON does not have."""
    path = Path(folder) / "results.json"
    with replacing(path) as new:
        new.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    return path


def picture(columns: Tensor, path: Path) -> Path:
    """A sheet from uint8 pictures (K, n, 3, H, W): K scales in columns, n images in rows."""
    page = torch.cat(torch.cat(list(columns), -1).unbind(0), -2)
    with replacing(path) as new:
        Image.fromarray(page.permute(1, 2, 0).numpy()).save(new)
    return path


def overview(rows: dict[str, Tensor], scales: list[float], path: Path, zoom: int = 2) -> Path:
    """One face on every member: uint8 pictures (K, 3, H, W) per name in rows, scales in columns, both written beside them."""
    size = zoom * next(iter(rows.values())).shape[-1]
    left, top, font = 90, 22, ImageFont.load_default(14)
    page = Image.new("RGB", (left + size * len(scales), top + size * len(rows)), "white")
    pen = ImageDraw.Draw(page)
    for c, scale in enumerate(scales):
        pen.text((left + (c + 0.5) * size, top / 2), f"{scale:+g}" if scale else "0", "black", font, anchor="mm")
    for r, (name, pictures) in enumerate(rows.items()):
        pen.text((left - 8, top + (r + 0.5) * size), name, "black", font, anchor="rm")
        for c, one in enumerate(pictures):
            tile = Image.fromarray(one.permute(1, 2, 0).numpy()).resize((size, size), Image.Resampling.NEAREST)
            page.paste(tile, (left + c * size, top + r * size))
    with replacing(path) as new:
        page.save(new)
    return path


def track(results: dict, folder: Path, tracker: Tracker) -> None:
    """Logs the cells as a table, the key figures as scalars, the sheets as images, and the record as an artifact of type results."""
    cells = results["cells"]
    ends = lambda reading: [reading["value"], reading["low"], reading["high"]]  # noqa: E731
    columns = ["control", "source", "target", "verdict", "retention", "low", "high", "slope", "slope low", "slope high", "matched scale",
               "monotonicity", "preservation", "% CLIP change"]  # fmt: skip
    rows = [[c["control"], c["source"], c["target"], c["verdict"], *ends(c["retention"]), *ends(c["slope"]), c["matched_scale"]["value"],
             c["monotonicity"], c["preservation"], c["clip_change_percent"]] for c in cells]  # fmt: skip
    tracker.table("transfer", columns, rows)
    tracker.log({f"retention/{c['control']}/{c['target']}": c["retention"]["value"] for c in cells if c["retention"]["value"] is not None})
    for c in cells:
        caption = f"{c['control']} on {c['target']}, scales {c['scales']}"
        tracker.image(f"images/{c['control']}/{c['target']}", Path(folder) / c["picture"], caption)
        tracker.uses(c["control"])
    tracker.artifact(Path(folder) / "results.json", f"transfer-{Path(folder).name}", "results")
