"""Merge policies; importing this package registers all of them."""

from compress_peft.merging.base import MERGERS, Merger
from compress_peft.merging.bundle import Bundle, load_bundle, save_bundle
from compress_peft.merging.dense import Dense
from compress_peft.merging.static import Static

__all__ = ["MERGERS", "Bundle", "Dense", "Merger", "Static", "load_bundle", "save_bundle"]
