"""Drafts from the text itself: those that transformers' prompt lookup finds."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from ee_tuning.decode.lookup import Lookup


def found_by_transformers(ids, most, match):
    finder = PromptLookupCandidateGenerator(
        num_output_tokens=most, max_matching_ngram_size=match, max_length=10_000
    )
    return finder.get_candidates(torch.tensor([ids]))[0][0, len(ids) :].tolist()


@settings(deadline=None)
@given(
    ids=st.integers(1, 5).flatmap(
        lambda size: st.lists(st.integers(0, size), min_size=1, max_size=60)
    ),
    grown=st.lists(st.integers(1, 9), max_size=8),
    most=st.integers(1, 12),
    match=st.integers(1, 5),
)
def test_drafts_are_those_of_transformers(ids, grown, most, match):
    """Of texts that grow by a few tokens at a time, and however few tokens there are."""
    lookup, lengths = Lookup(match), [len(ids)]
    for step in grown:
        lengths.append(max(1, lengths[-1] - step))
    for length in reversed(lengths):
        text = ids[:length]
        assert lookup.drafts(text, most) == found_by_transformers(text, most, match)


def test_the_longest_run_counts_and_its_first_place():
    #        the run 1 2 3 comes twice, 2 3 once before that
    ids = [2, 3, 9, 1, 2, 3, 7, 7, 1, 2, 3, 8, 1, 2, 3]
    assert Lookup(3).drafts(ids, 2) == [7, 7]
    assert Lookup(2).drafts(ids, 2) == [9, 1]
    assert Lookup(3).drafts(ids, 100) == ids[6:]


def test_a_text_that_repeats_nothing_has_no_drafts():
    assert Lookup().drafts(list(range(50)), 8) == []
    assert Lookup().drafts([3], 8) == []
