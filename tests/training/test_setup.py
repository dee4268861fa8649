import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from gradients import randomise

from cdit.batch import Condition
from cdit.common.errors import UserError
from cdit.data.config import DataConfig
from cdit.data.layout import Camera
from cdit.data.windows import WindowDataset
from cdit.training.config import OptimizerConfig, TrainConfig
from cdit.training.setup import (
    build_accelerator,
    build_optimizer,
    build_world,
    micro_batches,
    prepare_data,
    resume_schedule,
)
from cdit.world_model import WorldModel


def test_weight_decay_shrinks_matrices_and_leaves_vectors(world: WorldModel):
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, warmup_steps=0, schedule="constant")
    before = {name: p.detach().clone() for name, p in world.cdit.named_parameters()}
    optimizer, _ = build_optimizer({"model": world.cdit}, config, 10)
    for parameter in world.cdit.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = {name: p for name, p in world.cdit.named_parameters() if not torch.equal(p, before[name])}
    assert set(moved) == {name for name, p in before.items() if p.ndim >= 2}
    assert 0 < len(moved) < len(before)
    for name, parameter in moved.items():
        torch.testing.assert_close(parameter, before[name] * (1 - 0.1 * 0.5))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_averages_of_gradients_decay_as_configured(name: str, world: WorldModel):
    optimizer, _ = build_optimizer({"model": world.cdit}, OptimizerConfig(name=name, betas=(0.8, 0.95)), 10)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.95)}


def learning_rates(config: OptimizerConfig, steps: int) -> list[float]:
    """The rate that each optimizer step is taken with."""
    optimizer, schedule = build_optimizer({"model": torch.nn.Linear(2, 2)}, config, steps)
    rates = []
    for _ in range(steps):
        rates.append({group["lr"] for group in optimizer.param_groups})
        optimizer.step()
        schedule.step()
    assert all(len(rate) == 1 for rate in rates)
    return [rate.pop() for rate in rates]


def test_cosine_after_a_linear_warm_up():
    rates = learning_rates(OptimizerConfig(learning_rate=2e-3, warmup_steps=4), 12)
    assert rates[:4] == pytest.approx([0, 0.5e-3, 1e-3, 1.5e-3])
    assert rates[4:] == pytest.approx([2e-3 * 0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)])
    assert rates[8] == pytest.approx(1e-3)  # half way


def test_constant_after_a_linear_warm_up():
    rates = learning_rates(OptimizerConfig(learning_rate=2e-3, warmup_steps=2, schedule="constant"), 6)
    assert rates == pytest.approx([0, 1e-3, 2e-3, 2e-3, 2e-3, 2e-3])


def test_warm_up_stable_decay():
    rates = learning_rates(OptimizerConfig(learning_rate=2e-3, warmup_steps=2, schedule="wsd", decay_share=0.4), 10)
    assert rates == pytest.approx([0, 1e-3, 2e-3, 2e-3, 2e-3, 2e-3, 2e-3, 1.5e-3, 1e-3, 0.5e-3])
    rates = learning_rates(OptimizerConfig(learning_rate=2e-3, warmup_steps=0, schedule="wsd", decay_share=1.0), 4)
    assert rates == pytest.approx([2e-3, 1.5e-3, 1e-3, 0.5e-3])


def test_weights_are_a_function_of_the_seed(config: Callable[..., TrainConfig], train_set: WindowDataset):
    first = build_world(config(), train_set).cdit.state_dict()
    torch.rand(3)
    again = build_world(config(), train_set).cdit.state_dict()
    other = build_world(config("--seed", "1"), train_set).cdit.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_what_the_description_says_of_a_ddpm_in_published_units(
    config: Callable[..., TrainConfig], train_set: WindowDataset
):
    options = ["--objective", "ddpm", "--units", "nwm", "--sampler.scheduler", "ddim", "--action_dropout", "0.3"]
    crop = ["--data.crop", "4:3", "--data.min_history", "2"]
    world = build_world(config(*options, *crop), train_set)
    description = world.description
    assert (description.objective, description.crop, description.min_history, description.action_dropout) == (
        "ddpm",
        "4:3",
        2,
        0.3,
    )
    assert description.sampler.scheduler == "ddim"
    assert world.cdit.out_channels == 6
    # Five frames a second, 0.2 m apart: a second ahead is 5/128, 5 spacings forward are 1.
    known = world.network_condition(Condition(torch.tensor([[1.0]]), torch.tensor([[[1.0, 0.8, 0.5]]])))
    torch.testing.assert_close(known["action"], torch.tensor([[[1.0, 1.0, 0.5]]]))
    torch.testing.assert_close(known["time_shift"], torch.tensor([[5 / 128]]))
    plain = build_world(config(*options, "--ddpm.learn_variance", "false"), train_set)
    assert plain.cdit.out_channels == 3
    assert not plain.objective.learn_variance


def test_training_starts_from_a_trained_world(
    config: Callable[..., TrainConfig], train_set: WindowDataset, world: WorldModel, tmp_path: Path
):
    """With its units, although the goals of the config are nearer; a conditioner may be new."""
    world.save_pretrained(tmp_path / "start")
    further = ["--model.extra_conditioners", "{backward: mine:BackwardConditioner}"]
    options = ["--data.max_offset", "2", "--seed", "5", "--model.dropout", "0.1", *further]
    options += ["--model.context_noise", "0.3"]
    mine = config("--init_from", str(tmp_path / "start"), *options)
    mine.validate()
    started = build_world(mine, train_set).eval()
    assert started.description.units == world.description.units
    weights = started.cdit.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in world.cdit.state_dict().items())
    assert any("backward" in name for name in weights)


def test_a_place_embedding_can_be_turned_off(
    config: Callable[..., TrainConfig], train_set: WindowDataset, tmp_path: Path
):
    """The network then continues as if every patch had the mean of the embeddings."""
    placed = build_world(config("--model.place_embedding", "true"), train_set).eval()
    randomise(placed.cdit)
    placed.save_pretrained(tmp_path / "start")
    without = build_world(config("--init_from", str(tmp_path / "start")), train_set).eval()
    frames = torch.randn(2, 3, *placed.latent_shape, generator=torch.Generator().manual_seed(0))
    inputs = (frames[:, 0], torch.full((2,), 500.0), {"time_shift": torch.ones(2)}, frames[:, 1:])
    before = placed.cdit(*inputs)
    placed.cdit.place_embed.data[:] = placed.cdit.place_embed.data.mean(0)
    expected = placed.cdit(*inputs)
    assert not torch.allclose(before, expected, atol=1e-2)
    torch.testing.assert_close(without.cdit(*inputs), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.num_heads", "4"], "whose num_heads is 2, but the config's is 4"),
        (["--model.place_embedding", "true"], "whose place_embedding is False, but the config's is True"),
        (["--objective", "ddpm", "--sampler.scheduler", "ddim"], "whose learn_variance is False"),
        (["--codec.kind", "mine:HalfCodec"], r"whose codec \(pixels\) is not the config's \(mine:HalfCodec\)"),
    ],
)
def test_a_trained_world_of_another_kind_is_refused(
    config: Callable[..., TrainConfig],
    train_set: WindowDataset,
    world: WorldModel,
    tmp_path: Path,
    options: list[str],
    message: str,
):
    world.save_pretrained(tmp_path / "start")
    mine = config("--init_from", str(tmp_path / "start"), *options)
    mine.validate()
    with pytest.raises(UserError, match=message):
        build_world(mine, train_set)


@pytest.mark.parametrize(("offset", "sign"), [("-2", 1.0), ("-8", -1.0)])
def test_the_farthest_goal_is_1_away_also_in_the_past(
    config: Callable[..., TrainConfig], train_set: WindowDataset, offset: str, sign: float
):
    """Four frames of 0.2 m ahead, or eight back, at five frames a second."""
    world = build_world(config("--data.min_offset", offset), train_set)
    farthest = 0.8 if sign > 0 else -1.6  # metres, and seconds
    action = torch.tensor([[[farthest, -farthest / 2, sign * math.pi / 2]]])
    known = world.network_condition(Condition(torch.tensor([[farthest]]), action))
    torch.testing.assert_close(known["action"], torch.tensor([[[sign, -sign / 2, sign / 2]]]))
    torch.testing.assert_close(known["time_shift"], torch.tensor([[sign]]))


def test_a_reprojecting_network_knows_the_camera_of_cropped_frames(config: Callable[..., TrainConfig]):
    """90 degrees across 640 pixels; frames of 1:2 keep 320 of 480 rows."""
    options = ("--data.image_size", "[32, 64]", "--model.reprojection", "true", "--model.output_channels", "4")
    mine = config(*options)
    dataset = WindowDataset(mine.data, "train")
    dataset.info = replace(dataset.info, camera=Camera(640, 480, math.pi / 2, eye_height=1.0))
    assert build_world(mine, dataset).cdit.config.focal == pytest.approx((1.0, 2.0))


def test_a_model_that_is_not_conditioned_on_actions_has_none(
    config: Callable[..., TrainConfig], train_set: WindowDataset
):
    assert build_world(config(), train_set).description.has_actions
    assert not build_world(config("--model.use_action", "false"), train_set).description.has_actions


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["--data.image_size", "[32, 36]"], "patch_size"),
        (["--model.hidden_size", "33"], "hidden_size"),
        (["--model.num_heads", "3"], "num_heads"),
        (["--codec.kind", "tiny", "--codec.name", "nowhere"], "codec.name"),
    ],
)
def test_sizes_that_do_not_fit(
    config: Callable[..., TrainConfig],
    train_set: WindowDataset,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    named: str,
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=named):
        build_world(config(*overrides), train_set)


@pytest.mark.slow
def test_machines_on_one_file_system_prepare_a_dataset_once(tmp_path: Path):
    """Two processes that are each the first of their machine; recipes delete what is half done."""
    script, runs = tmp_path / "make.py", tmp_path / "runs"
    script.write_text(
        "import shutil, sys, time, pathlib\n"
        f"open({str(runs)!r}, 'a').write('ran\\n')\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "shutil.rmtree(folder, ignore_errors=True)\n"
        "folder.mkdir(parents=True)\n"
        "time.sleep(1)\n"
        "(folder / 'dataset.json').write_text('{\"name\": \"it\"}')\n"
    )
    folder = tmp_path / "data" / "mine"
    program = (
        "import types\n"
        "from cdit.data.config import DataConfig\n"
        "from cdit.training.setup import prepare_data\n"
        "machine = types.SimpleNamespace(is_local_main_process=True, wait_for_everyone=lambda: None)\n"
        f"prepare_data(DataConfig(folder={str(folder)!r}, prepare={f'{script} {folder}'!r}), machine)\n"
    )
    machines = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(2)]
    assert [machine.wait() for machine in machines] == [0, 0]
    assert runs.read_text() == "ran\n"
    assert (folder / "dataset.json").is_file()


def test_a_missing_dataset_is_prepared_once(tmp_path: Path, accelerator: Accelerator):
    folder, script = tmp_path / "new set", tmp_path / "make it.py"
    script.write_text(
        "import pathlib, sys\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "folder.mkdir(exist_ok=True)\n"
        "(folder / 'dataset.json').write_text('{}')\n"
        "(folder / 'runs').open('a').write(sys.executable + '\\n')\n"
    )
    config = DataConfig(folder=str(folder), prepare=f"'{script}' '{folder}'")
    prepare_data(config, accelerator)
    prepare_data(config, accelerator)
    assert (folder / "runs").read_text().split("\n") == [sys.executable, ""]


def test_a_dataset_without_a_description_is_not_prepared(tmp_path: Path, accelerator: Accelerator):
    (tmp_path / "mine" / "splits").mkdir(parents=True)
    prepare_data(DataConfig(folder=str(tmp_path / "mine"), prepare="no_such_script.py"), accelerator)


@pytest.mark.parametrize("source", ["video", "lerobot"])
def test_files_of_other_sources_are_not_prepared(tmp_path: Path, accelerator: Accelerator, source: str):
    config = DataConfig(folder=str(tmp_path / "mine"), source=source, prepare="no_such_script.py")
    with pytest.raises(UserError, match=r"data\.prepare"):
        prepare_data(config, accelerator)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "drive.mp4").touch()
    prepare_data(config, accelerator)
    prepare_data(DataConfig(folder="s3://bucket/walks", prepare="no_such_script.py"), accelerator)


def test_a_failing_preparation_names_field_and_command(tmp_path: Path, accelerator: Accelerator):
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit(7)")
    with pytest.raises(UserError, match=r"data\.prepare.*fails\.py.*7"):
        prepare_data(DataConfig(folder=str(tmp_path / "none"), prepare=str(script)), accelerator)


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_a_schedule_over_another_number_of_steps_is_followed_from_there(name: str):
    config = OptimizerConfig(learning_rate=2e-3, warmup_steps=4, schedule=name, decay_share=0.5)

    def begin(steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        return build_optimizer({"model": torch.nn.Linear(2, 2)}, config, steps)

    expected = learning_rates(config, 16)
    optimizer, schedule = begin(12)
    for _ in range(8):
        optimizer.step()
        schedule.step()
    later_optimizer, later_schedule = begin(16)
    later_optimizer.load_state_dict(optimizer.state_dict())
    resume_schedule(later_schedule, json.loads(json.dumps(schedule.state_dict())))  # as a checkpoint stores it
    for rate in expected[8:]:
        assert {group["lr"] for group in later_optimizer.param_groups} == {rate}
        later_optimizer.step()
        later_schedule.step()


def test_a_schedule_of_time_continues_as_one_of_steps(world: WorldModel):
    """At the given step, not at the share of the time that the schedule counted."""
    config = OptimizerConfig(warmup_steps=0, schedule="cosine")
    _, timed = build_optimizer({"model": world.cdit}, config, 16)
    timed.last_epoch = 16.0  # all of its time
    optimizer, schedule = build_optimizer({"model": world.cdit}, config, 16)
    resume_schedule(schedule, timed.state_dict(), 8)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(config.learning_rate / 2)


def test_how_long_processes_wait_for_one_another(config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    accelerator, _ = build_accelerator(config("--timeout_minutes", "2.5"))
    assert accelerator.init_handler.timeout.total_seconds() == 150


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "parts"),
    [
        (8, None, 1, 1),
        (8, None, 2, 1),
        (8, 2, 2, 2),
        (8, 99, 2, 1),
        (8, 3, 1, 3),
        (8, 3, 2, 2),
        (7, 1, 2, 4),
        (1, 1, 2, 1),
    ],
)
def test_parts_of_a_share(
    config: Callable[..., TrainConfig], batch: int, micro: int | None, processes: int, parts: int
):
    options = [] if micro is None else ["--micro_batch_size", str(micro)]
    assert micro_batches(config("--batch_size", str(batch), *options), processes) == parts


def test_processes_that_do_not_find_each_other_do_not_start(
    config: Callable[..., TrainConfig], accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
):
    """As torchrun's where there is no GPU: each would train by itself, in the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"2 processes were launched.*accelerate launch --cpu"):
        build_accelerator(config())
