"""The real families: the shipped cards over a Hub cache with small weights under the real names, against
diffusers' own pipelines.
"""

import json
import math
import shutil
from dataclasses import replace

import huggingface_hub.constants
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    FluxPipeline,
    LCMScheduler,
)
from safetensors.torch import save_file
from support import hub
from transformers import Qwen3VLProcessor

from analysis import similarity, transfer
from analysis.pages.similarity import of
from configs import ROOT, UserError, merge
from controls import formats
from controls.formats import layouts
from controls.lora import attach, detach, fused, strength
from models.architectures.qwens import text_only
from models.batches import Batches
from models.blocks import blocks
from models.cards import CARDS, card
from models.families import Family
from models.loading import source
from models.plans import hybrid
from models.prompts import stacked
from models.sampler import alone, draw_noise, finish, sample
from train import slider

TEXTS, SEEDS = ["a cat on a chair", "two dogs"], [5, 17]
NAMES = [
    *("sdxl", "sd15", "sd21", "pixart", "sd3", "flux", "zimage"),
    *("krea2", "klein", "klein9", "qwen", "qwen21"),
]
TWINS = (
    "2step",
    "8step",
    "2step-lora",
    "8step-lora",
)  # of members with another number of steps: left to `make proof`
ALIKE = ("sd15", "sd21", "klein9")  # U-Nets like sdxl's; as klein, larger
TRAINED = (
    "sdxl",
    "klein",
    "qwen",
    "qwen21",
)  # of each kind of network one; the others are left to `make proof`
MEMBERS = [(name, member) for name in NAMES for member in card(name).members]
# steps of the long runs, so that the tests are short; divides 1000, as DDIM wants it with trailing spacing
FEWER = 5


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A Hub cache of the real repositories, small, in place of the user's own."""
    folder = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def families(cache, tmp_path_factory):
    """name -> the shipped family at a small size, written and loaded when first asked for; card(name) is its
    path.
    """
    folder, loaded = tmp_path_factory.mktemp("cards"), {}

    def family(name: str) -> Family:
        if name not in loaded:
            shutil.copytree(
                ROOT / "models/tiny/weights/clip",
                hub.publish(cache, *card(name).clip.split("@")),
                dirs_exist_ok=True,
            )
            its = hub.write(cache, name)
            long = {
                member: {"steps": FEWER}
                for member, m in its.members.items()
                if m.steps > 8 and not m.timesteps
            }
            text = {} if its.architecture in ("sd", "sdxl", "qwen21") else {"text_length": hub.LENGTH}
            small = {"extends": name, "size_px": hub.SIZE_PX, "siglip": "", "members": long, **text}
            (folder / f"{name}.yaml").write_text(json.dumps(small))
            loaded[name] = Family(str(folder / f"{name}.yaml"), dtype=torch.float32)
            loaded[name].path = folder / f"{name}.yaml"
        return loaded[name]

    return family


def latents(family: Family, name: str) -> torch.Tensor:
    member = family.member(name)
    with torch.no_grad():
        return finish(
            alone(member), draw_noise(SEEDS, family.latent_shape, len(member.levels)), family.encode(TEXTS)
        )


# parity with each family's own pipeline, sampled as the authors of each member say

LINEAR = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
DDIM = DDIMScheduler(**hub.BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
# as Hyper-SD's authors make it: DDIMScheduler.from_config(the base's own, timestep_spacing="trailing"), which
# says set_alpha_to_one=false
TRAILING = DDIMScheduler.from_config(DDIM.config, timestep_spacing="trailing")
EULER = EulerDiscreteScheduler(**hub.BETAS, timestep_spacing="trailing")
LCM, DMD2 = (
    LCMScheduler(**hub.BETAS, clip_sample=False),
    {"timesteps": [999, 749, 499, 249], "guidance_scale": 0},
)


LOG3 = {"base_shift": math.log(3), "max_shift": math.log(3), "shift_terminal": None}
LIGHTNING = FlowMatchEulerDiscreteScheduler(
    **{**hub.QWEN, **LOG3}
)  # as lightx2v/Qwen-Image-Lightning writes it
UNENDED = FlowMatchEulerDiscreteScheduler(**{**hub.QWEN, "shift_terminal": None})


def few(steps: int, guidance: float = 0) -> dict:
    return {"num_inference_steps": steps, "guidance_scale": guidance}


PUBLISHED = {
    "sdxl/base": (DDIM, few(FEWER, 7.0)),
    "sdxl/turbo": (EulerAncestralDiscreteScheduler(**hub.BETAS, timestep_spacing="trailing"), few(4)),
    "sdxl/lightning": (EULER, few(4)),
    "sdxl/lightning-1step": (
        EulerDiscreteScheduler(**hub.BETAS, timestep_spacing="trailing", prediction_type="sample"),
        few(1),
    ),
    **{f"sdxl/lightning-{n}step{lora}": (EULER, few(n)) for n in (2, 8) for lora in ("", "-lora")},
    "sdxl/lightning-lora": (EULER, few(4)),
    "sdxl/lcm": (LCM, few(4, 8.0)),
    "sdxl/lcm-lora": (LCM, few(4)),
    "sdxl/dmd2": (LCM, DMD2),
    "sdxl/dmd2-lora": (LCM, DMD2),
    "sdxl/dmd2-1step": (LCM, {**DMD2, "timesteps": [399]}),
    "sdxl/hyper": (TRAILING, few(4)),
    "sdxl/hyper-1step": (LCM, {**DMD2, "timesteps": [800]}),
    **{f"{name}/hyper-{n}step": (TRAILING, few(n)) for n in (2, 8) for name in ("sdxl", "sd15")},
    "sd15/base": (DDIM, few(FEWER, 7.5)),
    "sd15/lcm": (LCM, few(4, 8.0)),
    "sd15/lcm-lora": (LCM, few(4)),
    "sd15/hyper": (TRAILING, few(4)),
    "sd21/base": (DDIM, few(FEWER, 7.5)),
    "sd21/v": (DDIMScheduler.from_config(DDIM.config, prediction_type="v_prediction"), few(FEWER, 7.5)),
    "sd21/turbo": (EULER, few(4)),
    "pixart/alpha": (
        DDIMScheduler(**LINEAR, clip_sample=False, timestep_spacing="trailing"),
        few(FEWER, 4.5),
    ),
    "pixart/delta": (LCMScheduler(**LINEAR, clip_sample=False), few(4)),
    "sd3/base": (None, few(FEWER, 3.5)),  # None = the one in the repository
    "sd3/turbo": (None, few(4)),
    "flux/dev": (None, few(FEWER, 3.5)),
    "flux/schnell": (None, few(4)),
    "zimage/base": (None, few(FEWER, 4.0)),
    "zimage/turbo": (None, few(8)),
    "krea2/base": (None, few(FEWER, 3.5)),
    "krea2/turbo": (None, few(8)),
    "krea2/turbo-4step-lora": (None, few(4)),
    **{f"{name}/base": (None, few(FEWER, 4.0)) for name in ("klein", "klein9")},
    **{f"{name}/distilled": (None, few(4, 1.0)) for name in ("klein", "klein9")},
    "qwen/base": (None, {"num_inference_steps": FEWER, "true_cfg_scale": 4.0}),
    "qwen/lightning": (LIGHTNING, {"num_inference_steps": 4, "true_cfg_scale": 1.0}),
    "qwen/lightning-8step": (LIGHTNING, {"num_inference_steps": 8, "true_cfg_scale": 1.0}),
    "qwen21/base": (None, {"num_inference_steps": FEWER}),
    "qwen21/lightning": (UNENDED, {"num_inference_steps": 4}),
}
OPTIONS = {"pixart": {"use_resolution_binning": False, "clean_caption": False}}


@pytest.fixture(scope="module")
def pipelines(families):
    """name -> diffusers' own pipeline, straight from the cache, with the base's network."""
    loaded = {}

    def pipe(name: str):
        if name not in loaded:
            its, kind = families(name).card, families(name).architecture
            loaded[name] = kind.pipeline.from_pretrained(
                its.repo,
                revision=its.revision,
                variant=its.variant,
                dtype=torch.float32,
                **dict.fromkeys(kind.absent),
                **families(name)._processor(),
            )
            loaded[name].set_progress_bar_config(disable=True)
        return loaded[name]

    return pipe


def theirs(pipe, family: Family, name: str, cache, **more) -> torch.Tensor:
    """A member's latents by diffusers alone: its loaders, its scheduler."""
    kind, member = family.architecture, family.card.members[name]
    repo, revision, variant = source(family.card, member)
    scheduler, options = PUBLISHED[f"{family.card.name}/{name}"]
    options = dict(options)
    folder = hub.publish(cache, repo, revision)
    net, before = getattr(pipe, kind.part), getattr(pipe, kind.part)
    if member.file:
        net = hub.network(family.card, member, list(family.card.members).index(name))
        net.load_state_dict(hub.half(net))
    elif member.over or not member.lora:
        its = family.card.members[member.over or name]
        folder_of = hub.publish(cache, *source(family.card, its)[:2])
        net = kind.network.from_pretrained(
            folder_of, subfolder=its.subfolder, variant=variant, dtype=torch.float32
        )
    if not scheduler:
        home = hub.publish(cache, *source(family.card, family.card.members[member.over or name])[:2])
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(home, subfolder="scheduler")
    pipe.scheduler = scheduler
    pipe.register_modules(**{kind.part: net})
    if "is_distilled" in pipe.config:
        pipe.register_to_config(is_distilled=name != family.card.base)
    if member.lora:
        pipe.load_lora_weights(folder / member.lora)
    length = {"max_sequence_length": family.card.text_length} if family.card.text_length else {}
    options |= {"height": hub.SIZE_PX, "width": hub.SIZE_PX, "output_type": "latent", **length, **more}
    options |= OPTIONS.get(family.card.name, {})
    out = []
    for rows in ONE_BY_ONE if family.card.name == "qwen21" else [slice(None)]:
        if "true_cfg_scale" in options:
            options["negative_prompt"] = [" "] * len(TEXTS[rows])
        generator = [torch.Generator().manual_seed(seed) for seed in SEEDS[rows]]
        out.append(pipe(prompt=TEXTS[rows], generator=generator, **options).images)
    if member.lora:
        pipe.unload_lora_weights()
    pipe.register_modules(**{kind.part: before})
    return (
        torch.cat([own_latents(pipe, part) for part in out])
        if options["output_type"] == "latent"
        else torch.cat(out)
    )


# in a batch its pipeline puts an image behind the longest text
ONE_BY_ONE = [slice(k, k + 1) for k in range(len(TEXTS))]


def own_latents(pipe, out: torch.Tensor) -> torch.Tensor:
    """A pipeline's latents as its network has them, (B, C, H, W)."""
    name, side = type(pipe).__name__, hub.SIZE_PX // 8
    if name in ("FluxPipeline", "Krea2Pipeline", "QwenImagePipeline"):
        return FluxPipeline._unpack_latents(out, hub.SIZE_PX, hub.SIZE_PX, 8)
    if name == "QwenImage21Pipeline":
        return out.mT.unflatten(2, (side // 2, side // 2))
    if name == "Flux2KleinPipeline":
        mean, deviation = (
            pipe.vae.bn.running_mean,
            (pipe.vae.bn.running_var + pipe.vae.config.batch_norm_eps).sqrt(),
        )
        return (pipe._patchify_latents(out) - mean[:, None, None]) / deviation[:, None, None]
    return out


def test_every_member_has_its_published_use():
    assert set(PUBLISHED) == {f"{name}/{member}" for name, member in MEMBERS}
    assert {path.stem for path in CARDS.glob("*.yaml")} == {*NAMES, "tiny", "tiny-teachers"}


def slow(values, when) -> list:
    return [
        pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=[pytest.mark.slow] if when(v) else [])
        for v in values
    ]


@pytest.mark.parametrize(("name", "member"), slow(MEMBERS, lambda pair: pair[1].endswith(TWINS)))
def test_a_member_draws_what_its_authors_pipeline_draws(families, pipelines, cache, name, member):
    family = families(name)
    ours, expected = latents(family, member), theirs(pipelines(name), family, member, cache)
    assert (ours - expected).abs().max() < 1e-4 * max(
        1, expected.abs().max()
    )  # random networks: latents in the tens


def test_without_its_shift_a_flow_would_be_another(families):
    """The levels are those of the scheduler in the repository, dynamic mu of the image's size included."""
    levels = families("flux").member("dev").levels
    even = [1 - k / FEWER for k in range(FEWER)]
    assert levels[0].sigma == 1 and all(
        level.sigma > sigma for level, sigma in zip(levels[1:], even[1:], strict=True)
    )
    assert [level.sigma for level in families("flux").member("schnell").levels] == pytest.approx(
        [1, 0.75, 0.5, 0.25]
    )


@pytest.mark.parametrize("name", NAMES)
def test_images_are_those_of_the_pipeline(families, pipelines, cache, name):
    family, pipe = families(name), pipelines(name)
    images = family.draw(family.member(STUDENTS[name]), TEXTS, SEEDS)
    expected = theirs(pipe, family, STUDENTS[name], cache, output_type="pt")
    if expected.shape[1] == 4:
        expected = expected[:, :3] * expected[:, 3:] + 1 - expected[:, 3:]
    assert (images / 2 + 0.5 - expected).abs().max() < 1e-4
    back = family.to_latents(images)
    with torch.no_grad():
        assert torch.allclose(back, encoded(pipe.vae, images), atol=1e-5)


def encoded(vae, images: torch.Tensor) -> torch.Tensor:
    """A network's latents of images, as the families' image-to-image pipelines make them."""
    config, name = vae.config, type(vae).__name__
    if name == "AutoencoderKLFlux2":
        its = Flux2KleinPipeline._patchify_latents(vae.encode(images).latent_dist.mode())
        return normal(vae, its)
    if name.startswith("AutoencoderKLQwenImage"):
        opaque = [torch.ones_like(images[:, :1])] if name.endswith("21") else []
        its = vae.encode(torch.cat([images, *opaque], 1)[:, :, None]).latent_dist.mode()[:, :, 0]
        mean, deviation = (torch.tensor(v)[:, None, None] for v in (config.latents_mean, config.latents_std))
        return (its - mean) / deviation
    return (
        vae.encode(images).latent_dist.mode() - (config.get("shift_factor") or 0.0)
    ) * config.scaling_factor


def normal(vae, latents: torch.Tensor) -> torch.Tensor:
    """Latents by the batch norm of Flux.2's VAE."""
    its = vae.bn
    return torch.nn.functional.batch_norm(latents, its.running_mean, its.running_var, eps=its.eps)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_the_same_alone_and_in_a_batch(families, name):
    family, base = families(name), families(name).member(families(name).card.base)
    noise, told = draw_noise(SEEDS, family.latent_shape, len(base.levels)), family.encode(TEXTS)
    with torch.no_grad():
        both, alone_ = finish(alone(base), noise, told), finish(alone(base), noise[1:], told[[1]])
    assert (alone_[0] - both[1]).abs().max() < 1e-4 * max(1, both.abs().max())


DISTILLED = [  # those distilled: without guidance
    (name, member)
    for name, member in MEMBERS
    if member != card(name).base and card(name).members[member].guidance is None
]


@pytest.mark.parametrize(("name", "member"), slow(DISTILLED, lambda pair: pair[1].endswith(TWINS)))
def test_a_hybrid_asks_the_base_k_times_and_the_student_else(families, name, member):
    """Whatever the family: one evaluation a step, the base's without guidance, by the base's own network."""
    family = families(name)
    base, student = family.member(family.card.base), family.member(member)
    told, steps = family.encode(TEXTS), len(student.levels)
    for k in range(min(steps, 2) + 1):
        plan = hybrid(base, student, k)
        asked = base.denoiser.nfe, student.denoiser.nfe
        noise = draw_noise(SEEDS, family.latent_shape, steps)
        with torch.no_grad():
            first = next(iter(sample(plan, noise, told)))
            drawn = finish(plan, noise, told)
        asked = base.denoiser.nfe - asked[0] - bool(k), student.denoiser.nfe - asked[1] - (not k)
        assert asked == (k, steps - k) and plan.nfe == steps and drawn.isfinite().all()
        if k:
            with torch.no_grad():
                x0 = base.denoiser(first.x, first.noise, told.conditional())
            assert torch.equal(first.x0, x0) and first.noise.ratio == student.levels[0].ratio


# students that are a LoRA over the base

STUDENT = "lightning-lora"


def test_a_delta_shares_the_network_of_its_base_and_leaves_it_as_it_was(families):
    family = families("sdxl")
    base, student = family.member("base"), family.member(STUDENT)
    assert student.denoiser.net is base.denoiser.net
    fresh = Family(str(family.path), dtype=torch.float32)
    plain = latents(fresh, "base")
    assert not torch.allclose(latents(family, STUDENT), latents(family, "lightning"))
    assert torch.equal(latents(family, "base"), plain)  # also right after its student ran
    assert base.denoiser.net.state_dict().keys() == fresh.member("base").denoiser.net.state_dict().keys()


def test_the_strength_of_a_delta_is_a_dial_also_per_step(families):
    family = families("sdxl")
    student, told = family.member(STUDENT), family.encode(TEXTS)
    noise = draw_noise(SEEDS, family.latent_shape, 4)

    def drawn(dial) -> torch.Tensor:
        turned = replace(student, denoiser=replace(student.denoiser, lora_scale=dial))
        with torch.no_grad():
            return finish(alone(turned), noise, told)

    off = drawn(0.0)
    bare = replace(
        family.member("base"), levels=student.levels, guidance=None, final=student.final, start=student.start
    )
    with torch.no_grad():
        assert torch.equal(off, finish(alone(bare), noise, told))
    assert torch.equal(drawn(lambda level: 1.0), drawn(1.0)) and torch.equal(drawn(lambda level: 0.0), off)
    only_first = drawn(lambda level: float(level.t > 900))
    assert not torch.allclose(only_first, off) and not torch.allclose(only_first, drawn(1.0))


def test_a_control_acts_on_a_delta_as_on_weights_with_the_delta_in_them(families, tmp_path):
    """Attached, merged and taken out again, with the delta beside it."""
    family = families("sdxl")
    student, plain = family.member(STUDENT), latents(family, STUDENT)
    control = formats.load(trained(family, "base", tmp_path))
    with fused(student.denoiser.net, control, 1.0, "sdxl"):
        merged = latents(family, STUDENT)
    attach(student.denoiser.net, control, "mine", "sdxl")
    with strength(student.denoiser.net, mine=1.0):
        beside = latents(family, STUDENT)
    detach(student.denoiser.net)
    assert (beside - merged).abs().max() < 1e-3 * plain.abs().max() < (merged - plain).abs().max() * 10
    assert torch.equal(latents(family, STUDENT), plain)


# a control trained on base and student, saved, reloaded, attached, and one cell of transfer


def trained(family: Family, member: str, folder, **more) -> str:
    """One step of the slider trainer on a member; the path of the control."""
    short = {
        "steps": 1,
        "batch_size": 1,
        "trajectories": 1,
        "rank": 2,
        "alpha": 2.0,
        "learning_rate": 0.05,
        "sample_scales": [0.0, 1.0],
    }
    pair = [slider.Pair("a cat", "a big cat", "a small cat")]
    short |= {"member": f"{family.path}/{member}", "out": str(folder), "sample_seeds": [1], **more}
    cfg = slider.Config(name=f"big-{member}", prompts=pair, **short)
    return slider.main(cfg)


STUDENTS = {
    "sdxl": "dmd2",
    "sd15": "hyper",
    "sd21": "turbo",
    "pixart": "delta",
    "sd3": "turbo",
    "flux": "schnell",
    "zimage": "turbo",
    "krea2": "turbo",
    "klein": "distilled",
    "klein9": "distilled",
    "qwen": "lightning",
    "qwen21": "lightning",
}


@pytest.mark.parametrize("name", slow(NAMES, lambda name: name not in TRAINED))
def test_a_slider_is_trained_saved_reloaded_and_transferred(families, pipelines, cache, tmp_path, name):
    family, base, student = families(name), families(name).card.base, STUDENTS[name]
    files = [trained(family, member, tmp_path) for member in (base, student)]
    assert (
        len({formats.load(file).card.base_hash for file in files}) == 2
    )  # a LoRA student is more than its base's network
    for file, source_member in zip(files, (base, student), strict=True):
        control, net = formats.load(file), family.member(student).denoiser.net
        assert (control.card.family, control.card.member) == (name, source_member)
        assert any(
            tensor.any() for key, tensor in control.tensors.items() if "lora_B" in key
        )  # it has learnt
        plain = latents(family, student)
        with fused(net, control, 1.0, name):
            assert not torch.equal(latents(family, student), plain)
        assert torch.equal(latents(family, student), plain)
    page = transfer.main(
        transfer.Config(
            name=name,
            family=str(family.path),
            controls=[str(files[0])],
            targets=[student],
            prompts=TEXTS,
            max_prompts=len(TEXTS),
            baselines=1,
            rounds=1,
            seeds=2,
            scales=[0.0, 1.0],
            references=False,
            batch_size=2,
            out=str(tmp_path / "transfer"),
            cache=str(tmp_path / "cache"),
        )
    )
    (cell,) = json.loads((page.parent / "results.json").read_text())["cells"]
    assert (cell["source"], cell["target"]) == (f"{name}/{base}", f"{name}/{student}")
    if hasattr(pipelines(name), "load_lora_weights") and not family.card.members[student].lora:
        agrees_with_diffusers(family, pipelines(name), student, files[0], cache)


@pytest.mark.parametrize(
    ("name", "member"),
    slow(
        [*((name, card(name).base) for name in NAMES), ("sdxl", STUDENT)],
        lambda pair: pair[0] in (*ALIKE, "pixart", "sd3", "krea2", "zimage", "qwen", "qwen21"),
    ),
)
def test_a_slider_of_a_quantised_network_is_one_of_the_whole(families, tmp_path, name, member):
    """Also of a student that is a LoRA beside the packed layers."""
    pytest.importorskip("bitsandbytes")
    family = families(name)
    whole, packed = (
        formats.load(trained(family, member, tmp_path / word, **more)) for word, more in WAYS.items()
    )
    assert packed.card.base_hash == whole.card.base_hash and packed.tensors.keys() == whole.tensors.keys()
    ours, theirs = (
        torch.cat([c.tensors[key].flatten() for key in sorted(c.tensors) if "lora_B" in key])
        for c in (packed, whole)
    )
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.5
    with fused(family.member(member).denoiser.net, packed, 1.0, name):
        assert latents(family, member).isfinite().all()


WAYS = {"whole": {}, "packed": {"quantize": "nf4"}}


OTHERS = [(name, member) for name, member in MEMBERS if member not in (card(name).base, STUDENTS[name])]


@pytest.mark.parametrize(("name", "member"), slow(OTHERS, lambda pair: pair[1].endswith(TWINS)))
def test_a_slider_is_trained_on_every_other_student_too(families, tmp_path, name, member):
    """LoRA students, guidance told to the network, x0 predicted, one step."""
    family = families(name)
    control = formats.load(trained(family, member, tmp_path))
    assert (
        control.card.member,
        any(tensor.any() for key, tensor in control.tensors.items() if "lora_B" in key),
    ) == (member, True)
    plain = latents(family, member)
    with fused(family.member(member).denoiser.net, control, 1.0, name):
        assert not torch.equal(latents(family, member), plain)
    assert torch.equal(latents(family, member), plain)


def test_krea_claims_are_checked_by_a_command(families, cache, tmp_path):
    """configs/transfer/krea2.yaml as it is, on small networks: a LoRA of all linear layers from the Hub."""
    family, card = families("krea2"), tmp_path / "krea2.yaml"
    card.write_text(json.dumps({"extends": str(family.path), "text_length": 64}))
    net, repo = family.member("base").denoiser.net, "krea/Krea-2-LoRA-softwatercolor"
    spots = {name: layer.weight for name, layer in layouts.named_layers(net).items()}
    halves = {
        f"transformer.{name}.lora_A.weight": torch.randn(4, w.shape[1]) * 0.2 for name, w in spots.items()
    }
    halves |= {f"transformer.{name}.lora_B.weight": torch.randn(len(w), 4) * 0.2 for name, w in spots.items()}
    save_file(halves, hub.publish(cache, repo) / "softwatercolor.safetensors")
    small = {"family": str(card), "max_prompts": 2, "rounds": 1, "curve_prompts": 1, "baselines": 1}
    small |= {"references": False, "out": str(tmp_path), "cache": str(tmp_path / "cache")}
    page = transfer.main(merge(transfer.Config, "configs/transfer/krea2.yaml", small))
    cells = json.loads((page.parent / "results.json").read_text())["cells"]
    assert [(cell["control"], cell["target"]) for cell in cells] == [
        ("softwatercolor", "krea2/base"),
        ("softwatercolor", "krea2/turbo"),
    ]


@pytest.mark.parametrize("name", slow(STUDENTS, lambda name: name != "zimage"))
def test_its_blocks_are_compared_and_joined(families, tmp_path, name):
    """Every block of a student with its base's, and networks that begin as one and end as the other."""
    family, student = families(name), STUDENTS[name]
    small = {"family": str(family.path), "targets": [student], "prompts": TEXTS, "seeds": 2, "controls": []}
    small |= {"stitch_seeds": 1, "neighbours": 1, "draws": 3, "out": str(tmp_path), "wandb": "disabled"}
    page = similarity.main(merge(similarity.Config, small))
    cells = json.loads((page.parent / "results.json").read_text())["cells"]
    seen = {cell["block"] for cell in of(cells, "block")}
    assert seen == {*blocks(family.member(student).denoiser.net)} and len(seen) > 1
    assert of(cells, "stitch")


def test_qwen21_reads_texts_as_its_processor_of_pictures_does():
    """Whose part for videos needs torchvision."""
    words = hub.template_words()
    real = Qwen3VLProcessor.__new__(Qwen3VLProcessor)
    real.tokenizer, real.image_processor, real.video_processor = words, None, None
    real.chat_template, real.image_token, real.video_token = words.chat_template, "<|image_pad|>", "<|v|>"
    ours = text_only(words)
    how = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    texts = ["<|im_start|>user\na cat on a chair<|im_end|>\n", "two dogs"]
    read, expected = ours(text=texts, **how), real(text=texts, **how)
    assert torch.equal(read.input_ids, expected.input_ids)
    assert torch.equal(read.attention_mask, expected.attention_mask) and not read.attention_mask.all()
    turn = [{"role": "system", "content": [{"type": "text", "text": "Look."}]}]
    how = {"tokenize": True, "return_dict": False}
    assert ours.apply_chat_template(turn, **how) == real.apply_chat_template(turn, **how)


def test_a_batch_of_texts_is_read_part_by_part(families, monkeypatch):
    """However many go at once, and whatever else is in the batch."""
    for name in ("klein", "krea2", "qwen", "qwen21", "zimage"):
        family = families(name)
        texts = [*TEXTS, "a red hat on a table"]
        family._encoded.clear()
        together = family.encode(texts)
        family._encoded.clear()
        monkeypatch.setattr(family, "reading", Batches(1))
        apart = stacked([family.encode([text]) for text in texts])
        for ours, theirs in ((together, apart), (together.negative, apart.negative)):
            assert torch.allclose(ours.tokens, theirs.tokens, atol=1e-4)
            assert ours.mask is None or torch.equal(ours.mask, theirs.mask)


def agrees_with_diffusers(family: Family, pipe, student: str, file, cache) -> None:
    """The file, loaded by diffusers alone, does what we say it does."""
    with fused(family.member(student).denoiser.net, formats.load(file), 1.0):
        ours = latents(family, student)
    kind = family.architecture
    before = getattr(pipe, kind.part)
    pipe.register_modules(**{kind.part: family.member(student).denoiser.net})
    pipe.load_lora_weights(str(file))
    net = getattr(pipe, kind.part)
    try:
        with torch.no_grad():
            member = family.member(student)
            theirs = finish(
                alone(member),
                draw_noise(SEEDS, family.latent_shape, len(member.levels)),
                family.encode(TEXTS),
            )
    finally:
        pipe.unload_lora_weights()
        pipe.register_modules(**{kind.part: before})
    assert net is member.denoiser.net
    assert (ours - theirs).abs().max() < 1e-3 * max(1, ours.abs().max())


def test_a_control_of_another_family_is_refused(families, tmp_path):
    control = formats.load(trained(families("sd21"), "base", tmp_path))
    with pytest.raises(UserError, match="trained on family 'sd21', this network is of family 'sd15'"):
        attach(families("sd15").member("base").denoiser.net, control, family="sd15")
