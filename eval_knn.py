"""Weighted k-NN classification with frozen features; and what the other evaluations share with it.

    python eval_knn.py out/ckpt.pth                                    # data and image size come from the checkpoint
    python eval_knn.py ckpt.pth --train /data/train --val /data/val    # other data
    python eval_knn.py dinov2_vits14 --train /data/train --val /data/val --dtype bf16 --cache /tmp/features
    python eval_knn.py ckpt.pth --n-per-class 1 5 --tries 3            # few-shot: k-NN from 1 or 5 images of a class
    torchrun --nproc-per-node 8 eval_knn.py ckpt.pth                   # 8 processes; the result is the same

Protocol (Wu et al. 2018, arXiv 1805.01978, as in DINOv2): L2-normalized CLS features; each of the k most similar
training images votes for its class with weight exp(similarity / 0.07). The search is exact, in float32. Of equally
similar images the first of the training set is the nearest; of classes with equal votes the one of lower number is
ranked higher. Without a second set the images of the first are classified by all others (leave one out). Images without
a label, and those that cannot be read, are left out. Prints top-1 and adds a line with all figures to
CKPT.eval_knn.jsonl beside the checkpoint. Wrong input: exit code 2. Apache License 2.0.
"""
import argparse
import contextlib
import datetime
import hashlib
import json
import os
import platform
import sys
import time
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from tqdm import tqdm

import hub
from data import (
    MEAN, STD, EvalImages, Parser, collate_images, eval_specs, normalize, make_loader, open_source, to_float,
    worker_count)
from hub import DTYPES, pick_device, write_file
from model import FORMAT

KS = (10, 20, 100, 200)


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


# ----------------------------------------------------------------------------------------------------------------------
# The vote


def largest(x: Tensor, k: int) -> Tensor:
    """Columns (Q, k) of the k largest entries of each row of x (Q, n), in no order. A tournament: the k largest lie in
    those k groups of four columns whose maxima are largest. Three times as fast as topk for long rows."""
    n = x.shape[1]
    quarter = n // 4
    if n <= 8 * k:
        return x.topk(k, sorted=False).indices
    winners = largest(x[:, : 4 * quarter].unflatten(1, (4, quarter)).amax(1), k)  # group g: columns g, g + n/4, ...
    columns = (winners[:, :, None] + quarter * torch.arange(4, device=x.device)).flatten(1)  # (Q, 4k)
    rest = torch.arange(4 * quarter, n, device=x.device).expand(len(x), -1)
    columns = torch.cat([columns, rest], 1)
    return columns.gather(1, x.gather(1, columns).topk(k, sorted=False).indices)


def neighbors(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of (Q, n): values (Q, k) in descending order, and their columns; equal ones in the
    order of the columns."""
    columns = largest(similarity, min(k + 1, similarity.shape[1]))  # one more, to see whether the last place is shared
    values, order = similarity.gather(1, columns).sort(descending=True)
    columns = columns.gather(1, order)
    for row in (values[:, 1:] == values[:, :-1]).any(1).nonzero()[:, 0]:
        x, least = similarity[row], values[row, k - 1]
        chosen = torch.cat([(x > least).nonzero()[:, 0], (x == least).nonzero()[:, 0]])[:k].sort().values
        values[row, :k], order = x[chosen].sort(descending=True, stable=True)
        columns[row, :k] = chosen[order]
    return values[:, :k], columns[:, :k]


@contextlib.contextmanager
def full_float32():
    """Products of float32 matrices without TF32's rounding to 10 bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.inference_mode()
def knn_scores(bank: Tensor, labels: Tensor, queries: Tensor, ks=KS, temperature: float = 0.07, n_classes: int = 0,
               own_rows: Tensor | None = None, buffer: Tensor | None = None) -> dict[int, Tensor]:
    """Class scores {k: (Q, C)} of queries (Q, D) from the training features `bank` (n, D) and their labels (n,).

    Both sets are L2-normalized. Weights are a softmax over the largest k's neighbors; a smaller k uses the first of
    them, not renormalized, which leaves the ranking as it is. `own_rows` (Q,) leaves that row of the bank out. A k
    beyond the number of neighbors counts them all. `buffer` (at least Q, n) saves allocating the similarities.
    """
    n_neighbors = min(max(ks), len(bank) - (own_rows is not None))
    n_classes = n_classes or int(labels.max()) + 1
    similarity = torch.mm(queries, bank.T, out=None if buffer is None else buffer[: len(queries)])  # (Q, n)
    if own_rows is not None:
        similarity.scatter_(1, own_rows[:, None], -torch.inf)
    similarity, index = neighbors(similarity, n_neighbors)
    weights = F.softmax(similarity / temperature, dim=-1)
    votes = labels[index]  # (Q, k)
    empty = weights.new_zeros(len(queries), n_classes)
    return {k: empty.scatter_add(1, votes[:, :k], weights[:, :k]) for k in ks}


def ranks(scores: Tensor, answers: Tensor) -> Tensor:
    """How many classes come before the right one, (Q,): those with a higher score (Q, C), and those with the same and a
    lower number."""
    own = scores.gather(1, answers[:, None])  # (Q, 1)
    before = torch.arange(scores.shape[1], device=scores.device) < answers[:, None]
    return ((scores > own) | (scores == own) & before).sum(1)


@full_float32()
def knn_accuracy(bank: Tensor, labels, queries: Tensor | None, query_labels=None, ks=KS,
                 temperature: float = 0.07, chunk: int = 0) -> dict[str, float]:
    """Percent of right answers, {"top1_k10": …, "top5_k10": …}. `queries` None: leave one out on the bank. `chunk`
    queries are compared at a time; 0: 256, or as many as fit a quarter of a gigabyte."""
    device, leave_one_out, (rank, n_ranks) = bank.device, queries is None, world()
    if leave_one_out and len(bank) < 2:
        raise ValueError("a single image has no neighbor to be classified by; give more, or --val")
    labels = torch.as_tensor(labels, device=device).long()
    queries, answers = (bank, labels) if leave_one_out else (queries, torch.as_tensor(query_labels, device=device))
    n_classes = int(max(labels.max(), answers.max())) + 1
    names = [f"top{t}_k{k}" for k in ks for t in (1, 5)]
    hits = dict(zip(names, torch.zeros(len(names), dtype=torch.int64, device=device)))
    chunk = min(chunk or max(1, min(256, 2**26 // len(bank))), len(queries))
    buffer = torch.empty(chunk, len(bank), device=device)
    starts = range(rank * chunk, len(queries), n_ranks * chunk)  # each process votes on a share
    for start in tqdm(starts, desc="k-NN", leave=False, disable=None if rank == 0 and len(starts) > 100 else True):
        rows = torch.arange(start, min(start + chunk, len(queries)), device=device)
        scores = knn_scores(bank, labels, queries[rows], ks, temperature, n_classes, rows if leave_one_out else None,
                            buffer)
        for k, score in scores.items():
            rank_of_right = ranks(score, answers[rows])
            for t in (1, 5):
                hits[f"top{t}_k{k}"] += (rank_of_right < t).sum()
    total = torch.stack(list(hits.values()))
    if n_ranks > 1:
        dist.all_reduce(total)
    return {name: 100 * n / len(queries) for name, n in zip(names, total.tolist())}


def few_shot_rows(labels: Tensor, n: int, attempt: int) -> Tensor:
    """Rows of n random images of each class (all, where there are fewer), by the seed `attempt`, as officially."""
    generator = torch.Generator().manual_seed(attempt)
    labels = labels.cpu()
    rows = [(labels == c).nonzero()[:, 0] for c in labels.unique()]
    return torch.cat([r[torch.randperm(len(r), generator=generator)[:n]] for r in rows])


def few_shot(bank: Tensor, labels: Tensor, queries: Tensor, answers: Tensor, n: int, tries: int, ks=KS,
             temperature: float = 0.07) -> dict[str, float]:
    """Accuracies of knn_accuracy with n training images per class, averaged over `tries` random choices. The k are
    those of `ks` up to n, and n itself."""
    ks = sorted({k for k in (*ks, n) if k <= n})
    results = []
    for attempt in range(tries):
        rows = few_shot_rows(labels, n, attempt).to(bank.device)
        results.append(knn_accuracy(bank[rows], labels[rows], queries, answers, ks, temperature))
    return {name: sum(r[name] for r in results) / tries for name in results[0]}


# ----------------------------------------------------------------------------------------------------------------------
# Features


@torch.no_grad()
def extract_features(model, source, resize: int, crop: int, device: torch.device, batch_size: int = 256,
                     num_workers: int = 0, dtype: torch.dtype = torch.float32, mean=MEAN,
                     std=STD) -> tuple[Tensor, Tensor]:
    """What `model` makes of all images of a source, in its order, (n, D) on `device`; and which of the images could be
    read, (n,) bool. The rows of others are zero.

    `model` maps normalized images (B, C, crop, crop) to (B, D), floating-point or int32; it runs under autocast
    to `dtype`. With a process group each process does every world-th batch and all get the full table, whose bits do
    not depend on the number of processes. Raises ValueError if a feature is not finite or no image can be read.
    """
    rank, n_ranks = world()
    batches = torch.arange(len(source)).split(batch_size)[rank::n_ranks]
    loader = make_loader(EvalImages(source, resize, crop, torch.cat(batches).tolist() if batches else []), num_workers,
                         batch_size=batch_size, pin_memory=device.type == "cuda", collate_fn=collate_images)
    table, state = None, torch.zeros(len(source), dtype=torch.int32, device=device)  # 1: readable, 2: not finite
    bar = tqdm(loader, desc=f"features of {source.name}", leave=False, disable=None if rank == 0 else True)
    for (images, ok), rows in zip(bar, batches):
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            features = model(normalize(to_float(images.to(device, non_blocking=True)), mean, std))
        features, ok = features.float() if features.is_floating_point() else features, ok.to(device)
        if table is None:
            table = features.new_zeros(len(source), features.shape[-1])
        table[rows[0] : rows[-1] + 1] = features * ok[:, None]
        state[rows[0] : rows[-1] + 1] = ok * (2 - features.isfinite().all(1).int())
    if n_ranks > 1:  # every row is zero but on one process, so the sum is exact
        shape = torch.tensor([0, 0] if table is None else [table.shape[1], table.is_floating_point()], device=device)
        dist.all_reduce(shape, dist.ReduceOp.MAX)
        if table is None:
            table = torch.zeros(len(source), int(shape[0]), dtype=torch.float32 if shape[1] else torch.int32,
                                device=device)
        dist.all_reduce(table)
        dist.all_reduce(state)
    if (wrong := (state == 2).nonzero()[:, 0]).numel():
        raise ValueError(f"the features of {len(wrong)} of the {len(source)} images of {source.name} are not finite, "
                         f"such as that of {source.describe(int(wrong[0]))}: the checkpoint has diverged, or half "
                         "precision is too coarse for it (--dtype fp32)")
    if not state.any():
        raise ValueError(f"no image of {source.name} can be read")
    return table, state > 0


def normalize_rows_(table: Tensor) -> Tensor:
    """L2-normalizes the rows in place, a part at a time: the table may fill most of the memory."""
    for part in table.split(2**14):
        part.copy_(F.normalize(part, dim=-1))
    return table


def kept(table: Tensor, labels, ok: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that could be read and have a label, and those labels, int64. Rows move up in the table itself, which
    may fill most of the memory. Raises ValueError if none is left."""
    labels = torch.as_tensor(np.asarray(labels), device=table.device).long()
    rows = (ok & (labels >= 0)).nonzero()[:, 0]
    if not len(rows):
        raise ValueError("no image that can be read has a label; evaluations need labeled images")
    if len(rows) == len(table):
        return table, labels
    for start in range(0, len(rows), 2**14):
        part = rows[start : start + 2**14]
        table[start : start + len(part)] = table[part]
    return table[: len(rows)], labels[rows]


def say_left_out(source, labels, ok: Tensor) -> int:
    bad, unlabeled = int((~ok).sum()), int((torch.as_tensor(np.asarray(labels)) < 0)[ok.cpu()].sum())
    for n, what in ((bad, "could not be read and were"), (unlabeled, "have no label and were")):
        if n and world()[0] == 0:
            print(f"{source.name}: {n} images {what} left out", file=sys.stderr)
    return bad + unlabeled


def evaluate(model: nn.Module, train_source, val_source, resize: int, crop: int, device: torch.device,
             num_workers: int = 0, dtype: torch.dtype = torch.float32, ks=KS, temperature: float = 0.07, mean=MEAN,
             std=STD) -> dict[str, float]:
    """k-NN accuracies of `model` in percent; `val_source` None: leave one out. Raises ValueError without labels."""
    sets = []
    for source, labels in zip((train_source, val_source), common_labels(train_source, val_source)):
        if source is not None:
            table, ok = extract_features(model, source, resize, crop, device, 256, num_workers, dtype, mean, std)
            say_left_out(source, labels, ok)
            sets += kept(normalize_rows_(table), labels, ok)
    return knn_accuracy(*(sets + [None, None])[:4], ks, temperature)


def common_labels(train_source, val_source) -> tuple:
    """The labels of both sources in the numbering of the first, whose folders may be more than those of the second.
    Raises ValueError for a source without labels, or with a class that the first does not have."""
    for source in (train_source, val_source):
        if source is not None and source.labels is None:
            raise ValueError(f"{source.name} has no labels, evaluations need one sub-folder per class, two at least; "
                             "name labeled images by --train and --val")
    if val_source is None:
        return train_source.labels, None
    if (train_source.classes is None) != (val_source.classes is None):
        raise ValueError(f"the classes of {val_source.name} cannot be compared with those of {train_source.name}: one "
                         "has names, the other numbers; choose two sets of a kind")
    if train_source.classes is None:
        return train_source.labels, val_source.labels
    if foreign := set(val_source.classes) - set(train_source.classes):
        raise ValueError(f"{val_source.name} has a class {min(foreign)!r} that {train_source.name} does not have")
    number = {name: i for i, name in enumerate(train_source.classes)}
    renumbered = np.array([*(number[name] for name in val_source.classes), -1])  # -1: no label
    return train_source.labels, renumbered[val_source.labels]


# ----------------------------------------------------------------------------------------------------------------------
# What all evaluations have in common: a checkpoint, two sets of images, a result


class Flags(Parser):
    """The command line that all evaluations share."""

    def __init__(self, manual: str):
        super().__init__(manual)
        self.add_argument("checkpoint", help="out/ckpt.pth, a released .pth, the name of a released model such as "
                          "dinov2_vits14, or a file of Hugging Face or timm")
        self.add_argument("--train", default="", help="labeled training images, named as train.py's --data")
        self.add_argument("--val", default="", help="labeled images to classify; empty: those that go with --train")
        self.add_argument("--resize", type=int, default=0, help="short side in pixels; 0: the evaluation's own")
        self.add_argument("--crop", type=int, default=0, help="central square, in pixels; 0: the evaluation's own")
        self.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
        self.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the backbone's arithmetic")
        self.add_argument("--num-workers", type=int, default=-1, help="reading processes; -1: by the number of cores")
        self.add_argument("--cache", default="", help="folder that keeps features for the next evaluation; empty: none")
        self.add_argument("--out", default="", help="results are added to this file; empty: beside the checkpoint")
        self.add_argument("--json", action="store_true", help="print the whole result as JSON, and nothing else")


class Evaluation:
    """A checkpoint and its labeled images, opened as the command line says; a process group under torchrun. To be used
    in a `with`. `margin`: images are resized to more than the crop, as 256 to 224, unless --resize says otherwise.
    Raises ValueError, with the fix in the message, for whatever does not fit."""

    def __init__(self, name: str, args: argparse.Namespace, margin: bool = True):
        self.name, self.args, self.began, self.left_out = name, args, time.time(), {}
        check_out(args.out)
        self.device, self.dtype = pick_device(args.device), DTYPES[args.dtype]
        self.path, ckpt = hub.read(args.checkpoint)
        self.model = hub.load(self.path, ckpt).to(self.device)
        self.ours, self.step = ckpt.get("format") == FORMAT, ckpt.get("step")
        self.config = hub.image_rules(self.model, ckpt) | (ckpt["config"] if self.ours else {})
        self.specs = self.choose_data()
        if args.num_workers < -1 or args.resize < 0 or args.crop < 0:
            raise ValueError("--num-workers must be -1 or more, --resize and --crop 0 or more")
        self.crop = args.crop or self.config["eval_crop"]
        if self.crop % self.model.patch_size:
            raise ValueError(f"--crop {self.crop} is no multiple of this model's patch size, {self.model.patch_size}")
        larger = self.config["eval_resize"] / self.config["eval_crop"] if margin else 1
        self.resize = args.resize or round(self.crop * larger)
        if self.resize < self.crop:
            raise ValueError(f"--resize {self.resize} leaves no square of --crop {self.crop}; make it as large")
        if args.cache and Path(args.cache).expanduser().is_file():
            raise ValueError(f"--cache {args.cache} is a file; name a folder")
        join_processes(self.device)
        self.workers = worker_count(args.num_workers, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self.train, self.val = [self.open(spec) if spec else None for spec in self.specs]
        self.train_labels, self.val_labels = common_labels(self.train, self.val)

    def choose_data(self) -> tuple[str, str | None]:
        """The specs of the training images and of those to classify."""
        args, config = self.args, self.config
        if not args.train and "data" not in config:
            raise ValueError(f"{args.checkpoint} does not say which data to use; give --train and --val")
        train, val = (eval_specs(args.train, args.train, args.val) if args.train else
                      eval_specs(config["data"], config["eval_train"], args.val or config["eval_val"]))
        if train == val:
            raise ValueError(f"--val is the same as --train, {train}; leave --val out, or name other images")
        return train, val

    def open(self, spec: str):
        try:
            return open_source(spec, self.config["in_chans"])
        except ValueError as error:
            raise ValueError(str(error).removeprefix("--data ")) from None

    def __enter__(self):
        return self

    def __exit__(self, kind, *error) -> None:
        leave_processes(kind is None)

    @cached_property
    def model_hash(self) -> str:
        return hub.weights_hash(self.model)

    def features(self, source, what: str = "cls", embed=None) -> tuple[Tensor, Tensor]:
        """extract_features() of a source by this checkpoint; from --cache, if they are there. `embed` maps images to
        features, and `what` is its name; as it is, the CLS features."""
        def make():
            return extract_features(embed or self.model, source, self.resize, self.crop, self.device, 256,
                                    self.workers, self.dtype, self.config["mean"], self.config["std"])

        if not self.args.cache:
            return make()
        model = self.model
        key = json.dumps([what, self.model_hash, model.num_heads, model.interpolate_offset, model.interpolate_antialias,
                          data_hash(source), self.resize, self.crop, self.args.dtype, *self.config["mean"],
                          *self.config["std"]])
        path = Path(self.args.cache).expanduser() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.pt"
        table, ok = load_table(path) or (None, None)
        found = torch.tensor([table is not None], device=self.device)
        if world()[1] > 1:
            dist.all_reduce(found, dist.ReduceOp.MIN)
        if found:
            return table.to(self.device), ok.to(self.device)
        table, ok = make()
        if world()[0] == 0 and ok.all():  # unreadable files may be mended
            try:
                write_file(path, lambda file: torch.save((table.cpu(), ok.cpu()), file))
            except ValueError as error:
                print(f"note: {error}; the features are used all the same", file=sys.stderr)
        return table, ok

    def labeled(self, source, labels, **options) -> tuple[Tensor, Tensor]:
        """Features and labels, without the images that have no label or cannot be read."""
        table, ok = self.features(source, **options)
        self.note_left_out(source, labels, ok)
        return kept(table, labels, ok)

    def note_left_out(self, source, labels, ok: Tensor) -> None:
        self.left_out[source.name] = say_left_out(source, labels, ok)

    def stem(self) -> Path:
        return results_stem(self.args, self.path)

    def report(self, protocol: dict, result: dict, columns: dict[str, str]) -> None:
        """Adds a line to the file of results and prints a one-line table, `columns`, or with --json that line."""
        if world()[0]:
            return
        path = Path(self.args.out) if self.args.out else Path(f"{self.stem()}.eval_{self.name}.jsonl")
        record = dict(
            evaluation=self.name, protocol=protocol | dict(resize=self.resize, crop=self.crop, dtype=self.args.dtype),
            data={what: dict(spec=spec, images=len(source)) for what, spec, source in
                  zip(("train", "val"), self.specs, (self.train, self.val)) if spec},
            left_out=self.left_out, result=result,
            model=dict(checkpoint=self.args.checkpoint, sha256=self.model_hash, step=self.step))
        add_record(path, record, columns, self.args.json, self.device, self.began)


def check_out(out: str) -> None:
    if out:
        there = os.path.exists(out)
        try:
            Path(out).open("a").close()
        except OSError as error:
            raise ValueError(f"--out {out} cannot be written: {error.strerror}") from None
        if not there:
            os.remove(out)


def results_stem(args: argparse.Namespace, path: str) -> Path:
    """Where results go, but for the suffix: as --out says, else beside the checkpoint, or, of a released model by name,
    here."""
    if args.out:
        return Path(args.out).with_suffix("")
    return Path(path).with_suffix("") if Path(args.checkpoint).exists() else Path(args.checkpoint)


def add_record(path: Path, record: dict, columns: dict[str, str], as_json: bool, device, began: float) -> None:
    """Adds a line to a file of results, with versions, device and time, and prints `columns`, or that line as JSON."""
    record |= dict(
        versions=dict(torch=torch.__version__, torchvision=torchvision.__version__, python=platform.python_version()),
        device=str(device), processes=world()[1], seconds=round(time.time() - began, 1),
        time=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"))
    print(json.dumps(record, indent=1) if as_json else
          " | ".join([*(f"{k} {v}".strip() for k, v in columns.items()), str(path)]))
    try:
        with open(path, "a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        print(f"{path} could not be written: {error.strerror}", file=sys.stderr)


def join_processes(device: torch.device) -> None:
    """The process group of torchrun, where that has started this process."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ:  # some processes may take much longer than others, as reading goes
        dist.init_process_group(device_id=device if device.type == "cuda" else None,
                                timeout=datetime.timedelta(hours=2))


def leave_processes(in_peace: bool) -> None:
    if dist.is_initialized():
        if in_peace:
            dist.barrier()
        dist.destroy_process_group()


def data_hash(source) -> str:
    """SHA-256 of what a source lists and of 64 of its images, evenly spread."""
    digest = hashlib.sha256(f"{source.fingerprint} {len(source)} {source.channels}".encode())
    for i in range(0, len(source), -(-len(source) // 64)):
        with contextlib.suppress(Exception):  # decoders raise all sorts on damaged files
            digest.update(source.image(i).contiguous().numpy())
    return digest.hexdigest()


def load_table(path: Path) -> tuple[Tensor, Tensor] | None:
    """Features and which are valid, as they were written; None if there is no such file, or if it is damaged."""
    try:
        table, ok = torch.load(path, map_location="cpu", weights_only=True)
        return table, ok
    except FileNotFoundError:
        return None
    except Exception:  # a damaged file can fail in any way
        print(f"{path} is damaged; its features are computed anew", file=sys.stderr)
        return None


# ----------------------------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    flags = Flags(__doc__)
    flags.add_argument("--ks", type=int, nargs="+", default=list(KS), help="numbers of neighbors")
    flags.add_argument("--temperature", type=float, default=0.07, help="of the votes")
    flags.add_argument("--n-per-class", type=int, nargs="+", default=[], help="few-shot: so many images of each class")
    flags.add_argument("--tries", type=int, default=1, help="few-shot: random choices to average over")
    args = flags.parse_args(argv)
    if min(args.ks) < 1 or not args.temperature > 0 or min(args.n_per_class, default=1) < 1 or args.tries < 1:
        raise ValueError("--ks, --temperature, --n-per-class and --tries must be positive")
    args.ks = sorted(set(args.ks))
    return args


def main(argv: list[str] | None = None) -> dict[str, float]:
    args = parse(argv)
    with Evaluation("knn", args) as e:
        if args.n_per_class and e.val is None:
            raise ValueError("--n-per-class needs images to classify; give --val")
        train = e.labeled(e.train, e.train_labels)
        val = e.labeled(e.val, e.val_labels) if e.val else (None, None)
        for table in (train[0], val[0]):
            if table is not None:
                normalize_rows_(table)
        result = knn_accuracy(*train, *val, tuple(args.ks), args.temperature)
        columns = {f"k={k}" if k < len(train[0]) else f"k={k} (all)": f"{result[f'top1_k{k}']:.2f} %" for k in args.ks}
        for n in args.n_per_class:
            shots = few_shot(*train, *val, n, args.tries, tuple(args.ks), args.temperature)
            result |= {f"{name}_n{n}": value for name, value in shots.items()}
            columns[f"{n} per class, k={n}"] = f"{shots[f'top1_k{n}']:.2f} %"
        protocol = dict(temperature=args.temperature, ks=args.ks, leave_one_out=e.val is None,
                        n_per_class=args.n_per_class, tries=args.tries)
        e.report(protocol, result, {f"k-NN top-1{'' if e.val else ' (leave one out)'}": ""} | columns)
    return result


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except ValueError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
