"""The prompts that a risk is tested on: each once, none that the exits were tuned on."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain, islice, zip_longest
from pathlib import Path

import yaml
from transformers import PreTrainedTokenizerBase

from ee_tuning.calibrate.config import CalibrateConfig
from ee_tuning.data import cache
from ee_tuning.data.forms import BadRecord
from ee_tuning.data.readers import Record
from ee_tuning.data.sources import Hub, Source, parse_source
from ee_tuning.decode.text import encode_chat
from ee_tuning.errors import UserError
from ee_tuning.regenerate.prompts import Prompt, beginning, prompt_of

CHECKED = 200_000  # records of a source that exits were tuned on


@dataclass
class Prompts:
    """ids: of each prompt. keys: the same where prompts are the same. left_out: how many records
    were, and why. chats: they are a user's words, where they are not documents."""

    chats: bool
    ids: list[list[int]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def hash(self) -> str:
        """The same for the same prompts, in any order."""
        return hashlib.sha256(" ".join(sorted(self.keys)).encode()).hexdigest()[:32]


def read_prompts(
    config: CalibrateConfig, tokenizer: PreTrainedTokenizerBase, longest: int
) -> Prompts:
    """The first prompts of the sources in turns; `longest`: tokens of one at most.

    Raises:
        UserError: a source cannot be read, or a record is malformed.
    """
    sources = [parse_source(text) for text in config.data]
    found, seen = Prompts(bool(tokenizer.chat_template)), set()
    for source, record in _in_turns(sources, config.seed):
        if len(found.ids) == config.prompts:
            break
        try:
            prompt = prompt_of(0, source.name, record, config, found.chats)
        except BadRecord as error:
            if not config.skip_bad_records:
                where = str(error) if record.problem else f"{record.where}: {error}"
                raise UserError(f"{where}; or pass over such with --skip-bad-records") from None
            found.left_out["malformed"] += 1
            continue
        if prompt.messages:
            ids = encode_chat(tokenizer, prompt.messages)
        else:
            ids = beginning(tokenizer, prompt, config.prompt_tokens)[0]
        reason = "empty" if not ids else "too long" if len(ids) > longest else ""
        if tuple(ids) in seen:
            reason = "there before"
        seen.add(tuple(ids))
        if reason:
            found.left_out[reason] += 1
            continue
        found.ids.append(ids)
        found.keys.append(key_of(prompt))
    return found


def _in_turns(sources: Sequence[Source], seed: int) -> Iterator[tuple[Source, Record]]:
    """The records of all sources, one of each in turn; of a long text its beginning."""
    streams = [((one, record) for record in one.records(seed) if record.begins) for one in sources]
    return (pair for pair in chain.from_iterable(zip_longest(*streams)) if pair is not None)


def key_of(prompt: Prompt) -> str:
    """The same for prompts that are made from the same record."""
    tokens = None if prompt.tokens is None else prompt.tokens.tolist()
    return cache.key_of(prompt.messages, prompt.text, tokens)


def check_not_tuned_on(prompts: Prompts, folder: Path, config: CalibrateConfig) -> str:
    """Refuse prompts that the exits in `folder` were tuned on; gives what is known about that.

    It is known where the run left its settings and its data are here.

    Raises:
        UserError: some are among them.
    """
    places = [place / "run.yaml" for place in (folder, folder.parent.parent)]
    saved = next((place for place in places if place.is_file()), None)
    run = yaml.safe_load(saved.read_text(encoding="utf-8")) if saved else None
    if not isinstance(run, dict) or not run.get("data"):
        return "what the exits were tuned on is not known here: it has to be other texts than these"
    config = replace(config, text_field=run.get("text_field", "text"))
    unknown = []
    for text in run["data"]:
        source = _local(text)
        if source is None:
            unknown.append(text)
            continue
        shared = {*prompts.keys}.intersection(_keys(source, config, prompts.chats))
        if shared:
            raise UserError(
                f"{len(shared)} of {len(prompts.keys)} prompts are in {source.name}, which the "
                "exits were tuned on: give others with --data"
            )
    if unknown:
        return f"the exits were tuned on {', '.join(unknown)}, not here to be compared with"
    return "no prompt is among the data that the exits were tuned on"


def _local(text: str) -> Source | None:
    """A source of a run's data, if it is still here."""
    try:
        source = parse_source(text) if text != "-" else None
    except UserError:
        return None
    return None if source is None or isinstance(source.content, Hub) else source


def _keys(source: Source, config: CalibrateConfig, chats: bool) -> Iterator[str]:
    records = (record for record in source.records(config.seed) if record.begins)
    for record in islice(records, CHECKED):
        with suppress(BadRecord):
            yield key_of(prompt_of(0, "", record, config, chats))
