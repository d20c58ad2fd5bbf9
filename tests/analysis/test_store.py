"""Files that know whether they are whole: a reader finds one whole or not at all."""

import os
import time

import pytest
import torch

from analysis.images import store
from configs import UserError

TENSORS = {
    "latents": torch.arange(24.0).reshape(2, 3, 4),
    "pictures": torch.zeros(2, 3, dtype=torch.uint8),
    "a cat": torch.ones(3).double(),
}


@pytest.fixture
def path(tmp_path):
    store.write(tmp_path / "a.safetensors", TENSORS, "a")
    return tmp_path / "a.safetensors"


def test_what_is_written_comes_back(path):
    found = store.read(path, "a")
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize("way", ["cut", "emptied", "zeroed", "a pickle", "gone", "a folder"])
def test_a_damaged_file_is_not_there(path, way):
    content = path.read_bytes()
    path.unlink()
    if way == "a folder":
        path.mkdir()
    elif way != "gone":
        path.write_bytes(
            {"cut": content[:-9], "emptied": b"", "zeroed": bytes(len(content)), "a pickle": b"\x80\x04."}[
                way
            ]
        )
    assert store.read(path, "a") is None


def test_no_flipped_bit_goes_unseen(path):
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        found = store.read(path, "a")  # a flip in the padding between header and numbers changes nothing
        assert found is None or all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_two_files_in_each_others_place_are_not_there(path, tmp_path):
    store.write(tmp_path / "b.safetensors", TENSORS, "b")
    os.rename(path, tmp_path / "c")
    os.rename(tmp_path / "b.safetensors", path)
    assert store.read(path, "a") is None and store.read(path, "b")


def test_what_killed_runs_left_is_swept_and_what_may_be_at_work_stays(tmp_path):
    old, new = tmp_path / "ab/.x.safetensors.q1.safetensors", tmp_path / ".y.safetensors.q2.safetensors"
    for file in (old, new, tmp_path / "z.safetensors"):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"half")
        os.utime(file, (0, time.time() - 2 * store.DAY * (file != new)))
    store.sweep(tmp_path)
    assert not old.exists() and new.exists() and (tmp_path / "z.safetensors").exists()


def test_what_is_not_finite_is_not_kept(path):
    for value in (float("nan"), float("-inf")):
        with pytest.raises(UserError, match="dmd/student is not kept, for its latents is not finite"):
            store.write(path, TENSORS | {"latents": torch.tensor([1.0, value])}, "dmd/student")
    assert store.read(path, "a") is not None


def test_what_is_missing_in_a_folder_and_what_of_it_is_damaged(path, capsys):
    for name in ("b", "c"):
        store.write(path.parent / name, TENSORS, "b")
    assert store.missing(path.parent, ["b", "c", "d"]) == {"c", "d"}
    assert "1 of the files in" in capsys.readouterr().out
    with pytest.raises(UserError, match="damaged or removed while this run read it"):
        store.load(path.parent / "c", "c")
