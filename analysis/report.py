"""A run folder to one page, report.html, that needs nothing else: python -m analysis.report [FOLDER]

FOLDER: of a run of transfer (default: runs/transfer/default), trace, diversity or similarity. Reads
results.json and the pictures it names. Images are embedded, charts are inline SVG, and no network is loaded.
"""

import sys
from pathlib import Path

import configs
from analysis.pages import diversity, similarity, trace, transfer
from analysis.results import read
from configs.errors import cut

PAGES = {
    "analysis.transfer": transfer,
    "analysis.trace": trace,
    "analysis.diversity": diversity,
    "analysis.similarity": similarity,
}
# what drawing a page raises where parts of a record are right by themselves, as `read` sees, but not beside
# each other
MISFITS = (LookupError, TypeError, ValueError, ArithmeticError, StopIteration, RecursionError)


def main() -> None:
    """`python -m analysis.report [FOLDER]`: writes the page and prints its path."""
    words = sys.argv[1:]
    if {"--help", "-h", "help"} & set(words):
        return print(__doc__)
    if len(words) > 1:
        raise configs.UserError("give one run folder: python -m analysis.report runs/transfer/default")
    print(build(Path(words[0] if words else "runs/transfer/default")))


def build(folder: Path) -> Path:
    """Writes report.html into the run folder of any analysis from its results.json and images, and returns
    its path.

    Raises UserError where results.json is missing, broken or of another schema.
    """
    folder = Path(folder)
    found = read(folder)
    try:
        page = PAGES[found["recipe"]].render(found, folder)
    except MISFITS as error:
        says = f"its parts do not belong together ({cut(f'{type(error).__name__}: {error}', 200)})"
        raise configs.UserError(f"{folder / 'results.json'}: {says}; run {found['recipe']} again") from error
    with configs.replacing(folder / "report.html") as new:
        new.write_text(page, encoding="utf-8", errors="replace")
    return folder / "report.html"


if __name__ == "__main__":
    configs.entry(main)
