"""`regenerate` as several processes."""

import pytest
from helpers.data import PLAIN_TEMPLATE, make_tokenizer
from helpers.ranks import launch
from helpers.writing import save_writer, settings

from ee_tuning.regenerate.config import RegenerateConfig
from ee_tuning.regenerate.run import regenerate


@pytest.mark.slow
def test_the_file_does_not_depend_on_the_number_of_processes(tmp_path):
    model = save_writer(tmp_path / "base", make_tokenizer(PLAIN_TEMPLATE))
    alone = settings(model, tmp_path / "alone.jsonl", tokens=1500)
    regenerate(RegenerateConfig(**alone))
    shared = alone | {"out": str(tmp_path / "shared.jsonl"), "dp": 2, "timeout": 120.0}
    case = {"command": "regenerate", "settings": shared}
    said = launch("helpers.launch_shared", [case], tmp_path)
    assert "ended with status" not in said, said
    expected = (tmp_path / "alone.jsonl").read_bytes()
    assert (tmp_path / "shared.jsonl").read_bytes() == expected
    # What two have begun, one may go on with.
    shared |= {"dp": 1, "tokens": 3000, "resume": True}
    regenerate(RegenerateConfig(**shared))
    regenerate(RegenerateConfig(**alone | {"tokens": 3000, "resume": True}))
    expected = (tmp_path / "alone.jsonl").read_bytes()
    assert (tmp_path / "shared.jsonl").read_bytes() == expected
