"""Exports of features, read by the packages that they are made for: transformers' folders and ONNX files."""

import contextlib
import dataclasses
import json
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from released import difference
from safetensors.torch import load_file, save_file

from benchmarks.reference.model import ReferenceMuM
from fastmum import ModelConfig, MuM, load_pretrained
from fastmum.engine.checkpoint import Checkpoints
from fastmum.export import FORMATS, ExportError, export, folders, released_state
from fastmum.export.__main__ import main
from fastmum.export.onnx_file import EncoderGraph
from fastmum.model.inputs import IMAGENET_MEAN, IMAGENET_STD
from fastmum.pretrained import WeightsError, read_pretrained


@pytest.fixture
def model() -> MuM:
    """A model whose blocks change features a lot, unlike one that is fresh."""
    torch.manual_seed(0)
    model = MuM(ModelConfig(48, 3, 4, 32, 2, 1, norm_eps=1e-6)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture
def weights(model, tmp_path):
    """A file of the whole model."""
    torch.save(released_state(model.state_dict(), encoder_only=False), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


@pytest.fixture
def images():
    """Normalised, neither square nor of the size that anything was made for."""
    return torch.randn(3, 3, 48, 80, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture
def folder(transformers, weights, model):
    done = export(weights, "hf", norm_eps=model.config.norm_eps)
    assert done.file == weights.with_name("weights_hf")
    assert f"transformers {transformers.__version__}" in done.agreement
    return done.file


def test_features_are_ours_and_images_are_prepared_as_in_training(transformers, folder, model, images):
    theirs, report = transformers.DINOv3ViTModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report  # no key is missing, unexpected or of another shape
    with torch.no_grad():
        output = theirs.eval()(images, output_hidden_states=True)
        ours = model.forward_features(images)
        middle, _ = model.get_intermediate_layers(images, n=2, norm=False)
    torch.testing.assert_close(output.last_hidden_state[:, 1:], ours["x_norm_patchtokens"], rtol=0, atol=1e-4)
    torch.testing.assert_close(output.pooler_output, ours["x_norm_clstoken"], rtol=0, atol=1e-4)
    torch.testing.assert_close(output.hidden_states[model.config.depth - 1][:, 1:], middle, rtol=1e-4, atol=1e-4)
    assert type(transformers.AutoModel.from_pretrained(folder)) is transformers.DINOv3ViTModel
    backbone = transformers.DINOv3ViTBackbone.from_pretrained(folder)
    assert backbone(torch.zeros(1, 3, 32, 48)).feature_maps[-1].shape == (1, model.config.embed_dim, 2, 3)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    values = processor(image, return_tensors="pt")["pixel_values"]
    pixels = np.asarray(image.resize((256, 256), Image.Resampling.BICUBIC)) / 255
    expected = (pixels - IMAGENET_MEAN) / IMAGENET_STD
    np.testing.assert_allclose(values[0].permute(1, 2, 0), expected, atol=1e-5)


def test_bfloat16_positions_become_float32_with_a_warning(transformers, weights, model, tmp_path, images, caplog):
    encoder = export(weights, "released", encoder_only=True, norm_eps=model.config.norm_eps).file
    done = export(encoder, "hf", tmp_path / "out", norm_eps=model.config.norm_eps)
    assert "positions" in caplog.text
    theirs = transformers.DINOv3ViTModel.from_pretrained(done.file).eval()
    exact = load_pretrained(encoder, rope_dtype="float32", norm_eps=model.config.norm_eps)
    with torch.no_grad():
        tokens, ours = theirs(images).last_hidden_state[:, 1:], exact.forward_features(images)["x_norm_patchtokens"]
    torch.testing.assert_close(tokens, ours, rtol=0, atol=1e-4)


def test_force_replaces_an_earlier_export_and_nothing_else(folder, weights, tmp_path, refusal):
    assert "--force" in refusal(main, weights, "--format", "hf")
    (folder / "model.safetensors").write_bytes(b"")
    assert main([str(weights), "--format", "transformers", "--force"]) == 0
    assert (folder / "model.safetensors").stat().st_size > 10_000
    precious = tmp_path / "precious"
    precious.mkdir()
    assert main([str(weights), "--format", "hf", "--out", str(precious)]) == 0  # it was empty
    for file in precious.iterdir():
        file.unlink()
    (precious / "thesis.tex").touch()
    assert str(precious) in refusal(main, weights, "--format", "hf", "--out", precious, "--force")
    assert [file.name for file in precious.iterdir()] == ["thesis.tex"]


def test_wrong_features_are_refused_and_transformers_is_optional(weights, monkeypatch):
    right = folders.dinov3_config
    with monkeypatch.context() as patch:
        patch.setattr(folders, "dinov3_config", lambda *sizes: right(*sizes) | {"layer_norm_eps": 0.1})
        with pytest.raises(ExportError, match=r"transformers .* computes other features"):
            export(weights, "hf")
    assert [file.name for file in weights.parent.iterdir()] == ["weights.pth"]
    monkeypatch.setitem(sys.modules, "transformers", None)
    done = export(weights, "hf")
    assert done.agreement == ""
    assert json.loads((done.file / "config.json").read_text())["model_type"] == "dinov3_vit"


def test_there_and_back(folder, model):
    again = export(folder, "safetensors").file
    assert again == folder.with_name(f"{folder.name}.safetensors")
    for encoder in (load_pretrained(folder), load_pretrained(again)):
        assert (encoder.config.norm_eps, encoder.config.num_heads) == (1e-6, model.config.num_heads)
        for name, tensor in encoder.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name]), name
    assert load_pretrained(again, norm_eps=1e-4).config.norm_eps == 1e-4  # before that of the metadata


def test_layer_scale_and_absent_biases_of_others(transformers, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.DINOv3ViTConfig(**sizes, layerscale_value=0.3, pos_embed_rescale=None)
    theirs = transformers.DINOv3ViTModel(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "mask_token" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        ours = load_pretrained(tmp_path / "theirs").forward_features(images)
        output = theirs(images)
    torch.testing.assert_close(ours["x_norm_patchtokens"], output.last_hidden_state[:, 1:], rtol=0, atol=1e-4)
    torch.testing.assert_close(ours["x_norm_clstoken"], output.pooler_output, rtol=0, atol=1e-4)


def test_other_models_are_refused(folder):
    before = (folder / "config.json").read_text()
    for key, value in (("num_register_tokens", 4), ("use_gated_mlp", True), ("rope_theta", 10.0)):
        (folder / "config.json").write_text(json.dumps(json.loads(before) | {key: value}))
        with pytest.raises(WeightsError, match=f"{folder}.*{key} is {value}"):
            load_pretrained(folder)
    (folder / "config.json").write_text(before)
    tensors = load_file(folder / "model.safetensors")
    for name, error in (("layer.1.norm2.bias", r"blocks.1.norm2.bias \[48\]"), ("embeddings.cls_token", "cls_token")):
        del tensors[name]
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(WeightsError, match=error):
            load_pretrained(folder)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    for content, error in (
        (None, "no model.safetensors"), ("[]", "index.json"), ('{"weight_map": {"a": "../../weights"}}', "outside"),
        ('{"weight_map": {"a": "missing.safetensors"}}', r"missing\.safetensors"),
    ):  # fmt: skip
        if content is not None:
            index.write_text(content)
        with pytest.raises(WeightsError, match=error):
            load_pretrained(folder)


def test_shards_of_transformers(transformers, folder, model, tmp_path):
    transformers.AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    encoder = load_pretrained(tmp_path / "shards")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in encoder.state_dict().items())


def test_a_run_states_its_image_size_step_data_and_metrics(transformers, model, tmp_path, refusal):
    run = tmp_path / "run"
    values = {"model_config": dataclasses.asdict(model.config)}
    with contextlib.closing(Checkpoints(run / "checkpoints", keep=2)) as writer:
        writer.save(7, {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}, values)
    config = {"run": {"name": "mine"}, "data": {"image_size": 96, "manifests": ["/data/co3d.arrow"]}, "train": None}
    (run / "config.yaml").write_text(json.dumps(config))
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {s}, "held_out_loss": {s / 8}}}\n' for s in (6, 7, 8)))
    assert main([str(run), "--format", "hf", "--license", "cc-by-4.0", "--out", str(tmp_path / "hf")]) == 0
    card = (tmp_path / "hf/README.md").read_text()
    for words in ("license: cc-by-4.0", "# mine", "| step | 7 ", "| data | co3d |", "0.8750 (step 7)", "96 x 96"):
        assert words in card
    assert str(tmp_path) not in card
    for image in (Image.new(mode, (50, 40)) for mode in ("RGB", "L", "RGBA", "1", "P", "CMYK", "LA", "I;16")):
        values = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")(image, return_tensors="pt")
        assert values["pixel_values"].shape == (1, 3, 96, 96), image.mode
    for source, out in ((run, "s.safetensors"), (tmp_path / "hf", "s.safetensors"), (tmp_path / "s.safetensors", "hf")):
        export(source, "safetensors" if "." in out else "hf", tmp_path / out, force=True)
        assert read_pretrained(tmp_path / out).image_size == 96
    assert "model card" in refusal(main, run, "--license", "mit")


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_timm_has_the_same_names_and_features(weights, images, eps, caplog):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    done = export(weights, "timm", norm_eps=eps)
    assert f"timm {timm.__version__}" in done.agreement
    assert ("norm_layer" in caplog.text) == (eps != 1e-5)
    more = {} if eps == 1e-5 else {"norm_layer": partial(torch.nn.LayerNorm, eps=eps)}
    theirs = timm.create_model(f"local-dir:{done.file}", pretrained=True, **more).eval()
    encoder = load_pretrained(weights, encoder_only=True, norm_eps=eps)
    assert set(encoder.state_dict()) - set(theirs.state_dict()) == {"rope_embed.periods"}
    with torch.no_grad():
        ours, tokens, cls = encoder.forward_features(images), theirs.forward_features(images), theirs(images)
    assert difference(tokens[:, 1:], ours["x_norm_patchtokens"]) < 1e-6
    assert difference(cls, ours["x_norm_clstoken"]) < 1e-6


def test_names_in_a_timm_folder(weights, model, monkeypatch):
    """Without timm: its `Eva` has the encoder's names."""
    monkeypatch.setitem(sys.modules, "timm", None)
    folder = export(weights, "timm").file
    state, about = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    encoder = load_pretrained(weights, encoder_only=True).state_dict()
    assert set(encoder) - set(state) == {"rope_embed.periods"}
    assert all(torch.equal(tensor, encoder[name]) for name, tensor in state.items())
    assert about["model_args"]["attn_type"] == "rope"
    assert about["model_args"]["num_heads"] == model.config.num_heads


def test_weights_that_are_not_finite_are_refused(weights, tmp_path, refusal):
    state = torch.load(weights)
    for value in (float("nan"), float("inf")):
        state["blocks.1.mlp.fc1.bias"][3] = value
        torch.save(state, weights)
        for name in FORMATS:
            error = refusal(main, weights, "--format", name, "--out", tmp_path / "out")
            assert "blocks.1.mlp.fc1.bias" in error
            assert not (tmp_path / "out").exists()


def test_the_authors_forks_read_a_wrapped_state_strictly(weights, model, tmp_path, caplog, refusal):
    assert main([str(weights), "--wrap", "model", "--out", str(tmp_path / "w.pth")]) == 0
    assert f"decoder_num_heads={model.config.decoder_num_heads}" in caplog.text  # theirs have 16
    content = torch.load(tmp_path / "w.pth", weights_only=True)
    reference = ReferenceMuM(48, 3, 4, 32, 2, 1, norm_eps=1e-6)
    reference.load_state_dict(content["model"], strict=True)
    assert content.keys() == {"model"}
    assert type(load_pretrained(tmp_path / "w.pth")) is MuM
    assert "--wrap" in refusal(main, weights, "--format", "hf", "--wrap", "model")
    caplog.clear()
    export(weights, encoder_only=True)
    export(weights, out=tmp_path / "16.pth", decoder_num_heads=2)
    assert caplog.text.count("decoder_num_heads=2") == 1


def test_the_graph_computes_the_encoders_features(weights, images):
    """With positions in bfloat16; those in float32 are compared by onnxruntime."""
    encoder = load_pretrained(weights, encoder_only=True, rope_dtype="bfloat16")
    graph = EncoderGraph(encoder).eval()
    with torch.no_grad():
        found, ours = graph(images), encoder.forward_features(images)
    for tokens, name in zip(found, ("x_norm_clstoken", "x_norm_patchtokens"), strict=True):
        # A bit of q may round the other way; positions in float32 would differ by more than 1e-3.
        torch.testing.assert_close(tokens, ours[name], rtol=0, atol=1e-4)
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
    axes = [[d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] for x in graph.graph.input]
    axes += [[d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] for x in graph.graph.output]
    assert axes == [["batch", 3, "height", "width"], ["batch", 48], ["batch", "patches", 48]]
    about = session.get_modelmeta().custom_metadata_map
    assert (json.loads(about["patch_size"]), about["positions"]) == (16, positions)
    assert json.loads(about["model_config"])["norm_eps"] == model.config.norm_eps
    np.testing.assert_allclose(json.loads(about["image_mean"]), IMAGENET_MEAN)


def test_missing_packages_are_named(weights, monkeypatch, refusal):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "pip install 'fastmum[onnx]'" in refusal(main, weights, "--format", "onnx")
