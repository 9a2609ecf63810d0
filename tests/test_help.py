"""Every command's help shows examples, and each of them is a command line that this version understands."""

from __future__ import annotations

import re
import shlex

import pytest

from pithwood.cli import COMMANDS, build_parser, main

pytestmark = pytest.mark.quick

HELPS = [command.HELP for command in COMMANDS.values()]
EXAMPLES = [line.strip() for text in HELPS for line in re.findall(r"^  pithwood .*$", text, re.M)]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert f"\nexamples:\n  pithwood {name}" in capsys.readouterr().out


@pytest.mark.parametrize("line", EXAMPLES)
def test_an_example_is_understood(line):
    args, rest = build_parser().parse_known_args(shlex.split(line)[1:])
    unknown = [word for word in rest if word.startswith("-") or "=" not in word]
    assert args.command == line.split()[1]
    assert not unknown, unknown
