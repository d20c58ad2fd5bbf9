"""What a member's images depend on, as one hash, so that they can be kept and found again: by its files, or
by a network's weights.
"""

import hashlib
import json
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn

from configs import UserError
from models.cards import FamilyCard, MemberCard
from models.loading import file_hash, one_line, place

# of a card: where, not how
PLACES = ("repo", "revision", "variant", "subfolder", "file", "lora", "sha256", "licence", "trained_px")
# keys as the first hashes wrote them
FORMER = {"prediction_type": "kind", "noise_schedule": "law", "lora_scale": "strength"}
PARTS = ("model_index.json", "config.json")  # a file that every repo of its kind has


def identity(card: FamilyCard, member: str) -> str:
    """The sha256 of how the card says that a member is run, and of the files it names: by content on disk, by
    commit on the Hub.
    """
    mine = card.members[member]
    base = card.members[card.holder(member) if mine.lora else card.base]
    said = {"family": card.name, "size_px": card.size_px, "member": manner(mine)}
    home = (mine.repo or card.repo, mine.revision or card.revision)
    sources = [
        content(
            card.repo, card.revision, "", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"
        ),
        content(*home, mine.file, mine.subfolder or ""),
    ]
    if mine.file or mine.lora:  # a file is of the base's architecture, a LoRA acts on the base's weights
        its = (base.repo or card.repo, base.revision or card.revision)
        sources.append(content(*its, base.file, base.subfolder or ""))
    if mine.lora:
        sources.append(content(*home, mine.lora))
    return hashlib.sha256(json.dumps([said, sources], sort_keys=True).encode()).hexdigest()


def manner(member: MemberCard) -> dict:
    """How a member is run, not where its files are, and only what is not the default: a new key of cards
    leaves hashes as they are.
    """
    usual = asdict(MemberCard())
    return {
        FORMER.get(key, key): value
        for key, value in asdict(member).items()
        if key not in PLACES and value != usual[key]
    }


@cache
def content(repo: str, revision: str | None, file: str, *subfolders: str) -> str:
    """A repo's content: the hash of files on disk, or the commit that the Hub's cache holds."""
    folder = Path(place(repo))
    if file and Path(file).is_file():
        paths, folder = [Path(file)], Path(file).parent
    elif folder.is_dir() and file:
        paths = [folder / file]
    elif folder.is_dir():
        paths = sorted(p for sub in subfolders for p in (folder / sub).rglob("*") if p.is_file())
    else:
        parts = [f"{sub}/{part}".lstrip("/") for sub in ("", *subfolders) for part in PARTS]
        named = [file] if file else parts
        with one_line(repo):
            found = [try_to_load_from_cache(repo, name, revision=revision) for name in named]
        commits = {
            Path(path).parts[Path(path).parts.index("snapshots") + 1]
            for path in found
            if isinstance(path, str)
        }
        return f"{repo}@{','.join(sorted(commits)) or revision or 'main'}"
    if not paths or not all(path.is_file() for path in paths):
        raise UserError(
            f"{repo} holds no {file or ' or '.join(filter(None, subfolders)) or 'file'}, so nothing tells "
            f"its images apart"
        )
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(bytes.fromhex(file_hash(path)))
    return digest.hexdigest()


def bare(net: nn.Module) -> dict[str, nn.Parameter]:
    """A network's own weights by name, whatever controls are attached."""
    return {
        name.replace(".base_layer.", "."): weight
        for name, weight in net.named_parameters()
        if ".lora_A." not in name and ".lora_B." not in name
    }


def fingerprint(net: nn.Module) -> str:
    """The sha256 of the bare network's parameters as fp32.

    The same with controls attached or not (though not inside `fused`), for fp16 weights loaded as fp32, and
    after quantising.
    """
    if hasattr(net, "fingerprint"):  # noted when it was quantised
        return net.fingerprint
    digest = hashlib.sha256()
    for name, weight in sorted(bare(net).items()):
        weight = weight.detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.numpy())
    return digest.hexdigest()
