"""Configs: a dataclass holds the defaults, a YAML file what differs, the command line the last word.

`cfg = load(Config)` in an entry point reads `[config=FILE] [key=value ...]`, answers `--help` from the dataclass itself,
and turns every mistake into one line and exit code 2.
"""

import ast
import dataclasses
import inspect
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from textwrap import dedent, indent
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

for _name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):  # read when those libraries are imported, which is after this
    os.environ.setdefault(_name, "error")

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "omegaconf", "safetensors", "wandb")

T = TypeVar("T")


class UserError(Exception):
    """Something the user can mend: shown as one line, exit code 2."""


def merge(schema: type[T], *layers: dict | list[str] | str | Path) -> T:
    """An instance of the dataclass `schema`: its defaults, then each layer (a dict, a dotlist, or a YAML file) over the last.

    Raises UserError, in one line that names the file or the word, for an unknown key, a wrong type, a missing file or broken YAML.
    """
    config = OmegaConf.structured(schema)
    for layer in layers:
        # one word of a dotlist at a time, so that the message can name it
        for part in layer if isinstance(layer, list) else [layer]:
            with _one_line("" if isinstance(part, dict) else f"{part}: "):
                config = OmegaConf.merge(config, _read(part, isinstance(layer, list)))
    with _one_line():
        return OmegaConf.to_object(config)


def load(schema: type[T], argv: list[str] | None = None) -> T:
    """The config of a command: `[config=FILE] [key=value ...]`, or `--help`; `--key` is key=true. Raises UserError as `merge` does."""
    argv = sys.argv[1:] if argv is None else argv
    if {"--help", "-h", "help"} & set(argv):
        print(usage(schema))
        raise SystemExit(0)
    argv = [f"{word[2:]}=true" if word.startswith("--") and "=" not in word else word for word in argv]
    for word in argv:
        if "=" not in word:
            raise UserError(f"{word!r} is not of the form key=value; --help lists the keys")
    files = [w.split("=", 1)[1] for w in argv if w.startswith("config=")]
    return merge(schema, *files, [w for w in argv if not w.startswith("config=")])


def plain(argv: list[str]) -> tuple[list[str], list[str]]:
    """A command line's plain words (files, parts), and the rest, which is for `load`."""
    words = [word for word in argv if "=" not in word and not word.startswith("-")]
    return words, [word for word in argv if word not in words]


def usage(schema: type) -> str:
    """Every key with its default and the comment that stands beside it in the source; what the dataclass inherits comes last."""
    own = inspect.get_annotations(schema)
    rows = sorted(_rows(schema, OmegaConf.structured(schema)), key=lambda row: row[0].partition(".")[0] not in own)
    width = max(len(key) for key, _, _ in rows)
    lines = [f"  {key:<{width}}  {comment}{default}".rstrip().replace("\n", "\n" + " " * (width + 4)) for key, comment, default in rows]
    return "\n".join([inspect.getdoc(sys.modules[schema.__module__]) or "", "", "keys: [config=FILE] [key=value ...]", *lines])


def save(config: Any, path: Path) -> None:
    """The config as YAML, whole, with the versions of the packages and the git commit that ran it."""
    stamp = "\n".join([command(), *(f"{name} {value}" for name, value in versions().items())])
    with replacing(path) as new:
        new.write_text(indent(stamp, "# ", lambda line: True) + "\n" + OmegaConf.to_yaml(OmegaConf.structured(config)))


def command() -> str:
    """The command line as one would type it from the project's root, quoted for a shell."""
    program = Path(sys.argv[0])
    if program.is_absolute():
        program = program.relative_to(ROOT) if program.is_relative_to(ROOT) else Path(program.name)
    name = program.as_posix()
    if name.startswith("analysis/"):
        name = "-m " + name.removesuffix(".py").replace("/", ".")
    return " ".join(["python", name, shlex.join(sys.argv[1:])]).rstrip()


def versions() -> dict[str, str]:
    """The versions of the packages that numbers depend on, and the project's git commit."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True, text=True)
    except OSError:  # no git on this machine
        return found
    if git.returncode == 0:
        found["commit"] = git.stdout.strip()
    return found


@contextmanager
def replacing(path: Path):
    """A temporary path beside `path` that takes its place when the block ends well: readers see a whole file or none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    os.chmod(name, 0o644)
    try:
        yield Path(name)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def entry(main: Callable[[], None]) -> None:
    """Runs a command's main; what the user can mend becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print("error: " + " ".join(str(error).splitlines()), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        raise SystemExit(130) from None


def _find(path: str | Path) -> Path:
    """A file as given, or under the project's root."""
    for candidate in (Path(path), ROOT / path):
        if candidate.is_file():
            return candidate
    shipped = [p.relative_to(ROOT).as_posix() for p in sorted((ROOT / "configs").rglob("*.yaml"))]
    near = get_close_matches(str(path), shipped, 1)
    raise UserError(f"no config file at {path}; " + (f"did you mean {near[0]}?" if near else "the shipped ones are under configs/"))


def _read(layer: dict | str | Path, word: bool) -> Any:
    """What OmegaConf can merge: a dict as it is, one key=value word, or a YAML file's mapping."""
    if isinstance(layer, dict):
        return layer
    if word:
        return OmegaConf.from_dotlist([layer])
    found = OmegaConf.create(_find(layer).read_text(encoding="utf-8"))
    if not isinstance(found, DictConfig):
        raise TypeError("holds no key: value pairs")
    return found


@contextmanager
def _one_line(where: str = ""):
    """Turns the errors of OmegaConf, YAML, files and a dataclass's own __post_init__ into a UserError of one line."""
    try:
        yield
    except OmegaConfBaseException as error:
        raise UserError(where + _explain(error).removeprefix(where.partition("=")[0] + ": ")) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}not valid YAML{at}: {getattr(error, 'problem', None) or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{where}not a text file") from None
    except (ValueError, TypeError, AssertionError, OSError) as error:
        shape = isinstance(error, AssertionError) or "incompatible container types" in str(error)  # OmegaConf's words for a wrong shape
        raise UserError(where + ("a list is given whole, as key=[a,b], a file as key: value pairs" if shape else str(error))) from None


def _explain(error: OmegaConfBaseException) -> str:
    """The first line of OmegaConf's message; for an unknown key the nearest one, for a missing value its name."""
    first = str(error).strip().splitlines()[0]
    key = str(getattr(error, "full_key", None) or "")
    if isinstance(error, MissingMandatoryValue):
        return f"{first}; give it as key=value"
    if isinstance(error, ConfigKeyError) and dataclasses.is_dataclass(error.object_type):
        prefix, _, last = key.rpartition(".")
        names = [f"{prefix}.{field.name}".lstrip(".") for field in dataclasses.fields(error.object_type)]
        near = get_close_matches(key, names, 1) or [n for n in names if n.rpartition(".")[2] == last.strip("-")]
        return f"unknown key {key!r}; " + (f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(names)}")
    return f"{key}: {first}" if key else first


def _rows(schema: type, config: DictConfig, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, comment, default) of every field; a nested dataclass gives its own line and then its fields as outer.inner."""
    comments = _comments(schema)
    for key, value in OmegaConf.to_container(config).items():
        inner = None if OmegaConf.is_missing(config, key) else config._get_node(key)
        kind = OmegaConf.get_type(inner) if isinstance(inner, DictConfig) else None
        if dataclasses.is_dataclass(kind):
            yield prefix + key, comments.get(key, ""), ""
            yield from _rows(kind, inner, f"{prefix}{key}.")
        else:
            yield prefix + key, comments.get(key, ""), f"  [{_shown(value)}]"


def _shown(value: Any) -> str:
    """A default as one would type it after key=; of a list of mappings, each on a line of its own, without what is empty."""
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        full = [json.dumps({key: word for key, word in row.items() if word != ""}, ensure_ascii=False) for row in value]
        return "[" + ",".join("\n" + row for row in full) + "]"
    if isinstance(value, str) and value:
        return "required" if value == "???" else value
    return json.dumps(value, default=str, ensure_ascii=False)


def _comments(schema: type) -> dict[str, str]:
    """Field name to the comment beside it, of the dataclass and of those it inherits from."""
    found: dict[str, str] = {}
    for part in reversed([c for c in schema.__mro__ if dataclasses.is_dataclass(c)]):
        source = dedent(inspect.getsource(part))
        tokens = tokenize.generate_tokens(StringIO(source).readline)
        beside = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
        for field in ast.parse(source).body[0].body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                lines = range(field.lineno, field.end_lineno + 1)
                found[field.target.id] = " ".join(beside[line] for line in lines if line in beside)
    return found


def run_folder(cfg: Any, folder: Path, overwrite: bool = False, free: tuple[str, ...] = ()) -> Path:
    """The folder of a run, made or continued; `overwrite` empties it first.

    Saves config.yaml. Raises UserError when the folder holds a run of another config; keys in `free` may differ.
    """
    path, free = Path(folder) / "config.yaml", (*free, "overwrite")
    if overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    if path.is_file():
        before, now = OmegaConf.to_container(OmegaConf.load(path)), OmegaConf.to_container(OmegaConf.structured(cfg))
        other = [key for key in now if key not in free and before.get(key) != now[key]]
        if other:
            changes = ", ".join(f"{key}: {before.get(key)} -> {now[key]}" for key in other[:3])
            raise UserError(f"{folder} holds a run of another config ({changes}); give a new name=, or overwrite=true")
    save(cfg, path)
    return Path(folder)
