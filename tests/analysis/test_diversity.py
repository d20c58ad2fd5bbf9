"""Diversity, small, on the embedded family: its record, its continuation, recovery, the page, mistakes."""

import json
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from support.commands import configured, launched, refused
from support.short_runs import QUICK
from support.synthetic import Keys, undocumented

from analysis import diversity, report
from analysis.diversity import Config
from analysis.images import quality
from analysis.measures import variety
from analysis.measures.image_sets import diversity as whole
from analysis.pages import diversity as diversity_page
from configs import ROOT, UserError, merge
from models.evaluators import load_evaluators
from models.families import Family, card
from models.plans import named
from models.sampler import draw_noise, finish

QUICK_CARD = QUICK.removeprefix("family=")
PROMPTS = ["portrait of a person", "portrait of a person, hat"]
SMALL = [
    "prompts=[portrait of a person,'portrait of a person, hat']",
    "seeds=3",
    "captions=16",
    "neighbours=2",
    "students=[dmd]",
    "plans=[hybrid(1),base(4)]",
    "wandb=disabled",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("diversity")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "REAL", 60)
        diversity.main(merge(Config, [*SMALL, f"out={out}"]))
        yield out / "default"


@pytest.fixture(scope="module")
def results(run):
    return json.loads((run / "results.json").read_text())


def cell(results: dict, student: str, plan: str) -> dict:
    return next(c for c in results["cells"] if (c["student"], c["plan"]) == (student, plan))


def test_record(run, results):
    assert results["schema"] == 3
    found = {(c["student"], c["plan"]) for c in results["cells"]}
    assert found == {("base", "base"), ("base", "base(4)"), ("dmd", "student"), ("dmd", "hybrid(1)")}
    for c in results["cells"]:
        steps = {"base": 10}.get(c["plan"], 4)
        assert len(c["steps"]) == len(c["vendi"]) == steps and all(
            len(points) == steps for points in c["diversity"].values()
        )
        assert c["images"] == 6 and 1 <= c["vendi"][-1]["value"] <= 3 and len(c["per_prompt"]) == 2
        assert {"inception", "clip", "frechet_clip", "precision_probe", "coverage_clip"} <= c[
            "quality"
        ].keys() and c["seconds"] > 0


def test_what_an_image_costs_is_counted(results):
    costs = {"base": 20, "base(4)": 8, "student": 4, "hybrid(1)": 4}
    assert {c["plan"]: c["nfe"] for c in results["cells"]} == costs


def test_the_ends_of_recovery_and_of_the_share_of_the_base(results):
    base, student = cell(results, "base", "base"), cell(results, "dmd", "student")
    assert base["of_base"]["clip"] == {
        "value": 1,
        "low": None,
        "high": None,
    }  # two prompts do not bound a ratio
    assert student["gain"]["clip"] == {"value": 0, "low": 0, "high": 0} and student["recovery"]["clip"][
        "value"
    ] in (0, None)
    assert cell(results, "base", "base(4)")["recovery"]["clip"] is None  # no student takes part in it


def test_the_first_step_of_a_hybrid_is_the_base_s_without_guidance(results):
    """What base(4) sees first, but for its guidance."""
    family = Family("tiny", dtype=torch.float32)
    base, evaluator = family.member("base"), load_evaluators(family.card)["clip"]
    with torch.no_grad():
        noise = draw_noise([2000, 2001, 2002], family.latent_shape, 0)[:, 0]
        x0 = base.denoiser(noise, base.levels[0], family.encode(PROMPTS[:1] * 3))
    first = whole(evaluator.features(family.decode(x0)))["value"]
    guided = cell(results, "base", "base")["diversity"]["clip"][0]["value"]
    hybrid = cell(results, "dmd", "hybrid(1)")
    assert hybrid["diversity"]["clip"][0]["value"] != pytest.approx(guided, rel=1e-2)
    assert hybrid["steps"][0]["t"] == base.levels[0].t and first > 0


def test_the_numbers_are_those_of_the_images(results):
    """Drawn again in one go and measured from the n × n table."""
    family = Family("tiny", dtype=torch.float32)
    plan, evaluator = (
        named("hybrid(1)", family.member("base"), family.member("dmd")),
        load_evaluators(family.card)["clip"],
    )
    with torch.no_grad():
        noise = draw_noise([2003, 2004, 2005], family.latent_shape, plan.steps)
        images = family.decode(finish(plan, noise, family.encode(PROMPTS[1:] * 3)))
    found = whole(evaluator.features(images))
    stored = cell(results, "dmd", "hybrid(1)")["per_prompt"][1]["clip"]
    assert stored == pytest.approx(found, rel=1e-4)


@pytest.mark.slow
def test_a_continued_run_gives_the_same_numbers_and_may_have_more_plans(run, results):
    for lost in ("dmd/student/prompts-0", "base/base(4)/block-3"):
        (run / f"features-2/{lost}.safetensors").unlink()
    diversity.main(merge(Config, [*SMALL, f"out={run.parent}", "plans=[hybrid(1),base(4),skip(1)]"]))
    after = json.loads((run / "results.json").read_text())
    assert cell(after, "dmd", "skip(1)")["nfe"] == 3
    for before in results["cells"]:
        now = cell(after, before["student"], before["plan"])
        changed = ("seconds", "claims")  # which are corrected for the number of plans
        assert all(now[key] == before[key] for key in before if key not in changed)


@pytest.mark.slow
def test_the_loss_of_a_student_of_strong_guidance_has_two_shares(tmp_path):
    """The base at the guidance that was distilled in is drawn unasked, once the card says another than its
    own.
    """
    words = ["captions=0", "seeds=4", "students=[dmd,dmd8]", "plans=[]", "max_prompts=4", "wandb=disabled"]
    page = diversity.main(merge(Config, [*words, f"out={tmp_path}", f"family={QUICK_CARD}"]))
    results = json.loads((page.parent / "results.json").read_text())
    found = [(c["student"], c["plan"]) for c in results["cells"]]
    assert found == [("base", "base"), ("dmd", "student"), ("dmd8", "teacher"), ("dmd8", "student")]
    alone, guided = cell(results, "dmd8", "student"), cell(results, "dmd8", "teacher")
    assert alone["teacher_guidance"] == 8 and guided["nfe"] == 6 and len(guided["steps"]) == 3
    assert guided["diversity"]["clip"] != cell(results, "base", "base")["diversity"]["clip"]
    assert alone["shares"].keys() == {"clip", "probe", "geometry"}
    assert cell(results, "dmd", "student")["shares"] is None  # its teacher had the base's own guidance
    assert "guidance distilled in" in page.read_text() and "seconds" not in alone


@pytest.mark.slow
def test_a_known_dose_of_collapse_is_read_back_from_images(tmp_path):
    """alike(.6): .36 of all pairs lose what they lose in alike(1), within the intervals."""
    plans = ["student", "alike(0.6)", "alike(1)"]
    words = [
        *("students=[lightning]", f"plans={plans}", "seeds=8", "max_prompts=12", "captions=0"),
        *("evaluators=[clip,probe]", "wandb=disabled", f"out={tmp_path}", f"family={QUICK_CARD}"),
    ]
    page = diversity.main(merge(Config, words))
    cells = json.loads((page.parent / "results.json").read_text())["cells"]
    by = {c["plan"]: c["per_prompt"] for c in cells}
    for name in ("clip", "probe"):
        plain, some, all = (np.array([row[name]["value"] for row in by[plan]]) for plan in plans)
        dose = variety.part(plain, some, plain, all)
        assert dose["low"] <= 0.36 <= dose["high"] and dose["high"] - dose["low"] < 0.6
        assert dose["low"] > 0


def test_a_control_acts_in_a_plan_where_it_says(tmp_path):
    """adapted at no level and at scale 0 is the student; at all levels it is the student with the control."""
    names = ["adapted(1)", "adapted(0)", "adapted(1,99)", "adapted(1,5)"]
    words = [
        *("students=[dmd]", f"plans={names}", "control=controls/tiny/smile.safetensors", "seeds=3"),
        *("prompts=[portrait of a person]", "evaluators=[clip]", "captions=0", "wandb=disabled"),
        *(f"out={tmp_path}", f"family={QUICK_CARD}"),
    ]
    page = diversity.main(merge(Config, words))
    results = json.loads((page.parent / "results.json").read_text())
    seen = {c["plan"]: c["diversity"]["clip"][-1]["value"] for c in results["cells"]}
    assert seen["student"] == seen["adapted(0)"] == pytest.approx(seen["adapted(1,99)"], rel=1e-6)
    assert len({round(seen[plan], 6) for plan in ("student", "adapted(1)", "adapted(1,5)")}) == 3


def test_the_plan_says_the_smallest_change_that_it_sees(capsys):
    diversity.main(merge(Config, [*SMALL, "prompts=[]", "dry_run=true"]))
    said = re.findall(
        r"(\d+) prompts x 3 seeds: sees a change of (\d+) % of the base", capsys.readouterr().out
    )
    (first, one), (second, two) = said
    assert (first, second) == ("24", "48") and int(one) > int(two) > 5


def test_every_logged_key_is_documented(run, results):
    keys = Keys()
    diversity.track(results, run, keys)
    assert not undocumented(keys.logged, "diversity")


def test_page(run, results):
    page = (run / "report.html").read_text()
    assert (
        page.count("<svg") >= 6
        and "hybrid(1)" in page
        and "By prompt" in page
        and page.count("data:image/png") == 2
    )
    assert not re.search(r'(src|href)="(?!data:|#)', page) and "$" not in page.split("</style>")[0]
    assert report.build(run) == run / "report.html" and (run / "report.html").read_text() == page


def test_the_front_holds_what_nothing_dominates():
    def make(plan, d, a, e):
        return {
            "student": "s",
            "plan": plan,
            "diversity": {"clip": [{"value": d}]},
            "agreement": {"value": a},
            "nfe": e,
        }

    cells = [make("dear", 3, 3, 9), make("cheap", 2, 3, 4), make("worse", 2, 2, 4), make("varied", 4, 1, 9)]
    assert diversity_page.fronts(cells, "base") == {"s": ["dear", "cheap", "varied"]}


def test_without_a_loss_there_is_no_recovery():
    student = 1 + 0.1 * np.random.default_rng(0).normal(size=12)
    for base in (student, student - 0.3):  # nothing was lost; the student is the more diverse
        assert variety.part(student, student, base, student)["value"] is None


def test_what_is_kept_of_the_captions_does_not_grow_with_them():
    """Blocks of 16 go one by one into 8 tallies; after 80 blocks these hold what they held after 16."""
    family = Family("tiny", dtype=torch.float32)
    evaluators = load_evaluators(family.card, names=["clip", "probe"])
    judge = quality.Judge(evaluators, PROMPTS, lambda: iter(torch.rand(2, 8, 3, 64, 64)), 2)
    random, sizes, tallies = np.random.default_rng(0), [], [judge.tally() for _ in range(8)]
    for b in range(80):
        judge.add(
            tallies[b % 8],
            {
                "clip": random.random((16, 64)),
                "words": random.random((16, 64)),
                "probe": random.random((16, 28)),
            },
        )
        sizes.append(len(pickle.dumps(tallies)))
    assert sizes[79] <= sizes[15] + 500
    found = judge.jackknife(tallies)
    assert (
        found["precision_clip"]["value"] == 0
        and found["frechet_probe"]["low"] < found["frechet_probe"]["value"]
    )


def test_pictures_of_a_folder(tmp_path):
    for k in range(7):
        Image.new("RGB", (90, 70), (k, 0, 0)).save(tmp_path / f"{k}.png")
    (tmp_path / "0.txt").write_text("a red wall\n")
    told, real = quality.against(card("tiny"), str(tmp_path), [], ["unused"], 3, 5)
    assert told.texts == ["a red wall"] * 3
    (batch,) = real()
    assert batch.shape == (7, 3, 64, 64) and batch[6, 0, 0, 0] == pytest.approx(6 / 127.5 - 1)
    (tmp_path / "0.png").write_text("no picture")
    with pytest.raises(UserError, match="0.png"):
        list(real())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["sedes=3"], "seeds"),
        (["seeds=2"], "at least 3"),
        (["students=[hyper]"], "lightning"),
        (["students=[sdxl/turbo]"], "sdxl/turbo"),
        (["students=[base]"], "base itself"),
        (["plans=[hybrid(5)]"], "0 … 4"),
        (["plans=[magic(1)]"], "hybrid(k[,guidance][,eta])"),
        (["plans=[adapted(1)]"], "control=FILE"),
        (["control=controls/tiny/smile.safetensors"], "adapted(scale)"),
        (["reference={}"], "holds no pictures"),
        (["captions=9"], "captions"),
        (["neighbours=0"], "neighbours"),
        (["dtype=fp8"], "bf16"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, says, tmp_path):
    (tmp_path / "empty").mkdir()
    words = [*(word.format(tmp_path / "empty") for word in words), f"out={tmp_path}", "wandb=disabled"]
    refused(configured(diversity, words), says)
    assert not (tmp_path / "default").exists()


def test_a_page_of_nothing(tmp_path):
    refused(launched("analysis.report", tmp_path), "results.json")


@pytest.mark.parametrize("module", ["diversity", "trace", "similarity", "transfer"])
def test_the_pages_load_no_torch(module):
    code = f"import sys, analysis.pages.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
