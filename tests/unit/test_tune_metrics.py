"""What a run tells of itself."""

from ee_tuning.tune.metrics import Speed


def test_the_speed_of_a_run_is_without_its_first_step(monkeypatch):
    """Which compiles; as long as there is no other, it is that one's."""
    clock = [0.0]
    monkeypatch.setattr("ee_tuning.tune.metrics.time.perf_counter", lambda: clock[0])
    speed, seen = Speed(), []
    for clock[0] in (30.0, 31.0, 33.0):
        speed.add(600)
        seen.append(speed())
    assert seen == [20.0, 600.0, 400.0]
