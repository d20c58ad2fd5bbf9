"""The command, small, on the embedded family: its record, its page, its continuation, its mistakes."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from support.commands import configured, refused
from support.synthetic import Keys, undocumented

from analysis import similarity
from analysis.images import activations
from analysis.images.activations import Measure, Pair, Site, chunks, forced, nearest
from analysis.images.directions import concept
from analysis.measures import prediction
from analysis.pages import similarity as similarity_page
from configs import ROOT, merge
from controls import formats
from models import families
from models.families import Family
from models.sampler import Stage

CONTROLS = "controls=[controls/tiny/smile.safetensors,controls/tiny/crayon.safetensors]"
SMALL = [
    "prompts=[portrait of a person,'portrait of a person, hat']",
    "seeds=3",
    "targets=[dmd]",
    "blocks=blocks",
    "neighbours=2",
    "draws=10",
    "stitch_seeds=1",
    "wandb=disabled",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("similarity")
    kept = (("smile", "dmd", 0.9), ("smile", "lcm", 1.0), ("crayon", "dmd", 0.1), ("crayon", "lcm", None))
    retained = [
        {
            "control": c,
            "source": "tiny/base",
            "target": f"tiny/{t}",
            "readings": {"clip": {"retention": {"value": v}}},
        }
        for c, t, v in kept
    ]
    (out / "transfer").mkdir()
    (out / "transfer/results.json").write_text(json.dumps({"schema": 3, "cells": retained}))
    similarity.main(merge(similarity.Config, [*SMALL, CONTROLS, f"out={out}", f"transfer={out}/transfer"]))
    return out / "default"


def cells(folder) -> list[dict]:
    results = json.loads((folder / "results.json").read_text())
    assert results["schema"] == 3 and results["command"]
    return results["cells"]


def test_the_record(run):
    found = cells(run)
    blocks = similarity_page.of(found, "block")
    assert len(blocks) == 7 * 4 * 2 and {c["samples"] for c in blocks} == {6}
    assert {c["t"] for c in blocks} == {999, 749, 499, 249} and {c["inputs"] for c in blocks} == {
        "forced",
        "own",
    }
    assert all(c["t"] == c["t_first"] for c in blocks if c["inputs"] == "forced")
    assert all(
        0 < abs(c["t"] - c["t_first"]) <= 50 or c["t"] in (999, 499) for c in blocks if c["inputs"] == "own"
    )  # base: 999, 899 …
    assert all(0 <= c["neighbours"] <= 1 and c["seed_variance"]["value"] > 0 for c in blocks)
    # streamed over batches, and by Gram matrices of all that was kept
    cross = {c["step"]: c for c in similarity_page.of(found, "cross")}
    for c in similarity_page.of(blocks, "block", inputs="forced"):
        place = cross[c["step"]]["blocks"].index(c["block"])
        assert c["cka"]["value"] == pytest.approx(cross[c["step"]]["cka"][place][place], abs=1e-4)
    assert len(cross) == 4 and len(similarity_page.of(found, "weights")) == 7
    ways = similarity_page.of(found, "stitch")
    assert [(c["down"], c["up"]) for c in ways] == [
        ("base", "base"),
        ("dmd", "dmd"),
        ("base", "dmd"),
        ("dmd", "base"),
    ]
    assert ways[0]["to_up"]["clip"]["value"] == 0 and ways[2]["to_up"]["clip"]["value"] > 0
    directions = similarity_page.of(found, "direction")
    assert len(directions) == 2 * 5 and all(len(c["cosine"]) == 4 for c in directions)
    assert all(-1 <= i["value"] <= 1 for c in directions for i in c["cosine"])
    (pair,) = similarity_page.of(found, "overlap")
    assert (
        pair["layers"] == 0 and pair["cosine"] == 0 and not pair["same"]
    )  # smile leaves cross-attention to crayon
    kept = similarity_page.of(found, "point")
    assert [point["concept"] for point in kept[:2]] == [
        "portrait of a person, frowning | portrait of a person, smiling"
    ] * 2
    assert len(kept) == 3 and kept[2]["concept"] == "crayon portrait of a person | portrait of a person"
    (together,) = similarity_page.of(found, "prediction")
    assert together["concepts"] == ["smile", "crayon"] and together["points"] == 3
    assert together["p_family_wise"] is None and together["permuted"] == 0  # their targets differ
    assert {c["points"] for c in similarity_page.of(found, "predictor")} == {3}
    assert all(
        c["spearman"]["value"] is None for c in similarity_page.of(found, "predictor")
    )  # two controls say nothing


def test_every_logged_key_is_documented(run):
    keys = Keys()
    similarity.track({"cells": cells(run)}, run, keys)
    assert not undocumented(keys.logged, "similarity")


def test_the_page_is_whole_and_needs_nothing_else(run):
    page = (run / "report.html").read_text()
    assert "tiny/base and dmd" in page and "too few controls" in page and page.count("<svg") >= 8
    assert "data:image/png;base64," in page and not re.search(r'(src|href)="(?!data:|#)', page)
    assert "$" not in re.sub(r"<pre>.*?</pre>", "", page)
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page


def test_the_page_loads_no_torch():
    code = "import sys, analysis.pages.similarity; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_killed_run_goes_on(run):
    before = cells(run)
    (run / "cells/compare/dmd.safetensors").unlink()
    next((run / "trajectories/base").iterdir()).unlink()
    similarity.main(
        merge(similarity.Config, [*SMALL, CONTROLS, f"out={run.parent}", f"transfer={run.parent}/transfer"])
    )
    assert cells(run) == before


@pytest.mark.slow
def test_a_smaller_batch_changes_nothing(run, tmp_path):
    before = cells(run)
    similarity.main(
        merge(similarity.Config, [*SMALL, "controls=[]", "stitch_seeds=0", "batch_size=2", f"out={tmp_path}"])
    )
    after = similarity_page.of(cells(tmp_path / "default"), "block")
    for ours, theirs in zip(similarity_page.of(before, "block"), after, strict=True):
        assert ours["cka"]["value"] == pytest.approx(theirs["cka"]["value"], abs=1e-3)
        assert ours["seed_variance"]["value"] == pytest.approx(theirs["seed_variance"]["value"], rel=1e-3)


@pytest.mark.parametrize("scale", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_control_at_scale_0_changes_nothing_and_at_1_something(scale, tmp_path):
    words = [
        *SMALL,
        "control=controls/tiny/smile.safetensors",
        "targets=[dmd]",
        f"out={tmp_path}",
        f"scale={scale}",
    ]
    similarity.main(merge(similarity.Config, words))
    blocks = similarity_page.of(cells(tmp_path / "default"), "block")
    same = [
        c["cka"]["value"] == pytest.approx(1, abs=1e-9)
        and c["seed_variance"]["value"] == pytest.approx(1, abs=1e-9)
        for c in blocks
    ]
    assert all(same) if scale == 0 else not any(same[len(same) // 2 :])
    assert {c["comparison"] for c in blocks} == {f"dmd with smile@{scale}"}
    assert f"dmd with smile@{scale}" in (tmp_path / "default/report.html").read_text()


@pytest.mark.slow
def test_the_encoders_go_before_the_first_network_comes_and_networks_after_their_last_job(
    tmp_path, monkeypatch
):
    """Each is loaded once; dmd is gone when lcm is compared."""
    seen, loaded = [], []
    network, compare = families.network, similarity.compare

    def counted(card, name, *args):
        loaded.append(name)
        return network(card, name, *args)

    def compared(family, pair, *args):
        found = compare(family, pair, *args)
        seen.append((pair.second, family.members, bool(family.encoders())))
        return found

    monkeypatch.setattr(families, "network", counted)
    monkeypatch.setattr(similarity, "compare", compared)
    words = [*SMALL, "controls=[]", "stitch_seeds=0", "targets=[dmd,lcm]", f"out={tmp_path}"]
    similarity.main(merge(similarity.Config, words))
    assert loaded == ["base", "dmd", "lcm"]
    assert seen == [("dmd", ["base", "dmd"], False), ("lcm", ["base", "lcm"], False)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seeds=48", "controls=[]"], "48 at once.*sums over activations.*base.*dmd"),
        (
            ["seeds=48", "controls=[]", "blocks=blocks", "stitch_seeds=9", "prompts=[a,b]"],
            "48 at once.*base.*dmd",
        ),
        (
            [CONTROLS, "stitch_seeds=0", "blocks=blocks", "seeds=6"],
            "base.*dmd.*lcm.*lightning.*weights with the control",
        ),
    ],
)
def test_the_plan_says_its_fullest_moment(words, said, tmp_path, capsys, monkeypatch):
    if CONTROLS in words:  # only what the controls' jobs hold
        monkeypatch.setattr(similarity, "sums", lambda *_: 0.0)
    words = ["targets=[dmd]", "dry_run=true", f"out={tmp_path}", f"transfer={tmp_path}", *words]
    similarity.main(merge(similarity.Config, words))
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("memory at the most: ") and re.search(said, line) and not list(tmp_path.iterdir())


def test_sums_over_activations_are_those_that_are_kept():
    family, measure = Family("tiny"), Measure("blocks", 1, 4, 2, 3, 10, 0)
    pair, todo = Pair("base", "dmd"), chunks(["a face"], [1, 2, 3, 4], 4)
    sites = []
    found = {}

    class Counted(Site):
        def __init__(self, measure):
            super().__init__(measure)
            sites.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations, "Site", Counted)
        patch.setattr(activations, "cross", lambda *_: [])
        patch.setattr(Counted, "numbers", lambda _: {})
        walk = activations.walk(family, "base", todo[0])
        activations.compare(family, pair, todo, measure, lambda _: walk, True)
    for site in sites:
        for moments in (site.alignment.both, site.alignment.first, site.alignment.second):
            for sums in (moments.c, moments.u, moments.v, moments.q):
                found[id(sums)] = sums.nbytes
    assert activations.sums(Family("tiny", bare=True), "dmd", measure) == sum(found.values())


def test_forced_inputs_are_one_picture_under_one_noise_in_every_law():
    family = Family("tiny")
    base, student = family.member("base"), family.member("dmd")
    x0, eps = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16)
    for (here, a), (there, b) in zip(
        forced(base, x0, eps, student.levels), forced(student, x0, eps, student.levels), strict=True
    ):
        assert torch.equal(a, b) and here.t == pytest.approx(there.t)
    levels = Stage.of(base, student.levels).levels
    assert [levels.index(level) for level in levels] == nearest(levels, student.levels)
    assert nearest(base.levels, student.levels)[0] == 0


def test_chunks_cover_every_image_once_with_its_own_seed():
    found = chunks(["a", "b"], range(100, 110), 2)
    assert [seed for chunk in found for seed in chunk.seeds] == list(range(100, 110))
    assert len({chunk.file for chunk in found}) == 6 and all(len(chunk.seeds) <= 2 for chunk in found)
    assert Pair("base", "dmd").file == "dmd"


def test_points_join_two_records_and_leave_out_what_is_undefined(run):
    transfer = json.loads((run.parent / "transfer/results.json").read_text())["cells"]
    rows = prediction.points(cells(run), transfer, {"smile": "mood", "crayon": "style"})["clip"]
    assert [(r["control"], r["concept"], r["target"], r["retention"]) for r in rows] == [
        ("smile", "mood", "tiny/dmd", 0.9),
        ("smile", "mood", "tiny/lcm", 1.0),
        ("crayon", "style", "tiny/dmd", 0.1),
    ]
    assert all(set(prediction.PREDICTORS) <= row.keys() for row in rows)


def test_controls_of_one_concept_are_those_of_the_same_words_and_the_directions_of_one_prompt():
    names = ("smile", "smile-dmd", "eyes", "eyes-image", "age", "space-1", "space-8", "crayon")
    cards = [formats.load(f"controls/tiny/{name}.safetensors").card for name in names]
    kinds = [concept(card) for card in cards]
    assert kinds[0] == kinds[1] and kinds[2] == kinds[3] and kinds[5] == kinds[6] and len(set(kinds)) == 5
    around = {**cards[0].recipe, **dict(zip(("positive", "negative"), ("frown", "smile"), strict=True))}
    back = {**around, "positive": "smile", "negative": "frown"}
    assert concept(replace(cards[0], recipe=around)) == concept(replace(cards[0], recipe=back))
    assert concept(replace(cards[0], recipe={})) == "smile"


@pytest.mark.parametrize(
    ("p", "r2", "student", "claimed"),
    [
        (0.04, 0.3, 0.1, True),
        (0.05, 0.3, 0.1, False),
        (0.04, 0.1, 0.1, False),  # no better than which student it is
        (0.04, -0.1, -0.2, False),  # worse than the mean
        (0.04, 0.1, -0.2, True),
        (0.04, None, None, False),  # fewer than four concepts
        (None, None, None, False),
    ],
)
def test_only_what_is_not_chance_and_beats_the_baseline_is_said_to_foretell(p, r2, student, claimed):
    known = {"evaluator": "clip", "points": 51, "controls": 17, "concepts": ["age"], "p_family_wise": p}
    known["r2_without_one"] = {"value": None, "without": None}
    value = {"value": 0.6, "low": 0.4, "high": 0.7}
    number = {"predictor": "gain", "spearman": value, "pearson": value, "r2_cross_validated": r2}
    number |= {"r2_which_student": student, "without_one": {"low": 0.1, "high": 0.5, "most": "age"}}
    found = [
        {"what": "prediction", **known, "r2_cross_validated": student},
        {"what": "predictor", **known, **number},
    ]
    assert similarity_page.foretells(found[1]) == claimed
    (sentence,) = similarity_page.predictor_sentences(found)
    begins = "What foretells retention by clip" if claimed else "Nothing foretells retention by clip"
    assert sentence.startswith(begins if p else "By clip too few controls")
    assert p is None or f"p {p:.3f}" in sentence and "which student it is, alone, has R²" in sentence
    rows = similarity_page.predictors(found)
    assert [row[0] for row in rows] == ["gain", "which student"] and len(rows[0]) == len(rows[1])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["sedes=3"], "seeds"),
        (["seeds=1"], "seeds must be at least 2"),
        (["family=nowhere"], "tiny"),
        (["targets=[sdxl/turbo]"], "lightning"),
        (["source=hyper"], "lightning"),
        (["targets=[base]"], "against itself"),
        (["neighbours=9", "prompts=[a,b,c]", "seeds=3"], "below the 9 samples"),
        (["prompts=[a]", "seeds=3", "neighbours=1"], "at least 4 samples"),
        (["blocks=layers"], "blocks, parts"),
        (["grid=3"], "multiple of grid"),
        (["stitch_seeds=99"], "stitch_seeds"),
        (["controls=[missing.safetensors]"], "missing.safetensors"),
        (["control=missing.safetensors"], "missing.safetensors"),
        (["controls=[controls/tiny/smile.safetensors,controls/tiny/smile.safetensors]"], "different names"),
        (["transfer={}/broken"], "not the record"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, says, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/results.json").write_text("[]")
    words = [*(word.format(tmp_path) for word in words), f"out={tmp_path}/runs", "wandb=disabled"]
    refused(configured(similarity, words), says)
    assert not (tmp_path / "runs").exists()
