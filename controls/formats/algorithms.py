"""Algorithms: what the tensors of one layer mean together, as one low-rank pair that is exactly theirs, or a
refusal by their name.

LoRA: B A. LoCon's Tucker form: up · mid · down. LoHa (FedPara, Hyeon-Woo et al. 2021): (B1 A1) ∘ (B2 A2).
LoKr: W1 ⊗ W2. The last three are LyCORIS's (Yeh et al. 2023), with its strengths.
"""

import torch
from torch import Tensor

from configs import UserError, cut
from controls.formats.files import real

MOST_RANK = 256  # of a pair that a product is turned into

LYCORIS = (
    "lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2 "
    "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2"
).split()
# the ends of keys, after the layer's name and a dot, and what they hold
PARTS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_down.weight": "A",
    "lora_up.weight": "B",
    "lora.down.weight": "A",
    "lora.up.weight": "B",
    "lora_A.default.weight": "A",
    "lora_B.default.weight": "B",
    "alpha": "alpha",
    "lora_mid.weight": "mid",
    **{name: name for name in LYCORIS},
}
# those that change more than a low-rank pair can, and what they are called; where all its numbers are zero,
# one of the first table is nothing
DIFFERENCES = {
    "diff": "a full difference (.diff)",
    "diff_b": "a bias's difference (.diff_b)",
    "w_norm": "a norm's difference (.w_norm)",
    "b_norm": "a norm's difference (.b_norm)",
    "lora_B.bias": "a LoRA with a bias",
    "lora_up.bias": "a LoRA with a bias",
    "lora_B.default.bias": "a LoRA with a bias",
}
REFUSED = {
    "DoRA": "dora_scale lora_magnitude_vector lora_magnitude_vector.weight "
    "lora_magnitude_vector.default.weight",
    "IA3": "on_input ia3_l",
    "OFT": "oft_blocks oft_diag oft_R.weight",
    "GLoRA": "a1.weight a2.weight b1.weight b2.weight",
    "AdaLoRA": "lora_E",
    "VeRA": "vera_lambda_b vera_lambda_d",
    "LoKr with a Tucker core": "lokr_t2",
    "LoHa with a Tucker core": "hada_t1 hada_t2",
    "a whole weight, as models have": "weight",
    "a whole bias, as models have": "bias",
}
ENDS = {end: end for end in (*DIFFERENCES, *" ".join(REFUSED.values()).split())} | PARTS
TUCKER = "LoCon with a Tucker core (lora_mid)"
READABLE = ("LoRA", TUCKER, "LoHa", "LoKr")  # by `pair`


def split(key: str) -> tuple[str, str] | None:
    """A key as (layer's spelling, part), or None when its end is of no kind that is known."""
    if (
        "processor." in key and "_lora" in key
    ):  # diffusers before 0.22, and XLabs: …processor.to_q_lora.down.weight
        stem, _, end = key.rpartition("_lora")
        number, _, half = end.partition(".")
        part = {"down.weight": "A", "up.weight": "B", "alpha": "alpha"}.get(half)
        return (stem + number, part) if part else None
    for dots in (3, 2, 1):
        stem, *end = key.rsplit(".", dots)
        if len(end) == dots and stem and (part := ENDS.get(".".join(end))):
            return stem, part
    return None


def algorithm(parts: dict[str, Tensor]) -> str:
    """What a layer's tensors are called: LoRA, LoHa, LoKr, DoRA, …; empty where they change nothing."""
    if parts.keys() <= {"A", "B", "alpha"}:
        return "LoRA"
    refused = next((kind for kind, ends in REFUSED.items() if parts.keys() & set(ends.split())), "")
    difference = next((kind for part, kind in DIFFERENCES.items() if part in parts and parts[part].any()), "")
    pairs = {"lokr": "LoKr", "hada": "LoHa", "mid": TUCKER, "A": "LoRA", "B": "LoRA"}
    kind = next((kind for start, kind in pairs.items() if any(part.startswith(start) for part in parts)), "")
    return refused or difference or kind


def paired(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether A (r, in, …) and B (out, r, 1…) are both there, and of one rank."""
    return (
        a is not None
        and b is not None
        and min(a.ndim, b.ndim) > 1
        and 0 < len(a) == b.shape[1] == b[:1].numel()
    )


def pair(
    stem: str, parts: dict[str, Tensor], alpha: float | None, shape: torch.Size
) -> tuple[Tensor, Tensor, float]:
    """A (r, in, …), B (out, r) and the strength alpha / r of the layer, of readable parts, on a weight (out,
    in, …) of this shape.

    alpha: where the header says it; a tensor of the file wins, and where nobody says it strength is 1. Raises
    UserError for parts that are missing, do not fit together or on the weight, or make a pair of too high a
    rank.
    """
    tensors = {
        part: real(f"{stem}.{part}", tensor)
        for part, tensor in parts.items()
        if part not in ("alpha", *DIFFERENCES)
    }
    if "alpha" in parts:
        if parts["alpha"].numel() != 1 or parts["alpha"].is_complex():
            raise UserError(
                f"{cut(stem)} has only one half here, or halves of different ranks, or an alpha that is no "
                f"number"
            )
        alpha = float(parts["alpha"])
        if not abs(alpha) <= 1e6:
            raise UserError(f"{cut(stem)} has an alpha of {alpha:g}")
    kind = algorithm(parts)
    try:
        if kind == "LoKr":
            return _lokr(stem, tensors, alpha, shape)
        if kind == "LoHa":
            return _loha(stem, tensors, alpha, shape)
    except (RuntimeError, KeyError, IndexError):
        raise UserError(f"{cut(stem)} has parts of {kind} that are missing or do not fit together") from None
    a, b = tensors.get("A"), tensors.get("B")
    if "mid" in tensors and a is not None:
        a = _core(stem, a, tensors["mid"])
    if not paired(a, b):
        raise UserError(f"{cut(stem)} has only one half here, or halves of different ranks")
    return a, b.flatten(1), 1.0 if alpha is None else alpha / a.shape[0]


def _core(stem: str, down: Tensor, mid: Tensor) -> Tensor:
    """A of a Tucker form: mid (r, r', k, k) on down (r', in, 1, 1)."""
    if down.ndim < 2 or mid.ndim < 2 or mid.shape[1] != down.shape[0] or down.shape[2:].numel() != 1:
        raise UserError(f"{cut(stem)} has a lora_mid that does not fit its lora_down")
    return torch.einsum("pq...,qi->pi...", mid.double(), down.flatten(1).double()).float()


def _lokr(
    stem: str, parts: dict[str, Tensor], alpha: float | None, shape: torch.Size
) -> tuple[Tensor, Tensor, float]:
    """Of factors (L1 R1) ⊗ (L2 R2) = (L1 ⊗ L2) (R1 ⊗ R2); strength is 1 where both factors are whole
    matrices.
    """
    (left, right), (left2, right2) = (_factor(parts, f"lokr_{w}") for w in ("w1", "w2"))
    dims = [parts[key].shape[0] for key in ("lokr_w2_b", "lokr_w1_b") if key in parts]
    _fits(
        stem,
        "LoKr",
        left.shape[1] * left2.shape[1],
        left.shape[0] * left2.shape[0],
        right.shape[1] * right2.shape[1],
        shape,
    )
    a, b = torch.kron(right, right2), torch.kron(left, left2)
    return a.float().view(-1, *shape[1:]), b.float(), alpha / dims[0] if dims and alpha is not None else 1.0


def _factor(parts: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """A factor as a product, of as low a rank as its shape allows."""
    if name not in parts:
        return parts[f"{name}_a"].double(), parts[f"{name}_b"].flatten(1).double()
    whole = parts[name].double().flatten(1)
    rows, columns = whole.shape
    return (torch.eye(rows).double(), whole) if rows <= columns else (whole, torch.eye(columns).double())


def _loha(
    stem: str, parts: dict[str, Tensor], alpha: float | None, shape: torch.Size
) -> tuple[Tensor, Tensor, float]:
    """Of (B1 A1) ∘ (B2 A2), whose pair's rows are all products of a row of A1 and one of A2."""
    b1, a1, b2, a2 = (parts[f"hada_w{k}_{half}"].double().flatten(1) for k in (1, 2) for half in "ab")
    _fits(stem, "LoHa", a1.shape[0] * a2.shape[0], b1.shape[0], a1.shape[1], shape)
    b, a = torch.einsum("oi,oj->oij", b1, b2).flatten(1), torch.einsum("in,jn->ijn", a1, a2).flatten(0, 1)
    return a.float().view(-1, *shape[1:]), b.float(), alpha / a1.shape[0] if alpha is not None else 1.0


def _fits(stem: str, kind: str, rank: int, rows: int, columns: int, shape: torch.Size) -> None:
    if rank > MOST_RANK:
        raise UserError(
            f"{cut(stem)} is {kind} whose product has rank {rank}; up to {MOST_RANK} it is turned into a pair"
        )
    if not rank or (rows, columns) != (shape[0], shape[1:].numel()):
        raise UserError(
            f"{cut(stem)} is {kind} of another shape, {rows} by {columns} where this network has "
            f"{shape[0]} by {shape[1:].numel()}. Was it trained on another family?"
        )
