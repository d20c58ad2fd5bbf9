"""Measures the fast slider recipe against the published one: python train/bench/recipes.py [key=value ...],
or make bench-train

Trains the same slider by both, for the same steps, and by the fast one for the published one's wall time.
Writes runs/bench/results.json.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from configs import entry, merge, replacing, versions
from configs.screen import show_table
from controls import formats, retention
from controls.effect import change
from controls.lora import fused
from models.evaluators import load_evaluators
from models.families import Family, card, split
from train import slider

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
    with replacing(Path(cfg.out) / "results.json") as new:
        new.write_text(
            json.dumps({"schema": 1, "config": asdict(cfg), "versions": versions(), "cells": rows}, indent=1)
            + "\n"
        )
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
    hook, start = torch.nn.modules.module.register_module_forward_pre_hook(count), time.time()
    try:
        path = slider.main(merge(slider.Config, cfg.config, words))
    finally:
        hook.remove()
    seconds, asked = time.time() - start, merge(slider.Config, cfg.config)
    batch_size = asked.batch_size or card(split(asked.member)[0]).batch_size
    return {"control": str(path), "steps": steps, "seconds": seconds, "nfe": counted / steps / batch_size}


def effects(cfg: Config, path: str) -> dict:
    """The slope on the member it was trained on, with its interval, by each evaluator."""
    control = formats.load(path)
    family = Family(control.card.family)
    member, words = (
        family.member(control.card.member),
        (control.card.recipe["positive"], control.card.recipe["negative"]),
    )
    texts = [prompt for prompt in family.card.prompts for _ in range(cfg.seeds)]
    evaluators, images = load_evaluators(family.card), []
    for scale in SCALES:
        with fused(member.denoiser.net, control, float(scale), family.card.name):
            images.append(family.draw(member, texts, [5000 + k for k in range(len(texts))]))
    found = {}
    for name, evaluator in evaluators.items():
        score = np.stack(
            [evaluator.score(evaluator.features(one), *words).reshape(-1, cfg.seeds) for one in images], -1
        )
        found[name] = retention.estimate(change(score, 1), SCALES)["slope"]
    return found


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
