"""Slow proofs, minutes each: make proof."""

import time

import pytest
import torch

from configs import ROOT, merge
from controls import formats
from controls.layers import targets
from controls.lora import attach, detach, strength
from models.families import Family
from models.sampler import alone, draw_noise, finish
from models.tiny.evaluators import Probe, column
from train import slider
from train.bench import memory

pytestmark = pytest.mark.slow


def test_layer_sets_of_full_size_sdxl():
    """70 transformer blocks, each with two attentions of four projections."""
    net = memory.unet("meta")
    assert sum(p.numel() for p in net.parameters()) == 2_567_463_684

    def count(layers):
        return len(targets(net, layers, "lierla"))

    assert (count("full"), count("selfattn"), count("xattn"), count("xattn-strict")) == (560, 280, 280, 140)


def test_the_default_slider_trains_in_under_4_minutes_and_moves_the_smile(tmp_path):
    start = time.time()
    path = slider.main(merge(slider.Config, [f"out={tmp_path}", "wandb=disabled"]))
    assert time.time() - start < 240
    family, probe = Family("tiny"), Probe.load(ROOT / "models/tiny/weights/probe")
    member, smiles = family.member("base"), []
    noise = draw_noise(range(300, 312), family.latent_shape, len(member.levels))
    attach(member.denoiser.net, formats.load(path), "mine", family="tiny")
    for scale in (-1.0, 0.0, 1.0):
        with torch.no_grad(), strength(member.denoiser.net, mine=scale):
            faces = family.decode(finish(alone(member), noise, family.encode(["portrait of a person"] * 12)))
        smiles.append(probe(faces)[:, column("smile")].mean().item())
    detach(member.denoiser.net)
    assert smiles[0] < smiles[1] < smiles[2] and smiles[2] - smiles[0] > 0.3
