"""Guard the weights: skip non-finite updates and spikes on the device."""

import math
from typing import Any

import torch
from torch import Tensor

MAX_OVERFLOWS = 20  # float16 updates in a row that may overflow before the run counts as broken


class UpdateGuard:
    """Turns an update with a non-finite loss or gradient norm into a no-op, on the device, without a host wait.

    With max_bad_steps = 1 the first bad update also voids all later ones, until the host reads `bad_steps` and stops
    the run. A float16 loss scaler overflows routinely, so there max_bad_steps in a row end the run.

    With spike_threshold > 0 an update is skipped too if its gradient norm lies more than that many deviations above
    the median of the last WINDOW norms. The deviation is robust: 1.4826 times the median distance from the median,
    which for normal numbers is the standard deviation.
    """

    WINDOW = 100
    MIN_NORMS = 20  # norms to see before any is called a spike

    def __init__(self, device: torch.device, max_bad_steps: int, spike_threshold: float = 0.0):
        self.max_bad_steps = max_bad_steps
        self.spike_threshold = spike_threshold
        self.bad_steps = torch.zeros((), device=device)  # non-finite updates in a row
        self.skipped = torch.zeros((), device=device)  # spikes so far
        self.norms = torch.full((self.WINDOW,), math.nan, device=device)
        self.num_checked = 0

    def check(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """1.0 if the coming update must be skipped, else 0.0. All three are scalars."""
        is_bad = ~(loss + grad_norm).isfinite() | (self.bad_steps >= self.max_bad_steps)
        self.bad_steps = torch.where(is_bad, self.bad_steps + 1, 0.0)
        if not self.spike_threshold:
            return is_bad.float()

        median = self.norms.nanmedian()
        deviation = 1.4826 * (self.norms - median).abs().nanmedian()
        is_high = grad_norm > median + self.spike_threshold * deviation
        has_history = self.norms.isfinite().sum() >= self.MIN_NORMS
        is_spike = is_high & has_history & ~is_bad
        self.skipped = self.skipped + is_spike
        # Spikes are remembered too: if the norm has risen permanently, the median follows.
        self.norms[self.num_checked % self.WINDOW] = torch.where(is_bad, math.nan, grad_norm)
        self.num_checked += 1
        return (is_bad | is_spike).float()

    def state_dict(self) -> dict[str, Any]:
        norms = [norm if math.isfinite(norm) else None for norm in self.norms.tolist()]  # JSON has no NaN
        return {"skipped": self.skipped.item(), "norms": norms, "checked": self.num_checked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned; {} changes nothing."""
        norms = [math.nan if norm is None else norm for norm in state.get("norms", [])[-self.WINDOW :]]
        self.norms[: len(norms)] = torch.tensor(norms, device=self.norms.device)
        self.skipped.fill_(state.get("skipped", 0.0))
        self.num_checked = state.get("checked", 0)
