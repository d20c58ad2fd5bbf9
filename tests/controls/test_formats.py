"""Formats: a control comes back from every layout with the strength it had, and diffusers reads what we
write.
"""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_unet_checkpoint,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from support.commands import called, ran, refused
from support.foreign import FOREIGN, change, same
from support.network import network, trained

from configs import ROOT, UserError
from controls import convert, formats, info, merge, picture_grid, show
from controls.formats import layouts
from controls.lora import Card, Control, attach, detach, strength
from models.families import Family
from models.sampler import alone, draw_noise, finish

SMILE = ROOT / "controls/tiny/smile.safetensors"


@pytest.fixture(scope="module")
def net():
    return network()


@pytest.fixture(scope="module")
def control(net):
    return trained(net, "smile", 1, layers="full", rank=4, alpha=3.0)


def kohya(control: Control, spell) -> dict[str, torch.Tensor]:
    """The published key rules: lora_unet_ + the name with underscores, down, up, scalar alpha."""
    found = {}
    for layer in change(control):
        stem = f"lora_unet_{spell(layer).replace('.', '_')}"
        a, b = (control.tensors[layer + half] for half in formats.HALVES)
        found |= {
            f"{stem}.lora_down.weight": a,
            f"{stem}.lora_up.weight": b,
            f"{stem}.alpha": torch.tensor(control.card.alpha),
        }
    return found


def test_kohya_comes_back_as_it_went(tmp_path, net, control):
    formats.save_kohya(control, tmp_path / "k.safetensors")
    back = formats.adopt(tmp_path / "k.safetensors", net, FOREIGN)
    assert back.card == control.card and same(change(back), change(control))
    with pytest.raises(UserError, match=r"kohya with diffusers names.*controls\.convert"):
        formats.load(tmp_path / "k.safetensors")


def test_the_original_sliders_pt(tmp_path, net, control):
    torch.save(kohya(control, lambda layer: layer), tmp_path / "old.pt")
    back = formats.adopt(tmp_path / "old.pt", net, FOREIGN)
    assert back.card.name == "foreign" and (back.card.rank, back.card.alpha) == (4, 3.0)
    assert same(change(back), change(control))


def test_sgm_names_as_diffusers_reads_them(tmp_path, net, control):
    """diffusers' own converter turns our SGM spelling into the layers that we mean."""
    names = {layers[0]: theirs for theirs, layers in layouts._sgm(net).items()}
    assert names.keys() >= set(change(control))
    theirs = kohya(control, names.get)
    save_file(theirs, tmp_path / "sgm.safetensors")
    assert same(change(formats.adopt(tmp_path / "sgm.safetensors", net, FOREIGN)), change(control))
    attention = {key: value for key, value in theirs.items() if "attn" in key}
    converted, _ = StableDiffusionXLLoraLoaderMixin.lora_state_dict(dict(attention), unet_config=net.config)
    old = {
        key.removeprefix("unet.").split("_lora.")[0].replace(".processor", "").replace("to_out", "to_out.0")
        for key in converted
    }
    layers = {layer.split(".lora")[0] for layer in old}
    assert layers == {layer for layer in change(control) if "attn" in layer}


@pytest.mark.parametrize("changes", [{}, {"use_linear_projection": False}, {"layers_per_block": 2}])
def test_sgm_names_as_diffusers_reads_checkpoints(changes):
    """diffusers' reader of Stability's checkpoints puts the weight of every layer, of all kinds, where our
    table says.
    """
    net = network(**changes)
    names = {layers[0]: theirs for theirs, layers in layouts._sgm(net).items()}
    weights = {key: value for key, value in net.state_dict().items() if key.rsplit(".", 1)[0] in names}
    theirs = {
        f"model.diffusion_model.{names[key.rsplit('.', 1)[0]]}.{key.rsplit('.', 1)[1]}": value
        for key, value in weights.items()
    }
    back = convert_ldm_unet_checkpoint(theirs, dict(net.config))
    assert names.keys() == layouts.named_layers(net).keys() and back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)


def test_other_tools_and_mixed_ranks(tmp_path, net, control):
    """Each layer with a rank and an alpha of its own, in ai-toolkit's spelling."""
    tensors, wanted = {}, {}
    for k, layer in enumerate(sorted(change(control))):
        rank, alpha, (a, b) = (
            1 + k % 4,
            1.0 + k % 3,
            (control.tensors[layer + half] for half in formats.HALVES),
        )
        stem = f"diffusion_model.{layer}"
        tensors |= {
            f"{stem}.lora_A.weight": a[:rank],
            f"{stem}.lora_B.weight": b[:, :rank],
            f"{stem}.alpha": torch.tensor(alpha),
        }
        wanted[layer] = alpha / rank * b[:, :rank].double().flatten(1) @ a[:rank].double().flatten(1)
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    save_file(tensors, tmp_path / "mixed.safetensors")
    found = formats.adopt(tmp_path / "mixed.safetensors", net, FOREIGN)
    assert found.card.rank == 4 and same(change(found), wanted)
    formats.save(found, tmp_path / "native.safetensors")
    assert same(change(formats.load(tmp_path / "native.safetensors")), wanted)


def test_plain_diffusers_files_with_and_without_their_header(tmp_path, net, control):
    formats.save(control, tmp_path / "ours.safetensors")
    tensors, header = formats.read(tmp_path / "ours.safetensors")
    save_file(tensors, tmp_path / "header.safetensors", {k: v for k, v in header.items() if k != "card"})
    save_file(tensors, tmp_path / "bare.safetensors")
    assert same(change(formats.adopt(tmp_path / "header.safetensors", net, FOREIGN)), change(control))
    bare = change(formats.adopt(tmp_path / "bare.safetensors", net, FOREIGN))
    assert same(bare, change(control)), "a program that heeds no header has our strength too"


def test_a_header_decides_strength_as_peft_reads_it(tmp_path, net, control):
    """An alpha for some layers by the end of their names, and rsLoRA's alpha / sqrt(rank)."""
    tensors = {f"unet.{key}": value for key, value in control.tensors.items()}
    path, header = (
        tmp_path / "h.safetensors",
        {"unet.r": 4, "unet.lora_alpha": 2, "unet.alpha_pattern": {"to_q": 8}},
    )
    for rslora, factor in ((False, 1.0), (True, 2.0)):
        save_file(tensors, path, {"lora_adapter_metadata": json.dumps({**header, "unet.use_rslora": rslora})})
        found = change(formats.adopt(path, net, FOREIGN))
        wanted = {
            k: v * factor * (8 if k.endswith("to_q") else 2) / control.card.alpha
            for k, v in change(control).items()
        }
        assert same(found, wanted)


def flux(**changes) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    config = {
        "in_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "pooled_projection_dim": 6,
        "axes_dims_rope": (2, 2, 4),
        "guidance_embeds": True,
    }
    return FluxTransformer2DModel(**{**config, **changes})


@pytest.mark.parametrize(
    "spell",
    [
        pytest.param(lambda name: f"lora_unet_{name.replace('.', '_')}", marks=pytest.mark.slow),
        lambda name: f"diffusion_model.{name}",
    ],
)
def test_fluxs_own_names_as_diffusers_reads_checkpoints(tmp_path, spell):
    """diffusers' reader of Flux's checkpoints sends the rows of every layer, within blocks and outside, where
    our table does.
    """
    with torch.device("meta"):  # it knows one width alone, the real one
        net = flux(attention_head_dim=128, num_attention_heads=24, num_layers=1, num_single_layers=1)
    spots, theirs, rng = layouts.named_layers(net), {}, torch.Generator().manual_seed(0)
    names = {
        name: layers for name, layers in layouts._flux(net).items() if "processor" not in name
    }  # XLabs' are other names of the same
    for name, layers in names.items():
        theirs[f"{spell(name)}.lora_A.weight"] = torch.ones(1, spots[layers[0]].weight.shape[1])
        rows = sum(spots[layer].weight.shape[0] for layer in layers)
        theirs[f"{spell(name)}.lora_B.weight"] = torch.randn(rows, 1, generator=rng)
    save_file(theirs, tmp_path / "flux.safetensors")
    weights = {f"{name}.weight": theirs[f"{spell(name)}.lora_B.weight"] for name in names}
    norms = ["double_blocks.0.img_attn.norm", "double_blocks.0.txt_attn.norm", "single_blocks.0.norm"]
    scales = {f"{norm}.{part}_norm.scale": torch.ones(1) for norm in norms for part in ("query", "key")}
    biases = {key.replace(".weight", ".bias"): value for key, value in weights.items()}
    converted = convert_flux_transformer_checkpoint_to_diffusers({**weights, **biases, **scales})
    control = formats.adopt(tmp_path / "flux.safetensors", net, FOREIGN)
    assert {layer for layers in names.values() for layer in layers} == set(spots) == set(change(control))
    assert all(
        torch.equal(control.tensors[f"{layer}.lora_B.weight"], converted[f"{layer}.weight"])
        for layer in spots
    )


def test_a_control_of_all_of_flux_in_diffusers_is_ours(tmp_path):
    """Also one of layers outside the blocks alone, which no longer tell by their names that they are a
    transformer's.
    """
    net, rng = flux().requires_grad_(False), torch.Generator().manual_seed(0)
    x, text, ids = (
        torch.randn(1, 4, 4, generator=rng),
        torch.randn(1, 3, 12, generator=rng),
        torch.zeros(4, 3),
    )
    told = {
        "encoder_hidden_states": text,
        "pooled_projections": torch.ones(1, 6),
        "timestep": torch.ones(1),
        "guidance": torch.ones(1),
        "img_ids": ids,
        "txt_ids": ids[:3],
    }
    parts = dict.fromkeys(["scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    for k, layers in enumerate((sorted(layouts.named_layers(net)), ["norm_out.linear", "x_embedder"])):
        shapes = {layer: layouts.named_layers(net)[layer].weight.shape for layer in layers}
        tensors = {
            f"{layer}.lora_A.weight": torch.randn(2, n, generator=rng) for layer, (_, n) in shapes.items()
        }
        tensors |= {
            f"{layer}.lora_B.weight": 0.1 * torch.randn(n, 2, generator=rng)
            for layer, (n, _) in shapes.items()
        }
        control = Control(Card("lora", f"flux-{k}", "flux", "dev", 2, 1.0, "full", "c3lier"), tensors)
        formats.save(control, tmp_path / "flux.safetensors")
        attach(net, control)
        with strength(net, {f"flux-{k}": 1.0}):
            ours = net(x, **told).sample
        detach(net)
        pipe = FluxPipeline(**parts, transformer=flux())
        pipe.load_lora_weights(tmp_path / "flux.safetensors")
        theirs = pipe.transformer(x, **told).sample
        assert torch.allclose(theirs, ours, atol=1e-5) and not torch.allclose(
            net(x, **told).sample, ours, atol=1e-2
        )


def test_flux_fused(tmp_path):
    """One low-rank pair for queries, keys and values together becomes one each, with its rows."""
    net, rng = flux(), torch.Generator().manual_seed(0)
    width, a = 16, torch.randn(2, 16, generator=rng)
    qkv, linear1 = (
        torch.randn(3 * width, 2, generator=rng),
        torch.randn(3 * width + 4 * width, 2, generator=rng),
    )
    stems = {"lora_unet_double_blocks_1_img_attn_qkv": qkv, "lora_unet_single_blocks_0_linear1": linear1}
    save_file(
        {
            key: value
            for stem, b in stems.items()
            for key, value in {
                f"{stem}.lora_down.weight": a.clone(),
                f"{stem}.lora_up.weight": b,
                f"{stem}.alpha": torch.tensor(1.0),
            }.items()
        },
        tmp_path / "flux.safetensors",
    )
    found = change(formats.adopt(tmp_path / "flux.safetensors", net, FOREIGN))
    joined = torch.cat([found[f"transformer_blocks.1.attn.to_{x}"] for x in "qkv"])
    assert torch.allclose(joined, (0.5 * qkv @ a).double(), atol=1e-6)
    parts = [*(f"attn.to_{x}" for x in "qkv"), "proj_mlp"]
    joined = torch.cat([found[f"single_transformer_blocks.0.{x}"] for x in parts])
    assert torch.allclose(joined, (0.5 * linear1 @ a).double(), atol=1e-6)


def test_original_flux_sliders_and_the_transformers_export(tmp_path):
    net, rng = flux(), torch.Generator().manual_seed(0)
    stem, a, b = (
        "lora_unet_transformer_blocks_0_attn_to_q",
        torch.randn(2, 16, generator=rng),
        torch.randn(16, 2, generator=rng),
    )
    tensors = {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "old.safetensors")
    control = formats.adopt(tmp_path / "old.safetensors", net, FOREIGN)
    assert torch.allclose(
        change(control)["transformer_blocks.0.attn.to_q"], (0.5 * b @ a).double(), atol=1e-6
    )
    formats.save_kohya(control, tmp_path / "new.safetensors")
    written = load_file(tmp_path / "new.safetensors")
    key = "transformer.transformer_blocks.0.attn.to_q.lora_B.weight"
    assert torch.allclose(written[key], 0.5 * b) and len(written) == 2
    for back in (
        formats.load(tmp_path / "new.safetensors"),
        formats.adopt(tmp_path / "new.safetensors", net, FOREIGN),
    ):
        assert same(change(back), change(control))


def test_kohyas_file_in_diffusers_is_ours(tmp_path):
    control = formats.load(SMILE)
    formats.save_kohya(control, tmp_path / "k.safetensors")
    pipe = DiffusionPipeline.from_pretrained(ROOT / "models/tiny/weights/base")
    pipe.set_progress_bar_config(disable=True)
    theirs = []
    for file in (tmp_path / "k.safetensors", SMILE):
        pipe.load_lora_weights(file, adapter_name="smile")
        theirs.append(
            pipe(
                ["portrait of a person"],
                height=64,
                width=64,
                num_inference_steps=10,
                guidance_scale=3.0,
                output_type="latent",
                generator=[torch.Generator().manual_seed(1)],
            ).images
        )
        pipe.unload_lora_weights()
    assert torch.allclose(*theirs, rtol=0, atol=1e-5)
    family = Family("tiny")
    member = family.member("base")
    attach(member.denoiser.net, control, family="tiny")
    noise = draw_noise([1], family.latent_shape, len(member.levels))
    with torch.no_grad(), strength(member.denoiser.net, smile=1.0):
        ours = finish(alone(member), noise, family.encode(["portrait of a person"]))
    detach(member.denoiser.net)
    assert (ours - theirs[0]).abs().max() < 1e-4  # another order of the same sums, over 10 steps


def test_keys_without_a_place_are_named(tmp_path, net, control):
    theirs = kohya(control, lambda layer: layer)
    odd = {f"lora_te1_text_model_{k}.lora_down.weight": torch.zeros(1, 1) for k in range(5)}
    save_file({**theirs, **odd}, tmp_path / "odd.safetensors")
    with pytest.raises(
        UserError, match=r"5 of .* layers are text encoders.*encoders=ignore.*lora_te1_text_model_0"
    ):
        formats.adopt(tmp_path / "odd.safetensors", net, FOREIGN)
    elsewhere = {f"lora_unet_elsewhere_{k}.lora_down.weight": torch.zeros(1, 1) for k in range(5)}
    save_file({**theirs, **elsewhere}, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match=r"odd.safetensors: 5 of .*no place.*elsewhere_0.*_1.*_2 …"):
        formats.adopt(tmp_path / "odd.safetensors", net, FOREIGN)
    half = dict(list(kohya(control, lambda layer: layer).items())[:1])
    save_file(half, tmp_path / "half.safetensors")
    with pytest.raises(UserError, match="only one half"):
        formats.adopt(tmp_path / "half.safetensors", net, FOREIGN)


A, B = torch.zeros(2, 4, 3, 3), torch.zeros(32, 2, 1, 1)  # of conv_in


@pytest.mark.parametrize(
    ("a", "b", "alpha", "says"),
    [
        (A, B[:, :1], None, "different ranks"),
        (A[:0], B[:, :0], None, "different ranks"),
        (A, torch.zeros(32), None, "different ranks"),
        (A, B, torch.ones(2), "different ranks"),
        (A, B[:5], None, "rows"),
        (A.view(2, 9, 2, 2), B, None, "another shape"),
    ],
)
def test_malformed_pairs_get_one_line(tmp_path, net, a, b, alpha, says):
    tensors = {"lora_down.weight": a, "lora_up.weight": b} | ({} if alpha is None else {"alpha": alpha})
    save_file(
        {f"lora_unet_conv_in.{key}": value.contiguous() for key, value in tensors.items()},
        tmp_path / "bad.safetensors",
    )
    refused(lambda: formats.adopt(tmp_path / "bad.safetensors", net, FOREIGN), says)


@pytest.mark.parametrize(
    "header",
    ["[1", "3", '{"unet.r": 2}', '{"unet.r": 2, "unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 1}}'],
)
def test_a_header_that_hides_alpha_is_refused(tmp_path, net, header):
    save_file(
        {"unet.conv_in.lora_A.weight": A, "unet.conv_in.lora_B.weight": B},
        tmp_path / "h.safetensors",
        {"lora_adapter_metadata": header},
    )
    with pytest.raises(UserError, match="alpha of this file"):
        formats.adopt(tmp_path / "h.safetensors", net, FOREIGN)


@pytest.mark.parametrize("content", [b"", b"hello world", b"PK\x03\x04xx", b"\x80\x02."])
def test_a_damaged_pt_gets_one_line(tmp_path, content):
    (tmp_path / "bad.pt").write_bytes(content)
    refused(lambda: formats.read(tmp_path / "bad.pt"), "damaged")


class Trap:
    def __reduce__(self):
        return exec, ("raise SystemExit('sprung')",)


def test_a_pt_that_would_run_code_is_refused(tmp_path):
    torch.save({"a": Trap()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="plain tensors"):
        formats.read(tmp_path / "evil.pt")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    torch.save({1: torch.zeros(1)}, tmp_path / "numbers.pt")
    torch.save({}, tmp_path / "empty.pt")
    for name in ("list", "numbers"):
        with pytest.raises(UserError, match="no flat dict"):
            formats.read(tmp_path / f"{name}.pt")
    with pytest.raises(UserError, match="no layers"):
        formats.adopt(tmp_path / "empty.pt", network(), FOREIGN)


def test_merging_a_control_with_itself_gives_it_back():
    smile = formats.load(SMILE)
    merged, lost, overall = merge.merge([smile, smile], [0.5, 0.5], 4, "same")
    assert max(lost.values()) < 1e-6 and overall < 1e-6
    ours, theirs = change(merged), change(smile)
    assert all(torch.allclose(ours[layer], theirs[layer], atol=1e-6) for layer in theirs)


def test_merging_at_full_rank_is_the_sum_and_at_less_the_best():
    smile, age = (formats.load(ROOT / f"controls/tiny/{name}.safetensors") for name in ("smile", "age"))
    merged, lost, _ = merge.merge([smile, age], [1.0, -0.5], 0, "both")
    ours, a, b = change(merged), change(smile), change(age)
    assert merged.card.rank == 8 and max(lost.values()) < 1e-6
    assert all(torch.allclose(ours[layer], a[layer] - 0.5 * b[layer], atol=1e-6) for layer in ours)
    small, lost, overall = merge.merge([smile, age], [1.0, -0.5], 2, "small")

    def norm(changes):
        return sum(moved.square().sum() for moved in changes.values()) ** 0.5

    missing = {layer: moved - ours[layer] for layer, moved in change(small).items()}
    assert overall == pytest.approx((norm(missing) / norm(ours)).item(), rel=1e-4)
    layer = max(lost, key=lost.get)
    values = torch.linalg.svdvals(a[layer] - 0.5 * b[layer])
    assert lost[layer] == pytest.approx((values[2:].norm() / values.norm()).item(), rel=1e-4)


def test_the_commands(tmp_path):
    described = ran(called(info, SMILE))
    assert "slider smile" in described and "73, 28 of attention" in described
    assert formats.load(SMILE).card.base_hash[:12] in described
    ran(called(convert, SMILE, tmp_path / "k.safetensors", "format=kohya"))
    ran(called(convert, tmp_path / "k.safetensors", tmp_path / "b.safetensors"))
    assert same(change(formats.load(tmp_path / "b.safetensors")), change(formats.load(SMILE)))
    ran(called(info, "--help"))
    assert "kohya" in ran(called(info, tmp_path / "k.safetensors"))
    ran(called(merge, SMILE, SMILE, tmp_path / "m.safetensors", "rank=4"))
    assert formats.load(tmp_path / "m.safetensors").card.name == "merged"
    ran(called(show, SMILE, SMILE, "member=tiny/dmd", "scales=[0,1]", f"out={tmp_path}/two.png"))
    page = np.asarray(Image.open(tmp_path / "two.png").convert("RGB")).astype(int)
    top, left = picture_grid.TOP_PX, picture_grid.LEFT_PX
    first, second = page[top : top + 128, left:], page[top + 128 :, left:]
    assert (
        first.shape == second.shape == (128, 256, 3)
        and (first == second).all()
        and abs(first[:, :128] - first[:, 128:]).max() > 100
    )


@pytest.mark.parametrize(
    ("module", "words", "says"),
    [
        (info, ["nothing.safetensors"], "no control file"),
        (info, [], "say which file"),
        (convert, [SMILE, "x.safetensors", "format=zip"], "kohya"),
        (convert, [SMILE], "IN OUT"),
        (convert, [SMILE, "x", "fromat=kohya"], "format"),
        (show, [], "which controls"),
        (show, [SMILE, "member=tiny/hyper"], "lightning"),
        (merge, [SMILE, SMILE, "x", "weights=[1]"], "as many weights"),
        (merge, [SMILE], "A B OUT"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(module, words, says, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refused(called(module, *words), says)
    assert not list(tmp_path.iterdir())
