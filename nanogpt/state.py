"""The state of a training run: everything that a resumed run continues from, listed once."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanogpt.guard import UpdateGuard
from nanogpt.metrics import Stopwatch
from nanogpt.optim import Optimizer


@dataclass
class TrainState:
    """Weights, optimizer, counters. Noise is a function of the seed and these counters, so there is no generator state.

    model: the plain GPT, neither compiled nor wrapped.
    """

    model: Any
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    guard: UpdateGuard
    clock: Stopwatch = field(default_factory=Stopwatch)
    step: int = 0  # updates done
    samples: int = 0  # rows read
    val_loss: float | None = None  # of the evaluation at this step; None: not evaluated yet
    best_val_loss: float = math.inf
    evals_since_best: int = 0
    clipped: int = 0  # clipped updates since the last log line

    def record_evaluation(self, val_loss: float) -> bool:
        """Take in the loss of an evaluation at this step; True if it is the best so far."""
        is_best = val_loss < self.best_val_loss
        self.val_loss = val_loss
        self.best_val_loss = min(val_loss, self.best_val_loss)
        self.evals_since_best = 0 if is_best else self.evals_since_best + 1
        return is_best

    def record_update(self, rows: int) -> None:
        self.step += 1
        self.samples += rows
        self.val_loss = None

    def state_dict(self) -> dict[str, Any]:
        """The scalars, as JSON can hold them; the tensors are in `tensors`."""
        return {
            "step": self.step,
            "samples": self.samples,
            "time_s": self.clock.seconds,
            "val_loss": self.val_loss,
            "best_val_loss": self.best_val_loss if math.isfinite(self.best_val_loss) else None,
            "since_best": self.evals_since_best,
            "clipped": self.clipped,
            "scaler": self.scaler.state_dict(),
            "guard": self.guard.state_dict(),
        }

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights that train, and optimizer state, by name."""
        return self.optimizer.parameters, self.optimizer.state_tensors()

    def load_state_dict(self, saved: dict[str, Any], optimizer_tensors: dict[str, Tensor]) -> None:
        """Load what `state_dict` and `tensors` returned; the model has its weights already."""
        self.optimizer.load_state_tensors(optimizer_tensors)
        if self.scaler.is_enabled() and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        self.guard.load_state_dict(saved["guard"])
        self.clock = Stopwatch(saved["time_s"])
        self.step = saved["step"]
        self.samples = saved["samples"]
        self.val_loss = saved["val_loss"]
        self.best_val_loss = math.inf if saved["best_val_loss"] is None else saved["best_val_loss"]
        self.evals_since_best = saved["since_best"]
        self.clipped = saved["clipped"]
