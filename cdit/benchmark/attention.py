"""Attention kernels."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from cdit.benchmark.bench import Bench
from cdit.benchmark.tables import Table
from cdit.model.attention import KeysValues, attention_weights, scaled_dot_product_attention


def attention(bench: Bench) -> Iterator[Table]:
    """Fused against explicit attention: torch's kernel, what CDiT uses, and two products and a softmax."""
    config, size = bench.config, bench.config.model.arguments()
    heads = size["num_heads"]
    width = size["hidden_size"] // heads
    patches = config.image_size[0] * config.image_size[1] // size["patch_size"] ** 2

    def fused(q: Tensor, kv: KeysValues) -> Tensor:
        return F.scaled_dot_product_attention(q, *kv)

    def explicit(q: Tensor, kv: KeysValues) -> Tensor:
        return ((q * width**-0.5) @ kv.k_BHMK.transpose(-1, -2)).softmax(-1) @ kv.v_BHMK

    def observed(q: Tensor, kv: KeysValues) -> Tensor:
        attention_weights(q, kv.k_BHMK)
        return scaled_dot_product_attention(q, kv)

    functions = {"fused": fused, "ours": scaled_dot_product_attention, "explicit": explicit, "ours, observed": observed}
    rows = []
    for kind, queries, keys, batch in (
        ("self", patches, patches, config.batch_size * config.goals),
        ("cross", patches * config.goals, patches * config.context_frames, config.batch_size),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v, grad = (
                torch.randn(batch, heads, n, width, device=bench.device).to(dtype).requires_grad_()
                for n in (queries, keys, keys, queries)
            )

            def forward(function: Callable, q=q, k=k, v=v) -> None:
                with torch.no_grad():
                    function(q, KeysValues(k, v))

            def both(function: Callable, q=q, k=k, v=v, grad=grad) -> None:
                torch.autograd.grad(function(q, KeysValues(k, v)), (q, k, v), grad)

            for passes, call in (("forward", forward), ("forward + backward", both)):
                case = f"{kind} {queries}×{keys}, {str(dtype).removeprefix('torch.')}, {passes}"
                alternatives = {name: lambda call=call, f=f: call(f) for name, f in functions.items()}
                rows.append(bench.compare(case, alternatives))
    yield Table(f"Attention, {heads} heads of {width}: queries × keys", rows)
