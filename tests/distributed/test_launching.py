"""What the tests' own launcher does with ranks that crash."""

import pytest
from helpers.ranks import launch


@pytest.mark.parametrize("crashes", [0, 1, 2])
def test_a_crash_ends_all_ranks_at_once_and_is_tried_again_once(crashes, tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    left, out = tmp_path / "crashes", folder / "out"
    left.write_text(str(crashes))
    cases = [{"crashes": str(left), "out": str(out)}]
    if crashes == 0:
        launch("helpers.launch_crash", cases, folder, seconds=60)
    elif crashes == 1:
        with pytest.warns(UserWarning, match="rank 1 ended with status -11"):
            launch("helpers.launch_crash", cases, folder, seconds=60)
    else:
        with (
            pytest.warns(UserWarning, match="once more"),
            pytest.raises(AssertionError, match="rank 1 ended"),
        ):
            launch("helpers.launch_crash", cases, folder, seconds=60)
        return
    assert out.read_text() == "done\n" * 2
