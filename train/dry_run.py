"""What training will load, evaluate, take and hold, from configs alone: every tensor of a step is followed on
torch's `meta` device.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from configs import UserError
from controls.lora import create, detach, parameters, strength
from models import budget, devices, forecast
from models.architectures import Architecture, blank
from models.evaluators import chosen
from models.families import DTYPES, Family, FamilyCard, split
from models.forecast import Moment, Peak, flash
from models.noise import NOISE_SCHEDULES, loss_target
from models.sampler import Denoiser, Member, alone
from train.checkpoint import progress
from train.run import Training, check
from train.validation import SEEDS


@dataclass(frozen=True)
class Cost:
    """What a recipe asks of a member, and what it holds."""

    before: float  # evaluations before the first step
    each: float  # and per latent and step, a backward pass counted as two
    rows: int = 0  # latents that the network is asked for at once before the first step
    kept: int = 0  # latents that are trained on, with what was seen of them
    pictures: int = 0  # that pass the VAE before the first step
    learning: bool = False  # whether gradients pass the VAE
    controls: int = 1  # that a strip shows
    evaluators: tuple[str, ...] = ()  # that look at pictures
    others: dict[str, float] = field(default_factory=dict)  # members held beside, and their evaluations


def show(cfg: Training, cost_of: Callable[[Member], Cost]) -> None:
    """Prints what is loaded, network evaluations, time, the control's size, memory at its fullest.

    Raises UserError as a run would.
    """
    check(cfg)
    accelerator, (name, member) = devices.start(cfg), split(cfg.member)
    if not accelerator.is_main_process:
        return
    device = cfg.memory.planned(accelerator.device, True)
    family = Family(name, device, DTYPES[cfg.dtype], cfg.memory, bare=True, quantize=cfg.quantize)
    bare, card = family.member(member), family.card
    cost, done = cost_of(bare), steps_done(cfg)
    left = cfg.steps - done
    latents = cfg.batch_size * cfg.gradient_accumulation_steps * accelerator.num_processes
    again = f"; {done} are done, what comes before the first is done again" if done else ""
    print(f"{cfg.name} on {cfg.member}: {left} steps of {latents} latents{again}")
    nfe = cost.before + cost.each * left * latents * (4 / 3 if cfg.gradient_checkpointing else 1)
    calls = Counter({member: nfe}) + Counter(cost.others) + pictured(cfg, family, member, done, cost.controls)
    print(budget.forecast(card, calls, family.dtype, family.device, looking(cfg, card, cost)))
    net = nn.Module.to(bare.denoiser.net, "meta", family.dtype).requires_grad_(False)
    create(net, "control", cfg.layers, cfg.scope, cfg.rank)
    weights = parameters(net, "control")
    print(
        f"control: {sum(weight.numel() for weight in weights) / 1e6:.2f} million weights in "
        f"{len(weights) // 2} layers"
    )
    control = {f"{k // 2}.lora_{'AB'[k % 2]}.weight": weight.detach() for k, weight in enumerate(weights)}
    detach(net)
    size = Step(
        family.architecture,
        bare.noise_schedule,
        family.latent_shape,
        cfg.batch_size,
        cfg.rank,
        cfg.layers,
        cfg.scope,
        cfg.gradient_checkpointing,
    )
    step = follow(net, size)
    held = float(step["peak"] - step["network"])
    print(forecast.said(lambda: moments(cfg, family, cost, held, control), family))


def pictured(cfg: Training, family: Family, member: str, done: int, controls: int) -> Counter[str]:
    """Evaluations of the strips, and of the members that are watched, by member."""
    nfe = alone(family.member(member)).nfe
    strips = 1 + sum(cfg.sample_every and step % cfg.sample_every == 0 for step in range(done + 1, cfg.steps))
    calls = Counter({member: strips * controls * len(cfg.sample_seeds) * len(cfg.sample_scales) * nfe})
    if cfg.watch:
        looks = sum(step % cfg.watch_every == 0 for step in range(done + 1, cfg.steps + 1))
        images = len(family.card.prompts[: cfg.watch_prompts]) * SEEDS
        calls[member] += 2 * looks * images * nfe
        for other in {name for _, name in map(split, cfg.watch)} - {member}:
            calls[other] += (looks + 1) * images * alone(family.member(other)).nfe
    return calls


def steps_done(cfg: Training) -> int:
    """How many steps a run that goes on has done; 0 where none can."""
    try:
        return 0 if cfg.overwrite else progress(Path(cfg.out) / cfg.name / "state.pt")
    except UserError:  # the run itself says what is wrong
        return 0


def looking(cfg: Training, card: FamilyCard, cost: Cost) -> list[str]:
    """The evaluators that training loads."""
    return list(dict.fromkeys([*cost.evaluators, *(chosen(card)[:1] if cfg.watch else [])]))


def on_the_device(cost: Cost, family: Family) -> float:
    """Bytes of what is trained on, which is kept on the CPU in any case."""
    if family.device.type != "cpu":
        return 0.0
    return cost.kept * prod(family.latent_shape) * float(torch.float32.itemsize)


def moments(
    cfg: Training, family: Family, cost: Cost, step: float, control: dict[str, Tensor]
) -> list[Moment]:
    """What is held together before the first step, in one, when a strip is drawn, when others are watched.

    step: its bytes beside the network, those of the control included.
    """
    card, dtype, (_, member) = family.card, family.dtype, split(cfg.member)
    vae, encoders = forecast.shared(card, dtype)
    encoders |= forecast.reading_of(card, dtype)
    nets = forecast.networks(card, [member], dtype, cfg.quantize)
    watched = [name for _, name in map(split, cfg.watch)]
    others = forecast.networks(card, [*watched, *cost.others], dtype)
    others = {name: size for name, size in others.items() if name not in nets}
    beside, aside = vae | others, nets | others  # the network; the VAE
    offloaded = cfg.memory.offload and family.device.type != "cpu"
    if offloaded:
        beside, aside = {}, {}  # what is at work is alone
    evaluators, kept = looking(cfg, card, cost), on_the_device(cost, family)
    always = forecast.program(family.device) | forecast.held_evaluators(card, evaluators, family.device)
    always["what is trained on"] = kept
    trained = {"control, its average, its optimizer": 4.0 * sum(tensor.nbytes for tensor in control.values())}

    def drawn(name: str, images: int) -> dict[str, float]:
        rows = forecast.guided(card, [name], min(images, family.drawing.size))
        return forecast.evaluating(card, rows, dtype)

    def decoded(images: int, learning: bool = False) -> dict[str, float]:
        return vae | forecast.decoding(card, min(images, family.decoding.size), family.memory, learning)

    first = forecast.evaluating(card, {member: cost.rows}, dtype)
    learnt = {"control, optimizer, activations": step}
    if cost.learning:
        learnt |= decoded(cfg.batch_size, True)
    seeds = len(cfg.sample_seeds)
    early, bare = {"what is trained on, in parts": kept}, forecast.program(family.device)
    moments = [
        Moment("when prompts are encoded", bare | encoders | ({} if offloaded else vae)),
        Moment("before the first step", always | early | nets | beside | first),
        Moment("in a step", always | nets | beside | learnt),
        Moment("when a strip is drawn", always | trained | nets | beside | drawn(member, seeds)),
        Moment("when a strip is decoded", always | trained | aside | decoded(seeds)),
    ]
    if cost.pictures:
        # what a recipe brings passes before the network is there
        loaded = aside if cost.learning else {}
        moments.append(Moment("when pictures pass the VAE", always | early | loaded | decoded(cost.pictures)))
    if cfg.quantize and family.device.type == "cpu":  # elsewhere the whole network is not on the device
        whole = forecast.networks(card, [member], dtype)
        moments.append(Moment("when the network is packed", bare | vae | whole))
    images = len(card.prompts[: cfg.watch_prompts]) * SEEDS
    seen = decoded(images) | forecast.seeing(card, evaluators, images)
    net = {name: card.holder(name) for name in card.members}
    for name in watched:
        added, when = always | trained, f"when {name} is watched"
        if net[name] != net[member]:
            added |= forecast.sums(control, dtype)
        moments.append(Moment(when, added | nets | beside | drawn(name, images)))
        moments.append(Moment(when, added | aside | seen))
    return moments


@dataclass(frozen=True)
class Step:
    """What decides the size of a step."""

    architecture: Architecture  # of the network
    noise_schedule: str
    shape: tuple[int, ...]  # (C, H, W) of a latent
    batch_size: int  # latents at once
    rank: int = 4  # of the control
    layers: str = "noxattn"  # its layer set
    scope: str = "c3lier"  # and how far that reaches
    gradient_checkpointing: bool = False


@contextmanager
def training(net: nn.Module, size: Step) -> Iterator[Callable[[], None]]:
    """Gives a step as train/slider.py makes it, with the optimizer's moments and a moving average."""
    create(net, "slider", size.layers, size.scope, size.rank)
    if size.gradient_checkpointing:
        net.enable_gradient_checkpointing()
    weights = parameters(net, "slider")
    average, optimizer = [weight.detach().clone() for weight in weights], torch.optim.AdamW(weights, 1e-3)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    with torch.device("cpu"):  # older torch makes the count of steps on the default device, and reads it
        optimizer.step()
    optimizer.zero_grad()
    x = torch.zeros((size.batch_size, *size.shape), device=net.device)
    conditioning = blank(size.architecture, net, size.batch_size)
    noise = NOISE_SCHEDULES[size.noise_schedule][0](500.0)
    denoiser = Denoiser(net, call=size.architecture.call)

    def step() -> None:
        with strength(net, slider=1.0):
            # no name for what is between, which would live on through the backward pass
            loss_target(
                x, denoiser(x, noise, conditioning), noise, size.noise_schedule
            ).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, [weight.detach() for weight in weights], 0.1)

    try:
        yield step
    finally:
        net.disable_gradient_checkpointing()
        detach(net)


def update(net: nn.Module, size: Step) -> None:
    """One such step."""
    with training(net, size) as step:
        step()


def follow(net: nn.Module, size: Step) -> dict[str, int]:
    """The bytes of the bare network, and the most that lived during a step."""
    # what a network makes without saying where, is made on its device
    with Peak(net) as peak, flash(), torch.device(net.device):
        network = peak.live
        update(net, size)
    return {"network": network, "peak": peak.most}
