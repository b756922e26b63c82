"""The four losses of DINOv2, the two ways to make teacher targets, and all of them without the logits.

Every function computes in float32 whatever it is given, works without torch.distributed, and, when a process group
exists, gives what one process would give on the joined batch. Nothing here knows a config: copy the file freely.

    targets = sinkhorn_knopp(teacher_logits, temp=0.06)         # or softmax_center(teacher_logits, center, temp=0.06)
    loss = dino_loss(student_logits, targets) + ibot_loss(...) + 0.1 * koleo_loss(student_cls)

Those are the definitions. The logits of thousands of masked patches over 131,072 prototypes are gigabytes, several
times over; training gets the same numbers and gradients from prototype_loss(), a few hundred rows at a time.

Shapes: B images, L crops, K prototypes, M masked patches, D width, d width before the prototypes. Apache License 2.0.
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


def all_reduce_(x: Tensor, op: str = "sum") -> Tensor:
    """Sum (or "max") of x over all processes, in place; x itself without a process group."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
    return x


# ----------------------------------------------------------------------------------------------------------------------
# Matrices that are never whole


@dataclass
class Rows:
    """A matrix of which the rows asked for are computed, anew each time: rows[a:b] is a tensor (b - a, K)."""

    shape: tuple[int, int]
    device: torch.device
    compute: Callable[[slice], Tensor]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        return self.compute(rows)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Rows":
        """The matrix of what `function` makes of each row; it may use the memory it is given."""
        return Rows(self.shape, self.device, lambda rows: function(self.compute(rows)))


def logits_of(tokens: Tensor, prototypes: Tensor) -> Rows:
    """The logits (M, K), float32, of tokens (M, d) and prototypes (K, d), as a head factors them."""
    tokens, prototypes = tokens.float(), prototypes.float()
    return Rows((len(tokens), len(prototypes)), tokens.device, lambda rows: F.linear(tokens[rows], prototypes))


PART = dict(cpu=2**22, cuda=2**26)  # elements at a time: few enough for the caches of a CPU, enough to keep a GPU busy


def parts(matrix: Tensor | Rows) -> Iterator[slice]:
    """Slices of rows, together all of them, of equal length but for 1, of at most PART elements or of one row."""
    n_rows, n_columns = matrix.shape
    most = PART["cpu" if matrix.device.type == "cpu" else "cuda"]
    n = math.ceil(n_rows / max(most // n_columns, 1))
    return (slice(n_rows * i // n, n_rows * (i + 1) // n) for i in range(n))


# ----------------------------------------------------------------------------------------------------------------------
# Teacher targets: rows of probabilities over the prototypes


@torch.no_grad()
def softmax_center(logits: Tensor, center: Tensor, temp: float) -> Tensor:
    """Targets softmax((logits - center) / temp), (..., K) (DINO, equation 4). `center` is (K,) or broadcasts."""
    return F.softmax((logits.float() - center).div_(temp), dim=-1)


@torch.no_grad()
def center_total(logits: Tensor, prototypes: Tensor | None = None) -> Tensor:
    """Sum of the logits (M, K) over the rows, and their number M: (K+1,) float32. Totals of parts of a batch add up.
    With `prototypes` (K, d), the first argument are tokens (M, d): the sum of their logits is the logits of their sum,
    which spares a pass over M x K."""
    total = logits.float().sum(0)
    total = total if prototypes is None else prototypes @ total
    return torch.cat([total, total.new_full((1,), float(len(logits)))])


@torch.no_grad()
def update_center(center: Tensor, total: Tensor, momentum: float = 0.9) -> None:
    """Moves the center, in place, towards the mean of the logits of all processes, of which `total` is this one's
    center_total(). Call it after the targets are made: step t is centered by what was seen up to step t-1."""
    total = all_reduce_(total.clone())
    center.lerp_((total[:-1] / total[-1].clamp(min=1)).view_as(center), 1 - momentum)


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temp: float, n_iterations: int = 3) -> Tensor:
    """Targets (M, K) from logits (M, K): exp(logits / temp), scaled so that all prototypes get the same total over the
    joined batch and every row sums to 1 (SwAV, section 3.1).

    The scaled matrix is diag(row) E diag(col) and never written back: an iteration is two matrix-vector products. M may
    differ between processes. Of logits that do not fit into memory, see sinkhorn_targets().
    """
    E = exponentials_(logits.float().clone(), temp, joint_largest([logits]))
    return balance_rows(E, balance_columns([E], n_iterations))


@torch.no_grad()
def sinkhorn_targets(batches: list[Rows], temp: float, n_iterations: int = 3) -> list[Rows]:
    """sinkhorn_knopp() of all rows of all `batches` of logits (M_i, K) together, as matrices of which a few rows exist
    at a time. One batch is stored, in the memory that it gives: of it nothing is computed twice. Several are the parts
    of what would not fit: their logits are computed anew in each iteration."""
    if len(batches) == 1:
        logits = batches[0][:]
        E = exponentials_(logits, temp, joint_largest([logits]))
        exponentials = [Rows(E.shape, E.device, E.__getitem__)]
    else:
        largest = joint_largest(batches)
        exponentials = [logits.map(lambda x: exponentials_(x, temp, largest)) for logits in batches]
    columns = balance_columns(exponentials, n_iterations)
    return [E.map(lambda e: balance_rows(e, columns)) for E in exponentials]


@torch.no_grad()
def joint_largest(batches: list[Tensor | Rows]) -> Tensor:
    """The largest of the logits (M_i, K) in all `batches`, of all processes; () float32."""
    nothing = torch.full((), -torch.inf, device=batches[0].device)
    largest = [logits[rows].amax().float() for logits in batches for rows in parts(logits)]
    return all_reduce_(torch.stack([nothing, *largest]).amax(), "max")


@torch.no_grad()
def exponentials_(logits: Tensor, temp: float, largest: Tensor) -> Tensor:
    """E = exp((logits - largest) / temp), in the memory of the logits (M, K) float32. The shift, common to all rows of
    all processes, cancels; it keeps exp from overflowing however large the logits grow."""
    for rows in parts(logits):
        logits[rows].sub_(largest).div_(temp).exp_()
    return logits


@torch.no_grad()
def balance_columns(batches: list[Tensor | Rows], n_iterations: int = 3) -> Tensor:
    """Scale (K,) of each prototype, from the exponentials (M_i, K) of all batches of this process. An iteration reads
    them once: what a few rows add to the columns needs no other rows."""
    col = torch.ones(batches[0].shape[1], device=batches[0].device)
    for i in range(n_iterations):
        total = torch.zeros_like(col)
        for E in batches:
            for rows in parts(E):
                part = E[rows]
                total += part.sum(0) if i == 0 else row_scale(part, col) @ part
        col = 1 / all_reduce_(total).clamp(min=torch.finfo(total.dtype).tiny)  # a prototype that underflows for every
    return col  # row keeps a finite scale


def row_scale(E: Tensor, col: Tensor) -> Tensor:
    return 1 / (E @ col).clamp(min=torch.finfo(E.dtype).tiny)  # (M,)


@torch.no_grad()
def balance_rows(E: Tensor, col: Tensor) -> Tensor:
    """Targets (M, K) from the exponentials E (M, K)."""
    return (E * row_scale(E, col)[:, None]).mul_(col)


# ----------------------------------------------------------------------------------------------------------------------
# Losses


def cross_entropy(student_logits: Tensor, targets: Tensor, temp: float = STUDENT_TEMP) -> Tensor:
    """-sum_k targets_k log_softmax(student_logits / temp)_k, one value per row: (..., K), (..., K) -> (...).
    Written as sum(targets) * logsumexp - <targets, logits>, so that no table of log-probabilities is kept."""
    s = student_logits.float() / temp
    return targets.sum(-1) * torch.logsumexp(s, dim=-1) - (targets * s).sum(-1)


def dino_loss(student_logits: Tensor, targets: Tensor, temp: float = STUDENT_TEMP) -> Tensor:
    """Sum over all pairs (student crop, teacher crop) of their mean cross-entropy (DINO, equation 3).

    Args: student_logits (L, B, K), targets (T, B, K): L student crops and T teacher crops of the same B images.
    Since the pair loss is linear in the target, the T targets are added up first and each crop is compared once.
    """
    return cross_entropy(student_logits, targets.sum(0), temp).mean(-1).sum()


def ibot_loss(student_logits: Tensor, targets: Tensor, weight: Tensor, n_crops: int,
              temp: float = STUDENT_TEMP) -> Tensor:
    """Masked-patch loss (iBOT, equation 2): sum over the masked patches of weight * cross-entropy, over n_crops.

    Args: student_logits, targets (M, K); weight (M,) = 1 / number of masked patches of the patch's crop; n_crops = all
    global crops, with or without a mask. So with half of the crops masked the mean over masked crops counts half.
    """
    return (cross_entropy(student_logits, targets, temp) * weight).sum() / n_crops


class PrototypeLoss(torch.autograd.Function):
    """What prototype_loss() calls. Loss and gradients are computed together, part after part; the backward pass has
    nothing left to do but to scale."""

    @staticmethod
    def forward(ctx, prototypes, targets, weights, temp, part_loss, *tokens):
        gradients = [torch.zeros_like(prototypes), *map(torch.empty_like, tokens)]
        losses = [torch.empty_like(weight) for weight in weights]
        for x, target, weight, loss, gradient in zip(tokens, targets, weights, losses, gradients[1:], strict=True):
            for rows in parts(target):
                loss[rows], grad = part_loss(F.linear(x[rows], prototypes), target[rows], weight[rows], temp)
                torch.mm(grad, prototypes, out=gradient[rows])
                gradients[0].addmm_(grad.T, x[rows])
        ctx.gradients = gradients
        ctx.mark_non_differentiable(*losses)
        return torch.stack([loss.sum() for loss in losses]).sum(), *losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        gradients, ctx.gradients = ctx.gradients, None  # theirs is the only copy, and the largest tensor of a step
        if gradients is None:
            raise RuntimeError("prototype_loss() was already differentiated; compute it again")
        prototypes, *tokens = [g.mul_(grad) for g in gradients]
        return prototypes, None, None, None, None, *tokens


def part_loss(logits: Tensor, targets: Tensor, weight: Tensor, temp: float) -> tuple[Tensor, Tensor]:
    """weight * cross_entropy(logits, targets, temp), (n,), and its gradient in the logits, (n, K). Uses up `logits`."""
    log_p = F.log_softmax(logits.div_(temp), dim=-1)
    losses = -weight * (targets * log_p).sum(-1)
    gradient = log_p.exp_().mul_((targets.sum(-1) * weight / temp)[:, None])
    return losses, gradient.addcmul_(targets, (weight / temp)[:, None], value=-1)


def prototype_loss(prototypes: Tensor, batches: list[tuple[Tensor, Tensor | Rows, Tensor]], temp: float = STUDENT_TEMP,
                   part_loss=part_loss) -> tuple[Tensor, list[Tensor]]:
    """Sum over rows of weight * cross_entropy(tokens @ prototypes.T, targets), without the logits.

    Args: prototypes (K, d); `batches` of tokens (M_i, d), targets (M_i, K) and weight (M_i,), which share them;
    `part_loss` may be that function compiled. Targets and weights get no gradient.
    Returns: the loss (), to be differentiated once, and, without gradient, the weighted losses (M_i,) of the rows.
    """
    tokens, targets, weights = zip(*batches)
    tokens = [x.float() for x in tokens]
    loss, *rows = PrototypeLoss.apply(prototypes.float(), targets, weights, temp, part_loss, *tokens)
    return loss, rows


def koleo_loss(x: Tensor, group_size: int | None = None, eps: float = 1e-8) -> Tensor:
    """Kozachenko-Leonenko entropy: -mean log distance to the nearest neighbor on the sphere (DINOv2, section 4).

    Args: x (B, D), not normalized; neighbors are searched among each `group_size` consecutive rows (None: among all B;
    the official code searches among the images of one GPU). Raises ValueError if groups do not divide B.
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
