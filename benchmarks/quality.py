"""What speed costs in quality: scores of tasks and speeds, of full depth and of every way to leave.

python benchmarks/quality.py --model demo/smollm2 --exits layers --draft-exits demo/smollm2-exits \\
    --thresholds 0.9 0.75 0.6 --jobs 8 --out benchmarks/results/experiments-smollm2

Scores come from lm-eval's command, one process for each way and form of prompts; `--jobs` of them
run at a time, uncompiled. HumanEval is asked in the chat template. **Its programs are run**, in
processes of their own but no sandbox. Speeds are of one text at a time, compiled, on the prompts of
`real.py`, and nothing else runs meanwhile. With a certificate of `ee-tuning calibrate` beside the
exits its threshold is among the ways. Scores that are in --out already are not asked for again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from experiments import table
from matplotlib.figure import Figure
from real import (
    Prompts,
    chat_prompts,
    code_prompts,
    document_prompts,
    figures,
    groups_of,
    timed,
)
from ways import Own, Settings

from ee_tuning import EarlyExitModel
from ee_tuning.devices import hardware, pick_device, pick_dtype, versions
from ee_tuning.files import read_json, write_json, write_text
from ee_tuning.loading import load_tokenizer

FULL = "full depth"


@dataclass(frozen=True)
class Tasks:
    """Tasks of lm-eval that are one score: what that is called, and what the command is told."""

    names: tuple[str, ...]
    metric: str
    told: tuple[str, ...] = ()


TASKS = {
    "HumanEval": Tasks(
        ("local_humaneval_chat",),
        "pass@1",
        ("--apply_chat_template", "--gen_kwargs", "max_gen_toks=256"),
    ),
    "puzzles": Tasks(
        (
            "local_chain_sum",
            "local_letter_counting",
            "local_spell_backward",
            "local_family_relationships",
        ),
        "score",
    ),
    "choices": Tasks(
        (
            "local_code_line_description",
            "local_general_knowledge",
            "local_known_unknowns",
            "local_physical_intuition",
        ),
        "acc",
    ),
}


@dataclass(frozen=True)
class Way:
    """Where tokens leave: the folder of the exits and arguments of `generate`."""

    name: str
    exits: str
    arguments: dict[str, Any]

    @property
    def engine(self) -> tuple[str, str]:
        """What ways that decode with one engine have alike."""
        return self.exits, "speculative" if self.arguments["mode"] == "speculative" else "leave"


def ways_of(args: argparse.Namespace) -> list[Way]:
    """Full depth first."""
    found = [Way(FULL, args.exits, {"mode": "full"})]
    for threshold in args.thresholds:
        leaving = {"mode": "threshold", "threshold": threshold}
        found.append(Way(f"threshold {threshold:g}", args.exits, leaving))
    if (Path(args.exits) / "calibration.json").exists():
        leaving = {"mode": "threshold", "threshold": "calibrated"}
        found.append(Way("calibrated threshold", args.exits, leaving))
    drafting = {"mode": "speculative", "threshold": 0.8, "max_pending": 4}
    found.append(Way("lossless, these exits", args.exits, drafting))
    if args.draft_exits:
        drafting = {"mode": "speculative", "threshold": 0.1, "max_pending": 6}
        found.append(Way("lossless, draft exit", args.draft_exits, drafting))
    return [way for way in found if not args.only or any(word in way.name for word in args.only)]


def score(way: Way, tasks: Tasks, args: argparse.Namespace) -> dict[str, Any]:
    """What lm-eval finds of a way: ``score``, the mean over the tasks, its standard ``error``, the
    scores ``by`` task and where tokens left, ``exits``."""
    with tempfile.TemporaryDirectory() as folder:
        model = {"exits": way.exits, "model": args.model, "scoring": "decode", "compile": "off"}
        command = [
            sys.executable, "-m", "ee_tuning.lm_eval", "run", "--model", "ee-tuning",
            "--model_args", json.dumps(model | way.arguments), "--tasks", ",".join(tasks.names),
            "--batch_size", str(args.batch), "--confirm_run_unsafe_code", "--output_path", folder,
            *tasks.told, *(["--limit", str(args.limit)] if args.limit else []),
        ]  # fmt: skip
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        if done.returncode:
            raise RuntimeError(f"{way.name}: lm-eval ended with {done.stderr[-2000:]}")
        (path,) = Path(folder).rglob("results_*.json")
        found = read_json(path)
    print(f"{way.name}, {tasks.names[0]} …: {time.perf_counter() - start:.0f} s", flush=True)
    by = {name: found["results"][name][f"{tasks.metric},none"] for name in tasks.names}
    errors = [found["results"][name][f"{tasks.metric}_stderr,none"] for name in tasks.names]
    return {
        "score": mean(by.values()),
        "error": sum(error**2 for error in errors) ** 0.5 / len(errors),
        "by": by,
        "exits": found["config"]["exits"],
    }


def sets_of(args: argparse.Namespace) -> dict[str, Prompts]:
    """The first prompts of each set."""
    tokenizer = load_tokenizer(args.model)
    sets = {
        "code": code_prompts(tokenizer, ""),
        "chat": chat_prompts(tokenizer),
        "documents": document_prompts(tokenizer),
    }
    return {name: prompts[: args.prompts] for name, prompts in sets.items() if prompts}


def write_speeds(ways: list[Way], path: str, args: Any, meet: Any, turn: Any) -> None:
    """Write what ways with one engine bring, by name and set of prompts; full depth is beside them.

    meet, turn: all who measure wait for each other before the clock starts, then take turns.
    """
    device = pick_device("auto")
    dtype = pick_dtype("auto", device)
    model = EarlyExitModel.from_pretrained(ways[0].exits, args.model, dtype=dtype, device=device)
    ends = torch.tensor([model.generation_config.eos_token_id]).flatten().tolist()
    settings, sets = Settings(args.new_tokens, frozenset(ends)), sets_of(args)
    calls = {name: groups_of(prompts, 1, min(ends), device) for name, prompts in sets.items()}
    longest = max(len(ids) for prompts in sets.values() for ids in prompts)
    owns = {FULL: Own(model, {"mode": "full"}, settings)}
    owns |= {way.name: Own(model, way.arguments, settings) for way in ways}
    for own in owns.values():
        own.warm_up(1, longest + args.new_tokens)
        for one in calls.values():
            own(*one[0])
    meet.wait()
    found: dict[str, Any] = {}
    with turn:
        for name, one in calls.items():
            results = {way: [timed(own, *call, 3) for call in one] for way, own in owns.items()}
            for way, own_results in results.items():
                row = figures(own_results, results[FULL], model.backbone.num_layers, greedy=True)
                found.setdefault(way, {})[name] = row
    write_json(Path(path), found)


def measure(ways: list[Way], args: argparse.Namespace) -> dict[str, Any]:
    """Scores and speeds of all ways."""
    if args.no_speeds:
        scores = score_all(ways, args)
        return {way.name: {"arguments": way.arguments, "scores": scores[way.name]} for way in ways}
    engines: dict[tuple[str, str], list[Way]] = {}
    for way in ways:
        engines.setdefault(way.engine, []).append(way)
    spawn = multiprocessing.get_context("spawn")
    meet, turn = spawn.Barrier(len(engines) + 1), spawn.Lock()
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.json" for number in range(len(engines))]
        workers = [
            spawn.Process(target=write_speeds, args=(own, str(path), args, meet, turn))
            for own, path in zip(engines.values(), paths, strict=True)
        ]
        for worker in workers:
            worker.start()
        try:
            scores = score_all(ways, args)
            meet.wait()
        except BaseException:
            meet.abort()
            raise
        for worker in workers:
            worker.join()
        speeds: dict[str, Any] = {}
        for path in paths:
            speeds = read_json(path) | speeds  # of full depth, the first one's
    return {
        way.name: {"arguments": way.arguments, "scores": scores[way.name], "sets": speeds[way.name]}
        for way in ways
    }


def score_all(ways: list[Way], args: argparse.Namespace) -> dict[str, Any]:
    """By way, the scores by name."""
    path = args.out / "scores.json"
    found: dict[str, Any] = read_json(path) if path.exists() else {}
    for way in ways:
        found.setdefault(way.name, {})
    wanted = [(way, name) for name in args.tasks for way in ways if name not in found[way.name]]
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {pool.submit(score, way, TASKS[name], args): (way, name) for way, name in wanted}
        for run in as_completed(runs):
            if run.exception() is None:
                way, name = runs[run]
                found[way.name][name] = run.result()
                write_json(path, found)
    for run in runs:  # what the others found is written by now
        run.result()
    return {way.name: {name: found[way.name][name] for name in args.tasks} for way in ways}


def speed_of(found: dict[str, Any]) -> float:
    """Against full depth: the mean over the sets."""
    return mean(row["against_full"] for row in found["sets"].values())


def quality_table(ways: dict[str, Any]) -> str:
    """Markdown."""
    rows = [
        [
            name,
            *(f"{one['score']:.1%} ± {one['error']:.1%}" for one in found["scores"].values()),
            *_speeds(found),
        ]
        for name, found in ways.items()
    ]
    first = next(iter(ways.values()))
    columns = ["way", *first["scores"]]
    if "sets" in first:
        columns += ["speed", " / ".join(first["sets"]), "mean depth", "texts of full depth"]
    return table(columns, rows)


def _speeds(found: dict[str, Any]) -> list[str]:
    if "sets" not in found:
        return []
    sets = found["sets"].values()
    same = [one["identical_texts"].split(" of ") for one in sets]
    return [
        f"{speed_of(found):.2f}×",
        " / ".join(f"{one['against_full']:.2f}" for one in sets),
        f"{mean(one['mean_depth'] for one in sets):.1f}",
        f"{sum(int(a) for a, _ in same)} of {sum(int(b) for _, b in same)}",
    ]


def draw(ways: dict[str, Any], path: Path) -> None:
    """A panel for each task: score against speed."""
    tasks = list(next(iter(ways.values()))["scores"])
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=True):
        for mark, (name, found) in zip("os^Dvx*P", ways.items(), strict=False):
            one = found["scores"][task]
            panel.errorbar(
                speed_of(found), 100 * one["score"], 100 * one["error"], marker=mark,
                linestyle="", capsize=3, label=name,
            )  # fmt: skip
        panel.set(title=task, xlabel="speed, full depth being 1", ylim=(0, None))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("score (%, ± standard error)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def main() -> None:
    """Measure all ways, and write the result, its table and its plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo/smollm2")
    parser.add_argument("--exits", required=True, help="exits at layers")
    parser.add_argument("--draft-exits", default="", help="a draft exit beside them")
    parser.add_argument("--thresholds", type=float, nargs="*", default=[0.9, 0.75, 0.6])
    parser.add_argument("--only", nargs="*", default=[], help="ways whose names have one of these")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--no-speeds", action="store_true", help="scores alone")
    parser.add_argument("--prompts", type=int, default=8, help="of each set, for speeds")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--limit", type=int, default=0, help="questions of a task; 0: all")
    parser.add_argument("--batch", type=int, default=32, help="questions at a time")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/experiments-demo"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    ways = measure(ways_of(args), args)
    settings = {name: str(value) for name, value in vars(args).items()}
    machine = f"{hardware(pick_device('auto'))}; {versions()}"
    write_json(args.out / "quality.json", {"machine": machine, "settings": settings, "ways": ways})
    text = f"## quality\n\n{quality_table(ways)}\n\n{machine}\n"
    write_text(args.out / "quality.md", text)
    if not args.no_speeds:
        draw(ways, args.out / "quality.svg")
    print(text)


if __name__ == "__main__":
    main()
