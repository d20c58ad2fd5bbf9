"""Pictures to train on: folders as users have them, and their mistakes, each one line."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from configs import UserError, entry, merge
from models.families import Family
from train import image_slider, lora
from train.image_slider import Config, pictures
from train.pictures import read

SHORT = ["steps=2", "batch=2", "sample_every=0", "sample_seeds=[1]", "sample_scales=[0,1]", "wandb=disabled"]


def paint(path, colour, size=(32, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_a_folder_of_pictures_with_captions(tmp_path):
    paint(tmp_path / "a.png", "red", (40, 20))
    paint(tmp_path / "b.jpg", "blue")
    rows = [{"file_name": "a.png", "text": "a red thing"}, {"file_name": "b.jpg", "text": "a blue thing"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    images, columns = read(str(tmp_path), 16)
    assert images.shape == (2, 3, 16, 16) and columns["text"] == ["a red thing", "a blue thing"]
    assert columns["file_name"] == ["a.png", "b.jpg"]
    assert torch.equal(images[0, :, 8, 8], torch.tensor([1.0, -1.0, -1.0]))


def test_mistakes_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as error:
        read(str(tmp_path / "empty"), 16)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="neither a folder with pictures"):
        read(str(tmp_path / "nowhere"), 16)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"a\.png is not a picture"):
        read(str(tmp_path / "broken"), 16)


def test_one_folder_per_scale(tmp_path):
    for scale, colour in {"-1": "black", "1": "white", "2": "red"}.items():
        for name in ("x.png", "y.png"):
            paint(tmp_path / scale / name, colour)
    pairs = pictures(Config(data=str(tmp_path)), 64)
    assert pairs.scales == [-1, 1, 2] and pairs.images.shape == (3, 2, 3, 64, 64)
    assert pairs.images[0].max() == -1 and pairs.images[1].min() == 1
    named = pictures(Config(data=str(tmp_path), folders=["2", "-1"], scales=[3.0, -3.0]), 64)
    assert named.scales == [-3, 3] and torch.equal(named.images[0], pairs.images[0])
    (tmp_path / "1/x.png").unlink()
    with pytest.raises(UserError, match=r"do not match: missing x\.png at 1"):
        pictures(Config(data=str(tmp_path)), 64)


def test_metadata_with_scale_and_pair(tmp_path):
    rows = []
    for pair in ("p", "q"):
        for scale in (-1, 1):
            name = f"{pair}{scale}.png"
            paint(tmp_path / name, (127 + 100 * scale,) * 3)
            rows.append({"file_name": name, "scale": scale, "pair": pair, "text": f"face {pair}"})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = pictures(Config(data=str(tmp_path)), 64)
    assert pairs.scales == [-1, 1] and pairs.captions == ["face p", "face q"]
    assert (pairs.images[1] > pairs.images[0]).all()


def test_pairs_of_the_embedded_world_differ_in_the_attribute_alone():
    pairs = pictures(Config(pairs=3), 64)
    changed = (pairs.images[0] != pairs.images[1]).any(1).float().mean((1, 2))
    assert pairs.images.shape == (2, 3, 3, 64, 64) and ((changed > 0) & (changed < 0.2)).all()


def test_an_image_slider_trains_on_a_folder(tmp_path):
    for scale, shade in {"-1": 60, "1": 200}.items():
        paint(tmp_path / "data" / scale / "a.png", (shade,) * 3)
    path = image_slider.main(merge(Config, [*SHORT, f"data={tmp_path}/data", f"out={tmp_path}/run"]))
    assert path.is_file() and (path.parent / "samples/final.png").is_file()


@pytest.mark.parametrize(("word", "says"), [("data=nowhere", "tiny:ATTRIBUTE"), ("data=tiny:nose", "smile"), ("member=tiny/turbo", "dmd")])
def test_bad_input_is_one_line_and_exit_code_2(word, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        entry(lambda: image_slider.main(merge(Config, [*SHORT, word, f"out={tmp_path}"])))
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(said) == 1 and says in said[0]


def test_a_lora_trains_on_a_folder_and_with_its_prior(tmp_path):
    paint(tmp_path / "data/a.png", "red")
    words = [word for word in SHORT if "scales" not in word]
    path = lora.main(merge(lora.Config, [*words, f"data={tmp_path}/data", "prior=1", "prior_images=2", f"out={tmp_path}/run"]))
    assert path.is_file()


def test_the_prior_term_is_zero_until_the_control_acts():
    cfg = merge(lora.Config, ["prior_images=2", "batch=2", "out=/nowhere", "member=tiny/dmd"])
    family = Family("tiny")
    memory = lora.Memory(cfg, SimpleNamespace(family=family, member=family.member("dmd")))
    assert memory(torch.Generator().manual_seed(0)) < 1e-8
