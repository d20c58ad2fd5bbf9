"""The embedded evaluators: a small CLIP and the attribute probe, trained on the world's own portraits."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from configs import replacing
from models.tiny import world
from models.tiny.evaluators import Probe
from models.tiny.faces import ATTRIBUTES, claims
from models.tiny.networks import new_clip, tokens
from train.tiny_base import claimed
from train.tiny_parts import Config, Fit


def clip(cfg: Config) -> None:
    """The evaluator CLIP, on portraits of all styles and their captions; shares no weight with the generator.

    First each tower learns to say what it sees or reads (attributes, claims), then the two learn to agree;
    half of the batches are made of groups of four siblings, or the loss could be met without looking at a
    mouth.
    """
    torch.manual_seed(cfg.seed + 1)
    steps, size = cfg.steps or 1500, cfg.batch_size or 96
    words = CLIPTokenizer.from_pretrained(Path(cfg.weights) / "base/tokenizer")
    words.save_pretrained(Path(cfg.weights) / "clip")
    net = new_clip(words)
    people = world.siblings(cfg.faces, cfg.seed, styled=0.15)
    images = world.pictures(people)
    ids = torch.stack([tokens(words, world.captions(people, seed, keep=0.7)) for seed in range(3)], 1)
    texts = claimed(map(claims, world.captions(people, 0, keep=0.7)))
    look(cfg, net, images, world.truth(people), ids[:, 0], texts)
    fit = Fit(cfg, "clip", net, steps, 5e-4, decay=0.05)
    for generator in fit.steps(5):
        groups = torch.randint(len(images) // 4, (size // 4, 1), generator=generator)
        anyone = torch.randint(len(images), (size,), generator=generator)
        rows = (4 * groups + torch.arange(4)).flatten() if fit.step % 2 else anyone
        which = torch.randint(3, (size,), generator=generator)
        pictures = world.to_unit(images[rows])
        fit.learn(net(input_ids=ids[rows, which], pixel_values=pictures, return_loss=True).loss)
    net.half().save_pretrained(Path(cfg.weights) / "clip")
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"shortest_edge": 64}}
    with replacing(Path(cfg.weights) / "clip/preprocessor_config.json") as new:
        new.write_text(json.dumps(settings) + "\n")


def look(
    cfg: Config, net: CLIPModel, images, truth, ids, texts: Tensor, steps: int = 3000, size: int = 64
) -> None:
    """Trains CLIP's towers apart: pictures to attributes, captions to claims, by squared error."""
    heads = nn.ModuleList([nn.Linear(96, len(ATTRIBUTES)), nn.Linear(96, 2 * len(ATTRIBUTES))])
    both = nn.ModuleList([net, heads])
    fit = Fit(cfg, "look", both, steps, 1e-3, beta=0.99, decay=0.01)
    for generator in fit.steps(8):
        rows = torch.randint(len(images), (size,), generator=generator)
        seen = heads[0](net.vision_model(pixel_values=world.to_unit(images[rows])).pooler_output)
        read = heads[1](net.text_model(input_ids=ids[rows]).pooler_output)
        see, tell = F.mse_loss(seen, truth[rows]), F.mse_loss(read, texts[rows])
        fit.learn(see + tell, see=see, read=tell)


def probe(cfg: Config) -> None:
    """The attribute probe: squared error on portraits of all styles, with small noise and colour shifts."""
    torch.manual_seed(cfg.seed + 2)
    steps, size = cfg.steps or 1500, cfg.batch_size or 64
    net = Probe()
    people = world.faces(cfg.faces, cfg.seed, styled=0.15)
    images, truth = world.pictures(people), world.truth(people)
    fit = Fit(cfg, "probe", net, steps, 2e-3, decay=0.01)
    for generator in fit.steps(6):
        rows = torch.randint(len(images), (size,), generator=generator)
        x = world.to_unit(images[rows])
        x = x + 0.05 * torch.randn(x.shape, generator=generator)
        x = x + 0.05 * torch.randn((size, 3, 1, 1), generator=generator)
        fit.learn(F.mse_loss(net(x), truth[rows]))
    net.save(Path(cfg.weights) / "probe")
