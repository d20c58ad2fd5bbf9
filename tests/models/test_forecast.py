"""Forecasts of memory are what torch allocates, and name what is held together."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file
from support import hub
from support.allocator import allocated
from support.network import network, trained

from analysis.images.cache import Job, in_memory, in_turn
from configs import merge
from controls.lora import fusing
from models import budget, forecast
from models.architectures import ARCHITECTURES, blank
from models.cards import card
from models.families import Family, Memory
from train import dry_run, slider
from train.checkpoint import store
from train.run import check

CPU = torch.device("cpu")
MB = 2**20


@pytest.fixture(scope="module")
def tiny():
    return card("tiny")


@torch.no_grad()
def test_activations_of_an_evaluation_are_those_that_torch_allocates(tiny, tmp_path):
    net, its, rows = Family("tiny").member("base").denoiser.net, ARCHITECTURES["sdxl"], 6
    x, told = torch.zeros(rows, 4, 16, 16), blank(its, net, rows)
    real = allocated(lambda: its.call(net, x, 500.0, told, None), tmp_path)
    (said,) = forecast.evaluating(tiny, {"base": rows}, torch.float32).values()
    assert said == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("learning", [False, True])
def test_decoding_is_what_torch_allocates(tmp_path, learning):
    vae = hub.vae(4).requires_grad_(False)
    latents = torch.zeros(1, 4, 16, 16, requires_grad=learning)

    def decoded():
        with torch.set_grad_enabled(learning):
            out = vae.decode(latents).sample.float().clamp(-1, 1)
            return out.sum().backward() if learning else out

    said = forecast._decoding("AutoencoderKL", json.dumps(dict(vae.config)), (4, 16, 16), False, learning)
    assert said == pytest.approx(
        allocated(decoded, tmp_path), rel=0.2
    )  # a CPU's convolution copies what it is given


def test_a_controls_sums_are_those_it_holds():
    net, smile = network(), trained(network(), "smile", 1, layers="full")
    before = {weight.data_ptr() for weight in net.parameters()}
    with fusing(net, smile, 1.0)():
        sums = [weight for weight in net.parameters() if weight.data_ptr() not in before]
        held = sum(weight.nbytes for weight in sums)
    assert forecast.total(forecast.sums(smile.tensors, torch.float32)) == held
    assert (
        forecast.total(forecast.sums(smile.tensors, torch.bfloat16, 2)) == held
    )  # of two networks, half as large


def test_networks_are_held_once_and_let_go_when_no_later_job_needs_them(tiny):
    lora = replace(tiny.members["dmd"], lora="dmd.safetensors")
    family = replace(tiny, members={**tiny.members, "lora": lora})
    jobs = in_turn([Job("lcm"), Job("dmd:hybrid(1)"), Job("base"), Job("lora"), Job("dmd")], family)
    seen = [(sorted(held), sorted(asked)) for held, asked in in_memory(jobs, family)]
    assert seen == [
        (["base"], ["base"]),
        (["base", "lora"], ["base", "lora"]),
        (["base", "dmd", "lora"], ["base", "dmd"]),
        (["dmd"], ["dmd"]),
        (["lcm"], ["lcm"]),
    ]


def test_a_lora_student_is_its_delta_beside_its_base(tiny, tmp_path, monkeypatch):
    save_file({"a": torch.zeros(MB, dtype=torch.float16)}, tmp_path / "student.safetensors")
    lora = replace(tiny.members["dmd"], lora=str(tmp_path / "student.safetensors"))
    family = replace(tiny, members={**tiny.members, "lora": lora})
    held = forecast.networks(family, ["lora", "base"], torch.float32)
    assert set(held) == {"base", "lora"} and held["lora"] == pytest.approx(
        4 * MB, rel=0.01
    )  # fp16 on disk, fp32 in memory
    (delta,) = [need for need in budget.needs(family, ["lora"], torch.float32) if need.part == "lora"]
    assert delta.download == 0 and delta.memory == held["lora"]


def test_moments_of_a_transfer_name_what_is_held(tiny):
    family = Family("tiny", dtype=torch.float32, bare=True)
    smile = trained(network(), "smile", 1).tensors
    moments = forecast.drawing(
        family, [({"base", "dmd"}, {"dmd"})], 8, [smile], ["clip", "probe"], apart=True
    )
    encoding, drawing, decoding, looking = moments
    assert {"text encoders", "VAE", "probe", "the program"} == set(
        encoding.held
    )  # a CPU maps clip from its file
    assert set(forecast.held_evaluators(tiny, ["clip", "probe"], torch.device("cuda"))) == {"clip", "probe"}
    assert {"base", "dmd", "weights with the control", "activations of 8 latents"} <= set(drawing.held)
    assert "text encoders" not in drawing.held
    assert "weights with the control" not in decoding.held and "decoding of 8 at 64 px" in decoding.held
    assert "evaluators' look at 8" in looking.held
    said = forecast.said(lambda: moments, family)
    assert (
        said.startswith("memory at the most: ") and max(moments, key=lambda moment: moment.total).when in said
    )
    assert re.search(r"; it fits in \d+\.\d GB$", said)
    family.memory = Memory(gpu_gb=0.001)
    assert "it does not fit in 0.0 GB; less is needed with quantize=nf4" in forecast.said(
        lambda: moments, family
    )


def test_what_takes_turns_is_not_held_together(tiny):
    family = SimpleNamespace(**vars(Family("tiny", dtype=torch.float32, bare=True)))
    family.device, family.memory = torch.device("cuda"), Memory(offload=True)
    encoding, drawing, *looks = forecast.drawing(family, [({"base", "dmd"}, {"base", "dmd"})], 8, [], [])
    assert (
        set(encoding.held) == {"text encoders"}
        and "VAE" not in drawing.held
        and len({"base", "dmd"} & set(drawing.held)) == 1
    )
    assert all("base" not in look.held and "VAE" in look.held for look in looks)
    control = {"layer.lora_A.weight": torch.zeros(2, 8), "layer.lora_B.weight": torch.zeros(8, 2)}
    _, drawing, *_ = forecast.drawing(family, [({"base"}, {"base"})], 8, [control], [])
    assert drawing.held["the control"] == 2 * 2 * 8 * 4  # its sums are in the weights' place
    family.memory = Memory()
    _, drawing, *_ = forecast.drawing(family, [({"base"}, {"base"})], 8, [control], [])
    assert drawing.held["weights with the control"] == 8 * 8 * 4


def test_a_plan_counts_what_a_resumed_run_still_does(tmp_path, capsys):
    words = ["steps=8", "batch_size=1", "trajectories=2", f"out={tmp_path}", "dry_run=true"]
    slider.main(merge(slider.Config, words))
    assert "smile on tiny/base: 8 steps of 1 latents\n" in capsys.readouterr().out
    (tmp_path / "smile").mkdir()
    store(tmp_path / "smile/state.pt", {}, 6)
    slider.main(merge(slider.Config, words))
    said = capsys.readouterr().out
    assert (
        "smile on tiny/base: 2 steps of 1 latents; 6 are done, what comes before the first is done again\n"
        in said
    )
    lessons = 106  # 2 runs of 10 guided steps, 3 lessons of each, 2 steps of 3
    strip = 3 * 5 * 20  # seeds, scales, two evaluations in each of ten steps
    assert f"network evaluations: {lessons + strip} of base" in said
    slider.main(merge(slider.Config, [*words, "overwrite=true"]))
    assert ": 8 steps of 1 latents\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "when"),
    [
        ([], "in a step"),
        (["watch=[tiny/dmd]", "watch_prompts=12"], "when dmd is watched"),
        (["sample_seeds=[1,2,3,4,5,6]", "batch_size=1"], "strip"),
    ],
)
def test_moments_of_training(words, when):
    cfg, family = merge(slider.Config, words), Family("tiny", dtype=torch.float32, bare=True)
    its = slider.Fast.cost(cfg, family.member("base"))
    smile = trained(network(), "smile", 1).tensors
    moments = dry_run.moments(cfg, family, its, 4e7 if not words else 1e6, smile)
    assert (
        when
        in max(
            (moment for moment in moments if "before" not in moment.when), key=lambda moment: moment.total
        ).when
    )
    encoding, *rest = moments
    assert encoding.when == "when prompts are encoded" and not {"what is trained on", "base", "dmd"} & set(
        encoding.held
    )
    assert all("what is trained on" in moment.held and "text encoders" not in moment.held for moment in rest)
    alike = merge(
        slider.Config, ["watch=[tiny/base]"]
    )  # the network that is trained: the control is at its strength, not in its weights
    watched = [
        moment for moment in dry_run.moments(alike, family, its, 0.0, smile) if "watched" in moment.when
    ]
    assert watched and all("weights with the control" not in moment.held for moment in watched)


def test_a_packed_network_is_whole_once_on_a_cpu():
    pytest.importorskip("bitsandbytes")
    cfg, family = merge(slider.Config, ["quantize=nf4"]), Family("tiny", dtype=torch.float32, bare=True)
    moments = dry_run.moments(cfg, family, slider.Fast.cost(cfg, family.member("base")), 0.0, {})
    packing = next(moment for moment in moments if moment.when == "when the network is packed")
    assert (
        packing.held["base"]
        > 1.5 * next(moment for moment in moments if moment.when == "in a step").held["base"]
    )


@pytest.mark.parametrize(
    ("cached", "variant", "there"),
    [
        ("diffusion_pytorch_model.safetensors", "fp16", False),
        ("diffusion_pytorch_model.fp16.safetensors", "fp16", True),
        ("diffusion_pytorch_model.fp16.safetensors", None, False),
        ("diffusion_pytorch_model.safetensors", None, True),
        ("diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "fp16", True),
        ("config.json", None, False),
    ],
)
def test_only_the_variant_that_is_used_counts_as_downloaded(tmp_path, monkeypatch, cached, variant, there):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--a--b/snapshots" / ("0" * 40)
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / cached).write_bytes(b"weights")
    assert budget._download("a/b", "0" * 40, "unet", variant, 100) == (0 if there else 200)
    assert budget._download("a/b", "1" * 40, "unet", variant, 100) == 200  # another revision


def test_evaluators_are_loaded_and_downloaded_too(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    family = hub.write_configs(tmp_path, "sdxl")
    found = {
        name: budget.evaluator_need(family, name)
        for name in ("clip", "siglip", "dino", "dreamsim", "inception")
    }
    assert [round(need.parameters / 1e6) for need in found.values()] == [428, 203, 87, 258, 24]
    assert all(need.download and need.memory == 4 * need.parameters for need in found.values())
    text = budget.forecast(family, {"base": 1.0}, torch.bfloat16, CPU, ["clip"])
    assert any(line.startswith("clip") and "1.7" in line for line in text.splitlines())


def test_an_unknown_config_is_said_and_stops_no_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    family = Family("sdxl", bare=True)
    assert forecast.said(lambda: forecast.drawing(family, [], 1, [], []), family).startswith(
        "memory at the most: unknown (cannot load "
    )


@pytest.mark.parametrize(
    ("words", "batch_size"),
    [([], 8), (["member=sdxl/base"], 2), (["member=flux/dev"], 1), (["member=sdxl/base", "batch_size=5"], 5)],
)
def test_the_batch_is_the_familys_where_the_run_does_not_say(words, batch_size):
    cfg = merge(slider.Config, words)
    check(cfg)
    assert cfg.batch_size == batch_size
