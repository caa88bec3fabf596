"""Every setting and every default, once; those of a tuning run by part are in `tune_config`.

The dataclasses of commands *are* the command line: each field is a flag
(``seq_length`` is ``--seq-length``) and a key of the YAML file given with ``--config``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ee_tuning.errors import UserError
from ee_tuning.exit_config import DRAFTS, ExitConfig, Init, Layers
from ee_tuning.settings import Settings, option
from ee_tuning.tune_config import Layout, ObjectiveConfig, Precision, RecordConfig, Schedule

Mode = Literal["full", "fixed", "threshold", "speculative"]
Measure = Literal["probability", "margin", "entropy"]
Eagle3Form = Literal["", "speculators", "sglang"]
MODES: tuple[str, ...] = get_args(Mode)
MEASURES: tuple[str, ...] = get_args(Measure)


@dataclass
class NewExitsConfig(Settings):
    """What `init` and `tune` share."""

    model: str = option("", "backbone: a local folder or a hub id", path=True)
    layers: Layers = option("", "exit layers: 8,16 or 1/8,2/8 or every:4", fixed=True)
    arch: str | list[str] = option(
        "mlp",
        "embedding, norm, mlp or layer; one, or one per exit: mlp,layer; draft, at layer 0, for "
        "--mode speculative alone, or eagle3, a draft that export writes for engines",
        fixed=True,
    )
    init: Literal["auto"] | Init = option(
        "auto",
        "copy the backbone's own modules, random, or fitted: a copy that tune fits to the data in "
        "closed form; auto: fitted where tune runs the whole backbone (not --loss ce), but for "
        "layer exits, else copy",
    )
    head: str | list[str] = option(
        "auto",
        "own (trainable, per exit) or shared (the backbone's, frozen); auto: own, a draft's shared",
        fixed=True,
    )
    out: str = option("", "folder for the exits", path=True)
    overwrite: bool = option(False, "replace what is in --out")
    seed: int = option(0, "seed of the random initialisation")
    trust_remote_code: bool = option(False, "run code that comes with the backbone or tokenizer")
    draft_sources: Layers = option(
        "",
        "layers that a draft exit reads; default: 1/10,1/2,5/6,1/1, or of eagle3 three",
        fixed=True,
    )

    def exit_config(self) -> ExitConfig:
        """The exits these settings describe."""
        sources = self.draft_sources or None
        return ExitConfig(self.layers, self.arch, self.start, self.head, self.seed, sources)

    @property
    def start(self) -> Init:
        """How new exits begin."""
        return "copy" if self.init == "auto" else self.init


@dataclass
class InitConfig(NewExitsConfig):
    """Add exits to a backbone, untuned, and save them."""


@dataclass
class ReadingConfig(Settings):
    """How records become documents: what `tune` and `evaluate` share."""

    text_field: str = option("text", "name of the field with the text of a record", fixed=True)
    chat_template: str = option(
        "", "file with a chat template; default: the tokenizer's", path=True, fixed=True
    )
    control_as_text: bool = option(
        False,
        "control tokens that a text or prompt spells out, such as <|im_end|>, are text",
        fixed=True,
    )
    skip_bad_records: bool = option(False, "count malformed records and go on instead of stopping")


@dataclass
class SourceConfig:
    """What is tuned, and on what."""

    exits: str = option("", "exits to go on tuning, instead of --layers and --arch", path=True)
    resume: bool = option(False, "go on from the last checkpoint in --out, if there is one")

    data: list[str] = option(
        [],
        "tuning data: files, patterns, folders, hub ids or - for standard input, each with an "
        "optional limit on its records and an optional weight: a.jsonl[:10000]=0.7",
        path=True,
    )
    valid_data: list[str] = option(
        [], "held-out data; without it, --valid-fraction of --data is held out", path=True
    )
    valid_fraction: float = option(
        0.01, "share of the packed sequences held out of --data for validation", fixed=True
    )
    tokenizer: str = option("", "tokenizer folder or hub id; default: the backbone's", path=True)


@dataclass
class TuneConfig(
    RecordConfig,
    Layout,
    Precision,
    ObjectiveConfig,
    Schedule,
    ReadingConfig,
    SourceConfig,
    NewExitsConfig,
):
    """Tune the exits of a backbone on text; the backbone stays as it is."""

    # A function takes the base of this that has the settings it uses.
    out: str = option("", "folder for the exits, checkpoints and metrics", path=True)
    seed: int = option(0, "seed of the data order and of random initialisation", fixed=True)

    @property
    def start(self) -> Init:
        """How new exits begin: fitted, where the final exit is there to be fitted to."""
        archs = self._archs()
        whole = self.loss != "ce" or self.drafts
        can_be = whole and not (self.drafts and self.shard_backbone) and "eagle3" not in archs
        pays = {*archs} != {"layer"}
        return "fitted" if self.init == "auto" and can_be and pays else super().start

    @property
    def drafts(self) -> bool:
        """Whether a draft exit is among the new exits."""
        return any(arch in DRAFTS for arch in self._archs())

    def _archs(self) -> list[str]:
        return self.arch.split(",") if isinstance(self.arch, str) else self.arch

    @property
    def picks_vocabulary(self) -> bool:
        """Whether the data say how many tokens the exits know."""
        new = self.exit_vocab == "auto" and not self.exits
        return new and (self.drafts or self.loss == "acceptance")

    @property
    def runs_whole(self) -> bool:
        """Whether the layers deeper than the deepest exit are needed, too."""
        return self.loss != "ce" or (self.start == "fitted" and not self.exits)

    def fixed(self) -> dict[str, Any]:
        """What may not change between a run and its continuation.

        Contents are compared, too: of the backbone, the data and the exits.
        """
        fields = dataclasses.fields(self)
        return {f.name: getattr(self, f.name) for f in fields if f.metadata["fixed"]}


@dataclass
class PlanConfig(TuneConfig):
    """Predict memory and time of a tuning run, without a GPU: settings are those of tune."""

    gpu: str = option("h200", "b200, h200, h100, a100-80, a100-40, l40s, 5090, 4090 or 3090")
    gpus: int = option(1, "how many of them")
    dp: int = option(0, "data-parallel ranks; 0: as many as --gpus, --tp and --pp make")
    tokens: float = option(0, "tokens to tune on; 0: as many as --steps read")


@dataclass
class ActiveExits:
    """Which exits tokens may leave at, and by which measure they are sure.

    exit_layers: the active exits; default: all.
    max_pending: tokens that may leave before one has to go all the way; the longest draft.
    measure: of confidence: ``probability``, ``margin`` or ``entropy``, see
        `ee_tuning.losses.confidence`.
    min_depth: exits at shallower layers are not active.
    """

    exit_layers: Layers = option("", "active exits, for example 8,16; default: all")
    max_pending: int = option(
        8, "tokens that may leave before one has to go all the way; the longest draft"
    )
    measure: Measure = option("probability", "confidence: probability, margin or entropy")
    min_depth: int = option(0, "exits at shallower layers are not active")

    def leaving(self, **more: Any) -> Leaving:
        """These exits, and what `more` says of mode and threshold."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(ActiveExits)}
        return Leaving(**own, **more)


@dataclass
class Leaving(ActiveExits):
    """Where tokens leave.

    mode: ``full`` is the backbone alone; ``fixed`` ends every token at the one exit in
        `exit_layers`; ``threshold`` lets a token leave at the first active exit whose
        confidence is at least `threshold`. Threshold 1 switches exits off. ``speculative``
        takes such tokens for drafts that the remaining layers verify together: greedy tokens are
        those of ``full``, sampled ones have its distribution; see `ee_tuning.decode.drafts`.
    threshold: one for all exits, or one per exit layer: ``{8: 0.9, 16: 0.7}``, or as the command
        takes them, ``"8:0.9,16:0.7"``.
    lookup: in mode ``speculative`` what followed a text's last tokens where they came before is
        drafted, too, in the rounds in which that promises more than the exits do; at threshold 1
        alone. See `ee_tuning.decode.lookup`.
    """

    mode: Mode = option(
        "threshold",
        "full depth, a fixed exit layer, the first confident exit, or speculative: exits draft, "
        "the remaining layers verify, the text is that of full depth",
    )
    threshold: str | float | dict[int, float] = option(
        0.8,
        "confidence from which a token leaves; 1 switches exits off; per exit: 8:0.9,16:0.7, or "
        "in YAML {8: 0.9, 16: 0.7}",
    )
    lookup: bool = option(
        False,
        "with mode speculative: draft from the text itself, too, where that promises more than the "
        "exits; with threshold 1 alone",
    )


class Compiles:
    """Settings among which is `compile`, of decoding."""

    compile: Literal["auto", "on", "off"]

    def compiled(self) -> bool | None:
        """`compile` as `ee_tuning.decode.generate` takes it.

        Raises:
            UserError: it is another word.
        """
        known = {"auto": None, "on": True, "off": False}
        if self.compile not in known:
            raise UserError(f"compile {self.compile!r} is unknown: use one of {', '.join(known)}")
        return known[self.compile]


@dataclass
class SamplingConfig(Compiles, Settings):
    """What `generate` and `evaluate` share."""

    exits: str = option("", "folder or hub id of the exits", path=True)
    model: str = option("", "backbone; default: the one named in exit_config.json", path=True)
    device: str = option("auto", "cpu, cuda or auto")
    precision: Literal["auto", "fp32", "bf16"] = option(
        "auto", "precision of backbone and exits; auto: bf16 on a GPU, fp32 on CPU"
    )
    max_new_tokens: int = option(64, "tokens to generate")
    compile: Literal["auto", "on", "off"] = option(
        "auto", "compile decoding, with CUDA graphs on a GPU; auto: on a GPU"
    )
    seed: int = option(0, "seed of the sampling")
    trust_remote_code: bool = option(False, "run code that comes with the backbone or tokenizer")


@dataclass
class GenerateConfig(Leaving, SamplingConfig):
    """Generate text; tokens are coloured by the depth at which they left."""

    compile: Literal["auto", "on", "off"] = option(
        "off",
        "compile decoding, with CUDA graphs on a GPU: a minute, before a long text; auto: on a GPU",
    )
    prompt: str | None = option(
        None, "the prompt; - reads standard input, '' begins with the tokenizer's BOS token"
    )
    calibrated: bool = option(
        False, "the thresholds that calibrate saved with the exits, and their settings"
    )
    do_sample: bool = option(False, "sample instead of taking the likeliest token")
    temperature: float = option(1.0, "sampling temperature")
    top_k: int = option(50, "sample among the k likeliest tokens; 0: all")
    top_p: float = option(1.0, "sample among the likeliest tokens up to this probability")
    min_p: float = option(
        0.0, "sample among tokens at least so likely, as a share of the likeliest's probability"
    )
    repetition_penalty: float = option(
        1.0, "divides the logits of tokens that were there before; 1: none"
    )
    stop_strings: list[str] = option([], "end the text at one of these strings")
    chat: bool = option(
        False,
        "wrap the prompt in the tokenizer's chat template; without a prompt, a conversation: "
        "each line is a turn, the end of standard input ends it",
    )
    system: str = option("", "system prompt of the chat")
    chat_template: str = option(
        "", "file with a chat template; default: the tokenizer's", path=True
    )
    tp: int = option(1, "tensor-parallel ranks; tp × pp processes are started by torchrun")
    pp: int = option(
        1, "pipeline stages: the next token begins where one leaves, deeper stages catch up"
    )
    stage_layers: list[int] = option([], "layers per stage; default: balanced by their sizes")
    timeout: float = option(600.0, "seconds after which a rank gives up waiting for another one")


@dataclass
class EvaluateConfig(ActiveExits, SamplingConfig, ReadingConfig):
    """Measure the exits: losses, agreement, speed; a table, JSON and an HTML report."""

    data: list[str] = option([], "held-out data, as for tune", path=True)
    thresholds: str | float | list[float] = option(
        "1,0.9,0.8,0.6,0.4,0.2", "thresholds to generate with"
    )
    seq_length: int = option(512, "tokens per packed sequence")
    micro_batch_size: int = option(1, "sequences per forward pass")
    max_tokens: int = option(50_000, "tokens of data read for the losses at most")
    prompts: int = option(8, "prompts taken from the data to generate from")
    prompt_length: int = option(64, "tokens per prompt")
    rounds: int = option(3, "timed rounds; the median and the spread are reported")
    out: str = option(
        "", "folder for evaluation.json and report.html; default: the exits' folder", path=True
    )
    dp: int = option(1, "parts of data and prompts; torchrun starts dp × tp processes")
    tp: int = option(1, "processes that share a model")
    timeout: float = option(3600.0, "seconds after which a rank gives up waiting for another one")


@dataclass
class ExportConfig(Settings):
    """Save an exit as an ordinary checkpoint, or backbone and exits as one folder."""

    exits: str = option("", "folder or hub id of the exits", path=True)
    model: str = option("", "backbone; default: the one named in exit_config.json", path=True)
    layer: int | str | None = option(
        None, "the exit to save as a checkpoint of the backbone's own class"
    )
    eagle3: Eagle3Form = option("", "save the draft exit as these readers of EAGLE-3 want it")
    merge: bool = option(False, "save backbone and exits together instead")
    out: str = option("", "folder for the checkpoint", path=True)
    overwrite: bool = option(False, "replace what is in --out")
    trust_remote_code: bool = option(False, "run code that comes with the backbone or tokenizer")


@dataclass
class InspectConfig(Settings):
    """Describe a backbone or a folder of exits."""

    path: str = option("", "folder or hub id of a backbone or of exits", path=True)
    trust_remote_code: bool = option(False, "run code that comes with the backbone")
