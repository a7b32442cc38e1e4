"""Against numbers of the authors' released model: every output and every gradient."""

import torch
from released import TOLERANCE, difference

from fastmum import ModelConfig, MuM


def test_outputs_and_every_gradient(released):
    config, tensors = released.config, released.tensors
    model = MuM(ModelConfig(**released.sizes, norm_eps=released.norm_eps))
    released.load_into(model)
    output = model(released.images, [config["S"]] * config["B"], config["mask_ratio"], tensors["mask_noise"])
    released.check(model, output.loss)
    assert torch.equal(torch.zeros_like(tensors["mask"]).scatter(1, output.masked_ids, 1.0), tensors["mask"])
    theirs = tensors["pred"].gather(1, output.masked_ids[:, :, None].expand_as(output.pred))
    assert difference(output.pred, theirs) < TOLERANCE
    for ratio in ({"mask_ratio": config["mask_ratio"]}, {"lengths": config["mask_ratio"]}):  # by name, second argument
        loss, pred, mask = model(tensors["images"], **ratio, noise=tensors["mask_noise"])
        assert difference(loss, tensors["loss"][0]) < TOLERANCE
        assert difference(pred, tensors["pred"]) < TOLERANCE
        assert torch.equal(mask, tensors["mask"])
    features = model.forward_features(released.images)
    assert torch.equal(model.norm(features["x_prenorm"])[:, 0], features["x_norm_clstoken"])
    for i, ours in enumerate(model.get_intermediate_layers(released.images, n=2, reshape=True)):
        assert difference(ours, tensors[f"intermediate.{i}"]) < TOLERANCE
