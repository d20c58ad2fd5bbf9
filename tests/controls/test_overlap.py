"""Controls in weights against dense matrices; networks' blocks, recorded and stitched."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel

from analysis.images import directions
from configs import ROOT, UserError
from controls import formats, overlap
from controls.lora import Control, fused
from models.blocks import blocks, coarse, recording, stitched
from models.families import Family

SMILE, CRAYON = (formats.load(ROOT / f"controls/tiny/{name}.safetensors") for name in ("smile", "crayon"))


@pytest.fixture(scope="module")
def family():
    return Family("tiny")


@pytest.fixture(scope="module")
def call(family):
    """A function of a network: what it says of two latents."""
    torch.manual_seed(0)
    x, told = (
        torch.randn(2, *family.latent_shape),
        family.encode(["portrait of a person", "portrait of a person, hat"]),
    )
    added = {"text_embeds": told.pooled, "time_ids": told.size}
    return torch.no_grad()(lambda net: net(x, torch.tensor(500), told.tokens, added_cond_kwargs=added).sample)


def dense(control: Control) -> dict[str, torch.Tensor]:
    names = sorted({key.rsplit(".lora_", 1)[0] for key in control.tensors})
    strength = control.card.alpha / control.card.rank
    halves = {n: [control.tensors[f"{n}.lora_{h}.weight"].double().flatten(1) for h in "BA"] for n in names}
    return {name: strength * b @ a for name, (b, a) in halves.items()}


def mixed(control: Control, seed: int = 0) -> Control:
    """The same ΔW by other halves: an invertible matrix passed between A and B."""
    rng, tensors = torch.Generator().manual_seed(seed), dict(control.tensors)
    for name in {key.rsplit(".lora_", 1)[0] for key in tensors}:
        a, b = tensors[f"{name}.lora_A.weight"].double(), tensors[f"{name}.lora_B.weight"].double()
        m = torch.randn(len(a), len(a), generator=rng, dtype=torch.float64) + 2 * torch.eye(len(a))
        tensors[f"{name}.lora_A.weight"] = torch.einsum("ij,j...->i...", m, a)
        tensors[f"{name}.lora_B.weight"] = torch.einsum("oj...,ji->oi...", b, torch.linalg.inv(m))
    return Control(control.card, tensors)


def test_factors_are_the_dense_change():
    full = dense(SMILE)
    for name, low in overlap.factors(SMILE).items():
        assert torch.allclose(low.u * low.s @ low.v.mT, full[name], atol=1e-12)
    assert overlap.norm(overlap.factors(SMILE)) == pytest.approx(
        sum(float((w**2).sum()) for w in full.values()) ** 0.5
    )


def test_the_cosine_is_the_dense_one_and_ignores_how_the_halves_are_mixed():
    other = formats.load(ROOT / "controls/tiny/smile-dmd.safetensors")
    a, b = dense(SMILE), dense(other)
    flat = [torch.cat([side[name].flatten() for name in sorted(a.keys() & b.keys())]) for side in (a, b)]
    expected = float(torch.dot(*flat) / (flat[0].norm() * flat[1].norm()))
    assert overlap.cosine(overlap.factors(SMILE), overlap.factors(other)) == pytest.approx(
        expected, abs=1e-10
    )
    assert overlap.cosine(overlap.factors(SMILE), overlap.factors(mixed(SMILE))) == pytest.approx(1, abs=1e-9)
    far = replace(SMILE, card=replace(SMILE.card, alpha=-3.0))
    assert overlap.cosine(overlap.factors(SMILE), overlap.factors(far)) == pytest.approx(-1, abs=1e-9)


def test_subspaces_are_all_their_own_and_at_chance_when_random():
    own = overlap.subspaces(overlap.factors(SMILE), overlap.factors(mixed(SMILE)))
    assert own["in"] == pytest.approx(1) and own["out"] == pytest.approx(1)

    def random(rank: int, seed: int) -> Control:
        rng = torch.Generator().manual_seed(seed)
        halves = {"A": (rank, 90), "B": (60, rank)}
        tensors = {
            f"l{i}.lora_{h}.weight": torch.randn(shape, generator=rng)
            for i in range(200)
            for h, shape in halves.items()
        }
        return Control(replace(SMILE.card, rank=rank, alpha=1.0), tensors)

    found = overlap.subspaces(overlap.factors(random(4, 0)), overlap.factors(random(6, 1)))
    assert found["chance_in"] == pytest.approx(6 / 90) and found["chance_out"] == pytest.approx(6 / 60)
    assert found["in"] == pytest.approx(6 / 90, rel=0.1) and found["out"] == pytest.approx(6 / 60, rel=0.1)
    assert overlap.subspaces(overlap.factors(SMILE), {}) is None


def test_a_shared_random_start_is_told_from_a_shared_concept():
    names = ("smile", "smile-dmd", "age", "space-1", "space-2")
    cells = directions.overlaps([formats.load(ROOT / f"controls/tiny/{name}.safetensors") for name in names])
    found = {(c["one"], c["two"]): c for c in cells}
    twins, others, spaces = found["smile", "smile-dmd"], found["smile", "age"], found["space-1", "space-2"]
    assert (
        twins["same"]
        and twins["same_start"]
        and others["same_start"]
        and not others["same"]
        and not spaces["same_start"]
    )
    assert twins["cosine"] > 0.3 > 0.1 > abs(others["cosine"])
    assert others["in"] > 0.5 > 10 * others["chance_in"]  # the start's doing, not the concept's
    assert spaces["in"] < 0.05


def test_a_control_beside_the_delta_is_that_of_dense_matrices(family):
    base, student = (family.member(name).denoiser.net for name in ("base", "dmd"))
    low, full = overlap.factors(CRAYON), dense(CRAYON)
    changed = overlap.delta(base, student, list(low))
    found = overlap.against_delta(low, changed)
    a, d = (torch.cat([side[name].double().flatten() for name in sorted(full)]) for side in (full, changed))
    assert found["cosine"] == pytest.approx(float(a @ d / a.norm() / d.norm()), abs=1e-9)
    assert found["size"] == pytest.approx(float(a.norm() / d.norm()))
    read = sum(
        float((changed[n].double() @ torch.linalg.pinv(w) @ w).square().sum()) for n, w in full.items()
    )
    assert found["in"] == pytest.approx(read / float(d @ d), abs=1e-9)
    # a control that is the delta's best low-rank part points along it and reads far more of it than chance
    u, s, vh = zip(*(torch.linalg.svd(changed[n].double(), full_matrices=False) for n in full), strict=True)
    best = {n: overlap.Low(u[i][:, :8], s[i][:8], vh[i][:8].mT) for i, n in enumerate(full)}
    along = overlap.against_delta(best, changed)
    assert along["cosine"] == pytest.approx(along["in"] ** 0.5) and along["in"] > 2 * along["chance_in"]
    assert overlap.change(base, base, "mid_block") == 0 and overlap.change(base, student, "mid_block") > 0


def test_recorded_blocks_are_what_the_blocks_return(family, call):
    net = family.member("base").denoiser.net
    names = blocks(net)
    assert names[0] == "down_blocks.0.resnets.0" and names[-1] == "up_blocks.2.resnets.1" and len(names) == 18
    assert (
        names.index("mid_block.resnets.0")
        < names.index("mid_block.attentions.0")
        < names.index("mid_block.resnets.1")
    )
    kept = {}
    hook = net.mid_block.register_forward_hook(lambda m, i, o: kept.update(out=o))
    bare = call(net)
    hook.remove()
    with recording(net, blocks(net, "blocks"), grid=4) as seen:
        assert torch.equal(call(net), bare)
    assert torch.equal(seen["mid_block"], kept["out"]) and seen["down_blocks.0"].shape == (2, 48, 4, 4)
    assert not any(module._forward_hooks for module in net.modules())
    with pytest.raises(UserError, match="blocks, parts"):
        blocks(net, "layers")
    with pytest.raises(UserError, match="has no parts"):
        blocks(torch.nn.Linear(2, 2))


def flux() -> FluxTransformer2DModel:
    sizes = {
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 8,
        "pooled_projection_dim": 8,
    }
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=1, axes_dims_rope=[4, 2, 2], **sizes
    )


@torch.no_grad()
def flux_call(net) -> torch.Tensor:
    ids = torch.zeros(16, 3)
    ids[:, 1], ids[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    gen = torch.Generator().manual_seed(0)
    x, text, pooled = (torch.randn(shape, generator=gen) for shape in ((2, 16, 4), (2, 3, 8), (2, 8)))
    return net(
        hidden_states=x,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=torch.full((2,), 0.5),
        img_ids=ids,
        txt_ids=torch.zeros(3, 3),
    ).sample


def test_transformers_give_the_image_tokens_of_every_block():
    net = flux().eval()
    names = blocks(net)
    assert names == ["transformer_blocks.0", "transformer_blocks.1", "single_transformer_blocks.0"]
    with recording(net, names, grid=4) as seen:
        out = flux_call(net)
    assert all(seen[name].shape == (2, 16, 4, 4) for name in names)  # 16 image tokens as a map, not 3 of text
    last = seen["single_transformer_blocks.0"].flatten(2).mT
    assert out.shape == (2, 16, 4) and torch.isfinite(last).all()
    pix = PixArtTransformer2DModel(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        in_channels=4,
        sample_size=8,
        caption_channels=8,
    )
    assert blocks(pix, "blocks") == ["transformer_blocks.0", "transformer_blocks.1"]


def test_coarse_maps_average_positions():
    tokens = torch.arange(2 * 16 * 3.0).view(2, 16, 3)
    assert torch.equal(coarse(tokens, 4), tokens.mT.unflatten(-1, (4, 4)))
    assert torch.allclose(coarse(tokens, 1)[..., 0, 0], tokens.mean(1))
    assert coarse(tokens[:, :12], 2).shape == (2, 3, 2, 2)
    assert coarse(torch.randn(2, 5, 8, 8).bfloat16(), 2).dtype == torch.float32


def test_a_network_stitched_to_itself_is_itself_and_others_stay_as_they_are(family, call):
    base, student = (family.member(name).denoiser.net for name in ("base", "dmd"))
    before = [call(base), call(student)]
    assert torch.equal(call(stitched(base, base)), before[0])
    both = stitched(base, student)
    assert (
        both.down_blocks is base.down_blocks
        and both.mid_block is base.mid_block
        and both.up_blocks is student.up_blocks
    )
    assert not torch.allclose(call(both), before[0], atol=1e-3) and not torch.allclose(
        call(both), before[1], atol=1e-3
    )
    assert torch.equal(call(base), before[0]) and torch.equal(call(student), before[1])
    # by hand: a copy of the base with the student's up half
    copied = copy.deepcopy(base)
    for part in ("up_blocks", "conv_norm_out", "conv_out"):
        getattr(copied, part).load_state_dict(getattr(student, part).state_dict())
    assert torch.equal(call(both), call(copied))
    a, b = flux().eval(), flux().eval()
    with torch.no_grad():
        assert torch.equal(flux_call(stitched(a, a)), flux_call(a))
    joined = stitched(a, b)
    assert joined.transformer_blocks[1] is a.transformer_blocks[1] and joined.proj_out is b.proj_out
    with pytest.raises(UserError, match="same blocks"):
        stitched(base, a)


def test_recording_sees_a_control(family, call):
    net = family.member("base").denoiser.net
    with recording(net, ["mid_block"]) as seen:
        call(net)
        bare = seen["mid_block"]
        with fused(net, SMILE, 1.0, "tiny"):
            call(net)
    assert not torch.allclose(seen["mid_block"], bare, atol=1e-4)
