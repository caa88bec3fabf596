"""Exits in the forms that engines which know nothing of exits read."""

from ee_tuning.export.checkpoint import DRAFT_EXIT, exit_checkpoint, save_exit, save_merged
from ee_tuning.export.eagle3 import eagle3_tensors, save_eagle3

__all__ = [
    "DRAFT_EXIT",
    "eagle3_tensors",
    "exit_checkpoint",
    "save_eagle3",
    "save_exit",
    "save_merged",
]
