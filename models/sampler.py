"""Sampling: one update rule, stages as data, a generator of steps. Every network speaks x0."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from configs import UserError
from models.denoiser import Denoiser
from models.noise import CLEAN, NOISE_SCHEDULES, Band, Noise, timesteps, to_eps
from models.prompts import Prompts

Eta = float | Callable[[Noise, Noise], float]


@dataclass(frozen=True)
class Member:
    """One model of a family, ready to run: its denoiser and how it wants to be sampled."""

    name: str  # family/member
    denoiser: Denoiser
    levels: tuple[Noise, ...]  # falling; the network is evaluated at each
    noise_schedule: str = "vp"
    eta: Eta = 0.0  # share of fresh noise in an update: 0 DDIM and Euler, 1 LCM and DMD2
    guidance: float | None = None
    final: Noise = CLEAN  # where the last update goes
    start: str = "unit"  # the first x is eps ("unit": DDIM, LCM) or sigma eps ("sigma": Euler trailing)
    shifted: Callable[[int], tuple[Noise, ...]] | None = None  # a flow's own schedule of so many steps
    teacher_guidance: float | None = (
        None  # of the base when this member was distilled from it; None = unknown
    )

    def in_steps(self, steps: int, spacing: str = "trailing") -> tuple[Noise, ...]:
        """The levels of another number of steps; flows know no spacing but their own."""
        return self.shifted(steps) if self.shifted else levels_of(self.noise_schedule, spacing, steps)


def levels_of(
    noise_schedule: str, spacing: str, steps: int, explicit: Sequence[float] = ()
) -> tuple[Noise, ...]:
    """The noise levels of a schedule; explicit timesteps win over the spacing."""
    at = NOISE_SCHEDULES[noise_schedule][0]
    return tuple(at(t) for t in (explicit or timesteps(spacing, steps)))


@dataclass(frozen=True)
class Mix:
    """What is made of x0: keep x0 + (1 - keep) times what somebody else sees, or nothing."""

    keep: float
    beside: "Member | None" = None  # who else is asked; None = nobody, x0 fades
    # (own noise, shape) -> the initial noise that it is asked about, so only a first step can do this; None =
    # the same x
    another: Callable[[Tensor, tuple[int, ...]], Tensor] | None = None
    # own noise (B, C, H, W) -> (B,) which images this happens to; None = all
    some: Callable[[Tensor], Tensor] | None = None

    def __call__(
        self, x0: Tensor, x: Tensor, now: Noise, conditioning: Prompts, own: Tensor, noise_schedule: str
    ) -> Tensor:
        """x0, x: (B, C, H, W) at `now` in `noise_schedule`; conditioning: the network's; own: the images'
        initial noise.
        """
        if self.beside is None:
            return self.keep * x0
        keep = self.keep
        if self.some:
            keep = torch.where(self.some(own), keep, 1.0).to(x0)[:, None, None, None]
        there = (
            now
            if self.beside.noise_schedule == noise_schedule
            else NOISE_SCHEDULES[self.beside.noise_schedule][1](now.ratio)
        )
        if self.another:
            x = self.another(own, tuple(x.shape[1:])) * (there.sigma if self.beside.start == "sigma" else 1.0)
        else:
            x = x * (there.alpha / now.alpha)  # the same eps in both schedules
        seen = self.beside.denoiser(x, there, conditioning, self.beside.guidance)
        return keep * x0 + (1 - keep) * seen


@dataclass(frozen=True)
class Stage:
    """A member run over a falling list of noise levels, and what is done differently there."""

    member: Member
    levels: tuple[Noise, ...]
    # held while the network is asked, e.g. a control at a strength
    within: Callable[[], AbstractContextManager] = nullcontext
    # (prompts, level, own noise) -> what the network is told instead
    conditioning: Callable[[Prompts, Noise, Tensor], Prompts] | None = None
    mix: Mix | None = None  # what is made of x0

    @classmethod
    def of(cls, member: Member, levels: Sequence[Noise]) -> "Stage":
        """The member on another's levels: the same sigma / alpha in the member's own noise schedule."""
        return cls(
            member,
            tuple(
                level if level in member.levels else NOISE_SCHEDULES[member.noise_schedule][1](level.ratio)
                for level in levels
            ),
        )

    @property
    def members(self) -> list[Member]:
        """Who is asked at each level."""
        return [self.member, *([self.mix.beside] if self.mix and self.mix.beside else [])]

    @property
    def nfe_by_member(self) -> Counter[str]:
        """Network evaluations per image, by member."""
        each = Counter()
        for member in self.members:
            each[member.name] += len(self.levels) * (1 if member.guidance is None else 2)
        return each


@dataclass(frozen=True)
class Adapter:
    """A control's part in a plan: its scale, and the noise levels at which it acts."""

    scale: float
    band: Band


@dataclass(frozen=True)
class Plan:
    """Stages end to end, and where they start and finish."""

    name: str
    stages: tuple[Stage, ...]
    start: Callable[[Tensor], Tensor] | None = None  # what is made of the initial noise (B, C, H, W)
    adapter: "Adapter | None" = None  # a control that belongs to it, whose file the run names

    @property
    def steps(self) -> int:
        """How many updates it makes."""
        return sum(len(stage.levels) for stage in self.stages)

    @property
    def nfe_by_member(self) -> Counter[str]:
        """Network evaluations per image, guidance's second one included, by member."""
        return sum((stage.nfe_by_member for stage in self.stages), Counter())

    @property
    def nfe(self) -> int:
        """The same of all members together."""
        return self.nfe_by_member.total()

    @property
    def members(self) -> list[Member]:
        """Who is asked, stage by stage."""
        return [member for stage in self.stages for member in stage.members]


def alone(member: Member) -> Plan:
    """The member by itself: the plans `base` and `student`."""
    return Plan(member.name, (Stage(member, member.levels),))


def during(plan: Plan, holds: Callable[[Noise], bool], within: Callable[[], AbstractContextManager]) -> Plan:
    """The same plan with `within` held too at the noise levels where `holds` is true, and there alone."""
    stages = [
        replace(
            stage,
            levels=(level,),
            within=partial(_both, stage.within, within) if holds(level) else stage.within,
        )
        for stage in plan.stages
        for level in stage.levels
    ]
    return replace(plan, stages=tuple(stages))


@contextmanager
def _both(
    outer: Callable[[], AbstractContextManager], inner: Callable[[], AbstractContextManager]
) -> Iterator[None]:
    with outer(), inner():
        yield


@dataclass(frozen=True)
class Step:
    """One update of a member: at `noise` it held x, saw x0 and went on to `after`."""

    index: int
    member: Member
    noise: Noise
    x: Tensor  # (B, C, H, W), in the member's noise schedule
    x0: Tensor  # (B, C, H, W)
    after: Tensor  # (B, C, H, W), at the next level, in the next member's noise schedule


def update(
    x: Tensor, x0: Tensor, now: Noise, after: Noise, eta: Eta = 0.0, fresh: Tensor | None = None
) -> Tensor:
    """x at the next level: eps = (x - alpha x0) / sigma; eps <- sqrt(1 - eta^2) eps + eta fresh; alpha' x0 +
    sigma' eps.

    Reproduces DDIM and Euler (eta 0), LCM and DMD2 (eta 1), Euler-ancestral (eta = noise.ancestral) and flow
    Euler. Between noise schedules it converts by itself, for eps means the same in all of them. All tensors
    (B, C, H, W).
    """
    eps = to_eps(x, x0, now)
    eta = eta(now, after) if callable(eta) else eta
    if eta:
        eps = (1 - eta**2) ** 0.5 * eps + eta * fresh
    return after.alpha * x0 + after.sigma * eps


def draw_noise(seeds: Sequence[int], shape: tuple[int, ...], steps: int, device="cpu") -> Tensor:
    """All noise of each image from its own generator: (B, steps + 1, *shape), first the initial, then one per
    step.

    Image i depends on seeds[i] alone, so it is the same alone or in a batch, and plans with the same seeds
    are paired.
    """
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(int(seed))
        rows.append(torch.stack([torch.randn((1, *shape), generator=generator)[0] for _ in range(steps + 1)]))
    return torch.stack(rows).to(device)


def sample(plan: Plan, noise: Tensor, prompts: Prompts) -> Iterator[Step]:
    """Runs the plan; the last step's `after` is the finished latent.

    noise: (B, ≥ plan.steps + 1, C, H, W) from `draw_noise`. prompts: B of them, with a negative side where a
    member guides.
    """
    todo = [(stage, level) for stage in plan.stages for level in stage.levels]
    if noise.shape[1] <= len(todo):
        raise UserError(f"{plan.name} needs noise for {len(todo)} steps, got {noise.shape[1] - 1}")
    first, level = todo[0]
    own = noise[:, 0]
    x = (plan.start(own) if plan.start else own) * (level.sigma if first.member.start == "sigma" else 1.0)
    for index, (stage, now) in enumerate(todo):
        member = stage.member
        after = todo[index + 1][1] if index + 1 < len(todo) else member.final
        conditioning = stage.conditioning(prompts, now, own) if stage.conditioning else prompts
        with stage.within():
            x0 = member.denoiser(x, now, conditioning, member.guidance)
            if stage.mix:
                x0 = stage.mix(x0, x, now, conditioning, own, member.noise_schedule)
        following = update(x, x0, now, after, member.eta, noise[:, index + 1]) if after.sigma else x0
        yield Step(index, member, now, x, x0, following)
        x = following


def finish(plan: Plan, noise: Tensor, prompts: Prompts) -> Tensor:
    """The finished latents of a plan, (B, C, H, W)."""
    x = None
    for step in sample(plan, noise, prompts):
        x = step.after
    return x
