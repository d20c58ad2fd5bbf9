"""What the commands of analysis share: their start, this process's share of the work, their record and its
page.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from analysis import report, wandb_log
from analysis.images import store
from analysis.images.cache import in_memory, in_turn, one_by_one
from configs import UserError, list_of, tracking
from models import budget, devices, forecast, plans, promptsets
from models.evaluators import Evaluator, chosen, load_evaluators
from models.families import DTYPES, Family, Memory
from models.forecast import Moment
from models.plans import plan_of
from models.promptsets import PromptSet


@dataclass
class Drawing:
    """What every command that draws takes."""

    family: str = "tiny"  # a card in configs/families, or the path of one
    prompts: list[str] = list_of()  # texts, or files and datasets of them; empty = the family card's prompts
    # images at once; 0 = as many as usual at their size (48; 4 at 1024 px); halved where memory does not
    # suffice
    batch_size: int = 0
    dtype: str = "auto"  # of the networks: auto (bf16 on a GPU, fp32 on a CPU), bf16, fp32
    quantize: str = ""  # networks packed: nf4, int8 (extra 8bit), int8-torchao (extra torchao); empty = whole
    memory: Memory = field(default_factory=Memory)  # what to do without, at the price of time; free to change
    dry_run: bool = False  # --dry-run: say what will be loaded and evaluated, and stop; needs no weights
    overwrite: bool = False  # start afresh instead of continuing
    wandb: str = "auto"  # auto, online, offline, disabled


@dataclass(frozen=True)
class Way:
    """A way to draw: a plan by a student, or by the base where no student takes part in it."""

    student: str
    plan: str

    @property
    def place(self) -> str:
        """The folder of its files in a run's."""
        return f"features-{plans.VERSION}/{self.student}/{self.plan}"

    @property
    def target(self) -> str:
        """As analysis.images.cache names it."""
        return self.student if self.plan in ("base", "student") else f"{self.student}:{self.plan}"


class Session:
    """A command at work: its config, its processes, its family and its folder."""

    def __init__(self, command: str, cfg: Drawing, free: tuple[str, ...]):
        """command: analysis.trace and so on. free: keys that a continued run may change. Raises UserError."""
        self.command, self.cfg, self.free, self.began = command, cfg, free, time.time()
        self.accelerator, self.folder = devices.start(cfg), Path(cfg.out) / cfg.name
        if cfg.dtype not in DTYPES:
            raise UserError(f"no dtype {cfg.dtype!r}; there are {', '.join(DTYPES)}")

    @property
    def first(self) -> bool:
        """Whether this is the process that writes the record."""
        return self.accelerator.is_main_process

    @cached_property
    def family(self) -> Family:
        """The family that draws; in a dry run a bare one."""
        cfg = self.cfg
        device = cfg.memory.planned(self.accelerator.device, cfg.dry_run)
        return Family(
            cfg.family, device, DTYPES[cfg.dtype], cfg.memory, cfg.dry_run, cfg.batch_size, cfg.quantize
        )

    @cached_property
    def bare(self) -> Family:
        """The family without weights, for a look at what would not fit."""
        return self.family if self.cfg.dry_run else Family(self.cfg.family, bare=True)

    @cached_property
    def evaluators(self) -> dict[str, Evaluator]:
        return load_evaluators(self.family.card, self.family.device, self.cfg.evaluators)

    @property
    def evaluator_names(self) -> Sequence[str]:
        return chosen(self.family.card, self.cfg.evaluators)

    def prompts(self, most: int | None = None) -> PromptSet:
        """The config's prompts, else the family card's, with so many further ones of its that they are
        `most`; from now on the config holds their texts.
        """
        card, given = self.family.card, self.cfg.prompts
        more = (most or 0) - len(card.prompts)
        further = [f"{card.more_prompts}:{more}"] if more > 0 and card.more_prompts else []
        prompts = promptsets.read(given or [*card.prompts, *further])
        self.cfg.prompts = prompts.texts
        return prompts

    def forecast(
        self, ways: Sequence, images: Sequence[int], at_once: int, controls: list, **how: bool
    ) -> None:
        """Prints what drawing these ways, so many images each, asks of the networks, and memory at its
        fullest.
        """
        each = [plan_of(self.family, way.target) for way in ways]
        calls = budget.nfe_by_member(zip(each, images, strict=True))
        turns = in_memory(in_turn(ways, self.family.card), self.family.card)
        names = self.evaluator_names
        self.say(calls, names, lambda: forecast.drawing(self.family, turns, at_once, controls, names, **how))

    def say(self, calls: dict, names: Sequence[str], moments: Callable[[], Iterable[Moment]]) -> None:
        """Prints what is loaded, evaluated and held at most."""
        family = self.family
        print(budget.forecast(family.card, calls, family.dtype, family.device, names, family.quantize))
        print(forecast.said(moments, family))

    def claim(self) -> None:
        """Takes the folder; nothing can refuse the run any more."""
        devices.claim(self.accelerator, self.cfg, self.free)

    @property
    def age(self) -> float:
        """Seconds since the command began."""
        return time.time() - self.began

    def share(self, jobs: list, cost: Callable[[Any], float] | None = None) -> list:
        """This process's part of the jobs, once all processes have seen the same: as many as the others', or
        as much by their cost.
        """
        self.accelerator.wait_for_everyone()
        mine, processes = self.accelerator.process_index, self.accelerator.num_processes
        return jobs[mine::processes] if cost is None else balanced(jobs, cost, processes)[mine]

    def draw(
        self, jobs: list, texts: list[str], make: Callable[[Any], dict[str, Tensor]], label: str
    ) -> None:
        """Makes the files that are not there yet, each process its share, network by network.

        jobs: ways with a file. texts: encoded first, after which the text encoders go; none where there are
        too many.
        """
        lost = store.missing(self.folder, [job.file for job in jobs])
        mine = self.share(in_turn([job for job in jobs if job.file in lost], self.family.card))
        if mine and texts:
            self.family.encode_all(texts)
        for job in one_by_one(mine, self.family, label, not self.first):
            store.write(self.folder / job.file, make(job), job.file)
        self.accelerator.wait_for_everyone()

    def record(self, **parts: Any) -> dict:
        """What results.json holds."""
        return {**wandb_log.header(self.command, self.cfg, self.began), **parts}

    def write(self, results: dict) -> Path:
        """Writes the record and its page, whose place it returns."""
        wandb_log.write(results, self.folder)
        return report.build(self.folder)

    def publish(self, results: dict, says: str, track: Callable, group: str) -> Path:
        """Writes the record and its page, says where that is and what was found, and logs all to W&B."""
        page = self.write(results)
        print(f"{says}\n{results['seconds']:.0f} seconds; report: {page}")
        with tracking.start(self.folder, asdict(self.cfg), self.command, group, self.cfg.wandb) as tracker:
            track(results, self.folder, tracker)
        return page


def balanced(jobs: list, cost: Callable[[Any], float], processes: int) -> list[list]:
    """Jobs in as many parts of about the same cost: the dearest first, each to the part that has least; in
    a part in their order.
    """
    parts: list[list[int]] = [[] for _ in range(processes)]
    costs = [cost(job) for job in jobs]
    for k in sorted(range(len(jobs)), key=lambda k: -costs[k]):
        min(parts, key=lambda part: sum(costs[j] for j in part)).append(k)
    return [[jobs[k] for k in sorted(part)] for part in parts]
