"""Layouts: how other tools spell a layer's name, as a table that is looked up, never as a rule that is
inverted.

Underscored names are ambiguous, so every spelling of every layer of the network at hand is written down and a
file's keys are found there.
"""

import re
from collections.abc import Sized

import torch
from torch import Tensor, nn

from configs import UserError, cut, note
from controls.formats.algorithms import READABLE, algorithm, pair, split
from controls.layers import named_layers

# what stands before a layer's name, with dots in it and with underscores
DOTTED = (
    "",
    "unet.",
    "transformer.",
    "diffusion_model.",
    "model.diffusion_model.",
    "base_model.model.",
    "unet.base_model.model.",
    "transformer.base_model.model.",
)
FLAT = ("lora_unet_", "lora_transformer_", "lycoris_")
# what text encoders' layers begin with
ENCODERS = (
    "lora_te_",
    "lora_te1_",
    "lora_te2_",
    "lora_te3_",
    "lycoris_te",
    "text_encoder",
    "te1_",
    "te2_",
    "base_model.model.text_model.",
    "clip_l.",
    "clip_g.",
    "t5xxl.",
)
ENCODER_POLICIES = ("refuse", "ignore")

# inside a resnet: diffusers' name and SGM's
RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
EMBEDDINGS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_out": "out.2",
}
# inside a block of Flux: the original's name, or XLabs' processor's, and diffusers' layers that it fuses,
# in order of rows
FLUX_DOUBLE = {
    "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "processor.qkv1": "attn.to_q attn.to_k attn.to_v",
    "processor.proj1": "attn.to_out.0",
    "processor.qkv2": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "processor.proj2": "attn.to_add_out",
}
FLUX_SINGLE = {
    "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
    "linear2": "proj_out",
    "modulation.lin": "norm.linear",
    "processor.qkv": "attn.to_q attn.to_k attn.to_v",
    "processor.proj": "proj_out",
}
# a stack of blocks: the original's name, diffusers', and what is inside of each
FLUX = (
    ("double_blocks", "transformer_blocks", FLUX_DOUBLE),
    ("single_blocks", "single_transformer_blocks", FLUX_SINGLE),
)
# outside the blocks, one layer each
FLUX_OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
}
# likewise of Flux.2, whose queries, keys, values and more stay fused in single blocks
FLUX2_DOUBLE = {
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
FLUX2_SINGLE = {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}
FLUX2 = (
    ("double_blocks", "transformer_blocks", FLUX2_DOUBLE),
    ("single_blocks", "single_transformer_blocks", FLUX2_SINGLE),
)
FLUX2_OUTSIDE = {
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
}
SWAPPED = "norm_out.linear"  # rows: shift, scale; diffusers has scale, shift
# inside a block of SD3, its image's half and its text's
SD3_JOINT = {
    "x_block.attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.mlp.fc2": "ff.net.2",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
}
SD3 = (("joint_blocks", "transformer_blocks", SD3_JOINT),)
SD3_OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
}
PROJECTIONS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
)  # of an attention

# inside a block of Krea 2, also of those that read the text
KREA = {
    "attn.wq": "attn.to_q",
    "attn.wk": "attn.to_k",
    "attn.wv": "attn.to_v",
    "attn.wo": "attn.to_out.0",
    "attn.gate": "attn.to_gate",
    "mlp.gate": "ff.gate",
    "mlp.up": "ff.up",
    "mlp.down": "ff.down",
}
KREA2 = (
    ("blocks", "transformer_blocks", KREA),
    ("txtfusion.layerwise_blocks", "text_fusion.layerwise_blocks", KREA),
    ("txtfusion.refiner_blocks", "text_fusion.refiner_blocks", KREA),
)
KREA2_OUTSIDE = {
    "first": "img_in",
    "last.linear": "final_layer.linear",
    "tmlp.0": "time_embed.linear_1",
    "tmlp.2": "time_embed.linear_2",
    "tproj.1": "time_mod_proj",
    "txtmlp.1": "txt_in.linear_1",
    "txtmlp.3": "txt_in.linear_2",
    "txtfusion.projector": "text_fusion.projector",
}

# a layout's name, and what a key of it has; the first that a file has a key of
LAYOUTS = {
    "kohya with Flux's own names": r"_(double|single)_blocks_",
    "kohya with SD3's own names": r"_joint_blocks_",
    "kohya with Krea's own names": r"^lora_unet_(blocks|txtfusion)_",
    "kohya with SGM names": r"_(input_blocks|output_blocks|middle_block)_",
    "kohya with diffusers names": r"^lora_(unet|transformer)_",
    "LyCORIS with diffusers names": r"^lycoris_",
    "kohya": r"^lora_te",
    "XLabs": r"\.processor\.(qkv|proj)_lora",
    "diffusers before 0.22": r"\.processor\.",
    "PEFT": r"base_model\.model\.",
    "ai-toolkit or ComfyUI": r"^diffusion_model\.",
    "diffusers": r"^(unet|transformer)\.|transformer_blocks\.",
}


class Misfit(UserError):
    """A file's layers are not this network's."""


def spellings(net: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every known spelling of every layer of a network, and the layers that it means: one, or several where a
    tool fuses them.
    """
    table: dict[str, tuple[str, ...]] = {}
    ours = {name: (name,) for name in named_layers(net)}
    for names in (
        _processors(net),
        _zimage(net),
        _krea2(net),
        _sd3(net),
        _flux(net),
        _sgm(net),
        ours,
    ):  # the network's own names win
        for theirs, layers in names.items():
            flat = theirs.replace(".", "_")
            table |= dict.fromkeys(
                [*(prefix + theirs for prefix in DOTTED), *(prefix + flat for prefix in FLAT)], layers
            )
    return table


def bare(stem: str) -> str:
    """A dotted spelling without what stands before the layer's name."""
    return stem.removeprefix(max((prefix for prefix in DOTTED if stem.startswith(prefix)), key=len))


def layout(keys: list[str]) -> str:
    """The name of a file's layout, for people."""
    return next(
        (name for name, sign in LAYOUTS.items() if any(re.search(sign, key) for key in keys)), "unknown"
    )


def of_encoder(stem: str) -> bool:
    """Whether a key or a layer's spelling is a text encoder's."""
    return stem.startswith(ENCODERS)


def layers(tensors: dict[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """A file's tensors by layer's spelling and part, and the keys of no kind that is known.

    Raises UserError for a part twice.
    """
    found, strange = {}, []
    for key, tensor in tensors.items():
        stem, part = split(key) or (key, "")
        if not part:
            strange.append(key)
        elif part in found.setdefault(stem, {}):
            raise UserError(f"{cut(stem)} is there twice, under two endings")
        else:
            found[stem][part] = tensor
    return found, strange


def gather(
    tensors: dict[str, Tensor], net: nn.Module, alphas: dict[str, float], encoders: str = "refuse"
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A file's pairs by this network's layers: A (r, in, …), B (out, r) and the strength alpha / r of each, r
    its own.

    alphas: spelling to alpha where the file's header says it; a layer of which nothing says it has strength
    1. encoders: what becomes of text encoders' layers, refuse or ignore. Raises UserError that names the
    first three layers which do not find their place, or the algorithm of those that no pair can hold.
    """
    stems, strange = layers(tensors)
    stems, strange = _networks(stems, strange, encoders)
    kinds = {stem: algorithm(parts) for stem, parts in stems.items()}
    stems = {stem: parts for stem, parts in stems.items() if kinds[stem]}  # the others change nothing
    if not (stems or strange):
        raise UserError(
            "the file holds no layers" if not tensors else "the file holds nothing for the network"
        )
    table, spots, count = spellings(net), named_layers(net), f"of {len(stems)} layers"
    odd = next((kind for kind in kinds.values() if kind and kind not in READABLE), None)
    if odd:
        held = [stem for stem in kinds if kinds[stem] == odd]
        raise UserError(
            f"{len(held)} {count} hold {odd}, which is more than a low-rank pair and is not read: "
            f"{_few(held)}"
        )
    if strange:
        raise UserError(
            f"{len(strange)} of {len(tensors)} keys are of no kind that is known: {_few(strange)}"
        )
    if lost := [stem for stem in stems if stem not in table]:
        raise Misfit(f"{len(lost)} {count} have no place in this network: {_few(lost)}")
    pairs, swapped = {}, _swapped(spots)
    for stem, parts in stems.items():
        rows = [spots[layer].weight.shape[0] for layer in table[stem]]
        a, b, strength = pair(
            stem, parts, alphas.get(stem), torch.Size([sum(rows), *spots[table[stem][0]].weight.shape[1:]])
        )
        if sum(rows) != b.shape[0]:
            raise Misfit(f"{cut(stem)} has {b.shape[0]} rows where this network has {sum(rows)}")
        if table[stem][0] in swapped and not stem.endswith(
            (table[stem][0], table[stem][0].replace(".", "_"))
        ):
            b = b.roll(len(b) // 2, 0)
        for layer, part in zip(table[stem], b.split(rows), strict=True):
            if layer in pairs:
                raise UserError(f"{layer} is there twice, under two spellings, one of them {cut(stem)}")
            pairs[layer] = (a, part, strength)
    return pairs


def _networks(stems: dict, strange: list[str], encoders: str) -> tuple[dict, list[str]]:
    """Those that are not a text encoder's, where the others may be left out. Raises UserError."""
    if encoders not in ENCODER_POLICIES:
        raise UserError(f"no encoders={cut(encoders)}; there are {', '.join(ENCODER_POLICIES)}")
    theirs = [stem for stem in stems if of_encoder(stem)]
    if not theirs and not any(map(of_encoder, strange)):
        return stems, strange
    if len(theirs) == len(stems):
        raise UserError(f"all {len(stems)} layers are text encoders': there is nothing for the network")
    text = f"{len(theirs)} of {len(stems)} layers are text encoders'"
    if encoders == "refuse":
        raise UserError(
            f"{text}, which are not used here: encoders=ignore takes the others alone; the first is "
            f"{_few(theirs[:1])}"
        )
    note(f"{text} and are left out")
    return {stem: parts for stem, parts in stems.items() if not of_encoder(stem)}, [
        key for key in strange if not of_encoder(key)
    ]


def _few(names: list[str]) -> str:
    return ", ".join(map(cut, names[:3])) + (" …" if len(names) > 3 else "")


def _swapped(spots: dict[str, nn.Module]) -> set[str]:
    """Layers whose two halves of rows diffusers has the other way round than the model's own code."""
    last = [layer for layer in spots if layer.endswith("norm1_context.linear")][-1:]
    return {SWAPPED, *(layer for layer in last if spots[layer].out_features == 2 * spots[layer].in_features)}


def _sgm(net: nn.Module) -> dict[str, tuple[str, ...]]:
    """The names that Stability's own code has for the layers of a U-Net of diffusers."""
    if not hasattr(net, "down_blocks"):
        return {}
    prefixes = {f"{ours}.": f"{theirs}." for ours, theirs in EMBEDDINGS.items()}
    for k, part in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        prefixes[f"mid_block.{part}."] = f"middle_block.{k}."
    for stack, theirs, count in (("down_blocks", "input_blocks", 0), ("up_blocks", "output_blocks", -1)):
        for i, block in enumerate(getattr(net, stack)):
            ours = f"{stack}.{i}"
            for j in range(len(block.resnets)):
                count += 1
                prefixes[f"{ours}.resnets.{j}."] = f"{theirs}.{count}.0."
                prefixes[f"{ours}.attentions.{j}."] = f"{theirs}.{count}.1."
            if getattr(block, "downsamplers", None):
                count += 1
                prefixes[f"{ours}.downsamplers.0.conv."] = f"{theirs}.{count}.0.op."
            if getattr(block, "upsamplers", None):
                place = 2 if getattr(block, "attentions", None) else 1
                prefixes[f"{ours}.upsamplers.0.conv."] = f"{theirs}.{count}.{place}.conv."
    found = {}
    for layer in named_layers(net):
        ours = next((prefix for prefix in prefixes if f"{layer}.".startswith(prefix)), None)
        if ours:
            rest = f"{layer}."[len(ours) :].removesuffix(".")
            found[f"{prefixes[ours]}{RESNET.get(rest, rest)}".removesuffix(".")] = (layer,)
    return found


def _flux(net: nn.Module) -> dict[str, tuple[str, ...]]:
    """The names of Flux's own code and of XLabs', which fuse queries, keys, values and more."""
    return _by_tables(net, FLUX, FLUX_OUTSIDE) | _by_tables(net, FLUX2, FLUX2_OUTSIDE)


def _krea2(net: nn.Module) -> dict[str, tuple[str, ...]]:
    """The names of Krea 2's own code."""
    if "time_mod_proj" not in named_layers(net):
        return {}
    return _by_tables(net, KREA2, KREA2_OUTSIDE)


def _sd3(net: nn.Module) -> dict[str, tuple[str, ...]]:
    """The names of SD3's own code, which fuses queries, keys and values."""
    if not {"pos_embed.proj", "context_embedder"} <= named_layers(net).keys():
        return {}
    return _by_tables(net, SD3, SD3_OUTSIDE)


def _by_tables(
    net: nn.Module, stacks: tuple[tuple[str, str, dict[str, str]], ...], outside: dict[str, str]
) -> dict[str, tuple[str, ...]]:
    """The names in tables as above whose layers are all in this network."""
    spots, names = named_layers(net), {theirs: (ours,) for theirs, ours in outside.items()}
    for theirs, ours, inside in stacks:
        for k in range(len(_part(net, ours))):
            for name, parts in inside.items():
                names[f"{theirs}.{k}.{name}"] = tuple(f"{ours}.{k}.{part}" for part in parts.split())
    return {theirs: layers for theirs, layers in names.items() if all(layer in spots for layer in layers)}


def _part(net: nn.Module, name: str) -> Sized:
    """A part by its name; nothing where it is not there."""
    try:
        return net.get_submodule(name)
    except AttributeError:
        return ()


def _zimage(net: nn.Module) -> dict[str, tuple[str, ...]]:
    """The names of Z-Image's own code, which fuses queries, keys and values."""
    spots, names = named_layers(net), {}
    if "all_x_embedder.2-1" not in spots:
        return {}
    for layer in spots:
        if layer.endswith(".attention.to_q"):
            stem = layer.removesuffix(".to_q")
            names[f"{stem}.qkv"] = tuple(f"{stem}.{part}" for part in PROJECTIONS[:3])
            names[f"{stem}.out"] = (f"{stem}.to_out.0",)
        for ours, theirs in (("all_x_embedder.2-1", "x_embedder"), ("all_final_layer.2-1", "final_layer")):
            if layer == ours or layer.startswith(f"{ours}."):
                names[theirs + layer.removeprefix(ours)] = (layer,)
    return names


def _processors(net: nn.Module) -> dict[str, tuple[str, ...]]:
    """The names of diffusers before 0.22, where the LoRA was in the attention's processor."""
    found = {}
    for layer in named_layers(net):
        ours = next((part for part in PROJECTIONS if layer.endswith(f".{part}")), None)
        if ours:
            found[f"{layer.removesuffix(ours)}processor.{ours.removesuffix('.0')}"] = (layer,)
    return found
