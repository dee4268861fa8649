import math
import os
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchmetrics
from torch import Tensor
from torchvision.models import AlexNet_Weights, alexnet

from cdit.common.errors import UserError
from cdit.common.lpips import Lpips, load_lpips
from cdit.evaluate import metrics
from cdit.evaluate.metrics import HIGHER_IS_BETTER, MAX_PSNR, load_metrics, psnr, sharpness, ssim
from cdit.evaluate.tables import Row, markdown


def frames(seed: int, count: int = 3, size: tuple[int, int] = (40, 48)) -> Tensor:
    """Smooth random pictures in [-1, 1]."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(-1, 1)


def test_psnr_is_the_closed_form():
    a = torch.zeros(2, 3, 16, 16)
    b = torch.stack((torch.full((3, 16, 16), 0.2), torch.full((3, 16, 16), -0.5)))
    expected = [10 * math.log10(4 / 0.04), 10 * math.log10(4 / 0.25)]
    torch.testing.assert_close(psnr(b, a), torch.tensor(expected))


def test_psnr_of_identical_frames_is_finite():
    assert psnr(frames(0), frames(0)).tolist() == [MAX_PSNR] * 3


def test_ssim_is_that_of_the_paper():
    a = frames(0)
    b = (a + 0.3 * torch.randn(a.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    expected = [_ssim(x, y) for x, y in zip(_unit(b), _unit(a), strict=True)]
    np.testing.assert_allclose(ssim(b, a), expected, atol=1e-4)
    torch.testing.assert_close(ssim(a, a), torch.ones(3))


def _unit(x: Tensor) -> np.ndarray:
    return ((x.double() + 1) / 2).numpy()


def _ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, section III: an 11×11 Gaussian window of σ = 1.5; the border is mirrored."""
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2

    def mean(x: np.ndarray) -> np.ndarray:
        x = np.pad(x, ((0, 0), (5, 5), (5, 5)), "reflect")
        return (np.lib.stride_tricks.sliding_window_view(x, (11, 11), axis=(1, 2)) * window).sum((-1, -2))

    c1, c2 = 0.01**2, 0.03**2
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b, cov = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2, mean(a * b) - mean_a * mean_b
    map_ = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(map_.mean())


def test_sharpness_of_a_wave_is_its_amplitude_squared():
    wave = torch.sin(torch.arange(48) * 0.5).expand(3, 3, 40, 48)
    expected = torch.tensor([0.25, 1.0, 0.0])
    scaled = wave * expected.sqrt()[:, None, None, None]
    torch.testing.assert_close(sharpness(scaled, wave), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(sharpness(scaled.mT, wave.mT), expected, atol=1e-3, rtol=0)
    assert sharpness(wave, wave).tolist() == [1.0] * 3


def test_sharpness_over_a_flat_truth_is_finite():
    flat = torch.full((1, 3, 16, 16), 0.3)
    assert sharpness(flat, flat).item() == 1.0
    assert 1 < sharpness(frames(0, 1, (16, 16)), flat).item() < math.inf


@pytest.mark.parametrize("metric", [psnr, sharpness, ssim])
def test_one_value_per_frame_in_full_precision(metric):
    a, b = frames(0), frames(1)
    apart = torch.cat([metric(a[i : i + 1], b[i : i + 1]) for i in range(3)])
    assert metric(a, b).shape == (3,)
    torch.testing.assert_close(metric(a, b), apart)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(metric(a, b), metric(a, b).float())
        torch.testing.assert_close(metric(a, b), apart)


def loaded_from(file: Path) -> Lpips:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CDIT_LPIPS_BACKBONE", str(file))
        return load_lpips()


@pytest.fixture(scope="module")
def trained_lpips() -> Lpips:
    file = os.environ.get("CDIT_LPIPS_BACKBONE") or _shared_backbone()
    if file is None:
        pytest.skip("no AlexNet weights here: set CDIT_LPIPS_BACKBONE")
    return loaded_from(file)


@pytest.fixture(scope="module")
def lpips(tmp_path_factory: pytest.TempPathFactory) -> Lpips:
    """On an AlexNet of random weights, which every machine has."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "alexnet.safetensors"
    safetensors.torch.save_file({f"features.{k}": v for k, v in alexnet().features.state_dict().items()}, file)
    return loaded_from(file)


def _shared_backbone() -> Path | None:
    for folder in Path(__file__).resolve().parents:
        if (file := folder / "shared" / "weights" / "alexnet_features.safetensors").is_file():
            return file
    return None


def test_lpips_is_a_perceptual_distance(trained_lpips: Lpips):
    lpips = trained_lpips
    a, b = frames(0, size=(64, 64)), frames(1, size=(64, 64))
    assert lpips(a, a).tolist() == [0, 0, 0]
    torch.testing.assert_close(lpips(a, b), lpips(b, a))
    torch.testing.assert_close(lpips(a, b)[1:2], lpips(a[1:2], b[1:2]))
    # A small shift is a smaller change to the eye than as much squared error of noise.
    moved = a.roll(2, dims=-1)
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(0))
    noisy = a + noise * ((moved - a).square().mean() / noise.square().mean()).sqrt()
    assert (lpips(moved, a) < lpips(noisy, a)).all()


def test_lpips_is_the_formula_of_the_paper(lpips: Lpips):
    """Features of the five ReLUs, normalised over channels; squared difference, linear heads, mean over the picture."""
    a, b = frames(0, size=(64, 80)), frames(1, size=(64, 80))
    heads = torch.load(
        Path(torchmetrics.__file__).parent / "functional/image/lpips_models/alex.pth",
        weights_only=True,
        map_location="cpu",
    )
    network = alexnet().features.eval()
    state = {f"{k.partition('.')[2]}": v for k, v in lpips.net.net.state_dict().items()}
    network.load_state_dict(state)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, distance, head = torch.cat((a, b)), torch.zeros(3), 0
    x = (x - shift[:, None, None]) / scale[:, None, None]
    with torch.no_grad():
        for i, layer in enumerate(network):
            x = layer.forward(x.clone())
            if i in (1, 4, 7, 9, 11):
                unit = x / x.norm(dim=1, keepdim=True).clamp(min=1e-8)
                weighted = (unit[:3] - unit[3:]).square() * heads[f"lin{head}.model.1.weight"]
                distance, head = distance + weighted.sum(1).mean((1, 2)), head + 1
    torch.testing.assert_close(lpips(a, b), distance, atol=1e-4, rtol=1e-3)


def test_the_direction_that_tables_state_is_that_of_the_metric(lpips: Lpips):
    truth = frames(0, size=(64, 64))
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    near, far = ((truth + scale * noise).clamp(-1, 1) for scale in (0.1, 0.4))
    for name, metric in {"psnr": psnr, "ssim": ssim, "lpips": lpips}.items():
        better, worse = metric(near, truth), metric(far, truth)
        assert bool((better > worse).all() if HIGHER_IS_BETTER[name] else (better < worse).all())
        rows = [Row("model", 1.0, 4, name, 0.5)]
        assert ("↑" if HIGHER_IS_BETTER[name] else "↓") in markdown(rows).splitlines()[0]


def test_a_broken_backbone_file_is_the_users_mistake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for content in (b"not safetensors", safetensors.torch.save({"other": torch.zeros(1)})):
        (tmp_path / "weights").write_bytes(content)
        monkeypatch.setenv("CDIT_LPIPS_BACKBONE", str(tmp_path / "weights"))
        with pytest.raises(UserError, match="CDIT_LPIPS_BACKBONE"):
            load_metrics(names=["lpips"])


def test_without_weights_lpips_is_left_out_with_one_line(monkeypatch: pytest.MonkeyPatch, capsys):
    def fail(*args, **kwargs):
        print("Downloading")  # as torch.hub does
        raise urllib.error.URLError("no route")

    monkeypatch.delenv("CDIT_LPIPS_BACKBONE", raising=False)
    monkeypatch.setattr(AlexNet_Weights, "get_state_dict", fail)
    assert list(load_metrics()) == ["psnr", "ssim"]
    printed = capsys.readouterr()
    assert printed.out == ""
    downloading, line = printed.err.splitlines()
    assert downloading == "Downloading"
    assert "CDIT_LPIPS_BACKBONE" in line


@pytest.mark.parametrize(
    ("size", "left"), [((5, 40), ["psnr"]), ((6, 31), ["psnr", "ssim"]), ((32, 32), ["psnr", "ssim", "lpips"])]
)
def test_what_frames_are_too_small_for_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys, size: tuple[int, int], left: list[str]
):
    monkeypatch.setattr(metrics, "load_metric_lpips", lambda *_: Lpips.__new__(Lpips))
    found = load_metrics(image_size=size)
    assert list(found) == left
    printed = capsys.readouterr().err
    assert printed.count("\n") == (len(left) < 3)
    assert ("LPIPS needs 32" in printed) is ("lpips" not in left)
    assert ("SSIM needs 6" in printed) is ("ssim" not in left)
    a, b = frames(0, size=size), frames(1, size=size)
    for name in set(left) - {"lpips"}:
        assert found[name](a, b).isfinite().all()


def test_lpips_takes_the_smallest_frames_that_it_is_offered(lpips: Lpips):
    side = metrics.MIN_SIDE["lpips"]
    assert lpips(frames(0, size=(side, side)), frames(1, size=(side, side))).isfinite().all()
