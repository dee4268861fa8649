from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cdit.batch import Condition
from cdit.codec import Codec
from cdit.common.motion import integrate
from cdit.diffusion import SamplerConfig
from cdit.model import CDiT
from cdit.plan.config import OptimizerConfig, PlannerConfig
from cdit.plan.constraints import forward_first, staying_out, turn_first
from cdit.plan.costs import Features, Latents, Pixels
from cdit.plan.planner import CostWorld, Guided, Planner, WorldScore
from cdit.plan.prediction import Predictor
from cdit.world_model import WorldModel

SIDE = 32


@pytest.fixture
def model(world):
    return world()


@pytest.fixture
def context() -> torch.Tensor:
    return torch.rand(2, 3, 3, SIDE, SIDE, generator=torch.manual_seed(0)) * 2 - 1


@pytest.fixture
def actions() -> torch.Tensor:
    return torch.randn(2, 5, 4, 3, generator=torch.manual_seed(1)) * 0.3


def noise_of(predictor: Predictor) -> torch.Tensor:
    return predictor.draw_noise(torch.manual_seed(2))


@pytest.mark.parametrize("stride", [None, 1, 2])
def test_candidates_that_share_a_cache_are_predicted_as_if_alone(model, context, actions, stride):
    predictor = Predictor(model, [2, 4], stride)
    noise = noise_of(predictor)
    together = predictor.predict(predictor.begin(context), actions, noise)
    assert together.shape == (2, 5, 2, 3, SIDE, SIDE)
    for b in range(2):
        for s in range(5):
            state = predictor.begin(context[b : b + 1])
            alone = predictor.predict(state, actions[b : b + 1, s : s + 1], noise)
            torch.testing.assert_close(together[b, s], alone[0, 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stride", [None, 2])
def test_ancestral_sampling_repeats_its_noise(world, context, actions, stride):
    """The scheduler ddpm draws noise at every denoising step; another first noise is followed by other noise."""
    flow = world()
    cdit = CDiT.from_config(flow.cdit.config, learn_variance=True)
    model = WorldModel(cdit, flow.codec, replace(flow.description, objective="ddpm", sampler=SamplerConfig("ddpm")))
    predictor = Predictor(model, [4], stride, SamplerConfig("ddpm", steps=3))
    state, noise = predictor.begin(context), noise_of(predictor)
    first, again = (predictor.predict(state, actions, noise) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, predictor.predict(state, actions, predictor.draw_noise(torch.manual_seed(3))))


@pytest.mark.parametrize("stride", [None, 2])
def test_chunks_change_nothing(model, context, actions, stride):
    whole, parts = Predictor(model, [4], stride), Predictor(model, [4], stride, chunk=4)
    noise = noise_of(whole)
    torch.testing.assert_close(
        whole.predict(whole.begin(context), actions, noise),
        parts.predict(parts.begin(context), actions, noise),
        atol=1e-4,
        rtol=1e-4,
    )


def test_chunks_shrink_until_memory_suffices(model, context, actions):
    predictor, sizes = Predictor(model, [4]), []
    sample = model.sample

    def limited(state, condition, *further, **options):
        sizes.append(condition.action.shape[1])
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError
        return sample(state, condition, *further, **options)

    model.sample = limited
    assert predictor.predict(predictor.begin(context), actions, noise_of(predictor)).shape[1] == 5
    assert sizes[-3:] == [2, 2, 1]


def test_a_jump_is_conditioned_on_the_composed_motion_and_its_time(model, context, actions):
    predictor = Predictor(model, [3])
    noise = noise_of(predictor)
    found = predictor.predict(predictor.begin(context), actions, noise)[:, :, 0]
    condition = Condition(torch.full((2, 5), 0.75), integrate(actions)[:, :, 2])
    expected = model.sample(model.begin(context), condition, noise=noise.expand(2, 5, *noise.shape[1:]))
    torch.testing.assert_close(found, expected)


def test_every_frame_is_the_rollout_of_the_world(model, context, actions):
    predictor = Predictor(model, [1, 2, 3, 4], stride=1)
    noise = noise_of(predictor)
    found = model.decode(predictor.predict(predictor.begin(context), actions, noise))
    state = model.begin(context)
    for i in range(4):
        sampled = model.sample(state.fork(5) if i == 0 else state, Condition(action=actions[:, :, i]), noise=noise[i])
        torch.testing.assert_close(found[:, :, i], model.decode(sampled), atol=1e-4, rtol=1e-4)
        state = model.advance(state, sampled)


@pytest.mark.parametrize("cost", ["pixels", "latents", "features"])
def test_costs_are_zero_at_the_goal_and_positive_elsewhere(model, cost):
    goals = torch.rand(2, 3, SIDE, SIDE, generator=torch.manual_seed(0)) * 2 - 1
    frames = torch.stack((goals, goals.flip(-1), goals.flip(-2)), dim=1)
    made = {
        "pixels": Pixels,
        "latents": lambda: Latents(model.codec),
        "features": lambda: Features("resnet10t", "cpu", pretrained=False),
    }
    found = made[cost]()(frames, goals)
    assert found.shape == (2, 3)
    torch.testing.assert_close(found[:, 0], torch.zeros(2), atol=1e-5, rtol=0)
    assert (found[:, 1:] > 1e-4).all()


class Pooled(Codec):
    """Latents whose pictures are all the same."""

    channels, downscale, has_decoder = 3, 8, False

    def encode(self, frames, noise=None):
        return F.avg_pool2d(frames.flatten(0, -4), 8).unflatten(0, frames.shape[:-3])

    def decode(self, latents):
        return latents.new_zeros(*latents.shape[:-3], 3, SIDE, SIDE)

    @classmethod
    def load(cls, name):
        return cls()


def test_latents_are_compared_without_being_decoded(world, context, actions):
    model = world(Pooled(), patch_size=1)
    score = WorldScore(Predictor(model, [2, 4]), Latents(model.codec))
    goals = context[:, 0].flip(-1)
    towards = score.to_goals(context, goals, torch.manual_seed(0))
    predicted = score.predictor.predict(towards.state, actions, towards.noises[0])
    expected = (predicted - model.codec.encode(goals)[:, None, None]).square().mean((3, 4, 5))
    torch.testing.assert_close(towards(actions), expected)
    assert expected.unique().numel() == expected.numel()


def test_costs_of_repeats_are_averaged(model, context, actions):
    goals = context[:, 0].flip(-1)
    towards = WorldScore(Predictor(model, [2, 4]), Pixels(), repeats=3).to_goals(context, goals, torch.manual_seed(0))
    frames = torch.stack([model.decode(towards.latents(actions, i)) for i in range(3)])
    costs = (frames - goals[:, None, None]).square().mean((4, 5, 6))
    torch.testing.assert_close(towards(actions), costs.mean(0))
    assert (costs[0] != costs[1]).all()


def planner_of(**options) -> Planner:
    recorded = torch.randn(200, 8, 3, generator=torch.manual_seed(5)) * torch.tensor([0.1, 0.05, 0.2])
    recorded[..., 0] += 0.3
    optimizer = OptimizerConfig(samples=200, iterations=5, elites=20, smallest_std=0.01)
    return Planner.fit(PlannerConfig(optimizer=optimizer, cost="pixels", **options), recorded)


def distance_to(goal: torch.Tensor):
    return lambda actions: (integrate(actions)[:, :, -1:, :2] - goal).norm(dim=-1)


@pytest.mark.parametrize("candidates", ["constant", "spline", "steps"])
def test_a_planner_that_knows_the_distance_gets_there(candidates):
    goal = torch.tensor([2.0, 0.4])
    plan = planner_of(candidates=candidates).plan(distance_to(goal), 1, torch.manual_seed(0))
    assert (integrate(plan.actions)[0, -1, :2] - goal).norm() < 0.15


def test_a_plan_ends_where_it_is_closest():
    goal = torch.tensor([1.2, 0.0])

    def score(actions):
        return (integrate(actions)[:, :, [1, 3, 7], :2] - goal).norm(dim=-1)

    plan = planner_of(frames=[2, 4, 8]).plan(score, 1, torch.manual_seed(0))
    errors = (integrate(plan.actions)[0, [1, 3, 7], :2] - goal).norm(dim=-1)
    assert plan.length.item() == [2, 4, 8][errors.argmin()]


def test_given_candidates_are_ranked():
    planner = planner_of(knots=1, frames=[1, 2, 4])
    actions = torch.zeros(2, 3, 4, 3)
    actions[:, :, :, 0] = torch.tensor([0.1, 0.2, 0.3])[:, None]
    goals = torch.tensor([0.4, 0.31])  # the second after four steps, or the third after one

    def score(candidates: torch.Tensor) -> torch.Tensor:
        places = integrate(candidates)[..., [0, 1, 3], 0]
        return (places - goals[:, None, None]).abs() + torch.tensor([0.1, 0.2, 0.0])[:, None]

    plan = planner.rank(score, actions)
    torch.testing.assert_close(plan.actions[:, 0, 0], torch.tensor([0.3, 0.3]))
    torch.testing.assert_close(plan.lowest, torch.tensor([0.1, 0.01]))
    assert plan.length.tolist() == [1, 1]
    plan = planner.rank(score, actions, lambda path: torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(plan.actions[:, 0, 0], torch.tensor([0.1, 0.3]))
    assert plan.length.tolist() == [4, 1]
    torch.testing.assert_close(plan.lowest, torch.tensor([0.1, 0.01]))  # without the penalty

    bent = actions + torch.tensor([0.0, 0.0, 0.1])
    plan = planner_of(knots=1, frames=[1, 2, 4], constraint="forward_first").rank(score, bent)
    assert torch.equal(plan.tried[0], forward_first(bent))
    assert torch.equal(plan.actions, forward_first(plan.actions))


@pytest.mark.parametrize(("constraint", "order"), [("forward_first", forward_first), ("turn_first", turn_first)])
def test_plans_obey_projections(constraint, order):
    plan = planner_of(constraint=constraint).plan(distance_to(torch.tensor([1.0, 0.5])), 1, torch.manual_seed(0))
    moves, turns = plan.actions[0, :, :2].abs().sum(1) > 0, plan.actions[0, :, 2].abs() > 0
    assert not (moves & turns).any()
    assert (moves == torch.arange(8).lt(5) if constraint == "forward_first" else moves == torch.arange(8).ge(3)).all()
    assert all(torch.equal(order(tried), tried) for tried in plan.tried)


def test_plans_stay_out_of_forbidden_places():
    goal, planner = torch.tensor([2.2, 0.0]), planner_of()

    def wall(position):
        return (position[..., 0] > 1.0) & (position[..., 0] < 1.6) & (position[..., 1] < 0.15)

    free = planner.plan(distance_to(goal), 1, torch.manual_seed(0))
    obeying = planner.plan(distance_to(goal), 1, torch.manual_seed(0), penalty=staying_out(wall))
    assert wall(integrate(free.actions)[..., :2]).any()
    assert not wall(integrate(obeying.actions)[..., :2]).any()


def test_a_warm_start_is_kept_if_nothing_is_better():
    planner = planner_of(candidates="steps")
    start = planner.prior.recorded[:1]
    end = integrate(start)[:, -1, :2]
    plan = planner.plan(distance_to(end), 1, torch.manual_seed(0), start=start)
    torch.testing.assert_close(plan.actions, start)


def test_proposals_are_tried():
    planner = planner_of(candidates="steps")
    proposed = planner.prior.recorded[None, 5:8]
    end = integrate(proposed[:, 1])[:, -1, :2]
    plan = planner.plan(distance_to(end), 1, torch.manual_seed(0), planner.prior.recorded[:1], proposed=proposed)
    torch.testing.assert_close(plan.actions, proposed[:, 1])


def test_guided_scores_are_those_of_a_gaussian_prior():
    generator = torch.manual_seed(0)
    actions, mean = torch.randn(2, 5, 4, 3, generator=generator), torch.randn(2, 4, 3, generator=generator)
    std = torch.rand(2, 4, 3, generator=generator) + 0.5
    costs = torch.randn(2, 5, 2, generator=generator)
    found = Guided(lambda given: costs, mean, std, 0.3, [2, 4])(actions)
    likelihood = torch.distributions.Normal(mean[:, None], std[:, None])
    deviation = 2 * (likelihood.log_prob(mean[:, None]) - likelihood.log_prob(actions))
    expected = torch.stack([deviation[:, :, :t].mean((2, 3)) for t in (2, 4)], dim=-1)
    torch.testing.assert_close(found, costs + 0.3 * expected)


def cost_world(model, knots: int = 4) -> CostWorld:
    planner = Planner.fit(PlannerConfig(knots=knots), torch.randn(100, 4, 3) * 0.2)
    return CostWorld(WorldScore(Predictor(model, [4]), Pixels()), planner)


def test_get_cost_is_the_distance_of_what_the_world_predicts(model, context, actions):
    costing, goal = cost_world(model), context[:, 0].flip(-1)
    encoded = []
    begin = model.begin
    model.begin = lambda *args: encoded.append(1) or begin(*args)
    repeated = {
        "pixels": context[:, None].expand(-1, 5, -1, -1, -1, -1),
        "goal": goal[:, None].expand(-1, 5, -1, -1, -1),
    }
    found = costing.get_cost(repeated, actions)
    torch.testing.assert_close(costing.get_cost({"pixels": context, "goal": goal}, actions[:, :2]), found[:, :2])
    assert len(encoded) == 1
    prior = costing.planner.prior
    steps = prior.mean + prior.std * actions
    condition = Condition(torch.ones(2, 5), integrate(steps)[:, :, -1])
    noise = costing.score.predictor.draw_noise(torch.manual_seed(0))
    frames = model.decode(model.sample(begin(context), condition, noise=noise.expand(2, 5, *noise.shape[1:])))
    torch.testing.assert_close(
        found, F.mse_loss(frames, goal[:, None].expand_as(frames), reduction="none").mean((2, 3, 4))
    )


def test_get_cost_of_the_knots_of_a_spline(model, context):
    torch.manual_seed(0)
    costing, info = cost_world(model, knots=2), {"pixels": context, "goal": context[:, 0]}
    values = torch.randn(2, 3, 2, 3)
    prior = costing.planner.prior
    ends = prior.mean + prior.std * values
    share = torch.linspace(0, 1, 4)[:, None]
    steps = ends[:, :, :1] * (1 - share) + ends[:, :, 1:] * share  # of two knots, a straight line
    whole = CostWorld(costing.score)
    torch.testing.assert_close(costing.get_cost(info, values), whole.get_cost(info, steps))


@pytest.mark.parametrize("solver", ["CEMSolver", "MPPISolver", "ICEMSolver"])
def test_solvers_of_stable_worldmodel_run_on_a_world(model, context, solver):
    package = pytest.importorskip("stable_worldmodel", reason="pip install 'cdit[planning]' brings these solvers")
    gymnasium = pytest.importorskip("gymnasium")

    costing, goal = cost_world(model), context[:, 0].flip(-1)
    made = getattr(package.solver, solver)(costing, num_samples=20, n_steps=3, topk=5)
    space = gymnasium.spaces.Box(-5, 5, shape=(2, 3))
    made.configure(action_space=space, n_envs=2, config=package.PlanConfig(horizon=4, receding_horizon=4))
    info = {"pixels": context, "goal": goal}
    found = made.solve(info)["actions"]
    assert found.shape == (2, 4, 3)
    still = torch.zeros(2, 1, 4, 3)
    assert (costing.get_cost(info, found[:, None]) <= costing.get_cost(info, still) + 1e-3).all()
