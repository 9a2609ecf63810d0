"""The `pithwood` command: parse, call, print. The commands lie in `pithwood/commands/`, one file each.

Nothing heavy is imported before a command needs it, so that `--help` and errors in the arguments answer at once. Exit
codes: 0 done, 2 bad input (one line on stderr says what to change), 3 memory or disk space ran out (the line says what
to lower or free), 4 another process of the run failed and said why, 128 + signal for a run that was stopped and saved.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import shlex
import sys
import time
from collections.abc import Sequence

from pithwood.commands import (
    bench,
    check,
    config,
    docs,
    estimate,
    evaluate,
    explain,
    generate,
    inspect,
    launch,
    prepare,
    profile,
    recipes,
    report,
    runs,
    train,
    verify,
)
from pithwood.commands.common import Parser, new_parser
from pithwood.errors import explain_failure

HELP = """examples:
  pithwood recipes
  pithwood train demo
  pithwood generate demo --prompt "def "

`pithwood COMMAND --help` tells more. PITHWOOD_TRACEBACK=1 shows where an error comes from."""

COMMANDS = {
    "prepare": prepare,
    "train": train,
    "launch": launch,
    "recipes": recipes,
    "generate": generate,
    "evaluate": evaluate,
    "inspect": inspect,
    "runs": runs,
    "verify": verify,
    "report": report,
    "explain": explain,
    "config": config,
    "bench": bench,
    "profile": profile,
    "estimate": estimate,
    "check": check,
    "docs": docs,
}


ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
"""Variable that torch reads its CUDA allocator's settings from, when it first allocates."""

AFTER_THE_FIRST_S = 3.0
"""Head start of the first process's error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    started = time.perf_counter()
    # Buffers of many sizes come and go in a step; segments that cannot grow leave up to a sixth of a GPU unused.
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault(ALLOCATOR, "expandable_segments:True")
    if _rank() is not None:
        # When another process dies, torch's network code would tell it in every one, with its stack, and NCCL's would
        # abort them; `parallel.faults` ends them with one line.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parse(arguments)
        args.started = started
        args.command_line = shlex.join(["pithwood", *arguments])
        # A stray print must not spoil the one object on stdout, so everything but the result goes to stderr.
        with contextlib.redirect_stdout(sys.stderr):
            code, output = COMMANDS[args.command].run(args)
        if output:
            print(output, flush=True)
        return code
    except ValueError as error:
        if os.environ.get("PITHWOOD_TRACEBACK") == "1":
            raise
        _tell(" ".join(str(error).split()))
        return 2
    except BrokenPipeError:
        # The reader (head, for instance) has seen enough; keep the interpreter from complaining again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("pithwood: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        told = explain_failure(error)
        if told is None or os.environ.get("PITHWOOD_TRACEBACK") == "1":
            _let_the_first_speak()
            raise
        _tell(told[0])
        return told[1]


def _tell(line: str) -> None:
    """Print an error, with the rank of this process if it is one of several."""
    _let_the_first_speak()
    rank = _rank()
    print(f"pithwood: error: {'' if rank is None else f'rank {rank}: '}{line}", file=sys.stderr)


def _let_the_first_speak() -> None:
    """Wait a moment in all processes but the first: what is wrong before they have met is mostly wrong in all, and the
    launcher ends the others when the first has left.
    """
    if _rank():
        time.sleep(AFTER_THE_FIRST_S)


def _rank() -> int | None:
    """The rank of this process as torchrun or SLURM set it, None if it is alone."""
    for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if int(os.environ.get(size, "1")) > 1 and rank in os.environ:
            return int(os.environ[rank])
    return None


def build_parser() -> Parser:
    """The parser of the whole command line."""
    parser = new_parser("pithwood", "Train sparse language models, on a laptop or on one GPU.", HELP)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for command in COMMANDS.values():
        command.add(commands)
    return parser


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = build_parser()
    args, rest = parser.parse_known_args(arguments)
    if args.command is None:
        *first, last = COMMANDS
        parser.error(f"which command? {', '.join(first)} or {last}")
    flags = [word for word in rest if word.startswith("-")]
    if flags:
        known = ["--help", *(f"--{name.replace('_', '-')}" for name in vars(args)), "--from"]
        close = difflib.get_close_matches(flags[0].partition("=")[0], known, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"unknown option {flags[0]}{hint}; see pithwood {args.command} --help")
    # Positional arguments after an option reach us here: `train debug --json steps=20`.
    if rest and not hasattr(args, "overrides"):
        raise ValueError(f"unexpected argument {rest[0]!r}; see pithwood {args.command} --help")
    if hasattr(args, "overrides"):
        args.overrides = [*args.overrides, *rest]
        for word in args.overrides:
            if "=" not in word:
                raise ValueError(f"{word!r} is not an override; write path=value, for example steps=100")
    return args
