"""Calibration from prompts to a certificate: see `calibrate`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np

from ee_tuning.adapter import find_exits, save_calibration
from ee_tuning.calibrate.bounds import (
    TESTS,
    check_levels,
    check_losses,
    interval,
    is_binary,
    least_prompts,
)
from ee_tuning.calibrate.config import CalibrateConfig
from ee_tuning.calibrate.prompts import Prompts, check_not_tuned_on, read_prompts
from ee_tuning.calibrate.risks import OFF, Along, Free, Risk, Thresholds, full_texts, look
from ee_tuning.calibrate.tasks import read_task
from ee_tuning.calibrate.walk import (
    COARSE,
    FINE,
    Split,
    Step,
    answer,
    by_pareto,
    by_quantile,
    size_of_test,
    split,
    walk,
)
from ee_tuning.certificate import Certificate
from ee_tuning.data.chats import with_template
from ee_tuning.decode.load import exit_hashes, load_for_decoding
from ee_tuning.decode.settings import make_policy
from ee_tuning.devices import hardware, pick_device, versions
from ee_tuning.errors import UserError, all_checked
from ee_tuning.files import check_writable
from ee_tuning.fingerprint import backbone_hashes
from ee_tuning.model import Network
from ee_tuning.parallel.data import collect_hashes
from ee_tuning.parallel.mesh import Mesh
from ee_tuning.regenerate.run import slots_for
from ee_tuning.settings import changed, warn_of_fewer

COUNTS = ("prompts", "prompt_tokens", "max_prompt_tokens", "max_new_tokens")


class Display:
    """What is shown of a calibration; this one shows nothing."""

    def say(self, text: str) -> None:
        """One line for the user."""

    @contextmanager
    def writing(self, tokens: int) -> Iterator[Callable[[int], None]]:
        """Inside, up to so many tokens are written: what is given is told how many more are."""
        yield lambda more: None

    def step(self, step: Step) -> None:
        """A candidate was tested."""


def calibrate(config: CalibrateConfig, display: Display | None = None) -> Certificate:
    """Find, on ``config.data``, the lowest thresholds that pass, and save them with the exits.

    Raises:
        UserError: a setting that cannot work, too few prompts, or some that the exits were tuned
            on.
        ProcessFailed: one of several processes failed.
    """
    check(config)
    folder = _own_folder(config)
    mesh, device = Mesh(config.dp, config.tp, config.pp), pick_device(config.device)
    with mesh.connected(device, config.timeout, advice="Start it again"):
        mesh.check_same("settings", repr(config))
        mesh.on_main(lambda: check_writable(folder, "copy the exits to where that is possible"))
        shown = display if display is not None and mesh.is_main else Display()
        return _calibrate(config, folder, mesh, shown)


def _calibrate(config: CalibrateConfig, folder: Path, mesh: Mesh, display: Display) -> Certificate:
    """On every process of a connected `mesh`, with the same result."""
    model, tokenizer = load_for_decoding(config, mesh)
    layers = list(make_policy(model, config.leaving(mode="threshold", threshold=0.0)).thresholds)
    if not layers:
        raise UserError("no exit before the last layer is active: see exit_layers and min_depth")
    if config.risk == "task":
        found = _of_task(config, layers, display)
    else:
        tokenizer = with_template(tokenizer, config.chat_template)
        longest = (model.backbone.longest_text or 2**30) - config.max_new_tokens
        most = min(longest, config.max_prompt_tokens)
        prompts = mesh.on_all(lambda: read_prompts(config, tokenizer, most))
        mesh.check_same("prompts", prompts.hash())
        needed = _check_enough(len(prompts.ids), config, "betting")
        unknown = check_not_tuned_on(prompts, folder, config)
        if mesh.is_main and changed(config, ["prompts"]):  # else it is as many as there are
            warn_of_fewer("prompts", config.prompts, len(prompts.ids))
        all_checked()
        for reason, number in prompts.left_out.items():
            display.say(f"{number:,} records are left out: {reason}")
        display.say(needed)
        display.say(unknown)
        found = _of_prompts(config, model, layers, prompts, mesh, display)
    found = replace(
        found,
        exits=exit_hashes(model, layers, mesh),
        backbone=collect_hashes(backbone_hashes(model.backbone), mesh),
        dtype=str(model.dtype).removeprefix("torch."),
        machine=f"{hardware(model.backbone.device)}; {versions()}",
    )
    mesh.on_main(lambda: save_calibration(model, folder, found))
    return found


def check(config: CalibrateConfig) -> None:
    """Refuse, before anything is loaded, settings that cannot work.

    Raises:
        UserError: says which.
    """
    check_levels(config.epsilon, config.delta)
    for name in COUNTS:
        if getattr(config, name) < 1:
            raise UserError(f"{name} is {getattr(config, name)}: give at least 1")
    for name in ("seed", "slots"):
        if getattr(config, name) < 0:
            raise UserError(f"{name} {getattr(config, name)} is negative: give 0 or more")
    task = config.risk == "task"
    for name in ("dp", "tp", "pp"):
        if task and getattr(config, name) > 1:
            raise UserError(
                f"{name} is {getattr(config, name)}: risk task runs no model, use --{name} 1"
            )
    if task and not config.samples:
        raise UserError("risk task needs lm-eval's sample files: name them with --samples")
    if not task and (config.samples or config.metric):
        raise UserError("samples and metric are for --risk task: leave them out")
    if task and config.data:
        raise UserError("risk task has its prompts in --samples: leave --data out")
    if not task and not config.data:
        raise UserError("no data given: name prompts like those to come with --data")


def _own_folder(config: CalibrateConfig) -> Path:
    """Where the exits are, and the certificate is to go.

    Raises:
        UserError: they are on the hub.
    """
    folder = find_exits(config.exits)
    if not Path(config.exits).expanduser().is_dir():
        raise UserError(
            f"a calibration is saved with the exits, and {config.exits} is on the hub: download it "
            "(hf download … --local-dir exits) and give the folder"
        )
    return folder


def _check_enough(prompts: int, config: CalibrateConfig, test: str, ordered: bool = False) -> str:
    """How many prompts it takes at least, in words; fewer are refused.

    Raises:
        UserError: so few could prove nothing, whatever they showed.
    """
    least = least_prompts(config.epsilon, config.delta, TESTS[test])
    own, whole = size_of_test(prompts, ordered), prompts
    while size_of_test(whole, ordered) < least:
        whole += 1
    needed = (
        f"to prove a risk of at most {config.epsilon:g} with probability {1 - config.delta:g} it "
        f"takes {least:,} prompts without any loss in the share that is tested"
    )
    if own < least:
        raise UserError(
            f"{needed}, {whole:,} in all, and there are {prompts:,}: give more with --data and "
            "--prompts, or a larger --epsilon or --delta"
        )
    return f"{needed}; there are {own:,} of {prompts:,}"


def _of_prompts(
    config: CalibrateConfig,
    model: Network,
    layers: list[int],
    prompts: Prompts,
    mesh: Mesh,
    display: Display,
) -> Certificate:
    longest = max(map(len, prompts.ids)) + config.max_new_tokens
    slots = config.slots or min(mesh.gather_on_host(slots_for(model, longest)))
    new, compiled = config.max_new_tokens, config.compiled()
    mesh.doing = "the texts of full depth"
    with display.writing(len(prompts.ids) * new) as advance:
        texts = full_texts(
            model, prompts.ids, new, slots, compiled, lambda more: advance(more * mesh.dp), mesh
        )
    mesh.doing = "the walk"
    parts = split(len(prompts.ids), config.seed)
    nats = config.risk == "nll"
    seen = look(model, layers, prompts.ids, texts, config.measure, nats, mesh)
    along = Along(seen, config.max_pending)
    free = config.risk == "text"
    path = by_pareto if config.order == "pareto" and len(layers) > 1 else by_quantile
    # Each step of a path of single exits loosens one of them, and those of free texts take long.
    candidates = path(along, parts.order, COARSE if free or path is by_pareto else FINE)
    risk: Risk = along
    if free:
        leaving = config.leaving(mode="threshold")
        risk = Free(model, prompts.ids, texts, leaving, new, slots, compiled, mesh)
    return _walk(config, candidates, risk, parts, "betting", prompts.hash(), layers, display)


def _of_task(config: CalibrateConfig, layers: list[int], display: Display) -> Certificate:
    task, candidates, names = read_task(config.samples, config.metric, layers)
    parts = split(len(names), config.seed, ordered=True)
    every = np.concatenate([parts.test, parts.report])
    # Whether a metric is right or wrong, or a share, is not a matter of chance.
    binary = all(is_binary(task.measure(one, every).losses) for one in candidates)
    test = "binomial" if binary else "betting"
    needed = _check_enough(len(names), config, test, ordered=True)
    all_checked()
    display.say(needed)
    data = hashlib.sha256(" ".join(names).encode()).hexdigest()[:32]
    return _walk(config, candidates, task, parts, test, data, layers, display)


def _walk(
    config: CalibrateConfig,
    candidates: Sequence[Thresholds],
    risk: Risk,
    parts: Split,
    test: str,
    data: str,
    layers: list[int],
    display: Display,
) -> Certificate:
    """Walk, report, and what there is to certify without the exits' and the model's part."""
    steps = walk(candidates, risk, parts.test, config.epsilon, config.delta, test, display.step)
    found = answer(steps, config.delta)
    thresholds = dict(found.thresholds) if found else dict.fromkeys(layers, OFF)
    report: dict[str, Any] = {"n": len(parts.report), "risk": 0.0, "low": 0.0, "high": 0.0}
    if found:
        shown = risk.measure(thresholds, parts.report)
        losses = check_losses(shown.losses)
        low, high = interval(losses, config.delta)
        depth = None if isnan(shown.depth) else shown.depth
        report |= {"risk": float(losses.mean()), "low": low, "high": high, "depth": depth}
    return Certificate(
        thresholds=thresholds,
        risk=config.risk,
        epsilon=config.epsilon,
        delta=config.delta,
        n=len(parts.test),
        p=found.p if found else None,
        test=test,
        tested=found.risk if found else 0.0,
        report=report,
        exits={},
        backbone={},
        dtype="",
        measure=config.measure,
        max_pending=config.max_pending,
        max_new_tokens=config.max_new_tokens,
        data=data,
        beside={"hoeffding-bentkus": found.beside} if found else {},
        path=[step.to_json() for step in steps],
    )
