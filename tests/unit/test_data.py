"""Data: mixing, splitting, caching and the order of samples."""

from __future__ import annotations

import copy
import errno
import os
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers.data import (
    TEXT,
    TOKENIZER,
    fails,
    jsonl,
    load,
    make_tokenizer,
    texts,
)

from ee_tuning.cli import main
from ee_tuning.data import SampleOrder, collate, contents, describe, split_validation
from ee_tuning.data.blocks import opened
from ee_tuning.errors import UserError

pytestmark = pytest.mark.usefixtures("cache")

# Mixing, splitting, caching


def shares(packed) -> list[float]:
    """How much of the rows is made of the letters a and b."""
    firsts = [TOKENIZER.decode(row["input_ids"])[0] for row in packed]
    return [firsts.count(letter) / len(firsts) for letter in "ab"]


@pytest.fixture
def two_sources(tmp_path) -> list[str]:
    """Sources with 200 rows of 16 tokens each, of one letter each."""
    return [jsonl(tmp_path / f"{x}.jsonl", *[{"text": f"{x} " * 7 + x}] * 200) for x in "ab"]


@pytest.mark.parametrize(
    ("weights", "share"), [(("", ""), 0.5), (("=3", "=1"), 0.75), (("=0.25", ""), 0.2)]
)
def test_weights_shift_the_shares(two_sources, weights, share):
    packed = load([s + w for s, w in zip(two_sources, weights, strict=True)])
    assert shares(packed) == pytest.approx([share, 1 - share], abs=0.06)
    assert len(packed) == 400 if weights == ("", "") else len(packed) > 400


def test_validation_split(two_sources):
    packed = load(two_sources[0])
    train, valid = split_validation(packed, 0.1, seed=1)
    ids = [set(np.concatenate(list(part.places())).tolist()) for part in (train, valid)]
    assert ids[0].isdisjoint(ids[1])
    assert (len(ids[0]), len(ids[1])) == (len(train), len(valid)) == (180, 20)
    again = split_validation(packed, 0.1, seed=1)[1]
    assert torch.equal(again[:]["input_ids"], valid[:]["input_ids"])
    assert set(valid[0]) == {"input_ids", "position_ids", "labels"}


def test_repeated_rows_do_not_leak_into_validation(tmp_path):
    small = jsonl(tmp_path / "s.jsonl", *[{"text": f"{i} " * 7 + "x"} for i in range(10, 20)])
    large = jsonl(tmp_path / "l.jsonl", *[{"text": f"{i} " * 7 + "x"} for i in range(20, 60)])
    train, valid = split_validation(load([f"{small}=0.9", f"{large}=0.1"]), 0.5, seed=0)
    held_out = {tuple(ids) for ids in valid[:]["input_ids"].tolist()}
    assert len(held_out) == len(valid)
    assert held_out.isdisjoint(map(tuple, train[:]["input_ids"].tolist()))


def test_validation_split_of_few_rows(tmp_path):
    two = load(jsonl(tmp_path / "a.jsonl", {"text": TEXT}), seq_length=8)
    assert len(two) == 2
    assert [len(part) for part in split_validation(two, 0.01, 0)] == [1, 1]
    one = load(tmp_path / "a.jsonl", seq_length=512)
    with pytest.raises(UserError, match="just one sequence"):
        split_validation(one, 0.01, 0)
    with pytest.raises(UserError, match=r"valid_fraction is 1\.5: it must be above 0 and below 1"):
        split_validation(two, 1.5, 0)


def test_the_cache_is_used_until_the_file_changes(tmp_path, cache):
    path = jsonl(tmp_path / "a.jsonl", {"text": "a b"})
    assert texts(path) == ["a b"]
    files = sorted(cache.rglob("*.npy"))
    assert texts(path) == ["a b"]
    assert sorted(cache.rglob("*.npy")) == files
    stat = os.stat(path)
    jsonl(tmp_path / "a.jsonl", {"text": "c d"})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert texts(path) == ["c d"]
    bos = load(path, make_tokenizer(bos=True))
    assert bos[0]["input_ids"][0] == 1


def test_progress_bars_are_off_and_come_back(tmp_path, capfd):
    assert not datasets.are_progress_bars_disabled()
    load(jsonl(tmp_path / "a.jsonl", {"text": TEXT}))
    assert not datasets.are_progress_bars_disabled()
    assert capfd.readouterr().err == ""


def test_the_seed_shuffles_the_documents(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", *[{"text": f"{i} fox"} for i in range(50)])
    rows = [load(path, seed=seed)[:]["input_ids"] for seed in (0, 0, 1)]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0][:5], rows[2][:5])


# Large sources


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 160 tokens, so 10 rows of 16, as if a few records were many."""
    monkeypatch.setattr("ee_tuning.data.loading.BLOCK_TOKENS", 160)


def numbered(path: Path, count: int, *more, first: int = 100) -> str:
    """Records that fill a row each: 16 tokens, of which the first four are a number."""
    return jsonl(
        path, *[{"text": f"{i} " + "x " * 5 + "x"} for i in range(first, first + count)], *more
    )


def numbers(rows) -> list[int]:
    """The numbers of `numbered` that are in a batch of rows."""
    return [int(re.match(r"\d+", TOKENIZER.decode(ids))[0]) for ids in rows["input_ids"]]


def test_records_of_the_next_tests_fill_a_row_each(tmp_path):
    packed = load(numbered(tmp_path / "a.jsonl", 7))
    assert sorted(numbers(packed[:])) == list(range(100, 107))


def test_a_run_starts_before_a_large_source_is_read(tmp_path, small_blocks):
    packed = load(numbered(tmp_path / "a.jsonl", 300, "{"))
    (source,) = packed.sources
    assert (source.total().records, packed.count(10)) == (10, 10)
    order = SampleOrder(packed, 5, seed=0)
    seen = [n for step in range(4) for n in numbers(collate(packed, order.indices(step)))]
    assert sorted(seen) == list(range(100, 120))
    assert source.total().records == 20
    with pytest.raises(UserError, match="line 301: not valid JSON"):
        order.indices(60)


def test_the_next_window_is_prepared_ahead(tmp_path, small_blocks):
    packed = load(numbered(tmp_path / "a.jsonl", 50))
    SampleOrder(packed, 5, seed=0, steps=3).indices(0)
    packed._thread.join()
    assert packed.sources[0].total().records == 20  # 15 are wanted
    SampleOrder(packed, 5, seed=0, steps=3).indices(2)
    assert packed.sources[0].total().records == 20


def test_a_large_source_is_read_once_per_epoch(tmp_path, small_blocks, cache):
    path = numbered(tmp_path / "a.jsonl", 47)
    packed = load(path)
    order = SampleOrder(packed, 7, seed=3)
    steps = [order.indices(step) for step in range(30)]
    stream = [row for step in steps for row in step]
    epochs = [stream[e * 47 : (e + 1) * 47] for e in range(4)]
    assert all(sorted(epoch) == list(range(47)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    again = load(path)
    assert SampleOrder(again, 7, seed=3).indices(21) == steps[21]
    for file in cache.rglob("*.npy"):
        file.unlink()
    opened.cache_clear()
    assert numbers(collate(load(path), steps[29])) == numbers(collate(packed, steps[29]))


def test_held_out_rows_are_of_the_first_window(tmp_path, small_blocks):
    train, valid = split_validation(load(numbered(tmp_path / "a.jsonl", 47)), 0.2, seed=1)
    held_out = numbers(valid[:])
    assert len(held_out) == 2
    assert set(held_out) < set(range(100, 110))
    assert train.sources[0].total().records == 10
    assert sorted(numbers(train[:]) + held_out) == list(range(100, 147))


def test_large_sources_take_turns(tmp_path, small_blocks):
    paths = [numbered(tmp_path / f"{i}.jsonl", n, first=i) for i, n in ((100, 20), (500, 40))]
    packed = load(paths)
    first = numbers(packed[:10])
    assert sum(number < 500 for number in first) == 5
    assert sorted(numbers(packed[:])) == [*range(100, 120), *range(500, 540)]


def test_files_of_a_large_folder_are_read_in_another_order(tmp_path, small_blocks):
    for i in range(10, 90):
        numbered(tmp_path / f"{i}.jsonl", 2, first=10 * i)
    packed = load(tmp_path)
    assert max(numbers(packed[:10])) > 300
    assert sorted(n // 10 for n in numbers(packed[:])) == sorted([*range(10, 90)] * 2)
    assert numbers(load(f"{tmp_path}[:1]")[:]) == [100]


# What is kept, and what is told


def test_the_cache_keeps_within_its_bound(tmp_path, small_blocks, cache, monkeypatch):
    monkeypatch.setenv("EE_TUNING_CACHE_GIB", str(2500 / 2**30))  # two blocks
    packed = load(numbered(tmp_path / "a.jsonl", 60))
    for _ in range(2):
        assert sorted(numbers(packed[:])) == list(range(100, 160))
        opened.cache_clear()
        assert 1 <= len(list(cache.rglob("*.npy"))) <= 3
    monkeypatch.setenv("EE_TUNING_CACHE_GIB", "much")
    fails(numbered(tmp_path / "b.jsonl", 9), "EE_TUNING_CACHE_GIB is 'much'")


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.ENOENT])
@pytest.mark.parametrize("what", ["numpy.save", "pathlib.Path.mkdir", "filelock.FileLock.acquire"])
def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, cache, monkeypatch, number, what):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    path = jsonl(tmp_path / "a.jsonl", {"text": TEXT})
    with monkeypatch.context() as patch:
        patch.setattr(what, fail)
        fails(path, str(cache), os.strerror(number), "HF_DATASETS_CACHE")
    assert not list(cache.rglob("*.part"))
    assert texts(path) == [TEXT]


def test_what_is_kept_may_be_read_by_whom_a_new_file_may(tmp_path, cache):
    before = os.umask(0o027)
    try:
        load(jsonl(tmp_path / "a.jsonl", {"text": TEXT}))
    finally:
        os.umask(before)
    modes = {file.stat().st_mode & 0o777 for file in cache.rglob("*.npy")}
    assert modes == {0o640}


def test_what_is_where_the_cache_should_be(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    fails(jsonl(tmp_path / "a.jsonl", {"text": TEXT}), "HF_DATASETS_CACHE")


def test_what_was_read_is_told(tmp_path, small_blocks):
    small = jsonl(tmp_path / "a.jsonl", {"prompt": "a b", "completion": " fox"}, {"text": "c d"})
    packed = load(small)
    tokens = sum(len(TOKENIZER(text)["input_ids"]) + 1 for text in ("a b fox", "c d"))
    learned = len(TOKENIZER(" fox")["input_ids"]) + len(TOKENIZER("c d")["input_ids"]) + 1
    assert describe(packed, 10) == (
        f"data: 2 records, {tokens} tokens, {learned / tokens:.1%} of them learned, in 1 "
        "sequences, which the steps read 10 times"
    )
    packed = load(numbered(tmp_path / "b.jsonl", 1000))
    assert describe(packed, 5000).endswith(
        "in 10 sequences so far; the steps take 5,000, and more is read when they come to it"
    )


def test_contents_are_told_apart_by_what_is_in_them(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"text": TEXT})
    found = contents(load(path))
    shutil.copy(path, tmp_path / "b.jsonl")
    assert contents(load(tmp_path / "b.jsonl")) == found
    stat = os.stat(path)
    jsonl(tmp_path / "a.jsonl", {"text": TEXT.replace("fox", "dog")})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert contents(load(path)) != found
    assert contents(load(f"{path}[:1]")) != contents(load(path))


# Tokenizers


def test_a_token_that_the_embedding_lacks_is_refused_at_start(
    base, data, tokenizer, tmp_path, capsys
):
    folder, exits = str(tmp_path / "base"), str(tmp_path / "exits")
    shutil.copytree(base, folder)
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens([f"<new{i}>" for i in range(301 - len(longer))])
    longer.save_pretrained(folder)
    main(["init", "--model", folder, "--layers", "2", "--out", exits])
    for command in (
        ["tune", "--exits", exits, "--data", data, "--seq-length", "64", "--out", exits + "2"],
        ["generate", "--exits", exits, "--prompt", "a"],
        ["evaluate", "--exits", exits, "--data", data],
    ):
        with pytest.raises(SystemExit):
            main(command)
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert line.startswith(f"ee-tuning: the tokenizer in {folder} has the token '<new")
        assert "number 300, and the backbone's embedding only 300 rows" in line


# Batches


def test_collate(two_sources):
    packed = load(two_sources[0])
    batch = collate(packed, [5, 0, 5])
    assert {(name, t.shape, t.dtype) for name, t in batch.items()} == {
        (name, (3, 16), torch.int64) for name in ("input_ids", "position_ids", "labels")
    }
    assert torch.equal(batch["input_ids"][0], packed[5]["input_ids"])
    assert torch.equal(batch["labels"][0], batch["labels"][2])


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (7, 7), (3, 8), (1, 2)])
def test_each_epoch_is_a_permutation_of_its_own(n, batch):
    order = SampleOrder(range(n), batch, seed=3)
    stream = [i for step in range(n * 4) for i in order.indices(step)]
    epochs = [stream[e * n : (e + 1) * n] for e in range(4)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert n < 7 or len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_needs_nothing_but_the_step():
    order = SampleOrder(range(10), 4, seed=3)
    steps = [order.indices(step) for step in range(20)]
    assert SampleOrder(range(10), 4, seed=3).indices(17) == steps[17]
    assert order.indices(2) == steps[2]
    assert (
        SampleOrder(range(10), 4, seed=4).indices(0) != steps[0]
        or SampleOrder(range(10), 4, 4).indices(1) != steps[1]
    )
