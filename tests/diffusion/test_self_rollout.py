"""The loss on a world's own rollouts, against rollouts of the world model and the loss written out."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cdit.batch import Batch, Condition, Following, KeyedDraws
from cdit.codec import PixelCodec
from cdit.common.errors import UserError
from cdit.diffusion import FewStepConfig, FlowConfig, SamplerConfig, SelfRollout, SelfRolloutConfig
from cdit.model import CDiT
from cdit.world_model import WorldDescription, WorldModel

STEPS, LEVEL = 2, 0.2


SIZES = {"patch_size": 4, "hidden_size": 32, "depth": 2, "num_heads": 2, "context_noise": 0.4}


def build(prediction: str = "clean", conditioners: dict[str, str] | None = None, **changes) -> WorldModel:
    torch.manual_seed(0)
    cdit = CDiT((8, 8), 3, 2, **SIZES, extra_conditioners=conditioners)
    for p in cdit.parameters():
        nn.init.normal_(p, std=0.15)
    description = WorldDescription(
        (8, 8),
        fps=4.0,
        objective="self_rollout",
        flow=FlowConfig(prediction=prediction),
        sampler=SamplerConfig(steps=STEPS, context_noise=LEVEL),
        self_rollout=SelfRolloutConfig(weight=0.5),
    )
    return WorldModel(cdit, PixelCodec(), replace(description, **changes)).eval()


def windows(masked: bool = False) -> Batch:
    """Three windows of two past frames, with two goals and three frames that follow."""
    generator = torch.Generator().manual_seed(1)
    context, target, frames = (
        torch.randint(256, (3, n, 3, 8, 8), generator=generator, dtype=torch.uint8) for n in (2, 2, 3)
    )
    mask = torch.tensor([[not masked, True]] * 3)
    goals, steps = (torch.randn(3, n, 3, generator=generator) for n in (2, 3))
    following = Following(frames, Condition(torch.full((3, 3), 0.25), steps))
    return Batch(context, mask, target, Condition(torch.ones(3, 2), goals), torch.arange(3), following=following)


def draws() -> KeyedDraws:
    return KeyedDraws(range(3), torch.device("cpu"))


@torch.no_grad()
def unrolled(world: WorldModel, batch: Batch, noise: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """By the world model from a cache, with Euler steps written out.

    Returns:
        The frames (B, 3, 8, 8), and the noisy frames at both calls (2, B, 3, 8, 8), of each step.
    """
    state, frames, noisy = world.begin(batch.context.float() / 127.5 - 1, batch.mask), [], []
    for i in range(3):
        condition = world.network_condition(batch.following.condition)
        condition = {name: x[:, i, None] for name, x in condition.items()}
        x, seen = noise[:, i, None], []
        for t in (1.0, 0.5):
            seen.append(x[:, 0])
            out = world.cdit(x, torch.full((3, 1), 1000 * t), condition, state.cache)
            x = x - 0.5 * ((x - out) / t if world.description.flow.prediction == "clean" else out)
        state = world.advance(state, x)
        frames.append(x[:, 0].clamp(-1, 1))
        noisy.append(torch.stack(seen))
    return frames, noisy


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("prediction", ["clean", "velocity"])
def test_the_loss_and_its_gradient_written_out(prediction: str, masked: bool):
    world, batch = build(prediction), windows(masked)
    encoded = world.encode(batch)
    loss = world.objective.loss(world.cdit, encoded, draws())
    assert loss.shape == (3, 2)
    loss.sum().backward()
    found = {name: p.grad.clone() for name, p in world.cdit.named_parameters() if p.grad is not None}
    world.cdit.zero_grad()

    numbers = draws()  # in the order in which the objective draws them
    noise, drawn = numbers.randn(3, 3, 8, 8), numbers.rand(3)
    frames, noisy = unrolled(world, batch, noise)
    errors = []
    for b in range(3):
        for i in range(3):
            call = int(drawn[b, i] >= 0.5)
            t = (1.0, 0.5)[call]
            past = torch.stack([*encoded.context[b], *(frame[b] for frame in frames[:i])])[i : i + 2]
            exists = torch.tensor([not masked, True, True, True, True])[i : i + 2]
            level = torch.tensor([0.0, 0.0, LEVEL, LEVEL, LEVEL])[i : i + 2]
            condition = {name: x[b : b + 1, i] for name, x in encoded.following.condition.items()}
            x = noisy[i][call, b]
            out = world.cdit(x[None], torch.tensor([1000 * t]), condition, past[None], exists[None], level[None])[0]
            clean = out if prediction == "clean" else x - t * out
            errors.append((clean - (batch.following.frames[b, i].float() / 127.5 - 1)).square().mean())
    of_context = torch.stack(errors).view(3, 3).mean(1)
    expected = world.objective.base.loss(world.cdit, encoded, numbers) + 0.5 * of_context[:, None]
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert {int(x) for x in (drawn >= 0.5).flatten()} == {0, 1}  # both calls are among them
    expected.sum().backward()
    for name, p in world.cdit.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-4)


def test_a_window_alone_has_the_loss_it_has_among_others():
    world, batch = build(sampler=SamplerConfig("heun", 3)), windows()
    with torch.no_grad():
        together = world.objective.loss(world.cdit, world.encode(batch), draws())
        for i in range(3):
            one = KeyedDraws([i], torch.device("cpu"))
            alone = world.objective.loss(world.cdit, world.encode(batch[i : i + 1]), one)
            torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)


def test_calls_over_an_interval_are_repeated_with_it():
    world, calls = (
        build(
            conditioners={"interval": "interval"},
            self_rollout=SelfRolloutConfig("mean_flow"),
            sampler=SamplerConfig("average", 2),
            few_step=FewStepConfig(derivative="difference"),
        ),
        [],
    )
    cdit = world.cdit
    hook = cdit.register_forward_pre_hook(lambda _, args: calls.append(args))
    inputs, _ = world.objective.roll_out(cdit, world.encode(windows()), draws())
    hook.remove()
    noisy, timestep, condition = inputs[:3]
    assert torch.equal(condition["interval"], torch.full((9, 1), 0.5))
    assert set(timestep.flatten().tolist()) == {500.0, 1000.0}
    assert len(calls) == 6
    seen = {(row, t[0].item()) for x, t, *_ in calls for row in map(float, x.flatten(1).sum(1))}
    assert {(float(x.sum()), t.item()) for x, t in zip(noisy, timestep, strict=True)} <= seen
    assert world.objective.loss(cdit, world.encode(windows()), draws()).isfinite().all()


def test_a_perceptual_loss_counts_for_rollouts_as_for_goals():
    world, batch, given = build("velocity"), windows(), []
    encoded = world.encode(batch)
    plain = world.objective.loss(world.cdit, encoded, draws())

    def distance(prediction: Tensor, clean: Tensor, time: Tensor) -> Tensor:
        given.append((prediction, clean))
        return torch.full_like(time, 3.0)

    world.objective.base.perceptual = distance
    found = world.objective.loss(world.cdit, encoded, draws())
    torch.testing.assert_close(found - plain, torch.full((3, 2), 3 + 0.5 * 3.0))
    recorded = batch.following.frames.transpose(0, 1).flatten(0, 1)[:, None].float() / 127.5 - 1
    prediction, clean = next(pair for pair in given if len(pair[1]) == 9)
    torch.testing.assert_close(clean, recorded)
    assert prediction.shape == clean.shape


def test_its_base_keeps_a_teacher():
    world = build(
        conditioners={"interval": "interval"},
        self_rollout=SelfRolloutConfig("mean_flow"),
        few_step=FewStepConfig(teacher_decay=0.9),
    )
    world.objective.attach(world.cdit, torch.clone)
    teacher = list(world.objective.networks["teacher"].parameters())
    before = [p.clone() for p in teacher]
    with torch.no_grad():
        for p in world.cdit.parameters():
            p.add_(1)
    world.objective.after_step(world.cdit)
    for old, p in zip(before, teacher, strict=True):
        torch.testing.assert_close(p, old + 0.1)


def test_it_samples_as_its_base():
    world, flow = build(), build(objective="flow")
    context = torch.rand(1, 2, 3, 8, 8) * 2 - 1
    condition = Condition(action=torch.ones(1, 1, 3, 3))
    rolled = [w.rollout(context, condition, generator=torch.Generator().manual_seed(0)) for w in (world, flow)]
    assert torch.equal(*rolled)
    assert isinstance(world.objective, SelfRollout)


@pytest.mark.parametrize(
    ("base", "scheduler", "message"),
    [
        ("ddpm", "ddim", "self_rollout.base is ddpm, expected a flow"),
        ("self_rollout", "euler", "expected a flow"),
        ("flow", "ddim", "sampler.scheduler is ddim, expected one of euler"),
    ],
)
def test_what_cannot_be_rolled_out(base: str, scheduler: str, message: str):
    with pytest.raises(UserError, match=message):
        build(self_rollout=SelfRolloutConfig(base), sampler=SamplerConfig(scheduler))
