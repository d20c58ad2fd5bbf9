"""How alike two representations are: numbers in, numbers out.

A sample is one image, a (prompt, seed); positions of one image are not independent, and treating them so
gives a CKA near 1 for anything. x: (n, p) and y: (n, q) are paired rows, float64. Debiased, because the plain
CKA of independent data with n = 64, p = 1280 is .95. `Alignment` needs one pass and a memory of p x q,
however many samples come; what takes all samples at once works on those that are kept.
"""

from collections.abc import Callable

import numpy as np

from controls import intervals


class Moments:
    """Sums over paired rows from which HSIC1 follows exactly, for the channels as they are or scaled
    afterwards.
    """

    def __init__(self) -> None:
        self.n = 0

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Takes in rows x (m, p) and y (m, q)."""
        x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
        if not self.n:
            p, q = x.shape[1], y.shape[1]
            # HSIC1 does not change with the origin; near the data's middle it loses no digits
            self.origin = x.mean(0), y.mean(0)
            self.c, self.u, self.v, self.q = (np.zeros((p, q)) for _ in range(4))
            self.sums = [np.zeros(p), np.zeros(q), np.zeros(p), np.zeros(q)]
        x, y = x - self.origin[0], y - self.origin[1]
        xx, yy = x**2, y**2
        self.n += len(x)
        for total, part in ((self.c, x.T @ y), (self.u, x.T @ yy), (self.v, xx.T @ y), (self.q, xx.T @ yy)):
            total += part
        for total, part in zip(self.sums, (x, y, xx, yy), strict=True):
            total += part.sum(0)

    def hsic(self, a: np.ndarray | float = 1.0, b: np.ndarray | float = 1.0) -> float:
        """Debiased HSIC of a·x and b·y with linear kernels (Song et al. 2012, eq. 5), without an n x n
        matrix.

        a: (p,), b: (q,) or a number. With k_i = |a x_i|², l_i = |b y_i|², C = Σ x yᵀ: tr KL = |C|² - Σ k m,
        1ᵀKL1 = s_xᵀ C s_y - s_xᵀ Σ m x - s_yᵀ Σ k y + Σ k m, and 1ᵀK1 = |s_x|² - Σ k, K and L with empty
        diagonals.
        """
        p, q = self.c.shape
        a, b = np.broadcast_to(a, p), np.broadcast_to(b, q)
        c, sx, sy = a[:, None] * self.c * b, a * self.sums[0], b * self.sums[1]
        lx, ky = a * (self.u @ b**2), b * (a**2 @ self.v)
        k, m, kl = a**2 @ self.sums[2], b**2 @ self.sums[3], a**2 @ self.q @ b**2
        return _hsic1(
            (c**2).sum() - kl, sx @ sx - k, sy @ sy - m, sx @ c @ sy - sx @ lx - sy @ ky + kl, self.n
        )

    def scales(self) -> tuple[np.ndarray, np.ndarray]:
        """1 / standard deviation of each channel of x and of y; 0 for a channel that never moves."""
        sx, sy, qx, qy = self.sums
        return _inverse_root(qx / self.n - (sx / self.n) ** 2), _inverse_root(
            qy / self.n - (sy / self.n) ** 2
        )

    def covariance(self) -> np.ndarray:
        """Σ (x - mean)(y - mean)ᵀ, (p, q)."""
        return self.c - np.outer(self.sums[0], self.sums[1]) / self.n

    def spreads(self) -> tuple[float, float]:
        """Σ |x - mean|² and Σ |y - mean|²."""
        sx, sy, qx, qy = self.sums
        return float(qx.sum() - sx @ sx / self.n), float(qy.sum() - sy @ sy / self.n)


class Alignment:
    """Similarity of two streams of rows: debiased linear CKA, the same of standardised channels, orthogonal
    Procrustes.
    """

    def __init__(self) -> None:
        self.both, self.first, self.second = Moments(), Moments(), Moments()

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Takes in rows x (m, p) and y (m, q)."""
        self.both.add(x, y)
        self.first.add(x, x)
        self.second.add(y, y)

    def cka(self) -> float | None:
        """Debiased linear CKA (Kornblith et al. 2019; Murphy et al. 2024): 1 for a rotated and scaled copy,
        about 0 for unrelated data.

        Not clamped: below 0 is chance too. None where one side's own HSIC is not positive, so that there is
        nothing to compare.
        """
        return _ratio(self.both.hsic(), self.first.hsic(), self.second.hsic())

    def standardised(self) -> float | None:
        """The same with every channel scaled to unit variance: few loud channels cannot decide it."""
        a, b = self.both.scales()
        return _ratio(self.both.hsic(a, b), self.first.hsic(a, a), self.second.hsic(b, b))

    def procrustes(self) -> float | None:
        """Orthogonal Procrustes similarity, the nuclear norm of Xᵀ Y over |X| |Y|, both centred: 1 for a
        rotated copy.

        Biased upwards where p is not small against n: read it beside its value for permuted prompts (Ding et
        al. 2021).
        """
        return _procrustes(self.both.covariance(), *self.both.spreads())


class Spread:
    """Variance over the seeds of each prompt, and between prompts, in one pass over samples that come prompt
    by prompt.
    """

    def __init__(self) -> None:
        self.prompt, self.count, self.variances = None, 0, []

    def add(self, x: np.ndarray, prompt: int) -> None:
        """Takes in rows x (m, p) of one prompt; a prompt that has been left does not come again."""
        if prompt != self.prompt:
            self._close()
            self.prompt, self.count, self.mean, self.apart = prompt, 0, np.zeros(x.shape[1]), 0.0
        m, mean = len(x), x.mean(0)
        total = self.count + m
        # Chan et al. 1979, eq. 2.1: two sets' squares, and what their means are apart
        self.apart += ((x - mean) ** 2).sum() + ((mean - self.mean) ** 2).sum() * self.count * m / total
        self.mean, self.count = self.mean + (mean - self.mean) * m / total, total

    def finish(self) -> tuple[np.ndarray, float]:
        """Each prompt's variance over seeds, summed over channels, (P,); and the variance of the prompts'
        means.
        """
        self._close()
        self.prompt, self.count = None, 0
        prompts = len(self.variances)
        between = self.squares - self.total @ self.total / prompts if prompts > 1 else 0.0
        return np.array(self.variances), float(between) / max(1, prompts - 1)

    def _close(self) -> None:
        if self.count > 1:
            if not self.variances:
                self.origin, self.total, self.squares = self.mean, np.zeros_like(self.mean), 0.0
            self.variances.append(float(self.apart) / (self.count - 1))
            self.total, self.squares = (
                self.total + self.mean - self.origin,
                self.squares + ((self.mean - self.origin) ** 2).sum(),
            )


def by_prompt(values: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """The mean of some values (n,) over each prompt's rows, (P,)."""
    return np.array([values[prompts == kind].mean() for kind in np.unique(prompts)])


def mean(values: np.ndarray, prompts: np.ndarray) -> dict:
    """The mean of some values (n,), every prompt counting the same, with its interval over prompts."""
    return intervals.mean(by_prompt(values, prompts))


def gram(x: np.ndarray) -> np.ndarray:
    """The linear kernel of rows (n, p) around their mean, (n, n)."""
    x = x - x.mean(0)
    return x @ x.T


def hsic(k: np.ndarray, m: np.ndarray) -> float:
    """Debiased HSIC of two kernel matrices (n, n), any kernel; their diagonals do not count (Song et al.
    2012, eq. 5).
    """
    k, m = _hollow(k), _hollow(m)
    return _hsic1((k * m).sum(), k.sum(), m.sum(), k.sum(0) @ m.sum(0), len(k))


def cka(k: np.ndarray, m: np.ndarray) -> float | None:
    """Debiased CKA of two kernel matrices (n, n); None as in `Alignment.cka`."""
    return _ratio(hsic(k, m), hsic(k, k), hsic(m, m))


def cross(ks: list[np.ndarray], ms: list[np.ndarray]) -> list[list[float | None]]:
    """Debiased CKA of every kernel matrix of one list with every one of the other, (len(ks), len(ms))."""
    own_k, own_m = ([hsic(kernel, kernel) for kernel in side] for side in (ks, ms))
    return [
        [_ratio(hsic(k, m), a, b) for m, b in zip(ms, own_m, strict=True)]
        for k, a in zip(ks, own_k, strict=True)
    ]


def null(k: np.ndarray, m: np.ndarray, prompts: np.ndarray, draws: int = 200, seed: int = 0) -> dict:
    """Debiased CKA where the second side's prompts are permuted, whole with their seeds: what chance gives.

    k, m: (n, n). prompts: (n,) the prompt of each row, every one equally often. Returns mean, high (95th
    percentile) and p, the share of permutations, the true pairing counted as one, that reach the true value.
    None where the CKA is None.
    """
    norm = hsic(k, k) * hsic(m, m)
    if norm <= 0:
        return {"mean": None, "high": None, "p": None}
    k, m, n = _hollow(k), _hollow(m), len(k)
    sums, sides = (k.sum(), m.sum()), (k.sum(0), m.sum(0))
    values = [
        _hsic1(np.vdot(k, m[rows][:, rows]), *sums, sides[0] @ sides[1][rows], n)
        for rows in permutations(prompts, draws, seed)
    ]
    values, true = np.array(values) / norm**0.5, hsic(k, m) / norm**0.5
    p = float(1 + (values >= true).sum()) / (1 + draws)
    return {"mean": float(values.mean()), "high": float(np.quantile(values, 0.95)), "p": p}


def permutations(prompts: np.ndarray, draws: int, seed: int = 0) -> list[np.ndarray]:
    """Rows (n,) in the order that permuted prompts give; every prompt equally often among the n."""
    rng, kinds = np.random.default_rng(seed), np.unique(prompts)
    places = np.stack([np.flatnonzero(prompts == kind) for kind in kinds])  # (P, S)
    found = []
    for _ in range(draws):
        rows = np.empty(len(prompts), dtype=int)
        rows[places.ravel()] = places[rng.permutation(len(kinds))].ravel()
        found.append(rows)
    return found


def jackknife(measure: Callable[[np.ndarray], float | None], prompts: np.ndarray) -> dict:
    """A measure of some rows, with a 95 % interval from leaving out one prompt after the other.

    measure: of row indices. prompts: (n,). The ends are None with fewer than three prompts.
    """
    rows, kinds = np.arange(len(prompts)), np.unique(prompts)
    value = measure(rows)
    without = [measure(rows[prompts != kind]) for kind in kinds] if len(kinds) > 2 else [None]
    if value is None or None in without:
        return {"value": value, "low": None, "high": None}
    return intervals.jackknife(value, without)


def neighbours(x: np.ndarray, y: np.ndarray, k: int) -> float:
    """Mutual k nearest neighbours (Huh et al. 2024): the mean share of a row's k nearest, by Euclidean
    distance, that x and y agree on.

    Chance is k / (n - 1). Raises ValueError unless 1 <= k < n.
    """
    if not 1 <= k < len(x):
        raise ValueError(f"k must be 1 … {len(x) - 1}, below the {len(x)} samples; got {k}")
    near = [np.argpartition(_far(gram(side)), k - 1, axis=1)[:, :k] for side in (x, y)]
    return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(*near, strict=True)]))


def procrustes(x: np.ndarray, y: np.ndarray) -> float | None:
    """`Alignment.procrustes` of rows that are all at hand; with fewer rows than channels it works at the size
    of the rows.
    """
    x, y = (_short(side - side.mean(0)) for side in (x, y))
    return _procrustes(x.T @ y, float((x**2).sum()), float((y**2).sum()))


def _short(x: np.ndarray) -> np.ndarray:
    """x (n, p) rotated into n channels when p is more: distances and inner products of rows stay."""
    return np.linalg.qr(x.T, mode="r").T if x.shape[1] > len(x) else x


def _procrustes(covariance: np.ndarray, x: float, y: float) -> float | None:
    return (
        float(np.linalg.svd(covariance, compute_uv=False).sum() / (x * y) ** 0.5) if x > 0 and y > 0 else None
    )


def _hsic1(trace: float, k: float, m: float, kl: float, n: int) -> float:
    """tr KL, 1ᵀK1, 1ᵀL1, 1ᵀKL1 of hollow kernel matrices to HSIC1. Raises ValueError below four samples."""
    if n < 4:
        raise ValueError(f"debiased HSIC needs at least 4 samples, not {n}")
    return float((trace + k * m / ((n - 1) * (n - 2)) - 2 * kl / (n - 2)) / (n * (n - 3)))


def _ratio(both: float, first: float, second: float) -> float | None:
    return both / (first * second) ** 0.5 if first > 0 and second > 0 else None


def _hollow(k: np.ndarray) -> np.ndarray:
    return k - np.diag(np.diag(k))


def _far(k: np.ndarray) -> np.ndarray:
    """Squared distances from a kernel matrix; infinite to oneself."""
    far = np.diag(k)[:, None] + np.diag(k) - 2 * k
    np.fill_diagonal(far, np.inf)
    return far


def _inverse_root(variance: np.ndarray) -> np.ndarray:
    still = variance <= 1e-12 * max(variance.max(), 1e-300)
    return np.where(still, 0.0, 1 / np.sqrt(np.where(still, 1.0, variance)))
