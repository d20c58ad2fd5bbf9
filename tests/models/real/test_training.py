"""The real families: a control trained on base and student, saved, reloaded, attached; deltas; analyses."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from support import hub
from support.real import ALIKE, DELTA, MEMBERS, NAMES, SEEDS, STUDENTS, TEXTS, TRAINED, TWINS, latents, slow

from analysis import similarity, transfer
from analysis.pages.similarity import of
from configs import UserError, merge
from controls import formats
from controls.formats import layouts
from controls.lora import attach, detach, fused, strength
from models.blocks import blocks
from models.cards import card
from models.families import Family
from models.sampler import alone, draw_noise, finish
from train import slider


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
        [*((name, card(name).base) for name in NAMES), ("sdxl", DELTA)],
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
    """LoRA students, guidance given to the network, x0 predicted, one step."""
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


def test_a_delta_shares_the_network_of_its_base_and_leaves_it_as_it_was(families):
    family = families("sdxl")
    base, student = family.member("base"), family.member(DELTA)
    assert student.denoiser.net is base.denoiser.net
    fresh = Family(str(family.path), dtype=torch.float32)
    plain = latents(fresh, "base")
    assert not torch.allclose(latents(family, DELTA), latents(family, "lightning"))
    assert torch.equal(latents(family, "base"), plain)  # also right after its student ran
    assert base.denoiser.net.state_dict().keys() == fresh.member("base").denoiser.net.state_dict().keys()


def test_the_strength_of_a_delta_is_a_dial_also_per_step(families):
    family = families("sdxl")
    student, conditioning = family.member(DELTA), family.encode(TEXTS)
    noise = draw_noise(SEEDS, family.latent_shape, 4)

    def drawn(dial) -> torch.Tensor:
        turned = replace(student, denoiser=replace(student.denoiser, lora_scale=dial))
        with torch.no_grad():
            return finish(alone(turned), noise, conditioning)

    off = drawn(0.0)
    bare = replace(
        family.member("base"), levels=student.levels, guidance=None, final=student.final, start=student.start
    )
    with torch.no_grad():
        assert torch.equal(off, finish(alone(bare), noise, conditioning))
    assert torch.equal(drawn(lambda level: 1.0), drawn(1.0)) and torch.equal(drawn(lambda level: 0.0), off)
    only_first = drawn(lambda level: float(level.t > 900))
    assert not torch.allclose(only_first, off) and not torch.allclose(only_first, drawn(1.0))


def test_a_control_acts_on_a_delta_as_on_weights_with_the_delta_in_them(families, tmp_path):
    """Attached, merged and taken out again, with the delta beside it."""
    family = families("sdxl")
    student, plain = family.member(DELTA), latents(family, DELTA)
    control = formats.load(trained(family, "base", tmp_path))
    with fused(student.denoiser.net, control, 1.0, "sdxl"):
        merged = latents(family, DELTA)
    attach(student.denoiser.net, control, "mine", "sdxl")
    with strength(student.denoiser.net, mine=1.0):
        beside = latents(family, DELTA)
    detach(student.denoiser.net)
    assert (beside - merged).abs().max() < 1e-3 * plain.abs().max() < (merged - plain).abs().max() * 10
    assert torch.equal(latents(family, DELTA), plain)
