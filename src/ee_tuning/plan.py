"""What a tuning run will take, from the shapes alone: memory by part, and time.

Memory is counted; where kernels need room of their own, the largest known is taken. Time is FLOP
over what a GPU reaches of its datasheet's rate. `tests/unit/test_plan.py` holds both against the
measured runs in `benchmarks/results`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from ee_tuning.check import check_counts, check_dtype, check_model, check_settings
from ee_tuning.config import ExitConfig, PlanConfig, TuneConfig
from ee_tuning.costs import work
from ee_tuning.devices import pick_dtype
from ee_tuning.errors import UserError
from ee_tuning.exits import Exit
from ee_tuning.loading import empty_backbone
from ee_tuning.losses import LOGITS
from ee_tuning.model import EarlyExitModel, base_of, find_exits, read_exit_config, saved_exits
from ee_tuning.quantise.fp8 import has_fp8
from ee_tuning.quantise.packages import BYTES, PACKAGES
from ee_tuning.stages import cut_stages
from ee_tuning.vocabulary import Vocabulary

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """memory: usable GiB; fp32 (without tf32), bf16, fp8: dense TFLOP/s of the datasheet, 0
    without units; TB/s."""

    memory: float
    fp32: float
    bf16: float
    fp8: float
    bandwidth: float


GPUS = {
    "b200": Gpu(178, 80, 2250, 4500, 8.0),
    "h200": Gpu(139, 67, 989, 1979, 4.8),
    "h100": Gpu(79, 67, 989, 1979, 3.35),
    "a100-80": Gpu(79, 19.5, 312, 0, 2.0),
    "a100-40": Gpu(39, 19.5, 312, 0, 1.55),
    "l40s": Gpu(44, 91.6, 362, 733, 0.86),
    "5090": Gpu(31, 105, 210, 419, 1.79),
    "4090": Gpu(23.5, 82.6, 165, 330, 1.0),
    "3090": Gpu(23.5, 35.6, 71, 0, 0.94),
}
# Shares of the datasheet's rates that the parts of a step reached on an H200, and on an H100: what
# the packages keep quantised, of bf16's rate. That of fp32 was not measured: it is taken to be
# bf16's.
REACHED = {
    "fp32": 0.58, "bf16": 0.58, "fp8": 0.45, "bandwidth": 0.8,
    "torchao-int8": 0.58, "bnb-8bit": 0.24, "bnb-4bit": 0.45,
}  # fmt: skip
# What makes a run smaller, the cheapest in quality first.
SAVINGS: tuple[dict[str, object], ...] = (
    {"micro_batch_size": 1},
    {"backbone_precision": "fp8"},
    {"optimizer": "adamw-8bit"},
    {"master_weights": "bf16"},
    {"head": "shared"},
)


def plan(config: PlanConfig) -> None:
    """Print memory by part, time, whether it fits, and which flags would make it fit.

    Raises:
        UserError: a GPU or a backbone that is not known, settings that `tune` refuses, or a layout
            whose memory is not counted here.
    """
    if config.gpu not in GPUS:
        raise UserError(f"gpu {config.gpu!r} is unknown: use one of {', '.join(GPUS)}")
    if config.shard or config.shard_backbone:
        raise UserError("plan knows neither --shard nor --shard-backbone: leave them out")
    check_counts(config, "gpus", "tp", "pp")
    if not config.tokens > 0:
        raise UserError(f"tokens is {config.tokens}: it must be above 0")
    gpu, console = GPUS[config.gpu], Console()
    config = dataclasses.replace(config, dp=_data_parallel(config))
    check_settings(config)
    model = shapes_of(config)
    _check(model, config)
    parts = largest_stage(model, config)
    table = Table(title=f"{config.gpu}: predicted memory of the fullest GPU")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    for name, size in parts.items():
        table.add_row(name, f"{size / GIB:.1f}")
    total = sum(parts.values()) / GIB
    table.add_row("sum", f"{total:.1f} of {gpu.memory:g}", style="bold")
    console.print(table)
    if not gpu.fp8:
        _show_missing_units(config, console)
    taken = step_seconds(model, config, gpu)
    seconds = sum(taken.values()) / config.gpus
    rate = config.global_batch_size * config.seq_length / seconds
    console.print(
        f"about {rate:,.0f} tokens/s on {config.gpus} GPU(s), communication and idle time left "
        f"out: {config.tokens:.3g} tokens take {config.tokens / rate / 3600:.1f} hours",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if total <= gpu.memory:
        console.print("it fits")
    else:
        console.print(
            f"it does not fit by {total - gpu.memory:.1f} GiB; "
            + advice(model, config, gpu.memory, fp8=gpu.fp8 > 0),
            soft_wrap=True,
        )
    if config.gpus > 1:
        _show_layouts(model, config, taken, console)


def _data_parallel(config: PlanConfig) -> int:
    """Data-parallel ranks: those given, or as many as the GPUs make.

    Raises:
        UserError: --dp, --tp and --pp do not take all GPUs, or more.
    """
    ranks = config.tp * config.pp
    if not config.dp and config.gpus % ranks:
        parts_of = f"{config.pp} pipeline stages of {config.tp} tensor-parallel ranks"
        raise UserError(f"{config.gpus} GPUs cannot be divided into {parts_of}")
    if config.dp and config.dp * ranks != config.gpus:
        raise UserError(
            f"dp {config.dp} × tp {config.tp} × pp {config.pp} is {config.dp * ranks}, not gpus, "
            f"{config.gpus}: leave --dp out, or let --gpus be the product"
        )
    return config.dp or config.gpus // ranks


def _check(model: EarlyExitModel, config: TuneConfig) -> None:
    """Refuse what `tune` does with this model on a GPU, whatever data and packages it finds.

    Raises:
        UserError: names the setting.
    """
    check_dtype(config, pick_dtype(config.precision, torch.device("cuda")))
    check_model(model, config)


def _show_missing_units(config: PlanConfig, console: Console) -> None:
    refused = f"{config.gpu} has no fp8 units, so tune refuses"
    if config.backbone_precision == "fp8":
        console.print(
            f"{refused} fp8 there: use --backbone-precision torchao-int8, which takes the same "
            "memory",
            soft_wrap=True,
        )
    if config.exit_precision == "fp8":
        console.print(
            f"{refused} --exit-precision fp8 there: use --exit-precision same", soft_wrap=True
        )


def _show_layouts(
    model: EarlyExitModel, config: PlanConfig, taken: dict[str, float], console: Console
) -> None:
    """The fastest layouts that fit, by search. taken: see `step_seconds`."""
    from ee_tuning.layouts import Parts, rows, search  # it uses what is here

    micro_batches = config.global_batch_size / config.micro_batch_size
    exits = len(model.exit_layers)
    parts = Parts(
        taken["backbone"] / model.exit_layers[-1] / micro_batches,
        (taken["exits"] + taken["heads"]) / exits / micro_batches,
        taken["optimizer"] / exits,
    )
    found = search(model, config, parts, config.gpus, GPUS[config.gpu].memory)
    table = Table(title=f"best layouts of {config.gpus} GPUs, communication simulated")
    for name in ("dp × tp × pp", "tokens/s", "idle", "GiB"):
        table.add_column(name, justify="right")
    for cells in rows(found[:5]):
        table.add_row(*cells)
    console.print(table if found else "no layout without sharding fits")


def shapes_of(config: TuneConfig) -> EarlyExitModel:
    """The model that `config` tunes, on the meta device: nothing but shapes.

    Raises:
        UserError: no such backbone or exits, or exits that the backbone cannot have.
    """
    exits: ExitConfig = config.exit_config()
    path, known = config.model, None
    if config.exits:
        folder = find_exits(config.exits)
        saved = read_exit_config(folder)
        exits, path = saved_exits(saved), base_of(folder, saved, config.model)
        known = saved.get("vocab_size")
    model = EarlyExitModel(empty_backbone(path), dataclasses.replace(exits, init="copy"))
    if known:  # which tokens does not matter; heads stay whole, `_known` says what is left of them
        model.vocabulary = Vocabulary(torch.arange(known), model.backbone.config.vocab_size)
    return model


def largest_stage(model: EarlyExitModel, config: TuneConfig) -> dict[str, float]:
    """`memory` of the pipeline stage that takes most; one stage without --pp."""
    costs = work(model, config.seq_length, config.exit_vocab).tuning()
    stages = cut_stages(costs, config.pp, config.stage_layers)
    return max((memory(model, config, stage) for stage in stages), key=lambda p: sum(p.values()))


def memory(model: EarlyExitModel, config: TuneConfig, stage: range) -> dict[str, float]:
    """Bytes by part on the GPU that tunes the exits of `stage` (layers from 0).

    model: may be on the meta device. Gradients are those of one exit, or of all where the hidden
    states of a whole batch would take more; see `tune.step`. With a loss that needs the final
    exit's logits, layers deeper than `stage` are in memory too. With --tp, of one rank's part of
    all that it splits.
    """
    tp = config.tp
    positions = tp if config.sequence_parallel else 1  # by which hidden states are divided
    backbone = model.backbone
    exits = [model.exit(layer) for layer in model.exit_layers if layer - 1 in stage]
    deep = backbone.num_layers if config.loss != "ce" else stage.stop
    layers = backbone.layers[stage.start : deep]
    wide = itemsize(config)
    small = BYTES.get(config.backbone_precision, wide)
    vocabulary = _values(backbone.head)
    shared = any(exit.spec.head == "shared" for exit in exits)
    # In fp8, a shared head is there twice: the products of its gradient need it transposed.
    head = 2 if shared and config.backbone_precision == "fp8" else wide
    frozen = (small * sum(map(_values, layers)) + head * vocabulary) / tp
    if stage.start == 0 and (tp > 1 or not backbone.config.tie_word_embeddings):
        frozen += wide * _values(backbone.model.get_input_embeddings())
    if shared and _reduced(model, config):
        frozen += head * vocabulary * _known(model, config) / backbone.config.vocab_size / tp
    tuned = [_tuned(model, config, exit) for exit in exits] or [[0.0]]
    sizes = [sum(parts) / tp for parts in tuned]
    weight = _weight(config)
    state = 2.1 if config.optimizer == "adamw-8bit" else 8
    hidden = backbone.config.hidden_size
    tokens = config.micro_batch_size * config.seq_length
    kept = _kept(config, len(exits))
    states = _hidden_states(model, config, len(exits))
    side_by_side = runs_side_by_side(model, config, stage)
    gradients = weight * (max(sizes) if side_by_side else sum(sizes))
    # Beside the masters' gradients: working copies in bf16 and two gradients of them, or, where
    # products are in fp32, a gradient that is about to be added.
    largest = max(map(max, tuned)) / tp
    beside = 4 * largest if wide == 4 else 6 * max(sizes) if weight == 4 else 0
    widest = max(p.shape[0] for layer in layers for p in layer.parameters() if p.dim() >= 2)
    logits = min(LOGITS, tokens * _known(model, config) / tp)
    return {
        "backbone": frozen,
        "exits' weights": weight * sum(sizes),
        "optimizer state": state * sum(sizes),
        "gradients": gradients + beside,
        "hidden states": states if side_by_side else kept * tokens * hidden * wide / positions,
        "activations": wide * tokens * (5 * widest / tp + 8 * hidden / positions),
        "logits": 2 * wide * logits,
    }


def runs_side_by_side(model: EarlyExitModel, config: TuneConfig, stage: range) -> bool:
    """Whether all micro-batches go down the layers of `stage` together: see `costs.room`."""
    exits = [model.exit(layer) for layer in model.exit_layers if layer - 1 in stage]
    sizes = [sum(_tuned(model, config, exit)) / config.tp for exit in exits] or [0.0]
    states = _hidden_states(model, config, len(exits))
    return states <= _weight(config) * (sum(sizes) - max(sizes))


def tuned_values(model: EarlyExitModel, config: TuneConfig, layer: int) -> float:
    """How many values of the exit after `layer` are tuned."""
    return sum(_tuned(model, config, model.exit(layer)))


def _kept(config: TuneConfig, exits: int) -> int:
    """Hidden states of a token that `tune.step.tokens_together` counts: of one exit, or of all."""
    return 3 * (exits if config.loss != "ce" else 1)


def _hidden_states(model: EarlyExitModel, config: TuneConfig, exits: int) -> float:
    """Bytes of what so many exits need of all micro-batches of a data-parallel rank."""
    tokens = config.global_batch_size * config.seq_length / config.dp
    positions = config.tp if config.sequence_parallel else 1
    wide = itemsize(config)
    return _kept(config, exits) * tokens * model.backbone.config.hidden_size * wide / positions


def itemsize(config: TuneConfig) -> int:
    """Bytes of a hidden state's value, and of a frozen weight that is not quantised, on a GPU."""
    return 4 if config.precision == "fp32" else 2


def _weight(config: TuneConfig) -> int:
    """Bytes of a tuned value."""
    return 2 if config.master_weights == "bf16" else 4


def step_seconds(model: EarlyExitModel, config: TuneConfig, gpu: Gpu) -> dict[str, float]:
    """Seconds by part of one optimizer step on one GPU."""
    tokens = config.global_batch_size * config.seq_length
    given = model, config.seq_length, _reduced(model, config)
    flop = flop_per_token(*given, teacher=config.loss != "ce")
    dtype = "fp32" if config.precision == "fp32" else "bf16"
    plain = getattr(gpu, dtype) * REACHED[dtype]
    rates = {"same": plain, "fp8": gpu.fp8 * REACHED["fp8"] or plain}
    rates |= {name: getattr(gpu, dtype) * REACHED[name] for name in PACKAGES}
    frozen, tuned = (
        rates[name] * 1e12 for name in (config.backbone_precision, config.exit_precision)
    )
    # Of the frozen parts the packages quantise the layers alone.
    head = plain * 1e12 if config.backbone_precision in PACKAGES else frozen
    shared = any(exit.spec.head == "shared" for exit in model.exits.values())  # type: ignore[union-attr]
    sizes = [sum(_tuned(model, config, model.exit(layer))) for layer in model.exit_layers]
    moved = 4 * (2 if config.master_weights == "bf16" else 4)  # weight and gradient, in and out
    moved += 4 if config.optimizer == "adamw-8bit" else 16
    return {
        "backbone": flop["backbone"] * tokens / frozen,
        "exits": flop["exits"] * tokens / tuned,
        "heads": flop["head"] * tokens / (head if shared else tuned),
        "optimizer": moved * sum(sizes) / (gpu.bandwidth * REACHED["bandwidth"] * 1e12),
    }


def flop_per_token(
    model: EarlyExitModel, length: int, exit_vocab: int = 0, teacher: bool = False
) -> dict[str, float]:
    """Floating-point operations of the matrix products that a step needs, per token.

    A product with a matrix of P parameters is 2·P forward, 2·P for the matrix's gradient and 2·P
    for its input's. Frozen layers have only the first. Of an `mlp` exit, the matrices that read
    the residual need no gradient of their input. Attention scores and values are 4·H·T/2 a layer.
    teacher: whether the final exit's logits are needed, once, and so all layers.
    """
    backbone = model.backbone
    deep = backbone.num_layers if teacher else model.exit_layers[-1]
    layers = backbone.layers[:deep]
    sizes = [sum(map(_matrix, layer.modules())) for layer in layers]
    hidden = backbone.config.hidden_size
    head = hidden * (exit_vocab or backbone.config.vocab_size)
    found = {"backbone": 2.0 * sum(sizes) + len(layers) * 2 * hidden * length, "exits": 0.0}
    found["head"] = 2.0 * hidden * backbone.config.vocab_size if teacher else 0.0
    for layer in model.exit_layers:
        exit = model.exit(layer)
        found["head"] += 6 * head if exit.spec.head == "own" else 4 * head
        for name, p in _below_head(exit):
            if p.dim() >= 2:
                reads = name.startswith("mlp.") and p.shape[0] != hidden
                found["exits"] += (4 if reads else 6) * p.numel()
        found["exits"] += 6 * hidden * length if exit.spec.arch == "layer" else 0
    return found


def advice(model: EarlyExitModel, config: TuneConfig, available: float, fp8: bool) -> str:
    """Which flags, that `tune` takes, would make `config` fit into `available` GiB.

    fp8: whether the GPU has it.
    """
    flags: list[str] = []
    for saving in SAVINGS:
        if saving == {"backbone_precision": "fp8"} and not fp8:
            saving = {"backbone_precision": "torchao-int8"}
        if all(getattr(config, name) == value for name, value in saving.items()):
            continue
        if "backbone_precision" in saving and config.backbone_precision == "bnb-4bit":
            continue  # smaller already
        if "head" in saving and config.exits:
            continue
        smaller = dataclasses.replace(config, **saving)  # type: ignore[arg-type]
        # Heads are what changes the exits.
        shapes = shapes_of(smaller) if "head" in saving else model
        if not _is_possible(shapes, smaller):
            continue
        model, config = shapes, smaller
        flags += [f"--{name.replace('_', '-')} {value}" for name, value in saving.items()]
        if sum(largest_stage(model, config).values()) / GIB <= available:
            return "it would with " + " ".join(flags)
    tried = f"not even with {' '.join(flags)}: " if flags else ""
    more = ", or more GPUs with --pp" if config.loss == "ce" else ""
    return f"{tried}use fewer or shallower exits{more}"


def _is_possible(model: EarlyExitModel, config: TuneConfig) -> bool:
    try:
        check_settings(config)
        _check(model, config)
    except UserError:
        return False
    return True


def refuse_if_too_large(config: TuneConfig, available: float) -> None:
    """Refuse, before anything is allocated, what needs more than `available` GiB.

    Raises:
        UserError: by how much, and what would help.
    """
    model = shapes_of(config)
    needed = sum(largest_stage(model, config).values()) / GIB
    fp8 = not torch.cuda.is_available() or has_fp8(torch.device("cuda"))
    if needed > available:
        raise UserError(
            f"this run needs about {needed:.1f} GiB, {needed - available:.1f} more than the GPU "
            f"has; {advice(model, config, available, fp8)}"
        )


def largest_parts(config: TuneConfig) -> str:
    """The three largest parts of the memory, in words."""
    parts = sorted(largest_stage(shapes_of(config), config).items(), key=lambda part: -part[1])[:3]
    return ", ".join(f"{name} {size / GIB:.1f} GiB" for name, size in parts)


def _below_head(exit: Exit) -> Iterator[tuple[str, nn.Parameter]]:
    """Tuned parameters of an exit, its head aside."""
    named = exit.named_parameters()
    return ((name, p) for name, p in named if not name.startswith(("head.", "reduced.")))


def _tuned(model: EarlyExitModel, config: TuneConfig, exit: Exit) -> list[float]:
    """Numbers of values that are tuned in an exit: below its head, and in it."""
    below = float(sum(p.numel() for _, p in _below_head(exit)))
    share = _known(model, config) / model.backbone.config.vocab_size
    return [below, _values(model.backbone.head) * share if exit.spec.head == "own" else 0.0]


def _known(model: EarlyExitModel, config: TuneConfig) -> int:
    return _reduced(model, config) or model.backbone.config.vocab_size


def _reduced(model: EarlyExitModel, config: TuneConfig) -> int:
    """How many tokens the exits know, of a saved vocabulary or one to come; 0: all."""
    return len(model.vocabulary.tokens) if model.vocabulary else config.exit_vocab


def _values(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _matrix(module: nn.Module) -> int:
    """Elements of a linear layer's weight, whatever it is kept in; 0 for other modules."""
    if not isinstance(module, nn.Linear) and hasattr(module, "nf"):
        return module.weight.numel()  # type: ignore[operator]
    return getattr(module, "in_features", 0) * getattr(module, "out_features", 0)
