from __future__ import annotations

import json

import pytest

from bench.prepare import _kills, _tokenize, _whole
from bench.text import _varied, write_json_lines
from pithwood.data.dedup import jaccard, shingles
from pithwood.data.sources import Document, StdlibSource


def test_the_text_is_source_code_up_to_the_bytes_asked_for(tmp_path):
    counts = write_json_lines(tmp_path / "text.jsonl", 500_000)
    texts = [json.loads(line)["text"] for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    assert counts["documents"] == len(texts)
    assert counts["bytes"] == counts["unvaried_bytes"] == sum(len(text.encode()) for text in texts)
    assert 400_000 < counts["bytes"] <= 500_000


def test_text_repeated_in_other_words_is_no_near_duplicate():
    text = next(
        item.text for item in StdlibSource().documents() if isinstance(item, Document) and item.name == "ast.py"
    )
    rounds = [text, _varied(text, 1, {}), _varied(text, 2, {})]
    sets = [shingles(one.encode()) for one in rounds]
    assert max(jaccard(sets[a], sets[b]) for a, b in ((0, 1), (0, 2), (1, 2))) < 0.5
    assert _varied(text, 1, {}) == rounds[1]
    assert abs(len(rounds[1]) - len(text)) < 0.01 * len(text)


@pytest.mark.slow
def test_every_case_of_the_bench_works_and_both_tools_count_the_same_tokens(tmp_path):
    whole = _whole(tmp_path, 4)
    assert whole["tokens"] > 500_000
    assert 0.05 < whole["peak_gib"] < 2.0
    ours, theirs = _tokenize(tmp_path, 2, 1)
    assert ours["tokens"] == theirs["tokens"] > 250_000
    kills = _kills(tmp_path, 2, whole, 4)
    assert kills["hashes_equal"]
    assert kills["fingerprint"] == whole["fingerprint"]
