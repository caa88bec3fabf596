"""Decoding over several processes gives what one process gives."""

import os
import re
import subprocess
import sys

import pytest
import torch
from helpers import launch_decoding
from helpers.commands import PATIENCE
from helpers.families import tiny
from helpers.models import drafting
from rich.console import Console

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.cli import main
from ee_tuning.commands.generate import generate
from ee_tuning.config import GenerateConfig

CALLS = [
    {"mode": "full"},
    {"mode": "fixed", "exit_layers": [2]},
    *[{"threshold": threshold} for threshold in (0.0, 0.5, 0.8, 1.0)],
    {"threshold": 0.0, "max_pending": 2, "alone": True},
    {"threshold": {1: 1.0, 2: 0.5, 4: 0.0}, "repetition_penalty": 1.5, "alone": True},
    {"threshold": 0.3, "do_sample": True},
    {"threshold": 0.3, "do_sample": True, "alone": True},
]
LAYOUTS = {
    "pp2": ("llama", {"pp": 2}), "pp3": ("llama", {"pp": 3, "stage_layers": [1, 2, 2]}),
    "tp2": ("llama", {"tp": 2}), "tp2-compiled": ("llama", {"tp": 2, "backend": "aot_eager"}),
    "both": ("llama", {"tp": 2, "pp": 2}),
    "relay": ("llama", {"pp": 3, "stage_layers": [1, 2, 2]}),
    "relay-both": ("llama", {"tp": 2, "pp": 2}),
    "tied-pp2": ("tied", {"pp": 2}), "tied-tp2": ("tied", {"tp": 2}),
    "stablelm-tp2": ("stablelm", {"tp": 2}),
    "drafts-tp2": ("drafts", {"tp": 2}),
    "drafts-tp2-compiled": ("drafts", {"tp": 2, "backend": "aot_eager"}),
    "eagle3-tp2": ("eagle3", {"tp": 2}), "eagle3-pp2": ("eagle3", {"pp": 2}),
    "drafts-pp3": ("drafts", {"pp": 3, "stage_layers": [1, 1, 2]}),
    "drafts-half": ("drafts", {"pp": 2, "dtype": "bfloat16"}),
    "drafts-pp2-compiled": ("drafts", {"pp": 2, "backend": "aot_eager"}),
    "drafts-both": ("drafts", {"tp": 2, "pp": 2}),
    "gpt2-pp3": ("gpt2", {"pp": 3}), "windows-pp2": ("windows", {"pp": 2}),
}  # fmt: skip
ALONE = {"alone": True, "max_new_tokens": 10, "eos_token_id": None}
AHEAD = [
    {"threshold": 0.5, **ALONE},
    {"threshold": {1: 1.0, 2: 0.0, 4: 0.0}, "max_pending": 2, **ALONE},
    {"mode": "full", "compile": True, **ALONE},  # one segment to trace
]  # fmt: skip
END = 23  # a token that some texts have


def calls_of(name):
    """Fewer of the layouts that take long."""
    few = [CALLS[1], CALLS[3], CALLS[-2]]
    drafts = {"mode": "speculative", "threshold": 0.5}
    if name.startswith(("drafts", "eagle3")):
        chains = [{"mode": "speculative", "threshold": bar, "max_pending": 4} for bar in (0.0, 0.3)]
        if name in ("drafts-tp2", "drafts-pp3"):
            return [*chains, chains[1] | {"do_sample": True}]
        if name.startswith("eagle3"):
            return chains[:1]
        if name == "drafts-half":
            return [chains[1], chains[1] | {"lookup": True}, chains[1] | {"alone": True}]
        return [chains[1] | {"alone": True, "compile": name.endswith("compiled")}]
    if name == "relay":
        warped = {"do_sample": True, "temperature": 0.7, "repetition_penalty": 1.2}
        alone = {"exit_layers": [1], "alone": True}
        return [drafts, drafts | warped, drafts | alone, drafts | {"threshold": 1, "lookup": True}]
    if name == "relay-both":
        return [drafts | {"alone": True}]
    if name == "tp2-compiled":  # a row alone: the fewest sizes to trace
        compiled = {"alone": True, "compile": True, "max_pending": 3}  # one engine for both
        return [call | compiled for call in (CALLS[3], drafts)]
    texts = drafts | {"threshold": 1, "lookup": True}
    return CALLS if name in ("pp2", "pp3") else [*few, drafts, texts] if name == "tp2" else few


@pytest.fixture(scope="module")
def exits(backbones, tokenizer, tmp_path_factory):
    """Exits of models by name, made to be sure of some tokens."""
    root = tmp_path_factory.mktemp("exits")
    hybrid = ["sliding_attention", "full_attention"] * 2 + ["full_attention"]
    windows = tiny("gemma3", num_hidden_layers=5, vocab_size=300, layer_types=hybrid)
    windows.save_pretrained(backbones / "windows")
    narrow = tiny("llama", num_hidden_layers=1, num_key_value_heads=1, vocab_size=300)
    narrow.save_pretrained(backbones / "narrow")
    for name in ("llama", "tied", "gpt2", "windows", "narrow", "stablelm"):
        config = ExitConfig("1,2,4", arch=["norm", "mlp", "layer"])
        config = ExitConfig("1") if name == "narrow" else config
        model = EarlyExitModel.from_base(str(backbones / name), config)
        for layer in model.exit_layers:
            model.exit(layer).head.weight.data.mul_(8)
        model.save_pretrained(root / name)
    for name, family in (("drafts", "llama"), ("eagle3", "eagle3")):
        drafts = drafting.__wrapped__(family)
        drafts.model.save_pretrained(backbones / name)
        named = EarlyExitModel.from_base(str(backbones / name), drafts.exit_config)
        named.load_state_dict(drafts.state_dict())
        named.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def found(exits, tmp_path_factory):
    """What the ranks left: by case and rank."""
    folder = tmp_path_factory.mktemp("decoded")
    common = {"tp": 1, "pp": 1, "todo": "generate", "exits": str(exits / "llama")}
    more = {"max_new_tokens": 10, "eos_token_id": END}
    cases = [
        {"name": name, **common, "exits": str(exits / family), **layout,
         "calls": [call | more for call in calls_of(name)]}
        for name, (family, layout) in LAYOUTS.items()
    ]  # fmt: skip
    early = [{"threshold": 0.0, "alone": True, "max_new_tokens": 8, "eos_token_id": None}]
    few = {"threshold": 0.5, "max_new_tokens": 6}
    two = common | {"pp": 2}
    few = {"threshold": 0.5, "max_new_tokens": 6, "eos_token_id": None}
    early = few | {"threshold": 0.0, "alone": True}
    cases += [
        {"name": "batch", **two, "todo": "batch", "calls": [few]},
        {"name": "cancel", **two, "todo": "cancel", "calls": [few]},
        {"name": "overlap", **two, "stage_layers": [2, 3], "todo": "overlap",
         "calls": [early | {"file": str(folder / "begun")}]},
        {"name": "at-once", **two, "stage_layers": [1, 4], "todo": "at_once",
         "calls": [early | {"threshold": {1: 1.0, 2: 0.0, 4: 0.0}, "max_pending": 2}]},
    ]  # fmt: skip
    cases += [
        {"name": name, **common, "tp": 2, "todo": name, "backend": "aot_eager", "calls": calls}
        for name, calls in (("ahead", AHEAD), ("sums", []), ("half", []))
    ]
    show = {"exits": common["exits"], "prompt": "def function", "device": "cpu"}
    show |= {"max_new_tokens": 9}
    gpt2, narrow = ({"exits": str(exits / name)} for name in ("gpt2", "narrow"))
    settings = {
        "show": {"pp": 2}, "too-many-stages": narrow | {"pp": 2}, "heads": narrow | {"tp": 2},
        "numbers": {"pp": 2, "stage_layers": [1, 1]}, "one-stage": {"tp": 2, "stage_layers": [5]},
        "no-plan": gpt2 | {"tp": 2},
    }  # fmt: skip
    cases += [
        {"name": name, **common, **{k: v for k, v in own.items() if k in ("tp", "pp")},
         "todo": "show", "settings": show | own}
        for name, own in settings.items()
    ]  # fmt: skip
    cases += [
        {"name": "size", **two, "size": 1, "todo": "show", "settings": show | {"pp": 2}},
        {"name": "die", **two, "todo": "die", "calls": [early]},
    ]
    print(launch_decoding.start(cases, folder))
    return folder


def result(found, name, rank=0):
    error = found / f"{name}-{rank}.error"
    assert not error.exists(), error.read_text()
    return torch.load(found / f"{name}-{rank}.pt")


def whole(exits, name, dtype="auto"):
    return EarlyExitModel.from_pretrained(str(exits / name), dtype=dtype).eval()


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_gives_what_one_process_gives(found, exits, name):
    """The same tokens and layers, in every mode; confidences up to the order of sums."""
    family, layout = LAYOUTS[name]
    more = {"max_new_tokens": 10, "eos_token_id": END}
    calls = [call | more for call in calls_of(name)]
    eager = [call | {"compile": False} for call in calls]
    model = whole(exits, family, layout.get("dtype", "auto"))
    expected = launch_decoding.generate(model, eager)
    for rank in range(layout.get("tp", 1) * layout.get("pp", 1)):
        outputs = result(found, name, rank)["found"]
        for call, out, wanted in zip(calls, outputs, expected, strict=True):
            assert torch.equal(out["sequences"], wanted["sequences"]), call
            assert torch.equal(out["exit_layers"], wanted["exit_layers"]), call
            torch.testing.assert_close(
                out["confidences"], wanted["confidences"], rtol=1e-3, atol=1e-4
            )


def test_ranks_decide_on_the_device_alike(found, exits):
    """Where they send each other a little without NCCL."""
    expected = launch_decoding.generate(
        whole(exits, "llama"), [call | {"compile": False} for call in AHEAD]
    )
    for rank in (0, 1):
        for out, wanted in zip(result(found, "ahead", rank)["found"], expected, strict=True):
            assert torch.equal(out["sequences"], wanted["sequences"])
            assert torch.equal(out["exit_layers"], wanted["exit_layers"])


def test_sums_of_a_few_numbers_are_those_of_many(found):
    """Bit for bit, as they are on the other rank, and as they were added up by hand."""
    ranks = [result(found, "sums", rank)["found"] for rank in (0, 1)]
    for plain, shared, other in zip(*ranks[0], ranks[1][1], strict=True):
        assert plain.dtype == shared.dtype
        assert torch.equal(plain, shared)
        assert torch.equal(shared, other)
    parts = [torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(r)) for r in (0, 1)]
    first, second = (own[0] + own[1] + own[2] for own in parts)
    assert torch.equal(ranks[0][0][0], first + second)


def test_a_token_has_the_same_bits_in_every_window_over_ranks(found):
    """In half precision: products that ranks have parts of have one order, too."""
    alone, windows, beside = result(found, "half")["found"]
    assert torch.equal(windows, alone)
    assert torch.equal(beside, alone)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name[:3] in ("dra", "eag")])
def test_ranks_keep_drafts_of_a_draft_exit(found, name):
    for out in result(found, name)["found"]:
        assert (out["exit_layers"] == 0).any()


def test_tokens_leave_at_several_layers_and_texts_end(exits):
    """What is compared above has something of everything."""
    calls = [call | {"max_new_tokens": 10, "eos_token_id": END} for call in CALLS]
    expected = launch_decoding.generate(whole(exits, "llama"), calls)
    layers = {layer for out in expected for layer in out["exit_layers"].flatten().tolist()}
    assert layers == {0, 1, 2, 4, 5}


def test_a_stage_has_its_layers_alone(found, exits):
    model = whole(exits, "llama")
    stages = [result(found, "pp3", rank) for rank in range(3)]
    assert [stage["stage"] for stage in stages] == [[0], [1, 2], [3, 4]]
    total = launch_decoding.size(model)
    assert all(stage["size"] < 0.6 * total for stage in stages)
    slices = [result(found, "tp2", rank)["size"] for rank in range(2)]
    assert all(part < 0.7 * total for part in slices)


def test_batches_of_prompts_with_settings_of_their_own(found, exits):
    calls = [{"threshold": 0.5, "max_new_tokens": 6, "eos_token_id": None}]
    expected = launch_decoding.batch(whole(exits, "llama"), calls)
    for rank in (0, 1):
        outputs = result(found, "batch", rank)["found"]
        for out, wanted in zip(outputs, expected, strict=True):
            assert torch.equal(out["sequences"], wanted["sequences"])
            assert torch.equal(out["exit_layers"], wanted["exit_layers"])


def test_a_cancelled_request_says_no_more(found, exits):
    calls = [{"threshold": 0.5, "max_new_tokens": 6, "eos_token_id": None}]
    expected = launch_decoding.cancel(whole(exits, "llama"), calls)
    assert [len(row) for row in expected] == [2, 6]
    for rank in (0, 1):
        assert result(found, "cancel", rank)["found"] == expected


def test_the_next_token_begins_before_the_last_stage_has_done_this_one(found, exits):
    calls = [{"threshold": 0.0, "alone": True, "max_new_tokens": 6, "eos_token_id": None}]
    (expected,) = launch_decoding.generate(whole(exits, "llama"), calls)
    (out,) = result(found, "overlap")["found"]
    assert torch.equal(out["sequences"], expected["sequences"])


def test_what_left_within_a_stage_goes_deeper_with_the_next_token_that_does(found):
    """The second stage has segments up to the exits at 2 and 4 and to the end, 5."""
    prompt, *windows = result(found, "at-once", 1)["found"]
    assert prompt == 0
    assert windows == [2, 0, 2, 0, 2, 4, 5, 0, 2, 0, 2, 0]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("size", "dp 1 × tp 1 × pp 2 is 2, the number of processes is 1: start as many with"),
        ("too-many-stages", "pp is 2: the backbone has only 1 layers"),
        ("numbers", "stage_layers [1, 1] does not fit: give 2 numbers of layers, each at least 1"),
        ("one-stage", "stage_layers needs --pp"),
        ("heads", "tp is 2: it must divide the backbone's num_key_value_heads, 1"),
        ("no-plan", "gpt2 cannot be split by --tp: attn.c_attn in its layers is a Conv1D; use"),
    ],
)
def test_what_cannot_be_is_refused_on_every_rank(found, name, reason):
    errors = sorted(found.glob(f"{name}-?.error"))
    assert len(errors) == (1 if name == "size" else 2)
    for error in errors:
        text = error.read_text()
        assert text.startswith(f"UserError: {reason}")
        assert "\n" not in text


def test_a_stage_that_dies_is_one_line(found):
    text = (found / "die-0.error").read_text()
    assert re.match(r"ProcessFailed: rank 0 \(pp 0, dp 0, tp 0\) failed at decoding: ", text)
    assert text.endswith("another rank died or hangs. Start it again")
    assert "\n" not in text


def test_the_first_rank_alone_prints(found, exits, tmp_path):
    def without_speed(text):
        return re.sub(r"[\d.]+ tokens/s", "", text)

    settings = {"exits": str(exits / "llama"), "prompt": "def function", "device": "cpu"}
    with (tmp_path / "text").open("w") as file:
        generate(GenerateConfig(**settings, max_new_tokens=9), Console(file=file))
    expected = (tmp_path / "text").read_text()
    assert not (found / "show-0.error").exists()
    assert without_speed((found / "show-0.txt").read_text()) == without_speed(expected)
    assert (found / "show-1.txt").read_text() == ""


def test_the_command_under_torchrun(exits, capfd):
    flags = ["--exits", str(exits / "llama"), "--prompt", "def function", "--threshold", "0.5"]
    flags += ["--max-new-tokens", "9", "--device", "cpu"]
    main(["generate", *flags])
    expected = capfd.readouterr().out.splitlines()
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "ee_tuning", "generate", *flags, "--pp", "2",
    ]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, timeout=PATIENCE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:-1] == expected[:-1]
