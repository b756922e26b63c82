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
import ctypes
import itertools
import math
import multiprocessing.util
import random
import signal
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which all released models expect


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


def read_sample(source, s: int, seed: int, bad: list, labels=None) -> tuple[int, Tensor]:
    """The number and the pixels of the image of sample s. If its file cannot be read, which goes into `bad` with the
    reason, or if it is -1 in `labels`, another one drawn by s. Raises Unreadable after 50."""
    i, failures = source.pick(s, seed), 0
    for attempt in itertools.count():
        if labels is None or labels[i] >= 0:
            try:
                return i, source.image(i)
            except Exception as error:  # decoders raise all sorts on damaged files
                bad.append((source.describe(i), first_line(error)))
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


class Unreadable(ValueError):
    """The images are gone."""


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


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


