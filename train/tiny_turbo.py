"""The embedded turbo: the base distilled adversarially, in 1 to 4 steps, as SDXL-Turbo."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import EulerAncestralDiscreteScheduler, UNet2DConditionModel
from torch import Tensor, nn

from models.noise import TRAIN_STEPS
from models.tiny.networks import predict
from train.checkpoint import resumable, seeded
from train.tiny_base import BETAS, levels, noised
from train.tiny_parts import Config, Log, fast, follow, shadow, step_down
from train.tiny_students import FEW_STEPS, Teacher, adversary, clean, save_student, x0_of

DISTILLATION = 2.5  # weight of the score distillation loss beside the adversarial one, ADD's λ
R1 = 1e-5  # gradient penalty of the discriminator's heads, ADD's γ


class Discriminator(nn.Module):
    """Heads on the features of a frozen network, conditioned on the caption by projection (Miyato & Koyama
    2018).

    The features are the base's own blocks at a noise level, as in latent ADD (Sauer et al. 2024): those of
    ADD itself, of an image encoder, would train the student on what evaluates it here.
    """

    def __init__(self, net: UNet2DConditionModel, pooled: int, width: int = 64):
        super().__init__()
        frozen = shadow(net).eval()
        self.frozen = [frozen]  # in a list: it has no state to save
        self.seen: list[Tensor] = []
        for block in (*frozen.down_blocks, frozen.mid_block):
            block.register_forward_hook(self._keep)
        channels = [*frozen.config.block_out_channels, frozen.config.block_out_channels[-1]]
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(size, width, 3, padding=1),
                nn.GroupNorm(8, width),
                nn.LeakyReLU(0.2),
                nn.Conv2d(width, width, 3, padding=1),
                nn.GroupNorm(8, width),
                nn.LeakyReLU(0.2),
            )
            for size in channels
        )
        self.plain = nn.ModuleList(nn.Conv2d(width, 1, 1) for _ in channels)
        self.project = nn.ModuleList(nn.Linear(pooled, width) for _ in channels)

    def _keep(self, block: nn.Module, inputs: tuple, output: tuple | Tensor) -> None:
        self.seen.append(output[0] if isinstance(output, tuple) else output)

    def features(self, x: Tensor, t: Tensor, states: Tensor, pooled: Tensor) -> list[Tensor]:
        """What the frozen blocks hold of noised latents, (B, C, H, W) each."""
        self.seen.clear()
        predict(self.frozen[0], x, t, states, pooled)
        return list(self.seen)

    def forward(self, features: list[Tensor], pooled: Tensor) -> list[Tensor]:
        """Logits of every head, (B, H, W): above 0 for what is real."""
        logits = []
        for seen, head, plain, project in zip(features, self.heads, self.plain, self.project, strict=True):
            hidden = head(seen)
            logits.append((plain(hidden) + (hidden * project(pooled)[:, :, None, None]).sum(1, True))[:, 0])
        return logits


def judged_apart(
    judge: Discriminator, real: list[Tensor], fake: list[Tensor], pooled: Tensor
) -> tuple[Tensor, Tensor]:
    """The discriminator's hinge loss, mean over heads, and the penalty on its slopes at what is real (R1)."""
    real = [seen.requires_grad_() for seen in real]
    on_real, on_fake = judge(real, pooled), judge(fake, pooled)
    hinge = sum(F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(on_real, on_fake, strict=True))
    slopes = torch.autograd.grad(sum(logit.sum() for logit in on_real), real, create_graph=True)
    return hinge / len(on_real), sum(slope.square().flatten(1).sum(1).mean() for slope in slopes)


def turbo(cfg: Config) -> None:
    """Adversarial diffusion distillation (Sauer et al. 2023), with scores of the guided base."""
    steps, size = cfg.steps or 1000, cfg.batch_size or 24
    torch.manual_seed(cfg.seed)
    teacher = Teacher(cfg)
    student = teacher.student()
    average = shadow(student)
    judge = Discriminator(teacher.unet, teacher.pipe.text_encoder_2.config.projection_dim).to(cfg.device)
    net = fast(student, cfg)
    optimizer, schedule = adversary(student, 1e-4)
    heads, heads_schedule = adversary(judge, 3e-4, warmup=10)
    state = {
        "student": student,
        "average": average,
        "judge": judge,
        "optimizer": optimizer,
        "heads": heads,
        "schedule": schedule,
        "heads_schedule": heads_schedule,
    }
    log = Log(cfg, "turbo")
    levels_seen = torch.tensor(FEW_STEPS, device=cfg.device)
    for step in resumable(Path(cfg.work) / "turbo.pt", state, steps, cfg.every, "turbo"):
        generator = seeded(cfg.seed, step, 6)
        real, ids = teacher.data.batch(size, generator)
        states, pooled = teacher.text(ids)
        noises = torch.randn(4, *real.shape, generator=generator).to(cfg.device)
        t = levels_seen[torch.randint(4, (size,), generator=generator)]
        first = (t == FEW_STEPS[0])[:, None, None, None]
        x = torch.where(first, noises[0], noised(real, t, noises[0]))
        fake = x0_of(net, x, t, states, pooled)

        judged = torch.randint(20, 600, (size,), generator=generator).to(cfg.device)
        logits = judge(judge.features(noised(fake, judged, noises[1]), judged, states, pooled), pooled)
        adversarial = -sum(logit.mean() for logit in logits) / len(logits)
        s = torch.randint(20, TRAIN_STEPS - 20, (size,), generator=generator).to(cfg.device)
        with torch.no_grad():
            noisy = noised(fake, s, noises[2])
            goal = clean(noisy, teacher.eps(noisy, s, states, pooled), s)
            alpha, _ = levels(s)
        distillation = (alpha * (fake - goal).square()).mean()
        step_down(adversarial + DISTILLATION * distillation, student, optimizer, schedule)

        with torch.no_grad():
            seen_fake, seen_real = (
                judge.features(noised(x0, judged, noises[3]), judged, states, pooled)
                for x0 in (fake.detach(), real)
            )
        hinge, penalty = judged_apart(judge, seen_real, seen_fake, pooled)
        step_down(hinge + R1 * penalty, judge, heads, heads_schedule)
        follow(average, student, min(0.98, step / (step + 10)))
        log(step, adversarial=adversarial, distillation=distillation, hinge=hinge, penalty=penalty)
    save_student(cfg, "turbo", average, EulerAncestralDiscreteScheduler(timestep_spacing="trailing", **BETAS))
