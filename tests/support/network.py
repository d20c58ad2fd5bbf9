"""A U-Net of SDXL's kind, as small as its parts allow, its output, and controls for it."""

from copy import deepcopy
from functools import cache

import torch
from diffusers import UNet2DConditionModel

from controls.lora import Card, Control, create, extract


def network(seed: int = 0, **changes) -> UNet2DConditionModel:
    """A U-Net of SDXL's kind, as small as its parts allow, for a test to do with as it likes."""
    return deepcopy(built(seed, **changes))


@cache
def built(seed: int, **changes) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    config = {
        "sample_size": 8,
        "block_out_channels": (32, 32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    }
    # frozen, as a member's network is: with weights that want gradients some CPUs take other kernels, which
    # round differently
    return UNet2DConditionModel(**{**config, **changes}).eval().requires_grad_(False)


def output(net: UNet2DConditionModel) -> torch.Tensor:
    rng = torch.Generator().manual_seed(7)
    x, text = torch.randn(2, 4, 8, 8, generator=rng), torch.randn(2, 5, 32, generator=rng)
    added = {"text_embeds": torch.randn(2, 32, generator=rng), "time_ids": torch.zeros(2, 6)}
    return net(x.to(net.dtype), 500, text.to(net.dtype), added_cond_kwargs=added).sample


def trained(
    net: UNet2DConditionModel,
    name: str,
    seed: int,
    layers: str = "noxattn",
    rank: int = 4,
    alpha: float = 1.0,
) -> Control:
    """A control with weights in both halves, as training would leave it."""
    net = deepcopy(net)
    create(net, name, layers, rank=rank, alpha=alpha, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    tensors = {
        key: 0.1 * torch.randn(value.shape, generator=rng) for key, value in extract(net, name).items()
    }
    card = Card(
        "slider",
        name,
        "tiny",
        "base",
        rank,
        alpha,
        layers,
        "c3lier",
        {"target": "a face"},
        "0f",
        {"torch": "2"},
    )
    return Control(card, tensors)
