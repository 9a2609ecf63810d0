"""TensorBoard and Weights & Biases as readers of the event log. Both need the extra `log`; the JSONL log never does."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Literal

from pithwood.observe.events import Sink

_CURVES = ("train", "validation")


class TensorBoardSink(Sink):
    """Writes the numbers of train and validation events as scalars `train/loss`, `validation/bits_per_byte`, ...

    folder       where the TensorBoard files go
    resume_step  on resume, later steps of earlier files are hidden
    raises       ValueError if the package tensorboard is missing
    """

    def __init__(self, folder: Path | str, resume_step: int | None = None):
        _require("tensorboard", "TensorBoard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=None if resume_step is None else resume_step + 1)

    def write(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            for name, value in scalars(event).items():
                self._writer.add_scalar(name, value, event["step"], event["time"])

    def sync(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink(Sink):
    """Sends the numbers of train and validation events to Weights & Biases; `run` and `resume` fields go to its config.

    folder       where its files go; with mode "offline" nothing leaves the machine (`wandb sync` sends it later)
    project      project that the run belongs to
    name         name and id of the run: a resumed run continues the same curves
    raises       ValueError if the package wandb is missing or mode is unknown
    """

    def __init__(self, folder: Path | str, project: str, name: str, mode: Literal["online", "offline"] = "offline"):
        if mode not in ("online", "offline"):
            raise ValueError(f"W&B mode {mode!r} is not known; allowed are 'online' and 'offline'")
        _require("wandb", "Weights & Biases")
        import wandb

        Path(folder).mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(project=project, name=name, id=name, dir=str(folder), mode=mode, resume="allow")

    def write(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            if event["kind"] in ("run", "resume"):
                self._run.config.update(event, allow_val_change=True)
            values = scalars(event)
            if values:
                self._run.log(values, step=event["step"])

    def close(self) -> None:
        self._run.finish()


def scalars(event: dict[str, Any]) -> dict[str, float]:
    """The numbers of a train or validation event under `<kind>/<field>`; {} for other kinds."""
    if event["kind"] not in _CURVES:
        return {}
    return {
        f"{event['kind']}/{name}": float(value)
        for name, value in event.items()
        if name not in ("kind", "step", "time") and isinstance(value, int | float)
    }


def _require(module: str, product: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ValueError(
            f"logging to {product} needs the package {module!r}, which is not installed; "
            "install it with: pip install 'pithwood[log]', or turn this sink off"
        )
