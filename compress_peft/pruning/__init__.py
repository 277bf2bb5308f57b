"""Pruners: one file a method."""

from compress_peft.pruning import magnitude as magnitude
from compress_peft.pruning import ria as ria
from compress_peft.pruning import sparsegpt as sparsegpt
from compress_peft.pruning import wanda as wanda
from compress_peft.pruning import wandapp as wandapp
from compress_peft.pruning.apply import PrunedLayer, PruningSummary, prune_folder, prune_model
from compress_peft.pruning.base import PRUNERS, Pruner

__all__ = ["PRUNERS", "PrunedLayer", "Pruner", "PruningSummary", "prune_folder", "prune_model"]
