"""Converts tensors between a published Navigation World Models (NWM) network and the equivalent CDiT.

The networks differ in names, in how tensors are split, and in that the published one has no embedding of an unknown
action.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cdit.common.errors import UserError
from cdit.model import PRESETS, CDiT

DIALECT = {
    "context_depth": 0,
    "context_modulation": True,
    "context_norm": "both",
    "context_noise": 0.0,
    "position": "learned",
    "steered_queries": False,
    "place_embedding": False,
    "extra_kv": True,
    "qk_norm": False,
    "norm": "pre",
    "mlp_ratio": 4.0,
    "output_channels": 0,
    "wide_head_depth": 0,
    "reprojection": False,
    "use_action": True,
    "action_size": 3,
    "use_time_shift": True,
    "text_size": 0,
    "embedding_scale": 1.0,
    "learn_variance": True,
}
"""The arguments of `CDiT` that make it the published network; the others are its size."""

HEADS = {
    (preset["hidden_size"], preset["depth"]): preset["num_heads"] for name, preset in PRESETS.items() if name != "tiny"
}
"""Heads of the published networks by (width, depth), which checkpoints do not store."""

MAX_BLOCKS = 1000
UNKNOWN_ACTION = "conditioners.action.unknown"


class Match(NamedTuple):
    """A published tensor, its name here, and the conversion in both directions."""

    published: str
    ours: tuple[str, ...]
    split: Callable[[Tensor], Sequence[Tensor]]
    join: Callable[[Sequence[Tensor]], Tensor]


def from_nwm(tensors: Mapping[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """The state dict of a CDiT from a published network's tensors; the embedding of an unknown action is zeros.

    Args:
        tensors: complete, in the published shapes.
        num_heads: of the extra keys.
    """
    ours = {UNKNOWN_ACTION: torch.zeros_like(tensors["final_layer.adaLN_modulation.1.weight"][0])}
    for match in _matches(count_blocks(tensors), num_heads):
        ours.update(zip(match.ours, match.split(tensors[match.published]), strict=True))
    return ours


def to_nwm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The exact inverse of `from_nwm`, except that the embedding of an unknown action is dropped."""
    num_heads = len(state["blocks.0.cross_attn.extra_k"])
    return {
        match.published: match.join([state[name] for name in match.ours])
        for match in _matches(count_blocks(state), num_heads)
    }


def cdit_arguments(tensors: Mapping[str, Tensor], num_heads: int | None = None) -> dict[str, Any]:
    """The arguments of the `CDiT` for a published network's tensors, read from their shapes.

    Args:
        tensors: only the patch convolution, the position table and the names of the blocks are used.
        num_heads: heads of each attention; by default those of the published network of that width and depth.

    Raises:
        UserError: there are no such tensors, or none of the published networks has that size and num_heads is None.
    """
    shapes = {}
    for name, dims in {"pos_embed": 3, "x_embedder.proj.weight": 4}.items():
        if name not in tensors or tensors[name].ndim != dims:
            found = f"has shape {tuple(tensors[name].shape)}" if name in tensors else "is missing"
            raise UserError(f"not the network of NWM: {name} {found}, expected {dims} dimensions")
        shapes[name] = tensors[name].shape
    slots, patches, width = shapes["pos_embed"]
    _, channels, patch_size, _ = shapes["x_embedder.proj.weight"]
    side, depth = isqrt(patches), count_blocks(tensors)
    if side**2 != patches or slots < 2 or not 1 <= depth <= MAX_BLOCKS:
        raise UserError(
            f"not the network of NWM: {depth} blocks and pos_embed of shape {(slots, patches, width)}, "
            f"expected 1 to {MAX_BLOCKS} blocks, at least two frames and a square number of patches"
        )
    if num_heads is None and (width, depth) not in HEADS:
        raise UserError(
            f"none of the published networks has width {width} and {depth} blocks: give num_heads, "
            "which its tensors do not determine"
        )
    if num_heads is not None and num_heads < 1:
        raise UserError(f"num_heads is {num_heads}, expected at least 1")
    return {
        "image_size": (side * patch_size, side * patch_size),
        "in_channels": channels,
        "max_context": slots - 1,
        "patch_size": patch_size,
        "hidden_size": width,
        "depth": depth,
        "num_heads": num_heads or HEADS[width, depth],
        **DIALECT,
    }


def differences(cdit: CDiT) -> list[str]:
    """The settings in which a network differs from the published one."""
    different = [
        f"{name} is {cdit.config[name]}, not {value}" for name, value in DIALECT.items() if cdit.config[name] != value
    ]
    height, width = cdit.config.image_size
    if height != width:
        different.append(f"image_size is {(height, width)}, not square")
    if cdit.config.extra_conditioners:
        different.append(f"it has extra_conditioners: {', '.join(cdit.config.extra_conditioners)}")
    return different


def count_blocks(names: Iterable[str]) -> int:
    """The number of blocks with tensors of these names (in either naming scheme)."""
    return len({name.split(".")[1] for name in names if name.startswith("blocks.")})


def _matches(depth: int, num_heads: int) -> Iterator[Match]:
    yield _renamed("pos_embed", "pos_embed")
    yield from _layers("x_embedder.proj", "patch_embed.proj")
    yield from _embedding("t_embedder", "time_embed")
    yield from _embedding("time_embedder", "conditioners.time_shift.embedding")
    for i, part in enumerate(("x_emb", "y_emb", "angle_emb")):
        yield from _embedding(f"y_embedder.{part}", f"conditioners.action.parts.{i}")
    for i in range(depth):
        yield from _block(f"blocks.{i}.", num_heads)
    yield from _layers("final_layer.adaLN_modulation.1", "final_layer.ada_ln")
    yield from _layers("final_layer.linear", "final_layer.linear")


def _embedding(published: str, ours: str) -> Iterator[Match]:
    yield from _layers(f"{published}.mlp.0", f"{ours}.mlp.fc1")
    yield from _layers(f"{published}.mlp.2", f"{ours}.mlp.fc2")


def _block(block: str, num_heads: int) -> Iterator[Match]:
    for kind in ("weight", "bias"):
        self_attention = tuple(f"{block}self_attn.{map_}.{kind}" for map_ in ("q", "kv"))
        cross_attention = tuple(f"{block}cross_attn.{map_}.{kind}" for map_ in ("q", "kv"))
        yield Match(f"{block}attn.qkv.{kind}", self_attention, _split_qkv, torch.cat)
        yield Match(f"{block}cttn.in_proj_{kind}", cross_attention, _split_qkv, torch.cat)
        yield Match(f"{block}adaLN_modulation.1.{kind}", (f"{block}ada_ln.{kind}",), _context_last, _context_fourth)
    for kind in ("k", "v"):
        yield Match(
            f"{block}cttn.bias_{kind}",
            (f"{block}cross_attn.extra_{kind}",),
            lambda extra: (extra.reshape(num_heads, 1, -1),),
            lambda parts: parts[0].reshape(1, 1, -1),
        )
    yield from _layers(f"{block}attn.proj", f"{block}self_attn.out")
    yield from _layers(f"{block}cttn.out_proj", f"{block}cross_attn.out")
    yield from _layers(f"{block}mlp.fc1", f"{block}mlp.fc1")
    yield from _layers(f"{block}mlp.fc2", f"{block}mlp.fc2")


def _layers(published: str, ours: str) -> Iterator[Match]:
    for kind in ("weight", "bias"):
        yield _renamed(f"{published}.{kind}", f"{ours}.{kind}")


def _renamed(published: str, ours: str) -> Match:
    return Match(published, (ours,), lambda tensor: (tensor,), lambda parts: parts[0])


def _split_qkv(qkv: Tensor) -> Sequence[Tensor]:
    """Rows of q, k and v to those of q and those of k and v."""
    return qkv.tensor_split((len(qkv) // 3,))


def _context_last(chunks: Tensor) -> Sequence[Tensor]:
    """Rows of AdaLN, eleven chunks: shift and scale of the context are the fourth and fifth there, the last here."""
    own, context, others = chunks.split([len(chunks) // 11 * count for count in (3, 2, 6)])
    return (torch.cat((own, others, context)),)


def _context_fourth(parts: Sequence[Tensor]) -> Tensor:
    own, others, context = parts[0].split([len(parts[0]) // 11 * count for count in (3, 6, 2)])
    return torch.cat((own, context, others))
