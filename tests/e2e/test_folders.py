"""What commands write, who may read it, and what they leave where something is already."""

import os

import pytest
from helpers.commands import tune

from ee_tuning import EarlyExitModel
from ee_tuning.cli import main


@pytest.fixture(scope="module")
def exits(base, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "exits"
    tune(base, data, out, arch="mlp,layer", steps=2)
    return out


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_what_is_written_has_the_mode_of_new_files(umask, exits, base, data, tmp_path):
    before = os.umask(umask)
    try:
        main(["init", "--model", base, "--layers", "2", "--out", str(tmp_path / "init")])
        tune(base, data, tmp_path / "tune", steps=2, trace=True)
        for name, what in (("exit", ["--layer", "3"]), ("merged", ["--merge"])):
            out = ["--out", str(tmp_path / name)]
            main(["export", "--exits", str(exits), *what, *out])
        EarlyExitModel.from_pretrained(str(exits)).save_pretrained(tmp_path / "saved")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    folders = [path for path in tmp_path.rglob("*") if path.is_dir()]
    assert len([path for path in files if path.suffix == ".safetensors"]) >= 9
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o777 & ~umask}
