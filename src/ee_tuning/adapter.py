"""The saved form of exits: a small folder beside an untouched backbone. See docs/format.md."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from jinja2 import Template
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ee_tuning.certificate import Certificate, changed
from ee_tuning.errors import Notice, UserError, first_line
from ee_tuning.exit_config import DRAFTS, ExitConfig, exit_name
from ee_tuning.files import (
    HUB_ID,
    check_object,
    filling,
    read_json,
    read_object,
    write_json,
    write_text,
)
from ee_tuning.fingerprint import EXIT, config_values, exit_hash, hash_tensors, is_whole
from ee_tuning.folders import is_edited, signed
from ee_tuning.hub import check_there
from ee_tuning.model import Network
from ee_tuning.slices import SplitParameter, read_part

FORMAT_VERSION = 1
CONFIG_NAME = "exit_config.json"
WEIGHTS_NAME = "exits.safetensors"
CALIBRATION_NAME = "calibration.json"
CHECKPOINTS = "checkpoints"  # of a run, in its folder
KINDS = {  # of the values in an `exit_config.json`
    "base_model": str, "layers": list[int], "arch": list[str], "head": list[str], "init": str,
    "seed": int, "backbone": dict, "base_model_path": str | None, "sources": list[int] | None,
    "vocab_size": int | None, "vocab_coverage": float | None, "vocab_names": str | None,
}  # fmt: skip
HERE = "."  # the backbone of exits that lie in the same folder as it

CARD = Template(
    """\
---
library_name: ee-tuning
{%- if hub_id %}
base_model: {{ hub_id }}
{%- endif %}
tags: [early-exit, ee-tuning]
---

# Early exits{% if base %} for `{{ base }}`{% endif %}

Exits after {{ exits | length - drafts }} of the backbone's {{ depth }} layers
{%- if drafts %}, and one that drafts from what the
backbone made of the text in layers {{ sources | join(", ") }}{% endif %}, made with EE-Tuning
(arXiv 2402.00518). The backbone is {% if here %}in here, too,{% else %}not in here{% endif %}
and is not changed by them.

| exit layer | architecture | head |
|---|---|---|
{%- for layer, arch, head in exits %}
| {{ layer }} | {{ arch }} | {{ head }} |
{%- endfor %}

```python
from ee_tuning import EarlyExitModel

model = EarlyExitModel.from_pretrained("path-or-hub-id-of-these-exits")
out = model.generate(input_ids, mode="{{ mode }}", threshold=0.8, max_new_tokens=64)
```

{% if mode == "speculative" -%}
The draft exit drafts tokens, which the backbone verifies together: the text is the backbone's own.
{%- else -%}
A token leaves at the first exit whose largest softmax probability is at least the threshold;
threshold 1 gives the backbone's own text.
{%- endif %}
"""
)


def save(
    network: Network,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    state: dict[str, Tensor] | None = None,
    calibration: Certificate | None = None,
) -> None:
    """Write ``exits.safetensors``, ``exit_config.json`` and a model card, unless somebody has
    edited one; and what calibration found of these exits.

    All are written before the first one takes the place of what may be there already.

    dtype: what to store the weights in; default: as they are. state: in place of
    `Network.exit_state`, where other processes hold some of the exits; calibration: of these.

    Raises:
        UserError: they do, and there is no `state`.
    """
    folder = Path(folder).expanduser()
    if state is None and not _has_all(network):
        raise UserError(
            f"cannot save exits to {folder}: this process has a part of them, of several; save "
            "them from one that has loaded them alone"
        )
    with filling(folder, last=CONFIG_NAME) as staging:
        tensors = {
            k: v.to(dtype if dtype and v.is_floating_point() else v.dtype).cpu().clone()
            for k, v in (state or network.exit_state()).items()
        }
        save_file(tensors, staging / WEIGHTS_NAME, metadata={"format": "pt"})
        config = saved_config(network)
        write_json(staging / CONFIG_NAME, config)
        found = network.calibration if state is None else calibration
        if found is not None and not changed_exits(network, found):
            write_json(staging / CALIBRATION_NAME, found.to_json())
        if not is_edited(folder / "README.md"):
            write_text(staging / "README.md", model_card(config))


def _has_all(network: Network) -> bool:
    """Whether no other process has some of the exits, or of their weights."""
    alone = {*network.exit_layers} == {*network.all_exit_layers}
    return alone and all(is_whole(exit) for exit in network.exits.values())


def saved_config(network: Network) -> dict[str, Any]:
    """What ``exit_config.json`` holds."""
    specs = network.exit_config.specs(network.backbone.num_layers)
    path = network.model.name_or_path or ""
    return {
        "format_version": FORMAT_VERSION,
        "base_model": path,
        "base_model_path": str(Path(path).resolve()) if path and Path(path).exists() else None,
        **asdict(network.exit_config),
        "vocab_size": len(network.vocabulary.tokens) if network.vocabulary else None,
        "vocab_coverage": network.vocabulary.coverage if network.vocabulary else None,
        "vocab_names": network.vocabulary.names if network.vocabulary else None,
        "layers": [spec.layer for spec in specs],
        "arch": [spec.arch for spec in specs],
        "head": [spec.head for spec in specs],
        "sources": [*specs[-1].sources] or None,
        "backbone": {
            "config": config_values(network.config),
            "tensors": network.tensor_hashes,
        },
    }


def model_card(saved_config: dict[str, Any], here: bool = False) -> str:
    """Markdown for the contents of an ``exit_config.json``. here: the backbone is beside it."""
    exits = zip(*(saved_config[k] for k in ("layers", "arch", "head")), strict=True)
    saved_config = {"sources": None} | saved_config
    base = "" if here else saved_config["base_model"]
    card = CARD.render(
        base=base,
        # The hub refuses a card that names a folder there.
        hub_id=base if HUB_ID.fullmatch(base) and not saved_config["base_model_path"] else "",
        here=here,
        depth=saved_config["backbone"]["config"]["num_hidden_layers"],
        exits=[(exit_name(layer), arch, head) for layer, arch, head in exits],
        drafts=int(bool(saved_config["sources"])),
        sources=saved_config["sources"],
        mode="speculative" if {*saved_config["arch"]} <= {*DRAFTS} else "threshold",
    )
    return signed(card + "\n")


def read_weights(network: Network, folder: Path) -> None:
    """Read the exits' weights into place, of this process's stage and slices alone.

    Raises:
        UserError: files are missing or damaged, or hold other tensors than these exits.
    """
    elsewhere = {str(layer) for layer in network.all_exit_layers} - set(network.exits)
    own = dict(network.exits.named_parameters())
    with _reading(folder):
        tensors = {
            name: _read_part(*where, own.get(name))
            for name, where in _stored(folder).items()
            if name.partition(".")[0] not in elsewhere
        }
        if "vocabulary" in tensors:
            network.reduce_vocabulary(tensors.pop("vocabulary"))
        network.exits.load_state_dict(tensors)


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of saved exits by name, those of other processes, too, as they are stored.

    Raises:
        UserError: files are missing or damaged.
    """
    with _reading(folder):
        return {name: file.get_tensor(inner) for name, (file, inner) in _stored(folder).items()}


def count_parameters(folder: Path) -> dict[int, int]:
    """Number of parameters per exit layer, from the headers of the files alone.

    Raises:
        UserError: files are missing or damaged.
    """
    sizes: dict[int, int] = {}
    with _reading(folder):
        for name, (file, inner) in _stored(folder).items():
            if name == "vocabulary":  # what the exits know, no weights
                continue
            layer = int(name.partition(".")[0])
            sizes[layer] = sizes.get(layer, 0) + math.prod(file.get_slice(inner).get_shape())
    return sizes


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Inside, what goes wrong with a file is a UserError that names the folder."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{folder} is damaged or holds other exits: {reason}") from error


def _stored(folder: Path) -> dict[str, tuple[Any, str]]:
    """Every tensor of saved exits by name: the open file that holds it, and its name there.

    A checkpoint of a run has a file for each exit, and one for what they share.
    """
    files = {folder / WEIGHTS_NAME: ""}
    if (folder / "state.json").exists():
        parts = folder.glob("exit-*.safetensors")
        files = {path: f"{path.stem.removeprefix('exit-')}." for path in parts}
        files[folder / "common.safetensors"] = ""
    found: dict[str, tuple[Any, str]] = {}
    for path, prefix in files.items():
        if not path.exists():
            raise UserError(f"{path} does not exist")
        file = safe_open(path, "pt")
        names = [name for name in file.keys() if not name.startswith("random:")]  # noqa: SIM118
        found |= {f"{prefix}{name}": (file, name) for name in names}
    return found


def _read_part(file: Any, name: str, p: Tensor | None) -> Tensor:
    """What parameter `p` needs of a tensor in a file."""
    if not isinstance(p, SplitParameter):
        return file.get_tensor(name)
    (cut,) = p.cuts
    return read_part(file.get_slice(name), cut.dim, cut.mesh)


def base_of(folder: Path, saved: dict[str, Any], model: str | None) -> str:
    """Where the backbone of the exits in `folder` is: `model`, or where `saved` of them says.

    A folder is looked for where it was given, from here, and where it was then.

    Raises:
        UserError: it is a folder and in neither place.
    """
    given = model or saved["base_model"]
    then = None if model else saved.get("base_model_path")
    if given == HERE:
        return str(folder)
    if not then or Path(given).exists():
        return given
    if Path(then).exists():
        return then
    places = f"at {then}" if given == then else f"at {given}, from here, nor at {then}"
    raise UserError(
        f"the backbone of {folder} is not {places}: there is no such folder, say where it is with "
        "--model"
    )


def saved_exits(saved: dict[str, Any]) -> ExitConfig:
    """The exits that an ``exit_config.json`` describes."""
    known = {k: saved[k] for k in ("layers", "arch", "init", "head", "seed")}
    return ExitConfig(**known, sources=saved.get("sources"))


def find_exits(path: str) -> Path:
    """The local folder of saved exits; a hub id is fetched.

    Of a run that is on its way it is the last checkpoint's.

    Raises:
        UserError: there are none.
    """
    if not path:
        raise UserError("no exits given: name their folder or hub id with --exits")
    path = expanduser(path)
    check_there(path, "exits", CONFIG_NAME)
    folder = Path(path)
    if folder.is_dir():
        saved = [] if (folder / CONFIG_NAME).exists() else checkpoints(folder / CHECKPOINTS)
        if not saved:
            return folder
        last = saved[-1]
        warnings.warn(f"{path} is a run on its way: its exits are {last}", Notice, stacklevel=1)
        return last
    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.md"]))
    except Exception as error:  # huggingface_hub has a dozen kinds of its own
        raise UserError(
            f"{path} is neither a folder nor to be had from the hub: {first_line(error)}"
        ) from error


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints under `folder`, oldest first."""
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.partition("-")[2]))


def read_exit_config(folder: Path) -> dict[str, Any]:
    """``exit_config.json`` of a folder.

    Raises:
        UserError: it is missing, damaged, or of a format newer than this version knows.
    """
    path = folder / CONFIG_NAME
    if not path.exists():
        raise UserError(f"{folder} holds no exits: it has no {CONFIG_NAME}")
    saved = read_object(path, format_version=int)
    if saved["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path} has format {saved['format_version']}, this version reads {FORMAT_VERSION}"
        )
    check_object(saved, str(path), **KINDS)
    backbone = saved["backbone"]
    check_object(backbone, f"{path}: backbone", config=dict, tensors=dict)
    sizes = {"num_hidden_layers": int, "vocab_size": int}
    check_object(backbone["config"], f"{path}: backbone.config", **sizes)
    if len({len(saved[name]) for name in ("layers", "arch", "head")}) > 1:
        raise UserError(f"{path} is damaged: layers, arch and head must have an entry per exit")
    return saved


def read_calibration(folder: Path) -> Certificate | None:
    """What calibration found of the exits in a folder, if they were calibrated.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / CALIBRATION_NAME
    try:
        return Certificate.from_json(read_json(path), str(path)) if path.exists() else None
    except UserError as error:
        raise UserError(f"{error}: delete it, and calibrate again") from None


def save_calibration(network: Network, folder: Path, found: Certificate) -> None:
    """Write what calibration found of the exits that were read from `folder` beside them."""
    write_json(folder / CALIBRATION_NAME, found.to_json())
    network.calibration = found


def changed_exits(network: Network, found: Certificate) -> list[str]:
    """Those exits, of the ones calibrated, whose weights are others now, as messages call them.

    Raises:
        UserError: see `certificate.changed`.
    """
    read, now = network.exits_read, own_hashes(network, found.exits)
    there = None
    if read is not None:
        there = read.own, {k: read.whole[k] for k in found.exits if k in read.whole}
    return changed(EXIT, now, found.exits, there)


def own_hashes(network: Network, layers: Iterable[int]) -> dict[int, str]:
    """A hash of what this process has of each exit at `layers`, as it is now."""
    return {k: exit_hash(network.exit(k)) for k in layers if k in network.exit_layers}


def stored_hashes(
    folder: Path, saved: dict[str, Any], layers: Iterable[int], dtype: torch.dtype
) -> dict[int, str]:
    """`exit_hash` of the exits at `layers` as they are once loaded in `dtype`, of what is stored.

    saved: the folder's ``exit_config.json``. Exits with a reduced vocabulary that share the
    backbone's head have none: they have rows of it.
    """
    tensors = stored(folder)
    tokens, found = tensors.pop("vocabulary", None), {}
    known = {} if tokens is None else {"buffer output.tokens": tokens}
    heads = dict(zip(saved["layers"], saved["head"], strict=True))
    for k in (k for k in layers if tokens is None or heads[k] == "own"):
        own = {name.partition(".")[2]: t for name, t in tensors.items() if name.startswith(f"{k}.")}
        found[k] = hash_tensors({name: t.to(dtype) for name, t in own.items()} | known)
    return found
