"""What drawing costs beyond the networks themselves: python -m analysis.bench [key=value ...], or make
bench-transfer

Draws one control on every member as the transfer validator does, and asks the bare networks for the same
number of evaluations in the same batches. The overhead is everything else: putting the control into the
weights, noise, updates, files.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from analysis import transfer
from analysis.images.cache import Drawings, Job
from configs import entry, merge
from models.sampler import draw_noise


@dataclass
class Config:
    control: str = "controls/tiny/smile.safetensors"  # the control
    seeds: int = 4  # images per prompt
    rounds: int = 3  # how often each is timed; the fastest counts


def main(cfg: Config) -> None:
    """Times both, in turns, and prints seconds, images per second and overhead for every member."""
    with tempfile.TemporaryDirectory() as folder:
        words = [f"controls=[{cfg.control}]", f"seeds={cfg.seeds}", f"cache={folder}", "references=false"]
        drawings, (subject,), targets = transfer.prepare(merge(transfer.Config, words), torch.device("cpu"))
        table = Table(title="Seconds per drawing; overhead over U-Net, VAE and evaluators")
        for head in (
            "member",
            "images",
            "drawn in",
            "networks alone",
            "of which U-Net",
            "images per second",
            "overhead",
        ):
            table.add_column(head)
        for target in targets:
            job, plan = Job(target, subject.name, 1.0), drawings.plan(target)
            drawings.make(job)  # what is prepared once is prepared now
            whole, parts = [], []
            for _ in range(cfg.rounds):
                for path in drawings.files(job):
                    path.unlink(missing_ok=True)
                drawings.whole.clear()
                whole.append(seconds(lambda job=job: drawings.make(job)))
                parts.append(bare(drawings, plan))
            total, (unet, rest) = min(whole), (min(part) for part in zip(*parts, strict=True))
            count = len(drawings.numbers)
            table.add_row(
                target,
                str(count),
                f"{total:.2f}",
                f"{unet + rest:.2f}",
                f"{unet:.2f}",
                f"{count / total:.1f}",
                f"{100 * (total / (unet + rest) - 1):.1f} %",
            )
    Console(width=110).print(table)


@torch.no_grad()
def bare(drawings: Drawings, plan) -> tuple[float, float]:
    """Seconds of the U-Net's evaluations of a plan, and of VAE and evaluators, for as many images as a
    drawing has.
    """
    family, count = drawings.family, len(drawings.numbers)
    latents = draw_noise(range(count), family.latent_shape, 1, family.device)[:, 0]
    images = torch.zeros(count, 3, family.card.size_px, family.card.size_px)
    conditioning = family.encode([drawings.texts[k // drawings.seeds] for k in range(count)])

    def steps(rows: torch.Tensor) -> torch.Tensor:
        for stage in plan.stages:
            for level in stage.levels:
                stage.member.denoiser(latents[rows], level, conditioning[rows], stage.member.guidance)
        return rows

    def look(rows: torch.Tensor) -> torch.Tensor:
        for evaluator in drawings.evaluators.values():
            evaluator.features(images[rows])
        return rows

    def decode(rows: torch.Tensor) -> torch.Tensor:
        return family.decode(latents[rows])

    unet, vae, evaluators = (
        seconds(lambda work=work: family.drawing.of(work, count)) for work in (steps, decode, look)
    )
    return unet, vae + evaluators


def seconds(work: Callable) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    entry(main, Config)
