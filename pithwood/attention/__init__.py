"""Token mixers: one file each, with its configuration, its module, its cache fields and its cost.

The configurations are imported here so that a saved run, or an override on the command line, can name any of them.
"""

from pithwood.attention.full import FullAttentionConfig
from pithwood.attention.moba import MoBAConfig
from pithwood.attention.window import SlidingWindowConfig

__all__ = ["FullAttentionConfig", "MoBAConfig", "SlidingWindowConfig"]
