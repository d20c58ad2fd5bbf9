"""Prompt sets: texts and their seeds from files and from datasets of the Hub."""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from configs import ROOT, UserError

HUB = "hub:"
COLUMNS = ("prompt", "text", "caption")  # where a table may keep its texts, the first that is there


@dataclass(frozen=True)
class PromptSet:
    """N prompts; seeds (N) where the source fixes one for each, as COCO-30k's published table does, else None."""

    texts: list[str]
    seeds: list[int] | None = None

    def numbers(self, seeds: int, seed: int) -> list[int]:
        """The seed of every image, prompt by prompt, `seeds` each: from the prompt's own on, or else counted from `seed`."""
        own = self.seeds or [seed + p * seeds for p in range(len(self.texts))]
        return [first + s for first in own for s in range(seeds)]


def read(prompts: Sequence[str]) -> PromptSet:
    """What a config's prompts mean: each is a text, or a source of many, which takes its place.

    Sources: a .csv with a column prompt and perhaps evaluation_seed (case_number orders it, where it is there); a .txt with a prompt
    per line; hub:owner/dataset[:split[:column]]. FILE.csv:100 takes the first hundred. Seeds are kept when every
    prompt has one. Raises UserError for what cannot be read.
    """
    found = [pair for prompt in prompts for pair in _pairs(prompt)]
    seeds = [seed for _, seed in found if seed is not None]
    return PromptSet([text for text, _ in found], seeds if found and len(seeds) == len(found) else None)


def _pairs(prompt: str) -> list[tuple[str, int | None]]:
    """The texts of one entry, and the seed of each."""
    if prompt.startswith(HUB):
        return [(text, None) for text in _dataset(prompt.removeprefix(HUB))]
    file = re.fullmatch(r"(.+\.(?:csv|txt))(?::(\d+))?", prompt)
    if not file:
        return [(prompt, None)]
    return _file(file[1])[: int(file[2]) if file[2] else None]


def _file(prompt: str) -> list[tuple[str, int | None]]:
    """All of a .csv or a .txt."""
    path = next((place for place in (Path(prompt), ROOT / prompt) if place.is_file()), None)
    if path is None:
        raise UserError(f"no prompt file at {prompt}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{prompt} is no text file") from None
    found = _table(text, prompt) if prompt.endswith(".csv") else [(line.strip(), None) for line in text.splitlines() if line.strip()]
    if not found:
        raise UserError(f"{prompt} holds no prompts")
    return found


def _table(text: str, where: str) -> list[tuple[str, int | None]]:
    rows = list(csv.DictReader(StringIO(text, newline="")))
    column = next((name for name in COLUMNS if rows and name in rows[0]), None)
    if rows and column is None:
        raise UserError(f"{where} has no column {', '.join(COLUMNS)}; it has {', '.join(map(str, rows[0]))}")
    try:
        if rows and "case_number" in rows[0]:
            rows.sort(key=lambda row: int(row["case_number"]))
        return [(row[column].strip(), int(row["evaluation_seed"]) if row.get("evaluation_seed") else None) for row in rows]
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{where}: case_number and evaluation_seed must be whole numbers, and every row must have a prompt") from None


def _dataset(source: str) -> list[str]:
    """The texts of a dataset of the Hub, or of a folder."""
    from datasets import load_dataset  # some seconds, which commands without a dataset need not wait

    name, split, column = (source.split(":") + ["", ""])[:3]
    try:
        table = load_dataset(name, split=split or "train")
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot load the dataset {name}: {' '.join(str(error).split())[:200]}") from None
    column = column or next((known for known in COLUMNS if known in table.column_names), "")
    if column not in table.column_names:
        raise UserError(f"{name} has no column {column or ', '.join(COLUMNS)}; it has {', '.join(table.column_names)}")
    return [str(text) for text in table[column]]
