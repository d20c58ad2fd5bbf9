"""The embedded family's evaluators: a small CLIP and an attribute probe, trained on the world, apart from the
generator.
"""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs import replacing
from models.tiny.faces import ATTRIBUTES


class Probe(nn.Module):
    """A convolutional regressor from a portrait to its attributes."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.width = width
        sizes = (3, width, 2 * width, 3 * width, 4 * width)
        blocks = []
        for inside, outside in zip(sizes[:-1], sizes[1:], strict=True):
            blocks += [nn.Conv2d(inside, outside, 4, 2, 1), nn.GroupNorm(8, outside), nn.ReLU()]
        self.trunk = nn.Sequential(*blocks, nn.Conv2d(4 * width, 4 * width, 4), nn.Flatten(), nn.ReLU())
        self.head = nn.Linear(4 * width, len(ATTRIBUTES))

    def features(self, images: Tensor) -> Tensor:
        """What the picture shows, (B, 4 width), from images (B, 3, 64, 64) in [-1, 1]."""
        return self.trunk(images)

    def forward(self, images: Tensor) -> Tensor:
        """The attributes, (B, len(ATTRIBUTES)), on the scales of faces.attributes."""
        return self.head(self.features(images))

    def save(self, folder: Path) -> None:
        """Writes config.json and model.safetensors, fp16."""
        with replacing(Path(folder) / "model.safetensors") as new:
            save_file({k: v.half().contiguous() for k, v in self.state_dict().items()}, new, {"format": "pt"})
        with replacing(Path(folder) / "config.json") as new:
            new.write_text(json.dumps({"width": self.width}) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Probe":
        """The saved probe, in fp32, ready to evaluate."""
        probe = cls(**json.loads((Path(folder) / "config.json").read_text()))
        probe.load_state_dict(
            {k: v.float() for k, v in load_file(Path(folder) / "model.safetensors").items()}
        )
        return probe.eval().requires_grad_(False)


def column(name: str) -> int:
    """Where an attribute stands in the probe's output."""
    return ATTRIBUTES.index(name)
