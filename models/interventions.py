"""What a plan may do differently: to the first noise, to the prompts, to x0, to the weights.

Each is a small frozen value.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from configs import UserError
from models.hashing import bare
from models.noise import TRAIN_STEPS, Noise
from models.prompts import Prompts
from models.quantized import Quantized, layers


def derived(own: Tensor, shape: tuple[int, ...], salt: int = 0) -> Tensor:
    """More noise for each image, (B, *shape), a function of its own initial noise (B, ...) and of the salt
    alone.

    So an image is the same alone or in a batch, though the noise is none that its seed has drawn before.
    """
    rows = []
    for row in own:
        generator = torch.Generator().manual_seed(zlib.crc32(row.cpu().contiguous().numpy().tobytes(), salt))
        rows.append(torch.randn(shape, generator=generator))
    return torch.stack(rows).to(own)


def common(own: Tensor, shape: tuple[int, ...]) -> Tensor:
    """One noise that all images share, (B, *shape)."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(own).expand(len(own), *shape)


@dataclass(frozen=True)
class Some:
    """A share of the images, each told by its own initial noise; of many images about that share."""

    share: float

    def __call__(self, own: Tensor) -> Tensor:
        """Which of them, (B,)."""
        words = [row.cpu().contiguous().numpy().tobytes() for row in own]
        return torch.tensor([zlib.crc32(word, 1) < self.share * 2**32 for word in words], device=own.device)


def unprompted(prompts: Prompts, level: Noise, own: Tensor) -> Prompts:
    """The network is told what stands for no prompt: zeros for SDXL, else the empty text."""
    return replace(prompts.negative, negative=prompts.negative)


@dataclass(frozen=True)
class Pink:
    """Initial noise with power 1 / f^exponent instead of flat, of unit variance; 0 is white, 2 is brown."""

    exponent: float

    def __call__(self, noise: Tensor) -> Tensor:
        """noise: (B, C, H, W), white."""
        height, width = noise.shape[-2:]
        f = torch.fft.fftfreq(height)[:, None].hypot(torch.fft.fftfreq(width)[None]).to(noise.device)
        f[0, 0] = 1 / max(height, width)  # the mean is as strong as the slowest wave
        gain = f ** (-self.exponent / 2)
        gain = gain / gain.square().mean().sqrt()
        return torch.fft.ifft2(torch.fft.fft2(noise) * gain).real


@dataclass(frozen=True)
class CADS:
    """CADS: noise on the prompts that fades with the noise level.

    Sadat et al. 2024, arXiv 2310.17347, eqs. 2 to 4.

    y <- sqrt(gamma) y + scale sqrt(1 - gamma) n, then brought back to its own mean and deviation. gamma is 1
    for t below `low`, 0 above `high` and linear between them, t as a share of the training steps. The
    negative side stays.
    """

    scale: float
    low: float = 0.6
    high: float = 0.9
    rescale: float = 1.0  # the paper's psi

    def gamma(self, level: Noise) -> float:
        """How much of the prompt is left, 0 … 1."""
        return min(1.0, max(0.0, (self.high - level.t / TRAIN_STEPS) / (self.high - self.low)))

    def __call__(self, prompts: Prompts, level: Noise, own: Tensor) -> Prompts:
        """What the network is told at a level; own: the images' initial noise."""
        if self.gamma(level) == 1:
            return prompts
        tokens, pooled = self._noised(prompts.tokens, level, own, 1), prompts.pooled
        if pooled is not None:
            pooled = self._noised(pooled, level, own, 2)
        return replace(prompts, tokens=tokens, pooled=pooled)

    def _noised(self, y: Tensor, level: Noise, own: Tensor, part: int) -> Tensor:
        gamma, over = self.gamma(level), tuple(range(1, y.dim()))
        noise = derived(own, tuple(y.shape[1:]), part * 10_000 + round(level.t)).to(y)
        new = gamma**0.5 * y + self.scale * (1 - gamma) ** 0.5 * noise
        (mean, spread), (own_mean, own_spread) = (
            (z.mean(over, keepdim=True), z.std(over, keepdim=True)) for z in (new, y)
        )
        scaled = (new - mean) / spread.clamp_min(1e-12) * own_spread + own_mean
        return self.rescale * scaled + (1 - self.rescale) * new


class WeightInterpolation:
    """A network with the weights base + share (network - base), as a context: computed once, then a swap of
    pointers.

    Weights that the base lacks (LCM's guidance embedding) stay; packed ones are taken together whenever they
    are unpacked. Raises UserError for a weight of another shape.
    """

    def __init__(self, base: nn.Module, net: nn.Module, share: float):
        self.base, self.net, self.share = base, net, share

    @cached_property
    def _weights(self) -> list[tuple[nn.Parameter, Tensor]]:
        there = bare(self.base)
        found = [(weight, there[name], name) for name, weight in bare(self.net).items() if name in there]
        other = [name for weight, origin, name in found if weight.shape != origin.shape]
        if other or not found:
            raise UserError(
                f"no way between two networks of different shapes: {(other or ['no layer in common'])[0]}"
            )
        return [(weight, _between(origin, weight, self.share)) for weight, origin, _ in found]

    @cached_property
    def _packed(self) -> list[tuple[Quantized, nn.Linear]]:
        there = layers(self.base, nn.Linear)
        found = {name: (layer, there[name]) for name, layer in layers(self.net).items() if name in there}
        for name, (layer, other) in found.items():
            if (layer.in_features, layer.out_features) != (other.in_features, other.out_features):
                raise UserError(f"no way between two networks of different shapes: {name}")
        return list(found.values())

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, the network is between the two; afterwards its own weights are back, the same memory."""
        before = [(weight, weight.data) for weight, _ in self._weights]
        try:
            for weight, new in self._weights:
                weight.data = new
            for layer, other in self._packed:
                layer.between = (other, self.share)
            yield
        finally:
            for weight, own in before:
                weight.data = own
            for layer, _ in self._packed:
                layer.between = None


def _between(base: nn.Parameter, weight: nn.Parameter, share: float) -> Tensor:
    """base + share (weight - base), summed in fp32, in the weight's own type and strides, since kernels
    differ by them.
    """
    own, other = weight.data.float(), base.data.to(weight.device, torch.float32)
    found = torch.lerp(other, own, share)  # exact at both ends, unlike base + 1 (weight - base)
    return torch.empty_like(weight.data).copy_(found)
