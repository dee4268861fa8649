import numpy as np
import pytest
import torch

from cdit.common.errors import UserError
from cdit.common.randomness import generator
from cdit.diffusion import DDPMConfig, SamplerConfig
from cdit.evaluate.metrics import psnr
from cdit.heads.choose import best_column
from cdit.heads.config import ImportanceConfig
from cdit.heads.importance import (
    Ablation,
    Head,
    ablate_heads,
    contribution_squares,
    importance,
    pruning_curve,
)
from cdit.world_model import WorldDescription, WorldModel

DIALECTS = {
    "native": {},
    "sink": {"extra_kv": True, "qk_norm": True, "context_depth": 1},
    "nwm": {"extra_kv": True, "context_modulation": True, "position": "learned"},
}
NWM = {"extra_kv": True, "context_modulation": True, "position": "learned", "learn_variance": True}
CONFIG = ImportanceConfig(times=[0.3, 0.7], batch_size=2)
TRAJECTORIES = ["a", "a", "b", "c"]


@pytest.fixture(params=DIALECTS)
def dialect(request):
    return DIALECTS[request.param]


def hooks(cdit) -> list[int]:
    return [len(module._forward_pre_hooks) for module in cdit.modules() if module._forward_pre_hooks]


def heads_of(layer: int, kind: str, numbers: list[int]) -> list[Head]:
    return [Head(layer, kind, number) for number in numbers]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["cross", "self"])
@pytest.mark.parametrize("heads", [[0], [3, 1], [0, 1, 2, 3], []])
def test_zeroing_heads_is_removing_their_columns_exactly(make_cdit, make_inputs, dialect, kind, heads):
    cdit = make_cdit(**dialect)
    inputs = make_inputs(cdit)
    whole = cdit(**inputs)
    with ablate_heads(cdit, heads_of(1, kind, heads)):
        ablated = cdit(**inputs)
    assert torch.equal(cdit(**inputs), whole)
    # Zeros in the place of a head's columns: every product and every sum is the same, so not a bit may differ.
    weight = getattr(cdit.blocks[1], f"{kind}_attn").out.weight
    for head in heads:
        weight[:, 8 * head : 8 * head + 8] = 0
    assert torch.equal(ablated, cdit(**inputs))
    assert torch.equal(ablated, whole) == (not heads)


@torch.no_grad()
def test_the_mean_takes_the_place_of_what_heads_put_out(make_cdit, make_inputs, dialect):
    cdit = make_cdit(**dialect)
    inputs = make_inputs(cdit)
    mean = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
    with ablate_heads(cdit, heads_of(2, "cross", [0, 3]), "mean", {(2, "cross"): mean}):
        ablated = cdit(**inputs)
    # A constant before W_O is a bias after it.
    attention = cdit.blocks[2].cross_attn
    for head in (0, 3):
        columns = slice(8 * head, 8 * head + 8)
        attention.out.bias += attention.out.weight[:, columns] @ mean[head]
        attention.out.weight[:, columns] = 0
    torch.testing.assert_close(ablated, cdit(**inputs), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_nested_contexts_take_out_the_heads_of_both(make_cdit, make_inputs):
    cdit = make_cdit()
    inputs = make_inputs(cdit)
    with ablate_heads(cdit, [Head(0, "self", 1), Head(0, "self", 2), Head(2, "cross", 0)]):
        together = cdit(**inputs)
    with (
        ablate_heads(cdit, [Head(0, "self", 1)]),
        ablate_heads(cdit, [Head(0, "self", 2), Head(2, "cross", 0)]),
    ):
        nested = cdit(**inputs)
    assert torch.equal(nested, together)


@torch.no_grad()
def test_nothing_is_left_behind_even_by_an_error(make_cdit):
    cdit = make_cdit()
    with pytest.raises(RuntimeError, match="mine"), ablate_heads(cdit, [Head(0, "cross", 0)]):
        raise RuntimeError("mine")
    with pytest.raises(UserError), ablate_heads(cdit, [Head(0, "cross", 0), Head(0, "self", 9)]):
        pass
    assert not hooks(cdit)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (Head(0, "cross", 4), r"attention heads \[4\]: layer 0 has heads 0 to 3"),
        (Head(0, "self", -1), r"attention heads \[-1\]"),
        (Head(3, "cross", 0), "layer 3: the model has layers 0 to 2"),
    ],
)
def test_what_does_not_exist_is_named(make_cdit, head, message):
    with pytest.raises(UserError, match=message), ablate_heads(make_cdit(), [head]):
        pass


@pytest.fixture(params=["native", "nwm"])
def world(request, make_world, make_cdit) -> WorldModel:
    if request.param == "native":
        return make_world(extra_kv=True)
    description = WorldDescription((16, 24), 4.0, objective="ddpm", ddpm=DDPMConfig(), sampler=SamplerConfig("ddim", 2))
    return WorldModel(make_cdit(**NWM), make_world().codec, description).eval()


@torch.no_grad()
def test_the_rise_is_that_of_the_objective_without_the_heads_columns(world, make_batch, denoise):
    batch = make_batch(samples=3)
    found = importance(Ablation(world, batch, CONFIG, 7))
    assert len(found.heads) == 3 * 2 * 4
    assert found.distance_rise is None

    def losses() -> np.ndarray:
        return torch.stack([denoise(world, batch, time, 7).mean(1) for time in (0.3, 0.7)]).mean(0).numpy()

    whole = losses()
    np.testing.assert_allclose(found.loss, whole, rtol=1e-4)
    for head in (Head(1, "cross", 2), Head(2, "self", 0)):
        weight = getattr(world.cdit.blocks[head.layer], f"{head.kind}_attn").out.weight
        columns = slice(8 * head.number, 8 * head.number + 8)
        kept = weight[:, columns].clone()
        weight[:, columns] = 0
        expected = losses() - whole
        weight[:, columns] = kept
        rise = found.loss_rise[:, found.heads.index(head)]
        np.testing.assert_allclose(rise, expected, atol=2e-6 * max(whole), rtol=1e-3)
        assert np.abs(rise).max() > 1e-5 * max(whole)


def test_results_do_not_depend_on_the_batch_size(make_world, make_batch):
    world, batch = make_world(), make_batch(samples=3)
    one, all_at_once = (importance(Ablation(world, batch, ImportanceConfig([0], batch_size=n), 0)) for n in (1, 8))
    np.testing.assert_allclose(one.loss_rise, all_at_once.loss_rise, atol=1e-5)
    np.testing.assert_allclose(one.contribution, all_at_once.contribution, rtol=1e-4)


@torch.no_grad()
def test_contributions_are_the_changes_of_the_branch_without_the_head(world):
    attention = world.cdit.blocks[0].cross_attn
    out = torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(1))

    def branch(out: torch.Tensor) -> torch.Tensor:
        return attention.out(out.transpose(1, 2).flatten(2))

    squares = contribution_squares(attention.out.weight, out)
    for head in range(4):
        without = out.index_fill(1, torch.tensor([head]), 0.0)
        torch.testing.assert_close(squares[:, head], (branch(out) - branch(without)).square().sum((1, 2)))
    torch.testing.assert_close(squares[:, 4], (branch(out) - attention.out.bias).square().sum((1, 2)))


def test_the_only_head_contributes_all_and_orthogonal_heads_add_up(make_world, make_batch):
    config = ImportanceConfig([0], ["cross"], times=[0.5])
    found = Ablation(make_world(num_heads=1), make_batch(), config, 0).outputs()[0, "cross"]
    np.testing.assert_allclose(found, np.ones((2, 1)), rtol=1e-5)
    world = make_world()
    with torch.no_grad():
        world.cdit.blocks[0].cross_attn.out.weight.copy_(torch.eye(32))
    found = Ablation(world, make_batch(), config, 0).outputs()[0, "cross"]
    np.testing.assert_allclose((found**2).sum(1), np.ones(2), rtol=1e-5)


@torch.no_grad()
def test_outputs_are_gathered_over_samples_times_goals_and_patches(world, make_batch, denoise):
    batch, sites = make_batch(samples=3), [(1, "cross"), (1, "self")]
    given = {site: [] for site in sites}
    for layer, kind in sites:
        getattr(world.cdit.blocks[layer], f"{kind}_attn").out.register_forward_pre_hook(
            lambda module, args, site=(layer, kind): given[site].append(args[0])
        )
    for time in (0.3, 0.7):
        denoise(world, batch, time, 5)
    outputs = {site: torch.stack(found).reshape(2, 3, -1, 4, 8) for site, found in given.items()}
    for size in (3, 2):
        ablation = Ablation(world, batch, ImportanceConfig([1], batch_size=size, times=[0.3, 0.7]), 5)
        contributions = ablation.outputs()
        for (layer, kind), out in outputs.items():
            weight = getattr(world.cdit.blocks[layer], f"{kind}_attn").out.weight
            added = torch.einsum("tsnhk,dhk->tsnhd", out, weight.unflatten(1, (4, 8)))
            squares, total = added.square().sum((0, 2, 4)), added.sum(3).square().sum((0, 2, 3))
            torch.testing.assert_close(ablation.means[layer, kind], out.mean((0, 1, 2)), atol=1e-6, rtol=1e-4)
            np.testing.assert_allclose(contributions[layer, kind], (squares / total[:, None]).sqrt(), rtol=1e-3)


def test_a_head_that_adds_the_same_always_is_needed_by_zero_but_not_by_its_mean(make_world, make_batch):
    """Values without input: a constant head. Zeroing it changes the loss; its mean is itself."""
    world, batch = make_world(), make_batch(samples=2)
    with torch.no_grad():
        world.cdit.blocks[1].cross_attn.kv.weight[32 + 8 : 32 + 16] = 0  # the values of head 1 are their bias
    rises = {}
    for mode in ("zero", "mean"):
        found = importance(Ablation(world, batch, ImportanceConfig([1], ["cross"], mode, [0.5]), 0))
        rises[mode] = np.abs(found.loss_rise).max(axis=0)
    assert rises["zero"][1] > 1e-4
    assert rises["mean"][1] < 1e-6
    assert rises["mean"][0] > 1e-4


def test_sampled_frames_are_compared_with_the_truth(world, make_batch):
    ablation = Ablation(world, make_batch(samples=3), CONFIG, 3)
    variants = [(), heads_of(1, "cross", [0, 1])]
    world.description.sampler = SamplerConfig(world.description.sampler.scheduler, 2)
    found = ablation.distances(variants, psnr)
    first = ablation.batch[:2]
    context, truth = (frames.float() / 127.5 - 1 for frames in (first.context, first.target))
    for i, heads in enumerate(variants):
        with ablate_heads(world.cdit, heads):
            frames = world.predict(context, first.condition, first.mask, generator=generator(3, 0))
        expected = psnr(frames.flatten(0, 1), truth.flatten(0, 1)).unflatten(0, (2, 2)).mean(1)
        np.testing.assert_allclose(found[:2, i], expected.numpy(), rtol=1e-4)
    assert np.abs(found[:, 0] - found[:, 1]).min() > 0
    ablation.config = ImportanceConfig([1], ["cross"], times=[0.5], batch_size=2)
    alone = ablation.distances([(), [Head(1, "cross", 0)]], psnr)
    rise = importance(ablation, psnr).distance_rise[:, 0]
    np.testing.assert_allclose(rise, alone[:, 1] - alone[:, 0], rtol=1e-4)


def test_a_model_without_actions_sees_none(make_world, make_batch):
    """Whatever the batch contains; with actions, every result depends on them."""
    world = make_world()
    world.description.sampler = SamplerConfig(steps=1)
    ablations = [Ablation(world, make_batch(), ImportanceConfig([1], ["cross"], times=[0.5]), 0) for _ in range(2)]
    ablations[1].batch.condition.action += 3
    one, other = (importance(ablation, psnr) for ablation in ablations)
    assert (one.loss != other.loss).all()
    assert not np.array_equal(one.contribution, other.contribution)
    world.description.has_actions = False
    one, other = (importance(ablation, psnr) for ablation in ablations)
    for name in ("loss", "loss_rise", "contribution", "distance_rise"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_heads_behind_a_closed_gate_are_never_needed(make_world, make_batch):
    world = make_world()
    with torch.no_grad():  # chunk 5 of 9 gates the cross-attention
        for parameter in (world.cdit.blocks[1].ada_ln.weight, world.cdit.blocks[1].ada_ln.bias):
            parameter.unflatten(0, (9, 32))[5] = 0
    found = importance(Ablation(world, make_batch(samples=4), CONFIG, 0))
    closed = found.of(1, "cross")
    assert [found.heads[i] for i in closed] == heads_of(1, "cross", [0, 1, 2, 3])
    assert (found.loss_rise[:, closed] == 0).all()
    needed = best_column(np.abs(found.loss_rise), np.array([True, True, False, False]), TRAJECTORIES)
    assert needed.column not in closed


def test_the_curve_takes_the_least_needed_first_and_looks_at_other_samples(make_world, make_batch):
    ablation = Ablation(make_world(), make_batch(samples=4), CONFIG, 0)
    measured, choosing = importance(ablation), np.array([True, False, False, True])
    curve = pruning_curve(ablation, measured, choosing, TRAJECTORIES, points=5, random_orders=2)
    assert curve.counts == [0, 6, 12, 18, 24]
    order = measured.order(choosing)
    means = measured.loss_rise[choosing].mean(axis=0)
    rises = [means[measured.heads.index(head)] for head in order]
    assert rises == sorted(rises)
    ablation.batch = ablation.batch[[1, 2]]
    expected = ablation.losses([order[:count] for count in curve.counts]).mean(axis=0)
    np.testing.assert_allclose([point.mean for point in curve.ordered], expected, rtol=1e-6)
    assert curve.ordered[0].mean == pytest.approx(curve.random[0].mean)  # none out, all out: no order matters
    assert curve.ordered[-1].mean == pytest.approx(curve.random[-1].mean)
    assert curve.ordered[2].mean != curve.random[2].mean


def test_without_all_heads_the_past_is_not_seen(make_world, make_batch):
    """With every cross-attention head out, other past frames leave the loss as it is."""
    ablation = Ablation(make_world(), make_batch(), CONFIG, 0)
    gone = [head for layer in range(3) for head in heads_of(layer, "cross", [0, 1, 2, 3])]
    losses = [ablation.losses([(), gone])]
    ablation.batch.context = 255 - ablation.batch.context
    losses.append(ablation.losses([(), gone]))
    assert (losses[0][:, 1] == losses[1][:, 1]).all()
    assert (losses[0][:, 0] != losses[1][:, 0]).all()


def test_the_model_is_left_as_it_was(make_world, make_batch):
    world, state = make_world(dropout=0.5).train(), torch.get_rng_state()
    importance(Ablation(world, make_batch(), ImportanceConfig([0], mode="mean", times=[0.5]), 0))
    assert world.cdit.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not hooks(world.cdit)
