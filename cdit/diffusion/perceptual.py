"""A perceptual loss on the clean frame that the network predicts from a noisy one."""

from collections.abc import Callable

import torch
from torch import Tensor

from cdit.common.errors import UserError
from cdit.common.lpips import WeightsNotAvailable, load_lpips
from cdit.diffusion.config import PerceptualConfig


class PerceptualLoss:
    """LPIPS between predicted and true frame where there is little noise.

    Args:
        config: backbone, weight, and the largest diffusion time.
        decode: latents (N, C, h, w) to frames (N, 3, H, W) in [-1, 1], differentiable.

    Raises:
        UserError: the backbone's weights are not available.
    """

    def __init__(self, config: PerceptualConfig, decode: Callable[[Tensor], Tensor]):
        self.config, self.decode = config, decode
        try:
            self.lpips = load_lpips(config.backbone)
        except WeightsNotAvailable as error:
            raise UserError(f"flow.perceptual.weight is {config.weight:g}, but {error}") from error

    def __call__(self, prediction: Tensor, clean: Tensor, time: Tensor) -> Tensor:
        """weight · LPIPS where time ≤ max_time, otherwise 0; in latents both frames are decoded.

        Args:
            prediction: (…, C, h, w), the predicted clean latents.
            clean: (…, C, h, w), the true ones.
            time: (…) diffusion times.
        """
        loss, chosen = prediction.new_zeros(time.shape), time <= self.config.max_time
        if chosen.any():
            with torch.no_grad():
                truth = self.decode(clean[chosen])
            distance = self.lpips.to(prediction.device)(self.decode(prediction[chosen]), truth)
            loss[chosen] = self.config.weight * distance.to(loss.dtype)
        return loss
