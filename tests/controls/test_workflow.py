"""Workflows for ComfyUI: by the definitions of its nodes, level by level beside our plans, and run by its
own nodes where COMFYUI names a checkout.
"""

import json
import math
import os
from dataclasses import replace

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file
from support import comfyui as theirs
from support import hub
from support.comfyui import FILE, Node
from support.commands import configured, ran, refused

from configs import ROOT, load
from controls import comfyui, convert, formats, workflow
from controls.lora import Card, Control
from models.cards import card
from models.families import Family
from models.loading import skeleton
from models.prompts import Prompts
from models.sampler import finish

checkout = pytest.mark.skipif(not os.environ.get("COMFYUI"), reason="COMFYUI names no checkout of ComfyUI")
FAMILIES = ("sdxl", "sd15", "sd21", "sd3", "flux", "zimage", "klein", "klein9", "krea2", "qwen")
SEED = {"noise_seed": ("INT", 0, 2**64 - 1)}
SIDES = {key: ("INT", 16, 16384) for key in ("width", "height")} | {"batch_size": ("INT", 1, 4096)}
SAMPLERS = ["euler", "euler_ancestral", "lcm"]


def plain(*kinds: str, **inputs: str | list) -> Node:
    """A node that gives these types and takes inputs without bounds."""
    return Node({key: (kind, -math.inf, math.inf) for key, kind in inputs.items()}, list(kinds))


FILES, SAMPLED = (
    [FILE],
    {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"},
)
NODES = {  # of ComfyUI 0.27
    "CheckpointLoaderSimple": plain("MODEL", "CLIP", "VAE", ckpt_name=FILES),
    "UNETLoader": plain("MODEL", unet_name=FILES, weight_dtype=["default", "fp8_e4m3fn"]),
    "LoraLoaderModelOnly": plain("MODEL", model="MODEL", lora_name=FILES, strength_model="FLOAT"),
    "CLIPLoader": plain("CLIP", clip_name=FILES, type=["sd3", "lumina2", "qwen_image", "flux2", "krea2"]),
    "DualCLIPLoader": plain("CLIP", clip_name1=FILES, clip_name2=FILES, type=["sdxl", "sd3", "flux"]),
    "TripleCLIPLoader": plain("CLIP", clip_name1=FILES, clip_name2=FILES, clip_name3=FILES),
    "VAELoader": plain("VAE", vae_name=FILES),
    "CLIPTextEncode": plain("CONDITIONING", text="STRING", clip="CLIP"),
    "ConditioningZeroOut": plain("CONDITIONING", conditioning="CONDITIONING"),
    "FluxGuidance": plain("CONDITIONING", conditioning="CONDITIONING", guidance="FLOAT"),
    "ModelSamplingDiscrete": plain(
        "MODEL", model="MODEL", sampling=["eps", "v_prediction", "lcm", "x0"], zsnr="BOOLEAN"
    ),
    "ManualSigmas": plain("SIGMAS", sigmas="STRING"),
    "KSamplerSelect": plain("SAMPLER", sampler_name=SAMPLERS),
    "RandomNoise": Node(SEED, ["NOISE"]),
    "AddNoise": plain("LATENT", model="MODEL", noise="NOISE", sigmas="SIGMAS", latent_image="LATENT"),
    "LatentMultiply": Node({"samples": ("LATENT", 0, 0), "multiplier": ("FLOAT", -10, 10)}, ["LATENT"]),
    "VAEDecode": plain("IMAGE", samples="LATENT", vae="VAE"),
    "SaveImage": plain(images="IMAGE", filename_prefix="STRING"),
    "EmptyLatentImage": Node(SIDES, ["LATENT"]),
    "EmptySD3LatentImage": Node(SIDES, ["LATENT"]),
    "EmptyFlux2LatentImage": Node(SIDES, ["LATENT"]),
    "EmptyHunyuanLatentVideo": Node({**SIDES, "length": ("INT", 1, 16384)}, ["LATENT"]),
    "SamplerCustom": Node(
        {
            **plain(**SAMPLED, add_noise="BOOLEAN", sampler="SAMPLER", sigmas="SIGMAS").required,
            **SEED,
            "cfg": ("FLOAT", 0, 100),
        },
        ["LATENT", "LATENT"],
    ),
    "KSamplerAdvanced": Node(
        {
            **plain(
                **SAMPLED,
                add_noise=["enable", "disable"],
                sampler_name=SAMPLERS,
                scheduler=["simple", "sgm_uniform"],
                return_with_leftover_noise=["disable", "enable"],
            ).required,
            **SEED,
            "cfg": ("FLOAT", 0, 100),
            "steps": ("INT", 1, 10000),
            "start_at_step": ("INT", 0, 10000),
            "end_at_step": ("INT", 0, 10000),
        },
        ["LATENT"],
    ),
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A Hub cache of full-size configs in place of the user's own."""
    folder = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
        for name in FAMILIES:
            hub.write_configs(folder, name)
        yield folder


@pytest.fixture(scope="module")
def comfy():
    with theirs.checkout() as found:
        yield found


def made(tmp_path, *words: str) -> dict:
    """The workflow that a command writes."""
    path = tmp_path / "w.json"
    ran(configured(workflow, [f"out={path}", *words]))
    return json.loads(path.read_text())


def of(nodes: dict, *kinds: str) -> list[dict]:
    """The inputs of the nodes of some kinds, in order."""
    return [node["inputs"] for node in nodes.values() if node["class_type"] in kinds]


def stages(nodes: dict) -> list[list[float]]:
    """The sigmas of each stage as the workflow states them; those of `simple` are the training's own."""
    found = []
    for its in of(nodes, "KSamplerAdvanced", "SamplerCustom"):
        if "sigmas" in its:
            words = nodes[its["sigmas"][0]]["inputs"]["sigmas"]
            found.append([float(word) for word in words.split(", ")])
        else:
            every = [*simple(its["steps"]), 0.0]
            found.append(every[its["start_at_step"] : its["end_at_step"] + 1])
    return found


def simple(steps: int) -> list[float]:
    """ComfyUI's scheduler `simple` on Stable Diffusion's noise, by its definition: every 1000 / steps-th
    sigma of the 1000, from the last one.
    """
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - betas, 0)
    ratios = ((1 - kept) / kept).sqrt()
    return [float(ratios[-(1 + int(k * 1000 / steps))]) for k in range(steps)]


def test_the_check_itself_sees_what_is_wrong(tmp_path):
    good = made(tmp_path, "plan=lightning:hybrid(1)")
    assert theirs.problems(good, NODES) == []
    changes = {
        "no node Nothing": ("CLIPTextEncode", "class_type", "Nothing"),
        "text is missing": ("CLIPTextEncode", "inputs", {"clip": ["1", 1]}),
        "it takes no more": ("CLIPTextEncode", "inputs", {"clip": ["1", 1], "text": "x", "more": 1}),
        "clip is MODEL, not CLIP": ("CLIPTextEncode", "inputs", {"clip": ["1", 0], "text": "x"}),
        "which there is not": ("CLIPTextEncode", "inputs", {"clip": ["1", 7], "text": "x"}),
        "sampler_name is 'eule', none of": ("KSamplerSelect", "inputs", {"sampler_name": "eule"}),
        "noise_seed is -1, not from 0": ("RandomNoise", "inputs", {"noise_seed": -1}),
        "noise_seed is 1.5, not INT": ("RandomNoise", "inputs", {"noise_seed": 1.5}),
        "noise_seed is True, not INT": ("RandomNoise", "inputs", {"noise_seed": True}),
    }
    for says, (kind, part, value) in changes.items():
        number = next(n for n, node in good.items() if node["class_type"] == kind)
        found = theirs.problems({**good, number: {**good[number], part: value}}, NODES)
        assert any(says in line for line in found), (says, found)
    unsaved = {number: node for number, node in good.items() if node["class_type"] != "SaveImage"}
    assert theirs.problems(unsaved, NODES) == ["nothing is saved"]


# level by level

PLANS = [
    *(f"sdxl {name}" for name in ("turbo", "lightning", "lightning-2step", "lightning-8step", "lcm-lora")),
    *(f"sdxl {name}" for name in ("lightning-lora", "dmd2", "dmd2-lora", "hyper", "hyper-8step")),
    *("sd15 lcm-lora", "sd15 hyper", "sd21 turbo", "sd3 turbo", "flux schnell", "zimage turbo"),
    *("klein distilled", "klein9 distilled", "krea2 turbo", "krea2 turbo-4step-lora"),
    *("qwen lightning", "qwen lightning-8step"),
]
SINGLE = ("sdxl lightning-1step", "sdxl hyper-1step", "sdxl dmd2-1step")
BASES = (
    "sdxl base",
    "sd15 base",
    "sd21 v",
    "sd3 base",
    "flux dev",
    "zimage base",
    "klein base",
    "krea2 base",
)


def ours(name: str, member: str) -> list[float]:
    """A member's levels by its family itself, and where its last update goes."""
    its = Family(name, bare=True).outline(member)
    levels = [*its.levels, its.final]
    return [level.sigma if its.noise_schedule == "flow" else level.ratio for level in levels]


@pytest.mark.parametrize("name", PLANS)
def test_both_stages_of_a_hybrid_have_the_students_levels(tmp_path, name):
    family, member = name.split()
    levels = ours(family, member)
    for k in range(0, min(len(levels), 5)):
        nodes = made(tmp_path, f"family={family}", f"plan={member}:hybrid({k})")
        assert theirs.problems(nodes, NODES) == []
        found = stages(nodes)
        wanted = [part for part in (levels[: k + 1], levels[k:]) if len(part) > 1]
        assert len(found) == len(wanted) and list(map(len, found)) == list(map(len, wanted))
        for mine, sigmas in zip(wanted, found, strict=True):
            assert sigmas == pytest.approx(mine, rel=1e-6, abs=1e-7)
        networks = [
            nodes[its["model"][0]]["inputs"] for its in of(nodes, "KSamplerAdvanced", "SamplerCustom")
        ]
        assert len({json.dumps(inputs) for inputs in networks}) == len(wanted)
        assert all(its["cfg"] == 1 for its in of(nodes, "KSamplerAdvanced", "SamplerCustom"))


@pytest.mark.parametrize("name", [*PLANS, *SINGLE, *BASES])
def test_a_member_alone_is_one_stage_on_its_own_levels(tmp_path, name):
    family, member = name.split()
    nodes = made(tmp_path, f"family={family}", f"plan={member}")
    assert theirs.problems(nodes, NODES) == []
    (sigmas,) = stages(nodes)
    assert sigmas == pytest.approx(ours(family, member), rel=1e-6, abs=1e-7)
    (sampled,) = of(nodes, "KSamplerAdvanced", "SamplerCustom")
    assert sampled["cfg"] == (card(family).members[member].guidance or 1)


def test_lcms_levels_are_those_of_its_lora(tmp_path):
    assert ours("sdxl", "lcm") == ours("sdxl", "lcm-lora") and len(ours("sdxl", "lcm")) == 5


def test_the_papers_hybrid_on_dmd2_is_two_ksamplers(tmp_path):
    nodes = made(tmp_path, "plan=dmd2:hybrid(1)", "seed=7", "prompt=a cat (sleeping)")
    first, second = of(nodes, "KSamplerAdvanced")
    assert not of(nodes, "SamplerCustom")
    assert nodes[first["model"][0]]["inputs"]["ckpt_name"] == "sd_xl_base_1.0.safetensors"
    assert nodes[second["model"][0]]["inputs"]["unet_name"] == "dmd2_sdxl_4step_unet_fp16.bin"
    assert second["latent_image"] == [next(n for n, node in nodes.items() if node["inputs"] is first), 0]
    common = {"steps": 4, "cfg": 1.0, "sampler_name": "lcm", "scheduler": "simple"}
    assert all({key: stage[key] for key in common} == common for stage in (first, second))
    assert (first["add_noise"], first["start_at_step"], first["end_at_step"]) == ("enable", 0, 1)
    assert (second["add_noise"], second["start_at_step"], second["end_at_step"]) == ("disable", 1, 4)
    leftover = [stage["return_with_leftover_noise"] for stage in (first, second)]
    assert leftover == ["enable", "disable"]
    assert first["noise_seed"] == 7 and second["noise_seed"] == 7 + comfyui.APART
    assert of(nodes, "CLIPTextEncode")[0]["text"] == r"a cat \(sleeping\)"


def test_a_schedule_that_is_not_ours_is_not_named(tmp_path):
    """LCM's levels are every 20th training step's; a start from sigma eps, an end at training step 0."""
    for member, extras in {
        "lcm-lora": [],
        "lightning": ["RandomNoise", "AddNoise"],
        "hyper": ["LatentMultiply"],
    }.items():
        nodes = made(tmp_path, f"plan={member}:hybrid(1)")
        assert len(of(nodes, "SamplerCustom")) == 2 and not of(nodes, "KSamplerAdvanced")
        kinds = [node["class_type"] for node in nodes.values()]
        assert [kind for kind in kinds if kind in ("RandomNoise", "AddNoise", "LatentMultiply")] == extras


def test_late_and_skip(tmp_path):
    levels = ours("sdxl", "dmd2")
    late = made(tmp_path, "plan=dmd2:late(1)")
    assert stages(late) == [pytest.approx(levels[:4]), pytest.approx(levels[3:])]
    names = [nodes["unet_name"] for nodes in of(late, "UNETLoader")]
    assert names == ["dmd2_sdxl_4step_unet_fp16.bin"]
    skipped = made(tmp_path, "plan=dmd2:skip(1)")
    assert stages(skipped) == [pytest.approx(levels[1:], rel=1e-6)]
    assert theirs.problems(late, NODES) == theirs.problems(skipped, NODES) == []


def test_what_a_network_predicts_is_said_where_it_is_not_eps(tmp_path):
    assert of(made(tmp_path, "plan=lightning-1step"), "ModelSamplingDiscrete")[0]["sampling"] == "x0"
    nodes = made(tmp_path, "family=sd21", "plan=v")
    assert of(nodes, "ModelSamplingDiscrete")[0]["sampling"] == "v_prediction"
    assert not of(made(tmp_path, "plan=dmd2"), "ModelSamplingDiscrete")


def test_guidance(tmp_path):
    """Classifier-free where the plan has it, away from what the pipeline departs from; embedded in Flux."""
    nodes = made(tmp_path, "plan=base")
    (sampled,) = of(nodes, "SamplerCustom")
    assert sampled["cfg"] == 7 and nodes[sampled["negative"][0]]["class_type"] == "ConditioningZeroOut"
    said = made(tmp_path, "plan=base", "negative=ugly")
    assert [its["text"] for its in of(said, "CLIPTextEncode")][1] == "ugly"
    assert of(made(tmp_path, "family=zimage", "plan=base"), "CLIPTextEncode")[1]["text"] == ""
    assert of(made(tmp_path, "family=qwen", "plan=base"), "CLIPTextEncode")[1]["text"] == " "
    flux = made(tmp_path, "family=flux", "plan=schnell:hybrid(1)")
    first, second = of(flux, "SamplerCustom")
    assert flux[first["positive"][0]]["inputs"]["guidance"] == 3.5
    assert flux[second["positive"][0]]["class_type"] == "CLIPTextEncode"
    words = [f"out={tmp_path / 'w.json'}", "plan=turbo", "negative=ugly"]
    printed = ran(configured(workflow, words))
    assert "note: negative= is not used" in printed and "was trained at 512 px and is run at 1024" in printed
    assert len(of(json.loads((tmp_path / "w.json").read_text()), "CLIPTextEncode")) == 1
    guided = made(tmp_path, "plan=dmd2:hybrid(1,5)")
    assert [its["cfg"] for its in of(guided, "KSamplerAdvanced")] == [5, 1]


def test_a_lora_student_is_a_lora_over_its_base(tmp_path):
    nodes = made(tmp_path, "plan=dmd2-lora:hybrid(1)")
    assert not of(nodes, "UNETLoader") and len(of(nodes, "CheckpointLoaderSimple")) == 1
    (lora,) = of(nodes, "LoraLoaderModelOnly")
    assert lora == {
        "model": ["1", 0],
        "lora_name": "dmd2_sdxl_4step_lora_fp16.safetensors",
        "strength_model": 1.0,
    }
    first, second = of(nodes, "KSamplerAdvanced")
    assert first["model"] == ["1", 0] and nodes[second["model"][0]]["inputs"] is lora
    over = made(tmp_path, "family=krea2", "plan=turbo-4step-lora:hybrid(1)")
    names = [its["unet_name"] for its in of(over, "UNETLoader")]
    assert names == ["krea2_raw_bf16.safetensors", "krea2_turbo_bf16.safetensors"]
    (lora,) = of(over, "LoraLoaderModelOnly")
    assert over[lora["model"][0]]["inputs"]["unet_name"] == "krea2_turbo_bf16.safetensors"


# controls


def control(path, family: str = "sdxl", layout: str = "native", **of_card):
    """A small control's file with a card."""
    q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    q = q if family == "sdxl" else "transformer_blocks.0.attn.to_q"
    said = {"kind": "slider", "name": path.stem, "family": family, "member": "base", **of_card}
    its = Card(**said, rank=2, alpha=1.0, layers="full", scope="attn")
    tensors = {f"{q}.lora_A.weight": torch.ones(2, 4), f"{q}.lora_B.weight": torch.ones(4, 2)}
    {"native": formats.save, "kohya": formats.save_kohya}[layout](Control(its, tensors), path)
    return path


def measured(**scales: float | None) -> dict:
    """What analysis.transfer writes into a header, by target."""
    return {
        "targets": {
            target: {
                "clip": {"scale": {"value": value}, "verdict": "kept" if value else "dead"},
                "siglip": {},
            }
            for target, value in scales.items()
        }
    }


def test_controls_are_loaded_on_every_network_that_is_run(tmp_path):
    a, b = control(tmp_path / "a.safetensors"), control(tmp_path / "b.safetensors", layout="kohya")
    said = f"controls={{{a}: 0.8, {b}: -2}}"
    nodes = made(tmp_path, "plan=dmd2:hybrid(1)", said)
    loras = [(its["lora_name"], its["strength_model"]) for its in of(nodes, "LoraLoaderModelOnly")]
    assert loras == [("a-kohya.safetensors", 0.8), ("b.safetensors", -2.0)] * 2
    for its in of(nodes, "KSamplerAdvanced"):
        second = nodes[its["model"][0]]["inputs"]
        first = nodes[second["model"][0]]["inputs"]
        assert (first["lora_name"], second["lora_name"]) == ("a-kohya.safetensors", "b.safetensors")
    assert theirs.problems(nodes, NODES) == []
    only = made(tmp_path, "plan=dmd2", said)
    assert len(of(only, "LoraLoaderModelOnly")) == 2


def test_the_file_that_comfyui_needs_is_named_and_made(tmp_path):
    """Of a U-Net's control kohya's layout, which the printed command makes; of a transformer's the same."""
    path = control(tmp_path / "a.safetensors")
    printed = ran(configured(workflow, [f"out={tmp_path / 'w.json'}", f"controls={{{path}: 1}}"]))
    command = f"python -m controls.convert {path} a-kohya.safetensors format=kohya"
    assert f"put a-kohya.safetensors into models/loras, made by: {command}" in printed
    assert "put sd_xl_base_1.0.safetensors (stabilityai/stable-diffusion-xl-base-1.0" in printed
    assert "into models/diffusion_models" in printed and "dmd2 at sigma 4.08" in printed
    convert.main(path, tmp_path / "a-kohya.safetensors", load(convert.Config, ["format=kohya"]))
    assert any(key.endswith(".alpha") for key in formats.read(tmp_path / "a-kohya.safetensors")[0])
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    halves = {f"{layer}.lora_A.weight": torch.ones(2, 4), f"{layer}.lora_B.weight": torch.ones(4, 2)}
    save_file(halves, tmp_path / "theirs.safetensors")  # of another tool, likewise in diffusers' layout
    words = [f"out={tmp_path / 'w.json'}", f"controls={{{tmp_path / 'theirs.safetensors'}: 1}}"]
    assert "theirs-kohya.safetensors format=kohya member=sdxl/base" in ran(configured(workflow, words))
    flux = control(tmp_path / "f.safetensors", "flux", member="dev")
    nodes = made(tmp_path, "family=flux", "plan=schnell", f"controls={{{flux}: 1}}")
    assert of(nodes, "LoraLoaderModelOnly")[0]["lora_name"] == "f.safetensors"


def test_matched_scales_are_the_headers(tmp_path):
    transfer = measured(**{"sdxl/dmd2": 1.3, "sdxl/turbo": None, "sdxl/dmd2:hybrid(2)": 1.1})
    path = control(tmp_path / "a.safetensors", transfer=transfer)

    def strengths(plan: str) -> list[float]:
        nodes = made(tmp_path, f"plan={plan}", f"controls={{{path}: matched}}")
        return [its["strength_model"] for its in of(nodes, "LoraLoaderModelOnly") if "a-" in its["lora_name"]]

    assert strengths("dmd2") == [1.3]
    assert strengths("base") == [1.0]  # where it was trained
    assert strengths("dmd2:hybrid(1)") == [1.0, 1.3]
    assert strengths("dmd2:hybrid(2)") == [1.1, 1.1]  # measured on the plan itself
    words = [f"controls={{{path}: matched}}", f"out={tmp_path / 'x.json'}"]
    refused(configured(workflow, ["plan=turbo", *words]), "no matched scale on sdxl/turbo", "dead")
    refused(configured(workflow, ["plan=hyper", *words]), "does not say its scale on sdxl/hyper")
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, tmp_path / "bare.safetensors")
    bare = f"controls={{{tmp_path / 'bare.safetensors'}: matched}}"
    refused(configured(workflow, ["plan=base", bare]), "does not say its scale on sdxl/base")
    assert not (tmp_path / "x.json").exists()


def test_names_of_files_can_be_others(tmp_path):
    words = ["family=flux", "plan=schnell:hybrid(1)", "vae=v.sft", "clip=[l.sft,t5.sft]"]
    nodes = made(tmp_path, *words, "files={dev: d.gguf, schnell: sub/s.sft}")
    assert [its["unet_name"] for its in of(nodes, "UNETLoader")] == ["d.gguf", "sub/s.sft"]
    (clip,), (vae,) = of(nodes, "DualCLIPLoader"), of(nodes, "VAELoader")
    assert (clip["clip_name1"], clip["clip_name2"], vae["vae_name"]) == ("l.sft", "t5.sft", "v.sft")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["plan=dmd3"], "no member 'dmd3'"),
        (["plan="], "no member ''"),
        (["plan=hybrid(1)"], "no member 'hybrid(1)'"),
        (["plan=dmd2:delta(0.8)"], "MEMBER:hybrid(k), MEMBER:late(k), MEMBER:skip(k)"),
        (["plan=dmd2:"], "cannot be written for ComfyUI"),
        (["plan=dmd2:hybrid(5)"], "k must be 0 … 4"),
        (["plan=dmd2:hybrid(x)"], "it is written hybrid(k"),
        (["plan=dmd2:skip(4)"], "leaves nothing"),
        (["plan=dmd2:hybrid(1,1,0.5)"], "no sampler of ComfyUI has eta 0.5"),
        (["plan=lcm"], "lcm-lora is told none"),
        (["family=nothing"], "no family"),
        (["family=tiny", "plan=dmd"], "no one file is known that holds network, text encoders and VAE"),
        (["family=qwen21", "plan=base"], "of its architecture, qwen21"),
        (["out=w.txt"], "does not end in .json"),
        (["out=."], "it is a folder"),
        (["seed=-1"], "seed must be at least 0"),
        (["controls={nowhere.safetensors: 1}"], "nowhere.safetensors"),
        (["controls={controls/tiny/smile.safetensors: 1}"], "was trained on tiny/base"),
        (["files={turbo: x}"], "loads no 'turbo'; it loads base, dmd2"),
        (["files={dmd2: [1]}"], "dmd2 has no file's name"),
        (["files={dmd2: }"], "dmd2 has no file's name"),
        (["clip=[a]"], "sdxl takes 0"),
        (["vae=a"], "takes none"),
        (["typo=1"], "unknown key 'typo'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(ROOT)
    out = [] if any(word.startswith("out=") for word in words) else [f"out={tmp_path / 'w.json'}"]
    refused(configured(workflow, [*out, *words]), says)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scale", ["much", "nan", "inf", "101", "", "[1]", "null", "{a: 1}"])
def test_a_scale_that_is_none_is_one_line(tmp_path, scale):
    path = control(tmp_path / "a.safetensors")
    words = [f"out={tmp_path / 'w.json'}", f"controls={{{path}: {scale}}}"]
    refused(configured(workflow, words))


def test_two_controls_of_one_name_are_refused(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        control(tmp_path / folder / "a.safetensors")
    said = f"controls={{{tmp_path}/one/a.safetensors: 1, {tmp_path}/two/a.safetensors: 1}}"
    refused(configured(workflow, [f"out={tmp_path / 'w.json'}", said]), "call one otherwise")


# a checkout's own definitions, levels and samplers


@checkout
@pytest.mark.parametrize("name", [*PLANS, *SINGLE, *BASES])
def test_comfyuis_own_definitions_take_every_workflow(tmp_path, comfy, name):
    nodes, (family, member) = theirs.definitions(comfy), name.split()
    plans = [member, *([f"{member}:hybrid(1)", f"{member}:skip(1)"] if name in PLANS else [])]
    for plan in plans:
        written = made(tmp_path, f"family={family}", f"plan={plan}")
        assert theirs.problems(written, nodes) == []


@checkout
def test_the_tests_own_definitions_are_comfyuis(comfy):
    """What the table here says of a node is what the checkout says."""
    real = theirs.definitions(comfy)
    for name, node in NODES.items():
        assert node.required.keys() == real[name].required.keys(), name
        assert node.gives == real[name].gives[: len(node.gives)], name
        for key, (kind, least, most) in node.required.items():
            its, low, high = real[name].required[key]
            assert set(kind) <= set(its) if isinstance(kind, list) else kind == its, (name, key)
            if kind in ("INT", "FLOAT") and math.isfinite(least):
                assert (least, most) == (low, high), (name, key)


KINDS = {  # family: ComfyUI's class of it, and how its noise is
    "sdxl": ("SDXL", "EPS"),
    "sd3": ("SD3", "FLOW"),
    "flux": ("Flux", "FLUX"),
    "zimage": ("ZImage", "FLOW"),
    "klein": ("Flux2", "FLUX"),
    "krea2": ("Krea2", "FLOW"),
    "qwen": ("QwenImage", "FLOW"),
}
CHANNELS = {"sdxl": 4, "klein": 128}
RUN = [
    *(f"sdxl lightning:hybrid({k})" for k in range(5)),
    *(f"sdxl dmd2:hybrid({k})" for k in range(5)),
    *("sdxl lcm-lora:hybrid(2)", "sdxl turbo:hybrid(1)", "sdxl turbo", "sdxl hyper:hybrid(1)", "sdxl base"),
    *("sdxl dmd2:skip(1)", "sdxl lightning:skip(2)", "sdxl dmd2:late(1)", "sdxl turbo:late(2)"),
    *("sdxl lightning-1step", "sdxl hyper-1step", "sdxl dmd2-1step", "sdxl dmd2:hybrid(1,5)"),
    *("sd3 base", "sd3 turbo:hybrid(1)", "sd3 turbo:skip(1)", "flux schnell:hybrid(1)", "flux schnell"),
    *("zimage base", "zimage turbo:hybrid(2)", "klein distilled:hybrid(1)", "klein base"),
    *("krea2 turbo:hybrid(3)", "krea2 turbo-4step-lora:hybrid(1)", "krea2 turbo:skip(2)"),
    *("qwen lightning:hybrid(1)", "qwen lightning-8step:skip(1)"),
]


@checkout
@pytest.mark.parametrize("name", RUN)
def test_comfyuis_own_nodes_make_our_latents(tmp_path, comfy, name):
    """The whole workflow by ComfyUI's nodes, samplers and noise, on toys in place of networks and encoders,
    beside our sampler on the same toys and the same noise; a control at half strength on each.
    """
    (name, text), size = name.split(), 8
    family = Family(name, bare=True)
    plan, its = workflow.plan_of(family, text), family.card
    path = control(tmp_path / "a.safetensors", name, member=its.base)
    nodes = made(tmp_path, f"family={name}", f"plan={text}", "prompt=four", f"controls={{{path}: 0.5}}")
    held = {own: its.holder(own) for own in its.members}
    weights = {own: 0.1 + 0.2 * k for k, own in enumerate(dict.fromkeys(held.values()))}
    files = {workflow.file_of(its, own).name: weight for own, weight in weights.items()}
    patchers = {file: theirs.patcher(comfy, *KINDS[name], weight) for file, weight in files.items()}
    found = theirs.run(comfy, nodes, patchers, size)

    hour = next(iter(patchers.values())).model.diffusion_model.hour

    def toyed(stage):
        own = comfyui.own(stage.member)
        lora = its.members[own].lora_scale if its.members[own].lora else 0.0
        weight = theirs.weight_with(theirs.weight_with(weights[held[own]], lora), 0.5)
        denoiser = replace(stage.member.denoiser, net=theirs.Toy(weight, hour), call=theirs.call_toy)
        return replace(stage, member=replace(stage.member, denoiser=denoiser))

    plan = replace(plan, stages=tuple(map(toyed, plan.stages)))
    noise = theirs.noise_of(nodes, plan, (CHANNELS.get(name, 16), size, size))
    assert len({row.sum().item() for row in noise[0]}) == plan.steps + 1  # no noise is drawn twice
    prompts = Prompts(torch.full((1, 1, 4), 0.4), negative=Prompts(torch.zeros(1, 1, 4)))
    with torch.no_grad():
        wanted = finish(plan, noise, prompts)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@checkout
def test_simple_is_comfyuis(comfy):
    model = theirs.patcher(comfy, "SDXL", "EPS", 0.0).model
    for steps in (1, 2, 4, 8, 50):
        found = comfy.samplers.calculate_sigmas(model.model_sampling, "simple", steps).tolist()
        assert found == pytest.approx([*simple(steps), 0.0], rel=1e-5)


UNET = {  # SDXL's, as ComfyUI finds it
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
}
TRANSFORMERS = {  # what ComfyUI's table of a family's layers in diffusers is called, and is made of
    "sd3": ("mmdit_to_diffusers", {"depth": 38, "num_blocks": 38}),
    "flux": ("flux_to_diffusers", {"depth": 19, "depth_single_blocks": 38, "hidden_size": 3072}),
    "klein": ("flux_to_diffusers", {"depth": 5, "depth_single_blocks": 20, "hidden_size": 3072}),
    "zimage": ("z_image_to_diffusers", {"n_layers": 30, "dim": 3840, "n_refiner_layers": 2}),
    "krea2": ("krea2_to_diffusers", {"layers": 28}),
}


def attention(name: str) -> list[str]:
    """The linear layers of the attention of a family's whole network."""
    family = card(name)
    modules = skeleton(family, family.base).named_modules()
    return [layer for layer, part in modules if isinstance(part, torch.nn.Linear) and "att" in layer]


@checkout
def test_comfyui_knows_every_layer_of_a_kohya_file_and_not_of_diffusers(comfy):
    """Why the file of a U-Net's control is converted: it would be loaded without its attention."""
    layers, toy = attention("sdxl"), theirs.patcher(comfy, "SDXL", "EPS", 0.0).model
    toy.model_config.unet_config = UNET
    names = comfy.lora.model_lora_keys_unet(toy, {})
    assert len(layers) > 500 and all(f"lora_unet_{layer.replace('.', '_')}" in names for layer in layers)
    lost = [layer for layer in layers if f"unet.{layer}" not in names]
    assert len(lost) > 500 and all(".to_" in layer for layer in lost)


@checkout
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_comfyui_knows_every_layer_of_a_transformers_file(comfy, name):
    table, config = TRANSFORMERS[name]
    known, layers = getattr(comfy.utils, table)(config, output_prefix=""), attention(name)
    assert len(layers) > 50 and not [layer for layer in layers if f"{layer}.weight" not in known]


@checkout
@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_a_control_is_as_strong_in_comfyui(tmp_path, comfy, family):
    """What ComfyUI adds to a weight by the file that it is told to load, beside scale alpha / rank B A."""
    path = control(tmp_path / "a.safetensors", family)
    its = formats.load(path)
    (layer,) = its.layers
    formats.save_kohya(its, tmp_path / "a-kohya.safetensors")
    named = workflow.lora_file(str(path), Family(family, bare=True)).name
    tensors = formats.read(tmp_path / named)[0]
    name = f"lora_unet_{layer.replace('.', '_')}" if family == "sdxl" else f"transformer.{layer}"
    (patch,) = comfy.lora.load_lora(tensors, {name: "layer"}).values()
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    found = comfy.lora.calculate_weight([(0.8, patch, 1.0, None, None)], weight.clone(), "layer")
    a, b = its.pair(layer)
    torch.testing.assert_close(found, weight + its.factor(0.8) * b @ a)
