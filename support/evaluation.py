"""What the evaluations share: features of a labeled set, kept on disk; percentages; resuming; the line of results.

    with Evaluation("knn", args) as e:                          # the checkpoint and its labeled images, opened
        features, labels = e.labeled(e.train, e.train_labels)   # (n, D), (n,); from --cache if they are there
        ...
        e.report(protocol, result, columns)                     # appends a line to CKPT.eval_knn.jsonl, prints one

Everything here works the same in one process and under torchrun, where each rank computes a share of the batches.
Apache License 2.0.
"""
import argparse
import contextlib
import datetime
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from functools import partial
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import hub
from data import MEAN, STD, make_loader, normalize, to_device, to_float, widen
from model import FORMAT
from support.cli import DTYPES, Parser, at_least, printable
from support.files import check_sums, write_file
from support.parallel import join_processes, leave_processes, on_all_ranks, pick_device, worker_count, world
from support.sources import Source, eval_specs, open_on_all_ranks, without_code

NOT_FINITE = "the checkpoint has diverged, or half precision is too coarse for it (use --dtype fp32)"


def say(text: str) -> None:
    """Prints on stderr, on rank 0 alone, without disturbing a progress bar."""
    if world()[0] == 0:
        tqdm.write(printable(text), file=sys.stderr)


def no_bar() -> bool | None:
    """The `disable` of a tqdm bar: shown on rank 0 only, and only on a terminal."""
    return None if world()[0] == 0 else True


# ----------------------------------------------------------------------------------------------------------------------
# Images


class EvalImages(torch.utils.data.Dataset):
    """Images of a source, the short side resized to `resize` and the center square of `crop` pixels cut out. Items are
    (image, readable): uint8 or uint16 (C, crop, crop), black if the file cannot be read. For collate_images()."""

    def __init__(self, source, resize: int = 256, crop: int = 224, indices=None):
        self.source, self.resize, self.crop = source, resize, crop
        self.indices = range(len(source)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[Tensor, bool]:
        try:
            image = self.source.image(self.indices[i])
        except Exception:  # decoders raise anything on damaged files
            return torch.zeros(self.source.channels, self.crop, self.crop, dtype=torch.uint8), False
        longest = 8 * min(image.shape[-2:])  # resizing all of a panorama could fill the memory; its center is enough
        image = center_crop(image, longest, longest)
        is_16_bit = image.dtype == torch.uint16
        image = resize_short_side(image.float() if is_16_bit else image, self.resize)
        image = center_crop(image, self.crop, self.crop)
        return image.round().clamp(0, 65535).to(torch.uint16) if is_16_bit else image, True


class Sample(Source):
    """A random subset of `n` images of a source, in their order; the same one every time."""

    def __init__(self, source: Source, n: int):
        self.rows = np.sort(np.random.default_rng(0).choice(len(source), n, replace=False))
        self.source, self.name, self.channels, self.classes = source, source.name, source.channels, source.classes
        self.labels = None if source.labels is None else np.asarray(source.labels)[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def describe(self, i: int) -> str:
        return self.source.describe(int(self.rows[i]))

    def image(self, i: int) -> Tensor:
        return self.source.image(int(self.rows[i]))


def at_most(source: Source | None, n: int) -> Source | None:
    """The source, or with a note a Sample of n images if it has more."""
    if source is None or len(source) <= n:
        return source
    say(f"note: k-NN during training uses {n:,} of the {len(source):,} images of {source.name}, a fixed random "
        "subset; eval_knn.py uses all")
    return Sample(source, n)


def resize_short_side(image: Tensor, short: int) -> Tensor:
    """(C, H, W), uint8 or float32, bicubic with antialiasing; sizes and pixels are those of torchvision's resize."""
    h, w = image.shape[-2:]
    size = (short, int(short * w / h)) if h <= w else (int(short * h / w), short)
    return image if size == (h, w) else F.interpolate(image[None], size=size, mode="bicubic", antialias=True)[0]


def center_crop(image: Tensor, height: int, width: int) -> Tensor:
    h, w = image.shape[-2:]
    top, left = round(max(h - height, 0) / 2), round(max(w - width, 0) / 2)
    return image[..., top : top + height, left : left + width]


def collate_images(items: list[tuple[Tensor, bool]]) -> tuple[Tensor, Tensor]:
    """Items of EvalImages as (n, C, crop, crop) and (n,) bool."""
    images, ok = zip(*items)
    return stack_images(images), torch.tensor(ok)


def stack_images(images) -> Tensor:
    """uint8 or uint16 images (C, h, w) of one size as one tensor; a single 16-bit image makes it uint16."""
    any_16_bit = any(image.dtype == torch.uint16 for image in images)
    return torch.stack([widen(x) if any_16_bit and x.dtype == torch.uint8 else x for x in images])


# ----------------------------------------------------------------------------------------------------------------------
# Features


@torch.no_grad()
def extract_features(model, source, resize: int, crop: int, device: torch.device, batch_size: int = 256,
                     num_workers: int = 0, dtype: torch.dtype = torch.float32, mean=MEAN,
                     std=STD) -> tuple[Tensor, Tensor]:
    """The outputs of `model` for all images of a source, in order, (n, D) on `device`; and which images could be read,
    (n,) bool. Rows of unreadable images are zero.

    `model` maps normalized images (B, C, crop, crop) to (B, D), floating-point or int32, under autocast to `dtype`.
    With a process group each rank computes every n-th batch and all get the full table, whose bits do not depend on the
    number of ranks. Raises ValueError if a feature is not finite or no image can be read.
    """
    rank, n_ranks = world()
    batches = torch.arange(len(source)).split(batch_size)[rank::n_ranks]
    loader = make_loader(EvalImages(source, resize, crop, torch.cat(batches).tolist() if batches else []), num_workers,
                         batch_size=batch_size, pin_memory=device.type == "cuda", collate_fn=collate_images)
    table, state = None, torch.zeros(len(source), dtype=torch.int32, device=device)  # 1: readable, 2: not finite
    for (images, ok), rows in zip(tqdm(loader, desc=f"features of {source.name}", leave=False, disable=no_bar()),
                                  batches):
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            features = model(normalize(to_float(to_device(images, device)), mean, std))
        features, ok = features.float() if features.is_floating_point() else features, ok.to(device)
        if table is None:
            table = features.new_zeros(len(source), features.shape[-1])
        table[rows[0] : rows[-1] + 1] = features * ok[:, None]
        state[rows[0] : rows[-1] + 1] = ok * (2 - features.isfinite().all(1).int())
    if n_ranks > 1:
        table = sum_over_ranks(table, device)
        dist.all_reduce(state)
    if len(wrong := (state == 2).nonzero()[:, 0]):
        raise ValueError(f"the features of {len(wrong)} of the {len(source)} images of {source.name} are not finite, "
                         f"such as that of {source.describe(int(wrong[0]))}: {NOT_FINITE}")
    if not state.any():
        raise ValueError(f"no image of {source.name} can be read")
    return table, state > 0


def sum_over_ranks(table: Tensor | None, device: torch.device) -> Tensor:
    """The sum of tables in which each row is zero on all ranks but one, hence exact. With few images a rank may have
    had no batch, and so has no table; rank 0 always has one."""
    shape, dtype = on_all_ranks(lambda: None if table is None else (table.shape, table.dtype))[0]  # may wait long
    table = torch.zeros(shape, dtype=dtype, device=device) if table is None else table
    dist.all_reduce(table)
    return table


def check_finite(features: Tensor, spec: str) -> None:
    if not features.isfinite().all():
        raise ValueError(f"the features of {spec} are not finite: {NOT_FINITE}")


def normalize_rows_(table: Tensor) -> Tensor:
    """L2-normalizes the rows in place, in chunks: the table may fill most of the memory."""
    for part in table.split(2**14):
        part.copy_(F.normalize(part, dim=-1))
    return table


@contextlib.contextmanager
def full_float32():
    """Float32 matrix products at full precision, without TF32's rounding to 10 bits. Also a decorator."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# ----------------------------------------------------------------------------------------------------------------------
# Labels and accuracies


def common_labels(train_source, val_source) -> tuple:
    """The labels of both sources in the class numbers of the first (None for no second source). Raises ValueError for
    a source without labels, or if the second has a class that the first does not have."""
    for source in (train_source, val_source):
        if source is not None and source.labels is None:
            raise ValueError(f"{source.unlabeled()}, or name other images with --train and --val")
    if val_source is None:
        return train_source.labels, None
    if (train_source.classes is None) != (val_source.classes is None):
        raise ValueError(f"the classes of {val_source.name} cannot be matched with those of {train_source.name}: one "
                         "has names, the other numbers; use two sets of the same kind")
    if train_source.classes is None:
        return train_source.labels, val_source.labels
    if foreign := set(val_source.classes) - set(train_source.classes):
        raise ValueError(f"{val_source.name} has a class {min(foreign)!r} that {train_source.name} does not have")
    number = {name: i for i, name in enumerate(train_source.classes)}
    renumbered = np.array([*(number[name] for name in val_source.classes), -1])  # -1: no label
    return train_source.labels, renumbered[val_source.labels]


def with_label(table: Tensor, labels, ok: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of readable images that have a label, and their labels, int64. Rows move up within `table`, which may
    fill most of the memory. Raises ValueError if none is left."""
    labels = torch.as_tensor(np.asarray(labels), device=table.device).long()
    rows = (ok & (labels >= 0)).nonzero()[:, 0]
    if not len(rows):
        raise ValueError("no readable image has a label; evaluation needs labeled images")
    if len(rows) == len(table):
        return table, labels
    for start in range(0, len(rows), 2**14):
        part = rows[start : start + 2**14]
        table[start : start + len(part)] = table[part]
    return table[: len(rows)], labels[rows]


def count_left_out(source, labels, ok: Tensor) -> int:
    """How many images with_label() drops; says so on stderr."""
    unreadable, unlabeled = int((~ok).sum()), int((torch.as_tensor(np.asarray(labels)) < 0)[ok.cpu()].sum())
    for n, what in ((unreadable, "that cannot be read"), (unlabeled, "without a label")):
        if n:
            say(f"{source.name}: left out {n:,} image{'s' * (n != 1)} {what}")
    return unreadable + unlabeled


def place_of_answer(scores: Tensor, answers: Tensor) -> Tensor:
    """How many classes are ranked above the right one, (Q,), by scores (Q, C) for answers (Q,). Of classes with equal
    scores the one with the lower number is ranked higher."""
    own = scores.gather(1, answers[:, None])  # (Q, 1)
    lower = torch.arange(scores.shape[1], device=scores.device) < answers[:, None]
    return ((scores > own) | (scores == own) & lower).sum(1)


def accuracies(places: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
    """Percent right of J classifiers, float64 on the CPU, from the places (n, J) they give the right classes: top1 and
    top5 (J,), and with labels (n,) mean_per_class (J,), top-1 averaged over the classes that occur."""
    places = places.cpu()
    result = {f"top{t}": 100 * (places < t).sum(0).double() / len(places) for t in (1, 5)}
    if labels is not None:
        classes, number, count = labels.cpu().unique(return_inverse=True, return_counts=True)
        hits = torch.zeros(len(classes), places.shape[1], dtype=torch.float64)
        hits.index_add_(0, number, (places < 1).double())
        result["mean_per_class"] = 100 * (hits / count[:, None]).mean(0)
    return result


# ----------------------------------------------------------------------------------------------------------------------
# An evaluation: a checkpoint, two sets of images, a result


class EvaluationParser(Parser):
    """The command line that all evaluations of labeled images share."""

    def __init__(self, manual: str):
        super().__init__(manual)
        self.add_argument("checkpoint", help="out/ckpt.pth, a released .pth, the name of a released model such as "
                          "dinov2_vits14, or a file of Hugging Face or timm")
        self.add_argument("--train", default="", help="labeled training images, given as for train.py --data")
        self.add_argument("--val", default="", help="labeled test images; default: the validation split of --train")
        self.add_argument("--resize", type=at_least(0), default=0, help="short side in pixels; 0: from the checkpoint")
        self.add_argument("--crop", type=at_least(0), default=0, help="center square in pixels; 0: from the checkpoint")
        self.add_machine_flags("device", "dtype", "num-workers")
        self.add_argument("--cache", default="", help="folder to cache features in; default: no cache")
        add_result_flags(self)


def add_result_flags(parser: Parser) -> None:
    parser.add_argument("--out", default="", help="append the result to this file, and write other files next to it; "
                        "default: next to the checkpoint")
    parser.add_argument("--json", action="store_true", help="print the whole result as JSON, and nothing else")


class Evaluation:
    """A checkpoint and its labeled images, opened as the command line says, and under torchrun the process group. Use
    it in a `with`. `margin`: unless --resize is given, images are resized to more than the crop, like 256 for 224.
    Raises ValueError, with the fix in the message, if anything does not fit."""

    def __init__(self, name: str, args: argparse.Namespace, margin: bool = True, needs_val: bool = False):
        self.name, self.args, self.began, self.left_out = name, args, time.time(), {}
        check_writable(args.out)
        if args.cache and Path(args.cache).expanduser().is_file():
            raise ValueError(f"--cache {args.cache} is a file; name a folder")
        self.device, self.dtype = pick_device(args.device), DTYPES[args.dtype]
        path, ckpt = hub.read(args.checkpoint)
        self.stem, self.step = results_stem(args, path), ckpt.get("step")
        self.model = hub.load(path, ckpt).to(self.device)
        self.config = hub.image_rules(self.model, ckpt) | (ckpt["config"] if ckpt.get("format") == FORMAT else {})
        self.specs = self.choose_data()
        if needs_val and not self.specs[1]:
            raise ValueError(f"{self.specs[0]} has no validation images; pass --val")
        self.crop = args.crop or self.config["eval_crop"]
        if self.crop % self.model.patch_size:
            raise ValueError(f"--crop {self.crop} is not a multiple of the model's patch size, {self.model.patch_size}")
        enlarged = self.config["eval_resize"] / self.config["eval_crop"] if margin else 1
        self.resize = args.resize or round(self.crop * enlarged)
        if self.resize < self.crop:
            raise ValueError(f"--resize {self.resize} is smaller than --crop {self.crop}; make it at least as large")
        join_processes(self.device)
        self.workers = worker_count(args.num_workers, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self.train, self.val = self.open(*self.specs)
        self.train_labels, self.val_labels = common_labels(self.train, self.val)
        self.model_hash = hub.weights_hash(self.model)

    def choose_data(self) -> tuple[str, str | None]:
        """The names of the training images and of those to classify, the latter None for leave-one-out."""
        args, config = self.args, self.config
        if not args.train and "data" not in config:
            raise ValueError(f"{args.checkpoint} does not say which data to use; give --train and --val")
        train, val = (eval_specs(args.train, args.train, args.val) if args.train else
                      eval_specs(*(without_code(config[key], "--train") for key in ("data", "eval_train")),
                                 args.val or without_code(config["eval_val"], "--val")))
        if train == val:
            raise ValueError(f"--val is the same as --train, {train}; leave --val out, or name other images")
        return train, val

    def open(self, *specs: str | None) -> list[Source | None]:
        """Opens the sources named; None gives None. Raises ValueError on all ranks if any cannot open them."""
        try:
            return open_on_all_ranks(specs, self.config["in_chans"])
        except ValueError as error:
            raise ValueError(str(error).removeprefix("--data ").replace("--data", "--train")) from None

    def __enter__(self):
        return self

    def __exit__(self, kind, *error) -> None:
        leave_processes(kind is None)

    def extract(self, source, model=None) -> tuple[Tensor, Tensor]:
        """extract_features() of a source with this evaluation's settings; by default the CLS features."""
        return extract_features(model or self.model, source, self.resize, self.crop, self.device, 256, self.workers,
                                self.dtype, self.config["mean"], self.config["std"])

    def features(self, source, what: str = "cls", model=None) -> tuple[Tensor, Tensor]:
        """Like extract(), but cached in --cache, where `what` tells different outputs of the model apart."""
        if not self.args.cache:
            return self.extract(source, model)
        vit, config = self.model, self.config
        settings = [what, self.model_hash, vit.num_heads, vit.interpolate_offset, vit.interpolate_antialias,
                    data_hash(source), self.resize, self.crop, self.args.dtype, *config["mean"], *config["std"]]
        path = Path(self.args.cache).expanduser() / f"{settings_hash(settings)[:32]}.pt"
        cached = load_table(path, len(source))
        if cached and any(map(partial(is_readable, source), (~cached[1]).nonzero()[:, 0].tolist())):
            cached = None  # an image that could not be read has been repaired
        if all_agree(cached is not None) and cached:
            return cached[0].to(self.device), cached[1].to(self.device)
        table, ok = self.extract(source, model)
        save_on_rank_0(path, (table.cpu(), ok.cpu()))
        return table, ok

    def labeled(self, source, labels, what: str = "cls", model=None) -> tuple[Tensor, Tensor]:
        """Features (n, D) and labels (n,) of the readable images that have a label; counts the others."""
        table, ok = self.features(source, what, model)
        self.left_out[source.name] = count_left_out(source, labels, ok)
        return with_label(table, labels, ok)

    def report(self, protocol: dict, result: dict, columns: dict[str, str]) -> None:
        """Appends a line to the results and prints `columns` in one line, or with --json the whole record."""
        path = Path(self.args.out or f"{self.stem}.eval_{self.name}.jsonl")
        record = dict(
            evaluation=self.name, protocol=protocol | dict(resize=self.resize, crop=self.crop, dtype=self.args.dtype),
            data={what: dict(spec=spec, images=len(source)) for what, spec, source in
                  zip(("train", "val"), self.specs, (self.train, self.val)) if spec},
            left_out=self.left_out, result=result,
            model=dict(checkpoint=self.args.checkpoint, sha256=self.model_hash, step=self.step))
        if world()[0] == 0:
            add_record(path, record, columns, self.args.json, self.device, self.began)


# ----------------------------------------------------------------------------------------------------------------------
# Files


class ResumeFile:
    """The state of an interrupted evaluation, in PREFIX.DIGEST.resume. The digest is of all settings that the result
    depends on, so only the same command finds it. `wanted` False starts from scratch."""

    def __init__(self, prefix: str, settings: list, wanted: bool = True):
        self.settings, self.wanted = settings_hash(settings), wanted
        self.path = Path(f"{prefix}.{self.settings[:8]}.resume")

    def load(self, restore: Callable[[dict], int], like: dict, steps: int) -> None:
        """If there is a state, calls restore(state), which returns the number of steps done. Raises ValueError if the
        state is damaged, does not have the structure of `like` (a state of the same command), counts more than `steps`,
        or was saved with other settings, or if the ranks do not resume from the same step."""
        done = 0
        if self.wanted and self.path.exists():
            try:
                check_sums(self.path)
                state = hub.read_file(str(self.path))
                if state.pop("settings") != self.settings or not alike(state, like) or not 0 <= state["done"] <= steps:
                    raise ValueError("saved by another command")
                done = restore(state)
            except Exception:  # a damaged file can fail in any way
                raise ValueError(f"{self.path} is damaged; remove it to start from scratch") from None
        if not all_agree(done):
            raise ValueError(f"not all processes see {self.path}; use a folder that all machines share, or --no-resume")

    def save(self, state: dict) -> None:
        save_on_rank_0(self.path, state | dict(settings=self.settings))

    def remove(self) -> None:
        if world()[0] == 0:
            self.path.unlink(missing_ok=True)


def alike(state, like) -> bool:
    """Whether two states have the same keys, types and shapes. An empty dict in `like` matches any dict."""
    if isinstance(like, dict):
        return isinstance(state, dict) and (not like or state.keys() == like.keys() and all(
            alike(state[k], like[k]) for k in like))
    same_shape = not torch.is_tensor(like) or torch.is_tensor(state) and state.shape == like.shape
    return same_shape and isinstance(state, type(like))


def all_agree(number: int) -> bool:
    """Whether `number` is the same on all ranks."""
    return world()[1] == 1 or len(set(on_all_ranks(lambda: number))) == 1


def save_on_rank_0(path: Path, content) -> None:
    """Writes `content` with torch.save, atomically. If that fails, says so and continues: other ranks are waiting."""
    if world()[0] == 0:
        try:
            write_file(path, partial(torch.save, content))
        except ValueError as error:
            say(f"note: {error}; the evaluation continues")


def load_table(path: Path, n: int) -> tuple[Tensor, Tensor] | None:
    """The cached features of n images, and which of them could be read; None if there is no such file, or it is
    damaged."""
    if not path.exists():
        return None
    try:
        check_sums(path)
        table, ok = torch.load(path, map_location="cpu", weights_only=True)
        if (table.ndim == 2 and len(table) == n and table.dtype in (torch.float32, torch.int32)
                and ok.dtype == torch.bool and ok.shape == (n,) and table.isfinite().all() and not table[~ok].any()):
            return table, ok
    except Exception:  # a damaged file can fail in any way
        pass
    say(f"note: {path} is damaged; computing the features again")


def is_readable(source, i: int) -> bool:
    try:
        source.image(i)
    except Exception:  # decoders raise anything on damaged files
        return False
    return True


def data_hash(source) -> str:
    """SHA-256 of a source's listing and of 64 of its images, evenly spread."""
    digest = hashlib.sha256(f"{source.fingerprint} {len(source)} {source.channels}".encode())
    for i in range(0, len(source), -(-len(source) // 64)):
        with contextlib.suppress(Exception):  # decoders raise anything on damaged files
            digest.update(source.image(i).contiguous().numpy())
    return digest.hexdigest()


def settings_hash(settings: list) -> str:
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def check_writable(out: str) -> None:
    """Raises ValueError unless the file --out can be created, or holds results and can be appended to. Creates nothing,
    since all processes check at the same time."""
    if not out:
        return
    path, reason = Path(out), ""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND))
    except FileNotFoundError as error:
        if not os.access(path.parent, os.W_OK):
            reason = os.strerror(errno.EACCES) if path.parent.is_dir() else error.strerror
    except OSError as error:
        reason = error.strerror
    if reason:
        raise ValueError(f"--out {out} cannot be written: {reason}")
    if not holds_results(path):
        raise ValueError(f"--out {out} exists and does not hold evaluation results; choose another file")


def holds_results(path: Path) -> bool:
    """Whether results may be appended here: the path is new, empty or a device, or already has a line of results."""
    if not path.is_file():
        return True
    with open(path, "rb") as file:
        start = file.read(1 << 20)
    return not start or any(map(is_result, start.splitlines()))


def is_result(line: bytes) -> bool:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and "evaluation" in record


def add_line(path: Path, line: str) -> None:
    """Appends a line of results to a file, after a line break if the last line was cut off. Raises OSError."""
    if not holds_results(path):
        raise FileExistsError(errno.EEXIST, "it does not hold evaluation results", str(path))
    torn = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
    with open(path, "a") as file:
        file.write("\n" * torn + line + "\n")


def results_stem(args: argparse.Namespace, path: str) -> Path:
    """The path of result files, without suffix: that of --out, else of the checkpoint; for a released model given by
    name, that name in the current folder."""
    if args.out:
        return Path(args.out).with_suffix("")
    return Path(path).with_suffix("") if Path(args.checkpoint).exists() else Path(args.checkpoint)


def add_record(path: Path, record: dict, columns: dict[str, str], as_json: bool, device, began: float) -> None:
    """Appends a result to a file, with versions, device and time, and prints `columns`, or the record as JSON."""
    versions = dict(torch=torch.__version__, torchvision=importlib.metadata.version("torchvision"),  # no slow import
                    python=platform.python_version())
    record |= dict(versions=versions, device=str(device), processes=world()[1], seconds=round(time.time() - began, 1),
                   time=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"))
    fate = f"written to {path}"
    try:
        add_line(path, json.dumps(record))
    except OSError as error:
        fate = f"{path} could not be written"
        say(f"{fate}: {error.strerror}")
    print(json.dumps(record, indent=1) if as_json else
          " | ".join([*(f"{name} {value}".strip() for name, value in columns.items()), fate]))
