"""As many images at once as memory holds, in every command: a VAE that holds one image, and a network that
holds two latents.
"""

import pytest
import torch
from support.short_runs import ANALYSES, PROMPTS, TRAINERS

from analysis import diversity, transfer
from configs import UserError, merge
from controls import show
from models.batches import Batches
from models.families import Family
from models.sampler import alone, draw_noise, finish

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")


class Small:
    """A call that raises as a full GPU does when it is given more than `most` rows, and counts its calls."""

    def __init__(self, call, most: int):
        self.call, self.most, self.calls, self.largest = call, most, 0, 0

    def __call__(self, x, *args, **kwargs):
        if len(x) > self.most:
            raise FULL
        self.calls, self.largest = self.calls + 1, max(self.largest, len(x))
        return self.call(x, *args, **kwargs)


@pytest.fixture
def full(monkeypatch):
    """Every VAE holds one image."""
    from diffusers import AutoencoderTiny

    for name in ("decode", "encode"):
        original = getattr(AutoencoderTiny, name)
        monkeypatch.setattr(
            AutoencoderTiny,
            name,
            lambda vae, x, *args, o=original: Small(lambda y, *a: o(vae, y, *a), 1)(x, *args),
        )


def test_work_is_halved_until_it_fits_and_no_row_is_lost_or_done_twice(capsys):
    batches, work = Batches(48), Small(lambda rows: rows, 5)
    assert torch.equal(torch.cat(batches.of(work, 50)), torch.arange(50))
    assert batches.size == work.largest == 3 and "on with 3 at once" in capsys.readouterr().out
    assert torch.cat(batches.of(work, 7)).tolist() == list(range(7)) and batches.of(work, 0) == []
    with pytest.raises(UserError, match="not enough memory for a single image"):
        Batches(2).of(Small(lambda rows: rows, 0), 2)
    with pytest.raises(ZeroDivisionError):  # no other error is taken for it
        Batches(2).of(lambda rows: 1 / 0, 2)


@pytest.mark.parametrize(
    ("size_px", "drawn", "decoded"), [(64, 48, 64), (512, 16, 4), (1024, 4, 1), (2048, 1, 1)]
)
def test_what_goes_at_once_follows_the_size(size_px, drawn, decoded):
    assert (
        Batches.drawn(0, size_px).size == drawn
        and Batches.decoded(size_px).size == decoded
        and Batches.drawn(7, size_px).size == 7
    )


@torch.no_grad()
def test_images_are_the_same_where_memory_is_short(full):
    family = Family("tiny", dtype=torch.float32)
    latents = finish(
        alone(family.member("dmd")),
        draw_noise([1, 2, 3], family.latent_shape, 4),
        family.encode(["a person"] * 3),
    )
    images = family.decode(latents)
    assert family.decoding.size == 1 and images.shape == (3, 3, 64, 64)
    assert torch.allclose(
        images,
        Family("tiny", batch_size=1).draw(family.member("dmd"), ["a person"] * 3, [1, 2, 3]),
        atol=1e-4,
    )
    assert torch.allclose(family.to_latents(images)[2:], family.to_latents(images[2:]), atol=1e-5)


def test_gradients_pass_through_the_vae_part_by_part(full):
    family = Family("tiny", dtype=torch.float32)
    family.decoding.size = 1
    latents = torch.randn(2, *family.latent_shape, requires_grad=True)
    family.pixels(latents).square().sum().backward()
    alone_, first = latents[:1].detach().requires_grad_(), latents.grad[:1]
    family.pixels(alone_).square().sum().backward()
    assert torch.allclose(alone_.grad, first, atol=1e-6) and first.abs().max() > 0


def some(table: list, quick: int) -> list:
    """The rows of a table as cases, all but one of them slow."""
    return [
        pytest.param(*row, id=row[0].__name__, marks=[] if k == quick else pytest.mark.slow)
        for k, row in enumerate(table)
    ]


@pytest.mark.parametrize(("command", "words"), some(ANALYSES[1:], 0))
def test_analyses_with_a_small_vae(full, tmp_path, command, words):
    words = [*words, PROMPTS, f"out={tmp_path}", "wandb=disabled"]
    words += (
        [f"cache={tmp_path}/cache"]
        if command is transfer
        else ["captions=16", "neighbours=2"]
        if command is diversity
        else []
    )
    assert command.main(merge(command.Config, words)).exists()


@pytest.mark.parametrize(("recipe", "words"), some([TRAINERS[0], *TRAINERS[3:]], 1))
def test_trainers_with_a_small_vae(full, tmp_path, recipe, words):
    few = ["steps=1", "batch_size=2", "sample_every=1", "sample_seeds=[1,2]", "sample_scales=[0,1]"]
    words = [*words, *few, f"out={tmp_path}", "wandb=disabled"]
    assert recipe.main(merge(recipe.Config, words)).exists()


def test_show_with_a_small_vae(full, tmp_path):
    words = ["scales=[0,1]", f"out={tmp_path}/x.png"]
    assert show.main(["controls/tiny/smile.safetensors"], merge(show.Config, words)).is_file()


@torch.no_grad()
def test_a_network_that_holds_few_latents(monkeypatch):
    """Drawing goes on with half of the batch, and the images are those of the whole one."""
    family = Family("tiny", dtype=torch.float32)
    member, texts, seeds = family.member("lightning"), ["a person"] * 5, [1, 2, 3, 4, 5]
    whole = family.draw(member, texts, seeds)
    monkeypatch.setattr(member.denoiser.net, "forward", Small(member.denoiser.net.forward, 2))
    assert torch.allclose(family.draw(member, texts, seeds), whole, atol=1e-5) and family.drawing.size == 2
