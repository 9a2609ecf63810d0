"""`pithwood evaluate`: loss, bits per byte and loss by position of a trained run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pithwood.commands.common import add_command, json_text
from pithwood.commands.run_arguments import add_run_arguments, import_files, tell

HELP = """examples:
  pithwood evaluate demo
  pithwood evaluate demo --attention full --samples 8
  pithwood evaluate demo --text README.md --text docs/moe.md --json

The result and a picture are kept in RUN/evaluations/, one pair of files per evaluation."""


def add(commands: Any) -> None:
    """Add the command to the command line."""
    parser = add_command(commands, "evaluate", "measure the loss of a trained run, as a whole and by position", HELP)
    parser.add_argument(
        "--split", choices=("validation", "train"), help="which part of the corpus (default: validation)"
    )
    parser.add_argument(
        "--text", metavar="FILE", type=Path, action="append", default=[],
        help="evaluate on a UTF-8 file instead; may be repeated, each file is a document",
    )  # fmt: skip
    parser.add_argument(
        "--corpus", metavar="DIR", type=Path, help="evaluate on another prepared corpus of the same tokenizer"
    )
    parser.add_argument("--samples", metavar="N", type=int, help="only the first N samples (default: all)")
    parser.add_argument("--seq-len", metavar="N", type=int, help="tokens per sample (default: as trained)")
    parser.add_argument(
        "--attention", choices=("trained", "full", "moba"), default="trained",
        help="as trained, full attention with the same weights, or the run's MoBA where it was trained with full",
    )  # fmt: skip
    parser.add_argument(
        "--buckets", metavar="N", type=int, help="buckets of positions, equally wide (default: powers of two)"
    )
    parser.add_argument("--name", metavar="NAME", help="name of the kept result (default: from what was evaluated)")
    parser.add_argument("--no-save", action="store_true", help="keep no result in the run folder")
    add_run_arguments(parser, "the losses")


def run(args: argparse.Namespace) -> tuple[int, str]:
    """The losses, as tables or as JSON."""
    if args.text and (args.split or args.corpus):
        other = "--split" if args.split else "--corpus"
        raise ValueError(f"--text and {other} exclude each other; give one of them")
    if args.part and (args.text or args.corpus):
        raise ValueError("--part names a part of the run's own mixture; leave it out with --text and --corpus")
    if args.name and args.no_save:
        raise ValueError("--name names a kept result, and --no-save keeps none; give one of them")

    from pithwood.evaluate.run import Asked, check_can_save, evaluate_run, save_evaluation
    from pithwood.run_folder import find_run

    import_files(args)
    asked = Asked(
        args.split or "validation",
        tuple(args.text),
        args.corpus,
        args.part,
        args.samples,
        args.seq_len,
        args.attention,
        args.buckets,
    )
    if not args.no_save:
        check_can_save(find_run(args.run.partition("@")[0], args.runs_dir), args.name)
    result = evaluate_run(args.run, asked, runs_dir=args.runs_dir, step=args.step, device=args.device, progress=tell)
    if not args.no_save:
        path = save_evaluation(Path(result["run_dir"]), result, args.name)
        _draw(path, result)
        result = {**result, "name": path.stem, "file": str(path), "picture": str(path.with_suffix(".png"))}
    return 0, json_text(result) if args.json else _tables(result)


def _draw(path: Path, result: dict[str, Any]) -> None:
    """The picture beside a kept result, with those of other attention on the same tokens for comparison."""
    from pithwood.evaluate.run import read_evaluations
    from pithwood.observe.inspect_plots import plot_positions

    def label(entry: dict[str, Any]) -> str:
        return f"{'as trained' if entry['attention'] == 'trained' else entry['attention']}: {entry['loss']:.3f}"

    lines = {label(result): result["buckets"]}
    same = ("step", "split", "corpus", "part", "texts", "samples", "seq_len", "tokens", "bytes")
    for other in read_evaluations(path.parent.parent):
        if other["attention"] != result["attention"] and all(other[key] == result[key] for key in same):
            lines.setdefault(label(other), other["buckets"])
    what = result["split"] or ", ".join(Path(text).name for text in result["texts"])
    title = f"{result['run']} at step {result['step']}, {what[:60]}: loss by position"
    plot_positions(lines, path.with_suffix(".png"), title)


def _tables(result: dict[str, Any]) -> str:
    from pithwood.observe.inspect_tables import Table, number, render

    where = f" of {result['corpus'] or result['part']}" if result["corpus"] or result["part"] else ""
    what = f"the {result['split']} split{where}" if result["split"] else ", ".join(result["texts"])
    how = "as trained" if result["attention"] == "trained" else result["attention"]
    clusters = {"documents": f"{result['documents']:,} documents", "contexts": "the samples of one document"}
    rows = [
        [
            _span(bucket["from"], bucket["to"]),
            f"{bucket['tokens']:,}",
            number(bucket["loss"]),
            number(bucket["standard_error"]),
            number(bucket["bits_per_byte"]),
        ]
        for bucket in result["buckets"]
    ]
    lines = [
        f"{result['run']} at step {result['step']}, attention {how} ({', '.join(dict.fromkeys(result['mixers']))})",
        f"{what}: {result['samples']:,} samples of {result['seq_len']:,} tokens, {result['bytes']:,} bytes",
        f"loss {number(result['loss'], 4)} +- {number(result['standard_error'], 4)} nats per token, "
        f"{number(result['bits_per_byte'], 4)} bits per byte",
    ]
    after = [f"+- is one standard error, over {clusters[result['errors_over']]}"]
    if "file" in result:
        after.append(f"kept in {result['file']}, picture beside it")
    header = ("position", "tokens", "loss", "+-", "bits/byte")
    return render([*lines, Table("loss by position in the document", header, rows), "", *after])


def _span(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"
