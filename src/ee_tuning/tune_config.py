"""The settings of a tuning run, part by part: of each, what the functions that it is given to use.

`ee_tuning.config.TuneConfig` is made of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ee_tuning.settings import option

MatrixPrecision = Literal["same", "fp8"]
FrozenPrecision = Literal["same", "fp8", "torchao-int8", "bnb-8bit", "bnb-4bit"]


@dataclass
class Schedule:
    """How many steps there are, of what, and how far each of them goes."""

    steps: int = option(1000, "optimizer steps")
    seq_length: int = option(2048, "tokens per packed sequence", fixed=True)
    micro_batch_size: int = option(1, "sequences per forward pass")
    global_batch_size: int = option(16, "sequences per optimizer step", fixed=True)
    lr: float = option(1e-4, "peak learning rate")
    min_lr: float | Literal["auto"] = option(
        "auto", "learning rate at the end; auto: a tenth of --lr"
    )
    warmup: float = option(0.01, "warm-up: steps, or a share of the steps if below 1")
    decay: Literal["cosine", "linear"] = option("cosine", "learning-rate decay")
    beta1: float = option(0.9, "AdamW beta 1")
    beta2: float = option(0.95, "AdamW beta 2")
    eps: float = option(1e-5, "AdamW epsilon")
    weight_decay: float = option(0.01, "AdamW weight decay, on matrices only")
    clip: float = option(1.0, "largest gradient norm of an exit; 0 switches clipping off")
    optimizer: Literal["adamw", "adamw-8bit"] = option(
        "adamw", "adamw-8bit: AdamW with its state in 8 bits (needs torchao)", fixed=True
    )

    loss_weights: list[float] = option([], "loss weight per exit, by depth; default 1 each")
    loss_weight_start: float = option(1.0, "factor on the loss weights at step 0")
    loss_weight_warmup: int = option(0, "steps over which that factor goes to 1")

    @property
    def last_lr(self) -> float:
        """The learning rate at the end."""
        return self.lr / 10 if self.min_lr == "auto" else self.min_lr


@dataclass
class ObjectiveConfig:
    """What an exit is tuned on: see `ee_tuning.losses.Objective`."""

    loss: Literal["ce", "kl", "mixed", "acceptance"] = option(
        "ce",
        "next-token cross-entropy, distillation from the final exit, or both; acceptance: how "
        "likely the final exit rejects a draft of the exit, for --mode speculative",
    )
    kl_temperature: float = option(1.0, "temperature of the distillation")
    kl_weight: float = option(0.5, "share of distillation in --loss mixed")
    acceptance_weight: float = option(
        0.67, "in --loss acceptance, the rest being cross-entropy against the final exit"
    )
    draft_steps: int = option(4, "drafts of a chain that a draft exit is tuned on", fixed=True)
    draft_decay: float = option(0.9, "weight of each of them, as a share of the one before")
    dynamic_weights: bool = option(False, "weight each token's loss by the exit's own confidence")


@dataclass
class Precision:
    """In what weights are kept and multiplied."""

    master_weights: Literal["fp32", "bf16"] = option(
        "fp32", "bf16: the exits' weights, rounded stochastically; needs adamw-8bit", fixed=True
    )
    precision: Literal["auto", "fp32", "bf16"] = option(
        "auto",
        "bf16: bf16 backbone and autocast; auto: bf16 on a GPU, fp32 on CPU",
    )
    backbone_precision: FrozenPrecision = option(
        "same",
        "the frozen layers' matrices in fp8 (row-wise scales), torchao-int8, bnb-8bit or bnb-4bit "
        "(nf4); same: as --precision",
    )
    exit_precision: MatrixPrecision = option(
        "same", "fp8: the exits' products in fp8 while tuning; same: as --precision"
    )
    exit_vocab: int | Literal["auto"] = option(
        "auto",
        "exits know only so many tokens, the most frequent of the data; 0: all; auto: 99% of the "
        "data's for new exits that are tuned to draft (--loss acceptance, --arch draft), else all",
        fixed=True,
    )
    compile: Literal["auto", "on", "off"] = option(
        "auto", "torch.compile layers and exits; auto: on a GPU"
    )
    device: str = option("auto", "cpu, cuda or auto")

    @property
    def known_tokens(self) -> int:
        """How many tokens exits know, as far as that is said before the data are read; 0: all."""
        return 0 if self.exit_vocab == "auto" else self.exit_vocab


@dataclass
class Layout:
    """Which part of a run each of its processes has."""

    dp: int = option(1, "data-parallel ranks; dp × tp × pp processes are started by torchrun")
    tp: int = option(1, "tensor-parallel ranks")
    pp: int = option(1, "pipeline stages")
    sequence_parallel: bool = option(
        False, "each tensor-parallel rank keeps a part of the sequence between split products"
    )
    balance: Literal["counted", "measured"] = option(
        "counted", "stages of equal FLOP, or of equal time as rank 0 measures it at start"
    )
    stage_layers: list[int] = option([], "layers per stage; default: as --balance says")
    shard: bool = option(False, "each data-parallel rank keeps a part of the exits only")
    shard_backbone: bool = option(
        False, "each data-parallel rank keeps a part of the frozen layers, gathered as they run"
    )
    timeout: float = option(600.0, "seconds after which a rank gives up waiting for another one")


@dataclass
class RecordConfig:
    """What a run keeps and tells of itself."""

    trace: bool = option(False, "draw the timeline of the second step: OUT/trace.png")

    save_every: int = option(500, "steps between checkpoints; 0: only at the end")
    keep: int = option(2, "checkpoints kept")
    eval_every: int = option(500, "steps between validations; 0: only before and after")
    eval_batches: int = option(16, "validation micro-batches at most")
    log_every: int = option(10, "steps between lines of metrics.jsonl")
    log_to: Literal["none", "tensorboard", "wandb"] = option(
        "none", "a second place for the metrics"
    )
