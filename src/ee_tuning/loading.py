"""Reading a backbone, or only the part of it that the exits need, and telling backbones apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from os.path import expanduser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    is_peft_available,
)
from transformers.utils import logging as transformers_logging

from ee_tuning.backbone import Anatomy, check_unquantised, find_anatomy, layer_plan
from ee_tuning.errors import UserError, first_line
from ee_tuning.files import read_object
from ee_tuning.fingerprint import sample_places
from ee_tuning.gguf import gguf_file, read_config, read_model, read_tokenizer
from ee_tuning.hub import check_there, find_file
from ee_tuning.own_code import causal_lm_class, check_kernels, own_code
from ee_tuning.slices import (
    STYLES,
    Cut,
    SplitParameter,
    Style,
    head_style,
    read_part,
    split_linear,
)

Left = dict[str, tuple[Any, Style]]  # linear layers left to be read in slices, by path


def load_config(path: str, trust: bool = False) -> Any:
    """The transformers config of a local folder, a GGUF file or a hub id.

    trust: its own code may run.

    Raises:
        UserError: nothing is there, it is not a decoder-only causal LM, or is not to be had
            without code of its own.
    """
    if not path:
        raise UserError("no backbone given: name a folder or a hub id with --model")
    path = expanduser(path)
    gguf = gguf_file(path)
    if not gguf:
        check_there(path, "backbone", "config.json")
        if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
            raise UserError(_not_a_checkpoint(Path(path)))
        _check_alone(path)
        _check_settings(Path(path))
    try:
        if gguf:
            config = read_config(gguf)
        else:
            with own_code(path, "config.json", trust):
                config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read the backbone {path}: {first_line(error)}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{path} is an encoder-decoder model: exits need a decoder-only causal LM")
    check_unquantised(config, path)
    check_kernels(config, path, trust)
    architectures = config.architectures or ["CausalLM"]
    if causal_lm_class(config, path) is None or not any(
        "CausalLM" in name or "LMHead" in name for name in architectures
    ):
        raise UserError(f"{path} is not a causal LM but {', '.join(architectures)}")
    return config


def _check_settings(folder: Path) -> None:
    """Refuse a local backbone whose settings are damaged.

    Of some of them transformers says nothing: it takes its own default for the tokens that end.

    Raises:
        UserError: names the file.
    """
    for path in (folder / "config.json", folder / "generation_config.json"):
        if path.is_file():
            read_object(path)


def _check_alone(path: str) -> None:
    """Refuse a backbone with an adapter of PEFT beside it, which is read or not with the package.

    Raises:
        UserError: says what to do with the two.
    """
    beside = "adapter_config.json"
    if (Path(path).is_dir() or is_peft_available()) and find_file(path, beside):
        raise UserError(
            f"{path} holds a backbone and an adapter of PEFT ({beside}): write them as one "
            "(merge_and_unload, then save_pretrained), or move the adapter elsewhere"
        )


def _not_a_checkpoint(folder: Path) -> str:
    """What a folder without a config.json is instead, and what to do."""
    if (folder / "exit_config.json").is_file():
        base = read_object(folder / "exit_config.json").get("base_model")
        return (
            f"{folder} holds exits, no backbone: name theirs, {base}, with --model, or these with "
            "--exits where a command takes them"
        )
    if (folder / "adapter_config.json").is_file():
        base = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
        return (
            f"{folder} is an adapter of PEFT for {base}: name that with --model, or a folder with "
            "both in one (merge_and_unload, then save_pretrained)"
        )
    return f"{folder} is not a transformers checkpoint: it has no config.json"


def _check_weights(path: str) -> None:
    """Refuse a local folder whose weights are not in safetensors.

    Raises:
        UserError: says how to write them so.
    """
    folder = Path(path)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickled = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in folder.glob(kind))
    if not pickled:
        raise UserError(f"cannot load the backbone {path}: it has no weights, no model.safetensors")
    raise UserError(
        f"{path} has its weights in {pickled[0]}, but only safetensors are read: write them once "
        f"more with AutoModelForCausalLM.from_pretrained({path!r}).save_pretrained(FOLDER)"
    )


def empty_backbone(path: str, trust: bool = False) -> PreTrainedModel:
    """A causal LM without its weights, on the meta device, to look at its shapes."""
    config = load_config(path, trust)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust)


@dataclass(frozen=True)
class Parts:
    """What is needed of a backbone besides its norm: layers (from 1), token embedding, head."""

    layers: frozenset[int]
    embedding: bool = True
    head: bool = True


@dataclass(frozen=True)
class Slices:
    """The matrices of which this process reads its part only: the layers', and perhaps the head.

    gather: the head gives the logits of all parts.
    """

    mesh: DeviceMesh
    head: bool = True
    gather: bool = False


@contextmanager
def without_bars() -> Iterator[None]:
    """Inside, transformers shows no progress of reading and writing weights."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def load_backbone(
    path: str,
    parts: Parts | None = None,
    dtype: torch.dtype | str = "auto",
    slices: Slices | None = None,
    trust: bool = False,
) -> PreTrainedModel:
    """A causal LM with only `parts` in memory; None loads all.

    A part left out is an empty placeholder: its tensors are never read from the safetensors
    files, and every other layer keeps its place and number. slices: split by the model's
    tensor-parallel plan, of which no more than this process's part is read.

    Raises:
        UserError: files missing, truncated or corrupt, tensors missing or of another shape, or a
            model that cannot be split.
    """
    path = expanduser(path)
    config = load_config(path, trust)
    left: Left = {}
    plain = model_class = causal_lm_class(config, path)
    gguf = gguf_file(path)  # which is read whole
    if not gguf:
        _check_weights(path)
    if not gguf and (parts is not None or slices is not None):
        parts = parts or Parts(frozenset(range(1, config.num_hidden_layers + 1)))
        model_class = _with_parts(model_class, parts, config, slices, left)
    try:
        with without_bars():
            if gguf:
                model, info = read_model(gguf, model_class, config, dtype)
            else:
                model, info = model_class.from_pretrained(
                    path, config=config, dtype=dtype, output_loading_info=True, use_safetensors=True
                )
        model.__class__ = plain  # that of placeholders has no name to be pickled by
        files = tensor_files(path) if left else {}
        if left and slices is not None and files.keys() >= {f"{name}.weight" for name in left}:
            read_slices(model, left, files, slices.mesh)
        elif left:  # the files have older names, which transformers knows alone
            return load_backbone(path, parts, dtype, trust=trust)
    except UserError:
        raise
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot load the backbone {path}: {first_line(error)}; a file may be missing, cut "
            "short or damaged, fetch it again"
        ) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(
            f"{path} lacks {len(missing)} tensors of the model, the first is {missing[0]}"
        )
    return model


def _with_parts(
    model_class: Any, parts: Parts, config: Any, slices: Slices | None, left: Left
) -> Any:
    """`model_class`, but building empty placeholders for what is not in `parts`, and for `slices`.

    What is to be read in slices is put into `left`, on the meta device.
    """
    tied = config.tie_word_embeddings
    embedding = parts.embedding or (tied and parts.head)
    head = parts.head or (tied and parts.embedding)

    def __init__(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        anatomy = find_anatomy(self)
        owner = self.get_submodule(anatomy.trunk).get_submodule(anatomy.layers)
        for number in set(range(1, config.num_hidden_layers + 1)) - parts.layers:
            owner[number - 1] = nn.Module()  # type: ignore[operator]
        given = self.get_input_embeddings()
        paths = [path for path, module in self.named_modules() if module is given]
        for path in ([] if embedding else paths) + ([] if head else [anatomy.head]):
            self.set_submodule(path, nn.Module())
        if slices is None:
            return
        left.update(_split_by_plan(self, anatomy, parts.layers))
        if slices.head and head and not tied:
            left[anatomy.head] = self.get_submodule(anatomy.head), head_style(slices.gather)
        for path in left:
            self.set_submodule(path, nn.Module())

    # So that transformers neither warns of tensors left unread nor ties what is not there.
    body: dict[str, Any] = {"__init__": __init__, "_keys_to_ignore_on_load_unexpected": [r"."]}
    if not (embedding and head) or (slices is not None and not tied):
        body["_tied_weights_keys"] = {}
    return type(model_class.__name__, (model_class,), body | {"__module__": model_class.__module__})


def _split_by_plan(model: PreTrainedModel, anatomy: Anatomy, layers: frozenset[int]) -> Left:
    """The linear layers of `layers` (from 1) that the model's tensor-parallel plan splits."""
    found: Left = {}
    for number in sorted(layers):
        path = f"{anatomy.trunk}.{anatomy.layers}.{number - 1}"
        layer = model.get_submodule(path)
        modules = dict(layer.named_modules())
        found |= {
            f"{path}.{name}": (modules[name], STYLES[style])
            for name, style in layer_plan(model.config, anatomy.layers, layer).items()
            if name in modules and style in STYLES
        }
    return found


def tensor_files(path: str) -> dict[str, str]:
    """The file of each tensor of a checkpoint in safetensors: a local folder's or the hub's."""

    def find(name: str) -> str:
        return str(cached_file(path, name))

    try:
        single = find(SAFE_WEIGHTS_NAME)
    except OSError:
        index = read_object(Path(find(SAFE_WEIGHTS_INDEX_NAME)), weight_map=dict)["weight_map"]
        files = {file: find(file) for file in set(index.values())}
        return {name: files[file] for name, file in index.items()}
    with safe_open(single, "pt") as file:
        return dict.fromkeys(file.keys(), single)


def read_slices(model: PreTrainedModel, left: Left, files: dict[str, str], tp: DeviceMesh) -> None:
    """Read this process's part of the linear layers in `left` and put them into `model`."""
    for path, (linear, style) in left.items():
        read = partial(_read_slice, linear, path, files, tp)
        split_linear(linear, path, style, tp, read)
        model.set_submodule(path, linear)


def _read_slice(
    linear: nn.Linear, path: str, files: dict[str, str], tp: DeviceMesh, key: str, dim: int | None
) -> nn.Parameter:
    """The part of a parameter that is cut along `dim`, or all of it; see `split_linear`."""
    p, name = linear.get_parameter(key), f"{path}.{key}"
    with safe_open(files[name], "pt") as file:
        stored = file.get_slice(name)
        if tuple(stored.get_shape()) != tuple(p.shape):
            raise UserError(f"{files[name]}: {name} is {stored.get_shape()}, expected {[*p.shape]}")
        if dim is None:
            return nn.Parameter(stored[:].to(p.dtype), requires_grad=False)
        # A copy: a part of what is mapped would keep all pages that were looked at in memory.
        values = read_part(stored, dim, tp).to(p.dtype, copy=True).contiguous()
        part = SplitParameter(values, requires_grad=False)
        part.cuts = (Cut(dim, tp),)
        places = np.unravel_index(sample_places(p.numel()).numpy(), tuple(p.shape))
        one_by_one = [tuple(slice(i, i + 1) for i in place) for place in zip(*places, strict=True)]
        part.sample = torch.cat([stored[place].flatten() for place in one_by_one])
        return part


def load_tokenizer(
    path: str, vocab_size: int | None = None, trust: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or a hub id.

    vocab_size: rows of the embedding that its tokens have to be in, if given. trust: its own code
        may run.

    Raises:
        UserError: there is none, it has a token that the embedding lacks, or cannot be had
            without code of its own.
    """
    path = expanduser(path)
    try:
        gguf = gguf_file(path)
        if gguf:
            tokenizer = read_tokenizer(gguf)
        else:
            check_there(path, "tokenizer", "tokenizer_config.json")
            with own_code(path, "tokenizer_config.json", trust):
                tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # or no JSON object
        why = first_line(error)
        if why.rstrip().endswith("from one of:"):  # in lines of their own: what makes one
            why = "it has no tokenizer.json that can be read"
        raise UserError(f"no tokenizer in {path}: {why}; save the model's own there") from error
    if vocab_size is not None:
        token, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
        if number >= vocab_size:
            raise UserError(
                f"the tokenizer in {path} has the token {token!r}, number {number}, and the "
                f"backbone's embedding only {vocab_size} rows: resize the backbone with "
                "resize_token_embeddings, or name the tokenizer that it was made with"
            )
    return tokenizer
