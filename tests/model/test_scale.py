"""Memory, traffic and intervals against a network's own tensors, simulated rings and numerical minima."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dialects import build

from cdit.common.errors import UserError
from cdit.model import CDiT
from cdit.model.__main__ import main
from cdit.model.describe import counted_flops
from cdit.model.scale import (
    BUCKET,
    Hardware,
    Run,
    all_reduce_seconds,
    checkpoint_interval,
    gather_seconds,
    largest_micro_batch,
    link_rate,
    muon_flops,
    state_bytes,
    step,
)
from cdit.training.config import OptimizerConfig
from cdit.training.setup import build_optimizer

ROOT = Path(__file__).parents[2]
HARDWARE = Hardware()


def a_run(batch_size: int = 64, micro_batch_size: int | None = None, checkpointing: bool = False) -> Run:
    with torch.device("meta"):
        cdit = CDiT((28, 28), 4, 4)
    return Run(cdit, 4, 4, batch_size, micro_batch_size, checkpointing)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_state_is_that_of_the_optimizer_and_the_average(name):
    """Twenty bytes a parameter with AdamW, counted on tensors."""
    cdit = build("encoder").train()
    optimizer, _ = build_optimizer({"model": cdit}, OptimizerConfig(name=name), 2)
    for p in cdit.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    moments = [x for state in optimizer.state.values() for key, x in state.items() if key != "step"]
    average = [p.detach().clone() for p in cdit.parameters()]
    kept = [*cdit.parameters(), *(p.grad for p in cdit.parameters()), *moments, *average]
    state = state_bytes(Run(cdit, 3, 3, 8, None, False, name), 1, "DDP")
    named = ("weights", "gradients", "moments", "average")
    assert sum(state[part] for part in named) == sum(x.nbytes for x in kept)
    assert (sum(x.nbytes for x in kept) == 20 * sum(p.numel() for p in cdit.parameters())) == (name == "adamw")
    assert set(state) == {*named, "bfloat16 copies"}


def test_muons_flops_are_those_counted():
    cdit = build("encoder", mlp_ratio=2.5)
    optimizer, _ = build_optimizer({"model": cdit}, OptimizerConfig(name="muon"), 2)
    for p in cdit.parameters():
        p.grad = torch.ones_like(p)
    assert muon_flops(Run(cdit, 3, 3, 8, None, False, "muon")) == counted_flops(optimizer.step)
    assert muon_flops(Run(cdit, 3, 3, 8, None, False)) == 0


def test_muon_gathers_its_updates_where_weights_are_sharded():
    adamw, muon = (replace(a_run(), optimizer=name) for name in ("adamw", "muon"))
    for mode, gpus in (("DDP", 8), ("FSDP2", 8), ("FSDP2", 64)):
        before, after = (step(run, gpus, mode, HARDWARE) for run in (adamw, muon))
        assert after.compute - before.compute == pytest.approx(muon_flops(muon) / 400e12)
        more = 0.0
        if mode == "FSDP2":  # 16 D² in each of twelve blocks, of which K and V are two of eight matrices
            more = gather_seconds(2 * 12 * 16 * 384**2, gpus, 12 * 10, HARDWARE)
        assert after.communication - before.communication == pytest.approx(more)
        assert after.exposed - before.exposed == pytest.approx(more)


def test_sharding_divides_what_is_kept_and_not_what_is_gathered():
    run = a_run()
    eight, more = state_bytes(run, 8, "FSDP2"), state_bytes(run, 16, "FSDP2")
    for name, size in eight.items():
        assert more[name] == (size if name == "gathered" else size / 2)
    blocks = sum(p.numel() for p in run.cdit.blocks.parameters())
    assert eight["gathered"] == 10 * blocks / 12 + 4 * (run.parameters - blocks)
    replicated = state_bytes(run, 8, "DDP")
    assert replicated["buckets"] == replicated["gradients"] == 8 * eight["gradients"]


def test_the_blocks_of_a_wide_head_are_gathered_like_others():
    with torch.device("meta"):
        cdit = CDiT((28, 28), 4, 4, wide_head_depth=2, wide_head_width=1024)
    run = replace(a_run(), cdit=cdit)
    one = sum(p.numel() for p in cdit.wide_blocks[1].parameters())
    rest = run.parameters - sum(p.numel() for p in cdit.blocks.parameters()) - 2 * one
    assert state_bytes(run, 8, "FSDP2")["gathered"] == 10 * one + 4 * rest
    slow = replace(HARDWARE, latency_us=1e6)
    sent = [step(replace(run, cdit=x), 8, "FSDP2", slow).communication for x in (cdit, a_run().cdit)]
    assert sent[0] - sent[1] == pytest.approx(3 * 7 * 2, rel=1e-3)  # two more messages, three times, over seven hops


@pytest.mark.parametrize("gpus", [2, 3, 8])
def test_a_ring_sends_what_the_formula_says(gpus):
    """Chunks are really passed around: each GPU ends with the sum, after 2(P-1) hops of a P-th each."""
    held = np.random.default_rng(0).normal(size=(gpus, gpus))  # GPU, chunk
    expected, hops = held.sum(axis=0), 0
    for combine in (True, False):
        for round_ in range(gpus - 1):
            sent = [(gpu - round_ + (0 if combine else 1)) % gpus for gpu in range(gpus)]
            values = [held[gpu, sent[gpu]] for gpu in range(gpus)]
            for gpu in range(gpus):
                to = (gpu + 1) % gpus
                held[to, sent[gpu]] = values[gpu] + (held[to, sent[gpu]] if combine else 0)
            hops += 1
    np.testing.assert_allclose(held, np.tile(expected, (gpus, 1)))
    size, rate = 1e9, link_rate(gpus, HARDWARE)
    slow = Hardware(latency_us=0)
    assert all_reduce_seconds(size, gpus, 1, slow) == pytest.approx(hops * size / gpus / rate)
    assert gather_seconds(size, gpus, 1, slow) == pytest.approx(hops / 2 * size / gpus / rate)
    # Nothing but latency: a message of a byte.
    assert gather_seconds(1, gpus, 3, HARDWARE) == pytest.approx(3 * hops / 2 * 5e-6, rel=1e-3)


def test_trees_take_over_where_hops_cost_more_than_bytes():
    one_bucket = all_reduce_seconds(BUCKET, 512, 1, HARDWARE)
    assert one_bucket == pytest.approx(2 * 9 * 5e-6 + 2 * BUCKET / 320e9)
    assert one_bucket < 2 * 511 * 5e-6


def test_nodes_are_as_fast_as_their_adapters_together():
    assert link_rate(8, HARDWARE) == 360e9
    assert link_rate(16, HARDWARE) == 320e9
    assert link_rate(16, Hardware(node_link_gb_s=400)) == 360e9


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_has_the_flops_of_its_forward_and_backward_pass(checkpointing):
    """Counted through autograd; maps whose input needs no gradient make the difference."""
    cdit = CDiT((8, 8), 4, 3, hidden_size=64, depth=6, num_heads=2).train()
    if checkpointing:
        cdit.enable_gradient_checkpointing()
    each = torch.rand(2, 3)
    frames = torch.randn(2, 3, 4, 8, 8)
    condition = {"action": each[..., None].expand(2, 3, 3), "time_shift": each}
    counted = counted_flops(lambda: cdit(frames, each, condition, frames).sum().backward())
    seconds = step(Run(cdit, 3, 3, 2, None, checkpointing), 1, "DDP", Hardware(tflops=1.0)).compute
    assert seconds * 1e12 == pytest.approx(counted, rel=0.03)


def test_what_is_sent_is_hidden_behind_what_it_is_sent_beside():
    run = a_run(64, 2)
    for gpus in (8, 32):
        count, size = run.micro_batches(gpus)
        assert count * size * gpus == 64
        for mode in ("DDP", "FSDP2"):
            slow, fast = (step(run, gpus, mode, Hardware(tflops=rate)) for rate in (1e-3, 1e6))
            assert slow.exposed == 0
            assert slow.efficiency == 1
            assert fast.exposed == pytest.approx(fast.communication, rel=1e-3)
            assert fast.efficiency < 0.01
            assert slow.communication == fast.communication
    # DDP sends once a step, FSDP2 at each micro-batch.
    once, four = (step(a_run(64, size), 8, "DDP", HARDWARE) for size in (None, 2))
    assert once.communication == four.communication
    once, four = (step(a_run(64, size), 8, "FSDP2", HARDWARE) for size in (None, 2))
    assert four.communication == pytest.approx(4 * once.communication)


@pytest.mark.parametrize(
    ("batch_size", "micro_batch_size", "gpus"), [(64, 16, 8), (1000, 16, 7), (3, None, 8), (9, 4, 1)]
)
def test_every_context_has_a_place(batch_size, micro_batch_size, gpus):
    count, size = a_run(batch_size, micro_batch_size).micro_batches(gpus)
    assert gpus * count * size >= batch_size
    assert gpus * count * (size - 1) < batch_size
    assert size <= (micro_batch_size or batch_size)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", ["DDP", "FSDP2"])
def test_the_largest_micro_batch_fits_and_one_more_does_not(mode, checkpointing):
    run = a_run()
    fits = largest_micro_batch(run, 8, mode, checkpointing, 20e9)
    assert fits > 1

    def free(memory: float) -> int:
        return largest_micro_batch(run, 8, mode, checkpointing, memory)

    low = next(memory for memory in np.arange(20e9, 0, -5e6) if free(memory) < fits)
    assert free(low) == fits - 1
    assert free(sum(state_bytes(run, 8, mode).values())) == 0
    assert free(1e6) == 0
    assert largest_micro_batch(run, 8, mode, True, 20e9) > 5 * largest_micro_batch(run, 8, mode, False, 20e9)


def test_the_interval_loses_least():
    """Against the minimum, found numerically, of the time that failures at random moments cost."""
    stopped, hours = 2.0, 10.0
    interval, lost = checkpoint_interval(stopped, hours)
    tried = np.geomspace(10, 36000, 20001)
    # Failures come at any moment of an interval alike: half of one is lost each time.
    costs = stopped / tried + tried / 2 / (3600 * hours)
    assert interval == pytest.approx(tried[costs.argmin()], rel=1e-3)
    assert lost == pytest.approx(costs.min(), rel=1e-6)


@pytest.mark.parametrize("option", ["--hardware.tflops=0", "--hardware.gpus=[0]"])
def test_no_hardware_is_refused(monkeypatch, option):
    monkeypatch.setattr("sys.argv", ["cdit.model", "scale", option])
    with pytest.raises(UserError, match=r"hardware\.\w+ is 0"):
        main()


def test_the_command_line(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    arguments = ["scale", "--config", "configs/nwm_cdit_s.yaml", "--hardware.gpus", "[1,8]", "--batch_size", "128"]
    monkeypatch.setattr("sys.argv", ["cdit.model", *arguments])
    main()
    out = capsys.readouterr().out
    assert "128 contexts" in out
    tables = [block.splitlines() for block in out.split("\n\n") if block.startswith("|")]
    assert len(tables) == 4
    for table in tables:
        assert len({line.count("|") for line in table}) == 1
    assert [line.split("|")[1].strip() for line in tables[2][2:]] == ["1", "8"]
    assert "| 1 × 16 |" in tables[2][3]
