"""Images of every prompt and seed, drawn once: latents and features are kept by content, so that only what is
new is drawn.

A drawing is found again by the hash of all that it depends on: networks, plan, control, scale, prompts,
seeds. It does not depend on the batch, on the process that drew it and on the run that asked for it.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from analysis.images import store
from configs import UserError, note
from controls.acting import acting
from controls.lora import Control, content
from models import plans
from models.evaluators import Evaluator
from models.families import Family, FamilyCard
from models.hashing import identity
from models.noise import ALL, Band
from models.plans import plan_of
from models.quantized import weights
from models.sampler import Member, Plan, draw_noise, finish

SHOWN = 4  # images of a drawing that pictures show: the first seed of the first prompts
OF_THE_BASE = ("base", "interval")  # plans that no student takes part in
VERSION = 1  # raised when the same description comes to mean other images

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One drawing: every prompt and seed on one target, under one control at one scale."""

    target: str  # a member, or member:plan
    control: str | None = None  # by name; None = none
    scale: float = 0.0
    random: bool = False  # not the control itself but its floor, a random one of the same norms
    again: bool = False  # a second drawing of the same, to see whether it comes out the same
    words: str = ""  # said behind every prompt, in place of a control


class Drawings:
    """The drawings of one measurement, made when they are asked for, in a folder that several measurements
    share.
    """

    def __init__(
        self,
        family: Family,
        controls: dict[tuple[str, bool], Control],
        evaluators: dict[str, Evaluator],
        texts: list[str],
        numbers: list[int],
        band: Band,
        folder: Path,
    ):
        """controls: by (name, whether it is the random one of that control's norms). texts: P prompts.

        numbers: (P · S), the seed of each image, prompt by prompt.
        """
        self.family, self.controls, self.evaluators, self.band = family, controls, evaluators, band
        self.texts, self.numbers, self.seeds = texts, numbers, len(numbers) // len(texts)
        self.folder = Path(folder)
        self.contents = {key: content(control) for key, control in controls.items()}
        self.keys: dict[Job, str] = {}
        self.whole: set[Path] = set()  # files that were seen to be
        self.signs = {name: sign(name, evaluator) for name, evaluator in evaluators.items()}
        store.sweep(self.folder)
        for name, path in self.words():
            evaluators[name].known |= {
                text: vector.numpy() for text, vector in (store.read(path, path.stem) or {}).items()
            }

    def key(self, job: Job) -> str:
        """The hash of what the images of a job depend on."""
        if job not in self.keys:
            self.keys[job] = hashlib.sha256(json.dumps(self.said(job), sort_keys=True).encode()).hexdigest()
        return self.keys[job]

    def said(self, job: Job) -> dict:
        """What the images of a job depend on."""
        member, _, plan = job.target.partition(":")
        card, acts = self.family.card, bool(job.control is not None and job.scale)
        packed = {"quantize": self.family.quantize} if self.family.quantize else {}
        return (
            packed
            | ({"beside": True} if acts and plan.startswith("delta(") else {})
            | ({"words": job.words} if job.words else {})
            | ({"plans": plans.VERSION} if plan else {})
            | {
                "version": VERSION,
                "target": job.target,
                "again": job.again,
                "prompts": self.texts,
                "seeds": self.numbers,
                "members": [identity(card, name) for name in ([member, card.base] if plan else [member])],
                "control": [self.contents[job.control, job.random], job.scale, *self.within]
                if acts
                else None,
                "dtype": str(self.family.dtype),
            }
        )

    @property
    def within(self) -> list[float | None]:
        """The noise levels at which controls act, as keys have written them: below, then above where there
        is one.
        """
        above, below = self.band.above, self.band.below
        return [None if math.isinf(below) else below, *([above] if above else [])]

    def path(self, job: Job, evaluator_name: str = "") -> Path:
        """Where a job's latents are, or its features by one evaluator."""
        key = self.key(job)
        return (
            self.folder
            / key[:2]
            / f"{key[:32]}{'-' + self.signs[evaluator_name] if evaluator_name else ''}.safetensors"
        )

    def files(self, job: Job) -> list[Path]:
        return [self.path(job), *(self.path(job, evaluator_name) for evaluator_name in self.evaluators)]

    def words(self) -> Iterator[tuple[str, Path]]:
        """The evaluators that embed texts, and where these embeddings are kept."""
        return (
            (name, self.folder / f"words-{self.signs[name]}.safetensors")
            for name, evaluator in self.evaluators.items()
            if hasattr(evaluator, "known")
        )

    def remember_words(self) -> None:
        """Keeps what evaluators made of texts, so that a run with nothing new need not load them."""
        for name, path in self.words():
            store.write(
                path,
                {text: torch.from_numpy(vector) for text, vector in self.evaluators[name].known.items()},
                path.stem,
            )

    def missing(self, jobs: list[Job]) -> list[Job]:
        """The jobs of which something is still to be made, each kind of images once; what is damaged is
        missing, and said.
        """
        different = {self.key(job): job for job in jobs}
        found = [job for job in different.values() if not all([self.there(path) for path in self.files(job)])]
        spoilt = [
            path for job in found for path in self.files(job) if path.exists() and path not in self.whole
        ]
        if spoilt:
            note(
                f"{len(spoilt)} of the drawings in {self.folder} are damaged, or of an earlier version: "
                f"they are made again"
            )
        return found

    def there(self, path: Path) -> bool:
        """Whether a file is there, whole and what its name says; a file is read once to know."""
        if path not in self.whole and store.read(path, path.stem) is not None:
            self.whole.add(path)
        return path in self.whole

    def keep(self, path: Path, **tensors: Tensor) -> None:
        store.write(path, tensors, path.stem)
        self.whole.add(path)

    def read(self, path: Path) -> dict[str, Tensor]:
        """What is kept in a file. Raises UserError where it was damaged after it was seen to be whole."""
        return store.load(path, path.stem)

    def told(self, job: Job) -> list[str]:
        """The texts of a job's images, (P,)."""
        return [f"{text}, {job.words}" for text in self.texts] if job.words else self.texts

    def words_of(self, job: Job) -> str:
        """What a job draws, for people."""
        if job.control is None or not job.scale:
            return f"{self.family.card.name}/{job.target}"
        floor = "the random control beside " if job.random else ""
        return f"{self.family.card.name}/{job.target} with {floor}{job.control} at scale {job.scale:g}"

    def plan(self, target: str) -> Plan:
        """What a target means. Raises UserError as `plan_of`."""
        return plan_of(self.family, target)

    def shown(self) -> range:
        """The images that pictures show."""
        return range(0, len(self.numbers), self.seeds)[:SHOWN]

    def features(self, job: Job, evaluator_name: str) -> np.ndarray:
        """What an evaluator sees, (P, S, d)."""
        found = self.read(self.path(job, evaluator_name))["features"].double().numpy()
        return found.reshape(len(self.texts), self.seeds, -1)

    def pictures(self, job: Job) -> Tensor:
        """The images to show, uint8 (n, 3, H, W)."""
        return self.read(self.path(job))["pictures"]


@torch.no_grad()
def make(parts: Sequence[Drawings], job: Job) -> None:
    """Draws what is not yet drawn of a job, parts of one measurement in common batches, and reads their
    missing features; an image is decoded once.
    """
    family, evaluators = parts[0].family, parts[0].evaluators
    new = [part for part in parts if not part.there(part.path(job))]
    drawn = dict(zip(new, latents(new, job), strict=True)) if new else {}
    whole = torch.cat(
        [
            drawn[part] if part in drawn else part.read(part.path(job))["latents"].to(family.device)
            for part in parts
        ]
    )
    blind = [name for name in evaluators if not all(part.there(part.path(job, name)) for part in parts)]
    sizes = [len(part.numbers) for part in parts]
    starts = dict(zip(parts, accumulate(sizes, initial=0), strict=False))
    shown = {starts[part] + row for part in new for row in part.shown()}

    def seen(rows: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The pictures to show among these, and what every evaluator sees."""
        images = family.decode(whole[rows])
        pictures = [
            ((images[k] + 1) * 127.5).round().to(torch.uint8)
            for k, row in enumerate(rows.tolist())
            if row in shown
        ]
        return pictures, [torch.from_numpy(evaluators[name].features(images)) for name in blind]

    pictures, features = zip(*family.drawing.of(seen, len(whole)), strict=True)
    features = {
        name: torch.cat(batches) for name, batches in zip(blind, zip(*features, strict=True), strict=True)
    }
    for name, values in features.items():
        if not torch.isfinite(values).all():
            raise UserError(
                f"{name} sees numbers that are not finite in the images of {parts[0].words_of(job)}: its "
                f"weights are damaged"
            )
    pictures = iter([one for batch in pictures for one in batch])
    for part in new:
        shown_here = torch.stack([next(pictures) for _ in part.shown()])
        part.keep(part.path(job), latents=drawn[part], pictures=shown_here)
    for name, values in features.items():
        for part, rows in zip(parts, values.split(sizes), strict=True):
            part.keep(part.path(job, name), features=rows)


def latents(parts: Sequence[Drawings], job: Job) -> tuple[Tensor, ...]:
    """The finished latents of a job's images, for each part (P · S, C, H, W)."""
    first = parts[0]
    family, shape = first.family, first.family.latent_shape
    control = first.controls[job.control, job.random] if job.control is not None and job.scale else None
    images = [
        (number, text)
        for part in parts
        for k, text in enumerate(part.told(job))
        for number in part.numbers[k * part.seeds : (k + 1) * part.seeds]
    ]
    # late levels alone leave the structure that early ones decide (Gandikota et al. 2023, sec. 5; SDEdit)
    holds = None if first.band == ALL else first.band.__contains__
    with acting(first.plan(job.target), control, job.scale, family.card.name, holds) as plan:

        def drawn(rows: Tensor) -> Tensor:
            numbers, texts = zip(*[images[row] for row in rows], strict=True)
            noise = draw_noise(numbers, shape, plan.steps, family.device)
            return finish(plan, noise, family.encode(list(texts)))

        finished = torch.cat(family.drawing.of(drawn, len(images)))
    if not torch.isfinite(finished).all():
        culprit = next(filter(None, map(broken, plan.members)), "a smaller scale, or dtype=fp32, may do")
        raise UserError(f"the images of {first.words_of(job)} are not finite: {culprit}")
    return finished.split([len(part.numbers) for part in parts])


def ways(names: Sequence[str], students: Sequence[str], family: Family) -> list[tuple[str, str]]:
    """Every (student, plan) that a run draws; plans of the base alone stand once, under the base's name.
    students: empty = all.

    family: a bare one does. Raises UserError for a member of another family and for a plan that is none.
    """
    base, others = family.card.base, [name for name in family.card.usual if name != family.card.base]
    if base in students:
        raise UserError(f"{base} is the base itself; students are {', '.join(others)}")
    found = {}
    for plan in names:
        for name in students or others:
            # a mistake is said now, not after an hour of drawing
            plans.named(plan, family.member(base), family.member(name))
            found[base if plan.split("(")[0] in OF_THE_BASE else name, plan] = None
    return list(found)


def networks(target: str, family: FamilyCard) -> set[str]:
    """The members whose networks a target needs; a LoRA student's is its base's."""
    member, _, plan = target.partition(":")
    return {family.holder(name) for name in ((member, family.base) if plan else (member,))}


def in_turn(jobs: Sequence[T], family: FamilyCard) -> list[T]:
    """Jobs, each with a target, by the networks that they need, so that few are in memory at once: the base's
    first.
    """
    return sorted(jobs, key=lambda job: sorted(networks(job.target, family) - {family.base}))


def one_by_one(jobs: Sequence[T], family: Family, label: str, quiet: bool) -> Iterator[T]:
    """The jobs, each when it is its turn, with a bar; a network that no later one needs is let go, and after
    the last all are.
    """
    needed = [networks(job.target, family.card) for job in jobs]
    for k, job in enumerate(tqdm(jobs, label, unit="set", disable=quiet)):
        family.keep(set().union(*needed[k:]))
        yield job
    family.keep(())


def in_memory(jobs: Sequence[T], family: FamilyCard) -> list[tuple[set[str], set[str]]]:
    """For the jobs one by one: the members that are in memory, LoRA students by their own names, and those
    that are asked.
    """
    needed, held, found = [networks(job.target, family) for job in jobs], set(), []
    for k, job in enumerate(jobs):
        later = set().union(*needed[k:])
        asked = needed[k] | {job.target.partition(":")[0]}
        held = {name for name in held if family.holder(name) in later} | asked
        found.append((held, asked))
    return found


def broken(member: Member) -> str:
    """Which of a network's own weights is not finite; empty where all are."""
    name = next(
        (name for name, weight in weights(member.denoiser.net) if not torch.isfinite(weight).all()), ""
    )
    return name and f"{name} of {member.name} is not"


def sign(name: str, evaluator: Evaluator) -> str:
    """A short hash of an evaluator: its name and what its features depend on."""
    about = json.dumps([type(evaluator).__name__, evaluator.identity])
    return f"{name}-{hashlib.sha256(about.encode()).hexdigest()[:12]}"
