"""Fully sharded training (FSDP2): every process holds some rows of each weight, of its average and of its moments.

A block's weights are gathered for as long as the block computes, its gradients are summed to where their rows are. It
is torch's own `fully_shard` (Zhao et al. 2023, arXiv 2304.11277), the same on CPUs (gloo) and GPUs (NCCL); parameters
become `DTensor`s, cut along their first dimension. Gradients of micro-batches are summed as they come, which costs
traffic but leaves no whole gradient in memory.
"""

import os
import warnings

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from cdit.model import CDiT
from cdit.model.attention import MultiHeadAttention
from cdit.world_model import WorldModel


def take_wish() -> bool:
    """Whether `accelerate launch` was told to shard (`distributed_type: FSDP`), and there are processes to share with.

    To be called before there is an `Accelerator`.

    The wish is taken out of the environment: an `Accelerator` that found it there would shard by itself on GPUs,
    without what `shard` knows of this network, and on CPUs would quietly give every process the whole network.
    """
    wish = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return wish and int(os.environ.get("WORLD_SIZE", 1)) > 1


def bare_networks(world: WorldModel) -> dict[str, nn.Module]:
    """What a run trains and saves, not wrapped: the CDiT as `model`, and the objective's as `objective.<name>`."""
    further = {
        f"objective.{name}": extract_model_from_parallel(network, keep_torch_compile=False)
        for name, network in world.objective.networks.items()
    }
    return {"model": world.cdit, **further}


def prepare_networks(world: WorldModel, accelerator: Accelerator, sharded: bool, compile: bool = False) -> nn.Module:
    """Moves a world to the accelerator's device, shared or sharded among its processes, and returns what to train.

    Further networks of the objective that are trained, or are sharded CDiTs, are prepared likewise; others are moved.
    """
    world.codec.to(accelerator.device)
    networks = world.objective.networks
    for name, network in networks.items():
        trained = any(p.requires_grad for p in network.parameters())
        if sharded and (trained or isinstance(network, CDiT)):
            networks[name] = shard(network, accelerator, compile)
        else:
            networks[name] = accelerator.prepare(network) if trained else network.to(accelerator.device)
    return shard(world.cdit, accelerator, compile) if sharded else accelerator.prepare(world.cdit)


def shard(network: nn.Module, accelerator: Accelerator, compile: bool = False) -> nn.Module:
    """Cuts a network up, in place, among two or more processes, and returns what to train.

    Its parameters are others afterwards: an optimizer or an average is to be made of them now. They must have been the
    same on every process.

    Args:
        network: a CDiT, whose blocks are gathered one by one, or any other module, gathered as a whole; on the CPU, or
            already on the accelerator's device.
        accelerator: its processes and precision. It is not to `prepare` the network, which would add DDP.
        compile: whether to compile the blocks, each by itself, so that gathering stays outside.
    """
    # Its warning is of outputs that are changed in place, which a prediction is not.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    blocks = (*network.context_blocks, *network.blocks) if isinstance(network, CDiT) else ()
    for block in blocks:
        if compile:
            block.compile()
        fully_shard(block, mesh=mesh, mp_policy=_precision(block, network, accelerator))
    # By default the outermost part stays gathered after a call, and would miss that its average was put in its place.
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
    if isinstance(network, CDiT):
        for block in network.blocks:
            register_fsdp_forward_method(block, "project_kv")
        register_fsdp_forward_method(network, "encode_context")
    return accelerator.prepare_model(network, device_placement=False, evaluation_mode=True)  # autocast alone


def _precision(block: nn.Module, network: CDiT, accelerator: Accelerator) -> MixedPrecisionPolicy:
    """What a block's weights are gathered in: bfloat16 where autocast would round them to it at their first use.

    That halves the traffic, and the memory of what autocast would otherwise keep rounded for the backward pass, and
    changes no bit. It is so of linear maps, and of the extra keys and values where no rotation comes before. Whatever
    else a block has, autocast uses in float32; then all of it is gathered so.
    """
    rounded_first = {nn.Linear} if network.can_push else {nn.Linear, MultiHeadAttention}
    owners = {type(module) for module in block.modules() if [*module.parameters(recurse=False)]}
    if accelerator.mixed_precision != "bf16" or not owners <= rounded_first:
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    return MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its rows. Every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_world(world: WorldModel, accelerator: Accelerator) -> WorldModel | None:
    """The world model with all its weights, for the main process alone; None on the others, which must call it, too."""
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
