"""Layouts: every tool's names, algorithms and headers are read exactly, or refused by the right word."""

import json
import sys

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_krea2_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
    convert_z_image_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import save_file
from support import hub
from support.foreign import FOREIGN, change, same
from support.network import network, trained

from configs import UserError
from controls import convert, formats, info, merge
from controls.formats import headers, layouts
from controls.formats.algorithms import MOST_RANK
from controls.layers import layer_set, targets
from controls.lora import Card

Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"  # 32 by 32
CONV = "down_blocks.1.resnets.0.conv1"  # 32 by 32 by 3 by 3
FLAT, ENCODER = f"lora_unet_{Q.replace('.', '_')}", "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"


@pytest.fixture(scope="module")
def net():
    return network()


@pytest.fixture
def adopt(tmp_path, net):
    """Reads tensors as a file of theirs."""

    def read(tensors, header=None, net=net, name="x.safetensors", card=FOREIGN, **options):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / name, header)
        return formats.adopt(tmp_path / name, net, card, **options)

    return read


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def pair(
    stem: str, size: int = 32, rank: int = 4, alpha: float | None = 4.0, halves=("lora_down", "lora_up")
) -> dict[str, torch.Tensor]:
    found = {
        f"{stem}.{halves[0]}.weight": random(rank, size),
        f"{stem}.{halves[1]}.weight": random(size, rank),
    }
    return found | ({} if alpha is None else {f"{stem}.alpha": torch.tensor(alpha)})


def bare(stem: str) -> dict[str, torch.Tensor]:
    return pair(stem, alpha=None, halves=("lora_A", "lora_B"))


def test_the_tables_shapes(net):
    spots = layouts.named_layers(net)
    assert spots[Q].weight.shape == (32, 32) and spots[CONV].weight.shape == (32, 32, 3, 3)


# names


def fused(net, names: dict[str, tuple[str, ...]]) -> dict[str, torch.Tensor]:
    """A rank-1 LoRA of all layers under other names, A of ones: B is what it adds to every column."""
    spots, rng = layouts.named_layers(net), torch.Generator().manual_seed(0)
    rows = {name: sum(spots[layer].weight.shape[0] for layer in layers) for name, layers in names.items()}
    found = {f"{name}.lora_B.weight": torch.randn(rows[name], 1, generator=rng) for name in names}
    return found | {
        f"{name}.lora_A.weight": torch.ones(1, *spots[layers[0]].weight.shape[1:])
        for name, layers in names.items()
    }


# the own names of a kind's code, and diffusers' reader of checkpoints in them
NAMES = {
    "sd3": (layouts._sd3, convert_sd3_transformer_checkpoint_to_diffusers),
    "zimage": (layouts._zimage, convert_z_image_transformer_checkpoint_to_diffusers),
    "flux2": (layouts._flux, convert_flux2_transformer_checkpoint_to_diffusers),
    "krea2": (layouts._krea2, convert_krea2_transformer_checkpoint_to_diffusers),
}


@pytest.mark.parametrize(
    "spell", [lambda name: f"lora_unet_{name.replace('.', '_')}", lambda name: f"diffusion_model.{name}"]
)
@pytest.mark.parametrize("kind", NAMES)
def test_other_transformers_own_names_as_diffusers_reads_checkpoints(adopt, kind, spell):
    net = hub.transformer(kind, 0)
    own, convert_checkpoint = NAMES[kind]
    names = {name: layers for name, layers in own(net).items() if ".processor." not in name}
    renamed = {layer for layers in names.values() for layer in layers}
    names |= {layer: (layer,) for layer in layouts.named_layers(net) if layer not in renamed}
    theirs = fused(net, names)
    stems = {key: key.rsplit(".lora_", 1) for key in theirs}
    control = adopt(
        {f"{spell(stem)}.lora_{half}": theirs[key] for key, (stem, half) in stems.items()}, net=net
    )
    weights = {f"{name}.weight": theirs[f"{name}.lora_B.weight"] for name in names}
    if kind == "sd3":
        blank = {
            f"{name}.bias": value for name, value in ((key[:-7], value) for key, value in weights.items())
        }
        norms = {
            f"joint_blocks.{k}.{half}.attn.ln_{x}.weight": torch.ones(1)
            for k in (0, 1)
            for half in ("x_block", "context_block")
            for x in "qk"
        }
        weights |= {**blank, **norms, "pos_embed": torch.ones(1)}
    converted = convert_checkpoint(weights)
    spots = layouts.named_layers(net)
    assert set(change(control)) == set(spots)
    assert all(
        torch.equal(control.tensors[f"{layer}.lora_B.weight"].flatten(1), converted[f"{layer}.weight"])
        for layer in spots
    )


def test_xlabs_flux_as_diffusers_reads_it(adopt):
    net = hub.transformer("flux", 0)
    names = {name: layers for name, layers in layouts._flux(net).items() if ".processor." in name}
    rows = fused(net, names)
    theirs = {}
    for name in names:
        stem = f"{name[:-1]}_lora{name[-1]}" if name[-1].isdigit() else f"{name}_lora"
        theirs |= {
            f"{stem}.down.weight": rows[f"{name}.lora_A.weight"],
            f"{stem}.up.weight": rows[f"{name}.lora_B.weight"],
        }
    control, converted = adopt(theirs, net=net), _convert_xlabs_flux_lora_to_diffusers(dict(theirs))
    assert {f"transformer.{key}" for key in control.tensors} == converted.keys() and len(names) == 4 + 2 * 2
    assert all(
        torch.equal(control.tensors[key.removeprefix("transformer.")], value)
        for key, value in converted.items()
    )
    assert layouts.layout(list(theirs)) == "XLabs"


@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_attention_processors_of_diffusers_before_0_22(adopt, prefix):
    inside = Q.removesuffix(".to_q")
    theirs = {
        f"{prefix}{inside}.processor.{name}_lora.{half}.weight": random(4, 32)
        if half == "down"
        else random(32, 4)
        for name in ("to_q", "to_k", "to_v", "to_out")
        for half in ("down", "up")
    }
    found = adopt(theirs)
    assert set(change(found)) == {f"{inside}.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")}
    assert all(
        torch.allclose(moved, (random(32, 4) @ random(4, 32)).double(), atol=1e-4)
        for moved in change(found).values()
    )
    assert layouts.layout(list(theirs)) == "diffusers before 0.22"


@pytest.mark.parametrize("prefix", ["lycoris_", "lora_unet_"])
def test_lycoris_prefix(adopt, prefix):
    assert set(change(adopt(pair(FLAT.replace("lora_unet_", prefix))))) == {Q}


@pytest.mark.parametrize("other", ["lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q", f"unet.{Q}"])
def test_a_layer_under_two_spellings_is_refused_by_its_name(adopt, other):
    with pytest.raises(UserError, match=f"{Q}.* twice"):
        adopt({**pair(FLAT), **pair(other)})
    with pytest.raises(UserError, match=f"{FLAT} .*twice"):
        adopt({**pair(FLAT), **pair(FLAT, halves=("lora_A", "lora_B"))})


# algorithms


def weight(control, layer: str) -> torch.Tensor:
    return change(control)[layer]


def test_a_tucker_core_is_its_product(adopt):
    down, mid, up = random(4, 32, 1, 1), random(4, 4, 3, 3), random(32, 4, 1, 1)
    stem = f"lora_unet_{CONV.replace('.', '_')}"
    found = adopt(
        {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_mid.weight": mid,
            f"{stem}.lora_up.weight": up,
            f"{stem}.alpha": torch.tensor(1.0),
        }
    )
    wanted = torch.einsum("op,pqhw,qi->oihw", up[..., 0, 0], mid, down[..., 0, 0]).double().flatten(1) / 4
    assert torch.allclose(weight(found, CONV), wanted, atol=1e-5)


LOKR = {  # parts on a layer of 32 by 32, strength at alpha 3
    "whole": ({"w1": (4, 4), "w2": (8, 8)}, 1.0),
    "second in halves": ({"w1": (4, 4), "w2_a": (8, 2), "w2_b": (2, 8)}, 1.5),
    "both in halves": ({"w1_a": (4, 2), "w1_b": (2, 4), "w2_a": (8, 3), "w2_b": (3, 8)}, 1.0),
}


@pytest.mark.parametrize("case", LOKR)
def test_lokr_is_its_kronecker_product(adopt, case):
    shapes, strength = LOKR[case]
    parts = {key: random(*shape) for key, shape in shapes.items()}
    w1, w2 = (parts.get(w) if w in parts else parts[f"{w}_a"] @ parts[f"{w}_b"] for w in ("w1", "w2"))
    found = adopt(
        {f"{FLAT}.lokr_{key}": value for key, value in parts.items()} | {f"{FLAT}.alpha": torch.tensor(3.0)}
    )
    assert torch.allclose(weight(found, Q), strength * torch.kron(w1, w2).double(), atol=1e-4)


def test_lokr_and_loha_of_convolutions(adopt):
    stem, w1, w2 = f"lora_unet_{CONV.replace('.', '_')}", random(4, 4), random(8, 8, 3, 3)
    found = adopt({f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2": w2})
    wanted = torch.einsum("ab,cdhw->acbdhw", w1, w2).reshape(32, 32 * 9).double()
    assert torch.allclose(weight(found, CONV), wanted, atol=1e-4)
    parts = {"w1_a": random(32, 2), "w1_b": random(2, 288), "w2_a": random(32, 3), "w2_b": random(3, 288)}
    found = adopt(
        {f"{stem}.hada_{key}": value for key, value in parts.items()} | {f"{stem}.alpha": torch.tensor(1.0)}
    )
    wanted = (parts["w1_a"] @ parts["w1_b"]) * (parts["w2_a"] @ parts["w2_b"]) / 2
    assert torch.allclose(weight(found, CONV), wanted.double(), atol=1e-4) and found.card.rank == 6


def parts(kind: str) -> dict[str, torch.Tensor]:
    return {
        "DoRA": {
            "lora_down.weight": random(4, 32),
            "lora_up.weight": random(32, 4),
            "dora_scale": random(32, 1),
        },
        "IA3": {"weight": random(32), "on_input": torch.tensor(True)},
        "OFT": {"oft_blocks": random(4, 8, 8)},
        "GLoRA": {
            "a1.weight": random(4, 32),
            "a2.weight": random(32, 4),
            "b1.weight": random(4, 32),
            "b2.weight": random(32, 4),
        },
        "LoKr with a Tucker core": {
            "lokr_w1": random(4, 4),
            "lokr_t2": random(2, 2, 3, 3),
            "lokr_w2_a": random(2, 8),
        },
        "whole weight": {"weight": random(32, 32)},
        "full difference": {"diff": random(32, 32)},
        "bias's difference": {
            "lora_down.weight": random(4, 32),
            "lora_up.weight": random(32, 4),
            "diff_b": random(32),
        },
        "norm's difference": {"w_norm": random(32)},
        "LoKr of another shape": {"lokr_w1": random(4, 4), "lokr_w2": random(8, 9)},
        "LoKr that are missing": {"lokr_w1": random(4, 4), "lokr_w2_a": random(8, 2)},
        "LoHa that are missing": {
            "hada_w1_a": random(32, 2),
            "hada_w1_b": random(2, 32),
            "hada_w2_a": random(32, 2),
        },
        f"LoHa whose product has rank {18**2}; up to {MOST_RANK}": {
            f"hada_w{k}_{half}": random(32, 18) if half == "a" else random(18, 32)
            for k in (1, 2)
            for half in "ab"
        },
    }[kind]


def test_halves_without_rows_are_no_pair(adopt):
    for stem, end in ((FLAT, ""), (f"lora_unet_{CONV.replace('.', '_')}", "_mid")):
        tensors = {f"{stem}.lora_down.weight": torch.zeros(2, 0), f"{stem}.lora_up.weight": torch.zeros(0, 2)}
        with pytest.raises(UserError, match="halves|rows|lora_mid|another shape"):
            adopt({**tensors, **({f"{stem}.lora{end}.weight": torch.zeros(2, 2, 3, 3)} if end else {})})


@pytest.mark.parametrize(
    "kind",
    [
        "DoRA",
        "IA3",
        "OFT",
        "GLoRA",
        "LoKr with a Tucker core",
        "whole weight",
        "full difference",
        "bias's difference",
        "norm's difference",
        "LoKr of another shape",
        "LoKr that are missing",
        "LoHa that are missing",
        f"LoHa whose product has rank {18**2}; up to {MOST_RANK}",
    ],
)
def test_what_no_pair_holds_is_refused_by_its_name(adopt, kind):
    with pytest.raises(UserError, match=kind) as error:
        adopt({f"{FLAT}.{key}": value for key, value in parts(kind).items()})
    assert "no place" not in str(error.value) and FLAT in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key", [f"{FLAT.replace('to_q', 'to_out_0')}.diff", f"{FLAT}.diff_b", "lora_unet_nowhere_norm1.w_norm"]
)
def test_differences_of_zeros_change_nothing(adopt, key):
    assert set(change(adopt({**pair(FLAT), key: torch.zeros(32)}))) == {Q}


def test_a_dora_that_only_the_header_names(adopt):
    tensors, said = bare(f"unet.{Q}"), {"unet.r": 4, "unet.lora_alpha": 4, "unet.use_dora": True}
    with pytest.raises(UserError, match="DoRA"):
        adopt(tensors, {headers.DIFFUSERS: json.dumps(said)})
    with pytest.raises(UserError, match="DoRA"):
        adopt({**tensors, f"unet.{Q}.lora_magnitude_vector": random(32)})


# PEFT

ADAPTER = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


@pytest.fixture
def peft(adopt, tmp_path):
    def read(config, prefix="base_model.model."):
        (tmp_path / "adapter_config.json").write_text(
            config if isinstance(config, str) else json.dumps(config)
        )
        return adopt(bare(f"{prefix}{Q}"), name="adapter_model.safetensors")

    return read


@pytest.mark.parametrize("prefix", ["unet.", "", "base_model.model.", "unet.base_model.model."])
def test_pefts_alpha_is_beside_the_file(peft, tmp_path, net, prefix):
    found = peft(ADAPTER, prefix)
    assert found.card.alpha / found.card.rank == 2
    assert same(change(formats.adopt(tmp_path, net, FOREIGN)), change(found)), "a folder is its adapter"
    assert peft({**ADAPTER, "use_rslora": True}, prefix).card.alpha == 16
    for pattern, alpha in {"to_q": 1, f"^{Q}": 2, "attn1.to_q": 3, "q": 8, "to_k": 8, "^to_q": 8}.items():
        assert peft({**ADAPTER, "alpha_pattern": {pattern: alpha}}, prefix).card.alpha == alpha


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("no", "adapter_config.json cannot be read"),
        ("[1]", "no mapping"),
        ("[" * 10**5, "too deeply"),
        ({"r": 4}, "no lora_alpha"),
        ({**ADAPTER, "lora_alpha": "x"}, "alpha is x"),
        ({**ADAPTER, "lora_alpha": float("nan")}, "alpha is nan"),
        ({**ADAPTER, "lora_alpha": True}, "alpha is True"),
        ({**ADAPTER, "peft_type": "LOKR"}, "LoKr"),
        ({**ADAPTER, "use_dora": True}, "DoRA"),
        ({**ADAPTER, "init_lora_weights": "pissa_niter_16"}, "changed weights"),
        ({**ADAPTER, "alpha_pattern": {"(a+)+": 1}}, "layer's name"),
        ({**ADAPTER, "alpha_pattern": [1]}, "alpha"),
        ({**ADAPTER, "alpha_pattern": {"to_q": None}}, "alpha is None"),
    ],
)
def test_settings_of_peft_that_hide_the_strength(peft, config, says):
    with pytest.raises(UserError, match=says) as error:
        peft(config)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_an_adapter_without_its_config_is_refused(adopt):
    with pytest.raises(UserError, match="adapter_config.json"):
        adopt(bare(f"base_model.model.{Q}"))


# text encoders, other bases, layer sets


def test_text_encoders_are_counted_and_left_out_on_request(adopt, capsys):
    both = {**pair(FLAT), **pair(ENCODER), "text_encoder.odd.key": torch.zeros(1)}
    with pytest.raises(UserError, match=r"1 of 2 layers are text encoders'.*encoders=ignore"):
        adopt(both)
    assert set(change(adopt(both, encoders="ignore"))) == {Q}
    assert "1 of 2 layers are text encoders' and are left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="all 1 layers are text encoders': there is nothing for the network"):
        adopt(pair(ENCODER), encoders="ignore")
    with pytest.raises(UserError, match="encoders=maybe"):
        adopt(both, encoders="maybe")


@pytest.mark.parametrize(
    ("header", "family"),
    [
        ({"ss_base_model_version": "sd_v1"}, "sd15"),
        ({"ss_base_model_version": "sd_1.5"}, "sd15"),
        ({"ss_v2": "True"}, "sd21"),
        ({"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"}, "sdxl"),
        ({"modelspec.architecture": "stable-diffusion-v2-512/lora"}, "sd21"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "sdxl"),
        ({"modelspec.architecture": "stable-diffusion-3-medium"}, "sd3"),
        ({"modelspec.architecture": "flux-1-dev/lora"}, "flux"),
        ({"ss_base_model_version": "Z-Image"}, "zimage"),
        ({"ss_base_model_version": "chroma"}, ""),
        ({}, ""),
    ],
)
def test_what_headers_call_a_base(header, family):
    assert headers.base(header)[1] == family
    assert bool(headers.another_base(header, "sd15")) == (family not in ("sd15", ""))
    assert not headers.another_base(header, "mine"), "of a family of the user's own nothing is known"


def test_another_base_in_the_header_is_said(adopt, capsys):
    card = Card("lora", "x", "sd21", "base", 0, 0.0, "full", "c3lier")
    adopt(pair(FLAT), {"ss_base_model_version": "sd_v1"}, card=card)
    assert "sd_v1" in capsys.readouterr().out
    with pytest.raises(UserError, match="another base model: sd_v1"):
        adopt(pair(FLAT, size=48), {"ss_base_model_version": "sd_v1"}, card=card)


SETS = [("full", "c3lier"), ("noxattn", "c3lier"), ("xattn-strict", "lierla"), ("selfattn", "lierla")]


@pytest.mark.parametrize(("layers", "scope"), SETS)
def test_a_files_layers_are_called_by_their_set(net, layers, scope, adopt):
    names = targets(net, layers, scope)
    spots, tensors = layouts.named_layers(net), {}
    for name in names:
        rows, *columns = spots[name].weight.shape
        tensors |= {
            f"unet.{name}.lora_A.weight": random(1, *columns),
            f"unet.{name}.lora_B.weight": random(rows, 1),
        }
    card = adopt(tensors).card
    assert targets(net, card.layers, card.scope) == names
    assert (
        (card.layers, card.scope)
        == layer_set(net, set(names))
        == ((layers, scope) if layers != "selfattn" else ("noxattn", "lierla"))
    )
    tensors = {key: value for key, value in tensors.items() if names[0] not in key}
    assert adopt(tensors).card.layers == "custom"


def test_a_merged_card_claims_what_is_true(net):
    smile, part = trained(net, "smile", 1, layers="noxattn"), trained(net, "part", 2, layers="selfattn")
    for order in ([smile, part], [part, smile]):
        assert merge.merge(order, [1.0, 1.0], 0, "sum")[0].card.layers == "noxattn"
    cross = trained(net, "cross", 3, layers="xattn")
    merged = merge.merge([part, cross], [1.0, 1.0], 0, "sum")[0].card
    assert (merged.layers, merged.scope, merged.base_hash) == ("custom", "custom", "0f")
    assert [row["trained on"] for row in merged.recipe["merged"]] == ["tiny/base", "tiny/base"]
    elsewhere = trained(network(block_out_channels=(32, 64, 64)), "wide", 3)
    with pytest.raises(UserError, match="different shapes"):
        merge.merge([smile, elsewhere], [1.0, 1.0], 0, "sum")


# info


@pytest.mark.parametrize(
    ("tensors", "header", "says"),
    [
        (bare(f"unet.{Q}"), {}, ["alpha          not said: strength is 1"]),
        (bare(f"unet.{Q}"), {headers.DIFFUSERS: '{"unet.r": 4, "unet.lora_alpha": 2}'}, ["alpha          2"]),
        (bare(f"unet.{Q}"), {headers.DIFFUSERS: '{"unet.r": 4}'}, ["alpha          unknown"]),
        (bare(f"base_model.model.{Q}"), {}, ["unknown: adapter_config.json says it"]),
        (pair(FLAT, alpha=0.0), {}, ["alpha          0, so it does nothing"]),
        (
            {**pair(FLAT), **pair(ENCODER)},
            {},
            ["kohya", "text encoders  1 layers", "the network has 1", "encoders=ignore"],
        ),
        ({f"{FLAT}.lokr_w1": random(4, 4), f"{FLAT}.lokr_w2": random(8, 8)}, {}, ["LoKr (1)"]),
        (
            {**pair(FLAT), f"{FLAT}.dora_scale": random(32, 1)},
            {},
            ["DoRA (1)", "cannot read it, as it holds DoRA"],
        ),
        (
            pair(FLAT),
            {"ss_base_model_version": "sd_v1"},
            ["base model     sd_v1, by its header: family sd15"],
        ),
    ],
)
def test_info_says_what_is_true(tmp_path, tensors, header, says):
    save_file(tensors, tmp_path / "x.safetensors", header)
    said = info.describe(tmp_path / "x.safetensors")
    assert all(words in said for words in says), said


def test_two_hundred_thousand_keys_take_seconds(net):
    a, b = torch.zeros(1, 4), torch.zeros(4, 1)
    keys = {
        f"unet.down_blocks.{k}.attn1.to_q.lora_{half}.weight": part
        for k in range(100_000)
        for half, part in (("A", a), ("B", b))
    }
    stems, strange = layouts.layers(keys)
    assert (len(stems), strange, layouts.layout(list(keys))) == (100_000, [], "diffusers")
    with pytest.raises(UserError, match="100000 of 100000 layers have no place") as error:
        layouts.gather(keys, net, {})
    assert len(str(error.value)) < 400
    ranks = {layouts.bare(stem): 1 for stem in stems}
    assert headers.alphas(
        {"lora_alpha": 1, "alpha_pattern": {layer: 2.0 for layer in ranks}}, ranks
    ) == dict.fromkeys(ranks, 2.0)


def test_convert_counts_the_text_encoders_layers(tmp_path, monkeypatch, capsys):
    tiny = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({**pair(tiny, size=80), **pair(ENCODER)}, tmp_path / "x.safetensors")
    files = [str(tmp_path / name) for name in ("x.safetensors", "out.safetensors")]
    monkeypatch.setattr(
        sys,
        "argv",
        ["convert", *files, "member=tiny/base", "kind=slider", "positive=a face", "encoders=ignore"],
    )
    convert.run()
    card = formats.load(tmp_path / "out.safetensors").card
    assert (card.kind, card.layers, card.recipe) == ("slider", "custom", {"positive": "a face"})
    assert "1 of 2 layers are text encoders' and are left out" in capsys.readouterr().out
