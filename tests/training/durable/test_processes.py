"""Several processes, micro-batches and loader workers train as one process on the joint batch."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gradients import STANDING, STEP, options, watched
from safetensors.torch import load_file

from cdit.batch import Batch, KeyedDraws
from cdit.data.sampler import KeyedBatchSampler
from cdit.data.windows import WindowDataset
from cdit.training.config import TrainConfig
from cdit.training.durable import manifest
from cdit.world_model import WorldModel

GRADIENTS = Path(__file__).parents[1] / "gradients.py"
SLOW_CHECKPOINT = Path(__file__).with_name("slow_checkpoint.py")
BACKWARDS = Path(__file__).with_name("backwards.py")
TRAIN = Path(__file__).parents[3] / "train.py"


@pytest.fixture
def joint(
    config: Callable[..., TrainConfig], world: WorldModel, train_set: WindowDataset
) -> Callable[[slice], tuple[float, dict[str, torch.Tensor]]]:
    """Loss and gradients of (a part of) step 3's batch in plain PyTorch, without loader, Accelerate or launcher."""
    settings = config(*options(STANDING))

    def joint(part: slice, batch_size: int = 4) -> tuple[float, dict[str, torch.Tensor]]:
        keys = next(iter(KeyedBatchSampler(len(train_set), batch_size, settings.seed, STEP, STEP + 1)))
        assert len(keys) == batch_size
        windows = Batch.collate([train_set[key] for key in keys[part]])
        batch = world.encode(windows, settings.action_dropout)
        world.cdit.zero_grad()
        loss = world.objective.loss(world.cdit, batch, KeyedDraws(windows.key, world.device)).mean()
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in world.cdit.named_parameters()}

    return joint


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest relative distance of a parameter's gradient."""
    assert set(a) == set(b)
    return max(((a[name] - b[name]).norm() / b[name].norm().clamp(min=1e-12)).item() for name in b)


def compare(found: dict, loss: float, gradients: dict[str, torch.Tensor]) -> None:
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert distance(found["gradients"], gradients) < 2e-5


@pytest.fixture(scope="module")
def alone(
    launch: Callable[..., subprocess.CompletedProcess], tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict]:
    """What one process finds with one, two and four micro-batches, of unequal size, and with loader workers."""
    out, cases = tmp_path_factory.mktemp("one"), ["4:1:0:1", "4:2:0:3", "4:4:0:1", "4:1:2:1"]
    done = launch(GRADIENTS, tiny, out, *cases)
    assert done.returncode == 0, done.stderr
    return {case: torch.load(out / f"{case.replace(':', '_')}_0.pt") for case in cases}


@pytest.fixture(scope="module")
def together(
    launch: Callable[..., subprocess.CompletedProcess], tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict]]:
    """What each of two processes finds; also where one has fewer samples than the other, or none."""
    out, cases = tmp_path_factory.mktemp("two"), ["4:1:0:1", "4:2:0:3", "4:2:2:1", "5:1:0:1", "5:2:0:1", "1:1:0:1"]
    done = launch(GRADIENTS, tiny, out, *cases, processes=2)
    assert done.returncode == 0, done.stderr
    return {case: [torch.load(out / f"{case.replace(':', '_')}_{i}.pt") for i in range(2)] for case in cases}


def test_parts_of_the_batch_have_other_gradients(joint: Callable):
    """So that the tests below would notice a process that kept its share for itself."""
    whole = joint(slice(None))[1]
    assert all(gradient.abs().max() > 0 for gradient in whole.values())
    for part in (slice(0, 2), slice(2, 4), slice(0, 4, 2), slice(0, 1)):
        assert distance(joint(part)[1], whole) > 0.1


@pytest.mark.parametrize("micro_batch_size", [5, 3])
def test_the_gradient_of_a_step_is_that_of_its_mean_loss(
    train: Callable[..., Path], joint: Callable, tmp_path: Path, micro_batch_size: int
):
    """Also where micro-batches are of unequal size."""
    sizes = {"batch_size": 5, "micro_batch_size": micro_batch_size}
    with watched() as found:
        train(tmp_path, *options(STANDING | sizes))
    assert found["parts"] == {5: 1, 3: 2}[micro_batch_size]
    compare(found, *joint(slice(None), 5))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["4:1:0:1", "4:2:0:3", "4:4:0:1", "4:1:2:1"])
def test_micro_batches_and_workers_give_the_joint_gradient(alone: dict[str, dict], joint: Callable, case: str):
    assert alone[case]["processes"] == 1
    compare(alone[case], *joint(slice(None), int(case[0])))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["4:1:0:1", "4:2:0:3", "4:2:2:1", "5:1:0:1", "5:2:0:1", "1:1:0:1"])
def test_two_processes_give_the_joint_gradient(together: dict[str, list[dict]], joint: Callable, case: str):
    for found in together[case]:
        assert found["processes"] == 2
        compare(found, *joint(slice(None), int(case[0])))


@pytest.mark.slow
def test_two_processes_measure_the_loss_of_one(together: dict[str, list[dict]], alone: dict[str, dict]):
    """Also where there are fewer windows than processes."""
    for case in ("4:1:0:1", "4:2:0:3"):
        for process in together[case]:
            assert process["held_out"] == pytest.approx(alone[case]["held_out"], rel=1e-5)


@pytest.mark.slow
def test_two_processes_train_as_one(
    launch: Callable[..., subprocess.CompletedProcess],
    train: Callable[..., Path],
    straight: Path,
    tiny: Path,
    rows: Callable[..., list[dict[str, float]]],
    tmp_path: Path,
):
    """The whole train.py; each process takes its share one sample at a time. One process alone takes the last steps."""
    options = ("--output", tmp_path, "--micro_batch_size", "1", "--data.workers", "1", "--probe.every", "4")
    done = launch(TRAIN, "--config", tiny, *options, "--stop_at", "4", processes=2)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "tiny"
    assert len(list(run.glob("checkpoints/step_00000004/process_*.json"))) == 2  # each process left its own
    assert (run / "probes/step_00000004/predictions.png").is_file()
    assert len(rows(run, "train/loss")) == 4
    train(tmp_path, "--resume", "auto")
    for field in ("train/loss", "validation/loss"):
        expected, measured = rows(straight, field), rows(run, field)
        assert len(measured) == {"train/loss": 6, "validation/loss": 3}[field]
        for a, b in zip(measured, expected, strict=True):
            assert a == pytest.approx(b, rel=1e-4)
    assert all("train/gradient_norm" in row for row in rows(run, "train/loss"))
    ours, theirs = (load_file(r / "last/cdit/diffusion_pytorch_model.safetensors") for r in (run, straight))
    assert distance(ours, theirs) < 1e-3


@pytest.mark.slow
def test_a_gradient_does_not_depend_on_how_many_came_before(
    launch: Callable[..., subprocess.CompletedProcess], tmp_path: Path
):
    """To the last bit, or a run that is resumed would differ. Of two numbers the sum is the same in any order."""
    done = launch(BACKWARDS, tmp_path, processes=3)
    assert done.returncode == 0, done.stderr
    for process in range(3):
        first, third = torch.load(tmp_path / f"{process}.pt")
        assert first.abs().max() > 0
        assert torch.equal(first, third)


@pytest.mark.slow
def test_processes_stop_when_the_checkpoint_is_written(
    launch: Callable[..., subprocess.CompletedProcess], tiny: Path, tmp_path: Path
):
    """And not one before, for which the launcher would end the one that still writes."""
    options = ("--output", tmp_path, "--checkpoint.every", "100", "--validation.every", "100")
    done = launch(SLOW_CHECKPOINT, "--config", tiny, *options, processes=2)
    assert "stopped: at step 3, which is saved" in done.stderr, done.stderr
    assert manifest.problem(tmp_path / "tiny/checkpoints/step_00000003") is None
