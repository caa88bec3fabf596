"""`calibrate` and `evaluate` as several processes give what one gives."""

import json
import shutil

import pytest
import torch
from helpers.ranks import launch

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.calibrate.config import CalibrateConfig
from ee_tuning.calibrate.run import calibrate
from ee_tuning.commands.evaluate import evaluate
from ee_tuning.config import EvaluateConfig

COMMON = {"exit_layers": "2,3", "device": "cpu", "max_new_tokens": 6}
CALIBRATE = COMMON | {"epsilon": 0.9, "delta": 0.2, "prompt_tokens": 4, "slots": 4}
EVALUATE = COMMON | {
    "thresholds": "1,0.01", "seq_length": 32, "max_tokens": 480, "prompts": 3, "prompt_length": 8,
    "rounds": 1, "micro_batch_size": 2,
}  # fmt: skip
LAYOUTS = {"split": "tp", "staged": "pp", "dealt": "dp"}
ROWS = (
    "mean_depth", "next_token_agreement", "text_agreement", "text_interval", "shares",
    "identical_texts",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(base, data, tmp_path_factory):
    """The same exits once for one process, once for two, and what these wrote."""
    torch.set_num_threads(1)  # as in the ranks, so that all sums are in one order
    folder = tmp_path_factory.mktemp("shared")
    exits = ExitConfig([2, 3], arch="norm")
    EarlyExitModel.from_base(base, exits).save_pretrained(folder / "one")
    lines = [{"text": f"{n} def total(value): return value + {n}"} for n in range(40)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "prompts.jsonl").write_text(text)
    shutil.copytree(folder / "one", folder / "two")
    cases = []
    for risk in ("nll", "text"):
        settings = CALIBRATE | {"risk": risk, "data": [str(folder / "prompts.jsonl")]}
        for name in ("one", "two"):  # a folder keeps one certificate
            shutil.copytree(folder / name, folder / f"{name}-{risk}")
        calibrate(CalibrateConfig(**settings, exits=str(folder / f"one-{risk}")))
        several = settings | {"exits": str(folder / f"two-{risk}"), "dp": 2, "timeout": 120.0}
        cases.append({"command": "calibrate", "settings": several})
    settings = EVALUATE | {"data": [data]}
    evaluate(EvaluateConfig(**settings, exits=str(folder / "one")))
    several = settings | {"exits": str(folder / "two"), "dp": 2, "timeout": 120.0}
    cases.append({"command": "evaluate", "settings": several})
    both = settings | {"exits": str(folder / "one"), "out": str(folder / "split")}
    both |= {"dp": 2, "tp": 2, "timeout": 60.0}
    cases.append({"command": "evaluate", "settings": both})
    settings = CALIBRATE | {"risk": "nll", "data": [str(folder / "prompts.jsonl")]}
    shutil.copytree(folder / "two", folder / "split-nll")
    split = settings | {"exits": str(folder / "split-nll"), "tp": 2, "timeout": 60.0}
    cases.append({"command": "calibrate", "settings": split})
    shutil.copytree(folder / "two", folder / "staged-nll")
    staged = settings | {"exits": str(folder / "staged-nll"), "pp": 2, "timeout": 60.0}
    cases.append({"command": "calibrate", "settings": staged})
    shutil.copytree(folder / "one-nll", folder / "changed")
    certificate = json.loads((folder / "changed/calibration.json").read_text())
    certificate["exits"]["3"] = "of other weights"
    (folder / "changed/calibration.json").write_text(json.dumps(certificate))
    held = {"one-nll": ["one-nll"] * 2, "changed": ["changed"] * 2, "other": ["one-nll", "one"]}
    for name, read in held.items():
        for layout, axis in LAYOUTS.items():
            if name == "other" and layout == "dealt":  # each has a model of its own
                continue
            exits, out = [str(folder / one) for one in read], str(folder / f"{name}-{layout}")
            ranks = {"dp": 1, "tp": 1, "pp": 1, axis: 2}
            cases.append({"command": "certified", "settings": ranks | {"exits": exits, "out": out}})
    launch("helpers.launch_shared", cases, folder)
    return folder


@pytest.mark.parametrize("risk", ["nll", "text"])
def test_a_certificate_does_not_depend_on_the_number_of_processes(folder, risk):
    one, two = (
        json.loads((folder / f"{name}-{risk}/calibration.json").read_text())
        for name in ("one", "two")
    )
    assert one["path"]
    assert one == two


def test_what_is_measured_does_not_depend_on_it_either(folder):
    """But for what takes time. Of three prompts, one process has two."""
    one, two = (
        json.loads((folder / name / "evaluation.json").read_text()) for name in ("one", "two")
    )
    for key in ("exit_rows", "unknown_targets", "data_tokens", "samples", "prompts"):
        assert one[key] == two[key], key
    for a, b in zip(one["threshold_rows"], two["threshold_rows"], strict=True):
        for key in ROWS:
            assert a[key] == b[key], key
        assert b["speed"]["median"] > 0


def test_ranks_that_share_model_and_data_measure_what_one_process_does(folder):
    """But for the order of sums."""
    one, split = (
        json.loads((folder / name / "evaluation.json").read_text()) for name in ("one", "split")
    )
    for a, b in zip(one["exit_rows"], split["exit_rows"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["agreement"] == b["agreement"]
    for a, b in zip(one["threshold_rows"], split["threshold_rows"], strict=True):
        assert {key: a[key] for key in ROWS} == {key: b[key] for key in ROWS}
        assert b["speed"]["median"] > 0


@pytest.mark.parametrize("layout", ["split", "staged"])
def test_ranks_that_share_the_model_find_the_same_certificate(folder, layout):
    """But for the order of sums; it holds for the same exits."""
    one, split = (
        json.loads((folder / f"{name}-nll/calibration.json").read_text())
        for name in ("one", layout)
    )
    assert split["tested"] == pytest.approx(one["tested"], rel=1e-4)
    assert split["thresholds"] == pytest.approx(one["thresholds"], rel=1e-3)
    summed = {"thresholds", "path", "p", "beside", "tested", "report"}
    assert {k: v for k, v in split.items() if k not in summed} == {
        k: v for k, v in one.items() if k not in summed
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_rank_sees_whether_calibrated_exits_are_the_same(folder, layout):
    """Those of other ranks, too: all have to decide alike."""
    for rank in (0, 1):
        assert json.loads((folder / f"one-nll-{layout}-{rank}.json").read_text()) == [
            "threshold",
            [],
        ]
        mode, notices = json.loads((folder / f"changed-{layout}-{rank}.json").read_text())
        assert mode == "full"
        assert ["the exit at layer 3 is another one now" in one for one in notices] == [True]
        if layout == "dealt":
            continue
        # Of which one rank alone has a certificate.
        assert json.loads((folder / f"other-{layout}-{rank}.json").read_text()) == [
            "refused",
            ["rank 1 has other calibration than rank 0: give every process the same"],
        ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_exits_changed_in_memory_have_no_certificate_on_any_rank(folder, layout):
    """A process that has them alone says so; those that share them refuse, and do not save."""
    for rank in (0, 1):
        used, saved = json.loads((folder / f"one-nll-{layout}-{rank}-later.json").read_text())
        if layout == "dealt":
            assert (used, saved) == ("full", None)
            assert not (folder / f"one-nll-{layout}-{rank}/calibration.json").exists()
            continue
        layer = 3 if (layout, rank) == ("staged", 1) else 2
        assert used.startswith(f"the exit at layer {layer}, which several processes share, was ch")
        assert "this process has a part of them" in saved
        assert not (folder / f"one-nll-{layout}-{rank}").exists()
