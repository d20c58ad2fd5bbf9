"""Says what memory a step of training a slider takes on SDXL's U-Net: python train/bench_memory.py [key=value ...], or make bench-memory

Estimated without a GPU by following every tensor of one step on torch's `meta` device, and measured where there is a GPU. Network in bf16,
control and optimizer in fp32; the VAE and the points that are trained on come on top. Writes runs/bench-memory/results.json.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from configs import entry, load, replacing, versions
from models.architectures import ARCHITECTURES
from models.quantized import KINDS, inside
from train.peak import follow, update

CONFIG = {  # the U-Net config of stabilityai/stable-diffusion-xl-base-1.0
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2, "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20], "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SDXL = ARCHITECTURES["sdxl"]


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
    found = [{"size_px": case[0], "checkpointing": case[1], **follow(net, SDXL, cfg, latent(case[0]), "vp", case[1])} for case in cases]
    for row in found:
        row["nf4"] = round(row["peak"] - saved(net))
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
        net = UNet2DConditionModel(**CONFIG).to(torch.bfloat16, memory_format=torch.channels_last)
    return net.eval().requires_grad_(False)


def latent(size_px: int) -> tuple[int, int, int]:
    """The shape of a latent of SDXL's VAE."""
    return 4, size_px // 8, size_px // 8


def saved(net: nn.Module) -> float:
    """The bytes by which quantize=nf4 makes a network smaller while one of its layers is unpacked."""
    weights = [net.get_submodule(name).weight for name in inside(net)]
    return sum(weight.nbytes - weight.numel() * KINDS["nf4"].bits / 8 for weight in weights) - max(weight.nbytes for weight in weights)


def measure(net: nn.Module, cfg: Config, size_px: int, checkpointing: bool) -> int:
    """The most bytes that torch held on the GPU during a step."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    update(net, SDXL, cfg, latent(size_px), "vp", checkpointing)
    return torch.cuda.max_memory_allocated()


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
