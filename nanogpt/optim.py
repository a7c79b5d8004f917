"""AdamW over named parameters, its learning rate, and the guard that keeps a broken gradient from the weights."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from nanogpt import InputError


def adamw(model: nn.Module, learning_rate: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019); matrices and embeddings decay, gains and biases do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


def cosine(step: int, *, peak: float, floor: float, warmup: int, end: int) -> float:
    """Learning rate of the update after `step` updates: up in a line for `warmup` updates, down in half a cosine wave
    that reaches `floor` at `end`, `floor` from there on (Loshchilov and Hutter 2017)."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if step >= end:
        return floor
    progress = (step - warmup) / (end - warmup)
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


def clip(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """Scale all gradients together to a norm of at most `limit` (0: leave them); returns the norm before, a scalar."""
    parameters = list(parameters)
    if limit > 0:
        return nn.utils.clip_grad_norm_(parameters, limit)
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


class Guard:
    """Turns an update with a non-finite loss or gradient norm into a no-op, on the device, with nobody waiting.

    With `patience` = 1 the first bad update also voids all later ones. A float16 loss scaler overflows as a matter of
    routine, so there `patience` bad updates in a row do.
    """

    def __init__(self, device: torch.device, patience: int):
        self.patience = patience
        self.bad_in_a_row = torch.zeros((), device=device)  # read late by the host: the run has failed at `patience`

    def check(self, optimizer: torch.optim.Optimizer, loss: Tensor, grad_norm: Tensor) -> None:
        """Tell torch's fused AdamW to skip the coming step if `loss` or `grad_norm`, both scalars, is not finite."""
        bad = ~(loss + grad_norm).isfinite() | (self.bad_in_a_row >= self.patience)
        self.bad_in_a_row = torch.where(bad, self.bad_in_a_row + 1, 0.0)
        if loss.device.type != "mps":
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        elif bad:  # waits: on MPS torch 2.13's fused AdamW does not heed found_inf; remove this once it does
            optimizer.zero_grad(set_to_none=True)


def state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state by name, `<parameter>/<state>`, whatever its groups and their order."""
    named = model.named_parameters()
    return {f"{name}/{key}": value for name, p in named for key, value in optimizer.state.get(p, {}).items()}


def load_state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """The inverse of `state_tensors`. Raises InputError where the tensors are not those of this model's parameters."""
    parameters = dict(model.named_parameters())
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        parameter = parameters.get(name)
        if parameter is None or tensor.shape not in (parameter.shape, torch.Size()):
            raise InputError(f"optimizer state {full_name} does not fit this model: resume from another checkpoint")
        optimizer.state[parameter][key] = tensor.to(parameter.device, copy=True)
