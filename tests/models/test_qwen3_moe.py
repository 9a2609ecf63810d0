"""The model against transformers' Qwen3-MoE, its stages, its names and its accounting."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pithwood.attention.base import MixerConfig
from pithwood.attention.full import FullAttentionConfig
from pithwood.attention.moba import MoBAConfig
from pithwood.attention.window import SlidingWindowConfig
from pithwood.losses import LossLedger
from pithwood.models.qwen3_moe import Qwen3MoE, Qwen3MoEConfig
from pithwood.moe.config import MoEConfig
from pithwood.ops.packing import Packing
from tests.numerics import assert_close, rel_error
from tests.toy_mixer import ToyRecurrenceConfig

TINY = Qwen3MoEConfig(
    vocab_size=97,
    model_dim=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    moe=MoEConfig(num_experts=8, top_k=2, expert_dim=24),
    dense_layers=(1,),
    dense_dim=40,
    rope_theta=10_000.0,
    init_std=0.08,
)


def build(cfg: Qwen3MoEConfig = TINY, seed: int = 0, dtype: torch.dtype = torch.float32) -> Qwen3MoE:
    model = Qwen3MoE(cfg)
    model.init_weights(seed)
    return model.to(dtype)


def nll(model: Qwen3MoE, tokens_T: torch.Tensor, targets_T: torch.Tensor, packing: Packing, **kwargs) -> torch.Tensor:
    return -model.logprob(model.hidden(tokens_T, packing, dtype=model.head_weight.dtype, **kwargs), targets_T).mean()


@pytest.mark.quick
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("renormalize", [True, False])
def test_loss_logits_and_raw_gradients_agree_with_transformers(tied, renormalize):
    transformers = pytest.importorskip("transformers")
    moe = dataclasses.replace(TINY.moe, renormalize=renormalize)
    model = build(dataclasses.replace(TINY, tie_embeddings=tied, moe=moe))
    reference = transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**model.hf_config(), attn_implementation="eager")
    )
    names = dict(reference.named_parameters())
    ours = dict(model.named_parameters())
    assert set(names) == set(ours)
    with torch.no_grad():
        for name, param in names.items():
            param.copy_(ours[name])
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 97, (3, 33), generator=generator)
    targets = torch.randint(0, 97, (3, 33), generator=generator)
    logits = reference(tokens).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    expected.backward()

    packing = Packing.from_lengths([33, 33, 33])
    hidden = model.hidden(tokens.flatten(), packing)
    assert_close(model.logits(hidden), logits.flatten(0, 1), 1e-5, "logits")
    loss = -model.logprob(hidden, targets.flatten()).mean()
    loss.backward()
    assert_close(loss, expected, 1e-6, "loss")
    for name, param in names.items():
        assert_close(ours[name].grad, param.grad, 1e-5, name)


def test_hf_config_refuses_what_the_family_cannot_express():
    model = build(dataclasses.replace(TINY, moe=dataclasses.replace(TINY.moe, num_shared_experts=1)))
    with pytest.raises(ValueError, match="num_shared_experts=1"):
        model.hf_config()


@dataclasses.dataclass(frozen=True)
class OwnAttentionConfig(FullAttentionConfig):
    """A mixer from outside the package with the parameters of full attention."""


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        (FullAttentionConfig(rope=False), r"attention\.rope=False"),
        (MoBAConfig(softmax_scale=0.2), r"attention\.softmax_scale=0\.2"),
        (SlidingWindowConfig(window=8), "attention=SlidingWindowConfig"),
        (FullAttentionConfig(key_conv=3), r"attention\.key_conv=3"),
        (MoBAConfig(rope=False, key_conv=5), r"attention\.rope=False, attention\.key_conv=5"),
        (ToyRecurrenceConfig(), "attention=ToyRecurrenceConfig"),
        (OwnAttentionConfig(), "attention=OwnAttentionConfig"),
    ],
)
def test_hf_config_refuses_attention_that_the_family_does_not_have(mixer, message):
    model = Qwen3MoE(dataclasses.replace(TINY, attention=(FullAttentionConfig(), mixer, mixer)))
    with pytest.raises(ValueError, match=f"no place for {message}; export"):
        model.hf_config()


def test_hf_config_of_moba_is_that_of_full_attention():
    moba = Qwen3MoE(dataclasses.replace(TINY, attention=MoBAConfig(block_size=8, top_k=2)))
    assert moba.hf_config() == Qwen3MoE(TINY).hf_config()


@pytest.mark.quick
def test_initial_weights_are_a_function_of_seed_name_and_index():
    from pithwood.models.init import fill_normal, normal_values

    a, b, c = build(seed=3), build(seed=3), build(seed=4)
    for (name, x), y, z in zip(a.named_parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(x, y), name
        if x.ndim > 1:
            assert not torch.equal(x, z), name
    whole = torch.empty(64, 33)
    fill_normal(whole, 5, "some.name", 0.02)
    part = normal_values(5, "some.name", torch.arange(17 * 33, 40 * 33), 0.02).view(23, 33)
    assert torch.equal(whole[17:40], part)
    many = torch.empty(1_000_000)
    fill_normal(many, 0, "moments", 1.0)
    assert abs(many.mean()) < 4e-3
    assert abs(many.std() - 1) < 3e-3
    assert abs((many**4).mean() - 3) < 0.05
    assert torch.corrcoef(torch.stack([many[:-1], many[1:]]))[0, 1].abs() < 4e-3


def test_one_document_does_not_move_another():
    cfg = dataclasses.replace(TINY, attention=MoBAConfig(block_size=8, top_k=2))
    model = build(cfg)
    packing = Packing.from_lengths([20, 1, 43])
    tokens = torch.randint(0, 97, (64,), generator=torch.Generator().manual_seed(0))
    probe: dict = {}
    first = model.hidden(tokens, packing, probe=probe)
    changed = tokens.clone()
    changed[:20] = (changed[:20] + 1) % 97
    # expert ids of the changed document are replayed too: only the attention could carry anything across
    second = model.hidden(changed, packing, replay=probe)
    assert rel_error(second[20:], first[20:]) < 1e-6
    assert rel_error(second[:20], first[:20]) > 1e-2


def test_mixers_can_differ_by_layer_and_switch_without_losing_weights():
    mixed = (
        MoBAConfig(block_size=8, top_k=2, key_conv=3),
        SlidingWindowConfig(window=8),
        FullAttentionConfig(rope=False),
    )
    model = build(dataclasses.replace(TINY, attention=mixed))
    before = dict(model.named_parameters())
    new, unused = model.set_attention(FullAttentionConfig())
    assert new == set()
    assert set(unused) == {"model.layers.0.self_attn.key_conv.weight"}
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] for name in after)
    plain = build()
    tokens, packing = torch.arange(50) % 97, Packing.from_lengths([50])
    assert torch.equal(model.hidden(tokens, packing), plain.hidden(tokens, packing))
    new, _ = model.set_attention(mixed)
    assert new == {"model.layers.0.self_attn.key_conv.weight"}


def test_sparse_and_full_attention_exchange_without_a_change_of_any_weight():
    sparse, full = MoBAConfig(block_size=8, top_k=5, key_conv=3), FullAttentionConfig(key_conv=3)
    model = build(dataclasses.replace(TINY, attention=sparse))
    with torch.no_grad():
        for block in model.blocks:
            block.self_attn.get_parameter("key_conv.weight").normal_(generator=torch.Generator().manual_seed(0))
    before = dict(model.named_parameters())
    tokens, packing = torch.arange(40) % 97, Packing.from_lengths([40])
    hidden = model.hidden(tokens, packing)
    for attention in (full, SlidingWindowConfig(window=40, key_conv=3), sparse):
        assert model.set_attention(attention) == (set(), {})
        after = dict(model.named_parameters())
        assert after.keys() == before.keys()
        assert all(after[name] is before[name] for name in after)
        assert_close(model.hidden(tokens, packing), hidden, 1e-5)


def test_moba_that_covers_everything_has_the_gradients_of_full_attention():
    tokens = torch.randint(0, 97, (60,), generator=torch.Generator().manual_seed(0))
    targets, packing = tokens.roll(-1), Packing.from_lengths([37, 23])
    grads = []
    for attention in (FullAttentionConfig(), MoBAConfig(block_size=8, top_k=5)):
        model = build(dataclasses.replace(TINY, attention=attention))
        nll(model, tokens, targets, packing).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert_close(grads[1][name], grad, 1e-5, name)


def test_the_chunked_head_equals_cross_entropy_and_its_gradients(monkeypatch):
    from pithwood.ops import linear_logprob as module

    x = torch.randn(37, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(29, 16, dtype=torch.float64, requires_grad=True)
    target, g = torch.randint(0, 29, (37,)), torch.randn(37, dtype=torch.float64)
    expected = torch.log_softmax(x @ weight.t(), -1).gather(1, target[:, None])[:, 0]
    expected_grads = torch.autograd.grad(expected, (x, weight), g)
    for keep in (0, 1 << 30):
        monkeypatch.setattr(module, "KEEP_BYTES", keep)
        monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 29 * 10)
        actual = module.linear_logprob(x, weight, target)
        assert_close(actual, expected)
        for a, e in zip(torch.autograd.grad(actual, (x, weight), g), expected_grads, strict=True):
            assert_close(a, e)


def test_attached_losses_give_the_gradient_of_the_explicit_sum():
    from pithwood.losses import LossTerm, attach_loss

    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)
    ledger = LossLedger({"tokens": 20.0})
    y = attach_loss(x * 2, LossTerm("aux", ((x @ w) ** 2).sum(), 5.0, 0.3), ledger)
    y.sin().sum().backward()
    explicit = (x * 2).sin().sum() + 0.3 * ((x @ w) ** 2).sum() / 20.0
    for actual, expected in zip((x.grad, w.grad), torch.autograd.grad(explicit, (x, w)), strict=True):
        assert_close(actual, expected)
    assert_close(ledger.means()["aux"], (((x @ w) ** 2).sum() / 5.0).float(), 1e-6)


def test_cost_counts_active_experts_selected_blocks_and_the_causal_half():
    cfg = dataclasses.replace(TINY, num_layers=1, dense_layers=(), attention=MoBAConfig(block_size=8, top_k=2))
    packing = Packing.from_lengths([32])
    flops = build(cfg).cost(packing).model_flops
    projections = 2 * 32 * 48 * 16 * (4 + 2 + 2 + 4)
    own, past = 4 * 8 * 9 / 2, 3 * 8 * 8
    attention = 4 * 16 * 4 * (own + past)
    experts = 32 * (6 * 48 * 24 * 2 + 2 * 48 * 8)
    head = 2 * 32 * 48 * 97
    assert flops == projections + attention + experts + head


def kept_bytes(model: Qwen3MoE, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of distinct storages that autograd keeps for the backward pass, weights and casts of them left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        per_token = tokens in tensor.shape or 2 * tokens in tensor.shape or tokens // 2 in tensor.shape
        # the head's own gradient is made with the loss
        if per_token or (tensor.shape == model.head_weight.shape and not tensor.requires_grad):
            held[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(0, model.cfg.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.hidden(ids, Packing.from_lengths([tokens // 2] * 2), dtype=dtype)
    held[hidden.untyped_storage().data_ptr()] = hidden.untyped_storage()
    return sum(storage.nbytes() for pointer, storage in held.items() if pointer not in weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", [FullAttentionConfig(key_conv=3), MoBAConfig(block_size=64, top_k=2)])
def test_saved_bytes_are_what_autograd_keeps(attention, dtype):
    moe = dataclasses.replace(TINY.moe, num_shared_experts=1)
    model = build(dataclasses.replace(TINY, attention=attention, moe=moe))
    cost = model.cost(Packing.from_lengths([256, 256]), element_size=dtype.itemsize)
    assert cost.saved_bytes == pytest.approx(kept_bytes(model, 512, dtype), rel=0.15)


def test_cost_counts_the_heads_gradients_and_leaves_the_mixers_as_they_are():
    packing = Packing.from_lengths([32])
    small, large = (build(dataclasses.replace(TINY, vocab_size=size)).cost(packing) for size in (50_000, 100_000))
    assert large.saved_bytes == small.saved_bytes
    # an fp32 gradient of the head's weight, and a chunk of logits for 32 tokens
    assert large.workspace_bytes - small.workspace_bytes == 50_000 * 4 * (48 + 32)
    model = build()
    mixer = model.blocks[0].self_attn.cost(packing)
    assert model.cost(packing, element_size=2).saved_bytes < 0.7 * model.cost(packing).saved_bytes
    assert model.blocks[0].self_attn.cost(packing) == mixer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=4"),
        ({"head_dim": 15}, "head_dim=15 must be even"),
        ({"attention": (FullAttentionConfig(),)}, "attention has 1 entries but num_layers=3"),
        ({"dense_layers": (7,)}, "outside 0..2"),
        ({"attention": MixerConfig()}, "attention=MixerConfig is only a base of mixers"),
    ],
)
def test_impossible_sizes_are_refused_in_the_words_of_the_config(change, message):
    with pytest.raises(ValueError, match=message):
        Qwen3MoE(dataclasses.replace(TINY, **change))
