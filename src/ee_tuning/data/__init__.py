"""Data: from files, folders, Megatron pairs or the hub to packed rows of tokens.

    source -> records -> documents (tokens and labels) -> packed rows -> mix

Documents and packed rows are Arrow files in the cache of Hugging Face `datasets`, so data may be
larger than memory, and a second run with the same files, tokenizer and settings reads them back.

There is no stateful loader. Which sequences make up optimizer step ``s`` is a pure function of
the seed and the number of sequences (`SampleOrder`). Resuming needs nothing but the step number,
and the order does not depend on how many processes share the work: each takes its part of
``order.indices(s)`` and calls `collate`.
"""

from ee_tuning.data.loading import load_packed, split_validation
from ee_tuning.data.order import SampleOrder, collate, micro_batches

__all__ = ["SampleOrder", "collate", "load_packed", "micro_batches", "split_validation"]
