"""`pithwood check`: gates that a mixer, an op, a model, a comparison or a change must pass."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from pithwood.commands.common import Parser, add_command, json_text

HELP = """examples:
  pithwood check mixer MoBAConfig block_size=8 top_k=2
  pithwood check mixer my_mixer.py:MyMixerConfig
  pithwood check op summarise
  pithwood check model qwen3_moe
  pithwood check experiment demo-1a2b3c4d,demo-5e6f7a8b --baseline demo_dense-9c0d1e2f,demo_dense-3a4b5c6d
  pithwood check correctness debug model.moe.balance=sequence --against samples_per_micro_batch=2

The last line is PASS, or FAIL with the first gate that does not hold; the exit code is 0 or 1 (2 for bad arguments).
"""


def add(commands: Any) -> None:
    """Add the command and what it can check to the command line."""
    parser = add_command(commands, "check", "check a mixer, an op, a model, an experiment or a change", HELP)
    kinds = parser.add_subparsers(dest="kind", metavar="WHAT", parser_class=Parser, required=True)

    mixer = add_command(kinds, "mixer", "the contract of a token mixer, gate by gate", _examples("mixer"))
    mixer.add_argument("name", metavar="MIXER", help="a configuration class, or path/to/file.py:Class")
    mixer.add_argument("overrides", metavar="path=value", nargs="*", default=[], help="change a field of it")

    op = add_command(kinds, "op", "an op's files, tests, and agreement of its implementations", _examples("op"))
    op.add_argument("name", metavar="OP", help="a folder of pithwood/ops")
    op.add_argument("--no-tests", action="store_true", help="leave out the op's own tests")

    model = add_command(kinds, "model", "a model file against its Hugging Face class", _examples("model"))
    model.add_argument("name", metavar="MODEL", help="a file of pithwood/models, without .py")
    model.add_argument("--no-tests", action="store_true", help="leave out the model's own tests")

    experiment = add_command(kinds, "experiment", "whether runs can be compared, and by how much they differ",
                             _examples("experiment"))  # fmt: skip
    experiment.add_argument("variant", metavar="RUN[,RUN...]", help="the runs in question, one for each seed")
    experiment.add_argument("--baseline", metavar="RUN[,RUN...]", required=True, help="what they are compared with")
    experiment.add_argument("--min-seeds", metavar="N", type=int, default=2, help="fewest seeds (default: 2)")
    experiment.add_argument(
        "--import", dest="imports", metavar="FILE", action="append", default=[],
        help="Python file that defines classes of the runs' settings",
    )  # fmt: skip

    correctness = add_command(kinds, "correctness", "losses and raw gradients of two settings or commits",
                              _examples("correctness"))  # fmt: skip
    correctness.add_argument("recipe", metavar="RECIPE", help="a recipe's name, or path/to/file.py:function")
    correctness.add_argument("overrides", metavar="path=value", nargs="*", default=[], help="change a setting of it")
    correctness.add_argument(
        "--against", metavar="path=value", action="append", default=[], help="settings of the other side (repeat)"
    )
    correctness.add_argument("--commit", metavar="REV", help="compute the other side at this commit")
    correctness.add_argument("--steps", metavar="N", type=int, default=3, help="losses to compare (default: 3)")
    correctness.add_argument("--loss-limit", metavar="X", type=float, default=1e-6, help="relative (default: 1e-6)")
    correctness.add_argument("--gradient-limit", metavar="X", type=float, default=1e-5, help="relative (default: 1e-5)")
    correctness.add_argument("--exact", action="store_true", help="demand the same bits")

    for kind in (experiment, correctness):
        kind.add_argument(
            "--runs-dir", metavar="DIR", type=Path, default=Path("runs"), help="where runs live (default: runs)"
        )
    for kind in (mixer, op, model, experiment, correctness):
        kind.add_argument("--json", action="store_true", help="print the gates as one JSON object on stdout")


def run(args: argparse.Namespace) -> tuple[int, str]:
    """The gates, a line each, or as JSON; 1 if one fails."""
    from pithwood.check.gates import as_json, passed, report, run_gates

    more: dict[str, Any] = {"kind": args.kind}
    if args.kind == "mixer":
        from pithwood.check.mixer import load_mixer, mixer_gates

        config = load_mixer(args.name, args.overrides)
        with tempfile.TemporaryDirectory() as folder:
            results = run_gates(mixer_gates(config, Path(folder)))
    elif args.kind == "op":
        from pithwood.check.op import op_gates

        results = run_gates(op_gates(args.name, run_tests=not args.no_tests))
    elif args.kind == "model":
        from pithwood.check.model import model_gates

        results = run_gates(model_gates(args.name, run_tests=not args.no_tests))
    elif args.kind == "experiment":
        from dataclasses import asdict

        from pithwood.check.experiment import Comparison
        from pithwood.recipes import import_file

        for file in args.imports:
            import_file(Path(file))
        comparison = Comparison(args.variant.split(","), args.baseline.split(","), args.runs_dir, args.min_seeds)
        results = run_gates(comparison.gates())
        if passed(results):
            more["differences"] = [asdict(difference) for difference in comparison.differences()]
    else:
        from pithwood.check.correctness import Limits, correctness_gates

        limits = Limits(0.0, 0.0, 0.0) if args.exact else Limits(args.loss_limit, args.gradient_limit)
        results = run_gates(
            correctness_gates(args.recipe, args.overrides, args.against, args.commit, limits, args.steps, args.runs_dir)
        )
    code = 0 if passed(results) else 1
    return code, json_text(as_json(results, **more)) if args.json else report(results)


def _examples(kind: str) -> str:
    """The examples of one kind."""
    return "\n".join(
        ["examples:", *(line for line in HELP.splitlines() if line.startswith(f"  pithwood check {kind} "))]
    )
