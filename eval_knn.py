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

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import MEAN, STD
from support.cli import run
from support.evaluation import (
    Evaluation, Flags, common_labels, extract_features, full_float32, kept, normalize_rows_, ranks, say_left_out)
from support.parallel import world

KS = (10, 20, 100, 200)


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


# ----------------------------------------------------------------------------------------------------------------------
# What all evaluations have in common: a checkpoint, two sets of images, a result


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
    run(main)
