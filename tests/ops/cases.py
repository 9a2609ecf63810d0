"""Inputs on which every implementation of an op must agree with its reference: a generator of keyword arguments each,
named as the op's public function. `pithwood check op NAME` and tests/check/test_op.py run them.

Legend: T packed tokens, H query heads, G KV heads, K query/key head dim, V value head dim, k selected per row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pithwood.ops import dense_attention as ops_dense_attention
from pithwood.ops import permute
from pithwood.ops.packing import Packing, Selection
from pithwood.ops.rope import Rope
from pithwood.ops.route import RoutingRule

PACKED: tuple[tuple[Sequence[int], Sequence[int] | None], ...] = (
    ([0, 5, 16, 0, 1, 47, 0], None),
    ([33], None),
    ([3, 1, 9], [20, 40, 9]),
)
"""Query and key lengths: empty documents and single tokens, one document, queries at the end of longer keys."""


def _normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def _attention(dtype: torch.dtype = torch.float32) -> Iterator[dict[str, Any]]:
    for lengths, keys in PACKED:
        queries, held = sum(lengths), sum(lengths if keys is None else keys)
        packing = Packing.from_lengths(lengths, keys)
        q, k, v = (
            _normal(queries, 4, 16, dtype=dtype),
            _normal(held, 2, 16, dtype=dtype),
            _normal(held, 2, 8, dtype=dtype),
        )
        yield {"q_THK": q, "k_TGK": k, "v_TGV": v, "packing": packing}


def _selection(packing: Packing, heads: int, unit: int, top_k: int) -> Selection:
    """The own unit of every query, and random earlier ones."""
    own_T = packing.query_key_position().clamp(min=0) // unit
    ids = torch.full((packing.num_queries, heads, top_k), -1, dtype=torch.int32)
    for t, own in enumerate(own_T.tolist()):
        for h in range(heads):
            chosen = sorted([*torch.randperm(own)[: top_k - 1].tolist(), own])
            ids[t, h, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return Selection(ids, (ids >= 0).sum(-1, dtype=torch.int32), unit, own=True)


def attend() -> Iterator[dict[str, Any]]:
    """Blocks of 16 keys, single tokens, and an attention sink."""
    for unit, top_k, sink in ((16, 2, False), (1, 5, False), (4, 3, True)):
        for case in _attention():
            selection = _selection(case["packing"], 4, unit, top_k)
            yield {**case, "selection": selection, "sink_H": _normal(4) if sink else None}


def decode_attend() -> Iterator[dict[str, Any]]:
    """Chosen blocks of 16 keys, and all keys."""
    for case in _attention():
        yield {**case, "selection": _selection(case["packing"], 4, 16, 2)}
        yield case


def gram() -> Iterator[dict[str, Any]]:
    """Wide, tall and square matrices, within one tile and over several; with and without a scale."""
    for shape in ((3, 40, 64), (2, 200, 48), (1, 136, 136), (2, 8, 16)):
        yield {"x_MRC": torch.randn(shape), "scale_M": torch.rand(shape[0]) if shape[0] > 1 else None}


def gram_polynomial() -> Iterator[dict[str, Any]]:
    """Gram matrices of random ones, within one tile and over several; with and without a scale."""
    for number, size in ((3, 40), (1, 136), (2, 8)):
        x_MKK = torch.randn(number, size, size)
        scale_M = torch.rand(number) if number > 1 else None
        yield {"g_MKK": x_MKK @ x_MKK.mT / size, "a": 3.4, "b": -4.8, "c": 2.0, "scale_M": scale_M}


def dense_attention() -> Iterator[dict[str, Any]]:
    """Full and sliding-window attention, with and without a sink; half precision once."""
    for case in _attention():
        yield case
        yield {**case, "window": 7, "need_lse": True}
        yield {**case, "sink_H": _normal(4), "need_lse": True}
    yield from _attention(torch.bfloat16)


def dense_attention_backward() -> Iterator[dict[str, Any]]:
    """All keys of a softmax, and a part of them: keys before the queries, without a mask."""
    for case in [*_attention(), *_attention(torch.bfloat16)]:
        q, packing = case["q_THK"].detach(), case["packing"]
        k, v = case["k_TGK"].detach(), case["v_TGV"].detach()
        o, lse = ops_dense_attention(q, k, v, packing, need_lse=True, impl="ref")
        given = {"grad_o_THV": torch.randn_like(o), "q_THK": q, "o_THV": o}
        yield {**given, "k_TGK": k, "v_TGV": v, "lse_TH": lse, "packing": packing}
        part = Packing.from_lengths([len(q)], [5], causal=False)
        yield {**given, "k_TGK": k[:5], "v_TGV": v[:5], "lse_TH": lse + 3.0, "packing": part}


def merge() -> Iterator[dict[str, Any]]:
    for rows, heads, pieces in ((1, 1, 1), (7, 2, 2), (33, 3, 4)):
        made = [(_normal(rows, heads, 8), _normal(rows, heads)) for _ in range(pieces)]
        with torch.no_grad():
            made[0][1][0] = float("-inf")  # a piece of which a row has seen nothing
        yield {"pieces": made}


def moba_attention() -> Iterator[dict[str, Any]]:
    for number, case in enumerate(_attention()):
        packing = case["packing"]
        offsets = {"cu_seqlens": packing.cu_q, "cu_seqlens_k": packing.cu_k}
        given = {"q": case["q_THK"], "k": case["k_TGK"], "v": case["v_TGV"]}
        yield {**given, **offsets, "block_size": (4, 16, 7)[number], "top_k": number + 1}


def select() -> Iterator[dict[str, Any]]:
    """Blocks of 4 with every way to round and to share."""
    for case in _attention():
        packing, q, k = case["packing"], case["q_THK"].detach(), case["k_TGK"].detach()
        units = packing.num_units_bound(k.shape[0], 4)
        for route_per, mean_dtype, tie in (("q_head", "input", "later"), ("kv_group", "centered", "earlier")):
            yield {
                "q_THK": q, "s_UGK": _normal(units, 2, 16).detach(), "packing": packing, "top_k": 3, "block_size": 4,
                "route_per": route_per, "mean_dtype": mean_dtype, "tie": tie,
            }  # fmt: skip


def summarise() -> Iterator[dict[str, Any]]:
    """Block sizes that divide no length, one key per block, and blocks longer than any document."""
    for case in _attention():
        for block_size in (1, 7, 64):
            yield {"k_TGK": case["k_TGK"].detach(), "packing": case["packing"], "block_size": block_size}


def grouped_mm() -> Iterator[dict[str, Any]]:
    """Empty groups, all rows in one group, a single group."""
    for sizes in ([5, 0, 12, 1], [0, 0, 24, 0], [17]):
        for dtype in (torch.float32, torch.bfloat16):
            yield {
                "rows_RD": _normal(sum(sizes), 16, dtype=dtype),
                "w_EXD": _normal(len(sizes), 8, 16, dtype=dtype),
                "offsets": torch.tensor([0, *sizes]).cumsum(0).to(torch.int32),
            }


def rms_norm() -> Iterator[dict[str, Any]]:
    """No row, few, many; odd widths; half precision once."""
    for shape in ((0, 8), (3, 5, 24), (7, 3), (70, 129)):
        yield {"x": _normal(*shape), "weight": _normal(shape[-1]), "eps": 1e-5}
    yield {"x": _normal(9, 40, dtype=torch.float16), "weight": _normal(40, dtype=torch.float16), "eps": 1e-5}


def add_rms_norm() -> Iterator[dict[str, Any]]:
    """What rms_norm is tried with, and as much to add."""
    for case in rms_norm():
        yield {**case, "y": _normal(*case["x"].shape, dtype=case["x"].dtype)}


def branch_rms_norm() -> Iterator[dict[str, Any]]:
    """What rms_norm is tried with."""
    yield from rms_norm()


def norm_rope() -> Iterator[dict[str, Any]]:
    """Norm and rotation, and each alone; half precision once."""
    for tokens, dim, norm, rotate, dtype in (
        (37, 16, True, True, torch.float32),
        (5, 24, True, False, torch.float32),
        (1, 2, False, True, torch.float32),
        (20, 16, True, True, torch.float16),
    ):
        yield {
            "q_THK": _normal(tokens, 4, dim, dtype=dtype),
            "k_TGK": _normal(tokens, 2, dim, dtype=dtype),
            "q_weight_K": _normal(dim, dtype=dtype) if norm else None,
            "k_weight_K": _normal(dim, dtype=dtype) if norm else None,
            "eps": 1e-6,
            "rope": Rope.from_positions(torch.arange(tokens), dim, 1e4) if rotate else None,
        }


def linear_nll() -> Iterator[dict[str, Any]]:
    """Tokens that do not count, one token, none. The head is no leaf: it gets its gradient from autograd."""
    for tokens, vocab in ((37, 29), (1, 1), (0, 7), (20, 300)):
        target, weight = torch.randint(0, vocab, (tokens,)), torch.rand(tokens)
        target[3::11], weight[5::7] = -1, 0.0
        yield {
            "x_TD": _normal(tokens, 16),
            "weight_XD": _normal(vocab, 16) * 1.0,
            "target_T": target,
            "weight_T": weight,
        }


def embed() -> Iterator[dict[str, Any]]:
    """Ids that repeat, one, none. The table is no leaf: it gets its gradient from autograd."""
    for tokens, vocab, dim in ((90, 7, 40), (1, 1, 1), (0, 5, 8)):
        table = _normal(vocab, dim) * 1.0
        yield {"token_T": torch.randint(0, vocab, (tokens,)), "weight_XD": table, "dtype": torch.float32}


def grouped_grad_weight() -> Iterator[dict[str, Any]]:
    """Empty groups, all rows in one group, widths that no tile divides."""
    for sizes, width in (([5, 0, 70, 1], 8), ([0, 0, 24, 0], 16), ([17], 5)):
        for dtype in (torch.float32, torch.float16):
            yield {
                "grad_RX": torch.randn(sum(sizes), width).to(dtype),
                "rows_RD": torch.randn(sum(sizes), 24).to(dtype),
                "offsets": torch.tensor([0, *sizes]).cumsum(0).to(torch.int32),
            }


def _routed() -> Iterator[tuple[Tensor, int]]:
    """Expert ids and the number of experts: several tiles of pairs, one token, more experts than pairs."""
    for tokens, experts, slots in ((150, 6, 3), (1, 1, 1), (5, 300, 2)):
        yield torch.randint(experts, (tokens, slots)), experts


def plan_rows() -> Iterator[dict[str, Any]]:
    """Every pair with an expert, some without, more than there is room for."""
    for ids_Tk, experts in _routed():
        yield {"ids_Tk": ids_Tk, "num_experts": experts}
        yield {"ids_Tk": ids_Tk.masked_fill(torch.rand(ids_Tk.shape) < 0.3, -1).int(), "num_experts": experts}
        yield {"ids_Tk": ids_Tk, "num_experts": experts, "max_rows": ids_Tk.numel() // 2}


def count_pairs() -> Iterator[dict[str, Any]]:
    """Every pair with an expert, some without."""
    for ids_Tk, experts in _routed():
        yield {"ids_Tk": ids_Tk, "num_experts": experts}
        yield {"ids_Tk": ids_Tk.masked_fill(torch.rand(ids_Tk.shape) < 0.3, -1).int(), "num_experts": experts}


def plan_slots() -> Iterator[dict[str, Any]]:
    """Parts with room to spare and without."""
    for ids_Tk, parts in _routed():
        for capacity in (1, 40, 200):
            yield {"ids_Tk": ids_Tk, "num_parts": parts, "capacity": capacity}


def owner_ids() -> Iterator[dict[str, Any]]:
    """Owners with a column each, and a column for each slot."""
    for ids_Tk, experts in _routed():
        for each in (1, 3):
            yield {"ids_Tk": ids_Tk, "experts_each": each, "num_owners": -(-experts // each)}


def gather_ids() -> Iterator[dict[str, Any]]:
    """Rows of tokens, and rows of none."""
    for ids_Tk, parts in _routed():
        yield {"ids_Tk": ids_Tk, "plan": permute.plan_slots(ids_Tk, parts, 40, impl="ref")}


def gather_rows() -> Iterator[dict[str, Any]]:
    """Widths that no tile divides."""
    for ids_Tk, experts in _routed():
        for dtype, width in ((torch.float32, 24), (torch.float16, 7)):
            plan = permute.plan_rows(ids_Tk, experts, impl="ref")
            yield {"x_TD": _normal(ids_Tk.shape[0], width, dtype=dtype), "plan": plan}


def sum_rows() -> Iterator[dict[str, Any]]:
    """With a residual and without."""
    for case in gather_rows():
        x_TD, plan = case["x_TD"], case["plan"]
        rows_RD = _normal(plan.num_rows, x_TD.shape[1], dtype=x_TD.dtype)
        yield {"rows_RD": rows_RD, "plan": plan, "residual_TD": None}
        yield {"rows_RD": rows_RD, "plan": plan, "residual_TD": x_TD}


def swiglu() -> Iterator[dict[str, Any]]:
    """With weights and without, widths that no tile divides."""
    for rows, width, dtype in ((70, 24, torch.float32), (1, 1, torch.float32), (9, 300, torch.float16)):
        gate_up_RF = _normal(rows, 2 * width, dtype=dtype)
        yield {"gate_up_RF": gate_up_RF}
        yield {"gate_up_RF": gate_up_RF, "weight_R": _normal(rows)}


def swiglu_backward() -> Iterator[dict[str, Any]]:
    """A gradient for each case of `swiglu`."""
    for case in swiglu():
        case = {name: tensor.detach() for name, tensor in case.items()}
        rows, width = case["gate_up_RF"].shape
        yield {"grad_RF": torch.randn(rows, width // 2).to(case["gate_up_RF"].dtype), **case}


def router_logits() -> Iterator[dict[str, Any]]:
    """Inputs of any float dtype."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        weight_ED = _normal(6, 16, dtype=torch.promote_types(dtype, torch.float32))
        yield {"x_TD": _normal(20, 16, dtype=dtype), "weight_ED": weight_ED}


def _rules() -> Iterator[tuple[Tensor, RoutingRule]]:
    yield _normal(33, 8), RoutingRule(2)
    yield _normal(20, 5), RoutingRule(5, score="sigmoid", renormalize=False)
    groups: dict[str, Any] = {"num_groups": 5, "groups_per_token": 3, "group_score": "top2_sum"}
    yield _normal(20, 30), RoutingRule(4, score="sigmoid", scale=2.5, **groups)


def select_experts() -> Iterator[dict[str, Any]]:
    """Both scores, groups, a bias."""
    for logits_TE, rule in _rules():
        yield {"logits_TE": logits_TE.detach(), "rule": rule}
        yield {"logits_TE": logits_TE.detach(), "rule": rule, "bias_E": torch.randn(logits_TE.shape[1])}


def expert_weights() -> Iterator[dict[str, Any]]:
    """Both scores, pairs without an expert, with probabilities and without."""
    for logits_TE, rule in _rules():
        ids_Tk = torch.rand(logits_TE.shape).topk(rule.top_k).indices
        yield {"logits_TE": logits_TE, "ids_Tk": ids_Tk, "rule": rule, "with_prob": True}
        yield {"logits_TE": logits_TE, "ids_Tk": ids_Tk.masked_fill(ids_Tk == 0, -1), "rule": rule}
