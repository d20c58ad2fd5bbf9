"""Loading: from what a card says to networks and pipelines, and every failure in one line."""

import gc
import hashlib
import json
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError

import torch
from accelerate import init_empty_weights
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from configs import ROOT, UserError, replacing
from models.architectures import ARCHITECTURES
from models.cards import FamilyCard, MemberCard
from models.latents import LATENTS

BROKEN = (OSError, EOFError, ValueError, RuntimeError, HfHubHTTPError, SafetensorError, UnpicklingError)

# a network's keys in a checkpoint as Stability's code, trainers and civitai save it
ORIGINAL = "model.diffusion_model."
LARGE = 2**24  # bytes of a file whose hash is worth keeping


def place(repo: str) -> str:
    """A repo as diffusers wants it: a folder of the project as an absolute path, a Hub id as it is."""
    return str(ROOT / repo) if (ROOT / repo).is_dir() else repo


@cache
def settle() -> None:
    """What is imported is never garbage: it need not be looked through each time that networks go."""
    gc.collect()
    gc.freeze()


def fetch(kind, repo: str, revision: str | None = None, **options):
    """from_pretrained of a folder of the project or a repo of the Hub; raises UserError."""
    settle()  # the first time, nothing is loaded yet
    for library in ("diffusers", "transformers"):
        import_module(f"{library}.utils.logging").disable_progress_bar()
    with one_line(repo):
        inside(repo, options.get("subfolder"))
        return kind.from_pretrained(place(repo), revision=available(repo, revision), **options)


def published(kind, repo: str, revision: str | None, subfolder: str | None = None) -> dict:
    """The config that a repository has for a class of diffusers; call it in `one_line`."""
    return dict(kind.load_config(place(repo), subfolder=subfolder, revision=available(repo, revision)))


def inside(repo: str, subfolder: str | None) -> None:
    """Raises FileNotFoundError for a missing subfolder: diffusers would take what lies beside it."""
    if subfolder and Path(place(repo)).is_dir() and not (Path(place(repo)) / subfolder).is_dir():
        raise FileNotFoundError(f"it has no folder {subfolder}")


def source(family: FamilyCard, member: MemberCard) -> tuple[str, str | None, str | None]:
    """The repo of a member's network, its revision and the variant of its files."""
    if member.repo:
        return member.repo, member.revision, member.variant
    return family.repo, member.revision or family.revision, member.variant or family.variant


def network(
    family: FamilyCard, name: str, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> nn.Module:
    """A member's own network in a type, on a device. Raises UserError in one line for what cannot be loaded.

    A file is mapped, not read, so that beside the network itself no more memory is taken than for a tensor of
    it.
    """
    member, device = family.members[name], torch.device(device)
    kind = ARCHITECTURES[family.architecture].network
    repo, revision, variant = source(family, member)
    if not member.file:
        straight = {} if device.type in ("cpu", "meta") else {"device_map": {"": device}}
        return fetch(
            kind, repo, revision, subfolder=member.subfolder, variant=variant, dtype=dtype, **straight
        )
    base = family.members[family.base]
    with one_line(f"{member.file} of {repo}"):
        weights = plain_weights(file_of(repo, revision, member.file, member.sha256))
        home, pinned, _ = source(family, base)
        if any(key.startswith(ORIGINAL) for key in weights):
            where = {
                "config": place(home),
                "subfolder": base.subfolder,
                "config_revision": available(home, pinned),
            }
            return kind.from_single_file(weights, dtype=dtype, **where).to(device)
        net = skeleton(family, family.base)
        net.load_state_dict({key: weight.to(device, dtype) for key, weight in weights.items()}, assign=True)
    return net


def config(family: FamilyCard, name: str) -> dict:
    """The config of a member's network: its own, or the base's. Raises UserError."""
    like = family.members[family.holder(name)]
    if like.file:
        like = family.members[family.base]
    home, pinned, _ = source(family, like)
    with one_line(f"the config of {name} in {home}"):
        inside(home, like.subfolder)
        return published(ARCHITECTURES[family.architecture].network, home, pinned, like.subfolder)


def skeleton(family: FamilyCard, name: str) -> nn.Module:
    """A member's network without weights, for the names and shapes of its layers.

    Reads a config; raises UserError.
    """
    with init_empty_weights(include_buffers=False):
        return ARCHITECTURES[family.architecture].network.from_config(config(family, name))


@cache
def published_scheduler(repo: str, revision: str | None) -> dict:
    """The config of the scheduler that lies beside a network. Raises UserError where there is none."""
    from diffusers import DDIMScheduler

    with one_line(f"the scheduler's config in {repo}"):
        inside(repo, "scheduler")
        return published(DDIMScheduler, repo, revision, "scheduler")


def latent_shape(family: FamilyCard) -> tuple[int, int, int]:
    """(C, H, W) of one latent, by the VAE's config. Raises UserError."""
    kind = import_module("diffusers").AutoencoderKL
    with one_line(f"the VAE's config in {family.repo}"):
        its = published(kind, family.repo, family.revision, "vae")
    if its["_class_name"] not in LATENTS:
        raise UserError(f"{family.repo}: the VAE is a {its['_class_name']}; known are {', '.join(LATENTS)}")
    return LATENTS[its["_class_name"]].shape(its, family.size_px)


def file_of(repo: str, revision: str | None, file: str, sha256: str = "") -> Path:
    """Where a file of a folder or of the Hub lies on disk.

    Raises UserError for another hash than the card's; call it in `one_line`.
    """
    folder = Path(place(repo))
    near = next((path for path in (folder / file, Path(file), ROOT / file) if path.is_file()), None)
    if near is None and (folder.is_dir() or Path(file).is_absolute()):
        raise FileNotFoundError("there is no such file")
    path = near or Path(hf_hub_download(repo, file, revision=available(repo, revision)))
    if sha256 and file_hash(path) != sha256:
        raise UserError(
            f"{file} of {repo} is not the file of the card: its sha256 differs from {sha256[:12]}…"
        )
    return path


def file_hash(path: Path) -> str:
    """The sha256 of a file; of a large one it is kept beside the Hub's cache, for as long as time and size of
    the file stay.
    """
    about, notes = path.stat(), Path(constants.HF_HOME) / "distilled-control-hashes.json"
    key, known = f"{path.resolve()} {about.st_mtime_ns} {about.st_size}", {}
    with suppress(OSError, ValueError):
        known = json.loads(notes.read_text()) if about.st_size >= LARGE else {}
    if not isinstance(known.get(key), str):
        with path.open("rb") as opened:
            known[key] = hashlib.file_digest(opened, "sha256").hexdigest()
        with suppress(OSError):  # a cache that cannot be written is read anew each time
            if about.st_size >= LARGE:
                with replacing(notes) as new:
                    new.write_text(json.dumps(known, indent=0))
    return known[key]


def plain_weights(path: Path) -> dict[str, Tensor]:
    """A safetensors file, or a .bin or .ckpt of plain tensors, of which no code is run; of a checkpoint of
    all parts its network's alone.

    The tensors are the mapped file where it allows it: they take memory when they are changed or moved.
    """
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in _own(opened.keys())}
    found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    found = found.get("state_dict", found)
    return {key: found[key] for key in _own(found)}


def _own(keys: Iterable[str]) -> list[str]:
    """The keys of a checkpoint's network: those of the original layout where there are any, else all."""
    keys = list(keys)
    return [key for key in keys if key.startswith(ORIGINAL)] or keys


def available(repo: str, revision: str | None) -> str | None:
    """The pinned revision; where the Hub is out of reach and the cache holds only another one, that, with a
    warning.
    """
    home = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    if not (revision and constants.HF_HUB_OFFLINE and home.is_dir()):
        return revision
    if (
        (home / "snapshots" / revision).is_dir()
        or (home / "refs" / revision).is_file()
        or not (home / "refs/main").is_file()
    ):
        return revision
    other = (home / "refs/main").read_text().strip()
    warnings.warn(
        f"{repo}: the card pins revision {revision[:12]}, the cache holds only {other[:12]}, which is used",
        stacklevel=2,
    )
    return other


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """The many ways in which the Hub and a damaged file fail, in one line."""
    try:
        yield
    except BROKEN as error:
        raise UserError(f"cannot load {what}: {_reason(error)}") from None


GATED = (
    "its repository is gated: accept the licence on its page at huggingface.co, then `hf auth login` or set "
    "HF_TOKEN"
)
UNKNOWN = (
    "the Hub knows no such repository, or it is private: check the name; for a private one `hf auth login`"
)


def _reason(error: BaseException) -> str:
    """What went wrong, in words that help; the library that failed may have wrapped the Hub's own error."""
    chain = [error]
    while above := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(above)
    kinds = tuple(type(link) for link in chain)
    if GatedRepoError in kinds or "gated repo" in str(error):
        return GATED
    if RepositoryNotFoundError in kinds:
        return UNKNOWN
    if LocalEntryNotFoundError in kinds:
        offline = constants.HF_HUB_OFFLINE
        why = "HF_HUB_OFFLINE keeps it from being downloaded" if offline else "the Hub cannot be reached"
        return f"it is not in the cache, and {why}"
    return " ".join(str(error).split())[:200]
