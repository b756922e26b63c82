"""Where images come from. A source is named by one string:

    /any/folder                   all images below it; class sub-folders give labels, train/ and val/ sub-folders splits
    photos.txt                    a text file with one image path per line, optionally followed by a tab and a label
    /data/shards/*.tar            tar shards (WebDataset), also x-{000..099}.tar, with labels from .cls members; 16 are
                                  read at a time, front to back, and mixed; :interleave=0 reads in fully random order
    ImageNet:split=TRAIN:root=/data/imagenet[:extra=/data/extra]       train/<wnid>/*.JPEG, val/<wnid>/*.JPEG, test/
    ImageNet22k:root=/data/in22k[:extra=/data/extra]                   <wnid>.tar
    CIFAR10, CIFAR100, MNIST, FashionMNIST[:root=…][:download=yes]     as torchvision stores them
    digits                        1,797 scans shipped with scikit-learn, of which split=VAL holds out a fifth
    my_data.py:photos             any torch Dataset, returned by the function photos() in my_data.py; see TorchDataset
    A*0.7,B*0.3                   any of these, mixed in exactly these proportions; A,B: all of both once per pass

    python -m support.sources stats /my/photos     # mean and standard deviation per channel, for --mean and --std
    python -m support.sources check /my/photos     # reads every image, lists those it cannot; exit code 1 if any
    python -m support.sources extra ImageNet:root=/data/imagenet:extra=/data/extra     # official metadata, also of 22k

Listings are made once, cached in ~/.cache/dinov2 and mapped into memory. Apache License 2.0.
"""
import bisect
import csv
import errno
import functools
import glob
import gzip
import hashlib
import importlib.util
import itertools
import math
import os
import random
import re
import shlex
import signal
import sys
import tarfile
import traceback
import zlib
from array import array
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from support.cli import Parser, at_least, nearest, run
from support.images import MAX_BYTES, as_channels, decode, from_array, from_pillow, read_file, short_reason
from support.parallel import Failed, on_all_ranks, worker_count
from support.files import write_file

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".npy")
SPLIT_FOLDERS = {"TRAIN": ("train", "training"), "VAL": ("val", "valid", "validation", "test")}


# ----------------------------------------------------------------------------------------------------------------------
# Sources


class Source:
    """Numbered images; subclasses define len(), and how to read image i. `labels` (n,) integers, -1 for none, or None;
    `classes`: the names of the labels, or None if labels are plain numbers; `name` for messages; `fingerprint`, equal
    on all machines that see the same images."""

    name, labels, classes, fingerprint = "", None, None, 0
    spec, channels = "", 3  # as given to open_source

    def describe(self, i: int) -> str:
        """The file of image i, or what else to call it in messages."""
        return f"{self.name}[{i}]"

    def encoded(self, i: int) -> np.ndarray:
        """The bytes of image i's file, uint8 (n,). Raises whatever reading raises."""
        return read_file(self.describe(i))

    def image(self, i: int) -> Tensor:
        """Image i, uint8 or uint16 (channels, H, W). Raises whatever reading or decoding raises."""
        return decode(self.encoded(i), self.channels)

    def order(self, position: int, key: int) -> int:
        """The image at `position` of the pass over all images that `key` determines."""
        return shuffled(position, len(self), key)

    def pick(self, s: int, seed) -> int:
        """The index of the image of sample s: each pass of n samples visits every image once, in a new order."""
        epoch, position = divmod(s, len(self))
        return self.order(position, key=random.Random(f"{seed}/epoch/{epoch}").getrandbits(64))

    def replacement(self, i: int, rng: random.Random) -> int:
        """The index of an image to use instead of image i, which cannot be read."""
        return rng.randrange(len(self))

    def __reduce__(self):  # workers that are not forked open the source again, instead of receiving all its tables
        return (reopen, (self.spec, self.channels, self.fingerprint)) if self.spec else super().__reduce__()


def reopen(spec: str, channels: int, fingerprint: int) -> Source:
    source = open_source(spec, channels)
    if source.fingerprint != fingerprint:
        raise ValueError(f"{source.name} has changed while the run was starting; start it again")
    return source


def shuffled(i: int, n: int, key: int) -> int:
    """Where a permutation of range(n), determined by `key`, sends i. A Feistel network over the next power of four,
    repeated until it lands below n: nothing is stored, however large n is."""
    half = max((n - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for r in range(6):
            x = (right + key + (r << 32)) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF  # splitmix64
            x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ (x >> 31 & mask)
        i = left << half | right
        if i < n:
            return i


class InMemory(Source):
    """A set that fits in memory: `pixels` uint8 (n, H, W) or (n, H, W, 3), enlarged to `side` if given."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, name: str, side: int | None = None, classes=None):
        self.pixels, self.labels, self.name = torch.from_numpy(pixels), labels.astype(np.int64), name
        self.classes, self.fingerprint = classes, zlib.crc32(pixels)
        self.images = self.pixels.permute(0, 3, 1, 2) if pixels.ndim == 4 else self.pixels[:, None]
        if side:
            self.images = F.interpolate(self.images, (side, side), mode="bicubic", antialias=True)

    def __len__(self) -> int:
        return len(self.images)

    def image(self, i: int) -> Tensor:
        return as_channels(self.images[i], self.channels)


class TorchDataset(Source):
    """Any map-style torch Dataset. Its items are images or tuples (image, label, …); an image is a PIL image, a uint8
    or uint16 tensor (C, H, W), or such an array (H, W) or (H, W, C). Raises ValueError for other items.

    Items must be the same each time they are read; training augments by itself. Labels are the dataset's `targets` if
    it has them; else those of the items, all of which are read as soon as an evaluation asks for labels.

    The main process reads a few items before it forks data-loading workers, which must not share its file handles: a
    dataset on HDF5, LMDB or the like opens its file in __getitem__, once per process (os.getpid())."""

    def __init__(self, dataset, name: str = ""):
        self.dataset, self.name, kind = dataset, name or type(dataset).__name__, type(dataset).__name__
        try:
            n = len(dataset)
        except TypeError:
            raise ValueError(f"{self.name} returns a {kind}, which has no length; return a Dataset with __len__ and "
                             "__getitem__") from None
        if n == 0:
            raise ValueError(f"{self.name} is empty")
        probes = [self.probe(i) for i in (0, n // 2, n - 1, 0)]
        if probes[0] != probes[3]:
            raise ValueError(f"{self.name} returns a different image each time; remove its random transforms, training "
                             "augments by itself")
        self.labeled = any(labeled for labeled, _ in probes)
        self.fingerprint = zlib.crc32(f"{n} {kind} {probes}".encode())

    def __len__(self) -> int:
        return len(self.dataset)

    def item(self, i: int) -> tuple:
        """The image and the label of item i, None if it has no label."""
        item = self.dataset[i]
        return (*item, None)[:2] if isinstance(item, (tuple, list)) and item else (item, None)

    def probe(self, i: int) -> tuple[bool, int]:
        """Whether item i has a label, and a checksum of its image; (False, 0) if it cannot be read."""
        try:
            image, label = self.item(i)
        except Exception:  # a damaged file; training will replace it
            return False, 0
        return label is not None, zlib.crc32(self.pixels(image).contiguous().numpy())

    def image(self, i: int) -> Tensor:
        return as_channels(self.pixels(self.item(i)[0]), self.channels)

    def pixels(self, image) -> Tensor:
        """Any of the kinds of images as uint8 or uint16 (C, H, W). Raises ValueError for others."""
        if isinstance(image, Image.Image):
            return from_pillow(image, self.channels)
        if isinstance(image, np.ndarray) and image.dtype in (np.uint8, np.uint16):
            return from_array(image)
        if isinstance(image, Tensor) and image.dtype in (torch.uint8, torch.uint16) and image.ndim == 3:
            return image.as_subclass(Tensor)
        kind = f" {image.dtype} {tuple(image.shape)}" if isinstance(image, (np.ndarray, Tensor)) else ""
        raise ValueError(f"an item of {self.name} is a {type(image).__name__}{kind}; return an image or (image, "
                         "label), the image from PIL, as a uint8 tensor (C, H, W) or as a uint8 array (H, W, C)")

    @functools.cached_property
    def labels(self) -> np.ndarray | None:
        targets = getattr(self.dataset, "targets", None)
        if targets is None and self.labeled:
            rows = tqdm(range(len(self)), desc=f"reading the labels of {self.name}", unit=" images", disable=None)
            targets = [self.label(i) for i in rows]
        if targets is None:
            return None
        try:
            labels = np.asarray(targets)
        except ValueError:  # lists of different lengths
            labels = np.empty(0, object)
        if labels.dtype.kind not in "iub" or labels.shape != (len(self),):
            raise ValueError(f"evaluations need one integer per image, but the labels of {self.name} are "
                             f"{labels.dtype} {labels.shape}")
        return labels.astype(np.int64)

    def label(self, i: int):
        try:
            label = self.item(i)[1]
        except Exception:  # a damaged file, left out
            return -1
        return label.item() if isinstance(label, (Tensor, np.ndarray)) and math.prod(label.shape) == 1 else label


class ImageFiles(Source):
    """Files by a listing of names, stored as one byte string with offsets and mapped into memory: small for a hundred
    million files, and shared by all processes of a machine."""

    def __init__(self, root: Path, listing: dict):
        self.root, self.name = str(root), str(root)
        self.names, self.ends = listing["names"].numpy(), listing["ends"].numpy()
        self.fingerprint = listing["fingerprint"]
        self.labels = listing["labels"].numpy() if len(listing["labels"]) else None
        self.classes = listing["classes"] or None

    def __len__(self) -> int:
        return len(self.ends) - 1

    def describe(self, i: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[self.ends[i] : self.ends[i + 1]].tobytes()))


class ImageNetEntries(Source):
    """ImageNet by the official metadata, `extra`/entries-SPLIT.npy, instead of a listing of the folders."""

    def __init__(self, root: Path, entries: np.ndarray, split: str):
        self.root, self.entries, self.split, self.name = root, entries, split, f"{root} ({split})"
        self.labels = None if split == "TEST" else entries["class_index"].astype(np.int32)
        self.fingerprint = zlib.crc32(np.ascontiguousarray(entries["actual_index"]))

    def __len__(self) -> int:
        return len(self.entries)

    def describe(self, i: int) -> str:
        number, wnid = self.entries["actual_index"][i], self.entries["class_id"][i]
        name = {"TRAIN": f"train/{wnid}/{wnid}_{number}.JPEG", "VAL": f"val/{wnid}/ILSVRC2012_val_{number:08d}.JPEG",
                "TEST": f"test/ILSVRC2012_test_{number:08d}.JPEG"}[self.split]
        return os.path.join(self.root, name)


class InTars(Source):
    """Images in tar files. Image i is the bytes start[i] to start[i] + size[i] of tar number shard[i]; the images of a
    tar have consecutive numbers. With `interleave`, that many places are read in turn, each from front to back."""

    def __init__(self, name: str, tars: list[str], shard, start, size, fingerprint: int, labels=None, interleave=0):
        self.name, self.tars, self.shard, self.start, self.size = name, tars, shard, start, size
        self.fingerprint, self.labels, self.interleave = fingerprint, labels, interleave
        self.first = np.searchsorted(shard, np.arange(len(tars) + 1))  # (tars + 1,) first image of each tar, and n
        self.tars_in_order = functools.lru_cache(maxsize=4)(self.tars_in_order)

    def __len__(self) -> int:
        return len(self.shard)

    def encoded(self, i: int) -> np.ndarray:
        size = int(self.size[i])
        if size > MAX_BYTES:
            raise ValueError(f"{size:,} bytes, more than MAX_BYTES in support/images.py")
        data = np.fromfile(self.tars[self.shard[i]], np.uint8, size, offset=int(self.start[i]))
        if len(data) < size:
            raise EOFError("the tar file ends within this image")
        return data

    def describe(self, i: int) -> str:
        return f"{self.tars[self.shard[i]]} at byte {int(self.start[i])}"

    def order(self, position: int, key: int) -> int:
        """With `interleave` = L, the tars in random order form one long row, which is cut into L lanes of equal length.
        Reading advances through all lanes at the same pace; the next 256 images of each lane form a window, which is
        shuffled. Like a shuffle buffer of 256 * L images, but any element can be computed on its own."""
        if not self.interleave:
            return super().order(position, key)
        tars, starts = self.tars_in_order(key)
        lanes = min(self.interleave, len(self))
        depth = -(-len(self) // lanes)
        while True:
            window, place = divmod(position, 256 * lanes)
            first = window * 256 * lanes
            place = first + shuffled(place, min(256 * lanes, depth * lanes - first), key + window)
            position = place % lanes * depth + place // lanes  # lane, and how deep in it
            if position < len(self):  # the last lane may be a little shorter: repeat, as shuffled() does
                break
        j = bisect.bisect_right(starts, position) - 1
        return int(self.first[tars[j]]) + position - starts[j]

    def tars_in_order(self, key: int) -> tuple[list[int], list[int]]:
        """The numbers of the tars in the order of the pass `key`, and the position at which each begins."""
        tars = [j for j in range(len(self.tars)) if self.first[j] < self.first[j + 1]]
        random.Random(key).shuffle(tars)
        return tars, [0, *itertools.accumulate(int(self.first[j + 1] - self.first[j]) for j in tars[:-1])]


class Mix(Source):
    """Several sources as one. With `weights`, every block of N samples has exactly these proportions, N being their
    common denominator; without, each pass visits every image of every source once."""

    def __init__(self, sources: list[Source], weights: list[Fraction] | None):
        self.sources, self.name = sources, " + ".join(s.name for s in sources)
        self.first = [0, *itertools.accumulate(len(s) for s in sources)]
        self.fingerprint = zlib.crc32(str([(len(s), s.fingerprint) for s in sources]).encode())
        self.quota = None  # cumulated number of samples per round from each source
        if weights:
            scale = math.lcm(*(w.denominator for w in weights))
            counts = [int(w * scale) for w in weights]
            self.quota = [0, *itertools.accumulate(c // math.gcd(*counts) for c in counts)]

    def __len__(self) -> int:
        return self.first[-1]

    def locate(self, i: int) -> tuple[Source, int]:
        """The source of image i, and the image's index there."""
        k = bisect.bisect_right(self.first, i) - 1
        return self.sources[k], i - self.first[k]

    def image(self, i: int) -> Tensor:
        source, own = self.locate(i)
        return source.image(own)

    def describe(self, i: int) -> str:
        source, own = self.locate(i)
        return source.describe(own)

    def replacement(self, i: int, rng: random.Random) -> int:
        if self.quota is None:
            return super().replacement(i, rng)
        source, own = self.locate(i)  # of the same source, so that the proportions stay exact
        return i - own + source.replacement(own, rng)

    def pick(self, s: int, seed) -> int:
        if self.quota is None:
            return super().pick(s, seed)
        turn, place = divmod(s, self.quota[-1])
        place = shuffled(place, self.quota[-1], key=random.Random(f"{seed}/mix/{turn}").getrandbits(64))
        k = bisect.bisect_right(self.quota, place) - 1
        place -= self.quota[k]
        return self.first[k] + self.sources[k].pick(turn * (self.quota[k + 1] - self.quota[k]) + place, f"{seed}/{k}")


# ----------------------------------------------------------------------------------------------------------------------
# Opening a source


CODE = r"(.+\.py):(\w+)"  # file and function


def open_source(spec: str, channels: int = 3) -> Source:
    """The source that `spec` names (see the top of this file). Raises ValueError with the fix in the message."""
    parts = split_mixture(spec)
    try:
        if len(parts) > 1 or parts[0][1]:
            source = Mix([open_source(part, channels) for part, _ in parts], [w for _, w in parts if w])
        else:
            source = open_single(spec)
    except OSError as error:
        raise ValueError(f"--data {spec!r}: {error.filename!r} cannot be read ({error.strerror or error})") from None
    source.spec, source.channels = spec, channels
    return source


def split_mixture(spec: str) -> list[tuple[str, Fraction | None]]:
    """"A*0.7,B*0.3" -> [(A, 7/10), (B, 3/10)]; "A" -> [(A, None)], also if A is a path that looks like a mixture."""
    if os.path.exists(os.path.expanduser(spec)):
        return [(spec, None)]
    parts = [part.strip() for part in spec.split(",")]
    weighted = [re.fullmatch(r"(.+)\*(\d*\.?\d+)", part) for part in parts]
    weights = [Fraction(w[2]).limit_denominator(1000) if w else None for w in weighted]
    if not all(parts):
        raise ValueError(f"--data {spec!r}: there is nothing before or after a comma")
    if any(weighted) and not all(weighted):
        raise ValueError(f"--data {spec!r}: give all sources a weight, as in A*0.7,B*0.3, or none")
    if any(w == 0 for w in weights):
        raise ValueError(f"--data {spec!r}: weights must be 0.001 or more")
    return [(w[1] if w else part, weight) for w, part, weight in zip(weighted, parts, weights)]


def open_single(spec: str) -> Source:
    name, options = parse_spec(spec)
    if name.endswith(".py") or re.fullmatch(CODE, name):
        opener, keys = open_dataset, ()
    else:
        opener, keys = NAMED.get(name, (open_path, ("interleave",) if name.endswith(".tar") else ("split",)))
    if unknown := options.keys() - set(keys):
        raise ValueError(f"--data {spec!r}: unknown key {min(unknown)!r}; {name} takes {', '.join(keys) or 'none'}"
                         + nearest(name, NAMED) * (name not in NAMED))
    return opener(name, options)


def parse_spec(spec: str) -> tuple[str, dict[str, str]]:
    """"Name:key=value:key=value" or "path:key=value" -> (name or path, {key: value})."""
    name, *rest = re.split(r":(\w+)=", spec)
    return name, dict(zip(rest[::2], rest[1::2]))


def eval_specs(spec: str, train: str = "", val: str = "") -> tuple[str, str | None]:
    """The specs of labeled images for training and for testing (None: leave-one-out): those given, else the TRAIN and
    VAL splits of the training source `spec`, if it has them."""
    if any(part != (train or spec) for part, _ in split_mixture(train or spec)):  # a mixture has no splits
        return train or spec, val or None
    name, options = parse_spec(train or spec)
    if train and "split" in options:
        return train, val or None
    if val:
        return eval_specs(train or spec)[0], val
    specs = [":".join([name, *map("=".join, (options | {"split": split}).items())]) for split in ("TRAIN", "VAL")]
    if "split" in NAMED.get(name, ((), ()))[1]:
        return tuple(specs)
    has = [any((Path(name).expanduser() / f).is_dir() for f in SPLIT_FOLDERS[s]) for s in ("TRAIN", "VAL")]
    return tuple(specs) if all(has) else (train or spec, None)


def open_on_all_ranks(specs: list[str | None], channels: int) -> list["Source | None"]:
    """open_source() of each spec, None for None; on rank 0 first, so that the others find its listings. Raises
    ValueError on all ranks if one of them cannot open them, or if they do not see the same files."""
    sources = []
    try:
        for first in (True, False):
            mine = specs if first == (dist.get_rank() == 0) else []
            on_all_ranks(lambda: sources.extend(None if spec is None else open_source(spec, channels) for spec in mine))
        seen = on_all_ranks(lambda: [(len(s), s.fingerprint) if s is not None else 0 for s in sources])
    except Failed as error:
        raise ValueError(str(error)) from None
    if any(other != seen[0] for other in seen):
        raise ValueError(f"the machines see different files in {specs}; give all of them the same copy")
    return sources


def check_readable(source) -> None:
    """Raises ValueError if none of ten images can be read."""
    for i in range(0, len(source), max(len(source) // 10, 1)):
        try:
            return source.image(i)
        except Exception as error:  # decoders raise anything on damaged files
            reason = short_reason(error)
    if isinstance(source, ImageFiles) and os.path.isfile(source.name):
        raise ValueError(f"{source.name} is read as a list of image paths, but none of the lines tried names a "
                         f"readable image; the last: {reason}")
    raise ValueError(f"no readable image in {source.name}; the last one tried: {reason}")


def without_code(spec: str, flag: str) -> str:
    """A spec read from a checkpoint, which anyone may have written. Raises ValueError if opening it would run code;
    `flag` is what the user can give it by instead."""
    if ".py:" in spec:
        raise ValueError(f"the checkpoint's images come from a function; if you trust it, pass {flag} {spec}")
    return spec


def choose_split(name: str, options: dict[str, str], splits=("TRAIN", "VAL")) -> str:
    split = options.get("split", "TRAIN")
    if split not in splits:
        raise ValueError(f"{name} has the splits {', '.join(splits[:-1])} and {splits[-1]}, not {split}")
    return split


def open_dataset(name: str, options: dict[str, str]) -> TorchDataset:
    """FILE.py:FUNCTION, where FUNCTION, called without arguments, returns the Dataset."""
    match = re.fullmatch(CODE, name)
    if not match:
        raise ValueError(f"--data {name}: name the function that returns the Dataset, as in {name}:photos")
    path = Path(match[1]).expanduser()
    if not path.is_file():
        raise ValueError(f"--data {name}: {path} does not exist")
    module_spec = importlib.util.spec_from_file_location(f"dataset {path.stem}", path)
    module = sys.modules[module_spec.name] = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        make = vars(module).get(match[2])
        dataset = make and make()
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        at = f" at line {lines[-1]} of {path}" if lines else ""
        raise ValueError(f"--data {name}: {type(error).__name__}{at}: {short_reason(error)}") from None
    if make is None:
        raise ValueError(f"--data {name}: {path} has no function {match[2]}{nearest(match[2], vars(module))}")
    return TorchDataset(dataset, name)


def open_digits(name: str, options: dict[str, str]) -> InMemory:
    split = choose_split(name, options)
    from sklearn.datasets import load_digits  # takes a second to import
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    halves = train_test_split(np.arange(len(digits.target)), test_size=0.2, random_state=0, stratify=digits.target)
    rows = halves[("TRAIN", "VAL").index(split)]
    pixels = (digits.images[rows] * (255 / 16)).round().astype(np.uint8)  # (n, 8, 8) of 17 shades
    return InMemory(pixels, digits.target[rows], f"{name} {split}", side=32)  # crops may begin between two pixels


def open_torchvision(name: str, options: dict[str, str]) -> InMemory:
    """CIFAR10, CIFAR100, MNIST and FashionMNIST; the last two also as plain idx files in a folder."""
    split, download = choose_split(name, options), options.get("download") == "yes"
    if options.get("download", "yes") != "yes":
        raise ValueError(f"{name}: download is yes or left out, not {options['download']}")
    debian = name == "FashionMNIST" and not download
    root = Path(options.get("root", "/usr/share/datasets/fashion-mnist" if debian else "~/data")).expanduser()
    if name.endswith("MNIST") and not download:
        prefix = "train" if split == "TRAIN" else "t10k"
        arrays = [read_idx(root, name, f"{prefix}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")]
        return InMemory(*arrays, f"{name} {split}")
    import torchvision  # takes half a second to import

    try:
        dataset = getattr(torchvision.datasets, name)(root, split == "TRAIN", download=download)
    except (RuntimeError, OSError) as error:
        hint = f"try again later ({short_reason(error)})" if download else "give its root=FOLDER, or add :download=yes"
        raise ValueError(f"{name} is not in {root}, or damaged; {hint}") from None
    return InMemory(np.asarray(dataset.data), np.asarray(dataset.targets), f"{name} {split}", classes=dataset.classes)


def read_idx(root: Path, dataset: str, name: str) -> np.ndarray:
    """An idx file of LeCun's format as an array; plain or .gz, in `root` or in torchvision's raw/ folder below it."""
    for folder, suffix in itertools.product(("", f"{dataset}/raw", "raw"), ("", ".gz")):
        path = root / folder / (name + suffix)
        if path.is_file():
            try:
                with (gzip.open if suffix else open)(path, "rb") as file:
                    raw = file.read()
                shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)  # raw[3] is the number of dimensions
                return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy()
            except (OSError, EOFError, IndexError, ValueError):
                raise ValueError(f"{path} is damaged or no idx file; copy or download it again") from None
    debian = "install Debian's dataset-fashion-mnist, " if dataset == "FashionMNIST" else ""
    raise ValueError(f"no {name}[.gz] in {root}; {debian}give another root=FOLDER, or add :root=FOLDER:download=yes")


def open_imagenet(name: str, options: dict[str, str]) -> Source:
    split = choose_split(name, options, ("TRAIN", "VAL", "TEST"))
    root = imagenet_root(name, options, "ImageNet:split=TRAIN:root=/path (splits: TRAIN, VAL, TEST)")
    folder = root / split.lower()
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist; ImageNet's root must hold the folders train and val")
    if "extra" not in options:
        return open_folder(folder)
    return ImageNetEntries(root, load_entries(options, f"entries-{split}.npy", "actual_index"), split)


def imagenet_root(name: str, options: dict[str, str], example: str) -> Path:
    """root=..., else a folder or link beside train.py that has the name of the data set in lower case."""
    beside = Path(__file__).parents[1] / name.lower()
    if "root" not in options and not beside.is_dir():
        raise ValueError(f"{name} is not at {beside}, where a folder or a link may be; name it by {example}, or use "
                         "any other folder of images: --data /my/photos")
    return Path(options.get("root", beside)).expanduser()


def load_entries(options: dict[str, str], name: str, column: str) -> np.ndarray:
    path = Path(options["extra"]).expanduser() / name
    fix = "write it by python -m support.sources extra"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; leave out :extra= to do without, or {fix}")
    try:
        entries = np.load(path, mmap_mode="r")
    except (ValueError, EOFError):
        entries = np.empty(0)
    if column not in (entries.dtype.names or ()):
        raise ValueError(f"{path} is damaged, or not such a table; {fix}")
    return entries


def open_imagenet22k(name: str, options: dict[str, str]) -> InTars:
    root = imagenet_root(name, options, "ImageNet22k:root=/path (the folder of the <wnid>.tar files)")
    if "extra" not in options:
        tars = sorted(glob.glob(f"{glob.escape(str(root))}/*.tar"))
        if not tars:
            raise ValueError(f"{root} holds no <wnid>.tar; if it holds folders of images, give --data {root}")
        source = open_tars(str(root), tars, interleave=0)
        source.labels, source.classes = source.shard, [Path(t).stem for t in tars]
        return source
    path = Path(options["extra"]).expanduser() / "entries.npy"
    entries = load_entries(options, "entries.npy", "start_offset")

    def convert() -> dict:
        shard, start = entries["class_index"].astype(np.int32), entries["start_offset"].astype(np.int64) + 512
        wnids = {int(c): str(entries["class_id"][row]) for c, row in zip(*np.unique(shard, return_index=True))}
        columns = dict(shard=shard, start=start, size=entries["end_offset"] - start)  # 512: the member's header
        return dict(stamps={str(path): os.stat(path).st_mtime_ns}, wnids=wnids, fingerprint=zlib.crc32(start),
                    **{name: torch.from_numpy(column) for name, column in columns.items()})

    table = cached_listing(f"entries {path.resolve()}", convert)
    tars = [str(root / f"{table['wnids'].get(c, '')}.tar") for c in range(max(table["wnids"]) + 1)]
    columns = [table[name].numpy() for name in ("shard", "start", "size")]
    return InTars(str(root), tars, *columns, table["fingerprint"], labels=columns[0])


def open_path(name: str, options: dict[str, str]) -> Source:
    path = Path(name).expanduser()
    if name.endswith(".tar"):
        interleave = options.get("interleave", "16")
        if not interleave.isdecimal():
            raise ValueError(f"--data {name!r}: interleave is the number of tars to read in turn, or 0")
        return open_tars(name, expand_tars(str(path)), int(interleave))
    if path.is_file():
        if options:
            raise ValueError(f"--data {name!r}: a list has no splits; name another list")
        return open_list(path)
    if not path.is_dir():
        raise ValueError(f"--data {name!r} is not a folder, a file, FILE.py:FUNCTION, or one of: {', '.join(NAMED)}"
                         + nearest(name, NAMED))
    folders = {s: next((path / f for f in SPLIT_FOLDERS[s] if (path / f).is_dir()), None) for s in SPLIT_FOLDERS}
    if "split" in options and folders.get(options["split"]) is None:
        names = ", ".join(SPLIT_FOLDERS.get(options["split"], ("TRAIN and VAL are the splits of a folder",)))
        raise ValueError(f"{path} has no sub-folder for split {options['split']} ({names})")
    return open_folder(folders[options.get("split", "TRAIN")] if "split" in options or all(folders.values()) else path)


def expand_tars(pattern: str) -> list[str]:
    """x-{000..099}.tar and wildcards -> the files. Raises ValueError if one is missing."""
    patterns = [pattern]
    if found := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        numbers = range(int(found[1]), int(found[2]) + 1)
        patterns = [pattern.replace(found[0], str(n).zfill(len(found[1]))) for n in numbers]
    tars = [tar for pattern in patterns for tar in sorted(glob.glob(pattern)) or [pattern]]
    if missing := [tar for tar in tars if not os.path.isfile(tar)]:
        raise ValueError(f"--data {pattern!r}: " + (f"no file matches {missing[0]}" if "*" in missing[0] else
                                                    f"{missing[0]} does not exist"))
    return tars


NAMED = {  # name: (function that opens it, the keys it takes)
    "digits": (open_digits, ("split",)), "ImageNet": (open_imagenet, ("split", "root", "extra")),
    "ImageNet22k": (open_imagenet22k, ("root", "extra")),
    **{name: (open_torchvision, ("split", "root", "download"))
       for name in ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST")}}


# ----------------------------------------------------------------------------------------------------------------------
# Listings: made once, with a progress bar, then cached in ~/.cache/dinov2 and mapped into memory


def cached_listing(what: str, make) -> dict:
    """make()'s tables: {"stamps": {path: mtime in ns}, name: tensor or plain data}. They are made again once the time
    of a path has changed."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dinov2"
    path = folder / f"{hashlib.sha1(os.fsencode(what)).hexdigest()[:16]}.listing3"
    try:
        listing = torch.load(path, mmap=True, weights_only=True)
        if all(os.stat(p).st_mtime_ns == t for p, t in listing["stamps"].items()):
            return listing
    except Exception:  # there is none, it is damaged, or a path is gone: list again
        pass
    listing = make()
    try:
        write_file(path, functools.partial(torch.save, listing))
        return torch.load(path, mmap=True, weights_only=True)
    except (OSError, ValueError) as error:
        print(f"the listing could not be cached ({error}); each start, and each worker, may have to list again",
              file=sys.stderr)
        return listing


class ListingBuilder:
    """Collects file names and labels into the tables of a listing."""

    def __init__(self):
        self.names, self.ends, self.labels = bytearray(), array("q", [0]), array("i")

    def add(self, name: str, label: int) -> None:
        self.names += os.fsencode(name)
        self.ends.append(len(self.names))
        self.labels.append(label)

    def tables(self, classes: dict[str, int] | None) -> dict:
        """`classes` maps names to the labels used so far, which are renumbered in the order of the names; "" is no
        label."""
        names = sorted(c for c in classes or () if c)
        numbers = {name: i for i, name in enumerate(names)}
        renumbered = np.array([numbers.get(c, -1) for c in classes or ()], np.int32)
        labels = renumbered[np.array(self.labels, np.int32)] if classes else renumbered
        tables = dict(names=torch.frombuffer(self.names or bytearray(1), dtype=torch.uint8), classes=names,
                      ends=torch.from_numpy(np.array(self.ends)), labels=torch.from_numpy(labels))
        return tables | dict(fingerprint=zlib.crc32(tables["labels"].numpy(), zlib.crc32(self.names)))


def open_folder(root: Path) -> ImageFiles:
    """All images below `root`, the files of each folder in the order of their names, before its sub-folders. Their
    first sub-folder is their label, if every image is in one and there are at least two."""
    root = root.resolve()
    try:
        source = ImageFiles(root, cached_listing(f"folder {root}", lambda: list_folder(root)))
    except PermissionError as error:
        raise ValueError(f"{error.filename} may not be read by this user; move it or change its mode") from None
    if len(source) == 0:
        tars = f"; its tar files are named {root}/*.tar" if any(root.glob("*.tar")) else ""
        raise ValueError(f"{root} holds no image ({', '.join(SUFFIXES)}){tars}")
    return source


def list_folder(root: Path) -> dict:
    listing, classes, stamps, seen = ListingBuilder(), {}, {}, set()
    todo, links, linked = [""], [], False
    with tqdm(desc=f"listing {root}", unit=" images", disable=None) as bar:
        while todo or links:
            linked = linked or not todo  # links come last: a folder is listed by its real name, if it has one
            folder = todo.pop() if todo else links.pop(0)
            info = os.stat(root / folder)
            if linked and (info.st_dev, info.st_ino) in seen:  # two links to one folder, or one that leads back up
                continue
            seen.add((info.st_dev, info.st_ino))
            stamps[str(root / folder)] = info.st_mtime_ns
            files, folders = [], []
            for entry in os.scandir(root / folder):
                if entry.name.startswith(".") or links_to_itself(entry):  # hidden, such as the ._ files of macOS
                    continue
                if entry.is_dir():
                    (links if entry.is_symlink() else folders).append(os.path.join(folder, entry.name))
                elif entry.name.lower().endswith(SUFFIXES) and entry.is_file():  # a file, or a link to one
                    files.append(os.path.join(folder, entry.name))
            for name in sorted(files):
                listing.add(name, classes.setdefault(folder.split(os.sep)[0], len(classes)))
            todo += sorted(folders, reverse=True)
            links.sort()
            bar.update(len(files))
    labeled = len(classes) > 1 and "" not in classes
    return dict(stamps=stamps, **listing.tables(classes if labeled else None))


def links_to_itself(entry: os.DirEntry) -> bool:
    try:
        return entry.is_symlink() and not os.stat(entry.path)
    except OSError as error:
        return error.errno == errno.ELOOP


def open_list(path: Path) -> ImageFiles:
    """A text file with one path per line, absolute or relative to the file, and optionally a tab and a label."""
    path = path.resolve()
    source = ImageFiles(path.parent, cached_listing(f"list {path}", lambda: read_list(path)))
    source.name = str(path)
    if len(source) == 0:
        raise ValueError(f"{path} names no image; write one path per line")
    return source


def read_list(path: Path) -> dict:
    listing, classes, unlabeled = ListingBuilder(), {}, 0
    stamps = {str(path): os.stat(path).st_mtime_ns}
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            for line in tqdm(file, desc=f"reading {path}", unit=" images", disable=None):
                name, _, label = line.strip("\r\n").partition("\t")
                if name.strip():
                    unlabeled += not label
                    listing.add(name, classes.setdefault(label, len(classes)))
                if "\0" in name:
                    raise ValueError
    except (ValueError, PermissionError):
        raise ValueError(f"{path} is not readable as text; --data takes a folder, or a list with one image path per "
                         "line") from None
    return dict(stamps=stamps, **listing.tables(classes if unlabeled < len(listing.labels) else None))


def open_tars(name: str, tars: list[str], interleave: int) -> InTars:
    tars = [os.path.abspath(tar) for tar in tars]
    table = cached_listing("\n".join(["tars", *tars]), lambda: list_tars(tars))
    if len(table["shard"]) == 0:
        raise ValueError(f"{name}: there is no image in {tars[0]}" + " or the others" * (len(tars) > 1))
    labels = table["labels"].numpy() if len(table["labels"]) else None
    return InTars(name, tars, *(table[key].numpy() for key in ("shard", "start", "size")), table["fingerprint"],
                  labels, interleave=interleave)


def list_tars(tars: list[str]) -> dict:
    """Where the images are, found by jumping from header to header; labels from the .cls members of the same name."""
    columns, stamps = {"shard": array("i"), "start": array("q"), "size": array("q"), "labels": array("i")}, {}
    for j, path in enumerate(tqdm(tars, desc="listing tars", unit="tar", disable=None)):
        stamps[path], keys, labels, end = os.stat(path).st_mtime_ns, [], {}, 0
        try:
            with tarfile.open(path, "r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # it would keep them all
                    end = member.offset_data + member.size
                    key, _, suffix = member.name.rpartition("/")[2].partition(".")
                    key = member.name[: len(member.name) - len(suffix)]
                    if member.isreg() and member.name.lower().endswith(SUFFIXES):
                        keys.append(key)
                        for column, value in zip(columns.values(), (j, member.offset_data, member.size)):
                            column.append(value)
                    elif member.isreg() and suffix == "cls":
                        labels[key] = int(tar.extractfile(member).read())
            if os.path.getsize(path) < end + 512:
                raise tarfile.ReadError("its end is missing")
        except tarfile.TarError as error:
            if not keys:
                raise ValueError(f"{path} is not a plain tar file ({error}); unpack it if it is compressed") from None
            print(f"{path} is damaged after {len(keys)} images ({error}); the rest of it is skipped", file=sys.stderr)
        except ValueError:
            raise ValueError(f"{path}: the label {member.name} is not a number") from None
        columns["labels"].extend(labels.get(key, -1) for key in keys)
    tables = {name: torch.from_numpy(np.array(column)) for name, column in columns.items()}
    if (tables["labels"] < 0).all():
        tables["labels"] = tables["labels"][:0]
    fingerprint = functools.reduce(lambda crc, table: zlib.crc32(table.numpy(), crc), tables.values(), 0)
    return dict(stamps=stamps, fingerprint=fingerprint, **tables)


def image_paths(names: list[str]) -> list[str]:
    """The files named, and all images below the folders named, in order, each once. Raises ValueError for names that
    do not exist."""
    paths = {}
    for name in names:
        if not os.path.exists(name):
            raise ValueError(f"no such image or folder: {name}")
        folder = open_folder(Path(name)) if os.path.isdir(name) else None
        for path in [name] if folder is None else map(folder.describe, range(len(folder))):
            paths.setdefault(os.path.realpath(path), path)
    return list(paths.values())


# ----------------------------------------------------------------------------------------------------------------------
# The official metadata of ImageNet


ENTRY = [("actual_index", "<u4"), ("class_index", "<u4")]


def write_extra(spec: str) -> None:
    """Writes the .npy files that the official code reads instead of listing folders. Raises ValueError."""
    name, options = parse_spec(spec)
    if name not in ("ImageNet", "ImageNet22k") or not {"root", "extra"} <= options.keys():
        raise ValueError(f"extra needs ImageNet:root=FOLDER:extra=FOLDER, or the same for ImageNet22k, not {spec!r}")
    root, extra = Path(options["root"]).expanduser(), Path(options["extra"]).expanduser()
    arrays = extra_of_imagenet22k(root) if name == "ImageNet22k" else {}
    if name == "ImageNet":
        splits = ("TRAIN", "VAL", "TEST")
        splits = (choose_split(name, options, splits),) if "split" in options else splits
        for split in [s for s in splits if (root / s.lower()).is_dir()]:
            arrays |= extra_of_imagenet(root, split)
    if not arrays:
        raise ValueError(f"{root} has no folder train, val or test")
    extra.mkdir(parents=True, exist_ok=True)
    for name, values in arrays.items():
        np.save(extra / name, values)
        print(f"{extra / name}: {len(values):,} entries")


def extra_of_imagenet(root: Path, split: str) -> dict[str, np.ndarray]:
    """Class names come from root/labels.txt (rows "wnid,name"); without it they are the wnids."""
    source = open_folder(root / split.lower())
    paths = [Path(source.describe(i)) for i in range(len(source))]
    if strange := [path for path in paths if not re.fullmatch(r".+_\d+", path.stem)]:
        raise ValueError(f"{strange[0]} is not named like an ImageNet file, such as n01440764_10.JPEG; move it away")
    numbers = [int(path.stem.rpartition("_")[2]) for path in paths]
    if split == "TEST":
        rows = [(number, 2**32 - 1, "", "") for number in sorted(numbers)]
        return {"entries-TEST.npy": np.array(rows, [*ENTRY, ("class_id", "<U1"), ("class_name", "<U1")])}
    if source.classes is None:
        raise ValueError(f"{root / split.lower()} has no class folders; sort its images into <wnid>/ first")
    labels = root / "labels.txt"
    rows = csv.reader(labels.read_text().splitlines()) if labels.is_file() else ()
    names = {row[0]: row[1] for row in rows if len(row) > 1}
    names = [names.get(wnid, wnid) for wnid in source.classes]
    text = [("class_id", f"<U{max(map(len, source.classes))}"), ("class_name", f"<U{max(map(len, names))}")]
    rows = [(n, c, source.classes[c], names[c]) for n, c in zip(numbers, source.labels.tolist())]
    return {f"entries-{split}.npy": np.array(rows, [*ENTRY, *text]), f"class-ids-{split}.npy": np.array(source.classes),
            f"class-names-{split}.npy": np.array(names)}


def extra_of_imagenet22k(root: Path) -> dict[str, np.ndarray]:
    """From root/blocks/<wnid>.log, the output of `tar -tR`, where it exists; else from the tar itself."""
    tars = sorted(root.glob("*.tar"))
    if not tars:
        raise ValueError(f"{root} holds no <wnid>.tar")
    rows = []
    for j, tar in enumerate(tqdm(tars, desc="reading tars", unit="tar", disable=None)):
        log = root / "blocks" / f"{tar.stem}.log"
        if log.is_file():
            lines = re.findall(r"^block (\d+): (.*)$", log.read_text(), re.MULTILINE)
            starts, names = [512 * int(block) for block, _ in lines], [name for _, name in lines]
        else:
            try:
                with tarfile.open(tar, "r:") as file:
                    members = [member for member in file.getmembers() if member.isreg()]
            except tarfile.TarError as error:
                raise ValueError(f"{tar} is damaged ({error}); copy it again") from None
            starts, names = [m.offset for m in members], [m.name for m in members]
            starts.append(members[-1].offset_data + -(-members[-1].size // 512) * 512 if members else 0)
        for name, start, end in zip(names, starts, starts[1:]):
            if name != "n06470073_47249.JPEG":  # known to be damaged; the official tables leave it out as well
                rows.append((j, tar.stem, start, end, name))
    if rows and max(row[3] for row in rows) >= 2**32:
        raise ValueError(f"a tar in {root} is larger than the format's 4 GB; leave out :extra= when training")
    widths = [f"<U{max((len(row[k]) for row in rows), default=1)}" for k in (1, 4)]
    fields = [("class_index", "<u4"), ("class_id", widths[0]), ("start_offset", "<u4"), ("end_offset", "<u4"),
              ("filename", widths[1])]
    return {"entries.npy": np.array(rows, fields), "class-ids.npy": np.array([tar.stem for tar in tars])}


# ----------------------------------------------------------------------------------------------------------------------
# Commands: stats, check, extra


class PixelSums(torch.utils.data.Dataset):
    """sums[k] -> (i, sums, reason) for image i = indices[k]: per channel the sum of its pixels, of their squares, and
    their number, (3, C) float64; and the reason if it cannot be read, else ""."""

    def __init__(self, source: Source, indices):
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, k: int) -> tuple[int, Tensor, str]:
        try:
            image = self.source.image(self.indices[k])
        except Exception as error:  # decoders raise anything on damaged files
            return self.indices[k], torch.zeros(3, self.source.channels, dtype=torch.float64), short_reason(error)
        sums = torch.zeros(3, len(image), dtype=torch.float64)
        for rows in image.split(256, dim=1):  # a whole large image would take much memory as float64
            x = rows.double().div_(65535 if rows.dtype == torch.uint16 else 255).flatten(1)  # (C, 256*W)
            sums += torch.stack([x.sum(1), x.square().sum(1), torch.full_like(x[:, 0], x.shape[1])])
        return self.indices[k], sums, ""


def ignore_interrupt(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the main one responds


def read_all(source: Source, indices, num_workers: int):
    """The items of PixelSums, with a progress bar."""
    loader = torch.utils.data.DataLoader(PixelSums(source, indices), batch_size=None, worker_init_fn=ignore_interrupt,
                                         num_workers=worker_count(num_workers))
    return tqdm(loader, desc=f"reading {source.name}", unit=" images", disable=None)


def measure_stats(source: Source, n: int, num_workers: int = 0) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, in [0, 1], over all pixels of n random images (0: of all images)."""
    n = min(n, len(source)) or len(source)
    indices = range(n) if n == len(source) else [shuffled(i, len(source), 0) for i in range(n)]
    total, n_bad = 0, 0
    for _, sums, reason in read_all(source, indices, num_workers):
        total, n_bad = total + sums, n_bad + bool(reason)
    if n_bad:
        print(f"{n_bad:,} of {n:,} images cannot be read; to list them: python -m support.sources check "
              f"{shlex.quote(source.spec)}{f' --in-chans {source.channels}' * (source.channels != 3)}", file=sys.stderr)
    if not total[2].any():
        raise ValueError(f"no image of {source.name} can be read")
    mean = total[0] / total[2]
    return mean.tolist(), (total[1] / total[2] - mean**2).clamp(min=0).sqrt().tolist()


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("command", choices=("stats", "check", "extra"), help="see above")
    parser.add_argument("spec", help="the source")
    parser.add_argument("--in-chans", type=at_least(1), default=3, help="channels of the images")
    parser.add_argument("--images", type=at_least(0), default=10_000, help="stats: images to measure; 0: all")
    parser.add_machine_flags("num-workers")
    args = parser.parse_args(argv)
    if args.command == "extra":
        return write_extra(args.spec)
    source = open_source(args.spec, args.in_chans)
    if args.command == "stats":
        mean, std = measure_stats(source, args.images, args.num_workers)
        print(*(f"--{name} {' '.join(f'{v:.4g}' for v in values)}" for name, values in (("mean", mean), ("std", std))))
    else:
        rows = read_all(source, range(len(source)), args.num_workers)
        bad = [f"{source.describe(i)}\t{reason}" for i, _, reason in rows if reason]
        print(*bad, sep="\n", end="\n" * bool(bad))
        print(f"{len(bad):,} of {len(source):,} images of {source.name} cannot be read")
        sys.exit(bool(bad))


if __name__ == "__main__":
    run(main)
