"""The model card of a measured control, and the same numbers in its file's header."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.synthetic import TARGETS, TRACKED
from support.synthetic import results as fake_record

from analysis import model_cards
from analysis.pages import words
from configs import ROOT, UserError
from controls import formats, info, merge

SMILE = ROOT / "controls/tiny/smile.safetensors"


@pytest.fixture(scope="module")
def results() -> dict:
    record = fake_record(TRACKED)
    return {**record, "cells": list(map(words.led, record["cells"]))}


def header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def same(one: Path, other: Path) -> bool:
    """The same tensors bit for bit, types included."""
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_a_model_card_per_control(tmp_path, results):
    paths = model_cards.write(results, tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        f"cards/{name}.md" for name in TRACKED
    ]
    for path, name in zip(paths, TRACKED, strict=True):
        card = ModelCard(path.read_text())  # Hugging Face's own reader
        assert (
            card.data.library_name == "diffusers"
            and "lora" in card.data.tags
            and card.data.get("base_model") is None
        )
        for cell in (c for c in results["cells"] if c["control"] == name and not c["reference"]):
            (row,) = [line for line in card.text.splitlines() if line.startswith(f"| `{cell['target']}`")]
            for reading in words.readings(cell).values():
                assert f"{words.ranged(reading['retention'])} {reading['verdict']}" in row
            if cell["verdict"] == "undefined":
                assert "| none |" in row
            elif cell["matched_scale"]["value"] is not None:
                assert f"| {words.ranged(cell['matched_scale'])} |" in row
            else:
                assert f"none up to 2; at {cell['matched_scale']['reach']['scale']:.2g} it has" in row
        assert (
            "base:few(4)" not in card.text and results["command"] in card.text and "torch 2.13" in card.text
        )
        assert "12 prompts × 4 seeds" in card.text and "None" not in card.text


def test_the_front_matter_names_a_base_on_the_hub(results):
    cell = {**results["cells"][0], "kind": "lora", "source": "sdxl/turbo"}
    data = ModelCard(f"---\n{model_cards.front({**results, 'config': {'family': 'sdxl'}}, cell)}---\n").data
    assert data.base_model == "stabilityai/sdxl-turbo" and "concept-slider" not in data.tags


def test_numbers_go_into_the_header_and_nothing_else_changes(tmp_path, results):
    path = tmp_path / "smile.safetensors"
    shutil.copy(SMILE, path)
    model_cards.into_header(results, path)
    assert same(path, SMILE)
    before, after = header(SMILE), header(path)
    old, new = json.loads(before.pop("card")), json.loads(after.pop("card"))
    assert after == before and {**new, "transfer": {}} == {**old, "transfer": {}}
    found = formats.load(path).card.transfer
    assert found == model_cards.numbers(results, "smile") and set(found["targets"]) == {
        f"tiny/{t}" for t in TARGETS if ":" not in t
    }
    for cell in results["cells"][:2]:
        assert found["targets"][cell["target"]]["clip"] == {
            "scale": cell["matched_scale"],
            "retention": cell["retention"],
            "verdict": cell["verdict"],
        }
    model_cards.into_header({**results, "command": "again"}, path)
    assert formats.load(path).card.transfer["command"] == "again" and same(path, SMILE)


def test_other_layouts_and_types_keep_theirs(tmp_path, results):
    formats.save_kohya(formats.load(SMILE), tmp_path / "kohya.safetensors")
    half = {key: value.bfloat16() for key, value in load_file(SMILE).items()}
    save_file(half, tmp_path / "half.safetensors", {**header(SMILE), "modelspec.title": "theirs"})
    for name in ("kohya", "half"):
        path, copy = tmp_path / f"{name}.safetensors", tmp_path / "before.safetensors"
        shutil.copy(path, copy)
        model_cards.into_header(results, path)
        assert same(path, copy) and {**header(path), "card": ""} == {**header(copy), "card": ""}
        assert "tiny/dmd" in formats.card_of(path, header(path)).transfer["targets"]


def test_diffusers_loads_it_as_before(tmp_path, results):
    path = tmp_path / "smile.safetensors"
    shutil.copy(SMILE, path)
    model_cards.into_header(results, path)
    pipe = DiffusionPipeline.from_pretrained(ROOT / "models/tiny/weights/base")
    pipe.load_lora_weights(path, adapter_name="smile")
    control = formats.load(SMILE)
    loaded = get_peft_model_state_dict(pipe.unet, adapter_name="smile")
    assert loaded.keys() == control.tensors.keys() and all(
        torch.equal(loaded[key], control.tensors[key]) for key in loaded
    )
    strengths = {
        module.scaling["smile"] for module in pipe.unet.modules() if "smile" in getattr(module, "scaling", {})
    }
    assert strengths == {control.card.alpha / control.card.rank}


def test_what_cannot_take_the_numbers_is_one_line(tmp_path, results):
    save_file(
        {"lora_unet_conv_in.lora_down.weight": torch.zeros(2, 4, 3, 3)},
        tmp_path / "kohya.safetensors",
        {"ss_network_dim": "2"},
    )
    torch.save({"a": torch.zeros(1)}, tmp_path / "old.pt")
    shutil.copy(ROOT / "controls/tiny/eyes.safetensors", tmp_path / "eyes.safetensors")
    for name, says in {
        "kohya.safetensors": "no card.*controls.convert",
        "old.pt": "no card",
        "missing.safetensors": "no control file",
        "eyes.safetensors": "is eyes, which this run did not measure.*smile, age",
    }.items():
        before = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else None
        with pytest.raises(UserError, match=says) as error:
            model_cards.into_header(results, tmp_path / name)
        assert "\n" not in str(error.value) and (before is None or (tmp_path / name).read_bytes() == before)


def test_info_shows_them_and_a_merged_control_does_not_inherit_them(tmp_path, results):
    path = tmp_path / "smile.safetensors"
    shutil.copy(SMILE, path)
    assert "measured by" not in info.describe(path)
    model_cards.into_header(results, path)
    said, cell = info.describe(path), results["cells"][1]
    assert (
        f"scale {info.ranged(cell['matched_scale'])}, retention {info.ranged(cell['retention'])}, "
        f"{cell['verdict']}" in said
    )
    assert "measured by    python -m analysis.transfer" in said
    merged, _, _ = merge.merge([formats.load(path), formats.load(SMILE)], [1.0, 1.0], 4, "both")
    assert merged.card.transfer == {}
