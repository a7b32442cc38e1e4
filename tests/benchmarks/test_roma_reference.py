"""The plain decoder of matching's benchmark: public numbers, and the same steps as fastmum."""

import json

import pytest
import torch
from public_files import files
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks.reference.roma import ReferenceRoMa, gathered_correlation, losses_of
from benchmarks.roma import RomaComparison

SMALL = [
    "data.image_size=64", "model.vgg=[4,4,8,8]", "model.projected=[8,8,8,4,4]", "model.displacement=[4,4,4,2,2]",
    "model.radius=[2,1,1,0,0]", "model.gp_dim=8", "model.num_heads=2", "model.blocks=1", "model.anchors=4",
    "model.hidden_blocks=1", "train.precision=fp32", "train.device=cpu",
]  # fmt: skip


def close(found, expected, tolerance):
    assert (found.detach() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("file", files("roma", "decoder.safetensors"))
def test_the_reference_has_the_public_decoders_numbers(file):
    tensors, sizes = load_file(file), json.loads(safe_open(file, "pt").metadata()["config"])
    scales = {int(stride): values for stride, values in sizes["scales"].items()}
    model = ReferenceRoMa(scales, sizes["gp"], sizes["heads"], sizes["blocks"], sizes["res"], sizes["hidden_blocks"])
    model.load_state_dict({n.removeprefix("weights/"): x for n, x in tensors.items() if n.startswith("weights/")})
    f1, f2 = ({s: tensors[f"input/{side}_{s}"] for s in scales} for side in ("f1", "f2"))
    for mode in ("eval", "train"):
        model.train(mode == "train")
        outputs = model(f1, f2)
        for name in (n for n in tensors if n.startswith(f"{mode}/") and n.count("/") == 2):
            _, stride, kind = name.split("/")
            close(outputs[int(stride)][kind], tensors[name], 1e-5)
    probes = [n.removeprefix("probe/").split("/") for n in tensors if n.startswith("probe/")]
    terms = [(tensors[f"probe/{s}/{kind}"] * outputs[int(s)][kind]).sum() / outputs[int(s)][kind].numel() ** 0.5
             for s, kind in probes]  # fmt: skip
    torch.stack(terms).sum().backward()
    for name in (n for n in tensors if n.startswith("grad/")):
        close(model.get_parameter(name.removeprefix("grad/")).grad, tensors[name], 1e-4)
    for name in (n for n in tensors if n.startswith("corr/out_r")):
        x, y, warp = (tensors[f"corr/{each}"] for each in ("x", "y", "warp"))
        close(gathered_correlation(x, y, int(name.removeprefix("corr/out_r")), warp), tensors[name], 1e-5)


@pytest.mark.parametrize("file", files("roma", "losses.safetensors"))
def test_the_reference_has_the_public_losses(file):
    tensors = load_file(file)
    strides = sorted({int(n.split("/")[1]) for n in tensors if n.startswith("pred/")}, reverse=True)
    outputs = {s: {n.split("/")[2]: x for n, x in tensors.items() if n.startswith(f"pred/{s}/")} for s in strides}
    batch = {n.removeprefix("batch/"): x for n, x in tensors.items() if n.startswith("batch/")}
    losses = losses_of(outputs, batch)
    for name in (n for n in tensors if n.startswith("loss/")):
        assert losses[name.removeprefix("loss/")].item() == pytest.approx(tensors[name].item(), rel=1e-5, abs=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("refiners", [False, True])
def test_both_contestants_take_the_same_steps(refiners):
    comparison = RomaComparison(2, refiners, SMALL)
    try:
        comparison.check()
        comparison.run(1)
        assert "reference / fastmum" in comparison.table()
    finally:
        comparison.close()
