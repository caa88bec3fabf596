"""The benchmarks run as their docstrings say, on tiny models, and write what the tables read."""

import json
import re
import shutil
import sys
from pathlib import Path

import decode
import numpy as np
import pytest
import regenerate
import rounds
import savings
import serve
import speeds
import speedup
import starts
import table
import thresholds
import tune

from ee_tuning.calibrate.risks import Seen


def run(module, monkeypatch, out, flags):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *flags.split(), "--out", str(out)])
    module.main()
    return json.loads(out.read_text())


@pytest.fixture
def work(base, data, tmp_path):
    """A pre-trained backbone and its text, as demo/pretrain.py leaves them."""
    shutil.copytree(base, tmp_path / "model")
    training = {
        "parameters": 1, "layers": 4, "tokens": 1, "nats_per_token": 5.0, "train_seconds": 1.0,
    }  # fmt: skip
    (tmp_path / "model/training.json").write_text(json.dumps(training))
    (tmp_path / "data").mkdir()
    for name in ("train", "validation"):
        text = json.dumps({"text": Path(data).read_text()})
        (tmp_path / f"data/{name}.jsonl").write_text(f"{text}\n" * 3)
    return tmp_path


def test_tuning_steps_and_their_baseline(tmp_path, monkeypatch):
    flags = "--shape tiny --seq-length 16 --device cpu --warmup 1 --steps 1"
    found = run(tune, monkeypatch, tmp_path / "all.json", flags)
    assert found["settings"]["layers"] == "1,2,3,4"
    assert found["tokens_per_second"]["median"] > 0
    found = run(tune, monkeypatch, tmp_path / "half.json", f"{flags} --layers 1/2 --baseline")
    assert found["baseline"]["tokens_per_second"]["median"] > 0
    found = run(tune, monkeypatch, tmp_path / "layer.json", f"{flags} --layers 1,3 --arch layer")
    assert found["settings"]["arch"] == "layer"


def test_decoding_in_every_way(tmp_path, monkeypatch):
    flags = "--shape tiny --device cpu --prompt-length 5 --new-tokens 6 --long-prompt 9"
    out = tmp_path / "decode-tiny.json"
    found = run(decode, monkeypatch, out, f"{flags} --rounds 1 --batches 2")
    assert len(found["decoding"]) == 7
    assert all(way["tokens_per_second"]["median"] > 0 for way in found["decoding"].values())
    assert found["end_agrees_on_random_text"] == pytest.approx(0.8, abs=0.01)
    (drafts,) = (way for name, way in found["decoding"].items() if "speculative" in name)
    assert 0 <= drafts["drafts_kept"] <= 1 <= drafts["tokens_per_round"]
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    assert table.decoding().count("| tiny |") == 9  # transformers' two ways, too


def test_what_asking_and_drafting_take(tmp_path, monkeypatch):
    flags = "--shape tiny --device cpu --archs mlp --known 64 --prompt-length 5 --new-tokens 13"
    found = run(rounds, monkeypatch, tmp_path / "rounds.json", f"{flags} --rounds 1")
    assert {"0 asked", "1 asked", "2 asked"} <= found["asking"]["mlp"].keys()
    rows = found["drafting"]
    assert all(rows[f"{number} drafts, by the host"]["ms"] > 0 for number in range(1, 7))
    assert found["known tokens"] == 64
    rows = found["leaving"]["mlp"]
    assert {rows[f"1 leaves, {n} of {n + 1}"]["layers"] for n in (1, 2)} == {2.5, 2.0}
    assert 1 < rows["some leave"]["layers"] < 4


def test_starts_of_exits_and_what_was_measured_before_is_kept(base, data, tmp_path, monkeypatch):
    flags = f"--model {base} --layers 2 --steps 1 --seq-length 64 --batch 8 --data {data}"
    flags += f" --valid-data {data}"
    run(starts, monkeypatch, tmp_path / "starts.json", f"{flags} --archs norm")
    found = run(starts, monkeypatch, tmp_path / "starts.json", f"{flags} --archs layer")
    assert found["runs"].keys() == {"norm", "layer"}
    assert found["runs"]["norm"].keys() == {"copied", "random", "fitted"}
    assert found["runs"]["layer"].keys() == starts.STARTS.keys()
    assert starts.table(found).count("\n| `") == 8


def test_thresholds_that_save_most_are_found():
    """Of two exits whose confidence is the probability of being right, place by place."""
    draw = np.random.default_rng(0)
    sure = draw.uniform(0.5, 1, (40, 2, 60)).astype(np.float32)
    right = draw.uniform(size=sure.shape) < sure**0.2
    seen = Seen([2, 5], 8, right, sure, None, draw.integers(20, 60, 40))
    own = thresholds.Set(seen, np.arange(40), max_pending=8)
    gains = []
    for row in thresholds.curve([own], [0.005, 0.02, 0.05]):
        bars = {2: 1.0, 5: 1.0} | {
            int(layer): float(bar)
            for layer, _, bar in (part.partition(":") for part in row["thresholds"].split(","))
        }
        wrong = left = 0
        for text, length in enumerate(seen.lengths):
            for place in range(length):
                for exit, bar in enumerate(bars.values()):
                    if bar < 1 and sure[text, exit, place] >= bar:
                        left += 1
                        wrong += not right[text, exit, place]
                        break
        count = seen.lengths.sum()
        assert row["differs"] == pytest.approx(wrong / count, abs=2 / count)
        assert row["leaves"] == pytest.approx(left / count, abs=2 / count)
        assert row["differs"] <= row["allowed"]
        assert row["depth"] < 8
        gains.append(row["gain"])
    assert gains == sorted(gains)
    assert gains[0] < gains[-1]


def test_the_costs_of_leaving_are_those_that_were_measured():
    """Milliseconds are u·(REST + layers + LEAVE·share that leaves + ASK·exits asked), u and two of
    the others fitted to the file, the third what the file says itself. Rounded to halves."""
    found = json.loads(
        (Path(thresholds.__file__).parent / "results/rounds-smollm2.json").read_text()
    )
    asked = found["asking"]["layer"]
    ask = asked.pop("layers an exit takes")
    rows = [(30, 0, number, row["ms"]) for number, row in enumerate(asked.values())]
    for name, row in found["leaving"]["layer"].items():
        if part := re.search(r"(\d) of (\d)", name):
            share = int(part[1]) / int(part[2])
            ways = "10 leaves, 20 stays", "10 stays"
            asks = next((n for n, way in zip((2 - share, 2), ways, strict=True) if way in name), 1)
            rows.append((row["layers"], share, asks, row["ms"]))
    layers, shares, asks, ms = np.array(rows).T
    assert len(rows) == 15
    parts = np.stack([np.ones(len(rows)), layers + ask * asks, shares], axis=1)
    rest, unit, leave = np.linalg.lstsq(parts, ms, rcond=None)[0]
    costs = thresholds.REST, thresholds.LEAVE, thresholds.ASK
    assert costs == pytest.approx((rest / unit, leave / unit, ask), abs=0.25)


def test_what_became_of_drafts_is_counted():
    """Of those that the end was asked for: up to the first that it does not keep."""
    token = decode.Token
    tokens = [token(1, 2, 0.5), token(1, 2, 0.5), token(1, 4, 0.5), token(1, 2, 0.5)]
    tokens += [token(1, 4, 0.5, rejected=[3, 4]), token(1, 4, 0.5, rejected=[5])]
    found = decode.kept(tokens, 4)
    assert found == {"drafts_kept": 0.6, "tokens_per_round": 2.0}


def test_patterns_hold_their_shares():
    """Of every ten, exactly."""
    for share in (0.5, 0.8):
        drawn = decode.answers(share)
        tens = [[next(drawn) for _ in range(10)] for _ in range(20)]
        assert {sum(ten) for ten in tens} == {10 * share}
        assert len({tuple(ten) for ten in tens}) > 5


def test_savings_on_a_real_model(work, monkeypatch):
    flags = f"--work {work} --layers 2 --steps 2 --seq-length 16 --only none"
    found = run(savings, monkeypatch, work / "savings.json", flags)
    assert list(found["runs"]) == ["bf16, fp32 masters"]
    monkeypatch.setattr(table, "RESULTS", work)
    assert "| bf16, fp32 masters |" in table.savings()


def test_speed_on_a_real_model(work, monkeypatch):
    flags = f"--work {work} --layers 2 --archs mlp --steps 2 --thresholds 0.5 --seq-length 64"
    out = work / "speedup.json"
    found = run(speedup, monkeypatch, out, f"{flags} --prompts 2 --groups 1 --new-tokens 3")
    ways = found["runs"]["mlp"]["ways"]
    assert ways["speculative 0.5"]["identical_texts"] == found["runs"]["mlp"]["prompts"]
    monkeypatch.setattr(table, "RESULTS", work)
    assert "| `mlp` | threshold 0.5 |" in table.speedup()


def test_texts_in_waves_and_the_work_of_the_host(tmp_path, monkeypatch):
    flags = "--shape tiny --device cpu --slots 4 --prompt-tokens 5 --new-tokens 6 --rounds 1"
    for more in ("", " --host"):
        found = run(regenerate, monkeypatch, tmp_path / "found.json", flags + more)
        assert found["tokens_per_second"] > 0
        assert found["settings"]["ahead"] == 8


@pytest.mark.slow
def test_a_server_under_load(base, tmp_path, monkeypatch):
    flags = f"--model {base} --device cpu --clients 1 3 --seconds 0.5 --new-tokens 4 --capacity 128"
    found = run(serve, monkeypatch, tmp_path / "serve.json", f"{flags} --alone")
    (rows,) = found["servers"].values()
    for row, clients in zip(rows, (1, 3), strict=True):
        assert row["clients"] == clients
        assert row["failed"] == 0 < row["requests"]
        assert row["first_token_ms"]["p99"] >= row["first_token_ms"]["p50"] > 0
    assert found["engine"].keys() == {"1", "3"}


def test_the_picture_shows_the_figures_of_the_table(monkeypatch):
    drawn = []
    monkeypatch.setattr(speeds, "save", lambda figure, path: drawn.append(figure))
    speeds.picture()
    (axes,) = drawn[0].axes
    names = [text.get_text() for text in axes.get_yticklabels()]
    speed = {}
    for place, bars in enumerate(axes.containers):
        for name, bar, text in zip(names, bars, axes.texts[place * len(names) :], strict=False):
            assert text.get_text() == f"{bar.get_width():.2f}×"
            speed.setdefault(name, []).append(text.get_text())
    table = speeds.table().replace("`", "")
    for name, (code, chat, documents) in speed.items():
        assert f"| {name} | {code} | {chat} | {documents} |" in table
