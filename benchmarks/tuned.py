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
from ee_tuning.decode import generate
from ee_tuning.decode.load import load_for_decoding
from ee_tuning.devices import pick_device, pick_dtype
from ee_tuning.evaluate.exits import measure_exits
from ee_tuning.evaluate.speed import take_prompts
from ee_tuning.exit_config import ExitConfig
from ee_tuning.files import read_json, write_json
from ee_tuning.loading import load_tokenizer
from ee_tuning.model import Network
from ee_tuning.share import New, Share, load
from ee_tuning.tune.loop import tune

NEW_TOKENS, PROMPT_TOKENS, ROUNDS = 32, 16, 5
Settings = dict[str, Any]
Found = dict[str, Any]


@dataclass
class Runs:
    """Tuning runs by their settings.

    common: what all runs share. about: what is said of all of them; what has other `settings` is
    not for this folder. held_out: what their exits are measured on, files by name, the first one
    first. end: when, by the clock of `time.monotonic`, none is begun any more.
    """

    folder: Path
    common: TuneConfig
    about: dict[str, Any]
    held_out: dict[str, list[str]]
    jobs: int = 1
    end: float = float("inf")
    found: dict[str, Found] = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "results.json"
        kept = read_json(self.path) if self.path.exists() else {"runs": {}}
        self.found = kept["runs"]
        if self.found and kept["about"]["settings"] != self.about["settings"]:
            raise SystemExit(f"{self.path} has runs of {kept['about']['settings']}: choose --out")
        if self.found:  # most of what is said is of the runs that were there first
            self.about = kept["about"] | {"plan": self.about["plan"]}

    def key(self, settings: Settings) -> str:
        """What a run with these settings, where they are not the common ones, is called by."""
        own = {k: v for k, v in settings.items() if v != getattr(self.common, k)}
        if "data" in own:
            own["data"] = [Path(name).name for name in own["data"]]
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]

    def write(self) -> None:
        """Write what was found so far."""
        write_json(self.path, {"about": self.about, "runs": self.found})

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
        self.write()
        print(f"{name}: {found['seconds']:.0f} s", flush=True)

    def measure_speeds(self, wanted: dict[str, Settings]) -> None:
        """Add to runs how fast all tokens leave at each of their exits, full depth being 1, where
        that is not there.

        The exits are new ones: what they say does not matter to that. Each is compiled for in a
        process of its own, and timed one after another, the result written after each.
        """
        runs = {self.key(s): s for s in wanted.values() if self.get(s)}
        missing = [
            (key, layer)
            for key, settings in runs.items()
            for layer in settings["layers"].split(",")
            if layer not in self.found[key].get("speed", {})
        ]
        if not missing:
            return
        spawn = multiprocessing.get_context("spawn")
        meet, turn, told = spawn.Barrier(len(missing)), spawn.Lock(), spawn.Queue()
        about, held_out = self.common.model, next(iter(self.held_out.values()))
        workers = [
            spawn.Process(
                target=tell_speed,
                args=(key, runs[key]["arch"], layer, about, held_out, meet, turn, told),
            )
            for key, layer in missing
        ]
        for worker in workers:
            worker.start()
        for _ in workers:
            key, layer, speed = told.get()
            if speed is None:
                raise RuntimeError("speeds could not be measured: see above")
            self.found[key].setdefault("speed", {})[layer] = speed
            self.write()
        for worker in workers:
            worker.join()


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


def tell_speed(
    key: str, arch: str, layer: str, backbone: str, held_out: list[str], meet: Any, turn: Any,
    told: Any,
) -> None:  # fmt: skip
    """Tell how fast all tokens leave at a new exit of this kind, full depth being 1; None if that
    fails.

    meet, turn: all who measure wait for each other before the clock starts, then take turns.
    """
    try:
        device = pick_device("auto")
        share = Share(dtype=pick_dtype("auto", device), device=str(device))
        exits = ExitConfig(layer, arch=arch, head="shared")
        model = load(New(backbone, exits), share, Network)
        tokenizer = load_tokenizer(backbone)
        prompts = take_prompts(load_packed(held_out, tokenizer, 256, 0), 2, PROMPT_TOKENS)
        for at in (None, int(layer)):
            decode(model, prompts, at)
        meet.wait()
        with turn:
            ratios = [
                decode(model, prompts, int(layer)) / decode(model, prompts, None)
                for _ in range(ROUNDS)
            ]
        told.put((key, layer, median(ratios)))
    except BaseException:
        meet.abort()
        told.put((key, layer, None))
        raise


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
