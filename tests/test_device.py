"""On another device than the CPU: torch's `meta` stands in for a GPU, so that what stays behind on the CPU
fails here as it would there.

What leaves the device arrives as noise, and a number read from it is one half or true: the claim is that
every part is where it has to be.
"""

from dataclasses import replace

import pytest
import torch
from support.short_runs import ANALYSES, PROMPTS, TRAINERS

from analysis import transfer
from configs import merge
from controls import formats
from controls.lora import fused
from models import devices
from models.evaluators import load_evaluators
from models.families import Family
from models.plans import PLANS, named
from models.sampler import alone, draw_noise, finish
from train import tiny_students
from train.tiny_parts import WEIGHTS, Config

DEVICE = torch.device("meta")
ARGUMENTS = {
    "k": "1",
    "[n]": "4",
    "n": "3",
    "k,[guidance],[eta]": "1,2,0.5",
    "scale,[above],[below]": "1,2",
    "low,high": "0,800",
    "s,[k]": "0.6,1",
}  # of plans; of others one half


class Elsewhere(devices.Processes):
    """What a process on a GPU is told."""

    device = DEVICE


@pytest.fixture
def elsewhere(monkeypatch):
    """Tensors can leave the meta device, and commands run on it."""
    tensor, gone, rng = torch.Tensor, lambda x: x.device == DEVICE, torch.Generator().manual_seed(0)
    originals = {name: getattr(tensor, name) for name in ("to", "item", "tolist", "numpy", "__bool__")}

    def to(x, *args, **kwargs):
        said = [*args, *kwargs.values()]
        where = [
            w.device if isinstance(w, tensor) else torch.device(w)
            for w in said
            if isinstance(w, str | torch.device | tensor)
        ]
        if not gone(x) or where[:1] != [torch.device("cpu")]:
            return originals["to"](x, *args, **kwargs)
        return originals["to"](
            torch.rand(x.shape, generator=rng),
            next((word for word in said if isinstance(word, torch.dtype)), x.dtype),
        )

    def number(x):
        return 0.5 if gone(x) else originals["item"](x)

    for name, change in {
        "to": to,
        "cpu": lambda x: to(x, "cpu"),
        "item": number,
        "__float__": lambda x: float(number(x)),
        "__bool__": lambda x: gone(x) or originals["__bool__"](x),
        "tolist": lambda x: originals["tolist"](to(x, "cpu")),
        "numpy": lambda x, **how: originals["numpy"](to(x.detach(), "cpu"), **how),
    }.items():
        monkeypatch.setattr(tensor, name, change)
    monkeypatch.setattr(devices, "start", lambda *_: Elsewhere())


@pytest.mark.slow
@torch.no_grad()
def test_families_plans_and_evaluators(elsewhere):
    family = Family("tiny", DEVICE, torch.bfloat16)
    prompts, base, student = family.encode(["a person"] * 2), family.member("base"), family.member("dmd")
    base = replace(base, levels=base.in_steps(3))
    shape, control = family.latent_shape, formats.load("controls/tiny/smile.safetensors")
    written = [
        f"{name}({ARGUMENTS.get(words, '0.5')})" if words else name for name, (words, _) in PLANS.items()
    ]
    for plan in [
        *(named(text, base, student) for text in written),
        *(alone(family.member(name)) for name in ("lcm", "lightning")),
    ]:
        with fused(plan.members[0].denoiser.net, control, 1.0, "tiny"):
            found = finish(plan, draw_noise([1, 2], shape, plan.steps, DEVICE), prompts)
        assert found.device == DEVICE and family.decode(found).device.type == "cpu"
    assert family.to_latents(torch.zeros(2, 3, 64, 64)).device == DEVICE
    for evaluator in load_evaluators(family.card, DEVICE).values():
        assert evaluator.score(
            evaluator.features(torch.zeros(2, 3, 64, 64)), "a smiling person", "a frowning person"
        ).shape == (2,)


@pytest.mark.slow  # python takes as long on `meta` as elsewhere
@pytest.mark.parametrize(("recipe", "words"), TRAINERS)
def test_training(elsewhere, tmp_path, recipe, words):
    words = [
        *words,
        "steps=2",
        "batch_size=2",
        "sample_every=1",
        "sample_seeds=[1]",
        "sample_scales=[0,1]",
        f"out={tmp_path}",
        "wandb=disabled",
    ]
    assert recipe.main(merge(recipe.Config, words)).exists()


@pytest.mark.slow
@pytest.mark.parametrize(("command", "words"), ANALYSES)
def test_analyses(elsewhere, tmp_path, command, words):
    words = [
        *words,
        PROMPTS,
        f"out={tmp_path}",
        "wandb=disabled",
        *([f"cache={tmp_path}/cache"] if command is transfer else []),
    ]
    assert command.main(merge(command.Config, words)).exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dmd", "lcm", "lightning"])
def test_the_embedded_students(elsewhere, tmp_path, monkeypatch, name):
    adamw = torch.optim.AdamW  # there is no fused one for `meta`
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, fused, **words: adamw(*args, **words))
    monkeypatch.setattr(tiny_students, "save_student", lambda *_: None)
    words = {
        "steps": 2,
        "batch_size": 2,
        "faces": 40,
        "trajectories": 80,
        "device": "meta",
        "work": str(tmp_path),
        "weights": WEIGHTS,
    }
    getattr(tiny_students, name)(merge(Config, words))
    assert (tmp_path / f"{name}.jsonl").exists()


def test_a_tensor_that_stays_behind_is_found(elsewhere):
    """What these tests are for: noise on the CPU in a network that is not."""
    family = Family("tiny", DEVICE)
    plan = alone(family.member("dmd"))
    prompts = family.encode(["portrait of a person"] * 2)
    behind = draw_noise([1, 2], family.latent_shape, plan.steps, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="device|meta"):
        finish(plan, behind, prompts)
    there = draw_noise([1, 2], family.latent_shape, plan.steps, DEVICE)
    assert finish(plan, there, prompts).device == DEVICE
