"""Pictures to train on: a folder, a dataset of the Hub, or the embedded world, as tensors and captions."""

import io
from pathlib import Path

import numpy as np
import torch
from datasets import Image as ImageColumn
from datasets import load_dataset
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from configs import UserError


def read(source: str, size_px: int) -> tuple[Tensor, dict[str, list]]:
    """Pictures (N, 3, size_px, size_px) in [-1, 1], cropped to squares, and the other columns of the dataset.

    source: a folder in `datasets`' imagefolder layout (pictures, perhaps a metadata.jsonl or .csv with file_name, text, …), or a dataset id
    of the Hub. The column `file_name` is added where a picture has a path. Raises UserError for an empty folder or an unreadable picture.
    """
    try:
        local = {"path": "imagefolder", "data_dir": source, "drop_labels": True}
        rows = load_dataset(**local if Path(source).is_dir() else {"path": source}, split="train")
    except (FileNotFoundError, ConnectionError):
        raise UserError(f"{source} is neither a folder with pictures (.png, .jpg) nor a dataset that the Hub gives") from None
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read pictures from {source}: {' '.join(str(error).split())[:200]}") from None
    column = next((name for name, kind in rows.features.items() if isinstance(kind, ImageColumn)), None)
    if column is None or not len(rows):
        raise UserError(f"{source} holds no pictures; it needs .png or .jpg files, or a column of images")
    cells = rows.cast_column(column, ImageColumn(decode=False))[column]
    names = [Path(cell["path"] or f"row {row}").name for row, cell in enumerate(cells)]
    images = torch.stack([square(cell, name, size_px) for cell, name in zip(cells, names, strict=True)])
    return images, {**{name: list(rows[name]) for name in rows.column_names if name != column}, "file_name": names}


def square(cell: dict, name: str, size_px: int) -> Tensor:
    """One picture of a dataset, its middle, (3, size_px, size_px) in [-1, 1]. Raises UserError when it is none."""
    try:
        with Image.open(cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"])) as image:
            fitted = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (size_px, size_px), Image.Resampling.LANCZOS)
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{name} is not a picture that can be read: {str(error)[:100]}") from None
    return torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1).float() / 127.5 - 1
