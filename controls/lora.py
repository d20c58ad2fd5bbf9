"""Controls: named low-rank pairs that act on a network only where the code says so.

A control adds scale · alpha / rank · B·A to the weight of each of its layers (LoRA, Hu et al. 2021). `attach`
puts it in place, switched off; `strength` is the dial; `detach` gives the network back as it was. peft
computes the branches. `fused` adds a control to the weights instead, for drawing; where they are packed, it
acts beside them.
"""

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from configs import UserError
from controls.layers import named_layers, targets
from models.lora_student import HALVES, product
from models.quantized import quantized

SPELL = 2**19  # numbers of a weight that are summed at once

if TYPE_CHECKING:  # peft takes seconds to import, which what only reads controls need not wait
    from peft.tuners.lora import LoraLayer


@dataclass
class Card:
    """What a control is and where it comes from."""

    kind: str  # slider, lora, …
    name: str
    family: str  # it fits every member of this family
    member: str  # the one it was trained on
    rank: int
    alpha: float
    layers: str  # layer set, see controls.layers
    scope: str
    recipe: dict = field(default_factory=dict)  # prompts, steps, seed: what it takes to train it again
    # fingerprint of the network it was trained on, and of the delta that makes it a LoRA student
    base_hash: str = ""
    versions: dict = field(default_factory=dict)
    transfer: dict = field(
        default_factory=dict
    )  # what analysis.transfer measured, where it was asked to write it here


@dataclass
class Control:
    """A card and its weights: "<layer>.lora_A.weight" (rank, in, …) and "<layer>.lora_B.weight" (out, rank,
    …), fp32 on the CPU.
    """

    card: Card
    tensors: dict[str, Tensor]

    @property
    def layers(self) -> list[str]:
        """The names of its layers, sorted."""
        return sorted({key.rsplit(".lora_", 1)[0] for key in self.tensors})

    def pair(self, layer: str) -> tuple[Tensor, ...]:
        """A and B of a layer."""
        return tuple(self.tensors[layer + half] for half in HALVES)

    def factor(self, scale: float = 1.0) -> float:
        """What B·A is multiplied by at a scale."""
        return scale * self.card.alpha / self.card.rank


def create(
    net: nn.Module,
    name: str,
    layers: str = "noxattn",
    scope: str = "c3lier",
    rank: int = 4,
    alpha: float = 1.0,
    seed: int = 0,
) -> None:
    """Attaches a fresh trainable control, which does nothing yet: A is random, B zero (Hu et al. 2021, sec.
    4.1).

    Its weights are fp32 whatever the network's type, and depend on the seed alone. The network itself is
    frozen. Raises UserError for a name in use, and as `targets` does.
    """
    rng, spots, tensors = torch.Generator().manual_seed(seed), named_layers(net), {}
    for layer in targets(net, layers, scope):
        a, b = map(torch.zeros, shapes(spots[layer], rank))
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=rng)
        tensors |= {layer + HALVES[0]: a, layer + HALVES[1]: b}
    _inject(net, name, tensors, rank, alpha, trainable=True)


def continued(net: nn.Module, control: Control, name: str) -> None:
    """Attaches a copy of a control that is trained further. Raises UserError as `attach` does."""
    _check(net, control)
    _inject(net, name, control.tensors, control.card.rank, control.card.alpha, trainable=True)


def tie(net: nn.Module, other: nn.Module, name: str) -> None:
    """Attaches to another network the control in training on this one: the same weights, which gather the
    gradients of both.
    """
    layers = _layers(net, name)
    first = next(iter(layers.values()))
    _inject(other, name, extract(net, name), first.r[name], first.lora_alpha[name], trainable=True)
    for spot, layer in _layers(other, name).items():
        for half in ("lora_A", "lora_B"):
            getattr(layer, half)[name].weight = getattr(layers[spot], half)[name].weight


def attach(net: nn.Module, control: Control, name: str | None = None, family: str | None = None) -> str:
    """Puts a control in place, switched off and frozen, and returns the name it goes by (its card's, unless
    given).

    The network is frozen too. Raises UserError when the card names another family than `family`, when a layer
    has no place in this network or another shape there, and for a name in use. Another member of the same
    family is the point.
    """
    fits(net, control, family)
    name = name or control.card.name
    _inject(net, name, control.tensors, control.card.rank, control.card.alpha, trainable=False)
    return name


def fits(net: nn.Module, control: Control, family: str | None = None) -> None:
    """Raises UserError as `attach` does for a control without a place in a network; does nothing else."""
    card = control.card
    if family and card.family != family:
        raise UserError(
            f"{card.name} was trained on family {card.family!r}, this network is of family {family!r}"
        )
    _check(net, control)


def parameters(net: nn.Module, name: str) -> list[nn.Parameter]:
    """The weights of one control, layer by layer, A before B.

    Raises UserError for a control that is not attached.
    """
    return [
        half[name].weight for layer in _layers(net, name).values() for half in (layer.lora_A, layer.lora_B)
    ]


def extract(net: nn.Module, name: str) -> dict[str, Tensor]:
    """A copy of one control's weights as `Control.tensors` holds them.

    Raises UserError for a control that is not attached.
    """
    tensors = {}
    for spot, layer in _layers(net, name).items():
        for half in ("lora_A", "lora_B"):
            weight = getattr(layer, half)[name].weight.detach()
            tensors[f"{spot}.{half}.weight"] = weight.to("cpu", torch.float32, copy=True).contiguous()
    return tensors


@contextmanager
def strength(
    net: nn.Module, scales: Mapping[str, float] | None = None, /, **named: float
) -> Iterator[nn.Module]:
    """Inside, exactly these controls act, each at its signed scale: `strength(net, smile=1.5)` or
    `strength(net, {"smile": 1.5})`.

    Afterwards, also after an exception, what was before is back; outside every such block all controls are
    off. A control at scale 0 is not computed, so the output is that of the bare network bit for bit. Blocks
    nest; the innermost decides alone. With gradient checkpointing, call backward inside too: it runs the
    network once more. Raises UserError for a control that is not attached.
    """
    scales = {**(scales or {}), **named}
    adapted = _adapted(net)
    for name in scales:
        _having(adapted, name)
    before = [_state(layer) for layer in adapted.values()]
    try:
        for layer in adapted.values():
            _dial(layer, scales)
        yield net
    finally:
        for layer, state in zip(adapted.values(), before, strict=True):
            _switch(layer, *state)


def fusing(
    net: nn.Module, control: Control, scale: float, family: str | None = None
) -> Callable[[], AbstractContextManager]:
    """What puts a control at one scale into the weights, as often as it is entered: `on = fusing(net,
    control, 1.5)`, then `with on():`.

    Inside, the network is as fast as without, and its gradients do not reach the control. Afterwards the
    original weights are back, the same memory and not a subtraction; the sums are made once and held beside
    them. In a bf16 network a sum is rounded to bf16, so it agrees with `strength` to that precision only. In
    a quantised network it is `beside`. Raises UserError as `attach` does.
    """
    if quantized(net):
        return beside(net, control, scale, family)
    fits(net, control, family)
    spots, sums = named_layers(net), {}
    for layer in control.layers if scale else ():
        weight = spots[layer].weight
        a, b = (half.to(weight.device, torch.float32) for half in control.pair(layer))
        sums[weight] = _sum(weight.detach(), a, b.flatten(1), control.factor(scale))

    @contextmanager
    def on() -> Iterator[None]:
        originals = {weight: weight.data for weight in sums}
        try:
            for weight, total in sums.items():
                weight.data = total
            yield
        finally:
            for weight, original in originals.items():
                weight.data = original

    return on


def _sum(weight: Tensor, a: Tensor, b: Tensor, factor: float) -> Tensor:
    """weight + factor B A, (out, in, …), summed in fp32, in the weight's own type and memory format.

    Some rows at a time: on a CPU it takes a tenth of the time of whole matrices, whose memory is new each
    time.
    """
    last = not weight.is_contiguous()  # channels, as convolutions lie in memory
    weight, a = (tensor.movedim(1, -1) if last else tensor for tensor in (weight, a))
    old, a = weight.flatten(1), a.flatten(1)
    total, rows = torch.empty(old.shape, dtype=old.dtype, device=old.device), max(1, SPELL // a.shape[1])
    for part, before, after in zip(b.split(rows), old.split(rows), total.split(rows), strict=True):
        after.copy_((part @ a).mul_(factor).add_(before))
    total = total.view(weight.shape)
    return total.movedim(-1, 1) if last else total


def beside(
    net: nn.Module, control: Control, scale: float, family: str | None = None
) -> Callable[[], AbstractContextManager]:
    """The same beside the layers instead of in their weights, which may be packed or changed meanwhile.

    A and B act in the network's own type, as a student's delta does.
    """
    fits(net, control, family)
    spots, example, hooks = named_layers(net), next(net.parameters()), []
    for layer in control.layers if scale else ():
        a, b = (half.to(example.device, torch.float32) for half in control.pair(layer))
        b = control.factor(scale) * b
        hooks.append((spots[layer], partial(_branch, a.to(example.dtype), b.to(example.dtype))))

    @contextmanager
    def on() -> Iterator[None]:
        with ExitStack() as stack:
            for layer, hook in hooks:
                stack.callback(layer.register_forward_hook(hook).remove)
            yield

    return on


def _branch(a: Tensor, b: Tensor, layer: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
    """A forward hook that adds B A x."""
    x = inputs[0]
    return out + product(layer, x, a.to(x), b.to(x))  # a network that waits elsewhere has come for this


@contextmanager
def fused(net: nn.Module, control: Control, scale: float, family: str | None = None) -> Iterator[nn.Module]:
    """Inside, a control acts on a network at one scale, as part of its weights where they are whole: see
    `fusing`. Blocks nest, and add up.

    Raises UserError as `attach` does.
    """
    with fusing(net, control, scale, family)():
        yield net


def random_like(control: Control, seed: int = 0) -> Control:
    """A control that means nothing and changes as much: random pairs whose product has the control's
    Frobenius norm in every layer.
    """
    rng, tensors = torch.Generator().manual_seed(seed), {}
    for layer in control.layers:
        pair = control.pair(layer)
        random = [torch.randn(half.shape, generator=rng) for half in pair]
        factor = (_norm(*pair) / _norm(*random)) ** 0.5
        tensors |= {layer + half: factor * tensor for half, tensor in zip(HALVES, random, strict=True)}
    card = replace(
        control.card,
        name=f"random-{control.card.name}",
        kind="random",
        recipe={"like": control.card.name, "seed": seed},
    )
    return Control(card, tensors)


def content(control: Control) -> str:
    """The sha256 of what a control does: its weights and its strength, whatever its file or card says
    besides.
    """
    digest = hashlib.sha256(f"{control.card.rank} {control.card.alpha}".encode())
    for name in sorted(control.tensors):
        digest.update(f"{name} {tuple(control.tensors[name].shape)}".encode())
        digest.update(control.tensors[name].float().contiguous().numpy())
    return digest.hexdigest()


def detach(net: nn.Module) -> None:
    """Takes every control out: the network has the modules, names and weights that it had before the first
    was attached.
    """
    for spot, layer in _adapted(net).items():
        parent, _, child = spot.rpartition(".")
        setattr(net.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(net, "peft_config"):
        del net.peft_config


def _adapted(net: nn.Module) -> dict[str, "LoraLayer"]:
    """The layers that carry controls, by name."""
    from peft.tuners.lora import LoraLayer

    found, waiting = {}, [("", net)]
    while (
        waiting
    ):  # not named_modules, which also walks the branches: `strength` comes by twice per training step
        prefix, module = waiting.pop()
        for name, child in module.named_children():
            if isinstance(child, LoraLayer):
                found[prefix + name] = child
            else:
                waiting.append((f"{prefix}{name}.", child))
    return found


def _layers(net: nn.Module, name: str) -> dict[str, "LoraLayer"]:
    """The layers of one control, sorted by name. Raises UserError when there is none."""
    return _having(_adapted(net), name)


def _having(adapted: dict[str, "LoraLayer"], name: str) -> dict[str, "LoraLayer"]:
    found = {spot: adapted[spot] for spot in sorted(adapted) if name in adapted[spot].lora_A}
    if not found:
        attached = sorted({n for layer in adapted.values() for n in layer.lora_A})
        raise UserError(f"no control {name!r} is attached; attached: {', '.join(attached) or 'none'}")
    return found


def _state(layer: "LoraLayer") -> tuple[list[str], bool, dict[str, float]]:
    return layer.active_adapters, layer.disable_adapters, dict(layer.scaling)


def _switch(layer: "LoraLayer", active: list[str], disabled: bool, scaling: dict[str, float]) -> None:
    # Not by peft's set_adapter and enable_adapters: they also toggle requires_grad, under a trainer's feet.
    layer._active_adapter, layer._disable_adapters = active, disabled
    layer.scaling.update(scaling)


def _dial(layer: "LoraLayer", scales: Mapping[str, float]) -> None:
    active = [name for name, scale in scales.items() if scale != 0 and name in layer.lora_A]
    _switch(
        layer,
        active,
        not active,
        {name: scales[name] * layer.lora_alpha[name] / layer.r[name] for name in active},
    )


def _norm(a: Tensor, b: Tensor) -> Tensor:
    """The Frobenius norm of B·A, from its rank × rank Gram matrices."""
    a, b = a.double().flatten(1), b.double().flatten(1)
    return ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt()


def shapes(layer: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B on a layer: (rank, in, …) with the layer's own kernel, and (out, rank, …) with a
    kernel of 1.
    """
    size_out, *size_in = (
        (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else layer.weight.shape
    )
    return (rank, *size_in), (size_out, rank, *(1 for _ in size_in[1:]))


def _check(net: nn.Module, control: Control) -> None:
    """Raises UserError unless every layer of the control has its place, and its shape, in the network."""
    name, modules, layers = control.card.name, named_layers(net), control.layers
    count, question = f"of {len(layers)} layers of {name}", "Was it trained on another family?"
    lost = [layer for layer in layers if layer not in modules]
    if lost:
        raise UserError(f"{len(lost)} {count} have no place in this network: {_few(lost)}. {question}")
    misfits = []
    for layer in layers:
        halves = [control.tensors.get(layer + half) for half in HALVES]
        found = tuple(None if half is None else tuple(half.shape) for half in halves)
        misfits += [layer] if found != shapes(modules[layer], control.card.rank) else []
    if misfits:
        raise UserError(
            f"{len(misfits)} {count} have another shape in this network: {_few(misfits)}. {question}"
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:2]) + ("…" if len(names) > 2 else "")


def _inject(
    net: nn.Module, name: str, tensors: dict[str, Tensor], rank: int, alpha: float, trainable: bool
) -> None:
    """Places the branches with these weights, switched off; leaves the controls already there, and torch's
    random state, as they are.
    """
    from peft import LoraConfig, inject_adapter_in_model

    adapted = _adapted(net)
    if (
        not name
        or "." in name
        or hasattr(nn.ModuleDict(), name)
        or any(name in layer.lora_A for layer in adapted.values())
    ):
        raise UserError(
            f"{name!r} cannot name a control here: it is in use, empty, has a dot, or is a word of torch's "
            f"own; choose another"
        )
    before = [(layer, _state(layer)) for layer in adapted.values()]
    trained = [(weight, weight.requires_grad) for layer in adapted.values() for weight in layer.parameters()]
    spots = sorted({key.rsplit(".lora_", 1)[0] for key in tensors})
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=spots)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Already found a `peft_config`"
        )  # several controls at once are meant
        # low_cpu_mem_usage: peft draws no random weights, so nobody's random state moves
        inject_adapter_in_model(config, net, adapter_name=name, state_dict=tensors, low_cpu_mem_usage=True)
    for spot, layer in _layers(net, name).items():
        device = layer.get_base_layer().weight.device
        for half in ("lora_A", "lora_B"):
            weight = tensors[f"{spot}.{half}.weight"].to(device, torch.float32, copy=True)
            getattr(layer, half)[name].weight = nn.Parameter(weight, requires_grad=trainable)
        _switch(layer, [], True, {})
    for weight, flag in trained:  # peft sets it anew, differently from version to version
        weight.requires_grad_(flag)
    for layer, state in before:
        _switch(layer, *state)
