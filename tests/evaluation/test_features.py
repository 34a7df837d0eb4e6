"""Networks that give features: their weights, their shapes, and what is refused."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn

from conftest import picture
from fitv2.errors import UserError
from fitv2.evaluation.features import load_extractor

CPU = torch.device("cpu")


def pixels(count=2, height=24, width=70):
    images = [np.asarray(picture(width, height, seed)) for seed in range(count)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def test_efficientnet_takes_any_shape_and_each_picture_alone():
    judge = load_extractor("efficientnet", CPU)
    found = judge(pixels(3))["efficientnet"]
    assert found.shape == (3, 1280)
    torch.testing.assert_close(judge(pixels(3)[1:2])["efficientnet"], found[1:2], atol=1e-4, rtol=1e-3)


def test_efficientnet_is_trained():
    """It tells a picture from its halves exchanged less than from another picture."""
    judge = load_extractor("efficientnet", CPU)
    first, other = pixels(2, 64, 64)
    found = nn.functional.normalize(judge(torch.stack([first, first.flip(2), other]))["efficientnet"], dim=1)
    assert found[0] @ found[1] > found[0] @ found[2]


@pytest.fixture(scope="module")
def inception(fidelity, tmp_path_factory):
    """torch-fidelity's network with random weights, and the file of these."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(path))
    torch.save(network.state_dict(), path)
    return network, path


def test_inception_is_torch_fidelitys(inception):
    network, path = inception
    found = load_extractor("inception", CPU, path)(pixels())
    pooled, logits = network(pixels())
    torch.testing.assert_close(found["inception"], pooled)
    torch.testing.assert_close(found["inception_logits"], logits)
    assert {name: value.shape[1] for name, value in found.items()} == {
        "inception": 2048, "inception_spatial": 2023, "inception_logits": 1008,
    }  # fmt: skip


def test_spatial_features_are_laid_out_as_adms(inception):
    """Places in rows, seven channels each: NHWC, as TensorFlow has them."""
    network, path = inception
    seen = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda *parts: seen.append(parts[2]))
    network(pixels())
    found = load_extractor("inception", CPU, path)(pixels())["inception_spatial"]
    expected = np.transpose(seen[0].numpy()[:, :7], (0, 2, 3, 1)).reshape(2, -1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_weights_that_would_run_code_are_refused(tmp_path, fidelity):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"x": Evil()}))
    with pytest.raises(UserError, match="holds no weights"):
        load_extractor("inception", CPU, tmp_path / "evil.pth")


def test_weights_that_are_not_there(tmp_path, fidelity, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="give `inception_weights` its path, or `allow_download`"):
        load_extractor("inception", CPU)
    with pytest.raises(UserError, match="does not exist"):
        load_extractor("inception", CPU, tmp_path / "none.pth")
    with pytest.raises(UserError, match="give `dinov2_weights` a folder"):
        load_extractor("dinov2", CPU, tmp_path / "none")


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(
        UserError, match=r"efficientnet_lite_pytorch is not installed: pip install 'fitv2\[eval\]'"
    ):
        load_extractor("efficientnet", CPU)


def test_dinov2_is_transformers(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=14
    )
    network = Dinov2Model(config).eval()
    network.save_pretrained(tmp_path)
    found = load_extractor("dinov2", CPU, tmp_path)(pixels())["dinov2"]
    assert found.shape == (2, 32)
    squeezed = nn.functional.interpolate(pixels().float(), [224, 224], mode="bicubic", antialias=True).clamp(
        0, 255
    )
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = network((squeezed / 255 - mean) / std).last_hidden_state[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_name_that_there_is_not():
    with pytest.raises(UserError, match="did you mean inception"):
        load_extractor("inceptoin", CPU)
