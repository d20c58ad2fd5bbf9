"""Teaches a control to members on which its effect does not survive: accelerate launch train/adapt.py
[config=FILE] [key=value ...]

Without arguments: watercolour-kv, of which tiny/dmd keeps a fifth, for tiny/dmd. The student's x0 with the
adapted control is to be its x0 without it, and the guided change that the original makes of where its source
goes from the same x. What is trained on are the student's own runs with the control as it is by then, drawn
anew a few times; the change that is taught is each time as much larger or smaller as the effect is still off,
on each member and at each scale.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs import UserError, entry, list_of, replacing
from configs.screen import show_table
from controls import formats
from controls.layers import CUSTOM
from controls.lora import Card, Control, content, detach, fits, fusing, strength, tie
from models import promptsets
from models.batches import Batches
from models.cards import FamilyCard, card, split
from models.evaluators import JUDGES, Evaluator, load_evaluators
from models.families import Family
from models.hashing import identity
from models.loading import skeleton
from models.noise import NOISE_SCHEDULES, Noise
from models.prompts import Prompts
from models.quantized import quantized
from models.sampler import Member, alone, draw_noise, sample, update
from train import dry_run
from train.checkpoint import seeded
from train.run import Run, Training
from train.shares import Features, Shares

REMEMBERED = (
    "members scales prompts runs rounds ahead judged precision steps batch_size gradient_accumulation_steps "
    "learning_rate seed"
)
JUDGING = 4  # every fourth prompt is not learnt on: there gains and strength are set, and it is compared
GAINS = (0.5, 3.0)  # between which the taught change is multiplied
MORE = 4  # times the images that judge set the strength at the most
PAID = 1 / 3  # of a larger gain's logarithm, which the effect's has to gain by it
DOSES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)  # of which calibration finds the one that is right


@dataclass
class Config(Training):
    name: str = "auto"  # of the control, and of the run folder; auto = the original's and the member's
    control: str = "controls/tiny/watercolour-kv.safetensors"  # the original, a control file of any layout
    source: str = ""  # family/member that a file without a card of ours was trained on; empty = the base
    encoders: str = "refuse"  # what becomes of text encoders' layers in a file: refuse it, or ignore them
    member: str = "tiny/dmd"  # family/member that it is adapted to
    members: list[str] = list_of()  # several of one family, for which one file is made; empty = member alone
    rank: int = 0  # of the low-rank pairs; 0 = the original's
    # layer set, see controls/layers.py; empty = the original's, and its weights to start from
    layers: str = ""
    scales: list[float] = list_of()  # at which it is taught; empty = -1 and 1, of a LoRA 0.5 and 1
    # texts and files; empty = the second half of the family's more_prompts: measurements begin with the first
    prompts: list[str] = list_of()
    positive: str = ""  # what it makes, for the calibration; empty = what the original's card says
    negative: str = ""  # what it departs from; empty = what the original's card says
    runs: int = 24  # of each member at each scale, drawn in every round
    rounds: int = 3  # in which the runs are drawn anew, with the control as it is by then
    # steps in which the source goes on from x to the end, where the change is taken; 1 = what it sees at x
    ahead: int = 4
    # images on which the effect is made the original's, by the card's first two evaluators: what is taught is
    # made larger or smaller before a round, by the first half of them, and the result last of all; 0 = not
    judged: int = 192
    # ± of the effect on those images [95 %] above which twice or four times as many set the strength, on
    # prompts that are learnt on too; null = those alone
    precision: float | None = None
    cache: str = "runs/cache"  # what is seen of the original on its source is kept here
    compared: int = 24  # images on which the result is compared with the original at the end; 0 = none
    steps: int = 180  # optimizer steps
    learning_rate: float = 2e-3
    out: str = "runs/adapt"  # the run is written to out/name


def main(cfg: Config) -> Path | None:
    """Trains and returns the path of the control."""
    original = prepare(cfg)
    if cfg.dry_run:
        shown = replace(cfg, layers="full") if cfg.layers == CUSTOM else cfg  # no fewer than its own
        return dry_run.show(shown, partial(cost, cfg, original))
    run = Run(cfg, original.card.kind, cfg.prompts)
    same = (cfg.layers, cfg.rank) == (original.card.layers, original.card.rank)
    with run.training(cfg.prompts[0], recipe(cfg, original), start=original if same else None):
        lesson = Lesson(cfg, run, original)
        with lesson.tied():
            for step in run.steps():
                lesson.begin(step)
                for generator in run.parts(step):
                    run.backward(lesson(generator))
                run.descend(step)
            if cfg.judged and run.main:  # who writes it
                run.settle()
                run.multiply(lesson.calibrated())
            if cfg.compared and run.main:
                report(run, lesson.compare())
            return run.save()


def report(run: Run, rows: list[dict]) -> None:
    """Prints, keeps and logs what the adaptation has brought."""
    with replacing(run.folder / "shares.json") as new:
        new.write_text(json.dumps(rows, indent=1) + "\n")
    columns = ("original", "adapted", "judged")
    shown = [{**row, **{key: ranged(row[key]) for key in columns}} for row in rows]
    title = "Share of the original's effect on its source [95 %]; judged: on the images that set its strength"
    show_table(title, shown)
    finals = {
        f"adapt/{row['member']}/{row['evaluator']}/{key}": row[key]["value"]
        for row in rows
        for key in ("original", "adapted")
    }
    run.tracker.summary({key: value for key, value in finals.items() if value is not None})


def prepare(cfg: Config) -> Control:
    """The original; what the config leaves open is filled in. Raises UserError for what does not fit."""
    cfg.members = cfg.members or [cfg.member]
    families = list(dict.fromkeys(split(member)[0] for member in cfg.members))
    if len(families) > 1:
        raise UserError(f"members are of one family, for which one file is made; got {', '.join(families)}")
    cfg.member, own = cfg.members[0], card(families[0])
    original = read(cfg, own.name)
    about = original.card
    if cfg.name == "auto":
        cfg.name = "-".join([about.name, *(split(member)[1] for member in cfg.members)])
    cfg.alpha = about.alpha / about.rank * (cfg.rank or about.rank)
    cfg.rank, cfg.layers = cfg.rank or about.rank, cfg.layers or about.layers
    cfg.scope = about.scope if cfg.layers == about.layers else cfg.scope
    cfg.scales = cfg.scales or ([0.5, 1.0] if about.kind == "lora" else [-1.0, 1.0])
    cfg.sample_scales = cfg.sample_scales if about.kind != "lora" else [0.0, 0.5, 1.0]
    if 0 in cfg.scales:
        raise UserError("scales are those at which the control is taught; at 0 there is nothing to teach")
    cfg.prompts = promptsets.read(cfg.prompts).texts if cfg.prompts else further(own)
    if not 1 <= cfg.rounds <= cfg.steps:
        raise UserError(f"rounds must be 1 … {cfg.steps}, the steps; got {cfg.rounds}")
    bare = Family(families[0], bare=True)
    for member in cfg.members:
        fits(bare.member(split(member)[1]).denoiser.net, original)
    words = {key: getattr(cfg, key) or about.recipe.get(key, "") for key in ("positive", "negative")}
    cfg.positive, cfg.negative = words.values()
    return original


def read(cfg: Config, family: str) -> Control:
    """The original control; one of another tool is taken to be of cfg.source."""
    if formats.native(cfg.control):
        return formats.load(cfg.control)
    named, member = split(cfg.source) if cfg.source else (family, card(family).base)
    own = Card("lora", formats.name(cfg.control), named, member, 0, 0.0, "full", "c3lier", {})
    return formats.adopt(cfg.control, skeleton(card(named), member), own, cfg.encoders)


def recipe(cfg: Config, original: Control) -> dict:
    """What the card remembers: where it comes from, what it makes, how it was trained."""
    about = original.card
    origin = {"name": about.name, "member": f"{about.family}/{about.member}", "hash": content(original)}
    words = {"positive": cfg.positive, "negative": cfg.negative} if cfg.positive else {}
    return {"adapted_from": origin, **words, **cfg.settings(REMEMBERED)}


def cost(cfg: Config, original: Control, member: Member) -> dry_run.Cost:
    """Runs of the members and what they see there without the control; both sides of the source; the steps;
    the images of calibration and comparison.
    """
    bare, about = Family(split(cfg.member)[0], bare=True), original.card
    members = [bare.member(split(name)[1]) for name in cfg.members]
    source = Family(about.family, bare=True).member(about.member)
    runs = cfg.runs * len(cfg.scales)  # of a member, in a round
    looks = {"source": 0, "member": 0}  # images
    if cfg.judged:
        scales = len(cfg.scales)
        looks["source"] += (1 + scales) * cfg.judged
        doses = 1 + sum(dose < 1 for dose in DOSES)  # at the most
        looks["member"] += (1 + doses) * cfg.judged + (cfg.rounds - 1) * scales * half(cfg)
        if cfg.precision is not None:
            looks["source"] += 2 * MORE * cfg.judged
            looks["member"] += (1 + doses) * MORE * cfg.judged
    if cfg.compared:
        looks["source"] += 2 * cfg.compared
        looks["member"] += 3 * cfg.compared + cfg.judged
    calls: Counter[str] = Counter()
    for its in members:
        name, steps, own = its.name.rpartition("/")[2], len(its.levels), evaluations(its)
        calls[name] += cfg.rounds * runs * (alone(its).nfe + steps * own) + looks["member"] * alone(its).nfe
        taught = sum(len(onward(source, level, cfg.ahead)) for level in its.levels)
        if about.family == bare.card.name:
            calls[about.member] += cfg.rounds * runs * taught * 2 * evaluations(source)
    if about.family == bare.card.name:
        calls[about.member] += looks["source"] * alone(source).nfe
    kept = 2 * runs * sum(len(its.levels) for its in members)
    first = calls.pop(member.name.rpartition("/")[2])
    each = 3 * sum(map(evaluations, members)) / len(members)
    return dry_run.Cost(first, each, 4 * cfg.batch_size, kept, others=dict(calls))


def half(cfg: Config) -> int:
    """Of the images that judge, those before a round."""
    return (cfg.judged + 1) // 2


def evaluations(member: Member) -> int:
    """Of its network, at one level."""
    return 1 if member.guidance is None else 2


def onward(source: Member, noise: Noise, steps: int) -> list[Noise]:
    """The levels at which a source is asked on its way from a noise level to the end: that level as its noise
    schedule has it, then others of its own. A source that draws fresh noise sees the end from where it is.
    """
    first = noise if noise in source.levels else NOISE_SCHEDULES[source.noise_schedule][1](noise.ratio)
    later = [level for level in source.levels if level.ratio < 0.999 * first.ratio]
    steps = 1 if source.eta else min(steps, 1 + len(later))
    return [first, *(later[k * len(later) // steps] for k in range(1, steps))]


def taught_change(
    source: Member,
    on: Callable[[], AbstractContextManager],
    x: Tensor,
    noise: Noise,
    prompts: Prompts,
    ahead: int,
) -> Tensor:
    """The guided change, by the original, of where the source goes from x of a member's schedule, (B, C, H,
    W).

    on: puts the original on it. ahead: the steps in which the source goes to the end.
    """
    first, *later = onward(source, noise, ahead)
    if first != noise and noise.alpha:
        x = x * (first.alpha / noise.alpha)

    def end() -> Tensor:
        at, now = x, first
        x0 = source.denoiser(at, now, prompts, source.guidance)
        for after in later:
            at, now = update(at, x0, now, after), after
            x0 = source.denoiser(at, now, prompts, source.guidance)
        return x0

    without = end()
    with on():
        return end() - without


class Lesson:
    """What the members are to see where they go, and how far they are from it."""

    def __init__(self, cfg: Config, run: Run, original: Control):
        self.cfg, self.run, self.original, self.round = cfg, run, original, -1
        self.members = [run.member, *(run.family.member(split(name)[1]) for name in cfg.members[1:])]
        self.nets = list({id(member.denoiser.net): member.denoiser.net for member in self.members}.values())
        about, family = original.card, run.family
        if about.family != family.card.name:
            family = Family(about.family, family.device, family.dtype, cfg.memory)
            family.encode_all(cfg.prompts)
        self.family, self.source = family, family.member(about.member)
        self.learnt, self.judging = divided(cfg.prompts)
        self.on = {scale: fusing(self.source.denoiser.net, original, scale) for scale in cfg.scales}
        self.plain: dict[tuple[int, int], Features] = {}  # by member and number of images
        self.points: list[tuple] = []  # member, scale, level, prompts of x, x, goal, size of a change

    def conditioning(self, family: Family, chosen: Tensor) -> Prompts:
        """Some of the prompts that are learnt on, as a family encodes them."""
        return family.encode([self.learnt[k] for k in chosen.tolist()])

    @contextmanager
    def tied(self) -> Iterator[None]:
        """Inside, the same weights are in training on all members."""
        others = [net for net in self.nets if net is not self.run.net]
        try:
            for net in others:
                tie(self.run.net, net, self.cfg.name)
            yield
        finally:
            for net in others:
                detach(net)

    @contextmanager
    def at(self, scale: float) -> Iterator[None]:
        """Inside, the control in training acts at a scale, 0 = not at all."""
        with ExitStack() as stack:
            for net in self.nets:
                stack.enter_context(strength(net, {self.cfg.name: scale} if scale else {}))
            yield

    def begin(self, step: int) -> None:
        """Before a step: at the first one of a round its runs are drawn, or read where they are already."""
        cfg = self.cfg
        now = min(step * cfg.rounds // cfg.steps, cfg.rounds - 1)
        if now == self.round:
            return
        path, before = (self.run.folder / f"points-{number}.safetensors" for number in (now, now - 1))
        if self.run.main and not path.exists():
            shape = len(self.members), len(cfg.scales)
            tried = {"gains": torch.ones(1, *shape), "offs": torch.zeros(0, *shape)}
            if now and cfg.judged:
                tried = self.corrected(load_file(before))
            with replacing(path) as new:
                save_file({**self.drawn(now, tried["gains"][-1]), **tried}, new)
        self.run.accelerator.wait_for_everyone()
        kept = load_file(path)
        self.round, self.points = now, []
        for m, member in enumerate(self.members):
            for k, scale in enumerate(cfg.scales):
                which = kept[f"which-{m}-{k}"]
                for t, level in enumerate(member.levels):
                    point = (kept[f"{part}-{m}-{k}-{t}"] for part in ("x", "goal", "size"))
                    self.points.append((member, scale, level, which, *point))

    def corrected(self, tried: dict[str, Tensor]) -> dict[str, Tensor]:
        """By how much the taught changes are multiplied in each round, gains, and how far the effect was off
        at the end of it, offs: (rounds, members, scales). The last gains are those of the round to come.
        """
        places = [(m, scale) for m, _ in enumerate(self.members) for scale in self.cfg.scales]
        now = torch.tensor([self.off(m, scale, self.judge(scale), half(self.cfg)) for m, scale in places])
        gains = tried["gains"]
        offs = torch.cat([tried["offs"], now.reshape(1, *gains.shape[1:])])
        histories = zip(gains.flatten(1).T.tolist(), offs.flatten(1).T.tolist(), strict=True)
        following = torch.tensor([next_gain(*each) for each in histories])
        return {"gains": torch.cat([gains, following.reshape(1, *gains.shape[1:])]), "offs": offs}

    def drawn(self, now: int, gains: Tensor) -> dict[str, Tensor]:
        """The runs of a round: at every step x, and the goal there, the member's own x0 and the change."""
        cfg, points = self.cfg, {}
        for m, member in enumerate(self.members):
            for k, scale in enumerate(cfg.scales):
                generator = seeded(cfg.seed, now, m, k)
                which = torch.randint(len(self.learnt), (cfg.runs,), generator=generator)
                seeds = torch.randint(2**62, (cfg.runs,), generator=generator).tolist()
                seen = partial(self.seen, member, scale, which, seeds)
                batches = zip(*Batches(2 * cfg.batch_size).of(seen, cfg.runs), strict=True)
                x, plain, change = (torch.cat(part) for part in batches)  # (N, T, C, H, W)
                points[f"which-{m}-{k}"] = which
                for t in range(len(member.levels)):
                    size = change[:, t].square().mean()
                    parts = {"x": x[:, t], "goal": (plain + float(gains[m, k]) * change)[:, t], "size": size}
                    points |= {f"{name}-{m}-{k}-{t}": part.contiguous() for name, part in parts.items()}
        return points

    @torch.no_grad()
    def seen(
        self, member: Member, scale: float, which: Tensor, seeds: list[int], rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x of some runs under the control, what the member sees there without it, and what the original
        changes of what its source sees there: (B, T, C, H, W) each.
        """
        cfg, family, chosen = self.cfg, self.run.family, which[rows]
        prompts, theirs = (self.conditioning(its, chosen) for its in (family, self.family))
        noise = draw_noise(
            [seeds[row] for row in rows], family.latent_shape, len(member.levels), family.device
        )
        with self.at(scale):
            steps = list(sample(alone(member), noise, prompts))
        with self.at(0):
            plain = [member.denoiser(step.x, step.noise, prompts, member.guidance) for step in steps]
            change = [
                taught_change(self.source, self.on[scale], step.x, step.noise, theirs, cfg.ahead)
                for step in steps
            ]
        return tuple(torch.stack(part, 1).cpu() for part in ([step.x for step in steps], plain, change))

    def __call__(self, generator: torch.Generator) -> Tensor:
        """The loss at some points of one member, scale and step, in shares of the change that is taught."""
        chosen = int(torch.randint(len(self.points), (1,), generator=generator))
        member, scale, level, which, x, goal, size = self.points[chosen]
        rows = torch.randint(len(x), (self.cfg.batch_size,), generator=generator)
        x, goal = (part[rows].to(self.run.family.device) for part in (x, goal))
        with self.at(scale):
            x0 = member.denoiser(x, level, self.conditioning(self.run.family, which[rows]), member.guidance)
            return (x0 - goal).square().mean() / size.clamp_min(1e-12)

    def shares(self, images: int, seed: int, scale: float, prompts: Sequence[str] = ()) -> Shares:
        """Measures what members have of the original's effect on its source, on prompts not learnt on where
        no others are said.
        """
        cfg, family = self.cfg, self.run.family
        prompts = prompts or self.judging
        texts = [prompts[k % len(prompts)] for k in range(images)]
        shares = Shares(family, self.evaluators, (cfg.positive, cfg.negative), texts, seed)
        its, member = self.family.card, self.source.name.rpartition("/")[2]
        packed = cfg.quantize if quantized(self.source.denoiser.net) else ""
        keys = [identity(its, member), packed], [content(self.original), scale]
        sides = partial(self.at, 0), self.original_on(scale)
        shares.source(self.family, self.source, sides, Path(cfg.cache), keys)
        return shares

    @cached_property
    def evaluators(self) -> dict[str, Evaluator]:
        return load_evaluators(self.run.family.card, self.run.family.device)

    def original_on(self, scale: float) -> Callable[[], AbstractContextManager]:
        """What puts the original on its source, and nothing else."""

        @contextmanager
        def on() -> Iterator[None]:
            with self.at(0), self.on[scale]():
                yield

        return on

    @cache  # noqa: B019  a lesson lives as long as its run
    def judge(self, scale: float) -> Shares:
        """What measures a scale's effect for gains and strength."""
        return self.shares(self.cfg.judged, 700_000, scale)

    @cached_property
    def last(self) -> Shares:
        """What measures the effect for the strength, last of all: more images where those that judge leave it
        uncertain.
        """
        cfg, top = self.cfg, max(self.cfg.scales)
        judge, more = self.judge(top), 1.0
        if cfg.precision is not None:
            seen = [(self.bare(m, judge), self.acting(m, top, judge)) for m, _ in enumerate(self.members)]
            error = max(judge.error(*each, JUDGES) for each in seen)
            more = min((error / max(cfg.precision, 1e-9)) ** 2, MORE)
        if more <= 1:
            return judge
        # by doubling: tries that need about as many share what is seen of the source
        images = cfg.judged * 2 ** math.ceil(math.log2(more))
        return self.shares(images, 700_000, top, [*self.judging, *self.learnt])

    def bare(self, m: int, shares: Shares) -> Features:
        """A member there without a control, which is the same whatever scale is judged."""
        key = m, len(shares.texts)
        if key not in self.plain:
            self.plain[key] = shares.seen(self.members[m], partial(self.at, 0))
        return self.plain[key]

    def acting(self, m: int, scale: float, shares: Shares, images: int | None = None) -> Features:
        """A member on the first images there, with the control in training at a scale."""
        return shares.seen(self.members[m], partial(self.at, scale), count=images)

    def off(self, m: int, scale: float, shares: Shares, images: int | None = None) -> float:
        """How far the control in training, at a scale, is too strong on a member for what is measured, as a
        logarithm: by the mean of the first evaluators, on the first images.
        """
        seen = self.acting(m, scale, shares, images)
        return float(np.mean(shares.middle(self.bare(m, shares), seen)[:JUDGES]))

    def calibrated(self) -> float:
        """The strength at which the effect on the members, their median, is the original's on its source."""
        top = max(self.cfg.scales)

        def off(dose: float) -> float:
            return float(np.median([self.off(m, dose * top, self.last) for m, _ in enumerate(self.members)]))

        logs = {1.0: off(1.0)}
        further = [dose for dose in DOSES if dose > 1] if logs[1.0] < 0 else [d for d in DOSES[::-1] if d < 1]
        for dose in further:  # away from 1 until it is too strong, or no longer
            logs[dose] = off(dose)
            if (logs[dose] < 0) != (logs[1.0] < 0):
                break
        doses = sorted(logs)
        return reached(doses, [logs[dose] for dose in doses])

    def compare(self) -> list[dict]:
        """What the members have of the effect with the original and with the control in training, on images
        of their own, and on those by which gains and strength are set.
        """
        top, rows = max(self.cfg.scales), []
        shares = self.shares(self.cfg.compared, 800_000, top)
        for m, member in enumerate(self.members):
            plain = shares.seen(member, partial(self.at, 0))
            with self.at(0):
                original = fusing(member.denoiser.net, self.original, top)
                before = shares.of(plain, shares.seen(member, original))
            after = shares.of(plain, shares.seen(member, partial(self.at, top)))
            judged = after
            if self.cfg.judged:
                judged = self.last.of(self.bare(m, self.last), self.acting(m, top, self.last))
            rows += [
                {
                    "member": member.name,
                    "evaluator": name,
                    "original": before[name],
                    "adapted": after[name],
                    "judged": judged[name],
                }
                for name in plain
            ]
        return rows


def further(its: FamilyCard) -> list[str]:
    """What is learnt on where nothing is said: the second half of a card's further prompts."""
    if not its.more_prompts:
        return its.prompts
    texts = promptsets.read([its.more_prompts]).texts
    return texts[len(texts) // 2 :]


def divided(texts: list[str]) -> tuple[list[str], list[str]]:
    """The prompts to learn on, and those to judge by; all are both where they are too few."""
    judging = texts[JUDGING - 1 :: JUDGING]
    learnt = [text for k, text in enumerate(texts) if k % JUDGING < JUDGING - 1]
    return (learnt, judging) if judging else (texts, texts)


def ranged(share: dict) -> str:
    """A share with its interval, where it has one."""
    value, *ends = ("–" if end is None else f"{end:.2f}" for end in share.values())
    return f"{value} [{', '.join(ends)}]"


def next_gain(gains: Sequence[float], offs: Sequence[float]) -> float:
    """By how much a change is multiplied after gains with which an effect was off by these logarithms.

    A larger change makes a larger effect only up to a point: of a direction that saturates, more is another
    face. So a larger one that brought little is taken back, and not tried again.
    """
    most, rounds = GAINS[1], list(zip(gains, offs, strict=True))
    for (before, was), (now, its) in pairwise(rounds):
        if now > before and its - was < PAID * math.log(now / before):
            most = min(most, before)
    if len(rounds) > 1 and offs[-1] * offs[-2] < 0:
        gain = reached(*zip(*sorted(rounds[-2:]), strict=True))
    else:
        gain = gains[-1] * min(max(math.exp(-offs[-1]), GAINS[0]), GAINS[1])
    return min(max(gain, GAINS[0]), most)


def reached(doses: Sequence[float], logs: Sequence[float]) -> float:
    """The first dose at which a curve of logarithms comes to 0, between the doses on a line; the one that
    comes nearest where none does.
    """
    for (a, low), (b, high) in pairwise(zip(doses, logs, strict=True)):
        if low <= 0 <= high and low < high:
            return a + (b - a) * -low / (high - low)
    return doses[int(np.argmin(np.abs(logs)))]


if __name__ == "__main__":
    entry(main, Config)
