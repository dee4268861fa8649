"""Tables, pictures and pages of the open-loop benchmark."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from cdit.common.files import write_json
from cdit.common.motion import placed
from cdit.common.tables import html_table, markdown_table
from cdit.evaluate.page import figure, html_page
from cdit.plan.draw import OTHER, PLAN, TRUTH, beside, costs_as_colours, frame, from_above, map_of, numbers_over_time
from cdit.plan.errors import PATH_MEASURES
from cdit.plan.openloop import METHODS, PLANNERS, CurvePoint, OpenResults, Picture


def write_open(results: OpenResults, out: Path) -> str:
    """Writes results.json, results.md, index.html and pictures; returns the Markdown."""
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    columns, rows = table(results)
    below = differences(results)
    text = f"{describe(results)}\n\n{markdown_table(columns, rows)}\n{markdown_table(*below)}"
    (out / "results.md").write_text(text)
    write_json(out / "results.json", numbers(results))
    parts = [f"<h1>Plans of {results.about['checkpoint']}</h1>", f'<p class="note">{describe(results)}</p>']
    parts += [html_table(columns, rows), html_table(*below)]
    for i, picture in enumerate(results.pictures):
        path = out / "pictures" / f"episode_{i}.png"
        draw_episode(picture, results).save(path)
        parts.append(figure(path, f"{picture.case.name}, frame {picture.case.now}", out))
    (out / "index.html").write_text(html_page(f"Plans of {results.about['checkpoint']}", parts))
    return text


def table(results: OpenResults) -> tuple[list[str], list[list[str]]]:
    """A row for each method."""
    rows = []
    for method, name in METHODS.items():
        if method in results.answers:
            answers = results.answers[method]
            pairs = zip(results.estimates(method), results.measures.values(), strict=True)
            cells = [f"{e:.{places}f}" for e, places in pairs]
            cost = "–" if answers.costs is None else f"{answers.costs.mean():.4g}"
            rows.append([name, *cells, cost, f"{answers.seconds:.2f}" if answers.seconds else "–"])
    return ["method", *results.measures, "cost by the world", "s per plan"], rows


def differences(results: OpenResults) -> tuple[list[str], list[list[str]]]:
    """The errors of each planner minus those of each baseline."""
    rows = []
    for planner in PLANNERS:
        others = [
            name for name in METHODS if name not in (planner, "truth") and {planner, name} <= set(results.answers)
        ]
        for name in others:
            pairs = zip(results.differences(planner, name), results.measures.values(), strict=True)
            rows.append([f"{planner} − {METHODS[name]}", *(f"{e:+.{places}f}" for e, places in pairs)])
    return ["difference, case by case", *results.measures], rows


def describe(results: OpenResults) -> str:
    """A paragraph on the setting."""
    about, planner = results.about, results.about["planner"]
    optimizer = planner["optimizer"]
    worse = ""
    if results.answers["truth"].costs is not None:
        beaten = (results.answers["world"].costs < results.answers["truth"].costs).float().mean()
        worse = f" The plan costs less than the true actions in {beaten:.0%} of the episodes."
    unit = f"ATE and RPE in units of {results.spacing:g} m"
    if results.space.kind != "motion":
        unit = "Errors in percent of the recorded range of each number, averaged, and of single numbers at the end"
    return (
        f"{len(results.cases)} episodes of {len({case.name for case in results.cases})} trajectories of split "
        f"{about['split']} of {about['data']}, {about['seconds']:g} s ahead; {planner['motions']} candidates, "
        f"{optimizer['name']}, {optimizer['samples']} × {optimizer['iterations']}, {planner['repeats']} repeats, cost "
        f"{planner['cost']}. {unit}; ± is half the width of the 95 % interval over trajectories.{worse}"
    )


def numbers(results: OpenResults) -> dict[str, Any]:
    """All numbers, including those of single episodes."""
    return {
        "config": results.about,
        "spacing": results.spacing,
        "cases": [[case.name, case.now] for case in results.cases],
        "errors": {method: results.errors(method).tolist() for method in results.answers},
        "means": {method: [asdict(e) for e in results.estimates(method)] for method in results.answers},
        "seconds": {method: answers.seconds for method, answers in results.answers.items() if answers.seconds},
        "paths": {method: answers.paths.tolist() for method, answers in results.answers.items()},
        "truth": results.truth.tolist(),
    }


def draw_episode(picture: Picture, results: OpenResults) -> Image.Image:
    """Start, goal, predicted ends of the plan and of the worst candidate, and all paths: from above, or over time."""
    number = results.cases.index(picture.case)
    frames = [frame(x) for x in (picture.start, picture.goal, picture.best, picture.worst)]
    labels = ["start", "goal", "predicted, plan", "predicted, worst", "candidates by cost"]
    if picture.pose is None:
        chart = numbers_over_time(picture.paths, picture.costs, results.truth[number], picture.plan, results.space)
        return beside([*frames, chart], labels)
    order = picture.costs.argsort(descending=True).tolist()  # the lowest on top
    colours = costs_as_colours(picture.costs.numpy())
    start = np.zeros((1, 3))
    world = [
        (np.concatenate((placed_path(start, picture), placed_path(path.numpy(), picture))), colours[i], 0.7, None)
        for i, path in ((i, picture.paths[i]) for i in order)
    ]
    for path, colour, label in ((results.truth[number], TRUTH, "true"), (picture.plan, PLAN, "plan")):
        whole = np.concatenate((placed_path(start, picture), placed_path(path.numpy(), picture)))
        world.append((whole, colour, 2.2, label))
    pose = picture.pose.numpy()
    ends = [(world[-2][0][-1], TRUTH), (world[-1][0][-1], PLAN)]
    map_ = from_above(world, [(pose, OTHER), *ends], map_of(results.about["data"], picture.case.name))
    return beside([*frames, map_], labels)


def placed_path(path: np.ndarray, picture: Picture) -> np.ndarray:
    """A path in the frame at the start, transformed to the world."""
    return placed(torch.as_tensor(path).float(), picture.pose).numpy()


def write_curve(points: Sequence[CurvePoint], out: Path, about: dict[str, Any]) -> str:
    """Writes curve.json, curve.md and curve.png; returns the Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [
        [
            *(str(x) for x in (p.samples, p.iterations, p.repeats, p.steps, p.calls)),
            f"{p.seconds:.2f}",
            *(f"{e:.{places}f}" for e, places in zip(p.errors, PATH_MEASURES.values(), strict=True)),
        ]
        for p in points
    ]
    text = markdown_table(["candidates", "iterations", "repeats", "steps", "calls", "s per plan", *PATH_MEASURES], rows)
    (out / "curve.md").write_text(text)
    write_json(out / "curve.json", {"config": about, "points": [asdict(point) for point in points]})
    shown = Figure(figsize=(9, 3.6), layout="constrained")
    axes = shown.subplots(1, 2)
    for i, measure in ((2, "final distance [m]"), (3, "final turn [°]")):
        for steps in sorted({p.steps for p in points}):
            of_steps = sorted((p for p in points if p.steps == steps), key=lambda p: p.calls)
            means = np.array([p.errors[i].mean for p in of_steps])
            low = [p.errors[i].mean if p.errors[i].low is None else p.errors[i].low for p in of_steps]
            high = [p.errors[i].mean if p.errors[i].high is None else p.errors[i].high for p in of_steps]
            spread = np.abs(np.array([low, high]) - means)
            label = f"{steps} denoising step{'s' * (steps > 1)}"
            axes[i - 2].errorbar([p.calls for p in of_steps], means, spread, marker="o", capsize=3, label=label)
        axes[i - 2].set(xlabel="network evaluations per plan", ylabel=measure)
        axes[i - 2].set_xscale("log", base=2)
        axes[i - 2].xaxis.set_major_formatter("{x:g}")
    axes[0].legend()
    shown.savefig(out / "curve.png", dpi=120)
    return text
