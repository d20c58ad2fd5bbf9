"""How long a training step of the embedded family's students takes."""

import shutil
import tempfile
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from configs import ROOT
from train import tiny_parts, tiny_students
from train.bench.sdxl import Row, Rows, now


def rows(names: list[str], steps: int, batch_size: int | None, compile: bool) -> Rows:
    """Each student as it is, then compiled where asked."""
    for name in names:
        yield name, lambda name=name: taught(name, steps, batch_size, False)
    for name in names if compile else ():
        yield f"{name}, compiled", lambda name=name: taught(name, steps, batch_size, True)


def taught(name: str, steps: int, batch_size: int | None, compile: bool) -> Row:
    """Seconds of one step, by the second half of them, and of all before that: data, teacher, compiling."""
    device, marks = "cuda" if torch.cuda.is_available() else "cpu", []
    with tempfile.TemporaryDirectory() as folder:  # with a copy of the base: no shipped student is replaced
        shutil.copytree(ROOT / tiny_parts.WEIGHTS / "base", Path(folder) / "weights/base")
        cfg = tiny_parts.Config(
            steps,
            batch_size,
            compile=compile,
            device=device,
            work=f"{folder}/work",
            weights=f"{folder}/weights",
            faces=80,
            trajectories=80,  # data for a few steps
        )
        start, hook = now(), register_optimizer_step_post_hook(lambda *_: marks.append(now()))
        try:
            getattr(tiny_students, name)(cfg)
        finally:
            hook.remove()
    late, each = marks[len(marks) // 2 :], len(marks) / steps  # dmd's step has three of the optimizers'
    seconds = (late[-1] - late[0]) / (len(late) - 1) * each
    return {
        "steps": steps,
        "batch_size": batch_size or "its own",
        "seconds_per_step": seconds,
        "seconds_before": late[0] - start,
    }
