"""The table of consumers in docs/weights.md: its exports load strictly, its overrides give the consumer's features."""

import re
from pathlib import Path

import pytest
import torch
from released import difference, released_encoder

from benchmarks.reference.model import ReferenceMuM
from fastmum import ModelConfig, MuM, load_pretrained
from fastmum.export import released_state
from fastmum.export.__main__ import main
from fastmum.model.encoder import Encoder
from fastmum.pretrained.arguments import parse_overrides

SIZES = 48, 3, 4, 32, 2, 1
ROWS = [line.split("|")[1:-1] for line in Path(__file__).parents[2].joinpath("docs/weights.md").read_text().splitlines()
        if re.match(r"\| .* \| (`--|none:).* \|", line)]  # fmt: skip
TABLE = {name.strip(): [re.findall(r"`([^`]+)`", cell) for cell in cells] for name, *cells in ROWS}
# Epsilon, positions in bfloat16, and key of the file, in the consumer's code.
CONSUMERS = {
    "`mum_vitl16` of the `mum` package": (1e-5, True, None),
    "`mum_vitl16_decoderb` of the `mum` package": (1e-6, False, None),
    "their fork of VGGT": (1e-6, True, "model"),
    "their fork of Reloc3r": (1e-6, False, "model"),
}
IMAGES = torch.randn(2, 3, 48, 80, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def weights(tmp_path) -> Path:
    torch.manual_seed(0)
    model = MuM(ModelConfig(*SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.patch_embed.proj.weight *= 0.05  # a small stream, so that the epsilon shows
    torch.save(released_state(model.state_dict(), encoder_only=False), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_overrides_that_agree(weights, tmp_path, consumer):
    (words,), overrides, _ = TABLE[consumer]
    assert main([str(weights), *words.split(), "--out", str(tmp_path / "out.pth")]) == 0
    eps, rounded, key = CONSUMERS[consumer]
    content = torch.load(tmp_path / "out.pth", weights_only=True)
    state = content[key] if key else content
    reference = ReferenceMuM(*SIZES, norm_eps=eps)
    strict = "mask_token" in state  # the class has a decoder
    assert strict == ("encoder" not in words)
    reference.load_state_dict(state, strict=strict)
    with torch.no_grad():
        theirs = reference.forward_features(IMAGES)["x_norm_patchtokens"]
        theirs = released_encoder(state, IMAGES, SIZES[2], eps) if rounded else theirs
        for agree in (True, False):
            given = parse_overrides(overrides[0].split()) if overrides and agree else {}
            given = given if agree else {"norm_eps": 1e-5 if eps == 1e-6 else 1e-6}
            ours = load_pretrained(tmp_path / "out.pth", **given).forward_features(IMAGES)["x_norm_patchtokens"]
            tolerance = 3e-5 if rounded else 2e-6  # some bits of bfloat16 round the other way
            assert (difference(ours, theirs) < tolerance) == agree


def test_the_table_names_every_consumer():
    others = {"`wrap_model` of RoMa v2", "CAPI's evaluations", "timm", "transformers"}
    assert set(TABLE) == CONSUMERS.keys() | others
    assert [TABLE[name][0] for name in ("timm", "transformers")] == [["--format timm"], ["--format hf"]]


def test_romas_wrapper_replaces_the_forward_of_the_class(weights, monkeypatch):
    """Its new forward calls `get_intermediate_layers` of blocks by number, and converts the model to bfloat16."""
    encoder = load_pretrained(weights, encoder_only=True)
    expected = encoder.get_intermediate_layers(IMAGES, n=[0, 2])
    inner = encoder.get_intermediate_layers
    monkeypatch.setattr(Encoder, "forward", lambda _self, images: inner(images, n=[0, 2]))
    assert all(torch.equal(a, b) for a, b in zip(encoder(IMAGES), expected, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = encoder.to(torch.bfloat16)(IMAGES)
    assert [difference(a.float(), b) < 0.05 for a, b in zip(outputs, expected, strict=True)] == [True, True]
