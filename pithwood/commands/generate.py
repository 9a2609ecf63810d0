"""`pithwood generate`: continue a prompt with a trained run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pithwood.commands.common import add_command, add_common, json_text

HELP = """examples:
  pithwood generate runs/demo-1a2b3c4d --prompt "def main(" --max-tokens 100
  pithwood generate demo --prompt-file prompt.txt --temperature 0 --attention full --json"""


def add(commands: Any) -> None:
    """Add the command to the command line."""
    parser = add_command(commands, "generate", "continue a prompt with a trained run", HELP)
    parser.add_argument("run", metavar="RUN", help="a run folder, its name, or the start of its name")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt", metavar="TEXT", default="", help="text to continue (default: nothing, a new document)"
    )
    prompt.add_argument("--prompt-file", metavar="FILE", type=Path, help="UTF-8 file to continue")
    parser.add_argument("--max-tokens", metavar="N", type=int, default=200, help="tokens to generate (default: 200)")
    parser.add_argument("--temperature", metavar="X", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    parser.add_argument(
        "--top-k", metavar="N", type=int, default=0, help="sample among the N likeliest (default: 0, all)"
    )
    parser.add_argument(
        "--top-p", metavar="P", type=float, default=0.95, help="... among the likeliest that hold P (default: 0.95)"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the draws (default: 0)")
    parser.add_argument(
        "--attention", choices=("full", "moba"), help="how new tokens attend (default: as the run says)"
    )
    parser.add_argument(
        "--import", dest="imports", metavar="FILE", action="append", default=[],
        help="Python file that defines classes of the run's settings, such as a mixer of your own",
    )  # fmt: skip
    parser.add_argument("--step", metavar="N", type=int, help="checkpoint to use (default: the newest)")
    add_common(parser, "the text and how it came about")


def run(args: argparse.Namespace) -> tuple[int, str]:
    """The continued prompt, alone or in a JSON object."""
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
    return 0, json_text(result) if args.json else str(result["text"])
