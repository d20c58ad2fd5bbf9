"""Measures speed and memory of SDXL at full size, weights random: python train/bench/sdxl.py [key=value ...]

Or make bench-sdxl. Base, student and hybrid(1), all around text encoding, network and VAE, and the same
through diffusers' pipeline. Without a GPU the embedded family stands in: the script runs, and says nothing
of SDXL.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from configs import ROOT, entry, versions
from configs.screen import show_table
from models.families import Family
from models.offload import compiled
from models.plans import hybrid
from models.sampler import Member, Plan, alone, draw_noise, finish
from train.bench.figures import STAND_IN, write

TEXT = "portrait of a person"
WORDS = ROOT / "models/tiny/weights/base/tokenizer"  # any tokenizer does for random weights
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
Row = dict[str, float | int | str | None]
Rows = Iterator[tuple[str, Callable[[], Row]]]  # names, and what measures each when it is called


@dataclass
class Config:
    repeats: int = 3  # images that the median is taken of, after one that is not counted
    out: str = "runs/bench-sdxl"  # results.json goes there


def main(cfg: Config) -> Path:
    """Measures, prints the table, returns the path of the results."""
    family = subject()
    rows = {name: measure() for name, measure in pictures(family, cfg.repeats)}
    results = {
        "hardware": hardware(),
        "size_px": family.card.size_px,
        "rows": rows,
        "versions": versions(),
        "config": asdict(cfg),
    }
    path = Path(cfg.out) / "results.json"
    write(path, results)
    show(results)
    return path


def hardware() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else STAND_IN


def subject() -> Family:
    """SDXL at full size on a GPU; the embedded family where there is none."""
    if not torch.cuda.is_available():
        return Family("tiny")
    return random_sdxl(published(), "cuda")


def random_sdxl(configs: dict[str, dict], device: str, dtype: torch.dtype = torch.bfloat16) -> Family:
    """The family sdxl with random weights, held as a GPU holds it; base and student share one network.

    configs: those of unet, vae, text_encoder and text_encoder_2. Nothing is read from the Hub.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    family, words = Family("sdxl", device, dtype), CLIPTokenizer.from_pretrained(WORDS, model_max_length=77)
    net = random_unet(configs["unet"], device, dtype)
    with torch.device(device):
        vae = AutoencoderKL.from_config(configs["vae"])
        one = CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])).to(dtype)
        two = CLIPTextModelWithProjection(CLIPTextConfig(**configs["text_encoder_2"])).to(dtype)
    for part in (vae, one, two):
        part.eval().requires_grad_(False)
    pipe = StableDiffusionXLPipeline(vae, one, two, words, words, None, DDIMScheduler(**BETAS))
    pipe.set_progress_bar_config(disable=True)
    family.use(pipe, {"base": net, "dmd2": net})
    return family


def random_unet(config: dict, device: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A U-Net as a family holds it on a GPU, with random weights."""
    from diffusers import UNet2DConditionModel  # here, for configs quietens diffusers before it is imported

    with torch.device(device):
        net = UNet2DConditionModel.from_config(config)
    return net.to(dtype, memory_format=torch.channels_last).eval().requires_grad_(False)


def published() -> dict[str, dict]:
    """The published configs of SDXL's parts."""
    return json.loads((ROOT / "models/published.json").read_text())["sdxl"]


def base_and_student(family: Family, steps: int = 0) -> tuple[Member, Member]:
    """The family's base, in `steps` steps where that is not 0, and its student by distribution matching."""
    base = family.member(family.card.base)
    student = family.member("dmd2" if "dmd2" in family.card.members else "dmd")
    return replace(base, levels=base.in_steps(steps)) if steps else base, student


# until 2026-11-27 "hybrid(1)" was another plan here, with the base's own guidance
HYBRID = "hybrid(1), the paper's"


def pictures(family: Family, repeats: int, steps: int = 0) -> Rows:
    """One image at a time: base, student and hybrid(1), and diffusers' own pipelines beside them."""
    base, student = base_and_student(family, steps)
    plans = {"base": alone(base), "student": alone(student), HYBRID: hybrid(base, student, 1)}
    for name, plan in plans.items():
        yield name, lambda plan=plan: timed(family, plan, repeats)
        if len({member.name for member in plan.members}) == 1:
            yield f"{name}, diffusers", lambda plan=plan: theirs(family, plan.members[0], repeats)


def batches(family: Family, repeats: int, sizes: list[int]) -> Rows:
    """More images at once by the student, then by the VAE alone."""
    student = alone(base_and_student(family)[1])
    for size in sizes:
        yield f"student, batch {size}", lambda size=size: timed(family, student, repeats, size)
    for size in (1, *sizes):
        yield f"VAE, batch {size}", lambda size=size: decoding(family, repeats, size)


def compilation(family: Family, repeats: int, backend: str) -> Rows:
    """The student's images with its network as it is, and compiled."""
    member = base_and_student(family)[1]

    def images(backend: str) -> Row:
        if backend:
            compiled(member.denoiser.net, backend)
        start = now()
        family.draw(member, [TEXT], [0])
        first = now() - start
        # without the share inside the network: what clocks it would be compiled too
        seconds, _ = clocked(lambda: family.draw(member, [TEXT], [0]), [], repeats)
        return {"batch_size": 1, "first_seconds": first, "seconds": seconds, "peak_gb": peak_gb()}

    yield "student, eager", lambda: images("")
    yield f"student, compiled by {backend}", lambda: images(backend)


@torch.no_grad()
def timed(family: Family, plan: Plan, repeats: int, batch_size: int = 1) -> Row:
    """Seconds per image from the text to the picture, and the share of them inside the network."""

    def images() -> None:
        noise = draw_noise(range(batch_size), family.latent_shape, plan.steps, family.device)
        family.decode(finish(plan, noise, family.encode([TEXT] * batch_size)))

    return drawn(images, plan, repeats, batch_size)


@torch.no_grad()
def theirs(family: Family, member: Member, repeats: int) -> Row:
    """The same image by diffusers' own pipeline."""
    from diffusers import DDIMScheduler, LCMScheduler

    pipe, guided, side = family.pipe, member.guidance is not None, family.card.size_px
    pipe.register_modules(unet=member.denoiser.net)
    pipe.scheduler = (DDIMScheduler if guided else LCMScheduler)(**BETAS, clip_sample=False)
    timesteps = {"timesteps": [int(level.t) for level in member.levels]}
    options = {"num_inference_steps": len(member.levels)} if guided else timesteps
    # latents, decoded as ours are: the pipeline itself would hand those of a bf16 network to a VAE in fp32
    options |= {"height": side, "width": side, "output_type": "latent"}
    options["guidance_scale"] = member.guidance or 0

    def images() -> None:
        family.decode(pipe(TEXT, generator=torch.Generator().manual_seed(0), **options).images)

    try:
        return drawn(images, alone(member), repeats)
    finally:
        pipe.register_modules(unet=None)


@torch.no_grad()
def decoding(family: Family, repeats: int, batch_size: int) -> Row:
    """Seconds per image of the VAE's decoder, and what memory each takes beside all that lies there."""
    vae = family.pipe.vae
    latents = torch.randn(batch_size, *family.latent_shape, device=family.device, dtype=vae.dtype)
    seconds, _ = clocked(lambda: vae.decode(latents), [], repeats)
    row = {"batch_size": batch_size, "seconds": seconds / batch_size, "peak_gb": peak_gb()}
    if torch.cuda.is_available():
        row["peak_gb_per_image"] = (row["peak_gb"] - torch.cuda.memory_allocated() / 1e9) / batch_size
    return row


def drawn(images: Callable[[], None], plan: Plan, repeats: int, batch_size: int = 1) -> Row:
    """The figures of a piece of work that draws a batch of images by a plan."""
    nets = {id(member.denoiser.net): member.denoiser.net for member in plan.members}
    seconds, inside = clocked(images, list(nets.values()), repeats)
    return {
        "batch_size": batch_size,
        "nfe": plan.nfe,
        "seconds": seconds / batch_size,
        "in_network": inside / seconds,
        "peak_gb": peak_gb(),
    }


def clocked(work: Callable[[], None], nets: list[nn.Module], repeats: int) -> tuple[float, float]:
    """Median seconds of some work, and of the forward passes within it; the first run is not counted."""
    marks, inside, total = [], [], []
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


def now() -> float:
    """Seconds on a clock, once the GPU has done all that it was asked."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_gb() -> float | None:
    """GB of GPU memory at the most since the last run of `clocked` began; None without a GPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None


def show(results: dict) -> None:
    """Prints the table."""
    rows = [
        {
            "what": name,
            "nfe": str(row["nfe"]),
            "seconds": f"{row['seconds']:.3f}",
            "inside the network": f"{row['in_network']:.1%}",
            "peak GB": "–" if row["peak_gb"] is None else f"{row['peak_gb']:.1f}",
        }
        for name, row in results["rows"].items()
    ]
    show_table(f"{results['hardware']}, {results['size_px']} pixels, one image at a time", rows)


if __name__ == "__main__":
    entry(main, Config)
