"""What a measurement draws: prompts in parts, looks at growing numbers of them, the jobs of each.

A verdict needs few scales and many prompts, a curve many scales and few prompts: so the first part is drawn
at every scale and with all that a retention is compared with, later parts at the headline's scale alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from analysis.images.cache import Drawings, Job
from controls.intervals import spending
from controls.lora import Control, content
from models.promptsets import PromptSet

Words = (
    tuple[str, str] | None
)  # the positive and the negative description; None: measured along the control's own direction


@dataclass(frozen=True, eq=False)
class Subject:
    """A control as it is measured."""

    control: Control
    words: Words
    scales: list[float]
    origin: "Subject | None" = None  # what it was adapted from: the effect that it is to have is that one's

    @property
    def name(self) -> str:
        return self.control.card.name

    @property
    def source(self) -> str:
        return self.origin.source if self.origin else self.control.card.member

    def asks(self, target: str) -> bool:
        """Whether a target is of interest: of an adapted control its source and what it was adapted to."""
        members = [name.rpartition("/")[2] for name in self.control.card.recipe.get("members", [])]
        return not self.origin or target in (self.source, *members)

    def acting(self, target: str) -> str:
        """The control that acts on a target, by name: on its source an adapted one's original."""
        return self.origin.name if self.origin and target == self.source else self.name

    def jobs(self, target: str) -> list[Job]:
        return [Job(target, self.acting(target), scale) for scale in self.scales]

    def pair(self, target: str, scale: float) -> list[Job]:
        """What an effect at one scale is made of."""
        return [Job(target, self.acting(target), 0.0), Job(target, self.acting(target), scale)]

    def pilot(self, at: float) -> list[Job]:
        """What tells where a control without words moves images: its source at 0 and at the scale at which it
        will be used.
        """
        return [] if self.words else self.pair(self.source, at)

    def floor(self, target: str) -> Job:
        """Its floor, the random control of the same norms."""
        return Job(target, self.name, 1.0, random=True)

    def said(self, target: str) -> list[Job]:
        """What its words achieve by themselves, said behind the prompts."""
        return [Job(target, words=self.words[0])] if self.words else []


def linked(subjects: list[Subject]) -> list[Subject]:
    """The subjects, adapted ones with their originals where these are measured too."""
    by_content = {content(subject.control): subject for subject in subjects}
    origins = [(s.control.card.recipe.get("adapted_from") or {}).get("hash") for s in subjects]
    return [
        replace(subject, origin=by_content.get(origin)) if origin else subject
        for subject, origin in zip(subjects, origins, strict=True)
    ]


Pair = tuple[Subject, str]  # a control and a target


@dataclass(frozen=True)
class Looks:
    """When verdicts are made: a look takes all parts until then, and spends its share of the error."""

    parts: tuple[int, ...]  # of each look, how many parts it takes
    prompts: tuple[int, ...]  # and how many prompts these hold
    shares: tuple[float, ...]


def looks_of(rounds: int, most: int, curve: int) -> tuple[Looks, list[int]]:
    """Looks at a number of prompts that doubles from round to round until `most`, and the ends of the parts.

    The first part ends at `curve` prompts, or with the first look.
    """
    ends = sorted({max(1, most // 2 ** (rounds - 1 - k)) for k in range(rounds)})
    parts = sorted({min(curve, ends[0]), *ends})
    return Looks(tuple(parts.index(end) + 1 for end in ends), tuple(ends), tuple(spending(len(ends)))), parts


def cycled(prompts: PromptSet, count: int, seeds: int, seed: int) -> tuple[list[str], list[int]]:
    """So many texts, and the seeds of their images, `seeds` each: where the prompts are fewer they come again
    with other seeds.
    """
    turns = [divmod(k, len(prompts.texts)) for k in range(count)]
    texts = [prompts.texts[k] for _, k in turns]
    if prompts.seeds is None:
        return texts, [seed + image for image in range(count * seeds)]
    firsts = [prompts.seeds[k] + turn * seeds for turn, k in turns]
    return texts, [first + k for first in firsts for k in range(seeds)]


@dataclass(frozen=True)
class Design:
    """What is measured, on which images."""

    subjects: list[Subject]
    targets: list[str]
    parts: list[Drawings]  # of the prompts; the first with every scale
    plain: list[Drawings]  # further images of each part's prompts, for what they are without a control
    pilot: Drawings  # images on which nothing is measured
    looks: Looks
    at: float  # the scale of the headline
    references: bool

    @property
    def pairs(self) -> list[Pair]:
        """What verdicts are about."""
        return [
            (subject, target)
            for subject in self.subjects
            for target in self.targets
            if target != subject.source and not is_reference(target) and subject.asks(target)
        ]

    @property
    def members(self) -> list[str]:
        """The targets that controls are judged on, sources among them."""
        return [target for target in self.targets if not is_reference(target)]

    def start(self) -> list[tuple[Drawings, list[Job]]]:
        """The pilot: what tells where controls without words move images."""
        return [(self.pilot, [job for subject in self.subjects for job in subject.pilot(self.at)])]

    def curves(self, subjects: Sequence[Subject]) -> list[tuple[Drawings, list[Job]]]:
        """The first part at every scale of these controls, and what their words achieve by themselves."""
        jobs = []
        for subject in subjects:
            places = dict.fromkeys([subject.source, *self.members])
            places = filter(subject.asks, places)
            jobs += [job for target in places for job in [*subject.jobs(target), *subject.said(target)]]
        return [(self.parts[0], jobs)]

    def beside(self) -> list[tuple[Drawings, list[Job]]]:
        """What retentions are compared with: drawn last, since no verdict waits for it."""
        if not self.references:
            return []
        originals = [subject for subject in self.subjects if not subject.origin]
        jobs = [subject.floor(target) for subject in self.subjects for target in self.targets]
        jobs += [Job(target, again=True) for target in self.members]
        others = [target for target in self.targets if is_reference(target)]
        jobs += [job for subject in originals for target in others for job in subject.jobs(target)]
        return [(self.parts[0], jobs)]

    def of_look(self, look: int, pairs: Sequence[Pair]) -> list[tuple[Drawings, list[Job]]]:
        """What a look at these cells needs beyond the looks before it: effects at one scale, on the source
        and on the target.
        """
        jobs = [
            job
            for subject, target in pairs
            for place in (subject.source, target)
            for job in subject.pair(place, self.at)
        ]
        plain = [Job(place) for subject, target in pairs for place in (subject.source, target)]
        new = slice(self.looks.parts[look - 1] if look else 0, self.looks.parts[look])
        kinds = ((self.parts, jobs), (self.plain, plain))
        return [
            (part, list(dict.fromkeys(kind))) for parts, kind in kinds for part in parts[new] if part.numbers
        ]

    @property
    def all(self) -> list[tuple[Drawings, list[Job]]]:
        """All that may have to be drawn."""
        looks = [self.of_look(look, self.pairs) for look in range(len(self.looks.parts))]
        drawn = [jobs for look in looks for jobs in look]
        return [*self.start(), *drawn, *self.curves(self.subjects), *self.beside()]

    @property
    def texts(self) -> list[str]:
        """Every text that a network is told."""
        return list(dict.fromkeys(text for part, jobs in self.all for job in jobs for text in part.told(job)))


def is_reference(target: str) -> bool:
    """Whether a target is there to be compared with, not to be judged: the base in a few steps."""
    return target.partition(":")[2].startswith("few(")
