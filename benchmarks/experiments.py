"""The questions that the paper's experiments ask (arXiv 2402.00518, section 4), a table each.

python benchmarks/experiments.py                          # the demo's model, all of them
python benchmarks/experiments.py --only depths            # architecture × depth
python benchmarks/experiments.py --model demo/smollm2 --own own.jsonl --own-valid held.jsonl \\
    --data documents.jsonl --valid-data demo/data/validation.jsonl --amounts 1e6 3e6 1e7 \\
    --steps 500 --seq-length 512 --lr 3e-3 --eps 1e-8 --jobs 3 \\
    --out benchmarks/results/experiments-smollm2

depths        what an exit is made of, and where it sits: loss, agreement, parameters, speed
starts        copied and random exits: held-out loss as steps go by
independence  exits that are tuned together are those that are tuned alone, bit for bit
losses        what an exit is tuned on: loss, agreement, confidence
data          text that people wrote against text of the model's own, and how much of it

In --out, `results.json` has finished runs by their settings: what is there is not run again. Tables
go to `tables.md`, plots beside them; `--tables` makes them anew, without a model. What quality
costs in speed is `quality.py`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from tuned import Found, Runs, Settings

from ee_tuning.adapter import stored
from ee_tuning.cli import ends_in_a_line
from ee_tuning.config import TuneConfig
from ee_tuning.devices import hardware, pick_device, versions
from ee_tuning.files import read_json, write_text
from ee_tuning.share import New, shapes

ARCHS = ("embedding", "norm", "mlp", "layer")
INITS = ("copy", "random")
LOSSES: dict[str, Settings] = {
    "kl": {"loss": "kl"},
    "mixed": {"loss": "mixed"},
    "acceptance": {"loss": "acceptance", "exit_vocab": 0},
    "ce, dynamic weights": {"dynamic_weights": True},
}
OWN, DOCUMENTS = "own text", "documents"


@dataclass
class Plan:
    """What all experiments ask about.

    layers: six depths. kinds: data by kind. amounts: tokens of each. step: tokens of one. few:
    steps after which it shows whether exits are independent.
    """

    layers: list[int]
    kinds: dict[str, list[str]]
    amounts: list[int]
    step: int
    few: int

    @property
    def some(self) -> list[int]:
        """Every other depth."""
        return self.layers[1::2]

    @property
    def middle(self) -> int:
        """The depth of those who have one exit."""
        return self.layers[len(self.layers) // 2]


@dataclass(frozen=True)
class Experiment:
    """The runs that it wants, by name, and what it makes of those that there are."""

    wanted: Callable[[Plan], dict[str, Settings]]
    table: Callable[[dict[str, Found], Plan, Path], str]
    speeds: bool = False


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def exits_of(found: Found, kind: str = "") -> dict[int, Found]:
    """The rows of a run's exits by layer, on a kind of held-out text, or the first one."""
    rows = found["exits"][kind] if kind else next(iter(found["exits"].values()))
    return {row["layer"]: row for row in rows if not row["final"]}


def drawn(
    path: Path, xlabel: str, ylabel: str, lines: dict[str, tuple[Any, Any]], **scale: Any
) -> None:
    """A plot of (x, y) by label, each kind of line with a mark of its own."""
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel, **scale)
    for mark, (label, points) in zip("os^Dvx*P", lines.items(), strict=False):
        axes.plot(*points, marker=mark, label=label)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """The same bytes for the same plot."""
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None})


def depths_wanted(plan: Plan) -> dict[str, Settings]:
    """All depths of an architecture are one run: see `independence`."""
    return {arch: {"arch": arch, "layers": _names(plan.layers)} for arch in ARCHS}


def depths(found: dict[str, Found], plan: Plan, folder: Path) -> str:
    """Architecture × depth."""
    rows, lines = [], {}
    for arch, run in found.items():
        exits = exits_of(run)
        for layer, one in exits.items():
            speed = run.get("speed", {}).get(str(layer))
            faster = f"{speed:.2f}×" if speed else "–"
            parameters = run["parameters"].get(str(layer), 0)
            rows.append([f"`{arch}`", layer, *_quality(one), f"{parameters:,}", faster])
        lines[arch] = plan.layers, [one["loss"] for one in exits.values()]
    loss = "held-out loss (nats per token)"
    drawn(folder / "depths.svg", "exit layer", loss, lines, yscale="log")
    names = ["exit", "layer", "loss", "agrees with full depth", "parameters"]
    return table([*names, "speed, all there"], rows)


def starts_wanted(plan: Plan) -> dict[str, Settings]:
    """Copies are those of `depths`."""
    return {
        f"`{arch}`, {init}": {"arch": arch, "layers": _names(plan.layers)}
        | ({"init": init} if init != "copy" else {})
        for arch in ("mlp", "layer")
        for init in INITS
    }


def starts(found: dict[str, Found], plan: Plan, folder: Path) -> str:
    """Held-out losses as steps go by, of exits that begin in one way or another."""
    middle = str(plan.middle)
    curves = {name: [(n, loss[middle]) for n, loss in run["curve"]] for name, run in found.items()}
    rows = [[name, *(f"{loss:.3f}" for _, loss in curve)] for name, curve in curves.items()]
    lines = {
        name.replace("`", ""): tuple(zip(*curve, strict=True)) for name, curve in curves.items()
    }
    drawn(folder / "starts.svg", "step", "held-out loss (nats per token)", lines, yscale="log")
    steps = [step for step, _ in next(iter(curves.values()))]
    return table((f"exit at {middle}, start", *(f"step {step}" for step in steps)), rows)


def independence_wanted(plan: Plan) -> dict[str, Settings]:
    """One of all depths, and some alone."""
    layers = {_names(plan.layers): plan.layers} | {str(layer): [layer] for layer in plan.some}
    return {
        name: {"arch": "layer", "layers": _names(own), "steps": plan.few}
        for name, own in layers.items()
    }


def independence(found: dict[str, Found], plan: Plan, folder: Path) -> str:
    """Whether exits that are tuned together have the weights of those that are tuned alone."""
    together, rows = found[_names(plan.layers)], []
    for layer in plan.some:
        if str(layer) not in found:
            continue
        alone = found[str(layer)]
        pairs = zip(
            _quality(exits_of(together)[layer]), _quality(exits_of(alone)[layer]), strict=True
        )
        cells = [cell for pair in pairs for cell in pair]
        rows.append([layer, *cells, *alone.get("apart", "––")])
    names = (
        f"`layer` exit, {plan.few} steps",
        "loss, tuned together",
        "alone",
        "agrees, together",
        "alone",
    )
    return table((*names, "equal bit for bit", "largest difference"), rows)


def compare(runs: Runs, plan: Plan) -> None:
    """Keep how far exits tuned together and alone are ``apart``, while their weights are there."""
    wanted = independence_wanted(plan)
    every = {name: run for name, settings in wanted.items() if (run := runs.get(settings))}
    together = every.pop(_names(plan.layers), None)
    for name, alone in every.items():
        folders = [Path(run["folder"]) for run in (together, alone) if run]
        if "apart" not in alone and len(folders) == 2 and all(map(Path.exists, folders)):
            runs.found[runs.key(wanted[name])]["apart"] = _apart(*folders)
            runs.write()


def _apart(together: Path, alone: Path) -> tuple[str, str]:
    """Whether the tensors of `alone` are those of `together`, and how far from them at most."""
    every, own = stored(together), stored(alone)
    same = all(torch.equal(every[name], tensor) for name, tensor in own.items())
    most = max(float((every[k].double() - v.double()).abs().max()) for k, v in own.items())
    return "yes" if same else "no", f"{most:g}"


def losses_wanted(plan: Plan) -> dict[str, Settings]:
    """Plain cross-entropy is the run of `depths`."""
    every = {"ce": {"arch": "mlp", "layers": _names(plan.layers)}}
    some = {"arch": "mlp", "layers": _names(plan.some)}
    return every | {name: some | settings for name, settings in LOSSES.items()}


def losses(found: dict[str, Found], plan: Plan, folder: Path) -> str:
    """What `mlp` exits are tuned on."""
    rows = []
    for layer in plan.some:
        for name, run in found.items():
            one = exits_of(run)[layer]
            rows.append([layer, name, *_quality(one), f"{one['confidence']:.3f}"])
    names = ("`mlp` exit", "tuned on", "loss", "agrees with full depth", "mean confidence")
    return table(names, rows)


def data_wanted(plan: Plan) -> dict[str, Settings]:
    """The fewest tokens first."""
    common = {"arch": "layer", "layers": str(plan.middle), "loss": "kl", "head": "shared"}
    return {
        f"{kind}, {tokens:,}": {**common, "data": files, "steps": max(1, tokens // plan.step)}
        for tokens in plan.amounts
        for kind, files in plan.kinds.items()
    }


def data(found: dict[str, Found], plan: Plan, folder: Path) -> str:
    """How much of which text a `layer` exit is tuned on."""
    rows, lines = [], {}
    tested = list(next(iter(found.values()))["exits"])
    for kind in plan.kinds:
        own = {name: run for name, run in found.items() if name.startswith(f"{kind}, ")}
        for run in own.values():
            cells = [cell for on in tested for cell in _quality(exits_of(run, on)[plan.middle])]
            rows.append([kind, f"{run['tokens']:,}", *cells])
        for on in tested:
            agreed = [exits_of(run, on)[plan.middle]["agreement"] for run in own.values()]
            lines[f"{kind}, seen on {on}"] = (
                [run["tokens"] for run in own.values()],
                agreed,
            )
    drawn(folder / "data.svg", "tokens", "agrees with full depth", lines, xscale="log")
    columns = [name for on in tested for name in (f"loss on {on}", f"agrees on {on}")]
    return table((f"exit at {plan.middle} tuned on", "tokens", *columns), rows)


EXPERIMENTS = {
    "depths": Experiment(depths_wanted, depths, speeds=True),
    "losses": Experiment(losses_wanted, losses),
    "data": Experiment(data_wanted, data),
    "starts": Experiment(starts_wanted, starts),
    "independence": Experiment(independence_wanted, independence),
}


def _names(layers: list[int]) -> str:
    return ",".join(map(str, layers))


def _quality(exit_row: Found) -> list[str]:
    return [f"{exit_row['loss']:.3f}", f"{exit_row['agreement']:.1%}"]


def arguments() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--model", default="demo/model")
    parser.add_argument("--data", nargs="*", default=["demo/data/train.jsonl"])
    parser.add_argument("--valid-data", nargs="*", default=["demo/data/validation.jsonl"])
    parser.add_argument(
        "--own", nargs="*", default=[], help="what the model wrote: all but `data` are tuned on it"
    )
    parser.add_argument("--own-valid", nargs="*", default=[])
    parser.add_argument("--layers", default="", help="default: at six depths")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--eps", type=float, default=1e-5, help="AdamW's")
    parser.add_argument("--amounts", type=float, nargs="*", default=[5e4, 2e5], help="tokens")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--minutes", type=float, default=1e6, help="no run begins after these")
    parser.add_argument(
        "--tables", action="store_true", help="make the tables of what is in --out; run nothing"
    )
    parser.add_argument("--no-speeds", action="store_true", help="leave speeds out")
    parser.add_argument("--out", default="benchmarks/results/experiments-demo")
    return parser


def made(args: argparse.Namespace) -> tuple[Runs, Plan]:
    """What the flags say."""
    main = (args.own, args.own_valid) if args.own else (args.data, args.valid_data)
    common = TuneConfig(
        model=args.model, data=main[0], valid_data=main[1], steps=args.steps,
        seq_length=args.seq_length, micro_batch_size=args.batch, global_batch_size=args.batch,
        lr=args.lr, min_lr=args.lr / 10, warmup=0.05, eps=args.eps, init="copy", eval_batches=8,
        eval_every=max(1, args.steps // 5), save_every=0, keep=1,
    )  # fmt: skip
    depth = shapes(New(args.model, replace(common, layers="1").exit_config())).backbone.num_layers
    every = sorted({max(1, round(depth * part / 7)) for part in range(1, 7)})
    layers = [int(one) for one in args.layers.split(",")] if args.layers else every
    held_out = {DOCUMENTS: args.valid_data}
    kinds = {DOCUMENTS: args.data}
    if args.own:
        held_out, kinds = {OWN: args.own_valid} | held_out, {OWN: args.own} | kinds
    few, step = min(FEW, args.steps), args.batch * args.seq_length
    plan = Plan(layers, kinds, [*map(int, args.amounts)], step, few)
    about = {
        "model": Path(args.model).name,
        "machine": f"{hardware(pick_device('auto'))}; {versions()}",
        "settings": {name: getattr(common, name) for name in SHOWN},
        "plan": asdict(plan),
    }
    end = time.monotonic() + 60 * args.minutes
    return Runs(Path(args.out), common, about, held_out, args.jobs, end), plan


def there(folder: Path) -> tuple[Runs, Plan]:
    """What was run in a folder before."""
    about = read_json(folder / "results.json")["about"]
    settings, plan = about["settings"], Plan(**about["plan"])
    data = next(iter(plan.kinds.values()))  # what `made` tunes on where nothing else is said
    common = TuneConfig(**settings, data=data, min_lr=settings["lr"] / 10)
    return Runs(folder, common, about, {}), plan


def main() -> None:
    """Run what is not there yet, and write the tables of all that is asked for."""
    args = arguments().parse_args()
    runs, plan = there(Path(args.out)) if args.tables else made(args)
    asked = {name: EXPERIMENTS[name].wanted(plan) for name in args.only}
    if not args.tables:
        named = {f"{name}: {own}": s for name, all in asked.items() for own, s in all.items()}
        runs.run(named)
        compare(runs, plan)
    tables = []
    for name, wanted in asked.items():
        experiment = EXPERIMENTS[name]
        if experiment.speeds and not args.no_speeds and not args.tables:
            runs.measure_speeds(wanted)
        found = {own: run for own, settings in wanted.items() if (run := runs.get(settings))}
        if found:
            tables.append(f"## {name}\n\n{experiment.table(found, plan, runs.folder)}\n")
    about = f"{runs.about['model']}; {runs.about['machine']}; {runs.about['settings']}"
    write_text(runs.folder / "tables.md", "\n".join([*tables, about]) + "\n")
    print("\n".join(tables))


FEW = 100  # steps
SHOWN = ("steps", "seq_length", "global_batch_size", "lr", "eps")

if __name__ == "__main__":
    with ends_in_a_line():
        main()
