"""Images for DINOv2: where they come from, multi-crop, block masks, and colour augmentation on the device.

A source is named by one string:
    digits                                    1,797 scans shipped with scikit-learn, a fifth held out as split=VAL
    /any/folder                               all images below it; with class sub-folders also labels; train/ and val/
                                              sub-folders are recognised as splits
    FashionMNIST:root=/usr/share/datasets/fashion-mnist          the four idx files, .gz or not
    ImageNet:split=TRAIN:root=/data/imagenet[:extra=/data/extra]  train/<wnid>/*.JPEG, val/<wnid>/*.JPEG

    source = open_source("digits")
    batches = TrainBatches(source, batch_size=128, ...)      # batches[step] is the whole batch of that step
    images = augment(batch.global_crops, batch.global_ops, MEAN, STD)

Nothing here keeps random state. Sample number s (0, 1, 2, … over the whole run) alone decides which image, which crops
and which colours; the step and the group of images decide the masks. So any step can be made again at any time, by any
process or worker. A worker decodes an image once and cuts uint8 crops; all photometric work is batched, on the device.
No model, no config in this file. Apache License 2.0.
"""
import gzip
import hashlib
import itertools
import json
import math
import os
import random
import re
import signal
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which all released models expect
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SPLIT_FOLDERS = {"TRAIN": ("train", "training"), "VAL": ("val", "valid", "validation", "test")}


# ----------------------------------------------------------------------------------------------------------------------
# Sources. Each has len(), image(i) -> uint8 (3, H, W), labels (int64 array or None), the classes they number (list of
# names, or None where the numbers speak for themselves) and a name for messages.


class InMemory:
    """A source that fits in memory: `pixels` (n, H, W) uint8, grey, served enlarged to `side`; `labels` (n,)."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, name: str, side: int | None = None):
        self.pixels, self.labels, self.name = torch.from_numpy(pixels), labels.astype(np.int64), name
        self.classes = None
        self.images = self.pixels
        if side:
            self.images = TF.resize(self.pixels, [side, side], InterpolationMode.BICUBIC, antialias=True)

    def __len__(self) -> int:
        return len(self.images)

    def image(self, i: int) -> Tensor:
        return self.images[i].expand(3, -1, -1)

    def describe(self, i: int) -> str:
        return f"{self.name}[{i}]"


class ImageFiles:
    """Files below `root`. Names are kept as one byte string with offsets: small, and shared with forked workers.
    `labels` number the sorted `classes`; both None without labels."""

    def __init__(self, root: Path, names: np.ndarray, offsets: np.ndarray, labels: np.ndarray | None, classes):
        self.root, self.names, self.offsets, self.name = root, names, offsets, str(root)
        self.labels, self.classes = labels, classes

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def image(self, i: int) -> Tensor:
        return read_image(self.describe(i))

    def describe(self, i: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[self.offsets[i] : self.offsets[i + 1]].tobytes()))


class ImageNetEntries:
    """ImageNet through the official metadata, `extra`/entries-SPLIT.npy, instead of listing the folders."""

    def __init__(self, root: Path, entries: np.ndarray, split: str):
        self.root, self.entries, self.split, self.name = root, entries, split, f"{root} ({split})"
        self.labels = None if split == "TEST" else entries["class_index"].astype(np.int64)
        self.classes = None  # the numbers are ImageNet's

    def __len__(self) -> int:
        return len(self.entries)

    def image(self, i: int) -> Tensor:
        return read_image(self.describe(i))

    def describe(self, i: int) -> str:
        number, wnid = self.entries["actual_index"][i], self.entries["class_id"][i]
        name = {"TRAIN": f"train/{wnid}/{wnid}_{number}.JPEG", "VAL": f"val/{wnid}/ILSVRC2012_val_{number:08d}.JPEG",
                "TEST": f"test/ILSVRC2012_test_{number:08d}.JPEG"}[self.split]
        return os.path.join(self.root, name)


def open_source(spec: str):
    """The source named by `spec` (see the top of this file). Raises ValueError with the fix in the message."""
    name, options = parse_spec(spec)
    split = options.get("split", "TRAIN")
    keys = {"FashionMNIST": ("split", "root"), "ImageNet": ("split", "root", "extra")}.get(name, ("split",))
    if unknown := options.keys() - set(keys):
        raise ValueError(f"--data {spec!r}: unknown key {min(unknown)!r}; {name} takes {', '.join(keys)}")
    if name == "digits":
        return digits(split)
    if name == "FashionMNIST":
        return fashion_mnist(Path(options.get("root", "/usr/share/datasets/fashion-mnist")), split)
    if name == "ImageNet":
        return imagenet(options, split)
    if name == "ImageNet22k":
        raise ValueError("ImageNet-22k is read as class folders: give --data /path/to/them")
    root = Path(name).expanduser()
    if not root.is_dir():
        what = "is a file" if root.exists() else "is no folder, nor one of digits, FashionMNIST:…, ImageNet:…"
        raise ValueError(f"--data {spec!r} {what}; give a folder of images")
    folders = {s: next((root / f for f in SPLIT_FOLDERS[s] if (root / f).is_dir()), None) for s in SPLIT_FOLDERS}
    if "split" in options and folders.get(split) is None:
        names = ", ".join(SPLIT_FOLDERS.get(split, ("TRAIN and VAL are the splits of a folder",)))
        raise ValueError(f"{root} has no sub-folder for split {split} ({names})")
    return image_folder(folders[split] if "split" in options or all(folders.values()) else root)


def parse_spec(spec: str) -> tuple[str, dict[str, str]]:
    """"Name:key=value:key=value" or "path:key=value" -> (name or path, {key: value})."""
    name, *rest = re.split(r":(\w+)=", spec)
    return name, dict(zip(rest[::2], rest[1::2]))


def eval_specs(spec: str, train: str = "", val: str = "") -> tuple[str, str | None]:
    """The specs of the labelled images to learn from and to classify (None: leave one out): those given, else the TRAIN
    and VAL splits of the training source `spec`, as far as it has them."""
    name, options = parse_spec(train or spec)
    if train and "split" in options:
        return train, val or None
    if val:
        return eval_specs(train or spec)[0], val
    specs = [":".join([name] + [f"{k}={v}" for k, v in {**options, "split": s}.items()]) for s in ("TRAIN", "VAL")]
    if name in ("digits", "FashionMNIST", "ImageNet"):
        return tuple(specs)
    has = [any((Path(name).expanduser() / f).is_dir() for f in SPLIT_FOLDERS[s]) for s in ("TRAIN", "VAL")]
    return tuple(specs) if all(has) else (train or spec, None)


def digits(split: str) -> InMemory:
    if split not in ("TRAIN", "VAL"):
        raise ValueError(f"digits has the splits TRAIN and VAL, not {split}")
    from sklearn.datasets import load_digits  # a second's import, wanted here only
    from sklearn.model_selection import train_test_split

    data = load_digits()
    halves = train_test_split(np.arange(len(data.target)), test_size=0.2, random_state=0, stratify=data.target)
    rows = halves[("TRAIN", "VAL").index(split)]
    pixels = (data.images[rows] * (255 / 16)).round().astype(np.uint8)  # (n, 8, 8) of 17 shades
    return InMemory(pixels, data.target[rows], f"digits {split}", side=32)  # so that crops may begin between two pixels


def fashion_mnist(root: Path, split: str) -> InMemory:
    prefix = {"TRAIN": "train", "VAL": "t10k", "TEST": "t10k"}.get(split)
    if prefix is None:
        raise ValueError(f"FashionMNIST has the splits TRAIN and VAL, not {split}")
    images, labels = (read_idx(root, f"{prefix}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    return InMemory(images, labels, f"FashionMNIST {split}")


def read_idx(root: Path, name: str) -> np.ndarray:
    """An idx file of LeCun's format as an array; plain or .gz, in `root` or in torchvision's raw/ folder below it."""
    for folder, suffix in itertools.product(("", "FashionMNIST/raw", "raw"), ("", ".gz")):
        path = root / folder / (name + suffix)
        if path.is_file():
            try:
                with (gzip.open if suffix else open)(path, "rb") as file:
                    raw = file.read()
                shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)  # raw[3] is the number of dimensions
                return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy()
            except (OSError, EOFError, IndexError, ValueError):
                raise ValueError(f"{path} is damaged or no idx file; copy or download it again") from None
    raise ValueError(f"no {name}[.gz] in {root}; install Debian's dataset-fashion-mnist or name another root=FOLDER")


def imagenet(options: dict[str, str], split: str):
    if "root" not in options or split not in ("TRAIN", "VAL", "TEST"):
        raise ValueError("ImageNet is named as ImageNet:split=TRAIN:root=/data/imagenet, split one of TRAIN, VAL, TEST")
    root, folder = Path(options["root"]).expanduser(), Path(options["root"]).expanduser() / split.lower()
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist; ImageNet's root must hold the folders train and val")
    if "extra" not in options:
        return image_folder(folder)
    entries = Path(options["extra"]).expanduser() / f"entries-{split}.npy"
    if not entries.is_file():
        raise ValueError(f"{entries} does not exist; leave out :extra= to list the folders instead")
    return ImageNetEntries(root, np.load(entries, mmap_mode="r"), split)


def image_folder(root: Path) -> ImageFiles:
    """All images below `root`, sorted; labelled by their first sub-folder if every image lies in one and there are at
    least two. The listing is cached and stays valid as long as no folder below `root` changes."""
    root = root.resolve()
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "dinov2"
    cache = cache / f"{hashlib.sha1(os.fsencode(root)).hexdigest()[:16]}.npz"
    listing = read_listing(cache, root)
    if listing is None:
        try:
            listing = list_images(root)
        except PermissionError as error:
            raise ValueError(f"{error.filename} may not be read by this user; move it or change its mode") from None
        write_listing(cache, listing)
    names, offsets = listing["names"], listing["offsets"]
    if len(offsets) == 1:
        raise ValueError(f"{root} holds no image ({', '.join(SUFFIXES)})")
    classes = json.loads(listing["classes"].tobytes())
    return ImageFiles(root, names, offsets, listing["labels"] if classes else None, classes or None)


def list_images(root: Path) -> dict[str, np.ndarray]:
    names, folders, todo, links, seen = [], {}, [""], [], set()
    with tqdm(desc=f"listing {root}", unit=" images", disable=None) as bar:
        while todo or links:
            folder = todo.pop() if todo else links.pop()  # a folder goes by its real name, if it has one
            about = os.stat(root / folder)
            if (about.st_dev, about.st_ino) in seen:  # two links to one folder, or a link that leads back up
                continue
            seen.add((about.st_dev, about.st_ino))
            folders[folder] = about.st_mtime_ns
            for entry in os.scandir(root / folder):
                name = os.path.join(folder, entry.name)
                if entry.name.startswith("."):  # hidden, such as the ._ files of macOS
                    continue
                if entry.is_dir():
                    (links if entry.is_symlink() else todo).append(name)
                elif entry.name.lower().endswith(SUFFIXES) and entry.is_file():  # a file, or a link to one
                    names.append(name)
                    bar.update()
    names.sort()
    classes, labels = np.unique([n.split(os.sep)[0] if os.sep in n else "" for n in names], return_inverse=True)
    classes = classes.tolist() if len(classes) > 1 and classes[0] != "" else []
    encoded = [os.fsencode(n) for n in names]
    as_json = lambda value: np.frombuffer(json.dumps(value).encode(), np.uint8)  # noqa: E731
    return dict(
        names=np.frombuffer(b"".join(encoded), np.uint8), offsets=np.cumsum([0] + [len(e) for e in encoded]),
        labels=labels.astype(np.int64), classes=as_json(classes), folders=as_json(folders))


def read_listing(cache: Path, root: Path) -> dict[str, np.ndarray] | None:
    """The cached listing, unless there is none or a folder in it has changed since."""
    try:
        with np.load(cache) as file:
            listing = dict(file)
        folders = json.loads(listing["folders"].tobytes())
        return listing if all(os.stat(root / f).st_mtime_ns == t for f, t in folders.items()) else None
    except Exception:  # no cache, a damaged one, or one of an older format: list again
        return None


def write_listing(cache: Path, listing: dict[str, np.ndarray]) -> None:
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_name(f"{cache.stem}.{os.getpid()}.npz")
        np.savez(partial, **listing)
        os.replace(partial, cache)
    except OSError as error:
        print(f"the listing could not be cached ({error}); the next start will list again")


def read_image(path: str) -> Tensor:
    """An image file as uint8 (3, H, W), upright. Raises whatever the decoder does if it cannot be decoded."""
    try:
        image = decode_image(path, mode=ImageReadMode.RGB, apply_exif_orientation=True)
    except RuntimeError:  # CMYK, TIFF, BMP and others that torchvision leaves to Pillow
        with Image.open(path) as file:
            return TF.pil_to_tensor(ImageOps.exif_transpose(file).convert("RGB"))
    image = image[0] if image.ndim == 4 else image  # the first frame of an animation
    return TF.to_dtype(image, torch.uint8, scale=True)  # 16-bit PNG


# ----------------------------------------------------------------------------------------------------------------------
# Keyed order: which image is sample number s


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


def image_of_sample(s: int, n: int, seed: int) -> int:
    """Index of the image of sample s: every n samples each of the n images comes once, in a new order."""
    epoch, position = divmod(s, n)
    return shuffled(position, n, key=random.Random(f"{seed}/epoch/{epoch}").getrandbits(64))


# ----------------------------------------------------------------------------------------------------------------------
# Crops, cut as uint8 on the worker


def crop_box(rng: random.Random, height: int, width: int, scale, ratio=(3 / 4, 4 / 3)) -> tuple[int, int, int, int]:
    """(top, left, h, w) of a random resized crop: area U(scale) of the image, log aspect ratio U(log ratio)."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])  # the largest central box of an allowed shape
    w, h = min(width, max(round(height * aspect), 1)), min(height, max(round(width / aspect), 1))
    return (height - h) // 2, (width - w) // 2, h, w


def cut_crop(rng: random.Random, image: Tensor, size: int, scale, flip_prob: float) -> Tensor:
    """A random resized crop of a uint8 image (3, H, W), uint8 (3, size, size), mirrored with probability flip_prob."""
    top, left, h, w = crop_box(rng, *image.shape[-2:], scale)
    crop = image[None, :, top : top + h, left : left + w]
    crop = F.interpolate(crop, size=(size, size), mode="bicubic", antialias=True)[0]
    return crop.flip(-1) if rng.random() < flip_prob else crop


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
            new = window.size - int(window.sum())
            if 0 < new <= budget:
                window[:] = True
                return new
    return 0


def draw_masks(rng: random.Random, n_crops: int, grid: tuple[int, int], max_patches: float, sample_prob: float,
               ratio: tuple[float, float]) -> np.ndarray:
    """Bool (n_crops, h*w): the share `sample_prob` of the crops is masked, at ratios spread evenly over `ratio`, in
    random order (DINOv2, appendix B.1)."""
    n_masked = int(n_crops * sample_prob)
    edges = torch.linspace(*ratio, n_masked + 1)  # float32 matters: it decides the rounding of the targets
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

    global_crops: Tensor  # (2B, 3, G, G) uint8; float and normalised after prepare()
    local_crops: Tensor  # (L*B, 3, l, l) likewise
    global_ops: Tensor  # (2B, 8) colour operations, see draw_ops
    local_ops: Tensor  # (L*B, 8)
    masks: Tensor  # (2B, h*w) bool
    mask_index: Tensor  # (M,) int64, positions of the masked patches in masks.flatten()
    mask_weight: Tensor  # (M,) float32, 1 / number of masked patches of the crop
    samples: Tensor  # (B,) int64 sample numbers
    bad: list[str]  # files that could not be read and were replaced by others


class TrainBatches(torch.utils.data.Dataset):
    """batches[step] -> Batch with this process's images of that step: a pure function of the arguments and the step.

    A step has `batch_size` images over all processes, in groups of `group_size`; each process owns whole groups. A
    group has its own quota of masks, as had the batch of one GPU in the official code, so masks don't depend on the
    number of processes. `global_scale` and `local_scale` are shares of the image's area; `ops` = keyword arguments of
    draw_ops. Raises ValueError if the groups cannot be shared out.
    """

    def __init__(self, source, *, batch_size: int, group_size: int, seed: int = 0, rank: int = 0, world: int = 1,
                 global_size: int = 224, global_scale=(0.32, 1.0), n_local: int = 8, local_size: int = 96,
                 local_scale=(0.05, 0.32), flip_prob: float = 0.5, patch_size: int = 16, mask_prob: float = 0.5,
                 mask_ratio=(0.1, 0.5), ops: dict | None = None):
        check_groups(batch_size, group_size, world)
        self.source, self.batch_size, self.group_size, self.seed = source, batch_size, group_size, seed
        self.first, self.count = rank * (batch_size // world), batch_size // world
        self.crops = [(global_size, global_scale)] * 2 + [(local_size, local_scale)] * n_local
        self.flip_prob, self.ops = flip_prob, ops or {}
        self.grid = (global_size // patch_size,) * 2
        self.max_patches = 0.5 * global_size // patch_size * global_size // patch_size  # floors from left to right
        self.mask_prob, self.mask_ratio = mask_prob, mask_ratio

    def __getitem__(self, step: int) -> Batch:
        samples = range(step * self.batch_size + self.first, step * self.batch_size + self.first + self.count)
        bad: list[str] = []
        crops, ops = zip(*(self.crops_of(s, bad) for s in samples))  # B lists of 2+L each
        crops, ops = list(zip(*crops)), list(zip(*ops))  # crop-major: 2+L lists of B each
        masks = torch.from_numpy(self.masks_of(step))
        flat = itertools.chain.from_iterable
        return Batch(torch.stack(list(flat(crops[:2]))), torch.stack(list(flat(crops[2:]))),
                     torch.tensor(list(flat(ops[:2]))), torch.tensor(list(flat(ops[2:]))),
                     masks, *mask_weights(masks), torch.tensor(list(samples)), bad)

    def crops_of(self, s: int, bad: list[str]) -> tuple[list[Tensor], list[list[float]]]:
        """The crops of sample s and their colour operations."""
        image, rng = self.image_of(s, bad), random.Random(f"{self.seed}/sample/{s}")
        crops = [cut_crop(rng, image, size, scale, self.flip_prob) for size, scale in self.crops]
        return crops, [draw_ops(rng, min(kind, 2), **self.ops) for kind in range(len(self.crops))]

    def image_of(self, s: int, bad: list[str]) -> Tensor:
        """The image of sample s; if its file cannot be read, another one drawn by s. Raises RuntimeError after 10."""
        n = len(self.source)
        i = image_of_sample(s, n, self.seed)
        for attempt in range(10):
            try:
                return self.source.image(i)
            except Exception:  # decoders raise all sorts on damaged files
                bad.append(self.source.describe(i))
                i = random.Random(f"{self.seed}/replace/{s}/{attempt}").randrange(n)
        raise RuntimeError(f"10 images in a row could not be read, the last {bad[-1]}")

    def masks_of(self, step: int) -> np.ndarray:
        """The masks (2B, h*w) of this process's groups, crop-major like the crops."""
        groups = range(self.first // self.group_size, (self.first + self.count) // self.group_size)
        masks = [draw_masks(random.Random(f"{self.seed}/masks/{step}/{g}"), 2 * self.group_size, self.grid,
                            self.max_patches, self.mask_prob, self.mask_ratio) for g in groups]
        return np.concatenate([m.reshape(2, self.group_size, -1) for m in masks], 1).reshape(2 * self.count, -1)


def check_groups(batch_size: int, group_size: int, world: int) -> None:
    """Raises ValueError unless `batch_size` images fall into groups that `world` processes can share out evenly."""
    if batch_size < world:
        raise ValueError(f"--batch-size {batch_size} is smaller than the number of processes, {world}")
    if group_size < 1 or batch_size % (group_size * world):
        raise ValueError(
            f"--batch-size {batch_size} does not divide into groups of {group_size} for {world} process(es); make it a "
            f"multiple of {max(group_size, 1) * world}, or change --group-size")


# ----------------------------------------------------------------------------------------------------------------------
# Colour, batched on the device


ORDERS = torch.tensor(list(itertools.permutations(range(4))))  # (24, 4) orders of the four jitter operations


def draw_ops(rng: random.Random, kind: int, jitter_prob: float = 0.8, jitter=(0.4, 0.4, 0.2, 0.1),
             gray_prob: float = 0.2, blur_probs=(0.0, 0.9, 0.5), blur_sigma=(0.1, 2.0),
             solarize_prob: float = 0.2) -> list[float]:
    """Colour operations of one crop: [brightness, contrast, saturation factors, hue shift in turns, order (row of
    ORDERS), grey?, blur sigma in pixels or 0, solarise?]. `kind` is 0, 1 for the first and second global crop, 2 for
    local ones; only kind 1 is solarised. Identity is [1, 1, 1, 0, …, 0, 0, 0]."""
    b, c, s, h = jitter if rng.random() < jitter_prob else (0, 0, 0, 0)
    factors = [rng.uniform(max(0, 1 - a), 1 + a) for a in (b, c, s)] + [rng.uniform(-h, h)]
    gray = rng.random() < gray_prob
    sigma = rng.uniform(*blur_sigma) if rng.random() < blur_probs[kind] else 0.0
    return factors + [rng.randrange(24), float(gray), sigma, float(kind == 1 and rng.random() < solarize_prob)]


def augment(crops: Tensor, ops: Tensor, mean=MEAN, std=STD) -> Tensor:
    """uint8 crops (n, 3, h, w) -> float32, colours changed as `ops` (n, 8) says (see draw_ops), then normalised.

    `ops` stays on the CPU: which rows an operation touches is known without asking the device.
    """
    x = crops.float() / 255  # (n, 3, h, w)
    values = ops.float().to(x.device, non_blocking=True)
    order, identity = ORDERS[ops[:, 4].long()], (1.0, 1.0, 1.0, 0.0)
    for place, op in itertools.product(range(4), range(4)):
        touched = (order[:, place] == op) & (ops[:, op] != identity[op])
        change_rows(x, touched, JITTER[op], values[:, op])
    change_rows(x, ops[:, 5] > 0, lambda x, _: luma(x).expand_as(x), values[:, 5])
    change_rows(x, ops[:, 6] > 0, gaussian_blur, values[:, 6])
    change_rows(x, ops[:, 7] > 0, lambda x, _: torch.where(x < 127.5 / 255, x, 1 - x), values[:, 7])
    return normalize(x, mean, std)


def normalize(x: Tensor, mean=MEAN, std=STD) -> Tensor:
    """(n, 3, h, w) in [0, 1] -> (x - mean) / std."""
    channels = [(c - m) / s for c, m, s in zip(x.unbind(1), mean, std)]  # numbers, not tensors: no copy to the device
    return torch.stack(channels, dim=1)


def change_rows(x: Tensor, touched: Tensor, change, value: Tensor) -> None:
    """x[touched] = change(x[touched], value[touched] as (m, 1, 1, 1)), in place."""
    rows = touched.nonzero().flatten()
    if len(rows):
        rows = rows.to(x.device, non_blocking=True)
        x[rows] = change(x[rows], value[rows, None, None, None])


def luma(x: Tensor) -> Tensor:
    r, g, b = x.split(1, dim=1)
    return 0.299 * r + 0.587 * g + 0.114 * b  # (n, 1, h, w)


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(luma(x).mean((2, 3), keepdim=True).expand_as(x), x, factor).clamp(0, 1)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(luma(x).expand_as(x), x, factor).clamp(0, 1)


def hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue of the HSV colour by `shift` of a full turn, value and saturation kept. A channel of a colour with
    value v and chroma c is v - c * clamp(min(k, 4 - k), 0, 1), k = (n + 6 * hue) mod 6, n = 5, 3, 1 for R, G, B."""
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)  # (n, h, w)
    r, g, b = x.unbind(1)
    safe = chroma.clamp(min=1e-12)
    sector = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    k = (torch.stack([5 + sector, 3 + sector, 1 + sector], dim=1) + 6 * shift) % 6  # (n, 3, h, w)
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """9x9 Gaussian with the border mirrored, one sigma per image (n, 1, 1, 1); as 9 + 9 shifted sums."""
    taps = torch.arange(-4, 5, device=x.device) / sigma  # (n, 1, 1, 9)
    taps = torch.softmax(-0.5 * taps**2, dim=-1)
    radius = min(4, min(x.shape[-2:]) - 1)  # a mirror cannot reach further than the image
    taps = taps[..., 4 - radius : 5 + radius]
    for dim in (2, 3):
        padded = F.pad(x, (0, 0, radius, radius) if dim == 2 else (radius, radius, 0, 0), mode="reflect")
        x = sum(taps[..., i : i + 1] * padded.narrow(dim, i, x.shape[dim]) for i in range(taps.shape[-1]))
    return x


JITTER = (brightness, contrast, saturation, hue)


# ----------------------------------------------------------------------------------------------------------------------
# Loading


def train_loader(batches: TrainBatches, start: int, stop: int, num_workers: int, pin_memory: bool):
    """Batches of the steps start, …, stop - 1, made by `num_workers` processes ahead of time (0: in this process)."""
    return torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=range(start, stop), num_workers=num_workers, pin_memory=pin_memory,
        worker_init_fn=leave_interrupts_to_parent)


def leave_interrupts_to_parent(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; only the training process is to answer it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def prepare(batch: Batch, device: torch.device, mean=MEAN, std=STD) -> Batch:
    """The batch on the device, its crops augmented and normalised."""
    on_device = lambda t: t.to(device, non_blocking=True)  # noqa: E731
    return batch._replace(
        global_crops=augment(on_device(batch.global_crops), batch.global_ops, mean, std),
        local_crops=augment(on_device(batch.local_crops), batch.local_ops, mean, std), masks=on_device(batch.masks),
        mask_index=on_device(batch.mask_index), mask_weight=on_device(batch.mask_weight))


class EvalImages(torch.utils.data.Dataset):
    """Images of a source as uint8 (3, crop, crop): short side resized to `resize`, central square cut out; and whether
    the image could be read (if not, it is black)."""

    def __init__(self, source, resize: int = 256, crop: int = 224, indices=None):
        self.source, self.resize, self.crop = source, resize, crop
        self.indices = range(len(source)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[Tensor, bool]:
        try:
            image = self.source.image(self.indices[i])
        except Exception:  # decoders raise all sorts on damaged files
            return torch.zeros(3, self.crop, self.crop, dtype=torch.uint8), False
        image = TF.resize(image, [self.resize], InterpolationMode.BICUBIC, antialias=True)
        return TF.center_crop(image, [self.crop, self.crop]), True
