"""Measures the embedded family and writes its birth certificate, models/tiny/README.md: python -m
models.tiny.certificate

Takes the training records from runs/tiny where they are, else keeps those of the last certificate.
"""

import hashlib
import json
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm
from transformers import AutoTokenizer, CLIPModel

from configs import ROOT, entry, replacing, versions
from models.families import Family
from models.tiny import world
from models.tiny.evaluators import Probe, clip_images, clip_texts, column
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


@dataclass
class Config:
    prompts: int = 240  # held-out captions whose claims are checked, one image each
    groups: int = 8  # prompts of the diversity measure
    seeds: int = 24  # images per such prompt
    work: str = "runs/tiny"  # where train/tiny.py left its logs


def main(cfg: Config) -> None:
    """Measures everything, writes certificate.json, the sheet and README.md."""
    family, probe = Family("tiny", dtype=torch.float32), Probe.load(HERE / "weights/probe")
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

    def value(name):
        return seen[column(name)]

    ok: dict[str, bool] = {}
    for name, target in claimed.items():
        kind, _, word = name.partition(" ")
        if name in ("age", "eyes", "size"):
            ok[name] = (
                (value(name) > 0.5)
                if target == 1
                else (value(name) < 0.5)
                if target == 0
                else abs(value(name) - 0.5) < 0.3
            )
        elif name in ("smile", "x"):
            ok[name] = (value(name) * target > 0.15) if target else abs(value(name)) < 0.45
        elif name in ("glasses", "beard", "hat"):
            ok[name] = (value(name) > 0.5) == bool(target)
        else:
            table = {
                "skin": SKINS,
                "background": BACKGROUNDS,
                "hair": HAIR_STYLES if word in HAIR_STYLES else HAIRS,
            }.get(kind)
            if table:
                label = {"hair": "hair style" if word in HAIR_STYLES else "hair colour"}.get(kind, kind)
                ok[label] = max(table, key=lambda n: value(f"{kind} {n}")) == word  # noqa: B023
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
    for label, kind, table in (
        ("skin", "skin", SKINS),
        ("hair style", "hair", HAIR_STYLES),
        ("background", "background", BACKGROUNDS),
    ):
        at = [column(f"{kind} {name}") for name in table]
        scores[f"accuracy {label}"] = (truth[:, at].argmax(1) == seen[:, at].argmax(1)).float().mean().item()
    return scores


@torch.no_grad()
def clip_scores() -> dict[str, float]:
    """On 1000 held-out portraits: the caption found among 100, and zero-shot accuracy between two
    descriptions.
    """
    folder = HERE / "weights/clip"
    model, words = (
        CLIPModel.from_pretrained(folder, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    people = world.faces(1000, 557)
    seen, told = (
        clip_images(model, world.to_unit(world.pictures(people))),
        clip_texts(model, words, world.captions(people, 557, keep=1.0)),
    )
    hits = [
        (a @ b.T).argmax(1) == torch.arange(len(a))
        for a, b in zip(seen.split(100), told.split(100), strict=True)
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
        texts = [
            f"portrait of a {w} person" if name == "age" else f"portrait of a person, {w}"
            for w in (more, less)
        ]
        difference = seen @ (clip_texts(model, words, texts) * torch.tensor([[1.0], [-1.0]])).sum(0)
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
            for a, b in zip(lines, lines[1:], strict=False)
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
    return {
        str(f.relative_to(HERE / "weights")): hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in files
    }


def sheet(family: Family, path: Path, scale: int = 2) -> None:
    """Prompts in columns, members in rows, the same seeds: the picture of the certificate."""
    rows = {
        name: family.draw(family.member(name), list(SHOWN), [3] * len(SHOWN)) for name in family.card.members
    }
    size, margin = 64 * scale, 76
    page = Image.new("RGB", (margin + size * len(SHOWN), size * len(rows)), "white")
    for r, (name, pictures) in enumerate(rows.items()):
        ImageDraw.Draw(page).text((6, r * size + size // 2 - 6), name, "black")
        for c, picture in enumerate(((pictures + 1) * 127.5).round().byte()):
            tile = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize(
                (size, size), Image.Resampling.NEAREST
            )
            page.paste(tile, (margin + c * size, r * size))
    with replacing(path) as new:
        page.save(new)


def table(head: list[str], rows: list[list]) -> str:
    """A markdown table; floats with three digits."""

    def shown(v):
        return f"{v:.3f}" if isinstance(v, float) else "" if v is None else str(v)

    lines = [head, ["---"] * len(head), *[[shown(v) for v in row] for row in rows]]
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
{table(["probe", "score"], [[k, v] for k, v in found["probe"].items()])}

{table(["CLIP", "score"], [[k, v] for k, v in found["clip"].items()])}

## Hashes (sha256, first 16 digits)
{table(["file", "sha256"], [[k, v] for k, v in found["hashes"].items()])}
"""


if __name__ == "__main__":
    entry(main, Config)
