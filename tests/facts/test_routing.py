"""Expert load and block choices equal what counting one by one gives."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from pithwood.facts.routing import _BlockChoices, measure_routing
from pithwood.ops.packing import Packing
from pithwood.run_folder import open_run
from tests.observe.test_metrics import random_ids

BLOCK, TOP_K = 16, 3


def choices_of(lengths: list[list[int]], seed: int = 0, sets: int = 2) -> tuple[_BlockChoices, list]:
    """Random choices over batches of documents, gathered, and as a list of (batch, document, own, chosen)."""
    gathered, listed = _BlockChoices(BLOCK), []
    for batch, docs in enumerate(lengths):
        packing = Packing.from_lengths(docs)
        ids = random_ids(packing, sets, TOP_K, BLOCK, seed=seed + batch)
        gathered.add(ids, packing)
        doc_T, position_T = packing.query_doc().tolist(), packing.position_T.tolist()
        for t, rows in enumerate(ids.tolist()):
            listed += [(batch, doc_T[t], position_T[t] // BLOCK, b) for row in rows for b in row if b >= 0]
    return gathered, listed


@pytest.mark.quick
def test_distances_count_every_entry_once():
    gathered, listed = choices_of([[200, 40], [90]])
    expected = Counter(own - chosen for _, _, own, chosen in listed)
    rows = gathered.row()["distances"]
    assert [(row["from"], row["to"]) for row in rows] == [(0, 0), (1, 1), (2, 2), (3, 4), (5, 8), (9, 12)]
    for row in rows:
        count = sum(expected[d] for d in range(row["from"], row["to"] + 1))
        assert row["share"] == pytest.approx(count / len(listed))
    assert sum(row["uniform"] for row in rows) == pytest.approx(1)


@pytest.mark.quick
def test_random_choices_lie_where_the_uniform_column_expects_them():
    gathered, listed = choices_of([[640]] * 4, sets=8)
    error = 3 / math.sqrt(len(listed))
    for row in gathered.row()["distances"]:
        assert row["share"] == pytest.approx(row["uniform"], abs=error)


@pytest.mark.quick
def test_popular_share_is_that_of_the_most_named_past_blocks():
    gathered, listed = choices_of([[1600, 300], [1500]], seed=5)
    hits = Counter((batch, doc, chosen) for batch, doc, own, chosen in listed if chosen != own)
    past_blocks = 99 + 18 + 93  # every document's blocks but its last
    top = sorted(hits.values(), reverse=True)[: math.ceil(past_blocks / 100)]
    assert gathered.row()["popular_share"] == pytest.approx(sum(top) / sum(hits.values()))


@pytest.mark.quick
def test_a_single_block_has_no_past_to_choose_from():
    row = choices_of([[10]])[0].row()
    assert row["own_share"] == 1
    assert all(math.isnan(row[name]) for name in ("entropy", "union_64", "union_128", "popular_share"))
    assert row["distances"] == [{"from": 0, "to": 0, "share": 1.0, "uniform": 1.0}]


def test_a_trained_models_routing_is_measured_in_every_layer(trained):
    from pithwood.facts.run import validation_batches
    from pithwood.run_folder import open_run_corpus

    opened = open_run(str(trained.moba), trained.runs_dir, device="cpu")
    corpus = open_run_corpus(opened, trained.runs_dir)
    facts = measure_routing(opened.model, validation_batches(opened, corpus, 4))
    assert facts["tokens"] == 4 * 64
    assert [row["layer"] for row in facts["experts"]] == [row["layer"] for row in facts["blocks"]] == [0, 1]
    for row in facts["experts"]:
        assert sum(row["counts"]) == 4 * 64 * 2
        assert row["max_over_mean"] == pytest.approx(max(row["counts"]) / (sum(row["counts"]) / 4))
        assert row["dead"] == row["counts"].count(0)
    for row in facts["blocks"]:
        assert (row["block_size"], row["top_k"]) == (8, 2)
        assert 0.5 < row["own_share"] < 1
        assert sum(part["share"] for part in row["distances"]) == pytest.approx(1)


def test_dead_experts_are_counted(trained):
    from pithwood.facts.run import validation_batches
    from pithwood.run_folder import open_run_corpus

    opened = open_run(str(trained.moba), trained.runs_dir, device="cpu")
    corpus = open_run_corpus(opened, trained.runs_dir)
    with torch.no_grad():  # a router of zeros ties all experts, and two of them then take every token
        opened.model.blocks[1].mlp.gate.weight.zero_()
    rows = measure_routing(opened.model, validation_batches(opened, corpus, 2))["experts"]
    assert rows[1]["dead"] == 2
    assert rows[1]["max_over_mean"] == pytest.approx(2)
