"""Whether anything foretells retention: numbers of a control and a target against its retention there, with
whole controls permuted, whole concepts left out, and beside what the target alone says.
"""

from collections.abc import Callable

import numpy as np


def _mean(cell: dict, key: str) -> float | None:
    values = [interval["value"] for interval in cell[key]]
    return None if None in values else float(np.mean(values))


def _over_chance(cell: dict, side: str) -> float | None:
    share, chance = cell["delta"][side], cell["delta"][f"chance_{side}"]
    return share / chance if chance else None


PREDICTORS: dict[str, Callable[[dict], float | None]] = {  # of a cell of analysis.images.directions
    "direction": lambda c: _mean(c, "cosine"),
    "direction, first step": lambda c: c["cosine"][0]["value"],
    "direction, guided": lambda c: _mean(c, "cosine_guided"),
    "gain": lambda c: _mean(c, "gain"),
    "gain, guided": lambda c: _mean(c, "gain_guided"),
    "gain, guided, first step": lambda c: c["gain_guided"][0]["value"],
    "cosine with the delta": lambda c: abs(c["delta"]["cosine"]),
    "delta read, over chance": lambda c: _over_chance(c, "in"),
    "delta written, over chance": lambda c: _over_chance(c, "out"),
    "size beside the delta": lambda c: c["delta"]["size"],
}


def points(cells: list[dict], transfer: list[dict], concepts: dict[str, str]) -> dict[str, list[dict]]:
    """Per evaluator the rows {control, concept, source, target, retention, <predictor>: value …} that both
    have, without undefined retentions; concepts: what each control is of, by its name.
    """
    directions = {(c["control"], c["source"], c["target"]): c for c in cells if c["what"] == "direction"}
    rows: dict[str, list[dict]] = {}
    for cell in transfer:
        key = (cell["control"], cell["source"], cell["target"])
        for evaluator, reading in cell["readings"].items():
            if key in directions and reading["retention"]["value"] is not None:
                row = dict(zip(("control", "source", "target"), key, strict=True))
                row |= {"concept": concepts[cell["control"]], "retention": reading["retention"]["value"]}
                row |= {name: of(directions[key]) for name, of in PREDICTORS.items()}
                rows.setdefault(evaluator, []).append(row)
    return rows


def predictors(rows: list[dict], evaluator: str, draws: int = 2000, seed: int = 0) -> list[dict]:
    """One cell of them all, with the baseline, and one per predictor: its correlations with retention, their
    family-wise p, and R² on concepts left out.

    Rows of one control depend on each other: the bootstrap draws controls and permutations move controls.
    Controls of one concept are twins: the line that meets a control has seen none of its concept.
    """
    p = family_wise(rows, tuple(PREDICTORS), draws, seed)
    cells = [_cell(rows, name, evaluator, draws, seed) | {"p_family_wise": p[name]} for name in PREDICTORS]
    return [_summary(rows, evaluator, [value for value in p.values() if value is not None]), *cells]


def _summary(rows: list[dict], evaluator: str, p: list[float]) -> dict:
    """All predictors together, and the baseline: which student a control is put on, and nothing else."""
    targets, y = _column(rows, "target"), _column(rows, "retention")
    return {
        "what": "prediction",
        "evaluator": evaluator,
        **_counts(rows),
        "concepts": list(dict.fromkeys(_concepts(rows).tolist())),
        "permuted": sum(len(block) for block in exchangeable(rows) if len(block) > 1),
        "p_family_wise": min(p, default=None),
        "r2_cross_validated": r2_cross_validated(targets, y, _concepts(rows), by_mean),
        "r2_without_one": r2_without_one(targets, y, _concepts(rows), by_mean),
    }


def _cell(rows: list[dict], name: str, evaluator: str, draws: int, seed: int) -> dict:
    rows = [row for row in rows if row[name] is not None]
    x, y, targets = (_column(rows, key) for key in (name, "retention", "target"))
    controls, concepts = _column(rows, "control"), _concepts(rows)
    return {
        "what": "predictor",
        "evaluator": evaluator,
        "predictor": name,
        **_counts(rows),
        "spearman": bootstrap(spearman, x, y, controls, draws, seed),
        "pearson": bootstrap(pearson, x, y, controls, draws, seed),
        "without_one": without_one(spearman, x, y, controls),
        "r2_cross_validated": r2_cross_validated(x, y, concepts),
        "r2_without_one": r2_without_one(x, y, concepts),
        "r2_which_student": r2_cross_validated(targets, y, concepts, by_mean),
    }


def _counts(rows: list[dict]) -> dict[str, int]:
    return {"points": len(rows), "controls": len({row["control"] for row in rows})}


def _column(rows: list[dict], key: str) -> np.ndarray:
    return np.array([row[key] for row in rows])


def _concepts(rows: list[dict]) -> np.ndarray:
    """Per row its concept, called by the controls of it that there are: "age", "smile and 3 more"."""
    controls: dict[str, dict[str, None]] = {}
    for row in rows:
        controls.setdefault(row["concept"], {})[row["control"]] = None
    more = {concept: f" and {len(names) - 1} more" for concept, names in controls.items() if len(names) > 1}
    return np.array([next(iter(controls[row["concept"]])) + more.get(row["concept"], "") for row in rows])


def exchangeable(rows: list[dict]) -> list[np.ndarray]:
    """Which controls can stand for one another: those of one source with the same targets.

    Row numbers (controls, targets) per such set, a line per control, its targets in one order.
    """
    controls: dict[tuple, dict[str, int]] = {}
    for number, row in enumerate(rows):
        controls.setdefault((row["control"], row["source"]), {})[row["target"]] = number
    blocks: dict[tuple, list[list[int]]] = {}
    for (_, source), numbers in controls.items():
        targets = sorted(numbers)
        blocks.setdefault((source, *targets), []).append([numbers[target] for target in targets])
    return [np.array(block) for block in blocks.values()]


def permuted(rows: list[dict], draws: int, seed: int = 0) -> np.ndarray:
    """Row numbers (draws, rows): whose retention each row gets when whole controls change places.

    A control gets another's retentions on all of its targets, each on its own target. Only controls of
    `exchangeable` change places; one that is alone of its kind keeps its retentions in every draw, which
    costs power and no error.
    """
    orders, rng = np.tile(np.arange(len(rows)), (draws, 1)), np.random.default_rng(seed)
    for block in exchangeable(rows):
        orders[:, block] = block[rng.random((draws, len(block))).argsort(1)]
    return orders


def family_wise(
    rows: list[dict], names: tuple[str, ...], draws: int = 2000, seed: int = 0
) -> dict[str, float | None]:
    """Per predictor the p of its |Spearman|, corrected for all of them; None below four controls.

    The share of draws of `permuted` in which the largest |Spearman| of any predictor is at least this one's,
    the data as they are counted among the draws: single-step maxT (Westfall & Young 1993, sec. 2.3.1). The
    lowest is the p of "none of them goes with retention". Exact where controls are
    exchangeable; where those of one concept are alike in predictor and in retention it is too small.
    """
    orders = np.vstack([np.arange(len(rows)), permuted(rows, draws, seed)])
    enough = [n for n in names if len({r["control"] for r in rows if r[n] is not None}) >= 4]
    sizes = {name: np.abs(_spearmans(rows, name, orders)) for name in enough}
    largest = np.max([*sizes.values()], axis=0) if enough else np.empty(0)
    # sums in another order differ in their last digits
    return {
        name: float(np.mean(largest >= sizes[name][0] - 1e-9)) if name in sizes else None for name in names
    }


def _spearmans(rows: list[dict], name: str, orders: np.ndarray) -> np.ndarray:
    """Spearman's correlation of a predictor, where it has a value, with retentions in each order (draws,)."""
    known = np.array([row[name] is not None for row in rows])
    x = ranks(_column([row for row in rows if row[name] is not None], name))
    y = _column(rows, "retention")[orders][:, known]
    y = ranks(y[0])[orders] if known.all() else np.stack([ranks(line) for line in y])
    x, y = x - x.mean(), y - y.mean(1, keepdims=True)
    sizes = np.sqrt((x @ x) * (y**2).sum(1))
    return np.divide(y @ x, sizes, out=np.zeros(len(y)), where=sizes > 0)


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation; 0 where one side is constant."""
    x, y = x - x.mean(), y - y.mean()
    size = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / size) if size > 0 else 0.0


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation, ties at their mean rank."""
    return pearson(ranks(x), ranks(y))


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties at their mean."""
    _, place, count = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def bootstrap(
    measure: Callable, x: np.ndarray, y: np.ndarray, groups: np.ndarray, draws: int = 2000, seed: int = 0
) -> dict:
    """A correlation with the 95 % interval of a bootstrap over whole groups; all None below four groups."""
    kinds = np.unique(groups)
    if len(kinds) < 4:
        return {"value": None, "low": None, "high": None}
    members, rng = [np.flatnonzero(groups == kind) for kind in kinds], np.random.default_rng(seed)
    drawn = [
        np.concatenate([members[i] for i in rng.integers(len(kinds), size=len(kinds))]) for _ in range(draws)
    ]
    low, high = np.quantile([measure(x[rows], y[rows]) for rows in drawn], [0.025, 0.975])
    return {"value": measure(x, y), "low": float(low), "high": float(high)}


def without_one(measure: Callable, x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> dict:
    """The range of a correlation when each group is left out in turn, and the group that moves it most; None
    below four groups.
    """
    kinds = sorted(set(groups.tolist()))
    if len(kinds) < 4:
        return {"low": None, "high": None, "most": None}
    left = {kind: measure(x[groups != kind], y[groups != kind]) for kind in kinds}
    most = max(kinds, key=lambda kind: abs(left[kind] - measure(x, y)))
    return {"low": min(left.values()), "high": max(left.values()), "most": most}


Fit = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # (x, y, other x) -> y at the other x


def by_line(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Least squares of y over x, at other places."""
    slope, offset = line(x, y)
    return slope * at + offset


def by_mean(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The mean of y where x is the same word; of all y for a word that x lacks."""
    return np.array([y[x == word].mean() if np.any(x == word) else y.mean() for word in at])


def r2_cross_validated(x: np.ndarray, y: np.ndarray, groups: np.ndarray, fit: Fit = by_line) -> float | None:
    """Cross-validated R² of a fit to the other groups' retentions, against their mean: 1 perfect, 0 no use;
    None below four groups.
    """
    kinds = np.unique(groups)
    if len(kinds) < 4:
        return None
    missed = blind = 0.0
    for kind in kinds:
        out = groups == kind
        missed += ((y[out] - fit(x[~out], y[~out], x[out])) ** 2).sum()
        blind += ((y[out] - y[~out].mean()) ** 2).sum()
    return float(1 - missed / blind) if blind > 0 else None


def r2_without_one(x: np.ndarray, y: np.ndarray, groups: np.ndarray, fit: Fit = by_line) -> dict:
    """The lowest cross-validated R² when one group is not there at all, and which: a fit that a single group
    holds up falls here.
    """
    values = {}
    for kind in sorted(set(groups.tolist())):
        there = groups != kind
        values[kind] = r2_cross_validated(x[there], y[there], groups[there], fit)
    values = {kind: value for kind, value in values.items() if value is not None}
    lowest = min(values, key=values.get) if values else None
    return {"value": values.get(lowest), "without": lowest}


def line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope and offset of least squares; slope 0 where x is constant."""
    around = x - x.mean()
    slope = float(around @ y / (around @ around)) if np.any(around) else 0.0
    return slope, float(y.mean() - slope * x.mean())
