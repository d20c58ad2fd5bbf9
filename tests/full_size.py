"""The real thing at full size: SDXL with random weights of the published sizes, run by the real commands,
their memory against the plan's.

python -m pytest -m full tests/full_size.py, or python tests/full_size.py [part …]. Some 21 GB of disk under
FULL_CACHE (runs/full_cache), which later runs use again, less than 15 GB of memory, an hour on two cores;
with a GPU at 1024 px its own peak is measured instead.
"""

import json
import os
import re
import runpy
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from support import hub
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from configs import ROOT, replacing
from models.loading import source

CACHE = Path(os.environ.get("FULL_CACHE", ROOT / "runs/full_cache"))
NAMES = {torch.float16: "F16", torch.float32: "F32"}  # as safetensors writes them
RECORD = ROOT / "docs/records/full-size.json"  # what the script measured last, by part, as docs tell it
WITHIN = 0.15  # of what is measured
OUTSIDE = 3.0  # % of a transfer cell that may be spent outside network, VAE and evaluators


# the cache: a repository after the other, a tensor after the other


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
            opened.write(weight.to(dtype).contiguous().numpy().data)


def weights(key: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Small normal ones that keep activations finite: norms are ones, biases zeros, the rest keeps half of
    what comes in.
    """
    if key.endswith("bias") or not shape:
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.5 / prod(shape[1:]) ** 0.5


def shapes(net: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in net.state_dict().items()}


def build(cache: Path = CACHE) -> None:
    """Publishes what the check needs of SDXL: the base, DMD2's U-Net, Lightning's LoRA, a checkpoint of one's
    own, CLIP.
    """
    family = hub.write_configs(cache, "sdxl")
    words, parts = hub.clip_words(), json.loads((ROOT / "models/published.json").read_text())["sdxl"]
    words.model_max_length = 77
    ends = {
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
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
            config = CLIPTextConfig(**parts[part] | ends)
            config.save_pretrained(home / part)
            nets[f"{part}/model"] = kind(config)
        config = deepcopy(hub.EVALUATORS["clip"])
        config.text_config.update(ends)
        clip = CLIPModel(config)
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


# the runs: real commands, each in a process of its own

CARD = """extends: sdxl
size_px: {size_px}
members:
  base: {{steps: 2}}
  dmd2: {{timesteps: [999, 499]}}
  lightning-lora: {{steps: 2}}
  mine: {{file: {file}, steps: 2, spacing: trailing, start: sigma}}
"""
SMALL = [
    "steps=2",
    "batch_size=1",
    "trajectories=1",
    "sample_seeds=[1]",
    "sample_scales=[0,1]",
    "wandb=disabled",
    "overwrite=true",
]
FEW = ["evaluators=[clip]", "wandb=disabled", "overwrite=true", "prompts=[a man at a desk,a woman in a park]"]
PARTS = {  # name: what is run, {family} the user's card, {out} the folder of runs
    "slider": ["train/slider.py", "member={family}/base", "name=fp32", "dtype=fp32", "out={out}", *SMALL],
    "slider-nf4": [
        "train/slider.py",
        "member={family}/base",
        "name=nf4",
        "dtype=bf16",
        "quantize=nf4",
        "out={out}",
        *SMALL,
    ],
    "slider-watch": [
        "train/slider.py",
        "member={family}/base",
        "name=watched",
        "dtype=bf16",
        "watch=[{family}/lightning-lora]",
        "watch_every=2",
        "watch_prompts=1",
        "out={out}",
        *SMALL,
    ],
    "show": [
        "controls/show.py",
        "{out}/fp32/control.safetensors",
        "member={family}/mine",
        "dtype=bf16",
        "scales=[0,1]",
        "out={out}/show.png",
    ],
    "transfer": [
        "analysis/transfer.py",
        "family={family}",
        "controls=[{out}/fp32/control.safetensors]",
        "name=five",
        "dtype=bf16",
        "targets=[base,dmd2,lightning-lora,mine]",
        "seeds=1",
        "scales=[0,1]",
        "references=false",
        "out={out}",
        "cache={out}/cache",
        *FEW,
    ],
    "transfer-nf4": [
        "analysis/transfer.py",
        "family={family}",
        "controls=[{out}/fp32/control.safetensors]",
        "name=packed",
        "dtype=bf16",
        "quantize=nf4",
        "targets=[base,dmd2]",
        "seeds=1",
        "scales=[0,1]",
        "references=false",
        "out={out}",
        "cache={out}/cache",
        *FEW,
    ],
    "share": [
        "analysis/bench.py",
        "family={family}",
        "control={out}/fp32/control.safetensors",
        "targets=[base,dmd2]",
        "dtype=bf16",
        "evaluators=[clip]",
        "seeds=4",
        "rounds=1",
        "prompts=[a man at a desk,a woman in a park]",
    ],
    "trace": [
        "analysis/trace.py",
        "family={family}",
        "control={out}/fp32/control.safetensors",
        "students=[dmd2]",
        "plans=[]",
        "bands=[750]",
        "seeds=2",
        "dtype=bf16",
        "name=trace",
        "out={out}",
        *FEW,
    ],
}
PLANLESS = ("show", "share")


@dataclass
class Measured:
    """A part's memory, in GB."""

    part: str
    forecast: float | None
    peak: float
    seconds: float
    moment: str  # the forecast in words
    # % of a transfer cell that is spent outside network, VAE and evaluators, where it was taken
    outside: float | None = None

    @property
    def off(self) -> float | None:
        """By how much the forecast misses, as a share of what was measured."""
        return None if self.forecast is None else self.forecast / self.peak - 1


def run(part: str, cache: Path = CACHE) -> Measured:
    """What a part takes and what its plan says."""
    family, out = cache / "mine.yaml", cache / "runs"
    shutil.rmtree(out / "cache", ignore_errors=True)  # what is drawn already takes no memory
    family.write_text(
        CARD.format(size_px=1024 if torch.cuda.is_available() else 128, file=cache / "mine.safetensors")
    )
    words = [word.format(family=family, out=out) for word in PARTS[part]]
    words[0] = str(ROOT / words[0])
    settings = os.environ | {
        "HF_HUB_CACHE": str(cache),
        "HF_HOME": str(cache / "home"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    with (cache / f"{part}.log").open("w") as log:

        def command(*before: str, more: list[str]) -> None:
            done = subprocess.run(
                [sys.executable, *before, *words, *more],
                env=settings,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=cache,
            )
            assert done.returncode == 0, Path(log.name).read_text()[-3000:]

        if part not in PLANLESS:
            command(more=["dry_run=true"])
        start = time.time()
        command(str(Path(__file__).resolve()), "--measure", str(cache / "peak.json"), more=[])
    said = re.search(r"memory at the most: ([\d.]+) GB.*", Path(log.name).read_text())
    share = re.search(r"outside network, VAE and evaluators: (-?[\d.]+) %.*", Path(log.name).read_text())
    peak, words = json.loads((cache / "peak.json").read_text()), (said or share or [""])[0]
    return Measured(
        part,
        float(said[1]) if said else None,
        peak / 1e9,
        time.time() - start,
        words,
        float(share[1]) if share else None,
    )


def measure(file: str, words: list[str]) -> None:
    """Runs a script here, and writes the most memory that it took: torch's on a GPU, else this process's
    without mapped files.
    """
    most, sys.argv = [0], words
    sys.path.insert(0, str(Path(words[0]).parent))

    def watch() -> None:
        while True:
            status = Path("/proc/self/status").read_text()
            most[0] = max(most[0], 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1]))
            time.sleep(0.01)

    threading.Thread(target=watch, daemon=True).start()
    runpy.run_path(words[0], run_name="__main__")
    Path(file).write_text(
        json.dumps(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else most[0])
    )


@pytest.mark.full
@pytest.mark.parametrize("part", PARTS)
def test_a_command_runs_at_full_size_in_the_memory_that_its_plan_says(part):
    build()
    found = run(part)
    show([found])
    assert found.off is None or abs(found.off) <= WITHIN
    assert found.outside is None or found.outside <= OUTSIDE


def show(rows: list[Measured]) -> None:
    for row in rows:
        said = "no plan" if row.off is None else f"{row.forecast:5.1f} GB forecast, {100 * row.off:+.0f} %"
        print(
            f"{row.part:14} {row.peak:5.1f} GB measured, {said}, {row.seconds:.0f} s  {row.moment}",
            flush=True,
        )


def keep(measured: Measured) -> None:
    """Puts a part into the record that `make docs` reads."""
    record = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    row = {"gb": round(measured.peak, 1), "forecast_gb": measured.forecast, "outside": measured.outside}
    record[measured.part] = {**row, "device": "GPU" if torch.cuda.is_available() else "CPU, 128 px"}
    with replacing(RECORD) as new:
        new.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], sys.argv[3:])
    else:
        build()
        for part in sys.argv[1:] or PARTS:
            measured = run(part)
            show([measured])
            keep(measured)
