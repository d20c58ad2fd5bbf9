"""What memory a run takes at the most, moment by moment, from configs alone: every tensor followed on torch's `meta` device."""

import json
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import psutil
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import budget
from models.architectures import ARCHITECTURES, blank
from models.cards import FamilyCard
from models.loading import available, config, latent_shape, one_line, place
from models.memory import Memory

VIEWS = 3  # copies of a picture that an evaluator makes before it is as small as the evaluator sees it


@dataclass(frozen=True)
class Moment:
    """What is in memory together at one time of a run."""

    when: str
    held: dict[str, float]  # bytes by what they are of

    @property
    def total(self) -> float:
        return sum(self.held.values())


def said(moments: Iterable[Moment]) -> str:
    """The fullest moment in words."""
    most = max(moments, key=lambda moment: moment.total)
    parts = sorted(most.held.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{size / budget.GB:.2g} {part}" for part, size in parts if size >= 0.005 * most.total)
    return f"memory at the most: {most.total / budget.GB:.1f} GB, {most.when}: {shown}"


def program(device: torch.device) -> dict[str, float]:
    """On a CPU, where it shares the memory, the program itself: what this process holds besides mapped files."""
    about = psutil.Process().memory_info()
    return {} if device.type == "cuda" else {"the program": float(about.rss - getattr(about, "shared", 0))}


def shared(card: FamilyCard, dtype: torch.dtype) -> tuple[dict[str, float], dict[str, float]]:
    """The VAE, and the text encoders."""
    parts = {need.part: need.memory for need in budget.shared(card, dtype)}
    return {"VAE": parts.pop("vae", 0.0)}, {"text encoders": sum(parts.values())}


def networks(card: FamilyCard, names: Iterable[str], dtype: torch.dtype, quantize: str = "") -> dict[str, float]:
    """The networks of members, a base once for all of its LoRA students, and these students' deltas."""
    needed = {}
    for name in dict.fromkeys(names):
        if card.members[name].lora:
            needed[name] = budget.delta_need(card, name, dtype)
        own = card.base if card.members[name].lora else name
        needed[own] = budget.network_need(card, own, dtype, quantize)
    return {need.part: need.memory for need in needed.values()}


def sums(tensors: dict[str, Tensor], dtype: torch.dtype, count: int = 1) -> dict[str, float]:
    """What `ready` holds beside so many networks for a control: its layers' weights, and in fp32 those of the largest, three at once."""
    halves = {key.rsplit(".lora_", 1)[0]: tensor.shape for key, tensor in tensors.items() if ".lora_A." in key}
    sizes = [tensors[f"{layer}.lora_B.weight"].shape[0] * shape[1:].numel() for layer, shape in halves.items()]
    return {"weights with the control": count * sum(sizes) * dtype.itemsize + 3 * max(sizes, default=0) * torch.float32.itemsize}


def evaluating(card: FamilyCard, name: str, dtype: torch.dtype, images: int) -> dict[str, float]:
    """Activations of one evaluation of a member's network for so many images, guidance's second one included."""
    rows = images * (1 if card.members[name].guidance is None else 2)
    return {f"activations of {rows} latents": rows * evaluation(card, name, dtype)[1]}


def decoding(card: FamilyCard, images: int, memory: Memory | None = None, learning: bool = False) -> dict[str, float]:
    """What the VAE takes to make so many pictures at once; learning: and to pass gradients back."""
    images = 1 if memory and memory.tiling else images
    with one_line(f"the VAE's config in {card.repo}"):
        home = {"revision": available(card.repo, card.revision)}
        library, kind = import_module("diffusers").DiffusionPipeline.load_config(place(card.repo), **home)["vae"]
        values = getattr(import_module(library), kind).load_config(place(card.repo), subfolder="vae", **home)
    tiled = bool(memory and memory.tiling and kind == "AutoencoderKL")
    each = _decoding(kind, json.dumps(dict(values), sort_keys=True, default=str), latent_shape(card), tiled, learning)
    return {f"decoding of {images} at {card.size_px} px": images * each}


def seeing(card: FamilyCard, names: Sequence[str], images: int) -> dict[str, float]:
    """What evaluators take to look at so many pictures at once."""
    return {f"evaluators' look at {images}": images * VIEWS * 3 * card.size_px**2 * torch.float32.itemsize} if names else {}


def evaluation(card: FamilyCard, name: str, dtype: torch.dtype) -> tuple[float, float]:
    """Floating-point operations, and bytes of activations at the most, of one evaluation of a member for one image.

    Reads configs; raises UserError without them.
    """
    values = json.dumps(config(card, name), sort_keys=True, default=str)
    return _evaluation(card.architecture, values, latent_shape(card), dtype)


@cache
def _evaluation(architecture: str, values: str, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[float, float]:
    from torch.utils.flop_counter import FlopCounterMode

    its = ARCHITECTURES[architecture]
    with init_empty_weights():
        net = nn.Module.to(its.network.from_config(json.loads(values)), "meta", dtype)
    x, told = torch.zeros(1, *shape, device="meta").to(dtype), blank(its, net).to(dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _, bytes_ = beside(net, lambda: its.call(net, x, 500.0, told, None))
    return float(counter.get_total_flops()), bytes_


@cache
def _decoding(kind: str, values: str, shape: tuple[int, int, int], tiled: bool, learning: bool) -> float:
    with init_empty_weights():
        vae = nn.Module.to(getattr(import_module("diffusers"), kind).from_config(json.loads(values)), "meta", torch.float32)
    vae.requires_grad_(False).eval()
    if tiled:
        vae.enable_tiling()
    latents = torch.zeros(1, *shape, device="meta", requires_grad=learning)
    with torch.set_grad_enabled(learning):
        picture, bytes_ = beside(vae, lambda: vae.decode(latents).sample.float().clamp(-1, 1))
        return beside(vae, lambda: vae.decode(latents).sample.float().clamp(-1, 1).sum().backward())[1] if learning else bytes_


def beside(net: nn.Module, work: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What work on a network on `meta` returns, and the bytes that it holds beside the network at the most."""
    with Peak(net) as peak, flash(), torch.device("meta"):
        before = peak.live
        out = work()
    return out, float(peak.most - before)


class Peak(TorchDispatchMode):
    """Inside, the bytes of all tensors that live, a network's included, and the most that ever did; no tensor has to hold anything."""

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
    """Inside, attention is the kernel that a GPU takes for it; on `meta` torch would write down every attention matrix."""
    plain = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, **_: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain
