import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from cdit.errors import UserError
from cdit.training.checkpoints import RunState, checkpoints, find_resume, load_checkpoint, save_checkpoint
from cdit.training.config import EMAConfig
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


def names(run: Path) -> list[str]:
    return [path.name for path in checkpoints(run)]


def test_only_the_newest_are_kept(training: Training, accelerator: Accelerator, tmp_path: Path):
    for _ in range(4):
        training.step()
        save_checkpoint(accelerator, training.ema, training.state, tmp_path, keep=2)
    assert names(tmp_path) == ["step_00000003", "step_00000004"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == names(tmp_path)
    save_checkpoint(accelerator, training.ema, training.state, tmp_path, keep=2)  # the same step once more
    assert names(tmp_path) == ["step_00000003", "step_00000004"]


def test_a_training_goes_on_from_what_was_saved(training: Training, accelerator: Accelerator, tmp_path: Path):
    for _ in range(3):
        training.step()
    training.state.best_loss, training.state.tracker_id, training.state.schedule = 0.25, "abc", {"last_epoch": 3}
    save_checkpoint(accelerator, training.ema, training.state, tmp_path, keep=2)
    accelerator.free_memory()
    other = Training(accelerator, seed=1)
    other.state = load_checkpoint(accelerator, other.ema, checkpoints(tmp_path)[-1])
    assert other.state == training.state
    for _ in range(2):
        training.step()
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(training.weights(), other.weights(), strict=True))


def test_an_interrupted_checkpoint_is_no_checkpoint(
    training: Training, accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    training.step()
    save_checkpoint(accelerator, training.ema, training.state, tmp_path, keep=1)
    training.step()
    with monkeypatch.context() as patch:
        patch.setattr(EMA, "save", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space"):
            save_checkpoint(accelerator, training.ema, training.state, tmp_path, keep=1)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2  # the whole one, and what is left of the other
    assert names(tmp_path) == ["step_00000001"]
    assert find_resume("auto", tmp_path).name == "step_00000001"
    save_checkpoint(accelerator, training.ema, training.state, tmp_path, keep=1)
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
    save_checkpoint(accelerator, training.ema, training.state, tmp_path, keep=1)
    path = checkpoints(tmp_path)[0] / file
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    if file == "random_states_0.pkl":  # nothing is drawn from them
        assert load_checkpoint(accelerator, training.ema, path.parent).step == 1
        return
    with pytest.raises(UserError) as caught:
        load_checkpoint(accelerator, training.ema, path.parent)
    message = str(caught.value)
    assert message.startswith(f"resume: {path.parent} ")
    assert "\n" not in message


def test_another_networks_checkpoint_is_refused(training: Training, accelerator: Accelerator, tmp_path: Path):
    training.step()
    save_checkpoint(accelerator, training.ema, training.state, tmp_path, keep=1)
    accelerator.free_memory()
    with pytest.raises(UserError, match="resume"):
        load_checkpoint(accelerator, Training(accelerator, width=4).ema, checkpoints(tmp_path)[0])


def test_micro_batches_are_counted_anew(accelerator: Accelerator, tmp_path: Path, training: Training):
    """However many a step had before: the first `gradient_accumulation_steps` of them make the next step."""
    accelerator.gradient_accumulation_steps = 3
    for i in range(3):
        with accelerator.accumulate(training.network):
            assert accelerator.sync_gradients is (i == 2)
    save_checkpoint(accelerator, training.ema, training.state, tmp_path, keep=1)
    accelerator.gradient_accumulation_steps = 2
    load_checkpoint(accelerator, training.ema, checkpoints(tmp_path)[0])
    for i in range(4):
        with accelerator.accumulate(training.network):
            assert accelerator.sync_gradients is (i % 2 == 1)
