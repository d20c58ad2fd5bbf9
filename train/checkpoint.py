"""A training loop that can be killed at any moment and continues to the same result."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from configs import replacing


def resumable(path: Path, state: dict[str, Any], steps: int, every: int, label: str = "", write: bool = True) -> Iterator[int]:
    """Yields the steps still to do, 0 … steps - 1; saves `state` to `path` every `every` steps and after the last.

    state: names to anything with state_dict() and load_state_dict(). If `path` exists, the state is loaded from it and the
    count goes on where it was saved. Randomness must depend on the step alone (see `seeded`), so no generator is stored.
    write: False in all but one process of a distributed run.
    """
    done = 0
    if Path(path).exists():
        saved = torch.load(path, map_location="cpu", weights_only=True)
        done = saved.pop("done")
        for name, part in state.items():
            part.load_state_dict(saved[name])
    for step in tqdm(range(done, steps), desc=label, initial=done, total=steps, mininterval=2, disable=not write):
        yield step
        if write and ((step + 1) % every == 0 or step + 1 == steps):
            store(path, state, step + 1)


def store(path: Path, state: dict[str, Any], done: int) -> None:
    """Writes the state after `done` steps."""
    with replacing(path) as new:
        torch.save({"done": done, **{name: part.state_dict() for name, part in state.items()}}, new)


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator that depends on the numbers alone, e.g. (seed, step, process)."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(seed)


def append(path: Path, values: dict) -> None:
    """Appends one JSON line."""
    with path.open("a") as lines:
        lines.write(json.dumps(values) + "\n")
