"""Memory: what a family can do without, at the price of time."""

import ctypes
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from accelerate.utils.memory import clear_device_cache
from torch import nn

from configs import UserError, list_of


@dataclass
class Memory:
    """How a family saves memory. All off: everything stays on the device."""

    offload: bool = False  # text encoders, networks and VAE wait on the CPU and come to the device in turn
    tiling: bool = False  # the VAE works picture by picture and tile by tile
    compile: str = ""  # backend of torch.compile for the networks, e.g. inductor; empty = none
    gpu_gb: float = 0.0  # a dry run plans for a GPU of so many GB; 0 = for this machine

    def planned(self, device: torch.device, dry_run: bool) -> torch.device:
        """The device that a run is for. Raises UserError for a plan that is to be run."""
        if self.gpu_gb and not dry_run:
            raise UserError(f"memory.gpu_gb={self.gpu_gb:g} is what a dry run plans for: add --dry-run")
        return torch.device("cuda") if self.gpu_gb else device

    def __post_init__(self):
        """Raises UserError for a backend that does not exist."""
        if self.compile and self.compile not in torch._dynamo.list_backends(
            exclude_tags=()
        ):  # for debugging, there are more than it lists
            raise UserError(
                f"no backend {self.compile!r} of torch.compile; there are "
                f"{', '.join(torch._dynamo.list_backends())}"
            )


def release() -> None:
    """Gives what is no longer used back: to the device's other programs, and on a CPU to the machine."""
    clear_device_cache(garbage_collection=True)
    trim()


def trim() -> None:
    """Gives back to the machine what was freed on the CPU, which glibc would keep."""
    with suppress(OSError, AttributeError):  # no glibc here
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def compiled(net: nn.Module, backend: str) -> None:
    """Compiles a network at its first call."""
    torch._dynamo.config.skip_nnmodule_hook_guards = (
        False  # or recordings and LoRA students, which are hooks, would go unnoticed later
    )
    net.compile(backend=backend)


@dataclass
class Offloader:
    """Parts that share a device: the ones that are asked for come, the ones that were there go away."""

    device: torch.device
    away: torch.device = torch.device("cpu")
    here: list[nn.Module] = list_of()

    def bring(self, parts: Sequence[nn.Module]) -> None:
        """Puts these parts on the device, and takes all others off it first."""
        staying = {id(part) for part in parts}
        for part in self.here:
            if id(part) not in staying:
                part.to(self.away)
        for part in parts:
            part.to(
                self.device
            )  # even if it is here: a control that was merged left some weights where they lay
        self.here = list(parts)

    def comes_when_called(self, net: nn.Module) -> None:
        """A network that fetches itself before every forward pass."""
        net.register_forward_pre_hook(lambda module, _: self.bring([module]))
