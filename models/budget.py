"""What members will load, download and occupy, from configs alone: python -m models.budget family=sdxl
members=[base,dmd2]
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from accelerate import init_empty_weights
from huggingface_hub import HfApi, constants
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from configs import ROOT, UserError, entry, list_of
from models.architectures import ARCHITECTURES, blank
from models.cards import FamilyCard, card
from models.evaluators import EVALUATORS, PACKAGED, Picture
from models.loading import BROKEN, available, config, latent_shape, one_line, place, published, source
from models.quantized import KINDS, inside

if TYPE_CHECKING:  # families stand on both
    from models.sampler import Plan

GB = 1e9
SHARE = 0.5  # of the speed of a plain product, which networks may reach
GPU = 200e12  # operations per second that a network may reach in bf16 on a large GPU
FULL = 4  # bytes of a number in fp32
HALF = 2  # bytes of a number, as the variants fp16 and the weights of transformers are published
WEIGHTS = (".safetensors", ".bin", ".ckpt")
DELTA = 4e8  # bytes of a student's LoRA where nobody says: Lightning's and LCM's of SDXL


@dataclass(frozen=True)
class Need:
    """One part that is loaded."""

    part: str  # a member's name, vae, text_encoder, …
    repo: str
    licence: str
    parameters: int
    # bytes, by the Hub's list of files, or about where it is out of reach; 0 where the files are on disk
    download: float
    memory: float  # bytes on the device


def needs(family: FamilyCard, members: Sequence[str], dtype: torch.dtype, quantize: str = "") -> list[Need]:
    """What the VAE, the text encoders and these members, whole or quantised, need, in the order in which they
    are loaded.

    Reads configs, from the cache or some kilobytes from the Hub. Raises UserError for a config that cannot be
    had.
    """
    own = dict.fromkeys(map(family.holder, members))
    return [
        *shared(family, dtype),
        *(network_need(family, name, dtype, quantize) for name in own),
        *(delta_need(family, name, dtype) for name in members if family.members[name].lora),
    ]


def shared(family: FamilyCard, dtype: torch.dtype) -> list[Need]:
    """The VAE and the text encoders of a family."""
    repo, revision = family.repo, family.revision
    found = []
    for part, kind, values in parts(family):
        count, _ = _count(kind, values)
        narrow = kind.__module__.startswith("transformers") and family.encoders == "network"
        download = _download(repo, revision, part, family.variant, count)
        memory = (dtype.itemsize if narrow else FULL) * count
        found.append(Need(part, repo, family.licence, count, download, memory))
    return found


def parts(family: FamilyCard) -> Iterator[tuple[str, type, dict]]:
    """The VAE and the text encoders of a family: name in the pipeline, class, config. Raises UserError."""
    its, repo, revision = ARCHITECTURES[family.architecture], family.repo, family.revision
    with one_line(repo):
        index = published(its.pipeline, repo, revision)
    for part, value in index.items():
        kind = _network(value)
        if kind is not None and part not in (its.part, *its.absent):
            with one_line(f"{part} of {repo}"):
                values = _config(kind, repo, revision, part)
            yield part, kind, values


def _network(value: Any) -> type | None:
    """The class of a network that a pipeline's index names by library and class; None for anything else."""
    if not isinstance(value, list | tuple) or not all(isinstance(word, str) for word in value):
        return None  # an option
    library, name = value
    if library not in ("diffusers", "transformers"):
        return None
    kind = getattr(import_module(library), name, None)
    return kind if isinstance(kind, type) and issubclass(kind, torch.nn.Module) else None


def network_need(family: FamilyCard, name: str, dtype: torch.dtype, quantize: str = "") -> Need:
    """A member's own network, whole or quantised."""
    member = family.members[name]
    count, packed = _count(ARCHITECTURES[family.architecture].network, config(family, name))
    size = dtype.itemsize * count
    if quantize:
        size += (KINDS[quantize].bits / 8 - dtype.itemsize) * packed
    home, pinned, variant = source(family, member)
    download = _download(home, pinned, member.subfolder or "", variant, count, member.file)
    return Need(name, home, member.licence or family.licence, count, download, size)


def delta_need(family: FamilyCard, name: str, dtype: torch.dtype) -> Need:
    """A LoRA student's delta, which lies beside its base's layers in the network's type."""
    member = family.members[name]
    repo, revision, _ = source(family, member)
    place_of = _file(repo, revision, member.lora)
    size = place_of.stat().st_size if place_of else _sizes(repo, revision).get(member.lora, DELTA)
    count = round(size / HALF)
    return Need(
        name, repo, member.licence or family.licence, count, 0 if place_of else size, count * dtype.itemsize
    )


def evaluator_need(family: FamilyCard, name: str) -> Need:
    """An evaluator, which is held in fp32. Raises UserError for a config that cannot be had."""
    its, kind = getattr(family, name), EVALUATORS[name]
    if name in PACKAGED:
        count, download = PACKAGED[name]
        return Need(name, its, "", round(count), download, FULL * count)
    if not issubclass(kind, Picture):  # a folder of the project
        size = sum(path.stat().st_size for path in Path(place(its)).glob("*.safetensors"))
        return Need(name, its, "", size // FULL, 0, size)
    repo, _, revision = its.partition("@")
    with one_line(f"the evaluator {its}"):
        count = _count_pretrained(kind.kind, repo, revision or None)
    download = _download(repo, revision or None, "", None, count, size=FULL)
    return Need(name, repo, "", count, download, FULL * count)


def _count_pretrained(kind: str, repo: str, revision: str | None) -> int:
    """The weights of a model of transformers, by its config."""
    transformers = import_module("transformers")
    config = transformers.AutoConfig.from_pretrained(place(repo), revision=available(repo, revision))
    if kind == "AutoModel":
        model = transformers.AutoModel._model_mapping[type(config)]
    else:
        model = getattr(transformers, kind)
    return _count(model, config.to_dict())[0]


def effort(family: FamilyCard, name: str) -> float:
    """Floating-point operations of one evaluation of a member for one image.

    Reads configs; raises UserError without them.
    """
    return _effort(*about(family, name))


@cache
def _effort(*about: Hashable) -> float:
    _, evaluate = unweighted(*about, torch.bfloat16)
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        evaluate()
    return float(counter.get_total_flops())


def about(family: FamilyCard, name: str) -> tuple[str, str, tuple[int, int, int]]:
    """What one evaluation of a member depends on: architecture, config of the network, shape of a latent."""
    return family.architecture, key(config(family, name)), latent_shape(family)


def key(config: dict) -> str:
    """A config as a text, by which what follows from it is kept."""
    return json.dumps(config, sort_keys=True, default=str)


def unweighted(
    architecture: str, values: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> tuple[torch.nn.Module, Callable[[], Tensor]]:
    """A network on torch's `meta` device, and one evaluation of it for one latent."""
    its = ARCHITECTURES[architecture]
    with init_empty_weights():
        net = torch.nn.Module.to(its.network.from_config(json.loads(values)), "meta", dtype)
    x, prompts = torch.zeros(1, *shape, device="meta", dtype=dtype), blank(its, net).to(dtype)
    return net, torch.no_grad()(partial(its.call, net, x, 500.0, prompts, None))


@cache
def pace(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second that a network may reach on a device: half of what a large product
    of matrices does.
    """
    size = 8192 if device.type == "cuda" else 1024
    a, start, done = torch.ones(size, size, device=device, dtype=dtype), time.perf_counter(), 0
    while time.perf_counter() - start < 0.5:
        float((a @ a)[0, 0])  # waits for the device
        done += 1
    return SHARE * done * 2 * size**3 / (time.perf_counter() - start)


def duration(family: FamilyCard, calls: Mapping[str, float], device: torch.device, dtype: torch.dtype) -> str:
    """How long evaluations, counted per member, may take on a device, in words: a rough guess, of the
    networks alone.
    """
    try:
        work = sum(count * effort(family, name) for name, count in calls.items() if count)
    except UserError as error:
        return f"unknown ({error})"
    planned = device.type == "cuda" and not torch.cuda.is_available()  # for another machine
    here = "" if planned else f"{spelt(work / pace(device, dtype))} on one such {device.type}, "
    return (
        f"roughly {here}{spelt(work / GPU)} at {GPU / 1e12:.0f} TFLOP/s, for "
        f"{work / 1e12:.3g} TFLOP in the networks"
    )


def spelt(seconds: float) -> str:
    """A duration in its best unit."""
    for size, unit in ((86400, "days"), (3600, "hours")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.1f} minutes"


def forecast(
    family: FamilyCard,
    calls: Mapping[str, float],
    dtype: torch.dtype,
    device: torch.device,
    evaluators: Sequence[str] = (),
    quantize: str = "",
) -> str:
    """What a run will load and evaluate, and how long that takes, as text; calls: evaluations by member."""
    try:
        parts = table(
            [
                *needs(family, list(calls), dtype, quantize),
                *(evaluator_need(family, name) for name in evaluators),
            ]
        )
    except UserError as error:
        parts = f"download and memory: unknown ({error})"
    asked = ", ".join(f"{count:.0f} of {name}" for name, count in calls.items())
    return f"{parts}\nnetwork evaluations: {asked}\ntime: {duration(family, calls, device, dtype)}"


def nfe_by_member(plans: Iterable[tuple["Plan", int]]) -> Counter[str]:
    """Network evaluations by member of plans, each for so many images."""
    calls = Counter()
    for plan, images in plans:
        for member, count in plan.nfe_by_member.items():
            calls[member.rpartition("/")[2]] += images * count
    return calls


def free(device: torch.device) -> float:
    """Bytes that are free on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def check(
    what: str, needed: Sequence[Need], device: torch.device, dtype: torch.dtype, fixed: bool = False
) -> None:
    """Raises UserError, with what would fit, when parts need more memory than is free; fixed: dtype is not
    the user's to choose.
    """
    need, room = sum(part.memory for part in needed), free(device)
    if need <= room:
        return
    smaller, way = need * HALF / dtype.itemsize, "fewer members at once, or another device, would fit"
    if not fixed and dtype.itemsize > HALF and smaller <= room:
        way = f"dtype=bf16 needs {smaller / GB:.1f}"
    raise UserError(
        f"{what} needs {need / GB:.1f} GB of memory on {device.type} in "
        f"{str(dtype).removeprefix('torch.')}, {room / GB:.1f} are free; {way}"
    )


def table(needed: Sequence[Need]) -> str:
    """The budget as text: a line per part, and the sums."""
    rows = [
        (n.part, f"{n.parameters / GB:.3g}", _gb(n.download), _gb(n.memory), n.repo, n.licence)
        for n in needed
    ]
    total = ("together", "", _gb(sum(n.download for n in needed)), _gb(sum(n.memory for n in needed)), "", "")
    head = ("part", "10^9 parameters", "GB to download", "GB of memory", "repository", "licence")
    lines = [head, *rows, total]
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _gb(size: float) -> str:
    return f"{size / GB:.1f}" if size >= 0.05 * GB or not size else f"{size / GB:.2g}"


def _config(kind: type, repo: str, revision: str | None, subfolder: str) -> dict:
    """A part's config as plain values."""
    if hasattr(kind, "load_config"):  # diffusers'
        return published(kind, repo, revision, subfolder)
    home = {"subfolder": subfolder, "revision": available(repo, revision)}
    return import_module("transformers").AutoConfig.from_pretrained(place(repo), **home).to_dict()


def _count(kind: type, config: dict) -> tuple[int, int]:
    return _counted(kind, key(config))


@cache
def _counted(kind: type, config: str) -> tuple[int, int]:
    """The number of parameters of a network by its config, and how many of them quantising packs."""
    values = json.loads(config)
    with init_empty_weights():
        if hasattr(kind, "load_config"):  # diffusers'
            net = kind.from_config(values)
        else:
            net = kind(kind.config_class.from_dict(values))
    if hasattr(net, "tie_weights"):
        net.tie_weights()  # on the meta device shared embeddings are two
    return sum(weight.numel() for weight in net.parameters()), sum(
        net.get_submodule(name).weight.numel() for name in inside(net)
    )


def _download(
    repo: str,
    revision: str | None,
    subfolder: str,
    variant: str | None,
    count: int,
    file: str = "",
    size: int = HALF,
) -> float:
    """Bytes of the files that diffusers fetches for a part; without the Hub, `size` bytes a number."""
    folder = f"{subfolder}/" if subfolder else ""
    home = _home(repo, revision)
    if file:
        return 0 if _file(repo, revision, file) else _sizes(repo, revision).get(file, size * count)
    if home and _chosen([path.name for path in (home / subfolder).glob("*") if path.is_file()], variant):
        return 0
    every = _sizes(repo, revision)
    sizes = {name.removeprefix(folder): every[name] for name in every if name.startswith(folder)}
    return sum(sizes[name] for name in _chosen(sizes, variant)) or size * count


def _chosen(names: Iterable[str], variant: str | None) -> list[str]:
    """The weight files of a folder that diffusers takes: the variant's, safetensors before others."""
    marks = (f".{variant}.", f".{variant}-") if variant else ()  # the latter in front of a shard's number
    right = [
        name
        for name in names
        if "/" not in name and (any(m in name for m in marks) if marks else name.count(".") == 1)
    ]
    return next((found for kind in WEIGHTS if (found := [name for name in right if name.endswith(kind)])), [])


@cache
def _sizes(repo: str, revision: str | None) -> dict[str, int]:
    """A repository's files with their sizes; none where the Hub is out of reach or says nothing."""
    if constants.HF_HUB_OFFLINE:
        return {}
    try:
        return {
            file.rfilename: file.size or 0
            for file in HfApi().model_info(repo, revision=revision, files_metadata=True).siblings
        }
    except BROKEN:
        return {}


def _home(repo: str, revision: str | None) -> Path | None:
    """Where a repository's revision lies on disk; None where it does not."""
    if Path(place(repo)).is_dir():
        return Path(place(repo))
    cached = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    revision = available(repo, revision) or "main"
    named = cached / "refs" / revision
    found = cached / "snapshots" / (named.read_text().strip() if named.is_file() else revision)
    return found if found.is_dir() else None


def _file(repo: str, revision: str | None, file: str) -> Path | None:
    """Where a file of a repository, or one of one's own, lies on disk; None where it does not."""
    home = _home(repo, revision)
    return next(
        (path for path in [*([home / file] if home else []), Path(file), ROOT / file] if path.is_file()), None
    )


@dataclass
class Config:
    family: str = "tiny"  # a card in configs/families, or the path of one
    members: list[str] = list_of()  # empty = all of the family
    dtype: str = "bf16"  # of the networks: bf16, fp16, fp32


def main(cfg: Config) -> None:
    """Prints the budget."""
    family, dtypes = card(cfg.family), {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    unknown = [name for name in cfg.members if name not in family.members]
    if unknown or cfg.dtype not in dtypes:
        raise UserError(
            f"no member or dtype {(unknown or [cfg.dtype])[0]!r}; there are "
            f"{', '.join([*family.members, *dtypes])}"
        )
    print(table(needs(family, cfg.members or list(family.members), dtypes[cfg.dtype])))


if __name__ == "__main__":
    entry(main, Config)
