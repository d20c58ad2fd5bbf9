"""The paper's protocol as configs: each file runs, on the embedded family and with fewer images, and makes
what the paper prints.
"""

import json

import pytest
from PIL import Image
from support.short_runs import QUICK

from analysis import diversity, trace, transfer
from configs import ROOT, merge

PORTRAITS = "prompts=[portrait of a person,'portrait of a person, hat']"
BRIEF = ["students=[dmd]", "evaluators=[clip,probe]", "seeds=3"]
CONTROLS = [
    "controls=[controls/tiny/smile.safetensors,controls/tiny/watercolour.safetensors]",
    "targets=[base,dmd]",
    "seeds=2",
    "baselines=1",
]
COCO = "case_number,prompt,evaluation_seed\n" + "".join(
    f'{k},"portrait of a person",{k * 7}\n' for k in range(50)
)
SMALL = {  # file: what makes it small
    "t1": (transfer, [*CONTROLS, PORTRAITS, "max_prompts=2", "scales=[0,1]", "lora_scales=[0,1]"]),
    "t1-car": (
        transfer,
        [
            "controls=[controls/tiny/space-1.safetensors]",
            "targets=[base,dmd]",
            "seeds=2",
            "baselines=1",
            "references=false",
            "max_prompts=2",
            PORTRAITS,
        ],
    ),
    "t2": (diversity, [*BRIEF, PORTRAITS]),
    "t3": (
        diversity,
        [
            *BRIEF,
            "prompts=[DATA/coco.csv:2]",
            "captions_from=[DATA/coco.csv]",
            "captions=40",
            "reference=DATA",
        ],
    ),
    "d1": (diversity, [*BRIEF, PORTRAITS]),
    "e1": (diversity, [*BRIEF, PORTRAITS]),
    "fig5": (trace, ["students=[dmd]", "evaluators=[clip]", "prompts=[DATA/coco.csv:3]"]),
    "fig7": (diversity, [*BRIEF, "captions=0", "prompts=[portrait of a person]"]),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """COCO as users have it: a table and a folder of pictures."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "coco.csv").write_text(COCO)
    for k in range(12):
        Image.new("RGB", (80, 64), (20 * k, 90, 10)).save(folder / f"{k}.jpg")
    return folder


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * name.startswith(("t1", "t3", "d1", "e1", "fig7")))
        for name in SMALL
    ],
)
def test_a_file_of_the_paper_runs_on_the_embedded_family(name, data, tmp_path):
    command, words = SMALL[name]
    words = [QUICK, *(word.replace("DATA", str(data)) for word in words), "wandb=disabled", f"out={tmp_path}"]
    words += [f"cache={tmp_path}/cache"] if command is transfer else []
    cfg = merge(command.Config, ROOT / f"configs/paper/{name}.yaml", words)
    page = command.main(cfg)
    cells = json.loads((page.parent / "results.json").read_text())["cells"]
    assert page.is_file() and cells
    if command is transfer:
        assert [cell["target"] for cell in cells[:2]] == ["tiny/base", "tiny/dmd"] and any(
            e["value"] for e in next(iter(cells[1]["readings"].values()))["effect"]
        )
        if name == "t1-car":  # without words there is no score
            assert cells[1]["clip_change_percent"]["value"] is None
    if command is diversity:
        assert [cell["plan"] for cell in cells] == cfg.plans
    if name == "t3":
        quality = cells[-1]["quality"]
        assert (
            quality["frechet_clip"]["value"] > 0
            and quality["clip"]["value"] > 0
            and all(c["seconds"] > 0 for c in cells)
        )
        assert cells[0]["captions"] == 40
    if name == "fig5":
        assert len(cells[-1]["distance"]["clip"]) == 4 and cells[-1]["abandoned"]["falls"] is None


def test_every_file_of_the_paper_is_here_and_in_make_paper():
    names = {path.stem for path in (ROOT / "configs/paper").glob("*.yaml")}
    made = (ROOT / "Makefile").read_text().partition("paper: ##")[2].partition("proof:")[0]
    assert names == SMALL.keys() and all(name in made for name in names)
