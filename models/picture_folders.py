"""Folders of pictures with their captions, and what of them is left out."""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from unicodedata import normalize

from configs import UserError, quoted
from configs.ranges import checked
from models.pictures import SUFFIXES
from models.tables import rows_of, text_of, words

CAPTIONS = (
    "text",
    "caption",
    "prompt",
)  # columns of a metadata file that say what a picture shows, the first that is there
METADATA = ("metadata.jsonl", "metadata.csv")  # as `datasets` names them
BESIDE = (".txt", ".caption")  # a.txt or a.png.txt beside a.png


@dataclass
class Folder:
    """N pictures of a folder and of those in it, by their paths."""

    files: list[Path]
    names: list[str]  # N, relative to the folder
    rows: list[dict[str, Any]]  # N, of the metadata; empty where there is none
    captions: list[str]  # N, empty where there is none
    report: str  # one line: how many have which caption, and what is left out


def read(source: str) -> Folder:
    """What a folder of pictures holds.

    Hidden files are left out, everything else that is not used stands in the report.

    Raises UserError for a folder without pictures, for metadata that cannot be read or names none of the
    pictures.
    """
    folder = Path(os.path.expanduser(source))
    if not source or not os.path.isdir(folder):
        raise UserError(f"{quoted(source)} is not a folder of pictures")
    files = sorted(path for path in folder.rglob("*") if _seen(path, folder))
    pictures = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not pictures:
        kinds = f"; it has {_counted(path.suffix or path.name for path in files)}" if files else ""
        raise UserError(f"{folder} holds no pictures ({', '.join(SUFFIXES)}){kinds}")
    tables = [path for path in files if path.name.lower() in METADATA]
    rows, lost = _rows(tables)
    texts = {_key(path): path for path in files if path.suffix.lower() in BESIDE}
    beside = [next((texts[key] for key in _beside(path) if key in texts), None) for path in pictures]
    found = [rows.pop(_key(path), {}) for path in pictures]
    column = next((name for name in CAPTIONS if any(row.get(name) for row in found)), "")
    told = [
        words(row.get(column), f"{folder}: {column} of {path.name}")
        for path, row in zip(pictures, found, strict=True)
    ]
    if tables and not any(found):
        raise UserError(
            f"{tables[0]} names none of the {len(pictures)} pictures; file_name is a path from there, like "
            f"{pictures[0].name}"
        )
    captions = [text or (_caption(path) if path else "") for text, path in zip(told, beside, strict=True)]
    sources = [
        f"{column} of {tables[0].name}" if text else path.suffix if path and caption else ""
        for text, path, caption in zip(told, beside, captions, strict=True)
    ]
    used = {
        *pictures,
        *tables,
        *(path for path, source in zip(beside, sources, strict=True) if source in BESIDE),
    }
    left = [
        f"the column {name}" for name in CAPTIONS if name != column and any(row.get(name) for row in found)
    ] + lost
    left += [f"rows without a picture ({_some(path.name for path in rows)})"] if rows else []
    left += (
        [_counted(path.suffix or path.name for path in files if path not in used)]
        if len(used) < len(files)
        else []
    )
    names = [path.relative_to(folder).as_posix() for path in pictures]
    return Folder(pictures, names, found, captions, _report(folder, names, sources, left))


def _seen(path: Path, folder: Path) -> bool:
    parts = path.relative_to(folder).parts
    return not any(part.startswith(".") or part == "__MACOSX" for part in parts) and path.is_file()


def _key(path: Path) -> Path:
    """A path as two spellings of it agree: ü in one or two characters, capital letters or not."""
    return Path(normalize("NFC", str(path)).lower())


def _beside(path: Path) -> Iterable[Path]:
    """Where a picture's caption may stand."""
    for suffix in BESIDE:
        yield _key(path.with_suffix(suffix))
        yield _key(path.with_name(path.name + suffix))


def _caption(path: Path) -> str:
    return checked(" ".join(text_of(path).split()), str(path))


def _rows(tables: list[Path]) -> tuple[dict[Path, dict[str, Any]], list[str]]:
    """The rows of metadata files by the picture that each names, and what is odd about them."""
    found, twice = {}, 0
    for table in tables:
        for number, row in rows_of(table, ("file_name",)):
            name = row.pop("file_name", None)
            if not isinstance(name, str) or not name.strip():
                raise UserError(f"{table}, line {number}: no file_name")
            key = _key(Path(os.path.normpath(table.parent / PurePosixPath(name.strip().replace("\\", "/")))))
            twice += key in found
            found.setdefault(key, row)
    return found, [f"{twice} second rows of one picture"] if twice else []


def _report(folder: Path, names: list[str], sources: list[str], left: list[str]) -> str:
    """One line for a reader who wonders where a caption is."""
    own = [f"{n} by {source}" for source, n in Counter(source for source in sources if source).items()]
    bare = [name for name, source in zip(names, sources, strict=True) if not source]
    own += [f"{len(bare)} pictures have none ({_some(bare)})"] if own and bare else []
    told = f"captions: {', '.join(own)}" if own else "no captions"
    return f"{folder}: {len(names)} pictures, {told}" + (f"; left out: {', '.join(left)}" if left else "")


def _counted(kinds: Iterable[str]) -> str:
    """3 .heic, 1 .json: what there is most of, first."""
    counts = Counter(kinds).most_common()
    more = [f"{len(counts) - 5} other kinds"] if len(counts) > 5 else []
    return ", ".join([f"{n} {kind[:30]}" for kind, n in counts[:5]] + more)


def _some(names: Iterable[str]) -> str:
    """The first three."""
    names = list(names)
    return ", ".join(name[:60] for name in names[:3]) + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )
