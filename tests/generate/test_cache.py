"""The cache's storage: appending, growing, blocks, running state, truncating, forking, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pithwood.attention.base import CacheField
from pithwood.generate.cache import Cache
from pithwood.ops.packing import Packing

TOKEN = CacheField("k", (2, 3), torch.float32, "token")
BLOCK = CacheField("mean", (2,), torch.float32, "block", 4)
STATE = CacheField("state", (5,), torch.float32, "sequence")
TAIL = CacheField("tail", (2, 3), torch.float32, "tail")
pytestmark = pytest.mark.quick


def _rows(count: int, start: int = 0) -> torch.Tensor:
    """Rows whose every value is their number, from `start`."""
    return torch.arange(start, start + count, dtype=torch.float32)[:, None, None].expand(count, 2, 3)


def _append(cache: Cache, new: list[int], start: int = 0) -> torch.Tensor:
    held = cache.layer(0, cache.begin(new)).append("k", _rows(sum(new), start))
    cache.advance()
    return held[:, 0, 0]


def test_rows_of_several_sequences_come_back_packed_in_order():
    cache = Cache([[TOKEN]], 3, 100)
    assert _append(cache, [2, 0, 1]).tolist() == [0, 1, 2]
    assert _append(cache, [1, 2, 1], start=10).tolist() == [0, 1, 10, 11, 12, 2, 13]
    assert cache.lengths == [3, 2, 2]


def test_one_sequence_is_read_without_a_copy():
    cache = Cache([[TOKEN]], 1, 100)
    _append(cache, [5])
    held = cache.layer(0, cache.begin([1])).append("k", _rows(1, 5))
    assert held.data_ptr() == cache._storage[0]["k"].data_ptr()
    assert held[:, 1, 2].tolist() == [0, 1, 2, 3, 4, 5]


def test_packing_of_a_step_stands_at_the_end_of_what_is_held():
    cache = Cache([[TOKEN]], 2, 100)
    first = cache.begin([3, 5])
    assert first.self_attention
    cache.advance()
    second = cache.begin([1, 0])
    assert second.cu_q.tolist() == [0, 1, 1]
    assert second.cu_k.tolist() == [0, 4, 9]
    assert second.position_T.tolist() == [3]


def test_a_packing_made_elsewhere_is_read_and_checked():
    cache = Cache([[TOKEN]], 2, 100)
    cache.layer(0, Packing.from_lengths([2, 1])).append("k", _rows(3))
    cache.advance()
    view = cache.layer(0, Packing.from_lengths([1, 1], [3, 2]))
    assert (view.lengths_N, view.added_N) == ([2, 1], [1, 1])
    with pytest.raises(ValueError, match=r"key lengths \[1, 1\]; with this cache they must be \[3, 2\]"):
        cache.layer(0, Packing.from_lengths([1, 1]))


def test_a_step_can_be_run_again_until_it_is_counted():
    cache = Cache([[TOKEN, STATE]], 1, 100)
    for value in (1.0, 2.0):
        view = cache.layer(0, cache.begin([2]))
        assert view.read("state").tolist() == [[0.0] * 5]
        view.append("k", _rows(2, int(value)))
        view.write("state", view.read("state") + value)
    cache.advance()
    assert cache.lengths == [2]
    view = cache.layer(0, cache.begin([1]))
    assert view.read("state").tolist() == [[2.0] * 5]
    assert view.append("k", _rows(1, 9))[:, 0, 0].tolist() == [2, 3, 9]


def test_capacity_doubles_and_keeps_what_is_held():
    cache = Cache([[TOKEN, BLOCK]], 2, 1500)
    before = cache.nbytes
    _append(cache, [200, 100])
    assert cache.nbytes == before
    held = _append(cache, [1, 900], start=1000)
    assert held.tolist() == [*range(200), 1000, *range(200, 300), *range(1001, 1901)]
    assert cache._storage[0]["k"].shape[1] == 1024
    assert cache._storage[0]["mean"].shape[1] == 256
    _append(cache, [0, 500])
    assert cache._storage[0]["k"].shape[1] == 1500


def test_rows_read_in_place_are_the_packed_ones_with_room_between():
    cache = Cache([[TOKEN]], 2, 1000)
    _append(cache, [200, 100])
    view = cache.layer(0, cache.begin([1, 200]))
    rows, start_N = view.append_in_place("k", _rows(201, 500))
    packed = view.append("k", _rows(201, 500))
    assert rows.data_ptr() == cache._storage[0]["k"].data_ptr()
    assert torch.equal(
        torch.cat([rows[start : start + n] for start, n in zip(start_N, (201, 300), strict=True)]), packed
    )


def test_growing_beyond_max_len_says_so_and_changes_nothing():
    cache = Cache([[TOKEN]], 2, 10)
    _append(cache, [4, 8])
    with pytest.raises(ValueError, match="sequence 1 holds 8 tokens and would add 3: beyond max_len=10"):
        cache.begin([1, 3])
    assert cache.lengths == [4, 8]


def test_finished_blocks_are_counted_from_the_lengths():
    cache = Cache([[BLOCK]], 2, 100)
    view = cache.layer(0, cache.begin([9, 3]))
    view.append_blocks("mean", torch.tensor([[1.0, 1], [2, 2]]), [2, 0])
    assert view.blocks("mean")[1] == [2, 0]
    cache.advance()
    view = cache.layer(0, cache.begin([1, 2]))
    with pytest.raises(ValueError, match=r"got \[1, 1\] finished blocks .* this step finishes \[0, 1\]"):
        view.append_blocks("mean", torch.zeros(2, 2), [1, 1])
    view.append_blocks("mean", torch.tensor([[7.0, 7]]), [0, 1])
    rows, counts = view.blocks("mean")
    assert counts == [2, 1]
    assert rows[:, 0].tolist() == [1, 2, 7]


def test_truncate_forgets_tokens_and_blocks():
    cache = Cache([[TOKEN, BLOCK]], 2, 100)
    view = cache.layer(0, cache.begin([9, 4]))
    view.append("k", _rows(13))
    view.append_blocks("mean", torch.arange(6.0).view(3, 2), [2, 1])
    cache.advance()
    cache.truncate(0, 5)
    view = cache.layer(0, cache.begin([1, 0]))
    assert view.append("k", _rows(1, 50))[:, 0, 0].tolist() == [0, 1, 2, 3, 4, 50, 9, 10, 11, 12]
    assert view.blocks("mean")[1] == [1, 1]
    with pytest.raises(ValueError, match="cannot truncate sequence 0 to 6 tokens: it holds 5"):
        cache.truncate(0, 6)


@pytest.mark.parametrize("field", [STATE, TAIL])
def test_state_that_only_runs_forward_refuses_a_partial_truncate(field):
    cache = Cache([[TOKEN], [field]], 2, 100)
    cache.layer(1, cache.begin([3, 3])).write(field.name, torch.ones(2, *field.shape))
    cache.advance()
    cache.truncate(0, 3)
    with pytest.raises(ValueError, match=rf"layer 1 keeps '{field.name}', which cannot be rolled back; truncate to 0"):
        cache.truncate(0, 2)
    cache.truncate(0, 0)
    state = cache.layer(1, cache.begin([1, 1])).read(field.name)
    assert float(state[0].abs().sum()) == 0
    assert bool((state[1] == 1).all())


def test_fork_copies_and_keep_reorders_every_kind_of_state():
    cache = Cache([[TOKEN, BLOCK, STATE]], 2, 100)
    view = cache.layer(0, cache.begin([1, 5]))
    view.append("k", _rows(6))
    view.append_blocks("mean", torch.tensor([[3.0, 4.0]]), [0, 1])
    view.write("state", torch.tensor([[1.0] * 5, [2.0] * 5]))
    cache.advance()
    assert cache.fork(1, 2) == [2, 3]
    view = cache.layer(0, cache.begin([0, 0, 1, 0]))
    assert view.append("k", _rows(1, 90))[:, 0, 0].tolist() == [0, *range(1, 6), *range(1, 6), 90, *range(1, 6)]
    assert view.blocks("mean")[1] == [0, 1, 1, 1]
    assert view.read("state")[:, 0].tolist() == [1, 2, 2, 2]
    cache.advance()
    cache.keep([2, 0])
    assert cache.lengths == [6, 1]
    assert _append(cache, [0, 1], start=70).tolist() == [1, 2, 3, 4, 5, 90, 0, 70]


def test_activations_are_kept_in_the_caches_dtype_and_statistics_in_their_own():
    index = CacheField("index", (1,), torch.int32, "token")
    cache = Cache([[TOKEN, BLOCK, STATE, TAIL, index]], 1, 10, dtype=torch.bfloat16)
    kept = {name: tensor.dtype for name, tensor in cache._storage[0].items()}
    assert kept == {
        "k": torch.bfloat16,
        "tail": torch.bfloat16,
        "mean": torch.float32,
        "state": torch.float32,
        "index": torch.int32,
    }


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: Cache([[TOKEN, TOKEN]], 1, 10), "layer 0 declares the cache field 'k' twice"),
        (lambda: Cache([[CacheField("m", (1,), torch.float32, "block")]], 1, 10), "block_size=0; give >= 1"),
        (lambda: Cache([[TOKEN]], 0, 10), "num_sequences >= 1"),
        (lambda: _cache(decode_attention="dense"), "choose 'moba', 'full' or None"),
        (lambda: Cache([[TOKEN]], 2, 10).begin([1]), "1 lengths for a cache of 2 sequences"),
        (lambda: Cache([[TOKEN]], 1, 10).begin([-1]), "cannot add -1 tokens"),
        (lambda: Cache([[TOKEN]], 1, 10).advance(), "without a step"),
        (lambda: Cache([[TOKEN]], 1, 10).fork(1, 1), "sequence 1 does not exist"),
        (lambda: _view().read("k"), "'k' is a token field, not sequence or tail"),
        (lambda: _view().append("v", _rows(2)), r"keeps no field 'v'; its mixer declares \['k', 'state'\]"),
        (lambda: _view().append("k", _rows(3)), r"got rows \(3, 2, 3\) for 2 tokens of shape \(2, 3\)"),
        (lambda: _view().write("state", torch.zeros(1, 4)), r"got \(1, 4\); the field is \(1, 5\)"),
    ],
)
def test_misuse_is_refused_in_plain_words(use, message):
    with pytest.raises(ValueError, match=message):
        use()


def _cache(**arguments: Any) -> Cache:
    return Cache([[TOKEN]], 1, 10, **arguments)


def _view():
    cache = Cache([[TOKEN, STATE]], 1, 10)
    return cache.layer(0, cache.begin([2]))
