"""Requests of all kinds at once say what each says alone."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.prompts import prompt

from ee_tuning import EarlyExitModel

WAYS = [
    {"mode": "full"},
    {"mode": "threshold", "threshold": 0.02},
    {"mode": "threshold", "threshold": {"1": 0.9, "2": 0.02, "3": 1.0}, "measure": "margin"},
    {"mode": "threshold", "threshold": 0.01, "exit_layers": [2], "measure": "entropy"},
    {"mode": "fixed", "exit_layers": [3]},
    {"mode": "speculative", "threshold": 0.0},
    {"mode": "speculative", "threshold": 0.02, "min_depth": 2},
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
