"""Plans from where a dream is to a goal picture."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cdit.common.frames import to_float, to_uint8
from cdit.common.motion import integrate
from cdit.common.randomness import generator
from cdit.drive.dream import Dream
from cdit.heads.importance import ablate_heads
from cdit.loading import spread
from cdit.plan.planner import Planner, Towards, WorldScore

Run = Callable[..., Any]
"""Calls a function with arguments in the thread that runs the networks; raises `Cancelled` if the plan was
cancelled."""

ENDS = 8
"""Candidates whose predicted ends are shown: the plan, and others spread evenly over the rest, the best first."""
PIECE = 8
"""Candidates that are scored at a time; in between, other sessions get their frames."""


class Cancelled(Exception):
    """The plan was cancelled."""


@dataclass
class Planned:
    """A plan, and what it was chosen from."""

    goal: Tensor
    """(3, H, W) uint8."""
    actions: Tensor
    """(L, 3): dx, dy in metres and dyaw in radians of each step until the plan is closest to the goal."""
    paths: Tensor
    """(S, H, 3), the poses along all candidates in the frame at the start; the plan's own first, then from the lowest
    cost to the highest."""
    costs: Tensor
    """(S,), in the same order."""
    shown: list[int]
    """Some of these candidates, the plan first."""
    ends: Tensor
    """(len(shown), 3, h, w) uint8, predicted where they are closest to the goal."""


def plan(planner: Planner, score: WorldScore, dream: Dream, goal: Tensor, run: Run) -> Planned:
    """Plans from the dream's newest frame, with the same heads turned off.

    Args:
        planner: finds steps of low cost.
        score: predicts and compares, in the dream's world.
        dream: whose state is the past of all candidates.
        goal: (3, H, W) uint8.
        run: see `Run`; planning itself may run in another thread.
    """
    noise = generator(dream.seed, 2, len(dream.moments))
    world = dream.world
    draws = [score.predictor.draw_noise(noise).to(world.device) for _ in range(score.repeats)]
    state, stride = dream.state, score.predictor.stride
    if stride or len(state.held) + planner.moments[-1] > dream.sampler.hold:  # they join the past during the plan
        state = run(world.join, state, dream.sampler)
    if state.noise is not None:
        draws[0] = state.noise[0].expand_as(draws[0])
    state = replace(state, fps=world.description.fps / (stride or 1))
    towards = Towards(score, state, to_float(goal)[None].to(world.device), draws)

    def scored(actions: Tensor) -> Tensor:
        with ablate_heads(world.cdit, dream.off):
            return towards(actions.to(world.device)).cpu()

    def pieces(actions: Tensor) -> Tensor:
        return torch.cat([run(scored, piece) for piece in actions.split(PIECE, dim=1)], dim=1)

    def pictures(actions: Tensor) -> Tensor:
        with ablate_heads(world.cdit, dream.off):
            return to_uint8(towards.frames(actions.to(world.device)))[0].cpu()

    found = planner.plan(pieces, 1, noise)
    costs, order = torch.cat(found.costs, dim=1)[0].sort()
    tried = torch.cat(found.tried, dim=1)[0][order]
    others = ((tried - found.actions).abs() > 1e-6).flatten(1).any(1)
    tried = torch.cat((found.actions, tried[others]))
    shown = [0, *spread(list(range(1, len(tried))), ENDS - 1)]
    best = run(scored, tried[None, shown])[0]  # (len(shown), moments)
    ends = run(pictures, tried[None, shown])[torch.arange(len(best)), best.argmin(1)]
    costs = torch.cat((best[:1].min(1).values, costs[others]))
    return Planned(goal, found.actions[0, : int(found.length)], integrate(tried), costs, shown, ends)
