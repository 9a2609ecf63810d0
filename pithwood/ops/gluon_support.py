"""What Gluon names differently from one Triton to the next. Only kernel files import this: it imports triton."""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
"""A barrier of the warps of a program, or of those of a partition; Triton 3.6 called it thread_barrier."""

async_load = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
"""Begins a copy from global to shared memory; Triton 3.6 knows the longer name, 3.9 the shorter."""
