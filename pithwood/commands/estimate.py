"""`pithwood estimate`: predicted memory and step time of a run on any mesh, without a GPU."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pithwood.commands.common import add_command, json_text

HELP = """examples:
  pithwood estimate qwen3_30b_8l
  pithwood estimate qwen3_30b_8l seq_len=32768 samples_per_step=4 samples_per_micro_batch=1 model.attention=MoBAConfig
  pithwood estimate qwen3_30b_8l model.num_layers=48 samples_per_micro_batch=16 mesh.dp_shard=8 mesh.ep=8
  pithwood estimate --compare h200

Nothing is allocated. Memory is by kind, for the fullest device; time is by part of the step: least FLOPs and bytes over
the device's peaks, over the efficiency that the breakdowns in bench/results show (constants where there are none), plus
the communication that compute does not hide. --compare puts the estimate beside every measured row of a device and
writes estimate.json beside train.json."""


def add(commands: Any) -> None:
    """Add the command to the command line."""
    parser = add_command(commands, "estimate", "predict memory and step time of a run on any mesh, on a CPU", HELP)
    parser.add_argument(
        "recipe", metavar="RECIPE", nargs="?", help="a name that `pithwood recipes` lists, or path/to/file.py:function"
    )
    parser.add_argument("overrides", metavar="path=value", nargs="*", default=[], help="change a setting of the recipe")
    parser.add_argument("--device", metavar="NAME", default="h200", help="h200 or h100 (default: h200)")
    parser.add_argument("--compare", metavar="NAME", help="compare with the measured rows of h200 or h100")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="with --compare: folder of train.json and estimate.json"
    )
    parser.add_argument("--json", action="store_true", help="print the estimate as one JSON object on stdout")


def run(args: argparse.Namespace) -> tuple[int, str]:
    """The estimate, as tables or as JSON."""
    from pithwood.estimate.devices import DEVICES

    for option in ("device", "compare"):
        name = getattr(args, option)
        if name is not None and name not in DEVICES:
            raise ValueError(f"--{option} {name} is not known; choose one of {', '.join(DEVICES)}")
    if args.compare is not None:
        if args.recipe is not None:
            raise ValueError("--compare takes runs from the results file; drop the recipe")
        return _compare(args)
    if args.recipe is None:
        raise ValueError("estimate which run? give a RECIPE, or --compare h200 for all measured ones")

    from pithwood.bench.train_rows import ROOT
    from pithwood.config import apply_overrides
    from pithwood.estimate.efficiency import read_rows
    from pithwood.estimate.report import estimate, estimate_lines
    from pithwood.plan import check_phases
    from pithwood.recipes import load_recipe

    settings = apply_overrides(load_recipe(args.recipe), args.overrides)
    settings.validate()
    check_phases(settings)
    device = DEVICES[args.device]
    result = estimate(settings, device, *read_rows(ROOT, device.name))
    if args.json:
        return 0, json_text({"recipe": args.recipe, **result})
    return 0, "\n".join(estimate_lines(result))


def _compare(args: argparse.Namespace) -> tuple[int, str]:
    """Every measured row beside its estimate; also written to estimate.json."""
    import json

    from pithwood.bench.results import write_results
    from pithwood.bench.train_rows import ROOT
    from pithwood.bench.train_text import comparison_lines
    from pithwood.estimate.devices import DEVICES
    from pithwood.estimate.report import compare_rows

    device = DEVICES[args.compare]
    folder = args.out or ROOT / "bench" / "results" / device.name
    path = folder / "train.json"
    if not path.is_file():
        raise ValueError(f"there is no {path}; measure first: pithwood bench train RECIPE, or choose another --out")
    rows = compare_rows(json.loads(path.read_text(encoding="utf-8"))["rows"], device, str(path))
    if not rows:
        raise ValueError(f"{path} has no row with a speed; measure first: pithwood bench train RECIPE")
    written = write_results("estimate", rows, folder, args.command_line, device.name)
    if args.json:
        return 0, json_text({"file": written, "rows": rows})
    return 0, "\n".join([*comparison_lines(rows), str(written)])
