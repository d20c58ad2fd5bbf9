"""The real families against diffusers' own pipelines, sampled as the authors of each member say."""

import math

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
from support import hub
from support.real import FEWER, MEMBERS, NAMES, SEEDS, STUDENTS, TEXTS, TWINS, latents, slow
from transformers import Qwen3VLProcessor

from models.architectures.qwens import text_only
from models.batches import Batches
from models.cards import CARDS, card
from models.families import Family
from models.loading import source
from models.plans import hybrid
from models.prompts import stacked
from models.sampler import alone, draw_noise, finish, sample

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
    noise, conditioning = draw_noise(SEEDS, family.latent_shape, len(base.levels)), family.encode(TEXTS)
    with torch.no_grad():
        both, alone_ = (
            finish(alone(base), noise, conditioning),
            finish(alone(base), noise[1:], conditioning[[1]]),
        )
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
    conditioning, steps = family.encode(TEXTS), len(student.levels)
    for k in range(min(steps, 2) + 1):
        plan = hybrid(base, student, k)
        asked = base.denoiser.nfe, student.denoiser.nfe
        noise = draw_noise(SEEDS, family.latent_shape, steps)
        with torch.no_grad():
            first = next(iter(sample(plan, noise, conditioning)))
            drawn = finish(plan, noise, conditioning)
        asked = base.denoiser.nfe - asked[0] - bool(k), student.denoiser.nfe - asked[1] - (not k)
        assert asked == (k, steps - k) and plan.nfe == steps and drawn.isfinite().all()
        if k:
            with torch.no_grad():
                x0 = base.denoiser(first.x, first.noise, conditioning.conditional())
            assert torch.equal(first.x0, x0) and first.noise.ratio == student.levels[0].ratio


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
