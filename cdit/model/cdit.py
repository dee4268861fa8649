"""CDiT, the Conditional Diffusion Transformer of Navigation World Models (Bar et al. 2025, arXiv 2412.03572).

Each block runs self-attention over the tokens of the frame being denoised, cross-attention from them to the tokens of
the past frames, then an MLP; AdaLN-Zero (Peebles & Xie 2023, arXiv 2212.09748) conditions every branch on diffusion
time, action and time shift. Cost is linear in the number of past frames.

Shape suffixes: B contexts, G goals of a context (their targets share its keys and values), T past frames, C channels,
P patches of a frame, M = T·P context tokens, D width, W that of the wide head; S rows of encoded frames, each shared by
consecutive targets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from timm.layers import PatchEmbed
from torch import Tensor, nn

from cdit.common.errors import UserError
from cdit.model.attention import KeysValues, MultiHeadAttention, Part, side_by_side
from cdit.model.blocks import Block, ContextBlock, ContextTokens, FinalLayer, OutputConvolutions, WideBlock, layer_norm
from cdit.model.conditioners import (
    CONDITIONERS,
    ActionConditioner,
    IntervalConditioner,
    NoiseEmbedding,
    ScalarEmbedding,
    TextConditioner,
    TimeShiftConditioner,
)
from cdit.model.reprojection import reproject
from cdit.model.rotary import Rotation, axial_rotation, corner

DEPTH_LOGIT = -2.0
"""Logit of the initial inverse depth: its softplus, 0.127, is a depth of 8 spacings."""


@dataclass
class EncodedFrames:
    """Consecutive past frames of S contexts, or of S candidates for what follows them, encoded."""

    keys_values: list[KeysValues]
    """Per block, (S, H, M, K) each, with the extra ones. Empty if blocks compute their own from `tokens_SMD`."""
    tokens_SMD: Tensor | None
    """Tokens, if K and V depend on the condition or are used only once; otherwise None."""
    mask_ST: Tensor | None
    """True where a frame exists; None if all do."""
    frame_T: Tensor
    """Frame coordinates, oldest first."""
    patches: int
    """P."""

    @property
    def rows(self) -> int:
        """S."""
        return len(self.keys_values[0].k_BHMK if self.tokens_SMD is None else self.tokens_SMD)

    def newest(self, frames: int) -> "EncodedFrames":
        """The last frames, in the same memory, without the extra key, which belongs after the newest frame."""
        first, end = ((len(self.frame_T) - before) * self.patches for before in (frames, 0))
        return replace(
            self,
            keys_values=[KeysValues(*(x[:, :, first:end] for x in kv)) for kv in self.keys_values],
            tokens_SMD=None if self.tokens_SMD is None else self.tokens_SMD[:, first:],
            mask_ST=None if self.mask_ST is None else self.mask_ST[:, -frames:],
            frame_T=self.frame_T[-frames:],
        )

    def followed_by(self, new: "EncodedFrames") -> "EncodedFrames":
        """These frames followed by new ones, which all exist."""
        pairs = zip(self.keys_values, new.keys_values, strict=True)
        return replace(
            self,
            keys_values=[KeysValues(*(torch.cat(x, dim=2) for x in zip(*pair, strict=True))) for pair in pairs],
            tokens_SMD=None if self.tokens_SMD is None else torch.cat((self.tokens_SMD, new.tokens_SMD), dim=1),
            mask_ST=None if self.mask_ST is None else F.pad(self.mask_ST, (0, len(new.frame_T)), value=True),
            frame_T=torch.cat((self.frame_T, new.frame_T)),
        )


@dataclass
class ContextCache:
    """Encoded past frames: what cross-attention attends to, reused at every denoising step and for every goal.

    Candidates share their common past; their own frames are a separate part that follows it.
    """

    parts: list[EncodedFrames]
    """Oldest first. The number of rows of each part divides that of the next, and consecutive rows share one."""
    last_SCHW: Tensor
    """The last past frame, which the network may reproject."""

    @property
    def rows(self) -> int:
        """The number of pasts: of contexts, or of candidates that have frames of their own."""
        return self.parts[-1].rows

    @property
    def frame_T(self) -> Tensor:
        """Frame coordinates, consecutive, oldest first. The coordinate of the target is the last plus one."""
        return torch.cat([part.frame_T for part in self.parts])

    def newest(self, frames: int) -> list[EncodedFrames]:
        """The parts that hold the last frames; nothing is copied."""
        parts: list[EncodedFrames] = []
        for part in reversed(self.parts):
            if frames > 0:
                parts.insert(0, part.newest(min(frames, len(part.frame_T))))
            frames -= len(part.frame_T)
        return parts


class CDiT(ModelMixin, ConfigMixin):
    """Predicts the target of a denoising objective from a noisy frame, past frames and further conditions.

    The wide head follows DiT^DH (Zheng et al. 2025, arXiv 2510.11690): its blocks start from their own embedding of the
    noisy frame, and the output of the other blocks, plus the condition, modulates each token.

    After `enable_gradient_checkpointing()` a block keeps only its input in memory and recomputes the rest, including
    its keys and values of the context, in the backward pass (Chen et al. 2016, arXiv 1604.06174).

    Args:
        image_size: (height, width) of what is denoised, in pixels or latent cells; multiples of patch_size.
        in_channels: C.
        max_context: the largest number of past frames.
        learn_variance: twice the output channels, the second half for the variance (Nichol & Dhariwal 2021).
        action_size: K, how many numbers an action has.
        text_size: E, the size of text embeddings; 0: the network is not conditioned on texts.
        focal: of the camera for `reprojection`, see `cdit.model.reprojection.reproject`.

    The other arguments are the fields of `cdit.model.ModelConfig`.

    Raises:
        UserError: sizes are not divisible; the message names the fields.
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
        steered_queries: bool = False,
        context_norm: Literal["both", "keys", "none"] = "both",
        context_noise: float = 0.0,
        extra_kv: bool = False,
        qk_norm: bool = False,
        norm: Literal["pre", "post"] = "pre",
        output_channels: int = 0,
        wide_head_depth: int = 0,
        wide_head_width: int = 2048,
        place_embedding: bool = False,
        reprojection: bool = False,
        resampling: Literal["bilinear", "bicubic"] = "bicubic",
        dropout: float = 0.0,
        use_action: bool = True,
        use_time_shift: bool = True,
        extra_conditioners: Mapping[str, str] | None = None,
        embedding_scale: float = 30.0,
        init: Literal["native", "published"] = "native",
        learn_variance: bool = False,
        focal: tuple[float, float] = (1.0, 1.0),
        action_size: int = 3,
        text_size: int = 0,
    ):
        super().__init__()
        if any(side % patch_size for side in image_size):
            raise UserError(f"patch_size {patch_size} must divide the size of what is denoised, {tuple(image_size)}")
        if hidden_size % num_heads:
            raise UserError(f"hidden_size {hidden_size} must be a multiple of num_heads {num_heads}")
        if position == "rotary" and hidden_size // num_heads % 2:
            raise UserError(f"rotary positions need heads of even width, not {hidden_size // num_heads}")
        if wide_head_depth and wide_head_width % (hidden_size // num_heads):
            raise UserError(
                f"wide_head_width {wide_head_width} must be a multiple of hidden_size / num_heads, "
                f"{hidden_size // num_heads}"
            )
        if steered_queries and position != "rotary":
            raise UserError(f"steered_queries needs position rotary, not {position}")
        if context_norm == "keys" and context_modulation:
            raise UserError("context_norm keys cannot be combined with context_modulation")
        if reprojection and (not output_channels or learn_variance):
            raise UserError("reprojection needs output_channels, and cannot be combined with a learned variance")
        if not 1 <= action_size <= hidden_size:
            raise UserError(f"action_size is {action_size}, expected 1 to hidden_size, {hidden_size}")
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.out_channels = in_channels * (2 if learn_variance else 1)
        self.gradient_checkpointing = False

        self.patch_embed = PatchEmbed(tuple(image_size), patch_size, in_channels, hidden_size)
        self.time_embed = ScalarEmbedding(hidden_size)
        self.conditioners = nn.ModuleDict()
        if use_time_shift:
            self.conditioners["time_shift"] = TimeShiftConditioner(hidden_size, embedding_scale)
        if use_action:
            self.conditioners["action"] = ActionConditioner(hidden_size, embedding_scale, action_size)
        if text_size:
            self.conditioners["text"] = TextConditioner(hidden_size, text_size)
        for name, kind in (extra_conditioners or {}).items():
            if name in self.conditioners:
                raise UserError(f"extra_conditioners: {name} is built in; choose another name")
            if not name.isidentifier():
                raise UserError(f"extra_conditioners: {name!r} is not a name of letters, digits and underscores")
            self.conditioners[name] = CONDITIONERS.get(kind)(hidden_size)
        self.pos_embed = None
        if position == "learned":  # slots of the past frames, oldest first, then the target's
            self.pos_embed = nn.Parameter(torch.empty(max_context + 1, self.grid[0] * self.grid[1], hidden_size))
        self.noise_embed = NoiseEmbedding(hidden_size) if context_noise else None
        self.place_embed = None
        if place_embedding:
            self.place_embed = nn.Parameter(torch.empty(self.grid[0] * self.grid[1], hidden_size))
        self.context_blocks = nn.ModuleList(
            ContextBlock(hidden_size, num_heads, mlp_ratio, qk_norm) for _ in range(context_depth)
        )
        self.token_norm = layer_norm(hidden_size) if context_norm == "both" else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(
                hidden_size,
                num_heads,
                mlp_ratio,
                qk_norm,
                extra_kv,
                context_modulation,
                norm,
                dropout,
                steering_grid=self.grid if steered_queries else None,
                key_norm=context_norm == "keys",
            )
            for _ in range(depth)
        )
        self.wide_embed = self.wide_condition = None
        if wide_head_depth:
            self.wide_embed = PatchEmbed(tuple(image_size), patch_size, in_channels, wide_head_width)
            self.wide_condition = nn.Linear(hidden_size, wide_head_width)
        wide_heads = wide_head_width // (hidden_size // num_heads)
        self.wide_blocks = nn.ModuleList(
            WideBlock(wide_head_width, wide_heads, mlp_ratio, qk_norm) for _ in range(wide_head_depth)
        )
        last_width = wide_head_width if wide_head_depth else hidden_size
        self.final_layer = FinalLayer(last_width, patch_size**2 * (output_channels or self.out_channels))
        self.output_convolutions = None
        if output_channels:
            added = int(reprojection)  # where the past frame shows the point; the logit of its share
            inputs = in_channels * (1 + added) + added
            self.output_convolutions = OutputConvolutions(output_channels, inputs, self.out_channels + added)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Draws the initial weights from torch's global generator."""
        for module in self.modules():  # Xavier: keeps the scale of a token, or of a condition, through a linear map
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.config.init == "published":
            self._shrink_weights()
        for embed in filter(None, (self.patch_embed, self.wide_embed)):
            nn.init.xavier_uniform_(embed.proj.weight.flatten(1))  # the convolution is a linear map of a patch
            nn.init.zeros_(embed.proj.bias)
        if "action" in self.conditioners:
            nn.init.normal_(self.conditioners["action"].unknown, std=0.4)  # as large as embeddings of known actions
        for conditioner in self.conditioners.values():
            if isinstance(conditioner, IntervalConditioner):
                nn.init.zeros_(conditioner.embedding.mlp.fc2.weight)  # no effect yet: a trained flow stays what it is
            if isinstance(conditioner, TextConditioner):
                nn.init.zeros_(conditioner.mlp.fc2.weight)  # the same
        if self.pos_embed is not None:
            nn.init.normal_(self.pos_embed, std=0.02)
        if self.noise_embed is not None:
            nn.init.zeros_(self.noise_embed.mlp.fc2.weight)  # a network trained without starts as it was
        if self.place_embed is not None:
            nn.init.normal_(self.place_embed, std=0.2)
        for block in self.blocks:
            nn.init.zeros_(block.ada_ln.weight)  # gates closed: every block starts as the identity
            if block.steering is not None:
                nn.init.zeros_(block.steering.linear.weight)  # queries attend to their own position
            if block.cross_attn.extra_k is not None:
                nn.init.xavier_normal_(block.cross_attn.extra_k.view(1, 1, -1))
                nn.init.xavier_normal_(block.cross_attn.extra_v.view(1, 1, -1))
        for block in self.wide_blocks:
            nn.init.zeros_(block.ada_ln.weight)
        nn.init.zeros_(self.final_layer.ada_ln.weight)
        if self.config.reprojection:  # the same inverse depth everywhere
            nn.init.zeros_(self.final_layer.linear.weight.unflatten(0, (-1, self.config.output_channels))[:, 0])
        last = self.final_layer.linear if self.output_convolutions is None else self.output_convolutions.conv3
        nn.init.zeros_(last.weight)  # the first prediction is zero
        nn.init.zeros_(last.bias)

    def _shrink_weights(self) -> None:
        """The smaller initial weights of the NWM release: for conditions, and for queries, keys and values."""
        for module in self.modules():
            if isinstance(module, ScalarEmbedding):
                nn.init.normal_(module.mlp.fc1.weight, std=0.02)
                nn.init.normal_(module.mlp.fc2.weight, std=0.02)
            elif isinstance(module, MultiHeadAttention):  # there one (3·D, D) matrix: bound √(6 / 4·D)
                for linear in (module.q, module.kv):
                    bound = (6 / (4 * linear.in_features)) ** 0.5
                    nn.init.uniform_(linear.weight, -bound, bound)

    def encode_context(
        self, frames: Tensor, mask: Tensor | None = None, noise_level: Tensor | None = None
    ) -> ContextCache:
        """Encodes past frames once, for any number of calls of `forward`.

        Args:
            frames: (B, T, C, H, W), consecutive, oldest first; T from 1 to max_context.
            mask: (B, T), True where a frame exists; None if all do. The content of missing frames is ignored.
            noise_level: (B, T) standard deviations of the frames' noise, for networks with `context_noise`; None: 0.

        Raises:
            ValueError: more frames than max_context, or a noise level for a network without.
        """
        return ContextCache([self._with_keys_values(self._encode(frames, mask, noise_level))], frames[:, -1])

    def push_context(self, cache: ContextCache, frame: Tensor, noise_level: Tensor | None = None) -> ContextCache:
        """The cache of the window slid by one frame: appends the new frame, and drops the oldest if the window is full.

        Args:
            cache: of B pasts.
            frame: (B, C, H, W), the frame after the last one; or (B·G, C, H, W), those of G candidates for each past.
                Candidates share the frames before, which are not copied; the new frame is stored per candidate.
            noise_level: (B,) or (B·G,) of the new frame, see `encode_context`; those of older frames stay.

        Raises:
            ValueError: positions are learned per slot, so every past frame would have to be encoded again.
        """
        if not self.can_push:
            raise ValueError("a context with learned positions cannot be pushed: encode the new window")
        level = None if noise_level is None else noise_level[:, None]
        new = self._encode(frame[:, None], noise_level=level, end=cache.parts[-1].frame_T[-1] + 1)
        new = self._with_keys_values(new)
        *shared, last = [*cache.newest(self.config.max_context - 1), new]
        if shared and shared[-1].rows == new.rows:
            last = shared.pop().followed_by(new)
        return ContextCache([*shared, last], frame)

    def _encode(
        self,
        frames: Tensor,
        mask: Tensor | None = None,
        noise_level: Tensor | None = None,
        end: Tensor | int = 0,
    ) -> EncodedFrames:
        """Past frames, the last one at coordinate `end`, as tokens from which blocks compute keys and values."""
        batch, count = frames.shape[:2]
        if count > self.config.max_context:
            raise ValueError(f"{count} past frames, but max_context is {self.config.max_context}")
        if mask is not None:
            frames = torch.where(mask[:, :, None, None, None], frames, 0.0)
        x = self.patch_embed(frames.flatten(0, 1)).unflatten(0, (batch, count))  # (B, T, P, D)
        if self.pos_embed is not None:
            x = x + self.pos_embed[-1 - count : -1]
        if self.place_embed is not None:
            x = x + self.place_embed
        if noise_level is not None:
            if self.noise_embed is None:
                raise ValueError("a noise level, but the network was built without context_noise")
            x = x + self.noise_embed(noise_level)[:, :, None]
        frame_T = torch.arange(1 - count, 1, device=x.device) + end
        x = x.flatten(0, 1)
        for block in self.context_blocks:
            x = self._run(block, x, self._rotation(frame_T[-1:]))
        x = self.token_norm(x).unflatten(0, (batch, count)).flatten(1, 2)
        return EncodedFrames([], tokens_SMD=x, mask_ST=mask, frame_T=frame_T, patches=self.grid[0] * self.grid[1])

    def _with_keys_values(self, frames: EncodedFrames) -> EncodedFrames:
        """Replaces tokens by the keys and values of every block, unless these depend on the condition."""
        if self.config.context_modulation:
            return frames
        rotation, target = self._rotation(frames.frame_T), self._rotation(frames.frame_T[-1:] + 1)
        made = [block.project_kv(frames.tokens_SMD, rotation, corner(target)) for block in self.blocks]
        # Values are a view of a projection whose other half, unrotated keys, would stay in memory with them.
        keys_values = [KeysValues(*(x.contiguous() for x in kv)) for kv in made]
        return replace(frames, keys_values=keys_values, tokens_SMD=None)

    @property
    def can_push(self) -> bool:
        """Whether `push_context` works: with rotary positions, which depend on differences only."""
        return self.pos_embed is None

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        condition: Mapping[str, Tensor],
        context: Tensor | ContextCache,
        context_mask: Tensor | None = None,
        noise_level: Tensor | None = None,
    ) -> Tensor:
        """Predicts in the shape of the sample (twice the channels if variance is learned).

        Args:
            sample: (B, C, H, W) noisy targets, or (B, G, C, H, W) for several goals of one context; for a cache of
                candidates with frames of their own, G is a multiple of their number.
            timestep: (B[, G]) diffusion time, 0 (clean) to 1000 (noise).
            condition: normalised conditions by name, for the conditioners: `time_shift` (B[, G]) from the last past
                frame to the target, negative for the past; `action` (B[, G], K), such as dx, dy, dyaw in the frame of
                the last past frame, absent if all are unknown, and `action_known` (B[, G]), False where unknown; with
                `text_size` also `text` (B[, G], E), zeros where there is none; with `reprojection` also `motion`
                (B[, G], 3), the action in spacings and radians.
            context: (B, T, C, H, W) past frames, oldest first, or the result of `encode_context`.
            context_mask: (B, T), True where a past frame exists; with frames only.
            noise_level: (B, T) of the past frames, see `encode_context`; with frames only.
        """
        if isinstance(context, Tensor):
            context = ContextCache([self._encode(context, context_mask, noise_level)], context[:, -1])
        x = self.patch_embed(sample.reshape(-1, *sample.shape[-3:]))  # (B·G, P, D)
        if self.pos_embed is not None:
            x = x + self.pos_embed[-1]
        if self.place_embed is not None:
            x = x + self.place_embed
        pooled = self.time_embed(timestep.flatten())
        for conditioner in self.conditioners.values():
            pooled = pooled + conditioner(condition)
        activated = F.silu(pooled)

        frame_1 = context.parts[-1].frame_T[-1:] + 1
        position, rotation = self._position(frame_1), self._rotation(frame_1)
        for block, looked_at in zip(self.blocks, self._for_blocks(context, len(x)), strict=True):
            x = self._run(block, x, activated, looked_at, rotation, position)
        last_condition = activated[:, None]
        if self.wide_embed is not None:
            last_condition = self.wide_condition(F.silu(x + pooled[:, None]))  # (B·G, P, W)
            x = self.wide_embed(sample.reshape(-1, *sample.shape[-3:]))
            for block in self.wide_blocks:
                x = self._run(block, x, last_condition, rotation)
        x = self._unpatchify(self.final_layer(x, last_condition))
        if self.config.reprojection:
            x = self._blend(x, sample.reshape(-1, *sample.shape[-3:]), condition, context.last_SCHW)
        elif self.output_convolutions is not None:
            x = self.output_convolutions(x, sample.flatten(0, -4))
        return x.contiguous().view(*sample.shape[:-3], -1, *sample.shape[-2:])

    def _blend(self, features: Tensor, noisy: Tensor, condition: Mapping[str, Tensor], last: Tensor) -> Tensor:
        """The prediction of the output convolutions, blended with the last past frame where that shows the target."""
        dtype = torch.promote_types(noisy.dtype, torch.float32)
        last = side_by_side([last], len(noisy), dim=1).to(dtype)
        if "motion" in condition:
            motion = condition["motion"].reshape(-1, 3).to(dtype)
            known = condition.get("action_known", motion.new_ones(len(motion), dtype=torch.bool)).flatten()
        else:
            motion, known = last.new_zeros(1, 3), last.new_zeros(1, dtype=torch.bool)
        inverse_depth = F.softplus(features[:, 0].to(dtype) + DEPTH_LOGIT)
        motion = motion.masked_fill(~known[:, None], 0.0)
        reprojected, seen = reproject(last, inverse_depth, motion, self.config.focal, self.config.resampling)
        seen = seen & known[:, None, None, None]
        inputs = torch.cat((noisy.to(dtype), reprojected, seen), dim=1)
        generated, share = self.output_convolutions(features, inputs).to(dtype).split((self.out_channels, 1), dim=1)
        return torch.lerp(generated, reprojected, share.sigmoid() * seen).to(noisy.dtype)

    def _for_blocks(self, context: ContextCache, targets: int) -> list[list[Part]] | list[ContextTokens]:
        """What each block attends to."""
        parts = context.parts
        if parts[0].tokens_SMD is None:
            masks = [self._token_mask(part.mask_ST, last=part is parts[-1]) for part in parts]
            per_block = zip(*(part.keys_values for part in parts), strict=True)
            return [[Part(kv, mask) for kv, mask in zip(block, masks, strict=True)] for block in per_block]
        # If keys and values follow the condition, each target has its own.
        rows = targets if self.config.context_modulation else context.rows
        tokens = side_by_side([part.tokens_SMD for part in parts], rows, dim=1)
        mask = None
        if any(part.mask_ST is not None for part in parts):
            masks = [
                torch.ones_like(part.frame_T, dtype=torch.bool)[None] if part.mask_ST is None else part.mask_ST
                for part in parts
            ]
            mask = self._token_mask(side_by_side(masks, rows, dim=1))
        return [ContextTokens(tokens, mask, self._rotation(context.frame_T))] * len(self.blocks)

    def _token_mask(self, mask_ST: Tensor | None, last: bool = True) -> Tensor | None:
        """(S, 1, 1, M) of (S, T), with the extra key if this part is the last."""
        if mask_ST is None:
            return None
        mask_SM = mask_ST.repeat_interleave(self.grid[0] * self.grid[1], 1)
        return F.pad(mask_SM, (0, int(last and self.config.extra_kv)), value=True)[:, None, None]

    def _run(self, block: nn.Module, *inputs: Tensor | Rotation | Sequence[Part] | ContextTokens | None) -> Tensor:
        checkpointing = self.gradient_checkpointing and torch.is_grad_enabled()
        return self._gradient_checkpointing_func(block, *inputs) if checkpointing else block(*inputs)

    def _rotation(self, frame_T: Tensor) -> Rotation | None:
        """Rotation of the tokens of frames at these coordinates, T·P of them; None if positions are learned."""
        if self.pos_embed is not None:
            return None
        return axial_rotation(self._position(frame_T), self.config.hidden_size // self.config.num_heads)

    def _position(self, frame_T: Tensor) -> Tensor:
        """(frame, row, column) of the tokens of frames at these coordinates, (T·P, 3)."""
        rows, columns = (torch.arange(side, device=frame_T.device) for side in self.grid)
        return torch.stack(torch.meshgrid(frame_T, rows, columns, indexing="ij"), dim=-1).flatten(0, 2).float()

    def _unpatchify(self, x: Tensor) -> Tensor:
        """(B·G, P, p·p·C), each patch laid out (row, column, channel), to (B·G, C, H, W), channels last in memory."""
        p = self.config.patch_size
        x = x.reshape(len(x), *self.grid, p, p, -1).transpose(2, 3)
        return x.reshape(len(x), self.grid[0] * p, self.grid[1] * p, -1).permute(0, 3, 1, 2)
