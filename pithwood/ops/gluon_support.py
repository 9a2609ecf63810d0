"""What Gluon names differently from one Triton to the next. Only kernel files import this: it imports triton."""

from __future__ import annotations

import triton.experimental.gluon.language as gl

thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
"""A barrier of the warps of a program, or of those of a partition; Triton 3.6 called it thread_barrier."""
