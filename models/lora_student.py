"""Deltas: students that are published as a LoRA over their base.

One network stays in memory, and the strength of the delta is a dial.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from configs import UserError
from models.architectures import Architecture
from models.noise import Noise

HALVES = (".lora_A.weight", ".lora_B.weight")
Scale = float | Callable[[Noise], float]  # of a delta, the same at every step or by noise level


@dataclass
class Delta:
    """What a student adds to layers of its base: strength · B A x, with A and B per layer."""

    pairs: dict[str, tuple[Tensor, Tensor]]  # layer: A (r, in, …), B (out, r, …), alpha / r multiplied in
    strength: float = field(default=0.0, init=False)  # as it acts now; set by `dial`
    hash: str = field(default="", init=False)  # sha256 of the pairs

    def __post_init__(self):
        digest = hashlib.sha256()
        for spot in sorted(self.pairs):
            digest.update(spot.encode())
            for half in self.pairs[spot]:
                digest.update(half.detach().to("cpu", torch.float32).contiguous().numpy())
        self.hash = digest.hexdigest()

    def attach(self, net: nn.Module) -> None:
        """Lets the delta act on a network, at strength 0, where the network is bit for bit what it was.

        It acts beside the layers and not inside them, so that controls can be attached, merged and taken out
        regardless.
        """
        example, before = next(net.parameters()), getattr(net, "deltas", [])
        for spot, pair in self.pairs.items():
            layer = net.get_submodule(spot)
            layer, names = (
                getattr(layer, "base_layer", layer),
                [f"delta{len(before)}_{half}" for half in "ab"],
            )
            for name, half in zip(names, pair, strict=True):  # buffers, so that they go where the layer goes
                layer.register_buffer(name, half.to(example.device, example.dtype), persistent=False)
            layer.register_forward_hook(_branch(self, *names))
        self.pairs, net.deltas = {}, [*before, self]


def dial(net: nn.Module, delta: Delta | None, strength: float = 1.0) -> None:
    """Sets the deltas of a network: this one at its strength, all others at 0, until the next call.

    It is not given back after an evaluation because gradient checkpointing runs the network once more, in the
    backward pass.
    """
    for other in getattr(net, "deltas", []):
        other.strength = strength if other is delta else 0.0


def read(path: Path, architecture: Architecture, net: nn.Module) -> Delta:
    """A delta from a LoRA file of any layout that diffusers reads, as diffusers reads it.

    Raises UserError when the pipeline takes no LoRA, for text encoders' layers, and when a layer has no place
    in the network.
    """
    from diffusers.utils import convert_unet_state_dict_to_peft
    from peft.tuners.lora import LoraLayer

    loader, part = architecture.pipeline, architecture.part
    if not hasattr(loader, "lora_state_dict"):
        raise UserError(f"{path.name}: {loader.__name__} takes no LoRA")
    asked = {key: net.config if key == "unet_config" else value for key, value in architecture.lora.items()}
    state, *given, metadata = loader.lora_state_dict(
        str(path), use_safetensors=True, return_lora_metadata=True, **asked
    )
    alphas = given[0] if given else None
    own = {
        key.removeprefix(f"{part}."): tensor for key, tensor in state.items() if key.startswith(f"{part}.")
    }
    own = own if any("lora_A" in key for key in own) else convert_unet_state_dict_to_peft(own)
    spots = {key.removesuffix(half) for key in own for half in HALVES if key.endswith(half)}
    known = {name for name, _ in net.named_modules()}
    strange = sorted(
        {key for key in state if not key.startswith(f"{part}.")}
        | {key for key in own if not key.endswith(HALVES)}
    )
    lost = strange + sorted(spot for spot in spots if spot not in known)
    if lost or not own:
        raise UserError(
            f"{path.name} is no LoRA of a {type(net).__name__} alone: it holds "
            f"{', '.join(lost[:2]) or 'nothing for it'}"
        )
    with init_empty_weights():
        shadow = type(net).from_config(net.config)  # says how strongly each layer is meant
    shadow.load_lora_adapter(
        state,
        prefix=part,
        network_alphas=alphas,
        adapter_name="delta",
        low_cpu_mem_usage=True,
        metadata=None if alphas else metadata,
    )
    scales = {
        spot: layer.scaling["delta"] for spot, layer in shadow.named_modules() if isinstance(layer, LoraLayer)
    }
    return Delta(
        {spot: (own[spot + HALVES[0]], own[spot + HALVES[1]] * scale) for spot, scale in scales.items()}
    )


def _branch(delta: Delta, first: str, second: str) -> Callable:
    """The hook of one layer, which holds A and B by these names; it changes nothing at strength 0."""

    def hook(layer: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor | None:
        if delta.strength == 0:
            return None
        a, b = getattr(layer, first), getattr(layer, second)
        return out + delta.strength * product(layer, inputs[0], a, b)

    return hook


def product(layer: nn.Module, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """B A x as a layer would have it in its weight: a (r, in, …) with the layer's own kernel, b (out, r, …)
    with a kernel of 1.
    """
    if isinstance(layer, nn.Conv2d):
        return nn.functional.conv2d(
            nn.functional.conv2d(x, a, None, layer.stride, layer.padding, layer.dilation), b
        )
    return nn.functional.linear(nn.functional.linear(x, a), b)
