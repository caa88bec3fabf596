"""The planner against the measured runs in benchmarks/results, and what it says and refuses."""

import dataclasses
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.cli import main
from ee_tuning.config import TuneConfig
from ee_tuning.errors import UserError
from ee_tuning.plan import (
    GIB,
    GPUS,
    largest_stage,
    memory,
    refuse_if_too_large,
    shapes_of,
    step_seconds,
)

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from shapes import SHAPES  # noqa: E402

MEASURED = {
    path.stem: result
    for path in sorted((BENCHMARKS / "results").glob("*.json"))
    if "peak_gib" in (result := json.loads(path.read_text()))
}


@pytest.mark.parametrize("name", MEASURED)
def test_predictions_are_near_what_was_measured(name):
    """15% for memory, 30% for time, as the README promises."""
    result = MEASURED[name]
    gpu = next(gpu for name, gpu in GPUS.items() if name.upper() in result["hardware"].split())
    given, known = result["settings"], {f.name: f.default for f in dataclasses.fields(TuneConfig)}
    same = {k: type(known[k])(v) for k, v in given.items() if k in known}
    config = TuneConfig(**same)
    backbone = LlamaConfig(**SHAPES[given["shape"]])
    with torch.device("meta"):
        model = EarlyExitModel(
            AutoModelForCausalLM.from_config(backbone),
            ExitConfig(given["layers"], "mlp", head=given["head"]),
        )
    parts = memory(model, config, range(model.exit_layers[-1]))
    assert sum(parts.values()) / GIB == pytest.approx(result["peak_gib"], rel=0.15)
    seconds = sum(step_seconds(model, config, gpu).values())
    tokens = config.global_batch_size * config.seq_length
    assert tokens / seconds == pytest.approx(result["tokens_per_second"]["median"], rel=0.3)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    LlamaConfig(**SHAPES["llama2-7b"], architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return str(folder)


def test_plan_says_what_fits_and_what_would(large, capsys):
    common = ["plan", "--model", large, "--layers", "every:8", "--seq-length", "2048"]
    main([*common, "--gpu", "h200"])
    assert "it fits" in capsys.readouterr().out
    main([*common, "--gpu", "4090"])
    out = " ".join(capsys.readouterr().out.split())
    assert "does not fit by" in out
    flags = out.split("it would with ")[1].split()
    main([*common, "--gpu", "4090", *flags])
    assert "it fits" in capsys.readouterr().out
    main([*common, "--gpu", "3090", "--backbone-precision", "fp8"])
    out = " ".join(capsys.readouterr().out.split())
    assert "no fp8 units, so tune refuses fp8 there: use --backbone-precision torchao-int8" in out
    main([*common, "--gpu", "3090"])
    out = " ".join(capsys.readouterr().out.split())
    assert "--backbone-precision torchao-int8" in out.split("it would with ")[1]
    main([*common, "--gpu", "4090", "--backbone-precision", "bnb-4bit", "--head", "shared"])
    assert "fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--gpu abacus", "gpu 'abacus' is unknown: use one of b200"),
        ("--gpus 3 --pp 2", "3 GPUs cannot be divided into 2 pipeline stages"),
        ("--gpus 6 --tp 4", "6 GPUs cannot be divided into 1 pipeline stages of 4"),
        ("--gpus 3 --tp 3", "tp is 3: it must divide the backbone's vocab_size"),
        ("--gpus 2 --shard", "plan knows neither --shard nor --shard-backbone"),
    ],
)
def test_plan_refuses(flags, message, large, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--model", large, "--layers", "8", *flags.split()])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_docs_show_what_was_measured():
    import table

    for name in table.TABLES:
        text = (table.DOCS / name).read_text()
        assert table.updated(text, name) == text


def test_a_stage_needs_less_than_the_whole(large):
    config = TuneConfig(model=large, layers="every:8")
    model = shapes_of(config)
    whole = memory(model, config, range(32))
    half = memory(model, config, range(16, 32))
    assert half["backbone"] < 0.6 * whole["backbone"]
    assert half["optimizer state"] == whole["optimizer state"] / 2


def test_quantised_backbones_take_what_they_keep(large):
    config = TuneConfig(model=large, layers="32")
    model = shapes_of(config)
    taken = {
        precision: memory(model, replace(config, backbone_precision=precision), range(32))
        for precision in ("same", "fp8", "torchao-int8", "bnb-8bit", "bnb-4bit")
    }
    layers = sum(p.numel() for p in model.backbone.layers.parameters())
    per_weight = {"same": 2, "fp8": 1, "torchao-int8": 1, "bnb-8bit": 1, "bnb-4bit": 0.5625}
    for precision, parts in taken.items():
        saved = taken["same"]["backbone"] - parts["backbone"]
        assert saved == pytest.approx((2 - per_weight[precision]) * layers)
        assert {**parts, "backbone": 0} == {**taken["same"], "backbone": 0}


@pytest.mark.parametrize("loss", ["kl", "mixed"])
def test_distillation_takes_the_whole_backbone(loss, large):
    config = TuneConfig(model=large, layers="8", seq_length=512)
    model = shapes_of(config)
    shallow, whole = (largest_stage(model, replace(config, loss=x)) for x in ("ce", loss))
    quarter = sum(p.numel() for p in model.backbone.layers[:8].parameters())
    assert whole["backbone"] - shallow["backbone"] == pytest.approx(3 * 2 * quarter)
    seconds = [step_seconds(model, replace(config, loss=x), GPUS["h200"]) for x in ("ce", loss)]
    assert seconds[1]["backbone"] == pytest.approx(4 * seconds[0]["backbone"])
    available = (sum(shallow.values()) + sum(whole.values())) / 2 / GIB
    refuse_if_too_large(config, available)
    with pytest.raises(UserError, match="more than the GPU has"):
        refuse_if_too_large(replace(config, loss=loss), available)


def test_what_does_not_fit_is_refused_with_the_figure(large):
    config = TuneConfig(model=large, layers="1/8,1/4", seq_length=512)
    refuse_if_too_large(config, 80.0)
    with pytest.raises(UserError, match=r"needs about .* GiB, .* more than the GPU has; it would"):
        refuse_if_too_large(config, 9.0)
    with pytest.raises(UserError, match="not even with"):
        refuse_if_too_large(config, 1.0)
