"""The risk of a task: what a metric loses per sample, from lm-eval's sample files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ee_tuning.calibrate.risks import Measured, Thresholds
from ee_tuning.errors import UserError
from ee_tuning.exit_config import parse_threshold

FULL = 1.0  # the threshold of full depth's file


class Task:
    """Per sample, how much lower a metric is than at full depth, 0 where it is not.

    Gains do not make up for losses, so this is at least what the mean loses.
    """

    def __init__(self, scores: Sequence[tuple[Thresholds, np.ndarray]], full: np.ndarray) -> None:
        """scores: (N,), by thresholds. full: those of full depth."""
        self.scores, self.full = {_key(one): values for one, values in scores}, full

    def measure(self, thresholds: Thresholds, prompts: np.ndarray) -> Measured:
        """See `Risk`; at which layers tokens left is not known."""
        scores = self.scores[_key(thresholds)][prompts]
        return Measured(np.maximum(0.0, self.full[prompts] - scores), float("nan"))


def _key(thresholds: Thresholds) -> tuple[tuple[int, float], ...]:
    return tuple(sorted(thresholds.items()))


def read_task(
    samples: Sequence[str], metric: str, layers: Sequence[int]
) -> tuple[Task, list[Thresholds], list[str]]:
    """The task, its candidates in the order given, and what its samples are.

    samples: ``THRESHOLD=FILE``, one of them of threshold 1. layers: of the active exits.

    Raises:
        UserError: a file that is missing, has no scores per sample or other samples than the rest,
            or thresholds that are not understood.
    """
    parsed = [_parsed(one) for one in samples]
    fulls = [path for threshold, path in parsed if threshold == FULL]
    if len(fulls) != 1 or len(parsed) < 2:
        raise UserError(
            "a task needs the samples of full depth and of at least one threshold: give "
            "--samples 1=full.jsonl 0.9=careful.jsonl …"
        )
    found = {path: read_scores(path, metric) for _, path in parsed}
    names = sorted(found[fulls[0]])
    for path, scores in found.items():
        if sorted(scores) != names:
            raise UserError(
                f"{path} has other samples than {fulls[0]}: evaluate the same ones each time"
            )
    table = {path: np.array([scores[name] for name in names]) for path, scores in found.items()}
    rest = [(_by_layer(one, layers), table[path]) for one, path in parsed if one != FULL]
    return Task(rest, table[fulls[0]]), [one for one, _ in rest], names


def _parsed(text: str) -> tuple[Any, str]:
    threshold, separator, path = text.partition("=")
    if not separator or not path:
        raise UserError(f"samples {text!r} are not understood: give THRESHOLD=FILE")
    return parse_threshold(threshold), path


def _by_layer(threshold: float | dict[int, float], layers: Sequence[int]) -> Thresholds:
    values = threshold if isinstance(threshold, dict) else dict.fromkeys(layers, threshold)
    if {*values} != {*layers} or not all(0 <= value <= 1 for value in values.values()):
        raise UserError(
            f"threshold {threshold} is not one within [0, 1] for each active exit, {list(layers)}"
        )
    return {layer: float(values[layer]) for layer in layers}


def read_scores(path: str, metric: str = "") -> dict[str, float]:
    """The score of each sample in a file that lm-eval wrote with ``--log_samples``.

    metric: its name, and where lm-eval filtered answers in several ways ``NAME,FILTER``.

    Raises:
        UserError: no file, no scores, a sample twice, or a score outside [0, 1].
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").split("\n")
        records = [json.loads(line) for line in lines if line.strip()]
    except OSError as error:
        raise UserError(f"samples {path} cannot be read: {error.strerror}") from None
    except ValueError:
        records = []
    if not records or not all(isinstance(one, dict) and "doc_id" in one for one in records):
        raise UserError(
            f"{path} has no scores per sample: give what lm-eval writes with --log_samples, "
            "samples_TASK_….jsonl"
        )
    name, _, wanted = metric.partition(",")
    filters = sorted({str(one.get("filter", "none")) for one in records})
    if len(filters) > 1 and wanted not in filters:
        raise UserError(f"{path} has several filters: name one with --metric METRIC,{filters[0]}")
    records = [one for one in records if not wanted or str(one.get("filter")) == wanted]
    metrics = sorted({key for one in records for key in one.get("metrics", ())})
    if not name and len(metrics) == 1:
        name = metrics[0]
    if not records or not all(_is_score(one.get(name)) for one in records):
        raise UserError(
            f"{path} has no scores per sample within [0, 1] of metric {name or '?'}: name one with "
            f"--metric, of {', '.join(metrics) or 'none'}"
        )
    found = {f"{one['doc_id']} {one.get('doc_hash', '')}": float(one[name]) for one in records}
    if len(found) < len(records):
        raise UserError(
            f"{path} has a sample several times: a risk is tested on one score per prompt"
        )
    return found


def _is_score(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) and 0 <= value <= 1
