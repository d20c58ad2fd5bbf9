"""Scales: the strength of a control as it is written, or the one that a measurement says for a member."""

import json
import math
from pathlib import Path

from configs import UserError, cut
from controls.lora import Card

MATCHED = "matched"
STRONGEST = 100.0
HOPELESS = ("dead", "reversed", "undefined")  # verdicts with which no scale is recommended


def scale(path: str, said: object) -> float:
    """A scale as it is written, a number or a text. Raises UserError for what is none."""
    try:
        value = math.nan if isinstance(said, bool) else float(said)
    except (ValueError, TypeError):
        value = math.nan
    if not -STRONGEST <= value <= STRONGEST:
        raise UserError(
            f"controls: {cut(path)} has the scale {cut(said)!r}; it must be a number from "
            f"{-STRONGEST:g} to {STRONGEST:g}, or {MATCHED}"
        )
    return value


def matched(path: str, card: Card | None, target: str, member: str, measured: str = "") -> float:
    """The scale at which a control has on a plan, else on a member, the effect that it has at 1 on its
    source: by the first evaluator.

    measured: results.json of a transfer run that says it; empty = the card in the control's header. Raises
    UserError where it does not.
    """
    source = f"{card.family}/{card.member}" if card else ""
    who, targets = measured or "its header", _measured(measured, card) if measured else _of_card(card)
    for name in (target, member):
        reading = next(iter(targets[name].values()), None) if isinstance(targets.get(name), dict) else None
        if not isinstance(reading, dict):
            continue
        value = reading["scale"].get("value") if isinstance(reading.get("scale"), dict) else None
        if reading.get("verdict") in HOPELESS or not isinstance(value, int | float):
            raise UserError(
                f"{cut(path)} has no matched scale on {name}: {who} says {cut(reading.get('verdict'))}; "
                f"give a number"
            )
        return scale(path, value)
    if member == source:
        return 1.0
    raise UserError(
        f"{cut(path)} does not say its scale on {member}: give a number, or measure it, python -m "
        f"analysis.transfer controls=[{cut(path)}] targets=[{member.partition('/')[2]}] write_card=true"
    )


def _of_card(card: Card | None) -> dict:
    targets = card.transfer.get("targets") if card else None
    return targets if isinstance(targets, dict) else {}


def _measured(path: str, card: Card | None) -> dict:
    """What a transfer run says of a control, as cards have it. Raises UserError for no such record."""
    try:
        cells = json.loads(Path(path).read_text())["cells"]
        return {
            cell["target"]: {
                name: {"scale": reading["matched_scale"], "verdict": reading.get("verdict")}
                for name, reading in cell["readings"].items()
            }
            for cell in cells
            if card and cell["control"] == card.name
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"measured={cut(path)} is no results.json of analysis.transfer") from None
