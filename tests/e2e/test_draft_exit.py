"""A draft exit as a user tunes it: files, metrics, resuming, and what it is not for."""

import json
import shutil
import signal

import pytest
import torch
from helpers.commands import PATIENCE, arguments, fails, records, tune
from helpers.forks import fork
from helpers.struck import run as struck_run
from safetensors.torch import load_file

from ee_tuning import EarlyExitModel
from ee_tuning.cli import main

DRAFT = {"layers": None, "arch": "draft", "loss": "acceptance", "exit_vocab": 150}


@pytest.fixture(scope="module")
def tuned(base, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("draft") / "exits"
    tune(base, data, out, **DRAFT, draft_sources="1,4")
    return out


def test_files_and_metrics(tuned):
    saved = json.loads((tuned / "exit_config.json").read_text())
    assert {name: saved[name] for name in ("layers", "arch", "head", "sources")} == {
        "layers": [0], "arch": ["draft"], "head": ["shared"], "sources": [1, 4],
    }  # fmt: skip
    names = set(load_file(tuned / "exits.safetensors"))
    assert "0.head.weight" not in names
    assert {"vocabulary", "0.first.weight", "0.later.weight", "0.source_norms.1.weight"} <= names
    lines = records(tuned)
    assert [set(line["draft_loss"]) for line in lines if "draft_loss" in line] == [set("1234")] * 4
    shares = [line["draft_agreement"] for line in lines if "draft_agreement" in line]
    assert all(set(line) == set("1234") and max(line.values()) <= 1 for line in shares)
    assert all(set(line["loss"]) == {"0"} for line in lines if "loss" in line)
    card = (tuned / "README.md").read_text()
    assert "| draft | draft | shared |" in card
    assert 'mode="speculative"' in card


def test_by_default_they_know_what_the_data_say(base, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ee_tuning.vocabulary.LEAST", 300)
    monkeypatch.setattr("ee_tuning.vocabulary.COVERAGE", 0.8)
    tune(base, data, tmp_path / "new", **DRAFT | {"exit_vocab": None, "steps": 2})
    said = " ".join(capsys.readouterr().err.split())
    saved = json.loads((tmp_path / "new/exit_config.json").read_text())
    assert saved["vocab_size"] in (64, 128)
    known = f"know {saved['vocab_size']} of 300 tokens"
    assert f"exits {known}: " in said
    assert f", {saved['vocab_coverage']:.2%} of the held-out targets" in said
    main(["inspect", str(tmp_path / "new")])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{known}, {saved['vocab_coverage']:.2%} of held-out targets" in shown
    # Exits that go on keep theirs.
    more = {"layers": None, "arch": None, "loss": "acceptance", "steps": 2}
    tune(base, data, tmp_path / "more", exits=tmp_path / "new", **more)
    assert (
        json.loads((tmp_path / "more/exit_config.json").read_text())["vocab_coverage"]
        == (saved["vocab_coverage"])
    )


def test_tokens_of_another_tokenizer_are_refused(tuned, base, data, tmp_path, capsys):
    """Tuning and decoding; nothing is written."""
    other = tmp_path / "other"
    shutil.copytree(base, other)
    text = json.loads((other / "tokenizer.json").read_text())
    names = text["model"]["vocab"]
    a, b = sorted(names, key=names.get)[100:102]
    names[a], names[b] = names[b], names[a]
    (other / "tokenizer.json").write_text(json.dumps(text))
    more = {"layers": None, "arch": None, "model": None, "exits": tuned, "tokenizer": other}
    line = fails(capsys, "tune", *arguments(base, data, tmp_path / "out", **more))
    message = f"{tuned} knows 150 tokens of another tokenizer than {other}"
    assert message in line
    assert not any((tmp_path / "out").rglob("*"))
    line = fails(capsys, "generate", "--exits", tuned, "--model", other, "--prompt", "def")
    assert message in line
    line = fails(capsys, "serve", "--exits", tuned, "--model", other, "--port", "0")
    assert message in line


def test_saved_drafts_are_loaded(tuned):
    model = EarlyExitModel.from_pretrained(str(tuned))
    assert model.draft.sources == (1, 4)
    assert torch.equal(model.draft.output.tokens, model.vocabulary.tokens)
    stored = load_file(tuned / "exits.safetensors")
    assert all(torch.equal(p, stored[name]) for name, p in model.exit_state().items())


def test_inspect_and_init_call_it_draft(tuned, base, tmp_path, capsys):
    main(["inspect", str(tuned)])
    shown = " ".join(capsys.readouterr().out.split())
    assert "draft │ draft │ shared" in shown
    assert "the draft reads layers 1, 4" in shown
    new = ["init", "--model", base, "--layers", "0,2", "--arch", "draft,norm"]
    main([*new, "--out", str(tmp_path / "new")])
    assert "exits after layers [2] and a draft exit saved in" in capsys.readouterr().out
    main(["init", "--model", base, "--arch", "draft", "--out", str(tmp_path / "draft")])
    assert capsys.readouterr().out == f"a draft exit saved in {tmp_path / 'draft'}\n"


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(base, data, tmp_path):
    """Bit for bit, fitted before the first step."""
    common = DRAFT | {"steps": 12, "init": "fitted"}
    tune(base, data, tmp_path / "whole", **common)
    flags = arguments(base, data, tmp_path / "cut", **common)
    struck = (struck_run, int(signal.SIGKILL), tmp_path / "struck", "tune", *flags)
    assert fork(tmp_path / "said", *struck).wait(PATIENCE) == -signal.SIGKILL
    tune(base, data, tmp_path / "cut", **common, resume=True)
    whole, cut = (load_file(tmp_path / n / "exits.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "draft"}, "a draft exit sits at no layer, and 1 is given"),
        ({"layers": "0"}, "exit layer 0 is a draft exit's, and arch is mlp"),
        ({"layers": None, "arch": "draft", "draft_sources": "9"}, "source layer 9 does not exist"),
        ({"draft_sources": "1"}, "draft_sources is for a draft exit"),
        ({"layers": None, "arch": "draft", "draft_steps": 0}, "draft_steps is 0"),
        ({"loss": "acceptance", "acceptance_weight": 2}, "acceptance_weight is 2"),
    ],
)
def test_what_cannot_be_tuned(changes, message, base, data, tmp_path, capsys):
    flags = arguments(base, data, tmp_path / "out", **changes)
    assert message in fails(capsys, "tune", *flags)


def test_it_serves_speculative_decoding_alone(tuned, tmp_path, capsys):
    given = ["generate", "--exits", tuned, "--prompt", "def", "--max-new-tokens", "2"]
    for mode in ("threshold", "fixed"):
        line = fails(capsys, *given, "--mode", mode)
        assert f"mode {mode} needs an exit at a layer, and there is a draft exit alone" in line
    line = fails(capsys, *given, "--mode", "threshold", "--exit-layers", "0")
    assert "exit layer 0 is the draft exit, at which no token leaves" in line
    line = fails(capsys, "export", "--exits", tuned, "--layer", "0", "--out", tmp_path / "out")
    assert "layer is 0: a draft exit sits at no layer" in line
    main([*map(str, given), "--mode", "full"])


def test_beside_exits_at_layers_it_drafts_and_tokens_leave_at_them(base, data, tmp_path):
    """One run, one adapter, two modes."""
    archs = {"layers": "0,2,3", "arch": "draft,layer,norm", "loss": "acceptance"}
    tune(base, data, tmp_path / "both", **archs, exit_vocab=150)
    losses = [line["loss"] for line in records(tmp_path / "both") if "loss" in line]
    assert all(line.keys() == {"0", "2", "3"} for line in losses)
    model = EarlyExitModel.from_pretrained(str(tmp_path / "both"))
    ids, rest = torch.tensor([[5, 9, 7, 40]]), {"max_new_tokens": 24, "eos_token_id": None}
    full = model.generate(ids, mode="full", **rest)
    drafted = model.generate(ids, mode="speculative", threshold=0.0, **rest)
    assert torch.equal(drafted.sequences, full.sequences)
    assert set(drafted.exit_layers[0].tolist()) == {0, 4}
    left = model.generate(ids, mode="threshold", threshold=0.0, **rest)
    assert set(left.exit_layers[0].tolist()) <= {2, 4}
    assert 2 in left.exit_layers[0].tolist()
    layers = model.generate(ids, mode="speculative", threshold=0.0, exit_layers="2,3", **rest)
    assert torch.equal(layers.sequences, full.sequences)


def test_evaluate_measures_its_first_draft_beside_others(tuned, base, data, tmp_path, capsys):
    given = ["--data", data, "--thresholds", "1,0.5", "--prompts", "1", "--rounds", "1"]
    given += ["--max-new-tokens", "4", "--prompt-length", "8", "--seq-length", "32"]
    line = fails(capsys, "evaluate", "--exits", tuned, *given)
    assert "there is a draft exit alone: how its drafts agree" in line
    both = str(tmp_path / "both")
    main(["init", "--model", base, "--layers", "0,2", "--arch", "draft,norm", "--out", both])
    main([*map(str, ["evaluate", "--exits", both, "--max-tokens", "200", *given])])
    found = json.loads((tmp_path / "both/evaluation.json").read_text())
    assert [row["layer"] for row in found["exit_rows"]] == [2, 0, 4]
    assert " draft " in capsys.readouterr().out
    assert (tmp_path / "both/report.html").exists()


def test_an_eagle3_exit_is_tuned_and_exported(base, data, tmp_path):
    """The token, of which a copied one reads nothing, is read after two steps."""
    settings = DRAFT | {"arch": "eagle3", "draft_sources": "1,2,4", "steps": 2}
    tune(base, data, tmp_path / "exits", **settings)
    stored = load_file(tmp_path / "exits/exits.safetensors")
    assert stored["0.block.self_attn.v_proj.weight"].chunk(2, dim=1)[0].abs().max() > 0
    out = str(tmp_path / "out")
    main(["export", "--exits", str(tmp_path / "exits"), "--eagle3", "speculators", "--out", out])
    written = load_file(tmp_path / "out/model.safetensors")
    v_proj = written["layers.0.self_attn.v_proj.weight"]
    assert torch.equal(v_proj, stored["0.block.self_attn.v_proj.weight"].to(v_proj.dtype))
    assert len(written["d2t"]) == 150
