"""Batches: work on many images, as many at once as memory holds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from configs import UserError

PIXELS = (
    2**20
)  # that a VAE works on at once: one image at 1024 px, which takes 3.6 GB in fp32, and each further one 3.2
DRAWN = 2**22  # that are drawn at once unless the user says otherwise: 4 images at 1024 px
MOST = 48  # images drawn at once all the same
TOKENS = 4096  # that a text encoder reads at once: a language model gives 300 KB of logits for each

T = TypeVar("T")


@dataclass
class Batches:
    """How many images go at once; half as many from where memory did not suffice."""

    size: int

    @classmethod
    def drawn(cls, asked: int, size_px: int) -> "Batches":
        """Of images of a side: as many as asked for, or as many as usual where that is 0."""
        return cls(asked or max(1, min(MOST, DRAWN // size_px**2)))

    @classmethod
    def decoded(cls, size_px: int) -> "Batches":
        """What a VAE takes at once."""
        return cls(max(1, min(64, PIXELS // size_px**2)))

    @classmethod
    def encoded(cls, length: int) -> "Batches":
        """What a text encoder reads at once, of texts of so many tokens."""
        return cls(max(1, TOKENS // length))

    def of(self, work: Callable[[Tensor], T], count: int) -> list[T]:
        """What `work(rows)` gives for rows 0 … count - 1, batch by batch; one that memory does not hold is
        done again by halves.

        work: must leave nothing behind when it fails. Raises UserError where memory does not hold a single
        image.
        """
        found, done = [], 0
        while done < count:
            rows = torch.arange(done, min(done + self.size, count))
            try:
                found.append(work(rows))
            except Exception as error:  # torch says it in several ways, which accelerate knows
                if not should_reduce_batch_size(error):
                    raise
                if len(rows) == 1:
                    raise UserError(
                        "not enough memory for a single image; try dtype=bf16, memory.offload=true, "
                        "memory.tiling=true, "
                        "or a device with more memory"
                    ) from None
                self.size = len(rows) // 2
                clear_device_cache(garbage_collection=True)
                print(f"out of memory: on with {self.size} at once", flush=True)
            else:
                done += len(rows)
        return found
