"""Files: the tensors and the header of a control's file, or one line that says why it cannot be read.

No code in a file ever runs.
"""

import math
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from configs import ROOT, UserError, cut
from models.loading import file_of, one_line
from models.promptsets import HUB

IN_A_FOLDER = (
    "control.safetensors",
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
)  # ours, PEFT's, diffusers'
BESIDE = "adapter_config.json"  # where PEFT says what adapter_model.safetensors is
PICKLED = (".pt", ".pth", ".bin")
POINTER = b"version https://git-lfs"
PAGES = (b"<!doctype", b"<html", b"<?xml")


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of a safetensors file, or of a .pt of plain tensors; of PEFT's,
    adapter_config.json is in the header.

    Raises UserError when it is neither, and for a number that is not finite.
    """
    path = located(path)
    if path.suffix in PICKLED:
        tensors, metadata = _plain(path), {}
    else:
        with _opened(path) as file:
            tensors, metadata = (
                {name: _tensor(file, name, path) for name in file.keys()},
                file.metadata() or {},
            )
    wrong = next((name for name, tensor in tensors.items() if not finite(tensor)), None)
    if wrong is not None:
        raise UserError(f"{cut(path)}: {cut(wrong)} holds numbers that are not finite")
    return tensors, metadata | _beside(path)


def header(path: str | Path) -> tuple[list[str], dict[str, str]]:
    """The names of a file's tensors, and its header. Raises UserError as `read` does."""
    path = located(path)
    if path.suffix in PICKLED:
        return list(_plain(path)), _beside(path)
    with _opened(path) as file:
        return list(file.keys()), (file.metadata() or {}) | _beside(path)


def located(path: str | Path) -> Path:
    """Where a control's file is: as given, in a folder as given, relative to the project, or on the Hub as
    hub:owner/name/file.

    Raises UserError where there is none.
    """
    text = str(path)
    owner, _, rest = text.removeprefix(HUB).partition("/")
    repo, _, file = rest.partition("/")
    if text.startswith(HUB) and file:
        with one_line(text):
            if file.rpartition("/")[2].startswith("adapter_model"):
                file_of(f"{owner}/{repo}", None, "/".join([*file.split("/")[:-1], BESIDE]))
            return file_of(f"{owner}/{repo}", None, file)
    try:
        places = [
            place
            for given in (Path(text), ROOT / text)
            if text
            for place in (given, *(given / name for name in IN_A_FOLDER))
        ]
        found = next((place for place in places if place.is_file()), None)
    except OSError as error:
        raise UserError(f"{cut(text)}: {error.strerror}") from None
    if found is None:
        raise UserError(
            f"no control file at {cut(text)}; one on the Hub is written hub:owner/name/file.safetensors"
        )
    return found


def finite(tensor: Tensor) -> bool:
    """Whether all numbers are. A finite sum says so at once; one that overflows does not say the contrary."""
    tensor = tensor.float() if tensor.element_size() == 1 and tensor.is_floating_point() else tensor
    if not (tensor.is_floating_point() or tensor.is_complex()) or math.isfinite(abs(tensor.sum())):
        return True
    return bool(tensor.isfinite().all())


def real(name: str, tensor: Tensor) -> Tensor:
    """Weights in fp32. Raises UserError, by the layer's name, for what are no real numbers, and for those
    that fp32 cannot hold.
    """
    if not tensor.is_floating_point():
        raise UserError(
            f"{cut(name)} holds {str(tensor.dtype).removeprefix('torch.')}, not the real numbers of a weight"
        )
    found = tensor.float()
    if not finite(found):
        raise UserError(f"{cut(name)} holds numbers that are not finite in fp32")
    return found


def _opened(path: Path):
    """safetensors' reader. Raises UserError that calls what is no safetensors file by what it is."""
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # a SafetensorError, an OSError, or what Rust makes of a strange header
        raise UserError(
            f"{cut(path)} {_kind(path) or f'is truncated or no safetensors file: {cut(error)}'}"
        ) from None


def _tensor(file, name: str, path: Path) -> Tensor:
    try:
        return file.get_tensor(name)
    except Exception as error:  # a type of numbers that torch has not
        raise UserError(f"{cut(path)}: {cut(name)} cannot be read: {cut(error)}") from None


def _kind(path: Path) -> str:
    """What a file is that is no safetensors file, by its first bytes; empty where they do not say."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    text = head.lstrip().lower()
    kinds = {
        "is empty": not head,
        "is a pickle, which could run code when read; controls are .safetensors files": head[:1] == b"\x80"
        or head[:2] == b"PK",
        "is a Git LFS pointer, not the file itself: fetch that with git lfs pull": head.startswith(POINTER),
        "is a web page, perhaps a login page: download the file itself": text.startswith(PAGES),
        "is JSON, perhaps a server's answer: download the file itself": text[:1] in (b"{", b"[")
        and text.isascii()
        and 0 not in text,
    }
    return next((kind for kind, holds in kinds.items() if holds), "")


def _plain(path: Path) -> dict[str, Tensor]:
    """The original sliders' .pt: a dict of tensors, read without running anything that it holds."""
    kind = _kind(path)
    if kind.startswith(("is a Git", "is a web", "is JSON", "cannot")):
        raise UserError(f"{cut(path)} {kind}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    # what a damaged file does to torch's reader has no end, and torch's own advice is to run the file's code
    except Exception:
        raise UserError(
            f"{cut(path)} is damaged or holds more than plain tensors; nothing else is read"
        ) from None
    if not isinstance(found, dict) or not all(
        isinstance(k, str) and isinstance(v, (Tensor, float, int)) for k, v in found.items()
    ):
        raise UserError(f"{cut(path)} is no flat dict of tensors")
    try:
        tensors = {name: torch.as_tensor(value).detach() for name, value in found.items()}
        strange = [
            name
            for name, tensor in tensors.items()
            if tensor.layout != torch.strided
            or tensor.is_quantized
            or tensor.is_meta
            or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size()
        ]
    except (RuntimeError, ValueError, OverflowError, NotImplementedError):
        raise UserError(f"{cut(path)} holds numbers that no tensor holds") from None
    if strange:
        raise UserError(f"{cut(path)}: {cut(strange[0])} is no plain tensor")
    return tensors


def _beside(path: Path) -> dict[str, str]:
    """What PEFT wrote beside its adapter, as a header's entry."""
    config = path.parent / BESIDE
    if not path.name.startswith("adapter_model") or not config.is_file():
        return {}
    try:
        return {BESIDE: config.read_text(encoding="utf-8")}
    except (OSError, ValueError):
        raise UserError(
            f"{cut(config)}, which says the alpha of {path.name}, is no text that can be read"
        ) from None
