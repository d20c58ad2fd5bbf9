"""What memory a step of training a control takes, by following every tensor of one on torch's `meta` device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

from controls.lora import create, detach, parameters, strength
from models.architectures import Architecture, blank
from models.forecast import Peak, flash
from models.noise import LAWS, comparable
from models.sample import Denoiser


class Step(Protocol):
    """What decides the size of a step."""

    batch: int  # latents at once
    rank: int  # of the control
    layers: str  # its layer set
    scope: str  # and how far that reaches


@contextmanager
def training(
    net: nn.Module, its: Architecture, cfg: Step, shape: tuple[int, ...], law: str, checkpointing: bool
) -> Iterator[Callable[[], None]]:
    """Gives a step as train/slider.py makes it, with the optimizer's moments and the weights' moving average.

    shape: (C, H, W) of a latent.
    """
    create(net, "slider", cfg.layers, cfg.scope, cfg.rank)
    if checkpointing:
        net.enable_gradient_checkpointing()
    weights = parameters(net, "slider")
    average, optimizer = [weight.detach().clone() for weight in weights], torch.optim.AdamW(weights, 1e-3)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad()
    x, told, noise = torch.zeros((cfg.batch, *shape), device=net.device), blank(its, net, cfg.batch), LAWS[law][0](500.0)

    def step() -> None:
        with strength(net, slider=1.0):
            comparable(x, Denoiser(net, call=its.call)(x, noise, told), noise, law).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, [weight.detach() for weight in weights], 0.1)

    try:
        yield step
    finally:
        net.disable_gradient_checkpointing()
        detach(net)


def update(net: nn.Module, its: Architecture, cfg: Step, shape: tuple[int, ...], law: str, checkpointing: bool) -> None:
    """One such step."""
    with training(net, its, cfg, shape, law, checkpointing) as step:
        step()


def follow(net: nn.Module, its: Architecture, cfg: Step, shape: tuple[int, ...], law: str, checkpointing: bool) -> dict[str, int]:
    """The bytes of the bare network, and the most that lived during a step."""
    with Peak(net) as peak, flash(), torch.device(net.device):  # what a network makes without saying where, is made there
        network = peak.live
        update(net, its, cfg, shape, law, checkpointing)
    return {"network": network, "peak": peak.most}
