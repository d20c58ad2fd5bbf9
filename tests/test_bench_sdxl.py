"""The GPU measurement, where there is no GPU: it runs, says so, and leaves its results."""

import json

import torch

from train import bench_sdxl


def test_it_runs_on_the_embedded_family_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = bench_sdxl.main(bench_sdxl.Config(repeats=1, out=str(tmp_path)))
    found = json.loads(path.read_text())
    assert "no GPU" in found["hardware"] and "no GPU" in capsys.readouterr().out
    assert list(found["rows"]) == ["base", "student", "hybrid(1)", "base, diffusers", "student, diffusers", "slider step, rank 4"]
    assert all(0 < row["in_network"] < 1 for name, row in found["rows"].items() if "step" not in name)
