"""Controls: they act where and when they should and nowhere else, and come back from a file as they went."""

import os
import pickle
import re
from dataclasses import replace
from functools import partial
from math import prod

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file
from support.commands import refused
from support.network import network, output, trained

from configs import UserError
from controls.formats import load, save
from controls.layers import LAYERS, targets
from controls.lora import (
    Control,
    _sum,
    attach,
    content,
    create,
    detach,
    extract,
    fits,
    fused,
    fusing,
    parameters,
    random_like,
    strength,
)
from models.hashing import fingerprint


@pytest.fixture(scope="module")
def plain():
    """A network that no test changes, and its output."""
    net = network()
    return net, output(net).detach()


@pytest.fixture(scope="module")
def controls(plain):
    """Two controls on overlapping layers."""
    return trained(plain[0], "smile", 1), trained(plain[0], "age", 2, layers="full", rank=2, alpha=3.0)


@pytest.fixture
def pair(plain, controls):
    """A network with both controls attached, its bare output, and the controls."""
    net = network()
    for control in controls:
        attach(net, control)
    return net, plain[1], controls


def test_layer_sets_mean_their_published_layers(plain):
    net, _ = plain
    blocks = sum(name.endswith(".attn1") for name, _ in net.named_modules())
    counts = {name: len(targets(net, name, "lierla")) for name in LAYERS if name != "flux-attn"}
    parts = counts.pop("xattn-up") + counts.pop("xattn-down") + counts.pop("xattn-mid")
    assert parts == 4 * blocks
    expected = {"full": 8, "noxattn": 4, "innoxattn": 4, "selfattn": 4, "xattn": 4, "xattn-strict": 2}
    assert counts == {name: per_block * blocks for name, per_block in expected.items()}
    assert all(name.endswith(("to_k", "to_v")) for name in targets(net, "xattn-strict"))
    assert targets(net, "xattn", "lierla") == targets(net, "xattn", "c3lier")


def test_scope_adds_convolutions_and_time_projections_only(plain):
    net, _ = plain
    beyond = set(targets(net, "noxattn", "c3lier")) - set(targets(net, "noxattn", "lierla"))
    ends = {name.rsplit(".", 1)[1] for name in beyond}
    assert ends == {"conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv"}
    assert not any("attentions" in name or "embedding" in name for name in beyond)


def test_targets_do_not_depend_on_attached_controls(pair):
    net, _, _ = pair
    assert targets(net, "full") == targets(network(), "full")


@pytest.mark.parametrize(
    "layers, scope", [("nosuch", "c3lier"), ("noxattn", "nosuch"), ("flux-attn", "c3lier")]
)
def test_a_set_that_means_nothing_names_those_that_do(plain, layers, scope):
    with pytest.raises(UserError, match="xattn-strict|lierla"):
        targets(plain[0], layers, scope)


def test_off_and_scale_zero_are_the_bare_network(pair):
    net, bare, _ = pair
    assert torch.equal(output(net), bare)
    with strength(net, smile=0.0, age=0):
        assert torch.equal(output(net), bare)
    with strength(net, smile=1.0):
        assert not torch.equal(output(net), bare)
    assert torch.equal(output(net), bare)


def test_a_fresh_control_does_nothing_yet(plain):
    net = network()
    create(net, "new")
    with strength(net, new=1.0):
        assert torch.equal(output(net), plain[1])


def test_scale_is_signed_and_linear_at_first(pair):
    net, bare, _ = pair
    change = {}
    for scale in (-0.02, 0.01, 0.02):
        with strength(net, smile=scale), torch.no_grad():
            change[scale] = output(net) - bare
    assert torch.allclose(change[0.02], 2 * change[0.01], atol=0.05 * change[0.02].abs().max())
    assert torch.allclose(change[0.02], -change[-0.02], atol=0.05 * change[0.02].abs().max())


def test_a_layer_adds_scale_alpha_over_rank_times_b_a(pair):
    net, _, (_, age) = pair
    spot = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
    layer, x = net.get_submodule(spot), torch.randn(3, 64)
    a, b = age.tensors[f"{spot}.lora_A.weight"], age.tensors[f"{spot}.lora_B.weight"]
    with strength(net, age=-1.5):
        assert torch.allclose(layer(x), layer.base_layer(x) - 1.5 * 3 / 2 * x @ a.T @ b.T, atol=1e-5)


def test_exactly_the_named_controls_act_and_the_state_before_returns(pair):
    net, bare, _ = pair
    with strength(net, smile=1.0):
        smile = output(net)
        with strength(net, {"age": -1.0}):
            age = output(net)
            with strength(net):
                assert torch.equal(output(net), bare)
        with pytest.raises(RuntimeError), strength(net, smile=3.0, age=1.0):
            both = output(net)
            raise RuntimeError
        assert torch.equal(output(net), smile)
    assert torch.equal(output(net), bare)
    outputs = [bare, smile, age, both]
    assert not any(torch.equal(a, b) for k, a in enumerate(outputs) for b in outputs[:k])


def test_applied_agrees_with_strength_and_gives_the_weights_back():
    net = network()
    smile, age = trained(network(), "smile", 1), trained(network(), "age", 2)
    bare, weights = (
        output(net),
        {name: (p.data_ptr(), p.detach().clone()) for name, p in net.named_parameters()},
    )
    with fused(net, smile, -1.5, "tiny"), fused(net, age, 0.7):
        added = output(net)
    with fused(net, smile, 0.0):
        assert torch.equal(output(net), bare)
    with pytest.raises(RuntimeError), fused(net, smile, 1.0):
        raise RuntimeError
    assert all(
        p.data_ptr() == weights[name][0] and torch.equal(p, weights[name][1])
        for name, p in net.named_parameters()
    )
    attach(net, smile), attach(net, age)
    with torch.no_grad(), strength(net, smile=-1.5, age=0.7):
        assert torch.allclose(output(net), added, atol=1e-5)


def test_ready_is_entered_as_often_as_one_likes():
    net, smile = network(), trained(network(), "smile", 1)
    on, bare = fusing(net, smile, 1.0), output(net)
    with on():
        first = output(net)
    assert torch.equal(output(net), bare) and not torch.equal(first, bare)
    with on():
        assert torch.equal(output(net), first)
    with pytest.raises(UserError, match="family"):
        fusing(net, smile, 1.0, family="elsewhere")


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 5), (6, 5, 3, 3), (6, 5, 1, 1)])
def test_a_sum_by_rows_is_the_sum_of_whole_matrices(monkeypatch, shape, dtype, last):
    rng = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(size, generator=rng) for size in (shape, (4, *shape[1:]), (shape[0], 4)))
    weight = weight.to(
        dtype, memory_format=torch.channels_last if last and len(shape) == 4 else torch.contiguous_format
    )
    found, before = _sum(weight, a, b, 0.3), weight.clone()
    expected = (weight.float() + 0.3 * (b @ a.flatten(1)).view(shape)).to(dtype)
    assert (
        torch.equal(found, expected) and found.stride() == expected.stride() and torch.equal(weight, before)
    )
    monkeypatch.setattr(
        "controls.lora.SPELL", 2 * prod(shape[1:])
    )  # two rows at a time, which some kernels round otherwise
    found = _sum(weight, a, b, 0.3)
    assert (
        torch.allclose(found, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)
        and found.stride() == expected.stride()
    )


def test_a_random_control_has_the_norms_and_not_the_directions():
    control = trained(network(), "smile", 1)
    other = random_like(control, 3)
    assert other.tensors.keys() == control.tensors.keys() and content(other) != content(control)
    for layer in {key.rsplit(".lora_", 1)[0] for key in control.tensors}:
        a, b = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
        ours, theirs = (c.tensors[b].flatten(1) @ c.tensors[a].flatten(1) for c in (control, other))
        assert float(theirs.norm()) == pytest.approx(float(ours.norm()), rel=1e-5)
        assert abs(float((ours * theirs).sum() / ours.norm() ** 2)) < 0.9
    assert content(random_like(control, 3)) == content(other) != content(random_like(control, 4))


def test_content_is_what_a_control_does():
    control = trained(network(), "smile", 1)
    renamed = Control(replace(control.card, name="grin"), control.tensors)
    stronger = Control(replace(control.card, alpha=2 * control.card.alpha), control.tensors)
    assert content(renamed) == content(control) != content(stronger)


def test_training_reaches_the_new_control_and_nothing_else(pair):
    net, _, _ = pair
    create(net, "new", layers="xattn", rank=2)
    with strength(net, new=1.0, smile=0.5):
        output(net).square().mean().backward()
    assert all(p.grad is not None for p in parameters(net, "new"))
    assert any(p.grad.abs().sum() > 0 for p in parameters(net, "new"))
    assert [n for n, p in net.named_parameters() if p.requires_grad and ".new." not in n] == []
    attach(net, trained(network(), "late", 5))
    assert all(p.requires_grad for p in parameters(net, "new"))


def test_create_depends_on_the_seed_alone_and_draws_no_other_noise():
    nets = [network(), network(seed=1).to(torch.bfloat16), network()]
    for net, seed in zip(nets, (3, 3, 4), strict=True):
        torch.manual_seed(11)
        create(net, "new", seed=seed)
        after = torch.rand(1)
        torch.manual_seed(11)
        assert torch.equal(after, torch.rand(1))
    first, second, other = (extract(net, "new") for net in nets)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)
    assert {p.dtype for p in parameters(nets[1], "new")} == {torch.float32}
    with strength(nets[1], new=1.0):
        assert output(nets[1]).dtype == torch.bfloat16


def test_detach_restores_names_and_weights(pair):
    net, bare, _ = pair
    fresh = network()
    with strength(net, smile=1.0):
        assert fingerprint(net) == fingerprint(fresh)
    detach(net)
    assert [n for n, _ in net.named_modules()] == [n for n, _ in fresh.named_modules()]
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in fresh.named_parameters()]
    assert torch.equal(output(net), bare) and fingerprint(net) == fingerprint(fresh) != fingerprint(
        network(seed=1)
    )
    attach(net, trained(fresh, "smile", 1))


def test_a_file_comes_back_as_it_went(tmp_path, pair):
    net, _, (smile, _) = pair
    save(Control(smile.card, extract(net, "smile")), tmp_path / "smile.safetensors")
    back = load(tmp_path / "smile.safetensors")
    assert back.card == smile.card
    assert back.tensors.keys() == smile.tensors.keys()
    assert all(torch.equal(back.tensors[k], smile.tensors[k]) for k in smile.tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["smile.safetensors"]


def test_diffusers_alone_loads_the_file_at_the_same_strength(tmp_path, pair, recwarn):
    net, bare, (smile, _) = pair
    assert (smile.card.rank, smile.card.alpha) == (4, 1.0) and any(
        t.ndim == 4 for t in smile.tensors.values()
    )
    save(smile, tmp_path / "smile.safetensors")
    with strength(net, smile=1.0):
        ours = output(net)
    parts = dict.fromkeys(["vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"])
    pipe = StableDiffusionXLPipeline(**parts, unet=network())
    pipe.load_lora_weights(tmp_path / "smile.safetensors")
    theirs = output(pipe.unet)
    assert torch.allclose(ours, theirs, atol=1e-5) and not torch.allclose(bare, theirs, atol=1e-2)
    assert not [w for w in recwarn if "inconsistency" in str(w.message)]


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_is_refused_and_never_run(tmp_path):
    for name, write in (
        ("zip", torch.save),
        ("bare", lambda thing, path: path.write_bytes(pickle.dumps(thing))),
    ):
        write(Trap(tmp_path / "sprung"), tmp_path / name)
        refused(partial(load, tmp_path / name), "pickle")
    assert not (tmp_path / "sprung").exists()


def test_broken_and_foreign_files_get_one_line(tmp_path, controls):
    smile, _ = controls
    whole, cut, text, bare, kohya = (tmp_path / name for name in ("whole", "cut", "text", "bare", "kohya"))
    save(smile, whole)
    cut.write_bytes(whole.read_bytes()[:-100])
    text.write_text("not a control at all")
    save_file({f"unet.{k}": v for k, v in smile.tensors.items()}, bare)
    save_file({"lora_unet_mid.lora_down.weight": torch.zeros(2, 2)}, kohya)
    cases = {cut: "truncated", text: "truncated", bare: "has no card", kohya: "layout"}
    cases |= {tmp_path / "gone": "no control file", tmp_path: "no control file"}
    for path, words in cases.items():
        refused(partial(load, path), words)


def test_a_control_of_another_architecture_is_refused(plain):
    net, _ = plain
    names = [name for name, _ in net.named_modules()]
    deeper = trained(network(transformer_layers_per_block=(1, 1, 3)), "smile", 1)
    wider = trained(network(cross_attention_dim=48), "smile", 1, layers="xattn")
    message = refused(lambda: attach(net, deeper))
    assert re.match(r"\d+ of \d+ layers of smile have no place in this network: .*another family\?", message)
    message = refused(lambda: attach(net, wider))
    assert re.match(r"\d+ of \d+ layers of smile have another shape", message)
    with pytest.raises(UserError, match="family 'tiny'"):
        attach(net, trained(net, "smile", 1), family="sdxl")
    assert [name for name, _ in net.named_modules()] == names


def test_names_are_checked(pair):
    net, _, (smile, _) = pair
    for name in ("smile", "a.b", "keys"):
        with pytest.raises(UserError, match="choose another"):
            attach(net, Control(replace(smile.card, name=name), smile.tensors))
    assert attach(net, smile, name="smile-2", family="tiny") == "smile-2"
    with pytest.raises(UserError, match="attached: age, smile, smile-2"):
        strength(net, smiel=1.0).__enter__()
    with pytest.raises(UserError, match="no control 'smiel'"):
        strength(net, smiel=0).__enter__()


def test_whether_a_control_fits_is_told_without_computing_a_sum(monkeypatch):
    net, smile, sums = network(), trained(network(), "smile", 1), []
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda *_: sums.append(1))
    fits(net, smile, "tiny")
    misfit = Control(
        smile.card, {key.replace("down_blocks", "sideways"): tensor for key, tensor in smile.tensors.items()}
    )
    with pytest.raises(UserError, match="have no place in this network"):
        fits(net, misfit, "tiny")
    with pytest.raises(UserError, match="was trained on family 'tiny', this network is of family 'sdxl'"):
        fits(net, smile, "sdxl")
    assert not sums
