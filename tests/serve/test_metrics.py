"""What Prometheus and the dashboard see."""

import json
import re
from pathlib import Path
from urllib.request import urlopen

import pytest
from helpers.serving import in_a_thread

from ee_tuning import EarlyExitModel
from ee_tuning.certificate import Certificate
from ee_tuning.fingerprint import backbone_hashes, exit_hash

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"


def metrics(running):
    with urlopen(f"{running.url}/metrics") as reply:
        lines = [line for line in reply.read().decode().splitlines() if line[0] != "#"]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def of(found, name, **labels):
    """The sum over what has these labels."""
    return sum(
        value for key, value in found.items()
        if key.startswith(f"ee_tuning:{name}{{")
        and all(f'{label}="{value}"' in key for label, value in labels.items())
    )  # fmt: skip


@pytest.fixture
def drafting(monkeypatch):
    """Every round has drafts, whether that pays or not."""
    monkeypatch.setattr("ee_tuning.decode.limits.plan", lambda *_: 3)


def test_metrics_count_what_was_said(tiny_server, drafting):
    before = metrics(tiny_server)
    body = {"prompt": [5, 6, 7], "max_tokens": 9, "ignore_eos": True, "temperature": 0}
    first = tiny_server.complete(**body, mode="fixed", exit_layers=[1])["choices"][0]["ee"]
    second = tiny_server.complete(**body, mode="speculative", threshold=0.0)["choices"][0]["ee"]
    after = metrics(tiny_server)

    def grown(name, **labels):
        return of(after, name, **labels) - of(before, name, **labels)

    assert grown("prompt_tokens_total") == 6
    assert grown("generation_tokens_total") == 18
    assert grown("exit_layer_total") == 18
    assert grown("exit_layer_total", layer=1) == 9 + second["exit_layers"].count(1)
    assert grown("request_success_total", finished_reason="length") == 2
    assert grown("time_to_first_token_seconds_count") == 2
    assert grown("spec_decode_num_draft_tokens_total") == second["drafted"] > 0
    assert grown("spec_decode_num_accepted_tokens_total") == second["kept"]
    assert grown("spec_decode_num_accepted_tokens_per_pos_total") == second["kept"]
    assert first["drafted"] == 0
    assert of(after, "num_requests_running") == of(after, "num_requests_waiting") == 0


def test_the_dashboard_asks_for_metrics_that_there_are(tiny_server, drafting):
    tiny_server.complete(prompt=[5], max_tokens=9, mode="speculative", threshold=0.0)
    there = {re.split("[{ ]", key)[0] for key in metrics(tiny_server)}
    text = DASHBOARD.read_text()
    asked = set(re.findall(r"ee_tuning:\w+", text))
    unseen = {"ee_tuning:request_failure_total",
              "ee_tuning:spec_decode_num_accepted_tokens_per_pos_total"}  # fmt: skip
    assert {name for name in asked - there - unseen if "audit" not in name} == set()
    assert len(asked) > 12
    assert json.loads(text)["panels"]


@pytest.fixture(scope="module", params=[8])
def calibrated(tiny_exits, tmp_path_factory, request):
    """The tiny exits with a certificate that nobody has earned, for so many pending tokens."""
    folder = tmp_path_factory.mktemp("calibrated") / "exits"
    model = EarlyExitModel.from_pretrained(tiny_exits)
    model.save_pretrained(folder)
    certificate = Certificate(
        thresholds={1: 1.0, 2: 0.001, 3: 1.0}, risk="next-token", epsilon=0.1, delta=0.1, n=10,
        p=0.01, test="betting", tested=0.0, report={}, dtype="float32", measure="probability",
        exits={k: exit_hash(model.exit(k)) for k in (1, 2, 3)}, max_pending=request.param,
        max_new_tokens=20, backbone=backbone_hashes(model.backbone), data="",
    )  # fmt: skip
    (folder / "calibration.json").write_text(json.dumps(certificate.to_json()))
    return str(folder)


def test_calibrated_thresholds_are_audited(calibrated):
    body = {"prompt": [5, 6], "max_tokens": 8, "ignore_eos": True}
    with in_a_thread(exits=calibrated, threshold="calibrated", audit=2) as running:
        texts = [running.complete(**body, temperature=0)["choices"][0]["ee"] for _ in range(20)]
        audited = [text for text in texts if text["drafted"]]
        assert 0 < len(audited) < 20
        plain = [text for text in texts if not text["drafted"]]
        assert all({*text["exit_layers"]} == {2, 4} for text in plain)
        found = metrics(running)
        assert of(found, "audit_texts") == len(audited)
        assert 0 <= of(found, "audit_risk_low") <= of(found, "audit_risk") <= 1
        # The calibration is of the likeliest tokens.
        sampled = running.complete(**body, temperature=1.0)["choices"][0]["ee"]
        assert {*sampled["exit_layers"]} == {4}
        with pytest.raises(OSError, match="400"):
            running.complete(**body, temperature=1.0, threshold="calibrated")
        # Nor is it of what has no threshold.
        fixed = running.complete(**body, temperature=0, mode="fixed", exit_layers=[2])
        assert {*fixed["choices"][0]["ee"]["exit_layers"]} == {2}


@pytest.mark.parametrize(
    ("calibrated", "settings"), [(4, {"max_pending": 4}), (12, {})], indirect=["calibrated"]
)
def test_calibrated_texts_have_the_pending_tokens_of_their_calibration(calibrated, settings):
    body = {"prompt": [5, 6], "max_tokens": 8, "ignore_eos": True, "temperature": 0}
    with in_a_thread(exits=calibrated, **settings) as running:
        assert running.complete(**body, threshold="calibrated")["usage"]["completion_tokens"] == 8
        assert running.complete(**body)["usage"]["completion_tokens"] == 8
    with in_a_thread(exits=calibrated, **settings, threshold="calibrated") as running:
        for temperature in (0, 1):  # sampled ones go to full depth
            found = running.complete(**body | {"temperature": temperature})
            assert found["usage"]["completion_tokens"] == 8


def test_exits_that_were_not_calibrated_have_no_such_threshold(tiny_server):
    with pytest.raises(OSError, match="400"):
        tiny_server.complete(prompt=[5], threshold="calibrated", temperature=0)


def test_a_threshold_that_was_given_is_told_as_a_number(tiny_exits):
    with in_a_thread(exits=tiny_exits, threshold="0.4") as running:
        assert running.ask("/v1/models")["data"][0]["threshold"] == 0.4
