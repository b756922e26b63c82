"""Logistic regression on frozen features.

    python eval_logreg.py out/ckpt.pth                                  # data and image size come from the checkpoint
    python eval_logreg.py dinov2_vits14 --train /data/train --val /data/val --cache /tmp/features
    python eval_logreg.py ckpt.pth --sklearn                            # with scikit-learn instead, on one CPU
    torchrun --nproc-per-node 8 eval_logreg.py ckpt.pth                 # splits features and values of C over 8

Protocol (DINOv2): CLS features of the center square, not normalized; multinomial regression with an L2 penalty of
strength 1/C, for 45 values of C from 1e-6 to 1e5. C is chosen on a random tenth of the training images, held out;
--finetune SPEC names other images to choose it on, --finetune-on-val chooses it on the test images. The model is then
fitted to all training images. Prints top-1 accuracy and appends a line with all results to CKPT.eval_logreg.jsonl.
Invalid input exits with code 2. Apache License 2.0.
"""
import argparse
import warnings
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from support.cli import at_least, positive, run
from support.evaluation import (
    Evaluation, EvaluationParser, accuracies, common_labels, full_float32, place_of_answer, say)
from support.parallel import world

CS = tuple((10 ** torch.linspace(-6, 5, 45)).tolist())  # inverse strength of the penalty, as in scikit-learn


class FittedModels(NamedTuple):
    """J regressions: class scores of x (n, D) are x @ weight[j].T + bias[j], for the K classes in `classes`."""

    weight: Tensor  # (J, K, D)
    bias: Tensor  # (J, K)
    classes: Tensor  # (K,) int64
    converged: Tensor  # (J,) bool
    iterations: Tensor  # (J,) int64


# ----------------------------------------------------------------------------------------------------------------------
# The solver


class PrincipalAxes:
    """Features in the axes of their covariance: x (n, D) is centered and rotated in place.

    The penalty is invariant to rotation and the bias absorbs the shift, so the optimum is the same. But in these axes
    the curvature of the loss is nearly diagonal, which turns hundreds of iterations into tens, however badly the
    features are scaled.
    """

    def __init__(self, x: Tensor, chunk: int = 2**14):
        wide = torch.float32 if x.device.type == "mps" else torch.float64  # Apple GPUs have no float64
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

    def in_original_axes(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (J, K, D) and biases (J, K) for the features before centering and rotation."""
        weight = weight.to(self.axes) @ self.axes.T
        return weight, bias.to(self.axes) - weight @ self.mean


class PenalizedLoss:
    """Mean cross-entropy + |W|^2 / (2 C n) of many models at once, without a penalty on the bias: the objective of
    scikit-learn's LogisticRegression(C), divided by C n. For two classes scikit-learn penalizes the single vector
    w = W_1 - W_0, and |w|^2 is twice |W|^2 at the optimum, hence the factor 2."""

    def __init__(self, features: PrincipalAxes, rows: Tensor, labels: Tensor, n_classes: int, cs: Tensor):
        self.x, self.rows, self.labels, self.n_classes = features.x, rows, labels, n_classes
        self.variance = torch.cat([features.variance, features.variance.new_ones(1)])  # (D + 1,), 1 for the bias
        self.penalty = (2 if n_classes == 2 else 1) / (cs.to(features.variance) * len(rows))  # (J,)
        self.penalized = torch.cat([torch.ones_like(features.variance), features.variance.new_zeros(1)])  # (D + 1,)

    def __call__(self, w: Tensor, models: Tensor, curved: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
        """At weights w (A, K, D + 1), bias last, of the models with indices `models` (A,): the loss (A,), its gradient,
        shaped like w, and if `curved` the diagonal of its Hessian, likewise."""
        (n_models, n_classes, width), n = w.shape, len(self.rows)
        loss = self.penalty.new_zeros(n_models)
        gradient, curvature = torch.zeros_like(w), torch.zeros_like(w) if curved else None
        step = max(16, (2**26 if w.is_cuda else 2**20) // (n_models * n_classes))  # logits fit a CPU's cache
        for rows, labels in zip(self.rows.split(step), self.labels.split(step)):
            x = torch.cat([self.x[rows].to(w.dtype), w.new_ones(len(rows), 1)], 1)  # (b, D + 1)
            p = (x @ w.flatten(0, 1).T).unflatten(1, (n_models, n_classes))  # (b, A, K), the logits
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
    """Inner products (A,) of tensors (A, K, D), in float64 where the device has it."""
    products = torch.linalg.vecdot(a.flatten(1), b.flatten(1))
    return products if a.device.type == "mps" else products.double()


def per_model(factor: Tensor, x: Tensor) -> Tensor:
    """Factors (A,) times tensors (A, K, D)."""
    return factor.to(x.dtype)[:, None, None] * x


def newton_step(gradient: Tensor, curvature: Tensor) -> Tensor:
    """The Newton step for a diagonal Hessian, projected to keep the sum over classes: adding the same to the weights of
    all classes changes nothing but the penalty, so at the optimum their sum is zero."""
    level = (gradient / curvature).sum(1, keepdim=True) / (1 / curvature).sum(1, keepdim=True)
    return (gradient - level) / curvature


def lbfgs_direction(gradient: Tensor, curvature: Tensor, pairs: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The L-BFGS direction (Nocedal & Wright 2006, algorithm 7.4), preconditioned by the diagonal `curvature`. `pairs`:
    the latest changes s of the weights and y of the gradients, with 1 / <s, y>."""
    q, factors = gradient.clone(), []
    for s, y, inverse in reversed(pairs):
        factors.append(inverse * dot(s, q))
        q -= per_model(factors[-1], y)
    q = newton_step(q, curvature)
    if pairs:
        s, y, inverse = pairs[-1]
        scale = dot(s, y) / dot(newton_step(y, curvature), y).clamp(min=1e-30)
        q = per_model(torch.where(inverse > 0, scale, 1.0), q)
    for (s, y, inverse), factor in zip(pairs, reversed(factors)):
        q += per_model(factor - inverse * dot(y, q), s)
    return -q


def minimize(objective, w: Tensor, models: Tensor, max_iter: int, tol: float, history: int = 10,
             bar=None) -> tuple[Tensor, Tensor, Tensor]:
    """L-BFGS on many independent problems at once, with backtracking line search; finished ones leave the batch.
    Returns weights (J, K, D), whether each problem has converged (J,), and its number of iterations (J,).

    A problem has converged when the next step is at most `tol` times as long as w. It is given up when its loss no
    longer decreases, at the limit of its floating-point precision.
    """
    result, eps = w.clone(), 4 * torch.finfo(w.dtype).eps
    converged, iterations = torch.zeros(len(w), dtype=torch.bool, device=w.device), torch.zeros_like(models)
    active, pairs = torch.arange(len(w), device=w.device), []
    loss, gradient, curvature = objective(w, models)
    stuck, idle = torch.zeros_like(converged), torch.zeros_like(models)
    for iteration in range(max_iter + 1):
        direction = lbfgs_direction(gradient, curvature, pairs)
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
        renew = iteration < 5 or iteration % 5 == 0  # the curvature costs half as much as everything else
        for _ in range(12):
            new[high] = w[high] + per_model(rate[high], direction[high])
            after[high], new_gradient[high], curved = objective(new[high], models[active[high]], renew)
            if renew:
                curvature[high] = curved
            high = (~(after <= loss + 1e-4 * rate * slope + eps * loss)).nonzero()[:, 0]  # also true for NaN
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
def fit(features: PrincipalAxes, labels: Tensor, cs, rows: Tensor | None = None, max_iter: int = 1000,
        tol: float = 1e-4, progress: bool = False) -> FittedModels:
    """Multinomial logistic regression of labels (n,) for all values of C at once: one pass over the data serves every
    C that has not converged. `rows` selects training rows; None: all. Runs in the precision of the features first, then
    in float64 for those that have not converged. Raises ValueError for fewer than two classes."""
    device = labels.device
    rows = torch.arange(len(labels), device=device) if rows is None else rows
    classes, labels = labels[rows].unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError("all training images are of one class; logistic regression needs two or more")
    cs = torch.as_tensor(cs, dtype=torch.float64).to(features.variance)
    objective = PenalizedLoss(features, rows, labels, len(classes), cs)
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
    weight, bias = features.in_original_axes(result[..., :-1], result[..., -1])
    return FittedModels(weight, bias, classes, converged, iterations)


def fit_with_sklearn(x: Tensor, labels: Tensor, cs, rows: Tensor | None = None, max_iter: int = 1000, tol: float = 1e-6,
                     progress: bool = False, dtype: torch.dtype = torch.float64) -> FittedModels:
    """The same with scikit-learn, in `dtype`, one C after the other. Here `tol` bounds the largest entry of the
    gradient."""
    # scikit-learn takes a second to import, and only --sklearn needs it
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    rows = torch.arange(len(labels)) if rows is None else rows.cpu()
    x, y, models = x.cpu()[rows].to(dtype).numpy(), labels.cpu()[rows].numpy(), []
    if len(np.unique(y)) < 2:
        raise ValueError("all training images are of one class; logistic regression needs two or more")
    for c in tqdm(cs, desc="scikit-learn", unit="C", leave=False, disable=None if progress else True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # n_iter_ tells
            models.append(LogisticRegression(C=float(c), max_iter=max_iter, tol=tol).fit(x, y))
    weight, bias = (torch.from_numpy(np.stack([getattr(m, name) for m in models])) for name in ("coef_", "intercept_"))
    if weight.shape[1] == 1:  # one vector for two classes
        weight, bias = torch.cat([-weight, weight], 1) / 2, torch.cat([-bias, bias], 1) / 2
    iterations = torch.tensor([int(m.n_iter_[0]) for m in models])
    return FittedModels(weight, bias, torch.from_numpy(models[0].classes_).long(), iterations < max_iter, iterations)


# ----------------------------------------------------------------------------------------------------------------------
# The protocol


@full_float32()
def places_of_answers(models: FittedModels, x: Tensor, labels: Tensor) -> Tensor:
    """The place of the right class of each image by each model, (n, J), for accuracies(). A class without training
    images comes last."""
    index = torch.full((int(max(labels.max(), models.classes.max())) + 1,), -1, device=x.device)
    index[models.classes.to(x.device)] = torch.arange(len(models.classes), device=x.device)
    weight, bias, answers = models.weight.to(x), models.bias.to(x), index[labels]  # (J, K, D), (J, K), (n,)
    places = torch.empty(len(x), len(weight), dtype=torch.int32, device=x.device)
    for start in range(0, len(x), 2**12):
        rows = slice(start, start + 2**12)
        for j in range(len(weight)):
            places[rows, j] = place_of_answer(x[rows] @ weight[j].T + bias[j], answers[rows].clamp(min=0)).int()
    return places.masked_fill(answers[:, None] < 0, torch.iinfo(torch.int32).max)


def sweep(solve, cs, rows: Tensor, held_out: tuple[Tensor, Tensor], metric: str) -> tuple[dict[float, float], int]:
    """Fits a model to these rows for each C, sharing the values of C between the ranks. Returns {C: accuracy on the
    images held out}, and how many fits have not converged."""
    rank, n_ranks = world()
    mine = list(range(rank, len(cs), n_ranks))
    figures = torch.zeros(len(cs), device=rows.device)
    failed = torch.zeros((), dtype=torch.int64, device=rows.device)
    if mine:
        models = solve([cs[j] for j in mine], rows)
        measured = accuracies(places_of_answers(models, *held_out), held_out[1])
        figures[mine] = measured["top1" if metric == "accuracy" else "mean_per_class"].to(figures)
        failed += (~models.converged).sum().to(failed.device)
    if n_ranks > 1:
        dist.all_reduce(figures)
        dist.all_reduce(failed)
    return dict(zip(cs, figures.tolist())), int(failed)


def evaluate_logreg(e: Evaluation) -> dict:
    """The whole protocol on the images of an open evaluation. Returns the result."""
    args = e.args
    finetune, = e.open(args.finetune or None)  # find mistakes before extracting features
    common_labels(e.train, finetune)
    x, labels = e.labeled(e.train, e.train_labels)
    test = held_out = e.labeled(e.val, e.val_labels)
    rows = torch.arange(len(x), device=x.device)  # to fit while C is chosen; the final fit uses all
    if args.finetune:
        held_out = e.labeled(finetune, common_labels(e.train, finetune)[1])
        x, labels = torch.cat([x, held_out[0]]), torch.cat([labels, held_out[1]])
    elif not args.finetune_on_val:
        if len(x) < 10:
            raise ValueError(f"cannot hold out a tenth of {len(x)} training images; choose C with --finetune or "
                             "--finetune-on-val")
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)  # the official split
        held, rows = order[: len(x) // 10], order[len(x) // 10 :]
        held_out = x[held], labels[held]
    options = dict(max_iter=args.max_iter, tol=args.tol, progress=world()[0] == 0)
    if args.sklearn:
        solve = partial(fit_with_sklearn, x, labels, **options)
    else:
        solve = partial(fit, PrincipalAxes(x), labels, **options)  # rotates x in place
    figures, failed = sweep(solve, args.cs, rows, held_out, args.metric)
    best = max(figures, key=figures.get)  # of equals the first, which has the strongest penalty
    final = solve([best])
    measured = {name: value.item() for name, value in accuracies(places_of_answers(final, *test), test[1]).items()}
    return measured | dict(
        best_c=best, chosen_by=figures[best], figures={f"{c:.3g}": value for c, value in figures.items()},
        not_converged=failed + int(not final.converged.all()), iterations=int(final.iterations),
        classes=len(final.classes), train_images=len(labels), val_images=len(test[1]))


# ----------------------------------------------------------------------------------------------------------------------
# Command


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = EvaluationParser(__doc__)
    add = parser.add_argument
    add("--finetune", default="", help="labeled images to choose C on; empty: a tenth of --train")
    add("--finetune-on-val", action="store_true", help="choose C on the images of --val")
    add("--metric", choices=("accuracy", "mean_per_class"), default="accuracy", help="selects C")
    add("--cs", type=positive, nargs="+", default=list(CS), help="values of C to choose from")
    add("--max-iter", type=at_least(1), default=1000, help="iterations per fit")
    add("--tol", type=float, default=0.0, help="a fit has converged when the next step would change the weights by "
        "less than this share of their norm; 0: 1e-4. With --sklearn: the largest entry of the gradient; 0: 1e-7")
    add("--sklearn", action="store_true", help="fit with scikit-learn")
    args = parser.parse_args(argv)
    if not args.tol >= 0:
        raise ValueError("--tol must not be negative")
    args.cs, args.tol = sorted(args.cs), args.tol or (1e-7 if args.sklearn else 1e-4)
    if args.finetune and args.finetune_on_val:
        raise ValueError("--finetune and --finetune-on-val exclude each other; choose one")
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    with Evaluation("logreg", args, margin=False, needs_val=True) as e:
        result = evaluate_logreg(e)
        if result["not_converged"]:
            say(f"{result['not_converged']} of {len(args.cs) + 1} fits have not converged to --tol {args.tol:g} within "
                f"--max-iter {args.max_iter} iterations; their accuracies are those of the last iterate")
        chosen_on = args.finetune or ("--val" if args.finetune_on_val else "a tenth of --train, held out")
        protocol = dict(solver="scikit-learn" if args.sklearn else "l-bfgs", cs=len(args.cs), chosen_on=chosen_on,
                        metric=args.metric, max_iter=args.max_iter, tol=args.tol)
        e.report(protocol, result, {"logistic regression top-1": f"{result['top1']:.2f} %",
                                    "top-5": f"{result['top5']:.2f} %", "C =": f"{result['best_c']:.3g}"})
    return result


if __name__ == "__main__":
    run(main, less_memory="use --dtype bf16, or a smaller --crop")
