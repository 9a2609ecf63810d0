"""Pithwood: a compact system for training sparse language models. Importing it does not import torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pithwood.ops.moba import moba_attention

__version__ = "0.1.0"
__all__ = ["__version__", "moba_attention"]


def __getattr__(name: str) -> Any:
    """PEP 562: `from pithwood import moba_attention` imports torch only then."""
    if name == "moba_attention":
        from pithwood.ops.moba import moba_attention

        return moba_attention
    raise AttributeError(f"module 'pithwood' has no attribute {name!r}")
