"""What memory a run takes at the most, moment by moment, from configs alone: every tensor followed on torch's
`meta` device.
"""

import json
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

import psutil
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configs import UserError
from models import budget
from models.architectures import ARCHITECTURES
from models.batches import TOKENS
from models.cards import FamilyCard
from models.evaluators import EVALUATORS, PACKAGED, Picture
from models.latents import LATENTS, TILED
from models.loading import latent_shape, one_line, published
from models.offload import Memory

if TYPE_CHECKING:  # families are on top of what is forecast
    from models.families import Family

VIEWS = 3  # copies of a picture that an evaluator makes before it is as small as the evaluator sees it


@dataclass(frozen=True)
class Moment:
    """What is in memory together at one time of a run."""

    when: str
    held: dict[str, float]  # bytes by what they are of

    @property
    def total(self) -> float:
        return total(self.held)


def said(moments: Callable[[], Iterable[Moment]], family: "Family") -> str:
    """The fullest moment in words, and whether the device holds it, or why it cannot be told."""
    try:
        most = max(moments(), key=lambda moment: moment.total)
    except UserError as error:
        return f"memory at the most: unknown ({error})"
    parts = sorted(most.held.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{size / budget.GB:.2g} {part}" for part, size in parts if size >= 0.005 * most.total)
    room = family.memory.gpu_gb * budget.GB or budget.free(family.device)
    fits = f"it fits in {room / budget.GB:.1f} GB"
    if most.total > room:
        fits = f"it does not fit in {room / budget.GB:.1f} GB{smaller(family)}"
    return f"memory at the most: {most.total / budget.GB:.1f} GB, {most.when}: {shown}; {fits}"


def smaller(family: "Family") -> str:
    """What would take less memory and is not done yet."""
    memory, batch_size = family.memory, family.drawing.size
    tried = {
        "memory.offload=true": memory.offload or family.device.type == "cpu",
        "quantize=nf4": family.quantize,
        "batch_size=1": batch_size == 1,
        "memory.tiling=true": memory.tiling,
    }
    left = [way for way, done in tried.items() if not done]
    return f"; less is needed with {', '.join(left)}" if left else ""


def program(device: torch.device) -> dict[str, float]:
    """On a CPU, where it shares the memory: what this process holds besides mapped files."""
    about = psutil.Process().memory_info()
    return {} if device.type == "cuda" else {"the program": float(about.rss - getattr(about, "shared", 0))}


def shared(card: FamilyCard, dtype: torch.dtype) -> tuple[dict[str, float], dict[str, float]]:
    """The VAE, and the text encoders."""
    parts = {need.part: need.memory for need in budget.shared(card, dtype)}
    return {"VAE": parts.pop("vae", 0.0)}, {"text encoders": sum(parts.values())}


def reading_of(card: FamilyCard, dtype: torch.dtype) -> dict[str, float]:
    """What the largest text encoder gives of the texts that it reads at once: the states of each layer, and
    of a language model its logits.
    """
    if not ARCHITECTURES[card.architecture].text_length:  # CLIP alone, which is small
        return {}
    most = 0
    for part, kind, config in budget.parts(card):
        said = config.get("text_config") or config
        layers = said.get("num_hidden_layers") or said.get("num_layers")
        if not part.startswith("text_encoder") or not layers:
            continue
        logits = (
            said["vocab_size"] if kind.__name__.endswith(("ForCausalLM", "ForConditionalGeneration")) else 0
        )
        most = max(most, (said.get("hidden_size") or said["d_model"]) * (layers + 1) + logits)
    size = dtype.itemsize if card.encoders == "network" else torch.float32.itemsize
    return {"what they make of prompts": float(TOKENS * most * size)}


def held_evaluators(card: FamilyCard, names: Iterable[str], device: torch.device) -> dict[str, float]:
    """Evaluators; on a CPU without those that transformers maps from their files, as `program` is without
    what is mapped.
    """
    mapped = [
        name
        for name in names
        if device.type == "cpu" and issubclass(EVALUATORS[name], Picture) and name not in PACKAGED
    ]
    return {name: budget.evaluator_need(card, name).memory for name in names if name not in mapped}


def networks(
    card: FamilyCard, names: Iterable[str], dtype: torch.dtype, quantize: str = ""
) -> dict[str, float]:
    """The networks of members, a base once for all of its LoRA students, and these students' deltas."""
    needed = {}
    for name in dict.fromkeys(names):
        if card.members[name].lora:
            needed[name] = budget.delta_need(card, name, dtype)
        own = card.holder(name)
        needed[own] = budget.network_need(card, own, dtype, quantize)
    return {need.part: need.memory for need in needed.values()}


def sums(tensors: dict[str, Tensor], dtype: torch.dtype, count: int = 1) -> dict[str, float]:
    """What `fusing` holds beside so many networks for a control: its layers' weights.

    count: 0 for quantised networks, beside which the control itself is held.
    """
    if not count:
        return {"the control": sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize}
    sizes = [
        len(tensors[key.replace(".lora_A.", ".lora_B.")]) * a.shape[1:].numel()
        for key, a in tensors.items()
        if ".lora_A." in key
    ]
    return {"weights with the control": count * sum(sizes) * dtype.itemsize}


def unpacked(card: FamilyCard, names: Iterable[str], dtype: torch.dtype) -> dict[str, float]:
    """The largest of these members' networks, whole as it is before it is packed."""
    return largest(networks(card, names, dtype))


def largest(held: dict[str, float]) -> dict[str, float]:
    """The largest part alone."""
    name = max(held, key=held.get)
    return {name: held[name]}


def evaluating(card: FamilyCard, rows: Mapping[str, int], dtype: torch.dtype) -> dict[str, float]:
    """Activations of one evaluation of members' networks, the largest, each for so many latents at once."""
    ((most, size),) = largest({name: rows[name] * evaluation(card, name, dtype) for name in rows}).items()
    return {f"activations of {rows[most]} latents": size}


def decoding(
    card: FamilyCard, images: int, memory: Memory | None = None, learning: bool = False
) -> dict[str, float]:
    """What the VAE takes to make so many pictures at once; learning: and to pass gradients back."""
    images = 1 if memory and memory.tiling else images
    with one_line(f"the VAE's config in {card.repo}"):
        index = published(import_module("diffusers").DiffusionPipeline, card.repo, card.revision)
        library, kind = index["vae"]
        values = published(getattr(import_module(library), kind), card.repo, card.revision, "vae")
    tiled = bool(memory and memory.tiling and kind in TILED)
    each = _decoding(kind, budget.key(values), latent_shape(card), tiled, learning)
    return {f"decoding of {images} at {card.size_px} px": images * each}


def seeing(card: FamilyCard, names: Sequence[str], images: int) -> dict[str, float]:
    """What evaluators take to look at so many pictures at once."""
    if not names:
        return {}
    return {f"evaluators' look at {images}": images * VIEWS * 3 * card.size_px**2 * torch.float32.itemsize}


def guided(card: FamilyCard, names: Iterable[str], images: int) -> dict[str, int]:
    """How many latents members' networks are asked for at once to draw so many images: guidance asks for each
    twice.
    """
    return {name: images * (1 if card.members[name].guidance is None else 2) for name in names}


def drawing(
    family: "Family",
    turns: Iterable[tuple[Iterable[str], Iterable[str]]],
    images: int,
    controls: Sequence[Mapping[str, Tensor]],
    evaluators: Sequence[str] | None,
    apart: bool = False,
    reading: bool = False,
) -> list[Moment]:
    """The moments of an analysis: prompts are encoded, then networks draw, the VAE decodes and evaluators
    look.

    turns: the members that are in memory together and those among them that are asked, time by time. images:
    of one drawing. controls: tensors of those that are put into the weights, one at a time. evaluators:
    None where no picture is made. apart: pictures are decoded when the control is out of them again. reading:
    text encoders stay, for there are too many texts.
    """
    card, dtype, device, each = family.card, family.dtype, family.device, min(images, family.drawing.size)
    vae, encoders = shared(card, dtype)
    always = program(device) | held_evaluators(card, evaluators or (), device)
    looks = []
    if evaluators is not None:
        at_once = min(each, family.decoding.size)
        looks = [decoding(card, at_once, family.memory), seeing(card, evaluators, each)]
    away = family.memory.offload and device.type != "cpu"  # all but what is at work
    waiting = {} if away else vae
    moments = [Moment("when prompts are encoded", always | encoders | waiting | reading_of(card, dtype))]
    if reading and not away:
        always |= encoders
    for held, asked in dict.fromkeys((tuple(sorted(held)), tuple(sorted(asked))) for held, asked in turns):
        nets, own = networks(card, held, dtype, family.quantize), set(map(card.holder, asked))
        nets = largest(nets) if away else nets
        if family.quantize and device.type == "cpu":  # elsewhere the whole network is not on the device
            moments.append(
                Moment("when a network is packed", always | vae | nets | unpacked(card, own, dtype))
            )
        # networks that wait on the CPU get their sums there, and come with them in their own weights' place
        count = 0 if family.quantize or away else len(own)
        added = max((sums(control, dtype, count) for control in controls), key=total, default={})
        when = f"when {', '.join(asked)} {'draw' if len(asked) > 1 else 'draws'} {each} at once"
        activations = evaluating(card, guided(card, asked, each), dtype)
        moments.append(Moment(when, always | waiting | nets | added | activations))
        moments += [
            Moment(when, always | vae | ({} if away else nets) | ({} if apart or away else added) | look)
            for look in looks
        ]
    return moments


def total(held: Mapping[str, float]) -> float:
    return sum(held.values())


def evaluation(card: FamilyCard, name: str, dtype: torch.dtype) -> float:
    """Bytes of activations at the most, of one evaluation of a member's network for one latent.

    Raises UserError without its config.
    """
    return _evaluation(*budget.about(card, name), dtype)


@cache
def _evaluation(*about: Hashable) -> float:
    return beside(*budget.unweighted(*about))


@cache
def _decoding(kind: str, values: str, shape: tuple[int, int, int], tiled: bool, learning: bool) -> float:
    with init_empty_weights():
        vae = getattr(import_module("diffusers"), kind).from_config(json.loads(values))
        nn.Module.to(vae, "meta", torch.float32)
    vae.requires_grad_(False).eval()
    latents_of = LATENTS[kind]
    side = min(shape[1], latents_of.tile(vae)) if tiled else shape[1]
    latents = torch.zeros(1, shape[0], side, side, device="meta", requires_grad=learning)
    with torch.set_grad_enabled(learning):

        def pictures():
            return latents_of.decode(vae, latents).float().clamp(-1, 1)

        return beside(vae, lambda: pictures().sum().backward() if learning else pictures())


def beside(net: nn.Module, work: Callable[[], Tensor | None]) -> float:
    """The bytes that work on a network on `meta` holds beside the network at the most."""
    with Peak(net) as peak, flash(), torch.device("meta"):
        before = peak.live
        kept = work()  # what it returns lives on
    del kept
    return float(peak.most - before)


class Peak(TorchDispatchMode):
    """Inside, the bytes of all tensors that live, a network's included, and the most that ever did; no tensor
    has to hold anything.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.alive, self.live, self.most = {}, 0, 0
        self.device = next(net.parameters()).device.type
        for weight in net.parameters():
            self.count(weight.untyped_storage())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor) and made.device.type == self.device:
                self.count(made.untyped_storage())
        return out

    def count(self, storage: torch.UntypedStorage) -> None:
        """Adds a storage that is new, until it goes."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive[key] = weakref.ref(storage, lambda _: self.drop(key, size))
            self.live += size
            self.most = max(self.most, self.live)

    def drop(self, key: int, size: int) -> None:
        del self.alive[key]
        self.live -= size


@contextmanager
def flash() -> Iterator[None]:
    """Inside, attention is the kernel that a GPU takes for it; on `meta` torch would write down every
    attention matrix.
    """
    plain = F.scaled_dot_product_attention
    kernel = torch.ops.aten._scaled_dot_product_flash_attention
    F.scaled_dot_product_attention = lambda query, key, value, *_, **__: kernel(query, key, value)[0]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain
