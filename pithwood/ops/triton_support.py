"""Where Triton kernels can run: on CUDA tensors, and on CPU tensors in Triton's interpreter.

Kernel files (`triton.py` in an op's folder) import triton at their top, so only a call that runs them imports them.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INSTALLED = importlib.util.find_spec("triton") is not None
# Kernels are written and measured with products and sums fused. Triton 3.10 will not fuse them unless asked to, and 3.9
# says so at the first kernel (triton/_utils.py there).
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def triton_misfit(*tensors: Tensor) -> str | None:
    """Why a Triton kernel cannot take these tensors, or None if it can.

    On a CPU the interpreter runs kernels if TRITON_INTERPRET=1 was set before the process imported triton; its bf16
    products are wrong, so it takes fp32 and fp16.
    """
    if not INSTALLED:
        return "the package triton is not installed (pip install 'pithwood[triton-cpu]' for its interpreter on a CPU)"
    for x in tensors:
        if x.dtype not in KERNEL_DTYPES:
            return f"kernels take fp32, fp16 and bf16, got {x.dtype}"
        if x.device.type == "cpu":
            if os.environ.get("TRITON_INTERPRET") != "1":
                return "CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before starting Python"
            if x.dtype == torch.bfloat16:
                return "Triton's interpreter computes bf16 products wrongly: use fp32 or fp16 on a CPU"
        elif x.device.type != "cuda":
            return f"kernels run on CUDA, got {x.device}"
    return None
