"""Packed rows from sources, kept on disk, mixed and split."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from ee_tuning.config import ReadingConfig
from ee_tuning.data.encode import Encoder
from ee_tuning.data.packing import pack
from ee_tuning.data.sources import Source, parse_source
from ee_tuning.errors import Notice, UserError
from ee_tuning.losses import IGNORED

FORMAT = 1  # part of every cache key: raise it when documents or rows come out differently
WRITTEN_AT_ONCE = 256  # rows held in memory until they are written
INT32 = datasets.Value("int32")
DOCUMENT = datasets.Features(
    {
        "input_ids": datasets.List(INT32),
        "labels": datasets.List(INT32),
        "problem": datasets.Value("string"),
    }
)
COLUMNS = ["input_ids", "position_ids", "labels"]


def load_packed(
    sources: list[str],
    tokenizer: PreTrainedTokenizerBase,
    seq_length: int,
    seed: int,
    reading: ReadingConfig | None = None,
) -> datasets.Dataset:
    """Packed rows of all sources, each ``PATH_OR_HUB_ID[=WEIGHT]``.

    If any source has a weight, the others weigh 1, and rows are drawn from the sources with
    shares in proportion; a source that runs out starts again, until all were read in full. Without
    weights the sources follow each other, each row once.

    Returns:
        Rows of ``input_ids``, ``position_ids`` and ``labels``, each (seq_length,), read as int64
        tensors; see `pack`. A hidden column ``row`` tells repeated rows for `split_validation`.

    Raises:
        UserError: data that is missing, malformed, or has nothing to learn from.
    """
    if not sources:
        raise UserError("no data given: name files, folders or hub ids with --data")
    if seq_length < 2:
        raise UserError(f"seq_length {seq_length} is too short: give at least 2 tokens")
    if seed < 0:
        raise UserError(f"seed {seed} is negative: give 0 or more")
    parsed = [parse_source(text) for text in sources]
    with _without_progress_bars():
        documents = [_tokenised(source, tokenizer, reading or ReadingConfig()) for source in parsed]
        _warn_of_problems(documents)
        packed = [
            _packed(source.name, number, data, seq_length, seed, _pad_id(tokenizer))
            for number, (source, data) in enumerate(zip(parsed, documents, strict=True))
        ]
        mixed = _mixed(packed, [source.weight for source in parsed], seed)
    return mixed.with_format("torch", columns=COLUMNS)


def split_validation(
    packed: datasets.Dataset, fraction: float, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Hold out a share of the rows, at least one, chosen by `seed`.

    A row that the mix repeats is held out in all its places, and stands in the second part once.

    Returns:
        The rows to train on and the rows held out.

    Raises:
        UserError: `fraction` is not between 0 and 1, or there is only one row.
    """
    if not 0 < fraction < 1:
        raise UserError(f"valid_fraction {fraction} must lie between 0 and 1")
    rows = packed.with_format("numpy", columns=["row"])[:]["row"]
    unique, first_places = np.unique(rows, return_index=True)
    if len(unique) < 2:
        raise UserError(
            "the data fill just one sequence, so none can be held out for validation: "
            "give more data, a shorter --seq-length, or --valid-data"
        )
    count = min(max(round(fraction * len(unique)), 1), len(unique) - 1)
    held_out = np.sort(np.random.default_rng(seed).permutation(len(unique))[:count])
    train = np.flatnonzero(~np.isin(rows, unique[held_out]))
    return packed.select(train), packed.select(np.sort(first_places[held_out]))


def _tokenised(
    source: Source, tokenizer: PreTrainedTokenizerBase, reading: ReadingConfig
) -> datasets.Dataset:
    """The documents of a source as Arrow on disk, problems of bad records among them."""
    encoder = Encoder(tokenizer, reading)

    def generate() -> Iterator[dict[str, Any]]:
        empty = True
        for found in encoder.encode(source.records()):
            if found.problem and not reading.skip_bad_records:
                raise UserError(found.problem)
            empty = False
            if found.problem:
                yield {"input_ids": [], "labels": [], "problem": found.problem}
            for ids, counts in found.documents:
                yield {"input_ids": ids, "labels": np.where(counts, ids, IGNORED), "problem": ""}
        if empty:
            raise UserError(f"data {source.name} has no records or readable text in it")

    key = _key("documents", source.identity(), encoder.identity(), reading.skip_bad_records)
    return _on_disk(generate, DOCUMENT, key)


def _packed(
    name: str, number: int, documents: datasets.Dataset, seq_length: int, seed: int, pad_id: int
) -> datasets.Dataset:
    """The rows of source `number` as Arrow on disk."""

    def generate() -> Iterator[dict[str, Any]]:
        row = -1
        for row, packed in enumerate(pack(_shuffled(documents, seed), seq_length, pad_id)):
            yield {**packed, "row": (number << 40) + row}
        if row < 0:
            raise _nothing_to_learn(name, documents)

    fixed = datasets.List(INT32, length=seq_length)
    features = datasets.Features({**dict.fromkeys(COLUMNS, fixed), "row": datasets.Value("int64")})
    key = _key("packed", documents._fingerprint, number, seq_length, seed, pad_id)
    return _on_disk(generate, features, key)


def _shuffled(documents: datasets.Dataset, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids and labels of the documents with something to learn, in an order given by `seed`."""
    order = np.random.default_rng(seed).permutation(len(documents))
    reader = documents.with_format("arrow")
    for start in range(0, len(order), WRITTEN_AT_ONCE):
        table = reader[order[start : start + WRITTEN_AT_ONCE]]
        pairs = zip(_arrays(table["input_ids"]), _arrays(table["labels"]), strict=True)
        yield from ((ids, labels) for ids, labels in pairs if (labels[1:] != IGNORED).any())


def _arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    """A column of lists as one array per row, without a Python object per token."""
    ends = np.cumsum(pc.list_value_length(column).to_numpy())
    return np.split(pc.list_flatten(column).to_numpy(), ends[:-1])


def _mixed(
    packed: list[datasets.Dataset], weights: list[float | None], seed: int
) -> datasets.Dataset:
    if len(packed) == 1:
        return packed[0]
    if all(weight is None for weight in weights):
        return datasets.concatenate_datasets(packed)
    shares = np.array([1.0 if weight is None else weight for weight in weights])
    return datasets.interleave_datasets(
        packed,
        probabilities=(shares / shares.sum()).tolist(),
        seed=seed,
        stopping_strategy="all_exhausted",
    )


def _problems(documents: datasets.Dataset) -> list[str]:
    column = documents.data.column("problem")
    return pc.filter(column, pc.not_equal(column, "")).to_pylist()


def _warn_of_problems(documents: list[datasets.Dataset]) -> None:
    problems = [problem for data in documents for problem in _problems(data)]
    if problems:
        warnings.warn(
            f"{len(problems)} bad records skipped, the first: {problems[0]}", Notice, stacklevel=3
        )


def _nothing_to_learn(name: str, documents: datasets.Dataset) -> UserError:
    problems = _problems(documents)
    if len(problems) == len(documents):
        return UserError(f"every record in {name} is bad, the first: {problems[0]}")
    if pc.max(pc.list_value_length(documents.data.column("input_ids"))).as_py() < 2:
        return UserError(
            f"every document in {name} is too short: none has the 2 tokens it takes to predict one"
        )
    return UserError(
        f"no document in {name} has a token to learn: chats need a turn of the assistant, "
        "prompts a completion"
    )


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)


def _key(*parts: Any) -> str:
    return hashlib.sha256(repr((FORMAT, *parts)).encode()).hexdigest()[:32]


def _on_disk(
    generate: Callable[[], Iterator[Any]], features: datasets.Features, key: str
) -> datasets.Dataset:
    """What `generate` yields, from the cache of `datasets` if it is there under `key`."""
    try:
        return datasets.Dataset.from_generator(
            generate, features=features, fingerprint=key, writer_batch_size=WRITTEN_AT_ONCE
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


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
