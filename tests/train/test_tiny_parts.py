"""The embedded family's recipes, a step of each on a few portraits."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs import ROOT
from train import tiny_base, tiny_evaluators
from train.tiny import PARTS
from train.tiny_parts import Config

WRITES = {
    "vae": "base/vae",
    "base": "base/unet",
    "refine": "base/text_encoder",
}  # others: a folder of their name


def weights(folder):
    return {
        f"{file.parent.name}/{name}": tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


# dmd8 is dmd with another guidance
@pytest.mark.parametrize(
    "part", [pytest.param(name, marks=[pytest.mark.slow] * (name == "dmd8")) for name in PARTS]
)
def test_a_part_trains_and_writes_its_weights(part, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_base.read_claims, "__defaults__", (3, 4))  # 800 steps of 64
    monkeypatch.setattr(tiny_evaluators.look, "__defaults__", (3, 4))
    shutil.copytree(ROOT / "models/tiny/weights", tmp_path / "weights")
    place = tmp_path / "weights" / WRITES.get(part, part)
    before = weights(place)
    work, out = tmp_path / "work", tmp_path / "weights"
    cfg = Config(steps=3, batch_size=8, faces=16, trajectories=8, every=1, work=str(work), weights=str(out))
    work.mkdir()
    points = torch.randn(8, 5, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    texts = {"points": points, "ids": torch.ones(8, 40, dtype=torch.long)}  # the teacher's take 20 steps each
    save_file(texts, work / "trajectories-8-0.safetensors")
    PARTS[part](cfg)
    after = weights(place)
    assert before.keys() == after.keys()
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert (work / f"{part}.jsonl").read_text().startswith('{"step": 0')
