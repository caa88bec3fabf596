"""The part of a model that one of several processes decodes with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from ee_tuning.adapter import own_hashes
from ee_tuning.certificate import ExitsRead
from ee_tuning.config import SamplingConfig
from ee_tuning.costs import work
from ee_tuning.decode.engines import engines_of
from ee_tuning.devices import pick_device, pick_dtype
from ee_tuning.errors import UserError
from ee_tuning.fingerprint import EXIT, backbone_hashes, whole_exit_hash
from ee_tuning.loading import Slices, load_tokenizer
from ee_tuning.model import Network
from ee_tuning.parallel.data import collect_hashes
from ee_tuning.parallel.mesh import Mesh
from ee_tuning.parallel.tensor import check_splits, split_model
from ee_tuning.share import Kind, New, Saved, Share, load, shapes
from ee_tuning.stages import cut_layers
from ee_tuning.vocabulary import check_names


def load_part(
    source: New | Saved,
    share: Share,
    kind: type[Kind],
    mesh: Mesh,
    stage_layers: Sequence[int] = (),
) -> Kind:
    """`ee_tuning.share.load` of what this process of a connected `mesh` needs.

    Those that have parts of one model then decode together, with the same calls. stage_layers:
    layers per stage; default: balanced by the sizes of layers and exits.

    Raises:
        UserError: as `load`, on every process; or the backbone cannot be cut into so many stages,
            or split so often.
    """
    together = mesh.of_one_model()
    if together.size > 1:
        stage = mesh.on_all(lambda: _own_stage(source, mesh, stage_layers))
        share = replace(share, stage=stage, whole=False)
    if mesh.tp > 1:
        share = replace(share, slices=Slices(mesh.axis("tp"), gather=True))
    found = mesh.on_all(lambda: load(source, share, kind))
    last = found.stage.stop == found.backbone.num_layers
    mesh.on_all(lambda: split_model(found, mesh, teacher=last, gather=True))
    together.check_same("calibration", repr(found.calibration))
    if together.size > 1 and found.calibration is not None:
        layers = found.all_exit_layers
        hashes = exit_hashes(found, layers, together)
        parts = collect_hashes(backbone_hashes(found.backbone), together)
        found.exits_read = ExitsRead(hashes, own_hashes(found, layers), parts)
    engines = engines_of(found)
    engines.mesh = together
    mesh.frees(engines.clear)
    return found


def exit_hashes(model: Network, layers: Iterable[int], mesh: Mesh) -> dict[int, str]:
    """A hash of each exit at `layers`, which the processes of `mesh` have together.

    Raises:
        UserError: two processes have different ones.
    """
    own = {k: whole_exit_hash(model.exit(k)) for k in layers if k in model.exit_layers}
    return collect_hashes(own, mesh, EXIT)


def load_for_decoding(
    config: SamplingConfig, mesh: Mesh | None = None, stage_layers: Sequence[int] = ()
) -> tuple[Network, PreTrainedTokenizerBase]:
    """The model, or this process's part of it, and tokenizer that a `SamplingConfig` names."""
    device = pick_device(config.device)
    share = Share(dtype=pick_dtype(config.precision, device), device=str(device))
    source = Saved(config.exits, config.model or None, config.trust_remote_code)
    mesh = mesh or Mesh()
    model = load_part(source, share, Network, mesh, stage_layers)
    trust = config.trust_remote_code
    return model, mesh.on_all(lambda: tokenizer_of(model, config.exits, trust))


def tokenizer_of(
    model: Network, exits: str, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside a model's backbone. exits: where they were read from.

    Raises:
        UserError: there is none, or the exits know the tokens of another one.
    """
    backbone = model.backbone
    path, rows = backbone.model.name_or_path, backbone.config.vocab_size
    tokenizer = load_tokenizer(path, rows, trust_remote_code)
    check_names(model.vocabulary, tokenizer, exits)
    return tokenizer


def _own_stage(source: New | Saved, mesh: Mesh, numbers: Sequence[int]) -> range:
    """The layers of this process's stage, counted from 0."""
    empty = shapes(source)
    depth = empty.backbone.num_layers
    check_splits(empty.backbone, mesh.tp)
    if mesh.pp > depth:
        raise UserError(f"pp is {mesh.pp}: the backbone has only {depth} layers")
    costs = work(empty).decoding()
    return cut_layers(costs, mesh.pp, numbers, "the backbone's layers")[mesh.pp_rank]
