"""OpenAI's own client against `ee-tuning serve` in a process of its own: every field."""

import math

import openai
import pytest

PROMPT = "def add(a, b):\n    "


@pytest.fixture(scope="module")
def client(process):
    return process.openai


def complete(client, prompt=PROMPT, **fields):
    given = {"model": client.models.list().data[0].id, "temperature": 0, "max_tokens": 8} | fields
    return client.completions.create(prompt=prompt, **given)


def say(client, **fields):
    given = {"model": client.models.list().data[0].id, "temperature": 0, "max_tokens": 8} | fields
    messages = given.pop("messages", [{"role": "user", "content": "Hello"}])
    return client.chat.completions.create(messages=messages, **given)


def test_a_completion(client):
    found = complete(client)
    (choice,) = found.choices
    assert found.object == "text_completion"
    assert choice.finish_reason == "length"
    assert found.usage.completion_tokens == 8
    assert found.usage.total_tokens == found.usage.prompt_tokens + 8
    assert len(choice.ee["exit_layers"]) == 8
    assert choice.ee["mean_depth"] == pytest.approx(sum(choice.ee["exit_layers"]) / 8)
    assert choice.ee["tokens_per_second"] > 0


def test_prompts_in_every_form(client, process):
    ids = process.ask("/tokenize", {"prompt": PROMPT})["tokens"]
    text = complete(client).choices[0].text
    assert complete(client, ids).choices[0].text == text
    for prompts in ([PROMPT, "import os"], [ids, ids[:3]]):
        found = complete(client, prompts)
        assert [choice.index for choice in found.choices] == [0, 1]
        assert found.choices[0].text == text
        assert found.usage.completion_tokens == 16
    assert process.ask("/detokenize", {"tokens": ids})["prompt"] == PROMPT
    read = complete(client, "", max_tokens=1).usage.prompt_tokens
    assert process.ask("/tokenize", {"prompt": ""})["count"] == read == 1


@pytest.mark.parametrize("call", [complete, say])
def test_a_stream_says_the_same_and_ends_once(client, call):
    chat = call is say
    whole = call(client, max_tokens=16)
    chunks = list(call(client, max_tokens=16, stream=True, stream_options={"include_usage": True}))
    *chunks, last = chunks
    assert last.choices == []
    assert last.usage == whole.usage
    choices = [choice for chunk in chunks for choice in chunk.choices]
    text = "".join(c.delta.content or "" if chat else c.text for c in choices)
    assert text == (whole.choices[0].message.content if chat else whole.choices[0].text)
    assert [c.finish_reason for c in choices if c.finish_reason] == ["length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert choices[-1].ee["exit_layers"] == whole.choices[0].ee["exit_layers"]
    if chat:
        assert choices[0].delta.role == "assistant"


def test_several_choices_and_seeds(client):
    fields = {"temperature": 1.0, "n": 3, "seed": 5, "max_tokens": 12}
    found = complete(client, **fields)
    texts = [choice.text for choice in found.choices]
    assert len(set(texts)) == 3
    assert [choice.text for choice in complete(client, **fields).choices] == texts
    assert [choice.text for choice in complete(client, **fields | {"seed": 6}).choices] != texts
    streamed = {}
    for chunk in complete(client, **fields, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + choice.text
    assert [streamed[index] for index in range(3)] == texts


def test_stop_strings_end_a_text_before_them(client):
    whole = complete(client, max_tokens=24).choices[0].text
    for stop in (whole[5:9], whole[6:16], [whole[10:13], "never"]):
        found = complete(client, max_tokens=24, stop=stop).choices[0]
        first = min(whole.find(one) for one in ([stop] if isinstance(stop, str) else stop)
                    if one in whole)  # fmt: skip
        assert found.text == whole[:first]
        assert found.finish_reason == "stop"
        chunks = complete(client, max_tokens=24, stop=stop, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == found.text


def test_log_probabilities_of_a_completion(client):
    found = complete(client, logprobs=3).choices[0]
    logprobs = found.logprobs
    assert "".join(logprobs.tokens) == found.text
    assert logprobs.text_offset[0] == 0
    for token, p, top, start in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, logprobs.text_offset,
        strict=True,
    ):  # fmt: skip
        assert found.text[start : start + len(token)] == token
        assert len(top) == 3
        assert top[token] == p == max(top.values()) <= 0
    chunks = list(complete(client, logprobs=3, stream=True))
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    assert [t for part in parts for t in part.tokens] == logprobs.tokens
    assert [t for part in parts for t in part.text_offset] == logprobs.text_offset
    assert len(complete(client, logprobs=0).choices[0].logprobs.top_logprobs[0]) == 1


def test_log_probabilities_of_a_chat(client):
    found = say(client, logprobs=True, top_logprobs=2).choices[0]
    content = found.logprobs.content
    assert b"".join(bytes(one.bytes) for one in content).decode() == found.message.content
    assert all(len(one.top_logprobs) == 2 for one in content)
    assert all(one.top_logprobs[0].logprob == one.logprob for one in content)
    assert say(client).choices[0].logprobs is None


def test_an_echo_has_the_prompt_and_its_log_probabilities(client):
    plain = complete(client)
    found = complete(client, echo=True, logprobs=2)
    choice, read = found.choices[0], found.usage.prompt_tokens
    assert choice.text == PROMPT + plain.choices[0].text
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.top_logprobs[0] is None
    assert len(choice.logprobs.tokens) == read + 8
    assert all(p <= 0 for p in choice.logprobs.token_logprobs[1:])
    offsets = choice.logprobs.text_offset
    assert all(
        choice.text[o:].startswith(t) for o, t in zip(offsets, choice.logprobs.tokens, strict=True)
    )
    # What was read is as likely as when it is written.
    again = complete(client, choice.text, echo=True, logprobs=2, max_tokens=0).choices[0]
    assert again.text == choice.text
    assert again.logprobs.tokens == choice.logprobs.tokens
    for a, b in zip(again.logprobs.token_logprobs[1:], choice.logprobs.token_logprobs[1:],
                    strict=True):  # fmt: skip
        assert math.isclose(a, b, abs_tol=1e-3)
    streamed = list(complete(client, echo=True, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == choice.text


@pytest.mark.parametrize("prompt", ["x", "", [5], ["ab cd", "x"]])
def test_prompts_alone_have_log_probabilities_and_an_end(client, prompt):
    """Also those of one token, after which there is nothing to say of the next."""
    fields = {"echo": True, "logprobs": 1, "max_tokens": 0, "n": 2}
    whole = complete(client, prompt, **fields).choices
    assert all(one.logprobs.token_logprobs[0] is None for one in whole)
    chunks = [one for c in complete(client, prompt, stream=True, **fields) for one in c.choices]
    for one in whole:
        own = [c for c in chunks if c.index == one.index]
        assert "".join(c.text for c in own) == one.text
        assert [token for c in own for token in c.logprobs.tokens] == one.logprobs.tokens
        assert [c.finish_reason for c in own if c.finish_reason] == ["length"]


def test_offsets_are_of_the_text_where_tokens_are_parts_of_characters(client):
    text = "s = 'é日本😀' + x"
    found = complete(client, text, echo=True, logprobs=0, max_tokens=0).choices[0]
    tokens, offsets = found.logprobs.tokens, found.logprobs.text_offset
    assert any(token.startswith("bytes:") for token in tokens)
    for token, start in zip(tokens, offsets, strict=True):
        assert token.startswith("bytes:") or found.text[start:].startswith(token)
    assert offsets == sorted(offsets)
    assert offsets[-1] == len(text) - len(tokens[-1])


def test_penalties_and_bias(client, process):
    plain = complete(client, max_tokens=40).choices[0].text
    for fields in ({"frequency_penalty": 2.0}, {"presence_penalty": 2.0},
                   {"extra_body": {"repetition_penalty": 1.5}}):  # fmt: skip
        assert complete(client, max_tokens=40, **fields).choices[0].text != plain
    (token,) = process.ask("/tokenize", {"prompt": " self"})["tokens"]
    assert complete(client, logit_bias={str(token): 100}).choices[0].text == " self" * 8
    first = process.ask("/tokenize", {"prompt": plain})["tokens"][0]
    assert not plain.startswith(complete(client, logit_bias={str(first): -100}).choices[0].text)


def test_the_samplers(client):
    greedy = complete(client).choices[0].text
    for body in ({"top_k": 1}, {"min_p": 1.0}):
        assert complete(client, temperature=1.0, extra_body=body).choices[0].text == greedy
    assert complete(client, temperature=1.0, top_p=1e-6).choices[0].text == greedy


def test_tokens_that_end_a_text(client, process):
    ids = process.ask("/tokenize", {"prompt": PROMPT + complete(client).choices[0].text})["tokens"]
    third = ids[len(process.ask("/tokenize", {"prompt": PROMPT})["tokens"]) + 2]
    found = complete(client, extra_body={"stop_token_ids": [third]})
    assert found.choices[0].finish_reason == "stop"
    assert found.usage.completion_tokens <= 3
    late = complete(client, extra_body={"stop_token_ids": [third], "min_tokens": 5})
    assert late.usage.completion_tokens >= 5
    end = {"logit_bias": {"0": 100}}  # the token that ends a text
    assert complete(client, **end).choices[0].text == ""
    assert complete(client, **end).choices[0].finish_reason == "stop"
    assert complete(client, **end, extra_body={"ignore_eos": True}).usage.completion_tokens == 8


def test_a_chat(client):
    parts = [{"type": "text", "text": "Hello"}]
    found = say(client, user="someone")
    assert found.choices[0].message.role == "assistant"
    assert say(client, messages=[{"role": "user", "content": parts}]).choices[0].message == (
        found.choices[0].message
    )
    answered = [{"role": "user", "content": "Hello"}, found.choices[0].message,
                {"role": "user", "content": "and?"}]  # fmt: skip
    assert say(client, messages=answered).usage.prompt_tokens > found.usage.prompt_tokens
    assert say(client, max_tokens=None, max_completion_tokens=3).usage.completion_tokens == 3
    text = say(client, response_format={"type": "text"}).choices[0].message.content
    assert text == found.choices[0].message.content


@pytest.mark.parametrize(
    ("body", "layers"),
    [
        ({"mode": "full"}, {16}),
        ({"mode": "fixed", "exit_layers": [4]}, {4}),
        ({"mode": "threshold", "threshold": 0.0}, {4, 16}),
        ({"mode": "threshold", "threshold": {"8": 0.0, "12": 1.0}, "min_depth": 8}, {8, 16}),
        ({"mode": "threshold", "threshold": "4:0", "exit_layers": "4"}, {4, 16}),
        ({"mode": "threshold", "threshold": 0.9, "measure": "margin"}, None),
    ],
)
def test_where_tokens_leave_is_a_requests_own(client, body, layers):
    found = complete(client, extra_body=body, max_tokens=12).choices[0].ee
    assert layers is None or set(found["exit_layers"]) == layers
    assert found["drafted"] == 0


def test_speculation_is_a_requests_own(client):
    plain = complete(client, extra_body={"mode": "full"}, max_tokens=16).choices[0]
    body = {"mode": "speculative", "threshold": 0.0, "exit_layers": [4], "return_exits": True}
    found = complete(client, extra_body=body, max_tokens=16).choices[0]
    assert found.text == plain.text
    assert found.ee["kept"] == sum(layer == 4 for layer in found.ee["exit_layers"])
    rejected = sum(len(token["rejected"]) for token in found.ee["tokens"])
    assert found.ee["drafted"] == found.ee["kept"] + rejected
    chunks = list(complete(client, extra_body=body, max_tokens=16, stream=True))
    tokens = [token for chunk in chunks for token in chunk.choices[0].ee["tokens"]]
    assert [token["exit_layer"] for token in tokens] == chunks[-1].choices[0].ee["exit_layers"]
    assert "".join(token["text"] for token in tokens) == found.text


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("temperature", {"temperature": 3}),
        ("temperature", {"temperature": 1e-9}),
        ("top_p", {"top_p": 0}),
        ("n", {"n": 0}),
        ("max_tokens", {"max_tokens": 5000}),
        ("max_tokens", {"max_tokens": 0}),
        ("prompt", {"prompt": "x " * 2000}),
        ("prompt", {"prompt": [5000]}),
        ("prompt", {"prompt": []}),
        ("stop", {"stop": ""}),
        ("logprobs", {"logprobs": 21}),
        ("logit_bias", {"logit_bias": {"9999": 1}}),
        ("logit_bias", {"logit_bias": {"a": 1}}),
        ("stream_options", {"stream_options": {"include_usage": True}}),
        ("suffix", {"suffix": "x"}),
        ("best_of", {"best_of": 2}),
        ("mode", {"extra_body": {"mode": "quick"}}),
        ("mode", {"extra_body": {"mode": "fixed"}}),
        ("threshold", {"extra_body": {"threshold": 2}}),
        ("threshold", {"extra_body": {"threshold": {"5": 0.5}}}),
        ("exit_layers", {"extra_body": {"exit_layers": [5]}}),
        ("exit_layers", {"extra_body": {"exit_layers": []}}),
        ("exit_layers", {"extra_body": {"mode": "full", "exit_layers": [4]}}),
        ("threshold", {"extra_body": {"mode": "full", "threshold": 0.5}}),
        ("threshold", {"extra_body": {"mode": "fixed", "exit_layers": [4], "threshold": 0.5}}),
        ("min_depth", {"extra_body": {"mode": "full", "min_depth": 4}}),
        ("min_tokens", {"extra_body": {"min_tokens": 9}}),
        ("stop_token_ids", {"extra_body": {"stop_token_ids": [4096]}}),
        ("max_pending", {"extra_body": {"max_pending": 3}}),
        ("lookup", {"extra_body": {"lookup": 1}}),
        ("lookup", {"extra_body": {"lookup": True, "mode": "threshold", "threshold": 0.5}}),
        ("lookup", {"extra_body": {"lookup": True, "mode": "full"}}),
        ("colour", {"extra_body": {"colour": "red"}}),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(client, field, fields):
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, **fields)
    assert refused.value.param == field
    assert field in refused.value.message


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("max_tokens", {"max_completion_tokens": 9}),
        ("tools", {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        ("response_format", {"response_format": {"type": "json_object"}}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("messages", {"messages": []}),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        ("audio", {"audio": {"format": "wav", "voice": "ash"}}),
    ],
)
def test_a_chat_refuses_by_name_too(client, field, fields):
    with pytest.raises(openai.BadRequestError) as refused:
        say(client, **fields)
    assert refused.value.param == field


def test_models_keys_and_wrong_names(client, process):
    (model,) = client.models.list().data
    assert model.exit_layers == [4, 8, 12]
    with pytest.raises(openai.NotFoundError):
        complete(client, model="gpt-4")
    for key in ("", "wrong"):
        wrong = openai.OpenAI(base_url=client.base_url, api_key=key or "x", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            wrong.models.list()
    assert process.ask("/health") == {"status": "ready"}
    assert set(process.ask("/version")) == {"version"}
    assert all("add(a" not in str(line) for line in process.log)
    assert {"path", "status", "seconds"} <= process.log[-1].keys()
