"""Evaluation: its numbers against slow computations, its page, its refusals."""

import io
import itertools
import json
import re

import numpy as np
import pytest
import torch
from rich.console import Console

from ee_tuning import EarlyExitModel
from ee_tuning.commands.evaluate import evaluate, parse_thresholds, results_folder
from ee_tuning.config import EvaluateConfig
from ee_tuning.data import load_packed
from ee_tuning.errors import Notice, UserError
from ee_tuning.evaluate.exits import measure_exits
from ee_tuning.evaluate.intervals import bootstrap
from ee_tuning.evaluate.report import _pieces as text_pieces
from ee_tuning.evaluate.report import write_report
from ee_tuning.evaluate.speed import _speedup, take_prompts
from ee_tuning.exit_config import ExitConfig

LENGTH, NEW = 32, 6


@pytest.fixture(scope="module")
def exits(base, tmp_path_factory):
    """Saved exits at layers 1, 2 and 4 of 4, random so that they disagree."""
    folder = tmp_path_factory.mktemp("evaluate") / "exits"
    config = ExitConfig([1, 2, 4], arch=["norm", "mlp", "layer"], init="random", seed=1)
    EarlyExitModel.from_base(base, config).save_pretrained(folder)
    return str(folder)


def settings(exits, data, /, **changes):
    values = {
        "exits": exits, "data": [data], "thresholds": "1,0.02,0", "seq_length": LENGTH,
        "max_tokens": 6 * LENGTH, "prompts": 2, "prompt_length": 8, "max_new_tokens": NEW,
        "rounds": 2, "max_pending": 100, "device": "cpu",
    }  # fmt: skip
    return EvaluateConfig(**(values | changes))


@pytest.fixture(scope="module")
def run(exits, data, tmp_path_factory):
    """One evaluation: its result, its folder and what it printed."""
    out, printed = tmp_path_factory.mktemp("out"), io.StringIO()
    config = settings(exits, data, out=str(out), micro_batch_size=4)
    return evaluate(config, Console(file=printed, width=100)), out, printed.getvalue()


def places(model, packed, rows):
    """Per labelled token of the first rows, by unpacked document: target and every exit's logits.

    Each piece of a row goes through the model alone, from position 0.
    """
    found = []
    for row in (packed[i] for i in range(rows)):
        starts = [*(row["position_ids"] == 0).nonzero().flatten().tolist(), LENGTH]
        for a, b in itertools.pairwise(starts):
            ids, labels = row["input_ids"][None, a:b], row["labels"][a:b]
            with torch.no_grad():
                output = model(ids, output_exit_logits=True, output_logits=True)
            logits = {**output.exit_logits, "final": output.logits}
            for t in range(b - a - 1):
                if labels[t + 1] != -100:
                    here = {place: values[0, t] for place, values in logits.items()}
                    found.append((labels[t + 1], here))
    return found


@pytest.fixture(scope="module")
def slow(exits, data, tokenizer):
    packed = load_packed([data], tokenizer, LENGTH, 0)
    return places(EarlyExitModel.from_pretrained(exits).eval(), packed, 6)


def test_exits_on_the_data(run, slow):
    result = run[0]
    assert result["data_tokens"] == len(slow)
    assert [(row["layer"], row["final"]) for row in result["exit_rows"]] == [
        (1, False), (2, False), (4, False), (4, True),
    ]  # fmt: skip
    for row in result["exit_rows"]:
        place = "final" if row["final"] else row["layer"]
        chances = [(target, here[place].softmax(-1), here["final"]) for target, here in slow]
        losses = [-p[target].log().item() for target, p, _ in chances]
        same = [float(p.argmax() == final.argmax()) for _, p, final in chances]
        sure = [p.max().item() for _, p, _ in chances]
        for key, values in (("loss", losses), ("agreement", same), ("confidence", sure)):
            assert row[key] == pytest.approx(sum(values) / len(values), rel=1e-4), key


@pytest.mark.parametrize(("exit_layers", "active"), [("", (1, 2)), ("2", (2,)), ("4", ())])
def test_next_token_figures_are_those_of_the_active_exits(
    exits, data, tokenizer, slow, exit_layers, active
):
    model = EarlyExitModel.from_pretrained(exits).eval()
    packed = load_packed([data], tokenizer, LENGTH, 0)
    thresholds = [1.0, 0.05, 0.02, 0.0]
    config = settings(exits, data, exit_layers=exit_layers)
    found = measure_exits(model, packed, config, thresholds)["next_token"]
    for threshold, figures in zip(thresholds, found, strict=True):
        depths, same = [], []
        for _, here in slow:
            leaves = [k for k in active if here[k].softmax(-1).max() >= threshold < 1]
            taken = here[leaves[0] if leaves else "final"].argmax()
            depths.append(leaves[0] if leaves else 4)
            same.append(float(taken == here["final"].argmax()))
        assert figures["mean_depth"] == pytest.approx(sum(depths) / len(depths), rel=1e-6)
        assert figures["agreement"] == pytest.approx(sum(same) / len(same), rel=1e-6)


def test_generated_text_by_threshold(run):
    rows = {row["threshold"]: row for row in run[0]["threshold_rows"]}
    assert list(rows) == [1, 0.02, 0]
    assert rows[1]["text_agreement"] == rows[1]["next_token_agreement"] == 1
    assert rows[1]["identical_texts"] == run[0]["prompts"] == 2
    assert rows[1]["shares"] == {1: 0, 2: 0, 4: 1}
    # The prompt's own prediction always goes to full depth; after it all leave at once.
    assert rows[0]["shares"] == {1: pytest.approx(1 - 1 / NEW), 2: 0, 4: pytest.approx(1 / NEW)}
    assert rows[0]["next_token_depth"] == 1
    for row in rows.values():
        assert sum(row["shares"].values()) == pytest.approx(1)
        depth = sum(layer * share for layer, share in row["shares"].items())
        assert row["mean_depth"] == pytest.approx(depth)
        assert 0 < row["speed"]["min"] <= row["speed"]["median"] <= row["speed"]["max"]
        assert row["speedup"] > 0
        assert row["speedup_over_transformers"] > 0
        drafted = row["speculative"]
        assert (drafted is None) == (row["threshold"] == 1)
        assert drafted is None or drafted["identical_texts"] == run[0]["prompts"]


def test_intervals_are_of_what_is_measured(run):
    for row in run[0]["exit_rows"]:
        for key in ("loss", "agreement"):
            low, high = row[f"{key}_interval"]
            assert low <= row[key] <= high
    for row in run[0]["threshold_rows"]:
        for key in ("next_token", "text"):
            low, high = row[f"{key}_interval"]
            assert low <= row[f"{key}_agreement"] <= high
        assert len(row["speedup_interval"]) == 2


def test_intervals_cover_a_share_of_texts_that_differ():
    """As often as they say: not if tokens of a text were taken for independent ones."""
    random, held = np.random.default_rng(0), 0
    for _ in range(200):
        kinds = random.beta(6, 2, 60)
        right = random.binomial(50, kinds)
        low, high = bootstrap(right, np.full(60, 50))
        held += low <= 0.75 <= high
        assert high - low > 2 * 1.96 * (0.75 * 0.25 / 3000) ** 0.5
    assert 0.88 < held / 200 < 0.99
    assert bootstrap([3.0], [4.0]) == [0.75, 0.75]
    assert bootstrap([0.0], [0.0]) == []


def test_page_follows_the_colours_of_who_reads_it(run):
    """And no plot has a colour of its own for words and lines, nor a background."""
    page = (run[1] / "report.html").read_text()
    assert "prefers-color-scheme: dark" in page
    assert page.count("currentColor") > 20
    assert "#1b2733" not in page
    assert not re.search(r"<svg.*?fill: #(fff|000)", page, re.DOTALL)


def test_speedup_is_the_median_of_ratios_within_rounds():
    assert _speedup([1.0, 10.0, 2.0], [1.0, 2.0, 2.0]) == 1
    assert _speedup([4.0, 8.0, 12.0], [2.0, 2.0, 2.0]) == 4


def test_files_and_tables(run):
    result, out, printed = run
    assert {path.name for path in out.iterdir()} == {"evaluation.json", "report.html"}
    saved = json.loads((out / "evaluation.json").read_text())
    assert saved == json.loads(json.dumps(result))
    for key in ("base_model", "exits", "depth", "machine", "dtype", "settings", "transformers"):
        assert saved[key]
    assert torch.__version__ in saved["machine"]
    assert saved["dtype"] == "float32"
    assert "4 (final)" in printed
    assert "transformers" in printed
    assert "lookup" in printed


def test_drafts_from_the_text_have_a_row_of_their_own(run):
    found = run[0]["lookup"]
    assert found["identical_texts"] == run[0]["prompts"]
    assert 0 < found["speed"]["min"] <= found["speed"]["median"] <= found["speed"]["max"]
    assert found["speedup"] > 0
    assert "drafts from the text itself" in (run[1] / "report.html").read_text()


def test_page_needs_nothing_from_outside(run):
    page = (run[1] / "report.html").read_text()
    assert page.count("<svg") == 4
    assert not re.search(r'(src|href)="(?!#)', page)
    assert not re.search(r"<(script|link|img|iframe)\b|@import|url\((?!#)", page)
    assert re.search(r'title="layer \d, confidence 0\.\d\d"', page)


def test_page_escapes_text_and_shows_no_sample_without_early_exits(run, tokenizer, tmp_path):
    result = json.loads(json.dumps(run[0])) | {"base_model": "<script>alert(1)</script>"}
    result["threshold_rows"] = [
        row | {"shares": {int(k): v for k, v in row["shares"].items()}}
        for row in result["threshold_rows"]
    ]
    evil = tokenizer("<b>&").input_ids
    sample = {
        "prompt": evil, "tokens": evil, "full": evil,
        "layers": [1] * len(evil), "confidences": [0.5] * len(evil),
    }  # fmt: skip
    result["samples"] = {"threshold": 0.5, "texts": [sample]}
    write_report(tmp_path / "report.html", result, tokenizer)
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page
    assert "<b>" not in page
    assert "&lt;script&gt;" in page
    result["samples"] = {"threshold": None, "texts": []}
    write_report(tmp_path / "report.html", result, tokenizer)
    assert "What it looks like" not in (tmp_path / "report.html").read_text()


def test_token_texts_make_up_the_text(tokenizer):
    prompt, ids = tokenizer("def f(").input_ids, tokenizer("naïve — 図, x").input_ids
    pieces = text_pieces(prompt, ids, tokenizer)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == "naïve — 図, x"
    assert not any("\ufffd" in piece for piece in pieces)


def packed_rows(*rows):
    """Rows of pieces, each (length, labelled); token ids count from 1."""
    result = []
    for pieces in rows:
        positions = torch.cat([torch.arange(n) for n, _ in pieces])
        ids = torch.arange(1, len(positions) + 1)
        keep = torch.cat([torch.full((n,), labelled) for n, labelled in pieces])
        labels = torch.where(keep & (positions > 0), ids, -100)
        result.append({"input_ids": ids, "position_ids": positions, "labels": labels})
    return result


def test_prompts_are_text_and_one_per_row():
    rows = packed_rows(
        [(3, True), (5, True), (8, True)], [(4, True), (12, False)], [(16, True)], [(16, True)]
    )
    assert take_prompts(rows, 2, 5) == [[4, 5, 6, 7, 8], [1, 2, 3, 4, 5]]
    assert take_prompts(rows, 9, 16) == [list(range(1, 17))] * 2
    with pytest.raises(UserError, match="lower --prompt-length"):
        take_prompts(rows[:2], 2, 9)


@pytest.mark.parametrize("more", [0, 5])
def test_fewer_prompts_than_asked_for_are_said(exits, tokenizer, tmp_path, recwarn, more):
    data = tmp_path / "text.jsonl"
    data.write_text(json.dumps({"text": "total = value\n" * 40}) + "\n")
    number = len(take_prompts(load_packed([str(data)], tokenizer, LENGTH, 0), 1000, 8))
    changes = {"prompts": number + more, "thresholds": "1", "rounds": 1, "out": str(tmp_path / "o")}
    result = evaluate(settings(exits, str(data), **changes), Console(quiet=True))
    assert result["prompts"] == number > 1
    told = [str(one.message) for one in recwarn if one.category is Notice]
    said = f"prompts is {number + more}, and the data has {number}: these are taken"
    assert told == [said] * (more > 0)


@pytest.mark.parametrize(
    ("given", "values"), [("1, 0.2,0.8", [1, 0.8, 0.2]), (0.5, [0.5]), ([0, 1, 1], [1, 0])]
)
def test_thresholds(given, values):
    assert parse_thresholds(given) == values


@pytest.mark.parametrize("given", ["1.2", "-0.1", "nan", "inf", "a", "", "0.5,"])
def test_bad_thresholds(given):
    with pytest.raises(UserError):
        parse_thresholds(given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": []}, "no data given"),
        ({"exits": ""}, "no exits given"),
        ({"thresholds": "0.5,2"}, "outside"),
        ({"rounds": 0}, "rounds 0 is too small"),
        ({"prompts": 0}, "prompts 0 is too small"),
        ({"prompt_length": 0}, "prompt_length 0 is too small"),
        ({"max_new_tokens": 0}, "max_new_tokens 0 is too small"),
        ({"micro_batch_size": 0}, "micro_batch_size 0 is too small"),
        ({"prompt_length": LENGTH + 8}, "more than seq_length"),
        ({"seq_length": 4096}, "seq_length 4096 is beyond the backbone's context of 128"),
        ({"exit_layers": "3"}, "no exit at layer 3"),
        ({"max_pending": 0}, "whole number from 1"),
    ],
)
def test_refusals_are_one_line(exits, data, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        evaluate(settings(exits, data, **({"out": str(tmp_path)} | changes)))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_data_without_labels_are_refused(exits, data):
    model = EarlyExitModel.from_pretrained(exits).eval()
    row = {
        "input_ids": torch.ones(1, LENGTH, dtype=torch.long),
        "position_ids": torch.arange(LENGTH)[None],
        "labels": torch.full((1, LENGTH), -100),
    }

    class Unlabelled:
        def count(self, most):
            return 1

        def __getitem__(self, _):
            return row

    with pytest.raises(UserError, match="no labels"):
        measure_exits(model, Unlabelled(), settings(exits, data), [1.0])


def test_exits_from_the_hub_need_a_folder_for_the_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--out"):
        results_folder(EvaluateConfig(exits="someone/exits"))
    assert not list(tmp_path.iterdir())
    assert results_folder(EvaluateConfig(exits="someone/exits", out="here")).is_dir()
