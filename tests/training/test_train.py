"""train.py as a whole, on a tiny dataset."""

import itertools
import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from cdit.common.errors import UserError
from cdit.data.windows import WindowDataset
from cdit.training.config import TrainConfig
from cdit.training.probes import Probes
from cdit.training.setup import build_world
from cdit.training.validation import Validation
from cdit.world_model import WorldModel

TRAIN = Path(__file__).parents[2] / "train.py"
WEIGHTS = "cdit/diffusion_pytorch_model.safetensors"

RANDOM = ("--model.dropout", "0.2", "--model.context_noise", "0.3", "--sampler.context_noise", "0.1")
"""Options with which a step draws further random numbers."""

Rows = Callable[..., list[dict[str, float]]]
Run = Callable[..., Path]


def same_weights(a: Path, b: Path) -> bool:
    a, b = load_file(a), load_file(b)
    assert set(a) == set(b)
    return all(torch.equal(a[name], b[name]) for name in a)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The same seed, the same numbers.


@pytest.mark.slow
def test_a_run_is_repeated_from_its_saved_config(
    offline: tuple[subprocess.CompletedProcess, Path],
    launch: Callable[..., subprocess.CompletedProcess],
    rows: Rows,
    tmp_path: Path,
):
    first = offline[1]
    options = ("--name", "again", "--output", tmp_path, "--tracking", "none")
    done = launch(TRAIN, "--config", first / "config.yaml", *options)
    assert done.returncode == 0, done.stderr
    again = tmp_path / "again"
    assert rows(again) == rows(first)
    assert len(rows(first, "train/loss")) == 6
    assert same_weights(again / "last" / WEIGHTS, first / "last" / WEIGHTS)


def test_probes_change_nothing(train: Run, straight: Path, rows: Rows, tmp_path: Path):
    """A probe after every step, against a run that has none on the way."""
    run = train(tmp_path, "--probe.every", "1", "--stop_at", "4")
    assert len(list((run / "probes").iterdir())) == 4
    for field, steps in {"train/loss": 4, "validation/loss": 2}.items():
        assert rows(run, field) == rows(straight, field)[:steps]
    for file in ("model.safetensors", "average.safetensors"):
        assert same_weights(*(r / "checkpoints/step_00000004" / file for r in (run, straight)))


@pytest.mark.parametrize("options", [["--micro_batch_size", "1"], ["--micro_batch_size", "2", "--data.workers", "2"]])
def test_micro_batches_and_workers_do_not_change_losses(
    train: Run, straight: Path, rows: Rows, tmp_path: Path, options: list[str]
):
    run = train(tmp_path, *options, "--stop_at", "4")
    for field, steps in {"train/loss": 4, "validation/loss": 2}.items():
        for measured, expected in zip(rows(run, field), rows(straight, field)[:steps], strict=True):
            assert measured == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_another_seed_is_another_run(train: Run, straight: Path, rows: Rows, tmp_path: Path):
    run = train(tmp_path, "--seed", "1", "--stop_at", "1")
    assert rows(run, "train/loss")[0]["train/loss"] != rows(straight, "train/loss")[0]["train/loss"]


# Resuming.


@pytest.fixture(scope="session")
def whole(train: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from start to end whose network draws random numbers of its own."""
    return train(tmp_path_factory.mktemp("whole"), *RANDOM)


@pytest.fixture(scope="session")
def half(train: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, stopped half way."""
    return train(tmp_path_factory.mktemp("half"), *RANDOM, "--stop_at", "3")


@pytest.fixture
def stopped(half: Path, tmp_path: Path) -> Path:
    """A copy of the stopped run, to go on from."""
    return shutil.copytree(half, tmp_path / "tiny")


def test_dropout_draws_belong_to_the_step(train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And to the micro-batch: two steps of two each drop other features every time."""
    dropped: list[torch.Tensor] = []

    def recorded(x: torch.Tensor, p: float, training: bool, inplace: bool, dropout=torch.nn.functional.dropout):
        out = dropout(x, p, training, inplace)
        if training and p:
            dropped.append(out == 0)
        return out

    monkeypatch.setattr("torch.nn.functional.dropout", recorded)
    train(tmp_path, "--model.dropout", "0.5", "--stop_at", "2", "--micro_batch_size", "2")
    branches = 2 * 3
    assert len(dropped) == 2 * 2 * branches
    for one, other in itertools.combinations(dropped[::branches], 2):
        assert 0.3 < (one != other).float().mean() < 0.7


@pytest.mark.slow
def test_two_processes_train_without_actions(
    launch: Callable[..., subprocess.CompletedProcess], tiny: Path, dataset: Path, rows: Rows, tmp_path: Path
):
    """The conditioner of actions, which is kept for data that has them, then gets no gradient."""
    data = shutil.copytree(dataset, tmp_path / "data")
    info = json.loads((data / "dataset.json").read_text()) | {"has_actions": False}
    (data / "dataset.json").write_text(json.dumps(info))
    done = launch(TRAIN, "--config", tiny, "--data.folder", data, "--output", tmp_path / "runs", processes=2)
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path / "runs" / "tiny", "train/loss")) == 6


def test_a_stopped_run_goes_on_as_if_it_had_not(train: Run, whole: Path, stopped: Path, rows: Rows):
    assert [row["step"] for row in rows(stopped, "train/loss")] == [1, 2, 3]
    run = train(stopped.parent, *RANDOM, "--resume", "auto")
    assert run == stopped
    assert rows(run) == rows(whole)
    assert [row["train/learning_rate"] for row in rows(run, "train/learning_rate")] == [
        row["train/learning_rate"] for row in rows(whole, "train/learning_rate")
    ]
    assert same_weights(run / "last" / WEIGHTS, whole / "last" / WEIGHTS)
    for file in ("average.safetensors", "model.safetensors"):
        assert same_weights(*(r / "checkpoints/step_00000006" / file for r in (run, whole)))


def test_a_killed_run_goes_on_from_its_newest_checkpoint(train: Run, whole: Path, stopped: Path, rows: Rows):
    """Rows after that checkpoint are written again; a partial checkpoint is ignored."""
    partial = stopped / "checkpoints" / ".step_00000003.partial"
    (stopped / "checkpoints" / "step_00000003").rename(partial)
    (partial / "state.json").unlink()
    run = train(stopped.parent, *RANDOM, "--resume", "auto")
    assert rows(run) == rows(whole)
    assert same_weights(run / "last" / WEIGHTS, whole / "last" / WEIGHTS)


def test_modulation_trained_on_rollouts_goes_on_as_if_it_had_not_been_stopped(
    train: Run, straight: Path, rows: Rows, tmp_path: Path
):
    shutil.copytree(straight / "last", tmp_path / "start")
    start = ("--init_from", str(tmp_path / "start"), "--optimizer.only", "ada_ln", "--optimizer.warmup_steps", "0")
    options = ("--objective", "self_rollout", "--data.rollout", "2", *start, "--steps", "4")
    run = train(tmp_path / "whole", *options)
    train(tmp_path, *options, "--stop_at", "2")
    shutil.rmtree(tmp_path / "start")  # the checkpoint has all that came from it
    again = train(tmp_path, *options, "--resume", "auto")
    assert rows(again) == rows(run)
    units = [WorldModel.from_pretrained(one / "last").description.units for one in (straight, again)]
    assert units[0] == units[1]
    for file in ("average.safetensors", "model.safetensors"):
        assert same_weights(*(r / "checkpoints/step_00000004" / file for r in (again, run)))
    before, after = (load_file(folder / WEIGHTS) for folder in (straight / "last", run / "last"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "ada_ln" in name}
    world = WorldModel.from_pretrained(run / "last")
    assert (world.description.objective, world.description.self_rollout.base) == ("self_rollout", "flow")


def test_other_micro_batches_from_here_on(train: Run, straight: Path, rows: Rows, tmp_path: Path):
    """What a machine with less memory needs."""
    train(tmp_path, "--stop_at", "3", "--micro_batch_size", "4")
    run = train(tmp_path, "--resume", "auto", "--micro_batch_size", "2", "--stop_at", "5")
    for measured, expected in zip(rows(run, "train/loss"), rows(straight, "train/loss")[:5], strict=True):
        assert measured == pytest.approx(expected, rel=1e-4)


def test_a_finished_run_stays_as_it_is(train: Run, whole: Path, tmp_path: Path):
    shutil.copytree(whole, tmp_path / "tiny")
    run = train(tmp_path, *RANDOM, "--resume", "auto")
    before, after = contents(whole), contents(run)
    assert set(after) == set(before)
    assert {name for name in after if after[name] != before[name]} <= {"config.yaml"}


def test_auto_starts_afresh_where_there_is_nothing(train: Run, straight: Path, rows: Rows, tmp_path: Path):
    run = train(tmp_path, "--resume", "auto", "--stop_at", "2")
    assert rows(run, "train/loss") == rows(straight, "train/loss")[:2]


def test_another_run_goes_on_from_a_checkpoint(train: Run, whole: Path, rows: Rows, tmp_path: Path):
    options = (*RANDOM, "--stop_at", "5")
    run = train(tmp_path, *options, "--resume", str(whole / "checkpoints/step_00000004"), name="branch")
    assert rows(run, "train/loss") == rows(whole, "train/loss")[4:5]
    assert (run / "best" / WEIGHTS).is_file()


def test_a_branch_decays_from_a_checkpoint_of_a_run_that_goes_on(train: Run, rows: Rows, tmp_path: Path):
    options = ["--optimizer.schedule", "wsd", "--optimizer.learning_rate", "0.01", "--optimizer.warmup_steps", "0"]
    run = train(tmp_path, *options, "--steps", "100", "--stop_at", "2", "--log_every", "1")
    start = str(run / "checkpoints/step_00000002")
    end = ("--steps", "4", "--optimizer.decay_share", "0.5", "--log_every", "1")
    branch = train(tmp_path, *options, *end, "--resume", start, name="branch")
    rates = {row["step"]: row["train/learning_rate"] for row in rows(branch, "train/learning_rate")}
    assert rates == pytest.approx({3: 0.005, 4: 0.0})  # as of the next step
    assert (branch / "last" / WEIGHTS).is_file()


def test_a_perceptual_loss_is_resumed_exactly(train: Run, rows: Rows, tmp_path: Path):
    perceptual = ("--flow.perceptual.weight", "0.5", "--flow.perceptual.max_time", "0.8", "--mixed_precision", "bf16")
    straight = train(tmp_path / "a", *perceptual, "--stop_at", "4")
    pieces = train(tmp_path / "b", *perceptual, "--stop_at", "2")
    train(tmp_path / "b", *perceptual, "--stop_at", "4", "--resume", "auto")
    assert rows(straight, "train/loss") == rows(pieces, "train/loss")
    plain = train(tmp_path / "c", *perceptual, "--flow.perceptual.weight", "0", "--stop_at", "1")
    assert rows(plain, "train/loss")[0]["train/loss"] < rows(straight, "train/loss")[0]["train/loss"]


def test_a_checkpoint_is_read_as_a_world_model(whole: Path, tmp_path: Path):
    """With its averaged weights: those of the last one are saved as the run's model."""
    last = WorldModel.from_pretrained(whole / "last").cdit.state_dict()
    folders = {step: whole / f"checkpoints/step_{step:08d}" for step in (4, 6)}
    read = {step: WorldModel.from_pretrained(folder).cdit.state_dict() for step, folder in folders.items()}
    assert all(torch.equal(read[6][name], last[name]) for name in last)
    assert not all(torch.equal(read[4][name], last[name]) for name in last)
    damaged = tmp_path / "run/checkpoints/step_00000006"
    shutil.copytree(whole / "last", tmp_path / "run/last")
    damaged.mkdir(parents=True)
    save_file({"other": torch.zeros(1)}, damaged / "average.safetensors")
    with pytest.raises(UserError, match="step_00000006: not a readable checkpoint"):
        WorldModel.from_pretrained(damaged)
    # Sharded ones are put together.
    average = load_file(folders[4] / "average.safetensors")
    for i in range(2):
        part = {name: chunks[i] for name, x in average.items() if len(chunks := x.chunk(2)) > i}
        save_file({n: x.contiguous() for n, x in part.items()}, damaged / f"average-{i + 1:05d}-of-00002.safetensors")
    (damaged / "average.safetensors").unlink()
    sharded = WorldModel.from_pretrained(damaged).cdit.state_dict()
    assert all(torch.equal(sharded[name], read[4][name]) for name in last)


def test_open_losses_are_told_of_after_going_on(train: Run, rows: Rows, tmp_path: Path):
    """Rows of two steps' losses, from checkpoints after every third."""
    options = ["--log_every", "2", "--checkpoint.every", "3"]
    run, cut = train(tmp_path / "a", *options), train(tmp_path / "b", *options, "--stop_at", "3")
    expected = rows(run, "train/loss")
    assert [row["step"] for row in expected] == [2, 4, 6]
    assert [row["step"] for row in rows(cut, "train/loss")] == [2]
    train(tmp_path / "b", *options, "--micro_batch_size", "4", "--resume", "auto")
    assert rows(cut, "train/loss") == expected
    shutil.rmtree(run / "checkpoints/step_00000006")  # as if killed
    train(tmp_path / "a", *options, "--resume", "auto")
    assert rows(run, "train/loss") == expected


def test_the_gradient_norm_does_not_depend_on_micro_batches(train: Run, rows: Rows, tmp_path: Path):
    """AdamW hides a factor of the gradient, all the more where it is clipped."""
    options = ["--optimizer.max_grad_norm", "1e9", "--stop_at", "3"]
    norms = [
        [
            row["train/gradient_norm"]
            for row in rows(train(tmp_path / size, *options, "--micro_batch_size", size))
            if "train/gradient_norm" in row
        ]
        for size in ("4", "2", "1")
    ]
    assert len(norms[0]) == 3
    assert len(set(norms[0])) == 3
    for others in norms[1:]:
        assert others == pytest.approx(norms[0], rel=1e-4)


# The best and the last.


def test_best_is_the_one_of_the_smallest_validation_loss(train: Run, rows: Rows, tmp_path: Path):
    """A learning rate that soon is too large, and a stop after that: neither later nor resumed steps replace it."""
    options = ["--steps", "11", "--optimizer.warmup_steps", "8", "--optimizer.learning_rate", "0.2", "--ema.decay", "0"]
    options += ["--validation.every", "1", "--checkpoint.keep", "20"]
    train(tmp_path, *options, "--stop_at", "8")
    run = train(tmp_path, *options, "--stop_at", "10", "--resume", "auto")
    losses = {row["step"]: row["validation/loss"] for row in rows(run, "validation/loss")}
    best = min(losses, key=losses.get)
    assert sorted(losses) == list(range(1, 11))
    assert 1 < best < 8
    assert losses[9] > losses[best]
    ema = load_file(run / f"checkpoints/step_{best:08d}/average.safetensors")
    saved = load_file(run / "best" / WEIGHTS)
    assert all(torch.equal(saved[name], value) for name, value in ema.items())
    assert json.loads((run / "checkpoints/step_00000010/state.json").read_text())["best_loss"] == losses[best]


def test_what_is_saved_is_the_average(straight: Path):
    ema = load_file(straight / "checkpoints/step_00000006/average.safetensors")
    for name in ("best", "last"):  # the losses of this run only fall
        saved = load_file(straight / name / WEIGHTS)
        assert all(torch.equal(saved[key], value) for key, value in ema.items())
    assert not same_weights(straight / "last" / WEIGHTS, straight / "checkpoints/step_00000006/model.safetensors")
    world = WorldModel.from_pretrained(straight)
    assert world.description.image_size == (32, 32)
    assert world.description.fps == 5
    assert world.description.units.time_scale == pytest.approx(5 / 4)
    assert world.description.units.action_scale == pytest.approx((1 / 4, 1 / 4, 1 / math.pi))
    assert world.description.units.spacing == pytest.approx(0.2)


def test_what_is_measured_is_the_average(
    straight: Path,
    config: Callable[..., TrainConfig],
    train_set: WindowDataset,
    test_set: WindowDataset,
    accelerator: Accelerator,
    environment: dict[str, str],
    rows: Rows,
    monkeypatch: pytest.MonkeyPatch,
):
    """The logged numbers of validation and probes, computed again from the files that the run has left."""
    settings = config()
    world = build_world(settings, train_set).eval()
    validation = Validation(test_set, settings.validation, settings.seed)

    def validated(step: int, kind: str) -> dict[str, float]:
        world.cdit.load_state_dict(load_file(straight / f"checkpoints/step_{step:08d}/{kind}.safetensors"))
        return validation.run(world, world.cdit, accelerator)

    logged = {row["step"]: row for row in rows(straight, "validation/loss")}
    assert set(logged) == {2, 4, 6}
    for step, row in logged.items():
        found = validated(step, "average")
        assert found == pytest.approx({name: row[name] for name in found}, rel=1e-5)
        assert abs(validated(step, "model")["validation/loss"] / row["validation/loss"] - 1) > 1e-3

    monkeypatch.setenv("CDIT_LPIPS_BACKBONE", environment["CDIT_LPIPS_BACKBONE"])
    probes = Probes(test_set, world.cdit, settings, accelerator)

    def probed(world: WorldModel) -> dict[str, float]:
        found: dict[str, float] = {}
        tracker = SimpleNamespace(
            log=lambda numbers, step: found.update(numbers), show=lambda *_: None, print=lambda *_: None
        )
        probes.run(world, tracker, 6, final=True)
        return found

    last = {name: value for row in rows(straight) if row["step"] == 6 for name, value in row.items()}
    found = probed(WorldModel.from_pretrained(straight / "last"))
    assert found == pytest.approx({name: last[name] for name in found}, rel=1e-4)
    validated(6, "model")
    name = "probe/lpips/model/1_frames"
    assert abs(probed(world)[name] / last[name] - 1) > 1e-3


# Mistakes.


def refused(train: Run, capsys: pytest.CaptureFixture[str], output: Path, *options: str) -> str:
    """The message on stderr of a run that ends with code 2: one line, and below it what is wrong with the data."""
    with pytest.raises(SystemExit) as ended:
        train(output, *options)
    assert ended.value.code == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ")
    assert all(line.startswith("  ") for line in message.splitlines()[1:])
    return message


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--steps", "0"], "steps"),
        (["--micro_batch_size", "0"], "micro_batch_size is 0"),
        (["--data.image_size", "[32, 36]"], "patch_size"),
        (["--model.hidden_size", "33"], "hidden_size"),
        (["--data.folder", "nowhere"], "nowhere"),
        (["--data.test_split", "holdout"], "holdout"),
        (["--probe.offsets", "[1, 40]"], "probe.offsets"),
        (["--probe.rollout_frames", "40"], "probe.rollout_frames"),
        (["--probe.attention.layers", "[5]"], "probe.attention.layers"),
        (["--probe.attention.patch", "[0, 9]"], "probe.attention.patch"),
        (["--probe.attention.times", "[1.5]"], "probe.attention.times"),
        (["--resume", "nowhere"], "resume"),
        (["--mixed_precision", "fp16"], "mixed_precision is fp16"),
    ],
)
def test_a_mistake_leaves_no_run_behind(
    train: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[str], named: str
):
    assert named in refused(train, capsys, tmp_path / "runs", *options)
    assert not (tmp_path / "runs").exists()


def test_an_empty_split_is_named(train: Run, capsys: pytest.CaptureFixture[str], dataset: Path, tmp_path: Path):
    shutil.copytree(dataset / "splits", tmp_path / "splits")
    empty = tmp_path / "splits/test/traj_names.txt"
    empty.write_text("")
    assert str(empty) in refused(train, capsys, tmp_path / "runs", "--data.splits", str(tmp_path / "splits"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_failing_preparation_as_a_person_sees_it(
    launch: Callable[..., subprocess.CompletedProcess], tiny: Path, tmp_path: Path
):
    (tmp_path / "prepare.py").write_text("raise SystemExit('the disk is full')")
    data = ("--data.folder", tmp_path / "none", "--data.prepare", str(tmp_path / "prepare.py"))
    done = launch(TRAIN, "--config", tiny, "--output", tmp_path / "runs", *data)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "the disk is full" in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: data.prepare")
    assert not (tmp_path / "runs").exists()


def test_a_run_is_not_overwritten(train: Run, capsys: pytest.CaptureFixture[str], stopped: Path):
    before = contents(stopped)
    message = refused(train, capsys, stopped.parent, *RANDOM)
    assert "--resume auto" in message
    assert contents(stopped) == before


def test_the_newest_sound_checkpoint_is_taken(
    train: Run, capsys: pytest.CaptureFixture[str], whole: Path, stopped: Path, rows: Rows
):
    """One bit of the newest is another; it is named, kept, and the run ends as if nothing had been."""
    weights = stopped / "checkpoints/step_00000003/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    run = train(stopped.parent, *RANDOM, "--resume", "auto")
    printed = capsys.readouterr().err
    assert f"{weights.parent} is damaged: model.safetensors does not have its checksum" in printed
    assert (run / "checkpoints/step_00000003.damaged/model.safetensors").read_bytes() == bytes(content)
    assert rows(run) == rows(whole)
    for file in ("average.safetensors", "model.safetensors", "optimizer.safetensors"):
        assert same_weights(*(r / "checkpoints/step_00000006" / file for r in (run, whole)))


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(
    train: Run, capsys: pytest.CaptureFixture[str], stopped: Path
):
    for step in (1, 2, 3):
        (stopped / f"checkpoints/step_{step:08d}/manifest.json").unlink()
    metrics = (stopped / "metrics.jsonl").read_text()
    with pytest.raises(SystemExit) as ended:
        train(stopped.parent, *RANDOM, "--resume", "auto")
    assert ended.value.code == 2
    assert "error: resume: all checkpoints" in capsys.readouterr().err
    assert len(list(stopped.glob("checkpoints/*.damaged/model.safetensors"))) == 3
    assert (stopped / "metrics.jsonl").read_text() == metrics


def test_a_changed_config_is_continued_where_that_is_asked_for(
    train: Run, capsys: pytest.CaptureFixture[str], stopped: Path, rows: Rows
):
    options = (*RANDOM, "--optimizer.learning_rate", "0.001", "--stop_at", "4", "--resume", "auto")
    assert "optimizer.learning_rate is 0.001, was 0.003" in refused(train, capsys, stopped.parent, *options)
    run = train(stopped.parent, *options, "--allow_changes", "true")
    assert "changed from here on: optimizer.learning_rate is 0.001, was 0.003" in capsys.readouterr().err
    assert rows(run, "train/loss")[-1]["train/learning_rate"] < 0.001


def test_other_data_than_before_is_refused(
    train: Run, capsys: pytest.CaptureFixture[str], stopped: Path, dataset: Path, tmp_path: Path
):
    """The same dataset in another place is not; one in whose list a trajectory has another place is."""
    moved = shutil.copytree(dataset, tmp_path / "moved")
    options = (*RANDOM, "--data.folder", str(moved), "--resume", "auto", "--stop_at")
    train(stopped.parent, *options, "4")
    names = moved / "splits/train/traj_names.txt"
    names.write_text("".join(reversed(names.read_text().splitlines(keepends=True))))
    capsys.readouterr()
    message = refused(train, capsys, stopped.parent, *options, "5")
    assert "step_00000004" in message
    assert "trajectories of data.train_split" in message
    assert not (stopped / "checkpoints/step_00000005").exists()
    train(stopped.parent, *options, "5", "--allow_changes", "true")
    assert "changed from here on: the trajectories of data.train_split" in capsys.readouterr().err
    train(stopped.parent, *options, "6")  # which is what it is from then on


def test_another_networks_checkpoint_is_refused(train: Run, capsys: pytest.CaptureFixture[str], stopped: Path):
    before = contents(stopped)
    options = (*RANDOM, "--model.hidden_size", "48", "--data.max_offset", "5", "--resume", "auto")
    message = refused(train, capsys, stopped.parent, *options)
    assert "step_00000003" in message
    assert "data.max_offset is 5, was 4; model.hidden_size is 48, was 32" in message
    assert contents(stopped) == before


def test_losses_that_are_no_numbers_end_the_run(train: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    rate = ["--optimizer.learning_rate", "1e30", "--optimizer.warmup_steps", "0", "--optimizer.max_bad_steps", "3"]
    with pytest.raises(SystemExit) as ended:
        train(tmp_path, *rate)
    assert ended.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "not finite in 3 steps in a row" in message
    assert "optimizer.learning_rate" in message


def test_weights_that_are_no_numbers_are_not_kept(train: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    options = ["--optimizer.learning_rate", ".inf", "--optimizer.warmup_steps", "0"]
    with pytest.raises(SystemExit) as ended:
        train(tmp_path, *options)
    assert ended.value.code == 2
    assert "not finite at step 1" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "tiny" / "checkpoints").exists()
    assert not (tmp_path / "tiny" / "best").exists()


@pytest.mark.parametrize("place", ["runs", "runs/tiny"])
def test_an_output_that_is_a_file_is_named_before_data_is_recorded(
    train: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path, place: str
):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("")
    prepare = ("--data.folder", str(tmp_path / "none"), "--data.prepare", str(tmp_path / "missing.py"))
    message = refused(train, capsys, tmp_path / "runs", *prepare)
    assert "output" in message
    assert str(tmp_path / place) in message


def test_an_output_that_may_not_be_written_to(
    train: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))  # root may all
    assert f"{tmp_path} is not writable" in refused(train, capsys, tmp_path / "runs")
