"""What passes compile, and on CUDA capture, before there are texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch

from ee_tuning.passes.draws import NOTHING
from ee_tuning.passes.passes import Passes
from ee_tuning.passes.straight import PIECES
from ee_tuning.passes.wanted import Wanted


@torch.inference_mode()
def to_warm(
    passes: Passes, measures: Sequence[str], samples: Sequence[int], texts: bool
) -> list[Callable[[], Any]]:
    """What compiles and captures all that decoding asks of passes; to be run at once, in inference
    mode, without a sequence in progress.

    samples: kinds, see `ee_tuning.passes.draws`. texts: whether texts draft.
    """
    if not passes.compile:
        return []
    for control in (passes.control, passes.prompts_control):
        control.zero_()
        control[:, 0] = torch.arange(len(control), device=passes.device)
    chains = passes.chains
    drafts = passes.sources is not None  # this stage's or another's
    size = len(passes.segments), passes.is_first, passes.is_last, drafts, texts
    keys: dict[tuple[Any, ...], None] = {}
    for kind, one, measure in product(samples, passes.sizes.every(*size), measures):
        i, rows, length, reach, after, final = one
        if after != "nothing" and not final and passes.segments[i].stop not in passes.exits:
            continue
        wanted = Wanted(after, final, measure, kind if after != "nothing" else NOTHING)
        keys[i, rows, length, reach, passes.sizes.in_order(list(range(rows))), wanted] = None
    jobs: list[Callable[[], Any]] = [partial(passes.run, key) for key in keys]
    straight = len(passes.segments) == 1 and passes.is_first and passes.is_last
    if straight and passes.group is None:
        # Elsewhere the host looks at each token, of one that is alone, too.
        least, pieces = (2, PIECES) if passes.branch else (1, (1,))
        fed = [key for key in keys if key[1] >= least and key[2] == 1 and key[-1].final]
        jobs += passes.feed.to_warm(passes.forward, pieces, [key[1:2] + key[3:] for key in fed])
    if chains is not None:
        alone = not passes.branch or passes.group is not None
        jobs += chains.to_warm(passes.most - 1, measures, samples, alone)
    return jobs
