"""Trains a LoRA on pictures of one subject or style: accelerate launch train/lora.py [config=FILE] [key=value ...]

Without arguments: the watercolour style, which the embedded base has never seen, on tiny/base.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from configs import UserError, entry, load, run_folder, tracking, versions
from controls import formats
from controls.lora import Card, Control, create, detach, extract, fingerprint, parameters, strength
from models.families import DTYPES, Family, split
from models.noise import LAWS, TRAIN_STEPS, to_eps
from models.sample import Member, draw_noise
from models.tiny import world
from models.tiny.faces import STYLES, styled
from train.checkpoint import append, resumable, seeded
from train.samples import strip


@dataclass
class Config:
    name: str = "watercolour"  # of the control, and of the run folder
    member: str = "tiny/base"  # family/member to train on
    data: str = "tiny:watercolour"  # tiny:STYLE, a held-out style of the embedded world
    images: int = 200  # pictures to train on
    positive: str = "watercolour portrait of a person"  # what the LoRA makes: the card's words for measuring it
    negative: str = "portrait of a person"  # what it departs from
    token: str = "watercolour"  # put before half of the captions, so that the LoRA works with and without it
    rank: int = 4  # of the low-rank pairs
    alpha: float = 4.0  # effective strength is scale * alpha / rank
    layers: str = "full"  # layer set, see controls/targets.py
    scope: str = "c3lier"  # lierla: linear layers in attention blocks; c3lier: these plus convolutions
    steps: int = 500  # optimizer steps
    batch: int = 8  # pictures per step and process, all at one noise level
    rate: float = 1e-3  # AdamW's learning rate, cosine to zero
    seed: int = 0  # of the control, the noise and the order
    save_every: int = 100  # steps between checkpoints
    sample_scales: list[float] = field(default_factory=lambda: [0.0, 0.5, 1.0])  # columns of the strip
    sample_seeds: list[int] = field(default_factory=lambda: [11, 12, 13])  # rows of the strip
    prompt: str = "portrait of a person"  # of the strip
    dtype: str = "auto"  # of the network: auto (bf16 on a GPU, fp32 on a CPU), bf16, fp32; the control is always fp32
    out: str = "runs/lora"  # the run is written to out/name
    overwrite: bool = False  # start afresh instead of continuing
    wandb: str = "auto"  # auto, online, offline, disabled


def main(cfg: Config) -> Path:
    """Trains and returns the path of the control."""
    if cfg.dtype not in DTYPES:
        raise UserError(f"no dtype {cfg.dtype!r}; there are {', '.join(DTYPES)}")
    accelerator = Accelerator()
    family_name, member_name = split(cfg.member)
    family = Family(family_name, accelerator.device, DTYPES[cfg.dtype])
    member = family.member(member_name)
    net, folder = member.denoiser.net, Path(cfg.out) / cfg.name
    images, captions = pictures(cfg)
    if accelerator.is_main_process:
        run_folder(cfg, folder, cfg.overwrite, free=("wandb", "out"))
    accelerator.wait_for_everyone()
    latents = family.to_latents(images)
    prompts = family.encode([*captions, *(f"{cfg.token} {caption}" for caption in captions)]).conditional()
    noise = draw_noise(cfg.sample_seeds, family.latent_shape, len(member.levels), family.device)
    kept = ("positive", "negative", "data", "images", "token", "steps", "batch", "rate", "seed")
    card = Card("lora", cfg.name, family.card.name, member_name, cfg.rank, cfg.alpha, cfg.layers, cfg.scope,
                {key: getattr(cfg, key) for key in kept}, fingerprint(net), versions())  # fmt: skip

    create(net, cfg.name, cfg.layers, cfg.scope, cfg.rank, cfg.alpha, cfg.seed)
    weights = torch.nn.ParameterList(parameters(net, cfg.name))
    optimizer = torch.optim.AdamW(weights, cfg.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, cfg.steps))
    state = {"weights": weights, "optimizer": optimizer, "schedule": schedule}
    with tracking.start(folder, asdict(cfg), "train.lora", cfg.name, cfg.wandb) as tracker:
        for step in resumable(folder / "state.pt", state, cfg.steps, cfg.save_every, cfg.name, write=accelerator.is_main_process):
            loss = denoising(cfg, member, latents, prompts, seeded(cfg.seed, step, accelerator.process_index))
            optimizer.zero_grad()
            loss.backward()
            for weight in weights:
                weight.grad = accelerator.reduce(weight.grad, "mean")
            norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
            if not torch.isfinite(norm):
                raise UserError(f"the gradient is not finite at step {step}; the last state is kept, try a rate below {cfg.rate}")
            optimizer.step()
            schedule.step()
            if accelerator.is_main_process and step % 10 == 0:
                append(folder / "log.jsonl", {"step": step, "loss": loss.item(), "gradient": norm.item()})
                tracker.log({"loss": loss.item(), "gradient": norm.item(), "rate": schedule.get_last_lr()[0]}, step=step)
        if accelerator.is_main_process:
            path = folder / "control.safetensors"
            formats.save(Control(card, extract(net, cfg.name)), path)
            picture = strip(family, member, noise, cfg.name, cfg.sample_scales, cfg.prompt, folder / "samples/final.png")
            tracker.image("samples", picture, f"{cfg.name} at {cfg.sample_scales}")
            tracker.artifact(path, cfg.name, "control")
            print(f"control: {path}\nstrip of scales {cfg.sample_scales}: {picture}")
    detach(net)
    return folder / "control.safetensors"


def pictures(cfg: Config) -> tuple[Tensor, list[str]]:
    """The training images (N, 3, 64, 64) in [-1, 1] and their captions without the token."""
    source, _, style = cfg.data.partition(":")
    if source != "tiny" or style not in STYLES:
        raise UserError(f"data is tiny:STYLE with STYLE one of {', '.join(STYLES)}; got {cfg.data!r}")
    people = world.faces(cfg.images, cfg.seed + 1)
    captions = world.captions(people, cfg.seed)
    return world.to_unit(world.pictures([styled(face, style) for face in people])), captions


def denoising(cfg: Config, member: Member, latents: Tensor, prompts, generator: torch.Generator) -> Tensor:
    """The plain denoising loss at one noise level, eps against eps; half of the captions carry the token."""
    noise = LAWS[member.law][0](float(torch.randint(1, TRAIN_STEPS, (1,), generator=generator)))
    rows = torch.randint(len(latents), (cfg.batch,), generator=generator)
    told = rows + len(latents) * torch.randint(2, (cfg.batch,), generator=generator)
    eps = torch.randn((cfg.batch, *latents.shape[1:]), generator=generator).to(latents)
    x = noise.alpha * latents[rows] + noise.sigma * eps
    with strength(member.denoiser.net, {cfg.name: 1.0}):
        return (to_eps(x, member.denoiser(x, noise, prompts[told]), noise) - eps).square().mean()


if __name__ == "__main__":
    entry(lambda: main(load(Config)))
