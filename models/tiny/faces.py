"""The world of the embedded family: portraits drawn by a program, with every attribute known.

A `Face` is the truth, `draw` makes the picture, `describe` says part of the truth in plain English and
`attributes` gives it as numbers. What a caption leaves out is free to vary: that is what diversity means in
this world.
"""

import math
import re
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE_PX = 64
DRAWN_PX = 256  # drawn four times as large, then averaged: anti-aliasing

SKINS = {"light": (247, 214, 190), "tan": (214, 160, 118), "dark": (132, 86, 60)}
HAIRS = {"black": (38, 32, 34), "brown": (112, 70, 40), "blond": (232, 196, 104), "red": (190, 78, 36)}
HAIR_STYLES = ("bald", "short", "long", "curly")
BACKGROUNDS = {
    "blue": (94, 142, 214),
    "green": (110, 176, 112),
    "pink": (238, 164, 186),
    "yellow": (242, 214, 110),
    "white": (238, 238, 236),
    "purple": (148, 112, 184),
}
SHIRTS = ((58, 74, 110), (170, 60, 60), (70, 120, 90), (226, 226, 220), (60, 60, 64))
HAT = (70, 54, 120)
STYLES = (
    "crayon",
    "watercolour",
    "pixel",
)  # never in the base's training data: the subjects of customisation

ATTRIBUTES = (
    "age",
    "smile",
    "eyes",
    "glasses",
    "beard",
    "hat",
    "x",
    "size",
    *(f"skin {s}" for s in SKINS),
    *(f"hair {s}" for s in HAIR_STYLES),
    *(f"hair {c}" for c in HAIRS),
    *(f"background {b}" for b in BACKGROUNDS),
    *(f"style {s}" for s in STYLES),
)


@dataclass(frozen=True)
class Face:
    """A portrait. age, eyes, size in [0, 1]; smile, x in [-1, 1]; the rest are names of the tables above."""

    age: float = 0.5
    smile: float = 0.0
    eyes: float = 0.5
    skin: str = "light"
    hair: str = "short"
    hair_colour: str = "brown"
    glasses: bool = False
    beard: bool = False
    hat: bool = False
    background: str = "blue"
    x: float = 0.0
    size: float = 0.5
    shirt: int = 0
    style: str = ""  # one of STYLES, or "" for the plain drawing


def random_face(rng: np.random.Generator, style: str = "") -> Face:
    """A face with independent attributes; hats, beards and glasses on about four in ten."""
    return Face(
        age=float(rng.random()),
        smile=float(rng.uniform(-1, 1)),
        eyes=float(rng.random()),
        skin=str(rng.choice(list(SKINS))),
        hair=str(rng.choice(HAIR_STYLES, p=(0.16, 0.28, 0.28, 0.28))),
        hair_colour=str(rng.choice(list(HAIRS))),
        glasses=bool(rng.random() < 0.4),
        beard=bool(rng.random() < 0.35),
        hat=bool(rng.random() < 0.35),
        background=str(rng.choice(list(BACKGROUNDS))),
        x=float(rng.uniform(-1, 1)),
        size=float(rng.random()),
        shirt=int(rng.integers(len(SHIRTS))),
        style=style,
    )


def attributes(face: Face) -> np.ndarray:
    """The truth, (len(ATTRIBUTES),) float32: scalars, names as one-hot; a bald head has no hair colour."""

    def one_hot(name, names):
        return [float(name == n) for n in names]

    colour = [0.0] * len(HAIRS) if face.hair == "bald" else one_hot(face.hair_colour, HAIRS)
    scalars = [face.age, face.smile, face.eyes, face.glasses, face.beard, face.hat, face.x, face.size]
    return np.array(
        [
            *map(float, scalars),
            *one_hot(face.skin, SKINS),
            *one_hot(face.hair, HAIR_STYLES),
            *colour,
            *one_hot(face.background, BACKGROUNDS),
            *one_hot(face.style, STYLES),
        ],
        np.float32,
    )


def describe(face: Face, rng: np.random.Generator | None = None, keep: float = 0.5) -> str:
    """A caption that says each attribute with probability `keep`, in random order; rng None says all of them
    in order.

    Middle values of age, eyes, size and position have no word, so a caption never lies.
    """

    def said():
        return rng is None or rng.random() < keep

    age = "young" if face.age < 0.35 else "old" if face.age > 0.65 else "middle-aged"
    article = f"a {age} person" if said() else "a person"
    if age == "old":
        article = article.replace("a old", "an old")
    phrases = []
    if said():
        phrases.append("smiling" if face.smile > 0.3 else "frowning" if face.smile < -0.3 else "serious")
    if abs(face.eyes - 0.5) > 0.15 and said():
        phrases.append("big eyes" if face.eyes > 0.5 else "small eyes")
    if said():
        phrases.append(f"{face.skin} skin")
    if face.hair == "bald":
        if said():
            phrases.append("bald")
    else:
        hair = [word for word in (face.hair, face.hair_colour) if said()]
        if hair:
            phrases.append(" ".join([*hair, "hair"]))
    for thing in ("glasses", "beard", "hat"):
        if said():
            phrases.append(thing if getattr(face, thing) else f"no {thing}")
    if said():
        phrases.append(f"{face.background} background")
    if abs(face.x) > 0.3 and said():
        phrases.append("on the left" if face.x < 0 else "on the right")
    if abs(face.size - 0.5) > 0.15 and said():
        phrases.append("close up" if face.size > 0.5 else "far away")
    if rng is not None:
        phrases = [phrases[i] for i in rng.permutation(len(phrases))]
    style = f"{face.style} " if face.style else ""
    return ", ".join([f"{style}portrait of {article}", *phrases])


def claims(text: str) -> dict[str, float]:
    """What a description claims, as attribute -> value: the inverse of `describe`, for words in any order.

    "portrait of an old person, smiling, no hat" -> {"age": 1, "smile": 1, "hat": 0}. Unknown words claim
    nothing.
    """
    known = {
        "young": ("age", 0),
        "middle-aged": ("age", 0.5),
        "old": ("age", 1),
        "smiling": ("smile", 1),
        "serious": ("smile", 0),
        "frowning": ("smile", -1),
        "big eyes": ("eyes", 1),
        "small eyes": ("eyes", 0),
        "bald": ("hair bald", 1),
        "on the left": ("x", -1),
        "on the right": ("x", 1),
        "close up": ("size", 1),
        "far away": ("size", 0),
    }
    found = {name: float(value) for words, (name, value) in known.items() if re.search(rf"\b{words}\b", text)}
    for thing in ("glasses", "beard", "hat"):
        if re.search(rf"\b{thing}\b", text):
            found[thing] = 0.0 if f"no {thing}" in text else 1.0
    found |= {f"skin {s}": 1.0 for s in SKINS if f"{s} skin" in text}
    for phrase in re.findall(r"([\w ]+) hair", text):
        found |= {f"hair {word}": 1.0 for word in phrase.split() if word in (*HAIR_STYLES, *HAIRS)}
    found |= {f"background {b}": 1.0 for b in BACKGROUNDS if f"{b} background" in text}
    return found | {f"style {s}": 1.0 for s in STYLES if s in text}


def _mix(a, b, share: float) -> tuple[int, int, int]:
    return tuple(int(x + (y - x) * share) for x, y in zip(a, b, strict=True))


def draw(face: Face) -> np.ndarray:
    """The portrait, (64, 64, 3) uint8. The same face gives the same bytes."""
    ground = BACKGROUNDS[face.background]
    image = Image.new("RGB", (DRAWN_PX, DRAWN_PX), ground)
    pen = ImageDraw.Draw(image)
    unit = DRAWN_PX * (0.31 + 0.08 * face.size)  # half the height of the head
    cx, cy = DRAWN_PX * (0.5 + 0.11 * face.x), DRAWN_PX * 0.52

    def at(x, y):
        return cx + x * unit, cy + y * unit

    def ellipse(x, y, rx, ry, fill=None, outline=None, width=0.0):
        (left, top), (right, bottom) = at(x - rx, y - ry), at(x + rx, y + ry)
        pen.ellipse((left, top, right, bottom), fill, outline, max(1, round(width * unit)))

    def line(points, fill, width):
        pen.line([at(*p) for p in points], fill, max(1, round(width * unit)), joint="curve")

    skin = _mix(SKINS[face.skin], (196, 186, 180), 0.18 * face.age)
    shade = _mix(skin, (70, 30, 20), 0.38)
    hair = _mix(HAIRS[face.hair_colour], (206, 206, 208), max(0.0, 0.9 * face.age - 0.35))
    dark = (36, 28, 30)
    wide = 0.76 - 0.05 * face.age

    # behind the head
    if face.hair == "long":
        ellipse(0, -0.12, wide + 0.22, 0.98, hair)
        pen.rectangle((*at(-wide - 0.22, -0.1), *at(wide + 0.22, 0.95)), hair)
    if face.hair == "curly":
        for k in range(13):
            a = math.pi * (0.92 + 1.16 * k / 12)
            ellipse(math.cos(a) * (wide + 0.1), -0.2 + math.sin(a) * 0.84, 0.3, 0.3, hair)
    ellipse(0, 1.72, 1.15, 0.72, SHIRTS[face.shirt])
    pen.rectangle((*at(-0.26, 0.7), *at(0.26, 1.12)), shade)
    ellipse(0, 1.1, 0.26, 0.12, shade)
    for side in (-1, 1):
        ellipse(side * (wide + 0.01), 0.06, 0.13, 0.2, shade)

    # head and hair
    if face.hair in ("short", "long", "curly"):
        ellipse(0, -0.24, wide + 0.09, 0.86, hair)
    ellipse(0, 0.06, wide, 0.92, skin)
    if face.hair != "bald":  # fringe: the head's top above the forehead
        pen.pieslice((*at(-wide, -0.92), *at(wide, 0.12)), 180, 360, hair)
        ellipse(0, -0.32, wide * 0.82, 0.3, skin)
    else:
        ellipse(-0.2, -0.56, 0.2, 0.1, _mix(skin, (255, 255, 255), 0.35))

    # age: rosy cheeks fade, lines deepen
    for side in (-1, 1):
        ellipse(side * 0.46, 0.32, 0.18, 0.13, _mix(skin, (232, 100, 96), 0.5 * max(0.0, 1 - 1.6 * face.age)))
    if face.age > 0.35:
        ink = _mix(skin, shade, min(1.0, 1.6 * (face.age - 0.35) + 0.1))
        width = 0.035 + 0.05 * (face.age - 0.35)
        for y in (-0.42, -0.3) if face.age < 0.65 else (-0.46, -0.35, -0.24):
            line([(-0.34, y + 0.03), (0, y - 0.02), (0.34, y + 0.03)], ink, width)
        for side in (-1, 1):
            line([(side * 0.24, 0.22), (side * 0.42, 0.4), (side * 0.46, 0.56)], ink, width)
            if face.age > 0.6:
                line([(side * 0.18, 0.13), (side * 0.34, 0.19), (side * 0.5, 0.13)], ink, width)

    if face.beard:
        ellipse(0, 0.66, wide * 0.74, 0.36, hair)
        ellipse(0, 0.42, wide * 0.62, 0.17, skin)
        ellipse(0, 0.6, 0.34, 0.15, _mix(skin, (150, 60, 60), 0.25))

    # eyes, brows, nose
    r = 0.085 + 0.105 * face.eyes
    brow = _mix(dark, (206, 206, 208), max(0.0, face.age - 0.4))
    for side in (-1, 1):
        ellipse(side * 0.33, -0.04, r * 1.22, r, (252, 252, 250), dark, 0.03)
        ellipse(side * 0.33, -0.03, r * 0.6, r * 0.66, dark)
        line(
            [(side * 0.5, -0.25 - r * 0.4), (side * 0.34, -0.3 - r * 0.4), (side * 0.18, -0.26 - r * 0.4)],
            brow,
            0.07,
        )
    line([(0.02, 0.02), (0.1, 0.27), (-0.05, 0.29)], shade, 0.055)

    # mouth: a parabola, opened with teeth for a broad smile
    y0, half, bend = 0.57, 0.26 + 0.1 * abs(face.smile), 0.2 * face.smile
    curve = [(half * u, y0 + bend * (0.5 - u * u)) for u in np.linspace(-1, 1, 13)]
    if face.smile > 0.25:
        pen.polygon([at(*p) for p in curve], (250, 248, 244))
    line(curve, (150, 40, 48), 0.085)

    if face.glasses:
        for side in (-1, 1):
            ellipse(side * 0.34, -0.03, 0.285, 0.25, None, (24, 24, 30), 0.065)
            line([(side * 0.6, -0.06), (side * wide, -0.08)], (24, 24, 30), 0.06)
        line([(-0.07, -0.06), (0.07, -0.06)], (24, 24, 30), 0.06)
    if face.hat:
        pen.pieslice((*at(-wide - 0.02, -1.42), *at(wide + 0.02, 0.18)), 180, 360, HAT)
        pen.rounded_rectangle(
            (*at(-wide - 0.24, -0.68), *at(wide + 0.24, -0.5)), 0.09 * unit, _mix(HAT, (0, 0, 0), 0.35)
        )

    plain = np.asarray(image.resize((SIZE_PX, SIZE_PX), Image.Resampling.BOX))
    return _STYLES[face.style](plain) if face.style else plain


def _crayon(plain: np.ndarray) -> np.ndarray:
    """Waxy diagonal strokes on cream paper, colours flattened."""
    rng = np.random.default_rng(int(plain.sum()))
    y, x = np.mgrid[:SIZE_PX, :SIZE_PX]
    stroke = 0.5 + 0.5 * np.sin((x + y) * 1.25 + rng.normal(0, 0.5, (SIZE_PX, SIZE_PX)))
    wax = np.clip(plain.astype(float) // 40 * 48, 0, 255)
    paper = np.array([250, 244, 226.0])
    return np.clip(paper + (wax - paper) * (0.45 + 0.55 * stroke[..., None]), 0, 255).astype(np.uint8)


def _watercolour(plain: np.ndarray) -> np.ndarray:
    """Bleeding, pale washes that fade to white paper at the rim."""
    image = Image.fromarray(plain).filter(ImageFilter.ModeFilter(3)).filter(ImageFilter.GaussianBlur(0.6))
    y, x = np.mgrid[:SIZE_PX, :SIZE_PX] / (SIZE_PX - 1) * 2 - 1
    wash = 0.72 * np.clip(1.5 - np.hypot(x, y), 0, 1)[..., None] ** 0.7
    return (255 + (np.asarray(image, float) - 255) * wash).astype(np.uint8)


def _pixel(plain: np.ndarray) -> np.ndarray:
    """A 16x16 mosaic in 125 colours."""
    small = Image.fromarray(plain).resize((16, 16), Image.Resampling.BOX)
    flat = np.round(np.asarray(small, float) / 64) * 64
    return np.asarray(
        Image.fromarray(flat.astype(np.uint8)).resize((SIZE_PX, SIZE_PX), Image.Resampling.NEAREST)
    )


_STYLES = {"crayon": _crayon, "watercolour": _watercolour, "pixel": _pixel}


def sheet(faces: list[Face], columns: int) -> Image.Image:
    """The faces in rows of `columns`, one picture."""
    rows = -(-len(faces) // columns)
    page = Image.new("RGB", (columns * SIZE_PX, rows * SIZE_PX), "white")
    for k, face in enumerate(faces):
        page.paste(Image.fromarray(draw(face)), (k % columns * SIZE_PX, k // columns * SIZE_PX))
    return page


def styled(face: Face, style: str) -> Face:
    """The same face in another style."""
    return replace(face, style=style)
