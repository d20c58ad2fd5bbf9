"""Teaches controls to the members on which analysis.transfer has found their effect lost."""

import os
import re
import subprocess
import sys
from pathlib import Path

from analysis.pages import words
from analysis.session import Session
from configs import ROOT, UserError
from controls import formats

LOST = ("weaker", "dead", "reversed")  # verdicts after which a control is adapted
LAUNCHED = re.compile("RANK|LOCAL_|GROUP_|ROLE_|WORLD_SIZE|MASTER_|TORCHELASTIC")  # what a launcher sets


def adapt(session: Session, record: dict) -> list[str]:
    """Runs train/adapt.py for every cell that is lost by the first evaluator, each process its share; returns
    the files, which are measured from then on. What is there already is not trained again.
    """
    names = formats.names(session.cfg.controls)
    files, adapted = dict(zip(names, session.cfg.controls, strict=True)), []
    lost = session.accelerator.shared(
        [
            (cell["control"], cell["target"].rpartition("/")[2])
            for cell in map(words.led, record.get("cells", []))
            if words.is_verdict(cell) and cell["verdict"] in LOST and ":" not in cell["target"]
        ]
    )
    mine = session.share(lost)
    for control, member in lost:
        # the name is taken where one was trained there
        name = f"{control}-{member}" + "-adapted" * (f"{control}-{member}" in files)
        path = session.folder / "adapted" / name / "control.safetensors"
        adapted.append(str(path))
        if (control, member) in mine and not path.exists():
            train(session, files[control], member, path.parent)
    session.accelerator.wait_for_everyone()
    session.cfg.controls += adapted
    return adapted


def train(session: Session, control: str, member: str, folder: Path) -> None:
    """The trainer as a process of its own, also where this is one of several. Raises UserError as it does."""
    cfg, its = session.cfg, session.family.card
    what = f"{formats.name(control)} to {its.name}/{member}"
    options = {
        "control": control,
        "member": f"{cfg.family}/{member}",
        "source": f"{cfg.family}/{cfg.source or its.base}",
        "name": folder.name,
        "out": folder.parent,
        "dtype": cfg.dtype,
        "wandb": cfg.wandb,
    }
    print(f"adapting {what}")
    command = [sys.executable, str(ROOT / "train/adapt.py"), *(f"{key}={options[key]}" for key in options)]
    environment = {key: value for key, value in os.environ.items() if not LAUNCHED.match(key)}
    if subprocess.run(command, env=environment).returncode:
        raise UserError(f"could not adapt {what}: the reason stands above")
