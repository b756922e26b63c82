"""Linear classification of frozen features, with the whole grid of classifiers at once.

    python eval_linear.py out/ckpt.pth                                  # data and image size come from the checkpoint
    python eval_linear.py out/ckpt.pth --cached                         # shortcut: features once, no augmentation
    python eval_linear.py dinov2_vits14 --train /data/train --val /data/val --dtype bf16
    torchrun --nproc-per-node 8 eval_linear.py ckpt.pth                 # splits each batch over 8 processes
    python eval_linear.py ckpt.pth --head ckpt.linear_head.pth --test /data/sketch      # evaluates an existing head

Protocol (DINOv2): random resized crops with flips; the CLS tokens of the last 1 or 4 blocks, with or without the mean
patch token; 13 learning rates, scaled by batch / 256; SGD with momentum 0.9 and a cosine schedule; batch 1024, 10
epochs of 1250 steps. On sets smaller than ImageNet-1k an epoch is one pass, but at least 50 steps. As officially, the
result is the best of the 52 classifiers on --val. It is written to CKPT.linear_head.pth (CKPT.linear_head_cached.pth)
in the layout of the released heads, which hub.load_classifier reads. After an interruption the same command continues
from the last epoch. Appends a line with all results to CKPT.eval_linear.jsonl. Invalid input exits with code 2.
Apache License 2.0.
"""
import argparse
import json
import math
import random
import re
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import Prefetcher, cut_crop, make_loader, normalize, read_sample, to_device, to_float
from hub import read_head
from support.cli import at_least, positive, run
from support.evaluation import (
    Evaluation, EvaluationParser, ResumeFile, accuracies, count_left_out, data_hash, full_float32, no_bar,
    save_on_rank_0, say, stack_images, with_label)
from support.files import refuse_inputs
from support.parallel import world

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)  # for batch 256


# ----------------------------------------------------------------------------------------------------------------------
# The classifiers


class Grid:
    """Linear classifiers on the embeddings (B, (L+1)*D) of embed(): CLS tokens of the last L blocks, mean patch token.
    For each kind of input (the last n blocks, with or without the mean patch token) there are R, one per learning rate.

    A kind's input is a range of columns of the embedding, and its R classifiers are one matrix product with
    `weights[kind]` (R*C, width) and `biases[kind]` (R*C, 1). All are views of one flat tensor, `values`; so are their
    gradients and velocities.
    """

    def __init__(self, dim: int, n_last: int, n_classes: int, rates, kinds=None, device="cpu", seed: int = 0):
        self.kinds = kinds or [(n, pool) for n in sorted({1, n_last}) for pool in (False, True)]
        self.n_last, self.dim, self.n_classes, self.rates = n_last, dim, n_classes, list(rates)
        self.inputs = [slice((n_last - n) * dim, (n_last + pool) * dim) for n, pool in self.kinds]
        rows = len(self.rates) * n_classes
        shapes = [(rows, s.stop - s.start) for s in self.inputs] + [(rows, 1)] * len(self.kinds)
        generator = torch.Generator().manual_seed(seed)
        initial = [torch.randn(shape, generator=generator) * (0.01 if shape[1] > 1 else 0.0) for shape in shapes]
        self.values = torch.cat([x.flatten() for x in initial]).to(device)
        self.gradient, self.velocity = torch.empty_like(self.values), torch.zeros_like(self.values)
        sizes = [math.prod(shape) for shape in shapes]
        self.value_views, self.gradient_views, self.velocity_views = (
            [x.view(shape) for x, shape in zip(flat.split(sizes), shapes)]
            for flat in (self.values, self.gradient, self.velocity))
        self.weights, self.biases = self.value_views[: len(self.kinds)], self.value_views[len(self.kinds) :]
        self.row_rates = torch.tensor(self.rates, device=device).repeat_interleave(n_classes)[:, None]  # (R*C, 1)

    def names(self) -> list[str]:
        """The official names, kind by kind, but with more digits if these do not tell the learning rates apart."""
        rates = [f"{rate:.5f}" for rate in self.rates]
        rates = rates if len(set(rates)) == len(rates) else [f"{rate:.3e}" for rate in self.rates]
        return [f"classifier_{n}_blocks_avgpool_{pool}_lr_{rate}".replace(".", "_")
                for n, pool in self.kinds for rate in rates]

    def logits(self, x: Tensor):
        """Yields (B, R, C) for each kind, in float32 even under autocast."""
        for columns, weight, bias in zip(self.inputs, self.weights, self.biases):
            with torch.autocast(x.device.type, enabled=False):
                scores = torch.addmm(bias[:, 0], x[:, columns], weight.T)
            yield scores.unflatten(1, (len(self.rates), self.n_classes))

    @full_float32()
    def step(self, x: Tensor, labels: Tensor, batch_size: int, factor: float) -> Tensor:
        """One step of SGD with momentum at `factor` times the learning rates, on the mean cross-entropy over a global
        batch of `batch_size` images. x (B, (L+1)*D) and labels (B,) are this rank's share. Returns this rank's share of
        the losses (kinds, R)."""
        losses, gradients = [], self.gradient_views
        right = labels[:, None, None].expand(-1, len(self.rates), 1)
        for columns, p, weight_gradient, bias_gradient in zip(
                self.inputs, self.logits(x), gradients, gradients[len(self.kinds) :]):
            p -= p.amax(2, keepdim=True)
            own = p.gather(2, right)[..., 0]
            total = p.exp_().sum(2, keepdim=True)
            losses.append((total[..., 0].log() - own).sum(0) / batch_size)
            p /= total * batch_size
            p.scatter_add_(2, right, p.new_full((1, 1, 1), -1 / batch_size).expand_as(right))
            p = p.flatten(1)  # (B, R*C), the gradient of the mean loss with respect to the logits
            torch.mm(p.T, x[:, columns], out=weight_gradient)
            torch.sum(p, 0, out=bias_gradient[:, 0])
        if world()[1] > 1:
            dist.all_reduce(self.gradient)
        self.velocity.mul_(0.9).add_(self.gradient)
        for value, velocity in zip(self.value_views, self.velocity_views):
            value.addcmul_(velocity, self.row_rates, value=-factor)
        return torch.stack(losses)

    @full_float32()
    def predict(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        """The five most likely classes of each classifier, kind by kind, (B, kinds*R, 5) int32, padded with -1 if there
        are fewer. `columns` restricts the choice to these classes; predictions are then indices into `columns`."""
        best = []
        for scores in self.logits(x):
            scores = scores if columns is None else scores[..., columns]
            best.append(scores.topk(min(5, scores.shape[-1])).indices.int())
        best = torch.cat(best, 1)
        return F.pad(best, (0, 5 - best.shape[2]), value=-1)

    def head(self, j: int) -> dict[str, Tensor]:
        """Classifier j as a released head: weight (C, (1+n)*D) on n CLS tokens and the mean patch token, zero there for
        a classifier that does not use it, and bias (C,)."""
        kind, rate = divmod(j, len(self.rates))
        rows = slice(rate * self.n_classes, (rate + 1) * self.n_classes)
        n, weight = self.kinds[kind][0], self.weights[kind][rows]
        weight = F.pad(weight, (0, (1 + n) * self.dim - weight.shape[1]))
        return dict(weight=weight.cpu().clone(), bias=self.biases[kind][rows, 0].cpu().clone())

    @classmethod
    def from_head(cls, path: str, dim: int, n_last: int, device) -> "Grid":
        """A grid of one, from a released head or one trained here, on 1 or `n_last` CLS tokens. Raises ValueError if
        the head does not fit."""
        weight, bias, layers = read_head(path, dim, n_last)
        grid = cls(dim, layers, len(weight), [0.0], [(layers, True)], device)
        grid.values.copy_(torch.cat([weight.flatten(), bias]))
        return grid


def embed(model, n_last: int, images: Tensor) -> Tensor:
    """Normalized images -> (B, (n_last+1)*D) float32: the CLS tokens of the last n blocks in order, each after the
    final norm, then the mean patch token of the last block."""
    outs = model.get_intermediate_layers(images, n_last, return_class_token=True)
    return torch.cat([cls for _, cls in outs] + [outs[-1][0].mean(1)], -1).float()


# ----------------------------------------------------------------------------------------------------------------------
# Training batches


class ProbeBatches(torch.utils.data.Dataset):
    """batches[step] -> this rank's crops (b, C, size, size), uint8 or uint16, their labels (b,), and how many images
    could not be read and were replaced by others.

    Random resized crops with flips, a pure function of step and seed; the global batch does not depend on `n_ranks`.
    """

    def __init__(self, source, labels, batch_size: int, crop: int, scale, flip_prob: float, seed: int = 0,
                 rank: int = 0, n_ranks: int = 1):
        self.source, self.labels, self.batch_size, self.seed = source, labels, batch_size, seed
        self.crop, self.scale, self.flip_prob = crop, scale, flip_prob
        self.share = range(batch_size * rank // n_ranks, batch_size * (rank + 1) // n_ranks)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, int]:
        crops, labels, bad = [], [], []
        for s in (step * self.batch_size + i for i in self.share):
            i, image = read_sample(self.source, s, self.seed, bad, self.labels)
            rng = random.Random(f"{self.seed}/probe/{s}")
            crop = cut_crop(rng, image, self.crop, self.scale).permute(2, 0, 1)
            crops.append(crop.flip(2) if rng.random() < self.flip_prob else crop)
            labels.append(int(self.labels[i]))
        return stack_images(crops), torch.tensor(labels), len(bad)


def from_images(e: Evaluation, probe, start: int, stop: int):
    """Yields this rank's share of each batch as (embeddings, labels); counts unreadable images in probe.replaced."""
    args = e.args
    batches = ProbeBatches(e.train, e.train_labels, args.batch_size, e.crop, args.crop_scale, args.flip_prob, args.seed,
                           *world())
    loader = make_loader(batches, e.workers, batch_size=None, sampler=range(start, stop),
                         pin_memory=e.device.type == "cuda")

    def prepare(batch):
        images, labels = (to_device(t, e.device) for t in batch[:2])
        return normalize(to_float(images), e.config["mean"], e.config["std"]), labels, batch[2]

    for images, labels, bad in Prefetcher(loader, prepare, e.device):
        probe.replaced += bad
        with torch.autocast(e.device.type, dtype=e.dtype, enabled=e.dtype != torch.float32):
            x = embed(e.model, probe.grid.n_last, images)
        yield x, labels


def from_table(e: Evaluation, table: Tensor, labels: Tensor, start: int, stop: int):
    """The same from the features of all images: each image once per pass, in random order."""
    rank, n_ranks = world()

    @lru_cache(maxsize=2)
    def order(epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(e.args.seed * 2**32 + epoch)
        return torch.randperm(len(table), generator=generator)

    for step in range(start, stop):
        b = e.args.batch_size
        samples = torch.arange(step * b + b * rank // n_ranks, step * b + b * (rank + 1) // n_ranks)
        epochs = samples // len(table)
        rows = torch.cat([order(k)[samples[epochs == k] % len(table)] for k in epochs.unique().tolist()])
        rows = rows.to(table.device)
        yield table[rows], labels[rows]


# ----------------------------------------------------------------------------------------------------------------------
# Test sets


def place_of_hit(hits: Tensor) -> Tensor:
    """From which of the five most likely classes are right, (n, J, 5) bool: how many come before the first right one,
    (n, J), 5 if none is right. For accuracies()."""
    return torch.where(hits.any(2), hits.int().argmax(2), 5)


def label_accuracies(predictions: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """accuracies() of predictions (n, J, 5) for labels (n,)."""
    return accuracies(place_of_hit(predictions == labels[:, None, None]), labels)


def real_accuracies(predictions: Tensor, answers: list[list[int]]) -> dict[str, Tensor]:
    """ImageNet-ReaL (Beyer et al. 2020, arXiv 2006.07159): an image may have several right answers; those with none do
    not count. Top-1 and top-5 as in accuracies(): whether the first, or one of the first five, is among the answers."""
    return accuracies(place_of_hit(torch.stack([
        torch.isin(p, torch.tensor(a, dtype=p.dtype)) for p, a in zip(predictions.cpu(), answers) if len(a)])))


def read_real(path: str, source) -> list[list[int]]:
    """The right answers of each image of ImageNet's VAL, from real.json, whose entry i is for
    ILSVRC2012_val_{i+1:08d}. Raises ValueError if the file does not fit."""
    try:
        answers = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--real {path} cannot be read ({error}); give real.json of ImageNet-ReaL") from None
    names = [re.search(r"ILSVRC2012_val_(\d{8})", source.describe(i)) for i in range(len(source))]
    if not all(names):
        raise ValueError(f"--real is for ImageNet's validation images; {source.describe(names.index(None))} is not "
                         "called ILSVRC2012_val_...")
    numbers = [int(name[1]) - 1 for name in names]
    if not isinstance(answers, list) or max(numbers) >= len(answers):
        raise ValueError(f"--real {path} holds no list of {max(numbers) + 1} or more entries, as {source.name} needs")
    answers = [answers[number] for number in numbers]
    if not any(answers):
        raise ValueError(f"--real {path} has no answer for any image of {source.name}")
    return answers


def class_columns(source, train, path: str) -> Tensor:
    """The number that each class of a test set has in training. They are read from `path`, a .npy array, or else
    matched by name; folders called 0, 1, 2, ... stand for the classes with these numbers. Raises ValueError."""
    if source.labels is None:
        raise ValueError(f"--test {source.unlabeled()}")
    n_train = int(train.labels.max()) + 1 if train.classes is None else len(train.classes)
    n_test = int(source.labels.max()) + 1 if source.classes is None else len(source.classes)
    if path not in ("", "auto"):
        try:
            columns = np.asarray(np.load(path)[:])  # fails for a .npz archive
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--test-classes {path} cannot be read ({error}); write it with numpy.save") from None
        if columns.ndim != 1 or columns.dtype.kind not in "iu" or len(columns) < n_test or not (
                0 <= columns.min() and columns.max() < n_train):
            raise ValueError(f"--test-classes {path} must hold, for each of the {n_test} classes of {source.name}, the "
                             f"number of a training class, 0 to {n_train - 1}")
        return torch.from_numpy(columns.astype(np.int64))
    if source.classes is None:
        columns = list(range(n_test))
    elif train.classes is not None and set(source.classes) <= set(train.classes):
        columns = [train.classes.index(name) for name in source.classes]
    elif not all(name.isdecimal() for name in train.classes or ["a name"]) and all(
            name.isdecimal() for name in source.classes):
        columns = [int(name) for name in source.classes]
    else:
        foreign = min(set(source.classes) - set(train.classes or []))
        raise ValueError(f"class {foreign!r} of {source.name} is not among the training classes; map its classes with "
                         "--test-classes")
    if max(columns) >= n_train:
        raise ValueError(f"{source.name} has a class {max(columns)}, but there are {n_train} training classes; map its "
                         "classes with --test-classes")
    return torch.tensor(columns)


# ----------------------------------------------------------------------------------------------------------------------
# The protocol


class Probe:
    """A grid of classifiers for an evaluation, its training, and its state for resuming; or the one of --head."""

    def __init__(self, e: Evaluation, n_classes: int):
        args, n_last = e.args, min(4, e.model.n_blocks)
        self.e, self.done, self.curve, self.replaced = e, 0, [], 0
        self.epoch = args.epoch_length or min(1250, max(50, len(e.train) // args.batch_size))
        self.steps = args.epochs * self.epoch
        if args.head:
            self.protocol = dict(head=args.head)
            self.grid = Grid.from_head(args.head, e.model.embed_dim, n_last, e.device)
            if self.grid.n_classes != n_classes:
                raise ValueError(f"{args.head} knows {self.grid.n_classes} classes, {e.train.name} has {n_classes}")
            return
        rates = [rate * args.batch_size / 256 for rate in args.learning_rates]
        self.grid = Grid(e.model.embed_dim, n_last, n_classes, rates, device=e.device, seed=args.seed)
        self.protocol = dict(
            features="cached: central crops, not augmented; not the official protocol" if args.cached else "augmented",
            batch_size=args.batch_size, steps=self.steps, epoch_length=self.epoch, learning_rates=args.learning_rates,
            crop_scale=args.crop_scale, flip_prob=args.flip_prob, seed=args.seed, chosen_on="--val", metric=args.metric)
        settings = [self.protocol, e.model_hash, data_hash(e.train), e.specs[1], e.crop, e.resize, args.dtype]
        self.head_path = Path(f"{e.stem}.linear_head{'_cached' * args.cached}.pth")
        refuse_inputs(self.head_path, args.checkpoint)
        self.saved = ResumeFile(f"{e.stem}.eval_linear", settings, not args.no_resume)

    def state(self) -> dict:
        return dict(values=self.grid.values, velocity=self.grid.velocity, done=self.done, curve=self.curve)

    def restore(self, state: dict) -> int:
        self.grid.values.copy_(state["values"])
        self.grid.velocity.copy_(state["velocity"])
        self.done, self.curve = state["done"], state["curve"]
        say(f"resuming after step {self.done} of {self.steps}, from {self.saved.path}")
        return self.done

    def predictions(self, source, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Grid.predict() for all images of a source, (n, J, 5), and which could be read, (n,)."""
        e, grid = self.e, self.grid
        columns = columns if columns is None else columns.to(e.device)
        table, ok = e.extract(source, lambda x: grid.predict(embed(e.model, grid.n_last, x), columns).flatten(1))
        return table.unflatten(1, (-1, 5)), ok

    def validate(self, cached=None) -> tuple[dict[str, Tensor], int]:
        """Accuracies of all classifiers on --val, and the number of the best, the first of equals."""
        e = self.e
        if cached:
            table, labels = cached
            predictions = torch.cat([self.grid.predict(part) for part in table.split(4096)])
        else:
            predictions, ok = self.predictions(e.val)
            if self.done in (0, self.steps):
                e.left_out[e.val.name] = count_left_out(e.val, e.val_labels, ok)
            predictions, labels = with_label(predictions, e.val_labels, ok)
        measured = label_accuracies(predictions, labels)
        return measured, int(measured["top1" if e.args.metric == "accuracy" else "mean_per_class"].argmax())

    def train(self) -> tuple[dict[str, Tensor], int]:
        """All steps, with a save after each epoch. Returns the final validate()."""
        e, cached = self.e, None
        if e.args.cached:
            n = self.grid.n_last
            what, model = f"last {n} cls, mean patch", partial(embed, e.model, n)
            table, labels = e.labeled(e.train, e.train_labels, what, model)
            cached = e.labeled(e.val, e.val_labels, what, model)
        self.saved.load(self.restore, self.state(), self.steps)
        batches = (from_table(e, table, labels, self.done, self.steps) if e.args.cached else
                   from_images(e, self, self.done, self.steps))
        with tqdm(total=self.steps, initial=self.done, desc="linear", leave=False, disable=no_bar()) as bar:
            for x, y in batches:
                self.grid.step(x, y, e.args.batch_size, 0.5 * (1 + math.cos(math.pi * self.done / self.steps)))
                self.done += 1
                bar.update()
                if self.done % self.epoch == 0 and self.done < self.steps:
                    measured, best = self.validate(cached)
                    self.curve.append((self.done, measured["top1"][best].item()))
                    bar.set_postfix_str(f"best top-1 on --val {self.curve[-1][1]:.2f} %")
                    self.saved.save(self.state())
        return self.validate(cached)


@torch.no_grad()
def evaluate_linear(e: Evaluation) -> tuple[dict, dict]:
    """The whole evaluation. Returns protocol and result."""
    args = e.args
    n_classes = len(e.train.classes) if e.train.classes is not None else int(e.train_labels.max()) + 1
    if int(e.val_labels.max()) >= n_classes:
        raise ValueError(f"{e.val.name} has a class {int(e.val_labels.max())}, {e.train.name} only 0 to "
                         f"{n_classes - 1}")
    real, tests = read_real(args.real, e.val) if args.real else [], []  # find mistakes before training
    for spec, classes in zip(args.test, args.test_classes or ["auto"] * len(args.test), strict=True):
        source, = e.open(spec)
        tests.append((spec, source, class_columns(source, e.train, classes)))
    probe = Probe(e, n_classes)
    measured, best = probe.validate() if args.head else probe.train()
    if probe.replaced:
        say(f"{e.train.name}: replaced an unreadable image by another one {probe.replaced} times")
    names = [Path(args.head).name] if args.head else probe.grid.names()
    of_best = lambda measured: {name: values[best].item() for name, values in measured.items()}  # noqa: E731
    result = of_best(measured) | dict(best_classifier=names[best])
    if not args.head:
        result |= dict(classifiers=dict(zip(names, measured["top1"].tolist())), curve=probe.curve)
        result["head"] = str(probe.head_path)
        save_on_rank_0(probe.head_path, probe.grid.head(best))
    if args.real:
        predictions, ok = probe.predictions(e.val)
        answers = [a if readable else [] for a, readable in zip(real, ok.tolist())]
        result["real"] = of_best(real_accuracies(predictions, answers))
    result["tests"] = {}
    for spec, source, columns in tests:
        predictions, ok = probe.predictions(source, columns)
        e.left_out[source.name] = count_left_out(source, source.labels, ok)
        result["tests"][spec] = of_best(label_accuracies(*with_label(predictions, source.labels, ok)))
    if not args.head:
        probe.saved.remove()
    return probe.protocol, result


# ----------------------------------------------------------------------------------------------------------------------
# Command


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = EvaluationParser(__doc__)
    add = parser.add_argument
    add("--cached", action="store_true", help="compute the features of center crops once and train on them without "
        "augmentation: takes minutes, but is not the official protocol")
    add("--batch-size", type=at_least(1), default=1024, help="global batch, over all processes")
    add("--epochs", type=at_least(1), default=10, help="after each, the best top-1 so far is shown and the state saved")
    add("--epoch-length", type=at_least(0), default=0, help="in steps; 0: one pass, at least 50, at most 1250")
    add("--learning-rates", type=positive, nargs="+", default=list(RATES), help="for batch 256")
    add("--metric", choices=("accuracy", "mean_per_class"), default="accuracy", help="selects the best classifier")
    add("--crop-scale", type=positive, nargs=2, default=[0.08, 1.0], help="range of the area of random "
        "crops, as a fraction of the image")
    add("--flip-prob", type=float, default=-1.0, help="of a flip; -1: as in the checkpoint's training, else 0.5")
    add("--seed", type=int, default=0, help="for the initial weights, the order and the crops")
    add("--head", default="", help="a linear head to evaluate instead of training one")
    add("--test", nargs="+", default=[], help="more labeled test images for the best head")
    add("--test-classes", nargs="+", default=[], help="for each --test, a .npy file with the number that each of its "
        "classes has in training, or `auto`: by name")
    add("--real", default="", help="real.json of ImageNet-ReaL, if --val is ImageNet's")
    add("--no-resume", action="store_true", help="start from scratch after an interruption")
    args = parser.parse_args(argv)
    if args.crop_scale[0] > args.crop_scale[1] or args.crop_scale[1] > 1:
        raise ValueError("--crop-scale must be two fractions of the image area, like 0.08 1")
    if not (args.flip_prob == -1 or 0 <= args.flip_prob <= 1):
        raise ValueError("--flip-prob must be from 0 to 1, or -1")
    if args.head and args.cached:
        raise ValueError("--head is evaluated on images; leave --cached out")
    if args.test_classes and len(args.test_classes) != len(args.test):
        raise ValueError(f"{len(args.test_classes)} --test-classes for {len(args.test)} --test; give one for each")
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    with Evaluation("linear", args, needs_val=True) as e:
        if args.batch_size < world()[1]:
            raise ValueError(f"--batch-size {args.batch_size} is less than one image for each of {world()[1]} "
                             "processes")
        args.flip_prob = e.config["flip_prob"] if args.flip_prob < 0 else args.flip_prob
        protocol, result = evaluate_linear(e)
        percent = lambda value: f"{value:.2f} %"  # noqa: E731
        title = "linear" + " (cached features)" * (args.cached and not args.head) + " top-1"
        columns = {title: percent(result["top1"]), "top-5": percent(result["top5"]),
                   "mean per class": percent(result["mean_per_class"]), result["best_classifier"]: ""}
        columns |= {"ReaL": percent(result["real"]["top1"])} if args.real else {}
        columns |= {} if args.head else {result["head"]: ""}
        e.report(protocol, result, columns | {spec: percent(r["top1"]) for spec, r in result["tests"].items()})
    return result


if __name__ == "__main__":
    run(main, interrupted="stopped; the same command continues from the last epoch",
        less_memory="lower --batch-size, or use --dtype bf16")
