"""Measures the fast slider recipe against the published one: python train/bench/recipes.py [key=value ...],
or make bench-train

Trains the same slider by both, for the same steps, and by the fast one for the published one's wall time.
Writes runs/bench/results.json.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch

from configs import entry, merge
from configs.screen import show_table
from controls import formats, retention
from controls.effect import change
from controls.lora import fused
from models.evaluators import load_evaluators
from models.families import Family
from train import slider
from train.bench.figures import write_cells

SCALES = np.array([-1.0, 0.0, 1.0])


@dataclass
class Config:
    config: str = "configs/sliders/smile.yaml"  # the slider
    steps: int = 100  # optimizer steps of both recipes
    seeds: int = 2  # images per prompt of the effect's measurement
    out: str = "runs/bench"  # the runs and results.json go there


def main(cfg: Config) -> None:
    """Trains three times, measures, prints the table."""
    fast = train(cfg, "fast", cfg.steps)
    published = train(cfg, "published", cfg.steps)
    longer = train(cfg, "fast", max(cfg.steps, round(published["seconds"] / (fast["seconds"] / cfg.steps))))
    rows = {"fast": fast, "published": published, "fast, same time": longer}
    for row in rows.values():
        row["effect"] = effects(cfg, row.pop("control"))
    write_cells(cfg, rows)
    show(rows)


def train(cfg: Config, recipe: str, steps: int) -> dict:
    """One training from scratch: its control's path, seconds and U-Net evaluations of single samples,
    whatever prepares them included.
    """
    counted = 0

    def count(module, inputs):
        nonlocal counted
        counted += len(inputs[0]) if type(module).__name__ == "UNet2DConditionModel" else 0

    words = [
        f"name={recipe}-{steps}",
        f"recipe={recipe}",
        f"steps={steps}",
        f"out={cfg.out}",
        "sample_every=0",
        "sample_seeds=[1]",
        "sample_scales=[0]",
        "overwrite=true",
        "wandb=disabled",
    ]
    trained = merge(slider.Config, cfg.config, words)
    hook, start = torch.nn.modules.module.register_module_forward_pre_hook(count), time.time()
    try:
        path = slider.main(trained)
    finally:
        hook.remove()
    seconds = time.time() - start
    nfe = counted / steps / trained.batch_size  # by now the card's where it was 0
    return {"control": str(path), "steps": steps, "seconds": seconds, "nfe": nfe}


def effects(cfg: Config, path: str) -> dict:
    """The slope on the member it was trained on, with its interval, by each evaluator."""
    control = formats.load(path)
    family = Family(control.card.family)
    member, recipe = family.member(control.card.member), control.card.recipe
    texts = [prompt for prompt in family.card.prompts for _ in range(cfg.seeds)]
    evaluators, images = load_evaluators(family.card), []
    for scale in SCALES:
        with fused(member.denoiser.net, control, float(scale), family.card.name):
            images.append(family.draw(member, texts, [5000 + k for k in range(len(texts))]))
    slopes = {}
    for name, evaluator in evaluators.items():
        scores = [
            evaluator.score(evaluator.features(drawn), recipe["positive"], recipe["negative"])
            for drawn in images
        ]
        score = np.stack([values.reshape(-1, cfg.seeds) for values in scores], -1)
        slopes[name] = retention.estimate(change(score, 1), SCALES)["slope"]
    return slopes


def show(rows: dict[str, dict]) -> None:
    """Prints seconds, evaluations and effect of each training."""
    show_table(
        "U-Net forwards per sample and step (nfe); effect: slope per unit of scale [95 %]",
        [
            {
                "recipe": name,
                "steps": str(row["steps"]),
                "seconds": f"{row['seconds']:.0f}",
                "ms per step": f"{1000 * row['seconds'] / row['steps']:.0f}",
                "nfe": f"{row['nfe']:.1f}",
                **{
                    f"effect by {evaluator}": f"{e['value']:.3f} [{e['low']:.3f}, {e['high']:.3f}]"
                    for evaluator, e in row["effect"].items()
                },
            }
            for name, row in rows.items()
        ],
    )


if __name__ == "__main__":
    entry(main, Config)
