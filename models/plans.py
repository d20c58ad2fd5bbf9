"""Plans by name: base, student, hybrid(k) and what the paper and others compare with it.

A plan is stages end to end.
"""

import math
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from configs import UserError
from configs.ranges import TWO_MEANINGS
from models.interventions import CADS, Pink, Some, WeightInterpolation, common, derived, unprompted
from models.noise import TRAIN_STEPS, Band, Noise
from models.sampler import Adapter, Member, Mix, Plan, Stage, alone

if TYPE_CHECKING:  # families stand on samplers, not on plans
    from models.families import Family

VERSION = 2  # raised when a name comes to mean other images


def swapped(base: Member, student: Member, guidance: float | None = None, eta: float | None = None) -> Member:
    """The base's weights in the student's exact inference conditions: its eta, start and end, and without
    guidance.

    guidance, eta: others than these; guidance 1 is none.
    """
    if guidance == 0:
        raise UserError(f"guidance 0: {TWO_MEANINGS}")
    if eta is not None and not 0 <= eta <= 1:
        raise UserError(f"eta must be from 0 to 1, the share of fresh noise in an update; got {eta:g}")
    eta = student.eta if eta is None else eta
    guidance = None if guidance == 1 else guidance
    return replace(base, guidance=guidance, eta=eta, start=student.start, final=student.final)


def hybrid(
    base: Member, student: Member, k: int = 1, guidance: float | None = None, eta: float | None = None
) -> Plan:
    """The student's loop with the base's weights in its first k steps (the paper's diversity distillation,
    Algorithm 1).
    """
    first = swapped(base, student, guidance, eta)
    return _two(
        _with("hybrid", k, guidance, eta),
        first,
        student.levels[: _count(k, student)],
        student,
        student.levels[k:],
    )


def late(base: Member, student: Member, k: int = 1) -> Plan:
    """The student's loop with the base's weights in its last k steps."""
    cut = len(student.levels) - _count(k, student)
    last = swapped(base, student)
    return _two(f"late({k})", student, student.levels[:cut], last, student.levels[cut:])


def skip(student: Member, k: int = 1) -> Plan:
    """The student without its first k steps, started from pure noise at its level k: the control experiment
    to hybrid.
    """
    if k >= len(student.levels):
        raise UserError(f"skip({k}) leaves nothing of {student.name}'s {len(student.levels)} steps")
    return Plan(f"skip({k})", (Stage(student, student.levels[_count(k, student) :]),))


def only(base: Member, student: Member, k: int = 1) -> Plan:
    """The student's loop with the base's weights in step k alone, counted from 1: where do the two differ?"""
    stage = Stage.of(swapped(base, student), student.levels[_which(k, student) :][:1])
    return _changed(f"only({k})", student, stage, k)


def schedule(base: Member, student: Member, n: int) -> Plan:
    """hybrid(1) in finer steps: the base on n steps of its own down to the student's second level."""
    if len(student.levels) < 2:
        raise UserError(
            f"schedule({n}) needs a student of at least 2 steps; {student.name} has {len(student.levels)}"
        )
    own = [level for level in base.in_steps(n) if level.ratio > student.levels[1].ratio]
    return _two(f"schedule({n})", swapped(base, student), own, student, student.levels[1:])


def shorter(base: Member, n: int) -> Plan:
    """The base alone, in n steps."""
    return Plan(f"base({n})", (Stage(base, base.in_steps(n)),))


def teacher(base: Member, student: Member) -> Plan:
    """The base at the guidance that was distilled into the student: what the student was to become.

    Raises UserError where the card does not say it.
    """
    if student.teacher_guidance is None or base.guidance is None:
        raise UserError(
            f"teacher needs a guided base and the guidance that was distilled into {student.name}: "
            f"teacher_guidance on its card"
        )
    guidance = None if student.teacher_guidance == 1 else student.teacher_guidance
    return replace(alone(replace(base, guidance=guidance)), name="teacher")


def interval(base: Member, low: float, high: float) -> Plan:
    """The base alone, with its guidance only at training steps low <= t <= high.

    Kynkäänniemi et al. 2024, arXiv 2404.07724.
    """
    if not low < high or base.guidance is None:
        raise UserError(
            f"interval(low,high) needs low < high and a guided base; got {low:g}, {high:g} on {base.name}"
        )
    free = replace(base, guidance=None)
    stages = [Stage(base if low <= level.t <= high else free, (level,)) for level in base.levels]
    return Plan(f"interval({low:g},{high:g})", tuple(stages))


def mixed(name: str, student: Member, mix: Mix) -> Plan:
    """The student with something made of its first step's x0: attenuate, other, blend, which lie on one line
    with skip and hybrid.
    """
    return _changed(f"{name}({mix.keep:g})", student, Stage(student, student.levels[:1], mix=mix), 1)


def alike(student: Member, share: float) -> Plan:
    """The student with one first x0 in common for a share of the images: a known dose of collapse.

    Of the pairs of a prompt's images share² are then as far apart as in alike(1), the others as before.
    """
    if not 0 <= share <= 1:
        raise UserError(f"alike(share) needs a share of the images from 0 to 1; got {share:g}")
    mix = Mix(0.0, student, common, Some(share))
    return _changed(f"alike({share:g})", student, Stage(student, student.levels[:1], mix=mix), 1)


def without_prompt(student: Member, k: int = 1) -> Plan:
    """The student, given its prompt only after its first k steps."""
    early, rest = student.levels[: _count(k, student)], student.levels[k:]
    stages = [
        Stage(student, early, conditioning=unprompted) if early else None,
        Stage(student, rest) if rest else None,
    ]
    return Plan(f"unprompted({k})", tuple(stage for stage in stages if stage))


def adapted(student: Member, scale: float, above: float | None = None, below: float | None = None) -> Plan:
    """The student with the run's control at a scale, at noise levels above < sigma / alpha < below alone."""
    adapter = Adapter(scale, Band.of(above, below))
    return replace(alone(student), name=_with("adapted", scale, above, below), adapter=adapter)


def pink(student: Member, exponent: float) -> Plan:
    """The student from noise of power 1 / f^exponent."""
    return replace(alone(student), name=f"pink({exponent:g})", start=Pink(exponent))


def cads(student: Member, scale: float) -> Plan:
    """The student, told its prompts with noise that fades."""
    return Plan(f"cads({scale:g})", (Stage(student, student.levels, conditioning=CADS(scale)),))


def delta(base: Member, student: Member, s: float, k: int | None = None) -> Plan:
    """The student with the weights base + s (student - base), in all steps or in step k alone, counted from
    1.
    """
    if base.denoiser.prediction_type != student.denoiser.prediction_type:
        raise UserError(
            f"delta({s:g}) needs a student that predicts what its base does; {student.name} says "
            f"{student.denoiser.prediction_type}"
        )
    within, member = WeightInterpolation(base.denoiser.net, student.denoiser.net, s), student
    if base.denoiser.net is student.denoiser.net:  # a LoRA over it: what lies between is its dial
        within, member = nullcontext, replace(student, denoiser=student.denoiser.turned(s))
    if k is None:
        return Plan(f"delta({s:g})", (Stage(member, student.levels, within),))
    return _changed(
        f"delta({s:g},{k})", student, Stage(member, student.levels[_which(k, student) :][:1], within), k
    )


def few(member: Member, steps: int) -> Plan:
    """The member in a few trailing steps and without guidance, as a student is sampled: what is left is due
    to its weights.
    """
    levels = member.in_steps(steps)
    return Plan(f"few({steps})", (Stage(replace(member, guidance=None, levels=levels), levels),))


# name: (its arguments, of which k and n are whole and those in brackets may be left out; base, student,
# *arguments -> plan)
PLANS: dict[str, tuple[str, Callable[..., Plan]]] = {
    "base": ("[n]", lambda base, _, n=None: alone(base) if n is None else shorter(base, n)),
    "student": ("", lambda _, student: alone(student)),
    "hybrid": ("k,[guidance],[eta]", hybrid),
    "late": ("k", late),
    "skip": ("k", lambda _, student, k: skip(student, k)),
    "few": ("n", lambda _, member, n: few(member, n)),
    "only": ("k", only),
    "schedule": ("n", schedule),
    "teacher": ("", teacher),
    "interval": ("low,high", lambda base, _, low, high: interval(base, low, high)),
    "attenuate": ("keep", lambda _, student, keep: mixed("attenuate", student, Mix(keep))),
    "other": ("keep", lambda _, student, keep: mixed("other", student, Mix(keep, student, derived))),
    "blend": ("keep", lambda base, student, keep: mixed("blend", student, Mix(keep, swapped(base, student)))),
    "alike": ("share", lambda _, student, share: alike(student, share)),
    "unprompted": ("k", lambda _, student, k: without_prompt(student, k)),
    "adapted": ("scale,[above],[below]", lambda _, student, *how: adapted(student, *how)),
    "pink": ("exponent", lambda _, student, exponent: pink(student, exponent)),
    "cads": ("scale", lambda _, student, scale: cads(student, scale)),
    "delta": ("s,[k]", delta),
}


LIMITS = {
    "exponent": 10,
    "keep": 10,
    "scale": 10,
    "s": 10,
}  # of these arguments, beyond which no picture is left; of others, TRAIN_STEPS


def plan_of(family: "Family", target: str) -> Plan:
    """What a target means, MEMBER or MEMBER:PLAN: a member alone, or a plan of it and the base.

    Raises UserError.
    """
    member, _, plan = target.partition(":")
    if not plan:
        return alone(family.member(member))
    return named(plan, family.member(family.card.base), family.member(member))


def named(text: str, base: Member, student: Member) -> Plan:
    """The plan that a name means for a base and a student: hybrid(1), skip(1), delta(0.8,1).

    Raises UserError for another.
    """
    found = re.fullmatch(r"(\w+)(?:\(([^()]*)\))?", text.replace(" ", ""))
    if not found or found[1] not in PLANS:
        raise UserError(f"no plan {text[:60]!r}; there are {', '.join(map(_written, PLANS))}")
    wanted, make = PLANS[found[1]]
    names, given = wanted.split(",") if wanted else [], found[2].split(",") if found[2] else []
    needed = sum(name[0] != "[" for name in names)
    try:
        values = [
            (int if name.strip("[]") in "kn" else float)(word)
            for name, word in zip(names, given, strict=False)
        ]
    except ValueError:
        values = []
    if (
        not needed <= len(given) <= len(names)
        or len(values) < len(given)
        or not all(map(math.isfinite, values))
    ):
        raise UserError(f"no plan {text[:60]!r}; it is written {_written(found[1])}, k and n whole numbers")
    for name, value in zip(names, values, strict=False):
        most = LIMITS.get(name.strip("[]"), TRAIN_STEPS)
        if abs(value) > most:
            raise UserError(f"no plan {text[:60]!r}: {name.strip('[]')} must be from -{most} to {most}")
    return make(base, student, *values)


def _with(name: str, *values: float | None) -> str:
    """A plan's name with its arguments."""
    return f"{name}({','.join(f'{value:g}' for value in values if value is not None)})"


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
    around = [
        Stage(student, levels) if levels else None for levels in (student.levels[: k - 1], student.levels[k:])
    ]
    return Plan(name, tuple(part for part in (around[0], stage, around[1]) if part))
