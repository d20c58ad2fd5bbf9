"""Architectures: how each kind of network is called, and how its own pipeline encodes prompts.

All that differs between them is here.

A call turns x (B, C, H, W), t and prompts into the network's output (B, C, H, W), whatever the network wants
to be handed: packed latents, lists, another clock, another sign. What the output means is the member's
`kind`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.noise import TRAIN_STEPS
from models.prompts import Prompts

# network, x, t, prompts in its dtype, guidance it is given
Call = Callable[[nn.Module, Tensor, float, Prompts, float | None], Tensor]
# pipeline, texts, negative texts or None, size_px, device, further options of encode_prompt
Encode = Callable[..., Prompts]


@dataclass(frozen=True)
class Architecture:
    """One kind of network: its classes in diffusers and the two functions that know it."""

    names: tuple[str, str]  # of the network's and the pipeline's class
    part: str  # the network's name in the pipeline, and its folder in a repository
    call: Call
    encode: Encode
    # from a network's config, the shapes of one prompt's parts, for plans without an encoder
    conditioning: Callable[..., dict[str, tuple[int, ...]]]
    text_length: int = 0  # tokens of a T5 or Qwen prompt where the card says none, the pipeline's default
    absent: tuple[str, ...] = ()  # other parts of the pipeline that nothing here needs
    even: bool = False  # flow: the pipeline hands its scheduler evenly spaced sigmas, not the number of steps
    # what the pipeline's lora_state_dict is asked for besides the file
    lora: dict = field(default_factory=dict)

    @property
    def network(self) -> type[nn.Module]:
        """The network's class. Some seconds of imports, which a command that draws nothing need not wait."""
        return getattr(import_module("diffusers"), self.names[0])

    @property
    def pipeline(self) -> type:
        """The pipeline's class, likewise."""
        return getattr(import_module("diffusers"), self.names[1])


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


def call_pixart(net: nn.Module, x: Tensor, t: float, prompts: Prompts, guidance: float | None) -> Tensor:
    """PixArt: masked text, sizes only at 1024; learned variances beside the prediction are left out."""
    added = {"resolution": None, "aspect_ratio": None}
    if net.config.sample_size == 128:
        added = {"resolution": prompts.size, "aspect_ratio": prompts.size[:, :1] / prompts.size[:, 1:]}
    out = net(
        x,
        encoder_hidden_states=prompts.tokens,
        encoder_attention_mask=prompts.mask,
        timestep=_clock(x, t),
        added_cond_kwargs=added,
    )
    return out.sample[:, : x.shape[1]]


def call_sd3(net: nn.Module, x: Tensor, t: float, prompts: Prompts, guidance: float | None) -> Tensor:
    """Stable Diffusion 3."""
    return net(
        x, encoder_hidden_states=prompts.tokens, pooled_projections=prompts.pooled, timestep=_clock(x, t)
    ).sample


def call_flux(net: nn.Module, x: Tensor, t: float, prompts: Prompts, guidance: float | None) -> Tensor:
    """Flux: latents packed 2x2 into a sequence with positions, a clock from 1 to 0, guidance embedded."""
    height, width = x.shape[2] // 2, x.shape[3] // 2
    places = torch.zeros(height, width, 3, device=x.device, dtype=x.dtype)
    places[..., 1] += torch.arange(height, device=x.device)[:, None]
    places[..., 2] += torch.arange(width, device=x.device)
    strength = torch.full((len(x),), guidance or 0.0, device=x.device) if net.config.guidance_embeds else None
    out = net(
        pack(x),
        encoder_hidden_states=prompts.tokens,
        pooled_projections=prompts.pooled,
        timestep=_clock(x, t) / TRAIN_STEPS,
        img_ids=places.flatten(0, 1),
        txt_ids=torch.zeros(prompts.tokens.shape[1], 3, device=x.device, dtype=x.dtype),
        guidance=strength,
    )
    return unpack(out.sample, height, width)


def call_zimage(net: nn.Module, x: Tensor, t: float, prompts: Prompts, guidance: float | None) -> Tensor:
    """Z-Image: lists of images and of texts without padding, a clock from 0 to 1, the output negated."""
    masks = [slice(None)] * len(x) if prompts.mask is None else prompts.mask.bool()
    texts = [tokens[mask] for tokens, mask in zip(prompts.tokens, masks, strict=True)]
    out = net(list(x.unsqueeze(2)), (TRAIN_STEPS - _clock(x, t)) / TRAIN_STEPS, texts).sample
    return -torch.stack(list(out)).squeeze(2)


def pack(x: Tensor) -> Tensor:
    """Latents (B, C, H, W) as a sequence of their 2x2 patches, (B, H/2 W/2, 4C)."""
    return F.pixel_unshuffle(x, 2).flatten(2).mT.contiguous()


def unpack(x: Tensor, height: int, width: int) -> Tensor:
    """The sequence of height x width patches as latents again."""
    return F.pixel_shuffle(x.mT.contiguous().unflatten(2, (height, width)), 2)


def guidance_features(w: float, size: int, batch_size: int) -> Tensor:
    """LCM's sinusoidal embedding of the guidance scale minus one, (batch, size); as diffusers'
    get_guidance_scale_embedding.
    """
    half = size // 2
    angles = w * 1000.0 * torch.exp(torch.arange(half) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    features = torch.cat([torch.sin(angles), torch.cos(angles)])
    return F.pad(features, (0, size % 2)).expand(batch_size, size)


def _clock(x: Tensor, t: float) -> Tensor:
    return torch.full((len(x),), t, device=x.device, dtype=torch.float32)


def encode_sd(pipe, texts: list[str], negative: list[str] | None, size_px: int, device) -> Prompts:
    """Stable Diffusion 1 and 2: tokens; the negative side is the empty text."""
    tokens, away = pipe.encode_prompt(texts, device, 1, True, negative)
    return Prompts(tokens, negative=Prompts(away))


def encode_sdxl(pipe, texts: list[str], negative: list[str] | None, size_px: int, device) -> Prompts:
    """SDXL: tokens, pooled text and sizes; the negative side is zeros."""
    tokens, away, pooled, away_pooled = pipe.encode_prompt(
        prompt=texts, device=device, do_classifier_free_guidance=True, negative_prompt=negative
    )
    size = _sizes(texts, device, size_px, size_px, 0, 0, size_px, size_px)
    return Prompts(tokens, pooled, size, Prompts(away, away_pooled, size))


def _sizes(texts: list[str], device, *sizes: int) -> Tensor:
    """What each text is told of sizes in pixels, (B, how many)."""
    return torch.tensor(sizes, device=device, dtype=torch.float32).expand(len(texts), -1)


def encode_pixart(
    pipe, texts: list[str], negative: list[str] | None, size_px: int, device, **more
) -> Prompts:
    """PixArt: T5's tokens with their mask; the negative side is the empty text."""
    tokens, mask, away, away_mask = pipe.encode_prompt(texts, True, negative or "", device=device, **more)
    size = _sizes(texts, device, size_px, size_px)
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
    both, count = Prompts(tokens, pooled), len(texts)
    rows = torch.arange(count) * (len(away) > 1) + count
    return replace(both[:count], negative=both[rows])


def encode_zimage(
    pipe, texts: list[str], negative: list[str] | None, size_px: int, device, max_sequence_length: int = 512
) -> Prompts:
    """Z-Image: Qwen's tokens of the chat's template, padded to one length, with their mask; the negative side
    is the empty text.
    """
    found = pipe.encode_prompt(
        list(texts), device, True, negative and list(negative), max_sequence_length=max_sequence_length
    )
    (tokens, mask), (away, away_mask) = (_padded(part, max_sequence_length) for part in found)
    return Prompts(tokens, negative=Prompts(away, mask=away_mask), mask=mask)


def _padded(rows: list[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Token rows (L_i, D) as (B, length, D), and where they end, (B, length)."""
    tokens = torch.stack([F.pad(row, (0, 0, 0, length - len(row))) for row in rows])
    ends = torch.tensor([len(row) for row in rows], device=tokens.device)
    return tokens, torch.arange(length, device=tokens.device) < ends[:, None]


def conditioning_sd(c) -> dict:
    """What each kind of network is told of a prompt: the shapes of tokens, pooled, size and mask, for plans
    without an encoder.
    """
    return {"tokens": (77, c.cross_attention_dim)}


def conditioning_sdxl(c) -> dict:
    pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
    return {"tokens": (77, c.cross_attention_dim), "pooled": (pooled,), "size": (6,)}


def conditioning_pixart(c) -> dict:
    return {"tokens": (120, c.caption_channels), "size": (2,), "mask": (120,)}


def conditioning_sd3(c) -> dict:
    return {"tokens": (77 + 256, c.joint_attention_dim), "pooled": (c.pooled_projection_dim,)}


def conditioning_flux(c) -> dict:
    return {"tokens": (256, c.joint_attention_dim), "pooled": (c.pooled_projection_dim,)}


def conditioning_zimage(c) -> dict:
    return {"tokens": (512, c.cap_feat_dim)}


def blank(its: Architecture, net: nn.Module, batch_size: int = 1) -> Prompts:
    """Encoded prompts of the right shapes that say nothing, where the network is."""
    shapes = its.conditioning(net.config)
    return Prompts(**{part: torch.zeros(batch_size, *shapes[part], device=net.device) for part in shapes})


UNSAFE = ("safety_checker", "feature_extractor", "image_encoder")  # nothing here draws for the public
KOHYA = {"unet_config": None}  # filled with the network's own, by which SGM's names are counted

UNET, TRANSFORMER = partial(Architecture, part="unet", lora=KOHYA), partial(Architecture, part="transformer")
ARCHITECTURES = {
    "sdxl": UNET(
        ("UNet2DConditionModel", "StableDiffusionXLPipeline"),
        call=call_unet,
        encode=encode_sdxl,
        conditioning=conditioning_sdxl,
        absent=UNSAFE[1:],
    ),
    "sd": UNET(
        ("UNet2DConditionModel", "StableDiffusionPipeline"),
        call=call_unet,
        encode=encode_sd,
        conditioning=conditioning_sd,
        absent=UNSAFE,
    ),
    "pixart": TRANSFORMER(
        ("PixArtTransformer2DModel", "PixArtAlphaPipeline"),
        call=call_pixart,
        encode=encode_pixart,
        conditioning=conditioning_pixart,
        text_length=120,
    ),
    "sd3": TRANSFORMER(
        ("SD3Transformer2DModel", "StableDiffusion3Pipeline"),
        call=call_sd3,
        encode=encode_sd3,
        conditioning=conditioning_sd3,
        text_length=256,
        absent=UNSAFE[1:],
    ),
    "flux": TRANSFORMER(
        ("FluxTransformer2DModel", "FluxPipeline"),
        call=call_flux,
        encode=encode_flux,
        conditioning=conditioning_flux,
        text_length=512,
        absent=UNSAFE[1:],
        even=True,
        lora={"return_alphas": True},
    ),
    "zimage": TRANSFORMER(
        ("ZImageTransformer2DModel", "ZImagePipeline"),
        call=call_zimage,
        encode=encode_zimage,
        conditioning=conditioning_zimage,
        text_length=512,
        even=True,
    ),
}
