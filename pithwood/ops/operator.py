"""Operators that torch.compile takes as they are, and that cost nothing where nobody compiles.

A custom operator of torch goes through its dispatcher, schema and alias checks in Python: 10 microseconds a call, and
50 more with the backward pass of one that is differentiable, where a kernel's launch takes as long (docs/log.md). An
eager call needs none of it: the function itself is called, or an `autograd.Function` of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]


class Operator:
    """A function of tensors and plain values; called in a compiled graph, the operator of torch that wraps it.

    The function returns new tensors, and changes no input but those named by `mutates`. It has no gradient unless
    `register_autograd` gives it one: with an input that asks for one, torch raises in the backward pass.
    """

    def __init__(self, name: str, function: Function, mutates: tuple[str, ...]) -> None:
        self.op = torch.library.custom_op(f"pithwood::{name}", function, mutates_args=mutates)
        """As torch knows it: torch.ops.pithwood.<name>."""
        self._overload = getattr(torch.ops.pithwood, name).default
        self._function = function
        names = list(inspect.signature(function).parameters)
        self._mutated = [names.index(name) for name in mutates]
        self._differentiable: Any = None

    def __call__(self, *inputs: Any) -> Any:
        # modes of dispatch watch or trace: fake tensors, for instance, have no memory
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return self._overload(*inputs)
        if torch.is_grad_enabled():
            for x in inputs:
                if isinstance(x, Tensor) and x.requires_grad:
                    return (self._overload if self._differentiable is None else self._differentiable.apply)(*inputs)
        result = self._function(*inputs)
        for place in self._mutated:
            # what a kernel writes torch does not see
            torch.autograd.graph.increment_version(inputs[place])
        return result

    def register_fake(self, fake: Function) -> Function:
        """What the function returns, by shape and dtype alone: for tracing."""
        self.op.register_fake(fake)
        return fake

    def register_autograd(self, backward: Function, *, setup_context: Function) -> None:
        """As of a custom operator of torch: `setup_context(ctx, inputs, output)` keeps what `backward(ctx, *grads)`
        needs, which returns one gradient or None per input."""
        assert not self._mutated
        self.op.register_autograd(backward, setup_context=setup_context)
        function = self._function

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = function(*inputs)
            setup_context(ctx, inputs, output)
            return output

        parts = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._differentiable = type(f"_{function.__name__}", (torch.autograd.Function,), parts)


def operator(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Function], Operator]:
    """Decorator: the function as the `Operator` torch.ops.pithwood.<name>."""
    return lambda function: Operator(name, function, mutates)
