"""What the evaluations share. Apache License 2.0."""
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
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import hub
from data import MEAN, STD, make_loader, normalize, to_float, widen
from model import FORMAT
from support.cli import Parser
from support.parallel import join_processes, leave_processes, pick_device, worker_count, world
from support.run import write_file
from support.sources import eval_specs, open_source


def collate_images(items: list[tuple[Tensor, bool]]) -> tuple[Tensor, Tensor]:
    """Items of EvalImages -> (n, C, crop, crop) and (n,) bool; among 16-bit images those of 8 are scaled to 16."""
    deep = any(image.dtype == torch.uint16 for image, _ in items)
    images = [widen(image) if deep and image.dtype == torch.uint8 else image for image, _ in items]
    return torch.stack(images), torch.tensor([ok for _, ok in items])


class EvalImages(torch.utils.data.Dataset):
    """Images of a source as uint8 or uint16 (C, crop, crop): short side resized to `resize`, central square cut out;
    and whether the image could be read (if not, it is black). A loader needs collate_images()."""

    def __init__(self, source, resize: int = 256, crop: int = 224, indices=None):
        self.source, self.resize, self.crop = source, resize, crop
        self.indices = range(len(source)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[Tensor, bool]:
        try:
            image = self.source.image(self.indices[i])
        except Exception:  # decoders raise all sorts on damaged files
            return torch.zeros(self.source.channels, self.crop, self.crop, dtype=torch.uint8), False
        h, w = image.shape[-2:]
        most = 8 * min(h, w)  # of very long images the middle is enough, and resizing all of it could fill the memory
        image = TF.center_crop(image, [min(h, most), min(w, most)]) if max(h, w) > most else image
        deep = image.dtype == torch.uint16
        image = TF.resize(image.float() if deep else image, [self.resize], InterpolationMode.BICUBIC, antialias=True)
        image = TF.center_crop(image, [self.crop, self.crop])
        return image.round().clamp(0, 65535).to(torch.uint16) if deep else image, True


# ----------------------------------------------------------------------------------------------------------------------
# Features of a set


@contextlib.contextmanager
def full_float32():
    """Products of float32 matrices without TF32's rounding to 10 bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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


def ranks(scores: Tensor, answers: Tensor) -> Tensor:
    """How many classes come before the right one, (Q,): those with a higher score (Q, C), and those with the same and a
    lower number."""
    own = scores.gather(1, answers[:, None])  # (Q, 1)
    before = torch.arange(scores.shape[1], device=scores.device) < answers[:, None]
    return ((scores > own) | (scores == own) & before).sum(1)


# ----------------------------------------------------------------------------------------------------------------------
# An evaluation: a checkpoint, two sets of images, a result


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

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def check_finite(features: Tensor, spec: str) -> None:
    if not features.isfinite().all():
        raise ValueError(f"the features of {spec} are not finite: the checkpoint has diverged, or half precision is "
                         "too coarse for it")
