"""Memory: what a family can do without, at the price of time."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass
class Memory:
    """How a family saves memory. All off: everything stays on the device."""

    offload: bool = False  # text encoders, networks and VAE wait on the CPU and come to the device in turn
    tiling: bool = False  # the VAE works picture by picture and tile by tile
    compile: str = ""  # backend of torch.compile for the networks, e.g. inductor; empty = none


@dataclass
class Turns:
    """Parts that share a device: the ones that are asked for come, the ones that were there go back to the CPU."""

    device: torch.device
    here: list[nn.Module] = field(default_factory=list)

    def bring(self, parts: Sequence[nn.Module]) -> None:
        """Puts these parts on the device, and takes all others off it first."""
        staying = {id(part) for part in parts}
        for part in self.here:
            if id(part) not in staying:
                part.to("cpu")
        for part in parts:
            part.to(self.device)  # even if it is here: a control that was merged left some weights where they lay
        self.here = list(parts)

    def comes_when_called(self, net: nn.Module) -> None:
        """A network that fetches itself before every forward pass."""
        net.register_forward_pre_hook(lambda module, _: self.bring([module]))
