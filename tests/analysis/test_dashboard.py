"""The saved W&B layout: built without network, of keys that are really logged."""

import sys

import pytest
from support.commands import configured, launched, ran, refused
from support.synthetic import TRACKED, documented, results, write

from analysis import dashboard
from configs import UserError


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """A machine on which nobody is logged in, with a transfer run in its default place."""
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.chdir(tmp_path)
    write(results(TRACKED), tmp_path / "runs/transfer/default")


def keys_of(panel: dict) -> list[str]:
    """The keys that a saved panel names, by what W&B's own layout calls them."""
    config = panel["config"]
    if panel["viewType"] == "Weave":
        return [config["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"]]
    if panel["viewType"] == "Vega2":
        (fields,) = [part["fields"] for part in config["userQuery"]["queryFields"]]
        return [arg["value"] for part in fields for arg in part.get("args", []) if arg["name"] == "tableKey"]
    return config.get("metrics") or config["mediaKeys"]


def sections() -> dict[str, list[list[str]]]:
    """Title to the keys of each panel, as they would be sent."""
    board = dashboard.layout(results(TRACKED)["cells"], "someone", "distilled-control", "view")
    spec = board._to_model().spec.model_dump(by_alias=True, exclude_none=True)  # what its save() sends
    return {
        section["name"]: [keys_of(panel) for panel in section["panels"]]
        for section in spec["section"]["panelBankConfig"]["sections"]
    }


def test_panels_name_documented_keys():
    """tests/analysis/test_wandb_log.py shows that what is documented is logged."""
    patterns = documented().values()
    found = [key for panels in sections().values() for keys in panels for key in keys]
    assert len(found) == len(set(found)) and not [
        key for key in found if not any(p.fullmatch(key) for p in patterns)
    ]


def test_every_documented_key_has_a_panel():
    found = [key for panels in sections().values() for keys in panels for key in keys]
    without = {
        key
        for key, pattern in documented("training", "transfer").items()
        if not any(map(pattern.fullmatch, found))
    }
    assert without <= {"verdict/<control>/<target>"}  # words, which W&B shows in its table of runs


def test_a_control_has_its_members_in_one_panel():
    images = sections()["Images"]
    assert (
        images[0] == [f"images/smile/tiny/{m}" for m in ("base", "dmd", "lcm", "lightning", "base:few(4)")]
        and len(images) == 3
    )


def test_without_login_one_line_says_how(nobody):
    refused(configured(dashboard, []), "wandb login")


def test_without_the_extra_one_line_says_how(nobody, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)  # an import of it raises
    refused(configured(dashboard, []), "pip install -e '.[dashboard]'")


def test_without_a_transfer_run_one_line_says_how(nobody, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    refused(configured(dashboard, ["run=runs/nothing"]), "python -m analysis.transfer")


def test_a_server_that_refuses_is_one_line(nobody, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    saved = []

    def refuse(board):
        saved.append((board.entity, board.project))
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(dashboard.toolkit()[1].Workspace, "save", refuse)
    with pytest.raises(UserError, match="did not save"):  # `entry` makes one line of it
        configured(dashboard, ["entity=someone"])()
    assert saved == [("someone", "distilled-control")]


def test_help_lists_the_keys():
    printed = ran(launched("analysis.dashboard", "--help"))
    assert "entity" in printed and "runs/transfer/default" in printed
