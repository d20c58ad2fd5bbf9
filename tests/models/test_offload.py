"""What saves memory does not change pictures, and parts take turns."""

from types import SimpleNamespace

import pytest
import torch
from support.network import network, output, trained
from torch.utils._pytree import tree_map

from configs import UserError, load, merge
from controls import formats
from controls.lora import fused
from models import budget, families, offload, quantized
from models.families import Family, Memory
from models.offload import Offloader, compiled
from models.sampler import alone, draw_noise, finish
from train import adapt, image_slider, lora, slider, sliderspace

TEXTS, SEEDS = ["portrait of a person, hat", "portrait of a person"], [1, 2]


def drawn(family: Family) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and images of the embedded dmd."""
    member = family.member("dmd")
    with torch.no_grad():
        latents = finish(alone(member), draw_noise(SEEDS, family.latent_shape, 4), family.encode(TEXTS))
    return latents, family.decode(latents)


@pytest.fixture(scope="module")
def plain():
    return drawn(Family("tiny"))


@pytest.mark.parametrize(
    "memory",
    [
        Memory(offload=True),
        Memory(tiling=True),
        pytest.param(Memory(compile="eager"), marks=pytest.mark.slow),
    ],
)
def test_the_same_pictures(plain, memory):
    latents, images = drawn(Family("tiny", memory=memory))
    assert torch.equal(latents, plain[0]) and torch.allclose(images, plain[1], atol=1e-5)


def test_text_encoders_network_and_vae_take_turns(monkeypatch):
    family, come = Family("tiny", memory=Memory(offload=True)), []
    bring = Offloader.bring
    monkeypatch.setattr(
        Offloader, "bring", lambda turns, parts: come.append(list(parts)) or bring(turns, parts)
    )
    drawn(family)
    encoders, net, vae = list(family.encoders().values()), family.member("dmd").denoiser.net, family.pipe.vae
    assert [parts for k, parts in enumerate(come) if not k or parts != come[k - 1]] == [
        encoders,
        [net],
        [vae],
    ]


class Part(torch.nn.Linear):
    """Remembers where it was sent."""

    def __init__(self, name: str, log: list):
        super().__init__(1, 1)
        self.name, self.log = name, log

    def to(self, device):
        self.log.append((self.name, str(device)))
        return self


def test_one_leaves_before_the_next_comes():
    log = []
    text, more, net = (Part(name, log) for name in ("text", "more", "net"))
    turns = Offloader(torch.device("cuda"))
    turns.comes_when_called(net)
    turns.bring([text, more])
    net(torch.zeros(1, 1))
    assert log == [("text", "cuda"), ("more", "cuda"), ("text", "cpu"), ("more", "cpu"), ("net", "cuda")]
    log.clear()
    net(torch.zeros(1, 1))
    turns.bring([])
    assert log == [("net", "cuda"), ("net", "cpu")]


def test_text_encoders_can_be_forgotten_and_come_back(plain):
    family = Family("tiny")
    before = family.encode(TEXTS)
    family.forget_encoders()
    assert not family.encoders() and family.pipe.text_encoder is None and family.pipe.vae is not None
    assert (
        torch.equal(family.encode(TEXTS).tokens, before.tokens) and not family.encoders()
    )  # a text is encoded once
    family.encode(["another"])
    assert family.encoders()
    assert torch.equal(drawn(family)[0], plain[0])


def test_memory_is_given_back_after_packing_and_after_forgetting(monkeypatch):
    given, kind = (
        [],
        quantized.Kind(
            "torch", "", 16.0, lambda w: (w.bfloat16(), w.new_ones(1)), lambda c, s, shape, dtype: c.to(dtype)
        ),
    )
    monkeypatch.setitem(quantized.KINDS, "round", kind)
    monkeypatch.setattr(families, "release", lambda: given.append(1))
    family = Family("tiny")
    family.member("base", "round")
    assert len(given) == 1
    family.encode(["hat"])
    family.forget_encoders()
    assert len(given) == 2


@pytest.mark.parametrize("library", ["glibc", "another", "none"])
def test_what_was_freed_goes_back_where_glibc_keeps_it(monkeypatch, library):
    trimmed = []

    def opened(name: str):
        if library == "none":
            raise OSError(name)
        return SimpleNamespace(malloc_trim=trimmed.append) if library == "glibc" else SimpleNamespace()

    monkeypatch.setattr(offload.ctypes, "CDLL", opened)
    offload.release()
    assert trimmed == ([0] if library == "glibc" else [])


def test_the_budget_is_a_command(capsys):
    budget.main(budget.Config(members=["base", "dmd"]))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "part",
        "text_encoder",
        "text_encoder_2",
        "vae",
        "base",
        "dmd",
        "together",
    ]


class Types(Offloader):
    """Numbers of 64 bits in place of a device and 32 away from it: what meets without having come fails here
    as it does on a GPU.
    """

    def __init__(self, device=None):
        super().__init__(torch.float64, torch.float32)

    def comes_when_called(self, net: torch.nn.Module) -> None:
        super().comes_when_called(net)

        def here(value):
            return value.to(self.device) if torch.is_tensor(value) and value.is_floating_point() else value

        net.register_forward_pre_hook(
            lambda module, args, more: (tree_map(here, args), tree_map(here, more)), with_kwargs=True
        )


def test_a_control_in_the_weights_travels_with_them():
    """Whether the network is there or away when the control comes, and wherever it is sent meanwhile."""
    net, whole, smile, turns = network(), network().double(), trained(network(), "smile", 1), Types()
    bare, weights = output(whole), {name: weight.clone() for name, weight in net.named_parameters()}
    with fused(whole, smile, 1.0):
        moved = output(whole)
    turns.comes_when_called(net)
    for start in ([], [net]):
        turns.bring(start)
        with fused(net, smile, 1.0):
            assert torch.allclose(output(net), moved, atol=1e-5)
            turns.bring([])
            assert torch.allclose(output(net), moved, atol=1e-5)
        assert torch.allclose(output(net), bare)
    turns.bring([])
    assert all(torch.equal(weight, weights[name]) for name, weight in net.named_parameters())


TRAINERS = {
    slider: ["trajectories=2", "watch=[tiny/lcm]", "watch_every=4", "watch_prompts=1"],
    image_slider: [],
    lora: ["images=4", "prior=1"],
    sliderspace: ["directions=2", "trajectories=4"],
    adapt: ["runs=2", "rounds=1", "judged=0", "compared=2"],
}


@pytest.mark.parametrize(
    "trainer",
    [pytest.param(trainer, marks=[pytest.mark.slow] * (trainer in (adapt, lora))) for trainer in TRAINERS],
)
def test_text_encoders_are_gone_when_a_trainer_s_network_comes(trainer, tmp_path, monkeypatch):
    """What they were told is known by then, and they do not come back."""
    when, parts = [], Family._parts
    load, encode = Family._network, Family._encode

    def loaded(family, name, *args):
        if not family.bare:
            when.append(("network", bool(family._pipe and family.encoders())))
        return load(family, name, *args)

    monkeypatch.setattr(Family, "_network", loaded)
    monkeypatch.setattr(
        Family, "_encode", lambda family, *args: when.append(("encoded", True)) or encode(family, *args)
    )
    monkeypatch.setattr(
        Family,
        "_parts",
        lambda family, **without: when.append(("parts", bool(without))) or parts(family, **without),
    )
    words = [*SMALL, "steps=1", "batch_size=1", f"out={tmp_path}", *TRAINERS[trainer]]
    trainer.main(merge(trainer.Config, [*words, *([f"cache={tmp_path}"] if trainer is adapt else [])]))
    first = when.index(("network", False))
    assert (
        ("network", True) not in when
        and ("encoded", True) in when[:first]
        and ("encoded", True) not in when[first:]
    )
    assert when.count(("parts", False)) == 1 and ("parts", True) not in when


SMALL = [
    "member=tiny/dmd",
    "steps=4",
    "sample_seeds=[1]",
    "sample_scales=[0,1]",
    "save_every=2",
    "wandb=disabled",
]


@pytest.mark.slow
def test_a_network_that_waits_away_is_trained_as_one_that_stays(tmp_path, monkeypatch):
    """Beside its average, its optimizer and watched members, with strips between, killed and continued."""
    words = [
        *SMALL,
        "batch_size=2",
        "trajectories=2",
        "ema=0.5",
        "sample_every=2",
        "watch=[tiny/lcm]",
        "watch_every=2",
        "watch_prompts=1",
    ]
    stays = formats.load(slider.main(merge(slider.Config, [*words, f"out={tmp_path}/stays"])))
    monkeypatch.setattr(families, "Offloader", Types)
    words += [f"out={tmp_path}/waits", "memory.offload=true"]
    with monkeypatch.context() as patch:
        patch.setattr(slider.Run, "backward", killing(slider.Run.backward, 4))
        with pytest.raises(KeyboardInterrupt):
            slider.main(merge(slider.Config, words))
    waits = formats.load(
        slider.main(merge(slider.Config, [*words, "memory.tiling=true"]))
    )  # memory may differ in a continued run
    ours, theirs = (
        torch.cat([control.tensors[key].flatten() for key in sorted(control.tensors)])
        for control in (waits, stays)
    )
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.999


def killing(call, after: int):
    def counted(*args):
        nonlocal after
        after -= 1
        if not after:
            raise KeyboardInterrupt
        return call(*args)

    return counted


@pytest.mark.slow
def test_network_and_vae_are_together_where_gradients_pass_both(tmp_path, monkeypatch):
    monkeypatch.setattr(families, "Offloader", Types)
    words = ["directions=2", "trajectories=4", "batch_size=1", "memory.offload=true", f"out={tmp_path}"]
    folder = sliderspace.main(merge(sliderspace.Config, [*SMALL, *words]))
    assert formats.load(folder / "space-2.safetensors").tensors


class Doubly(torch.nn.Module):
    """Not a Sequential, whose parts dynamo looks at anew each time."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(x)


def test_hooks_that_come_after_compiling_are_seen():
    """Recordings and LoRA students are hooks, which torch does not look for unless told."""
    net, x = Doubly(), torch.ones(1, 2)
    compiled(net, "eager")
    before = net(x)
    handle = net.inner.register_forward_hook(lambda module, inputs, out: out + 1)
    assert torch.allclose(net(x), before + 2)
    handle.remove()
    assert torch.equal(net(x), before)


def test_every_command_takes_memory():
    from analysis import diversity, similarity, trace, transfer
    from controls import show

    for module in (diversity, similarity, trace, transfer, show, slider, sliderspace, image_slider, lora):
        cfg = load(module.Config, ["memory.offload=true", "memory.tiling=true", "memory.compile=inductor"])
        assert cfg.memory == Memory(True, True, "inductor")
    with pytest.raises(UserError, match="no backend 'fast' of torch.compile; there are .*inductor"):
        load(slider.Config, ["memory.compile=fast"])
