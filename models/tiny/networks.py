"""The embedded family's architecture: SDXL's components at a small size, and the tokenizer of its world."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from models.tiny import world

TOKENS = 40  # longest caption of the world
SIZE_IDS = (64.0, 64.0, 0.0, 0.0, 64.0, 64.0)  # SDXL's micro-conditioning: original size, crop, target size


def new_vae() -> AutoencoderTiny:
    """The autoencoder, 64x64x3 <-> 16x16x4."""
    return AutoencoderTiny(
        encoder_block_out_channels=(24,) * 3,
        decoder_block_out_channels=(24,) * 3,
        num_encoder_blocks=(1, 1, 4),
        num_decoder_blocks=(5, 2, 1),
        latent_channels=4,
    )


def new_clip(words) -> CLIPModel:
    """The evaluator CLIP."""
    shared = {"hidden_size": 96, "intermediate_size": 288, "num_attention_heads": 3}
    text = {**shared, "num_hidden_layers": 2, **vocabulary(words)}
    vision = {**shared, "num_hidden_layers": 4, "image_size": 64, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer with merges learnt on the world's captions; its words are whole tokens."""
    people = world.faces(4000, 1, styled=0.3)
    bpe = Tokenizer(BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    letters = [c + end for c in "abcdefghijklmnopqrstuvwxyz0123456789-,.'" for end in ("", "</w>")]
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = BpeTrainer(
        vocab_size=600, special_tokens=special, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(world.captions(people, 1, keep=0.8), trainer)
    state = json.loads(bpe.to_str())["model"]
    vocab = list(state["vocab"])
    vocab += [c for c in letters if c not in vocab]
    words = CLIPTokenizer(
        vocab={w: i for i, w in enumerate(vocab)},
        merges=[tuple(m) for m in state["merges"]],
        model_max_length=TOKENS,
        pad_token="<|endoftext|>",
    )
    words.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def vocabulary(words) -> dict:
    """The part of a CLIP text config that the tokenizer decides."""
    return {
        "vocab_size": len(words),
        "max_position_embeddings": TOKENS,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }


def text_encoders(words) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """SDXL's pair of text encoders, small: the penultimate states of both are the tokens, the second also
    pools.
    """
    common = {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_attention_heads": 2,
        "projection_dim": 64,
        **vocabulary(words),
    }
    return (
        CLIPTextModel(CLIPTextConfig(**common, num_hidden_layers=2)),
        CLIPTextModelWithProjection(CLIPTextConfig(**common, num_hidden_layers=3)),
    )


def new_unet() -> UNet2DConditionModel:
    """SDXL's U-Net, small: attention at the two lower levels, micro-conditioning, 3.5 M parameters."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(48, 80, 96),
        layers_per_block=1,
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
        attention_head_dim=(2, 2, 3),
        cross_attention_dim=128,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=64 + 6 * 16,
    ).to(memory_format=torch.channels_last)


class Text(torch.nn.Module):
    """The two encoders as one module: token ids (B, L) -> tokens (B, L, 128), pooled (B, 64).

    Trained with the U-Net.
    """

    def __init__(self, words):
        super().__init__()
        self.one, self.two = text_encoders(words)

    def forward(self, ids):
        one = self.one(ids, output_hidden_states=True)
        two = self.two(ids, output_hidden_states=True)
        return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1), two.text_embeds


def tokens(words, texts: list[str]) -> Tensor:
    return words(
        texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    ).input_ids


def predict(net, x, t, states, pooled) -> Tensor:
    """The network's eps, (B, 4, 16, 16), at integer timesteps t (B,)."""
    size = torch.tensor(SIZE_IDS, dtype=x.dtype, device=x.device).expand(len(x), 6)
    return net(x, t, states, added_cond_kwargs={"text_embeds": pooled, "time_ids": size}).sample
