"""What stands in the place of a value that nobody reads."""

from __future__ import annotations

from torch import Tensor


def unread_like(like: Tensor, *shape: int) -> Tensor:
    """Zeros of a shape, of the dtype and on the device of `like`, that take the memory of one element: for a forward
    pass whose graph alone is wanted. Never write to them.
    """
    return like.new_zeros(()).expand(shape)
