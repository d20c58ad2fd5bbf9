"""A Hub cache with random weights of the published sizes under the real names."""

import json
import os
import shutil
import struct
from collections.abc import Mapping
from copy import deepcopy
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from accelerate import init_empty_weights
from huggingface_hub import constants
from safetensors.torch import load_file
from support import hub
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from configs import ROOT, replacing
from models import budget
from models.architectures import ARCHITECTURES
from models.cards import FamilyCard
from models.loading import config, source

NAMES = {torch.float16: "F16", torch.float32: "F32", torch.bfloat16: "BF16"}  # as safetensors writes them
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where random numbers are drawn
STUDENTS = {"klein": "distilled", "krea2": "turbo", "qwen": "lightning", "qwen21": "lightning"}


def write(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    taken: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """A safetensors file of random weights, or of those taken, one at a time, so that it takes the memory of
    the largest.
    """
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
            weight = weight.to(dtype).flatten().cpu()
            opened.write(weight.view(torch.uint8).numpy().data)


def weights(key: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Small normal ones that keep activations finite: norms are ones, biases zeros, the rest keeps half of
    what comes in.
    """
    if key.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) < 2:
        return torch.ones(shape)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE) * (0.5 / prod(shape[1:]) ** 0.5)


def shapes(net: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in net.state_dict().items()}


def build(name: str, cache: Path) -> None:
    """Publishes what the check needs of a family."""
    if name == "sdxl":
        build_sdxl(cache)
    else:
        build_transformer(name, cache)


def build_sdxl(cache: Path) -> None:
    """Publishes the base, DMD2's U-Net, Lightning's LoRA, a checkpoint of one's own, CLIP."""
    family = hub.write_configs(cache, "sdxl")
    words, parts = clip_words(), json.loads((ROOT / "models/published.json").read_text())["sdxl"]
    home = hub.publish(cache, family.repo, family.revision)
    with init_empty_weights(include_buffers=False):
        net = hub.UNet2DConditionModel.from_config(parts["unet"])
        nets = {
            "unet/diffusion_pytorch_model": net,
            "vae/diffusion_pytorch_model": hub.AutoencoderKL.from_config(parts["vae"]),
        }
        for part, kind in {
            "text_encoder": CLIPTextModel,
            "text_encoder_2": CLIPTextModelWithProjection,
        }.items():
            config = CLIPTextConfig(**parts[part] | ends(words))
            config.save_pretrained(home / part)
            nets[f"{part}/model"] = kind(config)
    for name, part in nets.items():
        write(home / f"{name}.fp16.safetensors", shapes(part), torch.float16)
    hub.DDIMScheduler(**hub.BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1).save_pretrained(
        home / "scheduler"
    )
    index = parts["model_index"] | {
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
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
    unet, prefixes = (
        hub.original(net),
        dict(
            zip(
                list(nets)[1:],
                ("first_stage_model", "conditioner.embedders.0.transformer", "conditioner.embedders.1.model"),
                strict=True,
            )
        ),
    )
    rest = {
        f"{prefix}.{key}": shape
        for name, prefix in prefixes.items()
        for key, shape in shapes(nets[name]).items()
    }
    write(
        cache / "mine.safetensors",
        {key: tuple(value.shape) for key, value in unet.items()} | rest,
        torch.float16,
        unet,
    )
    publish_clip(cache, family)


def build_transformer(name: str, cache: Path) -> None:
    """Publishes a family's base, a student, which is the base's own file or a LoRA, and a user's LoRA."""
    family = hub.write_configs(cache, name)
    home, kind = hub.publish(cache, family.repo, family.revision), ARCHITECTURES[family.architecture]
    with TemporaryDirectory() as small, patch.object(constants, "HF_HUB_CACHE", str(cache)):
        hub.save(hub.pipeline(family), Path(small), None)
        index = json.loads(Path(small, "model_index.json").read_text()) | budget.published(
            kind.pipeline, family.repo, family.revision
        )
        for part in Path(small).iterdir():
            if part.name in ("tokenizer", "processor", "scheduler"):
                shutil.copytree(part, home / part.name, dirs_exist_ok=True)
        parts = list(budget.parts(family))
        with init_empty_weights(include_buffers=False):
            net = kind.network.from_config(config(family, family.base))
    (home / "model_index.json").write_text(json.dumps(index))
    for part, cls, values in parts:
        diffusers = part == "vae"
        with init_empty_weights(include_buffers=False):
            whole = cls.from_config(values) if diffusers else cls(cls.config_class(**values))
        file = "diffusion_pytorch_model" if diffusers else "model"
        write(home / part / f"{file}.safetensors", shapes(whole), torch.bfloat16)
    file = home / "transformer/diffusion_pytorch_model.safetensors"
    write(file, shapes(net), torch.bfloat16)
    layout = hub.STUDENTS.get(family.architecture, hub.PEFTS)
    its = family.members[STUDENTS[name]]
    repo, revision, _ = source(family, its)
    there = hub.publish(cache, repo, revision)
    pairs = {key: tuple(value.shape) for key, value in hub.lora(net, 0, rank=16, layout=layout).items()}
    write(cache / f"{name}.safetensors", pairs, torch.bfloat16)
    if its.lora:
        write(there / its.lora, pairs, torch.bfloat16)
    else:
        link = there / (its.subfolder or "") / file.name
        link.unlink(missing_ok=True)
        os.link(file, link)
    publish_clip(cache, family)


def clip_words() -> CLIPTokenizer:
    words = hub.clip_words()
    words.model_max_length = 77
    return words


def ends(words: CLIPTokenizer) -> dict[str, int]:
    """The special tokens that a config of CLIP names."""
    return {f"{end}_token_id": getattr(words, f"{end}_token_id") for end in ("bos", "eos", "pad")}


def publish_clip(cache: Path, family: FamilyCard) -> None:
    """CLIP, which looks at the pictures."""
    words, about = clip_words(), deepcopy(hub.EVALUATORS["clip"])
    about.text_config.update(ends(words))
    with init_empty_weights(include_buffers=False):
        clip = CLIPModel(about)
    name, _, revision = family.clip.partition("@")
    seen = hub.publish(cache, name, revision)
    clip.config.save_pretrained(seen)
    write(seen / "model.safetensors", shapes(clip), torch.float32)
    words.save_pretrained(seen)
    pixels = {
        "size": {"shortest_edge": 224},
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (seen / "preprocessor_config.json").write_text(json.dumps(pixels))
