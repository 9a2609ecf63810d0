"""Hugging Face folders are read in both layouts, written in the Hub's, and agree with transformers to the last bit."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pithwood.checkpoint.hf import export_hf, import_hf

NUM_EXPERTS, WIDTH, DIM = 3, 8, 16
TOKENS = torch.arange(24).reshape(1, 24) % 11


def tiny_model(seed: int = 0, **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.Qwen3MoeConfig(
        vocab_size=11,
        hidden_size=DIM,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        moe_intermediate_size=WIDTH,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=2,
        mlp_only_layers=[0],
        **changes,
    )
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Zero biases and unit norms would hide a mix-up.
            parameter.normal_()
    return model


def canonical(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].equal(tensor), name


def plain(seed: int = 0) -> dict[str, Tensor]:
    """Canonical tensors of one layer with experts, no transformers needed."""
    torch.manual_seed(seed)
    return {
        "model.embed_tokens.weight": torch.randn(11, DIM),
        "model.layers.0.mlp.experts.gate_up_proj": torch.randn(NUM_EXPERTS, 2 * WIDTH, DIM),
        "model.layers.0.mlp.experts.down_proj": torch.randn(NUM_EXPERTS, DIM, WIDTH),
        "model.layers.0.mlp.gate.weight": torch.randn(NUM_EXPERTS, DIM),
        "lm_head.weight": torch.randn(11, DIM),
    }


@pytest.mark.parametrize("shard_size", ["5GB", "8KB"])
def test_what_transformers_saves_is_read(tmp_path, shard_size):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "8KB")
    expected = canonical(model)
    assert_same(import_hf(tmp_path, shapes(expected)), expected)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 8000, 1])
def test_transformers_reads_what_is_exported(tmp_path, max_shard_bytes):
    model = tiny_model()
    out = tmp_path / "deep" / "model"
    export_hf(out, canonical(model), model.config.to_dict(), torch.float32, max_shard_bytes=max_shard_bytes)
    again, report = type(model).from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    assert again.dtype == torch.float32
    assert logits(again.eval()).equal(logits(model))
    files = sorted(out.glob("*.safetensors"))
    assert len(files) == 1 or (out / "model.safetensors.index.json").exists()
    assert (len(files) > 1) == (max_shard_bytes < 10**9)
    if max_shard_bytes == 8000:
        assert all(file.stat().st_size < 8000 + 4000 for file in files)
    assert [p.name for p in out.parent.iterdir()] == ["model"]


def test_export_and_import_agree_in_bf16(tmp_path):
    tensors = plain()
    export_hf(tmp_path / "m", tensors, {"tie_word_embeddings": False}, torch.bfloat16)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = import_hf(tmp_path / "m", shapes(tensors))
    assert_same(loaded, {name: tensor.bfloat16() for name, tensor in tensors.items()})
    loaded = import_hf(tmp_path / "m", shapes(tensors), dtype=torch.float32)
    assert_same(loaded, {name: tensor.bfloat16().float() for name, tensor in tensors.items()})


def test_experts_lie_apart_on_disk_gate_before_up(tmp_path):
    tensors = plain()
    export_hf(tmp_path / "m", tensors, {}, torch.float32)
    on_disk = load_file(tmp_path / "m" / "model.safetensors")
    stem, gate_up = "model.layers.0.mlp.experts", tensors["model.layers.0.mlp.experts.gate_up_proj"]
    assert on_disk[f"{stem}.1.gate_proj.weight"].equal(gate_up[1, :WIDTH])
    assert on_disk[f"{stem}.1.up_proj.weight"].equal(gate_up[1, WIDTH:])
    assert on_disk[f"{stem}.2.down_proj.weight"].equal(tensors[f"{stem}.down_proj"][2])
    assert len(on_disk) == 3 + 3 * NUM_EXPERTS


def test_the_stacked_layout_is_read_too(tmp_path):
    tensors = plain()
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(import_hf(tmp_path, shapes(tensors)), tensors)


def test_tied_embeddings(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    tensors = canonical(model)
    assert tensors["lm_head.weight"].equal(tensors["model.embed_tokens.weight"])
    model.save_pretrained(tmp_path / "theirs")
    export_hf(tmp_path / "ours", tensors, model.config.to_dict(), torch.float32)
    assert "lm_head.weight" not in load_file(tmp_path / "ours" / "model.safetensors")
    assert logits(type(model).from_pretrained(tmp_path / "ours").eval()).equal(logits(model))
    without = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    for folder in ("theirs", "ours"):
        assert_same(import_hf(tmp_path / folder, shapes(tensors)), tensors)
        assert_same(import_hf(tmp_path / folder, shapes(without)), without)


def test_a_head_that_cannot_be_tied_is_refused(tmp_path):
    tensors = plain()
    without = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight that differs from the embedding"):
        import_hf(tmp_path, shapes(without))
    save_file(without, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": false}')
    with pytest.raises(ValueError, match=r"1 missing: lm_head\.weight"):
        import_hf(tmp_path, shapes(tensors))
    with pytest.raises(ValueError, match=r"set tie_word_embeddings to false"):
        export_hf(tmp_path / "out", tensors, {"tie_word_embeddings": True}, torch.float32)
    with pytest.raises(ValueError, match=r"no lm_head\.weight to export"):
        export_hf(tmp_path / "out", without, {}, torch.float32)
    assert not (tmp_path / "out").exists()


def test_every_mismatch_is_listed(tmp_path):
    tensors = plain()
    export_hf(tmp_path / "m", tensors, {}, torch.float32)
    need = shapes(tensors)
    need["model.norm.weight"] = (DIM,)
    del need["model.layers.0.mlp.gate.weight"]
    need["lm_head.weight"] = (12, DIM)
    with pytest.raises(ValueError, match="does not fit the model") as caught:
        import_hf(tmp_path / "m", need)
    assert "missing: " in str(caught.value)
    assert "model.norm.weight" in str(caught.value)
    assert "1 unexpected: model.layers.0.mlp.gate.weight" in str(caught.value)
    assert f"lm_head.weight [11, {DIM}] instead of [12, {DIM}]" in str(caught.value)


@pytest.mark.parametrize("num_experts", [NUM_EXPERTS - 1, NUM_EXPERTS + 1])
def test_another_number_of_experts_is_refused(tmp_path, num_experts):
    tensors = plain()
    export_hf(tmp_path / "m", tensors, {}, torch.float32)
    need = shapes(tensors)
    for kind in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{kind}"
        need[name] = (num_experts, *need[name][1:])
    what = "3 unexpected: " if num_experts < NUM_EXPERTS else "2 missing: "
    with pytest.raises(ValueError, match=rf"{what}model\.layers\.0\.mlp\.experts\."):
        import_hf(tmp_path / "m", need)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_refused_unread(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04never read")
    with pytest.raises(ValueError, match=rf"pickled weights only \({name}\).*save_pretrained"):
        import_hf(tmp_path, {})


def test_damaged_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        import_hf(tmp_path / "absent", {})
    with pytest.raises(ValueError, match="has neither"):
        import_hf(tmp_path, {})
    tensors = plain()
    out = export_hf(tmp_path / "m", tensors, {}, torch.float32, max_shard_bytes=2000)
    with pytest.raises(ValueError, match="exists already"):
        export_hf(out, tensors, {}, torch.float32)
    shard = sorted(out.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=rf"{shard.name} is not a complete safetensors file"):
        import_hf(out, shapes(tensors))
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{shard.name} is missing"):
        import_hf(out, shapes(tensors))
    shard.write_bytes(content)
    index = out / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text(text.replace(shard.name, f"../{shard.name}"))
    with pytest.raises(ValueError, match="only safetensors files in the same folder"):
        import_hf(out, shapes(tensors))
    index.write_text("{}")
    with pytest.raises(ValueError, match="not an index of shards"):
        import_hf(out, shapes(tensors))
    index.write_text(text)
    assert_same(import_hf(out, shapes(tensors)), tensors)
