"""The attention ops, public names. Each folder holds a readable reference and the implementations used in training."""

from pithwood.ops.attend import attend, attention_mass
from pithwood.ops.decode import decode_attend
from pithwood.ops.dense_attention import dense_attention
from pithwood.ops.merge import merge
from pithwood.ops.moba import moba_attention
from pithwood.ops.packing import Packing, Selection
from pithwood.ops.select import scores_at, select
from pithwood.ops.summarise import summarise

__all__ = [
    "Packing",
    "Selection",
    "attend",
    "attention_mass",
    "decode_attend",
    "dense_attention",
    "merge",
    "moba_attention",
    "scores_at",
    "select",
    "summarise",
]
