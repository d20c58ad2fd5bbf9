"""Similarity of representations: numbers against brute force, a published package, closed forms and
symmetries.
"""

import pickle

import numpy as np
import pytest
import torch
from ignite.metrics import HSIC
from scipy import stats

from analysis.images.activations import Chunk, Measure, Site
from analysis.measures import cka, prediction
from analysis.measures.cka import Alignment, Spread


def data(n: int, p: int, q: int, seed: int = 0, offset: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Related rows with a common offset, unequal channels, and a channel that never moves."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, p)) * rng.uniform(0.1, 5, p) + offset
    y = x @ rng.normal(size=(p, q)) + rng.normal(size=(n, q)) * 4 - offset
    y[:, 0] = 7.0
    return x, y


def brute_hsic(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """Song et al. 2012, eq. 5, by explicit sums over different indices."""
    n, ones = len(k), np.ones(len(k))
    k, l = k * (1 - np.eye(n)), l * (1 - np.eye(n))  # noqa: E741
    first = np.trace(k @ l)
    second = (ones @ k @ ones) * (ones @ l @ ones) / ((n - 1) * (n - 2))
    third = 2 / (n - 2) * (ones @ k @ l @ ones)
    return (first + second - third) / (n * (n - 3))


def brute(x: np.ndarray, y: np.ndarray) -> float:
    k, l = x @ x.T, y @ y.T  # noqa: E741
    return brute_hsic(k, l) / np.sqrt(brute_hsic(k, k) * brute_hsic(l, l))


def streamed(x: np.ndarray, y: np.ndarray, batch: int = 13) -> Alignment:
    found = Alignment()
    for start in range(0, len(x), batch):
        found.add(x[start : start + batch], y[start : start + batch])
    return found


@pytest.mark.parametrize(("n", "p", "q"), [(4, 3, 2), (50, 7, 5), (64, 200, 30), (300, 20, 40)])
def test_streaming_cka_is_the_brute_force_one(n, p, q):
    x, y = data(n, p, q)
    assert streamed(x, y).cka() == pytest.approx(brute(x, y), abs=1e-8)
    assert cka.cka(cka.gram(x), cka.gram(y)) == pytest.approx(brute(x, y), abs=1e-8)


def test_a_far_origin_costs_no_digits():
    x, y = data(80, 10, 6)
    assert streamed(x + 1e4, y - 1e4).cka() == pytest.approx(brute(x, y), abs=1e-8)


def test_hsic_is_that_of_a_published_package():
    x, y = (torch.tensor(side[:, 1:] / 5) for side in data(40, 6, 5))
    metric = HSIC(sigma_x=1.0, sigma_y=2.0)
    metric.update((x, y))
    k, m = (torch.exp(-(torch.cdist(s, s) ** 2) / (2 * w**2)).numpy() for s, w in ((x, 1.0), (y, 2.0)))
    assert cka.hsic(k, m) == pytest.approx(metric.compute(), abs=1e-8)


def test_standardised_is_cka_of_channels_at_unit_variance():
    x, y = data(60, 9, 12)
    scaled = [(side - side.mean(0)) / np.where(side.std(0) < 1e-9, np.inf, side.std(0)) for side in (x, y)]
    found = streamed(x, y)
    assert found.standardised() == pytest.approx(brute(*scaled), abs=1e-8)
    assert abs(found.standardised() - found.cka()) > 0.01
    loud = x * np.linspace(1, 100, 9)
    assert streamed(loud, y).standardised() == pytest.approx(found.standardised(), abs=1e-8)


def test_independent_data_have_none_and_a_rotated_copy_has_all():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(64, 1280))
    values = [cka.cka(cka.gram(x), cka.gram(rng.normal(size=(64, 1280)))) for _ in range(20)]
    assert abs(np.mean(values)) < 0.02 and max(map(abs, values)) < 0.1
    small = x[:, :80]
    turned = 3.7 * small @ np.linalg.qr(rng.normal(size=(80, 80)))[0] + 5
    found = streamed(small, turned)
    assert found.cka() == pytest.approx(1, abs=1e-10) and found.procrustes() == pytest.approx(1, abs=1e-10)
    assert cka.neighbours(small, turned, 5) == 1


def test_what_never_moves_is_none():
    found = streamed(np.ones((8, 3)), np.random.default_rng(0).normal(size=(8, 2)))
    assert found.cka() is None and found.procrustes() is None
    with pytest.raises(ValueError, match="4 samples"):
        streamed(*data(3, 2, 2)).cka()


def test_memory_does_not_grow_with_the_samples():
    def state(n: int) -> int:
        x, y = data(n, 48, 48)
        spread = Spread()
        found = streamed(x, y, 50)
        for i in range(0, n, 50):
            spread.add(x[i : i + 50], 0)
        return len(pickle.dumps((found, spread)))

    assert state(10000) <= state(500) + 64  # the counts themselves


def test_a_site_keeps_no_more_than_it_was_told_to():
    measure = Measure(kind="parts", grid=1, spread_grid=2, neighbours=2, kept=6, draws=5, seed=0)
    rng, sizes = torch.Generator().manual_seed(0), []
    for images in (10, 400):
        site = Site(measure)
        for start in range(0, images, 5):
            maps = torch.randn(2, 5, 8, 2, 2, generator=rng)
            site.add((maps[0], maps[1]), Chunk(0, "a", start, tuple(range(start, start + 5))))
        sizes.append(len(pickle.dumps((site.alignment, site.spreads, np.concatenate(site.kept[0])))))
    assert len(np.concatenate(site.kept[0])) == 6 and site.n == 400 and sizes[1] <= sizes[0] + 64


def test_moments_of_a_stream_do_not_depend_on_the_batches():
    x, y = data(37, 5, 4)
    values = [streamed(x, y, batch).both.hsic() for batch in (1, 7, 37)]
    assert np.allclose(values, values[0], rtol=1e-10)


def test_procrustes_is_the_best_rotation_of_normalised_data():
    x, y = data(30, 6, 6)
    units = [(s - s.mean(0)) / np.linalg.norm(s - s.mean(0)) for s in (x, y)]
    u, _, vt = np.linalg.svd(units[1].T @ units[0])
    apart = np.linalg.norm(units[0] - units[1] @ (u @ vt)) ** 2
    for found in (streamed(x, y).procrustes(), cka.procrustes(x, y)):
        assert 2 - 2 * found == pytest.approx(apart, abs=1e-10)
    wide_x, wide_y = data(12, 40, 50)
    assert cka.procrustes(wide_x, wide_y) == pytest.approx(streamed(wide_x, wide_y).procrustes(), abs=1e-10)


def test_mutual_neighbours_by_hand_and_by_chance():
    line = np.arange(5.0)[:, None]
    swapped = np.array([0.0, 1, 2, 30, 31])[:, None]
    assert cka.neighbours(line, swapped, 1) == pytest.approx(4 / 5)  # row 2: argmin 1 or 3 against 1
    rng = np.random.default_rng(2)
    found = np.mean(
        [cka.neighbours(rng.normal(size=(60, 8)), rng.normal(size=(60, 8)), 10) for _ in range(20)]
    )
    assert found == pytest.approx(10 / 59, abs=0.02)
    with pytest.raises(ValueError, match="k must be"):
        cka.neighbours(line, line, 5)


def test_spread_is_the_variance_over_each_prompts_seeds():
    x = np.random.default_rng(3).normal(size=(30, 4)) + 100
    found = Spread()
    for start in (0, 4, 10, 20, 25):
        stop = {0: 4, 4: 10, 10: 20, 20: 25, 25: 30}[start]
        found.add(x[start:stop], 0 if start < 10 else 1 if start < 20 else 2)
    expected = [part.var(0, ddof=1).sum() for part in (x[:10], x[10:20], x[20:])]
    within, between = found.finish()
    assert np.allclose(within, expected, rtol=1e-10)
    means = np.stack([part.mean(0) for part in (x[:10], x[10:20], x[20:])])
    assert between == pytest.approx(means.var(0, ddof=1).sum(), rel=1e-8)


def test_permutations_move_prompts_whole():
    prompts = np.repeat(np.arange(4), 3)
    for rows in cka.permutations(prompts, 10):
        assert sorted(rows) == list(range(12))
        assert (
            all(len(set(prompts[rows[prompts == p]])) == 1 for p in range(4))
            and (rows % 3 == np.arange(12) % 3).all()
        )


def test_the_null_tells_a_shared_prompt_from_chance():
    prompts, rng = np.repeat(np.arange(8), 6), np.random.default_rng(4)
    x = rng.normal(size=(8, 10))[prompts] + 0.3 * rng.normal(size=(48, 10))
    turned = x @ np.linalg.qr(rng.normal(size=(10, 10)))[0] + 0.3 * rng.normal(size=(48, 10))
    other = rng.normal(size=(8, 10))[prompts] + 0.3 * rng.normal(size=(48, 10))
    real = cka.null(cka.gram(x), cka.gram(turned), prompts)
    none = cka.null(cka.gram(x), cka.gram(other), prompts)
    assert real["p"] < 0.02 and real["high"] < cka.cka(cka.gram(x), cka.gram(turned))
    assert none["p"] > 0.05


def test_correlations_are_those_of_scipy():
    rng = np.random.default_rng(6)
    x, y = rng.integers(0, 6, 40).astype(float), rng.normal(size=40)
    assert prediction.spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-12)
    assert prediction.pearson(x, y) == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-12)


TARGETS = ("base", "dmd", "lcm", "lightning")
NAMES = tuple(f"number {k}" for k in range(10))


def rows_of(rng: np.random.Generator, true: float = 0.0, students: float = 1.0) -> list[dict]:
    """Points as the shipped controls make them: 14 controls of the base and one of each student, on the three
    other members. Predictors and retentions each go with the target and with the control, and with each
    other only by `true`, the weight of the first predictor; students: how much goes with the target.
    """
    sources = ["base"] * 14 + list(TARGETS[1:])
    loads = [students * rng.normal(size=(4, width)) for width in (len(NAMES), 1)]
    rows = []
    for k, source in enumerate(sources):
        own = [rng.normal(size=len(NAMES)), rng.normal(size=1)]
        for t, target in enumerate(TARGETS):
            x, (y,) = (
                load[t] + one + 0.5 * rng.normal(size=len(one)) for load, one in zip(loads, own, strict=True)
            )
            if target != source:
                about = {"control": f"c{k}", "source": source, "target": target, "concept": f"c{k}"}
                y += true * (x[0] - loads[0][t, 0])
                rows.append(about | {"retention": y} | dict(zip(NAMES, x, strict=True)))
    return rows


def test_whole_controls_change_places_with_those_of_their_source_and_targets():
    rows = rows_of(np.random.default_rng(10))
    del rows[1]  # c0 has no retention on lcm: no other control can stand for it
    orders = prediction.permuted(rows, 50)
    moved = set()
    for order in orders:
        assert sorted(order) == list(range(len(rows)))
        assert all(rows[at]["target"] == rows[to]["target"] for at, to in enumerate(order))
        givers = {}
        for at, to in enumerate(order):
            givers.setdefault(rows[at]["control"], set()).add(rows[to]["control"])
        assert all(len(names) == 1 for names in givers.values())  # a row of retentions stays whole
        moved |= {name for name, names in givers.items() if names != {name}}
    assert moved == {f"c{k}" for k in range(1, 14)}


def test_of_many_numbers_that_foretell_nothing_one_in_twenty_families_is_called_by_chance():
    """Although rows of one control are alike, and both sides go with the target."""
    rng, families = np.random.default_rng(11), 800
    lowest = []
    for k in range(families):
        p = prediction.family_wise(rows_of(rng), NAMES, draws=99, seed=k)
        lowest.append(min(p.values()))
    error = np.mean(np.array(lowest) <= 0.05)
    assert 0.035 <= error <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / families)  # two standard errors of this count


def test_a_number_that_goes_with_retention_is_called_among_nine_that_do_not():
    rng = np.random.default_rng(12)
    families = [prediction.family_wise(rows_of(rng, 2.0, students=0.5), NAMES, 99, k) for k in range(100)]
    others = [min(p[name] for name in NAMES[1:]) for p in families]
    assert np.mean([p[NAMES[0]] <= 0.05 for p in families]) >= 0.8
    assert np.mean(np.array(others) <= 0.05) <= 0.1


def test_family_wise_p_is_that_of_the_largest_correlation_in_every_permutation():
    rows, names = rows_of(np.random.default_rng(13), true=0.5), NAMES[:3]
    for row in rows[:4]:
        row[names[1]] = None  # a predictor without a value at some points
    y = np.array([row["retention"] for row in rows])
    known = {name: [k for k, row in enumerate(rows) if row[name] is not None] for name in names}

    def sizes(order: np.ndarray) -> list[float]:
        return [
            abs(stats.spearmanr([rows[k][name] for k in known[name]], y[order][known[name]])[0])
            for name in names
        ]

    ours = sizes(np.arange(len(rows)))
    largest = [max(ours), *(max(sizes(order)) for order in prediction.permuted(rows, 99, seed=5))]
    p = prediction.family_wise(rows, names, 99, seed=5)
    for name, size in zip(names, ours, strict=True):
        assert p[name] == pytest.approx(np.mean(np.array(largest) >= size - 1e-9))
    assert prediction.family_wise(rows[:9], names, 99) == dict.fromkeys(names)  # three controls


def test_knowing_the_student_is_the_mean_of_the_other_concepts_there():
    targets, groups = np.tile(["dmd", "lcm", "tcd"], 5), np.repeat(list("abcde"), 3)
    there = {"dmd": 0.2, "lcm": 1.0, "tcd": 0.6}
    y = np.array([there[target] for target in targets])
    assert prediction.r2_cross_validated(targets, y, groups, prediction.by_mean) == pytest.approx(1)
    rng = np.random.default_rng(14)
    noisy = y + rng.normal(size=15)
    missed = blind = 0.0
    for group in "abcde":
        out = groups == group
        for target, value in zip(targets[out], noisy[out], strict=True):
            missed += (value - noisy[~out & (targets == target)].mean()) ** 2
            blind += (value - noisy[~out].mean()) ** 2
    found = prediction.r2_cross_validated(targets, noisy, groups, prediction.by_mean)
    assert found == pytest.approx(1 - missed / blind)
    assert prediction.by_mean(targets, y, np.array(["xl"]))[0] == pytest.approx(y.mean())


def test_a_twin_in_the_training_set_does_not_leak():
    """Two controls of one concept, far out and alike, hold a line up that says nothing of other concepts."""
    rng = np.random.default_rng(15)
    rows = [row for row in rows_of(rng) if row["source"] == "base"]
    for row in rows:
        row |= dict.fromkeys(prediction.PREDICTORS, row[NAMES[0]])
        if row["control"] in ("c3", "c4"):
            row |= {"retention": 30 + row["retention"]} | dict.fromkeys(
                prediction.PREDICTORS, 50 + row[NAMES[0]]
            )
    _, alone, *_ = prediction.predictors(rows, "clip", draws=20)
    for row in rows:
        row["concept"] = row["concept"].replace("c4", "c3")
    family, twins, *_ = prediction.predictors(rows, "clip", draws=20)
    assert alone["r2_cross_validated"] > 0.9 and twins["r2_cross_validated"] < 0.2
    assert family["concepts"][3] == "c3 and 1 more" and len(family["concepts"]) == 13
    assert family["controls"] == family["permuted"] == 14


def test_a_line_foretells_what_is_linear_and_nothing_else():
    rng, groups = np.random.default_rng(7), np.repeat(np.arange(10), 3).astype(str)
    x = rng.normal(size=30)
    assert prediction.r2_cross_validated(x, 2 * x + 1, groups) == pytest.approx(1, abs=1e-12)
    assert np.mean([prediction.r2_cross_validated(x, rng.normal(size=30), groups) for _ in range(30)]) < 0
    # what holds inside controls only is of no use for a control not seen
    inner = np.tile([-1.0, 0.0, 1.0], 10)
    assert (
        prediction.r2_cross_validated(inner, inner * 0.1 + np.repeat(rng.normal(size=10), 3) * 5, groups)
        < 0.05
    )
    pair = np.isin(
        groups, ["3", "4"]
    )  # two groups hold the line up: each foretells the other, and alone it foretells nothing
    held, y = np.where(pair, 50.0, x), np.where(pair, 30.0, rng.normal(size=30))
    alone = prediction.r2_without_one(held, y, groups)
    assert (
        prediction.r2_cross_validated(held, y, groups) > 0.9
        and alone["without"] in ("3", "4")
        and alone["value"] < 0.2
    )
    assert (
        prediction.r2_cross_validated(x[:9], x[:9], groups[:9]) is None
        and prediction.bootstrap(np.dot, x[:9], x[:9], groups[:9])["low"] is None
    )
