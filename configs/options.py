"""Options: a dataclass holds the defaults, a YAML file what differs, the command line the last word.

`cfg = load(Config)` in an entry point reads `[config=FILE] [key=value ...]`, answers `--help` from the
dataclass itself, and turns every mistake into one line and exit code 2.
"""

import ast
import dataclasses
import inspect
import json
import os
import sys
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from io import StringIO
from itertools import pairwise
from pathlib import Path
from textwrap import dedent
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from configs import typed_yaml
from configs.errors import ROOT, UserError, cut, explained, note, quoted
from configs.ranges import check

T = TypeVar("T")
MOST_BYTES = 16 * 2**20  # of a config file
FORMER = {  # keys as they were called, and what they are called now
    "rate": "learning_rate",
    "accumulate": "gradient_accumulation_steps",
    "batch": "batch_size",
    "checkpointing": "gradient_checkpointing",
    "schedule": "lr_scheduler",
    "warmup": "lr_warmup_steps",
    "strength": "guidance_scale lora_scale",
    "plan": "dry_run",
    "kind": "prediction_type",
    "law": "noise_schedule",
}


def list_of(*items: Any) -> Any:
    """A dataclass's field that holds a list: these items, unless another is given."""
    return dataclasses.field(default_factory=lambda: list(items))


def merge(schema: type[T], *layers: dict | list[str] | str | Path) -> T:
    """An instance of the dataclass `schema`: its defaults, then each layer (a dict, a dotlist, or a YAML
    file) over the last.

    Raises UserError, in one line that names the file or the word, for an unknown key, a wrong type, a missing
    file or broken YAML.
    """
    config = OmegaConf.structured(schema)
    for layer in layers:
        parts, words = (layer, True) if isinstance(layer, list) else ([layer], False)
        try:
            config = OmegaConf.merge(config, *(_read(part, schema, words) for part in parts))
        except Exception:  # again one by one, so that the message can name the word
            for part in parts:
                with _one_line("" if isinstance(part, dict) else f"{cut(str(part), 100)}: "):
                    config = OmegaConf.merge(config, _read(part, schema, words))
    with _one_line():
        found = OmegaConf.to_object(config)
    check(found)
    return found


def load(schema: type[T], argv: list[str] | None = None) -> T:
    """The config of a command: `[config=FILE] [key=value ...]`, or `--help`; `--some-key` is some_key=true.

    Raises UserError as `merge` does.
    """
    argv = sys.argv[1:] if argv is None else argv
    if {"--help", "-h", "help"} & set(argv):
        print(usage(schema))
        raise SystemExit(0)
    argv = [
        f"{word[2:].replace('-', '_')}=true" if word.startswith("--") and "=" not in word else word
        for word in argv
    ]
    for word in argv:
        if "=" not in word:
            raise UserError(f"{word!r} is not of the form key=value; --help lists the keys")
        if texts := _parted(word.partition("=")[2]):
            key = word.partition("=")[0]
            note(
                f"{key} holds {len(texts)} texts, "
                f"{' | '.join(map(quoted, texts[:3]))}{' …' if len(texts) > 3 else ''}; "
                f'a comma inside a text needs quotes: {key}=["{", ".join(texts[:2])[:80]}"]'
            )
    files = [w.split("=", 1)[1] for w in argv if w.startswith("config=")]
    return merge(schema, *files, [w for w in argv if not w.startswith("config=")])


def _parted(value: str) -> list[str]:
    """The items of a list of words, at least two, where a comma with a space after it stands outside of
    quotes: meant as one perhaps.
    """
    try:
        nodes = yaml.compose(value, yaml.SafeLoader).value if value.startswith("[") and ", " in value else []
    except yaml.YAMLError:
        return []  # what is wrong is said where it is read
    if not all(isinstance(node, yaml.ScalarNode) for node in nodes):
        return []
    bare = [
        a.style is None and b.style is None and b.start_mark.index - a.end_mark.index > 1
        for a, b in pairwise(nodes)
    ]
    return [node.value for node in nodes] if any(bare) and any(" " in node.value for node in nodes) else []


def plain(argv: list[str]) -> tuple[list[str], list[str]]:
    """A command line's plain words (files, parts), and the rest, which is for `load`.

    A file may have a = in its name.
    """
    words = [word for word in argv if not word.startswith("-") and ("=" not in word or _is_file(word))]
    return words, [word for word in argv if word not in words]


def _is_file(word: str) -> bool:
    """Whether a word with a = is a file's and not key=value: it is there, it ends as weights do, or no key
    could stand before the =.
    """
    key = word.partition("=")[0].replace(".", "_")
    return os.path.exists(word) or word.endswith((".safetensors", ".pt")) or not key.isidentifier()


def usage(schema: type) -> str:
    """Every key with its default and its comment in the source; what the dataclass inherits comes last."""
    own = inspect.get_annotations(schema)
    rows = sorted(
        _rows(schema, OmegaConf.structured(schema)), key=lambda row: row[0].partition(".")[0] not in own
    )
    width = max(len(key) for key, _, _ in rows)
    lines = [
        f"  {key:<{width}}  {comment}{default}".rstrip().replace("\n", "\n" + " " * (width + 4))
        for key, comment, default in rows
    ]
    return "\n".join(
        [
            inspect.getdoc(sys.modules[schema.__module__]) or "",
            "",
            "keys: [config=FILE] [key=value ...]",
            *lines,
        ]
    )


def _find(path: str | Path) -> Path:
    """A file as given, or under the project's root."""
    for candidate in (Path(path), ROOT / path):
        if candidate.is_file():
            return candidate
    if Path(path).is_dir():
        raise UserError(f"{path or 'an empty name'} is a folder, not a config file")
    shipped = [p.relative_to(ROOT).as_posix() for p in sorted((ROOT / "configs").rglob("*.yaml"))]
    near = get_close_matches(str(path), shipped, 1)
    raise UserError(
        f"no config file at {path}; "
        + (f"did you mean {near[0]}?" if near else "the shipped ones are under configs/")
    )


def _read(layer: dict | str | Path, schema: type, word: bool) -> Any:
    """What OmegaConf can merge: a dict as it is, one key=value word, or a YAML file's mapping."""
    if isinstance(layer, dict):
        return layer
    if not word:
        return _mapping(layer, schema)
    key, _, text = layer.partition("=")
    kind = typed_yaml.field_kind(schema, key.split("."))
    value, item = typed_yaml.word(text, kind), typed_yaml.item_kind(kind)
    if item and isinstance(value, str) and value.endswith((".yaml", ".yml")):
        value = typed_yaml.read(_text(value), kind)
    found = OmegaConf.create()
    OmegaConf.update(found, key, value)
    return found


def _mapping(path: str | Path, schema: type) -> dict:
    """What a YAML file holds. Raises TypeError for one that holds something else than keys with values."""
    found = typed_yaml.read(_text(path), schema)
    if isinstance(found, list):
        whole = bool(found) and isinstance(found[0], dict)
        fits = [
            f.name
            for f in dataclasses.fields(schema)
            if (item := typed_yaml.item_kind(typed_yaml.field_kind(schema, [f.name])))
            and dataclasses.is_dataclass(item) == whole
        ]
        hint = (
            f"; a list goes to its own key: {' or '.join(f'{name}={path}' for name in fits[:2])}"
            if fits
            else ""
        )
        raise TypeError(f"holds a list, no key: value pairs{hint}")
    if not isinstance(found, dict | None):
        raise TypeError("holds no key: value pairs")
    return found or {}


def _text(path: str | Path) -> str:
    """The text of a config file."""
    file = _find(path)
    if file.stat().st_size > MOST_BYTES:
        raise UserError(
            f"{cut(str(path), 200)} is no config file: it is larger than {MOST_BYTES // 2**20} MB"
        )
    return file.read_text(encoding="utf-8-sig")


@contextmanager
def _one_line(where: str = ""):
    """Turns the errors of OmegaConf, YAML, files and a dataclass's own __post_init__ into a UserError of one
    line.
    """
    try:
        yield
    except OmegaConfBaseException as error:
        raise UserError(where + _explain(error).removeprefix(where.partition("=")[0] + ": ")) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f" at line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{where}not valid YAML{at}: {' '.join(str(getattr(error, 'problem', None) or error).split())}"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{where}not a text file") from None
    except OSError as error:
        raise UserError(where + explained(error)) from None
    except RecursionError:
        raise UserError(f"{where}it nests too deep") from None
    except (ValueError, TypeError, AssertionError, KeyError, IndexError, AttributeError) as error:
        shape = isinstance(error, AssertionError) or "incompatible container types" in str(
            error
        )  # OmegaConf's words for a wrong shape
        raise UserError(
            where
            + ("a list is given whole, as key=[a,b], a file as key: value pairs" if shape else str(error))
        ) from None


def _explain(error: OmegaConfBaseException) -> str:
    """The first line of OmegaConf's message; for an unknown key the nearest one, for a missing value its
    name.
    """
    first = str(error).strip().splitlines()[0]
    key = str(getattr(error, "full_key", None) or "")
    if isinstance(error, MissingMandatoryValue):
        return f"{first}; give it as key=value"
    if isinstance(error, ConfigKeyError) and dataclasses.is_dataclass(error.object_type):
        prefix, _, last = key.rpartition(".")
        names = [f"{prefix}.{field.name}".lstrip(".") for field in dataclasses.fields(error.object_type)]
        former = [f"{prefix}.{name}".lstrip(".") for name in FORMER.get(last, "").split()]
        near = [name for name in former if name in names] or get_close_matches(key, names, 1)
        near = near or [n for n in names if n.rpartition(".")[2] == last.strip("-")]
        return f"unknown key {key!r}; " + (
            f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(names)}"
        )
    return f"{key}: {first}" if key else first


def _rows(schema: type, config: DictConfig, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, comment, default) of every field; a nested dataclass gives its own line and then its fields as
    outer.inner.
    """
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
    """A default as one would type it after key=; of a list of mappings, each on a line of its own, without
    what is empty.
    """
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        full = [
            json.dumps({key: word for key, word in row.items() if word not in ("", None)}, ensure_ascii=False)
            for row in value
        ]
        return "[" + ",".join("\n" + row for row in full) + "]"
    if isinstance(value, str) and value:
        return "required" if value == "???" else value
    return json.dumps(value, default=str, ensure_ascii=False)


def _comments(schema: type) -> dict[str, str]:
    """Field name to its comment, of the dataclass and of those it inherits from.

    A comment stands beside its field, or in lines of its own directly above it.
    """
    found: dict[str, str] = {}
    for part in reversed([c for c in schema.__mro__ if dataclasses.is_dataclass(c)]):
        source = dedent(inspect.getsource(part))
        tokens = tokenize.generate_tokens(StringIO(source).readline)
        comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
        code = {row for row, line in enumerate(source.splitlines(), 1) if not line.lstrip().startswith("#")}
        for field in ast.parse(source).body[0].body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                first = field.lineno
                while first - 1 in comments.keys() - code:
                    first -= 1
                rows = [row for row in range(first, field.end_lineno + 1) if row in comments]
                found[field.target.id] = " ".join(comments[row] for row in rows)
    return found
