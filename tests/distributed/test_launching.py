"""What the tests' own launcher does with ranks that fail while others wait for them."""

import warnings
from pathlib import Path

import pytest
from helpers.ranks import free_ports, launch

LOST = {"crash": "rank 1 ended with status -11", "refused": "it could not join the others: "}


@pytest.fixture
def start(tmp_path):
    """Launches ranks of which the second fails so many times; gives what they wrote.

    The first would wait for it ten minutes, a launch may take one.
    """
    folder = tmp_path / "runs"
    folder.mkdir()
    case = {"times": str(tmp_path / "times"), "out": str(folder / "out")}

    def start(how, times):
        Path(case["times"]).write_text(str(times))
        launch("helpers.launch_failing", [case | {"how": how}], folder, seconds=60)
        return Path(case["out"]).read_text()

    start.times = lambda: int(Path(case["times"]).read_text())
    return start


def test_ranks_that_do_not_fail_are_started_once(start):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert start("", 0) == "done\n" * 2


@pytest.mark.parametrize("how", LOST)
def test_a_lost_rank_ends_the_others_at_once_and_all_is_done_once_more(start, how):
    with pytest.warns(UserWarning, match=LOST[how]):
        assert start(how, 1) == "done\n" * 2


@pytest.mark.parametrize("how", LOST)
def test_one_that_is_lost_again_is_a_failure(start, how):
    with (
        pytest.warns(UserWarning, match="once more"),
        pytest.raises(AssertionError, match=LOST[how]),
    ):
        start(how, 3)
    assert start.times() == 1


def test_a_rank_that_raises_ends_the_others_at_once_and_is_a_failure(start):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(AssertionError, match=r"a fault\n(.*\n)*rank 1 ended with status 1"):
            start("raise", 1)


def test_workers_of_pytest_draw_ports_of_their_own(monkeypatch):
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "3")
    for worker in range(3):
        monkeypatch.setenv("PYTEST_XDIST_WORKER", f"gw{worker}")
        ports = free_ports(50)
        assert len(set(ports)) == 50
        assert {port % 3 for port in ports} == {(2000 + worker) % 3}
