"""Drawing with Pillow: sheets of images, color maps, curves, and PNG files of predictions. Knows nothing of networks.
Sizes are in pixels. Apache License 2.0."""
import functools
import itertools
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from support.files import write_file

SHEET_WIDTH, GAP, LINE_HEIGHT, FONT_SIZE = 1560, 12, 23, 14  # width to aim for, space between images, a line of text
LEGEND_WIDTH = 270
MAX_IMAGES = 96  # on one sheet

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")  # safe for the
# color-blind (Okabe and Ito 2008)
INFERNO = np.array([[0, 0, 4], [33, 12, 74], [87, 16, 110], [138, 34, 106], [188, 55, 84], [228, 90, 49],
                    [249, 142, 9], [249, 203, 53], [252, 255, 164]])  # matplotlib's, sampled; brightness rises evenly
MAGMA_REVERSED = np.frombuffer(bytes.fromhex(  # 17 samples: interpolation is within two gray levels of the original
    "fcfdbffde0a1fec387fea570fc8760f5695be75063d04070b6367a9c2e80822682691c8151117d350f6c1c1246090821000004"),
    np.uint8).reshape(-1, 3)


# ----------------------------------------------------------------------------------------------------------------------
# Sheets


class Tile(NamedTuple):
    """An image on a sheet, with a line of text above and below, and the color of its frame ("": no frame)."""
    image: Image.Image | None = None
    above: str = ""
    below: str = ""
    frame: str = ""


@functools.cache
def font(size: int = FONT_SIZE) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def shorten(text: str, width: float) -> str:
    """Drops the beginning of a text that is too wide: file names differ at the end."""
    shorter = (text, *("…" + text[i:] for i in range(1, len(text) + 1)))
    return next((s for s in shorter if font().getlength(s) <= width), "")


def sheet(rows: list[list[Tile]], labels: list[str] = (), footer: Image.Image | None = None) -> Image.Image:
    """Tiles in rows and columns on white, with `labels` to the left of the rows and `footer` below."""
    columns = list(itertools.zip_longest(*rows, fillvalue=Tile()))
    widths = [max(tile.image.width if tile.image else 0 for tile in column) for column in columns]
    left = GAP + max((math.ceil(font().getlength(s)) + GAP for s in labels), default=0)
    lefts = [left + sum(widths[:i]) + GAP * i for i in range(len(widths) + 1)]
    heights = [max(tile.image.height if tile.image else 0 for tile in row) for row in rows]
    above, below = ([LINE_HEIGHT * any(tile[i] for tile in row) for row in rows] for i in (1, 2))
    tops = [GAP, *(GAP + y for y in itertools.accumulate(GAP + a + h + b for a, h, b in zip(above, heights, below)))]
    size = (lefts[-1], tops[-1] + (footer.height + GAP if footer else 0))
    picture = Image.new("RGB", (max(size[0], footer.width + 2 * GAP if footer else 0), size[1]), "white")
    draw = ImageDraw.Draw(picture)
    for i, row in enumerate(rows):
        y = tops[i] + above[i]
        if labels:
            draw.text((GAP, y + heights[i] / 2), labels[i], "black", font(), anchor="lm")
        for x, width, tile in zip(lefts, widths, row):
            draw.text((x, y - 7), shorten(tile.above, width), "black", font(), anchor="ls")
            if tile.image:
                picture.paste(tile.image, (x, y))
                text_y = y + tile.image.height + LINE_HEIGHT - 4
                draw.text((x, text_y), shorten(tile.below, width), "black", font(), anchor="ls")
            if tile.image and tile.frame:
                box = (x - 4, y - 4, x + tile.image.width + 3, y + tile.image.height + 3)
                draw.rectangle(box, outline=tile.frame, width=4)
    if footer:
        picture.paste(footer, (left, tops[-1]))
    return picture


def to_rgb(image: Tensor) -> Image.Image:
    """An image (C, h, w), uint8 or uint16, for display. Unless C is 3, the first channel is shown in gray."""
    shown = image if len(image) == 3 else image[:1].expand(3, -1, -1)
    scale = 257 if shown.dtype == torch.uint16 else 1
    return Image.fromarray((shown.float() / scale).round().byte().permute(1, 2, 0).numpy())


def zoom(image: Image.Image, side: int) -> Image.Image:
    """Scales to fit a square of `side`; small images by a whole number, at most 16, so that pixels stay visible."""
    factor = min(side // max(image.size), 16)
    if factor >= 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    size = [max(round(n * side / max(image.size)), 1) for n in image.size]
    return image.resize(size, Image.Resampling.LANCZOS)


def evenly_spaced(n_all: int, n: int) -> list[int]:
    """n of the indices 0 to n_all - 1, evenly spaced, including the first and the last; all of them if n >= n_all."""
    return list(range(n_all)) if n_all <= n else [round(i * (n_all - 1) / (n - 1)) for i in range(n)]


def images_per_row(n: int, at_most: int = 4) -> int:
    """How many of n images, each with what belongs to it, go in one row of a sheet."""
    return min(1 + (n - 1) // 4, at_most)


def in_rows(tiles: list[Tile], n: int) -> list[list[Tile]]:
    return [tiles[i : i + n] for i in range(0, len(tiles), n)]


def mark_point(image: Image.Image, x: float, y: float, radius: int = 8) -> Image.Image:
    """A copy with a white ring, edged in black, around (x, y)."""
    large = image.resize((image.width * 4, image.height * 4), Image.Resampling.NEAREST)  # supersampled: smooth edges
    draw = ImageDraw.Draw(large)
    for outer, width, color in ((radius + 1.5, 5, "black"), (radius, 2, "white")):
        box = [4 * (v + sign * outer) for sign in (-1, 1) for v in (x, y)]
        draw.ellipse(box, outline=color, width=4 * width)
    return large.resize(image.size, Image.Resampling.BOX)


def stack(image: Image.Image, below: Image.Image) -> Image.Image:
    picture = Image.new("RGB", (max(image.width, below.width), image.height + 6 + below.height), "white")
    picture.paste(image)
    picture.paste(below, (0, image.height + 6))
    return picture


# ----------------------------------------------------------------------------------------------------------------------
# Files


def save_png(picture: Image.Image, path: Path) -> None:
    write_file(path, lambda file: picture.save(file, "PNG"))


def save_depth(path: Path, depth: np.ndarray, max_depth: float = 0.0) -> None:
    """Writes meters (H, W) as a 16-bit PNG in millimeters; if `max_depth` exceeds the 65.535 m that fit, in 1/256 m, as
    KITTI does. 0 stays 0 and means unknown."""
    scale = 1000 if max_depth * 1000 < 65536 else 256
    numbers = np.where(depth > 0, (depth * scale).round().clip(1, 65535), 0)
    save_png(Image.fromarray(numbers.astype(np.uint16)), path)


def save_labels(path: Path, labels: np.ndarray, colors: list[tuple[int, int, int]]) -> None:
    """Writes classes (H, W) as a palette PNG whose indices are the classes. Raises ValueError for more than 256."""
    if len(colors) > 256:
        raise ValueError(f"a palette PNG holds 256 classes, not {len(colors)}; use a .png file as --out")
    picture = Image.fromarray(labels.astype(np.uint8))
    picture.putpalette(class_table(colors).tobytes())
    save_png(picture, path)


def picture_names(paths: list[str], suffix: str = "") -> list[str]:
    """A distinct file name, without extension, for the picture of each image: its own; if two are the same, prefixed by
    its folders, or by a number. Names stay distinct when `suffix`, as "_depth", is appended; none is "sheet"."""
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    longer = [os.path.relpath(path, root).replace(os.sep, "_") for path in paths]
    for names in ([Path(path).stem for path in paths], [Path(name).stem for name in longer]):
        endings = {"", suffix}
        if len({"sheet", *(name + ending for name in names for ending in endings)}) > len(names) * len(endings):
            return names
    return [f"{i:06d}_{Path(path).stem}" for i, path in enumerate(paths)]


# ----------------------------------------------------------------------------------------------------------------------
# Color maps


def heat_colors(values: np.ndarray, low: float, high: float, table: np.ndarray = INFERNO) -> np.ndarray:
    """(h, w) -> colors (h, w, 3) uint8, from the first entry of the table at `low` to its last at `high`."""
    x = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    places = np.linspace(0, 1, len(table))
    return np.stack([np.interp(x, places, channel) for channel in table.T], -1).round().astype(np.uint8)


def color_bar(low: float, high: float, unit: str, length: int = 240, table: np.ndarray = INFERNO) -> Image.Image:
    """The colors of heat_colors() between the two values; without the text, `length` pixels long."""
    bar = Image.fromarray(heat_colors(np.linspace(low, high, length)[None].repeat(14, 0), low, high, table))
    texts = [f"{low:.2f}", f"{high:.2f} {unit}"]
    starts = [0, math.ceil(font().getlength(texts[0])) + 8]
    picture = Image.new("RGB", (starts[1] + length + 8 + math.ceil(font().getlength(texts[1])), 20), "white")
    picture.paste(bar, (starts[1], 3))
    draw = ImageDraw.Draw(picture)
    for x, text in zip((0, starts[1] + length + 8), texts):
        draw.text((x, 15), text, "black", font(), anchor="ls")
    return picture


def depth_colors(depth: np.ndarray, near: float, far: float) -> np.ndarray:
    """Meters (H, W) -> colors (H, W, 3) uint8: light at `near`, black at `far`, gray at 0, which means unknown."""
    drawn = heat_colors(depth, near, far, MAGMA_REVERSED)
    drawn[depth == 0] = 128
    return drawn


def depth_bar(near: float, far: float, width: int) -> Image.Image:
    """The color bar of depth_colors(), in meters, `width` pixels wide, or more if the text needs it."""
    text_width = color_bar(near, far, "m", 0).width
    return color_bar(near, far, "m", max(width - text_width, 24), MAGMA_REVERSED)


def class_table(colors: list[tuple[int, int, int]]) -> np.ndarray:
    """The colors of the classes, padded with white to 256 rows, (>= 256, 3) uint8: pixels without a class are 255."""
    return np.array([*colors, *[(255, 255, 255)] * (256 - len(colors))], np.uint8)


def label_colors(labels: np.ndarray, colors: list[tuple[int, int, int]]) -> np.ndarray:
    """Classes (H, W) -> colors (H, W, 3) uint8."""
    return class_table(colors)[labels]


def legend(labels: np.ndarray, names: list[str], colors: list[tuple[int, int, int]], at_most: int = 24) -> Image.Image:
    """The classes that occur in `labels`, most frequent first, with their share of the labeled pixels; after `at_most`
    of them, how many more there are."""
    counts = np.bincount(labels.ravel(), minlength=len(names))[: len(names)]
    shares = 100 * counts / max(counts.sum(), 1)
    order = [k for k in np.argsort(-counts, kind="stable").tolist() if counts[k]]
    texts = [(f"{shares[k]:.1f} %", shorten(names[k], LEGEND_WIDTH - 90), colors[k]) for k in order[:at_most]]
    if rest := order[at_most:]:
        texts.append((f"{shares[rest].sum():.1f} %", f"and {len(rest)} more", None))
    picture = Image.new("RGB", (LEGEND_WIDTH, LINE_HEIGHT * max(len(texts), 1)), "white")
    draw = ImageDraw.Draw(picture)
    for row, (share, name, color) in enumerate(texts):
        y = LINE_HEIGHT * row
        if color:
            draw.rectangle((0, y + 2, 17, y + 19), tuple(color), "#808080")
        draw.text((76, y + 16), share, "black", font(), anchor="rs")
        draw.text((86, y + 16), name, "black", font(), anchor="ls")
    return picture


# ----------------------------------------------------------------------------------------------------------------------
# Curves


class Curve(NamedTuple):
    name: str
    points: list[tuple[float, float]]  # (step, value)
    color: str
    dashed: bool = False  # for a constant


PANEL, LEFT, RIGHT, TOP, BOTTOM = (760, 520), 74, 36, 44, 58  # size of a panel and its margins
PLOT_WIDTH = PANEL[0] - LEFT - RIGHT
SUPERSAMPLE = 3  # drawn three times as large and reduced: smooth edges


def draw_curves(panels: dict[str, list[Curve]]) -> Image.Image:
    """Panels side by side, one per title, over the same range of steps; legends above."""
    n_rows = max(len(wrap_legend(curves)) for curves in panels.values())
    last = max(curve.points[-1][0] for curves in panels.values() for curve in curves)
    size = (PANEL[0] * len(panels), PANEL[1] + 22 * n_rows)
    picture = Image.new("RGB", tuple(SUPERSAMPLE * n for n in size), "white")
    for i, (title, curves) in enumerate(panels.items()):
        draw_panel(ImageDraw.Draw(picture), i * PANEL[0], title, curves, max(last, 1), n_rows)
    return picture.resize(size, Image.Resampling.LANCZOS)


def draw_panel(draw: ImageDraw.ImageDraw, left: int, title: str, curves: list[Curve], last: int, n_rows: int) -> None:
    """One panel, `left` pixels from the left, for steps 0 to `last`, with room for `n_rows` rows of the legend."""
    s, top, text, small = SUPERSAMPLE, TOP + 22 * n_rows, font(15 * SUPERSAMPLE), font(14 * SUPERSAMPLE)
    box = (left + LEFT, top, left + PANEL[0] - RIGHT, top + PANEL[1] - TOP - BOTTOM)
    x0, y0, x1, y1 = (s * v for v in box)
    low, high = value_range(curves)
    place = lambda step, value: (x0 + step / last * (x1 - x0),  # noqa: E731
                                 y1 - (value - low) / (high - low) * (y1 - y0))
    draw.text((x0, s * 12), title, "black", text)
    for row, entries in enumerate(wrap_legend(curves)):
        for x, curve in entries:
            x, y = x0 + s * x, s * (TOP + 22 * row + 6)
            stroke(draw, [(x, y), (x + s * 26, y)], curve)
            draw.text((x + s * 34, y), shorten(curve.name, PLOT_WIDTH - 34), "black", small, anchor="lm")
    for value in ticks(low, high, 6):
        y = place(0, value)[1]
        draw.line((x0, y, x1, y), "#DDDDDD", s)
        draw.text((x0 - 8 * s, y), f"{value:,g}", "black", small, anchor="rm")
    for step in ticks(0, last, 6):
        x = place(step, 0)[0]
        draw.line((x, y0, x, y1), "#DDDDDD", s)
        draw.text((x, y1 + 8 * s), f"{step:,g}", "black", small, anchor="mt")
    for curve in curves:
        points = [place(*p) for p in curve.points]
        stroke(draw, points, curve)
        if not curve.dashed and points[-1][0] - points[0][0] >= 15 * s * (len(points) - 1):  # few points: mark each
            for x, y in points:
                draw.ellipse((x - 3 * s, y - 3 * s, x + 3 * s, y + 3 * s), curve.color)
    draw.line((x0, y0, x0, y1, x1, y1), "black", s)
    draw.text(((x0 + x1) / 2, y1 + 32 * s), "step", "black", text, anchor="mt")


def value_range(curves: list[Curve]) -> tuple[float, float]:
    """The smallest and the largest value, and 5 % on either side."""
    values = [value for curve in curves for _, value in curve.points]
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1
    return low - margin, high + margin


def ticks(low: float, high: float, n: int = 5) -> list[float]:
    """About n round numbers from low to high, 1, 2 or 5 times a power of ten apart."""
    step = 10 ** math.floor(math.log10((high - low) / n))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= n)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def stroke(draw: ImageDraw.ImageDraw, points: list[tuple[float, float]], curve: Curve) -> None:
    """A line through the points, or a level dashed one from the first to the last."""
    if not curve.dashed:
        return draw.line(points, curve.color, 2 * SUPERSAMPLE, "curve") if len(points) > 1 else None
    (x, y), end = points[0], points[-1][0]
    while x < end:
        draw.line((x, y, min(x + 6 * SUPERSAMPLE, end), y), curve.color, 2 * SUPERSAMPLE)
        x += 10 * SUPERSAMPLE


def wrap_legend(curves: list[Curve]) -> list[list[tuple[int, Curve]]]:
    """The curves in rows as wide as the plot, each with its distance from the left."""
    rows, x = [[]], 0
    for curve in curves:
        width = 34 + math.ceil(font().getlength(curve.name))
        if x and x + width > PLOT_WIDTH:
            rows, x = [*rows, []], 0
        rows[-1].append((x, curve))
        x += width + 22
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# A training batch


def draw_batch(batch, mean, std, n: int = 8) -> Image.Image:
    """The first n images of a prepared batch, as the networks see them, a row for each: its two global crops, with the
    masked patches darkened, then its local crops."""
    n_images, side = len(batch.samples), math.isqrt(batch.masks.shape[1])
    masks = batch.masks.cpu().unflatten(0, (-1, n_images)).unflatten(2, (side, side)).float()  # (2, B, h, w)
    mean, std = (torch.tensor(v)[:, None, None] for v in (mean, std))
    factor = max(1, 96 // batch.global_crops.shape[-1])
    rows = [[] for _ in range(min(n, n_images))]
    for crops, shade in ((batch.global_crops, masks), (batch.local_crops, None)):
        crops = crops.cpu().unflatten(0, (-1, n_images)) * std + mean  # (crops, B, C, H, W), 0 to 1
        if shade is not None:
            crops = crops * (1 - 0.8 * F.interpolate(shade, size=crops.shape[-2:])[:, :, None])
        for row, image in itertools.product(range(len(rows)), range(len(crops))):
            picture = to_rgb((crops[image, row].clamp(0, 1) * 255).byte())
            rows[row].append(Tile(zoom(picture, factor * picture.width)))
    return sheet(rows)
