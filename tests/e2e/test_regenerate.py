"""`ee-tuning regenerate` on a tiny model: forms, shares, repeats, and files to the byte."""

import json
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch
from helpers.commands import fails
from helpers.data import PLAIN_TEMPLATE, jsonl, load, make_tokenizer
from helpers.writing import ENDS, save_writer, settings

from ee_tuning.cli import main
from ee_tuning.data.sources import parse_source
from ee_tuning.errors import Interrupted, Notice, UserError
from ee_tuning.regenerate.config import RegenerateConfig
from ee_tuning.regenerate.prompts import in_turns, prompts
from ee_tuning.regenerate.run import Display, regenerate
from ee_tuning.regenerate.template import ends_by_mark, read_template

pytestmark = pytest.mark.filterwarnings("ignore:ignored. max_question_tokens")  # of `settings`
CHATTY = make_tokenizer(PLAIN_TEMPLATE)
MARKED = (
    "{% for m in messages %}{{ '[I] ' + m.content + ' [/I]' if m.role == 'user' "
    "else m.content + eos_token }}{% endfor %}"
)
CHAT = {
    "messages": [
        {"role": "user", "content": "The quick fox?"},
        {"role": "assistant", "content": "Jumps."},
        {"role": "user", "content": "The dog?"},
        {"role": "assistant", "content": "Lazy."},
    ]
}


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A model with a chat template."""
    return save_writer(tmp_path_factory.mktemp("chatty"), CHATTY)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model without, whose texts begin with <bos>."""
    tokenizer = make_tokenizer(bos=True)
    tokenizer.bos_token = "<bos>"
    return save_writer(tmp_path_factory.mktemp("plain"), tokenizer)


@pytest.fixture(scope="module")
def own(chatty, tmp_path_factory):
    """The files that it writes in one go, by seed."""
    folder = tmp_path_factory.mktemp("own")
    for seed in (0, 1):
        write(chatty, folder / f"{seed}.jsonl", seed=seed)
    return [folder / f"{seed}.jsonl" for seed in (0, 1)]


def write(model, out, display=None, **changes):
    """Run, and give the records."""
    regenerate(RegenerateConfig(**settings(model, out, **changes)), display)
    return read(out)


def read(out):
    """The records of a file."""
    lines = Path(out).read_text(encoding="utf-8").split("\n")  # not at other ends of lines
    return [json.loads(line) for line in lines if line]


class Stops(Display):
    """Stops a run when so many parts of texts have ended, or so many waves are in the file."""

    def __init__(self, parts=0, waves=0):
        self.parts, self.waves = parts, waves

    def advance(self, tokens):
        self.parts -= 1
        if self.parts == 0:
            raise KeyboardInterrupt

    def settled(self, done):
        self.waves -= 1
        if self.waves == 0:
            raise KeyboardInterrupt


# -- forms ---------------------------------------------------------------------------------------


def test_an_instructed_model_writes_question_and_answer(own):
    records = read(own[1])
    assert len(records) > 10
    for record in records:
        question, answer = record["messages"]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        for turn in (question, answer):
            assert turn["content"].strip()
            assert "<|" not in turn["content"]
            assert "<eos>" not in turn["content"]
        assert question["content"] == question["content"].strip()
        assert record["source"] == "nothing"
    assert len({record["finished"] for record in records}) == 2
    rows = load(own[1], CHATTY, seq_length=64)
    assert len(rows) > 5


def test_a_base_model_writes_texts_from_its_first_token(plain, tmp_path):
    records = write(plain, tmp_path / "own.jsonl", drop_unfinished=True)
    assert all({*record} == {"text", "source", "finished"} for record in records)
    assert all(record["finished"] for record in records)
    assert len(load(tmp_path / "own.jsonl", seq_length=64)) > 5


def test_what_is_written_is_what_transformers_would_sample_from(chatty, tmp_path):
    """Greedy answers are those of transformers' own generate."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = jsonl(tmp_path / "data.jsonl", *({"prompt": f"The fox {i}?"} for i in range(3)))
    changes = {"data": [data], "temperature": 0.0, "tokens": 1, "slots": 3}
    (record,) = write(chatty, tmp_path / "own.jsonl", **changes)
    model, tokenizer = (
        kind.from_pretrained(chatty) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    ids = tokenizer.apply_chat_template(
        record["messages"][:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    full = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :].tolist()
    full = full[:-1] if full[-1] in ENDS else full
    assert record["messages"][1]["content"] == tokenizer.decode(full, skip_special_tokens=True)


def test_prompts_of_every_form_are_gone_on_with(chatty, tmp_path):
    data = jsonl(
        tmp_path / "data.jsonl",
        CHAT,
        {"prompt": "What is a fox?"},
        {"instruction": "Jump", "input": "over the dog", "output": "no"},
        {"text": "The quick brown fox jumps over the lazy dog. " * 30},
    )
    records = write(
        chatty, tmp_path / "own.jsonl", data=[data], dedup=False, tokens=300, slots=4,
        prompt_tokens=4, top_p=1.0,
    )  # fmt: skip
    several = next(one for one in records if isinstance(one.get("prompt"), list))
    document = next(one for one in records if isinstance(one.get("prompt"), str))
    questions = [one["messages"][0] for one in records if "messages" in one]
    assert several["prompt"] == CHAT["messages"][:3]
    assert [turn["role"] for turn in several["completion"]] == ["assistant"]
    for asked in ("What is a fox?", "Jump\n\nover the dog"):
        assert {"role": "user", "content": asked} in questions
    assert document["prompt"] == "The quick brown fox"
    assert document["completion"]
    assert {record["source"] for record in records} == {data}
    assert len(load(tmp_path / "own.jsonl", CHATTY, seq_length=64)) > 2


def test_a_system_prompt_is_in_every_chat_that_has_none(chatty, tmp_path):
    data = jsonl(tmp_path / "data.jsonl", {"prompt": "A fox?"}, {"prompt": "A dog?"})
    more = {"data": [data], "from_nothing": 0.5, "system": "Be quick."}
    for record in write(chatty, tmp_path / "own.jsonl", **more):
        assert record["messages"][0] == {"role": "system", "content": "Be quick."}
        assert [turn["role"] for turn in record["messages"][1:]] == ["user", "assistant"]


def test_a_template_says_how_a_turn_begins_and_ends():
    found = read_template(CHATTY, "", {7})
    assert CHATTY.decode(found.before) == "<|user|>"
    assert found.ends == {7, CHATTY.eos_token_id}
    assert not found.mark
    assert CHATTY.decode(read_template(CHATTY, "Be.", {7}).before) == "<|system|>Be.<eos><|user|>"
    marked = make_tokenizer(MARKED)
    found = read_template(marked, "", {7})
    assert (found.mark, marked.decode(found.before)) == ("[/I]", "[I] ")
    ids = marked("[I] The fox? [/I]").input_ids
    stops = ends_by_mark(marked, found, 3)
    assert [stops(ids, length) for length in range(4, len(ids) + 1)][-2:] == [False, True]


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            ["begins with the user's words", "--data"],
        ),
        ("{% for m in messages %}x{{ m.content | upper }}{% endfor %}", ["does not show"]),
        ("{{ raise_exception('no') }}", ["chat template fails: no"]),
    ],
)
def test_templates_that_do_not_serve_are_refused(template, parts):
    with pytest.raises(UserError) as error:
        read_template(make_tokenizer(template), "", {7})
    for part in parts:
        assert part in str(error.value)


# -- shares and repeats --------------------------------------------------------------------------


def test_sources_have_their_shares_at_every_number():
    turns = list(islice(in_turns([0.5, 0.3, 0.2]), 1000))
    for count in (10, 100, 1000):
        for place, share in enumerate([0.5, 0.3, 0.2]):
            assert abs(turns[:count].count(place) - share * count) <= 1


def test_shares_of_sources_are_those_of_the_texts(chatty, tmp_path):
    first = jsonl(tmp_path / "a.jsonl", *({"prompt": f"A fox {i}?"} for i in range(7)))
    second = jsonl(tmp_path / "b.jsonl", *({"prompt": f"A dog {i}?"} for i in range(99)))
    config = RegenerateConfig(model=chatty, data=[f"{first}=3", second], from_nothing=0.2)
    sources = [parse_source(text) for text in config.data]
    found = list(islice(prompts(config, sources, True), 100))
    names = [prompt.source for prompt in found]
    assert [names.count(name) for name in (first, second, "nothing")] == [60, 20, 20]
    asked = [prompt.messages[0]["content"] for prompt in found if prompt.source == first]
    assert asked[:8] == [*(f"A fox {i}?" for i in range(7)), "A fox 0?"]


def test_a_text_comes_once_unless_asked_otherwise(chatty, tmp_path):
    """The likeliest answers to two prompts are always the same."""
    data = jsonl(tmp_path / "data.jsonl", {"prompt": "A fox?"}, {"prompt": "A dog?"})
    more = {"data": [data], "temperature": 0.0}
    records = write(chatty, tmp_path / "all.jsonl", dedup=False, tokens=100, **more)
    assert len({json.dumps(record) for record in records}) == 2
    assert len(write(chatty, tmp_path / "own.jsonl", tokens=10_000, **more)) == 2


def test_greedily_every_prompt_is_gone_on_from_once(chatty, tmp_path, monkeypatch):
    """A source that has run out leaves its turns to the others, up to the last prompt."""
    files = [
        jsonl(tmp_path / f"{len(numbers)}.jsonl", *({"prompt": f"A fox {i}?"} for i in numbers))
        for numbers in (range(3), range(3, 20))
    ]
    more, said = {"data": files, "temperature": 0.0, "tokens": 1e6}, []
    monkeypatch.setattr(Display, "say", lambda self, text: said.append(text))
    records = write(chatty, tmp_path / "own.jsonl", Display(), **more)
    asked = sorted(int(record["messages"][0]["content"][6:-1]) for record in records)
    assert asked == list(range(20))
    assert "no more prompts" in said[-1]
    assert write(chatty, tmp_path / "own.jsonl", Display(), resume=True, **more) == records


def test_a_question_comes_once(chatty, tmp_path, monkeypatch):
    """Of a model that has 20 questions in mind, each with its answer."""
    monkeypatch.setattr("ee_tuning.regenerate.writer.seed_of", lambda seed, i, part: i % 20)
    with pytest.raises(UserError, match="duplicate"):
        write(chatty, tmp_path / "own.jsonl", tokens=1e6)
    records = [json.loads(line) for line in (tmp_path / "own.jsonl").read_text().splitlines()]
    asked = [record["messages"][0]["content"] for record in records]
    assert 5 < len({*asked}) == len(asked) <= 20


# -- to the byte ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [{"parts": 5}, {"parts": 30}, {"waves": 1}, {"waves": 3}])
def test_a_run_that_was_interrupted_leaves_the_same_file(chatty, own, tmp_path, stop):
    out = tmp_path / "own.jsonl"
    with pytest.raises(Interrupted) as stopped:
        write(chatty, out, Stops(**stop))
    assert ("go on with --resume" in str(stopped.value)) == out.exists()
    write(chatty, out, resume=True)
    assert out.read_bytes() == own[0].read_bytes()
    before = out.read_bytes()
    write(chatty, out, resume=True)
    assert out.read_bytes() == before


def test_a_run_that_was_interrupted_behind_its_only_wave_says_that_it_is_there(chatty, tmp_path):
    out = tmp_path / "own.jsonl"
    with pytest.raises(Interrupted, match=f"whole waves are in {out}, go on with --resume"):
        write(chatty, out, Stops(waves=1), tokens=20)
    assert out.read_bytes()


def test_more_tokens_later_are_those_of_one_run(chatty, tmp_path):
    out, data = tmp_path / "own.jsonl", jsonl(tmp_path / "d.jsonl", {"prompt": "A fox?"})
    more = {"data": [data], "from_nothing": 0.5}
    write(chatty, out, tokens=300, **more)
    with out.open("ab") as file:
        file.write(b"what was cut off")
    write(chatty, out, tokens=1000, resume=True, **more)
    write(chatty, tmp_path / "whole.jsonl", tokens=1000, **more)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_another_seed_gives_other_texts(own):
    found = [read(path) for path in own]
    assert found[0][0]["messages"] != found[1][0]["messages"]


def test_what_is_replaced_stays_until_there_is_something_new(chatty, tmp_path):
    out = tmp_path / "own.jsonl"
    write(chatty, out)
    before = out.read_bytes()
    with pytest.raises(Interrupted, match=f"before a wave was whole: {out} is as it was"):
        write(chatty, out, Stops(parts=2), overwrite=True, seed=1)
    assert out.read_bytes() == before
    write(chatty, out, overwrite=True, seed=1)
    assert out.read_bytes() != before


# -- the command ---------------------------------------------------------------------------------


def test_the_command_says_what_it_wrote(chatty, tmp_path, capsys):
    out = tmp_path / "own.jsonl"
    flags = ["--tokens", "500", "--slots", "6", "--max-new-tokens", "40", "--device", "cpu"]
    main(["regenerate", "--model", chatty, "--out", str(out), *flags])
    said = capsys.readouterr()
    assert f"{out}: " in said.out
    assert "from nothing" in said.out
    assert "writing 500 tokens of chats, 100% from nothing; 6 at a time" in said.err
    fails_with = fails(capsys, "regenerate", "--model", chatty, "--out", out, *flags)
    assert "go on with --resume, or replace it with --overwrite" in fails_with


def test_settings_that_nothing_asks_for_are_named(plain, tmp_path):
    given = {"text_field": "foo", "prompt_tokens": 5, "max_question_tokens": 3}
    with pytest.warns(Notice, match="ignored: text_field .*prompt_tokens .*max_question_tokens "):
        write(plain, tmp_path / "own.jsonl", **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "no model given"),
        ({"out": ""}, "name the file to write with --out"),
        ({"out": "own.txt"}, "name the file to write with --out"),
        ({"data": "nowhere.jsonl"}, "does not exist"),
        ({"from-nothing": "0.5"}, "name some with --data"),
        ({"from-nothing": "2"}, "is no share"),
        ({"tokens": "0"}, "give at least 1"),
        ({"top-p": "1.5"}, "top_p is 1.5: it must be above 0 and at most 1"),
        ({"top-p": "0"}, "top_p is 0: it must be above 0 and at most 1"),
        ({"min-p": "-0.1"}, "min_p is -0.1: it must be at least 0 and at most 1"),
        ({"temperature": "-1"}, "negative"),
        ({"temperature": "0"}, "are the same: raise it"),
        ({"max-new-tokens": "0"}, "give at least 1"),
        ({"form": "text"}, "no BOS token"),
    ],
)
def test_mistakes_are_one_line(chatty, tmp_path, capsys, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    flags = {"model": chatty, "out": "own.jsonl", "tokens": "100", "device": "cpu"} | changes
    assert message in fails(capsys, "regenerate", *(f"--{k}={v}" for k, v in flags.items()))
    assert not list(tmp_path.iterdir())


STOPPED = r"^of the last 64 texts none was kept: unfinished .*; raise --max-new-tokens, or leave"


def test_a_run_that_keeps_nothing_stops_but_not_after_a_few_texts(plain, tmp_path):
    with pytest.raises(UserError, match=STOPPED):
        write(plain, tmp_path / "own.jsonl", slots=2, max_new_tokens=1, drop_unfinished=True)


def test_a_model_that_cannot_begin_from_nothing_is_refused(tmp_path, capsys):
    model = save_writer(tmp_path / "base", make_tokenizer(), bos_token_id=None)
    flags = ["--model", model, "--out", tmp_path / "own.jsonl", "--device", "cpu"]
    said = fails(capsys, "regenerate", *flags)
    assert "the tokenizer has no chat template and no BOS token; give prompts with --data" in said
    said = fails(capsys, "regenerate", *flags, "--form", "chat")
    assert "the tokenizer has no chat template" in said


def test_files_that_are_not_ours_or_were_begun_otherwise_are_left_alone(chatty, tmp_path):
    out = tmp_path / "own.jsonl"
    out.write_text("{}\n")
    for more in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError, match="regenerate did not write it"):
            write(chatty, out, **more)
    out.unlink()
    write(chatty, out)
    for more, message in (
        ({"temperature": 0.5}, r"temperature 1.0, now 0.5"),
        ({"slots": 5}, r"begun with slots \d+, now 5"),
        ({"data": [jsonl(tmp_path / "d.jsonl", {"prompt": "A?"})], "from_nothing": 0.5}, "begun"),
        ({"overwrite": True}, "exclude each other"),
    ):
        with pytest.raises(UserError, match=message):
            write(chatty, out, resume=True, tokens=2000, **more)
    whole = out.read_text()
    for other in (f"mine\n{whole}", f"[]\n{whole}", "{}\n" * len(whole)):
        out.write_text(other)
        with pytest.raises(UserError, match="was changed since"):
            write(chatty, out, resume=True, tokens=2000)
        assert out.read_text() == other
    out.write_text("")
    with pytest.raises(UserError, match="was changed since"):
        write(chatty, out, resume=True, tokens=2000)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda _: None, "it holds None, no JSON object"),
        (lambda state: state | {"totals": 3}, "totals is 3, it must be of type dict"),
        (lambda state: {"format_version": 1}, "it lacks settings, size, slots, totals, waves"),
    ],
)
def test_a_damaged_state_is_a_line(chatty, own, tmp_path, damage, message):
    out, state = tmp_path / "0.jsonl", tmp_path / ".0.jsonl.regenerate.json"
    shutil.copy(own[0], out)
    before = json.loads(own[0].with_name(state.name).read_text())
    state.write_text(json.dumps(damage(before)))
    with pytest.raises(UserError, match=f"{message}: begin again with --overwrite$"):
        write(chatty, out, resume=True)


def test_malformed_records_stop_or_are_counted(chatty, tmp_path):
    data = jsonl(tmp_path / "data.jsonl", {"prompt": "A fox?"}, "{", {"prompt": 3})
    with pytest.raises(UserError, match=r"data.jsonl line 2.*--skip-bad-records"):
        write(chatty, tmp_path / "own.jsonl", data=[data])
    config = settings(chatty, tmp_path / "own.jsonl", data=[data], skip_bad_records=True, tokens=50)
    assert regenerate(RegenerateConfig(**config)).left_out["malformed"] >= 1


def test_nothing_of_torch_is_touched(chatty, tmp_path):
    """Texts do not depend on torch's generator, and leave it as it was."""
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = write(chatty, tmp_path / "a.jsonl", tokens=200)
    torch.manual_seed(4)
    assert write(chatty, tmp_path / "b.jsonl", tokens=200) == first
    torch.manual_seed(3)
    write(chatty, tmp_path / "c.jsonl", tokens=200)
    assert state.shape == torch.get_rng_state().shape
