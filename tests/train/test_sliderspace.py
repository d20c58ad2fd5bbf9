"""SliderSpace: orthogonal directions, a control each, and their effect measured without words."""

import json

import pytest
import torch

from analysis import transfer
from configs import UserError, merge
from controls import formats
from train import sliderspace

SMALL = [
    "directions=2",
    "trajectories=4",
    "batch_size=2",
    "steps=40",
    "member=tiny/dmd",
    "sample_every=0",
    "sample_seeds=[1]",
    "wandb=disabled",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sliderspace.main(merge(sliderspace.Config, [*SMALL, f"out={tmp_path_factory.mktemp('space')}"]))


def test_each_direction_is_a_control(folder):
    one, two = (formats.load(folder / f"space-{k}.safetensors") for k in (1, 2))
    a, b = (torch.tensor(control.card.recipe["direction"]) for control in (one, two))
    assert a.norm() == pytest.approx(1, abs=1e-3) and abs(a @ b) < 1e-3
    assert one.card.recipe["variance"] > two.card.recipe["variance"] and one.card.kind == "sliderspace"
    assert (folder / "samples/final.png").is_file()


def test_training_turns_x0_towards_the_direction(folder):
    losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.2


def test_transfer_measures_it_without_words(folder, tmp_path):
    words = [
        f"controls=[{folder}/space-1.safetensors]",
        "targets=[dmd,lcm]",
        "prompts=[a person,portrait of a person]",
        "seeds=2",
        "rounds=1",
        "max_prompts=2",
        "baselines=1",
        "scales=[-1,0,1]",
        "references=false",
        "wandb=disabled",
        f"out={tmp_path}",
        f"cache={tmp_path}/cache",
    ]
    page = transfer.main(merge(transfer.Config, words))
    cells = json.loads((page.parent / "results.json").read_text())["cells"]
    assert all(cell["clip_change_percent"]["value"] is None for cell in cells)
    assert cells[0]["positive"] == ""
    assert cells[0]["readings"]["clip"]["slope"]["value"] > 0 and page.is_file()


def test_bad_input(tmp_path):
    with pytest.raises(UserError, match="directions need"):
        sliderspace.main(merge(sliderspace.Config, [*SMALL, "directions=100", f"out={tmp_path}"]))
    with pytest.raises(UserError, match="words"):
        sliderspace.main(merge(sliderspace.Config, [*SMALL, "watch=[tiny/dmd]"]))
