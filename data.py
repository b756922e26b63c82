"""Images for DINOv2: where they come from, multi-crop, block masks, and color augmentation on the device.

A source is named by one string:
    /any/folder                        all images below it; with class sub-folders also labels; train/ and val/
                                       sub-folders are recognized as splits
    photos.txt                         a file with one image path per line, a tab and a label behind it if you like
    /data/shards/*.tar                 tar shards (WebDataset), or x-{000..099}.tar; labels from .cls members; read in
                                       16 places at once, from front to back, mixed; :interleave=0 reads at random
    ImageNet:split=TRAIN:root=/data/imagenet[:extra=/data/extra]       train/<wnid>/*.JPEG, val/<wnid>/*.JPEG, test/
    ImageNet22k:root=/data/in22k[:extra=/data/extra]                   <wnid>.tar
    CIFAR10, CIFAR100, MNIST, FashionMNIST[:root=…][:download=yes]     as torchvision keeps them
    digits                             1,797 scans shipped with scikit-learn, a fifth held out as split=VAL
    A*0.7,B*0.3                        any of these mixed in exact shares; A,B: all images of both once per pass

    python data.py stats /my/photos                # mean and standard deviation per channel, for --mean and --std
    python data.py check /my/photos                # reads every image, lists those that cannot be; exit code 1 if any
    python data.py extra ImageNet:root=/data/imagenet:extra=/data/extra     # writes the official metadata; or 22k's

    source = open_source("digits")
    batches = TrainBatches(source, batch_size=128, ...)      # batches[step] is the whole batch of that step
    images = augment(batch.global_crops, batch.global_ops, MEAN, STD)

Nothing here keeps random state. Sample number s (0, 1, 2, … over the whole run) alone decides which image, which crops
and which colors; the step and the group of images decide the masks. So any step can be made again at any time, by any
process or worker. A worker decodes an image once and cuts uint8 crops; all photometric work is batched, on the device.
No model, no config in this file. Apache License 2.0.
"""
import argparse
import bisect
import csv
import ctypes
import difflib
import errno
import functools
import glob
import gzip
import hashlib
import io
import itertools
import math
import multiprocessing.util
import os
import random
import re
import signal
import stat
import struct
import sys
import tarfile
import time
import zlib
from array import array
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which all released models expect
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".npy")
SPLIT_FOLDERS = {"TRAIN": ("train", "training"), "VAL": ("val", "valid", "validation", "test")}
MAX_PIXELS = 2**27  # an image of more is refused, lest a small file fill the memory; Pillow refuses 2**27.4 itself
MAX_BYTES = 2**30  # likewise a file
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # what Pillow may take a file for, whatever its name


# ----------------------------------------------------------------------------------------------------------------------
# Image files


def decode(data: np.ndarray, channels: int = 3) -> Tensor:
    """The bytes of an image file, uint8 (n,), as an upright image (channels, H, W), uint8 or, of deep gray, uint16.

    Gray is repeated, alpha dropped or made opaque, color turned to gray as `channels` wants it; other numbers of
    channels come from .npy arrays (H, W, C), also for 16-bit color, and the pages of a TIFF. Raises whatever a decoder
    does if the file cannot be decoded.
    """
    if data[:2].tobytes() == b"\x1f\x8b":  # some files of ImageNet-22k are compressed once more
        data = np.frombuffer(bytearray(zlib.decompressobj(31).decompress(data, MAX_BYTES)), np.uint8)
    kind = data[:6].tobytes()
    if not kind:
        raise ValueError("empty file")
    if kind == b"\x93NUMPY":
        image = read_array(data)
    elif kind.startswith(b"\xff\xd8\xff") and channels in (1, 3):  # a damaged PNG would crash torchvision's decoder
        image = read_jpeg(data, channels)
    else:
        image = read_by_pillow(data, channels)
    return as_channels(image, channels)


def check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than data.MAX_PIXELS")


def read_jpeg(data: np.ndarray, channels: int) -> Tensor:
    """By torchvision, which is faster; what it refuses, or all if it has no decoder any more (0.29 says it will go), by
    Pillow."""
    at = 2
    while at + 9 < len(data) and data[at] == 0xFF:  # the segments, until the one with the size
        marker, length, _, height, width = struct.unpack_from(">xBHBHH", data, at)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            check_size(width, height)
            break
        at += 2 + length
    else:
        return read_by_pillow(data, channels)
    try:
        modes = torchvision.io.ImageReadMode
        return torchvision.io.decode_jpeg(torch.from_numpy(data), modes.RGB if channels == 3 else modes.GRAY,
                                          apply_exif_orientation=True)
    except (RuntimeError, AttributeError):
        return read_by_pillow(data, channels)


def read_by_pillow(data: np.ndarray, channels: int) -> Tensor:
    with Image.open(io.BytesIO(data), formats=FORMATS) as file:
        check_size(*file.size)
        n_pages = getattr(file, "n_frames", 1) if channels not in (1, 3, 4) else 1
        if n_pages != channels:
            return page(file, channels)
        pages = []
        for i in range(n_pages):
            file.seek(i)
            check_size(*file.size)
            pages.append(page(file, 1))
        return torch.cat(pages)


def page(file: Image.Image, channels: int) -> Tensor:
    """One page of an open file: gray if it is so or `channels` is 1, RGBA if that is 4, else RGB; deep gray uint16."""
    if file.mode[0] in "IF":  # 16-bit gray is I;16, in older versions I
        pixels = np.asarray(file)
        if pixels.dtype.kind == "f" or pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"pixels of type {pixels.dtype} outside of 0 to 65535; save them as 16-bit integers")
        return torch.from_numpy(pixels.astype(np.uint16))[None]
    gray = channels == 1 or file.mode in ("1", "L")
    return TF.pil_to_tensor(ImageOps.exif_transpose(file).convert("L" if gray else "RGBA" if channels == 4 else "RGB"))


def read_array(data: np.ndarray) -> Tensor:
    """A .npy file of uint8 or uint16 (H, W) or (H, W, C) as (C, H, W)."""
    pixels = np.load(io.BytesIO(data), allow_pickle=False)
    if pixels.dtype not in (np.uint8, np.uint16) or pixels.ndim not in (2, 3) or pixels.size == 0:
        raise ValueError(f"array of {pixels.dtype} {pixels.shape}; images are uint8 or uint16, (H, W) or (H, W, C)")
    check_size(*pixels.shape[:2])
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)


def as_channels(image: Tensor, channels: int) -> Tensor:
    """(c, H, W) -> (channels, H, W). Raises ValueError if there is no usual way."""
    c = len(image)
    if c == channels:
        return image
    if channels == 4 and c in (1, 3):  # opaque
        white = torch.full_like(image[:1], 65535 if image.dtype == torch.uint16 else 255)
        return torch.cat([image.expand(3, -1, -1), white])
    if c == 1:
        return image.expand(channels, -1, -1)
    if c == 3 and channels == 1:
        return luma(image[None].float())[0].round().to(image.dtype)
    if c == 4 and channels == 3:
        return image[:3]
    raise ValueError(f"it has {c} channels, not {channels}")


# ----------------------------------------------------------------------------------------------------------------------
# Sources


class Source:
    """Numbered images. `labels` (n,) integers, -1 for none, or None; `classes`: what they number, a list of names, or
    None where the numbers speak for themselves; `name` for messages; `fingerprint`, the same on every machine that sees
    the same."""

    name, labels, classes, fingerprint = "", None, None, 0
    spec, channels = "", 3  # as given to open_source

    def __len__(self) -> int:
        raise NotImplementedError

    def encoded(self, i: int) -> np.ndarray:
        """The bytes of image i's file, uint8 (n,). Raises whatever reading does."""
        raise NotImplementedError

    def describe(self, i: int) -> str:
        raise NotImplementedError

    def image(self, i: int) -> Tensor:
        """Image i, uint8 or uint16 (channels, H, W). Raises whatever reading or decoding does."""
        return decode(self.encoded(i), self.channels)

    def order(self, position: int, key: int) -> int:
        """The image that comes at `position` of the pass over all images named by `key`."""
        return shuffled(position, len(self), key)

    def pick(self, s: int, seed) -> int:
        """Index of the image of sample s: every n samples each of the n images comes once, in a new order."""
        epoch, position = divmod(s, len(self))
        return self.order(position, key=random.Random(f"{seed}/epoch/{epoch}").getrandbits(64))

    def replacement(self, i: int, rng: random.Random) -> int:
        """An image to take the place of image i, which cannot be read."""
        return rng.randrange(len(self))

    def __reduce__(self):  # worker processes that are not forked open it again, instead of a copy of all tables
        return (reopen, (self.spec, self.channels, self.fingerprint)) if self.spec else super().__reduce__()


def reopen(spec: str, channels: int, fingerprint: int) -> Source:
    source = open_source(spec, channels)
    if source.fingerprint != fingerprint:
        raise Unreadable(f"{source.name} has changed while the run was starting; start it again")
    return source


class InMemory(Source):
    """A source that fits in memory: `pixels` uint8 (n, H, W) or (n, H, W, 3), served enlarged to `side`."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, name: str, side: int | None = None, classes=None):
        self.pixels, self.labels, self.name = torch.from_numpy(pixels), labels.astype(np.int64), name
        self.classes, self.fingerprint = classes, zlib.crc32(pixels)
        self.images = self.pixels.permute(0, 3, 1, 2) if pixels.ndim == 4 else self.pixels[:, None]
        if side:
            self.images = TF.resize(self.images, [side, side], InterpolationMode.BICUBIC, antialias=True)

    def __len__(self) -> int:
        return len(self.images)

    def image(self, i: int) -> Tensor:
        return as_channels(self.images[i], self.channels)

    def describe(self, i: int) -> str:
        return f"{self.name}[{i}]"


class ImageFiles(Source):
    """Files by a listing of names, kept as one byte string with offsets and mapped into memory: small for a hundred
    million files, and shared by all processes of a machine."""

    def __init__(self, root: Path, listing: dict):
        self.root, self.name = str(root), str(root)
        self.names, self.ends = listing["names"].numpy(), listing["ends"].numpy()
        self.fingerprint = listing["fingerprint"]
        self.labels = listing["labels"].numpy() if len(listing["labels"]) else None
        self.classes = listing["classes"] or None

    def __len__(self) -> int:
        return len(self.ends) - 1

    def encoded(self, i: int) -> np.ndarray:
        return read_file(self.describe(i))

    def describe(self, i: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[self.ends[i] : self.ends[i + 1]].tobytes()))


class ImageNetEntries(Source):
    """ImageNet through the official metadata, `extra`/entries-SPLIT.npy, instead of listing the folders."""

    def __init__(self, root: Path, entries: np.ndarray, split: str):
        self.root, self.entries, self.split, self.name = root, entries, split, f"{root} ({split})"
        self.labels = None if split == "TEST" else entries["class_index"].astype(np.int32)
        self.fingerprint = zlib.crc32(np.ascontiguousarray(entries["actual_index"]))

    def __len__(self) -> int:
        return len(self.entries)

    def encoded(self, i: int) -> np.ndarray:
        return read_file(self.describe(i))

    def describe(self, i: int) -> str:
        number, wnid = self.entries["actual_index"][i], self.entries["class_id"][i]
        name = {"TRAIN": f"train/{wnid}/{wnid}_{number}.JPEG", "VAL": f"val/{wnid}/ILSVRC2012_val_{number:08d}.JPEG",
                "TEST": f"test/ILSVRC2012_test_{number:08d}.JPEG"}[self.split]
        return os.path.join(self.root, name)


class InTars(Source):
    """Images inside of tar files. Image i is bytes start[i] to start[i] + size[i] of tar number shard[i]; the images of
    a tar have consecutive numbers. With `interleave` reading advances from front to back, in that many places at once.
    """

    def __init__(self, name: str, tars: list[str], shard, start, size, fingerprint: int, labels=None, classes=None,
                 interleave: int = 0):
        self.name, self.tars, self.shard, self.start, self.size = name, tars, shard, start, size
        self.fingerprint, self.labels, self.classes, self.interleave = fingerprint, labels, classes, interleave
        self.first = np.searchsorted(shard, np.arange(len(tars) + 1))  # (tars + 1,) first image of each tar, and n
        self.tars_in_order = functools.lru_cache(maxsize=4)(self.tars_in_order)

    def __len__(self) -> int:
        return len(self.shard)

    def encoded(self, i: int) -> np.ndarray:
        size = int(self.size[i])
        if size > MAX_BYTES:
            raise ValueError(f"{size:,} bytes are more than data.MAX_BYTES")
        data = np.fromfile(self.tars[self.shard[i]], np.uint8, size, offset=int(self.start[i]))
        if len(data) < size:
            raise EOFError("the tar file ends within this image")
        return data

    def describe(self, i: int) -> str:
        return f"{self.tars[self.shard[i]]} at byte {int(self.start[i])}"

    def order(self, position: int, key: int) -> int:
        """With `interleave` = L: the tars in random order make one long row, cut into L equal parts. Reading advances
        through all parts at the same pace; the next 256 images of each are one window, whose order is random. Like a
        shuffle buffer of 256 * L images, but a permutation of which any element can be computed alone."""
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
            if position < len(self):  # the last lane may be a little shorter: walk on as shuffled() does
                break
        j = bisect.bisect_right(starts, position) - 1
        return int(self.first[tars[j]]) + position - starts[j]

    def tars_in_order(self, key: int) -> tuple[list[int], list[int]]:
        """The numbers of the tars in the order of the pass `key`, and at which position each begins."""
        tars = [j for j in range(len(self.tars)) if self.first[j] < self.first[j + 1]]
        random.Random(key).shuffle(tars)
        return tars, [0, *itertools.accumulate(int(self.first[j + 1] - self.first[j]) for j in tars[:-1])]


class Mix(Source):
    """Several sources as one. With `weights` they come in these shares, exactly in every run of samples as long as the
    weights' common denominator; without, every image comes once per pass."""

    def __init__(self, sources: list[Source], weights: list[Fraction] | None):
        self.sources, self.name = sources, " + ".join(s.name for s in sources)
        self.first = [0, *itertools.accumulate(len(s) for s in sources)]
        self.fingerprint = zlib.crc32(str([(len(s), s.fingerprint) for s in sources]).encode())
        self.quota = None  # how many of a round of samples come from each source, cumulated
        if weights:
            scale = math.lcm(*(w.denominator for w in weights))
            counts = [int(w * scale) for w in weights]
            self.quota = [0, *itertools.accumulate(c // math.gcd(*counts) for c in counts)]

    def __len__(self) -> int:
        return self.first[-1]

    def whose(self, i: int) -> tuple[Source, int]:
        """The source of image i and the image's number there."""
        k = bisect.bisect_right(self.first, i) - 1
        return self.sources[k], i - self.first[k]

    def image(self, i: int) -> Tensor:
        source, i = self.whose(i)
        return source.image(i)

    def describe(self, i: int) -> str:
        source, i = self.whose(i)
        return source.describe(i)

    def replacement(self, i: int, rng: random.Random) -> int:
        if self.quota is None:
            return super().replacement(i, rng)
        source, own = self.whose(i)
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


def open_source(spec: str, channels: int = 3) -> Source:
    """The source named by `spec` (see the top of this file), serving images of so many channels. Raises ValueError with
    the fix in the message."""
    parts = split_mixture(spec)
    try:
        if len(parts) > 1 or parts[0][1]:
            source = Mix([open_source(part, channels) for part, _ in parts], [w for _, w in parts if w])
        else:
            source = open_single(spec)
    except OSError as error:
        raise ValueError(f"--data {spec!r}: {error.filename} cannot be read ({error.strerror or error})") from None
    source.spec, source.channels = spec, channels
    return source


def split_mixture(spec: str) -> list[tuple[str, Fraction | None]]:
    """"A*0.7,B*0.3" -> [(A, 7/10), (B, 3/10)]; "A" -> [(A, None)], also for a path that looks like a mixture."""
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
    opener, keys = NAMED.get(name, (open_path, ("interleave",) if name.endswith(".tar") else ("split",)))
    if unknown := options.keys() - set(keys):
        raise ValueError(f"--data {spec!r}: unknown key {min(unknown)!r}; {name} takes {', '.join(keys)}"
                         + nearest(name, NAMED) * (name not in NAMED))
    return opener(name, options)


def parse_spec(spec: str) -> tuple[str, dict[str, str]]:
    """"Name:key=value:key=value" or "path:key=value" -> (name or path, {key: value})."""
    name, *rest = re.split(r":(\w+)=", spec)
    return name, dict(zip(rest[::2], rest[1::2]))


def join_spec(name: str, options: dict[str, str]) -> str:
    return ":".join([name] + [f"{key}={value}" for key, value in options.items()])


def eval_specs(spec: str, train: str = "", val: str = "") -> tuple[str, str | None]:
    """The specs of the labeled images to learn from and to classify (None: leave one out): those given, else the TRAIN
    and VAL splits of the training source `spec`, as far as it has them."""
    if any(part != (train or spec) for part, _ in split_mixture(train or spec)):  # a mixture has no splits
        return train or spec, val or None
    name, options = parse_spec(train or spec)
    if train and "split" in options:
        return train, val or None
    if val:
        return eval_specs(train or spec)[0], val
    specs = [join_spec(name, {**options, "split": split}) for split in ("TRAIN", "VAL")]
    if "split" in NAMED.get(name, ((), ()))[1]:
        return tuple(specs)
    has = [any((Path(name).expanduser() / f).is_dir() for f in SPLIT_FOLDERS[s]) for s in ("TRAIN", "VAL")]
    return tuple(specs) if all(has) else (train or spec, None)


def take_split(name: str, options: dict[str, str], splits=("TRAIN", "VAL")) -> str:
    split = options.get("split", "TRAIN")
    if split not in splits:
        raise ValueError(f"{name} has the splits {', '.join(splits[:-1])} and {splits[-1]}, not {split}")
    return split


def open_digits(name: str, options: dict[str, str]) -> InMemory:
    split = take_split(name, options)
    from sklearn.datasets import load_digits  # a second's import, wanted here only
    from sklearn.model_selection import train_test_split

    data = load_digits()
    halves = train_test_split(np.arange(len(data.target)), test_size=0.2, random_state=0, stratify=data.target)
    rows = halves[("TRAIN", "VAL").index(split)]
    pixels = (data.images[rows] * (255 / 16)).round().astype(np.uint8)  # (n, 8, 8) of 17 shades
    return InMemory(pixels, data.target[rows], f"digits {split}", side=32)  # so that crops may begin between two pixels


def open_torchvision(name: str, options: dict[str, str]) -> InMemory:
    """CIFAR10, CIFAR100, MNIST and FashionMNIST; the last two also as the plain idx files in a folder."""
    split, download = take_split(name, options), options.get("download") == "yes"
    if options.get("download", "yes") != "yes":
        raise ValueError(f"{name}: download is yes or left out, not {options['download']}")
    debian = name == "FashionMNIST" and not download
    root = Path(options.get("root", "/usr/share/datasets/fashion-mnist" if debian else "~/data")).expanduser()
    if name.endswith("MNIST") and not download:
        prefix = "train" if split == "TRAIN" else "t10k"
        arrays = [read_idx(root, name, f"{prefix}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")]
        return InMemory(*arrays, f"{name} {split}")
    try:
        dataset = getattr(torchvision.datasets, name)(root, split == "TRAIN", download=download)
    except (RuntimeError, OSError) as error:
        hint = f"try again later ({reason(error)})" if download else "name its root=FOLDER, or add :download=yes"
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
    raise ValueError(f"no {name}[.gz] in {root}; {debian}name another root=FOLDER, or add :root=FOLDER:download=yes")


def open_imagenet(name: str, options: dict[str, str]) -> Source:
    split = take_split(name, options, ("TRAIN", "VAL", "TEST"))
    if "root" not in options:
        raise ValueError("ImageNet is named as ImageNet:split=TRAIN:root=/data/imagenet, split one of TRAIN, VAL, TEST")
    root, folder = Path(options["root"]).expanduser(), Path(options["root"]).expanduser() / split.lower()
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist; ImageNet's root must hold the folders train and val")
    if "extra" not in options:
        return open_folder(folder)
    return ImageNetEntries(root, load_entries(options, f"entries-{split}.npy", "actual_index"), split)


def load_entries(options: dict[str, str], name: str, column: str) -> np.ndarray:
    path = Path(options["extra"]).expanduser() / name
    if not path.is_file():
        raise ValueError(f"{path} does not exist; leave out :extra= to do without, or write it by python data.py extra")
    try:
        entries = np.load(path, mmap_mode="r")
    except (ValueError, EOFError):
        entries = np.empty(0)
    if column not in (entries.dtype.names or ()):
        raise ValueError(f"{path} is damaged, or no such table; write it again by python data.py extra")
    return entries


def open_imagenet22k(name: str, options: dict[str, str]) -> InTars:
    if "root" not in options:
        raise ValueError("ImageNet22k is named as ImageNet22k:root=/data/in22k, the folder of the <wnid>.tar files")
    root = Path(options["root"]).expanduser()
    if "extra" not in options:
        tars = sorted(glob.glob(f"{glob.escape(str(root))}/*.tar"))
        if not tars:
            raise ValueError(f"{root} holds no <wnid>.tar; if it holds folders of images, give --data {root}")
        source = open_tars(str(root), tars, interleave=0)
        source.labels, source.classes = source.shard, [Path(t).stem for t in tars]
        return source
    path = Path(options["extra"]).expanduser() / "entries.npy"

    def convert() -> dict:
        entries = load_entries(options, "entries.npy", "start_offset")
        shard, start = entries["class_index"].astype(np.int32), entries["start_offset"].astype(np.int64) + 512
        wnids = {int(c): str(entries["class_id"][row]) for c, row in zip(*np.unique(shard, return_index=True))}
        columns = dict(shard=shard, start=start, size=entries["end_offset"] - start)  # 512: the member's header
        return dict(stamps={str(path): os.stat(path).st_mtime_ns}, wnids=wnids, fingerprint=zlib.crc32(start),
                    **{name: torch.from_numpy(column) for name, column in columns.items()})

    load_entries(options, "entries.npy", "start_offset")
    table = remembered(f"entries {path.resolve()}", convert)
    tars = [str(root / f"{table['wnids'].get(c, '')}.tar") for c in range(max(table["wnids"]) + 1)]
    columns = [table[name].numpy() for name in ("shard", "start", "size")]
    return InTars(str(root), tars, *columns, table["fingerprint"], labels=columns[0])


def open_path(spec: str, options: dict[str, str]) -> Source:
    path = Path(spec).expanduser()
    if spec.endswith(".tar"):
        numbers = re.search(r"\{(\d+)\.\.(\d+)\}", spec)
        patterns = [str(path)] if not numbers else [
            str(path).replace(numbers[0], str(n).zfill(len(numbers[1])))
            for n in range(int(numbers[1]), int(numbers[2]) + 1)]
        tars = [tar for pattern in patterns for tar in sorted(glob.glob(pattern)) or [pattern]]
        if missing := [tar for tar in tars if not os.path.isfile(tar)]:
            raise ValueError(f"--data {spec!r}: {missing[0]} does not exist" + ", nothing is called so" * ("*" in spec))
        interleave = options.get("interleave", "16")
        if not interleave.isdecimal():
            raise ValueError(f"--data {spec!r}: interleave is the number of tars to read in turn, or 0")
        return open_tars(spec, tars, int(interleave))
    if path.is_file():
        if options:
            raise ValueError(f"--data {spec!r}: a list has no splits; name another list")
        return open_list(path)
    if not path.is_dir():
        raise ValueError(f"--data {spec!r} is no folder, no file, nor one of {', '.join(NAMED)}{nearest(spec, NAMED)}")
    folders = {s: next((path / f for f in SPLIT_FOLDERS[s] if (path / f).is_dir()), None) for s in SPLIT_FOLDERS}
    if "split" in options and folders.get(options["split"]) is None:
        names = ", ".join(SPLIT_FOLDERS.get(options["split"], ("TRAIN and VAL are the splits of a folder",)))
        raise ValueError(f"{path} has no sub-folder for split {options['split']} ({names})")
    chosen = folders[options.get("split", "TRAIN")] if "split" in options or all(folders.values()) else path
    return open_folder(chosen)


NAMED = {"digits": (open_digits, ("split",)), "ImageNet": (open_imagenet, ("split", "root", "extra")),
         "ImageNet22k": (open_imagenet22k, ("root", "extra"))}
NAMED |= {name: (open_torchvision, ("split", "root", "download"))
          for name in ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST")}


# ----------------------------------------------------------------------------------------------------------------------
# Listings: made once, with a progress bar, then remembered in ~/.cache/dinov2 and mapped into memory


def remembered(what: str, make) -> dict:
    """make()'s tables: {"stamps": {path: mtime in ns}, name: tensor or plain data}. They are made again when a path's
    time has changed."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dinov2"
    path = folder / f"{hashlib.sha1(os.fsencode(what)).hexdigest()[:16]}.listing3"
    try:
        listing = torch.load(path, mmap=True, weights_only=True)
        if all(os.stat(p).st_mtime_ns == t for p, t in listing["stamps"].items()):
            return listing
    except Exception:  # none, a damaged one, or a path is gone: list again
        pass
    listing = make()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = f"{path}.{os.getpid()}.partial"
        torch.save(listing, partial)
        os.replace(partial, path)
        return torch.load(path, mmap=True, weights_only=True)
    except OSError as error:
        print(f"the listing could not be remembered ({error}); every start, and every worker, may have to list again")
        return listing


class Names:
    """Collects file names and labels into the tables of a listing."""

    def __init__(self):
        self.names, self.ends, self.labels = bytearray(), array("q", [0]), array("i")

    def add(self, name: str, label: int) -> None:
        self.names += os.fsencode(name)
        self.ends.append(len(self.names))
        self.labels.append(label)

    def tables(self, classes: dict[str, int] | None) -> dict:
        """`classes` maps names to the labels given so far, which are renumbered in the order of the names."""
        labels = torch.from_numpy(np.array(self.labels, np.int32))
        if classes:
            order = sorted(c for c in classes if c)
            rank = torch.full((len(classes),), -1, dtype=torch.int32)  # of "", no label
            rank[[classes[c] for c in order]] = torch.arange(len(order), dtype=torch.int32)
            labels = rank[labels]
        tables = dict(names=torch.frombuffer(self.names or bytearray(1), dtype=torch.uint8),
                      ends=torch.from_numpy(np.array(self.ends)), labels=labels if classes else labels[:0],
                      classes=sorted(c for c in classes if c) if classes else [])
        return tables | dict(fingerprint=zlib.crc32(tables["labels"].numpy(), zlib.crc32(self.names)))


def open_folder(root: Path) -> ImageFiles:
    """All images below `root`, each folder's files in order of their names, before its sub-folders; labeled by their
    first sub-folder if every image lies in one and there are at least two."""
    root = root.resolve()
    try:
        source = ImageFiles(root, remembered(f"folder {root}", lambda: list_folder(root)))
    except PermissionError as error:
        raise ValueError(f"{error.filename} may not be read by this user; move it or change its mode") from None
    if len(source) == 0:
        tars = f"; its tar files are named {root}/*.tar" if any(root.glob("*.tar")) else ""
        raise ValueError(f"{root} holds no image ({', '.join(SUFFIXES)}){tars}")
    return source


def list_folder(root: Path) -> dict:
    names, classes, stamps, seen = Names(), {}, {}, set()
    todo, links, linked = [""], [], False
    with tqdm(desc=f"listing {root}", unit=" images", disable=None) as bar:
        while todo or links:
            linked = linked or not todo  # all links come last: a folder goes by its real name, if it has one
            folder = todo.pop() if todo else links.pop(0)
            about = os.stat(root / folder)
            if linked and (about.st_dev, about.st_ino) in seen:  # two links to one folder, or one that leads back up
                continue
            seen.add((about.st_dev, about.st_ino))
            stamps[str(root / folder)] = about.st_mtime_ns
            files, folders = [], []
            for entry in os.scandir(root / folder):
                if entry.name.startswith(".") or is_circle(entry):  # hidden ones are such as the ._ files of macOS
                    continue
                if entry.is_dir():
                    (links if entry.is_symlink() else folders).append(os.path.join(folder, entry.name))
                elif entry.name.lower().endswith(SUFFIXES) and entry.is_file():  # a file, or a link to one
                    files.append(os.path.join(folder, entry.name))
            for name in sorted(files):
                names.add(name, classes.setdefault(folder.split(os.sep)[0], len(classes)))
            todo += sorted(folders, reverse=True)
            links.sort()
            bar.update(len(files))
    labeled = len(classes) > 1 and "" not in classes
    return dict(stamps=stamps, **names.tables(classes if labeled else None))


def is_circle(entry: os.DirEntry) -> bool:
    """Is it a link that leads to itself?"""
    try:
        return entry.is_symlink() and not os.stat(entry.path)
    except OSError as error:
        return error.errno == errno.ELOOP


def open_list(path: Path) -> ImageFiles:
    """A text file: one path per line, absolute or from the file's own folder, with a label after a tab or not."""
    path = path.resolve()
    source = ImageFiles(path.parent, remembered(f"list {path}", lambda: read_list(path)))
    source.name = str(path)
    if len(source) == 0:
        raise ValueError(f"{path} names no image; write one path per line")
    return source


def read_list(path: Path) -> dict:
    names, classes, unlabeled = Names(), {}, 0
    stamps = {str(path): os.stat(path).st_mtime_ns}
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            for line in tqdm(file, desc=f"reading {path}", unit=" images", disable=None):
                name, _, label = line.strip("\r\n").partition("\t")
                if name.strip():
                    unlabeled += not label
                    names.add(name, classes.setdefault(label, len(classes)))
                if "\0" in name:
                    raise ValueError
    except (ValueError, PermissionError):
        raise ValueError(f"{path} is no readable text; --data takes a folder, or a file with one image path per line"
                         ) from None
    return dict(stamps=stamps, **names.tables(classes if unlabeled < len(names.labels) else None))


def open_tars(name: str, tars: list[str], interleave: int) -> InTars:
    tars = [os.path.abspath(tar) for tar in tars]
    table = remembered("\n".join(["tars", *tars]), lambda: list_tars(tars))
    if len(table["shard"]) == 0:
        raise ValueError(f"{name}: there is no image in {tars[0]}" + " or the others" * (len(tars) > 1))
    labels = table["labels"].numpy() if len(table["labels"]) else None
    return InTars(name, tars, *(table[key].numpy() for key in ("shard", "start", "size")), table["fingerprint"],
                  labels, interleave=interleave)


def list_tars(tars: list[str]) -> dict:
    """Where the images lie, found by walking from header to header; labels from the .cls members of the same name."""
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
                raise tarfile.ReadError("it has no end")
        except tarfile.TarError as error:
            if not keys:
                raise ValueError(f"{path} is no plain tar file ({error}); unpack it if it is compressed") from None
            print(f"{path} is damaged after {len(keys)} images ({error}); the rest of it is left out", file=sys.stderr)
        except ValueError:
            raise ValueError(f"{path}: the label {member.name} is no number") from None
        columns["labels"].extend(labels.get(key, -1) for key in keys)
    tables = {name: torch.from_numpy(np.array(column)) for name, column in columns.items()}
    if (tables["labels"] < 0).all():
        tables["labels"] = tables["labels"][:0]
    print_of = functools.reduce(lambda crc, table: zlib.crc32(table.numpy(), crc), tables.values(), 0)
    return dict(stamps=stamps, fingerprint=print_of, **tables)


def read_file(path: str) -> np.ndarray:
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):  # reading a pipe would wait for ever
        raise OSError("not a file")
    if about.st_size > MAX_BYTES:
        raise ValueError(f"{about.st_size:,} bytes are more than data.MAX_BYTES")
    return np.fromfile(path, np.uint8)


# ----------------------------------------------------------------------------------------------------------------------
# The official metadata of ImageNet


def write_extra(spec: str) -> None:
    """Writes the .npy files which the official code reads instead of listing folders. Raises ValueError."""
    name, options = parse_spec(spec)
    if name not in ("ImageNet", "ImageNet22k") or not {"root", "extra"} <= options.keys():
        raise ValueError(f"extra wants ImageNet:root=FOLDER:extra=FOLDER, or ImageNet22k likewise, not {spec!r}")
    root, extra = Path(options["root"]).expanduser(), Path(options["extra"]).expanduser()
    arrays = extra_of_imagenet22k(root) if name == "ImageNet22k" else {}
    if name == "ImageNet":
        splits = ("TRAIN", "VAL", "TEST")
        splits = (take_split(name, options, splits),) if "split" in options else splits
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
        raise ValueError(f"{strange[0]} is no file of ImageNet, such as n01440764_10.JPEG; move it away")
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


ENTRY = [("actual_index", "<u4"), ("class_index", "<u4")]


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
# Keyed order


def shuffled(i: int, n: int, key: int) -> int:
    """Where the keyed permutation of range(n) sends i. A Feistel network over the next power of four, walked until it
    lands below n: nothing is stored, whatever n is."""
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


# ----------------------------------------------------------------------------------------------------------------------
# Crops, cut as uint8 on the worker


def crop_box(rng: random.Random, height: int, width: int, scale, ratio=(3 / 4, 4 / 3)) -> tuple[int, int, int, int]:
    """(top, left, h, w) of a random resized crop: area U(scale) of the image, log aspect ratio U(log ratio)."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(low + (high - low) * rng.random())
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int((height - h + 1) * rng.random()), int((width - w + 1) * rng.random()), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])  # the largest central box of an allowed shape
    w, h = min(width, max(round(height * aspect), 1)), min(height, max(round(width / aspect), 1))
    return (height - h) // 2, (width - w) // 2, h, w


def cut_crop(rng: random.Random, image: Tensor, size: int, scale) -> Tensor:
    """A random resized crop of an image (C, H, W): (size, size, C) of its dtype."""
    top, left, h, w = crop_box(rng, *image.shape[-2:], scale)
    pixels = image.permute(1, 2, 0).numpy()[None, top : top + h, left : left + w]
    region = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2)  # NumPy copies a part twice as fast
    deep = image.dtype == torch.uint16
    crop = F.interpolate(region.float() if deep else region, size=(size, size), mode="bicubic", antialias=True)
    crop = crop[0].permute(1, 2, 0)  # a view: channels-last is how the fast path for uint8 wants and leaves the pixels
    return crop.round().clamp(0, 65535).to(torch.uint16) if deep else crop


# ----------------------------------------------------------------------------------------------------------------------
# Block masks for iBOT (BEiT's, Bao et al. 2021, arXiv 2106.08254)


def block_mask(rng: random.Random, grid: tuple[int, int], target: int, max_patches: float, min_patches: int = 4,
               min_aspect: float = 0.3) -> np.ndarray:
    """Bool (h, w) with at most `target` patches masked in rectangles; now and then a few less, when none fits."""
    mask, count = np.zeros(grid, bool), 0
    while count < target and (added := add_block(rng, mask, min(target - count, max_patches), min_patches, min_aspect)):
        count += added
    return mask


def add_block(rng: random.Random, mask: np.ndarray, budget: float, min_patches: int, min_aspect: float) -> int:
    """Masks one rectangle of at most `budget` new patches, in place; returns how many are new, 0 after 10 misfits."""
    for _ in range(10):
        area = rng.uniform(min_patches, budget)
        aspect = math.exp(rng.uniform(math.log(min_aspect), -math.log(min_aspect)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < mask.shape[0] and w < mask.shape[1]:
            top, left = rng.randint(0, mask.shape[0] - h), rng.randint(0, mask.shape[1] - w)
            window = mask[top : top + h, left : left + w]
            new = window.size - np.count_nonzero(window)
            if 0 < new <= budget:
                window[:] = True
                return new
    return 0


def draw_masks(rng: random.Random, n_crops: int, grid: tuple[int, int], max_patches: float, sample_prob: float,
               ratio: tuple[float, float]) -> np.ndarray:
    """Bool (n_crops, h*w): the share `sample_prob` of the crops is masked, at ratios spread evenly over `ratio`, in
    random order (DINOv2, appendix B.1)."""
    n_masked = int(n_crops * sample_prob)
    edges = torch.linspace(*ratio, n_masked + 1).numpy()  # float32 matters: it decides the rounding of the targets
    masks = [block_mask(rng, grid, int(grid[0] * grid[1] * rng.uniform(a, b)), max_patches)
             for a, b in zip(edges[:-1], edges[1:])]
    masks += [np.zeros(grid, bool)] * (n_crops - n_masked)
    rng.shuffle(masks)
    return np.stack(masks).reshape(n_crops, -1)


def mask_weights(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Masks (n, h*w) bool -> positions of the M masked patches in masks.flatten(), int64 ascending, and for each 1 over
    the number of masked patches of its crop, float32."""
    share = 1 / masks.sum(-1, keepdim=True).clamp(min=1).float()
    return masks.flatten().nonzero().flatten(), share.expand_as(masks)[masks]


# ----------------------------------------------------------------------------------------------------------------------
# A training batch


class Batch(NamedTuple):
    """One process's share of a step: B images, L local crops each. Rows are crop-major: crop 0 of all images first."""

    global_crops: Tensor  # (2B, G, G, C) uint8 or uint16; (2B, C, G, G) float and normalized after prepare()
    local_crops: Tensor  # (L*B, l, l, C) likewise
    global_ops: Tensor  # (2B, 12) what is to be done to them, see draw_ops
    local_ops: Tensor  # (L*B, 12)
    masks: Tensor  # (2B, h*w) bool
    mask_index: Tensor  # (M,) int64, positions of the masked patches in masks.flatten()
    mask_weight: Tensor  # (M,) float32, 1 / number of masked patches of the crop
    samples: Tensor  # (B,) int64 sample numbers
    bad: list[tuple[str, str]]  # files that could not be read, and why; other samples took their place
    global_orders: Tensor | None = None  # (n_drops, groups, 2 * group_size) int64: random orders of each group's rows,
    local_orders: Tensor | None = None  # (n_drops, groups, L * group_size) which decide what stochastic depth drops


def read_sample(source: Source, s: int, seed: int, bad: list, labels=None) -> tuple[int, Tensor]:
    """The number and the pixels of the image of sample s. If its file cannot be read, which goes into `bad` with the
    reason, or if it is -1 in `labels`, another one drawn by s. Raises Unreadable after 50."""
    i, failures = source.pick(s, seed), 0
    for attempt in itertools.count():
        if labels is None or labels[i] >= 0:
            try:
                return i, source.image(i)
            except Exception as error:  # decoders raise all sorts on damaged files
                bad.append((source.describe(i), reason(error)))
            failures += 1
            if failures == 50:
                raise Unreadable(f"50 images in a row could not be read, the last {bad[-1][0]}: {bad[-1][1]}")
        i = source.replacement(i, random.Random(f"{seed}/replace/{s}/{attempt}"))


class TrainBatches(torch.utils.data.Dataset):
    """batches[step] -> Batch with this process's images of that step: a pure function of the arguments and the step.
    With accumulation_steps > 1 the share comes in as many parts: batches[step * accumulation_steps + part].

    A step has `batch_size` images over all processes, in groups of `group_size`; each part owns whole groups. A group
    has its own quota of masks, as had the batch of one GPU in the official code, and its own draws for stochastic depth
    (`n_drops` of them), so neither depends on the number of processes and parts. `global_scale` and `local_scale` are
    shares of the image's area; `ops` = keyword arguments of draw_ops; those that need red, green and blue are left out
    for other numbers of channels. Raises ValueError if the groups cannot be shared out.
    """

    def __init__(self, source, *, batch_size: int, group_size: int, seed: int = 0, rank: int = 0, world: int = 1,
                 accumulation_steps: int = 1, global_size: int = 224, global_scale=(0.32, 1.0), n_local: int = 8,
                 local_size: int = 96, local_scale=(0.05, 0.32), patch_size: int = 16, mask_prob: float = 0.5,
                 mask_ratio=(0.1, 0.5), n_drops: int = 0, ops: dict | None = None):
        check_groups(batch_size, group_size, world, accumulation_steps)
        self.source, self.batch_size, self.group_size, self.seed = source, batch_size, group_size, seed
        self.rank, self.accumulation_steps, self.n_drops = rank, accumulation_steps, n_drops
        self.count = batch_size // (world * accumulation_steps)  # images of a part
        self.crops = [(global_size, global_scale)] * 2 + [(local_size, local_scale)] * n_local
        self.shapes = [(2, global_size), (n_local, local_size)]
        self.ops = dict(ops or {})
        if source.channels != 3:
            self.ops |= dict(jitter=(*self.ops.get("jitter", JITTER)[:2], 0.0, 0.0), gray_prob=0.0)
        self.grid = (global_size // patch_size,) * 2
        self.max_patches = 0.5 * global_size // patch_size * global_size // patch_size  # floors from left to right
        self.mask_prob, self.mask_ratio = mask_prob, mask_ratio

    def __getitem__(self, index: int) -> Batch:
        step, part = divmod(index, self.accumulation_steps)
        first = (self.rank * self.accumulation_steps + part) * self.count  # of this part's images, within the step
        samples = range(step * self.batch_size + first, step * self.batch_size + first + self.count)
        groups = range(first // self.group_size, (first + self.count) // self.group_size)
        crops = [empty(n, self.count, size, size, self.source.channels) for n, size in self.shapes]  # crop-major
        places = [*crops[0], *crops[1]]  # 2 + L views (B, size, size, C)
        ops: list[list[list[float]]] = [[] for _ in places]
        bad: list[tuple[str, str]] = []
        for row, s in enumerate(samples):
            (_, image), rng = read_sample(self.source, s, self.seed, bad), random.Random(f"{self.seed}/sample/{s}")
            if image.dtype == torch.uint16 and crops[0].dtype == torch.uint8:
                crops = [widen(c) for c in crops]
                places = [*crops[0], *crops[1]]
            for c, (size, scale) in enumerate(self.crops):
                crop = cut_crop(rng, image, size, scale)
                places[c][row] = crop if crop.dtype == crops[0].dtype else widen(crop)
                ops[c].append(draw_ops(rng, min(c, 2), **self.ops))
        ops = torch.from_numpy(np.array(ops, np.float32))  # (2 + L, B, 12)
        masks = torch.from_numpy(self.masks_of(step, groups))
        return Batch(*(c.flatten(0, 1) for c in crops), ops[:2].flatten(0, 1), ops[2:].flatten(0, 1), masks,
                     *mask_weights(masks), torch.tensor(list(samples)), bad,
                     *self.orders_of(step, groups))

    def samples_of(self, step: int) -> range:
        """The sample numbers of all parts of this process's share of a step."""
        share = self.accumulation_steps * self.count
        return range(step * self.batch_size + self.rank * share, step * self.batch_size + (self.rank + 1) * share)

    def masks_of(self, step: int, groups: range) -> np.ndarray:
        """The masks (2B, h*w) of these groups, crop-major like the crops."""
        masks = [draw_masks(random.Random(f"{self.seed}/masks/{step}/{g}"), 2 * self.group_size, self.grid,
                            self.max_patches, self.mask_prob, self.mask_ratio) for g in groups]
        return np.concatenate([m.reshape(2, self.group_size, -1) for m in masks], 1).reshape(2 * self.count, -1)

    def orders_of(self, step: int, groups: range) -> list[Tensor]:
        """Global and local_orders of these groups. Keys of a bit generator, whose stream is fixed for good, are
        sorted; NumPy's permutations may change from version to version."""
        orders = []
        for n_crops, _ in self.shapes:
            rows = np.arange(n_crops)[:, None] * self.count + np.arange(self.group_size)  # of the first group
            keys = [np.random.Philox(key=random.Random(f"{self.seed}/drop path/{step}/{g}/{n_crops}").getrandbits(128))
                    .random_raw((self.n_drops, rows.size)) for g in groups]
            order = np.argsort(np.stack(keys, 1), axis=-1, kind="stable")  # (n_drops, groups, rows of a group)
            shift = np.arange(len(groups))[:, None] * self.group_size
            orders.append(torch.from_numpy(rows.flatten()[order] + shift))
        return orders


class Unreadable(RuntimeError):
    """The images are gone."""


def reason(error: Exception) -> str:
    """The first line of what a decoder said."""
    line = str(error).partition("\n")[0].replace("\t", " ")
    return re.sub(r" <_io\.BytesIO object at \w+>", "", line)[:200] or type(error).__name__


def empty(*shape: int) -> Tensor:
    """A new uint8 tensor; in a worker in memory that the training process shares, which saves a copy."""
    out = torch.empty(shape, dtype=torch.uint8)
    return out.share_memory_() if torch.utils.data.get_worker_info() else out


def widen(x: Tensor) -> Tensor:
    """uint8 -> uint16, 255 becoming 65535."""
    return (x.to(torch.int32) * 257).to(torch.uint16)


def check_groups(batch_size: int, group_size: int, world: int, accumulation_steps: int = 1) -> None:
    """Raises ValueError unless `batch_size` images fall into groups that `world` processes can share out evenly, each
    in `accumulation_steps` parts."""
    if batch_size < world:
        raise ValueError(f"--batch-size {batch_size} is smaller than the number of processes, {world}")
    if group_size < 1 or batch_size % (group_size * world * accumulation_steps):
        parts, too = (f" in {accumulation_steps} parts each", " or --gradient-accumulation-steps") if accumulation_steps > 1 else ("", "")
        raise ValueError(
            f"--batch-size {batch_size} does not divide into groups of {group_size} for {world} process(es){parts}; "
            f"make it a multiple of {max(group_size, 1) * world * accumulation_steps}, or change --group-size{too}")


# ----------------------------------------------------------------------------------------------------------------------
# Color, batched on the device


JITTER = (0.4, 0.4, 0.2, 0.1)  # largest change of brightness, contrast, saturation, hue
IDENTITY = (1.0, 1.0, 1.0, 0.0)  # what changes nothing
ORDERS = tuple(itertools.permutations(range(4)))  # of these four


def draw_ops(rng: random.Random, kind: int, flip_prob: float = 0.5, jitter_prob: float = 0.8, jitter=JITTER,
             gray_prob: float = 0.2, blur_probs=(0.0, 0.9, 0.5), blur_sigma=(0.1, 2.0),
             solarize_prob: float = 0.2) -> list[float]:
    """What is done to one crop on the device: [brightness, contrast, saturation factors, hue shift in turns, which of
    these comes first, second, third, fourth, gray?, blur sigma in pixels or 0, solarize?, mirror?]. `kind` is 0, 1 for
    the first and second global crop, 2 for local ones; only kind 1 is solarized. What changes nothing is IDENTITY, any
    order, and four zeros."""
    draw, wide = rng.random, jitter if rng.random() < jitter_prob else (0, 0, 0, 0)
    ops = [one + width * (2 * draw() - 1) for one, width in zip(IDENTITY, wide)]
    return ops + [*ORDERS[int(24 * draw())], draw() < gray_prob,
                  blur_sigma[0] + (blur_sigma[1] - blur_sigma[0]) * draw() if draw() < blur_probs[kind] else 0.0,
                  kind == 1 and draw() < solarize_prob, draw() < flip_prob]


def augment(crops: Tensor, ops: Tensor, mean=MEAN, std=STD) -> Tensor:
    """Crops (n, h, w, C), uint8 or uint16, -> float32 (n, C, h, w), mirrored and colored as `ops` (n, 12)
    says (see draw_ops), then normalized. `ops` may be on the CPU."""
    return (augment_by_groups if crops.device.type == "cpu" else augment_at_once)(crops, ops, mean, std)


def augment_by_groups(crops: Tensor, ops: Tensor, mean=MEAN, std=STD) -> Tensor:
    """augment() for a CPU: crops that go through the same operations in the same order are done together. Nothing is
    computed in vain, and a few crops at a time stay in the cache."""
    out = torch.empty(len(crops), crops.shape[3], *crops.shape[1:3])
    changed, mirrored = ops[:, :4] != torch.tensor(IDENTITY), ops[:, 11] > 0
    recipe = torch.cat([changed, ops[:, 4:8] * changed.any(1, keepdim=True), ops[:, 8:11] > 0], dim=1)  # (n, 11)
    recipes, which = recipe.unique(dim=0, return_inverse=True)
    for k, (*jitter, gray, blur, solar) in enumerate(recipes.int().tolist()):
        rows = torch.cat([(mirrored & (which == k)).nonzero(), (~mirrored & (which == k)).nonzero()]).flatten()
        x, values = to_float(crops.index_select(0, rows).permute(0, 3, 1, 2)), ops[rows, :, None, None, None]
        n_mirrored = int(mirrored[rows].sum())
        x[:n_mirrored] = x[:n_mirrored].flip(-1)
        for op in jitter[4:]:
            x = JITTERS[op](x, values[:, op]) if jitter[op] else x
        x = to_gray(x) if gray else x
        x = gaussian_blur(x, values[:, 9]) if blur else x
        out.index_copy_(0, rows, normalize_(solarize(x) if solar else x, mean, std))
    return out


def augment_at_once(crops: Tensor, ops: Tensor, mean=MEAN, std=STD) -> Tensor:
    """augment() for a GPU: all operations for all crops, of which each crop selects its own. No shape depends on the
    values, nothing waits for the device, and torch.compile makes a few kernels of it."""
    x, ops = to_float(crops.permute(0, 3, 1, 2)), ops.to(crops.device, non_blocking=True)
    values = ops[:, :, None, None, None]  # (n, 12, 1, 1, 1)
    x = torch.where(values[:, 11] > 0, x.flip(-1), x)
    for place, op in itertools.product(range(4), range(4) if x.shape[1] == 3 else range(2)):
        x = torch.where(values[:, 4 + place] == op, JITTERS[op](x, values[:, op]), x)
    x = torch.where(values[:, 8] > 0, to_gray(x), x)
    x = torch.where(values[:, 9] > 0, gaussian_blur(x, values[:, 9]), x)
    return normalize_(torch.where(values[:, 10] > 0, solarize(x), x), mean, std)


def to_float(images: Tensor) -> Tensor:
    """(n, C, h, w) of uint8 or uint16 -> float32 in [0, 1], contiguous."""
    x = images.to(torch.float32, memory_format=torch.contiguous_format)  # a copy, whatever the layout was
    return x.div_(65535 if images.dtype == torch.uint16 else 255)


def normalize(x: Tensor, mean=MEAN, std=STD) -> Tensor:
    """(n, C, h, w) in [0, 1] -> (x - mean) / std."""
    return normalize_(x.clone(), mean, std)


def normalize_(x: Tensor, mean, std) -> Tensor:
    for channel, m, s in zip(x.unbind(1), mean, std, strict=True):  # numbers, not tensors: nothing goes to the device
        channel.sub_(m).div_(s)
    return x


def luma(x: Tensor) -> Tensor:
    """Brightness as it is seen, (n, 1, h, w); the plain mean if the channels aren't red, green and blue."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    r, g, b = x.split(1, dim=1)
    return (0.299 * r).add_(g, alpha=0.587).add_(b, alpha=0.114)


def blend(base: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).add_(base * (1 - factor)).clamp_(0, 1)  # torch.lerp is three times as slow when it broadcasts


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    return blend(luma(x.mean((2, 3), keepdim=True)), x, factor)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    return blend(luma(x), x, factor)


def hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue of the HSV color by `shift` of a full turn, in [-0.5, 0.5]; value v and chroma c are kept.

    The hue h runs from 0 (red) over 2 (green) and 4 (blue) to 6. Up to 3 it is 1 + (g + b - r - min) / c, and minus
    that on the other side, where b > g. A channel whose color is at hue n is v - c * clamp(d - 1, 0, 1), with d the
    distance from h to n around the circle. No branches: on a CPU comparing and choosing would take most of the time.
    """
    r, g, b = x.unbind(1)  # (n, h, w)
    most, least = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = most - least
    h = (g + b).sub_(r).sub_(least).div_(chroma.clamp(min=1e-12)).add_(1)
    h = torch.copysign(h, g - b).add_(6 * shift[:, 0])
    h = h.sub_((h / 6).floor_(), alpha=6)  # [0, 6)
    red = (3 - h).abs_().sub_(1).clamp_(0, 1)  # d measured from the other side: 1 - clamp(d - 1, 0, 1)
    green, blue = ((h - n).abs_().sub_(1).clamp_(0, 1) for n in (2, 4))
    return torch.stack([torch.addcmul(least, chroma, red), torch.addcmul(most, chroma, green, value=-1),
                        torch.addcmul(most, chroma, blue, value=-1)], dim=1)


def to_gray(x: Tensor) -> Tensor:
    return luma(x).repeat(1, x.shape[1], 1, 1)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """9x9 Gaussian with the border mirrored, one sigma per image (n, 1, 1, 1); as 9 + 9 shifted sums."""
    taps = torch.arange(-4, 5, device=x.device) / sigma  # (n, 1, 1, 9)
    taps = torch.softmax(-0.5 * taps**2, dim=-1)
    radius = min(4, min(x.shape[-2:]) - 1)  # a mirror cannot reach further than the image
    taps = taps[..., 4 - radius : 5 + radius].split(1, dim=-1)
    for dim in (2, 3):
        padded = F.pad(x, (0, 0, radius, radius) if dim == 2 else (radius, radius, 0, 0), mode="reflect")
        shifted = [padded.narrow(dim, i, x.shape[dim]) for i in range(len(taps))]
        x = taps[0] * shifted[0]
        for tap, view in zip(taps[1:], shifted[1:]):
            x.addcmul_(tap, view)
    return x


def solarize(x: Tensor) -> Tensor:
    """What is brighter than the middle is inverted."""
    return torch.minimum(x, 1 - x)


JITTERS = (brightness, contrast, saturation, hue)


# ----------------------------------------------------------------------------------------------------------------------
# Loading


def usable_cores(proc: str = "/proc/self/cgroup", mounts: str = "/sys/fs/cgroup") -> int:
    """CPU cores this process may use: those it is bound to, or its control group's share of their time."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    for line in Path(proc).read_text().splitlines() if os.path.exists(proc) else ():
        _, kinds, group = line.split(":", 2)  # "0::/path" of version 2, "4:cpu,cpuacct:/path" of version 1
        top = Path(mounts) / ("cpu" if kinds else "")
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if kinds else ("cpu.max",)
        inside = top / group.strip("/")  # a container may see its own group as the top, or as what it is outside
        for folder in {top, inside, *inside.parents} if not kinds or "cpu" in kinds.split(",") else ():
            if all((folder / name).is_file() for name in names):
                quota, period = " ".join((folder / name).read_text() for name in names).split()
                if quota not in ("max", "-1"):
                    cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def worker_count(wanted: int, processes_here: int = 1) -> int:
    """`wanted`, or if that is negative as many as there are cores for, but one for the process itself; at most 16."""
    return wanted if wanted >= 0 else max(1, min(16, usable_cores() // processes_here - 1))


def train_loader(batches: TrainBatches, start: int, stop: int, num_workers: int, pin_memory: bool):
    """Batches of the steps start, …, stop - 1, made by `num_workers` processes ahead of time (0: in this process)."""
    parts = range(start * batches.accumulation_steps, stop * batches.accumulation_steps)
    return make_loader(batches, num_workers, batch_size=None, sampler=parts, pin_memory=pin_memory)


def make_loader(dataset, num_workers: int, **options) -> torch.utils.data.DataLoader:
    """A loader whose workers leave all signals to this process, and die with it."""
    multiprocessing.util.Finalize(None, kill_workers, exitpriority=100)  # before Python asks them by SIGTERM, and waits
    return torch.utils.data.DataLoader(dataset, num_workers=num_workers, worker_init_fn=start_worker, **options)


def kill_workers() -> None:
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def start_worker(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # Ctrl-C reaches every process of a terminal, and a
        signal.signal(number, signal.SIG_IGN)  # scheduler's signals every process of a job; the training answers them
    keep_memory()


def keep_memory(largest: int | None = None) -> None:
    """Has glibc keep freed memory instead of returning it to the system, to ask for it again page by page: without, a
    fifth of the time that images take on a CPU goes there. Pieces of more than `largest` megabytes, if given, are
    returned: kept ones leave holes that pieces of other sizes don't fit into. Does nothing where there is no glibc."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    libc.mallopt(-4, 2**16 if largest else 0)  # M_MMAP_MAX: with 0, large pieces come from the heap as well
    if largest:
        libc.mallopt(-3, largest * 2**20)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: of which up to 2 GB stay when freed


def prepare(batch: Batch, device: torch.device, mean=MEAN, std=STD, augment=augment) -> Batch:
    """The batch on the device, its crops augmented and normalized. `augment` may be augment_at_once, compiled."""
    on_device = lambda t: t.to(device, non_blocking=True)  # noqa: E731
    return batch._replace(
        global_crops=augment(on_device(batch.global_crops), batch.global_ops, mean, std),
        local_crops=augment(on_device(batch.local_crops), batch.local_ops, mean, std), masks=on_device(batch.masks),
        mask_index=on_device(batch.mask_index), mask_weight=on_device(batch.mask_weight),
        global_orders=on_device(batch.global_orders), local_orders=on_device(batch.local_orders))


class Prefetcher:
    """Iterates over prepared batches. On a GPU the next batch is copied and augmented on a stream of its own while the
    step before it computes. `waited`: seconds spent so far waiting for the loader."""

    def __init__(self, loader, prepare, device: torch.device):
        self.loader, self.prepare, self.device, self.waited = loader, prepare, device, 0.0

    def timed(self):
        loader, end = iter(self.loader), object()
        while True:
            asked = time.perf_counter()
            batch = next(loader, end)
            self.waited += time.perf_counter() - asked
            if batch is end:
                return
            yield batch

    def __iter__(self):
        if self.device.type != "cuda":
            yield from map(self.prepare, self.timed())
            return
        stream, ahead = torch.cuda.Stream(self.device), None
        for batch in itertools.chain(self.timed(), [None]):
            following = None
            if batch is not None:
                stream.wait_stream(torch.cuda.current_stream(self.device))  # never more than one batch ahead
                with torch.cuda.stream(stream):
                    following = self.prepare(batch), stream.record_event()
            if ahead is not None:
                ready, event = ahead
                current = torch.cuda.current_stream(self.device)
                current.wait_event(event)
                for tensor in ready:
                    if isinstance(tensor, Tensor) and tensor.is_cuda:
                        tensor.record_stream(current)  # its memory must outlive its use on this stream
                yield ready
            ahead = following


def draw_batch(batch: Batch, mean=MEAN, std=STD, n: int = 8) -> Image.Image:
    """A picture of the first n images of a prepared batch, as the networks see them: a row for each, its two global
    crops with the masked patches dark, then its local crops."""
    n_images, grid = len(batch.samples), math.isqrt(batch.masks.shape[1])
    n = min(n, n_images)
    rows = []
    for crops in (batch.global_crops, batch.local_crops):
        crops = crops.unflatten(0, (-1, n_images))[:, :n].cpu()  # (crops, n, C, h, w)
        shown = [c * s + m for c, m, s in zip(crops.unbind(2), mean, std)]
        shown = torch.stack(shown if len(shown) == 3 else shown[:1] * 3, dim=-1)  # (crops, n, h, w, 3)
        if not rows:
            masks = batch.masks.cpu().unflatten(0, (-1, n_images))[:, :n].unflatten(2, (grid, grid)).float()
            shown = shown * (1 - 0.8 * F.interpolate(masks, size=crops.shape[-2:])[..., None])
        rows.append([Image.fromarray((s.clamp(0, 1) * 255).byte().numpy()) for s in shown.flatten(0, 1)])
    sides = [row[0].width for row in rows]
    zoom = max(1, 96 // sides[0])  # tiny images are enlarged to be seen
    widths = [len(row) // n * (side + 2) for row, side in zip(rows, sides)]
    sheet = Image.new("RGB", (sum(widths) * zoom, n * (max(sides) + 2) * zoom), "white")
    for row, side, left in zip(rows, sides, (0, widths[0])):
        for k, crop in enumerate(row):
            place = ((left + k // n * (side + 2)) * zoom, k % n * (max(sides) + 2) * zoom)
            sheet.paste(crop.resize((side * zoom, side * zoom), Image.Resampling.NEAREST), place)
    return sheet


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
# Single images of any size


def image_paths(names: list[str]) -> list[str]:
    """The files named, and all images below the folders named, in order, each once. Raises ValueError for what does
    not exist."""
    paths = []
    for name in names:
        if os.path.isdir(name):
            source = open_folder(Path(name))
            paths += [source.describe(i) for i in range(len(source))]
        elif os.path.exists(name):
            paths.append(name)
        else:
            raise ValueError(f"no such image or folder: {name}")
    first = {}
    for path in paths:
        first.setdefault(os.path.realpath(path), path)
    return list(first.values())


def read_image(path: str, channels: int = 3) -> Tensor:
    """An image file as decode() gives it. Raises ValueError, with the reason, if it cannot be read."""
    try:
        return decode(read_file(path), channels)
    except Exception as error:  # decoders raise all sorts on damaged files
        raise ValueError(f"{path} cannot be read as an image ({reason(error)})") from None


class Fit(NamedTuple):
    """How an image comes to sides that are multiples of the patch. Pixel (x, y) of a W x H image goes to
    (left + x * scaled[1] / W, top + y * scaled[0] / H)."""
    scaled: tuple[int, int]  # height and width that the image is resized to
    top: int  # where its corner then lies on the canvas; negative: rows are cut away
    left: int
    canvas: tuple[int, int]  # height and width of what the network sees


FITS = ("crop", "pad", "resize")


def plan_fit(height: int, width: int, patch: int, how: str = "crop", size: tuple[int, ...] = ()) -> Fit:
    """Brings an image to `size`: () as it is, (short side,) or (height, width); and to multiples of `patch`. "crop"
    cuts off the rest, "pad" adds to it, both in the middle; "resize" stretches. Raises ValueError if nothing would be
    left, or if height and width are given and are no multiples."""
    if len(size) == 2:
        if off := [s for s in size if s % patch or s < patch]:
            raise ValueError(f"size {off[0]} is no multiple of the patch size {patch}; the nearest is "
                             f"{max(round(off[0] / patch), 1) * patch}")
        scaled = canvas = tuple(size)
        if how != "resize":
            scale = (max if how == "crop" else min)(size[0] / height, size[1] / width)
            scaled = max(round(height * scale), 1), max(round(width * scale), 1)
    else:
        scale = size[0] / min(height, width) if size else 1
        unit = patch if how == "resize" else 1
        scaled = tuple(max(round(n * scale / unit), 1) * unit for n in (height, width))
        canvas = tuple((-(-n // patch) if how == "pad" else n // patch) * patch for n in scaled)
        if not all(canvas):
            raise ValueError(f"an image of {scaled[0]}x{scaled[1]} pixels is less than one patch of {patch}x{patch}; "
                             "enlarge it by --size, or choose --fit pad or resize")
    return Fit(scaled, (canvas[0] - scaled[0]) // 2, (canvas[1] - scaled[1]) // 2, canvas)


def fit_image(image: Tensor, fit: Fit, mean=MEAN) -> Tensor:
    """An image (C, H, W), uint8 or uint16, as `fit` says; what is added has the color `mean`, which becomes zero when
    the image is normalized."""
    deep = image.dtype == torch.uint16
    x = image.float() if deep else image  # torchvision resizes no uint16
    if tuple(x.shape[-2:]) != fit.scaled:
        x = TF.resize(x, list(fit.scaled), InterpolationMode.BICUBIC, antialias=True)
    out = (torch.tensor(mean) * (65535 if deep else 255)).round().to(x.dtype)[:, None, None].repeat(1, *fit.canvas)
    (h, w), (height, width), top, left = fit.scaled, fit.canvas, fit.top, fit.left
    out[:, max(top, 0) : top + h, max(left, 0) : left + w] = (
        x[:, max(-top, 0) : height - top, max(-left, 0) : width - left])
    return out.round().clamp(0, 65535).to(torch.uint16) if deep else out


class FittedImages(torch.utils.data.Dataset):
    """fitted[i] -> the i-th of `paths` as fit_image() makes it, uint8 or uint16 (C, h*patch, w*patch), and "". If it
    cannot be read, or is too small: None, and why."""

    def __init__(self, paths: list[str], channels: int, patch: int, how: str = "crop", size=(), mean=MEAN):
        self.paths, self.channels, self.mean, self.fit = paths, channels, mean, (patch, how, size)
        plan_fit(2 * patch, 2 * patch, *self.fit)  # a wrong size is no image's fault

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor | None, str]:
        try:
            image = read_image(self.paths[i], self.channels)
            return fit_image(image, plan_fit(*image.shape[-2:], *self.fit), self.mean), ""
        except ValueError as error:
            return None, str(error) if self.paths[i] in str(error) else f"{self.paths[i]}: {error}"


# ----------------------------------------------------------------------------------------------------------------------
# Commands


class Parser(argparse.ArgumentParser):
    """Raises ValueError where argparse would print its usage and leave; names the nearest flag; no abbreviations."""

    def __init__(self, manual: str, usage: str | None = None):
        super().__init__(description=manual, usage=usage, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        raise ValueError(message)

    def parse_args(self, argv: list[str] | None) -> argparse.Namespace:
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [s for action in self._actions for s in action.option_strings]
            raise ValueError(f"unknown argument {unknown[0]!r}{nearest(unknown[0].split('=')[0], flags)}; see --help")
        return args


def nearest(name: str, names) -> str:
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""


class Tried(torch.utils.data.Dataset):
    """tried[k] -> image number i = indices[k]; the sums of its pixels and their squares per channel, and how many, in a
    (3, C) float64 tensor; and why it cannot be read, if so."""

    def __init__(self, source: Source, indices):
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, k: int) -> tuple[int, Tensor, str]:
        try:
            image = self.source.image(self.indices[k])
        except Exception as error:
            return self.indices[k], torch.zeros(3, self.source.channels, dtype=torch.float64), reason(error)
        sums = torch.zeros(3, len(image), dtype=torch.float64)
        for rows in image.split(256, dim=1):  # large images would take much memory as doubles
            x = to_float(rows[None])[0].double().flatten(1)  # (C, 256*W)
            sums += torch.stack([x.sum(1), x.square().sum(1), torch.full_like(x[:, 0], x.shape[1])])
        return self.indices[k], sums, ""


def read_all(source: Source, indices, num_workers: int):
    """Goes through Tried with a progress bar."""
    loader = make_loader(Tried(source, indices), worker_count(num_workers), batch_size=None)
    return tqdm(loader, desc=f"reading {source.name}", unit=" images", disable=None)


def measure_stats(source: Source, n: int, num_workers: int = 0) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, in [0, 1], over all pixels of n images (0: all), drawn at random."""
    n = min(n, len(source)) or len(source)
    indices = range(n) if n == len(source) else [shuffled(i, len(source), 0) for i in range(n)]
    sums, n_bad = 0, 0
    for _, one, why in read_all(source, indices, num_workers):
        sums, n_bad = sums + one, n_bad + bool(why)
    if n_bad:
        print(f"{n_bad:,} of {n:,} images cannot be read: python data.py check lists them", file=sys.stderr)
    if not sums[2].any():
        raise ValueError(f"no image of {source.name} can be read")
    mean = sums[0] / sums[2]
    return mean.tolist(), (sums[1] / sums[2] - mean**2).clamp(min=0).sqrt().tolist()


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("command", choices=("stats", "check", "extra"), help="what to do, see above")
    parser.add_argument("spec", help="the source")
    parser.add_argument("--in-chans", type=int, default=3, help="channels of the images")
    parser.add_argument("--images", type=int, default=10_000, help="stats: how many images to measure, 0 for all")
    parser.add_argument("--num-workers", type=int, default=-1, help="reading processes; -1: as many as cores allow")
    args = parser.parse_args(argv)
    if args.in_chans < 1 or args.images < 0 or args.num_workers < -1:
        raise ValueError("--in-chans must be 1 or more, --images 0 or more, --num-workers -1 or more")
    if args.command == "extra":
        return write_extra(args.spec)
    source = open_source(args.spec, args.in_chans)
    if args.command == "stats":
        mean, std = measure_stats(source, args.images, args.num_workers)
        print(*(f"--{name} {' '.join(f'{v:.4g}' for v in values)}" for name, values in (("mean", mean), ("std", std))))
    else:
        bad = [(source.describe(i), why) for i, _, why in read_all(source, range(len(source)), args.num_workers) if why]
        print(*(f"{name}\t{why}" for name, why in bad), sep="\n", end="\n" * bool(bad))
        print(f"{len(bad):,} of {len(source):,} images of {source.name} cannot be read")
        sys.exit(bool(bad))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(130)
