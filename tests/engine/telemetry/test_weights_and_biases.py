import logging
import sys
from dataclasses import asdict

import pytest
from PIL import Image

from fastmum.config import ConfigError, load_config
from fastmum.engine.rundir import RunDir
from fastmum.engine.telemetry import Telemetry, read_metrics


@pytest.fixture
def config(tmp_path):
    return load_config(None, [f"run.dir={tmp_path}", "run.name=mine", "telemetry.wandb=mum"])


class StandIn:
    """The service's client: keeps what it is told, fails where it is asked to."""

    def __init__(self):
        self.runs, self.fails, self.starting_step = [], set(), 0

    def Settings(self, **settings):
        return settings

    def Image(self, picture):
        return picture.size

    def init(self, **kwargs):
        self._check("init")
        self.runs.append({"kwargs": kwargs, "lines": [], "finished": False})
        return self

    def log(self, values, step):
        self._check("log")
        self.runs[-1]["lines"].append((step, values))

    def finish(self):
        self._check("finish")
        self.runs[-1]["finished"] = True

    def _check(self, name):
        if name in self.fails:
            raise ConnectionError(f"no way to the service in {name}\nwith details")


@pytest.fixture
def service(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in


def tell(config, tmp_path, start=0):
    telemetry = Telemetry(RunDir(tmp_path), start, config.telemetry.wandb, config.run.name, asdict(config))
    for step in (start + 1, start + 2):
        telemetry.log(step, {"loss": 1.0, "mfu": None, "grad_norm": float("nan")})
    telemetry.pictures(start + 2, {"reconstruction": Image.new("RGB", (6, 4))})
    telemetry.close()


def test_what_the_service_is_told(config, tmp_path, service):
    tell(config, tmp_path)
    (run,) = service.runs
    assert run["lines"] == [(1, {"loss": 1.0}), (2, {"loss": 1.0}), (2, {"reconstruction": (6, 4)})]
    assert run["finished"]
    kwargs = run["kwargs"]
    assert (kwargs["project"], kwargs["name"], kwargs["dir"]) == ("mum", "mine", str(tmp_path))
    assert kwargs["config"]["train"]["steps"] == config.train.steps
    # A preempted run has little time: neither its start nor its end may hang on the network.
    assert 0 < kwargs["settings"]["init_timeout"] <= 30
    assert 0 < kwargs["settings"]["finish_timeout"] <= 30


def test_a_resumed_run_goes_on_with_the_same_one(config, tmp_path, service):
    tell(config, tmp_path)
    service.starting_step = 3  # the service has steps 1 and 2
    tell(config, tmp_path, start=1)
    first, second = service.runs
    assert first["kwargs"]["id"] == second["kwargs"]["id"]
    assert second["kwargs"]["resume"] == "allow"
    assert second["lines"] == [(3, {"loss": 1.0}), (3, {"reconstruction": (6, 4)})]
    other = tmp_path / "other"
    tell(config, other)
    assert service.runs[2]["kwargs"]["id"] != first["kwargs"]["id"]


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_failure_is_one_warning(config, tmp_path, service, caplog, where):
    service.fails.add(where)
    with caplog.at_level(logging.WARNING):
        tell(config, tmp_path)
    assert [record.message for record in caplog.records] == [
        f"Weights & Biases is not used from here on: no way to the service in {where}"
    ]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_without_the_package_it_is_one_line_and_nothing_is_written(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"telemetry.wandb is 'mum', .* pip install 'fastmum\[wandb\]'"):
        Telemetry(RunDir(tmp_path), 0, "mum")
    assert list(tmp_path.iterdir()) == []


def test_not_asked_for_it_is_not_even_imported(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config.telemetry.wandb = None
    tell(config, tmp_path)
    assert not (tmp_path / "wandb_id").exists()


def test_the_real_client_offline(config, tmp_path, monkeypatch, caplog):
    pytest.importorskip("wandb", reason="needs the extra wandb")
    for key, value in {"MODE": "offline", "SILENT": "true", "CONSOLE": "off"}.items():
        monkeypatch.setenv(f"WANDB_{key}", value)
    with caplog.at_level(logging.WARNING, logger="fastmum"):
        tell(config, tmp_path)
        tell(config, tmp_path, start=2)
    assert caplog.records == []
    run_id = (tmp_path / "wandb_id").read_text().strip()
    records = list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert records
    assert b"reconstruction" in b"".join(path.read_bytes() for path in records)
