"""A codec, a conditioner and an objective of a user's own, named by their import path."""

import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import mine
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cdit.batch import Condition
from cdit.codec import PixelCodec
from cdit.common.errors import UserError
from cdit.data import encode
from cdit.diffusion import SamplerConfig
from cdit.model import CDiT
from cdit.training.config import TrainConfig
from cdit.training.durable.run import DurableRun
from cdit.training.setup import build_optimizer
from cdit.training.sharding import bare_networks, prepare_networks
from cdit.world_model import WorldDescription, WorldModel

TRAIN = Path(__file__).parents[2] / "train.py"
TAUGHT = ("--objective", "mine:TaughtFlow", "--objective_options", '{"decay": 0.75}', "--stop_at", "4")
ALL = (
    *("--codec.kind", "mine:HalfCodec", "--model.extra_conditioners", '{"backward": "mine:BackwardConditioner"}'),
    *("--model.patch_size", "4", *TAUGHT[:4]),
)
KINDS = ("model", "average", "objective.average", "optimizer")


def predicted(world: WorldModel) -> Tensor:
    context = torch.rand(1, 3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    condition = Condition(torch.tensor([[0.4, -0.4]]), torch.ones(1, 2, 3))
    return world.predict(context, condition, generator=torch.Generator().manual_seed(2))


def test_they_are_trained_and_come_back(
    train: Callable[..., Path], rows: Callable[..., list[dict[str, float]]], tmp_path: Path, monkeypatch
):
    worlds, save = [], DurableRun.save_world
    monkeypatch.setattr(DurableRun, "save_world", lambda run, name: (save(run, name), worlds.append(run.world)))
    run = train(tmp_path, *ALL, "--stop_at", "2")
    assert all(math.isfinite(row["train/loss"]) for row in rows(run, "train/loss"))
    world = WorldModel.from_pretrained(run / "last")
    assert type(world.codec) is mine.HalfCodec
    assert world.codec.gain == 0.5
    assert type(world.objective) is mine.TaughtFlow
    assert world.objective.decay == 0.75
    assert type(world.cdit.conditioners["backward"]) is mine.BackwardConditioner
    assert world.latent_shape == (3, 16, 16)
    trained = worlds[-1]
    trained.cdit.load_state_dict(load_file(run / "checkpoints/step_00000002/average.safetensors"))
    assert torch.equal(predicted(world), predicted(trained.eval()))
    assert predicted(world).std() > 0.01


def world_of(kind: str) -> WorldModel:
    """With one part of a user's own."""
    conditioners = {"backward": "mine:BackwardConditioner"} if kind == "model.extra_conditioners" else None
    cdit = CDiT((8, 8), max_context=2, hidden_size=16, depth=1, num_heads=2, extra_conditioners=conditioners)
    codec = mine.HalfCodec() if kind == "codec.kind" else PixelCodec()
    size = (8 * codec.downscale, 8 * codec.downscale)
    objective = "mine:TaughtFlow" if kind == "objective" else "flow"
    return WorldModel(cdit, codec, WorldDescription(size, 4.0, objective=objective, sampler=SamplerConfig(steps=2)))


def test_a_conditioner_has_a_name():
    with pytest.raises(UserError, match=r"extra_conditioners: 'a\.b' is not a name"):
        CDiT((8, 8), max_context=2, hidden_size=16, depth=1, num_heads=2, extra_conditioners={"a.b": "interval"})


@pytest.mark.parametrize("kind", ["codec.kind", "objective", "model.extra_conditioners"])
def test_a_file_imports_no_module_and_says_which_it_needs(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    world_of(kind).save_pretrained(tmp_path)
    monkeypatch.delitem(sys.modules, "mine")
    with pytest.raises(UserError, match=rf"{tmp_path}: not a readable world model .*{kind}.*set CDIT_PLUGINS=mine"):
        WorldModel.from_pretrained(tmp_path)
    assert "mine" not in sys.modules
    monkeypatch.setitem(sys.modules, "mine", ModuleType("mine"))  # another one, which lacks the class
    with pytest.raises(UserError, match=rf"{kind} is 'mine:\w+', expected a subclass of"):
        WorldModel.from_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "mine", mine)
    assert isinstance(WorldModel.from_pretrained(tmp_path), WorldModel)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("codec.kind", "nowhere:HalfCodec", "codec.kind names the module nowhere, which cannot be imported"),
        ("codec.kind", "mine:TaughtFlow", "codec.kind is 'mine:TaughtFlow', expected a subclass of Codec"),
        ("codec.kind", "half", "codec.kind is 'half', expected one of pixels.*or my_module:Class"),
        ("objective", "mine:Missing", "objective is 'mine:Missing', expected a subclass of Objective"),
        ("objective", "taught", "objective is 'taught', expected one of flow, shortcut"),
        ("model.extra_conditioners", '{"a": "mine:TaughtFlow"}', "extra_conditioners is 'mine:TaughtFlow', expected a"),
    ],
)
def test_what_cannot_be_used_is_named(config: Callable[..., TrainConfig], option: str, value: str, message: str):
    with pytest.raises(UserError, match=message):
        config(f"--{option}", value).validate()


def test_a_codec_without_moments_is_not_encoded(dataset: Path, monkeypatch: pytest.MonkeyPatch):
    arguments = ["encode", "--data.folder", str(dataset), "--codec.kind", "mine:HalfCodec"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(UserError, match=r"codec\.kind is mine:HalfCodec, which"):
        encode.main()


# Further networks of an objective.


def tensors(run: Path, step: int, kind: str) -> dict[str, Tensor]:
    """Of a checkpoint, put together from the parts of the processes."""
    folder = run / f"checkpoints/step_{step:08d}"
    parts = [load_file(path) for path in sorted([*folder.glob(f"{kind}.safe*"), *folder.glob(f"{kind}-*.safe*")])]
    assert parts
    return {
        name: torch.cat([part[name] for part in parts]) if first.ndim else first for name, first in parts[0].items()
    }


def same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


def follows_the_weights(run: Path) -> None:
    """The objective's average is that of the checkpoints' weights, and no other."""
    for step in (2, 3, 4):
        before, weights, average = (
            tensors(run, s, kind)
            for s, kind in ((step - 1, "objective.average"), (step, "model"), (step, "objective.average"))
        )
        for name, tensor in average.items():
            torch.testing.assert_close(tensor, 0.75 * before[name] + 0.25 * weights[name])
        assert not same_bits(average, weights)
        assert not same_bits(average, tensors(run, step, "average"))


def stopped(run: Path, output: Path, step: int) -> Path:
    """A copy of the run as if it had been stopped after that step."""
    copy = Path(shutil.copytree(run, output / run.name))
    for later in copy.glob("checkpoints/step_*"):
        if int(later.name.removeprefix("step_")) > step:
            shutil.rmtree(later)
    return copy


def test_they_are_saved_and_resumed_to_the_last_bit(
    train: Callable[..., Path], rows: Callable[..., list[dict[str, float]]], tmp_path: Path
):
    run = train(tmp_path / "whole", *TAUGHT)
    follows_the_weights(run)
    copy = stopped(run, tmp_path, 2)
    train(tmp_path, *TAUGHT, "--resume", "auto")
    for kind in KINDS:
        assert same_bits(tensors(copy, 4, kind), tensors(run, 4, kind)), kind
    assert rows(copy, "train/loss") == rows(run, "train/loss")
    assert rows(copy, "validation/loss") == rows(run, "validation/loss")


@pytest.mark.slow
def test_they_are_sharded(
    launch: Callable[..., subprocess.CompletedProcess], train: Callable[..., Path], tiny: Path, tmp_path: Path
):
    variables = {"ACCELERATE_USE_FSDP": "true", "PYTHONPATH": str(Path(__file__).parent)}

    def shared(output: Path, *options: str) -> Path:
        done = launch(TRAIN, "--config", tiny, "--output", output, *TAUGHT, *options, processes=2, **variables)
        assert done.returncode == 0, done.stderr
        return output / "tiny"

    run = shared(tmp_path / "whole")
    assert len(list((run / "checkpoints/step_00000004").glob("objective.average-*-of-00002.safetensors"))) == 2
    follows_the_weights(run)
    copy = stopped(run, tmp_path, 2)
    shared(tmp_path, "--resume", "auto")
    for kind in KINDS:
        assert same_bits(tensors(copy, 4, kind), tensors(run, 4, kind)), kind
    alone = train(tmp_path / "alone", *TAUGHT)
    for kind in KINDS[:3]:
        found, expected = tensors(run, 4, kind), tensors(alone, 4, kind)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-3)


class Critic(torch.nn.Module):
    """A further network that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)


def test_a_trained_one_keeps_its_names_and_joins_the_optimizer(accelerator, world: WorldModel, config):
    world.objective.networks["model"] = Critic()  # its name takes nobody's place
    prepare_networks(world, accelerator, sharded=False)
    networks = bare_networks(world)
    assert set(networks) == {"model", "objective.model"}
    assert networks["model"] is world.cdit
    optimizer, _ = build_optimizer(networks, config().optimizer, 10)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for network in networks.values() for p in network.parameters()}
