"""A whole CDiT derived a second time: one sample at a time, plain functions, complex numbers, loops over heads."""

import math

import pytest
import torch
import torch.nn.functional as F
from dialects import DIALECTS, batch, build, call, masks
from torch import Tensor

from cdit.model import CDiT
from cdit.model.rotary import THETA


def normalize(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()


def gelu(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class Reference:
    """The network's arithmetic on the tensors of a CDiT's state_dict."""

    def __init__(self, model: CDiT):
        self.w, self.c = model.state_dict(), model.config
        height, width = (side // self.c.patch_size for side in self.c.image_size)
        self.places = [(r, c) for r in range(height) for c in range(width)]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def scalar(self, name: str, value: Tensor, scale: float) -> Tensor:
        angles = value * scale * torch.tensor([math.exp(-math.log(10000) * i / 128) for i in range(128)]).to(value)
        features = torch.cat((angles.cos(), angles.sin()))
        return self.linear(f"{name}.mlp.fc2", F.silu(self.linear(f"{name}.mlp.fc1", features)))

    def tokens(self, frame: Tensor, name: str = "patch_embed") -> Tensor:
        p = self.c.patch_size
        patches = F.unfold(frame[None], p, stride=p)[0].T
        return patches @ self.w[f"{name}.proj.weight"].flatten(1).T + self.w[f"{name}.proj.bias"]

    def turn(self, x: Tensor, spots: list[tuple[float, float, float]]) -> Tensor:
        """Rotary positions of the tokens of one head, standing at (frame, row, column) each."""
        a, b = x.chunk(2, dim=-1)
        pairs = a.shape[-1]
        shares = [pairs // 4, (pairs - pairs // 4) // 2]
        shares.append(pairs - sum(shares))
        angles = [
            [at * THETA ** (-i / (n - 1)) for at, n in zip(spot, shares, strict=True) for i in range(n)]
            for spot in spots
        ]
        turned = torch.complex(a, b) * torch.polar(torch.ones_like(a), a.new_tensor(angles))
        return torch.cat((turned.real, turned.imag), dim=-1)

    def steered(self, name: str, condition: Tensor, h: int) -> list[tuple[float, float]]:
        """The places at which head h looks for each patch: zoomed about the middle of the frame, then moved."""
        row, column, row_zoom, column_zoom = self.linear(f"{name}.linear", condition)[4 * h : 4 * h + 4].tolist()
        middle = [(max(axis) + min(axis)) / 2 for axis in zip(*self.places, strict=True)]
        return [
            (
                middle[0] + (r - middle[0]) * 2 ** math.tanh(row_zoom) + 4 * row,
                middle[1] + (c - middle[1]) * 2 ** math.tanh(column_zoom) + 4 * column,
            )
            for r, c in self.places
        ]

    def attention(
        self,
        name: str,
        x: Tensor,
        for_keys: Tensor,
        for_values: Tensor,
        frame: int,
        frames: list[int],
        keep: list[bool] | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """From the tokens of one frame to those of `frames`, of which `keep` says which exist."""
        q, k = self.linear(f"{name}.q", x), self.linear(f"{name}.kv", for_keys).chunk(2, -1)[0]
        v = self.linear(f"{name}.kv", for_values).chunk(2, -1)[1]
        width, out = self.c.hidden_size // self.c.num_heads, []
        for h in range(x.shape[-1] // width):
            qh, kh, vh = (t[:, h * width : (h + 1) * width] for t in (q, k, v))
            if self.c.qk_norm:
                qh, kh = (
                    t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.w[f"{name}.{which}_norm.weight"]
                    for t, which in ((qh, "q"), (kh, "k"))
                )
            if self.c.position == "rotary":
                looks = self.places
                if condition is not None and self.c.steered_queries:
                    looks = self.steered(name.replace("cross_attn", "steering"), condition, h)
                qh = self.turn(qh, [(frame, *place) for place in looks])
                kh = self.turn(kh, [(f, *place) for f in frames for place in self.places])
            if keep is not None:
                kept = torch.tensor(keep).repeat_interleave(len(self.places))
                kh, vh = kh[kept], vh[kept]
            if f"{name}.extra_k" in self.w:
                extra_k = self.w[f"{name}.extra_k"][h]
                if self.c.position == "rotary":  # it stands in the corner of the target
                    extra_k = self.turn(extra_k, [(frame, 0, 0)])
                kh = torch.cat((kh, extra_k))
                vh = torch.cat((vh, self.w[f"{name}.extra_v"][h]))
            scores = (qh @ kh.T / math.sqrt(width)).exp()
            out.append(scores / scores.sum(-1, keepdim=True) @ vh)
        return self.linear(f"{name}.out", torch.cat(out, dim=-1))

    def mlp(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.fc2", gelu(self.linear(f"{name}.fc1", x)))

    def reprojected(self, frame: Tensor, inverse_depth: Tensor, motion: Tensor) -> tuple[Tensor, Tensor]:
        """By matrices, pixel by pixel: cameras have x to the right, y down and z forward."""
        height, width = frame.shape[1:]
        (fx, fy), yaw = self.c.focal, motion[2].item()
        intrinsics = torch.tensor([[fx * width / 2, 0, width / 2], [0, fy * height / 2, height / 2], [0, 0, 1]])
        intrinsics = intrinsics.to(frame)
        turn = frame.new_tensor([[math.cos(yaw), 0, -math.sin(yaw)], [0, 1, 0], [math.sin(yaw), 0, math.cos(yaw)]])
        move = torch.stack((-motion[1], motion.new_zeros(()), motion[0]))
        out, seen = torch.zeros_like(frame), frame.new_zeros(1, height, width)
        for r in range(height):
            for c in range(width):
                depth = 1 / inverse_depth[r, c]
                point = depth * intrinsics.inverse() @ frame.new_tensor([c + 0.5, r + 0.5, 1])
                point = turn @ point + move
                point[2] = point[2].clamp(min=0.1 * depth)
                x, y = (intrinsics @ point)[:2] / point[2]
                seen[0, r, c] = (point[2] > 0.1 * depth) & (0 < x < width) & (0 < y < height)
                x, y = (x - 0.5).clamp(-width, 2 * width).item(), (y - 0.5).clamp(-height, 2 * height).item()
                for i in range(math.floor(y) - 1, math.floor(y) + 3):
                    for j in range(math.floor(x) - 1, math.floor(x) + 3):
                        pixel = frame[:, min(max(i, 0), height - 1), min(max(j, 0), width - 1)]
                        out[:, r, c] += self.kernel(y - i) * self.kernel(x - j) * pixel
        return out, seen

    def kernel(self, distance: float) -> float:
        """Of interpolation, at a distance in pixels: a triangle, or Keys' cubic with a = -3/4."""
        s = abs(distance)
        if self.c.resampling == "bilinear":
            return max(0, 1 - s)
        if s < 1:
            return 1.25 * s**3 - 2.25 * s**2 + 1
        return -0.75 * (s**3 - 5 * s**2 + 8 * s - 4) if s < 2 else 0

    def context(self, frames: Tensor) -> Tensor:
        out = []
        for i, frame in enumerate(frames):
            x = self.tokens(frame) + self.w.get("place_embed", 0)
            if self.c.position == "learned":
                x = x + self.w["pos_embed"][self.c.max_context - len(frames) + i]
            for j in range(self.c.context_depth):
                name = f"context_blocks.{j}"
                weights, biases = ([self.w[f"{name}.norm{n}.{what}"] for n in (1, 2)] for what in ("weight", "bias"))
                y = F.layer_norm(x, x.shape[-1:], weights[0], biases[0])
                x = x + self.attention(f"{name}.attn", y, y, y, 0, [0])
                x = x + self.mlp(f"{name}.mlp", F.layer_norm(x, x.shape[-1:], weights[1], biases[1]))
            out.append(normalize(x) if self.c.context_norm == "both" else x)
        return torch.cat(out)

    def convolution(self, name: str, x: Tensor) -> Tensor:
        """3×3 with a border of zeros, written as nine products."""
        weight, bias = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
        height, width = x.shape[1:]
        padded = x.new_zeros(len(x), height + 2, width + 2)
        padded[:, 1:-1, 1:-1] = x
        windows = {(i, j): padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)}
        return bias[:, None, None] + sum(
            torch.einsum("oc,chw->ohw", weight[:, :, i, j], window) for (i, j), window in windows.items()
        )

    def __call__(self, sample, timestep, action, time_shift, context, keep=None) -> Tensor:
        """One target of one context; an action of None is unknown."""
        x = self.tokens(sample) + self.w.get("place_embed", 0)
        if self.c.position == "learned":
            x = x + self.w["pos_embed"][-1]
        condition = self.scalar("time_embed", timestep, 1.0)
        if self.c.use_time_shift:
            condition = condition + self.scalar("conditioners.time_shift.embedding", time_shift, self.c.embedding_scale)
        if self.c.use_action and action is None:
            condition = condition + self.w["conditioners.action.unknown"]
        elif self.c.use_action:
            parts = [self.scalar(f"conditioners.action.parts.{i}", action[i], self.c.embedding_scale) for i in range(3)]
            condition = condition + torch.cat(parts)
        inactive, condition = condition, F.silu(condition)

        past = self.context(context)
        frames, target = list(range(len(context))), len(context)
        for i in range(self.c.depth):
            chunks = self.linear(f"blocks.{i}.ada_ln", condition).view(-1, x.shape[-1])
            values = past * (1 + chunks[10]) + chunks[9] if self.c.context_modulation else past
            keys = normalize(values) if self.c.context_norm == "keys" else values
            branches = [
                lambda y, i=i: self.attention(f"blocks.{i}.self_attn", y, y, y, target, [target]),
                lambda y, i=i, keys=keys, values=values: self.attention(
                    f"blocks.{i}.cross_attn", y, keys, values, target, frames, keep, condition
                ),
                lambda y, i=i: self.mlp(f"blocks.{i}.mlp", y),
            ]
            for j, branch in enumerate(branches):
                shift, scale, gate = chunks[3 * j : 3 * j + 3]
                if self.c.norm == "pre":
                    x = x + gate * branch(normalize(x) * (1 + scale) + shift)
                else:
                    x = x + gate * normalize(branch(x * (1 + scale) + shift))
        if self.c.wide_head_depth:
            condition = self.linear("wide_condition", F.silu(x + inactive))  # one for each token
            x = self.tokens(sample, "wide_embed")
        for i in range(self.c.wide_head_depth):
            name, chunks = f"wide_blocks.{i}", self.linear(f"wide_blocks.{i}.ada_ln", condition).chunk(6, dim=-1)
            y = normalize(x) * (1 + chunks[1]) + chunks[0]
            x = x + chunks[2] * self.attention(f"{name}.attn", y, y, y, target, [target])
            x = x + chunks[5] * self.mlp(f"{name}.mlp", normalize(x) * (1 + chunks[4]) + chunks[3])
        shift, scale = self.linear("final_layer.ada_ln", condition).chunk(2, dim=-1)
        x = self.linear("final_layer.linear", normalize(x) * (1 + scale) + shift)  # (P, p·p·channels)
        p = self.c.patch_size
        x = x.unflatten(-1, (p * p, -1)).transpose(1, 2).flatten(1)  # F.fold wants channels first
        x = F.fold(x.T[None], self.c.image_size, p, stride=p)[0]
        if self.c.reprojection:
            inverse_depth = (1 + (x[0] - 2).exp()).log()
            past, seen = self.reprojected(context[-1], inverse_depth, sample.new_zeros(3) if action is None else action)
            seen = seen * (action is not None)
            sample = torch.cat((sample, past, seen))
        if self.c.output_channels:
            x = torch.cat((x, sample))
            for i in (1, 2):
                x = self.convolution(f"output_convolutions.conv{i}", x)
                x = x * torch.sigmoid(x)
            x = self.convolution("output_convolutions.conv3", x)
        if self.c.reprojection:
            share = torch.sigmoid(x[-1:]) * seen
            x = (1 - share) * x[:-1] + share * past
        return x


@pytest.mark.parametrize("frames", [1, 2, 3])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_forward_is_the_reference(dialect, frames):
    model = build(dialect).double()
    data, mask = batch(goals=2, frames=frames, dtype=torch.float64), masks(goals=2, frames=frames)
    with torch.no_grad():
        out = call(model, **data, **mask)
        reference = Reference(model)
        for b in range(2):
            for g in range(2):
                expected = reference(
                    data["sample"][b, g],
                    data["timestep"][b, g],
                    data["action"][b, g] if mask["action_mask"][b, g] else None,
                    data["time_shift"][b, g],
                    data["context"][b],
                    mask["context_mask"][b].tolist(),
                )
                torch.testing.assert_close(out[b, g], expected, atol=1e-5, rtol=0)
    assert out.std() > 0.1


@pytest.mark.parametrize("patch_size", [1, 2, 3])
def test_patches_of_non_square_frames(patch_size):
    """The reference cuts and joins patches by F.unfold and F.fold."""
    model = build("native", patch_size=patch_size, image_size=(6, 12)).double()
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 2, 6, 12, generator=generator, dtype=torch.float64)
    context = torch.randn(1, 1, 2, 6, 12, generator=generator, dtype=torch.float64)
    t, action = torch.ones(1, dtype=torch.float64), torch.full((1, 3), 0.5, dtype=torch.float64)
    with torch.no_grad():
        expected = Reference(model)(sample[0], t[0], action[0], t[0], context[0])
        torch.testing.assert_close(
            model(sample, t, {"action": action, "time_shift": t}, context)[0], expected, atol=1e-5, rtol=0
        )
