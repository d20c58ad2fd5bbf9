"""Evaluators: images to features, and features to how much they show what words say."""

import json
from collections.abc import Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from configs import UserError, note
from models.cards import FamilyCard
from models.hashing import content
from models.loading import available, file_of, one_line, place
from models.tiny.evaluators import Probe
from models.tiny.faces import ATTRIBUTES, claims
from models.tiny.geometry import Geometry
from models.tokens import Reader, alike, cuts

SAME = 1e-6  # between embeddings of unit length: rounding


class Evaluator(Protocol):
    """What the analyses ask of an evaluator. Images are (B, 3, H, W) in [-1, 1], features (…, d) float64."""

    identity: str  # what its features depend on, besides its class

    def features(self, images: Tensor) -> np.ndarray: ...

    def direction(self, positive: str, negative: str) -> np.ndarray:
        """From the negative to the positive description, (d,).

        Raises UserError where it cannot tell them apart, or reads no words.
        """
        ...

    def score(self, features: np.ndarray, positive: str, negative: str) -> np.ndarray:
        """How much more it is the positive description than the negative one, (…)."""
        ...

    def rest(self, features: np.ndarray, positive: str, negative: str) -> np.ndarray:
        """The features without the direction between the two descriptions: what should not change."""
        ...


class Picture:
    """A vision model of transformers: pictures to unit-length embeddings. It reads no words.

    Its parts are loaded when they are first asked for; each raises UserError in one line when it cannot be
    loaded.
    """

    kind = "AutoModel"

    def __init__(self, repo: str, device: str | torch.device = "cpu"):
        """repo: a folder or a Hub id, with @revision where it is pinned."""
        self.repo, _, revision = repo.partition("@")
        self.revision = revision or None
        self.device, self.identity = device, content(self.repo, self.revision, "", "")
        self.known: dict[str, np.ndarray] = {}  # texts that were embedded

    @cached_property
    def model(self) -> Any:
        """The network, frozen, in fp32."""
        return self._part(self.kind, dtype=torch.float32).to(self.device).eval().requires_grad_(False)

    @cached_property
    def tokenizer(self) -> Any:
        """What makes tokens of texts."""
        return self._part("AutoTokenizer")

    @cached_property
    def pixels(self) -> dict:
        """How the model was trained to see pictures."""
        with one_line(f"the evaluator {self.repo}"):
            return json.loads(file_of(self.repo, self.revision, "preprocessor_config.json").read_text())

    def _part(self, name: str, **options) -> Any:
        # seconds, which a command that finds everything seen already need not wait
        from transformers import logging

        logging.disable_progress_bar()
        with one_line(f"the evaluator {self.repo}"):
            kind = getattr(import_module("transformers"), name)
            revision = available(self.repo, self.revision)
            return kind.from_pretrained(place(self.repo), revision=revision, **options)

    @property
    def resize_px(self) -> int:
        """Side of a picture before it is cropped."""
        return _side(self.pixels["size"])

    @property
    def size_px(self) -> int:
        """Side of a picture as the model sees it."""
        if self.pixels.get("crop_size") and self.pixels.get("do_center_crop"):
            return _side(self.pixels["crop_size"])
        return self.resize_px

    @cached_property
    def mean(self) -> Tensor:
        """Of the pixels, per colour."""
        return self._per_colour("image_mean")

    @cached_property
    def std(self) -> Tensor:
        """Of the pixels, per colour."""
        return self._per_colour("image_std")

    def _per_colour(self, name: str) -> Tensor:
        return torch.tensor(self.pixels[name], device=self.device).view(1, 3, 1, 1)

    @torch.no_grad()
    def features(self, images: Tensor) -> np.ndarray:
        """Unit-length image embeddings (B, d). Raises UserError for what is not finite."""
        return finite(self.embed(images), type(self).__name__.lower(), images)

    def embed(self, images: Tensor) -> Tensor:
        """Unit-length image embeddings (B, d) as a tensor that gradients pass."""
        return F.normalize(self.see(self.prepare(images)), dim=-1)

    def see(self, pixels: Tensor) -> Tensor:
        """The model's own summary of prepared pixels."""
        return self.model(pixel_values=pixels).pooler_output

    def prepare(self, images: Tensor) -> Tensor:
        """Square images in [-1, 1] as the model was trained to see them."""
        pixels, outer, inner = images.to(self.device) / 2 + 0.5, self.resize_px, self.size_px
        if pixels.shape[-1] != outer:
            pixels = resized(pixels, outer)
        edge = (outer - inner) // 2
        return (pixels[..., edge : edge + inner, edge : edge + inner] - self.mean) / self.std

    def direction(self, positive: str, negative: str) -> np.ndarray:
        raise UserError(
            f"{type(self).__name__.lower()} sees pictures but reads no words; measure along a control's "
            f"own direction"
        )

    def score(self, features: np.ndarray, positive: str, negative: str) -> np.ndarray:
        """Cosine to the positive description minus cosine to the negative one, where there is one."""
        return features @ self.direction(positive, negative)  # all of unit length

    def rest(self, features: np.ndarray, positive: str, negative: str) -> np.ndarray:
        """All of it: no direction is known."""
        return features


def resized(pixels: Tensor, size_px: int) -> Tensor:
    """Square pictures in [0, 1], (B, 3, H, H), at another size."""
    return F.interpolate(pixels, (size_px, size_px), mode="bicubic", antialias=True).clamp(0, 1)


def _side(size: int | dict) -> int:
    """The side of a picture in a preprocessor's config, which older ones write as a plain number."""
    return size if isinstance(size, int) else size.get("shortest_edge") or size["height"]


class Dino(Picture):
    """DINOv2 (Oquab et al. 2023): the class token."""


class Clip(Picture):
    """A transformers CLIPModel: the embedded one, or any from the Hub."""

    kind = "CLIPModel"

    def see(self, pixels: Tensor) -> Tensor:
        return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)

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
        for line in cuts([Reader(self.tokenizer, length)], [text]):
            note(f"the evaluator {self.repo}: {line}")
        ids = self.tokenizer(
            [text], padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        embedding = F.normalize(self.read(ids.to(self.device)), dim=-1)[0]
        return finite(embedding, type(self).__name__.lower())

    def read(self, ids: Tensor) -> Tensor:
        return self.model.text_projection(self.model.text_model(input_ids=ids).pooler_output)

    def rest(self, features: np.ndarray, positive: str, negative: str) -> np.ndarray:
        """The embeddings projected off the direction from negative to positive."""
        direction = self.direction(positive, negative)
        direction = direction / np.linalg.norm(direction)
        return features - (features @ direction)[..., None] * direction

    def direction(self, positive: str, negative: str) -> np.ndarray:
        """From the negative to the positive description, (d,); the positive one itself where there is no
        other.

        Raises UserError for two that it cannot tell apart.
        """
        a = self.texts([positive])[0]
        if not negative:
            return a
        direction = a - self.texts([negative])[0]
        if np.abs(direction).max() < SAME:
            raise alike(positive, negative, f"the evaluator {self.repo}")
        return direction


class Siglip(Clip):
    """A transformers SiglipModel (Zhai et al. 2023), whose towers end in the shared space by themselves."""

    kind = "SiglipModel"

    def see(self, pixels: Tensor) -> Tensor:
        return self.model.vision_model(pixel_values=pixels).pooler_output

    def read(self, ids: Tensor) -> Tensor:
        return self.model.text_model(input_ids=ids).pooler_output


class DreamSim(Picture):
    """DreamSim (Fu et al. 2023), the paper's measure of diversity: its distance is 1 - cosine of these.

    Extra `dreamsim`.
    """

    def __init__(self, kind: str, device: str | torch.device = "cpu"):
        """kind: which of the published models, e.g. ensemble; the package itself fetches the weights."""
        self.model, _ = extra("dreamsim").dreamsim(pretrained=True, device=str(device), dreamsim_type=kind)
        self.device, self.identity = device, kind

    def embed(self, images: Tensor) -> Tensor:
        pixels = resized(images.to(self.device) / 2 + 0.5, 224)
        return F.normalize(self.model.embed(pixels), dim=-1)


class Inception(Picture):
    """The 2048 features of Inception v3 that FID is defined on, by torch-fidelity. Extra `inception`."""

    def __init__(self, kind: str, device: str | torch.device = "cpu"):
        """kind: torch-fidelity's name of the network, inception-v3-compat."""
        package = extra("torch_fidelity.feature_extractor_inceptionv3", "inception")
        net = package.FeatureExtractorInceptionV3(kind, ["2048"])
        self.model, self.device, self.identity = net.to(device).eval(), device, kind

    def embed(self, images: Tensor) -> Tensor:
        """Not of unit length; the network resizes bytes to 299 pixels itself."""
        (features,) = self.model(((images.to(self.device) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
        return features


def extra(package: str, name: str = "") -> Any:
    """An optional package. Raises UserError with how to install it."""
    try:
        return import_module(package)
    except ImportError:
        raise UserError(
            f"this evaluator needs {package.partition('.')[0]}: pip install -e '.[{name or package}]'"
        ) from None


class Attributes:
    """The attribute probe of a world whose truth is known."""

    def __init__(self, folder: str, device: str | torch.device = "cpu"):
        home = Path(place(folder))
        if not (home / "model.safetensors").is_file():
            raise UserError(f"no attribute probe in {folder}; train it with python train/tiny.py probe")
        self.device, self.identity = device, content(folder, None, "", "")
        self.probe = Probe.load(home).to(device)

    @torch.no_grad()
    def features(self, images: Tensor) -> np.ndarray:
        """The attributes (B, len(ATTRIBUTES)). Raises UserError for what is not finite."""
        return finite(self.probe(images.to(self.device)), "the attribute probe", images)

    def score(self, features: np.ndarray, positive: str, negative: str) -> np.ndarray:
        """Where the picture stands between what the two descriptions claim: 0 at the negative, 1 at the
        positive one.
        """
        direction, less = self.direction(positive, negative), claims(negative)
        origin = np.array([less.get(a, 0.0) for a in ATTRIBUTES])
        return (features - origin) @ direction / (direction @ direction)

    def rest(self, features: np.ndarray, positive: str, negative: str) -> np.ndarray:
        """The attributes that the two descriptions do not tell apart."""
        return features[..., self.direction(positive, negative) == 0]

    def direction(self, positive: str, negative: str) -> np.ndarray:
        """From what the negative description claims to what the positive one does, (d,)."""
        more, less = claims(positive), claims(negative)
        direction = np.array([more.get(a, 0.0) - less.get(a, 0.0) for a in ATTRIBUTES])
        if not direction.any():
            raise UserError(f"the attribute probe sees no difference between {positive!r} and {negative!r}")
        return direction


def finite(features: Tensor, evaluator_name: str, images: Tensor | None = None) -> np.ndarray:
    """The features of images, or of a text, as float64.

    Raises UserError, which names whose fault it is, where they are not finite.
    """
    if not torch.isfinite(features).all():
        if images is not None and not torch.isfinite(images).all():
            raise UserError(
                "the pictures are not finite: a smaller scale, or dtype=fp32, may do, or weights are damaged"
            )
        raise UserError(f"{evaluator_name} gives numbers that are not finite: its weights are damaged")
    return features.double().cpu().numpy()


EVALUATORS = {
    "clip": Clip,
    "siglip": Siglip,
    "probe": Attributes,
    "geometry": Geometry,
    "dino": Dino,
    "dreamsim": DreamSim,
    "inception": Inception,
}
UNIT = ("clip", "siglip", "dino", "dreamsim")  # of unit length: their features' distance is 1 - cosine
# those that can say how much a picture is what words describe
READERS = ("clip", "siglip", "probe", "geometry")
JUDGES = 2  # of a card's that decide what is lost, and how strongly it is taught again: the first
# parameters, and bytes that their packages fetch, about
PACKAGED = {"dreamsim": (258e6, 1.3e9), "inception": (23.9e6, 95.6e6)}


def chosen(card: FamilyCard, names: Sequence[str] = ()) -> list[str]:
    """The names of a card's evaluators, or of all of them that read words.

    Raises UserError for one that the card has nothing for.
    """
    there = [name for name in EVALUATORS if getattr(card, name)]
    for name in names:
        if name not in there:
            raise UserError(
                f"the card of family {card.name} has no evaluator {name!r}; it has {', '.join(there)}"
            )
    return list(dict.fromkeys(names or [name for name in there if name in READERS]))


def load_evaluators(
    card: FamilyCard, device: str | torch.device = "cpu", names: Sequence[str] = (), load_now: bool = True
) -> dict[str, Evaluator]:
    """A card's evaluators by name, or all of them that read words; the first is the primary one.

    load_now: loaded now, not when first asked. Raises UserError for a name that the card has nothing for, and
    for what cannot be loaded.
    """
    found = {name: EVALUATORS[name](getattr(card, name), device) for name in chosen(card, names)}
    if load_now:
        for evaluator in found.values():
            evaluator.features(torch.zeros(1, 3, 64, 64))
    return found
