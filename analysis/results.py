"""results.json read back: a record is what its page is drawn from in every key, or one line says which key is
not. Imports no torch.

A shape says what a value may be: a type, a tuple of words, [shape] for a list, {key: shape} for a mapping
that may hold more.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.pages.words import WORDS
from configs import UserError, quoted
from configs.errors import cut

# of every record; 1 had one evaluator's readings in the cell itself, 2 one retention for both signs
SCHEMA = 3
LARGEST = 1e15  # of numbers, so that charts can be drawn of their differences


@dataclass(frozen=True)
class Null:
    """A shape, or null."""

    shape: Any


@dataclass(frozen=True)
class Maybe:
    """A shape, or nothing at all, as in records of what was not asked."""

    shape: Any


@dataclass(frozen=True)
class Each:
    """A mapping of any keys to values of one shape."""

    shape: Any


class Only(dict):
    """A mapping of these keys and no others."""


@dataclass(frozen=True)
class Filled:
    """A list or a mapping that is not empty."""

    shape: Any


NUMBER = Null(float)

INTERVAL = Only(value=NUMBER, low=NUMBER, high=NUMBER)
POINT = Only(value=float, low=NUMBER, high=NUMBER)  # of a curve
COUNTED = {"images": int, "prompts": int, "seeds": int}
ABOUT = {"recipe": str, "command": str, "versions": Each(str), "created": str, "seconds": float}
P = {"p": NUMBER, "p_holm": NUMBER}
COMPARED = Null({"share": INTERVAL, "control": Maybe(str)})
READING = {  # what one evaluator says of a cell of a transfer
    "effect": Filled(POINT),
    "slope": INTERVAL,
    "retention": INTERVAL,
    "below_zero": Null({"retention": INTERVAL, "differs": bool}),
    "slope_retention": INTERVAL,
    "of_words": INTERVAL,
    "p": {"reversed": P, "dead": P, "equivalence": P, "difference": P},
    "verdict": WORDS,
    "matched_scale": {
        "value": NUMBER,
        "low": NUMBER,
        "high": NUMBER,
        "reach": Null({"share": float, "scale": float}),
    },
    "window": [bool],
    "monotonicity": NUMBER,
    "preservation": NUMBER,
    "shape": {"area": INTERVAL, "saturation": NUMBER, "signs": NUMBER, "smoothness": NUMBER},
    "preservation_matched": Null({"source": float, "target": float, "difference": INTERVAL}),
    "spread": Null({"prompts": float, "seeds": float}),
    "references": Only(
        floor=COMPARED,
        ceiling=COMPARED,
        wrong=COMPARED,
        normalised=Null(INTERVAL),
        rerun=Null({"effect": INTERVAL}),
    ),
}
TRANSFER = {
    **ABOUT,
    "config": {"prompts": [str]},
    "margin": [float],
    "prompts": Filled(int),
    "cost": {"drawn": int, "cached": int, "seconds": float},
    "cells": Filled(
        {
            "control": str,
            "source": str,
            "adapted_from": str,
            "target": str,
            "scales": Filled(float),
            "readings": Filled(Each(READING)),
            **COUNTED,
            "kind": str,
            "hash": str,
            "reference": bool,
            "below": NUMBER,
            "above": NUMBER,
            "positive": str,
            "negative": str,
            "picture": str,
            "clip_change_percent": INTERVAL,
            "at": float,
            "looks": int,
        }
    ),
    "agreement": [
        {"first": str, "second": str, "cells": int, "controls": int, "same": NUMBER, "kappa": INTERVAL}
    ],
    "leakage": [{"evaluator": str, "target": str, "control": str, "attribute": str, "share": INTERVAL}],
}
STEPS = Filled({"t": float, "share": float})
HALF = {"share": INTERVAL, "t": INTERVAL}
TRACE = {
    **ABOUT,
    "config": {"tolerance": float, "bands": [float]},
    "evaluators": Filled(str),
    "base": str,
    "prompts": [str],
    "shown": int,
    "control": str,
    "cells": Filled(
        {
            "student": str,
            "plan": str,
            "steps": STEPS,
            "distance": Each(Filled(POINT)),
            "commitment": Each({**HALF, "left": INTERVAL}),
            "abandoned": {
                "evaluator": str,
                "falls": Null(INTERVAL),
                "rises_and_falls": Null(INTERVAL),
                "picture": Maybe(str),
                "examples": [{"concept": str, "prompt": str, "score": [float]}],
            },
            "control": Maybe(
                Each(
                    {
                        "effect": Filled(POINT),
                        "half": HALF,
                        "parts": [{"bands": Filled(int), "share": INTERVAL}],
                    }
                )
            ),
            **COUNTED,
        }
    ),
}
PER_NAME = Each(Null(INTERVAL))
SAID = {"verdict": str, "p": {"difference": float, "equivalence": float}, "prompts_needed": Null(int)}
DIVERSITY = {
    **ABOUT,
    "config": {},
    "evaluators": Filled(str),
    "base": str,
    "margin": float,
    "fronts": Each([str]),
    "cells": Filled(
        {
            "student": str,
            "plan": str,
            "steps": STEPS,
            "diversity": Each(Filled(POINT)),
            "vendi": Filled(INTERVAL),
            "agreement": POINT,
            "per_prompt": [{"prompt": str, "vendi": float}],
            "of_base": Each(INTERVAL),
            "of_base_first": Each(INTERVAL),
            "gain": PER_NAME,
            "recovery": PER_NAME,
            "agreement_gain": Null(INTERVAL),
            "agreement_of_base": INTERVAL,
            "claims": Maybe({"base": Maybe(Each(SAID)), "student": Maybe(Each(SAID))}),
            "teacher_guidance": Maybe(NUMBER),
            "shares": Maybe(Null(Each({"guidance": INTERVAL, "distillation": INTERVAL}))),
            "quality": Maybe(PER_NAME),
            "seconds": Maybe(float),
            "nfe": float,
            "nfe_student": int,
            **COUNTED,
        }
    ),
}
PLACE = {"comparison": str, "first": str, "step": int, "t": float}
R2 = {"r2_cross_validated": NUMBER, "r2_without_one": {"value": NUMBER, "without": Null(str)}}
SIMILARITY = {  # what a cell is, and its shape
    "block": {
        **PLACE,
        "inputs": ("forced", "own"),
        "block": str,
        "cka": INTERVAL,
        "null": {"high": NUMBER, "p": NUMBER},
        "samples": int,
        "seed_variance": INTERVAL,
        "seed_share": [NUMBER],
        "neighbours": NUMBER,
        "neighbours_chance": NUMBER,
        "standardised": NUMBER,
        "procrustes": NUMBER,
        "procrustes_permuted": NUMBER,
    },
    "weights": {"comparison": str, "block": str, "change": NUMBER},
    "cross": {**PLACE, "cka": Filled(Filled(NUMBER))},
    "stitch": {
        "comparison": str,
        "down": str,
        "up": str,
        "agreement": INTERVAL,
        **dict.fromkeys(("to_up", "to_down", "between", "nearer"), Each(INTERVAL)),
    },
    "direction": {
        "control": str,
        "target": str,
        "cosine": Filled(INTERVAL),
        "gain": [INTERVAL],
        "gain_guided": [INTERVAL],
        "delta": {"cosine": NUMBER},
    },
    "overlap": {
        "one": str,
        "two": str,
        "same": bool,
        "same_start": bool,
        **dict.fromkeys(("cosine", "in", "chance_in", "out", "chance_out"), NUMBER),
    },
    "point": {"evaluator": str, "control": str, "concept": str, "target": str, "retention": float},
    "prediction": {  # of all predictors together, and R² of the baseline, which knows the target alone
        "evaluator": str,
        "points": int,
        "controls": int,
        "concepts": Filled(str),
        "permuted": int,
        "p_family_wise": NUMBER,
        **R2,
    },
    "predictor": {
        "predictor": str,
        "evaluator": str,
        "points": int,
        "controls": int,
        "spearman": INTERVAL,
        "pearson": INTERVAL,
        "p_family_wise": NUMBER,
        **R2,
        "r2_which_student": NUMBER,
        "without_one": {"low": NUMBER, "high": NUMBER, "most": Null(str)},
    },
}
SHAPES = {"analysis.transfer": TRANSFER, "analysis.trace": TRACE, "analysis.diversity": DIVERSITY,
          "analysis.similarity": {**ABOUT, "config": {}}}  # fmt: skip


def read(folder: Path, command: str = "") -> dict:
    """The record of a run folder.

    command: the one that must have made it; empty = any of them. Raises UserError where there is none, or not
    that one's.
    """
    found, path = loaded(folder, command), Path(folder) / "results.json"
    recipe = str(found.get("recipe"))
    if recipe not in SHAPES or command not in ("", recipe):
        raise UserError(
            f"{path} was made by {quoted(recipe)}; give a folder that python -m "
            f"{command or ' or '.join(SHAPES)} made"
        )
    where = f"{path}: "
    check(found, SHAPES[recipe], where)
    for k, cell in enumerate(found["cells"] if recipe == "analysis.similarity" else ()):
        check(cell, {"what": tuple(SIMILARITY)}, f"{where}cells[{k}]")
        check(cell, SIMILARITY[cell["what"]], f"{where}cells[{k}]")
    return found


def loaded(folder: Path, command: str = "") -> dict:
    """A results.json as plain values, with cells of our schema. Raises UserError."""
    path = Path(folder) / "results.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refused)
    except FileNotFoundError:
        raise UserError(f"no {path}; python -m {command or 'analysis.transfer'} makes one") from None
    except (ValueError, RecursionError) as error:
        again = f"run {command or 'what made it'} again"
        raise UserError(f"{path} is not JSON ({str(error)[:100]}); {again}") from None
    cells = found.get("cells") if isinstance(found, dict) else None
    if cells and isinstance(cells, list) and found.get("schema") == SCHEMA and found["schema"] is not True:
        return found
    kind = f"the record of {command or 'one of our analyses'}, or an older one"
    raise UserError(f"{path} has no cells of schema {SCHEMA}: it is not {kind}; run it again")


def inside(folder: Path, name: str) -> Path:
    """The path of a file of a run folder.

    Raises UserError for one that leads out of it, by its name or by a link.
    """
    folder = Path(folder).resolve()
    try:
        path = (folder / name).resolve()
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} can hold no {quoted(name)}: {error}") from None
    if Path(name).is_absolute() or not path.is_relative_to(folder) or path == folder:
        raise UserError(
            f"{quoted(name)} is not a file of {folder}: a record names what lies in its own folder"
        )
    return path


def is_file(folder: Path, name: str | None) -> Path | None:
    """That path where there is such a file; None where no name is given or nothing was kept."""
    path = inside(folder, name) if name else None
    try:
        return path if path and path.is_file() else None
    except OSError:  # a name that is too long
        return None


def check(found: Any, shape: Any, where: str) -> None:
    """Raises UserError, which names the key, for a value of another shape."""
    if isinstance(shape, Maybe):
        check(found, shape.shape, where)
    elif isinstance(shape, Null):
        if found is not None:
            check(found, shape.shape, where)
    elif isinstance(shape, dict):
        _wrong(isinstance(found, dict), where, "keys and values", found)
        for key, inner in shape.items():
            if key in found:
                check(found[key], inner, _key(where, key))
            elif not isinstance(inner, Maybe):
                raise UserError(f"{_key(where, key)} is not there")
        strange = [key for key in found if key not in shape] if isinstance(shape, Only) else []
        if strange:
            raise UserError(f"{where} has a key {quoted(strange[0])}; there are {', '.join(shape)}")
    elif isinstance(shape, Each):
        _wrong(isinstance(found, dict), where, "keys and values", found)
        for key, value in found.items():
            check(value, shape.shape, _key(where, key))
    elif isinstance(shape, Filled) and isinstance(shape.shape, Each):
        _wrong(isinstance(found, dict) and bool(found), where, "keys and values, at least one", found)
        check(found, shape.shape, where)
    elif isinstance(shape, (list, Filled)):
        _wrong(
            isinstance(found, list) and (found or isinstance(shape, list)),
            where,
            "a list of something",
            found,
        )
        for k, value in enumerate(found):
            check(value, shape[0] if isinstance(shape, list) else shape.shape, f"{where}[{k}]")
    elif isinstance(shape, tuple):
        _wrong(isinstance(found, str) and found in shape, where, f"one of {', '.join(shape)}", found)
    else:
        says = {str: "a text", bool: "true or false", int: "a count", float: "a number"}[shape]
        right = {
            int: isinstance(found, int) and not isinstance(found, bool) and 0 <= found <= LARGEST,
            float: isinstance(found, (int, float)) and not isinstance(found, bool) and abs(found) <= LARGEST,
        }
        _wrong(right.get(shape, isinstance(found, shape)), where, says, found)


def _key(where: str, key: str) -> str:
    """outer.inner, of a key no longer than a line."""
    return f"{where}{'' if where.endswith(': ') else '.'}{cut(key, 60)}"


def _wrong(right: bool, where: str, says: str, found: Any) -> None:
    if not right:
        raise UserError(f"{where} must be {says}; got {cut(json.dumps(found, ensure_ascii=False), 80)}")


def _refused(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")
