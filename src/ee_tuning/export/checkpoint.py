"""Exits as ordinary checkpoints, for engines that know nothing of exits.

A `norm`, `mlp` or `layer` exit *is* a model of the backbone's own architecture with fewer layers
(method of arXiv 2402.00518, section 2), so transformers can save it and every engine can load it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel, PreTrainedTokenizerBase

from ee_tuning.adapter import CONFIG_NAME, HERE, model_card, save
from ee_tuning.backbone import slice_config
from ee_tuning.errors import UserError
from ee_tuning.exit_config import DRAFT
from ee_tuning.files import filling, read_json, write_json, write_text
from ee_tuning.folders import write_manifest
from ee_tuning.loading import Parts, load_backbone, without_bars
from ee_tuning.model import Network
from ee_tuning.twin import twin

DRAFT_EXIT = (
    "a draft exit sits at no layer; one of arch eagle3 is saved with --eagle3 speculators or "
    "--eagle3 sglang, one of arch draft has no form but ours"
)


def exit_checkpoint(model: Network, layer: int) -> PreTrainedModel:
    """The exit after `layer` as a causal LM of the backbone's own class, ready to be saved.

    It has `layer` layers, or one more for a `layer` exit, and shares all tensors with `model`.

    Raises:
        UserError: there is no such exit, or only a draft exit; it has no final norm (`embedding`)
            or does not know all tokens; or the backbone's family computes layers differently by
            their number.
    """
    if model.all_exit_layers == [DRAFT]:
        raise UserError(f"there is no exit at layer {layer}: {DRAFT_EXIT}")
    exit, backbone = model.exit(layer), model.backbone
    if model.vocabulary:
        raise UserError(
            f"exit {layer} knows {len(model.vocabulary.tokens)} tokens of the vocabulary only, "
            "which an ordinary checkpoint cannot say; tune with --exit-vocab 0 to export"
        )
    layers, kept = exit.as_layers(backbone.layers[:layer]), list(range(layer))
    # What stands behind them stands where the last layer stood.
    kept += [backbone.num_layers - 1] * (len(layers) - layer)
    assert exit.norm is not None
    anatomy, own = backbone.anatomy, not exit.output.shared
    parts: dict[str, nn.Module] = {
        f"{anatomy.trunk}.{anatomy.layers}": nn.ModuleList(layers),
        f"{anatomy.trunk}.{anatomy.norm}": exit.norm,
        anatomy.head: exit.output.linear,
    }
    exported: Any = twin(backbone.model, parts)
    exported.config = slice_config(backbone.config, kept)
    exported.get_submodule(anatomy.trunk).config = exported.config
    if own:
        exported.config.tie_word_embeddings = False
        exported.all_tied_weights_keys = {}
    _check_family(exported, exit.spec.arch)
    return exported


def _check_family(exported: PreTrainedModel, arch: str) -> None:
    """Refuse what transformers would not build again from the exported config.

    A family may derive something from a layer's number that its config does not list by layer.
    """
    config = exported.config
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        built = _facts(model_class(config))
    mine = _facts(exported)
    for name in sorted(built.keys() | mine.keys()):
        if built.get(name) != mine.get(name):
            raise UserError(
                f"{type(exported).__name__} computes a layer differently by its number ({name} "
                f"is {mine.get(name)} and would be {built.get(name)}), so this {arch} exit is no "
                "model of that class; export a norm exit"
            )


def _facts(model: nn.Module) -> dict[str, Any]:
    """The shapes of a model's tensors and the plain values its layers were built with, by path."""
    facts: dict[str, Any] = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    for path, module in model.named_modules():
        if not any(part.isdigit() for part in path.split(".")):
            continue  # outside the layers
        for name, value in vars(module).items():
            plain = value is None or isinstance(value, (bool, int, float, str))
            if plain and not name.startswith("_") and name not in ("layer_idx", "training"):
                facts[f"{path}.{name}"] = value
    return facts


def save_exit(
    exported: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, title: str
) -> None:
    """Write an `exit_checkpoint` with its tokenizer and a card to `folder`.

    Raises:
        UserError: it cannot be written, or read back.
    """
    with staged(folder) as staging:
        exported.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        write_text(
            staging / "README.md",
            f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n# {title}\n\n"
            f"An early exit, exported by ee-tuning as an ordinary {type(exported).__name__} with "
            f"{exported.config.num_hidden_layers} layers. Its use: a small model, or a draft "
            "model for assisted (speculative) generation with the backbone.\n",
        )
        _read_back(staging, exported)


def save_merged(
    model: Network,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    exits: dict[str, torch.Tensor],
) -> None:
    """Write backbone, tokenizer and exits to one `folder`, which may be moved afterwards.

    exits: their weights as they are stored, of more digits than the backbone's dtype perhaps.

    Raises:
        UserError: it cannot be written, or read back.
    """
    with staged(folder) as staging:
        model.backbone.model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        save(model, staging, state=exits, calibration=model.calibration)
        saved = read_json(staging / CONFIG_NAME) | {"base_model": HERE, "base_model_path": None}
        write_json(staging / CONFIG_NAME, saved)
        write_text(staging / "README.md", model_card(saved, here=True))
        _read_back(staging, model.model)


def _read_back(folder: Path, model: PreTrainedModel) -> None:
    """Read what a user will load, a layer at a time, and compare it with what was to be written.

    Raises:
        UserError: a tensor is missing or another one.
    """
    depth = model.config.num_hidden_layers
    for layer in range(1, depth + 1):
        parts = Parts(frozenset({layer}), embedding=layer == 1, head=layer == depth)
        written = load_backbone(str(folder), parts)
        for name, p in written.named_parameters():
            if not torch.equal(p, model.get_parameter(name).to("cpu", p.dtype)):
                raise UserError(f"{name} is another one when it is read back: nothing was exported")


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A folder beside the final files, which move to `folder` at the end, ``config.json`` last.

    So an export that was cut off is never taken for a checkpoint. A list of them makes it known
    as one that may be replaced.
    """
    with filling(folder, last="config.json") as staging, without_bars():
        yield staging
        write_manifest(staging)
