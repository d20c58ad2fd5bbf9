"""Every command on the embedded family, as short as it gets."""

from pathlib import Path

from analysis import diversity, similarity, trace, transfer
from train import adapt, image_slider, lora, slider, sliderspace

QUICK = f"family={Path(__file__).with_name('quick.yaml')}"
PROMPTS = "prompts=[portrait of a person,'portrait of a person, hat']"
TRAINERS = [
    (
        slider,
        ["trajectories=2", "watch=[tiny/dmd]", "watch_every=1", "ema=0.9", "gradient_checkpointing=true"],
    ),
    (slider, ["recipe=published", "denoise_steps=3"]),
    (slider, ["member=tiny/dmd", "trajectories=2"]),
    (lora, ["images=4", "prior=1", "prior_images=2"]),
    (image_slider, ["pairs=2"]),
    (sliderspace, ["directions=2", "trajectories=3"]),
    (
        adapt,
        ["runs=2", "rounds=2", "prompts=[portrait of a person]", "batch_size=2"] + ["judged=0", "compared=0"],
    ),
]
ANALYSES = [
    (
        transfer,
        [
            "controls=[controls/tiny/smile.safetensors,controls/tiny/space-1.safetensors]",
            "targets=[dmd]",
            "seeds=2",
            "rounds=1",
            "max_prompts=2",
            "baselines=1",
        ],
    ),
    (
        transfer,
        [
            "controls=[controls/tiny/smile.safetensors]",
            "targets=[dmd]",
            "seeds=2",
            "rounds=1",
            "max_prompts=2",
            "baselines=1",
            "scales=[0,1]",
            "below=2.0",
            "references=false",
        ],
    ),
    (trace, ["students=[dmd]", "plans=[hybrid(1)]", "seeds=2", "bands=[500]"]),
    (diversity, ["students=[dmd]", "plans=[hybrid(1),delta(0.8)]", "seeds=3", "captions=0"]),
    (
        similarity,
        ["targets=[dmd]", "seeds=2", "controls=[controls/tiny/smile.safetensors]", "neighbours=2", "draws=5"],
    ),
]
