"""Merge policies; importing this package registers all of them."""

from compress_peft.merging.auto import Auto
from compress_peft.merging.base import MERGERS, MergeContext, Merger
from compress_peft.merging.bundle import Bundle, load_bundle, save_bundle
from compress_peft.merging.dense import Dense
from compress_peft.merging.exact import Exact
from compress_peft.merging.merge_aware import MergeAware
from compress_peft.merging.requantize import Requantize
from compress_peft.merging.sparse import Sparse
from compress_peft.merging.static import Static

__all__ = [
    "MERGERS",
    "Auto",
    "Bundle",
    "Dense",
    "Exact",
    "MergeAware",
    "MergeContext",
    "Merger",
    "Requantize",
    "Sparse",
    "Static",
    "load_bundle",
    "save_bundle",
]
