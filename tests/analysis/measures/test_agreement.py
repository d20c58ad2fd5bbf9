"""Cohen's κ against a table worked by hand, and where it is not defined."""

import numpy as np
import pytest

from analysis.measures import agreement
from analysis.pages import words
from controls.intervals import quantile

#                kept  weaker  unclear     by the second
TABLE = {  # first
    "kept": (20, 5, 0),
    "weaker": (10, 15, 0),
    "unclear": (0, 0, 10),
}


def judged(table: dict) -> tuple[list[str], list[str]]:
    """Two judges' words, as many of each pair as the table says."""
    found = [(a, b) for a, row in table.items() for b, n in zip(table, row, strict=True) for _ in range(n)]
    first, second = zip(*found, strict=True)
    return list(first), list(second)


def test_kappa_of_a_table_worked_by_hand():
    """45 of 60 agree; by chance (25 · 30 + 25 · 20 + 10 · 10) / 60² = 1350 / 3600 = .375 do."""
    assert agreement.kappa(*judged(TABLE)) == pytest.approx((0.75 - 0.375) / (1 - 0.375)) == 0.6


def test_kappa_is_one_zero_or_below():
    assert agreement.kappa(["kept", "dead"], ["kept", "dead"]) == 1
    assert agreement.kappa(["kept", "kept", "dead", "dead"], ["kept", "dead", "kept", "dead"]) == 0
    assert agreement.kappa(["kept", "dead"], ["dead", "kept"]) == -1
    a, b = judged(TABLE)
    assert agreement.kappa(a, b) == agreement.kappa(b, a)


@pytest.mark.parametrize("words_", [[], ["kept"] * 5])
def test_kappa_of_no_cells_or_one_word_is_not_defined(words_):
    assert agreement.kappa(words_, words_) is None
    assert agreement.kappa(words_, ["kept", "dead", "weaker", "kept", "kept"][: len(words_)]) is None
    assert agreement.interval(words_, words_, ["smile"] * len(words_)) == {
        "value": None,
        "low": None,
        "high": None,
    }


def test_the_interval_is_a_jackknife_over_controls():
    """Four controls of two cells each; without one of them κ is, by hand, 2/3 three times, and 1."""
    first = ["kept", "dead", "kept", "dead", "kept", "dead", "kept", "dead"]
    second = ["kept", "dead", "kept", "dead", "kept", "dead", "dead", "dead"]
    controls = ["smile", "smile", "age", "age", "eyes", "eyes", "crayon", "crayon"]
    found = agreement.interval(first, second, controls)
    assert found["value"] == 0.75
    without = np.array([2 / 3, 2 / 3, 2 / 3, 1.0])
    error = np.sqrt(3 / 4 * ((without - without.mean()) ** 2).sum())
    assert found["low"] == pytest.approx(0.75 - quantile(0.95, 3) * error)
    assert found["high"] == min(1.0, 0.75 + quantile(0.95, 3) * error)
    once = agreement.interval(first, second, ["smile"] * 8)
    assert once == {"value": 0.75, "low": None, "high": None}, "one control has no interval"


def test_an_entry_per_pair_of_evaluators():
    verdicts = {"clip": ["kept", "dead"], "probe": ["kept", "kept"], "geometry": ["dead", "kept"]}
    found = agreement.pairs(verdicts, ["smile", "age"])
    assert [(e["first"], e["second"], e["same"]) for e in found] == [
        ("clip", "probe", 0.5),
        ("clip", "geometry", 0.0),
        ("probe", "geometry", 0.5),
    ]
    assert {(e["cells"], e["controls"]) for e in found} == {(2, 2)}
    assert agreement.pairs({"clip": []}, []) == []
    assert agreement.pairs({"clip": [], "probe": []}, [])[0]["same"] is None


def test_the_sentence_says_every_pair():
    entry = {"cells": 12, "controls": 4, "same": 0.75}
    sure = {**entry, "first": "clip", "second": "probe", "kappa": {"value": 0.6, "low": 0.31, "high": 0.89}}
    none = {**entry, "first": "clip", "second": "dino", "kappa": {"value": None, "low": None, "high": None}}
    wide = {**entry, "first": "dino", "second": "probe", "kappa": {"value": 0.6, "low": -0.4, "high": 1.0}}
    assert words.agreement([sure, none, wide]) == (
        "The evaluators give the same verdict: clip and probe in 75 % of 12 cells, κ 0.60 [0.31, 0.89]; "
        "clip and dino in 75 % of 12 cells, κ not defined; "
        "dino and probe in 75 % of 12 cells, too few for κ."
    )
    assert words.agreement([]) == ""
    assert words.agreement([{**none, "cells": 0, "same": None}]) == ""
