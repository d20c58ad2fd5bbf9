"""What training a control will load, ask and hold, said before it starts and without weights: --plan of every trainer."""

from collections.abc import Callable

import torch

from controls.lora import create, detach, parameters
from models import budget, devices
from models.families import DTYPES, Family, split
from models.sample import Member
from train.peak import follow
from train.run import Training, check

Cost = Callable[[Member], tuple[float, float]]  # evaluations before the first step; and per latent and step, a backward pass counted as two


def show(cfg: Training, cost: Cost) -> None:
    """Prints what is loaded, network evaluations, time, the control's size and the memory of a step. Raises UserError as a run would."""
    check(cfg)
    accelerator, (name, member) = devices.start(cfg), split(cfg.member)
    if not accelerator.is_main_process:
        return
    family = Family(name, accelerator.device, DTYPES[cfg.dtype], bare=True)
    bare = family.member(member)
    before, each = cost(bare)
    asked = before + each * cfg.steps * cfg.batch * cfg.accumulate * accelerator.num_processes * (4 / 3 if cfg.checkpointing else 1)
    others = {other: 0.0 for _, other in map(split, cfg.watch)}
    print(f"{cfg.name} on {cfg.member}: {cfg.steps} steps of {cfg.batch * cfg.accumulate * accelerator.num_processes} latents")
    print(budget.forecast(family.card, {member: asked} | others, family.dtype, family.device))
    net = torch.nn.Module.to(bare.denoiser.net, "meta", family.dtype).requires_grad_(False)
    create(net, "control", cfg.layers, cfg.scope, cfg.rank)
    weights = parameters(net, "control")
    print(f"control: {sum(weight.numel() for weight in weights) / 1e6:.2f} million weights in {len(weights) // 2} layers")
    detach(net)
    found = follow(net, family.architecture, cfg, family.latent_shape, bare.law, cfg.checkpointing)
    rest = (found["peak"] - found["network"]) / budget.GB
    network = budget.network_need(family.card, family.card.base if family.card.members[member].lora else member, family.dtype, cfg.quantize)
    print(f"memory of a step: {network.memory / budget.GB + rest:.1f} GB, of which {rest:.2g} for control, optimizer and activations;"
          " the VAE and the latents that are trained on come on top")  # fmt: skip
