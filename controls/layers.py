"""Targets: where in a network a control may act, by the published names of the layer sets.

A layer set says which attention it means, a scope how far beyond attention it reaches. Both are patterns over
module names, never over classes: Flux's attention class, for one, is not called Attention.
"""

import re

from torch import nn

from configs import UserError

# Names and meaning as in Concept Sliders (Gandikota et al. 2023) and its public trainer.
LAYERS = {
    "full": r"",
    "noxattn": r"^(?!.*(attn2|time_embed))",
    "innoxattn": r"^(?!.*attn2)",
    "selfattn": r"\.attn1\.",
    "xattn": r"\.attn2\.",
    "xattn-strict": r"\.attn2\.to_[kv]$",
    "xattn-up": r"^up_blocks\..*\.attn2\.",
    "xattn-down": r"^down_blocks\..*\.attn2\.",
    "xattn-mid": r"^mid_block\..*\.attn2\.",
    # of any transformer with one attention per block
    "flux-attn": r"(transformer_blocks|layers)\.\d+\.(attn|attention)\.",
}

ATTENTION = r"\.(attn\d?|attention)\."
CONVOLUTION = r"\.(resnets|downsamplers|upsamplers)\.\d+\."
SCOPES = {"lierla": ATTENTION, "c3lier": f"{ATTENTION}|{CONVOLUTION}"}
CUSTOM = "custom"  # what a card says of layers that are no published set

INSIDE_ADAPTER = re.compile(r"\.(base_layer|lora_A|lora_B)(\.|$)")


def named_layers(net: nn.Module) -> dict[str, nn.Module]:
    """Every linear and convolution layer of the bare network, by the name it has there.

    The same dict, name for name and layer for layer, whether or not controls are attached.
    """
    bare = {
        name: getattr(module, "base_layer", module)
        for name, module in net.named_modules()
        if not INSIDE_ADAPTER.search(name)
    }
    return {name: module for name, module in bare.items() if isinstance(module, (nn.Linear, nn.Conv2d))}


def targets(net: nn.Module, layers: str = "noxattn", scope: str = "c3lier") -> list[str]:
    """The sorted names of the layers that a layer set means in this network.

    Raises UserError for an unknown set or scope, and when the set means nothing here.
    """
    chosen, reach = _pattern(LAYERS, layers, "layer set"), _pattern(SCOPES, scope, "scope")
    found = sorted(name for name in named_layers(net) if re.search(chosen, name) and re.search(reach, name))
    if not found:
        raise UserError(
            f"layer set {layers!r} with scope {scope!r} matches no layer of {type(net).__name__}; sets: "
            f"{', '.join(LAYERS)}"
        )
    return found


def layer_set(net: nn.Module, names: set[str]) -> tuple[str, str]:
    """The published layer set and scope that mean exactly these layers in this network; CUSTOM twice where
    none does.
    """
    spots = named_layers(net)
    for scope, reach in SCOPES.items():
        for layers, chosen in LAYERS.items():
            if names == {name for name in spots if re.search(chosen, name) and re.search(reach, name)}:
                return layers, scope
    return CUSTOM, CUSTOM


def _pattern(table: dict[str, str], name: str, kind: str) -> str:
    if name not in table:
        raise UserError(f"unknown {kind} {name!r}; it is one of {', '.join(table)}")
    return table[name]
