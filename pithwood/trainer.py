"""One training step, and what it works on: model, optimizer, counters; how they are saved and resumed.

A step reads: batches -> forward and backward over micro-batches -> norm, clip and update -> values for the log. Nothing
waits for the device outside logging steps.
"""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pithwood.attention.base import Cost
from pithwood.checkpoint.background import Saving, begin_save
from pithwood.checkpoint.load import latest_checkpoint, load_checkpoint
from pithwood.checkpoint.ranges import Held
from pithwood.checkpoint.rng import capture_rng, restore_rng
from pithwood.checkpoint.save import save_checkpoint
from pithwood.checkpoint.storage import read_manifest, read_state
from pithwood.config import config_hash
from pithwood.data.batches import Batch
from pithwood.data.corpus import Corpus
from pithwood.data.mixture import Mixture
from pithwood.evaluate.loss import check_strictly_causal, loss_sums
from pithwood.evaluate.parts import evaluate_data, losses
from pithwood.evaluate.spread import evaluate_on_mesh
from pithwood.losses import LossLedger
from pithwood.memory import activation_plan, keeps_copies, memory_line
from pithwood.models.part import ModelPart
from pithwood.models.pipelined import MicroBatch, ModelPipeline
from pithwood.models.qwen3_moe import Qwen3MoE
from pithwood.moe.balance import load_stats
from pithwood.moe.layer import MoELayer, step_counts
from pithwood.observe.mesh_norms import MeshNorms
from pithwood.observe.metrics import (
    block_fields,
    measure_peak_flops,
    peak_flops,
    peak_memory_gb,
)
from pithwood.observe.spikes import SpikeWatch
from pithwood.ops.master import keep_copies
from pithwood.ops.packing import Selection
from pithwood.optim.groups import ParamRole
from pithwood.optim.optimizer import Optimizer
from pithwood.parallel.mesh import Mesh
from pithwood.parallel.totals import Totals, scalar
from pithwood.passes import Local, context_fields, forward_backward, loss_of
from pithwood.run import DTYPES, Run
from pithwood.run_folder import (
    check_fits,
    check_origin,
    check_same_corpus,
)

Replay = list[dict[str, Any]] | None
"""Decisions to reuse, for each micro-batch of a step."""


class Trainer:
    """Model, optimizer and the counters of one run on one device; without a corpus (random tokens) it is not saved."""

    def __init__(
        self, run: Run, device: torch.device, corpus: Corpus | Mixture | None, mesh: Mesh | None = None
    ) -> None:
        """mesh: the processes that the run is spread over, as `run.mesh` says; None: this one alone."""
        self.run, self.device, self.dtype = run, device, DTYPES[run.precision]
        self.mesh = Mesh.single(device) if mesh is None else mesh
        self.share = (self.mesh.data.rank, self.mesh.data.size)
        """Which part of each micro-batch's samples this process reads."""
        self.totals = Totals(self.mesh)
        self.tell_phase: Callable[[str], None] = lambda name: None
        """Told what begins, in a word or two."""
        self.step = 0
        """Optimizer steps done."""
        self.tokens = 0
        self.corpus_fingerprint = corpus.fingerprint if corpus else ""
        self.tokenizer_fingerprint = corpus.tokenizer.fingerprint() if corpus else ""
        self.phase = 0
        self.parked: dict[str, Tensor] = {}
        """Parameters that the present phase's mixers do not use; they are saved and come back with a phase that
        does."""
        peaks = (
            {"mfu": peak_flops(device), "mfu_measured": peak_flops(device, measured=True)}
            if device.type == "cuda"
            else {"mfu": measure_peak_flops(device)}
        )
        self.peaks = {name: None if peak is None else peak * self.mesh.world.size for name, peak in peaks.items()}
        """What MFU is relative to, of all processes' devices: stated and measured peaks of GPUs, or a matmul measured
        here on a CPU."""
        phase = run.phase(0)
        # made where it will lie: no copy of it ever exists on the host
        cfg = dataclasses.replace(run.model, attention=phase.attention)
        self.part: ModelPart | None = None
        """What of the model this process holds; None: all of it, alone."""
        if self.mesh.world.size > 1:
            divides = device.type == "cuda" and not run.compile and self.dtype != torch.float32
            self.part = ModelPart.of(self.mesh, cfg, self.dtype if divides else None)
        with device:
            self.model = Qwen3MoE(cfg, self.part)
        self.whole = self.model
        """The model with all its layers and experts, perhaps without memory: for shapes and costs."""
        if self.part is not None:
            with torch.device("meta"):
                self.whole = Qwen3MoE(cfg)
            self.whole.keep_activations(activation_plan(run))
        self.pipeline: ModelPipeline | None = None
        """Runs the stages of the model; None if this process has all layers, and runs its micro-batches one by one."""
        if self.mesh.pp.size > 1 or self.mesh.cfg.overlap == "pairs":
            self.pipeline = ModelPipeline(self.model, self.whole, self.mesh, self.dtype)
        self.saving: Saving | None = None
        """The checkpoint that is being written beside the training."""
        self.model.init_weights(run.seed)
        self.model.keep_activations(activation_plan(run))
        if run.compile:
            # plain attention on a CPU looks at offsets, and no graph holds that: it stays as it is
            self.model.compile_stages(whole=device.type == "cuda")
        self.copies = keeps_copies(run, device)
        """Whether the weights carry copies in the activations' dtype."""
        spread: dict[str, Any] = {}
        if self.part is not None:
            spread = {"pieces": self.part.shards.pieces(), "mesh": self.mesh}
        self.optimizer = Optimizer(
            run.optim,
            self.parameters(),
            self.roles(),
            run.steps,
            trainable=phase.trainable,
            lr_scales=phase.lr_scales,
            seed=run.seed,
            **spread,
        )
        if self.part is not None:
            self.part.shards.follow()
        self._cost_cache: dict[tuple[int, ...], Cost] = {}
        self.spikes = SpikeWatch(run.spikes, run.log_every)
        self._measure_norms()
        self.renew_copies()

    def parameters(self) -> dict[str, Tensor]:
        """What this process updates, by name: the parameters, or its pieces of them."""
        return dict(self.model.named_parameters()) if self.part is None else self.part.shards.kept()

    def roles(self) -> dict[str, ParamRole]:
        """What each of them is to the whole model."""
        roles = self.whole.parameter_roles()
        return {name: roles[name] for name in self.parameters()}

    def renew_copies(self) -> None:
        """Bring the weights' copies up to date; due whenever weights have changed but by the optimizer's step."""
        if self.part is not None:
            self.part.shards.release()
        if self.copies:
            whole = self.model.product_weights()
            if self.part is not None:
                # of those that are divided the pieces have copies, made when they are gathered
                whole = {weight.name: weight.param for weight in self.part.shards.weights() if not weight.cut
                         and weight.name in whole}  # fmt: skip
            keep_copies(whole.values(), self.dtype)

    def _measure_norms(self) -> None:
        if self.part is None:
            self.spikes.measure(self.optimizer.params, self.model.blocks)
            return
        self.spikes.measure_pieces(
            lambda steps: MeshNorms(
                self.mesh,
                self.optimizer.params,
                self.optimizer.pieces,
                self.optimizer.counted(),
                [name for name, _ in self.whole.named_parameters()],
                self.run.model.num_layers,
                self.run.samples_per_step // self.run.samples_per_micro_batch,
                steps,
            )
        )
        self.part.shards.tell_output = lambda key, x_TD: self.spikes.activation(int(key.partition(".")[2]), x_TD)

    def train_step(self, step: int, batches: list[Batch], statistics: bool = False) -> tuple[dict[str, Any], float]:
        """Forward, backward and update over the micro-batches of one optimizer step.

        returns  event fields (device scalars), and the FLOPs that the mathematics of the step needs, backward included:
                 of all processes, as far as the others' documents are as long as those of this one
        """
        flops = sum(3.0 * self.cost_of(batch).model_flops for batch in batches) * self.mesh.data.size
        tokens = sum(batch.num_tokens for batch in batches) * self.mesh.data.size
        here = self.local(batches)
        probe: dict[str, Any] = {}
        ledger = self.gradients(step, here, probe if statistics else None)
        values: dict[str, Any] = dict(self.optimizer.step(step, self.spikes.before_update()))
        self.spikes.after_update(step + 1)
        # dropped, not zeroed: the next backward pass writes them anew without reading, and their room is free meanwhile
        self.optimizer.zero_grad()
        counts = step_counts(self.moe_layers()) if self._counts_matter(statistics) else []
        for layer, counts_E in zip(self.moe_layers(), counts, strict=False):
            if layer.gate.weight.requires_grad:
                # counts of zero leave the bias as it is: a skipped step must not move it either
                layer.update_bias(torch.where(values["skipped"] > 0, 0, counts_E))
        self.step, self.tokens = step + 1, self.tokens + tokens
        values.update(self._losses(ledger, here))
        if statistics:
            values.update(self._statistics(probe, here[-1], counts))
        return values, flops

    def local(self, batches: list[Batch]) -> list[Local]:
        """This process's tokens of micro-batches, on its device, and the processes that have the rest."""
        return [Local.of(batch, self.mesh, self.device) for batch in batches]

    def _counts_matter(self, statistics: bool) -> bool:
        return statistics or any(layer.cfg.bias_update_rate is not None for layer in self.moe_layers())

    def _losses(self, ledger: LossLedger, here: list[Local]) -> dict[str, Tensor]:
        """Event fields of the loss terms, means over the whole step."""
        batches = [local.batch for local in here]
        num_bytes: Tensor | None = None
        if "loss" in ledger.sums and all("target_bytes" in batch.columns for batch in batches):
            weighted = [(batch.columns["target_bytes"] * batch.columns["loss_weight"]).sum() for batch in batches]
            num_bytes = torch.stack(weighted).sum()
        if self.part is None:
            means, nats = ledger.means(), ledger.sums.get("loss")
            loss = means.pop("loss") if "loss" in means else sum(ledger.coefs[n] * x for n, x in means.items())
        else:
            parts: dict[str, Tensor | float] = {f"sum/{name}": value for name, value in ledger.sums.items()}
            parts |= {f"count/{name}": count for name, count in ledger.counts.items()}
            shares = [ledger.coefs[name] * value / ledger.total(name) for name, value in ledger.sums.items()]
            if shares:
                parts["all"] = torch.stack(shares).sum()
            if num_bytes is not None:
                parts["bytes"] = num_bytes
            everywhere = self.totals.add_up("losses", parts | self.spikes.shares())
            self.spikes.added_up(everywhere)
            nats, num_bytes = everywhere.get("sum/loss"), everywhere.get("bytes")
            names = [name.removeprefix("sum/") for name in everywhere if name.startswith("sum/")]
            means = {name: everywhere[f"sum/{name}"] / everywhere[f"count/{name}"] for name in names}
            loss = means.pop("loss") if "loss" in means else everywhere["all"]
        values = {"loss": loss, **{f"loss/{name}": mean for name, mean in means.items()}}
        if nats is not None and num_bytes is not None:
            values["bits_per_byte"] = nats / (math.log(2) * num_bytes)
        return values  # type: ignore[return-value]

    def _statistics(self, probe: dict[str, Any], last: Local, counts: list[Tensor]) -> dict[str, Any]:
        """Event fields of logging steps; probe: decisions of the last micro-batch; counts: of each layer's experts."""
        packing = last.batch.packing
        if last.cp is not None:
            packing = last.cp.selections(self.run.model.num_kv_heads)
        values: dict[str, Any] = dict(block_fields(probe, packing))
        loads = [load_stats(counts_E) for counts_E in counts]
        if loads:
            values["expert_load_max_over_mean"] = torch.stack([load.max_over_mean for load in loads]).mean()
            values["expert_load_entropy"] = torch.stack([load.entropy for load in loads]).mean()
        peak = peak_memory_gb(self.device)
        if self.part is None:
            return {"peak_memory_gb": peak, **values}
        # means over layers, and over the processes that have their tokens
        selecting = sum(isinstance(value, Selection) for value in probe.values())
        layers = {name: float(selecting if name.startswith("block_") else len(loads)) for name in values}
        sums: dict[str, Tensor | float] = {name: value * layers[name] for name, value in values.items()}
        everywhere = self.totals.add_up(
            "statistics", sums | {f"layers/{name}": count for name, count in layers.items()}
        )
        most = scalar(peak, self.device, torch.float32)
        self.mesh.world.all_reduce(most, "max")
        means = {name: everywhere[name] / everywhere[f"layers/{name}"] for name in everywhere if "/" not in name}
        return {"peak_memory_gb": most, **means}

    def gradients(
        self, step: int, here: list[Local], probe: dict[str, Any] | None = None, replay: Replay = None
    ) -> LossLedger:
        """Add up the gradients of one optimizer step, of all processes: those of `parameters()` are complete after it.

        here     this process's tokens of every micro-batch
        probe    where the decisions of the last micro-batch are collected
        replay   for each micro-batch the decisions to reuse
        returns  the loss terms as far as they arose in this process, with global counts
        """
        exchange = None if self.part is None else self.part.exchange
        while True:
            ledger = self._gradients_once(step, here, probe, replay)
            if exchange is None or not exchange.may_overflow:
                return ledger
            fullness = exchange.fullness.clone()
            self.mesh.world.all_reduce(fullness, "max")
            full = fullness.tolist()
            if max(full) <= 1:
                return ledger
            # some tokens did not travel: once more, with room for them
            exchange.grow(full)
            self.optimizer.zero_grad()

    def _gradients_once(self, step: int, here: list[Local], probe: dict[str, Any] | None, replay: Replay) -> LossLedger:
        self.tell_phase("forward and backward")
        objective = self.run.phase(step).objective
        tokens = float(sum(local.batch.num_tokens for local in here) * self.mesh.tokens.size)
        totals = objective.totals([local.batch for local in here])
        ledger = LossLedger({"tokens": tokens, **self._everywhere(totals)})
        for layer in self.moe_layers():
            layer.reset_step()
        if self.part is not None:
            self.part.begin_step(len(here))
        probes = [None] * (len(here) - 1) + [probe]
        replays = [None] * len(here) if replay is None else replay
        if self.pipeline is not None:
            self.pipeline.run(
                [
                    self._micro_batch(local, partial(loss_of, self.model, objective, local.batch, ledger), fields)
                    for local, fields in zip(here, context_fields(ledger, replays, probes), strict=True)
                ]
            )
        else:
            for local, fields in zip(here, context_fields(ledger, replays, probes), strict=True):
                forward_backward(self.model, objective, local.batch, dtype=self.dtype, cp=local.cp, **fields)
        if self.part is not None:
            self.tell_phase("gradients between processes")
            self.part.shards.finish_step()
        self.tell_phase("update")
        return ledger

    def _micro_batch(self, local: Local, loss: Callable[[Tensor], Any], fields: dict[str, Any]) -> MicroBatch:
        """What the stages of a pipeline take of a micro-batch; fields: of the context, besides its packing."""
        ctx = self.model.context(local.batch.packing, cp=local.cp, **fields)
        return MicroBatch(local.batch.columns["tokens"], ctx, loss)

    def _everywhere(self, totals: dict[str, Tensor | float]) -> dict[str, Tensor | float]:
        """Counts added up over all tokens of the step."""
        if self.mesh.tokens.size == 1:
            return totals
        flat = torch.stack([scalar(value, self.device, torch.float64) for value in totals.values()])
        self.mesh.tokens.all_reduce(flat)
        return dict(zip(totals, flat.float().unbind(), strict=True))

    def cost_of(self, batch: Batch) -> Cost:
        """Cost of a micro-batch, before it leaves the host."""
        key = tuple(batch.packing.cu_q.tolist())
        if key not in self._cost_cache:
            if len(self._cost_cache) > 64:
                self._cost_cache.clear()
            self._cost_cache[key] = self.whole.cost(batch.packing, element_size=self.dtype.itemsize)
        return self._cost_cache[key]

    def moe_layers(self) -> list[MoELayer]:
        return [block.mlp for block in self.model.blocks if isinstance(block.mlp, MoELayer)]

    def enter_phase(self, step: int) -> bool:
        """Switch mixers, trainable parameters and learning-rate scales if `step` lies in another phase; True if it
        does.
        """
        index = self.run.phase_index(step)
        if index == self.phase:
            return False
        self.phase = index
        self.totals.forget()
        phase = self.run.phase(step)
        if phase.attention != self.model.cfg.attention:
            new, unused = self.model.set_attention(phase.attention)
            self.parked |= {name: param.detach() for name, param in unused.items()}
            fresh = set()
            parameters = dict(self.model.named_parameters())
            for name in new:
                if name in self.parked:
                    with torch.no_grad():
                        parameters[name].copy_(self.parked.pop(name))
                else:
                    fresh.add(name)
            self.model.init_weights(self.run.seed, only=fresh)
            self._cost_cache.clear()
        self.optimizer.set_phase(
            self.parameters(),
            self.roles(),
            trainable=phase.trainable,
            lr_scales=phase.lr_scales,
        )
        if self.part is not None:
            self.part.shards.follow()
        self._measure_norms()
        self.renew_copies()
        return True

    def strictly_causal(self) -> bool:
        """Whether the loss of the present mixers is a perplexity; a leaky selection's is not, and is not validated."""
        return all(block.self_attn.causality == "strict" for block in self.model.blocks)

    def validate(self, corpus: Corpus | Mixture, max_samples: int) -> dict[str, float]:
        """Losses and bits per byte on the first validation samples (0: all) of each part, averaged weights if the run
        has any.
        """
        return losses(self.evaluate(corpus, max_samples or None))

    def evaluate(self, corpus: Corpus | Mixture, max_samples: int | None) -> dict[str, float]:
        """What `evaluate_data` says of the validation split, by all processes together, with averaged weights if the
        run has any.
        """
        with self.averaged_weights():
            if self.part is not None:
                # the pieces may be others than those that were gathered last
                self.part.shards.release()
            result = evaluate_data(
                self.model,
                corpus,
                seq_len=self.run.seq_len,
                samples_per_batch=self.run.samples_per_micro_batch // self.mesh.data.size,
                max_samples=max_samples,
                dtype=self.dtype,
                evaluate=None if self.part is None else self._evaluate_together,
            )
        if self.part is not None or self.optimizer.average is not None:
            self.renew_copies()
        return result

    def _evaluate_together(self, batches: Iterable[Batch]) -> dict[str, float]:
        """`evaluate_loss` by all processes of the mesh."""
        check_strictly_causal(self.whole)
        size = self.run.samples_per_micro_batch // self.mesh.data.size * self.run.seq_len
        self.model.eval()
        try:
            return evaluate_on_mesh(batches, self.mesh, size, self._sums_of)
        finally:
            self.model.train()

    def _sums_of(self, batch: Batch) -> Tensor | None:
        """`loss_sums` of this process's tokens of a batch, if it holds the head."""
        (local,) = self.local([batch])

        def sums(hidden_TD: Tensor) -> Tensor:
            return loss_sums(local.batch, -self.model.logprob(hidden_TD, local.batch.columns["targets"]).double())

        if self.pipeline is not None:
            found = self.pipeline.run_forward([self._micro_batch(local, sums, {})])
            return found[0] if found else None
        columns, packing = local.batch.columns, local.batch.packing
        return sums(self.model.hidden(columns["tokens"], packing, dtype=self.dtype, cp=local.cp))

    def averaged_weights(self) -> AbstractContextManager[Any]:
        """Context in which the model holds the averaged weights (its own if no average is kept)."""
        return nullcontext() if self.optimizer.average is None else self.optimizer.averaged_weights()

    def tensors(self) -> dict[str, Tensor | Held]:
        """Everything that a checkpoint must hold, by name; on a mesh what this process holds of it."""
        named = {
            **{f"model.{name}": value for name, value in self.model.state_dict().items()},
            **{f"parked.{name}": value for name, value in self.parked.items()},
            **{f"optim.{name}": value for name, value in self.optimizer.state_dict().items()},
        }
        if self.part is None:
            return dict(named)
        # buffers and counters are the same in all processes of a stage
        held = {name: Held.whole(value, writes=self.mesh.tokens.rank == 0) for name, value in named.items()
                if name.startswith("model.") and name.removeprefix("model.") not in self.optimizer.params}  # fmt: skip
        for weight in self.part.shards.weights():
            held[f"model.{weight.name}"] = Held(
                weight.kept.detach(), weight.piece, weight.writes and self.mesh.replicate.rank == 0
            )
        for key, (piece, writes) in self.optimizer.state_pieces().items():
            held[f"optim.{key}"] = Held(named[f"optim.{key}"], piece, writes)
        return dict(held)

    def checkpoint_bytes(self) -> float:
        """What this process writes of a checkpoint."""
        found = self.tensors().values()
        return float(sum(value.num_bytes if isinstance(value, Held) else value.nbytes for value in found))

    def save(self, folder: Path, *, wait: bool = True) -> Path | None:
        """Save a checkpoint; with wait=False a spread run goes on while it is written, and gets None."""
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "phase": self.phase,
            "data": {
                "corpus": self.corpus_fingerprint,
                "seed": self.run.seed,
                "samples_per_step": self.run.samples_per_step,
                "next_step": self.step,
            },
            "tokenizer": self.tokenizer_fingerprint,
            "config_hash": config_hash(self.run),
            "rng": capture_rng(),
        }
        keep = self.run.keep_checkpoints
        if self.part is None:
            return save_checkpoint(folder, self.step, self.tensors(), state, keep=keep)
        self.saving = begin_save(folder, self.step, self.tensors(), state, keep, mesh=self.mesh, after=self.saving)
        return self.saving.wait() if wait else None

    def resume(self, folder: Path, origin: Path | None) -> int:
        """Load the folder's newest checkpoint, else the one to branch from; returns the number of steps done."""
        mesh = None if self.part is None else self.mesh
        path = latest_checkpoint(folder, mesh) or origin
        if path is None:
            return 0
        # every hash was checked above, but those of a checkpoint to branch from
        state = read_state(path) | {"step": read_manifest(path, hashes=False).step}
        check_origin(self.run, path, state, branch=path == origin)
        check_same_corpus(path, state, self.corpus_fingerprint)
        # through every phase in turn, so that state of parameters that only an earlier one used has its place
        for begin in (phase.until_step for phase in self.run.phases if phase.until_step < int(state["step"])):
            self.enter_phase(begin)
        if self.part is None:
            self._load(path)
        else:
            load_checkpoint(path, self.tensors(), mesh=self.mesh, verify=path == origin)
        self.renew_copies()
        self.step, self.tokens = int(state["step"]), int(state["tokens"])
        restore_rng(state["rng"])
        return self.step

    def _load(self, path: Path) -> None:
        """A checkpoint's tensors into a model that is whole in this process."""
        tensors, _ = load_checkpoint(path, device=self.device)
        model = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
        check_fits(path, model, self.model)
        self.model.load_state_dict(model)
        self.parked = {
            name.removeprefix("parked."): value for name, value in tensors.items() if name.startswith("parked.")
        }
        self.optimizer.load_state_dict(
            {name.removeprefix("optim."): value for name, value in tensors.items() if name.startswith("optim.")}
        )

    def describe(self, folder: Path, start: int, epochs: dict[str, float]) -> list[str]:
        """What is about to run, a line each: model, data, back ends, where it starts."""
        counts, run = self.whole.num_params(), self.run
        mixers = {type(mixer).__name__.removesuffix("Config") for mixer in self.model.cfg.mixers()}
        tokens = run.steps * run.samples_per_step * run.seq_len
        return [
            f"model: {counts['total'] / 1e6:.1f}M parameters, {counts['active'] / 1e6:.1f}M active per token; "
            f"{run.steps} steps of {run.samples_per_step * run.seq_len:,} tokens, {tokens / 1e6:.2f}M in all",
            f"data: {', '.join(f'{passes:.3g} epochs of {name}' for name, passes in epochs.items())}",
            f"attention: {', '.join(sorted(mixers))}, {attention_backend(self.device)}",
            *(["blocks: stages compiled by torch"] if run.compile else []),
            f"memory: {memory_line(run, self.device, self.copies)}",
            f"device: {self.device}, {run.precision}"
            + (f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""),
            f"run folder: {folder}" + (f", resuming after step {start}" if start else ""),
        ]

    def origin_fields(self, corpus: Corpus | Mixture) -> dict[str, Any]:
        """What the log must say once about where and on what the run runs."""
        counts = self.whole.num_params()
        return {
            "recipe": self.run.name,
            "config_hash": config_hash(self.run),
            "device": torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else platform.processor() or "cpu",
            "threads": torch.get_num_threads(),
            "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
            "parameters": counts["total"],
            "active_parameters": counts["active"],
            "train_tokens": corpus.num_tokens("train"),
            "gzip_bits_per_byte": corpus.gzip_bits_per_byte,
        }


def attention_backend(device: torch.device) -> str:
    """One line on which kernels the mixers call on this device."""
    if device.type == "cpu":
        return "plain torch, linear memory"
    return "Triton kernels for blocks of 16 keys or more, cuDNN or varlen kernel for full attention"
