"""The plain decoder of matching's benchmark: public numbers."""

import pytest
import torch
from public_files import error, files, part_of, sizes_of
from safetensors.torch import load_file

from benchmarks.reference.roma import ReferenceRoMa, gathered_correlation, losses_of


@pytest.mark.parametrize("file", files("roma", "decoder.safetensors"))
def test_the_reference_has_the_public_decoders_numbers(file):
    tensors, sizes = load_file(file), sizes_of(file)
    scales = {int(stride): values for stride, values in sizes["scales"].items()}
    model = ReferenceRoMa(scales, sizes["gp"], sizes["heads"], sizes["blocks"], sizes["res"], sizes["hidden_blocks"])
    model.load_state_dict(part_of(tensors, "weights/"))
    f1, f2 = ({s: tensors[f"input/{side}_{s}"] for s in scales} for side in ("f1", "f2"))
    for mode in ("eval", "train"):
        model.train(mode == "train")
        outputs = model(f1, f2)
        for name in (n for n in tensors if n.startswith(f"{mode}/") and n.count("/") == 2):
            _, stride, kind = name.split("/")
            assert error(outputs[int(stride)][kind], tensors[name]) <= 1e-5, name
    probes = [name.split("/") for name in part_of(tensors, "probe/")]
    terms = [(tensors[f"probe/{s}/{kind}"] * outputs[int(s)][kind]).sum() / outputs[int(s)][kind].numel() ** 0.5
             for s, kind in probes]  # fmt: skip
    torch.stack(terms).sum().backward()
    for name, expected in part_of(tensors, "grad/").items():
        assert error(model.get_parameter(name).grad, expected) <= 1e-4, name
    for radius, expected in part_of(tensors, "corr/out_r").items():
        x, y, warp = (tensors[f"corr/{each}"] for each in ("x", "y", "warp"))
        assert error(gathered_correlation(x, y, int(radius), warp), expected) <= 1e-5, radius


@pytest.mark.parametrize("file", files("roma", "losses.safetensors"))
def test_the_reference_has_the_public_losses(file):
    tensors = load_file(file)
    strides = sorted({int(n.split("/")[1]) for n in tensors if n.startswith("pred/")}, reverse=True)
    outputs = {s: {n.split("/")[2]: x for n, x in tensors.items() if n.startswith(f"pred/{s}/")} for s in strides}
    losses = losses_of(outputs, part_of(tensors, "batch/"))
    for name, expected in part_of(tensors, "loss/").items():
        assert losses[name].item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-7), name
