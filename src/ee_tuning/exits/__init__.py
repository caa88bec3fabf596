"""Exits: `archs` has a class per architecture, `draft` and `eagle3` those that sit at no layer,
`head` what turns their features into logits.
"""

from ee_tuning.exits.archs import EmbeddingExit, Exit, LayerExit, MlpExit, NormExit
from ee_tuning.exits.draft import DraftExit
from ee_tuning.exits.eagle3 import Eagle3Exit
from ee_tuning.exits.head import Head

ARCHS: dict[str, type[Exit]] = {
    "embedding": EmbeddingExit,
    "norm": NormExit,
    "mlp": MlpExit,
    "layer": LayerExit,
    "draft": DraftExit,
    "eagle3": Eagle3Exit,
}

__all__ = ["ARCHS", "DraftExit", "Eagle3Exit", "Exit", "Head"]
