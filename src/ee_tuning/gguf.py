"""GGUF files as backbones: transformers reads them, and their blocks become ordinary numbers."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ee_tuning.errors import Notice, UserError
from ee_tuning.quantise.packages import check_package


def gguf_file(path: str) -> Path | None:
    """The GGUF file at `path`, which may be the only one of a folder that is no checkpoint itself.

    Raises:
        UserError: a folder has several, or a package is missing to read them.
    """
    found = [Path(path)] if path.endswith(".gguf") else []
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        found = sorted(folder.glob("*.gguf"))
    if not found:
        return None
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise UserError(f"{path} has several GGUF files, {names}: name one of them")
    if not found[0].is_file():
        raise UserError(f"cannot read the backbone {path}: there is no such file")
    for package in ("gguf", "accelerate"):
        check_package(package, f"the GGUF file {found[0]}")
    return found[0]


@lru_cache(maxsize=1)
def _parsed(reader: Any, path: str, changed: tuple[int, int]) -> Any:
    """What a GGUF file holds; its tensors stay on disk. changed: when, and its size."""
    return reader(path)


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Inside, the last GGUF file that was parsed is not parsed again, which takes seconds.

    transformers parses it for the config, the weights and the tokenizer, and makes one table of
    names for every module of the model anew.
    """
    package: Any = importlib.import_module("gguf")
    reader, names = package.GGUFReader, package.get_tensor_name_map

    def read(path: str | Path) -> Any:
        now = Path(path).stat()
        return _parsed(reader, str(path), (now.st_mtime_ns, now.st_size))

    package.GGUFReader, package.get_tensor_name_map = read, cache(names)
    try:
        yield
    finally:
        package.GGUFReader, package.get_tensor_name_map = reader, names


def read_config(file: Path) -> Any:
    """The transformers config of a GGUF file."""
    with _parsed_once():
        return AutoConfig.from_pretrained(file.parent, gguf_file=file.name)


def read_model(
    file: Path, model_class: Any, config: Any, dtype: torch.dtype | str
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model with the file's weights as ordinary numbers, and what transformers says of loading.

    dtype: ``auto`` is fp32, in which the numbers of every block are exact.
    """
    warnings.warn(f"{file.name}: its blocks are made ordinary numbers", Notice, stacklevel=2)
    kind = getattr(transformers, "GgufConfig", None)  # before 5.23 there was no other way
    more = {} if kind is None else {"quantization_config": kind(dequantize=True)}
    with _without_bar(), _parsed_once():
        model, info = model_class.from_pretrained(
            file.parent,
            gguf_file=file.name,
            config=config,
            dtype=torch.float32 if dtype == "auto" else dtype,
            output_loading_info=True,
            **more,
        )
    model.name_or_path = model.config._name_or_path = str(file)
    return model, info


@contextmanager
def _without_bar() -> Iterator[None]:
    """Inside, no progress of dequantising is shown: transformers has no switch for that bar."""
    from transformers import modeling_gguf_pytorch_utils as reader

    shown = reader.tqdm
    reader.tqdm = partial(shown, disable=True)
    try:
        yield
    finally:
        reader.tqdm = shown


def read_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file."""
    with _parsed_once():
        return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
