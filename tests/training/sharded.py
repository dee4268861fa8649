"""Trains small networks for a few steps, sharded as in train.py: a script for torchrun.

    sharded.py OUT

OUT/<dialect>_<process>.pt holds what each process found, see `trained`, and OUT/muon_<process>.pt the same of the
native dialect with another optimizer; OUT/bfloat16_<process>.pt the comparison with DDP under autocast.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from cdit.model import CDiT
from cdit.training.config import EMAConfig, OptimizerConfig
from cdit.training.ema import EMA
from cdit.training.setup import build_optimizer
from cdit.training.sharding import shard, take_wish, whole

STEPS = 5
MAX_NORM = 0.5
OPTIMIZER = OptimizerConfig(learning_rate=0.01, warmup_steps=0, schedule="constant", weight_decay=0.1)
MUON = replace(OPTIMIZER, name="muon")
AVERAGE = EMAConfig(decay=0.8, warmup_power=0)
# 36 rows, 35 of them in one case, and 1, which is less than there are processes.
BASE = {"image_size": (3, 2), "in_channels": 1, "max_context": 2, "patch_size": 1, "hidden_size": 36, "depth": 2,
        "context_noise": 0.5}  # fmt: skip
DIALECTS: dict[str, dict[str, Any]] = {
    "native": {"num_heads": 2},
    "encoder": {"num_heads": 2, "context_depth": 1, "qk_norm": True, "extra_kv": True, "mlp_ratio": 35 / 36},
    "nwm": {"num_heads": 2, "position": "learned", "context_modulation": True, "extra_kv": True},
    "levers": {"num_heads": 2, "steered_queries": True, "context_norm": "keys", "output_channels": 3},
    "wide": {"num_heads": 2, "wide_head_depth": 2, "wide_head_width": 54},
    "reprojection": {"num_heads": 2, "output_channels": 3, "reprojection": True, "place_embedding": True},
}


def build(dialect: str) -> CDiT:
    """A network with every parameter random."""
    torch.manual_seed(0)
    network = CDiT(**BASE, **DIALECTS[dialect])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return network


def batch(step: int, process: int) -> dict[str, Tensor]:
    """What a process has of a step's batch: two contexts with two goals each."""
    draws = torch.Generator().manual_seed(100 * step + process)
    return {
        "sample": torch.randn(2, 2, 1, 3, 2, generator=draws),
        "timestep": 1000 * torch.rand(2, 2, generator=draws),
        "condition": {
            "action": torch.randn(2, 2, 3, generator=draws),
            "time_shift": torch.randn(2, 2, generator=draws),
            "motion": torch.randn(2, 2, 3, generator=draws),
            "action_known": torch.tensor([[True, False], [True, True]]),
        },
        "context": torch.randn(2, 2, 1, 3, 2, generator=draws),
        "context_mask": torch.tensor([[True, True], [False, True]]),
        "noise_level": 0.5 * torch.rand(2, 2, generator=draws),
    }


def loss_of(prediction: Tensor, step: int, process: int) -> Tensor:
    """The mean square of the distance from some target."""
    draws = torch.Generator().manual_seed(100 * step + process + 50)
    return (prediction - torch.randn(prediction.shape, generator=draws)).square().mean()


def states(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The optimizer's tensors of each kind by the parameters that have them."""
    named = [(name, optimizer.state[p]) for name, p in network.named_parameters()]
    kinds = ("exp_avg", "exp_avg_sq", "momentum_buffer")
    return {kind: {name: state[kind] for name, state in named if kind in state} for kind in kinds}


def trained(dialect: str, accelerator: Accelerator, config: OptimizerConfig = OPTIMIZER) -> dict[str, Any]:
    """A few steps, and everything that is left of them: losses, norms, what this process holds, and the whole of it."""
    cdit, process = build(dialect), accelerator.process_index
    network = shard(cdit, accelerator)
    optimizer, _ = build_optimizer({"model": cdit}, config, STEPS)
    optimizer = accelerator.prepare(optimizer)
    ema = EMA(cdit, AVERAGE)
    losses, norms, cached = [], [], []
    for step in range(STEPS):
        with accelerator.accumulate(network):
            loss = loss_of(network(**batch(step, process)), step, process)
            accelerator.backward(loss)
            norms.append(whole(accelerator.clip_grad_norm_(network.parameters(), MAX_NORM)).item())
            optimizer.step()
            optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        ema.step()
        with ema.applied(), torch.no_grad():
            first = batch(0, 0)
            past = first["context"], first.pop("context_mask"), first.pop("noise_level")
            context = network.encode_context(*past)
            cached.append(network(**first | {"context": context}))
    tensors = {
        "weights": dict(cdit.named_parameters()),
        "averages": ema.tensors(),
        **states(cdit, optimizer),
    }
    assert all(isinstance(tensor, DTensor) for named in tensors.values() for tensor in named.values())
    found = {
        "losses": losses,
        "norms": norms,
        "cached": torch.stack(cached),
        "bytes": {
            kind: sum(t.to_local().untyped_storage().nbytes() for t in named.values())
            for kind, named in tensors.items()
        },
        "rows": {kind: {n: t.detach().to_local() for n, t in named.items()} for kind, named in tensors.items()},
        "whole": {kind: {n: whole(t.detach()) for n, t in named.items()} for kind, named in tensors.items()},
    }
    # A gradient that is not finite in one process: none takes the step.
    (network(**batch(0, process)).sum() * (float("nan") if process else 1.0)).backward()
    norm = whole(accelerator.clip_grad_norm_(network.parameters(), MAX_NORM))
    optimizer.optimizer.found_inf = (~norm.isfinite()).float()
    optimizer.step()
    found["after a bad step"] = {name: whole(p.detach()) for name, p in cdit.named_parameters()}
    found["bad norm"] = norm.item()
    return found


def under_autocast(accelerator: Accelerator) -> dict[str, Any]:
    """By dialect: output and gradients, sharded and under DDP; the precision of a block's weights, collectives."""
    found, process = {}, accelerator.process_index
    for dialect in DIALECTS:
        cdit, twin = build(dialect), build(dialect)
        gathered: list[torch.dtype] = []
        cdit.blocks[1].mlp.fc1.register_forward_pre_hook(lambda m, _, seen=gathered: seen.append(m.weight.dtype))
        gradients = []
        for network, bare in ((shard(cdit, accelerator), cdit), (accelerator.prepare(twin), twin)):
            with CommDebugMode() as traffic:
                out = network(**batch(0, process))
                loss_of(out, 0, process).backward()
            if bare is cdit:
                counts = {str(operation): count for operation, count in traffic.get_comm_counts().items()}
            gradients.append({name: whole(p.grad) for name, p in bare.named_parameters()} | {"output": out.detach()})
        found[dialect] = {"sharded": gradients[0], "ddp": gradients[1], "gathered": gathered, "traffic": counts}
    return found


def main(out: str) -> None:
    assert take_wish()
    assert "ACCELERATE_USE_FSDP" not in os.environ
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    for dialect in DIALECTS:
        torch.save(trained(dialect, accelerator), Path(out) / f"{dialect}_{accelerator.process_index}.pt")
    torch.save(trained("native", accelerator, MUON), Path(out) / f"muon_{accelerator.process_index}.pt")
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    torch.save(under_autocast(accelerator), Path(out) / f"bfloat16_{accelerator.process_index}.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
