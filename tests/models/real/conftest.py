"""The shipped cards over a Hub cache with small weights under the real names."""

import json
import shutil

import pytest
import torch
from support import hub
from support.real import FEWER

from configs import ROOT
from models.cards import card
from models.families import Family


@pytest.fixture(scope="module")
def families(cache, tmp_path_factory):
    """name -> the shipped family at a small size, written and loaded when first asked for; card(name) is its
    path.
    """
    folder, loaded = tmp_path_factory.mktemp("cards"), {}

    def family(name: str) -> Family:
        if name not in loaded:
            shutil.copytree(
                ROOT / "models/tiny/weights/clip",
                hub.publish(cache, *card(name).clip.split("@")),
                dirs_exist_ok=True,
            )
            its = hub.write(cache, name)
            long = {
                member: {"steps": FEWER}
                for member, m in its.members.items()
                if m.steps > 8 and not m.timesteps
            }
            text = {} if its.architecture in ("sd", "sdxl", "qwen21") else {"text_length": hub.LENGTH}
            small = {"extends": name, "size_px": hub.SIZE_PX, "siglip": "", "members": long, **text}
            (folder / f"{name}.yaml").write_text(json.dumps(small))
            loaded[name] = Family(str(folder / f"{name}.yaml"), dtype=torch.float32)
            loaded[name].path = folder / f"{name}.yaml"
        return loaded[name]

    return family


@pytest.fixture(scope="module")
def pipelines(families):
    """name -> diffusers' own pipeline, straight from the cache, with the base's network."""
    loaded = {}

    def pipe(name: str):
        if name not in loaded:
            its, kind = families(name).card, families(name).architecture
            loaded[name] = kind.pipeline.from_pretrained(
                its.repo,
                revision=its.revision,
                variant=its.variant,
                dtype=torch.float32,
                **dict.fromkeys(kind.absent),
                **families(name)._processor(),
            )
            loaded[name].set_progress_bar_config(disable=True)
        return loaded[name]

    return pipe
