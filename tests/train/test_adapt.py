"""Controls taught to members that lose their effect: it comes back; a killed run goes on."""

import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from support import hub
from torch.nn.modules.module import register_module_forward_hook

from configs import ROOT, UserError, merge
from controls import convert, formats
from controls.layers import named_layers, targets
from controls.lora import Card, Control, content, fused, fusing, shapes
from models import promptsets
from models.cards import card
from models.evaluators import load_evaluators
from models.families import Family
from models.loading import skeleton
from models.sampler import alone, draw_noise, finish
from train import adapt
from train.adapt import Config, reached
from train.run import Run
from train.shares import Shares

KV = "controls/tiny/watercolour-kv.safetensors"
TEXTS = ["portrait of a person", "portrait of a person, hat", "portrait of a person, long black hair"]
SMALL = [
    *(f"prompts={TEXTS}", "runs=2", "rounds=2", "steps=20", "batch_size=4", "save_every=5", "sample_every=0"),
    *("ahead=2", "sample_seeds=[1]", "judged=8", "compared=0", "wandb=disabled"),
]


def trained(folder, *words):
    return formats.load(adapt.main(merge(Config, [*SMALL, f"out={folder}", f"cache={folder}/cache", *words])))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("whole"), "runs=6", "judged=16")


@pytest.fixture(scope="module")
def loud(tmp_path_factory):
    """As it comes, its strength not set."""
    return trained(tmp_path_factory.mktemp("loud"), "judged=0")


def effect(control, member: str) -> float:
    """By the probe, on texts and seeds that are not learnt on."""
    family = Family("tiny", dtype=torch.float32)
    probe, its = load_evaluators(family.card, names=["probe"])["probe"], family.member(member)
    texts, words = family.card.prompts, ("watercolour portrait of a person", "portrait of a person")

    def seen() -> np.ndarray:
        images = family.draw(its, texts, [40 + k for k in range(len(texts))])
        return probe.score(probe.features(images), *words)

    plain = seen()
    with fused(its.denoiser.net, control, 1.0):
        return float((seen() - plain).mean())


@pytest.mark.slow
def test_the_effect_comes_back(whole):
    """Of what the original does on its source, dmd has a fifth; adapted, most of it, and not twice."""
    original = formats.load(KV)
    there, before, after = effect(original, "base"), effect(original, "dmd"), effect(whole, "dmd")
    assert before < 0.4 * there < 0.6 * there < after < 1.6 * there


def test_the_file_is_one_like_the_original_and_says_where_it_comes_from(loud, tmp_path):
    original = formats.load(KV)
    assert loud.layers == original.layers and loud.card.rank == original.card.rank
    assert loud.card.name == "watercolour-kv-dmd" and (loud.card.member, loud.card.kind) == ("dmd", "lora")
    assert loud.card.recipe["adapted_from"] == {
        "name": "watercolour-kv",
        "member": "tiny/base",
        "hash": content(original),
    }
    assert loud.card.recipe["positive"] == original.card.recipe["positive"]
    formats.save(loud, tmp_path / "ours.safetensors")
    kohya = tmp_path / "kohya.safetensors"
    convert.main(tmp_path / "ours.safetensors", kohya, merge(convert.Config, ["format=kohya"]))
    back = convert.opened(kohya, convert.Config())
    for layer in loud.layers:
        (a, b), (c, d) = loud.pair(layer), back.pair(layer)
        assert torch.allclose(loud.factor() * b @ a, back.factor() * d @ c, atol=1e-6)


@pytest.mark.parametrize("after", [11, pytest.param(16, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_bit_for_bit(loud, tmp_path, monkeypatch, after):
    """Also where it is killed right after its runs were drawn anew, in step 10."""
    left, descend = after, Run.descend

    def dying(run, step):
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        descend(run, step)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "descend", dying)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path, "judged=0")
    again = trained(tmp_path, "judged=0")
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in loud.tensors.items())


@pytest.mark.slow
def test_one_file_for_two_members_has_the_gradients_of_both(tmp_path):
    control = trained(tmp_path, "members=[tiny/dmd,tiny/lightning]", "judged=0", "runs=6")
    assert control.card.name == "watercolour-kv-dmd-lightning"
    assert control.card.recipe["members"] == ["tiny/dmd", "tiny/lightning"]
    original = formats.load(KV)
    for member in ("dmd", "lightning"):
        assert effect(control, member) > 1.5 * effect(original, member)


TWO = ["compared=3", "judged=0", "members=[tiny/dmd,tiny/lcm]"]


@pytest.mark.parametrize("more", [["judged=0"], pytest.param(TWO, marks=pytest.mark.slow)])
def test_what_is_asked_is_what_was_said(tmp_path, capsys, more):
    words = [*SMALL, *more, "steps=6", f"out={tmp_path}", f"cache={tmp_path}/cache"]
    adapt.main(merge(Config, [*words, "dry_run=true"]))
    line = re.search(r"network evaluations: (.*)", capsys.readouterr().out)[1]
    said = sum(int(count) for count in re.findall(r"(\d+) of [\w-]+", line))
    made = []

    def count(module, args, output) -> None:
        if type(module).__name__ == "UNet2DConditionModel":
            made.append(len(output[0]) * (3 if output[0].requires_grad else 1))

    hook = register_module_forward_hook(count)
    try:
        adapt.main(merge(Config, words))
    finally:
        hook.remove()
    assert said == pytest.approx(sum(made), rel=0 if len(more) == 1 else 0.1)  # of a step's member, the mean


@pytest.mark.slow
def test_two_processes_learn_what_one_with_twice_the_batches_learns(tmp_path):
    words = ["steps=4", "rounds=2", "judged=0"]
    one = trained(tmp_path / "one", *words, "gradient_accumulation_steps=2")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29537"]
    done = subprocess.run(
        [*launch, "train/adapt.py", *SMALL, *words, f"out={tmp_path}/two"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    two = formats.load(tmp_path / "two/watercolour-kv-dmd/control.safetensors")
    assert all(torch.allclose(two.tensors[name], tensor, atol=1e-4) for name, tensor in one.tensors.items())


@pytest.mark.slow
def test_what_it_has_brought_is_measured_on_other_prompts(tmp_path, capsys):
    """Beside the original on the same images, whose shares are those that transfer finds."""
    trained(tmp_path, "steps=4", "judged=0", "compared=8")
    rows = json.loads((tmp_path / "watercolour-kv-dmd/shares.json").read_text())
    assert [(row["member"], row["evaluator"]) for row in rows] == [
        ("tiny/dmd", "clip"),
        ("tiny/dmd", "probe"),
        ("tiny/dmd", "geometry"),
    ]
    assert all(0 < row["original"]["value"] < 0.4 for row in rows[:2]) and "adapted" in rows[0]
    assert all(row["judged"] == row["adapted"] for row in rows), "nothing else was judged by"
    assert "Share of the original's effect" in " ".join(capsys.readouterr().out.split())


def measured_on(its) -> list[str]:
    """A family's prompts that nothing is taught on, in their order."""
    texts = promptsets.read([its.more_prompts]).texts
    return [*its.prompts, *texts[: len(texts) // 2]]


@pytest.mark.parametrize(("family", "count"), [("tiny", 360), ("sdxl", 180)])
def test_gains_and_strength_are_set_where_nothing_is_learnt_nor_measured(family, count):
    its = card(family)
    learnt, judging = adapt.divided(adapt.further(its))
    measured = measured_on(its)
    assert not {*learnt} & {*judging} and not {*learnt, *judging} & {*measured}
    assert len(learnt) == 3 * len(judging) == count


def test_what_judges_is_composed_as_what_is_measured():
    """A student's effect goes with how much a prompt says, and whether it names a background or the skin: so
    what is learnt on, what judges and what more prompts add to those measured say as much.
    """
    its = card("tiny")
    measured = measured_on(its)
    parts = (lambda text: text.count(",")), (lambda text: "background" in text), (lambda text: "skin" in text)
    for texts in measured[216:], *adapt.divided(adapt.further(its)):
        for part in parts:
            ours, theirs = (np.mean([part(text) for text in its]) for its in (texts, measured[:216]))
            assert ours == pytest.approx(theirs, rel=0.06)


def test_too_few_prompts_are_learnt_on_and_judged_by():
    assert adapt.divided(TEXTS) == (TEXTS, TEXTS)
    assert adapt.divided([*TEXTS, "a fourth"]) == (TEXTS, ["a fourth"])


def test_what_is_taught_is_as_strong_as_the_effect_is_still_off(tmp_path, monkeypatch):
    """On each member and at each scale by itself, from the second round on."""
    offs = {(0, 0.5): 0.3, (0, 1.0): -0.2, (1, 0.5): 0.0, (1, 1.0): -9.0}
    monkeypatch.setattr(adapt.Lesson, "judge", lambda self, scale: None)
    monkeypatch.setattr(adapt.Lesson, "off", lambda self, m, scale, *_: offs.get((m, scale), 9.0))
    trained(tmp_path, "members=[tiny/dmd,tiny/lcm]", "steps=4", "rounds=2")
    folder = tmp_path / "watercolour-kv-dmd-lcm"
    assert {path.name for path in folder.glob("points-*")} == {"points-0.safetensors", "points-1.safetensors"}
    first, second = (load_file(folder / f"points-{k}.safetensors") for k in range(2))
    assert torch.equal(first["gains"], torch.ones(1, 2, 2)) and not len(first["offs"])
    wanted = torch.tensor([[np.exp(-0.3), np.exp(0.2)], [1.0, adapt.GAINS[1]]], dtype=torch.float32)
    assert torch.allclose(second["gains"], torch.stack([torch.ones(2, 2), wanted]))
    assert torch.allclose(second["offs"], torch.tensor([[[0.3, -0.2], [0.0, -9.0]]]))


def test_a_larger_change_that_brings_little_is_taken_back():
    assert adapt.next_gain([1.0], [-0.25]) == pytest.approx(np.exp(0.25))
    assert adapt.next_gain([1.0, 1.28], [-0.25, -0.23]) == 1.0  # saturated: more would be another face
    assert adapt.next_gain([1.0, 1.28, 1.0], [-0.25, -0.23, -0.2]) == 1.0
    assert adapt.next_gain([1.0, 1.28], [-0.25, -0.1]) == pytest.approx(1.28 * np.exp(0.1))
    assert adapt.next_gain([1.0, 1.44], [-0.36, 0.43]) == pytest.approx(1 + 0.44 * 0.36 / 0.79)
    # weights went on learning meanwhile: a smaller change is gone on from
    assert adapt.next_gain([1.0, 0.74], [0.30, 0.34]) == pytest.approx(0.74 * np.exp(-0.34))
    assert adapt.next_gain([1.0, 2.9], [-1.5, -0.9]) == adapt.GAINS[1]


@torch.no_grad()
def test_the_change_that_is_taught_is_that_of_where_the_source_goes():
    """All the way from the source's first level it is the difference of its finished latents."""
    family, original = Family("tiny", dtype=torch.float32), formats.load(KV)
    source, prompts = family.member("base"), family.encode(TEXTS)
    noise = draw_noise([1, 2, 3], family.latent_shape, len(source.levels))
    on = fusing(source.denoiser.net, original, 1.0)

    def change(ahead: int) -> torch.Tensor:
        return adapt.taught_change(source, on, noise[:, 0], source.levels[0], prompts, ahead)

    without = finish(alone(source), noise, prompts)
    with on():
        whole = finish(alone(source), noise, prompts) - without
    assert torch.allclose(change(len(source.levels)), whole, atol=1e-5)
    far = [float((change(ahead) - whole).norm() / whole.norm()) for ahead in (1, 4)]
    assert far[1] < 0.8 * far[0]


def test_what_is_seen_of_the_original_is_kept(tmp_path, monkeypatch):
    """Drawn once; anew where the file is damaged, or the original another."""
    family, drawn = Family("tiny", dtype=torch.float32), []
    source, seen = family.member("dmd"), Shares.seen
    monkeypatch.setattr(Shares, "seen", lambda *args: drawn.append(1) or seen(*args))

    def effects(key: str) -> dict[str, np.ndarray]:
        words = "a hat", "a person"
        shares = Shares(family, load_evaluators(family.card, names=["probe"]), words, TEXTS, 7)
        on = fusing(source.denoiser.net, formats.load(KV), 1.0)
        shares.source(family, source, (nullcontext, on), tmp_path, ("dmd", key))
        return shares.own

    first, again = effects("one"), effects("one")
    assert len(drawn) == 2 and np.array_equal(first["probe"], again["probe"])
    plain, edited = tmp_path.iterdir()
    edited.write_bytes(edited.read_bytes()[:100])
    assert np.array_equal(effects("one")["probe"], first["probe"]) and len(drawn) == 3
    effects("other")
    assert len(drawn) == 4 and len(list(tmp_path.iterdir())) == 3, "without it the source is the same"


def test_how_exactly_a_share_is_known_is_right_in_19_of_20_cases():
    """Simulated, with images of a prompt alike: without that it would be right in 15."""
    prompts, each, rng = 60, 4, np.random.default_rng(0)

    class Plain:
        def score(self, features, *words):
            return features[:, 0]

    def effects(mean: float) -> dict[str, np.ndarray]:
        alike = np.repeat(rng.normal(0, 0.5, (prompts, 1)), each, 0)
        return {name: mean + alike + rng.normal(0, 0.7, (prompts * each, 1)) for name in ("a", "b")}

    shares = Shares(
        None, {"a": Plain(), "b": Plain()}, ("hat", "none"), np.repeat(np.arange(prompts), each), 0
    )
    shares.rows, nothing, right = slice(None), {name: np.zeros((prompts * each, 1)) for name in "ab"}, []
    for _ in range(400):
        shares.own = shares.effects(nothing, effects(2.0))
        after = effects(1.0)
        off = np.mean(shares.middle(nothing, after)) - np.log(0.5)
        right.append(abs(off) <= shares.error(nothing, after, 2))
    assert 0.92 <= np.mean(right) <= 0.98
    assert shares.error(nothing, nothing, 2) == np.inf


@pytest.mark.parametrize(("error", "images"), [(0.09, 8), (0.12, 16), (np.inf, 32)])
def test_more_images_set_the_strength_where_it_is_uncertain(error, images, tmp_path, monkeypatch):
    """On prompts that are learnt on too, after those that are not; at most four times as many."""
    texts, drawn, init = [*TEXTS, "portrait of a person, beard"], [], Shares.__init__
    monkeypatch.setattr(Shares, "__init__", lambda *args: drawn.append(args[4]) or init(*args))
    monkeypatch.setattr(Shares, "error", lambda *_: error)
    trained(tmp_path, "steps=2", "precision=0.1", f"prompts={texts}")
    assert len(drawn[-1]) == images and drawn[-1][0] == texts[3]
    assert {*drawn[-1]} == ({*texts} if images > 8 else {texts[3]})


def test_the_levels_on_which_the_source_is_asked_on_its_way():
    family = Family("tiny", dtype=torch.float32)
    base, dmd = family.member("base"), family.member("dmd")
    for level in dmd.levels:
        way = adapt.onward(base, level, 4)
        ratios = [there.ratio for there in way]
        assert ratios[0] == pytest.approx(level.ratio) and ratios == sorted(set(ratios), reverse=True)
        assert len(way) == min(4, 1 + sum(own.ratio < 0.999 * level.ratio for own in base.levels))
        assert all(there in base.levels for there in way[1:])
        assert adapt.onward(base, level, 1) == way[:1]
        assert adapt.onward(dmd, level, 4) == [level]  # it draws fresh noise


@pytest.mark.slow
def test_a_control_without_words_is_compared_along_its_own_direction(tmp_path):
    words = [f"control={ROOT}/controls/tiny/space-1.safetensors", "steps=2", "rounds=1", "compared=8"]
    control = trained(tmp_path, *words, "judged=0", "member=tiny/lightning")
    assert control.card.kind == "sliderspace" and control.card.recipe["scales"] == [-1.0, 1.0]
    rows = json.loads((tmp_path / "space-1-lightning/shares.json").read_text())
    assert rows[0]["original"]["value"] == pytest.approx(1, abs=0.5)


def test_the_dose_that_is_right():
    assert reached((0.5, 1.0, 1.5), [-1.0, -0.2, 0.2]) == pytest.approx(1.25)
    assert reached((0.5, 1.0, 1.5), [0.1, 0.2, 0.4]) == 0.5  # too strong at all: the nearest
    assert reached((0.5, 1.0, 1.5), [-0.4, -0.1, -0.2]) == 1.0


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("members=[tiny/dmd,sdxl/dmd2]", "one family"),
        ("scales=[0,1]", "nothing to teach"),
        ("rounds=99", "1 … 20"),
        ("ahead=0", "ahead"),
        ("control=nowhere.safetensors", "nowhere"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(word, says, tmp_path):
    with pytest.raises(UserError, match=says):
        trained(tmp_path, word)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_it_takes_on_sdxl_is_said_without_weights(tmp_path, monkeypatch, capsys):
    """Evaluations of the student and of its source, both networks in memory."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.write_configs(tmp_path / "hub", "sdxl")
    net = skeleton(card("sdxl"), "base")
    named, tensors = named_layers(net), {}
    for layer in targets(net, "xattn-strict", "lierla"):
        a, b = shapes(named[layer], 4)
        tensors |= {f"{layer}.lora_A.weight": torch.ones(a), f"{layer}.lora_B.weight": torch.ones(b)}
    about = Card("lora", "style", "sdxl", "base", 4, 4.0, "xattn-strict", "lierla")
    formats.save(Control(about, tensors), tmp_path / "style.safetensors")
    words = [f"control={tmp_path}/style.safetensors", "member=sdxl/dmd2", "dry_run=true", "dtype=bf16"]
    adapt.main(merge(Config, words))
    said = capsys.readouterr().out
    counted = {name: int(count) for count, name in re.findall(r"(\d+) of ([\w-]+)", said)}
    # runs, scales, rounds, steps; images without and with it, at two scales and held out
    points, looks = 24 * 2 * 3 * 4, (1 + 2) * 192 + 2 * 24
    # 4 steps to the end, without and with the original, guided
    assert counted["base"] == points * 4 * 2 * 2 + looks * 100 and counted["dmd2"] > points * 2
    assert 10 < float(re.search(r"memory at the most: ([\d.]+) GB", said)[1]) < 60
    assert re.search(r"base +2.57 +5.1 +5.1", said) and re.search(r"dmd2 +2.57 +5.1 +5.1", said)


@pytest.mark.slow
def test_between_two_families_of_one_architecture(tmp_path, capsys):
    """As between two fine-tunes of a base: the source is loaded from its own family."""
    words = ["member=tiny-teachers/lightning", "steps=2", "rounds=1", "judged=0", "compared=3"]
    adapt.main(merge(Config, [*SMALL, *words, f"out={tmp_path}", "dry_run=true"]))
    assert "lightning" in capsys.readouterr().out
    control = trained(tmp_path, *words)
    assert (control.card.family, control.card.member) == ("tiny-teachers", "lightning")
    assert control.card.recipe["adapted_from"]["member"] == "tiny/base"
    rows = json.loads((tmp_path / "watercolour-kv-lightning/shares.json").read_text())
    assert {row["member"] for row in rows} == {"tiny-teachers/lightning"}


def test_diffusers_own_loader_draws_what_we_draw_with_it(loud, tmp_path):
    formats.save(loud, tmp_path / "control.safetensors")
    weights = ROOT / "models/tiny/weights"
    pipe = DiffusionPipeline.from_pretrained(
        weights / "base",
        unet=UNet2DConditionModel.from_pretrained(weights / "dmd"),
        scheduler=LCMScheduler.from_pretrained(weights / "dmd", subfolder="scheduler"),
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(tmp_path / "control.safetensors")
    told = {"timesteps": [999, 749, 499, 249], "guidance_scale": 0, "height": 64, "width": 64}
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    theirs = pipe(TEXTS[:2], generator=generators, output_type="latent", **told).images
    family = Family("tiny", dtype=torch.float32)
    dmd, noise = family.member("dmd"), draw_noise([1, 2], family.latent_shape, 4)
    with torch.no_grad(), fused(dmd.denoiser.net, loud, 1.0):
        ours = finish(alone(dmd), noise, family.encode(TEXTS[:2]))
    assert (theirs - ours).abs().max() < 2e-4
