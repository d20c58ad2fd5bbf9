"""ComfyUI in tests: what its nodes take and give, a check of workflows by that, and its own nodes on toy
networks where the environment variable COMFYUI names a checkout.

Of the libraries that a checkout asks for, those that are not here are stood in for: no node that is used
needs them.
"""

import asyncio
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch

FILE = "any file of the folder"  # a choice that stands for all that lie there


@dataclass
class Node:
    """What a node takes, by name: a type, or a list of choices, and the least and most of a number; and the
    types that it gives.
    """

    required: dict[str, tuple]
    gives: list[str]
    optional: dict[str, tuple] = field(default_factory=dict)


def problems(workflow: dict[str, dict], nodes: dict[str, Node]) -> list[str]:
    """What is wrong with a workflow of ComfyUI's API, by definitions of its nodes."""
    wrong = []
    for number, node in workflow.items():
        kind, inputs = node["class_type"], node["inputs"]
        if kind not in nodes:
            wrong.append(f"{number}: no node {kind}")
            continue
        takes = {**nodes[kind].required, **nodes[kind].optional}
        wrong += [f"{number} {kind}: {key} is missing" for key in nodes[kind].required.keys() - inputs.keys()]
        wrong += [f"{number} {kind}: it takes no {key}" for key in inputs.keys() - takes.keys()]
        for key in inputs.keys() & takes.keys():
            fault = _fault(inputs[key], takes[key], workflow, nodes)
            wrong += [f"{number} {kind}: {key} {fault}"] if fault else []
    if not any(node["class_type"] == "SaveImage" for node in workflow.values()):
        wrong.append("nothing is saved")
    return wrong


def _fault(value: Any, takes: tuple, workflow: dict, nodes: dict[str, Node]) -> str:
    """What is wrong with one input; nothing where it is right."""
    kind, least, most = takes
    if isinstance(value, list):
        number, which = value
        source = nodes.get(workflow.get(number, {}).get("class_type"))
        if source is None or not 0 <= which < len(source.gives):
            return f"comes from {value}, which there is not"
        return "" if source.gives[which] == kind else f"is {source.gives[which]}, not {kind}"
    if isinstance(kind, list):
        text = isinstance(value, str) and value
        return "" if value in kind or (FILE in kind and text) else f"is {value!r}, none of {kind[:4]}"
    types = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}
    if kind not in types:
        return f"is {value!r}, not a link to {kind}"
    if not isinstance(value, types[kind]) or (isinstance(value, bool) and kind != "BOOLEAN"):
        return f"is {value!r}, not {kind}"
    number = kind in ("INT", "FLOAT")
    return f"is {value}, not from {least} to {most}" if number and not least <= value <= most else ""


# a checkout


ABSENT = {  # what a checkout asks for and no node here needs
    *("torchsde", "comfy_aimdo", "comfy_kitchen", "einops", "av", "alembic", "sqlalchemy", "aiohttp", "yarl"),
    *("simpleeval", "blake3", "kornia", "spandrel", "torchaudio", "sentencepiece", "torchvision", "psutil"),
    *("server", "app"),
}


class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds anything in the packages of ABSENT that are not installed."""

    def __init__(self):
        self.names = {name for name in ABSENT if importlib.util.find_spec(name) is None}

    def find_spec(self, name, path=None, target=None):
        known = name.partition(".")[0] in self.names
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__name__ = [], spec, spec.name
        return module

    def exec_module(self, module):
        pass


@contextmanager
def checkout() -> Iterator[SimpleNamespace]:
    """A checkout's modules and nodes by name, imported for a while."""
    home, before = str(Path(os.environ["COMFYUI"]).resolve()), set(sys.modules)
    stand_in = StandIn()
    sys.meta_path.insert(0, stand_in)
    sys.path.insert(0, home)
    try:
        importlib.import_module("comfy.cli_args").args.cpu = True
        importlib.import_module("folder_paths").get_filename_list = lambda folder: [FILE]
        nodes = importlib.import_module("nodes")
        importlib.import_module("comfy.utils").set_progress_bar_enabled(False)
        # two of the extra nodes' files import each other, and only this one can be first
        importlib.import_module("comfy_extras.nodes_post_processing")
        kinds = dict(nodes.NODE_CLASS_MAPPINGS)
        for name in ("custom_sampler", "flux", "sd3", "model_advanced", "latent", "hunyuan"):
            kinds |= extra(importlib.import_module(f"comfy_extras.nodes_{name}"))
        yield SimpleNamespace(
            kinds=kinds,
            **{
                name: importlib.import_module(f"comfy.{name}")
                for name in ("model_base", "supported_models", "model_patcher", "samplers", "utils", "lora")
            },
        )
    finally:
        gc.collect()  # what patches models undoes it while its modules are there
        sys.path.remove(home)
        sys.meta_path.remove(stand_in)
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if name.partition(".")[0] in stand_in.names or (isinstance(file, str) and file.startswith(home)):
                del sys.modules[name]


def extra(module) -> dict[str, type]:
    """The nodes of one of the files of extra nodes, of the older and of the newer kind."""
    if hasattr(module, "NODE_CLASS_MAPPINGS"):
        return dict(module.NODE_CLASS_MAPPINGS)

    async def listed() -> list[type]:
        return await (await module.comfy_entrypoint()).get_node_list()

    return {kind.GET_SCHEMA().node_id: kind for kind in asyncio.run(listed())}


def definitions(comfy: SimpleNamespace) -> dict[str, Node]:
    """What a checkout's nodes take and give."""
    found = {}
    for name, kind in comfy.kinds.items():
        takes = kind.INPUT_TYPES()
        parts = [
            {key: _spec(*how) for key, how in takes.get(part, {}).items()}
            for part in ("required", "optional")
        ]
        found[name] = Node(parts[0], [str(one) for one in kind.RETURN_TYPES], parts[1])
    return found


def _spec(kind: Any, options: dict | None = None) -> tuple:
    options = options or {}
    if kind == "COMBO":
        kind = options.get("options", ["of a server alone"])
    least, most = options.get("min", -math.inf), options.get("max", math.inf)
    return (list(kind) if isinstance(kind, list | tuple) else str(kind)), least, most


# a workflow run by a checkout's own nodes, with toys for networks, text encoders and VAE


class Toy(torch.nn.Module):
    """A network that depends on all that it is told, and is computed at once."""

    def __init__(self, weight: float = 0.0, hour: float = 1.0, **_):
        """hour: what ComfyUI calls 1000 of our t."""
        super().__init__()
        self.weight, self.hour, self.dtype = torch.nn.Parameter(torch.tensor(weight)), hour, torch.float32

    def forward(self, x, t, context=None, **_):
        shape = (-1, *[1] * (x.ndim - 1))
        told = context[:, 0, 0].reshape(shape).to(x)
        return torch.tanh(self.weight * x + 0.5 * t.reshape(shape).to(x) / self.hour + 0.1 * told)


def call_toy(net: Toy, x, t, prompts, guidance):
    """The same for our denoiser, whose t is 1000 of a flow's sigma 1 and the training step of others."""
    return net(x, torch.full((len(x),), float(t)) * net.hour / 1000, prompts.tokens)


def run(comfy: SimpleNamespace, workflow: dict, patchers: dict[str, Any], size: int = 8) -> torch.Tensor:
    """The latent that a workflow decodes, (B, C, H, W), as the network has it.

    patchers: file of a network to its model; text encoders say how long their text is.
    """
    held = {}
    for number, node in workflow.items():
        kind, inputs = node["class_type"], dict(node["inputs"])
        for key, value in inputs.items():
            if isinstance(value, list):
                inputs[key] = held[value[0]][value[1]]
        if kind in ("CheckpointLoaderSimple", "UNETLoader"):
            held[number] = (patchers[inputs.get("ckpt_name") or inputs["unet_name"]], None, None)
        elif kind == "LoraLoaderModelOnly":
            held[number] = (heavier(comfy, inputs["model"], inputs["strength_model"]),)
        elif kind == "CLIPTextEncode":
            held[number] = ([[torch.full((1, 1, 4), len(inputs["text"]) / 10), {}]],)
        elif kind.endswith(("CLIPLoader", "VAELoader")):
            held[number] = (None,)
        elif kind == "VAEDecode":
            model = next(iter(patchers.values())).model
            latent = model.process_latent_in(inputs["samples"]["samples"])
            return latent.squeeze(2) if latent.ndim == 5 else latent
        else:
            scale = 16 if kind == "EmptyFlux2LatentImage" else 8
            small = dict.fromkeys(("width", "height"), size * scale)
            inputs |= {key: small[key] for key in inputs.keys() & small.keys()}
            held[number] = asked(comfy.kinds[kind], inputs)
    raise AssertionError("nothing is decoded")


def asked(kind: type, inputs: dict) -> tuple:
    """What a node of the newer or the older kind gives."""
    if hasattr(kind, "GET_SCHEMA"):
        return kind.execute(**inputs).result
    return getattr(kind(), kind.FUNCTION)(**inputs)


def patcher(comfy: SimpleNamespace, config: str, kind: str, weight: float) -> Any:
    """A toy as ComfyUI holds a network of one of its families."""
    made = object.__new__(getattr(comfy.supported_models, config))
    made.unet_config, made.custom_operations, made.manual_cast_dtype = {}, None, None
    made.latent_format, made.optimizations = type(made).latent_format(), {}
    kind = getattr(comfy.model_base.ModelType, kind)
    model = comfy.model_base.BaseModel(made, kind, device="cpu", unet_model=Toy)
    hour = float(model.model_sampling.timestep(torch.tensor(1.0))) if "FL" in kind.name else 1000.0
    model.diffusion_model = Toy(weight, hour)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def heavier(comfy: SimpleNamespace, held: Any, strength: float) -> Any:
    """What a LoRA makes of a toy: a network with another weight."""
    net = held.get_model_object("diffusion_model")
    new = held.clone()
    new.add_object_patch("diffusion_model", Toy(weight_with(net.weight.item(), strength), net.hour))
    return new


def weight_with(weight: float, strength: float) -> float:
    return weight + 0.1 * strength


def noise_of(workflow: dict, plan, shape: tuple[int, ...]) -> torch.Tensor:
    """The noise that ComfyUI draws for a workflow on a CPU, as our sampler takes it: (1, steps + 1, *shape).

    The initial one by its seed; in each stage's node the fresh ones by its seed plus one, in turn.
    """
    kinds = ("KSamplerAdvanced", "SamplerCustom")
    seeds = [node["inputs"]["noise_seed"] for node in workflow.values() if node["class_type"] in kinds]
    found = [torch.randn((1, *shape), generator=torch.Generator().manual_seed(seeds[0]))]
    for seed, stage in zip(seeds, plan.stages, strict=True):
        fresh = torch.Generator().manual_seed(seed + 1)
        found += [torch.randn((1, *shape), generator=fresh) for _ in stage.levels]
    return torch.stack(found, dim=1)
