"""Trains the embedded family, one part after the other: python train/tiny.py PART [key=value ...]

PART is vae, base, refine, dmd, lcm, lightning, clip, probe, or all. Each part can be killed and continues where it was.
"""

import copy
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,  # fmt: skip
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from configs import UserError, entry, load, replacing
from models.noise import TRAIN_STEPS, vp
from models.tiny import world
from models.tiny.evaluators import Probe
from models.tiny.faces import ATTRIBUTES, claims
from train.checkpoint import append, resumable, seeded

WEIGHTS = "models/tiny/weights"
TOKENS = 40  # longest caption of the world
SIZE_IDS = (64.0, 64.0, 0.0, 0.0, 64.0, 64.0)  # SDXL's micro-conditioning: original size, crop, target size
FEW_STEPS = (999, 749, 499, 249)
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@dataclass
class Config:
    steps: int = 0  # optimizer steps; 0 = the part's own number
    batch: int = 0  # images per step; 0 = the part's own number
    seed: int = 0  # of weights, data and noise
    faces: int = 20000  # portraits in the training set
    every: int = 250  # steps between checkpoints
    threads: int = 0  # CPU threads; 0 = all
    compile: bool = False  # torch.compile the networks: about twice as fast, after minutes of compiling; needs a C++ compiler
    work: str = "runs/tiny"  # folder of checkpoints and logs
    weights: str = WEIGHTS  # where the finished parts go


def vae(cfg: Config) -> None:
    """The autoencoder, 64x64x3 <-> 16x16x4. It alone sees the held-out styles, on one portrait in ten."""
    torch.manual_seed(cfg.seed)
    steps, batch = cfg.steps or 3600, cfg.batch or 16
    net = AutoencoderTiny(encoder_block_out_channels=(24,) * 3, decoder_block_out_channels=(24,) * 3,
                          num_encoder_blocks=(1, 1, 4), num_decoder_blocks=(5, 2, 1), latent_channels=4)  # fmt: skip
    net = net.to(memory_format=torch.channels_last)
    images = world.pictures(world.faces(cfg.faces, cfg.seed, styled=0.1))
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, betas=(0.9, 0.99), weight_decay=0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.05)
    log = Log(cfg, "vae")
    state = {"net": net, "optimizer": optimizer, "schedule": schedule}
    for step in resumable(Path(cfg.work) / "vae.pt", state, steps, cfg.every, "vae"):
        generator = seeded(cfg.seed, step)
        x = world.to_unit(images[torch.randint(len(images), (batch,), generator=generator)])
        z = net.encode(x).latents
        noisy = z + 0.05 * torch.randn(z.shape, generator=generator)  # the decoder must bear small errors of the U-Net
        out = net.decode(noisy).sample
        edges = F.l1_loss(out.diff(dim=-1), x.diff(dim=-1)) + F.l1_loss(out.diff(dim=-2), x.diff(dim=-2))
        spread = (z.square().mean() - 1).square() + z.mean((0, 2, 3)).square().sum()
        loss = F.mse_loss(out, x) + 0.5 * F.l1_loss(out, x) + 0.5 * edges + 1e-3 * spread
        step_down(loss, net, optimizer, schedule)
        log(step, mse=F.mse_loss(out, x), std=z.std())
    with torch.no_grad():
        z = net.eval().encode(world.to_unit(world.pictures(world.faces(256, cfg.seed + 1)))).latents
    net.register_to_config(scaling_factor=round(1 / z.std().item(), 4))
    net.half().save_pretrained(Path(cfg.weights) / "base/vae")


def tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges are learnt on the world's captions; its words are whole tokens."""
    people = world.faces(4000, 1, styled=0.3)
    bpe = Tokenizer(BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    letters = [c + end for c in "abcdefghijklmnopqrstuvwxyz0123456789-,.'" for end in ("", "</w>")]
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = BpeTrainer(vocab_size=600, special_tokens=special, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(world.captions(people, 1, keep=0.8), trainer)
    state = json.loads(bpe.to_str())["model"]
    vocab = list(state["vocab"])
    vocab += [c for c in letters if c not in vocab]
    words = CLIPTokenizer(vocab={w: i for i, w in enumerate(vocab)}, merges=[tuple(m) for m in state["merges"]],
                          model_max_length=TOKENS, pad_token="<|endoftext|>")  # fmt: skip
    words.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def vocabulary(words) -> dict:
    """The part of a CLIP text config that the tokenizer decides."""
    return {"vocab_size": len(words), "max_position_embeddings": TOKENS, "bos_token_id": words.bos_token_id,
            "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}  # fmt: skip


def text_encoders(words) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """SDXL's pair of text encoders, small: the penultimate states of both are the tokens, the second also pools."""
    common = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 2, "projection_dim": 64, **vocabulary(words)}
    return (CLIPTextModel(CLIPTextConfig(**common, num_hidden_layers=2)),
            CLIPTextModelWithProjection(CLIPTextConfig(**common, num_hidden_layers=3)))  # fmt: skip


def new_unet() -> UNet2DConditionModel:
    """SDXL's U-Net, small: attention at the two lower levels, micro-conditioning, 3.5 M parameters."""
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(48, 80, 96), layers_per_block=1, norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1, attention_head_dim=(2, 2, 3), cross_attention_dim=128, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=16, projection_class_embeddings_input_dim=64 + 6 * 16,
    ).to(memory_format=torch.channels_last)  # fmt: skip


class Text(torch.nn.Module):
    """The two encoders as one module: token ids (B, L) -> tokens (B, L, 128), pooled (B, 64). Trained with the U-Net."""

    def __init__(self, words):
        super().__init__()
        self.one, self.two = text_encoders(words)

    def forward(self, ids):
        one = self.one(ids, output_hidden_states=True)
        two = self.two(ids, output_hidden_states=True)
        return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1), two.text_embeds


@dataclass
class Data:
    """The training set: scaled latents of portraits, and three captions each as token ids."""

    latents: Tensor  # (N, 4, 16, 16)
    ids: Tensor  # (N, 3, TOKENS)

    def batch(self, size: int, generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(self.latents), (size,), generator=generator)
        which = torch.randint(self.ids.shape[1], (size,), generator=generator)
        return self.latents[rows], self.ids[rows, which]


def dataset(cfg: Config, words) -> Data:
    """Encodes the world's plain portraits once, into `work`."""
    path = Path(cfg.work) / f"latents-{cfg.faces}-{cfg.seed}.safetensors"
    if not path.exists():
        people = world.faces(cfg.faces, cfg.seed)
        auto = AutoencoderTiny.from_pretrained(Path(cfg.weights) / "base/vae").float().eval()
        with torch.no_grad():
            latents = [auto.encode(world.to_unit(part)).latents for part in tqdm(world.pictures(people).split(100), "latents")]
        ids = [tokens(words, world.captions(people, seed)) for seed in range(3)]
        with replacing(path) as new:
            save_file({"latents": torch.cat(latents) * auto.config.scaling_factor, "ids": torch.stack(ids, 1)}, new)
    saved = load_file(path)
    return Data(saved["latents"], saved["ids"])


def tokens(words, texts: list[str]) -> Tensor:
    return words(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt").input_ids


def predict(net, x, t, states, pooled) -> Tensor:
    """The network's eps, (B, 4, 16, 16), at integer timesteps t (B,)."""
    size = torch.tensor(SIZE_IDS, dtype=x.dtype).expand(len(x), 6)
    return net(x, t, states, added_cond_kwargs={"text_embeds": pooled, "time_ids": size}).sample


LEVELS = torch.tensor([(vp(k).alpha, vp(k).sigma) for k in range(TRAIN_STEPS)])


def levels(t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha, sigma (B, 1, 1, 1) at integer timesteps."""
    return LEVELS[t, 0, None, None, None], LEVELS[t, 1, None, None, None]


@torch.no_grad()
def follow(average, net, decay: float) -> None:
    """One step of the exponential moving average of the weights."""
    torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)


def base(cfg: Config) -> None:
    """The base: eps-prediction on SDXL's noise levels, min-SNR weights, one caption in ten dropped (to zeros, as SDXL does)."""
    torch.manual_seed(cfg.seed)
    words = tokenizer(Path(cfg.weights) / "base/tokenizer")
    model = torch.nn.ModuleDict({"unet": new_unet(), "text": Text(words)})
    denoise(cfg, "base", model, words, cfg.steps or 3200, rate=1.2e-3, floor=0.0)


def refine(cfg: Config) -> None:
    """The base, second half: its text encoders learn to tell what a caption claims, then all goes on with more weight on high noise.

    The plain loss hardly sees x0 at high noise, where hats and positions are decided, and learns "no hat" late.
    """
    pipe = StableDiffusionXLPipeline.from_pretrained(Path(cfg.weights) / "base", dtype=torch.float32)
    text = Text(pipe.tokenizer)
    text.one, text.two = pipe.text_encoder, pipe.text_encoder_2
    model = torch.nn.ModuleDict({"unet": pipe.unet.to(memory_format=torch.channels_last), "text": text}).requires_grad_(True).train()
    read_claims(cfg, text, pipe.tokenizer)
    denoise(cfg, "refine", model, pipe.tokenizer, cfg.steps or 1500, rate=8e-4, floor=0.1)


def read_claims(cfg: Config, text: Text, words, steps: int = 800, size: int = 64) -> None:
    """Trains the text encoders alone: from the pooled text, and from the mean token, which attributes are claimed and at what value."""
    captions = world.captions(world.faces(cfg.faces, cfg.seed), 3, keep=0.6)
    ids, told = tokens(words, captions), [claims(caption) for caption in captions]
    said = torch.tensor([[float(name in claim) for name in ATTRIBUTES] for claim in told])
    value = torch.tensor([[claim.get(name, 0.0) for name in ATTRIBUTES] for claim in told])
    torch.manual_seed(cfg.seed)
    heads = torch.nn.ModuleList([torch.nn.Linear(64, 2 * len(ATTRIBUTES)), torch.nn.Linear(128, 2 * len(ATTRIBUTES))])
    both = torch.nn.ModuleList([text, heads])
    optimizer = torch.optim.AdamW(both.parameters(), 1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1)
    log, state = Log(cfg, "claims"), {"both": both, "optimizer": optimizer, "schedule": schedule}
    for step in resumable(Path(cfg.work) / "claims.pt", state, steps, cfg.every, "claims"):
        rows = torch.randint(len(ids), (size,), generator=seeded(cfg.seed, step, 7))
        states, pooled = text(ids[rows])
        read = torch.stack([heads[0](pooled), heads[1](states.mean(1))])
        loss = (read - torch.cat([said[rows], value[rows]], 1)).square().mean()
        step_down(loss, both, optimizer, schedule)
        log(step, loss=loss)


def denoise(cfg: Config, part: str, model, words, steps: int, rate: float, floor: float) -> None:
    """Trains U-Net and text encoders on the denoising loss and saves their average as the base.

    The loss weighs x0's error by the signal-to-noise ratio between `floor` and 5 (Hang et al. 2023, eq. 8).
    """
    size, data = cfg.batch or 40, dataset(cfg, words)
    average = copy.deepcopy(model).requires_grad_(False)
    unet = fast(model["unet"], cfg)
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.08)
    state = {"model": model, "average": average, "optimizer": optimizer, "schedule": schedule}
    log = Log(cfg, part)
    for step in resumable(Path(cfg.work) / f"{part}.pt", state, steps, cfg.every, part):
        generator = seeded(cfg.seed, step, len(part))
        x0, ids = data.batch(size, generator)
        t = torch.randint(TRAIN_STEPS, (size,), generator=generator)
        eps = torch.randn(x0.shape, generator=generator)
        keep = (torch.rand(size, generator=generator) > 0.1).float()
        alpha, sigma = levels(t)
        states, pooled = model["text"](ids)
        out = predict(unet, alpha * x0 + sigma * eps, t, states * keep[:, None, None], pooled * keep[:, None])
        snr = (alpha / sigma).square().flatten()
        loss = ((out - eps).square().mean((1, 2, 3)) * snr.clamp(floor, 5) / snr).mean()
        step_down(loss, model, optimizer, schedule)
        follow(average, model, min(0.998, step / (step + 20)))
        log(step, loss=loss)
    save_pipeline(cfg, average, words)


def save_pipeline(cfg: Config, model, words) -> None:
    """The base as a complete diffusers folder, fp16."""
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **BETAS)
    pipe = StableDiffusionXLPipeline(
        vae=AutoencoderTiny.from_pretrained(Path(cfg.weights) / "base/vae"), unet=model["unet"], scheduler=scheduler,
        text_encoder=model["text"].one, text_encoder_2=model["text"].two, tokenizer=words, tokenizer_2=words, add_watermarker=False,
    )  # fmt: skip
    pipe.to(torch.float16).save_pretrained(Path(cfg.weights) / "base")
    for part in ("text_encoder", "text_encoder_2"):  # transformers loads what the config says, diffusers fp32: say the same
        path = Path(cfg.weights) / "base" / part / "config.json"
        config = json.loads(path.read_text()) | {"dtype": "float32"}
        with replacing(path) as new:
            new.write_text(json.dumps(config, indent=2) + "\n")


class Teacher:
    """The frozen base: x0 under guidance, and encoded captions."""

    def __init__(self, cfg: Config, guidance: float = 3.0):
        self.pipe = StableDiffusionXLPipeline.from_pretrained(Path(cfg.weights) / "base", torch_dtype=torch.float32)
        self.unet = self.pipe.unet.to(memory_format=torch.channels_last).eval().requires_grad_(False)
        self.net = fast(self.unet, cfg)
        self.guidance = guidance
        self.words = self.pipe.tokenizer

    @torch.no_grad()
    def text(self, ids) -> tuple[Tensor, Tensor]:
        one = self.pipe.text_encoder(ids, output_hidden_states=True)
        two = self.pipe.text_encoder_2(ids, output_hidden_states=True)
        return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1), two.text_embeds

    @torch.no_grad()
    def eps(self, x, t, states, pooled) -> Tensor:
        """Guided eps: the prompt's against zeros, one batch of two."""
        both = predict(self.net, torch.cat([x, x]), torch.cat([t, t]), torch.cat([states * 0, states]), torch.cat([pooled * 0, pooled]))
        without, with_ = both.chunk(2)
        return without + self.guidance * (with_ - without)

    def student(self) -> UNet2DConditionModel:
        """A trainable copy."""
        return copy.deepcopy(self.unet).requires_grad_(True).train()


def clean(x, out, t) -> Tensor:
    alpha, sigma = levels(t)
    return (x - sigma * out) / alpha


def lightning(cfg: Config) -> None:
    """Trajectory distillation: the student jumps between points of the teacher's 20-step guided DDIM trajectories, 4 trailing steps."""
    steps, size, count = cfg.steps or 750, cfg.batch or 32, 1280
    teacher = Teacher(cfg)
    data = dataset(cfg, teacher.words)
    points, ids = trajectories(cfg, teacher, data, count)
    student = teacher.student()
    average = copy.deepcopy(student).requires_grad_(False)
    net = fast(student, cfg)
    optimizer = torch.optim.AdamW(student.parameters(), 4e-4, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-4, steps, pct_start=0.05)
    log = Log(cfg, "lightning")
    grid = torch.tensor([*FEW_STEPS, -1])
    state = {"student": student, "average": average, "optimizer": optimizer, "schedule": schedule}
    for step in resumable(Path(cfg.work) / "lightning.pt", state, steps, cfg.every, "lightning"):
        generator = seeded(cfg.seed, step, 1)
        rows = torch.randint(count, (size,), generator=generator)
        jump = torch.randint(4, (size,), generator=generator)
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
        loss = ((predict(net, x, t, states, pooled) - wanted) * weight).square().mean()
        step_down(loss, student, optimizer, schedule)
        follow(average, student, min(0.998, step / (step + 20)))
        log(step, loss=loss)
    save_student(cfg, "lightning", average, EulerDiscreteScheduler(timestep_spacing="trailing", **BETAS))


@torch.no_grad()
def trajectories(cfg: Config, teacher: Teacher, data: Data, count: int) -> tuple[Tensor, Tensor]:
    """Teacher trajectories at the student's levels and at the end, (count, 5, 4, 16, 16), with their captions' ids (count, TOKENS)."""
    path = Path(cfg.work) / f"trajectories-{count}-{cfg.seed}.safetensors"
    size, grid = 80, torch.tensor([*range(999, 0, -50), -1])
    if not path.exists():
        found, texts = [], []
        for part in tqdm(range(count // size), "trajectories", mininterval=2):
            generator = seeded(cfg.seed, part, 2)
            _, ids = data.batch(size, generator)
            states, pooled = teacher.text(ids)
            x, kept = torch.randn(size, 4, 16, 16, generator=generator), []
            for t, after in zip(grid[:-1], grid[1:], strict=True):
                if t in FEW_STEPS:
                    kept.append(x)
                eps = teacher.eps(x, t.expand(size), states, pooled)
                alpha, sigma = levels(after.clamp(min=0).expand(size)) if after >= 0 else (1.0, 0.0)
                x = alpha * clean(x, eps, t.expand(size)) + sigma * eps
            found.append(torch.stack([*kept, x], 1))
            texts.append(ids)
        with replacing(path) as new:
            save_file({"points": torch.cat(found), "ids": torch.cat(texts)}, new)
    saved = load_file(path)
    return saved["points"], saved["ids"]


def lcm(cfg: Config) -> None:
    """Consistency distillation (Luo et al. 2023): x0 at a level agrees with x0 one guided DDIM step further down; k = 20 of 1000."""
    steps, size, skip = cfg.steps or 400, cfg.batch or 24, 20
    teacher = Teacher(cfg)
    data = dataset(cfg, teacher.words)
    student = teacher.student()
    average = copy.deepcopy(student).requires_grad_(False)
    net, slow = fast(student, cfg), fast(average, cfg)
    optimizer = torch.optim.AdamW(student.parameters(), 2e-4, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-4, steps, pct_start=0.05)
    state = {"student": student, "average": average, "optimizer": optimizer, "schedule": schedule}
    log = Log(cfg, "lcm")
    for step in resumable(Path(cfg.work) / "lcm.pt", state, steps, cfg.every, "lcm"):
        generator = seeded(cfg.seed, step, 3)
        x0, ids = data.batch(size, generator)
        states, pooled = teacher.text(ids)
        t = torch.randint(1, TRAIN_STEPS // skip + 1, (size,), generator=generator) * skip - 1  # 19, 39, … 999
        alpha, sigma = levels(t)
        x = alpha * x0 + sigma * torch.randn(x0.shape, generator=generator)
        with torch.no_grad():
            eps = teacher.eps(x, t, states, pooled)
            below = t - skip
            next_alpha, next_sigma = levels(below.clamp(min=0))
            guided = clean(x, eps, t)
            nearer = next_alpha * guided + next_sigma * eps
            goal = clean(nearer, predict(slow, nearer, below.clamp(min=0), states, pooled), below.clamp(min=0))
            goal = torch.where((below < 0)[:, None, None, None], guided, goal)
        loss = huber(clean(x, predict(net, x, t, states, pooled), t) - goal)
        step_down(loss, student, optimizer, schedule)
        follow(average, student, min(0.95, step / (step + 20)))
        log(step, loss=loss)
    save_student(cfg, "lcm", average, LCMScheduler(**BETAS))


def huber(error: Tensor, c: float = 0.03) -> Tensor:
    """Pseudo-Huber distance, as LCM's trainer uses it."""
    return ((error.square() + c * c).sqrt() - c).mean()


def dmd(cfg: Config) -> None:
    """Distribution matching (Yin et al. 2024, DMD2 without real data): 4 re-noised steps, guided teacher against a fake-score network."""
    steps, size, updates = cfg.steps or 400, cfg.batch or 24, 2
    teacher = Teacher(cfg)
    data = dataset(cfg, teacher.words)
    student, fake = teacher.student(), teacher.student()
    average = copy.deepcopy(student).requires_grad_(False)
    net, fake_net = fast(student, cfg), fast(fake, cfg)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-4, betas=(0.0, 0.99), weight_decay=0.0, fused=True)
    fake_optimizer = torch.optim.AdamW(fake.parameters(), 2e-4, betas=(0.0, 0.99), weight_decay=0.0, fused=True)
    warm = lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 50)  # noqa: E731
    schedule, fake_schedule = warm(optimizer), warm(fake_optimizer)
    state = {"student": student, "average": average, "fake": fake, "optimizer": optimizer, "fake_optimizer": fake_optimizer,
             "schedule": schedule, "fake_schedule": fake_schedule}  # fmt: skip
    log = Log(cfg, "dmd")
    for step in resumable(Path(cfg.work) / "dmd.pt", state, steps, cfg.every, "dmd"):
        generator = seeded(cfg.seed, step, 4)
        _, ids = data.batch(size, generator)
        states, pooled = teacher.text(ids)
        draw = lambda: torch.randn(size, 4, 16, 16, generator=generator)  # noqa: E731, B023
        x, stop = draw(), int(torch.randint(4, (1,), generator=generator))
        for k in range(stop):  # backward simulation: the student sees its own intermediate states
            t = torch.full((size,), FEW_STEPS[k])
            with torch.no_grad():
                alpha, sigma = levels(t - 250)
                x = alpha * clean(x, predict(net, x, t, states, pooled), t) + sigma * draw()
        t = torch.full((size,), FEW_STEPS[stop])
        x0 = clean(x, predict(net, x, t, states, pooled), t)
        with torch.no_grad():
            s = torch.randint(20, 980, (size,), generator=generator)
            alpha, sigma = levels(s)
            noisy = alpha * x0 + sigma * draw()
            real = clean(noisy, teacher.eps(noisy, s, states, pooled), s)
            false = clean(noisy, predict(fake_net, noisy, s, states, pooled), s)
            gradient = (false - real) / (x0 - real).abs().mean((1, 2, 3), keepdim=True)  # DMD, eq. 8
        loss = 0.5 * (x0 - (x0 - gradient).detach()).square().mean()
        step_down(loss, student, optimizer, schedule, clip=10.0)
        for _ in range(updates):
            s = torch.randint(TRAIN_STEPS, (size,), generator=generator)
            alpha, sigma = levels(s)
            eps = draw()
            fake_loss = (predict(fake_net, alpha * x0.detach() + sigma * eps, s, states, pooled) - eps).square().mean()
            step_down(fake_loss, fake, fake_optimizer, fake_schedule)
        follow(average, student, min(0.98, step / (step + 10)))
        log(step, gradient=gradient.abs().mean(), fake=fake_loss)
    save_student(cfg, "dmd", average, LCMScheduler(**BETAS))


def save_student(cfg: Config, name: str, unet, scheduler) -> None:
    """A student as it is published: a U-Net folder with its scheduler config, fp16."""
    copy.deepcopy(unet).half().save_pretrained(Path(cfg.weights) / name)
    scheduler.save_pretrained(Path(cfg.weights) / name / "scheduler")


def clip(cfg: Config) -> None:
    """The evaluator CLIP, on portraits of all styles and their captions; shares no weight with the generator.

    First each tower learns to say what it sees or reads (attributes, claims), then the two learn to agree; half of the batches are made
    of groups of four siblings, or the loss could be met without looking at a mouth.
    """
    torch.manual_seed(cfg.seed + 1)
    steps, size = cfg.steps or 300, cfg.batch or 96
    words = CLIPTokenizer.from_pretrained(Path(cfg.weights) / "base/tokenizer")
    words.save_pretrained(Path(cfg.weights) / "clip")
    shared = {"hidden_size": 96, "intermediate_size": 288, "num_attention_heads": 3}
    text = {**shared, "num_hidden_layers": 2, **vocabulary(words)}
    vision = {**shared, "num_hidden_layers": 4, "image_size": 64, "patch_size": 8}
    net = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))
    people = world.siblings(cfg.faces, cfg.seed, styled=0.15)
    images = world.pictures(people)
    ids = torch.stack([tokens(words, world.captions(people, seed, keep=0.7)) for seed in range(3)], 1)
    look(cfg, net, images, world.truth(people), ids[:, 0], [claims(text) for text in world.captions(people, 0, keep=0.7)])
    optimizer = torch.optim.AdamW(net.parameters(), 5e-4, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-4, steps, pct_start=0.1)
    log = Log(cfg, "clip")
    state = {"net": net, "optimizer": optimizer, "schedule": schedule}
    for step in resumable(Path(cfg.work) / "clip.pt", state, steps, cfg.every, "clip"):
        generator = seeded(cfg.seed, step, 5)
        groups = torch.randint(len(images) // 4, (size // 4, 1), generator=generator)
        anyone = torch.randint(len(images), (size,), generator=generator)
        rows = (4 * groups + torch.arange(4)).flatten() if step % 2 else anyone
        which = torch.randint(3, (size,), generator=generator)
        loss = net(input_ids=ids[rows, which], pixel_values=world.to_unit(images[rows]), return_loss=True).loss
        step_down(loss, net, optimizer, schedule)
        log(step, loss=loss)
    net.half().save_pretrained(Path(cfg.weights) / "clip")
    with replacing(Path(cfg.weights) / "clip/preprocessor_config.json") as new:
        new.write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"shortest_edge": 64}}) + "\n")


def look(cfg: Config, net: CLIPModel, images, truth, ids, told: list[dict], steps: int = 900, size: int = 64) -> None:
    """Trains CLIP's towers apart: pictures to their attributes, captions to their claims, by squared error."""
    said = torch.tensor([[float(name in claim) for name in ATTRIBUTES] for claim in told])
    value = torch.tensor([[claim.get(name, 0.0) for name in ATTRIBUTES] for claim in told])
    heads = torch.nn.ModuleList([torch.nn.Linear(96, len(ATTRIBUTES)), torch.nn.Linear(96, 2 * len(ATTRIBUTES))])
    both = torch.nn.ModuleList([net, heads])
    optimizer = torch.optim.AdamW(both.parameters(), 1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1)
    log, state = Log(cfg, "look"), {"both": both, "optimizer": optimizer, "schedule": schedule}
    for step in resumable(Path(cfg.work) / "look.pt", state, steps, cfg.every, "look"):
        rows = torch.randint(len(images), (size,), generator=seeded(cfg.seed, step, 8))
        seen = heads[0](net.vision_model(pixel_values=world.to_unit(images[rows])).pooler_output)
        read = heads[1](net.text_model(input_ids=ids[rows]).pooler_output)
        see, tell = F.mse_loss(seen, truth[rows]), F.mse_loss(read, torch.cat([said[rows], value[rows]], 1))
        step_down(see + tell, both, optimizer, schedule)
        log(step, see=see, read=tell)


def probe(cfg: Config) -> None:
    """The attribute probe: mean squared error on the truth, on portraits of all styles, with small noise and shifts of colour."""
    torch.manual_seed(cfg.seed + 2)
    steps, size = cfg.steps or 1500, cfg.batch or 64
    net = Probe()
    people = world.faces(cfg.faces, cfg.seed, styled=0.15)
    images, truth = world.pictures(people), world.truth(people)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    log = Log(cfg, "probe")
    state = {"net": net, "optimizer": optimizer, "schedule": schedule}
    for step in resumable(Path(cfg.work) / "probe.pt", state, steps, cfg.every, "probe"):
        generator = seeded(cfg.seed, step, 6)
        rows = torch.randint(len(images), (size,), generator=generator)
        x = world.to_unit(images[rows])
        x = x + 0.05 * torch.randn(x.shape, generator=generator) + 0.05 * torch.randn((size, 3, 1, 1), generator=generator)
        loss = F.mse_loss(net(x), truth[rows])
        step_down(loss, net, optimizer, schedule)
        log(step, loss=loss)
    net.save(Path(cfg.weights) / "probe")


class Log:
    """The losses every 25 steps with the seconds since the start, a JSON line each in work/PART.jsonl."""

    def __init__(self, cfg: Config, part: str):
        self.path, self.start = Path(cfg.work) / f"{part}.jsonl", time.time()

    def __call__(self, step: int, **values: Tensor) -> None:
        if step % 25 == 0:
            shown = {key: round(value.item(), 5) for key, value in values.items()}
            append(self.path, {"step": step, "seconds": round(time.time() - self.start, 1), **shown})


def fast(net, cfg: Config):
    return torch.compile(net) if cfg.compile else net


def step_down(loss, net, optimizer, schedule, clip: float = 1.0) -> None:
    """One optimizer step with the gradient's norm clipped."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
    optimizer.step()
    schedule.step()


PARTS = {"vae": vae, "base": base, "refine": refine, "dmd": dmd, "lcm": lcm, "lightning": lightning, "clip": clip, "probe": probe}


def main() -> None:
    parts = [word for word in sys.argv[1:] if "=" not in word and not word.startswith("-")]
    cfg = load(Config, [word for word in sys.argv[1:] if word not in parts])
    unknown = [p for p in parts if p not in (*PARTS, "all")]
    if unknown or not parts:
        raise UserError(f"say which part to train: {', '.join(PARTS)} or all; got {' '.join(unknown) or 'none'}")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    for part in PARTS if parts == ["all"] else parts:
        PARTS[part](cfg)


if __name__ == "__main__":
    entry(main)
