"""The report as one HTML page: everything in it, nothing asked from the network."""

from __future__ import annotations

import html
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pithwood.observe.inspect_tables import count, number, percent
from pithwood.observe.plots import common_sigma, in_points, loss_limits, smooth
from pithwood.report.assets import SCRIPT, STYLE
from pithwood.report.charts import Line, block_map, line_chart, load_map

COLOURS = 6
"""Series colours of the style sheet; more runs begin again."""

_SMALL = (
    ("grad_norm", "gradient norm"),
    ("lr", "learning rate"),
    ("tokens_per_s", "tokens per second"),
    ("mfu", "MFU"),
    ("peak_memory_gb", "peak memory, GB"),
    ("expert_load_max_over_mean", "expert load, largest over mean"),
    ("expert_load_entropy", "expert load, entropy (1: even)"),
    ("block_own_share", "share of choices that are the own block"),
    ("block_entropy", "entropy of block choices (1: even)"),
    ("block_union_128", "blocks that 128 queries together choose"),
)
_WORST = 3
"""Parts of the model whose norms are shown for each step around a spike."""


def report_page(runs: Sequence[Mapping[str, Any]], comparison: Mapping[str, Any] | None) -> str:
    """The page's text (UTF-8) for what `gather_run` and `gather_comparison` return."""
    names, alone = [run["name"] for run in runs], len(runs) == 1
    parts = [_head(", ".join(names)), f"<h1>{_text(' and '.join(names))}</h1>"]
    parts += [_tiles(runs[0]) if alone else _contents(names), _curves(runs)]
    if comparison is not None:
        parts.append(_comparison(comparison))
    for place, run in enumerate(runs):
        head = "<h2>The run</h2>" if alone else f"<h2>{_text(run['name'])}</h2>{_tiles(run)}"
        parts += [
            f"<section id=run{place}>{head}", _spikes(run), _samples(run), _blocks(run), _experts(run), _model(run),
            _settings(run), "</section>",
        ]  # fmt: skip
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    parts.append(f"<p class=soft>Written by pithwood report, {written}.</p><script>{SCRIPT}</script></body></html>\n")
    return "\n".join(part for part in parts if part)


def _head(title: str) -> str:
    return (
        '<!DOCTYPE html><html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width, '
        # no favicon is asked for either
        'initial-scale=1"><link rel=icon href="data:,"><meta http-equiv=Content-Security-Policy content="default-src '
        "'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body>"
    )


def _contents(names: Sequence[str]) -> str:
    links = [f'<a href="#run{place}">{_text(name)}</a>' for place, name in enumerate(names)]
    return f'<nav><a href="#compare">comparison</a>{"".join(links)}</nav>'


def _curves(runs: Sequence[Mapping[str, Any]]) -> str:
    """Bits per byte (or the loss, where bytes are not counted) in large, everything else in small."""
    name = "bits_per_byte" if any("bits_per_byte" in run["curves"] for run in runs) else "loss"
    lines, marks, limits = [], [], []
    logged = [run["curves"][name]["tokens"] for run in runs if name in run["curves"]]
    sigma = common_sigma(logged) if len(logged) > 1 else None
    for place, run in enumerate(runs):
        curves, alone = run["curves"], len(runs) == 1
        who = "" if alone else f"{run['name']}: "
        train, valid = curves.get(name), curves.get(f"validation/{name}")
        train_y = np.array(train["values"] if train else [], dtype=np.float64)
        valid_y = np.array(valid["values"] if valid else [], dtype=np.float64)
        smooth_y = smooth(train_y, in_points(sigma, train["tokens"]) if train and sigma is not None else None)
        gzip = run["gzip_bits_per_byte"] if name == "bits_per_byte" else None
        gzip = gzip if gzip is not None and math.isfinite(gzip) else None
        limits.append(loss_limits(train_y, smooth_y, valid_y, gzip if alone else None))
        if train:
            lines.append(Line(f"{who}train, step by step", train["tokens"], train["values"], place % COLOURS, "faint"))
            lines.append(Line(f"{who}train", train["tokens"], smooth_y.tolist(), place % COLOURS))
        if valid:
            colour = 1 if alone else place % COLOURS
            lines.append(Line(f"{who}validation", valid["tokens"], valid["values"], colour, "points"))
        if alone and gzip is not None and train:
            ends = [0.0, max(train["tokens"])]
            lines.append(Line("gzip -9 of the validation text", ends, [gzip, gzip], 2, "dashed"))
        if alone:
            at = dict(zip(curves["loss"]["steps"], curves["loss"]["tokens"], strict=True)) if "loss" in curves else {}
            marks = [at[spike["step"]] for spike in run["spikes"] if spike["step"] in at]
    title = "bits per byte" if name == "bits_per_byte" else "loss"
    between = (min(low for low, _ in limits), max(high for _, high in limits))
    large = line_chart(f"{title} against training tokens", lines, limits=between, marks=marks, wide=True)
    small = []
    for field, caption in _SMALL:
        shown = [
            Line(run["name"], run["curves"][field]["tokens"], run["curves"][field]["values"], place % COLOURS)
            for place, run in enumerate(runs)
            if field in run["curves"]
        ]
        if shown:
            small.append(line_chart(caption, shown))
    note = "<p class=soft>Dashed red lines mark spikes.</p>" if marks else ""
    return (
        f"<section id=curves><h2>Curves</h2>{large}{note}<div class=grid>{''.join(small)}</div>"
        "<p class=soft>All curves are drawn against training tokens.</p></section>"
    )


def _comparison(comparison: Mapping[str, Any]) -> str:
    names = comparison["runs"]
    rows = []
    for row in comparison["metrics"]:
        for key, words in (
            ("train_loss", "train loss"),
            ("validation_loss", "validation loss"),
            ("train_bits_per_byte", "train bits/byte"),
            ("validation_bits_per_byte", "validation bits/byte"),
        ):
            values = [
                number(value[key]) + ("*" if key.startswith("valid") and value["interpolated"] else "")
                for value in row["values"]
            ]
            if any(value != "-" for value in values):
                rows.append([f"{words} at {count(row['tokens'])} tokens", *values])
    rows.append(["tokens per second (median)", *map(count, comparison["speed"])])
    settings = [[row["key"], *map(_value, row["values"])] for row in comparison["settings"]]
    warning = (
        ""
        if comparison["same_text"]
        else "<p>The runs were validated on different text as far as their settings tell: their losses cannot be "
        "compared.</p>"
    )
    stars = any(value["interpolated"] for row in comparison["metrics"] for value in row["values"])
    note = "<p class=soft>* on the line between the neighbouring validations</p>" if stars else ""
    return (
        f"<section id=compare><h2>Comparison</h2>{warning}{_table('at equal tokens', ['', *names], rows)}{note}"
        f"{_table('settings that differ', ['setting', *names], settings)}</section>"
    )


def _tiles(run: Mapping[str, Any]) -> str:
    about, facts, summary = run["about"], run["facts"], run["summary"]
    tiles = [
        (about["state"], f"step {facts['run']['step']:,} of {facts['run']['steps']:,}"),
        (count(facts["run"]["tokens"]), "tokens trained"),
        (number(about["validation_bits_per_byte"]), "validation bits per byte"),
        (number(about["validation_loss"]), "validation loss"),
        (number(run["gzip_bits_per_byte"]), "bits per byte of gzip -9"),
        (count(facts["parameters"]["total"]), f"parameters, {count(facts['parameters']['active'])} active"),
    ]
    if "tokens_per_s" in summary:
        tiles.append((count(summary["tokens_per_s"]), f"tokens per second on {summary.get('device', '?')}"))
    boxes = "".join(f"<div class=tile><b>{_text(value)}</b><span>{_text(what)}</span></div>" for value, what in tiles)
    reason = f"<p>{_text(about['reason'])}</p>" if about["reason"] else ""
    origin = f"<p>Begun from {_text(about['branched_from'])}.</p>" if about["branched_from"] else ""
    return f"<div class=tiles>{boxes}</div>{reason}{origin}"


def _spikes(run: Mapping[str, Any]) -> str:
    if not run["spikes"]:
        return ""
    parts = []
    for spike in run["spikes"]:
        usual = f", usually {number(spike['usual'])}" if math.isfinite(spike["usual"]) else ""
        rows = []
        for row in spike["steps"]:
            norms = sorted(row["gradient_norms"].items(), key=lambda item: -_rank(item[1]))[:_WORST]
            largest = max(row["activation_rms"].items(), key=lambda item: _rank(item[1]), default=None)
            documents = list(dict.fromkeys(row["documents"]))
            more = f" and {len(documents) - 4} more" if len(documents) > 4 else ""
            rows.append(
                [
                    f"{row['step']}{' (spike)' if row['step'] == spike['step'] else ''}",
                    ", ".join(f"{name} {value:.3g}" for name, value in norms) or "-",
                    "-" if largest is None else f"{largest[0]} {largest[1]:.3g}",
                    ", ".join(documents[:4]) + more,
                ]
            )
        header = ["step", "largest gradient norms", "largest activations (RMS)", "documents in its batches"]
        parts.append(
            f"<details><summary>step {spike['step']}: {_text(spike['reason'])} {number(spike['value'])}{usual}"
            f"</summary>{_table('', header, rows, left=True)}</details>"
        )
    return f"<h3>Spikes</h3>{''.join(parts)}"


def _samples(run: Mapping[str, Any]) -> str:
    if not run["sample"].strip():
        why = f"A run writes samples when it is finished; pithwood generate {run['name']} makes one at once."
        return f"<h3>Samples</h3><p class=soft>{_text(why)}</p>"
    return f"<h3>Samples</h3><pre>{_text(run['sample'])}</pre>"


def _blocks(run: Mapping[str, Any]) -> str:
    rows = run["facts"]["routing"]["blocks"]
    if not rows:
        return ""
    maps = []
    for drawn in run["maps"]:
        size = drawn["block_size"] * drawn["together"]
        maps.append(block_map(drawn["layer"], drawn["shares"], f"{drawn['blocks']} blocks; a cell is {size} tokens"))
    table = _table(
        "choices on validation text",
        ["layer", "size x top_k", "own block", "entropy", "union of 128", "top 1% of blocks"],
        [
            [
                str(row["layer"]), f"{row['block_size']} x {row['top_k']}", percent(row["own_share"]),
                number(row["entropy"]), number(row["union_128"], 1), percent(row["popular_share"]),
            ]
            for row in rows
        ],
    )  # fmt: skip
    note = (
        "<p class=soft>Which blocks of keys (left to right) the queries of each block (top to bottom) of one "
        "validation document attend to. The diagonal is the query's own block, always chosen; the darker, the more "
        "often.</p>"
    )
    return f"<h3>Block choices</h3>{note}<div class=maps>{''.join(maps)}</div>{table}"


def _experts(run: Mapping[str, Any]) -> str:
    routing = run["facts"]["routing"]
    if not routing["experts"]:
        return ""
    table = _table(
        f"on {routing['samples']:,} validation samples ({routing['tokens']:,} tokens)",
        ["layer", "experts", "largest over mean", "entropy", "without a token"],
        [
            [
                str(row["layer"]), str(len(row["counts"])), number(row["max_over_mean"], 2), number(row["entropy"]),
                str(row["dead"]),
            ]
            for row in routing["experts"]
        ],
    )  # fmt: skip
    note = "<p class=soft>A cell is an expert: the darker, the more tokens; red outlines had none.</p>"
    return f"<h3>Expert load</h3>{load_map(routing['experts'])}{note}{table}"


def _model(run: Mapping[str, Any]) -> str:
    parameters, cost = run["facts"]["parameters"], run["facts"]["cost"]
    total = parameters["total"]
    rows = [
        [row["part"], count(row["total"]), percent(row["total"] / total, 1), count(row["active"])]
        for row in parameters["parts"]
    ]
    rows.append(["all", count(total), "100.0%", count(parameters["active"])])
    costs = [
        [row["part"], count(row["forward_flops"]), percent(row["share"], 1), count(row["executed_flops"])]
        for row in cost["parts"]
    ]
    costs.append(["all", count(cost["forward_flops"]), "100.0%", count(cost["executed_flops"])])
    title = f"forward FLOPs per token at length {cost['length']:,}; cache {count(cost['cache_bytes'])}B per token"
    return (
        "<h3>Model</h3><div class=grid>"
        f"{_table('parameters (active: those that one token meets)', ['part', 'total', 'share', 'active'], rows)}"
        f"{_table(title, ['part', 'FLOPs', 'share', 'executed'], costs)}</div>"
    )


def _settings(run: Mapping[str, Any]) -> str:
    rows = [[key, _value(value)] for key, value in run["settings"].items()]
    return (
        f"<details><summary>All {len(rows)} settings</summary>{_table('', ['setting', 'value'], rows, left=True)}"
        "</details>"
    )


def _table(title: str, header: Iterable[str], rows: Iterable[Iterable[str]], left: bool = False) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    caption = f"<caption>{_text(title)}</caption>" if title else ""
    look = " class=left" if left else ""
    return f"<div class=scroll><table{look}>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _value(value: Any) -> str:
    return "-" if value is None else "true" if value is True else "false" if value is False else str(value)


def _rank(value: float) -> float:
    """A norm that is not finite is the first to look at."""
    return value if math.isfinite(value) else math.inf
