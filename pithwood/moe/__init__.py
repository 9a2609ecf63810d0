"""Mixture of experts: router, balance, dispatch and combine, experts."""

from pithwood.moe.config import MoEConfig
from pithwood.moe.experts import DenseMLP, GroupedExperts
from pithwood.moe.layer import MoELayer
from pithwood.moe.router import Router

__all__ = ["DenseMLP", "GroupedExperts", "MoEConfig", "MoELayer", "Router"]
