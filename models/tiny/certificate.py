"""Measures the embedded family and writes its birth certificate, models/tiny/README.md: python -m
models.tiny.certificate

Takes the training records from runs/tiny where they are, else keeps those of the last certificate.
"""

import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from configs import ROOT, entry, replacing, versions
from models.evaluators import Clip
from models.families import Family
from models.loading import file_hash
from models.tiny import world
from models.tiny.evaluators import Probe, column
from models.tiny.faces import ATTRIBUTES, BACKGROUNDS, HAIR_STYLES, HAIRS, SKINS, claims

HERE = ROOT / "models/tiny"
SHOWN = (
    "portrait of a young person, smiling, long blond hair",
    "portrait of an old person, frowning, bald, glasses",
    "portrait of a person, dark skin, curly black hair, big eyes",
    "portrait of a person, hat, beard, yellow background",
    "portrait of a person, red hair, serious, pink background",
    "portrait of a person, glasses, hat, smiling",
    "portrait of a person, tan skin, no hat, no glasses",
    "portrait of a person",
)
NAMED = (  # what of a portrait has a name: label, the attributes' kind, the names that it may have
    ("skin", "skin", SKINS),
    ("hair style", "hair", HAIR_STYLES),
    ("hair colour", "hair", HAIRS),
    ("background", "background", BACKGROUNDS),
)


@dataclass
class Config:
    prompts: int = 240  # held-out captions whose claims are checked, one image each
    groups: int = 8  # prompts of the diversity measure
    seeds: int = 24  # images per such prompt
    work: str = "runs/tiny"  # where train/tiny.py left its logs


def main(cfg: Config) -> None:
    """Measures everything, writes certificate.json, the sheet and README.md."""
    family = Family("tiny", dtype=torch.float32)
    probe = Probe.load(HERE / "weights/probe")
    found = {
        "versions": versions(),
        "machine": platform.machine(),
        "training": training(Path(cfg.work)),
        "hashes": hashes(),
        "probe": probe_scores(probe),
        "clip": clip_scores(),
        "members": {},
    }
    for name in tqdm(family.card.members, "members"):
        obeys = agreement(family, name, probe, cfg.prompts)
        found["members"][name] = {"agreement": obeys, "distance": variety(family, name, probe, cfg)}
    sheet(family, HERE / "sheet.png")
    text = page(found)
    for file, content in {"certificate.json": json.dumps(found, indent=1) + "\n", "README.md": text}.items():
        with replacing(HERE / file) as new:
            new.write_text(content)
    print(text)


def agreement(family: Family, member: str, probe: Probe, count: int) -> dict[str, float]:
    """Share of images, per attribute, in which the probe sees what the prompt claims; prompts are captions of
    held-out faces.
    """
    texts = world.captions(world.faces(count, 555), 555)
    seen = probe(family.draw(family.member(member), texts, list(range(count)))).numpy()
    votes: dict[str, list[bool]] = {}
    for text, values in zip(texts, seen, strict=True):
        for name, ok in checks(claims(text), values).items():
            votes.setdefault(name, []).append(ok)
    return {name: float(np.mean(votes[name])) for name in sorted(votes)}


def checks(claimed: dict[str, float], seen: np.ndarray) -> dict[str, bool]:
    """Which claims the probed values bear out: scalars on the claimed side, names where the claimed one is
    the largest.
    """

    ok = {}
    for name, target in claimed.items():
        kind, _, word = name.partition(" ")
        value = seen[column(name)]
        if name in ("age", "eyes", "size"):
            ok[name] = abs(value - 0.5) < 0.3 if target == 0.5 else (value - 0.5) * (target - 0.5) > 0
        elif name in ("smile", "x"):
            ok[name] = value * target > 0.15 if target else abs(value) < 0.45
        elif name in ("glasses", "beard", "hat"):
            ok[name] = (value > 0.5) == bool(target)
        for label, of, names in NAMED:
            if kind == of and word in names:
                ok[label] = value == max(seen[column(f"{kind} {other}")] for other in names)
    return {name: bool(v) for name, v in ok.items()}


def variety(family: Family, member: str, probe: Probe, cfg: Config) -> dict[str, float]:
    """Mean pairwise Euclidean distance of the probe's attributes over seeds: mean and standard error over
    prompts.
    """
    means = []
    for text in family.card.prompts[: cfg.groups]:
        seen = probe(
            family.draw(family.member(member), [text] * cfg.seeds, [70_000 + k for k in range(cfg.seeds)])
        )
        means.append(torch.pdist(seen).mean().item())
    return {"mean": float(np.mean(means)), "error": float(np.std(means, ddof=1) / len(means) ** 0.5)}


@torch.no_grad()
def probe_scores(probe: Probe) -> dict[str, float]:
    """On 1000 held-out portraits: R² of the scalars and of the yes-or-no attributes, accuracy of the named
    ones.
    """
    people = world.faces(1000, 556)
    truth, seen = world.truth(people), probe(world.to_unit(world.pictures(people)))
    error, spread = (truth - seen).square().mean(0), truth.var(0, unbiased=False)
    scores = {f"R² {name}": 1 - (error / spread)[column(name)].item() for name in ATTRIBUTES[:8]}
    for label, kind, names in NAMED:
        if label == "hair colour":  # bald heads have none
            continue
        at = [column(f"{kind} {name}") for name in names]
        scores[f"accuracy {label}"] = (truth[:, at].argmax(1) == seen[:, at].argmax(1)).float().mean().item()
    return scores


def clip_scores() -> dict[str, float]:
    """On 1000 held-out portraits: the caption found among 100, and zero-shot accuracy between two
    descriptions.
    """
    clip, people = Clip(str(HERE / "weights/clip")), world.faces(1000, 557)
    seen = torch.from_numpy(clip.features(world.to_unit(world.pictures(people))))
    texts = torch.from_numpy(clip.texts(world.captions(people, 557, keep=1.0)))
    hits = [
        (a @ b.T).argmax(1) == torch.arange(len(a))
        for a, b in zip(seen.split(100), texts.split(100), strict=True)
    ]
    scores = {"retrieval among 100": torch.cat(hits).float().mean().item()}
    pairs = {
        "smile": ("smiling", "frowning", 0.3, -0.3),
        "age": ("old", "young", 0.65, 0.35),
        "eyes": ("big eyes", "small eyes", 0.65, 0.35),
        "glasses": ("glasses", "no glasses", 0.5, 0.5),
        "hat": ("hat", "no hat", 0.5, 0.5),
        "beard": ("beard", "no beard", 0.5, 0.5),
    }
    for name, (more, less, high, low) in pairs.items():
        text = "portrait of a {} person" if name == "age" else "portrait of a person, {}"
        difference = torch.from_numpy(clip.score(seen.numpy(), text.format(more), text.format(less)))
        truth = torch.tensor([float(getattr(face, name)) for face in people])
        clear = (truth > high) | (truth < low)
        scores[f"zero-shot {name}"] = ((difference > 0) == (truth > high))[clear].float().mean().item()
    return scores


def training(work: Path) -> dict:
    """Steps, minutes and last losses of each part, from its log, or as the last certificate has them."""
    before = HERE / "certificate.json"
    found = json.loads(before.read_text())["training"] if before.exists() else {}
    for path in sorted(work.glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        pace = [
            (b["seconds"] - a["seconds"]) / (b["step"] - a["step"])
            for a, b in pairwise(lines)
            if "seconds" in a and b.get("seconds", 0) > a["seconds"] and b["step"] > a["step"]
        ]
        last = {k: v for k, v in lines[-1].items() if k not in ("step", "seconds")}
        steps = lines[-1]["step"] + 25
        found[path.stem] = {
            "steps": steps,
            "minutes": round(float(np.mean(pace)) * steps / 60, 1) if pace else None,
            **last,
        }
    return found


def hashes() -> dict[str, str]:
    """sha256 of every weights file, first 16 digits."""
    files = sorted((HERE / "weights").rglob("*.safetensors"))
    return {str(file.relative_to(HERE / "weights")): file_hash(file)[:16] for file in files}


def sheet(family: Family, path: Path, scale: int = 2) -> None:
    """Prompts in columns, members in rows, the same seeds: the picture of the certificate."""
    size, margin = 64 * scale, 76
    members = family.card.members
    page = Image.new("RGB", (margin + size * len(SHOWN), size * len(members)), "white")
    for r, name in enumerate(members):
        pictures = family.draw(family.member(name), list(SHOWN), [3] * len(SHOWN))
        ImageDraw.Draw(page).text((6, r * size + size // 2 - 6), name, "black")
        for c, picture in enumerate(((pictures + 1) * 127.5).round().byte()):
            tile = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize(
                (size, size), Image.Resampling.NEAREST
            )
            page.paste(tile, (margin + c * size, r * size))
    with replacing(path) as new:
        page.save(new)


def table(head: list[str], rows: Iterable[Iterable]) -> str:
    """A markdown table; floats with three digits."""

    shown = [
        [f"{v:.3f}" if isinstance(v, float) else "" if v is None else str(v) for v in row] for row in rows
    ]
    lines = [head, ["---"] * len(head), *shown]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(found: dict) -> str:
    """The certificate in words and tables."""
    members = found["members"]
    names = sorted({a for m in members.values() for a in m["agreement"]})
    base = members["base"]["distance"]["mean"]
    total = sum(part["minutes"] or 0 for part in found["training"].values())
    distances = [
        [n, m["distance"]["mean"], m["distance"]["error"], m["distance"]["mean"] / base]
        for n, m in members.items()
    ]
    training = [
        [n, p["steps"], p["minutes"], ", ".join(f"{k} {p[k]}" for k in p if k not in ("steps", "minutes"))]
        for n, p in found["training"].items()
    ]
    return f"""# Birth certificate of the embedded family

Written by `python -m models.tiny.certificate`; every number below is measured by that command. The weights
come from `python train/tiny.py all`, seed 0: {total:.0f} minutes on 2 CPU cores ({found["machine"]}, fp32,
torch {found["versions"]["torch"]}, diffusers {found["versions"]["diffusers"]}), other work beside them.
They were made in pieces on two machines, and the schedules of base and lightning were shortened midway
(LOG.md): a fresh run follows the same recipe and does not give the same bits.

![8 prompts in columns, members in rows, one seed](sheet.png)

Columns: {"; ".join(SHOWN)}.

## Does it obey?
Share of images in which the probe sees what the prompt claims; prompts are captions of held-out faces, one
image each.

{table(["attribute", *members], [[a, *(m["agreement"].get(a) for m in members.values())] for a in names])}

## Does a student lose diversity?
Mean pairwise distance of the probed attributes between images of one prompt, averaged over prompts (standard
error over prompts).

{table(["member", "distance", "± error", "of base"], distances)}

## Training
Minutes are steps times the measured seconds per step.

{table(["part", "steps", "minutes", "last losses"], training)}

## Evaluators, on 1000 held-out portraits each
{table(["probe", "score"], found["probe"].items())}

{table(["CLIP", "score"], found["clip"].items())}

## Hashes (sha256, first 16 digits)
{table(["file", "sha256"], found["hashes"].items())}
"""


if __name__ == "__main__":
    entry(main, Config)
