"""What share of a transfer cell is spent outside network, VAE and evaluators: python -m analysis.bench
[key=value ...]

Or make bench-transfer. Draws one control on every target as the transfer validator does, and takes the
seconds inside of each. What is left is everything else: putting the control into the weights, noise, updates,
files.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from analysis import transfer
from analysis.images.cache import Drawings, Job, make
from analysis.session import Session
from configs import entry, list_of, merge
from configs.screen import show_table
from models.sampler import Plan

PARTS = ("network", "VAE", "evaluators")
SAME = ("family", "targets", "prompts", "max_prompts", "seeds", "evaluators", "dtype", "quantize")


@dataclass
class Config:
    family: str = "tiny"  # a card in configs/families, or the path of one
    control: str = "controls/tiny/smile.safetensors"  # the control
    targets: list[str] = list_of()  # members, or plans as analysis.transfer takes them; empty = all members
    prompts: list[str] = list_of()  # as analysis.transfer takes them; empty = the family card's prompts
    max_prompts: int = 8  # drawn at once, with all their seeds
    seeds: int = 4  # images per prompt
    evaluators: list[str] = list_of()  # of the family's card; empty = all that read words
    dtype: str = "auto"  # of the networks: auto (bf16 on a GPU, fp32 on a CPU), bf16, fp32
    quantize: str = ""  # networks packed: nf4, int8 (extra 8bit), int8-torchao (extra torchao); empty = whole
    rounds: int = 3  # how often each is timed; the one with the least outside counts


def main(cfg: Config) -> None:
    """Prints seconds by part, images per second and the share outside, per target and over all."""
    rows, total = [], Counter()
    with tempfile.TemporaryDirectory() as folder:
        words = {key: getattr(cfg, key) for key in SAME}
        words |= {"controls": [cfg.control], "cache": folder, "out": folder, "references": False}
        design = transfer.prepare(Session("analysis.transfer", merge(transfer.Config, words), ()))
        drawings, (subject,) = design.parts[0], design.subjects
        drawings.family.encode_all(drawings.texts)
        for target in design.targets:
            drawings.family.keep(())
            spent, count = drawn(drawings, Job(target, subject.name, 1.0), cfg.rounds), len(drawings.numbers)
            total += spent
            parts = {part: f"{spent[part]:.2f}" for part in PARTS}
            speed, rest = f"{count / spent['whole']:.3g}", f"{100 * outside(spent):.1f} %"
            about = {"target": target, "images": str(count), "drawn in": f"{spent['whole']:.2f}"}
            rows.append({**about, **parts, "images per second": speed, "outside": rest})
    show_table("Seconds of a drawing by part", rows)
    print(f"outside network, VAE and evaluators: {100 * outside(total):.1f} % of {total['whole']:.1f} s")


def drawn(drawings: Drawings, job: Job, rounds: int) -> Counter[str]:
    """Seconds of a drawing, whole and by part, in the round in which the least of it was outside."""
    plan, found = drawings.plan(job.target), []
    make([drawings], job)  # what is prepared once is prepared now
    for _ in range(rounds):
        for path in drawings.files(job):
            path.unlink(missing_ok=True)
        drawings.whole.clear()
        with clocked(drawings, plan) as spent:
            start = now(drawings.family.device)
            make([drawings], job)
            spent["whole"] = now(drawings.family.device) - start
        found.append(spent)
    return min(found, key=outside)


def outside(spent: Counter[str]) -> float:
    """The share of a drawing that is spent in none of its parts."""
    return 1 - sum(spent[part] for part in PARTS) / spent["whole"]


@contextmanager
def clocked(drawings: Drawings, plan: Plan) -> Iterator[Counter[str]]:
    """Inside, the seconds that a plan's networks, the VAE's decoder and the evaluators are at work add up in
    what is yielded.
    """
    spent, device, begun = Counter(), drawings.family.device, []
    parts = [("network", net) for net in {member.denoiser.net: None for member in plan.members}]
    with ExitStack() as stack:
        for part, module in [*parts, ("VAE", drawings.family.pipe.vae.decoder)]:
            stack.callback(module.register_forward_pre_hook(lambda *_: begun.append(now(device))).remove)
            hook = partial(_ended, spent, part, begun, device)
            stack.callback(module.register_forward_hook(lambda *_, hook=hook: hook()).remove)
        for evaluator in drawings.evaluators.values():
            stack.callback(partial(delattr, evaluator, "features"))
            evaluator.features = partial(_timed, evaluator.features, spent, device)
        yield spent


def _ended(spent: Counter[str], part: str, begun: list[float], device: torch.device) -> None:
    spent[part] += now(device) - begun.pop()


def _timed(features: Callable, spent: Counter[str], device: torch.device, images: torch.Tensor):
    start = now(device)
    found = features(images)
    spent["evaluators"] += now(device) - start
    return found


def now(device: torch.device) -> float:
    """Seconds, once a device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    entry(main, Config)
