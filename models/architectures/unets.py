"""Stable Diffusion 1, 2 and XL: U-Nets, CLIP's text."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.architectures.shared import sizes
from models.prompts import Prompts


def call_unet(net: nn.Module, x: Tensor, t: float, prompts: Prompts, guidance: float | None) -> Tensor:
    """Stable Diffusion 1 and 2; SDXL: also pooled text and sizes."""
    added, embedded = None, {}
    if prompts.pooled is not None:
        added = {"text_embeds": prompts.pooled, "time_ids": prompts.size}
    if guidance is not None:  # given to a U-Net with time_cond_proj_dim
        features = guidance_features(guidance, net.config.time_cond_proj_dim, len(x))
        embedded = {"timestep_cond": features.to(x)}
    clock = torch.tensor(t, device=x.device)
    return net(x, clock, prompts.tokens, added_cond_kwargs=added, **embedded).sample


def guidance_features(w: float, size: int, batch_size: int) -> Tensor:
    """LCM's sinusoidal embedding of the guidance scale minus one, (batch, size); as diffusers'
    get_guidance_scale_embedding.
    """
    half = size // 2
    angles = w * 1000.0 * torch.exp(torch.arange(half) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    features = torch.cat([torch.sin(angles), torch.cos(angles)])
    return F.pad(features, (0, size % 2)).expand(batch_size, size)


def encode_sd(pipe, texts: list[str], negative: list[str] | None, size_px: int, device) -> Prompts:
    """Stable Diffusion 1 and 2: tokens; the negative side is the empty text."""
    tokens, away = pipe.encode_prompt(texts, device, 1, True, negative)
    return Prompts(tokens, negative=Prompts(away))


def encode_sdxl(pipe, texts: list[str], negative: list[str] | None, size_px: int, device) -> Prompts:
    """SDXL: tokens, pooled text and sizes; the negative side is zeros."""
    tokens, away, pooled, away_pooled = pipe.encode_prompt(
        prompt=texts, device=device, do_classifier_free_guidance=True, negative_prompt=negative
    )
    size = sizes(texts, device, size_px, size_px, 0, 0, size_px, size_px)
    return Prompts(tokens, pooled, size, Prompts(away, away_pooled, size))


def conditioning_sd(c) -> dict:
    """What each kind of network is told of a prompt: the shapes of tokens, pooled, size and mask, for plans
    without an encoder.
    """
    return {"tokens": (77, c.cross_attention_dim)}


def conditioning_sdxl(c) -> dict:
    pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
    return {"tokens": (77, c.cross_attention_dim), "pooled": (pooled,), "size": (6,)}
