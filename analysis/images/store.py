"""Tensors kept on disk that are known to be whole: each file says what it is of, and has a checksum of its
numbers inside.

A file that was cut, changed, emptied or put in another's place is not there for its reader: what it held is
made again.
"""

import hashlib
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from configs import UserError, note, replacing
from configs.errors import cut

DAY = 86400  # seconds after which a half-written file is nobody's any more


def write(path: Path, tensors: Mapping[str, Tensor], what: str) -> None:
    """Writes tensors under the name of what they are of; whole or not at all.

    Raises UserError for numbers that are not finite.
    """
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(
                f"{cut(what, 200)} is not kept, for its {cut(name, 60)} is not finite: a smaller scale, or "
                f"dtype=fp32, may do, "
                "or weights are damaged"
            )
    with replacing(Path(path)) as new:
        save_file(tensors, new, {"what": what, "sha256": checksum(tensors)})


def read(path: Path, what: str) -> dict[str, Tensor] | None:
    """The tensors of a file; None where there is none, or where it is not whole or of something else."""
    try:
        with safe_open(path, framework="pt") as file:
            about, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, ValueError, RuntimeError):
        return None
    whole = about.get("what") == what and about.get("sha256") == checksum(tensors)
    return tensors if whole else None


def load(path: Path, what: str) -> dict[str, Tensor]:
    """The same of a file that was seen to be whole. Raises UserError where it is so no more."""
    found = read(path, what)
    if found is None:
        raise UserError(f"{path} was damaged or removed while this run read it: run the same command again")
    return found


def missing(folder: Path, files: Iterable[str]) -> set[str]:
    """Those files of a folder, each of what its path there says, that are still to be made; what is damaged
    is among them, and said.
    """
    lost = {file for file in files if read(Path(folder) / file, file) is None}
    spoilt = [file for file in lost if (Path(folder) / file).exists()]
    if spoilt:
        note(
            f"{len(spoilt)} of the files in {folder} are damaged, or of an earlier version: they are made "
            f"again"
        )
    return lost


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of names, types, shapes and numbers."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(errors="surrogatepass"))
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def sweep(folder: Path) -> None:
    """Removes what killed runs left half-written in a folder that runs share; what may be another's at work
    stays for a day.
    """
    for path in Path(folder).glob("**/.*.safetensors"):
        try:
            if time.time() - path.stat().st_mtime > DAY:
                path.unlink()
        except OSError:  # another process was faster
            continue
