"""Sampling: one update rule, stages as data, a generator of steps. Every network speaks x0."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from configs import UserError
from models.denoiser import Denoiser
from models.noise import CLEAN, LAWS, Noise, timesteps, to_eps
from models.prompts import Prompts

Eta = float | Callable[[Noise, Noise], float]


@dataclass(frozen=True)
class Member:
    """One model of a family, ready to run: its denoiser and how it wants to be sampled."""

    name: str  # family/member
    denoiser: Denoiser
    levels: tuple[Noise, ...]  # falling; the network is evaluated at each
    law: str = "vp"
    eta: Eta = 0.0  # share of fresh noise in an update: 0 DDIM and Euler, 1 LCM and DMD2
    guidance: float | None = None
    final: Noise = CLEAN  # where the last update goes
    start: str = "unit"  # the first x is eps ("unit": DDIM, LCM) or sigma eps ("sigma": Euler trailing)


def levels_of(law: str, spacing: str, steps: int, explicit: Sequence[float] = ()) -> tuple[Noise, ...]:
    """The noise levels of a schedule; explicit timesteps win over the spacing."""
    at = LAWS[law][0]
    return tuple(at(t) for t in (explicit or timesteps(spacing, steps)))


@dataclass(frozen=True)
class Stage:
    """A member run over a falling list of noise levels."""

    member: Member
    levels: tuple[Noise, ...]
    within: Callable[[], AbstractContextManager] = nullcontext  # held while the network is asked, e.g. a control at a strength

    @classmethod
    def of(cls, member: Member, levels: Sequence[Noise]) -> "Stage":
        """The member on another's levels: the same sigma / alpha in the member's own law."""
        return cls(member, tuple(level if level in member.levels else LAWS[member.law][1](level.ratio) for level in levels))


@dataclass(frozen=True)
class Plan:
    """Stages end to end, and where they start and finish."""

    name: str
    stages: tuple[Stage, ...]

    @property
    def steps(self) -> int:
        """How many updates it makes."""
        return sum(len(stage.levels) for stage in self.stages)


def alone(member: Member) -> Plan:
    """The member by itself: the plans `base` and `student`."""
    return Plan(member.name, (Stage(member, member.levels),))


def hybrid(base: Member, student: Member, k: int = 1) -> Plan:
    """The base on the student's first k noise levels, the student after them (the paper's diversity distillation)."""
    return _two(f"hybrid({k})", base, student.levels[: _count(k, student)], student, student.levels[k:])


def late(base: Member, student: Member, k: int = 1) -> Plan:
    """The student first, the base on the last k levels."""
    cut = len(student.levels) - _count(k, student)
    return _two(f"late({k})", student, student.levels[:cut], base, student.levels[cut:])


def skip(student: Member, k: int = 1) -> Plan:
    """The student without its first k steps, started from pure noise at its level k: the control experiment to hybrid."""
    if k >= len(student.levels):
        raise UserError(f"skip({k}) leaves nothing of {student.name}'s {len(student.levels)} steps")
    return Plan(f"skip({k})", (Stage(student, student.levels[_count(k, student) :]),))


PLANS: dict[str, Callable[[Member, Member, int], Plan]] = {
    "hybrid": hybrid,
    "late": late,
    "skip": lambda _, student, k: skip(student, k),
    "few": lambda _, member, k: few(member, k),
}


def named(text: str, base: Member, student: Member) -> Plan:
    """The plan that a name means for a base and a student: hybrid(1), late(2), skip(1). Raises UserError for another."""
    found = re.fullmatch(r"(\w+)\((\d+)\)", text.strip())
    if not found or found[1] not in PLANS:
        raise UserError(f"no plan {text!r}; there are {', '.join(f'{name}(k)' for name in PLANS)}, k a number of steps")
    return PLANS[found[1]](base, student, int(found[2]))


def during(plan: Plan, holds: Callable[[Noise], bool], within: Callable[[], AbstractContextManager]) -> Plan:
    """The same plan with `within` held at the noise levels where `holds` is true, and there alone."""
    stages = [replace(stage, levels=(level,), within=within if holds(level) else stage.within)
              for stage in plan.stages for level in stage.levels]  # fmt: skip
    return replace(plan, stages=tuple(stages))


def few(member: Member, steps: int) -> Plan:
    """The member in a few trailing steps and without guidance, as a student is sampled: what is left is due to its weights."""
    levels = levels_of(member.law, "trailing", steps)
    return Plan(f"few({steps})", (Stage(replace(member, guidance=None, levels=levels), levels),))


def _count(k: int, student: Member) -> int:
    if not 0 <= k <= len(student.levels):
        raise UserError(f"k must be 0 … {len(student.levels)}, the steps of {student.name}; got {k}")
    return k


def _two(name: str, first: Member, early: Sequence[Noise], second: Member, rest: Sequence[Noise]) -> Plan:
    stages = [Stage.of(member, levels) for member, levels in ((first, early), (second, rest)) if levels]
    return Plan(name, tuple(stages))


@dataclass(frozen=True)
class Step:
    """One update of a member: at `noise` it held x, saw x0 and went on to `after`."""

    index: int
    member: Member
    noise: Noise
    x: Tensor  # (B, C, H, W), in the member's law
    x0: Tensor  # (B, C, H, W)
    after: Tensor  # (B, C, H, W), at the next level, in the next member's law


def update(x: Tensor, x0: Tensor, now: Noise, after: Noise, eta: Eta = 0.0, fresh: Tensor | None = None) -> Tensor:
    """x at the next level: eps = (x - alpha x0) / sigma; eps <- sqrt(1 - eta^2) eps + eta fresh; alpha' x0 + sigma' eps.

    Reproduces DDIM and Euler (eta 0), LCM and DMD2 (eta 1), Euler-ancestral (eta = noise.ancestral) and flow Euler.
    Between laws it converts by itself, for eps means the same in all of them. All tensors (B, C, H, W).
    """
    eps = to_eps(x, x0, now)
    eta = eta(now, after) if callable(eta) else eta
    if eta:
        eps = (1 - eta**2) ** 0.5 * eps + eta * fresh
    return after.alpha * x0 + after.sigma * eps


def draw_noise(seeds: Sequence[int], shape: tuple[int, ...], steps: int, device="cpu") -> Tensor:
    """All noise of each image from its own generator: (B, steps + 1, *shape), first the initial, then one per step.

    Image i depends on seeds[i] alone, so it is the same alone or in a batch, and plans with the same seeds are paired.
    """
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(int(seed))
        rows.append(torch.stack([torch.randn((1, *shape), generator=generator)[0] for _ in range(steps + 1)]))
    return torch.stack(rows).to(device)


def sample(plan: Plan, noise: Tensor, prompts: Prompts) -> Iterator[Step]:
    """Runs the plan; the last step's `after` is the finished latent.

    noise: (B, ≥ plan.steps + 1, C, H, W) from `draw_noise`. prompts: B of them, with a negative side where a member guides.
    """
    todo = [(stage, level) for stage in plan.stages for level in stage.levels]
    if noise.shape[1] <= len(todo):
        raise UserError(f"{plan.name} needs noise for {len(todo)} steps, got {noise.shape[1] - 1}")
    first, level = todo[0]
    x = noise[:, 0] * (level.sigma if first.member.start == "sigma" else 1.0)
    for index, (stage, now) in enumerate(todo):
        member = stage.member
        after = todo[index + 1][1] if index + 1 < len(todo) else member.final
        with stage.within():
            x0 = member.denoiser(x, now, prompts, member.guidance)
        following = update(x, x0, now, after, member.eta, noise[:, index + 1]) if after.sigma else x0
        yield Step(index, member, now, x, x0, following)
        x = following


def finish(plan: Plan, noise: Tensor, prompts: Prompts) -> Tensor:
    """The finished latents of a plan, (B, C, H, W)."""
    x = None
    for step in sample(plan, noise, prompts):
        x = step.after
    return x
