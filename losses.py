"""The losses of DINOv2, the two ways to make teacher targets, and their gradients without the full table of logits.

    targets = sinkhorn_knopp(teacher_logits, temp=0.06)         # or softmax_center(teacher_logits, center, temp=0.06)
    loss = dino_loss(student_logits, targets) + ibot_loss(...) + 0.1 * koleo_loss(student_cls)

These are the functions that training runs: change one here, and training changes. The logits of thousands of masked
patches over 131,072 prototypes would take gigabytes, several times over, so training never holds them all:
chunked_losses() calls the loss on a few hundred rows of logits at a time, and LazyRows stands in for the teacher's.

Everything is computed in float32 whatever the input's dtype. In a process group, the result equals that of one process
on the global batch; without one, nothing here needs torch.distributed. The file imports only torch: copy it freely.

Shapes: B images, L student crops, T teacher crops, K prototypes, M masked patches, D embedding width, d width of the
head's bottleneck. Apache License 2.0.
Sources: DINO (Caron et al. 2021, arXiv 2104.14294), iBOT (Zhou et al. 2021, arXiv 2111.07832), SwAV's Sinkhorn-Knopp
(Caron et al. 2020, arXiv 2006.09882), KoLeo (Sablayrolles et al. 2018, arXiv 1806.03198), DINOv2 (arXiv 2304.07193).
"""
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

STUDENT_TEMP = 0.1  # fixed in the official code


# ----------------------------------------------------------------------------------------------------------------------
# Losses


def cross_entropy(student_logits: Tensor, targets: Tensor, temp: float = STUDENT_TEMP) -> Tensor:
    """-sum_k targets_k log softmax(student_logits / temp)_k for each row: (..., K), (..., K) -> (...).

    The shapes broadcast, which F.cross_entropy does not allow; the cost is the same.
    """
    return -(targets * F.log_softmax(student_logits.float() / temp, dim=-1)).sum(-1)


def dino_loss(student_logits: Tensor, targets: Tensor, temp: float = STUDENT_TEMP) -> Tensor:
    """Sum over all pairs (student crop, teacher crop) of their mean cross-entropy (DINO, equation 3).

    Args: student_logits (L, B, K) and targets (T, B, K): L student crops and T teacher crops of the same B images.
    Cross-entropy is linear in the target, so the T targets are summed first and each student crop is compared once.
    """
    return cross_entropy(student_logits, targets.sum(0), temp).mean(-1).sum()


def ibot_loss(student_logits: Tensor, targets: Tensor, weight: Tensor, n_crops: int,
              temp: float = STUDENT_TEMP) -> Tensor:
    """Masked-patch loss (iBOT, equation 2): sum over the masked patches of weight * cross-entropy, divided by n_crops.

    Args: student_logits and targets (M, K); weight (M,) = 1 / number of masked patches in the patch's crop; n_crops
    counts all global crops, masked or not. With half of the crops masked, the mean over masked crops counts half.
    """
    return (cross_entropy(student_logits, targets, temp) * weight).sum() / n_crops


def koleo_loss(x: Tensor, group_size: int | None = None, eps: float = 1e-8) -> Tensor:
    """Kozachenko-Leonenko entropy: -mean log distance to the nearest neighbor on the sphere (DINOv2, section 4).

    Args: x (B, D), not normalized; neighbors are searched within each `group_size` consecutive rows (None: among all B;
    the official code searches among the images of one GPU). Raises ValueError if the group size does not divide B.
    Finite for duplicates (distance >= eps * sqrt(D)); 0 for groups of one, which have no neighbor.
    """
    group_size = group_size or len(x)
    if len(x) % group_size:
        raise ValueError(f"{len(x)} rows do not divide into groups of {group_size}")
    if group_size == 1:
        return x.float().sum() * 0.0
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(x.float(), dim=-1, eps=eps).view(-1, group_size, x.shape[-1])  # (groups, group, D)
        with torch.no_grad():
            dots = x @ x.mT  # (groups, group, group)
            dots.diagonal(dim1=-2, dim2=-1).fill_(-2)  # below any cosine: never its own neighbor
            nearest = dots.argmax(-1, keepdim=True).expand_as(x)
        distance = (x - x.gather(1, nearest) + eps).norm(dim=-1)
        return -torch.log(distance + eps).mean()


# ----------------------------------------------------------------------------------------------------------------------
# Logits a few rows at a time

# Logits computed at once: few enough to save memory, enough to read the prototypes seldom and to keep a GPU busy.
CHUNK_ELEMENTS = dict(cpu=3 * 2**21, cuda=2**25)


def row_chunks(n_rows: int, n_columns: int, device: torch.device) -> list[slice]:
    """Slices of nearly equal length that cover n_rows, of at most CHUNK_ELEMENTS elements or one row each."""
    limit = CHUNK_ELEMENTS["cpu" if device.type == "cpu" else "cuda"]
    n = math.ceil(n_rows / max(limit // n_columns, 1))
    return [slice(n_rows * i // n, n_rows * (i + 1) // n) for i in range(n)]


@dataclass
class LazyRows:
    """A matrix too large to store. Indexing by a slice computes those rows: matrix[a:b] is a new tensor (b - a, K)."""

    shape: tuple[int, int]
    device: torch.device
    compute: Callable[[slice], Tensor]

    def __getitem__(self, rows: slice) -> Tensor:
        return self.compute(rows)

    def map(self, function: Callable[[Tensor], Tensor]) -> "LazyRows":
        """The matrix with `function` applied to each chunk of rows; it may work in place."""
        return LazyRows(self.shape, self.device, lambda rows: function(self.compute(rows)))


def lazy_logits(tokens: Tensor, prototypes: Tensor) -> LazyRows:
    """The float32 logits (M, K) of tokens (M, d) and prototypes (K, d)."""
    tokens, prototypes = tokens.float(), prototypes.float()
    return LazyRows((len(tokens), len(prototypes)), tokens.device, lambda rows: F.linear(tokens[rows], prototypes))


def chunked_losses(
        terms: list[tuple[Tensor, Tensor, Callable[[Tensor, slice], Tensor]]]) -> tuple[Tensor, list[Tensor]]:
    """Sum of losses on logits = tokens @ prototypes.T, which are computed and differentiated a few rows at a time.

    Args: `terms` of (tokens (..., n, d), prototypes (K, d), loss). For a slice `rows` of the n rows, loss(logits, rows)
    gets their logits (..., m, K) and returns what these rows contribute to the term, (). Any function that autograd can
    differentiate will do. Terms may share their prototypes.
    Returns: the sum, (), which can be differentiated once, and the terms, () each, without gradient.
    """
    position = {prototypes: i for i, prototypes in enumerate(dict.fromkeys(prototypes for _, prototypes, _ in terms))}
    losses = [(position[prototypes], loss) for _, prototypes, loss in terms]
    tensors = [*(tokens for tokens, _, _ in terms), *position]
    total, *values = ChunkedLosses.apply(losses, *(t.float() for t in tensors))
    return total, values


class ChunkedLosses(torch.autograd.Function):
    """Computes losses and gradients together in the forward pass; the backward pass only scales the gradients."""

    @staticmethod
    def forward(ctx, losses, *tensors):
        gradients = [torch.zeros_like(t) for t in tensors]
        values, n = [], len(losses)
        for (i, loss), tokens, grad_tokens in zip(losses, tensors, gradients):
            values.append(accumulate_gradients(loss, tokens, tensors[n + i], grad_tokens, gradients[n + i]))
        ctx.gradients = gradients
        ctx.mark_non_differentiable(*values)
        return torch.stack(values).sum(), *values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place: those of the prototypes are large
        if gradients is None:
            raise RuntimeError("chunked_losses() was already differentiated; compute it again")
        return None, *(g.mul_(grad) for g in gradients)


def accumulate_gradients(loss, tokens: Tensor, prototypes: Tensor, grad_tokens: Tensor,
                         grad_prototypes: Tensor) -> Tensor:
    """One term of chunked_losses(): returns its value, (), and adds its gradients to the last two arguments."""
    total, n_crops = tokens.new_zeros(()), math.prod(tokens.shape[:-2])
    for rows in row_chunks(tokens.shape[-2], n_crops * len(prototypes), tokens.device):
        chunk = tokens[..., rows, :]
        logits = F.linear(chunk, prototypes).requires_grad_()
        with torch.enable_grad():
            value = loss(logits, rows)
        grad, = torch.autograd.grad(value, logits)
        grad_tokens[..., rows, :] += grad @ prototypes
        grad_prototypes.addmm_(grad.flatten(0, -2).T, chunk.flatten(0, -2))
        total += value.detach()
        del logits, grad  # before the next chunk is allocated
    return total


# ----------------------------------------------------------------------------------------------------------------------
# Teacher targets: rows of probabilities over the prototypes


def all_reduce_(x: Tensor, op: str = "sum") -> Tensor:
    """Sum (or "max") of x over all processes, in place; x itself without a process group."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
    return x


@torch.no_grad()
def softmax_center(logits: Tensor, center: Tensor, temp: float) -> Tensor:
    """Targets softmax((logits - center) / temp), (..., K) (DINO, equation 4). `center` is (K,) or broadcasts."""
    return F.softmax((logits.float() - center).div_(temp), dim=-1)


@torch.no_grad()
def center_total(logits: Tensor, prototypes: Tensor | None = None) -> Tensor:
    """Sum of the logits (M, K) over rows, followed by their number M: (K+1,) float32. Totals of several batches add up.

    With `prototypes` (K, d), the first argument is the tokens (M, d): the sum of their logits is the logits of their
    sum, which saves computing M x K logits.
    """
    total = logits.float().sum(0)
    total = total if prototypes is None else prototypes.float() @ total
    return torch.cat([total, total.new_full((1,), float(len(logits)))])


@torch.no_grad()
def update_center(center: Tensor, total: Tensor, momentum: float = 0.9) -> None:
    """Moves the center, in place, towards the mean logits of all processes; `total` is this process's center_total().
    Call it after the targets are made: step t is centered by the logits up to step t-1."""
    total = all_reduce_(total.clone())
    center.lerp_((total[:-1] / total[-1].clamp(min=1)).view_as(center), 1 - momentum)


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor | list[LazyRows], temp: float, n_iterations: int = 3) -> Tensor | list[LazyRows]:
    """Targets from logits (M, K): exp(logits / temp), scaled so that all prototypes get the same total over the joined
    batch of all processes and every row sums to 1 (SwAV, section 3.1). M may differ between processes.

    `logits` may be a list of batches that are balanced together; the result is a list, too. A single batch is kept in
    memory, as one table. Several (gradient accumulation) would not fit: they are recomputed in each iteration.

    The balanced matrix is diag(row) E diag(col), with E = exp((logits - largest) / temp), and is never written back. An
    iteration needs one pass over E, because what a few rows add to the columns does not depend on other rows.
    """
    if torch.is_tensor(logits):
        copy = LazyRows(logits.shape, logits.device, lambda rows: logits[rows].float().clone())
        return sinkhorn_knopp([copy], temp, n_iterations)[0][:]

    def exponential_(z: Tensor) -> Tensor:
        return z.sub_(largest).div_(temp).exp_()

    batches, keep = logits, len(logits) == 1
    if keep:
        batches = [logits[0][:]]  # (M, K)
    largest = torch.full((), -torch.inf, device=logits[0].device)
    for z in chunks(batches):
        largest = torch.maximum(largest, z.amax())
    all_reduce_(largest, "max")  # a shift of all logits cancels; without it exp could overflow
    for z in chunks(batches) if keep else ():
        exponential_(z)  # the table now holds E
    exponentials = batches if keep else [batch.map(exponential_) for batch in batches]

    col = torch.ones(logits[0].shape[1], device=largest.device)
    for i in range(n_iterations):
        total = torch.zeros_like(col)
        for E in chunks(exponentials):
            total += row_scale(E, col) @ E if i else E.sum(0)
        col = 1 / all_reduce_(total).clamp(min=TINY)
    return [LazyRows(E.shape, E.device, lambda rows, E=E: balance(E[rows], col)) for E in exponentials]


def chunks(batches: list[Tensor | LazyRows]) -> Iterator[Tensor]:
    return (batch[rows] for batch in batches for rows in row_chunks(*batch.shape, batch.device))


TINY = torch.finfo(torch.float32).tiny  # keeps scales finite where all exponentials of a row or a column underflow


def row_scale(E: Tensor, col: Tensor) -> Tensor:
    return 1 / (E @ col).clamp(min=TINY)  # (m,)


def balance(E: Tensor, col: Tensor) -> Tensor:
    return (E * row_scale(E, col)[:, None]).mul_(col)  # (m, K)
