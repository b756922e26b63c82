"""What a source of images is, and the kinds of them: files, tar files, arrays, any torch Dataset, mixtures.

    source = InMemory(pixels, labels, "squares")      # uint8 (n, H, W), (n,)
    len(source), source.image(0), source.labels       # n, uint8 (3, H, W), (n,)
    source.pick(s, seed)                              # the image of sample s: each pass visits all in a new order

support/sources.py opens them by name. Apache License 2.0.
"""
import bisect
import functools
import itertools
import math
import os
import random
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from support.images import MAX_BYTES, as_channels, decode, from_array, from_pillow, read_file
from support.listings import MAX_CLASSES


class Source:
    """Numbered images; subclasses define len(), and how to read image i. `labels` (n,) integers, -1 for none, or None;
    `classes`: the names of the labels, or None if labels are plain numbers; `name` for messages; `fingerprint`, equal
    on all machines that see the same images; `notes` on what was understood or left out; `why_unlabeled`, if known;
    `how_to_label`, the fix in messages."""

    name, labels, classes, fingerprint, notes, why_unlabeled = "", None, None, 0, (), ""
    how_to_label = "use a labeled source"
    spec, channels = "", 3  # as given to open_source

    def describe(self, i: int) -> str:
        """The file of image i, or what else to call it in messages."""
        return f"{self.name}[{i}]"

    def unlabeled(self) -> str:
        """That it has no labels, and the fix."""
        return f"{self.name} has no labels{self.why_unlabeled}; {self.how_to_label}"

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
        from support.sources import reopen  # which imports this module

        return (reopen, (self.spec, self.channels, self.fingerprint)) if self.spec else super().__reduce__()


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

    how_to_label = "make its items (image, label)"

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
        if labels.max() >= MAX_CLASSES:
            raise ValueError(f"the labels of {self.name} go up to {labels.max()}; number the classes from 0 to at most "
                             f"{MAX_CLASSES - 1:,}")
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

    how_to_label = "make one sub-folder per class, two or more"

    def __init__(self, root: Path, listing: dict):
        self.root, self.name = str(root), str(root)
        self.names, self.ends = listing["names"], listing["ends"]
        self.fingerprint, self.notes = listing["fingerprint"], listing["notes"]
        self.why_unlabeled, self.left_out = listing["why_unlabeled"], listing["left_out"]
        self.labels = listing["labels"] if len(listing["labels"]) else None
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

    how_to_label = "add a member KEY.cls with the number of the class beside each KEY.jpg"

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
        self.notes = [line for s in sources for line in s.notes]
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
