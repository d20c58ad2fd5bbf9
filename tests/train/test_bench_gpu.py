"""The GPU measurement, where there is no GPU: every part runs, says so, and survives what fails."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from support import hub

from configs import ROOT, UserError, merge
from train.bench import figures, gpu, memory, sdxl

SMALL = {"apart": False, "repeats": 1, "base_steps": 2, "batches": [2], "sizes_px": [32], "backend": "eager",
         "train_batches": [1], "students": ["lcm"], "student_steps": 6, "student_batch": 2}  # fmt: skip
MARKED = """
import pytest
@pytest.mark.gpu
def test_a(): pass
@pytest.mark.gpu
def test_b(): assert 0
def test_c(): pass
"""


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def config(tmp_path, **words) -> gpu.Config:
    return merge(gpu.Config, SMALL | {"out": str(tmp_path / "gpu.json")} | words)


@pytest.mark.slow
def test_every_part_runs_on_the_embedded_family_and_says_so(tmp_path, monkeypatch, capsys):
    backends = []  # tests/models/test_offload.py does compile
    monkeypatch.setattr(sdxl, "compiled", lambda net, backend: backends.append(backend))
    (tmp_path / "test_marked.py").write_text(MARKED)
    path = gpu.main(config(tmp_path, tests=[str(tmp_path / "test_marked.py")]))
    results = json.loads(path.read_text())
    assert results["hardware"]["gpu"] is None and "no GPU" in capsys.readouterr().out
    assert list(results["parts"]) == list(gpu.PARTS)
    for part, measured in results["parts"].items():
        assert measured["rows"] and measured["error"] is None and measured["seconds"], part
        assert not [row for row in measured["rows"].values() if "error" in row], part
    rows = results["parts"]["pictures"]["rows"]
    assert {"base, diffusers", "student, diffusers", "student, batch 2", "VAE, batch 2"} <= rows.keys()
    assert all(0 < row["in_network"] < 1 for row in rows.values() if "in_network" in row)
    assert rows["hybrid(1), the paper's"]["nfe"] == rows["student"]["nfe"] == 4
    assert backends == ["eager"] and "student, compiled by eager" in results["parts"]["compile"]["rows"]
    assert any(name.endswith("nf4") for name in results["parts"]["training"]["rows"])
    tested = results["parts"]["tests"]["rows"]["pytest -m gpu"]
    assert (tested["passed"], tested["failed"], tested["failing"]) == (1, 1, "test_b")


def test_a_row_and_a_part_that_fail_lose_no_other(tmp_path, monkeypatch):
    def broken(cfg):
        yield "bad", lambda: 1 / 0
        yield "good", lambda: {"seconds": 1.0}
        raise RuntimeError("CUDA error\nof several lines")

    def sound(cfg):
        yield "x", lambda: {"seconds": 2.0}

    monkeypatch.setattr(gpu, "PARTS", {"one": (1, broken), "two": (1, sound)})
    parts = json.loads(gpu.main(config(tmp_path, parts=["one", "two"])).read_text())["parts"]
    error = "ZeroDivisionError: division by zero"
    assert parts["one"]["rows"] == {"bad": {"error": error}, "good": {"seconds": 1.0}}
    assert parts["one"]["error"] == "RuntimeError: CUDA error of several lines"
    assert parts["two"]["rows"] == {"x": {"seconds": 2.0}}
    results = json.loads(gpu.main(config(tmp_path, parts=["two"], minutes=0)).read_text())
    assert "left out" in results["parts"]["two"]["rows"]["x"]["error"]
    assert results["parts"]["one"] == parts["one"]  # measured before, on the same hardware


@pytest.mark.parametrize(
    ("then", "seconds", "error"),
    [
        ("time.sleep(60)", 2, "it was ended after 2 seconds"),
        ("os._exit(3)", 60, "its process ended with exit code 3"),
        ("pass", 60, None),
    ],
)
def test_a_part_that_hangs_or_crashes_leaves_its_rows(tmp_path, monkeypatch, then, seconds, error):
    script = tmp_path / "child.py"
    script.write_text(f"""import json, os, sys, time
cfg = json.load(open(sys.argv[1].removeprefix("config=")))
assert not cfg["apart"] and cfg["parts"] == ["tests"] and 60 * cfg["minutes"] < {seconds}
part = {{"seconds": 0, "error": None, "rows": {{"a": {{"seconds": 1}}}}}}
json.dump({{"parts": {{"tests": part}}}}, open(cfg["out"], "w"))
{then}""")
    monkeypatch.setattr(gpu, "__file__", str(script))
    path = gpu.main(config(tmp_path, apart=True, parts=["tests"], minutes=seconds / 60))
    measured = json.loads(path.read_text())["parts"]["tests"]
    assert (measured["rows"], measured["error"]) == ({"a": {"seconds": 1}}, error)
    assert measured["seconds"] < 30


@pytest.mark.parametrize(
    ("answer", "gpu_name", "gb"),
    [
        ("NVIDIA H100 80GB HBM3, 81559, 550.54.15\n", "NVIDIA H100 80GB HBM3", 85.5),
        ("", "a CUDA device without nvidia-smi", None),
    ],
)
def test_the_hardware_is_named(monkeypatch, tmp_path, answer, gpu_name, gb):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\nprintf '{answer}'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    seen = gpu.hardware()
    assert (seen["gpu"], seen["memory_gb"]) == (gpu_name, gb)


def test_what_a_gpu_measured_is_never_replaced_without_one(tmp_path):
    assert gpu.check(config(tmp_path, out="")) == ROOT / "runs/bench-gpu/gpu.json"
    with pytest.raises(UserError, match="there is none here"):
        gpu.check(config(tmp_path, out=str(ROOT / "docs/records/gpu.json")))
    with pytest.raises(UserError, match="no part 'coffee'; there are pictures, training"):
        gpu.check(config(tmp_path, parts=["coffee"]))


def test_the_docs_say_what_the_file_says_or_that_there_is_none():
    found = figures.BLOCK.search(figures.PAGE.read_text())
    assert found[0] == found[1] + figures.docs() + found[2], "python train/bench/gpu.py --docs writes it"


def test_figures_come_into_the_docs(tmp_path, monkeypatch, capsys):
    record, page = tmp_path / "gpu.json", tmp_path / "families.md"
    device = {"gpu": "H100", "memory_gb": 80, "driver": "1.2", "cuda": "12.8"}
    rows = {
        "base": {"seconds": 4.0, "in_network": 0.981},
        "student": {"seconds": 0.5},
        "broken": {"error": "a|b"},
        "hybrid(1), the paper's": {"seconds": 0.505},
    }
    parts = {"pictures": {"seconds": 80, "error": "ended", "rows": rows}}
    about = {"hardware": device, "versions": {"torch": "2.9", "commit": "abc"}, "created": "today"}
    record.write_text(json.dumps(about | {"parts": parts}))
    page.write_text("before\n<!-- gpu -->\nnot yet\n<!-- /gpu -->\nafter\n")
    monkeypatch.setattr(figures, "RECORD", record)
    monkeypatch.setattr(figures, "PAGE", page)
    gpu.main(config(tmp_path, docs=True))
    text = page.read_text()
    assert text.startswith("before\n<!-- gpu -->\n`make gpu`")
    assert text.endswith("</details>\n<!-- /gpu -->\nafter\n")
    assert all(word in text for word in ("H100", "commit abc", "98.1%; aim", "1.010; aim", ": ended"))
    assert "| base | 4 | 98.1% |  |" in text and "| broken |  |  | a/b |" in text
    assert "not yet" not in text
    gpu.main(config(tmp_path, show=True, out=str(record)))
    assert figures.markdown(json.loads(record.read_text())) in capsys.readouterr().out


@pytest.fixture(scope="module")
def shrunk():
    """SDXL's own configs with narrow layers, made into a family as it is made at full size, in bf16."""
    configs = json.loads((ROOT / "models/published.json").read_text())["sdxl"]
    text = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "projection_dim": 32,
    }
    unet = {
        "block_out_channels": [32, 32, 64],
        "transformer_layers_per_block": 1,
        "attention_head_dim": 2,
        "layers_per_block": 1,
        "cross_attention_dim": 64,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 32 + 6 * 8,
    }
    small = {
        "unet": unet,
        "text_encoder": text,
        "text_encoder_2": text,
        "vae": {"block_out_channels": [8] * 4, "norm_num_groups": 4},
    }
    family = sdxl.random_sdxl({part: configs[part] | changes for part, changes in small.items()}, "cpu")
    family.card = replace(family.card, size_px=hub.SIZE_PX)
    return family


def test_a_network_in_bf16_beside_a_vae_in_fp32_draws_in_ours_and_in_diffusers(shrunk):
    for name, measure in [*sdxl.pictures(shrunk, 1, 2), *sdxl.batches(shrunk, 1, [2])]:
        assert measure()["seconds"] > 0, name


def test_a_step_in_bf16_whole_and_packed(shrunk, monkeypatch):
    net = deepcopy(shrunk.member("base").denoiser.net)
    monkeypatch.setattr(memory, "subject", lambda: (net, 64, 8))
    rows = {name: measure() for name, measure in memory.steps([32], [2], "nf4", 1)}
    assert [row["gradient_checkpointing"] for row in rows.values() if "gradient_checkpointing" in row] == [
        False,
        True,
    ] * 3
    assert rows["packing in nf4"]["packed_gb"] < rows["packing in nf4"]["whole_gb"]
    peaks = [row["peak_gb"] for name, row in rows.items() if name.endswith("forecast")]
    assert peaks[1] < peaks[0]  # with checkpointing
