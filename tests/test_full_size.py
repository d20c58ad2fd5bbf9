"""The real networks at full size, from their published configs, without a weight: layer sets, budgets,
published LoRAs' keys.
"""

import json
import re
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from support import hub

from analysis import transfer
from configs import ROOT, UserError, merge
from controls import formats
from controls.formats import layouts, origins
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
    # 28 blocks and 4 that read the text, of 5
    "krea2": {("full", "c3lier"): 160, ("flux-attn", "lierla"): 140},
    # 5 joint blocks of 8, 20 single ones of 2; the larger 8 and 24
    "klein": {("full", "c3lier"): 80, ("flux-attn", "lierla"): 80},
    "klein9": {("full", "c3lier"): 112, ("flux-attn", "lierla"): 112},
    # 60 joint blocks of 8
    "qwen": {("full", "c3lier"): 480, ("flux-attn", "lierla"): 480},
    # 32 blocks of 4
    "qwen21": {("full", "c3lier"): 128, ("flux-attn", "lierla"): 128},
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
    "krea2": {"transformer": 12820, "text_encoder": 4438, "vae": 127},
    "klein": {"transformer": 3876, "text_encoder": 4022, "vae": 84},
    "klein9": {"transformer": 9079, "text_encoder": 8191, "vae": 84},
    "qwen": {"transformer": 20430, "text_encoder": 8292, "vae": 127},
    "qwen21": {"transformer": 7115, "text_encoder": 8767, "vae": 338},
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


def flat(name: str) -> str:
    return f"lora_unet_{name.replace('.', '_')}"


def dotted(name: str) -> str:
    return f"diffusion_model.{name}"


def ours(name: str) -> str:
    return f"transformer.{name}"


def pairs(
    net, names: dict[str, tuple[str, ...]], spell, halves: tuple[str, str], alpha: float | None
) -> dict:
    """A LoRA of rank 1 of some layers, or of several as one, as a tool spells them."""
    found, spots = {}, layouts.named_layers(net)
    for name, layers in names.items():
        found[f"{spell(name)}.{halves[0]}.weight"] = torch.ones(1, spots[layers[0]].weight.shape[1])
        rows = sum(spots[layer].weight.shape[0] for layer in layers)
        found[f"{spell(name)}.{halves[1]}.weight"] = torch.ones(rows, 1)
        found |= {} if alpha is None else {f"{spell(name)}.alpha": torch.tensor(alpha)}
    return found


def diffusers_names(net) -> dict[str, tuple[str, ...]]:
    return {name: (name,) for name in layouts.named_layers(net)}


def own_names(net) -> dict[str, tuple[str, ...]]:
    """Those of the model's own code."""
    return {
        name: layers
        for name, layers in (layouts._krea2(net) or layouts._flux(net)).items()
        if "proc" not in name
    }


AB, DOWN_UP, BLOCKS = ("lora_A", "lora_B"), ("lora_down", "lora_up"), r"transformer_blocks\.\d+\."
MLP = rf"attn\.|{BLOCKS}(img|txt)_mlp\.net\.(0\.proj|2)"
# as trainers and makers write them: family, layers, their names and spelling, halves, alpha, how many
FILES = {
    "Qwen-Image-Lightning": ("qwen", MLP, diffusers_names, str, DOWN_UP, 8.0, 60 * 12),
    "qwen by ai-toolkit": ("qwen", r"attn\.", diffusers_names, dotted, AB, None, 480),
    "qwen by musubi": ("qwen", MLP, diffusers_names, flat, DOWN_UP, 1.0, 60 * 12),
    "qwen21 by musubi": ("qwen21", r"attn\.|img_mlp\.", diffusers_names, flat, DOWN_UP, 1.0, 32 * 7),
    "krea/Krea-2-LoRA": ("krea2", "", diffusers_names, ours, AB, None, 264),
    "krea2 by ai-toolkit": ("krea2", "", own_names, dotted, AB, None, 264),
    "krea2 by musubi": ("krea2", r"attn\.|ff\.", own_names, flat, DOWN_UP, 1.0, 32 * 8),
    "klein by ai-toolkit": ("klein", BLOCKS, own_names, dotted, AB, None, 5 * 12 + 20 * 2),
    "klein by kohya": ("klein", BLOCKS, own_names, flat, DOWN_UP, 1.0, 5 * 12 + 20 * 2),
    "klein by diffusers": ("klein", r"attn\.", diffusers_names, ours, AB, None, 5 * 8 + 20 * 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", FILES)
def test_trainers_files_of_the_newest_families_find_their_places(tmp_path, case):
    """Some of which diffusers' own loaders refuse, or pass over without a word."""
    name, pattern, names, *how, count = FILES[case]
    net = network(name)
    chosen = {layer for layer in layouts.named_layers(net) if re.search(pattern, layer)}
    tensors = pairs(net, {said: layers for said, layers in names(net).items() if set(layers) <= chosen}, *how)
    save_file(tensors, tmp_path / "theirs.safetensors")
    about = Card("lora", "theirs", name, "base", 1, 1.0, "full", "c3lier")
    control = formats.adopt(tmp_path / "theirs.safetensors", net, about)
    assert set(control.layers) == chosen and len(chosen) == count
    assert control.factor() == (how[-1] or 1.0) and name in origins.families(tensors)


@pytest.mark.slow
def test_a_file_of_another_architecture_is_told_which_it_fits(tmp_path):
    flux, file = network("flux"), tmp_path / "mine.safetensors"
    save_file(pairs(flux, diffusers_names(flux), ours, AB, None), file)
    with pytest.raises(UserError, match=r"have no place in this network: .*; it fits flux$"):
        formats.adopt(file, network("klein"), Card("lora", "mine", "klein", "base", 1, 1.0, "full", "c3lier"))
    assert origins.families({"transformer.nowhere.lora_A.weight": torch.ones(1, 2)}) == []


FITS = r"memory at the most: \d+\.\d GB, when .*; it fits in 24.0 GB"
TOO_LARGE = "it does not fit in 24.0 GB; less is needed with memory.offload=true, quantize=nf4"


@pytest.mark.slow
@pytest.mark.parametrize(("word", "says"), [("memory.offload=true", FITS), ("dtype=fp32", TOO_LARGE)])
def test_the_question_of_the_hour(cache, tmp_path, capsys, word, says):
    """Whether one GPU of 24 GB can tell if a LoRA of klein's base lives on its twin: by configs alone."""
    hub.write_configs(cache, "klein")
    net, file = network("klein"), tmp_path / "my_lora.safetensors"
    save_file(pairs(net, diffusers_names(net), ours, AB, None), file)
    asked = ["family=klein", f"controls=[{file}]", "memory.gpu_gb=24", f"out={tmp_path}", word]
    transfer.main(merge(transfer.Config, [*asked, "dry_run=true"]))
    assert re.search(says, capsys.readouterr().out)
    with pytest.raises(UserError, match="memory.gpu_gb=24 is what a dry run plans for: add --dry-run"):
        transfer.main(merge(transfer.Config, asked))
