"""AdamW and Muon over named parameters."""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt.distributed import World
from nanogpt.errors import InputError
from nanogpt.sharding import MapExchange, copy_rows, local, norm_over_ranks

# x -> a x + b x^3 + c x^5, applied five times, brings singular values near 1 (Jordan et al. 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019) for all parameters; with kind="muon", Muon for the blocks' matrices.

    Background. AdamW divides each momentum by the root of its mean square, number by number. Muon (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon) treats a matrix as a whole: it replaces the momentum U S Vᵀ by U Vᵀ, so
    that every direction of the matrix learns at the same rate, scaled to the size of an AdamW update (Liu et al. 2025,
    arXiv:2502.16982). Embeddings, the output layer, gains and biases stay with AdamW.

    model: its parameters are on their device; for Muon a GPT, which names its matrices. learning_rate, muon_lr: the
    maxima of the schedule; muon_lr None means learning_rate. `parameters`: those that train; `state`: tensors of each.

    Not a torch.optim.Optimizer: importing one imports torch's compiler, a second or more at each start. The tests
    compare it with torch's.
    """

    def __init__(
        self,
        model: Any,
        world: World,
        *,
        kind: str = "adamw",
        learning_rate: float,
        muon_lr: float | None = None,
        muon_momentum: float = 0.95,
        weight_decay: float = 0.1,
        beta1: float = 0.9,
        beta2: float = 0.95,
    ):
        self.world = world
        self.learning_rate = learning_rate
        self.muon_lr = muon_lr or learning_rate
        self.muon_momentum = muon_momentum
        self.weight_decay = weight_decay
        self.beta1 = beta1
        self.beta2 = beta2
        self.parameters: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.param_groups = [{"params": list(self.parameters.values())}]  # where torch's GradScaler finds gradients
        self.row_splits: dict[str, list[int]] = model.muon_params() if kind == "muon" else {}
        self.exchange = MapExchange(self.parameters, self.row_splits) if world.mesh and kind == "muon" else None
        self.state: dict[str, dict[str, Tensor]] = {}
        for name, p in self.parameters.items():
            if name in self.row_splits:
                self.state[name] = {"momentum": torch.zeros_like(p)}
            else:
                step = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[name] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, lr_scale: float, grad_divisor: Tensor, skip_update: Tensor) -> None:
        """Update the parameters from their gradients, which it overwrites.

        lr_scale: share of the maximum learning rates. grad_divisor: scalar; the gradients are divided by it.
        skip_update: scalar; 1.0 leaves parameters and state unchanged.
        """
        grads = {name: local(p.grad) for name, p in self.parameters.items() if p.grad is not None}
        if skip_update.device.type == "mps":  # where torch 2.13's fused AdamW ignores both scalars
            if skip_update:
                return
            torch._foreach_div_(list(grads.values()), grad_divisor)
            grad_divisor = torch.ones_like(grad_divisor)

        muon_grads: dict[str, Tensor] = {}
        decayed: dict[str, Tensor] = {}
        not_decayed: dict[str, Tensor] = {}  # gains and biases
        for name, grad in grads.items():
            group = muon_grads if name in self.row_splits else decayed if grad.dim() >= 2 else not_decayed
            group[name] = grad
        self._adamw(decayed, lr_scale * self.learning_rate, self.weight_decay, grad_divisor, skip_update)
        self._adamw(not_decayed, lr_scale * self.learning_rate, 0.0, grad_divisor, skip_update)
        muon = self._sharded_muon if self.exchange else self._muon
        muon(muon_grads, lr_scale * self.muon_lr, grad_divisor, skip_update)

    def _adamw(
        self, grads: dict[str, Tensor], lr: float, weight_decay: float, grad_divisor: Tensor, skip_update: Tensor
    ) -> None:
        if not grads:
            return
        steps = [self.state[name]["step"] for name in grads]
        # A list: of one scalar tensor torch would read the value, which waits for the device.
        torch._foreach_add_(steps, [1 - skip_update] * len(steps))
        torch._fused_adamw_(
            [local(self.parameters[name]) for name in grads],
            list(grads.values()),
            [local(self.state[name]["exp_avg"]) for name in grads],
            [local(self.state[name]["exp_avg_sq"]) for name in grads],
            [],
            steps,
            lr=lr,
            beta1=self.beta1,
            beta2=self.beta2,
            weight_decay=weight_decay,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
            grad_scale=grad_divisor,
            found_inf=skip_update,
        )

    def _muon(self, grads: dict[str, Tensor], lr: float, grad_divisor: Tensor, skip_update: Tensor) -> None:
        """Nesterov momentum, orthogonalized. Maps of one shape are stacked and share the matrix products."""
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor, Tensor]]] = {}  # weights, gradient, momentum
        for name, grad in grads.items():
            rows = self.row_splits[name]
            tensors = (self.parameters[name], grad, self.state[name]["momentum"])
            for views in zip(*(t.split(rows) for t in tensors), strict=True):
                if views[0].shape[0] > views[0].shape[1]:  # tall maps join the wide ones, transposed
                    views = tuple(t.mT for t in views)
                by_shape.setdefault(tuple(views[0].shape), []).append(views)

        for (_, columns), group in by_shape.items():
            weights, gradients, momenta = (list(tensors) for tensors in zip(*group, strict=True))
            grad = torch.stack(gradients)  # (maps, rows, columns)
            momentum = torch.stack(momenta)
            grad = torch.where(skip_update > 0, 0.0, grad / grad_divisor)
            momentum.lerp_(grad, (1 - self.muon_momentum) * (1 - skip_update))
            torch._foreach_copy_(momenta, momentum.unbind())
            update = self._orthogonalize(grad.lerp_(momentum, self.muon_momentum))
            update *= -0.2 * math.sqrt(columns) * lr * (1 - skip_update)
            torch._foreach_mul_(weights, 1 - lr * self.weight_decay * (1 - skip_update))
            torch._foreach_add_(weights, update.unbind())

    def _sharded_muon(self, grads: dict[str, Tensor], lr: float, grad_divisor: Tensor, skip_update: Tensor) -> None:
        """`_muon` on this rank's rows; only to be orthogonalized are maps made whole."""
        assert self.exchange
        gradients = self.exchange.views(grads)
        momenta = self.exchange.views({name: local(self.state[name]["momentum"]) for name in grads})
        weights = self.exchange.views({name: local(self.parameters[name]) for name in grads})
        sizes = [g.numel() for g in gradients]
        grad = torch.cat([g.reshape(-1) for g in gradients])
        momentum = torch.cat([m.reshape(-1) for m in momenta])
        grad = torch.where(skip_update > 0, 0.0, grad / grad_divisor)
        momentum.lerp_(grad, (1 - self.muon_momentum) * (1 - skip_update))
        torch._foreach_copy_(momenta, [m.view_as(g) for m, g in zip(momentum.split(sizes), gradients, strict=True)])
        grad.lerp_(momentum, self.muon_momentum)
        update = self.exchange.apply(partial(orthogonalize_all, dtype=self.world.dtype), grad.to(self.world.dtype))
        update = update.to(grad.dtype) * (-0.2 * lr * (1 - skip_update))
        updates = [u.view_as(g) for u, g in zip(update.split(sizes), gradients, strict=True)]
        torch._foreach_mul_(updates, [math.sqrt(max(one.last - one.first, one.columns)) for one in self.exchange.order])
        torch._foreach_mul_(weights, 1 - lr * self.weight_decay * (1 - skip_update))
        torch._foreach_add_(weights, updates)

    def _orthogonalize(self, matrices: Tensor) -> Tensor:
        """`orthogonalize` of (maps, rows, columns), each rank computing its share of the maps."""
        count = len(matrices)
        share = -(-count // self.world.size)
        mine = matrices[self.world.rank * share :][:share]
        if len(mine) < share:  # all-gather needs equal shares
            mine = torch.cat((mine, mine.new_zeros(share - len(mine), *mine.shape[1:])))
        return self.world.all_gather(orthogonalize(mine, self.world.dtype))[:count].to(matrices.dtype)

    def zero_grad(self) -> None:
        for p in self.parameters.values():
            p.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """The state as `<parameter>/<state>` -> tensor."""
        return {f"{name}/{key}": tensor for name, state in self.state.items() for key, tensor in state.items()}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Copy in what `state_tensors` returned. Raises InputError for another model's or another optimizer's."""
        own = self.state_tensors()
        for name in sorted(own.keys() | tensors.keys()):
            if name not in own or name not in tensors or own[name].shape != tensors[name].shape:
                raise InputError(
                    f"optimizer state {name} does not fit: resume with the --optimizer and model that made it"
                )
            copy_rows(own[name], tensors[name])


def orthogonalize_all(matrices: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """`orthogonalize` of matrices of any shapes; those of one shape, or its transpose, share the products."""
    groups: dict[tuple[int, int], list[int]] = {}
    wide = [m.mT if m.shape[0] > m.shape[1] else m for m in matrices]
    for i, matrix in enumerate(wide):
        groups.setdefault((matrix.shape[0], matrix.shape[1]), []).append(i)
    results = list(matrices)
    for numbers in groups.values():
        stacked = orthogonalize(torch.stack([wide[i] for i in numbers]), dtype)
        for i, result in zip(numbers, stacked, strict=True):
            results[i] = result if wide[i] is matrices[i] else result.mT
    return results


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Approximate U Vᵀ of each U S Vᵀ in (maps, rows, columns), rows ≤ columns, by Newton-Schulz iteration.

    Most singular values end between 0.7 and 1.2, the smallest of a square matrix below. The products run in `dtype`.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(torch.float32 if dtype == torch.float16 else dtype)  # float16 lacks the range
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The norm of all gradients together, a scalar."""
    return total_norm([p.grad for p in parameters if p.grad is not None])


def total_norm(tensors: list[Tensor]) -> Tensor:
    """The norm of all tensors together, a scalar; sharded ones count whole."""
    norm = nn.utils.get_total_norm([local(tensor) for tensor in tensors])
    return norm_over_ranks(norm, tensors[0])


def clip_divisor(grad_clip: float, norm: Tensor) -> Tensor:
    """The scalar that divides gradients of this norm so that it is at most grad_clip (0: no clipping)."""
    return (norm / grad_clip).clamp(min=1.0) if grad_clip > 0 else torch.ones_like(norm)
