"""Requests of all kinds at once say what each says alone."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from urllib.request import urlopen

import pytest
import torch
from helpers.lookups import let_texts_draft
from helpers.prompts import prompt
from helpers.serving import in_a_thread

from ee_tuning import EarlyExitModel, ExitConfig, UserError
from ee_tuning.decode import Speculative
from ee_tuning.serve.bodies import Generation
from ee_tuning.serve.config import ServeConfig, check_settings

WAYS = [
    {"mode": "full"},
    {"mode": "threshold", "threshold": 0.02},
    {"mode": "threshold", "threshold": {"1": 0.9, "2": 0.02, "3": 1.0}, "measure": "margin"},
    {"mode": "threshold", "threshold": 0.01, "exit_layers": [2], "measure": "entropy"},
    {"mode": "fixed", "exit_layers": [3]},
    {"mode": "speculative", "threshold": 0.0},
    {"mode": "speculative", "threshold": 0.02, "min_depth": 2},
    {"mode": "speculative", "threshold": 0.02, "lookup": True},
    {"mode": "speculative", "threshold": 1, "lookup": True},
    {"repetition_penalty": 1.3, "mode": "threshold", "threshold": 0.02},
]


@pytest.fixture(scope="module")
def model(tiny_exits):
    return EarlyExitModel.from_pretrained(tiny_exits).eval()


def test_a_hundred_mixed_requests_say_what_generate_says(tiny_server, model, tokenizer):
    ways = itertools.islice(itertools.cycle(WAYS), 100)
    asked = [(prompt(2 + i % 9, i), 5 + i % 13, way) for i, way in enumerate(ways)]

    def ask(one):
        ids, new, way = one
        # Log probabilities, streams and drafts of neighbours must not change a text.
        more = {"logprobs": 1} if new % 2 else {}
        found = tiny_server.complete(
            prompt=ids, max_tokens=new, temperature=0, return_exits=True, **way, **more
        )
        (choice,) = found["choices"]
        return [token["id"] for token in choice["ee"]["tokens"]], choice["ee"]["exit_layers"]

    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(ask, asked))
    # One way after another: each has an engine of its own.
    pairs = sorted(zip(asked, found, strict=True), key=lambda pair: WAYS.index(pair[0][2]))
    for (ids, new, way), (tokens, layers) in pairs:
        own = dict(way)
        if isinstance(own.get("threshold"), dict):
            own["threshold"] = {int(layer): value for layer, value in own["threshold"].items()}
        out = model.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False, **own)
        assert tokens == out.sequences[0, len(ids) :].tolist()
        if own["mode"] != "speculative":  # what is drafted depends on how fast rounds are
            assert layers == out.exit_layers[0].tolist()


def test_samples_depend_on_the_seed_alone(tiny_server):
    body = {"prompt": [5, 6, 7], "seed": 3, "max_tokens": 12, "ignore_eos": True}
    alone = tiny_server.complete(**body)["choices"][0]["text"]
    with ThreadPoolExecutor(16) as pool:
        others = [pool.submit(tiny_server.complete, **body | {"seed": i, "top_k": 5 + i})
                  for i in range(12)]  # fmt: skip
        again = [pool.submit(tiny_server.complete, **body) for _ in range(4)]
        assert {one.result()["choices"][0]["text"] for one in again} == {alone}
        assert len({one.result()["choices"][0]["text"] for one in others}) > 6


def test_streams_of_torn_characters_say_what_whole_replies_say(tiny_server):
    """Samples of an untrained model are bytes in any order; stop strings lie across tokens."""
    for seed in range(6):
        body = {"prompt": [9], "seed": seed, "max_tokens": 40, "ignore_eos": True, "n": 2}
        if seed % 2:
            body["stop"] = ["e", "\ufffd\ufffd", "ab"]
        whole = tiny_server.complete(**body)
        chunks = list(tiny_server.openai.completions.create(
            model=whole["model"], stream=True, prompt=body.pop("prompt"),
            extra_body={"ignore_eos": body.pop("ignore_eos")}, **body,
        ))  # fmt: skip
        for choice in whole["choices"]:
            own = [c for chunk in chunks for c in chunk.choices if c.index == choice["index"]]
            assert "".join(one.text for one in own) == choice["text"]
            assert [one.finish_reason for one in own if one.finish_reason] == [
                choice["finish_reason"]
            ]
            assert not any(stop in choice["text"] for stop in body.get("stop", []))


@pytest.fixture(scope="module")
def drafting(base, tmp_path_factory):
    """Exits at layers, and one that drafts."""
    folder = str(tmp_path_factory.mktemp("drafting") / "exits")
    model = EarlyExitModel.from_base(base, ExitConfig("0,1,2", arch=["draft", "mlp", "mlp"]))
    model.save_pretrained(folder)
    return folder


def test_a_draft_exit_serves_beside_the_others(drafting, monkeypatch):
    """Speculative requests draft with it unless they name other exits."""
    monkeypatch.setattr(Speculative, "steady", True)  # whether that pays or not
    ways = [{"mode": "speculative", "threshold": 0.0}, {"mode": "full"},
            {"mode": "speculative", "threshold": 0.0, "exit_layers": [1]},
            {"mode": "threshold", "threshold": 0.02}, {}]  # fmt: skip
    body = {"max_tokens": 20, "ignore_eos": True, "temperature": 0, "return_exits": True}
    with in_a_thread(exits=drafting, slots=6) as running, ThreadPoolExecutor(15) as pool:
        found = [
            pool.submit(running.complete, prompt=prompt(4, i % 3), **body, **ways[i % 5])
            for i in range(15)
        ]
        choices = [one.result()["choices"][0] for one in found]
        layers = [{*choice["ee"]["exit_layers"]} for choice in choices]
        for i, choice in enumerate(choices):
            whole = choices[next(k for k in range(15) if k % 5 == 1 and k % 3 == i % 3)]
            if i % 5 != 3:  # all but what leaves early is full depth's
                assert choice["text"] == whole["text"]
        assert all(own <= {0, 4} for own in layers[::5])
        assert all(own <= {1, 4} for own in layers[2::5])
        for choice in (*choices[::5], *choices[2::5]):
            own = choice["ee"]
            rejected = sum(len(token["rejected"]) for token in own["tokens"])
            assert own["drafted"] == own["kept"] + rejected > 0
        assert all(own <= {1, 2, 4} for own in layers[3::5])
        assert running.ask("/lens", {"tokens": [5, 6, 7], "first": 2})["places"]


def test_a_seed_gives_full_depths_text_though_drafts_are_made(drafting, monkeypatch):
    monkeypatch.setattr(Speculative, "steady", True)  # whether that pays or not
    body = {"prompt": prompt(4), "max_tokens": 30, "ignore_eos": True}
    body |= {"temperature": 0.7, "top_p": 0.9, "n": 3}
    with in_a_thread(exits=drafting, slots=3) as running:
        for seed in range(3):
            own = running.complete(**body, seed=seed, threshold=0.0)["choices"]
            full = running.complete(**body, seed=seed, mode="full")["choices"]
            assert [one["text"] for one in own] == [one["text"] for one in full]
            assert all(one["ee"]["drafted"] > one["ee"]["kept"] > 0 for one in own)
            assert len({one["text"] for one in own}) == 3


def test_texts_draft_for_themselves_where_there_are_no_exits(base, monkeypatch):
    """Whether that pays or not; the server may be asked for it by each request."""
    let_texts_draft(monkeypatch, most=3)
    body = {"prompt": prompt(6) * 6, "max_tokens": 40, "ignore_eos": True, "temperature": 0}
    with in_a_thread(model=base, slots=4) as running:
        (full,) = running.complete(**body, mode="full")["choices"]
        assert {*full["ee"]["exit_layers"]} == {4}
        for mode in ("speculative", "auto"):
            (own,) = running.complete(**body, mode=mode, lookup=True)["choices"]
            layers = own["ee"]["exit_layers"]
            assert own["text"] == full["text"]
            assert own["ee"]["kept"] == layers.count(-1) <= own["ee"]["drafted"]
            assert own["ee"]["mean_depth"] == pytest.approx(4 * layers.count(4) / 40, abs=1e-3)
            assert {*layers} == {-1, 4}
        assert 'layer="lookup"' in urlopen(f"{running.url}/metrics").read().decode()


@pytest.mark.parametrize(
    "settings",
    [{"mode": "threshold"}, {"mode": "full"}, {"threshold": "calibrated"}],
)
def test_a_server_that_verifies_nothing_looks_nothing_up(tiny_exits, settings):
    with pytest.raises(UserError, match="lookup is not possible with mode"):
        check_settings(ServeConfig(exits=tiny_exits, lookup=True, **settings))


def test_what_a_server_looks_up_by_default_is_for_requests_that_are_verified(tiny_exits):
    with in_a_thread(exits=tiny_exits, slots=4, lookup=True) as running:
        read = running.served.reader._policy
        asked = [{}, {"mode": "threshold"}, {"mode": "full"}, {"seed": 1}, {"lookup": False}]
        asked += [{"seed": 1, "lookup": True}, {"mode": "speculative"}]
        found = [read(Generation(**one)) for one in asked]
    assert [policy.lookup for policy in found] == [True, False, False, True, False, True, True]
    assert {policy.mode for policy in found[3:]} == {"speculative"}
