"""Parameters, tokens and FLOPs of a network, which may be on the meta device."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cdit.model.cdit import CDiT

# The first pattern that matches a parameter's name decides to which part of the network it belongs.
PARTS = {
    r"^wide_": "wide head",
    r"patch_embed": "patch embedding",
    r"pos_embed": "position table",
    r"place_embed": "place embedding",
    r"time_embed": "diffusion time embedding",
    r"conditioners\.time_shift": "time shift embedding",
    r"conditioners\.action": "action embedding",
    r"conditioners\.interval": "interval embedding",
    r"conditioners\.text": "text embedding",
    r"conditioners\.": "further conditioners",
    r"noise_embed": "noise level embedding",
    r"context_blocks": "context blocks",
    r"(self|cross)_attn\.q\.": r"\1-attention Q",
    r"(self|cross)_attn\.kv\.": r"\1-attention K, V",
    r"(self|cross)_attn\.out\.": r"\1-attention O",
    r"(self|cross)_attn\.[qk]_norm": r"\1-attention q, k norm",
    r"(self|cross)_attn\.extra_": r"\1-attention extra key, value",
    r"\.mlp\.": "MLP",
    r"blocks\.\d+\.ada_ln": "AdaLN",
    r"steering": "steered queries",
    r"output_convolutions": "output convolutions",
    r"final_layer": "final layer",
}

HIDDEN_MATRIX = re.compile(
    r"(objective\.\w+\.)?(context_|wide_)?blocks\.\d+\.(\w*attn\.(q|kv|out)|mlp\.fc[12])\.weight"
)
"""Names of the matrices of attentions and MLPs, which Muon takes; `kv` stacks two."""


@dataclass(frozen=True)
class Row:
    """One number of the description."""

    group: str
    """parameters, tokens or FLOPs."""
    name: str
    value: int


def parameters(cdit: CDiT) -> dict[str, int]:
    """Parameters of each part, in the order of the network; those of K and V, one linear map, are split in half."""
    count: Counter[str] = Counter()
    for name, parameter in cdit.named_parameters():
        match = next(m for m in (re.search(pattern, name) for pattern in PARTS) if m)
        part = match.expand(PARTS[match.re.pattern])
        if part.endswith("K, V"):
            for half in ("K", "V"):
                count[part.replace("K, V", half)] += parameter.numel() // 2
        else:
            count[part] += parameter.numel()
    return dict(count)


def counted_flops(call: Callable[[], object]) -> int:
    """FLOPs (2 per multiply-add) of the matrix products and convolutions of a call, including attention.

    Attention is computed as two products, because torch's counter supports only some fused kernels.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def flops(cdit: CDiT, context_frames: int, goals: int) -> dict[str, int]:
    """FLOPs (2 per multiply-add) for one context: encoding it, and the forward of its goals.

    If K and V depend on the condition, there is little to encode beforehand, and the forward pass computes them.

    Args:
        cdit: a network, which may be on the meta device.
        context_frames: past frames.
        goals: targets, all of the one context.
    """
    device = next(cdit.parameters()).device
    frame = (cdit.config.in_channels, *cdit.config.image_size)
    context = torch.zeros(1, context_frames, *frame, device=device)
    with torch.no_grad():
        cache = cdit.encode_context(context)
    each = torch.zeros(1, goals, device=device)
    sample, condition = torch.zeros(1, goals, *frame, device=device), {"time_shift": each}
    condition["action"] = each[..., None].expand(1, goals, cdit.config.action_size)
    with torch.no_grad():
        encoded = counted_flops(lambda: cdit.encode_context(context))
        denoised = counted_flops(lambda: cdit(sample, each, condition, cache))
    return {
        "encoding the context, once": encoded,
        "forward with the cached context": denoised,
        "forward, context included": encoded + denoised,
    }


def describe(cdit: CDiT, context_frames: int, goals: int) -> list[Row]:
    """Parameters per part, tokens, and FLOPs for one context with its goals (see `flops`)."""
    counts = parameters(cdit)
    patches = cdit.grid[0] * cdit.grid[1]
    return [
        *(Row("parameters", name, count) for name, count in counts.items()),
        Row("parameters", "total", sum(counts.values())),
        Row("tokens", "target", patches),
        Row("tokens", "context", patches * context_frames),
        *(Row("FLOPs", name, count) for name, count in flops(cdit, context_frames, goals).items()),
    ]


def table(rows: list[Row]) -> str:
    """The rows as aligned text, with the share of all parameters beside each."""
    total = next(row.value for row in rows if (row.group, row.name) == ("parameters", "total"))
    width = max(len(row.name) for row in rows)
    lines = []
    for row, before in zip(rows, (None, *rows), strict=False):
        if before is None or row.group != before.group:
            lines += [f"\n{row.group}"]
        line = f"  {row.name:<{width}}  {row.value:>20,}"
        if row.group == "parameters":
            line += f"  {row.value / total:6.1%}"
        elif row.group == "FLOPs":
            line += f"  {row.value / 1e9:10.4g} G"
        lines.append(line)
    return "\n".join(lines).strip("\n")
