"""Formats: controls as files.

Native is diffusers' own layout: keys `unet.<layer>.lora_A.weight`, rank and alpha in the header as diffusers reads them (without these
alpha is lost and rank 4, alpha 1 comes back four times too strong), and our card beside them. Other tools' layouts are read by `adopt`,
which needs the network to look their names up, and kohya's is written for ComfyUI and A1111.
"""

import json
import re
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from configs import ROOT, UserError, replacing
from controls import layouts
from controls.lora import Card, Control
from models.loading import file_of, one_line
from models.promptsets import HUB

HALVES = (".lora_A.weight", ".lora_B.weight")
DIFFUSERS = "lora_adapter_metadata"  # where diffusers keeps rank and alpha in a header, its LORA_ADAPTER_METADATA_KEY
PICKLES = (b"PK", b"\x80")  # torch.save's zip archive, and a bare pickle
UNET = ("down_blocks.", "mid_block.", "up_blocks.", "conv_in.", "conv_out.", "time_embedding.", "add_embedding.")  # its layers begin so
BASES = {"sdxl": "sdxl_base_v1-0", "sd15": "sd_v1", "flux": "flux1"}  # what kohya's tools call a family


def save(control: Control, path: str | Path) -> None:
    """Writes one .safetensors file that diffusers' `load_lora_weights` takes as it is, at the same strength."""
    prefix = _prefix(control)
    tensors = {prefix + name: tensor.contiguous() for name, tensor in control.tensors.items()}
    layers = sorted({name.rsplit(".lora_", 1)[0] for name in control.tensors})
    peft = {f"{prefix}r": control.card.rank, f"{prefix}lora_alpha": control.card.alpha, f"{prefix}target_modules": layers}
    _write(tensors, {DIFFUSERS: json.dumps(peft)}, control, path)


def save_kohya(control: Control, path: str | Path) -> None:
    """Writes what ComfyUI, A1111 and kohya's scripts read: for a U-Net kohya's names with .alpha, which alone they heed.

    A transformer's layers keep diffusers' names, which those tools take too, with alpha folded into B: its card then says alpha = rank.
    """
    card, tensors = control.card, {}
    own = card if _prefix(control) == "unet." else replace(card, alpha=float(card.rank))
    for layer in sorted({name.rsplit(".lora_", 1)[0] for name in control.tensors}):
        a, b = (control.tensors[layer + half].contiguous() for half in HALVES)
        if _prefix(control) == "unet.":
            stem = f"lora_unet_{layer.replace('.', '_')}"
            tensors |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.alpha": torch.tensor(float(card.alpha))}
        else:
            tensors |= {f"transformer.{layer}{HALVES[0]}": a, f"transformer.{layer}{HALVES[1]}": b * (card.alpha / card.rank)}
    header = {"ss_network_module": "networks.lora", "ss_network_dim": str(own.rank), "ss_network_alpha": str(own.alpha),
              "ss_output_name": card.name, "ss_base_model_version": BASES.get(card.family, card.family)}  # fmt: skip
    _write(tensors, header, replace(control, card=own), path)


def relabel(card: Card, path: str | Path) -> None:
    """Puts another card into a file of any layout; its tensors, bit for bit, and the rest of its header stay as they are."""
    tensors, metadata = read(Path(path))
    _store(tensors, {**metadata, "card": json.dumps(asdict(card))}, path)


def load(path: str | Path) -> Control:
    """Reads what `save` wrote, through safetensors only: no code in a file ever runs.

    Raises UserError for a missing or broken file, a pickle, a file without a card, and tensors of another layout.
    """
    tensors, metadata = read(Path(path))
    how = "python -m controls.convert makes it one of ours"
    strange = [name for name in tensors if not name.startswith(("unet.", "transformer.")) or not name.endswith(HALVES)]
    if strange or not tensors:
        kind = layouts.layout(list(tensors))
        raise UserError(f"{path} is not in diffusers' layout but {kind}: it holds {', '.join(strange[:2]) or 'nothing'}; {how}")
    if "card" not in metadata:
        raise UserError(f"{path} has no card: its header lacks 'card', which says what it is, its rank and its alpha; {how}")
    return Control(card_of(path, metadata), {name.partition(".")[2]: tensor.float() for name, tensor in tensors.items()})


def native(path: str | Path) -> bool:
    """Whether a file is in diffusers' layout and has our card, so that `load` reads it. Raises UserError as `read` does."""
    tensors, metadata = read(Path(path))
    named = all(name.startswith(("unet.", "transformer.")) and name.endswith(HALVES) for name in tensors)
    return card_of(path, metadata) is not None and named


def located(path: str | Path) -> Path:
    """Where a control's file is: as given, relative to the project, or on the Hub as hub:owner/name/file. Raises UserError."""
    owner, _, rest = str(path).removeprefix(HUB).partition("/")
    repo, _, file = rest.partition("/")
    if str(path).startswith(HUB) and file:
        with one_line(str(path)):
            return file_of(f"{owner}/{repo}", None, file)
    return ROOT / path if (ROOT / path).is_file() and not Path(path).is_file() else Path(path)


def name(path: str | Path) -> str:
    """What the control in a file is called: by its card, else by the file."""
    card = card_of(path, read(Path(path))[1])
    return card.name if card else Path(path).stem.replace(".", "-")


def card_of(path: str | Path, metadata: dict[str, str]) -> Card | None:
    """The card in a header, None where there is none. Raises UserError for one that cannot be read."""
    try:
        return Card(**json.loads(metadata["card"])) if "card" in metadata else None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} has a card that this version cannot read: {error}") from None


def adopt(path: str | Path, net: nn.Module, card: Card) -> Control:
    """Reads a file of any known layout for a network, at exactly its strength; a card in the file wins over `card`.

    Layers of lower rank are filled up with zeros to the highest, and B takes up what a layer's alpha / rank differs from the card's.
    Raises UserError as `load` does, and when a key has no place in the network.
    """
    tensors, metadata = read(Path(path))
    pairs = layouts.gather(tensors, net, _alphas(tensors, metadata))
    rank = max(a.shape[0] for a, _, _ in pairs.values())
    usual, _ = Counter(strength for _, _, strength in pairs.values()).most_common(1)[0]
    usual, found, spots = usual or 1.0, {}, layouts.places(net)
    for layer, (a, b, strength) in pairs.items():
        size_out, *size_in = spots[layer].weight.shape
        wide_a, wide_b = torch.zeros(rank, *size_in), torch.zeros(size_out, rank, *(1 for _ in size_in[1:]))
        if _kernel(a) != _kernel(wide_a):
            raise UserError(f"{layer} has another shape in this network. Was it trained on another family?")
        wide_a[: len(a)] = a.reshape(len(a), *size_in)
        wide_b[:, : len(a)] = b.reshape(size_out, len(a), *wide_b.shape[2:]) * (strength / usual if strength != usual else 1.0)
        found |= {layer + HALVES[0]: wide_a, layer + HALVES[1]: wide_b}
    return Control(replace(card_of(path, metadata) or card, rank=rank, alpha=usual * rank), found)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of a safetensors file, or of a .pt of plain tensors. Raises UserError when it is neither."""
    path = located(path)
    if not path.is_file():
        raise UserError(f"no control file at {path}; one on the Hub is written hub:owner/name/file.safetensors")
    if path.suffix in (".pt", ".pth", ".bin"):
        return _plain(path), {}
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        with path.open("rb") as file:
            if file.read(2).startswith(PICKLES):
                raise UserError(f"{path} is a pickle, which could run code when read; controls are .safetensors files") from None
        raise UserError(f"{path} is truncated or no safetensors file: {str(error).splitlines()[0]}") from None


def _plain(path: Path) -> dict[str, Tensor]:
    """The original sliders' .pt: a dict of tensors, read without running anything that it holds."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # what a damaged file does to torch's reader has no end, and torch's own advice is to run the file's code
        raise UserError(f"{path} is damaged or holds more than plain tensors; nothing else is read") from None
    if not isinstance(found, dict) or not all(isinstance(k, str) and isinstance(v, (Tensor, float, int)) for k, v in found.items()):
        raise UserError(f"{path} is no flat dict of tensors")
    return {name: torch.as_tensor(value) for name, value in found.items()}


def _alphas(tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, float]:
    """Alpha by the file's own spelling, as diffusers' header says it; UserError where that cannot be read, as strength is then unknown.

    Under rsLoRA (Kalajdzievski 2023) strength is alpha / sqrt(rank), which is an alpha greater by sqrt(rank).
    """
    from peft.utils.other import get_pattern_key

    ranks = {stem: tensor.shape[0] for key, tensor in tensors.items() for stem, half in [layouts.split(key) or ("", "")] if half == "A"}
    try:
        peft = json.loads(metadata.get(DIFFUSERS, "{}"))
        prefix = next((key.removesuffix("r") for key in peft if key in ("unet.r", "transformer.r")), None)
        if prefix is None:
            return {}
        patterns, usual = peft.get(f"{prefix}alpha_pattern") or {}, peft[f"{prefix}lora_alpha"]
        found = {stem: float(patterns.get(get_pattern_key(patterns, stem.removeprefix(prefix)), usual)) for stem in ranks}
        return {stem: alpha * ranks[stem] ** 0.5 for stem, alpha in found.items()} if peft.get(f"{prefix}use_rslora") else found
    except (ValueError, TypeError, KeyError, AttributeError, re.error):
        raise UserError(f"the header's {DIFFUSERS} cannot be read, and with it the alpha of this file") from None


def _kernel(half: Tensor) -> list[int]:
    """The shape behind the rank, without the 1s that a linear layer and a 1x1 convolution differ by."""
    return [size for size in half.shape[1:] if size != 1]


def _prefix(control: Control) -> str:
    """What diffusers calls the network: transformer or unet."""
    return "unet." if all(name.startswith(UNET) for name in control.tensors) else "transformer."


def _write(tensors: dict[str, Tensor], header: dict[str, str], control: Control, path: str | Path) -> None:
    _store(tensors, {**header, "card": json.dumps(asdict(control.card)), "format": "pt"}, path)


def _store(tensors: dict[str, Tensor], header: dict[str, str], path: str | Path) -> None:
    with replacing(Path(path)) as new:
        save_file(tensors, new, header)
        new.chmod(0o644)  # safetensors makes its files private
