"""Architectures: how each kind of network is called, and how its own pipeline encodes prompts.

All that differs between them is here: the functions in the files beside, the rows below.

A call turns x (B, C, H, W), t and prompts into the network's output (B, C, H, W), whatever the network wants
to be handed: packed latents, lists, another clock, another sign. What the output means is the member's
`kind`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module

import torch
from torch import Tensor, nn

from models.architectures import qwens, transformers, unets
from models.architectures.shared import empirical_shift, size_shift
from models.prompts import Prompts
from models.tokens import Reader

# network, x, t, prompts in its dtype, guidance it is given
Call = Callable[[nn.Module, Tensor, float, Prompts, float | None], Tensor]
# pipeline, texts, negative texts or None, size_px, device, further options of encode_prompt
Encode = Callable[..., Prompts]
Shift = Callable[[Mapping, int, int], float]  # config of the scheduler, tokens of an image, steps -> mu


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
    patch: int = 2  # flow: latents of a side of what the network takes for one token
    shift: Shift = size_shift  # flow: how far the schedule is shifted, mu
    # guidance as the pipeline has it: each token's change no longer than without guidance
    rescaled: bool = False
    reader: Callable[..., Reader] | None = None  # pipeline, tokens -> how a chat's template is read
    processor: Callable | None = None  # of its tokenizer, in place of one that reads pictures too
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


def blank(its: Architecture, net: nn.Module, batch_size: int = 1) -> Prompts:
    """Encoded prompts of the right shapes that say nothing, where the network is."""
    shapes = its.conditioning(net.config)
    return Prompts(**{part: torch.zeros(batch_size, *shapes[part], device=net.device) for part in shapes})


UNSAFE = ("safety_checker", "feature_extractor", "image_encoder")  # nothing here draws for the public
KOHYA = {"unet_config": None}  # filled with the network's own, by which SGM's names are counted

UNET, TRANSFORMER = partial(Architecture, part="unet", lora=KOHYA), partial(Architecture, part="transformer")
FLOW = partial(TRANSFORMER, even=True, text_length=512)
ARCHITECTURES = {
    "sdxl": UNET(
        ("UNet2DConditionModel", "StableDiffusionXLPipeline"),
        call=unets.call_unet,
        encode=unets.encode_sdxl,
        conditioning=unets.conditioning_sdxl,
        absent=UNSAFE[1:],
    ),
    "sd": UNET(
        ("UNet2DConditionModel", "StableDiffusionPipeline"),
        call=unets.call_unet,
        encode=unets.encode_sd,
        conditioning=unets.conditioning_sd,
        absent=UNSAFE,
    ),
    "pixart": TRANSFORMER(
        ("PixArtTransformer2DModel", "PixArtAlphaPipeline"),
        call=transformers.call_pixart,
        encode=transformers.encode_pixart,
        conditioning=transformers.conditioning_pixart,
        text_length=120,
    ),
    "sd3": TRANSFORMER(
        ("SD3Transformer2DModel", "StableDiffusion3Pipeline"),
        call=transformers.call_sd3,
        encode=transformers.encode_sd3,
        conditioning=transformers.conditioning_sd3,
        text_length=256,
        absent=UNSAFE[1:],
    ),
    "flux": FLOW(
        ("FluxTransformer2DModel", "FluxPipeline"),
        call=transformers.call_flux,
        encode=transformers.encode_flux,
        conditioning=transformers.conditioning_flux,
        absent=UNSAFE[1:],
        lora={"return_alphas": True},
    ),
    "flux2": FLOW(
        ("Flux2Transformer2DModel", "Flux2KleinPipeline"),
        call=qwens.call_flux2,
        encode=qwens.encode_flux2,
        conditioning=qwens.conditioning_flux2,
        reader=qwens.read_flux2,
        patch=1,
        shift=empirical_shift,
    ),
    "zimage": FLOW(
        ("ZImageTransformer2DModel", "ZImagePipeline"),
        call=transformers.call_zimage,
        encode=transformers.encode_zimage,
        conditioning=transformers.conditioning_zimage,
        reader=transformers.read_zimage,
    ),
    "krea2": FLOW(
        ("Krea2Transformer2DModel", "Krea2Pipeline"),
        call=qwens.call_krea2,
        encode=qwens.encode_qwen,
        conditioning=qwens.conditioning_krea2,
        reader=qwens.read_krea2,
    ),
    "qwen": FLOW(
        ("QwenImageTransformer2DModel", "QwenImagePipeline"),
        call=qwens.call_qwen,
        encode=qwens.encode_qwenimage,
        conditioning=qwens.conditioning_qwen,
        reader=qwens.read_qwen,
        rescaled=True,
    ),
    "qwen21": FLOW(
        ("QwenImage21Transformer2DModel", "QwenImage21Pipeline"),
        call=qwens.call_qwen21,
        encode=qwens.encode_qwen21,
        conditioning=qwens.conditioning_qwen21,
        reader=qwens.read_qwen21,
        processor=qwens.text_only,
        patch=1,
    ),
}
