"""Data: sources, labels, packing, mixing, splitting and the order of samples."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ee_tuning.data import SampleOrder, collate, load_packed, split_validation
from ee_tuning.data.megatron import HEADER, MAGIC
from ee_tuning.errors import UserError

TEXT = "The quick brown fox jumps over the lazy dog. "
CHAT = [
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A brown fox, naïve 🦊."},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "The dog."},
]
PLAIN_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
FORGETFUL_TEMPLATE = "{% for m in messages %}{{ m.content if loop.last else '-' }}{% endfor %}"
STRICT_TEMPLATE = (
    "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}"
    + PLAIN_TEMPLATE
)


def make_tokenizer(chat_template: str | None = None, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of some 300 tokens; ``<eos>``, and ``<bos>`` in front if asked for."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>", "<bos>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    tokenizer.chat_template = chat_template
    return tokenizer


TOKENIZER = make_tokenizer()
CHATTY = make_tokenizer(PLAIN_TEMPLATE)
EOS = TOKENIZER.eos_token_id


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def jsonl(path: Path, *records) -> str:
    """Write records, or raw lines where they are strings."""
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def load(source, tokenizer=TOKENIZER, seq_length=16, seed=0, **more) -> datasets.Dataset:
    sources = source if isinstance(source, list) else [source]
    return load_packed([str(s) for s in sources], tokenizer, seq_length, seed, **more)


def pieces(packed) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each piece, in the order of the rows, padding included."""
    found = []
    for row in packed:
        starts = [i for i, p in enumerate(row["position_ids"].tolist()) if p == 0]
        for start, stop in zip(starts, [*starts[1:], len(row["labels"])], strict=True):
            found.append(
                (row["input_ids"][start:stop].tolist(), row["labels"][start:stop].tolist())
            )
    return found


def texts(source, **more) -> list[str]:
    """The documents of a source as text, sorted; each must fit one row."""
    found = pieces(load(source, seq_length=512, **more))
    return sorted(
        TOKENIZER.decode(ids[:-1])
        for ids, labels in found
        if any(label != -100 for label in labels) and ids[-1] == EOS
    )


def learned(record, tokenizer, tmp_path) -> str:
    """What counts in the loss of one record, as text."""
    (row,) = load(jsonl(tmp_path / "one.jsonl", record), tokenizer, seq_length=512)
    labels = row["labels"][row["labels"] != -100]
    return tokenizer.decode(labels)


def fails(source, *parts: str, **more) -> None:
    """Loading is refused, in one line that has all `parts`."""
    with pytest.raises(UserError) as error:
        load(source, **more)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


# Sources


@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_a_text_file_is_one_document(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_text("one\n\ntwo fox")
    assert texts(path) == ["one\n\ntwo fox"]


@pytest.mark.parametrize(
    "content", ['[{"text": "a b"}, {"text": "c d"}]', '{"text": "a b"}\n\n{"text": "c d"}']
)
def test_json_is_a_list_or_lines(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text("\ufeff" + content, encoding="utf-8")
    assert texts(path) == ["a b", "c d"]


def test_jsonl(tmp_path):
    assert texts(jsonl(tmp_path / "a.jsonl", {"text": "a b", "id": 1}, {"text": "c d"})) == [
        "a b",
        "c d",
    ]


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    table = {"text": ["a b", None], "prompt": [None, "c"], "completion": [None, "d e"]}
    pq.write_table(pa.table(table), path)
    assert texts(path) == ["a b", "cd e"]


def test_a_folder_of_text_and_code(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "sub" / "a.py").write_text("x = 1")
    (tmp_path / "package.json").write_text('{"a": 1}')
    (tmp_path / ".hidden").write_text("no no")
    (tmp_path / ".git" / "config").write_text("no no")
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    (tmp_path / "binary").write_bytes(b"ab\x00cd")
    (tmp_path / "empty.txt").touch()
    assert texts(tmp_path) == ["x = 1", '{"a": 1}']


def test_a_folder_of_records(tmp_path):
    (tmp_path / "sub").mkdir()
    jsonl(tmp_path / "sub" / "a.jsonl", {"text": "a b"})
    pq.write_table(pa.table({"text": ["c d"]}), tmp_path / "b.parquet")
    (tmp_path / "README.md").write_text("about it")
    assert texts(tmp_path) == ["a b", "c d"]


def test_hub(monkeypatch):
    asked = []

    def load_dataset(path, config, split):
        asked.append((path, config, split))
        return datasets.Dataset.from_dict({"text": ["a b", "c d"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("who/what", "what#test[:5%]", "who/what:small", "what:small#test=0.5"):
        assert texts(name) == ["a b", "c d"]
    assert asked == [
        ("who/what", None, "train"),
        ("what", None, "test[:5%]"),
        ("who/what", "small", "train"),
        ("what", "small", "test"),
    ]


def test_hub_failures_are_told(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise FileNotFoundError("not on the hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    fails("who/what", "data who/what", "no such file or folder here", "(not on the hub)")


def test_hub_record_without_known_fields(monkeypatch):
    data = datasets.Dataset.from_dict({"question": ["a"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: data)
    fails("who/what", "who/what record 1", "found: question")


# Megatron


def write_megatron(prefix: Path, documents: list[list[list[int]]], dtype=np.uint16, code=8) -> None:
    """Documents of sequences of token ids as a Megatron pair."""
    sequences = [s for document in documents for s in document]
    lengths = np.array([len(s) for s in sequences], dtype="<i4")
    pointers = (np.cumsum([0, *lengths[:-1]]) * np.dtype(dtype).itemsize).astype("<i8")
    bounds = np.cumsum([0, *[len(document) for document in documents]]).astype("<i8")
    header = HEADER.pack(MAGIC, 1, code, len(lengths), len(bounds))
    index = header + lengths.tobytes() + pointers.tobytes() + bounds.tobytes()
    Path(f"{prefix}.idx").write_bytes(index)
    Path(f"{prefix}.bin").write_bytes(np.concatenate(sequences).astype(dtype).tobytes())


DOCUMENTS = [[[5, 6, 7], [8, EOS]], [[9, 10, 11, EOS]]]


@pytest.mark.parametrize(("dtype", "code"), [(np.uint16, 8), (np.int32, 4), (np.int64, 5)])
@pytest.mark.parametrize("ending", ["", ".bin", ".idx"])
def test_megatron_round_trip(tmp_path, dtype, code, ending):
    write_megatron(tmp_path / "v1.0_text", DOCUMENTS, dtype, code)
    found = pieces(load(f"{tmp_path / 'v1.0_text'}{ending}"))
    assert sorted(found)[1:] == [
        ([5, 6, 7, 8, EOS], [-100, 6, 7, 8, EOS]),
        ([9, 10, 11, EOS], [-100, 10, 11, EOS]),
    ]


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda data: b"XXXXXXX" + data[7:], "magic"),
        (lambda data: data[:20], "magic and header"),
        (lambda data: data[:17] + b"\x07" + data[18:], "token type 7"),
        (lambda data: data[:-8], "its header wants"),
        (lambda data: data[:34] + b"\xff" * 4 + data[38:], "negative"),
        (lambda data: data[:34] + b"\xff\xff\x00\x00" + data[38:], "beyond the end of it.bin"),
        (lambda data: data[:-8] + bytes(8), "do not cover"),
    ],
)
def test_a_corrupt_megatron_index_is_refused(tmp_path, damage, part):
    write_megatron(tmp_path / "it", DOCUMENTS)
    index = tmp_path / "it.idx"
    index.write_bytes(damage(index.read_bytes()))
    fails(tmp_path / "it", str(index), part)


def test_megatron_tokens_must_fit_the_tokenizer(tmp_path):
    write_megatron(tmp_path / "it", [[[1, 2]], [[3, 9999]]])
    fails(tmp_path / "it", "it.bin document 2", "9999", f"{len(TOKENIZER)} tokens")


def test_half_a_megatron_pair_is_refused(tmp_path):
    write_megatron(tmp_path / "it", DOCUMENTS)
    (tmp_path / "it.bin").unlink()
    fails(tmp_path / "it", "it.bin does not exist", "both .bin and .idx")


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
        ["found: body, id", "wanted: messages, prompt and completion, or text"],
    ),
    ({}, ["found: none"]),
    ({"text": 3}, ["text must be valid text"]),
    ({"text": "\ud800"}, ["text must be valid text"]),
    ({"prompt": "a", "completion": ["b"]}, ["prompt and completion must be valid text"]),
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


# Mixing, splitting, caching


def shares(packed) -> list[float]:
    """How much of the rows is made of the letters a and b."""
    firsts = [TOKENIZER.decode(row["input_ids"])[0] for row in packed]
    return [firsts.count(letter) / len(firsts) for letter in "ab"]


@pytest.fixture
def two_sources(tmp_path) -> list[str]:
    """Sources with 200 rows of 16 tokens each, of one letter each."""
    return [jsonl(tmp_path / f"{x}.jsonl", *[{"text": f"{x} " * 7 + x}] * 200) for x in "ab"]


@pytest.mark.parametrize(
    ("weights", "share"), [(("", ""), 0.5), (("=3", "=1"), 0.75), (("=0.25", ""), 0.2)]
)
def test_weights_shift_the_shares(two_sources, weights, share):
    packed = load([s + w for s, w in zip(two_sources, weights, strict=True)])
    assert shares(packed) == pytest.approx([share, 1 - share], abs=0.06)
    assert len(packed) == 400 if weights == ("", "") else len(packed) > 400


def test_validation_split(two_sources):
    packed = load(two_sources[0])
    train, valid = split_validation(packed, 0.1, seed=1)
    ids = [
        set(part.with_format("numpy", columns=["row"])[:]["row"].tolist())
        for part in (train, valid)
    ]
    assert ids[0].isdisjoint(ids[1])
    assert (len(ids[0]), len(ids[1])) == (len(train), len(valid)) == (180, 20)
    again = split_validation(packed, 0.1, seed=1)[1]
    assert torch.equal(again[:]["input_ids"], valid[:]["input_ids"])
    assert set(valid[0]) == {"input_ids", "position_ids", "labels"}


def test_repeated_rows_do_not_leak_into_validation(tmp_path):
    small = jsonl(tmp_path / "s.jsonl", *[{"text": f"{i} " * 7 + "x"} for i in range(10, 20)])
    large = jsonl(tmp_path / "l.jsonl", *[{"text": f"{i} " * 7 + "x"} for i in range(20, 60)])
    train, valid = split_validation(load([f"{small}=0.9", f"{large}=0.1"]), 0.5, seed=0)
    held_out = {tuple(ids) for ids in valid[:]["input_ids"].tolist()}
    assert len(held_out) == len(valid)
    assert held_out.isdisjoint(map(tuple, train[:]["input_ids"].tolist()))


def test_validation_split_of_few_rows(tmp_path):
    two = load(jsonl(tmp_path / "a.jsonl", {"text": TEXT}), seq_length=8)
    assert len(two) == 2
    assert [len(part) for part in split_validation(two, 0.01, 0)] == [1, 1]
    one = load(tmp_path / "a.jsonl", seq_length=512)
    with pytest.raises(UserError, match="just one sequence"):
        split_validation(one, 0.01, 0)
    with pytest.raises(UserError, match=r"valid_fraction 1.5"):
        split_validation(two, 1.5, 0)


def test_the_cache_is_used_until_the_file_changes(tmp_path, cache):
    path = jsonl(tmp_path / "a.jsonl", {"text": "a b"})
    assert texts(path) == ["a b"]
    files = sorted(cache.rglob("*.arrow"))
    assert texts(path) == ["a b"]
    assert sorted(cache.rglob("*.arrow")) == files
    stat = os.stat(path)
    jsonl(tmp_path / "a.jsonl", {"text": "c d"})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert texts(path) == ["c d"]
    bos = load(path, make_tokenizer(bos=True))
    assert bos[0]["input_ids"][0] == 1


def test_progress_bars_are_off_and_come_back(tmp_path, capfd):
    assert not datasets.are_progress_bars_disabled()
    load(jsonl(tmp_path / "a.jsonl", {"text": TEXT}))
    assert not datasets.are_progress_bars_disabled()
    assert capfd.readouterr().err == ""


def test_the_seed_shuffles_the_documents(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", *[{"text": f"{i} fox"} for i in range(50)])
    rows = [load(path, seed=seed)[:]["input_ids"] for seed in (0, 0, 1)]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0][:5], rows[2][:5])


# Batches


def test_collate(two_sources):
    packed = load(two_sources[0])
    batch = collate(packed, [5, 0, 5])
    assert {(name, t.shape, t.dtype) for name, t in batch.items()} == {
        (name, (3, 16), torch.int64) for name in ("input_ids", "position_ids", "labels")
    }
    assert torch.equal(batch["input_ids"][0], packed[5]["input_ids"])
    assert torch.equal(batch["labels"][0], batch["labels"][2])


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (7, 7), (3, 8), (1, 2)])
def test_each_epoch_is_a_permutation_of_its_own(n, batch):
    order = SampleOrder(n, batch, seed=3)
    stream = [i for step in range(n * 4) for i in order.indices(step)]
    epochs = [stream[e * n : (e + 1) * n] for e in range(4)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert n < 7 or len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_needs_nothing_but_the_step():
    order = SampleOrder(10, 4, seed=3)
    steps = [order.indices(step) for step in range(20)]
    assert SampleOrder(10, 4, seed=3).indices(17) == steps[17]
    assert order.indices(2) == steps[2]
    assert (
        SampleOrder(10, 4, seed=4).indices(0) != steps[0]
        or SampleOrder(10, 4, 4).indices(1) != steps[1]
    )
