"""A control in training: the member it acts on, its weights, their optimizer, its folder and its W&B run."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import torch
from diffusers.optimization import SchedulerType, get_scheduler
from torch import Tensor, nn

from configs import UserError, folders, list_of, plain_name, tracking, versions
from controls import formats
from controls.layers import CUSTOM, targets
from controls.lora import Card, Control, continued, create, detach, extract, parameters
from models import devices, quantized
from models.families import DTYPES, Family, Memory, card, split
from models.hashing import fingerprint
from models.sampler import Member
from train.checkpoint import append, resumable, seeded, store
from train.validation import Watch, strip, watched_by


@dataclass
class Training:
    """What every trainer of controls is told."""

    name: str = "control"  # of the control, and of the run folder
    member: str = "tiny/base"  # family/member to train on
    rank: int = 4  # of the low-rank pairs
    alpha: float = 1.0  # effective strength is scale * alpha / rank
    # full, noxattn, innoxattn, selfattn, xattn, xattn-strict, …: see controls/layers.py
    layers: str = "noxattn"
    scope: str = "c3lier"  # lierla: linear layers in attention blocks; c3lier: these plus convolutions
    steps: int = 400  # optimizer steps
    # latents at once per process, all at one noise level; 0 = as the family's card says: 8, of sdxl 2
    batch_size: int = 0
    gradient_accumulation_steps: int = 1  # such batches per process and optimizer step
    # adamw, adamw8bit (extra 8bit), prodigy (extra prodigy; give it learning_rate=1)
    optimizer: str = "adamw"
    learning_rate: float = 1e-3  # learning rate
    # of the rate: constant, linear, cosine, constant_with_warmup, … as diffusers names them
    lr_scheduler: str = "cosine"
    lr_warmup_steps: int = 0  # steps in which the rate rises from 0
    ema: float = 0.0  # decay of the weights' moving average, which is then what is saved; 0 = off
    # recompute activations in the backward pass: less memory, a third more time
    gradient_checkpointing: bool = False
    seed: int = 0  # of the control, the data and the noise
    sample_every: int = 200  # steps between strips; 0 = only at the end
    sample_scales: list[float] = list_of(-2.0, -1.0, 0.0, 1.0, 2.0)  # columns of a strip
    sample_seeds: list[int] = list_of(11, 12, 13)  # rows of a strip
    save_every: int = 100  # steps between checkpoints
    # other members, e.g. [tiny/dmd], on which the effect is measured during training
    watch: list[str] = list_of()
    watch_every: int = 200  # steps between such measurements
    watch_prompts: int = 4  # of the family card's prompts, two images each
    # of the network: auto (bf16 on a GPU, fp32 on a CPU), bf16, fp32; the control is always fp32
    dtype: str = "auto"
    # the network trained on packed: nf4, int8 (extra 8bit), int8-torchao (extra torchao); empty = whole
    quantize: str = ""
    memory: Memory = field(
        default_factory=Memory
    )  # what to do without, at the price of time; a continued run may change it
    dry_run: bool = False  # --dry-run: say what will be loaded, asked and held, and stop; needs no weights
    out: str = "runs/control"  # the run is written to out/name
    overwrite: bool = False  # start afresh instead of continuing
    wandb: str = "auto"  # auto, online, offline, disabled

    def settings(self, keys: str) -> dict:
        """The values of some keys, which stand in one text: what a control's card remembers."""
        return {key: getattr(self, key) for key in keys.split()}


class Run:
    """One control on one member. A recipe asks it for steps, gives it losses, and lets it descend.

    `parts(step)` are the random generators of this process's batches of a step. They are numbered over all
    processes, so that two processes with one batch each learn what one process with
    gradient_accumulation_steps=2 learns.
    """

    def __init__(self, cfg: Training, kind: str, *texts: list[str]):
        """Looks at the folder, which `training` claims, and encodes what will be told, each list of texts at
        once.

        Then the text encoders go; the network comes when it is first asked for. Raises UserError for what
        cannot be.
        """
        check(cfg)
        self.cfg, self.kind, self.accelerator = cfg, kind, devices.start(cfg, FREE)
        family, self.member_name = split(cfg.member)
        device = cfg.memory.planned(self.accelerator.device, dry_run=False)
        self.family = Family(family, device, DTYPES[cfg.dtype], cfg.memory)
        self.folder, self.main, self.losses = Path(cfg.out) / cfg.name, self.accelerator.is_main_process, []
        outline = Family(family, bare=True).member(self.member_name).denoiser.net
        if cfg.layers != CUSTOM:  # a mistake is said now, not after the runs that are trained on
            targets(outline, cfg.layers, cfg.scope)
        texts += (watched_by(cfg, self.family.card),) if cfg.watch else ()
        for together in texts:
            self.family.encode(together)
        self.family.encode_all([text for together in texts for text in together])

    @cached_property
    def member(self) -> Member:
        """The member that is trained on, loaded when it is first asked for."""
        member = self.family.member(self.member_name, self.cfg.quantize)
        delta = member.denoiser.delta  # a LoRA student is its base's network and more
        self.fingerprint = fingerprint(member.denoiser.net) + (f"+{delta.hash[:16]}" if delta else "")
        return member

    @property
    def net(self) -> nn.Module:
        """Its network."""
        return self.member.denoiser.net

    @contextmanager
    def training(
        self, prompt: str, recipe: dict, names: Sequence[str] = (), start: Control | None = None
    ) -> Iterator[None]:
        """Attaches the fresh control, claims the folder, and gives both back. prompt: what strips draw;
        recipe: what the card remembers.

        names: of several controls that are trained side by side, instead of the config's one. start: a
        control whose weights the training begins with.
        """
        cfg, self.names = self.cfg, names or [self.cfg.name]
        self.recipe = recipe | ({"quantize": cfg.quantize} if cfg.quantize else {})
        self.watched = Watch(cfg, self.family, self.member, recipe) if cfg.watch else None
        self.prompt = self.family.encode([prompt])
        self.family.forget_encoders()  # where there were too many texts to keep
        if start:
            continued(self.net, start, cfg.name)
        for k, name in enumerate(() if start else self.names):
            create(self.net, name, cfg.layers, cfg.scope, cfg.rank, cfg.alpha, cfg.seed + k)
        try:
            self.family.bring(self.net)  # or average and optimizer would be made where it waits
            if cfg.gradient_checkpointing:
                self.net.enable_gradient_checkpointing()
            self.weights = nn.ParameterList(
                weight for name in self.names for weight in parameters(self.net, name)
            )
            self.average = deepcopy(self.weights).requires_grad_(False)
            self.optimizer = OPTIMIZERS[cfg.optimizer](self.weights, cfg.learning_rate)
            self.lr_scheduler = get_scheduler(
                cfg.lr_scheduler,
                self.optimizer,
                num_warmup_steps=cfg.lr_warmup_steps,
                num_training_steps=cfg.steps,
            )
            devices.claim(
                self.accelerator, cfg, FREE
            )  # last: what is refused has removed and written nothing
            with tracking.start(
                self.folder, asdict(cfg), f"train.{self.kind}", cfg.name, cfg.wandb
            ) as self.tracker:
                yield
        finally:
            folders.release()
            self.net.disable_gradient_checkpointing()
            detach(self.net)

    @property
    def state(self) -> dict:
        return {
            "weights": self.weights,
            "average": self.average,
            "optimizer": self.optimizer,
            "lr_scheduler": self.lr_scheduler,
        }

    def steps(self) -> Iterator[int]:
        """The steps still to do; a killed run goes on at its last checkpoint."""
        cfg = self.cfg
        path, bound = self.folder / "state.pt", folders.digest(cfg, FREE)
        return resumable(path, self.state, cfg.steps, cfg.save_every, cfg.name, self.main, bound)

    def parts(self, step: int) -> Iterator[torch.Generator]:
        """One generator per batch of this process in this step."""
        for turn in range(self.cfg.gradient_accumulation_steps):
            yield seeded(
                self.cfg.seed, step, turn * self.accelerator.num_processes + self.accelerator.process_index
            )

    def backward(self, loss: Tensor) -> None:
        """Adds a batch's gradient.

        Inside the `strength` block of the forward pass, for checkpointing runs the network once more.
        """
        share = loss / self.cfg.gradient_accumulation_steps
        share.backward()
        self.losses.append(share.detach())

    def descend(self, step: int) -> None:
        """One optimizer step on the mean gradient of all processes.

        When it is not finite: saves the state before it, raises UserError.
        """
        trained = [weight for weight in self.weights if weight.grad is not None]
        for weight, mean in zip(
            trained, self.accelerator.mean([weight.grad for weight in trained]), strict=True
        ):
            weight.grad = mean
        norm = nn.utils.clip_grad_norm_(self.weights, 1.0)
        if not torch.isfinite(norm):
            if self.main:
                store(self.folder / "state.pt", self.state, step, folders.digest(self.cfg, FREE))
            raise UserError(
                f"the gradient is not finite at step {step}; the state before it is saved; "
                f"try a learning_rate below {self.cfg.learning_rate}"
            )
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(self.cfg.ema, step / (step + 10))
        torch._foreach_lerp_(list(self.average), [weight.detach() for weight in self.weights], 1 - decay)
        loss, self.losses = torch.stack(self.losses).sum(), []
        if self.main:
            self.show(step, loss, norm)

    def show(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Logs every tenth step; draws a strip when one is due."""
        cfg = self.cfg
        if step % 10 == 0:
            values = {
                "loss": loss.item(),
                "gradient": norm.item(),
                "learning_rate": self.lr_scheduler.get_last_lr()[0],
            }
            append(self.folder / "log.jsonl", {"step": step, **values})
            self.tracker.log(values, step=step)
        if cfg.sample_every and (step + 1) % cfg.sample_every == 0 and step + 1 < cfg.steps:
            self.draw(self.folder / f"samples/step-{step + 1:05d}.png")
        if self.watched and (step + 1) % cfg.watch_every == 0:
            values = self.watched(self.control(cfg.name))
            append(self.folder / "watch.jsonl", {"step": step, **values})
            self.tracker.log(
                {f"watch/{key}": value for key, value in values.items() if value is not None}, step=step
            )

    def control(self, name: str, **more) -> Control:
        """A control as it is now; more: what its own recipe adds."""
        cfg = self.cfg
        card = Card(
            self.kind,
            name,
            self.family.card.name,
            self.member_name,
            cfg.rank,
            cfg.alpha,
            cfg.layers,
            cfg.scope,
            {**self.recipe, **more},
            self.fingerprint,
            versions(),
        )
        return Control(card, extract(self.net, name))

    def draw(self, path: Path) -> Path:
        """A strip of the control as it is now, or one picture of several."""
        strip(self.family, self.member, self.prompt, self.cfg, self.names, path)
        self.tracker.image("samples", path, f"{', '.join(self.names)} at {self.cfg.sample_scales}")
        return path

    def save(self) -> Path:
        """Writes the control, averaged where asked, and its last strip; returns the control's path.

        Call it within `training`.
        """
        self.settle()
        path = self.folder / "control.safetensors"
        if self.main:
            self.write(self.control(self.cfg.name), path)
            print(f"picture across scales: {self.draw(self.folder / 'samples/final.png')}")
        return path

    def multiply(self, factor: float) -> None:
        """Makes the control stronger, by its B."""
        for weights in (self.weights, self.average):
            for b in list(weights)[1::2]:
                b.data *= factor

    def settle(self) -> None:
        """Puts the average in the weights' place."""
        self.weights.load_state_dict(self.average.state_dict())

    def write(self, control: Control, path: Path) -> None:
        """A control to its file and to W&B."""
        formats.save(control, path)
        self.tracker.artifact(path, control.card.name, "control")
        print(f"control: {path}")


def adamw(weights, learning_rate: float):
    return torch.optim.AdamW(weights, learning_rate, weight_decay=0.0)


def adamw8bit(weights, learning_rate: float):
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(weights, learning_rate, weight_decay=0.0)


def prodigy(weights, learning_rate: float):
    """Mishchenko & Defazio 2023; finds the step size itself."""
    from prodigyopt import Prodigy

    return Prodigy(weights, learning_rate, safeguard_warmup=True, use_bias_correction=True)


LR_SCHEDULERS = [
    kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT
]  # that one needs rules
OPTIMIZERS = {"adamw": adamw, "adamw8bit": adamw8bit, "prodigy": prodigy}
EXTRAS = {
    "adamw8bit": ("bitsandbytes", "8bit"),
    "prodigy": ("prodigyopt", "prodigy"),
}  # optimizer: its package, and what installs it
FREE = ("wandb", "out", "memory")  # what a continued run may change


def check(cfg: Training) -> None:
    """What can be wrong before anything is loaded; fills in the card's batch."""
    cfg.batch_size = cfg.batch_size or card(split(cfg.member)[0]).batch_size
    if "." in plain_name(cfg.name):
        raise UserError(f"name={cfg.name} cannot name a control: it has a dot")
    for key, known in {"dtype": DTYPES, "optimizer": OPTIMIZERS, "lr_scheduler": LR_SCHEDULERS}.items():
        if getattr(cfg, key) not in known:
            raise UserError(f"no {key} {getattr(cfg, key)!r}; there are {', '.join(known)}")
    package, extra = EXTRAS.get(cfg.optimizer, ("torch", ""))
    if find_spec(package) is None:
        raise UserError(f"optimizer={cfg.optimizer} needs {package}: pip install -e '.[{extra}]'")
    quantized.check(cfg.quantize)
    for key in ("steps", "rank", "batch_size"):
        if getattr(cfg, key) < 1:
            raise UserError(f"{key} must be at least 1; got {getattr(cfg, key)}")
