"""Says what a control file is: python -m controls.info FILE"""

import sys
from collections import Counter
from pathlib import Path

from torch import Tensor

from configs import UserError, cut, entry
from controls import formats
from controls.formats import headers, layouts
from controls.formats.algorithms import READABLE, algorithm
from controls.formats.files import located

LONGEST = 400  # letters of a card's value that are shown


def describe(path: str | Path) -> str:
    """A file's layout, ranks, layers, size and card, in lines. Raises UserError as `formats.read` does."""
    tensors, metadata = formats.read(path)
    card = formats.card_of(path, metadata)
    stems, strange = layouts.layers(tensors)
    kinds = {stem: algorithm(parts) for stem, parts in stems.items() if not layouts.of_encoder(stem)}
    kinds = {stem: kind for stem, kind in kinds.items() if kind}
    theirs = sum(map(layouts.of_encoder, stems))
    downs = {stem: parts["A"] for stem, parts in stems.items() if "A" in parts and stem in kinds}
    attention, convolutions = (
        sum("attn" in stem for stem in kinds),
        sum(tensor.ndim == 4 for tensor in downs.values()),
    )
    rows = {
        "layout": layouts.layout(list(tensors)),
        "layers": f"{len(kinds)}, {attention} of attention, {convolutions} convolutions",
        "kind of layer": ", ".join(f"{kind} ({count})" for kind, count in Counter(kinds.values()).items()),
        "rank": counted(Counter(tensor.shape[0] for tensor in downs.values() if tensor.ndim)),
        "alpha": valued(Counter([card.alpha])) if card else alpha(stems, kinds, metadata),
        "size": f"{located(path).stat().st_size / 1e6:.2f} MB, "
        f"{sum(t.numel() for t in tensors.values()):,} numbers",
    }
    if theirs:
        rows["text encoders"] = f"{theirs} layers, which are not used here; the network has {len(kinds)}"
    said, family = headers.base(metadata)
    if said:
        rows["base model"] = f"{said}, by its header" + (
            f": family {family}" if family and family != said else ""
        )
    if strange:
        rows["not understood"] = f"{len(strange)} keys: {', '.join(map(cut, strange[:3]))}"
    if card:
        rows |= {
            "control": f"{card.kind} {card.name}",
            "trained on": f"{card.family}/{card.member}",
            "its weights": card.base_hash[:12] or "unknown",
            "layer set": f"{card.layers}, {card.scope}",
            **{cut(key, 40): list_of(value) for key, value in card.recipe.items()},
            "versions": shown(", ".join(f"{k} {v}" for k, v in card.versions.items())),
            **measured(card.transfer),
        }
    else:
        rows["card"] = f"none: another tool's file; {way(kinds, theirs, strange)}"
    return "\n".join(f"{key:<14} {value}" for key, value in {"file": path, **rows}.items())


def alpha(stems: dict[str, dict[str, Tensor]], kinds: dict[str, str], metadata: dict[str, str]) -> str:
    """The alphas of a file without a card: its tensors', else those that PEFT's settings say; in what else it
    is as strong as its rank.
    """
    found = [
        float(stems[stem]["alpha"]) if stems[stem]["alpha"].numel() == 1 else float("nan")
        for stem in kinds
        if "alpha" in stems[stem]
    ]
    if not found:
        ranks = {
            layouts.bare(stem): len(stems[stem]["A"])
            for stem in kinds
            if "A" in stems[stem] and stems[stem]["A"].ndim
        }
        try:
            found = list(headers.alphas(headers.settings(metadata), ranks).values())
        except UserError as error:
            return f"unknown: {error}"
    if not found:
        peft = any("base_model.model." in stem for stem in kinds)
        return (
            f"unknown: {headers.BESIDE} says it, which is not beside the file"
            if peft
            else "not said: strength is 1"
        )
    return valued(Counter(found)) + (
        f"; {len(kinds) - len(found)} layers say none" if len(found) < len(kinds) else ""
    )


def valued(alphas: Counter) -> str:
    """Alphas, and what it means where all are 0."""
    return counted(alphas) + ("" if any(alphas) else ", so it does nothing")


def way(kinds: dict[str, str], theirs: int, strange: list[str]) -> str:
    """What controls.convert would do with another tool's file."""
    odd = next((kind for kind in kinds.values() if kind not in READABLE), "")
    if odd or strange or not kinds:
        reason = (
            f"holds {odd}"
            if odd
            else "has keys that are not understood"
            if strange
            else "has nothing for the network"
        )
        return f"python -m controls.convert cannot read it, as it {reason}"
    return "python -m controls.convert makes it one of ours, where member= has its layers" + (
        ", with encoders=ignore" if theirs else ""
    )


def measured(transfer: dict) -> dict[str, str]:
    """What analysis.transfer wrote into a card: scale, retention, verdict per target and evaluator."""
    if not transfer:
        return {}
    try:
        rows = {
            target: "; ".join(
                f"{evaluator_name}: scale {ranged(found['scale'])}, retention "
                f"{ranged(found['retention'])}, {found['verdict']}"
                for evaluator_name, found in readings.items()
            )
            for target, readings in transfer["targets"].items()
        }
        return {
            **{cut(target, 40): shown(row) for target, row in rows.items()},
            "measured by": shown(transfer["command"]),
        }
    except (KeyError, TypeError, AttributeError, ValueError):
        return {"measured": "in a way that this version cannot read"}


def ranged(interval: dict) -> str:
    """'0.93 [0.88, 0.98]', with a dash for what is not known."""
    value, low, high = (
        "-" if interval[end] is None else f"{interval[end]:.2f}" for end in ("value", "low", "high")
    )
    return value if low == high == "-" else f"{value} [{low}, {high}]"


def list_of(value: object) -> str:
    """A value of a recipe; a list of mappings, as prompts are, as one line each."""
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        return shown(value)
    return ("\n" + " " * 15).join(
        shown(", ".join(f"{key}: {word}" for key, word in row.items() if word)) for row in value[:50]
    ) or "none"


def shown(value: object) -> str:
    """A value of a card on a screen: one line of letters that are letters."""
    return cut(value, LONGEST)


def counted(values: Counter) -> str:
    """'4', or '4 (60 layers), 8 (10)'."""
    rows = [f"{value:g} ({count} layers)" for value, count in sorted(values.items())]
    return (
        f"{next(iter(values)):g}"
        if len(values) == 1
        else ", ".join([*rows[:10], *(["…"] if rows[10:] else [])]) or "none"
    )


def run() -> None:
    if {"--help", "-h", "help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    if len(sys.argv) != 2:
        raise UserError("say which file: python -m controls.info FILE")
    print(describe(sys.argv[1]))


if __name__ == "__main__":
    entry(run)
