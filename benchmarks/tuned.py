"""Tuning runs of experiments, each done once, and what is measured of them."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ee_tuning.adapter import count_parameters
from ee_tuning.config import EvaluateConfig, TuneConfig
from ee_tuning.data import load_packed
from ee_tuning.decode import engines, generate
from ee_tuning.decode.load import load_for_decoding
from ee_tuning.evaluate.exits import measure_exits
from ee_tuning.evaluate.speed import take_prompts
from ee_tuning.files import read_json, write_json
from ee_tuning.model import Network
from ee_tuning.tune.loop import tune

NEW_TOKENS, PROMPT_TOKENS, ROUNDS = 32, 16, 5
Settings = dict[str, Any]
Found = dict[str, Any]


@dataclass
class Runs:
    """Tuning runs by their settings.

    common: what all runs share. held_out: what their exits are measured on, files by name, the
    first one first. end: when, by the clock of `time.monotonic`, none is begun any more.
    """

    folder: Path
    common: TuneConfig
    held_out: dict[str, list[str]]
    jobs: int = 1
    end: float = float("inf")
    found: dict[str, Found] = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "results.json"
        self.found = read_json(self.path) if self.path.exists() else {}

    def key(self, settings: Settings) -> str:
        """What a run with these settings beside the common ones is called by."""
        config = replace(self.common, **settings)
        return hashlib.sha256(repr(config).encode()).hexdigest()[:16]

    def get(self, settings: Settings) -> Found | None:
        """What was measured of a run, and its ``folder``; None if it was not run."""
        key = self.key(settings)
        if key not in self.found:
            return None
        return self.found[key] | {"folder": str(self.folder / "runs" / key)}

    def run(self, wanted: dict[str, Settings]) -> None:
        """Run what is not there yet, in this order, `jobs` at a time; write each as it ends."""
        missing = {self.key(s): (name, s) for name, s in wanted.items() if not self.get(s)}
        if self.jobs == 1:
            for key, (name, settings) in missing.items():
                if time.monotonic() < self.end:
                    self._keep(key, name, settings, measured(*self._task(key, settings)))
            return
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.jobs, mp_context=spawn) as pool:
            begun = {
                pool.submit(measured, *self._task(key, settings)): (key, name, settings)
                for key, (name, settings) in missing.items()
            }
            for run in as_completed(begun):
                if run.exception() is None:
                    self._keep(*begun[run], run.result())
        for run in begun:  # what the others found is written by now
            run.result()

    def _task(self, key: str, settings: Settings) -> tuple[Any, ...]:
        out = str(self.folder / "runs" / key)
        config = replace(self.common, **settings, out=out, resume=True)
        return config, self.held_out, self.end

    def _keep(self, key: str, name: str, settings: Settings, found: Found | None) -> None:
        if found is None:
            print(f"{name}: no time was left", flush=True)
            return
        self.found[key] = {"name": name, "settings": settings, **found}
        write_json(self.path, self.found)
        print(f"{name}: {found['seconds']:.0f} s", flush=True)

    def measure_speeds(self, wanted: dict[str, Settings]) -> None:
        """Add to runs how fast all tokens leave at each of their exits, where that is not there.

        All runs at once are compiled for, and timed one after another.
        """
        there = {self.key(s): name for name, s in wanted.items() if self.get(s)}
        missing = [key for key in there if "speed" not in self.found[key]]
        if not missing:
            return
        spawn = multiprocessing.get_context("spawn")
        meet, turn = spawn.Barrier(len(missing)), spawn.Lock()
        folders = [self.folder / "runs" / key for key in missing]
        rows = [(str(one), self.common.model, self.held_out, meet, turn) for one in folders]
        workers = [spawn.Process(target=write_speeds, args=row) for row in rows]
        for worker in workers:
            worker.start()
        for worker, key, folder in zip(workers, missing, folders, strict=True):
            worker.join()
            self.found[key] |= read_json(folder / "speed.json")
        write_json(self.path, self.found)


def measured(config: TuneConfig, held_out: dict[str, list[str]], end: float) -> Found | None:
    """Tune, and measure the exits: losses by step, parameters, and by held-out text a row each.

    None where it is later than `end`.
    """
    if time.monotonic() > end:
        return None
    torch.compiler.reset()
    started = time.perf_counter()
    tune(config)
    took = time.perf_counter() - started
    out = Path(config.out)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    curve = [(one["step"], one["valid_loss"]) for one in records if "valid_loss" in one]
    evaluation = EvaluateConfig(exits=config.out, model=config.model, seq_length=config.seq_length)
    model, tokenizer = load_for_decoding(evaluation)
    exits = {}
    for name, files in held_out.items():
        packed = load_packed(files, tokenizer, config.seq_length, config.seed, config)
        exits[name] = measure_exits(model, packed, evaluation, [])["exit_rows"]
    shutil.rmtree(out / "checkpoints")  # several times as large as the exits
    return {
        "seconds": took,
        "tokens": config.steps * config.global_batch_size * config.seq_length,
        "curve": curve,
        "exits": exits,
        "parameters": {str(k): n for k, n in count_parameters(out).items()},
    }


def write_speeds(
    exits: str, backbone: str, held_out: dict[str, list[str]], meet: Any, turn: Any
) -> None:
    """Write ``speed.json`` to a folder with exits: tokens per second by exit, and at full depth.

    meet, turn: all who measure wait for each other before the clock starts, then take turns.
    """
    evaluation = EvaluateConfig(exits=exits, model=backbone)
    model, tokenizer = load_for_decoding(evaluation)
    files = next(iter(held_out.values()))
    packed = load_packed(files, tokenizer, 256, 0, evaluation)
    prompts = take_prompts(packed, 2, PROMPT_TOKENS)
    engines.KEPT = len(model.exit_layers) + 1  # one for each is captured ahead
    places = [None, *model.exit_layers]
    for layer in places:
        decode(model, prompts, layer)
    meet.wait()
    with turn:
        rounds = [{layer: decode(model, prompts, layer) for layer in places} for _ in range(ROUNDS)]
    speeds = {layer: median(one[layer] for one in rounds) for layer in places}
    full = speeds.pop(None)
    speed = {str(layer): value for layer, value in speeds.items()}
    write_json(Path(exits) / "speed.json", {"speed": speed, "full_speed": full})


def decode(model: Network, prompts: Sequence[Sequence[int]], layer: int | None) -> float:
    """Tokens per second where all end at an exit, or at full depth."""
    how: dict[str, Any] = {"mode": "full"}
    if layer is not None:
        how = {"mode": "fixed", "exit_layers": [layer], "threshold": 0.0}
    start = time.perf_counter()
    for ids in prompts:
        inputs = torch.tensor([list(ids)], device=model.device)
        generate(model, inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, **how)
    return len(prompts) * NEW_TOKENS / (time.perf_counter() - start)
