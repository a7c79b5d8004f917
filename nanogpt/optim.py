"""AdamW and Muon over named parameters."""

import math
from collections.abc import Iterable
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

    Background. AdamW divides the running mean of each gradient entry by the root of the running mean of that entry's
    square. Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) treats a matrix as a whole: it replaces
    the momentum U S Vᵀ by U Vᵀ, so that every direction of the matrix learns at the same rate, scaled to the size of an
    AdamW update (Liu et al. 2025, arXiv:2502.16982). Embeddings, the output layer, gains and biases stay with AdamW.

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
        self.maps = MapExchange(self.parameters, self.row_splits, world.mesh)
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
        self._muon(muon_grads, lr_scale * self.muon_lr, grad_divisor, skip_update)

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
        """Nesterov momentum, orthogonalized."""
        if not grads:
            return
        gradients = self.maps.views(grads)
        momenta = self.maps.views({name: local(self.state[name]["momentum"]) for name in grads})
        weights = self.maps.views({name: local(self.parameters[name]) for name in grads})
        weight = (1 - self.muon_momentum) * (1 - skip_update)
        for grad, momentum in zip(gradients, momenta, strict=True):
            grad.div_(grad_divisor).masked_fill_(skip_update > 0, 0.0)
            momentum.lerp_(grad, weight)
            grad.lerp_(momentum, self.muon_momentum)
        dtype = torch.float32 if self.world.dtype == torch.float16 else self.world.dtype  # float16 lacks the range
        rows = torch.cat([grad.to(dtype).flatten() for grad in gradients])
        rows = self.maps.apply(self._orthogonalize, rows)
        rows = rows.float().mul_(-0.2 * lr * (1 - skip_update))
        updates = unflatten(rows, weights)
        torch._foreach_mul_(updates, [math.sqrt(max(one.rows, one.columns)) for one in self.maps.order])
        torch._foreach_mul_(weights, 1 - lr * self.weight_decay * (1 - skip_update))
        torch._foreach_add_(weights, updates)

    def _orthogonalize(self, maps: list[Tensor]) -> list[Tensor]:
        """Orthogonalize maps (rows, columns), stacking those of equal shape. Tall maps are transposed first."""
        wide = [one.mT if one.shape[0] > one.shape[1] else one for one in maps]
        by_shape: dict[torch.Size, list[int]] = {}
        for i, one in enumerate(wide):
            by_shape.setdefault(one.shape, []).append(i)
        results = list(maps)
        for numbers in by_shape.values():
            matrices = torch.stack([wide[i] for i in numbers])
            update = orthogonalize(matrices) if self.world.mesh else self._share_orthogonalization(matrices)
            for i, one in zip(numbers, update, strict=True):
                results[i] = one if wide[i] is maps[i] else one.mT
        return results

    def _share_orthogonalization(self, matrices: Tensor) -> Tensor:
        """`orthogonalize` of (maps, rows, columns), each rank computing its share of the maps."""
        share = -(-len(matrices) // self.world.size)
        mine = matrices[self.world.rank * share :][:share]
        if len(mine) < share:  # all-gather needs equal shares
            mine = torch.cat((mine, mine.new_zeros(share - len(mine), *mine.shape[1:])))
        return self.world.all_gather(orthogonalize(mine))[: len(matrices)]

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


def unflatten(vector: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Views of a vector in the shapes of `like`."""
    parts = vector.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def orthogonalize(matrices: Tensor) -> Tensor:
    """Approximate U Vᵀ of each U S Vᵀ in (maps, rows, columns), rows ≤ columns, by Newton-Schulz iteration.

    Most singular values end between 0.7 and 1.2, the smallest of a square matrix below.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The norm of all gradients together, a scalar; sharded ones count whole."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([local(grad) for grad in grads])
    return norm_over_ranks(norm, grads[0]) if grads else norm


def clip_divisor(grad_clip: float, norm: Tensor) -> Tensor:
    """The scalar that divides gradients of this norm so that it is at most grad_clip (0: no clipping)."""
    return (norm / grad_clip).clamp(min=1.0) if grad_clip > 0 else torch.ones_like(norm)
