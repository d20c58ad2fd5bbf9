"""Draws a folder of pictures: python -m controls.generate [key=value ...]

A member alone or a plan, with any controls at their scales, prompt by prompt and seed by seed:
images/CASE_SEED.png as tools of FID take them, every picture's settings in its own metadata and in
images.jsonl, a contact sheet. `from=PICTURE.png` draws a picture again from what its metadata says.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

from configs import ROOT, UserError, cut, entry, folders, list_of, load, note, replacing, tracking
from configs.runs import versions
from controls import formats, scales
from controls.acting import acting, by_network
from controls.lora import Control, content, fits
from controls.picture_grid import picture_grid, to_image, to_uint8
from models import budget, devices, forecast, promptsets
from models.batches import Batches
from models.families import DTYPES, Family, Memory
from models.hashing import identity
from models.plans import plan_of
from models.prompts import Prompts, stacked
from models.sampler import Plan, draw_noise, finish

KEY = "distilled-control"  # of a picture's settings in its metadata
FREE = ("wandb", "batch_size", "memory", "prompts", "seeds", "shown", "dry_run")
AGAIN = ("family", "plan", "dtype", "quantize", "batch_size")  # keys that a picture that is drawn again sets
SHOWN_PX = 256  # side of a picture on the contact sheet


@dataclass
class Config:
    family: str = "tiny"  # a card in configs/families, or the path of one
    plan: str = "dmd:hybrid(1)"  # a member, or member:plan, see models/plans.py
    # texts, or files of them: .csv, .tsv, .jsonl, .txt, hub:owner/dataset; empty = the card's
    prompts: list[str] = list_of()
    # control (a file, or a shipped one's name): its scale, or `matched`, where its effect is its source's
    controls: dict[str, Any] = field(default_factory=dict)
    measured: str = (
        ""  # results.json of a transfer run that says matched scales; empty = the files' own headers
    )
    seeds: int = 1  # pictures per prompt
    seed: int = 0  # of the first picture, where the prompts' file says none
    # a picture that this command drew, to be drawn again; written from=PICTURE.png
    again: str = ""
    # pictures at once; with another number the same picture differs in its last bits
    batch_size: int = 1
    shown: int = 24  # prompts on the contact sheet
    dtype: str = "auto"  # of the networks: auto (bf16 on a GPU, fp32 on a CPU), bf16, fp32
    quantize: str = ""  # networks packed: nf4, int8 (extra 8bit), int8-torchao (extra torchao); empty = whole
    memory: Memory = field(default_factory=Memory)  # what to do without, at the price of time
    wandb: str = "auto"  # online, offline, disabled; auto = online when logged in, else offline
    dry_run: bool = False  # say what would be drawn and what that takes
    overwrite: bool = False  # empty the folder first
    name: str = ""  # of the folder; empty = the last part of out
    out: str = "runs/pictures"  # the folder of the pictures, or with a name what it is in


@dataclass(frozen=True)
class Picture:
    """One picture of a folder."""

    case: int  # number of its prompt
    prompt: str
    seed: int

    @property
    def file(self) -> str:
        return f"images/{self.case}_{self.seed}.png"


@folders.releases
def main(cfg: Config) -> Path:
    """Draws what is not there yet and returns the folder."""
    settings = prepare(cfg)
    accelerator = devices.start(cfg, FREE)
    studio = Studio(cfg, cfg.memory.planned(accelerator.device, cfg.dry_run))
    pictures = wanted(cfg, studio.family, settings)
    if cfg.dry_run:
        return studio.plan_of_work(pictures)
    if settings:
        studio.same(settings)
    devices.claim(accelerator, cfg, FREE)
    folder = Path(cfg.out) / cfg.name
    missing = [picture for picture in pictures if not (folder / picture.file).is_file()]
    studio.draw(missing[accelerator.process_index :: accelerator.num_processes], folder)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        publish(cfg, pictures, folder)
    return folder


def prepare(cfg: Config) -> dict:
    """The folder's place; with `from`, what the picture's metadata says, as the config. Raises UserError."""
    if cfg.dtype not in DTYPES:
        raise UserError(f"no dtype {cut(cfg.dtype)!r}; there are {', '.join(DTYPES)}")
    if not cfg.name:
        cfg.name, cfg.out = Path(cfg.out).name, str(Path(cfg.out).parent)
    settings = settings_of(Path(cfg.again)) if cfg.again else {}
    if settings:
        for key in AGAIN:
            setattr(cfg, key, settings[key])
        cfg.prompts, cfg.seeds, cfg.measured = [settings["prompt"]], 1, ""
        cfg.controls = {its["file"]: its["scale"] for its in settings["controls"]}
    return settings


def settings_of(path: Path) -> dict:
    """What a picture of this command says of itself. Raises UserError for another picture."""
    try:
        with Image.open(path) as picture:
            said = picture.info.get(KEY, "")
    except (OSError, SyntaxError, ValueError):
        raise UserError(f"from={cut(path)} is no picture that can be read") from None
    try:
        settings = json.loads(said)
    except ValueError:
        settings = None
    needed = {*AGAIN, "prompt", "case", "seed", "controls", "members", "versions", "device"}
    if not isinstance(settings, dict) or needed - settings.keys():
        raise UserError(f"from={cut(path)} has no settings of controls.generate in its metadata")
    return settings


def wanted(cfg: Config, family: Family, settings: dict) -> list[Picture]:
    """The pictures of a run, prompt by prompt."""
    if settings:
        return [Picture(settings["case"], settings["prompt"], settings["seed"])]
    prompts = promptsets.read(cfg.prompts or family.card.prompts)
    cases, numbers = prompts.cases or range(len(prompts.texts)), prompts.numbers(cfg.seeds, cfg.seed)
    pictures = [
        Picture(case, text, numbers[k * cfg.seeds + s])
        for k, (case, text) in enumerate(zip(cases, prompts.texts, strict=True))
        for s in range(cfg.seeds)
    ]
    if len({picture.file for picture in pictures}) < len(pictures):
        raise UserError("two prompts have the same case_number and seed: their pictures would have one name")
    return pictures


class Studio:
    """A plan with controls at their scales, ready to draw."""

    def __init__(self, cfg: Config, device: torch.device):
        self.cfg = cfg
        self.family = Family(
            cfg.family, device, DTYPES[cfg.dtype], cfg.memory, cfg.dry_run, cfg.batch_size, cfg.quantize
        )
        self.family.reading = Batches(1)  # a text is then encoded the same beside any others
        self.target = f"{self.family.card.name}/{cfg.plan}"
        self.bare = self.family if cfg.dry_run else Family(cfg.family, bare=True)
        plan = plan_of(self.bare, cfg.plan)  # what cannot be is said before anything is loaded
        if plan.adapter:
            raise UserError(f"plan={cfg.plan} is of analysis.diversity; here controls={{FILE: SCALE}} say it")
        self.controls = [self.control(name, scale, plan) for name, scale in cfg.controls.items()]
        for member in plan.members:
            for _, control, scale in self.controls:
                by_network(plan, scale)
                fits(member.denoiser.net, control, self.family.card.name)

    def control(self, name: str, scale: Any, plan: Plan) -> tuple[str, Control, dict[str, float]]:
        """A control's file, itself, and its scale on each member of a plan. Raises UserError."""
        shipped = f"controls/{self.family.card.name}/{name}.safetensors"
        file = shipped if (ROOT / shipped).is_file() and not Path(name).exists() else name
        control = formats.load(file)
        names = {member.name for member in plan.members}
        if isinstance(scale, dict):  # of a picture that is drawn again
            return file, control, {name: float(scale[name]) for name in names}
        if scale != scales.MATCHED:
            return file, control, dict.fromkeys(names, scales.scale(name, scale))
        how = file, control.card, self.target
        return file, control, {each: scales.matched(*how, each, self.cfg.measured) for each in names}

    @property
    def plan(self) -> Plan:
        """What draws; its networks are loaded when it is first asked for."""
        return plan_of(self.family, self.cfg.plan)

    def settings(self, picture: Picture) -> dict:
        """All that a picture depends on."""
        member, _, way = self.cfg.plan.partition(":")
        names = dict.fromkeys([member, *([self.family.card.base] if way else [])])
        return {
            "prompt": picture.prompt,
            "case": picture.case,
            "seed": picture.seed,
            "family": self.cfg.family,
            "plan": self.cfg.plan,
            "controls": [
                {"file": file, "name": control.card.name, "hash": content(control), "scale": scale}
                for file, control, scale in self.controls
            ],
            "members": {name: identity(self.family.card, name) for name in names},
            "dtype": next(name for name, dtype in DTYPES.items() if dtype is self.family.dtype),
            "quantize": self.cfg.quantize,
            "batch_size": self.cfg.batch_size,
            "size_px": self.family.card.size_px,
            "device": self.family.device.type,
            "versions": versions(),
        }

    def same(self, settings: dict) -> None:
        """Raises UserError where what a picture was drawn with is another now."""
        now = self.settings(Picture(settings["case"], settings["prompt"], settings["seed"]))
        for before, its in zip(settings["controls"], now["controls"], strict=True):
            if before["hash"] != its["hash"]:
                raise UserError(f"{its['file']} is another control than the one that drew the picture")
        if changed := [name for name, its in now["members"].items() if its != settings["members"].get(name)]:
            raise UserError(
                f"{', '.join(changed)} of {now['family']} is another than the one that drew the picture"
            )
        for said in (settings["versions"], now["versions"]):
            said.pop("commit", None)
        if other := [key for key in ("device", "versions") if now[key] != settings[key]]:
            note(f"the picture was drawn with another {' and '.join(other)}: it may differ in its last bits")

    def plan_of_work(self, pictures: list[Picture]) -> Path:
        """Says what would be drawn and what that takes."""
        family, its = self.family, self.plan
        names = {member.name.rpartition("/")[2] for member in its.members}
        print(f"{len(pictures)} pictures by {self.target}, {its.nfe} network evaluations each")
        calls = budget.nfe_by_member([(its, len(pictures))])
        print(budget.forecast(family.card, calls, family.dtype, family.device, (), family.quantize))
        tensors = [control.tensors for _, control, _ in self.controls]
        moments = partial(forecast.drawing, family, [(names, names)], self.cfg.batch_size, tensors, [])
        print(forecast.said(moments, family))
        return Path(self.cfg.out) / self.cfg.name

    def draw(self, pictures: list[Picture], folder: Path) -> None:
        """Writes pictures, each whole or not at all."""
        if not pictures:
            return
        self.family.encode_all([picture.prompt for picture in pictures])
        batches = [
            pictures[k : k + self.cfg.batch_size] for k in range(0, len(pictures), self.cfg.batch_size)
        ]
        with self.acting() as plan:
            for batch in tqdm(batches, "pictures", unit="batch"):
                for picture, pixels in zip(batch, self.drawn(plan, batch), strict=True):
                    write(folder / picture.file, pixels, self.settings(picture))

    @torch.no_grad()
    def drawn(self, plan: Plan, batch: list[Picture]) -> Tensor:
        """Pictures (B, 3, H, W), uint8."""
        family = self.family
        prompts: Prompts = stacked([family.encode([picture.prompt]) for picture in batch])
        noise = draw_noise(
            [picture.seed for picture in batch], family.latent_shape, plan.steps, family.device
        )
        latents = finish(plan, noise, prompts)
        return to_uint8(torch.cat([family.decode(latents[[k]]) for k in range(len(batch))]))

    @contextmanager
    def acting(self) -> Iterator[Plan]:
        """Inside, the plan with all controls on every network of it."""
        with ExitStack() as stack:
            plan = self.plan
            for _, control, scale in self.controls:  # each on top of those before it
                plan = stack.enter_context(acting(plan, control, scale, self.family.card.name))
            yield plan


def write(path: Path, picture: Tensor, settings: dict) -> None:
    """A picture (3, H, W), uint8, as a PNG with its settings."""
    about = PngInfo()
    about.add_itxt("prompt", settings["prompt"])
    about.add_itxt(KEY, json.dumps(settings))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as new:
        to_image(picture).save(new, pnginfo=about)


def publish(cfg: Config, pictures: list[Picture], folder: Path) -> None:
    """images.jsonl, the contact sheet, W&B; says where they are, and whether one drawn again is the same."""
    lines = [{"file": picture.file, **settings_of(folder / picture.file)} for picture in pictures]
    with replacing(folder / "images.jsonl") as new:
        new.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    sheet = contact_sheet(pictures, folder, cfg.shown)
    print(f"{len(pictures)} pictures: {folder / 'images'}\ncontact sheet: {sheet}")
    if cfg.again:
        print(difference(Path(cfg.again), folder / pictures[0].file))
    with tracking.start(folder, asdict(cfg), "controls.generate", cfg.plan, cfg.wandb) as tracker:
        tracker.image("generate/sheet", sheet, cfg.plan)
        keys = ("file", "prompt", "seed", "plan")
        tracker.table("generate/pictures", list(keys), [[line[key] for key in keys] for line in lines])


def contact_sheet(pictures: list[Picture], folder: Path, shown: int) -> Path:
    """A row per prompt, a column per seed."""
    rows: dict[int, list[Picture]] = {}
    for picture in pictures:
        rows.setdefault(picture.case, []).append(picture)
    page = [
        (
            cut(row[0].prompt, 24),
            [f"seed {picture.seed}" for picture in row],
            [pixels(folder, p) for p in row],
        )
        for row in list(rows.values())[: max(1, shown)]
    ]
    return picture_grid(page, folder / "sheet.png", SHOWN_PX)


def pixels(folder: Path, picture: Picture) -> Tensor:
    """A written picture (3, H, W), uint8."""
    with Image.open(folder / picture.file) as opened:
        return torch.from_numpy(np.array(opened)).permute(2, 0, 1)


def difference(before: Path, after: Path) -> str:
    """Whether two pictures are the same, in words."""
    both = []
    for path in (before, after):
        with Image.open(path) as opened:
            both.append(np.array(opened.convert("RGB"), dtype=int))
    if both[0].shape != both[1].shape:
        return f"{before} has another size"
    most = int(np.abs(both[0] - both[1]).max())
    return (
        f"the same as {before}, bit for bit" if not most else f"differs from {before} by up to {most} of 255"
    )


def run() -> None:
    words = [f"again={word[5:]}" if word.startswith("from=") else word for word in sys.argv[1:]]
    print(main(load(Config, words)))


if __name__ == "__main__":
    entry(run)
