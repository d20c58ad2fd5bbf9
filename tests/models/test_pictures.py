"""Pictures to train on: folders as users have them, and their mistakes, each one line."""

import json
import struct
import zlib
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.commands import configured, refused

from analysis.images.quality import against, opened
from configs import UserError, merge
from models.cards import card
from models.families import Family
from models.pictures import load
from train import image_slider, lora
from train.image_slider import Config, pictures
from train.pictures import read

SHORT = [
    "steps=2",
    "batch_size=2",
    "sample_every=0",
    "sample_seeds=[1]",
    "sample_scales=[0,1]",
    "wandb=disabled",
]


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


def kinds(folder):
    """Files whose left half is red, hidden or dark and whose right half is blue, clear or bright, with what a
    reader should see there.
    """
    red, blue, white, black = (255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
    grey = np.concatenate([np.zeros((20, 20)), np.ones((20, 20))], 1)
    palette = Image.new("P", (40, 20), 1)
    palette.putpalette([*red, *blue])
    palette.paste(0, (0, 0, 20, 20))
    photo = Image.new("RGB", (40, 20), red)
    photo.paste(blue, (20, 0, 40, 20))
    seen_through = photo.convert("RGBA")
    seen_through.paste((255, 0, 0, 0), (0, 0, 20, 20))
    turned, exif = photo.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[274] = 6  # to be turned a quarter clockwise
    made = {
        "rgba.png": (seen_through, {}, white, blue),
        "rgba.webp": (seen_through, {"lossless": True}, white, blue),
        "la.png": (seen_through.convert("LA"), {}, white, (29, 29, 29)),
        "p.png": (palette, {"transparency": 0}, white, blue),
        "p.gif": (palette, {"transparency": 0}, white, blue),
        "plain.gif": (palette, {}, red, blue),
        "rgb.png": (photo, {"transparency": red}, white, blue),
        "exif.jpg": (turned, {"exif": exif, "quality": 95}, red, blue),
        "exif.tif": (turned, {"exif": exif}, red, blue),
        "EXIF.PNG": (turned, {"exif": exif}, red, blue),
        "cmyk.tif": (photo.convert("CMYK"), {}, red, blue),
        "one.png": (Image.fromarray(grey > 0), {}, black, white),
        "grey16.png": (Image.fromarray((65535 * grey).astype(np.uint16)), {}, black, white),
        "grey16.tif": (Image.fromarray((65535 * grey).astype(np.uint16)), {}, black, white),
        "grey32.tif": (Image.fromarray((65535 * grey).astype(np.int32)), {}, black, white),
        "float.tif": (Image.fromarray(grey.astype(np.float32)), {}, black, white),
        "frames.png": (
            photo,
            {"save_all": True, "append_images": [palette.convert("RGB").rotate(180)]},
            red,
            blue,
        ),
        "frames.gif": (photo, {"save_all": True, "append_images": [photo.rotate(180)]}, red, blue),
    }
    for name, (image, options, *_) in made.items():
        image.save(folder / name, **options)
    return {name: ends for name, (_, _, *ends) in made.items()}


def test_every_kind_of_file_is_read_as_it_looks(tmp_path):
    """Also by the reader of reference pictures, which is the same."""
    for name, ends in kinds(tmp_path).items():
        image = load(tmp_path / name)
        assert (image.mode, image.size) == ("RGB", (40, 20)), name
        assert (
            np.abs(np.array([image.getpixel((5, 10)), image.getpixel((34, 10))]) - np.array(ends)).max() < 4
        ), name
    images, columns = read(str(tmp_path), 16)
    assert torch.equal(images, opened([tmp_path / name for name in columns["file_name"]], 16))


def broken(folder):
    noise = Image.effect_noise((200, 200), 50)
    for name in ("cut.png", "cut.jpg"):
        noise.save(folder / name)
        (folder / name).write_bytes((folder / name).read_bytes()[:9000])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("hello")
    (folder / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    bomb = bytearray((folder / "cut.png").read_bytes())
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)  # width and height, with their checksum
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    (folder / "bomb.png").write_bytes(bomb)
    for name, value in {"high.tif": 255, "nan.tif": float("nan")}.items():
        Image.fromarray(np.full((20, 20), value, np.float32)).save(folder / name)
    Image.fromarray(np.full((20, 20), 10**8, np.int32)).save(folder / "wide.tif")
    return sorted(folder.iterdir())


def test_files_that_are_no_pictures_are_one_line_that_names_them(tmp_path):
    for path in broken(tmp_path):
        with pytest.raises(UserError, match=f"{path.name} is not a picture that can be read: ") as error:
            load(path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400, path.name


def captions(folder, **more):
    return lora.pictures(lora.Config(data=str(folder), prompt="a thing", **more), 16)[1]


@pytest.fixture
def three(tmp_path):
    for name in ("a.png", "train.png", "crash-test.JPG"):
        paint(tmp_path / name, "red")
    return tmp_path


def test_names_do_not_decide_which_pictures_count(three):
    assert read(str(three), 16)[1]["file_name"] == ["a.png", "crash-test.JPG", "train.png"]
    (three / "validation").mkdir()
    (three / "a.png").rename(three / "validation/ä [1], =.png")
    assert read(str(three), 16)[1]["file_name"] == ["crash-test.JPG", "train.png", "validation/ä [1], =.png"]


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "a.png.txt", "a.caption"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_in_text_files_beside_the_pictures(three, capsys, name, encoding):
    (three / name).write_bytes("ein rotes\r\nDing ü \r\n".encode(encoding))
    assert captions(three) == ["ein rotes Ding ü", "a thing", "a thing"]
    said = capsys.readouterr().out
    assert (
        f"3 pictures, captions: 1 by {name[-4:].lower() if 'txt' in name.lower() else '.caption'}"
        in said.replace(".TXT", ".txt")
    )
    assert "2 pictures have none (crash-test.JPG, train.png)" in said and "prompt='a thing'" in said


@pytest.mark.parametrize("table", ["jsonl", "csv", "semicolons"])
@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_captions_in_metadata(three, capsys, table, column):
    rows = {"a.png": 7, ".\\TRAIN.png": "a, b", "gone.png": "x"}
    if table == "jsonl":
        lines = [json.dumps({"file_name": name, column: text}) for name, text in rows.items()]
    else:
        mark = {"csv": ",", "semicolons": ";"}[table]
        lines = [f"file_name{mark}{column}", *(f'{name}{mark}"{text}"' for name, text in rows.items())]
    (three / f"metadata.{'jsonl' if table == 'jsonl' else 'csv'}").write_text("\n".join(lines))
    for name in ("a.txt", "notes.json", "b.heic", ".hidden"):
        (three / name).write_text("unused")
    assert captions(three) == ["7", "a thing", "a, b"]
    said = capsys.readouterr().out
    assert f"2 by {column} of metadata." in said and "1 pictures have none (crash-test.JPG)" in said
    assert (
        all(word in said for word in ("rows without a picture (gone.png)", "1 .txt", "1 .json", "1 .heic"))
        and "hidden" not in said
    )


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("metadata.jsonl", '{"file_name": "a.png", "text": ["x"]}', "text of a.png: a text is needed; got"),
        ("metadata.jsonl", '{"file_name": "a.png"\n', "line 1: not a JSON object"),
        ("metadata.jsonl", '{"file_name": "x.png", "text": "y"}', "names none of the 3 pictures"),
        ("metadata.jsonl", '{"image": "a.png", "text": "y"}', "has no column file_name; it has image, text"),
        ("metadata.csv", "file_name,text\na.png,a man, smiling\n", "line 2: 3 cells under 2 columns"),
        ("metadata.csv", "file_name,text\n,x\n", "line 2: no file_name"),
        ("a.txt", "m\udce4dchen", "a.txt, line 1: not a text in UTF-8"),
        ("a.txt", "x" * 20_000, "a.txt: a text of 20,000 characters"),
    ],
)
def test_captions_that_cannot_be_read_are_one_line(three, name, text, says):
    (three / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=says) as error:
        captions(three)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("data", ["", "file.txt", "there", "nowhere", "nobody/nothing", "a\0b", "x" * 5000])
def test_data_that_is_no_folder_of_pictures(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "there").mkdir()
    (tmp_path / "there/notes.heic").write_text("x")
    for make in (lora.pictures, image_slider.pictures):
        with pytest.raises(UserError) as error:
            make((lora if make is lora.pictures else image_slider).Config(data=data), 16)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert data != "there" or "1 .heic" in str(error.value)


def test_a_dataset_of_the_hub_is_read_by_the_same_rules(tmp_path, monkeypatch, capsys):
    paint(tmp_path / "a.png", "red")
    Image.new("LA", (20, 20), (0, 0)).save(tmp_path / "b.png")
    cells = [{"path": name, "bytes": (tmp_path / name).read_bytes()} for name in ("a.png", "b.png")]
    rows = {"picture": cells, "caption": ["7", None], "style": ["x", "y"]}
    made = datasets.Dataset.from_dict(
        rows,
        datasets.Features(
            {name: datasets.Value("string") for name in ("caption", "style")} | {"picture": datasets.Image()}
        ),
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: made)
    images, columns = read("somebody/pictures", 16)
    assert columns == {
        "text": ["7", ""],
        "caption": ["7", None],
        "style": ["x", "y"],
        "file_name": ["a.png", "b.png"],
    }
    assert images[1].min() == 1 and images[0, 1].max() == -1
    assert "2 pictures, 1 with a caption by caption; other columns: style" in capsys.readouterr().out


def test_reference_pictures_have_captions_and_are_looked_at_before_anything_is_drawn(three, capsys):
    (three / "metadata.csv").write_text("file_name,caption\na.png,a red thing\n")
    told, real = against(card("tiny"), str(three), [], ["a cat"], 2, 1)
    assert told.texts == ["a red thing"] * 2 and sum(len(batch) for batch in real()) == 3
    assert "1 by caption of metadata.csv" in capsys.readouterr().out
    (three / "b.png").write_text("hello")
    with pytest.raises(UserError, match="b.png is not a picture"):
        against(card("tiny"), str(three), [], ["a cat"], 2, 1)


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


def pairs_of(folder, **more):
    for name in more.pop("names", ("-1", "1")):
        paint(folder / name / "a.png", "red")
    return pictures(Config(data=str(folder), **more), 16)


def test_captions_and_what_is_left_out_of_folders_of_scales(tmp_path, capsys):
    for name in ("-1", "0", "1", "other"):
        paint(tmp_path / name / "a.png", "red")
    (tmp_path / "-1/a.txt").write_text("a thing")
    (tmp_path / "1/a.txt").write_text("another")
    found = pairs_of(tmp_path)
    assert found.scales == [-1, 1] and found.captions == ["a thing"]
    said = capsys.readouterr().out
    for words in (
        "left out, for they are no folders of a scale: other",
        "1 pictures at scale 0",
        "1 pairs have other captions",
    ):
        assert words in said


@pytest.mark.parametrize(
    ("names", "more", "says"),
    [
        (("1", "1.0"), {}, "need scales of their own"),
        (("nan", "1"), {}, "missing a second scale"),
        (("0", "1"), {}, "missing a second scale"),
        (("a", "b"), {"folders": ["a", "b"]}, "need as many scales"),
        (("a", "b"), {"folders": ["a", "b"], "scales": [2.0, 2.0]}, "need scales of their own"),
        (("a", "b"), {"scales": [-1.0, 1.0]}, r"folders \(none\) need as many scales"),
        (("-1e9", "1"), {}, "missing a second scale"),
        (
            ("a", "b"),
            {"folders": ["a", "c"], "scales": [-1.0, 1.0]},
            "not a folder of pictures|neither a folder",
        ),
    ],
)
def test_folders_whose_scales_are_none(tmp_path, names, more, says):
    with pytest.raises(UserError, match=says):
        pairs_of(tmp_path, names=names, **more)


@pytest.mark.parametrize(
    ("cells", "says"),
    [
        ([("much", "p"), (1, "p")], "a.png needs a scale"),
        ([(None, "p"), (1, "p")], "a.png needs a scale"),
        ([("inf", "p"), (1, "p")], "a.png needs a scale"),
        ([(1, "p"), (-1, None)], "b.png needs a scale"),
        ([(1, "p"), (1, "p")], "b.png is a second picture of pair 'p'"),
        ([(1, "p"), (-1, "q")], "do not match"),
    ],
)
def test_metadata_whose_scales_are_none(tmp_path, cells, says):
    for name, (scale, pair) in zip(("a.png", "b.png"), cells, strict=True):
        paint(tmp_path / name, "red")
        with open(tmp_path / "metadata.jsonl", "a") as file:
            file.write(json.dumps({"file_name": name, "scale": scale, "pair": pair}) + "\n")
    with pytest.raises(UserError, match=says):
        pictures(Config(data=str(tmp_path)), 16)


def test_a_refused_folder_leaves_no_run_behind(tmp_path):
    paint(tmp_path / "data/a.png", "red")
    (tmp_path / "data/b.png").write_text("hello")
    for recipe in (lora, image_slider):
        with pytest.raises(UserError):
            recipe.main(merge(recipe.Config, [*SHORT, f"data={tmp_path}/data", f"out={tmp_path}/run"]))
    assert not (tmp_path / "run").exists()


def test_pairs_of_the_embedded_world_differ_in_the_attribute_alone():
    pairs = pictures(Config(pairs=3), 64)
    changed = (pairs.images[0] != pairs.images[1]).any(1).float().mean((1, 2))
    assert pairs.images.shape == (2, 3, 3, 64, 64) and ((changed > 0) & (changed < 0.2)).all()


def learnt(path):
    """Whether every layer of a control does something: B is 0 before the first step."""
    written = [tensor for name, tensor in load_file(path).items() if ".lora_B" in name]
    return written and all(torch.isfinite(tensor).all() and tensor.any() for tensor in written)


def test_an_image_slider_trains_on_a_folder(tmp_path):
    for scale, shade in {"-1": 60, "1": 200}.items():
        paint(tmp_path / "data" / scale / "a.png", (shade,) * 3)
    path = image_slider.main(merge(Config, [*SHORT, f"data={tmp_path}/data", f"out={tmp_path}/run"]))
    assert (path.parent / "samples/final.png").is_file()
    assert learnt(path)


@pytest.mark.parametrize(
    ("word", "says"),
    [("data=nowhere", "tiny:ATTRIBUTE"), ("data=tiny:nose", "smile"), ("member=tiny/hyper", "dmd")],
)
def test_bad_input_is_one_line_and_exit_code_2(word, says, tmp_path):
    refused(configured(image_slider, [*SHORT, word, f"out={tmp_path}"]), says)


def test_a_lora_trains_on_a_folder_and_with_its_prior(tmp_path):
    paint(tmp_path / "data/a.png", "red")
    words = [word for word in SHORT if "scales" not in word]
    path = lora.main(
        merge(
            lora.Config, [*words, f"data={tmp_path}/data", "prior=1", "prior_images=2", f"out={tmp_path}/run"]
        )
    )
    assert learnt(path)


def test_the_prior_term_is_zero_until_the_control_acts():
    cfg = merge(lora.Config, ["prior_images=2", "batch_size=2", "out=/nowhere", "member=tiny/dmd"])
    family = Family("tiny")
    memory = lora.Memory(cfg, SimpleNamespace(family=family, member=family.member("dmd")))
    assert memory(torch.Generator().manual_seed(0)) < 1e-8
