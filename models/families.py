"""Families: a base model and its distilled students, from a card to members that are ready to run."""

import copy
from collections.abc import Iterable, Sequence
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs import UserError, note
from models import budget, latents, lora_student, quantized
from models.architectures import ARCHITECTURES
from models.batches import Batches
from models.cards import FamilyCard, MemberCard, card, split
from models.latents import TILED
from models.loading import (
    fetch,
    file_of,
    latent_shape,
    network,
    one_line,
    place,
    published_scheduler,
    skeleton,
    source,
)
from models.lora_student import Delta
from models.noise import BETAS, CLEAN, NOISE_SCHEDULES, Noise, ancestral
from models.offload import Memory, Offloader, compiled, release, trim
from models.prompts import Prompts, stacked
from models.sampler import Denoiser, Member, alone, draw_noise, finish, levels_of
from models.tokens import Reader, cuts, tell_apart

if TYPE_CHECKING:  # it takes seconds to import, which a command that finds everything drawn need not wait
    from diffusers import DiffusionPipeline

__all__ = ["DTYPES", "Family", "FamilyCard", "MemberCard", "Memory", "card", "fast_dtype", "place", "split"]
REMEMBERED = 2e9  # bytes of encoded prompts that are kept
ENCODED = 64  # texts that are encoded before it is seen whether all can be kept
CLIP_LENGTH = 77  # tokens of a text
# diffusers' words for what a network predicts
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "sample"}
# auto = fast_dtype
DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def fast_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU, fp32 on a CPU, where small networks gain little from bf16 and images would vary with the
    batch (LOG.md).
    """
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def modules(pipe: "DiffusionPipeline") -> dict[str, nn.Module]:
    """The parts of a pipeline that have weights, by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


class Family:
    """A loaded family. VAE and text encoders are shared; networks are loaded when first asked for."""

    def __init__(
        self,
        name: str,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        memory: Memory | None = None,
        bare: bool = False,
        batch_size: int = 0,
        quantize: str = "",
    ):
        """bare: networks have no weights, for a plan of what a run will ask of them. batch: images drawn at
        once; 0 = as many as usual
        at their size, see models/batches.py. quantize: how networks are held, see models/quantized.py; empty
        = whole. Raises UserError as `card` does, and for a quantisation that cannot be.
        """
        quantized.check(quantize)
        self.card, self.memory, self.bare, self.quantize = card(name), memory or Memory(), bare, quantize
        self.architecture = ARCHITECTURES[self.card.architecture]
        self.device = torch.device(device)
        self.dtype = dtype or fast_dtype(self.device)
        self.turns = Offloader(self.device)
        self.home = torch.device("cpu") if self.memory.offload else self.device
        self.drawing = Batches.drawn(batch_size, self.card.size_px)
        self.decoding = Batches.decoded(self.card.size_px)
        self.reading = Batches.encoded(self.card.text_length or self.architecture.text_length or CLIP_LENGTH)
        self._members: dict[str, Member] = {}
        self._pipe, self._nets = None, {}
        self._encoded: dict[tuple[str, str | None], Prompts] = {}
        self._noted: set[str] = set()  # texts of which it was said whether they are cut

    def use(self, pipe: "DiffusionPipeline", nets: dict[str, nn.Module] | None = None) -> None:
        """Takes a pipeline of diffusers that is in memory, its network as the base's, and further networks by
        member, instead of loading them.

        The pipeline itself stays as it is. The family is to be made for its device and type:
        Family("sdxl", pipe.device, pipe.dtype).
        """
        part = self.architecture.part
        own = {self.card.base: net} if (net := getattr(pipe, part, None)) is not None else {}
        self._nets = own | (nets or {})
        self._pipe = copy.copy(pipe)
        self._pipe.register_modules(**{part: None})

    @property
    def pipe(self) -> "DiffusionPipeline":
        """diffusers' own pipeline without a network: VAE in fp32, tokenizers, text encoders."""
        if self._pipe is None:
            self._pipe = self._parts()
            self._pipe.set_progress_bar_config(disable=True)
            vae = self._pipe.vae
            # on a CPU it decodes in 3 ms where it took 5; on a GPU its group norms want copies; a video's
            # weights are of five dimensions
            if self.device.type == "cpu" and all(weight.ndim <= 4 for weight in vae.parameters()):
                vae.to(memory_format=torch.channels_last)
            if self.memory.tiling:
                vae.enable_slicing()
                if type(vae).__name__ in TILED:
                    vae.enable_tiling()
        return self._pipe

    def _parts(self, **without) -> "DiffusionPipeline":
        """The pipeline from its repository, on the CPU: without its network and what is given as None."""
        its, fixed = self.architecture, self.card.encoders == "fp32"
        text = torch.float32 if fixed else self.dtype
        name, needs = f"{self.card.name} (VAE, text encoders)", budget.shared(self.card, self.dtype)
        budget.check(name, needs, self.home, text, fixed)
        how = {"variant": self.card.variant, "dtype": {"vae": torch.float32, "default": text}}
        absent = dict.fromkeys((its.part, *its.absent)) | self._processor() | without
        pipe = fetch(its.pipeline, self.card.repo, self.card.revision, **how, **absent)
        for part in modules(pipe).values():
            part.to(self.home).eval().requires_grad_(False)
        return pipe

    def _processor(self) -> dict:
        """What reads texts for pipelines that have a processor of texts and pictures, by its name there."""
        if not self.architecture.processor:
            return {}
        from transformers import Qwen2Tokenizer

        tokenizer = fetch(Qwen2Tokenizer, self.card.repo, self.card.revision, subfolder="processor")
        return {"processor": self.architecture.processor(tokenizer)}

    def encoders(self) -> dict[str, nn.Module]:
        """The text encoders by their names in the pipeline; none after `forget_encoders`."""
        return {name: part for name, part in modules(self.pipe).items() if name != "vae"}

    def forget_encoders(self) -> None:
        """Frees the text encoders, which are most of some families' memory; the next `encode` loads them
        anew.
        """
        self.turns.bring([part for part in self.turns.here if part not in self.encoders().values()])
        self.pipe.register_modules(**dict.fromkeys(self.encoders()))
        release()

    def readers(self) -> list[Reader]:
        """The tokenizers, each with the tokens that its text encoder takes.

        Loads nothing else; raises UserError where it cannot.
        """
        pipe = self._pipe or self._tokenizers()
        own = self.card.text_length or self.architecture.text_length
        if self.architecture.reader:
            return [self.architecture.reader(pipe, own)]
        return [
            Reader(part, part.model_max_length if "CLIP" in type(part).__name__ else own)
            for name, part in pipe.components.items()
            if name.startswith("tokenizer") and part is not None
        ]

    def _tokenizers(self) -> "DiffusionPipeline":
        its = self.architecture
        others = [
            name
            for name in signature(its.pipeline.__init__).parameters
            if name.startswith(("text_encoder", "vae"))
        ]
        return fetch(
            its.pipeline,
            self.card.repo,
            self.card.revision,
            variant=self.card.variant,
            **dict.fromkeys((its.part, *its.absent, *others)),
            **self._processor(),
        )

    def tell_apart(self, a: str, b: str) -> None:
        """Raises UserError for two texts that are the same to all of the family's text encoders."""
        tell_apart(self.readers(), a, b, f"the text encoders of family {self.card.name}")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent."""
        if self.bare:
            return latent_shape(self.card)
        return latents.of(self.pipe.vae).shape(self.pipe.vae.config, self.card.size_px)

    @torch.no_grad()
    def encode(self, texts: list[str], negative: list[str] | None = None) -> Prompts:
        """Prompts as the pipeline itself encodes them; without negative texts the negative side is the
        pipeline's own (SDXL: zeros).

        What was encoded is kept, up to REMEMBERED bytes, so that a text costs its encoders once. Raises
        UserError where there is no text.
        """
        if not texts:
            raise UserError("no texts to encode")
        wanted = list(zip(texts, negative or [None] * len(texts), strict=True))
        new = [pair for pair in dict.fromkeys(wanted) if pair not in self._encoded]
        if new:
            encoded = self._encode([text for text, _ in new], negative and [away for _, away in new])
            if encoded.size_bytes + sum(kept.size_bytes for kept in self._encoded.values()) > REMEMBERED:
                self._encoded = {
                    pair: self._encoded[pair] for pair in dict.fromkeys(wanted) if pair in self._encoded
                }
            self._encoded |= {pair: encoded[[row]].trimmed() for row, pair in enumerate(new)}
        return stacked([self._encoded[pair] for pair in wanted]).to(self.device)

    def _encode(self, texts: list[str], negative: list[str] | None) -> Prompts:
        if not self.encoders():
            self.pipe.register_modules(**modules(self._parts(vae=None)))
        self.bring(*self.encoders().values())
        new = dict.fromkeys(text for text in [*texts, *(negative or [])] if text not in self._noted)
        self._noted |= new.keys()
        for line in cuts(self.readers(), new):
            note(line)
        length = {"max_sequence_length": self.card.text_length} if self.card.text_length else {}

        def read(rows: Tensor) -> Prompts:
            words, away = ([part[row] for row in rows] if part else None for part in (texts, negative))
            how = words, away, self.card.size_px, self.device
            return self.architecture.encode(self.pipe, *how, **length).to("cpu", torch.float32)

        return stacked(self.reading.of(read, len(texts)))

    def encode_all(self, texts: Sequence[str]) -> None:
        """Encodes all that a run will say, and lets the text encoders go where all of it can be kept."""
        texts = list(dict.fromkeys(texts))
        for start in range(0, len(texts), ENCODED):
            self.encode(texts[start : start + ENCODED])
        if all((text, None) in self._encoded for text in texts):
            self.forget_encoders()

    @torch.no_grad()
    def decode(self, finished: Tensor) -> Tensor:
        """Images (B, 3, size_px, size_px) in [-1, 1] of finished latents (B, C, H, W), fp32 on the CPU."""
        return torch.cat(self.decoding.of(lambda rows: self._pixels(finished[rows]).cpu(), len(finished)))

    def pixels(self, finished: Tensor) -> Tensor:
        """The same on the device, in a way that gradients pass; what does not fit at once is computed again
        for them, part by part.
        """

        def part(rows: Tensor) -> Tensor:
            if len(rows) == len(finished):
                return self._pixels(finished)
            return checkpoint(self._pixels, finished[rows], use_reentrant=False)

        return torch.cat(self.decoding.of(part, len(finished)))

    def _pixels(self, finished: Tensor) -> Tensor:
        vae = self.pipe.vae
        beside = self.turns.here if finished.requires_grad else ()  # what gradients still must pass
        self.bring(*beside, vae)
        return latents.of(vae).decode(vae, finished.to(vae.dtype)).float().clamp(-1, 1)

    @torch.no_grad()
    def to_latents(self, images: Tensor) -> Tensor:
        """The networks' latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1]; the mode where the VAE gives
        a distribution.
        """
        vae = self.pipe.vae
        self.bring(vae)

        def encoded(rows: Tensor) -> Tensor:
            return latents.of(vae).encode(vae, images[rows].to(self.device, vae.dtype))

        return torch.cat(self.decoding.of(encoded, len(images))).float()

    def bring(self, *parts: nn.Module) -> None:
        """With offload: puts these parts on the device, and what was there off it. Else all are there."""
        if self.memory.offload:
            self.turns.bring(parts)

    @torch.no_grad()
    def draw(self, member: Member, prompts: list[str] | Prompts, seeds: list[int]) -> Tensor:
        """One image per prompt (text or encoded) and seed by the member alone, (B, 3, size_px, size_px) in
        [-1, 1], whatever the batch. Raises UserError for another number of seeds, and for none.
        """
        if not len(prompts) == len(seeds) > 0:
            raise UserError(f"a seed per prompt; got {len(prompts)} prompts, {len(seeds)} seeds")

        def drawn(rows: Tensor) -> Tensor:
            own = [seeds[row] for row in rows]
            noise = draw_noise(own, self.latent_shape, len(member.levels), self.device)
            if isinstance(prompts, Prompts):
                conditioning = prompts[rows]
            else:
                conditioning = self.encode([prompts[row] for row in rows])
            return self.decode(finish(alone(member), noise, conditioning))

        return torch.cat(self.drawing.of(drawn, len(prompts)))

    def member(self, name: str, quantize: str | None = None) -> Member:
        """A member with its network on the device. Raises UserError with the names there are.

        quantize: how its network is held where it is not loaded yet; None = as the family's are.
        """
        if name not in self._members:
            self._known(name)
            held = self.quantize if quantize is None else quantize
            self._members[name] = self._load(name, self.card.members[name], held)
        return self._members[name]

    def outline(self, name: str) -> Member:
        """A member as it is sampled, without its network: of a flow its scheduler's config is read, of others
        nothing.

        Raises UserError as `member` does.
        """
        self._known(name)
        return self._sampled(name, None, None)

    def _known(self, name: str) -> None:
        if name not in self.card.members:
            raise UserError(
                f"no member {name!r} in family {self.card.name}: there are {', '.join(self.card.members)}"
            )

    @property
    def members(self) -> list[str]:
        """The names of the members that are in memory."""
        return list(self._members)

    def keep(self, names: Iterable[str]) -> None:
        """Frees the networks of all members but these, and of the bases whose LoRA students these are;
        `member` loads them anew.
        """
        names = set(names)
        kept = names | set(map(self.card.holder, names))
        gone = [self._members.pop(name).denoiser.net for name in self._members.keys() - kept]
        if gone:
            self.turns.here = [part for part in self.turns.here if all(part is not net for net in gone)]
            del gone
            release()

    def _load(self, name: str, member: MemberCard, quantize: str) -> Member:
        self._agrees(name, member)
        return self._sampled(name, *self._network(name, member, quantize))

    def _sampled(self, name: str, net: nn.Module | None, delta: Delta | None) -> Member:
        """A network, and how its member's card says that it is sampled; notes a size that it was not trained
        on.
        """
        member = self.card.members[name]
        if member.trained_px and member.trained_px != self.card.size_px:
            note(
                f"{self.card.name}/{name} was trained at {member.trained_px} px and is run at "
                f"{self.card.size_px}: its images may suffer"
            )
        denoiser = Denoiser(
            net,
            member.prediction_type,
            member.guidance_embedding,
            self.architecture.call,
            delta,
            member.lora_scale,
            self.architecture.rescaled,
        )
        return Member(
            name=f"{self.card.name}/{name}",
            denoiser=denoiser,
            levels=self._levels(member),
            noise_schedule=member.noise_schedule,
            eta=ancestral if member.ancestral else member.eta,
            guidance=member.guidance,
            teacher_guidance=member.teacher_guidance,
            final=CLEAN if member.final == "clean" else NOISE_SCHEDULES[member.noise_schedule][0](0),
            start=member.start,
            shifted=partial(self._flow, member) if member.noise_schedule == "flow" else None,
        )

    def _agrees(self, name: str, member: MemberCard) -> None:
        """Raises UserError where the scheduler beside a member's own network says that it was trained on
        other noise than the card.
        """
        if member.noise_schedule == "flow" or member.file or member.lora:
            return
        repo, revision, _ = source(self.card, member)
        try:
            config = published_scheduler(repo, revision)
        except UserError:  # many repositories have none
            return
        first, last, power = BETAS[member.noise_schedule]
        betas = {
            "beta_start": first,
            "beta_end": last,
            "beta_schedule": "scaled_linear" if power < 1 else "linear",
        }
        other = {key: config[key] for key, value in betas.items() if config.get(key, value) != value}
        if config.get("rescale_betas_zero_snr"):
            raise UserError(
                f"{self.card.name}/{name} was trained to a signal-to-noise ratio of zero "
                f"(rescale_betas_zero_snr), which is "
                "not supported: here its first step would be told a picture that still shines through"
            )
        if other:
            raise UserError(
                f"{self.card.name}/{name} was trained on other noise than noise_schedule "
                f"{member.noise_schedule}: {other}"
            )
        says = PREDICTIONS.get(config.get("prediction_type", ""), member.prediction_type)
        if says != member.prediction_type:
            note(
                f"the scheduler of {repo} says that {self.card.name}/{name} predicts {says}; its card says "
                f"{member.prediction_type}, which is done"
            )

    def _network(self, name: str, member: MemberCard, quantize: str) -> tuple[nn.Module, Delta | None]:
        """A member's own network, or its base's with the delta that makes the student."""
        if self.bare:
            return skeleton(self.card, name), None
        if name in self._nets:
            return self._nets[name], None
        if not member.lora:
            home = torch.device("cpu") if quantize else self.home
            for how, where in {"": home, quantize: self.home}.items():  # whole at first, then as it is held
                needs = [budget.network_need(self.card, name, self.dtype, how)]
                budget.check(f"{self.card.name}/{name}", needs, where, self.dtype)
            net = network(self.card, name, self.dtype, home)
            # Krea 2 keeps its norms in fp32 whatever the rest is in
            dtype = None if net._keep_in_fp32_modules else self.dtype
            net.to(home, dtype, memory_format=torch.channels_last)
            trim()
            if quantize:
                quantized.quantize(net, quantize, self.device).to(self.home)
                release()
            if self.memory.offload:
                self.turns.comes_when_called(net)
            if self.memory.compile:
                compiled(net, self.memory.compile)
            return net.eval().requires_grad_(False), None
        net = self.member(self.card.holder(name), quantize).denoiser.net
        repo, revision, _ = source(self.card, member)
        with one_line(f"{member.lora} of {repo}"):
            file = file_of(repo, revision, member.lora, member.sha256)
            delta = lora_student.read(file, self.architecture, net)
        delta.attach(net)
        return net, delta

    def _levels(self, member: MemberCard) -> tuple[Noise, ...]:
        """A member's schedule."""
        if member.noise_schedule != "flow" or member.timesteps:
            return levels_of(member.noise_schedule, member.spacing, member.steps, member.timesteps)
        return self._flow(member, member.steps)

    def _flow(self, member: MemberCard, steps: int) -> tuple[Noise, ...]:
        """What a flow's own scheduler, shifted for the size of the image, makes of a number of steps."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        repo, revision = self.card.repo, self.card.revision
        its = self.card.members[member.over] if member.over else member
        if not (its.file or its.lora):
            repo, revision = source(self.card, its)[:2]
        scheduler = fetch(FlowMatchEulerDiscreteScheduler, repo, revision, subfolder="scheduler")
        if member.scheduler:
            scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, **member.scheduler)
        tokens = (self.latent_shape[1] // self.architecture.patch) ** 2
        mu = self.architecture.shift(scheduler.config, tokens, steps)
        if self.architecture.even:
            scheduler.set_timesteps(mu=mu, sigmas=[1 - k / steps for k in range(steps)])
        else:
            scheduler.set_timesteps(steps, mu=mu)
        pairs = zip(scheduler.timesteps.tolist(), scheduler.sigmas.tolist(), strict=False)
        return tuple(Noise(t, 1 - sigma, sigma) for t, sigma in pairs)
