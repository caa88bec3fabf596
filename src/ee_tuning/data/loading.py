"""From the sources that a user names to packed rows, and what is told of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import datasets
from transformers import PreTrainedTokenizerBase

from ee_tuning.config import ReadingConfig
from ee_tuning.data.blocks import BLOCK_TOKENS, Blocks, Layout
from ee_tuning.data.cache import key_of
from ee_tuning.data.encode import Encoder
from ee_tuning.data.rows import Rows, drawn, in_turns
from ee_tuning.data.sources import contents as source_contents
from ee_tuning.data.sources import parse_source
from ee_tuning.errors import UserError


def load_packed(
    sources: list[str],
    tokenizer: PreTrainedTokenizerBase,
    seq_length: int,
    seed: int,
    reading: ReadingConfig | None = None,
) -> Rows:
    """Packed rows of all sources, each ``SOURCE[[:LIMIT]][=WEIGHT]``; the first ones are ready.

    If any source has a weight, the others weigh 1, and rows are drawn from the sources with
    shares in proportion; a source that runs out starts again, until all were read in full. Without
    weights each row comes once, and large sources take turns.

    Raises:
        UserError: data that is missing, malformed, or has nothing to learn from.
    """
    if not sources:
        raise UserError("no data given: name files, folders or hub ids with --data")
    if seq_length < 2:
        raise UserError(f"seq_length {seq_length} is too short: give at least 2 tokens")
    if seed < 0:
        raise UserError(f"seed {seed} is negative: give 0 or more")
    reading = reading or ReadingConfig()
    parsed = [parse_source(text) for text in sources]
    tokens = BLOCK_TOKENS // len(parsed)
    layout = Layout(seq_length, seed, _pad_id(tokenizer), reading.skip_bad_records, tokens)
    encoder = Encoder(tokenizer, reading)
    with _without_progress_bars():
        blocks = [Blocks(source, encoder, layout) for source in parsed]
        for source in blocks:
            source.prepare(1)
        weights = [source.weight for source in parsed]
        if any(weights):
            places = drawn(blocks, [weight or 1.0 for weight in weights], seed)
        else:
            places = in_turns(blocks)
        rows = Rows(blocks, places, max(1, BLOCK_TOKENS // seq_length))
        rows.count(rows.window)
    return rows


def contents(rows: Rows) -> str:
    """Differs where the data that `rows` come from do, whatever they are called."""
    return key_of([source_contents(blocks.identity) for blocks in rows.sources])


def describe(rows: Rows, samples: int = 0) -> str:
    """What was read for `rows`, and how far `samples` of them go, if a run takes some, for people.

    rows: of all sources, or what `split_validation` left of them.
    """
    totals = [blocks.total() for blocks in rows.sources]
    sums = [sum(getattr(total, name) for total in totals) for name in ("records", "tokens")]
    number = sum(total.rows for total in totals)
    learned = sum(total.learned for total in totals) / max(1, sums[1])
    text = (
        f"data: {sums[0]:,} records, {sums[1]:,} tokens, {learned:.1%} of them learned, in "
        f"{number:,} sequences"
    )
    done = all(total.last for total in totals)
    if not samples:
        return text if done else f"{text} so far"
    if done:
        return f"{text}, which the steps read {samples / len(rows):.2g} times"
    return f"{text} so far; the steps take {samples:,}, and more is read when they come to it"


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Keep the bars of `datasets` off the terminal, unless its environment variable wants them."""
    wanted = datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is False
    if wanted or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
