"""The network: a frozen backbone with exits beside it, and micro-batches on their way down."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ee_tuning.backbone import Backbone, Segment, State
from ee_tuning.certificate import Certificate, ExitsRead
from ee_tuning.errors import UserError
from ee_tuning.exit_config import DRAFT, ExitConfig, exit_name
from ee_tuning.exits import ARCHS, DraftExit, Exit
from ee_tuning.fingerprint import tensor_hashes
from ee_tuning.losses import cross_entropy
from ee_tuning.vocabulary import Vocabulary


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


class Network(nn.Module):
    """A causal LM of transformers, frozen, and its exits.

    `exits` maps ``str(layer)`` to an `Exit`; `model` is the causal LM, `backbone` knows its parts.
    """

    def __init__(
        self, model: PreTrainedModel, config: ExitConfig, stage: range | None = None
    ) -> None:
        """Add exits to a loaded model.

        stage: the layers (counted from 0) that a stage of a pipeline runs, with the exits after
        them; default: those up to the deepest exit, with a draft exit all.

        Raises:
            UserError: the model or the exits are not what this method can work with.
        """
        super().__init__()
        self.model = model  # a submodule, so that `to` moves it; its parameters need no gradient
        self.backbone = Backbone(model)
        if model.device.type != "meta":
            self.backbone.check_cuts()
        self.exit_config = config
        num_layers = self.backbone.num_layers
        specs = config.specs(num_layers)
        self.all_exit_layers = [spec.layer for spec in specs]  # of every stage
        self.sources = specs[-1].sources  # layers whose states a draft exit, of any stage, reads
        self._deepest = specs[-1].end(num_layers)
        self.stage = range(self._deepest) if stage is None else stage
        own = [spec for spec in specs if spec.is_in(self.stage, num_layers)]
        self.exits = nn.ModuleDict(
            {str(spec.layer): ARCHS[spec.arch](self.backbone, spec) for spec in own}
        )
        if config.init == "random":
            for exit in self.exits.values():
                exit.reset_random(config.seed)  # type: ignore[operator]
        self.vocabulary: Vocabulary | None = None  # of the exits, if it is reduced
        self.calibration: Certificate | None = None  # that was saved with the exits
        self.exits_read: ExitsRead | None = None  # if ranks share calibrated exits
        self.chain = Chain(self)

    @cached_property
    def tensor_hashes(self) -> dict[str, str]:
        """The backbone's fingerprint; see `ee_tuning.fingerprint.tensor_hashes`."""
        return tensor_hashes(self.backbone, self._deepest)

    @property
    def exit_layers(self) -> list[int]:
        """Layers with an exit in this stage, counted from 1, in order of depth; last, the number
        of the draft exit, `DRAFT`, if there is one."""
        return [int(name) for name in self.exits]

    @property
    def draft(self) -> DraftExit | None:
        """The draft exit, where this process has one."""
        exits: dict[str, Any] = self.exits._modules
        return exits.get(str(DRAFT))

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
            found = ", ".join(map(exit_name, self.all_exit_layers))
            raise UserError(f"there is no exit at layer {layer}: the exits are at [{found}]")

    def segments(
        self,
        exit_layers: Sequence[int] | None = None,
        last: int | None = None,
        sources: Sequence[int] = (),
        change: Callable[[nn.Module], nn.Module] | None = None,
    ) -> list[Segment]:
        """The backbone from this stage's first layer to layer `last` (default: the backbone's
        end), cut after each of `exit_layers` and `sources`. change: what to do to each layer.

        Raises:
            UserError: one of `exit_layers` has no exit.
        """
        layers = self.exit_layers if exit_layers is None else exit_layers
        layers = [k for k in layers if k != DRAFT]
        last = self.backbone.num_layers if last is None else last
        stops = sorted({*layers, *sources, last})
        records = [k in layers and self.exit(k).records_call for k in stops]
        cuts = zip([self.stage.start, *stops[:-1]], stops, records, strict=True)
        return [self.backbone.segment(*cut, change) for cut in cuts]

    def forward(
        self,
        input_ids: Tensor,
        *,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_exit_logits: bool = False,
        output_logits: bool = False,
    ) -> EarlyExitOutput:
        """Losses and logits of exits, with gradients for these; full depth's if none are wanted.

        input_ids, labels, position_ids: (B, T) int64; labels as in transformers: the same
        tokens, shifted inside, −100 where there is no loss. There is none either where the label is
        not in a reduced vocabulary of the exits.
        """
        losses, exit_logits, final = dict[int, Tensor](), dict[int, Tensor](), None
        labels = None if labels is None else self.known_labels(labels)
        descent = self.chain.descend(input_ids, position_ids)
        wanted = output_exit_logits or labels is not None
        for layer in self.exit_layers if wanted else ():
            logits = self.exit(layer)(descent.to(layer))
            if output_exit_logits:
                exit_logits[layer] = logits
            if labels is not None:
                losses[layer] = cross_entropy(logits, labels).mean()
        if output_logits or not wanted:
            with torch.no_grad():
                final = self.backbone.final_logits(descent.ahead(self.backbone.num_layers))
        return EarlyExitOutput(
            loss=torch.stack(list(losses.values())).sum() if losses else None,
            logits=final,
            exit_losses=losses or None,
            exit_logits=exit_logits or None,
        )

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

    def train(self, mode: bool = True) -> Network:
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

    def exit_state(self) -> dict[str, Tensor]:
        """Every parameter of the exits by name: ``8.norm.weight``, ``8.head.weight``, …"""
        found = {name: p.detach().contiguous() for name, p in self.exits.named_parameters()}
        return found | ({"vocabulary": self.vocabulary.tokens} if self.vocabulary else {})


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

    def __init__(self, model: Network) -> None:
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
        keeps = keeps or self.sources
        return Descent(self, inputs, (position_ids, boundaries), keeps, around)

    @property
    def start(self) -> int:
        """The layer, from 0, that it begins with."""
        return self._model.stage.start

    @property
    def sources(self) -> tuple[int, ...]:
        """The layers whose states a draft exit reads."""
        return self._model.sources

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
            stage = self._model.stage
            sources = [layer for layer in self.sources if layer - 1 in stage]
            self._add(self._model.segments(last=self.stop, sources=sources))
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

    hidden: (B, T, H) after layer `at`; at the beginning of a model, token ids (B, T), which a later
    stage is told as `ids`. kept: those after some layers, for an exit that needs more than one.
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
        self.hidden, self.at, self.ids = inputs, chain.start, inputs
        self.kept: dict[int, Tensor] = {}
        self._keeps = keeps
        self._passed: dict[int, State] = {}  # by what `ahead` ran, and nobody asked for yet

    def to(self, layer: int) -> State:
        """The state after `layer`, which is that of an exit or the last one; for a draft exit those
        of its sources.

        Runs the layers that it still lacks, without gradients.
        """
        if layer == DRAFT:
            return self._for_draft()
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

    def _for_draft(self) -> State:
        """What was kept, and the tokens; the layers up to the last source have run."""
        sources, (position_ids, boundaries) = self._chain.sources, self._where
        self.ahead(sources[-1])
        kept = tuple(self.kept[layer] for layer in sources)
        return State(kept[-1], position_ids, None, boundaries, self.ids, kept)

    def _run(self) -> State:
        """The state at the end of the segment that begins here."""
        segment, (position_ids, boundaries) = self._chain.segment(self.at), self._where
        with self._around("forward"), torch.no_grad():
            state = segment(self.hidden, position_ids, boundaries=boundaries)
        self.hidden, self.at = state.hidden, segment.stop
        if self.at in self._keeps:
            self.kept[self.at] = state.hidden
        return state
