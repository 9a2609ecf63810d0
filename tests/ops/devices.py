"""Where tests of Triton kernels run: on the GPU where there is one (and then under the mark `gpu`), else in Triton's
interpreter, which knows no bf16.
"""

from __future__ import annotations

import pytest
import torch

from tests.ops.reference import Inputs

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
KERNEL_MARKS = [pytest.mark.gpu] if ON_GPU else []
KERNEL_DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]


def on_device(inputs: Inputs) -> Inputs:
    """The inputs without gradients, where kernels run."""
    return Inputs(*(x.detach().to(DEVICE) for x in inputs[:3]), inputs.packing.to(DEVICE))
