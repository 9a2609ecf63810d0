"""Which part of a training step a piece of work belongs to, told by where in the code it was started.

The evidence is what stood on the host's stack when an op ran or a kernel was launched: Python frames of this package,
names of ops and autograd functions. The innermost that says something decides; files that say little (the model, the
loop) decide only if nothing else does, after the kernel's own name. Nothing is marked in the code that runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

PARTS = ("attention", "experts", "router and dispatch", "dense", "head and loss", "optimizer", "other")
"""dense: projections, norms, rotary, embedding, residuals. other: what the loop itself does, and what is unknown."""
EXCHANGE = "exchange"
"""On a mesh: NCCL's kernels while no other runs on the same GPU, what they wait for slower partners included."""
IDLE = "idle"
UNKNOWN = ""

_SHARED = (
    "linear",
    "master",
    "operator",
    "packing",
    "units",
    "softmax",
    "checks",
    "triton_support",
    "offsets_triton",
    "__init__",
)
"""Files of ops/ that serve several parts: whoever called them decides."""

_WORDS = (
    ("head and loss", r"logprob|nll|cross_entropy|xent"),
    ("optimizer", r"muon|adamw|newton|orthogonal|(^|[/_])gram|clip|multi_tensor"),
    ("router and dispatch", r"ops/(route|permute)/|(select|weigh)_experts|expert_weights|sum_rows|(^|[_:])plan_"),
    ("experts", r"expert|grouped|swiglu"),
    ("router and dispatch", r"dispatch|combine|rout|permut|balance|attach_?loss|scatter_rows|gather_rows|moe"),
    ("attention", r"attend|attention|select|summaris|moba|decode|varlen|sdpa|flash|fmha|(key|query)_?major"),
    ("dense", r"rope|rotary|proj|norm|residual|embed"),
)  # fmt: skip
"""Words in names of our own ops, functions and kernels, the first match deciding."""

_FILES = (
    ("dense", r"attention/(projections|key_conv)"),
    ("attention", r"attention/"),
    ("experts", r"moe/\w*expert"),
    ("router and dispatch", r"moe/"),
    ("optimizer", r"optim/"),
    ("head and loss", r"objectives"),
    ("experts", r"models/\w+\.py\(\d+\): experts"),
    ("other", r"observe/|data/"),
)
_VAGUE_FILES = (
    ("head and loss", r"passes\.py\(\d+\): (forward_backward|loss_of)"),
    ("dense", r"models/"),
    ("other", r"train(er)?\.py|passes\.py|bench/"),
)


@dataclass(frozen=True)
class Evidence:
    """What one entry of a stack says: a part, and whether anything else may overrule it."""

    part: str
    vague: bool = False


def of_frame(frame: str) -> Evidence | None:
    """What a Python frame says, written `path/file.py(line): function`; None for one that says nothing."""
    _, found, inside = frame.rpartition("pithwood/")
    if not found:
        return None
    if inside.startswith("ops/"):
        stem = inside.removeprefix("ops/").partition(".py(")[0]
        if stem in _SHARED:
            return None
        return _of_words(inside)
    for part, pattern in _FILES:
        if re.match(pattern, inside):
            return Evidence(part)
    for part, pattern in _VAGUE_FILES:
        if re.match(pattern, inside):
            return Evidence(part, vague=True)
    return None


def of_op(name: str) -> Evidence | None:
    """What the name of an op says: those of torch itself nothing but for attention, custom ops and autograd
    functions their words.
    """
    if name.startswith("aten::") and re.search(r"scaled_dot_product|flash_attention|cudnn_attention", name):
        return Evidence("attention")
    if name.startswith(("aten::", "autograd::", "torch::", "Torch-", "c10d::")) or re.search(r"Backward\d+$", name):
        return None
    return _of_words(name)


def is_exchange(kernel: str) -> bool:
    """Whether a GPU kernel carries data between processes, by its name."""
    return kernel.startswith(("ncclDevKernel", "ncclKernel"))


def of_kernel(name: str) -> str:
    """The part that a GPU kernel's own name tells of, UNKNOWN if none."""
    # a kernel of the compiler lists the ops that it fused, and `select` or `scatter` among them mean nothing
    if re.search(r"at::native|elementwise|cub::|cublas|index_select|^triton_\w+_fused", name) and "flash" not in name:
        return UNKNOWN
    found = _of_words(name)
    return UNKNOWN if found is None else found.part


def decide(evidence: Iterable[Evidence | None], kernel: str = "") -> Evidence | None:
    """What the evidence, innermost first, and the kernel's name come to; None if nothing told the part."""
    vague: Evidence | None = None
    for item in evidence:
        if item is not None and not item.vague:
            return item
        vague = vague or item
    if named := of_kernel(kernel):
        return Evidence(named)
    return vague


def _of_words(name: str) -> Evidence | None:
    for part, pattern in _WORDS:
        if re.search(pattern, name, re.IGNORECASE):
            return Evidence(part)
    return None
