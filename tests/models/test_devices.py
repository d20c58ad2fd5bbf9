"""The processes of a run: what `accelerate launch` says is heeded or refused by name, and what ends with one
process ends with all.
"""

import os
import subprocess
import sys

import psutil
import pytest
import torch

from analysis import diversity, similarity, trace, transfer
from configs import ROOT, UserError, merge
from controls import generate
from models import devices
from train import adapt, image_slider, lora, slider, sliderspace

COMMANDS = [slider, lora, image_slider, sliderspace, adapt, transfer, trace, diversity, similarity, generate]


@pytest.mark.parametrize(
    ("settings", "words", "says"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, [], "mixed_precision=fp16.*dtype=fp16"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, [], "mixed_precision=bf16.*dtype=bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, ["dtype=fp32"], "dtype=fp32 the network runs in fp32"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, [], "mixed_precision=fp8"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, [], "dynamo_backend=inductor.*memory.compile=inductor"),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            [],
            "gradient_accumulation_steps=4.*have gradient_accumulation_steps=1",
        ),
        ({"ACCELERATE_USE_FSDP": "true"}, [], "FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, [], "DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, [], "Megatron"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, [], "parallelism_config"),
    ],
)
def test_a_setting_that_is_not_heeded_is_refused_by_name(monkeypatch, tmp_path, settings, words, says):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    for command in COMMANDS:
        with pytest.raises(UserError, match=says):
            command.main(merge(command.Config, [f"out={tmp_path}", "name=mine", "wandb=disabled", *words]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "words", "device"),
    [
        ({}, [], "cpu"),
        (
            {
                "ACCELERATE_MIXED_PRECISION": "no",
                "ACCELERATE_DYNAMO_BACKEND": "NO",
                "ACCELERATE_USE_FSDP": "false",
            },
            [],
            "cpu",
        ),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, ["dtype=bf16"], "cpu"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, [], "cuda"),
        ({"ACCELERATE_DYNAMO_BACKEND": "EAGER"}, ["memory.compile=eager"], "cpu"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, ["gradient_accumulation_steps=4"], "cpu"),
    ],
)
def test_a_setting_that_the_config_says_too_is_taken(settings, words, device):
    devices.heed(settings, merge(slider.Config, words), device)


def test_one_process_where_more_were_meant_is_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv(
        "ACCELERATE_MIXED_PRECISION", "no"
    )  # as accelerate launch leaves it behind for two processes on a CPU
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    devices.start(merge(slider.Config, [f"out={tmp_path}"]))
    assert "this is one process" in capsys.readouterr().err


SCRIPT = """
import os, signal, sys
from dataclasses import dataclass, field
import torch
from configs import UserError, entry, releases
from models import devices
from models.offload import Memory

rank, what = int(os.environ["RANK"]), sys.argv[2]

@dataclass
class Config:
    name: str = "mine"
    out: str = sys.argv[1]
    dtype: str = "auto"
    memory: Memory = field(default_factory=Memory)
    dry_run: bool = False
    overwrite: bool = False
    wandb: str = "disabled"

@releases
def main():
    cfg = Config()
    processes = devices.start(cfg)
    ones = [torch.full((2, 3), rank + 1.0), torch.full((4,), 10.0 * rank)]
    a, b = processes.mean(ones)
    assert a.shape == (2, 3) and (a == 1.5).all() and (b == 5).all()
    if what == "refused" and rank == 0:
        devices.folders.claim = lambda *_: (_ for _ in ()).throw(UserError("no room"))
    folder = devices.claim(processes, cfg)
    assert (folder / "config.yaml").is_file()
    if what == "killed" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "fails" and rank == 1:
        raise UserError("my share cannot be")
    processes.wait_for_everyone()

entry(main)
"""


@pytest.mark.parametrize(
    ("what", "codes", "says"),
    [
        ("refused", (2, 2), ("error: no room", "")),
        ("fails", (2, 2), ("error: another process of this run has ended", "error: my share cannot be")),
        ("killed", (2, -9), ("error: another process of this run has ended", "")),
    ],
)
def test_processes_begin_and_end_together(tmp_path, what, codes, says):
    port = {"refused": 29542, "fails": 29543, "killed": 29544}[what]
    place = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    both = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, tmp_path, what],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    ends = [one.communicate(timeout=120)[1] for one in both]
    assert tuple(one.returncode for one in both) == codes, ends
    for said, expected in zip(ends, says, strict=True):
        lines = [line for line in said.splitlines() if line.startswith(("error", "Traceback"))]
        assert len(lines) == bool(expected) and expected in "".join(lines), said
    left = [path.name for path in tmp_path.rglob("*")]
    assert ".lock" not in left and bool(left) == (what != "refused")


def test_the_mean_of_one_process_is_its_own():
    gradients = [torch.ones(2), torch.zeros(3)]
    assert devices.Processes(cpu=True).mean(gradients) is gradients


@pytest.mark.parametrize(
    ("load", "threads", "said"), [(2.0, 2, True), (0.3, 2, False), (0.6, 2, True), (2.0, 1, False)]
)
def test_other_work_on_the_machine_is_said(monkeypatch, capsys, load, threads, said):
    monkeypatch.setattr(psutil, "cpu_percent", lambda seconds: 100 * load / 2)
    monkeypatch.setattr(psutil, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    devices.crowded()
    assert ("OMP_NUM_THREADS=1" in "".join(capsys.readouterr())) == said
