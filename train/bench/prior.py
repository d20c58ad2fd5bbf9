"""Measures how well a few-step student still draws with a LoRA on it: python train/bench/prior.py [key=value
...], or make bench-prior

Trains one LoRA of a held-out style of the embedded world on the student, at several weights of the prior
term, and draws held-out captions in the student's own few steps, without and with the token. Writes
runs/bench-prior/results.json.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from configs import entry, list_of, merge
from configs.screen import show_table
from controls import formats
from controls.lora import Control, fused
from models.evaluators import Attributes, Clip
from models.families import Family, split
from models.tiny import world
from models.tiny.certificate import checks
from models.tiny.faces import claims, styled
from train import lora
from train.bench.figures import write_cells

SEED = 555  # of the held-out captions, as in the family's certificate
BLOCKS = 6  # parts of the images, each of which gives a distance; their spread gives its error


@dataclass
class Config:
    config: str = "configs/loras/watercolour.yaml"  # the LoRA
    member: str = "tiny/dmd"  # the student
    priors: list[float] = list_of(0.0, 1.0)  # weights of the prior term
    steps: int = 150  # optimizer steps of each training
    images: int = 96  # pictures with and as many without the token, one per held-out caption
    out: str = "runs/bench-prior"  # the runs and results.json go there


def main(cfg: Config) -> None:
    """Trains once per weight, measures the student before and after, prints the table."""
    rows = {"before": judge(cfg, None)}
    for prior in cfg.priors:
        words = {
            "name": f"prior-{prior:g}".replace(".", "_"),
            "prior": prior,
            "member": cfg.member,
            "steps": cfg.steps,
            "out": cfg.out,
            "sample_every": 0,
            "overwrite": True,
            "wandb": "disabled",
        }
        path = lora.main(merge(lora.Config, cfg.config, words))
        rows[f"after, prior {prior:g}"] = judge(cfg, formats.load(path))
    write_cells(cfg, rows)
    show(rows)


def judge(cfg: Config, control: Control | None) -> dict[str, dict[str, list[float]]]:
    """For captions without and with the token: obedience and kernel distance to true pictures, each with its
    standard error.

    True pictures show other people than the captions do: without the token as the world draws them, with it
    in the style.
    """
    recipe, (name, member_name) = merge(lora.Config, cfg.config), split(cfg.member)
    family = Family(name)
    member, clip, probe = family.member(member_name), Clip(family.card.clip), Attributes(family.card.probe)
    texts, people = world.captions(world.faces(cfg.images, SEED), SEED), world.faces(cfg.images, SEED + 1)
    cases = {
        "without token": (texts, people),
        "with token": (
            [f"{recipe.token} {text}" for text in texts],
            [styled(face, recipe.data.partition(":")[2]) for face in people],
        ),
    }
    measures = {}
    for case, (prompts, true) in cases.items():
        with fused(member.denoiser.net, control, 1.0, name) if control else nullcontext():
            images = family.draw(member, prompts, list(range(cfg.images)))
        pairs = zip(
            np.array_split(clip.features(images), BLOCKS),
            np.array_split(clip.features(world.to_unit(world.pictures(true))), BLOCKS),
            strict=True,
        )
        measures[case] = {
            "obeys": with_error(held(texts, probe.features(images))),
            "distance": with_error([distance(*pair) for pair in pairs]),
        }
    return measures


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Kernel distance of two sets of features (N, d), (M, d): the squared MMD of the kernel (x·y / d + 1)³,
    unbiased in N and M.

    About 0 where both come from one distribution. Source: Bińkowski et al. 2018, arXiv 1801.01401, sec. 3.
    """

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x):
        return (kernel(x, x).sum() - np.trace(kernel(x, x))) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def show(rows: dict) -> None:
    """Prints both measures of every student."""
    printed = []
    for name, row in rows.items():
        cells = {"student": name}
        for kind, numbers in row.items():
            (obeys, error), (distance, spread) = numbers["obeys"], numbers["distance"]
            cells[f"obeys {kind}"] = f"{obeys:.3f} ± {error:.3f}"
            cells[f"distance {kind}"] = f"{1000 * distance:.2f} ± {1000 * spread:.2f}"
        printed.append(cells)
    show_table(
        "Share of a caption's claims that the probe sees; CLIP's distance to true pictures, × 1000", printed
    )


def held(texts: list[str], seen: np.ndarray) -> list[float]:
    """Of every text the share of its claims that the probe has seen; seen: (N, attributes)."""
    return [
        float(np.mean(list(checks(claims(text), its).values())))
        for text, its in zip(texts, seen, strict=True)
    ]


def with_error(values: list[float]) -> list[float]:
    """Mean and standard error."""
    return [float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5)]


if __name__ == "__main__":
    entry(main, Config)
