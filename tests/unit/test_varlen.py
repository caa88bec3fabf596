"""What attention is told of documents, and attention of whole rows; packed ones need a GPU."""

import pytest
import torch
from helpers.families import tiny
from torch._dynamo.utils import counters

from ee_tuning import EarlyExitModel, ExitConfig, varlen
from ee_tuning.tune.step import Tuner


def positions(*lengths):
    return torch.cat([torch.arange(n) for n in lengths])


def test_boundaries_are_empty_where_every_row_is_one_document():
    whole = positions(8).repeat(3, 1)
    assert varlen.boundaries(whole).shape == (1, 1, 1, 0)
    packed = torch.stack([positions(8), positions(5, 3)])
    found = varlen.boundaries(packed)
    assert found.shape == (1, 1, 1, 64)
    assert found.flatten()[:4].tolist() == [0, 8, 13, 16]
    later = positions(16)[None, 8:]  # begins in the middle of a document
    assert varlen.boundaries(later).numel() == 64


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "granite"])
def test_attention_of_whole_rows_is_the_masked_one(family):
    ids = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions(16).repeat(2, 1)}
    config = ExitConfig("2,3", "layer")
    plain, dense = (EarlyExitModel.from_base(tiny(family), config) for _ in range(2))
    varlen.use_varlen(dense)
    dense.chain.takes_boundaries = True
    given = Tuner(dense, {}).place(batch)
    expected = plain.chain.descend(ids, given["position_ids"])
    found = dense.chain.descend(ids, given["position_ids"], given["boundaries"])
    for layer in (2, 3):
        a, b = expected.to(layer), found.to(layer)
        torch.testing.assert_close(a.hidden, b.hidden)
        torch.testing.assert_close(plain.exit(layer)(a), dense.exit(layer)(b))


def test_attention_of_whole_rows_compiles_once():
    query, mask = torch.randn(2, 4, 16, 8), torch.empty(1, 1, 1, 0, dtype=torch.int32)
    attend = torch.compile(varlen.attend, backend="aot_eager", dynamic=False, fullgraph=True)
    with torch.no_grad():
        expected, _ = varlen.attend(None, query, query[:, :2], query[:, 2:], mask)
        found, _ = attend(None, query, query[:, :2], query[:, 2:], mask)
        graphs = counters["stats"]["unique_graphs"]
        attend(None, query, query[:, :2], query[:, 2:], mask)
    torch.testing.assert_close(found, expected)
    assert counters["stats"]["unique_graphs"] == graphs
