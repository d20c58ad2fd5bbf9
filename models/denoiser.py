"""The denoiser: a network wrapped at the border, after which everything speaks x0."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_unshuffle

from configs import UserError
from models.architectures import Call
from models.architectures.unets import call_unet
from models.lora_student import Delta, Scale, dial
from models.noise import Noise, to_x0
from models.prompts import Prompts, concatenate


@dataclass
class Denoiser:
    """A network wrapped into a thing that returns the clean latent x0. Counts what it is asked."""

    net: nn.Module | None  # none in an outline, which says how a member is sampled
    prediction_type: str = "eps"  # what the network predicts: eps, v, flow, sample
    # guidance that the network itself is told: LCM the scale minus one, Flux the scale
    guidance_embedding: float | None = None
    call: Call = call_unet  # how this kind of network is called, see models/architectures
    delta: Delta | None = None  # of a student that is a LoRA over the network
    # of the delta; a function of the noise level for one that changes from step to step
    lora_scale: Scale = 1.0
    rescaled: bool = False  # guidance turns what a token is told to change, and makes it no longer
    nfe: int = field(default=0, init=False)  # network evaluations per image, CFG's second one included

    def __call__(self, x: Tensor, noise: Noise, prompts: Prompts, guidance: float | None = None) -> Tensor:
        """x0 (B, C, H, W) at x; guidance None = conditional only, else x0_neg + guidance (x0 - x0_neg)."""
        if guidance is None:
            return self._x0(x, noise, prompts)
        if prompts.negative is None:
            raise UserError(
                "guidance needs prompts with a negative side; say guidance=null for conditional only"
            )
        both = self._x0(torch.cat([x, x]), noise, concatenate(prompts.negative, prompts))
        self.nfe += 1
        negative, positive = both.chunk(2)
        guided = negative + guidance * (positive - negative)
        return as_long(x - guided, x - positive, x) if self.rescaled else guided

    def turned(self, share: float) -> "Denoiser":
        """The same with a share of its delta's strength."""
        own = self.lora_scale
        return replace(self, lora_scale=(lambda noise: share * own(noise)) if callable(own) else share * own)

    def _x0(self, x: Tensor, noise: Noise, prompts: Prompts) -> Tensor:
        self.nfe += 1
        dtype = next(self.net.parameters()).dtype
        dial(self.net, self.delta, self.lora_scale(noise) if callable(self.lora_scale) else self.lora_scale)
        out = self.call(
            self.net, x.to(dtype), noise.t, prompts.conditional().to(dtype), self.guidance_embedding
        )
        return to_x0(x, out.to(x.dtype), noise, self.prediction_type)


def as_long(change: Tensor, like: Tensor, x: Tensor) -> Tensor:
    """x0 at x where each token, 2x2 latents, changes as guided and by as much as without guidance, as in
    Qwen-Image's pipeline.

    change, like: what is taken from x with and without, (B, C, H, W).
    """
    lengths = [pixel_unshuffle(part, 2).norm(dim=1, keepdim=True) for part in (like, change)]
    share = lengths[0] / lengths[1].clamp_min(1e-12)
    return x - change * share.repeat_interleave(2, 2).repeat_interleave(2, 3)
