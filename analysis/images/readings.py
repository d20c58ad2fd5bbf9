"""Drawings to cells: what each evaluator reads of one control on one target, with its references, and what it
leaks onto others.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from analysis.images.cache import Drawings, Job
from analysis.images.design import Design, Pair, Subject, Words, is_reference
from configs import plain_name
from controls import intervals, retention
from controls.effect import change, own_direction, percent_change, preservation, without

CLAIMS = ("reversed", "dead", "equivalence", "difference")  # that a verdict can make


class Measurement:
    """Reads drawings. Whatever is asked twice is computed once."""

    def __init__(self, design: Design):
        self.design, self.drawings, self.subjects = design, design.parts[0], design.subjects
        self.features: dict[tuple, np.ndarray] = {}
        self.looked: dict[tuple[str, str], int] = {}  # looks that a cell (control, target) has had
        self.finished: list[Subject] = []  # whose curves are drawn, in the order of the design
        self.beside = False  # whether what retentions are compared with is drawn

    def look(self, pairs: Sequence[Pair], precision: float | None = None) -> list[Pair]:
        """Takes one more look at these cells; returns those that are undecided still, and whose interval is
        not within ± precision.

        Each p is corrected for the size of the table by itself (Bonferroni), so that a verdict does not wait
        for those of other controls. At the end all are corrected together (Holm), which decides no less.
        """
        undecided, asked = [], len(self.design.pairs)
        for subject, target in pairs:
            self.looked[subject.name, target] = self.looked.get((subject.name, target), 0) + 1
            first = next(iter(self.drawings.evaluators))
            kept, p = self.claims(first, subject, target)
            word = retention.verdict(kept, {claim: min(1.0, asked * value) for claim, value in p.items()})
            narrow = precision is not None and intervals.within(kept, precision)
            if not (narrow or retention.decided(word, kept)):
                undecided.append((subject, target))
        return undecided

    def claims(self, evaluator_name: str, subject: Subject, target: str) -> tuple[dict, dict[str, float]]:
        """The retention of a cell by all its images, and p of each claim over the looks that it has had."""
        looks, by_look = self.design.looks, []
        looked = self.looked.get((subject.name, target), 0)
        for parts in looks.parts[:looked] or (1,):
            below, above = self.sides(evaluator_name, subject, target, self.design.at, parts)
            by_look.append(retention.tests(below, above))
        shares = looks.shares if looked else (1.0,)
        p = {claim: intervals.over_looks([tests[claim] for tests in by_look], shares) for claim in CLAIMS}
        return intervals.ratio(above, below), p

    def sides(
        self, evaluator_name: str, subject: Subject, target: str, scale: float, parts: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Effects at a scale on the source and on a target in the first parts, (n,) each, one per prompt.

        Adjusted for how much of what the control makes its images happened to hold without it, beside other
        images of the same prompts: a face that smiles already cannot smile more.
        """
        effects, chance, texts = [], [], []
        for drawings, plain in zip(self.design.parts[:parts], self.design.plain, strict=False):
            pair = [
                change(self.score(evaluator_name, subject, subject.pair(place, scale), drawings), 0)[..., 1]
                for place in (subject.source, target)
            ]
            effects.append(intervals.units(np.stack(pair, -1)))  # (P, 2)
            chance.append(self.chance(evaluator_name, subject, target, drawings, plain))
            texts += drawings.texts
        return tuple(
            intervals.adjusted(*(by_text(np.concatenate(all), texts) for all in (effects, chance))).T
        )

    def chance(
        self, evaluator_name: str, subject: Subject, target: str, drawings: Drawings, plain: Drawings
    ) -> np.ndarray:
        """How far the scores at 0 of each prompt's images are from those of all images of it, (P, 2) for the
        source and the target; nothing where there are no others.
        """
        if not plain.numbers or is_reference(target):
            return np.zeros((len(drawings.texts), 0))
        places = [Job(place) for place in (subject.source, target)]
        own, others = (  # (P, S, 2)
            np.concatenate([self.score(evaluator_name, subject, [job], some) for job in places], 2)
            for some in (drawings, plain)
        )
        return intervals.units(own) - intervals.units(np.concatenate([own, others], 1))

    def finish(self, subjects: Sequence[Subject]) -> None:
        """Says that the curves of these are drawn."""
        there = {subject.name for subject in (*self.finished, *subjects)}
        self.finished = [subject for subject in self.subjects if subject.name in there]

    @property
    def targets(self) -> list[str]:
        """The targets that are drawn until now."""
        return self.design.targets if self.beside else self.design.members

    def of(self, subject: Subject) -> list[str]:
        """The targets of a subject's cells."""
        return [target for target in self.targets if subject.asks(target)]

    def cells(self) -> list[dict]:
        """One per subject and target."""
        cells = [self.cell(subject, target) for subject in self.finished for target in self.of(subject)]
        judge(cells)
        return cells

    def cell(self, subject: Subject, target: str) -> dict:
        """One control on one target: the record of docs/design.md, without its verdict."""
        card, words = subject.control.card, subject.words
        looked = self.looked.get((subject.name, target), 0)
        parts = self.design.parts[: self.design.looks.parts[looked - 1] if looked else 1]
        return {
            "control": card.name,
            "kind": card.kind,
            "hash": self.drawings.contents[card.name, False][:16],
            "source": f"{card.family}/{subject.source}",
            "adapted_from": subject.origin.name if subject.origin else "",
            "target": f"{card.family}/{target}",
            "reference": is_reference(target),
            "at": self.design.at,
            "scales": subject.scales,
            "below": None if math.isinf(self.drawings.band.below) else self.drawings.band.below,
            "above": self.drawings.band.above or None,
            "readings": {
                evaluator_name: self.reading(evaluator_name, subject, target)
                for evaluator_name in self.drawings.evaluators
            },
            "clip_change_percent": self.clip_change(subject, target),
            "looks": looked,
            "images": sum(len(drawings.numbers) for drawings in parts),
            "prompts": len({text for drawings in parts for text in drawings.texts}),
            "seeds": self.drawings.seeds,
            "positive": words[0] if words else "",
            "negative": words[1] if words else "",
            "picture": f"images/{plain_name(card.name)}/{file_name(target)}.png",
        }

    def clip_change(self, subject: Subject, target: str) -> dict:
        """The change in % of the mean CLIP score at the largest scale, the column of the paper's Table 1; no
        numbers without words or CLIP.
        """
        clip = self.drawings.evaluators.get("clip")
        if clip is None or subject.words is None:
            return dict(intervals.UNDEFINED)
        scores = self.seen("clip", subject, target) @ clip.texts([subject.words[0]])[0]
        return percent_change(scores[..., -1], scores[..., subject.scales.index(0)])

    def reading(self, evaluator_name: str, subject: Subject, target: str) -> dict:
        """What one evaluator says of a cell, its verdict left open."""
        scales, zero = np.array(subject.scales), subject.scales.index(0)
        source, there = (self.effect(evaluator_name, subject, place) for place in (subject.source, target))
        inside = retention.window(source, scales)
        below, above = retention.slopes(source, there, scales, inside)
        share, p = self.claims(evaluator_name, subject, target)
        column = subject.scales.index(self.design.at)
        height = retention.height(share["value"], source[..., column], there[..., column])
        matched = retention.matched_scale(source, height * there, scales)
        kept = {
            place: preservation(self.rest(evaluator_name, subject, place), zero)
            for place in {subject.source, target}
        }
        shape, own = retention.shape(there, scales), target == subject.source
        return {
            "window": inside.tolist(),
            **retention.estimate(there, scales, inside),
            "retention": share,
            "below_zero": self.below_zero(evaluator_name, subject, target),
            "slope_retention": retention.slope_retention(source, there, scales, inside),
            "p": {claim: {"p": value} for claim, value in p.items()},
            "of_words": self.of_words(evaluator_name, subject, target, there[..., column]),
            "matched_scale": matched,
            "shape": shape,
            "monotonicity": shape["monotonicity"],
            "preservation": float(np.delete(kept[target], zero, -1).mean()),
            "preservation_curve": kept[target].mean((0, 1)).tolist(),
            "preservation_matched": at_match(kept[subject.source], kept[target], scales, matched["value"]),
            "spread": None if own else retention.spread(source[..., column], there[..., column]),
            "references": self.compared(evaluator_name, subject, target, below, above),
        }

    def below_zero(self, evaluator_name: str, subject: Subject, target: str) -> dict | None:
        """The retention on the other side of 0, and whether it differs from that on this side, by the prompts
        that have both; None for a control that is not dialled below 0.
        """
        at = self.design.at
        if -at not in subject.scales:
            return None
        sides = [self.sides(evaluator_name, subject, target, scale, 1) for scale in (at, -at)]
        return {"retention": intervals.ratio(*reversed(sides[1])), "differs": retention.differ(*sides)}

    def of_words(self, evaluator_name: str, subject: Subject, target: str, effect: np.ndarray) -> dict:
        """The effect at the headline's scale as a share of what the words themselves achieve, said behind the
        prompts to the same model.
        """
        if subject.words is None or is_reference(target):
            return dict(intervals.UNDEFINED)
        said = change(self.score(evaluator_name, subject, [Job(target), *subject.said(target)]), 0)
        if said.mean() <= 0:  # words that a model does not know are no measure
            return dict(intervals.UNDEFINED)
        return intervals.ratio(intervals.units(effect), intervals.units(said[..., 1]))

    def compared(
        self, evaluator_name: str, subject: Subject, target: str, below: np.ndarray, above: np.ndarray
    ) -> dict:
        """What a retention is to be held against. below, above: the slopes of the source and of the target,
        one per independent unit.
        """
        found = dict.fromkeys(("floor", "ceiling", "wrong", "rerun", "normalised"))
        if not self.beside:
            return found

        def at(slopes):
            return {"slope": intervals.mean(slopes), "share": intervals.ratio(slopes, below)}

        floor = self.slopes(evaluator_name, subject, target, [Job(target), subject.floor(target)], [0.0, 1.0])
        found["floor"] = at(floor)
        trained = (s for s in self.subjects if twins(s, subject) and not s.origin)
        ceiling = next((s for s in trained if s.source == target), None)
        if ceiling and target != subject.source:
            there, scales = self.effect(evaluator_name, ceiling, target), np.array(ceiling.scales)
            slopes = retention.slopes(there, there, scales)[0]
            found["ceiling"] = {"control": ceiling.name, **at(slopes)}
            found["normalised"] = intervals.ratio(above - floor, slopes - floor)
        others = (s for s in after(self.subjects, subject) if s.words and not s.origin)
        wrong = next((s for s in others if not twins(s, subject)), None)
        if wrong and subject.words:
            found["wrong"] = {
                "control": wrong.name,
                **at(self.small_slopes(evaluator_name, wrong, target, subject.words)),
            }
        if not is_reference(target):
            score = self.score(evaluator_name, subject, [Job(target), Job(target, again=True)])
            found["rerun"] = {"effect": intervals.mean(intervals.units(change(score, 0)[..., 1]))}
        return found

    def leakage(self) -> list[dict]:
        """How much each control moves what each other is for, per target and evaluator; 1 = as much."""
        different: dict[Words, Subject] = {}
        for subject in (subject for subject in self.finished if not subject.origin):
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
            for target in self.design.members
            for owner in owners
            for own in [self.small_slopes(evaluator_name, owner, target, owner.words)]
            for subject in self.finished
            if subject.asks(target)
            for slopes in [self.small_slopes(evaluator_name, subject, target, owner.words)]
        ]

    def small_slopes(self, evaluator_name: str, subject: Subject, target: str, words: Words) -> np.ndarray:
        """Slopes of the effect that words mean, (n,), over the scales from -1 to 1: the dose at which
        controls are compared.
        """
        scales = [scale for scale in subject.scales if abs(scale) <= 1]
        own = replace(subject, words=words, scales=scales)
        return self.slopes(evaluator_name, own, target, own.jobs(target), scales)

    def slopes(
        self, evaluator_name: str, subject: Subject, target: str, jobs: list[Job], scales: list[float]
    ) -> np.ndarray:
        """Slopes of the effect of jobs at scales, (n,), one per independent unit."""
        effect = change(self.score(evaluator_name, subject, jobs), scales.index(0))
        return intervals.units(retention.slope(np.array(scales), effect))

    def effect(self, evaluator_name: str, subject: Subject, target: str) -> np.ndarray:
        """The effect of a subject on a target, (P, S, K)."""
        return change(self.score(evaluator_name, subject, subject.jobs(target)), subject.scales.index(0))

    def score(
        self, evaluator_name: str, subject: Subject, jobs: list[Job], drawings: Drawings | None = None
    ) -> np.ndarray:
        """How much the images of jobs are what a subject makes, (P, S, K); in the first part, or another."""
        features = self.stack(evaluator_name, jobs, drawings or self.drawings)
        if subject.words:
            return self.drawings.evaluators[evaluator_name].score(features, *subject.words)
        return features @ self.direction(evaluator_name, subject)

    def rest(self, evaluator_name: str, subject: Subject, target: str) -> np.ndarray:
        """The features of a subject's images without what it is meant to change, (P, S, K, d)."""
        features = self.seen(evaluator_name, subject, target)
        if subject.words:
            return self.drawings.evaluators[evaluator_name].rest(features, *subject.words)
        return without(features, self.direction(evaluator_name, subject))

    def direction(self, evaluator_name: str, subject: Subject) -> np.ndarray:
        """Where a subject without words moves the pilot's images of its own source, (d,)."""
        pilot = subject.pilot(self.design.at)
        return own_direction(*(self.one(evaluator_name, job, self.design.pilot) for job in pilot))

    def seen(self, evaluator_name: str, subject: Subject, target: str) -> np.ndarray:
        """The features of a subject's images in the first part, (P, S, K, d)."""
        return self.stack(evaluator_name, subject.jobs(target), self.drawings)

    def stack(self, evaluator_name: str, jobs: list[Job], drawings: Drawings) -> np.ndarray:
        """The features of jobs, (P, S, K, d)."""
        return np.stack([self.one(evaluator_name, job, drawings) for job in jobs], 2)

    def one(self, evaluator_name: str, job: Job, drawings: Drawings) -> np.ndarray:
        key = evaluator_name, drawings.key(job)
        if key not in self.features:
            self.features[key] = drawings.features(job, evaluator_name)
        return self.features[key]


def by_text(values: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """The means of values (n, ...) over equal texts, in the order of the first: prompts that came round again
    count once.
    """
    different = {text: index for index, text in enumerate(dict.fromkeys(texts))}
    if len(different) == len(texts):
        return values
    of = np.array([different[text] for text in texts])
    return np.stack([values[of == index].mean(0) for index in range(len(different))])


def judge(cells: list[dict]) -> None:
    """Gives every reading its verdict: p values over the looks, adjusted (Holm) over all cells that ask about
    transfer.

    A control that does next to nothing of what its words do, on its own source, has no verdict.
    """
    for evaluator_name in cells[0]["readings"] if cells else ():
        readings = [(cell, cell["readings"][evaluator_name]) for cell in cells]
        asked = [
            reading
            for cell, reading in readings
            if cell["source"] != cell["target"]
            and not cell["reference"]
            and reading["retention"]["value"] is not None
        ]
        for claim in CLAIMS:
            for reading, p in zip(asked, intervals.holm([r["p"][claim]["p"] for r in asked]), strict=True):
                reading["p"][claim]["p_holm"] = p
        weak = {cell["control"] for cell, reading in readings if is_weak(cell, reading)}
        for cell, reading in readings:
            p = {claim: tested.setdefault("p_holm", tested["p"]) for claim, tested in reading["p"].items()}
            word = retention.verdict(reading["retention"], p)
            reading["verdict"] = "undefined" if cell["control"] in weak else word


def is_weak(cell: dict, reading: dict) -> bool:
    """Whether a reading of a control on its own source shows hardly any effect."""
    share = reading["of_words"]["value"]
    return cell["source"] == cell["target"] and share is not None and abs(share) < retention.WEAK


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
