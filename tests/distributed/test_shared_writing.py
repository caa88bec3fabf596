"""`regenerate` as several processes."""

import pytest
from helpers.data import PLAIN_TEMPLATE, make_tokenizer
from helpers.ranks import launch
from helpers.writing import save_writer, settings

from ee_tuning.regenerate.config import RegenerateConfig
from ee_tuning.regenerate.run import regenerate


@pytest.mark.slow
def test_the_file_does_not_depend_on_the_number_of_processes(tmp_path):
    tokenizer = make_tokenizer(PLAIN_TEMPLATE)
    even = len(tokenizer) + len(tokenizer) % 2  # for --tp
    model = save_writer(tmp_path / "base", tokenizer, vocab_size=even)
    alone = settings(model, tmp_path / "alone.jsonl", tokens=800)
    regenerate(RegenerateConfig(**alone))
    shared = alone | {"out": str(tmp_path / "shared.jsonl"), "dp": 2, "timeout": 120.0}
    split = alone | {"out": str(tmp_path / "split.jsonl"), "tp": 2, "timeout": 60.0}
    staged = alone | {"out": str(tmp_path / "staged.jsonl"), "dp": 2, "pp": 2, "timeout": 60.0}
    cases = [{"command": "regenerate", "settings": one} for one in (shared, split, staged)]
    launch("helpers.launch_shared", cases, tmp_path)
    expected = (tmp_path / "alone.jsonl").read_bytes()
    for name in ("shared", "split", "staged"):
        assert (tmp_path / f"{name}.jsonl").read_bytes() == expected
    # What two have begun, one may go on with.
    shared |= {"dp": 1, "tokens": 1600, "resume": True}
    regenerate(RegenerateConfig(**shared))
    regenerate(RegenerateConfig(**alone | {"tokens": 1600, "resume": True}))
    expected = (tmp_path / "alone.jsonl").read_bytes()
    assert (tmp_path / "shared.jsonl").read_bytes() == expected
