"""A Hub cache with small random weights under the real names: real classes and layouts."""

import hashlib
import inspect
import json
import re
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Dinov2Config,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    SiglipConfig,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from configs import ROOT
from controls.formats import layouts
from models.architectures.qwens import text_only
from models.cards import FamilyCard, MemberCard, card
from models.loading import source

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SIZE_PX, LENGTH, WIDTH = 64, 24, 64  # of images, of T5's and Qwen's prompts, of text encoders
LAYERS = (1, 2, 3)  # of Krea 2's text encoder, which its network is told
ALPHABET = sorted({chr(code) for code in range(32, 127)} | {"▁"})
DYNAMIC = {"use_dynamic_shifting": True}
QWEN = {**DYNAMIC, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
FLOWS = {  # published scheduler configs
    "stabilityai/stable-diffusion-3.5-large": {"shift": 3.0},
    "stabilityai/stable-diffusion-3.5-large-turbo": {"shift": 3.0},
    "black-forest-labs/FLUX.1-dev": {"shift": 3.0, "use_dynamic_shifting": True},
    "black-forest-labs/FLUX.1-schnell": {"shift": 1.0},
    "Tongyi-MAI/Z-Image": {"shift": 6.0},
    "Tongyi-MAI/Z-Image-Turbo": {"shift": 3.0},
    **dict.fromkeys(("krea/Krea-2-Raw", "krea/Krea-2-Turbo"), {**DYNAMIC, "max_image_seq_len": 6400}),
    **{
        f"black-forest-labs/FLUX.2-klein-{size}": {"shift": 3.0, "use_dynamic_shifting": True}
        for size in ("base-4B", "4B", "base-9B", "9B")
    },
    "Qwen/Qwen-Image": QWEN,
    "Qwen/Qwen-Image-2.1": QWEN,
}

EVALUATORS = {  # published configs; SigLIP's and DINOv2's of this size are transformers' own defaults
    "clip": CLIPConfig(
        text_config={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "projection_dim": 768,
        },
        vision_config={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
            "projection_dim": 768,
        },
        projection_dim=768,
    ),
    "siglip": SiglipConfig(),
    "dino": Dinov2Config(image_size=518),
}


def publish(cache: Path, repo: str, revision: str | None = None) -> Path:
    """The folder in which the Hub's cache would keep a branch or a commit of a repo."""
    pinned = revision is not None and len(revision) == 40
    commit = revision if pinned else hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()
    home = cache / f"models--{repo.replace('/', '--')}"
    if revision is None and (home / "refs/main").is_file():  # another member's pin is what the branch is at
        commit = (home / "refs/main").read_text()
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs" / ("main" if pinned or not revision else revision)).write_text(commit)
    folder = home / "snapshots" / commit
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# small parts of the real kinds


def unet(seed: int, sdxl: bool, **changes) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    config = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "attention_head_dim": 16,
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 2 * WIDTH if sdxl else WIDTH,
    }
    if sdxl:
        config |= {
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": WIDTH + 6 * 8,
        }
    return UNet2DConditionModel(**{**config, **changes}).eval()


def transformer(architecture: str, seed: int, **changes):
    torch.manual_seed(seed)
    kind, config = {
        "pixart": (
            PixArtTransformer2DModel,
            {
                "num_attention_heads": 3,
                "attention_head_dim": 16,
                "in_channels": 4,
                "out_channels": 8,
                "num_layers": 2,
                "sample_size": 128,
                "cross_attention_dim": 48,
                "caption_channels": WIDTH,
                "patch_size": 2,
                "norm_num_groups": 1,
            },
        ),
        "sd3": (
            SD3Transformer2DModel,
            {
                "sample_size": 8,
                "patch_size": 2,
                "in_channels": 16,
                "out_channels": 16,
                "num_layers": 2,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "joint_attention_dim": 2 * WIDTH,
                "caption_projection_dim": 32,
                "pooled_projection_dim": 2 * WIDTH,
                "pos_embed_max_size": 16,
                "qk_norm": "rms_norm",
            },
        ),
        "flux": (
            FluxTransformer2DModel,
            {
                "in_channels": 64,
                "num_layers": 1,
                "num_single_layers": 2,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "joint_attention_dim": WIDTH,
                "pooled_projection_dim": WIDTH,
                "guidance_embeds": True,
                "axes_dims_rope": (4, 4, 8),
            },
        ),
        "zimage": (
            ZImageTransformer2DModel,
            {
                "in_channels": 16,
                "dim": 32,
                "n_layers": 2,
                "n_refiner_layers": 1,
                "n_heads": 2,
                "n_kv_heads": 2,
                "cap_feat_dim": WIDTH,
                "axes_dims": [4, 4, 8],
                "axes_lens": [256, 64, 64],
            },
        ),
        "flux2": (
            Flux2Transformer2DModel,
            {
                "in_channels": 16,
                "num_layers": 1,
                "num_single_layers": 2,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "joint_attention_dim": 3 * WIDTH,
                "guidance_embeds": False,
                "axes_dims_rope": (4, 4, 4, 4),
            },
        ),
        "krea2": (
            Krea2Transformer2DModel,
            {
                "in_channels": 64,
                "num_layers": 2,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "intermediate_size": 48,
                "text_hidden_dim": WIDTH,
                "num_text_layers": len(LAYERS),
                "text_num_attention_heads": 2,
                "text_num_key_value_heads": 2,
                "text_intermediate_size": 48,
                "axes_dims_rope": (4, 4, 8),
            },
        ),
        "qwen": (
            QwenImageTransformer2DModel,
            {
                "in_channels": 64,
                "out_channels": 16,
                "num_layers": 2,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "joint_attention_dim": WIDTH,
                "axes_dims_rope": (4, 4, 8),
            },
        ),
        "qwen21": (
            QwenImage21Transformer2DModel,
            {
                "in_channels": 8,
                "out_channels": 8,
                "num_layers": 2,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "context_in_dim": WIDTH,
                "axes_dims_rope": (4, 4, 8),
            },
        ),
    }[architecture]
    net = kind(**{**config, **changes}).eval()
    for (
        name,
        weight,
    ) in (
        net.named_parameters()
    ):  # the padding tokens and gates of a fresh network are zeros, which would hide mistakes
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.02, generator=torch.Generator().manual_seed(len(name)))
    return net


def vae(channels: int, **changes) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        **changes,
    ).eval()


def clip_words() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(ROOT / "models/tiny/weights/base/tokenizer")


def clip(words: CLIPTokenizer, kind=CLIPTextModelWithProjection):
    torch.manual_seed(1)
    special = {
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    return kind(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=WIDTH,
            max_position_embeddings=words.model_max_length,
            **special,
        )
    ).eval()


def t5_words() -> T5Tokenizer:
    """A Unigram tokenizer of single characters."""
    return T5Tokenizer(
        vocab=[(piece, -2.0) for piece in ("<pad>", "</s>", "<unk>", *ALPHABET)],
        extra_ids=0,
        model_max_length=LENGTH,
    )


def t5(words: T5Tokenizer, width: int = WIDTH) -> T5EncoderModel:
    torch.manual_seed(2)
    return T5EncoderModel(
        T5Config(vocab_size=len(words), d_model=width, d_kv=16, d_ff=32, num_layers=2, num_heads=2)
    ).eval()


def qwen_words() -> Qwen2Tokenizer:
    """A byte-level tokenizer of single bytes, with a chat template."""
    letters = {letter: k for k, letter in enumerate(sorted(ByteLevel.alphabet()))}
    words = Qwen2Tokenizer(
        vocab={**letters, "<|endoftext|>": len(letters)}, merges=[], model_max_length=LENGTH
    )
    words.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    return words


READING = {
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def qwen(words: Qwen2Tokenizer, kind=Qwen3Model, layers: int = 2):
    torch.manual_seed(3)
    about = {**READING, "num_hidden_layers": layers, "head_dim": 16}
    return kind(Qwen3Config(vocab_size=len(words), **about)).eval()


# a template's words, of which the pipelines count 34 in front of a prompt
MARKS = ["<|im_start|>", "<|im_end|>", "<|image_pad|>"]
SAYS = re.findall(
    r" ?[a-zA-Z]+|[^a-zA-Z]",
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships "
    "of the objects and background:",
)


def template_words() -> Qwen2Tokenizer:
    """The byte-level tokenizer with the marks and the words of Qwen-Image's template, and a chat template of
    that kind.
    """
    words = qwen_words()
    words.add_tokens([*MARKS, "system", "user", "assistant", *dict.fromkeys(SAYS)])
    words.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return words


EYES = {
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": WIDTH,
}  # of encoders that see, which nothing here shows


def seeing(words: Qwen2Tokenizer, kind, layers: int = 2):
    """A text encoder that is a vision-language model."""
    torch.manual_seed(4)
    about, eyes = {**READING, "num_hidden_layers": layers, "vocab_size": len(words)}, EYES
    if kind is Qwen2_5_VLForConditionalGeneration:
        eyes = {**EYES, "hidden_size": 32, "intermediate_size": 32}
        about |= {"rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [4, 6, 6]}}
    else:
        eyes = {**EYES, "hidden_size": 32, "intermediate_size": 32, "deepstack_visual_indexes": [0]}
        about |= {"head_dim": 16, "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    return kind(kind.config_class(text_config=about, vision_config=eyes)).eval()


def video_vae(kind, channels: int, **changes):
    """A VAE of one frame; its statistics of latents are the published ones' first."""
    torch.manual_seed(0)
    usual = {key: value.default for key, value in inspect.signature(kind.__init__).parameters.items()}
    about = {"base_dim": 8, "z_dim": channels, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    said = {key: usual[key][:channels] for key in ("latents_mean", "latents_std")}
    return kind(**{**about, **said, **changes}).eval()


def flux2_vae(channels: int) -> AutoencoderKLFlux2:
    torch.manual_seed(0)
    its = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=channels
    ).eval()
    its.bn.running_mean.normal_()  # what it has seen in training
    its.bn.running_var.uniform_(0.5, 2)
    return its


def network(family: FamilyCard, member: MemberCard, seed: int):
    """A small random network of a member's kind."""
    if family.architecture in ("sd", "sdxl"):
        embeds = {"time_cond_proj_dim": 16} if member.guidance_embedding is not None else {}
        return unet(seed, family.architecture == "sdxl", **embeds)
    guided = (
        {"guidance_embeds": member.guidance_embedding is not None} if family.architecture == "flux" else {}
    )
    return transformer(family.architecture, seed, **guided)


def pipeline(family: FamilyCard):
    """A small random pipeline of a family's kind, with its base's network."""
    kind, net, words = family.architecture, network(family, family.members[family.base], 0), clip_words()
    flow = FlowMatchEulerDiscreteScheduler(**FLOWS.get(family.repo, {}))
    ddim = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    shifted = {
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    if kind == "sdxl":
        return StableDiffusionXLPipeline(
            vae(4, scaling_factor=0.13025), clip(words, CLIPTextModel), clip(words), words, words, net, ddim
        )
    if kind == "sd":
        return StableDiffusionPipeline(
            vae(4), clip(words, CLIPTextModel), words, net, ddim, None, None, requires_safety_checker=False
        )
    if kind == "pixart":
        steps = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
        return PixArtAlphaPipeline(t5_words(), t5(t5_words()), vae(4), net, steps)
    if kind == "sd3":
        both = t5_words()
        return StableDiffusion3Pipeline(
            net, flow, vae(16, **shifted), clip(words), words, clip(words), words, t5(both, 2 * WIDTH), both
        )
    if kind == "flux":
        return FluxPipeline(
            flow, vae(16, **shifted), clip(words, CLIPTextModel), words, t5(t5_words()), t5_words(), net
        )
    if kind == "zimage":
        return ZImagePipeline(flow, vae(16, **shifted), qwen(qwen_words()), qwen_words(), net)
    return of_a_qwen(kind, flow, net)


def of_a_qwen(kind: str, flow: FlowMatchEulerDiscreteScheduler, net):
    """The same of those that are told of a Qwen's text by a template."""
    words = template_words()
    if kind == "flux2":  # of whose encoder the pipeline takes three layers
        return Flux2KleinPipeline(flow, flux2_vae(4), qwen(words, Qwen3ForCausalLM, 28), words, net)
    if kind == "krea2":
        layers = {"text_encoder_select_layers": LAYERS}
        seen = video_vae(AutoencoderKLQwenImage, 16)
        return Krea2Pipeline(flow, seen, seeing(words, Qwen3VLModel, 4), words, net, **layers)
    if kind == "qwen":
        reads = seeing(words, Qwen2_5_VLForConditionalGeneration)
        return QwenImagePipeline(flow, video_vae(AutoencoderKLQwenImage, 16), reads, words, net)
    five = {"dim_mult": [1, 1, 1, 1, 1], "decoder_base_dim": 8}
    reads = seeing(words, Qwen3VLForConditionalGeneration)
    return QwenImage21Pipeline(
        flow, video_vae(AutoencoderKLQwenImage21, 8, **five), reads, text_only(words), net
    )


def half(net) -> dict[str, torch.Tensor]:
    return {key: value.half().contiguous() for key, value in net.state_dict().items()}


# how the published students' files name a layer, its two halves, and whether alpha stands beside them
KOHYAS, BARE, PEFTS = (
    (lambda name: f"lora_unet_{name.replace('.', '_')}", "lora_down", "lora_up", True),
    (str, "lora_down", "lora_up", True),
    (lambda name: f"transformer.{name}", "lora_A", "lora_B", False),
)
STUDENTS = {"qwen": BARE, "krea2": PEFTS, "qwen21": PEFTS}


def lora(net, seed: int, rank: int = 2, alpha: float = 1.0, layout=KOHYAS) -> dict[str, torch.Tensor]:
    """A LoRA of a network's attention and convolutions; in kohya's layout with diffusers' names, as most
    published students are.
    """
    rng, found = torch.Generator().manual_seed(seed), {}
    said, down, up, with_alpha = layout
    for name, layer in net.named_modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and (".attn" in name or ".resnets." in name):
            rows, columns, *kernel = layer.weight.shape
            stem = said(name)
            found |= {
                f"{stem}.{down}.weight": torch.randn(rank, columns, *kernel, generator=rng) / columns**0.5,
                f"{stem}.{up}.weight": torch.randn(rows, rank, *(1 for _ in kernel), generator=rng) * 0.1,
            }
            found |= {f"{stem}.alpha": torch.tensor(alpha)} if with_alpha else {}
    return found


NORMS = {"norm1": "in_layers.0", "norm2": "out_layers.0"}


def original(net: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """A U-Net's weights by the names of Stability's own code, as trainers and civitai's checkpoints have
    them.
    """
    theirs = {layer: name for name, (layer,) in layouts._sgm(net).items()} | {"conv_norm_out": "out.0"}
    found = {}
    for key, weight in net.state_dict().items():
        layer, _, end = key.rpartition(".")
        near, _, last = layer.rpartition(".")
        if layer not in theirs and last in NORMS and f"{near}.conv1" in theirs:
            theirs[layer] = theirs[f"{near}.conv1"].removesuffix("in_layers.2") + NORMS[last]
        elif layer not in theirs:  # inside an attention block both say the same after its prefix
            block = layer.split(".transformer_blocks.")[0].removesuffix(".norm")
            theirs[layer] = theirs[f"{block}.proj_in"].removesuffix("proj_in") + layer.removeprefix(
                f"{block}."
            )
        found[f"model.diffusion_model.{theirs[layer]}.{end}"] = weight.half().contiguous()
    return found


def save(pipe, folder: Path, variant: str | None) -> None:
    """A pipeline as its repository has it."""
    processor = getattr(pipe, "processor", None)
    if processor:
        pipe.register_modules(processor=None)
    pipe.save_pretrained(folder, variant=variant)
    if processor:
        processor.tokenizer.save_pretrained(folder / "processor")
        index = json.loads((folder / "model_index.json").read_text())
        index["processor"] = ["transformers", "Qwen3VLProcessor"]
        (folder / "model_index.json").write_text(json.dumps(index))


def write(cache: Path, name: str) -> FamilyCard:
    """Publishes every repository that a shipped card names."""
    family = card(name)
    for seed, (member, its) in enumerate(family.members.items()):
        repo, revision, variant = source(family, its)
        folder = publish(cache, repo, revision)
        if member == family.base:
            save(pipeline(family), folder, variant)
        elif its.lora:
            holder = family.holder(member)
            below = network(family, family.members[holder], list(family.members).index(holder))
            layout = STUDENTS.get(family.architecture, KOHYAS)
            save_file(lora(below, seed, layout=layout), folder / its.lora)
        elif its.file:
            weights = half(network(family, its, seed))
            torch.save(weights, folder / its.file) if its.file.endswith(".bin") else save_file(
                weights, folder / its.file
            )
        else:
            network(family, its, seed).save_pretrained(folder / (its.subfolder or ""), variant=variant)
            if family.architecture == "pixart":  # published before the class had its own name
                config = folder / its.subfolder / "config.json"
                config.write_text(
                    config.read_text().replace("PixArtTransformer2DModel", "Transformer2DModel")
                )
            if its.noise_schedule == "flow":
                FlowMatchEulerDiscreteScheduler(**FLOWS[repo]).save_pretrained(folder / "scheduler")
    return family


def write_configs(cache: Path, name: str) -> FamilyCard:
    """Publishes the full-size configs of a family's repositories, as the real ones are, and no weights."""
    family, parts = card(name), json.loads((ROOT / "models/published.json").read_text())[name]
    for evaluator, config in EVALUATORS.items():
        if its := getattr(family, evaluator):
            config.save_pretrained(publish(cache, its.partition("@")[0], its.partition("@")[2] or None))
    for member, its in family.members.items():
        repo, revision, _ = source(family, its)
        folder, net = publish(cache, repo, revision), "unet" if "unet" in parts else "transformer"
        files = {f"{its.subfolder}/config.json" if its.subfolder else "config.json": parts[net]}
        if member == family.base:
            files |= {
                f"{part}/config.json": config for part, config in parts.items() if part != "model_index"
            }
            files["model_index.json"] = parts["model_index"]
        if repo in FLOWS:
            scheduler = FlowMatchEulerDiscreteScheduler(**FLOWS[repo])
            files["scheduler/scheduler_config.json"] = dict(scheduler.config)
        for file, config in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(json.dumps(config))
        if its.noise_schedule == "flow" and not its.lora:  # whose levels are its scheduler's
            FlowMatchEulerDiscreteScheduler(**FLOWS[repo]).save_pretrained(folder / "scheduler")
    return family
