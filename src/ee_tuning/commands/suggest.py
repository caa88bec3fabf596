"""`ee-tuning suggest`: which exits promise most speed for a backbone on this machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ee_tuning.devices import hardware, pick_device, versions
from ee_tuning.errors import UserError
from ee_tuning.exit_config import DRAFT
from ee_tuning.files import check_writable, write_json
from ee_tuning.folders import is_json_with
from ee_tuning.suggest.config import SuggestConfig
from ee_tuning.suggest.run import PAYS, Suggestion
from ee_tuning.suggest.run import suggest as search


def suggest(config: SuggestConfig) -> None:
    """Probe, print what was found and what to do with it; write it to ``config.out``.

    Raises:
        UserError: a file that cannot be written, or see `ee_tuning.suggest.suggest`.
    """
    if config.out:
        path = Path(config.out)
        if path.is_dir():
            raise UserError(f"{path} is a folder: name the file to write with --out")
        if path.exists() and not is_json_with(path, "machine", "settings", "candidates"):
            raise UserError(f"{path} exists, and suggest did not write it: choose another --out")
        check_writable(path.parent)
    console, progress = Console(), Console(stderr=True)
    found = search(config, lambda text: progress.print(text, highlight=False))
    console.print(table(found))
    for line in advice(config, found):
        console.print(line, highlight=False, soft_wrap=True)
    if config.out:
        machine = f"{hardware(pick_device(config.device))}; {versions()}"
        settings = dataclasses.asdict(config)
        result = {"machine": machine, "settings": settings, **dataclasses.asdict(found)}
        write_json(Path(config.out), result)


def table(found: Suggestion) -> Table:
    """The exits whose rounds were timed, and the others below them."""
    shown = Table(
        title="exits, as probes tuned for a short time promise",
        caption=f"full depth: {found.full:.0f} tokens/s; ~: counted by weights, not timed; "
        "drafting: with the threshold and drafts at most; leaving: mode threshold, with the "
        "threshold and the tokens that stay the backbone's own",
    )
    for column in ("layer", "arch", "tokens", "agrees", "drafting", "leaving"):
        shown.add_column(column, justify="right", no_wrap=True)
    for one in found.candidates:
        about = "" if one.measured else "~"
        leaving = "–"
        if one.leaving:
            speedup, threshold, agreement = one.leaving
            leaving = f"{about}{speedup:.2f}× ({threshold:g}, {agreement:.1%})"
        shown.add_row(
            "–" if one.layer == DRAFT else str(one.layer),
            one.arch,
            f"{one.vocab:,}" if one.vocab else "all",
            f"{one.agreement:.1%}",
            f"{about}{one.speedup:.2f}× ({one.threshold:g}, {one.longest})",
            leaving,
        )
    return shown


def advice(config: SuggestConfig, found: Suggestion) -> list[str]:
    """What to do, in a few lines."""
    best, lines = found.best, []
    leaving = [one for one in found.candidates if one.measured and one.leaving]
    if best is None:
        top = max((one.speedup for one in found.candidates if one.measured), default=1.0)
        lines.append(
            "Without changing the text, no exit will pay here: the best that was timed promises "
            f"{top:.2f}× full depth's speed, decoded one text at a time."
        )
    else:
        place = "" if best.layer == DRAFT else f" after layer {best.layer}"
        exits = "" if best.layer == DRAFT else f" --layers {best.layer}"
        known = f" --exit-vocab {best.vocab}" if best.vocab else ""
        lines += [
            f"Drafting with a {best.arch} exit{place} promises "
            f"{best.speedup:.2f}× full depth's speed ({best.speedup * found.full:.0f} tokens/s), "
            "one text at a time, and the backbone's own text:",
            f"  ee-tuning tune --model {config.model}{exits} --arch {best.arch}{known} "
            "--head shared --loss kl --data … --out exits/",
            "  ee-tuning generate --exits exits/ --mode speculative "
            f"--threshold {best.threshold:g} --max-pending {best.longest} --prompt …",
        ]
    most = max(leaving, key=lambda one: one.leaving[0] if one.leaving else 0, default=None)
    if most and most.leaving and most.leaving[0] >= PAYS:
        speedup, threshold, agreement = most.leaving
        lines.append(
            f"With --mode threshold --threshold {threshold:g}, a {most.arch} exit after layer "
            f"{most.layer} promises {speedup:.2f}×, and that {agreement:.1%} of the tokens are the "
            "backbone's own."
        )
    steps = ", ".join(f"{number} of {arch}" for arch, number in found.steps.items())
    lines.append(f"Probes had {steps} steps: exits that are tuned for longer agree more often.")
    return lines
