"""Benches: what they report is what happens."""

import numpy as np
import pytest
from support.allocator import allocated
from support.network import network

from analysis import bench
from configs import merge
from models.architectures import ARCHITECTURES
from train import dry_run
from train.bench import prior


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_memory_followed_on_meta_is_what_torch_allocates(tmp_path, gradient_checkpointing):
    net, control = network(), {"layers": "full", "gradient_checkpointing": gradient_checkpointing}
    size = dry_run.Step(ARCHITECTURES["sdxl"], "vp", (4, 8, 8), 1, **control)
    real = allocated(lambda: dry_run.update(net, size), tmp_path)
    seen = dry_run.follow(network().to("meta"), size)
    assert seen["peak"] - seen["network"] == pytest.approx(real, rel=0.05)


def test_kernel_distance_by_its_definition():
    """Sums over different images, one by one; about 0 between halves of one set and more where one half is
    moved.
    """
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 3)), rng.normal(size=(4, 3))

    def kernel(x, y):
        return (x @ y / 3 + 1) ** 3

    def within(x):
        return np.mean([kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])

    across = np.mean([kernel(x, y) for x in a for y in b])
    assert prior.distance(a, b) == pytest.approx(within(a) + within(b) - 2 * across)
    many = rng.normal(size=(800, 3))
    assert abs(prior.distance(many[:400], many[400:])) < 0.1 < prior.distance(many[:400], many[400:] + 0.5)


@pytest.mark.parametrize("more", [[], ["targets=['dmd:hybrid(1)']"]])
def test_the_share_outside_network_vae_and_evaluators_is_small_and_printed(capsys, monkeypatch, more):
    seen, drawn = [], bench.drawn
    monkeypatch.setattr(bench, "drawn", lambda *args: seen.append(drawn(*args)) or seen[-1])
    words = ["targets=[dmd]", "seeds=2", "rounds=1", "max_prompts=1", *more]
    bench.main(merge(bench.Config, words))
    (spent,) = seen
    assert all(spent[part] > 0 for part in bench.PARTS)
    assert 0 < bench.outside(spent) < 0.5 and spent["network"] > spent["whole"] / 3
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(f"outside network, VAE and evaluators: {100 * bench.outside(spent):.1f} % of ")


def test_the_clock_leaves_nothing_behind(monkeypatch):
    held = {}
    clocked = bench.clocked
    monkeypatch.setattr(
        bench,
        "clocked",
        lambda drawings, plan: held.update(drawings=drawings, plan=plan) or clocked(drawings, plan),
    )
    bench.main(merge(bench.Config, ["targets=[dmd]", "seeds=1", "rounds=1", "max_prompts=1"]))
    nets = [member.denoiser.net for member in held["plan"].members]
    for module in [*nets, held["drawings"].family.pipe.vae.decoder]:
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all("features" not in vars(evaluator) for evaluator in held["drawings"].evaluators.values())
