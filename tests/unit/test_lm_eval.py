"""lm-evaluation-harness: its answers are those of decoding, its scores those of the backbone."""

from __future__ import annotations

import json
import math
import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval", reason='needs pip install "ee-tuning[lm-eval]"')

from helpers.data import TEXT
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from ee_tuning.cli import main as ee_tuning
from ee_tuning.decode import generate
from ee_tuning.errors import UserError
from ee_tuning.lm_eval import __main__ as command
from ee_tuning.lm_eval.documents import choices, mark, passes, problems, puzzles, texts
from ee_tuning.lm_eval.model import EarlyExitLM
from ee_tuning.lm_eval.scoring import score
from ee_tuning.serve import scoring

PROMPTS = ["def function_1(value):", "    total = 7\n", "print(", "for item in value:\n    x"]


@pytest.fixture(scope="module")
def exits(base, tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("lm") / "exits")
    ee_tuning(["init", "--model", base, "--layers", "1,2,3", "--arch", "norm", "--out", folder])
    return folder


@pytest.fixture(scope="module")
def theirs(base) -> HFLM:
    return HFLM(pretrained=base, device="cpu", dtype="float32", batch_size=3)


def asked(kind, *arguments, task="a task"):
    return [Instance(kind, {}, one, i, (task, i, 1)) for i, one in enumerate(arguments)]


def texts_of(model, prompts=PROMPTS, **settings):
    settings = {"until": ["\n\n\n"], "max_gen_toks": 20} | settings
    return model.generate_until(
        asked("generate_until", *((prompt, dict(settings)) for prompt in prompts)),
        disable_tqdm=True,
    )


# -- generation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [{"mode": "full"}, {"mode": "speculative", "threshold": 0.02}],
    ids=lambda s: s["mode"],
)
def test_greedy_texts_are_those_of_lm_evals_own_model(exits, theirs, settings, batch_size):
    ours = EarlyExitLM(exits=exits, batch_size=batch_size, **settings)
    assert texts_of(ours) == texts_of(theirs)


def test_a_draft_exit_drafts(base, theirs, tmp_path):
    folder = str(tmp_path / "exits")
    ee_tuning(["init", "--model", base, "--layers", "0", "--arch", "draft", "--out", folder])
    ours = EarlyExitLM(exits=folder, mode="speculative", threshold=0, batch_size=3)
    assert texts_of(ours) == texts_of(theirs)


def test_texts_stop_where_those_of_lm_evals_own_model_do(exits, theirs):
    """Rows of a batch have prompts of several lengths, and stop at several places."""
    whole = texts_of(theirs)
    stops = [text[6:9] for text in whole]
    assert all(stops)
    ours = EarlyExitLM(exits=exits, mode="full", batch_size=4)
    cut = texts_of(ours, until=stops)
    assert cut == texts_of(theirs, until=stops)
    assert all(len(short) < len(long) for short, long in zip(cut, whole, strict=True))
    # Nothing is written behind a stop.
    [record] = ours._records.values()
    assert sum(record.layers.values()) < 4 * 12


def test_a_prompt_too_long_is_cut_as_lm_evals_own_model_does(exits, theirs):
    ours = EarlyExitLM(exits=exits, mode="full", batch_size=2)
    prompts = [TEXT * 8, "print("]
    assert texts_of(ours, prompts) == texts_of(theirs, prompts)


def test_where_tokens_left_is_recorded_by_task(exits):
    ours = EarlyExitLM(exits=exits, mode="threshold", threshold=0.005, batch_size=2)
    settings = {"until": ["never"], "max_gen_toks": 8}
    ours.generate_until(
        asked("generate_until", (PROMPTS[0], settings), task="one")
        + asked("generate_until", (PROMPTS[1], settings), (PROMPTS[2], settings), task="two"),
        disable_tqdm=True,
    )
    found = ours.get_model_info()["exits"]
    assert [found[name]["tokens"] for name in ("one", "two")] == [8, 16]
    ids = ours.tok_encode(PROMPTS[0])
    out = generate(
        ours.network, torch.tensor([ids]), mode="threshold", threshold=0.005, max_new_tokens=8
    )
    layers = out.exit_layers[0].tolist()
    assert len(set(layers)) > 1
    assert found["one"]["shares"] == {k: layers.count(k) / 8 for k in sorted(set(layers))}
    assert found["one"]["mean_depth"] == pytest.approx(sum(layers) / 8)
    assert found["one"]["tokens_per_pass"] == 8 / layers.count(4)
    assert found["two"]["tokens_per_second"] > 0


# -- log-likelihoods -----------------------------------------------------------------------------

PAIRS = [("def f", "unction_2(value):"), ("", "print"), ("return total", "\n\n"), ("x", " = 1")]


def test_scores_are_those_of_lm_evals_own_model(exits, theirs):
    requests = asked("loglikelihood", *PAIRS)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    for settings in (
        {"mode": "threshold", "threshold": 0.02},
        {"scoring": "decode", "mode": "full"},
        {"scoring": "decode", "mode": "speculative", "threshold": 0.02},
    ):
        ours = EarlyExitLM(exits=exits, batch_size=3, **settings)
        found = ours.loglikelihood(requests, disable_tqdm=True)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        assert [total for total, _ in found] == pytest.approx([t for t, _ in expected], abs=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "threshold", "threshold": 0.0052, "max_pending": 3},
        {"mode": "threshold", "threshold": {1: 0.006, 3: 0.005}, "exit_layers": "1,3"},
        {"mode": "threshold", "threshold": 0.002, "measure": "margin", "max_pending": 1},
        {"mode": "fixed", "exit_layers": "2"},
    ],
    ids=["threshold", "per exit", "margin", "fixed"],
)
def test_tokens_of_a_given_text_leave_where_decoding_lets_them(exits, settings):
    """Decoding that may say nothing but that text is the slow twin."""
    ours = EarlyExitLM(exits=exits, scoring="decode", **settings)
    model = ours.network
    ids = ours.tok_encode(TEXT * 2)[:40]
    given, count = 16, 24
    [found] = score(model, ours.policy, [(ids, count)])
    out = generate(
        model,
        torch.tensor([ids[:given]]),
        ours.leaving,
        prefix_allowed_tokens_fn=lambda _, before: [ids[len(before)]],
        max_new_tokens=count,
    )
    assert out.sequences[0].tolist() == ids
    assert found.layers == out.exit_layers[0].tolist()
    if settings["mode"] == "threshold":
        assert len(set(found.layers)) > 1
    said = model(torch.tensor([ids]), output_exit_logits=True, output_logits=True)
    by_layer = said.exit_logits | {4: said.logits}
    expected = sum(
        by_layer[layer][0, given + i - 1].log_softmax(-1)[ids[given + i]].item()
        for i, layer in enumerate(found.layers)
    )
    assert found.log_likelihood == pytest.approx(expected, abs=1e-4)
    assert not found.greedy


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "threshold", "threshold": 0.0052, "max_pending": 2},
        {"mode": "speculative", "threshold": 0.0052},
        {"mode": "fixed", "exit_layers": "2"},
    ],
    ids=["threshold", "speculative", "fixed"],
)
def test_the_server_says_the_same_of_a_text(exits, settings, monkeypatch):
    monkeypatch.setattr(scoring, "CHUNK", 7)
    ours = EarlyExitLM(exits=exits, scoring="decode", **settings)
    ids = ours.tok_encode(TEXT * 2)[:40]
    [found] = score(ours.network, ours.policy, [(ids, len(ids) - 1)])
    told = scoring.score(ours.network, ids, ours.policy, top=1)
    assert [one.token for one in told] == ids[1:]
    assert sum(one.logprob for one in told) == pytest.approx(found.log_likelihood, abs=1e-4)


def test_a_text_does_not_depend_on_those_beside_it(exits):
    ours = EarlyExitLM(exits=exits, scoring="decode", mode="threshold", threshold=0.0052)
    both = [(ours.tok_encode(text), 5) for text in (TEXT[:40], TEXT)]
    together, alone = (
        score(ours.network, ours.policy, both),
        [score(ours.network, ours.policy, [one])[0] for one in both],
    )
    assert [one.layers for one in together] == [one.layers for one in alone]
    assert [one.log_likelihood for one in together] == pytest.approx(
        [one.log_likelihood for one in alone], abs=1e-5
    )


def test_logits_are_made_of_what_counts_alone_and_of_few_texts_at_a_time(exits, monkeypatch):
    """So that memory does not grow with what is before a continuation, nor with the batch."""
    ours = EarlyExitLM(exits=exits, scoring="decode", mode="threshold", batch_size=8)
    size = ours.network.backbone.config.vocab_size
    monkeypatch.setattr("ee_tuning.lm_eval.model.ROOM", 6 * size)
    seen, logits = [], ours.network.exit(2).logits

    def counted(features):
        seen.append(features.shape[1])
        return logits(features)

    monkeypatch.setattr(ours.network.exit(2), "logits", counted)
    requests = [(None, [5] * (20 + i), [6, 7]) for i in range(7)]
    assert len(ours._loglikelihood_tokens(requests)) == 7
    assert seen == [6, 6, 2]


def test_a_token_that_an_exit_does_not_know_cannot_be_said_there(exits):
    ours = EarlyExitLM(exits=exits, scoring="decode", mode="fixed", exit_layers="2")
    ids = ours.tok_encode("print(")
    ours.network.reduce_vocabulary(torch.tensor(sorted({*range(300)} - {ids[-1]})))
    [found] = score(ours.network, ours.policy, [(ids, 1)])
    assert found.log_likelihood == -math.inf


# -- tasks ---------------------------------------------------------------------------------------


def results(model, *tasks, metadata=None, **settings):
    manager = TaskManager(
        include_path=str(command.TASKS), include_defaults=False, metadata=metadata
    )
    settings = {"limit": 3, "bootstrap_iters": 0} | settings
    return lm_eval.simple_evaluate(model, tasks=list(tasks), task_manager=manager, **settings)


def test_every_task_runs_without_a_hub(exits, tmp_path):
    held_out = tmp_path / "held_out.txt"
    held_out.write_text(TEXT)
    tasks = sorted(path.stem for path in command.TASKS.glob("*.yaml"))
    assert len(tasks) == 11
    ours = EarlyExitLM(exits=exits, mode="threshold", threshold=0.0052, scoring="decode")
    found = results(
        ours,
        *tasks,
        metadata={"data": str(held_out)},
        confirm_run_unsafe_code=True,
        gen_kwargs={"max_gen_toks": 8},
    )
    assert sorted(found["results"]) == tasks
    recorded = found["config"]["exits"]
    assert sorted(recorded) == tasks
    assert all(one["tokens"] > 0 and 1 <= one["mean_depth"] <= 4 for one in recorded.values())
    for task in tasks:
        scores = [v for k, v in found["results"][task].items() if k.endswith(",none")]
        assert any(isinstance(v, float) and math.isfinite(v) for v in scores)


def test_bits_per_byte_are_those_of_the_text(exits, tmp_path):
    text = "def naïve(value):\n    return value\n"
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"text": text}))
    ours = EarlyExitLM(exits=exits)
    found = results(ours, "local_bits_per_byte", metadata={"data": str(held_out)})
    ids = torch.tensor([[ours.prefix_token_id, *ours.tok_encode(text)]])
    with torch.no_grad():
        loss = ours.model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    expected = loss / math.log(2) / len(text.encode())
    assert found["results"]["local_bits_per_byte"]["bits_per_byte,none"] == pytest.approx(
        expected, rel=1e-5
    )


def test_functions_pass_if_they_are_right():
    docs = problems()["test"]
    assert len(docs) == 164
    doc = docs[2]
    assert passes(doc, [doc["canonical_solution"]]) == {"pass@1": 1.0}
    assert passes(doc, ["    return 0\n"]) == {"pass@1": 0.0}
    assert passes(doc, ["    while True: pass\n"]) == {"pass@1": 0.0}


def test_a_model_goes_on_with_a_function_from_the_end_of_its_head():
    """Not from the line behind it: a newline and what it indents are one token to most."""
    doc = dict(problems()["test"][0])
    manager = TaskManager(include_path=str(command.TASKS), include_defaults=False)
    names = ["local_humaneval", "local_humaneval_chat"]
    plain, chat = manager.load(names)["tasks"].values()
    begin = doc["prompt"].rstrip()
    assert plain.doc_to_text(doc) == begin
    assert chat.doc_to_prefix(doc).endswith("\n" + begin)
    assert passes(doc, ["\n" + doc["canonical_solution"]]) == {"pass@1": 1.0}


@pytest.mark.parametrize(
    "puzzle", ["chain_sum", "letter_counting", "spell_backward", "family_relationships"]
)
def test_puzzles_are_marked(puzzle):
    found = puzzles(puzzle)
    doc = found["test"][5]
    assert mark(doc, [f" {doc['answer']}"])["score"] == 1
    assert mark(doc, ["nothing of the kind"])["score"] < 1
    assert puzzles(puzzle)["test"][5] == doc
    assert not {*found["test"]["question"]} & {*found["fewshot"]["question"]}


def test_choices_have_one_right_answer():
    docs = choices("code_line_description")["test"]
    assert len(docs) == 60
    assert docs[0]["text"].startswith("Python code:\nfor i in range(23):")
    assert "\n  choice: prints values from 1 to 10" in docs[0]["text"]
    assert docs[0]["choices"][docs[0]["label"]] == "prints values from 0 to 22"


def test_texts_are_whole(tmp_path, monkeypatch):
    """Also those that are read in pieces."""
    monkeypatch.setattr("ee_tuning.data.readers.PIECE", 64)
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "one ", "completion": "two"}))
    found = texts([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")])["test"]["text"]
    assert list(found) == [TEXT, "one two"]


# -- mistakes, and the command -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"exits": ""}, "no exits given: --model_args exits=FOLDER"),
        ({"exits": "nowhere"}, "nowhere"),
        ({"pretrained": "x"}, "no argument 'pretrained'"),
        ({"scoring": "best"}, "scoring 'best' is unknown: use one of forward, decode"),
        ({"mode": "slow"}, "mode 'slow' is unknown"),
        ({"exit_layers": "7"}, "layer 7"),
        ({"precision": "fp8"}, "precision 'fp8' is unknown: use one of auto, fp32, bf16"),
        ({"compile": "maybe"}, "compile 'maybe' is unknown: use one of auto, on, off"),
        ({"device": 0.5}, "device '0.5' is unknown"),
    ],
)
def test_mistakes_in_the_models_arguments(exits, settings, words):
    with pytest.raises(UserError, match=re.escape(words)):
        EarlyExitLM(**{"exits": exits} | settings)


def test_a_device_among_the_models_arguments_comes_before_lm_evals_own(exits):
    ours = EarlyExitLM.create_from_arg_obj(
        {"exits": exits, "device": "cpu", "batch_size": 3}, {"device": "gpu", "batch_size": 1}
    )
    assert (ours.network.device.type, ours.batch_size) == ("cpu", 3)
    with pytest.raises(UserError, match="device 'gpu' is unknown"):
        EarlyExitLM.create_from_arg_obj({"exits": exits}, {"device": "gpu", "batch_size": None})


def test_settings_that_the_mode_ignores_are_named(exits, caplog):
    EarlyExitLM(exits=exits, mode="full", threshold=0.5)
    assert "mode full ignores threshold" in caplog.text


def test_mistakes_in_what_is_asked(exits, tmp_path, monkeypatch):
    ours = EarlyExitLM(exits=exits)
    with pytest.raises(UserError, match="asks for 512 new tokens, the context has 128"):
        results(ours, "local_humaneval", confirm_run_unsafe_code=True)
    with pytest.raises(UserError, match="--metadata data=FILE"):
        texts()
    (tmp_path / "chat.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "?"}]})
    )
    with pytest.raises(UserError, match="a chat has no bits per byte"):
        texts(str(tmp_path / "chat.jsonl"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        EarlyExitLM(exits=exits)


@pytest.fixture
def run(exits, monkeypatch):
    """lm-eval's command with our model; of lm-eval's own tasks none, which take long to list."""
    import functools

    import lm_eval.tasks

    own = functools.partial(TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", own)

    def run(*args):
        model = ["--model", "ee-tuning", "--model_args", f"exits={exits},mode=fixed,exit_layers=2"]
        monkeypatch.setattr(sys, "argv", ["lm_eval", "run", *model, *map(str, args)])
        command.main()

    return run


def test_the_command_writes_where_tokens_left_beside_the_score(run, tmp_path, capsys):
    run("--tasks", "local_chain_sum", "--limit", 2, "--output_path", tmp_path / "out")
    [file] = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(file.read_text())
    assert found["results"]["local_chain_sum"]["score,none"] == 0
    assert found["config"]["exits"]["local_chain_sum"]["mean_depth"] == 2
    assert "|local_chain_sum|" in capsys.readouterr().out


def test_the_command_refuses_in_a_line(run, tmp_path, capsys):
    (tmp_path / "hub.yaml").write_text(
        "task: from_a_hub\ndataset_path: nobody/nothing\noutput_type: loglikelihood_rolling\n"
        "test_split: test\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    )
    for args, words in (
        (["--tasks", "local_humaneval"], "confirm_run_unsafe_code"),
        (["--tasks", "nothing_of_the_kind"], "nothing_of_the_kind"),
        (["--tasks", "from_a_hub", "--include_path", tmp_path], "local_ need no hub"),
        (["--tasks", "local_bits_per_byte"], "--metadata data=FILE"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(*args)
        assert stop.value.code == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("ee-tuning: ")
        assert words in line


def test_lm_eval_finds_the_model_by_itself_once_it_looks():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    [value] = re.findall(r'^ee-tuning = "(ee_tuning\.lm_eval\.[\w.:]+)"$', text, re.MULTILINE)
    assert value == command.MODEL
    assert EntryPoint("ee-tuning", value, "lm_eval.models").load() is EarlyExitLM
