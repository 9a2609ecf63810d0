"""`pithwood bench attention`: measure attention against its rivals and write attention.json."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from pithwood.commands.common import add_command, json_text

HELP = """examples:
  pithwood bench attention
  pithwood bench attention --rows issue --dry-run
  pithwood bench attention --length 8192,32768 --blocks 128x8,512x3 --heads 32 --kv-heads 4
  pithwood bench attention --rows 32K-128x8 128K-128x8 --impls pithwood,fa4 --pass fwd+bwd --append --budget-s 500
  pithwood bench attention --rows gqa d64 packed --budget-s 550 --append
  pithwood bench attention --trained lm_100m --layer 0,6 --breakdown
  pithwood bench attention --trained qkv.npz --length 2048,4096,8192 --blocks 128x8

Without --rows, --length, --blocks and the like say what to measure (every combination); with --rows they choose among
the preset's rows: issue (8K to 1M tokens), gqa (32 query and 4 KV heads), d64, packed (documents of 1 to 32K tokens),
smoke (seconds), or single rows of issue such as 128K-512x8. Cheap shapes come first, and the file is written after
every row. Dense attention is measured at the same shapes in the same run. Each implementation is compared with
fp64 first and gets no numbers if it disagrees. PITHWOOD_COMMIT, where it is set, names the commit of
code that was copied."""


def add(subjects: Any) -> None:
    """Add the subject to `pithwood bench`."""
    parser = add_command(subjects, "attention", "measure attention, correctness first, and write attention.json", HELP)
    parser.add_argument(
        "--rows", metavar="NAME", nargs="+", help="issue, gqa, d64, packed, smoke, or as 128K-128x8 (default: smoke)"
    )
    parser.add_argument("--length", metavar="N[,N]", help="tokens per sequence (default: 8192)")
    parser.add_argument("--documents", metavar="N,N", help="lengths of packed documents, instead of --length")
    parser.add_argument("--sequences", metavar="N", help="sequences of --length tokens each (default: 2)")
    parser.add_argument("--blocks", metavar="BxK[,BxK]", help="MoBA's block size x top k (default: 128x8)")
    parser.add_argument("--heads", metavar="N", help="query heads (default: 16)")
    parser.add_argument("--kv-heads", metavar="N", help="KV heads (default: as many as query heads)")
    parser.add_argument("--head-dim", metavar="N", help="size of a head (default: 128)")
    parser.add_argument("--dtype", metavar="NAME", help="bf16, fp16 or fp32 (default: bf16)")
    parser.add_argument("--pass", dest="passes", metavar="P[,P]", help="fwd, fwd+bwd (default: both)")
    parser.add_argument(
        "--impls", metavar="A[,B]",
        help="among pithwood, pithwood-triton, pithwood-torch, flex, and dense fa4, cudnn, flash, varlen, sdpa "
        "(default: all that suit the device)",
    )  # fmt: skip
    parser.add_argument(
        "--trained",
        metavar="RUN|FILE",
        help="queries, keys and values of a trained run, or of an .npz of bench/routing.py",
    )
    parser.add_argument("--layer", metavar="N[,N]", help="layers of a trained run (default: the middle one)")
    parser.add_argument("--breakdown", action="store_true", help="also time MoBA's stages, and on a GPU each kernel")
    parser.add_argument("--budget-s", metavar="S", type=float, help="skip rows for which these seconds do not suffice")
    parser.add_argument("--append", action="store_true", help="keep the other rows that the results file holds")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="where attention.json goes (default: bench/results/<device>)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the rows and the least time each can take")
    parser.add_argument("--json", action="store_true", help="print the rows as one JSON object on stdout")
    parser.add_argument(
        "--runs-dir", metavar="DIR", type=Path, default=Path("runs"), help="where runs live (default: runs)"
    )


def run(args: argparse.Namespace) -> tuple[int, str]:
    """The measured rows, one line each or as JSON; exit code 1 if Pithwood's own attention failed somewhere, or if
    nothing was measured: then a results file that is there keeps its rows."""
    wanted = _wanted(args)
    saved = args.trained is not None and args.trained.endswith(".npz")
    if args.trained is not None:
        fixed = ("rows", "documents", "heads", "kv_heads", "head_dim", *(("layer",) if saved else ("length", "dtype")))
        for name in fixed:
            if getattr(args, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"{option} does not go with --trained {args.trained}: it says so itself")
        if saved and args.blocks is None:
            raise ValueError(f"--trained {args.trained} needs --blocks: the file holds no block size")
    elif args.layer is not None:
        raise ValueError("--layer chooses layers of a trained run; add --trained RUN")
    if args.documents is not None and (args.length is not None or args.sequences is not None or args.rows is not None):
        raise ValueError("--documents says all about lengths; drop --length, --sequences and --rows")
    if args.budget_s is not None and not args.budget_s > 0:
        raise ValueError(f"--budget-s={args.budget_s} must be above 0")

    import torch

    from pithwood.bench import attention, inputs
    from pithwood.bench.cases import grid, narrowed, preset, row_key, row_order
    from pithwood.bench.implementations import DENSE, MOBA, default_implementations
    from pithwood.bench.plot import plot_attention
    from pithwood.bench.results import device_name, merge_rows, read_results, write_results

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    impls = tuple(args.impls.split(",")) if args.impls else default_implementations(device)
    for name in impls:
        if name not in (*MOBA, *DENSE):
            raise ValueError(f"--impls {name} is not known; choose among {', '.join((*MOBA, *DENSE))}")

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    make_inputs: Any = lambda shape: inputs.random_inputs(shape, device)  # noqa: E731
    if saved:
        qkv = inputs.load_qkv(Path(args.trained))
        cases = _saved_cases(qkv, wanted)
        make_inputs = lambda shape: qkv.inputs(shape, device)  # noqa: E731
    elif args.trained is not None:
        trained = inputs.load_trained(args.trained, args.runs_dir, device, (wanted.get("sequences") or [2])[0], tell)
        cases, kept = _trained_cases(trained, args, wanted)
        make_inputs = lambda shape: inputs.trained_inputs(shape, kept[shape.layer], device)  # noqa: E731
    elif args.rows is not None or not wanted.keys() - {"pass"}:
        chosen = [case for name in args.rows or ["smoke"] for case in preset(name)]
        cases = narrowed(list(dict.fromkeys(chosen)), wanted)
    else:
        cases = grid(wanted)
    if args.dry_run:
        return 0, _plan(cases, impls, args.json)

    folder = args.out or Path("bench") / "results" / device_name()
    path, picture = folder / "attention.json", folder / "attention.png"
    there = path.is_file()
    old = (read_results(path) or {}) if args.append else {}
    options = attention.Options(impls, args.budget_s or float("inf"), args.breakdown, args.command_line)

    def save(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        both = merge_rows(old.get("rows", []), rows, row_key, attention.measured)
        merged = attention.beside_dense(sorted(both, key=row_order))
        if _timed(rows) or (not there and any(row["op"] != "peak" for row in rows)):
            # rows of older files do not say where they are from, their file does
            silent = old.get("command", "") if not all("command" in row for row in merged) else ""
            commands = [*silent.split(" && "), *(row.get("command") for row in merged)]
            write_results("attention", merged, folder, " && ".join(dict.fromkeys(filter(None, commands))))
        return merged

    bench = attention.Bench(device, options, tell, make_inputs, save)
    new = bench.run(cases)
    merged, count = save(new), len(_timed(new))
    keys = {row_key(row) for row in new}
    rows = [row for row in merged if row_key(row) in keys]
    drawn = bool(count) and plot_attention(merged, picture)
    if count and not drawn:
        picture.unlink(missing_ok=True)  # it would show rows that the file no longer has
    bad = [row for row in rows if row["impl"].startswith("pithwood") and row["status"].startswith("fail")]
    code = int(bool(bad) or not count)
    written = path if count or (path.is_file() and not there) else None
    if args.json:
        return code, json_text({"file": written, "plot": picture if drawn else None, "rows": rows})
    missing = sum(row["op"] != "peak" for row in new) - count + bench.misfits
    ends = [f"{count} rows measured, {missing} not; spread is the interquartile range"]
    kept = f"; {path} keeps the rows it had" if there else ""
    ends.append(str(written) if written is not None else f"nothing was measured{kept}")
    return code, "\n".join([*_lines(rows), *ends, *([str(picture)] if drawn else [])])


def _timed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with numbers, without the device's peaks."""
    return [row for row in rows if row["op"] != "peak" and row["status"] == "ok"]


def _wanted(args: argparse.Namespace) -> dict[str, list[Any]]:
    """Values of the shape options that were given, by column."""
    wanted: dict[str, list[Any]] = {}
    for option in ("length", "documents", "sequences", "heads", "kv_heads", "head_dim", "layer"):
        text = getattr(args, option)
        if text is not None:
            least = 0 if option == "layer" else 1
            wanted[option] = [_integer(word, option, least) for word in text.split(",")]
    if args.trained is not None and len(wanted.get("sequences", [])) > 1:
        raise ValueError("--sequences takes one number with --trained: the samples of a run, the copies of a file")
    if args.blocks is not None:
        for word in args.blocks.split(","):
            match = re.fullmatch(r"(\d+)x(\d+)", word)
            if match is None or min(int(match[1]), int(match[2])) < 1:
                raise ValueError(f"--blocks {word} is not block size x top k; write for example 128x8")
            wanted.setdefault("blocks", []).append((int(match[1]), int(match[2])))
    for option, name, allowed in (("dtype", "dtype", ("bf16", "fp16", "fp32")), ("passes", "pass", ("fwd", "fwd+bwd"))):
        text = getattr(args, option)
        if text is not None:
            wanted[name] = text.split(",")
            for word in wanted[name]:
                if word not in allowed:
                    raise ValueError(f"--{name} {word} is not known; choose among {', '.join(allowed)}")
    return wanted


def _integer(word: str, option: str, least: int) -> int:
    if not word.isdigit() or int(word) < least:
        raise ValueError(f"--{option.replace('_', '-')} {word} is not a whole number of at least {least}")
    return int(word)


def _trained_cases(trained: Any, args: argparse.Namespace, wanted: dict[str, list[Any]]) -> tuple[list[Any], Any]:
    """Cases of the chosen layers, and their tensors by layer."""
    from pithwood.bench.cases import PASSES, Case
    from pithwood.bench.inputs import blocks_of, layer_inputs, trained_shape

    layers = wanted.get("layer", [len(trained.model.blocks) // 2])
    kept = layer_inputs(trained, layers)
    cases = []
    for layer in layers:
        own = blocks_of(trained, layer)
        blocks = wanted.get("blocks", [] if own is None else [own])
        if not blocks:
            raise ValueError(
                f"layer {layer} of {trained.name} is not MoBA; say --blocks BxK to measure MoBA on its inputs"
            )
        shape = trained_shape(trained, layer)
        cases += [Case(shape, p, *block) for block in blocks for p in wanted.get("pass", PASSES)]
    return cases, kept


def _saved_cases(qkv: Any, wanted: dict[str, list[Any]]) -> list[Any]:
    from pithwood.bench.cases import PASSES, Case

    copies = (wanted.get("sequences") or [2])[0]
    return [
        Case(qkv.shape(length, copies, dtype), p, *block)
        for length in wanted.get("length", [qkv.q.shape[0]])
        for dtype in wanted.get("dtype", ["bf16"])
        for block in wanted["blocks"]
        for p in wanted.get("pass", PASSES)
    ]


def _plan(cases: list[Any], impls: tuple[str, ...], as_json: bool) -> str:
    from pithwood.bench.attention import predicted
    from pithwood.bench.cases import dense_cases
    from pithwood.bench.timing import Peaks
    from pithwood.observe.metrics import HOPPER_COPY_BYTES, HOPPER_MEASURED_FLOPS

    peaks = Peaks(HOPPER_MEASURED_FLOPS, HOPPER_COPY_BYTES)
    rows = [predicted(case, peaks) for case in (*cases, *dense_cases(cases))]
    if as_json:
        return json_text({"implementations": impls, "peaks": vars(peaks), "rows": rows})
    flops, copied = peaks.flops_per_s / 1e12, peaks.bytes_per_s / 1e12
    lines = [f"least ms on a device of {flops:.0f} TFLOP/s and {copied:.2f} TB/s (H200):"]
    for case, row in zip((*cases, *dense_cases(cases)), rows, strict=True):
        blocks = "dense" if row["op"] == "dense" else f"({row['block_size']}, {row['top_k']})"
        lines.append(f"{case.shape.describe():<48} {blocks:>10}  {row['pass']:<8} {row['floor_ms']:10.3f}")
    return "\n".join([*lines, f"implementations: {', '.join(impls)}"])


def _lines(rows: list[dict[str, Any]]) -> list[str]:
    from pithwood.bench.attention import line_of
    from pithwood.bench.breakdown import breakdown_lines

    lines = []
    for row in rows:
        if row["op"] != "peak":
            lines += [line_of(row), *(breakdown_lines(row["breakdown"]) if "breakdown" in row else [])]
    return lines
