"""Documents and skills are code: their blocks run, their links lead somewhere, and skills say what they need to say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.pages.blocks import ROOT, Block, blocks_of, complaint, documents, is_tried, make_checkout, script, try_block

PAGES = documents()
FIRST_READ = ("README.md", "docs/getting-started.md")
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


def tried(slow: bool) -> list[str]:
    """The pages that have blocks to run in the slow pass, or in the other one."""
    found = []
    for name in NAMES:
        blocks = blocks_of(ROOT / name)
        wanted = any(block.tag == "run slow" for block in blocks) if slow else any(is_tried(b, False) for b in blocks)
        if wanted:
            found.append(name)
    return found


def run_page(name: str, folder: Path, slow: bool) -> None:
    environment = make_checkout(folder)
    for block in blocks_of(ROOT / name):
        if is_tried(block, slow):
            try_block(block, folder, environment)


def without_the_long_ones() -> list[Any]:
    """The pages that a new user follows run in every test run. Others have more time, and run once there: with their
    long blocks if they have such."""
    later = [name for name in tried(slow=False) if name not in FIRST_READ and name not in tried(slow=True)]
    return [*FIRST_READ, *(pytest.param(name, marks=pytest.mark.slow) for name in later)]


@pytest.mark.parametrize("name", without_the_long_ones())
def test_the_blocks_of_a_page_run_in_a_fresh_checkout(name, tmp_path):
    run_page(name, tmp_path, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", tried(slow=True))
def test_the_blocks_of_a_page_run_with_the_long_ones(name, tmp_path):
    run_page(name, tmp_path, slow=True)


@pytest.mark.quick
def test_every_block_says_what_a_test_does_with_it():
    wrong = [complaint(block) for page in PAGES for block in blocks_of(page)]
    assert not [text for text in wrong if text], "\n".join(text for text in wrong if text)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("opening", "fine"),
    [
        ("sh run", True),
        ("sh run slow", True),
        ("sh dry-run", True),
        ("sh skip: needs a GPU", True),
        ("sh skip", False),
        ("sh skip:", False),
        ("sh", False),
        ("", False),
        ("python", True),
        ("python later", False),
        ("text", True),
    ],
)
def test_an_opening_line_without_a_tag_or_a_reason_is_refused(opening, fine, tmp_path):
    (tmp_path / "page.md").write_text(f"text\n\n```{opening}\ntrue\n```\n")
    (block,) = blocks_of(tmp_path / "page.md", tmp_path)
    assert (complaint(block) is None) == fine
    assert block.where == "page.md:3"


@pytest.mark.quick
def test_a_failing_block_is_named_with_its_output(tmp_path):
    block = Block("page.md", 7, "sh", "run", "echo something\nfalse\necho never\n")
    with pytest.raises(AssertionError, match=r"page\.md:7 ends with exit code 1:(.|\n)*\nsomething$"):
        try_block(block, tmp_path, {"PATH": "/usr/bin:/bin"})


@pytest.mark.quick
def test_dry_run_goes_behind_every_command_of_the_block():
    block = Block("page.md", 1, "sh", "dry-run", "# a comment\npithwood train a \\\n  steps=1\n\npithwood train b\n")
    lines = script(block).splitlines()
    assert lines == ["# a comment", "pithwood train a    steps=1 --dry-run", "", "pithwood train b --dry-run"]


@pytest.mark.quick
def test_links_lead_to_files_and_headings_that_exist():
    broken = []
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            file = page.parent / path if path else page
            if not file.exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
            elif anchor and file.suffix == ".md" and anchor not in anchors(file):
                broken.append(f"{page.relative_to(ROOT)}: {target} (no such heading)")
    assert not broken, "\n".join(broken)


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings get on GitHub."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.quick
def test_every_path_that_the_map_of_agents_md_names_exists():
    text = (ROOT / "AGENTS.md").read_text(encoding="utf-8").partition("## Map")[2].partition("\n## ")[0]
    named = [
        path for cell in re.findall(r"^\| (`[^|]+) \|", text, re.MULTILINE) for path in re.findall(r"`(.+?)`", cell)
    ]
    assert len(named) > 20
    missing = [path for path in named if not ((ROOT / path).exists() or (ROOT / "pithwood" / path).exists())]
    assert not missing, missing
