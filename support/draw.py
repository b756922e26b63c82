"""Pictures of many images, color maps and curves, by Pillow alone. Apache License 2.0."""
import functools
import itertools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from support.run import write_file

WIDTH, GAP, LINE, TEXT = 1560, 12, 23, 14  # of sheets, in pixels: widest, between images, a line of text, its size
LEGEND = 270  # how wide one is

MOST = 96  # images on a sheet
GOOD, BAD = "#009E73", "#D55E00"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")  # of Okabe and Ito,
# 2008: the color-blind tell them apart as well
HEAT = np.array([[0, 0, 4], [33, 12, 74], [87, 16, 110], [138, 34, 106], [188, 55, 84], [228, 90, 49], [249, 142, 9],
                 [249, 203, 53], [252, 255, 164]])  # "inferno" at nine places: brightness rises evenly

NEAR_TO_FAR = np.frombuffer(bytes.fromhex(  # "magma", from its light end, at 17 places: within two gray levels
    "fcfdbffde0a1fec387fea570fc8760f5695be75063d04070b6367a9c2e80822682691c8151117d350f6c1c1246090821000004"),
    np.uint8).reshape(-1, 3)


# ----------------------------------------------------------------------------------------------------------------------
# Sheets


class Cell(NamedTuple):
    """An image of a sheet, the lines of text above and below it, and the color of a frame, "" for none."""
    image: Image.Image | None = None
    above: str = ""
    below: str = ""
    frame: str = ""


@functools.cache
def font(size: int = TEXT) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def shorten(text: str, width: float) -> str:
    """The text, its beginning left out if need be: names of files differ at the end."""
    shorter = (text, *("…" + text[i:] for i in range(1, len(text) + 1)))
    return next((s for s in shorter if font().getlength(s) <= width), "")


def sheet(rows: list[list[Cell]], labels: list[str] = (), footer: Image.Image | None = None) -> Image.Image:
    """Cells in rows and columns on white; `labels` stand left of the rows, `footer` below all."""
    columns = list(itertools.zip_longest(*rows, fillvalue=Cell()))
    widths = [max(cell.image.width if cell.image else 0 for cell in column) for column in columns]
    left = GAP + max((math.ceil(font().getlength(s)) + GAP for s in labels), default=0)
    lefts = [left + sum(widths[:i]) + GAP * i for i in range(len(widths) + 1)]
    heights = [max(cell.image.height if cell.image else 0 for cell in row) for row in rows]
    above, below = ([LINE * any(cell[i] for cell in row) for row in rows] for i in (1, 2))
    tops = [GAP, *(GAP + y for y in itertools.accumulate(GAP + a + h + b for a, h, b in zip(above, heights, below)))]
    size = (lefts[-1], tops[-1] + (footer.height + GAP if footer else 0))
    picture = Image.new("RGB", (max(size[0], footer.width + 2 * GAP if footer else 0), size[1]), "white")
    draw = ImageDraw.Draw(picture)
    for i, row in enumerate(rows):
        y = tops[i] + above[i]
        if labels:
            draw.text((GAP, y + heights[i] / 2), labels[i], "black", font(), anchor="lm")
        for x, width, cell in zip(lefts, widths, row):
            draw.text((x, y - 7), shorten(cell.above, width), "black", font(), anchor="ls")
            if cell.image:
                picture.paste(cell.image, (x, y))
                draw.text((x, y + cell.image.height + LINE - 4), shorten(cell.below, width), "black", font(),
                          anchor="ls")
                if cell.frame:
                    outside = (x - 4, y - 4, x + cell.image.width + 3, y + cell.image.height + 3)
                    draw.rectangle(outside, outline=cell.frame, width=4)
    if footer:
        picture.paste(footer, (left, tops[-1]))
    return picture


def to_rgb(image: Tensor) -> Image.Image:
    """An image (C, h, w), uint8 or uint16, as it can be shown; of other numbers of channels than three the first."""
    shown = image if len(image) == 3 else image[:1].expand(3, -1, -1)
    scale = 257 if shown.dtype == torch.uint16 else 1
    return Image.fromarray((shown.float() / scale).round().byte().permute(1, 2, 0).numpy())


def zoom(image: Image.Image, side: int) -> Image.Image:
    """Brought to fit a square of `side`: tiny images by a whole number, at most 16, so that their pixels are seen."""
    factor = min(side // max(image.size), 16)
    if factor >= 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    size = [max(round(n * side / max(image.size)), 1) for n in image.size]
    return image.resize(size, Image.Resampling.LANCZOS)


def spread(size: int, n: int) -> list[int]:
    """n of the numbers below `size`, evenly spread, from the first to the last; all, if they are no more."""
    return list(range(size)) if size <= n else [round(i * (size - 1) / (n - 1)) for i in range(n)]


def in_a_row(n: int, most: int = 4) -> int:
    """How many of n images, with what belongs to them, stand in a row."""
    return min(1 + (n - 1) // 4, most)


def rows_of(cells: list[Cell], n: int) -> list[list[Cell]]:
    return [cells[i : i + n] for i in range(0, len(cells), n)]


def mark(image: Image.Image, x: float, y: float, radius: int = 8) -> Image.Image:
    """A copy with a white ring, edged black, around (x, y)."""
    big = image.resize((image.width * 4, image.height * 4), Image.Resampling.NEAREST)  # 4 times, for soft edges
    draw = ImageDraw.Draw(big)
    for outer, width, color in ((radius + 1.5, 5, "black"), (radius, 2, "white")):
        box = [4 * (v + sign * outer) for sign in (-1, 1) for v in (x, y)]
        draw.ellipse(box, outline=color, width=4 * width)
    return big.resize(image.size, Image.Resampling.BOX)


def save(picture: Image.Image, path: Path) -> None:
    write_file(path, lambda file: picture.save(file, "PNG"))


# ----------------------------------------------------------------------------------------------------------------------
# Color maps


def heat(values: np.ndarray, low: float, high: float, table: np.ndarray = HEAT) -> np.ndarray:
    """(h, w) -> colors (h, w, 3) uint8, from the first of the table at `low` to its last at `high`: of HEAT, from
    black to light yellow."""
    x = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    places = np.linspace(0, 1, len(table))
    return np.stack([np.interp(x, places, channel) for channel in table.T], -1).round().astype(np.uint8)


def heat_bar(low: float, high: float, what: str, colors_of=heat, length: int = 240) -> Image.Image:
    """The colors of heat(), or of a function like it, with their values; the bar itself is `length` pixels long."""
    bar = Image.fromarray(colors_of(np.linspace(low, high, length)[None].repeat(14, 0), low, high))
    texts = [f"{low:.2f}", f"{high:.2f} {what}"]
    starts = [0, math.ceil(font().getlength(texts[0])) + 8]
    picture = Image.new("RGB", (starts[1] + length + 8 + math.ceil(font().getlength(texts[1])), 20), "white")
    picture.paste(bar, (starts[1], 3))
    draw = ImageDraw.Draw(picture)
    for x, text in zip((0, starts[1] + length + 8), texts):
        draw.text((x, 15), text, "black", font(), anchor="ls")
    return picture


def depth_colors(depth: np.ndarray, near: float, far: float) -> np.ndarray:
    """Meters (H, W) -> colors (H, W, 3) uint8, light at `near`, black at `far`; gray where it is 0, which is unknown.
    """
    drawn = heat(depth, near, far, NEAR_TO_FAR)
    drawn[depth == 0] = 128
    return drawn


def depth_bar(near: float, far: float, width: int) -> Image.Image:
    """The colors of depth_colors() with their meters, `width` pixels wide if that is enough for the text."""
    bar = functools.partial(heat_bar, near, far, "m", functools.partial(heat, table=NEAR_TO_FAR))
    return bar(max(width - bar(0).width, 24))


def class_table(colors: list[tuple[int, int, int]]) -> np.ndarray:
    """(256 or more, 3) uint8: the colors of the classes, and white for what is none, such as 255, to be ignored."""
    return np.array([*colors, *[(255, 255, 255)] * (256 - len(colors))], np.uint8)


def label_colors(labels: np.ndarray, colors: list[tuple[int, int, int]]) -> np.ndarray:
    """Classes (H, W) -> colors (H, W, 3) uint8."""
    return class_table(colors)[labels]


def legend(labels: np.ndarray, names: list[str], colors: list[tuple[int, int, int]], most: int = 24) -> Image.Image:
    """The classes in `labels` (H, W), by their share of the pixels, the largest first; `most` of them and how many
    more there are."""
    counts = np.bincount(labels.ravel(), minlength=len(names))[: len(names)]
    shares = 100 * counts / max(counts.sum(), 1)  # of what is not to be ignored
    order = [k for k in np.argsort(-counts, kind="stable").tolist() if counts[k]]
    texts = [(f"{shares[k]:.1f} %", shorten(names[k], LEGEND - 90), colors[k]) for k in order[:most]]
    if rest := order[most:]:
        texts.append((f"{shares[rest].sum():.1f} %", f"and {len(rest)} more", None))
    picture = Image.new("RGB", (LEGEND, LINE * max(len(texts), 1)), "white")
    draw = ImageDraw.Draw(picture)
    for row, (share, name, color) in enumerate(texts):
        y = LINE * row
        if color:
            draw.rectangle((0, y + 2, 17, y + 19), tuple(color), "#808080")
        draw.text((76, y + 16), share, "black", font(), anchor="rs")
        draw.text((86, y + 16), name, "black", font(), anchor="ls")
    return picture


# ----------------------------------------------------------------------------------------------------------------------
# Curves


class Line(NamedTuple):
    name: str
    points: list[tuple[float, float]]
    color: str
    dashed: bool = False


def ticks(low: float, high: float, n: int = 5) -> list[float]:
    """Round numbers from low to high, 1, 2 or 5 times a power of ten apart, n or a few less."""
    step = 10 ** math.floor(math.log10((high - low) / n))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= n)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


class Axes:
    """A rectangle (left, top, right, bottom) of a picture and what it shows: steps 0 to `last`, all values of `lines`.
    """

    def __init__(self, box: tuple[int, int, int, int], lines: list[Line], last: int):
        self.box, self.last, values = box, max(last, 1), [y for line in lines for _, y in line.points]
        low, high = min(values), max(values)
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1
        self.low, self.high = low - margin, high + margin

    def place(self, x: float, y: float) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + x / self.last * (right - left),
                bottom - (y - self.low) / (self.high - self.low) * (bottom - top))
PANEL, LEFT, RIGHT, TOP, BOTTOM = (760, 520), 74, 36, 44, 58  # a panel and its margins, in pixels of the picture
FINE = 3  # curves are drawn at three times their size and reduced, for soft edges

ACROSS = PANEL[0] - LEFT - RIGHT


def draw_panel(draw: ImageDraw.ImageDraw, left: int, title: str, lines: list[Line], last: int, legend: int) -> None:
    """One diagram, `left` pixels from the left, with room for `legend` lines of the legend above it."""
    s, top, text, small = FINE, TOP + 22 * legend, font(15 * FINE), font(14 * FINE)
    box = (left + LEFT, top, left + PANEL[0] - RIGHT, top + PANEL[1] - TOP - BOTTOM)
    x0, y0, x1, y1 = box = tuple(s * v for v in box)
    axes = Axes(box, lines, last)
    draw.text((x0, s * 12), title, "black", text)
    for row, entries in enumerate(wrap_legend(lines)):
        for x, line in entries:
            x, y = x0 + s * x, s * (TOP + 22 * row + 6)
            stroke(draw, [(x, y), (x + s * 26, y)], line.color, line.dashed)
            draw.text((x + s * 34, y), shorten(line.name, ACROSS - 34), "black", small, anchor="lm")
    for value in ticks(axes.low, axes.high, 6):
        y = axes.place(0, value)[1]
        draw.line((x0, y, x1, y), "#DDDDDD", s)
        draw.text((x0 - 8 * s, y), f"{value:,g}", "black", small, anchor="rm")
    for value in ticks(0, axes.last, 6):
        x = axes.place(value, 0)[0]
        draw.line((x, y0, x, y1), "#DDDDDD", s)
        draw.text((x, y1 + 8 * s), f"{value:,g}", "black", small, anchor="mt")
    for line in lines:
        points = [axes.place(*p) for p in line.points]
        stroke(draw, points, line.color, line.dashed)
        if not line.dashed and points[-1][0] - points[0][0] >= 15 * s * (len(points) - 1):  # far apart
            for x, y in points:
                draw.ellipse((x - 3 * s, y - 3 * s, x + 3 * s, y + 3 * s), line.color)
    draw.line((x0, y0, x0, y1, x1, y1), "black", s)
    draw.text(((x0 + x1) / 2, y1 + 32 * s), "step", "black", text, anchor="mt")


def stroke(draw: ImageDraw.ImageDraw, points: list[tuple[float, float]], color: str, dashed: bool = False) -> None:
    """A line through the points; a dashed one is level, from the first to the last."""
    if not dashed:
        return draw.line(points, color, 2 * FINE, "curve") if len(points) > 1 else None
    (x, y), end = points[0], points[-1][0]
    while x < end:
        draw.line((x, y, min(x + 6 * FINE, end), y), color, 2 * FINE)
        x += 10 * FINE


def wrap_legend(lines: list[Line]) -> list[list[tuple[int, Line]]]:
    """The lines in rows as wide as a diagram, each with its place from the left."""
    rows, x = [[]], 0
    for line in lines:
        width = 34 + math.ceil(font().getlength(line.name))
        if x and x + width > ACROSS:
            rows, x = [*rows, []], 0
        rows[-1].append((x, line))
        x += width + 22
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# A training batch


def draw_batch(batch, mean, std, n: int = 8) -> Image.Image:
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
