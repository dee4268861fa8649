"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) for hidden matrices, AdamW for the rest."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from cdit.training.sharding import whole

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration: singular values from 0 to 1 end between about 0.7 and 1.2."""


class Muon(torch.optim.AdamW):
    """Steps along the orthogonalised momentum of each matrix, scaled so that AdamW's learning rate and decay fit.

    The update is torch.optim.Muon's with Nesterov momentum and `adjust_lr_fn="match_rms_adamw"` (Liu et al. 2025, arXiv
    2502.16982: 0.2·√max(rows, columns), the root mean square of an update of AdamW). Matrices of one shape are
    orthogonalised in one batched product, and a matrix that stacks several, such as the fused one of keys and values,
    is split first. Sharded matrices are gathered first; each process keeps its rows of the result.

    Args:
        matrices: to orthogonalise; groups may have `splits`, the number of matrices stacked in each of theirs.
        others: groups for AdamW.
        momentum: decay of the matrices' momentum.
        newton_schulz_steps: iterations of the orthogonalisation.
        options: of AdamW, of which learning rate and weight decay are the matrices' too.

    If `found_inf` is set to a tensor of 1, a step changes nothing, as with a fused AdamW.
    """

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        others: list[dict[str, Any]],
        momentum: float = 0.95,
        newton_schulz_steps: int = 5,
        **options: Any,
    ):
        groups = [{"splits": 1, **group, "momentum": momentum} for group in matrices]
        super().__init__([*groups, *others], fused=True, **options)
        self.newton_schulz_steps = newton_schulz_steps
        for _, parameter in self._matrices():
            step = torch.zeros((), device=parameter.device)  # not used, but AdamW expects it in every state
            self.state[parameter] |= {"step": step, "momentum_buffer": torch.zeros_like(parameter)}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of both."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if "momentum" not in group]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        self._step_matrices()
        return loss

    def _matrices(self) -> list[tuple[dict[str, Any], nn.Parameter]]:
        """Each matrix to orthogonalise, after its group."""
        return [(group, p) for group in self.param_groups if "momentum" in group for p in group["params"]]

    def _step_matrices(self) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        matrices = [(group, parameter) for group, parameter in self._matrices() if parameter.grad is not None]
        for group, parameter in matrices:
            buffer = self.state[parameter]["momentum_buffer"]
            buffer.copy_(self._unless_bad(buffer.lerp(parameter.grad, 1 - group["momentum"]), buffer))
            update = whole(parameter.grad.lerp(buffer, group["momentum"]).bfloat16())
            for matrix in update.chunk(group["splits"]):
                by_shape[matrix.shape].append(matrix)
        orthogonal = {
            shape: iter(orthogonalised(torch.stack(updates), self.newton_schulz_steps))
            for shape, updates in by_shape.items()
        }
        for group, parameter in matrices:
            shape = torch.Size((parameter.shape[0] // group["splits"], parameter.shape[1]))
            update = torch.cat([next(orthogonal[shape]) for _ in range(group["splits"])]).to(parameter.dtype)
            rate = group["lr"] * 0.2 * max(shape) ** 0.5
            stepped = parameter * (1 - group["lr"] * group["weight_decay"]) - rate * _like(update, parameter)
            parameter.copy_(self._unless_bad(stepped, parameter))

    def _unless_bad(self, new: Tensor, old: Tensor) -> Tensor:
        """The new tensor; the old one where `found_inf` says that the gradients are not finite."""
        bad = getattr(self, "found_inf", None)
        return new if bad is None else torch.where(bad.bool(), old, new)


def orthogonalised(matrices_BMN: Tensor, steps: int = 5) -> Tensor:
    """About U·Vᵀ of each matrix U·S·Vᵀ, (B, M, N), in bfloat16, by Newton–Schulz iterations."""
    a, b, c = NEWTON_SCHULZ
    wide = matrices_BMN.shape[-2] <= matrices_BMN.shape[-1]
    x = matrices_BMN.bfloat16()
    x = (x if wide else x.mT).contiguous()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def _like(complete: Tensor, parameter: Tensor) -> Tensor:
    """A tensor that every process has, sharded as the parameter is."""
    if not isinstance(parameter, DTensor):
        return complete
    return distribute_tensor(complete, parameter.device_mesh, parameter.placements, src_data_rank=None)
