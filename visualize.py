"""Pictures of what a model has learned, and of how its training went, as PNG files.

    python visualize.py pca photos/ a.jpg --model out/ckpt.pth     # patch features as colors, the same in all images
    python visualize.py pca frames/ --model dinov2_vits14 --size 448 --out frames_pca     # a folder: a PNG per image
    python visualize.py attention a.jpg --model out/ckpt.pth       # of CLS and registers to the patches, head by head
    python visualize.py similarity a.jpg b.jpg --at 310,200 --model out/ckpt.pth   # of all patches to that of a pixel
    python visualize.py depth a.jpg photos/ --model dinov2_vits14 --head nyu_dpt   # meters as colors, with a bar
    python visualize.py segment a.jpg --model dinov2_vits14 --head voc2012_ms      # classes as colors, with a legend
    python visualize.py neighbors --data digits --model out/ckpt.pth              # the nearest images to some others
    python visualize.py neighbors a.jpg --data /my/photos --model dinov2_vits14   # to this one
    python visualize.py curves out_a out_b                         # losses and k-NN accuracy of one run or several
    python visualize.py pca --help                                 # the flags of a command

Images are files, or folders: all images below. A model is whatever hub.load() takes: a checkpoint of train.py, the
name of a released model, a file of Hugging Face or timm. An image is brought to --size (none: the short side that the
weights were trained at; 0: as it is), then to multiples of the patch as --fit says; for depth and segment otherwise,
see their --help. Larger images give finer maps.

pca is the picture of the DINOv2 paper (figure 1): the first principal component of all patch features, cut in two,
tells foreground from background; the first three of the foreground's own are red, green and blue. All images share one
scale, so that a color means the same in each, and frames of a film do not flicker.

depth and segment show a dense head on a backbone: --head is a released one, of a released backbone (depth: nyu or kitti
with _linear, _linear4 or _dpt; segment: ade20k or voc2012 with _linear or _ms), or a file, of the release or of
eval_dense.py. Whole images are predicted, at their own size, and --out may be a folder as with pca: of each image NAME
it gets NAME.png, and the prediction itself, NAME_depth.png (16 bits, millimeters) or NAME_labels.png (its palette index
is the class). Depths are light where near; each image has its own scale unless --near and --far fix it, as for films.
Wrong input: exit code 2, and nothing is written. Apache License 2.0.
"""
import argparse
import functools
import json
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

import heads
import hub
from data import normalize, to_float
from eval_knn import neighbors as nearest_rows
from support.cli import Parser, nearest, run
from support.draw import (
    BAD, COLORS, FINE, GAP, GOOD, LEGEND, LINE, MOST, PANEL, WIDTH, Cell, Line, class_table, depth_bar, depth_colors,
    draw_panel, heat, heat_bar, in_a_row, label_colors, legend, mark, rows_of, save, sheet, spread, to_rgb, wrap_legend,
    zoom)
from support.evaluation import common_labels, extract_features, full_float32, normalize_rows_
from support.images import PatchFit, fit_image, plan_fit, read_image
from support.parallel import pick_device, worker_count
from support.sources import Source, eval_specs, image_paths, open_source, without_code


# ----------------------------------------------------------------------------------------------------------------------
# Images and their features


class Seen(NamedTuple):
    """An image as the network sees it."""
    path: str
    image: Tensor  # (C, h*p, w*p), uint8 or uint16
    fit: PatchFit
    size: tuple[int, int]  # height and width of the file, upright


class Viewer:
    """A model and how images are brought to it, as the command line says. Raises ValueError for what does not fit."""

    def __init__(self, args: argparse.Namespace):
        self.device, self.how, size = pick_device(args.device), args.fit, args.size
        if size and (len(size) > 2 or min(size) < 0 or len(size) == 2 and min(size) == 0):
            raise ValueError("--size takes the short side, or height and width, in pixels, or 0: images as they are")
        self.model, self.config = load(args.model, self.device)
        self.patch, self.mean, self.std = self.model.patch_size, self.config["mean"], self.config["std"]
        self.size = (min(self.model.patch_embed.img_size),) if size is None else tuple(s for s in size if s)
        plan_fit(2 * self.patch, 2 * self.patch, self.patch, self.how, self.size)  # a wrong size is no image's fault

    def see(self, path: str) -> Seen:
        """Raises ValueError, naming the file, if it cannot be read, or is smaller than a patch."""
        image = read_image(path, self.model.patch_embed.in_chans)
        try:
            fit = plan_fit(*image.shape[-2:], self.patch, self.how, self.size)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return Seen(path, fit_image(image, fit, self.mean), fit, tuple(image.shape[-2:]))

    def batch(self, seen: Seen) -> Tensor:
        return normalize(to_float(seen.image[None].to(self.device)), self.mean, self.std)  # (1, C, h*p, w*p)

    @torch.inference_mode()
    def patches(self, seen: Seen) -> Tensor:
        """Patch features (h, w, D) on the CPU, in float16, so that those of a film fit. Raises ValueError."""
        x = self.model.forward_features(self.batch(seen))["x_norm_patchtokens"][0]  # (h*w, D)
        x = x.half().cpu()
        if not x.isfinite().all():
            raise ValueError(f"the features of {seen.path} are not finite: the checkpoint has diverged")
        return x.unflatten(0, (seen.fit.canvas[0] // self.patch, -1))  # (h, w, D)


def each(see, names: list[str], most: int = MOST):
    """see(path) of the images of files and folders, in order. What cannot be used is left out with a note if it comes
    from a folder; raises ValueError if it was named itself, nothing is left, or there are more than `most`."""
    paths, n_seen, why = image_paths(names), 0, ""
    if len(paths) > most:
        raise ValueError(f"{len(paths)} images are too many for one sheet; name {most} at most")
    for path in tqdm(paths, unit=" images", disable=None if len(paths) > 1 else True, leave=False):
        try:
            seen = see(path)
        except ValueError as error:
            if path in names:
                raise
            why = str(error)
            tqdm.write(f"left out: {why}", file=sys.stderr)
            continue
        n_seen += 1
        yield seen
    if not n_seen:
        raise ValueError(f"none of the {len(paths)} images can be used; the last: {why}")


def load(spec: str, device: torch.device) -> tuple[torch.nn.Module, dict]:
    """A model, and the config of its training; of other models what images it expects."""
    path, ckpt = hub.read(spec)
    model = hub.load(path, ckpt).to(device)
    config = ckpt["config"] if hub.layout_of(ckpt) == "train.py" else dict(data="", eval_train="", eval_val="")
    return model, config | hub.image_rules(model, ckpt)


# ----------------------------------------------------------------------------------------------------------------------
# Sheets


def pair_sheet(seen: list[Seen], drawn: list[np.ndarray], footer=None, at: tuple[float, float] | None = None):
    """Images and beside each what was drawn of its patches, (h, w, 3) uint8; several pairs in a row where there are
    many. `at` (x, y) is marked in the first, in pixels of what the network sees."""
    pairs, cells = in_a_row(len(seen)), []
    side = min(WIDTH // (2 * pairs) - GAP, 480)
    for i, (one, colors) in enumerate(zip(seen, drawn)):
        image = to_rgb(one.image)
        shown = zoom(image, side)
        couple = [shown, Image.fromarray(colors).resize(shown.size, Image.Resampling.NEAREST)]
        if at and i == 0:
            couple = [mark(c, *(v * shown.width / image.width for v in at)) for c in couple]
        cells += [Cell(couple[0], Path(one.path).name), Cell(couple[1])]
    return sheet(rows_of(cells, 2 * pairs), footer=footer)


def wants_folder(out: str) -> bool:
    return Path(out).suffix == "" or Path(out).expanduser().is_dir()


def check_out(out: str, images: list[str], folder: bool = False) -> Path:
    """Where a picture, or a folder of them, shall go. Raises ValueError, before any work is done, if it cannot, or if
    one of the `images` would be overwritten."""
    path = Path(out).expanduser()
    if not folder and path.suffix.lower() != ".png":
        better = path / "picture.png" if path.is_dir() else path.with_suffix(".png")
        raise ValueError(f"--out {out} is no .png file; name one, as {better}")
    above = path.absolute().parents
    place = next(p for p in ([path.absolute()] if folder else []) + [*above] if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK) or not folder and path.is_dir():
        raise ValueError(f"--out {out} cannot be written; name a {'folder' if folder else 'file in a folder'} of yours")
    if any(path.resolve() == (Path(p).resolve().parent if folder else Path(p).resolve()) for p in image_paths(images)):
        raise ValueError(f"--out {out} would overwrite the images themselves; name another")
    return path


# ----------------------------------------------------------------------------------------------------------------------
# pca


def principal(parts: list[Tensor], k: int = 3) -> tuple[Tensor, Tensor]:
    """Mean (D,) and the k directions (D, k) in which the rows of all `parts`, (n, D) each, differ most, by the
    covariance in float64; exact for any number of rows. The largest entry of a direction is positive. Directions in
    which rows do not differ are zero. Raises ValueError if they are all alike, or have fewer dimensions than k."""
    n, dim = sum(len(p) for p in parts), parts[0].shape[-1]
    if dim < k:
        raise ValueError(f"the features have {dim} dimension(s), too few for {k} colors")
    mean = sum(p.double().sum(0) for p in parts) / max(n, 1)
    covariance = sum((x := p.double() - mean).T @ x for p in parts) / max(n, 1)  # (D, D)
    values, vectors = torch.linalg.eigh(covariance)  # ascending
    values, vectors = values.flip(0), vectors.flip(1)[:, :k]
    if values.sum() <= 1e-7 * mean.square().sum():  # which is what rounding to float16 does
        raise ValueError("all patches have the same features, there is nothing to tell them apart by; give a larger "
                         "--size, or another model")
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return mean, vectors * (values[:k] > 1e-9 * values.sum())


def otsu(values: np.ndarray) -> float:
    """The threshold that parts values in [0, 1] into two classes of least variance (Otsu 1979), in steps of 1/256; the
    middle, where it may lie anywhere in a gap."""
    counts, edges = np.histogram(values, 256, (0, 1))
    n, total = counts.cumsum()[:-1], (counts * (edges[:-1] + 1 / 512)).cumsum()
    between = (total[-1] * n / len(values) - total[:-1]) ** 2 / np.maximum(n * (len(values) - n), 1)
    return edges[1:-1][between >= between.max() * (1 - 1e-9)].mean()


def foreground_of(parts: list[Tensor], which: str = "auto", threshold: float | None = None) -> list[Tensor]:
    """Which patches of each of `parts` (h, w, D) are foreground, (h, w) bool: by the first principal component, on the
    side of the threshold (None: Otsu's) named "high" or "low"; "auto": the side with the smaller share of its patches
    at the borders of images. "all": everything."""
    if which == "all":
        return [torch.ones(p.shape[:2], dtype=torch.bool) for p in parts]
    mean, direction = principal([p.flatten(0, 1) for p in parts], min(1, parts[0].shape[-1]))
    values = [((p.double() - mean) @ direction)[..., 0] for p in parts]  # (h, w)
    low, high = min(v.min() for v in values), max(v.max() for v in values)
    values = [(v - low) / (high - low) for v in values]
    if threshold is None:
        threshold = otsu(torch.cat([v.flatten() for v in values]).numpy())
    sides = {"high": [v > threshold for v in values], "low": [v <= threshold for v in values]}
    if which == "auto":
        total, inner = ({name: sum(int(cut(s).sum()) for s in side) for name, side in sides.items()}
                        for cut in (lambda s: s, lambda s: s[1:-1, 1:-1]))
        which = max(sides, key=lambda name: inner[name] / max(total[name], 1))
    return sides[which]


def pca_colors(parts: list[Tensor], which: str = "auto", threshold: float | None = None) -> list[np.ndarray]:
    """Features (h, w, D) of images -> their colors (h, w, 3) uint8: three principal components of the foreground of
    all, from the 1st to the 99th percentile; background is black. Raises ValueError if too little is foreground."""
    masks = foreground_of(parts, which, threshold)
    if (n := sum(int(m.sum()) for m in masks)) < 4:
        raise ValueError(f"{n} patches are foreground, too few for three components; choose another --foreground or "
                         "--threshold, or a larger --size")
    mean, directions = principal([p[m] for p, m in zip(parts, masks)])
    values = [((p[m].double() - mean) @ directions).numpy() for p, m in zip(parts, masks)]  # (n, 3)
    low, high = np.percentile(np.concatenate(values), (1, 99), axis=0)
    drawn = []
    for mask, x in zip(masks, values):
        drawn.append(np.zeros((*mask.shape, 3), np.uint8))
        drawn[-1][mask.numpy()] = (np.clip((x - low) / np.maximum(high - low, 1e-12), 0, 1) * 255).round()
    return drawn


def file_names(paths: list[str], kind: str = "") -> list[str]:
    """A name for the picture of each image: its own; if two are alike, with the folders before it, or a number. Nor is
    one alike another with `kind` added, as a_depth."""
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    longer = [os.path.relpath(path, root).replace(os.sep, "_") for path in paths]
    for names in ([Path(path).stem for path in paths], [Path(name).stem for name in longer]):
        ends = {"", kind}
        if len({"sheet", *(name + end for name in names for end in ends)}) > len(names) * len(ends):
            return names
    return [f"{i:06d}_{Path(path).stem}" for i, path in enumerate(paths)]


def pca(args: argparse.Namespace) -> None:
    into = wants_folder(args.out)
    out = check_out(args.out, args.images, into)
    if args.threshold is not None and (args.foreground == "all" or not 0 <= args.threshold <= 1):
        raise ValueError("--threshold lies between 0 and 1, and has no use with --foreground all")
    viewer, paths, parts = Viewer(args), [], []
    for seen in each(viewer.see, args.images, sys.maxsize):
        paths.append(seen.path)
        parts.append(viewer.patches(seen))
    drawn = pca_colors(parts, args.foreground, args.threshold)
    shown = spread(len(paths), 24 if into else MOST)
    if into:
        for name, colors in zip(file_names(paths), drawn):
            size = (colors.shape[1] * viewer.patch, colors.shape[0] * viewer.patch)
            save(Image.fromarray(colors).resize(size, Image.Resampling.NEAREST), out / f"{name}.png")
    elif len(shown) < len(paths):
        print(f"note: {out} shows {len(shown)} of {len(paths)} images; --out FOLDER writes them all", file=sys.stderr)
    picture = pair_sheet([viewer.see(paths[i]) for i in shown], [drawn[i] for i in shown])
    save(picture, out / "sheet.png" if into else out)


# ----------------------------------------------------------------------------------------------------------------------
# attention, similarity


@torch.inference_mode()
def attention_of(model: torch.nn.Module, x: Tensor, block: int = -1) -> Tensor:
    """Attention (1+R, H, N) of CLS and the registers to all tokens of an image (1, C, h*p, w*p), in a block. Only these
    rows of the N x N matrix are computed. Raises ValueError for a block that does not exist."""
    if not -model.n_blocks <= block < model.n_blocks:
        raise ValueError(f"--block {block} does not exist; the model has 0 to {model.n_blocks - 1}, or -1 for the last")
    attn, kept = model.block_list()[block].attn, []
    hook = attn.qkv.register_forward_hook(lambda module, args, out: kept.append(out))
    try:
        model(x)
    finally:
        hook.remove()
    q, k, _ = kept[0][0].float().unflatten(-1, (3, attn.num_heads, -1)).permute(1, 2, 0, 3)  # each (H, N, D/H)
    q = q[:, : 1 + model.num_register_tokens]  # (H, 1+R, D/H)
    return (q @ k.transpose(1, 2) * attn.scale).softmax(-1).transpose(0, 1)  # (1+R, H, N)


def attention(args: argparse.Namespace) -> None:
    out, viewer, rows, labels = check_out(args.out, args.images), Viewer(args), [], []
    for seen in each(viewer.see, args.images):
        maps = attention_of(viewer.model, viewer.batch(seen), args.block).cpu()  # (1+R, H, N)
        hub.check_finite(maps, args.model)
        maps = torch.cat([maps.mean(1, keepdim=True), maps], 1)  # (1+R, 1+H, N)
        grid = (seen.fit.canvas[0] // viewer.patch, -1)
        maps = maps[..., len(maps) :].unflatten(-1, grid).numpy()  # (1+R, 1+H, h, w)
        across = min(maps.shape[1], 9)  # maps in a row; further heads begin another
        shown = zoom(to_rgb(seen.image), min((WIDTH - 100) // (across + 1) - GAP, 320))
        for token, shares in enumerate(maps):
            cells = [Cell(Image.fromarray(heat(m, 0, m.max())).resize(shown.size, Image.Resampling.NEAREST),
                          f"head {i - 1}" if i else "mean", f"max {100 * m.max():.2g} %") for i, m in enumerate(shares)]
            for start in range(0, len(cells), across):
                first = token == start == 0
                rows.append([Cell(shown, Path(seen.path).name) if first else Cell(), *cells[start : start + across]])
                labels.append("" if start else f"register {token}" if token else "CLS")
    save(sheet(rows, labels), out)


def patch_at(seen: Seen, x: int, y: int, patch: int) -> tuple[float, float, int, int]:
    """Where the middle of pixel (x, y) of the file is in what the network sees, and row and column of the patch there.
    Raises ValueError if there is no such pixel, or it was cut away."""
    (height, width), fit = seen.size, seen.fit
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(f"--at {x},{y} lies outside {seen.path}, which is {width} pixels wide and {height} high")
    across, down = fit.left + (x + 0.5) * fit.scaled[1] / width, fit.top + (y + 0.5) * fit.scaled[0] / height
    if not (0 <= across < fit.canvas[1] and 0 <= down < fit.canvas[0]):
        raise ValueError(f"--at {x},{y} was cut away from {seen.path}; choose --fit pad or --fit resize")
    return across, down, int(down // patch), int(across // patch)


def similarity(args: argparse.Namespace) -> None:
    out, viewer, every, maps = check_out(args.out, args.images), Viewer(args), [], []
    for seen in each(viewer.see, args.images):
        features = F.normalize(viewer.patches(seen).float(), dim=-1)  # (h, w, D)
        if not every:
            x, y, row, column = patch_at(seen, *args.at, viewer.patch)
            wanted = features[row, column]
        every.append(seen)
        maps.append((features @ wanted).numpy())
    low = min(m.min() for m in maps)
    footer = heat_bar(low, 1, "  cosine similarity to the patch in the ring")
    save(pair_sheet(every, [heat(m, low, 1) for m in maps], footer, (x, y)), out)


# ----------------------------------------------------------------------------------------------------------------------
# depth, segment


def save_depth(path: Path, depth: np.ndarray, farthest: float = 0.0) -> None:
    """Meters (H, W) as a PNG of 16 bits; 0 stays 0, which is unknown. In millimeters; or where `farthest` is beyond
    their 65.535 m, in 256ths of a meter, as KITTI has them."""
    scale = 1000 if farthest * 1000 < 65536 else 256
    numbers = np.where(depth > 0, (depth * scale).round().clip(1, 65535), 0)
    save(Image.fromarray(numbers.astype(np.uint16)), path)


def save_labels(path: Path, labels: np.ndarray, colors: list[tuple[int, int, int]]) -> None:
    """Classes (H, W) as a PNG with a palette: its indices are the classes. Raises ValueError if they are too many."""
    if len(colors) > 256:
        raise ValueError(f"a PNG with a palette holds 256 classes, not {len(colors)}; let --out be a .png file")
    picture = Image.fromarray(labels.astype(np.uint8))
    picture.putpalette(class_table(colors).tobytes())
    save(picture, path)


def load_dense(args: argparse.Namespace, task: str, depth_range=None) -> tuple:
    """(network, hub.About, dict): what --model and --head name, what it is for, and what images it expects. Raises
    ValueError if its task is another, of "depth" and "seg"."""
    device, (_, ckpt) = pick_device(args.device), hub.read(args.model)
    if not args.head and not hub.is_mask2former(ckpt):
        raise ValueError(f"{args.model} is a backbone; name its head by --head, a file or, of a released backbone, "
                         f"{'nyu_dpt or kitti_dpt' if task == 'depth' else 'ade20k_ms or voc2012_ms'}")
    network, about = hub.load_dense(args.model, args.head or None, depth_range, ckpt)
    if about.task != task:
        other = ("segmentation", "segment") if task == "depth" else ("depth", "depth")
        raise ValueError(f"{args.head or args.model} is a head of {other[0]}; draw with it by the command {other[1]}")
    return network.to(device), about, hub.image_rules(network.backbone if args.head else network, ckpt)


class Album:
    """Where predictions for the images of a command go, as they come: on one sheet; or into a folder, where each has
    files of its own, and the sheet shows 24 at most. `kind` ends the names of the predictions themselves."""

    def __init__(self, args: argparse.Namespace, kind: str, most_in_a_row: int):
        self.into, self.images, self.cells = wants_folder(args.out), args.images, []
        self.out, paths = check_out(args.out, args.images, self.into), image_paths(args.images)
        self.names = dict(zip(paths, file_names(paths, kind)))
        self.shown = {paths[i] for i in spread(len(paths), 24 if self.into else MOST)}
        self.in_a_row = in_a_row(len(self.shown), most_in_a_row)

    def each(self, channels: int):
        """(path, image (C, H, W)) of each, uint8 or uint16."""
        return each(lambda path: (path, read_image(path, channels)), self.images, sys.maxsize if self.into else MOST)

    def file(self, path: str, kind: str = "") -> Path:
        return self.out / f"{self.names[path]}{kind}.png"

    def finish(self, cells_each: int) -> None:
        picture = sheet(rows_of(self.cells, cells_each * self.in_a_row))
        save(picture, self.out / "sheet.png" if self.into else self.out)


@torch.inference_mode()
def depth_of(network, image: Tensor, rules: dict, size: int = 0, flip: bool = False, device="cpu") -> np.ndarray:
    """Meters (H, W) of an image (C, H, W), uint8 or uint16, on the CPU; predicted by `network`, such as
    heads.Dense, on `device`, at the short side `size`, unless that is 0."""
    fit = plan_fit(*image.shape[-2:], 1, size=(size,) if size else ())  # the network itself pads to patches
    x = fit_image(image, fit, rules["mean"])[None].to(device)
    x = heads.estimate_depth(network, normalize(to_float(x), rules["mean"], rules["std"]), flip)
    return heads.resize(x, image.shape[-2:])[0, 0].cpu().numpy()


def depth(args: argparse.Namespace) -> None:
    ends = [v for v in (args.near, args.far) if v is not None]
    if args.size < 0 or not all(0 <= v < math.inf for v in ends) or ends != sorted({*ends}):
        raise ValueError("--size is a side in pixels, or 0; --near and --far are meters, --far the more")
    album = Album(args, "_depth", 4)
    network, _, rules = load_dense(args, "depth", args.depth_range)
    device = next(network.parameters()).device
    side = min(WIDTH // (2 * album.in_a_row) - GAP, 480)
    for path, image in album.each(rules["in_chans"]):
        meters = depth_of(network, image, rules, args.size, bool(args.flip), device)
        hub.check_finite(torch.from_numpy(meters), f"{args.model} with {args.head}")
        near = meters.min().item() if args.near is None else args.near
        far = max(meters.max().item() if args.far is None else args.far, near)
        drawn = Image.fromarray(depth_colors(meters, near, far))
        if album.into:
            save(drawn, album.file(path))
            save_depth(album.file(path, "_depth"), meters, network.decode_head.depth_range[1])
        if path in album.shown:
            shown = zoom(drawn, side)
            album.cells += [Cell(zoom(to_rgb(image), side), Path(path).name),
                            Cell(under(shown, depth_bar(near, far, shown.width)))]
    album.finish(2)


def under(image: Image.Image, note: Image.Image) -> Image.Image:
    picture = Image.new("RGB", (max(image.width, note.width), image.height + 6 + note.height), "white")
    picture.paste(image)
    picture.paste(note, (0, image.height + 6))
    return picture


def segment(args: argparse.Namespace) -> None:
    if args.size < 0 or not 0 <= args.opacity <= 1:
        raise ValueError("--size is a side in pixels, or 0; --opacity lies between 0 and 1")
    album = Album(args, "_labels", 2)
    network, about, rules = load_dense(args, "seg")
    recipe, device = about.recipe, next(network.parameters()).device
    n_scales = len(recipe.ratios) if args.scales is None else args.scales
    if not 1 <= n_scales <= len(recipe.ratios):
        raise ValueError(f"--scales {n_scales} is none of 1 to {len(recipe.ratios)}, which the recipe of this head has")
    recipe = recipe._replace(short=args.size or recipe.short, ratios=recipe.ratios[:n_scales],
                             flip=recipe.flip if args.flip is None else args.flip)
    side = min((WIDTH // album.in_a_row - LEGEND) // 2 - 2 * GAP, 480)
    for path, image in album.each(rules["in_chans"]):
        chances = heads.segment(network, image.to(device), recipe, rules["mean"], rules["std"])  # (classes, H, W)
        hub.check_finite(chances, f"{args.model} with {args.head}")
        labels, photo = chances.argmax(0).cpu().numpy(), to_rgb(image)
        drawn = Image.blend(photo, Image.fromarray(label_colors(labels, about.colors)), args.opacity)
        if album.into:
            save(drawn, album.file(path))
            save_labels(album.file(path, "_labels"), labels, about.colors)
        if path in album.shown:
            photo, drawn = zoom(photo, side), zoom(drawn, side)
            key = legend(labels, about.classes, about.colors, max(photo.height // LINE - 1, 6))
            album.cells += [Cell(photo, Path(path).name), Cell(drawn), Cell(key)]
    album.finish(3)


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


def draw_queries(source: Source, n: int, seed: int) -> tuple[Queries, Tensor]:
    """n random images of a source that can be read, and their numbers (n,). Raises ValueError if there is none."""
    images, rows = [], []
    for i in torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).tolist():
        try:
            images.append(source.image(i))
        except Exception:  # decoders raise all sorts on damaged files
            continue
        rows.append(i)
        if len(rows) == n:
            break
    if not rows:
        raise ValueError(f"no image of {source.name} can be read")
    labels = None if source.labels is None else np.asarray(source.labels)[rows]
    return Queries(images, [source.describe(i) for i in rows], labels, source.classes), torch.tensor(rows)


def nearest_images(bank: Tensor, ok: Tensor, queries: Tensor, k: int, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cosines (Q, k) and rows (Q, k) of the k rows of `bank` (n, D) most similar to queries (Q, D), in order. Left out
    are rows that are not `ok` (n,), and for each query its row `own` (Q,). Fewer than k, if there are no more."""
    with full_float32():
        cosines = normalize_rows_(queries) @ normalize_rows_(bank).T  # (Q, n)
    cosines[:, ~ok] = -torch.inf
    if own is not None:
        cosines.scatter_(1, own[:, None].to(bank.device), -torch.inf)
    k = min(k, int(ok.sum()) - (own is not None))
    if k < 1:
        raise ValueError("a single image has no neighbor; give more as --data")
    return nearest_rows(cosines, k)


def neighbors(args: argparse.Namespace) -> None:
    out, device = check_out(args.out, args.images), pick_device(args.device)
    paths = image_paths(args.images)
    if not 1 <= args.k <= 24 or not 1 <= (len(paths) or args.queries) <= MOST or args.num_workers < -1:
        raise ValueError(f"--k must be 1 to 24, --queries or the images 1 to {MOST}, --num-workers -1 or more")
    model, config = load(args.model, device)
    if not (args.data or config["data"]):
        raise ValueError(f"{args.model} does not say which images to search; give --data")
    stated = (config[key] for key in ("data", "eval_train", "eval_val"))
    train, val = eval_specs(*((args.data, args.data) if args.data else map(without_code, stated)))
    source = open_source(train, config["in_chans"])
    if out.exists() and out.resolve() in (Path(source.describe(i)).resolve() for i in range(len(source))):
        raise ValueError(f"--out {args.out} would overwrite an image of {train}; name another")
    own = None
    if paths:
        queries = Queries([read_image(p, config["in_chans"]) for p in paths], [Path(p).name for p in paths])
    else:
        other = open_source(val, config["in_chans"]) if val else source
        queries, rows = draw_queries(other, args.queries, args.seed)
        own = None if val else rows
    features = functools.partial(extract_features, model, resize=config["eval_resize"], crop=config["eval_crop"],
                                 device=device, mean=config["mean"], std=config["std"])
    bank, ok = features(source, num_workers=worker_count(args.num_workers))
    cosines, rows = nearest_images(bank, ok, features(queries)[0], args.k, own)
    save(neighbor_sheet(source, queries, cosines.tolist(), rows.tolist()), out)


def neighbor_sheet(source: Source, queries: Queries, cosines: list, rows: list) -> Image.Image:
    """A row per query: itself, then its neighbors; framed by whether they are of its class, where that is known."""
    side = min(WIDTH // (len(rows[0]) + 1) - GAP, 160)
    labels, answers = source.labels, None
    if labels is not None and queries.labels is not None:
        labels, answers = common_labels(source, queries)
    say = lambda label: str(source.classes[label] if source.classes else label) if label >= 0 else ""  # noqa: E731
    table = []
    for q, (values, columns) in enumerate(zip(cosines, rows)):
        answer = -1 if answers is None else int(answers[q])
        shown = say(answer) if answers is not None else ""
        table.append([Cell(zoom(to_rgb(queries.image(q)), side), "query", shown or Path(queries.describe(q)).name)])
        for cosine, i in zip(values, columns):
            label = -1 if labels is None else int(labels[i])
            frame = (GOOD if label == answer else BAD) if min(label, answer) >= 0 else ""
            table[-1].append(Cell(zoom(to_rgb(source.image(i)), side), f"{cosine:.3f}", say(label), frame))
    return sheet(table)


# ----------------------------------------------------------------------------------------------------------------------
# curves


PARTS = ("dino_local", "dino_global", "ibot", "koleo")  # of the loss


def read_run(name: str) -> dict[str, list[tuple[int, float]]]:
    """(step, value) in order of the losses in a run's metrics.jsonl, of "knn" and of "knn_raw_pixels" (top-1 at k = 20,
    in percent). A last line that is not whole is left out. Raises ValueError if there is no such file, or nothing in
    it."""
    path = Path(name, "metrics.jsonl") if os.path.isdir(name) else Path(name)
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"{path} cannot be read; name the --out folder of a run, or its metrics.jsonl") from None
    curves = {}
    for i, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, KeyError, TypeError):
            if i == len(lines):  # it is being written
                break
            raise ValueError(f"{path}, line {i} is no record of a training") from None
        for key in ("loss", *PARTS):
            if key in record:
                curves.setdefault(key, {})[step] = record[key]
        for key in ("knn", "knn_raw_pixels"):
            if "top1_k20" in (record.get(key) or {}):
                curves.setdefault(key, {})[step] = record[key]["top1_k20"]
    # train.py writes null for a number that is not finite
    curves = {key: sorted((s, v) for s, v in curve.items() if v is not None and math.isfinite(v))
              for key, curve in curves.items()}
    if not any(curves.values()):
        raise ValueError(f"{path} holds no finite number yet; try again when the run has logged one")
    return curves


def panels_of(runs: dict[str, dict]) -> dict[str, list[Line]]:
    """Title -> lines. Of one run all parts of the loss, of several the sums; k-NN if there is any."""
    losses, accuracies = [], []
    for color, (name, curves) in zip(COLORS, runs.items()):
        shown = {name: curves.get("loss")} if len(runs) > 1 else {"total": curves.get("loss")} | {
            part: curves.get(part) for part in PARTS}
        losses += [Line(key, v, c) for key, v, c in zip(shown, shown.values(), [color, *COLORS[1:]]) if v]
        if knn := curves.get("knn"):
            accuracies.append(Line(name, knn, color))
        if raw := curves.get("knn_raw_pixels"):
            last = max(v[-1][0] for v in curves.values() if v)
            accuracies.append(Line(f"{name}, raw pixels", [(0, raw[0][1]), (last, raw[0][1])], color, True))
    return {title: lines for title, lines in (("loss", losses), ("k-NN accuracy, %", accuracies)) if lines}


def draw_curves(runs: dict[str, dict]) -> Image.Image:
    panels = panels_of(runs)
    legend = max(len(wrap_legend(lines)) for lines in panels.values())
    last = max(line.points[-1][0] for lines in panels.values() for line in lines)
    size = (PANEL[0] * len(panels), PANEL[1] + 22 * legend)
    picture = Image.new("RGB", tuple(FINE * n for n in size), "white")
    for i, (title, lines) in enumerate(panels.items()):
        draw_panel(ImageDraw.Draw(picture), i * PANEL[0], title, lines, last, legend)
    return picture.resize(size, Image.Resampling.LANCZOS)


def curves(args: argparse.Namespace) -> None:
    out = check_out(args.out, [])
    if len(args.runs) > len(COLORS):
        raise ValueError(f"{len(args.runs)} runs are too many for one picture; name {len(COLORS)} at most")
    folders = [Path(r if os.path.isdir(r) else Path(r).parent).resolve() for r in args.runs]
    names = [f.name if [g.name for g in folders].count(f.name) == 1 else r for f, r in zip(folders, args.runs)]
    if twice := [r for r, n in zip(args.runs, names) if names.count(n) > 1]:
        raise ValueError(f"{twice[0]} is named twice")
    save(draw_curves({name: read_run(run) for name, run in zip(names, args.runs)}), out)


# ----------------------------------------------------------------------------------------------------------------------


COMMANDS = dict(pca=pca, attention=attention, similarity=similarity, depth=depth, segment=segment,
                neighbors=neighbors, curves=curves)


def pixel(text: str) -> tuple[int, int]:
    x, y = text.split(",")
    return int(x), int(y)


def add_dense_flags(add, command: str) -> None:
    add("--head", default="", help="a file, or the name of a released head such as nyu_dpt or ade20k_ms; needed, but "
        "for dinov2_vitg14_m2f")
    add("--flip", action=argparse.BooleanOptionalAction, help="average with what the mirrored image gives; default: "
        "for segment as the recipe of the head says, for depth no")
    add("--size", type=int, default=0, help="short side in pixels that images are brought to; default: 0, for segment "
        "as the recipe of the head says, for depth as they are")
    if command == "depth":
        add("--depth-range", type=float, nargs=2, metavar=("MIN", "MAX"), help="in meters, of the depths that the head "
            "was trained for; default: as it says")
        add("--near", type=float, help="meters that are lightest, in all images; default: the nearest of each")
        add("--far", type=float, help="meters that are black, in all images; default: the farthest of each")
    else:
        add("--scales", type=int, help="how many of the sizes of the head's recipe; default: all. Those of ade20k_ms "
            "and voc2012_ms are 5, up to 3 times the short side; the first 3 take a quarter of the time")
        add("--opacity", type=float, default=0.6, help="of the colors over the image, 0 to 1")


def parse(argv: list[str] | None) -> argparse.Namespace:
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv[0] if argv else "--help"
    if command in ("-h", "--help"):
        Parser(__doc__, "python visualize.py COMMAND ...").parse_args(["--help"])
    if command not in COMMANDS:
        raise ValueError(f"unknown command {command!r}{nearest(command, COMMANDS)}; there are {', '.join(COMMANDS)}")
    parser = Parser(__doc__)
    parser.prog = f"python visualize.py {command}"
    add = parser.add_argument
    if command == "curves":
        add("runs", nargs="+", metavar="RUN", help="the --out folder of a run, or its metrics.jsonl")
    else:
        add("images", nargs="*" if command == "neighbors" else "+", metavar="IMG", help="a file, or a folder")
        add("--model", required=True, help="a checkpoint, or the name of a released model such as dinov2_vits14")
        parser.add_machine_flags("device")
    if command in ("pca", "attention", "similarity"):
        add("--size", type=int, nargs="+", help="short side, or height and width, in pixels; 0: as the image is; "
            "default: the short side that the weights were trained at")
        add("--fit", choices=("crop", "pad", "resize"), default="crop", help="how it comes to multiples of the patch")
    if command in ("depth", "segment"):
        add_dense_flags(add, command)
    if command == "pca":
        add("--foreground", choices=("auto", "high", "low", "all"), default="auto", help="which side of the threshold; "
            "auto: the one that touches the borders less; all: there is no background")
        add("--threshold", type=float, help="of the first component, scaled to 0..1; default: Otsu's")
    if command == "attention":
        add("--block", type=int, default=-1, help="of the network; -1: the last")
    if command == "similarity":
        add("--at", type=pixel, required=True, metavar="X,Y", help="a pixel of the first image, 0,0 at its top left")
    if command == "neighbors":
        add("--data", default="", help="the images to search, named as train.py's --data; empty: those of the training")
        add("--k", type=int, default=8, help="neighbors of each")
        add("--queries", type=int, default=8, help="without IMG: how many images to draw")
        add("--seed", type=int, default=0, help="without IMG: which")
        parser.add_machine_flags("num-workers")
    add("--out", default=f"visualize-{command}.png", help="the picture" + (
        "; a folder: a picture of each image, and sheet.png" if command in ("pca", "depth", "segment") else ""))
    args = parser.parse_args(argv[1:])
    args.command = command
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    COMMANDS[args.command](args)
    print(args.out)


if __name__ == "__main__":
    run(main)
