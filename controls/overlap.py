"""What two controls have in common in weights, and with what distillation changed.

A control is ΔW = alpha / rank · B A. A and B alone mean nothing (any invertible r x r matrix can pass between
them), so each layer is turned into its thin singular form by two QRs and an r x r core (Hu et al. 2021, sec.
7.2 compare subspaces that way).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from controls.layers import named_layers
from controls.lora import Control
from models.quantized import weights

SHARES = ("in", "out", "chance_in", "chance_out")  # of directions; chance: what random ones would share


@dataclass(frozen=True)
class Low:
    """A layer's ΔW = u diag(s) vᵀ; kernels of convolutions are flattened with the inputs."""

    u: Tensor  # (out, r), orthonormal
    s: Tensor  # (r,), positive
    v: Tensor  # (in, r), orthonormal


def factors(control: Control) -> dict[str, Low]:
    """Every layer's ΔW at scale 1 in its singular form, float64; directions that do nothing are left out."""
    found = {}
    for name in control.layers:
        a, b = (half.double().flatten(1) for half in control.pair(name))
        (left, top), (right, side) = torch.linalg.qr(b), torch.linalg.qr(a.mT)
        u, s, vh = torch.linalg.svd(control.factor() * top @ side.mT)
        acts = s > 1e-9 * s[0].clamp(min=1e-300)
        found[name] = Low(left @ u[:, acts], s[acts], right @ vh.mT[:, acts])
    return found


def norm(control: dict[str, Low]) -> float:
    """|ΔW|, Frobenius, over all layers."""
    return float(sum((layer.s**2).sum() for layer in control.values()) ** 0.5)


def cosine(a: dict[str, Low], b: dict[str, Low]) -> float:
    """The cosine of two controls' ΔW as vectors over all layers; a layer that one of them lacks is 0 there.

    0 where one does nothing.
    """
    inner = sum(
        float(((a[n].u.mT @ b[n].u) * (a[n].v.mT @ b[n].v) * a[n].s[:, None] * b[n].s).sum())
        for n in a.keys() & b.keys()
    )
    size = norm(a) * norm(b)
    return inner / size if size else 0.0


def subspaces(a: dict[str, Low], b: dict[str, Low]) -> dict | None:
    """How much of the directions that two controls read (in) and write (out) is shared, averaged over the
    layers that both have.

    Per layer |U_aᵀ U_b|² / min(i, j) with i, j directions: 1 when one space holds the other; chance is max(i,
    j) / d. None without a common layer.
    """
    shared = [n for n in sorted(a.keys() & b.keys()) if len(a[n].s) and len(b[n].s)]
    if not shared:
        return None

    rows = torch.tensor([_subspaces(a[n], b[n]) for n in shared], dtype=torch.float64)
    means = rows.clamp(max=1).mean(0).tolist()
    return {"layers": len(shared), **dict(zip(SHARES, means, strict=True))}


def _subspaces(a: Low, b: Low) -> tuple[float, float, float, float]:
    fewer, more = sorted((len(a.s), len(b.s)))
    return _shared(a.v, b.v) / fewer, _shared(a.u, b.u) / fewer, more / len(a.v), more / len(a.u)


def delta(base: nn.Module, student: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """W_student - W_base of these layers, (out, in) each, fp32 on the CPU."""
    ours, theirs = named_layers(base), named_layers(student)
    return {
        name: (theirs[name].weight.detach().cpu().float() - ours[name].weight.detach().cpu().float()).flatten(
            1
        )
        for name in names
    }


def change(base: nn.Module, student: nn.Module, block: str) -> float:
    """|W_student - W_base| / |W_base| over all weights of a block that both have."""
    ours, theirs = (dict(weights(net.get_submodule(block))) for net in (base, student))
    pairs = [(ours[name].cpu().float(), theirs[name].cpu().float()) for name in ours.keys() & theirs.keys()]
    apart, size = (
        sum(float((d**2).sum()) for d in values)
        for values in ([b - a for a, b in pairs], [a for a, _ in pairs])
    )
    return (apart / size) ** 0.5


def against_delta(control: dict[str, Low], changed: dict[str, Tensor]) -> dict:
    """A control beside what distillation changed in the same layers: cosine, relative size, and shares of the
    change's energy.

    `in` and `out` are the shares of |delta|² that lie in the directions the control reads and writes,
    `chance_in` and `chance_out` what as many random directions would hold (r / d, weighted by energy). Raises
    KeyError for a layer that was not compared.
    """
    sums = torch.zeros(6, dtype=torch.float64)
    for name, layer in control.items():
        d = changed[name].double()
        read, written, energy = d @ layer.v, layer.u.mT @ d, float((d**2).sum())
        inner = float(((written @ layer.v) * torch.diag(layer.s)).sum())
        r = len(layer.s)
        sums += torch.tensor(
            [
                inner,
                energy,
                float((read**2).sum()),
                float((written**2).sum()),
                energy * min(1.0, r / d.shape[1]),
                energy * min(1.0, r / d.shape[0]),
            ],
            dtype=torch.float64,
        )
    inner, energy, *shares = sums.tolist()
    if not energy:
        return {"cosine": 0.0, "size": None, **dict.fromkeys(SHARES)}
    size = norm(control)
    return {
        "cosine": inner / (size * energy**0.5) if size else 0.0,
        "size": size / energy**0.5,
        **{name: share / energy for name, share in zip(SHARES, shares, strict=True)},
    }


def _shared(a: Tensor, b: Tensor) -> float:
    return float(((a.mT @ b) ** 2).sum())
