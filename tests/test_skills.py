"""Every skill names itself, says when to use it, and ends in a script that prints PASS or the first failing gate."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SKILLS = sorted(path.parent for path in (ROOT / "skills").glob("*/SKILL.md"))


def check(skill: str, *words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The skill's script, run from any folder."""
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [str(ROOT / "skills" / skill / "check.sh"), *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.quick
def test_the_skills_that_the_project_promises_exist():
    promised = {"add-mixer", "add-op", "add-model", "run-experiment", "validate-correctness"}
    assert promised <= {skill.name for skill in SKILLS}


@pytest.mark.quick
@pytest.mark.parametrize("skill", SKILLS, ids=lambda path: path.name)
def test_a_skill_says_its_name_its_use_its_check_and_what_to_do_on_failure(skill):
    text = (skill / "SKILL.md").read_text(encoding="utf-8")
    front = re.match(r"---\nname: (?P<name>\S+)\ndescription: (?P<description>.+)\n---\n", text)
    assert front is not None
    assert front["name"] == skill.name
    assert "Use" in front["description"]
    assert ": " not in front["description"], "YAML reads a second colon as another key"
    for needed in ("\nNeeds: ", "\n1. ", "\n## Check\n", "\n## If it fails\n", f"skills/{skill.name}/check.sh"):
        assert needed in text, needed
    assert os.access(skill / "check.sh", os.X_OK)


@pytest.mark.parametrize(
    ("skill", "words", "last_line"),
    [
        ("add-op", ["summarise", "--no-tests"], "PASS"),
        ("add-op", ["no_such_op"], "FAIL folder: pithwood/ops/no_such_op/__init__.py does not exist"),
        ("add-mixer", ["MoBAConfig", "top_kk=1"], "FAIL arguments: the line above says what to change"),
        ("add-model", ["no_such_model"], "FAIL file: pithwood/models/no_such_model.py does not exist"),
        ("run-experiment", ["nothing", "--baseline", "nothing"], "FAIL runs: ValueError: no run 'nothing'"),
        ("validate-correctness", ["debug"], "FAIL arguments: the line above says what to change"),
        ("check-mesh-parity", ["mesh.ep=3"], "FAIL arguments: the line above says what to change"),
        ("speed-up-training", ["no_such_recipe"], "FAIL arguments: the line above says what to change"),
    ],
)
def test_a_check_prints_pass_or_the_first_failing_gate_and_exits_0_or_1(skill, words, last_line, tmp_path):
    done = check(skill, *words, cwd=tmp_path)
    assert done.stdout.splitlines()[-1].startswith(last_line), done.stdout + done.stderr
    assert done.returncode == (0 if last_line == "PASS" else 1)


NAN = """
import dataclasses

from pithwood.recipes.demo import debug
from pithwood.run import Run


def nan() -> Run:
    run = debug()
    data = dataclasses.replace(run.data, max_bytes=200_000)
    return dataclasses.replace(
        run, name="nan", model=dataclasses.replace(run.model, init_std=1e38), data=data, seq_len=64, samples_per_step=2,
        samples_per_micro_batch=2,
    )
"""


def test_nan_never_passes_not_even_against_itself(tmp_path):
    (tmp_path / "nan_recipe.py").write_text(NAN)
    done = check("validate-correctness", "nan_recipe.py:nan", "--against", "threads=1", cwd=tmp_path)
    assert done.returncode == 1
    assert re.match(r"FAIL finite: here, .* NaN or infinite", done.stdout.splitlines()[-1]), done.stdout + done.stderr
