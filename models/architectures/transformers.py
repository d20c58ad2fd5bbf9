"""PixArt, Stable Diffusion 3, Flux and Z-Image: transformers, most of them conditioned on T5's text."""

import torch
from torch import Tensor, nn

from models.architectures.shared import clock, pack, padded, paired, places, sizes, unpack
from models.noise import TRAIN_STEPS
from models.prompts import Prompts
from models.tokens import Reader, chat


def call_pixart(net: nn.Module, x: Tensor, t: float, prompts: Prompts, guidance: float | None) -> Tensor:
    """PixArt: masked text, sizes only at 1024; learned variances beside the prediction are left out."""
    added = {"resolution": None, "aspect_ratio": None}
    if net.config.sample_size == 128:
        added = {"resolution": prompts.size, "aspect_ratio": prompts.size[:, :1] / prompts.size[:, 1:]}
    out = net(
        x,
        encoder_hidden_states=prompts.tokens,
        encoder_attention_mask=prompts.mask,
        timestep=clock(x, t),
        added_cond_kwargs=added,
    )
    return out.sample[:, : x.shape[1]]


def call_sd3(net: nn.Module, x: Tensor, t: float, prompts: Prompts, guidance: float | None) -> Tensor:
    """Stable Diffusion 3."""
    return net(
        x, encoder_hidden_states=prompts.tokens, pooled_projections=prompts.pooled, timestep=clock(x, t)
    ).sample


def call_flux(net: nn.Module, x: Tensor, t: float, prompts: Prompts, guidance: float | None) -> Tensor:
    """Flux: latents packed 2x2 into a sequence with positions, a clock from 1 to 0, guidance embedded."""
    height, width = x.shape[2] // 2, x.shape[3] // 2
    strength = torch.full((len(x),), guidance or 0.0, device=x.device) if net.config.guidance_embeds else None
    out = net(
        pack(x),
        encoder_hidden_states=prompts.tokens,
        pooled_projections=prompts.pooled,
        timestep=clock(x, t) / TRAIN_STEPS,
        img_ids=places(height, width, x.device).to(x.dtype),
        txt_ids=torch.zeros(prompts.tokens.shape[1], 3, device=x.device, dtype=x.dtype),
        guidance=strength,
    )
    return unpack(out.sample, height, width)


def call_zimage(net: nn.Module, x: Tensor, t: float, prompts: Prompts, guidance: float | None) -> Tensor:
    """Z-Image: lists of images and of texts without padding, a clock from 0 to 1, the output negated."""
    masks = [slice(None)] * len(x) if prompts.mask is None else prompts.mask.bool()
    texts = [tokens[mask] for tokens, mask in zip(prompts.tokens, masks, strict=True)]
    out = net(list(x.unsqueeze(2)), (TRAIN_STEPS - clock(x, t)) / TRAIN_STEPS, texts).sample
    return -torch.stack(list(out)).squeeze(2)


def encode_pixart(
    pipe, texts: list[str], negative: list[str] | None, size_px: int, device, **more
) -> Prompts:
    """PixArt: T5's tokens with their mask; the negative side is the empty text."""
    tokens, mask, away, away_mask = pipe.encode_prompt(texts, True, negative or "", device=device, **more)
    size = sizes(texts, device, size_px, size_px)
    return Prompts(tokens, None, size, Prompts(away, None, size, mask=away_mask), mask)


def encode_sd3(pipe, texts: list[str], negative: list[str] | None, size_px: int, device, **more) -> Prompts:
    """Stable Diffusion 3: the tokens of two CLIPs and of T5, pooled text; the negative side is the empty
    text.
    """
    tokens, away, pooled, away_pooled = pipe.encode_prompt(
        texts, None, None, device, negative_prompt=negative, **more
    )
    return Prompts(tokens, pooled, None, Prompts(away, away_pooled))


def encode_flux(pipe, texts: list[str], negative: list[str] | None, size_px: int, device, **more) -> Prompts:
    """Flux: T5's tokens, CLIP's pooled text; the negative side, which the distilled members never ask for, is
    the empty text.
    """
    away = negative or [""]
    tokens, pooled, _ = pipe.encode_prompt([*texts, *away], None, device, **more)
    return paired(Prompts(tokens, pooled), len(texts), len(away))


def encode_zimage(
    pipe, texts: list[str], negative: list[str] | None, size_px: int, device, max_sequence_length: int = 512
) -> Prompts:
    """Z-Image: Qwen's tokens of the chat's template, with their mask; the negative side
    is the empty text.
    """
    found = pipe.encode_prompt(
        list(texts), device, True, negative and list(negative), max_sequence_length=max_sequence_length
    )
    (tokens, mask), (away, away_mask) = map(padded, found)
    return Prompts(tokens, negative=Prompts(away, mask=away_mask), mask=mask)


def read_zimage(pipe, length: int) -> Reader:
    """How Z-Image reads a text."""
    return Reader(pipe.tokenizer, length, chat(pipe.tokenizer, thinking=True))


def conditioning_pixart(c) -> dict:
    return {"tokens": (120, c.caption_channels), "size": (2,), "mask": (120,)}


def conditioning_sd3(c) -> dict:
    return {"tokens": (77 + 256, c.joint_attention_dim), "pooled": (c.pooled_projection_dim,)}


def conditioning_flux(c) -> dict:
    return {"tokens": (256, c.joint_attention_dim), "pooled": (c.pooled_projection_dim,)}


def conditioning_zimage(c) -> dict:
    return {"tokens": (512, c.cap_feat_dim)}
