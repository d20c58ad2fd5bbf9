"""Blocks: what a network computes inside, and two networks joined where the second half begins.

Blocks are found by module name, never by class, so that U-Nets and transformers of diffusers are one case.
"""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

from configs import UserError

TRANSFORMER = r"((single_)?transformer_blocks|noise_refiner|layers)\.\d+"  # the last two are Z-Image's
BLOCKS = {  # set: pattern of module names
    "blocks": rf"^((down|up)_blocks\.\d+|mid_block|{TRANSFORMER})$",
    "parts": rf"^(((down|up)_blocks\.\d+|mid_block)\.(resnets|attentions)\.\d+|{TRANSFORMER})$",
}
LATE = (
    "up_blocks",
    "conv_norm_out",
    "conv_out",
    "single_transformer_blocks",
    "norm_out",
    "proj_out",
    "all_final_layer",
)  # what comes after the middle


def blocks(net: nn.Module, kind: str = "parts") -> list[str]:
    """The names of a network's blocks, a U-Net's in the order in which it runs them.

    kind: a row of BLOCKS. Raises UserError for another, and where nothing matches.
    """
    if kind not in BLOCKS:
        raise UserError(f"no set of blocks {kind!r}; there are {', '.join(BLOCKS)}")
    found = [name for name, _ in net.named_modules() if re.search(BLOCKS[kind], name)]
    if not found:
        raise UserError(
            f"{type(net).__name__} has no {kind}: no module is named like down_blocks.0 or "
            f"transformer_blocks.0"
        )
    return sorted(found, key=_place)


def _place(name: str) -> tuple:
    """Down, middle, up; within a U-Net's block its pairs of resnet and attention, except that the middle
    opens with a resnet.
    """
    order = (
        *("down_blocks", "mid_block", "up_blocks"),
        *("noise_refiner", "layers", "transformer_blocks", "single_transformer_blocks"),
    )
    numbers = [int(n) for n in re.findall(r"\d+", name)]
    inner = numbers[-1] if "resnets" in name or "attentions" in name else -1
    outer = numbers[0] if numbers and not name.startswith("mid_block") else 0
    return order.index(name.split(".")[0]), outer, inner, "attentions" in name


@contextmanager
def recording(net: nn.Module, names: Sequence[str], grid: int = 1) -> Iterator[dict[str, Tensor]]:
    """Inside, each call of the network leaves in the yielded dict what these blocks gave, averaged to a map
    of grid x grid positions.

    Values: (B, C, grid, grid), fp32, of the latest call; B is the batch that the network saw. The hooks are
    gone afterwards.
    """
    seen: dict[str, Tensor] = {}
    handles = [net.get_submodule(name).register_forward_hook(_keep(seen, name, grid)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _keep(seen: dict[str, Tensor], name: str, grid: int):
    # joint transformer blocks return (text, image); blocks of U-Nets the activation, then what skips to the
    # other side
    which = -1 if re.search(TRANSFORMER, name) else 0

    def hook(module: nn.Module, inputs: tuple, output) -> None:
        seen[name] = coarse(output if isinstance(output, Tensor) else output[which], grid)

    return hook


def coarse(activation: Tensor, grid: int) -> Tensor:
    """An activation averaged to (B, C, grid, grid) in fp32: of maps (B, C, H, W), or of tokens (B, N, C).

    Tokens in a square number count as a square map; others are averaged in runs of their order. Small maps
    repeat positions.
    """
    activation = activation.detach().float()
    if activation.dim() == 4:
        return F.adaptive_avg_pool2d(activation, grid)
    tokens = activation.mT  # (B, C, N)
    side = round(tokens.shape[-1] ** 0.5)
    if side**2 == tokens.shape[-1]:
        return F.adaptive_avg_pool2d(tokens.unflatten(-1, (side, side)), grid)
    return F.adaptive_avg_pool1d(tokens, grid**2).unflatten(-1, (grid, grid))


def stitched(first: nn.Module, second: nn.Module) -> nn.Module:
    """A network that begins as the first and ends as the second; both stay as they are, and it holds their
    weights, not copies.

    U-Nets: down and middle blocks, time and text embeddings of the first; up blocks and output of the second.
    Transformers: the first half of the blocks, then the second's. Raises UserError where the two are not
    built alike.
    """
    if blocks(first) != blocks(second):
        raise UserError("only networks with the same blocks can be stitched")
    joined = copy.copy(first)
    joined._modules = {
        name: second._modules[name] if name in LATE else module for name, module in first._modules.items()
    }
    if "single_transformer_blocks" in joined._modules:  # which are the second half
        return joined
    for stack in {"transformer_blocks", "layers"} & joined._modules.keys():
        ours, theirs = first._modules[stack], second._modules[stack]
        half = len(ours) // 2
        joined._modules[stack] = nn.ModuleList([*ours[:half], *theirs[half:]])
    return joined
