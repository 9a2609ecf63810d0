"""A mixer from outside the package is used by passing its configuration: it trains, decodes, resumes and is counted in
MFU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from pithwood.attention.base import Mixer, MixerShape
from pithwood.attention.moba import MoBAConfig
from pithwood.generate.sample import generate
from pithwood.models.qwen3_moe import Qwen3MoE
from pithwood.observe.events import read_events
from pithwood.ops.packing import Packing
from pithwood.parallel.config import MeshConfig
from pithwood.plan import check_phases
from pithwood.recipes.demo import debug
from pithwood.run import Phase, Run
from pithwood.train import train
from pithwood.trainer import Trainer
from tests.command_lines import Server
from tests.test_train import small_corpus
from tests.toy_mixer import ToyRecurrence, ToyRecurrenceConfig


def toy_run(corpus: Path, steps: int = 6) -> Run:
    run = debug()
    layers = (ToyRecurrenceConfig(), MoBAConfig(block_size=16, top_k=2), ToyRecurrenceConfig(gate_coef=0.02))
    return dataclasses.replace(
        run,
        name="toy",
        model=dataclasses.replace(run.model, num_layers=3, model_dim=32, attention=layers),
        data=dataclasses.replace(run.data, source=small_corpus(corpus), vocab_size=300, max_bytes=None),
        steps=steps, seq_len=32, samples_per_step=4, samples_per_micro_batch=2, checkpoint_every=3, log_every=1,
        validate_every=3, sample_tokens=8, sample_prompts=("ab",), threads=1,
    )  # fmt: skip


def test_toy_mixer_trains_decodes_resumes_and_is_counted(tmp_path, monkeypatch):
    run = toy_run(tmp_path / "text")
    summary = train(run, runs_dir=tmp_path / "a", console=False)
    events = [e for e in read_events(Path(summary["run_dir"]) / "events.jsonl") if e["kind"] == "train"]
    losses = [e["loss"] for e in events]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.1
    assert all(e["loss/toy_gate"] > 0 for e in events)

    # resumes: cut off in its fifth step, after a save at the third, and the same digits to the end
    step = Trainer.train_step

    def cut_off(self, number, *args, **kwargs):
        if number == 4:
            raise RuntimeError("power cut")
        return step(self, number, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train_step", cut_off)
    with pytest.raises(RuntimeError, match="power cut"):
        train(run, runs_dir=tmp_path / "b", console=False)
    monkeypatch.setattr(Trainer, "train_step", step)
    resumed = train(run, runs_dir=tmp_path / "b", console=False)
    kinds = [event["kind"] for event in read_events(resumed["run_dir"])]
    assert kinds.count("resume") == 1
    assert [e["loss"] for e in read_events(resumed["run_dir"]) if e["kind"] == "train"] == losses

    # counted: the cost of the step holds this mixer's own floating-point operations
    model = Qwen3MoE(run.model)
    model.init_weights(0)
    packing = Packing.from_lengths([32, 32])
    without = Qwen3MoE(dataclasses.replace(run.model, attention=(run.model.mixers()[1],) * 3)).cost(packing).model_flops
    moba = model.blocks[1].self_attn.cost(packing).model_flops
    toy = model.blocks[0].self_attn.cost(packing).model_flops
    assert model.cost(packing).model_flops == pytest.approx(without - 2 * moba + 2 * toy)
    assert events[0]["training_flops"] == pytest.approx(3 * 2 * model.cost(packing).model_flops, rel=0.1)
    assert events[0]["mfu"] > 0

    # decodes: greedy continuation from a cache equals the argmax of full forwards
    prompt = [5, 9, 200, 17, 3]
    continued = generate(model, [prompt], max_new_tokens=20, temperature=0.0, seed=0, eos_id=None)[0]
    tokens = list(prompt)
    for token in continued:
        hidden = model.hidden(torch.tensor(tokens), Packing.from_lengths([len(tokens)]))
        assert int(model.logits(hidden[-1:]).argmax()) == token
        tokens.append(token)


def test_its_configuration_is_written_with_the_run_and_read_back(tmp_path):
    from pithwood.config import from_dict, to_dict

    run = toy_run(tmp_path / "text")
    text = json.dumps(to_dict(run))
    assert "tests.toy_mixer.ToyRecurrenceConfig" in text
    assert from_dict(Run, json.loads(text)) == run


OWN_FILE = """
import dataclasses
from pathlib import Path
from pithwood.run import Run
from tests.test_train import small_run
from tests.toy_mixer import ToyRecurrence, ToyRecurrenceConfig

@dataclasses.dataclass(frozen=True)
class OwnMixerConfig(ToyRecurrenceConfig):
    pass

def own_small() -> Run:
    run = small_run(Path("text"))
    model = dataclasses.replace(run.model, attention=OwnMixerConfig())
    return dataclasses.replace(run, name="own", steps=2, seq_len=16, validation_samples=1, model=model)
"""


def test_the_command_line_trains_and_samples_a_mixer_from_a_file(server: Server, tmp_path):
    (tmp_path / "own_mixer_file.py").write_text(OWN_FILE)
    trained = server.call(["train", "own_mixer_file.py:own_small", "--json"], tmp_path)
    assert trained.code == 0, trained.err
    words = ["generate", "own", "--max-tokens", "3"]
    refused = server.call(words, tmp_path)
    assert refused.code == 2
    assert "--import FILE" in refused.err
    sampled = server.call([*words, "--import", "own_mixer_file.py", "--json"], tmp_path)
    assert sampled.code == 0, sampled.err
    assert json.loads(sampled.out)["tokens"] >= 1


class Blind(ToyRecurrence):
    """Sees its own process's tokens only."""

    context_parallel = False


@dataclasses.dataclass(frozen=True)
class BlindConfig(ToyRecurrenceConfig):
    def build(self, shape: MixerShape) -> Mixer:
        return Blind(self, shape)


@pytest.mark.quick
def test_a_mixer_that_does_not_see_other_processes_is_refused_before_a_run_on_them(tmp_path):
    run = dataclasses.replace(toy_run(tmp_path / "text"), mesh=MeshConfig(cp=2))
    check_phases(run)
    later = (Phase(until_step=2), Phase(until_step=run.steps, attention=(BlindConfig(),) * 3))
    blind = dataclasses.replace(run, phases=later)
    with pytest.raises(ValueError, match=r"Blind cannot run with mesh\.cp=2"):
        check_phases(blind)
    check_phases(dataclasses.replace(blind, mesh=MeshConfig()))
