"""Two processes that share the weights train as one that has them all."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file
from sharded import AVERAGE, DIALECTS, MAX_NORM, MUON, STEPS, batch, build, loss_of, states
from torch import Tensor

from cdit.common.errors import UserError
from cdit.training.config import EMAConfig, TrainConfig
from cdit.training.ema import EMA
from cdit.training.setup import build_accelerator, build_optimizer
from cdit.training.sharding import shard, take_wish, whole, whole_world
from cdit.world_model import WorldModel

SHARDED = Path(__file__).with_name("sharded.py")
TRAIN = Path(__file__).parents[2] / "train.py"
LAUNCH = TRAIN.parent / "configs/accelerate/fsdp2_8gpu.yaml"
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
WISH = {"ACCELERATE_USE_FSDP": "true"}
KINDS = ("weights", "averages", "exp_avg", "exp_avg_sq", "momentum_buffer")
RUNS = (*DIALECTS, "muon")


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative distance of a tensor."""
    assert set(found) == set(expected)
    errors = [(found[n] - expected[n]).norm() / expected[n].norm().clamp(min=1e-6) for n in expected]
    return max((error.item() for error in errors), default=0.0)


def same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


def without_key_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is added to all keys changes no attention: its gradient is rounding errors, which AdamW makes large."""
    same_frame = re.compile(r"(blocks\.\d+\.self_attn|wide_blocks\.\d+\.attn)\.kv\.bias")
    return {name: tensor[len(tensor) // 2 :] if same_frame.fullmatch(name) else tensor
            for name, tensor in tensors.items()}  # fmt: skip


@pytest.fixture(scope="module")
def shared(
    launch: Callable[..., subprocess.CompletedProcess], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict]]:
    """What each of two processes finds."""
    out = tmp_path_factory.mktemp("shared")
    done = launch(SHARDED, out, processes=2, **WISH)
    assert done.returncode == 0, done.stderr
    return {name: [torch.load(out / f"{name}_{i}.pt") for i in range(2)] for name in (*RUNS, "bfloat16")}


def alone(run: str) -> dict:
    """The same training in plain PyTorch on the batch of both processes, its clipping and average by hand."""
    dialect = "native" if run == "muon" else run
    network = build(dialect)
    matrices, others = ([p for p in network.parameters() if (p.ndim >= 2) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99))
    if run == "muon":  # against torch's: test_muon.py
        optimizer, _ = build_optimizer({"model": network}, MUON, STEPS)
    averages = {name: p.detach().clone() for name, p in network.named_parameters()}
    start = {name: x.clone() for name, x in averages.items()}
    losses, norms, direct = [], [], []
    for step in range(STEPS):
        loss = sum(loss_of(network(**batch(step, process)), step, process) for process in range(2)) / 2
        optimizer.zero_grad()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in network.parameters()]).double().norm().item()
        for p in network.parameters():
            p.grad *= min(1.0, MAX_NORM / norm)
        optimizer.step()
        for name, p in network.named_parameters():
            averages[name] = AVERAGE.decay * averages[name] + (1 - AVERAGE.decay) * p.detach()
        with torch.no_grad():
            averaged = build(dialect)
            averaged.load_state_dict(averages)
            direct.append(averaged(**batch(0, 0)))
        losses.append(loss.item())
        norms.append(norm)
    named = dict(network.named_parameters())
    return {
        "start": start,
        "losses": losses,
        "norms": norms,
        "direct": torch.stack(direct),
        "weights": {name: p.detach() for name, p in named.items()},
        "averages": averages,
        **states(network, optimizer),
    }


@pytest.mark.slow
@pytest.mark.parametrize("dialect", RUNS)
def test_each_process_holds_its_rows_and_no_more(shared: dict[str, list[dict]], dialect: str):
    rows = {len(tensor) for tensor in shared[dialect][0]["whole"]["weights"].values()}
    assert 36 in rows  # of which both processes have as much
    assert any(n % 2 for n in rows)  # of which the second has less
    if dialect == "encoder":
        assert {1, 35} <= rows  # of one row the second has nothing
    for kind in KINDS:
        complete = sum(tensor.numel() for tensor in shared[dialect][0]["whole"][kind].values())
        for name, tensor in shared[dialect][0]["whole"][kind].items():
            first, second = (process["rows"][kind][name] for process in shared[dialect])
            assert len(first) == -(-len(tensor) // 2)
            assert torch.equal(torch.cat((first, second)), tensor)
        for process in shared[dialect]:
            assert process["bytes"][kind] <= 0.51 * 4 * complete


@pytest.mark.slow
@pytest.mark.parametrize("dialect", RUNS)
def test_steps_are_those_of_one_process(shared: dict[str, list[dict]], dialect: str):
    # Muon rounds gradients to bfloat16; small gradients of a wide head show how its keys' undetermined biases differ.
    expected, far = alone(dialect), {"muon": 100, "wide": 10}.get(dialect, 1)
    assert max(expected["norms"]) > 1.1 * MAX_NORM  # so that clipping matters
    for process in shared[dialect]:
        assert process["losses"] == pytest.approx(expected["losses"], rel=far * 1e-5)
        assert process["norms"] == pytest.approx(expected["norms"], rel=far * 1e-5)
        for kind in KINDS:
            assert distance(*map(without_key_bias, (process["whole"][kind], expected[kind]))) < far * 1e-4
    assert distance(expected["averages"], expected["start"]) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("dialect", RUNS)
def test_averages_in_place_and_a_context_encoded_before(shared: dict[str, list[dict]], dialect: str):
    expected = alone(dialect)["direct"]
    assert (expected[0] - expected[-1]).abs().max() > 1e-2
    for process in shared[dialect]:
        torch.testing.assert_close(process["cached"], expected, rtol=1e-4, atol=1e-3 if dialect == "muon" else 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dialect", RUNS)
def test_a_step_that_one_process_spoils_is_taken_by_none(shared: dict[str, list[dict]], dialect: str):
    for process in shared[dialect]:
        assert np.isnan(process["bad norm"])
        assert same_bits(process["after a bad step"], process["whole"]["weights"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dialect", "gathered"),
    [
        ("native", torch.bfloat16),
        ("nwm", torch.bfloat16),
        ("encoder", torch.float32),
        ("levers", torch.bfloat16),
        ("wide", torch.bfloat16),
    ],
)
def test_under_autocast_the_bits_are_those_of_ddp(shared: dict[str, list[dict]], dialect: str, gathered: torch.dtype):
    """Also where weights travel in bfloat16; they do where autocast would round them first of all."""
    for process in shared["bfloat16"]:
        found = process[dialect]
        assert found["gathered"] == [gathered]
        assert torch.equal(found["sharded"]["output"], found["ddp"]["output"])
        if dialect == "levers":  # whose keys and values each use the context: their gradients are added block by block
            assert distance(found["sharded"], found["ddp"]) < 0.02
        else:
            assert same_bits(found["sharded"], found["ddp"])
        assert found["ddp"]["output"].abs().max() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_block_is_gathered_twice_a_step(shared: dict[str, list[dict]], dialect: str):
    """Forward and backward, though its keys and values are made of a context that is encoded before all blocks."""
    parts = 2 + DIALECTS[dialect].get("context_depth", 0) + DIALECTS[dialect].get("wide_head_depth", 0) + 1
    for process in shared["bfloat16"]:
        assert process[dialect]["traffic"] == {"c10d._allgather_base_": 2 * parts, "c10d._reduce_scatter_base_": parts}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=CUDA)])
def one(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Accelerator]:
    """A process that shares with nobody, on a CPU or a GPU: sharded all the same."""
    PartialState._reset_state()
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=request.param == "cpu", mixed_precision="no")
    backend = {"cpu": "gloo", "cuda": "nccl"}[request.param]
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield accelerator
    dist.destroy_process_group()
    PartialState._reset_state()
    AcceleratorState._reset_state()


def test_the_average_comes_and_goes_where_the_weights_are(one: Accelerator, world: WorldModel):
    cdit = world.cdit
    before = {name: p.detach().clone() for name, p in cdit.named_parameters()}
    network = shard(cdit, one)
    ema = EMA(cdit, EMAConfig(decay=0.75, warmup_power=0))
    with torch.no_grad():
        for parameter in cdit.parameters():
            parameter.add_(1.0)
    ema.step()
    with ema.applied():
        averaged = whole_world(world, one)
        assert not network.training
        for name, parameter in averaged.cdit.named_parameters():
            assert type(parameter) is torch.nn.Parameter
            assert parameter.device.type == one.device.type
            torch.testing.assert_close(parameter.cpu(), before[name] + 0.25)
    for name, parameter in cdit.named_parameters():
        assert parameter.device.type == one.device.type
        torch.testing.assert_close(whole(parameter).cpu(), before[name] + 1.0)


def test_fp16_is_refused(config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cdit.training.setup.take_wish", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(UserError, match="mixed_precision is fp16, expected no or bf16 with sharded weights"):
        build_accelerator(config("--mixed_precision", "fp16"))


@pytest.mark.parametrize(
    ("variables", "sharded"),
    [
        ({}, False),
        ({"WORLD_SIZE": "2"}, False),
        ({"ACCELERATE_USE_FSDP": "false", "WORLD_SIZE": "2"}, False),
        ({"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2"}, True),
        ({"ACCELERATE_USE_FSDP": "true"}, False),
    ],
)
def test_the_wish_is_taken_from_the_launcher(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], sharded: bool):
    for name in ("ACCELERATE_USE_FSDP", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert take_wish() is sharded
    assert "ACCELERATE_USE_FSDP" not in os.environ


@pytest.fixture(scope="module")
def run(home: Path, environment: dict[str, str], tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of train.py on two processes that share the weights, started as configs/ has it."""
    output = tmp_path_factory.mktemp("sharded_run")
    launcher = ["-m", "accelerate.commands.launch", "--config_file", LAUNCH, "--num_processes", "2"]
    options = ["--config", tiny, "--output", output, "--probe.every", "4"]
    done = subprocess.run(
        [sys.executable, *launcher, TRAIN, *options],
        cwd=home,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return output / "tiny"


def stopped(run: Path, output: Path, step: int) -> Path:
    """A copy of the run as if it had been stopped after that step."""
    copy = Path(shutil.copytree(run, output / "tiny", symlinks=True))
    for later in copy.glob("checkpoints/step_*"):
        if int(later.name.removeprefix("step_")) > step:
            shutil.rmtree(later)
    for result in ("last", "best"):
        shutil.rmtree(copy / result)
    return copy


def consolidated(checkpoint: Path, kind: str) -> dict[str, Tensor]:
    first, second = (load_file(checkpoint / f"{kind}-{i}-of-00002.safetensors") for i in ("00001", "00002"))
    return {name: torch.cat((first[name], second[name])) if first[name].ndim else first[name] for name in first}


def weights(model: Path) -> dict[str, Tensor]:
    return load_file(model / "cdit/diffusion_pytorch_model.safetensors")


@pytest.mark.slow
def test_training_is_that_of_one_process(run: Path, straight: Path, rows: Callable[..., list[dict[str, float]]]):
    for field in ("train/loss", "train/gradient_norm", "validation/loss", "probe/lpips/model/1_frames"):
        expected, measured = rows(straight, field), rows(run, field)
        assert expected, field
        for row in expected:
            (found,) = (other for other in measured if other["step"] == row["step"])
            assert found[field] == pytest.approx(row[field], rel=1e-3)
    assert distance(weights(run / "last"), weights(straight / "last")) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{}, WISH], ids=["replicated", "sharded"])
def test_rollouts_and_noise_of_two_processes_are_those_of_one(
    train: Callable[..., Path],
    launch: Callable[..., subprocess.CompletedProcess],
    tiny: Path,
    rows: Callable[..., list[dict[str, float]]],
    tmp_path: Path,
    variables: dict[str, str],
):
    options = ["--objective", "self_rollout", "--data.rollout", "2", "--steps", "3", "--probe.final_samples", "1"]
    options += ["--model.context_noise", "0.3", "--sampler.context_noise", "0.1"]
    alone = train(tmp_path / "alone", *options)
    done = launch(TRAIN, "--config", tiny, "--output", tmp_path, *options, processes=2, **variables)
    assert done.returncode == 0, done.stderr
    for field in ("train/loss", "train/gradient_norm", "validation/loss"):
        expected, measured = rows(alone, field), rows(tmp_path / "tiny", field)
        assert [row[field] for row in measured] == pytest.approx([row[field] for row in expected], rel=1e-3), field


@pytest.mark.slow
def test_checkpoints_hold_each_processes_half(run: Path):
    checkpoint = run / "checkpoints" / "step_00000006"
    for kind in ("model", "average", "optimizer"):
        sizes = [(checkpoint / f"{kind}-{i}-of-00002.safetensors").stat().st_size for i in ("00001", "00002")]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.05)
        assert not (checkpoint / f"{kind}.safetensors").exists()


@pytest.mark.slow
def test_saved_models_are_whole_and_the_average(run: Path):
    average = consolidated(run / "checkpoints" / "step_00000006", "average")
    assert same_bits(weights(run / "last"), average)
    assert not same_bits(consolidated(run / "checkpoints" / "step_00000006", "model"), average)
    losses = {row["step"]: row["validation/loss"] for row in map(json.loads, (run / "metrics.jsonl").open())
              if "validation/loss" in row}  # fmt: skip
    best = min(losses, key=losses.get)
    assert same_bits(weights(run / "best"), consolidated(run / "checkpoints" / f"step_{best:08d}", "average"))
    world = WorldModel.from_pretrained(run / "last")
    assert same_bits(dict(world.cdit.named_parameters()), average)
    assert (run / "probes/step_00000004/predictions.png").is_file()
    assert (run / "probes/step_00000006/rollout_0.mp4").is_file()


@pytest.mark.slow
def test_resumed_to_the_last_bit(
    launch: Callable[..., subprocess.CompletedProcess],
    run: Path,
    tiny: Path,
    tmp_path: Path,
    rows: Callable[..., list[dict[str, float]]],
):
    copy = stopped(run, tmp_path, 3)
    options = ("--config", tiny, "--output", tmp_path, "--probe.every", "4", "--resume", "auto")
    done = launch(TRAIN, *options, processes=2, **WISH)
    assert done.returncode == 0, done.stderr
    assert rows(copy) == rows(run)
    for kind in ("model", "average", "optimizer"):
        found, expected = (consolidated(r / "checkpoints" / "step_00000006", kind) for r in (copy, run))
        assert same_bits(found, expected)
    for model in ("last", "best"):
        assert same_bits(weights(copy / model), weights(run / model))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_goes_on_unsharded(
    launch: Callable[..., subprocess.CompletedProcess],
    train: Callable[..., Path],
    run: Path,
    tiny: Path,
    tmp_path: Path,
    rows: Callable[..., list[dict[str, float]]],
    processes: int,
):
    copy = stopped(run, tmp_path, 3)
    if processes == 1:
        train(tmp_path, "--resume", "auto")
    else:
        done = launch(TRAIN, "--config", tiny, "--output", tmp_path, "--resume", "auto", processes=2)
        assert done.returncode == 0, done.stderr
    assert (copy / "checkpoints" / "step_00000006" / "model.safetensors").is_file()
    for row, expected in zip(rows(copy, "train/loss"), rows(run, "train/loss"), strict=True):
        assert row["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-4)
    assert distance(weights(copy / "last"), weights(run / "last")) < 1e-3


@pytest.mark.slow
def test_goes_on_sharded_from_one_process(
    launch: Callable[..., subprocess.CompletedProcess],
    straight: Path,
    tiny: Path,
    tmp_path: Path,
):
    """Among three, a sample at a time; where they validate there is nothing to do for one of them."""
    copy = stopped(straight, tmp_path, 3)
    options = ("--config", tiny, "--output", tmp_path, "--micro_batch_size", "1", "--validation.samples", "2")
    done = launch(TRAIN, *options, "--resume", "auto", processes=3, **WISH)
    assert done.returncode == 0, done.stderr
    assert (copy / "checkpoints" / "step_00000006" / "model-00003-of-00003.safetensors").is_file()
    assert distance(weights(copy / "last"), weights(straight / "last")) < 1e-3


@pytest.mark.slow
def test_muon_goes_on_to_the_last_bit(
    launch: Callable[..., subprocess.CompletedProcess], tiny: Path, tmp_path: Path, train: Callable[..., Path]
):
    """Sharded after being sharded; and from the same checkpoint in one process, near it."""
    options = ("--optimizer.name", "muon", "--probe.final_samples", "1", "--probe.rollouts", "0")
    for part in (("--name", "whole"), ("--name", "pieces", "--stop_at", "3"), ("--name", "pieces", "--resume", "auto")):
        done = launch(TRAIN, "--config", tiny, "--output", tmp_path, *options, *part, processes=2, **WISH)
        assert done.returncode == 0, done.stderr
    for kind in ("model", "average", "optimizer"):
        found, expected = (consolidated(tmp_path / r / "checkpoints/step_00000006", kind) for r in ("pieces", "whole"))
        assert same_bits(found, expected)
    assert any(name.endswith("momentum_buffer") for name in expected)
    stopped(tmp_path / "whole", tmp_path / "alone", 3)
    alone = train(tmp_path / "alone", *options, "--resume", "auto")
    assert distance(weights(alone / "last"), weights(tmp_path / "whole" / "last")) < 0.01
