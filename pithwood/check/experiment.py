"""Can two groups of runs be compared, and how far apart are they? A variant and its baseline, a run per seed each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pithwood.check.gates import Gate, GateError, require
from pithwood.checkpoint.load import latest_checkpoint
from pithwood.checkpoint.storage import read_state
from pithwood.config import to_dict
from pithwood.observe.summary import SUMMARY_FILE, read_summary
from pithwood.run import LENGTH_AND_LOGGING, Run
from pithwood.run_folder import find_run, load_run

STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; the last serves for more."""

METRICS = ("validation_loss", "validation_bits_per_byte")


@dataclass(frozen=True)
class Difference:
    """Variant minus baseline of one metric, over pairs of runs with the same seed."""

    metric: str
    variant: float
    """Mean over the variant's seeds."""
    baseline: float
    """Mean over the baseline's seeds."""
    mean: float
    """Mean difference."""
    half_width: float
    """Half of the 95 % interval of the mean difference; infinite for one seed."""
    seeds: int

    def text(self) -> str:
        """One line: the difference, its interval, and whether zero lies inside."""
        share = f" ({self.mean / self.baseline:+.2%})" if self.baseline else ""
        if self.seeds < 2:
            return f"{self.metric} {self.variant:.4f} against {self.baseline:.4f}: {self.mean:+.4f}{share}, one seed"
        low, high = self.mean - self.half_width, self.mean + self.half_width
        side = "lower" if high < 0 else "higher" if low > 0 else "not told apart"
        return (
            f"{self.metric} {self.variant:.4f} against {self.baseline:.4f}: {self.mean:+.4f} +- "
            f"{self.half_width:.4f}{share}, 95 % interval over {self.seeds} seeds: {side}"
        )


class Comparison:
    """Two groups of run folders and, once the gates have passed, their differences."""

    def __init__(self, variant: Sequence[str], baseline: Sequence[str], runs_dir: Path, min_seeds: int = 2) -> None:
        self.references = {"variant": list(variant), "baseline": list(baseline)}
        self.runs_dir, self.min_seeds = runs_dir, min_seeds
        self.folders: dict[str, list[Path]] = {}
        self.runs: dict[str, list[Run]] = {}
        self.summaries: dict[str, list[dict[str, Any]]] = {}

    def gates(self) -> list[Gate]:
        return [
            Gate("runs", self._runs),
            Gate("finished", self._finished),
            Gate("finite", self._finite),
            Gate("settings", self._settings),
            Gate("seeds", self._seeds),
            Gate("corpus", self._corpus),
            Gate("tokens", self._tokens),
            Gate("difference", lambda: "; ".join(d.text() for d in self.differences())),
        ]

    def differences(self) -> list[Difference]:
        """One per metric; call after the gates before it have passed."""
        found = []
        seeds = sorted(run.seed for run in self.runs["variant"])
        for metric in METRICS:
            value = {
                side: {run.seed: float(s[metric]) for run, s in zip(runs, self.summaries[side], strict=True)}
                for side, runs in self.runs.items()
            }
            pairs = [value["variant"][seed] - value["baseline"][seed] for seed in seeds]
            n = len(pairs)
            half = math.inf if n < 2 else STUDENT_T[min(n - 1, len(STUDENT_T)) - 1] * stdev(pairs) / math.sqrt(n)
            means = fmean(value["variant"].values()), fmean(value["baseline"].values())
            found.append(Difference(metric, *means, fmean(pairs), half, n))
        return found

    def _each(self) -> list[tuple[str, Path, Run, dict[str, Any]]]:
        return [
            (side, folder, run, summary)
            for side in self.references
            for folder, run, summary in zip(
                self.folders[side], self.runs[side], self.summaries.get(side, [{}] * len(self.runs[side])), strict=True
            )
        ]

    def _runs(self) -> str:
        for side, references in self.references.items():
            require(bool(references), f"no {side} is given")
            self.folders[side] = [find_run(reference, self.runs_dir) for reference in references]
            self.runs[side] = [load_run(folder) for folder in self.folders[side]]
        everything = [folder.resolve() for folders in self.folders.values() for folder in folders]
        for folder in everything:
            require(everything.count(folder) == 1, f"{folder.name} is named twice")
        return f"{len(self.folders['variant'])} against {len(self.folders['baseline'])}"

    def _finished(self) -> str:
        for side, folder, run, _ in self._each():
            if not (folder / SUMMARY_FILE).is_file():
                raise GateError(f"{folder.name} ({side}) has not finished: no {SUMMARY_FILE}; train it to its end")
            summary = read_summary(folder)
            require(
                summary["steps"] == run.steps,
                f"{folder.name} ({side}) finished {summary['steps']} steps, its settings ask for {run.steps}",
            )
            self.summaries.setdefault(side, []).append(summary)
        return f"{len(self._each())} runs reached their last step"

    def _finite(self) -> str:
        for side, folder, _, summary in self._each():
            for metric in METRICS:
                value = float(summary.get(metric, math.nan))
                require(math.isfinite(value), f"{folder.name} ({side}) has {metric}={value}: it diverged")
        return ", ".join(METRICS)

    def _settings(self) -> str:
        settings = {side: [_comparable(run) for run in runs] for side, runs in self.runs.items()}
        for side, group in settings.items():
            for other, folder in zip(group[1:], self.folders[side][1:], strict=True):
                keys = _differing(group[0], other)
                require(not keys, f"{folder.name} differs from the first {side} in {', '.join(keys[:4])}")
        keys = _differing(settings["variant"][0], settings["baseline"][0])
        require(bool(keys), "variant and baseline have the same settings: there is nothing to compare")
        shown = ", ".join(keys[:6]) + (f" and {len(keys) - 6} more" if len(keys) > 6 else "")
        return f"they differ in {shown}"

    def _seeds(self) -> str:
        seeds = {side: sorted(run.seed for run in runs) for side, runs in self.runs.items()}
        for side, values in seeds.items():
            require(len(set(values)) == len(values), f"the {side} has a seed twice: {values}")
        require(
            seeds["variant"] == seeds["baseline"],
            f"the variant has seeds {seeds['variant']}, the baseline {seeds['baseline']}; train the missing ones",
        )
        require(
            len(seeds["variant"]) >= self.min_seeds,
            f"{len(seeds['variant'])} seed tells nothing about chance; train at least {self.min_seeds}, or pass "
            "--min-seeds 1 and claim nothing",
        )
        return ", ".join(map(str, seeds["variant"]))

    def _corpus(self) -> str:
        found: dict[str, str] = {}
        for side, folder, _, _ in self._each():
            path = latest_checkpoint(folder)
            if path is None:
                raise GateError(f"{folder.name} ({side}) has no checkpoint, which tells what it was trained on")
            found[folder.name] = str(read_state(path)["data"]["corpus"])
        require(
            len(set(found.values())) == 1,
            "the runs saw different text or tokenizers: "
            + ", ".join(f"{name} {fingerprint[:12]}" for name, fingerprint in found.items()),
        )
        return next(iter(found.values()))[:12]

    def _tokens(self) -> str:
        for name in ("tokens", "validation_tokens", "validation_bytes"):
            values = {folder.name: summary[name] for _, folder, _, summary in self._each()}
            require(
                len(set(values.values())) == 1,
                f"{name} differs: " + ", ".join(f"{folder} {value:,}" for folder, value in values.items()),
            )
        _, _, _, summary = self._each()[0]
        return f"{summary['tokens']:,} trained on, {summary['validation_tokens']:,} validated on, in every run"


def _comparable(run: Run) -> dict[str, Any]:
    """Leaf settings by path, without seed, name and what does not change a step (but with the length)."""
    skipped = {"seed", "name", *LENGTH_AND_LOGGING} - {"steps"}
    return dict(_leaves({key: value for key, value in to_dict(run).items() if key not in skipped}, ""))


def _leaves(value: Any, path: str) -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [leaf for key, item in value.items() for leaf in _leaves(item, f"{path}.{key}" if path else key)]
    if isinstance(value, list) and value:
        return [leaf for i, item in enumerate(value) for leaf in _leaves(item, f"{path}.{i}")]
    return [(path, value)]


def _differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    absent = object()
    return [key for key in dict.fromkeys([*a, *b]) if a.get(key, absent) != b.get(key, absent)]
