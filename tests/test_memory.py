"""What saves memory does not change pictures, and parts take turns."""

import pytest
import torch

from models import budget
from models.families import Family, Memory
from models.memory import Turns
from models.sample import alone, draw_noise, finish

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


@pytest.mark.parametrize("memory", [
    Memory(offload=True), Memory(tiling=True), pytest.param(Memory(compile="eager"), marks=pytest.mark.slow),
])  # fmt: skip
def test_the_same_pictures(plain, memory):
    latents, images = drawn(Family("tiny", memory=memory))
    assert torch.equal(latents, plain[0]) and torch.allclose(images, plain[1], atol=1e-5)


def test_text_encoders_network_and_vae_take_turns(monkeypatch):
    family, come = Family("tiny", memory=Memory(offload=True)), []
    bring = Turns.bring
    monkeypatch.setattr(Turns, "bring", lambda turns, parts: come.append(list(parts)) or bring(turns, parts))
    drawn(family)
    encoders, net, vae = list(family.encoders().values()), family.member("dmd").denoiser.net, family.pipe.vae
    assert [parts for k, parts in enumerate(come) if not k or parts != come[k - 1]] == [encoders, [net], [vae]]


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
    turns = Turns(torch.device("cuda"))
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
    assert torch.equal(family.encode(TEXTS).tokens, before.tokens) and family.encoders()
    assert torch.equal(drawn(family)[0], plain[0])


def test_the_budget_is_a_command(capsys):
    budget.main(budget.Config(members=["base", "dmd"]))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["part", "text_encoder", "text_encoder_2", "vae", "base", "dmd", "together"]
