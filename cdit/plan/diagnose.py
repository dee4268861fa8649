"""Whether a cost is suitable for planning: how well it orders predicted frames, before any plan is made.

For every case, candidates are predicted several times with different noise. All costs judge the same frames.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cdit.common.files import write_json
from cdit.common.frames import to_float
from cdit.common.motion import integrate, wrap
from cdit.common.randomness import generator
from cdit.common.statistics import Estimate, estimates
from cdit.common.tables import markdown_table
from cdit.plan.config import DiagnoseConfig
from cdit.plan.costs import Predicted, load_cost
from cdit.plan.openloop import Benchmark
from cdit.plan.planner import Planner
from cdit.plan.prediction import Predictor

NEAR, FAR = 1.0, 2.0
"""Candidates are near if they end within `NEAR` metres of the goal, far if beyond `FAR`; a radian counts as a metre."""
APART = 0.5
"""Smallest difference in distance between candidates that are compared."""
COLUMNS = {
    "rank correlation": "Spearman's, of cost and true distance over the candidates of a case",
    "chosen [m]": "true distance of the lowest-cost candidate",
    "ordered near": "fraction of pairs, the closer candidate near the goal, that the cost orders correctly",
    "ordered far": "the same, the closer candidate far from it",
    "signal / noise near": "deviation of the cost over candidates near the goal, divided by that over samples of one",
    "signal / noise far": "the same far from it",
}


@dataclass
class Diagnosis:
    """The quality of a cost in N cases."""

    cost: str
    values: np.ndarray
    """(N, 6), see `COLUMNS`; NaN where a case has no such candidates."""

    def estimates(self, walks: list[str]) -> list[Estimate | None]:
        """Means of the columns over the cases that have them, with intervals over walks."""
        found = []
        for column in self.values.T:
            kept = np.isfinite(column)
            names = [walk for walk, keep in zip(walks, kept, strict=True) if keep]
            found.append(estimates(column[kept], names)[0] if names else None)
        return found


def diagnose(config: DiagnoseConfig) -> None:
    """Evaluates every cost, and writes diagnose.md and diagnose.json.

    Raises:
        UserError: checkpoint, data or options are incompatible.
    """
    benchmark = Benchmark(config)
    world, walks = benchmark.world, [case.name for case in benchmark.cases]
    planner = Planner.fit(config.planner, benchmark.recorded, world.device)
    plans = config.planner
    sampler = plans.sampler.over(world.description)
    predictor = Predictor(world, [benchmark.horizon], plans.stride, sampler, plans.chunk)
    costs = {name: load_cost(name, world, config.planner.learned) for name in config.costs}
    found = {name: [] for name in costs}
    for number in tqdm(range(len(walks)), desc="candidates", unit="case"):
        batch = benchmark.batch(number)
        actions, distance = candidates(benchmark, planner, number, config.candidates)
        given = batch.condition
        state = predictor.begin(to_float(batch.context), batch.mask, given.spacing, given.text)
        judged = {name: [] for name in costs}
        for repeat in range(config.noises):
            noise = predictor.draw_noise(generator(config.seed, 4, number, repeat, device=world.device))
            latents, goals = predictor.predict(state, actions[None].to(world.device), noise), batch.target[:, 0]
            predicted = Predicted(world.codec, latents)
            for name, cost in costs.items():
                judged[name].append(cost.of_predicted(predicted, to_float(goals))[0, :, 0].cpu())
        for name in costs:
            found[name].append(judge(torch.stack(judged[name]), distance))
    diagnoses = [Diagnosis(name, np.array(values)) for name, values in found.items()]
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    text = report(diagnoses, walks, config)
    (out / "diagnose.md").write_text(text)
    write_json(
        out / "diagnose.json", {d.cost: np.where(np.isfinite(d.values), d.values, -1).tolist() for d in diagnoses}
    )
    print(text)


def candidates(benchmark: Benchmark, planner: Planner, number: int, count: int) -> tuple[Tensor, Tensor]:
    """Steps (S, H, 3) of candidates, half of them near the recorded motion, and their distances (S,) to the goal.

    A radian counts as a metre.
    """
    draws, prior = generator(benchmark.config.seed, 5, number), planner.prior
    index = torch.randint(len(prior.recorded), (count,), generator=draws)
    values = prior.recorded.cpu()[index]
    truth = planner.family.values(benchmark.truth_actions[number])
    near = count // 2
    values[:near] = truth + 0.7 * prior.std.cpu() * torch.randn(near, *truth.shape, generator=draws)
    actions = planner.project(planner.family.actions(values))
    offset = integrate(actions)[:, -1] - integrate(benchmark.truth_actions[number])[-1]
    return actions, offset[:, :2].norm(dim=1) + wrap(offset[:, 2]).abs()


def judge(costs: Tensor, distance: Tensor) -> list[float]:
    """The values of `COLUMNS` for the costs (R, S) of S candidates in R predictions, and their distances (S,)."""
    first = costs[0]
    near, far = distance < NEAR, distance > FAR
    return [
        spearman(first, distance),
        distance[first.argmin()].item(),
        *(ordered(first, distance, group) for group in (near, far)),
        *(signal_to_noise(costs[:, group]) for group in (near, far)),
    ]


def spearman(first: Tensor, second: Tensor) -> float:
    """Rank correlation of two lists without ties; NaN for fewer than three."""
    if len(first) < 3:
        return float("nan")
    ranks = torch.stack((first, second)).argsort(1).argsort(1).double()
    return torch.corrcoef(ranks)[0, 1].item()


def ordered(costs: Tensor, distance: Tensor, group: Tensor) -> float:
    """Fraction of pairs ordered as by distance: pairs more than `APART` apart, the closer one in the group."""
    closer = (distance[None, :] - distance[:, None] > APART) & group[:, None]
    right = costs[:, None] < costs[None, :]
    return right[closer].float().mean().item() if closer.any() else float("nan")


def signal_to_noise(costs: Tensor) -> float:
    """Deviation over candidates of the mean of costs (R, S), divided by the deviation over predictions."""
    if costs.shape[0] < 2 or costs.shape[1] < 3:
        return float("nan")
    noise = costs.var(0).mean().sqrt()
    return (costs.mean(0).std() / noise.clamp(min=1e-12)).item()


def report(diagnoses: list[Diagnosis], walks: list[str], config: DiagnoseConfig) -> str:
    """A table and the meaning of its columns."""
    rows = []
    for diagnosis in diagnoses:
        cells = ["–" if estimate is None else f"{estimate:.2f}" for estimate in diagnosis.estimates(walks)]
        rows.append([diagnosis.cost, *cells])
    about = (
        f"{len(walks)} cases of split {config.split} of {config.data}, {config.seconds:g} s ahead, {config.candidates} "
        f"candidates, half of them close to the true motion, each predicted {config.noises} times."
    )
    meaning = "".join(f"- {name}: {text}\n" for name, text in COLUMNS.items())
    return f"{about}\n\n{markdown_table(['cost', *COLUMNS], rows)}\n{meaning}"
