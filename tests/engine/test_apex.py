"""NVIDIA's Apex is distinguished from the package of the same name on PyPI; updates with a substitute of FusedAdam."""

import copy
import dataclasses
import sys

import pytest
import torch

from fastmum.config import ConfigError
from fastmum.config.schema import OptimSection
from fastmum.engine import apex
from fastmum.engine.apex import ApexAdamW, find_fused_adam
from fastmum.engine.optimizer import AdamW, default_groups, split_weights


def forget_apex():
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]


@pytest.mark.skipif("apex" in sys.modules, reason="an apex is installed")
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "NVIDIA's Apex is not installed"),
        ({"__init__": ""}, r"apex/__init__.py\) is not NVIDIA's"),
        ({"__init__": "import missing_web_framework"}, "not NVIDIA's: .*missing_web_framework"),
        ({"__init__": "", "optimizers": "class FusedAdam: pass"}, None),
    ],
    ids=["absent", "the project on PyPI", "not importable", "found"],
)
def test_detection(tmp_path, monkeypatch, files, message):
    for name, text in files.items():
        (tmp_path / "apex").mkdir(exist_ok=True)
        (tmp_path / f"apex/{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    forget_apex()
    if message:
        with pytest.raises(ConfigError, match=message):
            find_fused_adam()
    else:
        assert find_fused_adam().__name__ == "FusedAdam"
    forget_apex()


def weights_of(model, dtype):
    """In two groups, of which the second has half of the learning rate."""
    (one,) = default_groups(model, OptimSection())
    halves = one.parameters[::2], one.parameters[1::2]
    groups = [dataclasses.replace(one, parameters=p, lr_scale=x) for p, x in zip(halves, (1.0, 0.5), strict=True)]
    return split_weights(model, groups, dtype)


class FusedAdamSubstitute(torch.optim.Optimizer):
    """Apex's capturable FusedAdam with torch's kernel; counts a step unless the one before was skipped."""

    def __init__(self, groups, lr, betas, eps, adam_w_mode, capturable):
        assert adam_w_mode
        assert capturable
        super().__init__(groups, {"lr": torch.tensor(lr), "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._dummy_overflow_buf = torch.tensor([0], dtype=torch.int)

    @torch.no_grad()
    def step(self, grad_scaler):
        for group in self.param_groups:
            group["step"] += (self._dummy_overflow_buf != 1).to(torch.int)
            found_inf = grad_scaler._check_inf_per_device(self)[group["params"][0].device]
            self._dummy_overflow_buf.copy_(found_inf)
            assert grad_scaler._get_scale_async() == 1
            some = [p for p in group["params"] if p.grad is not None]
            torch._fused_adamw_(
                some, [p.grad for p in some], [self.state[p]["exp_avg"] for p in some],
                [self.state[p]["exp_avg_sq"] for p in some], [], [group["step"].float()[0]] * len(some),
                lr=float(group["lr"]), beta1=group["betas"][0], beta2=group["betas"][1],
                weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False,
                found_inf=found_inf.float()[0],
            )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_updates_as_torch(tiny, monkeypatch, dtype):
    with pytest.raises(ConfigError, match="CUDA"):
        ApexAdamW(weights_of(tiny, torch.float32), OptimSection(), FusedAdamSubstitute)
    monkeypatch.setattr(apex, "NEEDED", "cpu")
    twin = copy.deepcopy(tiny)
    ours = ApexAdamW(weights_of(tiny, dtype), OptimSection(), FusedAdamSubstitute)
    theirs = AdamW(weights_of(twin, dtype), OptimSection())
    for step in range(4):
        for p, q in zip(tiny.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in (ours, theirs):
            optimizer.step(2**-10, found_inf=torch.tensor(float(step == 1)))  # a rate that float32 holds exactly
    assert ours.steps == 3
    torch.testing.assert_close(ours.state(), theirs.state(), rtol=0, atol=0)
    torch.testing.assert_close(list(tiny.parameters()), list(twin.parameters()), rtol=0, atol=0)
