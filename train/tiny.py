"""Trains the embedded family, one part after the other: python train/tiny.py PART [key=value ...]

PART is vae, base, refine, dmd, dmd8, lcm, lightning, turbo, clip, probe, or all. Each part can be killed and
continues where it was.
"""

import sys

import torch

from configs import UserError, entry, load, plain
from train.tiny_base import base, refine, vae
from train.tiny_evaluators import clip, probe
from train.tiny_parts import Config
from train.tiny_students import dmd, dmd8, lcm, lightning
from train.tiny_turbo import turbo

PARTS = {
    "vae": vae,
    "base": base,
    "refine": refine,
    "dmd": dmd,
    "dmd8": dmd8,
    "lcm": lcm,
    "lightning": lightning,
    "turbo": turbo,
    "clip": clip,
    "probe": probe,
}


def main() -> None:
    parts, words = plain(sys.argv[1:])
    cfg = load(Config, words)
    unknown = [p for p in parts if p not in (*PARTS, "all")]
    if unknown or not parts:
        raise UserError(
            f"say which part to train: {', '.join(PARTS)} or all; got {' '.join(unknown) or 'none'}"
        )
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    for part in PARTS if parts == ["all"] else parts:
        PARTS[part](cfg)


if __name__ == "__main__":
    entry(main)
