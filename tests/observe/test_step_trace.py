"""Attribution of kernels to parts of a step, on traces in the form that torch's profiler writes on a GPU."""

from __future__ import annotations

import pytest

from pithwood.observe.step_parts import EXCHANGE, IDLE, Evidence, decide, of_frame, of_kernel, of_op
from pithwood.observe.step_trace import STEP, read_trace

pytestmark = pytest.mark.quick

MAIN, BACKWARD = 1, 2
NODE = "autograd::engine::evaluate_function: "


def event(cat: str, name: str, start: float, length: float, tid: int = MAIN, **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": length, "pid": 1, "tid": tid, "args": args}


def frame(name: str, start: float, length: float, tid: int = MAIN):
    return event("python_function", name, start, length, tid)


def launched(number: int, host: float, name: str, start: float, length: float, tid: int = MAIN, cat: str = "kernel"):
    """A launch on the host and what it ran on the device."""
    launch = event("cuda_runtime", "cudaLaunchKernel", host, 1, tid, correlation=number)
    return [launch, event(cat, name, start, length, 7, correlation=number)]


def read(*events, step_ms: float | None = None):
    flat = [item for part in events for item in (part if isinstance(part, list) else [part])]
    return read_trace({"traceEvents": [event("user_annotation", STEP, 0, 1000), *flat]}, step_ms, gpu=True)


def test_a_kernel_belongs_to_the_innermost_frame_that_says_something():
    profile = read(
        frame("pithwood/attention/moba.py(89): forward", 10, 100),
        frame("pithwood/attention/projections.py(77): project", 11, 50),
        frame("pithwood/ops/linear.py(9): linear", 12, 20),
        launched(1, 13, "some_gemm", 100, 30),
        launched(2, 70, "some_copy", 140, 10),
    )
    assert {(kernel.name, kernel.part) for kernel in profile.kernels} == {
        ("some_gemm", "dense"),
        ("some_copy", "attention"),
    }


def test_a_backward_op_goes_where_its_forward_op_was_called():
    profile = read(
        frame("pithwood/moe/router.py(44): route", 10, 20),
        event("cpu_op", "aten::softmax", 12, 5, **{"Sequence number": 7, "Fwd thread id": 0}),
        event("cpu_op", f"{NODE}SoftmaxBackward0", 500, 20, BACKWARD, **{"Sequence number": 7, "Fwd thread id": 1}),
        launched(1, 505, "softmax_backward", 600, 40, BACKWARD),
        event("cpu_op", f"{NODE}torch::autograd::AccumulateGrad", 530, 20, BACKWARD),
        launched(2, 535, "add", 650, 10, BACKWARD),
    )
    assert {kernel.part for kernel in profile.kernels} == {"router and dispatch"}
    assert profile.parts["router and dispatch"] == pytest.approx(0.05)
    assert profile.unattributed_share == 0


def test_what_is_recomputed_goes_where_its_own_frames_say():
    profile = read(
        frame("pithwood/models/qwen3_moe.py(190): forward", 10, 20),
        event("cpu_op", "aten::add", 12, 5, **{"Sequence number": 7, "Fwd thread id": 0}),
        event("cpu_op", f"{NODE}AddBackward0", 500, 90, BACKWARD, **{"Sequence number": 7, "Fwd thread id": 1}),
        frame("pithwood/moe/experts.py(9): forward", 510, 60, BACKWARD),
        launched(1, 515, "gemm", 600, 40, BACKWARD),
    )
    assert profile.parts["experts"] == pytest.approx(0.04)


def test_inside_a_compiled_stage_a_kernels_own_name_decides():
    profile = read(
        frame("pithwood/models/qwen3_moe.py(166): attend_and_route", 10, 100),
        launched(1, 13, "flash_fwd_kernel", 100, 30),
        launched(2, 15, "triton_red_fused_mul_mean_rsqrt_0", 140, 10),
        launched(3, 17, "_attend_forward", 150, 5),
    )
    parts = {kernel.name: kernel.part for kernel in profile.kernels}
    assert parts == {
        "flash_fwd_kernel": "attention",
        "triton_red_fused_mul_mean_rsqrt_0": "dense",
        "_attend_forward": "attention",
    }


def test_overlapping_work_is_counted_once_and_idle_is_the_rest_of_an_unprofiled_step():
    profile = read(
        frame("pithwood/optim/muon.py(9): muon_update", 10, 100),
        launched(1, 13, "gemm", 100, 300),
        launched(2, 15, "Memcpy DtoH", 200, 300, cat="gpu_memcpy"),
        step_ms=0.9,
    )
    assert profile.parts["optimizer"] == pytest.approx(0.4)
    assert profile.overlapped_ms == pytest.approx(0.2)
    assert profile.parts[IDLE] == pytest.approx(0.5)
    assert profile.total_ms == pytest.approx(0.9)
    assert profile.profiled_ms == pytest.approx(1.0)


def test_an_exchange_counts_where_no_other_kernel_runs_and_says_what_was_hidden():
    profile = read(
        frame("pithwood/moe/experts.py(9): forward", 10, 100),
        launched(1, 13, "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 100, 200),
        launched(2, 15, "ncclDevKernel_AllGather_RING_LL", 250, 100),
        launched(3, 17, "gemm", 150, 100),
        launched(4, 19, "Memcpy DtoD", 100, 250, cat="gpu_memcpy"),
    )
    assert profile.parts["experts"] == pytest.approx(0.1)
    assert profile.parts[EXCHANGE] == pytest.approx(0.15)
    assert list(profile.parts)[-2:] == [EXCHANGE, IDLE]
    found = profile.communication
    assert found is not None
    assert (found.ms, found.hidden_ms, found.hidden_share) == pytest.approx((0.25, 0.1, 0.4))
    assert [(part, start) for part, start, _ in profile.spans] == [(EXCHANGE, 0.1), ("experts", 0.15), (EXCHANGE, 0.25)]


def test_without_exchanges_there_is_no_such_part():
    profile = read(launched(1, 13, "gemm", 100, 30))
    assert EXCHANGE not in profile.parts
    assert profile.communication is None


def test_work_that_nothing_tells_of_is_counted_and_said():
    profile = read(launched(1, 13, "mystery", 100, 30), event("kernel", "of no launch", 200, 10, 7))
    assert profile.parts["other"] == pytest.approx(0.04)
    assert profile.unattributed_share == 1


def test_kernels_outside_the_steps_do_not_count():
    profile = read(launched(1, 13, "late", 1001, 30))
    assert profile.kernels == []


def test_a_trace_without_steps_or_without_kernels_is_refused():
    with pytest.raises(ValueError, match="nothing was profiled"):
        read_trace({"traceEvents": []})
    with pytest.raises(ValueError, match="CUPTI"):
        read()


@pytest.mark.parametrize(
    ("frame_name", "part"),
    [
        ("pithwood/ops/grouped_mm/ref.py(84): _groups", "experts"),
        ("site-packages/pithwood/ops/linear_logprob.py(19): forward", "head and loss"),
        ("pithwood/ops/dense_attention/varlen.py(30): attend", "attention"),
        ("pithwood/moe/dispatch.py(30): plan_tokens", "router and dispatch"),
        ("pithwood/optim/clip.py(30): global_norm", "optimizer"),
        ("pithwood/observe/spikes.py(30): before_update", "other"),
        ("pithwood/models/stages.py(72): experts", "experts"),
        ("pithwood/passes.py(72): loss_of", "head and loss"),
        ("pithwood/trainer.py(72): train_step", "other"),
    ],
)
def test_files_tell_the_part(frame_name, part):
    found = of_frame(frame_name)
    assert found is not None
    assert found.part == part


def test_frames_of_others_and_shared_ops_tell_nothing():
    assert of_frame("torch/nn/modules/module.py(1): __call__") is None
    assert of_frame("pithwood/ops/packing.py(48): num_queries") is None
    assert of_op("aten::select") is None
    assert of_op("aten::_scaled_dot_product_flash_attention") == Evidence("attention")
    assert of_op("SelectBackward0") is None


def test_vague_evidence_gives_way_to_what_lies_further_out():
    assert decide([None, Evidence("dense", vague=True), Evidence("experts")]) == Evidence("experts")
    assert decide([Evidence("dense", vague=True)], "void cub::sort") == Evidence("dense", vague=True)
    assert decide([]) is None


def test_kernels_of_torch_are_not_judged_by_words():
    assert of_kernel("void at::native::index_select_kernel<float>") == ""
    assert of_kernel("triton_poi_fused_select_scatter_3") == ""
    assert of_kernel("_select_few_kernel") == "attention"
