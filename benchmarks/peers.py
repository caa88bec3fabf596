"""The neighbours that `real.py` measures beside us: transformers' own ways, economize's drafters.

python benchmarks/peers.py --kind eagle3 --data own.jsonl --minutes 4 --out build/eagle3

tunes a drafter of economize (PyPI, 0.3.2) on the data that our exits are tuned on, for so many
minutes, with its own objective and its own defaults. `jump` is the drafter that its authors report
as their best, at this model's depth: from the state after layer 17 of 24 it predicts the next one
after layer 16, and runs a trained copy of layer 17. `eagle3` drafts from the most frequent tokens
of the data.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from ways import Answer, Settings, Way

from ee_tuning.cli import ends_in_a_line
from ee_tuning.data import load_packed
from ee_tuning.devices import hardware, pick_device, pick_dtype, versions
from ee_tuning.files import write_json
from ee_tuning.loading import load_backbone, load_tokenizer

COST = "cost.json"  # beside a tuned drafter: tokens, steps, seconds


def load_model(path: str, device: torch.device) -> Any:
    """The backbone once more, that nobody else compiles or hooks."""
    return load_backbone(path, dtype=pick_dtype("auto", device)).to(device).eval()


def transformers_ways(model: Any, settings: Settings) -> dict[str, Way]:
    """transformers' `generate`: as it is, compiled with a static cache, with its two drafts."""
    depth = model.config.num_hidden_layers
    run = partial(_generate, model, settings)
    return {
        "transformers, static cache, compiled": partial(run, cache_implementation="static"),
        "transformers, prompt lookup": partial(run, drafts=True, prompt_lookup_num_tokens=4),
        "transformers": run,
        f"transformers, assistant_early_exit {depth // 3}": partial(
            run, drafts=True, assistant_early_exit=depth // 3
        ),
    }


def _generate(
    model: Any, settings: Settings, ids: Tensor, mask: Tensor, drafts: bool = False, **more: Any
) -> Answer:
    """drafts: count what each pass verifies, at the last layer, which drafting leaves alone."""
    with _lengths(model.model.layers[-1] if drafts else None) as passes:
        given = settings.arguments() | {"pad_token_id": min(settings.ends), **more}
        out = model.generate(ids, attention_mask=mask, **given)
    texts = [settings.cut(row) for row in out[:, ids.shape[1] :].tolist()]
    answer = Answer(texts, len(passes) or sum(map(len, texts)))
    if drafts:
        answer.drafted = sum(passes) - ids.shape[1] - (len(passes) - 1)
    return answer


@contextmanager
def _lengths(layer: torch.nn.Module | None) -> Iterator[list[int]]:
    """How many tokens each call of a layer has meanwhile."""
    found: list[int] = []
    if layer is None:
        yield found
        return
    hook = layer.register_forward_pre_hook(lambda _, args: found.append(args[0].shape[1]))
    try:
        yield found
    finally:
        hook.remove()


@dataclass
class Economize:
    """One of economize's ways: `cycle` tokens a cycle at most, 1 for no drafts.

    sure: drafting stops below this probability.
    """

    model: Any
    settings: Settings
    cycle: int
    sure: float | None = None

    def __call__(self, ids: Tensor, mask: Tensor) -> Answer:
        """Decode all rows together."""
        import economize

        greedy = not self.settings.temperature
        decoding = economize.DecodeConfig(
            cycle_length=self.cycle,
            min_confidence=self.sure if self.cycle > 1 else None,
            verifier=None if greedy or self.cycle == 1 else "rejection",
            cuda_graphs=ids.is_cuda,
        )
        sampler = None
        if not greedy:
            sampler = economize.TopPSampler(
                temperature=self.settings.temperature, device=ids.device
            )
        prompts = [row[kept.bool()] for row, kept in zip(ids, mask, strict=True)]
        results = self.model.decode_batch(
            prompts,
            self.settings.new_tokens,
            decoding=decoding,
            selector=sampler,
            stop=list(self.settings.ends),
        )
        texts = [self.settings.cut(result.tokens.tolist()) for result in results]
        drafted = sum(tried for result in results for tried, _ in result.acceptance)
        passes = [result.cost_summary()["exact_calls"] for result in results]
        return Answer(texts, sum(passes), drafted)


def economize_models(path: str, folders: list[str], device: torch.device) -> dict[str, Any]:
    """A model with the drafter of each folder, by its kind."""
    if not folders:
        return {}
    import economize

    return {
        json.loads((Path(folder) / COST).read_text())["kind"]: economize.load(
            load_model(path, device), str(Path(folder) / "final")
        )
        for folder in folders
    }


def economize_ways(models: dict[str, Any], settings: Settings) -> dict[str, Way]:
    """Its plain decoding, and each drafter with two lengths of drafts."""
    found: dict[str, Way] = {}
    for kind, model in models.items():
        found.setdefault("economize, plain", Economize(model, settings, 1))
        for cycle, sure in ((4, None), (6, 0.5)):
            name = f"economize, {kind}, up to {cycle - 1}" + (f", above {sure:g}" if sure else "")
            found[name] = Economize(model, settings, cycle, sure)
    return found


def costs(folders: list[str]) -> dict[str, Any]:
    """What tuning each drafter took."""
    return {Path(name).name: json.loads((Path(name) / COST).read_text()) for name in folders}


def drafter(kind: str, base: Any, counts: Tensor, vocab: int) -> Any:
    """A new drafter on a model; counts: how often each token is in the data (V,)."""
    import economize
    from economize.techniques.eagle3 import Eagle3Config

    if kind == "jump":
        depth = base.config.num_hidden_layers
        target = round(depth * 16 / 24)
        config = economize.JumpConfig(
            target_layer=target,
            source_layer=target + 1,
            exit_layer=target + 1,
            predictor="linear",
            adaptation="full",
        )
        return economize.apply(base, config)
    model = economize.apply(base, Eagle3Config(draft_vocab=vocab))
    model.techniques["eagle3"].set_draft_vocab(counts.topk(vocab).indices)
    return model


def tune(args: argparse.Namespace) -> None:
    """Tune a drafter for `args.minutes`; a few steps before tell how many these can have."""
    from economize.train import Batch, TensorSource, fit

    device = pick_device(args.device)
    base = load_model(args.model, device)
    rows = load_packed(args.data, load_tokenizer(args.model), args.seq_length, 0)
    number = rows.count(args.rows)
    picked = rows[range(number)]
    ids, labels = picked["input_ids"], picked["labels"]
    # A place counts where the token that follows it is one to learn.
    learned = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1)).long()
    counts = torch.bincount(ids.flatten(), minlength=base.config.vocab_size)
    vocab = min(args.draft_vocab, base.config.vocab_size)
    model = drafter(args.kind, base, counts, vocab)
    data = Batch(ids, None, learned)
    autocast = "bfloat16" if device.type == "cuda" else None
    given: dict[str, Any] = {"autocast": autocast, "seed": 0}

    def run(steps: int, **more: Any) -> float:
        start = time.perf_counter()
        fit(model, TensorSource(data, args.batch), steps=steps, log_every=100, **given, **more)
        return time.perf_counter() - start

    start = {name: value.clone() for name, value in model.techniques.state_dict().items()}
    run(2)
    each = run(args.probe) / args.probe
    model.techniques.load_state_dict(start)
    steps = max(args.probe, int(args.minutes * 60 / each))
    seconds = run(steps, output_dir=args.out)
    cost = {
        "kind": args.kind,
        "data": args.data,
        "tokens_of_data": ids.numel(),
        "tokens": steps * args.batch * args.seq_length,
        "steps": steps,
        "seconds": round(seconds, 1),
        "parameters": sum(p.numel() for p in model.technique_parameters()),
        "hardware": hardware(device),
        "versions": versions(),
    }
    write_json(args.out / COST, cost)
    print(json.dumps(cost))


def main() -> None:
    """Tune one drafter."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=["jump", "eagle3"], required=True)
    parser.add_argument("--model", default="demo/smollm2")
    parser.add_argument("--data", nargs="+", required=True, help="as of ee-tuning tune")
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--rows", type=int, default=50_000, help="of --seq-length that are read")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16, help="rows of a step")
    parser.add_argument("--draft-vocab", type=int, default=16_384)
    parser.add_argument("--probe", type=int, default=8, help="steps that are timed first")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    tune(parser.parse_args())


if __name__ == "__main__":
    with ends_in_a_line():
        main()
