"""Ranges: what a number may be, by the name of its key, in every config and card alike.

A number that is not finite is never one.
"""

import dataclasses
import math
from typing import Any

from configs.errors import UserError, cut, quoted

# key: (least, most). A key of a config or card that holds numbers and does not stand here fails a test.
RANGES = {
    "gradient_accumulation_steps": (1, 1e4),
    "batch_size": (0, 1e5),
    "baselines": (1, 1e4),
    "captions": (0, 1e6),
    "at": (0, 1e4),
    "ahead": (1, 1e4),
    "compared": (0, 1e4),
    "judged": (0, 1e4),
    "adapt_judged": (1, 1e4),
    "adapt_precision": (0, 1e3),
    "runs": (1, 1e6),
    "curve_prompts": (1, 1e6),
    "max_prompts": (1, 1e6),
    "denoise_steps": (1, 1000),
    "directions": (1, 1e4),
    "draws": (1, 1e6),
    "every": (1, 1e9),
    "faces": (1, 1e7),
    "grid": (1, 256),
    "groups": (1, 1e4),
    "images": (1, 1e6),
    "kept": (2, 1e6),
    "neighbours": (1, 1e4),
    "pairs": (1, 1e6),
    "port": (1, 65535),
    "prior_images": (1, 1e6),
    "prompts": (1, 1e6),
    "rank": (0, 4096),
    "repeats": (1, 1e4),
    "rounds": (1, 1e4),
    "sample_every": (0, 1e9),
    "sample_seeds": (0, 2**63 - 1),
    "save_every": (1, 1e9),
    "seed": (0, 2**63 - 1),
    "seeds": (1, 1e5),
    "shown": (0, 1e4),
    "size_px": (8, 2**14),
    "sizes_px": (8, 2**14),
    "spread_grid": (1, 256),
    "steps": (0, 1e8),
    "stitch_seeds": (0, 1e5),
    "text_length": (1, 1e5),
    "threads": (0, 4096),
    "trained_px": (0, 2**14),
    "trajectories": (1, 1e6),
    "lr_warmup_steps": (0, 1e8),
    "watch_every": (1, 1e9),
    "watch_prompts": (1, 1e4),
    "base_steps": (0, 1000),
    "batches": (1, 1e5),
    "student_batch": (1, 1e5),
    "student_steps": (6, 1e6),
    "train_batches": (1, 1e5),
    "alpha": (-1e6, 1e6),
    "bands": (0, 1000),
    "below": (0, 1e6),
    "denoise_guidance": (0, 1e3),
    "precision": (0, 1e3),
    "ema": (0, 1),
    "eta": (0, 1),
    "guidance": (0, 1e3),
    "gpu_gb": (0, 1e5),
    "teacher_guidance": (0, 1e3),
    "above": (0, 1e6),
    "guidance_embedding": (-1, 1e4),
    "lora_scales": (-1e4, 1e4),
    "prior": (0, 1e6),
    "priors": (0, 1e6),
    "learning_rate": (0, 1e3),
    "sample_scales": (-1e4, 1e4),
    "scale": (-1e4, 1e4),
    "scales": (-1e4, 1e4),
    "guidance_scale": (-1e4, 1e4),
    "lora_scale": (-1e4, 1e4),
    "threshold": (-1e3, 1e3),
    "timesteps": (0, 1000),
    "tolerance": (0, 1e3),
    "weights": (-1e4, 1e4),
    "minutes": (0, 1e4),
}
GUIDED = ("guidance", "denoise_guidance", "teacher_guidance")
TWO_MEANINGS = (
    "guidance 0 means conditional only in pipelines and unconditional in formulas; write 1 (or "
    "null) for conditional only"
)
LONGEST = 10_000  # characters of a text
FULL = (
    "bands",
    "direction_scales",
    "lora_scales",
    "sample_scales",
    "sample_seeds",
)  # lists that may not be empty


def check(config: Any, where: str = "") -> None:
    """Raises UserError for the first number of a dataclass that its key may not hold, and for texts that are
    none; also inside lists.
    """
    for field in dataclasses.fields(config):
        _check(getattr(config, field.name), field.name, f"{where}{field.name}")


def _check(value: Any, key: str, where: str) -> None:
    if dataclasses.is_dataclass(value):
        check(value, f"{where}.")
    elif isinstance(value, dict):
        for name, inner in value.items():
            _check(inner, key, f"{where}.{name}")
    elif isinstance(value, (list, tuple)):
        if not value and key in FULL:
            raise UserError(f"{where} must hold at least one value")
        for inner in value:
            _check(inner, key, where)
    elif isinstance(value, str):
        checked(value, where)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        _check_number(value, key, where)


def _check_number(value: float, key: str, where: str) -> None:
    if key in GUIDED and value == 0:
        raise UserError(f"{where}: {TWO_MEANINGS}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} must be finite; got {value}")
    least, most = RANGES.get(key, (-math.inf, math.inf))
    if not least <= value <= most:
        bound = f"at least {least:g}" if value < least else f"at most {most:g}"
        raise UserError(f"{where} must be {bound}; got {cut(value, 40)}")


def checked(text: str, where: str) -> str:
    """The text, where it can be encoded.

    Raises UserError for one with NUL or half characters in it, or longer than a book's page.
    """
    if len(text) > LONGEST:
        raise UserError(
            f"{where}: a text of {len(text):,} characters, {quoted(text, 30)}; at most {LONGEST:,} are read"
        )
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f"{where}: {quoted(text, 40)} holds a character that is none (NUL, or half of one)")
    return text
