"""Families: cards load, members share what they should, and each draws what diffusers alone draws with it."""

import hashlib
import json
import os
import pickle
import shutil
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from support.hub import BETAS, SIZE_PX, half, pipeline, publish, unet

from configs import ROOT, UserError
from models import loading
from models.families import Family, card, fast_dtype, place, split
from models.hashing import identity
from models.noise import CLEAN, ancestral, vp
from models.plans import hybrid
from models.sampler import Plan, Stage, alone, draw_noise, finish

TEXTS = ["portrait of a person, glasses", "portrait of a person, hat"]
SEEDS = [5, 17]
SCHEDULERS = {
    prediction_type.__name__: prediction_type
    for prediction_type in (
        DDIMScheduler,
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
        LCMScheduler,
    )
}


@pytest.fixture(scope="session")
def tiny():
    """The embedded family, in fp32."""
    return Family("tiny", dtype=torch.float32)


def network(seed: int, **changes) -> UNet2DConditionModel:
    return unet(seed, True, **changes)


@pytest.fixture(scope="module")
def sdxl(tiny, cache, tmp_path_factory):
    """SDXL by a card of its own: a small random base in a folder, and random students where the Hub's would
    lie.
    """
    folder, shipped = tmp_path_factory.mktemp("sdxl"), card("sdxl")
    pipeline(shipped).save_pretrained(folder / "base")
    network(1).save_pretrained(publish(cache, "stabilityai/sdxl-turbo") / "unet")
    network(2, time_cond_proj_dim=16).save_pretrained(publish(cache, "latent-consistency/lcm-sdxl"))
    save_file(
        half(network(3)), publish(cache, "ByteDance/SDXL-Lightning") / "sdxl_lightning_4step_unet.safetensors"
    )
    torch.save(half(network(4)), publish(cache, "tianweiy/DMD2") / "dmd2_sdxl_4step_unet_fp16.bin")
    members = {name: {**asdict(shipped.members[name]), "revision": None, "variant": None} for name in SDXL}
    (folder / "sdxl.yaml").write_text(
        json.dumps({"name": "sdxl", "repo": str(folder / "base"), "size_px": 64, "members": members})
    )
    return Family(str(folder / "sdxl.yaml"), dtype=torch.float32)


def written(folder: Path, sdxl: Family, **student) -> Family:
    """A family on the small SDXL with one student of its own."""
    members = {"base": {}, "student": student}
    (folder / "card.yaml").write_text(
        json.dumps({"name": "own", "repo": sdxl.card.repo, "size_px": 64, "members": members})
    )
    return Family(str(folder / "card.yaml"), dtype=torch.float32)


# cards


@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "configs/families").glob("*.yaml")])
def test_every_card_loads(name):
    found = card(name)
    assert found.name == name and found.repo and found.licence and found.base in found.members
    assert all(
        member.licence or not member.repo or member.repo.startswith("models/")
        for member in found.members.values()
    )


SDXL = {  # the published recipes: timesteps, kind, eta, guidance, first x, last level
    "base": ([float(t) for t in range(981, 0, -20)], "eps", 0.0, 7.0, "unit", vp(0)),
    "turbo": ([999, 749, 499, 249], "eps", ancestral, None, "sigma", CLEAN),
    "lightning": ([999, 749, 499, 249], "eps", 0.0, None, "sigma", CLEAN),
    "lcm": ([999, 759, 499, 259], "eps", 1.0, None, "unit", CLEAN),
    "dmd2": ([999, 749, 499, 249], "eps", 1.0, None, "unit", CLEAN),
}


@pytest.mark.parametrize("name", SDXL)
def test_the_members_of_sdxl_are_sampled_as_published(sdxl, name):
    member = sdxl.member(name)
    found = (
        [level.t for level in member.levels],
        member.denoiser.prediction_type,
        member.eta,
        member.guidance,
        member.start,
        member.final,
    )
    assert found == SDXL[name]
    assert member.denoiser.guidance_embedding == (7.0 if name == "lcm" else None)
    assert member.name == f"sdxl/{name}" and member.noise_schedule == "vp"


@pytest.mark.parametrize(
    ("name", "parts"), [("tiny/dmd", ("tiny", "dmd")), ("my/card.yaml/base", ("my/card.yaml", "base"))]
)
def test_a_member_is_family_and_name(name, parts):
    assert split(name) == parts


@pytest.mark.parametrize("name", ["tiny", "", "/", "tiny/", "/dmd"])
def test_a_malformed_member(name):
    with pytest.raises(UserError, match="family/member"):
        split(name)


def test_unknown_names_are_told_the_known_ones(tiny):
    with pytest.raises(UserError, match="no family 'tinny': there are .*tiny"):
        Family("tinny")
    with pytest.raises(UserError, match="no family 'none.yaml'"):
        Family("none.yaml")
    with pytest.raises(UserError, match="no member 'dmd3' in family tiny: there are base, dmd"):
        tiny.member("dmd3")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{base: {noise_schedule: edm}}", "noise_schedule.*'vp', 'vp-linear', 'flow'"),
        ("{base: {prediction_type: epsilon}}", "prediction_type.*'eps', 'v', 'flow', 'sample'"),
        ("{base: {final: one}}", "final.*'clean', 'first'"),
        ("{base: {stepz: 4}}", "did you mean .*steps"),
        ("{student: {}}", "base 'base' is not one of its members: student"),
        ("{base: {guidance: 0}}", "guidance.*conditional only.*unconditional"),
        ("{base: {timesteps: [499, 999]}}", "do not fall: 499, 999"),
        ("{base: {timesteps: [999, 999]}}", "do not fall"),
        ("{base: {timesteps: [1000, 1]}}", "outside of 0 … 999"),
        ("{base: {timesteps: [.nan]}}", "timesteps"),
        ("{base: {steps: 0}}", "steps 0; there can be 1 … 1000"),
        ("{base: {steps: 5000}}", "there can be 1 … 1000"),
        ("{base: {eta: 1.5}}", "eta must be"),
        ("{base: {}, ../x: {}}", "'../x' cannot name"),
        ("{base: {}, 'a:b': {}}", "has a colon"),
        ("[base]", "a list is given whole"),
        ("{base: 3}", "base"),
    ],
)
def test_a_wrong_card(tmp_path, text, says):
    (tmp_path / "card.yaml").write_text(f"name: own\nmembers: {text}\n")
    with pytest.raises(UserError, match=says) as error:
        card(str(tmp_path / "card.yaml"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot name a control or a folder: it is empty"),
        (bytes(range(256)), "not a text file"),
        (b"name: a\0b", "not valid YAML"),
        (b"name: " + b"[" * 5000, "not valid YAML|nests too deep"),
        (b"just words", "holds no key: value pairs"),
        (b"extends: [tiny]", "extends"),
        (b"extends: {a: b}", "extends"),
        (b"extends: nowhere", "no family 'nowhere'"),
        (b"extends: {PATH}", "extends itself"),
        (b"name: own\nmembers: &all {base: {}, other: *all}", "not valid YAML"),
        (b"name: " + b"x" * 3000, "longer than 120 bytes"),
    ],
)
def test_a_card_that_is_none_is_one_line(tmp_path, content, says):
    path = tmp_path / "card.yaml"
    path.write_bytes(content.replace(b"{PATH}", str(path).encode()))
    with pytest.raises(UserError, match=says) as error:
        card(str(path))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + ".yaml", "a\0b", ""])
def test_a_name_that_no_card_can_have(name):
    with pytest.raises(UserError, match="no family"):
        card(name)


def test_guidance_1_is_conditional_only(tmp_path):
    (tmp_path / "card.yaml").write_text("name: own\nmembers: {base: {guidance: 1}}\n")
    assert card(str(tmp_path / "card.yaml")).members["base"].guidance is None


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A function that gives a family of a base whose folder is a copy, and what its card says besides."""

    def made(member: str = "", **scheduler) -> Family:
        home = tmp_path / "base"
        if not home.exists():
            shutil.copytree(ROOT / "models/tiny/weights/base", home)
        config = home / "scheduler/scheduler_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | scheduler))
        (tmp_path / "card.yaml").write_text(
            f"extends: tiny\nname: own\nrepo: {home}\nmembers: {{dmd: {{{member}}}}}\n"
        )
        loading.published_scheduler.cache_clear()
        return Family(str(tmp_path / "card.yaml"), dtype=torch.float32)

    return made


@pytest.mark.parametrize(
    "member",
    ["subfolder: nope", "repo: models/tiny/nope", "file: nope.safetensors", "lora: nope.safetensors"],
)
def test_weights_that_are_not_there_are_not_replaced_by_others(own, member):
    family = own(member)
    for call in (lambda: family.member("dmd"), lambda: identity(family.card, "dmd")):
        with pytest.raises(UserError, match="nope"):
            call()


def test_noise_that_no_law_has_is_refused(own):
    with pytest.raises(UserError, match="rescale_betas_zero_snr"):
        own(rescale_betas_zero_snr=True).member("base")
    with pytest.raises(UserError, match="other noise than noise_schedule vp: .*0.02"):
        own(rescale_betas_zero_snr=False, beta_end=0.02).member("base")


def test_what_the_card_overrules_is_said(own, capsys):
    own(prediction_type="v_prediction").member("base")
    assert "predicts v; its card says eps" in capsys.readouterr().out
    own("trained_px: 512").member("dmd")
    assert "own/dmd was trained at 512 px and is run at 64" in capsys.readouterr().out


# what members share, and what they do not


def test_no_texts_and_too_few_seeds_are_one_line(tiny):
    with pytest.raises(UserError, match="no texts"):
        tiny.encode([])
    for texts, seeds in ([], []), (["a person"] * 2, [1]):
        with pytest.raises(UserError, match="a seed per prompt"):
            tiny.draw(tiny.member("dmd"), texts, seeds)


def test_members_share_vae_and_text_encoders_and_nothing_else(tiny):
    members = [tiny.member(name) for name in tiny.card.members]
    assert tiny.pipe is tiny.pipe and tiny.pipe.unet is None
    assert len({id(member.denoiser.net) for member in members}) == len(members)
    assert all(tiny.member(name) is member for name, member in zip(tiny.card.members, members, strict=True))
    nets = [
        *(member.denoiser.net for member in members),
        tiny.pipe.vae,
        tiny.pipe.text_encoder,
        tiny.pipe.text_encoder_2,
    ]
    assert not any(net.training or any(p.requires_grad for p in net.parameters()) for net in nets)


def test_latent_shapes(tiny, sdxl):
    assert tiny.latent_shape == (4, 16, 16) and sdxl.latent_shape == (4, 8, 8)
    assert tiny.member("base").denoiser.net.config.sample_size == 16


def test_pipelines_that_are_loaded_are_used_and_left_as_they_are(tmp_path):
    """As a user of diffusers has them: nothing is read from a disk, and they draw as before."""
    card_file = tmp_path / "small.yaml"
    card_file.write_text(f"extends: sdxl\nsize_px: {SIZE_PX}\n")
    pipe, student = pipeline(card("sdxl")), unet(7, sdxl=True)
    pipe.set_progress_bar_config(disable=True)
    net, parts = pipe.unet, dict(pipe.components)

    def theirs() -> torch.Tensor:
        how = {"height": SIZE_PX, "width": SIZE_PX, "output_type": "latent", "num_inference_steps": 5}
        return pipe(TEXTS[0], generator=torch.Generator().manual_seed(3), **how).images

    before = theirs()
    family = Family(str(card_file), pipe.device, pipe.dtype)
    family.use(pipe, {"lightning": student})
    base, lightning = family.member("base"), family.member("lightning")
    assert base.denoiser.net is net and lightning.denoiser.net is student
    prompts, noise = family.encode(TEXTS[:1]), draw_noise([3], family.latent_shape, 4)
    with torch.no_grad():
        assert family.decode(finish(hybrid(base, lightning, 1), noise, prompts)).isfinite().all()
    family.encode_all(TEXTS)  # after which the family lets the text encoders go
    assert dict(pipe.components) == parts and torch.equal(theirs(), before)


# encoding


@pytest.mark.parametrize("name", ["tiny", "sdxl"])
@pytest.mark.parametrize("negative", [None, ["a hat", "a beard"]])
def test_prompts_are_those_of_the_pipeline(request, name, negative):
    family = request.getfixturevalue(name)
    ours = family.encode(TEXTS, negative)
    with torch.no_grad():
        tokens, negative_tokens, pooled, negative_pooled = family.pipe.encode_prompt(
            TEXTS, negative_prompt=negative, device="cpu"
        )
    assert torch.equal(ours.tokens, tokens) and torch.equal(ours.pooled, pooled)
    assert torch.equal(ours.negative.tokens, negative_tokens) and torch.equal(
        ours.negative.pooled, negative_pooled
    )
    if negative is None:  # SDXL's force_zeros_for_empty_prompt
        assert not ours.negative.tokens.any() and not ours.negative.pooled.any()
    assert len(ours) == len(ours.negative) == 2


def test_an_empty_prompt_is_not_the_absent_one(tiny):
    assert tiny.encode([""]).tokens.any() and tiny.encode(TEXTS, ["", ""]).negative.tokens.any()


@pytest.mark.parametrize("name", ["tiny", "sdxl"])
def test_sizes_are_those_of_the_pipeline(request, name):
    family = request.getfixturevalue(name)
    pipe = StableDiffusionXLPipeline.from_pretrained(place(family.card.repo), dtype=torch.float32)
    square = (family.card.size_px, family.card.size_px)
    ids = pipe._get_add_time_ids(
        square, (0, 0), square, torch.float32, pipe.text_encoder_2.config.projection_dim
    )
    assert torch.equal(family.encode(TEXTS).size, ids.expand(2, 6)) and torch.equal(
        family.encode(TEXTS).negative.size, ids.expand(2, 6)
    )


# a member is what diffusers makes of the same folder


def theirs(family: Family, net, scheduler, output: str = "latent", **options) -> torch.Tensor:
    """The member's latents or images by diffusers' own pipeline."""
    repo = place(family.card.repo)
    pipe = StableDiffusionXLPipeline.from_pretrained(repo, unet=net, scheduler=scheduler, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    side = family.card.size_px
    generator = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return pipe(TEXTS, height=side, width=side, generator=generator, output_type=output, **options).images


def ours(family: Family, name: str) -> torch.Tensor:
    member = family.member(name)
    return finish(
        alone(member), draw_noise(SEEDS, family.latent_shape, len(member.levels)), family.encode(TEXTS)
    )


@pytest.mark.parametrize("name", ["base", "dmd", "lcm", "lightning"])
def test_diffusers_alone_draws_with_every_embedded_member(tiny, name):
    """Each from its own folder and the scheduler that lies in it."""
    own = tiny.card.members[name]
    folder = Path(place(own.repo or tiny.card.repo))
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    scheduler = SCHEDULERS[config["_class_name"]].from_pretrained(folder / "scheduler")
    net = UNet2DConditionModel.from_pretrained(folder, subfolder=own.subfolder, dtype=torch.float32)
    steps = (
        {"timesteps": [int(t) for t in own.timesteps]}
        if own.timesteps
        else {"num_inference_steps": own.steps}
    )
    assert torch.allclose(
        ours(tiny, name),
        theirs(tiny, net, scheduler, guidance_scale=own.guidance or 0, **steps),
        atol=1e-4,
        rtol=0,
    )


@pytest.mark.parametrize("name", ["tiny", "sdxl"])
def test_images_are_those_of_the_pipeline(request, name):
    family = request.getfixturevalue(name)
    net, scheduler = deepcopy(family.member("base").denoiser.net), LCMScheduler(**BETAS, clip_sample=False)
    options = {"timesteps": [999, 499], "guidance_scale": 0}
    images = family.decode(theirs(family, net, scheduler, **options))
    assert images.shape == (2, 3, 64, 64) and images.dtype == torch.float32 and images.abs().max() <= 1
    assert torch.allclose((images + 1) / 2, theirs(family, net, scheduler, output="pt", **options), atol=1e-4)


@pytest.mark.parametrize("name", SDXL)
def test_two_steps_and_a_picture(sdxl, name):
    member = sdxl.member(name)
    plan = Plan("two", (Stage(member, member.levels[:2]),))
    latents = finish(plan, draw_noise(SEEDS, sdxl.latent_shape, 2), sdxl.encode(TEXTS))
    assert latents.shape == (2, 4, 8, 8)
    assert sdxl.decode(latents).isfinite().all()


def test_latents_of_images_are_what_the_decoder_reads(tiny):
    images = tiny.decode(ours(tiny, "base"))
    again = tiny.decode(tiny.to_latents(images))
    assert (again - images).square().mean() < 0.1 * images.var()


# networks from a single file, and files that are not what they should be


def test_a_single_file_gives_the_published_weights(sdxl):
    for name, seed in (("lightning", 3), ("dmd2", 4)):
        loaded = sdxl.member(name).denoiser.net.state_dict()
        assert all(torch.equal(loaded[key], value.float()) for key, value in half(network(seed)).items())


def test_a_single_file_may_lie_in_a_folder(sdxl, tmp_path):
    save_file(half(network(5)), tmp_path / "net.safetensors")
    right = hashlib.sha256((tmp_path / "net.safetensors").read_bytes()).hexdigest()
    member = written(tmp_path, sdxl, repo=str(tmp_path), file="net.safetensors", sha256=right).member(
        "student"
    )
    assert torch.equal(member.denoiser.net.conv_in.weight, network(5).conv_in.weight.half().float())


class Attack:
    """What a pickle may do."""

    def __reduce__(self):
        return os.mkdir, ("attacked",)


def truncated(path: Path) -> None:
    save_file(half(network(5)), path)
    path.write_bytes(path.read_bytes()[:5000])


FILES = {  # what lies in the file, and what is said about it
    "truncated.safetensors": (truncated, "cannot load"),
    "empty.safetensors": (lambda path: path.write_bytes(b""), "cannot load"),
    "empty.bin": (lambda path: path.write_bytes(b""), "cannot load"),
    "attack.bin": (
        lambda path: path.write_bytes(pickle.dumps(Attack())),
        "cannot load.*Weights only load failed",
    ),
    "other.safetensors": (
        lambda path: save_file(half(network(5, block_out_channels=(16, 16))), path),
        "cannot load.*size mismatch",
    ),
    "part.safetensors": (
        lambda path: save_file({"conv_in.bias": torch.zeros(16)}, path),
        "cannot load.*Missing key",
    ),
    "none.safetensors": (lambda path: None, "cannot load"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_refused_in_one_line(sdxl, tmp_path, monkeypatch, name):
    write, says = FILES[name]
    write(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says) as error:
        written(tmp_path, sdxl, repo=str(tmp_path), file=name).member("student")
    assert name in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500
    assert not (tmp_path / "attacked").exists()


def test_another_file_than_the_cards_is_refused(sdxl, tmp_path):
    file = {"repo": "ByteDance/SDXL-Lightning", "file": "sdxl_lightning_4step_unet.safetensors"}
    with pytest.raises(UserError, match="sha256"):
        written(tmp_path, sdxl, **file, sha256="0" * 64).member("student")


@pytest.mark.parametrize(
    "student",
    [{"repo": "nobody/nothing"}, {"repo": "nobody/nothing", "file": "a.bin"}, {"repo": "no/such/folder"}],
)
def test_an_absent_repo_is_named_in_one_line(sdxl, tmp_path, student):
    with pytest.raises(UserError, match=f"cannot load .*{student['repo']}") as error:
        written(tmp_path, sdxl, **student).member("student")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "part", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "vae/config.json"]
)
def test_a_damaged_pipeline_is_named_in_one_line(sdxl, tmp_path, part):
    folder = tmp_path / "base"
    shutil.copytree(sdxl.card.repo, folder)
    (folder / part).write_bytes((folder / part).read_bytes()[:100])
    (tmp_path / "card.yaml").write_text(
        json.dumps({"name": "own", "repo": str(folder), "size_px": 64, "members": {"base": {}}})
    )
    family = Family(str(tmp_path / "card.yaml"), dtype=torch.float32)
    with pytest.raises(UserError, match="cannot load") as error:
        (family.encode(TEXTS), family.member("base"))
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_the_revision_of_the_family_is_the_bases(cache, tmp_path):
    network(6).save_pretrained(publish(cache, "somebody/pinned", "v2") / "unet")  # and no main
    (tmp_path / "card.yaml").write_text(
        "{name: own, repo: somebody/pinned, revision: v2, members: {base: {}}}"
    )
    net = Family(str(tmp_path / "card.yaml"), dtype=torch.float32).member("base").denoiser.net
    assert torch.equal(net.conv_in.weight, network(6).conv_in.weight)


def test_the_dtype_is_that_of_the_device_where_none_is_given():
    assert Family("tiny").dtype == torch.float32
    assert fast_dtype(torch.device("cuda")) == torch.bfloat16
