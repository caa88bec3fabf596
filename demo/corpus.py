"""The demo's text and tokenizer: permissively licensed Python source installed on this machine.

A part of the standard library is held out: it becomes the demo's tuning and validation data, and
neither it nor files that repeat it are in the training text of the backbone.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import random
import re
import sysconfig
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

os.environ["TOKENIZERS_PARALLELISM"] = "true"  # although processes were forked before
CONTEXT, VOCABULARY, EOS = 1024, 4096, "<|endoftext|>"
STDLIB = Path(sysconfig.get_paths()["stdlib"])
STDLIB_NAME = "CPython standard library"
NEVER_HELD_OUT = {"test", "tests", "idlelib", "encodings", "pydoc_data"}
FOREIGN = {"_vendor", "_vendored", "vendor", "vendored", "third_party", "extern", "externals"}
SPDX = re.compile(
    r"0BSD|Apache-2\.0|BSD-[23]-Clause|BSL-1\.0|CC0-1\.0|CNRI-Python|HPND|ISC|LLVM-exception|"
    r"MIT(-0|-CMU)?|PSF-2\.0|Python-2\.0|Unlicense|Zlib|AND|OR|WITH"
)
PERMISSIVE = re.compile(
    r"(the )?((new|modified|simplified|revised|[23][- ]clause) )?"
    r"(MIT|0?BSD|Apache|ISC|PSF|Python Software Foundation|Python-2|HPND|Historical Permission|"
    r"(The )?Unlicense|Zlib)\b",
    re.I,
)
REFUSED = re.compile(r"\b[AL]?GPL|General Public|MPL\b|Mozilla|proprietary|NVIDIA|commercial", re.I)


class Source(NamedTuple):
    """One Python file: the distribution it belongs to, its path in there, and on the disk."""

    owner: str
    path: str
    file: Path


def licence_of(metadata: importlib.metadata.PackageMetadata) -> str | None:
    """The licence a distribution states, or None unless it is on the allow-list."""
    expression, field = (metadata.get(k) or "" for k in ("License-Expression", "License"))
    classifiers = [c for c in metadata.get_all("Classifier") or [] if c.startswith("License ::")]
    if REFUSED.search("\n".join([expression, field, *classifiers])):
        return None
    if expression:
        known = all(SPDX.fullmatch(word) for word in re.findall(r"[\w.+-]+", expression))
        return expression if known else None
    names = [c.split(" :: ")[-1] for c in classifiers if c != "License :: OSI Approved"]
    names = names or field.strip().splitlines()[:1]
    return ", ".join(names) if names and all(PERMISSIVE.match(n) for n in names) else None


def find_sources() -> tuple[list[Source], dict[str, dict[str, object]]]:
    """All candidate files, and the name, version and licence of each distribution by name."""
    installed = {"site-packages", "dist-packages"}
    found = [(f.relative_to(STDLIB), f) for f in STDLIB.rglob("*.py")]
    sources = [Source(STDLIB_NAME, r.as_posix(), f) for r, f in found if not installed & {*r.parts}]
    python = {"name": STDLIB_NAME, "version": platform.python_version(), "licence": "PSF-2.0"}
    owners: dict[str, dict[str, object]] = {STDLIB_NAME: python}
    for dist in importlib.metadata.distributions():
        name, licence = dist.metadata["Name"], licence_of(dist.metadata)
        if not name or not licence or name in owners:
            continue
        owners[name] = {"name": name, "version": dist.version, "licence": licence}
        for part in dist.files or []:
            if part.suffix == ".py" and not FOREIGN & {*part.parts}:
                sources.append(Source(name, part.as_posix(), Path(str(dist.locate_file(part)))))
    return sorted(sources), owners


def read_source(source: Source) -> str | None:
    """The file's text, or None if it is tiny, huge, minified, a table of numbers or GPL'ed."""
    try:
        raw = source.file.read_bytes()
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        return None
    sized = 200 <= len(raw) <= 500_000 and len(text) <= 120 * (text.count("\n") + 1)
    digits = len(raw) - len(raw.translate(None, b"0123456789"))
    if not sized or digits > 0.15 * len(raw) or re.search(r"GPL|General Public", text[:4000]):
        return None
    return text


def share(key: str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:12], 16) / 16**12


def telling_lines(text: str) -> set[str]:
    """The distinct lines of a text that are long enough to tell where it comes from."""
    return {line for line in map(str.strip, text.splitlines()) if len(line) > 25}


def build_corpus(
    holdout: float, max_files: int | None, seed: int
) -> tuple[dict[Source, str], dict[str, str], dict]:
    """Training texts, held-out texts by path, and the facts about both for the records."""
    sources, owners = find_sources()
    held = {
        s
        for s in sources
        if s.owner == STDLIB_NAME
        and not NEVER_HELD_OUT & {*Path(s.path).parts}
        and share(s.path) < holdout
    }
    rest = [s for s in sources if s not in held]
    random.Random(seed).shuffle(rest)
    wanted = sorted(held) + rest[:max_files]
    with ProcessPoolExecutor() as pool:
        texts = dict(zip(wanted, pool.map(read_source, wanted, chunksize=64), strict=True))
    held_texts = {s.path: text for s in sorted(held) if (text := texts.pop(s))}
    held_lines = set().union(*map(telling_lines, held_texts.values()))
    train: dict[Source, str] = {}
    seen: set[bytes] = set()
    copies: list[str] = []
    for source, text in texts.items():
        digest = hashlib.sha256((text or "").encode()).digest()
        if not text or source in held or digest in seen:
            continue
        seen.add(digest)
        lines = telling_lines(text)
        if len(lines & held_lines) > 0.2 * len(lines):
            copies.append(f"{source.owner}: {source.path}")
        else:
            train[source] = text
    assert not held & train.keys()
    assert not {*held_texts.values()} & {*train.values()}
    files = Counter(s.owner for s in train)
    size: Counter[str] = Counter()
    for source, text in train.items():
        size[source.owner] += len(text.encode())
    facts = {
        "licences": [{**owners[n], "files": files[n], "bytes": size[n]} for n in sorted(files)],
        "train_files": len(train),
        "train_bytes": size.total(),
        "held_out_files": len(held),
        "dropped_as_near_copies": len(copies),
        "near_copies": copies,
    }
    return train, {p: t for p, t in held_texts.items() if len(t.encode()) <= 40_000}, facts


def write_data(folder: Path, held: dict[str, str]) -> None:
    """Write the held-out texts as the demo's tuning and validation data, with their licence."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, validation in (("train", False), ("validation", True)):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as out:
            for path, text in held.items():
                if (share(f"validation:{path}") < 0.1) == validation:
                    out.write(json.dumps({"text": text, "path": path}, ensure_ascii=False) + "\n")
    places = STDLIB / "LICENSE.txt", Path(f"/usr/share/doc/{STDLIB.name}/copyright")
    found = next((p for p in places if p.is_file()), None)
    (folder / "LICENSE.md").write_text(
        "# Licence of this data\n\n`train.jsonl` and `validation.jsonl` hold files of "
        f"the standard library of CPython {platform.python_version()}, copyright Python Software "
        "Foundation, under the PSF License Agreement (PSF-2.0). `path` is a file's place in the "
        "library. The full text is at <https://docs.python.org/3/license.html>"
        + (" and below.\n\n" + found.read_text("utf-8") if found else ".\n"),
        encoding="utf-8",
    )


def train_tokenizer(texts: list[str], folder: Path) -> Tokenizer:
    """Train a byte-level BPE on at most 30 MB and save it as a `PreTrainedTokenizerFast`."""
    sample, size = [], 0
    for text in texts:
        size += len(text)
        if size > 30_000_000:
            break
        sample.append(text)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        special_tokens=[EOS],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """All texts as one row of ids, each text followed by the end token (id 0)."""
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" inside a file is plain text
    parts = []
    for i in range(0, len(texts), 1000):
        for encoding in tokenizer.encode_batch_fast(texts[i : i + 1000]):
            parts.append(np.array([*encoding.ids, 0], dtype=np.int32))
    return torch.from_numpy(np.concatenate(parts))
