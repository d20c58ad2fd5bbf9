"""Images to features: evaluators, each a function of pictures and of the words that say what a control does."""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from configs import UserError
from models.families import FamilyCard, place
from models.tiny.evaluators import Probe
from models.tiny.faces import ATTRIBUTES, claims


class Evaluator(Protocol):
    """What the analyses ask of an evaluator. Images are (B, 3, H, W) in [-1, 1], features (…, d) float64."""

    def features(self, images: Tensor) -> np.ndarray: ...

    def score(self, features: np.ndarray, positive: str, negative: str) -> np.ndarray:
        """How much more it is the positive description than the negative one, (…)."""
        ...

    def rest(self, features: np.ndarray, positive: str, negative: str) -> np.ndarray:
        """The features without the direction between the two descriptions: what should not change."""
        ...


class Clip:
    """A transformers CLIPModel: the embedded one, or any from the Hub."""

    def __init__(self, repo: str, device: str | torch.device = "cpu"):
        try:
            self.model = CLIPModel.from_pretrained(place(repo), dtype=torch.float32).to(device).eval().requires_grad_(False)
            self.tokenizer = AutoTokenizer.from_pretrained(place(repo))
            pixels, _ = CLIPImageProcessor.get_image_processor_dict(place(repo))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load the evaluator {repo}: {str(error).strip().splitlines()[0]}") from None
        self.size_px, self.known = self.model.config.vision_config.image_size, {}
        self.mean, self.std = (torch.tensor(pixels[key], device=device).view(1, 3, 1, 1) for key in ("image_mean", "image_std"))

    @torch.no_grad()
    def features(self, images: Tensor) -> np.ndarray:
        """Unit-length image embeddings (B, d)."""
        return self.embed(images).double().cpu().numpy()

    def embed(self, images: Tensor) -> Tensor:
        """Unit-length image embeddings (B, d) as a tensor that gradients pass."""
        pixels = images.to(self.mean.device) / 2 + 0.5
        if pixels.shape[-1] != self.size_px:
            pixels = F.interpolate(pixels, (self.size_px, self.size_px), mode="bicubic", antialias=True).clamp(0, 1)
        out = self.model.vision_model(pixel_values=(pixels - self.mean) / self.std).pooler_output
        return F.normalize(self.model.visual_projection(out), dim=-1)

    def texts(self, texts: list[str]) -> np.ndarray:
        """Unit-length text embeddings (B, d); a text is embedded once."""
        for text in texts:
            if text not in self.known:
                self.known[text] = self.embed_text(text)
        return np.stack([self.known[text] for text in texts])

    @torch.no_grad()
    def embed_text(self, text: str) -> np.ndarray:
        """The unit-length embedding of a text (d,)."""
        length = self.model.config.text_config.max_position_embeddings
        ids = self.tokenizer([text], padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
        out = self.model.text_model(input_ids=ids.to(self.mean.device)).pooler_output
        return F.normalize(self.model.text_projection(out), dim=-1).double().cpu().numpy()[0]

    def score(self, features: np.ndarray, positive: str, negative: str) -> np.ndarray:
        """Cosine to the positive description minus cosine to the negative one, where there is one."""
        return features @ self.direction(positive, negative)  # all of unit length

    def rest(self, features: np.ndarray, positive: str, negative: str) -> np.ndarray:
        """The embeddings projected off the direction from negative to positive."""
        direction = self.direction(positive, negative)
        direction = direction / np.linalg.norm(direction)
        return features - (features @ direction)[..., None] * direction

    def direction(self, positive: str, negative: str) -> np.ndarray:
        """From the negative to the positive description, (d,); the positive one itself where there is no other."""
        a = self.texts([positive])[0]
        return a - self.texts([negative])[0] if negative else a


class Attributes:
    """The attribute probe of a world whose truth is known."""

    def __init__(self, folder: str, device: str | torch.device = "cpu"):
        if not (Path(place(folder)) / "model.safetensors").is_file():
            raise UserError(f"no attribute probe in {folder}; train it with python train/tiny.py probe")
        self.device, self.probe = device, Probe.load(Path(place(folder))).to(device)

    @torch.no_grad()
    def features(self, images: Tensor) -> np.ndarray:
        """The attributes (B, len(ATTRIBUTES))."""
        return self.probe(images.to(self.device)).double().cpu().numpy()

    def score(self, features: np.ndarray, positive: str, negative: str) -> np.ndarray:
        """Where the picture stands between what the two descriptions claim: 0 at the negative, 1 at the positive one."""
        direction, origin = self._claimed(positive, negative)
        return (features - origin) @ direction / (direction @ direction)

    def rest(self, features: np.ndarray, positive: str, negative: str) -> np.ndarray:
        """The attributes that the two descriptions do not tell apart."""
        direction, _ = self._claimed(positive, negative)
        return features[..., direction == 0]

    def _claimed(self, positive: str, negative: str) -> tuple[np.ndarray, np.ndarray]:
        more, less = claims(positive), claims(negative)
        direction = np.array([more.get(a, 0.0) - less.get(a, 0.0) for a in ATTRIBUTES])
        if not direction.any():
            raise UserError(f"the attribute probe sees no difference between {positive!r} and {negative!r}")
        return direction, np.array([less.get(a, 0.0) for a in ATTRIBUTES])


def evaluators(card: FamilyCard, device: str | torch.device = "cpu") -> dict[str, Evaluator]:
    """The evaluators that a family's card names; the first is the primary one."""
    found: dict[str, Evaluator] = {"clip": Clip(card.clip, device)}
    if card.probe:
        found["probe"] = Attributes(card.probe, device)
    return found
