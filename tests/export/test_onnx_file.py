"""The encoder in standard operators, and the ONNX file, run by onnxruntime."""

import sys

import pytest
import torch

from fastmum import load_pretrained
from fastmum.export import export
from fastmum.export.__main__ import main
from fastmum.export.onnx_file import EncoderGraph


@pytest.mark.parametrize("positions", ["float32", "bfloat16"])
def test_the_graph_computes_the_encoders_features(weights, images, positions):
    encoder = load_pretrained(weights, encoder_only=True, rope_dtype=positions)
    graph = EncoderGraph(encoder).eval()
    with torch.no_grad():
        cls, patches = graph(images)
        ours = encoder.forward_features(images)
    # In bfloat16 a bit of q may round the other way; positions in float32 would differ by more than 1e-3.
    tolerance = {"float32": 1e-5, "bfloat16": 1e-4}[positions]
    torch.testing.assert_close(cls, ours["x_norm_clstoken"], rtol=0, atol=tolerance)
    torch.testing.assert_close(patches, ours["x_norm_patchtokens"], rtol=0, atol=tolerance)
    program = torch.export.export(graph, (images,))
    namespaces = {n.target.namespace for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    assert namespaces == {"aten"}


@pytest.mark.parametrize("positions", ["float32", pytest.param("bfloat16", marks=pytest.mark.exhaustive)])
def test_features_of_any_number_of_images_of_any_size(weights, model, positions):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    overrides = {"norm_eps": model.config.norm_eps, "rope_dtype": positions}
    done = export(weights, "onnx", **overrides)
    assert done.file == weights.with_suffix(".onnx")
    assert f"onnxruntime {onnxruntime.__version__}" in done.agreement
    encoder = load_pretrained(weights, encoder_only=True, **overrides)
    session = onnxruntime.InferenceSession(done.file, providers=["CPUExecutionProvider"])
    names = ["x_norm_clstoken", "x_norm_patchtokens"]
    for shape in ((1, 3, 64, 64), (3, 3, 48, 80), (2, 3, 16, 160), (1, 3, 16, 16)):
        images = torch.randn(shape)
        with torch.no_grad():
            ours = encoder.forward_features(images)
        for name, found in zip(names, session.run(names, {"images": images.numpy()}), strict=True):
            torch.testing.assert_close(torch.from_numpy(found), ours[name], rtol=0, atol=1e-4)
    graph = onnx.load(done.file)
    onnx.checker.check_model(graph, full_check=True)
    assert {node.domain for node in graph.graph.node} == {""}  # only ONNX's own operators
    (images,) = graph.graph.input
    assert images.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_missing_packages_are_named(weights, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main([str(weights), "--format", "onnx"]) == 2
    error = capsys.readouterr().err
    assert "onnx" in error
    assert "pip install 'fastmum[onnx]'" in error
