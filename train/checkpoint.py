"""A training loop that can be killed at any moment and continues to the same result."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from configs import UserError, replacing

LAST: dict[Path, int] = {}  # log: the last step that this process wrote to it


def resumable(
    path: Path,
    state: dict[str, Any],
    steps: int,
    every: int,
    label: str = "",
    write: bool = True,
    bound: str = "",
) -> Iterator[int]:
    """Yields the steps still to do, 0 … steps - 1; saves `state` to `path` every `every` steps and after the
    last.

    state: names to anything with state_dict() and load_state_dict(). If `path` exists, the state is loaded
    from it and the count goes on where it was saved. Randomness must depend on the step alone (see `seeded`),
    so no generator is stored. write: False in all but one process of a distributed run. bound: the hash of
    the config that the state belongs to. Raises UserError for a file that is damaged, or of another config.
    """
    done = restore(Path(path), state, steps, bound) if Path(path).exists() else 0
    for step in tqdm(
        range(done, steps), desc=label, initial=done, total=steps, mininterval=2, disable=not write
    ):
        yield step
        if write and ((step + 1) % every == 0 or step + 1 == steps):
            store(path, state, step + 1, bound)


def store(path: Path, state: dict[str, Any], done: int, bound: str = "") -> None:
    """Writes the state after `done` steps."""
    with replacing(path) as new:
        torch.save(
            {"done": done, "bound": bound, **{name: part.state_dict() for name, part in state.items()}}, new
        )


def restore(path: Path, state: dict[str, Any], steps: int, bound: str = "") -> int:
    """Loads the state, and returns how many steps it has done."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        done, saved_bound = saved.pop("done"), saved.pop("bound", "")  # which an older version did not write
        if not isinstance(done, int) or not 0 <= done <= steps:
            raise ValueError(f"it has done {done} of {steps} steps")
        if saved_bound and bound and saved_bound != bound:
            raise ValueError("it belongs to a run of another config")
        for name, part in state.items():
            part.load_state_dict(saved[name])
    except Exception as error:  # torch, pickle and zipfile each say it in their own ways
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:150]
        afresh = "overwrite=true" if bound else "to remove it"
        raise UserError(f"cannot go on from {path} ({reason}); {afresh} starts afresh") from None
    return done


def progress(path: Path) -> int:
    """How many steps the state in a file has done; 0 where there is none.

    Raises UserError as `restore` does.
    """
    return restore(path, {}, sys.maxsize) if path.exists() else 0


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator that depends on the numbers alone, e.g. (seed, step, process)."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(seed)


def append(path: Path, values: dict) -> None:
    """Appends one JSON line.

    Lines of the same step or a later one, as a killed run leaves them after its last checkpoint, go first.
    """
    step = values.get("step")
    if step is not None and step <= LAST.get(path, step) and path.exists():
        _cut(path, step)
    with path.open("a") as lines:
        lines.write(json.dumps(values) + "\n")
    LAST[path] = step


def _cut(path: Path, step: int) -> None:
    """Leaves the lines of the steps before this one."""
    lines = path.read_text(errors="replace").splitlines()
    kept = [line for line in lines if _step(line) < step]
    if len(kept) < len(lines):
        with replacing(path) as new:
            new.write_text("".join(f"{line}\n" for line in kept))


def _step(line: str) -> float:
    """The step of a line; infinite for one that was not written to its end."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
