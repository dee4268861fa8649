"""Tables and the page of the closed loop."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cdit.common.files import write_json
from cdit.common.statistics import estimates
from cdit.common.tables import html_table, markdown_table
from cdit.evaluate.page import figure, html_page
from cdit.plan.act import Outcome
from cdit.plan.config import ActConfig
from cdit.plan.episodes import Episode

NAMES = {
    "random": "random motions",
    "straight": "straight ahead",
    "policy": "inverse dynamics",
    "ranked": "inverse dynamics, ranked by the world",
    "guided": "planned with the world, guided by inverse dynamics",
    "world": "planned with the world",
    "engine": "planned with the engine, same cost",
    "world_distance": "planned by the true distance, commanded motion *",
    "engine_distance": "planned by the true distance, with the engine *",
    "graph": "planned with the world, along the graph",
    "expert": "shortest path on the map *",
}
COLUMNS = ("success", "passed", "spl", "soft_spl", "distance", "contacts_per_metre", "seconds")


def write_act(config: ActConfig, episodes: Sequence[Episode], outcomes: Sequence[Outcome]) -> str:
    """Writes results.json, results.md and index.html; returns the Markdown."""
    out, parts = Path(config.out), [f"<h1>Acting with {config.checkpoint}</h1>"]
    text = [describe(config, outcomes)]
    parts.append(f'<p class="note">{text[0]}</p>')
    strata = dict.fromkeys((episodes[o.episode].map, o.stratum, o.visible) for o in outcomes)
    for map_name, distance, visible in sorted(strata, key=lambda s: (s[0], s[1], not s[2])):
        chosen = [
            o for o in outcomes if (episodes[o.episode].map, o.stratum, o.visible) == (map_name, distance, visible)
        ]
        title = f"{map_name}, {distance:g} m, goal {'in view' if visible else 'out of sight'}"
        table = table_of(chosen)
        text += [f"## {title}", markdown_table(*table)]
        parts += [f"<h2>{title}</h2>", html_table(*table)]
        for outcome in chosen:
            video = out / "videos" / f"{outcome.agent}_{outcome.episode}.mp4"
            if video.is_file():
                end = "success" if outcome.success else "stopped elsewhere" if outcome.stopped else "out of steps"
                parts.append(figure(video, f"{NAMES[outcome.agent]}, episode {outcome.episode}: {end}", out))
    whole = "\n\n".join(part.rstrip() for part in text) + "\n"
    (out / "results.md").write_text(whole)
    page = html_page(f"Acting with {config.checkpoint}", parts)
    (out / "index.html").write_text(page.replace("video { width: 34rem }", "video { width: 66rem }"))
    write_json(out / "results.json", {"config": asdict(config), "outcomes": [asdict(o) for o in outcomes]})
    return whole


def describe(config: ActConfig, outcomes: Sequence[Outcome]) -> str:
    """A paragraph on the setting."""
    planner, optimizer = config.planner, config.planner.optimizer
    text = (
        f"{len({o.episode for o in outcomes})} episodes; success means stopping within {config.radius:g} m and "
        f"{config.degrees:g}°. Plans: {planner.motions} candidates, {optimizer.name}, {optimizer.samples} × "
        f"{optimizer.iterations}, cost {planner.cost}; {config.execute} of {config.horizon} steps are executed. ± "
        "is half the width of the 95 % interval over episodes. Agents with * know their true pose and stop by it."
    )
    if config.avoid:
        inside = {name: sum(o.violations > 0 for o in outcomes if o.agent == name) for name in config.agents}
        listed = ", ".join(f"{NAMES[name]} {count}" for name, count in inside.items())
        text += f" No plan may cross {config.avoid}; episodes that entered it: {listed}."
    return text


def table_of(outcomes: Sequence[Outcome]) -> tuple[list[str], list[list[Any]]]:
    """A row for each agent, of one stratum."""
    rows = []
    for agent in dict.fromkeys(o.agent for o in outcomes):
        mine = [o for o in outcomes if o.agent == agent]
        numbers = np.array([
            [o.success, o.passed, o.spl, o.soft_spl, o.distance, o.contacts / max(o.walked, 0.1), o.seconds]
            for o in mine
        ], float)  # fmt: skip
        found = estimates(numbers, [str(o.episode) for o in mine])
        digits = {"success": ".0%", "passed": ".0%", "distance": ".1f"}
        cells = [format(e, digits.get(name, ".2f")) for name, e in zip(COLUMNS, found, strict=True)]
        rows.append([NAMES[agent], len(mine), *cells])
    return ["agent", "n", "SR", "passed", "SPL", "SoftSPL", "remaining [m]", "contacts / m", "s per plan"], rows
