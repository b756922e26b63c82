"""Pictures of what a network has learned and of how its training went, as PNG files.

    python visualize.py pca photos/ a.jpg --model out/ckpt.pth     # patch features as colors, on one scale for all
    python visualize.py pca frames/ --model dinov2_vits14 --size 448 --out frames_pca     # a folder: one PNG per image
    python visualize.py attention a.jpg --model out/ckpt.pth       # from CLS and registers to the patches, per head
    python visualize.py similarity a.jpg b.jpg --at 310,200 --model out/ckpt.pth   # of patches to the one at a pixel
    python visualize.py depth a.jpg photos/ --model dinov2_vits14 --head nyu_dpt   # meters as colors, with a color bar
    python visualize.py segment a.jpg --model dinov2_vits14 --head voc2012_ms      # classes as colors, with a legend
    python visualize.py neighbors --data digits --model out/ckpt.pth              # random images and their neighbors
    python visualize.py neighbors a.jpg --data /my/photos --model dinov2_vits14   # the neighbors of this image
    python visualize.py curves out_a out_b                         # losses and k-NN accuracy of one or several runs
    python visualize.py pca --help                                 # the flags of a command

Images are files, or folders with all images below them. A model is anything that hub.load() takes: a checkpoint of
train.py, the name of a released model, a file from Hugging Face or timm. Images are resized to --size (default: the
short side that the network was trained at; 0: not at all) and then fitted to a multiple of the patch size by --fit.
Larger images give finer maps. For depth and segment, see their --help.

pca is the picture of the DINOv2 paper (figure 1). The first principal component of all patch features, split in two,
separates foreground from background; the first three components of the foreground become red, green and blue. All
images share one scale: the same color means the same in each, and frames of a video do not flicker.

depth and segment run a dense head on a backbone. --head is the name of a released head, for a released backbone (depth:
nyu or kitti with _linear, _linear4 or _dpt; segment: ade20k or voc2012 with _linear or _ms), or a file, released or
written by eval_dense.py. Photographs are predicted whole, at their own size. As with pca, --out may be a folder: for
each image NAME it gets NAME.png and the prediction itself, NAME_depth.png (16 bits, millimeters) or NAME_labels.png
(a palette PNG whose indices are the classes). Near is light. Each image has its own depth scale unless --near and --far
fix it, as for a video. Invalid input exits with code 2, and nothing is written. Apache License 2.0.
"""
import argparse
import functools
import itertools
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import heads
import hub
from data import normalize, to_float
from eval_knn import neighbors as nearest_rows
from support.cli import Parser, note, printable, run, run_subcommand
from support.draw import (
    GAP, LEGEND_WIDTH, LINE_HEIGHT, MAX_IMAGES, PALETTE, SHEET_WIDTH, Curve, Tile, color_bar, depth_bar, depth_colors,
    draw_curves, evenly_spaced, heat_colors, images_per_row, in_rows, label_colors, legend, mark_point, picture_names,
    save_depth, save_labels, save_png, sheet, stack, to_rgb, zoom)
from support.evaluation import check_finite, common_labels, extract_features, full_float32, normalize_rows_
from support.images import FITS, PatchFit, fit_image, plan_fit, read_image
from support.machine import many_patches
from support.parallel import pick_device, worker_count
from support.sources import Source, eval_specs, image_paths, open_source, without_code


# ----------------------------------------------------------------------------------------------------------------------
# Images and their features


class FittedImage(NamedTuple):
    """An image, fitted to the patch grid."""
    path: str
    pixels: Tensor  # (C, h*p, w*p), uint8 or uint16
    fit: PatchFit
    size: tuple[int, int]  # height and width of the file, upright


class Viewer:
    """A model, and how images are prepared for it. `fit` and `size` are those of plan_fit(); size None: the short side
    that the model was trained at. Raises ValueError if they do not fit together."""

    def __init__(self, model: str, device: str = "auto", fit: str = "crop", size: list[int] | None = None):
        if size and (len(size) > 2 or min(size) < 0 or len(size) == 2 and min(size) == 0):
            raise ValueError("--size is the short side, or height and width, in pixels; 0 leaves images as they are")
        self.device, self.how, self.warned = pick_device(device), fit, False
        self.model, self.config = load_model(model, self.device)
        self.patch, self.mean, self.std = self.model.patch_size, self.config["mean"], self.config["std"]
        self.size = (min(self.model.patch_embed.img_size),) if size is None else tuple(s for s in size if s)
        plan_fit(2 * self.patch, 2 * self.patch, self.patch, self.how, self.size)  # a wrong size is no image's fault

    def read(self, path: str) -> FittedImage:
        """Raises ValueError, naming the file, if it cannot be read or is smaller than a patch."""
        image = read_image(path, self.model.patch_embed.in_chans)
        try:
            fit = plan_fit(*image.shape[-2:], self.patch, self.how, self.size)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return FittedImage(path, fit_image(image, fit, self.mean), fit, tuple(image.shape[-2:]))

    def batch(self, image: FittedImage) -> Tensor:
        if not self.warned and (warning := many_patches(self.model, image.pixels[None].shape, image.path)):
            note(warning)
            self.warned = True
        return normalize(to_float(image.pixels[None].to(self.device)), self.mean, self.std)  # (1, C, h*p, w*p)

    @torch.inference_mode()
    def patches(self, image: FittedImage) -> Tensor:
        """Patch features (h, w, D) on the CPU, in float16, to hold those of a video. Raises ValueError."""
        x = self.model.forward_features(self.batch(image))["x_norm_patchtokens"][0].half().cpu()  # (h*w, D)
        check_finite(x, image.path)
        return x.unflatten(0, (image.fit.canvas[0] // self.patch, -1))  # (h, w, D)


def load_model(spec: str, device: torch.device) -> tuple[torch.nn.Module, dict]:
    """A model, and its training config; for models not of train.py, only what images they expect."""
    path, ckpt = hub.read(spec)
    model = hub.load(path, ckpt).to(device)
    config = ckpt["config"] if hub.layout_of(ckpt) == "train.py" else dict(data="", eval_train="", eval_val="")
    return model, config | hub.image_rules(model, ckpt)


def usable_images(read, names: list[str], at_most: int = MAX_IMAGES):
    """Yields read(path) for the images of files and folders, in order. Images in folders that cannot be used are
    skipped with a note. Raises ValueError for a named file that cannot be used, and for no images or too many."""
    paths, n_usable, reason = image_paths(names), 0, ""
    if len(paths) > at_most:
        raise ValueError(f"{len(paths)} images are too many for one sheet; name at most {at_most}")
    for path in tqdm(paths, unit=" images", disable=None if len(paths) > 1 else True, leave=False):
        try:
            image = read(path)
        except ValueError as error:
            if path in names:
                raise
            reason = str(error)
            tqdm.write(f"left out: {printable(reason)}", file=sys.stderr)
            continue
        n_usable += 1
        yield image
    if not n_usable:
        raise ValueError(f"none of the {len(paths)} images can be used; the last: {reason}")


# ----------------------------------------------------------------------------------------------------------------------
# Where pictures go


def is_folder(out: str) -> bool:
    return Path(out).suffix == "" or Path(out).expanduser().is_dir()


def picture_path(out: str, images: list[str], folder: bool = False) -> Path:
    """The file or folder to write pictures to. Raises ValueError, before any work is done, if it cannot be written or
    would overwrite one of the `images`."""
    path = Path(out).expanduser()
    if not folder and path.suffix.lower() != ".png":
        better = path / "picture.png" if path.is_dir() else path.with_suffix(".png")
        raise ValueError(f"--out {out} is not a .png file; use for example {better}")
    parents = path.absolute().parents
    place = next(p for p in ([path.absolute()] if folder else []) + [*parents] if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK) or not folder and path.is_dir():
        raise ValueError(f"--out {out} cannot be written; choose another {'folder' if folder else 'file'}")
    if any(path.resolve() == (Path(p).resolve().parent if folder else Path(p).resolve()) for p in image_paths(images)):
        raise ValueError(f"--out {out} would overwrite the images themselves; choose another")
    return path


def pair_sheet(images: list[FittedImage], drawn: list[np.ndarray], footer=None, at: tuple[float, float] | None = None):
    """Images, each beside the colors of its patches, (h, w, 3) uint8. `at` (x, y), in pixels of the fitted image, is
    marked in the first pair."""
    n_pairs, tiles = images_per_row(len(images)), []
    side = min(SHEET_WIDTH // (2 * n_pairs) - GAP, 480)
    for i, (image, colors) in enumerate(zip(images, drawn)):
        photo = to_rgb(image.pixels)
        shown = zoom(photo, side)
        pair = [shown, Image.fromarray(colors).resize(shown.size, Image.Resampling.NEAREST)]
        if at and i == 0:
            pair = [mark_point(p, *(v * shown.width / photo.width for v in at)) for p in pair]
        tiles += [Tile(pair[0], Path(image.path).name), Tile(pair[1])]
    return sheet(in_rows(tiles, 2 * n_pairs), footer=footer)


# ----------------------------------------------------------------------------------------------------------------------
# pca


def principal_directions(rows: list[Tensor], k: int = 3) -> tuple[Tensor, Tensor]:
    """Mean (D,) and first k principal directions (D, k) of the rows of several tensors (n, D), from their covariance in
    float64. The largest entry of each direction is positive; a direction without variance is zero. Raises ValueError if
    all rows are the same or have fewer than k dimensions."""
    n, dim = sum(len(x) for x in rows), rows[0].shape[-1]
    if dim < k:
        raise ValueError(f"the features have {dim} dimension(s), too few for {k} colors")
    mean = sum(x.double().sum(0) for x in rows) / max(n, 1)
    covariance = sum((centered := x.double() - mean).T @ centered for x in rows) / max(n, 1)  # (D, D)
    values, vectors = torch.linalg.eigh(covariance)  # ascending
    values, vectors = values.flip(0), vectors.flip(1)[:, :k]
    if values.sum() <= 1e-7 * mean.square().sum():  # no more than rounding to float16 explains
        raise ValueError("all patches have the same features, so there is nothing to distinguish them by; use a larger "
                         "--size or another model")
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return mean, vectors * (values[:k] > 1e-9 * values.sum())


def otsu_threshold(values: np.ndarray) -> float:
    """The threshold that splits values in [0, 1] into two classes of least variance (Otsu 1979), in steps of 1/256; the
    middle of a gap, anywhere in which it could lie."""
    counts, edges = np.histogram(values, 256, (0, 1))
    n, total = counts.cumsum()[:-1], (counts * (edges[:-1] + 1 / 512)).cumsum()
    between = (total[-1] * n / len(values) - total[:-1]) ** 2 / np.maximum(n * (len(values) - n), 1)
    return edges[1:-1][between >= between.max() * (1 - 1e-9)].mean()


def foreground_masks(features: list[Tensor], which: str = "auto", threshold: float | None = None) -> list[Tensor]:
    """Which patches of images with features (h, w, D) are foreground, (h, w) bool each: the "high" or the "low" side of
    a threshold (None: Otsu's) on the first principal component, scaled to [0, 1]. "auto": the side with the smaller
    share of its patches at image borders. "all": every patch."""
    if which == "all":
        return [torch.ones(x.shape[:2], dtype=torch.bool) for x in features]
    mean, direction = principal_directions([x.flatten(0, 1) for x in features], min(1, features[0].shape[-1]))
    values = [((x.double() - mean) @ direction)[..., 0] for x in features]  # (h, w)
    low, high = min(v.min() for v in values), max(v.max() for v in values)
    values = [(v - low) / (high - low) for v in values]
    if threshold is None:
        threshold = otsu_threshold(torch.cat([v.flatten() for v in values]).numpy())
    sides = {"high": [v > threshold for v in values], "low": [v <= threshold for v in values]}
    if which == "auto":
        count = lambda masks: sum(int(m.sum()) for m in masks)  # noqa: E731
        which = max(sides, key=lambda name: count(m[1:-1, 1:-1] for m in sides[name]) / max(count(sides[name]), 1))
    return sides[which]


def pca_colors(features: list[Tensor], which: str = "auto", threshold: float | None = None) -> list[np.ndarray]:
    """Features (h, w, D) of images -> colors (h, w, 3) uint8: the first three principal components of all foreground
    patches, scaled from their 1st to their 99th percentile, on black. Raises ValueError if too few are foreground."""
    masks = foreground_masks(features, which, threshold)
    if (n := sum(int(m.sum()) for m in masks)) < 4:
        raise ValueError(f"{n} patches are foreground, too few for three components; choose another --foreground or "
                         "--threshold, or a larger --size")
    mean, directions = principal_directions([x[m] for x, m in zip(features, masks)])
    values = [((x[m].double() - mean) @ directions).numpy() for x, m in zip(features, masks)]  # (n, 3)
    low, high = np.percentile(np.concatenate(values), (1, 99), axis=0)
    drawn = []
    for mask, x in zip(masks, values):
        drawn.append(np.zeros((*mask.shape, 3), np.uint8))
        drawn[-1][mask.numpy()] = (np.clip((x - low) / np.maximum(high - low, 1e-12), 0, 1) * 255).round()
    return drawn


def background_note(drawn: list[np.ndarray], paths: list[str]) -> str:
    """What to say if less than a tenth of an image, as pca_colors() draws it, is foreground; else ""."""
    black = [1 - colors.any(-1).mean() for colors in drawn]
    if not (dark := [path for path, share in zip(paths, black) if share > 0.9]):
        return ""
    which = f"{dark[0]} is" if len(dark) == 1 else f"{len(dark)} images, such as {dark[0]}, are"
    everywhere = np.average(black, weights=[colors.size for colors in drawn])
    return (f"{which} nearly black: {everywhere:.0%} of all patches were taken for background; --foreground all colors "
            "them too, high or low picks one side of the split")


def show_pca(args: argparse.Namespace) -> None:
    folder = is_folder(args.out)
    out = picture_path(args.out, args.images, folder)
    if args.threshold is not None and (args.foreground == "all" or not 0 <= args.threshold <= 1):
        raise ValueError("--threshold must be between 0 and 1, and has no effect with --foreground all")
    viewer, paths, features = make_viewer(args), [], []
    for image in usable_images(viewer.read, args.images, sys.maxsize):
        paths.append(image.path)
        features.append(viewer.patches(image))
    drawn = pca_colors(features, args.foreground, args.threshold)
    if warning := background_note(drawn, paths):
        note(warning)
    shown = evenly_spaced(len(paths), 24 if folder else MAX_IMAGES)
    if folder:
        for name, colors in zip(picture_names(paths), drawn):
            size = (colors.shape[1] * viewer.patch, colors.shape[0] * viewer.patch)
            save_png(Image.fromarray(colors).resize(size, Image.Resampling.NEAREST), out / f"{name}.png")
    elif len(shown) < len(paths):
        note(f"{out} shows {len(shown)} of {len(paths)} images; --out FOLDER writes all")
    picture = pair_sheet([viewer.read(paths[i]) for i in shown], [drawn[i] for i in shown])
    save_png(picture, out / "sheet.png" if folder else out)


# ----------------------------------------------------------------------------------------------------------------------
# attention, similarity


@torch.inference_mode()
def attention_of(model: torch.nn.Module, x: Tensor, block: int = -1) -> Tensor:
    """Attention (1+R, H, N) from CLS and the registers to all tokens of an image (1, C, h*p, w*p), in one block. Only
    these rows of the N x N matrix are computed. Raises ValueError for a block that does not exist."""
    if not -model.n_blocks <= block < model.n_blocks:
        raise ValueError(f"--block {block} does not exist; the model has 0 to {model.n_blocks - 1}, or -1 for the last")
    attn, outputs = model.block_list()[block].attn, []
    hook = attn.qkv.register_forward_hook(lambda module, args, out: outputs.append(out))
    try:
        model(x)
    finally:
        hook.remove()
    q, k, _ = outputs[0][0].float().unflatten(-1, (3, attn.num_heads, -1)).permute(1, 2, 0, 3)  # each (H, N, D/H)
    q = q[:, : 1 + model.num_register_tokens]  # (H, 1+R, D/H)
    return (q @ k.transpose(1, 2) * attn.scale).softmax(-1).transpose(0, 1)  # (1+R, H, N)


def show_attention(args: argparse.Namespace) -> None:
    out, viewer, rows, labels = picture_path(args.out, args.images), make_viewer(args), [], []
    for image in usable_images(viewer.read, args.images):
        maps = attention_of(viewer.model, viewer.batch(image), args.block).cpu()  # (1+R, H, N)
        check_finite(maps, args.model)
        maps = torch.cat([maps.mean(1, keepdim=True), maps], 1)  # (1+R, 1+H, N)
        maps = maps[..., len(maps) :].unflatten(-1, (image.fit.canvas[0] // viewer.patch, -1)).numpy()  # .., h, w)
        per_row = min(maps.shape[1], 9)  # more heads continue in the next row
        shown = zoom(to_rgb(image.pixels), min((SHEET_WIDTH - 100) // (per_row + 1) - GAP, 320))
        for token, shares in enumerate(maps):
            tiles = [Tile(Image.fromarray(heat_colors(m, 0, m.max())).resize(shown.size, Image.Resampling.NEAREST),
                          f"head {i - 1}" if i else "mean", f"max {100 * m.max():.2g} %") for i, m in enumerate(shares)]
            for i, row in enumerate(in_rows(tiles, per_row)):
                rows.append([Tile() if token or i else Tile(shown, Path(image.path).name), *row])
                labels.append("" if i else f"register {token}" if token else "CLS")
    save_png(sheet(rows, labels), out)


def patch_at(image: FittedImage, x: int, y: int, patch: int) -> tuple[float, float, int, int]:
    """Where the center of pixel (x, y) of the file lies in the fitted image, and row and column of its patch. Raises
    ValueError if there is no such pixel, or it was cropped away."""
    (height, width), fit = image.size, image.fit
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(f"--at {x},{y} lies outside {image.path}, which is {width} pixels wide and {height} high")
    right, down = fit.left + (x + 0.5) * fit.scaled[1] / width, fit.top + (y + 0.5) * fit.scaled[0] / height
    if not (0 <= right < fit.canvas[1] and 0 <= down < fit.canvas[0]):
        raise ValueError(f"--at {x},{y} was cropped away from {image.path}; use --fit pad or --fit resize")
    return right, down, int(down // patch), int(right // patch)


def show_similarity(args: argparse.Namespace) -> None:
    out, viewer, images, maps = picture_path(args.out, args.images), make_viewer(args), [], []
    for image in usable_images(viewer.read, args.images):
        features = F.normalize(viewer.patches(image).float(), dim=-1)  # (h, w, D)
        if not images:
            x, y, row, column = patch_at(image, *args.at, viewer.patch)
            query = features[row, column]
        images.append(image)
        maps.append((features @ query).numpy())
    low = min(m.min() for m in maps)
    footer = color_bar(low, 1, "  cosine similarity to the patch in the ring")
    save_png(pair_sheet(images, [heat_colors(m, low, 1) for m in maps], footer, (x, y)), out)


# ----------------------------------------------------------------------------------------------------------------------
# depth, segment


def load_dense(args: argparse.Namespace, task: str, depth_range=None) -> tuple:
    """(network, hub.About, dict): the network that --model and --head name, what it was trained for, and what images it
    expects. Raises ValueError unless its task is `task`, "depth" or "seg"."""
    device, (_, ckpt) = pick_device(args.device), hub.read(args.model)
    if not args.head and not hub.is_mask2former(ckpt):
        raise ValueError(f"{args.model} is a backbone; give its head by --head: a file or, for a released backbone, "
                         f"{'nyu_dpt or kitti_dpt' if task == 'depth' else 'ade20k_ms or voc2012_ms'}")
    network, about = hub.load_dense(args.model, args.head or None, depth_range, ckpt)
    if about.task != task:
        kind, command = ("segmentation", "segment") if task == "depth" else ("depth", "depth")
        raise ValueError(f"{args.head or args.model} is a {kind} head; use: visualize.py {command}")
    return network.to(device), about, hub.image_rules(network.backbone if args.head else network, ckpt)


class Predictions:
    """Where the predictions for the images of a command go: to one sheet; or to a folder, where each has its own files,
    and at most 24 are also on the sheet. `suffix` ends the names of the files that hold the predictions themselves."""

    def __init__(self, args: argparse.Namespace, suffix: str, max_per_row: int):
        self.folder, self.images, self.tiles = is_folder(args.out), args.images, []
        self.out, paths = picture_path(args.out, args.images, self.folder), image_paths(args.images)
        self.names = dict(zip(paths, picture_names(paths, suffix)))
        self.shown = {paths[i] for i in evenly_spaced(len(paths), 24 if self.folder else MAX_IMAGES)}
        self.per_row = images_per_row(len(self.shown), max_per_row)

    def images_of(self, channels: int):
        """Yields (path, image (C, H, W)), uint8 or uint16."""
        at_most = sys.maxsize if self.folder else MAX_IMAGES
        return usable_images(lambda path: (path, read_image(path, channels)), self.images, at_most)

    def file(self, path: str, suffix: str = "") -> Path:
        return self.out / f"{self.names[path]}{suffix}.png"

    def finish(self, tiles_per_image: int) -> None:
        picture = sheet(in_rows(self.tiles, tiles_per_image * self.per_row))
        save_png(picture, self.out / "sheet.png" if self.folder else self.out)


def show_depth(args: argparse.Namespace) -> None:
    limits = [v for v in (args.near, args.far) if v is not None]
    if args.size < 0 or not all(0 <= v < math.inf for v in limits) or limits != sorted({*limits}):
        raise ValueError("--size is a side in pixels, or 0; --near and --far are meters, and --near is less than --far")
    results = Predictions(args, "_depth", 4)
    network, _, rules = load_dense(args, "depth", args.depth_range)
    device = next(network.parameters()).device
    side = min(SHEET_WIDTH // (2 * results.per_row) - GAP, 480)
    for i, (path, image) in enumerate(results.images_of(rules["in_chans"])):
        scale = args.size / min(image.shape[1:]) if args.size else 1
        shape = torch.Size([1, len(image), *(round(scale * side) for side in image.shape[1:])])
        if i == 0 and (warning := many_patches(network.backbone, shape, path)):
            note(warning)
        meters = heads.predict_depth(network, image.to(device), rules["mean"], rules["std"], args.size, bool(args.flip))
        check_finite(meters, f"{args.model} with {args.head}")
        meters = meters.cpu().numpy()
        near = meters.min().item() if args.near is None else args.near
        far = max(meters.max().item() if args.far is None else args.far, near)
        drawn = Image.fromarray(depth_colors(meters, near, far))
        if results.folder:
            save_png(drawn, results.file(path))
            save_depth(results.file(path, "_depth"), meters, network.decode_head.depth_range[1])
        if path in results.shown:
            shown = zoom(drawn, side)
            results.tiles += [Tile(zoom(to_rgb(image), side), Path(path).name),
                              Tile(stack(shown, depth_bar(near, far, shown.width)))]
    results.finish(2)


def show_segmentation(args: argparse.Namespace) -> None:
    if args.size < 0 or not 0 <= args.opacity <= 1:
        raise ValueError("--size is a side in pixels, or 0; --opacity is between 0 and 1")
    results = Predictions(args, "_labels", 2)
    network, about, rules = load_dense(args, "seg")
    recipe, device = about.recipe, next(network.parameters()).device
    n_scales = len(recipe.ratios) if args.scales is None else args.scales
    if not 1 <= n_scales <= len(recipe.ratios):
        raise ValueError(f"--scales must be 1 to {len(recipe.ratios)}, as in this head's recipe, not {n_scales}")
    recipe = recipe._replace(short=args.size or recipe.short, ratios=recipe.ratios[:n_scales],
                             flip=recipe.flip if args.flip is None else args.flip)
    side = min((SHEET_WIDTH // results.per_row - LEGEND_WIDTH) // 2 - 2 * GAP, 480)
    for path, image in results.images_of(rules["in_chans"]):
        probabilities = heads.segment(network, image.to(device), recipe, rules["mean"], rules["std"])  # (classes, H, W)
        check_finite(probabilities, f"{args.model} with {args.head}")
        labels, photo = probabilities.argmax(0).cpu().numpy(), to_rgb(image)
        drawn = Image.blend(photo, Image.fromarray(label_colors(labels, about.colors)), args.opacity)
        if results.folder:
            save_png(drawn, results.file(path))
            save_labels(results.file(path, "_labels"), labels, about.colors)
        if path in results.shown:
            photo, drawn = zoom(photo, side), zoom(drawn, side)
            key = legend(labels, about.classes, about.colors, max(photo.height // LINE_HEIGHT - 1, 6))
            results.tiles += [Tile(photo, Path(path).name), Tile(drawn), Tile(key)]
    results.finish(3)


# ----------------------------------------------------------------------------------------------------------------------
# neighbors


class Queries(Source):
    """Images in memory, as a source."""

    def __init__(self, images: list[Tensor], names: list[str], labels=None, classes=None):
        self.images, self.names, self.labels, self.classes = images, names, labels, classes
        self.name, self.channels = "the queries", len(images[0])

    def __len__(self) -> int:
        return len(self.images)

    def image(self, i: int) -> Tensor:
        return self.images[i]

    def describe(self, i: int) -> str:
        return self.names[i]


def sample_queries(source: Source, n: int, seed: int) -> tuple[Queries, Tensor]:
    """n random readable images of a source, and their indices (n,). Raises ValueError if there is none."""
    images, rows = [], []
    for i in torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).tolist():
        try:
            images.append(source.image(i))
        except Exception:  # decoders raise anything on damaged files
            continue
        rows.append(i)
        if len(rows) == n:
            break
    if not rows:
        raise ValueError(f"no image of {source.name} can be read")
    labels = None if source.labels is None else np.asarray(source.labels)[rows]
    return Queries(images, [source.describe(i) for i in rows], labels, source.classes), torch.tensor(rows)


def nearest_images(bank: Tensor, ok: Tensor, queries: Tensor, k: int, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cosine similarities (Q, k) and rows (Q, k) of the k rows of `bank` (n, D) nearest to each of the queries (Q, D),
    nearest first; without rows that are not `ok` (n,) and each query's `own` row (Q,). Fewer than k if there are no
    more."""
    with full_float32():
        cosines = normalize_rows_(queries) @ normalize_rows_(bank).T  # (Q, n)
    cosines[:, ~ok] = -torch.inf
    if own is not None:
        cosines.scatter_(1, own[:, None].to(bank.device), -torch.inf)
    k = min(k, int(ok.sum()) - (own is not None))
    if k < 1:
        raise ValueError("a single image has no neighbor; give more images as --data")
    return nearest_rows(cosines, k)


def show_neighbors(args: argparse.Namespace) -> None:
    out, device = picture_path(args.out, args.images), pick_device(args.device)
    paths = image_paths(args.images)
    if not 1 <= args.k <= 24 or not 1 <= (len(paths) or args.queries) <= MAX_IMAGES:
        raise ValueError(f"--k must be 1 to 24, --queries or the images 1 to {MAX_IMAGES}")
    model, config = load_model(args.model, device)
    if not (args.data or config["data"]):
        raise ValueError(f"{args.model} does not say which images to search; give --data")
    stated = (config[key] for key in ("data", "eval_train", "eval_val"))
    train, val = eval_specs(*([args.data] * 2 if args.data else [without_code(spec, "--data") for spec in stated]))
    source = open_source(train, config["in_chans"])
    if out.exists() and out.resolve() in (Path(source.describe(i)).resolve() for i in range(len(source))):
        raise ValueError(f"--out {args.out} would overwrite an image of {train}; choose another")
    own = None
    if paths:
        queries = Queries([read_image(p, config["in_chans"]) for p in paths], [Path(p).name for p in paths])
    else:
        queries, rows = sample_queries(open_source(val, config["in_chans"]) if val else source, args.queries, args.seed)
        own = None if val else rows
    features = functools.partial(extract_features, model, resize=config["eval_resize"], crop=config["eval_crop"],
                                 device=device, mean=config["mean"], std=config["std"])
    bank, ok = features(source, num_workers=worker_count(args.num_workers))
    cosines, rows = nearest_images(bank, ok, features(queries)[0], args.k, own)
    save_png(neighbor_sheet(source, queries, cosines.tolist(), rows.tolist()), out)


def neighbor_sheet(source: Source, queries: Queries, cosines: list, rows: list) -> Image.Image:
    """A row per query: the image, then its neighbors, framed in green if of the same class and in red if not, where
    classes are known."""
    side = min(SHEET_WIDTH // (len(rows[0]) + 1) - GAP, 160)
    labels, answers = source.labels, None
    if labels is not None and queries.labels is not None:
        labels, answers = common_labels(source, queries)
    name_of = lambda label: str(source.classes[label] if source.classes else label) if label >= 0 else ""  # noqa: E731
    table = []
    for q, (values, neighbors) in enumerate(zip(cosines, rows)):
        answer = -1 if answers is None else int(answers[q])
        table.append([Tile(zoom(to_rgb(queries.image(q)), side), "query",
                           name_of(answer) or Path(queries.describe(q)).name)])
        for cosine, i in zip(values, neighbors):
            label = -1 if labels is None else int(labels[i])
            frame = PALETTE[2 if label == answer else 1] if min(label, answer) >= 0 else ""
            table[-1].append(Tile(zoom(to_rgb(source.image(i)), side), f"{cosine:.3f}", name_of(label), frame))
    return sheet(table)


# ----------------------------------------------------------------------------------------------------------------------
# curves


def loss_terms(record: dict) -> list[str]:
    """The names of the loss terms in a line of metrics.jsonl: they stand between the total and the gradient norms."""
    names = [*record]
    after = names[names.index("loss") + 1 :] if "loss" in record else []
    return [*itertools.takewhile(lambda name: not name.startswith(("grad_norm", "lr")), after)]


def values_of(record: dict) -> dict[str, float | None]:
    """What curves show of a line of metrics.jsonl. Raises whatever a line that train.py did not write leads to."""
    values = {key: record[key] for key in ("loss", *loss_terms(record)) if "loss" in record}
    values |= {key: record[key].get("top1_k20") for key in ("knn", "knn_raw_pixels") if record.get(key)}
    return {key: None if value is None else float(value) for key, value in values.items()}


def read_run(name: str) -> dict[str, list[tuple[int, float]]]:
    """From a run's metrics.jsonl, (step, value) in order, of the losses, of "knn" and of "knn_raw_pixels" (top-1 at
    k = 20, in percent). Skips an incomplete last line. Raises ValueError if there is no such file, or nothing in it."""
    path = Path(name, "metrics.jsonl") if os.path.isdir(name) else Path(name)
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"{path} cannot be read; name the --out folder of a run, or its metrics.jsonl") from None
    curves = {}
    for i, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step, shown = int(record["step"]), values_of(record)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            if i == len(lines):  # the run is writing it right now
                break
            raise ValueError(f"{path}, line {i}, is not a training record") from None
        for key, value in shown.items():
            curves.setdefault(key, {})[step] = value
    # train.py writes null for a value that is not finite
    curves = {key: sorted((s, v) for s, v in curve.items() if v is not None and math.isfinite(v))
              for key, curve in curves.items()}
    if not any(curves.values()):
        raise ValueError(f"{path} holds no finite value yet; try again once the run has logged one")
    return curves


def panels_of(runs: dict[str, dict]) -> dict[str, list[Curve]]:
    """Title -> curves. The loss: its terms for a single run, the totals for several. k-NN accuracy, if there is any."""
    losses, accuracies = [], []
    for color, (name, curves) in zip(PALETTE, runs.items()):
        terms = [key for key in curves if key not in ("loss", "knn", "knn_raw_pixels")]
        shown = {name: "loss"} if len(runs) > 1 else {"total": "loss"} | dict(zip(terms, terms))
        losses += [Curve(label, curves[key], c) for (label, key), c in zip(shown.items(), [color, *PALETTE[1:]] * 2)
                   if curves.get(key)]
        if knn := curves.get("knn"):
            accuracies.append(Curve(name, knn, color))
        if raw := curves.get("knn_raw_pixels"):
            last = max(points[-1][0] for points in curves.values() if points)
            accuracies.append(Curve(f"{name}, raw pixels", [(0, raw[0][1]), (last, raw[0][1])], color, True))
    return {title: lines for title, lines in (("loss", losses), ("k-NN accuracy, %", accuracies)) if lines}


def show_curves(args: argparse.Namespace) -> None:
    out = picture_path(args.out, [])
    if len(args.runs) > len(PALETTE):
        raise ValueError(f"{len(args.runs)} runs are too many for one picture; name at most {len(PALETTE)}")
    folders = [Path(r if os.path.isdir(r) else Path(r).parent).resolve() for r in args.runs]
    names = [f.name if [g.name for g in folders].count(f.name) == 1 else r for f, r in zip(folders, args.runs)]
    if twice := [r for r, n in zip(args.runs, names) if names.count(n) > 1]:
        raise ValueError(f"{twice[0]} is named twice")
    save_png(draw_curves(panels_of({name: read_run(r) for name, r in zip(names, args.runs)})), out)


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def parse_pixel(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"\d+,\d+", text):
        raise argparse.ArgumentTypeError(f"takes the column and the row of a pixel, such as 320,250, not {text!r}")
    x, y = text.split(",")
    return int(x), int(y)


def make_viewer(args: argparse.Namespace) -> Viewer:
    return Viewer(args.model, args.device, args.fit, args.size)


def add_dense_flags(add, command: str) -> None:
    add("--head", default="", help="a file, or the name of a released head such as nyu_dpt or ade20k_ms; required, "
        "except for dinov2_vitg14_m2f")
    add("--flip", action=argparse.BooleanOptionalAction, help="average with the prediction for the mirror image; "
        "default: segment follows the recipe of the head, depth does not")
    add("--size", type=int, default=0, help="resize images to this short side, in pixels; default 0: segment follows "
        "the recipe of the head, depth does not resize")
    if command == "depth":
        add("--depth-range", type=float, nargs=2, metavar=("MIN", "MAX"), help="the depths, in meters, that the head "
            "was trained for; default: as the head says")
        add("--near", type=float, help="depth in meters drawn lightest, in all images; default: the nearest of each")
        add("--far", type=float, help="depth in meters drawn black, in all images; default: the farthest of each")
    else:
        add("--scales", type=int, help="use only the first N scales of the head's recipe; default: all. ade20k_ms and "
            "voc2012_ms have 5, up to 3 times the short side; the first 3 take a quarter of the time")
        add("--opacity", type=float, default=0.6, help="opacity of the colors, 0 to 1")


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags of a command, which comes first."""
    command, *flags = argv
    parser = Parser(__doc__)
    parser.prog = f"python visualize.py {command}"
    add = parser.add_argument
    if command == "curves":
        add("runs", nargs="+", metavar="RUN", help="the --out folder of a run, or its metrics.jsonl")
    else:
        add("images", nargs="*" if command == "neighbors" else "+", metavar="IMG", help="a file or a folder")
        add("--model", required=True, help="a checkpoint, or the name of a released model such as dinov2_vits14")
        parser.add_machine_flags("device")
    if command in ("pca", "attention", "similarity"):
        add("--size", type=int, nargs="+", help="resize images to this short side, or height and width, in pixels; 0: "
            "keep their size; default: the short side that the network was trained at")
        add("--fit", choices=FITS, default="crop", help="how to make sides multiples of the patch size")
    if command in ("depth", "segment"):
        add_dense_flags(add, command)
    if command == "pca":
        add("--foreground", choices=("auto", "high", "low", "all"), default="auto", help="the side of the threshold "
            "that is foreground; auto: the one that touches the borders less; all: there is no background")
        add("--threshold", type=float, help="on the first component, scaled to 0..1; default: Otsu's")
    if command == "attention":
        add("--block", type=int, default=-1, help="index of the block; -1: the last")
    if command == "similarity":
        add("--at", type=parse_pixel, required=True, metavar="X,Y", help="a pixel of the first image; 0,0 is top left")
    if command == "neighbors":
        add("--data", default="", help="the images to search, given as for train.py --data; default: those of training")
        add("--k", type=int, default=8, help="neighbors per query")
        add("--queries", type=int, default=8, help="without IMG: how many random queries")
        add("--seed", type=int, default=0, help="without IMG: selects the queries")
        parser.add_machine_flags("num-workers")
    add("--out", default=f"visualize-{command}.png", help="the picture" + (
        "; a folder: a picture of each image, and sheet.png" if command in ("pca", "depth", "segment") else ""))
    return parser.parse_args(flags)


COMMANDS = dict(pca=show_pca, attention=show_attention, similarity=show_similarity, depth=show_depth,
                segment=show_segmentation, neighbors=show_neighbors, curves=show_curves)


def show(command: str, argv: list[str]) -> None:
    args = parse([command, *argv])
    COMMANDS[command](args)
    print(args.out)


def main(argv: list[str] | None = None) -> None:
    run_subcommand({name: functools.partial(show, name) for name in COMMANDS}, __doc__, argv)


if __name__ == "__main__":
    run(main, less_memory="lower --size, or name fewer images")
