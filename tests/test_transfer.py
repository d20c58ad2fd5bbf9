"""The main job, small, on the embedded family: its record, its continuation, its mistakes."""

import json
import subprocess
import sys

import pytest
import torch

from analysis import transfer
from configs import ROOT, entry, load, merge
from controls import formats

SMALL = ["controls=[controls/tiny/smile.safetensors]", "targets=[base,dmd]", "prompts=[portrait of a person,'portrait of a person, hat']",
         "seeds=2", "scales=[-1,0,1]", "wandb=disabled"]  # fmt: skip
CELL = {"control", "source", "target", "scales", "effect", "slope", "retention", "clip_change_percent", "monotonicity", "preservation",
        "matched_scale", "images", "prompts", "seeds", "verdict"}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("transfer")
    transfer.main(merge(transfer.Config, [*SMALL, f"out={out}"]))
    return out / "default"


def test_record_and_page(run):
    results = json.loads((run / "results.json").read_text())
    assert results["schema"] == 1 and len(results["cells"]) == 2
    for cell in results["cells"]:
        assert cell.keys() >= CELL and len(cell["effect"]) == 3 and cell["images"] == 12
        assert cell["effect"][1] == {"value": 0, "low": 0, "high": 0}
        assert (run / cell["picture"]).is_file() and set(cell["second"]) == {"probe"}
    base = results["cells"][0]
    assert base["target"] == "tiny/base" and base["retention"]["value"] in (1.0, None)
    assert "smile" in (run / "report.html").read_text()


def test_a_continued_run_gives_the_same_numbers(run):
    before = json.loads((run / "results.json").read_text())["cells"]
    (run / "features/dmd/smile@1.safetensors").unlink()
    transfer.main(merge(transfer.Config, [*SMALL, f"out={run.parent}"]))
    after = json.loads((run / "results.json").read_text())["cells"]
    assert after == before


def test_the_batch_size_does_not_matter(run, tmp_path):
    transfer.main(merge(transfer.Config, [*SMALL, f"out={tmp_path}", "batch=1"]))
    for ours, theirs in zip(*(json.loads((f / "results.json").read_text())["cells"] for f in (run, tmp_path / "default")), strict=True):
        assert ours["slope"]["value"] == pytest.approx(theirs["slope"]["value"], abs=1e-3)


class Trap:
    def __reduce__(self):
        return (open, (str(ROOT / "runs/trap-was-sprung"), "w"))


def bad_controls(folder):
    whole = (ROOT / "controls/tiny/smile.safetensors").read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    torch.save(Trap(), folder / "pickle.safetensors")
    control = formats.load(ROOT / "controls/tiny/smile.safetensors")
    control.tensors = {key.replace("down_blocks.1", "down_blocks.7"): value for key, value in control.tensors.items()}
    formats.save(control, folder / "elsewhere.safetensors")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["sedes=3"], "seeds"),
        (["seeds=few"], "seeds"),
        (["family=nowhere"], "tiny"),
        (["targets=[sdxl]"], "lightning"),
        (["scales=[1,2]"], "0"),
        (["controls=[missing.safetensors]"], "missing.safetensors"),
        (["controls=[{}/truncated.safetensors]"], "truncated"),
        (["controls=[{}/pickle.safetensors]"], "pickle"),
        (["controls=[{}/elsewhere.safetensors]", "prompts=[a]", "seeds=1", "targets=[dmd]"], "have no place"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, says, tmp_path, capsys):
    bad_controls(tmp_path)
    words = [*(word.format(tmp_path) for word in words), f"out={tmp_path}", "wandb=disabled"]
    with pytest.raises(SystemExit) as stop:
        entry(lambda: transfer.main(load(transfer.Config, words)))
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(said) == 1 and says in said[0]
    assert not (ROOT / "runs/trap-was-sprung").exists() and not (tmp_path / "default").exists()


def test_the_command_itself_exits_with_2():
    done = subprocess.run([sys.executable, "-m", "analysis.transfer", "sedes=3"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and "seeds" in done.stderr
