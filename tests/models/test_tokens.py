"""What text encoders and evaluators do not read of a text is said; two texts that are the same to them are an
error.
"""

import pytest
from support import hub

from analysis import transfer
from configs import ROOT, UserError, merge
from models.cards import card
from models.evaluators import Clip
from models.families import Family
from models.tokens import Reader, chat, cuts, tell_apart
from train import image_slider, slider

LONG = "a " * 60
ALIKE = [(f"{LONG}smiling", f"{LONG}frowning"), ("hat 日本", "hat 한국"), ("hat 日本", "hat"), ("Hat", "hat")]
QWEN = hub.qwen_words()
READERS = {
    "clip": Reader(hub.clip_words(), 40),
    "t5": Reader(hub.t5_words(), 24),
    "qwen": Reader(QWEN, 40, chat(QWEN, thinking=True)),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_text_that_is_cut_is_said_with_its_end(kind):
    short, long = "a hat", "a red hat, a blue hat, a green hat, a black hat, a white hat and a pink hat, " * 2
    (line,) = cuts([READERS[kind]], [short, long])
    assert line.startswith("'a red hat, a blue") and f"longer than the {READERS[kind].length} tokens" in line
    assert "hat" in line.split("ends at")[1]
    assert len(cuts([READERS[kind]], [f"{k} {long}" for k in range(9)])) == 4


def test_what_one_reader_is_given_whole_is_not_cut():
    assert not cuts([READERS["clip"], Reader(hub.t5_words(), 500)], [LONG]) and not cuts([], [LONG])


@pytest.mark.parametrize(("a", "b"), ALIKE)
def test_what_is_padded_alike_is_alike(a, b):
    with pytest.raises(UserError, match="are the same text to them"):
        tell_apart([READERS["clip"]], a, b, "them")
    tell_apart(
        [READERS["clip"], Reader(hub.t5_words(), 500)], f"{LONG}b", f"{LONG}c", "them"
    )  # one of them can


@pytest.mark.parametrize("name", ["tiny"])
def test_a_family_asks_its_tokenizers_alone(name):
    family = Family(name)
    assert [reader.length for reader in family.readers()] == [40, 40] and family._pipe is None
    family.tell_apart("a smile", "")


def test_a_family_says_once_what_it_cuts(capsys):
    family = Family("tiny")
    for _ in range(2):
        family.encode([f"{LONG}hat", "hat"])
    assert capsys.readouterr().out.count("longer than the 40 tokens") == 1


@pytest.mark.parametrize(("a", "b"), ALIKE[:2])
def test_an_evaluator_refuses_what_it_cannot_tell_apart(a, b):
    clip = Clip(card("tiny").clip)
    with pytest.raises(UserError, match="are the same text to the evaluator"):
        clip.direction(a, b)
    assert clip.direction(a, "").any() and clip.direction("smiling", "frowning").any()


@pytest.mark.parametrize(("a", "b"), ALIKE)
def test_sliders_between_texts_that_are_alike_are_refused_before_anything_is_written(tmp_path, a, b):
    words = [f"out={tmp_path}/run", "wandb=disabled"]
    pair = {"target": "hat", "positive": a, "unconditional": b}
    with pytest.raises(UserError, match="are the same text to the text encoders of family tiny"):
        slider.main(merge(slider.Config, words, {"prompts": [pair]}))
    with pytest.raises(UserError, match="are the same text to the text encoders of family tiny"):
        image_slider.main(merge(image_slider.Config, words, {"positive": a, "negative": b}))
    assert not (tmp_path / "run").exists()


def test_an_attribute_may_push_the_difference_beyond_what_is_read(tmp_path):
    pair = {"target": "a", "positive": "smiling", "unconditional": "frowning"}
    with pytest.raises(UserError, match="are the same text"):
        slider.main(
            merge(slider.Config, {"prompts": [pair], "attributes": ["hat", LONG], "out": str(tmp_path)})
        )


def test_transfer_refuses_words_that_are_alike(tmp_path):
    words = [
        f"out={tmp_path}/run",
        f"cache={tmp_path}",
        f"controls=[{ROOT}/controls/tiny/smile.safetensors]",
        "wandb=disabled",
    ]
    with pytest.raises(UserError, match="are the same text to the evaluator"):
        transfer.main(merge(transfer.Config, words, {"positive": ALIKE[0][0], "negative": ALIKE[0][1]}))
    assert not (tmp_path / "run").exists()
