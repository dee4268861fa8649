"""Bytes that a training step keeps for its backward pass, derived from the code of the network.

Under bfloat16 autocast on a GPU linear maps and attention compute in bfloat16 (2 bytes), LayerNorm in float32 (4), and
`addcmul` in the wider of its inputs. An operation keeps what its gradient needs: a linear map its input, rounded
to bfloat16; LayerNorm its input and, for the scale that follows, its output; the fused attention q, k, v, its output
and a float32 per head and query (Dao et al. 2022, arXiv 2205.14135, algorithm 2); GELU its input; a gate what it
multiplies. A kept view keeps the tensor it is a view of. Hence, in bytes per token and unit of width, with a residual
stream of s bytes (2 with rotary positions; 4 with learned ones, whose float32 table is added to it):

    self-attention   8 LayerNorm + 4 inputs of Q and of K, V + 2 q + 4 k, v + 2 output + s, rotated 2 k + 2 output
    cross-attention  8 LayerNorm + 2 input of Q + 2 q + 2 output + s, rotated 2 output
    MLP              8 LayerNorm + 2 input + 2·ratio before GELU + 2·ratio after it + s
    context          2 input of K, V + 4 k, v, rotated 2 k; with an extra key and value 2 + 2 k + 2 v either way

(rotated tensors are separate and stored head by head, so the output has to be copied for W_O), and with

    steered queries  2 q before its rotation + 2 angles + 2 their cosines and sines in cross-attention
    context_norm     none: the input of K, V is the tokens themselves where they are bfloat16 (rotary positions); keys:
                     that of V alone, and 4 LayerNorm (with learned positions the tokens themselves) + 2 input of K +
                     2 k + 2 v
    output_channels  per pixel, not per token: 2 (channels + those of the noisy frame) + 4·2 channels
    wide head        self-attention and MLP as above, with a modulation of each token: 6·2 chunks + 2·4 scales

Not counted, because they do not grow with the batch or are small: rounded copies of the weights, angles of rotation,
everything before the first block except the context's norm. A compiled step keeps less: it recomputes what is cheap.
"""

import math

from cdit.common.errors import UserError
from cdit.model.cdit import CDiT


def block_bytes(cdit: CDiT, context_frames: int, goals: int) -> int:
    """What one block keeps for one context and its goals, without checkpointing.

    Raises:
        UserError: the formulas do not cover the network's options.
    """
    config = cdit.config
    unknown = {"norm": "pre", "qk_norm": False, "dropout": 0.0, "context_depth": 0}
    for name, known in unknown.items():
        if config[name] != known:
            raise UserError(f"model.{name} is {config[name]}: activations are derived for {known} only")
    width, heads, modulated = config.hidden_size, config.num_heads, config.context_modulation
    rotary, stream = config.position == "rotary", _stream(cdit)
    self_attention = 8 + 4 + 2 + 4 + 2 + stream + (2 + 2) * rotary
    cross_attention = 8 + 2 + 2 + 2 + stream + 2 * rotary + 6 * config.steered_queries
    mlp = 8 + 2 + stream
    hidden = 2 * 2 * int(width * config.mlp_ratio)
    statistics = 3 * 2 * 4 + 2 * 4 * heads  # mean and deviation of each LayerNorm; the fused attentions' float32
    if config.context_norm == "keys":
        keys, key_statistics = (4 + 2 if rotary else 2 + 2) + 4, 2 * 4
    else:
        keys = (2 if _token(cdit) == 4 or modulated else 0) + (4 if config.extra_kv else 4 + 2 * rotary)
        key_statistics = 0
    chunks = 11 if modulated else 9
    scales = 4 * (4 if modulated else 3)
    gates = 2 * chunks if rotary else 3 * 4  # a view of all chunks, or copies in the stream's float32
    return (
        _targets(cdit, goals) * ((self_attention + cross_attention + mlp) * width + hidden + statistics)
        + _context_tokens(cdit, context_frames, goals) * (keys * width + key_statistics)
        + goals * (scales + gates) * width
    )


def wide_block_bytes(cdit: CDiT, goals: int) -> int:
    """What one block of the wide head keeps for one context and its goals; its residual stream takes 2 bytes."""
    width = cdit.config.wide_head_width
    heads = width * cdit.config.num_heads // cdit.config.hidden_size
    attention = 8 + 4 + 2 + 4 + 2 + 2 + (2 + 2) * (cdit.config.position == "rotary")
    mlp, modulation = 8 + 2 + 2, 6 * 2 + 2 * 4
    hidden, statistics = 2 * 2 * int(width * cdit.config.mlp_ratio), 2 * 2 * 4 + 4 * heads
    return _targets(cdit, goals) * ((attention + mlp + modulation) * width + hidden + statistics)


def activation_bytes(cdit: CDiT, context_frames: int, goals: int, checkpointing: bool) -> int:
    """What the whole network keeps for one context and its goals.

    With checkpointing, blocks keep their input and share the context's tokens; the block whose gradient is being
    computed is recomputed.

    Raises:
        UserError: the formulas do not cover the network's options.
    """
    config = cdit.config
    block, depth = block_bytes(cdit, context_frames, goals), len(cdit.blocks)
    targets, past = _targets(cdit, goals) * config.hidden_size, _patches(cdit) * context_frames * config.hidden_size
    ends = goals * _convolution_bytes(cdit)
    wide_depth, wide_block, wide = config.wide_head_depth, 0, _targets(cdit, goals) * config.wide_head_width
    if wide_depth:
        wide_block = wide_block_bytes(cdit, goals)
        ends += (_stream(cdit) + 2) * targets + 2 * wide  # what modulates it, before and after SiLU, and projected
        ends += (8 + 2 + 4) * wide  # the final layer's norm, map and scale
    else:
        ends += (8 + 2) * targets  # the final layer's norm and map
    if config.context_norm == "both":
        ends += 4 * past  # the input of the context's norm
    tokens = _token(cdit) * _context_tokens(cdit, context_frames, goals) * config.hidden_size
    if checkpointing:
        return depth * _stream(cdit) * targets + wide_depth * 2 * wide + max(block, wide_block) + ends + tokens
    by_themselves = config.context_norm == "keys" or (config.context_norm == "none" and _token(cdit) == 2)
    blocks = depth * block + wide_depth * wide_block
    return blocks + ends + (tokens if by_themselves or config.context_modulation else 0)


def backward_bytes(cdit: CDiT, goals: int) -> int:
    """The peak of what the backward pass holds in addition, for one context and its goals.

    It is reached in a block's MLP: the gradients of the stream, of the branch's output and of both sides of GELU, and
    in the wide head of the gates.
    """
    config = cdit.config
    sizes = [(_stream(cdit) + 2, config.hidden_size)]
    if config.wide_head_depth:
        sizes.append((2 + 2 + 2, config.wide_head_width))
    return _targets(cdit, goals) * max(each * w + 2 * 2 * int(w * config.mlp_ratio) for each, w in sizes)


def _patches(cdit: CDiT) -> int:
    return cdit.grid[0] * cdit.grid[1]


def _targets(cdit: CDiT, goals: int) -> int:
    return _patches(cdit) * goals


def _context_tokens(cdit: CDiT, context_frames: int, goals: int) -> int:
    """Tokens from which keys and values are computed; if these depend on the condition, each goal has its own."""
    return _patches(cdit) * context_frames * (goals if cdit.config.context_modulation else 1)


def _token(cdit: CDiT) -> int:
    """Bytes per number of the context's tokens."""
    return 4 if cdit.config.context_norm == "both" or cdit.config.position == "learned" else 2


def _convolution_bytes(cdit: CDiT) -> int:
    """What the output convolutions keep for one target: their inputs, and those of the SiLUs between them."""
    features, pixels = cdit.config.output_channels, math.prod(cdit.config.image_size)
    return 2 * (cdit.output_convolutions.conv1.in_channels + 4 * features) * pixels if features else 0


def _stream(cdit: CDiT) -> int:
    """Bytes per number of the residual stream."""
    return 2 if cdit.config.position == "rotary" else 4
