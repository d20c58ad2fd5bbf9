"""The embedded world: portraits, captions, and what they claim."""

from dataclasses import replace

import numpy as np
import pytest

from configs import merge
from models.tiny import world
from models.tiny.faces import ATTRIBUTES, STYLES, Face, attributes, claims, describe, draw, styled
from train.tiny_parts import Config


def test_each_part_has_its_own_numbers_where_none_are_given():
    assert merge(Config, {}).batch_size is None


def test_same_face_same_bytes_other_attribute_other_picture():
    face = Face(smile=0.8, age=0.2)
    assert np.array_equal(draw(face), draw(face))
    for change in (
        {"smile": -face.smile},
        {"hat": not face.hat},
        {"age": 1 - face.age},
        {"background": "white"},
    ):
        assert not np.array_equal(draw(face), draw(replace(face, **change)))


def test_one_attribute_changes_its_own_place():
    plain, hat = draw(Face()), draw(Face(hat=True))
    changed = np.argwhere((plain != hat).any(-1))
    assert changed[:, 0].max() < 32, "a hat stays in the upper half"


def test_face_k_depends_on_seed_and_k_alone():
    assert world.faces(3, 7) == world.faces(9, 7)[:3]
    assert world.faces(3, 7) != world.faces(3, 8)


def test_a_full_caption_claims_the_truth():
    for face in world.faces(200, 1):
        truth = dict(zip(ATTRIBUTES, attributes(face), strict=True))
        for name, value in claims(describe(face)).items():
            if name in ("age", "eyes", "size", "smile", "x"):
                assert abs(truth[name] - value) <= 0.7, (describe(face), name)
            else:
                assert truth[name] == value, (describe(face), name)


def test_captions_leave_attributes_out():
    people = world.faces(300, 2)
    said = np.mean([len(claims(text)) for text in world.captions(people, 2)])
    assert 3 < said < 8 < np.mean([len(claims(describe(face))) for face in people])


@pytest.mark.parametrize("style", STYLES)
def test_styles_are_held_out(style):
    assert not any(face.style for face in world.faces(500, 0))
    assert style not in " ".join(world.captions(world.faces(200, 0), 0))
    face = styled(Face(), style)
    assert claims(describe(face))[f"style {style}"] == 1
    assert np.abs(draw(face).astype(float) - draw(Face())).mean() > 3
