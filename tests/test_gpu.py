"""Every command runs on a GPU, and its values in fp32 are a CPU's. Without one the CPU stands in."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from analysis import diversity, similarity, trace, transfer
from configs import merge
from controls import formats, show
from controls.lora import fused
from models.evaluators import load_evaluators
from models.families import Family
from models.plans import named
from models.sampler import draw_noise, finish
from train import image_slider, lora, slider, sliderspace

NEEDED = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, NEEDED])
DEVICES = [GPU, pytest.param("cpu", marks=pytest.mark.slow)]
SMILE = "controls/tiny/smile.safetensors"
TRAINERS = [
    (slider, ["trajectories=2"]),
    (slider, ["recipe=published", "denoise_steps=3"]),
    (slider, ["member=tiny/dmd", "trajectories=2", "gradient_checkpointing=true"]),
    (image_slider, ["pairs=2"]),
    (lora, ["images=4", "prior=1", "prior_images=2"]),
    (sliderspace, ["directions=2", "trajectories=3"]),
]
FEW = ["rounds=1", "max_prompts=2", "baselines=1", "references=false"]
ANALYSES = [
    (transfer, [f"controls=[{SMILE}]", "targets=[dmd]", "seeds=2", "scales=[0,1]", *FEW]),
    (trace, ["students=[dmd]", "plans=[hybrid(1)]", "seeds=2", "bands=[500]"]),
    (diversity, ["students=[dmd]", "plans=[hybrid(1)]", "seeds=3", "captions=0"]),
    (similarity, ["targets=[dmd]", "seeds=2", f"controls=[{SMILE}]", "neighbours=2", "draws=5"]),
]


@pytest.fixture(autouse=True)
def exact():
    """fp32 is fp32: no TF32 in products and convolutions."""
    places = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = False
    yield
    for place, allowed in zip(places, before, strict=True):
        place.allow_tf32 = allowed


@pytest.fixture
def on(monkeypatch):
    """A context in which commands find this device, and nothing else."""

    @contextmanager
    def on(device: str):
        AcceleratorState._reset_state(reset_partial_state=True)
        with monkeypatch.context() as patch:
            if device == "cpu":
                patch.setattr(torch.accelerator, "is_available", lambda: False)
                patch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: None)
            else:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            yield
        assert device == "cpu" or torch.cuda.max_memory_allocated() > before, "nothing was done on the GPU"
        AcceleratorState._reset_state(reset_partial_state=True)

    return on


def saved(folder) -> dict[str, dict[str, torch.Tensor]]:
    """All tensors that a run has kept, by file; of a record the numbers in it."""
    return {
        str(path.relative_to(folder)): {
            name: numbers(json.loads(bytes(tensor.tolist()))) if name == "json" else tensor
            for name, tensor in load_file(path).items()
        }
        for path in sorted(folder.rglob("*.safetensors"))
    }


def numbers(record) -> torch.Tensor:
    """All numbers of a record, in its order."""
    if isinstance(record, dict | list):
        parts = map(numbers, record.values() if isinstance(record, dict) else record)
        return torch.cat([torch.zeros(0, dtype=torch.float64), *parts])
    return torch.tensor([record] if isinstance(record, int | float) else [], dtype=torch.float64)


@torch.no_grad()
def drawn(device: str) -> dict[str, torch.Tensor]:
    """Finished latents of some plans, then images, latents of images, and features of each evaluator."""
    family = Family("tiny", device, torch.float32)
    base, student, control = family.member("base"), family.member("dmd"), formats.load(SMILE)
    prompts, made = family.encode(["portrait of a person, hat"] * 2), {}
    for text in ("base", "student", "hybrid(1)", "delta(0.6)", "cads(0.1)"):
        plan = named(text, base, student)
        with fused(plan.members[0].denoiser.net, control, 1.0, "tiny"):
            noise = draw_noise([1, 2], family.latent_shape, plan.steps, family.device)
            made[text] = finish(plan, noise, prompts).cpu()
    made["images"] = family.decode(made["base"].to(family.device))
    made["latents"] = family.to_latents(made["images"]).cpu()
    for name, evaluator in load_evaluators(family.card, family.device).items():
        made[name] = torch.as_tensor(evaluator.features(made["images"]))
    return made


@pytest.mark.parametrize("device", [GPU, "cpu"])
def test_plans_images_and_features(device):
    here, there = drawn("cpu"), drawn(device)
    worst = {name: (here[name] - there[name]).abs().max().item() for name in here}
    assert len(worst) == 10 and max(worst.values()) < 1e-3, worst


@pytest.mark.parametrize("device", [GPU, "cpu"])
def test_show(on, device, tmp_path):
    """The picture of a command that chooses its own type, bf16 on a GPU: near, not the same."""
    pictures = []
    for where in ("cpu", device):
        with on(where):
            path = show.main([SMILE], merge(show.Config, ["scales=[0,1]", f"out={tmp_path / where}.png"]))
        pictures.append(np.asarray(Image.open(path), dtype=float))
    assert np.abs(pictures[0] - pictures[1]).mean() < 8  # of 255


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("recipe", "words"), TRAINERS)
def test_training(on, device, recipe, words, tmp_path):
    """The first step's loss and gradient, before any optimizer has made much of little."""
    words = [*words, "dtype=fp32", "steps=2", "batch_size=2", "sample_seeds=[1]", "sample_scales=[0]"]
    first = []
    for where in ("cpu", device):
        with on(where):
            recipe.main(merge(recipe.Config, [*words, f"out={tmp_path / where}", "wandb=disabled"]))
        (log,) = (tmp_path / where).rglob("log.jsonl")
        first.append(json.loads(log.read_text().splitlines()[0]))
        assert saved(tmp_path / where)
    assert first[1]["loss"] == pytest.approx(first[0]["loss"], rel=1e-3, abs=1e-7)
    assert first[1]["gradient"] == pytest.approx(first[0]["gradient"], rel=1e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("command", "words"), ANALYSES)
def test_analyses(on, device, command, words, tmp_path):
    """What a command keeps of every image it drew."""
    words = [*words, "dtype=fp32", "prompts=[portrait of a person,a person in a hat]", "wandb=disabled"]
    kept = []
    for where in ("cpu", device):
        cache = [f"cache={tmp_path / where}/cache"] if command is transfer else []
        with on(where):
            assert command.main(merge(command.Config, [*words, *cache, f"out={tmp_path / where}"])).exists()
        kept.append(saved(tmp_path / where))
    here, there = kept
    assert here.keys() == there.keys() and here
    for file, tensors in here.items():
        for name, tensor in tensors.items():
            near = 1 if tensor.dtype == torch.uint8 else 1e-2  # pictures are rounded to one of 256 levels
            theirs, ours = there[file][name].double(), tensor.double()
            torch.testing.assert_close(theirs, ours, atol=near, rtol=1e-2, msg=f"{file}: {name}")
