"""The real families at small size: which there are, and what their tests have in common."""

import pytest
import torch

from models.cards import card
from models.families import Family
from models.sampler import alone, draw_noise, finish

TEXTS, SEEDS = ["a cat on a chair", "two dogs"], [5, 17]
NAMES = [
    *("sdxl", "sd15", "sd21", "pixart", "sd3", "flux", "zimage"),
    *("krea2", "klein", "klein9", "qwen", "qwen21"),
]
TWINS = ("2step", "8step", "2step-lora", "8step-lora")  # of members with other steps: left to `make proof`
ALIKE = ("sd15", "sd21", "klein9")  # U-Nets like sdxl's; as klein, larger
TRAINED = ("sdxl", "klein", "qwen", "qwen21")  # of each kind of network one; others: `make proof`
MEMBERS = [(name, member) for name in NAMES for member in card(name).members]
# steps of the long runs, so that the tests are short; divides 1000, as DDIM wants it with trailing spacing
FEWER = 5
STUDENTS = {
    "sdxl": "dmd2",
    "sd15": "hyper",
    "sd21": "turbo",
    "pixart": "delta",
    "sd3": "turbo",
    "flux": "schnell",
    "zimage": "turbo",
    "krea2": "turbo",
    "klein": "distilled",
    "klein9": "distilled",
    "qwen": "lightning",
    "qwen21": "lightning",
}
DELTA = "lightning-lora"  # a student of sdxl that is a LoRA over the base


def slow(values, when) -> list:
    """Parameters of a test, of which some are left to `make proof`."""
    return [
        pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=[pytest.mark.slow] if when(v) else [])
        for v in values
    ]


def latents(family: Family, name: str) -> torch.Tensor:
    """What a member makes of the texts, (2, C, H, W)."""
    member = family.member(name)
    with torch.no_grad():
        return finish(
            alone(member), draw_noise(SEEDS, family.latent_shape, len(member.levels)), family.encode(TEXTS)
        )
