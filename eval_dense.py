"""Depth and semantic segmentation with frozen features: trains a head and evaluates it, or evaluates one.

    python eval_dense.py out/ckpt.pth --task depth --data /data/nyu                     # --decoder linear4, or dpt
    python eval_dense.py dinov2_vits14 --task seg --data /data/ADEChallengeData2016 --decoder ms
    python eval_dense.py dinov2_vits14 --task depth --data /data/nyu --head nyu_dpt     # a released head, or a file
    python eval_dense.py dinov2_vits14 --task seg --data photos --short 224 --crop 224 224 --steps 2000
    torchrun --nproc-per-node 8 eval_dense.py ckpt.pth --task seg --data /data/VOCdevkit/VOC2012

--data is recognized by what lies in it:
    NYUv2      nyu_train.txt, nyu_test.txt, of lines `photo depth focal`; 16-bit PNG, millimeters
    KITTI      kitti_eigen_train.txt, kitti_eigen_test.txt, input/, gt_depth/; 16-bit PNG, meters times 256
    ADE20K     images/{training,validation}, annotations/{training,validation}; 0 is no class
    VOC2012    JPEGImages, SegmentationClass, SegmentationClassAug, ImageSets/Segmentation/{train,aug,val}.txt
    any other  images/ and depth/ or labels/, with files of the same names, in sub-folders train/ and val/; or without
               these, and --val names another such folder. Depth: 16-bit PNG, meters times --depth-scale, 0 unknown;
               .npy, meters if they are floating-point numbers. Labels: PNG of class numbers, 255 is ignored; names may
               be in classes.txt, a line each.

Recipes are those of the released heads (DINOv2, section 7.4, and its configurations): the backbone is frozen; the loss
is of two images at a time, as officially on each GPU, and averaged over --batch-size. The head comes to
CKPT.TASK_DECODER_head.pth, in the layout of the release, and hub.load_dense reads it; a line with all figures to
CKPT.eval_dense.jsonl. After an interruption the same command goes on. Wrong input: exit code 2. Apache License 2.0.
"""
import argparse
import copy
import hashlib
import math
import os
import random
import sys
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
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import hub
from data import hue, make_loader, normalize
from heads import (
    CLASSES, RANGES, RECIPES, DPTHead, Dense, LinearDepthHead, Recipe, SegmentationHead, colors, gradient_loss, resize,
    resize_bytes, scaled_size, segment, segmentation_loss, sig_loss)
from support.cli import DTYPES, Parser, run
from support.draw import Cell, depth_bar, depth_colors, label_colors, legend, rows_of, save, sheet, spread, to_rgb, zoom
from support.evaluation import ResumeFile, add_record, add_result_flags, check_writable, results_stem, say
from support.images import FORMATS, check_size, read_image
from support.parallel import join_processes, leave_processes, pick_device, worker_count, world
from support.run import write_file
from support.sources import SPLIT_FOLDERS, Source, image_paths
from visualize import depth_of, file_names, save_depth, save_labels, under

IGNORE = 255  # the label of pixels that do not count
GROUP = 2  # images in a loss


# ----------------------------------------------------------------------------------------------------------------------
# Photographs, and what is known of their pixels


class Pairs(Source):
    """Photographs with a depth or a class for each pixel. `dataset`: one of heads.RANGES or heads.CLASSES, or ""."""

    def __init__(self, name: str, items: list[tuple[str, str]], task: str, dataset: str, classes=None,
                 depth_scale: float = 1000):
        self.name, self.items, self.task, self.dataset, self.classes = name, items, task, dataset, classes
        self.depth_scale = {"nyu": 1000.0, "kitti": 256.0}.get(dataset, depth_scale)
        names = "\n".join(f"{photo} {target}" for photo, target in items)
        self.fingerprint = hashlib.sha256(f"{dataset} {self.depth_scale} {names}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.items)

    def describe(self, i: int) -> str:
        return self.items[i][0]

    def read(self, i: int) -> tuple[Tensor, Tensor]:
        """Photograph i, uint8 or uint16 (C, H, W), and its depth, float32 (H, W), meters, 0 where it is not known, or
        its labels, uint8 (H, W). Raises ValueError, naming the file, for what cannot be used."""
        photo, target = self.items[i]
        image = read_image(photo, self.channels)
        values = read_depth(target, self.depth_scale) if self.task == "depth" else self.read_labels(target)
        if values.shape != image.shape[-2:]:
            raise ValueError(f"{photo} has {image.shape[-2]}x{image.shape[-1]} pixels, {target} has "
                             f"{values.shape[0]}x{values.shape[1]}; a pair must be of one size")
        if self.dataset == "kitti":  # the part of the picture that the laser sees
            top, left = values.shape[0] - 352, int((values.shape[1] - 1216) / 2)
            if top < 0 or left < 0:
                raise ValueError(f"{photo} is smaller than the 352x1216 pixels that KITTI is cut to")
            image, values = (x[..., top : top + 352, left : left + 1216] for x in (image, values))
        return image, values

    def read_labels(self, path: str) -> Tensor:
        labels = read_numbers(path)
        if labels.dtype.kind == "f" or labels.size and labels.min() < 0:
            raise ValueError(f"{path}: labels are whole numbers, 0 or more, not {labels.dtype} from {labels.min()}")
        labels = labels.astype(np.int64)
        if self.dataset == "ade20k":  # 0 is no class, and class 0 is written as 1
            labels = np.where((labels == 0) | (labels == IGNORE), IGNORE, labels - 1)
        wrong = labels[(labels != IGNORE) & (labels >= len(self.classes))]
        if wrong.size:
            raise ValueError(f"{path} has the label {wrong.max()}, but the {len(self.classes)} classes are numbered "
                             f"from 0 to {len(self.classes) - 1} ({IGNORE} is ignored); they are those of the labels "
                             "to train with, unless classes.txt beside these names more")
        return torch.from_numpy(labels.astype(np.uint8))


def read_numbers(path: str) -> np.ndarray:
    """A .npy file, or an image of one channel, as numbers (H, W): of a palette image the numbers of the colors. Raises
    ValueError, naming the file."""
    try:
        if path.endswith(".npy"):
            numbers = np.load(path, allow_pickle=False)
        else:
            with Image.open(path, formats=FORMATS) as file:
                check_size(*file.size)
                numbers = np.asarray(file)
    except Exception as error:  # decoders raise all sorts on damaged files
        raise ValueError(f"{path} cannot be read ({str(error) or type(error).__name__})") from None
    if numbers.ndim != 2 or numbers.dtype.kind not in "uifb":
        raise ValueError(f"{path} has the shape {numbers.shape} and type {numbers.dtype}; it must have one number for "
                         "each pixel, as a gray or palette PNG, or a .npy file of (H, W)")
    return numbers


def read_depth(path: str, scale: float) -> Tensor:
    numbers = read_numbers(path)
    if numbers.dtype.itemsize == 1:
        raise ValueError(f"{path} has 8 bits, too few for depth; save meters times --depth-scale with 16 bits, or as "
                         ".npy, in meters")
    depth = torch.from_numpy(numbers.astype(np.float32) / (1 if numbers.dtype.kind == "f" else scale))
    return torch.where(depth.isfinite() & (depth > 0), depth, 0.0)


def open_pairs(root: str, task: str, split: str, depth_scale: float = 1000) -> Pairs | None:
    """The pairs of a folder, see above; `split` is TRAIN or VAL. None if it is one of ours without such a part. Raises
    ValueError for what is missing."""
    folder, train = Path(root).expanduser(), split == "TRAIN"
    if not folder.is_dir():
        raise ValueError(f"no such folder: {root}")
    for name in ("ADEChallengeData2016", "VOC2012", "VOCdevkit/VOC2012"):  # the archives, unpacked here
        folder = folder / name if task == "seg" and (folder / name).is_dir() else folder
    try:
        if task == "depth":
            for dataset, listing, parts in (("nyu", "nyu_{}.txt", ("", "")),
                                            ("kitti", "kitti_eigen_{}.txt", ("input", "gt_depth"))):
                if (folder / listing.format("train")).exists() or (folder / listing.format("test")).exists():
                    items = listed(folder, folder / listing.format("train" if train else "test"), parts)
                    return Pairs(f"{root} ({split})", items, task, dataset)
        elif (folder / "JPEGImages").is_dir():
            return Pairs(f"{root} ({split})", voc_items(folder, train), task, "voc2012", CLASSES["voc2012"])
        elif any((folder / "annotations" / part).is_dir() for part in ("training", "validation")):
            part = "training" if train else "validation"
            items = matched(folder / "images" / part, folder / "annotations" / part)
            return Pairs(f"{root} ({split})", items, task, "ade20k", CLASSES["ade20k"])
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read ({error.strerror})") from None
    return open_plain(root, folder, task, split, depth_scale)


def open_plain(root: str, folder: Path, task: str, split: str, depth_scale: float) -> Pairs | None:
    images, targets = folder / "images", folder / ("depth" if task == "depth" else "labels")
    if not images.is_dir() or not targets.is_dir():
        raise ValueError(f"{root} is none of the known data sets for --task {task}, and has no folders images/ and "
                         f"{targets.name}/; see --help")
    parts = {name: part for name, names in SPLIT_FOLDERS.items() for part in names if (images / part).is_dir()}
    if parts:
        if split not in parts:
            return None
        images, targets = images / parts[split], targets / parts[split]
    elif split == "VAL":
        return None
    pairs = Pairs(f"{root} ({split})" if parts else root, matched(images, targets), task, "", depth_scale=depth_scale)
    if task == "seg" and (folder / "classes.txt").exists():
        pairs.classes = (folder / "classes.txt").read_text().split("\n")
        pairs.classes = [line.strip() for line in pairs.classes if line.strip()]
        if not 0 < len(pairs.classes) <= IGNORE:
            raise ValueError(f"{folder / 'classes.txt'} names {len(pairs.classes)} classes; it must be 1 to {IGNORE}")
    return pairs


def count_classes(pairs: Pairs) -> list[str]:
    """Names for the classes of labels that come without: "class 0", ..., up to the largest number in any."""
    most = -1
    for _, path in tqdm(pairs.items, desc=f"classes of {pairs.name}", leave=False,
                        disable=None if world()[0] == 0 else True):
        numbers = read_numbers(path).astype(np.int64)
        most = max(most, int(numbers[numbers != IGNORE].max(initial=-1)))
    if not 0 <= most < IGNORE:
        raise ValueError(f"the labels of {pairs.name} go up to {most}; they must be 0 to {IGNORE - 1}" if most >= 0 else
                         f"all pixels of {pairs.name} are labeled {IGNORE}, which is to be ignored")
    return [f"class {k}" for k in range(most + 1)]


def listed(folder: Path, listing: Path, parts: tuple[str, str]) -> list[tuple[str, str]]:
    """The pairs of a file with lines `photo depth focal`. Photographs without a depth, `None`, are left out."""
    lines = [line.split() for line in listing.read_text().splitlines() if line.strip()]
    if short := [line for line in lines if len(line) < 2]:
        raise ValueError(f"{listing} has a line {' '.join(short[0])!r}; lines are `photo depth focal`")
    items = [tuple(str(folder / part / name.lstrip("/")) for part, name in zip(parts, line)) for line in lines
             if line[1] != "None"]
    return existing(sorted(items), listing)


def voc_items(folder: Path, train: bool) -> list[tuple[str, str]]:
    """train is train and aug together, 10,582 photographs; without the labels of aug, 1,464."""
    items = []
    for part, labels in (("train", "SegmentationClass"), ("aug", "SegmentationClassAug")) if train else (
            ("val", "SegmentationClass"),):
        listing = folder / "ImageSets/Segmentation" / f"{part}.txt"
        if part == "aug" and not listing.exists():
            if world()[0] == 0:
                print(f"note: there is no {listing}, which officially adds 9,118 photographs to train", file=sys.stderr)
            continue
        items += [(str(folder / "JPEGImages" / f"{name}.jpg"), str(folder / labels / f"{name}.png"))
                  for name in listing.read_text().split()]
    return existing(items, folder)


def matched(images: Path, targets: Path) -> list[tuple[str, str]]:
    """Files of the same names, but for the suffixes, in two folders and those in them."""
    for folder in (images, targets):
        if not folder.is_dir():
            raise ValueError(f"no such folder: {folder}")
    roots = images.resolve(), targets.resolve()
    photos, others = ({}, {})
    for files, root in zip((photos, others), roots):
        for path in image_paths([str(root)]):
            if (other := files.setdefault(Path(path).relative_to(root).with_suffix(""), path)) != path:
                raise ValueError(f"{path} and {other} have one name but for the suffix; a pair is two files of a name")
    for mine, theirs, where in ((photos, others, targets), (others, photos, images)):
        if alone := sorted(mine.keys() - theirs.keys()):
            raise ValueError(f"{mine[alone[0]]} has no partner of the same name in {where}" + (
                f", nor have {len(alone) - 1} others" if len(alone) > 1 else ""))
    return [(photos[name], others[name]) for name in sorted(photos)]


def existing(items: list[tuple[str, str]], where: Path) -> list[tuple[str, str]]:
    missing = [path for pair in items for path in pair if not Path(path).exists()]
    if missing or not items:
        raise ValueError(f"{where} names {len(missing)} files that do not exist, the first: {missing[0]}" if items else
                         f"{where} names no pairs")
    return items


# ----------------------------------------------------------------------------------------------------------------------
# Recipes


class Training(NamedTuple):
    """How a head is trained: the flags, where they are not given. Sizes are height and width in pixels."""
    steps: int
    warmup: float  # share of the steps in which the rate rises
    start: float  # share of the rate at which it starts to
    lr: float
    weight_decay: float
    clip: float  # largest norm of the gradient; 0: any
    crop: tuple[int, int]


DEPTH = Training(38_400, 1 / 3, 1e-3, lr=1e-4, weight_decay=0.01, clip=35.0, crop=(416, 544))
TRAININGS = {
    "nyu": DEPTH, "kitti": DEPTH._replace(crop=(352, 704)), "depth": DEPTH,
    "linear": Training(40_000, 0.0375, 1e-6, lr=1e-3, weight_decay=1e-4, clip=0.0, crop=(512, 512)),
    "ms": Training(40_000, 0.0375, 1e-6, lr=1e-3, weight_decay=1e-4, clip=0.0, crop=(640, 640))}
RATIOS = {"linear": (0.5, 2.0), "ms": (1.0, 3.0)}  # of the size of photographs in segmentation, to that in testing


def learning_rate(step: int, recipe: Training, task: str) -> float:
    """As a share of the largest: linear warm-up into a cosine (depth) or a straight line (segmentation) down to 0; both
    at once, as mmcv does it."""
    passed, rising = step / recipe.steps, step / max(recipe.warmup * recipe.steps, 1e-9)
    down = 1e-8 + (1 - 1e-8) * 0.5 * (1 + math.cos(math.pi * passed)) if task == "depth" else 1 - passed
    return down * (1 - (1 - rising) * (1 - recipe.start)) if rising < 1 else down


def first_beta(step: int, steps: int, task: str) -> float:
    """Adam's first beta: in depth training from 0.95 down to 0.85 in the first three tenths, and back up."""
    if task == "seg":
        return 0.9
    top = max(0.3 * steps - 1, 1)
    at = min(step / top, 1) if step <= top else 1 - min((step - top) / max(steps - 1 - top, 1), 1)
    return 0.85 + 0.1 * 0.5 * (1 + math.cos(math.pi * at))


# ----------------------------------------------------------------------------------------------------------------------
# Augmentation of a pair


def window(rng: random.Random, size, crop) -> tuple[slice, slice]:
    """A random place for a crop; all of a side that is no longer."""
    starts = [rng.randint(0, max(side - wanted, 0)) for side, wanted in zip(size, crop)]
    return tuple(slice(start, start + wanted) for start, wanted in zip(starts, crop))


def train_size(size, dataset: str = "", short: int = 0) -> tuple[int, int]:
    """Height and width from which crops for depth are cut: of NYU without the white frame; scaled as photographs are
    whose short side becomes `short`."""
    height, width = (427, 565) if dataset == "nyu" else size
    factor = short / min(size) if short else 1
    return max(round(height * factor), 1), max(round(width * factor), 1)


def augment_depth(rng: random.Random, image: Tensor, depth: Tensor, crop, dataset: str = "",
                  short: int = 0) -> tuple[Tensor, Tensor]:
    """A photograph (C, H, W), uint8 or uint16, and its depth (H, W): resized to the short side `short`, unless that is
    0, turned, mirrored, cut to `crop` (or less, where there is less), colored. Returns the photograph in [0, 1]. Of
    NYU's the white frame is cut off first."""
    x, size = image.float() / (65535 if image.dtype == torch.uint16 else 255), train_size(depth.shape, dataset, short)
    if dataset == "nyu":
        x, depth = (v[..., 45:472, 43:608] for v in (x, depth))
    if short:
        x = TF.resize(x, list(size), InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        depth = F.interpolate(depth[None, None], size=size, mode="nearest")[0, 0]
    if rng.random() < 0.5:
        angle = rng.uniform(-2.5, 2.5)
        x = TF.rotate(x, angle, InterpolationMode.BILINEAR)
        depth = TF.rotate(depth[None], angle, InterpolationMode.NEAREST)[0]
    if rng.random() < 0.5:
        x, depth = x.flip(-1), depth.flip(-1)
    rows, columns = window(rng, depth.shape, crop)
    x, depth = x[:, rows, columns], depth[rows, columns]
    if rng.random() < 0.5:  # officially so, the power of values up to 255 included
        width = 0.1 if dataset == "kitti" else 0.25
        gamma, bright = rng.uniform(0.9, 1.1), rng.uniform(1 - width, 1 + width)
        shades = torch.tensor([rng.uniform(0.9, 1.1) for _ in range(len(x))])[:, None, None]
        x = ((x * 255) ** gamma * bright * shades).clamp(0, 255) / 255
    return x, depth


def augment_labels(rng: random.Random, image: Tensor, labels: Tensor, crop, short: int, long: int,
                   ratios) -> tuple[Tensor, Tensor]:
    """A photograph (C, H, W), uint8 or uint16, and its labels (H, W): resized so that the short side is `short` pixels
    (but the long one at most `long`) times a random ratio, cut to `crop` (or less, where there is less), mirrored,
    colored. Returns the photograph in [0, 1]. A crop of which one class takes three quarters is drawn again."""
    ratio = rng.uniform(*ratios)
    size = scaled_size(*labels.shape, int(long * ratio), int(short * ratio))
    x = resize_bytes(image, size) / (65535 if image.dtype == torch.uint16 else 255)
    labels = F.interpolate(labels[None, None].float(), size=size, mode="nearest")[0, 0].to(torch.uint8)
    for _ in range(10):
        place = window(rng, size, crop)
        counts = labels[place][labels[place] != IGNORE].long().bincount()
        if (counts > 0).sum() > 1 and counts.max() < 0.75 * counts.sum():
            break
    x, labels = x[:, place[0], place[1]], labels[place]
    if rng.random() < 0.5:
        x, labels = x.flip(-1), labels.flip(-1)
    return distort(rng, x), labels


def distort(rng: random.Random, x: Tensor) -> Tensor:
    """Brightness, contrast, and of color images saturation and hue, (C, h, w) in [0, 1]; each in half of the cases,
    contrast before or after the other two. As in SSD (Liu et al. 2016, arXiv 1512.02325)."""
    half = lambda low, high: rng.uniform(low, high) if rng.random() < 0.5 else None  # noqa: E731
    shift, first = half(-32 / 255, 32 / 255), rng.random() < 0.5
    gain, saturation, turn = half(0.5, 1.5), half(0.5, 1.5), half(-0.1, 0.1)  # 18 of 180
    x = x if shift is None else (x + shift).clamp(0, 1)
    x = (x * gain).clamp(0, 1) if gain is not None and first else x
    if len(x) == 3 and saturation is not None:
        most, least = x.amax(0), x.amin(0)
        widest = most / (most - least).clamp(min=1e-6)  # which makes the least of the three channels 0
        x = most - (most - x) * widest.clamp(max=saturation)
    if len(x) == 3 and turn is not None:
        x = hue(x[None], torch.full((1, 1, 1, 1), turn))[0]
    return (x * gain).clamp(0, 1) if gain is not None and not first else x


class TrainPairs(torch.utils.data.Dataset):
    """[step] -> the pairs of this process: images (b, C, *crop), normalized, targets (b, *crop), and ""; or why not."""

    def __init__(self, pairs: Pairs, augment, crop, n: int, batch_size: int, seed: int, mean, std):
        self.pairs, self.augment, self.crop, self.n, self.seed = pairs, augment, crop, n, seed
        self.mean, self.std = mean, std
        rank, n_ranks = world()
        groups = torch.arange(batch_size).split(GROUP)[rank::n_ranks]
        self.own = torch.cat(groups).tolist() if groups else []
        self.batch_size = batch_size

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, step: int):
        try:
            images, targets = zip(*(self.sample(step * self.batch_size + i) for i in self.own))
        except ValueError as error:
            return None, None, str(error)
        return torch.stack(images), torch.stack(targets), ""

    def sample(self, s: int) -> tuple[Tensor, Tensor]:
        """Sample s of the whole training; what the crop lacks is 0 in the photograph, unknown in the target."""
        rng = random.Random(f"{self.seed}/dense/{s}")
        image, target = self.augment(rng, *self.pairs.read(self.pairs.pick(s, self.seed)), self.crop)
        image = normalize(image[None], self.mean, self.std)[0]
        lack = [0, self.crop[1] - target.shape[1], 0, self.crop[0] - target.shape[0]]
        return F.pad(image, lack), F.pad(target, lack, value=0 if target.is_floating_point() else IGNORE)


# ----------------------------------------------------------------------------------------------------------------------
# Measures


DEPTH_MEASURES = ("a1", "a2", "a3", "abs_rel", "sq_rel", "rmse", "rmse_log", "log_10", "silog")
CROPS = {  # of photographs in the evaluation of depth: rows and columns, as shares of height and width
    "nyu": (45 / 480, 471 / 480, 41 / 640, 601 / 640), "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
    "eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229), "none": (0.0, 1.0, 0.0, 1.0)}


def crop_of(depth: Tensor, name: str) -> Tensor:
    """Where depth (H, W) counts, (H, W) bool: inside of the crop of this name."""
    (height, width), (top, bottom, left, right) = depth.shape, CROPS[name]
    mask = torch.zeros_like(depth, dtype=torch.bool)
    # 1e-6: 45 / 480 * 480 may come out below 45
    rows, columns = (slice(int(a * n + 1e-6), int(b * n + 1e-6)) for a, b, n in
                     ((top, bottom, height), (left, right, width)))
    mask[rows, columns] = True
    return mask


def depth_measures(depth: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """DEPTH_MEASURES (9,), float64, of one image: predicted and true depth in meters and where it counts, all (H, W).
    NaN if that is nowhere. Shares of pixels within 1.25, 1.25^2, 1.25^3; relative, squared relative, root mean square
    errors, of the depth, its natural and decimal logarithm; 100 times the scale-invariant error (Eigen et al. 2014)."""
    p, d = depth[valid].double(), target[valid].double()
    e, ratio = p.log() - d.log(), torch.maximum(p / d, d / p)
    silog = ((e**2).mean() - e.mean() ** 2).clamp(min=0).sqrt() * 100
    return torch.stack([
        *((ratio < 1.25**k).double().mean() for k in (1, 2, 3)), ((p - d).abs() / d).mean(), ((p - d) ** 2 / d).mean(),
        ((p - d) ** 2).mean().sqrt(), (e**2).mean().sqrt(), (p.log10() - d.log10()).abs().mean(), silog])


def count_labels(predicted: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """(3, classes) int64: pixels rightly predicted to be of each class, predicted, and labeled so; of those not to be
    ignored. predicted, labels: (H, W)."""
    known = labels != IGNORE
    p, t = predicted[known].long(), labels[known].long()
    return torch.stack([x.bincount(minlength=n_classes) for x in (t[p == t], p, t)])


def segmentation_measures(counts: Tensor) -> dict[str, float]:
    """Of the counts of all images together, in percent: mIoU, and mAcc, the means over classes, and aAcc, the share of
    pixels. Classes that occur nowhere do not count."""
    right, predicted, labeled = counts.double().cpu()
    iou = 100 * right / (predicted + labeled - right)  # NaN where there is no pixel
    return dict(mIoU=iou.nanmean().item(), aAcc=(100 * right.sum() / labeled.sum()).item(),
                mAcc=(100 * right / labeled).nanmean().item(),
                IoU=[None if math.isnan(v) else round(v, 4) for v in iou.tolist()])


# ----------------------------------------------------------------------------------------------------------------------
# A backbone, its head, and two sets of pairs


class Job:
    """What the command line asks for, opened and checked. To be used in a `with`. Raises ValueError, with the fix in
    the message, for whatever does not fit."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.task, self.began = args, args.task, time.time()
        check_writable(args.out)
        self.device, self.dtype = pick_device(args.device), DTYPES[args.dtype]
        self.path, ckpt = hub.read(args.checkpoint)
        self.step = ckpt.get("step")
        self.trains = not (args.head or hub.is_mask2former(ckpt))
        if not self.trains:
            check_untrained(args)
        if self.trains:
            backbone = hub.load(self.path, ckpt)
        else:
            self.network, about = hub.load_dense(args.checkpoint, args.head or None, args.depth_range, ckpt)
            backbone = self.network.backbone if args.head else self.network
            if about.task != self.task:
                raise ValueError(f"{args.head or args.checkpoint} is for --task {about.task}")
        self.rules, self.model_hash = hub.image_rules(backbone, ckpt), hub.weights_hash(backbone)
        join_processes(self.device)
        self.workers = worker_count(args.num_workers, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self.train, self.val = self.open_data()
        if self.trains:
            self.choose_recipe()
            self.network = Dense(backbone, self.new_head(backbone.embed_dim))
        else:
            self.adopt(about)
        self.crop = args.eval_crop or {"nyu": "nyu", "kitti": "garg"}.get(self.val.dataset, "none")
        self.colors = colors(len(self.val.classes or ()), self.val.dataset)
        if self.test:
            flip = self.test.flip if args.flip is None else args.flip
            self.test = self.test._replace(flip=flip, ratios=tuple(args.scales or self.test.ratios))
        self.pictures = Pictures(self, Path(args.predictions)) if args.predictions else None
        self.network.to(self.device).eval().requires_grad_(False)

    def __enter__(self):
        return self

    def __exit__(self, kind, *error) -> None:
        leave_processes(kind is None)

    def open_data(self) -> tuple[Pairs | None, Pairs]:
        """The pairs to train with, if a head is to be trained, and those to evaluate with."""
        args, found = self.args, []
        for split, root in (("TRAIN", args.data if self.trains else ""), ("VAL", args.val or args.data)):
            pairs = open_pairs(root, args.task, split, args.depth_scale) if root else None
            if pairs is None and split == "VAL":  # --val may be images/ and labels/ without sub-folders
                pairs = open_pairs(root, args.task, "TRAIN", args.depth_scale) if args.val or not self.trains else None
            found.append(pairs)
        train, val = found
        if val is None:
            raise ValueError(f"{args.data} has no part to evaluate with, such as images/val; name one by --val")
        if self.trains and train is None:
            raise ValueError(f"{args.data} has no part to train with, such as images/train")
        if train and set(train.items) & set(val.items):
            raise ValueError(f"--val {args.val} has pairs of --data {args.data} in it; name others")
        for pairs in (train, val):
            if pairs:
                pairs.channels = self.rules["in_chans"]
        if train and args.task == "seg":
            named, train.classes = train.classes, train.classes or count_classes(train)
            if val.classes and (val.classes != named if named else len(val.classes) != len(train.classes)):
                raise ValueError(f"{val.name} has other classes than {train.name}, or in another order")
            val.classes = train.classes
        return train, val

    def choose_recipe(self) -> None:
        """The flags that were not given, as the data set and the kind of head have them."""
        args, data = self.args, self.train
        own = TRAININGS[data.dataset or "depth"] if args.task == "depth" else TRAININGS[args.decoder]
        crop = tuple(args.crop or own.crop)
        if args.task == "depth" and not args.crop:
            crop = tuple(map(min, crop, train_size(data.read(0)[1].shape, data.dataset, args.short or 0)))
        given = {name: value for name, value in dict(
            steps=args.steps, warmup=args.warmup, lr=args.lr, weight_decay=args.weight_decay, clip=args.clip).items()
            if value is not None}
        self.recipe = own._replace(crop=crop, **given)
        self.test = None
        if args.task == "seg":
            test = RECIPES.get((data.dataset, args.decoder), RECIPES["ade20k", args.decoder])
            self.test = cut(test._replace(short=args.short or test.short), args.crop)
        self.limits = tuple(args.depth_range or RANGES.get(data.dataset, RANGES["nyu"]))
        self.ratios = tuple(args.ratios or RATIOS.get(args.decoder, ()))

    def new_head(self, dim: int) -> nn.Module:
        """The same on all processes, whatever their number."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.args.seed)
            if self.task == "seg":
                return SegmentationHead(dim, len(self.train.classes), 4 if self.args.decoder == "ms" else 1)
            if self.args.decoder == "dpt":
                return DPTHead(dim, *self.limits, channels=self.args.channels)
            return LinearDepthHead(dim, 4 if self.args.decoder == "linear4" else 1, *self.limits)

    def adopt(self, about: hub.About) -> None:
        """What a head that exists says of itself."""
        if self.task == "depth":
            self.test, self.limits = None, self.network.decode_head.depth_range
            return
        name, self.limits = self.args.head or self.args.checkpoint, None
        self.test = cut(about.recipe._replace(short=self.args.short or about.recipe.short), self.args.crop)
        if self.val.dataset and self.val.dataset != about.dataset:
            raise ValueError(f"{name} knows the classes of {about.dataset or 'other data'}, not those of "
                             f"{self.val.name}")
        numbered = about.classes[0] == "class 0"  # they had no names when the head was trained
        if (own := self.val.classes) and (len(own) != len(about.classes) if numbered else own != about.classes):
            raise ValueError(f"{self.val.name} has other classes than {name}, or in another order; that knows "
                             f"{', '.join(about.classes[:5])}" + ", ..." * (len(about.classes) > 5))
        self.val.classes = about.classes

    def stem(self) -> Path:
        return results_stem(self.args, self.path)

    def say(self, text: str) -> None:
        if world()[0] == 0:
            tqdm.write(text, file=sys.stderr)

    def features(self, images: Tensor):
        with torch.no_grad(), torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            features = self.network.features(images)
        return [(patches.float(), cls.float()) for patches, cls in features]

    def predict(self, images: Tensor) -> Tensor:
        """The network, its backbone under autocast, its head in float32."""
        if isinstance(self.network, Dense):
            return self.network.predict(self.features(images), images.shape[-2:])
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return self.network(images).float()

    def see(self, image: Tensor) -> Tensor | None:
        """Depth in meters, float32, or classes, int64, of an image (C, H, W), uint8 or uint16, all on the CPU: (H, W).
        None if they are not finite."""
        if self.task == "depth":
            depth = torch.from_numpy(depth_of(self.predict, image, self.rules, self.args.short or 0,
                                              self.args.flip is not False, self.device))
            return depth if depth.isfinite().all() else None
        chances = segment(self.predict, image.to(self.device), self.test, self.rules["mean"], self.rules["std"])
        return chances.argmax(0).cpu() if chances.isfinite().all() else None


def cut(test: Recipe, crop) -> Recipe:
    """With windows as large as the short side of `crop`, if that is given, and overlapping as much."""
    side = min(crop or [test.crop])
    return test._replace(crop=side, stride=max(round(test.stride / test.crop * side), 1))


# ----------------------------------------------------------------------------------------------------------------------
# Training


class HeadTraining:
    """A head's training, and what it needs to go on after an interruption."""

    def __init__(self, job: Job):
        args, recipe = job.args, job.recipe
        self.job, self.head, self.done, self.curve = job, job.network.decode_head.requires_grad_(), 0, []
        self.chosen, self.weights = {}, {}  # the result and the weights of the head that is kept
        self.optimizer = torch.optim.AdamW(self.head.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
        self.eval_every = args.eval_every or max(recipe.steps // 10, 1)
        self.protocol = recipe._asdict() | dict(
            decoder=args.decoder, batch_size=args.batch_size, seed=args.seed, chosen_on=CHOSEN[job.task])
        if job.task == "depth":
            self.protocol |= dict(gradient_weight=args.gradient_weight, depth_range=job.limits, channels=args.channels,
                                  short=args.short or 0)
        else:
            self.protocol |= dict(short=job.test.short, ratios=job.ratios)
        settings = [self.protocol, self.eval_every, job.model_hash, job.train.fingerprint, job.val.fingerprint,
                    job.train.classes, args.dtype, job.test, job.crop, args.flip]
        self.saved = ResumeFile(f"{job.stem()}.eval_dense", settings, job.device, not args.no_resume)
        self.head_path = Path(f"{job.stem()}.{job.train.dataset or job.task}_{args.decoder}_head.pth")
        if self.head_path.is_dir() or not os.access(self.head_path.parent, os.W_OK):
            raise ValueError(f"{self.head_path} cannot be written; name another place by --out")
        if self.head_path.exists():
            job.say(f"note: {self.head_path} will be replaced")

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
        """The chosen head in the layout of the released ones, and beside its weights what else one must know."""
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

    def loader(self):
        job, args, recipe = self.job, self.job.args, self.job.recipe
        augment = partial(augment_depth, dataset=job.train.dataset, short=args.short or 0)
        if job.task == "seg":
            long = 4 * job.test.short if args.decoder == "linear" else job.test.long  # 2048 to 512, unlike in testing
            augment = partial(augment_labels, short=job.test.short, long=long, ratios=job.ratios)
        pairs = TrainPairs(job.train, augment, recipe.crop, recipe.steps, args.batch_size, args.seed,
                           job.rules["mean"], job.rules["std"])
        return make_loader(pairs, job.workers, batch_size=None, sampler=range(self.done, recipe.steps),
                           pin_memory=job.device.type == "cuda")

    def loss(self, features, targets: Tensor) -> Tensor:
        if self.job.task == "seg":
            return segmentation_loss(self.head(features), targets, IGNORE)
        depth, targets = resize(self.head(features), targets.shape[-2:]), targets[:, None]  # (b, 1, H, W)
        most = self.head.depth_range[1]
        loss = sig_loss(depth, targets, most, warm_up=self.done < 100)
        weight = self.job.args.gradient_weight
        return loss + weight * gradient_loss(depth, targets, most) if weight else loss

    def step(self, images: Tensor, targets: Tensor) -> Tensor:
        """One step of the optimizer. images (b, C, H, W) and targets (b, H, W) of this process; the mean loss of all is
        returned."""
        job, recipe = self.job, self.job.recipe
        for group in self.optimizer.param_groups:
            group.update(lr=recipe.lr * learning_rate(self.done, recipe, job.task),
                         betas=(first_beta(self.done, recipe.steps, job.task), 0.999))
        n_groups = -(-job.args.batch_size // GROUP)
        features = [job.features(part) for part in images.split(GROUP)]
        finish = batch_statistics(self.head.bn, features) if job.task == "seg" else lambda: None
        total = torch.zeros((), device=job.device)
        for group, target in zip(features, targets.split(GROUP)):
            loss = self.loss(group, target) / n_groups
            loss.backward()
            total += loss.detach()
        finish()
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.head.parameters()]
        if world()[1] > 1:
            flat = torch.cat([g.flatten() for g in grads] + [total[None]])
            dist.all_reduce(flat)
            *parts, total = flat.split([g.numel() for g in grads] + [1])
            for parameter, part in zip(self.head.parameters(), parts):
                parameter.grad = part.view_as(parameter)
        if recipe.clip:
            nn.utils.clip_grad_norm_(self.head.parameters(), recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def run(self) -> dict:
        """All steps. Returns the measures of the chosen head, which is in the network afterwards."""
        job, steps, saved = self.job, self.job.recipe.steps, time.monotonic()
        job.say(f"trains with {len(job.train):,} pairs, evaluates with {len(job.val):,}: {steps:,} steps")
        self.saved.load(self.restore)
        with tqdm(total=steps, initial=self.done, desc=f"{job.task} {job.args.decoder}", leave=False,
                  disable=None if world()[0] == 0 else True) as bar:
            for images, targets, error in self.loader():
                if error:
                    raise ValueError(error)
                loss = self.step(images.to(job.device, non_blocking=True), targets.to(job.device, non_blocking=True))
                self.done += 1
                bar.update()
                due = self.done % self.eval_every == 0 or self.done == steps
                late = time.monotonic() - saved > 60
                if due or late or self.done % 20 == 0:  # seldom: the loss makes the processor wait for the device
                    if not (loss := float(loss)) < math.inf:
                        raise ValueError(f"the loss of step {self.done} is {loss}; choose a smaller --lr")
                    bar.set_postfix_str(f"loss {loss:.3f}" + (f", {self.shown()}" if self.curve else ""))
                if due:
                    self.validate()
                if due or late:
                    self.save()
                    saved = time.monotonic()
        self.head.load_state_dict(self.weights)
        return self.chosen

    def validate(self) -> None:
        """A point of the curve. Kept is the best head so far in depth, as the released ones were chosen; the last in
        segmentation."""
        result = evaluate(self.job)
        measure = "abs_rel" if self.job.task == "depth" else "mIoU"
        self.curve.append((self.done, result[measure]))
        if self.job.task == "seg" or not self.chosen or result["abs_rel"] < self.chosen["abs_rel"]:
            self.chosen, self.weights = result, copy.deepcopy(self.head.state_dict())
        self.job.say(f"step {self.done:,}: {self.shown()}")

    def shown(self) -> str:
        return f"{'abs_rel' if self.job.task == 'depth' else 'mIoU'} on --val {self.curve[-1][1]:.3f}"


CHOSEN = {"depth": "abs_rel on --val, as officially", "seg": "the last step"}


def batch_statistics(bn: nn.BatchNorm2d, features: list):
    """Has a batch normalization in eval mode use the mean and variance of all features of the batch, of all processes;
    features do not depend on anything that is trained, so these are constants. Returns what ends that, and takes them
    into its running mean and variance."""
    device = bn.weight.device
    exact = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    sums = torch.zeros(3, bn.num_features, dtype=exact, device=device)
    for group in features:
        x = torch.cat([patches for patches, _ in group], 1).to(exact)  # (b, C, h, w)
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


class EvalPairs(torch.utils.data.Dataset):
    def __init__(self, pairs: Pairs, rows: list[int]):
        self.pairs, self.rows = pairs, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int):
        try:
            return *self.pairs.read(self.rows[i]), ""
        except ValueError as error:
            return None, None, str(error)


@torch.no_grad()
def evaluate(job: Job, pictures=None) -> dict:
    """Measures of the network on --val; `pictures` are made of the predictions. Raises ValueError if no pixel counts.
    """
    pairs, (rank, n_ranks) = job.val, world()
    rows = list(range(rank, len(pairs), n_ranks))
    table = torch.zeros(len(pairs), len(DEPTH_MEASURES) + 2, dtype=torch.float64)
    counts = torch.zeros(3, len(pairs.classes or [0]), dtype=torch.int64)
    loader = make_loader(EvalPairs(pairs, rows), job.workers if len(rows) > 8 else 0, batch_size=None)
    bar = tqdm(loader, desc=f"evaluates {pairs.name}", leave=False, disable=None if rank == 0 else True)
    for i, (image, target, error) in zip(rows, bar):
        if error:
            raise ValueError(error)
        predicted = job.see(image)
        if predicted is None:
            raise ValueError(f"the predictions for {pairs.describe(i)} are not finite; choose a smaller --lr, another "
                             "head, or --dtype fp32")
        if job.task == "seg":
            counts += count_labels(predicted, target, counts.shape[1])
        else:
            low, high = job.limits
            valid = (target > low) & (target < high) & crop_of(target, job.crop)
            known = target[valid].double()
            moments = torch.stack([known.mean(), (known**2).mean()])
            table[i] = torch.cat([depth_measures(predicted, target, valid), moments])
        if pictures:
            pictures.add(i, image, target, predicted)
    for numbers in (table, counts) if n_ranks > 1 else ():
        total = numbers.to(job.device)
        dist.all_reduce(total)
        numbers.copy_(total)
    if pictures:
        pictures.finish()
    if job.task == "depth":
        return depth_summary(pairs, table)
    if not counts[2].any():
        raise ValueError(f"all pixels of {pairs.name} are labeled {IGNORE}, which is to be ignored")
    most = counts[2].max() / counts[2].sum()
    trivial = dict(aAcc=100 * most.item(), mIoU=100 * most.item() / int((counts[2] > 0).sum()))
    return segmentation_measures(counts) | dict(commonest_class_everywhere=trivial)


def depth_summary(pairs: Pairs, table: Tensor) -> dict:
    """Means over the images of a table (n, 9 + 2) of depth_measures(), mean depth and mean squared depth; those without
    a pixel that counts, whose rows are NaN, left out. And the root mean square error of the mean depth."""
    seen = table[~table.isnan().any(1)]
    if not len(seen):
        raise ValueError(f"no image of {pairs.name} has a pixel with a depth in the range that is evaluated; "
                         "--depth-range and --depth-scale say which, and in which unit")
    constant = seen[:, -2].mean()
    rmse = (seen[:, -1] - 2 * constant * seen[:, -2] + constant**2).clamp(min=0).sqrt().mean()
    return dict(zip(DEPTH_MEASURES, seen.mean(0).tolist())) | dict(
        images_left_out=len(table) - len(seen), constant_everywhere=dict(depth=constant.item(), rmse=rmse.item()))


class Pictures:
    """A folder with what was predicted for each image, and sheet.png, of 8 photographs of process 0, their targets and
    those. Raises ValueError if one of these files is among the data."""

    def __init__(self, job: Job, folder: Path):
        self.job, self.folder, self.cells, self.targets = job, folder, [], []
        self.names = file_names([job.val.describe(i) for i in range(len(job.val))])
        own = range(0, len(job.val), world()[1])
        self.shown = {own[i] for i in spread(len(own), 8)}
        above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise ValueError(f"--predictions {folder} cannot be made in {above}")
        data = {os.path.realpath(path) for pair in job.val.items for path in pair}
        for name in (*self.names, "sheet"):
            if os.path.realpath(folder / f"{name}.png") in data:
                raise ValueError(f"--predictions {folder} would overwrite {folder / name}.png, one of the data")

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
            cells = [zoom(to_rgb(image), 240), *(zoom(Image.fromarray(d), 240) for d in drawn)]
            if self.job.task == "depth":
                cells[2] = under(cells[2], depth_bar(near, far, cells[2].width))
            self.targets.append(target.flatten().numpy())
            self.cells += [Cell(c, text) for c, text in zip(cells, (self.names[i], "target", "prediction"))]

    def finish(self) -> None:
        if self.cells and world()[0] == 0:
            note = None
            if self.job.task == "seg":
                note = legend(np.concatenate(self.targets), self.job.val.classes, self.job.colors)
            save(sheet(rows_of(self.cells, 6), footer=note), self.folder / "sheet.png")


# ----------------------------------------------------------------------------------------------------------------------


DECODERS = {"depth": ("linear", "linear4", "dpt"), "seg": ("linear", "ms")}


def parse(argv: list[str] | None) -> argparse.Namespace:
    flags = Parser(__doc__)
    add = flags.add_argument
    add("checkpoint", help="out/ckpt.pth, a released .pth, the name of a released model such as dinov2_vits14, or a "
        "file of Hugging Face or timm; dinov2_vitg14_m2f, which is backbone and head")
    add("--task", choices=tuple(DECODERS), required=True)
    add("--data", required=True, metavar="FOLDER", help="photographs with depth or labels, see above")
    add("--val", default="", metavar="FOLDER", help="those to evaluate with; empty: the part of --data for that")
    add("--decoder", default="linear", help="the head to train; depth: linear, linear4 (of 4 blocks), dpt; seg: "
        "linear, ms (of 4 blocks, and of more scales)")
    add("--head", default="", help="a head to evaluate instead: a file, or of a released model one of "
        f"{', '.join(hub.DENSE_HEADS)}")
    add("--channels", type=int, default=256, help="of the maps of dpt; fewer for small networks: its time goes with "
        "their square")
    add("--depth-range", type=float, nargs=2, metavar=("MIN", "MAX"), help="meters that a head can predict and that "
        "are evaluated; default: the data set's, 0.001 10")
    add("--depth-scale", type=float, default=1000.0, help="a meter in the 16-bit PNG of your own folders")
    add("--steps", type=int, help="of training; default: the recipe's, as for the flags up to --ratios")
    add("--batch-size", type=int, default=16, help="of all processes")
    add("--lr", type=float, help="largest learning rate")
    add("--weight-decay", type=float, help="of AdamW")
    add("--warmup", type=float, help="share of the steps in which the rate rises")
    add("--clip", type=float, help="largest norm of the gradient; 0: any")
    add("--crop", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of training, in pixels; in segmentation the "
        "windows of testing are as large as its short side")
    add("--short", type=int, help="short side of photographs, in training times --ratios; depth: default as they are")
    add("--ratios", type=float, nargs=2, metavar=("MIN", "MAX"), help="segmentation: of random sizes in training")
    add("--gradient-weight", type=float, default=0.0, help="depth: of the gradient loss; officially 0.5, of "
        "what by a slip comes out as 0")
    add("--scales", type=float, nargs="+", help="segmentation: sizes of photographs in testing, times --short")
    add("--flip", action=argparse.BooleanOptionalAction, default=None, help="average with the mirrored photograph in "
        "testing; default: in depth, and as the recipe of the head says")
    add("--eval-crop", choices=tuple(CROPS), help="part of photographs where depth is evaluated; default: nyu for "
        "NYUv2, garg for KITTI, else none, which is all")
    add("--eval-every", type=int, default=0, help="steps between evaluations; 0: ten of them")
    add("--predictions", default="", metavar="FOLDER", help="pictures of the predictions for --val: labels as palette "
        "PNG, depth as 16-bit PNG in millimeters (of heads for more than 65 m: in 256ths of a meter), and sheet.png")
    add("--seed", type=int, default=0, help="of the first weights, the order and the crops")
    add("--no-resume", action="store_true", help="start anew after an interruption")
    flags.add_machine_flags("device", "dtype", "num-workers")
    add_result_flags(flags)
    args = flags.parse_args(argv)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    if args.decoder not in DECODERS[args.task]:
        raise ValueError(f"--decoder {args.decoder} is none of --task {args.task}; choose "
                         f"{' or '.join(DECODERS[args.task])}")
    positive = ("steps", "lr", "short", "batch_size", "depth_scale", "crop", "ratios", "scales")
    for name in (*positive, "weight_decay", "clip", "gradient_weight", "eval_every"):
        values = getattr(args, name) if isinstance(getattr(args, name), list) else [getattr(args, name)]
        if wrong := [v for v in values if v is not None and not (v > 0 if name in positive else v >= 0)]:
            raise ValueError(f"--{name.replace('_', '-')} must be {'positive' if name in positive else '0 or more'}, "
                             f"not {wrong[0]}")
    if args.channels < 2:
        raise ValueError("--channels must be 2 or more")
    if args.warmup is not None and not 0 <= args.warmup <= 1 or args.ratios and args.ratios[0] > args.ratios[1]:
        raise ValueError("--warmup is a share, 0 to 1; --ratios are two numbers, the smaller first")
    if args.task == "seg" and (args.depth_range or args.gradient_weight or args.eval_crop or args.depth_scale != 1000):
        raise ValueError("--depth-range, --depth-scale, --gradient-weight and --eval-crop are of --task depth")
    if args.task == "depth" and (args.ratios or args.scales):
        raise ValueError("--ratios and --scales are of --task seg")
    if args.channels != 256 and args.decoder != "dpt":
        raise ValueError("--channels is of --decoder dpt")
    if args.predictions and Path(args.predictions).is_file():
        raise ValueError(f"--predictions {args.predictions} is a file; name a folder")


TRAINING_FLAGS = dict(steps=None, lr=None, weight_decay=None, warmup=None, clip=None, ratios=None, decoder="linear",
                      batch_size=16, channels=256, gradient_weight=0.0, eval_every=0, seed=0, no_resume=False)


def check_untrained(args: argparse.Namespace) -> None:
    """Where there is a head already, flags of training are mistakes."""
    flags = TRAINING_FLAGS | (dict(crop=None) if args.task == "depth" else {})
    if idle := [name for name, default in flags.items() if getattr(args, name) != default]:
        raise ValueError(f"--{idle[0].replace('_', '-')} is of training, but the head is there already")


def report(job: Job, protocol: dict, result: dict) -> None:
    args = job.args
    record = dict(
        evaluation="dense", protocol=protocol, result=result,
        data={what: dict(folder=pairs.name, dataset=pairs.dataset, images=len(pairs)) for what, pairs in
              (("train", job.train), ("val", job.val)) if pairs},
        model=dict(checkpoint=args.checkpoint, sha256=job.model_hash, step=job.step))
    title = f"{job.task} {args.decoder if job.trains else ''}".strip()
    if job.task == "depth":
        columns = {title: "", **{name: f"{result[name]:.4f}" for name in ("rmse", "abs_rel", "a1")},
                   "(rmse of a constant": f"{result['constant_everywhere']['rmse']:.4f})"}
    else:
        columns = {title: "", **{name: f"{result[name]:.2f} %" for name in ("mIoU", "aAcc", "mAcc")},
                   "(mIoU of the commonest class": f"{result['commonest_class_everywhere']['mIoU']:.2f} %)"}
    columns |= {result["head"]: ""} if "head" in result else {}
    path = Path(args.out) if args.out else Path(f"{job.stem()}.eval_dense.jsonl")
    add_record(path, record, columns, args.json, job.device, job.began)


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    with Job(args) as job:
        protocol, training = dict(task=args.task, dtype=args.dtype), None
        if job.task == "depth":
            protocol |= dict(eval_crop=job.crop, limits=job.limits, flip=args.flip is not False)
        else:
            protocol |= dict(test=job.test._asdict())
        if job.trains:
            if args.batch_size % (GROUP * world()[1]) and world()[1] > 1:
                raise ValueError(f"--batch-size {args.batch_size} is no multiple of {GROUP} images for each of "
                                 f"{world()[1]} processes")
            training = HeadTraining(job)
            result = training.run()
            protocol |= training.protocol
        if job.pictures or not training:
            result = evaluate(job, job.pictures)
        if training:
            result |= dict(curve=training.curve)
            try:
                result["head"] = training.write_head()
            except ValueError as error:  # the disk is full; the figures are told all the same, and the save is kept
                job.say(f"note: {error}; the same command will write it from {training.saved.path}")
        else:
            protocol["head"] = args.head
        if world()[0] == 0:
            report(job, protocol, result)
    return result


if __name__ == "__main__":
    run(main, interrupted="stopped; a training goes on from its last save by the same command")
