"""How sure a share or a ratio is, that was measured on some texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DRAWS, LEVEL = 2000, 0.95


def bootstrap(parts: Sequence[float], wholes: Sequence[float]) -> list[float]:
    """The least and the most of Σ parts / Σ wholes, in 95 of 100 cases, over units drawn anew
    (Efron's percentile interval).

    parts, wholes: one each per unit, which is a text or a row of texts: tokens of one depend on
    each other. Where there is one unit, both are its own ratio.
    """
    pairs = np.stack([np.asarray(parts, dtype=float), np.asarray(wholes, dtype=float)])
    units = pairs.shape[1]
    draws = np.random.default_rng(0).multinomial(units, np.full(units, 1 / units), size=DRAWS)
    tops, bottoms = pairs @ draws.T
    ratios = tops[bottoms > 0] / bottoms[bottoms > 0]
    return np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist() if len(ratios) else []
