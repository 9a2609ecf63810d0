"""What a results file tells of where it comes from."""

import pytest

from pithwood.bench import results
from pithwood.bench.results import told


@pytest.mark.quick
@pytest.mark.parametrize(
    "option", ["--out /some/where", "--out=/some/where", "--out '/some where'", "--logs a/b", "--runs-dir=/tmp/runs"]
)
def test_a_results_file_does_not_name_the_folders_of_its_machine(option):
    assert told(f"pithwood bench train debug {option} --steps 3") == "pithwood bench train debug --steps 3"


@pytest.mark.quick
def test_code_that_was_copied_has_the_commit_that_the_environment_names(monkeypatch):
    monkeypatch.setenv(results.COMMIT_VARIABLE, "abc1234")
    assert results._commit() == "abc1234"
    monkeypatch.delenv(results.COMMIT_VARIABLE)
    assert results._commit() != "abc1234"
