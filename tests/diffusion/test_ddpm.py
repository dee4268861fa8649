"""The DDPM objective and sampler against re-derivations in float64 from the definitions, with numpy loops."""

import math

import numpy as np
import pytest
import torch

from cdit.batch import KeyedDraws
from cdit.common.errors import UserError
from cdit.diffusion import DDPM, DDPMConfig, SamplerConfig, check_sampler

BETAS = np.linspace(1e-4, 0.02, 1000)
ALPHA_BAR = np.cumprod(1 - BETAS)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def time_of(indices: list[int]) -> torch.Tensor:
    """The middle of the interval of diffusion times that stands for each index."""
    return (torch.tensor(indices, dtype=torch.float64) + 0.5) / 1000


def posterior(alpha_bar: np.ndarray, i: int) -> tuple[float, float, float, float, float]:
    """Weights of x0 and x_i in the mean of q(x_{i-1} | x_i, x0), its variance, β_i, and ᾱ_i.

    By Bayes' rule on the two normals q(x_{i-1} | x0) and q(x_i | x_{i-1}): precisions add up.
    """
    before = alpha_bar[i - 1] if i else 1.0
    alpha = alpha_bar[i] / before
    if i == 0:
        return 1.0, 0.0, 0.0, 1 - alpha, alpha_bar[0]
    precision = alpha / (1 - alpha) + 1 / (1 - before)
    return (
        math.sqrt(before) / (1 - before) / precision,
        math.sqrt(alpha) / (1 - alpha) / precision,
        1 / precision,
        1 - alpha,
        alpha_bar[i],
    )


def reverse_step(alpha_bar: np.ndarray, i: int, x: np.ndarray, noise: np.ndarray, position: np.ndarray):
    """Mean and variance of the predicted reverse step."""
    clean_weight, noisy_weight, variance, beta, bar = posterior(alpha_bar, i)
    clean = (x - math.sqrt(1 - bar) * noise) / math.sqrt(bar)
    floor = variance or posterior(alpha_bar, 1)[2]
    fraction = (position + 1) / 2
    return clean_weight * clean + noisy_weight * x, beta**fraction * floor ** (1 - fraction)


# --- loss ---


def reference_loss(prediction, clean, noise, i: int, mse: bool = True) -> float:
    predicted, position = prediction
    x = math.sqrt(ALPHA_BAR[i]) * clean + math.sqrt(1 - ALPHA_BAR[i]) * noise
    mean, variance = reverse_step(ALPHA_BAR, i, x, predicted, position)
    if i:
        clean_weight, noisy_weight, true_variance, *_ = posterior(ALPHA_BAR, i)
        error = clean_weight * clean + noisy_weight * x - mean
        nats = 0.5 * (np.log(variance / true_variance) + (true_variance + error**2) / variance - 1)
    else:

        def cdf(z):
            return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))

        upper = np.where(clean > 0.999, 1.0, cdf((clean + 1 / 255 - mean) / np.sqrt(variance)))
        lower = np.where(clean < -0.999, 0.0, cdf((clean - 1 / 255 - mean) / np.sqrt(variance)))
        nats = -np.log(np.maximum(upper - lower, 1e-12))
    return np.mean((predicted - noise) ** 2) * mse + np.mean(nats) / np.log(2)


@pytest.mark.parametrize("index", [0, 1, 2, 10, 500, 999])
def test_the_hybrid_loss_is_the_mean_squared_error_plus_the_bound_in_bits(index):
    clean, noise = draw(2, 3, 4, 4, 4).clamp(-1.4, 1.4), draw(2, 3, 4, 4, 4, seed=1)  # latents leave [-1, 1]
    predicted, position = noise + 0.05 * draw(2, 3, 4, 4, 4, seed=2), 1.5 * draw(2, 3, 4, 4, 4, seed=3)  # v as well
    loss = DDPM(DDPMConfig()).error(
        torch.cat((predicted, position), dim=2), clean, noise, time_of([index]).expand(2, 3)
    )
    assert loss.shape == (2, 3)
    for b in range(2):
        for g in range(3):
            parts = [x[b, g].numpy() for x in (predicted, position, clean, noise)]
            expected = reference_loss(parts[:2], *parts[2:], index)
            assert loss[b, g].item() == pytest.approx(expected, rel=1e-9)


def test_each_frame_is_measured_at_its_own_time():
    clean, noise, prediction = draw(1, 3, 2, 4, 4), draw(1, 3, 2, 4, 4, seed=1), draw(1, 3, 4, 4, 4, seed=2)
    ddpm, indices = DDPM(DDPMConfig()), [3, 0, 700]
    together = ddpm.error(prediction, clean, noise, time_of(indices)[None])
    for goal, index in enumerate(indices):
        alone = ddpm.error(prediction[:, [goal]], clean[:, [goal]], noise[:, [goal]], time_of([index])[None])
        torch.testing.assert_close(together[:, [goal]], alone)


@pytest.mark.parametrize("index", [0, 1, 400])
def test_the_bound_teaches_the_variance_and_never_the_mean(index):
    clean, noise = draw(1, 2, 3, 3), draw(1, 2, 3, 3, seed=1)
    predicted = (noise + 0.1 * draw(1, 2, 3, 3, seed=2)).requires_grad_()
    position = (0.3 * draw(1, 2, 3, 3, seed=3)).requires_grad_()
    DDPM(DDPMConfig()).error(torch.cat((predicted, position), dim=1), clean, noise, time_of([index])).sum().backward()
    torch.testing.assert_close(predicted.grad, 2 * (predicted - noise).detach() / 18, rtol=1e-9, atol=1e-12)
    step = 1e-4
    for at in [(0, 0, 0, 0), (0, 1, 2, 1)]:  # central differences of the re-derived loss
        values = []
        for sign in (1, -1):
            moved = position.detach().clone()
            moved[at] += sign * step
            values.append(
                reference_loss((predicted.detach().numpy(), moved.numpy()), clean.numpy(), noise.numpy(), index)
            )
        assert position.grad[at].item() == pytest.approx((values[0] - values[1]) / 2 / step, rel=1e-6, abs=1e-9)


def test_a_perfect_prediction_costs_nothing_at_the_lower_end_of_the_variance():
    clean, noise = draw(1, 2, 4, 4), draw(1, 2, 4, 4, seed=1)
    prediction = torch.cat((noise, torch.full_like(noise, -1.0)), dim=1)
    assert DDPM(DDPMConfig()).error(prediction, clean, noise, time_of([300])).item() == pytest.approx(0, abs=1e-9)


def test_without_learned_variance_only_the_noise_counts():
    clean, noise, predicted = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1), draw(2, 3, 4, 4, seed=2)
    loss = DDPM(DDPMConfig(learn_variance=False)).error(predicted, clean, noise, time_of([0, 800]))
    torch.testing.assert_close(loss, (predicted - noise).square().mean((1, 2, 3)))


# --- times ---


def test_times_are_uniform_and_stand_for_whole_timesteps():
    ddpm = DDPM(DDPMConfig())
    timesteps = ddpm.timestep(ddpm.draw_time(KeyedDraws([0], torch.device("cpu")), 200_000)[0])
    counts = torch.bincount(timesteps.long(), minlength=1000)
    assert torch.equal(timesteps, timesteps.round())
    assert len(counts) == 1000
    assert ((counts - 200).abs() < 5 * math.sqrt(200)).all()
    assert ddpm.timestep(torch.tensor([0.0, 0.0005, 0.0015, 0.9995, 1.0])).tolist() == [0, 0, 1, 999, 999]


@pytest.mark.parametrize("index", [0, 1, 999])
def test_noise_is_added_as_by_a_thousand_steps(index):
    clean, noise = draw(1, 3, 4, 4), draw(1, 3, 4, 4, seed=1)
    noisy = DDPM(DDPMConfig()).add_noise(clean, noise, time_of([index]))
    signal, spread = 1.0, 0.0
    for beta in BETAS[: index + 1]:  # x_i = √(1 - β)·x_{i-1} + √β·ε, means and variances carried along
        signal, spread = signal * math.sqrt(1 - beta), (1 - beta) * spread + beta
    torch.testing.assert_close(noisy, signal * clean + math.sqrt(spread) * noise, rtol=1e-9, atol=1e-9)


# --- samplers ---


def toy_network(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Some smooth function of sample and timestep, of twice the channels."""
    phase = timestep.to(x.dtype) / 1000
    return torch.cat((torch.tanh(x) * (0.5 + phase), torch.sin(3 * x + phase)), dim=-3)


@pytest.mark.parametrize("steps", [1, 2, 7, 250, 1000])
def test_ancestral_sampling_over_a_respaced_chain(steps):
    noise = draw(2, 1, 2, 4, 4)
    out = DDPM(DDPMConfig()).sample(toy_network, noise, SamplerConfig("ddpm", steps), torch.Generator().manual_seed(5))
    # Float32 draws in the sampler's order, one at every step, also at the last, where it is not used.
    visited = [round(999 * i / (steps - 1)) for i in range(steps)] if steps > 1 else [999]
    chain = ALPHA_BAR[visited]
    generator = torch.Generator().manual_seed(5)
    x = noise.numpy()
    for i in reversed(range(steps)):
        predicted, position = toy_network(torch.from_numpy(x), torch.tensor(visited[i])).chunk(2, dim=-3)
        fresh = torch.randn(x.shape, generator=generator, dtype=torch.float32).double().numpy()
        if steps == 1:  # there is no second step to take a variance from, and none is needed
            bar = chain[0]
            x = (x - math.sqrt(1 - bar) * predicted.numpy()) / math.sqrt(bar)
            continue
        mean, variance = reverse_step(chain, i, x, predicted.numpy(), position.numpy())
        x = mean + np.sqrt(variance) * fresh * (i > 0)
    np.testing.assert_allclose(out.numpy(), x, rtol=1e-9, atol=1e-9)


def test_one_normal_is_drawn_at_every_step_also_at_the_last():
    """What is sampled next from the same generator, as in a rollout, begins after that one."""
    sampler, counted = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    noise = draw(2, 1, 2, 4, 4)
    DDPM(DDPMConfig()).sample(toy_network, noise, SamplerConfig("ddpm", 3), sampler)
    torch.randn(3, *noise.shape, generator=counted)
    assert torch.equal(torch.rand(4, generator=sampler), torch.rand(4, generator=counted))


def test_the_network_is_conditioned_on_the_timesteps_of_the_long_chain():
    timesteps = []

    def predict(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        timesteps.append(timestep.item())
        return torch.zeros(*x.shape[:-3], 2 * x.shape[-3], *x.shape[-2:])

    DDPM(DDPMConfig()).sample(predict, draw(1, 2, 2, 2), SamplerConfig("ddpm", 250), torch.Generator())
    assert timesteps[:3] == [999, 995, 991]
    assert timesteps[-3:] == [8, 4, 0]
    assert len(timesteps) == 250


def gaussian(mean: float, std: float, learn_variance: bool):
    """The exact noise prediction E[ε | x_t] for data N(mean, std²), and the exact variance of the reverse step."""

    def predict(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        bar = ALPHA_BAR[int(timestep)]
        variance = bar * std**2 + 1 - bar
        noise = math.sqrt(1 - bar) / variance * (x - math.sqrt(bar) * mean)
        return torch.cat((noise, torch.zeros_like(noise)), dim=-3) if learn_variance else noise

    return predict


@pytest.mark.parametrize("learn_variance", [True, False])
def test_ancestral_samples_of_a_gaussian_have_its_mean_and_deviation(learn_variance):
    ddpm = DDPM(DDPMConfig(learn_variance))
    noise, config = draw(16, 2, 32, 32, dtype=torch.float32), SamplerConfig("ddpm", 250)
    out = ddpm.sample(gaussian(-0.2, 0.5, learn_variance), noise, config, torch.Generator().manual_seed(1))
    assert out.mean().item() == pytest.approx(-0.2, abs=0.02)
    assert out.std().item() == pytest.approx(0.5, rel=0.04)


@pytest.mark.parametrize("steps", [5, 8, 50])
def test_ddim_in_closed_form(steps):
    """x ← √ᾱ'·x̂0 + √(1 - ᾱ')·ε̂ from each timestep to the next, and to the clean frame at last."""
    noise = draw(2, 2, 4, 4, dtype=torch.float32)
    timesteps = []

    def predict(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        timesteps.append(int(timestep))
        return toy_network(x, timestep)

    out = DDPM(DDPMConfig()).sample(predict, noise, SamplerConfig("ddim", steps))
    assert timesteps[0] == 999
    assert len(timesteps) == steps
    x = noise.double()
    for now, then in zip(timesteps, [*timesteps[1:], None], strict=True):
        epsilon = toy_network(x, torch.tensor(now)).chunk(2, dim=-3)[0]
        bar, next_bar = ALPHA_BAR[now], 1.0 if then is None else ALPHA_BAR[then]
        clean = (x - math.sqrt(1 - bar) * epsilon) / math.sqrt(bar)
        x = math.sqrt(next_bar) * clean + math.sqrt(1 - next_bar) * epsilon
    torch.testing.assert_close(out.double(), x, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm", "unipc"])
def test_fast_solvers_reach_the_end_of_the_probability_flow(scheduler):
    """Data N(m, s²): the flow carries x to m + s·(x - √ᾱ·m) / √(ᾱ·s² + 1 - ᾱ); higher orders come nearer."""
    noise = draw(1, 2, 8, 8, dtype=torch.float32)
    exact = 0.4 + 0.3 * (noise - math.sqrt(ALPHA_BAR[999]) * 0.4) / math.sqrt(1 - ALPHA_BAR[999] * (1 - 0.09))
    errors = [
        (DDPM(DDPMConfig()).sample(gaussian(0.4, 0.3, True), noise, SamplerConfig(scheduler, steps)) - exact)
        .abs()
        .max()
        .item()
        for steps in (5, 20, 50)
    ]
    assert errors[2] < 0.7 * errors[1] < 0.5 * errors[0]
    assert errors[2] < {"ddim": 0.12, "dpm": 0.03, "unipc": 0.03}[scheduler]


def test_guidance_moves_the_noise_and_keeps_the_variance():
    ddpm = DDPM(DDPMConfig())
    unknown, known = draw(1, 2, 4, 3, 3), draw(1, 2, 4, 3, 3, seed=1)
    guided = ddpm.guide(unknown, known, 2.5)
    torch.testing.assert_close(guided[:, :, :2], unknown[:, :, :2] + 2.5 * (known - unknown)[:, :, :2])
    assert torch.equal(guided[:, :, 2:], known[:, :, 2:])


def test_schedulers_that_do_not_fit_are_named():
    for objective, scheduler in [("flow", "ddpm"), ("flow", "ddim"), ("ddpm", "euler"), ("ddpm", "heun")]:
        with pytest.raises(UserError, match=rf"sampler.scheduler is {scheduler}.*dpm, unipc"):
            check_sampler(objective, SamplerConfig(scheduler))
    for objective, scheduler in [("flow", "heun"), ("flow", "dpm"), ("ddpm", "ddim"), ("ddpm", "unipc")]:
        check_sampler(objective, SamplerConfig(scheduler))


@pytest.mark.parametrize("scheduler", DDPM.schedulers)
def test_the_most_steps_there_can_be(scheduler):
    """All of them give finite frames; with one more some steps would stay where they are, which divides by zero."""
    most = 1000 if scheduler == "ddpm" else 999
    check_sampler("ddpm", SamplerConfig(scheduler, most))
    ddpm = DDPM(DDPMConfig())
    noise = draw(1, 1, 2, 2)
    out = ddpm.sample(
        lambda noisy, timestep: torch.cat((0.1 * noisy, 0 * noisy), dim=-3), noise, SamplerConfig(scheduler, most)
    )
    assert out.isfinite().all()
    with pytest.raises(UserError, match=f"sampler.steps is {most + 1}, expected at most {most} with {scheduler}"):
        check_sampler("ddpm", SamplerConfig(scheduler, most + 1))
    check_sampler("flow", SamplerConfig("euler", 5000))
