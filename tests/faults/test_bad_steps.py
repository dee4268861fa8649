"""Losses that are no numbers: such steps are left out, counted and kept; too many end the run."""

import json
from pathlib import Path

import pytest
import torch
from harness import Table, Trainer, survive
from safetensors.torch import load_file

from cdit.batch import Batch
from cdit.common.cli import parse_config
from cdit.data.sampler import KeyedBatchSampler
from cdit.data.windows import WindowDataset
from cdit.training.config import TrainConfig

BAD = {"BAD_LOSSES": json.dumps({"4": float("nan"), "7": float("inf")})}
EACH_STEP = ("--checkpoint.every", "1", "--checkpoint.keep", "20", "--log_every", "1")


@pytest.fixture(scope="module")
def undisturbed(trainer: Trainer) -> Path:
    """A run with two bad steps, and a checkpoint of every step."""
    return trainer.reference(*EACH_STEP, environment=BAD)


def test_a_bad_step_changes_nothing_and_is_counted(undisturbed: Path):
    """Neither weights nor moments; all other steps change both."""
    for kind in ("model", "optimizer"):
        for step in range(1, 12):
            before, after = (
                load_file(undisturbed / f"checkpoints/step_{s:08d}/{kind}.safetensors") for s in (step, step + 1)
            )
            same = all(torch.equal(before[name], after[name]) for name in before)
            assert same == (step in (4, 7)), (kind, step)
    rows = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    counts = [row["train/bad_steps"] for row in rows if "train/bad_steps" in row]
    assert counts == [0] * 4 + [1] * 3 + [2] * 5


def test_the_batch_of_a_bad_step_is_kept(trainer: Trainer, undisturbed: Path):
    config = parse_config(TrainConfig, "", ["--config", str(trainer.config)])
    dataset = WindowDataset(config.data, "train", config.seed)
    for step, loss in ((4, "nan"), (7, "inf")):
        (keys,) = KeyedBatchSampler(len(dataset), config.batch_size, config.seed, step, step + 1)
        tensors = Batch.collate([dataset[key] for key in keys]).named_tensors()
        kept = load_file(undisturbed / f"bad_steps/step_{step:08d}_process_0.safetensors")
        assert set(kept) == set(tensors)
        assert all(torch.equal(kept[name], value) for name, value in tensors.items())
        printed = json.loads((undisturbed / f"bad_steps/step_{step:08d}_process_0.json").read_text())
        assert (printed["step"], printed["loss"]) == (step, loss)


@pytest.mark.parametrize("entry", [6, pytest.param(9, marks=pytest.mark.faults("all"))])
def test_killed_after_a_bad_step(trainer: Trainer, table: Table, undisturbed: Path, tmp_path: Path, entry: int):
    survive(
        trainer,
        table,
        "NaN and inf loss, and killed",
        tmp_path,
        *EACH_STEP,
        faults=[{"act": "kill", "phase": "step", "entry": entry}],
        environment=BAD,
        code=-9,
        reference=undisturbed,
    )


@pytest.mark.parametrize("value", ["nan", pytest.param("inf", marks=pytest.mark.faults("all"))])
def test_too_many_in_a_row(trainer: Trainer, table: Table, tmp_path: Path, value: str):
    """The run ends, with what it had before; without what made them bad it goes on as if nothing had been."""
    survive(
        trainer,
        table,
        f"{value} loss, too often in a row",
        tmp_path,
        *("--optimizer.max_bad_steps", "3"),
        environment={"BAD_LOSSES": json.dumps({str(step): float(value) for step in (3, 4, 5)})},
        code=2,
        says=str(tmp_path / "run" / "bad_steps"),
        again={},
    )
