"""EarlyExitModel: a frozen backbone with exits beside it; forward, saving, loading."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pipelines.base import SUPPORTED_PEFT_TASKS
from transformers.utils import ModelOutput

from ee_tuning.backbone import Backbone, Segment, State, in_memory
from ee_tuning.card import model_card
from ee_tuning.config import ExitConfig, FrozenPrecision
from ee_tuning.devices import check_fp8
from ee_tuning.errors import UserError, first_line
from ee_tuning.exits import ARCHS, Exit
from ee_tuning.files import read_json, replacing, write_json, write_text
from ee_tuning.loading import (
    Parts,
    Slices,
    check_same,
    config_values,
    load_backbone,
    load_config,
    tensor_hashes,
)
from ee_tuning.losses import cross_entropy
from ee_tuning.parallel.frozen import FrozenShard, FrozenShards
from ee_tuning.quantise.fp8 import freeze_in_fp8
from ee_tuning.quantise.packages import (
    check_installed,
    nothing_to_quantise,
    quantise_layer,
)
from ee_tuning.slices import SplitParameter, read_part
from ee_tuning.vocabulary import Vocabulary

FORMAT_VERSION = 1
CONFIG_NAME = "exit_config.json"
WEIGHTS_NAME = "exits.safetensors"
# Pipelines take any model, but log an error if its class is not listed. This list is of models that
# wrap another one.
SUPPORTED_PEFT_TASKS["text-generation"].append("EarlyExitModel")
HERE = "."  # the backbone of exits that lie in the same folder as it


@dataclass
class EarlyExitOutput(ModelOutput):
    """Result of a forward pass.

    loss: sum of the exits' mean losses, if labels were given; logits: (B, T, V) of the final
    exit, if asked for; exit_losses and exit_logits: by exit layer.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    exit_losses: dict[int, Tensor] | None = None
    exit_logits: dict[int, Tensor] | None = None


class EarlyExitModel(nn.Module):
    """A causal LM of transformers, frozen, and its exits.

    `exits` maps ``str(layer)`` to an `Exit`; `model` is the causal LM, `backbone` knows its parts.
    """

    def __init__(
        self, model: PreTrainedModel, config: ExitConfig, stage: range | None = None
    ) -> None:
        """Add exits to a loaded model. Prefer `from_base` and `from_pretrained`.

        stage: the layers (counted from 0) that a stage of a pipeline runs, with the exits after
        them; default: those up to the deepest exit.

        Raises:
            UserError: the model or the exits are not what this method can work with.
        """
        super().__init__()
        self.model = model  # a submodule, so that `to` moves it; its parameters need no gradient
        self.backbone = Backbone(model)
        if model.device.type != "meta":
            self.backbone.check_cuts()
        self.exit_config = config
        specs = config.specs(self.backbone.num_layers)
        self.all_exit_layers = [spec.layer for spec in specs]  # of every stage
        self.stage = range(specs[-1].layer) if stage is None else stage
        own = [spec for spec in specs if spec.layer - 1 in self.stage]
        self.exits = nn.ModuleDict(
            {str(spec.layer): ARCHS[spec.arch](self.backbone, spec) for spec in own}
        )
        if config.init == "random":
            for exit in self.exits.values():
                exit.reset_random(config.seed)  # type: ignore[operator]
        self.vocabulary: Vocabulary | None = None  # of the exits, if it is reduced
        self.chain = Chain(self)

    @classmethod
    def from_base(
        cls,
        model: str | PreTrainedModel,
        config: ExitConfig,
        *,
        whole: bool = True,
        dtype: torch.dtype | str = "auto",
        device: str | torch.device | None = None,
        backbone_precision: FrozenPrecision = "same",
        stage: range | None = None,
        slices: Slices | None = None,
        shard: dist.ProcessGroup | None = None,
    ) -> EarlyExitModel:
        """New exits on a backbone: a local folder, a hub id or a loaded model.

        whole: False leaves out of memory the layers deeper than the deepest exit, and what
        another `stage` (layers counted from 0) of a pipeline has. device: default where the model
        is, CPU if it was not loaded yet. backbone_precision, shard: see `place`. slices:
        see `load_backbone`.
        """
        if isinstance(model, str):
            parts = None if whole else _needed(model, config, stage)
            model = load_backbone(model, parts, dtype, slices)
        early_exit = cls(model, config, stage)
        early_exit.place(device or model.device, backbone_precision, shard)
        return early_exit

    @classmethod
    def from_pretrained(
        cls,
        exits: str,
        model: str | PreTrainedModel | None = None,
        *,
        whole: bool = True,
        dtype: torch.dtype | str = "auto",
        exit_dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        backbone_precision: FrozenPrecision = "same",
        stage: range | None = None,
        slices: Slices | None = None,
        shard: dist.ProcessGroup | None = None,
    ) -> EarlyExitModel:
        """Saved exits (a folder or a hub id) on their backbone, looked up if not given.

        whole, device, backbone_precision, stage, slices, shard: as for `from_base`. exit_dtype:
        default the backbone's.

        Raises:
            UserError: files missing or damaged, or exits made for another backbone.
        """
        folder = find_exits(exits)
        saved = read_exit_config(folder)
        config = saved_exits(saved)
        if model is None or isinstance(model, str):
            path = base_of(folder, saved, model)
            if not path:
                raise UserError(f"{exits} does not name its backbone: give it with --model")
            if slices and saved.get("vocab_size"):
                slices = replace(slices, head=False)  # its rows are picked first
            try:
                parts = None if whole else _needed(path, config, stage)
                model = load_backbone(path, parts, dtype, slices)
            except UserError as error:
                if model is not None:
                    raise
                raise UserError(
                    f"{error}; {exits} was made with that backbone: say where it is with --model"
                ) from error
        check_same(saved["backbone"]["config"], config_values(model.config), exits)
        early_exit = cls(model, config, stage)
        hashes, found = saved["backbone"]["tensors"], early_exit.tensor_hashes
        if stage is not None:
            hashes = {part: value for part, value in hashes.items() if part in found}
        check_same(hashes, found, exits)
        early_exit.exits.to(exit_dtype or early_exit.backbone.dtype)
        early_exit.load_exits(folder / WEIGHTS_NAME)
        early_exit.place(device or model.device, backbone_precision, shard)
        return early_exit

    def place(
        self,
        device: str | torch.device,
        backbone_precision: FrozenPrecision,
        shard: dist.ProcessGroup | None = None,
    ) -> None:
        """Move to `device`, layer by layer.

        backbone_precision: unless ``same``, the frozen layers' matrices are quantised on the way;
        in ``fp8`` the head's too if an exit shares it. shard: the processes that each keep a part
        of the frozen layers' matrices, which are whole only while their layer runs.

        Raises:
            UserError: there is nothing that can be quantised, or a package is missing for it.
        """
        fp8, quantises = backbone_precision == "fp8", backbone_precision != "same"
        if quantises or shard:
            self.tensor_hashes  # noqa: B018 - of the weights as they are
        if fp8:
            check_fp8("--backbone-precision", torch.device(device))
        check_installed(backbone_precision)
        quantised, shards = 0, FrozenShards()
        layers: list[nn.Module] = self.backbone.layers
        for number, layer in enumerate(layers):
            layer.to(device)
            if fp8:
                quantised += freeze_in_fp8(layer)
            elif quantises and in_memory(layer):
                quantised += quantise_layer(layer, backbone_precision, self.backbone.dtype)
            if shard and in_memory(layer):
                shards[number] = FrozenShard(layer, shard)
        self.to(device)
        if shards:
            self.chain.gather(shards)
        if fp8:
            self.freeze_shared_head()
        if quantises and not quantised:
            raise nothing_to_quantise(self.model, backbone_precision)

    def freeze_shared_head(self) -> None:
        """Keep the backbone's head in fp8 if an exit shares it."""
        if any(self.exit(layer).output.shared for layer in self.exit_layers):
            freeze_in_fp8(self.backbone.head, backward=True)

    @cached_property
    def tensor_hashes(self) -> dict[str, str]:
        """The backbone's fingerprint; see `ee_tuning.loading.tensor_hashes`."""
        return tensor_hashes(self.backbone, self.all_exit_layers[-1])

    @property
    def exit_layers(self) -> list[int]:
        """Layers with an exit in this stage, counted from 1, in order of depth."""
        return sorted(int(name) for name in self.exits)

    def exit(self, layer: int) -> Exit:
        """The exit after `layer`.

        Raises:
            UserError: there is none.
        """
        self.check_exit(layer)
        return self.exits[str(layer)]  # type: ignore[return-value]

    def check_exit(self, layer: int) -> None:
        """Refuse a layer without an exit, whatever stage it is in.

        Raises:
            UserError: there is none.
        """
        if layer not in self.all_exit_layers:
            raise UserError(
                f"there is no exit at layer {layer}: the exits are at {self.all_exit_layers}"
            )

    def segments(
        self, exit_layers: Sequence[int] | None = None, last: int | None = None
    ) -> list[Segment]:
        """The backbone from this stage's first layer to layer `last` (default: the backbone's
        end), cut after each of `exit_layers`.

        Raises:
            UserError: a layer has no exit.
        """
        layers = self.exit_layers if exit_layers is None else exit_layers
        last = self.backbone.num_layers if last is None else last
        stops = sorted({*layers, last})
        records = [k in layers and self.exit(k).records_call for k in stops]
        starts = [self.stage.start, *stops[:-1]]
        return [self.backbone.segment(*cut) for cut in zip(starts, stops, records, strict=True)]

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_exit_logits: bool = False,
        output_logits: bool = False,
    ) -> EarlyExitOutput:
        """Losses and logits of every exit, with gradients for the exits alone.

        input_ids, labels, position_ids: (B, T) int64; labels as in transformers: the same
        tokens, shifted inside, −100 where there is no loss. There is none either where the label is
        not in a reduced vocabulary of the exits.
        """
        losses: dict[int, Tensor] = {}
        exit_logits: dict[int, Tensor] = {}
        final = None
        labels = None if labels is None else self.known_labels(labels)
        descent = self.chain.descend(input_ids, position_ids)
        for layer in self.exit_layers:
            logits = self.exit(layer)(descent.to(layer))
            if output_exit_logits:
                exit_logits[layer] = logits
            if labels is not None:
                losses[layer] = cross_entropy(logits, labels).mean()
        if output_logits:
            with torch.no_grad():
                final = self.backbone.final_logits(descent.ahead(self.backbone.num_layers))
        return EarlyExitOutput(
            loss=torch.stack(list(losses.values())).sum() if losses else None,
            logits=final,
            exit_losses=losses or None,
            exit_logits=exit_logits or None,
        )

    def generate(
        self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any
    ) -> Any:
        """Generate from prompts (B, P), `inputs` or ``input_ids``; see `ee_tuning.decode.generate`.

        Names and order of the arguments are those of transformers.
        """
        from ee_tuning.decode import generate

        if inputs is not None and kwargs.get("input_ids") is not None:
            raise UserError("both inputs and input_ids are given: leave one out")
        input_ids = kwargs.pop("input_ids", inputs)
        return generate(self, input_ids, generation_config=generation_config, **kwargs)

    def generate_batch(self, prompts: Iterable[Any], **kwargs: Any) -> Iterator[tuple[int, Any]]:
        """Generate from any number of prompts; see `ee_tuning.decode.generate_batch`."""
        from ee_tuning.decode import generate_batch

        return generate_batch(self, prompts, **kwargs)

    def warm_up(self, **kwargs: Any) -> float:
        """Compile decoding ahead; see `ee_tuning.decode.warm_up`."""
        from ee_tuning.decode import warm_up

        return warm_up(self, **kwargs)

    # What transformers' pipelines ask a model for.

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the backbone's weights."""
        return self.backbone.dtype

    @property
    def config(self) -> PreTrainedConfig:
        """The backbone's, as transformers asks any model for one; the exits' is `exit_config`."""
        return self.backbone.config

    @property
    def generation_config(self) -> Any:
        """The backbone's."""
        return self.model.generation_config

    def can_generate(self) -> bool:
        """Yes."""
        return True

    def train(self, mode: bool = True) -> EarlyExitModel:
        """Exits and backbone stay in evaluation mode: dropout is off while tuning, too."""
        super().train(False)
        return self

    def reduce_vocabulary(self, tokens: Tensor) -> None:
        """Let the exits know only `tokens` (N,) int64, ascending.

        Raises:
            UserError: the vocabulary was reduced to others before.
        """
        if self.vocabulary is not None:
            if not torch.equal(self.vocabulary.tokens, tokens.cpu()):
                raise UserError(
                    "the exits' vocabulary is reduced to other tokens already: leave exit_vocab out"
                )
            return
        self.vocabulary = Vocabulary(tokens, self.backbone.config.vocab_size)
        for layer in self.exit_layers:
            self.exit(layer).reduce_vocabulary(self.backbone, tokens.to(self.backbone.device))

    def known_labels(self, labels: Tensor) -> Tensor:
        """Labels (B, T) with −100 where the exits' vocabulary is reduced and lacks the token."""
        if self.vocabulary is None:
            return labels
        return self.vocabulary.known(labels.cpu()).to(labels.device)

    # -- saving and loading --------------------------------------------------------------------

    def exit_state(self) -> dict[str, Tensor]:
        """Every parameter of the exits by name: ``8.norm.weight``, ``8.head.weight``, …"""
        found = {name: p.detach().contiguous() for name, p in self.exits.named_parameters()}
        return found | ({"vocabulary": self.vocabulary.tokens} if self.vocabulary else {})

    def save_pretrained(
        self,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        state: dict[str, Tensor] | None = None,
    ) -> None:
        """Write ``exits.safetensors``, ``exit_config.json`` and a model card.

        dtype: what to store the weights in; default: as they are. state: in place of
        `exit_state`, where other processes hold some of the exits.
        """
        folder = Path(folder)
        with replacing(folder / WEIGHTS_NAME) as path:
            tensors = {
                k: v.to(dtype if dtype and v.is_floating_point() else v.dtype).cpu().clone()
                for k, v in (state or self.exit_state()).items()
            }
            save_file(tensors, path, metadata={"format": "pt"})
        config = self.saved_config()
        write_json(folder / CONFIG_NAME, config)
        if not (folder / "README.md").exists():
            write_text(folder / "README.md", model_card(config))

    def saved_config(self) -> dict[str, Any]:
        """What ``exit_config.json`` holds."""
        specs = self.exit_config.specs(self.backbone.num_layers)
        return {
            "format_version": FORMAT_VERSION,
            "base_model": self.backbone.model.name_or_path,
            **asdict(self.exit_config),
            "vocab_size": len(self.vocabulary.tokens) if self.vocabulary else None,
            "layers": [spec.layer for spec in specs],
            "arch": [spec.arch for spec in specs],
            "head": [spec.head for spec in specs],
            "backbone": {
                "config": config_values(self.backbone.config),
                "tensors": self.tensor_hashes,
            },
        }

    def load_exits(self, path: Path) -> None:
        """Read the exits' weights into place, of this stage alone.

        Raises:
            UserError: the file is missing or damaged, or holds other tensors than these exits.
        """
        elsewhere = {str(layer) for layer in self.all_exit_layers} - set(self.exits)
        try:
            with safe_open(path, "pt") as file:
                names = [k for k in file.keys() if k.partition(".")[0] not in elsewhere]  # noqa: SIM118
                own = dict(self.exits.named_parameters())
                tensors = {name: _read_part(file, name, own.get(name)) for name in names}
            if "vocabulary" in tensors:
                self.reduce_vocabulary(tensors.pop("vocabulary"))
            self.exits.load_state_dict(tensors)
        except FileNotFoundError:
            raise UserError(f"{path} does not exist") from None
        except (SafetensorError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise UserError(f"{path} is damaged or holds other exits: {reason}") from error

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None
    ) -> str:
        """Upload the exits to the hub; gives the address of the repository."""
        api = HfApi(token=token)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        folder = tempfile.mkdtemp()
        try:
            self.save_pretrained(folder)
            api.upload_folder(repo_id=url.repo_id, folder_path=folder)
        finally:
            shutil.rmtree(folder)
        return str(url)


def _read_part(file: Any, name: str, p: Tensor | None) -> Tensor:
    """What parameter `p` needs of a tensor in a file."""
    if not isinstance(p, SplitParameter):
        return file.get_tensor(name)
    return read_part(file.get_slice(name), p.split_dim, p.mesh)


def _needed(path: str, config: ExitConfig, stage: range | None) -> Parts:
    """What these exits, or those of a stage (layers from 0), need: its layers, the last one if a
    `layer` exit is made from it, and the embedding and head where they are used."""
    num_layers = load_config(path).num_hidden_layers
    specs = config.specs(num_layers)
    layers = range(specs[-1].layer) if stage is None else stage
    own = [spec for spec in specs if spec.layer - 1 in layers]
    last = {num_layers} if any(spec.arch == "layer" for spec in own) else set()
    head = bool(own) or layers.stop == num_layers
    return Parts(frozenset(k + 1 for k in layers) | last, layers.start == 0, head)


def base_of(folder: Path, saved: dict[str, Any], model: str | None) -> str:
    """Where the backbone of the exits in `folder` is: `model`, or what `saved` of them says."""
    path = model or saved["base_model"]
    return str(folder) if path == HERE else path


def saved_exits(saved: dict[str, Any]) -> ExitConfig:
    """The exits that an ``exit_config.json`` describes."""
    return ExitConfig(**{k: saved[k] for k in ("layers", "arch", "init", "head", "seed")})


def find_exits(path: str) -> Path:
    """The local folder of saved exits; a hub id is fetched.

    Raises:
        UserError: there are none.
    """
    if not path:
        raise UserError("no exits given: name their folder or hub id with --exits")
    folder = Path(path)
    if folder.is_dir():
        return folder
    if path.startswith((".", "/", "~")) or path.count("/") != 1 or path.endswith("/"):
        raise UserError(f"the exits' folder {path!r} does not exist")
    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.md"]))
    except Exception as error:  # huggingface_hub has a dozen kinds of its own
        raise UserError(
            f"{path} is neither a folder nor to be had from the hub: {first_line(error)}"
        ) from error


def read_exit_config(folder: Path) -> dict[str, Any]:
    """``exit_config.json`` of a folder.

    Raises:
        UserError: it is missing, damaged, or of a format newer than this version knows.
    """
    path = folder / CONFIG_NAME
    if not path.exists():
        raise UserError(f"{folder} holds no exits: it has no {CONFIG_NAME}")
    saved = read_json(path)
    needed = {"format_version", "layers", "arch", "init", "head", "seed", "backbone"}
    lacking = _lacking(saved, needed) or [
        f"backbone.{name}" for name in _lacking(saved["backbone"], {"config", "tensors"})
    ]
    if lacking:
        raise UserError(f"{path} lacks {', '.join(lacking)}")
    if saved["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path} has format {saved['format_version']}, this version reads {FORMAT_VERSION}"
        )
    return saved


def _lacking(found: Any, names: set[str]) -> list[str]:
    """Those of `names` that are no keys of what a JSON file held."""
    return sorted(names - (found.keys() if isinstance(found, dict) else set()))


# -- going down the layers -------------------------------------------------------------------------

Around = Callable[[str], AbstractContextManager[None]]  # entered with what is done inside


def unrecorded(what: str) -> AbstractContextManager[None]:
    """An `Around` that does nothing."""
    return nullcontext()


class Preparation(Protocol):
    """What changes how segments run, see `ee_tuning.parallel.frozen` and `sequence`."""

    def prepare(self, segment: Segment) -> None:
        """Change a segment that has not run yet."""


class Chain:
    """The segments that this process runs, one after another, cut after each of its exits.

    They are made when they are first needed: what is applied from outside comes before, see
    `ee_tuning.tune.setup`.

    compiled: so is all that the tuning step runs. takes_boundaries: attention is told where
    documents begin, see `ee_tuning.varlen`. shards: of layers of which other processes have parts,
    so that all have to run them equally often. part: this process's, of the positions.
    """

    def __init__(self, model: EarlyExitModel) -> None:
        self._model = model
        self._changes: list[Callable[[Segment], None]] = []
        self._segments: dict[int, Segment] = {}  # by the layer, from 0, that they begin with
        self.compiled = False
        self.takes_boundaries = False
        self.shards: Preparation | None = None
        self.part: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """To pickle or copy: segments are made anew there, since they hold functions."""
        return self.__dict__ | {"_segments": {}}

    def compile(self, layers: bool = True) -> None:
        """Compile what runs; layers: the frozen ones, too."""
        self.compiled = True
        if layers:
            self._changes.append(Segment.compile)

    def gather(self, shards: Preparation) -> None:
        """Let layers be whole only while they run."""
        self.shards = shards
        self._changes.append(shards.prepare)

    def on_part(self, part: Any) -> None:
        """Let hidden states be of this process's `part` of the positions alone."""
        self.part = part
        self._changes.append(part.prepare)

    def descend(
        self,
        inputs: Tensor,
        position_ids: Tensor | None = None,
        boundaries: Tensor | None = None,
        *,
        keeps: Collection[int] = (),
        around: Around = unrecorded,
    ) -> Descent:
        """A micro-batch at the first of these layers; see `Descent`.

        inputs: token ids (B, T) int64, or for a later stage hidden states (B, T, H), of which
        there is a `part` only if the positions are split. position_ids: (B, T) int64; positions
        that start again mark packed documents. boundaries: the same for a chain that
        `takes_boundaries`.
        """
        if position_ids is None:
            position_ids = torch.arange(inputs.shape[1], device=inputs.device)
            position_ids = position_ids.expand(inputs.shape[:2])
        return Descent(self, inputs, (position_ids, boundaries), keeps, around)

    @property
    def start(self) -> int:
        """The layer, from 0, that it begins with."""
        return self._model.stage.start

    @property
    def stop(self) -> int:
        """The last layer of this stage, which by default is the deepest exit's."""
        return self._model.stage.stop

    def segment(self, start: int) -> Segment:
        """The segment that begins with layer `start`, from 0: the same every time.

        Behind the stage there is one more, to the backbone's end.

        Raises:
            UserError: its layers were left out of memory.
        """
        if not self._segments:
            self._add(self._model.segments(last=self.stop))
        if start == self.stop and start not in self._segments:
            self._add([self._model.backbone.segment(start, self._model.backbone.num_layers)])
        return self._segments[start]

    def _add(self, segments: list[Segment]) -> None:
        for segment in segments:
            for change in self._changes:
                change(segment)
            self._segments[segment.start] = segment


class Descent:
    """A micro-batch on its way down the frozen layers, which run when a state is asked for.

    States are asked for by depth and given away, so that one exit can be finished before going
    deeper: what else it needed of its layer is gone before the next layer runs.

    hidden: (B, T, H) after layer `at`; at the beginning of a model, token ids (B, T). kept: those
    after some layers, for an exit that needs more than one.
    """

    def __init__(
        self,
        chain: Chain,
        inputs: Tensor,
        where: tuple[Tensor, Tensor | None],
        keeps: Collection[int],
        around: Around,
    ) -> None:
        """where: positions and boundaries. around: entered with "forward" when layers run."""
        self._chain, self._where, self._around = chain, where, around
        self.hidden, self.at = inputs, chain.start
        self.kept: dict[int, Tensor] = {}
        self._keeps = keeps
        self._passed: dict[int, State] = {}  # by what `ahead` ran, and nobody asked for yet

    def to(self, layer: int) -> State:
        """The state after `layer`, which is that of an exit or the last one.

        Runs the layers that it still lacks, without gradients.
        """
        state = self._passed.pop(layer, None)
        while self.at < layer:
            state = None  # gone before the next one is made
            state = self._run()
        assert state is not None, f"the state after layer {layer} was given away"
        return state

    def ahead(self, layer: int) -> Tensor:
        """Run on to `layer`; gives the hidden state there. `to` gives the states passed."""
        while self.at < layer:
            state = self._run()
            self._passed[self.at] = state
        return self.hidden

    def _run(self) -> State:
        """The state at the end of the segment that begins here."""
        segment, (position_ids, boundaries) = self._chain.segment(self.at), self._where
        with self._around("forward"), torch.no_grad():
            state = segment(self.hidden, position_ids, boundaries=boundaries)
        self.hidden, self.at = state.hidden, segment.stop
        if self.at in self._keeps:
            self.kept[self.at] = state.hidden
        return state
