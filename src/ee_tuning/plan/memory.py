"""What a tuning run takes of a GPU's memory, part by part.

Memory is counted; where kernels need room of their own, the largest known is taken.
"""

from __future__ import annotations

from ee_tuning.config import TuneConfig
from ee_tuning.costs import Account, ExitWork, Work, runs_side_by_side, state_bytes
from ee_tuning.devices import readable
from ee_tuning.exit_config import DRAFT
from ee_tuning.losses import LOGITS
from ee_tuning.quantise.packages import BYTES
from ee_tuning.stages import cut_stages
from ee_tuning.tune_config import Precision


def largest_stage(account: Account, config: TuneConfig) -> dict[str, float]:
    """`memory` of the pipeline stage that takes most; one stage without --pp."""
    costs = account.tuning(config.loss != "ce", config.runs_whole)
    stages = cut_stages(costs, config.pp, config.stage_layers)
    return max((memory(account, config, stage) for stage in stages), key=lambda p: sum(p.values()))


def largest_parts(account: Account, config: TuneConfig) -> str:
    """The three largest parts of the memory, in words."""
    parts = sorted(largest_stage(account, config).items(), key=lambda part: -part[1])[:3]
    return ", ".join(f"{name} {readable(size)}" for name, size in parts)


def memory(account: Account, config: TuneConfig, stage: range) -> dict[str, float]:
    """Bytes by part on the GPU that tunes the exits of `stage` (layers from 0).

    Gradients are those of one exit, or of all where the hidden states of a whole batch would take
    more; see `ee_tuning.costs.room`. With a loss that needs the final exit's logits,
    layers deeper than the exits are in memory too, and with --pp the micro-batches that enter
    early. With --pp, states wait for all exits of a stage: its layers run first. With --tp, of one
    rank's part of all that it splits.
    """
    tp, wide, weight = config.tp, itemsize(config), _weight(config)
    positions = tp if config.sequence_parallel else 1  # by which hidden states are divided
    exits = account.in_stage(stage)
    sizes = _tuned(exits, tp)
    side_by_side = goes_side_by_side(account, config, stage)
    gradients = weight * (max(sizes, default=0.0) if side_by_side else sum(sizes))
    tokens = config.micro_batch_size * config.seq_length
    batch = config.global_batch_size * config.seq_length / config.dp
    early = config.pp if config.loss != "ce" else 1
    waiting = batch if side_by_side else min(batch, early * tokens)
    widest = max(layer.width for layer in _layers(account, config, stage))
    logits = min(LOGITS, tokens * account.head.width * account.known / tp)
    return {
        "backbone": _frozen(account, config, stage),
        "exits' weights": weight * sum(sizes),
        "optimizer state": (2.1 if config.optimizer == "adamw-8bit" else 8) * sum(sizes),
        "gradients": gradients + _beside_gradients(exits, config),
        "hidden states": _states(account, config, waiting, len(exits), wait=config.pp > 1),
        "activations": wide * tokens * (5 * widest / tp + 8 * account.hidden / positions)
        + _beside_activations(account, config),
        "logits": 2 * wide * logits,
    }


def _beside_activations(account: Account, config: TuneConfig) -> float:
    """Bytes of a draft exit's chains: the later steps' activations, and masks over their keys."""
    if DRAFT not in account.exits:
        return 0.0
    later = config.draft_steps - 1
    keys = config.seq_length * (later + 1) * (later + 2) / 2
    widest = account.layers[-1].width
    tokens = config.micro_batch_size * config.seq_length
    return itemsize(config) * tokens * (later * (5 * widest + 8 * account.hidden) + 2 * keys)


def goes_side_by_side(account: Account, config: TuneConfig, stage: range) -> bool:
    """Whether all micro-batches go down the layers of `stage` together."""
    exits = account.in_stage(stage)
    tokens = config.global_batch_size * config.seq_length / config.dp
    weights = [_weight(config) * size for size in _tuned(exits, config.tp)]
    return runs_side_by_side(_states(account, config, tokens, len(exits)), weights)


def itemsize(config: Precision) -> int:
    """Bytes of a hidden state's value, and of a frozen weight that is not quantised, on a GPU."""
    return 4 if config.precision == "fp32" else 2


def _weight(config: Precision) -> int:
    """Bytes of a tuned value."""
    return 2 if config.master_weights == "bf16" else 4


def _tuned(exits: list[ExitWork], tp: int) -> list[float]:
    """How many values of each exit a tensor-parallel rank tunes."""
    return [exit.on_rank(tp) for exit in exits]


def _layers(account: Account, config: TuneConfig, stage: range) -> list[Work]:
    deep = len(account.layers) if config.runs_whole and config.pp == 1 else stage.stop
    return account.layers[stage.start : deep]


def _frozen(account: Account, config: TuneConfig, stage: range) -> float:
    """Bytes of the frozen layers, of the head and, in the first stage, of the embedding."""
    wide = itemsize(config)
    small = BYTES.get(config.backbone_precision, wide)
    shared = any(exit.shared for exit in account.in_stage(stage))
    # In fp8, a shared head is there twice: the products of its gradient need it transposed.
    head = 2 if shared and config.backbone_precision == "fp8" else wide
    layers = sum(layer.values for layer in _layers(account, config, stage))
    heads = account.head.values * (1 + (account.known if shared and account.known < 1 else 0))
    found = (small * layers + head * heads) / config.tp
    if stage.start == 0 and (config.tp > 1 or not account.tied):
        found += wide * account.embedding
    return found


def _beside_gradients(exits: list[ExitWork], config: TuneConfig) -> float:
    """Bytes beside the masters' gradients.

    Working copies in bf16 and two gradients of them, or, where products are in fp32, a gradient
    that is about to be added.
    """
    if itemsize(config) == 4:
        heads = [exit.head.values / config.tp for exit in exits]
        sizes = _tuned(exits, config.tp)
        below = [size - head for size, head in zip(sizes, heads, strict=True)]
        return 4 * max([*below, *heads], default=0.0)
    return 6 * max(_tuned(exits, config.tp), default=0.0) if _weight(config) == 4 else 0.0


def _states(
    account: Account, config: TuneConfig, tokens: float, exits: int, wait: bool = False
) -> float:
    """Bytes of what so many exits need of the hidden states of `tokens`. wait: of all at once."""
    positions = config.tp if config.sequence_parallel else 1
    state = account.hidden * itemsize(config) / positions
    wait = wait or config.loss != "ce" or DRAFT in account.exits
    return state_bytes(tokens, state, exits, wait)
