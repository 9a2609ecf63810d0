"""Is a model file what its Hugging Face class is? Names, counts, both ways of its key map, logits and raw gradients.

Tiny models come from the function of the file's name in `tests/models/cases.py`. transformers makes the reference from
`hf_config()` alone, and reads the weights from an export to disk, so the key map is on the way of every comparison.

Legend: T packed tokens, X vocabulary.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pithwood.check.checkout import ROOT, case_function, run_test_file
from pithwood.check.gates import Gate, GateError, require
from pithwood.check.numerics import poisoned_memory, require_close
from pithwood.checkpoint.hf import export_hf, import_hf
from pithwood.generate.cache import Cache
from pithwood.ops.packing import Packing

CASES = "tests/models/cases.py"
LENGTHS = (19, 1, 23)


def model_gates(name: str, run_tests: bool = True, root: Path = ROOT) -> list[Gate]:
    """The gates of `pithwood/models/<name>.py` in a checkout; needs transformers."""
    gates = [
        Gate("file", lambda: _file(name, root)),
        Gate("transformers", _transformers),
        Gate("weights", lambda: _each(name, root, _weights)),
        Gate("names", lambda: _each(name, root, _names)),
        Gate("parameter count", lambda: _each(name, root, _count)),
        Gate("round trip", lambda: _each(name, root, _round_trip)),
        Gate("logits", lambda: _each(name, root, _logits)),
        Gate("gradients", lambda: _each(name, root, _gradients)),
        Gate("decode", lambda: _each(name, root, _decode)),
        Gate("cost", lambda: _each(name, root, _cost)),
    ]
    test = root / "tests" / "models" / f"test_{name}.py"
    return [*gates, Gate("tests pass", lambda: run_test_file(test, root))] if run_tests else gates


def model_cases(name: str, root: Path = ROOT) -> Iterator[Any]:
    """Uninitialised models, two or more, from the cases file."""
    make = case_function(root, CASES, name)
    with poisoned_memory():
        yield from make()


def _each(name: str, root: Path, gate: Any) -> str:
    """The gate on every tiny model; the last one's finding."""
    found = [gate(model) for model in _initialised(name, root)]
    return f"{len(found)} models, {found[-1]}"


def _initialised(name: str, root: Path) -> Iterator[Any]:
    for model in model_cases(name, root):
        model.init_weights(0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                # norms and biases start at 1 and 0, where a swapped or forgotten one would not show
                if parameter.ndim == 1:
                    parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
                require(bool(torch.isfinite(parameter).all()), f"init_weights() leaves {parameter_name} uninitialised")
        yield model


def _file(name: str, root: Path) -> str:
    path = root / "pithwood" / "models" / f"{name}.py"
    # other files of the room serve the models; what can be exported is one
    have = sorted(p.stem for p in path.parent.glob("*.py") if "def hf_config(self" in p.read_text())
    require(path.is_file(), f"pithwood/models/{name}.py does not exist; models are {', '.join(have)}")
    require((root / "tests" / "models" / f"test_{name}.py").is_file(), f"tests/models/test_{name}.py does not exist")
    count = sum(1 for _ in model_cases(name, root))
    require(count >= 2, f"{name}() in {CASES} yields {count} models; give at least 2 that differ in their switches")
    return f"pithwood/models/{name}.py and its test, {count} tiny models"


def _transformers() -> str:
    if importlib.util.find_spec("transformers") is None:
        raise GateError("transformers is not installed; install it with: pip install 'pithwood[hf]'")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return f"transformers {transformers.__version__}"


def _weights(model: Any) -> str:
    return f"{len(list(model.named_parameters()))} parameters initialised"


def _reference(model: Any) -> Any:
    """The Hugging Face model of the same configuration with the same weights, read from an export."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        path = export_hf(Path(folder) / "export", dict(model.state_dict()), model.hf_config(), torch.float32)
        config = AutoConfig.from_pretrained(path)
        return AutoModelForCausalLM.from_pretrained(path, config=config, attn_implementation="eager").float()


def _names(model: Any) -> str:
    ours, theirs = _shapes(model), _shapes(_reference(model))
    missing, extra = sorted(set(theirs) - set(ours)), sorted(set(ours) - set(theirs))
    require(not missing, f"transformers has {missing[0] if missing else ''}, ours has not ({len(missing)} such)")
    require(not extra, f"ours has {extra[0] if extra else ''}, transformers has not ({len(extra)} such)")
    for name, shape in theirs.items():
        require(ours[name] == shape, f"{name} has shape {list(ours[name])}, in transformers {list(shape)}")
    return f"{len(ours)} names and shapes as in transformers"


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _count(model: Any) -> str:
    counts = model.num_params()
    total = sum(parameter.numel() for parameter in _reference(model).parameters())
    require(counts["total"] == total, f"num_params() says {counts['total']}, transformers' model has {total}")
    require(0 < counts["active"] <= total, f"num_params() says {counts['active']} of {total} are active per token")
    return f"{total:,} in all, {counts['active']:,} active per token"


def _round_trip(model: Any) -> str:
    tensors = dict(model.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        path = export_hf(Path(folder) / "export", tensors, model.hf_config(), torch.float32)
        again = import_hf(path, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
        # what transformers writes itself is another layout of the same weights
        _reference(model).save_pretrained(Path(folder) / "theirs")
        theirs = import_hf(Path(folder) / "theirs", {name: tuple(t.shape) for name, t in tensors.items()})
    for name, tensor in tensors.items():
        require(torch.equal(again[name], tensor), f"{name} comes back changed from export and import")
        require(torch.equal(theirs[name], tensor), f"{name} comes back changed by way of transformers")
    return f"{len(tensors)} tensors bit for bit, by way of transformers too"


def _tokens(model: Any) -> tuple[list[Tensor], Packing]:
    vocabulary = model.head_weight.shape[0]
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(vocabulary, (n,), generator=generator) for n in LENGTHS], Packing.from_lengths(LENGTHS)


def _logits(model: Any) -> str:
    documents, packing = _tokens(model)
    reference = _reference(model)
    with torch.no_grad():
        found_TX = model.logits(model.hidden(torch.cat(documents), packing))
        expected_TX = torch.cat([reference(tokens[None]).logits[0] for tokens in documents])
    error = require_close(found_TX, expected_TX, 1e-5, "the logits")
    return f"relative error {error:.0e} over documents of {', '.join(map(str, LENGTHS))} tokens"


def _gradients(model: Any) -> str:
    """Raw gradients of the mean cross-entropy against transformers'."""
    documents, packing = _tokens(model)
    targets_T = torch.cat(documents).roll(-1)
    loss = -model.logprob(model.hidden(torch.cat(documents), packing), targets_T).mean()
    loss.backward()
    reference = _reference(model)
    logits_TX = torch.cat([reference(tokens[None]).logits[0] for tokens in documents])
    F.cross_entropy(logits_TX, targets_T).backward()
    worst, worst_name = 0.0, ""
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            raise GateError(f"no gradient reaches {name}")
        expected = theirs[name].grad
        assert expected is not None
        error = require_close(parameter.grad, expected, 2e-5, f"the gradient of {name}")
        worst, worst_name = max((worst, worst_name), (error, name))
    return f"worst relative error {worst:.0e} of {worst_name}"


def _decode(model: Any) -> str:
    documents, packing = _tokens(model)
    cache = Cache(model.cache_fields(), len(LENGTHS), max_len=max(LENGTHS))
    with torch.no_grad():
        expected = model.logits(model.hidden(torch.cat(documents), packing)).split(LENGTHS)
        for held in range(max(LENGTHS)):
            new = [int(held < length) for length in LENGTHS]
            step = cache.begin(new)
            tokens = torch.cat([document[held : held + n] for document, n in zip(documents, new, strict=True)])
            hidden = model.forward_cached(tokens, step, cache, "decode" if held else "prefill")
            cache.advance()
            want = torch.cat([rows[held : held + n] for rows, n in zip(expected, new, strict=True)])
            require_close(model.logits(hidden), want, 1e-4, f"the logits of decode step {held}")
    return f"{max(LENGTHS)} cached steps equal one forward"


def _cost(model: Any) -> str:
    cost = model.cost(Packing.from_lengths(LENGTHS))
    matrices = model.num_params()["active"] - model.num_params()["embedding"]
    tokens = sum(LENGTHS)
    least = 2.0 * tokens * (0.9 * matrices + model.head_weight.numel())
    require(
        cost.model_flops >= least,
        f"cost() counts {cost.model_flops:.0f} FLOPs; two per active weight and token are at least {least:.0f}",
    )
    require(cost.executed_flops >= cost.model_flops, "cost() executes fewer FLOPs than the mathematics needs")
    require(cost.saved_bytes > 0, "cost().saved_bytes is 0: the memory estimate would be wrong")
    return f"{cost.model_flops:.0f} FLOPs for {tokens} tokens"
