"""Formats: controls as files.

One layout so far, diffusers' own: keys `unet.<layer>.lora_A.weight`, rank and alpha in the header as diffusers reads them
(without these alpha is lost and rank 4, alpha 1 comes back four times too strong), and our card beside them.
"""

import json
from dataclasses import asdict
from pathlib import Path

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from configs import UserError, replacing
from controls.lora import Card, Control

PREFIX = "unet."
HALVES = (".lora_A.weight", ".lora_B.weight")
PICKLES = (b"PK", b"\x80")  # torch.save's zip archive, and a bare pickle


def save(control: Control, path: str | Path) -> None:
    """Writes one .safetensors file that diffusers' `load_lora_weights` takes as it is, at the same strength."""
    tensors = {PREFIX + name: tensor.contiguous() for name, tensor in control.tensors.items()}
    metadata = {LORA_ADAPTER_METADATA_KEY: json.dumps(_peft(control)), "card": json.dumps(asdict(control.card)), "format": "pt"}
    with replacing(Path(path)) as new:
        save_file(tensors, new, metadata)
        new.chmod(0o644)  # safetensors makes its files private


def load(path: str | Path) -> Control:
    """Reads what `save` wrote, through safetensors only: no code in a file ever runs.

    Raises UserError for a missing or broken file, a pickle, a file without a card, and tensors of another layout.
    """
    tensors, metadata = _read(Path(path))
    strange = [name for name in tensors if not name.startswith(PREFIX) or not name.endswith(HALVES)]
    if strange or not tensors:
        raise UserError(f"{path} is not in diffusers' layout ({PREFIX}<layer>{HALVES[0]}): it holds {', '.join(strange[:2]) or 'nothing'}")
    if "card" not in metadata:
        raise UserError(f"{path} has no card: its header lacks 'card', which says what it is, its rank and its alpha")
    try:
        card = Card(**json.loads(metadata["card"]))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} has a card that this version cannot read: {error}") from None
    return Control(card, {name.removeprefix(PREFIX): tensor.float() for name, tensor in tensors.items()})


def _peft(control: Control) -> dict:
    """What diffusers hands to peft's LoraConfig."""
    layers = sorted({name.rsplit(".lora_", 1)[0] for name in control.tensors})
    return {f"{PREFIX}r": control.card.rank, f"{PREFIX}lora_alpha": control.card.alpha, f"{PREFIX}target_modules": layers}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of a safetensors file. Raises UserError when it is none."""
    if not path.is_file():
        raise UserError(f"no control file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        with path.open("rb") as file:
            if file.read(2).startswith(PICKLES):
                raise UserError(f"{path} is a pickle, which could run code when read; controls are .safetensors files") from None
        raise UserError(f"{path} is truncated or no safetensors file: {str(error).splitlines()[0]}") from None
