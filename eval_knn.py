"""Weighted k-NN classification with frozen features, the evaluation that needs no training.

    python eval_knn.py out/ckpt.pth                                    # data and image size come from the checkpoint
    python eval_knn.py ckpt.pth --train /data/train --val /data/val    # other data
    torchrun --nproc-per-node 8 eval_knn.py ckpt.pth                   # features extracted by 8 processes

Protocol (Wu et al. 2018, arXiv 1805.01978, as in DINOv2): L2-normalised CLS features; each of the k most similar
training images votes for its class with weight exp(similarity / 0.07). Without a second set the images of the first are
classified by all others (leave one out). Prints top-1, and writes it with top-5 beside the checkpoint. Wrong input:
exit code 2. Apache License 2.0.
"""
import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import (
    MEAN, STD, EvalImages, Parser, collate_images, eval_specs, normalize, make_loader, open_source, to_float,
    worker_count)
from model import FORMAT, load_backbone, read_checkpoint

KS = (10, 20, 100, 200)


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@torch.inference_mode()
def extract_features(model: nn.Module, source, resize: int, crop: int, device: torch.device, batch_size: int = 256,
                     num_workers: int = 0, dtype: torch.dtype = torch.float32, mean=MEAN,
                     std=STD) -> tuple[Tensor, Tensor]:
    """L2-normalised features (n, D), float32 on `device`, of all images of a source, in its order, and which of the
    images could be read, (n,) bool.

    `model` maps normalised images (B, C, crop, crop) to (B, D). With a process group each process does every world-th
    image and all get the full table. Raises ValueError if a feature is not finite or no image can be read.
    """
    rank, n_ranks = world()
    mine = torch.arange(rank, len(source), n_ranks)
    loader = make_loader(EvalImages(source, resize, crop, mine.tolist()), num_workers, batch_size=batch_size,
                         pin_memory=device.type == "cuda", collate_fn=collate_images)
    table, readable = None, torch.zeros(len(source), device=device)
    bar = tqdm(loader, desc=f"features of {source.name}", leave=False, disable=None if rank == 0 else True)
    for (images, ok), rows in zip(bar, mine.split(batch_size)):
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            features = model(normalize(to_float(images.to(device, non_blocking=True)), mean, std))
        if table is None:
            table = torch.zeros(len(source), features.shape[-1], device=device)
        table[rows] = F.normalize(features.float(), dim=-1)
        readable[rows] = ok.to(device).float()
    if n_ranks > 1:  # every row is zero but on one process, so the sum is exact
        width = torch.tensor(0 if table is None else table.shape[1], device=device)
        dist.all_reduce(width, dist.ReduceOp.MAX)
        table = torch.zeros(len(source), int(width), device=device) if table is None else table
        dist.all_reduce(table)
        dist.all_reduce(readable)
    if not table.isfinite().all():
        raise ValueError(f"the features of {source.name} are not finite: the checkpoint has diverged")
    if not readable.any():
        raise ValueError(f"no image of {source.name} can be read")
    return table, readable.bool()


@torch.inference_mode()
def knn_scores(bank: Tensor, labels: Tensor, queries: Tensor, ks=KS, temperature: float = 0.07, n_classes: int = 0,
               own_rows: Tensor | None = None) -> dict[int, Tensor]:
    """Class scores {k: (Q, C)} of queries (Q, D) from the training features `bank` (n, D) and their labels (n,).

    Both sets are L2-normalised. Weights are a softmax over the largest k's neighbours; a smaller k uses the first of
    them, not renormalised, which leaves the ranking as it is. `own_rows` (Q,) leaves that row of the bank out. A k
    beyond the number of neighbours counts them all. Neighbours of equal similarity come in the order of topk.
    """
    n_neighbours = min(max(ks), len(bank) - (own_rows is not None))
    n_classes = n_classes or int(labels.max()) + 1
    similarity = queries @ bank.T  # (Q, n)
    if own_rows is not None:
        similarity.scatter_(1, own_rows[:, None], -torch.inf)
    similarity, index = similarity.topk(n_neighbours)  # (Q, k), sorted
    weights = F.softmax(similarity / temperature, dim=-1)
    votes = labels[index]  # (Q, k)
    empty = weights.new_zeros(len(queries), n_classes)
    return {k: empty.scatter_add(1, votes[:, :k], weights[:, :k]) for k in ks}


def knn_accuracy(bank: Tensor, labels, queries: Tensor | None, query_labels=None, ks=KS,
                 temperature: float = 0.07, chunk: int = 0) -> dict[str, float]:
    """Percent of right answers, {"top1_k10": …, "top5_k10": …, …}. `queries` None: leave one out on the bank. `chunk`
    queries are compared at a time; 0: as many as fit a gigabyte."""
    device, leave_one_out, (rank, n_ranks) = bank.device, queries is None, world()
    labels = torch.as_tensor(labels, device=device).long()
    queries, answers = (bank, labels) if leave_one_out else (queries, torch.as_tensor(query_labels, device=device))
    n_classes = int(max(labels.max(), answers.max())) + 1
    names = [f"top{t}_k{k}" for k in ks for t in (1, 5)]
    hits = dict(zip(names, torch.zeros(len(names), dtype=torch.int64, device=device)))
    chunk = chunk or max(1, 2**28 // len(bank))  # a gigabyte of similarities at a time
    for start in range(rank * chunk, len(queries), n_ranks * chunk):  # each process votes on a share
        rows = torch.arange(start, min(start + chunk, len(queries)), device=device)
        scores = knn_scores(bank, labels, queries[rows], ks, temperature, n_classes, rows if leave_one_out else None)
        for k, score in scores.items():
            right = score.topk(min(5, n_classes)).indices == answers[rows, None]  # (Q, 5)
            hits[f"top1_k{k}"] += right[:, 0].sum()
            hits[f"top5_k{k}"] += right.sum()
    total = torch.stack(list(hits.values()))
    if n_ranks > 1:
        dist.all_reduce(total)
    return {name: 100 * n / len(queries) for name, n in zip(names, total.tolist())}


def evaluate(model: nn.Module, train_source, val_source, resize: int, crop: int, device: torch.device,
             num_workers: int = 0, dtype: torch.dtype = torch.float32, ks=KS, temperature: float = 0.07, mean=MEAN,
             std=STD) -> dict[str, float]:
    """k-NN accuracies of `model` in percent; `val_source` None: leave one out. Raises ValueError without labels."""
    for source in (train_source, val_source):
        if source is not None and source.labels is None:
            raise ValueError(f"{source.name} has no labels, k-NN needs one sub-folder per class; name labelled images "
                             "by --train and --val")
    sets = []
    for source, labels in zip((train_source, val_source), common_labels(train_source, val_source)):
        if source is not None:
            features, ok = extract_features(model, source, resize, crop, device, 256, num_workers, dtype, mean, std)
            sets += [features[ok], torch.as_tensor(labels, device=device)[ok]]
            if world()[0] == 0 and not ok.all():
                print(f"{source.name}: {int((~ok).sum())} images could not be read and were left out")
    return knn_accuracy(*(sets + [None, None])[:4], ks, temperature)


def common_labels(train_source, val_source) -> tuple:
    """The labels of both sources in the numbering of the first, whose folders may be more than those of the second.
    Raises ValueError for a class that the first does not have."""
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
    return train_source.labels, np.array([number[name] for name in val_source.classes])[val_source.labels]


def pick_device(name: str) -> torch.device:
    """"auto" is CUDA if there is a GPU, else the CPU; under torchrun each process gets the GPU of its local rank.
    Raises ValueError if the device asked for is absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name!r} is no device; use auto, cpu, cuda or mps") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device {name}: PyTorch finds no CUDA GPU here; use --device cpu")
        if device.index is not None and "LOCAL_RANK" in os.environ:
            raise ValueError(f"--device {name}: torchrun gives each process a GPU of its own; use --device cuda")
        device = torch.device("cuda", device.index or int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"{device} does not exist, PyTorch finds {torch.cuda.device_count()} GPU(s) here")
        torch.set_float32_matmul_precision("high")  # TF32
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"--device {name}: PyTorch finds no Apple GPU here; use --device cpu")
    return device


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", help="out/ckpt.pth, or the weights of a released DINOv2 backbone")
    parser.add_argument("--train", default="", help="labelled training images, named as train.py's --data")
    parser.add_argument("--val", default="", help="labelled images to classify; empty: leave one out on --train")
    parser.add_argument("--ks", type=int, nargs="+", default=list(KS), help="numbers of neighbours")
    parser.add_argument("--temperature", type=float, default=0.07, help="of the votes")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the backbone's arithmetic")
    parser.add_argument("--num-workers", type=int, default=-1, help="reading processes; -1: by the number of cores")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, float]:
    args = parse(argv)
    device = pick_device(args.device)
    ckpt = read_checkpoint(args.checkpoint)
    model = load_backbone(args.checkpoint, ckpt).to(device)
    config = ckpt["config"] if ckpt.get("format") == FORMAT else dict(eval_resize=256, eval_crop=224)
    config = dict(in_chans=3, mean=MEAN, std=STD) | config  # which checkpoints did not always say
    if not args.train and "data" not in config:
        raise ValueError(f"{args.checkpoint} does not say which data to use; give --train and --val")
    if args.train:
        train, val = eval_specs(args.train, args.train, args.val)
    else:
        train, val = eval_specs(config["data"], config["eval_train"], args.val or config["eval_val"])
    if train == val:
        raise ValueError(f"--val is the same as --train, {train}; leave --val out to leave each image out in turn")
    if min(args.ks) < 1 or not args.temperature > 0 or args.num_workers < -1:
        raise ValueError("--ks and --temperature must be positive, --num-workers -1 or more")
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(device_id=device if device.type == "cuda" else None)
    sources = [open_source(spec, config["in_chans"]) if spec else None for spec in (train, val)]
    num_workers = worker_count(args.num_workers, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    result = evaluate(model, *sources, config["eval_resize"], config["eval_crop"], device, num_workers, dtype,
                      tuple(args.ks), args.temperature, config["mean"], config["std"])
    if world()[0] == 0:
        report(args.checkpoint, result, dict(train=train, val=val, temperature=args.temperature, dtype=args.dtype,
                                             step=ckpt.get("step"), torch=torch.__version__))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return result


def report(checkpoint: str, result: dict[str, float], about: dict) -> None:
    """One line on the screen, the same and what it was measured on in a JSON file beside the checkpoint."""
    path = Path(checkpoint).with_suffix(".eval_knn.json")
    columns = [f"k={name[6:]} {v:.2f} %" for name, v in result.items() if name.startswith("top1")]
    how = "" if about["val"] else " (leave one out)"
    print(f"k-NN top-1{how} | " + " | ".join(columns) + f" | {path}")
    try:
        path.write_text(json.dumps(dict(checkpoint=checkpoint, **about, **result), indent=1) + "\n")
    except OSError as error:
        print(f"{path} could not be written: {error.strerror}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
