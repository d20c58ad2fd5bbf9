"""Files: what is no control file is called by what it is, what is none of ours to write to is left alone, and
cards are typed.
"""

import json
import os
from dataclasses import asdict, replace

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from support.commands import called, ran, refused
from support.foreign import FOREIGN, change, same
from support.network import network, output, trained

from analysis import transfer
from configs import ROOT, plain
from controls import convert, formats, info, merge, show
from controls.lora import Control, attach, content, strength
from models.families import Family

SMILE = ROOT / "controls/tiny/smile.safetensors"
Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CARD = {
    "kind": "slider",
    "name": "x",
    "family": "tiny",
    "member": "base",
    "rank": 2,
    "alpha": 1.0,
    "layers": "full",
    "scope": "c3lier",
}


def halves(stem: str = f"unet.{Q}", rank: int = 2, size: int = 32) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(rank, size, generator=rng), torch.randn(size, rank, generator=rng)
    return {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}


def written(path, card=CARD, tensors=None):
    save_file(tensors or halves(), path, {"card": card if isinstance(card, str) else json.dumps(card)})
    return path


# cards


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rank": "4"}, "rank must be a whole number; got 4"),
        ({"rank": 4.0}, "rank must be a whole number"),
        ({"rank": True}, "rank must be"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"rank": -1}, "rank must be at least 0"),
        ({"rank": 10**9}, "rank must be at most 4096"),
        ({"rank": None}, "rank must be"),
        ({"alpha": "1"}, "alpha must be a number"),
        ({"alpha": float("nan")}, "alpha must be finite"),
        ({"alpha": float("inf")}, "alpha must be finite"),
        ({"alpha": 10**400}, "alpha must be"),
        ({"alpha": []}, "alpha must be a number"),
        ({"name": 3}, "name must be a text"),
        ({"name": "../../README"}, "leads to another folder"),
        ({"name": ""}, "it is empty"),
        ({"name": ".."}, "leads to another folder"),
        ({"name": "a\u001b[2Jb"}, "cannot be shown"),
        ({"name": "x" * 500}, "longer than"),
        ({"family": "../x"}, "family="),
        ({"family": ["tiny"]}, "family must be a text"),
        ({"member": {}}, "member must be a text"),
        ({"member": "a/b"}, "member="),
        ({"recipe": "words"}, "recipe must be a mapping"),
        ({"recipe": {"positive": 3}}, "recipe.positive must be a text"),
        ({"recipe": {"negative": None}}, "recipe.negative must be a text"),
        ({"transfer": []}, "transfer must be a mapping"),
        ({"versions": 1}, "versions must be a mapping"),
        ({"kind": None}, "kind must be a text"),
        ({"colour": "red"}, "colour is no key"),
        ({"layers": 1}, "layers must be a text"),
    ],
)
def test_a_card_of_wrong_types_is_one_line(tmp_path, changes, says):
    path = written(tmp_path / "x.safetensors", {**CARD, **changes})
    for call in (formats.load, formats.native, formats.name, info.describe):
        refused(lambda call=call: call(path), "x.safetensors", says)


@pytest.mark.parametrize(
    ("card", "says"),
    [
        ("", "cannot be read"),
        ("no json", "cannot be read"),
        ("[]", "no mapping"),
        ("3", "no mapping"),
        ("null", "no mapping"),
        ("[" * 10**5, "too deeply"),
        ('{"a":' * 10**5, "too deeply"),
        ("{}", "kind is missing"),
        ('{"rank": 1' + "0" * 10**5 + "}", "cannot be read"),
        (json.dumps({key: value for key, value in CARD.items() if key != "scope"}), "scope is missing"),
    ],
)
def test_a_card_that_is_none_is_one_line(tmp_path, card, says):
    refused(lambda: formats.load(written(tmp_path / "x.safetensors", card)), says)


@pytest.mark.parametrize("alpha", [0, "x", None, 10**400, float("nan")])
def test_a_header_whose_alpha_fits_no_card_is_one_line(tmp_path, alpha):
    said = {"unet.r": 2, "unet.lora_alpha": alpha}
    save_file(
        halves(),
        tmp_path / "x.safetensors",
        {"card": json.dumps(CARD), "lora_adapter_metadata": json.dumps(said)},
    )
    refused(lambda: formats.load(tmp_path / "x.safetensors"), "x.safetensors", "alpha")


def test_words_of_a_card_are_taken_as_they_are(tmp_path):
    recipe = {"positive": "${oc.env:HOME} ???", "negative": "", "seed": 3, "deep": [{"a": [1, None]}]}
    card = formats.load(written(tmp_path / "x.safetensors", {**CARD, "alpha": 1, "recipe": recipe})).card
    assert card.recipe == recipe and card.alpha == 1.0 and isinstance(card.alpha, float)


def test_info_shows_a_strange_card_on_one_screen(tmp_path):
    recipe = {
        "positive": "a\u001b[2J\nb" + "x" * 9000,
        "y" * 1000: ["z"] * 10**4,
        "rows": [{"a": "b"}] * 1000,
    }
    path = written(tmp_path / "x.safetensors", {**CARD, "recipe": recipe, "transfer": {"targets": 3}})
    said = info.describe(path)
    assert "\u001b" not in said and len(said) < 5000 and "cannot read" in said


@pytest.mark.parametrize(
    "path", sorted((ROOT / "controls/tiny").glob("*.safetensors")), ids=lambda path: path.stem
)
def test_shipped_controls_are_read_bit_for_bit(path, tmp_path):
    control, tensors = formats.load(path), load_file(path)
    assert control.card.name == path.stem
    assert {f"unet.{key}" for key in control.tensors} == tensors.keys()
    assert all(torch.equal(value, tensors[f"unet.{key}"]) for key, value in control.tensors.items())
    formats.save(control, tmp_path / "again.safetensors")
    again = formats.load(tmp_path / "again.safetensors")
    assert again.card == control.card and content(again) == content(control)


# strength in the file itself


def plainly(path) -> dict[str, torch.Tensor]:
    """What a program that heeds no header adds to each layer, by ComfyUI's rule: B A, times alpha / rank
    where the file has .alpha.
    """
    tensors, found = load_file(path), {}
    for key, a in tensors.items():
        for down, up in (("lora_A", "lora_B"), ("lora_down", "lora_up")):
            if key.endswith(f".{down}.weight"):
                stem = key.removesuffix(f".{down}.weight")
                factor = float(tensors[f"{stem}.alpha"]) / len(a) if f"{stem}.alpha" in tensors else 1.0
                found[stem] = (
                    factor * tensors[f"{stem}.{up}.weight"].flatten(1).double() @ a.flatten(1).double()
                )
    return found


@pytest.mark.parametrize("alpha", [1.0, 3.0, 4.0, 0.0, -2.0])
def test_a_program_that_heeds_no_header_has_our_strength(tmp_path, alpha):
    control = trained(network(), "smile", 1, layers="xattn", rank=4, alpha=alpha)
    wanted = change(control)
    for writer, spell in ((formats.save, "unet.{}"), (formats.save_kohya, "lora_unet_{}")):
        writer(control, tmp_path / "x.safetensors")
        found = plainly(tmp_path / "x.safetensors")
        names = {
            layer: spell.format(layer if writer is formats.save else layer.replace(".", "_"))
            for layer in wanted
        }
        assert found.keys() == set(names.values())
        assert all(
            torch.allclose(found[names[layer]], moved, rtol=1e-6, atol=1e-7)
            for layer, moved in wanted.items()
        )


@pytest.mark.parametrize(
    ("alpha", "exact"),
    [(1.0, True), (2.0, True), (4.0, True), (8.0, True), (-1.0, True), (3.0, False), (0.0, False)],
)
def test_what_comes_back_is_what_went_or_says_alpha_is_the_rank(tmp_path, alpha, exact):
    control = trained(network(), "smile", 1, layers="xattn", rank=4, alpha=alpha)
    formats.save(control, tmp_path / "1.safetensors")
    back = formats.load(tmp_path / "1.safetensors")
    assert (content(back) == content(control)) == exact == (back.card.alpha == alpha)
    assert torch.allclose(
        torch.stack([*change(back).values()][:1]), torch.stack([*change(control).values()][:1]), atol=1e-6
    )
    formats.save(back, tmp_path / "2.safetensors")
    formats.relabel(replace(back.card, recipe={"seed": 1}), tmp_path / "2.safetensors")
    assert content(formats.load(tmp_path / "2.safetensors")) == content(back), "from then on nothing changes"


def test_diffusers_gives_the_strength_that_a_file_without_its_header_has(tmp_path):
    """Also a diffusers that is older than the header."""
    net, control = network(), trained(network(), "smile", 1, rank=4, alpha=3.0)
    formats.save(control, tmp_path / "ours.safetensors")
    save_file(load_file(tmp_path / "ours.safetensors"), tmp_path / "bare.safetensors")
    attach(net, control)
    with strength(net, smile=1.0):
        ours = output(net)
    for name in ("ours", "bare"):
        parts = dict.fromkeys(
            ["vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"]
        )
        pipe = StableDiffusionXLPipeline(**parts, unet=network())
        pipe.load_lora_weights(tmp_path / f"{name}.safetensors")
        assert torch.allclose(output(pipe.unet), ours, atol=1e-5)


# numbers


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_every_kind_of_real_number_is_read(tmp_path, dtype):
    tensors = {key: value.to(dtype) for key, value in halves().items()}
    found = formats.load(written(tmp_path / "x.safetensors", tensors=tensors))
    assert all(
        torch.equal(found.tensors[key.removeprefix("unet.")], value.float()) for key, value in tensors.items()
    )
    formats.relabel(replace(found.card, name="y"), tmp_path / "x.safetensors")
    assert all(
        torch.equal(value.float(), tensors[key].float()) and value.dtype == dtype
        for key, value in load_file(tmp_path / "x.safetensors").items()
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.uint8])
def test_what_is_no_real_number_is_refused_by_the_layers_name(tmp_path, dtype):
    path = written(
        tmp_path / "x.safetensors", tensors={key: value.to(dtype) for key, value in halves().items()}
    )
    refused(lambda: formats.load(path), Q, str(dtype).removeprefix("torch."))
    refused(lambda: formats.adopt(path, network(), FOREIGN), Q, str(dtype).removeprefix("torch."))


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float32, float("nan")),
        (torch.float32, float("inf")),
        (torch.float32, -float("inf")),
        (torch.bfloat16, float("nan")),
        (torch.float8_e4m3fn, float("nan")),
        (torch.float64, float("inf")),
        (torch.float64, 1e300),
        (torch.complex64, float("nan")),
    ],
)
def test_numbers_that_are_not_finite_are_refused_where_they_enter(tmp_path, value, dtype):
    tensors = halves()
    tensors[f"unet.{Q}.lora_B.weight"] = torch.where(
        torch.eye(32, 2) > 0, value, tensors[f"unet.{Q}.lora_B.weight"].double()
    ).to(dtype)
    path = written(tmp_path / "x.safetensors", tensors=tensors)
    for call in (formats.load, lambda path: formats.adopt(path, network(), FOREIGN)):
        refused(lambda call=call: call(path), Q, "finite")


def test_large_numbers_whose_sum_overflows_are_finite(tmp_path):
    tensors = {key: torch.full_like(value, 3e38) for key, value in halves().items()}
    formats.load(written(tmp_path / "x.safetensors", tensors=tensors))


def test_nothing_that_is_not_finite_is_written(tmp_path):
    control = formats.load(SMILE)
    key = next(key for key in control.tensors if key.endswith("lora_B.weight"))
    for value, alpha in ((float("nan"), 1.0), (3e38, 100.0)):
        tensors = {**control.tensors, key: torch.full_like(control.tensors[key], value)}
        bad = Control(replace(control.card, alpha=alpha), tensors)
        refused(lambda bad=bad: formats.save(bad, tmp_path / "x.safetensors"), "finite", key)
    refused(
        lambda: formats.save(
            Control(replace(control.card, rank=5000), control.tensors), tmp_path / "x.safetensors"
        ),
        "rank",
    )
    refused(
        lambda: formats.save(
            Control(replace(control.card, name="a/b"), control.tensors), tmp_path / "x.safetensors"
        ),
        "name",
    )
    assert not list(tmp_path.iterdir())


def test_alpha_of_zero_is_said(tmp_path, capsys):
    formats.load(written(tmp_path / "x.safetensors", {**CARD, "alpha": 0}))
    assert "does nothing" in capsys.readouterr().out
    save_file({**halves(), f"unet.{Q}.alpha": torch.tensor(0.0)}, tmp_path / "x.safetensors")
    found = formats.adopt(tmp_path / "x.safetensors", network(), FOREIGN)
    assert "alpha is 0 in 1 of 1 layers" in capsys.readouterr().out and not change(found)[Q].any()


@pytest.mark.parametrize(
    "tensors",
    [
        halves(rank=3),
        dict(list(halves().items())[:1]),
        {key: torch.zeros(()) for key in halves()},
        {f"unet.{Q}.lora_A.weight": torch.zeros(2, 32), f"unet.{Q}.lora_B.weight": torch.zeros(32, 2, 3, 3)},
        {f"unet.{Q}.lora_A.weight": torch.zeros(2, 32), f"unet.{Q}.lora_B.weight": torch.zeros(0, 2)},
        {**halves(), **halves(f"transformer.{Q}")},
    ],
)
def test_halves_that_are_no_pair_of_the_cards_rank(tmp_path, tensors):
    refused(lambda: formats.load(written(tmp_path / "x.safetensors", tensors=tensors)), "rank 2")


# what is no control file


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"GGUF\x03\0\0\0", "no safetensors"),
        (b"\n <!DOCTYPE html>\n<html>", "web page"),
        (b"<html><body>404</body>", "web page"),
        (b'{"error": "Unauthorized"}', "JSON"),
        (b'[{"error": 1}]', "JSON"),
        (b"{\0\0\0\0\0\0\0", "truncated"),
        (b"\xff" * 100, "truncated"),
        (b"PK\x03\x04xx", "pickle"),
        (b"\x02\0\0\0\0\0\0\0{}", "nothing"),
        (b"\x05\0\0\0\0\0\0\0[[[[[", "truncated"),
    ],
)
def test_what_is_no_control_is_called_by_what_it_is(tmp_path, content, says):
    (tmp_path / "x.safetensors").write_bytes(content)
    refused(lambda: formats.load(tmp_path / "x.safetensors"), says)
    if says in ("Git LFS pointer", "web page", "JSON"):
        (tmp_path / "x.pt").write_bytes(content)
        refused(lambda: formats.load(tmp_path / "x.pt"), says)


@pytest.mark.parametrize(
    "path",
    ["", ".", "/dev/null", "x" * 5000, "a\0b", "hub:owner", "hub:owner/name", "no/such/file.safetensors"],
)
def test_paths_that_lead_nowhere(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    for call in (formats.load, formats.native, formats.name, info.describe):
        refused(lambda call=call: call(path))


def test_tensors_that_are_none(tmp_path):
    for value in (torch.eye(3).to_sparse(), torch.empty(3, device="meta"), 10**40, float("nan")):
        torch.save({"a": value}, tmp_path / "x.pt")
        refused(lambda: formats.read(tmp_path / "x.pt"), "x.pt")


def test_very_long_keys_are_cut(tmp_path):
    save_file(halves("unet." + "k" * 10**5), tmp_path / "x.safetensors")
    refused(lambda: formats.adopt(tmp_path / "x.safetensors", network(), FOREIGN), "no place")
    save_file({"k" * 10**5: torch.zeros(1)}, tmp_path / "x.safetensors")
    refused(lambda: formats.load(tmp_path / "x.safetensors"), "layout")
    assert len(info.describe(tmp_path / "x.safetensors")) < 2000


# names


@pytest.mark.parametrize(
    "name", ["epoch=10-step=2000", "[a], b", "Grüße aus Köln", "a,b {c} (d)", "$HOME", "--x", "..x", "日本語"]
)
def test_files_of_any_name_are_converted_and_merged(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / f"{name}.safetensors"
    source.write_bytes(SMILE.read_bytes())
    target = tmp_path / f"{name} out=1.safetensors"
    ran(called(convert, source, target))
    assert target.is_file()
    ran(called(merge, source, target, tmp_path / f"{name} both=1.safetensors", "rank=4"))
    save_file(halves(), source)
    assert formats.name(source) and ran(called(info, source))


def test_plain_words_and_options_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    files = ["x.safetensors", "step=1.safetensors", "k=v.pt", "runs/a=1", "a=b"]
    options = ["name=x", "memory.offload=true", "--dry-run", "positive=a, b", "prompt=" + "x" * 5000]
    assert plain([*files, *options]) == (files, options)


def test_equal_names_are_told_apart_by_their_folders(tmp_path):
    paths = [tmp_path / folder / "f.safetensors" for folder in ("x/a", "x/b", "y/b")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(halves(), path)
    assert formats.names([str(path) for path in paths[:1]]) == ["f"]
    assert formats.names([str(path) for path in paths]) == ["a-f", "x-b-f", "y-b-f"]
    assert formats.names([str(SMILE), str(SMILE)]) == ["smile", "smile"]
    cfg = transfer.Config(controls=[str(SMILE), str(SMILE)])
    refused(lambda: transfer.read(cfg, Family("tiny", bare=True)), "smile, smile", "name=")
    cfg = transfer.Config(controls=[str(path) for path in paths[:2]])
    tiny = {key: value for key, value in halves(size=80).items()}
    for path in paths[:2]:
        save_file(tiny, path)
    assert [control.card.name for control in transfer.read(cfg, Family("tiny", bare=True))] == ["a-f", "b-f"]


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("a.b", "a-b"),
        ("..", "control"),
        (" -~x ", "x"),
        ("", "control"),
        ("ü" * 200, "ü" * 50),
        ("\u202e", "control"),
    ],
)
def test_a_files_name_becomes_one_that_a_folder_can_have(stem, name):
    assert formats._safe(stem) == name


# writing


def test_outputs_that_cannot_be_written_are_one_line_and_lose_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")  # as /dev/null is, no ordinary file
    for out in (
        tmp_path / "folder",
        tmp_path / "pipe",
        tmp_path / "file/x.safetensors",
        tmp_path / ("x" * 300),
        "/proc/x.safetensors",
    ):
        for module, words in ((convert, [SMILE]), (merge, [SMILE, SMILE])):
            refused(called(module, *words, out), "cannot write")
    assert (
        sorted(os.listdir(tmp_path)) == ["file", "folder", "pipe"]
        and (tmp_path / "file").read_text() == "mine"
    )


def test_a_file_may_replace_itself(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(SMILE.read_bytes())
    ran(called(convert, path, path, "format=kohya"))
    ran(called(convert, path, path))
    assert same(change(formats.load(path)), change(formats.load(SMILE)))


@pytest.mark.parametrize(
    ("module", "words", "says"),
    [
        (merge, ["name=../x"], "another folder"),
        (merge, ["name=' '"], "empty"),
        (merge, ["weights=[1,nan]"], "weights"),
        (merge, ["weights=[1,1e300]"], "weights"),
        (merge, ["rank=100000"], "rank"),
        (convert, ["name=a/b"], "another folder"),
        (convert, ["kind=thing"], "kind"),
        (convert, ["encoders=no"], "encoders"),
        (convert, ["member=sdxl/base"], "trained on tiny/base"),
    ],
)
def test_options_that_cannot_be(tmp_path, module, words, says):
    files = [SMILE] * (2 if module is merge else 1)
    refused(called(module, *files, tmp_path / "x.safetensors", *words), says)
    assert not list(tmp_path.iterdir())


def test_convert_puts_what_is_said_into_the_card(tmp_path):
    ran(called(convert, SMILE, tmp_path / "x.safetensors", "name=grin", "positive=a grin"))
    card, before = formats.load(tmp_path / "x.safetensors").card, formats.load(SMILE).card
    assert asdict(card) == {
        **asdict(before),
        "name": "grin",
        "recipe": {**before.recipe, "positive": "a grin"},
    }


def test_a_control_of_a_run_folder_is_read_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "smile").mkdir()
    (tmp_path / "smile/control.safetensors").write_bytes(SMILE.read_bytes())
    monkeypatch.chdir(tmp_path)
    for path in ("smile", "smile/control.safetensors", "controls/tiny/smile.safetensors"):
        assert content(formats.load(path)) == content(formats.load(SMILE))


def test_show_does_not_write_over_a_folder(tmp_path):
    refused(called(show, SMILE, "scales=[0]", f"out={tmp_path}"), "cannot write")
