"""The perceptual loss against finite differences and against LPIPS itself, on an AlexNet of random weights."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import AlexNet_Weights, VGG16_Weights, alexnet
from torchvision.models.vgg import cfgs, make_layers

from cdit.codec import Codec
from cdit.codec.codec import PixelCodec
from cdit.common.errors import UserError
from cdit.common.lpips import load_lpips
from cdit.diffusion import Flow, FlowConfig
from cdit.diffusion.config import PerceptualConfig
from cdit.diffusion.perceptual import PerceptualLoss

SHAPE = (2, 3, 3, 32, 32)  # contexts, goals, a frame
TIME = torch.tensor([[0.1, 0.5, 0.9], [0.6, 0.2, 0.51]])
LOW = TIME <= 0.5


@pytest.fixture(scope="module", autouse=True)
def backbones(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        layers = {"CDIT_LPIPS_BACKBONE": alexnet().features, "CDIT_LPIPS_VGG_BACKBONE": make_layers(cfgs["D"])}
        for name, features in layers.items():
            save_file({f"features.{k}": v for k, v in features.state_dict().items()}, folder / name)
            patch.setenv(name, str(folder / name))
        yield


class Folded(PixelCodec):
    """Latents of 12 channels and half the size."""

    channels, downscale = 12, 2

    def encode(self, frames: Tensor, noise: Tensor | None = None) -> Tensor:
        return F.pixel_unshuffle(frames, 2)

    def decode(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(latents, 2).clamp(-1, 1)


def attached(codec: Codec, **perceptual: float | str) -> Flow:
    flow = Flow(FlowConfig(prediction="velocity", loss="velocity", perceptual=PerceptualConfig(**perceptual)))
    flow.attach(nn.Identity(), codec.decode)
    return flow


def drawn(codec: Codec, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """A velocity that was predicted wrongly, the clean latents and the noise."""
    generator = torch.Generator().manual_seed(1)
    frames, noise, wrong = torch.randn((3, *SHAPE), generator=generator, dtype=dtype) * 0.4
    clean, noise, wrong = codec.encode(frames), codec.encode(noise), codec.encode(wrong)
    return noise - clean + wrong, clean, noise


@pytest.mark.parametrize("codec", [PixelCodec(), Folded()], ids=["pixels", "latents"])
@pytest.mark.parametrize("backbone", ["alex", "vgg"])
def test_it_is_the_lpips_of_the_predicted_clean_frame_at_low_noise(codec: Codec, backbone: str):
    prediction, clean, noise = drawn(codec)
    plain = Flow(FlowConfig()).error(prediction, clean, noise, TIME)
    loss = attached(codec, weight=0.3, backbone=backbone, max_time=0.5).error(prediction, clean, noise, TIME)
    assert torch.equal(loss[~LOW], plain[~LOW])
    t = TIME[..., None, None, None]
    frames = codec.decode((1 - t) * clean + t * noise - t * prediction), codec.decode(clean)
    expected = load_lpips(backbone)(*(x[LOW] for x in frames))
    torch.testing.assert_close(loss[LOW], plain[LOW] + 0.3 * expected)
    assert (expected > 0).all()


@pytest.mark.parametrize("codec", [PixelCodec(), Folded()], ids=["pixels", "latents"])
def test_its_gradient_is_that_of_finite_differences(codec: Codec):
    _, clean, wrong = drawn(codec, torch.float64)
    perceptual = PerceptualLoss(PerceptualConfig(0.7), codec.decode)
    perceptual.lpips.double()
    at = (clean + 0.5 * wrong).requires_grad_()
    (gradient,) = torch.autograd.grad(perceptual(at, clean, TIME.double()).sum(), at)
    assert (gradient.flatten(2).norm(dim=2) > 0).equal(LOW)
    for seed in range(3):
        direction = torch.randn(at.shape, generator=torch.Generator().manual_seed(seed), dtype=at.dtype)
        ahead, behind = (perceptual(at + step * direction, clean, TIME.double()).sum() for step in (1e-7, -1e-7))
        slope = (ahead - behind).item() / 2e-7
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("backbone", ["alex", "vgg"])
def test_with_weight_zero_nothing_changes_and_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch, backbone: str):
    monkeypatch.setenv("CDIT_LPIPS_BACKBONE", "none")
    monkeypatch.setenv("CDIT_LPIPS_VGG_BACKBONE", "none")
    prediction, clean, noise = drawn(PixelCodec())
    flow = attached(PixelCodec(), weight=0.0, backbone=backbone, max_time=1.0)
    assert flow.error(prediction, clean, noise, TIME).equal(Flow(FlowConfig()).error(prediction, clean, noise, TIME))


def test_where_all_is_noisy_it_is_zero():
    prediction, clean, noise = drawn(PixelCodec())
    loss = attached(PixelCodec(), weight=1.0, max_time=0.05).error(prediction.requires_grad_(), clean, noise, TIME)
    assert loss.equal(Flow(FlowConfig()).error(prediction, clean, noise, TIME))
    loss.sum().backward()
    assert prediction.grad.isfinite().all()


def test_it_is_computed_in_full_precision_under_autocast():
    prediction, clean, noise = drawn(PixelCodec())
    flow = attached(PixelCodec(), weight=1.0)
    expected = flow.error(prediction, clean, noise, TIME)
    with torch.autocast("cpu", torch.bfloat16):
        assert flow.error(prediction, clean, noise, TIME).equal(expected)
        assert flow.error(prediction.bfloat16(), clean, noise, TIME).dtype == torch.float32


@pytest.mark.parametrize(("backbone", "weights"), [("alex", AlexNet_Weights), ("vgg", VGG16_Weights)])
def test_missing_weights_name_field_and_variable(monkeypatch: pytest.MonkeyPatch, backbone: str, weights: type):
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no route")

    variable = {"alex": "CDIT_LPIPS_BACKBONE", "vgg": "CDIT_LPIPS_VGG_BACKBONE"}[backbone]
    monkeypatch.delenv(variable)
    monkeypatch.setattr(weights, "get_state_dict", fail)
    with pytest.raises(UserError, match=rf"flow\.perceptual\.weight.*no route.*{variable}"):
        attached(PixelCodec(), weight=0.1, backbone=backbone)


def test_a_file_of_the_other_backbone_is_rejected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    save_file({f"features.{k}": v for k, v in alexnet().features.state_dict().items()}, tmp_path / "alexnet")
    monkeypatch.setenv("CDIT_LPIPS_VGG_BACKBONE", str(tmp_path / "alexnet"))
    with pytest.raises(UserError, match=r"CDIT_LPIPS_VGG_BACKBONE.*VGG16"):
        attached(PixelCodec(), weight=0.1, backbone="vgg")
