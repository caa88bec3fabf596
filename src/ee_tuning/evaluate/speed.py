"""Per threshold: generated text, where its tokens left, and how fast it came."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ee_tuning.config import EvaluateConfig
from ee_tuning.decode import GenerateOutput
from ee_tuning.errors import UserError
from ee_tuning.model import EarlyExitModel

Method = Callable[[Tensor], Any]


def take_prompts(packed: Any, number: int, length: int) -> list[list[int]]:
    """The first `length` tokens of up to `number` documents, one per packed row.

    Raises:
        UserError: no document is that long.
    """
    prompts = []
    for row in range(len(packed)):
        ids, positions = packed[row]["input_ids"], packed[row]["position_ids"]
        starts = (positions[: len(positions) - length + 1] == 0).nonzero().flatten().tolist()
        whole = [s for s in starts if positions[s + length - 1] == length - 1]
        prompts += [ids[s : s + length].tolist() for s in whole[:1]]
        if len(prompts) == number:
            break
    if not prompts:
        raise UserError(f"no document of the data has {length} tokens: lower --prompt-length")
    return prompts


def measure_thresholds(
    model: EarlyExitModel, prompts: list[list[int]], thresholds: list[float], config: EvaluateConfig
) -> dict[str, Any]:
    """Generate from every prompt with every method, round by round.

    In a round each method runs all prompts once, so that a machine that slows down slows all
    alike; speed-ups are ratios within a round. Returns ``threshold_rows``, the speed of
    transformers' own ``generate``, and ``samples`` to show.
    """
    inputs = [torch.tensor([ids], device=model.backbone.device) for ids in prompts]
    methods = _methods(model, thresholds, config)
    for method in methods.values():
        method(inputs[0])
    seconds: dict[Any, list[float]] = {name: [] for name in methods}
    outputs: dict[Any, list[Any]] = {}
    for _ in range(config.rounds):
        for name, method in methods.items():
            start = time.perf_counter()
            outputs[name] = [method(ids) for ids in inputs]
            if model.backbone.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    total = len(inputs) * config.max_new_tokens
    speeds = {name: _speed(times, total) for name, times in seconds.items()}
    speedups = {name: _speedup(seconds["full"], times) for name, times in seconds.items()}
    rows = [
        _row(model, outputs, threshold)
        | {"speed": speeds[threshold], "speedup": speedups[threshold]}
        for threshold in thresholds
    ]
    return {
        "threshold_rows": rows,
        "transformers": {"speed": speeds["transformers"], "speedup": speedups["transformers"]},
        "full": {"speed": speeds["full"], "speedup": 1.0},
        "tokens_per_prompt": config.max_new_tokens,
        "prompts": len(prompts),
        "samples": _samples(outputs, prompts, thresholds),
    }


def _methods(
    model: EarlyExitModel, thresholds: list[float], config: EvaluateConfig
) -> dict[Any, Method]:
    """What is timed, by name or threshold. No text ends early, so all do the same work."""
    length = {
        "max_new_tokens": config.max_new_tokens, "min_new_tokens": config.max_new_tokens,
        "do_sample": False,
    }  # fmt: skip
    common = {
        "exit_layers": config.exit_layers or None,
        "max_pending": config.max_pending,
        **length,
    }

    def at(threshold: float) -> Method:
        return lambda ids: model.generate(ids, mode="threshold", threshold=threshold, **common)

    return {
        "transformers": lambda ids: model.backbone.model.generate(ids, **length),
        "full": lambda ids: model.generate(ids, mode="full", **common),
        **{threshold: at(threshold) for threshold in thresholds},
    }


def _row(model: EarlyExitModel, outputs: dict[Any, list[Any]], threshold: float) -> dict[str, Any]:
    """Where tokens left, and how much of the text is that of full decoding."""
    out: list[GenerateOutput] = outputs[threshold]
    layers = torch.cat([o.exit_layers[0] for o in out])  # type: ignore[index]
    same = [_new(o) == _new(full) for o, full in zip(out, outputs["full"], strict=True)]
    places = [*model.exit_layers, model.backbone.num_layers]
    return {
        "threshold": threshold,
        "shares": {layer: (layers == layer).double().mean().item() for layer in places},
        "mean_depth": layers.double().mean().item(),
        "text_agreement": torch.cat(same).double().mean().item(),
        "identical_texts": sum(bool(s.all()) for s in same),
    }


def _new(output: GenerateOutput) -> Tensor:
    """The new tokens (N,) of an output."""
    assert output.sequences is not None
    assert output.exit_layers is not None
    return output.sequences[0, -output.exit_layers.shape[1] :].cpu()


def _speed(seconds: list[float], tokens: int) -> dict[str, float]:
    """Tokens per second over the rounds, prompt included."""
    values = [tokens / s for s in seconds]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _speedup(full: list[float], seconds: list[float]) -> float:
    """Median over the rounds of how many times faster than full depth."""
    return statistics.median(a / b for a, b in zip(full, seconds, strict=True))


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
