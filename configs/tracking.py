"""W&B for every command: files first, W&B second.

`with start(folder, config, job_type="train.slider", group="smile") as tracker:` gives one run per command.
Nothing that goes wrong in W&B stops the command: the first failure is printed as one line, the rest of W&B's
work is tried all the same.
"""

import functools
import hashlib
import netrc
import os
import re
import secrets
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from configs.errors import UserError

MODES = ("auto", "online", "offline", "disabled")
ANSWER, FINISH = 120.0, 600.0  # seconds that W&B has for a call, and for its uploads at the end
LONGEST = 128  # characters of an artifact's name and of a group


def start(folder: Path, config: dict, job_type: str, group: str, mode: str = "auto") -> "Tracker":
    """A tracker that writes under folder/wandb.

    A training that goes on is the run that it was; an analysis, which logs its whole
    record at its end, is a new one.

    config: plain values, shown as the run's config. group: the control's name, so that all that concerns a
    control stands together; cut to the 128 characters that W&B allows. mode: online, offline, disabled, or
    auto = $WANDB_MODE if set, disabled with $WANDB_DISABLED, else online when logged in, else offline.
    Processes of a distributed run other than the first get a disabled tracker. Raises UserError for another
    mode.
    """
    check(mode)
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or (
            "disabled" if _disabled() else "online" if logged_in() else "offline"
        )
    tracker = Tracker(Path(folder).resolve())
    if mode == "disabled" or int(os.environ.get("RANK", 0)) > 0:
        return tracker
    about = {"config": config, "job_type": job_type, "group": group[:LONGEST]}
    if job_type.startswith("train."):
        about |= {"id": tracker.remembered(), "resume": "allow"}
    tracker.open(mode, **about)
    if tracker.run is None and mode == "online":
        tracker.open("offline", **about)
    tracker.announce()
    return tracker


def check(mode: str) -> None:
    """Raises UserError for a mode that there is not."""
    if mode not in MODES:
        raise UserError(f"no W&B mode {mode!r}; the modes are {', '.join(MODES)}")


def _disabled() -> bool:
    return os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on")


def logged_in() -> bool:
    """Whether an API key is at hand, in $WANDB_API_KEY or where `wandb login` puts it; the network is not
    asked.
    """
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    for path in [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]:
        try:
            return netrc.netrc(Path(path).expanduser()).authenticators(host) is not None
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def project() -> str:
    """The W&B project that runs go to."""
    return os.environ.get("WANDB_PROJECT") or "distilled-control"


def guarded(call: Callable) -> Callable:
    """A Tracker method that does nothing without a run, and whose failure is a warning."""

    @functools.wraps(call)
    def method(self: "Tracker", *args: Any, **kwargs: Any) -> None:
        if self.run is not None:
            with self.attempt():
                within(ANSWER, lambda: call(self, *args, **kwargs))

    return method


class Tracker:
    """One W&B run, or none: `run` is None when disabled, when W&B could not start, and after finish()."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run: Any = None
        self.warned = False
        self.used: list[str] = []

    @guarded
    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """Numbers by name, at an optimizer step if there is one."""
        self.run.log(values, step=step)

    @guarded
    def table(self, key: str, columns: list[str], rows: list[list]) -> None:
        """A table of plain values, one list per row."""
        import wandb

        self.run.log({key: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

    def image(self, key: str, path: Path, caption: str | None = None) -> None:
        """A picture file."""
        self.images({key: (Path(path), caption)})

    @guarded
    def images(self, pictures: dict[str, tuple[Any, str | None]], step: int | None = None) -> None:
        """Pictures (files or PIL) with captions, by key.

        The same keys at several steps are what W&B's step slider moves through.
        """
        import wandb

        self.run.log(
            {key: wandb.Image(picture, caption=caption) for key, (picture, caption) in pictures.items()},
            step=step,
        )

    @guarded
    def curves(
        self, key: str, x: list[float], curves: dict[str, list[float]], title: str, xname: str
    ) -> None:
        """Lines by name over common places x, as one chart."""
        import wandb

        chart = wandb.plot.line_series(list(x), list(curves.values()), list(curves), title, xname)
        self.run.log({key: chart})

    @guarded
    def summary(self, values: dict[str, Any]) -> None:
        """What a run is compared by in W&B's table of runs."""
        self.run.summary.update(values)

    @guarded
    def artifact(self, path: Path | list[Path], name: str, type: str) -> None:
        """A file, some files or a folder as an artifact: type control for a trained control, results for a
        record.
        """
        self.run.log_artifact(_artifact(path, name, type))

    @guarded
    def uses(self, name: str, path: Path | None = None) -> None:
        """States that this run reads a control's artifact, by its newest version or, with `path`, by the very
        content of that file.

        Always written to the run's config as `uses`, and as W&B's lineage; offline that takes the content, as
        no version can be looked up.
        """
        self.used.append(name)
        self.run.config.update({"uses": list(self.used)}, allow_val_change=True)
        file = _artifact(path, name, "control") if path else None
        if not self.run.offline:
            self.run.use_artifact(file or f"{_artifact_name(name)}:latest")
        elif file:  # use_artifact refuses offline: note the use, for `wandb sync` to carry out
            self.run._log_artifact(file, is_user_created=True, use_after_commit=True)

    def finish(self, exit_code: int = 0) -> None:
        """Ends the run; a second call does nothing."""
        if self.run is not None:
            done = False
            with self.attempt():
                within(FINISH, lambda: self.run.finish(exit_code=exit_code))
                done = True
            if not done:
                self.abandon()
        self.run = None

    def abandon(self) -> None:
        """Ends the run, and W&B's service, for which Python would wait at its exit, or which it would miss
        there.
        """
        self.run = None
        with self.attempt():
            within(ANSWER, sys.modules["wandb"].teardown)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.finish(exit_code=0 if kind is None else 1)

    def open(self, mode: str, **about: Any) -> None:
        """Starts the run; on failure `run` stays None."""
        with self.attempt():
            os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")  # else it advertises itself beside gradio
            import wandb

            self.folder.mkdir(parents=True, exist_ok=True)
            quiet = wandb.Settings(silent=True, console="off", init_timeout=30)
            self.run = wandb.init(project=project(), dir=str(self.folder), mode=mode, settings=quiet, **about)

    def remembered(self) -> str:
        """The id of the folder's run, made where there is none."""
        path = self.folder / "wandb/run-id"
        if path.is_file() and re.fullmatch(r"[a-z0-9]{8}", found := path.read_text(errors="replace").strip()):
            return found
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(found := secrets.token_hex(4))
        return found

    def announce(self) -> None:
        """One line: where the run is seen, or how to upload it."""
        if self.run is None:
            return
        with self.attempt():
            if self.run.offline:
                place = Path(self.run.dir).parent
                if (
                    len(list(place.parent.glob(parts := f"offline-run-*-{self.run.id}"))) > 1
                ):  # it went on, in a folder each time
                    place = place.parent / parts
                place = place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place
                print(f"W&B is offline; to upload this run: wandb sync {place}", flush=True)
            else:
                print(f"W&B: {self.run.url}", flush=True)

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Keeps W&B's files in the folder and its exceptions inside; the tracker's first one is printed."""
        try:
            own = f"{self.folder}/wandb"
            with _defaults(WANDB_DATA_DIR=f"{own}/data", WANDB_CACHE_DIR=f"{own}/cache"):
                yield
        except Exception as error:
            if not self.warned:
                text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                says = f"warning: W&B failed ({text}); the files are not affected"
                print(says, file=sys.stderr, flush=True)
            self.warned = True
            if isinstance(error, TimeoutError) and self.run is not None:
                for process in psutil.Process().children():
                    if process.name() == "wandb-core":
                        process.kill()  # it will not answer
                self.abandon()


def within(seconds: float, call: Callable[[], None]) -> None:
    """Makes a call to W&B, whose service may have been stopped.

    Raises TimeoutError when there is no answer in time.
    """
    failed: list[BaseException] = []

    def attempt() -> None:
        try:
            call()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer in {seconds:g} seconds")
    if failed:
        raise failed[0]


def _artifact(content: Path | list[Path], name: str, type: str) -> Any:
    """A draft artifact that holds copies of a file, of some files, or of a folder, the latter without W&B's
    own files.
    """
    import wandb

    artifact = wandb.Artifact(_artifact_name(name), type=type)
    for path in map(Path, content if isinstance(content, list) else [content]):
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            inner = file.relative_to(path if path.is_dir() else path.parent)
            if inner.parts[0] != "wandb":
                artifact.add_file(str(file), name=inner.as_posix(), skip_cache=True)
    return artifact


def _artifact_name(name: str) -> str:
    """The name with what W&B does not allow in it replaced, e.g. tiny/base by tiny-base; with a hash where
    names could become equal.
    """
    plain = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)
    if name.isascii() and len(plain) <= LONGEST:
        return plain
    return f"{plain[: LONGEST - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


@contextmanager
def _defaults(**values: str) -> Iterator[None]:
    """Environment variables that are set for the block, unless they are set already."""
    new = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)
