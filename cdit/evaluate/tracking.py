"""Shows an evaluation at Weights & Biases."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from cdit.common.wandb_run import WandbRun
from cdit.evaluate.results import Results


def track(
    results: Results, pictures: Mapping[str, Mapping[str, Path]], project: str, config: dict[str, Any], folder: Path
) -> None:
    """A run with every number as its summary, one table of all, and the pictures."""
    run = WandbRun(folder, project=project, name=folder.name, config=config)
    run.log(lambda: _content(results, pictures))
    run.finish()


def _content(results: Results, pictures: Mapping[str, Mapping[str, Path]]) -> dict[str, Any]:
    media: dict[str, Any] = {}
    rows, numbers = [], {}
    for name, result in results.protocols.items():
        for row in result.rows:
            numbers[f"{name}/{row.metric}/{row.method}/{row.seconds:g}s"] = row.mean
            rows.append([name, row.method, row.seconds, row.metric, row.mean, row.low, row.high])
        for caption, file in pictures[name].items():
            show = wandb.Video(str(file), caption=caption, format="mp4") if file.suffix == ".mp4" else None
            media[f"{name}/{file.stem}{'_video' if show else ''}"] = show or wandb.Image(str(file), caption=caption)
    columns = ["protocol", "method", "seconds ahead", "metric", "mean", "low", "high"]
    media["results"] = wandb.Table(columns=columns, data=rows)
    return numbers | media
