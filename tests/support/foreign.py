"""Controls that come from the files of other tools, and how two of them are compared."""

import torch

from controls import formats
from controls.lora import Card, Control

FOREIGN = Card("lora", "foreign", "tiny", "base", 0, 0.0, "full", "c3lier")


def change(control: Control) -> dict[str, torch.Tensor]:
    """What a control adds to each weight at scale 1, flattened."""
    layers = {key.rsplit(".lora_", 1)[0] for key in control.tensors}
    factor = control.card.alpha / control.card.rank

    def half(layer, end):
        return control.tensors[layer + end].double().flatten(1)

    return {
        layer: factor * half(layer, formats.HALVES[1]) @ half(layer, formats.HALVES[0]) for layer in layers
    }


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        (one[key] - other[key]).norm() <= 1e-6 * other[key].norm() for key in one
    )
