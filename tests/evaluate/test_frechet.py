import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cdit.common.errors import UserError
from cdit.evaluate.frechet import Features, frechet_distance
from cdit.evaluate.metrics import load_metrics


def exactly(mean: Tensor, deviations: Tensor) -> Tensor:
    """Features whose mean and (unbiased) covariance are exactly these, the covariance diagonal."""
    basis = torch.cat((torch.eye(len(mean)), -torch.eye(len(mean)))).double()
    return mean + basis * deviations * ((len(basis) - 1) / 2) ** 0.5


def test_the_distance_of_two_normal_distributions():
    """‖μ₁ - μ₂‖² + Σ(σ₁ - σ₂)² where both covariances are diagonal (Dowson and Landau 1982)."""
    first = exactly(torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([1.0, 0.5, 2.0]).double())
    second = exactly(torch.tensor([1.0, 0.0, 3.5]).double(), torch.tensor([3.0, 0.5, 1.0]).double())
    assert frechet_distance(first, second) == pytest.approx(4 + 0.25 + 4 + 0 + 1)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def test_correlated_features_by_the_matrix_square_root():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(60, 5)) @ random.normal(size=(5, 5)), random.normal(size=(50, 5)) + 0.3
    (m, s), (n, t) = ((z.mean(0), np.cov(z, rowvar=False)) for z in (x, y))
    values, vectors = np.linalg.eigh(s)
    root = vectors @ np.diag(values**0.5) @ vectors.T
    overlap = np.linalg.eigvalsh(root @ t @ root)  # symmetric, with the eigenvalues of s·t
    expected = ((m - n) ** 2).sum() + np.trace(s + t) - 2 * (overlap**0.5).sum()
    assert frechet_distance(torch.from_numpy(x).float(), torch.from_numpy(y).float()) == pytest.approx(expected, 1e-5)


def test_networks_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "odd_networks.py").write_text(
        "import torch\ndef none():\n    return 3\ndef flat():\n    return torch.nn.Flatten(0)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("odd_networks:missing", "no_such_module:f", "vgg", "", "odd_networks"):
        with pytest.raises(UserError, match=r"fid_network is .*MODULE:FUNCTION"):
            Features(name, "fid_network")
    with pytest.raises(UserError, match="fvd_network: odd_networks:none returns a int"):
        Features("odd_networks:none", "fvd_network")
    with pytest.raises(UserError, match=r"\(2, 3, 4, 4\) became \(96,\)"):
        Features("odd_networks:flat", "fid_network")(torch.zeros(2, 3, 4, 4))


@pytest.mark.parametrize(
    ("package", "load"),
    [
        ("torch-fidelity", lambda: Features("inception", "fid_network")),
        ("cd-fvd", lambda: Features("i3d", "fvd_network")),
        ("dreamsim", lambda: load_metrics(names=["dreamsim"])),
    ],
)
def test_packages_that_are_not_installed(package: str, load: Callable[[], Any], monkeypatch: pytest.MonkeyPatch):
    module = {"torch-fidelity": "torch_fidelity", "cd-fvd": "cdfvd", "dreamsim": "dreamsim"}[package]
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # an import of it fails
    with pytest.raises(UserError, match=f"pip install {package}"):
        load()


def test_dreamsim_is_given_frames_in_0_to_1(monkeypatch: pytest.MonkeyPatch):
    """By a stand-in for the package, whose real weights have to be downloaded."""
    package, seen = ModuleType("dreamsim"), []

    def distance(first: Tensor, second: Tensor) -> Tensor:
        seen.extend((first, second))
        return (first - second).abs().mean((1, 2, 3))

    package.dreamsim = lambda device, cache_dir: (distance, None)
    monkeypatch.setitem(sys.modules, "dreamsim", package)
    metric = load_metrics(names=["dreamsim"])["dreamsim"]
    grey = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]).reshape(5, 1, 1, 1).expand(-1, 3, 32, 48)
    assert metric(grey, -grey).tolist() == pytest.approx([1, 0.5, 0, 0.5, 1])
    for frames, expected in zip(seen, ([0, 0.25, 0.5, 0.75, 1], [1, 0.75, 0.5, 0.25, 0]), strict=True):
        assert frames.shape == (5, 3, 224, 224)
        assert frames.mean((1, 2, 3)).tolist() == pytest.approx(expected)


def test_inception_as_torch_fidelity_has_it(monkeypatch: pytest.MonkeyPatch):
    """With random weights: the real ones have to be downloaded."""
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.manual_seed(0)
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
    network = Features("inception", "fid_network")
    frames = torch.rand(2, 3, 64, 64) * 2 - 1
    features = network(frames)
    assert features.shape == (2, 2048)
    (expected,) = network.net.net(((frames + 1) * 127.5).round().byte())
    assert torch.equal(features, expected)
