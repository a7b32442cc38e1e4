"""The encoder in plain operators is the encoder."""

import pytest
import torch

from fastmum import load_pretrained
from fastmum.export.onnx_file import EncoderGraph


@pytest.mark.parametrize("positions", ["float32", "bfloat16"])
def test_features_are_the_encoders(weights, images, positions):
    encoder = load_pretrained(weights, encoder_only=True, rope_dtype=positions)
    with torch.no_grad():
        cls, patches = EncoderGraph(encoder)(images)
        ours = encoder.forward_features(images)
    # A bit of q that is rounded the other way is seen in bfloat16; positions in float32 differ by more than 1e-3.
    tolerance = {"float32": 1e-5, "bfloat16": 1e-4}[positions]
    torch.testing.assert_close(cls, ours["x_norm_clstoken"], rtol=0, atol=tolerance)
    torch.testing.assert_close(patches, ours["x_norm_patchtokens"], rtol=0, atol=tolerance)


def test_exporters_see_no_operators_of_our_own(weights, images):
    graph = EncoderGraph(load_pretrained(weights, encoder_only=True)).eval()
    program = torch.export.export(graph, (images,))
    namespaces = {n.target.namespace for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    assert namespaces == {"aten"}
