"""Tables and texts as people have them: .csv, .tsv and .jsonl with other separators, line ends and encodings,
as rows.
"""

import csv
import json
import re
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from configs import UserError, quoted
from configs.ranges import checked

SUFFIXES = (".csv", ".tsv", ".jsonl")
MARKS = {
    BOM_UTF8: "utf-8",
    BOM_UTF32_LE: "utf-32",
    BOM_UTF32_BE: "utf-32",
    BOM_UTF16_LE: "utf-16",
    BOM_UTF16_BE: "utf-16",
}
LINE_END = re.compile(r"\r\n|\r|\n")  # str.splitlines also splits at characters that stand inside texts
Row = tuple[int, dict[str, Any]]  # its line or number in the file, counted as an editor does, and its cells


def text_of(path: Path) -> str:
    """A text file's text: UTF-8, or what its byte order mark says.

    Raises UserError for another encoding, naming the line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), None)
    try:
        text = data.decode("utf-8-sig" if encoding in (None, "utf-8") else encoding)
    except UnicodeDecodeError as error:
        line = 1 + len(LINE_END.findall(data[: error.start].decode("latin-1")))
        raise UserError(f"{path}, line {line}: not a text in UTF-8; save the file as UTF-8") from None
    if "\0" in text:
        raise UserError(
            f"{path} holds NUL characters, as UTF-16 without a byte order mark does; save the file as UTF-8"
        )
    return text


def lines_of(path: Path) -> list[str]:
    """The lines of a text file that hold something, stripped."""
    return [line.strip() for line in LINE_END.split(text_of(path)) if line.strip()]


def rows_of(path: Path, wanted: Sequence[str]) -> list[Row]:
    """The rows of a table with names in lower case, empty rows left out.

    wanted: names of which a table must have one; a .csv may be separated by whichever of , ; tab | gives it
    one. Raises UserError in one line that names the file and the row.
    """
    rows = _objects(path) if path.suffix.lower() == ".jsonl" else _cells(path, wanted)
    if rows and not any(name in row for name in wanted for _, row in rows):
        raise UserError(f"{path} has no column {', '.join(wanted)}; it has {', '.join(rows[0][1])[:80]}")
    return rows


def _objects(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(LINE_END.split(text_of(path)), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object; got {quoted(line, 40)}")
        rows.append((number, {name.strip().lower(): cell for name, cell in row.items()}))
    return rows


def _columns(path: Path, cells: list[str]) -> list[str]:
    names = [cell.strip().lower() for cell in cells]
    twice = {name for name in names if name and names.count(name) > 1}
    if twice:
        raise UserError(f"{path} has the column {quoted(min(twice))} twice")
    return names


def _cells(path: Path, wanted: Sequence[str]) -> list[Row]:
    text = text_of(path)
    separator = "\t" if path.suffix.lower() == ".tsv" else _separator(text, wanted)
    table = csv.reader(StringIO(text, newline=""), delimiter=separator, strict=True)
    names, rows, number = [], [], 1
    try:
        for cells in table:
            start, number = number, table.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if not names:
                names = _columns(path, cells)
                continue
            if len(cells) > len(names) and any(cell.strip() for cell in cells[len(names) :]):
                raise UserError(
                    f"{path}, line {start}: {len(cells)} cells under {len(names)} columns; "
                    f"a text with {separator!r} in it needs quotes: {quoted(separator.join(cells), 60)}"
                )
            rows.append((start, dict(zip(names, [*cells, *[""] * len(names)], strict=False))))
    except csv.Error as error:
        raise UserError(
            f"{path}, line {number}: {error}; is a quotation mark missing, or one too many?"
        ) from None
    return rows


def _separator(text: str, wanted: Sequence[str]) -> str:
    """Of , ; tab | the one by which the first row has a name that is wanted."""
    first = LINE_END.split(text.lstrip(), maxsplit=1)[0]
    for separator in ",;\t|":
        if {name.strip(' "').lower() for name in first.split(separator)} & set(wanted):
            return separator
    return ","


def words(cell: Any, where: str) -> str:
    """A cell as a text: a number is that text, nothing is the empty one.

    where: file and row, for the UserError that anything else raises.
    """
    if cell is None or isinstance(cell, float) and cell != cell:
        return ""
    if isinstance(cell, bool) or not isinstance(cell, (str, int, float)):
        raise UserError(f"{where}: a text is needed; got {quoted(cell, 40)}")
    return checked(str(cell).strip(), where)
