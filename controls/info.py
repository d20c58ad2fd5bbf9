"""Says what a control file is: python -m controls.info FILE"""

import sys
from collections import Counter
from pathlib import Path

from configs import UserError, entry
from controls import formats, layouts


def describe(path: Path) -> str:
    """A file's layout, ranks, layers, size and card, in lines. Raises UserError as `formats.read` does."""
    tensors, metadata = formats.read(path)
    card, parts = formats.card_of(path, metadata), {key: layouts.split(key) for key in tensors}
    downs = {key: tensors[key] for key, part in parts.items() if part and part[1] == "A"}
    ranks = Counter(tensor.shape[0] for tensor in downs.values())
    alphas = Counter(float(tensors[key]) for key, part in parts.items() if part and part[1] == "alpha")
    attention = sum("attn" in key for key in downs)
    rows = {
        "layout": layouts.layout(list(tensors)),
        "layers": f"{len(downs)}, {attention} of attention, {sum(t.ndim == 4 for t in downs.values())} convolutions",
        "rank": counted(ranks),
        "alpha": f"{card.alpha:g}" if card else counted(alphas) if alphas else "not said: as the rank",
        "size": f"{path.stat().st_size / 1e6:.2f} MB, {sum(t.numel() for t in tensors.values()):,} numbers",
    }
    strange = [key for key, part in parts.items() if part is None]
    if strange:
        rows["not understood"] = f"{len(strange)} keys: {', '.join(strange[:3])}"
    if card:
        rows |= {"control": f"{card.kind} {card.name}", "trained on": f"{card.family}/{card.member}",
                 "its weights": card.base_hash[:12] or "unknown", "layer set": f"{card.layers}, {card.scope}",
                 **{key: listed(value) for key, value in card.recipe.items()},
                 "versions": ", ".join(f"{k} {v}" for k, v in card.versions.items()), **measured(card.transfer)}  # fmt: skip
    else:
        rows["card"] = "none: another tool's file; python -m controls.convert makes it one of ours"
    return "\n".join(f"{key:<14} {value}" for key, value in {"file": path, **rows}.items())


def measured(transfer: dict) -> dict[str, str]:
    """What analysis.transfer wrote into a card, a row per target: by each evaluator the scale, the retention and the verdict."""
    if not transfer:
        return {}
    rows = {target: "; ".join(f"{who}: scale {ranged(found['scale'])}, retention {ranged(found['retention'])}, {found['verdict']}"
                              for who, found in readings.items()) for target, readings in transfer["targets"].items()}  # fmt: skip
    return {**rows, "measured by": transfer["command"]}


def ranged(interval: dict) -> str:
    """'0.93 [0.88, 0.98]', with a dash for what is not known."""
    value, low, high = ("-" if interval[end] is None else f"{interval[end]:.2f}" for end in ("value", "low", "high"))
    return value if low == high == "-" else f"{value} [{low}, {high}]"


def listed(value: object) -> str:
    """A value of a recipe; a list of mappings, as prompts are, as one line each."""
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        return str(value)
    return ("\n" + " " * 15).join(", ".join(f"{key}: {word}" for key, word in row.items() if word) for row in value) or "none"


def counted(values: Counter) -> str:
    """'4', or '4 (60 layers), 8 (10)'."""
    rows = [f"{value:g} ({count} layers)" for value, count in sorted(values.items())]
    return f"{next(iter(values)):g}" if len(values) == 1 else ", ".join(rows) or "none"


def run() -> None:
    if {"--help", "-h", "help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    if len(sys.argv) != 2:
        raise UserError("say which file: python -m controls.info FILE")
    print(describe(Path(sys.argv[1])))


if __name__ == "__main__":
    entry(run)
