"""Data: from files, folders, Megatron pairs or the hub to packed rows of tokens.

    source -> records -> documents (tokens and what of them counts) -> blocks of rows -> mix

Blocks of packed rows are files in a cache, made when they are needed, so data may be larger than
memory, a run starts when the first block is there, and a second run with the same files, tokenizer
and settings reads them back.

There is no stateful loader. Which sequences make up optimizer step ``s`` is a pure function of
the seed and the data (`SampleOrder`). Resuming needs nothing but the step number, and the order
does not depend on how many processes share the work: each takes its part of ``order.indices(s)``
and calls `collate`.
"""

from ee_tuning.data.loading import contents, describe, load_packed
from ee_tuning.data.order import SampleOrder, collate, micro_batches
from ee_tuning.data.rows import Rows, split_validation

__all__ = [
    "Rows",
    "SampleOrder",
    "collate",
    "contents",
    "describe",
    "load_packed",
    "micro_batches",
    "split_validation",
]
