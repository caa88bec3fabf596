"""What speed costs in quality: scores of tasks and speeds, of full depth and of every way to leave.

python benchmarks/quality.py --model demo/smollm2 --exits layers --draft-exits demo/smollm2-exits \\
    --thresholds 0.9 0.75 0.6 --jobs 8 --out benchmarks/results/experiments-smollm2

Scores come from lm-eval's command, one process for each way and form of prompts; `--jobs` of them
run at a time, uncompiled. **HumanEval's programs are run**, in processes of their own but no
sandbox. Speeds are of one text at a time, compiled, on the prompts of
`real.py`; they are compiled for meanwhile, and the clock starts when all scores are there. With a
certificate of `ee-tuning calibrate` beside the exits its threshold is among the ways.

Every score and speed is in `scores.json` and `speeds.json` of --out as soon as it is there, and is
not asked for again; the table and the plot are of those that there are.
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from experiments import save, table
from matplotlib.figure import Figure
from real import Prompts, figures, groups_of, prompt_sets, timed
from ways import Own, Settings

from ee_tuning import EarlyExitModel
from ee_tuning.cli import ends_in_a_line
from ee_tuning.devices import hardware, pick_device, pick_dtype, versions
from ee_tuning.files import read_json, write_json, write_text
from ee_tuning.loading import load_tokenizer

FULL = "full depth"
PARTS = ("scores", "speeds")


@dataclass(frozen=True)
class Tasks:
    """Tasks of lm-eval that are one score: what that is called, and what the command is told."""

    names: tuple[str, ...]
    metric: str
    told: tuple[str, ...] = ()


TASKS = {
    "HumanEval": Tasks(("local_humaneval",), "pass@1", ("--gen_kwargs", "max_gen_toks=256")),
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
        found.append(Way(f"threshold {threshold}", args.exits, leaving))
    if (Path(args.exits) / "calibration.json").exists():
        leaving = {"mode": "threshold", "threshold": "calibrated"}
        found.append(Way("calibrated threshold", args.exits, leaving))
    drafting = {"mode": "speculative", "threshold": 0.8, "max_pending": 4}
    found.append(Way("lossless, these exits", args.exits, drafting))
    if args.draft_exits:
        drafting = {"mode": "speculative", "threshold": 0.1, "max_pending": 6}
        found.append(Way("lossless, draft exit", args.draft_exits, drafting))
    return [way for way in found if not args.only or any(word in way.name for word in args.only)]


def score(way: Way, names: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """What lm-eval finds of a way, by name in `TASKS`, those of one form of prompts: ``score``, the
    mean over the tasks, its standard ``error``, the scores ``by`` task and where tokens left,
    ``exits``."""
    asked = [TASKS[name] for name in names]
    with tempfile.TemporaryDirectory() as folder:
        model = {"exits": way.exits, "model": args.model, "scoring": "decode", "compile": "off"}
        tasks = ",".join(task for one in asked for task in one.names)
        command = [
            sys.executable, "-m", "ee_tuning.lm_eval", "run", "--model", "ee-tuning",
            "--model_args", json.dumps(model | way.arguments), "--tasks", tasks,
            "--batch_size", str(args.batch), "--confirm_run_unsafe_code", "--output_path", folder,
            *asked[0].told, *(["--limit", str(args.limit)] if args.limit else []),
        ]  # fmt: skip
        start = time.perf_counter()
        left = max(1.0, args.end - time.monotonic())
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=left)
        if done.returncode:
            raise RuntimeError(f"{way.name}: lm-eval ended with {done.stderr[-2000:]}")
        (path,) = Path(folder).rglob("results_*.json")
        found = read_json(path)
    print(f"{way.name}, {', '.join(names)}: {time.perf_counter() - start:.0f} s", flush=True)
    return {name: _score(TASKS[name], found) for name in names}


def _score(tasks: Tasks, found: dict[str, Any]) -> dict[str, Any]:
    by = {name: found["results"][name][f"{tasks.metric},none"] for name in tasks.names}
    errors = [found["results"][name][f"{tasks.metric}_stderr,none"] for name in tasks.names]
    exits = found["config"]["exits"]
    return {
        "score": mean(by.values()),
        "error": sum(error**2 for error in errors) ** 0.5 / len(errors),
        "by": by,
        "exits": {name: exits[name] for name in tasks.names if name in exits},
    }


def sets_of(args: argparse.Namespace) -> dict[str, Prompts]:
    """The first prompts of each set."""
    sets = prompt_sets(load_tokenizer(args.model))
    return {name: prompts[: args.prompts] for name, prompts in sets.items()}


def write_speeds(ways: list[Way], args: Any, meet: Any, turn: Any) -> None:
    """Write what ways with one engine bring, by name and set of prompts; full depth is beside them.

    meet, turn: all who measure wait for each other before the clock starts, then take turns.
    """
    try:
        owns, calls = warmed(ways, args)
        meet.wait()
    except BaseException:
        meet.abort()  # nobody waits for one that failed
        raise
    depth = owns[FULL].model.backbone.num_layers
    with turn:
        for name, one in calls.items():
            results = {way: [timed(own, *call, 3) for call in one] for way, own in owns.items()}
            found = kept(args, "speeds")
            for way, own_results in results.items():
                row = figures(own_results, results[FULL], depth, greedy=True)
                found.setdefault(way, {}).setdefault(name, row)  # of full depth, the first one's
            write_json(args.out / "speeds.json", found)


def warmed(ways: list[Way], args: Any) -> tuple[dict[str, Own], dict[str, list[Any]]]:
    """Ways with one engine and full depth, by name, ready; and their calls by set."""
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
    return owns, calls


def kept(args: argparse.Namespace, part: str) -> dict[str, Any]:
    """The scores or speeds in --out, by way."""
    path = args.out / f"{part}.json"
    return read_json(path) if path.exists() else {}


@contextmanager
def speeds_measured(ways: list[Way], args: argparse.Namespace) -> Iterator[None]:
    """Behind this, there are speeds of all ways: what has one engine in a process of its own, which
    is compiled for inside."""
    found, engines = kept(args, "speeds"), dict[tuple[str, str], list[Way]]()
    for way in ways:
        if not sets_of(args).keys() <= found.get(way.name, {}).keys():
            engines.setdefault(way.engine, []).append(way)
    spawn = multiprocessing.get_context("spawn")
    meet, turn = spawn.Barrier(len(engines) + 1), spawn.Lock()
    workers = [
        spawn.Process(target=write_speeds, args=(own, args, meet, turn)) for own in engines.values()
    ]
    for worker in workers:
        worker.start()
    try:
        yield
        meet.wait()
    except BaseException:
        meet.abort()
        raise
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise RuntimeError("speeds could not be measured: see above")


def measure_scores(ways: list[Way], args: argparse.Namespace) -> None:
    """The scores that are not there yet, as far as there is time."""
    found, path = kept(args, "scores"), args.out / "scores.json"
    forms = {TASKS[name].told for name in args.tasks}
    wanted = [
        (way, names)
        for told in sorted(forms, reverse=True)
        for way in ways
        if (
            names := [
                name for name in args.tasks
                if TASKS[name].told == told and name not in found.get(way.name, {})
            ]
        )
    ]  # fmt: skip
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {pool.submit(score, way, names, args): way for way, names in wanted}
        for run in as_completed(runs):
            if run.exception() is None:
                found.setdefault(runs[run].name, {}).update(run.result())
                write_json(path, found)
    for run, way in runs.items():  # what the others found is written by now
        if isinstance(run.exception(), subprocess.TimeoutExpired):
            print(f"{way.name}: no time was left for scores", flush=True)
        else:
            run.result()


def measured(ways: list[Way], args: argparse.Namespace) -> dict[str, Any]:
    """What there is of each way: ``arguments``, ``scores`` by task and speeds by set, ``sets``."""
    scores, speeds = kept(args, "scores"), kept(args, "speeds")
    return {
        way.name: {
            "arguments": way.arguments,
            "scores": scores.get(way.name, {}),
            "sets": speeds.get(way.name, {}),
        }
        for way in ways
    }


def speed_of(sets: dict[str, Any]) -> float:
    """Against full depth: the mean over the sets."""
    return mean(row["against_full"] for row in sets.values())


def quality_table(ways: dict[str, Any], tasks: list[str]) -> str:
    """Markdown; – where something is not there. Speeds, if there are any."""
    rows = []
    sets = next((" / ".join(found["sets"]) for found in ways.values() if found["sets"]), "")
    for name, found in ways.items():
        scores = [found["scores"].get(task) for task in tasks]
        shown = [f"{one['score']:.1%} ± {one['error']:.1%}" if one else "–" for one in scores]
        rows.append([name, *shown, *(_speeds(found["sets"]) if sets else ())])
    speeds = ["speed", sets, "mean depth", "texts of full depth"] if sets else []
    return table(["way", *tasks, *speeds], rows)


def _speeds(sets: dict[str, Any]) -> list[str]:
    if not sets:
        return ["–"] * 4
    same = [one["identical_texts"].split(" of ") for one in sets.values()]
    return [
        f"{speed_of(sets):.2f}×",
        " / ".join(f"{one['against_full']:.2f}" for one in sets.values()),
        f"{mean(one['mean_depth'] for one in sets.values()):.1f}",
        f"{sum(int(a) for a, _ in same)} of {sum(int(b) for _, b in same)}",
    ]


def draw(ways: dict[str, Any], tasks: list[str], path: Path) -> None:
    """A panel for each task: score against speed, of the ways that have both."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=True):
        for mark, (name, found) in zip("os^Dvx*P", ways.items(), strict=False):
            one = found["scores"].get(task)
            if one is None or not found["sets"]:
                continue
            panel.errorbar(
                speed_of(found["sets"]), 100 * one["score"], 100 * one["error"], marker=mark,
                linestyle="", capsize=3, label=name,
            )  # fmt: skip
        panel.set(title=task, xlabel="speed, full depth being 1", ylim=(0, None))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("score (%, ± standard error)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    save(figure, path)


def main() -> None:
    """Measure all ways, and write the result, its table and its plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo/smollm2")
    parser.add_argument("--exits", required=True, help="exits at layers")
    parser.add_argument("--draft-exits", default="", help="a draft exit beside them")
    parser.add_argument("--thresholds", nargs="*", default=["0.9", "0.75", "0.6"])
    parser.add_argument("--only", nargs="*", default=[], help="ways whose names have one of these")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument(
        "--parts", nargs="*", choices=PARTS, default=list(PARTS), help="none: tables alone"
    )
    parser.add_argument("--prompts", type=int, default=8, help="of each set, for speeds")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--limit", type=int, default=0, help="questions of a task; 0: all")
    parser.add_argument("--batch", type=int, default=32, help="questions at a time")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e4, help="for scores, at most")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/experiments-demo"))
    args = parser.parse_args()
    if args.limit == 1:
        parser.error("--limit 1: a score of one question has no standard error, ask two or more")
    args.out.mkdir(parents=True, exist_ok=True)
    ways = ways_of(args)
    about = kept(args, "quality")
    for part in args.parts:
        about[part] = {
            "machine": f"{hardware(pick_device('auto'))}; {versions()}",
            "settings": {name: str(value) for name, value in vars(args).items()},
        }
    write_json(args.out / "quality.json", about)
    args.end = time.monotonic() + 60 * args.minutes
    with speeds_measured(ways, args) if "speeds" in args.parts else nullcontext():
        if "scores" in args.parts:
            measure_scores(ways, args)
    found = measured(ways, args)
    write_json(args.out / "quality.json", about | {"ways": found})
    machines = "; ".join(f"{part}: {about[part]['machine']}" for part in PARTS if part in about)
    text = f"## quality\n\n{quality_table(found, args.tasks)}\n\n{machines}\n"
    write_text(args.out / "quality.md", text)
    if any(one["sets"] for one in found.values()):
        draw(found, args.tasks, args.out / "quality.svg")
    print(text)


if __name__ == "__main__":
    with ends_in_a_line():
        main()
