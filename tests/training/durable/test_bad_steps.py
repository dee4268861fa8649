import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file

from cdit.batch import Batch, Condition
from cdit.common.errors import UserError
from cdit.training.durable.bad_steps import BadSteps
from cdit.training.durable.checkpoints import RunState

NAN, INF = float("nan"), float("inf")


class Training:
    """One weight that follows given gradients."""

    def __init__(self, accelerator: Accelerator, folder: Path, limit: int = 3):
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.optimizer = accelerator.prepare(torch.optim.AdamW([self.weight], lr=0.1, fused=True))
        self.state, self.asked = RunState(), []
        self.bad_steps = BadSteps(self.optimizer, accelerator, folder, limit, self._batch)

    def _batch(self, step: int) -> list[Batch]:
        """Two micro-batches, their keys made of the step."""
        self.asked.append(step)
        keys = [torch.tensor([step, 10 * step]), torch.tensor([-step])]
        return [
            Batch(torch.zeros(len(key), 1), torch.ones(len(key), 1), torch.zeros(len(key), 1), Condition(), key)
            for key in keys
        ]

    def step(self, gradient: float) -> None:
        self.weight.grad = torch.tensor([gradient, 1.0])
        self.bad_steps.before(self.state.step, self.weight.grad.norm(), torch.tensor(gradient))
        self.optimizer.step()
        self.state.step += 1


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_bad_step_is_as_if_it_had_not_been(accelerator: Accelerator, tmp_path: Path, bad: float):
    """Weights and moments are those of a plain AdamW that never saw it."""
    training = Training(accelerator, tmp_path)
    plain = torch.nn.Parameter(torch.ones(2))
    reference = torch.optim.AdamW([plain], lr=0.1)
    for gradient in (0.5, bad, -2.0, bad, 1.0):
        training.step(gradient)
        if gradient != bad and gradient == gradient:
            plain.grad = torch.tensor([gradient, 1.0])
            reference.step()
    torch.testing.assert_close(training.weight, plain)
    state, expected = training.optimizer.state[training.weight], reference.state[plain]
    for name in ("step", "exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(state[name], expected[name])


def test_they_are_counted_and_their_batch_kept(accelerator: Accelerator, tmp_path: Path):
    training = Training(accelerator, tmp_path)
    for gradient in (1.0, NAN, 1.0):
        training.step(gradient)
    assert training.asked == []
    training.bad_steps.look(training.state)
    assert (training.state.bad_steps, training.state.bad_in_a_row) == (1, 0)
    training.step(INF)
    training.bad_steps.look(training.state)
    assert (training.state.bad_steps, training.state.bad_in_a_row) == (2, 1)
    assert training.asked == [1, 3]
    kept = tmp_path / "bad_steps"
    assert load_file(kept / "step_00000003_process_0.safetensors")["key"].tolist() == [3, 30, -3]
    assert json.loads((kept / "step_00000001_process_0.json").read_text()) == {
        "step": 1,
        "gradient_norm": "nan",
        "loss": "nan",
    }


def test_too_many_in_a_row_end_the_training(accelerator: Accelerator, tmp_path: Path):
    """Over looks and over a resume, whose state says how many there were."""
    training = Training(accelerator, tmp_path)
    for gradient in (NAN, NAN, 1.0, NAN, NAN):
        training.step(gradient)
    training.bad_steps.look(training.state)
    assert training.state.bad_in_a_row == 2
    training.step(NAN)
    with pytest.raises(UserError, match=r"3 steps in a row.*learning_rate.*bad_steps"):
        training.bad_steps.look(training.state)


def test_a_disk_that_takes_no_batch_is_named(accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("cdit.training.durable.bad_steps.save_file", full)
    training = Training(accelerator, tmp_path)
    training.step(NAN)
    with pytest.raises(UserError, match=r"bad_steps/step_00000000_process_0: cannot be written.*No space left"):
        training.bad_steps.look(training.state)
