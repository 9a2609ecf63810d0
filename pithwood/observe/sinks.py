"""TensorBoard, Weights & Biases and trackio as readers of the event log. All need the extra `log`; the JSONL log never
does.

A sink learns from its first event (`run` or `resume`) where a sitting begins. What a killed run does again after its
last checkpoint has the same steps and, on the same machine, the same digits: TensorBoard hides the first take, the
others hold both, one on top of the other.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pithwood.observe.events import Sink, write_atomically

_CURVES = ("train", "validation")
_PACKAGES = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases", "trackio": "trackio"}

TENSORBOARD_FOLDER = "tensorboard"
NAME_FILE = "log_name.txt"


@dataclass(frozen=True)
class LoggingConfig:
    """Where the curves of a run go besides the console and events.jsonl; what fails there never stops the training."""

    tensorboard: bool = False
    """Write TensorBoard files into the run folder; look with `tensorboard --logdir runs`."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases; offline keeps its files in the run folder until `wandb sync` sends them."""
    trackio: bool = False
    """Write to trackio's local store (TRACKIO_DIR moves it); look with `trackio show`. Its own settings apply:
    TRACKIO_SPACE_ID or TRACKIO_SERVER_URL send the curves away."""
    project: str = "pithwood"
    """Project of the run in W&B and trackio; letters, digits, '_', '-' and '.'."""

    def validate(self) -> None:
        """Raise ValueError if the project's name is none."""
        if not self.project or not all(char.isalnum() or char in "_-." for char in self.project):
            raise ValueError(f"project={self.project!r} must be made of letters, digits, '_', '-' and '.'")


def check_sinks(cfg: LoggingConfig) -> None:
    """Raise ValueError, naming the extra, if a package is missing, or if W&B would go online without a key."""
    for setting, product in _PACKAGES.items():
        if getattr(cfg, setting) not in (False, "off") and importlib.util.find_spec(setting) is None:
            raise ValueError(
                f"logging to {product} needs the package {setting!r}, which is not installed; install it with: "
                f"pip install 'pithwood[log]', or leave out logging.{setting}"
            )
    if cfg.wandb == "online":
        import wandb

        if not wandb.login(prompt=False, verify=False):
            raise ValueError("logging.wandb=online finds no key; run `wandb login`, or use logging.wandb=offline")


def open_sinks(cfg: LoggingConfig, folder: Path, settings: Mapping[str, Any]) -> list[Sink]:
    """The sinks that a run asks for; a resumed run continues its curves, one that --new started over begins its own.

    folder    the run folder; a name made of its own and the time is kept in it and names the run in W&B and trackio
    settings  JSON form of the run, for their configuration pages
    raises    ValueError for what `check_sinks` finds, or if a product refuses to start
    """
    check_sinks(cfg)
    name = _lasting_name(folder)
    sinks: list[Sink] = []
    try:
        if cfg.tensorboard:
            sinks.append(TensorBoardSink(folder / TENSORBOARD_FOLDER))
        if cfg.wandb != "off":
            sinks.append(WandbSink(folder, cfg.project, name, cfg.wandb, settings))
        if cfg.trackio:
            sinks.append(TrackioSink(cfg.project, name, settings))
    except Exception:
        for sink in sinks:
            sink.close()
        raise
    return sinks


class TensorBoardSink(Sink):
    """Writes the numbers of train and validation events as scalars `train/loss`, `validation/bits_per_byte`, ...

    folder  where the TensorBoard files go; on resume, later steps of earlier files are hidden
    """

    def __init__(self, folder: Path | str):
        self._folder = folder
        self._writer: Any = None
        # imported here and not at the first event, so that a broken installation is known before the training
        import torch.utils.tensorboard  # noqa: F401

    def write(self, events: list[dict[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        for event in events:
            if self._writer is None:
                # Files of earlier sittings may reach past the step where this one begins.
                self._writer = SummaryWriter(str(self._folder), purge_step=event["step"] + 1)
            for name, value in scalars(event).items():
                self._writer.add_scalar(name, value, event["step"], event["time"])

    def sync(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandbSink(Sink):
    """Sends the numbers of train and validation events to Weights & Biases, over the column `step`.

    folder    where its files go; with mode "offline" nothing leaves the machine (`wandb sync` sends it later)
    project   project that the run belongs to
    name      name and id of the run: a resumed run continues the same curves
    settings  the run's settings, which become its config
    raises    ValueError if W&B refuses to start
    """

    def __init__(
        self,
        folder: Path | str,
        project: str,
        name: str,
        mode: Literal["online", "offline"] = "offline",
        settings: Mapping[str, Any] | None = None,
    ):
        import wandb

        Path(folder).mkdir(parents=True, exist_ok=True)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                self._run = wandb.init(
                    project=project, name=name, id=name, dir=str(folder), mode=mode, resume="allow",
                    config=dict(settings or {}), settings=wandb.Settings(silent=True, console="off"),
                )  # fmt: skip
        except wandb.Error as error:
            raise ValueError(f"W&B does not start: {error}; mend that, or use logging.wandb=offline") from error
        # W&B's own step only grows, so it would drop what a resumed run does again.
        self._run.define_metric("*", step_metric="step")

    def write(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            if event["kind"] in ("run", "resume"):
                about = {name: value for name, value in event.items() if name not in ("kind", "step", "time")}
                self._run.config.update(about, allow_val_change=True)
            values = scalars(event)
            if values:
                self._run.log({**values, "step": event["step"]})

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()


class TrackioSink(Sink):
    """Sends the numbers of train and validation events to trackio: a local database, unless its environment says else.

    It writes in a thread of its own, and itself warns on stderr of what it cannot keep.

    project, name  a resumed run, which has the same name, continues the same curves
    settings       the run's settings, which become its config
    raises         ValueError if trackio refuses to start
    """

    def __init__(self, project: str, name: str, settings: Mapping[str, Any] | None = None):
        import trackio

        self._trackio = trackio
        try:
            # It would only warn, and keep nothing.
            trackio.TRACKIO_DIR.mkdir(parents=True, exist_ok=True)
            # It tells of itself on stdout, where the result of --json goes.
            with contextlib.redirect_stdout(sys.stderr):
                self._run = trackio.init(
                    project=project, name=name, config=dict(settings or {}), resume="allow", embed=False,
                    auto_log_gpu=False, auto_log_cpu=False,
                )  # fmt: skip
        except Exception as error:  # whatever its store, its server or its settings raise
            raise ValueError(f"trackio does not start: {error}; mend that, or leave out logging.trackio") from error

    def write(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            values = scalars(event)
            if values:
                self._run.log(values, step=event["step"])

    def close(self) -> None:
        # Not the run's own `finish`: trackio would finish it again, on stdout, when the process ends.
        with contextlib.redirect_stdout(sys.stderr):
            self._trackio.finish()


def scalars(event: dict[str, Any]) -> dict[str, float]:
    """The numbers of a train or validation event under `<kind>/<field>`; {} for other kinds."""
    if event["kind"] not in _CURVES:
        return {}
    return {
        f"{event['kind']}/{name}": float(value)
        for name, value in event.items()
        if name not in ("kind", "step", "time") and isinstance(value, int | float)
    }


def _lasting_name(folder: Path) -> str:
    """A name that stays with the run over all its sittings, and that no other run, whatever its settings, has."""
    path = folder / NAME_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8").strip()
    name = f"{folder.name}-{int(time.time()):x}"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f"{name}\n".encode())
    return name
