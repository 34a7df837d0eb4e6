"""Muon: momentum, made orthogonal (Jordan et al. 2024, "Muon: An optimizer for hidden layers")."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, cast, overload

import torch
import torch.distributed as dist
from torch import Tensor

from fitv2.runtime.device import has_bfloat16_matmuls
from fitv2.runtime.distributed import divide_work, gather, local, part

# Of the quintic iteration: singular values end between 0.7 and 1.2, which serves as well as 1.
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
SHARED_FROM = 384  # rows and columns; smaller ones take longer to send than to make (benchmarks/muon.py)
AT_ONCE = 1 << 24  # numbers that are whole and made orthogonal together, where a process holds but a part


class Muon(torch.optim.Optimizer):
    """For matrices. A group's `pieces` are those in the rows of each: q, k and v, made orthogonal apart.

    Steps are as large as AdamW's (arXiv 2502.16982). `torch.optim.Muon` knows no pieces, and multiplies in
    bfloat16 also where a processor emulates that at a twentieth of the speed; here that is float32.
    Of several processes each makes some of the matrices orthogonal for all of them, if they are large.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        iterations: int = ITERATIONS,
        every: int = 1,
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "pieces": 1})
        self.iterations, self.every = iterations, every

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Change each matrix that has a gradient; the loss, if `closure` computes it and the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        alike: dict[tuple[torch.Size, int], list[tuple[Tensor, dict[str, Any]]]] = defaultdict(list)
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                self._average(matrix, group)
                if self._is_due(matrix):
                    alike[matrix.shape, group["pieces"]].append((matrix, group))
        for (shape, pieces), held in alike.items():
            at_once = max(1, AT_ONCE // shape.numel())
            if dist.is_initialized():  # so that each process has one
                at_once = max(at_once, -(-dist.get_world_size() // pieces))
            for start in range(0, len(held), at_once):
                self._change(held[start : start + at_once])
        return loss

    def _average(self, matrix: Tensor, group: dict[str, Any]) -> None:
        memory = self.state[matrix]
        if "momentum_buffer" not in memory:
            memory["momentum_buffer"] = torch.zeros_like(matrix)
        memory["momentum_buffer"].lerp_(matrix.grad, 1 - group["momentum"])

    def _is_due(self, matrix: Tensor) -> bool:
        """Count the step; whether a matrix is changed at it."""
        if self.every == 1:
            return True
        memory = self.state[matrix]
        memory["step"] = memory.get("step", torch.zeros(())).cpu() + 1  # a checkpoint brings it on a device
        return int(memory["step"]) % self.every == 0

    def _gradient(self, matrix: Tensor, group: dict[str, Any]) -> Tensor:
        """What of a matrix is to be made orthogonal, whole and in its pieces (pieces, R, C)."""
        average = self.state[matrix]["momentum_buffer"]
        ahead = cast(Tensor, matrix.grad).lerp(average, group["momentum"])  # Nesterov's
        return gather(ahead).unflatten(0, (group["pieces"], -1))

    def _change(self, alike: Sequence[tuple[Tensor, dict[str, Any]]]) -> None:
        """Change matrices of one shape, made orthogonal together: on a GPU few kernels."""
        stacked = torch.stack([self._gradient(matrix, group) for matrix, group in alike])
        dtype = torch.bfloat16 if has_bfloat16_matmuls(stacked.device) else torch.float32
        work = partial(orthogonalize, iterations=self.iterations)
        many = stacked.to(dtype).flatten(0, 1)
        changes = divide_work(work, many) if min(many.shape[1:]) >= SHARED_FROM else work(many)
        changes = changes.to(stacked.dtype).view_as(stacked)
        size = 0.2 * max(stacked.shape[2:]) ** 0.5  # that of a change of AdamW: 0.2 a number
        size *= self.every
        for (matrix, group), change in zip(alike, changes, strict=True):
            mine = local(matrix)
            mine.mul_(1 - self.every * group["lr"] * group["weight_decay"])
            mine.add_(part(change.flatten(0, 1), matrix), alpha=-group["lr"] * size)


def orthogonalize(matrix_NRC: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """The nearest matrices with singular values of about 1, (N, R, C), by Newton-Schulz iterations.

    The singular values are about 1 after five of them, unless they were very small.
    """
    wide = matrix_NRC.shape[1] <= matrix_NRC.shape[2]
    x = matrix_NRC if wide else matrix_NRC.mT
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT
