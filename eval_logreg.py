"""Logistic regression on frozen features.

    python eval_logreg.py out/ckpt.pth                                  # data and image size come from the checkpoint
    python eval_logreg.py dinov2_vits14 --train /data/train --val /data/val --cache /tmp/features
    python eval_logreg.py ckpt.pth --sklearn                            # by scikit-learn instead, on one CPU
    torchrun --nproc-per-node 8 eval_logreg.py ckpt.pth                 # features and values of C shared out over 8

Protocol (DINOv2): CLS features as they are, of the central square; multinomial regression with an L2 penalty, C being
one of 45 values from 1e-6 to 1e5. C is chosen on a random tenth of the training images, held out; --finetune SPEC names
other images to choose it by, --finetune-on-val chooses by the test images themselves. Then all training images are
fitted with it. Prints top-1 and adds a line with all figures to CKPT.eval_logreg.jsonl beside the checkpoint. Wrong
input: exit code 2. Apache License 2.0.
"""
import argparse
import sys
import warnings
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from support.evaluation import Evaluation, Flags, common_labels, full_float32, ranks
from support.parallel import world

CS = tuple((10 ** torch.linspace(-6, 5, 45)).tolist())  # inverse strengths of the penalty, as scikit-learn counts them


class Fit(NamedTuple):
    """J fitted models: class scores of x (n, D) are x @ weight[j].T + bias[j], for the K classes named in `classes`."""

    weight: Tensor  # (J, K, D)
    bias: Tensor  # (J, K)
    classes: Tensor  # (K,) int64
    converged: Tensor  # (J,) bool
    iterations: Tensor  # (J,) int64


# ----------------------------------------------------------------------------------------------------------------------
# The solver


class Principal:
    """Features in the axes of their covariance: `x` (n, D) is centered and rotated in place. The penalty does not see a
    rotation, and the bias takes up the shift, so the optimum is the same; but here the curvature of the loss is nearly
    diagonal, which turns hundreds of iterations into tens, however badly the features are scaled."""

    def __init__(self, x: Tensor, chunk: int = 2**14):
        wide = torch.float32 if x.device.type == "mps" else torch.float64  # which Apple's GPUs do not have
        n, dim = x.shape
        self.x, self.mean = x, sum(part.to(wide).sum(0) for part in x.split(chunk)) / n
        covariance = torch.zeros(dim, dim, dtype=wide, device=x.device)
        for part in x.split(chunk):
            part = part.to(wide) - self.mean
            covariance.addmm_(part.T, part)
        variance, axes = torch.linalg.eigh((covariance / n).cpu())  # (D,) ascending, (D, D) in columns
        self.variance, self.axes = variance.clamp(min=0).to(x.device), axes.to(x.device)
        for part in x.split(chunk):
            part.copy_((part.to(wide) - self.mean) @ self.axes)

    def back(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (J, K, D) and biases (J, K) for the features as they were before."""
        weight = weight.to(self.axes) @ self.axes.T
        return weight, bias.to(self.axes) - weight @ self.mean


class Objective:
    """Mean cross-entropy + |W|^2 / (2 C n) of many models at once, the bias not penalized: what scikit-learn's
    LogisticRegression(C) minimizes, divided by C n. Two classes are, there too, one vector w = W_1 - W_0, and |w|^2 is
    penalized, which is twice |W|^2 at the optimum."""

    def __init__(self, features: Principal, rows: Tensor, labels: Tensor, n_classes: int, cs: Tensor):
        self.x, self.rows, self.labels, self.n_classes = features.x, rows, labels, n_classes
        self.variance = torch.cat([features.variance, features.variance.new_ones(1)])  # (D + 1,), 1 for the bias
        self.penalty = (2 if n_classes == 2 else 1) / (cs.to(features.variance) * len(rows))  # (J,)
        self.penalized = torch.cat([torch.ones_like(features.variance), features.variance.new_zeros(1)])  # (D + 1,)

    def __call__(self, w: Tensor, models: Tensor, curved: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
        """At weights w (A, K, D + 1), bias last, of the models numbered in `models` (A,): loss (A,), its gradient, like
        w, and, if `curved`, the diagonal of its second derivative, likewise."""
        (n_models, n_classes, width), n = w.shape, len(self.rows)
        loss = self.penalty.new_zeros(n_models)
        gradient, curvature = torch.zeros_like(w), torch.zeros_like(w) if curved else None
        step = max(16, (2**26 if w.is_cuda else 2**20) // (n_models * n_classes))  # logits stay in a CPU's cache
        for rows, labels in zip(self.rows.split(step), self.labels.split(step)):
            x = torch.cat([self.x[rows].to(w.dtype), w.new_ones(len(rows), 1)], 1)  # (b, D + 1)
            p = (x @ w.flatten(0, 1).T).unflatten(1, (n_models, n_classes))  # (b, A, K), logits as yet
            right = labels[:, None, None].expand(-1, n_models, 1)
            p -= p.amax(2, keepdim=True)
            own = p.gather(2, right)[..., 0]
            total = p.exp_().sum(2, keepdim=True)
            loss += (total[..., 0].log() - own).sum(0, dtype=loss.dtype)
            p /= total
            if curved:
                curvature.view(-1, width).addmm_((p - p.square()).flatten(1).T, x.square())
            p.scatter_add_(2, right, -p.new_ones(1, 1, 1).expand(len(rows), n_models, 1))
            gradient.view(-1, width).addmm_(p.flatten(1).T, x)
        penalty = self.penalty[models, None, None] * self.penalized  # (A, 1, D + 1)
        loss = loss / n + 0.5 * (w.to(penalty).square() * penalty).flatten(1).sum(1)
        gradient = gradient / n + penalty.to(w.dtype) * w
        if curved:
            curvature = curvature / n + penalty.to(w.dtype) + 1e-12 * self.variance.to(w.dtype)  # never zero
        return loss, gradient, curvature


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products (A,) of tensors (A, K, D), float64 where there is such a thing."""
    products = torch.linalg.vecdot(a.flatten(1), b.flatten(1))
    return products if a.device.type == "mps" else products.double()


def scaled(factor: Tensor, x: Tensor) -> Tensor:
    return factor.to(x.dtype)[:, None, None] * x


def newton(gradient: Tensor, curvature: Tensor) -> Tensor:
    """The step that this diagonal curvature calls for, among those that leave the sum over classes as it is: equal
    changes of all classes' weights have no effect but on the penalty, so at the optimum that sum is zero."""
    level = (gradient / curvature).sum(1, keepdim=True) / (1 / curvature).sum(1, keepdim=True)
    return (gradient - level) / curvature


def descent(gradient: Tensor, curvature: Tensor, pairs: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The direction of L-BFGS (Nocedal & Wright 2006, algorithm 7.4), from the diagonal `curvature` and the latest
    changes of weights and gradients, and the inverse of their product."""
    q, factors = gradient.clone(), []
    for s, y, inverse in reversed(pairs):
        factors.append(inverse * dot(s, q))
        q -= scaled(factors[-1], y)
    q = newton(q, curvature)
    if pairs:
        s, y, inverse = pairs[-1]
        scale = dot(s, y) / dot(newton(y, curvature), y).clamp(min=1e-30)
        q = scaled(torch.where(inverse > 0, scale, 1.0), q)
    for (s, y, inverse), factor in zip(pairs, reversed(factors)):
        q += scaled(factor - inverse * dot(y, q), s)
    return -q


def minimize(objective, w: Tensor, models: Tensor, max_iter: int, tol: float, history: int = 10,
             bar=None) -> tuple[Tensor, Tensor, Tensor]:
    """L-BFGS for many independent problems at once, with steps halved until the loss decreases; those that are done
    leave the batch. Returns weights (J, K, D), whether each has converged, and the iterations made, (J,).

    Converged: the next step is at most `tol` times as long as w. A problem is also left when its loss decreases no
    more, which is where its number format ends.
    """
    result, eps = w.clone(), 4 * torch.finfo(w.dtype).eps
    converged, iterations = torch.zeros(len(w), dtype=torch.bool, device=w.device), torch.zeros_like(models)
    active, pairs = torch.arange(len(w), device=w.device), []
    loss, gradient, curvature = objective(w, models)
    stuck, idle = torch.zeros_like(converged), torch.zeros_like(models)
    for iteration in range(max_iter + 1):
        direction = descent(gradient, curvature, pairs)
        done = dot(direction, direction) <= tol**2 * dot(w, w)
        converged[active[done]] = True
        stay = ~(done | stuck)
        if not stay.all():
            result[active] = w
            active, w, loss, gradient, curvature, direction, idle = (
                t[stay] for t in (active, w, loss, gradient, curvature, direction, idle))
            pairs = [tuple(t[stay] for t in pair) for pair in pairs]
            if bar is not None:
                bar.update(len(stay) - len(active))
        if not len(active) or iteration == max_iter:
            break
        iterations[active] += 1
        slope, rate, high = dot(direction, gradient), torch.ones_like(loss), torch.arange(len(w), device=w.device)
        new, after, new_gradient = torch.empty_like(w), torch.empty_like(loss), torch.empty_like(w)
        renew = iteration < 5 or iteration % 5 == 0  # the curvature, which costs half as much as all the rest
        for _ in range(12):
            new[high] = w[high] + scaled(rate[high], direction[high])
            after[high], new_gradient[high], curved = objective(new[high], models[active[high]], renew)
            if renew:
                curvature[high] = curved
            high = (~(after <= loss + 1e-4 * rate * slope + eps * loss)).nonzero()[:, 0]  # also where it is NaN
            if not len(high):
                break
            rate[high] *= 0.5
        new[high], after[high] = w[high], loss[high]
        idle = torch.where(loss - after > eps * loss, 0, idle + 1)
        stuck = (idle >= 3).index_fill(0, high, True)
        s, y = new - w, new_gradient - gradient
        sy = dot(s, y)
        usable = sy > 1e-10 * (dot(s, s) * dot(y, y)).sqrt()
        pairs = [*pairs[-history + 1 :], (s, y, torch.where(usable, 1 / sy, 0.0))]
        w, loss, gradient = new, after, new_gradient
        if bar is not None:
            bar.set_postfix_str(f"iteration {iteration + 1}")
    result[active] = w
    return result, converged, iterations


@full_float32()
@torch.no_grad()
def fit(features: Principal, labels: Tensor, cs, rows: Tensor | None = None, max_iter: int = 1000, tol: float = 1e-4,
        progress: bool = False) -> Fit:
    """Multinomial logistic regression of labels (n,) for each C of `cs` at once: every pass over the rows serves all
    values of C that have not converged. `rows` chooses training rows; None: all. First in the precision of the
    features; where that ends too early, on in float64. Raises ValueError for less than two classes."""
    device = labels.device
    rows = torch.arange(len(labels), device=device) if rows is None else rows
    classes, labels = labels[rows].unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError("all training images are of one class; logistic regression needs two or more")
    cs = torch.as_tensor(cs, dtype=torch.float64).to(features.variance)
    objective = Objective(features, rows, labels, len(classes), cs)
    w = features.x.new_zeros(len(cs), len(classes), features.x.shape[1] + 1)
    todo, converged = torch.arange(len(cs), device=device), torch.zeros(len(cs), dtype=torch.bool, device=device)
    iterations, result = torch.zeros(len(cs), dtype=torch.int64, device=device), w.to(features.axes)
    with tqdm(total=len(cs), desc="logistic regression", unit="C", leave=False,
              disable=None if progress else True) as bar:
        for dtype in dict.fromkeys((features.x.dtype, features.axes.dtype)):
            if len(todo):
                left = max_iter - int(iterations[todo].max())
                found, well, made = minimize(objective, result[todo].to(dtype), todo, left, tol, bar=bar)
                result[todo], converged[todo] = found.to(result), well
                iterations[todo] += made
                todo = todo[~well & (iterations[todo] < max_iter)]
                bar.update(-len(todo))
    weight, bias = features.back(result[..., :-1], result[..., -1])
    return Fit(weight, bias, classes, converged, iterations)


def fit_by_sklearn(x: Tensor, labels: Tensor, cs, rows: Tensor | None = None, max_iter: int = 1000, tol: float = 1e-6,
                   progress: bool = False, dtype: torch.dtype = torch.float64) -> Fit:
    """The same by scikit-learn, in `dtype`, one value of C after the other. Its `tol` is the largest entry of the
    gradient."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    rows = torch.arange(len(labels)) if rows is None else rows.cpu()
    x, y, models = x.cpu()[rows].to(dtype).numpy(), labels.cpu()[rows].numpy(), []
    if len(np.unique(y)) < 2:
        raise ValueError("all training images are of one class; logistic regression needs two or more")
    for c in tqdm(cs, desc="scikit-learn", unit="C", leave=False, disable=None if progress else True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # told by n_iter_
            models.append(LogisticRegression(C=float(c), max_iter=max_iter, tol=tol).fit(x, y))
    weight, bias = (torch.from_numpy(np.stack([getattr(m, name) for m in models])) for name in ("coef_", "intercept_"))
    if weight.shape[1] == 1:  # two classes are one vector there
        weight, bias = torch.cat([-weight, weight], 1) / 2, torch.cat([-bias, bias], 1) / 2
    iterations = torch.tensor([int(m.n_iter_[0]) for m in models])
    return Fit(weight, bias, torch.from_numpy(models[0].classes_).long(), iterations < max_iter, iterations)


# ----------------------------------------------------------------------------------------------------------------------
# The protocol


@full_float32()
def accuracies(models: Fit, x: Tensor, labels: Tensor, n_classes: int) -> dict[str, Tensor]:
    """Of each model, in percent: top1 and top5 (J,), and per_class (J, n_classes), top-1 of each class, NaN for those
    that do not occur. A class that was not trained is never right."""
    number = torch.full((n_classes,), -1, device=x.device)
    number[models.classes.to(x.device)] = torch.arange(len(models.classes), device=x.device)
    weight, bias = models.weight.to(x), models.bias.to(x)
    top1, top5 = torch.zeros(2, len(weight), n_classes, device=x.device)
    for part, answers in zip(x.split(2**12), labels.split(2**12)):
        own, known = number[answers], number[answers] >= 0
        for j in range(len(weight)):
            rank = ranks(part @ weight[j].T + bias[j], own.clamp(min=0))
            for hits, t in ((top1, 1), (top5, 5)):
                hits[j].index_add_(0, answers, ((rank < t) & known).to(hits.dtype))
    count = torch.bincount(labels, minlength=n_classes)
    return dict(top1=100 * top1.sum(1) / len(labels), top5=100 * top5.sum(1) / len(labels),
                per_class=100 * top1 / count)


def sweep(solve, cs, rows: Tensor, held: tuple[Tensor, Tensor], n_classes: int,
          metric: str) -> tuple[dict[float, float], int]:
    """Fits models for all C on these rows, each process some of them: {C: its figure on the images held out}, and how
    many have not converged."""
    rank, n_ranks = world()
    mine = list(range(rank, len(cs), n_ranks))
    figures = torch.zeros(len(cs), device=rows.device)
    failed = torch.zeros((), dtype=torch.int64, device=rows.device)
    if mine:
        models = solve([cs[j] for j in mine], rows)
        scores = accuracies(models, *held, n_classes)
        figures[mine] = scores["top1"] if metric == "accuracy" else scores["per_class"].nanmean(1)
        failed += (~models.converged).sum().to(failed.device)
    if n_ranks > 1:
        dist.all_reduce(figures)
        dist.all_reduce(failed)
    return dict(zip(cs, figures.tolist())), int(failed)


def run(e: Evaluation) -> dict:
    """The whole protocol on the images of an open evaluation."""
    args = e.args
    finetune = e.open(args.finetune) if args.finetune else None  # a mistake shows before the features take their time
    common_labels(e.train, finetune)
    x, labels = e.labeled(e.train, e.train_labels)
    test = e.labeled(e.val, e.val_labels)
    rows = torch.arange(len(x), device=x.device)  # to fit with when C is chosen; afterwards, all
    held = test
    if args.finetune:
        held = e.labeled(finetune, common_labels(e.train, finetune)[1])
        x, labels = torch.cat([x, held[0]]), torch.cat([labels, held[1]])
    elif not args.finetune_on_val:
        if len(x) < 10:
            raise ValueError(f"a tenth of {len(x)} training images is none; choose C by --finetune or "
                             "--finetune-on-val")
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)  # as officially
        rows = order[len(x) // 10 :]
        held = x[order[: len(x) // 10]], labels[order[: len(x) // 10]]
    n_classes = int(max(labels.max(), test[1].max())) + 1
    options = dict(max_iter=args.max_iter, tol=args.tol, progress=world()[0] == 0)
    if args.sklearn:
        solve = partial(fit_by_sklearn, x, labels, **options)
    else:
        solve = partial(fit, Principal(x), labels, **options)  # turns x where it stands
    figures, failed = sweep(solve, args.cs, rows, held, n_classes, args.metric)
    best = max(figures, key=figures.get)  # the first, so the strongest penalty, of equals
    final = solve([best])
    failed += not final.converged.all()
    scores = accuracies(final, *test, n_classes)
    result = dict(top1=scores["top1"].item(), top5=scores["top5"].item(),
                  mean_per_class=scores["per_class"].nanmean().item(), best_c=best, chosen_by=figures[best],
                  figures={f"{c:.3g}": value for c, value in figures.items()}, not_converged=failed,
                  iterations=int(final.iterations))
    return result | dict(classes=len(final.classes), train_images=len(labels), val_images=len(test[1]))


def parse(argv: list[str] | None) -> argparse.Namespace:
    flags = Flags(__doc__)
    flags.add_argument("--finetune", default="", help="labeled images to choose C by; empty: a tenth of --train")
    flags.add_argument("--finetune-on-val", action="store_true", help="choose C by the images of --val")
    flags.add_argument("--metric", choices=("accuracy", "mean_per_class"), default="accuracy", help="to choose C by")
    flags.add_argument("--cs", type=float, nargs="+", default=list(CS), help="values of C to choose from")
    flags.add_argument("--max-iter", type=int, default=1000, help="iterations of a fit")
    flags.add_argument("--tol", type=float, default=0.0, help="a fit is done when its next step would change the "
                       "weights by less than this share; 0: 1e-4, or 1e-7 of scikit-learn's own kind")
    flags.add_argument("--sklearn", action="store_true", help="fit by scikit-learn, whose tol is of the gradient")
    args = flags.parse_args(argv)
    if min(args.cs) <= 0 or args.max_iter < 1 or not args.tol >= 0:
        raise ValueError("--cs and --max-iter must be positive, --tol not negative")
    args.cs, args.tol = sorted(args.cs), args.tol or (1e-7 if args.sklearn else 1e-4)
    if args.finetune and args.finetune_on_val:
        raise ValueError("--finetune and --finetune-on-val exclude each other; choose one")
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    with Evaluation("logreg", args, margin=False) as e:
        if e.val is None:
            raise ValueError(f"{e.specs[0]} comes without images to classify; name them by --val")
        result = run(e)
        if world()[0] == 0 and result["not_converged"]:
            print(f"{result['not_converged']} of {len(args.cs) + 1} fits have not converged to --tol {args.tol:g} in "
                  f"--max-iter {args.max_iter} iterations; their figures are those of where they were", file=sys.stderr)
        by = args.finetune or ("--val" if args.finetune_on_val else "a tenth of --train, held out")
        protocol = dict(solver="scikit-learn" if args.sklearn else "l-bfgs", cs=len(args.cs), chosen_on=by,
                        metric=args.metric, max_iter=args.max_iter, tol=args.tol)
        e.report(protocol, result, {"logistic regression top-1": f"{result['top1']:.2f} %",
                                    "top-5": f"{result['top5']:.2f} %", "C =": f"{result['best_c']:.3g}"})
    return result


if __name__ == "__main__":
    run(main)
