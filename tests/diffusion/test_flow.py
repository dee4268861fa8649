"""Rectified flow against the truth it was mixed from, and samplers against flows whose end is known in closed form."""

import math
from itertools import product

import diffusers
import pytest
import torch

from cdit.batch import KeyedDraws
from cdit.diffusion import Flow, FlowConfig, SamplerConfig
from cdit.diffusion.flow import make_scheduler

QUANTITIES = ["clean", "velocity", "noise"]
PAIRS = list(product(QUANTITIES, QUANTITIES))
SCHEDULERS = ["euler", "heun", "dpm", "unipc"]


def truth(times: list[float]) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Clean frame, noise and velocity of frames (2, T, 3, 4, 4) in float64, x_t, and the times (2, T)."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 2, len(times), 3, 4, 4, generator=generator, dtype=torch.float64)
    time = torch.tensor([times, times], dtype=torch.float64)
    t = time[..., None, None, None]
    return {"clean": clean, "noise": noise, "velocity": noise - clean}, (1 - t) * clean + t * noise, time


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_conversions_recover_the_truth(source, target):
    values, noisy, time = truth([0.05, 0.3, 0.5, 0.95])
    flow = Flow(FlowConfig(min_time=0.05))
    torch.testing.assert_close(flow.add_noise(values["clean"], values["noise"], time), noisy)
    converted = flow.convert(values[source], source, target, noisy, time)
    torch.testing.assert_close(converted, values[target], atol=1e-12, rtol=0)


@pytest.mark.parametrize(("source", "time"), [("clean", 0.01), ("noise", 0.99)])
def test_near_the_ends_the_division_is_by_min_time(source, time):
    values, noisy, times = truth([time])
    wrong = values[source] + 1
    velocity = Flow(FlowConfig(min_time=0.05)).convert(wrong, source, "velocity", noisy, times)
    sign = -1 if source == "clean" else 1
    unclamped = sign * (wrong - noisy)
    torch.testing.assert_close(velocity, unclamped / 0.05)
    assert velocity.abs().max() < 25 * (1 + values["velocity"].abs().max())


@pytest.mark.parametrize("time", [0.0, 1.0])
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_conversions_are_finite_at_the_very_ends(source, target, time):
    values, noisy, times = truth([time])
    assert Flow(FlowConfig()).convert(values[source], source, target, noisy, times).isfinite().all()


@pytest.mark.parametrize(("prediction", "loss"), PAIRS)
def test_the_loss_is_zero_at_the_truth_at_all_times(prediction, loss):
    values, _, time = truth([0.0, 0.001, 0.3, 0.999, 1.0])
    flow = Flow(FlowConfig(prediction=prediction, loss=loss))
    error = flow.error(values[prediction], values["clean"], values["noise"], time)
    assert error.shape == (2, 5)
    torch.testing.assert_close(error, torch.zeros_like(error), atol=1e-9, rtol=0)


@pytest.mark.parametrize(("prediction", "loss"), PAIRS)
def test_the_loss_of_a_constant_error_in_closed_form(prediction, loss):
    """With x_t given, an error δ of one quantity is an error of δ times a known factor of another."""
    times = [0.2, 0.5, 0.9]
    values, _, time = truth(times)
    flow = Flow(FlowConfig(prediction=prediction, loss=loss))
    error = flow.error(values[prediction] + 0.3, values["clean"], values["noise"], time)
    in_velocity = {"clean": lambda t: -1 / t, "velocity": lambda t: 1.0, "noise": lambda t: 1 / (1 - t)}
    factors = [in_velocity[prediction](t) / in_velocity[loss](t) for t in times]
    expected = torch.tensor([[(0.3 * f) ** 2 for f in factors]] * 2, dtype=error.dtype)
    torch.testing.assert_close(error, expected, rtol=1e-4, atol=1e-6)


def test_the_loss_of_bfloat16_predictions_is_float32():
    values, _, time = truth([0.5])
    clean, noise = values["clean"].float(), values["noise"].float()
    assert Flow(FlowConfig()).error(clean.bfloat16(), clean, noise, time.float()).dtype == torch.float32


# --- times ---


def draws(*keys: int) -> KeyedDraws:
    return KeyedDraws(keys, torch.device("cpu"))


def test_logit_normal_times_have_the_mean_and_deviation_they_are_given():
    flow = Flow(FlowConfig(time_mean=0.7, time_std=1.4))
    time = flow.draw_time(draws(*range(40)), 1000)
    assert time.shape == (40, 1000)
    assert 0 < time.min() < time.max() < 1
    logit = time.double().logit()
    assert logit.mean().item() == pytest.approx(0.7, abs=0.03)  # four standard errors
    assert logit.std().item() == pytest.approx(1.4, abs=0.02)


def test_uniform_times_fill_the_interval():
    time = Flow(FlowConfig(time_distribution="uniform")).draw_time(draws(0), 40_000)
    expected = torch.linspace(0, 1, 40_000)
    assert (time[0].sort().values - expected).abs().max() < 0.01  # Kolmogorov–Smirnov, far beyond chance


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
def test_times_are_shifted_as_diffusers_shifts_those_of_sampling(distribution):
    plain = Flow(FlowConfig(time_distribution=distribution)).draw_time(draws(0), 50)[0].sort().values
    shifted = Flow(FlowConfig(time_distribution=distribution, shift=3.0)).draw_time(draws(0), 50)[0].sort().values
    reference = diffusers.FlowMatchEulerDiscreteScheduler(1000, shift=3.0)
    reference.set_timesteps(sigmas=plain.numpy())
    torch.testing.assert_close(shifted, reference.sigmas[:-1])
    if distribution == "logit_normal":
        torch.testing.assert_close(shifted.logit(), plain.logit() + math.log(3.0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
def test_times_follow_the_key_and_nothing_else(distribution):
    flow = Flow(FlowConfig(time_distribution=distribution))
    first = flow.draw_time(draws(3), 5)
    torch.rand(7)
    assert torch.equal(flow.draw_time(draws(8, 3), 5)[1:], first)
    assert not torch.equal(flow.draw_time(draws(4), 5), first)


# --- samplers ---


def sample(velocity, noise: torch.Tensor, config: SamplerConfig) -> torch.Tensor:
    """Follows a velocity given as a function of x and time in [0, 1]."""
    flow = Flow(FlowConfig(prediction="velocity"))
    return flow.sample(lambda x, timestep: velocity(x, timestep / 1000), noise, config)


@pytest.mark.parametrize("steps", [1, 50, 100])
@pytest.mark.parametrize("scheduler", ["euler", "heun", "dpm", "unipc"])
def test_a_perfect_clean_predictor_is_believed_to_the_last_step(scheduler, steps):
    """The clamp of training must not leave noise in a sample, however small the last steps are."""
    flow = Flow(FlowConfig(prediction="clean", min_time=0.05))
    point = torch.linspace(-1, 1, 48).view(1, 3, 4, 4)
    out = flow.sample(lambda x, timestep: point, draw(1, 3, 4, 4), SamplerConfig(scheduler, steps))
    torch.testing.assert_close(out, point, atol=1e-3, rtol=0)


def gaussian_velocity(mean: float, std: float):
    """E[ε - x0 | x_t] for data N(mean, std²): x_t is N((1-t)·mean, (1-t)²·std² + t²)."""

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        variance = (1 - t) ** 2 * std**2 + t**2
        return -mean + (t - (1 - t) * std**2) / variance * (x - (1 - t) * mean)

    return velocity


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def gaussian_error(scheduler: str, steps: int, shift: float = 1.0) -> float:
    """Distance from the exact end: the flow carries noise z to mean + std·z."""
    noise = draw(1, 3, 8, 8)
    out = sample(gaussian_velocity(0.4, 0.3), noise, SamplerConfig(scheduler, steps, shift))
    return (out - (0.4 + 0.3 * noise)).abs().max().item()


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 5, 8, 20])
@pytest.mark.parametrize("scheduler", ["euler", "heun"])
def test_a_point_mass_is_hit_in_any_number_of_steps(scheduler, steps, shift):
    """Towards one point the flow is straight, so that Euler makes no error."""
    point = torch.linspace(-1, 1, 48).view(1, 3, 4, 4)
    out = sample(lambda x, t: (x - point) / t, draw(1, 3, 4, 4), SamplerConfig(scheduler, steps, shift))
    torch.testing.assert_close(out, point, atol=2e-5, rtol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [2, 5, 8, 20])
@pytest.mark.parametrize("scheduler", ["dpm", "unipc"])
def test_the_multistep_solvers_hit_a_point_mass_too(scheduler, steps, shift):
    """They go by predictions of the clean frame, which here never change; they take noise to be at t = 0.999."""
    point = torch.linspace(-1, 1, 48).view(1, 3, 4, 4)
    out = sample(lambda x, t: (x - point) / t, draw(1, 3, 4, 4), SamplerConfig(scheduler, steps, shift))
    torch.testing.assert_close(out, point, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_gaussian_is_reached_and_more_steps_come_nearer(scheduler):
    few, some, many = (gaussian_error(scheduler, steps) for steps in (8, 32, 128))
    assert few > 1.5 * some > 2 * many
    assert many < {"euler": 0.03, "heun": 0.01, "dpm": 0.02, "unipc": 0.02}[scheduler]


def test_orders_of_convergence():
    """Four times the steps: a quarter of Euler's error, a sixteenth of Heun's; all others beat Euler."""
    assert gaussian_error("euler", 32) / gaussian_error("euler", 128) == pytest.approx(4, rel=0.25)
    assert gaussian_error("heun", 32) / gaussian_error("heun", 128) == pytest.approx(16, rel=0.25)
    for steps in (8, 16, 32):
        for scheduler in ("heun", "dpm", "unipc"):
            assert gaussian_error(scheduler, steps) < 0.7 * gaussian_error("euler", steps), scheduler


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_samples_of_a_gaussian_have_its_mean_and_deviation(scheduler):
    noise = draw(16, 3, 32, 32)
    out = sample(gaussian_velocity(-0.2, 0.5), noise, SamplerConfig(scheduler, 50))
    assert out.mean().item() == pytest.approx(-0.2, abs=0.02)
    assert out.std().item() == pytest.approx(0.5, rel=0.03)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_network_is_called_at_the_times_where_the_sample_stands(scheduler, shift):
    """With velocity 0 nothing moves; times fall from (nearly) 1 and follow the shift's formula."""
    times = []

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        times.append(t.item())
        return torch.zeros_like(x)

    noise = draw(1, 3, 2, 2)
    out = sample(velocity, noise, SamplerConfig(scheduler, 4, shift))
    assert times[0] >= 0.998
    assert times == sorted(times, reverse=True)
    if scheduler == "euler":
        even = [1.0, 0.75, 0.5, 0.25]
        assert times == pytest.approx([shift * t / (1 + (shift - 1) * t) for t in even], abs=1e-6)
    if scheduler in ("euler", "heun"):
        assert torch.equal(out, noise)
        assert len(set(times)) == 4
    assert len(times) == (7 if scheduler == "heun" else 4)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
@pytest.mark.parametrize("steps", [1, 2, 50, 250])
def test_every_step_is_taken_whatever_the_steps_and_shift(scheduler, shift, steps):
    config = SamplerConfig(scheduler, steps, shift)
    assert len(make_scheduler(config).timesteps) == (2 * steps - 1 if scheduler == "heun" else steps)
    noise = draw(1, 3, 4, 4)
    out = sample(gaussian_velocity(0.0, 1.0), noise, config)
    assert out.isfinite().all()
    if steps == 250:  # data like the noise: what goes in comes out
        torch.testing.assert_close(out, noise, atol=0.2, rtol=0)
