"""Checkpoints: a log has each step once, and a state that does not belong here is one line."""

import json

import pytest
import torch

from configs import UserError
from train.checkpoint import LAST, append, resumable, store


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("same_process", [True, False])
def test_a_log_has_each_step_once_after_a_kill(tmp_path, same_process):
    part = torch.nn.Linear(1, 1)

    def train(until):
        for step in resumable(tmp_path / "state.pt", {"part": part}, 20, 10):
            append(tmp_path / "log.jsonl", {"step": step, "loss": 1.0})
            if step % 7 == 0:
                append(tmp_path / "watch.jsonl", {"step": step})
            if step == until:
                return

    for until in (4, 15, 18, None):
        train(until)
        if not same_process:
            LAST.clear()
            with (tmp_path / "log.jsonl").open("a") as lines:
                lines.write('{"step": 19, "lo')  # killed while it wrote
    text = (tmp_path / "log.jsonl").read_text().removesuffix('{"step": 19, "lo')
    assert [json.loads(line)["step"] for line in text.splitlines()] == list(range(20))
    assert steps(tmp_path / "watch.jsonl") == [0, 7, 14]


def test_a_log_without_steps_is_only_appended_to(tmp_path):
    for _ in range(2):
        append(tmp_path / "log.jsonl", {"loss": 1.0})
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def written(path, bound="a"):
    part = torch.nn.Linear(2, 1)
    store(path, {"part": part}, 3, bound)
    return part


@pytest.mark.parametrize(
    "damage", ["empty", "half", "text", "folder", "other", "list", "done", "shape", "code"]
)
def test_a_state_that_cannot_be_is_one_line_that_names_it(tmp_path, damage):
    path = tmp_path / "state.pt"
    written(path)
    whole = path.read_bytes()
    part = torch.nn.Linear(3 if damage == "shape" else 2, 1)
    match damage:
        case "empty" | "half" | "text":
            path.write_bytes({"empty": b"", "half": whole[: len(whole) // 2], "text": b"hello"}[damage])
        case "folder":
            path.unlink()
            path.mkdir()
        case "other":
            torch.save({"weights": torch.zeros(1)}, path)
        case "list":
            torch.save([1, 2], path)
        case "done":
            store(path, {"part": part}, 99, "a")
        case "code":
            torch.save({"done": 1, "part": print}, path)
    with pytest.raises(UserError, match=r"state\.pt.*overwrite=true") as caught:
        next(resumable(path, {"part": part}, 10, 1, bound="a"))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_state_is_bound_to_its_config(tmp_path):
    part = written(tmp_path / "state.pt", "one")
    with pytest.raises(UserError, match="another config"):
        next(resumable(tmp_path / "state.pt", {"part": part}, 10, 1, bound="two"))
    assert next(resumable(tmp_path / "state.pt", {"part": part}, 10, 1, bound="one")) == 3


def test_a_state_of_an_older_version_goes_on(tmp_path):
    part = torch.nn.Linear(2, 1)
    torch.save({"done": 4, "part": part.state_dict()}, tmp_path / "state.pt")
    assert next(resumable(tmp_path / "state.pt", {"part": part}, 10, 1, bound="one")) == 4
