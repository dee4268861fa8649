import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from cdit.errors import UserError
from cdit.training.checkpoints import (
    RunState,
    check_config,
    checkpoints,
    find_resume,
    load_checkpoint,
    save_checkpoint,
)
from cdit.training.config import CheckpointConfig, EMAConfig, TrainConfig
from cdit.training.ema import EMA


class Training:
    """A network that learns a little, with all that a checkpoint holds."""

    def __init__(self, accelerator: Accelerator, seed: int = 0, width: int = 3):
        torch.manual_seed(seed)
        network = nn.Linear(2, width)
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
        self.accelerator = accelerator
        self.network, self.optimizer = accelerator.prepare(network, optimizer)
        self.ema = EMA(network, EMAConfig(decay=0.5))
        self.state = RunState()

    def step(self) -> None:
        self.network(torch.full((1, 2), 1.0 + self.state.step)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step()
        self.state.step += 1

    def weights(self) -> list[torch.Tensor]:
        now = [p.detach().clone() for p in self.network.parameters()]
        with self.ema.applied():
            return now + [p.detach().clone() for p in self.network.parameters()]


@pytest.fixture
def training(accelerator: Accelerator) -> Training:
    return Training(accelerator)


def settings(run: Path, keep: int) -> TrainConfig:
    return TrainConfig(name=run.name, output=str(run.parent), checkpoint=CheckpointConfig(keep=keep))


def names(run: Path) -> list[str]:
    return [path.name for path in checkpoints(run)]


def test_only_the_newest_are_kept(training: Training, accelerator: Accelerator, tmp_path: Path):
    for _ in range(4):
        training.step()
        save_checkpoint(accelerator, training.ema, training.state, settings(tmp_path, keep=2))
    assert names(tmp_path) == ["step_00000003", "step_00000004"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == names(tmp_path)
    save_checkpoint(accelerator, training.ema, training.state, settings(tmp_path, keep=2))  # the same step once more
    assert names(tmp_path) == ["step_00000003", "step_00000004"]


def test_a_training_goes_on_from_what_was_saved(training: Training, accelerator: Accelerator, tmp_path: Path):
    for _ in range(3):
        training.step()
    training.state.best_loss, training.state.tracker_id, training.state.schedule = 0.25, "abc", {"last_epoch": 3}
    save_checkpoint(accelerator, training.ema, training.state, settings(tmp_path, keep=2))
    accelerator.free_memory()
    other = Training(accelerator, seed=1)
    other.state = load_checkpoint(accelerator, other.ema, checkpoints(tmp_path)[-1], tmp_path)
    assert other.state == training.state
    for _ in range(2):
        training.step()
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(training.weights(), other.weights(), strict=True))


def test_an_interrupted_checkpoint_is_no_checkpoint(
    training: Training, accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    training.step()
    save_checkpoint(accelerator, training.ema, training.state, settings(tmp_path, keep=1))
    training.step()
    with monkeypatch.context() as patch:
        patch.setattr(EMA, "save", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space"):
            save_checkpoint(accelerator, training.ema, training.state, settings(tmp_path, keep=1))
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2  # the whole one, and what is left of the other
    assert names(tmp_path) == ["step_00000001"]
    assert find_resume("auto", tmp_path).name == "step_00000001"
    save_checkpoint(accelerator, training.ema, training.state, settings(tmp_path, keep=1))
    assert names(tmp_path) == ["step_00000002"]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]


def fake(run: Path, *steps: int) -> Path:
    for step in steps:
        folder = run / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"step": step}))
    return run


def test_what_is_listed(tmp_path: Path):
    assert checkpoints(tmp_path) == []
    fake(tmp_path, 20, 3, 100)
    (tmp_path / "checkpoints" / ".step_00000200.partial").mkdir()
    (tmp_path / "checkpoints" / "step_00000300").mkdir()  # without its state
    shutil.copytree(tmp_path / "checkpoints/step_00000003", tmp_path / "checkpoints/step_00000400_copy")
    assert names(tmp_path) == ["step_00000003", "step_00000020", "step_00000100"]


def test_where_to_resume(tmp_path: Path):
    empty, run, other = tmp_path / "empty", fake(tmp_path / "run", 3, 20), fake(tmp_path / "other", 5)
    assert find_resume("no", empty) is None
    assert find_resume("auto", empty) is None
    assert find_resume("auto", run) == run / "checkpoints" / "step_00000020"
    assert find_resume(str(run / "checkpoints/step_00000020"), run) == run / "checkpoints" / "step_00000020"
    assert find_resume(str(other / "checkpoints/step_00000005"), empty) == other / "checkpoints" / "step_00000005"


def test_what_would_be_overwritten_is_refused(tmp_path: Path):
    run, other = fake(tmp_path / "run", 3, 20), fake(tmp_path / "other", 5)
    with pytest.raises(UserError, match="--resume auto") as caught:
        find_resume("no", run)
    assert str(run) in str(caught.value)
    for earlier in (run / "checkpoints/step_00000003", other / "checkpoints/step_00000005"):
        with pytest.raises(UserError, match="step_00000020"):
            find_resume(str(earlier), run)


def test_a_path_that_is_no_checkpoint_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"resume is .*nowhere.*state\.json"):
        find_resume(str(tmp_path / "nowhere"), tmp_path)


@pytest.mark.parametrize(
    "file", ["state.json", "model.safetensors", "optimizer.bin", "ema.safetensors", "random_states_0.pkl"]
)
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_a_broken_checkpoint_is_one_clear_line(
    training: Training, accelerator: Accelerator, tmp_path: Path, file: str, damage: str
):
    training.step()
    save_checkpoint(accelerator, training.ema, training.state, settings(tmp_path, keep=1))
    path = checkpoints(tmp_path)[0] / file
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    if file == "random_states_0.pkl":  # nothing is drawn from them
        assert load_checkpoint(accelerator, training.ema, path.parent, tmp_path).step == 1
        return
    with pytest.raises(UserError) as caught:
        load_checkpoint(accelerator, training.ema, path.parent, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"resume: {path.parent} ")
    assert "\n" not in message


def test_another_networks_checkpoint_is_refused(training: Training, accelerator: Accelerator, tmp_path: Path):
    training.step()
    save_checkpoint(accelerator, training.ema, training.state, settings(tmp_path, keep=1))
    accelerator.free_memory()
    with pytest.raises(UserError, match="resume"):
        load_checkpoint(accelerator, Training(accelerator, width=4).ema, checkpoints(tmp_path)[0], tmp_path)


def test_micro_batches_are_counted_anew(accelerator: Accelerator, tmp_path: Path, training: Training):
    """However many a step had before: the first `gradient_accumulation_steps` of them make the next step."""
    accelerator.gradient_accumulation_steps = 3
    for i in range(3):
        with accelerator.accumulate(training.network):
            assert accelerator.sync_gradients is (i == 2)
    save_checkpoint(accelerator, training.ema, training.state, settings(tmp_path, keep=1))
    accelerator.gradient_accumulation_steps = 2
    load_checkpoint(accelerator, training.ema, checkpoints(tmp_path)[0], tmp_path)
    for i in range(4):
        with accelerator.accumulate(training.network):
            assert accelerator.sync_gradients is (i % 2 == 1)


def test_another_run_gets_its_own_tracker_and_best(training: Training, accelerator: Accelerator, tmp_path: Path):
    training.step()
    training.state.best_loss, training.state.tracker_id = 0.25, "abc"
    save_checkpoint(accelerator, training.ema, training.state, settings(tmp_path / "run", keep=1))
    folder = checkpoints(tmp_path / "run")[0]
    same = load_checkpoint(accelerator, training.ema, folder, tmp_path / "else" / ".." / "run")
    assert (same.best_loss, same.tracker_id) == (0.25, "abc")
    other = load_checkpoint(accelerator, training.ema, folder, tmp_path / "branch")
    assert (other.step, other.best_loss, other.tracker_id) == (1, float("inf"), None)


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
        "tracking.backend": "wandb",
        "sampler.steps": "4",
        "output": "there",
    }
    check_config(config(*(part for name, value in changed.items() for part in (f"--{name}", value))), saved)


def test_a_field_younger_than_the_checkpoint_was_its_default(config: Callable[..., TrainConfig], saved: Path):
    text = (saved / "config.yaml").read_text()
    assert "action_dropout: 0.0\n" in text
    (saved / "config.yaml").write_text(text.replace("action_dropout: 0.0\n", ""))
    check_config(config(), saved)
    with pytest.raises(UserError, match=r"action_dropout is 0\.1, was 0\.0"):
        check_config(config("--action_dropout", "0.1"), saved)


@pytest.mark.parametrize("content", [None, "a: [", "text"])
def test_a_checkpoint_without_its_config_is_one_clear_line(
    config: Callable[..., TrainConfig], tmp_path: Path, content: str | None
):
    if content:
        (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"resume: .*config\.yaml") as caught:
        check_config(config(), tmp_path)
    assert "\n" not in str(caught.value)
