"""Trains and evaluates the variants of a config, each with several seeds, all measured on the same cases.

Runs `train.py` and `cdit.evaluate` in separate processes, one after the other, and skips what is done already, so
that an interrupted ablation continues.
"""

import pickle
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import cdit
from cdit.common.cli import parse_config
from cdit.common.errors import UserError
from cdit.common.files import read_json, write_json
from cdit.common.statistics import Estimate, estimate_of_runs, estimates, paired_difference
from cdit.common.tables import markdown_table
from cdit.data.config import DataConfig
from cdit.data.layout import missing
from cdit.data.windows import WindowDataset
from cdit.evaluate.config import EvaluateConfig
from cdit.evaluate.protocols import direct, rollout
from cdit.evaluate.results import FRECHET, RESULTS, Results
from cdit.evaluate.tables import Row, digits, markdown
from cdit.loading import spread
from cdit.studies.config import AblationConfig
from cdit.studies.history import History
from cdit.world_model import DESCRIPTION

TRAIN = Path(cdit.__path__[0]).parent / "train.py"
EVALUATION = "evaluation"
WHERE = ("splits", "follow_links", "source", "camera", "action_key")
"""Options of a dataset that training and evaluation share."""


OWN = {"checkpoint", "data", "split", "out", "metrics"} | {
    f"{protocol}.{field}" for protocol in ("time", "rollout") for field in ("seconds", "index")
}
"""Options of cdit.evaluate that an ablation sets, so that its results can be compared."""


@dataclass(frozen=True)
class Run:
    """One training of one variant."""

    variant: str
    seed: int
    folder: Path
    options: list[str]


@dataclass(frozen=True)
class Comparison:
    """How a variant differs from the reference."""

    variant: str
    metric: str
    seconds: float
    difference: Estimate
    """Mean over seeds and samples, with its interval over trajectories."""
    seeds: list[float]
    """The same for each seed alone."""

    def text(self, digits: int) -> str:
        """Such as `-0.42 [-0.55, -0.29] (-0.40, -0.44)`: mean, interval, seeds if there are several."""
        change = self.difference
        interval = "" if change.low is None else f" [{change.low:+.{digits}f}, {change.high:+.{digits}f}]"
        seeds = f" ({', '.join(f'{value:+.{digits}f}' for value in self.seeds)})" if len(self.seeds) > 1 else ""
        return f"{change.mean:+.{digits}f}{interval}{seeds}"


def ablate(config: AblationConfig) -> None:
    """Trains and evaluates what is missing, and writes results.md and results.json.

    Raises:
        UserError: the spec is invalid (nothing was trained), or a training or evaluation failed.
    """
    if config.reference not in config.variants:
        raise UserError(f"reference is {config.reference!r}, expected one of {', '.join(config.variants)}")
    runs = [run for name in config.variants for run in runs_of(config, name)]
    if len({run.folder for run in runs}) < len(runs):
        raise UserError("variants and seeds: two runs would share a folder, which is named by letters, digits and seed")
    if len({results_folder(runs[0], name) for name in config.evaluations}) < len(config.evaluations):
        raise UserError("evaluations: two would share a folder, which is named by letters and digits")
    for options in (config.evaluate, *config.evaluations.values()):
        nested = {f"{name}.{own}" for name, value in options.items() if isinstance(value, dict) for own in value}
        if taken := OWN & (options.keys() | nested):
            raise UserError(f"evaluate, evaluations: {min(taken)} is the same for all; set the ablation's own field")
    resolved = {run.variant: resolve(run) for run in runs if run.seed == config.seeds[0]}
    check_comparable(config, resolved)
    data = resolved[config.reference]["data"]
    is_missing = missing(data["folder"], data["source"])  # the first training prepares it
    cases, fps = (None, None) if is_missing else choose_cases(config, resolved)
    for run in runs:
        check_folder(run, resolved[run.variant])
        for evaluation in config.evaluations:
            options = evaluation_options(run, config, resolved[run.variant]["data"], evaluation)
            check_evaluation(parse_config(EvaluateConfig, "options of cdit.evaluate", options), fps)
    slices = 1 if config.train_seconds is None else config.slices
    for turn in range(slices):
        for number in range(len(runs)):
            run = runs[(turn + number) % len(runs)]  # another one first in each turn
            place = f"run {number + 1} of {len(runs)}" + (f", slice {turn + 1} of {slices}" if slices > 1 else "")
            print(f"\n{config.name}, {place}: {run.variant}, seed {run.seed}", file=sys.stderr)
            train(run, config, (turn + 1) / slices)
    if is_missing:
        cases, _ = choose_cases(config, resolved)
    config.index.write_bytes(pickle.dumps(cases))
    for run in runs:
        for evaluation in config.evaluations:
            evaluate(run, config, resolved[run.variant]["data"], evaluation)
    print(report(config, runs))
    print(f"{config.folder} holds results.md, results.json and all runs")


def check_evaluation(config: EvaluateConfig, fps: float | None) -> None:
    """Checks that an evaluation's results can be compared sample by sample.

    Args:
        fps: of the dataset, if it is known.

    Raises:
        UserError: it has several protocols, a metric of sets of samples, or horizons between two frames.
    """
    config.validate()
    if len(config.protocols) != 1 or (config.protocols == ["rollout"] and len(config.rollout.fps) != 1):
        raise UserError(
            f"evaluations: protocols is {config.protocols} and rollout.fps {config.rollout.fps}, expected one protocol "
            "each, at one rollout.fps"
        )
    if sets := set(config.metrics) & set(FRECHET):
        raise UserError(f"metrics: {', '.join(sorted(sets))} cannot be compared sample by sample; leave it out")
    if fps and config.protocols == ["rollout"]:
        rollout(config.rollout.seconds, config.rollout.fps[0], fps)


def named(text: str) -> str:
    """A name of a variant or an evaluation as part of a folder's name."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower())


def runs_of(config: AblationConfig, variant: str) -> list[Run]:
    """The trainings of a variant, one for each seed."""
    runs = []
    for seed in config.seeds:
        name = f"{named(variant)}_seed{seed}"
        own = {"seed": seed, "name": name, "output": config.folder}
        if config.train_seconds is not None:
            own["train_seconds"] = config.train_seconds
        # One after the other, not merged: of two options for the same field, nested or dotted, the last one counts.
        options = [*_options(config.train), *_options(config.variants[variant]), *_options(own)]
        runs.append(Run(variant, seed, config.folder / name, ["--config", config.base, *options]))
    return runs


def resolve(run: Run) -> dict[str, Any]:
    """The whole training config of a run, as train.py resolves it.

    Raises:
        UserError: train.py rejects it.
    """
    command = [sys.executable, str(TRAIN), *run.options, "--print_config"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"variant {run.variant!r}: train.py rejects it\n{done.stderr.strip()}")
    return yaml.safe_load(done.stdout)


def check_comparable(config: AblationConfig, resolved: dict[str, dict[str, Any]]) -> None:
    """Checks that all variants can be measured on the same cases.

    Raises:
        UserError: they use different datasets, or a mix.
    """
    datasets = [values["data"] for values in resolved.values()]
    if any(data["mix"] for data in datasets):
        raise UserError(f"base is {config.base}: variants are measured on one dataset, data.folder, not on a data.mix")
    if datasets[0]["folder"] is None:
        raise UserError(f"base is {config.base}: expected a data.folder")
    if any(data[key] != datasets[0][key] for data in datasets for key in ("folder", "test_split", "fps", *WHERE)):
        raise UserError("variants of different datasets cannot be compared")


def check_folder(run: Run, resolved: dict[str, Any]) -> None:
    """Checks that a run that the folder holds, if there is one, was trained with this config.

    Raises:
        UserError: it was not; the message names the fields that differ.
    """
    path = run.folder / "config.yaml"
    if not path.is_file():
        return
    asked = resolved | {"seed": run.seed, "name": run.folder.name}
    changed = _differences(yaml.safe_load(path.read_text()), asked)
    changed = [name for name in changed if name not in ("resume", "stop_at_seconds")]
    if changed:
        raise UserError(
            f"{run.folder} holds a run of another config (other {', '.join(changed)}): change name, or delete it"
        )


def train(run: Run, config: AblationConfig, share: float = 1.0) -> None:
    """Trains, or continues an interrupted training, unless it is finished.

    Args:
        share: of the `train_seconds` after which this slice ends.

    Raises:
        UserError: the training failed.
    """
    command = [*_launcher(config), str(TRAIN), *run.options, "--resume", "auto"]
    has_world = (run.folder / "last" / DESCRIPTION).is_file()
    if config.train_seconds is None:
        done = has_world
    else:
        until = share * config.train_seconds
        done = has_world and _trained(run)["seconds"] >= until
        command += [] if share == 1 else ["--stop_at_seconds", str(until)]
    if not done:
        _call(command, run)


def _trained(run: Run) -> dict[str, Any]:
    """The state of the run's newest checkpoint, with its steps and seconds."""
    checkpoints = run.folder / "checkpoints"
    return read_json(checkpoints / (checkpoints / "latest").read_text().strip() / "state.json")


def choose_cases(config: AblationConfig, resolved: dict[str, dict[str, Any]]) -> tuple[list[tuple], float]:
    """The cases on which all runs are measured, as in an index file of NWM, and the frames per second.

    Each has as many past frames as the variant with the longest context.

    Raises:
        UserError: no trajectory is long enough, or a horizon lies between two frames.
    """
    datasets = [values["data"] for values in resolved.values()]
    folder, split = datasets[0]["folder"], datasets[0]["test_split"]
    longest = max(data["context_frames"] for data in datasets)
    where = {key: datasets[0][key] for key in (*WHERE, "fps")}
    dataset = WindowDataset(DataConfig(folder, context_frames=longest, cache_gb=0, **where), split)
    offsets = direct(config.seconds, dataset.info.fps).offsets
    windows = spread(dataset.windows_with(offsets), config.cases)
    if not windows:
        raise UserError(f"seconds is {config.seconds}: no trajectory of split {split!r} of {folder} is long enough")
    cases = []
    for window in windows:
        trajectory, now = dataset.locate(window)
        cases.append((dataset.trajectories[trajectory].name, now, min(offsets), max(offsets)))
    return cases, dataset.info.fps


def results_folder(run: Run, evaluation: str) -> Path:
    """Where the results of one of a run's evaluations are."""
    return run.folder / (f"{EVALUATION}_{named(evaluation)}" if evaluation else EVALUATION)


def evaluation_options(run: Run, config: AblationConfig, data: dict[str, Any], evaluation: str) -> list[str]:
    """Options of cdit.evaluate for a run whose training config has this data section."""
    options = {
        "checkpoint": run.folder,
        "data": data["folder"],
        "split": data["test_split"],
        **{key: data[key] for key in WHERE},
        "out": results_folder(run, evaluation),
        "protocols": ["time"],
        "time.index": config.index,
        "time.seconds": config.seconds,
        "rollout.index": config.index,
        "rollout.seconds": config.seconds,
        "metrics": config.metrics,
        "tracking": "none",
    }
    return [*_options(options), *_options(config.evaluate), *_options(config.evaluations[evaluation])]


def evaluate(run: Run, config: AblationConfig, data: dict[str, Any], evaluation: str) -> None:
    """Measures a trained run on the cases in one way; finished batches are not computed again.

    Raises:
        UserError: the evaluation failed.
    """
    _call([*_launcher(config), "-m", "cdit.evaluate", *evaluation_options(run, config, data, evaluation)], run)


def report(config: AblationConfig, runs: list[Run]) -> str:
    """Writes `results.md` and `results.json` into the ablation's folder, and returns the former.

    The first table summarises each variant, in each of its evaluations, with intervals over its seeds: how much a
    number might change with another training. In the others a variant's numbers are means over its seeds, sample by
    sample, and intervals are over the trajectories of the test split: how much a mean might change with other
    trajectories. Differences of the seeds are listed one by one.
    """
    found = {
        (variant, evaluation): [
            next(iter(Results.load(results_folder(run, evaluation)).protocols.values()))
            for run in runs
            if run.variant == variant
        ]
        for variant in config.variants
        for evaluation in config.evaluations
    }
    first = next(iter(found.values()))[0]
    trajectories = first.trajectories
    measured = {row.metric for row in first.rows}  # LPIPS may not be available
    metrics = [metric for metric in config.metrics if metric in measured]
    rows, compared, summary = [], [], {}
    for (variant, evaluation), results in found.items():
        name, reference = f"{variant}, {evaluation}" if evaluation else variant, found[config.reference, evaluation]
        trainings = [History(run.folder) for run in runs if run.variant == variant]
        of_seeds = {
            metric: [np.mean([one.values("model", metric, seconds) for seconds in config.seconds]) for one in results]
            for metric in metrics
        }
        of_seeds["validation loss"] = [training.last("validation/loss") for training in trainings]
        of_seeds["steps/s"] = [training.steps_per_second for training in trainings]
        summary[name] = {column: estimate_of_runs(values) for column, values in of_seeds.items()}
        for metric in metrics:
            for seconds in config.seconds:
                ours, theirs = (
                    np.stack([result.values("model", metric, seconds) for result in some])
                    for some in (results, reference)
                )
                mean = estimates(ours.mean(0), trajectories)[0]
                frames = round(seconds * results[0].fps)
                rows.append(Row(name, seconds, frames, metric, mean.mean, None, mean.low, mean.high))
                if variant != config.reference:
                    change = paired_difference(ours.mean(0), theirs.mean(0), trajectories)[0]
                    seeds = [float(difference) for difference in (ours - theirs).mean(1)]
                    compared.append(Comparison(name, metric, seconds, change, seeds))
    trained = ""
    if config.train_seconds is not None:
        steps = {name: [_trained(run)["step"] for run in runs if run.variant == name] for name in config.variants}
        reached = "; ".join(f"{name} {', '.join(map(str, found))}" for name, found in steps.items())
        trained = f"Each run trained for {config.train_seconds:g} s. Steps by seed: {reached}.\n\n"
    text = (
        f"# {config.name}\n\n{trained}{summary_table(summary, len(config.seeds))}\n"
        f"{len(trajectories)} samples of {len(set(trajectories))} test trajectories; "
        f"seeds {', '.join(map(str, config.seeds))}; ± is half the 95 % interval over trajectories.\n\n"
        f"{markdown(rows)}\n{differences_table(compared, config.reference)}"
    )
    (config.folder / "results.md").write_text(text)
    written = {
        "config": asdict(config),
        "summary": {name: {column: asdict(one) for column, one in of.items()} for name, of in summary.items()},
        "means": [{key: value for key, value in row._asdict().items() if key != "values"} for row in rows],
        "differences": [asdict(comparison) for comparison in compared],
    }
    write_json(config.folder / RESULTS, written)
    return text


def summary_table(summary: dict[str, dict[str, Estimate]], seeds: int) -> str:
    """A Markdown table of variants down and numbers across, each a mean over the horizons."""
    columns = list(next(iter(summary.values())))
    places = {"psnr": 2, "validation loss": 5, "steps/s": 2}
    lines = []
    for name, estimates_of in summary.items():
        lines.append([name, *(f"{estimates_of[column]:.{places.get(column, 3)}f}" for column in columns)])
    spread = f"; ± is half of Student's 95 % interval over {seeds} seeds" if seeds > 1 else ""
    shown = [column.upper() if column not in places or column == "psnr" else column for column in columns]
    return f"Means over the horizons{spread}.\n\n{markdown_table(['variant', *shown], lines)}"


def differences_table(compared: list[Comparison], reference: str) -> str:
    """For each metric a Markdown table: the variants' differences from the reference, overall and per seed."""
    tables = []
    for metric in dict.fromkeys(comparison.metric for comparison in compared):
        chosen = [comparison for comparison in compared if comparison.metric == metric]
        horizons = list(dict.fromkeys(comparison.seconds for comparison in chosen))
        columns = [f"{metric.upper()} minus that of {reference}", *(f"{seconds:g} s" for seconds in horizons)]
        rows = [
            [variant, *(c.text(digits(metric)) for c in chosen if c.variant == variant)]
            for variant in dict.fromkeys(comparison.variant for comparison in chosen)
        ]
        tables.append(markdown_table(columns, rows))
    return "\n".join(tables)


def _differences(saved: dict[str, Any], asked: dict[str, Any], prefix: str = "") -> list[str]:
    """Names of the saved fields that have other values in `asked`."""
    found = []
    for name, value in saved.items():
        if isinstance(value, dict):
            found += _differences(value, asked.get(name) or {}, f"{prefix}{name}.")
        elif value != asked.get(name):
            found.append(prefix + name)
    return found


def _options(values: dict[str, Any]) -> list[str]:
    """Fields and values as options of a command line."""
    return [part for name, value in values.items() for part in (f"--{name}", _written(value))]


def _written(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, (str, Path)):
        return str(value)
    return yaml.safe_dump(value, default_flow_style=True, width=float("inf")).split("\n")[0]


def _launcher(config: AblationConfig) -> list[str]:
    if config.launch is None:
        return [sys.executable, "-m", "accelerate.commands.launch"]
    return shlex.split(config.launch)


def _call(command: list[str], run: Run) -> None:
    try:
        done = subprocess.run(command)
    except OSError as error:
        raise UserError(f"launch: {command[0]} cannot be started ({error.strerror})") from error
    if done.returncode:
        raise UserError(
            f"variant {run.variant!r}, seed {run.seed}: exit code {done.returncode} of {shlex.join(command)}"
        )
