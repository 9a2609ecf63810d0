"""Scores and attention mass of selected units: definition, averaging over what shares a list, padding, gradients."""

from __future__ import annotations

import pytest
import torch

from pithwood.ops import Packing, attend, attention_mass, dense_attention, scores_at, select, summarise
from pithwood.ops.packing import Selection
from tests.numerics import assert_close
from tests.ops.reference import make_inputs, masks_of_ids, random_selection, spans

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("poison")]
CASES = [(unit, row_size, sets) for unit, row_size in ((1, 1), (8, 1), (8, 16), (3, 5)) for sets in (1, 2, 4)]


def _rows(packing: Packing, row_size: int) -> list[tuple[int, int, int]]:
    """(first query, last query + 1, document) of each selection row."""
    return [
        (start, min(start + row_size, q1), n)
        for n, (q0, q1, _, _) in enumerate(spans(packing))
        for start in range(q0, q1, row_size)
    ]


@pytest.mark.parametrize(("unit", "row_size", "sets"), CASES)
def test_scores_are_mean_dot_products_and_minus_infinity_at_padding(unit, row_size, sets):
    inputs = make_inputs([21, 0, 40], [30, 0, 33], heads=4, kv_heads=2, dtype=torch.float64)
    selection = random_selection(inputs.packing, unit, 4, sets=sets, row_size=row_size)
    summary = summarise(inputs.k, inputs.packing, unit, dtype=torch.float64)
    found = scores_at(inputs.q, summary, selection, inputs.packing)
    expected = torch.full(selection.ids.shape, float("-inf"), dtype=torch.float64)
    first_unit = inputs.packing.unit_offsets(unit).tolist()
    for r, (a, b, n) in enumerate(_rows(inputs.packing, row_size)):
        for s in range(sets):
            for j, unit_id in enumerate(selection.ids[r, s].tolist()):
                if unit_id >= 0:
                    heads = range(s * 4 // sets, (s + 1) * 4 // sets)
                    parts = [inputs.q[a:b, h] @ summary[first_unit[n] + unit_id, h // 2] for h in heads]
                    expected[r, s, j] = torch.stack(parts).mean().detach()
    assert torch.equal(found == float("-inf"), selection.ids < 0)
    real = selection.ids >= 0
    assert_close(found[real], expected[real])


@pytest.mark.parametrize(("row_size", "sets"), [(1, 4), (16, 1), (16, 2)])
def test_scores_are_differentiable_in_queries_and_summaries(row_size, sets):
    inputs = make_inputs([20, 12], heads=4, kv_heads=2, dim=3, dtype=torch.float64)
    selection = random_selection(inputs.packing, 4, 3, sets=sets, row_size=row_size)
    summary = summarise(inputs.k, inputs.packing, 4, dtype=torch.float64).requires_grad_()

    def finite(q, s):
        return scores_at(q, s, selection, inputs.packing)[selection.ids >= 0]

    assert torch.autograd.gradcheck(finite, (inputs.q, summary))


def test_scores_of_a_moba_selection_rank_like_the_selection():
    inputs = make_inputs([200], heads=4, kv_heads=2)
    summary = summarise(inputs.k, inputs.packing, 8)
    selection = select(inputs.q, summary, inputs.packing, 64, block_size=8, mean_dtype="fp32")
    few = select(inputs.q, summary, inputs.packing, 4, block_size=8, mean_dtype="fp32")
    own = (torch.arange(200) // 8)[:, None, None]
    all_scores = scores_at(inputs.q, summary, selection, inputs.packing)
    past = all_scores.masked_fill(selection.ids == own, float("-inf"))
    best = past.topk(3).values[40:].sort(-1).values
    chosen = scores_at(inputs.q, summary, few, inputs.packing).masked_fill(few.ids == own, float("-inf"))
    assert_close(chosen[40:].sort(-1).values[..., 1:], best, 1e-5)


@pytest.mark.parametrize(("unit", "row_size", "sets"), CASES)
@pytest.mark.parametrize("causal", [True, False])
def test_mass_is_the_mean_probability_of_each_selected_unit(unit, row_size, sets, causal):
    inputs = make_inputs([21, 0, 40], [30, 0, 33], heads=4, kv_heads=2, dtype=torch.float64, causal=causal)
    selection = random_selection(inputs.packing, unit, 4, sets=sets, row_size=row_size)
    _, lse = attend(*inputs, selection)
    found = attention_mass(inputs.q, inputs.k, lse, inputs.packing, selection)
    assert not found.requires_grad
    expected = torch.zeros_like(found)
    masks = masks_of_ids(selection.ids_per_head(inputs.packing, 4, 2), unit, inputs.packing)
    probability = []
    for (q0, q1, k0, k1), mask in zip(spans(inputs.packing), masks, strict=True):
        score = torch.einsum("lhk,mhk->hlm", inputs.q[q0:q1], inputs.k[k0:k1].repeat_interleave(2, dim=1)) * 0.25
        score = score.masked_fill(~mask, float("-inf"))
        probability.append(score.softmax(-1).nan_to_num(0.0).detach())
    for r, (a, b, n) in enumerate(_rows(inputs.packing, row_size)):
        q0 = spans(inputs.packing)[n][0]
        for s in range(sets):
            heads = slice(s * 4 // sets, (s + 1) * 4 // sets)
            for j, unit_id in enumerate(selection.ids[r, s].tolist()):
                if unit_id >= 0:
                    on_unit = probability[n][heads, a - q0 : b - q0, unit_id * unit : (unit_id + 1) * unit]
                    expected[r, s, j] = on_unit.sum(-1).mean()
    assert_close(found, expected)


def test_masses_of_a_row_sum_to_one_or_to_the_share_that_the_selection_covers():
    inputs = make_inputs([100], heads=2)
    summary = summarise(inputs.k, inputs.packing, 8)
    selection = select(inputs.q, summary, inputs.packing, 3, block_size=8)
    _, lse = attend(*inputs, selection)
    assert_close(attention_mass(inputs.q, inputs.k, lse, inputs.packing, selection).sum(-1), torch.ones(100, 2), 1e-5)
    _, full = dense_attention(*inputs, need_lse=True)
    share = attention_mass(inputs.q, inputs.k, full, inputs.packing, selection).sum(-1)
    assert (share <= 1 + 1e-5).all()
    assert_close(share, torch.exp(lse - full), 1e-5)


def test_bad_shapes_are_refused():
    inputs = make_inputs([16], heads=4, kv_heads=2)
    selection = random_selection(inputs.packing, 8, 2, sets=4)
    three = Selection(selection.ids[:, :3], selection.count[:, :3], 8)
    summary = summarise(inputs.k, inputs.packing, 8)
    with pytest.raises(ValueError, match="3 sets per row"):
        scores_at(inputs.q, summary, three, inputs.packing)
    with pytest.raises(ValueError, match="3 sets per row"):
        attention_mass(inputs.q, inputs.k, torch.zeros(16, 4), inputs.packing, three)
    with pytest.raises(ValueError, match="lse must be"):
        attention_mass(inputs.q, inputs.k, torch.zeros(16, 2), inputs.packing, selection)
