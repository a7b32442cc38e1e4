"""Numbers of RoMa's public code: outputs and gradients of its decoder, true warps, losses and their gradients."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from public_files import error, files, part_of, sizes_of
from safetensors.torch import load_file
from torch import Tensor

from fastmum.kernels import local_correlation
from fastmum.tasks.roma.coarse import anchor_flow
from fastmum.tasks.roma.decoder import Decoder, Scale, ScaleOutput
from fastmum.tasks.roma.losses import losses_of, true_warps


def decoder_of(file: Path, tensors: dict[str, Tensor]) -> Decoder:
    sizes = sizes_of(file)
    scales = {int(stride): Scale(*values) for stride, values in sizes["scales"].items()}
    decoder = Decoder(scales, sizes["gp"], sizes["heads"], sizes["blocks"], sizes["res"], sizes["hidden_blocks"])
    decoder.load_state_dict(part_of(tensors, "weights/"))
    return decoder


def norm_error(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Norm of the difference of all values over the norm of the expected ones."""
    a, b = (torch.cat([x.detach().flatten() for x in each]) for each in (found, expected))
    return ((a - b).norm() / b.norm()).item()


NAMES = {"gm_cls": "anchor_logits", "gm_certainty": "anchor_certainty"}


@pytest.mark.parametrize("file", files("roma", "decoder.safetensors"))
def test_public_decoder_outputs_and_gradients(file):
    tensors = load_file(file)
    decoder = decoder_of(file, tensors)
    inputs = part_of(tensors, "input/")
    maps = [{int(n.split("_")[1]): x for n, x in inputs.items() if n.startswith(side)} for side in ("f1", "f2")]
    decoder.eval()
    with torch.no_grad():
        outputs = decoder(*maps)
        a, b = (decoder.proj["16"](each[16]) for each in maps)
        assert error(decoder.gps["16"](a, b), tensors["eval/gp_posterior"]) < 1e-5
    for name, expected in part_of(tensors, "eval/").items():
        if "/" in name:
            stride, kind = name.split("/")
            assert error(getattr(outputs[int(stride)], kind), expected) < 1e-5, name

    decoder.train()
    # Rounding of the weights alone moves the last refiner's outputs by up to 4e-5 of the largest (30 draws of weights),
    # and the sum of the probes, whose terms cancel, by 3e-5. ReLUs that change side then move a few gradients by 1e-2.
    outputs, terms = decoder(*maps), []
    for name, expected in part_of(tensors, "train/").items():
        if "/" not in name:
            continue
        stride, kind = name.split("/")
        found = getattr(outputs[int(stride)], NAMES.get(kind, kind))
        assert error(found, expected) < 1e-4, name
        assert norm_error([found], [expected]) < 3e-5, name
        if (probe := tensors.get(f"probe/{name}")) is not None:
            terms.append((probe * found).flatten() / found.numel() ** 0.5)
    scalar = torch.cat(terms).sum()
    bound = 1e-6 * torch.cat(terms).abs().sum().item()
    assert scalar.item() == pytest.approx(tensors["train/probe_scalar"].item(), abs=bound)
    scalar.backward()
    gradients = {name: (decoder.get_parameter(name).grad, x) for name, x in part_of(tensors, "grad/").items()}
    errors = {name: error(*pair) for name, pair in gradients.items()}
    assert max(errors.values()) < 5e-2, errors
    assert max(norm_error([found], [expected]) for found, expected in gradients.values()) < 1e-2
    assert sorted(errors.values())[3 * len(errors) // 4] < 1e-4, errors
    assert norm_error(*zip(*gradients.values(), strict=True)) < 1e-3


@pytest.mark.parametrize("file", files("roma", "decoder.safetensors"))
def test_public_local_correlation_and_anchors(file):
    tensors = load_file(file)
    for name, expected in part_of(tensors, "corr/out_r").items():
        found = local_correlation(*(tensors[f"corr/{each}"] for each in ("x", "y", "warp")), int(name))
        assert error(found, expected) < 1e-5
    assert error(anchor_flow(tensors["cls/logits"]).permute(0, 2, 3, 1), tensors["cls/flow"]) < 1e-5


TERMS = {
    "gm_cls_loss": "anchors", "gm_certainty_loss": "anchor_certainty", "delta_regression_loss": "regression",
    "delta_certainty_loss": "certainty",
}  # fmt: skip


@pytest.mark.parametrize("file", files("roma", "losses.safetensors"))
def test_public_true_warps_losses_and_their_gradients(file):
    tensors = load_file(file)
    batch = part_of(tensors, "batch/")
    names = "im_A_depth", "im_B_depth", "K1", "K2", "T_1to2"
    leaves = {name: x.requires_grad_() for name, x in part_of(tensors, "pred/").items()}
    outputs = {}
    for stride in sorted({int(name.split("/")[0]) for name in leaves}, reverse=True):
        of = part_of(leaves, f"{stride}/")
        flow = of["flow"]
        outputs[stride] = ScaleOutput(flow, of["certainty"], flow, of.get("gm_cls"), of.get("gm_certainty"))
    truth = true_warps(*(batch[name] for name in names), [x.flow.shape[2:] for x in outputs.values()])
    for stride, warp in zip(outputs, truth, strict=True):
        expected, prob = tensors[f"gt/{stride}/warp"], tensors[f"gt/{stride}/prob"]
        assert torch.equal(warp.visible.float(), prob), stride
        seen = prob > 0
        assert error(warp.points.permute(0, 2, 3, 1)[seen], expected[seen]) < 1e-5, stride

    losses = losses_of(outputs, truth)
    for name, expected in part_of(tensors, "loss/").items():
        kind, _, stride = name.rpartition("_")
        ours = {"total": "objective", "train_pck_05": "pck"}.get(name) or f"{TERMS[kind]}_{stride}"
        assert losses[ours].item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-7), name
    losses["objective"].backward()
    for name, expected in part_of(tensors, "grad/").items():
        assert error(leaves[name].grad, expected) < 1e-4, name
