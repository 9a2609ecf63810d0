"""How coherent block selection is in a trained model: trains a recipe for some minutes, then measures every layer.

    python -m bench.routing --minutes 3 [--out DIR] [recipe settings, such as samples_per_step=8]

Per layer: the union of past blocks over 64 and 128 queries against k - 1 (1: neighbours agree), what random choices
would give, and the share of hits on the most chosen 1 % of blocks. The text is the Python source of the packages
installed beside this interpreter. Writes routing.json (default: bench/results/<device>) and qkv.npz, the queries, keys
and values of one layer on the longest document, for `pithwood bench attention --trained qkv.npz`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import sysconfig
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    from bench.results import write_results
    from pithwood.bench.inputs import TrainedRun, blocks_of, layer_inputs, load_trained, save_qkv
    from pithwood.config import apply_overrides
    from pithwood.data.prepare import CorpusConfig
    from pithwood.data.sources import Document, Source, Survey
    from pithwood.observe.events import read_events
    from pithwood.observe.routing_stats import routing_stats
    from pithwood.ops.select import select
    from pithwood.ops.summarise import summarise
    from pithwood.recipes import load_recipe
    from pithwood.run import Run
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}; install it, or run from the checkout's root with PYTHONPATH=.") from None

CALIBRATION_STEPS = 8
STEPS_LEFT_OUT = 4
"""First steps of the calibration, which compile kernels."""
FEWEST_STEPS = 20


@dataclasses.dataclass(frozen=True)
class PackageFolders(Source):
    """Python source of the installed packages, one document per folder: its files one after another, so that documents
    are long enough for a choice among blocks."""

    max_bytes: int = 40_000_000
    """Bytes of text at most, at least 1; folders are taken in the order of their names."""
    document_bytes: int = 400_000
    """A folder's text is cut off at the file that would pass this size; at least 1."""

    def documents(self) -> Iterator[Document]:
        root = Path(sysconfig.get_paths()["purelib"])
        folders: dict[str, list[Path]] = {}
        for path in sorted(root.glob("*/**/*.py")):
            folders.setdefault(path.parent.relative_to(root).as_posix(), []).append(path)
        documents, total = [], 0
        for name, paths in sorted(folders.items()):
            content = self._folder_text(paths)
            if content and total + len(content) <= self.max_bytes:
                documents.append(Document(name, content))
                total += len(content)
        if not documents:
            raise ValueError(f"data.source=PackageFolders: no Python packages with source under {root}")
        yield from documents

    def survey(self) -> Survey:
        return Survey("Python source of the installed packages, by folder", None, None)

    def _folder_text(self, paths: list[Path]) -> bytes:
        content = b""
        for path in paths:
            text = path.read_bytes()
            try:
                text.decode("utf-8")
            except UnicodeDecodeError:
                continue
            if len(content) + len(text) <= self.document_bytes:
                content += text
        return content


def trained(run: Run, minutes: float, runs_dir: Path) -> dict[str, Any]:
    """The summary of `run` trained for about so many minutes, its schedule complete: steps are timed first."""
    from pithwood.train import train

    short = dataclasses.replace(run, seed=run.seed + 1, steps=CALIBRATION_STEPS, log_every=1)
    folder = Path(train(short, runs_dir=runs_dir, new=True)["run_dir"])
    speeds = [event["tokens_per_s"] for event in read_events(folder) if event["kind"] == "train"][STEPS_LEFT_OUT:]
    tokens_per_s = sorted(speeds)[len(speeds) // 2]
    steps = max(int(60 * minutes * tokens_per_s / (run.samples_per_step * run.seq_len)), FEWEST_STEPS)
    print(f"{tokens_per_s:.0f} tokens/s: {steps} steps in {minutes} min", file=sys.stderr, flush=True)
    summary = train(dataclasses.replace(run, steps=steps), runs_dir=runs_dir)
    if "interrupted" in summary:
        raise SystemExit("stopped; run the same command again to go on")
    return summary


def measure(model: TrainedRun) -> tuple[list[dict[str, Any]], dict[int, tuple[Tensor, Tensor, Tensor]]]:
    """A row per MoBA layer, and the layers' tensors."""
    layers = [i for i in range(len(model.model.blocks)) if blocks_of(model, i) is not None]
    if not layers:
        raise ValueError(f"{model.name} has no MoBA layer to measure")
    kept = layer_inputs(model, layers)
    packing, rows = model.batch.packing, []
    for layer in layers:
        size, top_k = blocks_of(model, layer) or (0, 0)
        q, k, _ = kept[layer]
        mixer: Any = model.model.blocks[layer].self_attn
        options = {"tie": mixer.config.tie, "route_per": mixer.config.route_per, "mean_dtype": mixer.config.mean_dtype}
        blocks = select(q, summarise(k, packing, size), packing, top_k, block_size=size, **options)
        stats = dataclasses.asdict(routing_stats(blocks.ids, packing, size))
        rows.append({"layer": layer, "block_size": size, "top_k": top_k, **stats})
    return rows, kept


def line_of(row: dict[str, Any]) -> str:
    """A layer in one line."""
    return (
        f"layer {row['layer']:2d} ({row['block_size']},{row['top_k']}): union/(k-1) over 64 rows "
        f"{row['union_64']:.2f} (random {row['random_union_64']:.2f}), 128 rows {row['union_128']:.2f} (random "
        f"{row['random_union_128']:.2f}), "
        f"neighbours share {row['jaccard']:.2f}, top 1% of blocks {row['top_1_percent_share']:.1%} of hits, "
        f"first block {row['first_block_share']:.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", metavar="path=value", nargs="*", help="change a setting of the recipe")
    parser.add_argument("--recipe", default="lm_100m")
    parser.add_argument("--minutes", type=float, default=3.0, help="of training; preparing the text comes on top")
    parser.add_argument("--samples", type=int, default=8, help="validation samples to measure on")
    parser.add_argument("--layer", type=int, help="whose q, k, v to save (default: the middle one)")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, help="folder of routing.json and qkv.npz")
    args = parser.parse_args()
    # Those that training imports only when it comes to use them.
    missing = [name for name in ("safetensors", "matplotlib", "rich") if find_spec(name) is None]
    if missing:
        raise SystemExit(f"training needs packages that are not installed: pip install {' '.join(missing)}")
    started = time.monotonic()
    own = load_recipe(args.recipe)
    if not isinstance(own.data, CorpusConfig):
        parser.error(f"--recipe {args.recipe} mixes corpora, and this trains on one; take another recipe")
    text = dataclasses.replace(own.data, source=PackageFolders())
    # Few minutes are better spent on many small steps; checkpoints and validation only at the end.
    run = dataclasses.replace(
        own,
        data=text,
        samples_per_step=8,
        log_every=10,
        validate_every=10**6,
        checkpoint_every=10**6,
        sample_prompts=(),
    )
    run = apply_overrides(run, args.overrides)
    summary = trained(run, args.minutes, args.runs_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_trained(Path(summary["run_dir"]).name, args.runs_dir, device, args.samples)
    rows, kept = measure(model)
    for row in rows:
        print(line_of(row))
    about = {key: summary[key] for key in ("steps", "tokens", "validation_loss", "validation_bits_per_byte")}
    rows = [{"model": model.name, **about, "seconds": time.monotonic() - started, **row} for row in rows]
    path = write_results("routing", rows, args.out)
    layer = rows[len(rows) // 2]["layer"] if args.layer is None else args.layer
    if layer not in kept:
        raise SystemExit(f"--layer {layer} is no MoBA layer; choose one of {sorted(kept)}")
    print(path)
    print(save_qkv(path.with_name("qkv.npz"), model, layer, kept[layer]))


if __name__ == "__main__":
    main()
