"""Weighted k-NN classification with frozen features.

    python eval_knn.py out/ckpt.pth                                    # data and image size come from the checkpoint
    python eval_knn.py ckpt.pth --train /data/train --val /data/val    # other data
    python eval_knn.py dinov2_vits14 --train /data/train --val /data/val --dtype bf16 --cache /tmp/features
    python eval_knn.py ckpt.pth --n-per-class 1 5 --tries 3            # few-shot: with 1 or 5 training images per class
    torchrun --nproc-per-node 8 eval_knn.py ckpt.pth                   # 8 processes, same result

Protocol (Wu et al. 2018, arXiv 1805.01978, as in DINOv2): each of the k training images with the most similar
L2-normalized CLS feature votes for its class with weight exp(similarity / 0.07). The search is exact, in float32. Ties
go to the training image that comes first, and to the class with the lower number. With a single set, each image is
classified by all the others (leave-one-out). Unreadable and unlabeled images are left out. Prints top-1 accuracy and
appends a line with all results to CKPT.eval_knn.jsonl. Invalid input exits with code 2. Apache License 2.0.
"""
import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import MEAN, STD
from support.cli import at_least, positive, run
from support.evaluation import (
    Evaluation, EvaluationParser, accuracies, common_labels, count_left_out, extract_features, full_float32, no_bar,
    normalize_rows_, place_of_answer, with_label)
from support.parallel import world

KS = (10, 20, 100, 200)
KNN_SAMPLE = (200_000, 50_000)  # during training at most so many training images, and images to classify


# ----------------------------------------------------------------------------------------------------------------------
# Search


def largest(x: Tensor, k: int) -> Tensor:
    """Columns (Q, k) of the k largest entries in each row of x (Q, n), in no particular order.

    A tournament: split the columns into groups of four; the k largest entries lie in the k groups with the largest
    maxima. Three times as fast as topk on long rows.
    """
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
    """The k largest values (Q, k) in each row of (Q, n), descending, and their columns (Q, k). Of equal values the one
    in the lower column comes first."""
    columns = largest(similarity, min(k + 1, similarity.shape[1]))  # one more shows whether the last place is tied
    values, order = similarity.gather(1, columns).sort(descending=True)
    columns = columns.gather(1, order)
    for row in (values[:, 1:] == values[:, :-1]).any(1).nonzero()[:, 0]:
        x, least = similarity[row], values[row, k - 1]
        chosen = torch.cat([(x > least).nonzero()[:, 0], (x == least).nonzero()[:, 0]])[:k].sort().values
        values[row, :k], order = x[chosen].sort(descending=True, stable=True)
        columns[row, :k] = chosen[order]
    return values[:, :k], columns[:, :k]


# ----------------------------------------------------------------------------------------------------------------------
# Vote


@torch.inference_mode()
def knn_scores(bank: Tensor, labels: Tensor, queries: Tensor, ks=KS, temperature: float = 0.07, n_classes: int = 0,
               own_rows: Tensor | None = None, buffer: Tensor | None = None) -> dict[int, Tensor]:
    """Class scores {k: (Q, C)} of queries (Q, D), from training features `bank` (n, D) with labels (n,).

    Both sets of features are L2-normalized. The weights are a softmax over the neighbors for the largest k; smaller k
    use the first of them without renormalizing, which does not change the ranking. A k beyond the number of training
    images uses them all. `own_rows` (Q,): a row of the bank to leave out for each query. `buffer`, at least (Q, n),
    saves allocating the similarities.
    """
    n_neighbors = min(max(ks), len(bank) - (own_rows is not None))
    n_classes = n_classes or int(labels.max()) + 1
    similarity = torch.mm(queries, bank.T, out=None if buffer is None else buffer[: len(queries)])  # (Q, n)
    if own_rows is not None:
        similarity.scatter_(1, own_rows[:, None], -torch.inf)
    similarity, index = neighbors(similarity, n_neighbors)  # (Q, k)
    weights = F.softmax(similarity / temperature, dim=-1)
    votes = labels[index]  # (Q, k)
    no_votes = weights.new_zeros(len(queries), n_classes)
    return {k: no_votes.scatter_add(1, votes[:, :k], weights[:, :k]) for k in ks}


@full_float32()
def knn_accuracy(bank: Tensor, labels, queries: Tensor | None, query_labels=None, ks=KS,
                 temperature: float = 0.07, chunk: int = 0) -> dict[str, float]:
    """Accuracies in percent, {"top1_k10": ..., "top5_k10": ...}, of L2-normalized features; see knn_scores().

    `queries` None: leave-one-out on the bank. `chunk` queries are compared at a time; 0: 256, or as many as fit into
    256 MB. With a process group the queries are split over the ranks.
    """
    device, leave_one_out, (rank, n_ranks) = bank.device, queries is None, world()
    if leave_one_out and len(bank) < 2:
        raise ValueError("a single image has no neighbor to be classified by; give more images, or --val")
    labels = torch.as_tensor(labels, device=device).long()
    queries, answers = (bank, labels) if leave_one_out else (queries, torch.as_tensor(query_labels, device=device))
    n_classes = int(max(labels.max(), answers.max())) + 1
    chunk = min(chunk or max(1, min(256, 2**26 // len(bank))), len(queries))
    buffer = torch.empty(chunk, len(bank), device=device)
    places = torch.zeros(len(queries), len(ks), dtype=torch.int32, device=device)  # of the right class, 0 is first
    starts = range(rank * chunk, len(queries), n_ranks * chunk)
    for start in tqdm(starts, desc="k-NN", leave=False, disable=no_bar() if len(starts) > 100 else True):
        rows = torch.arange(start, min(start + chunk, len(queries)), device=device)
        scores = knn_scores(bank, labels, queries[rows], ks, temperature, n_classes, rows if leave_one_out else None,
                            buffer)
        places[rows] = torch.stack([place_of_answer(scores[k], answers[rows]) for k in ks], 1).int()
    if n_ranks > 1:
        dist.all_reduce(places)  # zero on all ranks but one
    percent = accuracies(places)
    return {f"top{t}_k{k}": percent[f"top{t}"][i].item() for i, k in enumerate(ks) for t in (1, 5)}


def few_shot_rows(labels: Tensor, n: int, attempt: int) -> Tensor:
    """Rows of n random images of each class, or all if there are fewer; the official choice for seed `attempt`."""
    generator = torch.Generator().manual_seed(attempt)
    labels = labels.cpu()
    rows = [(labels == c).nonzero()[:, 0] for c in labels.unique()]
    return torch.cat([r[torch.randperm(len(r), generator=generator)[:n]] for r in rows])


def few_shot(bank: Tensor, labels: Tensor, queries: Tensor, answers: Tensor, n: int, tries: int, ks=KS,
             temperature: float = 0.07) -> dict[str, float]:
    """knn_accuracy() with n training images per class, averaged over `tries` random choices; for n itself as k and for
    those of `ks` below it."""
    ks = sorted({k for k in (*ks, n) if k <= n})
    results = []
    for attempt in range(tries):
        rows = few_shot_rows(labels, n, attempt).to(bank.device)
        results.append(knn_accuracy(bank[rows], labels[rows], queries, answers, ks, temperature))
    return {name: sum(r[name] for r in results) / tries for name in results[0]}


def evaluate_knn(model: nn.Module, train_source, val_source, resize: int, crop: int, device: torch.device,
                 num_workers: int = 0, dtype: torch.dtype = torch.float32, ks=KS, temperature: float = 0.07, mean=MEAN,
                 std=STD) -> dict[str, float]:
    """knn_accuracy() of a model on two sources of images, as train.py calls it. `val_source` None: leave-one-out.
    Raises ValueError if a source has no labels."""
    sets = []
    for source, labels in zip((train_source, val_source), common_labels(train_source, val_source)):
        if source is not None:
            table, ok = extract_features(model, source, resize, crop, device, 256, num_workers, dtype, mean, std)
            count_left_out(source, labels, ok)
            sets += with_label(normalize_rows_(table), labels, ok)
    return knn_accuracy(*(sets + [None, None])[:4], ks, temperature)


# ----------------------------------------------------------------------------------------------------------------------
# Command


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = EvaluationParser(__doc__)
    parser.add_argument("--ks", type=at_least(1), nargs="+", default=list(KS), help="numbers of neighbors")
    parser.add_argument("--temperature", type=positive, default=0.07, help="of the vote weights")
    parser.add_argument("--n-per-class", type=at_least(1), nargs="+", default=[], help="few-shot: training images per "
                        "class")
    parser.add_argument("--tries", type=at_least(1), default=1, help="few-shot: random subsets to average over")
    args = parser.parse_args(argv)
    args.ks = sorted(set(args.ks))
    return args


def main(argv: list[str] | None = None) -> dict[str, float]:
    args = parse(argv)
    with Evaluation("knn", args) as e:
        if args.n_per_class and e.val is None:
            raise ValueError("--n-per-class needs images to classify; give --val")
        train, val = e.labeled(e.train, e.train_labels), (None, None)
        normalize_rows_(train[0])
        if e.val:
            val = e.labeled(e.val, e.val_labels)
            normalize_rows_(val[0])
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
