"""Runs: the folder of a run, files that are whole or not there, and what ran."""

import os
import shlex
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from textwrap import indent
from typing import Any

from omegaconf import OmegaConf

from configs.errors import ROOT, UserError, cut

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "omegaconf", "safetensors", "wandb")


def save(config: Any, path: Path) -> None:
    """The config as YAML, whole, with the versions of the packages and the git commit that ran it."""
    stamp = "\n".join([command(), *(f"{name} {value}" for name, value in versions().items())])
    with replacing(path) as new:
        new.write_text(
            indent(stamp, "# ", lambda line: True) + "\n" + OmegaConf.to_yaml(OmegaConf.structured(config))
        )


def command() -> str:
    """The command line as one would type it from the project's root, quoted for a shell."""
    program = Path(sys.argv[0])
    if program.is_absolute():
        program = program.relative_to(ROOT) if program.is_relative_to(ROOT) else Path(program.name)
    name = program.as_posix()
    if name.startswith("analysis/"):
        name = "-m " + name.removesuffix(".py").replace("/", ".")
    return " ".join(["python", name, shlex.join(sys.argv[1:])]).rstrip()


@cache
def _packages() -> dict[str, str]:
    installed = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            installed[name] = version(name)
    return installed


def versions() -> dict[str, str]:
    """The versions of the packages that numbers depend on, and the project's git commit."""
    found = {"python": sys.version.split()[0]}
    found |= _packages()
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    except OSError:  # no git on this machine
        return found
    if git.returncode == 0:
        found["commit"] = git.stdout.strip()
    return found


@contextmanager
def replacing(path: Path):
    """A temporary path beside `path` that takes its place when the block ends well: readers see a whole file
    or none.

    Raises UserError where the disk, or what writes on it, refuses.
    """
    path = Path(path)
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        try:
            os.chmod(name, 0o644)
            yield Path(name)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


@contextmanager
def _writing(path: Path):
    """Makes one line of a full disk, whatever library meets it: torch says RuntimeError, safetensors an error
    of its own.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {cut(str(path), 200)}: {error.strerror or error}") from error
    except Exception as error:
        if not any(
            words in str(error) for words in ("inline_container", "iostream error", "os error", "I/O error")
        ):
            raise
        raise UserError(f"cannot write {cut(str(path), 200)}: {cut(str(error), 200)}") from error


def plain_name(text: str, what: str = "name") -> str:
    """The text, where it can name a control, a folder or a file anywhere. Raises UserError otherwise."""
    faults = {
        "it is empty": not text.strip(),
        "it leads to another folder": text in (".", "..") or "/" in text or "\\" in text,
        "it has characters that cannot be shown": not text.isprintable(),
        "it begins with a character that shells and programs take for something else": text[:1] in set("-~."),
        "it is longer than 120 bytes": len(text.encode(errors="replace")) > 120,
    }
    if any(faults.values()):
        shown = text if len(text) <= 40 else f"{text[:40]}…"
        fault = next(fault for fault, holds in faults.items() if holds)
        raise UserError(f"{what}={shown!r} cannot name a control or a folder: {fault}")
    return text
