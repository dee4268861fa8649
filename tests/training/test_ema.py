import numpy as np
import pytest
import torch
from torch import nn

from cdit.training.config import EMAConfig
from cdit.training.ema import EMA


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))


def drift(network: nn.Module) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter))


def values(network: nn.Module) -> np.ndarray:
    return np.concatenate([p.detach().double().numpy().ravel() for p in network.parameters()])


def averaged(ema: EMA) -> np.ndarray:
    with ema.applied():
        return values(ema.network)


def test_average_follows_the_documented_decay(network: nn.Module):
    """1 - (1 + step)^-power, at most `decay`: 0 at the first step, the largest value from step 21 on."""
    ema = EMA(network, EMAConfig(decay=0.9, warmup_power=0.75))
    expected = values(network)
    for step in range(30):
        drift(network)
        ema.step()
        decay = min(0.9, 1 - (1 + step) ** -0.75)
        expected = decay * expected + (1 - decay) * values(network)
        np.testing.assert_allclose(averaged(ema), expected, rtol=0, atol=1e-5)


def test_fixed_decay_from_the_initial_weights_and_over_a_resume(network: nn.Module):
    ema = EMA(network, EMAConfig(decay=0.7, warmup_power=0))
    expected = values(network)
    for step in range(5):
        if step == 1:
            ema = continued(ema, EMAConfig(decay=0.7, warmup_power=0), step)
        drift(network)
        ema.step()
        expected = 0.7 * expected + 0.3 * values(network)
        np.testing.assert_allclose(averaged(ema), expected, rtol=0, atol=1e-5)


def continued(ema: EMA, config: EMAConfig, step: int) -> EMA:
    """Another average of the same network, with the tensors of the first."""
    other = EMA(ema.network, config)
    for name, tensor in other.tensors().items():
        tensor.copy_(ema.tensors()[name])
    other.resume(step)
    return other


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_weights_and_mode_come_back(network: nn.Module, training: bool, fails: bool):
    network.train(training)
    ema = EMA(network, EMAConfig())
    drift(network)
    before = values(network)
    try:
        with ema.applied():
            assert not any(module.training for module in network.modules())
            assert not np.array_equal(values(network), before)
            if fails:
                raise RuntimeError("something in a probe")
    except RuntimeError:
        assert fails
    assert np.array_equal(values(network), before)
    assert all(module.training is training for module in network.modules())


def test_an_average_that_was_saved_goes_on_as_if_it_had_not(network: nn.Module):
    config = EMAConfig(decay=0.99, warmup_power=0.75)
    ema = EMA(network, config)
    for _ in range(3):
        drift(network)
        ema.step()
    read = continued(ema, config, 3)
    assert np.array_equal(averaged(read), averaged(ema))
    for _ in range(2):
        drift(network)
        ema.step()
        read.step()
    assert np.array_equal(averaged(read), averaged(ema))
    assert set(ema.tensors()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
