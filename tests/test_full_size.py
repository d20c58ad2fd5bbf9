"""The real networks at full size, from their published configs, without a weight: layer sets, budgets,
published LoRAs' keys.
"""

import json
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from support import hub

from configs import ROOT, UserError
from controls import formats
from controls.formats import layouts
from controls.layers import targets
from controls.lora import Card
from models import budget, lora_student
from models.architectures import ARCHITECTURES
from models.cards import card
from models.families import Family

CONFIGS = json.loads((ROOT / "models/published.json").read_text())
LAYERS = {  # family: (set, scope) -> layers, counted by hand from blocks x projections; see the comments
    # 70 transformer blocks, two attentions of 4; 17 resnets of 3, 11 shortcuts, 4 samplers = 66
    "sdxl": {
        ("full", "lierla"): 560,
        ("full", "c3lier"): 626,
        ("noxattn", "c3lier"): 346,
        ("xattn-strict", "lierla"): 140,
    },
    # 16 blocks; 22 resnets of 3, 14 shortcuts, 6 samplers = 86
    "sd15": {
        ("full", "lierla"): 128,
        ("full", "c3lier"): 214,
        ("noxattn", "c3lier"): 150,
        ("xattn-strict", "lierla"): 32,
    },
    "sd21": {
        ("full", "lierla"): 128,
        ("full", "c3lier"): 214,
        ("noxattn", "c3lier"): 150,
        ("xattn-strict", "lierla"): 32,
    },
    # 28 blocks, two attentions of 4
    "pixart": {
        ("full", "c3lier"): 224,
        ("noxattn", "c3lier"): 112,
        ("xattn", "c3lier"): 112,
        ("selfattn", "lierla"): 112,
    },
    # 38 joint blocks of 8, the last without the text's output
    "sd3": {("full", "c3lier"): 303, ("noxattn", "c3lier"): 303, ("flux-attn", "lierla"): 303},
    # 19 joint blocks of 8, 38 single ones of 3
    "flux": {("full", "c3lier"): 266, ("noxattn", "c3lier"): 266, ("flux-attn", "lierla"): 266},
    # 30 blocks and 4 refiners of 4
    "zimage": {("full", "c3lier"): 136, ("noxattn", "c3lier"): 136, ("flux-attn", "lierla"): 120},
}
PARAMETERS = {  # millions, as the authors or the files' sizes have it
    "sdxl": {"unet": 2567, "text_encoder": 123, "text_encoder_2": 695, "vae": 84},
    "sd15": {"unet": 860, "text_encoder": 123, "vae": 84},
    "sd21": {"unet": 866, "text_encoder": 340, "vae": 84},
    "pixart": {"transformer": 611, "text_encoder": 4762, "vae": 84},
    "sd3": {
        "transformer": 8057,
        "text_encoder": 124,
        "text_encoder_2": 695,
        "text_encoder_3": 4762,
        "vae": 84,
    },
    "flux": {"transformer": 11901, "text_encoder": 123, "text_encoder_2": 4762, "vae": 84},
    "zimage": {"transformer": 6155, "text_encoder": 4022, "vae": 84},
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def network(name: str):
    """A full-size network on the meta device."""
    its = ARCHITECTURES[card(name).architecture]
    with init_empty_weights():
        return its.network.from_config(CONFIGS[name][its.part])


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_layer_sets_find_the_layers_they_mean(name):
    net = network(name)
    assert {key: len(targets(net, *key)) for key in LAYERS[name]} == LAYERS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETERS)
def test_a_budget_needs_no_weights(cache, name):
    family = hub.write_configs(cache, name)
    found = budget.needs(family, [family.base], torch.bfloat16)
    its = ARCHITECTURES[family.architecture].part
    millions = {need.part if need.part != family.base else its: need.parameters / 1e6 for need in found}
    assert millions == pytest.approx(PARAMETERS[name], rel=0.005)
    assert all(need.download for need in found) and family.repo in budget.table(found)


def test_the_hub_knows_what_there_is_to_download(cache, monkeypatch):
    """Of the variant's files only, safetensors before .bin, one file where the card names one."""
    family = hub.write_configs(cache, "sdxl")
    sizes = {
        "vae/diffusion_pytorch_model.fp16.safetensors": 5,
        "vae/diffusion_pytorch_model.safetensors": 50,
        "unet/diffusion_pytorch_model.fp16.safetensors": 7,
        "unet/diffusion_pytorch_model.fp16.bin": 70,
        "text_encoder/model.fp16-00001-of-00002.safetensors": 1,
        "text_encoder/model.fp16-00002-of-00002.safetensors": 1,
        "dmd2_sdxl_4step_unet_fp16.bin": 3,
        "sdxl_lightning_4step_lora.safetensors": 2,
    }
    files = [SimpleNamespace(rfilename=name, size=size) for name, size in sizes.items()]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(budget.HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=files))
    budget._sizes.cache_clear()
    found = {
        need.part: need for need in budget.needs(family, ["base", "dmd2", "lightning-lora"], torch.bfloat16)
    }
    budget._sizes.cache_clear()
    about = 2 * found["text_encoder_2"].parameters  # of which the list says nothing
    assert {name: need.download for name, need in found.items()} == {
        "vae": 5,
        "text_encoder": 2,
        "text_encoder_2": about,
        "base": 7,
        "dmd2": 3,
        "lightning-lora": 2,
    }


def test_what_fits_is_said_before_anything_is_loaded(cache, monkeypatch):
    family = hub.write_configs(cache, "sd15")
    monkeypatch.setattr(budget, "free", lambda device: 2e9)
    with pytest.raises(
        UserError,
        match=r"sd15/base needs 3.4 GB of memory on cpu in float32, 2.0 are free; dtype=bf16 needs 1.7",
    ):
        Family("sd15", dtype=torch.float32).member("base")
    monkeypatch.setattr(budget, "free", lambda device: 1e9)
    with pytest.raises(UserError, match="needs 1.7 GB .* bfloat16, 1.0 are free; fewer members"):
        Family("sd15", dtype=torch.bfloat16).member("base")
    assert family.repo  # the configs alone are in the cache


# the layers of latent-consistency/lcm-lora-sdxl and -sdv1-5, by the rule of their training script
LCM_LORA = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)


def kohya(net, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """A published student's keys at rank 1, in kohya's layout with these names for the layers."""
    found = {}
    for layer, theirs in names.items():
        rows, columns, *kernel = net.get_submodule(layer).weight.shape
        found[f"lora_unet_{theirs}.lora_down.weight"] = torch.ones(1, columns, *kernel)
        found[f"lora_unet_{theirs}.lora_up.weight"] = torch.ones(rows, 1, *(1 for _ in kernel))
        found[f"lora_unet_{theirs}.alpha"] = torch.tensor(0.5)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layers", "spelling"),
    [("sdxl", 788, "diffusers"), ("sdxl", 788, "sgm"), ("sd15", 278, "diffusers")],
)
def test_the_keys_of_published_students_find_their_places(tmp_path, name, layers, spelling):
    # diffusers' own reader of SGM's names takes input_blocks_10 for input_blocks_1, so that SD 1.5, which has
    # it, is read by its names only
    net = network(name)
    ours = [layer for layer, _ in net.named_modules() if layer.endswith(LCM_LORA)]
    theirs = (
        {ours[0]: name for name, ours in layouts._sgm(net).items()}
        if spelling == "sgm"
        else {layer: layer for layer in ours}
    )
    file = tmp_path / "student.safetensors"
    save_file(kohya(net, {layer: theirs[layer].replace(".", "_") for layer in ours}), file)
    found = lora_student.read(file, ARCHITECTURES[card(name).architecture], net)
    assert set(found.pairs) == set(ours) and len(ours) == layers
    assert all(b.flatten()[0] == 0.5 for _, b in found.pairs.values())  # alpha / rank is in it
    blank = Card("lora", "student", name, "base", 1, 1.0, "full", "c3lier")
    assert {key.rsplit(".lora_", 1)[0] for key in formats.adopt(file, net, blank).tensors} == set(
        ours
    )  # as our own reader has it
