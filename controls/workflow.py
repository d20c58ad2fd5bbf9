"""Writes a plan for ComfyUI: python -m controls.workflow [key=value ...]

A workflow in the format of ComfyUI's API, of ComfyUI's own nodes: a member alone, or a student with the
base's weights in its first or last steps (hybrid, late) or without its first ones (skip), with LoRA loaders
for controls at their scales. It says which files ComfyUI needs, and where. POST it to /prompt as
{"prompt": …}, or drop it on the page.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from configs import UserError, cut, entry, list_of, note, replacing
from controls import comfyui, formats
from controls.comfyui import Files, Graph
from controls.comfyui.files import File, file_of, kit_of
from controls.formats.files import header
from controls.scales import MATCHED, matched, scale
from models.architectures import ARCHITECTURES
from models.families import Family
from models.plans import named
from models.sampler import Member, Plan

WRITABLE = ("hybrid", "late", "skip")  # plans of stages that differ in nothing but their networks
KOHYAS = ("lora_unet_", "lora_te", "lycoris_")  # names of layers that ComfyUI knows of any U-Net


@dataclass
class Config:
    family: str = "sdxl"  # its card, see configs/families
    # a member alone (dmd2, base), or MEMBER:hybrid(k), MEMBER:late(k), MEMBER:skip(k)
    plan: str = "dmd2:hybrid(1)"
    # control file to scale, {mine.safetensors: 0.8}; matched = the scale that its header says for each member
    # that the plan runs, which analysis.transfer write_card=true writes
    controls: dict[str, str] = field(default_factory=dict)
    prompt: str = ""  # what is drawn; empty = the first prompt of the family's card
    negative: str = (
        ""  # what guidance departs from; empty = as the family's pipeline; unused without guidance
    )
    seed: int = 11  # of the picture
    # member to the name of its file in ComfyUI, {base: mine.safetensors}; others are called as published
    files: dict[str, str] = field(default_factory=dict)
    clip: list[str] = list_of()  # names of the text encoders' files in ComfyUI; empty = as published
    vae: str = ""  # name of the VAE's file in ComfyUI; empty = as published
    out: str = "workflow.json"  # the workflow


def main(cfg: Config) -> Path:
    """Writes the workflow, says which files it needs, and returns its path."""
    if Path(cfg.out).is_dir() or not cfg.out.lower().endswith(".json"):
        raise UserError(f"cannot write out={cut(cfg.out)}: it is a folder, or does not end in .json")
    family = Family(cfg.family, bare=True)
    plan = plan_of(family, cfg.plan)
    files = files_of(cfg, family, plan)
    nodes = graph(cfg, family, plan, files).nodes
    with replacing(Path(cfg.out)) as new:
        new.write_text(json.dumps(nodes, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print("\n".join([f"{cfg.out}: {cfg.plan} of {family.card.name}", *steps(plan), *needs(files)]))
    return Path(cfg.out)


def graph(cfg: Config, family: Family, plan: Plan, files: Files) -> Graph:
    """From the loaders to the saved picture."""
    made = Graph()
    loaded = comfyui.load(made, family.card, list(files.controls), files)
    finished = comfyui.draw(made, family.card, plan, loaded, texts_of(cfg, family, plan), cfg.seed)
    picture = made.add("VAEDecode", "picture", samples=finished, vae=loaded.vae)
    prefix = f"{family.card.name}-{cfg.plan}".replace(":", "-")
    made.add("SaveImage", "save", images=picture, filename_prefix=prefix)
    return made


def plan_of(family: Family, text: str) -> Plan:
    """A plan of outlines, by a text as in analysis.transfer's targets.

    Raises UserError for one that no nodes of ComfyUI can do.
    """
    kit_of(family.card)
    name, colon, how = text.replace(" ", "").partition(":")
    if colon and how.partition("(")[0] not in WRITABLE:
        raise UserError(
            f"plan={cut(text)} cannot be written for ComfyUI; there can be a member alone, as "
            f"{family.card.usual[-1]}, or MEMBER:{', MEMBER:'.join(f'{plan}(k)' for plan in WRITABLE)}"
        )
    student = family.outline(name)
    plan = named(how or "student", family.outline(family.card.base), student)
    for stage in plan.stages:
        comfyui.sampler_of(stage.member)
        _can_be_told(family, stage.member)
    return plan


def _can_be_told(family: Family, member: Member) -> None:
    """Raises UserError for a U-Net that embeds a guidance: ComfyUI's leaves that layer out without a word."""
    if member.denoiser.guidance_embedding is None or family.card.architecture == "flux":
        return
    other = f"{comfyui.own(member)}-lora"
    hint = f"; {other} is told none" if other in family.card.members else ""
    raise UserError(
        f"{member.name} cannot be written for ComfyUI: it is told a guidance (guidance_embedding), for which "
        f"ComfyUI's network has no place{hint}"
    )


def texts_of(cfg: Config, family: Family, plan: Plan) -> tuple[str, str | None]:
    """The prompt and the negative one; None = zeros. Notes what the nodes cannot do with it."""
    guided = [stage.member for stage in plan.stages if stage.member.guidance is not None]
    if cfg.negative and not guided:
        note(f"negative= is not used: {cfg.plan} is sampled without guidance")
    if any(member.denoiser.rescaled for member in guided):
        note(
            f"{family.card.name}'s pipeline keeps guided changes as long as unguided ones, ComfyUI's nodes "
            f"do not: its pictures differ"
        )
    prompt = cfg.prompt or next(iter(family.card.prompts), "")
    return prompt, (cfg.negative or kit_of(family.card).negative) if guided else None


# files


def files_of(cfg: Config, family: Family, plan: Plan) -> Files:
    """What is loaded, by the names that the command line gives or their publishers gave."""
    card, kit = family.card, kit_of(family.card)
    names = list(dict.fromkeys(comfyui.own(member) for member in plan.members))
    loaded = dict.fromkeys([*map(card.holder, names), *names, *([] if kit.loader else [card.base])])
    if strange := [name for name in cfg.files if name not in loaded]:
        raise UserError(f"files: {cfg.plan} loads no {cut(strange[0])!r}; it loads {', '.join(loaded)}")
    if strange := [name for name, file in cfg.files.items() if not isinstance(file, str) or not file]:
        raise UserError(f"files: {cut(strange[0])} has no file's name; it is written {strange[0]}: FILE")
    networks = {name: file_of(card, name, cfg.files.get(name, "")) for name in loaded}
    if cfg.clip and len(cfg.clip) != len(kit.clip):
        raise UserError(
            f"clip holds {len(cfg.clip)} files; {card.name} takes {len(kit.clip)}: "
            f"{', '.join(file.name for file in kit.clip) or 'none, its checkpoint has its text encoders'}"
        )
    if cfg.vae and not kit.vae:
        raise UserError(f"vae={cut(cfg.vae)}: {card.name} takes none, its checkpoint has its VAE")
    encoders = [
        _renamed(file, name) for file, name in zip(kit.clip, cfg.clip or [""] * len(kit.clip), strict=True)
    ]
    return Files(networks, encoders, kit.vae and _renamed(kit.vae, cfg.vae), _controls(cfg, family, plan))


def _renamed(file: File, name: str) -> File:
    """A file of the user's own in the place of a published one."""
    return File(file.folder, name) if name else file


def _controls(cfg: Config, family: Family, plan: Plan) -> dict[str, list[tuple[File, float]]]:
    """By member, the controls' files with their strengths there."""
    members = {comfyui.own(member): member for member in plan.members}
    found = {name: [] for name in members}
    for path, said in cfg.controls.items():
        card = formats.card_of(path, header(path)[1])
        if card and card.family != family.card.name:
            raise UserError(
                f"{cut(path)} was trained on {card.family}/{card.member}, as its card says, not on "
                f"{family.card.name}"
            )
        file = lora_file(path, family)
        if any(file.name == other.name for other, _ in found[next(iter(found))]):
            raise UserError(f"two of the controls would be {file.name} in ComfyUI: call one otherwise")
        for name, member in members.items():
            if said == MATCHED:
                strength = matched(path, card, f"{family.card.name}/{cfg.plan.replace(' ', '')}", member.name)
            else:
                strength = scale(path, said)
            found[name].append((file, strength))
    return found


def lora_file(path: str, family: Family) -> File:
    """What ComfyUI loads of a control's file: of a U-Net kohya's layout, for it leaves out attention that is
    named as in diffusers; of a transformer, whose B hold alpha / rank, the file itself.
    """
    name, (keys, metadata) = PurePosixPath(path), header(path)
    if ARCHITECTURES[family.card.architecture].part != "unet" or all(key.startswith(KOHYAS) for key in keys):
        return File("loras", name.name)
    kohya = f"{name.stem}-kohya.safetensors"
    member = "" if formats.card_of(path, metadata) else f" member={family.card.name}/{family.card.base}"
    return File("loras", kohya, made=f"python -m controls.convert {path} {kohya} format=kohya{member}")


# words


def steps(plan: Plan) -> list[str]:
    """The stages of a plan in words."""
    return [
        f"{comfyui.own(stage.member)} at sigma {', '.join(f'{sigma:.4g}' for sigma in sigmas[:-1])}, to "
        f"{sigmas[-1]:.4g}"
        for stage, sigmas in zip(plan.stages, comfyui.sigmas_of(plan), strict=True)
    ]


def needs(files: Files) -> list[str]:
    """Every file, and where it goes."""
    controls = [file for loras in files.controls.values() for file, _ in loras]
    every = [*files.networks.values(), *files.clip, *([files.vae] if files.vae else []), *controls]
    return [file.line for file in dict.fromkeys(every)]


if __name__ == "__main__":
    entry(main, Config)
