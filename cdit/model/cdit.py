"""CDiT, the Conditional Diffusion Transformer of Navigation World Models (Bar et al. 2025, arXiv 2412.03572).

Each block runs self-attention over the tokens of the frame being denoised, cross-attention from them to the tokens of
the past frames, then an MLP; AdaLN-Zero (Peebles & Xie 2023, arXiv 2212.09748) conditions every branch on diffusion
time, action and time shift. Cost is linear in the number of past frames.

Shape suffixes: B contexts, G goals of a context (their targets share its keys and values), T past frames, C channels,
P patches of a frame, M = T·P context tokens, D width.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from timm.layers import PatchEmbed
from torch import Tensor, nn

from cdit.attention import KeysValues, MultiHeadAttention
from cdit.errors import UserError
from cdit.model.blocks import Block, ContextBlock, FinalLayer, layer_norm
from cdit.model.embeddings import ActionEmbedding, ScalarEmbedding
from cdit.rotary import Rotation, axial_rotation


@dataclass
class ContextCache:
    """Past frames, encoded: what cross-attention looks at, reused at every denoising step and for every goal."""

    keys_values: list[KeysValues]
    """Per block, (B, H, M, K) each. Empty where every block makes its own, from `tokens_BMD`."""
    tokens_BMD: Tensor | None
    """Normalised context tokens where K and V follow the condition, or are used once only, else None."""
    mask_BM: Tensor | None
    """True where a token's frame exists; None where all do."""
    frame_T: Tensor
    """Frame coordinates, consecutive, oldest first. The target stands at the last plus one."""

    @property
    def batch(self) -> int:
        """The number of contexts."""
        return len(self.tokens_BMD if self.tokens_BMD is not None else self.keys_values[0].k_BHMK)

    def repeat_interleave(self, times: int) -> "ContextCache":
        """Every context `times` times over, for candidates that part ways."""
        return ContextCache(
            keys_values=[KeysValues(*(x.repeat_interleave(times, 0) for x in kv)) for kv in self.keys_values],
            tokens_BMD=None if self.tokens_BMD is None else self.tokens_BMD.repeat_interleave(times, 0),
            mask_BM=None if self.mask_BM is None else self.mask_BM.repeat_interleave(times, 0),
            frame_T=self.frame_T,
        )


class CDiT(ModelMixin, ConfigMixin):
    """Predicts what a frame's denoising objective asks for, from a noisy frame, past frames, action and time shift.

    After `enable_gradient_checkpointing()` a block leaves only its input in memory, and makes the rest, its keys and
    values of the context among it, once more in the backward pass (Chen et al. 2016, arXiv 1604.06174).

    Args:
        image_size: (height, width) of what is denoised, in pixels or latent cells; multiples of patch_size.
        in_channels: C.
        max_context: the most past frames that can be given.
        learn_variance: twice the output channels, the second half for the variance (Nichol & Dhariwal 2021).

    The other arguments are the fields of `cdit.model.ModelConfig`.

    Raises:
        UserError: sizes that do not divide, naming the fields.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        image_size: tuple[int, int] = (64, 64),
        in_channels: int = 3,
        max_context: int = 4,
        patch_size: int = 2,
        hidden_size: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        context_depth: int = 0,
        context_modulation: bool = False,
        position: Literal["rotary", "learned"] = "rotary",
        extra_kv: bool = False,
        qk_norm: bool = False,
        norm: Literal["pre", "post"] = "pre",
        dropout: float = 0.0,
        use_action: bool = True,
        use_time_shift: bool = True,
        embedding_scale: float = 30.0,
        init: Literal["native", "published"] = "native",
        learn_variance: bool = False,
    ):
        super().__init__()
        if any(side % patch_size for side in image_size):
            raise UserError(f"patch_size {patch_size} must divide the size of what is denoised, {tuple(image_size)}")
        if hidden_size % num_heads:
            raise UserError(f"hidden_size {hidden_size} must be a multiple of num_heads {num_heads}")
        if position == "rotary" and hidden_size // num_heads % 2:
            raise UserError(f"rotary positions need heads of even width, not {hidden_size // num_heads}")
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.out_channels = in_channels * (2 if learn_variance else 1)
        self.gradient_checkpointing = False

        self.patch_embed = PatchEmbed(tuple(image_size), patch_size, in_channels, hidden_size)
        self.time_embed = ScalarEmbedding(hidden_size)
        self.shift_embed = ScalarEmbedding(hidden_size, embedding_scale) if use_time_shift else None
        self.action_embed = ActionEmbedding(hidden_size, embedding_scale) if use_action else None
        self.pos_embed = None
        if position == "learned":  # slots of the past frames, oldest first, then the target's
            self.pos_embed = nn.Parameter(torch.empty(max_context + 1, self.grid[0] * self.grid[1], hidden_size))
        self.context_blocks = nn.ModuleList(
            ContextBlock(hidden_size, num_heads, mlp_ratio, qk_norm) for _ in range(context_depth)
        )
        self.context_norm = layer_norm(hidden_size)
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, mlp_ratio, qk_norm, extra_kv, context_modulation, norm, dropout)
            for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Draws the initial weights from torch's global generator."""
        for module in self.modules():  # Xavier: keeps the scale of a token, or of a condition, through a linear map
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        if self.config.init == "published":
            self._shrink_weights()
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # the convolution is a linear map of a patch
        nn.init.zeros_(self.patch_embed.proj.bias)
        if self.action_embed is not None:
            nn.init.normal_(self.action_embed.unknown, std=0.4)  # as large as the embeddings of known actions
        if self.pos_embed is not None:
            nn.init.normal_(self.pos_embed, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.ada_ln.weight)  # gates closed: every block starts as the identity
            if block.cross_attn.extra_k is not None:
                nn.init.xavier_normal_(block.cross_attn.extra_k.view(1, 1, -1))
                nn.init.xavier_normal_(block.cross_attn.extra_v.view(1, 1, -1))
        nn.init.zeros_(self.final_layer.ada_ln.weight)
        nn.init.zeros_(self.final_layer.linear.weight)  # the first prediction is zero

    def _shrink_weights(self) -> None:
        """Where the NWM release starts from smaller weights: conditions, and queries, keys and values."""
        for module in self.modules():
            if isinstance(module, ScalarEmbedding):
                nn.init.normal_(module.mlp.fc1.weight, std=0.02)
                nn.init.normal_(module.mlp.fc2.weight, std=0.02)
            elif isinstance(module, MultiHeadAttention):  # there one (3·D, D) matrix: bound √(6 / 4·D)
                for linear in (module.q, module.kv):
                    bound = (6 / (4 * linear.in_features)) ** 0.5
                    nn.init.uniform_(linear.weight, -bound, bound)

    def encode_context(self, frames: Tensor, mask: Tensor | None = None, end: int = 0) -> ContextCache:
        """Encodes past frames once, for any number of calls of `forward`.

        Args:
            frames: (B, T, C, H, W), consecutive, oldest first; T from 1 to max_context.
            mask: (B, T), True where a frame exists; None where all do. What a missing frame holds is not looked at.
            end: frame coordinate of the last frame.

        Raises:
            ValueError: more frames than max_context.
        """
        context = self._encode(frames, mask, end)
        if self.config.context_modulation:
            return context
        rotation = self._rotation(context.frame_T)
        keys_values = [block.project_kv(context.tokens_BMD, rotation) for block in self.blocks]
        return replace(context, keys_values=keys_values, tokens_BMD=None)

    def _encode(self, frames: Tensor, mask: Tensor | None = None, end: int = 0) -> ContextCache:
        """Past frames as tokens, of which each block is to make its own keys and values."""
        batch, count = frames.shape[:2]
        if count > self.config.max_context:
            raise ValueError(f"{count} past frames, but max_context is {self.config.max_context}")
        if mask is not None:
            frames = torch.where(mask[:, :, None, None, None], frames, 0.0)
        x = self.patch_embed(frames.flatten(0, 1)).unflatten(0, (batch, count))  # (B, T, P, D)
        if self.pos_embed is not None:
            x = x + self.pos_embed[-1 - count : -1]
        frame_T = torch.arange(end - count + 1, end + 1, device=x.device)
        x = x.flatten(0, 1)
        for block in self.context_blocks:
            x = self._run(block, x, self._rotation(frame_T[-1:]))
        x = self.context_norm(x).unflatten(0, (batch, count)).flatten(1, 2)
        return ContextCache(
            keys_values=[],
            tokens_BMD=x,
            mask_BM=None if mask is None else mask.repeat_interleave(x.shape[1] // count, dim=1),
            frame_T=frame_T,
        )

    def push_context(self, cache: ContextCache, frame: Tensor) -> ContextCache:
        """The cache of a window slid by one frame: the new frame joins; the oldest leaves when the window is full.

        Args:
            cache: of B contexts.
            frame: (B, C, H, W), the frame after the last one.

        Raises:
            ValueError: positions are learned per slot, so that every past frame would have to be encoded anew.
        """
        if not self.can_push:
            raise ValueError("a context with learned positions cannot be pushed: encode the new window")
        new = self.encode_context(frame[:, None], end=int(cache.frame_T[-1]) + 1)
        frame_T = torch.cat((cache.frame_T, new.frame_T))[-self.config.max_context :]
        tokens = len(frame_T) * self.grid[0] * self.grid[1]
        tokens_BMD = mask_BM = None
        if cache.tokens_BMD is not None:
            tokens_BMD = torch.cat((cache.tokens_BMD, new.tokens_BMD), dim=1)[:, -tokens:]
        if cache.mask_BM is not None:
            mask_BM = F.pad(cache.mask_BM, (0, self.grid[0] * self.grid[1]), value=True)[:, -tokens:]
        return ContextCache(
            keys_values=[
                KeysValues(*(torch.cat(pair, dim=2)[:, :, -tokens:] for pair in zip(old, fresh, strict=True)))
                for old, fresh in zip(cache.keys_values, new.keys_values, strict=True)
            ],
            tokens_BMD=tokens_BMD,
            mask_BM=mask_BM,
            frame_T=frame_T,
        )

    @property
    def can_push(self) -> bool:
        """Whether `push_context` works: with rotary positions, which know differences only."""
        return self.pos_embed is None

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        action: Tensor | None,
        time_shift: Tensor | None,
        context: Tensor | ContextCache,
        context_mask: Tensor | None = None,
        action_mask: Tensor | None = None,
    ) -> Tensor:
        """Predicts in the shape of the sample (twice the channels where variance is learned).

        Args:
            sample: (B, C, H, W) noisy targets, or (B, G, C, H, W) for several goals of one context.
            timestep: (B[, G]) diffusion time, 0 (clean) to 1000 (noise).
            action: (B[, G], 3) normalised dx, dy, dyaw in the local frame of the last past frame. None: all unknown.
            time_shift: (B[, G]) normalised time from the last past frame to the target, negative for the past. May be
                None where the model does not use it.
            context: (B, T, C, H, W) past frames, oldest first, or what `encode_context` made of them.
            context_mask: (B, T), True where a past frame exists; with frames only.
            action_mask: (B[, G]), False where the action is unknown; None where all are known.
        """
        if isinstance(context, Tensor):
            context = self._encode(context, context_mask)
        if action is None:
            action = sample.new_zeros(*timestep.shape, 3)
            action_mask = torch.zeros_like(timestep, dtype=torch.bool)

        x = self.patch_embed(sample.reshape(-1, *sample.shape[-3:]))  # (B·G, P, D)
        if self.pos_embed is not None:
            x = x + self.pos_embed[-1]
        condition = self.time_embed(timestep.flatten())
        if self.shift_embed is not None:
            condition = condition + self.shift_embed(time_shift.flatten())
        if self.action_embed is not None:
            known = None if action_mask is None else action_mask.flatten()
            condition = condition + self.action_embed(action.reshape(-1, 3), known)
        condition = F.silu(condition)

        rotation, context_rotation = self._rotation(context.frame_T[-1:] + 1), None
        per_block, mask_BM = context.keys_values, context.mask_BM
        if context.tokens_BMD is not None:
            # Keys and values that follow the condition are each goal's own.
            goals = len(x) // context.batch if self.config.context_modulation else 1
            per_block = [context.tokens_BMD.repeat_interleave(goals, 0)] * len(self.blocks)
            mask_BM = None if mask_BM is None else mask_BM.repeat_interleave(goals, 0)
            context_rotation = self._rotation(context.frame_T)
        for block, keys_values in zip(self.blocks, per_block, strict=True):
            x = self._run(block, x, condition, keys_values, mask_BM, rotation, context_rotation)
        return self._unpatchify(self.final_layer(x, condition)).reshape(*sample.shape[:-3], -1, *sample.shape[-2:])

    def _run(self, block: nn.Module, *inputs: Tensor | KeysValues | Rotation | None) -> Tensor:
        checkpointing = self.gradient_checkpointing and torch.is_grad_enabled()
        return self._gradient_checkpointing_func(block, *inputs) if checkpointing else block(*inputs)

    def _rotation(self, frame_T: Tensor) -> Rotation | None:
        """Rotation of the tokens of frames at these coordinates, T·P of them; None where positions are learned."""
        if self.pos_embed is not None:
            return None
        rows, columns = (torch.arange(side, device=frame_T.device) for side in self.grid)
        position = torch.stack(torch.meshgrid(frame_T, rows, columns, indexing="ij"), dim=-1).flatten(0, 2).float()
        return axial_rotation(position, self.config.hidden_size // self.config.num_heads)

    def _unpatchify(self, x: Tensor) -> Tensor:
        """(B·G, P, p·p·C), each patch laid out (row, column, channel), to (B·G, C, H, W)."""
        p = self.config.patch_size
        x = x.reshape(len(x), *self.grid, p, p, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.out_channels, self.grid[0] * p, self.grid[1] * p)
