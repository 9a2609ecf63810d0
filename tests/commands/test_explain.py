"""`pithwood explain`: text that fits a terminal, JSON, and the nearest key for an unknown one."""

from __future__ import annotations

import json

import pytest

from pithwood.cli import main
from pithwood.facts.settings import explain

pytestmark = pytest.mark.quick


def test_a_setting_is_explained_in_lines_that_fit_a_terminal(capsys):
    assert main(["explain", "model.moe.balance_coef"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("MoEConfig.balance_coef\n")
    assert "pithwood/moe/router.py" in out
    assert "default: " in out
    assert max(map(len, out.splitlines())) <= 80


def test_json_holds_all_that_is_known(capsys):
    assert main(["explain", "top_k", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"] == explain("top_k")


def test_without_a_key_the_settings_of_a_run_are_listed(capsys):
    assert main(["explain"]) == 0
    out = capsys.readouterr().out
    assert "\nseq_len: required\n" in out
    assert "\nlog_every: default 10\n" in out


def test_a_mixer_of_ones_own_is_explained_once_imported(tmp_path, capsys):
    file = tmp_path / "mixer_to_explain.py"
    file.write_text(
        "from dataclasses import dataclass\n\nfrom pithwood.attention.full import FullAttentionConfig\n\n\n"
        "@dataclass(frozen=True)\nclass MineConfig(FullAttentionConfig):\n    pull: float = 0.5\n"
        '    """How hard it pulls, 0 to 1."""\n\n    def build(self, shape):\n        return self.pull\n'
    )
    assert main(["explain", "attention.pull", "--import", str(file), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["settings"]
    assert (row["class"], row["default"]) == ("mixer_to_explain.MineConfig", 0.5)
    assert row["meaning"] == "How hard it pulls, 0 to 1."
    assert [reader["where"] for reader in row["readers"]] == ["MineConfig.build"]


def test_an_unknown_key_gets_one_line_with_the_nearest(capsys, monkeypatch):
    monkeypatch.delenv("PITHWOOD_TRACEBACK", raising=False)
    assert main(["explain", "stpes"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "did you mean steps?" in err
