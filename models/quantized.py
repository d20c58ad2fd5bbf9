"""Quantised networks: the linear layers of their blocks held in 4 or 8 bits, to train a control on or to draw
in less memory.

A layer's weight is unpacked whenever it is used, forward and backward, and never kept: a quantised network is
exactly the network that has the unpacked weights, in any type and on any device, whatever package packs them.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs import UserError, cut
from models.hashing import fingerprint
from models.offload import trim

SPELL = 32  # layers after which the memory of their whole weights is given back
PIECE = 2**20  # weights packed at once: on a CPU each is compared with all 16 codes, 64 bytes of a weight
# of a repeated block: embedders and the ends of a network are small and say much
INSIDE = re.compile(r"^(?!.*embed).*\.\d+\.")


def _nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    from bitsandbytes.functional import quantize_4bit

    codes, scales = [], []
    for piece in weight.flatten().split(PIECE):
        packed, state = quantize_4bit(piece, blocksize=64, compress_statistics=False, quant_type="nf4")
        codes.append(packed)
        scales.append(state.absmax)
    return torch.cat(codes), torch.cat(scales)


def _from_nf4(codes: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    return dequantize_4bit(
        codes, QuantState(scales, torch.Size(shape), blocksize=64, quant_type="nf4", dtype=dtype)
    )


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    from bitsandbytes.functional import int8_vectorwise_quant

    codes, largest, _ = int8_vectorwise_quant(weight.half())
    return codes, largest[:, None] / 127


def _int8_torchao(weight: Tensor) -> tuple[Tensor, Tensor]:
    from torchao.quantization import Int8Tensor, PerRow

    packed = Int8Tensor.from_hp(weight.float(), granularity=PerRow())
    return packed.qdata, packed.scale


def _from_int8(codes: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return (codes * scales).to(dtype)


@dataclass(frozen=True)
class Kind:
    """A way to hold weights (out, in) as codes and scales."""

    package: str  # that packs them
    extra: str  # which installs it
    bits: float  # of a weight, about, scales included
    pack: Callable[[Tensor], tuple[Tensor, Tensor]]
    unpack: Callable[[Tensor, Tensor, tuple[int, int], torch.dtype], Tensor]


KINDS = {
    # QLoRA, Dettmers et al. 2023, sec. 3; a scale per 64 weights
    "nf4": Kind("bitsandbytes", "8bit", 4.5, _nf4, _from_nf4),
    # a scale per row: LLM.int8, Dettmers et al. 2022, for weights alone
    "int8": Kind("bitsandbytes", "8bit", 8.0, _int8, _from_int8),
    "int8-torchao": Kind("torchao", "torchao", 8.0, _int8_torchao, _from_int8),
}


class Quantized(nn.Linear):
    """A frozen linear layer whose weight is packed."""

    def __init__(self, layer: nn.Linear, kind: str, device: torch.device):
        """Packs the weight on a device, and leaves it there."""
        nn.Module.__init__(self)  # not Linear's, which makes a weight
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.kind, self.dtype, self.bias = KINDS[kind], layer.weight.dtype, layer.bias
        codes, scales = self.kind.pack(layer.weight.detach().to(device))
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        # another layer, and the share of this one's difference from it that acts
        self.between: tuple[nn.Linear, float] | None = None

    @property
    def weight(self) -> Tensor:
        """The weight as it acts, (out, in), unpacked anew: to change it changes nothing."""
        own = self.kind.unpack(self.codes, self.scales, (self.out_features, self.in_features), self.dtype)
        if self.between is None:
            return own
        other, share = self.between
        return torch.lerp(other.weight.to(own.device, torch.float32), own.float(), share).to(own.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self)


class _Product(torch.autograd.Function):
    """x Wᵀ + b with gradients for x alone; plain autograd would keep every unpacked W until the backward
    pass.
    """

    @staticmethod
    def forward(ctx, x: Tensor, layer: Quantized) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.weight, None


def check(kind: str) -> None:
    """Raises UserError for a quantisation that does not exist or whose package is not installed; empty is
    none.
    """
    if kind and kind not in KINDS:
        raise UserError(f"no quantize {cut(kind)!r}; there are {', '.join(KINDS)}")
    if kind and find_spec(KINDS[kind].package) is None:
        raise UserError(
            f"quantize={kind} needs {KINDS[kind].package}: pip install -e '.[{KINDS[kind].extra}]'"
        )


def quantize(net: nn.Module, kind: str, device: torch.device) -> nn.Module:
    """Packs a bare network's layers in place, one by one on a device, where they then lie; the rest stays
    where it is.

    Its `fingerprint` stays that of the whole weights.
    """
    net.fingerprint = fingerprint(net)
    for count, name in enumerate(inside(net)):
        if count % SPELL == 0:
            trim()
        parent, _, child = name.rpartition(".")
        above = net.get_submodule(parent)
        setattr(above, child, Quantized(getattr(above, child), kind, device))
    return net


def quantized(net: nn.Module) -> bool:
    return any(isinstance(module, Quantized) for module in net.modules())


def layers(net: nn.Module, kind: type = Quantized) -> dict[str, nn.Module]:
    """The layers of a kind, the packed ones, by the names that they have in the bare network."""
    return {
        name.replace(".base_layer", ""): module
        for name, module in net.named_modules()
        if isinstance(module, kind)
    }


def weights(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All weights of a network by name, the packed ones unpacked, one at a time."""
    yield from net.named_parameters()
    yield from ((f"{name}.weight", layer.weight) for name, layer in layers(net).items())


def inside(net: nn.Module) -> list[str]:
    """The names of the layers that are packed."""
    return [
        name for name, module in net.named_modules() if isinstance(module, nn.Linear) and INSIDE.search(name)
    ]
