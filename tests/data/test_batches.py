from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from pithwood.data.batches import Batch, BatchSource, sequential_batches
from pithwood.data.prepare import CorpusConfig, prepare
from pithwood.data.sources import TextFolder
from pithwood.data.tokenizer import END_OF_TEXT_ID
from pithwood.ops.packing import Packing
from tests.data.texts import prose

pytestmark = pytest.mark.quick

SEQ = 48


def train_source(corpus, **changes) -> BatchSource:
    arguments = {"seq_len": SEQ, "samples_per_batch": 2, "samples_per_step": 6, "seed": 3, **changes}
    return BatchSource(corpus, "train", **arguments)


def equal(a: Batch, b: Batch) -> bool:
    return (
        a.columns.keys() == b.columns.keys()
        and all(torch.equal(a.columns[name], b.columns[name]) for name in a.columns)
        and torch.equal(a.packing.cu_q, b.packing.cu_q)
        and torch.equal(a.packing.position_T, b.packing.position_T)
        and a.packing.max_q == b.packing.max_q
    )


def samples_of(batch: Batch) -> list[tuple[int, ...]]:
    return [tuple(row) for row in batch.columns["tokens"].view(-1, SEQ).tolist()]


def test_columns_and_packing_of_a_batch(corpus):
    source = train_source(corpus)
    batch = source.batch(4, 1)
    stream = corpus.stream("train")
    tokens, targets = [], []
    for sample in source.samples(4, 1).tolist():
        tokens += stream.read(sample * SEQ, sample * SEQ + SEQ).tolist()
        targets += stream.read(sample * SEQ + 1, sample * SEQ + SEQ + 1).tolist()
    assert batch.num_tokens == 2 * SEQ
    assert batch.columns["tokens"].tolist() == tokens
    assert batch.columns["targets"].tolist() == targets
    assert batch.columns["loss_weight"].tolist() == [1.0] * (2 * SEQ)
    assert batch.columns["target_bytes"].tolist() == corpus.tokenizer.bytes_per_token()[targets].tolist()
    assert batch.columns["tokens"].dtype == batch.columns["targets"].dtype == torch.int64
    assert batch.columns["loss_weight"].dtype == torch.float32
    assert batch.columns["target_bytes"].dtype == torch.int64
    assert batch.packing.self_attention
    assert batch.packing.causal
    assert batch.packing.cu_q.dtype == torch.int32
    assert batch.packing.max_q == batch.packing.max_k == SEQ


def test_documents_begin_at_samples_and_end_of_text_only(corpus):
    source = train_source(corpus)
    inside = 0
    for step in range(source.num_samples // 6):
        for micro in range(3):
            batch = source.batch(step, micro)
            tokens = batch.columns["tokens"]
            begins = (tokens == END_OF_TEXT_ID) | (torch.arange(2 * SEQ) % SEQ == 0)
            starts = begins.nonzero()[:, 0].tolist()
            inside += len(starts) - 2
            cu = batch.packing.cu_q.tolist()
            unused = batch.packing.num_docs - len(starts)
            assert cu == [*starts, *[2 * SEQ] * (1 + unused)]
            expected = [i - max(s for s in starts if s <= i) for i in range(2 * SEQ)]
            assert batch.packing.position_T.tolist() == expected
    assert inside > 0


def test_batches_are_pure_functions_of_step_and_micro(corpus):
    places = [(step, micro) for step in range(12) for micro in range(3)]
    ordered = {place: train_source(corpus).batch(*place) for place in places}
    shuffled = random.Random(0).sample(places, len(places))
    source = train_source(corpus)
    for place in shuffled + shuffled[:5]:
        assert equal(source.batch(*place), ordered[place])
    other = train_source(corpus, seed=4)
    assert not equal(other.batch(0, 0), ordered[0, 0])


def test_a_step_holds_the_same_samples_however_it_is_divided(corpus):
    steps = {}
    for per_batch in (1, 2, 3, 6):
        source = train_source(corpus, samples_per_batch=per_batch)
        steps[per_batch] = [
            [sample for batch in source.step(step) for sample in samples_of(batch)] for step in range(5)
        ]
    assert steps[1] == steps[2] == steps[3] == steps[6]


def test_each_epoch_reads_every_sample_once(corpus):
    source = train_source(corpus, samples_per_batch=1, samples_per_step=1)
    stream = corpus.stream("train")
    assert source.num_samples == (len(stream) - 1) // SEQ
    assert source.tokens_per_epoch == source.num_samples * SEQ
    whole = [tuple(stream.read(i * SEQ, (i + 1) * SEQ).tolist()) for i in range(source.num_samples)]
    orders = []
    for epoch in range(2):
        steps = range(epoch * source.num_samples, (epoch + 1) * source.num_samples)
        read = [samples_of(source.batch(step))[0] for step in steps]
        assert sorted(read) == sorted(whole)
        orders.append(read)
    assert orders[0] != orders[1]
    assert orders[0] != whole


def test_number_of_documents_is_constant_and_enough(corpus):
    source = train_source(corpus, samples_per_batch=6)
    assert source.num_samples > 6
    most = 0
    for step in range(3 * source.num_samples // 6):
        batch = source.batch(step)
        assert batch.packing.num_docs == source.max_docs
        most = max(most, int((batch.packing.cu_q.diff() > 0).sum()))
    assert most <= source.max_docs
    single = train_source(corpus, samples_per_batch=1, samples_per_step=1)
    counts = [int((single.batch(step).packing.cu_q.diff() > 0).sum()) for step in range(single.num_samples)]
    assert single.max_docs == max(counts)
    # A batch over the end of an epoch may hold a sample twice.
    assert source.max_docs == 2 * sum(sorted(counts)[-3:])


def test_more_documents_may_be_asked_for_but_not_fewer(corpus):
    needed = train_source(corpus).max_docs
    wider = train_source(corpus, max_docs=needed + 5).batch(0)
    assert wider.packing.num_docs == needed + 5
    assert equal(replace_packing(wider, needed), train_source(corpus).batch(0))
    with pytest.raises(ValueError, match=f"max_docs={needed - 1} is too low.*set max_docs={needed}"):
        train_source(corpus, max_docs=needed - 1)


def replace_packing(batch: Batch, num_docs: int) -> Batch:
    cu = batch.packing.cu_q[: num_docs + 1]
    return Batch(batch.columns, replace(batch.packing, cu_q=cu, cu_k=cu))


def test_many_short_documents_and_repeats_at_the_end_of_an_epoch_fit_the_bound(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for index in range(80):
        (texts / f"{index:02d}.txt").write_text(prose(index, 2 + index % 7))
    cfg = CorpusConfig(TextFolder(str(texts)), vocab_size=257, dedup_threshold=None)
    made = prepare(cfg, tmp_path / "cache")
    stream = made.stream("train")
    for seq_len in (1, 7, 64, 700, len(stream) // 2 - 1):
        # Steps much larger than an epoch meet the same sample several times in one batch.
        num_samples = (len(stream) - 1) // seq_len
        for per_batch in {1, 2, 5, min(2 * num_samples + 3, 50)}:
            source = BatchSource(made, "train", seq_len=seq_len, samples_per_batch=per_batch, seed=0)
            for step in range(0, 60, 4):
                batch = source.batch(step)
                starts = (batch.columns["tokens"] == 0) | (torch.arange(per_batch * seq_len) % seq_len == 0)
                assert int((batch.packing.cu_q.diff() > 0).sum()) == int(starts.sum())
                assert batch.packing.num_docs == source.max_docs


@pytest.mark.parametrize(("seq_len", "per_batch"), [(SEQ, 4), (SEQ, 1), (7, 16), (10**6, 3)])
def test_sequential_batches_pay_for_every_byte_once(corpus, seq_len, per_batch):
    batches = list(sequential_batches(corpus, "validation", seq_len=seq_len, samples_per_batch=per_batch))
    stream = corpus.stream("validation")
    tokens = torch.cat([batch.columns["tokens"] for batch in batches])
    targets = torch.cat([batch.columns["targets"] for batch in batches])
    whole = stream.read(0, len(stream)).tolist()
    assert tokens.tolist() == whole[:-1]
    assert targets.tolist() == whole[1:]
    total = sum(int(batch.columns["target_bytes"].sum()) for batch in batches)
    assert total == corpus.num_bytes("validation") == len(corpus.validation_text())
    assert len({batch.packing.num_docs for batch in batches}) == 1
    assert all(batch.num_tokens == seq_len * per_batch for batch in batches[:-1])
    for batch in batches:
        assert int(batch.packing.cu_q.diff().max()) <= batch.packing.max_q
        assert int(batch.packing.cu_q[-1]) == batch.num_tokens
        starts = (batch.columns["tokens"] == 0) | (torch.arange(batch.num_tokens) % seq_len == 0)
        assert (batch.packing.position_T == 0).tolist() == starts.tolist()


def test_sequential_batches_can_stop_early(corpus):
    def run(limit: int | None) -> list[Batch]:
        return list(sequential_batches(corpus, "validation", seq_len=SEQ, samples_per_batch=3, max_samples=limit))

    everything = run(None)
    first = run(5)
    assert [batch.num_tokens for batch in first] == [3 * SEQ, 2 * SEQ]
    assert equal(first[0], everything[0])
    assert first[1].columns["tokens"].tolist() == everything[1].columns["tokens"][: 2 * SEQ].tolist()
    assert all(equal(a, b) for a, b in zip(run(10**6), everything, strict=True))


def test_batches_move_between_devices_with_their_packing(corpus):
    moved = train_source(corpus).batch(0).to("meta")
    assert all(column.device.type == "meta" for column in moved.columns.values())
    assert moved.packing.cu_q.device.type == moved.packing.position_T.device.type == "meta"
    assert moved.packing.self_attention
    batch = train_source(corpus).batch(0)
    assert equal(batch.to("cpu"), batch)


def test_batches_can_be_written_to_without_touching_the_corpus(corpus):
    batch = train_source(corpus).batch(0)
    batch.columns["tokens"].fill_(1)
    batch.columns["target_bytes"].fill_(0)
    assert not equal(batch, train_source(corpus).batch(0))
    corpus.verify()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 0}, "seq_len=0 must be at least 1"),
        ({"samples_per_batch": 0}, "samples_per_batch=0 must be at least 1"),
        ({"samples_per_step": 5}, "samples_per_step=5 must be a multiple of samples_per_micro_batch=2"),
        ({"samples_per_step": 0}, "samples_per_step=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be >= 0"),
        ({"seq_len": 10**6}, "seq_len=1000000 needs 1000001 tokens, but the train split has"),
    ],
)
def test_bad_sizes_are_refused(corpus, changes, message):
    with pytest.raises(ValueError, match=message):
        train_source(corpus, **changes)


def test_sequential_sizes_are_checked_at_the_call(corpus):
    with pytest.raises(ValueError, match="max_samples=0"):
        sequential_batches(corpus, "validation", seq_len=SEQ, samples_per_batch=1, max_samples=0)
    with pytest.raises(ValueError, match="max_docs=1 is too low"):
        sequential_batches(corpus, "validation", seq_len=SEQ, samples_per_batch=2, max_docs=1)


def test_places_outside_a_step_are_refused(corpus):
    source = train_source(corpus)
    for step, micro in [(-1, 0), (0, 3), (0, -1)]:
        with pytest.raises(ValueError, match="must be >= 0"):
            source.batch(step, micro)


def test_steps_far_out_are_as_cheap_as_the_first(corpus):
    source = train_source(corpus)
    assert source.batch(10**12, 2).num_tokens == 2 * SEQ
    assert np.array_equal(source.samples(10**12, 2), train_source(corpus).samples(10**12, 2))


@pytest.mark.gpu
def test_a_batch_on_its_way_to_a_gpu_does_not_wait_for_what_the_gpu_is_at():
    tokens = 1 << 20
    batch = Batch({"tokens": torch.arange(tokens)}, Packing.from_lengths([tokens]))
    batch.to("cuda")
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)
    busy = torch.cuda.Event()
    busy.record()
    there = batch.to("cuda")
    assert not busy.query()
    assert torch.equal(there.columns["tokens"].cpu(), batch.columns["tokens"])
