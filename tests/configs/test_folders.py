"""Folders of runs: nothing is removed that is not ours, one process works in each, and a refused run leaves
everything as it was.
"""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from support.commands import configured, refused

from analysis import diversity, similarity, trace, transfer
from configs import ROOT, UserError, claim, load, release, releases, replacing
from configs.folders import LOCK, _born, digest, look
from configs.runs import _writing
from controls import generate
from train import adapt, image_slider, lora, slider, sliderspace

COMMANDS = {
    module.__name__: module
    for module in (
        *(slider, lora, image_slider, sliderspace, adapt),
        *(transfer, trace, diversity, similarity, generate),
    )
}
CHEAP = {
    slider: ["trajectories=1"],
    lora: ["images=2"],
    image_slider: ["pairs=2"],
    sliderspace: ["trajectories=2", "directions=1"],
    adapt: ["runs=1", "rounds=1", "judged=0", "compared=0"],
}


@dataclass
class Config:
    name: str = "mine"
    out: str = "runs"
    steps: int = 1
    scales: list[float] = field(default_factory=lambda: [0.0, 1.0])
    wandb: str = "auto"
    overwrite: bool = False


@pytest.fixture(autouse=True)
def given_back():
    """No test leaves a lock behind."""
    yield
    release()


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, by name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def finished(out: Path, name: str = "mine", **keys) -> Path:
    """A run that ended well."""
    folder = claim(Config(name, str(out), **keys))
    (folder / "control.safetensors").write_bytes(b"weights")
    release()
    return folder


def test_a_run_is_made_continued_and_started_afresh(tmp_path):
    folder = finished(tmp_path)
    assert sorted(tree(folder)) == ["config.yaml", "control.safetensors"]
    finished(tmp_path)
    with pytest.raises(UserError, match="steps: 1 -> 2"):
        claim(Config("mine", str(tmp_path), 2))
    assert (
        claim(Config("mine", str(tmp_path), 2), free=("steps",)) == folder
        and (folder / "control.safetensors").exists()
    )
    claim(Config("mine", str(tmp_path), 3, overwrite=True))
    assert sorted(tree(folder)) == [LOCK, "config.yaml"]


@pytest.mark.parametrize("module", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize(
    "words",
    [
        ["name=."],
        ["name=.."],
        ["name="],
        ["name=/etc"],
        ["name=thesis/chapter"],
        ["name=mine/../thesis"],
        ["name=~"],
        ["name=a\\b"],
        ["name=thesis"],
        ["name=link"],
        ["name=elsewhere"],
        ["name=theirs"],
        ["name=letter"],
        ["typo=1"],
        ["wandb=sometimes"],
        ["dtype=fp7"],
        ["memory.compile=magic"],
        ["out=~/x"],
        ["out=\x00"],
    ],
    ids=" ".join,
)
def test_overwrite_never_removes_what_is_not_ours(module, words, tmp_path, monkeypatch):
    home, out = tmp_path / "home", tmp_path / "home/runs"
    monkeypatch.setenv("HOME", str(home))
    finished(out)
    finished(home / "away", "elsewhere")
    for folder in (home / "thesis", out / "thesis"):
        folder.mkdir()
        (folder / "chapter").write_text("years")
    (out / "theirs").mkdir()
    (out / "theirs/config.yaml").write_text(
        "name: theirs\nout: runs\noverwrite: false\nwandb: auto\n"
    )  # of another program
    (out / "link").symlink_to(home / "thesis")
    (out / "elsewhere").symlink_to(home / "away/elsewhere")
    (out / "letter").write_text("dear")
    before = tree(home)
    refused(configured(module, ["name=mine", f"out={out}", "wandb=disabled", "overwrite=true", *words]))
    assert tree(home) == before


REFUSED = {
    slider: [
        "layers=ful",
        "scope=all",
        "member=tiny/hyper",
        "member=nowhere/base",
        "optimizer=sgd",
        "lr_scheduler=cosign",
        "steps=0",
        "rank=0",
        "quantize=int3",
        "watch=[tiny/hyper]",
        "watch=[sdxl/base]",
        "sample_seeds=[]",
        "seed=18446744073709551616",
        "seed=-1",
        "name=training",
        "recipe=slow",
        "prompts=[]",
        "prompts=nowhere.yaml",
    ],
    lora: ["layers=ful", "data=tiny:oil", "data=nowhere/at/all"],
    image_slider: ["data=tiny:nose", "data=nowhere"],
    sliderspace: ["directions=4000"],
    adapt: [
        *("control=nowhere.safetensors", "member=tiny/hyper", "members=[tiny/dmd,sdxl/dmd2]", "scales=[0,1]"),
        *("member=sdxl/dmd2", "rounds=9999", "layers=ful", "prompts=[nowhere.txt]"),
    ],
    transfer: [
        "controls=[nowhere.safetensors]",
        "targets=[hyper]",
        "targets=[dmd:hybrid(9)]",
        "scales=[]",
        "evaluators=[x]",
    ],
    trace: ["control=nowhere.safetensors", "plans=[hybrid]", "students=[hyper]", "bands=[]"],
    diversity: ["plans=[magic(1)]", "reference=nowhere"],
    similarity: ["targets=[hyper]", "controls=[nowhere.safetensors]"],
}


@pytest.mark.parametrize(
    ("module", "word"), [(module, word) for module in REFUSED for word in REFUSED[module]]
)
def test_a_refused_run_removes_nothing_and_claims_nothing(module, word, tmp_path):
    folder = finished(tmp_path / "out", "mine")
    before = tree(tmp_path)
    for name in ("name=mine", "name=new"):
        words = [
            name,
            f"out={tmp_path}/out",
            "wandb=disabled",
            "overwrite=true",
            *CHEAP.get(module, []),
            word,
        ]
        cache = [f"cache={tmp_path}/cache"] if module is transfer else []
        refused(configured(module, words + cache))
    assert tree(tmp_path) == before and folder.is_dir()


def test_a_missing_package_is_said_before_anything_is_removed(tmp_path, monkeypatch):
    finished(tmp_path)
    before = tree(tmp_path)
    monkeypatch.setattr("train.run.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        slider.main(
            load(slider.Config, ["optimizer=adamw8bit", "name=mine", f"out={tmp_path}", "overwrite=true"])
        )
    assert tree(tmp_path) == before


def test_a_plan_claims_no_folder(tmp_path, capsys):
    slider.main(load(slider.Config, ["name=mine", f"out={tmp_path}", "--dry-run"]))
    assert "control:" in capsys.readouterr().out and not tree(tmp_path)


def test_a_folder_that_is_not_a_runs_is_not_adopted(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter").write_text("years")
    with pytest.raises(UserError, match="chapter"):
        claim(Config("thesis", str(tmp_path)))
    assert sorted(tree(tmp_path)) == ["thesis", "thesis/chapter"]


def test_a_link_to_a_run_is_continued(tmp_path):
    folder = finished(tmp_path / "scratch", "x")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/x").symlink_to(folder)
    with pytest.raises(UserError, match="out: .* wandb|another config"):
        claim(Config("x", str(tmp_path / "out")))
    assert claim(Config("x", str(tmp_path / "out")), free=("out",)) == tmp_path / "out/x"


def test_what_a_killed_run_was_writing_is_swept(tmp_path):
    folder = finished(tmp_path)
    (folder / "features").mkdir()
    for name in (
        ".state.pt.a8f_3k2z.pt",
        "features/.off.safetensors.q1w2e3r4.safetensors",
        ".config.yaml.abcdefgh.yaml",
    ):
        (folder / name).write_text("half")
    kept = [".state.pt.backup.pt", ".a.b.c", "features/.keep", ".gitignore", ".log.jsonl.12345678.txt"]
    for name in kept:
        (folder / name).write_text("whole")
    claim(Config("mine", str(tmp_path)))
    assert {name for name, data in tree(folder).items() if data == b"half"} == set()
    assert {name for name, data in tree(folder).items() if data == b"whole"} == set(kept)


@pytest.mark.parametrize("damage", ["name: [\n", "", "- 1\n", "name: &a [*a]\n", "7"])
def test_a_damaged_config_is_one_line_that_names_it(tmp_path, damage):
    folder = finished(tmp_path)
    stamp = "".join(
        line + "\n" for line in (folder / "config.yaml").read_text().splitlines() if line.startswith("#")
    )
    (folder / "config.yaml").write_text(stamp + damage)
    with pytest.raises(UserError, match=r"config\.yaml.*overwrite=true"):
        claim(Config("mine", str(tmp_path)))
    claim(Config("mine", str(tmp_path), overwrite=True))


def test_a_config_of_an_older_version_goes_on_where_nothing_else_differs(tmp_path):
    folder = finished(tmp_path)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("steps: 1\n", ""))
    claim(Config("mine", str(tmp_path)))
    with pytest.raises(UserError, match="steps: 1 -> 2"):
        claim(Config("mine", str(tmp_path), 2))
    (folder / "config.yaml").write_text(text.replace("steps: 1\n", "rate: 1\n"))
    with pytest.raises(UserError, match="another command or version.*rate"):
        claim(Config("mine", str(tmp_path)))


def test_the_hash_of_a_config_is_of_what_decides():
    plain = digest(Config(), ("wandb", "out"))
    assert plain == digest(Config(wandb="disabled", out="x", overwrite=True), ("wandb", "out"))
    assert (
        plain != digest(Config(steps=2), ("wandb", "out")) != digest(Config(scales=[1.0]), ("wandb", "out"))
    )


def holder(folder: Path, **keys) -> None:
    """A lock as another process leaves it."""
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    held = {
        "host": socket.gethostname(),
        "pid": child.pid,
        "born": "1",
        "since": "2026-01-01",
        "command": "x",
    } | keys
    (folder / LOCK).write_text(json.dumps(held))


def test_a_lock_of_another_process_names_it(tmp_path):
    folder = finished(tmp_path)
    for host, pid, born in (("node7", 42, "1"), (socket.gethostname(), os.getppid(), _born(os.getppid()))):
        holder(folder, host=host, pid=pid, born=born)
        before = tree(tmp_path)
        for overwrite in (False, True):
            with pytest.raises(
                UserError, match=f"in use by process {pid} on {host}, since 2026-01-01.*remove"
            ):
                claim(Config("mine", str(tmp_path), overwrite=overwrite))
        assert tree(tmp_path) == before


def test_a_lock_whose_process_is_gone_is_taken_over(tmp_path):
    folder = finished(tmp_path)
    for keys in ({}, {"pid": os.getpid()}):  # ended; and another process has its number now
        holder(folder, **keys)
        claim(Config("mine", str(tmp_path)))
        assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
        release()
        assert sorted(tree(folder)) == ["config.yaml", "control.safetensors"]


@pytest.mark.parametrize("text", ["", "half of a", "[]", "{}"])
def test_a_lock_that_does_not_say_whose_it_is(tmp_path, text):
    folder = finished(tmp_path)
    (folder / LOCK).write_text(text)
    with pytest.raises(UserError, match=f"another process.*remove .*{LOCK}"):
        claim(Config("mine", str(tmp_path)))


SCRIPT = """
import os, signal, sys, time
from dataclasses import dataclass
from configs import claim, entry, releases

@dataclass
class Config:
    name: str = "mine"
    out: str = sys.argv[1]
    overwrite: bool = False

@releases
def main():
    claim(Config())
    print("in", flush=True)
    os.kill(os.getpid(), signal.SIGTERM) if sys.argv[2] == "end" else time.sleep(60)

entry(main)
"""


def process(out: Path, word: str) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, out, word],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )


def test_of_two_processes_that_begin_at_once_one_is_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    both = [process(tmp_path, "stay") for _ in range(2)]
    while all(one.poll() is None for one in both):
        time.sleep(0.05)
    both.sort(key=lambda one: one.poll() is None)
    assert (
        both[0].returncode == 2
        and "in use by" in both[0].stderr.read()
        and both[1].stdout.readline() == "in\n"
    )
    both[1].kill()  # -9: the lock file stays
    third = process(tmp_path, "end")
    out, err = third.communicate()
    assert (third.returncode, out, err.count("\n")) == (143, "in\n", 1), err
    assert sorted(tree(tmp_path / "mine")) == ["config.yaml"], (
        "a command that is told to end gives its folder back"
    )
    both[1].wait()


def test_a_command_gives_its_folder_back_however_it_ends(tmp_path):
    @releases
    def main():
        claim(Config("mine", str(tmp_path)))
        raise KeyError("ours")

    with pytest.raises(KeyError):
        main()
    assert sorted(tree(tmp_path / "mine")) == ["config.yaml"]


@pytest.mark.parametrize("out", ["/dev/null", "/proc", "file", "n" * 300, "n/" * 3000])
def test_a_place_that_cannot_hold_a_folder_is_one_line(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("text")
    refused(lambda: claim(Config("mine", out)))
    assert list(tree(tmp_path)) == ["file"]


FULL = [
    OSError(28, "No space left on device"),
    RuntimeError(
        "[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0: file "
        "write failed"
    ),
    Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL, ids=["system", "torch", "safetensors"])
def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, error):
    (tmp_path / "state.pt").write_text("old")
    with pytest.raises(UserError, match="cannot write .*state.pt"), replacing(tmp_path / "state.pt"):
        raise error
    assert tree(tmp_path) == {"state.pt": b"old"}


def test_a_disk_that_is_full_when_a_run_begins_leaves_no_folder(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("configs.folders.save", full)
    with pytest.raises(OSError, match="No space"):
        claim(Config("mine", str(tmp_path / "deep/er")))
    assert tree(tmp_path) == {}


def test_looking_touches_nothing(tmp_path):
    assert look(Config("mine", str(tmp_path / "out"))) == tmp_path / "out/mine" and tree(tmp_path) == {}


def test_torch_itself_on_a_full_disk():
    with pytest.raises(UserError, match="cannot write state.pt"), _writing(Path("state.pt")):
        torch.save({"x": torch.zeros(10000)}, "/dev/full")
