"""Folders and hub ids that are not there: one line, after one try; where backbones are found."""

import contextlib
import json
import shutil
import socket
import time
from itertools import product
from pathlib import Path

import huggingface_hub.constants
import pytest
from helpers.families import tiny
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from ee_tuning import EarlyExitModel, ExitConfig, UserError
from ee_tuning.adapter import find_exits
from ee_tuning.cli import main
from ee_tuning.data.sources import Hub
from ee_tuning.loading import load_config, load_tokenizer

READERS = {
    "backbone": load_config,
    "tokenizer": load_tokenizer,
    "exits": find_exits,
    "data": lambda path: Hub(path).identity(),
}


NO_IDS = ["./no/where", "/no/where", "~/nowhere", "a/b/c", "a/"]


@pytest.mark.parametrize(
    ("what", "path"),
    [*product(("backbone", "tokenizer", "exits"), NO_IDS), ("exits", "nowhere")],
)
def test_what_is_no_hub_id_is_a_folder_and_looked_for_here_alone(what, path, monkeypatch):
    monkeypatch.setattr("ee_tuning.hub.get_hf_file_metadata", None)
    home = str(Path.home())
    with pytest.raises(UserError) as error:
        READERS[what](path)
    message = f"cannot read the {what} {path.replace('~', home)}: there is no such folder; a hub id"
    assert str(error.value).startswith(message)


@pytest.fixture
def deaf_hub(monkeypatch):
    """The hub is a port that nobody listens at."""
    with contextlib.closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{one.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.mark.parametrize(
    ("what", "path"),
    [(what, "someone/thing") for what in READERS]
    + [(what, "thing") for what in READERS if what != "exits"],
)
def test_a_hub_that_cannot_be_reached_is_tried_once(what, path, deaf_hub, capfd, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waits to try again"))
    with pytest.raises(UserError) as error:
        READERS[what](path)
    assert "there is no such folder, and the hub cannot be reached: " in str(error.value)
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RepositoryNotFoundError, "there is no such folder, nor is it on the hub; a private one"),
        (GatedRepoError, "accept its terms on https://huggingface.co/someone/thing"),
    ],
)
def test_what_the_hub_does_not_give(error, message, monkeypatch):
    def refused(*_, **__):
        raise error.__new__(error)

    monkeypatch.setattr("ee_tuning.hub.get_hf_file_metadata", refused)
    for read in READERS.values():
        with pytest.raises(UserError, match=message):
            read("someone/thing")


@pytest.mark.parametrize("path", ["someone/thing", "gpt2"])
def test_without_the_hub_the_line_says_so(path):
    with pytest.raises(UserError, match="with HF_HUB_OFFLINE the hub is not asked"):
        load_config(path)


@pytest.mark.parametrize("what", READERS)
@pytest.mark.parametrize("path", ["some--one/thing", "someone/thing.git", "-someone/thing"])
def test_what_the_hub_takes_for_no_id_is_said_in_a_line(what, path):
    with pytest.raises(UserError, match=r"there is no such folder, and it is no hub id: \w+"):
        READERS[what](path)


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A backbone in the hub's cache, whose id has no owner, as those of the oldest."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--gpt2"
    tiny("gpt2").save_pretrained(folder / "snapshots/a")
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("a")


def test_an_id_without_an_owner(cached, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["init", "--model", "gpt2", "--layers", "2", "--out", "exits"])
    saved = json.loads(Path("exits/exit_config.json").read_text())
    assert (saved["base_model"], saved["base_model_path"]) == ("gpt2", None)
    assert EarlyExitModel.from_pretrained("exits").model.name_or_path == "gpt2"
    main(["inspect", "gpt2"])
    assert "backbone gpt2" in capsys.readouterr().out


@pytest.fixture
def relative(tmp_path, monkeypatch):
    """Exits in ``project/exits`` of a backbone that was named ``models/base`` from there."""
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    tiny("llama").save_pretrained("models/base")
    EarlyExitModel.from_base("models/base", ExitConfig([1])).save_pretrained("exits")
    return tmp_path / "project"


def test_a_backbone_that_was_named_from_another_folder_is_found(relative, monkeypatch):
    saved = json.loads(Path("exits/exit_config.json").read_text())
    assert saved["base_model"] == "models/base"
    assert saved["base_model_path"] == str(relative / "models/base")
    EarlyExitModel.from_pretrained("exits")
    monkeypatch.chdir("/")
    model = EarlyExitModel.from_pretrained(str(relative / "exits"))
    assert model.model.name_or_path == str(relative / "models/base")


def test_what_was_copied_together_is_found_from_there(relative, tmp_path, monkeypatch):
    shutil.copytree(relative, tmp_path / "copy")
    shutil.rmtree(relative / "models")
    monkeypatch.chdir(tmp_path / "copy")
    assert EarlyExitModel.from_pretrained("exits").model.name_or_path == "models/base"


def test_a_backbone_in_neither_place_names_both(relative, monkeypatch):
    shutil.rmtree("models")
    monkeypatch.chdir("/")
    monkeypatch.setattr("ee_tuning.hub.get_hf_file_metadata", None)  # no hub id, though it looks so
    with pytest.raises(UserError) as error:
        EarlyExitModel.from_pretrained(str(relative / "exits"))
    places = f"is not at models/base, from here, nor at {relative}/models/base"
    assert f"{places}: there is no such folder, say where it is with --model" in str(error.value)


def test_exits_of_a_loaded_model_or_of_the_hub_have_no_such_path(tmp_path):
    EarlyExitModel.from_base(tiny("llama"), ExitConfig([1])).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "exit_config.json").read_text())
    assert (saved["base_model"], saved["base_model_path"]) == ("", None)


def test_a_tilde_in_paths_from_python(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny("llama").save_pretrained(tmp_path / "base")
    EarlyExitModel.from_base("~/base", ExitConfig([1])).save_pretrained("~/exits")
    assert EarlyExitModel.from_pretrained("~/exits").exit_layers == [1]
