"""Prompt sets: texts and their seeds from files and from datasets of the Hub."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs import ROOT, UserError, note, quoted
from configs.ranges import checked
from models.tables import lines_of, rows_of, words

HUB = "hub:"
COLUMNS = ("prompt", "text", "caption")  # where a table may keep its texts, the first that is there
SEED = "evaluation_seed"  # as COCO-30k's published table calls it
Row = tuple[str, int | None, int | None]  # a text, its seed, its case number
LARGEST = 2**62  # seed: the images of a prompt count on from it
FILE = re.compile(r"(.+\.(?:csv|tsv|jsonl|txt))(?::(\S*))?", re.IGNORECASE | re.DOTALL)
OTHER = re.compile(
    r"\S+\.(?:json|ya?ml|parquet|xlsx?)", re.IGNORECASE
)  # files too, of kinds that are not read


@dataclass(frozen=True)
class PromptSet:
    """N prompts; seeds (N) and case numbers (N) where the source fixes one for each, as COCO-30k's published
    table does, else None.
    """

    texts: list[str]
    seeds: list[int] | None = None
    cases: list[int] | None = None

    def numbers(self, seeds: int, seed: int) -> list[int]:
        """The seed of every image, prompt by prompt, `seeds` each: from the prompt's own on, or else counted
        from `seed`.
        """
        own = self.seeds or [seed + p * seeds for p in range(len(self.texts))]
        return [first + s for first in own for s in range(seeds)]


def read(prompts: Sequence[str]) -> PromptSet:
    """What a config's prompts mean: each is a text, or a source of many, which takes its place.

    Sources: a .csv, .tsv or .jsonl with a column prompt and perhaps evaluation_seed (case_number orders it,
    where it is there); a .txt with a prompt per line; hub:owner/dataset[:split[:column]]. FILE.csv:100 takes
    the first hundred. Seeds are kept when every prompt has one. Raises UserError for none, or unreadable.
    """
    rows = [row for prompt in prompts for row in _rows(prompt)]
    if not rows:
        raise UserError(
            "there are no prompts, neither given nor on the family's card; prompts=[...] gives them"
        )
    texts, seeds, cases = ([row[k] for row in rows] for k in range(3))
    if None in seeds and any(seed is not None for seed in seeds):
        first = quoted(texts[seeds.index(None)], 40)
        without = f"{seeds.count(None)} of {len(rows)} prompts have no {SEED}, such as {first}"
        note(f"{without}; the others' seeds are not used either")
    return PromptSet(texts, None if None in seeds else seeds, None if None in cases else cases)


def _rows(prompt: str) -> list[Row]:
    """The texts of one entry, with the seed and the case number of each."""
    if prompt.startswith(HUB):
        return [(text, None, None) for text in _dataset(prompt.removeprefix(HUB))]
    file = FILE.fullmatch(prompt)
    if file and file[2] is not None and not os.path.isfile(prompt):  # a file may have a colon in its name
        if not file[2].isdecimal() or len(file[2]) > 18 or not int(file[2]):
            example = f"{Path(file[1]).name}:100 takes the first hundred"
            raise UserError(f"{quoted(prompt)}: how many of the file's prompts? {example}")
        return _file(file[1])[: int(file[2])]
    if file:
        return _file(prompt)
    is_file = "." in prompt and os.path.isfile(prompt)
    if OTHER.fullmatch(prompt) or is_file or (os.sep in prompt and os.path.isdir(prompt)):
        raise UserError(f"{quoted(prompt)} is no prompt file: .csv, .tsv, .jsonl and .txt are read")
    if not prompt.strip():
        raise UserError("a prompt is empty; leave it out, or write what it should draw")
    return [(checked(prompt, "prompts"), None, None)]


def _file(prompt: str) -> list[Row]:
    """All of a table or a .txt."""
    path = next((Path(place) for place in (prompt, ROOT / prompt) if os.path.isfile(place)), None)
    if path is None:
        raise UserError(f"no prompt file at {quoted(prompt)}")
    texts = path.suffix.lower() == ".txt"
    found = [(checked(line, str(path)), None, None) for line in lines_of(path)] if texts else _table(path)
    if not found:
        raise UserError(f"{prompt} holds no prompts")
    return found


def _table(path: Path) -> list[Row]:
    rows = rows_of(path, COLUMNS)
    names, found = {name for _, row in rows for name in row}, []
    column = next((name for name in COLUMNS if name in names), "")
    for number, row in rows:
        where = f"{path}, line {number}"
        text, order = words(row.get(column), where), row.get("case_number")
        if not text:
            raise UserError(f"{where}: no {column}")
        if (order is None or order == "") and "case_number" in names:
            raise UserError(f"{where}: no case_number, by which the other rows are ordered")
        found.append((text, _whole(row.get(SEED), SEED, where), _whole(order, "case_number", where)))
    return sorted(found, key=lambda row: row[2] or 0)


def _whole(cell: str | float | None, column: str, where: str) -> int | None:
    """A cell's whole number, also 41337.0 as tables with gaps write it; None for an empty one."""
    if cell is None or cell == "" or cell != cell:
        return None
    found = re.fullmatch(r"\s*(\d{1,19})(\.0*)?\s*", str(cell))
    if isinstance(cell, bool) or not found or int(found[1]) > LARGEST:
        raise UserError(f"{where}: {column} must be a whole number from 0 to 2^62; got {quoted(cell, 40)}")
    return int(found[1])


def _dataset(source: str) -> list[str]:
    """The texts of a dataset of the Hub, or of a folder."""
    from datasets import load_dataset  # some seconds, which commands without a dataset need not wait
    from datasets.exceptions import DatasetsError

    name, split, column = (source.split(":") + ["", ""])[:3]
    try:
        table = load_dataset(name, split=split or "train")
    except (DatasetsError, OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise UserError(f"cannot load the dataset {name}: {' '.join(str(error).split())[:200]}") from None
    column = column or next((known for known in COLUMNS if known in table.column_names), "")
    if column not in table.column_names:
        wanted, there = column or ", ".join(COLUMNS), ", ".join(table.column_names)
        raise UserError(f"{name} has no column {wanted}; it has {there}")
    prompts = [words(text, f"{name}, row {row}") for row, text in enumerate(table[column])]
    if not prompts:
        raise UserError(f"{name} holds no prompts")
    if "" in prompts:
        raise UserError(f"{name}, row {prompts.index('')}: no {column}")
    return prompts
