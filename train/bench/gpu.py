"""Measures all that only a GPU can show: python train/bench/gpu.py [key=value ...], or make gpu.

Into docs/records/gpu.json, in at most 9 minutes on one H100. Needs torch for CUDA and the packages of
pyproject.toml, those of the extra dev for the tests and nf4, and the project's folder on PYTHONPATH where it
is not installed. Needs no network and no weights but the embedded family's, for SDXL's are random. Without a
GPU the embedded family stands in, and the file goes to runs/. --show prints the file; --docs writes it into
docs/families.md.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from configs import ROOT, UserError, command, entry, list_of, versions
from train.bench import figures, memory, sdxl, students
from train.bench.figures import RECORD
from train.bench.sdxl import Row, Rows

Keep = Callable[[str, dict], None]  # takes a part's name and what is known of it so far


@dataclass
class Config:
    minutes: float = 9.0  # for everything; what is not done by then is left out
    # of what is measured, in this order; the file keeps the others that it has of the same GPU
    parts: list[str] = list_of("pictures", "training", "tests", "compile", "students")
    apart: bool = True  # every part in a process of its own, which ends when its time is over
    repeats: int = 2  # images or steps that a median is taken of, after one that is not counted
    base_steps: int = 0  # of the base; 0 = as its card says, 50 for SDXL
    batches: list[int] = list_of(2, 4, 8, 16)  # images drawn, and decoded, at once
    sizes_px: list[int] = list_of()  # of training; empty = the family's size and its half
    train_batches: list[int] = list_of(1, 8)  # latents of a training step
    quantize: str = "nf4"  # how the network is packed for the last training steps; empty = not at all
    backend: str = "inductor"  # of torch.compile
    students: list[str] = list_of("dmd", "lcm", "lightning")  # embedded ones
    student_steps: int = 40  # of their training, at least 6
    student_batch: int | None = None  # images per such step; null = the student's own number
    tests: list[str] = list_of("tests/test_gpu.py")  # whose tests marked gpu are run
    show: bool = False  # --show: print the file and measure nothing
    docs: bool = False  # --docs: write into docs/families.md what the file says, and measure nothing
    out: str = ""  # the file; empty = docs/records/gpu.json, without a GPU runs/bench-gpu/gpu.json


def main(cfg: Config) -> Path:
    """Measures part by part, writing the file after each, prints it and returns its path."""
    path = check(cfg)
    if cfg.docs:
        return figures.write_docs()
    if cfg.show:
        print(figures.markdown(figures.read(path)))
        return path
    created, device = datetime.now(UTC).isoformat(timespec="seconds"), hardware()
    results = {
        "schema": 1,
        "hardware": device,
        "versions": versions(),
        "command": command(),
        "created": created,
        "config": asdict(cfg),
        "parts": others(path, cfg.parts, device),
    }

    def keep(part: str, measured: dict) -> None:
        results["parts"][part] = measured | {"created": created}
        figures.write(path, results)

    end, run = time.time() + 60 * cfg.minutes, elsewhere if cfg.apart else here
    for k, part in enumerate(cfg.parts):
        # time that a part leaves goes to those after it
        share = PARTS[part][0] / sum(PARTS[later][0] for later in cfg.parts[k:])
        run(cfg, part, max(0, end - time.time()) * share, keep)
    print(f"{figures.markdown(results)}\n\n{path}")
    return path


def check(cfg: Config) -> Path:
    """Where the file goes. Raises UserError for a part there is not, and where a GPU's file would be lost."""
    unknown = [part for part in cfg.parts if part not in PARTS]
    if unknown:
        raise UserError(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    shipped = torch.cuda.is_available() or cfg.show
    path = Path(cfg.out) if cfg.out else (RECORD if shipped else ROOT / "runs/bench-gpu/gpu.json")
    if path.resolve() == RECORD.resolve() and not shipped:
        raise UserError(f"{RECORD.name} is for what a GPU measured, and there is none here; leave out= away")
    return path


def hardware() -> dict[str, str | float | int | None]:
    """The GPU, its driver and what torch was made for; None for what is not there."""
    device = {"gpu": None, "memory_gb": None, "driver": None}
    device |= {"cuda": torch.version.cuda, "cpus": os.cpu_count()}
    if torch.cuda.is_available():
        # not by torch, which would hold some of the memory that the parts are to have
        query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
        device["gpu"] = "a CUDA device without nvidia-smi"
        with suppress(OSError, subprocess.SubprocessError, ValueError):
            answer = subprocess.run(["nvidia-smi", *query], capture_output=True, text=True, timeout=20)
            name, mebibytes, driver = answer.stdout.partition("\n")[0].split(", ")
            device |= {"gpu": name, "memory_gb": round(float(mebibytes) * 2**20 / 1e9, 1), "driver": driver}
    return device


def others(path: Path, parts: list[str], device: dict) -> dict[str, dict]:
    """What a file has of the same hardware in parts that are not measured now, each with its day."""
    before = figures.read(path) if path.is_file() else {"hardware": None}
    if before["hardware"] != device:
        return {}
    kept = {part: its for part, its in before["parts"].items() if part not in parts}
    return {part: {"created": before["created"], **its} for part, its in kept.items()}


# how a part is run


def elsewhere(cfg: Config, part: str, seconds: float, keep: Keep) -> None:
    """A part in a process of its own: what crashes or hangs there loses nothing that was measured before."""
    start, error = time.time(), None
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder) / "config.yaml", Path(folder) / "gpu.json"
        # no row is begun in the last tenth, so that few are cut off
        alone = replace(cfg, parts=[part], apart=False, minutes=0.9 * seconds / 60, out=str(out))
        given.write_text(json.dumps(asdict(alone)))
        words = [sys.executable, __file__, f"config={given}"]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        child = subprocess.Popen(words, stdout=subprocess.DEVNULL, env=env, start_new_session=True)
        try:
            code = child.wait(seconds)
            error = f"its process ended with exit code {code}" if code else None
        except subprocess.TimeoutExpired:
            error = f"it was ended after {seconds:.0f} seconds"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # with whatever it has started
            child.wait()
        measured = figures.read(out)["parts"].get(part) if out.is_file() else None
    measured = measured or {"error": None, "rows": {}}
    keep(part, measured | {"seconds": round(time.time() - start, 1), "error": measured["error"] or error})


def here(cfg: Config, part: str, seconds: float, keep: Keep) -> None:
    """A part in this process. A row that fails says why; one that cannot begin in time is left out."""
    start, measured = time.time(), {"seconds": 0.0, "error": None, "rows": {}}

    def keep_so_far() -> None:
        measured["seconds"] = round(time.time() - start, 1)
        keep(part, measured)

    try:
        for name, measure in PARTS[part][1](cfg):
            late = time.time() - start > seconds
            measured["rows"][name] = {"error": "left out: its time was over"} if late else guarded(measure)
            keep_so_far()
    except Exception as error:  # whatever it is, the other parts still have something to say
        measured["error"] = one_line(error)
    keep_so_far()


def guarded(measure: Callable[[], Row]) -> Row:
    """A row's figures, or why there are none."""
    try:
        return measure()
    except Exception as error:
        return {"error": one_line(error)}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


# the parts


def pictures(cfg: Config) -> Rows:
    """Images beside diffusers' own pipelines, more of them at once, the VAE alone."""
    family = sdxl.subject()
    yield from sdxl.pictures(family, cfg.repeats, cfg.base_steps)
    yield from sdxl.batches(family, cfg.repeats, cfg.batches)


def training(cfg: Config) -> Rows:
    """A slider's training step: whole and packed, measured and forecast."""
    return memory.steps(cfg.sizes_px, cfg.train_batches, cfg.quantize, cfg.repeats)


def tests(cfg: Config) -> Rows:
    """The tests marked gpu, in a process of their own."""
    yield "pytest -m gpu", lambda: tested(cfg.tests)


def compiling(cfg: Config) -> Rows:
    """The student's network as it is, and compiled."""
    return sdxl.compilation(sdxl.subject(), cfg.repeats, cfg.backend)


def teaching(cfg: Config) -> Rows:
    """The embedded family's students, trained for some steps."""
    return students.rows(cfg.students, cfg.student_steps, cfg.student_batch, cfg.backend == "inductor")


PARTS: dict[str, tuple[float, Callable[[Config], Rows]]] = {  # name: its share of the time, its rows
    "pictures": (150, pictures),
    "training": (130, training),
    "tests": (100, tests),
    "compile": (90, compiling),
    "students": (70, teaching),
}


def tested(files: list[str]) -> Row:
    """How many tests passed, failed and were skipped, and which failed. Raises UserError without pytest."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), "-m", "gpu"]
        words += ["-o", "addopts=--import-mode=importlib", f"--junitxml={report}", *files]  # in one process
        ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        if not report.is_file():
            raise UserError(f"pytest: exit code {ran.returncode}: {(ran.stderr or ran.stdout)[-120:]}")
        suite = xml.parse(report).getroot().find("testsuite")
    count = {kind: int(suite.get(kind)) for kind in ("tests", "failures", "errors", "skipped")}
    failed, skipped = count["failures"] + count["errors"], count["skipped"]
    cases = [(case.get("name"), {part.tag for part in case}) for case in suite.iter("testcase")]
    wrong = [name for name, tags in cases if tags & {"failure", "error"}]
    passed, seconds = count["tests"] - failed - skipped, float(suite.get("time"))
    ended = {"passed": passed, "failed": failed, "skipped": skipped}
    return {**ended, "seconds": seconds, "failing": ", ".join(wrong)}


if __name__ == "__main__":
    entry(main, Config)
