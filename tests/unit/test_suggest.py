"""What `suggest` predicts is what decoding does, and it says so when nothing pays."""

from __future__ import annotations

import json
import time
from functools import cache
from importlib import import_module

import pytest
import torch
from helpers.commands import fails
from helpers.families import tiny
from helpers.models import early_exit, good_exit
from helpers.prompts import prompt

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.cli import main
from ee_tuning.commands.suggest import advice
from ee_tuning.commands.suggest import suggest as command
from ee_tuning.costs import draft_cost
from ee_tuning.decode import Engine, Request, engines_of
from ee_tuning.decode.ahead import Ahead
from ee_tuning.decode.arguments import read_prompts
from ee_tuning.decode.pace import Clock
from ee_tuning.errors import UserError
from ee_tuning.suggest.config import SuggestConfig
from ee_tuning.suggest.predict import Costs, Heard, drafted, left
from ee_tuning.suggest.probes import heard, tuned, written
from ee_tuning.suggest.rounds import _sequence, leaving, measure, measure_full
from ee_tuning.suggest.run import Candidate, Suggestion

FREE = Costs({(0, False): 1.0, (0, True): 1.0, (8, False): 1.0, (8, True): 1.0}, prompt=0.0)


class Even(Clock):
    """A round takes as long as any, as `FREE` has it."""

    def learn(self, drafts, seconds, rounds=1):
        super().learn(drafts, 1.0, rounds)

    def share(self, drafts, seconds):
        return super().share(drafts, 1.0)


def spoken(model, number=3, length=6, new=24):
    return written(model, [prompt(length, seed) for seed in range(number)], new)


def test_written_texts_are_the_backbones_own():
    model = early_exit()
    texts = spoken(model)
    for seed, text in enumerate(texts):
        ids = torch.tensor([prompt(6, seed)])
        out = model.model.generate(ids, max_new_tokens=24, min_new_tokens=24, do_sample=False)
        assert out[0].tolist() == text
    samples = written(model, [[3]] * 20, 5, seed=1, seconds=0)
    assert len(samples) == 16  # those after the first ones are not begun any more
    assert len({tuple(ids) for ids in samples}) > 4


@pytest.mark.parametrize("threshold", [0.015, 0.02, 0.03])
@pytest.mark.parametrize("longest", [1, 3, 8])
def test_drafts_go_to_the_end_as_often_as_predicted(monkeypatch, threshold, longest):
    """Rounds are counted as decoding has them: its pace included."""
    model = good_exit.__wrapped__("llama")  # with an engine whose clock has seen nothing
    monkeypatch.setattr("ee_tuning.decode.engine.draft_cost", draft_cost)
    monkeypatch.setattr("ee_tuning.decode.sequences.Clock", Even)
    texts = spoken(model)
    said = heard(model, texts, 6)[2]
    assert [len(one.sure) for one in said] == [23] * 3
    told = drafted(said, threshold, longest, draft_cost(model, 2), FREE)
    ends, kept = 0, 0
    for text in texts:
        out = model.generate(
            torch.tensor([text[:6]]), mode="speculative", threshold=threshold, exit_layers=[2],
            max_pending=longest, max_new_tokens=24, min_new_tokens=24, do_sample=False,
        )  # fmt: skip
        assert out.sequences[0].tolist() == text
        ends += (out.exit_layers == 4).sum().item()
        kept += (out.exit_layers == 2).sum().item()
    assert (told.ends, told.tokens) == (ends, ends + kept)
    assert told.agreement == 1
    assert told.seconds == told.ends - 3  # a round each, but for the prompts' tokens


@cache
def chained():
    """A model with a tuned draft exit, texts of it, and what the exit said about these."""
    model = EarlyExitModel.from_base(tiny("llama"), ExitConfig("", arch="draft"))
    texts = spoken(model)
    with pytest.MonkeyPatch.context() as fewer:  # however long they take here
        fewer.setattr("ee_tuning.suggest.probes.STEPS", 100)
        tuned(model, texts, seconds=1e9)
    return model, texts, heard(model, texts, 6)[0]


@pytest.mark.parametrize("bar", [0.0, 0.0001, 0.002])
@pytest.mark.parametrize("longest", [1, 3, 8])
def test_chains_go_to_the_end_as_often_as_predicted(monkeypatch, bar, longest):
    """Whatever a draft exit says after what is right is known ahead; after that, nothing counts."""
    monkeypatch.setattr("ee_tuning.decode.engine.draft_cost", draft_cost)
    monkeypatch.setattr("ee_tuning.decode.sequences.Clock", Even)
    model, texts, said = chained()
    engines_of(model).clear()  # with the clocks of other cases
    assert [len(one) for one in said] == [23] * 3
    assert sum(said[0].right) > 3
    told = drafted(said, bar, longest, draft_cost(model, 0), FREE)
    ends, kept = 0, 0
    for text in texts:
        out = model.generate(
            torch.tensor([text[:6]]), mode="speculative", threshold=bar, max_pending=longest,
            max_new_tokens=24, min_new_tokens=24, do_sample=False,
        )  # fmt: skip
        assert out.sequences[0].tolist() == text
        ends += (out.exit_layers == 4).sum().item()
        kept += (out.exit_layers == 0).sum().item()
    assert (told.ends, told.tokens) == (ends, ends + kept)


def test_tokens_that_leave_for_good_are_counted():
    sure, right = [0.9, 0.1, 0.9, 0.9, 0.9], [True, True, False, True, True]
    told = left([Heard(sure, right)], 0.5, 2, FREE)
    # The prompt's token; one leaves, one does not; two leave, which is all that may.
    assert (told.tokens, told.ends, told.seconds) == (6, 3, 2)
    assert told.agreement == pytest.approx(5 / 6)
    assert left([Heard(sure, right)], 0.95, 2, FREE).ends == 6


def test_costs_between_measured_ones_lie_on_a_line():
    costs = Costs({(0, False): 1.0, (4, False): 3.0, (0, True): 2.0, (4, True): 2.0}, 0.0)
    assert [costs.round(n, asked=False) for n in (0, 1, 4, 9)] == [1.0, 1.5, 3.0, 3.0]
    assert costs.round(3, asked=True) == 2.0


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize(("number", "asked"), [(0, False), (0, True), (2, False), (8, False)])
def test_rounds_that_are_timed_have_so_many_tokens_that_leave(monkeypatch, drafts, number, asked):
    model = early_exit(arch="norm")
    monkeypatch.setattr("ee_tuning.decode.sampling.Chooser.verify", all_kept)
    layers = timed_layers(model, 2, number, leaving(model, 2, number, drafts, asked))
    assert layers == ([2] * number + [4]) * (18 // (number + 1))


@pytest.mark.parametrize("number", [0, 2, 8])
def test_rounds_of_a_draft_exit_have_so_many_drafts(monkeypatch, number):
    model = EarlyExitModel.from_base(tiny("llama"), ExitConfig("", arch="draft"))
    monkeypatch.setattr("ee_tuning.decode.sampling.Chooser.verify", all_kept)
    layers = timed_layers(model, 0, number, leaving(model, 0, number, drafts=True))
    assert layers == ([0] * number + [4]) * (18 // (number + 1))


@pytest.mark.parametrize("number", [0, 1, 3, 8])
@pytest.mark.parametrize("chains", [False, True])
def test_rounds_that_the_device_goes_ahead_with_are_timed(number, chains):
    """They have so many drafts, kept or not; or so many tokens leave."""
    exits = ExitConfig("", arch="draft") if chains else ExitConfig("2", arch="norm")
    model = EarlyExitModel.from_base(tiny("llama"), exits)
    layer = 0 if chains else 2
    policy = leaving(model, layer, number, drafts=chains)
    engine = Engine(model, [layer], capacity=96, max_pending=8)
    engine.ahead = Ahead(engine.passes, engine.sequences.stops)
    assert not chains or engine.ahead.rounds
    with _sequence(engine, policy, number, prompt(5)):
        tokens = [token for _ in range(24) for _, token in engine.step()]
    drafts, left = [], 0
    for token in tokens:
        left += token.exit_layer == layer
        if token.exit_layer == 4:
            drafts.append(left + len(token.rejected))
            left = 0
    assert len(drafts) > 2
    assert set(drafts[1:]) == {number}  # the first began before


def timed_layers(model, layer, number, policy):
    """Of the first 18 tokens, or as many as whole rounds have, that follow a prompt's."""
    engine, found = Engine(model, [layer], capacity=96), []
    engine.submit(Request(prompt(5), policy, 90))
    engine.step()
    (row,) = engine.sequences.live
    row.pace, row.limit = None, policy.max_pending
    while len(found) < 18:
        found += [token.exit_layer for _, token in engine.step()]
    return found[: 18 // (number + 1) * (number + 1)]


def all_kept(chooser, ids, said, drafts):
    return len(drafts), said[-1].token


def test_costs_are_measured():
    model = early_exit(arch="norm")
    full = measure_full(model, prompt(5))
    found = measure(model, 2, True, prompt(5), full)
    assert found.prompt == full.prompt > 0
    assert len(found.rounds) == 7
    assert all(seconds > 0 for seconds in found.rounds.values())


def test_a_call_is_timed_with_all_that_is_outside_of_rounds(monkeypatch):
    """In the same engine as rounds; what comes before a prompt is read counts, too."""
    model = EarlyExitModel.from_base(tiny("llama"), ExitConfig("2", arch="norm"))

    def slowly(*given):
        time.sleep(0.2)
        return read_prompts(*given)

    generate = import_module("ee_tuning.decode.generate")
    monkeypatch.setattr(generate, "read_prompts", slowly)
    full = measure_full(model, prompt(5))
    assert len(engines_of(model).kept) == 1
    assert full.prompt > 0.2 > full.round(0, asked=False)


def test_rounds_are_timed_once_at_least_and_less_often_in_less_time(monkeypatch):
    model, timed = early_exit(arch="norm"), []
    full = measure_full(model, prompt(5))
    monkeypatch.setattr("ee_tuning.suggest.rounds._go", lambda *way: timed.append(way) or 1.0)
    for seconds, times in ((0.0, 1), (float("inf"), 5)):
        timed.clear()
        found = measure(model, 2, True, prompt(5), full, seconds)
        assert len(timed) == 5 * 2 * (1 + times)  # kinds of rounds, beside full depth, begun first
        assert len(found.rounds) == 7


def test_probes_are_tuned_and_the_backbone_is_not():
    model = EarlyExitModel.from_base(tiny("llama"), ExitConfig("1,3", arch="layer"))
    texts = written(model, [[3]] * 8, 24, seed=0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert tuned(model, texts, seconds=1.0) > 0
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != name.startswith("exits."), name


def test_the_command_on_a_tiny_model(base, tmp_path, capsys, monkeypatch):
    for name, value in (("LENGTH", 24), ("TUNED", 12), ("ASKED", 4), ("LEAST_VOCABULARY", 300)):
        monkeypatch.setattr(f"ee_tuning.suggest.run.{name}", value)
    for name in ("ROUNDS", "TIMES"):
        monkeypatch.setattr(f"ee_tuning.suggest.rounds.{name}", 1)
    out = tmp_path / "found.json"
    flags = ["--minutes", "0.02", "--prompt-length", "4", "--max-new-tokens", "8"]
    main(["suggest", "--model", base, *flags, "--out", str(out)])
    found = json.loads(out.read_text())
    tried = [(one["layer"], one["arch"]) for one in found["candidates"] if not one["vocab"]]
    assert sorted(tried) == sorted(
        [(layer, arch) for layer in (1, 2, 3) for arch in ("norm", "layer")] + [(0, "draft")]
    )
    (fewer,) = [one for one in found["candidates"] if one["vocab"]]
    assert fewer["vocab"] == 64
    whole = max(
        (one for one in found["candidates"] if one["arch"] != "norm" and not one["vocab"]),
        key=lambda one: one["speedup"],
    )
    assert (fewer["layer"], fewer["arch"]) == (whole["layer"], whole["arch"])
    assert all(one["measured"] and one["speedup"] > 0 for one in found["candidates"])
    assert found["full"] > 0
    text = capsys.readouterr().out
    assert "drafting" in text
    assert "Probes had" in text


def test_it_says_whether_anything_pays():
    def said(speedup, leaving=None):
        one = Candidate(8, "layer", 0.7, speedup, 0.6, 4, 1.8, leaving, True)
        found = Suggestion([one], 100.0, {"norm": 30}, 60.0)
        return "\n".join(advice(SuggestConfig(model="m"), found))

    draft = Candidate(0, "draft", 0.5, 1.8, 0.1, 6, 2.9, None, True, 3072)
    (_, tune, decode, _) = advice(SuggestConfig(model="m"), Suggestion([draft], 9.0, {}, 1.0))
    assert "--model m --arch draft --exit-vocab 3072 --head shared" in tune
    assert "--mode speculative --threshold 0.1 --max-pending 6" in decode
    assert "no exit will pay here: the best that was timed promises 0.93×" in said(0.93)
    assert "--layers 8 --arch layer" not in said(0.93)
    text = said(1.4, (1.6, 0.8, 0.97))
    assert "1.40× full depth's speed (140 tokens/s)" in text
    assert "--threshold 0.6 --max-pending 4" in text
    assert "--mode threshold --threshold 0.8, a layer exit after layer 8 promises 1.60×" in text


def test_mistakes(base, tmp_path, capsys):
    for flags, words in (
        ([], "no backbone given"),
        (["--model", base, "--minutes", "0"], "minutes 0 is no time"),
        (["--model", base, "--prompt-length", "1"], "prompt_length 1 is too small"),
        (["--model", base, "--max-new-tokens", "120"], "do not fit into the context of 128"),
    ):
        assert words in fails(capsys, "suggest", *flags)


def test_only_what_was_suggested_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "ee_tuning.commands.suggest.search", lambda *_: Suggestion([], 1.0, {}, 0.0)
    )
    config = SuggestConfig(model="base", out=str(tmp_path / "found.json"), device="cpu")
    for _ in range(2):
        command(config)
    (tmp_path / "found.json").write_text('{"text": "mine"}')
    with pytest.raises(UserError, match="suggest did not write it: choose another --out"):
        command(config)
    assert (tmp_path / "found.json").read_text() == '{"text": "mine"}'
