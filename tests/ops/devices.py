"""Where tests of Triton kernels run: on the GPU where there is one (and then under the mark `gpu`), else in Triton's
interpreter, which knows no bf16.
"""

from __future__ import annotations

import pytest
import torch

from tests.ops.reference import Inputs, make_inputs

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
KERNEL_MARKS = [pytest.mark.gpu] if ON_GPU else []
KERNEL_DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]


def on_device(inputs: Inputs) -> Inputs:
    """The inputs without gradients, where kernels run."""
    return Inputs(*(x.detach().to(DEVICE) for x in inputs[:3]), inputs.packing.to(DEVICE))


def exact_inputs(*args, **options) -> Inputs:
    """`make_inputs` where kernels run, with scores that are exact in fp32, so that implementations agree bit for bit,
    and with many ties among them.
    """
    inputs = make_inputs(*args, **options)
    with torch.no_grad():
        inputs.q.copy_(inputs.q.mul(1.5).round())
        inputs.k.copy_(inputs.k.mul(1.5).round())
    return on_device(inputs)
