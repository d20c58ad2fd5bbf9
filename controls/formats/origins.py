"""Origins: which published network a file of an unknown one fits, by its layers' names and shapes."""

import json
from collections.abc import Iterator
from functools import cache

from accelerate import init_empty_weights
from torch import Tensor, nn

from configs import ROOT, UserError
from controls.formats import layouts
from models.architectures import ARCHITECTURES
from models.cards import card


def families(tensors: dict[str, Tensor]) -> list[str]:
    """The names of the shipped families whose networks, at their published sizes, take all of a file."""
    return [name for name, net in _networks() if _takes(net, tensors)]


def _takes(net: nn.Module, tensors: dict[str, Tensor]) -> bool:
    spots = layouts.named_layers(net)
    try:
        pairs = layouts.gather(tensors, net, {}, "ignore")
    except UserError:
        return False
    return all(a.shape[1] == spots[layer].weight.shape[1] for layer, (a, _, _) in pairs.items())


def _networks() -> Iterator[tuple[str, nn.Module]]:
    for name, parts in json.loads((ROOT / "models/published.json").read_text()).items():
        its = ARCHITECTURES[card(name).architecture]
        yield name, _network(name, json.dumps(parts[its.part]))


@cache
def _network(name: str, config: str) -> nn.Module:
    with init_empty_weights():
        return ARCHITECTURES[card(name).architecture].network.from_config(json.loads(config))
