"""The real thing at full size: SDXL with random weights of the published sizes, run by the real commands, their memory against the plan's.

python -m pytest -m full tests/full_size.py, or python tests/full_size.py [part …]. Some 21 GB of disk under FULL_CACHE (runs/full_cache),
which later runs use again, less than 15 GB of memory, an hour on two cores; with a GPU at 1024 px its own peak is measured instead.
"""

import json
import os
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path

import hub
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from test_loading import original
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from configs import ROOT, replacing
from models.loading import source

CACHE = Path(os.environ.get("FULL_CACHE", ROOT / "runs/full_cache"))
NAMES = {torch.float16: "F16", torch.float32: "F32"}  # as safetensors writes them
WITHIN = 0.15  # of what is measured


# the cache: a repository after the other, a tensor after the other


def write(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, taken: Mapping[str, torch.Tensor] | None = None) -> None:
    """A safetensors file of random weights, or of those taken, one at a time, so that it takes the memory of the largest."""
    if path.exists():
        return
    head, at = {"__metadata__": {"format": "pt"}}, 0
    for key, shape in shapes.items():
        end = at + prod(shape) * dtype.itemsize
        head[key], at = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}, end
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as new, new.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        for seed, (key, shape) in enumerate(shapes.items()):
            weight = taken[key] if taken and key in taken else weights(key, shape, seed)
            opened.write(weight.to(dtype).contiguous().numpy().data)


def weights(key: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Small normal ones that keep activations finite: norms are ones, biases zeros, the rest keeps half of what comes in."""
    if key.endswith("bias") or not shape:
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.5 / prod(shape[1:]) ** 0.5


def shapes(net: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in net.state_dict().items()}


def build(cache: Path = CACHE) -> None:
    """Publishes what the check needs of SDXL: the base, DMD2's U-Net, Lightning's LoRA, a checkpoint of one's own, CLIP."""
    family = hub.write_configs(cache, "sdxl")
    words, parts = hub.clip_words(), json.loads((ROOT / "models/published.json").read_text())["sdxl"]
    words.model_max_length = 77
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    home = hub.publish(cache, family.repo, family.revision)
    with init_empty_weights(include_buffers=False):
        net = hub.UNet2DConditionModel.from_config(parts["unet"])
        nets = {"unet/diffusion_pytorch_model": net, "vae/diffusion_pytorch_model": hub.AutoencoderKL.from_config(parts["vae"])}
        for part, kind in {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}.items():
            config = CLIPTextConfig(**parts[part] | ends)
            config.save_pretrained(home / part)
            nets[f"{part}/model"] = kind(config)
        clip = CLIPModel(CLIPConfig(  # openai/clip-vit-large-patch14
            text_config=CLIPTextConfig(**parts["text_encoder"] | ends).to_dict(),
            vision_config={"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
                           "image_size": 224, "patch_size": 14, "projection_dim": 768}, projection_dim=768))  # fmt: skip
    for name, part in nets.items():
        write(home / f"{name}.fp16.safetensors", shapes(part), torch.float16)
    hub.DDIMScheduler(**hub.BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1).save_pretrained(home / "scheduler")
    index = parts["model_index"] | {"tokenizer": ["transformers", "CLIPTokenizer"], "tokenizer_2": ["transformers", "CLIPTokenizer"],
                                    "scheduler": ["diffusers", "DDIMScheduler"]}  # fmt: skip
    (home / "model_index.json").write_text(json.dumps(index))
    for part in ("tokenizer", "tokenizer_2"):
        words.save_pretrained(home / part)

    its = family.members["lightning-lora"]
    pairs = {key: tuple(value.shape) for key, value in hub.lora(net, 0, rank=64).items()}
    write(hub.publish(cache, its.repo, its.revision) / its.lora, pairs, torch.float16)
    repo, revision, _ = source(family, family.members["dmd2"])
    student = hub.publish(cache, repo, revision) / family.members["dmd2"].file
    theirs = load_file(home / "unet/diffusion_pytorch_model.fp16.safetensors")  # mapped, not read
    if not student.exists():
        with replacing(student) as new:
            torch.save({key: value.clone() for key, value in theirs.items()}, new)

    for key, value in theirs.items():  # the checkpoint of a trainer holds all parts by Stability's names
        module, _, last = key.rpartition(".")
        setattr(net.get_submodule(module), last, torch.nn.Parameter(value, requires_grad=False))
    unet, prefixes = original(net), dict(zip(list(nets)[1:], ("first_stage_model", "conditioner.embedders.0.transformer",
                                                              "conditioner.embedders.1.model"), strict=True))  # fmt: skip
    rest = {f"{prefix}.{key}": shape for name, prefix in prefixes.items() for key, shape in shapes(nets[name]).items()}
    write(cache / "mine.safetensors", {key: tuple(value.shape) for key, value in unet.items()} | rest, torch.float16, unet)

    name, _, revision = family.clip.partition("@")
    seen = hub.publish(cache, name, revision)
    clip.config.save_pretrained(seen)
    write(seen / "model.safetensors", shapes(clip), torch.float32)
    words.save_pretrained(seen)
    pixels = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True,
              "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}  # fmt: skip
    (seen / "preprocessor_config.json").write_text(json.dumps(pixels))


if __name__ == "__main__":
    build()
