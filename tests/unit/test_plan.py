"""The planner against the measured runs in benchmarks/results, and what it says and refuses."""

import dataclasses
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.commands import tune
from helpers.families import tiny
from shapes import SHAPES
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.cli import main
from ee_tuning.config import TuneConfig
from ee_tuning.devices import GIB
from ee_tuning.errors import UserError
from ee_tuning.loading import empty_backbone
from ee_tuning.plan.advice import refuse_if_too_large
from ee_tuning.plan.check import check
from ee_tuning.plan.gpus import GPUS, LAUNCH
from ee_tuning.plan.memory import largest_stage, memory
from ee_tuning.plan.shapes import account_of, shapes_of
from ee_tuning.plan.time import seconds_of_parts, step_seconds

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

MEASURED = {
    path.stem: result
    for path in sorted((BENCHMARKS / "results").glob("*.json"))
    if "peak_gib" in (result := json.loads(path.read_text()))
}


@pytest.mark.parametrize("name", MEASURED)
def test_predictions_are_near_what_was_measured(name):
    """15% for memory, 30% for time, as docs/efficiency.md says."""
    result = MEASURED[name]
    gpu = next(gpu for name, gpu in GPUS.items() if name.upper() in result["hardware"].split())
    given, known = result["settings"], {f.name: f.default for f in dataclasses.fields(TuneConfig)}
    known["exit_vocab"] = 0  # a number in every result
    same = {k: type(known[k])(v) for k, v in given.items() if k in known}
    config = TuneConfig(**same)
    account = account_of(shaped(given["shape"], config), config)
    parts = memory(account, config, range(account.deepest))
    assert sum(parts.values()) / GIB == pytest.approx(result["peak_gib"], rel=0.15)
    median = result["tokens_per_second"]["median"]
    assert tokens_per_second(account, config, gpu) == pytest.approx(median, rel=0.3)


def shaped(name, config):
    """A model of a shape of benchmarks/shapes.py, without weights."""
    with torch.device("meta"):
        backbone = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[name]))
        return EarlyExitModel(backbone, ExitConfig(config.layers, config.arch, head=config.head))


def tokens_per_second(account, config, gpu):
    tokens = config.global_batch_size * config.seq_length
    return tokens / sum(step_seconds(account, config, gpu).values())


def test_memory_of_a_pipeline_is_what_was_measured():
    """Of the fuller one of two stages, on two GPUs."""
    result = json.loads((BENCHMARKS / "results/parallel-gpu-pp.json").read_text())
    given = result["settings"]
    sizes = {k: int(given[k]) for k in ("seq_length", "micro_batch_size", "global_batch_size")}
    config = TuneConfig(layers=given["layers"], head=given["head"], pp=2, **sizes)
    account = account_of(shaped(given["shape"], config), config)
    expected = sum(largest_stage(account, config).values()) / GIB
    assert expected == pytest.approx(max(result["layouts"]["pp2"]["peak_gib"]), rel=0.15)


def test_a_small_model_is_as_fast_as_its_products_are_started():
    """From FLOP alone it would be ten times as fast; 135m-*.json of the results were measured."""
    config = TuneConfig(layers="10,15,20", micro_batch_size=1)
    account = account_of(shaped("smollm2-135m", config), config)
    two = replace(config, layers="10,20")
    fewer = account_of(shaped("smollm2-135m", two), two)
    rates = [tokens_per_second(*one, GPUS["h100"]) for one in ((account, config), (fewer, two))]
    assert rates[0] < rates[1] < 200_000


def test_a_product_takes_no_less_for_fewer_tokens():
    config = TuneConfig(layers="10,20", seq_length=1, global_batch_size=1)
    account = account_of(shaped("smollm2-135m", config), config)
    taken = step_seconds(account, config, GPUS["h100"])
    assert taken["backbone"] == pytest.approx(20 * 7 * LAUNCH["frozen"])
    assert taken["exits"] == pytest.approx(2 * (3 + 4) * LAUNCH["tuned"])
    assert taken["heads"] == pytest.approx(2 * 3 * LAUNCH["tuned"])
    parts = seconds_of_parts(account, config, GPUS["h100"])
    assert parts.layer == pytest.approx(parts.least_layer)
    assert parts.exit == pytest.approx(parts.least_exit)


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
    for asked, said in (
        ("--steps 10 --seq-length 64", r"1.02e\+04 tokens take \d\.\d minutes"),
        ("--steps 10 --tokens 3e12", r"3e\+12 tokens take \d+\.\d hours"),
    ):
        main([*common, *asked.split()])
        assert re.search(said, " ".join(capsys.readouterr().out.split()))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--gpu abacus", "gpu 'abacus' is unknown: use one of b200"),
        ("--gpus 3 --pp 2", "3 GPUs cannot be divided into 2 pipeline stages"),
        ("--gpus 6 --tp 4", "6 GPUs cannot be divided into 1 pipeline stages of 4"),
        ("--gpus 3 --tp 3", "tp is 3: it must divide the backbone's vocab_size"),
        ("--gpus 2 --shard", "plan knows neither --shard nor --shard-backbone"),
        ("--gpus 0", "gpus is 0: it must be at least 1"),
        ("--tp 0", "tp is 0: it must be at least 1"),
        ("--gpus 2 --dp 4", "dp 4 × tp 1 × pp 1 is 4, not gpus, 2: leave --dp out, or"),
        ("--tokens -5", "tokens is -5.0: it must be at least 0"),
        ("--global-batch-size 0", "global_batch_size is 0: it must be at least 1"),
        ("--seq-length 0", "seq_length is 0: it must be at least 1"),
        ("--micro-batch-size 0", "micro_batch_size is 0: it must be at least 1"),
        ("--eval-batches 0", "eval_batches is 0: it must be at least 1"),
        ("--eval-every -1", "eval_every is -1: it must be at least 0"),
        ("--save-every -1", "save_every is -1: it must be at least 0"),
        ("--min-lr -1", "min_lr is -1.0: the learning rate falls to it from lr, so it must be"),
        ("--min-lr 1e-3 --lr 5e-4", "min_lr is 0.001: the learning rate falls to it from lr, so"),
        ("--loss-weight-start -1", "loss_weight_start is -1.0: it must be at least 0"),
        ("--loss-weight-warmup -1", "loss_weight_warmup is -1: it must be at least 0"),
        ("--loss-weights=-1", "loss_weights are [-1.0]: each must be at least 0"),
        ("--warmup -1", "warmup is -1.0: it must be at least 0"),
        ("--weight-decay -1", "weight_decay is -1.0: it must be at least 0"),
        ("--clip -1", "clip is -1.0: it must be at least 0"),
        ("--gpus 2 --tp 2 --exit-vocab 999", "tp is 2: it must divide the tokens that exits know"),
        ("--gpus 32", "global_batch_size 16 is less than dp 32"),
        ("--stage-layers 16 16", "stage_layers needs --pp"),
        ("--master-weights bf16", "master_weights bf16 needs an optimizer that rounds"),
        (
            "--master-weights bf16 --optimizer adamw-8bit --precision fp32",
            "master_weights bf16 needs --precision bf16",
        ),
        ("--seq-length 99999", "seq_length 99999 is beyond the backbone's context of 2048"),
        ("--exit-vocab 99999999", "exit_vocab is 99999999: it must be between 1 and 32000"),
        ("--loss-weights 1 2", "2 loss_weights, exits: 1; give one each"),
        ("--arch embedding --head shared", "nothing to tune"),
        ("--exits some/exits", "give either --exits or --layers"),
    ],
)
def test_plan_refuses(flags, message, large, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--model", large, "--layers", "8", *flags.split()])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_backbone_without_linear_layers_cannot_be_quantised(tmp_path, capsys):
    GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path)
    common = ["plan", "--model", str(tmp_path), "--layers", "4", "--seq-length", "512"]
    with pytest.raises(SystemExit):
        main([*common, "--backbone-precision", "fp8"])
    assert "have no linear matrices that could be kept in fp8" in capsys.readouterr().err
    config = TuneConfig(model=str(tmp_path), layers="4", seq_length=512)
    with pytest.raises(UserError) as refusal:
        refuse_if_too_large(shapes_of(config), config, 0.1)
    assert "--optimizer adamw-8bit" in str(refusal.value)
    assert "--backbone-precision" not in str(refusal.value)


def test_the_memory_of_a_tiny_model_is_not_nothing(tmp_path, capsys):
    tiny("llama").save_pretrained(tmp_path)
    flags = ["--model", str(tmp_path), "--layers", "2", "--seq-length", "32"]
    main(["plan", *flags, "--gpu", "h100", "--gpus", "2"])
    out = capsys.readouterr().out
    assert " 0.0 GiB" not in out
    assert re.search(r"sum +│ +\d+\.\d MiB of 79 GiB", out)
    assert re.search(r"1 × 1 × 2 │ .* │ \d+\.\d MiB │", out)
    config = TuneConfig(model=str(tmp_path), layers="2", seq_length=32)
    with pytest.raises(UserError, match=r"about .* MiB, .* MiB more than the GPU has"):
        refuse_if_too_large(shapes_of(config), config, 1e-6)


def test_the_ranks_given_are_those_of_the_gpus(large, capsys):
    common = ["plan", "--model", large, "--layers", "8", "--gpus", "4", "--tp", "2"]
    main(common)
    without = capsys.readouterr().out
    main([*common, "--dp", "2"])
    assert capsys.readouterr().out == without


@pytest.mark.parametrize("precision", ["backbone", "exit"])
def test_plan_says_that_a_gpu_has_no_fp8_units(precision, large, capsys):
    common = ["plan", "--model", large, "--layers", "8", f"--{precision}-precision", "fp8"]
    main([*common, "--gpu", "3090"])
    out = " ".join(capsys.readouterr().out.split())
    instead = {"backbone": "torchao-int8", "exit": "same"}[precision]
    assert "3090 has no fp8 units, so tune refuses" in out
    assert f"use --{precision}-precision {instead}" in out
    main([*common, "--gpu", "4090"])
    assert "no fp8 units" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "never"),
    [
        ({"tp": 2}, []),
        ({"precision": "fp32"}, ["--master-weights"]),
        ({"arch": "embedding"}, ["--head shared"]),
    ],
)
def test_advice_is_what_tune_takes(settings, never, large):
    """Its flags, each with those before it, pass what `tune` checks."""
    config = TuneConfig(model=large, layers="8", seq_length=512, micro_batch_size=2)
    config = replace(config, **settings)
    with pytest.raises(UserError) as refusal:
        refuse_if_too_large(shapes_of(config), config, 0.1)
    advised = str(refusal.value).split("not even with ")[1]
    assert "--micro-batch-size 1" in advised
    for flag in never:
        assert flag not in advised
    words = advised.split(":")[0].split()
    names = [word.removeprefix("--").replace("-", "_") for word in words[::2]]
    changes = dict(zip(names, words[1::2], strict=True))
    changes["micro_batch_size"] = int(changes["micro_batch_size"])
    check(replace(config, data=["a.jsonl"], **changes))


def test_fp32_takes_more_memory_and_time(large):
    config = TuneConfig(model=large, layers="8,32", micro_batch_size=4)
    model = shapes_of(config)
    account = account_of(model, config)
    wide = replace(config, precision="fp32")
    half, whole = (memory(account, c, range(32)) for c in (config, wide))
    for part in ("backbone", "activations", "logits"):
        assert whole[part] == 2 * half[part]
    for part in ("exits' weights", "optimizer state"):
        assert whole[part] == half[part]
    assert memory(account, replace(config, precision="bf16"), range(32)) == half
    eight = replace(wide, backbone_precision="torchao-int8")
    layers = sum(layer.values for layer in account.layers)
    fewer = whole["backbone"] - memory(account, eight, range(32))["backbone"]
    assert fewer == pytest.approx(3 * layers)
    fast, slow = (step_seconds(account, c, GPUS["h100"]) for c in (config, wide))
    for part in ("backbone", "exits", "heads"):
        assert slow[part] / fast[part] == pytest.approx(989 / 67)
    assert slow["optimizer"] == fast["optimizer"]
    available = sum(half.values()) / GIB + 1
    refuse_if_too_large(shapes_of(config), config, available)
    with pytest.raises(UserError, match="more than the GPU has"):
        refuse_if_too_large(model, wide, available)


@pytest.mark.parametrize("head", ["own", "shared"])
def test_saved_exits_keep_their_vocabulary(head, tmp_path, capsys):
    base, exits = tmp_path / "base", tmp_path / "exits"
    tiny("llama").save_pretrained(base)
    model = EarlyExitModel.from_base(str(base), ExitConfig("2,4", "mlp", head=head))
    model.reduce_vocabulary(torch.arange(32))
    model.save_pretrained(exits)
    common = ["plan", "--seq-length", "32"]
    main([*common, "--exits", str(exits)])
    shown = capsys.readouterr().out
    new = TuneConfig(model=str(base), layers="2,4", head=head, seq_length=32)
    old = TuneConfig(exits=str(exits), seq_length=32)
    known = replace(new, exit_vocab=32)
    assert _predicted(old) == _predicted(known)
    assert _predicted(old) == _predicted(replace(old, exit_vocab=32))
    assert _predicted(old) != _predicted(new)
    main([*common, "--model", str(base), "--layers", "2,4", "--head", head, "--exit-vocab", "32"])
    assert capsys.readouterr().out == shown
    with pytest.raises(SystemExit):
        main([*common, "--exits", str(exits), "--exit-vocab", "16"])
    assert "exit_vocab is 16: the exits in" in capsys.readouterr().err
    saved = json.loads((exits / "exit_config.json").read_text()) | {"base_model": "."}
    (base / "exit_config.json").write_text(json.dumps(saved))
    assert _predicted(replace(old, exits=str(base))) == _predicted(old)


def _predicted(config):
    model = shapes_of(config)
    account = account_of(model, config)
    return largest_stage(account, config), step_seconds(account, config, GPUS["h200"])


def test_the_docs_show_what_was_measured():
    import table

    for name in table.TABLES:
        text = (table.DOCS / name).read_text()
        assert table.updated(text, name) == text


def test_a_stage_needs_less_than_the_whole(large):
    config = TuneConfig(model=large, layers="every:8")
    model = shapes_of(config)
    account = account_of(model, config)
    whole = memory(account, config, range(32))
    half = memory(account, config, range(16, 32))
    assert half["backbone"] < 0.6 * whole["backbone"]
    assert half["optimizer state"] == whole["optimizer state"] / 2


def test_quantised_backbones_take_what_they_keep(large):
    config = TuneConfig(model=large, layers="32")
    model = shapes_of(config)
    account = account_of(model, config)
    taken = {
        precision: memory(account, replace(config, backbone_precision=precision), range(32))
        for precision in ("same", "fp8", "torchao-int8", "bnb-8bit", "bnb-4bit")
    }
    layers = sum(layer.values for layer in account.layers)
    per_weight = {"same": 2, "fp8": 1, "torchao-int8": 1, "bnb-8bit": 1, "bnb-4bit": 0.5625}
    for precision, parts in taken.items():
        saved = taken["same"]["backbone"] - parts["backbone"]
        assert saved == pytest.approx((2 - per_weight[precision]) * layers)
        assert {**parts, "backbone": 0} == {**taken["same"], "backbone": 0}


@pytest.mark.parametrize("loss", ["kl", "mixed"])
def test_distillation_takes_the_whole_backbone(loss, large):
    config = TuneConfig(model=large, layers="8", seq_length=512)
    model = shapes_of(config)
    account = account_of(model, config)
    shallow, whole = (largest_stage(account, replace(config, loss=x)) for x in ("ce", loss))
    quarter = sum(layer.values for layer in account.layers[:8])
    assert whole["backbone"] - shallow["backbone"] == pytest.approx(3 * 2 * quarter)
    seconds = [step_seconds(account, replace(config, loss=x), GPUS["h200"]) for x in ("ce", loss)]
    assert seconds[1]["backbone"] == pytest.approx(4 * seconds[0]["backbone"])
    available = (sum(shallow.values()) + sum(whole.values())) / 2 / GIB
    refuse_if_too_large(shapes_of(config), config, available)
    with pytest.raises(UserError, match="more than the GPU has"):
        refuse_if_too_large(model, replace(config, loss=loss), available)


def test_a_mixture_of_experts_is_as_fast_as_its_active_experts(tmp_path, capsys):
    """Of 8 experts all are in memory, and 2 take time."""
    sizes = {"hidden_size": 1024, "num_attention_heads": 8, "num_hidden_layers": 4, "vocab_size": 9}
    experts = MixtralConfig(**sizes, intermediate_size=2048, num_local_experts=8)
    dense = LlamaConfig(**sizes, intermediate_size=4096)
    found = []
    for folder, backbone in (("experts", experts), ("dense", dense)):
        backbone.save_pretrained(tmp_path / folder)
        config = TuneConfig(model=str(tmp_path / folder), layers="4", arch="norm")
        account = account_of(shapes_of(config), config)
        found.append((account.layers[0].values, account.flop()["backbone"]))
    (all_experts, flop), (active, dense_flop) = found
    assert all_experts > 3 * active
    assert flop == pytest.approx(dense_flop, rel=0.2)  # keys and values are of another number
    main(["plan", "--model", str(tmp_path / "experts"), "--layers", "4", "--arch", "norm"])
    assert "it fits" in capsys.readouterr().out


def test_the_shapes_of_a_run_are_built_once(large, base, data, tmp_path, monkeypatch, capsys):
    built = []

    def counted(path, *rest):
        built.append(path)
        return empty_backbone(path, *rest)

    monkeypatch.setattr("ee_tuning.share.empty_backbone", counted)
    main(["plan", "--model", large, "--layers", "every:8", "--gpus", "8"])
    assert built == [large]
    assert "best layouts of 8 GPUs" in capsys.readouterr().out
    built.clear()
    tune(base, data, tmp_path / "exits", steps=1)
    assert built == [base]


def test_what_does_not_fit_is_refused_with_the_figure(large):
    config = TuneConfig(model=large, layers="1/8,1/4", seq_length=512)
    refuse_if_too_large(shapes_of(config), config, 80.0)
    with pytest.raises(UserError, match=r"needs about .* GiB, .* more than the GPU has; it would"):
        refuse_if_too_large(shapes_of(config), config, 9.0)
    with pytest.raises(UserError, match="not even with"):
        refuse_if_too_large(shapes_of(config), config, 1.0)
