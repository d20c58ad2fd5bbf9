"""What memory a step of training a control takes, by following every tensor of one on torch's `meta` device."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from controls.lora import create, detach, parameters, strength
from models.architectures import Architecture, blank
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


class Peak(TorchDispatchMode):
    """Inside, the bytes of all tensors that live, a network's included, and the most that ever did; no tensor has to hold anything."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.alive, self.live, self.most = {}, 0, 0
        self.device = net.device.type
        for weight in net.parameters():
            self.count(weight.untyped_storage())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor) and made.device.type == self.device:
                self.count(made.untyped_storage())
        return out

    def count(self, storage: torch.UntypedStorage) -> None:
        """Adds a storage that is new, until it goes."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive[key] = weakref.ref(storage, lambda _: self.drop(key, size))
            self.live += size
            self.most = max(self.most, self.live)

    def drop(self, key: int, size: int) -> None:
        del self.alive[key]
        self.live -= size


@contextmanager
def flash() -> Iterator[None]:
    """Inside, attention is the kernel that a GPU takes for it; on `meta` torch would write down every attention matrix."""
    plain = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, **_: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain
