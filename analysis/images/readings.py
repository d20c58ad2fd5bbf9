"""Drawings to cells: what each evaluator reads of one control on one target, with its references, and what it
leaks onto others.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from analysis.images.cache import Drawings, Job
from configs import plain_name
from controls import intervals, retention
from controls.effect import change, own_directions, percent_change, preservation
from controls.lora import Control

Words = (
    tuple[str, str] | None
)  # the positive and the negative description; None: measured along the control's own direction


@dataclass(frozen=True, eq=False)
class Subject:
    """A control as it is measured."""

    control: Control
    words: Words
    scales: list[float]

    @property
    def name(self) -> str:
        return self.control.card.name

    @property
    def source(self) -> str:
        return self.control.card.member

    def jobs(self, target: str) -> list[Job]:
        return [Job(target, self.name, scale) for scale in self.scales]


def floor_of(target: str, subject: Subject) -> Job:
    """The drawing of a subject's floor, the random control of the same norms."""
    return Job(target, subject.name, 1.0, random=True)


class Measurement:
    """Reads drawings. Whatever is asked twice is computed once."""

    def __init__(self, drawings: Drawings, subjects: list[Subject], references: bool):
        self.drawings, self.subjects, self.references = drawings, subjects, references
        self.features: dict[tuple, np.ndarray] = {}

    def cells(self, targets: list[str]) -> list[dict]:
        """One per subject and target."""
        found = [self.cell(subject, target) for subject in self.subjects for target in targets]
        judge(found)
        return found

    def cell(self, subject: Subject, target: str) -> dict:
        """One control on one target: the record of docs/design.md, without its verdict."""
        card, words = subject.control.card, subject.words
        readings = {
            evaluator_name: self.reading(evaluator_name, subject, target)
            for evaluator_name in self.drawings.evaluators
        }
        prompts, seeds = len(self.drawings.texts), self.drawings.seeds
        return {
            "control": card.name,
            "kind": card.kind,
            "hash": self.drawings.contents[card.name, False][:16],
            "source": f"{card.family}/{card.member}",
            "target": f"{card.family}/{target}",
            "reference": is_reference(target),
            "scales": subject.scales,
            "below": self.drawings.below,
            "readings": readings,
            "clip_change_percent": self.clip_change(subject, target),
            "images": prompts * seeds * len(subject.scales),
            "prompts": prompts,
            "seeds": seeds,
            "positive": words[0] if words else "",
            "negative": words[1] if words else "",
            "picture": f"images/{plain_name(card.name)}/{file_name(target)}.png",
        }

    def clip_change(self, subject: Subject, target: str) -> float | None:
        """The change in % of the mean CLIP score at the largest scale, the column of the paper's Table 1;
        None without words or CLIP.
        """
        clip = self.drawings.evaluators.get("clip")
        if clip is None or subject.words is None:
            return None
        scores = self.look("clip", subject, target) @ clip.texts([subject.words[0]])[0]
        return percent_change(scores[..., -1], scores[..., subject.scales.index(0)])

    def reading(self, evaluator_name: str, subject: Subject, target: str) -> dict:
        """What one evaluator says of a cell, its verdict left open."""
        scales, zero = np.array(subject.scales), subject.scales.index(0)
        source, there = (self.effect(evaluator_name, subject, place) for place in (subject.source, target))
        inside = retention.window(source, scales)
        below, above = retention.slopes(source, there, scales, inside)
        matched = retention.matched_scale(source, there, scales)
        kept = {
            place: preservation(self.rest(evaluator_name, subject, place), zero)
            for place in {subject.source, target}
        }
        shape = retention.shape(there, scales)
        return {
            "window": inside.tolist(),
            **retention.estimate(there, scales, inside),
            "retention": intervals.ratio(above, below),
            "equivalence": {"p": intervals.equivalence(above, below)},
            "difference": {"p": intervals.difference(above, below)},
            "matched_scale": matched,
            "shape": shape,
            "monotonicity": shape["monotonicity"],
            "preservation": float(np.delete(kept[target], zero, -1).mean()),
            "preservation_curve": kept[target].mean((0, 1)).tolist(),
            "preservation_matched": at_match(kept[subject.source], kept[target], scales, matched["value"]),
            "spread": retention.spread(source, there, scales) if target != subject.source else None,
            "references": self.compared(evaluator_name, subject, target, below, above),
        }

    def compared(
        self, evaluator_name: str, subject: Subject, target: str, below: np.ndarray, above: np.ndarray
    ) -> dict:
        """What a retention is to be held against. below, above: the slopes of the source and of the target,
        one per independent unit.
        """
        found = dict.fromkeys(("floor", "ceiling", "wrong", "rerun", "normalised"))
        if not self.references:
            return found

        def at(slopes):
            return {"slope": intervals.mean(slopes), "share": intervals.ratio(slopes, below)}

        floor = self.slopes(
            evaluator_name, subject, target, [Job(target), floor_of(target, subject)], [0.0, 1.0]
        )
        found["floor"] = at(floor)
        ceiling = next((s for s in self.subjects if twins(s, subject) and s.source == target), None)
        if ceiling and target != subject.source:
            there, scales = self.effect(evaluator_name, ceiling, target), np.array(ceiling.scales)
            slopes = retention.slopes(there, there, scales)[0]
            found["ceiling"] = {"control": ceiling.name, **at(slopes)}
            found["normalised"] = intervals.ratio(above - floor, slopes - floor)
        wrong = next((s for s in after(self.subjects, subject) if s.words and not twins(s, subject)), None)
        if wrong and subject.words:
            found["wrong"] = {
                "control": wrong.name,
                **at(self.small_slopes(evaluator_name, wrong, target, subject.words)),
            }
        if not is_reference(target):
            score = self.score(evaluator_name, subject, target, [Job(target), Job(target, again=True)])
            found["rerun"] = {"effect": intervals.mean(intervals.units(change(score, 0)[..., 1]))}
        return found

    def leakage(self, targets: list[str]) -> list[dict]:
        """How much each control moves what each other is for, per target and evaluator; 1 = as much."""
        different: dict[Words, Subject] = {}
        for subject in self.subjects:
            different.setdefault(subject.words, subject)
        owners = [subject for words, subject in different.items() if words]
        return [
            {
                "evaluator": evaluator_name,
                "target": f"{subject.control.card.family}/{target}",
                "control": subject.name,
                "attribute": owner.name,
                "slope": intervals.mean(slopes),
                "share": intervals.ratio(slopes, own),
            }
            for evaluator_name in self.drawings.evaluators
            for target in targets
            if not is_reference(target)
            for owner in owners
            for own in [self.small_slopes(evaluator_name, owner, target, owner.words)]
            for subject in self.subjects
            for slopes in [self.small_slopes(evaluator_name, subject, target, owner.words)]
        ]

    def small_slopes(self, evaluator_name: str, subject: Subject, target: str, words: Words) -> np.ndarray:
        """Slopes of the effect that words mean, (n,), over the scales from -1 to 1: the dose at which
        controls are compared.
        """
        scales = [scale for scale in subject.scales if abs(scale) <= 1]
        jobs = [Job(target, subject.name, scale) for scale in scales]
        return self.slopes(evaluator_name, Subject(subject.control, words, scales), target, jobs, scales)

    def slopes(
        self, evaluator_name: str, subject: Subject, target: str, jobs: list[Job], scales: list[float]
    ) -> np.ndarray:
        """Slopes of the effect of jobs at scales, (n,), one per independent unit."""
        effect = change(self.score(evaluator_name, subject, target, jobs), scales.index(0))
        return intervals.units(retention.slope(np.array(scales), effect))

    def effect(self, evaluator_name: str, subject: Subject, target: str) -> np.ndarray:
        """The effect of a subject on a target, (P, S, K)."""
        return change(
            self.score(evaluator_name, subject, target, subject.jobs(target)), subject.scales.index(0)
        )

    def score(self, evaluator_name: str, subject: Subject, target: str, jobs: list[Job]) -> np.ndarray:
        """How much the images of jobs are what a subject makes, (P, S, K)."""
        features = self.stack(evaluator_name, jobs)
        if subject.words:
            return self.drawings.evaluators[evaluator_name].score(features, *subject.words)
        return (features * self.directions(evaluator_name, subject)).sum(-1)

    def rest(self, evaluator_name: str, subject: Subject, target: str) -> np.ndarray:
        """The features of a subject's images without what it is meant to change, (P, S, K, d)."""
        features = self.look(evaluator_name, subject, target)
        if subject.words:
            return self.drawings.evaluators[evaluator_name].rest(features, *subject.words)
        directions = self.directions(evaluator_name, subject)
        return features - (features * directions).sum(-1, keepdims=True) * directions

    def directions(self, evaluator_name: str, subject: Subject) -> np.ndarray:
        """Where a subject without words moves the images of its own source, (P, 1, 1, d)."""
        return own_directions(self.look(evaluator_name, subject, subject.source), subject.scales.index(0))[
            :, None, None
        ]

    def look(self, evaluator_name: str, subject: Subject, target: str) -> np.ndarray:
        return self.stack(evaluator_name, subject.jobs(target))

    def stack(self, evaluator_name: str, jobs: list[Job]) -> np.ndarray:
        """The features of jobs, (P, S, K, d)."""
        return np.stack([self.one(evaluator_name, job) for job in jobs], 2)

    def one(self, evaluator_name: str, job: Job) -> np.ndarray:
        if (evaluator_name, job) not in self.features:
            self.features[evaluator_name, job] = self.drawings.features(job, evaluator_name)
        return self.features[evaluator_name, job]


def judge(cells: list[dict]) -> None:
    """Gives every reading its verdict, p values adjusted (Holm) over all cells that ask about transfer."""
    for evaluator_name in cells[0]["readings"] if cells else ():
        readings = [(cell, cell["readings"][evaluator_name]) for cell in cells]
        elsewhere = [
            reading
            for cell, reading in readings
            if cell["source"] != cell["target"] and not cell["reference"]
        ]
        asked = [reading for reading in elsewhere if reading["retention"]["value"] is not None]
        for test in ("equivalence", "difference"):
            for reading, p in zip(asked, intervals.holm([r[test]["p"] for r in asked]), strict=True):
                reading[test]["p_holm"] = p
        for _, reading in readings:
            p = [
                reading[test].setdefault("p_holm", reading[test]["p"])
                for test in ("equivalence", "difference")
            ]
            reading["verdict"] = retention.verdict(reading["retention"], *p)


def at_match(
    source: np.ndarray, target: np.ndarray, scales: np.ndarray, matched: float | None
) -> dict | None:
    """What is preserved at equal effect: the source at scale 1, the target at the matched scale, (P, S, K)
    each; None without one.
    """
    if matched is None:
        return None
    here, there = (
        intervals.units(retention.at(source, scales, 1.0)),
        intervals.units(retention.at(target, scales, matched)),
    )
    return {
        "source": float(here.mean()),
        "target": float(there.mean()),
        "difference": intervals.mean(there - here),
    }


def twins(a: Subject, b: Subject) -> bool:
    """Whether two controls are for the same, by their words."""
    return a.words is not None and a.words == b.words


def after(subjects: list[Subject], subject: Subject) -> Iterator[Subject]:
    """The subjects behind one, round and round to it."""
    k = subjects.index(subject)
    yield from [*subjects[k + 1 :], *subjects[:k]]


def file_name(target: str) -> str:
    """A target as a file's name: dmd-hybrid(1); with a hash where more than the colon had to go, so that no
    two targets share one.
    """
    plain = re.sub(r"[^\w.,+=@()-]", "-", target)[:100]
    return (
        plain
        if plain == target.replace(":", "-")
        else f"{plain}-{hashlib.sha256(target.encode()).hexdigest()[:8]}"
    )


def is_reference(target: str) -> bool:
    """Whether a target is there to be compared with, not to be judged: the base in a few steps."""
    return target.partition(":")[2].startswith("few(")
