"""Per threshold: generated text, where its tokens left, and how fast it came."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ee_tuning.config import EvaluateConfig
from ee_tuning.decode import GenerateOutput, generate
from ee_tuning.devices import wait_for
from ee_tuning.errors import UserError
from ee_tuning.evaluate.exits import Track, active_exits
from ee_tuning.evaluate.intervals import bootstrap
from ee_tuning.exit_config import DRAFT
from ee_tuning.losses import IGNORED
from ee_tuning.model import Network
from ee_tuning.parallel.data import collect, deal
from ee_tuning.parallel.mesh import ALONE, Mesh

Method = Callable[[Tensor], Any]


def take_prompts(
    packed: Iterable[dict[str, Tensor]],
    number: int,
    length: int,
    advice: str = "lower --prompt-length",
) -> list[list[int]]:
    """The first `length` tokens of up to `number` pieces of text, one per packed row.

    Raises:
        UserError: no piece is that long; with the `advice`.
    """
    prompts: list[list[int]] = []
    for row in packed:
        ids = row["input_ids"]
        long = [start for start, stop in _pieces(row) if stop - start >= length]
        prompts += [ids[start : start + length].tolist() for start in long[:1]]
        if len(prompts) == number:
            break
    if not prompts:
        raise UserError(f"no document of the data has {length} tokens: {advice}")
    return prompts


def _pieces(row: dict[str, Tensor]) -> list[tuple[int, int]]:
    """(start, stop) of the documents, or parts of them, in a packed row.

    Positions start again with each. One without any label is padding, or nothing to learn from.
    """
    starts = (row["position_ids"] == 0).nonzero().flatten().tolist()
    pieces = zip(starts, [*starts[1:], len(row["position_ids"])], strict=True)
    return [(a, b) for a, b in pieces if bool((row["labels"][a:b] != IGNORED).any())]


def measure_thresholds(
    model: Network,
    prompts: list[list[int]],
    thresholds: list[float],
    config: EvaluateConfig,
    mesh: Mesh = ALONE,
    track: Track = iter,
) -> dict[str, Any]:
    """Generate from every prompt with every method, round by round.

    In a round each method runs all prompts once, so that a machine that slows down slows all
    alike; speed-ups are ratios within a round. mesh: the ranks that share the prompts; one goes on
    with a prompt by itself, so speeds are those of one process. track: told what is gone through.
    Returns ``threshold_rows``, the
    speed with drafts from the text alone, ``lookup``, and of transformers' own ``generate``, and
    ``samples`` to show.
    """
    inputs = [torch.tensor([ids], device=model.backbone.device) for ids in prompts]
    methods = _methods(model, thresholds, config)
    jobs = track([(number, name) for number in range(config.rounds + 1) for name in methods])
    outputs, taken = _in_rounds(methods, deal(inputs, mesh), jobs, mesh)
    seconds = {name: [sum(own) for own in rounds] for name, rounds in taken.items()}
    total = len(inputs) * config.max_new_tokens
    speeds = {name: speed(times, total) for name, times in seconds.items()}
    speedups = {name: _speedup(seconds["full"], times) for name, times in seconds.items()}
    theirs = seconds["transformers"]
    each = {name: _middles(rounds) for name, rounds in taken.items()}

    def drafted(name: Any) -> dict[str, Any] | None:
        if name not in methods:
            return None
        texts = _identical_texts(outputs[name], outputs["full"])
        return {
            "speed": speeds[name],
            "speedup": speedups[name],
            "speedup_interval": bootstrap(each["full"], each[name]),
            "identical_texts": texts,
        }

    rows = [
        _row(model, outputs, threshold)
        | {
            "speed": speeds[threshold],
            "speedup": speedups[threshold],
            "speedup_interval": bootstrap(each["full"], each[threshold]),
            "speedup_over_transformers": _speedup(theirs, seconds[threshold]),
            "speculative": drafted(("speculative", threshold)),
        }
        for threshold in thresholds
    ]
    return {
        "threshold_rows": rows,
        "lookup": drafted("lookup"),
        "transformers": {"speed": speeds["transformers"], "speedup": speedups["transformers"]},
        "full": {"speed": speeds["full"], "speedup": 1.0},
        "tokens_per_prompt": config.max_new_tokens,
        "prompts": len(prompts),
        "samples": _samples(outputs, prompts, thresholds),
    }


def _in_rounds(
    methods: dict[Any, Method], inputs: list[Tensor], jobs: Iterable[tuple[int, Any]], mesh: Mesh
) -> tuple[dict[Any, list[Any]], dict[Any, list[list[float]]]]:
    """By method, the outputs for all ranks' prompts, and seconds, by round and prompt.

    jobs: numbers of rounds and names of methods; round 0 is before the clock starts. Where passes
    are compiled, all sizes that come are so in it.
    """
    first = inputs if inputs[0].is_cuda else inputs[:1]
    outputs: dict[Any, list[Any]] = {}
    taken: dict[Any, list[list[float]]] = {name: [] for name in methods}
    for number, name in jobs:
        found, own = _timed(methods[name], inputs if number else first)
        if number:
            outputs[name] = found
            taken[name].append(collect(own, mesh))
    del outputs["transformers"]  # which is timed alone
    return {name: collect(map(_on_host, own), mesh) for name, own in outputs.items()}, taken


def _on_host(output: GenerateOutput) -> GenerateOutput:
    """Where other processes can take it from."""
    return GenerateOutput(**{name: values.cpu() for name, values in output.items()})


def _timed(method: Method, inputs: list[Tensor]) -> tuple[list[Any], list[float]]:
    """The outputs for all prompts and the seconds that each took."""
    outputs, seconds = [], []
    for ids in inputs:
        wait_for(ids.device)
        start = time.perf_counter()
        outputs.append(method(ids))
        wait_for(ids.device)
        seconds.append(time.perf_counter() - start)
    return outputs, seconds


def _middles(rounds: list[list[float]]) -> list[float]:
    """Of each prompt, the median over the rounds."""
    return [statistics.median(own) for own in zip(*rounds, strict=True)]


def _methods(model: Network, thresholds: list[float], config: EvaluateConfig) -> dict[Any, Method]:
    """What is timed, by name or threshold. No text ends early, so all do the same work."""
    length: dict[str, Any] = {
        "max_new_tokens": config.max_new_tokens, "min_new_tokens": config.max_new_tokens,
        "do_sample": False,
    }  # fmt: skip
    drafting = active_exits(model, config)

    def ours(mode: str, threshold: float = 1.0, **more: Any) -> Method:
        way: dict[str, Any] = {
            "mode": mode,
            "threshold": threshold,
            "compile": config.compiled(),
        } | more
        return lambda ids: generate(model, ids, leaving=config.leaving(), **way, **length)

    return {
        **{
            ("speculative", t): ours("speculative", t, exit_layers=drafting)
            for t in thresholds
            if drafting and t < 1
        },
        "transformers": lambda ids: model.backbone.model.generate(ids, **length),
        "full": ours("full"),
        "lookup": ours("speculative", lookup=True, exit_layers=drafting or ""),
        **{threshold: ours("threshold", threshold) for threshold in thresholds},
    }


def _row(model: Network, outputs: dict[Any, list[Any]], threshold: float) -> dict[str, Any]:
    """Where tokens left, and how much of the text is that of full decoding."""
    out: list[GenerateOutput] = outputs[threshold]
    layers = torch.cat([o.exit_layers[0] for o in out])  # type: ignore[index]
    same = [_new(o) == _new(full) for o, full in zip(out, outputs["full"], strict=True)]
    places = [*(k for k in model.exit_layers if k != DRAFT), model.backbone.num_layers]
    return {
        "threshold": threshold,
        "shares": {layer: (layers == layer).double().mean().item() for layer in places},
        "mean_depth": layers.double().mean().item(),
        "text_agreement": torch.cat(same).double().mean().item(),
        "text_interval": bootstrap([one.sum().item() for one in same], [len(one) for one in same]),
        "identical_texts": _identical_texts(out, outputs["full"]),
    }


def _identical_texts(outputs: list[GenerateOutput], full: list[GenerateOutput]) -> int:
    """How many of `outputs` have the new tokens of `full`."""
    pairs = zip(outputs, full, strict=True)
    return sum(torch.equal(_new(output), _new(other)) for output, other in pairs)


def _new(output: GenerateOutput) -> Tensor:
    """The new tokens (N,) of an output."""
    assert output.sequences is not None
    assert output.exit_layers is not None
    return output.sequences[0, -output.exit_layers.shape[1] :].cpu()


def speed(seconds: list[float], tokens: int) -> dict[str, float]:
    """Tokens per second over the rounds, prompt included."""
    values = [tokens / s for s in seconds]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _speedup(reference: list[float], seconds: list[float]) -> float:
    """Median over the rounds of how many times faster than `reference` in the same round."""
    return statistics.median(a / b for a, b in zip(reference, seconds, strict=True))


def _samples(
    outputs: dict[Any, list[Any]], prompts: list[list[int]], thresholds: list[float]
) -> dict[str, Any]:
    """Two prompts with their texts at the threshold nearest 0.8, and at full depth."""
    inner = [t for t in thresholds if t < 1]
    if not inner:
        return {"threshold": None, "texts": []}
    threshold = min(inner, key=lambda t: abs(t - 0.8))
    texts = [
        {
            "prompt": prompts[i],
            "tokens": _new(outputs[threshold][i]).tolist(),
            "layers": outputs[threshold][i].exit_layers[0].tolist(),
            "confidences": outputs[threshold][i].confidences[0].tolist(),
            "full": _new(outputs["full"][i]).tolist(),
        }
        for i in range(min(2, len(prompts)))
    ]
    return {"threshold": threshold, "texts": texts}
