"""Depth estimation and semantic segmentation with frozen features: trains a head and evaluates it, or evaluates one.

    python eval_dense.py out/ckpt.pth --task depth --data /data/nyu                     # --decoder linear4 or dpt
    python eval_dense.py dinov2_vits14 --task seg --data /data/ADEChallengeData2016 --decoder ms
    python eval_dense.py dinov2_vits14 --task depth --data /data/nyu --head nyu_dpt     # a released head, or a file
    python eval_dense.py dinov2_vits14 --task seg --data photos --short 224 --crop 224 224 --steps 2000
    torchrun --nproc-per-node 8 eval_dense.py ckpt.pth --task seg --data /data/VOCdevkit/VOC2012

The kind of --data is recognized by its contents:
    NYUv2      nyu_train.txt, nyu_test.txt, with lines `photo depth focal`; 16-bit PNG, millimeters
    KITTI      kitti_eigen_train.txt, kitti_eigen_test.txt, input/, gt_depth/; 16-bit PNG, meters times 256
    ADE20K     images/{training,validation}, annotations/{training,validation}; 0 means no class
    VOC2012    JPEGImages, SegmentationClass, SegmentationClassAug, ImageSets/Segmentation/{train,aug,val}.txt
    any other  images/ and depth/ or labels/, with files of the same names, in sub-folders train/ and val/; or without
               sub-folders, and --val names another such folder. Depth: 16-bit PNG, meters times --depth-scale, or .npy,
               in meters if floating-point; 0 is unknown. Labels: PNG of class numbers; 255 is ignored; classes.txt may
               name the classes, one per line.

Heads are trained by the recipes of the released ones (DINOv2, section 7.4, and its configurations): the backbone is
frozen, and the loss is averaged over pairs of images, since each GPU had two. The head is saved as
CKPT.TASK_DECODER_head.pth, in the layout of the release, for hub.load_dense; results are appended to
CKPT.eval_dense.jsonl, with a constant prediction as the baseline. If training is interrupted, the same command resumes
it. Invalid input exits with code 2. Apache License 2.0.
"""
import argparse
import copy
import hashlib
import math
import os
import random
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import hub
from data import hue, make_loader, normalize, to_device
from heads import (
    CLASSES, RANGES, RECIPES, DPTHead, Dense, LinearDepthHead, Recipe, SegmentationHead, bilinear, colors,
    gradient_loss, predict_depth, resize_as_opencv, scaled_size, segment, segmentation_loss, sig_loss)
from support.cli import DTYPES, Parser, at_least, positive, run
from support.draw import (
    Tile, depth_bar, depth_colors, evenly_spaced, in_rows, label_colors, legend, picture_names, save_depth, save_labels,
    save_png, sheet, stack, to_rgb, zoom)
from support.evaluation import ResumeFile, add_record, add_result_flags, check_writable, no_bar, results_stem, say
from support.images import FORMATS, check_size, read_image
from support.parallel import from_rank_0, join_processes, leave_processes, pick_device, worker_count, world
from support.files import refuse_inputs, write_file
from support.sources import SPLIT_FOLDERS, Source, image_paths

IGNORE = 255  # the label of pixels that do not count
IMAGES_PER_LOSS = 2


# ----------------------------------------------------------------------------------------------------------------------
# Photographs with a target for each pixel


class Pairs(Source):
    """Photographs with depth or class labels. `dataset`: a key of heads.RANGES or heads.CLASSES, or "" for others."""

    def __init__(self, name: str, items: list[tuple[str, str]], task: str, dataset: str, classes=None,
                 depth_scale: float = 1000):
        self.name, self.items, self.task, self.dataset, self.classes = name, items, task, dataset, classes
        self.depth_scale = {"nyu": 1000.0, "kitti": 256.0}.get(dataset, depth_scale)
        names = "\n".join(f"{photo} {target}" for photo, target in items)
        self.fingerprint = hashlib.sha256(os.fsencode(f"{dataset} {self.depth_scale} {names}")).hexdigest()

    def __len__(self) -> int:
        return len(self.items)

    def describe(self, i: int) -> str:
        return self.items[i][0]

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """Photograph i, uint8 or uint16 (C, H, W), and its depth, float32 (H, W), in meters, 0 if unknown, or labels,
        uint8 (H, W). Raises ValueError, naming the file, for what cannot be used."""
        photo, target = self.items[i]
        image = read_image(photo, self.channels)
        values = read_depth(target, self.depth_scale) if self.task == "depth" else self.read_labels(target)
        if values.shape != image.shape[-2:]:
            raise ValueError(f"{photo} has {image.shape[-2]}x{image.shape[-1]} pixels, but {target} has "
                             f"{values.shape[0]}x{values.shape[1]}; both must have the same size")
        if self.dataset == "kitti":  # the standard crop: the part of the image that the laser scanner covers
            top, left = values.shape[0] - 352, int((values.shape[1] - 1216) / 2)
            if top < 0 or left < 0:
                raise ValueError(f"{photo} is smaller than 352x1216 pixels, the size that KITTI is cropped to")
            image, values = (x[..., top : top + 352, left : left + 1216] for x in (image, values))
        return image, values

    def read_labels(self, path: str) -> Tensor:
        labels = read_numbers(path)
        if labels.dtype.kind == "f" or labels.size and labels.min() < 0:
            raise ValueError(f"{path}: labels must be integers >= 0, not {labels.dtype} from {labels.min()}")
        labels = labels.astype(np.int64)
        if self.dataset == "ade20k":  # 0 is no class, and class k is stored as k + 1
            labels = np.where((labels == 0) | (labels == IGNORE), IGNORE, labels - 1)
        wrong = labels[(labels != IGNORE) & (labels >= len(self.classes))]
        if wrong.size:
            raise ValueError(f"{path} has the label {wrong.max()}, but there are {len(self.classes)} classes, 0 to "
                             f"{len(self.classes) - 1} ({IGNORE} is ignored), as in classes.txt or, without that file, "
                             "in the training labels")
        return torch.from_numpy(labels.astype(np.uint8))


def read_numbers(path: str) -> np.ndarray:
    """A .npy file or a single-channel image as numbers (H, W); of a palette image the indices. Raises ValueError,
    naming the file."""
    try:
        if path.endswith(".npy"):
            numbers = np.load(path, allow_pickle=False)
        else:
            with Image.open(path, formats=FORMATS) as file:
                check_size(*file.size)
                numbers = np.asarray(file)
    except Exception as error:  # decoders raise anything on damaged files
        raise ValueError(f"{path} cannot be read ({str(error) or type(error).__name__})") from None
    if numbers.ndim != 2 or numbers.dtype.kind not in "uifb":
        raise ValueError(f"{path} has shape {numbers.shape} and type {numbers.dtype}; it must hold one number per "
                         "pixel, as a gray or palette PNG, or a .npy file of shape (H, W)")
    return numbers


def read_depth(path: str, scale: float) -> Tensor:
    numbers = read_numbers(path)
    if numbers.dtype.itemsize == 1:
        raise ValueError(f"{path} has 8 bits, too few for depth; save meters times --depth-scale as a 16-bit PNG, or "
                         "meters as .npy")
    depth = torch.from_numpy(numbers.astype(np.float32) / (1 if numbers.dtype.kind == "f" else scale))
    return torch.where(depth.isfinite() & (depth > 0), depth, 0.0)


def open_pairs(root: str, task: str, split: str, depth_scale: float = 1000) -> Pairs | None:
    """The pairs of a folder, laid out as described on top; `split` is TRAIN or VAL. None for a folder of one's own
    without this split. Raises ValueError for missing files."""
    folder, name = Path(root).expanduser(), f"{root} ({split})"
    if not folder.is_dir():
        raise ValueError(f"no such folder: {root}")
    for inner in ("ADEChallengeData2016", "VOC2012", "VOCdevkit/VOC2012"):  # where the archives unpack to
        folder = folder / inner if task == "seg" and (folder / inner).is_dir() else folder
    try:
        dataset, items = benchmark_items(folder, task, split == "TRAIN")
    except OSError as error:
        raise ValueError(f"{error.filename!r} cannot be read ({error.strerror})") from None
    if dataset:
        return Pairs(name, items, task, dataset, CLASSES.get(dataset))
    images, targets = folder / "images", folder / ("depth" if task == "depth" else "labels")
    if not images.is_dir() or not targets.is_dir():
        raise ValueError(f"{root} is not a known data set for --task {task}, and has no folders images/ and "
                         f"{targets.name}/; see --help")
    parts = {key: part for key, names in SPLIT_FOLDERS.items() for part in names if (images / part).is_dir()}
    if split not in (parts or {"TRAIN": ""}):
        return None
    part = parts.get(split, "")
    pairs = Pairs(name if part else root, matched(images / part, targets / part), task, "", depth_scale=depth_scale)
    if task == "seg" and (folder / "classes.txt").exists():
        pairs.classes = [s.strip() for s in (folder / "classes.txt").read_text().split("\n") if s.strip()]
        if not 0 < len(pairs.classes) <= IGNORE:
            raise ValueError(f"{folder / 'classes.txt'} names {len(pairs.classes)} classes; it must be 1 to {IGNORE}")
    return pairs


def benchmark_items(folder: Path, task: str, train: bool) -> tuple[str, list[tuple[str, str]]]:
    """Name and items of one of the known data sets; "" and none for any other folder."""
    if task == "depth":
        for dataset, listing, parts in (("nyu", "nyu_{}.txt", ("", "")),
                                        ("kitti", "kitti_eigen_{}.txt", ("input", "gt_depth"))):
            if any((folder / listing.format(split)).exists() for split in ("train", "test")):
                return dataset, listed(folder, folder / listing.format("train" if train else "test"), parts)
    elif (folder / "JPEGImages").is_dir():
        return "voc2012", voc_items(folder, train)
    elif any((folder / "annotations" / part).is_dir() for part in ("training", "validation")):
        part = "training" if train else "validation"
        return "ade20k", matched(folder / "images" / part, folder / "annotations" / part)
    return "", []


def count_classes(pairs: Pairs) -> list[str]:
    """Names for unnamed classes: "class 0" up to the largest label in any file."""
    largest = -1
    for _, path in tqdm(pairs.items, desc=f"classes of {pairs.name}", leave=False, disable=no_bar()):
        numbers = read_numbers(path).astype(np.int64)
        largest = max(largest, int(numbers[numbers != IGNORE].max(initial=-1)))
    if largest < 0:
        raise ValueError(f"all pixels of {pairs.name} are labeled {IGNORE}, which is ignored")
    if largest > IGNORE:
        raise ValueError(f"the labels of {pairs.name} go up to {largest}; they must be 0 to {IGNORE - 1}")
    return [f"class {k}" for k in range(largest + 1)]


def listed(folder: Path, listing: Path, parts: tuple[str, str]) -> list[tuple[str, str]]:
    """The pairs in a file of lines `photo depth focal`, without photographs whose depth is `None`."""
    lines = [line.split() for line in listing.read_text().splitlines() if line.strip()]
    if short := [line for line in lines if len(line) < 2]:
        raise ValueError(f"{listing} has a line {' '.join(short[0])!r}; lines must be `photo depth focal`")
    items = [tuple(str(folder / part / name.lstrip("/")) for part, name in zip(parts, line)) for line in lines
             if line[1] != "None"]
    return existing(sorted(items), listing)


def voc_items(folder: Path, train: bool) -> list[tuple[str, str]]:
    """For training, train and aug together, 10,582 photographs; 1,464 if aug is missing."""
    items = []
    for part, labels in (("train", "SegmentationClass"), ("aug", "SegmentationClassAug")) if train else (
            ("val", "SegmentationClass"),):
        listing = folder / "ImageSets/Segmentation" / f"{part}.txt"
        if part == "aug" and not listing.exists():
            say(f"note: no {listing}, with which the official code adds 9,118 photographs")
            continue
        items += [(str(folder / "JPEGImages" / f"{name}.jpg"), str(folder / labels / f"{name}.png"))
                  for name in listing.read_text().split()]
    return existing(items, folder)


def matched(images: Path, targets: Path) -> list[tuple[str, str]]:
    """Pairs of files with the same name, apart from the extension, in two folders and their sub-folders."""
    found = []
    for folder in (images, targets):
        if not folder.is_dir():
            raise ValueError(f"no such folder: {folder}")
        files, root = {}, folder.resolve()
        for path in image_paths([str(root)]):
            if (other := files.setdefault(Path(path).relative_to(root).with_suffix(""), path)) != path:
                raise ValueError(f"{path} and {other} differ only in their extensions; names must be unique")
        found.append(files)
    for mine, theirs, where in ((*found, targets), (*found[::-1], images)):
        if alone := sorted(mine.keys() - theirs.keys()):
            raise ValueError(f"{mine[alone[0]]} has no partner of the same name in {where}" + (
                f", nor have {len(alone) - 1} others" if len(alone) > 1 else ""))
    return [(found[0][name], found[1][name]) for name in sorted(found[0])]


def existing(items: list[tuple[str, str]], where: Path) -> list[tuple[str, str]]:
    missing = [path for pair in items for path in pair if not Path(path).exists()]
    if missing or not items:
        raise ValueError(f"{where} names {len(missing)} files that do not exist, the first: {missing[0]}" if items else
                         f"{where} names no pairs")
    return items


# ----------------------------------------------------------------------------------------------------------------------
# Recipes


class TrainingRecipe(NamedTuple):
    """How a head is trained, unless flags say otherwise. heads.Recipe is for inference."""
    steps: int
    warmup: float  # as a share of the steps
    start: float  # initial learning rate, as a share of `lr`
    lr: float
    weight_decay: float
    clip: float  # largest gradient norm; 0: no clipping
    crop: tuple[int, int]  # height and width, in pixels


DEPTH = TrainingRecipe(38_400, 1 / 3, 1e-3, lr=1e-4, weight_decay=0.01, clip=35.0, crop=(416, 544))
LINEAR = TrainingRecipe(40_000, 0.0375, 1e-6, lr=1e-3, weight_decay=1e-4, clip=0.0, crop=(512, 512))
TRAINING_RECIPES = {"nyu": DEPTH, "kitti": DEPTH._replace(crop=(352, 704)), "depth": DEPTH, "linear": LINEAR,
                    "ms": LINEAR._replace(crop=(640, 640))}  # by data set or, for segmentation, by decoder
RATIOS = {"linear": (0.5, 2.0), "ms": (1.0, 3.0)}  # range of scales in training for segmentation, relative to testing


def learning_rate(step: int, recipe: TrainingRecipe, task: str) -> float:
    """As a share of the peak: linear warm-up times a cosine (depth) or linear (segmentation) decay, as in mmcv."""
    progress, warming = step / recipe.steps, step / max(recipe.warmup * recipe.steps, 1e-9)
    decay = 1e-8 + (1 - 1e-8) * 0.5 * (1 + math.cos(math.pi * progress)) if task == "depth" else 1 - progress
    return decay * (1 - (1 - warming) * (1 - recipe.start)) if warming < 1 else decay


def beta1(step: int, steps: int, task: str) -> float:
    """Adam's beta1: for depth a cosine cycle from 0.95 to 0.85, over the first 30 % of the steps, and back."""
    if task == "seg":
        return 0.9
    top = max(0.3 * steps - 1, 1)
    at = min(step / top, 1) if step <= top else 1 - min((step - top) / max(steps - 1 - top, 1), 1)
    return 0.85 + 0.1 * 0.5 * (1 + math.cos(math.pi * at))


# ----------------------------------------------------------------------------------------------------------------------
# Augmentation of a pair


def random_window(rng: random.Random, size, crop) -> tuple[slice, slice]:
    """A random crop; the whole of a side that is no longer than the crop."""
    starts = [rng.randint(0, max(side - wanted, 0)) for side, wanted in zip(size, crop)]
    return tuple(slice(start, start + wanted) for start, wanted in zip(starts, crop))


def train_size(size, dataset: str = "", short: int = 0) -> tuple[int, int]:
    """Height and width that depth crops are taken from: without NYU's white frame; with `short`, scaled so that the
    whole photograph has this short side."""
    height, width = (427, 565) if dataset == "nyu" else size
    factor = short / min(size) if short else 1
    return max(round(height * factor), 1), max(round(width * factor), 1)


def augment_depth(rng: random.Random, image: Tensor, depth: Tensor, crop, dataset: str = "",
                  short: int = 0) -> tuple[Tensor, Tensor]:
    """A photograph (C, H, W), uint8 or uint16, and its depth (H, W): resized to the short side `short` (0: not at all),
    rotated, flipped, cropped to `crop` or less, and color-jittered. Returns the photograph in [0, 1]. NYU's white frame
    is cut off first."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import rotate

    x, size = image.float() / torch.iinfo(image.dtype).max, train_size(depth.shape, dataset, short)
    if dataset == "nyu":
        x, depth = (v[..., 45:472, 43:608] for v in (x, depth))
    if short:
        x = F.interpolate(x[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)
        depth = F.interpolate(depth[None, None], size, mode="nearest")[0, 0]
    if rng.random() < 0.5:
        angle = rng.uniform(-2.5, 2.5)
        x = rotate(x, angle, InterpolationMode.BILINEAR)
        depth = rotate(depth[None], angle, InterpolationMode.NEAREST)[0]
    if rng.random() < 0.5:
        x, depth = x.flip(-1), depth.flip(-1)
    rows, columns = random_window(rng, depth.shape, crop)
    x, depth = x[:, rows, columns], depth[rows, columns]
    if rng.random() < 0.5:  # as in the official code, gamma is applied to values up to 255
        width = 0.1 if dataset == "kitti" else 0.25
        gamma, gain = rng.uniform(0.9, 1.1), rng.uniform(1 - width, 1 + width)
        gains = torch.tensor([rng.uniform(0.9, 1.1) for _ in range(len(x))])[:, None, None]
        x = ((x * 255) ** gamma * gain * gains).clamp(0, 255) / 255
    return x, depth


def augment_labels(rng: random.Random, image: Tensor, labels: Tensor, crop, short: int, long: int,
                   ratios) -> tuple[Tensor, Tensor]:
    """A photograph (C, H, W), uint8 or uint16, and its labels (H, W): resized to the short side `short` (but the long
    side at most `long`) times a random ratio, cropped to `crop` or less, flipped, and color-jittered. Returns the
    photograph in [0, 1]. A crop of which one class covers three quarters is redrawn, up to ten times."""
    ratio = rng.uniform(*ratios)
    size = scaled_size(*labels.shape, int(long * ratio), int(short * ratio))
    x = resize_as_opencv(image, size) / torch.iinfo(image.dtype).max
    labels = F.interpolate(labels[None, None].float(), size=size, mode="nearest")[0, 0].to(torch.uint8)
    for _ in range(10):
        rows, columns = random_window(rng, size, crop)
        cropped = labels[rows, columns]
        counts = cropped[cropped != IGNORE].long().bincount()
        if (counts > 0).sum() > 1 and counts.max() < 0.75 * counts.sum():
            break
    x, labels = x[:, rows, columns], cropped
    if rng.random() < 0.5:
        x, labels = x.flip(-1), labels.flip(-1)
    return distort(rng, x), labels


def distort(rng: random.Random, x: Tensor) -> Tensor:
    """Photometric distortion of (C, h, w) in [0, 1], as in SSD (Liu et al. 2016, arXiv 1512.02325): brightness,
    contrast and, for color images, saturation and hue, each with probability 1/2; contrast comes first or last."""
    maybe = lambda low, high: rng.uniform(low, high) if rng.random() < 0.5 else None  # noqa: E731
    shift, contrast_first = maybe(-32 / 255, 32 / 255), rng.random() < 0.5
    gain, saturation, turn = maybe(0.5, 1.5), maybe(0.5, 1.5), maybe(-0.1, 0.1)  # 18 of OpenCV's 180 units of hue
    x = x if shift is None else (x + shift).clamp(0, 1)
    x = (x * gain).clamp(0, 1) if gain is not None and contrast_first else x
    if len(x) == 3 and saturation is not None:
        largest, smallest = x.amax(0), x.amin(0)
        limit = largest / (largest - smallest).clamp(min=1e-6)  # at which the smallest channel becomes 0
        x = largest - (largest - x) * limit.clamp(max=saturation)
    if len(x) == 3 and turn is not None:
        x = hue(x[None], torch.full((1, 1, 1, 1), turn))[0]
    return (x * gain).clamp(0, 1) if gain is not None and not contrast_first else x


class TrainPairs(torch.utils.data.Dataset):
    """[step] -> this process's share of the batch: normalized images (b, C, *crop) and targets (b, *crop)."""

    def __init__(self, pairs: Pairs, augment, crop, batch_size: int, seed: int, mean, std):
        self.pairs, self.augment, self.crop, self.batch_size, self.seed = pairs, augment, crop, batch_size, seed
        self.mean, self.std = mean, std
        rank, n_ranks = world()
        self.own = [i for i in range(batch_size) if i // IMAGES_PER_LOSS % n_ranks == rank]

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        images, targets = zip(*(self.sample(step * self.batch_size + i) for i in self.own))
        return torch.stack(images), torch.stack(targets)

    def sample(self, s: int) -> tuple[Tensor, Tensor]:
        """Sample s of the whole training, padded to the crop with 0 in the photograph and "unknown" in the target."""
        rng = random.Random(f"{self.seed}/dense/{s}")
        image, target = self.augment(rng, *self.pairs[self.pairs.pick(s, self.seed)], self.crop)
        image = normalize(image[None], self.mean, self.std)[0]
        pad = [0, self.crop[1] - target.shape[1], 0, self.crop[0] - target.shape[0]]
        return F.pad(image, pad), F.pad(target, pad, value=0 if target.is_floating_point() else IGNORE)


class ItemOrError(torch.utils.data.Dataset):
    """(*dataset[i], "") or, for data that cannot be used, what is wrong. An error that a worker raised would keep the
    loader alive until Python exits, when its other workers complain of being killed."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, i: int):
        try:
            return *self.dataset[i], ""
        except ValueError as error:
            return None, None, str(error)


def load_items(dataset, indices: range, num_workers: int, pin_memory: bool = False):
    """Yields dataset[i], two tensors, for each of the indices. Raises ValueError for data that cannot be used."""
    for x, y, error in make_loader(ItemOrError(dataset), num_workers, batch_size=None, sampler=indices,
                                   pin_memory=pin_memory):
        if error:
            raise ValueError(error)
        yield x, y


# ----------------------------------------------------------------------------------------------------------------------
# Measures


DEPTH_MEASURES = ("a1", "a2", "a3", "abs_rel", "sq_rel", "rmse", "rmse_log", "log_10", "silog")
CROPS = {  # of photographs in the evaluation of depth: top, bottom, left, right, as fractions of height and width
    "nyu": (45 / 480, 471 / 480, 41 / 640, 601 / 640), "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
    "eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229), "none": (0.0, 1.0, 0.0, 1.0)}


def crop_of(depth: Tensor, name: str) -> Tensor:
    """Which pixels of depth (H, W) lie inside this evaluation crop, (H, W) bool."""
    (height, width), (top, bottom, left, right) = depth.shape, CROPS[name]
    mask = torch.zeros_like(depth, dtype=torch.bool)
    # 1e-6: 45 / 480 * 480 may come out below 45
    rows, columns = (slice(int(a * n + 1e-6), int(b * n + 1e-6)) for a, b, n in
                     ((top, bottom, height), (left, right, width)))
    mask[rows, columns] = True
    return mask


def depth_measures(depth: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """DEPTH_MEASURES of one image, and mean depth and mean squared depth: (9 + 2,) float64. Predicted and true depth in
    meters, and which pixels count, are (H, W); NaN if none does. The measures: share of pixels within a factor of 1.25,
    1.25^2, 1.25^3; relative and squared relative error; root mean square error of depth and log-depth; error of
    log10-depth; 100 times the scale-invariant error (Eigen et al. 2014)."""
    p, d = depth[valid].double(), target[valid].double()
    e, ratio = p.log() - d.log(), torch.maximum(p / d, d / p)
    silog = ((e**2).mean() - e.mean() ** 2).clamp(min=0).sqrt() * 100
    return torch.stack([
        *((ratio < 1.25**k).double().mean() for k in (1, 2, 3)), ((p - d).abs() / d).mean(), ((p - d) ** 2 / d).mean(),
        ((p - d) ** 2).mean().sqrt(), (e**2).mean().sqrt(), (p.log10() - d.log10()).abs().mean(), silog, d.mean(),
        (d**2).mean()])


def depth_summary(name: str, table: Tensor) -> dict:
    """Means over the images of a data set, from a table (n, 9 + 2) of depth_measures(), without those that are NaN. As
    a baseline, the error of predicting the mean depth everywhere."""
    measured = table[~table.isnan().any(1)]
    if not len(measured):
        raise ValueError(f"no image of {name} has a pixel with a depth in the evaluated range; check --depth-range and "
                         "--depth-scale")
    constant = measured[:, -2].mean()
    rmse = (measured[:, -1] - 2 * constant * measured[:, -2] + constant**2).clamp(min=0).sqrt().mean()
    return dict(zip(DEPTH_MEASURES, measured.mean(0).tolist())) | dict(
        images_left_out=len(table) - len(measured), constant_everywhere=dict(depth=constant.item(), rmse=rmse.item()))


def count_labels(predicted: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """(3, classes) int64: per class, the labeled pixels that are correctly predicted, that are predicted as this class,
    and that have this label. predicted, labels: (H, W)."""
    known = labels != IGNORE
    p, t = predicted[known].long(), labels[known].long()
    return torch.stack([x.bincount(minlength=n_classes) for x in (t[p == t], p, t)])


def segmentation_summary(name: str, counts: Tensor) -> dict:
    """In percent, from the summed counts (3, classes) of all images of a data set: mIoU and mAcc, averaged over the
    classes that occur, aAcc, over pixels, and the IoU of each class. As a baseline, the scores of predicting the
    commonest class everywhere."""
    correct, predicted, labeled = counts.double()
    if not labeled.any():
        raise ValueError(f"all pixels of {name} are labeled {IGNORE}, which is ignored")
    iou = 100 * correct / (predicted + labeled - correct)  # NaN for a class that occurs nowhere
    share = 100 * (labeled.max() / labeled.sum()).item()
    return dict(mIoU=iou.nanmean().item(), aAcc=(100 * correct.sum() / labeled.sum()).item(),
                mAcc=(100 * correct / labeled).nanmean().item(),
                IoU=[None if math.isnan(v) else round(v, 4) for v in iou.tolist()],
                commonest_class_everywhere=dict(aAcc=share, mIoU=share / int((labeled > 0).sum())))


# ----------------------------------------------------------------------------------------------------------------------
# What is trained and evaluated: a backbone, its head, and two sets of pairs


class DenseEvaluation:
    """A backbone with its head, and the data, opened as the command line says; a process group under torchrun. To be
    used in a `with`. Raises ValueError, with the fix in the message, if anything does not fit."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.task, self.began = args, args.task, time.time()
        check_writable(args.out)
        self.device, self.dtype = pick_device(args.device), DTYPES[args.dtype]
        path, ckpt = hub.read(args.checkpoint)
        self.stem, self.step = results_stem(args, path), ckpt.get("step")
        self.trains = not (args.head or hub.is_mask2former(ckpt))
        if self.trains:
            backbone = hub.load(path, ckpt)
        else:
            forbid(args, TRAINING_FLAGS + ("crop",) * (self.task == "depth"), "is for training, but the head is given")
            self.network, about = hub.load_dense(args.checkpoint, args.head or None, args.depth_range, ckpt)
            backbone = self.network.backbone if args.head else self.network
            if about.task != self.task:
                raise ValueError(f"{args.head or args.checkpoint} is for --task {about.task}")
        self.rules, self.model_hash = hub.image_rules(backbone, ckpt), hub.weights_hash(backbone)
        join_processes(self.device)
        self.workers = worker_count(args.num_workers, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self.train, self.val = from_rank_0(self.open_data)
        if self.trains:
            self.choose_recipe()
            self.network = Dense(backbone, self.new_head(backbone.embed_dim))
        else:
            self.adopt(about)
        self.test = adapt(self.test, args) if self.test else None
        self.crop = args.eval_crop or {"nyu": "nyu", "kitti": "garg"}.get(self.val.dataset, "none")
        self.colors = colors(len(self.val.classes or ()), self.val.dataset)
        self.pictures = Predictions(self, Path(args.predictions)) if args.predictions else None
        self.network.to(self.device).eval().requires_grad_(False)

    def __enter__(self):
        return self

    def __exit__(self, kind, *error) -> None:
        leave_processes(kind is None)

    def open_data(self) -> tuple[Pairs | None, Pairs]:
        """The training pairs, if a head is to be trained, and those to evaluate on."""
        args = self.args
        open_split = partial(open_pairs, task=args.task, depth_scale=args.depth_scale)
        train = open_split(args.data, split="TRAIN") if self.trains else None
        val = open_split(args.val or args.data, split="VAL")
        if val is None and (args.val or not self.trains):  # these may be images/ and labels/ without sub-folders
            val = open_split(args.val or args.data, split="TRAIN")
        if val is None:
            raise ValueError(f"{args.data} has no split to evaluate on, such as images/val; name one by --val")
        val.channels = self.rules["in_chans"]
        if not self.trains:
            return None, val
        if train is None:
            raise ValueError(f"{args.data} has no split to train on, such as images/train")
        if set(train.items) & set(val.items):
            raise ValueError(f"--val {args.val} contains pairs of --data {args.data}; name others")
        train.channels = val.channels
        if args.task == "seg":
            named, train.classes = train.classes, train.classes or count_classes(train)
            if val.classes and (val.classes != named if named else len(val.classes) != len(train.classes)):
                raise ValueError(f"{val.name} has other classes than {train.name}, or in another order")
            val.classes = train.classes
        return train, val

    def choose_recipe(self) -> None:
        """The recipe of the data set and the decoder, with the flags that were given."""
        args, data = self.args, self.train
        recipe = TRAINING_RECIPES[data.dataset or "depth" if args.task == "depth" else args.decoder]
        crop = tuple(args.crop or recipe.crop)
        if args.task == "depth" and not args.crop:
            crop = tuple(map(min, crop, train_size(data[0][1].shape, data.dataset, args.short or 0)))
        given = {name: getattr(args, name) for name in ("steps", "warmup", "lr", "weight_decay", "clip")
                 if getattr(args, name) is not None}
        self.recipe, self.test = recipe._replace(crop=crop, **given), None
        if args.task == "seg":
            self.test = RECIPES.get((data.dataset, args.decoder), RECIPES["ade20k", args.decoder])
        self.limits = tuple(args.depth_range or RANGES.get(data.dataset, RANGES["nyu"]))
        self.ratios = tuple(args.ratios or RATIOS.get(args.decoder, ()))

    def new_head(self, dim: int) -> nn.Module:
        """Initialized the same on all processes and for any number of them."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.args.seed)
            if self.task == "seg":
                return SegmentationHead(dim, len(self.train.classes), 4 if self.args.decoder == "ms" else 1)
            if self.args.decoder == "dpt":
                return DPTHead(dim, *self.limits, channels=self.args.channels)
            return LinearDepthHead(dim, 4 if self.args.decoder == "linear4" else 1, *self.limits)

    def adopt(self, about: hub.About) -> None:
        """Takes range, recipe and classes from an existing head."""
        if self.task == "depth":
            self.test, self.limits = None, self.network.decode_head.depth_range
            return
        name, self.test, self.limits = self.args.head or self.args.checkpoint, about.recipe, None
        if self.val.dataset and self.val.dataset != about.dataset:
            raise ValueError(f"{name} knows the classes of {about.dataset or 'other data'}, not those of "
                             f"{self.val.name}")
        unnamed = about.classes[0] == "class 0"  # when the head was trained
        if (own := self.val.classes) and (len(own) != len(about.classes) if unnamed else own != about.classes):
            raise ValueError(f"{self.val.name} has other classes than {name}, or in another order; the head knows "
                             f"{', '.join(about.classes[:5])}" + ", ..." * (len(about.classes) > 5))
        self.val.classes = about.classes

    def autocast(self):
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def features(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        with torch.no_grad(), self.autocast():
            features = self.network.features(images)
        return [(patches.float(), cls.float()) for patches, cls in features]

    def forward(self, images: Tensor) -> Tensor:
        """The network, with the backbone under autocast and the head in float32."""
        if isinstance(self.network, Dense):
            return self.network.predict(self.features(images), images.shape[-2:])
        with self.autocast():
            return self.network(images).float()

    def predict(self, image: Tensor, name: str) -> Tensor:
        """Depth in meters, float32, or classes, int64, (H, W), of a photograph (C, H, W), uint8 or uint16; both on the
        CPU. Raises ValueError if the prediction is not finite."""
        photo, mean, std = image.to(self.device), self.rules["mean"], self.rules["std"]
        if self.task == "depth":
            flip = self.args.flip is not False
            x = predict_depth(self.forward, photo, mean, std, self.args.short or 0, flip)
        else:
            x = segment(self.forward, photo, self.test, mean, std)  # (classes, H, W)
        if not x.isfinite().all():
            raise ValueError(f"the predictions for {name} are not finite; use a smaller --lr, another head, or "
                             "--dtype fp32")
        return (x if self.task == "depth" else x.argmax(0)).cpu()


def adapt(recipe: Recipe, args: argparse.Namespace) -> Recipe:
    """The recipe for inference with the flags that were given. Windows are as large as the short side of --crop, and
    overlap by the same share."""
    side = min(args.crop or [recipe.crop])
    return recipe._replace(
        short=args.short or recipe.short, crop=side, stride=max(round(recipe.stride / recipe.crop * side), 1),
        flip=recipe.flip if args.flip is None else args.flip, ratios=tuple(args.scales or recipe.ratios))


# ----------------------------------------------------------------------------------------------------------------------
# Training


class HeadTraining:
    """The training of a head. It can be resumed after an interruption."""

    def __init__(self, job: DenseEvaluation):
        args, recipe = job.args, job.recipe
        self.job, self.head, self.done, self.curve = job, job.network.decode_head.requires_grad_(), 0, []
        self.chosen, self.weights = {}, {}  # results and weights of the head that is kept
        self.optimizer = torch.optim.AdamW(self.head.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
        self.eval_every = args.eval_every or max(recipe.steps // 10, 1)
        self.measure = "abs_rel" if job.task == "depth" else "mIoU"
        self.protocol = recipe._asdict() | dict(
            decoder=args.decoder, batch_size=args.batch_size, seed=args.seed)
        self.protocol |= dict(chosen_on="abs_rel on --val, as officially", gradient_weight=args.gradient_weight,
                              depth_range=job.limits, channels=args.channels, short=args.short or 0) if (
            job.task == "depth") else dict(chosen_on="the last step", short=job.test.short, ratios=job.ratios)
        settings = [self.protocol, self.eval_every, job.model_hash, job.train.fingerprint, job.val.fingerprint,
                    job.train.classes, args.dtype, job.test, job.crop, args.flip]
        self.saved = ResumeFile(f"{job.stem}.eval_dense", settings, not args.no_resume)
        self.head_path = Path(f"{job.stem}.{job.train.dataset or job.task}_{args.decoder}_head.pth")
        if self.head_path.is_dir() or not os.access(self.head_path.parent, os.W_OK):
            raise ValueError(f"{self.head_path} cannot be written; choose another place by --out")
        refuse_inputs(self.head_path, args.checkpoint)
        if self.head_path.exists():
            say(f"note: {self.head_path} will be replaced")

    def restore(self, state: dict) -> int:
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done, self.curve, self.chosen, self.weights = (state[k] for k in ("done", "curve", "chosen", "weights"))
        say(f"resuming after step {self.done} of {self.job.recipe.steps}, from {self.saved.path}")
        return self.done

    def save(self) -> None:
        self.saved.save(dict(head=self.head.state_dict(), optimizer=self.optimizer.state_dict(), done=self.done,
                             curve=self.curve, chosen=self.chosen, weights=self.weights))

    def write_head(self) -> str:
        """Saves the selected head in the layout of the released ones, with what it was trained for as `about`."""
        job = self.job
        about = dict(task=job.task, decoder=job.args.decoder, dim=job.network.backbone.embed_dim,
                     dataset=job.train.dataset, backbone=job.model_hash, classes=job.train.classes,
                     depth_range=job.limits if job.task == "depth" else None,
                     recipe=tuple(job.test) if job.test else None)
        weights = {f"decode_head.{k}": v.cpu() for k, v in self.weights.items()}
        if world()[0] == 0:
            write_file(self.head_path, partial(torch.save, dict(state_dict=weights, about=about)))
        self.saved.remove()
        return str(self.head_path)

    def batches(self):
        job, args, recipe = self.job, self.job.args, self.job.recipe
        augment = partial(augment_depth, dataset=job.train.dataset, short=args.short or 0)
        if job.task == "seg":
            long = 4 * job.test.short if args.decoder == "linear" else job.test.long  # 2048 for 512, unlike in testing
            augment = partial(augment_labels, short=job.test.short, long=long, ratios=job.ratios)
        pairs = TrainPairs(job.train, augment, recipe.crop, args.batch_size, args.seed, job.rules["mean"],
                           job.rules["std"])
        return load_items(pairs, range(self.done, recipe.steps), job.workers, job.device.type == "cuda")

    def loss(self, features, targets: Tensor) -> Tensor:
        if self.job.task == "seg":
            return segmentation_loss(self.head(features), targets, IGNORE)
        depth, targets = bilinear(self.head(features), targets.shape[-2:]), targets[:, None]  # (b, 1, H, W)
        max_depth, weight = self.head.depth_range[1], self.job.args.gradient_weight
        loss = sig_loss(depth, targets, max_depth, warm_up=self.done < 100)
        return loss + weight * gradient_loss(depth, targets, max_depth) if weight else loss

    def step(self, images: Tensor, targets: Tensor) -> Tensor:
        """One optimizer step on this process's images (b, C, H, W) and targets (b, H, W). Returns the mean loss over
        all processes."""
        job, recipe = self.job, self.job.recipe
        for group in self.optimizer.param_groups:
            group.update(lr=recipe.lr * learning_rate(self.done, recipe, job.task),
                         betas=(beta1(self.done, recipe.steps, job.task), 0.999))
        n_losses = -(-job.args.batch_size // IMAGES_PER_LOSS)
        features = [job.features(x) for x in images.split(IMAGES_PER_LOSS)]
        finish = batch_statistics(self.head.bn, features) if job.task == "seg" else lambda: None
        total = torch.zeros((), device=job.device)
        for x, target in zip(features, targets.split(IMAGES_PER_LOSS)):
            loss = self.loss(x, target) / n_losses
            loss.backward()
            total += loss.detach()
        finish()
        for x in (*(p.grad for p in self.head.parameters()), total) if world()[1] > 1 else ():
            dist.all_reduce(x)
        if recipe.clip:
            nn.utils.clip_grad_norm_(self.head.parameters(), recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def run(self) -> dict:
        """Trains to the end, leaves the selected head in the network, and returns its results."""
        job, steps, saved = self.job, self.job.recipe.steps, time.monotonic()
        say(f"training on {len(job.train):,} pairs, evaluating on {len(job.val):,}: {steps:,} steps")
        self.saved.load(self.restore)
        with tqdm(total=steps, initial=self.done, desc=f"{job.task} {job.args.decoder}", leave=False,
                  disable=no_bar()) as bar:
            for images, targets in self.batches():
                loss = self.step(to_device(images, job.device), to_device(targets, job.device))
                self.done += 1
                bar.update()
                due = self.done % self.eval_every == 0 or self.done == steps
                late = time.monotonic() - saved > 60
                if due or late or self.done % 20 == 0:  # not more often: reading the loss waits for the device
                    if not (loss := float(loss)) < math.inf:
                        raise ValueError(f"the loss of step {self.done} is {loss}; use a smaller --lr")
                    bar.set_postfix_str(f"loss {loss:.3f}" + (f", {self.last_result()}" if self.curve else ""))
                if due:
                    self.validate()
                if due or late:
                    self.save()
                    saved = time.monotonic()
        self.head.load_state_dict(self.weights)
        return self.chosen

    def validate(self) -> None:
        """Adds a point to the curve. For depth the best head so far is kept, as in the release; for segmentation, the
        last."""
        result = evaluate_dense(self.job)
        self.curve.append((self.done, result[self.measure]))
        if self.job.task == "seg" or not self.chosen or result["abs_rel"] < self.chosen["abs_rel"]:
            self.chosen, self.weights = result, copy.deepcopy(self.head.state_dict())
        say(f"step {self.done:,}: {self.last_result()}")

    def last_result(self) -> str:
        return f"{self.measure} on --val {self.curve[-1][1]:.3f}"


def batch_statistics(bn: nn.BatchNorm2d, features: list):
    """Makes batch normalization in eval mode use the mean and variance of the features of the whole batch, over all
    processes. Features do not depend on anything that is trained, so these are constants. Returns a function that ends
    this and updates the running statistics."""
    device = bn.weight.device
    exact = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    sums = torch.zeros(3, bn.num_features, dtype=exact, device=device)
    for taps in features:
        x = torch.cat([patches for patches, _ in taps], 1).to(exact)  # (b, C, h, w)
        sums += torch.stack([x.sum((0, 2, 3)), (x**2).sum((0, 2, 3)), torch.full_like(sums[0], x[:, 0].numel())])
    if world()[1] > 1:
        dist.all_reduce(sums)
    mean, n = sums[0] / sums[2], sums[2]
    variance = (sums[1] / n - mean**2).clamp(min=0)
    before = bn.running_mean, bn.running_var
    bn.running_mean, bn.running_var = mean.float(), variance.float()

    def finish():
        bn.running_mean, bn.running_var = (
            old.lerp(new.float(), bn.momentum) for old, new in zip(before, (mean, variance * n / (n - 1).clamp(min=1))))
        bn.num_batches_tracked += 1

    return finish


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate_dense(job: DenseEvaluation, pictures=None) -> dict:
    """Measures of the network on --val; `pictures` receive the predictions. Raises ValueError if no pixel counts."""
    pairs, (rank, n_ranks), classes = job.val, world(), len(job.val.classes or ())
    rows, shape = range(rank, len(pairs), n_ranks), (3, classes) if classes else (len(pairs), len(DEPTH_MEASURES) + 2)
    table = torch.zeros(shape, dtype=torch.float64)  # counts of labels, or measures of each image
    loader = load_items(pairs, rows, job.workers if len(rows) > 8 else 0)
    bar = tqdm(loader, total=len(rows), desc=f"evaluating on {pairs.name}", leave=False, disable=no_bar())
    for i, (image, target) in zip(rows, bar):
        predicted = job.predict(image, pairs.describe(i))
        if classes:
            table += count_labels(predicted, target, classes)
        else:
            valid = (target > job.limits[0]) & (target < job.limits[1]) & crop_of(target, job.crop)
            table[i] = depth_measures(predicted, target, valid)
        if pictures:
            pictures.add(i, image, target, predicted)
    if n_ranks > 1:
        total = table.to(job.device)
        dist.all_reduce(total)
        table = total.cpu()
    if pictures:
        pictures.finish()
    return (segmentation_summary if classes else depth_summary)(pairs.name, table)


class Predictions:
    """A folder with the prediction for each image, and sheet.png with 8 photographs of process 0, their targets and
    predictions. Raises ValueError if one of these files is among the data."""

    def __init__(self, job: DenseEvaluation, folder: Path):
        self.job, self.folder, self.tiles, self.targets = job, folder, [], []
        self.names = picture_names([job.val.describe(i) for i in range(len(job.val))])
        own = range(0, len(job.val), world()[1])
        self.shown = {own[i] for i in evenly_spaced(len(own), 8)}
        parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise ValueError(f"--predictions {folder} cannot be created in {parent}")
        data = {os.path.realpath(path) for pair in job.val.items for path in pair}
        for name in (*self.names, "sheet"):
            if os.path.realpath(folder / f"{name}.png") in data:
                raise ValueError(f"--predictions {folder} would overwrite {folder / name}.png, which is data")

    def add(self, i: int, image: Tensor, target: Tensor, predicted: Tensor) -> None:
        path = self.folder / f"{self.names[i]}.png"
        if self.job.task == "seg":
            save_labels(path, predicted.numpy(), self.job.colors)
            drawn = [label_colors(x.numpy(), self.job.colors) for x in (target, predicted)]
        else:
            save_depth(path, predicted.numpy(), self.job.limits[1])
            known = torch.cat([target[target > 0], predicted.flatten()])  # one scale for both
            near, far = known.min().item(), known.max().item()
            drawn = [depth_colors(x.numpy(), near, far) for x in (target, predicted)]
        if i in self.shown:
            images = [zoom(x, 240) for x in (to_rgb(image), *map(Image.fromarray, drawn))]
            if self.job.task == "depth":
                images[2] = stack(images[2], depth_bar(near, far, images[2].width))
            self.targets.append(target.flatten().numpy())
            self.tiles += [Tile(x, text) for x, text in zip(images, (self.names[i], "target", "prediction"))]

    def finish(self) -> None:
        if world()[0] == 0:
            key = None
            if self.job.task == "seg":
                key = legend(np.concatenate(self.targets), self.job.val.classes, self.job.colors)
            save_png(sheet(in_rows(self.tiles, 6), footer=key), self.folder / "sheet.png")


# ----------------------------------------------------------------------------------------------------------------------
# The command line


DECODERS = {"depth": ("linear", "linear4", "dpt"), "seg": ("linear", "ms")}
TRAINING_FLAGS = ("steps", "lr", "weight_decay", "warmup", "clip", "ratios", "decoder", "batch_size", "channels",
                  "gradient_weight", "eval_every", "seed", "no_resume")


def parse(argv: list[str] | None) -> argparse.Namespace:
    flags = Parser(__doc__)
    add = flags.add_argument
    add("checkpoint", help="out/ckpt.pth, a released .pth, the name of a released model such as dinov2_vits14, or a "
        "file from Hugging Face or timm; or dinov2_vitg14_m2f, which is backbone and head")
    add("--task", choices=tuple(DECODERS), required=True)
    add("--data", required=True, metavar="FOLDER", help="photographs with depth or labels, see above")
    add("--val", default="", metavar="FOLDER", help="to evaluate on; default: the validation split of --data")
    add("--decoder", default="linear", help="the head to train. depth: linear, linear4 (4 blocks), dpt; seg: linear, "
        "ms (4 blocks, tested at several scales)")
    add("--head", default="", help="evaluate this head instead of training one: a file or, for a released model, one "
        f"of {', '.join(hub.DENSE_HEADS)}")
    add("--channels", type=at_least(2), default=256, help="width of the DPT decoder; cost grows "
        "quadratically, so use fewer for small backbones")
    add("--depth-range", type=float, nargs=2, metavar=("MIN", "MAX"), help="meters that the head can predict and that "
        "are evaluated; default: those of the data set, or 0.001 10")
    add("--depth-scale", type=positive, default=1000.0, help="units per meter in the 16-bit PNG of your own folders")
    add("--steps", type=at_least(1), help="training steps; default, here and down to --ratios: from the recipe")
    add("--batch-size", type=at_least(1), default=16, help="global batch, over all processes")
    add("--lr", type=positive, help="peak learning rate")
    add("--weight-decay", type=float, help="of AdamW")
    add("--warmup", type=float, help="learning rate warmup, as a fraction of the steps")
    add("--clip", type=float, help="largest gradient norm; 0: no clipping")
    add("--crop", type=at_least(1), nargs=2, metavar=("HEIGHT", "WIDTH"), help="training crop, in pixels; "
        "for segmentation, its shorter side is also the size of the test windows")
    add("--short", type=at_least(1), help="resize photographs to this short side, in training times --ratios; default "
        "for depth: no resizing")
    add("--ratios", type=positive, nargs=2, metavar=("MIN", "MAX"), help="segmentation: random scales in training")
    add("--gradient-weight", type=float, default=0.0, help="depth: weight of the gradient loss; the official recipe "
        "uses 0.5, but a bug there makes this loss 0")
    add("--scales", type=positive, nargs="+", help="segmentation: test-time scales, relative to --short")
    add("--flip", action=argparse.BooleanOptionalAction, default=None, help="at test time, average with the "
        "prediction for the mirror image; default: yes for depth; for segmentation, from the recipe of the head")
    add("--eval-crop", choices=tuple(CROPS), help="the part of photographs where depth is evaluated; default: nyu for "
        "NYUv2, garg for KITTI, otherwise none (everywhere)")
    add("--eval-every", type=at_least(0), default=0, help="steps between evaluations; 0: ten evaluations")
    add("--predictions", default="", metavar="FOLDER", help="save predictions for --val here: labels as palette PNG, "
        "depth as 16-bit PNG in millimeters (1/256 m if the head reaches beyond 65 m), and sheet.png")
    add("--seed", type=int, default=0, help="for initialization, sampling order and augmentation")
    add("--no-resume", action="store_true", help="start over after an interruption")
    flags.add_machine_flags("device", "dtype", "num-workers")
    add_result_flags(flags)
    args = flags.parse_args(argv)
    args.changed = {name for name, value in vars(args).items() if value != flags.get_default(name)}
    check_flags(args)
    return args


def check_flags(args: argparse.Namespace) -> None:
    if args.decoder not in DECODERS[args.task]:
        raise ValueError(f"--decoder {args.decoder} is not for --task {args.task}; use "
                         f"{' or '.join(DECODERS[args.task])}")
    if not all(v is None or v >= 0 for v in (args.weight_decay, args.clip, args.gradient_weight)):
        raise ValueError("--weight-decay, --clip and --gradient-weight must be 0 or more")
    if args.warmup is not None and not 0 <= args.warmup <= 1 or args.ratios and args.ratios[0] > args.ratios[1]:
        raise ValueError("--warmup is a fraction, 0 to 1; --ratios are two numbers, the smaller first")
    if args.task == "seg":
        forbid(args, ("depth_range", "depth_scale", "gradient_weight", "eval_crop"), "is only for --task depth")
    else:
        forbid(args, ("ratios", "scales"), "is only for --task seg")
    if args.decoder != "dpt":
        forbid(args, ("channels",), "is only for --decoder dpt")
    if args.predictions and Path(args.predictions).is_file():
        raise ValueError(f"--predictions {args.predictions} is a file; name a folder")


def forbid(args: argparse.Namespace, names: tuple[str, ...], reason: str) -> None:
    """Raises ValueError if one of these flags was given."""
    if given := [name for name in names if name in args.changed]:
        raise ValueError(f"--{given[0].replace('_', '-')} {reason}")


def report(job: DenseEvaluation, protocol: dict, result: dict) -> None:
    args = job.args
    record = dict(
        evaluation="dense", protocol=protocol, result=result,
        data={what: dict(folder=pairs.name, dataset=pairs.dataset, images=len(pairs)) for what, pairs in
              (("train", job.train), ("val", job.val)) if pairs},
        model=dict(checkpoint=args.checkpoint, sha256=job.model_hash, step=job.step))
    columns = {f"{job.task} {args.decoder if job.trains else ''}".strip(): ""}
    if job.task == "depth":
        columns |= {name: f"{result[name]:.4f}" for name in ("rmse", "abs_rel", "a1")}
        columns["(constant prediction: rmse"] = f"{result['constant_everywhere']['rmse']:.4f})"
    else:
        columns |= {name: f"{result[name]:.2f} %" for name in ("mIoU", "aAcc", "mAcc")}
        columns["(constant prediction: mIoU"] = f"{result['commonest_class_everywhere']['mIoU']:.2f} %)"
    columns |= {result["head"]: ""} if "head" in result else {}
    path = Path(args.out) if args.out else Path(f"{job.stem}.eval_dense.jsonl")
    add_record(path, record, columns, args.json, job.device, job.began)


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    with DenseEvaluation(args) as job:
        protocol, training = dict(task=args.task, dtype=args.dtype), None
        if job.task == "depth":
            protocol |= dict(eval_crop=job.crop, limits=job.limits, flip=args.flip is not False)
        else:
            protocol |= dict(test=job.test._asdict())
        if job.trains:
            n_ranks = world()[1]
            if n_ranks > 1 and args.batch_size % (IMAGES_PER_LOSS * n_ranks):
                raise ValueError(f"--batch-size {args.batch_size} is not a multiple of {IMAGES_PER_LOSS * n_ranks}: "
                                 f"{IMAGES_PER_LOSS} images for each of {n_ranks} processes")
            training = HeadTraining(job)
            result = training.run()
            protocol |= training.protocol
        else:
            protocol["head"] = args.head
        if job.pictures or not training:
            result = evaluate_dense(job, job.pictures)
        if training:
            result |= dict(curve=training.curve)
            try:
                result["head"] = training.write_head()
            except ValueError as error:  # disk full: report the results all the same, and keep the save
                say(f"note: {error}; the same command will write it from {training.saved.path}")
        if world()[0] == 0:
            report(job, protocol, result)
    return result


if __name__ == "__main__":
    run(main, interrupted="stopped; the same command resumes training from its last save")
