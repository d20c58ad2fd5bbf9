"""Errors: what the user can mend, in one line."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST = 600  # characters of a message


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


def entry(main: Callable, schema: type | None = None) -> None:
    """Runs a command's main, with its config where there is a schema.

    What the user can mend, files and disks included, becomes one line on stderr and exit code 2.
    A command that is told to end (SIGTERM) ends as one that is interrupted: what it borrowed is given back.
    """
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        if schema:
            from configs.options import load  # which needs what stands here

            main(load(schema))
        else:
            main()
    except UserError as error:
        fail(str(error))
    except BrokenPipeError:  # who read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        fail(explained(error))
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def fail(message: str) -> None:
    """Prints one line, never longer than a screen, and ends with exit code 2."""
    print(f"error: {cut(message, MOST)}", file=sys.stderr)
    raise SystemExit(2) from None


def explained(error: OSError) -> str:
    """What the system says, and of which file."""
    if error.strerror and error.filename:
        return f"{cut(str(error.filename), 200)}: {error.strerror}"
    return error.strerror or str(error) or type(error).__name__


def cut(text: object, most: int = 100) -> str:
    """A text in one line of printable characters, its middle left out where it is longer than `most`."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return text if len(text) <= most else f"{text[: most * 2 // 3]} … {text[3 - most // 3 :]}"


def _terminated(*_) -> None:
    print("stopped; the same command continues", file=sys.stderr)
    raise SystemExit(128 + signal.SIGTERM)
