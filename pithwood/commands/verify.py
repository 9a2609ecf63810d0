"""`pithwood verify`: whether the checkpoints of a run are whole."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pithwood.commands.common import add_command, add_common, json_text
from pithwood.commands.run_arguments import tell
from pithwood.errors import size_text

HELP = """examples:
  pithwood verify demo
  pithwood verify demo@200 --json

Reads every byte of every checkpoint of the run (RUN@STEP: of one): format, SHA-256 of each file, whether the files hold
every element of every tensor exactly once, in the dtypes that the manifest says. Nothing is changed. The last line is
PASS or FAIL, and the exit code 0 or 1."""


def add(commands: Any) -> None:
    """Add the command to the command line."""
    parser = add_command(commands, "verify", "check that a run's checkpoints are whole, every byte of them", HELP)
    parser.add_argument("run", metavar="RUN", help="a run folder, its name, or the start of its name; RUN@STEP for one")
    add_common(parser, "what each checkpoint holds and what is wrong with it")


def run(args: argparse.Namespace) -> tuple[int, str]:
    """A line for each checkpoint and PASS or FAIL, or the same as JSON; 1 if one is not whole."""
    from pithwood.checkpoint.load import checkpoints_folder, list_checkpoints
    from pithwood.run_folder import find_checkpoint, find_run

    name, _, step = args.run.partition("@")
    folder = find_run(name, args.runs_dir)
    found = list_checkpoints(folder)
    if step:
        chosen = find_checkpoint(args.run, args.runs_dir)
        found = [(number, path) for number, path in found if path == chosen]
    elif not found:
        raise ValueError(f"{folder} has no checkpoint yet; train it to its first save")
    told = []
    for number, path in found:
        tell(f"reading {path}")
        told.append({"step": number, "path": str(path), **_examined(path)})
    whole = all(one["problem"] is None for one in told)
    leftovers = sorted(path.name for path in checkpoints_folder(folder).glob(".tmp-step-*"))
    if args.json:
        content = {"run_dir": str(folder), "passed": whole, "checkpoints": told, "unfinished": leftovers}
        return int(not whole), json_text(content)
    lines = [_line(one) for one in told]
    if leftovers:
        lines.append(f"{leftovers[0]}: a save that is under way or was cut off; a run that starts here removes it")
    bad = sum(one["problem"] is not None for one in told)
    lines.append(
        f"PASS: {_counted(len(told), 'checkpoint')} of {folder.name} whole"
        if whole
        else f"FAIL: {bad} of {_counted(len(told), 'checkpoint')} of {folder.name} not whole"
    )
    return int(not whole), "\n".join(lines)


def _examined(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, or what is wrong with it."""
    from pithwood.checkpoint.load import verify_checkpoint
    from pithwood.checkpoint.storage import check_entries

    held: dict[str, Any] = {"format_version": None, "tensors": None, "files": None, "bytes": None}
    try:
        manifest = verify_checkpoint(path)
        check_entries(path, manifest)
    except ValueError as error:
        return {**held, "problem": str(error)}
    size = sum(tensor.num_bytes for tensor in manifest.tensors.values())
    return {
        "format_version": manifest.format_version,
        "tensors": len(manifest.tensors),
        "files": len(manifest.files),
        "bytes": size,
        "problem": None,
    }


def _line(one: dict[str, Any]) -> str:
    if one["problem"] is not None:
        return f"step {one['step']}: {one['problem']}"
    return (
        f"step {one['step']}: {_counted(one['tensors'], 'tensor')} in {_counted(one['files'], 'file')}, "
        f"{size_text(one['bytes'])}, format {one['format_version']}: whole"
    )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
