import json

import pytest
import torch

import eval_logreg
import support.evaluation
from tests.common import Launched, assert_close, randn, write_images


def clusters(n: int, dim: int, n_classes: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    centers, x = randn(seed, (n_classes, dim), (n, dim))
    labels = torch.arange(n) % n_classes
    return centers[labels] + noise * x + 3, labels


def accuracies(models, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    return support.evaluation.accuracies(eval_logreg.places_of_answers(models, x, labels), labels)


@pytest.mark.parametrize("n_classes", [2, 5])
@pytest.mark.parametrize("scales", [0, 1])
def test_eval_logreg_equals_scikit_learn(n_classes, scales):
    """Coefficients, also of badly scaled features; the loss where scikit-learn does not get to the end."""
    x, labels = clusters(400, 6, n_classes, 2.0)
    x = x * torch.logspace(-scales, scales, 6)
    cs = [1e-6, 1e-3, 0.1, 1.0, 100.0, 1e5]
    models = eval_logreg.fit(eval_logreg.PrincipalAxes(x.clone()), labels, cs, tol=1e-6)
    oracle = eval_logreg.fit_with_sklearn(x, labels, cs, max_iter=100_000, tol=1e-9)
    assert models.converged.all() and models.iterations.max() < 80  # scikit-learn's go into the thousands
    for j, c in enumerate(cs):
        assert_close(models.weight[j], oracle.weight[j], 1e-3 * oracle.weight[j].abs().max().item(), f"C = {c:g}")
        bias = models.bias[j] - models.bias[j].mean(), oracle.bias[j] - oracle.bias[j].mean()  # a shift has no effect
        assert_close(*bias, 2e-3 * oracle.bias[j].abs().max().item(), f"C = {c:g}")
    ours, theirs = (accuracies(m, x, labels)["top1"] for m in (models, oracle))
    assert_close(ours, theirs, 0.1 + 1e-6)


def test_eval_logreg_default_tolerance():
    """Close to the optimum as it is, also where a few rows are a hundred times larger than the others."""
    for outliers in (0, 5):
        x, labels = clusters(600, 30, 6, 2.0)
        x[:outliers] *= 100
        cs = [1e-4, 1e-2, 1.0]
        near, exact = (eval_logreg.fit(eval_logreg.PrincipalAxes(x.to(dtype, copy=True)), labels, cs, **options)
                       for dtype, options in ((torch.float32, {}), (torch.float64, dict(tol=1e-7, max_iter=9999))))
        for a, b in zip(near.weight, exact.weight):
            assert (a - b).norm() <= 5e-3 * b.norm()
        both = (accuracies(m, x, labels)["top1"] for m in (near, exact))
        assert_close(*both, 0.17)  # an image of 600
    assert eval_logreg.parse(["x"]).tol == 1e-4 and eval_logreg.parse(["x", "--sklearn"]).tol == 1e-7


def test_eval_logreg_converges_on_hard_data_and_says_when_not():
    """Separable, so that weights grow with C; columns that are constant, equal, or a million times larger."""
    x, labels = clusters(300, 5, 3, 0.1)
    x = torch.cat([x, x[:, :1], torch.ones(300, 1), 1e6 * x[:, 1:2]], 1)
    models = eval_logreg.fit(eval_logreg.PrincipalAxes(x.clone()), labels, eval_logreg.CS)
    assert models.converged.all() and (accuracies(models, x, labels)["top1"][30:] == 100).all()
    assert not eval_logreg.fit(eval_logreg.PrincipalAxes(x.clone()), labels, [1e5], max_iter=2).converged.any()
    with pytest.raises(ValueError, match="of one class"):
        eval_logreg.fit(eval_logreg.PrincipalAxes(x), torch.zeros_like(labels), [1.0])


def test_eval_logreg_gradient_and_curvature():
    """Of the objective, against automatic differentiation."""
    x, labels = clusters(50, 4, 3, 1.0)
    features = eval_logreg.PrincipalAxes(x.double())
    cs = torch.tensor([0.1, 10.0], dtype=torch.float64)
    objective = eval_logreg.PenalizedLoss(features, torch.arange(50), labels, 3, cs)
    w = randn(1, (2, 3, 5))[0].double().requires_grad_()
    loss = torch.stack([
        torch.nn.functional.cross_entropy(features.x @ w[j, :, :4].T + w[j, :, 4], labels)
        + w[j, :, :4].square().sum() / (2 * cs[j] * 50) for j in range(2)])
    loss.sum().backward()
    value, gradient, curvature = objective(w.detach(), torch.arange(2))
    assert_close(value, loss.detach(), 1e-12)
    assert_close(gradient, w.grad, 1e-12)
    p = torch.softmax(features.x @ w[0, :, :4].T.detach() + w[0, :, 4].detach(), 1)
    spread = (p * (1 - p))[:, 1:2] * torch.cat([features.x, torch.ones(50, 1)], 1).square()  # (50, 5)
    assert_close(curvature[0, 1], spread.mean(0) + torch.tensor([1, 1, 1, 1, 0]) / 5.0, 1e-7)
    assert objective(w.detach(), torch.arange(2), False)[2] is None
    variance = features.x.square().mean(0)
    assert_close(variance, features.variance, 1e-12)
    assert_close(features.x.T @ features.x / 50, torch.diag(variance), 1e-12)


def test_eval_logreg_without_flags(trained, tmp_path):
    """C is chosen on the official tenth of the training images; one and two processes and scikit-learn agree."""
    flags = [trained / "ckpt.pth", "--out", tmp_path / "results", "--cs", 1e-5, 1e-3]
    alone = eval_logreg.main([str(f) for f in flags])
    Launched(tmp_path / "log", eval_logreg.main, *flags, world=2).wait()
    saved = [json.loads(line) for line in (tmp_path / "results").read_text().splitlines()]
    assert saved[1]["processes"] == 2 and saved[1]["result"]["best_c"] == alone["best_c"]
    assert saved[1]["result"]["top1"] == pytest.approx(alone["top1"], abs=0.3)
    assert saved[0]["protocol"]["chosen_on"].startswith("a tenth")
    oracle = eval_logreg.main([str(f) for f in flags] + ["--sklearn"])
    assert oracle["top1"] == pytest.approx(alone["top1"], abs=0.3) and oracle["best_c"] == alone["best_c"]

    with support.evaluation.Evaluation("logreg", eval_logreg.parse([str(trained / "ckpt.pth")])) as e:
        x, labels = e.labeled(e.train, e.train_labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held, rows = order[:143], order[143:]
    models = eval_logreg.fit(eval_logreg.PrincipalAxes(x.clone()), labels, [1e-5, 1e-3], rows)
    expected = accuracies(models, x[held], labels[held])["top1"]
    assert list(alone["figures"].values()) == pytest.approx(expected.tolist())


def test_eval_logreg_other_ways_to_choose_and_missing_classes(trained, tmp_path, cache, capsys):
    main = lambda *flags: eval_logreg.main([str(trained / "ckpt.pth"), "--cs", "0.01", "1", "--out",  # noqa: E731
                                            str(tmp_path / "results"), *map(str, flags)])
    on_val = main("--finetune-on-val")
    assert on_val["chosen_by"] == max(on_val["figures"].values()) and on_val["train_images"] == 1437
    other = main("--finetune", "digits:split=VAL", "--metric", "mean_per_class", "--max-iter", "1")
    assert other["train_images"] == 1437 + 360 and "3 of 3 fits have not converged" in capsys.readouterr().err
    write_images(tmp_path / "d", [f"train/{c}/{i}.png" for c in "ab" for i in range(10)] +
                 [f"val/{c}/{i}.png" for c in "abc" for i in range(3)])
    (tmp_path / "d/train/c").mkdir()
    write_images(tmp_path / "d/train/c", ["x.png"])
    (tmp_path / "d/train/c/x.png").write_bytes(b"damaged")  # so class c has no image to learn from
    missing = main("--train", tmp_path / "d/train", "--val", tmp_path / "d/val")
    assert missing["classes"] == 2 and missing["val_images"] == 9 and missing["top1"] <= 67
    write_images(tmp_path / "few", [f"train/{c}/{i}.png" for c in "ab" for i in range(2)])
    write_images(tmp_path / "few", ["val/a/0.png", "val/b/0.png"])
    with pytest.raises(ValueError, match="cannot hold out a tenth of 4 training images"):
        main("--train", tmp_path / "few")
    assert main("--train", tmp_path / "few", "--finetune-on-val")["val_images"] == 2
    with pytest.raises(ValueError, match="exclude each other"):
        main("--finetune", "digits", "--finetune-on-val")
    with pytest.raises(ValueError, match="has no validation images"):
        main("--train", tmp_path / "few/train")
