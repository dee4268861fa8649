"""Fully sharded training (FSDP2): every process holds some rows of each weight, of its average and of its moments.

The weights of a block are gathered while it computes, and its gradients are reduced to the processes that hold their
rows. This is torch's `fully_shard` (Zhao et al. 2023, arXiv 2304.11277), on CPUs (gloo) and GPUs (NCCL) alike;
parameters become `DTensor`s, split along their first dimension. Gradients are reduced after each micro-batch, which
costs communication but keeps no complete gradient in memory.
"""

import os
import warnings

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from cdit.model import CDiT
from cdit.model.attention import MultiHeadAttention
from cdit.world_model import WorldModel


def take_wish() -> bool:
    """Whether `accelerate launch` requests sharding (`distributed_type: FSDP`) and there are several processes.

    Must be called before an `Accelerator` is created. Removes the request from the environment: an `Accelerator` would
    otherwise shard by itself on GPUs, without the rules of `shard`, and on CPUs silently replicate the whole network.
    """
    requested = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return requested and int(os.environ.get("WORLD_SIZE", 1)) > 1


def bare_networks(world: WorldModel) -> dict[str, nn.Module]:
    """The unwrapped networks that a run saves: the CDiT (`model`) and those of the objective (`objective.<name>`)."""
    further = {
        f"objective.{name}": extract_model_from_parallel(network, keep_torch_compile=False)
        for name, network in world.objective.networks.items()
    }
    return {"model": world.cdit, **further}


def prepare_networks(world: WorldModel, accelerator: Accelerator, sharded: bool, compile: bool = False) -> nn.Module:
    """Moves a world to the accelerator's device, replicated or sharded over its processes, and returns the network to
    train.

    Networks of the objective that are trained, or are CDiTs, run in the same precision, the trained ones and sharded
    CDiTs distributed in the same way; others are only moved.
    """
    conditioners = set(world.cdit.config.extra_conditioners or ()) - world.objective.conditioners.keys()
    if conditioners or (world.cdit.config.use_action and not world.description.has_actions):
        # Conditioners whose values the dataset lacks get no gradient.
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    world.codec.to(accelerator.device)
    networks = world.objective.networks
    for name, network in networks.items():
        trained = any(p.requires_grad for p in network.parameters())
        if sharded and (trained or isinstance(network, CDiT)):
            networks[name] = shard(network, accelerator, compile)
        elif trained:
            networks[name] = accelerator.prepare(network)
        elif isinstance(network, CDiT):
            networks[name] = accelerator.prepare_model(network, evaluation_mode=True)  # precision and compilation alone
        else:
            networks[name] = network.to(accelerator.device)
    return shard(world.cdit, accelerator, compile) if sharded else accelerator.prepare(world.cdit)


def shard(network: nn.Module, accelerator: Accelerator, compile: bool = False) -> nn.Module:
    """Shards a network in place over two or more processes, and returns the network to train.

    This replaces its parameters, so create an optimizer or an average afterwards. They must have been identical on
    every process.

    Args:
        network: a CDiT, whose blocks are gathered one by one, or any other module, gathered as a whole; on the CPU, or
            already on the accelerator's device.
        accelerator: its processes and precision. Do not `prepare` the network with it, which would add DDP.
        compile: whether to compile the blocks, one by one, so that gathering stays outside.
    """
    # The warning concerns outputs that are modified in place; predictions are not.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    blocks = (*network.context_blocks, *network.blocks, *network.wide_blocks) if isinstance(network, CDiT) else ()
    for block in blocks:
        if compile:
            block.compile()
        fully_shard(block, mesh=mesh, mp_policy=_precision(block, network, accelerator))
    # By default the outermost part stays gathered after a call and would not see the averaged weights.
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
    if isinstance(network, CDiT):
        for block in network.blocks:
            register_fsdp_forward_method(block, "project_kv")
        register_fsdp_forward_method(network, "encode_context")
    return accelerator.prepare_model(network, device_placement=False, evaluation_mode=True)  # autocast alone


def _precision(block: nn.Module, network: CDiT, accelerator: Accelerator) -> MixedPrecisionPolicy:
    """The precision in which a block's weights are gathered: bfloat16 if autocast would round them at their first use.

    That halves communication, and the memory for rounded copies that autocast keeps for the backward pass, and changes
    no bit. It holds for linear maps, and for the extra keys and values if no rotation comes first. Autocast uses
    everything else in float32; a block with such parameters is gathered in float32.
    """
    rounded_first = {nn.Linear} if network.can_push else {nn.Linear, MultiHeadAttention}
    owners = {type(module) for module in block.modules() if [*module.parameters(recurse=False)]}
    if accelerator.mixed_precision != "bf16" or not owners <= rounded_first:
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    return MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)


def whole(tensor: Tensor) -> Tensor:
    """The complete tensor. Every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_world(world: WorldModel, accelerator: Accelerator) -> WorldModel | None:
    """The world model with complete weights on the main process, None on the others. Every process must call it."""
    weights = None
    if isinstance(world.cdit, FSDPModule):
        weights = get_model_state_dict(world.cdit, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not accelerator.is_main_process:
        return None
    if weights is None:
        return world
    with torch.device("meta"):
        cdit = CDiT.from_config(world.cdit.config)
    cdit.load_state_dict(weights, assign=True)
    return WorldModel(cdit.to(accelerator.device).eval(), world.codec, world.description)
