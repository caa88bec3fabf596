"""Tokens that are found one behind another without a word from the host."""

import gc
import weakref

import pytest
import torch
from helpers.models import early_exit
from helpers.prompts import prompt

from ee_tuning.passes.graphs import Graphs
from ee_tuning.passes.passes import Passes
from ee_tuning.passes.prompts import read
from ee_tuning.passes.wanted import Wanted

LAST = Wanted("last", True)


@pytest.fixture
def passes_of(monkeypatch):
    """Passes of four slots, compiled or not, without the compiler; and the first tokens of texts
    that they have read, by slot."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)

    def make(compile):
        passes = Passes(early_exit(), [], slots=4, capacity=96, longest=1, compile=compile)
        texts = {slot: prompt(5 + slot, slot) for slot in range(4)}
        starts, newest = [0] * 4, {}
        for reads in read(passes, texts, 0, LAST, lambda _: [*starts]):
            newest |= {one.slot: one.found.token for one in reads}
        return passes, newest

    return make


def looks(passes, newest):
    """Some looks: at all slots, then at those of two and one that was told anew, by slot."""
    starts, found = [5, 6, 7, 8], {slot: [] for slot in newest}

    def look(straight, count):
        said = straight.find(count)[:, :, straight.rows]
        for slot, tokens in zip(straight.texts, said[:, 0].T.tolist(), strict=True):
            found[slot] += tokens
            starts[slot] += count

    with torch.inference_mode():
        first = passes.straight(newest, starts, LAST)
        for count in (1, 7, 3, 2):
            look(first, count)
        again = {1: int(found[1][-1]), 2: -1, 3: -1}
        second = passes.straight(again, starts, LAST, first, known=[2, 3])
        for count in (4, 5):
            look(second, count)
        look(passes.straight({3: int(found[3][-1])}, starts, LAST), 6)
    return found


def test_any_number_is_found_as_one_by_one(passes_of):
    """In pieces where there are graphs, which run several times when they are captured."""
    one_by_one, in_pieces = (looks(*passes_of(compile)) for compile in (False, True))
    assert one_by_one == in_pieces
    assert [len(tokens) for tokens in one_by_one.values()] == [13, 22, 22, 28]


def test_passes_are_gone_with_who_has_them(passes_of):
    """At once, and with them the memory of K/V: nothing that they have keeps them."""
    gc.disable()
    try:
        passes, newest = passes_of(False)
        looks(passes, newest)
        gone = weakref.ref(passes)
        del passes
        assert gone() is None
    finally:
        gc.enable()


def test_what_a_graph_moves_on_is_moved_once():
    state, graphs = torch.zeros(3), Graphs(torch.device("cpu"))

    def move():
        state.add_(1)
        return state.clone()

    for number in (1, 2, 3):
        assert graphs.run("key", move, moved=[state]).tolist() == [number] * 3
