"""Exits: `archs` has a class per architecture, `head` what turns their features into logits."""

from ee_tuning.exits.archs import ARCHS, Exit
from ee_tuning.exits.head import Head

__all__ = ["ARCHS", "Exit", "Head"]
