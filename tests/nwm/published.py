"""The published network, written once more with torch's own modules, under the published names; and its checkpoints."""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TINY = {"width": 48, "depth": 2, "heads": 3, "side": 4, "patch": 2, "channels": 3}
S = {"width": 384, "depth": 12, "heads": 6, "side": 8, "patch": 2, "channels": 4}


def mlp(inner: int, hidden: int, outer: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inner, hidden), nn.SiLU(), nn.Linear(hidden, outer))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x: (B, N, D), normalised first, without parameters."""
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    return x * (1 + scale[:, None]) + shift[:, None]


class Embedder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = mlp(256, width, width)

    def forward(self, value: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=value.dtype) / 128)
        angles = value[:, None] * frequencies
        return self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1))


class ActionEmbedder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        third = width // 3
        self.x_emb, self.y_emb, self.angle_emb = Embedder(third), Embedder(third), Embedder(width - 2 * third)

    def forward(self, action: Tensor) -> Tensor:
        x, y, angle = action.unbind(-1)
        return torch.cat((self.x_emb(x), self.y_emb(y), self.angle_emb(angle)), dim=-1)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, width = x.shape
        q, k, v = self.qkv(x).view(batch, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(width // self.heads)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, count, width))


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = SelfAttention(width, heads)
        self.cttn = nn.MultiheadAttention(width, heads, add_bias_kv=True, batch_first=True)
        self.mlp = MLP(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 11 * width))
        self.weights: Tensor | None = None

    def forward(self, x: Tensor, context: Tensor, condition: Tensor) -> Tensor:
        (
            shift_self, scale_self, gate_self, shift_context, scale_context, shift_cross, scale_cross, gate_cross,
            shift_mlp, scale_mlp, gate_mlp,
        ) = self.adaLN_modulation(condition).chunk(11, dim=-1)  # fmt: skip
        x = x + gate_self[:, None] * self.attn(modulate(x, shift_self, scale_self))
        keys = modulate(context, shift_context, scale_context)
        queries = modulate(x, shift_cross, scale_cross)
        y, self.weights = self.cttn(queries, keys, keys, average_attn_weights=False)
        x = x + gate_cross[:, None] * y
        return x + gate_mlp[:, None] * self.mlp(modulate(x, shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    def __init__(self, width: int, values: int):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.linear = nn.Linear(width, values)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.linear(modulate(x, *self.adaLN_modulation(condition).chunk(2, dim=-1)))


class Patches(nn.Module):
    def __init__(self, channels: int, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, frame: Tensor) -> Tensor:
        return self.proj(frame).flatten(2).transpose(1, 2)


class Published(nn.Module):
    """Sample (B, C, side, side), past frames (B, T, C, side, side), t and time_shift (B,), action (B, 3)."""

    def __init__(self, width: int, depth: int, heads: int, side: int, patch: int, channels: int, context: int):
        super().__init__()
        self.grid, self.patch, self.context = side // patch, patch, context
        self.pos_embed = nn.Parameter(torch.empty(context + 1, self.grid**2, width))
        self.x_embedder = Patches(channels, width, patch)
        self.t_embedder, self.time_embedder = Embedder(width), Embedder(width)
        self.y_embedder = ActionEmbedder(width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch**2 * 2 * channels)

    def forward(self, sample: Tensor, t: Tensor, action: Tensor, time_shift: Tensor, past: Tensor) -> Tensor:
        """Fewer past frames than slots are the latest ones: a frame keeps its slot, which is its age."""
        ages = range(past.shape[1], 0, -1)
        context = torch.cat(
            [self.x_embedder(past[:, -age]) + self.pos_embed[self.context - age] for age in ages], dim=1
        )
        x = self.x_embedder(sample) + self.pos_embed[self.context]
        condition = self.t_embedder(t) + self.time_embedder(time_shift) + self.y_embedder(action)
        for block in self.blocks:
            x = block(x, context, condition)
        x = self.final_layer(x, condition)  # (B, n, p·p·2c)
        x = x.view(len(x), self.grid, self.grid, self.patch, self.patch, -1)
        return torch.einsum("bhwpqc->bchpwq", x).reshape(len(x), -1, *sample.shape[-2:])


def published(size: dict[str, int], context: int = 4, seed: int = 0) -> Published:
    """With random weights everywhere, where training starts at zero too, such that every part has its say."""
    model = Published(**size, context=context).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter[0].numel() if name.endswith("weight") else 1
            std = 0.3 if name.endswith("bias") else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std * fan_in**-0.5)
    return model


def write_checkpoint(path: Path, ema: dict[str, Any], **others: Any) -> Path:
    """A released file: "model" is another state than "ema", prefixed; all the rest is there."""
    model = {f"_orig_mod.{name}": tensor + 1 for name, tensor in ema.items()}
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=8e-5, weight_decay=0)
    parameter.grad = torch.ones(3)
    optimizer.step()
    args = argparse.Namespace(config="nwm_cdit_xl.yaml", bfloat16=1, epochs=300, global_seed=0, ratio=0.5)
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
    checkpoint = {"model": model, "ema": ema, "opt": optimizer.state_dict(), "args": args, "epoch": 31}
    torch.save(checkpoint | {"train_steps": 100000, "scaler": scaler} | others, path)
    return path
