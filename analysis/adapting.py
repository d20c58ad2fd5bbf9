"""Teaches controls to the members on which analysis.transfer has found their effect lost."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from analysis.pages import words
from analysis.session import Session
from configs import ROOT, UserError, replacing
from controls import formats
from models.evaluators import JUDGES
from models.loading import file_hash

LOST = ("weaker", "dead", "reversed")  # verdicts after which a control is adapted
LAUNCHED = re.compile("RANK|LOCAL_|GROUP_|ROLE_|WORLD_SIZE|MASTER_|TORCHELASTIC")  # what a launcher sets
# where the original's own layers cannot carry the effect: all layers, for longer
WIDER = {"layers": "full", "scope": "c3lier", "learning_rate": 1e-3, "steps": 400, "rounds": 4}
PASSED = ("encoders", "positive", "negative", "cache", "dtype", "quantize", "wandb")  # as in this run
FREE = ("out", "cache", "wandb")  # of these no control depends
NEAR = math.log(1.25)  # of 1: a share that needs no second try


def adapt(session: Session, record: dict) -> list[str]:
    """Runs train/adapt.py for every cell that is lost by one of the first evaluators, each process its share;
    returns the files, which are measured from then on. What is there already is not trained again.
    """
    names = formats.names(session.cfg.controls)
    files, adapted = dict(zip(names, session.cfg.controls, strict=True)), []
    lost = session.accelerator.shared([cell for cell in record.get("cells", []) if is_lost(cell)])
    lost = [(cell["control"], cell["target"].rpartition("/")[2]) for cell in lost]
    mine = session.share(lost)
    places = []
    for control, member in lost:
        # the name is taken where one was trained there
        name = f"{control}-{member}" + "-adapted" * (f"{control}-{member}" in files)
        places.append(session.folder / "adapted" / name)
        if (control, member) in mine:
            taught(session, files[control], member, places[-1])
    session.accelerator.wait_for_everyone()
    adapted = [str(nearer(place) / "control.safetensors") for place in places]
    session.cfg.controls += adapted
    return adapted


def is_lost(cell: dict) -> bool:
    """Whether one of the first evaluators finds a control weaker than on its source, on a member alone."""
    if not words.is_verdict(words.led(cell)) or ":" in cell["target"]:
        return False
    return any(reading["verdict"] in LOST for reading in list(cell["readings"].values())[:JUDGES])


def taught(session: Session, control: str, member: str, folder: Path) -> None:
    """Trains in the original's layers, and where any evaluator does not find that near, in all layers."""
    train(session, control, member, folder)
    if distance(folder) > NEAR:
        train(session, control, member, wider(folder), **WIDER)


def wider(folder: Path) -> Path:
    return folder.parent / f"wide/{folder.name}"


def nearer(folder: Path) -> Path:
    """Of two tries the one that the evaluator which finds it farthest from the original's finds nearer: what
    gains and strength were set by may see an effect in what others do not.
    """
    return min((folder, wider(folder)), key=distance)


def distance(folder: Path) -> float:
    """How far a trained control's share is from 1 where strength is set, as a logarithm, by the evaluator
    that finds it farthest of all that see the original on its source; infinite where nothing is known.
    """
    try:
        rows = json.loads((folder / "shares.json").read_text())
    except FileNotFoundError:
        return math.inf
    shares = [row["judged"]["value"] for row in rows]
    return max((abs(math.log(max(share, 0.01))) for share in shares if share is not None), default=math.inf)


def train(session: Session, control: str, member: str, folder: Path, **more: object) -> None:
    """The trainer as a process of its own, also where this is one of several; not where it was asked for the
    same already, and anew where it was asked for something else. Raises UserError as it does.
    """
    cfg, its = session.cfg, session.family.card
    memory = {f"memory.{key}": value for key, value in asdict(cfg.memory).items() if value}
    what = f"{formats.name(control)} to {its.name}/{member}"
    options = {
        "control": control,
        "member": f"{cfg.family}/{member}",
        "source": f"{cfg.family}/{cfg.source or its.base}",
        "name": folder.name,
        "out": folder.parent,
        "prompts": json.dumps(cfg.adapt_prompts, ensure_ascii=False),
        "judged": cfg.adapt_judged,
        # not where nothing is said: what was taught before there was this key stays
        **({} if cfg.adapt_precision is None else {"precision": cfg.adapt_precision}),
        **{key: getattr(cfg, key) for key in PASSED},
        **more,
    }
    asked = {key: value for key, value in options.items() if key not in FREE}
    asked = json.dumps({**asked, "sha256": file_hash(Path(control))}, default=str, indent=1)
    note = folder.with_name(f"{folder.name}.json")
    same = note.exists() and note.read_text() == asked
    if same and (folder / "control.safetensors").exists():
        return
    if not same:
        shutil.rmtree(folder, ignore_errors=True)
        note.parent.mkdir(parents=True, exist_ok=True)
        with replacing(note) as new:
            new.write_text(asked)
    options |= memory
    print(f"adapting {what}")
    command = [sys.executable, str(ROOT / "train/adapt.py"), *(f"{key}={options[key]}" for key in options)]
    if subprocess.run(command, env=environment(session.accelerator.device)).returncode:
        raise UserError(f"could not adapt {what}: the reason stands above")


def environment(device: torch.device) -> dict[str, str]:
    """This process's variables without those of its launcher; of several GPUs it sees its own."""
    kept = {key: value for key, value in os.environ.items() if not LAUNCHED.match(key)}
    if device.type == "cuda" and device.index is not None:
        seen = kept.get("CUDA_VISIBLE_DEVICES", "").split(",")
        kept["CUDA_VISIBLE_DEVICES"] = seen[device.index] if seen != [""] else str(device.index)
    return kept
