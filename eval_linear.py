"""Linear classification of frozen features, by the whole grid of classifiers at once.

    python eval_linear.py out/ckpt.pth                                  # data and image size come from the checkpoint
    python eval_linear.py out/ckpt.pth --cached                         # a shortcut: features once, no augmentation
    python eval_linear.py dinov2_vits14 --train /data/train --val /data/val --dtype bf16
    torchrun --nproc-per-node 8 eval_linear.py ckpt.pth                 # the batch is shared out over 8 processes
    python eval_linear.py ckpt.pth --head ckpt.linear_head.pth --test /data/sketch      # a head that is there already

Protocol (DINOv2): random resized crops, mirrored; the last 1 or 4 CLS tokens, with or without the mean patch token;
13 learning rates, times batch / 256; SGD with momentum 0.9 on a cosine, batches of 1024, 10 epochs of 1250 steps.
Smaller sets than ImageNet-1k have shorter epochs: one pass, or 50 steps if that is more. All 52 classifiers are trained
by one matrix product per input; the one that is best on --val is the result, as officially, and is written to
CKPT.linear_head.pth (CKPT.linear_head_cached.pth) in the layout of the released heads, which hub.load_classifier reads.
Interrupted, the same command goes on from the last epoch. Adds a line with all figures to CKPT.eval_linear.jsonl. Wrong
input: exit code 2. Apache License 2.0.
"""
import argparse
import hashlib
import json
import math
import random
import re
import sys
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import Prefetcher, cut_crop, normalize, read_sample, to_float, train_loader, widen
from hub import read_head
from model import read_checkpoint
from support.evaluation import Evaluation, Flags, data_hash, extract_features, full_float32, kept
from support.parallel import world
from support.run import write_file

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)  # of a batch of 256


# ----------------------------------------------------------------------------------------------------------------------
# The classifiers


class Grid:
    """Linear classifiers on the embeddings (B, (L+1)*D) of `embed`: CLS tokens of the last L blocks, mean patch token.
    For each kind, n last blocks with or without the mean patch, there is one for each of R learning rates.

    What a kind takes are adjacent columns of the embedding, and a kind is one matrix product: `weights[kind]` (R*C,
    width), `biases[kind]` (R*C, 1). All are views of one flat tensor, `values`, as are their gradients and velocities.
    """

    def __init__(self, dim: int, n_last: int, n_classes: int, rates, kinds=None, device="cpu", seed: int = 0):
        self.kinds = kinds or [(n, pool) for n in sorted({1, n_last}) for pool in (False, True)]
        self.n_last, self.dim, self.n_classes, self.rates = n_last, dim, n_classes, list(rates)
        self.inputs = [slice((n_last - n) * dim, (n_last + pool) * dim) for n, pool in self.kinds]
        rows = len(self.rates) * n_classes
        shapes = [(rows, s.stop - s.start) for s in self.inputs] + [(rows, 1)] * len(self.kinds)
        generator = torch.Generator().manual_seed(seed)
        parts = [torch.randn(shape, generator=generator) * (0.01 if shape[1] > 1 else 0.0) for shape in shapes]
        self.values = torch.cat([part.flatten() for part in parts]).to(device)
        self.gradient, self.velocity = torch.empty_like(self.values), torch.zeros_like(self.values)
        split = lambda flat: [part.view(shape) for part, shape in zip(  # noqa: E731
            flat.split([math.prod(shape) for shape in shapes]), shapes)]
        self.parts = list(zip(split(self.values), split(self.gradient), split(self.velocity)))
        self.weights, self.biases = ([part[0] for part in parts] for parts in (
            self.parts[: len(self.kinds)], self.parts[len(self.kinds) :]))
        self.row_rates = torch.tensor(self.rates, device=device).repeat_interleave(n_classes)[:, None]  # (R*C, 1)

    def names(self) -> list[str]:
        """The official names, kind by kind; with more digits where rates are too small for these."""
        rates = [f"{rate:.5f}" for rate in self.rates]
        rates = rates if len(set(rates)) == len(rates) else [f"{rate:.3e}" for rate in self.rates]
        return [f"classifier_{n}_blocks_avgpool_{pool}_lr_{rate}".replace(".", "_")
                for n, pool in self.kinds for rate in rates]

    def logits(self, x: Tensor):
        """For each kind, (B, R, C), in float32 whatever the backbone computes in."""
        for columns, weight, bias in zip(self.inputs, self.weights, self.biases):
            with torch.autocast(x.device.type, enabled=False):
                scores = torch.addmm(bias[:, 0], x[:, columns], weight.T)
            yield scores.unflatten(1, (len(self.rates), self.n_classes))

    @full_float32()
    def step(self, x: Tensor, labels: Tensor, batch_size: int, factor: float) -> Tensor:
        """A step of SGD with momentum, at `factor` times the learning rates, on the mean cross-entropy over the
        `batch_size` images of all processes, of which these are x (B, (L+1)*D) and labels (B,). Returns the losses
        (kinds, R), summed over these images, divided by batch_size."""
        losses, kinds = [], len(self.kinds)
        right = labels[:, None, None].expand(-1, len(self.rates), 1)
        for columns, p, weight, bias in zip(self.inputs, self.logits(x), self.parts, self.parts[kinds:]):
            p -= p.amax(2, keepdim=True)
            own = p.gather(2, right)[..., 0]
            total = p.exp_().sum(2, keepdim=True)
            losses.append((total[..., 0].log() - own).sum(0) / batch_size)
            p /= total * batch_size
            p.scatter_add_(2, right, p.new_full((1, 1, 1), -1 / batch_size).expand_as(right))
            p = p.flatten(1)  # (B, R*C), the gradient of the mean loss
            torch.mm(p.T, x[:, columns], out=weight[1])
            torch.sum(p, 0, out=bias[1][:, 0])
        if world()[1] > 1:
            dist.all_reduce(self.gradient)
        self.velocity.mul_(0.9).add_(self.gradient)
        for value, _, velocity in self.parts:
            value.addcmul_(velocity, self.row_rates, value=-factor)
        return torch.stack(losses)

    @full_float32()
    def predict(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        """The five most likely classes of each classifier, kind by kind, (B, kinds*R, 5) int32; -1 where there are not
        so many. `columns` are the classes to choose from; the answer then is a place in that list."""
        best = []
        for scores in self.logits(x):
            scores = scores if columns is None else scores[..., columns]
            best.append(scores.topk(min(5, scores.shape[-1])).indices.int())
        best = torch.cat(best, 1)
        return F.pad(best, (0, 5 - best.shape[2]), value=-1)

    def head(self, j: int) -> dict[str, Tensor]:
        """Classifier j as a released head: weight (C, (1+n)*D) on n CLS tokens and the mean patch token, bias (C,). One
        that does without the patches has zeros there."""
        kind, rate = divmod(j, len(self.rates))
        rows = slice(rate * self.n_classes, (rate + 1) * self.n_classes)
        n, weight = self.kinds[kind][0], self.weights[kind][rows]
        weight = F.pad(weight, (0, (1 + n) * self.dim - weight.shape[1]))
        return dict(weight=weight.cpu().clone(), bias=self.biases[kind][rows, 0].cpu().clone())

    @classmethod
    def from_head(cls, path: str, dim: int, most: int, device) -> "Grid":
        """The one classifier of a released head, or of one that was trained here, on 1 or `most` CLS tokens. Raises
        ValueError."""
        weight, bias, layers = read_head(path, dim, most)
        grid = cls(dim, layers, len(weight), [0.0], [(layers, True)], device)
        grid.values.copy_(torch.cat([weight.flatten(), bias]))
        return grid


def embed(model, n_last: int, images: Tensor) -> Tensor:
    """Normalized images -> (B, (n_last+1)*D) float32: the normalized CLS tokens of the last blocks, in ascending order,
    and the mean of the last one's patch tokens."""
    outs = model.get_intermediate_layers(images, n_last, return_class_token=True)
    return torch.cat([cls for _, cls in outs] + [outs[-1][0].mean(1)], -1).float()


# ----------------------------------------------------------------------------------------------------------------------
# What they are trained on


class ProbeBatches(torch.utils.data.Dataset):
    """batches[step] -> this process's crops (b, C, size, size) as uint8 or uint16, their labels (b,), and how many
    images could not be read and were replaced. Random resized crops, mirrored: a pure function of the step and the
    seed; the batch as a whole does not depend on `world`."""

    accumulation_steps = 1  # for train_loader

    def __init__(self, source, labels, batch_size: int, crop: int, scale, flip_prob: float, seed: int = 0,
                 rank: int = 0, world: int = 1):
        self.source, self.labels, self.batch_size, self.seed = source, labels, batch_size, seed
        self.crop, self.scale, self.flip_prob = crop, scale, flip_prob
        self.share = range(batch_size * rank // world, batch_size * (rank + 1) // world)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, int]:
        crops, labels, bad = [], [], []
        for s in (step * self.batch_size + i for i in self.share):
            i, image = read_sample(self.source, s, self.seed, bad, self.labels)
            rng = random.Random(f"{self.seed}/probe/{s}")
            crop = cut_crop(rng, image, self.crop, self.scale).permute(2, 0, 1)
            crops.append(crop.flip(2) if rng.random() < self.flip_prob else crop)
            labels.append(int(self.labels[i]))
        if any(c.dtype == torch.uint16 for c in crops):
            crops = [widen(c) if c.dtype == torch.uint8 else c for c in crops]
        return torch.stack(crops), torch.tensor(labels), len(bad)


def from_images(e: Evaluation, probe, start: int, stop: int):
    """(embeddings, labels) of this process's share of each step. Counts in probe.replaced what could not be read."""
    args, (rank, n_ranks) = e.args, world()
    batches = ProbeBatches(e.train, e.train_labels, args.batch_size, e.crop, args.crop_scale, args.flip_prob, args.seed,
                           rank, n_ranks)
    loader = train_loader(batches, start, stop, e.workers, e.device.type == "cuda")

    def prepare(batch):
        images, labels = (t.to(e.device, non_blocking=True) for t in batch[:2])
        return normalize(to_float(images), e.config["mean"], e.config["std"]), labels, batch[2]

    for images, labels, bad in Prefetcher(loader, prepare, e.device):
        probe.replaced += bad
        with torch.autocast(e.device.type, dtype=e.dtype, enabled=e.dtype != torch.float32):
            x = embed(e.model, probe.grid.n_last, images)
        yield x, labels


def from_table(e: Evaluation, table: Tensor, labels: Tensor, start: int, stop: int):
    """The same from features that are there already: each image once per pass, in random order."""
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
# Metrics, of predictions (n, J, 5) by J classifiers


def accuracies(predictions: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """In percent: top1 and top5 (J,); mean_per_class (J,), top-1 averaged over the classes that occur."""
    labels = labels.cpu()
    hits = predictions.cpu() == labels[:, None, None]
    first = hits[:, :, 0].double()  # (n, J)
    classes, number, count = labels.unique(return_inverse=True, return_counts=True)
    per_class = first.new_zeros(len(classes), first.shape[1]).index_add_(0, number, first) / count[:, None]
    return dict(top1=100 * first.mean(0), top5=100 * hits.any(2).double().mean(0),
                mean_per_class=100 * per_class.mean(0))


def real_accuracies(predictions: Tensor, answers: list[list[int]]) -> dict[str, Tensor]:
    """Of images with several right answers, or none, which are left out (ImageNet-ReaL, Beyer et al. 2020, arXiv
    2006.07159): in percent, how often the first, or one of the first five, is among them."""
    hits = torch.stack([torch.isin(p, torch.tensor(a, dtype=p.dtype))
                        for p, a in zip(predictions.cpu(), answers) if len(a)])  # (n, J, 5)
    return dict(top1=100 * hits[:, :, 0].double().mean(0), top5=100 * hits.any(2).double().mean(0))


def read_real(path: str, source) -> list[list[int]]:
    """The answers of real.json, whose entry i is for ILSVRC2012_val_{i+1:08d}, for each image of ImageNet's VAL."""
    try:
        answers = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--real {path} cannot be read ({error}); it is real.json of ImageNet-ReaL") from None
    names = [re.search(r"ILSVRC2012_val_(\d{8})", source.describe(i)) for i in range(len(source))]
    if not all(names):
        raise ValueError(f"--real is for ImageNet's validation images; {source.describe(names.index(None))} is not "
                         "called ILSVRC2012_val_…")
    numbers = [int(name[1]) - 1 for name in names]
    if not isinstance(answers, list) or max(numbers) >= len(answers):
        raise ValueError(f"--real {path} holds no list of {max(numbers) + 1} entries or more, as {source.name} needs")
    answers = [answers[number] for number in numbers]
    if not any(answers):
        raise ValueError(f"--real {path} has no answer for any image of {source.name}")
    return answers


def class_columns(source, train, path: str) -> Tensor:
    """Which of the classes that were trained the classes of a test set are: by the file, an array of numbers; else by
    name; and folders called 0, 1, 2, … mean the class of that number. Raises ValueError."""
    if source.labels is None:
        raise ValueError(f"{source.name} has no labels; --test needs one sub-folder per class")
    n_train = int(train.labels.max()) + 1 if train.classes is None else len(train.classes)
    n_test = int(source.labels.max()) + 1 if source.classes is None else len(source.classes)
    if path not in ("", "auto"):
        try:
            columns = np.asarray(np.load(path)[:])  # of an archive, that fails
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--test-classes {path} cannot be read ({error}); write it with numpy.save") from None
        if columns.ndim != 1 or columns.dtype.kind not in "iu" or len(columns) < n_test or not (
                0 <= columns.min() and columns.max() < n_train):
            raise ValueError(f"--test-classes {path} must hold, for each of the {n_test} classes of {source.name}, the "
                             f"number of a class that was trained, 0 to {n_train - 1}")
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
        by_name = " by that name" * (train.classes is None)
        raise ValueError(f"class {foreign!r} of {source.name} was not trained{by_name}; map its classes by "
                         "--test-classes")
    if max(columns) >= n_train:
        raise ValueError(f"{source.name} has a class {max(columns)}, there are {n_train} that were trained; map its "
                         "classes by --test-classes")
    return torch.tensor(columns)


# ----------------------------------------------------------------------------------------------------------------------
# The protocol


class Probe:
    """The training of a grid, with what it needs to go on after an interruption."""

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
        key = json.dumps([self.protocol, e.model_hash, data_hash(e.train), e.specs[1], e.crop, e.resize, args.dtype])
        self.path = Path(f"{e.stem()}.eval_linear.{hashlib.sha256(key.encode()).hexdigest()[:8]}.resume")

    def resume(self) -> None:
        if self.path.exists() and not self.e.args.no_resume:
            try:
                state = read_checkpoint(str(self.path))
                values, velocity, done, curve = (state[k] for k in ("values", "velocity", "done", "curve"))
                if values.shape == velocity.shape == self.grid.values.shape:
                    self.grid.values.copy_(values)
                    self.grid.velocity.copy_(velocity)
                    self.done, self.curve = done, curve
                self.say(f"goes on after step {self.done} of {self.steps}, from {self.path}")
            except (ValueError, KeyError, RuntimeError):
                self.say(f"{self.path} is damaged; the classifiers are trained from the start")
        done = torch.tensor([self.done, -self.done], device=self.e.device)
        if world()[1] > 1:
            dist.all_reduce(done, dist.ReduceOp.MIN)
        if done[0] != -done[1]:
            raise ValueError(f"not all processes see {self.path}; use a folder that all machines share, or --no-resume")

    def save(self) -> None:
        self.write(self.path, dict(values=self.grid.values, velocity=self.grid.velocity, done=self.done,
                                   curve=self.curve))

    def write(self, path: Path, state: dict) -> None:
        """On rank 0, which goes on if the disk refuses: the others wait for it."""
        if world()[0] == 0:
            try:
                write_file(path, partial(torch.save, state))
            except ValueError as error:
                self.say(f"note: {error}; the evaluation goes on")

    def say(self, text: str) -> None:
        if world()[0] == 0:
            tqdm.write(text, file=sys.stderr)

    def predictions(self, source, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Of all classifiers, (n, J, 5), for all images of a source; and which could be read."""
        e, grid = self.e, self.grid
        columns = columns if columns is None else columns.to(e.device)
        table, ok = extract_features(lambda x: grid.predict(embed(e.model, grid.n_last, x), columns).flatten(1), source,
                                     e.resize, e.crop, e.device, 256, e.workers, e.dtype, e.config["mean"],
                                     e.config["std"])
        return table.unflatten(1, (-1, 5)), ok

    def validate(self, cached=None) -> tuple[dict[str, Tensor], int]:
        """Metrics of all classifiers on --val, and the first of the best."""
        if cached:
            table, labels = cached
            predictions = torch.cat([self.grid.predict(part) for part in table.split(4096)])
        else:
            predictions, ok = self.predictions(self.e.val)
            if self.done in (0, self.steps):
                self.e.note_left_out(self.e.val, self.e.val_labels, ok)
            predictions, labels = kept(predictions, self.e.val_labels, ok)
        metrics = accuracies(predictions, labels)
        return metrics, int(metrics["top1" if self.e.args.metric == "accuracy" else "mean_per_class"].argmax())

    def train(self) -> tuple[dict[str, Tensor], int]:
        """All steps. Metrics of all classifiers on --val after the last, and which is the best."""
        e, cached = self.e, None
        if e.args.cached:
            n = self.grid.n_last
            options = dict(what=f"last {n} cls, mean patch", embed=partial(embed, e.model, n))
            table, labels = e.labeled(e.train, e.train_labels, **options)
            cached = e.labeled(e.val, e.val_labels, **options)
        self.resume()
        source = (from_table(e, table, labels, self.done, self.steps) if e.args.cached else
                  from_images(e, self, self.done, self.steps))
        with tqdm(total=self.steps, initial=self.done, desc="linear", leave=False,
                  disable=None if world()[0] == 0 else True) as bar:
            for x, y in source:
                self.grid.step(x, y, e.args.batch_size, 0.5 * (1 + math.cos(math.pi * self.done / self.steps)))
                self.done += 1
                bar.update()
                if self.done % self.epoch == 0 and self.done < self.steps:
                    metrics, best = self.validate(cached)
                    self.curve.append((self.done, metrics["top1"][best].item()))
                    bar.set_postfix_str(f"best top-1 on --val {self.curve[-1][1]:.2f} %")
                    self.save()
        return self.validate(cached)


@torch.no_grad()
def run(e: Evaluation) -> tuple[dict, dict]:
    """The whole evaluation: protocol and result."""
    args = e.args
    n_classes = len(e.train.classes) if e.train.classes is not None else int(e.train_labels.max()) + 1
    if int(e.val_labels.max()) >= n_classes:
        raise ValueError(f"{e.val.name} has a class {int(e.val_labels.max())}, {e.train.name} only 0 to "
                         f"{n_classes - 1}")
    real, tests = read_real(args.real, e.val) if args.real else [], []  # mistakes show before the training
    for spec, classes in zip(args.test, args.test_classes or ["auto"] * len(args.test), strict=True):
        source = e.open(spec)
        tests.append((spec, source, class_columns(source, e.train, classes)))
    probe = Probe(e, n_classes)
    metrics, best = probe.validate() if args.head else probe.train()
    if probe.replaced:
        probe.say(f"{e.train.name}: {probe.replaced} times another image took the place of one that could not be read")
    names = [Path(args.head).name] if args.head else probe.grid.names()
    result = {name: values[best].item() for name, values in metrics.items()} | dict(best_classifier=names[best])
    if not args.head:
        result |= dict(classifiers=dict(zip(names, metrics["top1"].tolist())), curve=probe.curve)
        result["head"] = f"{e.stem()}.linear_head{'_cached' * args.cached}.pth"
        probe.write(Path(result["head"]), probe.grid.head(best))
    if args.real:
        predictions, ok = probe.predictions(e.val)
        answers = [a if good else [] for a, good in zip(real, ok.tolist())]
        result["real"] = {k: v[best].item() for k, v in real_accuracies(predictions, answers).items()}
    result["tests"] = {}
    for spec, source, columns in tests:
        predictions, ok = probe.predictions(source, columns)
        e.note_left_out(source, source.labels, ok)
        measured = accuracies(*kept(predictions, source.labels, ok))
        result["tests"][spec] = {k: v[best].item() for k, v in measured.items()}
    if world()[0] == 0 and not args.head:
        probe.path.unlink(missing_ok=True)
    return probe.protocol, result


def parse(argv: list[str] | None) -> argparse.Namespace:
    flags = Flags(__doc__)
    flags.add_argument("--cached", action="store_true", help="a shortcut of minutes, without augmentation: features of "
                       "central crops are computed once; not the official protocol")
    flags.add_argument("--batch-size", type=int, default=1024, help="of all processes")
    flags.add_argument("--epochs", type=int, default=10, help="the best classifier so far is shown after each")
    flags.add_argument("--epoch-length", type=int, default=0, help="steps; 0: a pass, at least 50, at most 1250")
    flags.add_argument("--learning-rates", type=float, nargs="+", default=list(RATES), help="of a batch of 256")
    flags.add_argument("--metric", choices=("accuracy", "mean_per_class"), default="accuracy", help="to choose by")
    flags.add_argument("--crop-scale", type=float, nargs=2, default=[0.08, 1.0], help="share of the image's area")
    flags.add_argument("--flip-prob", type=float, default=-1.0, help="of mirroring; -1: that of the training, or 0.5")
    flags.add_argument("--seed", type=int, default=0, help="of the first weights, the order and the crops")
    flags.add_argument("--head", default="", help="a linear head to evaluate instead of training one")
    flags.add_argument("--test", nargs="+", default=[], help="further labeled images to classify by the chosen head")
    flags.add_argument("--test-classes", nargs="+", default=[], help="for each --test, a .npy file with the number "
                       "that each of its classes had in training, or `auto`: by name")
    flags.add_argument("--real", default="", help="real.json of ImageNet-ReaL, for ImageNet's --val")
    flags.add_argument("--no-resume", action="store_true", help="start anew after an interruption")
    args = flags.parse_args(argv)
    if min(args.batch_size, args.epochs, *args.learning_rates) <= 0 or args.epoch_length < 0:
        raise ValueError("--batch-size, --epochs and --learning-rates must be positive, --epoch-length 0 or more")
    if not 0 < args.crop_scale[0] <= args.crop_scale[1] <= 1 or not (
            args.flip_prob == -1 or 0 <= args.flip_prob <= 1):
        raise ValueError("--crop-scale must be two shares of the image, as 0.08 1; --flip-prob one from 0 to 1, or -1")
    if args.head and args.cached:
        raise ValueError("--head is evaluated on images; leave --cached out")
    if args.test_classes and len(args.test_classes) != len(args.test):
        raise ValueError(f"{len(args.test_classes)} --test-classes for {len(args.test)} --test; give one for each")
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    with Evaluation("linear", args) as e:
        if e.val is None:
            raise ValueError(f"{e.specs[0]} comes without images to classify; name them by --val")
        if args.batch_size < world()[1]:
            raise ValueError(f"--batch-size {args.batch_size} is less than an image for each of {world()[1]} processes")
        args.flip_prob = e.config["flip_prob"] if args.flip_prob < 0 else args.flip_prob
        protocol, result = run(e)
        title = "linear" + " (cached features)" * (args.cached and not args.head) + " top-1"
        columns = {title: f"{result['top1']:.2f} %", "top-5": f"{result['top5']:.2f} %",
                   "mean per class": f"{result['mean_per_class']:.2f} %", result["best_classifier"]: ""}
        columns |= {"ReaL": f"{result['real']['top1']:.2f} %"} if args.real else {}
        columns |= {} if args.head else {result["head"]: ""}
        e.report(protocol, result, columns | {spec: f"{r['top1']:.2f} %" for spec, r in result["tests"].items()})
    return result


if __name__ == "__main__":
    run(main, interrupted="stopped; the same command goes on from the last epoch")
