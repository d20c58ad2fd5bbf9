"""Benches: what they report is what happens."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from support.allocator import allocated
from support.network import network

from analysis import bench
from configs import UserError, merge
from models.architectures import ARCHITECTURES
from models.evaluators import Attributes
from models.families import Family
from models.sampler import draw_noise
from models.tiny import world
from train import dry_run
from train.bench import adapted, prior


@pytest.mark.parametrize("gradient_checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
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


@pytest.fixture
def results(tmp_path):
    """Of a run with adapt=true, in which another file stands in for what was adapted."""
    kv, age = ("controls/tiny/watercolour-kv.safetensors", "controls/tiny/age.safetensors")
    about = {"source": "tiny/base", "target": "tiny/dmd"}
    cells = [about | {"control": "watercolour-kv", "adapted_from": ""}]
    cells += [about | {"control": "age", "adapted_from": "watercolour-kv"}]
    cells += [about | {"control": "age", "adapted_from": "watercolour-kv", "target": "tiny/base"}]
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"config": {"controls": [kv, age]}, "cells": cells}))
    return path


@pytest.mark.slow
def test_a_perfect_pupil_has_what_the_trained_one_is_to_reach(results, tmp_path):
    """The base's own change at every step, where dmd alone makes little of watercolour-kv; what is left of
    prompts stands beside.
    """
    words = [f"results={results}", "images=12", f"out={tmp_path}/out", f"cache={tmp_path}"]
    adapted.main(merge(adapted.Config, words))
    record = json.loads((tmp_path / "out/results.json").read_text())["cells"]
    rows, (claims,) = record["effects"], record["claims"]
    assert [row["evaluator"] for row in rows] == ["clip", "probe", "geometry"]
    for row in rows:
        shares = {side: row["share"][side]["value"] for side in ("without", "original", "pupil")}
        assert shares["original"] < 0.5 * shares["pupil"] and abs(shares["without"]) < 0.2
        assert 0 < row["preservation"]["source"] < row["preservation"]["adapted"] < 1
    assert claims["on"] == "tiny/dmd" and claims["source, original"][0] < 0.95 < claims["source"][0]
    assert claims["adapted"] != claims["original"] and claims["pupil"][0] < claims["without"][0]
    with pytest.raises(UserError, match="no results"):
        adapted.main(merge(adapted.Config, [f"results={tmp_path}/nowhere.json"]))


def test_a_pupil_that_is_taught_nothing_is_the_member_itself():
    family = Family("tiny")
    member, prompts = family.member("dmd"), family.encode(["a face", "a hat"])
    same = adapted.perfect(member, member, nullcontext, 4)
    x = draw_noise([1, 2], family.latent_shape, 1)[:, 0]
    with torch.no_grad():
        ours, plain = (its.denoiser(x, its.levels[0], prompts) for its in (same, member))
    assert torch.equal(ours, plain)


def test_a_text_holds_what_the_probe_sees_of_it():
    texts = ["portrait of a person, hat, smiling"]
    seen = Attributes("models/tiny/weights/probe").features(
        world.to_unit(world.pictures([face for face in world.faces(400, 3) if face.hat][:8]))
    )
    shares = [prior.held(texts, seen[k : k + 1])[0] for k in range(len(seen))]
    assert set(shares) <= {0.5, 1.0}


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
