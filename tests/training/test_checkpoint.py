import logging

import pytest
import torch

from fastmum import ModelConfig, MuM
from fastmum.config.schema import OptimSection
from fastmum.training import checkpoint
from fastmum.training.checkpoint import (
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    restore,
    save_checkpoint,
)
from fastmum.training.optim import build_optimizer


@pytest.fixture
def trained(tiny):
    optimizer = build_optimizer(tiny, OptimSection())
    tiny(torch.randn(2, 3, 32, 32), [2], 0.5).loss.backward()
    optimizer.step()
    return tiny, optimizer


def save(folder, trained, *steps, keep=10):
    for step in steps:
        save_checkpoint(folder, step, *trained, meter={"losses": 0.1, "steps": 3}, keep=keep)


def test_everything_comes_back(tmp_path, trained):
    model, optimizer = trained
    save(tmp_path, trained, 5)
    content = load_newest(tmp_path)
    assert (content["step"], content["meter"]) == (5, {"losses": 0.1, "steps": 3})
    torch.manual_seed(9)
    other = MuM(model.config)
    other_optimizer = build_optimizer(other, OptimSection())
    restore(content, other, other_optimizer)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(other_optimizer.state_dict(), optimizer.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(("before", "after"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_another_precision_goes_on_with_the_same_weights(tmp_path, tiny, before, after):
    optimizer = build_optimizer(tiny, OptimSection(), before)
    save_checkpoint(tmp_path, 1, tiny, optimizer, {}, keep=1)
    state = optimizer.weights.state_dict()
    other = MuM(tiny.config)
    resumed = build_optimizer(other, OptimSection(), after)
    restore(load_newest(tmp_path), other, resumed)
    torch.testing.assert_close(resumed.weights.state_dict(), state, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        other(torch.randn(2, 3, 32, 32), [2], 0.5).loss.backward()
    resumed.step()


def test_moments_in_another_memory_layout_are_taken(tmp_path, trained):
    model, optimizer = trained
    save(tmp_path, trained, 5)
    content = load_newest(tmp_path)
    for state in content["optimizer"]["state"].values():
        state["exp_avg"] = state["exp_avg"].contiguous()
    other = build_optimizer(model, OptimSection())
    restore(content, model, other)
    torch.testing.assert_close(other.state_dict()["state"], optimizer.state_dict()["state"], rtol=0, atol=0)
    model(torch.randn(2, 3, 32, 32), [2], 0.5).loss.backward()
    other.step()


def test_the_configuration_decides_the_decay_of_a_resumed_run(tmp_path, trained):
    save(tmp_path, trained, 5)
    other = build_optimizer(trained[0], OptimSection(weight_decay=0.2))
    restore(load_newest(tmp_path), trained[0], other)
    assert [group["weight_decay"] for group in other.param_groups] == [0.2, 0.0]


def test_the_newest_few_are_kept(tmp_path, trained):
    save(tmp_path, trained, 9, 10, 100, 20, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_0000100.pt", "step_0000020.pt"]


def test_a_crash_while_writing_leaves_the_one_before(tmp_path, trained, monkeypatch):
    save(tmp_path, trained, 1)

    def crash(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.torch, "save", crash)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, trained, 2)
    assert load_newest(tmp_path)["step"] == 1


def test_a_corrupt_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, trained, caplog):
    save(tmp_path, trained, 1, 2)
    newest = list_checkpoints(tmp_path)[0]
    newest.write_bytes(newest.read_bytes()[:1000])
    with caplog.at_level(logging.WARNING):
        assert load_newest(tmp_path)["step"] == 1
    assert "step_0000002.pt' cannot be read" in caplog.text


def test_nothing_readable_is_an_error(tmp_path, trained):
    assert load_newest(tmp_path) is None
    save(tmp_path, trained, 1)
    list_checkpoints(tmp_path)[0].write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read"):
        load_newest(tmp_path)


def test_files_that_are_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "a.pt")
    torch.save({"weights": 1}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="not a training checkpoint"):
        load_checkpoint(tmp_path / "a.pt")


def test_another_model_is_named(tmp_path, trained):
    save(tmp_path, trained, 1)
    other = MuM(ModelConfig(32, 3, 2, 32, 2, 2))
    with pytest.raises(CheckpointError, match=r"another model: depth 2 \(configured: 3\)"):
        restore(load_newest(tmp_path), other, build_optimizer(other, OptimSection()))
