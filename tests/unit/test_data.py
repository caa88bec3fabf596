"""Data: mixing, splitting, caching and the order of samples."""

from __future__ import annotations

import copy
import os
import shutil

import datasets
import pytest
import torch
from helpers.data import (
    TEXT,
    TOKENIZER,
    jsonl,
    load,
    make_tokenizer,
    texts,
)

from ee_tuning.cli import main
from ee_tuning.data import SampleOrder, collate, split_validation
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
    ids = [
        set(part.with_format("numpy", columns=["row"])[:]["row"].tolist())
        for part in (train, valid)
    ]
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
    with pytest.raises(UserError, match=r"valid_fraction 1.5"):
        split_validation(two, 1.5, 0)


def test_the_cache_is_used_until_the_file_changes(tmp_path, cache):
    path = jsonl(tmp_path / "a.jsonl", {"text": "a b"})
    assert texts(path) == ["a b"]
    files = sorted(cache.rglob("*.arrow"))
    assert texts(path) == ["a b"]
    assert sorted(cache.rglob("*.arrow")) == files
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
    order = SampleOrder(n, batch, seed=3)
    stream = [i for step in range(n * 4) for i in order.indices(step)]
    epochs = [stream[e * n : (e + 1) * n] for e in range(4)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert n < 7 or len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_needs_nothing_but_the_step():
    order = SampleOrder(10, 4, seed=3)
    steps = [order.indices(step) for step in range(20)]
    assert SampleOrder(10, 4, seed=3).indices(17) == steps[17]
    assert order.indices(2) == steps[2]
    assert (
        SampleOrder(10, 4, seed=4).indices(0) != steps[0]
        or SampleOrder(10, 4, 4).indices(1) != steps[1]
    )
