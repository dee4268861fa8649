"""Shortcut models and MeanFlow against the flow of a Gaussian, whose map and average velocities are known."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cdit.batch import Condition, EncodedBatch, KeyedDraws
from cdit.codec import PixelCodec
from cdit.common.errors import UserError
from cdit.diffusion import FewStepConfig, Flow, FlowConfig, MeanFlow, SamplerConfig, Shortcut
from cdit.diffusion.config import SamplerOptions
from cdit.diffusion.few_step import FewStep, difference_quotient, forward_derivative
from cdit.model import CDiT
from cdit.world_model import WorldDescription, WorldModel

MEAN, STD = 0.4, 0.3
PREDICTIONS = ["clean", "velocity"]


def spread(t: Tensor, frames: Tensor) -> Tensor:
    return t.reshape(*t.shape, *(1,) * (frames.ndim - t.ndim))


def velocity(x: Tensor, t: Tensor, std: float = STD) -> Tensor:
    """E[ε - x0 | x_t] for data N(MEAN, std²)."""
    t = spread(t, x)
    return -MEAN + (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2) * (x - (1 - t) * MEAN)


def average_velocity(x: Tensor, t: Tensor, d: Tensor, std: float = STD) -> Tensor:
    """(x_t - x_r) / (t - r), where the flow keeps (x - mean) / deviation; the velocity for d = 0."""

    def deviation(t: Tensor) -> Tensor:
        return ((1 - t) ** 2 * std**2 + t**2).sqrt()

    start, end = spread(t, x), spread(t - d, x)
    mapped = (1 - end) * MEAN + deviation(end) / deviation(start) * (x - (1 - start) * MEAN)
    length = spread(d, x)
    return torch.where(length > 0, (x - mapped) / length.clamp(min=1e-12), velocity(x, t, std))


class Exact:
    """A network that predicts what is exactly right, and keeps what it was called with."""

    def __init__(self, prediction: str, std: float = STD):
        self.prediction, self.std, self.calls = prediction, std, []

    def __call__(self, noisy: Tensor, timestep: Tensor, condition: dict[str, Tensor], *context: Tensor) -> Tensor:
        t, d = timestep / 1000, condition["interval"]
        self.calls.append((noisy, t, d))
        u = average_velocity(noisy, t, d, self.std)
        return u if self.prediction == "velocity" else noisy - spread(t, noisy) * u


def batch_of(contexts: int, goals: int, std: float = STD) -> EncodedBatch:
    clean = MEAN + std * torch.randn(contexts, goals, 3, 4, 4, generator=torch.Generator().manual_seed(7))
    return EncodedBatch(torch.zeros(contexts, 1, 3, 4, 4), None, clean, {})


def draws(contexts: int) -> KeyedDraws:
    return KeyedDraws(range(contexts), torch.device("cpu"))


def make(kind: type[FewStep], prediction: str = "clean", loss: str = "velocity", **options: object) -> FewStep:
    return kind(FlowConfig(prediction=prediction, loss=loss), FewStepConfig(**options))


# --- the losses at the exact solution ---


@pytest.mark.parametrize("derivative", ["forward", "difference"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", [MeanFlow, Shortcut])
def test_the_loss_is_zero_for_data_of_one_point(kind, prediction, derivative):
    """Towards one point the flow is straight and the velocity of a noisy frame certain."""
    network = Exact(prediction, std=0.0)
    objective = make(kind, prediction, share=0.5, derivative=derivative, difference=0.005)
    loss = objective.loss(network, batch_of(64, 4, std=0.0), draws(64))
    assert loss.shape == (64, 4)
    torch.testing.assert_close(loss, torch.zeros_like(loss), atol=1e-4, rtol=0)
    _, _, interval = network.calls[-1]
    assert (interval[:, 2:] == 0).all()
    assert (interval[:, :2] > 0).all()


@pytest.mark.parametrize("derivative", ["forward", "difference"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_of_mean_flow_is_that_of_the_exact_velocity(prediction, derivative):
    """The average velocity cannot be known better than the velocity of this frame and noise."""
    network, batch = Exact(prediction), batch_of(32, 4)
    objective = make(MeanFlow, prediction, share=1.0, derivative=derivative, difference=0.005)
    time = torch.linspace(0.06, 0.99, 128).view(32, 4)
    loss = objective.loss(network, batch, draws(32), time)
    noisy, t, interval = network.calls[-1]
    torch.testing.assert_close(t, time)
    assert (interval > 0).all()
    assert (interval <= time).all()
    noise = (noisy - (1 - spread(t, noisy)) * batch.clean) / spread(t, noisy)
    expected = (noise - batch.clean - velocity(noisy, t)).square().mean(dim=(-3, -2, -1))
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_of_a_shortcut_is_zero_whatever_the_data(prediction):
    """Two exact steps are one exact step; the shortest two, which are those of the flow, nearly so."""
    network = Exact(prediction)
    loss = make(Shortcut, prediction, share=1.0).loss(network, batch_of(64, 2), draws(64))
    _, time, interval = network.calls[-1]
    assert set(interval.unique().tolist()) == {2.0**-i for i in range(7)}
    assert torch.equal(time / interval, (time / interval).round())
    assert (time >= interval).all()
    assert (time <= 1).all()
    long = interval > 1 / 64
    torch.testing.assert_close(loss[long], torch.zeros_like(loss[long]), atol=1e-5, rtol=0)
    assert loss[~long].max() < 0.01


def test_two_steps_are_one():
    """In float64, from half steps that are exact."""
    noisy = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    time = torch.tensor([[1.0, 0.5], [0.75, 1.0], [0.5, 0.25]], dtype=torch.float64)
    interval = torch.tensor([[1.0, 0.5], [0.25, 0.125], [0.0625, 0.25]], dtype=torch.float64)
    target = make(Shortcut).target(average_velocity, average_velocity, noisy, time, interval, noisy)
    torch.testing.assert_close(target, average_velocity(noisy, time, interval), atol=1e-12, rtol=0)


def test_the_identity_of_mean_flow_by_finite_differences():
    """u = v - d·du/dt along the flow with t - d fixed, and what the objective makes of it."""
    noisy = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    time = torch.tensor([[1.0, 0.6], [0.8, 0.3], [0.5, 0.2]], dtype=torch.float64)
    interval = time * torch.tensor([[1.0, 0.5], [0.1, 0.9], [0.3, 0.7]], dtype=torch.float64)
    h, d, v = 1e-5, spread(interval, noisy), velocity(noisy, time)
    later, earlier = (average_velocity(noisy + s * v, time + s, interval + s) for s in (h, -h))
    u = average_velocity(noisy, time, interval)
    torch.testing.assert_close(v - d * (later - earlier) / (2 * h), u, atol=1e-8, rtol=0)
    target = make(MeanFlow, derivative="forward").target(average_velocity, average_velocity, noisy, time, interval, v)
    torch.testing.assert_close(target, u, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", [MeanFlow, Shortcut])
def test_without_intervals_it_is_a_flow_bit_for_bit(kind):
    seen = []

    def network(noisy: Tensor, timestep: Tensor, condition: dict[str, Tensor], *context: Tensor) -> Tensor:
        seen.append((noisy, timestep))
        return noisy * 0.5

    losses = [
        objective.loss(network, batch_of(8, 3), draws(8))
        for objective in (Flow(FlowConfig(prediction="clean")), make(kind, share=0.0))
    ]
    assert torch.equal(*losses)
    assert torch.equal(seen[0][1], seen[1][1])
    with_intervals = make(kind, share=1 / 3).loss(network_of(network), batch_of(8, 3), draws(8))
    assert torch.equal(with_intervals[:, 1:], losses[0][:, 1:])
    assert not torch.equal(with_intervals[:, 0], losses[0][:, 0])


def network_of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda noisy, timestep, condition, *context: function(noisy, timestep, condition)


@pytest.mark.parametrize("kind", [MeanFlow, Shortcut])
@pytest.mark.parametrize(("goals", "share"), [(1, 0.25), (3, 0.5), (4, 0.3)])
def test_the_share_of_goals_with_an_interval_follows_the_keys_alone(kind, goals, share):
    network = Exact("clean")
    make(kind, share=share).loss(network, batch_of(600, goals), draws(600))
    interval = network.calls[-1][2]
    assert (interval > 0).double().mean().item() == pytest.approx(share, abs=0.05)
    other = Exact("clean")
    make(kind, share=share).loss(other, batch_of(600, goals)[5:9], KeyedDraws(range(5, 9), torch.device("cpu")))
    assert all(torch.equal(x[5:9], y) for x, y in zip(network.calls[-1][1:], other.calls[-1][1:], strict=True))


# --- derivatives of the network ---


class Network(nn.Module):
    """A CDiT in float64, every weight random, as a function of (x, t)."""

    def __init__(self, **options: object):
        super().__init__()
        torch.manual_seed(0)
        further = {"interval": "interval"}
        self.cdit = CDiT((4, 6), 2, 2, 2, 16, 2, 2, extra_conditioners=further, **options).double().eval()
        for parameter in self.cdit.parameters():
            nn.init.normal_(parameter, std=0.2)
        draw = torch.Generator().manual_seed(1)
        self.context = torch.randn(2, 2, 2, 4, 6, generator=draw, dtype=torch.float64)
        self.mask = torch.tensor([[True, True], [False, True]])
        self.condition = {
            "time_shift": torch.randn(2, 3, generator=draw, dtype=torch.float64),
            "action": torch.randn(2, 3, 3, generator=draw, dtype=torch.float64),
            "action_known": torch.tensor([[True, False, True]] * 2),
        }

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        # Slow in t, so that differences see its derivative.
        condition = self.condition | {"interval": t - 0.1}
        return self.cdit(x, 3 * t, condition, self.context, self.mask)


DIALECTS = {
    "native": {},
    "levers": {"steered_queries": True, "context_norm": "keys", "output_channels": 3, "qk_norm": True},
    "nwm": {"position": "learned", "context_modulation": True, "extra_kv": True},
}


@pytest.mark.parametrize("dialect", DIALECTS)
@torch.no_grad()
def test_forward_mode_and_differences_agree_through_the_network(dialect):
    network, draw = Network(**DIALECTS[dialect]), torch.Generator().manual_seed(2)
    x, direction = (torch.randn(2, 3, 2, 4, 6, generator=draw, dtype=torch.float64) for _ in range(2))
    time = torch.rand(2, 3, generator=draw, dtype=torch.float64) * 0.8 + 0.1
    exact = forward_derivative(network, x, time, direction)
    assert exact.abs().mean() > 0.01
    near = difference_quotient(network, x, time, direction, time - 1e-6, time + 1e-6)
    torch.testing.assert_close(near, exact, atol=1e-6, rtol=1e-6)


def test_forward_mode_passes_compiled_networks():
    """Compiled code would drop the tangents silently."""
    network = Network()
    compiled = torch.compile(network, backend="eager")
    x, direction = torch.randn(2, 2, 3, 2, 4, 6, dtype=torch.float64)
    time = torch.full((2, 3), 0.5, dtype=torch.float64)
    with torch.no_grad():
        compiled(x, time)
        found, expected = (forward_derivative(f, x, time, direction) for f in (compiled, network))
    assert torch.equal(found, expected)


def test_a_network_with_reprojection_takes_differences():
    """Sampling a picture at moved places has no derivative in forward mode."""
    torch.manual_seed(0)
    cdit = CDiT(
        (4, 4), 3, 1, 2, 16, 1, 2, output_channels=4, reprojection=True, extra_conditioners=MeanFlow.conditioners
    )
    with pytest.raises(UserError, match=r"few_step\.derivative is forward, expected difference"):
        make(MeanFlow, derivative="forward").attach(cdit, torch.clone)
    objective = make(MeanFlow, share=1.0)
    objective.attach(cdit, torch.clone)
    batch = batch_of(2, 2)
    batch.condition = {"time_shift": torch.ones(2, 2), "motion": 0.1 * torch.ones(2, 2, 3)}
    loss = objective.loss(cdit, batch, draws(2))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert cdit.output_convolutions.conv3.weight.grad.any()


def test_the_shortest_halves_are_steps_of_the_flow():
    intervals = []

    def teacher(noisy: Tensor, time: Tensor, interval: Tensor) -> Tensor:
        intervals.append(interval.tolist())
        return noisy

    lengths = torch.tensor([[1.0, 1 / 32, 1 / 64]])
    make(Shortcut).target(teacher, teacher, torch.zeros(1, 3, 1, 2, 2), torch.ones(1, 3), lengths, torch.zeros(()))
    assert intervals == [[[1 / 2, 1 / 64, 0.0]]] * 2


@pytest.mark.parametrize("kind", [MeanFlow, Shortcut])
def test_a_perceptual_loss_compares_with_the_recorded_frame(kind):
    objective, batch, given = make(kind, share=1.0, derivative="difference"), batch_of(2, 2), []
    objective.perceptual = lambda prediction, clean, time: given.append(clean) or torch.zeros_like(time)
    objective.loss(Exact("clean", std=1.0), batch, draws(2))
    (clean,) = given
    assert torch.equal(clean, batch.clean)


# --- sampling ---


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("kind", "shift"), [(MeanFlow, 1.0), (MeanFlow, 3.0), (Shortcut, 1.0)])
@pytest.mark.parametrize("steps", [1, 2, 4, 64])
def test_an_exact_network_samples_exactly_in_any_number_of_calls(kind, shift, prediction, steps):
    calls = []

    def predict(noisy: Tensor, timestep: Tensor, interval: Tensor) -> Tensor:
        calls.append((timestep.item() / 1000, interval.item()))
        each = noisy.shape[:2]
        return Exact(prediction)(noisy, timestep.expand(each), {"interval": interval.expand(each)})

    noise = torch.randn(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    sampled = make(kind, prediction).sample(predict, noise, SamplerConfig("average", steps, shift))
    torch.testing.assert_close(sampled, MEAN + STD * noise, atol=1e-4, rtol=0)
    assert len(calls) == steps
    assert calls[0][0] == 1
    even = [1 - i / steps for i in range(steps + 1)]
    times = [shift * t / (1 + (shift - 1) * t) for t in even]
    expected = [(start, start - end) for start, end in pairwise(times)]
    torch.testing.assert_close(torch.tensor(calls), torch.tensor(expected), atol=1e-6, rtol=0)


def test_the_shortest_steps_of_a_shortcut_are_those_of_its_flow():
    """They are trained with interval 0."""
    intervals = []

    def predict(noisy: Tensor, timestep: Tensor, interval: Tensor) -> Tensor:
        intervals.append(interval.item())
        return noisy

    make(Shortcut).sample(predict, torch.zeros(1, 1, 3, 2, 2), SamplerConfig("average", 128))
    assert intervals == [0.0] * 128


# --- worlds ---


def make_world(objective: str = "flow", further: dict[str, str] | None = None, **options: object) -> WorldModel:
    """A world with random weights, those of its flow always the same."""
    torch.manual_seed(0)
    cdit = CDiT((8, 8), 3, 2, 2, 16, 2, 2)
    for parameter in cdit.parameters():
        nn.init.normal_(parameter, std=0.3)
    weights = cdit.state_dict()
    cdit = CDiT((8, 8), 3, 2, 2, 16, 2, 2, extra_conditioners=further)
    cdit.load_state_dict(weights, strict=False)
    description = WorldDescription((8, 8), 4.0, objective=objective, action_dropout=0.1, **options)
    return WorldModel(cdit, PixelCodec(), description).eval()


def predicted(world: WorldModel, *sampler: object, guidance: float = 1.0) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    context = torch.rand(2, 2, 3, 8, 8, generator=draw) * 2 - 1
    condition = Condition(action=torch.randn(2, 3, 3, generator=draw))
    return world.predict(context, condition, sampler=SamplerConfig(*sampler, guidance=guidance), generator=draw)


@pytest.mark.parametrize("objective", ["mean_flow", "shortcut"])
def test_a_trained_flow_gets_intervals_without_a_change(objective):
    """A new embedding has no effect: the flow's schedulers, and one step of average velocity, stay what they are."""
    flow, world = make_world(), make_world(objective, {"interval": "interval"})
    for scheduler in ("euler", "heun", "dpm", "unipc"):
        assert torch.equal(predicted(world, scheduler, 3), predicted(flow, scheduler, 3))
    one, euler = predicted(world, "average", 1), predicted(flow, "euler", 1)
    torch.testing.assert_close(one, euler, atol=1e-5, rtol=1e-5)
    assert one.std() > 0.1


def test_the_interval_reaches_the_prediction_but_not_the_cache():
    world = make_world("mean_flow", {"interval": "interval"})
    nn.init.normal_(world.cdit.conditioners["interval"].embedding.mlp.fc2.weight)
    assert (predicted(world, "average", 2) - predicted(world, "euler", 2)).abs().max() > 1e-3
    world.cdit.encode_context = Forbidden(world.cdit.encode_context, calls=1)
    predicted(world, "average", 4)


class Forbidden:
    """A function that may be called so many times."""

    def __init__(self, function: Callable[..., object], calls: int):
        self.function, self.left = function, calls

    def __call__(self, *arguments: object) -> object:
        self.left -= 1
        assert self.left >= 0
        return self.function(*arguments)


def test_guidance_extrapolates_the_average_velocity():
    world = make_world("mean_flow", {"interval": "interval"})
    known = predicted(world, "average", 1)
    world.network_condition = lambda condition: {"time_shift": condition.time_shift}
    unknown = predicted(world, "average", 1)
    del world.network_condition
    guided = predicted(world, "average", 1, guidance=2.5)
    expected = unknown + 2.5 * (known - unknown)
    inside = expected.abs() < 1 - 1e-3
    inside &= (known.abs() < 1) & (unknown.abs() < 1)  # frames are clipped
    assert inside.any()
    torch.testing.assert_close(guided[inside], expected[inside], atol=1e-4, rtol=0)


def test_the_calls_it_was_trained_for_are_kept_with_it(tmp_path: Path):
    world = make_world("mean_flow", {"interval": "interval"}, sampler=SamplerConfig("average", 2))
    world.save_pretrained(tmp_path)
    loaded = WorldModel.from_pretrained(tmp_path)
    assert (loaded.description.sampler.scheduler, loaded.description.sampler.steps) == ("average", 2)
    assert torch.equal(predicted(loaded, "average", 1), predicted(world, "average", 1))


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        ("shortcut", SamplerOptions("average", 3), "sampler.steps is 3, expected 1, 2, 4"),
        ("shortcut", SamplerOptions("average", 4, 2.0), "sampler.shift is 2.0, expected 1"),
        ("flow", SamplerOptions("average"), "sampler.scheduler is average, expected one of euler, heun, dpm, unipc"),
    ],
)
def test_a_sampler_it_was_not_trained_for_is_refused(objective, options, message):
    with pytest.raises(UserError, match=message):
        options.over(WorldDescription((8, 8), 4.0, objective=objective))


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(UserError, match=r"flow\.prediction is noise, expected clean or velocity"):
        make(MeanFlow, "noise")
    with pytest.raises(UserError, match=r"few_step\.share is 1.5"):
        make(Shortcut, share=1.5)
    with pytest.raises(UserError, match="objective mean_flow needs a network with the conditioner interval"):
        make_world("mean_flow")
