"""The examples of docs/extending.md: each trains for a few steps by the command beside it; the result samples."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cdit.batch import Condition
from cdit.world_model import WorldModel

DOCUMENT = Path(__file__).parents[2] / "docs" / "extending.md"
MODULES = dict(re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL))
COMMANDS = re.findall(
    r"^    accelerate launch train\.py --config configs/smoke\.yaml (.*)$", DOCUMENT.read_text(), re.M
)
QUICK = ["--steps", "3", "--validation.every", "3", "--probe.attention.samples", "0", "--probe.rollouts", "0"]


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("modules")
    for name, source in MODULES.items():
        (folder / name).write_text(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


@pytest.mark.parametrize("command", COMMANDS)
def test_each_example_trains_and_samples(command: str, train: Callable[..., Path], tmp_path: Path):
    name, *options = shlex.split(command.removeprefix("--name "))
    run = train(tmp_path, *options, *QUICK, name=name)
    world = WorldModel.from_pretrained(run)
    context, action = torch.zeros(1, 3, 3, 32, 32), torch.zeros(1, 2, 2, world.cdit.config.action_size)
    frames = [
        world.rollout(context, Condition(action=action, extra={"hour": torch.full((1, 2, 2), hour)}), generator=zero())
        for hour in (0.0, 12.0)
    ]
    assert frames[0].shape == (1, 2, 2, 3, 32, 32)
    assert frames[0].isfinite().all()
    assert frames[0].equal(frames[1]) == (name != "condition")


def zero() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_all_modules_are_used():
    assert MODULES
    assert all(any(name.removesuffix(".py") in command for command in COMMANDS) for name in MODULES)
