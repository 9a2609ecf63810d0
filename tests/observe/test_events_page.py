"""docs/events.md says what runs write: every kind and every field, and no others."""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pithwood.data.mixture import MixtureConfig, MixturePart
from pithwood.data.sources import TextFolder
from pithwood.observe.events import EventKind, EventLog, Sink, read_events
from pithwood.observe.spikes import SpikeConfig
from pithwood.run import Phase, Run
from pithwood.train import train
from tests.test_train import small_run

ROOT = Path(__file__).parents[2]
ALWAYS = {"kind", "step", "time"}
GPU_ONLY = {("train", "mfu_measured")}
PARTS = ("prose", "code")


@functools.cache
def documented() -> dict[str, set[str]]:
    """Kind -> its fields, as the page lists them."""
    found: dict[str, set[str]] = {}
    for section in re.split(r"^## ", (ROOT / "docs" / "events.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        fields = set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE))
        for kind in section.partition("\n")[0].split(", "):
            found[kind] = fields
    return found


def named_in_the_source() -> Iterator[tuple[str, str]]:
    """Kind and field of every keyword in a call of `emit` with that kind."""
    for path in (ROOT / "pithwood").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "emit":
                kind = node.args[0]
                if isinstance(kind, ast.Constant):
                    yield from ((kind.value, keyword.arg) for keyword in node.keywords if keyword.arg)


class Full(Sink):
    def write(self, events: list[dict[str, Any]]) -> None:
        raise OSError("no space left")


def written(events: list[dict[str, Any]], parts: tuple[str, ...] = ()) -> set[tuple[str, str]]:
    """Kind and field of every event, a part's name as <part> and other names of loss terms as <name>."""
    found = set()
    for event in events:
        for name in event:
            head, slash, tail = name.partition("/")
            if slash:
                name = f"{head}/<part>" if tail in parts else f"{head}/<name>"
            if name not in ALWAYS:
                found.add((event["kind"], name))
    return found


def test_every_kind_has_a_section():
    assert set(documented()) == set(typing.get_args(EventKind))


def test_the_page_lists_the_fields_that_runs_write_and_no_others(tmp_path, capsys):
    # once the window is full, nearly every step is called a spike
    spikes = SpikeConfig(grad_norm_factor=1.0001, steps_around=1)
    one = dataclasses.replace(small_run(tmp_path / "text"), steps=8, spikes=spikes)
    plain = train(one, runs_dir=tmp_path / "runs", console=False)
    train(dataclasses.replace(one, steps=28), runs_dir=tmp_path / "runs", console=False)
    mixed = train(mixture_run(tmp_path, one), runs_dir=tmp_path / "runs", console=False)
    log = EventLog(tmp_path, [Full()], log_every=1)
    log.emit("run", 0)
    log.close()
    found = written(read_events(Path(plain["run_dir"]))) | written(read_events(tmp_path))
    found |= written(read_events(Path(mixed["run_dir"])), PARTS) | set(named_in_the_source())
    listed = {(kind, name) for kind, fields in documented().items() for name in fields}
    assert {("resume", "recipe"), ("spike", "usual"), ("spike_step", "batches"), ("sink", "reason")} <= found
    assert found - listed == set()
    assert listed - found - GPU_ONLY == set()


def mixture_run(folder: Path, run: Run) -> Run:
    """The same model over two parts, with a second phase."""
    for number in range(60):
        for part in PARTS:
            (folder / part).mkdir(exist_ok=True)
            words = " ".join(f"{part}{number * place % 97}" for place in range(1, 60))
            (folder / part / f"{number}.txt").write_text(words)
    parts = {part: MixturePart(TextFolder(str(folder / part))) for part in PARTS}
    data = MixtureConfig(parts, tokenizer_part=PARTS[0], vocab_size=300, dedup_threshold=None)
    phases = tuple(Phase(until_step=step, attention=run.model.attention) for step in (4, 8))
    return dataclasses.replace(run, name="mixed", data=data, steps=8, phases=phases)
