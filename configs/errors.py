"""Errors: what the user can mend, in one line."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class UserError(Exception):
    """Something the user can mend: shown as one line, exit code 2."""


def note(line: str) -> None:
    """Says what a user should know and need not mend; of several processes the first one speaks."""
    if os.environ.get("RANK", "0") == "0":
        print("note: " + " ".join(line.split()))


def quoted(value: object, length: int = 80) -> str:
    """A value as a message shows it: in quotes, and no longer than a line."""
    text = str(value)
    return repr(text if len(text) <= length else text[:length] + "…")


def entry(main: Callable[[], None]) -> None:
    """Runs a command's main; what the user can mend becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print("error: " + " ".join(str(error).splitlines()), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        raise SystemExit(130) from None
