"""Drafts from the text itself: those that transformers' prompt lookup finds, and lossless."""

import random

import pytest
import torch
from helpers.families import tiny
from helpers.lookups import let_texts_draft, repeating
from helpers.models import DEPTH, drafting, good_exit
from helpers.prompts import padded, prompt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from ee_tuning import EarlyExitModel, ExitConfig, UserError
from ee_tuning.decode import Engine, Request, Speculative
from ee_tuning.decode.lookup import COST, MATCH, Lookup, TextDrafts
from ee_tuning.decode.sequences import Row
from ee_tuning.exit_config import LOOKUP

UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NEW = {"max_new_tokens": 40, "eos_token_id": None}


def found(lookup, ids, most):
    """The drafts of a text."""
    size, place = lookup.find(ids)
    return ids[place : place + most] if size else []


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
        assert found(lookup, text, most) == found_by_transformers(text, most, match)


def test_the_longest_run_counts_and_its_first_place():
    #        the run 1 2 3 comes twice, 2 3 once before that
    ids = [2, 3, 9, 1, 2, 3, 7, 7, 1, 2, 3, 8, 1, 2, 3]
    assert found(Lookup(3), ids, 2) == [7, 7]
    assert found(Lookup(2), ids, 2) == [9, 1]
    assert found(Lookup(3), ids, 100) == ids[6:]


def test_a_text_that_repeats_nothing_has_no_drafts():
    for ids in (list(range(50)), [3]):
        assert Lookup().find(ids) == (0, 0)
        assert TextDrafts(8).drafts(ids, 8) == []


# -- in rounds -----------------------------------------------------------------------------------


@pytest.fixture
def by_turns(monkeypatch):
    """Rounds have as many drafts as they may: half of them those of the text, by lot."""
    let_texts_draft(monkeypatch, share=0.5)


@pytest.fixture
def always(monkeypatch):
    """Texts draft wherever they have something."""
    let_texts_draft(monkeypatch)


def way(kind):
    """A model, and how it drafts beside its texts."""
    if kind == "text":
        return good_exit("llama"), {"threshold": 1}
    if kind == "draft":
        return drafting(), {"threshold": 0.05}
    return good_exit(kind), {"threshold": 0.02}


@settings(UNTIMED, max_examples=25)
@given(
    kind=st.sampled_from(["text", "draft", "llama", "mistral", "gemma3", "gpt2"]),
    longest=st.integers(1, 9),
    new=st.integers(1, 34),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    sampled=st.booleans(),
    penalty=st.sampled_from([1.0, 1.3]),
)
def test_any_setting_gives_the_tokens_of_full_depth(
    by_turns, kind, longest, new, lengths, sampled, penalty
):
    """Batches of texts that draft by turns with exits; what they say, greedy or with a seed."""
    model, how = way(kind)
    ids, mask = padded([repeating(length, length) for length in lengths])
    given = {"attention_mask": mask, "max_new_tokens": new, "eos_token_id": None}
    given |= {"repetition_penalty": penalty} | ({"do_sample": True, "top_k": 20} if sampled else {})
    texts = []
    for own in ({"mode": "full"}, {"mode": "speculative", "lookup": True, "max_pending": longest}):
        torch.manual_seed(7)
        texts.append(model.generate(ids, **own, **(how if "lookup" in own else {}), **given))
    assert torch.equal(texts[0].sequences, texts[1].sequences)


@pytest.mark.parametrize("kind", ["text", "draft", "llama"])
def test_texts_and_exits_draft_and_are_kept_and_rejected_in_these_tests(by_turns, kind):
    """Else the other tests would not try what they are about."""
    model, how = way(kind)
    ids = torch.tensor([repeating(40)])
    out = model.generate(ids, mode="speculative", lookup=True, **how, **NEW)
    layers = out.exit_layers[0].tolist()
    assert 0 < layers.count(LOOKUP) < 30
    assert (kind == "text") == ({*layers} == {LOOKUP, DEPTH})


@pytest.mark.parametrize("kind", ["text", "draft"])
@pytest.mark.parametrize("length", [1, 9, 60])
def test_rounds_are_those_of_a_plain_loop(always, monkeypatch, kind, length):
    """Draft for draft, and how many are kept."""
    model, how = way(kind)
    rounds, look_up, keep = [], Row.look_up, Row.keep

    def looked(row, found):
        rounds.append((found, 0))
        look_up(row, found)

    def kept(row, number, own):
        if row.drafts and row.drafts[0].exit_layer == LOOKUP:
            rounds[-1] = rounds[-1][0], number
        keep(row, number, own)

    monkeypatch.setattr(Row, "look_up", looked)
    monkeypatch.setattr(Row, "keep", kept)
    how = {**how, "threshold": 1}
    prompted = repeating(length)
    out = model.generate(torch.tensor([prompted]), mode="speculative", lookup=True, **how, **NEW)
    text, expected = out.sequences[0].tolist(), []
    at = length + 1
    while at < len(text):
        most = min(8, len(text) - at - 1)
        found = found_by_transformers(text[:at], most, MATCH) if most else []
        number = 0
        while number < len(found) and found[number] == text[at + number]:
            number += 1
        expected.append((found, number))
        at += number + 1
    assert [one for one in rounds if one[0]] == [one for one in expected if one[0]]


def test_a_kept_token_is_as_sure_as_the_end_is_of_it(always):
    ids = torch.tensor([repeating(40)])
    model = good_exit("llama")
    full = model.generate(ids, mode="full", **NEW)
    out = model.generate(ids, mode="speculative", lookup=True, threshold=1, **NEW)
    assert (out.exit_layers == LOOKUP).any()
    # Layers so narrow may round otherwise in a window, see docs/decoding.md.
    torch.testing.assert_close(out.confidences, full.confidences, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["text", "draft", "llama"])
def test_greedy_texts_are_full_depths_in_half_precision(by_turns, kind):
    """Where windows round as single tokens do; see test_invariant."""
    make, more = (drafting, ()) if kind == "draft" else (good_exit, ("llama",))
    model = make.__wrapped__(*more).to(torch.bfloat16)
    ids, mask = padded([repeating(length, length) for length in (40, 22, 31)])
    given = {"attention_mask": mask, **NEW}
    full = model.generate(ids, mode="full", **given)
    out = model.generate(ids, mode="speculative", lookup=True, **way(kind)[1], **given)
    assert (out.exit_layers == LOOKUP).any()
    assert torch.equal(out.sequences, full.sequences)


# -- whether it pays -----------------------------------------------------------------------------


def looked_up(model, ids, **more):
    """How many drafts of its own each round of a text had."""
    found, learn = [], TextDrafts.learn

    def learned(pace, limit, drafted, kept):
        found.append(drafted)
        learn(pace, limit, drafted, kept)

    TextDrafts.learn = learned
    try:
        new = {"max_new_tokens": 200, "eos_token_id": None, "min_new_tokens": 200}
        model.generate(torch.tensor([ids]), mode="speculative", lookup=True, **more, **new)
    finally:
        del TextDrafts.learn
    return found


class Says:
    """A processor: what a text goes on with, whatever the model says."""

    def __init__(self, start, tokens):
        self.start, self.tokens = start, tokens

    def __call__(self, ids, scores):
        scores = torch.full_like(scores, -50.0)
        scores[:, self.tokens[ids.shape[1] - self.start]] = 0.0
        return scores


def longer():
    base = tiny("llama", max_position_embeddings=512)
    return EarlyExitModel.from_base(base, ExitConfig("2", arch="norm")).eval()


def test_a_text_that_repeats_itself_drafts_nearly_all_of_it():
    ids = prompt(30)
    says = Says(30, (ids * 9)[:201])
    rounds = looked_up(longer(), ids, threshold=1, logits_processor=[says])
    assert len(rounds) < 40
    assert rounds.count(0) < 4


def test_a_text_whose_repeats_go_on_otherwise_loses_little():
    """Every other token is one that came before, and what follows is new."""
    ids, draw = prompt(30), random.Random(1)
    said = [draw.choice(ids) if place % 2 else draw.randrange(3, 96) for place in range(201)]
    says = Says(30, said)
    rounds = looked_up(longer(), ids, threshold=1, logits_processor=[says])
    assert len(rounds) > 150
    assert any(rounds)
    assert len(rounds) + COST * sum(rounds) < 1.02 * 200


# -- what cannot be had --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"mode": "full"}, "lookup is not possible with mode full"),
        ({"mode": "threshold"}, "lookup is not possible with mode threshold"),
        ({"mode": "fixed", "exit_layers": [2]}, "lookup is not possible with mode fixed"),
        ({"lookup": "yes"}, "lookup 'yes' is not possible: give True or False"),
        ({"threshold": 2}, "threshold 2 is outside"),
        ({"exit_layers": [9]}, "exit layer 9 does not exist"),
    ],
)
def test_what_cannot_be_had_is_refused(asked, message):
    given = {"mode": "speculative", "lookup": True, **asked}
    with pytest.raises(UserError, match=message):
        good_exit("llama").generate(torch.tensor([prompt(5)]), max_new_tokens=3, **given)


def test_a_prompt_may_not_look_up_where_the_others_do_not():
    """As they share passes, which are made ready for what all may do."""
    model = good_exit("llama")
    engine = Engine(model, [2, 3], capacity=64)
    with pytest.raises(UserError, match="lookup is off for all prompts"):
        engine.submit(Request(prompt(5), Speculative(DEPTH, lookup=True), 30))
    prompts = [{"input_ids": prompt(5), "lookup": True}]
    with pytest.raises(UserError, match="prompt 0: lookup is off for all prompts"):
        next(model.generate_batch(prompts, mode="speculative", **NEW))


def test_prompts_of_a_batch_look_up_each_for_itself(always):
    model, ids = good_exit("llama"), repeating(30)
    prompts = [{"input_ids": ids, "lookup": lookup} for lookup in (True, False)]
    common = {"mode": "speculative", "lookup": True, "threshold": 0.02, "capacity": 100, **NEW}
    out = dict(model.generate_batch(prompts, **common))
    assert torch.equal(out[0].sequences, out[1].sequences)
    assert (out[0].exit_layers == LOOKUP).any()
    assert not (out[1].exit_layers == LOOKUP).any()


def test_an_exit_at_the_last_layer_is_no_hindrance():
    """It could not draft; the text can."""
    model = EarlyExitModel.from_base(tiny("llama"), ExitConfig("1/1", arch="norm")).eval()
    ids = torch.tensor([repeating(30)])
    out = model.generate(ids, mode="speculative", lookup=True, **NEW)
    assert torch.equal(out.sequences, model.generate(ids, mode="full", **NEW).sequences)
    with pytest.raises(UserError, match="cannot draft with the exit at the last layer"):
        model.generate(ids, mode="speculative", lookup=True, exit_layers="1/1", **NEW)


@pytest.mark.parametrize(
    ("arch", "cost", "texts"), [("draft", 0.02, True), ("norm", 0.5, True), ("norm", 0.02, False)]
)
def test_rounds_have_the_drafts_that_promise_more(monkeypatch, arch, cost, texts):
    """A text says what no model knows of, first anything, then its prompt again and again. An exit
    at a layer is asked as the end is, so it is always right, and costs much or little; a draft exit
    is always wrong."""
    monkeypatch.setattr("ee_tuning.decode.engine.draft_cost", lambda *_: cost)
    base = tiny("llama", max_position_embeddings=512)
    model = EarlyExitModel.from_base(base, ExitConfig("0" if arch == "draft" else "2", arch=arch))
    ids = prompt(30)
    says = Says(30, [*prompt(60, 5), *(ids * 6)])
    out = model.eval().generate(
        torch.tensor([ids]), mode="speculative", threshold=0.0, lookup=True,
        logits_processor=[says], max_new_tokens=200, eos_token_id=None,
    )  # fmt: skip
    layers = out.exit_layers[0].tolist()
    assert layers[:60].count(LOOKUP) < 10
    assert (layers[70:].count(LOOKUP) > 90) == texts
    assert (layers[70:].count(2) > 90) == (not texts)


def test_drafts_behind_more_tokens_count_for_themselves():
    """What goes on as before behind two tokens or three is drafted, however often it does not
    behind one."""
    text, ids = TextDrafts(8), [1, 2, 3, 4, 9, 1, 7, 8, 1, 2, 3]
    assert text.drafts(ids, 8) == [4, 9, 1, 7, 8, 1, 2, 3]
    for _ in range(9):
        text.learn(8, 8, 8)
    assert text.drafts([*ids, 9, 5, 9], 8)[:2] == [1, 7]  # the 9 alone was there
    for _ in range(9):
        text.learn(8, 8, 0)
    alone = text.outlook(9)
    assert text.drafts([*ids, 9, 5, 9, 1, 2, 3], 8)[0] == 4
    assert text.outlook(9)[-1][0] > 6 > 1.5 > alone[-1][0]
