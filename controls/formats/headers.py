"""Headers: what a file says of its strength, its kind and its base model beside its tensors."""

import json
import re
from collections.abc import Callable

from configs import UserError, cut
from controls.formats.files import BESIDE

# where diffusers keeps PEFT's settings in a header, its LORA_ADAPTER_METADATA_KEY
DIFFUSERS = "lora_adapter_metadata"
PARTS = ("unet.", "transformer.")  # what diffusers puts before the settings of a network
# what trainers call a family's base, in kohya's ss_base_model_version or in modelspec.architecture
BASES = {
    "sd15": r"sd_?v?1|ss_v1|stable-diffusion-v1",
    "sd21": r"sd_?v?2|ss_v2|stable-diffusion-v2",
    "sdxl": r"sdxl|sd_?xl|stable-diffusion-xl",
    "sd3": r"sd_?v?3|stable-diffusion-v?3",
    "klein9": r".*klein.*9b",
    "klein": r".*klein",
    "flux": r"flux(?!.?2)",
    "krea2": r"krea",
    "qwen21": r"qwen.?image.?2.?1",
    "qwen": r"qwen",
    "pixart": r"pixart",
    "zimage": r"z_?-?image",
}
CHANGED = (
    "pissa",
    "olora",
    "corda",
    "loftq",
)  # initialisations after which the pair fits changed weights of the base, not its own
PLAIN = re.compile(r"\^?[\w.\-]+\Z")


def mapping(text: str) -> dict:
    """A JSON object. Raises ValueError for anything else, and for one that nests too deeply to be read."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"it is no mapping but {cut(text, 20)}")
    return found


def settings(metadata: dict[str, str]) -> dict:
    """PEFT's settings (r, lora_alpha, …) from diffusers' header or from adapter_config.json; none where the
    file has neither.

    Raises UserError where they cannot be read, as strength is then unknown, and for an adapter that is no
    plain LoRA, by its name.
    """
    where = next((key for key in (DIFFUSERS, BESIDE) if key in metadata), None)
    if where is None:
        return {}
    what = f"the header's {DIFFUSERS}" if where == DIFFUSERS else BESIDE
    try:
        found = mapping(metadata[where])
        if where == DIFFUSERS:
            prefix = next((part for part in PARTS if f"{part}r" in found), None)
            found = (
                {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
                if prefix
                else {}
            )
        kind = str(found.get("peft_type") or "LORA").upper()
        if found and "lora_alpha" not in found and kind == "LORA":
            raise ValueError("it has no lora_alpha")
    except ValueError as error:
        raise UserError(f"{what} cannot be read, and with it the alpha of this file: {cut(error)}") from None
    start = str(found.get("init_lora_weights", "")).lower()
    if kind != "LORA":
        raise UserError(
            f"{what} says that this is no LoRA but {cut(NAMES.get(kind, kind), 20)}, which is not read"
        )
    if found.get("use_dora"):
        raise UserError(
            f"{what} says use_dora: a DoRA rescales whole weights, which no low-rank pair does, and is not "
            f"read"
        )
    if start.startswith(CHANGED):
        raise UserError(
            f"{what} says init_lora_weights={cut(start, 20)}: the pair fits changed weights of the base, "
            f"and is not read"
        )
    return found


NAMES = {"LOHA": "LoHa", "LOKR": "LoKr", "ADALORA": "AdaLoRA"}


def alphas(said: dict, ranks: dict[str, int]) -> dict[str, float]:
    """Alpha by a layer's own name, as PEFT's settings say it for layers of these ranks.

    Raises UserError where they are not readable.

    Under rsLoRA (Kalajdzievski 2023) strength is alpha / sqrt(rank), which is an alpha greater by sqrt(rank).
    """
    if not said:
        return {}
    try:
        usual, special = number(said["lora_alpha"]), by_pattern(said.get("alpha_pattern") or {})
        power = 0.5 if said.get("use_rslora") else 0
        return {layer: special(layer, usual) * ranks[layer] ** power for layer in ranks}
    except (ValueError, TypeError, AttributeError) as error:
        wrong = "its settings of PEFT cannot be read, and with them the alpha of this file"
        raise UserError(f"{wrong}: {cut(error)}") from None


def number(value: object) -> float:
    """An alpha. Raises ValueError for what is no number, not finite, or out of all reason."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 1e6:
        raise ValueError(f"alpha is {cut(value, 20)}")
    return float(value)


def by_pattern(patterns: dict) -> Callable[[str, float], float]:
    """PEFT's rule: the first pattern that is the layer's name or the end of it after a dot; with ^, the whole
    of it.

    Patterns are looked up and not tried one by one, as files have one per layer. Raises ValueError for those
    that are no plain names.
    """
    odd = next((pattern for pattern in patterns if not PLAIN.match(pattern)), None)
    if odd is not None:
        raise ValueError(f"alpha_pattern has {cut(odd, 40)}, which is no layer's name")
    order = {pattern: (k, number(value)) for k, (pattern, value) in enumerate(patterns.items())}

    def alpha(layer: str, usual: float) -> float:
        parts = layer.split(".")
        ends = [f"^{layer}", *(".".join(parts[k:]) for k in range(len(parts)))]
        return min((order[end] for end in ends if end in order), default=(0, usual))[1]

    return alpha


def base(metadata: dict[str, str]) -> tuple[str, str]:
    """What the header says of the base model, as it says it, and the family that this means; empty where it
    says or means nothing.
    """
    said = next(
        (metadata[key] for key in ("ss_base_model_version", "modelspec.architecture") if metadata.get(key)),
        "",
    )
    said = said or ("ss_v2" if metadata.get("ss_v2") == "True" else "")
    family = next(
        (name for name, words in BASES.items() if re.match(words, said.lower()) or name == said), ""
    )
    return cut(said, 60), family


def another_base(metadata: dict[str, str], family: str) -> str:
    """What the header calls a base model that is not the family's; empty where it says nothing of it, or of a
    family that is not known.
    """
    said, meant = base(metadata)
    return said if meant and family in BASES and meant != family else ""
