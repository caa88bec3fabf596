"""Data: what is named, found and read."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import json
import lzma
import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.data import (
    EOS,
    TEXT,
    TOKENIZER,
    fails,
    jsonl,
    load,
    make_tokenizer,
    pieces,
    texts,
)
from hypothesis import given
from hypothesis import strategies as st

from ee_tuning.data.megatron import HEADER, MAGIC
from ee_tuning.data.readers import json_values

pytestmark = pytest.mark.usefixtures("cache")

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


@pytest.fixture
def hub(monkeypatch):
    """A hub that has every data set."""
    monkeypatch.setattr("ee_tuning.data.sources.check_there", lambda *_: None)


def test_a_data_set_of_the_cache_needs_no_hub(cache, monkeypatch):
    data = datasets.Dataset.from_dict({"text": ["a b"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: data)
    fails("who/what", "data who/what", "with HF_HUB_OFFLINE the hub is not asked")
    (cache / "who___what").mkdir()
    assert texts("who/what") == ["a b"]


def test_hub(hub, monkeypatch):
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


def test_hub_failures_are_told(hub, monkeypatch):
    def load_dataset(*args, **kwargs):
        raise FileNotFoundError("not on the hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    fails("who/what", "data who/what", "no such file or folder here", "(not on the hub)")


def test_a_full_disk_is_told_from_a_hub_that_fails(hub, monkeypatch):
    def load_dataset(*args, **kwargs):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise datasets.exceptions.DatasetGenerationError("failed") from error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    fails("who/what", "No space left on device", "HF_DATASETS_CACHE")


def test_hub_record_without_known_fields(hub, monkeypatch):
    data = datasets.Dataset.from_dict({"question": ["a"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: data)
    fails("who/what", "who/what record 1", "found: question")


# Packed files, tables, patterns, limits


RECORDS = [{"text": "a b"}, {"text": "c d"}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def pack_zstandard(data: bytes) -> bytes:
    """Two frames, as parallel packers write them."""
    return b"".join(pa.compress(part, codec="zstd", asbytes=True) for part in (data[:9], data[9:]))


PACKERS["zst"] = pack_zstandard


@pytest.mark.parametrize("ending", PACKERS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_packed_files(tmp_path, ending, name):
    content = {"a.csv": b"text\na b\nc d\n", "a.txt": b"a b"}.get(name, LINES)
    path = tmp_path / f"{name}.{ending}"
    path.write_bytes(PACKERS[ending](content))
    assert texts(path) == (["a b"] if name == "a.txt" else ["a b", "c d"])


@pytest.mark.parametrize("ending", PACKERS)
def test_a_truncated_packed_file_is_refused(tmp_path, ending):
    path = tmp_path / f"a.jsonl.{ending}"
    path.write_bytes(PACKERS[ending](LINES * 50)[:-9])
    fails(path, f"a.jsonl.{ending}: not readable as jsonl", "truncated or corrupt")


def test_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('\ufefftext,id\n"a, ""b""\nc",1\nd e,2\n')
    assert texts(path) == ['a, "b"\nc', "d e"]
    path.with_suffix(".tsv").write_text("id\ttext\n1\ta, b\n")
    assert texts(path.with_suffix(".tsv")) == ["a, b"]
    path.write_text("text\na b\nc,d\n")
    fails(path, "a.csv row 2: it has more fields")


@pytest.mark.parametrize("write", [pa.ipc.new_file, pa.ipc.new_stream])
def test_arrow(tmp_path, write):
    path = tmp_path / "a.arrow"
    table = pa.table({"text": ["a b", "c d"]})
    with write(path, table.schema) as writer:
        writer.write_table(table)
    assert texts(path) == ["a b", "c d"]
    path.write_bytes(path.read_bytes()[:40])
    fails(path, "a.arrow: not readable as arrow")


def test_patterns(tmp_path):
    for name in ("a.jsonl", "b.txt", "sub/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        jsonl(tmp_path / name, {"text": name})
    assert texts(tmp_path / "*.jsonl") == ["a.jsonl"]
    assert texts(tmp_path / "**" / "*.jsonl") == ["a.jsonl", "sub/c.jsonl"]
    fails(tmp_path / "*.csv", "*.csv: no file matches")
    fails(tmp_path / "a.jsonl[5:10]", "check the pattern, and write a limit as [:100]")
    fails("a.jsonl,b.jsonl", "check the path, and write several with spaces between them")
    (tmp_path / "[a].txt").write_text("a b")
    assert texts(tmp_path / "[a].txt") == ["a b"]


def test_a_limit_counts_records(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", *[{"text": f"{i} fox"} for i in range(9)])
    assert texts(f"{path}[:2]") == ["0 fox", "1 fox"]
    assert texts(f"{path}[:2]=0.5") == ["0 fox", "1 fox"]
    assert len(texts(f"{path}[:20]")) == 9
    fails(f"{path}[:0]", "limit 0 must be at least 1")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (LINES, ["a b", "c d"]),
        (json.dumps(RECORDS).encode(), ["a b", "c d"]),
        (b"a b\nc", ["a b\nc"]),
    ],
)
def test_standard_input(monkeypatch, given, expected):
    for name in ("-", "-[:9]=0.5"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given)))
        assert texts(name) == expected
    fails("-", "standard input is empty")
    monkeypatch.setenv("WORLD_SIZE", "2")
    fails("-", "standard input is read by a single process")


def test_json_over_several_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("\n".join(json.dumps(record, indent=1) for record in RECORDS))
    assert texts(path) == ["a b", "c d"]
    path.write_text(json.dumps(RECORDS, indent=1))
    assert texts(path) == ["a b", "c d"]


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.lists(st.booleans()))))
@pytest.mark.parametrize("form", ["list", "indented", "joined"])
def test_json_is_read_a_piece_at_a_time(form, values):
    text = {
        "list": json.dumps(values),
        "indented": json.dumps(values, indent=2),
        "joined": " ".join(map(json.dumps, values)),
    }[form]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ee_tuning.data.readers.PIECE", 3)
        assert list(json_values(io.StringIO(text))) == values


def test_deeply_nested_json(tmp_path):
    deep = '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}"
    path = jsonl(tmp_path / "a.jsonl", {"text": "a b"}, deep)
    fails(path, "a.jsonl line 2: not valid JSON", "recursion")
    with pytest.warns(UserWarning, match="1 bad records skipped"):
        assert texts(path, skip_bad_records=True) == ["a b"]
    (tmp_path / "b.json").write_text(f"[{deep}]")
    fails(tmp_path / "b.json", "b.json: not valid JSON")


# Folders that are not what they seem


def test_saved_data_sets(tmp_path):
    data = datasets.Dataset.from_dict({"text": ["a b", "c d"]})
    data.save_to_disk(tmp_path / "one")
    assert texts(tmp_path / "one") == ["a b", "c d"]
    splits = {"train": data, "test": data.select([0])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "several")
    assert texts(tmp_path / "several") == ["a b", "c d"]
    assert texts(tmp_path / "several#test") == ["a b"]
    fails(tmp_path / "several#dev", "has no split dev", "train, test")
    fails(tmp_path / "one#dev", "saved without splits")
    (tmp_path / "several/dataset_dict.json").write_text("null")
    fails(tmp_path / "several", "dataset_dict.json is damaged: it holds None, no JSON object")


def test_a_folder_of_json_holds_records(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    (tmp_path / "b.json").write_text('{"text": "e f"}\n{"text": "g h"}')
    (tmp_path / "README.md").write_text("about them")
    assert texts(tmp_path) == ["a b", "c d", "e f", "g h"]


@pytest.mark.parametrize("name", ["model.safetensors", "a.zip", "b.tar.gz", "it.bin", "a.pdf"])
def test_what_nobody_means_as_text_is_refused(tmp_path, name):
    (tmp_path / "a.txt").write_text("a b")
    (tmp_path / name).write_bytes(b"PK\x00")
    fails(tmp_path, f"{name} cannot be meant as text", "**")


# Long texts


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("stored", ["a.txt", "a.jsonl"])
def test_a_long_text_is_read_in_pieces(tmp_path, monkeypatch, stored, bos):
    """As one document: what the tokenizer puts around a text is there once."""
    for module in ("readers", "encode"):
        monkeypatch.setattr(f"ee_tuning.data.{module}.PIECE", 200)
    text = "".join(f"{i} {TEXT}\n" for i in range(60))
    path = tmp_path / stored
    path.write_text(text) if stored == "a.txt" else jsonl(path, {"text": text})
    tokenizer = make_tokenizer(bos=bos)
    found = pieces(load(path, tokenizer, seq_length=1024))
    documents = [ids for ids, labels in found if any(label != -100 for label in labels)]
    documents.sort(key=lambda ids: int(re.search(r"\d+", tokenizer.decode(ids))[0]))
    assert len(documents) > 5
    whole = tokenizer(text)["input_ids"] + [EOS]
    assert [token for ids in documents for token in ids] == whole


def test_files_beside_records_are_told(tmp_path):
    jsonl(tmp_path / "a.jsonl", {"text": "a b"})
    for name in ("b.txt", "c.json", "README.md", "dataset_infos.json"):
        (tmp_path / name).write_text("x")
    with pytest.warns(UserWarning, match="2 other files in it are not read, such as b.txt"):
        assert texts(tmp_path) == ["a b"]


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
