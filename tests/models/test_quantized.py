"""Quantised networks: exactly the networks with the unpacked weights, smaller, and good to train on."""

from copy import deepcopy

import pytest
import torch
from test_controls import network, output, trained
from torch import nn

from configs import UserError, entry, load, merge
from controls import formats
from controls.layers import named_layers, targets
from controls.lora import attach, create, detach, extract, fused, parameters, strength
from models import budget, quantized
from models.cards import card
from models.families import Family
from models.hashing import fingerprint
from models.quantized import KINDS, Kind, inside, quantize
from train import slider

CPU = torch.device("cpu")
ROUND = Kind(
    "torch",
    "",
    16.0,
    lambda weight: (weight.bfloat16(), weight.new_ones(1)),
    lambda codes, scales, shape, dtype: codes.to(dtype),
)


@pytest.fixture(params=["round", *KINDS])
def kind(request, monkeypatch) -> str:
    """Every quantisation whose package is here, and one that needs none."""
    monkeypatch.setitem(KINDS, "round", ROUND)
    pytest.importorskip(KINDS[request.param].package)
    return request.param


@pytest.fixture
def pair(kind) -> tuple[nn.Module, nn.Module]:
    """A quantised network, and the ordinary one with its unpacked weights."""
    net, plain = quantize(network(), kind, CPU), network()
    for name in inside(network()):
        plain.get_submodule(name).weight.data = net.get_submodule(name).weight
    return net, plain


def gradients(net: nn.Module) -> list[torch.Tensor]:
    """Of a fresh control on all layers, whose B is no longer zero."""
    create(net, "new", layers="full")
    for weight in parameters(net, "new")[1::2]:
        nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    with strength(net, new=0.1):
        output(net).square().mean().backward()
    return [weight.grad for weight in parameters(net, "new")]


def test_it_is_the_network_with_the_unpacked_weights(pair):
    net, plain = pair
    assert torch.equal(output(net), output(plain)) and not torch.equal(output(net), output(network()))
    assert all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-7)
        for a, b in zip(gradients(net), gradients(plain), strict=True)
    )


def test_it_is_near_the_whole_network(kind):
    net, whole = quantize(network(), kind, CPU), network()
    apart = max(
        float(
            (net.get_submodule(n).weight - whole.get_submodule(n).weight).norm()
            / whole.get_submodule(n).weight.norm()
        )
        for n in inside(whole)
    )
    assert 0 < apart < (0.11 if kind == "nf4" else 0.01)


def kept(net: nn.Module) -> int:
    """The bytes that autograd keeps of a forward pass beside the network itself."""
    create(net, "new", layers="full")
    own, found = {tensor.data_ptr() for tensor in [*net.parameters(), *net.buffers()]}, []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: found.append(tensor) or tensor, lambda tensor: tensor
    ):
        with strength(net, new=1.0):
            output(net)
    return sum(
        {tensor.data_ptr(): tensor.nbytes for tensor in found if tensor.data_ptr() not in own}.values()
    )


def test_no_unpacked_weight_is_kept_for_the_backward_pass(kind):
    assert 0 < kept(quantize(network(), kind, CPU)) <= kept(network())


def test_controls_come_and_go_as_on_the_whole_network(kind):
    net, whole, smile = (
        quantize(network(), kind, CPU),
        network(),
        trained(network(), "smile", 1, layers="full"),
    )
    before, bare = list(net.named_modules()), output(net)
    assert (
        targets(net, "full") == targets(whole, "full")
        and named_layers(net).keys() == named_layers(whole).keys()
    )
    attach(net, smile, family="tiny")
    assert torch.equal(output(net), bare)
    assert all(torch.equal(tensor, smile.tensors[key]) for key, tensor in extract(net, "smile").items())
    with strength(net, smile=1.0):
        assert not torch.equal(output(net), bare)
    detach(net)
    assert list(net.named_modules()) == before and torch.equal(output(net), bare)
    with (
        pytest.raises(UserError, match="smile cannot be added to the weights of a quantised network"),
        fused(net, smile, 1.0),
    ):
        pass


def test_it_moves_whole_and_stays_known(kind):
    net = quantize(network(), kind, CPU)
    assert (
        fingerprint(net) == fingerprint(network())
        and quantized.quantized(net)
        and not quantized.quantized(network())
    )
    net.to("meta")
    assert {tensor.device.type for tensor in [*net.parameters(), *net.buffers()]} == {"meta"}


def test_checkpointing_runs_it_once_more_to_the_same(kind):
    net = quantize(network(), kind, CPU)
    twin = deepcopy(net)
    twin.enable_gradient_checkpointing()
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(gradients(net), gradients(twin), strict=True))


def test_the_budget_knows_its_size(kind):
    net = Family("tiny").member("base", kind).denoiser.net
    size = sum(tensor.nbytes for tensor in [*net.parameters(), *net.buffers()])
    need = budget.network_need(card("tiny"), "base", torch.float32, kind).memory
    assert (
        need == pytest.approx(size, rel=0.03)
        and need < budget.network_need(card("tiny"), "base", torch.float32).memory
    )


def test_loading_asks_for_the_whole_on_the_cpu_and_for_less_on_the_device(kind, monkeypatch):
    asked = []
    monkeypatch.setattr(
        budget,
        "check",
        lambda what, needed, device, dtype, fixed=False: asked.append((device.type, needed[0].memory)),
    )
    family = Family("tiny")
    family.home = torch.device("meta")
    family.member("base", kind)
    (first, whole), (second, small) = asked
    assert (first, second) == ("cpu", "meta") and small < whole


SMALL = [
    "steps=3",
    "batch_size=2",
    "trajectories=3",
    "sample_every=0",
    "sample_seeds=[1]",
    "sample_scales=[0,1]",
    "wandb=disabled",
]


@pytest.fixture(scope="module")
def slid(tmp_path_factory):
    """A slider of the whole network."""
    return formats.load(
        slider.main(merge(slider.Config, [*SMALL, f"out={tmp_path_factory.mktemp('whole')}"]))
    )


def test_a_slider_trained_on_it_is_one_of_the_whole_network(kind, slid, tmp_path):
    packed = formats.load(slider.main(merge(slider.Config, [*SMALL, f"out={tmp_path}", f"quantize={kind}"])))
    assert packed.card.base_hash == slid.card.base_hash and packed.card.recipe == {
        **slid.card.recipe,
        "quantize": kind,
    }
    ours, theirs = (
        torch.cat([c.tensors[key].flatten() for key in sorted(c.tensors) if "lora_B" in key])
        for c in (packed, slid)
    )
    assert torch.cosine_similarity(ours, theirs, dim=0) > (0.5 if kind == "nf4" else 0.9)
    with fused(Family("tiny").member("base").denoiser.net, packed, 1.0, "tiny"):
        pass


def test_what_is_watched_is_whole(monkeypatch, tmp_path):
    monkeypatch.setitem(KINDS, "round", ROUND)
    words = [
        "quantize=round",
        "watch=[tiny/dmd]",
        "watch_every=1",
        "watch_prompts=1",
        "steps=1",
        f"out={tmp_path}",
    ]
    slider.main(merge(slider.Config, [*SMALL, *words]))  # where dmd was quantised too, `applied` would refuse
    assert "retention/tiny/dmd/value" in (tmp_path / "smile/watch.jsonl").read_text()


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("nf5", "no quantize 'nf5'; there are nf4, int8, int8-torchao"),
        ("nf4", "quantize=nf4 needs bitsandbytes: pip install -e '.[8bit]'"),
        ("int8-torchao", "quantize=int8-torchao needs torchao: pip install -e '.[torchao]'"),
    ],
)
def test_a_missing_package_is_one_line_and_exit_code_2(word, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        entry(
            lambda: slider.main(
                load(slider.Config, [f"quantize={word}", f"out={tmp_path}", "wandb=disabled"])
            )
        )
    assert stop.value.code == 2 and capsys.readouterr().err == f"error: {says}\n"
