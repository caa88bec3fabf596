"""Samples of a small vocabulary beside what the whole model gives, by exact enumeration."""

import torch


def assert_full_depths(counts, model, ids, warp):
    """χ² of how often each text came, `counts` (V, …, V), below its mean plus 5 deviations.

    warp: of texts and logits, to the logits that were drawn from.
    """
    new, vocabulary = counts.ndim, len(counts)
    expected, texts = counts.sum()[None], ids
    for _ in range(new):
        logits = model(texts, output_logits=True).logits[:, -1].detach()
        expected = (expected[:, None] * warp(texts, logits).softmax(-1)).flatten()
        following = torch.arange(vocabulary).repeat(len(texts))[:, None]
        texts = torch.cat([texts.repeat_interleave(vocabulary, 0), following], 1)
    counts = counts.flatten()
    assert counts[expected == 0].sum() == 0
    large = expected >= 5
    found = torch.cat([counts[large], counts[~large].sum()[None]])
    wanted = torch.cat([expected[large], expected[~large].sum()[None]])
    statistic = ((found - wanted) ** 2 / wanted.clamp(min=1e-9)).sum().item()
    freedom = len(wanted) - 1
    assert freedom > 20
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5
