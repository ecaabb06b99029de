# SPDX-License-Identifier: Apache-2.0
"""AdamW over fp32 masters.

Where the draft is fp32 its parameters are the masters and nothing is kept twice. Where it is bf16, every parameter has
an fp32 master: gradients of all micro-batches are added up in fp32, the master is updated, and the parameter is the
master rounded. A checkpoint holds masters, never rounded parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

DRAFT = "draft."
OPTIMIZER = "optimizer."

_BETAS = (0.9, 0.999)
"""Adam's own (arXiv 1412.6980), as every trainer of drafts has them."""
_EPS = 1e-8
"""Adam's own."""
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class DraftOptimizer:
    """Owns the trained parameters' masters, gradients and moments.

    A parameter that got no gradient in a window counts as one with gradient zero, so that the update does not depend
    on which micro-batch or rank would have reached it.
    """

    def __init__(self, draft: nn.Module, *, weight_decay: float) -> None:
        self._draft = draft
        self._trained = {name: p for name, p in draft.named_parameters() if p.requires_grad}
        self.masters = {name: _master(parameter) for name, parameter in self._trained.items()}
        for name, parameter in self._trained.items():
            if self.masters[name] is not parameter:
                parameter.register_post_accumulate_grad_hook(partial(_collect, self.masters[name]))
        # fused: one pass over each tensor, several times faster than the others on CPU, and deterministic
        self._adamw = torch.optim.AdamW(
            list(self.masters.values()), lr=0.0, betas=_BETAS, eps=_EPS, weight_decay=weight_decay, fused=True
        )
        for master in self.masters.values():
            self._adamw.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }

    def clear_gradients(self) -> None:
        """Begin a window."""
        for master in self.masters.values():
            master.grad = None

    def gradients(self) -> list[Tensor]:
        """The window's gradients (fp32), in a fixed order; zeros where none came."""
        for master in self.masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [gradient for master in self.masters.values() if (gradient := master.grad) is not None]

    def step(self, learning_rate: float) -> None:
        """Update the masters, and the parameters from them."""
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self.publish_masters()

    @torch.no_grad()
    def publish_masters(self) -> None:
        """Round the masters into the draft's parameters, where they are not the same tensors."""
        for name, parameter in self._trained.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def state(self) -> dict[str, Tensor]:
        """Everything training continues from, by name; the tensors themselves, so filling them restores it.

        The draft's own ``state_dict`` with masters in place of rounded parameters (``draft.*``) and the moments
        (``optimizer.*``). Call ``publish_masters`` after filling.
        """
        draft = {name: self.masters.get(name, tensor) for name, tensor in self._draft.state_dict().items()}
        moments = dict(self._moments())
        return {f"{DRAFT}{k}": v.detach() for k, v in draft.items()} | {
            f"{OPTIMIZER}{k}": v for k, v in moments.items()
        }

    def _moments(self) -> Iterator[tuple[str, Tensor]]:
        for name, master in self.masters.items():
            for moment in _MOMENTS:
                yield f"{moment}.{name}", self._adamw.state[master][moment]


@torch.no_grad()
def _collect(master: Tensor, parameter: nn.Parameter) -> None:
    """Move a parameter's gradient to its master; bf16 sums over micro-batches would lose what is small."""
    if parameter.grad is None:
        return
    gradient = parameter.grad.float()
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
    parameter.grad = None


def _master(parameter: nn.Parameter) -> Tensor:
    return parameter if parameter.dtype == torch.float32 else parameter.detach().to(torch.float32).clone()
