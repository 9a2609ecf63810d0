"""Arguments that the commands share which take steps of a recipe to measure them."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pithwood.run import Run


def add_train_arguments(parser: argparse.ArgumentParser, steps: int, optional: bool = False) -> None:
    """RECIPE, overrides, --steps, --routing and --tokens; `optional` allows to leave out the recipe."""
    parser.add_argument(
        "recipe", metavar="RECIPE", nargs="?" if optional else None,
        help="a name that `pithwood recipes` lists, or path/to/file.py:function",
    )  # fmt: skip
    parser.add_argument("overrides", metavar="path=value", nargs="*", default=[], help="change a setting of the recipe")
    parser.add_argument(
        "--steps", metavar="N", type=int, default=steps, help=f"optimizer steps in all (default: {steps})"
    )
    parser.add_argument(
        "--routing", choices=("balanced", "learned"), help="how experts are chosen (default: as the recipe says)"
    )
    parser.add_argument(
        "--tokens", choices=("fake", "real"), default="fake", help="random ids, or the recipe's text (default: fake)"
    )


def overrides_of(args: argparse.Namespace) -> list[str]:
    """The overrides of the command line, --routing as one of them."""
    return [*args.overrides, *([] if args.routing is None else [f"model.moe.routing={args.routing}"])]


def run_of(args: argparse.Namespace) -> Run:
    """The recipe with its overrides; ValueError for what does not exist or cannot work."""
    from pithwood.config import apply_overrides
    from pithwood.recipes import load_recipe

    return apply_overrides(load_recipe(args.recipe), overrides_of(args))


def tell(line: str) -> None:
    """One line of progress on stderr."""
    print(line, file=sys.stderr, flush=True)


def silent(line: str) -> None:
    """No line of progress: what other processes than the first tell."""
