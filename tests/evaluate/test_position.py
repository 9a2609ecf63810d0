"""Loss by position: what each token's loss is counted under, and how sure the means are."""

from __future__ import annotations

import math

import pytest
import torch

from pithwood.data.batches import sequential_batches
from pithwood.evaluate.loss import evaluate_loss
from pithwood.evaluate.position import _mean, loss_by_position, position_edges
from pithwood.evaluate.text import corpus_of_texts
from pithwood.run_folder import load_tokenizer, open_run
from tests.toy_mixer import ToyRecurrenceConfig


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return ["document 1\nbada bida bodu " * 6, "document 2\nkiti katu", "document 3\nmesa " * 20]


def batches_of(trained, texts, seq_len=16, samples_per_batch=3):
    corpus = corpus_of_texts(texts, load_tokenizer(trained.moba))
    return list(
        sequential_batches(corpus, "validation", seq_len=seq_len, samples_per_batch=samples_per_batch, max_samples=None)
    )


@pytest.mark.quick
@pytest.mark.parametrize(
    ("length", "buckets", "edges"),
    [(1, None, [0, 1]), (2, None, [0, 1, 2]), (8, None, [0, 1, 2, 4, 8]), (10, None, [0, 1, 2, 4, 8, 10]),
     (10, 4, [0, 2, 5, 8, 10]), (5, 5, [0, 1, 2, 3, 4, 5]), (7, 1, [0, 7])],
)  # fmt: skip
def test_buckets_cover_every_position_once(length, buckets, edges):
    assert position_edges(length, buckets) == edges


@pytest.mark.quick
@pytest.mark.parametrize("buckets", [0, -1, 9])
def test_more_buckets_than_positions_are_refused(buckets):
    with pytest.raises(ValueError, match="must lie between 1 and the 8 positions"):
        position_edges(8, buckets)


def test_each_tokens_loss_counts_under_its_place_in_its_document(trained, texts):
    model = open_run(str(trained.moba), trained.runs_dir, device="cpu").model
    batches = batches_of(trained, texts)
    result = loss_by_position(model, batches, list(range(17)))
    # one by one, straight from the model's log-probabilities
    sums: dict[int, list[float]] = {}
    with torch.no_grad():
        for batch in batches:
            hidden = model.hidden(batch.columns["tokens"], batch.packing)
            logprob = torch.log_softmax((hidden @ model.head_weight.T).double(), dim=-1)
            position = 0
            starts = {int(start) for start in batch.packing.cu_q}
            for index, target in enumerate(batch.columns["targets"].tolist()):
                position = 0 if index in starts else position + 1
                if batch.columns["loss_weight"][index] > 0:
                    sums.setdefault(position, []).append(-float(logprob[index, target]))
    assert [(row["from"], row["to"], row["tokens"]) for row in result["buckets"]] == [
        (position, position, len(losses)) for position, losses in sorted(sums.items())
    ]
    for row in result["buckets"]:
        assert row["loss"] == pytest.approx(sum(sums[row["from"]]) / len(sums[row["from"]]), rel=1e-5)


def test_the_whole_is_what_evaluate_loss_says(trained, texts):
    model = open_run(str(trained.moba), trained.runs_dir, device="cpu").model
    result = loss_by_position(model, batches_of(trained, texts), position_edges(16))
    whole = evaluate_loss(model, batches_of(trained, texts))
    for name in ("loss", "bits_per_byte", "tokens", "bytes"):
        assert result[name] == pytest.approx(whole[name], rel=1e-12)
    assert result["bytes"] == sum(len(text.encode()) for text in texts)
    assert sum(row["tokens"] for row in result["buckets"]) == result["tokens"]
    mean = sum(row["tokens"] * row["loss"] for row in result["buckets"]) / result["tokens"]
    assert mean == pytest.approx(result["loss"])


def test_errors_are_over_documents_and_over_contexts_where_there_is_one_document(trained, texts):
    model = open_run(str(trained.moba), trained.runs_dir, device="cpu").model
    result = loss_by_position(model, batches_of(trained, texts), position_edges(16))
    assert (result["documents"], result["errors_over"]) == (3, "documents")
    one = loss_by_position(model, batches_of(trained, texts[:1]), position_edges(16))
    assert (one["documents"], one["errors_over"]) == (1, "contexts")
    assert one["standard_error"] > 0


@pytest.mark.quick
def test_the_standard_error_of_equal_clusters_is_that_of_their_means():
    values = torch.tensor([1.0, 2.0, 4.0, 7.0], dtype=torch.float64)
    result = _mean((10 * values).numpy(), torch.full((4,), 10.0).double().numpy(), torch.full((4,), 30.0).numpy())
    assert result["loss"] == 3.5
    assert result["standard_error"] == pytest.approx(float(values.std()) / 2)
    assert result["bits_per_byte"] == pytest.approx(3.5 / 3 / math.log(2))


@pytest.mark.quick
def test_the_standard_error_meets_the_spread_of_repeated_draws():
    rng = torch.Generator().manual_seed(0)
    losses, errors = [], []
    for _ in range(400):
        weight = torch.randint(1, 50, (60,), generator=rng).double()
        nll = weight * (3 + torch.randn(60, generator=rng, dtype=torch.float64))
        result = _mean(nll.numpy(), weight.numpy(), weight.numpy())
        losses.append(result["loss"])
        errors.append(result["standard_error"])
    spread = float(torch.tensor(losses).std())
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.1)


@pytest.mark.quick
def test_a_single_cluster_has_no_standard_error():
    one = torch.ones(1).double().numpy()
    assert math.isnan(_mean(one, one, one)["standard_error"])


def test_evaluating_leaves_the_model_in_the_mode_it_had(trained, texts):
    model = open_run(str(trained.moba), trained.runs_dir, device="cpu").model.train()
    loss_by_position(model, batches_of(trained, texts), position_edges(16))
    assert model.training


def test_a_mixer_that_is_not_strictly_causal_is_refused(trained, texts):
    model = open_run(str(trained.moba), trained.runs_dir, device="cpu").model
    model.set_attention((ToyRecurrenceConfig(), ToyRecurrenceConfig()))
    model.blocks[1].self_attn.causality = "leaky_selection"
    with pytest.raises(ValueError, match="layer 1's mixer is 'leaky_selection': its loss is not a perplexity"):
        loss_by_position(model, batches_of(trained, texts), position_edges(16))


def test_no_tokens_are_refused(trained):
    model = open_run(str(trained.moba), trained.runs_dir, device="cpu").model
    with pytest.raises(ValueError, match="nothing to evaluate"):
        loss_by_position(model, [], [0, 16])
