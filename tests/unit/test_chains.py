"""Chains of the draft exit in decoding: lossless, and draft for draft those of a plain loop."""

from functools import cache

import pytest
import torch
from helpers.families import FAMILIES, tiny
from helpers.models import DEPTH, drafting
from helpers.prompts import padded, prompt
from helpers.sampled import assert_full_depths
from helpers.slow_decoder import draft_loop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ee_tuning import EarlyExitModel, ExitConfig, UserError
from ee_tuning.backbone.positions import RotaryTable
from ee_tuning.decode import Engine, Full, Request, Speculative
from ee_tuning.decode.sequences import Row
from ee_tuning.exit_config import DRAFT
from ee_tuning.passes.chains import Chains


@pytest.fixture
def rounds(monkeypatch):
    """Chains of full length, and what becomes of them: (slot, drafts, confidences, kept)."""
    seen = []
    draft, keep = Row.draft, Row.keep

    def drafted(row, drafts):
        draft(row, drafts)
        seen.append([row.slot, [d.id for d in drafts], [d.confidence for d in drafts]])

    def kept(row, number, own):
        if seen and seen[-1][0] == row.slot and len(seen[-1]) == 3:
            seen[-1].append(number)
        keep(row, number, own)

    monkeypatch.setattr(Row, "draft", drafted)
    monkeypatch.setattr(Row, "keep", kept)
    monkeypatch.setattr("ee_tuning.decode.limits.plan", lambda paces, *_: paces[0].longest)
    return seen


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    family=st.sampled_from(
        ["llama", "mistral", "gemma3", "opt", "gpt2", "qwen2", "gemma2", "eagle3", "eagle3"]
    ),
    vocabulary=st.sampled_from([0, 40]),
    bar=st.sampled_from([0.0, 0.01, 0.05, 0.1, 0.3]),
    longest=st.integers(1, 7),
    new=st.integers(1, 24),
    length=st.integers(1, 30),
    measure=st.sampled_from(["probability", "margin", "entropy"]),
)
def test_chains_are_those_of_a_plain_loop(
    rounds, family, vocabulary, bar, longest, new, length, measure
):
    """Draft for draft, with how sure each was, where a chain ends, and how many are kept."""
    length += family == "eagle3"  # whose plain loop leaves out the first token
    model, ids = drafting(family, vocabulary), prompt(length, length)
    rounds.clear()
    out = model.generate(
        torch.tensor([ids]), mode="speculative", threshold=bar, max_pending=longest,
        max_new_tokens=new, eos_token_id=None, measure=measure,
    )  # fmt: skip
    text, expected = draft_loop(model, ids, new, longest, bar, measure)
    assert out.sequences[0].tolist() == text
    found = [one for one in rounds if one[1]]
    expected = [one for one in expected if one.drafts]
    assert [(one[1], one[3]) for one in found] == [(one.drafts, one.kept) for one in expected]
    for one, same in zip(found, expected, strict=True):
        assert one[2] == pytest.approx(same.confidences, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "eagle3"])
@pytest.mark.parametrize("length", [5, 16, 40])
def test_prompts_that_are_read_in_windows(rounds, family, length, monkeypatch):
    """Each leaves the exit's K/V, too. In the sizes of compiled passes, not compiled."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for name in ("graphs", "passes", "prompts"):
        monkeypatch.setattr(f"ee_tuning.passes.{name}.CHUNK", 16)
    model, ids = drafting(family), prompt(length, length)
    out = model.generate(
        torch.tensor([ids]), mode="speculative", threshold=0.01, max_pending=3, compile=True,
        max_new_tokens=20, eos_token_id=None,
    )  # fmt: skip
    text, expected = draft_loop(model, ids, 20, 3, 0.01, "probability")
    assert out.sequences[0].tolist() == text
    found = [(one[1], one[3]) for one in rounds if one[1]]
    assert found == [(one.drafts, one.kept) for one in expected if one.drafts]


def test_drafts_are_kept_and_rejected_in_these_tests(rounds):
    """Else the other tests would not try what they are about."""
    for family in ("llama", "mistral", "gemma3", "eagle3"):
        drafting(family).generate(
            torch.tensor([prompt(9)]), mode="speculative", threshold=0.0, max_new_tokens=40,
            max_pending=3, eos_token_id=None,
        )  # fmt: skip
    kept, drafted = sum(one[3] for one in rounds), sum(len(one[1]) for one in rounds)
    assert 0.1 < kept / drafted < 0.9
    assert {one[3] for one in rounds} == {0, 1, 2, 3}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_full_depth(family):
    model, common = drafting(family), {"max_new_tokens": 24, "eos_token_id": None}
    ids = torch.tensor([prompt(5)])
    full = model.generate(ids, mode="full", **common).sequences
    out = model.generate(ids, mode="speculative", threshold=0.01, **common)
    assert torch.equal(out.sequences, full)
    assert {*out.exit_layers[0].tolist()} <= {DRAFT, DEPTH}


@settings(max_examples=25, deadline=None)
@given(
    family=st.sampled_from(["llama", "mistral", "gemma3", "opt", "gpt2", "qwen2"]),
    bar=st.floats(0, 0.2),
    max_pending=st.integers(1, 9),
    new=st.integers(1, 30),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
)
def test_batches_give_the_tokens_of_full_depth(family, bar, max_pending, new, lengths):
    """Rows of different lengths, each with chains of its own length, or none for a while."""
    model = drafting(family)
    ids, mask = padded([prompt(length, length) for length in lengths])
    common = {"attention_mask": mask, "max_new_tokens": new, "eos_token_id": None}
    out = model.generate(ids, mode="speculative", threshold=bar, max_pending=max_pending, **common)
    assert torch.equal(out.sequences, model.generate(ids, mode="full", **common).sequences)


def pausing(pause, monkeypatch):
    """Rounds of three drafts, so many without any before each; gives the rooms that were planned
    for, and of each chain the text that it followed and its drafts."""
    turns, seen, draft = [], [], Row.draft

    def plan(paces, rooms, clock):
        turns.append(rooms)
        return 3 if len(turns) % (pause + 1) == 0 else 0

    def drafted(row, drafts):
        seen.append((list(row.ids), [draft.id for draft in drafts]))
        draft(row, drafts)

    monkeypatch.setattr("ee_tuning.decode.limits.plan", plan)
    monkeypatch.setattr(Row, "draft", drafted)
    return turns, seen


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("pause", [3, 20])
def test_rounds_without_drafts_leave_nothing_out(family, pause, monkeypatch):
    """After a pause of any length chains are those of the plain loop again."""
    model, ids = drafting(family), prompt(9)
    _, seen = pausing(pause, monkeypatch)
    policy = Speculative(DEPTH, max_pending=3, bar=0.0)
    engine = Engine(model, [DRAFT], capacity=64, max_pending=3)
    assert len(list(engine.stream([Request(ids, policy, 50)]))) == 41
    assert seen
    for text, own in seen:
        _, (first, *_) = draft_loop(model, text[:-1], len(own) + 2, len(own), 0.0, "probability")
        assert own == first.drafts


@pytest.mark.parametrize("pause", [5, 17, 30])
def test_texts_that_rest_beside_prompts_leave_nothing_out(pause, monkeypatch):
    """In the sizes of compiled passes, not compiled: what the exit has not computed waits for one
    long window, though prompts are read beside it, as long as what it reads is kept."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for name in ("graphs", "passes", "prompts"):
        monkeypatch.setattr(f"ee_tuning.passes.{name}.CHUNK", 16)
    model, filled, fill = drafting("llama"), [], Chains.fill
    turns, seen = pausing(pause, monkeypatch)

    def filling(chains, links, starts):
        filled.append([len(link.ids) for link in links])
        fill(chains, links, starts)

    monkeypatch.setattr(Chains, "fill", filling)
    policy = Speculative(DEPTH, max_pending=3, bar=0.0)
    engine = Engine(model, [DRAFT], slots=4, capacity=96, max_pending=3, compile=True)
    lengths = [(9, 90), (5, 88), (7, 20), (3, 16), (30, 90), (17, 70)]
    requests = [Request(prompt(n, n), policy, most) for n, most in lengths]
    assert len(list(engine.stream(requests))) == sum(most - n for n, most in lengths)
    assert len([own for _, own in seen if own]) > 4
    for text, own in seen:
        if own:
            expected = draft_loop(model, text[:-1], len(own) + 2, len(own), 0.0, "probability")
            assert own == expected[1][0].drafts
    # What rests long is computed in few windows, each longer than those of drafts.
    assert max(map(max, filled)) == (8 if pause == 5 else 12)
    assert len(filled) < len(turns) / 6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_embeddings_from_a_table(family, dtype):
    """To the bit, where there is one of positions alone; others stay."""
    model = drafting(family).to(dtype)
    plain, looking = (model.backbone.block(model.draft.block) for _ in range(2))
    looking.look_up_positions(40)
    x = torch.randn(2, 3, plain.trunk.config.hidden_size).to(dtype)
    positions = torch.tensor([[3, 4, 5], [37, 38, 39]])
    mask = plain.masks(lambda _: torch.zeros(2, 1, 3, 3, dtype=dtype))
    found, expected = (segment(x, positions, boundaries=mask) for segment in (looking, plain))
    assert torch.equal(found.hidden, expected.hidden)
    tables = [one for one in looking.trunk.children() if isinstance(one, RotaryTable)]
    assert bool(tables) == (family not in ("gpt2", "opt", "gemma3", "gpt_bigcode", "biogpt"))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_tables_keep_what_they_say_of_positions(family, monkeypatch):
    """In memory that is filled as positions change, but where something else has to see them."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = drafting(family)
    plain, looking = (model.backbone.block(model.draft.block) for _ in range(2))
    looking.look_up_positions(40)
    looking.compile()
    dtype = model.backbone.dtype
    x = torch.randn(1, 1, plain.trunk.config.hidden_size).to(dtype)
    positions = torch.tensor([[3]])
    pairs = looking.keep_positions(positions)
    assert len(pairs) == (2 if family == "llama" else 0)
    mask = plain.masks(lambda _: torch.zeros(1, 1, 1, 1, dtype=dtype))
    for position in (3, 38) if pairs else (3,):
        positions.fill_(position)
        for table, own in pairs:
            own.copy_(table[positions])
        found, expected = (segment(x, positions, boundaries=mask) for segment in (looking, plain))
        assert torch.equal(found.hidden, expected.hidden)


def test_rows_of_every_mode_share_an_engine():
    model = drafting("llama")
    engine = Engine(model, [DRAFT], slots=3, capacity=64)
    policies = [Speculative(DEPTH, bar=0.0), Full(DEPTH), Speculative(DEPTH, bar=0.05)]
    prompts = [prompt(7, 1), prompt(12, 2), prompt(3, 3), prompt(9, 4), prompt(5, 5)]
    requests = [Request(ids, policies[i % 3], 40 + i) for i, ids in enumerate(prompts)]
    texts = {request: list(request.ids) for request in requests}
    for request, token in engine.stream(requests):
        texts[request].append(token.id)
    for request, text in texts.items():
        common = {"max_new_tokens": request.max_length - len(request.ids), "eos_token_id": None}
        full = model.generate(torch.tensor([request.ids]), mode="full", **common)
        assert full.sequences[0].tolist() == text


def test_an_end_token_within_a_chain_ends_it_as_at_full_depth():
    model, ids = drafting("llama"), torch.tensor([prompt(9)])
    free = model.generate(ids, mode="full", max_new_tokens=30, eos_token_id=None).sequences[0, 9:]
    for end in free.unique().tolist():
        common = {"max_new_tokens": 30, "eos_token_id": end}
        full = model.generate(ids, mode="full", **common).sequences
        out = model.generate(ids, mode="speculative", threshold=0.0, **common)
        assert torch.equal(out.sequences, full)


def test_a_row_that_is_given_up_leaves_the_others_alone():
    model = drafting("llama")
    engine = Engine(model, [DRAFT], slots=2, capacity=64)
    first, second = (Request(prompt(7, seed), Speculative(DEPTH, bar=0.0), 40) for seed in (1, 2))
    text = list(second.ids)
    for request, token in engine.stream([first, second]):
        if request is second:
            text.append(token.id)
            engine.cancel(first)
    common = {"max_new_tokens": 33, "eos_token_id": None}
    full = model.generate(torch.tensor([second.ids]), mode="full", **common)
    assert text == full.sequences[0].tolist()


def test_samples_have_the_full_models_distribution():
    """Three tokens of a vocabulary of 5, 4,000 draws."""
    torch.manual_seed(0)
    base = tiny("llama", vocab_size=5, eos_token_id=None, pad_token_id=None, bos_token_id=None)
    model = EarlyExitModel.from_base(base, ExitConfig("0", arch="draft")).eval()
    ids, draws, new, kept = torch.tensor([[1, 3]]), 4000, 3, 0
    counts = torch.zeros([5] * new)
    for _ in range(draws // 200):
        out = model.generate(
            ids, mode="speculative", threshold=0.0, num_return_sequences=200, do_sample=True,
            max_new_tokens=new, temperature=0.8,
        )  # fmt: skip
        for text in out.sequences[:, 2:].tolist():
            counts[tuple(text)] += 1
        kept += (out.exit_layers == DRAFT).sum().item()
    assert 0.05 < kept / draws / new < 0.5
    assert_full_depths(counts, model, ids, lambda _, logits: logits / 0.8)


@cache
def beside_others() -> EarlyExitModel:
    """A draft exit, and one at layer 2."""
    return EarlyExitModel.from_base(tiny("llama"), ExitConfig("0,2", arch="draft,norm")).eval()


def test_any_number_of_prompts_are_drafted_for():
    model = EarlyExitModel.from_base(tiny("llama"), ExitConfig("0", arch="draft"))
    prompts = [prompt(5 + seed, seed) for seed in range(5)]
    more = {"slots": 2, "max_new_tokens": 9, "do_sample": False}
    drafted = dict(model.generate_batch(prompts, mode="speculative", threshold=0.0, **more))
    full = dict(model.generate_batch(prompts, mode="full", **more))
    assert all(torch.equal(drafted[i].sequences, full[i].sequences) for i in range(5))
    assert any((drafted[i].exit_layers == DRAFT).any() for i in range(5))


def test_a_draft_exit_beside_others():
    """Alone it drafts where no exit is named; the others serve every mode as ever."""
    model, common = beside_others(), {"max_new_tokens": 12, "eos_token_id": None}
    ids = torch.tensor([prompt(9)])
    full = model.generate(ids, mode="full", **common).sequences
    for exits, layer in (("", DRAFT), ("0", DRAFT), ("2", 2)):
        out = model.generate(ids, mode="speculative", threshold=0.0, exit_layers=exits, **common)
        assert torch.equal(out.sequences, full)
        assert {*out.exit_layers[0].tolist()} <= {layer, DEPTH}
    out = model.generate(ids, mode="threshold", threshold=0.0, **common)
    assert 2 in out.exit_layers[0].tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "speculative", "exit_layers": "0,2"}, "drafts alone"),
        ({"mode": "threshold", "exit_layers": "0"}, "serves --mode speculative alone"),
        ({"mode": "fixed", "exit_layers": "0"}, "serves --mode speculative alone"),
        ({"mode": "speculative", "exit_layers": "0", "threshold": 1.5}, "outside"),
    ],
)
def test_what_a_draft_exit_cannot_do_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        beside_others().generate(torch.tensor([prompt(9)]), **settings)


def test_a_draft_exit_alone_serves_one_mode():
    with pytest.raises(UserError, match="draft exit alone"):
        drafting("llama").generate(torch.tensor([prompt(9)]), mode="threshold")
