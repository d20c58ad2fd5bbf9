"""Damaged and nonsensical input, seeded, over every reader: each gives one clear line, or something whose
numbers hold; none hangs.

An input is a shipped or made file, or a command line, that is then changed at random. A reader may refuse it
by a UserError of one short line; what it accepts must be what its invariant says. Anything else, a traceback
or more than SECONDS, fails with the input's number.
"""

import io
import json
import random
import shutil
import signal
import string
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from support.synthetic import results as fake_record
from support.toys import toys

from analysis import diversity, live, report, similarity, trace, transfer
from configs import ROOT, claim, entry, load, plain_name, save
from configs.ranges import check
from controls import convert, formats, generate, info, merge, show, workflow
from models import promptsets
from models.cards import card
from models.plans import PLANS, named
from train import adapt, image_slider, lora, slider, sliderspace
from train.checkpoint import resumable, store
from train.pictures import read as read_pictures

SECONDS = 5
LONGEST = 700  # characters of a message: less than a screen
WORDS = [
    "",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "-1",
    "0",
    "1e20",
    "9" * 21,
    "null",
    "~",
    "true",
    "no",
    "[]",
    "{}",
    "[[]]",
    "..",
    ".",
    "/",
    "a/b",
    "../x",
    "\x00",
    "ü",
    "=",
    "a=b",
    "[1,2",
    "{a: b",
    "'",
    '"',
    "x" * 400,
    "\ud800",
    "☃",
    "%s",
    "$(id)",
    "*a",
    "&a",
    "!!python/object:os.system",
    "- a",
    "a: b: c",
    "0x1f",
    "1_000",
    "2026-01-01",
    "<script>",
    "[nan]",
    "[0, inf]",
    "🙂",
    "\t",
    "\n",
]
KINDS = ["RGB", "RGBA", "L", "LA", "P", "1", "I;16", "F", "CMYK", "I"]  # of pictures
FILES = [
    b"",
    b"null",
    b"[]",
    b"{}",
    b"<!DOCTYPE html>",
    b"version https://git-lfs.github.com/spec/v1\n",
    b"PK\x03\x04",
    b"\x80\x04.",
]
SCHEMAS = [
    slider.Config,
    lora.Config,
    image_slider.Config,
    sliderspace.Config,
    adapt.Config,
    transfer.Config,
    trace.Config,
    diversity.Config,
    similarity.Config,
    live.Config,
    convert.Config,
    merge.Config,
    show.Config,
    generate.Config,
    workflow.Config,
]


@contextmanager
def at_most(seconds: int):
    """Raises TimeoutError in a block that takes longer."""

    def stop(*_):
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refuses(call, *args) -> bool:
    """Whether a reader refuses, in one short line and with exit code 2, as a command does; raises what else
    it raises.
    """
    said = io.StringIO()
    try:
        with at_most(SECONDS), redirect_stderr(said):
            entry(lambda: call(*args))
    except SystemExit as stop:
        text = said.getvalue().strip()
        assert stop.code in (0, 2), stop.code  # 0: --help
        assert not stop.code or 0 < len(text) <= LONGEST and "\n" not in text, (
            f"{len(text)} characters: {text[:300]!r}"
        )
        return stop.code == 2
    return False


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Bytes with one thing wrong: cut, flipped, doubled, emptied, replaced."""
    way = rng.randrange(6)
    place = rng.randrange(len(content) or 1)
    if way == 0:
        return content[:place]
    if way == 1:
        return content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :]
    if way == 2:
        return content[:place] + content[rng.randrange(len(content) or 1) :]
    if way == 3:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(200)))
    if way == 4:
        return content[:place] + b"\x00" * rng.randrange(1, 64) + content[place:]
    return rng.choice(FILES)


def twisted(value, rng: random.Random, depth: int = 0):
    """A plain value with one part replaced, removed or added."""
    odd = [
        None,
        True,
        -1,
        0,
        10**30,
        float("nan"),
        float("inf"),
        1e-320,
        "",
        "../x",
        "x" * 500,
        [],
        {},
        [None],
        {"a": {}},
        "<script>alert(1)</script>",
        "\x00",
    ]
    if depth > 3 or not isinstance(value, (dict, list)) or not value or rng.random() < 0.2:
        return rng.choice(odd)
    if isinstance(value, list):
        k = rng.randrange(len(value))
        return [*value[:k], twisted(value[k], rng, depth + 1), *value[k + 1 :]]
    key = rng.choice(sorted(value, key=str))
    way = rng.random()
    if way < 0.2:
        return {name: inner for name, inner in value.items() if name != key}
    if way < 0.3:
        return value | {rng.choice(["odd", "", "__class__", "a.b", "ü"]): rng.choice(odd)}
    return value | {key: twisted(value[key], rng, depth + 1)}


# ---- the readers: (a number of inputs, a function that makes and reads input k)


def options(rng: random.Random, folder: Path) -> None:
    """Command lines of every command."""
    schema = rng.choice(SCHEMAS)
    keys = sorted(schema.__dataclass_fields__)
    key = rng.choice(
        [
            *keys,
            "config",
            rng.choice(string.ascii_lowercase),
            "memory.offload",
            f"{rng.choice(keys)}.{rng.choice(keys)}",
        ]
    )
    found = load(schema, [f"{key}={rng.choice(WORDS)}" for _ in range(rng.randrange(1, 3))])
    check(found)
    plain_name(found.name) if getattr(found, "name", "") else None


def config_files(rng: random.Random, folder: Path) -> None:
    """YAML files of recipes and analyses."""
    path = rng.choice(sorted((ROOT / "configs/sliders").glob("*.yaml")))
    new = folder / "config.yaml"
    if rng.random() < 0.5:
        new.write_bytes(damaged(path.read_bytes(), rng))
    else:
        new.write_text(yaml.safe_dump(twisted(yaml.safe_load(path.read_text()), rng)))
    check(load(slider.Config, [f"config={new}"]))


def pairs(rng: random.Random, folder: Path) -> None:
    """Prompt pairs of sliders, published keys among them."""
    pair = {
        "target": "a",
        "positive": "b",
        "unconditional": "",
        "neutral": "",
        "action": "enhance",
        "guidance_scale": 4,
        "resolution": 512,
    }
    rows = [twisted(pair, rng) if rng.random() < 0.8 else pair for _ in range(rng.randrange(3))]
    new = folder / "pairs.yaml"
    new.write_text(yaml.safe_dump({"prompts": rows}))
    for found in slider.spread(load(slider.Config, [f"config={new}"])):
        assert all(
            isinstance(text, str)
            for text in (found.target, found.positive, found.unconditional, found.neutral, found.action)
        )


def family_cards(rng: random.Random, folder: Path) -> None:
    path, new = ROOT / "configs/families/tiny.yaml", folder / "card.yaml"
    if rng.random() < 0.4:
        new.write_bytes(damaged(path.read_bytes(), rng))
    else:
        new.write_text(yaml.safe_dump(twisted(yaml.safe_load(path.read_text()), rng)))
    found = card(str(new))
    check(found)
    for name in found.members:
        plain_name(name)


def control_files(rng: random.Random, folder: Path) -> None:
    """Bytes of shipped controls, changed."""
    path, new = (
        ROOT / f"controls/tiny/{rng.choice(['space-1', 'crayon'])}.safetensors",
        folder / f"x{rng.choice(['.safetensors', '.pt'])}",
    )
    content = path.read_bytes()
    head = 8 + int.from_bytes(content[:8], "little")
    part = rng.random() < 0.7  # most of the harm is done in the header
    new.write_bytes(damaged(content[:head], rng) + content[head:] if part else damaged(content, rng))
    read_control(new)


def control_headers(rng: random.Random, folder: Path) -> None:
    """Cards and metadata that are valid JSON and nonsense."""
    tensors, metadata = formats.read(ROOT / "controls/tiny/space-1.safetensors")
    key = rng.choice(["card", formats.DIFFUSERS])
    metadata[key] = json.dumps(twisted(json.loads(metadata[key]), rng))
    save_file(tensors, folder / "x.safetensors", metadata)
    read_control(folder / "x.safetensors")


def control_tensors(rng: random.Random, folder: Path) -> None:
    """Shapes, types, names and values of tensors."""
    tensors, metadata = formats.read(ROOT / "controls/tiny/space-1.safetensors")
    key = rng.choice(sorted(tensors))
    value = tensors[key]
    odd = [
        value.half(),
        value.int(),
        value[:0],
        value * float("nan"),
        value * 1e38 * 10,
        value[..., None],
        value.flatten(),
        value.to(torch.complex64),
        value.bool(),
        torch.zeros(()),
        value.to(torch.float8_e4m3fn),
        value[:, :-1].contiguous(),
    ]
    ends = [
        ".alpha",
        ".lora_mid.weight",
        ".dora_scale",
        ".lokr_w1",
        ".hada_w1_a",
        ".diff",
        "",
        ".lora_A.weight",
        ".lora_magnitude_vector",
    ]
    if rng.random() < 0.5:
        tensors[key] = rng.choice(odd)
    else:
        tensors[key.rsplit(".lora_", 1)[0] + rng.choice(ends)] = rng.choice(odd).clone()
    if rng.random() < 0.5:
        metadata.pop("card")
    save_file(tensors, folder / "x.safetensors", metadata)
    read_control(folder / "x.safetensors")


def read_control(path: Path) -> None:
    refuses(info.describe, path)
    found = convert.opened(path, convert.Config(member="tiny/base"))
    assert all(torch.isfinite(tensor).all() for tensor in found.tensors.values()) and np.isfinite(
        found.card.alpha
    )
    assert found.card.rank >= 1 and plain_name(found.card.name)
    refuses(formats.load, path)


def prompt_tables(rng: random.Random, folder: Path) -> None:
    table = 'case_number,prompt,evaluation_seed\n0,a cat,5\n1,"a dog, running",6\n2,ein schöner Tag,7\n'
    new = folder / f"p.{rng.choice(['csv', 'txt'])}"
    text = (
        table
        if rng.random() < 0.5
        else table.replace(rng.choice(["5", "a cat", "prompt", ",", "\n", "1"]), rng.choice(WORDS))
    )
    content = text.encode(rng.choice(["utf-8", "utf-16", "cp1252"]), errors="replace")
    new.write_bytes(content if rng.random() < 0.6 else damaged(content, rng))
    found = promptsets.read([f"{new}{rng.choice(['', ':1', ':0', ':-1', ':99', ':x'])}"])
    assert found.texts and all(isinstance(text, str) for text in found.texts)
    assert all(0 <= seed < 2**63 for seed in found.numbers(1, 0))


def picture_folders(rng: random.Random, folder: Path) -> None:
    image = Image.new(rng.choice(KINDS), (rng.randrange(1, 30), rng.randrange(1, 30)))
    kind = {"F": "tiff", "CMYK": "jpg", "I": "tiff"}.get(image.mode, "png")
    image.save(folder / f"a.{kind}")
    Image.new("RGB", (9, 9), "red").save(folder / "b.png")
    if rng.random() < 0.5:
        path = rng.choice(sorted(folder.iterdir()))
        path.write_bytes(damaged(path.read_bytes(), rng))
    if rng.random() < 0.5:
        row = twisted({"file_name": "b.png", "text": "red"}, rng)
        (folder / "metadata.jsonl").write_text(
            json.dumps(row) + "\n" if rng.random() < 0.7 else rng.choice(WORDS).replace("\ud800", "")
        )
    if rng.random() < 0.3:
        (folder / "b.txt").write_bytes(damaged(b"a red thing", rng))
    images, columns = read_pictures(str(folder), 8)
    assert (
        images.shape[1:] == (3, 8, 8)
        and images.abs().max() <= 1
        and all(len(column) == len(images) for column in columns.values())
    )
    found = lora.pictures(lora.Config(data=str(folder)), 8)[1]
    assert all(isinstance(text, str) for text in found)


def records(rng: random.Random, folder: Path) -> None:
    path = folder / "results.json"
    if rng.random() < 0.3:
        path.write_bytes(damaged(json.dumps(RECORD).encode(), rng))
    else:
        path.write_text(json.dumps(twisted(RECORD, rng)))
    page = report.build(folder)
    assert "<script>alert" not in page.read_text(encoding="utf-8")


def states(rng: random.Random, folder: Path) -> None:
    """A checkpoint, whole and damaged; a config.yaml beside it."""
    part, path = torch.nn.Linear(2, 2), folder / "state.pt"
    store(path, {"part": part}, 3)
    if rng.random() < 0.7:
        path.write_bytes(damaged(path.read_bytes(), rng))
    else:
        torch.save(
            rng.choice(
                [
                    {},
                    [],
                    {"done": "x"},
                    {"done": 2, "part": {}},
                    {"done": -5, "part": part.state_dict()},
                    {"part": 3},
                ]
            ),
            path,
        )
    assert all(0 <= step < 5 for step in resumable(path, {"part": part}, 5, 5, write=False))


def run_configs(rng: random.Random, folder: Path) -> None:
    cfg, path = slider.Config(out=str(folder / "out")), folder / "out/smile/config.yaml"
    save(cfg, path)
    path.write_bytes(damaged(path.read_bytes(), rng))
    claim(cfg)


def plans(rng: random.Random, folder: Path) -> None:
    base, student = toys()

    name, numbers = (
        rng.choice(sorted(PLANS)),
        ["1", "0", "-1", "2.5", "nan", "inf", "1e9", "99999999", "", "x", "None"],
    )
    arguments = ",".join(rng.choice(numbers) for _ in range(rng.randrange(3)))
    plan = named(f"{name}({arguments})", base, student)
    assert 0 < plan.steps <= 1000


READERS = {
    options: 200,
    config_files: 60,
    pairs: 40,
    family_cards: 60,
    control_files: 50,
    control_headers: 50,
    control_tensors: 30,
    prompt_tables: 60,
    picture_folders: 60,
    records: 60,
    states: 30,
    run_configs: 30,
    plans: 60,
}
RECORD = fake_record()


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_nothing_ends_in_a_traceback(reader, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    wrong = []
    for k in range(READERS[reader]):
        folder = tmp_path / f"{k}"
        folder.mkdir()
        try:
            refuses(reader, random.Random(f"{reader.__name__} {k}"), folder)
        except BaseException as error:  # noqa: BLE001
            if isinstance(error, KeyboardInterrupt):
                raise
            wrong.append(f"{k}: {type(error).__name__}: {str(error)[:200]}")
        shutil.rmtree(folder, ignore_errors=True)
    assert not wrong, f"{len(wrong)} of {READERS[reader]}:\n" + "\n".join(wrong[:20])


def test_there_are_enough():
    assert sum(READERS.values()) >= 500
