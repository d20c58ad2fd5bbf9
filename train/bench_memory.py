"""Says what memory a step of training a slider takes on SDXL's U-Net: python train/bench_memory.py [key=value ...], or make bench-memory

Estimated without a GPU by following every tensor of one step on torch's `meta` device, and measured where there is a GPU. Network in bf16,
control and optimizer in fp32; the VAE and the points that are trained on come on top. Writes runs/bench-memory/results.json.
"""

import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configs import entry, load, replacing, versions
from controls.lora import create, detach, parameters, strength
from models.noise import to_eps, vp
from models.prompts import Prompts
from models.quantized import KINDS, inside
from models.sample import Denoiser
from train.run import adamw

SDXL = {  # the U-Net config of stabilityai/stable-diffusion-xl-base-1.0
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2, "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20], "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
FACTOR = 8  # pixels per latent


@dataclass
class Config:
    sizes_px: list[int] = field(default_factory=lambda: [512, 1024])  # of the images
    batch: int = 1  # latents at once
    rank: int = 4  # of the slider
    layers: str = "noxattn"  # its layer set
    scope: str = "c3lier"  # and how far that reaches
    out: str = "runs/bench-memory"  # results.json goes there


def main(cfg: Config) -> None:
    """Follows a step of every size with and without checkpointing, measures it where there is a GPU, prints the table."""
    cases = [(size_px, checkpointing) for size_px in cfg.sizes_px for checkpointing in (False, True)]
    net = unet("meta")
    found = [{"size_px": case[0], "checkpointing": case[1], **follow(net, cfg, *case)} for case in cases]
    if torch.cuda.is_available():
        net = unet("cuda")
        found = [{**row, "measured": measure(net, cfg, *case)} for row, case in zip(found, cases, strict=True)]
    with replacing(Path(cfg.out) / "results.json") as new:
        new.write_text(json.dumps({"schema": 1, "config": asdict(cfg), "versions": versions(), "cells": found}, indent=1) + "\n")
    show(found)


def unet(device: str) -> nn.Module:
    """SDXL's U-Net as a family holds it on a GPU, with random weights."""
    from diffusers import UNet2DConditionModel  # not above, for configs quietens diffusers before it is imported

    with torch.device(device):
        net = UNet2DConditionModel(**SDXL).to(torch.bfloat16, memory_format=torch.channels_last)
    return net.eval().requires_grad_(False)


def update(net: nn.Module, cfg: Config, size_px: int, checkpointing: bool) -> None:
    """One step as train/slider.py makes it, with an optimizer that has its moments, and the moving average beside the weights."""
    create(net, "slider", cfg.layers, cfg.scope, cfg.rank)
    if checkpointing:
        net.enable_gradient_checkpointing()
    weights = parameters(net, "slider")
    average, optimizer = [weight.detach().clone() for weight in weights], adamw(weights, 1e-3)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad()
    pooled = net.config.projection_class_embeddings_input_dim - 6 * net.config.addition_time_embed_dim
    empty = lambda *shape: torch.zeros((cfg.batch, *shape), device=net.device)  # noqa: E731
    x, told = empty(4, *[size_px // FACTOR] * 2), Prompts(empty(77, net.config.cross_attention_dim), empty(pooled), empty(6))
    try:
        with strength(net, slider=1.0):
            to_eps(x, Denoiser(net)(x, vp(500), told), vp(500)).square().mean().backward()
        optimizer.step()
        torch._foreach_lerp_(average, [weight.detach() for weight in weights], 0.1)
    finally:
        net.disable_gradient_checkpointing()
        detach(net)


def follow(net: nn.Module, cfg: Config, size_px: int, checkpointing: bool) -> dict[str, int]:
    """The bytes of the bare network, the most that lived during a step, and about what that would be with quantize=nf4."""
    with Peak(net) as peak, flash():
        network = peak.live
        update(net, cfg, size_px, checkpointing)
    return {"network": network, "peak": peak.most, "nf4": round(peak.most - saved(net))}


def saved(net: nn.Module) -> float:
    """The bytes by which quantize=nf4 makes a network smaller while one of its layers is unpacked."""
    weights = [net.get_submodule(name).weight for name in inside(net)]
    return sum(weight.nbytes - weight.numel() * KINDS["nf4"].bits / 8 for weight in weights) - max(weight.nbytes for weight in weights)


def measure(net: nn.Module, cfg: Config, size_px: int, checkpointing: bool) -> int:
    """The most bytes that torch held on the GPU during a step."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    update(net, cfg, size_px, checkpointing)
    return torch.cuda.max_memory_allocated()


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


def show(rows: list[dict]) -> None:
    """Prints the estimate and the measurement of every case."""
    table = Table(title="Memory of one training step of a slider on SDXL's U-Net, GiB")
    for head in ("pixels", "checkpointing", "network", "control, optimizer, activations", "peak", "peak with nf4", "measured"):
        table.add_column(head, justify="right")
    for row in rows:
        sizes = [row["network"], row["peak"] - row["network"], row["peak"], row["nf4"]]
        measured = f"{row['measured'] / 2**30:.2f}" if "measured" in row else "not measured: no GPU"
        table.add_row(str(row["size_px"]), "yes" if row["checkpointing"] else "no", *(f"{size / 2**30:.2f}" for size in sizes), measured)
    Console(width=140).print(table)


if __name__ == "__main__":
    entry(lambda: main(load(Config)))
