"""Trains a Concept Slider from text on any member of a family: accelerate launch train/slider.py [config=FILE] [key=value ...]

Without arguments: the smile slider on tiny/base, in some minutes on a CPU. Ends with a strip of faces across scales.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from configs import UserError, entry, load, run_folder, tracking, versions
from controls import formats
from controls.lora import Card, Control, create, detach, extract, fingerprint, parameters, strength
from models.families import DTYPES, Family, split
from models.noise import to_eps
from models.sample import Member, alone, draw_noise, sample
from train.checkpoint import append, resumable, seeded
from train.samples import strip


@dataclass
class Pair:
    """One prompt pair of the published format: what to move, and between which two ends."""

    target: str = ""  # the prompt the slider acts on
    positive: str = ""  # what more of it is
    unconditional: str = ""  # what less of it is
    neutral: str = ""  # where the movement starts; empty = the target
    action: str = "enhance"  # enhance: + is towards positive; erase: the other way round


def smile() -> list[Pair]:
    who = ["a person", "a young person", "an old person"]
    return [Pair(f"portrait of {w}", f"portrait of {w}, smiling", f"portrait of {w}, frowning") for w in who]


@dataclass
class Config:
    name: str = "smile"  # of the control, and of the run folder
    member: str = "tiny/base"  # family/member to train on
    prompts: list[Pair] = field(default_factory=smile)  # target, positive, unconditional, neutral, action
    attributes: list[str] = field(default_factory=list)  # put before all four prompts, one after the other, to disentangle
    strength: float = 1.5  # g of the objective: how far one unit of scale goes
    rank: int = 4  # of the low-rank pairs
    alpha: float = 1.0  # effective strength is scale * alpha / rank
    layers: str = "noxattn"  # layer set, see controls/targets.py
    scope: str = "c3lier"  # lierla: linear layers in attention blocks; c3lier: these plus convolutions
    steps: int = 400  # optimizer steps
    batch: int = 8  # latents per step and process, all at one noise level
    rate: float = 1e-3  # AdamW's learning rate, cosine to zero
    trajectories: int = 32  # control-free sampling runs whose x_t are trained on
    seed: int = 0  # of the control, the trajectories and the order
    sample_every: int = 200  # steps between strips; 0 = only at the end
    sample_scales: list[float] = field(default_factory=lambda: [-2.0, -1.0, 0.0, 1.0, 2.0])  # columns of a strip
    sample_seeds: list[int] = field(default_factory=lambda: [11, 12, 13])  # rows of a strip
    save_every: int = 100  # steps between checkpoints
    dtype: str = "auto"  # of the network: auto (bf16 on a GPU, fp32 on a CPU), bf16, fp32; the control is always fp32
    out: str = "runs/slider"  # the run is written to out/name
    overwrite: bool = False  # start afresh instead of continuing
    wandb: str = "auto"  # auto, online, offline, disabled



@dataclass
class Points:
    """What the slider learns from: x_t of control-free trajectories, and the teacher's two predictions there."""

    x: Tensor  # (N, T, C, H, W), trajectory by step
    neutral: Tensor  # (N, T, C, H, W) eps of the neutral prompt
    direction: Tensor  # (N, T, C, H, W) eps of positive minus eps of unconditional
    which: Tensor  # (N,) prompt pair of each trajectory


def main(cfg: Config) -> Path:
    """Trains and returns the path of the control."""
    if cfg.dtype not in DTYPES:
        raise UserError(f"no dtype {cfg.dtype!r}; there are {', '.join(DTYPES)}")
    accelerator = Accelerator()
    family_name, member_name = split(cfg.member)
    family = Family(family_name, accelerator.device, DTYPES[cfg.dtype])
    member = family.member(member_name)
    net, pairs = member.denoiser.net, spread(cfg.prompts, cfg.attributes)
    if accelerator.is_main_process:
        run_folder(cfg, Path(cfg.out) / cfg.name, cfg.overwrite, free=("wandb", "out"))
    accelerator.wait_for_everyone()
    folder = Path(cfg.out) / cfg.name
    card = Card("slider", cfg.name, family.card.name, member_name, cfg.rank, cfg.alpha, cfg.layers, cfg.scope,
                recipe(cfg), fingerprint(net), versions())  # fmt: skip
    points = teach(cfg, family, member, pairs)
    targets = family.encode([pair.target for pair in pairs]).conditional()
    noise = draw_noise(cfg.sample_seeds, family.latent_shape, len(member.levels), family.device)

    create(net, cfg.name, cfg.layers, cfg.scope, cfg.rank, cfg.alpha, cfg.seed)
    weights = torch.nn.ParameterList(parameters(net, cfg.name))
    optimizer = torch.optim.AdamW(weights, cfg.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, cfg.steps))
    state = {"weights": weights, "optimizer": optimizer, "schedule": schedule}
    with tracking.start(folder, asdict(cfg), "train.slider", cfg.name, cfg.wandb) as tracker:
        for step in resumable(folder / "state.pt", state, cfg.steps, cfg.save_every, cfg.name, write=accelerator.is_main_process):
            loss = difference(cfg, member, points, targets, seeded(cfg.seed, step, accelerator.process_index), side=1 - 2 * (step % 2))
            optimizer.zero_grad()
            loss.backward()
            for weight in weights:
                weight.grad = accelerator.reduce(weight.grad, "mean")
            norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
            if not torch.isfinite(norm):
                raise UserError(f"the gradient is not finite at step {step}; the last state is kept, try a rate below {cfg.rate}")
            optimizer.step()
            schedule.step()
            if accelerator.is_main_process:
                if step % 10 == 0:
                    append(folder / "log.jsonl", {"step": step, "loss": loss.item(), "gradient": norm.item()})
                    tracker.log({"loss": loss.item(), "gradient": norm.item(), "rate": schedule.get_last_lr()[0]}, step=step)
                if cfg.sample_every and (step + 1) % cfg.sample_every == 0 and step + 1 < cfg.steps:
                    picture = folder / f"samples/step-{step + 1:05d}.png"
                    tracker.image("samples", strip(family, member, noise, cfg.name, cfg.sample_scales, cfg.prompts[0].target, picture))
        if accelerator.is_main_process:
            path = folder / "control.safetensors"
            formats.save(Control(card, extract(net, cfg.name)), path)
            picture = strip(family, member, noise, cfg.name, cfg.sample_scales, cfg.prompts[0].target, folder / "samples/final.png")
            tracker.image("samples", picture, f"{cfg.name} at {cfg.sample_scales}")
            tracker.artifact(path, cfg.name, "control")
            print(f"control: {path}\nstrip of scales {cfg.sample_scales}: {picture}")
    detach(net)
    return folder / "control.safetensors"


def spread(pairs: list[Pair], attributes: list[str]) -> list[Pair]:
    """Every pair with every attribute in front; the neutral prompt filled in. Raises UserError for an incomplete pair."""
    found = []
    for pair in pairs:
        if not (pair.target and pair.positive and pair.unconditional):
            raise UserError(f"a prompt pair needs target, positive and unconditional; got {pair}")
        if pair.action not in ("enhance", "erase"):
            raise UserError(f"action is enhance or erase, got {pair.action!r}")
        for attribute in attributes or [""]:
            words = (pair.target, pair.positive, pair.unconditional, pair.neutral or pair.target)
            found.append(Pair(*(f"{attribute} {word}".strip() for word in words), pair.action))
    return found


def recipe(cfg: Config) -> dict:
    """What the card remembers: the words that say what the slider does, and how it was trained."""
    first = cfg.prompts[0]
    ends = (first.positive, first.unconditional) if first.action == "enhance" else (first.unconditional, first.positive)
    kept = ("strength", "steps", "batch", "rate", "trajectories", "seed", "attributes")
    return {"positive": ends[0], "negative": ends[1], "prompts": [asdict(p) for p in cfg.prompts], **{k: getattr(cfg, k) for k in kept}}


@torch.no_grad()
def teach(cfg: Config, family: Family, member: Member, pairs: list[Pair]) -> Points:
    """Runs the control-free trajectories and asks the teacher at every point of them: three prompts, one batch.

    With the control off, x_t does not depend on its weights, so one run of T steps gives T training points.
    """
    which = torch.arange(cfg.trajectories) % len(pairs)
    sign = torch.tensor([1.0 if pair.action == "enhance" else -1.0 for pair in pairs], device=family.device)
    teacher = family.encode([text for pair in pairs for text in (pair.neutral, pair.positive, pair.unconditional)]).conditional()
    prompts = family.encode([pair.target for pair in pairs])
    found = []
    for rows in torch.arange(cfg.trajectories).split(cfg.batch * 2):
        noise = draw_noise([cfg.seed * 100_003 + int(r) for r in rows], family.latent_shape, len(member.levels), family.device)
        asked = (which[rows] * 3 + torch.arange(3)[:, None]).flatten()  # neutral of all rows, then positive, then unconditional
        steps = []
        for step in sample(alone(member), noise, prompts[which[rows]]):
            x = step.x.repeat(3, 1, 1, 1)
            eps = to_eps(x, member.denoiser(x, step.noise, teacher[asked]), step.noise)
            neutral, positive, negative = eps.chunk(3)
            steps.append((step.x, neutral, (positive - negative) * sign[which[rows]][:, None, None, None]))
        found.append([torch.stack(part, 1) for part in zip(*steps, strict=True)])
    return Points(*(torch.cat(part) for part in zip(*found, strict=True)), which)


def difference(cfg: Config, member: Member, points: Points, targets, generator: torch.Generator, side: int) -> Tensor:
    """The objective at one noise level: eps with the control at scale +-1 against neutral +- g (positive - unconditional).

    Concept Sliders, Gandikota et al. 2023, eq. 8; both sides are trained in turn, the published code trains only +1.
    """
    level = int(torch.randint(len(member.levels), (1,), generator=generator))
    rows = torch.randint(len(points.x), (cfg.batch,), generator=generator)
    x, noise = points.x[rows, level], member.levels[level]
    wanted = points.neutral[rows, level] + side * cfg.strength * points.direction[rows, level]
    with strength(member.denoiser.net, {cfg.name: float(side)}):
        eps = to_eps(x, member.denoiser(x, noise, targets[points.which[rows]]), noise)
    return (eps - wanted).square().mean()


if __name__ == "__main__":
    entry(lambda: main(load(Config)))
