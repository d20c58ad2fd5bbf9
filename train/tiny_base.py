"""The embedded base: its autoencoder, and its U-Net with the text encoders."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from configs import replacing
from models.noise import TRAIN_STEPS, vp
from models.tiny import world
from models.tiny.faces import ATTRIBUTES, claims
from models.tiny.networks import Text, new_unet, new_vae, predict, tokenizer, tokens
from train.tiny_parts import Config, Fit, fast

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LEVELS = torch.tensor([(vp(k).alpha, vp(k).sigma) for k in range(TRAIN_STEPS)])


def levels(t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha, sigma (B, 1, 1, 1) at integer timesteps."""
    known = LEVELS.to(t.device)
    return known[t, 0, None, None, None], known[t, 1, None, None, None]


def noised(x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x at integer timesteps (B,), of clean latents and noise (B, C, H, W)."""
    alpha, sigma = levels(t)
    return alpha * x0 + sigma * eps


def claimed(texts: Iterable[dict]) -> Tensor:
    """Whether each attribute is claimed, then what of it, as float32 (texts, 2 x attributes)."""
    return torch.tensor(
        [[float(a in claim) for a in ATTRIBUTES] + [claim.get(a, 0.0) for a in ATTRIBUTES] for claim in texts]
    )


def vae(cfg: Config) -> None:
    """The autoencoder, 64x64x3 <-> 16x16x4. It alone sees the held-out styles, on one portrait in ten."""
    torch.manual_seed(cfg.seed)
    net = new_vae().to(memory_format=torch.channels_last)
    images = world.pictures(world.faces(cfg.faces, cfg.seed, styled=0.1))
    fit = Fit(cfg, "vae", net, cfg.steps or 3600, 2e-3, warmup=0.05, beta=0.99)
    for generator in fit.steps():
        x = world.to_unit(images[torch.randint(len(images), (cfg.batch_size or 16,), generator=generator)])
        z = net.encode(x).latents
        # the decoder must bear small errors of the U-Net
        noisy = z + 0.05 * torch.randn(z.shape, generator=generator)
        out = net.decode(noisy).sample
        edges = F.l1_loss(out.diff(dim=-1), x.diff(dim=-1)) + F.l1_loss(out.diff(dim=-2), x.diff(dim=-2))
        spread = (z.square().mean() - 1).square() + z.mean((0, 2, 3)).square().sum()
        loss = F.mse_loss(out, x) + 0.5 * F.l1_loss(out, x) + 0.5 * edges + 1e-3 * spread
        fit.learn(loss, mse=F.mse_loss(out, x), std=z.std())
    with torch.no_grad():
        z = net.eval().encode(world.to_unit(world.pictures(world.faces(256, cfg.seed + 1)))).latents
    net.register_to_config(scaling_factor=round(1 / z.std().item(), 4))
    net.half().save_pretrained(Path(cfg.weights) / "base/vae")


@dataclass
class Data:
    """The training set: scaled latents of portraits, and three captions each as token ids."""

    latents: Tensor  # (N, 4, 16, 16)
    ids: Tensor  # (N, 3, TOKENS)

    def batch(self, size: int, generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(self.latents), (size,), generator=generator)
        which = torch.randint(self.ids.shape[1], (size,), generator=generator)
        return self.latents[rows], self.ids[rows, which]

    def to(self, device: str) -> "Data":
        return Data(self.latents.to(device), self.ids.to(device))


def dataset(cfg: Config, words) -> Data:
    """Encodes the world's plain portraits once, into `work`."""
    path = Path(cfg.work) / f"latents-{cfg.faces}-{cfg.seed}.safetensors"
    if not path.exists():
        people = world.faces(cfg.faces, cfg.seed)
        auto = AutoencoderTiny.from_pretrained(Path(cfg.weights) / "base/vae").float().eval()
        with torch.no_grad():
            latents = [
                auto.encode(world.to_unit(part)).latents
                for part in tqdm(world.pictures(people).split(100), "latents")
            ]
        ids = [tokens(words, world.captions(people, seed)) for seed in range(3)]
        with replacing(path) as new:
            save_file(
                {"latents": torch.cat(latents) * auto.config.scaling_factor, "ids": torch.stack(ids, 1)}, new
            )
    return Data(**load_file(path))


def base(cfg: Config) -> None:
    """The base: eps-prediction on SDXL's noise levels, min-SNR weights, one caption in ten dropped (to zeros,
    as SDXL does).
    """
    torch.manual_seed(cfg.seed)
    words = tokenizer(Path(cfg.weights) / "base/tokenizer")
    model = nn.ModuleDict({"unet": new_unet(), "text": Text(words)})
    denoise(cfg, "base", model, words, cfg.steps or 3200, learning_rate=1.2e-3, floor=0.0)


def refine(cfg: Config) -> None:
    """The base, second half: its text encoders learn to tell what a caption claims, then all goes on with
    more weight on high noise.

    The plain loss hardly sees x0 at high noise, where hats and positions are decided, and learns "no hat"
    late.
    """
    pipe = StableDiffusionXLPipeline.from_pretrained(Path(cfg.weights) / "base", dtype=torch.float32)
    text = Text(pipe.tokenizer)
    text.one, text.two = pipe.text_encoder, pipe.text_encoder_2
    model = nn.ModuleDict({"unet": pipe.unet.to(memory_format=torch.channels_last), "text": text})
    model.requires_grad_(True).train()
    read_claims(cfg, text, pipe.tokenizer)
    denoise(cfg, "refine", model, pipe.tokenizer, cfg.steps or 1500, learning_rate=8e-4, floor=0.1)


def read_claims(cfg: Config, text: Text, words, steps: int = 800, size: int = 64) -> None:
    """Trains the text encoders alone: what is claimed, by the pooled text and by the mean token."""
    captions = world.captions(world.faces(cfg.faces, cfg.seed), 3, keep=0.6)
    ids, truth = tokens(words, captions), claimed(map(claims, captions))
    torch.manual_seed(cfg.seed)
    heads = nn.ModuleList([nn.Linear(64, 2 * len(ATTRIBUTES)), nn.Linear(128, 2 * len(ATTRIBUTES))])
    both = nn.ModuleList([text, heads])
    fit = Fit(cfg, "claims", both, steps, 1e-3, decay=0.01)
    for generator in fit.steps(7):
        rows = torch.randint(len(ids), (size,), generator=generator)
        states, pooled = text(ids[rows])
        read = torch.stack([heads[0](pooled), heads[1](states.mean(1))])
        fit.learn((read - truth[rows]).square().mean())


def denoise(cfg: Config, part: str, model, words, steps: int, learning_rate: float, floor: float) -> None:
    """Trains U-Net and text encoders on the denoising loss and saves their average as the base.

    The loss weighs x0's error by the signal-to-noise ratio between `floor` and 5 (Hang et al. 2023, eq. 8).
    """
    size, data = cfg.batch_size or 40, dataset(cfg, words)
    unet = fast(model["unet"], cfg)
    fit = Fit(cfg, part, model, steps, learning_rate, warmup=0.08, beta=0.99, decay=0.01, slow=0.998)
    for generator in fit.steps(len(part)):
        x0, ids = data.batch(size, generator)
        t = torch.randint(TRAIN_STEPS, (size,), generator=generator)
        eps = torch.randn(x0.shape, generator=generator)
        keep = (torch.rand(size, generator=generator) > 0.1).float()
        alpha, sigma = levels(t)
        states, pooled = model["text"](ids)
        out = predict(unet, noised(x0, t, eps), t, states * keep[:, None, None], pooled * keep[:, None])
        snr = (alpha / sigma).square().flatten()
        fit.learn(((out - eps).square().mean((1, 2, 3)) * snr.clamp(floor, 5) / snr).mean())
    save_pipeline(cfg, fit.average, words)


def save_pipeline(cfg: Config, model, words) -> None:
    """The base as a complete diffusers folder, fp16."""
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **BETAS)
    pipe = StableDiffusionXLPipeline(
        vae=AutoencoderTiny.from_pretrained(Path(cfg.weights) / "base/vae"),
        unet=model["unet"],
        scheduler=scheduler,
        text_encoder=model["text"].one,
        text_encoder_2=model["text"].two,
        tokenizer=words,
        tokenizer_2=words,
        add_watermarker=False,
    )
    pipe.to(torch.float16).save_pretrained(Path(cfg.weights) / "base")
    # transformers loads what the config says, diffusers fp32: say the same
    for part in ("text_encoder", "text_encoder_2"):
        path = Path(cfg.weights) / "base" / part / "config.json"
        config = json.loads(path.read_text()) | {"dtype": "float32"}
        with replacing(path) as new:
            new.write_text(json.dumps(config, indent=2) + "\n")
