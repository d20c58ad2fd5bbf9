"""Sampling: one update rule, stages as data, a generator of steps. Every network speaks x0."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from configs import UserError
from configs.ranges import TWO_MEANINGS
from models.denoiser import Denoiser
from models.interventions import Annealed, Between, Pink, derived
from models.noise import CLEAN, LAWS, TRAIN_STEPS, Noise, timesteps, to_eps
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
    shifted: Callable[[int], tuple[Noise, ...]] | None = None  # a flow's own schedule of so many steps

    def in_steps(self, steps: int, spacing: str = "trailing") -> tuple[Noise, ...]:
        """The levels of another number of steps; flows know no spacing but their own."""
        return self.shifted(steps) if self.shifted else levels_of(self.law, spacing, steps)


def levels_of(law: str, spacing: str, steps: int, explicit: Sequence[float] = ()) -> tuple[Noise, ...]:
    """The noise levels of a schedule; explicit timesteps win over the spacing."""
    at = LAWS[law][0]
    return tuple(at(t) for t in (explicit or timesteps(spacing, steps)))


@dataclass(frozen=True)
class Mix:
    """What is made of x0: keep x0 + (1 - keep) times what somebody else sees, or nothing."""

    keep: float
    beside: "Member | None" = None  # who else is asked; None = nobody, x0 fades
    another: bool = False  # asked about another seed's initial noise, so only a first step can do this

    def __call__(self, x0: Tensor, x: Tensor, now: Noise, told: Prompts, own: Tensor, law: str) -> Tensor:
        """x0, x: (B, C, H, W) at `now` in `law`; told: what the network was told; own: the images' initial noise."""
        if self.beside is None:
            return self.keep * x0
        there = now if self.beside.law == law else LAWS[self.beside.law][1](now.ratio)
        if self.another:
            x = derived(own, tuple(x.shape[1:])) * (there.sigma if self.beside.start == "sigma" else 1.0)
        else:
            x = x * (there.alpha / now.alpha)  # the same eps in both laws
        return self.keep * x0 + (1 - self.keep) * self.beside.denoiser(x, there, told, self.beside.guidance)


@dataclass(frozen=True)
class Stage:
    """A member run over a falling list of noise levels, and what is done differently there."""

    member: Member
    levels: tuple[Noise, ...]
    within: Callable[[], AbstractContextManager] = nullcontext  # held while the network is asked, e.g. a control at a strength
    told: Callable[[Prompts, Noise, Tensor], Prompts] | None = None  # (prompts, level, own noise) -> what the network is told instead
    mix: Mix | None = None  # what is made of x0

    @classmethod
    def of(cls, member: Member, levels: Sequence[Noise]) -> "Stage":
        """The member on another's levels: the same sigma / alpha in the member's own law."""
        return cls(member, tuple(level if level in member.levels else LAWS[member.law][1](level.ratio) for level in levels))

    @property
    def members(self) -> list[Member]:
        """Who is asked at each level."""
        return [self.member, *([self.mix.beside] if self.mix and self.mix.beside else [])]

    @property
    def asked(self) -> Counter[str]:
        """Network evaluations per image, by member."""
        each = Counter()
        for member in self.members:
            each[member.name] += len(self.levels) * (1 if member.guidance is None else 2)
        return each


@dataclass(frozen=True)
class Plan:
    """Stages end to end, and where they start and finish."""

    name: str
    stages: tuple[Stage, ...]
    start: Callable[[Tensor], Tensor] | None = None  # what is made of the initial noise (B, C, H, W)

    @property
    def steps(self) -> int:
        """How many updates it makes."""
        return sum(len(stage.levels) for stage in self.stages)

    @property
    def asked(self) -> Counter[str]:
        """Network evaluations per image, guidance's second one included, by member."""
        return sum((stage.asked for stage in self.stages), Counter())

    @property
    def evaluations(self) -> int:
        """The same of all members together."""
        return self.asked.total()

    @property
    def members(self) -> list[Member]:
        """Who is asked, stage by stage."""
        return [member for stage in self.stages for member in stage.members]


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


def only(base: Member, student: Member, k: int = 1) -> Plan:
    """The base in step k alone, counted from 1, the student in all others: where is it that the two differ?"""
    return _changed(f"only({k})", student, Stage.of(base, student.levels[_which(k, student) :][:1]), k)


def renoised(base: Member, student: Member, k: int = 1) -> Plan:
    """As hybrid, but the base's updates add as much fresh noise as the student's: only its x0 is taken, nothing of its eps."""
    return replace(hybrid(replace(base, eta=student.eta), student, k), name=f"renoised({k})")


def guided(base: Member, student: Member, guidance: float) -> Plan:
    """hybrid(1) with another guidance in the base's step; 1 is none, and one evaluation less."""
    if guidance == 0:
        raise UserError(f"guided(0): {TWO_MEANINGS}")
    other = replace(base, guidance=None if guidance == 1 else guidance)
    return replace(hybrid(other, student, 1), name=f"guided({guidance:g})")


def schedule(base: Member, student: Member, n: int) -> Plan:
    """The base on an n-step schedule of its own down to the student's second level, the student from there: hybrid(1) in finer steps."""
    if len(student.levels) < 2:
        raise UserError(f"schedule({n}) needs a student of at least 2 steps; {student.name} has {len(student.levels)}")
    own = [level for level in base.in_steps(n) if level.ratio > student.levels[1].ratio]
    return _two(f"schedule({n})", base, own, student, student.levels[1:])


def shorter(base: Member, n: int) -> Plan:
    """The base alone, in n steps."""
    return Plan(f"base({n})", (Stage(base, base.in_steps(n)),))


def interval(base: Member, low: float, high: float) -> Plan:
    """The base alone, with its guidance only at training steps low <= t <= high. Kynkäänniemi et al. 2024, arXiv 2404.07724."""
    if not low < high or base.guidance is None:
        raise UserError(f"interval(low,high) needs low < high and a guided base; got {low:g}, {high:g} on {base.name}")
    free = replace(base, guidance=None)
    stages = [Stage(base if low <= level.t <= high else free, (level,)) for level in base.levels]
    return Plan(f"interval({low:g},{high:g})", tuple(stages))


def mixed(name: str, student: Member, mix: Mix) -> Plan:
    """The student with something made of its first step's x0: attenuate, other, blend, which lie on one line with skip and hybrid."""
    return _changed(f"{name}({mix.keep:g})", student, Stage(student, student.levels[:1], mix=mix), 1)


def pink(student: Member, exponent: float) -> Plan:
    """The student from noise of power 1 / f^exponent."""
    return replace(alone(student), name=f"pink({exponent:g})", start=Pink(exponent))


def cads(student: Member, scale: float) -> Plan:
    """The student, told its prompts with noise that fades."""
    return Plan(f"cads({scale:g})", (Stage(student, student.levels, told=Annealed(scale)),))


def delta(base: Member, student: Member, s: float, k: int | None = None) -> Plan:
    """The student with the weights base + s (student - base), in all steps or in step k alone, counted from 1."""
    if base.denoiser.kind != student.denoiser.kind:
        raise UserError(f"delta({s:g}) needs a student that predicts what its base does; {student.name} says {student.denoiser.kind}")
    within = Between(base.denoiser.net, student.denoiser.net, s)
    if k is None:
        return Plan(f"delta({s:g})", (Stage(student, student.levels, within),))
    return _changed(f"delta({s:g},{k})", student, Stage(student, student.levels[_which(k, student) :][:1], within), k)


def few(member: Member, steps: int) -> Plan:
    """The member in a few trailing steps and without guidance, as a student is sampled: what is left is due to its weights."""
    levels = member.in_steps(steps)
    return Plan(f"few({steps})", (Stage(replace(member, guidance=None, levels=levels), levels),))


# name: (its arguments, of which k and n are whole and those in brackets may be left out; base, student, *arguments -> plan)
PLANS: dict[str, tuple[str, Callable[..., Plan]]] = {
    "base": ("[n]", lambda base, _, n=None: alone(base) if n is None else shorter(base, n)),
    "student": ("", lambda _, student: alone(student)),
    "hybrid": ("k", hybrid),
    "late": ("k", late),
    "skip": ("k", lambda _, student, k: skip(student, k)),
    "few": ("n", lambda _, member, n: few(member, n)),
    "only": ("k", only),
    "renoised": ("k", renoised),
    "guided": ("guidance", guided),
    "schedule": ("n", schedule),
    "interval": ("low,high", lambda base, _, low, high: interval(base, low, high)),
    "attenuate": ("keep", lambda _, student, keep: mixed("attenuate", student, Mix(keep))),
    "other": ("keep", lambda _, student, keep: mixed("other", student, Mix(keep, student, another=True))),
    "blend": ("keep", lambda base, student, keep: mixed("blend", student, Mix(keep, base))),
    "pink": ("exponent", lambda _, student, exponent: pink(student, exponent)),
    "cads": ("scale", lambda _, student, scale: cads(student, scale)),
    "delta": ("s,[k]", delta),
}


LIMITS = {"exponent": 10, "keep": 10, "scale": 10, "s": 10}  # of these arguments, beyond which no picture is left; of others, TRAIN_STEPS


def named(text: str, base: Member, student: Member) -> Plan:
    """The plan that a name means for a base and a student: hybrid(1), skip(1), delta(0.8,1). Raises UserError for another."""
    found = re.fullmatch(r"(\w+)(?:\(([^()]*)\))?", text.replace(" ", ""))
    if not found or found[1] not in PLANS:
        raise UserError(f"no plan {text[:60]!r}; there are {', '.join(map(_written, PLANS))}")
    wanted, make = PLANS[found[1]]
    names, given = wanted.split(",") if wanted else [], found[2].split(",") if found[2] else []
    needed = sum(name[0] != "[" for name in names)
    try:
        values = [(int if name.strip("[]") in "kn" else float)(word) for name, word in zip(names, given, strict=False)]
    except ValueError:
        values = []
    if not needed <= len(given) <= len(names) or len(values) < len(given) or not all(map(math.isfinite, values)):
        raise UserError(f"no plan {text[:60]!r}; it is written {_written(found[1])}, k and n whole numbers")
    for name, value in zip(names, values, strict=False):
        most = LIMITS.get(name.strip("[]"), TRAIN_STEPS)
        if abs(value) > most:
            raise UserError(f"no plan {text[:60]!r}: {name.strip('[]')} must be from -{most} to {most}")
    return make(base, student, *values)


def during(plan: Plan, holds: Callable[[Noise], bool], within: Callable[[], AbstractContextManager]) -> Plan:
    """The same plan with `within` held too at the noise levels where `holds` is true, and there alone."""
    stages = [replace(stage, levels=(level,), within=partial(_both, stage.within, within) if holds(level) else stage.within)
              for stage in plan.stages for level in stage.levels]  # fmt: skip
    return replace(plan, stages=tuple(stages))


@contextmanager
def _both(outer: Callable[[], AbstractContextManager], inner: Callable[[], AbstractContextManager]) -> Iterator[None]:
    with outer(), inner():
        yield


def _written(name: str) -> str:
    """How a plan is written, hybrid(k) or delta(s[,k])."""
    wanted = PLANS[name][0].replace(",[", "[,")
    if not wanted:
        return name
    return f"{name}({wanted})" if wanted[0] != "[" else f"{name}[({wanted[1:-1]})]"


def _count(k: int, student: Member) -> int:
    if not 0 <= k <= len(student.levels):
        raise UserError(f"k must be 0 … {len(student.levels)}, the steps of {student.name}; got {k}")
    return k


def _which(k: int, student: Member) -> int:
    """The index of step k, counted from 1."""
    if not 1 <= k <= len(student.levels):
        raise UserError(f"k must be 1 … {len(student.levels)}, a step of {student.name}; got {k}")
    return k - 1


def _two(name: str, first: Member, early: Sequence[Noise], second: Member, rest: Sequence[Noise]) -> Plan:
    stages = [Stage.of(member, levels) for member, levels in ((first, early), (second, rest)) if levels]
    return Plan(name, tuple(stages))


def _changed(name: str, student: Member, stage: Stage, k: int) -> Plan:
    """The student with another stage in the place of its step k, counted from 1."""
    around = [Stage(student, levels) if levels else None for levels in (student.levels[: k - 1], student.levels[k:])]
    return Plan(name, tuple(part for part in (around[0], stage, around[1]) if part))


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
    own = noise[:, 0]
    x = (plan.start(own) if plan.start else own) * (level.sigma if first.member.start == "sigma" else 1.0)
    for index, (stage, now) in enumerate(todo):
        member = stage.member
        after = todo[index + 1][1] if index + 1 < len(todo) else member.final
        told = stage.told(prompts, now, own) if stage.told else prompts
        with stage.within():
            x0 = member.denoiser(x, now, told, member.guidance)
            if stage.mix:
                x0 = stage.mix(x0, x, now, told, own, member.law)
        following = update(x, x0, now, after, member.eta, noise[:, index + 1]) if after.sigma else x0
        yield Step(index, member, now, x, x0, following)
        x = following


def finish(plan: Plan, noise: Tensor, prompts: Prompts) -> Tensor:
    """The finished latents of a plan, (B, C, H, W)."""
    x = None
    for step in sample(plan, noise, prompts):
        x = step.after
    return x
