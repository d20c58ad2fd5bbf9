"""Families: a base model and its distilled students, from a card to members that are ready to run."""

import hashlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal

import torch
import transformers.utils.logging
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import logging
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from configs import ROOT, UserError, merge
from models.noise import CLEAN, LAWS, ancestral
from models.prompts import Prompts
from models.sample import Denoiser, Member, alone, draw_noise, finish, levels_of

CARDS = ROOT / "configs/families"
DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}  # auto = fast_dtype
logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()


@dataclass
class MemberCard:
    """One member: where its network is, what it predicts, how it is sampled."""

    repo: str = ""  # Hub id, or folder relative to the project; empty = the family's
    revision: str | None = None  # commit or branch on the Hub; null = of the family's repo, the family's
    subfolder: str | None = "unet"  # folder of the network inside the repo; null = the repo itself
    file: str = ""  # a single weights file in the repo, for the base's architecture; empty = a diffusers folder
    sha256: str = ""  # of that file, checked when given
    licence: str = ""  # of the weights
    kind: Literal["eps", "v", "flow", "sample"] = "eps"  # what the network predicts
    law: Literal["vp", "flow"] = "vp"  # noise law
    steps: int = 50  # evaluations of a sampling run
    spacing: Literal["leading", "trailing", "linspace"] = "leading"  # timestep spacing
    timesteps: list[float] = field(default_factory=list)  # explicit timesteps, which win over the spacing
    eta: float = 0.0  # share of fresh noise per update: 0 DDIM and Euler, 1 LCM and DMD2
    ancestral: bool = False  # Euler-ancestral's eta instead
    guidance: float | None = None  # classifier-free guidance; null = conditional only
    guidance_embedding: float | None = None  # guidance scale minus one, told to networks with time_cond_proj_dim
    final: Literal["clean", "first"] = "clean"  # where the last update goes; first = training step 0, DDIM's set_alpha_to_one=false
    start: Literal["unit", "sigma"] = "unit"  # first x: eps, or sigma eps (Euler with trailing or linspace)


@dataclass
class FamilyCard:
    """A family: what its members share."""

    name: str = ""
    repo: str = ""  # pipeline with VAE, tokenizers and text encoders: Hub id, or folder relative to the project
    revision: str | None = None
    licence: str = ""
    size_px: int = 1024  # images are square
    base: str = "base"  # the member the others were distilled from
    clip: str = ""  # evaluator: a transformers CLIPModel, Hub id or folder
    probe: str = ""  # evaluator: an attribute probe's folder, where the world's truth is known
    prompts: list[str] = field(default_factory=list)  # what controls are measured on by default
    members: dict[str, MemberCard] = field(default_factory=dict)


def card(name: str) -> FamilyCard:
    """A family's card by name, or by the path of a YAML. Raises UserError with the names there are."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else CARDS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in CARDS.glob("*.yaml")))
        raise UserError(f"no family {name!r}: there are {known}, or give the path of a card.yaml")
    found = merge(FamilyCard, path)
    if found.base not in found.members:
        raise UserError(f"{path}: base {found.base!r} is not one of its members: {', '.join(found.members)}")
    return found


def split(member: str) -> tuple[str, str]:
    """'tiny/dmd' as ('tiny', 'dmd'). Raises UserError for anything else."""
    family, slash, name = member.rpartition("/")
    if not (family and slash and name):
        raise UserError(f"a member is written family/member, e.g. tiny/base; got {member!r}")
    return family, name


def place(repo: str) -> str:
    """A repo as diffusers wants it: a folder of the project as an absolute path, a Hub id as it is."""
    return str(ROOT / repo) if (ROOT / repo).is_dir() else repo


def fast_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU, fp32 on a CPU, where small networks gain little from bf16 and images would vary with the batch (LOG.md)."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


class Family:
    """A loaded family. VAE and text encoders are shared; networks are loaded when first asked for."""

    def __init__(self, name: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None):
        self.card = card(name)
        self.device = torch.device(device)
        self.dtype = dtype or fast_dtype(self.device)
        self._members: dict[str, Member] = {}
        self._pipe = None

    @property
    def pipe(self) -> StableDiffusionXLPipeline:
        """diffusers' own pipeline without a U-Net: VAE, tokenizers, text encoders, in fp32."""
        if self._pipe is None:
            self._pipe = _fetch(StableDiffusionXLPipeline, self.card.repo, revision=self.card.revision, unet=None, dtype=torch.float32)
            self._pipe.set_progress_bar_config(disable=True)
            for part in (self._pipe.vae, self._pipe.text_encoder, self._pipe.text_encoder_2):
                part.to(self.device).eval().requires_grad_(False)
        return self._pipe

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent."""
        side = self.card.size_px // self.pipe.vae_scale_factor
        return (self.pipe.vae.config.latent_channels, side, side)

    def encode(self, texts: list[str], negative: list[str] | None = None) -> Prompts:
        """Prompts as the pipeline itself encodes them; without negative texts the negative side is the pipeline's own (SDXL: zeros)."""
        size = self.card.size_px
        with torch.no_grad():
            tokens, negative_tokens, pooled, negative_pooled = self.pipe.encode_prompt(
                prompt=list(texts), device=self.device, do_classifier_free_guidance=True, negative_prompt=negative
            )
        ids = torch.tensor([size, size, 0, 0, size, size], device=self.device, dtype=torch.float32).expand(len(texts), 6)
        return Prompts(tokens.float(), pooled.float(), ids, Prompts(negative_tokens.float(), negative_pooled.float(), ids))

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = 64) -> Tensor:
        """Images (B, 3, size_px, size_px) in [-1, 1] from finished latents (B, C, H, W), in fp32 on the CPU."""
        vae = self.pipe.vae
        parts = (latents / vae.config.scaling_factor).to(vae.dtype).split(batch)
        return torch.cat([vae.decode(part).sample.float().clamp(-1, 1).cpu() for part in parts])

    @torch.no_grad()
    def to_latents(self, images: Tensor, batch: int = 64) -> Tensor:
        """Scaled latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1]; the mode where the VAE gives a distribution."""
        vae = self.pipe.vae
        found = [vae.encode(part.to(self.device, vae.dtype)) for part in images.split(batch)]
        latents = [out.latents if hasattr(out, "latents") else out.latent_dist.mode() for out in found]
        return torch.cat(latents).float() * vae.config.scaling_factor

    @torch.no_grad()
    def draw(self, member: Member, prompts: list[str] | Prompts, seeds: list[int], batch: int = 48) -> Tensor:
        """One image per prompt (text or encoded) and seed by the member alone, (B, 3, size_px, size_px) in [-1, 1], whatever the batch."""
        parts = []
        for rows in torch.arange(len(prompts)).split(batch):
            noise = draw_noise([seeds[r] for r in rows], self.latent_shape, len(member.levels), self.device)
            told = prompts[rows] if isinstance(prompts, Prompts) else self.encode([prompts[r] for r in rows])
            parts.append(self.decode(finish(alone(member), noise, told)))
        return torch.cat(parts)

    def free(self) -> None:
        """Lets the text encoders go, to be called when every prompt has been encoded; the VAE stays."""
        for part in [name for name in self.pipe.components if name.startswith("text_encoder")]:
            setattr(self.pipe, part, None)

    def member(self, name: str) -> Member:
        """A member with its network on the device. Raises UserError with the names there are."""
        if name not in self._members:
            if name not in self.card.members:
                raise UserError(f"no member {name!r} in family {self.card.name}: there are {', '.join(self.card.members)}")
            self._members[name] = self._load(name, self.card.members[name])
        return self._members[name]

    def _load(self, name: str, member: MemberCard) -> Member:
        repo, revision = self._source(member)
        if member.file:
            with _one_line(f"{member.file} of {repo}"):
                net = UNet2DConditionModel.from_config(self._base_config())
                net.load_state_dict(_weights(repo, revision, member))
        else:
            net = _fetch(UNet2DConditionModel, repo, revision=revision, subfolder=member.subfolder)
        net = net.to(self.device, self.dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
        denoiser = Denoiser(net, member.kind, member.guidance_embedding)
        return Member(
            name=f"{self.card.name}/{name}",
            denoiser=denoiser,
            levels=levels_of(member.law, member.spacing, member.steps, member.timesteps),
            law=member.law,
            eta=ancestral if member.ancestral else member.eta,
            guidance=member.guidance,
            final=CLEAN if member.final == "clean" else LAWS[member.law][0](0),
            start=member.start,
        )

    def _source(self, member: MemberCard) -> tuple[str, str | None]:
        """The repo and revision of a member's network."""
        return (member.repo, member.revision) if member.repo else (self.card.repo, member.revision or self.card.revision)

    def _base_config(self) -> dict:
        base = self.card.members[self.card.base]
        repo, revision = self._source(base)
        return UNet2DConditionModel.load_config(place(repo), subfolder=base.subfolder, revision=revision)


@contextmanager
def _one_line(what: str):
    """The many ways in which the Hub and a damaged file fail, in one line."""
    try:
        yield
    except (OSError, EOFError, ValueError, RuntimeError, HfHubHTTPError, SafetensorError, UnpicklingError) as error:
        raise UserError(f"cannot load {what}: {' '.join(str(error).split())[:200]}") from None


def _fetch(kind, repo: str, **options):
    """from_pretrained of a folder of the project or a repo of the Hub; raises UserError."""
    with _one_line(repo):
        return kind.from_pretrained(place(repo), **options)


def _weights(repo: str, revision: str | None, member: MemberCard) -> dict[str, Tensor]:
    """A single weights file, safetensors or a .bin of plain tensors; its hash is checked where the card has one."""
    folder = Path(place(repo))
    path = folder / member.file if folder.is_dir() else Path(hf_hub_download(repo, member.file, revision=revision))
    with path.open("rb") as file:
        if member.sha256 and hashlib.file_digest(file, "sha256").hexdigest() != member.sha256:
            raise UserError(f"{member.file} of {repo} is not the file of the card: its sha256 differs from {member.sha256[:12]}…")
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
