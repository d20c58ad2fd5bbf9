"""Plans by name: base, student, hybrid(k) and what the paper and others compare with it.

A plan is stages end to end.
"""

import math
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

from configs import UserError
from configs.ranges import TWO_MEANINGS
from models.interventions import CADS, Pink, WeightInterpolation
from models.noise import TRAIN_STEPS, Noise
from models.sampler import Member, Mix, Plan, Stage, alone


def hybrid(base: Member, student: Member, k: int = 1) -> Plan:
    """The base on the student's first k noise levels, the student after them (the paper's diversity
    distillation).
    """
    return _two(f"hybrid({k})", base, student.levels[: _count(k, student)], student, student.levels[k:])


def late(base: Member, student: Member, k: int = 1) -> Plan:
    """The student first, the base on the last k levels."""
    cut = len(student.levels) - _count(k, student)
    return _two(f"late({k})", student, student.levels[:cut], base, student.levels[cut:])


def skip(student: Member, k: int = 1) -> Plan:
    """The student without its first k steps, started from pure noise at its level k: the control experiment
    to hybrid.
    """
    if k >= len(student.levels):
        raise UserError(f"skip({k}) leaves nothing of {student.name}'s {len(student.levels)} steps")
    return Plan(f"skip({k})", (Stage(student, student.levels[_count(k, student) :]),))


def only(base: Member, student: Member, k: int = 1) -> Plan:
    """The base in step k alone, counted from 1, the student in all others: where do the two differ?"""
    return _changed(f"only({k})", student, Stage.of(base, student.levels[_which(k, student) :][:1]), k)


def renoised(base: Member, student: Member, k: int = 1) -> Plan:
    """As hybrid, but the base's updates add as much fresh noise as the student's: only its x0 is taken,
    nothing of its eps.
    """
    return replace(hybrid(replace(base, eta=student.eta), student, k), name=f"renoised({k})")


def guided(base: Member, student: Member, guidance: float) -> Plan:
    """hybrid(1) with another guidance in the base's step; 1 is none, and one evaluation less."""
    if guidance == 0:
        raise UserError(f"guided(0): {TWO_MEANINGS}")
    other = replace(base, guidance=None if guidance == 1 else guidance)
    return replace(hybrid(other, student, 1), name=f"guided({guidance:g})")


def schedule(base: Member, student: Member, n: int) -> Plan:
    """The base on an n-step schedule of its own down to the student's second level, the student from there:
    hybrid(1) in finer steps.
    """
    if len(student.levels) < 2:
        raise UserError(
            f"schedule({n}) needs a student of at least 2 steps; {student.name} has {len(student.levels)}"
        )
    own = [level for level in base.in_steps(n) if level.ratio > student.levels[1].ratio]
    return _two(f"schedule({n})", base, own, student, student.levels[1:])


def shorter(base: Member, n: int) -> Plan:
    """The base alone, in n steps."""
    return Plan(f"base({n})", (Stage(base, base.in_steps(n)),))


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


LIMITS = {
    "exponent": 10,
    "keep": 10,
    "scale": 10,
    "s": 10,
}  # of these arguments, beyond which no picture is left; of others, TRAIN_STEPS


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
