"""The world model against loops over its parts written out here, and one that learns its four samples by heart."""

from contextlib import contextmanager
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch

from cdit.batch import Batch, Condition, KeyedDraws
from cdit.codec import AutoencoderCodec, KLCodec, PixelCodec, TinyCodec
from cdit.common.errors import UserError
from cdit.data.action_space import ActionSpace
from cdit.data.motion import compose
from cdit.diffusion import Flow, FlowConfig, SamplerConfig
from cdit.model import CDiT
from cdit.world_model import Units, WorldDescription, WorldModel, WorldState

DIALECTS = {
    "native": {"extra_kv": True},
    "encoder": {"context_depth": 1},
    "modulated": {"context_modulation": True},
    "learned": {"position": "learned"},
    "reprojection": {"output_channels": 4, "reprojection": True, "place_embedding": True},
    "nwm": {"position": "learned", "context_modulation": True, "extra_kv": True},
}
UNITS = Units(action_scale=(2.0, 3.0, 0.5), action_offset=(-0.25, 0.0, 0.125), time_scale=0.0625)


def autoencoder_codec() -> AutoencoderCodec:
    return TinyCodec(
        diffusers.AutoencoderTiny(
            encoder_block_out_channels=(4, 4),
            decoder_block_out_channels=(4, 4),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
            latent_channels=3,
        ),
    )


def build(dialect: str = "native", codec=None, context_noise: float = 0.0, **changes) -> WorldModel:
    """A random network; frames of 8×12, three past ones at most, 4 a second."""
    torch.manual_seed(0)
    codec = codec or PixelCodec()
    size = (8 // codec.downscale, 12 // codec.downscale)
    cdit = CDiT(
        **{
            "image_size": size, "in_channels": 3, "max_context": 3, "patch_size": 2,
            "hidden_size": 32, "depth": 2, "num_heads": 2, "context_noise": context_noise, **DIALECTS[dialect],
        }
    )  # fmt: skip
    for p in cdit.parameters():
        torch.nn.init.normal_(p, std=0.1)
    description = WorldDescription(
        image_size=(8, 12), fps=4.0, units=UNITS, sampler=SamplerConfig(steps=3), flow=FlowConfig(prediction="clean")
    )
    return WorldModel(cdit, codec, replace(description, **changes)).eval()


def inputs(contexts: int = 2, goals: int = 3, frames: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Past frames, actions in metres and radians, time shifts in seconds."""
    generator = torch.Generator().manual_seed(1)
    return (
        torch.rand(contexts, frames, 3, 8, 12, generator=generator) * 2 - 1,
        torch.randn(contexts, goals, 3, generator=generator),
        torch.rand(contexts, goals, generator=generator) * 2,
    )


def named(action: torch.Tensor | None, time_shift: torch.Tensor, **further: torch.Tensor) -> dict[str, torch.Tensor]:
    """Normalised conditions as a CDiT takes them."""
    given = {} if action is None else {"action": action}
    return {"time_shift": time_shift, **given, **further}


def normalized(actions: torch.Tensor, seconds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `UNITS` say, written out."""
    return actions * torch.tensor([2.0, 3.0, 0.5]) + torch.tensor([-0.25, 0.0, 0.125]), seconds / 16


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@contextmanager
def spied(module: torch.nn.Module):
    """Yields a list that grows by the arguments and output of every call."""
    calls = []
    handle = module.register_forward_hook(
        lambda _, args, kwargs, out: calls.append(SimpleNamespace(args=args, kwargs=kwargs, out=out)), with_kwargs=True
    )
    yield calls
    handle.remove()


# --- predict ---


def test_the_network_is_conditioned_on_normalised_numbers():
    world, (context, actions, seconds) = build(), inputs()
    with spied(world.cdit) as calls:
        world.predict(context, Condition(seconds, actions), generator=seeded())
    assert len(calls) == 3
    for call, t in zip(calls, [1.0, 2 / 3, 1 / 3], strict=True):
        noisy, timestep, condition, _ = call.args
        action = condition["action"]
        assert noisy.shape == (2, 3, 3, 8, 12)
        torch.testing.assert_close(timestep, torch.full((2, 3), 1000 * t))
        torch.testing.assert_close(action[..., 0], 2 * actions[..., 0] - 0.25)
        torch.testing.assert_close(action[..., 1], 3 * actions[..., 1])
        torch.testing.assert_close(action[..., 2], 0.5 * actions[..., 2] + 0.125)
        torch.testing.assert_close(condition["time_shift"], seconds / 16)


@pytest.mark.parametrize("dialect", DIALECTS)
@torch.no_grad()
def test_predict_is_the_sampling_loop_written_out(dialect):
    """Euler steps of the velocity (x - clean) / t, over frames given anew at every step."""
    world, (context, actions, seconds) = build(dialect), inputs()
    condition = named(*normalized(actions, seconds), motion=actions)
    x = torch.randn(2, 3, 3, 8, 12, generator=seeded())
    for t in (1.0, 2 / 3, 1 / 3):
        clean = world.cdit(x, torch.full((2, 3), 1000 * t), condition, context)
        x = x - (x - clean) / t / 3
    out = world.predict(context, Condition(seconds, actions), generator=seeded())
    assert out.shape == (2, 3, 3, 8, 12)
    torch.testing.assert_close(out, x.clamp(-1, 1), atol=1e-4, rtol=0)
    assert x.std() > 0.1


def test_the_generator_decides_the_noise():
    world, (context, actions, seconds) = build(), inputs()
    condition = Condition(seconds, actions)
    first = world.predict(context, condition, generator=seeded(1))
    torch.rand(3)
    assert torch.equal(world.predict(context, condition, generator=seeded(1)), first)
    assert not torch.equal(world.predict(context, condition, generator=seeded(2)), first)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_candidates_together_are_candidates_alone_with_the_same_noise(dialect, guidance):
    world, (context, actions, seconds) = build(dialect), inputs(contexts=1, goals=4)
    sampler = SamplerConfig(steps=3, guidance=guidance)
    together = world.predict(context, Condition(seconds, actions), sampler=sampler, generator=seeded())
    generator = seeded()  # noise of 288 numbers a candidate comes out the same in one draw or four
    goals = [Condition(seconds[:, g : g + 1], actions[:, g : g + 1]) for g in range(4)]
    alone = [world.predict(context, goal, sampler=sampler, generator=generator) for goal in goals]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), atol=1e-4, rtol=0)


def test_an_encoded_context_serves_as_well_as_its_frames():
    world, (context, actions, seconds) = build(), inputs()
    mask = torch.tensor([[False, True, True], [True, True, True]])
    condition = Condition(seconds, actions)
    expected = world.predict(context, condition, mask, generator=seeded())
    state = world.begin(context, mask)
    assert torch.equal(world.predict(state, condition, generator=seeded()), expected)


def test_missing_frames_and_unknown_actions_are_not_used():
    world, (context, actions, seconds) = build(), inputs()
    mask = torch.tensor([[False, True, True], [True, True, True]])
    known = torch.tensor([[True, False, True], [True, True, False]])

    def predict() -> torch.Tensor:
        return world.predict(context, Condition(seconds, actions, known), mask, generator=seeded())

    expected = predict()
    context[0, 0], actions[0, 1], actions[1, 2] = float("nan"), float("nan"), 1e9
    assert torch.equal(predict(), expected)
    none_known = torch.zeros(2, 3, dtype=torch.bool)
    assert torch.equal(
        world.predict(context, Condition(seconds), mask, generator=seeded()),
        world.predict(context, Condition(seconds, actions, none_known), mask, generator=seeded()),
    )


def test_only_the_last_frames_of_a_long_past_are_used():
    world, (context, actions, seconds) = build(), inputs(frames=5)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, :3] = False
    torch.testing.assert_close(
        world.predict(context, Condition(seconds, actions), mask, generator=seeded()),
        world.predict(context[:, 2:], Condition(seconds, actions), mask[:, 2:], generator=seeded()),
    )


# --- guidance ---


def test_guidance_of_one_is_off_and_of_zero_unconditional():
    world, (context, actions, seconds) = build(), inputs()

    def predict(guidance: float, actions: torch.Tensor | None = actions) -> torch.Tensor:
        sampler = SamplerConfig(steps=3, guidance=guidance)
        return world.predict(context, Condition(seconds, actions), sampler=sampler, generator=seeded())

    with spied(world.cdit) as calls:
        predict(1.0)
    assert all(call.args[0].shape[1] == 3 for call in calls)  # one call per goal, not two
    torch.testing.assert_close(predict(0.0), predict(1.0, actions=None), atol=1e-5, rtol=0)
    assert not torch.allclose(predict(0.0), predict(1.0), atol=1e-3)
    torch.testing.assert_close(predict(3.0, actions=None), predict(1.0, actions=None))  # nothing to guide


@torch.no_grad()
def test_guidance_extrapolates_velocities():
    world, (context, actions, seconds) = build(), inputs()
    action, shift = normalized(actions, seconds)
    x = torch.randn(2, 3, 3, 8, 12, generator=seeded())
    for t in (1.0, 0.5):
        times = torch.full((2, 3), 1000 * t)
        with_action, without = (
            (x - world.cdit(x, times, named(given, shift), context)) / t for given in (action, None)
        )  # of clean frames
        x = x - 0.5 * (without + 2.5 * (with_action - without))
    sampler = SamplerConfig(steps=2, guidance=2.5)
    out = world.predict(context, Condition(seconds, actions), sampler=sampler, generator=seeded())
    torch.testing.assert_close(out, x.clamp(-1, 1), atol=1e-4, rtol=0)


@torch.no_grad()
def test_guidance_of_a_ddpm_moves_the_noise_and_keeps_the_known_variance():
    flow, (context, actions, seconds) = build(), inputs()
    cdit = CDiT(**{**dict(flow.cdit.config), "learn_variance": True}).eval()
    for p in cdit.parameters():
        torch.nn.init.normal_(p, std=0.1)
    world = WorldModel(
        cdit, PixelCodec(), replace(flow.description, objective="ddpm", sampler=SamplerConfig("ddpm", 2))
    )
    asked = []
    world.objective.sample = lambda predict, noise, *_: asked.append(predict) or noise  # what it would be sampled with
    shown = torch.tensor([[True, False, True], [True, True, True]])
    sampler = SamplerConfig("ddpm", 2, guidance=2.5)
    world.predict(context, Condition(seconds, actions, shown), sampler=sampler, generator=seeded())
    action, shift = normalized(actions, seconds)
    x, times = torch.randn(2, 3, 3, 8, 12, generator=seeded()), torch.full((2, 3), 700)
    known, unknown = (cdit(x, times, named(given, shift, action_known=shown), context) for given in (action, None))
    out = asked[0](x, torch.tensor(700))
    assert out.shape == (2, 3, 6, 8, 12)
    torch.testing.assert_close(out[:, :, :3], (unknown + 2.5 * (known - unknown))[:, :, :3], atol=1e-4, rtol=0)
    torch.testing.assert_close(out[:, :, 3:], known[:, :, 3:], atol=1e-4, rtol=0)
    assert not torch.allclose(known[:, :, 3:], unknown[:, :, 3:], atol=1e-2)


# --- rollout ---


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_rollout_is_predictions_over_windows_encoded_afresh(dialect, masked, frames):
    world, (context, _, _) = build(dialect), inputs(frames=frames)
    actions = torch.randn(2, 2, 5, 3, generator=seeded(3))
    mask = torch.ones(2, frames, dtype=torch.bool)
    mask[1, :-1] = False
    out = world.rollout(context, Condition(action=actions), mask if masked else None, generator=seeded())
    assert out.shape == (2, 2, 5, 3, 8, 12)

    window, window_mask = context.repeat_interleave(2, 0), mask.repeat_interleave(2, 0)
    generator, quarter_second = seeded(), torch.full((4, 1), 0.25)
    for step in range(5):
        recent, recent_mask = window[:, -3:], window_mask[:, -3:] if masked else None
        action = actions.flatten(0, 1)[:, step, None]
        frame = world.predict(recent, Condition(quarter_second, action), recent_mask, generator=generator)
        torch.testing.assert_close(out.flatten(0, 1)[:, step], frame[:, 0], atol=1e-4, rtol=0)
        # Go on from the very frame of the rollout, so that differences do not pile up.
        window = torch.cat((window, out.flatten(0, 1)[:, step, None]), dim=1)
        window_mask = torch.cat((window_mask, torch.ones(4, 1, dtype=torch.bool)), dim=1)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_candidates_rolled_out_together_are_those_alone_with_the_same_noise(dialect, masked, guidance):
    """Beyond the window, where no frame is left that they share."""
    world, (context, _, _) = build(dialect), inputs()
    actions = torch.randn(2, 3, 6, 3, generator=seeded(3))
    known = torch.rand(2, 3, 6, generator=seeded(4)) > 0.3 if masked else None
    mask = torch.tensor([[True] * 3, [False, False, True]]) if masked else None
    noises = torch.randn(6, 2, 3, 3, 8, 12, generator=seeded(5))
    sample = world.objective.sample

    def rollout(goals: slice) -> torch.Tensor:
        given = iter(noises)
        world.objective.sample = lambda predict, _, *rest: sample(predict, next(given)[:, goals], *rest)
        sampler = SamplerConfig(steps=2, guidance=guidance)
        condition = Condition(action=actions[:, goals], known=None if known is None else known[:, goals])
        return world.rollout(context, condition, mask, sampler=sampler)

    together = rollout(slice(0, 3))
    for g in range(3):
        torch.testing.assert_close(together[:, g, None], rollout(slice(g, g + 1)), atol=1e-4, rtol=0)
    assert (together[:, 0] - together[:, 1]).abs().amax((0, 2, 3, 4)).min() > 0.05  # at every step


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_goals_of_candidates_with_a_past_of_their_own(guidance):
    """As predict takes them: of a state with B·G pasts, G goals for each context."""
    world, (context, actions, seconds) = build("native"), inputs()
    new = torch.rand(6, 3, 8, 12, generator=seeded(6)) * 2 - 1
    state = world.advance(world.begin(context).fork(3), new.unflatten(0, (2, 3)))
    sampler = SamplerConfig(steps=2, guidance=guidance)
    together = world.predict(state, Condition(seconds, actions), sampler=sampler, generator=seeded())
    past = torch.cat((context.repeat_interleave(3, 0), new[:, None]), dim=1)
    each = Condition(*(x.flatten(0, 1)[:, None] for x in (seconds, actions)))
    apart = world.predict(past, each, sampler=sampler, generator=seeded())
    torch.testing.assert_close(together.flatten(0, 1), apart[:, 0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
@torch.no_grad()
def test_a_rollout_declares_a_level_for_its_own_frames_only(dialect, masked):
    world, (context, _, _) = build(dialect, context_noise=0.5), inputs()
    actions = torch.randn(2, 2, 5, 3, generator=seeded(3))
    mask = torch.tensor([[True] * 3, [False, False, True]]) if masked else None
    sampler = SamplerConfig(steps=1, context_noise=0.3)
    out = world.rollout(context, Condition(action=actions), mask, sampler=sampler, generator=seeded())

    state, generator = world.begin(context, mask).fork(2), seeded()
    for i in range(5):
        state, sampled = world.step(state, Condition(action=actions[:, :, i]), sampler, generator)
        torch.testing.assert_close(world.decode(sampled), out[:, :, i], atol=1e-5, rtol=0)

    window, levels, generator = context.repeat_interleave(2, 0), torch.zeros(4, 3), seeded()
    exists = torch.ones(4, 3, dtype=torch.bool) if mask is None else mask.repeat_interleave(2, 0)
    for i in range(5):
        action, shift = normalized(actions[:, :, i].flatten(0, 1)[:, None], torch.full((4, 1), 0.25))
        noise = torch.randn(2, 2, 3, 8, 12, generator=generator).view(4, 1, 3, 8, 12)
        known = named(action, shift, motion=actions[:, :, i].flatten(0, 1)[:, None])
        clean = world.cdit(noise, torch.full((4, 1), 1000.0), known, window, exists if masked else None, levels)
        torch.testing.assert_close(out[:, :, i].flatten(0, 1), clean[:, 0].clamp(-1, 1), atol=1e-4, rtol=0)
        window = torch.cat((window, out[:, :, i].flatten(0, 1)[:, None]), dim=1)[:, 1:]
        levels = torch.cat((levels, torch.full((4, 1), 0.3)), dim=1)[:, 1:]
        exists = torch.cat((exists, torch.ones(4, 1, dtype=torch.bool)), dim=1)[:, 1:]


def windows(count: int) -> Batch:
    """Black past frames and goals, keyed from 0 on."""
    frames = torch.full((count, 3, 3, 8, 12), 127, dtype=torch.uint8)
    condition = Condition(torch.ones(count, 2))
    return Batch(frames, torch.ones(count, 3, dtype=torch.bool), frames[:, :2], condition, key=torch.arange(count))


def test_past_frames_are_noised_in_training_as_much_as_their_level_says():
    world, batch = build(context_noise=0.4), windows(400)
    clean = world.encode(batch)
    assert clean.noise_level is None
    encoded = world.encode(batch, clean_context=0.25)
    assert torch.equal(encoded.clean, clean.clean)
    levels, noise = encoded.noise_level, encoded.context - clean.context
    noisy = levels.any(1)
    assert noisy.float().mean() == pytest.approx(0.75, abs=0.08)
    assert torch.equal(encoded.context[~noisy], clean.context[~noisy])
    quantiles = levels[noisy].flatten().quantile(torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(quantiles, torch.tensor([0.1, 0.2, 0.3]), atol=0.03, rtol=0)
    unit = noise[noisy] / levels[noisy][..., None, None, None]
    assert unit.mean().abs() < 0.01
    torch.testing.assert_close(unit.std((2, 3, 4)).mean(), torch.tensor(1.0), atol=0.01, rtol=0)
    assert (levels[noisy].std(1) > 0.005).all()  # each frame its own


def test_the_noise_of_a_window_depends_on_its_key_alone():
    world, batch = build(context_noise=0.4), windows(12)
    together = world.encode(batch, clean_context=0.5)
    for i in range(12):
        alone = world.encode(batch[i : i + 1], clean_context=0.5)
        assert torch.equal(alone.context[0], together.context[i])
        assert torch.equal(alone.noise_level[0], together.noise_level[i])


def test_only_a_level_that_was_trained_with_can_be_declared():
    world, (context, actions, _) = build(), inputs()
    with pytest.raises(UserError, match=r"sampler.context_noise is 0.1, expected at least 0 and at most 0"):
        world.step(world.begin(context), Condition(action=actions), SamplerConfig(context_noise=0.1))
    with pytest.raises(UserError, match=r"at most 0\.5"):
        build(context_noise=0.5, sampler=SamplerConfig(context_noise=0.6))


def kl_codec() -> AutoencoderCodec:
    return KLCodec(
        diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 4),
            latent_channels=3,
            norm_num_groups=2,
            scaling_factor=0.5,
        ),
    )


@pytest.mark.parametrize("codec", [autoencoder_codec, kl_codec])
@pytest.mark.parametrize("reencode", [False, True])
@pytest.mark.parametrize("dialect", ["native", "nwm"])
@torch.no_grad()
def test_sampled_latents_join_the_past_or_their_frames_encoded_again(dialect, reencode, codec):
    torch.manual_seed(1)
    world, (context, _, _) = build(dialect, codec()), inputs(contexts=1)
    actions = torch.randn(1, 1, 5, 3, generator=seeded(3))
    out = world.rollout(context, Condition(action=actions), generator=seeded(), reencode=reencode)

    generator, window = seeded(), world.codec.encode(context)
    action, shift = normalized(actions[:, 0], torch.full((1, 1), 0.25))
    for step in range(5):
        x = torch.randn(1, 1, 3, 4, 6, generator=generator)
        for t in (1.0, 2 / 3, 1 / 3):
            condition = named(action[:, step, None], shift)
            clean = world.cdit(x, torch.full((1, 1), 1000 * t), condition, window[:, -3:])
            x = x - (x - clean) / t / 3
        torch.testing.assert_close(out[:, :, step], world.codec.decode(x), atol=1e-4, rtol=0)
        window = torch.cat((window, world.codec.encode(world.codec.decode(x)) if reencode else x), dim=1)
    assert not torch.allclose(x, world.codec.encode(world.codec.decode(x)), atol=1e-2)


@pytest.mark.parametrize("dialect", ["native", "nwm"])
def test_a_rollout_encodes_its_context_once_and_its_own_frames_only_when_asked(dialect, monkeypatch):
    world, (context, _, _) = build(dialect, kl_codec()), inputs()
    condition = Condition(action=torch.randn(2, 3, 4, 3, generator=seeded(3)))
    encoded, encode = [], world.codec.autoencoder.encode
    monkeypatch.setattr(world.codec.autoencoder, "encode", lambda x: encoded.append(len(x)) or encode(x))
    world.rollout(context, condition, generator=seeded())
    assert encoded == [6]  # 2 contexts of 3 frames
    encoded.clear()
    world.rollout(context, condition, generator=seeded(), reencode=True)
    assert encoded == [6, 6, 6, 6]  # then the frames of 6 candidates, of which the last join no past


@pytest.mark.parametrize("reencode", [False, True])
@pytest.mark.parametrize("dialect", ["native", "nwm"])
def test_a_rollout_decodes_the_last_frame_only_when_asked(dialect, reencode, monkeypatch):
    world, (context, _, _) = build(dialect, kl_codec()), inputs()
    condition = Condition(action=torch.randn(2, 3, 4, 3, generator=seeded(3)))
    whole = world.rollout(context, condition, generator=seeded(), reencode=reencode)
    decoded, decode = [], world.codec.autoencoder.decode
    monkeypatch.setattr(world.codec.autoencoder, "decode", lambda x: decoded.append(len(x)) or decode(x))
    last = world.rollout(context, condition, generator=seeded(), reencode=reencode, last_only=True)
    assert torch.equal(last, whole[:, :, -1:])
    assert decoded == [6] * (4 if reencode else 1)


@pytest.mark.parametrize("dialect", ["native", "nwm"])
def test_pixels_join_the_past_clipped_either_way(dialect):
    world, (context, _, _) = build(dialect), inputs()
    torch.nn.init.normal_(world.cdit.final_layer.linear.weight, std=1.0)  # far out of range
    condition = Condition(action=torch.randn(2, 2, 4, 3, generator=seeded(3)))
    with spied(world.cdit.patch_embed) as calls:
        out = world.rollout(context, condition, generator=seeded())
    assert ((out == 1) | (out == -1)).float().mean() > 0.05
    assert torch.equal(out, world.rollout(context, condition, generator=seeded(), reencode=True))
    shown = out.transpose(0, 2).flatten(0, 2)  # each was embedded as it was shown, but those of the last step
    embedded = torch.cat([call.args[0] for call in calls])
    assert all((frame == embedded).flatten(1).all(1).any() for frame in shown[:-4])


@pytest.mark.parametrize("dialect", ["native", "nwm"])
def test_each_context_of_a_rollout_has_its_own_spacing_and_the_time_of_a_step(dialect):
    world, (context, _, _) = build(dialect), inputs()
    world.description.units = replace(UNITS, spacing=None)
    actions = torch.randn(2, 2, 3, 3, generator=seeded(3))
    with spied(world.cdit) as calls:
        condition = Condition(action=actions, spacing=torch.tensor([0.5, 2.0]))
        world.rollout(context, condition, fps=2.0, generator=seeded())
    for step, call in enumerate(calls[::3]):  # three denoising steps each
        condition = call.args[2]
        metres = actions[:, :, step, :2] / torch.tensor([0.5, 2.0])[:, None, None]
        expected = metres * torch.tensor([2.0, 3.0]) + torch.tensor([-0.25, 0.0])
        torch.testing.assert_close(condition["action"][..., :2], expected)
        torch.testing.assert_close(condition["time_shift"], torch.full((2, 2), 0.5 / 16))
    world.description.units = replace(UNITS, spacing=0.25)  # which then is the only one
    with spied(world.cdit) as calls:
        world.predict(context, Condition(torch.ones(2, 2), actions[:, :, 0], spacing=torch.tensor([0.5, 2.0])))
    torch.testing.assert_close(calls[0].args[2]["action"][..., 1], actions[:, :, 0, 1] / 0.25 * 3)


# --- steps ---


def tensors_of(state: WorldState) -> list[torch.Tensor]:
    """All tensors that a state holds."""
    found = []

    def collect(value: object) -> None:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif is_dataclass(value):
            for f in fields(value):
                collect(getattr(value, f.name))
        elif isinstance(value, (list, tuple)):
            for item in value:
                collect(item)

    collect(state)
    return found


def same_tensors(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_two_continuations_of_a_state_do_not_disturb_each_other(dialect, masked):
    """Each is what it is alone, and all states on the way stay as they were."""
    world, (context, _, _) = build(dialect), inputs(frames=2)
    mask = torch.tensor([[True, True], [False, True]]) if masked else None
    actions = torch.randn(2, 2, 3, 4, 3, generator=seeded(3))  # of two plans, for 3 candidates and 4 steps

    def go(state: WorldState, plan: int, step: int) -> tuple[WorldState, torch.Tensor]:
        return world.step(state, Condition(action=actions[plan][:, :, step]), generator=seeded(10 * plan + step))

    def alone(plan: int) -> list[torch.Tensor]:
        state, frames = world.begin(context, mask).fork(3), []
        for step in range(4):
            state, sampled = go(state, plan, step)
            frames.append(sampled)
        return frames

    begun = world.begin(context, mask).fork(3)
    visited = [(begun, [tensor.clone() for tensor in tensors_of(begun)])]
    states, frames = [begun, begun], [[], []]
    for step in range(4):
        for plan in (0, 1):
            states[plan], sampled = go(states[plan], plan, step)
            visited.append((states[plan], [tensor.clone() for tensor in tensors_of(states[plan])]))
            frames[plan].append(sampled)
    for plan in (0, 1):
        for found, expected in zip(frames[plan], alone(plan), strict=True):
            assert torch.equal(found, expected)
    assert not torch.allclose(frames[0][-1], frames[1][-1], atol=0.05)
    for state, before in visited:
        assert before
        assert same_tensors(tensors_of(state), before)
    with pytest.raises(FrozenInstanceError):
        begun.candidates = 1


@pytest.mark.parametrize("reencode", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_steps_one_by_one_are_the_rollout_to_the_last_bit(dialect, reencode):
    world, (context, _, _) = build(dialect, kl_codec()), inputs()
    mask = torch.tensor([[True] * 3, [False, False, True]])
    actions, known = torch.randn(2, 3, 5, 3, generator=seeded(3)), torch.rand(2, 3, 5, generator=seeded(4)) > 0.3
    expected = world.rollout(
        context, Condition(action=actions, known=known), mask, generator=seeded(), reencode=reencode
    )

    generator, state, frames = seeded(), world.begin(context, mask).fork(3), []
    for step in range(5):
        condition = Condition(action=actions[:, :, step], known=known[:, :, step])
        state, sampled = world.step(state, condition, generator=generator, reencode=reencode)
        frames.append(world.decode(sampled))
    assert torch.equal(torch.stack(frames, dim=2), expected)
    generator = seeded()
    state = world.begin(context, mask).fork(3)
    begun = world.rollout(state, Condition(action=actions, known=known), generator=generator, reencode=reencode)
    assert torch.equal(begun, expected)


@pytest.mark.parametrize("slower", [1, 2])
@pytest.mark.parametrize("dialect", DIALECTS)
@torch.no_grad()
def test_held_frames_are_jumps_from_one_past(dialect, slower):
    """Each from the same noise, conditioned on all motion since; then the last of them are the past.

    At half the frame rate, half as many are held, for the same time.
    """
    world, (context, _, _) = build(dialect), inputs()
    actions, known = torch.randn(2, 2, 7, 3, generator=seeded(3)), torch.rand(2, 2, 7, generator=seeded(4)) > 0.2
    actions[..., 2] = 1.0  # more than half a turn in four steps
    sampler, fps = SamplerConfig(steps=2, hold=4 * slower), world.description.fps / slower
    given = Condition(action=actions, known=known)
    out = world.rollout(context, given, fps=fps, sampler=sampler, generator=seeded())

    past, generator, expected = context.repeat_interleave(2, 0), seeded(), []
    for first, last in ((0, 4), (4, 7)):
        noise = torch.randn(2, 2, *world.latent_shape, generator=generator).flatten(0, 1)[:, None]
        for i in range(first + 1, last + 1):
            moved = [compose(one.numpy())[-1] for one in actions[:, :, first:i].flatten(0, 1)]
            condition = Condition(
                torch.full((4, 1), (i - first) / fps),
                torch.from_numpy(np.array(moved, np.float32))[:, None],
                known[:, :, first:i].all(-1).flatten()[:, None],
            )
            sampled = world.sample(world.begin(past), condition, sampler, noise=noise)
            expected.append(world.decode(sampled)[:, 0])
        past = torch.cat((past, torch.stack(expected[first:], dim=1).clamp(-1, 1)), dim=1)
    torch.testing.assert_close(out.flatten(0, 1), torch.stack(expected, dim=1), atol=1e-4, rtol=0)

    state, generator = world.begin(context, fps=fps), seeded()
    for i in range(7):
        condition = Condition(action=actions[:, :, i], known=known[:, :, i])
        state, sampled = world.step(state, condition, sampler, generator)
        torch.testing.assert_close(world.decode(sampled), out[:, :, i], atol=1e-5, rtol=0)


@torch.no_grad()
def test_several_goals_can_follow_held_frames():
    """As one by one, whether or not their actions, and those of the held frames, say that they are known."""
    world, (context, _, _) = build(), inputs()
    sampler, noise = SamplerConfig(steps=2, hold=4), torch.randn(1, *world.latent_shape, generator=seeded(5))
    goals = torch.randn(2, 3, 3, generator=seeded(3))
    for known in (None, torch.ones(2, 1, dtype=torch.bool)):
        held, _ = world.step(world.begin(context), Condition(action=goals[:, :1], known=known), sampler, seeded())
        together = world.sample(held, Condition(action=goals), sampler, noise=noise)
        for i in range(3):
            alone = world.sample(held, Condition(action=goals[:, i, None]), sampler, noise=noise)
            torch.testing.assert_close(together[:, i], alone[:, 0])


def test_only_motion_is_held():
    space, world = ActionSpace(["joint"], ["rad"], [0.0], [1.0], "absolute"), build()
    description = replace(world.description, actions=space, sampler=SamplerConfig(hold=2))
    with pytest.raises(UserError, match=r"sampler\.hold is 2"):
        WorldModel(world.cdit, world.codec, description)


def test_a_state_knows_how_many_candidates_it_has():
    world, (context, actions, _) = build(), inputs()
    state = world.begin(context)
    forked, sampled = world.step(state, Condition(action=actions), generator=seeded())  # 3 goals fork it
    assert (state.candidates, forked.candidates) == (1, 3)
    expected, _ = world.step(state.fork(3), Condition(action=actions), generator=seeded())
    assert same_tensors(tensors_of(forked), tensors_of(expected))
    assert world.sample(forked).shape == sampled.shape  # without a condition, one frame of each
    assert world.rollout(forked, length=2).shape == (2, 3, 2, 3, 8, 12)
    for another in (lambda: forked.fork(2), lambda: world.rollout(forked, Condition(action=torch.zeros(2, 2, 1, 3)))):
        with pytest.raises(ValueError, match="a state of 3 candidates cannot be forked"):
            another()


def test_latents_are_scored_without_decoding(monkeypatch):
    """A planner steps many candidates and decodes none."""
    world, (context, _, _) = build("native", kl_codec()), inputs()
    actions = torch.randn(2, 3, 4, 3, generator=seeded(3))
    expected = world.rollout(context, Condition(action=actions), generator=seeded(), last_only=True)
    decode, state, generator = world.codec.autoencoder.decode, world.begin(context).fork(3), seeded()
    monkeypatch.setattr(world.codec.autoencoder, "decode", lambda *_: pytest.fail("latents were decoded"))
    for step in range(4):
        state, sampled = world.step(state, Condition(action=actions[:, :, step]), generator=generator)
    assert sampled.shape == (2, 3, 3, 4, 6)
    monkeypatch.setattr(world.codec.autoencoder, "decode", decode)
    assert torch.equal(world.decode(sampled), expected[:, :, 0])


@pytest.mark.parametrize("dialect", ["native", "nwm"])
def test_a_model_without_actions_ignores_them(dialect):
    """Those given to a model that was trained without would go through weights that were never trained."""
    world, (context, actions, seconds) = build(dialect), inputs()
    plans = torch.randn(2, 3, 2, 3, generator=seeded(3))

    def everything(known: bool) -> list[torch.Tensor]:
        given = Condition(seconds, actions) if known else Condition(seconds)
        steps = Condition(torch.full((2, 3, 2), 0.25), plans) if known else Condition(torch.full((2, 3, 2), 0.25))
        sampler = SamplerConfig(steps=2, guidance=2.5)
        return [
            world.predict(context, given, generator=seeded()),
            world.predict(context, given, sampler=sampler, generator=seeded()),
            world.sample(world.begin(context), given, generator=seeded()),
            world.rollout(context, steps, generator=seeded()),
        ]

    assert not any(map(torch.equal, everything(True), everything(False)))
    world.description.has_actions = False
    assert all(map(torch.equal, everything(True), everything(False)))


def test_a_goal_without_a_time_is_one_frame_ahead():
    world, (context, actions, _) = build(), inputs()
    found = world.predict(context, Condition(action=actions), generator=seeded())
    expected = world.predict(context, Condition(torch.full((2, 3), 0.25), actions), generator=seeded())
    assert torch.equal(found, expected)


def test_what_contradicts_is_an_error():
    world, (context, _, seconds) = build(), inputs()
    state, mask = world.begin(context), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="mask: expected none with a state"):
        world.predict(state, Condition(seconds), mask)
    for beside in ({"mask": mask}, {"fps": 2.0}):
        with pytest.raises(ValueError, match="expected none with a state"):
            world.rollout(state, length=1, **beside)
    with pytest.raises(UserError, match=r"sampler\.scheduler is ddim, expected one of euler, heun, dpm, unipc"):
        world.predict(context, Condition(seconds), sampler=SamplerConfig("ddim"))
    for condition in (None, Condition(), Condition(spacing=torch.ones(2))):
        with pytest.raises(ValueError, match="length: expected a number of steps"):
            world.rollout(context, condition)


# --- compiled ---


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize(("dialect", "guidance"), [("native", 2.5), ("modulated", 1.0), ("nwm", 1.0)])
def test_a_compiled_world_predicts_the_same(dialect, guidance, monkeypatch):
    """Through every shape of a rollout; traced only, to be fast, and whole, as breaks in the graph are errors."""
    world, (context, actions, seconds) = build(dialect), inputs()
    plans = torch.randn(2, 3, 5, 3, generator=seeded(3))
    mask = torch.tensor([[True] * 3, [False, False, True]])
    sampler = SamplerConfig(steps=2, guidance=guidance)

    def everything() -> list[torch.Tensor]:
        return [
            world.predict(context, Condition(seconds, actions), sampler=sampler, generator=seeded()),
            world.rollout(context, Condition(action=plans), mask, sampler=sampler, generator=seeded()),
        ]

    expected = everything()
    graphs, outputs = [], []

    def backend(graph: torch.fx.GraphModule, _):
        """Writes every output to the same memory, as CUDA graphs do."""
        graphs.append(graph)
        kept: dict[tuple, torch.Tensor] = {}

        def call(*args: torch.Tensor) -> list[torch.Tensor]:
            (out,) = graph(*args)
            outputs.append(kept.setdefault(out.shape, torch.empty_like(out)).copy_(out))
            return [outputs[-1]]

        return call

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, mode, **kw: compile_(*args, backend=backend, **kw))
    torch._dynamo.reset()
    names = list(world.state_dict())
    world.compile()
    assert list(world.state_dict()) == names
    with spied(world.cdit) as bare:
        found = everything()
    assert not bare
    assert len(graphs) < len(outputs) / 2
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    torch._dynamo.reset()


# --- files ---


@pytest.mark.parametrize("codec", [PixelCodec, autoencoder_codec])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_saved_world_model_comes_back_bit_equal(dialect, codec, tmp_path: Path):
    sampler = SamplerConfig(steps=3, context_noise=0.1)
    world, (context, actions, seconds) = build(dialect, codec(), 0.2, sampler=sampler), inputs()
    condition = Condition(seconds, actions)
    world.save_pretrained(tmp_path)
    loaded = WorldModel.from_pretrained(tmp_path)
    assert loaded.description == world.description
    assert loaded.cdit.config.context_noise == 0.2
    assert not loaded.training
    found, expected = (w.predict(context, condition, generator=seeded()) for w in (loaded, world))
    assert torch.equal(found, expected)
    weights = [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".json"]
    assert weights
    assert all(p.suffix == ".safetensors" for p in weights)


def test_a_runs_folder_gives_its_best_model_else_its_last(tmp_path: Path):
    build(fps=1.0).save_pretrained(tmp_path / "last")
    assert WorldModel.from_pretrained(str(tmp_path)).description.fps == 1.0
    build(fps=2.0).save_pretrained(tmp_path / "best")
    assert WorldModel.from_pretrained(tmp_path).description.fps == 2.0


def test_a_newer_model_replaces_an_older_one(tmp_path: Path):
    build("native", autoencoder_codec()).save_pretrained(tmp_path)
    (tmp_path / "mine.txt").write_text("kept")
    world = build(fps=3.0)
    world.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cdit", "mine.txt", "world_model.json"]
    assert WorldModel.from_pretrained(tmp_path).description == world.description


def test_a_half_written_model_is_none_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Killed while the parts are put in place: best/ must not mix two models, and last/ is read in its stead."""
    build(fps=1.0).save_pretrained(tmp_path / "last")
    build(fps=2.0).save_pretrained(tmp_path / "best")
    replace = Path.replace

    def killed(path: Path, target: Path) -> Path:
        if path.name == "world_model.json":
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        build(fps=3.0).save_pretrained(tmp_path / "best")
    assert WorldModel.from_pretrained(tmp_path).description.fps == 1.0


def test_a_rollout_without_actions_knows_none():
    world, (context, *_) = build(), inputs(goals=1)
    standing = Condition(action=torch.zeros(2, 1, 2, 3))
    rolled = world.rollout(context, length=2, generator=seeded())
    first = world.predict(context, Condition(torch.full((2, 1), 1 / world.description.fps)), generator=seeded())
    assert rolled.shape[:3] == (2, 1, 2)
    torch.testing.assert_close(rolled[:, :, 0], first)
    assert not torch.allclose(rolled, world.rollout(context, standing, generator=seeded()))


def from_the_future(folder: Path) -> None:
    text = (folder / "world_model.json").read_text()
    (folder / "world_model.json").write_text(text.replace('"version": 1', '"version": 2'))


def not_json(folder: Path) -> None:
    (folder / "world_model.json").write_text("{")


def lacks_fps(folder: Path) -> None:
    text = (folder / "world_model.json").read_text()
    (folder / "world_model.json").write_text(text.replace('"fps"', '"speed"'))


def network_missing(folder: Path) -> None:
    for path in (folder / "cdit").iterdir():
        path.unlink()


def cut_short(folder: Path) -> None:
    path = folder / "cdit" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def codec_missing(folder: Path) -> None:
    text = (folder / "world_model.json").read_text()
    (folder / "world_model.json").write_text(text.replace('"pixels"', '"kl"'))


@pytest.mark.parametrize(
    "spoil", [from_the_future, not_json, lacks_fps, network_missing, cut_short, codec_missing], ids=lambda f: f.__name__
)
def test_broken_folders_are_named(spoil, tmp_path: Path):
    build().save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=str(tmp_path)):
        WorldModel.from_pretrained(tmp_path)


def test_a_folder_without_a_world_model_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"nowhere: no world model here \(expected world_model.json"):
        WorldModel.from_pretrained(tmp_path / "nowhere")


# --- learning ---


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["clean", "velocity"])
@pytest.mark.parametrize("dialect", ["native", "nwm"])
def test_four_samples_are_learnt_by_heart_and_reproduced(dialect, prediction):
    """Two contexts, two actions each: the same past must lead to different futures by the action alone."""
    torch.manual_seed(0)
    generator = seeded(5)
    context = torch.rand(2, 2, 3, 16, 16, generator=generator) * 2 - 1
    targets = torch.rand(2, 2, 3, 16, 16, generator=generator) * 1.6 - 0.8
    actions = torch.tensor([[[0.5, 0.0, 0.4], [0.5, 0.0, -0.4]]] * 2)
    seconds = torch.full((2, 2), 0.25)
    cdit = CDiT((16, 16), 3, 2, patch_size=4, hidden_size=96, depth=2, num_heads=4, **DIALECTS[dialect])
    flow = FlowConfig(prediction=prediction)
    world = WorldModel(cdit, PixelCodec(), WorldDescription((16, 16), fps=4.0, flow=flow))
    objective = Flow(flow)

    def loss(draws: int) -> torch.Tensor:
        """Mean over `draws` noises and times of each of the four samples."""
        clean = targets.repeat_interleave(draws, 1)
        noise = torch.randn(clean.shape, generator=generator)
        keys = torch.randint(2**31, (len(clean),), generator=generator)
        time = objective.draw_time(KeyedDraws(keys, clean.device), clean.shape[1])
        condition = named(actions.repeat_interleave(draws, 1), seconds.repeat_interleave(draws, 1))
        out = cdit(objective.add_noise(clean, noise, time), time * 1000, condition, context)
        return objective.error(out, clean, noise, time).mean()

    optimizer = torch.optim.AdamW(cdit.parameters(), 2e-3, weight_decay=0.0)
    steps = 400
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    with torch.no_grad():
        first = loss(16).item()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(4).backward()
        torch.nn.utils.clip_grad_norm_(cdit.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        last = loss(16).item()
    world.eval()
    out = world.predict(context, Condition(seconds, actions), sampler=SamplerConfig(steps=16), generator=seeded())
    psnr = -10 * ((out - targets) / 2).square().mean(dim=(-3, -2, -1)).log10()
    print(f"loss {first:.4f} -> {last:.5f}, PSNR {psnr.flatten().tolist()}")
    assert last < 0.02 * first
    assert psnr.min() > 30
