"""Evaluators of the real families: what transformers' own models and processors say, small and under the real
names.
"""

import sys
from types import SimpleNamespace

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from support import hub
from transformers import (
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from configs import UserError
from models.cards import card
from models.evaluators import EVALUATORS, READERS, Clip, Dino, Siglip, load_evaluators

TEXTS = ["a cat", "a dog"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A Hub cache with a small SigLIP and a small DINOv2 at the revisions that the cards pin."""
    folder, words = tmp_path_factory.mktemp("hub"), hub.t5_words()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
        torch.manual_seed(0)
        shared = {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        text = {**shared, "vocab_size": len(words), "max_position_embeddings": hub.LENGTH}
        place = hub.publish(folder, *card("sdxl").siglip.split("@"))
        SiglipModel(
            SiglipConfig(text_config=text, vision_config={**shared, "image_size": 32, "patch_size": 8})
        ).save_pretrained(place)
        SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(place)
        words.save_pretrained(place)
        place = hub.publish(folder, *card("sdxl").dino.split("@"))
        Dinov2Model(
            Dinov2Config(**{k: v for k, v in shared.items() if k != "intermediate_size"}, image_size=28)
        ).save_pretrained(place)
        BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(
            place
        )
        yield folder


def pictures(side: int = 32) -> tuple[torch.Tensor, list[Image.Image]]:
    """Three pictures, (3, 3, side, side) in [-1, 1], and the same as files have them."""
    bytes_ = torch.randint(
        256, (3, side, side, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
    return bytes_.permute(0, 3, 1, 2).float() / 127.5 - 1, [
        Image.fromarray(picture.numpy()) for picture in bytes_
    ]


def unit(x: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(x.double(), dim=-1).numpy()


@torch.no_grad()
def test_siglip_is_transformers_own(cache):
    repo, revision = card("sdxl").siglip.split("@")
    evaluator, model = Siglip(f"{repo}@{revision}"), SiglipModel.from_pretrained(repo, revision=revision)
    ours, files = pictures()
    processed = SiglipImageProcessor.from_pretrained(repo, revision=revision)(files, return_tensors="pt")
    seen = unit(model.get_image_features(**processed).pooler_output)
    assert np.allclose(evaluator.features(ours), seen, atol=1e-5)
    words = hub.t5_words()(TEXTS, padding="max_length", max_length=hub.LENGTH, return_tensors="pt").input_ids
    read = unit(model.get_text_features(words).pooler_output)
    assert np.allclose(evaluator.texts(TEXTS), read, atol=1e-5)
    assert np.allclose(evaluator.score(seen, *TEXTS), seen @ (read[0] - read[1]), atol=1e-5)


@torch.no_grad()
def test_dino_is_transformers_own(cache):
    repo, revision = card("sdxl").dino.split("@")
    evaluator, model = Dino(f"{repo}@{revision}"), Dinov2Model.from_pretrained(repo, revision=revision)
    ours, files = pictures()
    processed = BitImageProcessor.from_pretrained(repo, revision=revision)(files, return_tensors="pt")
    assert processed.pixel_values.shape[-1] == 28  # cropped
    assert np.allclose(evaluator.features(ours), unit(model(**processed).pooler_output), atol=1e-5)
    with pytest.raises(UserError, match="dino sees pictures but reads no words"):
        evaluator.score(evaluator.features(ours), *TEXTS)
    assert evaluator.rest(evaluator.features(ours), *TEXTS).shape == (3, 32)


def test_larger_pictures_are_resized_as_pil_does_it(cache):
    evaluator = Siglip(card("sdxl").siglip)
    ours, files = pictures(96)
    small = [
        torch.from_numpy(np.array(file.resize((32, 32), Image.BICUBIC))).permute(2, 0, 1) / 255
        for file in files
    ]
    assert (
        evaluator.prepare(ours) * evaluator.std + evaluator.mean - torch.stack(small)
    ).abs().max() < 2 / 255


def test_an_old_config_says_sizes_as_numbers(cache):
    evaluator = Dino(card("sdxl").dino)
    evaluator.pixels |= {"size": 32, "crop_size": 28}
    assert (evaluator.resize_px, evaluator.size_px) == (32, 28)


def test_the_card_and_the_caller_choose(cache):
    family = card("sdxl")
    assert set(READERS) < set(EVALUATORS)
    assert list(load_evaluators(family, names=["dino", "siglip"])) == ["dino", "siglip"]
    assert {name: type(evaluator) for name, evaluator in load_evaluators(card("tiny")).items()}.keys() == {
        "clip",
        "probe",
        "geometry",
    }
    with pytest.raises(UserError, match="family tiny has no evaluator 'dino'; it has clip, probe, geometry"):
        load_evaluators(card("tiny"), names=["dino"])
    with pytest.raises(UserError, match="cannot load the evaluator nobody/nothing: it is not in the cache"):
        Clip("nobody/nothing").features(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(("name", "package"), [("dreamsim", "dreamsim"), ("inception", "torch_fidelity")])
def test_an_extra_that_is_not_installed(monkeypatch, name, package):
    for part in (package, f"{package}.feature_extractor_inceptionv3"):
        monkeypatch.setitem(sys.modules, part, None)
    with pytest.raises(UserError, match=rf"needs {package}: pip install -e '.\[{name}\]'"):
        load_evaluators(card("sdxl"), names=[name])


def test_extras_are_handed_what_they_expect(monkeypatch):
    """DreamSim: [0, 1] at 224 pixels; torch-fidelity: bytes at any size."""
    seen = {}

    class Asked(torch.nn.Module):
        def embed(self, pixels):
            seen["dreamsim"] = pixels
            return pixels.mean((2, 3))

        def forward(self, pixels):
            seen["inception"] = pixels
            return (pixels.float().mean((2, 3)),)

    asked = Asked()
    package = SimpleNamespace(dreamsim=lambda pretrained, device, dreamsim_type: (asked, None))
    monkeypatch.setitem(sys.modules, "dreamsim", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace())
    made = SimpleNamespace(FeatureExtractorInceptionV3=lambda name, features: asked)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", made)
    ours, _ = pictures()
    found = {
        name: evaluator.features(ours)
        for name, evaluator in load_evaluators(card("sdxl"), names=["dreamsim", "inception"]).items()
    }
    assert (
        seen["dreamsim"].shape[-2:] == (224, 224)
        and 0 <= seen["dreamsim"].min()
        and seen["dreamsim"].max() <= 1
    )
    assert seen["inception"].dtype == torch.uint8 and seen["inception"].shape == ours.shape
    assert np.allclose(np.linalg.norm(found["dreamsim"], axis=-1), 1) and found["inception"].shape == (3, 3)


@pytest.mark.parametrize(
    ("name", "says"), [("clip", "clip gives numbers"), ("probe", "the attribute probe gives numbers")]
)
def test_damaged_weights_are_told_from_damaged_pictures(name, says):
    evaluator, pictures = load_evaluators(card("tiny"), names=[name])[name], torch.zeros(2, 3, 64, 64)
    with pytest.raises(UserError, match="the pictures are not finite"):
        evaluator.features(pictures * float("nan"))
    net = evaluator.model if name == "clip" else evaluator.probe
    for weight in net.parameters():
        weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match=f"{says} that are not finite: its weights are damaged"):
        evaluator.features(pictures)
    if name == "clip":
        with pytest.raises(UserError, match="clip gives numbers that are not finite"):
            evaluator.texts(["a person"])
