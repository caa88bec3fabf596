"""Servers that the tests of a process share."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.serving import as_a_process, in_a_thread

from ee_tuning import EarlyExitModel, ExitConfig

DEMO = str(Path(__file__).parents[2] / "demo" / "model")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The demo model with exits that nobody has tuned, and a chat template."""
    folder = tmp_path_factory.mktemp("demo")
    exits = EarlyExitModel.from_base(DEMO, ExitConfig("4,8,12", arch="mlp"))
    exits.save_pretrained(folder / "exits")
    (folder / "chat.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def process(demo):
    """`ee-tuning serve` on the demo model, with a key."""
    flags = "--exits", demo / "exits", "--chat-template", demo / "chat.jinja"
    with as_a_process(*flags, "--slots", 8, key="a key") as running:
        yield running


@pytest.fixture(scope="session")
def tiny_exits(tmp_path_factory, base):
    """A tiny model's exits, as a folder."""
    folder = tmp_path_factory.mktemp("tiny") / "exits"
    EarlyExitModel.from_base(base, ExitConfig("1,2,3", arch="mlp")).save_pretrained(folder)
    (folder.parent / "chat.jinja").write_text(TEMPLATE)
    return str(folder)


@pytest.fixture(scope="module")
def tiny_server(tiny_exits):
    """A server in this process, of a tiny model with a context of 128 tokens."""
    template = tiny_exits.replace("exits", "chat.jinja")
    with in_a_thread(exits=tiny_exits, chat_template=template, slots=8) as running:
        yield running
