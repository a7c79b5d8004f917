"""AdamW and Muon over named parameters."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt.distributed import World
from nanogpt.errors import InputError

# What a matrix's singular values pass through five times to come out near 1: x → a x + b x³ + c x⁵ (Jordan et al. 2024)
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019) for all parameters; with optimizer=muon, Muon for the blocks' matrices.

    model: its parameters are on their device; for Muon a GPT, which names its matrices. config: train.py's keys.
    `state` holds each parameter's tensors by its name. Not a torch.optim.Optimizer, because that imports torch's
    compiler, a second or more at each start; torch's own are the tests' oracle.
    """

    def __init__(self, model: Any, config: Any, world: World):
        self.config, self.world = config, world
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        # Where torch's loss scaler looks for gradients.
        self.param_groups = [{"params": list(self.parameters.values())}]
        self.maps: dict[str, list[int]] = model.muon_params() if config.optimizer == "muon" else {}
        self.state: dict[str, dict[str, Tensor]] = {}
        for name, p in self.parameters.items():
            if name in self.maps:
                self.state[name] = {"momentum": torch.zeros_like(p)}
            else:
                step = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[name] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, lr_scale: float, grad_divisor: Tensor, skip_update: Tensor) -> None:
        """One update from the parameters' gradients, which are of no use after it.

        lr_scale: share of the peak learning rates. grad_divisor: scalar that divides the gradients. skip_update:
        scalar, 1.0 leaves everything unchanged.
        """
        grads = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        if skip_update.device.type == "mps":  # torch 2.13's fused AdamW there heeds neither; remove this once it does
            if skip_update:
                return
            torch._foreach_div_(list(grads.values()), grad_divisor)
            grad_divisor = torch.ones_like(grad_divisor)
        hidden = {name: grad for name, grad in grads.items() if name in self.maps}
        matrices = {name: grad for name, grad in grads.items() if name not in hidden and grad.dim() >= 2}
        vectors = {name: grad for name, grad in grads.items() if grad.dim() < 2}  # gains and biases do not decay
        self._adamw(matrices, lr_scale * self.config.learning_rate, self.config.weight_decay, grad_divisor, skip_update)
        self._adamw(vectors, lr_scale * self.config.learning_rate, 0.0, grad_divisor, skip_update)
        self._muon(hidden, lr_scale * (self.config.muon_lr or self.config.learning_rate), grad_divisor, skip_update)

    def _adamw(
        self, grads: dict[str, Tensor], rate: float, decay: float, grad_divisor: Tensor, skip_update: Tensor
    ) -> None:
        if not grads:
            return
        parameters = [self.parameters[name] for name in grads]
        steps, first, second = ([self.state[n][key] for n in grads] for key in ("step", "exp_avg", "exp_avg_sq"))
        torch._foreach_add_(steps, 1 - skip_update)
        torch._fused_adamw_(
            *(parameters, list(grads.values()), first, second, [], steps),  # type: ignore[arg-type]
            lr=rate,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            weight_decay=decay,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
            grad_scale=grad_divisor,
            found_inf=skip_update,
        )

    def _muon(self, grads: dict[str, Tensor], rate: float, grad_divisor: Tensor, skip_update: Tensor) -> None:
        """Momentum, each matrix of it replaced by the nearest one whose singular values are all 1, so that every
        direction learns alike (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), at the size that an
        update of AdamW's has (Liu et al. 2025, arXiv:2502.16982). Matrices of one shape share the products."""
        momentum_kept = self.config.muon_momentum
        alike: dict[tuple[int, int], list[tuple[Tensor, Tensor, Tensor]]] = {}  # weights, gradient, momentum
        for name, grad in grads.items():
            parts = (t.split(self.maps[name]) for t in (self.parameters[name], grad, self.state[name]["momentum"]))
            for maps in zip(*parts, strict=True):
                if maps[0].shape[0] > maps[0].shape[1]:  # a tall map goes with the wide ones, lying down
                    maps = tuple(t.mT for t in maps)
                alike.setdefault(tuple(maps[0].shape), []).append(maps)
        for (_, columns), group in alike.items():
            weights, gradients, momenta = (list(tensors) for tensors in zip(*group, strict=True))
            grad, momentum = torch.stack(gradients), torch.stack(momenta)  # (maps, rows, columns)
            grad = torch.where(skip_update > 0, 0.0, grad / grad_divisor)
            momentum.lerp_(grad, (1 - momentum_kept) * (1 - skip_update))
            torch._foreach_copy_(momenta, momentum.unbind())
            update = self._orthogonalize(grad.lerp_(momentum, momentum_kept))
            update *= -0.2 * math.sqrt(columns) * rate * (1 - skip_update)
            torch._foreach_mul_(weights, 1 - rate * self.config.weight_decay * (1 - skip_update))
            torch._foreach_add_(weights, update.unbind())

    def _orthogonalize(self, matrices: Tensor) -> Tensor:
        """`orthogonalize` of (maps, rows, columns), each rank doing its share of the maps."""
        count, size = len(matrices), self.world.size
        share = -(-count // size)
        mine = matrices[self.world.rank * share :][:share]
        if len(mine) < share:  # gathering wants equal shares
            mine = torch.cat((mine, mine.new_zeros(share - len(mine), *mine.shape[1:])))
        return self.world.all_gather(orthogonalize(mine, self.world.dtype))[:count].to(matrices.dtype)

    def state_tensors(self) -> dict[str, Tensor]:
        """The state by name, `<parameter>/<state>`."""
        return {f"{name}/{key}": tensor for name, state in self.state.items() for key, tensor in state.items()}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Copy in what `state_tensors` gave. Raises InputError where it is not this model's, or another optimizer's."""
        own = self.state_tensors()
        for name in sorted(own.keys() | tensors.keys()):
            if name not in own or name not in tensors or own[name].shape != tensors[name].shape:
                raise InputError(
                    f"optimizer state {name} does not fit: resume with the --optimizer and model that made it"
                )
            own[name].copy_(tensors[name])


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """U Vᵀ, about, for each U S Vᵀ of (maps, rows, columns), rows ≤ columns: Newton–Schulz, most of whose singular
    values end between 0.7 and 1.2 (the smallest of a square matrix below); its products run in `dtype`."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(torch.float32 if dtype == torch.float16 else dtype)  # float16 lacks the range
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The norm of all gradients together, a scalar."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip_divisor(limit: float, norm: Tensor) -> Tensor:
    """What divides gradients of this `norm`, a scalar, so that it is at most `limit` (0: any)."""
    return (norm / limit).clamp(min=1.0) if limit > 0 else torch.ones_like(norm)
