"""One optimizer step on a mesh and in one process, side by side: what the parity tests compare."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from torch import Tensor

from pithwood.data.batches import Batch
from pithwood.ops.packing import Packing, Selection
from pithwood.parallel.context import decisions_in_context, decisions_of_rows
from pithwood.parallel.mesh import Mesh
from pithwood.passes import Local
from pithwood.recipes import load_recipe
from pithwood.run import Run
from pithwood.trainer import Trainer
from tests.numerics import rel_error

SEQ_LEN = 48


def tiny_run(model: dict[str, Any] | None = None, moe: dict[str, Any] | None = None, **changes: Any) -> Run:
    """A run of four small layers, of which the second is dense, with two samples in each of two micro-batches."""
    run = load_recipe("debug")
    cfg = run.model
    cfg = dataclasses.replace(
        cfg, vocab_size=run.data.vocab_size, model_dim=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8,
        dense_layers=(1,), dense_dim=40, tie_embeddings=False, init_std=0.1,
        moe=dataclasses.replace(cfg.moe, **{"num_experts": 8, "top_k": 2, "expert_dim": 16, **(moe or {})}),
        **(model or {}),
    )  # fmt: skip
    sizes = {"seq_len": SEQ_LEN, "samples_per_step": 8, "samples_per_micro_batch": 4, "steps": 100, "threads": 0}
    # Adam divides by what it knows of a gradient's size: of the smallest ones that would be rounding. And Newton-Schulz
    # takes bf16 by itself on CPUs that multiply it fast, whose rounding hides what is compared.
    optim = dataclasses.replace(run.optim, eps=1e-5, ns_dtype="fp32")
    return dataclasses.replace(run, model=cfg, device="cpu", **{**sizes, "optim": optim, **changes})


class Documents:
    """Batches of random tokens in documents of uneven lengths, with uneven loss weights, by (step, micro-batch)."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def step(self, step: int, share: tuple[int, int] = (0, 1)) -> list[Batch]:
        micro_batches = self.run.samples_per_step // self.run.samples_per_micro_batch
        return [self.batch(step, micro, share) for micro in range(micro_batches)]

    def batch(self, step: int, micro: int, share: tuple[int, int]) -> Batch:
        number = self.run.samples_per_micro_batch
        samples = [self._sample(step, micro * number + index) for index in range(number)]
        samples = samples[share[0] * number // share[1] : (share[0] + 1) * number // share[1]]
        lengths = [length for sample in samples for length in sample[0]]
        lengths += [0] * (6 * len(samples) - len(lengths))
        tokens, targets, weight = (torch.cat([sample[part] for sample in samples]) for part in (1, 2, 3))
        columns = {"tokens": tokens, "targets": targets, "loss_weight": weight, "target_bytes": torch.ones_like(tokens)}
        size = self.run.seq_len
        return Batch(columns, Packing.from_lengths(lengths, max_q=size, max_k=size))

    def _sample(self, step: int, number: int) -> tuple[list[int], Tensor, Tensor, Tensor]:
        size, vocab = self.run.seq_len, self.run.model.vocab_size
        choose = random.Random(1000 * step + number)
        cuts = sorted(choose.sample(range(1, size), number % 5))
        lengths = [b - a for a, b in zip([0, *cuts], [*cuts, size], strict=True)]
        draw = torch.Generator().manual_seed(1000 * step + number)
        ids = torch.randint(vocab, (size + 1,), generator=draw)
        # the later a sample, the more of it is masked: processes have uneven counts
        weight = (torch.rand(size, generator=draw) > 0.12 * number).float()
        return lengths, ids[:-1], ids[1:], weight


Pieces = dict[str, tuple[int, Tensor]]
"""By name: the number of the first element, and the elements, of a tensor that is whole in one process."""


Decisions = list[dict[str, Any]]
"""Of each micro-batch: the ids of blocks and experts, by layer."""


def steps_on(mesh: Mesh, run: Run, steps: int, update: str | None, replay: Decisions | None = None) -> dict[str, Any]:
    """Pieces of initial weights, first raw gradients and last weights, what each step's log says, the first step's
    decisions (of one process), and which of them this process would make in another way (in a mesh).

    update  "run": by the run's optimizer. "sgd": by plain gradient descent. None: no update, one step's gradients
    replay  one process's decisions, which the first raw gradients are those of
    """
    torch.manual_seed(0)
    trainer = Trainer(run, mesh.device, None, None if mesh.world.size == 1 else mesh)
    source = Documents(run)
    found: dict[str, Any] = {"initial": _pieces(trainer), "logs": []}
    here = trainer.local(source.step(0, trainer.share))
    own = None
    if replay is not None:
        own = [_own(decisions, local, mesh, run) for decisions, local in zip(replay, here, strict=True)]
        probe: dict[str, Any] = {}
        trainer.gradients(0, here, probe)
        trainer.optimizer.zero_grad()
        found["unlike"] = _unlike(_ids(probe), _moved(own[-1], "cpu"))
    elif mesh.world.size == 1:
        found["decisions"] = [_decisions(trainer, local) for local in here]
    ledger = trainer.gradients(0, here, replay=own)
    found["gradients"] = _pieces(trainer, gradients=True)
    found["losses"] = {k: float(v) for k, v in trainer._losses(ledger, here).items()}
    trainer.optimizer.zero_grad()
    for step in range(steps if update is not None else 0):
        batches = source.step(step, trainer.share)
        if update == "run":
            values, _ = trainer.train_step(step, batches, statistics=step == 1)
            found["logs"].append({k: float(v) for k, v in values.items() if "memory" not in k})
        else:
            trainer.gradients(step, trainer.local(batches))
            with torch.no_grad():
                for param in trainer.parameters().values():
                    if param.grad is not None:
                        param -= 0.5 * param.grad
            trainer.optimizer.zero_grad()
            trainer.renew_copies()
    found["last"] = _pieces(trainer)
    return found


@torch.no_grad()
def _decisions(trainer: Trainer, local: Local) -> dict[str, Any]:
    """What one process decides about a micro-batch."""
    probe: dict[str, Any] = {}
    trainer.model.hidden(local.batch.columns["tokens"], local.batch.packing, dtype=trainer.dtype, probe=probe)
    return _ids(probe)


def _ids(probe: dict[str, Any]) -> dict[str, Any]:
    """The ids among what a probe collected, on the host; counts follow from them."""
    return _moved({name: value for name, value in probe.items() if name.endswith((".experts", ".blocks"))}, "cpu")


def _moved(decisions: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    def moved(value: Any) -> Any:
        if isinstance(value, Selection):
            return dataclasses.replace(value, ids=value.ids.to(device), count=value.count.to(device))
        return value.to(device) if isinstance(value, Tensor) else value

    return {name: moved(value) for name, value in decisions.items()}


def _own(decisions: dict[str, Any], local: Local, mesh: Mesh, run: Run) -> dict[str, Any]:
    """One process's decisions about a micro-batch, as a process of the mesh replays them."""
    total = run.samples_per_micro_batch * run.seq_len
    count = total // mesh.data.size
    mine = decisions_of_rows(_moved(decisions, mesh.device), mesh.data.rank * count, count, total)
    return mine if local.cp is None else decisions_in_context(mine, local.cp, run.model.num_kv_heads)


def _unlike(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Names of the decisions found that are not those wanted."""

    def plain(value: Any) -> Tensor:
        return value.ids if isinstance(value, Selection) else value

    return [name for name, value in found.items() if not torch.equal(plain(value), plain(wanted[name]))]


def _pieces(trainer: Trainer, gradients: bool = False) -> Pieces:
    found = {}
    for name, param in trainer.parameters().items():
        start = 0 if trainer.part is None else trainer.part.shards.pieces()[name].start
        value = param.grad if gradients else param
        value = torch.zeros_like(param) if value is None else value
        found[name] = start, value.detach().reshape(-1).cpu().clone()
    return found


def assert_same(spread: list[dict[str, Any]], alone: dict[str, Any], kind: str, bound: float = 1e-5) -> None:
    """Every piece of every process is that of the one process, and together they are everything."""
    seen: dict[str, Tensor] = {}
    for result in spread:
        for name, (start, values) in result[kind].items():
            _, whole = alone[kind][name]
            seen.setdefault(name, torch.zeros_like(whole, dtype=torch.bool))[start : start + len(values)] = True
            wanted = whole[start : start + len(values)]
            error = rel_error(values, wanted) if wanted.norm() > 0 else float(values.norm())
            assert error < bound, f"{kind} of {name} from {start}: relative error {error:.2e}"
    assert set(seen) == set(alone[kind])
    assert all(bool(held.all()) for held in seen.values())
