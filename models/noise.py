"""Noise levels: every state is x = alpha x0 + sigma eps, whatever a noise schedule calls its clock."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
from torch import Tensor

from configs import UserError

TRAIN_STEPS = 1000


@dataclass(frozen=True)
class Noise:
    """One noise level. t is what the network is told; ratio = sigma / alpha is the measure that no schedule
    changes.
    """

    t: float
    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """sigma / alpha, the sigma of the VE (Euler, Karras) convention; inf for pure noise."""
        return self.sigma / self.alpha if self.alpha else math.inf


CLEAN = Noise(0.0, 1.0, 0.0)


@dataclass(frozen=True)
class Band:
    """The noise levels above < sigma / alpha < below; early ones decide the layout, late ones the details."""

    above: float = 0.0
    below: float = math.inf

    @classmethod
    def of(cls, above: float | None, below: float | None) -> "Band":
        """None = no bound. Raises UserError where nothing lies between them."""
        band = cls(above or 0.0, math.inf if below is None else below)
        if not 0 <= band.above < band.below:
            raise UserError(
                f"above and below are noise levels, sigma / alpha, with 0 <= above < below, e.g. 2.0; got "
                f"{above} and {below}"
            )
        return band

    def __contains__(self, level: Noise) -> bool:
        return self.above < level.ratio and (level.ratio < self.below or math.isinf(self.below))


ALL = Band()


# first and last beta, and the power of them that is spaced evenly: scaled_linear of Stable Diffusion, linear
# of DDPM and PixArt
BETAS = {"vp": (0.00085, 0.012, 0.5), "vp-linear": (0.0001, 0.02, 1.0)}


@cache
def _vp_ratios(noise_schedule: str) -> np.ndarray:
    """sigma / alpha of the 1000 training steps."""
    first, last, power = BETAS[noise_schedule]
    betas = np.linspace(first**power, last**power, TRAIN_STEPS) ** (1 / power)
    kept = np.cumprod(1 - betas)
    return np.sqrt((1 - kept) / kept)


def vp(t: float, noise_schedule: str = "vp") -> Noise:
    """The variance-preserving level at training step t in [0, 999]; between steps sigma / alpha is linear, as
    in diffusers' Euler.
    """
    ratio = float(np.interp(t, np.arange(TRAIN_STEPS), _vp_ratios(noise_schedule)))
    return Noise(t, 1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio))


def vp_at(ratio: float, noise_schedule: str = "vp") -> Noise:
    """The variance-preserving level with this sigma / alpha; beyond the last training step, the last one."""
    return vp(float(np.interp(ratio, _vp_ratios(noise_schedule), np.arange(TRAIN_STEPS))), noise_schedule)


def flow(t: float, shift: float = 1.0) -> Noise:
    """The rectified-flow level at t in [0, 1000], x = (1 - s) x0 + s eps; shift as in Esser et al. 2024, eq.
    23.
    """
    s = t / TRAIN_STEPS
    s = shift * s / (1 + (shift - 1) * s)
    return Noise(s * TRAIN_STEPS, 1 - s, s)


def flow_at(ratio: float) -> Noise:
    """The rectified-flow level with this sigma / alpha."""
    s = 1.0 if math.isinf(ratio) else ratio / (1 + ratio)
    return Noise(s * TRAIN_STEPS, 1 - s, s)


# noise schedule: (level at t, level at sigma / alpha)
NOISE_SCHEDULES: dict[str, tuple[Callable[[float], Noise], Callable[[float], Noise]]] = {
    "vp": (vp, vp_at),
    "vp-linear": (partial(vp, noise_schedule="vp-linear"), partial(vp_at, noise_schedule="vp-linear")),
    "flow": (flow, flow_at),
}


def timesteps(spacing: str, steps: int) -> list[float]:
    """The falling training steps of a schedule (Lin et al. 2023, table 2): leading, trailing or linspace.

    leading: multiples of 1000 // steps, plus 1 (SDXL's steps_offset); trailing: ends of equal parts
    (Lightning, Turbo). Raises UserError for another spacing, or steps outside 1 … 1000.
    """
    if not 1 <= steps <= TRAIN_STEPS:
        raise UserError(f"steps must be 1 … {TRAIN_STEPS}, got {steps}")
    if spacing == "leading":
        return [float(k * (TRAIN_STEPS // steps) + 1) for k in reversed(range(steps))]
    if spacing == "trailing":
        # diffusers' own expression, so that halves round as there; cut, for with some steps it yields one too
        # many
        return [float(t) - 1 for t in np.arange(TRAIN_STEPS, 0, -TRAIN_STEPS / steps)[:steps].round()]
    if spacing == "linspace":
        return [float(t) for t in np.linspace(0, TRAIN_STEPS - 1, steps)[::-1]]
    raise UserError(f"unknown spacing {spacing!r}; there are leading, trailing, linspace")


def to_x0(x: Tensor, out: Tensor, noise: Noise, prediction_type: str) -> Tensor:
    """The clean latent that a network's output implies.

    x, out: (B, C, H, W). Inverts x = alpha x0 + sigma eps; v as in Salimans & Ho 2022, sec. 4; flow is v =
    eps - x0. Raises UserError for a prediction_type other than eps, v, flow, sample.
    """
    if prediction_type == "eps":
        return (x - noise.sigma * out) / noise.alpha
    if prediction_type == "v":
        return noise.alpha * x - noise.sigma * out
    if prediction_type == "flow":
        return x - noise.sigma * out
    if prediction_type == "sample":
        return out
    raise UserError(f"unknown prediction_type {prediction_type!r}; there are eps, v, flow, sample")


def to_eps(x: Tensor, x0: Tensor, noise: Noise) -> Tensor:
    """The noise that x and a clean latent imply; (B, C, H, W)."""
    return (x - noise.alpha * x0) / noise.sigma


def loss_target(x: Tensor, x0: Tensor, noise: Noise, noise_schedule: str) -> Tensor:
    """What losses compare, of what x and a clean latent imply: eps, or of a flow v = eps - x0; (B, C, H, W).

    At a flow's first level, pure noise, eps is x whatever x0 may be, and a loss on it would teach nothing.
    """
    return (x - x0) / noise.sigma if noise_schedule == "flow" else to_eps(x, x0, noise)


def ancestral(now: Noise, after: Noise) -> float:
    """The eta of Euler-ancestral: the share of fresh noise, eta^2 = 1 - (ratio' / ratio)^2."""
    return math.sqrt(max(0.0, 1 - (after.ratio / now.ratio) ** 2))
