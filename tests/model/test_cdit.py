"""What a CDiT promises, dialect by dialect; its arithmetic as a whole is tested in test_reference.py."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dialects import BASE, DIALECTS, batch, build, call, masks

from cdit.common.errors import UserError
from cdit.model import PRESETS, CDiT, ModelConfig
from cdit.model.attention import MultiHeadAttention, Observation, Part
from cdit.model.blocks import Block
from cdit.model.cdit import ContextCache, EncodedFrames

NAN = float("nan")
PUSHABLE = [name for name, options in DIALECTS.items() if options.get("position") != "learned"]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# --- the context: encoded once, shared by goals, pushed ---


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_goals_of_a_cached_context_are_those_goals_alone_with_their_frames(dialect, masked):
    model, data, mask = build(dialect), batch(), masks() if masked else {}
    cache = model.encode_context(data["context"], mask.get("context_mask"))
    others = {k: v for k, v in (data | mask).items() if k not in ("context", "context_mask")}
    together = call(model, **others, context=cache)
    for b in range(2):
        frames = {k: v[b : b + 1] for k, v in (data | mask).items() if k in ("context", "context_mask")}
        for g in range(3):
            alone = call(model, **{k: v[b, g][None] for k, v in others.items()}, **frames)
            torch.testing.assert_close(together[b, g], alone[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("first", [1, 2, 3], ids=lambda n: f"from_{n}_frames")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dialect", PUSHABLE)
def test_pushing_frames_is_encoding_the_new_window_afresh(dialect, masked, first):
    """Eight pushes: windows grow to max_context, then slide; every old frame and its mask leave."""
    model, data = build(dialect), batch(frames=3)
    frames = torch.randn(2, first + 8, 2, 4, 6, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, first + 8, dtype=torch.bool)
    mask[1, : first - 1] = False
    goal = {k: v for k, v in data.items() if k != "context"}
    cache = model.encode_context(frames[:, :first], mask[:, :first] if masked else None)
    for end in range(first + 1, first + 9):
        cache = model.push_context(cache, frames[:, end - 1])
        window = slice(max(0, end - 3), end)
        assert len(cache.frame_T) == min(end, 3)
        afresh = call(model, **goal, context=frames[:, window], context_mask=mask[:, window] if masked else None)
        torch.testing.assert_close(call(model, **goal, context=cache), afresh, atol=1e-5, rtol=0)


# --- noise levels of past frames ---


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dialect", PUSHABLE)
def test_pushing_noisy_frames_is_encoding_the_new_window_with_its_levels(dialect, masked):
    """Recorded frames have level 0; a frame keeps its level while it moves through the window and leaves."""
    model, data = build(dialect, context_noise=0.5), batch(frames=3)
    draws = torch.Generator().manual_seed(3)
    frames, levels = torch.randn(2, 9, 2, 4, 6, generator=draws), 0.5 * torch.rand(2, 9, generator=draws)
    levels[:, :2] = 0
    mask = torch.tensor([[True] * 9, [False] + [True] * 8])
    goal = {k: v for k, v in data.items() if k != "context"}
    cache = model.encode_context(frames[:, :2], mask[:, :2] if masked else None)
    for end in range(3, 10):
        cache = model.push_context(cache, frames[:, end - 1], levels[:, end - 1])
        window = slice(max(0, end - 3), end)
        past = {"context": frames[:, window], "context_mask": mask[:, window] if masked else None}
        afresh = call(model, **goal, **past, noise_level=levels[:, window])
        torch.testing.assert_close(call(model, **goal, context=cache), afresh, atol=1e-5, rtol=0)
        assert (call(model, **goal, **past) - afresh).abs().max() > 1e-3  # the levels matter


@pytest.mark.parametrize("dialect", DIALECTS)
def test_level_0_changes_no_bit_of_a_network_without(dialect):
    model, noisy, data = build(dialect, context_noise=0.0), build(dialect, context_noise=0.5), batch() | masks()
    further = noisy.load_state_dict(model.state_dict(), strict=False)
    assert further.missing_keys == ["noise_embed.mlp.fc1.weight", "noise_embed.mlp.fc2.weight"]
    assert noisy.noise_embed.mlp.fc2.weight.std() > 0.1
    expected = call(model, **data)
    assert torch.equal(call(noisy, **data), expected)
    assert torch.equal(call(noisy, **data, noise_level=torch.zeros(2, 3)), expected)


def test_a_level_starts_without_effect_and_a_network_without_takes_none():
    data, level = batch(), torch.full((2, 3), 0.3)
    fresh = CDiT(**BASE, context_noise=0.5)
    for p in [*fresh.blocks.parameters(), *fresh.final_layer.parameters()]:
        torch.nn.init.normal_(p, std=0.15)
    assert torch.equal(call(fresh, **data, noise_level=level), call(fresh, **data))
    with pytest.raises(ValueError, match="context_noise"):
        call(build("native"), **data, noise_level=level)


def test_a_level_is_added_to_the_tokens_of_its_frame():
    """As a learned position of that frame would be, here computed in NumPy."""
    model, data = build("learned_cached", context_noise=0.5, norm="pre"), batch(contexts=1)
    levels = np.array([0.4, 0.0, 0.07])
    first, second = (p.double().numpy() for p in model.noise_embed.mlp.parameters())
    angles = 1000 * levels[:, None] * 10000 ** (-np.arange(128) / 127)
    hidden = np.sin(angles) @ first.T
    added = (hidden / (1 + np.exp(-hidden))) @ second.T
    out = call(model, **data, noise_level=torch.tensor(levels, dtype=torch.float32)[None])
    model.pos_embed[:3] += torch.from_numpy(added).float()[:, None]
    torch.testing.assert_close(out, call(model, **data), atol=1e-4, rtol=0)
    assert np.abs(added[[0, 2]]).max(1).min() > 0.1


def pushed(
    model: CDiT, frames: torch.Tensor, mask: torch.Tensor | None, candidates: int, pushes: int, branch: int = 1
) -> tuple[list[ContextCache], torch.Tensor]:
    """Caches of candidates for what follows frames (B, T, …), and the frames of each, (B·G, T + pushes, …).

    In the first `branch - 1` pushes the past is still that of all candidates.
    """
    cache, rows = model.encode_context(frames, mask), len(frames)
    caches, generator = [cache], torch.Generator().manual_seed(5)
    for push in range(1, pushes + 1):
        if push == branch:
            frames, rows = frames.repeat_interleave(candidates, 0), rows * candidates
        new = torch.randn(rows, *frames.shape[2:], generator=generator)
        frames = torch.cat((frames, new[:, None]), dim=1)
        caches.append(model.push_context(caches[-1], new))
    return caches, frames


@pytest.mark.parametrize("branch", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dialect", PUSHABLE)
def test_candidates_that_share_a_past_are_as_each_with_its_own(dialect, masked, branch):
    """Pushed until no real frame is left, two goals for each of three candidates of two contexts."""
    model = build(dialect)
    data, mask = batch(goals=6, frames=3), torch.tensor([[True] * 3, [False, False, True]]) if masked else None
    caches, frames = pushed(model, data.pop("context"), mask, candidates=3, pushes=5, branch=branch)
    for push, cache in enumerate(caches[branch:], branch):
        window = slice(push, 3 + push)
        ones = torch.ones(6, push, dtype=torch.bool)
        mine = torch.cat((mask.repeat_interleave(3, 0), ones), 1)[:, window] if masked else None
        goals = {name: x.unflatten(1, (3, 2)).flatten(0, 1) for name, x in data.items()}
        expected = call(model, **goals, context=frames[:, window], context_mask=mine)
        assert cache.rows == 6
        assert cache.frame_T.tolist() == list(range(push - 2, push + 1))
        torch.testing.assert_close(call(model, **data, context=cache).view_as(expected), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(call(model, **goals, context=cache), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dialect", PUSHABLE)
def test_a_shared_past_is_not_copied_for_candidates(dialect):
    """The same memory after every push, as much of it for 3 candidates as for 120, until it has left the window."""
    model, frames = build(dialect), batch(contexts=2)["context"]

    def tensors(part: EncodedFrames) -> list[torch.Tensor]:
        return [x for kv in part.keys_values for x in kv] if part.tokens_SMD is None else [part.tokens_SMD]

    for candidates in (3, 120):
        caches, _ = pushed(model, frames, None, candidates, pushes=4)
        real = [x.untyped_storage().data_ptr() for x in tensors(caches[0].parts[0])]
        for push, cache in enumerate(caches[1:], 1):
            assert [part.rows for part in cache.parts] == ([2, 2 * candidates] if push < 3 else [2 * candidates])
            own = tensors(cache.parts[-1])
            extra = int(model.config.extra_kv)
            assert all(x.numel() == 2 * candidates * (min(push, 3) * 6 + extra) * 32 for x in own)
            assert not {x.untyped_storage().data_ptr() for x in own} & set(real)
            if push < 3:
                shared = tensors(cache.parts[0])
                assert [x.untyped_storage().data_ptr() for x in shared] == real
                assert all(x.numel() == 2 * (3 - push) * 6 * 32 for x in shared)


@pytest.mark.parametrize("dialect", ["native", "encoder", "modulated_rotary"])
def test_watching_candidates_shows_one_softmax_over_shared_and_own_frames(dialect):
    model, data = build(dialect), batch(goals=6)
    caches, frames = pushed(model, data.pop("context"), masks()["context_mask"], candidates=3, pushes=2)
    expected = call(model, **data, context=caches[-1])
    seen: list[Observation] = []
    for block in model.blocks:
        block.cross_attn.observer = seen.append
    assert torch.equal(call(model, **data, context=caches[-1]), expected)

    together = [
        observation.weights().unflatten(2, (-1, 6)).transpose(1, 2).reshape(12, 2, 6, -1) for observation in seen
    ]
    seen.clear()
    goals = {name: x.unflatten(1, (3, 2)).flatten(0, 1) for name, x in data.items()}
    existing = torch.tensor([[True] * 3] * 3 + [[True] * 3] * 3)
    call(model, **goals, context=frames[:, 2:], context_mask=existing)
    for weights, alone in zip(together, seen, strict=True):
        torch.testing.assert_close(weights.sum(-1), torch.ones(12, 2, 6))
        apart = alone.weights().unflatten(2, (-1, 6)).transpose(1, 2).reshape(12, 2, 6, -1)
        torch.testing.assert_close(weights, apart, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dialect", sorted(set(DIALECTS) - set(PUSHABLE)))
def test_learned_positions_cannot_be_pushed(dialect):
    model = build(dialect)
    assert not model.can_push
    with pytest.raises(ValueError, match="learned positions cannot be pushed"):
        model.push_context(model.encode_context(batch()["context"]), torch.zeros(2, 2, 4, 6))


def test_only_modulated_contexts_are_kept_as_tokens():
    for dialect, options in DIALECTS.items():
        (part,) = build(dialect).encode_context(batch()["context"]).parts
        assert (part.tokens_SMD is not None) == bool(options.get("context_modulation"))
        assert len(part.keys_values) == (0 if options.get("context_modulation") else 2)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_fewer_frames_are_a_full_window_whose_oldest_are_missing(dialect):
    model, data = build(dialect), batch(frames=3)
    expected = call(model, **data, context_mask=torch.tensor([[False, False, True]] * 2))
    data["context"] = data["context"][:, -1:]
    torch.testing.assert_close(call(model, **data), expected, atol=1e-5, rtol=0)


def test_more_frames_than_max_context_are_refused():
    with pytest.raises(ValueError, match="4 past frames, but max_context is 3"):
        build("native").encode_context(batch(frames=4)["context"])


# --- what is missing has no influence ---


@pytest.mark.parametrize("fill", [NAN, math.inf, 1e6])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_missing_frames_and_unknown_actions_hold_is_not_looked_at(dialect, fill):
    model, data, mask = build(dialect), batch(), masks()
    expected = call(model, **data, **mask)
    data["context"] = data["context"].masked_fill(~mask["context_mask"][:, :, None, None, None], fill)
    data["action"] = data["action"].masked_fill(~mask["action_mask"][..., None], fill)
    assert torch.equal(call(model, **data, **mask), expected)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_target_without_any_past_frame_is_finite(dialect):
    data = batch() | {"context_mask": torch.zeros(2, 3, dtype=torch.bool)}
    assert call(build(dialect), **data).isfinite().all()


def test_unknown_actions_become_the_learned_vector():
    model, data = build("native"), batch()
    unknown = call(model, **data, action_mask=torch.zeros(2, 3, dtype=torch.bool))
    torch.testing.assert_close(call(model, **data | {"action": None}), unknown)
    assert not torch.allclose(call(model, **data), unknown, atol=1e-3)
    model.conditioners["action"].unknown.add_(1)
    assert not torch.allclose(call(model, **data | {"action": None}), unknown, atol=1e-3)


# --- every input matters ---


@pytest.mark.parametrize("name", ["sample", "timestep", "action", "time_shift", "context"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_input_matters_unless_the_config_says_otherwise(dialect, name):
    model, data = build(dialect), batch()
    before = call(model, **data)
    changed = call(model, **data | {name: data[name] + 0.5})
    unused = {"action": not model.config.use_action, "time_shift": not model.config.use_time_shift}
    assert torch.equal(before, changed) == unused.get(name, False)


def test_no_time_shift_is_needed_where_it_is_not_used():
    data = batch()
    torch.testing.assert_close(
        call(build("action_only"), **data | {"time_shift": None}), call(build("action_only"), **data)
    )


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_order_of_past_frames_matters(dialect):
    model, data = build(dialect), batch()
    assert not torch.allclose(
        call(model, **data), call(model, **data | {"context": data["context"].flip(1)}), atol=1e-4
    )


# --- watching ---


@pytest.mark.parametrize("dialect", DIALECTS)
def test_recording_every_attention_leaves_the_output_bit_identical(dialect):
    model, data, mask = build(dialect), batch(), masks()
    expected = call(model, **data, **mask)
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, MultiHeadAttention):
            module.observer = lambda o, name=name: seen.setdefault(name, []).append((o, o.weights()))
    assert torch.equal(call(model, **data, **mask), expected)

    heads, extra = 2, int(model.config.extra_kv)
    for i in range(2):
        ((_, self_weights),) = seen[f"blocks.{i}.self_attn"]
        assert self_weights.shape == (6, heads, 6, 6)  # six targets of six patches
        ((cross, weights),) = seen[f"blocks.{i}.cross_attn"]
        # A cached context folds its goals into queries: either way, goals in order, then patches.
        assert weights.numel() == 6 * heads * 6 * (3 * 6 + extra)
        assert isinstance(cross, Observation)
        missing = weights.unflatten(0, (2, -1))[1, ..., : 2 * 6]
        assert (missing == 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert len(seen) == 4 + model.config.context_depth + model.config.wide_head_depth


# --- beginnings ---


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_untrained_network_is_the_identity_on_its_stream_and_predicts_zero(dialect, norm):
    torch.manual_seed(0)
    model = CDiT(**(BASE | DIALECTS[dialect] | {"norm": norm}))
    streams = []
    for block in (*model.blocks, *model.wide_blocks):
        block.register_forward_hook(lambda _, inputs, output: streams.append((inputs[0], output)))
    out = call(model, **batch(), **masks())
    assert len(streams) == 2 + model.config.wide_head_depth
    for before, after in streams:
        assert torch.equal(before, after)
        assert before.std() > 0.1
    assert (out == 0).all() or model.config.reprojection  # which begins with half of what the past frame shows
    assert out.shape == (2, 3, 4 if model.config.learn_variance else 2, 4, 6)


def test_reprojection_starts_from_a_wall():
    """Half of the last frame, as if all of it stood at one depth; nothing where it is not seen, or no action known."""
    model = CDiT(**(BASE | DIALECTS["reprojection"]))
    data = batch(goals=2, contexts=1)
    depth, focal = 1 / math.log(1 + math.exp(-2)), model.config.focal[0]
    data["action"] = torch.tensor([[[0.0, 2 * depth / 6 / focal, 0.0], [0.0, 0.0, math.pi]]])  # a column left; back
    last = data["context"][:, -1]
    sideways, back = call(model, **data)[0]
    torch.testing.assert_close(sideways[..., 1:], last[0, ..., :-1] / 2)
    assert (sideways[..., 0] == 0).all()
    assert (back == 0).all()
    assert (call(model, **data | {"action": None}) == 0).all()


def test_initial_weights():
    """Xavier's bounds and variances, a small position table, closed gates, zero biases."""
    torch.manual_seed(0)
    model = CDiT(image_size=(8, 8), hidden_size=192, depth=1, num_heads=6, position="learned", extra_kv=True)
    for name, weight in model.named_parameters():
        if name.endswith("bias") or "ada_ln" in name or name.startswith("final_layer"):
            assert (weight == 0).all(), name
        elif name == "conditioners.action.unknown":
            assert weight.std().item() == pytest.approx(0.4, rel=0.3), name
        elif name == "pos_embed":
            assert weight.std().item() == pytest.approx(0.02, rel=0.1 if weight.numel() > 1000 else 0.3), name
        elif "extra" in name:  # Xavier normal over (1, 1, D), as bias_k of torch.nn.MultiheadAttention
            assert weight.std().item() == pytest.approx((2 / (192 + 192)) ** 0.5, rel=0.3), name
        else:  # Xavier uniform over (out, in)
            fan_out, fan_in = weight.flatten(1).shape
            bound = (6 / (fan_in + fan_out)) ** 0.5
            assert 0.98 * bound < weight.abs().max() <= bound, name
            assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), name


def test_published_initial_weights():
    """Conditions N(0, 0.02); queries, keys and values as torch.nn.MultiheadAttention draws its one matrix."""
    torch.manual_seed(0)
    arguments = {"hidden_size": 192, "depth": 1, "num_heads": 6, "position": "learned", "extra_kv": True}
    model = CDiT(image_size=(8, 8), init="published", **arguments)
    in_proj = torch.nn.MultiheadAttention(192, 6).in_proj_weight
    native = CDiT(image_size=(8, 8), **arguments)
    for (name, weight), other in zip(model.named_parameters(), native.parameters(), strict=True):
        if name.startswith(("time_embed", "conditioners")) and name.endswith("weight"):
            assert weight.std().item() == pytest.approx(0.02, rel=0.05), name
        elif name.endswith(("attn.q.weight", "attn.kv.weight")):
            assert weight.abs().max().item() == pytest.approx(in_proj.abs().max().item(), rel=0.01), name
            assert weight.std().item() == pytest.approx(in_proj.std().item(), rel=0.02), name
        else:
            assert weight.std(correction=0).item() == pytest.approx(other.std(correction=0).item(), rel=0.3), name


def test_seeds_reproduce_the_initial_weights():
    def draw(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return CDiT(**BASE, extra_kv=True).state_dict()

    first, again, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.mlp.fc1.weight"], other["blocks.0.mlp.fc1.weight"])


# --- patches ---


@pytest.mark.parametrize("patch_size", [1, 2, 3, 6])
def test_unpatchify_inverts_unfold(patch_size):
    model = CDiT(**BASE | {"image_size": (6, 12), "patch_size": patch_size})
    frames = torch.randn(2, 2, 6, 12)
    patches = F.unfold(frames, patch_size, stride=patch_size)  # (B, C·p·p, P), channels first
    patches = patches.unflatten(1, (2, -1)).permute(0, 3, 2, 1).flatten(2)  # (B, P, p·p·C), channels last
    assert torch.equal(model._unpatchify(patches), frames)
    assert model.patch_embed(frames).shape == (2, patches.shape[1], 32)


# --- mistakes, presets, files, precision ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": (4, 5)}, r"patch_size 2 .*\(4, 5\)"),
        ({"patch_size": 4}, r"patch_size 4 .*\(4, 6\)"),
        ({"num_heads": 3}, "hidden_size 32 must be a multiple of num_heads 3"),
        ({"hidden_size": 30, "num_heads": 2}, "even width, not 15"),
        ({"steered_queries": True, "position": "learned"}, "steered_queries needs position rotary, not learned"),
        ({"wide_head_depth": 1, "wide_head_width": 40}, "wide_head_width 40 must be a multiple of .*, 16"),
        ({"context_norm": "keys", "context_modulation": True}, "context_norm keys cannot be .* context_modulation"),
    ],
)
def test_options_that_do_not_go_together_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        CDiT(**BASE | changes)


def test_heads_of_odd_width_are_fine_with_learned_positions():
    data = batch()
    model = CDiT(**BASE | {"hidden_size": 30, "position": "learned"})
    assert call(model, **data).shape == data["sample"].shape


def test_presets_can_be_overridden_field_by_field():
    assert ModelConfig(preset="B").arguments()["hidden_size"] == 768
    arguments = ModelConfig(preset="B", depth=3, num_heads=6).arguments()
    assert (arguments["hidden_size"], arguments["depth"], arguments["num_heads"]) == (768, 3, 6)
    assert "preset" not in arguments
    with torch.device("meta"):
        for preset in PRESETS:
            model = CDiT(image_size=(8, 8), **ModelConfig(preset=preset).arguments())
            assert len(model.blocks) == PRESETS[preset]["depth"]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_saved_network_comes_back_bit_equal(dialect, tmp_path: Path):
    model, data = build(dialect), batch() | masks()
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    loaded = CDiT.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert torch.equal(call(loaded, **data), call(model, **data))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_bfloat16_is_near_float32(dialect):
    model, data = build(dialect), batch() | masks()
    exact = call(model, **data)
    halved = {k: v.bfloat16() if k in ("sample", "context") else v for k, v in data.items()}
    out = call(model.bfloat16(), **halved)
    assert out.dtype == torch.bfloat16
    error = (out - exact).square()
    # A pixel at the edge of what a reprojected frame shows may be rounded to the other side.
    assert (error.median() if model.config.reprojection else error.mean()) < 3e-3 * exact.square().mean()


def test_dropout_acts_in_training_only():
    data = batch()
    model = build("native", dropout=0.5)
    assert torch.equal(call(model, **data), call(model, **data))
    model.train()
    assert not torch.equal(call(model, **data), call(model, **data))


@pytest.mark.parametrize("dialect", ["encoder", "levers"])
def test_the_cache_is_not_copied_for_the_extra_key(dialect):
    """Nor for goals: each block looks at the memory that the context was encoded to."""
    model, data = build(dialect), batch()
    cache = model.encode_context(data.pop("context"), masks()["context_mask"])
    seen: list[Observation] = []
    for block in model.blocks:
        block.cross_attn.observer = seen.append
    call(model, **data, context=cache)
    for observation, kv in zip(seen, cache.parts[0].keys_values, strict=True):
        assert [x.data_ptr() for x in observation.kv] == [x.data_ptr() for x in kv]


def test_blocks_fold_targets_into_queries_of_their_context():
    """The keys of a context shared by several targets are not copied."""
    torch.manual_seed(0)
    block = Block(16, 2)
    seen: list[Observation] = []
    block.cross_attn.observer = seen.append
    keys_values = block.cross_attn.project_kv(torch.randn(2, 5, 16))
    block(torch.randn(6, 4, 16), torch.randn(6, 16), [Part(keys_values)])
    assert seen[0].kv.k_BHMK.data_ptr() == keys_values.k_BHMK.data_ptr()
    assert seen[0].q_BHNK.shape == (2, 2, 3 * 4, 8)
