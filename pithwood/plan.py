"""What a run would take, before it starts: whether every phase can be built, and figures of size, work and memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from pithwood.attention.base import check_context_parallel
from pithwood.data.mixture import find_data
from pithwood.data.usage import data_plan, training_batches
from pithwood.memory import memory_by_kind, memory_limit
from pithwood.models.qwen3_moe import Qwen3MoE
from pithwood.ops.packing import Packing
from pithwood.optim.config import MuonConfig
from pithwood.optim.groups import plan_parameters
from pithwood.optim.schedule import schedule_spans
from pithwood.run import DTYPES, Run, pick_device


def check_phases(run: Run) -> None:
    """Build every phase without memory and raise ValueError for what would fail only when its step arrives."""
    try:
        schedule_spans(run.optim.schedule, run.steps)
    except ValueError as error:
        raise ValueError(f"optim.schedule: {error}") from None
    shapes: dict[str, torch.Size] = {}
    for index in range(max(len(run.phases), 1)):
        step = run.phases[index - 1].until_step if index else 0
        where, active = f"phases.{index}" if run.phases else "model", run.phase(step)
        with torch.device("meta"):
            model = Qwen3MoE(dataclasses.replace(run.model, attention=active.attention))
        check_context_parallel((block.self_attn for block in model.blocks), run.mesh.cp)
        parameters = dict(model.named_parameters())
        if run.mesh.size > 1 and index and parameters.keys() != shapes.keys():
            other = sorted(parameters.keys() ^ shapes.keys())[0]
            raise ValueError(
                f"{where}.attention has other parameters than the phases before it ({other}); on a mesh of several "
                "processes all phases have the same: give every attention the same key_conv, or train in one process"
            )
        for name, param in parameters.items():
            if shapes.setdefault(name, param.shape) != param.shape:
                raise ValueError(
                    f"{where}: {name} would change its shape from {tuple(shapes[name])} to {tuple(param.shape)}; "
                    "parameters keep their shape over phases"
                )
        plan_parameters(
            parameters,
            model.parameter_roles(),
            muon=isinstance(run.optim, MuonConfig),
            weight_decay=run.optim.weight_decay,
            decay_embeddings=run.optim.decay_embeddings,
            weight_decay_rules=run.optim.weight_decay_rules,
            lr_scales=active.lr_scales,
            trainable=active.trainable,
        )
        last = index == max(len(run.phases), 1) - 1
        leaky = [block.self_attn for block in model.blocks if block.self_attn.causality != "strict"]
        if last and leaky:
            raise ValueError(
                f"{where}: {type(leaky[0]).__name__} is {leaky[0].causality!r}, so the run could not be validated at "
                "its end; add a last phase with a strictly causal mixer"
            )


def plan(run: Run, cache_dir: Path | None = None) -> dict[str, Any]:
    """What a run would take, without starting it: sizes, tokens, FLOPs of a step at its costliest length, bytes of
    weights and state; what it reads of its data (`data_plan`) if that lies prepared in cache_dir, else null.
    """
    run.validate()
    check_phases(run)
    with torch.device("meta"):
        model = Qwen3MoE(dataclasses.replace(run.model, attention=run.phase(0).attention))
    counts, device = model.num_params(), pick_device(run)
    stages = run.stages()
    data, reading = find_data(run.data, cache_dir) if cache_dir else None, None
    if data is not None:
        batches = training_batches(data, stages, seed=run.seed, steps=run.steps)
        reading = data_plan(data, batches.curriculum, run.steps)
    # samples of one length cost the same: a thousand of them are priced, one by one, and multiplied
    priced = [min(stage.samples_per_batch, 1000) for stage in stages]
    packings = [Packing.from_lengths([stage.seq_len] * many) for stage, many in zip(stages, priced, strict=True)]
    costs = [model.cost(packing, element_size=DTYPES[run.precision].itemsize) for packing in packings]
    shares = [stage.samples_per_batch / many for stage, many in zip(stages, priced, strict=True)]
    micro, share = max(zip(costs, shares, strict=True), key=lambda pair: pair[0].model_flops * pair[1])
    micro_batches = run.samples_per_step // run.samples_per_micro_batch
    memory = memory_by_kind(run, device)
    live = ("activations", "workspace")
    return {
        "parameters": counts["total"],
        "active_parameters": counts["active"],
        "tokens_per_step": run.samples_per_step * run.seq_len,
        "tokens": run.steps * run.samples_per_step * run.seq_len,
        "training_flops_per_step": 3.0 * micro.model_flops * share * micro_batches,
        "weights_gradients_optimizer_gb": sum(size for kind, size in memory.items() if kind not in live) / 1e9,
        "activations_gb": sum(memory[kind] for kind in live) / 1e9,
        "device": str(device),
        "device_memory_gb": memory_limit(device)[0] / 1e9,
        "data": reading,
    }
