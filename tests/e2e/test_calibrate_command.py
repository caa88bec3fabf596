"""`ee-tuning calibrate` and `generate --calibrated` on a tiny model."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.commands import fails

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.adapter import read_exit_config, stored_hashes
from ee_tuning.calibrate.risks import Along, full_texts, look
from ee_tuning.cli import main
from ee_tuning.errors import Notice
from ee_tuning.fingerprint import exit_hash

WORDS = ["alpha", "beta", "gamma", "delta", "total", "value", "item", "return", "print", "function"]
EPSILON = 0.45


def write_prompts(path, number, seed):
    random = np.random.default_rng(seed)
    texts = [f"{n} " + " ".join(random.choice(WORDS, 9)) for n in range(number)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """Exits whose model hardly changes what they see, and prompts."""
    folder = tmp_path_factory.mktemp("calibrate")
    shutil.copytree(base, folder / "base")
    model = EarlyExitModel.from_base(str(folder / "base"), ExitConfig([2, 3], arch="norm"))
    for layer in list(model.backbone.layers)[2:]:
        for p in layer.parameters():
            p.data.mul_(0.3 if p.dim() >= 2 else 1)
    model.model.save_pretrained(folder / "base")
    model = EarlyExitModel.from_base(str(folder / "base"), ExitConfig([2, 3], arch="norm"))
    model.save_pretrained(folder / "exits")
    write_prompts(folder / "prompts.jsonl", 60, 0)
    return folder


def arguments(folder, **changes):
    values = {
        "exits": folder / "exits", "data": folder / "prompts.jsonl", "epsilon": EPSILON,
        "delta": 0.1, "prompt-tokens": 8, "max-new-tokens": 8, "device": "cpu",
    } | changes  # fmt: skip
    flags = [(f"--{name}", str(value)) for name, value in values.items() if value is not None]
    return ["calibrate", *(word for flag in flags for word in flag)]


@pytest.fixture(scope="module")
def saved(folder):
    main(arguments(folder))
    return json.loads((folder / "exits" / "calibration.json").read_text())


def test_what_is_saved(saved, folder):
    assert {*saved["thresholds"]} == {"2", "3"}
    assert (saved["risk"], saved["epsilon"], saved["delta"]) == ("next-token", EPSILON, 0.1)
    assert (saved["n"], saved["report"]["n"]) == (24, 12)
    assert 0 < saved["p"] <= 0.1
    assert saved["path"][0]["p"] <= 0.1
    assert all(step["p"] <= 0.1 for step in saved["path"][:-1])
    passed = [step for step in saved["path"] if step["p"] <= 0.1]
    assert passed[-1]["thresholds"] == saved["thresholds"]
    report = saved["report"]
    assert report["low"] <= report["risk"] <= report["high"]
    assert report["depth"] < 4
    assert (saved["dtype"], saved["measure"], saved["max_pending"]) == ("float32", "probability", 8)


@pytest.mark.parametrize(("asked", "said"), [(70, True), (60, False), (1000, False)])
def test_fewer_prompts_than_asked_for_are_said(folder, tmp_path, recwarn, asked, said):
    """Without a number, which is 1,000, there are as many as there are."""
    shutil.copytree(folder / "exits", tmp_path / "exits")
    main(arguments(folder, exits=tmp_path / "exits", prompts=asked))
    told = [str(one.message) for one in recwarn if one.category is Notice]
    assert told == ["prompts is 70, and the data has 60: these are taken"] * said


def test_exits_that_cannot_be_written_to_are_refused_before_all_else(folder, capsys, monkeypatch):
    def no_place(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ee_tuning.files.tempfile.TemporaryFile", no_place)
    monkeypatch.setattr("ee_tuning.calibrate.run.load_for_decoding", None)
    line = fails(capsys, *arguments(folder))
    assert line == (
        f"ee-tuning: cannot write to {folder / 'exits'}: Permission denied; copy the exits to "
        "where that is possible"
    )


def test_the_certified_threshold_holds_on_fresh_prompts(saved, folder, tokenizer):
    model = EarlyExitModel.from_pretrained(str(folder / "exits"))
    write_prompts(folder / "fresh.jsonl", 60, 1)
    lines = (folder / "fresh.jsonl").read_text().splitlines()
    prompts = [tokenizer(json.loads(line)["text"]).input_ids[:8] for line in lines]
    texts = full_texts(model, prompts, 8, 16, False, lambda more: None)
    risk = Along(look(model, [2, 3], prompts, texts, "probability"), 8)
    found = risk.measure(model.calibration.thresholds, np.arange(60))
    assert 0 < found.losses.mean() <= EPSILON


def test_generate_uses_it(saved, folder, capsys):
    command = [
        "generate", "--exits", str(folder / "exits"), "--prompt", "alpha beta gamma", "--device",
        "cpu", "--max-new-tokens", "6",
    ]  # fmt: skip
    capsys.readouterr()
    main([*command, "--calibrated"])
    own = capsys.readouterr()
    thresholds = ",".join(f"{layer}:{value}" for layer, value in saved["thresholds"].items())
    main([*command, "--threshold", thresholds])
    given = capsys.readouterr()
    assert own.out.splitlines()[:2] == given.out.splitlines()[:2]
    assert own.err == ""
    with pytest.warns(Notice, match=r"of max_pending 8, now 2 \(leave max_pending out, or"):
        main([*command, "--calibrated", "--max-pending", "2"])
    assert "layer  4 (100%)" in capsys.readouterr().out
    line = fails(capsys, *command, "--calibrated", "--threshold", "0.5")
    assert "leave one out" in line


def test_inspect_says_what_was_proven_and_whether_it_is_of_these_exits(
    saved, folder, tmp_path, capsys
):
    def line(folder=tmp_path / "exits"):
        capsys.readouterr()
        main(["inspect", str(folder)])
        return capsys.readouterr().out.splitlines()[-1]

    shutil.copytree(folder / "exits", tmp_path / "exits")
    two, three = (f"{saved['thresholds'][layer]:.5g}" for layer in "23")
    proven = (
        f"calibrated: threshold 2:{two} 3:{three}, in float32; next-token risk at most 0.45 with "
        "probability 0.9, tested on 24 prompts; "
    )
    assert line() == f"{proven}of these exits and the backbone that they are for"
    changes = {
        "exits": ({"3": "other"}, "exit at layer 3"),
        "backbone": ({"layer 1": "other"}, "layer 1 of the backbone"),
    }
    for name, (change, what) in changes.items():
        found = saved | {name: saved[name] | change}
        (tmp_path / "exits" / "calibration.json").write_text(json.dumps(found))
        assert line() == f"{proven}void: the {what} is another one now, calibrate again"
    (tmp_path / "exits" / "calibration.json").unlink()
    assert line() == "not calibrated"
    # Other exits over those that were calibrated.
    shutil.copy(folder / "exits" / "calibration.json", tmp_path / "exits")
    model = EarlyExitModel.from_base(str(folder / "base"), ExitConfig([2], arch="mlp"))
    model.save_pretrained(tmp_path / "exits")
    assert "void: there is no exit at layer 3 any more" in line()


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("thresholds", [0.5], "thresholds is [0.5], it must be of type dict"),
        ("thresholds", {"x": 0.5}, "thresholds are by numbers of layers"),
        ("exits", {"2": None}, "exits are by numbers of layers"),
        ("n", "24", "n is '24', it must be of type int"),
        ("dtype", "nn", "is of nn, which is no dtype"),
    ],
)
def test_a_damaged_certificate(saved, folder, tmp_path, capsys, name, value, reason):
    shutil.copytree(folder / "exits", tmp_path / "exits")
    (tmp_path / "exits" / "calibration.json").write_text(json.dumps(saved | {name: value}))
    assert reason in (line := fails(capsys, "inspect", tmp_path / "exits"))
    assert line.endswith(": delete it, and calibrate again")


def test_a_certificate_that_is_no_json(folder, tmp_path, capsys):
    shutil.copytree(folder / "exits", tmp_path / "exits")
    (tmp_path / "exits" / "calibration.json").write_text("{")
    for command in (["inspect", tmp_path / "exits"], arguments(folder, exits=tmp_path / "exits")):
        line = fails(capsys, *command)
        assert "is not valid JSON" in line
        assert line.endswith(": delete it, and calibrate again")


@pytest.mark.parametrize("arch", ["embedding", "norm", "mlp", "layer"])
@pytest.mark.parametrize("head", ["own", "shared"])
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exits_are_hashed_from_files_as_they_are_once_loaded(
    base, tmp_path, arch, head, reduced, dtype
):
    model = EarlyExitModel.from_base(base, ExitConfig([2, 3], arch=arch, head=head))
    if reduced:
        model.reduce_vocabulary(torch.arange(0, 200, 3))
    model.save_pretrained(tmp_path)
    model = EarlyExitModel.from_pretrained(str(tmp_path), dtype=dtype)
    told = {} if reduced and head == "shared" else {k: exit_hash(model.exit(k)) for k in (2, 3)}
    assert stored_hashes(tmp_path, read_exit_config(tmp_path), [2, 3], dtype) == told


@pytest.mark.parametrize("risk", ["nll", "text"])
def test_other_risks(folder, risk, tmp_path):
    shutil.copytree(folder / "exits", tmp_path / "exits")
    main(arguments(folder, risk=risk, exits=tmp_path / "exits", order="pareto", prompts=30))
    saved = json.loads((tmp_path / "exits" / "calibration.json").read_text())
    assert saved["risk"] == risk
    assert saved["path"]
    model = EarlyExitModel.from_pretrained(str(tmp_path / "exits"))
    out = model.generate(torch.tensor([[5, 6, 7]]), threshold="calibrated", max_new_tokens=4)
    assert out.sequences.shape == (1, 7)


def test_a_task(folder, tmp_path):
    shutil.copytree(folder / "exits", tmp_path / "exits")
    random, files = np.random.default_rng(0), {}
    full = (random.random(300) < 0.8).astype(float)
    for threshold, lost in (("1", 0), ("0.9", 0.01), ("0.8", 0.03), ("0.5", 0.5)):
        scores = full * (random.random(300) >= lost)
        lines = [
            {"doc_id": n, "metrics": ["exact_match"], "exact_match": score}
            for n, score in enumerate(scores)
        ]
        files[threshold] = tmp_path / f"{threshold}.jsonl"
        files[threshold].write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = [f"{threshold}={path}" for threshold, path in files.items()]
    command = arguments(folder, data=None, exits=tmp_path / "exits", epsilon=0.1, risk="task")
    main([*command, "--samples", *samples])
    saved = json.loads((tmp_path / "exits" / "calibration.json").read_text())
    assert saved["thresholds"] == {"2": 0.8, "3": 0.8}
    assert (saved["test"], saved["n"]) == ("binomial", 240)


def test_where_nothing_passes_the_answer_is_1(folder, tmp_path, capsys):
    shutil.copytree(folder / "exits", tmp_path / "exits")
    full, bad = tmp_path / "full.jsonl", tmp_path / "bad.jsonl"
    for path, score in ((full, 1.0), (bad, 0.0)):
        lines = [{"doc_id": n, "metrics": ["acc"], "acc": score} for n in range(50)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = arguments(folder, data=None, exits=tmp_path / "exits", epsilon=0.1, risk="task")
    main([*command, "--samples", f"1={full}", f"0.9={bad}"])
    assert "the answer is 1" in capsys.readouterr().out
    model = EarlyExitModel.from_pretrained(str(tmp_path / "exits"))
    assert model.calibration.thresholds == {2: 1.0, 3: 1.0}
    out = model.generate(torch.tensor([[5, 6, 7]]), threshold="calibrated", max_new_tokens=4)
    assert out.exit_layers.tolist() == [[4] * 4]


def test_refusals(folder, tmp_path, capsys):
    def refused(*more, **changes):
        return fails(capsys, *arguments(folder, **({"exits": tmp_path / "exits"} | changes)), *more)

    shutil.copytree(folder / "exits", tmp_path / "exits")
    (tmp_path / "exits" / "calibration.json").unlink(missing_ok=True)
    assert "takes 308 prompts" in (line := refused(epsilon=0.01, delta=0.05))
    assert "770 in all, and there are 60" in line
    assert "epsilon 1.5 is not between 0 and 1" in refused(epsilon=1.5)
    assert "delta 0 is not between 0 and 1" in refused(delta=0)
    assert "no data given" in refused(data=None)
    assert "needs lm-eval's sample files" in refused(risk="task", data=None)
    assert "for --risk task" in refused("--samples", "1=a", "0.9=b")
    assert "leave --data out" in refused("--samples", "1=a", "0.9=b", risk="task")
    assert "prompt_tokens is 0" in refused(**{"prompt-tokens": 0})
    run = {"data": [str(folder / "prompts.jsonl")]}
    (tmp_path / "exits" / "run.yaml").write_text(json.dumps(run))
    assert "60 of 60 prompts are in" in refused()
    assert not (tmp_path / "exits" / "calibration.json").exists()


def test_prompts_are_taken_once_and_of_all_sources(folder, tmp_path, capsys):
    shutil.copytree(folder / "exits", tmp_path / "exits")
    double = tmp_path / "double.jsonl"
    double.write_text((folder / "prompts.jsonl").read_text() * 2)
    main(arguments(folder, exits=tmp_path / "exits", data=double))
    assert "60 records are left out: there before" in capsys.readouterr().err
