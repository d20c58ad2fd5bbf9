"""Measures speed and memory at SDXL's full size, with random weights: python train/bench_sdxl.py [key=value ...], or make bench-sdxl

Base, student and hybrid(1), all around text encoding, network and VAE; the same through diffusers' own pipeline; a training step of a
slider. Without a GPU the embedded family stands in, which proves that the script runs and says nothing about SDXL.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from configs import ROOT, entry, load, replacing, versions
from controls.lora import create, detach, parameters, strength
from models.families import Family
from models.sample import Member, Plan, alone, draw_noise, finish, hybrid

TEXT = "portrait of a person"
WORDS = ROOT / "models/tiny/weights/base/tokenizer"  # any tokenizer does for random weights
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass
class Config:
    repeats: int = 3  # images or steps that the median is taken of, after one that is not counted
    out: str = "runs/bench-sdxl"  # results.json goes there


def main(cfg: Config) -> Path:
    """Measures, prints the table, returns the path of the results."""
    gpu = torch.cuda.is_available()
    family = full_size() if gpu else Family("tiny")
    names = (family.card.base, "dmd2" if gpu else "dmd")
    base, student = (family.member(name) for name in names)
    plans = {"base": alone(base), "student": alone(student), "hybrid(1)": hybrid(base, student, 1)}
    rows = {name: timed(family, plan, cfg.repeats) for name, plan in plans.items()}
    rows |= {f"{name}, diffusers": theirs(family, member, cfg.repeats) for name, member in (("base", base), ("student", student))}
    rows["slider step, rank 4"] = training(family, base, cfg.repeats)
    hardware = torch.cuda.get_device_name() if gpu else "no GPU: the embedded family on the CPU stands in"
    ratio = rows["hybrid(1)"]["seconds"] / rows["student"]["seconds"]
    results = {"hardware": hardware, "size_px": family.card.size_px, "hybrid_over_student": ratio, "rows": rows, "versions": versions(),
               "config": asdict(cfg)}  # fmt: skip
    path = Path(cfg.out) / "results.json"
    with replacing(path) as new:
        new.write_text(json.dumps(results, indent=1) + "\n")
    show(results)
    return path


def full_size() -> Family:
    """SDXL at full size with random weights on the GPU: base and student share one network."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    configs, device, dtype = json.loads((ROOT / "models/published.json").read_text())["sdxl"], "cuda", torch.bfloat16
    family, words = Family("sdxl", device, dtype), CLIPTokenizer.from_pretrained(WORDS)
    with torch.device(device):
        net = UNet2DConditionModel.from_config(configs["unet"]).to(dtype, memory_format=torch.channels_last)
        vae = AutoencoderKL.from_config(configs["vae"])
        one = CLIPTextModel(CLIPTextConfig(**configs["text_encoder"]))
        two = CLIPTextModelWithProjection(CLIPTextConfig(**configs["text_encoder_2"]))
    for part in (net, vae, one, two):
        part.eval().requires_grad_(False)
    pipe = StableDiffusionXLPipeline(vae, one, two, words, words, None, DDIMScheduler(**BETAS))
    family.use(pipe, {"base": net, "dmd2": net})
    return family


@torch.no_grad()
def timed(family: Family, plan: Plan, repeats: int) -> dict:
    """Seconds per image from the text to the picture, and the share of them inside the network."""
    net = plan.stages[0].member.denoiser.net

    def image() -> None:
        noise = draw_noise([0], family.latent_shape, plan.steps, family.device)
        family.decode(finish(plan, noise, family.encode([TEXT])))

    nets = {id(stage.member.denoiser.net): stage.member.denoiser.net for stage in plan.stages}
    seconds, inside = clocked(image, list(nets.values()), repeats)
    return {"seconds": seconds, "in_network": inside / seconds, "peak_gb": peak(net)}


@torch.no_grad()
def theirs(family: Family, member: Member, repeats: int) -> dict:
    """The same image by diffusers' own pipeline."""
    from diffusers import DDIMScheduler, LCMScheduler

    pipe, net, guided = family.pipe, member.denoiser.net, member.guidance is not None
    pipe.register_modules(unet=net)
    pipe.scheduler = (DDIMScheduler if guided else LCMScheduler)(**BETAS, clip_sample=False)
    steps = {"num_inference_steps": len(member.levels)} if guided else {"timesteps": [int(level.t) for level in member.levels]}
    side = family.card.size_px
    options = {"height": side, "width": side, "guidance_scale": member.guidance or 0, "output_type": "pt", **steps}
    # the VAE is in fp32 in both; the pipeline's own latents would be in the network's precision
    seconds, inside = clocked(lambda: pipe(TEXT, generator=torch.Generator().manual_seed(0), **options), [net], repeats)
    pipe.register_modules(unet=None)
    return {"seconds": seconds, "in_network": inside / seconds, "peak_gb": peak(net)}


def training(family: Family, member: Member, repeats: int) -> dict:
    """One optimizer step of a rank-4 slider: three teacher passes, one forward and one backward."""
    net, told = member.denoiser.net, family.encode([TEXT]).conditional()
    create(net, "slider", rank=4)
    net.enable_gradient_checkpointing()
    weights, level = parameters(net, "slider"), member.levels[len(member.levels) // 2]
    optimizer = torch.optim.AdamW(weights, 2e-4)
    x = torch.randn(1, *family.latent_shape, device=family.device)

    def step() -> None:
        with torch.no_grad():
            taught = member.denoiser(x.repeat(3, 1, 1, 1), level, told[[0, 0, 0]]).mean(0, keepdim=True)
        with strength(net, slider=1.0):
            (member.denoiser(x, level, told) - taught).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds, _ = clocked(step, [net], repeats)
    net.disable_gradient_checkpointing()
    detach(net)
    return {"seconds": seconds, "in_network": None, "peak_gb": peak(net)}


def clocked(work: Callable[[], None], nets: list[nn.Module], repeats: int) -> tuple[float, float]:
    """Median seconds of a piece of work, and of the forward passes within it; the first run is not counted."""
    marks, inside, total = [], [], []

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    hooks = [net.register_forward_pre_hook(lambda *_: marks.append(now())) for net in nets]
    hooks += [net.register_forward_hook(lambda *_: marks.append(now())) for net in nets]
    try:
        for _ in range(repeats + 1):
            marks.clear()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            start = now()
            work()
            total.append(now() - start)
            inside.append(sum(end - begin for begin, end in zip(marks[::2], marks[1::2], strict=True)))
    finally:
        for hook in hooks:
            hook.remove()
    return statistics.median(total[1:]), statistics.median(inside[1:])


def peak(net: nn.Module) -> float | None:
    """GB of GPU memory at the most since the last run began; None without a GPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if next(net.parameters()).is_cuda else None


def show(results: dict) -> None:
    """Prints the table."""
    table = Table(title=f"{results['hardware']}, {results['size_px']} pixels; hybrid(1) / student {results['hybrid_over_student']:.3f}")
    for head in ("what", "seconds", "inside the network", "peak GB"):
        table.add_column(head)
    for name, row in results["rows"].items():
        inside, memory = ("–" if value is None else text.format(value) for text, value in
                          (("{:.1%}", row["in_network"]), ("{:.1f}", row["peak_gb"])))  # fmt: skip
        table.add_row(name, f"{row['seconds']:.3f}", inside, memory)
    Console(width=max(100, Console().width)).print(table)


if __name__ == "__main__":
    entry(lambda: main(load(Config)))
