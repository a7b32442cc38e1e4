"""The ONNX file, run by onnxruntime."""

import sys

import pytest
import torch

from fastmum import load_pretrained
from fastmum.export import export
from fastmum.export.__main__ import main

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def run(file, images):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(x) for x in session.run(["x_norm_clstoken", "x_norm_patchtokens"], {"images": images})]


@pytest.mark.parametrize("positions", ["float32", pytest.param("bfloat16", marks=pytest.mark.exhaustive)])
def test_features_of_any_number_of_images_of_any_size(weights, model, positions):
    overrides = {"norm_eps": model.config.norm_eps, "rope_dtype": positions}
    done = export(weights, "onnx", **overrides)
    assert done.file == weights.with_suffix(".onnx")
    assert f"onnxruntime {onnxruntime.__version__}" in done.agreement
    encoder = load_pretrained(weights, encoder_only=True, **overrides)
    for shape in ((1, 3, 64, 64), (3, 3, 48, 80), (2, 3, 16, 160), (1, 3, 16, 16)):
        images = torch.randn(shape)
        cls, patches = run(done.file, images.numpy())
        with torch.no_grad():
            ours = encoder.forward_features(images)
        torch.testing.assert_close(patches, ours["x_norm_patchtokens"], rtol=0, atol=1e-4)
        torch.testing.assert_close(cls, ours["x_norm_clstoken"], rtol=0, atol=1e-4)
    graph = onnx.load(done.file)
    onnx.checker.check_model(graph, full_check=True)
    assert {node.domain for node in graph.graph.node} == {""}  # no operators but ONNX's own
    (images,) = graph.graph.input
    assert images.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_without_the_packages(weights, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main([str(weights), "--format", "onnx"]) == 2
    error = capsys.readouterr().err
    assert error == "error: the format onnx needs onnxscript: pip install 'fastmum[onnx]'\n"
