"""Pictures to train on: a folder or a dataset of the Hub, as tensors and captions."""

import os
from pathlib import Path

import torch
from torch import Tensor

from configs import UserError, note, quoted
from models import picture_folders
from models.picture_folders import CAPTIONS
from models.pictures import load, square
from models.tables import words


def read(source: str, size_px: int) -> tuple[Tensor, dict[str, list]]:
    """Pictures (N, 3, size_px, size_px) in [-1, 1], cropped to squares, and what is known of them, by column.

    source: a folder of pictures, perhaps with .txt captions beside them or a metadata.jsonl or .csv
    (file_name, text, …), or a dataset id of the Hub. Columns are `file_name`, `text`, the caption, empty
    where there is none, and those of the metadata, None where a picture has no row. Says in one line what is
    used and what is left out. Raises UserError for what cannot be read.
    """
    if not source or os.path.exists(os.path.expanduser(source)):
        return _folder(source, size_px)
    return _dataset(source, size_px)


def _folder(source: str, size_px: int) -> tuple[Tensor, dict[str, list]]:
    folder = picture_folders.read(source)
    images, small = [], 0
    for path in folder.files:
        picture = load(path)
        small += min(picture.size) < size_px
        images.append(square(picture, size_px))
    note(folder.report + (f"; {small} smaller than {size_px} px are enlarged" if small else ""))
    columns = {
        name: [row.get(name) for row in folder.rows]
        for name in dict.fromkeys(name for row in folder.rows for name in row)
    }
    return torch.stack(images), {**columns, "text": folder.captions, "file_name": folder.names}


def _dataset(source: str, size_px: int) -> tuple[Tensor, dict[str, list]]:
    from datasets import Image as ImageColumn
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        rows = load_dataset(source, split="train")
    except (FileNotFoundError, ConnectionError):
        raise UserError(
            f"{quoted(source)} is neither a folder with pictures (.png, .jpg) nor a dataset that the Hub "
            f"gives"
        ) from None
    except (DatasetsError, OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise UserError(
            f"cannot read pictures from {quoted(source)}: {' '.join(str(error).split())[:200]}"
        ) from None
    column = next((name for name, kind in rows.features.items() if isinstance(kind, ImageColumn)), None)
    if column is None or not len(rows):
        raise UserError(f"{source} holds no pictures; it needs a column of images")
    cells = rows.cast_column(column, ImageColumn(decode=False))[column]
    if None in cells:
        raise UserError(f"{source}, row {cells.index(None)}: no picture")
    names = [Path(cell["path"] or f"row {row}").name for row, cell in enumerate(cells)]
    images = [
        square(load(Path(cell["path"]) if cell["bytes"] is None else cell["bytes"], name), size_px)
        for cell, name in zip(cells, names, strict=True)
    ]
    columns = {name: list(rows[name]) for name in rows.column_names if name != column}
    caption_column = next((name for name in CAPTIONS if name in columns), "")
    captions = [
        words(cell, f"{source}: {caption_column} of row {row}")
        for row, cell in enumerate(columns.get(caption_column, [""] * len(names)))
    ]
    unused = [name for name in columns if name != caption_column]
    note(
        f"{source}: {len(names)} pictures, {sum(map(bool, captions))} with a caption"
        + (f" by {caption_column}" if caption_column else "")
        + (f"; other columns: {', '.join(unused)[:200]}" if unused else "")
    )
    return torch.stack(images), {**columns, "text": captions, "file_name": names}
