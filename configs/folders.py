"""Folders of runs: who may work in one, what in it may be removed, and what a run that goes on finds there.

A folder is claimed when nothing is left that could refuse the run. Its lock is a file made with O_EXCL, which
holds on NFS too.
"""

import functools
import hashlib
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.errors import UserError, cut
from configs.options import merge
from configs.runs import plain_name, save

CONFIG, LOCK = "config.yaml", ".lock"
FREE = ("overwrite", "dry_run")  # what never decides what a run does
HELD: set[Path] = set()  # folders that this process has claimed
TEMPORARY = re.compile(r"\.(.+?(\.\w+)?)\.[a-z0-9_]{8}(\.\w+)?")  # as `replacing` names what is not whole yet


def look(cfg: Any, free: tuple[str, ...] | None = None) -> Path:
    """The folder of a run, out/name, looked at and not touched.

    free: keys in which it may differ from the run that the folder holds; None = the config is not compared
    yet. Raises UserError for a name that is no plain word, a folder that somebody works in, that is not a
    run's, or holds another run's.
    """
    folder = _place(cfg)
    if (held := _holder(folder)) and not _gone(held):
        raise UserError(_taken(folder, held))
    if folder.is_symlink() and not folder.exists() or folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a new name=, or another out=")
    if not folder.exists():
        return folder
    if not _ours(folder):
        if foreign := [
            path.name
            for path in sorted(folder.iterdir())
            if not path.name.startswith(LOCK) and not _temporary(path)
        ]:
            raise UserError(
                f"{folder} is not the folder of a run: it holds {cut(', '.join(foreign[:3]), 200)} and no "
                f"{CONFIG} of ours; "
                "give a new name=, or remove it yourself"
            )
    elif cfg.overwrite:
        if folder.resolve().parent != Path(cfg.out).resolve():
            raise UserError(
                f"{folder} leads to {folder.resolve()}, outside out={cfg.out}: overwrite=true does not "
                f"remove that"
            )
    elif free is not None:
        _compare(cfg, folder / CONFIG, free)
    return folder


def claim(cfg: Any, free: tuple[str, ...] = ()) -> Path:
    """Takes the folder of a run for this process: made, continued or, with `overwrite`, emptied first.

    Saves config.yaml.

    Call it when nothing else can refuse the run. Raises UserError as `look` does, and leaves everything as it
    was. `release` gives it back.
    """
    folder = look(cfg, free)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _lock(folder)
        look(cfg, free)  # again, now that nobody else writes
        if cfg.overwrite:
            _empty(folder)
        for path in _leftovers(folder):
            path.unlink(missing_ok=True)
        save(cfg, folder / CONFIG)
    except BaseException:
        _unlock(folder)
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise
    return folder


def release() -> None:
    """Gives back every folder that this process has claimed."""
    for folder in list(HELD):
        _unlock(folder)


def releases(main: Callable) -> Callable:
    """A command's main that gives back the folders it claimed, however it ends."""

    @functools.wraps(main)
    def command(*args: Any, **kwargs: Any) -> Any:
        try:
            return main(*args, **kwargs)
        finally:
            release()

    return command


def digest(cfg: Any, free: tuple[str, ...] = ()) -> str:
    """A short hash of what a config decides: the keys that are not free, where they differ from their
    defaults.
    """
    decides = _differing(cfg, type(cfg)(), free)
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _differing(cfg: Any, other: Any, free: tuple[str, ...]) -> dict[str, Any]:
    """What a config says otherwise than another one, in keys that are not free."""
    values = asdict(other)
    return {
        key: value for key, value in asdict(cfg).items() if key not in (*free, *FREE) and value != values[key]
    }


def _place(cfg: Any) -> Path:
    name = plain_name(cfg.name)
    if not cfg.out.isprintable():
        raise UserError(f"out={cut(cfg.out, 100)} cannot be a folder: it has characters that cannot be shown")
    if cfg.out.startswith("~"):
        raise UserError(
            f"out={cfg.out} would be a folder called ~, for a shell writes your home only where a word "
            f"begins; write $HOME"
        )
    return Path(cfg.out) / name


def _ours(folder: Path) -> bool:
    """Whether the folder holds a config.yaml that `save` wrote, whole or damaged: by the stamp it begins
    with.
    """
    try:
        with (folder / CONFIG).open(encoding="utf-8", errors="replace") as lines:
            stamp = [line for line, _ in zip(lines, range(200), strict=False) if line.startswith("#")]
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return False
    return (
        bool(stamp)
        and stamp[0].startswith("# python ")
        and any(re.match(r"# omegaconf \d", line) for line in stamp)
    )


def _compare(cfg: Any, path: Path, free: tuple[str, ...]) -> None:
    """Raises UserError unless the config at `path` says the same; what an older version did not know has its
    default.
    """
    try:
        saved = OmegaConf.to_container(OmegaConf.load(path, max_yaml_expanded_nodes=10**7))
        if not isinstance(saved, dict) or not saved:
            raise ValueError("it holds no keys")
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, OSError) as error:
        raise UserError(f"{path} is damaged ({cut(str(error), 100)}); overwrite=true starts afresh") from None
    try:
        before = merge(type(cfg), saved)
    except UserError as error:
        raise UserError(
            f"{path} is of another command or version ({cut(str(error), 200)}); give a new name=, or "
            f"overwrite=true"
        ) from None
    if changed := _differing(before, cfg, free):
        now = asdict(cfg)
        changes = ", ".join(
            f"{key}: {cut(str(value), 60)} -> {cut(str(now[key]), 60)}"
            for key, value in list(changed.items())[:3]
        )
        raise UserError(
            f"{path.parent} holds a run of another config ({changes}); give a new name=, or overwrite=true"
        )


def _empty(folder: Path) -> None:
    """Removes what a folder holds but its lock; config.yaml, which says that it is ours, goes last."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == CONFIG):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _leftovers(folder: Path) -> Iterator[Path]:
    """What killed runs were writing."""
    for place, inner, names in os.walk(folder):
        inner[:] = [name for name in inner if name != "wandb"]
        yield from (path for path in map(Path(place).joinpath, names) if _temporary(path))


def _temporary(path: Path) -> bool:
    found = TEMPORARY.fullmatch(path.name)
    return bool(found) and found[2] == found[3]


def _lock(folder: Path) -> None:
    """Makes the lock, in the place of one whose holder is gone.

    Raises UserError when another process is faster.
    """
    held = _holder(folder)
    mine = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "born": _born(os.getpid()),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": cut(" ".join(sys.argv), 200),
    }
    if held and _gone(held):
        aside = folder / f"{LOCK}.{mine['host']}.{mine['pid']}"
        try:
            os.replace(folder / LOCK, aside)  # of several that try, one finds it
            if (found := _read(aside)) != held:
                os.replace(aside, folder / LOCK)
                raise UserError(_taken(folder, found))
        except FileNotFoundError:
            pass
        aside.unlink(missing_ok=True)
    try:
        handle = os.open(folder / LOCK, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        if folder.resolve() not in HELD:
            raise UserError(_taken(folder, _holder(folder))) from None
        return
    HELD.add(folder.resolve())
    with os.fdopen(handle, "w") as file:
        json.dump(mine, file)


def _unlock(folder: Path) -> None:
    if (place := folder.resolve()) in HELD:
        HELD.remove(place)
        held = _read(folder / LOCK)
        if held and (held.get("host"), held.get("pid")) == (
            socket.gethostname(),
            os.getpid(),
        ):  # not in a child of this process
            (folder / LOCK).unlink(missing_ok=True)


def _holder(folder: Path) -> dict | None:
    """What the lock says; nothing without a lock, and where it is this process's own."""
    found = _read(folder / LOCK) if folder.is_dir() else None
    return None if found is not None and folder.resolve() in HELD else found


def _read(path: Path) -> dict | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:  # just made, or damaged
        return {}


def _gone(held: dict) -> bool:
    """Whether the holder was a process of this machine that runs no more."""
    return (
        held.get("host") == socket.gethostname()
        and isinstance(held.get("pid"), int)
        and _born(held["pid"]) != held.get("born")
    )


def _born(pid: int) -> str:
    """When a process began, as its system counts; empty for one that has ended."""
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            state, *rest = stat.read_text().rpartition(")")[2].split()
        except OSError:
            return ""
        return "" if state in "ZX" else rest[18]
    try:
        process = psutil.Process(pid)
        return "" if process.status() == psutil.STATUS_ZOMBIE else str(process.create_time())
    except psutil.Error:
        return ""


def _taken(folder: Path, held: dict | None) -> str:
    who = (
        f"process {held.get('pid')} on {held.get('host')}, since {held.get('since')}"
        if held
        else "another process"
    )
    return (
        f"{folder} is in use by {who}; give another name=, or wait. If that run is no more, remove "
        f"{folder / LOCK}"
    )
