"""Fill the generated parts of README.md and docs/*.md, which stand between markers that the pages do not show.

<!-- table bench/results/*/demo.json          a table, a row per row of the files, a line per column:
where recipe = demo                            header, path of the field, format (a leading `file.` reads the file's
loss: validation_loss .3f                      own fields: file.device, file.commit); `where` keeps some rows
device: file.device
--> ... <!-- end table -->
<!-- value bench/results/cpu/demo.json recipe=demo,seed=0 validation_loss .3f -->4.193<!-- end value -->
<!-- configuration --> ... <!-- end configuration -->   every setting; likewise commands, recipes, ops and mixers
<!-- throughput goals --> ... <!-- end throughput -->    a table of docs/throughput.md, see pithwood/pages/throughput.py
<!-- scaling plans --> ... <!-- end scaling -->    a table of docs/scaling.md, see pithwood/pages/scaling.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pithwood
from pithwood.pages.configuration import configuration
from pithwood.pages.listings import commands_table, mixers_table, ops_table, recipes_table
from pithwood.pages.scaling import scaling
from pithwood.pages.throughput import throughput

ROOT = Path(pithwood.__file__).parents[1]
KINDS = "table|value|configuration|commands|recipes|ops|mixers|throughput|scaling"
MARKED = re.compile(rf"(<!-- ({KINDS})\b(.*?)-->)(.*?)(<!-- end \2 -->)", re.DOTALL)
OPENED = re.compile(rf"<!-- (?:{KINDS})\b")


def pages(root: Path) -> list[Path]:
    """README.md and the pages of docs/; ValueError outside a checkout."""
    found = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    if not found[0].is_file():
        raise ValueError(f"{root} is no checkout of the repository: it has no README.md; run this in one")
    return found


def outdated(root: Path) -> dict[Path, str]:
    """The pages whose generated parts differ from what they should be, with their right content.

    raises  ValueError naming page and marker if a results file, row or field does not exist
    """
    texts = {path: path.read_text(encoding="utf-8") for path in pages(root)}
    wanted = {path: filled(text, root, path.name) for path, text in texts.items()}
    return {path: text for path, text in wanted.items() if text != texts[path]}


def filled(text: str, root: Path, page: str) -> str:
    """A page's text with all generated parts made anew."""

    def replace(match: re.Match[str]) -> str:
        start, kind, arguments, _, end = match.groups()
        try:
            return start + _content(kind, arguments, root) + end
        except (ValueError, KeyError) as error:
            raise ValueError(f"{page}: {' '.join(start.split())}: {error}") from error

    shown = _without_code(text)
    if len(OPENED.findall(shown)) != len(MARKED.findall(shown)):
        raise ValueError(f"{page}: a marker has no end; write <!-- end table --> after a table, and so on")
    return MARKED.sub(replace, text)


def _without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def _content(kind: str, arguments: str, root: Path) -> str:
    if kind == "table":
        return "\n" + _table(arguments.strip().splitlines(), root) + "\n"
    if kind == "value":
        return _value(arguments.split(), root)
    if kind == "throughput":
        return f"\n{throughput(arguments.strip(), root)}\n"
    if kind == "scaling":
        return f"\n{scaling(arguments.strip(), root)}\n"
    listings = {
        "configuration": configuration,
        "commands": commands_table,
        "recipes": recipes_table,
        "ops": ops_table,
        "mixers": mixers_table,
    }
    return f"\n{listings[kind]()}\n"


def _rows(pattern: str, root: Path) -> list[dict[str, Any]]:
    """The rows of all results files that a pattern names, each with its file's own fields under "file"."""
    paths = sorted(root.glob(pattern))
    if not paths:
        raise ValueError(f"no results file {pattern}; run the bench that writes it")
    rows = []
    for path in paths:
        content = json.loads(path.read_text(encoding="utf-8"))
        own = {key: value for key, value in content.items() if key != "rows"}
        rows += [{**row, "file": own} for row in content["rows"]]
    return rows


def _field(row: dict[str, Any], path: str) -> Any:
    """The value at a dotted path; KeyError if a part is not there."""
    value: Any = row
    for part in path.split("."):
        if not isinstance(value, dict) or part not in value:
            raise KeyError(path)
        value = value[part]
    return value


def _matches(row: dict[str, Any], conditions: list[str]) -> bool:
    for condition in conditions:
        name, equals, wanted = (part.strip() for part in condition.partition("="))
        if not equals:
            raise ValueError(f"{condition!r} is no condition; write field = value")
        try:
            value = _field(row, name)
        except KeyError:
            return False
        if (value if isinstance(value, str) else json.dumps(value)) != wanted:
            return False
    return True


def _text(value: Any, form: str) -> str:
    if value is None:
        return ""
    return format(value, form) if form else str(value)


def _table(lines: list[str], root: Path) -> str:
    conditions = [line.removeprefix("where ") for line in lines[1:] if line.startswith("where ")]
    columns = [re.fullmatch(r"(.*?): (\S+)(?: (\S+))?", line) for line in lines[1:] if not line.startswith("where ")]
    if not columns or None in columns:
        raise ValueError("each line after the file's must be `header: field format` or `where field = value`")
    parts = [match.groups(default="") for match in columns if match is not None]
    rows = [row for row in _rows(lines[0], root) if _matches(row, conditions)]
    if not rows:
        raise ValueError(f"no row of {lines[0]} fits `where {' and '.join(conditions)}`")
    for header, name, _ in parts:
        if not any(_has(row, name) for row in rows):
            raise ValueError(f"no row has the field {name!r} of column {header!r}")
    cells = [[_text(_field(row, name), form) if _has(row, name) else "" for _, name, form in parts] for row in rows]
    head = [header for header, *_ in parts]
    rule = ["---:" if form else "---" for *_, form in parts]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *cells])


def _has(row: dict[str, Any], path: str) -> bool:
    try:
        _field(row, path)
    except KeyError:
        return False
    return True


def _value(words: list[str], root: Path) -> str:
    if len(words) not in (3, 4):
        raise ValueError("write <!-- value FILE field=value,... FIELD FORMAT -->")
    pattern, conditions, name, form = [*words, ""][:4]
    rows = [row for row in _rows(pattern, root) if _matches(row, conditions.split(","))]
    if len(rows) != 1:
        raise ValueError(f"{len(rows)} rows fit {conditions}; exactly one must")
    if not _has(rows[0], name):
        raise ValueError(f"the row has no field {name!r}")
    return _text(_field(rows[0], name), form)
