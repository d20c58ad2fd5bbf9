"""The embedded students: distribution matching, consistency and trajectory distillation of the base."""

import copy
from functools import partial
from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler, LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from configs import replacing
from models.noise import TRAIN_STEPS
from models.tiny.networks import predict
from train.checkpoint import resumable, seeded
from train.tiny_base import BETAS, dataset, levels, noised
from train.tiny_parts import Config, Fit, Log, fast, follow, shadow, step_down

FEW_STEPS = (999, 749, 499, 249)


class Teacher:
    """The frozen base: x0 under guidance, and encoded captions. It has what its students learn from, too."""

    def __init__(self, cfg: Config, guidance: float = 3.0):
        pipe = StableDiffusionXLPipeline.from_pretrained(Path(cfg.weights) / "base", dtype=torch.float32)
        self.pipe, self.guidance = pipe.to(cfg.device), guidance
        self.unet = self.pipe.unet.to(memory_format=torch.channels_last).eval().requires_grad_(False)
        self.net = fast(self.unet, cfg)
        self.data = dataset(cfg, self.pipe.tokenizer).to(cfg.device)

    @torch.no_grad()
    def text(self, ids) -> tuple[Tensor, Tensor]:
        one = self.pipe.text_encoder(ids, output_hidden_states=True)
        two = self.pipe.text_encoder_2(ids, output_hidden_states=True)
        return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1), two.text_embeds

    @torch.no_grad()
    def eps(self, x, t, states, pooled) -> Tensor:
        """Guided eps: the prompt's against zeros, one batch of two."""
        both = predict(
            self.net,
            torch.cat([x, x]),
            torch.cat([t, t]),
            torch.cat([states * 0, states]),
            torch.cat([pooled * 0, pooled]),
        )
        without, with_ = both.chunk(2)
        return without + self.guidance * (with_ - without)

    def student(self) -> UNet2DConditionModel:
        """A trainable copy."""
        return copy.deepcopy(self.unet).requires_grad_(True).train()


def clean(x, eps, t) -> Tensor:
    alpha, sigma = levels(t)
    return (x - sigma * eps) / alpha


def x0_of(net, x, t, states, pooled) -> Tensor:
    """The clean latent that a network sees at x."""
    return clean(x, predict(net, x, t, states, pooled), t)


def lightning(cfg: Config) -> None:
    """Trajectory distillation: the student jumps between points of the teacher's 20-step guided DDIM
    trajectories, 4 trailing steps.
    """
    steps, size = cfg.steps or 750, cfg.batch_size or 32
    teacher = Teacher(cfg)
    points, ids = (part.to(cfg.device) for part in trajectories(cfg, teacher))
    student = teacher.student()
    net = fast(student, cfg)
    grid = torch.tensor([*FEW_STEPS, -1], device=cfg.device)
    fit = Fit(cfg, "lightning", student, steps, 4e-4, warmup=0.05, beta=0.99, slow=0.998)
    for generator in fit.steps(1):
        rows = torch.randint(len(points), (size,), generator=generator).to(cfg.device)
        jump = torch.randint(4, (size,), generator=generator).to(cfg.device)
        x, goal, t = points[rows, jump], points[rows, jump + 1], grid[jump]
        states, pooled = teacher.text(ids[rows])
        alpha, sigma = levels(t)
        next_alpha, next_sigma = levels(grid[jump + 1].clamp(min=0))
        last = (jump == 3)[:, None, None, None]
        next_alpha, next_sigma = torch.where(last, 1.0, next_alpha), torch.where(last, 0.0, next_sigma)
        # the eps with which one DDIM update goes from x to the goal, Salimans & Ho 2022, app. G
        ratio = next_alpha / alpha
        wanted = (goal - ratio * x) / (next_sigma - ratio * sigma)
        weight = (sigma / alpha).clamp(max=5)
        fit.learn(((predict(net, x, t, states, pooled) - wanted) * weight).square().mean())
    save_student(cfg, "lightning", fit.average, EulerDiscreteScheduler(timestep_spacing="trailing", **BETAS))


@torch.no_grad()
def trajectories(cfg: Config, teacher: Teacher) -> tuple[Tensor, Tensor]:
    """Teacher trajectories at the student's levels and the end, (N, 5, 4, 16, 16), and captions' ids."""
    path, size = Path(cfg.work) / f"trajectories-{cfg.trajectories}-{cfg.seed}.safetensors", 80
    if not path.exists():
        points, texts = [], []
        for part in tqdm(range(cfg.trajectories // size), "trajectories", mininterval=2):
            generator = seeded(cfg.seed, part, 2)
            _, ids = teacher.data.batch(size, generator)
            x = torch.randn(size, 4, 16, 16, generator=generator).to(cfg.device)
            points.append(trajectory(teacher, x, *teacher.text(ids)))
            texts.append(ids)
        with replacing(path) as new:
            save_file({"points": torch.cat(points), "ids": torch.cat(texts)}, new)
    saved = load_file(path)
    return saved["points"], saved["ids"]


def trajectory(teacher: Teacher, x: Tensor, states: Tensor, pooled: Tensor) -> Tensor:
    """x at the student's levels and at the end of 20 DDIM steps, (B, 5, C, H, W)."""
    grid, kept = torch.tensor([*range(999, 0, -50), -1], device=x.device), []
    for t, after in zip(grid[:-1], grid[1:], strict=True):
        if t in FEW_STEPS:
            kept.append(x)
        eps = teacher.eps(x, t.expand(len(x)), states, pooled)
        alpha, sigma = levels(after.clamp(min=0).expand(len(x))) if after >= 0 else (1.0, 0.0)
        x = alpha * clean(x, eps, t.expand(len(x))) + sigma * eps
    return torch.stack([*kept, x], 1)


def lcm(cfg: Config) -> None:
    """Consistency distillation (Luo et al. 2023): x0 at a level agrees with x0 one guided DDIM step further
    down; k = 20 of 1000.
    """
    steps, size, skip = cfg.steps or 2000, cfg.batch_size or 24, 20
    teacher = Teacher(cfg)
    student = teacher.student()
    fit = Fit(cfg, "lcm", student, steps, 2e-4, warmup=0.05, beta=0.99, slow=0.95)
    net, slow = fast(student, cfg), fast(fit.average, cfg)
    for generator in fit.steps(3):
        x0, ids = teacher.data.batch(size, generator)
        states, pooled = teacher.text(ids)
        # 19, 39, … 999
        t = torch.randint(1, TRAIN_STEPS // skip + 1, (size,), generator=generator) * skip - 1
        t = t.to(cfg.device)
        x = noised(x0, t, torch.randn(x0.shape, generator=generator).to(cfg.device))
        with torch.no_grad():
            eps = teacher.eps(x, t, states, pooled)
            below = (t - skip).clamp(min=0)
            guided = clean(x, eps, t)
            goal = x0_of(slow, noised(guided, below, eps), below, states, pooled)
            goal = torch.where((t < skip)[:, None, None, None], guided, goal)
        fit.learn(huber(x0_of(net, x, t, states, pooled) - goal))
    save_student(cfg, "lcm", fit.average, LCMScheduler(**BETAS))


def huber(error: Tensor, c: float = 0.03) -> Tensor:
    """Pseudo-Huber distance, as LCM's trainer uses it."""
    return ((error.square() + c * c).sqrt() - c).mean()


def adversary(net, learning_rate: float, warmup: int = 50):
    """Optimizer and warm-up of a network that another one follows: no momentum, as in DMD2."""
    betas = (0.0, 0.99)
    optimizer = torch.optim.AdamW(net.parameters(), learning_rate, betas=betas, weight_decay=0.0, fused=True)
    return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, warmup)


def dmd8(cfg: Config) -> None:
    """As dmd, with the guidance that DMD2's authors give the teacher on SDXL."""
    dmd(cfg, "dmd8", guidance=8.0)


def dmd(cfg: Config, name: str = "dmd", guidance: float = 3.0) -> None:
    """Distribution matching (Yin et al. 2024, DMD2 without real data): 4 re-noised steps, guided teacher
    against a fake-score network.

    guidance: of the teacher, which the student has distilled in.
    """
    beside = name == "dmd" and cfg.teacher_guidance is not None  # a student that is not shipped
    if beside:
        name, guidance = f"dmd-g{cfg.teacher_guidance:g}", cfg.teacher_guidance
    steps, size, updates = cfg.steps or 800, cfg.batch_size or 24, 2
    teacher = Teacher(cfg, guidance)
    student, fake = teacher.student(), teacher.student()
    average = shadow(student)
    net, fake_net = fast(student, cfg), fast(fake, cfg)
    (optimizer, schedule), (fake_optimizer, fake_schedule) = adversary(student, 1e-4), adversary(fake, 2e-4)
    state = {
        "student": student,
        "average": average,
        "fake": fake,
        "optimizer": optimizer,
        "fake_optimizer": fake_optimizer,
        "schedule": schedule,
        "fake_schedule": fake_schedule,
    }
    log = Log(cfg, name)
    for step in resumable(Path(cfg.work) / f"{name}.pt", state, steps, cfg.every, name):
        generator = seeded(cfg.seed, step, 4)
        _, ids = teacher.data.batch(size, generator)
        states, pooled = teacher.text(ids)
        draw = partial(torch.randn, size, 4, 16, 16, generator=generator)
        x, stop = draw().to(cfg.device), int(torch.randint(4, (1,), generator=generator))
        for k in range(stop):  # backward simulation: the student sees its own intermediate states
            t = torch.full((size,), FEW_STEPS[k], device=cfg.device)
            with torch.no_grad():
                x = noised(x0_of(net, x, t, states, pooled), t - 250, draw().to(cfg.device))
        t = torch.full((size,), FEW_STEPS[stop], device=cfg.device)
        x0 = x0_of(net, x, t, states, pooled)
        with torch.no_grad():
            s = torch.randint(20, 980, (size,), generator=generator).to(cfg.device)
            noisy = noised(x0, s, draw().to(cfg.device))
            real = clean(noisy, teacher.eps(noisy, s, states, pooled), s)
            false = x0_of(fake_net, noisy, s, states, pooled)
            gradient = (false - real) / (x0 - real).abs().mean((1, 2, 3), keepdim=True)  # DMD, eq. 8
        loss = 0.5 * (x0 - (x0 - gradient).detach()).square().mean()
        step_down(loss, student, optimizer, schedule, clip=10.0)
        for _ in range(updates):
            s = torch.randint(TRAIN_STEPS, (size,), generator=generator).to(cfg.device)
            eps = draw().to(cfg.device)
            error = predict(fake_net, noised(x0.detach(), s, eps), s, states, pooled) - eps
            fake_loss = error.square().mean()
            step_down(fake_loss, fake, fake_optimizer, fake_schedule)
        follow(average, student, min(0.98, step / (step + 10)))
        log(step, gradient=gradient.abs().mean(), fake=fake_loss)
    save_student(cfg, name, average, LCMScheduler(**BETAS), cfg.work if beside else "")


def save_student(cfg: Config, name: str, unet, scheduler, folder: str = "") -> None:
    """A student as it is published: a U-Net folder with its scheduler config, fp16.

    folder: where it goes; empty = to the weights of the family.
    """
    path = Path(folder or cfg.weights) / name
    copy.deepcopy(unet).half().save_pretrained(path)
    scheduler.save_pretrained(path / "scheduler")
