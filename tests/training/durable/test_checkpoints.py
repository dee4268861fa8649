import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from cdit.common.errors import UserError
from cdit.training.config import CheckpointConfig, EMAConfig, TrainConfig
from cdit.training.durable import manifest
from cdit.training.durable.checkpoints import Checkpoints, RunState, check_config, checkpoints, find_resume
from cdit.training.ema import EMA

FILES = [
    "average.safetensors",
    "config.yaml",
    "model.safetensors",
    "optimizer.safetensors",
    "process_00000.json",
    "state.json",
]


class Training:
    """A network that learns a little, with all that a checkpoint holds."""

    def __init__(self, accelerator: Accelerator, run: Path, seed: int = 0, width: int = 3, **options: object):
        torch.manual_seed(seed)
        network = nn.Linear(2, width)
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=True)
        self.network, self.optimizer = accelerator.prepare(network, optimizer)
        self.ema = EMA(network, EMAConfig(decay=0.5))
        self.state = RunState()
        config = TrainConfig(name=run.name, output=str(run.parent), checkpoint=CheckpointConfig(**options))
        self.checkpoints = Checkpoints(accelerator, config, {"model": network}, self.optimizer, self.ema)

    def step(self) -> None:
        self.network(torch.full((1, 2), 1.0 + self.state.step)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step()
        self.state.step += 1

    def save(self) -> None:
        self.checkpoints.save(self.state)
        self.checkpoints.wait()

    def weights(self) -> list[torch.Tensor]:
        now = [p.detach().clone() for p in self.network.parameters()]
        with self.ema.applied():
            return now + [p.detach().clone() for p in self.network.parameters()]


Make = Callable[..., Training]


@pytest.fixture
def make(accelerator: Accelerator, tmp_path: Path) -> Iterator[Make]:
    """Trainings whose run is the folder `run`, or another."""
    made = []

    def make(run: str = "run", **options: object) -> Training:
        made.append(Training(accelerator, tmp_path / run, **options))
        return made[-1]

    yield make
    for training in made:
        training.checkpoints.__exit__(None)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def names(run: Path) -> list[str]:
    return [path.name for path in checkpoints(run)]


def entries(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


def find(resume: str, run: Path) -> Path | None:
    config = TrainConfig(name=run.name, output=str(run.parent), resume=resume)
    return find_resume(config)


# Writing.


def test_what_a_checkpoint_holds(make: Make, run: Path):
    """Weights, average and moments under the parameters' names, as torch's AdamW has them; no pickle."""
    training = make()
    training.step()
    training.save()
    folder = run / "checkpoints/step_00000001"
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, "manifest.json"])
    weight, bias = training.network.weight, training.network.bias
    model, average = load_file(folder / "model.safetensors"), load_file(folder / "average.safetensors")
    assert torch.equal(model["weight"], weight)
    assert torch.equal(model["bias"], bias)
    with training.ema.applied():
        assert torch.equal(average["weight"], training.network.weight)
    state = training.optimizer.state[weight]
    moments = load_file(folder / "optimizer.safetensors")
    assert set(moments) == {f"{name}.{key}" for name in ("weight", "bias") for key in ("exp_avg", "exp_avg_sq", "step")}
    assert torch.equal(moments["weight.exp_avg"], state["exp_avg"])
    assert torch.equal(moments["weight.exp_avg_sq"], state["exp_avg_sq"])
    assert moments["weight.step"] == 1


def test_only_the_newest_are_kept(make: Make, run: Path):
    training = make(keep=2)
    for _ in range(4):
        training.step()
        training.save()
        assert (run / "checkpoints/latest").read_text().split() == names(run)[-1:]
    assert names(run) == ["step_00000003", "step_00000004"]
    assert entries(run) == {*names(run), "latest"}
    training.save()  # the same step once more
    assert entries(run) == {"step_00000003", "step_00000004", "latest"}


def test_every_so_many_are_kept_for_ever(make: Make, run: Path):
    training = make(keep=1, keep_every=3)
    for _ in range(8):
        training.step()
        training.save()
    assert names(run) == ["step_00000003", "step_00000006", "step_00000008"]


def test_the_moment_of_saving_is_what_is_saved(make: Make, run: Path, monkeypatch: pytest.MonkeyPatch):
    """The thread writes when the training is steps ahead, and in memory that the copies before had."""
    go, slow = threading.Event(), manifest.entry
    monkeypatch.setattr(manifest, "entry", lambda path: go.wait(20) and slow(path))
    training, expected = make(keep=9), {}
    for _ in range(3):
        training.step()
        expected[training.state.step] = training.network.weight.detach().clone()
        training.checkpoints.save(training.state)
        assert names(run) == [f"step_{step:08d}" for step in list(expected)[:-1]]
        training.step()
        go.set()
        training.checkpoints.wait()
        go.clear()
    for step, weight in expected.items():
        folder = run / f"checkpoints/step_{step:08d}"
        assert torch.equal(load_file(folder / "model.safetensors")["weight"], weight)
        assert json.loads((folder / "state.json").read_text())["step"] == step


def test_in_the_foreground_it_is_there_at_once(make: Make, run: Path):
    training = make(background=False)
    training.step()
    training.checkpoints.save(training.state)
    assert manifest.problem(run / "checkpoints/step_00000001") is None


def test_a_checkpoint_that_cannot_be_written_is_one_clear_line(make: Make, run: Path, monkeypatch: pytest.MonkeyPatch):
    training = make()
    training.step()
    training.save()
    training.step()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write_manifest", full)
        training.checkpoints.save(training.state)
        with pytest.raises(UserError, match=r"step_00000002.*No space left on device"):
            training.checkpoints.wait()
    assert entries(run) == {"step_00000001", "latest"}
    training.save()
    assert names(run) == ["step_00000001", "step_00000002"]


@pytest.mark.parametrize("at", ["manifest.entry", "manifest.write_manifest", "checkpoints.Checkpoints._publish"])
def test_an_interrupted_checkpoint_is_no_checkpoint(make: Make, run: Path, monkeypatch: pytest.MonkeyPatch, at: str):
    training = make(keep=1)
    training.step()
    training.save()
    training.step()
    with monkeypatch.context() as patch:
        patch.setattr(f"cdit.training.durable.{at}", lambda *_: (_ for _ in ()).throw(SystemExit))  # as if killed
        training.checkpoints.save(training.state)
        with pytest.raises(SystemExit):
            training.checkpoints.wait()
    assert entries(run) == {"step_00000001", "latest", ".step_00000002.partial"}
    assert find("auto", run).name == "step_00000001"
    training.save()
    assert entries(run) == {"step_00000002", "latest"}


# Reading.


def test_a_training_goes_on_from_what_was_saved(make: Make, run: Path):
    training = make()
    for _ in range(3):
        training.step()
    state = training.state
    state.best_loss, state.tracker_id, state.schedule, state.rows = 0.25, "abc", {"last_epoch": 3}, 7
    training.save()
    torch.rand(1)
    other = make(seed=1)
    other.state = other.checkpoints.load(checkpoints(run)[-1])
    assert other.state == training.state
    for _ in range(2):
        training.step()
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(training.weights(), other.weights(), strict=True))


def test_the_state_is_strict_json_before_the_first_validation(make: Make, run: Path):
    training = make()
    training.step()
    training.save()
    text = (checkpoints(run)[-1] / "state.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["best_loss"] is None


def test_random_generators_go_on(make: Make, run: Path):
    import random

    import numpy as np

    training = make()
    training.step()
    np.random.standard_normal()  # which leaves numpy a second number for later
    training.save()
    expected = torch.rand(2).tolist(), random.random(), np.random.standard_normal(2).tolist()
    training.checkpoints.load(checkpoints(run)[-1])
    assert (torch.rand(2).tolist(), random.random(), np.random.standard_normal(2).tolist()) == expected


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "flipped"])
def test_damage_is_found_and_an_older_checkpoint_taken(
    make: Make, run: Path, capsys: pytest.CaptureFixture[str], file: str, damage: str
):
    training = make(keep=3)
    for _ in range(3):
        training.step()
        training.save()
    for step in (2, 3):
        path = run / f"checkpoints/step_{step:08d}" / file
        content = bytearray(path.read_bytes())
        path.unlink()
        content[-1] ^= 1 if damage == "flipped" else 0
        if damage != "missing":
            path.write_bytes({"truncated": content[:-1], "empty": b"", "flipped": content}[damage])
    assert find("auto", run).name == "step_00000001"
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 2
    for line, step in zip(printed, (3, 2), strict=True):
        assert line.startswith(f"{run}/checkpoints/step_{step:08d} is damaged: {file} ")
    assert entries(run) == {"step_00000001", "step_00000002.damaged", "step_00000003.damaged", "latest"}
    with pytest.raises(UserError, match="cannot be continued from"):
        find(str(run / "checkpoints/step_00000003.damaged"), run / ".." / "other")


def test_a_file_that_the_disk_does_not_give_back_is_damage(
    make: Make, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    training = make(keep=2)
    for _ in range(2):
        training.step()
        training.save()
    entry = manifest.entry

    def broken_sector(path: Path) -> manifest.Entry:
        if path == run / "checkpoints/step_00000002/model.safetensors":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return entry(path)

    monkeypatch.setattr(manifest, "entry", broken_sector)
    assert find("auto", run).name == "step_00000001"
    assert "is damaged: model.safetensors is not readable (Input/output error)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "[1]",
        "{}",
        '{"version": 1, "files": {}}',
        '{"version": 2, "files": {"state.json": {"bytes": 1, "sha256": ""}}}',
        '{"version": "1", "files": {"state.json": {"bytes": 1, "sha256": ""}}}',
        '{"version": 1, "files": {"../state.json": {"bytes": 1, "sha256": ""}}}',
        '{"version": 1, "files": {"state.json": 3}}',
        '{"version": 1, "files": {"state.json": {"bytes": 1, "sha256": ""}}}',
        "[" * 100_000,
    ],
)
def test_a_wrong_manifest_is_damage(make: Make, run: Path, capsys: pytest.CaptureFixture[str], content: str | None):
    training = make()
    training.step()
    training.save()
    path = run / "checkpoints/step_00000001/manifest.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match="all checkpoints"):
        find("auto", run)
    (line,) = capsys.readouterr().err.splitlines()
    assert "step_00000001 is damaged: " in line


def test_another_networks_checkpoint_is_refused(make: Make, run: Path):
    training = make()
    training.step()
    training.save()
    with pytest.raises(UserError, match="resume") as caught:
        make(width=4).checkpoints.load(checkpoints(run)[0])
    assert "\n" not in str(caught.value)


def test_another_run_gets_its_own_tracker_rows_and_best(make: Make, run: Path):
    training = make()
    training.step()
    training.state.best_loss, training.state.tracker_id, training.state.rows = 0.25, "abc", 3
    training.save()
    folder = checkpoints(run)[0]
    same = make("else/../run").checkpoints.load(folder)
    assert (same.best_loss, same.tracker_id, same.rows) == (0.25, "abc", 3)
    other = make("branch").checkpoints.load(folder)
    assert (other.step, other.best_loss, other.tracker_id, other.rows) == (1, None, None, 0)


@pytest.mark.parametrize(
    ("options", "best"),
    [({}, 0.25), ({"probe.samples": 7}, 0.25), ({"validation.samples": 7}, None), ({"flow.loss": "clean"}, None)],
)
def test_losses_of_another_kind_are_not_compared(make: Make, run: Path, options: dict, best: float | None):
    training = make()
    training.step()
    training.state.best_loss = 0.25
    training.save()
    saved = checkpoints(run)[0] / "config.yaml"
    values = yaml.safe_load(saved.read_text())
    for name, value in options.items():
        section, field = name.split(".")
        values[section][field] = value
    saved.write_text(yaml.safe_dump(values))
    assert make().checkpoints.load(saved.parent).best_loss == best


def test_a_sampler_that_was_trained_with_is_kept(config: Callable[..., TrainConfig], tmp_path: Path):
    rollouts = ("--objective", "self_rollout", "--data.rollout", "2")
    config(*rollouts, "--sampler.steps", "4").save(tmp_path / "config.yaml")
    check_config(config(*rollouts, "--sampler.steps", "4"), tmp_path)
    with pytest.raises(UserError, match=r"sampler\.steps is 1, was 4"):
        check_config(config(*rollouts, "--sampler.steps", "1"), tmp_path)
    config("--sampler.steps", "4").save(tmp_path / "config.yaml")
    check_config(config("--sampler.steps", "1"), tmp_path)


# Which one.


def fake(run: Path, *steps: int) -> Path:
    for step in steps:
        folder = run / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        TrainConfig().save(folder / "config.yaml")
        (folder / "state.json").write_text(json.dumps({"step": step}))
        manifest.write_manifest(folder, {name: manifest.entry(folder / name) for name in ("config.yaml", "state.json")})
    return run


def test_what_is_listed(tmp_path: Path):
    assert checkpoints(tmp_path) == []
    fake(tmp_path, 20, 3, 100)
    (tmp_path / "checkpoints" / ".step_00000200.partial").mkdir()
    (tmp_path / "checkpoints" / "step_00000300.damaged").mkdir()
    (tmp_path / "checkpoints" / "step_00000300").write_text("")
    shutil.copytree(tmp_path / "checkpoints/step_00000003", tmp_path / "checkpoints/step_00000400_copy")
    assert names(tmp_path) == ["step_00000003", "step_00000020", "step_00000100"]


def test_where_to_resume(tmp_path: Path):
    empty, run, other = tmp_path / "empty", fake(tmp_path / "run", 3, 20), fake(tmp_path / "other", 5)
    assert find("no", empty) is None
    assert find("auto", empty) is None
    assert find("auto", run) == run / "checkpoints" / "step_00000020"
    assert find(str(run / "checkpoints/step_00000020"), run) == run / "checkpoints" / "step_00000020"
    assert find(str(other / "checkpoints/step_00000005"), empty) == other / "checkpoints" / "step_00000005"


def test_what_would_be_overwritten_is_refused(tmp_path: Path):
    run, other = fake(tmp_path / "run", 3, 20), fake(tmp_path / "other", 5)
    with pytest.raises(UserError, match="--resume auto") as caught:
        find("no", run)
    assert str(run) in str(caught.value)
    for earlier in (run / "checkpoints/step_00000003", other / "checkpoints/step_00000005"):
        with pytest.raises(UserError, match="step_00000020"):
            find(str(earlier), run)


def test_a_checkpoint_beyond_the_last_step_is_refused(tmp_path: Path):
    run = fake(tmp_path / "run", 20)
    for steps, found in ((20, True), (19, False)):
        config = TrainConfig(name=run.name, output=str(run.parent), resume="auto", steps=steps)
        if found:
            assert find_resume(config) == run / "checkpoints/step_00000020"
        else:
            with pytest.raises(UserError, match=r"steps is 19, but .* is of step 20"):
                find_resume(config)
    moved = (run / "checkpoints/step_00000020").rename(tmp_path / "branch_point")
    assert find(str(moved), tmp_path / "other") == moved


def test_a_path_that_is_no_checkpoint_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"resume is .*nowhere.*manifest\.json"):
        find(str(tmp_path / "nowhere"), tmp_path)


@pytest.fixture
def saved(config: Callable[..., TrainConfig], tmp_path: Path) -> Path:
    """A checkpoint folder with the tiny config."""
    config().save(tmp_path / "config.yaml")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "value", "was"),
    [
        ("data.max_offset", "5", "4"),
        ("data.min_offset", "-3", "-2"),
        ("data.spacing", "0.5", "None"),
        ("data.fps", "2.0", "None"),
        ("flow.prediction", "velocity", "clean"),
        ("model.depth", "3", "2"),
        ("seed", "1", "0"),
        ("batch_size", "8", "4"),
        ("optimizer.learning_rate", "0.5", "0.003"),
        ("ema.decay", "0.5", "0.9999"),
    ],
)
def test_what_cannot_change_on_the_way_is_named(
    config: Callable[..., TrainConfig], saved: Path, name: str, value: str, was: str
):
    with pytest.raises(UserError) as caught:
        check_config(config(f"--{name}", value, "--steps", "9"), saved)
    assert f": {name} is {value}, was {was}" in str(caught.value)
    assert ";" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_may_change_on_the_way(config: Callable[..., TrainConfig], saved: Path):
    changed = {
        "name": "b",
        "resume": "auto",
        "steps": "9",
        "stop_at": "7",
        "micro_batch_size": "1",
        "compile": "true",
        "mixed_precision": "bf16",
        "data.folder": "elsewhere",
        "data.prepare": "make",
        "data.splits": "splits",
        "data.workers": "3",
        "data.cache_gb": "1.0",
        "validation.every": "3",
        "probe.attention.layers": "[0]",
        "checkpoint.keep": "1",
        "tracking": "wandb",
        "sampler.steps": "4",
        "output": "there",
    }
    check_config(config(*(part for name, value in changed.items() for part in (f"--{name}", value))), saved)


def test_datasets_of_a_mix_may_move_but_not_change(config: Callable[..., TrainConfig], tmp_path: Path):
    def mix(*sources: dict) -> TrainConfig:
        return config("--data.folder", "null", "--data.mix", json.dumps(sources))

    first, second = {"folder": "a", "spacing": 0.5}, {"folder": "b"}
    mix(first, second).save(tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert text.count("    camera: null\n") == 2
    (tmp_path / "config.yaml").write_text(text.replace("    camera: null\n", ""))  # from before there was this field
    check_config(mix(first | {"folder": "moved"}, second | {"splits": "lists"}), tmp_path)
    with pytest.raises(UserError, match=r"data\.mix\.0\.spacing is 0\.25, was 0\.5 "):
        check_config(mix(first | {"spacing": 0.25}, second), tmp_path)
    for fewer_or_more in ((first,), (first, second, second)):
        with pytest.raises(UserError, match=r"data\.mix\.[12]\.action_key is"):
            check_config(mix(*fewer_or_more), tmp_path)


def test_a_field_younger_than_the_checkpoint_was_its_default(config: Callable[..., TrainConfig], saved: Path):
    text = (saved / "config.yaml").read_text()
    assert "action_dropout: 0.0\n" in text
    (saved / "config.yaml").write_text(text.replace("action_dropout: 0.0\n", ""))
    check_config(config(), saved)
    with pytest.raises(UserError, match=r"action_dropout is 0\.1, was 0\.0"):
        check_config(config("--action_dropout", "0.1"), saved)


@pytest.mark.parametrize(
    ("before", "now", "printed"),
    [
        ("{decay: 0.5}", "{decay: 0.9}", "objective_options.decay is 0.9, was 0.5"),
        ("{}", "{decay: 0.9}", "objective_options.decay is 0.9, was None"),
        ("{decay: 0.5}", "{}", "objective_options.decay is None, was 0.5"),
    ],
)
def test_options_of_a_users_own_are_compared(
    config: Callable[..., TrainConfig], tmp_path: Path, before: str, now: str, printed: str
):
    config("--objective_options", before).save(tmp_path / "config.yaml")
    check_config(config("--objective_options", before), tmp_path)
    with pytest.raises(UserError, match=printed):
        check_config(config("--objective_options", now), tmp_path)


@pytest.mark.parametrize("content", [None, "a: [", "text"])
def test_a_checkpoint_without_its_config_is_one_clear_line(
    config: Callable[..., TrainConfig], tmp_path: Path, content: str | None
):
    if content:
        (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"resume: .*config\.yaml") as caught:
        check_config(config(), tmp_path)
    assert "\n" not in str(caught.value)
