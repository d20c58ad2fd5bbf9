"""Formats: controls as files.

Native is diffusers' own layout: keys `unet.<layer>.lora_A.weight`, with alpha / rank in B, since a program
that heeds no header would else have rank 4, alpha 1 four times too strong, and our card beside them. Other
tools' layouts are read by `adopt`, which needs the network to look their names up, and kohya's is written for
ComfyUI and A1111.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from configs import UserError, cut, note, plain_name, replacing
from configs.ranges import check
from controls.formats import headers, layouts, origins
from controls.formats.algorithms import paired
from controls.formats.files import finite, header, located, read, real
from controls.formats.headers import DIFFUSERS
from controls.layers import layer_set
from controls.lora import HALVES, Card, Control, shapes
from models.promptsets import HUB

__all__ = [
    "adopt",
    "card_of",
    "load",
    "located",
    "name",
    "names",
    "native",
    "read",
    "relabel",
    "save",
    "save_kohya",
]
UNET = (
    "down_blocks.",
    "mid_block.",
    "up_blocks.",
    "conv_in.",
    "conv_out.",
    "time_embedding.",
    "add_embedding.",
)  # its layers begin so
BASES = {
    "sdxl": "sdxl_base_v1-0",
    "sd15": "sd_v1",
    "sd21": "sd_v2",
    "sd3": "sd3",
    "flux": "flux1",
}  # what kohya's tools call a family
KINDS = {str: "a text", int: "a whole number", float: "a number", dict: "a mapping"}


def save(control: Control, path: str | Path) -> None:
    """Writes one .safetensors file that diffusers' `load_lora_weights` takes as it is, at the same strength.

    B holds alpha / rank, so that a program that heeds no header, as ComfyUI, has that strength too; `load`
    takes it out again, and where that would not give back the very same numbers the card in the file says
    alpha = rank.
    """
    prefix, card, factor = _prefix(control), control.card, control.factor()
    peft = {
        f"{prefix}r": card.rank,
        f"{prefix}lora_alpha": float(card.rank),
        f"{prefix}target_modules": control.layers,
    }
    folded = _on_b(torch.mul, control.tensors, factor)
    if not factor or any(
        not torch.equal(tensor, control.tensors[name])
        for name, tensor in _on_b(torch.div, folded, factor).items()
    ):
        card = _with_alpha_in_b(card)
    tensors = {prefix + name: tensor for name, tensor in folded.items()}
    _write(tensors, {DIFFUSERS: json.dumps(peft)}, card, path)


def save_kohya(control: Control, path: str | Path) -> None:
    """Writes what ComfyUI, A1111 and kohya's scripts read: for a U-Net kohya's names with .alpha, which alone
    they heed.

    A transformer's layers keep diffusers' names, which those tools take too, with alpha folded into B: its
    card then says alpha = rank.
    """
    prefix, card, tensors = _prefix(control), control.card, {}
    if prefix == "unet.":
        for layer in control.layers:
            stem = f"lora_unet_{layer.replace('.', '_')}"
            tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = control.pair(layer)
            tensors[f"{stem}.alpha"] = torch.tensor(float(card.alpha))
    else:
        folded = _on_b(torch.mul, control.tensors, control.factor())
        tensors = {prefix + name: tensor for name, tensor in folded.items()}
        card = _with_alpha_in_b(card)
    said = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(card.rank),
        "ss_network_alpha": str(card.alpha),
        "ss_output_name": card.name,
        "ss_base_model_version": BASES.get(card.family, card.family),
    }
    _write(tensors, said, card, path)


def relabel(card: Card, path: str | Path) -> None:
    """Puts another card into a file of any layout; its tensors, bit for bit, and the rest of its header stay
    as they are.
    """
    tensors, metadata = read(path)
    _store(tensors, {**metadata, "card": json.dumps(asdict(card))}, path)


def load(path: str | Path) -> Control:
    """Reads what `save` wrote, through safetensors only: no code in a file ever runs.

    Raises UserError for a missing or broken file, a pickle, a file without a card, tensors of another layout,
    and those that are not pairs of the card's rank.
    """
    tensors, metadata = read(path)
    how = "python -m controls.convert makes it one of ours"
    strange = [name for name in tensors if not _ours(name)]
    if strange or not tensors:
        kind = layouts.layout(list(tensors))
        shown = ", ".join(map(cut, strange[:2])) or "nothing"
        raise UserError(f"{cut(path)} is not in diffusers' layout but {kind}: it holds {shown}; {how}")
    card = card_of(path, metadata)
    if card is None:
        raise UserError(
            f"{cut(path)} has no card: its header lacks 'card', which says what it is, its rank and its "
            f"alpha; {how}"
        )
    weights = {name.partition(".")[2]: real(name, tensor) for name, tensor in tensors.items()}
    control = Control(card, weights)
    layers = control.layers
    halves = {layer: [weights.get(layer + half) for half in HALVES] for layer in layers}
    odd = [layer for layer in layers if not paired(*halves[layer]) or len(halves[layer][0]) != card.rank]
    if odd or len(weights) < len(tensors):
        first = cut(odd[0]) if odd else "one that is there twice"
        raise UserError(
            f"{cut(path)}: {len(odd) or 'some'} of {len(layers)} layers are no pair of the card's rank "
            f"{card.rank}: {first}"
        )
    if card.alpha == 0:
        note(f"{cut(path)} has alpha 0: it does nothing at any scale")
    try:
        return _unfolded(control, metadata)
    except UserError as error:
        raise UserError(f"{cut(path)}: {error}") from None


def native(path: str | Path) -> bool:
    """Whether a file is in diffusers' layout and has our card, so that `load` reads it.

    Raises UserError as `read` does.
    """
    keys, metadata = header(path)
    return card_of(path, metadata) is not None and all(map(_ours, keys))


def name(path: str | Path) -> str:
    """What the control in a file is called: by its card, else by the file."""
    return names([str(path)])[0]


def names(paths: list[str]) -> list[str]:
    """What the controls in files are called, no two alike: those without a card have their folders' names
    before theirs where need be.
    """
    cards = [card_of(path, header(path)[1]) for path in paths]
    parts = [[*str(path).removeprefix(HUB).split("/")[:-1], Path(path).stem] for path in paths]
    found = [card.name if card else _safe(part[-1]) for card, part in zip(cards, parts, strict=True)]
    for depth in range(2, max(map(len, parts), default=0) + 1):
        twice = {name for name, count in Counter(found).items() if count > 1}
        found = [
            _safe("-".join(part[-depth:])) if name in twice and not card else name
            for name, card, part in zip(found, cards, parts, strict=True)
        ]
    return found


def card_of(path: str | Path, metadata: dict[str, str]) -> Card | None:
    """The card in a header, None where there is none.

    Raises UserError that names the key for one that is not as `Card` says.
    """
    if "card" not in metadata:
        return None
    try:
        said = headers.mapping(metadata["card"])
    except ValueError as error:
        raise UserError(f"{cut(path)} has a card that cannot be read: {cut(error)}") from None
    known = {field.name: field for field in fields(Card)}
    wrong = [f"{cut(key, 40)} is no key of a card" for key in said if key not in known]
    wrong += [
        f"{key} is missing"
        for key, field in known.items()
        if key not in said and field.default is MISSING and field.default_factory is MISSING
    ]
    wrong += [
        f"{key} must be {KINDS[known[key].type]}; got {cut(value, 40)}"
        for key, value in said.items()
        if key in known and not _is(value, known[key].type)
    ]
    recipe = said.get("recipe") if isinstance(said.get("recipe"), dict) else {}
    wrong += [
        f"recipe.{key} must be a text; got {cut(recipe[key], 40)}"
        for key in ("positive", "negative")
        if not isinstance(recipe.get(key, ""), str)
    ]
    wrong += ["rank must be at least 1; got 0"] if said.get("rank") == 0 else []
    if wrong:
        raise UserError(f"{cut(path)} has a card that this version cannot read: {wrong[0]}")
    card = Card(**{**said, "alpha": float(said["alpha"])})
    try:
        check(card)
        for key in ("name", "family", "member"):
            plain_name(getattr(card, key), key)
    except UserError as error:
        raise UserError(f"{cut(path)}: the card's {error}") from None
    return card


def adopt(path: str | Path, net: nn.Module, card: Card, encoders: str = "refuse") -> Control:
    """Reads a file of any known layout for a network, at exactly its strength; a card in the file wins over
    `card`.

    Layers of lower rank are filled up with zeros to the highest, and B takes up what a layer's alpha / rank
    differs from the card's. encoders: what becomes of text encoders' layers, refuse or ignore. Raises
    UserError as `load` does, when a layer has no place in the network, and for what no low-rank pair holds. A
    header that names another base model is said.
    """
    tensors, metadata = read(path)
    own = card_of(path, metadata)
    base = headers.another_base(metadata, card.family)
    try:
        control = _fitted(tensors, metadata, net, own or card, encoders)
    except UserError as error:
        raise UserError(f"{cut(path)}: {error}{_origin(error, tensors, base)}") from None
    if base:
        note(f"{cut(path)} fits {card.family}, but its header names another base model: {base}")
    if not own:
        layers, scope = layer_set(net, set(control.layers))
        control.card = replace(control.card, layers=layers, scope=scope)
    return control


def _origin(error: UserError, tensors: dict[str, Tensor], base: str) -> str:
    """Where a file that does not fit may be from: its header, or the published networks that it fits."""
    said = f"; its header names another base model: {base}" if base else ""
    if not isinstance(error, layouts.Misfit):
        return said
    others = origins.families(tensors)
    return said + (f"; it fits {' and '.join(others)}" if others else "; was it trained on another family?")


def _fitted(
    tensors: dict[str, Tensor], metadata: dict[str, str], net: nn.Module, card: Card, encoders: str
) -> Control:
    """A file's pairs on a network's layers, all of one rank and one strength."""
    pairs = layouts.gather(tensors, net, _alphas(tensors, metadata), encoders)
    strengths = [strength for _, _, strength in pairs.values()]
    if still := strengths.count(0):
        note(f"alpha is 0 in {still} of {len(pairs)} layers, which therefore do nothing")
    rank, wide, modules = max(len(a) for a, _, _ in pairs.values()), {}, layouts.named_layers(net)
    usual = Counter(strengths).most_common(1)[0][0] or 1.0
    for layer, (a, b, strength) in pairs.items():
        both = _widened(layer, a, b * (strength / usual), rank, modules[layer])
        for half, tensor in zip(HALVES, both, strict=True):
            wide[layer + half] = real(layer + half, tensor)
    card = replace(card, rank=rank, alpha=usual * rank)
    check(card)
    return Control(card, wide)


def _widened(layer: str, a: Tensor, b: Tensor, rank: int, module: nn.Module) -> tuple[Tensor, Tensor]:
    """A pair in its layer's shape, filled up with zeros to a rank."""
    wide_a, wide_b = map(torch.zeros, shapes(module, rank))
    if _kernel(a) != _kernel(wide_a):
        raise layouts.Misfit(f"{layer} has another shape in this network")
    wide_a[: len(a)] = a.reshape(len(a), *wide_a.shape[1:])
    wide_b[:, : len(a)] = b.reshape(len(wide_b), len(a), *wide_b.shape[2:])
    return wide_a, wide_b


def _alphas(tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, float]:
    """Alpha by the file's own name of a layer, where PEFT's settings beside its tensors say it."""
    said = headers.settings(metadata)
    if (
        not said
        and any("base_model.model." in key for key in tensors)
        and not any(key.endswith(".alpha") for key in tensors)
    ):
        raise UserError(
            f"its layers are named by PEFT, which keeps alpha in {headers.BESIDE}: put that beside it, with "
            "the file as adapter_model.safetensors"
        )
    halves = {key: layouts.split(key) or ("", "") for key, tensor in tensors.items() if tensor.ndim}
    ranks = {stem: tensors[key].shape[0] for key, (stem, half) in halves.items() if half == "A"}
    found = headers.alphas(said, {layouts.bare(stem): rank for stem, rank in ranks.items()})
    return {stem: found[layouts.bare(stem)] for stem in ranks} if found else {}


def _on_b(
    change: Callable[[Tensor, float], Tensor], tensors: dict[str, Tensor], factor: float
) -> dict[str, Tensor]:
    """A control's tensors, every B multiplied or divided by a factor."""
    return {
        name: tensor if name.endswith(HALVES[0]) else change(tensor, factor)
        for name, tensor in tensors.items()
    }


def _with_alpha_in_b(card: Card) -> Card:
    """The card of tensors whose B hold alpha / rank: alpha = rank."""
    return replace(card, alpha=float(card.rank))


def _unfolded(control: Control, metadata: dict[str, str]) -> Control:
    """The control as its card has it: what the header says B to hold already is taken out."""
    alpha = control.card.alpha
    inside = headers.alphas(headers.settings(metadata), {"": control.card.rank}).get("", alpha)
    if inside == alpha:
        return control
    if not (inside and alpha):
        raise UserError(f"its card says alpha {alpha:g}, the rest of its header {inside:g}")
    tensors = _on_b(torch.div, control.tensors, alpha / inside)
    return Control(control.card, {name: real(name, tensor) for name, tensor in tensors.items()})


def _ours(key: str) -> bool:
    return key.startswith(("unet.", "transformer.")) and key.endswith(HALVES)


def _is(value: object, kind: type) -> bool:
    """Whether a JSON value is of a card's type; a whole number is a number, true and false are none."""
    if isinstance(value, bool) or (isinstance(value, int) and abs(value) >= 2**63):
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def _safe(stem: str) -> str:
    """A control's name from a file's: what a folder can be called anywhere, at most 100 bytes."""
    plain = (
        re.sub(r"[./\\]", "-", "".join(letter for letter in stem if letter.isprintable()))
        .lstrip("-~ ")
        .rstrip()
    )
    return plain.encode()[:100].decode(errors="ignore").rstrip() or "control"


def _kernel(half: Tensor) -> list[int]:
    """The shape behind the rank, without the 1s that a linear layer and a 1x1 convolution differ by."""
    return [size for size in half.shape[1:] if size != 1]


def _prefix(control: Control) -> str:
    """What diffusers calls the network: transformer or unet."""
    return "unet." if all(name.startswith(UNET) for name in control.tensors) else "transformer."


def _write(tensors: dict[str, Tensor], header: dict[str, str], card: Card, path: str | Path) -> None:
    """Writes tensors with a card.

    Raises UserError also for a card that `card_of` would not read.
    """
    metadata = {**header, "card": json.dumps(asdict(card)), "format": "pt"}
    card_of(path, metadata)
    _store(tensors, metadata, path)


def _store(tensors: dict[str, Tensor], header: dict[str, str], path: str | Path) -> None:
    """Writes a file whole or not at all.

    Raises UserError for numbers that are not finite, and where it cannot be written.
    """
    wrong = next((name for name, tensor in tensors.items() if not finite(tensor)), None)
    if wrong is not None:
        raise UserError(f"{cut(path)} is not written: {wrong} holds numbers that are not finite")
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise UserError(f"cannot write {cut(path)}: it is a folder or no ordinary file")
        with replacing(Path(path)) as new:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, new, header)
            new.chmod(0o644)  # safetensors makes its files private
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {cut(path)}: {getattr(error, 'strerror', None) or cut(error)}"
        ) from None
