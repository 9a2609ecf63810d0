"""`pithwood prepare`: text to token shards, ahead of training or for other programs."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from pithwood.commands.common import add_command, add_common, json_text, program_name

HELP = """examples:
  pithwood prepare stdlib
  pithwood prepare notes/
  pithwood prepare 'src/**/*.py' vocab_size=2048 validation_fraction=0.1 --out corpora/src
  pithwood prepare texts.jsonl.zst source.field=body dedup_threshold=none
  pithwood prepare hf:roneneldan/TinyStories tokenizer=models/Qwen3-0.6B vocab_size=152000

SOURCE is a folder, file or glob of text; *.jsonl, *.jsonl.gz, *.jsonl.zst or *.parquet; stdlib; packages;
corpus:FOLDER (prepared before); hf:DATASET[/CONFIG]; or several separated by commas. Parquet, .zst and Hugging Face
datasets need: pip install 'pithwood[data]'

Settings are those of the recipe's `data`, changed by path=value. The corpus lies below the runs folder, where
`pithwood train` with the same settings finds it, or in --out. A prepare that was interrupted goes on where it stopped
when the same command is given again."""


def add(commands: Any) -> None:
    """Add the command to the command line."""
    parser = add_command(commands, "prepare", "turn text into token shards", HELP)
    parser.add_argument("source", metavar="SOURCE", help="what to read; see below")
    parser.add_argument("overrides", metavar="path=value", nargs="*", default=[], help="change a setting of `data`")
    parser.add_argument(
        "--recipe", metavar="RECIPE", default="demo", help="take the other settings of `data` from it (default: demo)"
    )
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="write the corpus here; train with corpus:FOLDER")
    parser.add_argument("--workers", metavar="N", type=int, help="processes (default: one per core)")
    parser.add_argument("--dry-run", action="store_true", help="print the settings and what would be read")
    add_common(parser, "what was made")


def run(args: argparse.Namespace) -> tuple[int, str]:
    """Prepare the corpus, or say what would be read; the result in words or as JSON."""
    from pithwood.config import apply_overrides, to_dict
    from pithwood.data.prepare import CorpusConfig, prepare
    from pithwood.recipes import load_recipe

    recipe = load_recipe(args.recipe)
    if not isinstance(recipe.data, CorpusConfig):
        raise ValueError(f"--recipe {args.recipe} trains on a mixture; take a recipe whose data is one corpus")
    settings = [word.removeprefix("data.") for word in (f"source={args.source}", *args.overrides)]
    cfg = apply_overrides(recipe.data, settings)
    if args.dry_run:
        survey = cfg.source.survey()
        found = {"source": survey.description, "files": survey.files, "bytes": survey.bytes}
        return 0, json_text({"config": to_dict(cfg), "found": found}, indent=None if args.json else 2)

    with _Screen() as screen:
        corpus = prepare(
            cfg, args.runs_dir / "corpora", screen.tell, out=args.out, workers=args.workers, bar=screen.bar
        )
    manifest = corpus.manifest
    words = [f"data.{word}" for word in settings]
    vocab_size = cfg.vocab_size
    if args.out is not None:
        words, vocab_size = [f"data.source=corpus:{args.out}"], corpus.vocab_size
        words += [f"data.vocab_size={vocab_size}"] if vocab_size != recipe.data.vocab_size else []
    words += [f"model.vocab_size={vocab_size}"] if vocab_size != recipe.model.vocab_size else []
    folder = [] if args.runs_dir == Path("runs") else ["--runs-dir", str(args.runs_dir)]
    command = f"{program_name()} {shlex.join(['train', args.recipe, *words, *folder])}"
    if args.json:
        kept = ("fingerprint", "source", "tokenizer", "splits", "gzip_bits_per_byte")
        return 0, json_text({"folder": str(corpus.folder), **{key: manifest[key] for key in kept}, "train": command})
    return 0, "\n".join(_closing_lines(args.out or corpus.folder, manifest, command))


def _closing_lines(folder: Path, manifest: dict[str, Any], command: str) -> list[str]:
    lines = [f"corpus {folder}", f"  fingerprint  {manifest['fingerprint']}"]
    tokenizer = manifest["tokenizer"]
    lines.append(f"  tokenizer    {tokenizer['vocab_size']} tokens, documents begin with {tokenizer['end_of_text']}")
    for name, entry in manifest["splits"].items():
        lines.append(
            f"  {name:<12} {entry['documents']:,} documents, {entry['bytes'] / 1e6:,.2f} MB, "
            f"{entry['tokens']:,} tokens ({entry['bytes'] / entry['tokens']:.2f} bytes each)"
        )
    dropped = manifest["source"]["duplicates_dropped"]
    lines.append(f"  left out     {dropped:,} near-duplicates, {manifest['source']['undecodable']:,} not UTF-8")
    return [*lines, "train on it:", f"  {command}"]


class _Screen:
    """Progress on stderr: a bar below the lines on a terminal, lines alone anywhere else."""

    def __enter__(self) -> _Screen:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = None
        self._rich = None
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
            self._rich = Progress(*columns, console=console, transient=True)
            self._task = self._rich.add_task("", total=None)
            self.bar = self._advance
            self._rich.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._rich is not None:
            self._rich.stop()

    def tell(self, line: str) -> None:
        """Show a line."""
        if self._rich is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self._rich.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _advance(self, stage: str, done: int, total: int | None) -> None:
        assert self._rich is not None
        self._rich.update(self._task, description=stage, completed=done, total=total)
