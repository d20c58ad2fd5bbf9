"""The hand-made measurements: they see what the world's pictures show and what a slider changes, and share
nothing with the program that draws them.
"""

import ast
from dataclasses import replace

import numpy as np
import pytest
import torch

from analysis.images.cache import acting
from configs import ROOT, UserError
from controls import formats
from models.evaluators import load_evaluators
from models.families import Family
from models.sampler import alone
from models.tiny import faces, geometry, world
from models.tiny.geometry import MEASURES, NAMES, Geometry

PEOPLE = world.faces(40, 3)
PAIRS = [  # attribute of a face, its two values, the words of both, the least share of faces that must rise
    ("smile", 1.0, -1.0, "smiling", "frowning", 1.0),
    ("eyes", 0.9, 0.1, "big eyes", "small eyes", 0.9),
    ("age", 0.95, 0.05, "old", "young", 0.95),
    ("glasses", True, False, "glasses", "no glasses", 1.0),
    ("beard", True, False, "beard", "no beard", 0.95),
    ("hat", True, False, "hat", "no hat", 1.0),
    ("x", 1.0, -1.0, "on the right", "on the left", 1.0),
    ("size", 1.0, 0.0, "close up", "far away", 0.9),
    ("skin", "light", "dark", "light skin", "dark skin", 1.0),
    ("background", "blue", "pink", "blue background", "pink background", 1.0),
    ("background", "white", "green", "white background", "green background", 1.0),
    ("style", "watercolour", "", "watercolour portrait", "portrait", 1.0),
    ("style", "crayon", "", "crayon portrait", "portrait", 1.0),
    ("style", "pixel", "", "pixel portrait", "portrait", 1.0),
]


@pytest.fixture(scope="module")
def evaluator():
    return Geometry("portraits")


def pictures(**changes) -> torch.Tensor:
    return world.to_unit(world.pictures([replace(face, **changes) for face in PEOPLE]))


@pytest.mark.parametrize(("name", "more", "less", "positive", "negative", "share"), PAIRS)
def test_a_score_rises_with_what_its_words_say(evaluator, name, more, less, positive, negative, share):
    high, low = (
        evaluator.score(evaluator.features(pictures(**{name: value})), positive, negative)
        for value in (more, less)
    )
    assert (high > low).mean() >= share
    assert 0.4 < (high - low).mean() < 2, "of the distance between the two descriptions"


@pytest.mark.parametrize("hair", faces.HAIR_STYLES)
def test_kinds_of_hair_are_told_apart(evaluator, hair):
    """Without hats; each kind has the highest mean of its own measurement."""
    means = {kind: evaluator.features(pictures(hair=kind, hat=False)).mean(0) for kind in faces.HAIR_STYLES}
    column = NAMES.index("bald" if hair == "bald" else f"{hair}_hair")
    assert max(means, key=lambda kind: means[kind][column]) == hair


@pytest.mark.parametrize("colour", faces.HAIRS)
def test_colours_of_hair_are_told_apart(evaluator, colour):
    means = {
        name: evaluator.features(pictures(hair="short", hair_colour=name, hat=False, age=0.2)).mean(0)
        for name in faces.HAIRS
    }
    column = NAMES.index(f"{colour} hair")
    assert max(means, key=lambda name: means[name][column]) == colour


def test_a_mirrored_picture_is_the_same_on_the_other_side(evaluator):
    plain = pictures()
    seen, mirrored = evaluator.features(plain), evaluator.features(plain.flip(-1))
    side = NAMES.index("position")
    assert np.allclose(mirrored[:, side], -seen[:, side])
    others = [k for k, name in enumerate(NAMES) if name not in ("position", "pixel")]  # a mosaic has a phase
    assert np.allclose(mirrored[:, others], seen[:, others], atol=1e-4)


def test_features_do_not_depend_on_the_batch(evaluator):
    plain = pictures()[:6]
    assert np.allclose(
        evaluator.features(plain), np.concatenate([evaluator.features(one[None]) for one in plain])
    )


def test_it_reads_all_words_of_a_caption_and_those_the_probe_reads():
    """As many claims as the world's own reader finds in its captions, each with a measurement."""
    for text in world.captions(PEOPLE, 5, keep=0.8):
        claimed = geometry.claims(text)
        skin = sum(name.startswith("skin") for name in faces.claims(text))
        assert len(claimed) == len(faces.claims(text)) and claimed.keys() <= MEASURES.keys() and skin <= 1
    assert geometry.claims("an old person, no hat, long black hair") == {
        "age": 1.0,
        "hat": 0.0,
        "long_hair": 1.0,
        "black hair": 1.0,
    }
    assert geometry.claims("a photo of a blackboard") == {}


def test_words_without_a_measurement_are_one_line(evaluator):
    with pytest.raises(UserError, match="no measurement between 'a dog' and 'a cat'"):
        evaluator.direction("a dog", "a cat")
    with pytest.raises(UserError, match="knows nothing of 'cars'"):
        Geometry("cars")
    with pytest.raises(UserError, match="not finite"):
        evaluator.features(torch.full((1, 3, 64, 64), float("nan")))


def test_what_is_no_portrait_gives_finite_numbers(evaluator):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((4, 3, 64, 64), generator=generator)
    flat = torch.ones(3, 3, 64, 64) * torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1)
    for images in (noise, flat):
        found = evaluator.features(images)
        assert found.shape == (len(images), len(NAMES)) and np.isfinite(found).all()
        assert np.abs(found).max() < 20


def test_rest_leaves_out_what_the_words_are_about(evaluator):
    features = np.arange(2.0 * len(NAMES)).reshape(2, -1)
    rest = evaluator.rest(features, "smiling", "frowning")
    assert rest.tolist() == np.delete(features, NAMES.index("smile"), -1).tolist()


def test_it_shares_nothing_with_the_program_that_draws():
    names = {
        node.module
        for node in ast.walk(ast.parse((ROOT / "models/tiny/geometry.py").read_text()))
        if isinstance(node, ast.ImportFrom)
    }
    assert not [name for name in names if name.startswith("models")]


def test_shipped_sliders_move_their_own_score_on_a_student(evaluator):
    """Drawn by lightning, where the networks' pictures differ most from the program's."""
    family = Family("tiny", dtype=torch.float32)
    member, texts = family.member("lightning"), family.card.prompts
    words = {"smile": ("smiling", "frowning"), "eyes": ("big eyes", "small eyes"), "hat": ("hat", "no hat")}
    for name in ("smile", "eyes"):
        control = formats.load(ROOT / f"controls/tiny/{name}.safetensors")
        seen = []
        for scale in (-1.0, 1.0):
            with acting(alone(member), control, scale, "tiny"):
                seen.append(evaluator.features(family.draw(member, texts, list(range(len(texts))))))
        moved = {word: evaluator.score(seen[1] - seen[0], *pair) for word, pair in words.items()}
        origin = {word: evaluator.score(0 * seen[0], *pair) for word, pair in words.items()}
        change = {word: (moved[word] - origin[word]).mean() for word in words}
        assert change[name] > 0.15 and abs(change["hat"]) < change[name] / 4


def test_the_shipped_lora_of_keys_and_values_moves_its_own_source():
    """At least .3 of what true watercolours differ by, by every evaluator; the word alone does nothing."""
    family = Family("tiny", dtype=torch.float32)
    base, texts, words = family.member("base"), family.card.prompts[:8], ("watercolour portrait", "portrait")
    control = formats.load(ROOT / "controls/tiny/watercolour-kv.safetensors")
    assert all(name.rsplit(".lora_")[0].endswith(("to_k", "to_v")) for name in control.tensors)
    with acting(alone(base), control, 1.0, "tiny"):
        drawn = family.draw(base, texts, list(range(8)))
    plain = family.draw(base, texts, list(range(8)))
    for evaluator in load_evaluators(family.card).values():
        style, without, seen, before = (
            evaluator.score(evaluator.features(images), *words).mean()
            for images in (pictures(style="watercolour"), pictures(), drawn, plain)
        )
        assert seen - before > 0.3 * (style - without)
