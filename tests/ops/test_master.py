"""Copies of master weights and the place where their gradients are added up."""

import weakref

import pytest
import torch

from pithwood.ops.master import (
    add_gradient,
    deferred_gradients,
    drop_copies,
    gradient_sink,
    in_dtype,
    keep_copies,
    run_deferred,
    when_added,
)

pytestmark = pytest.mark.quick


def test_a_kept_copy_is_used_until_the_weight_changes():
    weight = torch.nn.Parameter(torch.randn(4, 3))
    keep_copies([weight], torch.bfloat16)
    assert in_dtype(weight, torch.bfloat16) is weight.kept_copy[0]
    with torch.no_grad():
        weight.add_(1.0)
    assert torch.equal(in_dtype(weight, torch.bfloat16), weight.to(torch.bfloat16))


def test_renewing_writes_into_the_same_memory():
    weight = torch.nn.Parameter(torch.randn(4, 3))
    keep_copies([weight], torch.bfloat16)
    first = weight.kept_copy[0]
    with torch.no_grad():
        weight.mul_(2.0)
    keep_copies([weight], torch.bfloat16)
    assert weight.kept_copy[0] is first
    assert torch.equal(first, weight.detach().to(torch.bfloat16))


def test_a_copy_in_another_dtype_is_not_used():
    weight = torch.nn.Parameter(torch.randn(4, 3))
    keep_copies([weight], torch.float16)
    assert in_dtype(weight, torch.bfloat16).dtype == torch.bfloat16
    assert in_dtype(weight, torch.float32) is weight


def test_dropped_copies_are_gone():
    weight = torch.nn.Parameter(torch.randn(4, 3))
    keep_copies([weight], torch.bfloat16)
    drop_copies([weight])
    assert not hasattr(weight, "kept_copy")


def test_the_sink_of_a_leaf_is_its_gradient():
    weight = torch.nn.Parameter(torch.randn(4, 3))
    sink = gradient_sink(weight)
    assert sink is not None
    assert sink[0] is weight.grad
    assert not sink[1]
    again = gradient_sink(weight)
    assert again is not None
    assert again[0] is weight.grad
    assert again[1]


def test_what_other_operations_made_and_frozen_weights_have_no_sink():
    weight = torch.nn.Parameter(torch.randn(4, 3))
    assert gradient_sink(weight * 2) is None
    weight.requires_grad_(False)
    assert gradient_sink(weight) is None


class _Product(torch.autograd.Function):
    """x W^T whose weight is saved as tensors are, and gets its gradient in place."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        total, add = gradient_sink(weight)
        total.copy_(total + grad.t() @ x if add else grad.t() @ x)
        return grad @ weight, None


def test_the_sink_is_the_parameters_where_hooks_hand_back_another_tensor():
    weight, x = torch.nn.Parameter(torch.randn(3, 4)), torch.randn(2, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept):
        first, second = _Product.apply(x, weight), _Product.apply(x, weight)
    (first.sum() + second.sum()).backward()
    assert torch.allclose(weight.grad, 2 * x.sum(0).expand(3, 4))


def written(value):
    """A product that is this number everywhere."""
    return lambda total, add: total.copy_(total + value if add else torch.full_like(total, value))


def test_a_deferred_product_is_added_when_the_queue_is_run():
    weight, queue = torch.nn.Parameter(torch.randn(3, 4)), []
    with deferred_gradients(queue):
        assert add_gradient(weight, written(1.0))
        assert add_gradient(weight, written(2.0))
    assert weight.grad is None
    assert add_gradient(weight, written(5.0))
    assert weight.grad.eq(5.0).all()
    run_deferred(queue)
    assert weight.grad.eq(8.0).all()
    assert not queue


def test_what_follows_the_products_follows_them_in_the_queue_too():
    weight, queue, seen = torch.nn.Parameter(torch.randn(3, 4)), [], []
    with deferred_gradients(queue):
        add_gradient(weight, written(1.0))
        when_added(lambda: seen.append(weight.grad.clone()))
        add_gradient(weight, written(2.0))
    assert not seen
    run_deferred(queue)
    when_added(lambda: seen.append(weight.grad.clone()))
    assert [int(grad[0, 0]) for grad in seen] == [1, 3]


def test_queues_within_each_other_take_their_own():
    weight, outer, inner = torch.nn.Parameter(torch.randn(3, 4)), [], []
    with deferred_gradients(outer):
        with deferred_gradients(inner):
            add_gradient(weight, written(1.0))
        add_gradient(weight, written(2.0))
    assert (len(outer), len(inner)) == (1, 1)


def test_what_has_no_sink_cannot_be_deferred_and_a_weight_frozen_meanwhile_gets_nothing():
    weight, queue = torch.nn.Parameter(torch.randn(3, 4)), []
    with deferred_gradients(queue):
        assert not add_gradient(weight * 2, written(1.0))
        assert add_gradient(weight, written(1.0))
    weight.requires_grad_(False)
    run_deferred(queue)
    assert weight.grad is None


def test_products_are_let_go_with_their_operands_one_by_one():
    weight, queue, alive = torch.nn.Parameter(torch.randn(3, 4)), [], []

    def adding(operand):
        return lambda total, add: (alive.append([ref() is not None for ref in refs]), total.add_(operand.sum()))

    operands = [torch.ones(2), torch.ones(2)]
    refs = [weakref.ref(operand) for operand in operands]
    with deferred_gradients(queue):
        for operand in operands:
            add_gradient(weight, adding(operand))
    operands.clear()
    del operand
    run_deferred(queue)
    assert alive == [[True, True], [False, True]]
