"""Weights & Biases: a stand-in of its client, and the real one offline."""

import logging
import sys

import pytest
from PIL import Image

from fastmum.config import ConfigError
from fastmum.engine.rundir import RunDir, read_metrics
from fastmum.engine.telemetry import Telemetry

CONFIG = {"train": {"steps": 7}}


class StandIn:
    """The client: records its calls, fails in the methods named in `fails`."""

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
    monkeypatch.setitem(sys.modules, "wandb", stand_in := StandIn())
    return stand_in


def log(folder, start=0, project="mum"):
    telemetry = Telemetry(RunDir(folder), start, project, "mine", CONFIG)
    for step in (start + 1, start + 2):
        telemetry.log(step, {"loss": 1.0, "mfu": None, "grad_norm": float("nan")})
    telemetry.pictures(start + 2, {"reconstruction": Image.new("RGB", (6, 4))})
    telemetry.close()


def test_a_run_and_its_continuation(tmp_path, service):
    log(tmp_path)
    service.starting_step = 3  # the service has steps 1 and 2
    log(tmp_path, start=1)
    log(tmp_path / "other")
    first, second, other = service.runs
    assert first["lines"] == [(1, {"loss": 1.0}), (2, {"loss": 1.0}), (2, {"reconstruction": (6, 4)})]
    assert second["lines"] == [(3, {"loss": 1.0}), (3, {"reconstruction": (6, 4)})]
    assert first["finished"]
    kwargs = first["kwargs"]
    expected = {"project": "mum", "name": "mine", "dir": str(tmp_path), "config": CONFIG, "resume": "allow"}
    assert {key: kwargs[key] for key in expected} == expected
    # A preempted run has little time: neither its start nor its end may hang on the network.
    assert all(0 < kwargs["settings"][key] <= 30 for key in ("init_timeout", "finish_timeout"))
    assert kwargs["id"] == second["kwargs"]["id"] != other["kwargs"]["id"]


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_failure_is_one_warning(tmp_path, service, caplog, where):
    service.fails.add(where)
    with caplog.at_level(logging.WARNING):
        log(tmp_path)
    (record,) = caplog.records
    assert record.message.endswith(f"no way to the service in {where}")
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_the_package_is_imported_only_if_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"telemetry.wandb is 'mum'.* pip install 'fastmum\[wandb\]'"):
        log(tmp_path)
    assert list(tmp_path.iterdir()) == []
    log(tmp_path, project=None)
    assert not (tmp_path / "wandb_id").exists()


def test_the_real_client_offline(tmp_path, monkeypatch, caplog):
    pytest.importorskip("wandb", reason="needs the extra wandb")
    for key, value in {"MODE": "offline", "SILENT": "true", "CONSOLE": "off"}.items():
        monkeypatch.setenv(f"WANDB_{key}", value)
    with caplog.at_level(logging.WARNING, logger="fastmum"):
        log(tmp_path)
        log(tmp_path, start=2)
    assert caplog.records == []
    run_id = (tmp_path / "wandb_id").read_text().strip()
    records = list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert records
    assert b"reconstruction" in b"".join(path.read_bytes() for path in records)
