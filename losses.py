"""The four losses of DINOv2 and the two ways to make teacher targets, as pure functions of tensors.

Every function computes in float32 whatever it is given, works without torch.distributed, and, when a process group
exists, gives what one process would give on the joined batch. Nothing here knows a config: copy the file freely.

    targets = sinkhorn_knopp(teacher_logits, temp=0.06)         # or softmax_center(teacher_logits, center, temp=0.06)
    loss = dino_loss(student_logits, targets) + ibot_loss(...) + 0.1 * koleo_loss(student_cls)

Shapes: B images, L crops, K prototypes, M masked patches, D width. Apache License 2.0.
Sources: DINO (Caron et al. 2021, arXiv 2104.14294), iBOT (Zhou et al. 2021, arXiv 2111.07832), SwAV's Sinkhorn-Knopp
(Caron et al. 2020, arXiv 2006.09882), KoLeo (Sablayrolles et al. 2018, arXiv 1806.03198), DINOv2 (arXiv 2304.07193).
"""
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
# Teacher targets: rows of probabilities over the prototypes


@torch.no_grad()
def softmax_center(logits: Tensor, center: Tensor, temp: float) -> Tensor:
    """Targets softmax((logits - center) / temp), (..., K) (DINO, equation 4). `center` is (K,) or broadcasts."""
    return F.softmax((logits.float() - center) / temp, dim=-1)


@torch.no_grad()
def center_total(logits: Tensor) -> Tensor:
    """Sum of the logits (M, K) over the rows, and their number M: (K+1,) float32. Totals of parts of a batch add up."""
    return torch.cat([logits.float().sum(0), torch.full((1,), float(len(logits)), device=logits.device)])


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
    differ between processes. For a batch in parts that do not fit at once, call what this calls, part by part.
    """
    E = exponentials(logits, temp, joint_largest([logits]))
    return balance_rows(E, balance_columns(lambda: [E], n_iterations))


@torch.no_grad()
def joint_largest(parts) -> Tensor:
    """The largest of the logits (M_i, K) in all `parts`, of all processes; () float32."""
    largest = [part.amax().float() if len(part) else part.new_full((), -torch.inf).float() for part in parts]
    return all_reduce_(torch.stack(largest).amax(), "max")


@torch.no_grad()
def exponentials(logits: Tensor, temp: float, largest: Tensor) -> Tensor:
    """E = exp((logits - largest) / temp), (M, K) float32. The shift, common to all rows of all processes, cancels; it
    keeps exp from overflowing however large the logits grow."""
    return ((logits.float() - largest) / temp).exp_()


@torch.no_grad()
def balance_columns(parts, n_iterations: int = 3) -> Tensor:
    """Scale (K,) of each prototype. `parts()` gives anew, in each iteration, the exponentials (M_i, K) of all parts of
    this process's batch."""
    col = None
    for _ in range(n_iterations):
        total = sum((torch.ones_like(E[:, 0]) if col is None else row_scale(E, col)) @ E for E in parts())
        col = 1 / all_reduce_(total).clamp(min=torch.finfo(total.dtype).tiny)  # a prototype that underflows for every
    return col  # row keeps a finite scale


def row_scale(E: Tensor, col: Tensor) -> Tensor:
    return 1 / (E @ col).clamp(min=torch.finfo(E.dtype).tiny)  # (M,)


@torch.no_grad()
def balance_rows(E: Tensor, col: Tensor) -> Tensor:
    """Targets (M, K), in the memory of the exponentials E (M, K)."""
    return E.mul_(row_scale(E, col)[:, None]).mul_(col)


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


def koleo_loss(x: Tensor, group_size: int | None = None, eps: float = 1e-8) -> Tensor:
    """Kozachenko-Leonenko entropy: -mean log distance to the nearest neighbour on the sphere (DINOv2, section 4).

    Args: x (B, D), not normalised; neighbours are searched among each `group_size` consecutive rows (None: among all B;
    the official code searches among the images of one GPU). Raises ValueError if groups do not divide B.
    Finite for duplicates (distance >= eps * sqrt(D)); 0 for groups of one, which have no neighbour.
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
            dots.diagonal(dim1=-2, dim2=-1).fill_(-2)  # below any cosine: never its own neighbour
            nearest = dots.argmax(-1, keepdim=True).expand_as(x)
        distance = (x - x.gather(1, nearest) + eps).norm(dim=-1)
        return -torch.log(distance + eps).mean()
