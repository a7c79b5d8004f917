"""Skip non-finite updates and spikes on the device; norms by layer."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt.optim import gradient_norm


class LayerStats:
    """How large each layer's gradient and update are, and which updates were clipped; kept on the device.

    `parts`: the parameters of each layer, by its name: "tokens", "blocks.0" and so on, "norm".
    """

    def __init__(self, model: nn.Module, limit: float):
        """limit: grad_clip, the norm above which gradients are clipped; 0: none."""
        self.parts: dict[str, list[Tensor]] = {}
        for name, parameter in model.named_parameters():
            layer = ".".join(name.split(".")[: 2 if name.startswith("blocks.") else 1])
            self.parts.setdefault(layer, []).append(parameter)
        self.limit = limit or math.inf
        self.found: list[Tensor] = []
        self.old: dict[str, Any] = {}

    @torch.no_grad()
    def before_update(self, grad_norm: Tensor, whole: bool) -> None:
        """See whether the update is clipped; `whole`: measure its layers too, which takes a copy of the weights."""
        self.clipped = ((grad_norm > self.limit) & grad_norm.isfinite()).float()
        if whole:
            self.found = [gradient_norm(part) for part in self.parts.values()]
            self.old = {name: torch._foreach_mul(part, 1.0) for name, part in self.parts.items()}

    @torch.no_grad()
    def after_update(self) -> list[Tensor]:
        """Scalars: 1 if the update was clipped, else 0; then, where they were measured, a gradient's and an update's
        norm a layer, in the order of `parts`."""
        changes = [torch._foreach_sub(part, self.old.pop(name)) for name, part in self.parts.items() if self.old]
        found, self.found = self.found, []
        return [self.clipped, *found, *map(nn.utils.get_total_norm, changes)]


class UpdateGuard:
    """Turns an update with a non-finite loss or gradient norm into a no-op, on the device, with nobody waiting.

    With `patience` = 1 the first bad update also voids all later ones. A float16 loss scaler overflows as a matter of
    routine, so there `patience` bad updates in a row do. With `spikes` > 0 an update is skipped too whose gradient norm
    lies more than so many deviations above the median of the last `WINDOW`, both robust: the deviation is 1.4826 times
    the median distance from the median, which for normal numbers is the standard deviation.
    """

    WINDOW, ENOUGH = 100, 20  # norms remembered; norms without which nothing is called a spike

    def __init__(self, device: torch.device, max_bad_steps: int, spike_threshold: float = 0.0):
        self.max_bad_steps, self.spike_threshold = max_bad_steps, spike_threshold
        self.bad_in_a_row = torch.zeros((), device=device)  # read late by the host: the run has failed at `patience`
        self.skipped = torch.zeros((), device=device)  # spikes so far
        self.norms = torch.full((self.WINDOW,), math.nan, device=device)
        self.checked = 0

    def check(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """1.0 if the coming update must be skipped; all three are scalars."""
        bad = ~(loss + grad_norm).isfinite() | (self.bad_in_a_row >= self.max_bad_steps)
        self.bad_in_a_row = torch.where(bad, self.bad_in_a_row + 1, 0.0)
        if not self.spike_threshold:
            return bad.float()
        median = self.norms.nanmedian()
        deviation = 1.4826 * (self.norms - median).abs().nanmedian()
        spike = (
            (grad_norm > median + self.spike_threshold * deviation)
            & (self.norms.isfinite().sum() >= self.ENOUGH)
            & ~bad
        )
        self.skipped = self.skipped + spike
        # Spikes are remembered too: where the norm has risen for good, the median follows.
        self.norms[self.checked % self.WINDOW] = torch.where(bad, math.nan, grad_norm)
        self.checked += 1
        return (bad | spike).float()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON can say it."""
        norms = [norm if math.isfinite(norm) else None for norm in self.norms.tolist()]
        return {"skipped": self.skipped.item(), "norms": norms, "checked": self.checked}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave; {} changes nothing."""
        norms = [math.nan if norm is None else norm for norm in state.get("norms", [])[-self.WINDOW :]]
        self.skipped.fill_(state.get("skipped", 0.0))
        self.norms[: len(norms)] = torch.tensor(norms, device=self.norms.device)
        self.checked = state.get("checked", 0)
