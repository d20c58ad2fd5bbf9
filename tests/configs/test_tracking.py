import sys
import threading
import time
import types

import psutil
import pytest
from PIL import Image

from configs import UserError, tracking

ABOUT = {"config": {"steps": 2, "nested": {"rank": 4}}, "job_type": "train.slider", "group": "smile"}


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """A machine on which nobody is logged in."""
    for name in ("DISABLED", "MODE", "API_KEY", "BASE_URL", "DATA_DIR", "CACHE_DIR", "PROJECT"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def broken(*_, **__):
    raise RuntimeError("no\nnetwork")


def everything(tracker, folder):
    picture, control = folder / "a.png", folder / "smile.safetensors"
    Image.new("RGB", (4, 4)).save(picture)
    control.write_bytes(b"weights")
    tracker.log({"loss": 1.0}, step=3)
    tracker.images({"faces": (Image.new("RGB", (4, 4)), "scale 1")}, step=4)
    tracker.table("cells", ["control", "slope"], [["smile", 0.1]])
    tracker.image("strip", picture, "five scales")
    tracker.curves("curves/smile", [0, 1], {"dmd": [0.0, 0.1]}, "effect", "scale")
    tracker.summary({"retention": 0.9})
    tracker.artifact(control, "tiny/base smile", "control")
    tracker.artifact(folder, "run", "results")
    tracker.artifact([picture, control], "two files", "results")
    tracker.uses("smile")
    tracker.uses("age", control)


def test_offline_run_writes_under_the_folder_and_says_how_to_sync(nobody, capfd):
    folder = nobody / "run"
    with tracking.start(folder, **ABOUT) as tracker:
        everything(tracker, folder)
        assert tracker.run.config["uses"] == ["smile", "age"]
    (written,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    assert written.stat().st_size > 0
    assert list((folder / "wandb/data").rglob("*")), "artifacts are staged inside the folder"
    assert not (nobody / "home").exists(), "nothing goes to the home folder"
    out, err = capfd.readouterr()
    assert (
        out.startswith("W&B is offline; to upload this run: wandb sync run/wandb/offline-run-")
        and out.count("\n") == 1
    )
    assert err == ""


def test_a_long_group_is_cut_to_what_wandb_takes(nobody):
    with tracking.start(nobody / "run", **{**ABOUT, "group": "smile+" * 40}, mode="offline") as tracker:
        assert tracker.run.group == ("smile+" * 40)[:128]


def test_disabled_writes_nothing_and_imports_nothing(nobody, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it would raise
    with tracking.start(nobody / "run", **ABOUT, mode="disabled") as tracker:
        tracker.log({"loss": 1.0})
        tracker.uses("smile")
    assert not (nobody / "run").exists()
    assert capfd.readouterr() == ("", "")


def test_wandb_mode_is_respected_by_auto_alone(nobody, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert tracking.start(nobody / "run", **ABOUT).run is None
    assert not (nobody / "run").exists()


@pytest.mark.parametrize(
    ("word", "mode", "offline"), [("true", "auto", False), ("0", "auto", True), ("true", "offline", True)]
)
def test_wandb_disabled_is_respected_by_auto_alone(nobody, monkeypatch, word, mode, offline):
    modes = []
    fake = types.SimpleNamespace(init=lambda mode, **_: modes.append(mode), Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_DISABLED", word)
    tracking.start(nobody / "run", **ABOUT, mode=mode)
    assert modes == ["offline"] * offline and (nobody / "run").exists() == offline


def test_a_training_that_goes_on_is_the_same_run_and_an_analysis_a_new_one(nobody, monkeypatch):
    asked = []
    fake = types.SimpleNamespace(init=lambda **about: asked.append(about), Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for job in ("train.slider", "train.slider", "analysis.transfer"):
        tracking.start(nobody / "run", **{**ABOUT, "job_type": job}, mode="offline")
    tracking.start(nobody / "other", **ABOUT, mode="offline")
    (nobody / "run/wandb/run-id").write_text("../../x")  # damaged
    tracking.start(nobody / "run", **ABOUT, mode="offline")
    first, again, analysis, other, repaired = (about.get("id") for about in asked)
    assert first == again and analysis is None and len({first, other, repaired}) == 3
    assert [about.get("resume") for about in asked] == ["allow", "allow", None, "allow", "allow"]


def test_offline_all_parts_of_a_run_that_went_on_are_named(nobody, capfd):
    for _ in range(2):
        with tracking.start(nobody / "run", **ABOUT, mode="offline") as tracker:
            name = tracker.run.id
        time.sleep(1.1)  # W&B names a part's folder by the second
    last = capfd.readouterr().out.splitlines()[-1]
    assert last.endswith(f"wandb sync run/wandb/offline-run-*-{name}")


def test_wandb_that_never_answers_is_one_warning_and_an_end(nobody, monkeypatch, capfd):
    hanging, ended = threading.Event(), []
    run = types.SimpleNamespace(
        offline=True,
        dir=str(nobody),
        id="x",
        finish=lambda exit_code: hanging.wait(60),
        log=lambda *_, **__: None,
    )
    fake = types.SimpleNamespace(init=lambda **_: run, Settings=dict, teardown=lambda: ended.append(True))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(tracking, "FINISH", 0.1)
    monkeypatch.setattr(psutil.Process, "children", lambda *_: [])  # the service of other tests lives on
    with tracking.start(nobody / "run", **ABOUT) as tracker:
        tracker.log({"loss": 1.0})
    hanging.set()
    err = capfd.readouterr().err
    assert (
        err == "warning: W&B failed (TimeoutError: no answer in 0.1 seconds); the files are not affected\n"
        and ended
    )


def test_a_service_that_is_killed_is_one_warning(nobody, monkeypatch, capfd):
    with tracking.start(nobody / "run", **ABOUT, mode="offline") as tracker:
        for process in psutil.Process().children(recursive=True):
            if process.name() == "wandb-core":
                process.kill()
                process.wait()
        everything(tracker, nobody / "run")
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "expected"), [("tiny/base", "tiny-base"), ("smile", "smile"), ("a" * 128, "a" * 128)]
)
def test_names_of_artifacts_that_wandb_takes_stay(name, expected):
    assert tracking._artifact_name(name) == expected


def test_names_of_artifacts_that_are_cut_or_replaced_stay_different_and_are_taken(nobody):
    names = ["a" * 129, "a" * 130, "Lächeln", "Lücheln", "表情", "愁眉", "tiny/" * 40]
    cut = [tracking._artifact_name(name) for name in names]
    assert len(set(cut)) == len(names) and all(len(name) <= 128 for name in cut)
    import wandb

    for name in cut:
        wandb.Artifact(name, "control")


def test_other_processes_get_a_disabled_tracker(nobody, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert tracking.start(nobody / "run", **ABOUT, mode="offline").run is None


def test_unknown_mode_is_a_user_error(nobody):
    with pytest.raises(UserError, match="the modes are auto, online"):
        tracking.start(nobody, **ABOUT, mode="on")


def test_wandb_that_cannot_start_is_one_warning(nobody, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=broken, Settings=dict))
    with tracking.start(nobody / "run", **ABOUT, mode="online") as tracker:
        everything(tracker, nobody / "run")
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "warning: W&B failed (RuntimeError: no network); the files are not affected\n"


def test_online_that_cannot_start_goes_offline(nobody, monkeypatch):
    modes = []

    def init(mode, **_):
        modes.append(mode)
        return (
            broken()
            if mode == "online"
            else types.SimpleNamespace(offline=True, dir=str(nobody), finish=lambda exit_code: None)
        )

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Settings=dict))
    tracking.start(nobody / "run", **ABOUT, mode="online").finish()
    assert modes == ["online", "offline"]


def test_a_run_that_breaks_is_one_warning(nobody, monkeypatch, capfd):
    run = types.SimpleNamespace(
        log=broken, log_artifact=broken, config=None, offline=True, dir=str(nobody), finish=broken
    )
    monkeypatch.setitem(
        sys.modules,
        "wandb",
        types.SimpleNamespace(init=lambda **_: run, Settings=dict, Table=dict, Image=broken),
    )
    (nobody / "run").mkdir()
    with tracking.start(nobody / "run", **ABOUT) as tracker:
        everything(tracker, nobody / "run")
    assert capfd.readouterr().err.count("\n") == 1


def test_the_commands_own_exception_goes_through_and_marks_the_run_failed(nobody, monkeypatch):
    codes = []
    run = types.SimpleNamespace(
        offline=True, dir=str(nobody), finish=lambda exit_code: codes.append(exit_code)
    )
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: run, Settings=dict))
    with pytest.raises(ZeroDivisionError), tracking.start(nobody / "run", **ABOUT):
        raise ZeroDivisionError
    assert codes == [1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("machine api.wandb.ai login user password k\n", True),
        ("machine example.com login user password k\n", False),
        ("machine", False),
    ],
)
def test_logged_in_reads_netrc(nobody, text, expected):
    (nobody / "netrc").write_text(text)
    assert tracking.logged_in() is expected


def test_logged_in_reads_the_environment(nobody, monkeypatch):
    assert not tracking.logged_in()
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert tracking.logged_in()
