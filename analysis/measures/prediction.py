"""What predicts retention: one number per control and target against its retention, with whole controls left
out.
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


def points(cells: list[dict], transfer: list[dict]) -> dict[str, list[dict]]:
    """Per evaluator the rows {control, source, target, retention, <predictor>: value …} that both have,
    without undefined retentions.
    """
    directions = {(c["control"], c["source"], c["target"]): c for c in cells if c["what"] == "direction"}
    found: dict[str, list[dict]] = {}
    for cell in transfer:
        key = (cell["control"], cell["source"], cell["target"])
        for evaluator_name, reading in cell["readings"].items():
            if key in directions and reading["retention"]["value"] is not None:
                values = {name: of(directions[key]) for name, of in PREDICTORS.items()}
                row = {
                    "control": key[0],
                    "source": key[1],
                    "target": key[2],
                    "retention": reading["retention"]["value"],
                    **values,
                }
                found.setdefault(evaluator_name, []).append(row)
    return found


def predictors(rows: list[dict], evaluator: str, draws: int = 2000, seed: int = 0) -> list[dict]:
    """One cell per predictor: its correlations with retention, and how well a line through the other controls
    foretells each control.

    Rows of one control depend on each other: the bootstrap draws controls, and a control is left out with all
    its targets.
    """
    return [_cell(rows, name, evaluator, draws, seed) for name in PREDICTORS]


def _cell(rows: list[dict], name: str, evaluator: str, draws: int, seed: int) -> dict:
    rows = [row for row in rows if row[name] is not None]
    x, y = np.array([row[name] for row in rows]), np.array([row["retention"] for row in rows])
    groups = np.array([row["control"] for row in rows])
    return {
        "what": "predictor",
        "evaluator": evaluator,
        "predictor": name,
        "points": len(rows),
        "controls": len(set(groups)),
        "spearman": bootstrap(spearman, x, y, groups, draws, seed),
        "pearson": bootstrap(pearson, x, y, groups, draws, seed),
        "without_one": without_one(spearman, x, y, groups),
        "r2_cross_validated": r2_cross_validated(x, y, groups),
        "r2_without_one": r2_without_one(x, y, groups),
    }


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


def r2_cross_validated(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> float | None:
    """Cross-validated R² of a line through the other groups' retentions, against their mean: 1 perfect, 0 no
    use; None below four groups.
    """
    kinds = np.unique(groups)
    if len(kinds) < 4:
        return None
    missed = blind = 0.0
    for kind in kinds:
        out = groups == kind
        slope, offset = line(x[~out], y[~out])
        missed += ((y[out] - slope * x[out] - offset) ** 2).sum()
        blind += ((y[out] - y[~out].mean()) ** 2).sum()
    return float(1 - missed / blind) if blind > 0 else None


def r2_without_one(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> dict:
    """The lowest cross-validated R² when one group is not there at all, and which: a line that a single group
    holds up falls here.
    """
    left = {
        kind: r2_cross_validated(x[groups != kind], y[groups != kind], groups[groups != kind])
        for kind in sorted(set(groups.tolist()))
    }
    left = {kind: value for kind, value in left.items() if value is not None}
    lowest = min(left, key=left.get) if left else None
    return {"value": left.get(lowest), "without": lowest}


def line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope and offset of least squares; slope 0 where x is constant."""
    around = x - x.mean()
    slope = float(around @ y / (around @ around)) if np.any(around) else 0.0
    return slope, float(y.mean() - slope * x.mean())
