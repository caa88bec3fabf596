"""The parity gate: the same exits say the same in tuning, evaluation, decoding, and elsewhere."""

from __future__ import annotations

import json
import runpy
import sys

import parity
import pytest
import torch
from parity import Found, differences

from ee_tuning import EarlyExitModel, ExitConfig

pytest.importorskip("lm_eval", reason='needs pip install "ee-tuning[lm-eval]"')
pytest.importorskip("fastapi", reason='needs pip install "ee-tuning[serve]"')


@pytest.mark.slow
def test_every_way_to_run_exits_says_the_same(base, tmp_path, monkeypatch, capsys):
    """200 prompts, an exit of each kind that can be exported, none of them a copy."""
    model = EarlyExitModel.from_base(base, ExitConfig("1,2,3", arch="mlp,norm,layer"))
    generator = torch.Generator().manual_seed(0)
    for exit in model.exits.values():
        for p in exit.parameters():
            p.data += 0.02 * torch.randn(p.shape, generator=generator)
    model.save_pretrained(tmp_path / "exits")
    data = tmp_path / "data.txt"
    words = torch.randint(0, 10_000, (4_000,), generator=generator).tolist()
    data.write_text("".join(f"value_{word} = total + {word % 7}\n" for word in words))
    out = tmp_path / "parity.json"
    flags = f"--exits {tmp_path / 'exits'} --data {data} --length 12 --new-tokens 6 --out {out}"
    monkeypatch.setattr(sys, "argv", ["parity.py", *flags.split()])
    parity.main()
    assert "all ways say the same" in capsys.readouterr().out
    found = json.loads(out.read_text())["found"]
    assert list(found) == list(parity.WAYS)
    for layer in ("1", "2", "3"):
        told = [way[layer] for way in found.values()]
        assert sum(one["loss"] is not None for one in told) == 6
        assert sum(one["agreement"] is not None for one in told) == 4
        texts = [one["texts"] for one in told if one["texts"] is not None]
        assert len(texts) == 4
        assert len(set(texts[0])) > 20
    assert 0 < found["evaluate"]["2"]["agreement"] < 1


def test_a_way_that_says_something_else_is_told():
    def ways(**other):
        same = {"loss": 3.0, "agreement": 0.5, "texts": ["a", "b"]}
        return {
            "evaluate": {2: Found(3.0, 0.5)},
            "generate": {2: Found(**same)},
            "server": {2: Found(**same | other)},
        }

    assert differences(ways(loss=3.00001, agreement=None)) == []
    for other in (
        {"loss": 3.001},
        {"loss": float("nan")},
        {"agreement": 0.48},
        {"texts": ["a", "c"]},
    ):
        [problem] = differences(ways(**other))
        assert problem.startswith("server, exit 2: ")


def test_a_mistake_is_no_difference(monkeypatch, capsys):
    flags = ["parity.py", "--exits", "nowhere", "--data", "nowhere.jsonl"]
    monkeypatch.setattr(sys, "argv", flags)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(parity.__file__, run_name="__main__")
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("ee-tuning: cannot read the exits nowhere: ")
