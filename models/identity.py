"""What a member's images depend on, as one hash, so that they can be kept and found again. Reads files; loads no network."""

import hashlib
import json
from dataclasses import asdict
from functools import cache
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from models.families import FamilyCard, MemberCard, place

PARTS = ("model_index.json", "config.json")  # a file that every repo of its kind has


def identity(card: FamilyCard, member: str) -> str:
    """The sha256 of what the card says of a member, and of the files it names: by content in a folder, by commit on the Hub."""
    mine = card.members[member]
    base = card.members[card.base]
    said = {"family": card.name, "size_px": card.size_px, "member": chosen(mine), "base": chosen(base) if mine.file else None}
    sources = [source(card.repo, card.revision, "", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
               source(mine.repo or card.repo, mine.revision, mine.file, mine.subfolder or "")]  # fmt: skip
    return hashlib.sha256(json.dumps([said, sources], sort_keys=True).encode()).hexdigest()


def chosen(member: MemberCard) -> dict:
    """What a card says that is not the default: a new key of cards leaves what was drawn before it as it is."""
    usual = asdict(MemberCard())
    return {key: value for key, value in asdict(member).items() if value != usual[key]}


@cache
def source(repo: str, revision: str | None, file: str, *subfolders: str) -> str:
    """A repo's content: the hash of a folder's files, or the commit that the Hub's cache holds."""
    folder = Path(place(repo))
    if not folder.is_dir():
        named = [file] if file else [f"{sub}/{part}".lstrip("/") for sub in ("", *subfolders) for part in PARTS]
        found = [try_to_load_from_cache(repo, name, revision=revision) for name in named]
        commits = {Path(path).parts[Path(path).parts.index("snapshots") + 1] for path in found if isinstance(path, str)}
        return f"{repo}@{','.join(sorted(commits)) or revision or 'main'}"
    paths = [folder / file] if file else sorted(p for sub in subfolders for p in (folder / sub).rglob("*") if p.is_file())
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
