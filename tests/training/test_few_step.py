"""Objectives for few steps in training: from a trained flow, resumed, sharded."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cdit.training.config import TrainConfig
from cdit.training.setup import build_world
from cdit.world_model import WorldModel

TRAIN = Path(__file__).parents[2] / "train.py"
OPTIONS = (
    *("--few_step.share", "0.5", "--few_step.teacher_decay", "0.75"),
    *("--sampler.scheduler", "average", "--stop_at", "4"),
)
OBJECTIVES = ("mean_flow", "shortcut")
KINDS = ("model", "average", "objective.teacher", "optimizer")


def tensors(run: Path, step: int, kind: str) -> dict[str, Tensor]:
    """Of a checkpoint, put together from the parts of the processes."""
    folder = run / f"checkpoints/step_{step:08d}"
    parts = [load_file(path) for path in sorted([*folder.glob(f"{kind}.safe*"), *folder.glob(f"{kind}-*.safe*")])]
    return {
        name: torch.cat([part[name] for part in parts]) if first.ndim else first for name, first in parts[0].items()
    }


def assert_same(found: Path, expected: Path, tolerance: float = 0.0, kinds: tuple[str, ...] = KINDS) -> None:
    for kind in kinds:
        ours, theirs = tensors(found, 4, kind), tensors(expected, 4, kind)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=tolerance, msg=f"{kind} {name}")


def stopped(run: Path, output: Path, step: int) -> Path:
    """A copy of the run as if it had been stopped after that step."""
    copy = Path(shutil.copytree(run, output / run.name))
    for later in copy.glob("checkpoints/step_*"):
        if int(later.name.removeprefix("step_")) > step:
            shutil.rmtree(later)
    return copy


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_resumes_to_the_last_bit(
    train: Callable[..., Path], rows: Callable[..., list[dict[str, float]]], tmp_path: Path, objective: str
):
    options = ("--objective", objective, *OPTIONS)
    run = train(tmp_path / "whole", *options)
    copy = stopped(run, tmp_path, 2)
    train(tmp_path, *options, "--resume", "auto")
    assert_same(copy, run)
    assert rows(copy, "train/loss") == rows(run, "train/loss")
    assert rows(copy, "validation/loss") == rows(run, "validation/loss")
    before, weights, teacher = (
        tensors(run, step, kind) for step, kind in ((3, "objective.teacher"), (4, "model"), (4, "objective.teacher"))
    )
    for name, tensor in teacher.items():
        torch.testing.assert_close(tensor, 0.75 * before[name] + 0.25 * weights[name])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_it_starts_from_a_trained_flow(
    config: Callable[..., TrainConfig], train: Callable[..., Path], straight: Path, train_set, tmp_path: Path, objective
):
    options = ("--objective", objective, "--init_from", str(straight), *OPTIONS, "--sampler.steps", "1")
    start = build_world(config(*options), train_set).eval()
    flow = WorldModel.from_pretrained(straight)
    for world in (start, start.objective.networks["teacher"]):
        weights = getattr(world, "cdit", world).state_dict()
        assert all(torch.equal(weights[name], weight) for name, weight in flow.cdit.state_dict().items())
        assert not weights["conditioners.interval.embedding.mlp.fc2.weight"].any()
    run = train(tmp_path, *options)
    world = WorldModel.from_pretrained(run / "last")
    assert (
        json.loads((run / "last/world_model.json").read_text())["sampler"] | {"scheduler": "average", "steps": 1}
        == (json.loads((run / "last/world_model.json").read_text())["sampler"])
    )
    assert world.description.units == flow.description.units
    assert world.cdit.conditioners["interval"].embedding.mlp.fc2.weight.any()


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("derivative", ["forward", "difference"])
def test_derivatives_in_training(
    train: Callable[..., Path], rows: Callable[..., list[dict[str, float]]], tmp_path: Path, derivative, precision
):
    options = ("--objective", "mean_flow", "--few_step.derivative", derivative, "--mixed_precision", precision)
    run = train(tmp_path, *OPTIONS, *options, "--few_step.teacher_decay", "0")
    assert all(row["train/loss"] > 0 for row in rows(run, "train/loss"))


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_it_is_sharded(
    launch: Callable[..., subprocess.CompletedProcess],
    train: Callable[..., Path],
    tiny: Path,
    tmp_path: Path,
    objective: str,
):
    options = ("--objective", objective, *OPTIONS)

    def shared(output: Path, *further: str) -> Path:
        variables = {"ACCELERATE_USE_FSDP": "true"}
        done = launch(TRAIN, "--config", tiny, "--output", output, *options, *further, processes=2, **variables)
        assert done.returncode == 0, done.stderr
        return output / "tiny"

    run = shared(tmp_path / "whole")
    copy = stopped(run, tmp_path, 2)
    shared(tmp_path, "--resume", "auto")
    assert_same(copy, run)
    assert_same(run, train(tmp_path / "alone", *options), tolerance=3e-3, kinds=KINDS[:3])


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_processes_train_as_one(
    launch: Callable[..., subprocess.CompletedProcess],
    train: Callable[..., Path],
    tiny: Path,
    tmp_path: Path,
    objective: str,
):
    options = ("--objective", objective, *OPTIONS)
    alone = train(tmp_path / "alone", *options)
    done = launch(TRAIN, "--config", tiny, "--output", tmp_path / "two", *options, processes=2)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "two/tiny", alone, tolerance=3e-3, kinds=KINDS[:3])


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_compiled_network_trains_as_one_that_is_not(train: Callable[..., Path], tmp_path: Path, objective: str):
    options = ("--objective", objective, *OPTIONS)
    runs = [train(tmp_path / name, *options, "--compile", name) for name in ("true", "false")]
    assert_same(*runs, tolerance=3e-3, kinds=KINDS[:3])
