"""Code blocks of the documents and skills, and how a shell block is tried.

The line that opens a shell block says what a test does with it:
    ```sh run             runs it, in order with the page's other blocks, in a fresh copy of the checkout
    ```sh run slow        the same, among the slow tests
    ```sh dry-run         runs each of its commands with --dry-run behind it
    ```sh skip: REASON    does not run it
Blocks in Python are run as programs of their own unless they say `skip: REASON`; text and JSON are only shown.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHECKOUT = ("AGENTS.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "pyproject.toml", "bench", "docs",
            "pithwood", "scripts", "skills", "tests")  # fmt: skip
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
SHELLS, SHOWN = ("sh", "bash", "shell", "console"), ("text", "json", "md", "toml")
TIMEOUT_S = 300


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: str
    line: int
    language: str
    tag: str
    """What follows the language in the opening line."""
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def documents() -> list[Path]:
    """Every page that may hold blocks."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("skills/**/*.md")]
    return sorted(pages)


def blocks_of(page: Path, root: Path = ROOT) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text, name = page.read_text(encoding="utf-8"), page.relative_to(root).as_posix()
    found = []
    for match in FENCE.finditer(text):
        language, _, tag = match["info"].strip().partition(" ")
        found.append(Block(name, text.count("\n", 0, match.start()) + 1, language, tag.strip(), match["text"]))
    return found


def complaint(block: Block) -> str | None:
    """What is wrong with a block's opening line, or None."""
    skipped = re.fullmatch(r"skip: \S.*", block.tag) is not None
    if block.language in SHELLS:
        fine = skipped or block.tag in ("run", "run slow", "dry-run")
        return None if fine else f"{block.where}: say `sh run`, `sh run slow`, `sh dry-run` or `sh skip: REASON`"
    if block.language == "python":
        return None if skipped or not block.tag else f"{block.where}: say `python` or `python skip: REASON`"
    return None if block.language in SHOWN else f"{block.where}: give the block a language: sh, python or text"


def is_tried(block: Block, slow: bool) -> bool:
    """Whether a block is run, in the slow pass or in the other one."""
    if block.language == "python":
        return not block.tag
    return block.language in SHELLS and (block.tag in ("run", "dry-run") or (slow and block.tag == "run slow"))


def script(block: Block) -> str:
    """The block as a program for bash."""
    if block.tag != "dry-run":
        return block.text
    lines = block.text.replace("\\\n", " ").splitlines()
    return "\n".join(f"{line} --dry-run" if line.strip() and not line.startswith("#") else line for line in lines)


def make_checkout(folder: Path) -> dict[str, str]:
    """Copy the checkout to a folder; returns an environment in which `pithwood` and `python` are this interpreter's."""
    for name in CHECKOUT:
        source, ignored = ROOT / name, shutil.ignore_patterns("__pycache__", "runs")
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        elif source.exists():
            shutil.copy(source, folder / name)
    programs = folder / ".programs"
    programs.mkdir()
    for name, words in (("pithwood", f'"{sys.executable}" -m pithwood'), ("python", f'"{sys.executable}"')):
        (programs / name).write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        (programs / name).chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(folder), "PYTHON": sys.executable, "PITHWOOD_TRACEBACK": ""}


def try_block(block: Block, folder: Path, environment: dict[str, str]) -> None:
    """Run one block; AssertionError with its place and the end of its output if it fails."""
    words = ["bash", "-euo", "pipefail", "-c", script(block)]
    if block.language == "python":
        words = [sys.executable, "-c", block.text]
    done = subprocess.run(
        words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=TIMEOUT_S,
    )  # fmt: skip
    tail = "\n".join(done.stdout.splitlines()[-15:])
    assert done.returncode == 0, f"{block.where} ends with exit code {done.returncode}:\n{block.text}\n{tail}"
