"""Says what memory a step of training takes on SDXL's U-Net: python train/bench/memory.py [key=value ...]

Or make bench-memory. Estimated without a GPU, by following every tensor of one step on torch's `meta`
device; make gpu measures the same. Network in bf16, control and optimizer in fp32; the VAE and the points
that are trained on come on top. Writes runs/bench-memory/results.json.
"""

from dataclasses import asdict, dataclass
from itertools import product

import torch
from torch import nn

from configs import UserError, entry, list_of
from configs.screen import show_table
from models.architectures import ARCHITECTURES
from models.families import Family
from models.quantized import KINDS, check, inside, quantize, quantized
from train.bench.figures import write_cells
from train.bench.sdxl import Row, Rows, clocked, now, peak_gb, published, random_unet
from train.dry_run import Step, follow, training

SDXL = ARCHITECTURES["sdxl"]


@dataclass
class Config:
    sizes_px: list[int] = list_of(512, 1024)  # of the images
    batch_size: int = 1  # latents at once
    rank: int = 4  # of the slider
    layers: str = "noxattn"  # its layer set
    scope: str = "c3lier"  # and how far that reaches
    out: str = "runs/bench-memory"  # results.json goes there


def main(cfg: Config) -> None:
    """Follows a step of every size with and without checkpointing, prints the table."""
    net, cells = unet("meta"), []
    for case in cases(cfg.sizes_px, [cfg.batch_size]):
        size = case.step(8, rank=cfg.rank, layers=cfg.layers, scope=cfg.scope)
        about = {"size_px": case.size_px, "gradient_checkpointing": case.gradient_checkpointing}
        cells.append(about | follow(net, size))
    for cell in cells:
        cell["nf4"] = round(cell["peak"] - saved(net))
    write_cells(cfg, cells)
    show(cells)


@dataclass(frozen=True)
class Case:
    """A training step of some size."""

    size_px: int
    batch_size: int
    gradient_checkpointing: bool

    def __str__(self) -> str:
        checkpointing = ", checkpointing" if self.gradient_checkpointing else ""
        return f"{self.size_px} px, batch {self.batch_size}{checkpointing}"

    def step(self, factor: int, **control) -> Step:
        """The same for a network whose latents are so many times smaller than its images."""
        side = self.size_px // factor
        control["gradient_checkpointing"] = self.gradient_checkpointing
        return Step(SDXL, "vp", (4, side, side), self.batch_size, **control)


def cases(sizes_px: list[int], batches: list[int]) -> list[Case]:
    """Every size with every batch, without checkpointing and with it."""
    return [Case(*case) for case in product(sizes_px, batches, (False, True))]


def unet(device: str) -> nn.Module:
    """SDXL's, with random weights."""
    return random_unet(published()["unet"], device)


def saved(net: nn.Module) -> float:
    """The bytes by which quantize=nf4 makes a network smaller while one of its layers is unpacked."""
    weights = [net.get_submodule(name).weight for name in inside(net)]
    return sum(weight.nbytes - weight.numel() * KINDS["nf4"].bits / 8 for weight in weights) - max(
        weight.nbytes for weight in weights
    )


def steps(sizes_px: list[int], batches: list[int], kind: str, repeats: int) -> Rows:
    """A step (forward, backward, optimizer) of each size and batch: measured, measured when packed, forecast.

    sizes_px: empty = the size of the network's images, and half of it. kind: of packing; empty = none.
    """
    net, side, factor = subject()
    sizes = cases(sizes_px or [side // 2, side], batches)
    for case in sizes:
        yield str(case), lambda case=case: measured(net, factor, repeats, case)
    if kind:
        yield f"packing in {kind}", lambda: packing(net, kind)
        for case in sizes:
            yield f"{case}, {kind}", lambda case=case: measured(net, factor, repeats, case, packed=True)
    for case in sizes:
        yield f"{case}, forecast", lambda case=case: forecast(net, factor, case)


def subject() -> tuple[nn.Module, int, int]:
    """SDXL's U-Net on a GPU, else the embedded family's; the side of its images, in pixels and per latent."""
    if torch.cuda.is_available():
        return unet("cuda"), 1024, 8
    return Family("tiny").member("base").denoiser.net, 64, 4


def measured(net: nn.Module, factor: int, repeats: int, case: Case, packed: bool = False) -> Row:
    """Seconds of a step, and the most memory that was held. Raises UserError where packing has failed."""
    if packed and not quantized(net):
        raise UserError("the network is not packed")
    with training(net, case.step(factor)) as step:
        (seconds, _), peak = clocked(step, [], repeats), peak_gb()
    return {**asdict(case), "seconds": seconds, "peak_gb": peak}


def forecast(net: nn.Module, factor: int, case: Case) -> Row:
    """The same by a network without weights on `meta`."""
    with torch.device("meta"):
        blank = type(net).from_config(net.config).to(net.dtype).eval().requires_grad_(False)
    return {**asdict(case), "peak_gb": follow(blank, case.step(factor))["peak"] / 1e9}


def packing(net: nn.Module, kind: str) -> Row:
    """Packs a network in place: its size before and after, and the seconds, many for its weights' hash."""
    check(kind)
    start, whole = now(), size_gb(net)
    quantize(net, kind, net.device)
    return {"seconds": now() - start, "whole_gb": whole, "packed_gb": size_gb(net)}


def size_gb(net: nn.Module) -> float:
    return sum(tensor.nbytes for tensor in (*net.parameters(), *net.buffers())) / 1e9


def show(rows: list[dict]) -> None:
    """Prints the estimate of every case."""
    printed = []
    for row in rows:
        sizes = {"network": row["network"], "control, optimizer, activations": row["peak"] - row["network"]}
        sizes |= {"peak": row["peak"], "peak with nf4": row["nf4"]}
        about = {
            "pixels": str(row["size_px"]),
            "checkpointing": "yes" if row["gradient_checkpointing"] else "no",
        }
        printed.append({**about, **{name: f"{size / 2**30:.2f}" for name, size in sizes.items()}})
    show_table("Memory of one training step of a slider on SDXL's U-Net, GiB", printed)


if __name__ == "__main__":
    entry(main, Config)
