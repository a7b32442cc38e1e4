"""Weights & Biases: a substitute of its client, and the real one offline."""

import logging
import sys
from unittest.mock import MagicMock, call

import pytest
from PIL import Image

from fastmum.config import ConfigError
from fastmum.engine.rundir import RunDir, read_metrics
from fastmum.engine.telemetry import Telemetry

CONFIG = {"train": {"steps": 7}}


@pytest.fixture
def service(monkeypatch):
    """A substitute of the package."""
    service = MagicMock()
    service.init.return_value.starting_step = 0
    service.Image = lambda picture: picture.size
    monkeypatch.setitem(sys.modules, "wandb", service)
    return service


def log(folder, start=0, project="mum"):
    telemetry = Telemetry(RunDir(folder), start, project, "mine", CONFIG)
    for step in (start + 1, start + 2):
        telemetry.log(step, {"loss": 1.0, "mfu": None, "grad_norm": float("nan")})
    telemetry.pictures(start + 2, {"reconstruction": Image.new("RGB", (6, 4))})
    telemetry.close()


def test_a_run_and_its_continuation(tmp_path, service):
    run = service.init.return_value
    log(tmp_path)
    run.starting_step = 3  # the service has steps 1 and 2
    log(tmp_path, start=1)
    loss, picture = {"loss": 1.0}, {"reconstruction": (6, 4)}
    expected = [(loss, 1), (loss, 2), (picture, 2), (loss, 3), (picture, 3)]
    assert run.log.call_args_list == [call(values, step=step) for values, step in expected]
    assert run.finish.call_count == 2
    log(tmp_path / "other")
    first, second, other = (made.kwargs for made in service.init.call_args_list)
    assert first.items() >= {"project": "mum", "name": "mine", "dir": str(tmp_path), "resume": "allow"}.items()
    assert first["config"] == CONFIG
    assert first["id"] == second["id"] != other["id"]
    # A preempted run has little time to start and to end.
    assert first["settings"] is service.Settings.return_value
    assert all(0 < service.Settings.call_args.kwargs[key] <= 30 for key in ("init_timeout", "finish_timeout"))


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_failure_is_one_warning(tmp_path, service, caplog, where):
    method = service.init if where == "init" else getattr(service.init.return_value, where)
    method.side_effect = ConnectionError(f"{where} failed\nwith details")
    with caplog.at_level(logging.WARNING):
        log(tmp_path)
    (record,) = caplog.records
    assert record.message.endswith(f"{where} failed")
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_the_package_is_imported_only_if_configured(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"telemetry\.wandb is 'mum'"):
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
