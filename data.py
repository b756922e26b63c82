"""From image files to training batches: crops, block masks, color augmentation, loading.

    source = support.sources.open_source("digits")  # or any object with len() and image(i) -> uint8 tensor (C, H, W)
    batches = TrainBatches(source, batch_size=128, group_size=128)      # batches[step] is the whole batch of that step
    for batch in train_loader(batches, start=0, stop=1000, num_workers=4, pin_memory=False):
        batch = prepare(batch, device)                                  # crops augmented and normalized, on the device

Nothing here keeps random state. The number s of a sample (0, 1, 2, … over the whole run) determines its image, its
crops and their colors; the step and the group determine the masks. So any process can recreate any step, and a run
resumes anywhere at no cost. Workers decode each image once and cut uint8 crops; colors change in batches on the device.

To add a color operation, write it as a function of a batch and one value per image, enter it in OPERATIONS, and draw
the value at the end of draw_ops(). No model and no config in this file. Apache License 2.0.
"""
import ctypes
import itertools
import math
import multiprocessing.util
import os
import random
import signal
import time
from typing import Callable, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which all released models expect


# ----------------------------------------------------------------------------------------------------------------------
# From a sample number to an image


@runtime_checkable
class ImageSource(Protocol):
    """What training reads images from. An object that only has len() and image(i) becomes one by Shuffled."""
    channels: int
    def __len__(self) -> int: ...
    def image(self, i: int) -> Tensor: ...  # uint8 or uint16 (channels, H, W); raises if it cannot be read
    def describe(self, i: int) -> str: ...  # for messages
    def pick(self, s: int, seed: int) -> int: ...  # the index of the image of sample s
    def replacement(self, i: int, rng: random.Random) -> int: ...  # the index of an image to use instead of image i


class Shuffled:
    """Any object with len() and image(i) as an ImageSource: each pass visits every image once, in a new order."""

    def __init__(self, images):
        self.images, self.channels, self.epoch, self.order = images, len(images.image(0)), None, None

    def __len__(self) -> int:
        return len(self.images)

    def image(self, i: int) -> Tensor:
        return self.images.image(i)

    def describe(self, i: int) -> str:
        return f"image {i}"

    def pick(self, s: int, seed: int) -> int:
        epoch, position = divmod(s, len(self))
        if self.epoch != (seed, epoch):
            self.epoch, self.order = (seed, epoch), random_orders(f"{seed}/epoch/{epoch}", len(self))
        return int(self.order[position])

    def replacement(self, i: int, rng: random.Random) -> int:
        return rng.randrange(len(self))


def random_orders(key: str, *shape: int) -> np.ndarray:
    """Random permutations, int64, along the last dimension. Sorts the raw stream of a bit generator, which never
    changes; NumPy's own permutations may change from version to version."""
    generator = np.random.Philox(key=random.Random(key).getrandbits(128))
    return np.argsort(generator.random_raw(shape), axis=-1, kind="stable")


class Unreadable(ValueError):
    """50 images in a row could not be read; the data is probably gone."""


def read_sample(source: ImageSource, s: int, seed: int, bad: list, labels=None) -> tuple[int, Tensor]:
    """The index and the pixels of the image of sample s. If its file cannot be read, or its label is -1, another image
    is drawn, determined by s. Appends (file, reason) to `bad` if it could not be read; raises Unreadable after 50."""
    i, failures = source.pick(s, seed), 0
    for attempt in itertools.count():
        if labels is None or labels[i] >= 0:
            try:
                return i, source.image(i)
            except Exception as error:  # decoders raise anything on damaged files
                bad.append((source.describe(i), str(error).partition("\n")[0].expandtabs(1) or repr(error)))
            failures += 1
            if failures == 50:
                raise Unreadable(f"50 images in a row could not be read, the last {bad[-1][0]!r}: {bad[-1][1]}")
        i = source.replacement(i, random.Random(f"{seed}/replace/{s}/{attempt}"))


# ----------------------------------------------------------------------------------------------------------------------
# Crops, cut as uint8 by the workers


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
    """A random resized crop of an image (C, H, W): (size, size, C) of the same dtype."""
    top, left, h, w = crop_box(rng, *image.shape[-2:], scale)
    pixels = image.permute(1, 2, 0).numpy()[None, top : top + h, left : left + w]
    region = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2)  # NumPy copies it in half the time
    deep = image.dtype == torch.uint16
    crop = F.interpolate(region.float() if deep else region, size=(size, size), mode="bicubic", antialias=True)
    crop = crop[0].permute(1, 2, 0)  # a view: the fast path for uint8 works on channels-last pixels
    return crop.round().clamp(0, 65535).to(torch.uint16) if deep else crop


# ----------------------------------------------------------------------------------------------------------------------
# Block masks for iBOT (from BEiT, Bao et al. 2021, arXiv 2106.08254)


def block_mask(rng: random.Random, grid: tuple[int, int], target: int, max_patches: float, min_patches: int = 4,
               min_aspect: float = 0.3) -> np.ndarray:
    """Bool (h, w) with `target` patches masked in rectangles of `min_patches` to `max_patches`; sometimes a few fewer,
    when no further rectangle fits."""
    mask, count = np.zeros(grid, bool), 0
    while count < target and (added := add_block(rng, mask, min(target - count, max_patches), min_patches, min_aspect)):
        count += added
    return mask


def add_block(rng: random.Random, mask: np.ndarray, budget: float, min_patches: int, min_aspect: float) -> int:
    """Masks one rectangle in place, of at most `budget` new patches. Returns how many are new; 0 if 10 tries fail."""
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
    """Bool (n_crops, h*w): a share `sample_prob` of the crops is masked, at ratios spread evenly over `ratio`, in
    random order (DINOv2, appendix B.1)."""
    n_masked = int(n_crops * sample_prob)
    edges = torch.linspace(*ratio, n_masked + 1).numpy()  # in float32, which decides how the targets are rounded
    masks = [block_mask(rng, grid, int(grid[0] * grid[1] * rng.uniform(a, b)), max_patches)
             for a, b in zip(edges[:-1], edges[1:])]
    masks += [np.zeros(grid, bool)] * (n_crops - n_masked)
    rng.shuffle(masks)
    return np.stack(masks).reshape(n_crops, -1)


def mask_weights(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Masks (n, h*w) bool -> the positions of the M masked patches in masks.flatten(), int64 ascending, and for each
    1 / (number of masked patches in its crop), float32."""
    share = 1 / masks.sum(-1, keepdim=True).clamp(min=1).float()
    return masks.flatten().nonzero().flatten(), share.expand_as(masks)[masks]


# ----------------------------------------------------------------------------------------------------------------------
# A training batch


class Batch(NamedTuple):
    """One process's share of a step, or one micro-batch of it: B images with 2 global and L local crops each. Rows are
    crop-major: crop 0 of all images, then crop 1, …"""

    global_crops: Tensor  # (2B, G, G, C) uint8 or uint16; after prepare() (2B, C, G, G) float32, normalized
    local_crops: Tensor  # (L*B, l, l, C) likewise
    global_ops: Tensor  # (2B, columns) float32, the values that draw_ops() gives each crop
    local_ops: Tensor  # (L*B, columns)
    masks: Tensor  # (2B, h*w) bool
    mask_index: Tensor  # (M,) int64, positions of the masked patches in masks.flatten()
    mask_weight: Tensor  # (M,) float32, 1 / number of masked patches in the crop
    samples: Tensor  # (B,) int64 sample numbers
    bad: list[tuple[str, str]]  # files that could not be read, and why; other images took their place
    global_orders: Tensor | None = None  # (n_drops, groups, 2 * group_size) int64: random orders of each group's rows;
    local_orders: Tensor | None = None  # (n_drops, groups, L * group_size); stochastic depth drops by them


class TrainBatches(torch.utils.data.Dataset):
    """batches[step] -> Batch with this process's images of that step: a pure function of the arguments and the step.
    With accumulation_steps > 1, batches[step * accumulation_steps + k] is the k-th micro-batch of that share.

    A step has `batch_size` images over all processes, in groups of `group_size`; no group is split. Each group has its
    own quota of masks, as each GPU's batch has in the official code, and its own `n_drops` draws for stochastic depth,
    so that neither depends on the number of processes or micro-batches. `global_scale` and `local_scale` are fractions
    of the image's area; `ops` are keyword arguments of draw_ops(). Raises ValueError if the groups do not divide evenly
    among the processes.
    """

    def __init__(self, source, *, batch_size: int, group_size: int, seed: int = 0, rank: int = 0, world: int = 1,
                 accumulation_steps: int = 1, global_size: int = 224, global_scale=(0.32, 1.0), n_local: int = 8,
                 local_size: int = 96, local_scale=(0.05, 0.32), patch_size: int = 16, mask_prob: float = 0.5,
                 mask_ratio=(0.1, 0.5), n_drops: int = 0, ops: dict | None = None):
        check_groups(batch_size, group_size, world, accumulation_steps)
        self.source = source if isinstance(source, ImageSource) else Shuffled(source)
        self.batch_size, self.group_size, self.seed, self.rank = batch_size, group_size, seed, rank
        self.accumulation_steps, self.n_drops, self.ops = accumulation_steps, n_drops, ops or {}
        self.count = batch_size // (world * accumulation_steps)  # images of a micro-batch
        self.crops = [(global_size, global_scale)] * 2 + [(local_size, local_scale)] * n_local
        self.shapes = [(2, global_size), (n_local, local_size)]
        self.grid = (global_size // patch_size,) * 2
        self.max_patches = 0.5 * global_size // patch_size * global_size // patch_size  # floors from left to right
        self.mask_prob, self.mask_ratio = mask_prob, mask_ratio

    def __getitem__(self, index: int) -> Batch:
        step, k = divmod(index, self.accumulation_steps)
        first = (self.rank * self.accumulation_steps + k) * self.count  # of this micro-batch's images, within the step
        samples = range(step * self.batch_size + first, step * self.batch_size + first + self.count)
        groups = range(first // self.group_size, (first + self.count) // self.group_size)
        crops = [empty_crops(n, self.count, size, size, self.source.channels) for n, size in self.shapes]  # crop-major
        slots = [*crops[0], *crops[1]]  # 2 + L views (B, size, size, C)
        ops: list[list[list[float]]] = [[] for _ in slots]
        bad: list[tuple[str, str]] = []
        for row, s in enumerate(samples):
            (_, image), rng = read_sample(self.source, s, self.seed, bad), random.Random(f"{self.seed}/sample/{s}")
            if image.dtype == torch.uint16 and crops[0].dtype == torch.uint8:
                crops = [widen(c) for c in crops]
                slots = [*crops[0], *crops[1]]
            for c, (size, scale) in enumerate(self.crops):
                crop = cut_crop(rng, image, size, scale)
                slots[c][row] = crop if crop.dtype == crops[0].dtype else widen(crop)
                ops[c].append([*draw_ops(rng, min(c, 2), **self.ops).values()])
        ops = torch.from_numpy(np.array(ops, np.float32))  # (2 + L, B, columns)
        masks = torch.from_numpy(self.masks_of(step, groups))
        return Batch(*(c.flatten(0, 1) for c in crops), ops[:2].flatten(0, 1), ops[2:].flatten(0, 1), masks,
                     *mask_weights(masks), torch.tensor(list(samples)), bad, *self.orders_of(step, groups))

    def samples_of(self, step: int) -> range:
        """The sample numbers of this process's share of a step, all micro-batches together."""
        share = self.accumulation_steps * self.count
        return range(step * self.batch_size + self.rank * share, step * self.batch_size + (self.rank + 1) * share)

    def masks_of(self, step: int, groups: range) -> np.ndarray:
        """The masks of these groups, (2B, h*w), crop-major like the crops."""
        masks = [draw_masks(random.Random(f"{self.seed}/masks/{step}/{g}"), 2 * self.group_size, self.grid,
                            self.max_patches, self.mask_prob, self.mask_ratio) for g in groups]
        return np.concatenate([m.reshape(2, self.group_size, -1) for m in masks], 1).reshape(2 * self.count, -1)

    def orders_of(self, step: int, groups: range) -> list[Tensor]:
        """Batch.global_orders and local_orders of these groups."""
        orders = []
        for n_crops, _ in self.shapes:
            rows = np.arange(n_crops)[:, None] * self.count + np.arange(self.group_size)  # of the first group
            order = np.stack([random_orders(f"{self.seed}/drop path/{step}/{g}/{n_crops}", self.n_drops, rows.size)
                              for g in groups], 1)  # (n_drops, groups, rows of a group)
            shift = np.arange(len(groups))[:, None] * self.group_size
            orders.append(torch.from_numpy(rows.flatten()[order] + shift))
        return orders


def empty_crops(*shape: int) -> Tensor:
    """Uninitialized uint8; in a worker, memory that the training process shares, which saves a copy."""
    out = torch.empty(shape, dtype=torch.uint8)
    return out.share_memory_() if torch.utils.data.get_worker_info() else out


def widen(x: Tensor) -> Tensor:
    """uint8 -> uint16, 255 becoming 65535."""
    return (x.to(torch.int32) * 257).to(torch.uint16)


def check_groups(batch_size: int, group_size: int, world: int, accumulation_steps: int = 1) -> None:
    """Raises ValueError unless `batch_size` images make whole groups for every micro-batch of `world` processes."""
    if batch_size < world:
        raise ValueError(f"--batch-size {batch_size} is smaller than the number of processes, {world}")
    unit = max(group_size, 1) * world * accumulation_steps
    if group_size < 1 or batch_size % unit:
        raise ValueError(f"--batch-size {batch_size} gives no whole groups of {group_size} for {world} process(es) and "
                         f"{accumulation_steps} gradient accumulation step(s): make it a multiple of {unit}, or change "
                         "--group-size")


# ----------------------------------------------------------------------------------------------------------------------
# Color operations: images (n, C, h, w) in [0, 1] and a value for each, (n, 1, 1, 1) -> new images


def flip(x: Tensor, on: Tensor) -> Tensor:
    return x.flip(-1)


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    return blend(luma(x.mean((2, 3), keepdim=True)), x, factor)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    return blend(luma(x), x, factor)


def blend(base: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).add_(base * (1 - factor)).clamp_(0, 1)  # torch.lerp is three times as slow when it broadcasts


def luma(x: Tensor) -> Tensor:
    """Perceived brightness (n, 1, h, w) of red, green and blue; the plain mean of other channels."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    r, g, b = x.split(1, dim=1)
    return (0.299 * r).add_(g, alpha=0.587).add_(b, alpha=0.114)


def hue(x: Tensor, shift: Tensor) -> Tensor:
    """Rotates the hue of the HSV color by `shift` of a full turn, in [-0.5, 0.5]; value v and chroma c stay.

    The hue h runs from 0 (red) over 2 (green) and 4 (blue) to 6. Up to 3 it is 1 + (g + b - r - min) / c, and minus
    that on the other side, where b > g. A channel whose color is at hue n is v - c * clamp(d - 1, 0, 1), with d the
    distance from h to n around the circle. No branches: comparing and selecting would take most of the time on a CPU.
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


def to_gray(x: Tensor, on: Tensor) -> Tensor:
    return luma(x).repeat(1, x.shape[1], 1, 1)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """9x9 Gaussian with reflected borders, sigma in pixels; computed as 9 + 9 shifted sums."""
    taps = torch.arange(-4, 5, device=x.device) / sigma  # (n, 1, 1, 9)
    taps = torch.softmax(-0.5 * taps**2, dim=-1)
    radius = min(4, min(x.shape[-2:]) - 1)  # a reflection cannot reach further than the image
    taps = taps[..., 4 - radius : 5 + radius].split(1, dim=-1)
    for dim in (2, 3):
        padded = F.pad(x, (0, 0, radius, radius) if dim == 2 else (radius, radius, 0, 0), mode="reflect")
        shifted = [padded.narrow(dim, i, x.shape[dim]) for i in range(len(taps))]
        x = taps[0] * shifted[0]
        for tap, view in zip(taps[1:], shifted[1:]):
            x.addcmul_(tap, view)
    return x


def solarize(x: Tensor, on: Tensor) -> Tensor:
    """Inverts everything brighter than one half."""
    return torch.minimum(x, 1 - x)


class Operation(NamedTuple):
    apply: Callable[[Tensor, Tensor], Tensor]
    neutral: float = 0.0  # an image with this value is left as it is
    rgb_only: bool = False  # skipped for images whose channels are not red, green and blue


OPERATIONS = {  # in the order of application. Each is a column of Batch.global_ops
    "flip": Operation(flip),
    "brightness": Operation(brightness, neutral=1.0),  # these four are applied in random order
    "contrast": Operation(contrast, neutral=1.0),
    "saturation": Operation(saturation, neutral=1.0, rgb_only=True),
    "hue": Operation(hue, rgb_only=True),
    "gray": Operation(to_gray, rgb_only=True),
    "blur": Operation(gaussian_blur),
    "solarize": Operation(solarize)}
RANDOM_ORDER = ("brightness", "contrast", "saturation", "hue")
PLACES = ("first", "second", "third", "fourth")  # four more columns: which of RANDOM_ORDER comes first, second, …
ORDERS = tuple(itertools.permutations(range(4)))
JITTER = (0.4, 0.4, 0.2, 0.1)  # largest change of brightness, contrast, saturation, hue


# ----------------------------------------------------------------------------------------------------------------------
# Augmentation, batched on the device


def draw_ops(rng: random.Random, kind: int, flip_prob: float = 0.5, jitter_prob: float = 0.8, jitter=JITTER,
             gray_prob: float = 0.2, blur_probs=(0.0, 0.9, 0.5), blur_sigma=(0.1, 2.0),
             solarize_prob: float = 0.2) -> dict[str, float]:
    """The values of one crop, by column: OPERATIONS, then PLACES. `kind` is 0 and 1 for the first and second global
    crop, 2 for local crops; only kind 1 is solarized. `blur_sigma` is in pixels, hue in turns."""
    draw, ops = rng.random, {name: operation.neutral for name, operation in OPERATIONS.items()}
    for name, strength in zip(RANDOM_ORDER, jitter if draw() < jitter_prob else (0, 0, 0, 0)):
        ops[name] += strength * (2 * draw() - 1)
    ops |= zip(PLACES, ORDERS[int(24 * draw())])
    ops["gray"] = draw() < gray_prob
    if draw() < blur_probs[kind]:
        ops["blur"] = blur_sigma[0] + (blur_sigma[1] - blur_sigma[0]) * draw()
    ops["solarize"] = kind == 1 and draw() < solarize_prob
    ops["flip"] = draw() < flip_prob
    return ops


def steps_of(channels: int) -> list[tuple[str, str | None]]:
    """(operation, place) in the order of application; those in RANDOM_ORDER once for each place they may take."""
    steps, at = [(name, None) for name in OPERATIONS if name not in RANDOM_ORDER], [*OPERATIONS].index(RANDOM_ORDER[0])
    steps[at:at] = [(name, place) for place in PLACES for name in RANDOM_ORDER]
    return [step for step in steps if channels == 3 or not OPERATIONS[step[0]].rgb_only]


def is_applied(step: tuple[str, str | None], values: dict[str, Tensor]) -> Tensor:
    """Which images go through a step of steps_of(), bool."""
    name, place = step
    changed = values[name] != OPERATIONS[name].neutral
    return changed if place is None else changed & (values[place] == RANDOM_ORDER.index(name))


def augment(crops: Tensor, ops: Tensor, mean=MEAN, std=STD) -> Tensor:
    """Crops (n, h, w, C), uint8 or uint16 -> float32 (n, C, h, w), augmented by `ops` (n, columns), see draw_ops(),
    then normalized. `ops` may stay on the CPU."""
    return (augment_by_groups if crops.device.type == "cpu" else augment_at_once)(crops, ops, mean, std)


def augment_by_groups(crops: Tensor, ops: Tensor, mean=MEAN, std=STD) -> Tensor:
    """augment() for a CPU: crops that take the same steps are processed together. No work is wasted, and the crops of a
    group stay in cache."""
    out = torch.empty(len(crops), crops.shape[3], *crops.shape[1:3])
    steps, values = steps_of(crops.shape[3]), dict(zip((*OPERATIONS, *PLACES), ops.unbind(1)))  # each (n,)
    recipes, group = torch.stack([is_applied(step, values) for step in steps], 1).unique(dim=0, return_inverse=True)
    for k, recipe in enumerate(recipes.tolist()):
        rows = (group == k).nonzero().flatten()
        x = to_float(crops.index_select(0, rows).permute(0, 3, 1, 2))
        for name, _ in itertools.compress(steps, recipe):
            x = OPERATIONS[name].apply(x, values[name][rows, None, None, None])
        out.index_copy_(0, rows, normalize_(x, mean, std))
    return out


def augment_at_once(crops: Tensor, ops: Tensor, mean=MEAN, std=STD) -> Tensor:
    """augment() for a GPU: every step on all crops, then each crop keeps its old or new pixels. No shape depends on the
    values, nothing waits for the device, and torch.compile makes a few kernels of it."""
    x, ops = to_float(crops.permute(0, 3, 1, 2)), to_device(ops, crops.device)
    values = dict(zip((*OPERATIONS, *PLACES), ops[..., None, None, None].unbind(1)))  # each (n, 1, 1, 1)
    for step in steps_of(x.shape[1]):
        x = torch.where(is_applied(step, values), OPERATIONS[step[0]].apply(x, values[step[0]]), x)
    return normalize_(x, mean, std)


def to_float(images: Tensor) -> Tensor:
    """(n, C, h, w) of uint8 or uint16 -> float32 in [0, 1], contiguous."""
    x = images.to(torch.float32, memory_format=torch.contiguous_format)  # a copy, whatever the layout was
    return x.div_(65535 if images.dtype == torch.uint16 else 255)


def normalize(x: Tensor, mean=MEAN, std=STD) -> Tensor:
    """(n, C, h, w) in [0, 1] -> (x - mean) / std."""
    return normalize_(x.clone(), mean, std)


def normalize_(x: Tensor, mean, std) -> Tensor:
    for channel, m, s in zip(x.unbind(1), mean, std, strict=True):  # numbers, not tensors: nothing to copy to a GPU
        channel.sub_(m).div_(s)
    return x


# ----------------------------------------------------------------------------------------------------------------------
# Loading


def train_loader(batches: TrainBatches, start: int, stop: int, num_workers: int, pin_memory: bool):
    """The batches of steps start, …, stop - 1, made ahead of time by `num_workers` processes (0: by this one)."""
    indices = range(start * batches.accumulation_steps, stop * batches.accumulation_steps)
    return make_loader(batches, num_workers, batch_size=None, sampler=indices, pin_memory=pin_memory)


def make_loader(dataset, num_workers: int, **options) -> torch.utils.data.DataLoader:
    """A DataLoader whose workers leave all signals to this process, and die with it."""
    multiprocessing.util.Finalize(None, kill_workers, exitpriority=100)  # before Python sends SIGTERM, and waits
    return torch.utils.data.DataLoader(dataset, num_workers=num_workers, worker_init_fn=start_worker, **options)


def kill_workers() -> None:
    if os.name == "posix":  # after an error, PyTorch's handler would report the workers killed here
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def start_worker(worker: int) -> None:
    # Ctrl-C reaches every process of a terminal, a scheduler's signals every process of a job; the main one responds.
    for number in [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGUSR1")]:  # Windows has no SIGUSR1
        signal.signal(number, signal.SIG_IGN)
    keep_memory()


def keep_memory(largest: int | None = None) -> None:
    """Makes glibc keep freed memory instead of returning it to the system and asking for it again, page by page, which
    takes a fifth of the CPU time of loading. Blocks over `largest` megabytes, if given, are still returned: kept, they
    would leave holes that blocks of other sizes do not fit into. Does nothing without glibc."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    libc.mallopt(-4, 2**16 if largest else 0)  # M_MMAP_MAX: with 0, large blocks come from the heap as well
    if largest:
        libc.mallopt(-3, largest * 2**20)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: up to 2 GB of the heap are kept when freed


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies to a CUDA GPU asynchronously (from pinned memory). On MPS that would be unsafe: it would read ordinary
    memory that may have been reused by then."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def prepare(batch: Batch, device: torch.device, mean=MEAN, std=STD, augment=augment) -> Batch:
    """The batch on the device, its crops augmented and normalized. `augment` may be a compiled augment_at_once."""
    def on_device(tensor: Tensor) -> Tensor:
        return to_device(tensor, device)

    return batch._replace(
        global_crops=augment(on_device(batch.global_crops), batch.global_ops, mean, std),
        local_crops=augment(on_device(batch.local_crops), batch.local_ops, mean, std), masks=on_device(batch.masks),
        mask_index=on_device(batch.mask_index), mask_weight=on_device(batch.mask_weight),
        global_orders=on_device(batch.global_orders), local_orders=on_device(batch.local_orders))


class Prefetcher:
    """Iterates over prepared batches. On a GPU, the next batch is copied and augmented on a stream of its own while the
    current step computes. `waited` counts the seconds spent waiting for the loader."""

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
