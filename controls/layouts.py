"""Layouts: how other tools spell a layer's name, as a table that is looked up, never as a rule that is inverted.

Underscored names are ambiguous, so every spelling of every layer of the network at hand is written down and a file's keys are found there.
"""

from torch import Tensor, nn

from configs import UserError
from controls.targets import places

# a file's suffixes and what they hold
SUFFIXES = {
    ".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_down.weight": "A", ".lora_up.weight": "B",
    ".lora.down.weight": "A", ".lora.up.weight": "B", ".alpha": "alpha",
}  # fmt: skip

# inside a resnet: diffusers' name and SGM's
RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
EMBEDDINGS = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
              "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2", "conv_out": "out.2"}  # fmt: skip
# inside a block of Flux: the original's name, and the layers of diffusers that it fuses, in order of rows
FLUX_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",), "txt_attn.proj": ("attn.to_add_out",), "img_mlp.0": ("ff.net.0.proj",), "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",), "txt_mlp.2": ("ff_context.net.2",), "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
}  # fmt: skip
FLUX_SINGLE = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear2": ("proj_out",), "modulation.lin": ("norm.linear",)}
# outside the blocks, one layer each
FLUX_OUTSIDE = {
    "img_in": "x_embedder", "txt_in": "context_embedder",
    "final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "norm_out.linear",
    **{f"{theirs}.{half}_layer": f"time_text_embed.{ours}.linear_{k}" for theirs, ours in
       (("time_in", "timestep_embedder"), ("vector_in", "text_embedder"), ("guidance_in", "guidance_embedder"))
       for k, half in enumerate(("in", "out"), 1)},
}  # fmt: skip
SWAPPED = ("final_layer.adaLN_modulation.1", "final_layer_adaLN_modulation_1")  # rows: shift, scale; diffusers has scale, shift


def spellings(net: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every known spelling of every layer of a network, and the layers that it means: one, or several where a tool fuses them."""
    table: dict[str, tuple[str, ...]] = {}
    for theirs, ours in [*((name, (name,)) for name in places(net)), *_sgm(net).items(), *_flux(net).items()]:
        flat = theirs.replace(".", "_")
        for spelling in (theirs, f"unet.{theirs}", f"transformer.{theirs}", f"diffusion_model.{theirs}", f"lora_unet_{flat}",
                         f"lora_transformer_{flat}"):  # fmt: skip
            table[spelling] = ours
    return table


def split(key: str) -> tuple[str, str] | None:
    """A key as (layer's spelling, A, B or alpha), or None when it has no known suffix."""
    return next(((key.removesuffix(suffix), part) for suffix, part in SUFFIXES.items() if key.endswith(suffix)), None)


def layout(keys: list[str]) -> str:
    """The name of a file's layout, for people."""
    first = min(keys, default="")
    rows = {
        "kohya with Flux's own names": any(part in key for key in keys for part in ("_double_blocks_", "_single_blocks_", "_final_layer_")),
        "kohya with SGM names": any(part in key for key in keys for part in ("_input_blocks_", "_output_blocks_", "_middle_block_")),
        "kohya with diffusers names": first.startswith(("lora_unet_", "lora_transformer_")),
        "ai-toolkit or ComfyUI": first.startswith("diffusion_model."),
        "diffusers": first.startswith(("unet.", "transformer.")) or any("transformer_blocks." in key for key in keys),
    }
    return next((name for name, holds in rows.items() if holds), "unknown")


def gather(tensors: dict[str, Tensor], net: nn.Module, alphas: dict[str, float]) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A file's pairs by this network's layers: A (r, in, …), B (out, r, …) and the strength alpha / r of each, r its own.

    alphas: spelling to alpha where the file's header says it; a layer of which nothing says it has strength 1.
    Raises UserError that names the first three keys which do not find their place.
    """
    table, found, lost = spellings(net), {}, []
    for key, tensor in tensors.items():
        stem, part = split(key) or (key, "")
        if part and stem in table:
            found.setdefault(stem, {})[part] = tensor.float()
        else:
            lost.append(key)
    halves = [stem for stem, pair in found.items() if not _whole(pair)]
    if not tensors:
        raise UserError("the file holds no layers")
    if lost or halves:
        what = "no place in this network" if lost else "only one half here, or halves of different ranks"
        hint = "; text encoders' layers are not supported" if any(k.startswith(("lora_te", "text_encoder")) for k in lost) else ""
        raise UserError(f"{len(lost or halves)} of {len(tensors)} keys have {what}: {', '.join((lost or halves)[:3])}{hint}")
    pairs, spots = {}, places(net)
    for stem, pair in found.items():
        a, b, rank = pair["A"], pair["B"], pair["A"].shape[0]
        strength = float(pair["alpha"]) / rank if "alpha" in pair else alphas.get(stem, rank) / rank
        rows = [spots[layer].weight.shape[0] for layer in table[stem]]
        if sum(rows) != b.shape[0]:
            raise UserError(f"{stem} has {b.shape[0]} rows where this network has {sum(rows)}. Was it trained on another family?")
        if stem.endswith(SWAPPED):
            b = b.roll(len(b) // 2, 0)
        for layer, part in zip(table[stem], b.split(rows), strict=True):
            pairs[layer] = (a, part, strength)
    return pairs


def _whole(pair: dict[str, Tensor]) -> bool:
    """Whether A (r, in, …) and B (out, r, …) are both there and of one rank, and alpha, if any, one number."""
    a, b = pair.get("A"), pair.get("B")
    if a is None or b is None or min(a.ndim, b.ndim) < 2:
        return False
    return 0 < a.shape[0] == b.shape[1] and ("alpha" not in pair or pair["alpha"].numel() == 1)


def _sgm(net: nn.Module) -> dict[str, tuple[str, ...]]:
    """The names that Stability's own code has for the layers of a U-Net of diffusers."""
    if not hasattr(net, "down_blocks"):
        return {}
    prefixes, count = {f"{ours}.": f"{theirs}." for ours, theirs in EMBEDDINGS.items()}, 0
    for i, block in enumerate(net.down_blocks):
        for j in range(len(block.resnets)):
            count += 1
            prefixes[f"down_blocks.{i}.resnets.{j}."] = f"input_blocks.{count}.0."
            prefixes[f"down_blocks.{i}.attentions.{j}."] = f"input_blocks.{count}.1."
        if block.downsamplers:
            count += 1
            prefixes[f"down_blocks.{i}.downsamplers.0.conv."] = f"input_blocks.{count}.0.op."
    for k, part in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        prefixes[f"mid_block.{part}."] = f"middle_block.{k}."
    count = -1
    for i, block in enumerate(net.up_blocks):
        for j in range(len(block.resnets)):
            count += 1
            prefixes[f"up_blocks.{i}.resnets.{j}."] = f"output_blocks.{count}.0."
            prefixes[f"up_blocks.{i}.attentions.{j}."] = f"output_blocks.{count}.1."
        if block.upsamplers:
            place = 2 if getattr(block, "attentions", None) else 1
            prefixes[f"up_blocks.{i}.upsamplers.0.conv."] = f"output_blocks.{count}.{place}.conv."
    found = {}
    for layer in places(net):
        ours = next((prefix for prefix in prefixes if f"{layer}.".startswith(prefix)), None)
        if ours:
            rest = f"{layer}."[len(ours) :].removesuffix(".")
            found[f"{prefixes[ours]}{RESNET.get(rest, rest)}".removesuffix(".")] = (layer,)
    return found


def _flux(net: nn.Module) -> dict[str, tuple[str, ...]]:
    """The names of Flux's own code, which fuses queries, keys, values and more."""
    found, spots = {}, places(net)
    kinds = (("double_blocks", "transformer_blocks", FLUX_DOUBLE), ("single_blocks", "single_transformer_blocks", FLUX_SINGLE))
    for theirs, ours, inside in kinds:
        for k in range(len(getattr(net, ours, []))):
            for name, parts in inside.items():
                layers = tuple(f"{ours}.{k}.{part}" for part in parts)
                if all(layer in spots for layer in layers):
                    found[f"{theirs}.{k}.{name}"] = layers
    return found | {theirs: (ours,) for theirs, ours in FLUX_OUTSIDE.items() if ours in spots}
