"""Whether the same exits say the same, however they are run: in fp32, on the same prompts.

The loss of every exit on given texts, its agreement with the final exit, and its greedy texts after
them: in tuning's validation, in `evaluate`, in `generate`, in lm-evaluation-harness, as an exported
checkpoint in transformers, and from the server. Ends with status 1 if two of them differ.

python benchmarks/parity.py --exits demo/exits --data demo/data/validation.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

from ee_tuning import EarlyExitModel
from ee_tuning.cli import ends_in_a_line
from ee_tuning.commands.evaluate import evaluate
from ee_tuning.commands.export import export
from ee_tuning.config import EvaluateConfig, ExportConfig, TuneConfig
from ee_tuning.data import load_packed
from ee_tuning.devices import hardware, versions
from ee_tuning.evaluate.speed import take_prompts
from ee_tuning.files import write_json
from ee_tuning.tune import tune

# What is allowed for: sums in another order, and tokens that are likely all but equally.
LOSS, AGREEMENT, TEXTS = 1e-4, 1e-3, 0.01
ROWS = 20  # texts at a time


@dataclass
class Found:
    """What one way to run an exit says: nats per token, agreement with the final exit on the same
    tokens, and the greedy texts. None where it does not tell."""

    loss: float | None = None
    agreement: float | None = None
    texts: list[str] | None = None


@dataclass
class Prompts:
    """The texts, of one length: `ids` of each, and `file` with them as records.

    A text's tokens but the first, and the end of text behind it, are what losses are of.
    """

    tokenizer: Any
    ids: list[list[int]]
    file: str
    new: int

    @property
    def ended(self) -> list[list[int]]:
        """With the end of text."""
        return [[*ids, self.tokenizer.eos_token_id] for ids in self.ids]

    def text(self, tokens: Any) -> str:
        """Of new tokens, without what stands behind their end."""
        tokens = [int(token) for token in tokens]
        if self.tokenizer.eos_token_id in tokens:
            tokens = tokens[: tokens.index(self.tokenizer.eos_token_id)]
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def take(base: str, args: argparse.Namespace, folder: Path) -> Prompts:
    """Texts of the data that a tokenizer reads back as it wrote them."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    # Several places of a document are texts of their own: rows are no longer than a text.
    rows = load_packed(args.data, tokenizer, args.length, seed=0)
    found = take_prompts(rows, sys.maxsize, args.length)
    ids = [one for one in found if tokenizer.encode(tokenizer.decode(one)) == one][: args.prompts]
    if len(ids) < args.prompts:
        raise SystemExit(f"the data has {len(ids)} texts, wanted are {args.prompts}: give more")
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"text": tokenizer.decode(one)}) + "\n" for one in ids))
    return Prompts(tokenizer, ids, str(file), args.new_tokens)


def in_tuning(exits: str, prompts: Prompts, folder: Path) -> dict[int, Found]:
    """The validation before the first step."""
    tune(
        TuneConfig(
            exits=exits, data=[prompts.file], valid_data=[prompts.file], out=str(folder / "tuned"),
            steps=1, seq_length=len(prompts.ended[0]), micro_batch_size=ROWS,
            global_batch_size=ROWS, eval_batches=len(prompts.ids), eval_every=0, save_every=0,
            precision="fp32",
        )
    )  # fmt: skip
    lines = (folder / "tuned/metrics.jsonl").read_text().splitlines()
    first = next(one for one in map(json.loads, lines) if "valid_loss" in one)
    assert first["step"] == 0
    return {int(layer): Found(loss) for layer, loss in first["valid_loss"].items()}


def in_evaluate(exits: str, prompts: Prompts, folder: Path) -> dict[int, Found]:
    """The table of exits."""
    length = len(prompts.ended[0])
    result = evaluate(
        EvaluateConfig(
            exits=exits, data=[prompts.file], seq_length=length, micro_batch_size=ROWS,
            max_tokens=length * len(prompts.ids), out=str(folder / "evaluated"), thresholds="1",
            prompts=1, prompt_length=4, max_new_tokens=2, rounds=1, precision="fp32",
        ),
        Console(file=StringIO()),
    )  # fmt: skip
    assert result["data_tokens"] == len(prompts.ids) * (length - 1)
    rows = [row for row in result["exit_rows"] if not row["final"]]
    return {row["layer"]: Found(row["loss"], row["agreement"]) for row in rows}


class Says(LogitsProcessor):
    """Lets nothing be said but a given text, and keeps what would have been: the likeliest tokens,
    and the log-probabilities of those given."""

    def __init__(self, ids: list[int]) -> None:
        self.ids, self.likeliest, self.given = ids, [], []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.ids[input_ids.shape[1]]
        self.likeliest.append(scores[0].argmax().item())
        self.given.append(scores[0].float().log_softmax(-1)[token].item())
        return torch.full_like(scores, -torch.inf).index_fill(
            1, torch.tensor([token], device=scores.device), 0.0
        )


def in_generate(exits: str, prompts: Prompts, folder: Path) -> dict[int, Found]:
    """Decoding token by token: of the given texts, as a processor sees it, and of what follows."""
    model = EarlyExitModel.from_pretrained(exits, dtype=torch.float32)

    def said(**mode: Any) -> tuple[list[int], list[float]]:
        says = [Says(ids) for ids in prompts.ended]
        given = [{"input_ids": one.ids[:1], "logits_processor": [one]} for one in says]
        more = {"max_new_tokens": len(prompts.ids[0]), "do_sample": False}
        for _ in model.generate_batch(given, slots=ROWS, **mode, **more):
            pass
        return [t for one in says for t in one.likeliest], [p for one in says for p in one.given]

    final, _ = said(mode="full")
    found = {}
    for layer in model.exit_layers:
        mode = {"mode": "fixed", "exit_layers": [layer]}
        likeliest, given = said(**mode)
        texts = [""] * len(prompts.ids)
        more = {"max_new_tokens": prompts.new, "do_sample": False}
        for i, out in model.generate_batch(prompts.ids, slots=ROWS, **mode, **more):
            texts[i] = prompts.text(out.sequences[0, len(prompts.ids[i]) :])
        found[layer] = Found(-sum(given) / len(given), share(likeliest, final), texts)
    return found


def in_lm_eval(exits: str, prompts: Prompts, folder: Path) -> dict[int, Found]:
    """The model that lm-eval asks, for log-likelihoods and texts."""
    from lm_eval.api.instance import Instance

    from ee_tuning.lm_eval.model import EarlyExitLM

    more = {"until": [], "max_gen_toks": prompts.new}
    asked = [
        Instance("generate_until", {}, (prompts.tokenizer.decode(ids), dict(more)), i, ("", i, 1))
        for i, ids in enumerate(prompts.ids)
    ]
    given = [(None, ids[:1], ids[1:]) for ids in prompts.ended]
    found = {}
    for layer in EarlyExitModel.from_pretrained(exits).exit_layers:
        model = EarlyExitLM(
            exits=exits, scoring="decode", mode="fixed", exit_layers=layer, batch_size=ROWS,
            precision="fp32",
        )  # fmt: skip
        total = sum(one for one, _ in model._loglikelihood_tokens(given, disable_tqdm=True))
        texts = model.generate_until(asked, disable_tqdm=True)
        found[layer] = Found(-total / len(given) / len(prompts.ids[0]), None, texts)
    return found


@torch.inference_mode()
def in_transformers(exits: str, prompts: Prompts, folder: Path) -> dict[int, Found]:
    """Exported checkpoints, which know nothing of exits."""
    model = EarlyExitModel.from_pretrained(exits)
    ids, ended = torch.tensor(prompts.ids), torch.tensor(prompts.ended)

    def load(path: str) -> tuple[Any, Tensor]:
        loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        parts = [loaded(part[:, :-1]).logits.log_softmax(-1) for part in ended.split(ROWS)]
        return loaded, torch.cat(parts)

    final = load(model.backbone.model.name_or_path)[1].argmax(-1)
    found = {}
    for layer in model.exit_layers:
        out = str(folder / f"exported-{layer}")
        export(ExportConfig(exits=exits, layer=layer, out=out))
        exported, said = load(out)
        loss = -said.gather(-1, ended[:, 1:, None]).mean().item()
        more = {"max_new_tokens": prompts.new, "do_sample": False}
        new = [
            exported.generate(part, attention_mask=torch.ones_like(part), **more)[:, ids.shape[1] :]
            for part in ids.split(ROWS)
        ]
        texts = [prompts.text(row) for part in new for row in part.tolist()]
        found[layer] = Found(loss, (said.argmax(-1) == final).double().mean().item(), texts)
    return found


def in_the_server(exits: str, prompts: Prompts, folder: Path) -> dict[int, Found]:
    """What a client is told: log-probabilities of an echoed prompt, and texts."""
    layers = EarlyExitModel.from_pretrained(exits).exit_layers
    with server(exits) as ask:

        def said(texts: list[list[int]], **body: Any) -> list[dict[str, Any]]:
            parts = [texts[i : i + ROWS] for i in range(0, len(texts), ROWS)]
            return [one for part in parts for one in ask({"prompt": part, **body})["choices"]]

        def scores(**mode: Any) -> tuple[list[str], list[float]]:
            body = {"echo": True, "max_tokens": 0, "logprobs": 1} | mode
            told = [one["logprobs"] for one in said(prompts.ended, **body)]
            tops = [max(top, key=top.get) for one in told for top in one["top_logprobs"][1:]]
            return tops, [p for one in told for p in one["token_logprobs"][1:]]

        final, _ = scores(mode="full")
        found = {}
        for layer in layers:
            mode = {"mode": "fixed", "exit_layers": [layer]}
            likeliest, given = scores(**mode)
            written = said(prompts.ids, max_tokens=prompts.new, temperature=0, **mode)
            texts = [one["text"] for one in written]
            found[layer] = Found(-sum(given) / len(given), share(likeliest, final), texts)
    return found


@contextmanager
def server(exits: str) -> Iterator[Callable[[dict[str, Any]], Any]]:
    """Inside, `ee-tuning serve` answers completions."""
    flags = "--port", "0", "--precision", "fp32", "--slots", str(ROWS), "--exits", exits
    process = subprocess.Popen(
        [sys.executable, "-m", "ee_tuning", "serve", *flags],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        while line and "http://" not in line:
            line = process.stderr.readline()
        if not line:
            raise SystemExit("the server did not start")
        url = line.split(": ")[-1].strip()
        while not is_ready(url):
            time.sleep(0.1)

        def ask(body: dict[str, Any]) -> Any:
            data, headers = json.dumps(body).encode(), {"content-type": "application/json"}
            request = Request(f"{url}/v1/completions", data, headers)
            with urlopen(request, timeout=600) as reply:
                return json.load(reply)

        yield ask
    finally:
        process.terminate()
        process.wait()


def is_ready(url: str) -> bool:
    """Whether a server answers, and is warm."""
    try:
        with urlopen(f"{url}/health", timeout=10) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def share(some: list[Any], others: list[Any]) -> float:
    """How many are the same, from 0 to 1."""
    return sum(a == b for a, b in zip(some, others, strict=True)) / len(some)


def differences(found: dict[str, dict[int, Found]]) -> list[str]:
    """Where a way says something else than `evaluate`, or writes other texts than `generate`."""
    problems = []
    for way, by_layer in found.items():
        for layer, one in by_layer.items():
            loss, agreement = found["evaluate"][layer].loss, found["evaluate"][layer].agreement
            texts = found["generate"][layer].texts
            assert loss is not None
            assert agreement is not None
            assert texts is not None
            if one.loss is not None and not abs(one.loss - loss) <= LOSS:
                problems.append(f"{way}, exit {layer}: loss {one.loss}, not {loss}")
            if one.agreement is not None and not abs(one.agreement - agreement) <= AGREEMENT:
                problems.append(f"{way}, exit {layer}: agreement {one.agreement}, not {agreement}")
            if one.texts is not None and share(one.texts, texts) < 1 - TEXTS:
                problems.append(f"{way}, exit {layer}: {share(one.texts, texts):.1%} of the texts")
    return problems


WAYS = {
    "tuning's validation": in_tuning,
    "evaluate": in_evaluate,
    "generate": in_generate,
    "lm-eval": in_lm_eval,
    "exported, in transformers": in_transformers,
    "server": in_the_server,
}


def rows(found: dict[str, dict[int, Found]]) -> list[list[str]]:
    """For people: a row per exit and way."""
    shown = []
    for layer in found["evaluate"]:
        for way, by_layer in found.items():
            one, texts = by_layer[layer], found["generate"][layer].texts
            same = "–"
            if one.texts is not None:
                number = sum(a == b for a, b in zip(one.texts, texts or [], strict=True))
                same = f"{number} of {len(one.texts)}"
            numbers = [
                "–" if value is None else f"{value:.{digits}f}"
                for value, digits in ((one.loss, 5), (one.agreement, 4))
            ]
            shown.append([str(layer), way, *numbers, same])
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--exits", required=True)
    parser.add_argument("--data", required=True, nargs="+")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--length", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--out", help="file for what was found")
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as folder:
        # An exported checkpoint has one dtype, that of the backbone's files: exits in another are
        # rounded to it, for all ways alike.
        model, exits = EarlyExitModel.from_pretrained(args.exits), f"{folder}/exits"
        model.save_pretrained(exits)
        prompts = take(model.backbone.model.name_or_path, args, Path(folder))
        found, seconds = {}, {}
        for name, way in WAYS.items():
            start = time.perf_counter()
            found[name] = way(exits, prompts, Path(folder))
            seconds[name] = time.perf_counter() - start
    head = ["exit", "way", "loss", "agreement with the final exit", "texts as `generate`'s"]
    for line in [head, ["---"] * len(head), *rows(found)]:
        print(f"| {' | '.join(line)} |")
    problems = differences(found)
    result = {
        "machine": f"{hardware(torch.device('cpu'))}; {versions()}",
        "settings": vars(args),
        "found": {
            name: {layer: asdict(one) for layer, one in ways.items()}
            for name, ways in found.items()
        },
        "seconds": seconds,
        "problems": problems,
    }
    if args.out:
        write_json(Path(args.out), result)
    if problems:
        raise SystemExit("\n".join(problems))
    print("parity: all ways say the same")


if __name__ == "__main__":
    with ends_in_a_line():  # status 1 says that two ways differ, a mistake has another one
        main()
