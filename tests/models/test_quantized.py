"""Quantised networks: exactly the networks with the unpacked weights, smaller, and good to train on."""

import json
import re
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from support.commands import called, configured, refused
from support.network import network, output, trained
from torch import nn

from analysis import diversity, session, similarity, trace, transfer
from analysis.session import Session
from configs import UserError, merge
from controls import formats, show
from controls.layers import named_layers, targets
from controls.lora import attach, create, detach, extract, fused, fusing, parameters, strength
from models import budget, forecast, quantized
from models.cards import card
from models.families import Family
from models.hashing import fingerprint
from models.interventions import WeightInterpolation
from models.lora_student import Delta, dial
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


def test_a_control_acts_beside_packed_weights_as_it_does_attached(kind):
    net, smile = quantize(network(), kind, CPU), trained(network(), "smile", 1, layers="full")
    on, modules, bare = fusing(net, smile, 0.7, "tiny"), list(net.named_modules()), output(net)
    with on():
        first = output(net)
        with fused(net, smile, 0.3):
            both = output(net)
    assert torch.equal(output(net), bare) and list(net.named_modules()) == modules
    with on():
        assert torch.equal(output(net), first)
    with pytest.raises(UserError, match="family"):
        fusing(net, smile, 1.0, family="elsewhere")
    attach(net, smile)
    for scale, seen in ((0.7, first), (1.0, both)):
        with strength(net, smile=scale):
            assert torch.allclose(output(net), seen, atol=1e-5) and not torch.allclose(seen, bare, atol=1e-3)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_between_two_packed_networks_is_between_their_unpacked_weights(kind, share):
    (base, net), (plain, other) = ([quantize(network(), kind, CPU) for _ in range(2)], [network(), network()])
    with torch.no_grad():
        for layer in quantized.layers(net).values():
            layer.scales *= 1.5
    for packed, whole in ((base, plain), (net, other)):
        for name in inside(network()):
            whole.get_submodule(name).weight.data = packed.get_submodule(name).weight
    before = output(net)
    with WeightInterpolation(base, net, share)():
        between = output(net)
    with WeightInterpolation(plain, other, share)():
        assert torch.equal(output(other), between)
    assert torch.equal(output(net), before) and torch.equal(output(base), output(plain))


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
    "member=tiny/dmd",
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
    with fused(Family("tiny").member("dmd").denoiser.net, packed, 1.0, "tiny"):
        pass


def test_what_is_watched_is_whole(monkeypatch, tmp_path):
    monkeypatch.setitem(KINDS, "round", ROUND)
    words = [
        "quantize=round",
        "watch=[tiny/lcm]",
        "watch_every=1",
        "watch_prompts=1",
        "steps=1",
        f"out={tmp_path}",
    ]
    slider.main(merge(slider.Config, [*SMALL, *words]))  # where lcm was quantised too, `applied` would refuse
    assert "retention/tiny/lcm/value" in (tmp_path / "smile/watch.jsonl").read_text()


@torch.no_grad()
def test_a_lora_student_of_a_packed_base_is_the_packed_base_with_its_delta(pair):
    net, plain = pair
    rng, spots, bare = torch.Generator().manual_seed(3), named_layers(network()), output(net)
    shapes = {name: spots[name].weight.shape for name in targets(network(), "full")}
    made = {
        name: (
            torch.randn(2, *shape[1:], generator=rng) * 0.1,
            torch.randn(shape[0], 2, *(1 for _ in shape[2:]), generator=rng) * 0.1,
        )
        for name, shape in shapes.items()
    }
    seen = []
    for one in (net, plain):
        student = Delta(dict(made))
        student.attach(one)
        dial(one, student)
        seen.append(output(one))
    assert torch.equal(*seen) and not torch.allclose(seen[0], bare, atol=1e-3)


TRANSFER = [
    "controls=[controls/tiny/smile-dmd.safetensors]",
    "targets=[dmd,dmd:hybrid(1)]",
    "seeds=2",
    "scales=[-1,0,1]",
    "references=false",
    "wandb=disabled",
    "prompts=[portrait of a person,'portrait of a person, hat']",
    "rounds=1",
    "max_prompts=2",
    "baselines=1",
]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A small transfer on whole networks, and its cache."""
    out = tmp_path_factory.mktemp("transfer")
    return out, cells(out)


def cells(out, *words) -> list[dict]:
    transfer.main(merge(transfer.Config, [*TRANSFER, f"out={out}", f"cache={out}/cache", *words]))
    return json.loads((out / "default/results.json").read_text())["cells"]


@pytest.mark.parametrize(
    ("kind", "near"), [pytest.param("int8", 0.02, marks=pytest.mark.slow), ("nf4", 0.25)]
)
def test_a_control_has_on_packed_networks_about_the_effect_that_it_has_on_whole_ones(
    drawn, tmp_path, kind, near
):
    pytest.importorskip("bitsandbytes")
    whole, packed = drawn[1], cells(tmp_path, f"quantize={kind}")
    assert [cell["target"] for cell in packed] == ["tiny/dmd", "tiny/dmd:hybrid(1)"]
    assert packed[0]["source"] == packed[0]["target"]

    def ends(cell):
        return (
            cell["readings"]["probe"]["effect"][2]["value"] - cell["readings"]["probe"]["effect"][0]["value"]
        )

    ours, theirs = [ends(cell) for cell in packed], [ends(cell) for cell in whole]
    assert min(theirs) > 0.5 and ours == pytest.approx(theirs, rel=near) and ours != theirs


def test_drawings_of_packed_networks_are_never_taken_for_others(drawn, monkeypatch):
    monkeypatch.setitem(KINDS, "round", ROUND)
    keys = []
    for words in ([], ["quantize=round"], ["quantize=nf4"]):
        cfg = merge(transfer.Config, [*TRANSFER, f"cache={drawn[0]}/cache", *words])
        monkeypatch.setattr(quantized, "find_spec", lambda name: True)
        session = Session("analysis.transfer", cfg, ())
        design = transfer.prepare(session)
        keys.append({part.key(job) for part, jobs in design.all for job in jobs})
        assert bool(transfer.Work(session, design).missing(design.all)) == bool(words)
    assert len(set.union(*keys)) == sum(map(len, keys))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_plan_counts_packed_bytes(device, monkeypatch):
    monkeypatch.setitem(KINDS, "round", ROUND)
    smile = trained(network(), "smile", 1).tensors
    moments = {}
    for kind in ("", "round"):
        family = SimpleNamespace(**vars(Family("tiny", dtype=torch.float32, bare=True, quantize=kind)))
        family.device = torch.device(device)
        turns = [({"base", "dmd"}, {"base", "dmd"})]
        moments[kind] = {moment.when: moment for moment in forecast.drawing(family, turns, 1, [smile], [])}
    whole, packed = (moments[kind]["when base, dmd draw 1 at once"] for kind in moments)
    assert packed.total < whole.total and packed.held["base"] < 0.8 * whole.held["base"]
    assert packed.held["the control"] < whole.held["weights with the control"]
    packing = moments["round"].get("when a network is packed")
    assert (packing is None) == (device == "cuda")
    one, other = (
        ("dmd", "base") if packing and packing.held["dmd"] > packing.held["base"] else ("base", "dmd")
    )
    assert packing is None or packing.held[one] == whole.held[one] and packing.held[other] < whole.held[other]


def test_the_budget_of_a_plan_is_of_packed_networks(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(KINDS, "round", ROUND)
    said = []
    for word in ("", "round"):
        words = ["students=[dmd]", "dry_run=true", f"out={tmp_path}", f"quantize={word}", "control=''"]
        trace.main(merge(trace.Config, words))
        said.append(float(re.search(r"^base .*0.0 +([\d.]+) ", capsys.readouterr().out, re.M)[1]))
    assert said[1] < said[0]


COMMANDS = {transfer: [], trace: [], diversity: [], similarity: ["controls=[]"]}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_analysis_draws_on_packed_networks(command, monkeypatch, tmp_path):
    class Stop(Exception):
        pass

    class Packed(Family):
        def __init__(self, *args, **more):
            super().__init__(*args, **more)
            if not more.get("bare"):
                assert quantized.quantized(self.member("dmd").denoiser.net)
                raise Stop

    monkeypatch.setitem(KINDS, "round", ROUND)
    monkeypatch.setattr(session, "Family", Packed)
    with pytest.raises(Stop):
        command.main(
            merge(command.Config, [*COMMANDS[command], "quantize=round", f"out={tmp_path}", "wandb=disabled"])
        )


def test_show_draws_on_packed_networks(tmp_path, monkeypatch):
    monkeypatch.setitem(KINDS, "round", ROUND)
    pictures = {}
    for kind in ("", "round"):
        words = [f"quantize={kind}", f"out={tmp_path}/show{kind}.png", "scales=[0,1]"]
        pictures[kind] = show.main(
            ["controls/tiny/smile-dmd.safetensors"], merge(show.Config, words)
        ).read_bytes()
    assert pictures[""] != pictures["round"]


@pytest.mark.parametrize("command", [*COMMANDS, show])
@pytest.mark.parametrize("word", ["quantize=nf5", "dtype=fp8"])
def test_what_a_command_cannot_draw_in_is_one_line_and_exit_code_2(command, word, tmp_path):
    words = [word, f"out={tmp_path}", "wandb=disabled"]
    key, _, value = word.partition("=")
    message = refused(
        called(show, "controls/tiny/smile-dmd.safetensors", word)
        if command is show
        else configured(command, words)
    )
    assert message.startswith(f"no {key} {value!r}; there are ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("nf5", "no quantize 'nf5'; there are nf4, int8, int8-torchao"),
        ("nf4", "quantize=nf4 needs bitsandbytes: pip install -e '.[8bit]'"),
        ("int8-torchao", "quantize=int8-torchao needs torchao: pip install -e '.[torchao]'"),
    ],
)
def test_a_missing_package_is_one_line_and_exit_code_2(word, says, tmp_path, monkeypatch):
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    words = [f"quantize={word}", f"out={tmp_path}", "wandb=disabled"]
    assert refused(configured(slider, words)) == says
