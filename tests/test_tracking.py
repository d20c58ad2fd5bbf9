import sys
import types

import pytest
from PIL import Image

from configs import UserError, tracking

ABOUT = {"config": {"steps": 2, "nested": {"rank": 4}}, "job_type": "train.slider", "group": "smile"}


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """A machine on which nobody is logged in."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_PROJECT", "RANK"):
        monkeypatch.delenv(name, raising=False)
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
    assert out.startswith("W&B is offline; to upload this run: wandb sync run/wandb/offline-run-") and out.count("\n") == 1
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
        return broken() if mode == "online" else types.SimpleNamespace(offline=True, dir=str(nobody), finish=lambda exit_code: None)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Settings=dict))
    tracking.start(nobody / "run", **ABOUT, mode="online").finish()
    assert modes == ["online", "offline"]


def test_a_run_that_breaks_is_one_warning(nobody, monkeypatch, capfd):
    run = types.SimpleNamespace(log=broken, log_artifact=broken, config=None, offline=True, dir=str(nobody), finish=broken)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: run, Settings=dict, Table=dict, Image=broken))
    (nobody / "run").mkdir()
    with tracking.start(nobody / "run", **ABOUT) as tracker:
        everything(tracker, nobody / "run")
    assert capfd.readouterr().err.count("\n") == 1


def test_the_commands_own_exception_goes_through_and_marks_the_run_failed(nobody, monkeypatch):
    codes = []
    run = types.SimpleNamespace(offline=True, dir=str(nobody), finish=lambda exit_code: codes.append(exit_code))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: run, Settings=dict))
    with pytest.raises(ZeroDivisionError), tracking.start(nobody / "run", **ABOUT):
        raise ZeroDivisionError
    assert codes == [1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("machine api.wandb.ai login user password k\n", True), ("machine example.com login user password k\n", False), ("machine", False)],
)
def test_logged_in_reads_netrc(nobody, text, expected):
    (nobody / "netrc").write_text(text)
    assert tracking.logged_in() is expected


def test_logged_in_reads_the_environment(nobody, monkeypatch):
    assert not tracking.logged_in()
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert tracking.logged_in()
