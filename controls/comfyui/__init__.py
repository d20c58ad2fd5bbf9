"""ComfyUI: a plan as a graph of its own nodes, in the format of its API.

Its sigma is sigma / alpha of a network that predicts eps, v or x0, and the sigma of a flow; its samplers
`euler`, `lcm` and `euler_ancestral` are our update with eta 0, 1 and noise.ancestral. A stage is one node:

- KSamplerAdvanced where the scheduler `simple` has the very levels and ComfyUI starts where we do: DMD2's,
  the last training step and every 250th before it, from eps.
- SamplerCustom with the levels written out (ManualSigmas) everywhere else. Turbo's, Lightning's and Hyper's
  levels are those of `simple` too, but Turbo and Lightning start from sigma eps and Hyper ends at training
  step 0; LCM's are those of `simple` only on a network that is set to LCM's sampling, which the base is not;
  a flow's are those of diffusers' scheduler for the size of the image, which no scheduler there spaces alike.

No node shifts a flow: that changes the levels of named schedulers and nothing else.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from configs import UserError
from controls.comfyui.files import File, kit_of
from models.cards import FamilyCard
from models.noise import CLEAN, TRAIN_STEPS, Noise, ancestral, vp
from models.sampler import Member, Plan

Link = list  # [a node's number, which of its outputs]
# seeds between two stages, so that the second does not draw the first one's fresh noise again; torch's
# generator on a CPU heeds the last 32 bits alone
APART = 2**30
PREDICTIONS = {"v": "v_prediction", "sample": "x0"}  # what ModelSamplingDiscrete calls them; eps is usual


# levels


def sigma_of(level: Noise, noise_schedule: str) -> float:
    """What ComfyUI calls a noise level."""
    return level.sigma if noise_schedule == "flow" else level.ratio


def levels_of(plan: Plan) -> list[Noise]:
    """The levels that a plan goes through, from its first to where its last update leads."""
    return [*(level for stage in plan.stages for level in stage.levels), plan.stages[-1].member.final]


def sigmas_of(plan: Plan) -> list[list[float]]:
    """ComfyUI's sigmas of each stage; a stage ends where the next begins."""
    every = [sigma_of(level, plan.stages[0].member.noise_schedule) for level in levels_of(plan)]
    ends = [sum(len(stage.levels) for stage in plan.stages[:k]) for k in range(len(plan.stages) + 1)]
    return [every[start : end + 1] for start, end in zip(ends, ends[1:], strict=False)]


def sampler_of(member: Member) -> str:
    """The sampler that makes a member's update. Raises UserError where none does."""
    eta = member.eta
    if eta is ancestral and member.noise_schedule != "flow":
        return "euler_ancestral"
    if eta in (0, 1):
        return ("euler", "lcm")[int(eta)]
    said = "Euler-ancestral's on a flow" if eta is ancestral else f"{eta:g}"
    raise UserError(f"no sampler of ComfyUI has eta {said}; there are 0 (euler) and 1 (lcm)")


def start_scale(plan: Plan) -> tuple[float, float]:
    """By how much the initial noise is multiplied, in ComfyUI's variables: as the plan says, and as its
    samplers do by themselves.
    """
    member, level = plan.stages[0].member, levels_of(plan)[0]
    if member.noise_schedule == "flow":
        return (level.sigma if member.start == "sigma" else 1.0), level.sigma
    unit = math.hypot(1, level.ratio)  # 1 / alpha
    last = vp(TRAIN_STEPS - 1, member.noise_schedule).ratio  # from which on ComfyUI starts from eps
    return (level.ratio if member.start == "sigma" else unit), (
        unit if level.ratio >= last * (1 - 1e-5) else level.ratio
    )


def starts_alike(plan: Plan) -> bool:
    """Whether ComfyUI's samplers start a plan as it says."""
    wanted, usual = start_scale(plan)
    return math.isclose(wanted, usual, rel_tol=1e-6)


def is_simple(plan: Plan) -> bool:
    """Whether the scheduler `simple` has exactly a plan's levels, and a sampler starts where it does."""
    *levels, final = levels_of(plan)
    steps, member = len(levels), plan.stages[0].member
    simple = [vp(TRAIN_STEPS - 1 - int(k * TRAIN_STEPS / steps)).ratio for k in range(steps)]
    same = all(math.isclose(a.ratio, b, rel_tol=1e-9) for a, b in zip(levels, simple, strict=True))
    return member.noise_schedule == "vp" and same and final == CLEAN and starts_alike(plan)


# the graph


@dataclass
class Graph:
    """A workflow in the format of ComfyUI's API: numbered nodes with their inputs."""

    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, kind: str, title: str, **inputs: Any) -> Link:
        """A node more; returns its first output."""
        number = str(len(self.nodes) + 1)
        self.nodes[number] = {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}
        return [number, 0]


@dataclass
class Loaded:
    """What the loaders give: text encoders, VAE, and networks by member, each with its controls."""

    clip: Link
    vae: Link
    networks: dict[str, Link]


@dataclass
class Files:
    """What the loaders are told: by member its network's file, the text encoders', the VAE's, and by member
    the controls' with their strengths.
    """

    networks: dict[str, File]
    clip: list[File]  # none where the base's checkpoint holds text encoders and VAE
    vae: File | None
    controls: dict[str, list[tuple[File, float]]]


def load(graph: Graph, card: FamilyCard, names: Sequence[str], files: Files) -> Loaded:
    """The loaders of members' networks and of what they share."""
    kit, shared = kit_of(card), files.clip
    holders = dict.fromkeys(map(card.holder, names))
    homes = {name: _network(graph, name, files.networks[name]) for name in holders}
    if kit.loader:
        ends = [""] if len(shared) == 1 else [str(k + 1) for k in range(len(shared))]
        inputs = {f"clip_name{end}": file.name for end, file in zip(ends, shared, strict=True)}
        clip = graph.add(kit.loader, "text encoders", **inputs, **({"type": kit.kind} if kit.kind else {}))
        vae = graph.add("VAELoader", "VAE", vae_name=files.vae.name)
    else:
        base = homes.get(card.base) or _network(graph, card.base, files.networks[card.base])
        clip, vae = [base[0], 1], [base[0], 2]
    networks = {name: _acting(graph, card, name, homes[card.holder(name)], files) for name in names}
    return Loaded(clip, vae, networks)


def _network(graph: Graph, name: str, file: File) -> Link:
    """A network as it is published."""
    if file.folder == "checkpoints":
        return graph.add("CheckpointLoaderSimple", name, ckpt_name=file.name)
    return graph.add("UNETLoader", name, unet_name=file.name, weight_dtype="default")


def _acting(graph: Graph, card: FamilyCard, name: str, model: Link, files: Files) -> Link:
    """A member: its network with the LoRA that makes it a student, its controls, and what it predicts."""
    its, loras = card.members[name], list(files.controls[name])
    if its.lora:
        loras.insert(0, (files.networks[name], its.lora_scale))
    for file, scale in loras:
        inputs = {"model": model, "lora_name": file.name, "strength_model": scale}
        model = graph.add("LoraLoaderModelOnly", f"{file.name} on {name}", **inputs)
    if its.prediction_type in PREDICTIONS:
        inputs = {"model": model, "sampling": PREDICTIONS[its.prediction_type], "zsnr": False}
        model = graph.add("ModelSamplingDiscrete", f"what {name} predicts", **inputs)
    return model


def literal(text: str) -> str:
    """A prompt that ComfyUI reads word by word: bare parentheses would weigh what they hold."""
    return text.replace("(", r"\(").replace(")", r"\)")


def draw(
    graph: Graph, card: FamilyCard, plan: Plan, loaded: Loaded, texts: tuple[str, str | None], seed: int
) -> Link:
    """The stages of a plan, from texts to the finished latent.

    texts: the prompt, and the negative one; None = zeros.
    """
    kit, size = kit_of(card), {"width": card.size_px, "height": card.size_px}
    prompt = graph.add("CLIPTextEncode", "prompt", clip=loaded.clip, text=literal(texts[0]))
    if texts[1] is None:
        away = graph.add("ConditioningZeroOut", "negative", conditioning=prompt)
    else:
        away = graph.add("CLIPTextEncode", "negative", clip=loaded.clip, text=literal(texts[1]))
    x = graph.add(kit.latent, "latent", **size, **kit.more, batch_size=1)
    if not starts_alike(plan):
        x = _started(graph, plan, loaded, x, seed)
    for k, stage in enumerate(plan.stages):
        asked = {
            "model": loaded.networks[own(stage.member)],
            "noise_seed": seed + k * APART,
            "cfg": stage.member.guidance or 1.0,
            "positive": _told(graph, prompt, stage.member.denoiser.guidance_embedding),
            "negative": away,
            "latent_image": x,
        }
        x = (_simple if is_simple(plan) else _custom)(graph, plan, k, asked)
    final = levels_of(plan)[-1]
    if final.sigma:  # ComfyUI's latent at a level is ours over alpha
        x = graph.add("LatentMultiply", "alpha of the last level", samples=x, multiplier=final.alpha)
    return x


def _told(graph: Graph, prompt: Link, guidance: float | None) -> Link:
    """What a network is told: the prompt, and the guidance where it embeds one."""
    if guidance is None:
        return prompt
    return graph.add("FluxGuidance", "guidance", conditioning=prompt, guidance=guidance)


def _simple(graph: Graph, plan: Plan, k: int, asked: dict[str, Any]) -> Link:
    """Stage k by the scheduler `simple`."""
    stage, done = plan.stages[k], sum(len(stage.levels) for stage in plan.stages[:k])
    return graph.add(
        "KSamplerAdvanced",
        _title(plan, k),
        **asked,
        add_noise="disable" if k else "enable",
        steps=plan.steps,
        sampler_name=sampler_of(stage.member),
        scheduler="simple",
        start_at_step=done,
        end_at_step=done + len(stage.levels),
        return_with_leftover_noise="enable" if k + 1 < len(plan.stages) else "disable",
    )


def _custom(graph: Graph, plan: Plan, k: int, asked: dict[str, Any]) -> Link:
    """Stage k with its levels written out."""
    name = sampler_of(plan.stages[k].member)
    sampler = graph.add("KSamplerSelect", name, sampler_name=name)
    sigmas = graph.add("ManualSigmas", f"levels of stage {k + 1}", sigmas=written(sigmas_of(plan)[k]))
    fresh = k == 0 and starts_alike(plan)
    inputs = {"add_noise": fresh, "sampler": sampler, "sigmas": sigmas}
    return graph.add("SamplerCustom", _title(plan, k), **asked, **inputs)


def _started(graph: Graph, plan: Plan, loaded: Loaded, latent: Link, seed: int) -> Link:
    """The initial noise at another scale than a sampler's own."""
    member, level = plan.stages[0].member, levels_of(plan)[0]
    scale = start_scale(plan)[0]
    if member.noise_schedule == "flow":  # a sampler that adds no noise multiplies what it gets
        scale /= 1 - level.sigma
    inputs = {"model": loaded.networks[own(member)], "latent_image": latent}
    noise = graph.add("RandomNoise", "noise", noise_seed=seed)
    sigmas = graph.add("ManualSigmas", "scale of the noise", sigmas=written([scale]))
    return graph.add("AddNoise", "initial noise", noise=noise, sigmas=sigmas, **inputs)


def written(sigmas: Sequence[float]) -> str:
    """A list as ManualSigmas reads it, which knows no exponents."""
    return ", ".join(f"{sigma:.7f}" for sigma in sigmas)


def own(member: Member) -> str:
    """A member's name in its family."""
    return member.name.rpartition("/")[2]


def _title(plan: Plan, k: int) -> str:
    stage = plan.stages[k]
    count = len(stage.levels)
    return f"stage {k + 1}: {own(stage.member)}, {count} step{'s' if count > 1 else ''}"
