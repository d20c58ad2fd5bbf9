"""Trains a Concept Slider from pairs of pictures: accelerate launch train/image_slider.py [config=FILE]
[key=value ...]

Without arguments: eye size from six pairs of the embedded world, on tiny/base. Pictures are a folder with one
folder per scale (data/-1/a.png and data/1/a.png are a pair), or one whose metadata.jsonl has the columns
file_name, scale and pair.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from configs import UserError, entry, list_of, note, quoted
from configs.ranges import RANGES
from controls.lora import strength
from models.families import Family, split
from models.tiny import world
from train import dry_run
from train.denoising import random_noise, squared_error
from train.pictures import read
from train.run import Run, Training

# the embedded world's attributes at scale -1 and 1
ENDS = {"age": (0.1, 0.9), "eyes": (0.1, 0.9), "smile": (-0.8, 0.8)}
REMEMBERED = "positive negative data steps batch_size gradient_accumulation_steps learning_rate seed"
Pictures = dict[float, dict[str, tuple[Tensor, str]]]  # by scale and the pair's name: a picture, its caption


@dataclass
class Config(Training):
    name: str = "eyes-image"  # of the control, and of the run folder
    data: str = "tiny:eyes"  # a folder of pictures, or tiny:ATTRIBUTE for pairs of the embedded world
    pairs: int = 6  # of the embedded world: how many pairs
    folders: list[str] = list_of()  # one per scale, inside data; empty = those whose names are numbers
    scales: list[float] = list_of()  # of the folders; empty = their names
    prompt: str = "portrait of a person"  # what a picture without a caption shows; also of the strips
    positive: str = "portrait of a person, big eyes"  # what more of it is: the card's words for measuring it
    negative: str = "portrait of a person, small eyes"  # what less of it is
    steps: int = 300  # optimizer steps
    learning_rate: float = 5e-4  # learning rate
    batch_size: int = 6  # pairs at once per process, all at one noise level
    out: str = "runs/image_slider"  # the run is written to out/name


@dataclass
class Pairs:
    """The same N things at every scale."""

    scales: list[float]
    images: Tensor  # (K, N, 3, H, W) in [-1, 1]
    captions: list[str]  # N, empty where there is none


def main(cfg: Config) -> Path | None:
    """Trains and returns the path of the control."""
    if cfg.dry_run:
        # both sides of a pair, there and back
        cost = dry_run.Cost(0, 6, kept=2 * cfg.pairs, pictures=cfg.pairs)
        return dry_run.show(cfg, lambda _: cost)
    # its tokenizers and its card; nothing is loaded or written for what is refused here
    family = Family(split(cfg.member)[0])
    if cfg.positive or cfg.negative:
        family.tell_apart(cfg.positive, cfg.negative)
    pairs = pictures(cfg, family.card.size_px)
    captions = [caption or cfg.prompt for caption in pairs.captions]
    run = Run(cfg, "slider", captions, [cfg.prompt])
    latents = torch.stack([run.family.to_latents(images).cpu() for images in pairs.images])
    prompts = run.family.encode(captions).conditional()
    recipe = cfg.settings(REMEMBERED) | {"pairs": latents.shape[1], "scales": pairs.scales}
    with run.training(cfg.prompt, recipe):
        for step in run.steps():
            for generator in run.parts(step):
                noise = random_noise(run.member, generator)
                rows = torch.randint(latents.shape[1], (cfg.batch_size,), generator=generator)
                # the same for all scales of a pair
                eps = torch.randn((cfg.batch_size, *latents.shape[2:]), generator=generator)
                clean, eps = (part.to(run.family.device) for part in (latents[:, rows], eps))
                for scale, x0 in zip(pairs.scales, clean, strict=True):
                    x = noise.alpha * x0 + noise.sigma * eps
                    with strength(run.net, {cfg.name: scale}):
                        # Concept Sliders, Gandikota et al. 2023, sec. 4.2
                        run.backward(squared_error(run.member, x, noise, prompts[rows], x0))
            run.descend(step)
        return run.save()


def pictures(cfg: Config, size_px: int) -> Pairs:
    """The pairs that `data` means. Raises UserError when they do not match."""
    source, _, attribute = cfg.data.partition(":")
    if source == "tiny" and attribute:
        return drawn(attribute, cfg.pairs, cfg.seed)
    folder = Path(os.path.expanduser(cfg.data))
    if not cfg.data or not os.path.isdir(folder):
        raise UserError(f"no folder {quoted(cfg.data)}; data is a folder of pictures, or tiny:ATTRIBUTE")
    entries = sorted(inner.name for inner in folder.iterdir() if not inner.name.startswith("."))
    numbered = [name for name in entries if number(name) is not None and (folder / name).is_dir()]
    named = cfg.folders or sorted(numbered, key=float)
    if not named and not cfg.scales:
        return listed(cfg.data, size_px)
    scales = cfg.scales or [number(name) for name in named]
    if len(scales) != len(named) or None in scales:
        raise UserError(
            f"folders {', '.join(named) or '(none)'} need as many scales, like scales=[-1,1]; there are "
            f"{len(cfg.scales)}"
        )
    if len(set(scales)) < len(scales) or len(set(named)) < len(named):
        raise UserError(
            f"folders {', '.join(named)} need scales of their own; got "
            f"{', '.join(f'{scale:g}' for scale in scales)}"
        )
    if left := [name for name in entries if name not in named]:
        note(f"{cfg.data}: left out, for they are no folders of a scale: {', '.join(left)[:200]}")
    by_scale = {}
    for scale, name in sorted(zip(scales, named, strict=True)):
        images, columns = read(str(folder / name), size_px)
        captioned = zip(images, columns["text"], strict=True)
        by_scale[scale] = dict(zip(columns["file_name"], captioned, strict=True))
    return matched(by_scale)


def number(name: object) -> float | None:
    """A scale, where the name of a folder or a cell is one."""
    least, most = RANGES["scales"]
    try:
        return float(name) if least <= float(name) <= most else None
    except (ValueError, TypeError, OverflowError):
        return None


def listed(folder: str, size_px: int) -> Pairs:
    """Pairs of a folder whose metadata has the columns scale and pair, and perhaps text."""
    images, columns = read(folder, size_px)
    if not {"scale", "pair"} <= columns.keys():
        wanted = "one folder per scale nor a metadata.jsonl with the columns file_name, scale and pair"
        raise UserError(f"{folder} has neither {wanted}")
    by_scale = {}
    rows = zip(columns["file_name"], images, columns["scale"], columns["pair"], columns["text"], strict=True)
    for name, image, cell, pair, caption in rows:
        scale = number(cell)
        pair_text = quoted(pair, 40)
        if scale is None or pair is None or pair == "":
            got = f"got {quoted(cell, 40)} and {pair_text}"
            raise UserError(f"{folder}: {name} needs a scale, which is a number, and a pair; {got}")
        if str(pair) in by_scale.setdefault(scale, {}):
            raise UserError(f"{folder}: {name} is a second picture of pair {pair_text} at scale {scale:g}")
        by_scale[scale][str(pair)] = image, caption
    return matched(by_scale)


def matched(by_scale: Pictures) -> Pairs:
    """Every pair at every scale but 0, which trains nothing.

    A pair has one caption: the first, by scale; others are said to be left out. Raises UserError for a
    picture without its partners.
    """
    scales = sorted(scale for scale in by_scale if scale)
    names = sorted(set().union(*(by_scale[scale] for scale in scales)))
    lonely = [f"{name} at {scale:g}" for scale in scales for name in names if name not in by_scale[scale]]
    if len(scales) < 2 or lonely:
        more = f" and {len(lonely) - 3} more" if len(lonely) > 3 else ""
        missing = ", ".join(lonely[:3]) or "a second scale"
        raise UserError(
            f"pairs do not match: missing {missing}{more}; every picture is needed at every scale"
        )
    captions = [[by_scale[scale][name][1] for scale in scales if by_scale[scale][name][1]] for name in names]
    unlike = sum(len(set(texts)) > 1 for texts in captions)
    if 0 in by_scale:
        note(f"{len(by_scale[0])} pictures at scale 0 are left out: they train nothing")
    if unlike:
        note(f"{unlike} pairs have other captions at other scales; the one at the lowest scale is used")
    return Pairs(
        scales,
        torch.stack([torch.stack([by_scale[scale][name][0] for name in names]) for scale in scales]),
        [texts[0] if texts else "" for texts in captions],
    )


def drawn(attribute: str, count: int, seed: int) -> Pairs:
    """Pairs of the embedded world that differ in one attribute alone."""
    if attribute not in ENDS:
        raise UserError(f"the embedded world draws pairs of {', '.join(ENDS)}; got {attribute!r}")
    ends = [
        [replace(face, **{attribute: end}) for face in world.faces(count, seed + 2)]
        for end in ENDS[attribute]
    ]
    phrases = [[text.split(", ") for text in world.captions(people, seed, keep=1.0)] for people in ends]
    common = [[phrase for phrase in low[1:] if phrase in high] for low, high in zip(*phrases, strict=True)]
    return Pairs(
        [-1.0, 1.0],
        torch.stack([world.to_unit(world.pictures(people)) for people in ends]),
        [", ".join(["portrait of a person", *shared]) for shared in common],
    )


if __name__ == "__main__":
    entry(main, Config)
