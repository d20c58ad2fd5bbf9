"""Traces, small, on the embedded family: numbers that must hold, pictures, the page and its scrubber,
mistakes.
"""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from support.commands import configured, refused
from support.short_runs import QUICK
from support.synthetic import Keys, undocumented

from analysis import report, trace
from analysis.images import sheets
from analysis.images.cache import acting
from analysis.measures.commitment import abandoned, committed
from analysis.session import Session
from analysis.trace import Config, band, traces_of
from configs import ROOT, merge
from controls import formats, picture_grid
from models.families import Family
from models.hashing import fingerprint
from models.noise import vp
from models.plans import named
from models.sampler import draw_noise, finish

SMALL = [
    "prompts=[portrait of a person,'portrait of a person, hat']",
    "seeds=2",
    "students=[dmd]",
    "shown=1",
    "wandb=disabled",
    "plans=[hybrid(1)]",
    "bands=[500]",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("trace")
    trace.main(merge(Config, [*SMALL, f"out={out}", "threshold=0.3"]))
    return out / "default"


@pytest.fixture(scope="module")
def results(run):
    return json.loads((run / "results.json").read_text())


def test_record(run, results):
    assert results["schema"] == 3
    assert [(c["student"], c["plan"]) for c in results["cells"]] == [
        ("base", "base"),
        ("dmd", "student"),
        ("dmd", "hybrid(1)"),
    ]
    for c in results["cells"]:
        for name in ("clip", "probe"):
            assert len(c["distance"][name]) == len(c["steps"]) == len(c["control"][name]["effect"])
            assert c["distance"][name][-1] == pytest.approx({"value": 0, "low": 0, "high": 0}, abs=1e-6)
            assert 0 < c["commitment"][name]["share"]["value"] <= 1
            assert 0 <= c["commitment"][name]["left"]["value"] <= 1
        assert c["abandoned"]["evaluator"] == "probe" and 0 <= c["abandoned"]["falls"]["value"] <= 1
        assert len(c["control"]["probe"]["parts"]) == (2 if c["plan"] != "hybrid(1)" else 0)


def test_a_hybrid_begins_as_the_base_without_guidance(results):
    """Neither as the guided base nor as the student, though all three are told the same at the same level."""
    base, student, hybrid = results["cells"]
    first = [c["control"]["probe"]["effect"][0]["value"] for c in (base, student, hybrid)]
    assert min(abs(first[2] - first[0]), abs(first[2] - first[1])) > 1e-4
    assert base["steps"][0]["t"] == hybrid["steps"][0]["t"] == 999


def test_a_control_acts_only_between_the_levels_that_are_named(tmp_path):
    """At none of them: nothing moves. At the early ones alone: less than at all."""
    found = {}
    for name, words in {"all": [], "none": ["above=99"], "early": ["above=2"]}.items():
        words = [*words, "prompts=[portrait of a person]", "students=[dmd]", "plans=[]", "seeds=2"]
        words += [
            "bands=[500]",
            "evaluators=[probe]",
            "wandb=disabled",
            f"out={tmp_path}",
            f"name={name}",
            QUICK,
        ]
        page = trace.main(merge(Config, words))
        cell = json.loads((page.parent / "results.json").read_text())["cells"][1]
        found[name] = cell["control"]["probe"]["effect"][-1]["value"]
    assert found["none"] == 0 and found["early"] not in (0, found["all"])


def test_pictures(run, results):
    sheet = Image.open(run / "images/sheet-0.png")
    assert sheet.size == (picture_grid.LEFT_PX + 10 * 64, picture_grid.TOP_PX + 6 * 64)
    film = Image.open(run / "images/sprite-1-0.webp")
    assert film.size == (4 * 64, 2 * 64)
    moving = Image.open(run / "images/trace.gif")
    assert moving.n_frames == 10 and moving.size == (3 * 64, 64)
    for c in results["cells"]:
        assert bool(c["abandoned"]["examples"]) == ("picture" in c["abandoned"])


def test_every_logged_key_is_documented(run, results):
    keys = Keys()
    trace.track(results, run, keys)
    assert not undocumented(keys.logged, "trace")


def test_page(run, results):
    page = (run / "report.html").read_text()
    assert page.count('class="film') == 3 and '<input id="share" type="range"' in page and "smile" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    levels = [json.loads(text) for text in re.findall(r'data-levels="(\[[^"]+\])"', page)]
    assert [len(found) for found in levels] == [10, 4, 4] and levels[1] == [999, 749, 499, 249]
    assert report.build(run) == run / "report.html" and (run / "report.html").read_text() == page


def test_a_continued_run_gives_the_same_numbers(run, results):
    (run / "features-2/dmd/student/on.safetensors").unlink()
    whole = run / "features-2/base/base/off.safetensors"
    whole.write_bytes(whole.read_bytes()[:-8] + bytes(8))  # numbers that are not those that were found
    trace.main(merge(Config, [*SMALL, f"out={run.parent}", "threshold=0.3"]))
    assert json.loads((run / "results.json").read_text())["cells"] == results["cells"]


def test_a_control_on_all_bands_is_the_control_and_the_networks_come_back_bare():
    family, control = Family("tiny", dtype=torch.float32), formats.load("controls/tiny/smile.safetensors")
    base, student = family.member("base"), family.member("dmd")
    before = [fingerprint(m.denoiser.net) for m in (base, student)]
    plan, noise, told = (
        named("hybrid(1)", base, student),
        draw_noise([1], family.latent_shape, 4),
        family.encode(["portrait of a person"]),
    )
    plain = finish(plan, noise, told)
    found = []
    for holds in (None, lambda level: True, lambda level: False):
        with acting(plan, control, 1.0, "tiny", holds) as controlled:
            found.append(finish(controlled, noise, told))
    always, whole, nowhere = found
    assert (
        torch.equal(always, whole)
        and torch.allclose(nowhere, plain, atol=1e-5)
        and not torch.allclose(whole, plain, atol=1e-2)
    )
    assert [fingerprint(m.denoiser.net) for m in (base, student)] == before


def test_bands_cut_every_member_s_run_alike():
    cfg = Config()
    assert (
        [band(cfg, vp(t)) for t in (999, 749, 499, 249)]
        == [band(cfg, vp(t)) for t in (999, 759, 499, 259)]
        == [0, 1, 2, 3]
    )
    parts = [trace.bands for trace in traces_of(cfg, [("dmd", "student")], True)]
    assert parts == [(), None, (0,), (1,), (2,), (3,), (0, 1), (0, 1, 2), (1, 2, 3), (2, 3)]
    assert [trace.bands for trace in traces_of(cfg, [("dmd", "student")], False)] == [()]


@pytest.mark.parametrize(
    ("steps", "share", "t", "left"),
    [
        ([8.0, 4.0, 2.0, 0.0], 0.75, 499, 0),
        ([8.0, 2.0, 4.0, 0.0], 1.0, 249, 1),  # within the tolerance once, and out again
        ([2.0, 4.0, 2.0, 0.0], 0.75, 499, 1),
        ([2.0, 2.5, 1.0, 0.0], 0.25, 999, 0),
    ],
)
def test_commitment_is_the_step_from_which_x0_stays_within_the_tolerance(steps, share, t, left):
    """Features at known distances from the last one, in prompts (P = 2) alike; the unit is 10."""
    features, levels = np.reshape(steps, (1, 1, 4, 1)).repeat(2, 0), np.array([999.0, 749, 499, 249])
    measured = committed(Config(tolerance=0.25), {"probe": features, "t": levels}, {"probe": 10.0})
    assert [p["value"] for p in measured["distance"]["probe"]] == pytest.approx([x / 10 for x in steps])
    values = {"share": share, "t": t, "left": left}
    assert measured["commitment"]["probe"] == {
        key: dict.fromkeys(("value", "low", "high"), value) for key, value in values.items()
    }


def test_images_that_leave_the_tolerance_are_counted():
    """One of two images of each prompt comes near, leaves and comes back."""
    steps = np.array([[8.0, 2.0, 4.0, 0.0], [8.0, 2.0, 1.0, 0.0]])
    features = np.tile(steps[None, ..., None], (2, 1, 1, 1))  # (P, S, T, 1)
    own = {"probe": features, "t": np.array([999.0, 749, 499, 249])}
    found = committed(Config(tolerance=0.25), own, {"probe": 10.0})["commitment"]["probe"]
    assert found["left"]["value"] == 0.5 and found["share"]["value"] == pytest.approx((1.0 + 0.5) / 2)
    assert found["t"]["value"] == pytest.approx((249 + 749) / 2)


class Reader:
    """An evaluator whose one feature is the score."""

    def score(self, features, positive, negative):
        return features[..., 0]


def test_abandoned_content_rises_and_falls():
    scores = np.array([[[0, 1, 0.2], [1, 0.6, 0]], [[0, 0.4, 0], [0, 0.5, 1]]])  # (P, S, T)
    cfg = Config(prompts=["a", "b"], seeds=2, concepts=["hat: a hat | no hat"])
    found = abandoned(cfg, {"probe": scores[..., None]}, {"probe": Reader()}, {})
    assert (
        found["falls"]["value"] == 0.5 and found["rises_and_falls"]["value"] == 0.25 and found["count"] == 2
    )
    first, second = found["examples"]
    assert (first["image"], first["prompt"], first["rises_first"]) == (0, "a", True) and second["image"] == 1


def test_a_member_shows_what_it_has_reached():
    assert [sheets.reached(4, share) for share in (0, 0.24, 0.25, 0.5, 0.99, 1)] == [0, 0, 0, 1, 2, 3]
    assert [one is not None for one in trace.placed(torch.zeros(4, 3, 2, 2), 10)] == [
        c in (2, 4, 7, 9) for c in range(10)
    ]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["seeds=1"], "at least 2"),
        (["students=[hyper]"], "lightning"),
        (["plans=[only(9)]"], "1 … 4"),
        (["control=missing.safetensors"], "missing.safetensors"),
        (["control=controls/tiny/space-1.safetensors"], "positive="),
        (["concepts=[hat]"], "positive description"),
        (["bands=[100,500]"], "falling"),
        (["control=controls/tiny/smile.safetensors", "family=sdxl-of-nobody"], "tiny"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, says, tmp_path):
    refused(configured(trace, [*words, f"out={tmp_path}", "wandb=disabled"]), says)
    assert not (tmp_path / "default").exists()


def test_a_control_fits_the_family_of_a_card_by_its_name(tmp_path):
    """A family is given as the path of its card, and a control names it as that card does."""
    card = tmp_path / "mine.yaml"
    card.write_text((ROOT / "configs/families/tiny.yaml").read_text())
    words = [f"family={card}", "control=controls/tiny/smile.safetensors", f"out={tmp_path}", "wandb=disabled"]
    session = Session("analysis.trace", merge(Config, words), trace.FREE)
    trace.check_fit(session, formats.load(session.cfg.control))
