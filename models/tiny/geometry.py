"""A third evaluator of the embedded family: measurements made by hand on the pixels of a portrait.

It has no weights and has learned nothing, neither from the program that draws the world nor from networks.
What it takes for granted is what anybody sees in a sheet of these portraits of 64 pixels: in which rows eyes,
mouth and hair are, that lips are redder than skin, what colours are called. How far left or right a face is,
it finds by symmetry.
"""

import hashlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configs import UserError

REACH = 20  # columns on each side of a face's axis that are looked at
ROWS_PX = 64
PLACES = {  # part of a face: its rows from the top and its distances from the axis, both ends included, px
    "eyes": (27, 37, 3, 12),
    "bridge": (30, 34, 0, 1),
    "temples": (30, 33, 12, 14),
    "cheeks": (38, 42, 8, 12),
    "nose": (39, 41, 2, 5),
    "mouth": (42, 52, 0, 9),
    "teeth": (42, 50, 0, 6),
    "chin": (47, 49, 7, 10),
    "fringe": (15, 17, 0, 5),
    "crown": (6, 17, 0, 9),
    "beside": (22, 30, 18, 19),
    "below": (45, 49, 16, 18),
}
HUES = {"yellow": 48, "green": 120, "blue": 218, "purple": 268, "pink": 340}  # degrees
HAIRS = {"black": (35, 30, 30), "brown": (110, 70, 40), "blond": (235, 200, 110), "red": (190, 80, 35)}


class Portrait:
    """Portraits (B, 3, 64, 64) in [-1, 1] as their colours in [0, 1], each moved so that its axis is in the
    middle.
    """

    def __init__(self, images: Tensor):
        self.whole = (images / 2 + 0.5).clamp(0, 1)
        self.axis = axis(self.whole)  # (B,) px from the middle
        self.face = centred(self.whole, self.axis)  # (B, 3, 64, 2 REACH + 1)
        self.skin = self.colour("nose")
        self.hair = torch.where(hat(self)[:, None] > 0.3, self.colour("beside"), self.colour("fringe"))
        self.background = torch.cat(
            [self.whole[..., :40, :4].flatten(2), self.whole[..., :40, -4:].flatten(2)], -1
        ).median(-1)[0]

    def at(self, place: str, values: Tensor | None = None) -> Tensor:
        """The pixels of a part of the face, (B, C, n), left and right together."""
        top, bottom, near, far = PLACES[place]
        values = self.face if values is None else values
        rows = values[..., top : bottom + 1, :]
        left, right = rows[..., REACH - far : REACH - near + 1], rows[..., REACH + near : REACH + far + 1]
        return torch.cat([left.flatten(2), right.flatten(2)], -1)

    def colour(self, place: str) -> Tensor:
        """The median colour of a part of the face, (B, 3)."""
        return self.at(place).median(-1)[0]


def axis(images: Tensor) -> Tensor:
    """Where faces have their axis, (B,) px to the right of the middle: the one of least asymmetry.

    Two columns mirror each other about half the sum of their places, so half pixels need no interpolation.
    """
    columns = images[:, :, 8:56:2].permute(0, 3, 1, 2).flatten(2)  # (B, 64, 72)
    unlike = torch.cdist(columns, columns, 1.0)
    sums = torch.arange(ROWS_PX - 1 - 18, ROWS_PX - 1 + 19)[:, None]  # nine px to either side
    steps = torch.arange(14)
    odd = unlike[:, sums // 2 - steps, (sums + 1) // 2 + steps].mean(-1)  # (B, 37)
    return (sums[odd.argmin(-1), 0] - (ROWS_PX - 1)) / 2


def centred(images: Tensor, shift: Tensor) -> Tensor:
    """The columns around the axis, (B, 3, 64, 2 REACH + 1), between pixels on a line."""
    columns = (ROWS_PX - 1) / 2 + shift[:, None] + torch.arange(-REACH, REACH + 1.0)
    columns = columns.clamp(0, ROWS_PX - 1)
    left = columns.floor().long().clamp(max=ROWS_PX - 2)
    share = (columns - left)[:, None, None]
    left = left[:, None, None].expand(-1, 3, ROWS_PX, -1)
    return images.gather(-1, left) * (1 - share) + images.gather(-1, left + 1) * share


def smile(p: Portrait) -> Tensor:
    """How far a mouth's corners lie above its middle, and whether it shows teeth."""
    rows, far = torch.meshgrid(torch.arange(64.0), torch.arange(-REACH, REACH + 1.0) / 8, indexing="ij")
    lips = p.at("mouth", lips_of(p)[:, None])[:, 0]
    y, u = (p.at("mouth", v[None, None])[:, 0] for v in (rows, far.square()))
    total = lips.sum(1) + 0.5
    dy, du = (v - ((lips * v).sum(1) / total)[:, None] for v in (y, u))
    bend = -(lips * dy * du).sum(1) / ((lips * du.square()).sum(1) + 0.15)  # px at eight px from the axis
    return bend / 5 + 0.5 * (white(p.at("teeth")).sum(1) / 12).clamp(max=1)


def eyes(p: Portrait) -> Tensor:
    """How much white there is in the eyes: the side of its square, over five px."""
    return white(p.at("eyes")).sum(1).sqrt() / 5


def age(p: Portrait) -> Tensor:
    """Wrinkles across the forehead, grey hair, and cheeks that are no longer red."""
    rows = luma(p.face)[:, 23:31, REACH - 3 : REACH + 4]
    wrinkles = (rows[:, 1:-1] - (rows[:, 2:] + rows[:, :-2]) / 2).abs().mean((1, 2)) / (p.skin.mean(1) + 0.2)
    cheeks = p.at("cheeks")
    red = (cheeks[:, 0] - cheeks[:, 1]).mean(1) - (p.skin[:, 0] - p.skin[:, 1])
    grey = (1 - saturation(p.hair) / 0.25).clamp(0, 1) * ((luma(p.hair) - 0.15) / 0.3).clamp(0, 1)
    return 0.3 + 6 * wrinkles.clamp(max=0.12) - 1.2 * red + 0.4 * grey


def glasses(p: Portrait) -> Tensor:
    """How black it is between the eyes, and beside them where temples go."""
    bridge, temples = (darkness(p.at(name)) for name in ("bridge", "temples"))
    return bridge.topk(3)[0].mean(1) + temples.topk(6)[0].mean(1)


def beard(p: Portrait) -> Tensor:
    """How far the colour beside the chin is from that of the skin."""
    return 2 * apart(p.colour("chin"), p.skin)


def hat(p: Portrait) -> Tensor:
    """How much above the forehead is dark and more blue than green."""
    crown = p.at("crown")
    blue, dark = (crown[:, 2] - crown[:, 1] - 0.08) / 0.08, (0.42 - luma(crown)) / 0.08
    return (blue.clamp(0, 1) * dark.clamp(0, 1)).mean(1)


def position(p: Portrait) -> Tensor:
    """How far to the right the axis is, over seven px."""
    return p.axis / 7


def size(p: Portrait) -> Tensor:
    """From the eyes down to the lips: 11 px is far away, 15 px close up."""
    rows = torch.arange(64.0)[:, None].expand(1, 1, 64, 2 * REACH + 1)
    lips = p.at("mouth", lips_of(p)[:, None])[:, 0]
    mouth = (lips * p.at("mouth", rows)[:, 0]).sum(1) / (lips.sum(1) + 1e-3)
    seen = (lips.sum(1) / 3).clamp(0, 1)
    return 0.5 + seen * ((mouth - 32) / 4 - 3.25)


def skin(p: Portrait) -> Tensor:
    """How light the skin is."""
    return (luma(p.skin) - 0.3) / 0.5


def bald(p: Portrait) -> Tensor:
    """How like skin the top of the head is."""
    return alike(p.colour("fringe"), p.skin)


def long_hair(p: Portrait) -> Tensor:
    """How unlike the background it is beside the neck."""
    return 1 - alike(p.colour("below"), p.background)


def curly_hair(p: Portrait) -> Tensor:
    """How unlike the background it is far beside the forehead, and like it beside the neck."""
    return (1 - alike(p.colour("beside"), p.background)) * alike(p.colour("below"), p.background)


def short_hair(p: Portrait) -> Tensor:
    """Hair that is neither: on top and not beside."""
    return (1 - bald(p)) * alike(p.colour("beside"), p.background)


def hair_colour(p: Portrait, name: str) -> Tensor:
    """How like a named colour the hair is: on top, or beside the forehead under a hat."""
    return alike(p.hair, torch.tensor(HAIRS[name]) / 255) * (1 - alike(p.hair, p.skin))


def background(p: Portrait, name: str) -> Tensor:
    """How much the background has the hue of a name; white is to have none."""
    colour = p.background
    if name == "white":
        return (1 - 6 * saturation(colour)).clamp(0, 1) * ((luma(colour) - 0.6) / 0.25).clamp(0, 1)
    away = (hue(colour) - HUES[name] + 180) % 360 - 180
    return (-(away / 22).square()).exp() * (4 * saturation(colour)).clamp(0, 1)


def crayon(p: Portrait) -> Tensor:
    """Strokes: how much pixels at the rim, where a plain picture is smooth, differ from their neighbours."""
    rim = torch.cat([p.whole[:, :, :44, :6], p.whole[:, :, :44, -6:]], 0)
    rough = (rim[:, :, 1:-1] - (rim[:, :, 2:] + rim[:, :, :-2]) / 2).abs().mean((1, 2, 3))
    return 14 * rough.view(2, -1).mean(0)


def watercolour(p: Portrait) -> Tensor:
    """A wash that fades to white in the corners, and no black anywhere."""
    corners = torch.stack([p.whole[..., :5, :5], p.whole[..., :5, -5:]]).amin(2).mean((0, 2, 3))
    edges = torch.stack([p.whole[..., 18:34, :4], p.whole[..., 18:34, -4:]]).amin(2).mean((0, 2, 3))
    black = luma(p.face[..., 16:54, 8:-8]).flatten(1).quantile(0.03, dim=1)
    return (corners - edges).clamp(min=0) * 1.5 + 2 * (black - 0.12)


def pixel(p: Portrait) -> Tensor:
    """Mosaic: how much more neighbours differ across every fourth line than elsewhere."""
    steps = (p.whole[..., 1:] - p.whole[..., :-1]).abs().mean((1, 2))
    every = torch.arange(63) % 4 == 3
    across, within = steps[:, every].mean(1), steps[:, ~every].mean(1)
    return (across - within) / (across + within + 1e-3)


def lips_of(p: Portrait) -> Tensor:
    """How much redder than the skin, and unlike the background, pixels are, (B, 64, 2 REACH + 1)."""
    ours = (p.face - p.background[..., None, None]).abs().amax(1) > 0.12  # a pink background is no mouth
    return (redness(p.face) - redness(p.skin)[:, None, None] - 0.06).clamp(min=0) * ours


def redness(colours: Tensor) -> Tensor:
    """How crimson colours (B, 3, ...) are: red without yellow, as a share of the light."""
    red, green, blue = colours.unbind(1)
    return (red - green - 2 * (green - blue).clamp(min=0)) / (red + green + blue + 0.05)


def white(colours: Tensor) -> Tensor:
    """How white colours (B, 3, ...) are; skin may be as pale, but is never without colour."""
    return ((colours.amin(1) - 0.4) / 0.4).clamp(0, 1) * (1 - saturation(colours) / 0.08).clamp(0, 1)


def luma(colours: Tensor) -> Tensor:
    """Of colours (B, 3, ...) in [0, 1]; ITU-R BT.601."""
    red, green, blue = colours.unbind(1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def darkness(colours: Tensor) -> Tensor:
    """How black colours (B, 3, ...) are: 1 for black, 0 from a luma of 0.35 on."""
    return (1 - luma(colours) / 0.35).clamp(0, 1)


def saturation(colours: Tensor) -> Tensor:
    """Largest minus least of red, green and blue, (B, ...): 0 for a grey."""
    return colours.amax(1) - colours.amin(1)


def hue(colours: Tensor) -> Tensor:
    """Degrees, (B,), of colours (B, 3): 0 red, 120 green, 240 blue."""
    red, green, blue = colours.unbind(1)
    return torch.rad2deg(torch.atan2(3**0.5 * (green - blue), 2 * red - green - blue))


def apart(a: Tensor, b: Tensor) -> Tensor:
    """The distance of two colours (B, 3), what is no difference of lightness counted twice."""
    grey = (a - b).mean(1)
    return (grey.square() + 4 * (a - b - grey[:, None]).square().sum(1)).sqrt()


def alike(a: Tensor, b: Tensor) -> Tensor:
    """1 for the same colour, 0 for different ones, (B, 3) each."""
    return (-(apart(a, b) / 0.25).square()).exp()


MEASURES: dict[str, Callable[[Portrait], Tensor]] = {
    **{f.__name__: f for f in (smile, eyes, age, glasses, beard, hat, position, size, skin)},
    **{f.__name__: f for f in (bald, short_hair, long_hair, curly_hair)},
    **{f"{name} hair": partial(hair_colour, name=name) for name in HAIRS},
    **{f"{name} background": partial(background, name=name) for name in (*HUES, "white")},
    **{f.__name__: f for f in (crayon, watercolour, pixel)},
}
WORDS = {  # what a description claims: a measurement, and where it stands then
    "smiling": ("smile", 1.0),
    "serious": ("smile", 0.0),
    "frowning": ("smile", -1.0),
    "young": ("age", 0.0),
    "middle-aged": ("age", 0.5),
    "old": ("age", 1.0),
    "big eyes": ("eyes", 1.0),
    "small eyes": ("eyes", 0.0),
    **{thing: (thing, 1.0) for thing in ("glasses", "beard", "hat")},
    **{f"no {thing}": (thing, 0.0) for thing in ("glasses", "beard", "hat")},
    "on the left": ("position", -1.0),
    "on the right": ("position", 1.0),
    "far away": ("size", 0.0),
    "close up": ("size", 1.0),
    "dark skin": ("skin", 0.0),
    "tan skin": ("skin", 0.6),
    "light skin": ("skin", 1.0),
    "bald": ("bald", 1.0),
    **{f"{kind} hair": (f"{kind}_hair", 1.0) for kind in ("short", "long", "curly")},
    **{f"{name} hair": (f"{name} hair", 1.0) for name in HAIRS},
    **{f"{name} background": (f"{name} background", 1.0) for name in (*HUES, "white")},
    **{style: (style, 1.0) for style in ("crayon", "watercolour", "pixel")},
}
NAMES = tuple(MEASURES)


def claims(text: str) -> dict[str, float]:
    """What a description claims, as measurement -> where it stands; words without a row claim nothing.

    "long black hair" claims "long hair" and "black hair".
    """
    apart = re.sub(r"(\w+) (\w+) hair\b", r"\1 hair, \2 hair", text)
    longest_first = "|".join(sorted(map(re.escape, WORDS), key=len, reverse=True))
    return dict(WORDS[words] for words in re.findall(rf"\b({longest_first})\b", apart))


class Geometry:
    """The evaluator: the measurements are its features, and words say where some of them stand."""

    def __init__(self, subject: str, device: str | torch.device = "cpu"):
        """subject: what pictures show. Raises UserError for anything but portraits, which is all it knows."""
        if subject != "portraits":
            raise UserError(f"geometry measures portraits of 64 px, and knows nothing of {subject!r}")
        self.identity = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        self.device = device

    @torch.no_grad()
    def features(self, images: Tensor) -> np.ndarray:
        """The measurements (B, len(NAMES)) of images (B, 3, 64, 64) in [-1, 1].

        Raises UserError for what is not finite.
        """
        if not torch.isfinite(images).all():
            raise UserError(
                "the pictures are not finite: a smaller scale, or dtype=fp32, may do, or weights are damaged"
            )
        portrait = Portrait(images.float().cpu())
        return torch.stack([measure(portrait) for measure in MEASURES.values()], -1).double().numpy()

    def score(self, features: np.ndarray, positive: str, negative: str) -> np.ndarray:
        """Where a picture stands between what the two descriptions claim: 0 at the negative, 1 at the
        positive one.
        """
        direction, less = self.direction(positive, negative), claims(negative)
        origin = np.array([less.get(name, 0.0) for name in NAMES])
        return (features - origin) @ direction / (direction @ direction)

    def rest(self, features: np.ndarray, positive: str, negative: str) -> np.ndarray:
        """The measurements that the two descriptions do not tell apart."""
        return features[..., self.direction(positive, negative) == 0]

    def direction(self, positive: str, negative: str) -> np.ndarray:
        """From what the negative description claims to what the positive one does, (d,)."""
        more, less = claims(positive), claims(negative)
        direction = np.array([more.get(name, 0.0) - less.get(name, 0.0) for name in NAMES])
        if not direction.any():
            raise UserError(f"geometry has no measurement between {positive!r} and {negative!r}")
        return direction
