"""`ee-tuning plan`: memory and time of a tuning run, predicted."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ee_tuning.config import PlanConfig
from ee_tuning.costs import Account
from ee_tuning.devices import GIB, readable
from ee_tuning.model import Network
from ee_tuning.plan.advice import advice, check_on_gpu
from ee_tuning.plan.check import check_plan
from ee_tuning.plan.gpus import GPUS
from ee_tuning.plan.layouts import rows, search
from ee_tuning.plan.memory import largest_stage
from ee_tuning.plan.shapes import account_of, shapes_of
from ee_tuning.plan.time import seconds_of_parts, step_seconds


def plan(config: PlanConfig) -> None:
    """Print memory by part, time, whether it fits, and which flags would make it fit.

    Raises:
        UserError: see `ee_tuning.plan.check`; or no such backbone or exits.
    """
    config = check_plan(config)
    model = shapes_of(config)
    check_on_gpu(model, config)
    gpu, console, account = GPUS[config.gpu], Console(), account_of(model, config)
    parts = largest_stage(account, config)
    _show_memory(parts, config, console)
    if not gpu.fp8:
        _show_missing_units(config, console)
    _show_time(account, config, console)
    missing = sum(parts.values()) - gpu.memory * GIB
    if missing <= 0:
        console.print("it fits")
    else:
        flags = advice(model, config, gpu.memory, fp8=gpu.fp8 > 0)
        console.print(f"it does not fit by {readable(missing)}; {flags}", soft_wrap=True)
    if config.gpus > 1:
        _show_layouts(model, account, config, console)


def _show_memory(parts: dict[str, float], config: PlanConfig, console: Console) -> None:
    table = Table(title=f"{config.gpu}: predicted memory of the fullest GPU")
    table.add_column("part")
    table.add_column("memory", justify="right")
    for name, size in parts.items():
        table.add_row(name, readable(size))
    total = readable(sum(parts.values()))
    table.add_row("sum", f"{total} of {GPUS[config.gpu].memory:g} GiB", style="bold")
    console.print(table)


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


def _show_time(account: Account, config: PlanConfig, console: Console) -> None:
    seconds = sum(step_seconds(account, config, GPUS[config.gpu]).values()) / config.gpus
    step = config.global_batch_size * config.seq_length
    rate, tokens = step / seconds, config.tokens or config.steps * step
    console.print(
        f"about {rate:,.0f} tokens/s on {config.gpus} GPU(s), communication and idle time left "
        f"out: {tokens:.3g} tokens take {_lasting(tokens / rate)}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def _lasting(seconds: float) -> str:
    """Seconds as one says them: in hours, less than one in minutes."""
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"


def _show_layouts(model: Network, account: Account, config: PlanConfig, console: Console) -> None:
    """The fastest layouts that fit, by search."""
    gpu = GPUS[config.gpu]
    parts = seconds_of_parts(account, config, gpu)
    best = search(model, config, parts, config.gpus, gpu.memory)[:5]
    table = Table(title=f"best layouts of {config.gpus} GPUs, communication simulated")
    for name in ("dp × tp × pp", "tokens/s", "idle", "memory"):
        table.add_column(name, justify="right")
    for cells in rows(best):
        table.add_row(*cells)
    console.print(table if best else "no layout without sharding fits")
