"""Devices: the processes of a run, as `accelerate launch` started them, and what they do together."""

import atexit
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from configs import UserError, folders, note, tracking
from models.families import DTYPES, fast_dtype

# what `accelerate launch` says in the environment: ways to cut a network in pieces, which nothing here does
SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config (tensor, context or sequence parallel)",
}


class Processes(Accelerator):
    """All processes of a run. Where one has ended, the others end with one line."""

    def wait_for_everyone(self) -> None:
        with _together():
            super().wait_for_everyone()

    def mean(self, tensors: list[Tensor]) -> list[Tensor]:
        """The mean of each tensor over all processes, in one exchange; the tensors themselves where there is
        one process.
        """
        if self.num_processes == 1 or not tensors:
            return tensors
        with _together():
            flat = self.reduce(torch.cat([tensor.flatten() for tensor in tensors]), "mean")
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def shared(self, value: Any) -> Any:
        """The first process's value, on all."""
        with _together():
            return broadcast_object_list([value])[0] if self.num_processes > 1 else value


def start(cfg: Any, free: tuple[str, ...] | None = None) -> Processes:
    """The processes of a command, after a look at its folder: what cannot be is said before anything is
    loaded or touched.

    free: as `folders.look` has it. Raises UserError for a setting of `accelerate launch` that is not heeded,
    for a W&B mode that there is not, and as `folders.look` does.
    """
    tracking.check(cfg.wandb)
    if not cfg.dry_run:
        folders.look(cfg, free)  # before the processes meet, so that none has claimed it yet
    device = "cpu" if _cpu() else torch.accelerator.current_accelerator().type
    heed(os.environ, cfg, device)
    if device == "cpu":
        crowded()
    found = Processes(cpu=_cpu(), mixed_precision="no")  # what was heeded is ours from here on
    atexit.register(_part)
    if (
        found.num_processes == 1
        and "ACCELERATE_MIXED_PRECISION" in os.environ
        and "MASTER_ADDR" in os.environ
    ):
        print(
            "note: this is one process; for more on CPUs: torchrun --nproc_per_node=N FILE …, or "
            "accelerate launch with mpirun_hostfile",
            file=sys.stderr,
            flush=True,
        )
    return found


def heed(settings: dict[str, str], cfg: Any, device: str) -> None:
    """Raises UserError for a setting of `accelerate launch` that says something else than the config does."""
    for name, what in SHARDED.items():
        if settings.get(name, "false").lower() in ("1", "true", "yes"):
            raise UserError(
                f"accelerate's {what} is not heeded: every process holds the whole network; choose a "
                f"launch without it"
                " (for less memory: memory.offload=true, quantize=nf4)"
            )
    dtype = DTYPES.get(cfg.dtype) or fast_dtype(torch.device(device))
    runs_in = next(name for name, kind in DTYPES.items() if kind is dtype)
    precision = settings.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", runs_in):
        instead = precision if precision in DTYPES else "bf16"
        raise UserError(
            f"accelerate's mixed_precision={precision} is not heeded: with dtype={cfg.dtype} the network "
            f"runs in {runs_in};"
            f" give dtype={instead}, or mixed_precision=no"
        )
    compiled, backend = cfg.memory.compile or "no", settings.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend not in ("no", compiled):
        raise UserError(
            f"accelerate's dynamo_backend={backend} is not heeded; give memory.compile={backend}, or "
            f"dynamo_backend=no"
        )
    batches, steps = (
        getattr(cfg, "gradient_accumulation_steps", 1),
        settings.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"),
    )
    if steps not in ("1", str(batches)):
        raise UserError(
            f"accelerate's gradient_accumulation_steps={steps} is not heeded; trainers have "
            f"gradient_accumulation_steps={batches}"
        )


def crowded() -> None:
    """Says when other work keeps cores busy on which this process's threads would wait for each other."""
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    if threads == 1:
        return
    busy = psutil.cpu_percent(0.2) / 100 * psutil.cpu_count()  # while this process sleeps
    if busy + threads > cores + 0.5:
        note(
            f"other work keeps {min(busy, cores):.1f} of {cores} cores busy; beside it {threads} threads can "
            f"be many times slower than one: OMP_NUM_THREADS=1 python -m …"
        )


def claim(processes: Accelerator, cfg: Any, free: tuple[str, ...] = ()) -> Path:
    """The folder of the run, claimed by the first process for all: see `folders.claim`.

    The others end with it where it is refused.
    """
    error = None
    if processes.is_main_process:
        try:
            folders.claim(cfg, free)
        except (UserError, OSError) as refusal:
            error = refusal
    if processes.num_processes > 1 and processes.shared(error is not None) and error is None:
        raise SystemExit(2)  # the first process says why
    if error:
        raise error
    return Path(cfg.out) / cfg.name


def _cpu() -> bool:
    return not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "false").lower() in (
        "1",
        "true",
        "yes",
    )


def _part() -> None:
    """Ends the connections of processes on CPUs, whose threads would else be torn down with the interpreter,
    which is a crash.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


@contextmanager
def _together():
    """An exchange between processes: that another one is gone is one line."""
    try:
        yield
    except RuntimeError as error:
        if not torch.distributed.is_initialized():
            raise
        raise UserError(
            f"another process of this run has ended ({str(error)[:80]}…); its own message says why; the "
            f"same command continues"
        ) from None
