"""Latents: what a network denoises, and what its VAE makes of it, by kind of VAE."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Latents:
    """How the latents of networks, (B, C, H, W), are told from those of a kind of VAE."""

    shape: Callable[[Mapping, int], Shape]  # config of the VAE, side of an image in pixels -> (C, H, W)
    decode: Callable[[nn.Module, Tensor], Tensor]  # VAE, latents -> images (B, 3, size_px, size_px)
    encode: Callable[[nn.Module, Tensor], Tensor]  # VAE, images in [-1, 1] -> latents, their mode
    tile: Callable[[Any], int]  # VAE -> side of a tile, in latents


def of(vae: nn.Module) -> Latents:
    """Those of a VAE."""
    return LATENTS[type(vae).__name__]


def scaled_shape(config: Mapping, size_px: int) -> Shape:
    """AutoencoderKL and AutoencoderTiny: a factor, and a shift where there is one."""
    side = size_px // 2 ** (len(config["block_out_channels"]) - 1)
    return config["latent_channels"], side, side


def decode_scaled(vae: nn.Module, latents: Tensor) -> Tensor:
    shift = vae.config.get("shift_factor") or 0.0
    return vae.decode(latents / vae.config.scaling_factor + shift).sample


def encode_scaled(vae: nn.Module, images: Tensor) -> Tensor:
    return (mode(vae, images) - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor


def mode(vae: nn.Module, images: Tensor) -> Tensor:
    """The VAE's own latents of images, the mode where it gives a distribution."""
    out = vae.encode(images)
    return out.latents if hasattr(out, "latents") else out.latent_dist.mode()


def patched_shape(config: Mapping, size_px: int) -> Shape:
    """AutoencoderKLFlux2: networks are given patches of 2x2, each channel normalised by what the VAE has seen
    in training.
    """
    channels, height, width = scaled_shape(config, size_px)
    return 4 * channels, height // 2, width // 2


def decode_patched(vae: nn.Module, latents: Tensor) -> Tensor:
    mean, deviation = _seen(vae)
    return vae.decode(F.pixel_shuffle(latents * deviation + mean, 2)).sample


def encode_patched(vae: nn.Module, images: Tensor) -> Tensor:
    mean, deviation = _seen(vae)
    return (F.pixel_unshuffle(mode(vae, images), 2) - mean) / deviation


def _seen(vae: nn.Module) -> tuple[Tensor, Tensor]:
    mean, variance = vae.bn.running_mean, vae.bn.running_var
    return tuple(values.view(1, -1, 1, 1) for values in (mean, (variance + vae.config.batch_norm_eps).sqrt()))


def framed_shape(config: Mapping, size_px: int) -> Shape:
    """AutoencoderKLQwenImage and its successor, which are a video's: one frame, each channel normalised by
    numbers in the config; the successor's images have an opacity.
    """
    side = size_px // 2 ** len(config["temperal_downsample"])
    return config["z_dim"], side, side


def decode_framed(vae: nn.Module, latents: Tensor) -> Tensor:
    mean, deviation = _said(vae, latents)
    images = vae.decode((latents * deviation + mean).unsqueeze(2)).sample[:, :, 0]
    if images.shape[1] == 3:
        return images
    opacity = (images[:, 3:].clamp(-1, 1) + 1) / 2
    return images[:, :3] * opacity + (1 - opacity)  # over white


def encode_framed(vae: nn.Module, images: Tensor) -> Tensor:
    if vae.encoder.conv_in.in_channels == 4:
        images = torch.cat([images, torch.ones_like(images[:, :1])], 1)
    latents = mode(vae, images.unsqueeze(2))[:, :, 0]
    mean, deviation = _said(vae, latents)
    return (latents - mean) / deviation


def _said(vae: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    config = vae.config
    return tuple(
        torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )


SCALED = Latents(scaled_shape, decode_scaled, encode_scaled, lambda vae: vae.tile_latent_min_size)
PATCHED = Latents(patched_shape, decode_patched, encode_patched, lambda vae: vae.tile_latent_min_size // 2)
FRAMED = Latents(
    framed_shape,
    decode_framed,
    encode_framed,
    lambda vae: vae.tile_sample_min_height // vae.spatial_compression_ratio,
)
# the tiny one tiles for a factor of 8 only
TILED = ("AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderKLQwenImage", "AutoencoderKLQwenImage21")
LATENTS = {
    "AutoencoderKL": SCALED,
    "AutoencoderTiny": SCALED,
    "AutoencoderKLFlux2": PATCHED,
    "AutoencoderKLQwenImage": FRAMED,
    "AutoencoderKLQwenImage21": FRAMED,
}
