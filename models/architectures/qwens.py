"""Flux.2 klein, Krea 2, Qwen-Image and Qwen-Image 2.1: transformers conditioned on a Qwen's text."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models.architectures.shared import by_length, clock, pack, paired, places, trimmed, unpack
from models.noise import TRAIN_STEPS
from models.prompts import Prompts
from models.tokens import Reader, chat

PLACES = 4096  # tokens that Qwen-Image 2.1 has places for behind which an image still fits


def call_flux2(net: nn.Module, x: Tensor, t: float, prompts: Prompts, guidance: float | None) -> Tensor:
    """Flux.2: a sequence of latents that are patches already, places in four axes, a clock from 1 to 0."""
    height, width = x.shape[2:]
    words = torch.zeros(prompts.tokens.shape[1], 4, device=x.device)
    words[:, 3] = torch.arange(len(words), device=x.device)
    strength = torch.full((len(x),), guidance or 0.0, device=x.device) if net.config.guidance_embeds else None
    out = net(
        x.flatten(2).mT,
        encoder_hidden_states=prompts.tokens,
        timestep=clock(x, t) / TRAIN_STEPS,
        img_ids=places(height, width, x.device, 4),
        txt_ids=words,
        guidance=strength,
    )
    return out.sample.mT.unflatten(2, (height, width))


def call_krea2(net: nn.Module, x: Tensor, t: float, prompts: Prompts, guidance: float | None) -> Tensor:
    """Krea 2: latents packed 2x2, texts as stacks of their encoder's layers, a clock from 1 to 0."""
    height, width = x.shape[2] // 2, x.shape[3] // 2
    words = torch.zeros(prompts.tokens.shape[1], 3, device=x.device)
    out = net(
        pack(x),
        encoder_hidden_states=prompts.tokens,
        timestep=clock(x, t) / TRAIN_STEPS,
        position_ids=torch.cat([words, places(height, width, x.device)]),
        encoder_attention_mask=None if prompts.mask is None else prompts.mask.bool(),
    )
    return unpack(out.sample, height, width)


def call_qwen(net: nn.Module, x: Tensor, t: float, prompts: Prompts, guidance: float | None) -> Tensor:
    """Qwen-Image: latents packed 2x2, masked texts, a clock from 1 to 0."""
    height, width = x.shape[2] // 2, x.shape[3] // 2
    out = net(
        pack(x),
        encoder_hidden_states=prompts.tokens,
        encoder_hidden_states_mask=None if prompts.mask is None else prompts.mask.bool(),
        timestep=clock(x, t) / TRAIN_STEPS,
        img_shapes=[[(1, height, width)]] * len(x),
    )
    return unpack(out.sample, height, width)


def call_qwen21(net: nn.Module, x: Tensor, t: float, prompts: Prompts, guidance: float | None) -> Tensor:
    """Qwen-Image 2.1: latents as they are, behind the text in one sequence, a clock from 1 to 0.

    An image's place is behind its text, padding included, so that texts of each length are asked by
    themselves: an image is then the same alone and in a batch, as in the pipeline for one prompt.
    """
    height, width = x.shape[2:]
    out = torch.empty_like(x)
    with Counting() if x.is_meta else torch.device(x.device):
        for rows, words in by_length(prompts):
            slots = torch.zeros(len(words), words.shape[1] + height * width // 4, dtype=torch.bool)
            slots[:, words.shape[1] :] = True  # one for 2x2 latents
            seen = net(
                x[rows].flatten(2).mT,
                encoder_hidden_states=words,
                timestep=clock(x[rows], t) / TRAIN_STEPS,
                img_shapes=[[(1, height, width)]] * len(words),
                img_mask=slots,
            ).sample
            image = seen[:, -height * width :]
            out[rows] = image.mT.unflatten(2, (height, width)).to(out.dtype)
    return out


class Counting(TorchFunctionMode):
    """Inside, a network on `meta` can count in masks, which have values on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.zeros, torch.tensor, torch.arange, torch.empty, torch.ones):
            kwargs = {"device": "cpu"} | (kwargs or {})
        if func is torch.where and any(arg.is_meta for arg in args[1:] if isinstance(arg, Tensor)):
            args = [arg.to("meta") for arg in args]
        return func(*args, **(kwargs or {}))


def encode_flux2(pipe, texts: list[str], negative: list[str] | None, size_px: int, device, **more) -> Prompts:
    """Flux.2 klein: three layers of Qwen3 side by side, of the chat's template at one length, with its
    padding; the negative side is the empty text.
    """
    away = negative or [""]
    tokens, _ = pipe.encode_prompt([*texts, *away], device, **more)
    return paired(Prompts(tokens), len(texts), len(away))


def encode_qwen(
    pipe, texts: list[str], negative: list[str] | None, size_px: int, device, empty: str = "", **more
) -> Prompts:
    """Krea 2 and Qwen-Image: tokens of a template with their mask; empty: the negative side's text."""
    away = negative or [empty]
    tokens, mask, *_ = pipe.encode_prompt(prompt=[*texts, *away], device=device, **more)
    if mask is None:  # no text is padded
        mask = tokens.new_ones(tokens.shape[:2])
    tokens, mask = trimmed(tokens, mask.bool())
    return paired(Prompts(tokens, mask=mask), len(texts), len(away))


encode_qwenimage = partial(encode_qwen, empty=" ")


def encode_qwen21(
    pipe, texts: list[str], negative: list[str] | None, size_px: int, device, **more
) -> Prompts:
    """Qwen-Image 2.1, which reads texts of any length."""
    return encode_qwen(pipe, texts, negative, size_px, device, " ")


def text_only(tokenizer):
    """Of Qwen3-VL's processor of texts and pictures what reads texts: the rest would need torchvision."""
    from transformers import Qwen3VLProcessor

    class TextOnly(Qwen3VLProcessor):
        def __init__(self):
            self.tokenizer = tokenizer

        def __call__(self, text: list[str], **how):
            return tokenizer(text, **how)

        def apply_chat_template(self, turns: list[dict], **how) -> list[list[int]]:
            return [tokenizer.apply_chat_template(turns, **how)]

    return TextOnly()


def read_flux2(pipe, length: int) -> Reader:
    """How Flux.2 klein reads a text; the others likewise."""
    return Reader(pipe.tokenizer, length, chat(pipe.tokenizer, thinking=False))


def read_krea2(pipe, length: int) -> Reader:
    before = pipe.prompt_template_encode_start_idx - pipe.prompt_template_encode_num_suffix_tokens
    return Reader(pipe.tokenizer, length + before, pipe.prompt_template_encode_prefix.__add__)


def read_qwen(pipe, length: int) -> Reader:
    before = pipe.prompt_template_encode_start_idx
    return Reader(pipe.tokenizer, length + before, pipe.prompt_template_encode.format)


def read_qwen21(pipe, length: int) -> Reader:
    return Reader(pipe.processor.tokenizer, PLACES, pipe.prompt_template_t2i.format)


def conditioning_flux2(c) -> dict:
    return {"tokens": (512, c.joint_attention_dim)}


def conditioning_krea2(c) -> dict:
    return {"tokens": (512, c.num_text_layers, c.text_hidden_dim)}


def conditioning_qwen(c) -> dict:
    return {"tokens": (512, c.joint_attention_dim)}


def conditioning_qwen21(c) -> dict:
    return {"tokens": (512, c.context_in_dim)}
