"""Ops that compute in the dtypes of their inputs, whatever `torch.autocast` says around them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: inside the function autocast is off. Without autocast around it a call costs two reads of a flag.

    An op says in which precision it computes: fp32 scores that autocast makes half precision choose other blocks. The
    backward pass of an `autograd.Function` needs the decorator too, as it runs wherever `backward()` is called.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        cpu, cuda = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
        if not cpu and not cuda:
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return call
