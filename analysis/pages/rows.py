"""The table that is printed while a transfer is measured: a row per control as soon as it is decided."""

from collections.abc import Sequence

from analysis.pages import words
from analysis.pages.words import MARKS, brackets, number

WIDTH = 100  # columns of a row at the most
NAME, SOURCE = 15, 10  # of them for the control, and for the member it was trained on
LEGEND = "  ".join(f"{mark} {word}" for word, mark in MARKS.items()) + "  × the scale to use"


class Rows:
    """Prints each control once."""

    def __init__(self, targets: Sequence[str]):
        """targets: those that any control is judged on."""
        self.targets, self.printed = list(dict.fromkeys(targets)), set()

    def show(self, cells: list[dict]) -> None:
        """Prints the controls that were not printed yet; the heads before the first."""
        for (control, source), group in words.groups(list(map(words.led, cells))).items():
            judged = [cell for cell in group if words.is_verdict(cell)]
            if (control, source) in self.printed or not judged:
                continue
            if not self.printed:
                print(line("control", "from", [words.short(target) for target in self.targets]), flush=True)
            self.printed.add((control, source))
            texts = {cell["target"].partition("/")[2]: text(cell, len(self.targets)) for cell in judged}
            print(
                line(control, words.short(source), [texts.get(target, "") for target in self.targets]),
                flush=True,
            )


def text(cell: dict, beside: int) -> str:
    """A cell in few columns: verdict, retention, its interval where there is room, the scale to use."""
    if cell["retention"]["value"] is None:
        return f"{MARKS[cell['verdict']]} {cell['verdict']}"
    scale = cell["matched_scale"]["value"]
    use = [] if scale is None else [f"×{number(scale, 1)}"]
    parts = [MARKS[cell["verdict"]], number(cell["retention"]["value"]), brackets(cell["retention"]), *use]
    whole = " ".join(parts)
    return whole if len(whole) < room(beside) else " ".join(parts[:2] + use)


def room(targets: int) -> int:
    """Columns for a cell."""
    return max(12, (WIDTH - NAME - SOURCE) // max(1, targets))


def line(control: str, source: str, texts: Sequence[str]) -> str:
    """A row; one that is too long goes on in further lines, and a long name has one for itself."""
    width = room(len(texts))
    per_line = max(1, (WIDTH - NAME - SOURCE) // width)
    long = len(control) >= NAME
    head = cut("" if long else control, NAME) + cut(source, SOURCE)
    lines = [cut(control, WIDTH).rstrip()] if long else []
    for first in range(0, len(texts), per_line):
        parts = [cut(part, width) for part in texts[first : first + per_line]]
        lines.append((" " * len(head) if first else head) + "".join(parts).rstrip())
    return "\n".join(lines)


def cut(words: str, width: int) -> str:
    """A text in so many columns, one of them empty."""
    return (words if len(words) < width else f"{words[: width - 2]}…").ljust(width)
