"""Who orthogonalises what: every matrix once, evenly, and each round's sizes agree between all processes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pithwood.optim.layout import Division, Place, find_division
from pithwood.optim.owners import SharedMatrix, Stack, cost, plan_rounds, replicas_share, share_out
from pithwood.parallel.pieces import Piece

pytestmark = pytest.mark.quick


def everybody(place: Place) -> list[Place]:
    return [replace(place, replica=r, fold=f) for r in range(place.replicas) for f in range(place.folds)]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Place, list[Stack]]:
    ep = draw(st.sampled_from([1, 2, 3]))
    place = Place(draw(st.integers(1, 3)), ep * draw(st.integers(1, 4)), ep)
    stacks = []
    for number in range(draw(st.integers(1, 4))):
        experts = draw(st.booleans())
        num = draw(st.integers(1, 4)) * (ep if experts else 1)
        rows, cols = draw(st.integers(1, 6)), draw(st.integers(1, 6))
        part, sharers = num * rows * cols // (ep if experts else 1), place.folds // (ep if experts else 1)
        division = Division((num, rows, cols), experts, cut=part % sharers == 0)
        stacks.append(Stack(f"w{number}", num, rows, cols, division))
    return place, stacks


@given(layouts(), st.booleans())
def test_every_matrix_is_updated_by_one_process_of_those_that_hold_it(layout, share):
    place, stacks = layout
    seen: dict[tuple[str, int], set[int]] = {}
    for here in everybody(place):
        alone, shared = share_out(stacks, here, lambda rows, cols: share)
        for stack in stacks:
            piece = stack.division.piece(here, here.fold)
            for number in alone[stack.name]:
                start = number * stack.rows * stack.cols
                assert piece.start <= start < start + stack.rows * stack.cols <= piece.stop
                seen.setdefault((stack.name, number), set()).add(here.fold)
        assert shared == share_out(stacks, everybody(place)[0], lambda rows, cols: share)[1]
    for matrix in shared:
        assert matrix.fold in [holding.fold for holding in matrix.held]
        assert sum(holding.size for holding in matrix.needed) == matrix.size
        owners = seen.setdefault((matrix.name, matrix.start // matrix.size), set())
        assert not owners
        owners.add(matrix.fold)
    # all replicas update alone what their folds hold, the same fold in each
    assert all(len(owners) == 1 for owners in seen.values())
    assert seen.keys() == {(stack.name, number) for stack in stacks for number in range(stack.num)}


@given(layouts(), st.integers(1, 3))
def test_what_is_sent_in_a_round_is_what_is_awaited(layout, most):
    place, stacks = layout
    _, shared = share_out(stacks, place, lambda rows, cols: True)
    rounds = [plan_rounds(shared, here, lambda rows, cols: most) for here in everybody(place)]
    assert len({len(own) for own in rounds}) == 1
    done = 0
    for each in zip(*rounds, strict=True):
        for replica in range(place.replicas):
            group = each[replica * place.folds : (replica + 1) * place.folds]
            for a, ours in enumerate(group):
                for b, theirs in enumerate(group):
                    assert ours.sent_sizes[b] == theirs.arriving_sizes[a]
                    assert ours.leaving_sizes[b] == theirs.returned_sizes[a]
        for fold in range(place.folds):
            assert len({own.width for own in each[fold :: place.folds]}) == 1
        for own in each:
            assert len(own.owned) <= most
            assert len({(matrix.rows, matrix.cols) for matrix in own.owned}) <= 1
            assert sum(own.arriving_sizes) == sum(matrix.size for matrix in own.owned)
            done += len(own.owned)
    assert done == len(shared)


def work(shared: list[SharedMatrix], place: Place) -> list[int]:
    loads = {(here.replica, here.fold): 0 for here in everybody(place)}
    for matrix in shared:
        loads[matrix.replica, matrix.fold] += cost(matrix.rows, matrix.cols)
    return list(loads.values())


def test_owners_are_spread_evenly_over_folds_and_replicas():
    place = Place(replicas=2, folds=4)
    shapes = [(4096, 2048), (512, 2048), (512, 2048), (2048, 4096)] * 12
    stacks = [Stack(f"w{i}", 1, *shape, Division(shape, False, True)) for i, shape in enumerate(shapes)]
    alone, shared = share_out(stacks, place, lambda rows, cols: True)
    assert not any(alone.values())
    assert max(work(shared, place)) < 1.1 * sum(work(shared, place)) / 8


def test_who_updates_matrices_alone_owns_fewer_of_the_shared():
    """Three experts over two folds: the first two halves hold one whole each, the third is cut."""
    place = Place(folds=2)
    experts = Stack("experts", 3, 64, 64, Division((3, 64, 64), True, True))
    dense = [Stack(f"w{i}", 1, 64, 64, Division((64, 64), False, True)) for i in range(3)]
    alone, shared = share_out([experts, *dense], place, lambda rows, cols: True)
    assert alone["experts"] == range(1)
    assert [matrix.name for matrix in shared] == ["experts", "w0", "w1", "w2"]
    assert len(set(work(shared, place))) == 1


def test_experts_that_lie_whole_in_a_process_stay_there():
    place = Place(folds=4, ep=2, fold=3)
    alone, shared = share_out([Stack("w", 16, 8, 8, Division((8, 16, 8), True, True))], place, lambda r, c: True)
    assert alone["w"] == range(12, 16)
    assert shared == []


def test_replicas_on_gpus_share_whole_matrices_only_where_the_work_outweighs_the_exchange():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert replicas_share(2048, 4096, gpu)
    assert not replicas_share(768, 2048, gpu)
    assert replicas_share(768, 2048, cpu)
    place = Place(replicas=2)
    stack = [Stack("w", 4, 8, 8, Division((4, 8, 8), True, False))]
    assert share_out(stack, place, lambda rows, cols: False) == ({"w": range(4)}, [])
    alone, shared = share_out(stack, place, lambda rows, cols: True)
    assert not alone["w"]
    assert [matrix.replica for matrix in shared] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("piece", "kind", "division"),
    [
        (Piece((4, 6), 12, 18), "matrix", Division((4, 6), False, True)),
        (Piece.whole((4, 6)), "matrix", Division((4, 6), False, False)),
        (Piece((4, 6), 0, 12), "experts", Division((4, 6), True, False)),
        (Piece((4, 6), 6, 12), "experts", Division((4, 6), True, True)),
    ],
)
def test_a_piece_tells_how_its_parameter_is_divided(piece, kind, division):
    assert find_division("w", piece, kind, Place(folds=4, ep=2, fold=2)) == division


def test_pieces_that_no_division_gives_are_refused():
    place = Place(folds=4, ep=2, fold=2)
    with pytest.raises(
        ValueError, match=r"w: .* 0:6 of shape \(4, 6\), but as number 2 of 4 it should hold 0:24 or 12:18"
    ):
        find_division("w", Piece((4, 6), 0, 6), "matrix", place)
    with pytest.raises(ValueError, match=r"mesh.ep=2 must divide its 3 experts"):
        find_division("w", Piece((3, 6), 0, 9), "experts", place)
