"""Cards: what a family and its members are, as typed YAML."""

import copy
import os
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml

from configs import ROOT, UserError, list_of, merge, plain_name, quoted
from models.architectures import ARCHITECTURES
from models.noise import TRAIN_STEPS, timesteps

CARDS = ROOT / "configs/families"
PEOPLE = (  # most sliders are about them
    "photo of a woman in a park",
    "photo of a man at a desk",
    "portrait of a chef in a kitchen",
    "portrait of a dancer on a stage",
    "photo of a farmer in a field",
    "photo of a student in a library",
    "portrait of a sailor on a boat",
    "photo of a person in the rain",
    "portrait of a nurse in a hospital",
    "photo of a cyclist on a street",
    "portrait of a singer on a stool",
    "photo of a child at a beach",
)


@dataclass
class MemberCard:
    """One member: where its network is, what it predicts, how it is sampled."""

    repo: str = ""  # Hub id, or folder relative to the project; empty = the family's
    revision: str | None = None  # commit or branch on the Hub; null = of the family's repo, the family's
    variant: str | None = None  # of the weight files, e.g. fp16; null = of the family's repo, the family's
    # folder of the network inside the repo; empty = unet or transformer, null = the repo itself
    subfolder: str | None = ""
    # a single weights file in the repo or on disk, for the base's architecture; empty = a diffusers folder
    file: str = ""
    lora: str = ""  # a LoRA file in the repo or on disk: this member is the base with it
    over: str = ""  # the member that it is over; empty = the base
    lora_scale: float = 1.0  # of that LoRA
    sha256: str = ""  # of the file, checked when given
    licence: str = ""  # of the weights
    trained_px: int = 0  # side of the images that it was trained on; 0 = the family's
    prediction_type: Literal["eps", "v", "flow", "sample"] = "eps"  # what the network predicts
    noise_schedule: Literal["vp", "vp-linear", "flow"] = "vp"  # how alpha and sigma follow t
    steps: int = 50  # evaluations of a sampling run
    # timestep spacing; flows take their scheduler's instead
    spacing: Literal["leading", "trailing", "linspace"] = "leading"
    timesteps: list[float] = list_of()  # explicit timesteps, which win over the spacing
    eta: float = 0.0  # share of fresh noise per update: 0 DDIM and Euler, 1 LCM and DMD2
    ancestral: bool = False  # Euler-ancestral's eta instead
    guidance: float | None = None  # classifier-free guidance; null = conditional only
    # what the network itself is told: LCM the guidance scale minus one, Flux the scale
    guidance_embedding: float | None = None
    # classifier-free guidance of the base while this student was distilled from it; null = unknown
    teacher_guidance: float | None = None
    # where the last update goes; first = training step 0, DDIM's set_alpha_to_one=false
    final: Literal["clean", "first"] = "clean"
    start: Literal["unit", "sigma"] = "unit"  # first x: eps, or sigma eps (Euler with trailing or linspace)
    # flows: values that differ from the config of the scheduler in the repository, e.g. base_shift
    scheduler: dict[str, Any] = field(default_factory=dict)


@dataclass
class FamilyCard:
    """A family: what its members share."""

    name: str = ""
    extends: str = ""  # another card, by name or path, of which this one says only what differs
    architecture: str = "sdxl"  # kind of network and pipeline, see models/architectures
    # pipeline with VAE, tokenizers and text encoders: Hub id, or folder relative to the project
    repo: str = ""
    revision: str | None = None  # commit or branch on the Hub
    variant: str | None = None  # of the weight files, e.g. fp16; null = the plain ones
    licence: str = ""
    size_px: int = 1024  # images are square
    text_length: int | None = None  # tokens of a T5 or Qwen prompt; null = the pipeline's default
    # precision of the text encoders; network = as the networks, for those of many GB
    encoders: Literal["fp32", "network"] = "fp32"
    # latents at once in training, where the run does not say; a slider's step then takes less than 24 GB if
    # any does
    batch_size: int = 8
    base: str = "base"  # the member the others were distilled from
    # evaluator: a transformers CLIPModel, a folder or a Hub id, with @revision where it is pinned
    clip: str = ""
    siglip: str = ""  # evaluator: a SiglipModel, likewise
    dino: str = ""  # evaluator without words: a Dinov2Model, likewise
    dreamsim: str = ""  # evaluator without words: kind of DreamSim (extra dreamsim), e.g. ensemble
    inception: str = ""  # evaluator without words: torch-fidelity's inception-v3-compat (extra inception)
    probe: str = ""  # evaluator: an attribute probe's folder, where the world's truth is known
    geometry: str = ""  # evaluator without weights: what its hand-made measurements know, portraits
    prompts: list[str] = list_of(*PEOPLE)  # what controls are measured on by default
    # a file of further ones, a prompt per line, for measurements that need many
    more_prompts: str = "configs/prompts/people.txt"
    members: dict[str, MemberCard] = field(default_factory=dict)
    default: list[str] = list_of()  # members that a run takes that names none; empty = all

    @property
    def usual(self) -> list[str]:
        """The members that a run takes where it names none."""
        return self.default or list(self.members)

    def holder(self, name: str) -> str:
        """The member whose network a member runs: for a LoRA the one that it is over, else itself."""
        its = self.members[name]
        return (its.over or self.base) if its.lora else name


def card(name: str) -> FamilyCard:
    """A family's card by name, or by the path of a YAML. Raises UserError with the names there are."""
    path = _path(name)
    layers = _layers(path)
    return copy.deepcopy(_card(path, *((layer, layer.read_bytes()) for layer in layers)))


@cache
def _card(path: Path, *layers: tuple[Path, bytes]) -> FamilyCard:
    """The same, by the cards that it extends and their contents."""
    found = merge(FamilyCard, *(layer for layer, _ in layers))
    for name in (found.name, *found.members):  # they name folders, and members stand before a plan's colon
        plain_name(name, f"{path}: name")
        if ":" in name:
            raise UserError(f"{path}: name={name!r} has a colon, which stands between a member and a plan")
    if found.architecture not in ARCHITECTURES:
        raise UserError(
            f"{path}: no architecture {found.architecture!r}; there are {', '.join(ARCHITECTURES)}"
        )
    if found.base not in found.members:
        raise UserError(f"{path}: base {found.base!r} is not one of its members: {', '.join(found.members)}")
    if strange := [name for name in found.default if name not in found.members]:
        raise UserError(
            f"{path}: default names {strange[0]!r}, which is none of its members: {', '.join(found.members)}"
        )
    for member, its in found.members.items():
        if (its.noise_schedule == "flow") != (its.prediction_type == "flow"):
            raise UserError(
                f"{path}: member {member} has noise_schedule {its.noise_schedule} and prediction_type "
                f"{its.prediction_type}; flow goes with flow"
            )
        if bool(its.file) + bool(its.lora) > 1 or (member == found.base and its.lora):
            raise UserError(
                f"{path}: member {member} has a file or a lora, not both, and the base has no lora"
            )
        holder = found.members.get(its.over)
        if its.over and not (its.lora and holder and not holder.lora):
            raise UserError(
                f"{path}: member {member} is over {its.over!r}; a LoRA is over a member that is none itself"
            )
        if its.subfolder == "":
            its.subfolder = ARCHITECTURES[found.architecture].part
        if its.guidance == 1:
            its.guidance = None  # the same, in half of the evaluations
        _schedule(its, f"{path}: member {member}")
    return found


def _schedule(member: MemberCard, where: str) -> None:
    """Raises UserError for noise levels that no run could go through: they fall, and lie where the network
    was trained.
    """
    if not 1 <= member.steps <= TRAIN_STEPS:
        raise UserError(f"{where} has steps {member.steps}; there can be 1 … {TRAIN_STEPS}")
    last = TRAIN_STEPS if member.noise_schedule == "flow" else TRAIN_STEPS - 1
    steps = member.timesteps
    if not steps and member.noise_schedule != "flow":
        steps = timesteps(member.spacing, member.steps)
    if any(not 0 <= t <= last for t in steps):
        raise UserError(f"{where} has timesteps outside of 0 … {last}: {steps}")
    if any(b >= a for a, b in pairwise(steps)):
        raise UserError(f"{where} has timesteps that do not fall: {', '.join(f'{t:g}' for t in steps[:8])}")


def split(member: str) -> tuple[str, str]:
    """'tiny/dmd' as ('tiny', 'dmd'). Raises UserError for anything else."""
    family, slash, name = member.rpartition("/")
    if not (family and slash and name):
        raise UserError(f"a member is written family/member, e.g. tiny/base; got {member!r}")
    return family, name


def _path(name: str) -> Path:
    path = Path(name) if name.endswith((".yaml", ".yml")) else CARDS / f"{name}.yaml"
    if not os.path.isfile(path):  # unlike Path's own, also where a name is too long
        known = ", ".join(sorted(p.stem for p in CARDS.glob("*.yaml")))
        raise UserError(f"no family {quoted(name)}: there are {known}, or give the path of a card.yaml")
    return path


def _layers(path: Path) -> list[Path]:
    """The cards that a card extends, the first one first, and itself last."""
    found = [path]
    while above := _extends(found[0].read_bytes()):
        found.insert(0, _path(above))
        if len(found) > 9:
            raise UserError(f"{path} extends itself: {above}")
    return found


@cache
def _extends(text: bytes) -> str:
    """What a card extends; nothing for a broken one, of which `merge` says more."""
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return ""
    above = found.get("extends") if isinstance(found, dict) else ""
    return above if isinstance(above, str) else ""
