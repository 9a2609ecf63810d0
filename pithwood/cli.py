"""The `pithwood` command: parse, call, print.

Nothing heavy is imported before a command needs it, so that `--help` and errors in the arguments answer at once. Exit
codes: 0 done, 2 bad input (one line on stderr says what to change), 128 + signal for a run that was stopped and saved.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

TRAIN_HELP = """examples:
  pithwood train debug --json steps=20
  pithwood train demo model.attention.top_k=2 optim.lr=0.01
  pithwood train my_recipes.py:small --dry-run
  pithwood train demo --from demo-1a2b3c4d@200 steps=600

Overrides are path=value, read by the type of the field: steps=1e3, optim.ema_decay=0.999, data.max_bytes=none,
model.attention.0.block_size=64 (* for every entry), model.attention=FullAttentionConfig, or JSON for anything larger.
The same command typed again resumes the run, or prints the summary of a finished one."""

GENERATE_HELP = """examples:
  pithwood generate runs/demo-1a2b3c4d --prompt "def main(" --max-tokens 100
  pithwood generate demo --prompt-file prompt.txt --temperature 0 --attention full --json"""

RECIPES_HELP = """examples:
  pithwood recipes
  pithwood recipes --json"""

TOP_HELP = """examples:
  pithwood recipes
  pithwood train demo
  pithwood generate demo --prompt "def "

`pithwood COMMAND --help` tells more. PITHWOOD_TRACEBACK=1 shows where an error comes from."""


class _Parser(argparse.ArgumentParser):
    """Reports an error as one line, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parse(arguments)
        # A stray print must not spoil the one object on stdout, so everything but the result goes to stderr.
        with contextlib.redirect_stdout(sys.stderr):
            if args.command == "train":
                code, output = _train(args, shlex.join(["pithwood", *arguments]))
            elif args.command == "generate":
                code, output = _generate(args)
            else:
                code, output = _recipes(args)
        print(output, flush=True)
        return code
    except ValueError as error:
        if os.environ.get("PITHWOOD_TRACEBACK") == "1":
            raise
        print(f"pithwood: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader (head, for instance) has seen enough; keep the interpreter from complaining again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if os.environ.get("PITHWOOD_TRACEBACK") == "1":
            raise
        where = f": {error.filename}" if error.filename else ""
        print(f"pithwood: error: {' '.join(str(error.strerror or error).split())}{where}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pithwood: interrupted", file=sys.stderr)
        return 130


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = build_parser()
    args, rest = parser.parse_known_args(arguments)
    if args.command is None:
        parser.error("which command? train, recipes or generate")
    flags = [word for word in rest if word.startswith("-")]
    if flags:
        known = ["--help", *(f"--{name.replace('_', '-')}" for name in vars(args)), "--from"]
        close = difflib.get_close_matches(flags[0].partition("=")[0], known, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"unknown option {flags[0]}{hint}; see pithwood {args.command} --help")
    # Positional arguments after an option reach us here: `train debug --json steps=20`.
    if rest and args.command != "train":
        raise ValueError(f"unexpected argument {rest[0]!r}; see pithwood {args.command} --help")
    if args.command == "train":
        args.overrides = [*args.overrides, *rest]
        for word in args.overrides:
            if "=" not in word:
                raise ValueError(f"{word!r} is not an override; write path=value, for example steps=100")
    return args


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _parser("pithwood", "Train sparse language models, from a laptop to a cluster.", TOP_HELP)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    train = _command(commands, "train", "train a recipe, or resume it where it stopped", TRAIN_HELP)
    train.add_argument(
        "recipe", metavar="RECIPE", help="a name that `pithwood recipes` lists, or path/to/file.py:function"
    )
    train.add_argument("overrides", metavar="path=value", nargs="*", default=[], help="change a setting of the recipe")
    train.add_argument("--new", action="store_true", help="start over; an existing run folder is moved aside")
    train.add_argument("--from", dest="branch_from", metavar="RUN@STEP", help="start from another run's checkpoint")
    train.add_argument(
        "--dry-run", action="store_true", help="print the resolved settings and what they would cost, as JSON"
    )
    _common(train, "the summary")

    recipes = _command(commands, "recipes", "list the recipes", RECIPES_HELP)
    recipes.add_argument("--json", action="store_true", help="print one JSON object")

    generate = _command(commands, "generate", "continue a prompt with a trained run", GENERATE_HELP)
    generate.add_argument("run", metavar="RUN", help="a run folder, its name, or the start of its name")
    prompt = generate.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt", metavar="TEXT", default="", help="text to continue (default: nothing, a new document)"
    )
    prompt.add_argument("--prompt-file", metavar="FILE", type=Path, help="UTF-8 file to continue")
    generate.add_argument("--max-tokens", metavar="N", type=int, default=200, help="tokens to generate (default: 200)")
    generate.add_argument("--temperature", metavar="X", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    generate.add_argument(
        "--top-k", metavar="N", type=int, default=0, help="sample among the N likeliest (default: 0, all)"
    )
    generate.add_argument(
        "--top-p", metavar="P", type=float, default=0.95, help="... among the likeliest that hold P (default: 0.95)"
    )
    generate.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the draws (default: 0)")
    generate.add_argument(
        "--attention", choices=("full", "moba"), help="how new tokens attend (default: as the run says)"
    )
    generate.add_argument(
        "--import", dest="imports", metavar="FILE", action="append", default=[],
        help="Python file that defines classes of the run's settings, such as a mixer of your own",
    )  # fmt: skip
    generate.add_argument("--step", metavar="N", type=int, help="checkpoint to use (default: the newest)")
    _common(generate, "the text and how it came about")
    return parser


def _parser(prog: str, description: str, epilog: str) -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    return _Parser(prog=prog, description=description, epilog=epilog, formatter_class=form, allow_abbrev=False)


def _command(commands: Any, name: str, summary: str, epilog: str) -> argparse.ArgumentParser:
    description = summary[0].upper() + summary[1:] + "."
    form = argparse.RawDescriptionHelpFormatter
    return commands.add_parser(
        name, help=summary, description=description, epilog=epilog, formatter_class=form, allow_abbrev=False
    )


def _common(parser: argparse.ArgumentParser, result: str) -> None:
    parser.add_argument("--json", action="store_true", help=f"print {result} as one JSON object on stdout")
    parser.add_argument(
        "--runs-dir", metavar="DIR", type=Path, default=Path("runs"), help="where runs live (default: runs)"
    )


def _train(args: argparse.Namespace, command: str) -> tuple[int, str]:
    from pithwood.config import apply_overrides, to_dict
    from pithwood.recipes import load_recipe

    run = apply_overrides(load_recipe(args.recipe), args.overrides)
    if args.dry_run:
        from pithwood.train import plan

        return 0, _json({"config": to_dict(run), "plan": plan(run)}, indent=None if args.json else 2)

    from pithwood.observe.summary import closing_lines
    from pithwood.train import train

    summary = train(
        run, runs_dir=args.runs_dir, new=args.new, branch_from=args.branch_from, console=True, command=command
    )
    code = 128 + int(summary["interrupted"]) if summary.get("interrupted") else 0
    if args.json:
        return code, _json(summary)
    program, overrides = _program(), args.overrides
    if not summary.get("interrupted"):
        overrides = [word for word in overrides if not word.startswith("steps=")]
    folder = [] if args.runs_dir == Path("runs") else ["--runs-dir", str(args.runs_dir)]
    same = f"{program} {shlex.join(['train', args.recipe, *folder, *overrides])}"
    return code, "\n".join(closing_lines({**summary, "recipe": args.recipe, "command": same, "program": program}))


def _program() -> str:
    """How the user can call this program again: by its name if that finds it, else as it was called now."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return "python -m pithwood"
    found = shutil.which("pithwood")
    if found is not None and called.exists() and os.path.samefile(found, called):
        return "pithwood"
    return shlex.quote(os.path.relpath(called)) if called.exists() else "pithwood"


def _recipes(args: argparse.Namespace) -> tuple[int, str]:
    from pithwood.recipes import list_recipes

    found = list_recipes()
    if args.json:
        return 0, _json({"recipes": [{"name": name, "summary": summary} for name, summary in found]})
    width = max((len(name) for name, _ in found), default=0)
    lines = [f"{name:<{width}}  {summary}" for name, summary in found]
    return 0, "\n".join([*lines, "", "train one with: pithwood train RECIPE"])


def _generate(args: argparse.Namespace) -> tuple[int, str]:
    if args.max_tokens < 1:
        raise ValueError(f"--max-tokens={args.max_tokens} must be at least 1")
    if not 0 <= args.temperature < float("inf"):
        raise ValueError(f"--temperature={args.temperature} must be 0 (greedy) or a positive number")
    if args.top_k < 0:
        raise ValueError(f"--top-k={args.top_k} must be 0 (all tokens) or more")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p={args.top_p} must be over 0 and at most 1 (all tokens)")
    prompt = args.prompt
    if args.prompt_file is not None:
        try:
            prompt = args.prompt_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompt-file {args.prompt_file} cannot be read as UTF-8 text: {error}") from error

    from pithwood.generate.run import generate_from_run
    from pithwood.recipes import import_file

    for file in args.imports:
        import_file(Path(file))
    result = generate_from_run(
        args.run,
        runs_dir=args.runs_dir,
        prompt=prompt,
        step=args.step,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k or None,
        top_p=args.top_p if args.top_p < 1 else None,
        seed=args.seed,
        attention=args.attention,
    )
    return 0, _json(result) if args.json else str(result["text"])


def _json(value: Any, indent: int | None = None) -> str:
    """Valid JSON always: numbers that JSON lacks become the strings "nan", "inf" and "-inf"."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
