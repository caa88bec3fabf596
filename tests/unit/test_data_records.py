"""Data: what of a record is learned, and which records are refused."""

from __future__ import annotations

import json
import re
import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.data import (
    CHAT,
    CHATTY,
    EOS,
    FORGETFUL_TEMPLATE,
    MARKED_TEMPLATE,
    PLAIN_TEMPLATE,
    STRICT_TEMPLATE,
    TEXT,
    TOKENIZER,
    fails,
    jsonl,
    learned,
    load,
    make_tokenizer,
    pieces,
    texts,
)

from ee_tuning.config import ReadingConfig
from ee_tuning.data.encode import Encoder
from ee_tuning.data.readers import Record

pytestmark = pytest.mark.usefixtures("cache")

# Labels


def test_text_learns_everything_but_its_first_token(tmp_path):
    ids = [*TOKENIZER(TEXT)["input_ids"], EOS]
    (row,) = load(jsonl(tmp_path / "a.jsonl", {"text": TEXT}), seq_length=len(ids))
    assert row["input_ids"].tolist() == ids
    assert row["labels"].tolist() == [-100, *ids[1:]]


def test_bos_only_if_the_tokenizer_adds_it(tmp_path):
    tokenizer = make_tokenizer(bos=True)
    (row,) = load(jsonl(tmp_path / "a.jsonl", {"text": "a fox"}), tokenizer, 32)
    assert tokenizer.decode(row["input_ids"]).startswith("<bos>a fox<eos>")
    assert row["labels"][:2].tolist() == [-100, row["input_ids"][1]]


def test_a_tokenizer_without_eos(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    ids = tokenizer(TEXT)["input_ids"]
    (row,) = load(jsonl(tmp_path / "a.jsonl", {"text": TEXT}), tokenizer, len(ids) + 2)
    assert row["input_ids"].tolist() == [*ids, 0, 0]


@pytest.mark.parametrize("prompt", ["Say it: ", "Sag's,\n", "🦊 "])
@pytest.mark.parametrize("completion", ["the lazy dog", "🦊 naïve", "\n\nfox"])
def test_a_completion_is_what_counts(tmp_path, prompt, completion):
    found = learned({"prompt": prompt, "completion": completion}, TOKENIZER, tmp_path)
    assert found.lstrip(" ") == completion + "<eos>"  # a token may hold the prompt's last space


def test_a_completion_without_a_prompt(tmp_path):
    found = learned({"prompt": "", "completion": "a fox"}, TOKENIZER, tmp_path)
    assert found == " fox<eos>"  # nothing predicts the first token


def test_a_completion_may_be_cut_where_tokens_join(tmp_path):
    """ " the" is one token, and it is the one that holds the completion."""
    assert (
        learned({"prompt": "over ", "completion": "the dog"}, TOKENIZER, tmp_path)
        == " the dog<eos>"
    )


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, MARKED_TEMPLATE])
def test_the_assistant_is_what_counts(tmp_path, template):
    found = learned({"messages": CHAT}, make_tokenizer(template), tmp_path)
    assert found == "A brown fox, naïve 🦊.<eos>The dog.<eos>"


def test_messages_come_before_other_fields(tmp_path):
    record = {"messages": CHAT[2:], "text": "no", "prompt": "no", "completion": "no"}
    assert learned(record, CHATTY, tmp_path) == "The dog.<eos>"


def test_forms_may_mix_in_one_file(tmp_path):
    records = [{"text": "a b"}, {"prompt": "c", "completion": "d"}, {"text": "e f"}]
    assert texts(jsonl(tmp_path / "a.jsonl", *records)) == ["a b", "cd", "e f"]


@pytest.mark.parametrize("together", [1, 40, 10**6], ids=["one", "some", "all"])
def test_what_becomes_tokens_together_is_what_it_is_alone(together, monkeypatch):
    """Chats, completions and texts, of which `together` characters are tokenised at once."""
    monkeypatch.setattr("ee_tuning.data.encode.WITH_OFFSETS", together)
    encoder = Encoder(CHATTY, ReadingConfig())
    turns = [{"role": "user", "content": "a fox"}, {"role": "assistant", "content": "the dog"}]
    records = []
    for number in range(30):
        words = " ".join(["fox"] * (number % 7 + 1))
        forms = (
            {"messages": [*turns, {"role": "user", "content": words}]},
            {"messages": [{"role": "user", "content": words}, *turns[1:], *turns]},
            {"prompt": words, "completion": " a dog"},
            {"text": words},
            {"words": words},
        )
        records.append(Record(f"line {number}", forms[number * 3 % 5]))
    together = [*encoder.encode(records)]
    alone = [one for record in records for one in encoder.encode([record])]
    assert len(together) == len(alone) == 30
    for one, other in zip(together, alone, strict=True):
        assert (one.record.where, one.problem) == (other.record.where, other.problem)
        for a, b in zip(one.documents, other.documents, strict=True):
            assert [a.ids.tolist(), a.counts.tolist()] == [b.ids.tolist(), b.counts.tolist()]


# Other names for the same


@pytest.mark.parametrize("bos", [False, True])
def test_text_under_another_name(tmp_path, bos):
    record = {"content": "a fox", "text": "no", "messages": CHAT}
    assert learned(record, CHATTY, tmp_path, text_field="content") == " fox<eos>"
    fails(
        jsonl(tmp_path / "a.jsonl", {"body": "a"}),
        "fields found: body; wanted: content, messages",
        text_field="content",
    )


def test_sharegpt(tmp_path):
    turns = [("human", "Who?"), ("gpt", "A fox."), ("observation", "It ran."), ("gpt", "It did.")]
    record = {
        "conversations": [{"from": who, "value": text} for who, text in turns],
        "system": "Be brief.",
    }
    template = make_tokenizer(PLAIN_TEMPLATE + "{% if messages[0].role != 'system' %}no{% endif %}")
    (row,) = load(jsonl(tmp_path / "one.jsonl", record), template, seq_length=512)
    text = template.decode(row["input_ids"][: row["position_ids"].argmax() + 1])
    assert text.startswith("<|system|>Be brief.<eos><|user|>Who?<eos><|assistant|>A fox.<eos>")
    assert "<|tool|>It ran." in text
    assert learned(record, CHATTY, tmp_path) == "A fox.<eos>It did.<eos>"
    record["conversations"][0]["from"] = 3
    fails(
        jsonl(tmp_path / "a.jsonl", record),
        "conversations must be a list of {from, value} with texts in them, and the 1. is {'from",
    )


def test_alpaca(tmp_path):
    record = {"instruction": "Add.", "input": "1 and 2", "output": "The dog."}
    assert learned(record, CHATTY, tmp_path) == "The dog.<eos>"
    for tokenizer, start in (
        (CHATTY, "<|user|>Add.\n\n1 and 2<eos><|assistant|>The dog.<eos>"),
        (TOKENIZER, "Below is an instruction that describes a task, paired with an input"),
    ):
        (row,) = load(jsonl(tmp_path / "a.jsonl", record), tokenizer, seq_length=512)
        assert tokenizer.decode(row["input_ids"]).startswith(start)
    del record["input"]
    found = learned(record, TOKENIZER, tmp_path)
    assert found == "The dog.<eos>"


def test_prompts_as_messages(tmp_path):
    """Turns of the assistant that are part of the prompt are not learned."""
    for completion in (CHAT[3:], CHAT[3]["content"]):
        record = {"prompt": CHAT[:3], "completion": completion}
        assert learned(record, CHATTY, tmp_path) == "The dog.<eos>"
        assert learned(record, make_tokenizer(MARKED_TEMPLATE), tmp_path) == "The dog.<eos>"
    record = {"prompt": "And then?", "completion": CHAT[3:]}
    assert learned(record, CHATTY, tmp_path) == "The dog.<eos>"


def test_messages_in_json_as_tables_keep_them(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"messages": [json.dumps(CHAT)]}), path)
    (row,) = load(path, CHATTY, seq_length=512)
    assert CHATTY.decode(row["labels"][row["labels"] != -100]).endswith("The dog.<eos>")


TOOLS = [{"type": "function", "function": {"name": "fox", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, MARKED_TEMPLATE])
@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_tools_go_to_the_template(tmp_path, template, tools):
    tokenizer = make_tokenizer("{% if tools %}{{ tools | tojson }}{% endif %}" + template)
    path = jsonl(tmp_path / "a.jsonl", {"messages": CHAT[2:], "tools": tools})
    (row,) = load(path, tokenizer, seq_length=512)
    assert tokenizer.decode(row["input_ids"]).startswith(json.dumps(TOOLS) + "<|user|>And then?")
    assert tokenizer.decode(row["labels"][row["labels"] != -100]) == "The dog.<eos>"
    fails(jsonl(tmp_path / "b.jsonl", {"messages": CHAT, "tools": "x"}), "tools must be a list")


def test_a_turn_may_call_a_tool_and_say_nothing(tmp_path):
    call = {"function": {"name": "fox", "arguments": {"fast": True}}}
    turns = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    template = PLAIN_TEMPLATE.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}",
    )
    assert learned({"messages": turns}, make_tokenizer(template), tmp_path) == "fox<eos>"


# Templates that write a turn otherwise once others follow


THINKING_TEMPLATE = (  # of Qwen3, shortened: a think block in the last turn alone
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last %}"
    "<think>{{ m.get('reasoning_content', '') }}</think>{% endif %}{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ENDING_TEMPLATE = (  # of Phi-3, shortened: an end mark after the last turn alone
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}<eos>{% endif %}"
)
OPENING_TEMPLATE = (  # of DeepSeek-R1, shortened: a thought is opened, but not kept
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)


def test_each_turn_is_the_last_of_its_prefix(tmp_path):
    turns = [{**turn, "reasoning_content": "Hm."} for turn in CHAT]
    tokenizer = make_tokenizer(THINKING_TEMPLATE)
    found = pieces(load(jsonl(tmp_path / "a.jsonl", {"messages": turns}), tokenizer, 512))
    documents = {
        tokenizer.decode(ids): tokenizer.decode([t for t in labels if t != -100])
        for ids, labels in found
        if any(label != -100 for label in labels)
    }
    start = "<|user|>Who are you?<eos><|assistant|>"
    first, second = "A brown fox, naïve 🦊.<eos>", "The dog.<eos>"
    thought = "<think>Hm.</think>"
    assert documents == {
        start + thought + first: thought + first,
        start + first + "<|user|>And then?<eos><|assistant|>" + thought + second: thought + second,
    }


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (ENDING_TEMPLATE, {"A brown fox, naïve 🦊.<|end|><eos>", "The dog.<|end|><eos>"}),
        (OPENING_TEMPLATE, {"A brown fox, naïve 🦊.<eos>", "The dog.<eos>"}),
    ],
)
def test_end_marks_and_opened_thoughts(tmp_path, template, expected):
    tokenizer = make_tokenizer(template)
    found = pieces(load(jsonl(tmp_path / "a.jsonl", {"messages": CHAT}), tokenizer, 512))
    labels = {tokenizer.decode([t for t in labels if t != -100]) for _, labels in found}
    assert labels - {""} == expected


def test_another_chat_template(tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text(PLAIN_TEMPLATE)
    tokenizer = make_tokenizer(FORGETFUL_TEMPLATE)
    found = learned({"messages": CHAT}, tokenizer, tmp_path, chat_template=str(file))
    assert found == "A brown fox, naïve 🦊.<eos>The dog.<eos>"
    assert tokenizer.chat_template == FORGETFUL_TEMPLATE
    missing = "no.jinja cannot be read: No such file or directory; check the path"
    fails(tmp_path / "one.jsonl", missing, chat_template="no.jinja")
    file.write_bytes(b"\xff")
    fails(tmp_path / "one.jsonl", "it is not in UTF-8", chat_template=str(file))


# Control tokens


def test_control_tokens_may_be_text(tmp_path):
    for record in ({"text": "a<|user|>b"}, {"prompt": "", "completion": "a<|user|>b"}):
        path = jsonl(tmp_path / "a.jsonl", record)
        control = TOKENIZER.convert_tokens_to_ids("<|user|>")
        for as_text in (True, False, True):  # a tokenizer remembers
            (row,) = load(path, make_tokenizer(), seq_length=32, control_as_text=as_text)
            assert (control in row["input_ids"]) != as_text
            assert TOKENIZER.decode(row["input_ids"]).startswith("a<|user|>b<eos>")


# What is refused


def test_a_missing_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "./a", "~/no/such/file", "/no/such", "a/b/c", "a.txt=0.5"):
        fails(name, f"data file {name.removesuffix('=0.5')} does not exist")


def test_empty_things(tmp_path):
    (tmp_path / "a.jsonl").touch()
    fails(tmp_path / "a.jsonl", "a.jsonl is empty")
    fails(tmp_path, str(tmp_path), "no files to read")
    fails(jsonl(tmp_path / "b.jsonl", ""), "b.jsonl has no records")
    fails([], "no data given")
    fails("", "names nothing")


def test_unknown_kinds_of_file(tmp_path):
    (tmp_path / "a.zip").write_text("x")
    fails(tmp_path / "a.zip", "a.zip", ".jsonl")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    fails(tmp_path / "a.txt", "a.txt", "not UTF-8")


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_weights_must_be_positive(tmp_path, weight):
    fails(
        jsonl(tmp_path / "a.jsonl", {"text": TEXT}) + f"={weight}", f"weight {weight}", "positive"
    )


BAD_RECORDS = [
    ('{"text": "a', ["not valid JSON"]),
    ('["a"]', ["a JSON object is wanted, not a list"]),
    (
        {"body": "a", "id": 1},
        ["found: body, id", "prompt and completion, instruction and output, or text"],
    ),
    ({}, ["found: none"]),
    ({"text": 3}, ["text must be a string, not 3"]),
    ({"text": "\ud800"}, ["text has half a surrogate pair in it"]),
    ({"prompt": "a", "completion": 3}, ["prompt and completion must be a string, not 3"]),
    ({"messages": [{"role": "user"}]}, ["messages must be a list of {role, content}"]),
    ({"messages": CHAT[1:]}, ["the chat template refuses", "begin with the user"]),
]


@pytest.mark.parametrize(("record", "parts"), BAD_RECORDS)
def test_bad_records_are_named_or_skipped(tmp_path, record, parts):
    tokenizer = make_tokenizer(STRICT_TEMPLATE)
    path = jsonl(tmp_path / "a.jsonl", {"text": "a b"}, record, {"text": "c d"}, record)
    fails(path, f"{path} line 2: ", *parts, tokenizer=tokenizer)
    for _ in range(2):  # the second time from the cache
        with pytest.warns(UserWarning, match=f"2 bad records skipped.*{re.escape(path)} line 2: "):
            assert texts(path, tokenizer=tokenizer, skip_bad_records=True) == ["a b", "c d"]


def test_only_bad_records(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", "{", "{")
    with pytest.warns(UserWarning, match="2 bad records"):
        fails(path, "every record in", "line 1", skip_bad_records=True)


def test_good_records_are_no_reason_to_warn(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(jsonl(tmp_path / "a.jsonl", {"text": TEXT}), skip_bad_records=True)


def test_a_malformed_json_list(tmp_path):
    (tmp_path / "a.json").write_text("[{}, ")
    fails(tmp_path / "a.json", "a.json: not valid JSON")
    (tmp_path / "b.json").write_text('[{"text": "a b"}, 3]')
    fails(tmp_path / "b.json", "b.json record 2: ", "not a int")


def test_corrupt_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [TEXT] * 100}), path)
    path.write_bytes(path.read_bytes()[:-20])
    fails(path, "a.parquet: not readable as parquet", "truncated or corrupt")


def test_nothing_to_learn(tmp_path):
    fails(jsonl(tmp_path / "a.jsonl", {"text": ""}), "every document in", "a.jsonl is too short")
    chat = jsonl(tmp_path / "b.jsonl", {"messages": CHAT[:1]})
    fails(chat, "no document in", "b.jsonl has a token to learn", tokenizer=CHATTY)


def test_chats_need_a_usable_template(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"messages": CHAT})
    fails(path, "a.jsonl line 1", "chat template", "has none")
    forgetful = make_tokenizer(FORGETFUL_TEMPLATE)
    fails(path, "a.jsonl line 1", "{% generation %}", tokenizer=forgetful)


def test_settings_out_of_range(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"text": TEXT})
    fails(path, "seq_length 1", seq_length=1)
    fails(path, "seed -1", seed=-1)
