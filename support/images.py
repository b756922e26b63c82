"""From an image file to an upright tensor, and from that to the grid of patches.

    image = read_image("photo.jpg")                               # uint8 or uint16 (channels, H, W)
    fit = plan_fit(*image.shape[-2:], patch=14, how="crop")       # which size, which part
    image = fit_image(image, fit, MEAN)                           # (channels, h*14, w*14)

Apache License 2.0.
"""
import contextlib
import functools
import io
import itertools
import math
import os
import re
import stat
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 2**27  # larger images are refused, so that a small file cannot fill the memory; Pillow's limit is 2**27.4
MAX_BYTES = 2**30  # larger files are refused as well
MAX_UNPACKED = 2**27  # bytes that a gzipped file, or a text or color profile in a PNG, may unpack to
MAX_SCANS = 100  # in a JPEG; progressive ones have about 10. A scan of 14 bytes costs a pass over all pixels
MAX_SEGMENTS = 2**16  # in the header of a JPEG
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP", "AVIF")  # that Pillow may detect, whatever the name
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".avif", ".avifs", ".bmp", ".gif",
            ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".npy")  # of files in these formats and NumPy's
MARKER = re.compile(rb"\xff[^\0\xff]")  # not a fill byte, nor what stands for 0xFF in the data
SCAN_OR_END = re.compile(rb"\xff[\xda\xd9]")
ORIENTATION = re.compile(rb"""\x12\x01.{6}[\2-\x08] | \x01\x12.{6}(\0\0)?\0[\2-\x08] | tiff:Orientation(="|>)[2-8]""",
                         re.DOTALL | re.VERBOSE)  # other than upright, in Exif of either byte order or in XMP
SWAPPED = {f"{mode};16{order}": f"{mode};16{other}" for mode in ("RGB", "RGBA", "RGBX")
           for order, other in ("BL", "LB", "NB")}  # Pillow's names for 16-bit color -> in the other byte order


# ----------------------------------------------------------------------------------------------------------------------
# Decoding


def read_image(path: str, channels: int = 3) -> Tensor:
    """An image file as decode() gives it. Raises ValueError, with the reason, if it cannot be read."""
    try:
        return decode(read_file(path), channels)
    except Exception as error:  # decoders raise anything on damaged files
        raise ValueError(f"{path} cannot be read as an image ({short_reason(error)})") from None


def short_reason(error: Exception) -> str:
    """The first line of an error, at most 200 characters: why an image cannot be read. (parallel.root_cause() looks for
    the system error behind others; cli.last_line() is for errors from data-loading workers.)"""
    return str(error).partition("\n")[0].expandtabs(1)[:200] or type(error).__name__


def read_file(path: str) -> np.ndarray:
    """The bytes of a file, uint8 (n,). Raises OSError, or ValueError if there are too many."""
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):  # reading a pipe would block forever
        raise OSError("not a regular file")
    if info.st_size > MAX_BYTES:
        raise ValueError(f"{info.st_size:,} bytes, more than MAX_BYTES in support/images.py")
    return np.fromfile(path, np.uint8)


def decode(data: np.ndarray, channels: int = 3) -> Tensor:
    """The bytes of an image file, uint8 (n,), as an upright image (channels, H, W): uint8, or uint16 for 16-bit gray
    and for 16-bit color of PNG and TIFF files.

    Gray is repeated and color converted to gray, as `channels` requires. Transparent images are composited on white, as
    in browsers and catalogs; the colors of transparent pixels are often garbage. With 4 channels alpha is kept, or set
    to opaque. Other numbers of channels are read from .npy arrays (H, W, C) and from the pages of a TIFF. Raises
    ValueError if decoding would take too much memory or time, and whatever the decoder raises if the file cannot be
    decoded.
    """
    if data[:2].tobytes() == b"\x1f\x8b":  # some files of ImageNet-22k are gzipped
        data = unpack(data)
    kind = data[:6].tobytes()
    if not kind:
        raise ValueError("empty file")
    if kind == b"\x93NUMPY":
        image = read_npy(data)
    else:
        image = (read_jpeg if kind.startswith(b"\xff\xd8\xff") else read_by_pillow)(data, channels)
    return as_channels(image, channels)


def unpack(data: np.ndarray) -> np.ndarray:
    unpacked = zlib.decompressobj(31).decompress(data, MAX_UNPACKED + 1)
    if len(unpacked) > MAX_UNPACKED:
        raise ValueError("unpacks to more than MAX_UNPACKED bytes, see support/images.py")
    return np.frombuffer(bytearray(unpacked), np.uint8)


def check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, more than MAX_PIXELS in support/images.py")


def read_npy(data: np.ndarray) -> Tensor:
    """A view of `data`: no memory is taken, whatever shape the header claims."""
    file = io.BytesIO(data[: 2**16])
    major, _ = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(file)
    pixels = np.frombuffer(data, dtype, math.prod(shape), file.tell()).reshape(shape, order="F" if fortran else "C")
    return from_array(pixels.astype(dtype.newbyteorder("="), copy=False))


@functools.cache
def jpeg_decoder() -> Callable | None:
    """torchcodec's if installed, else torchvision's while it exists (deprecated in 0.29), else None: Pillow gives the
    same pixels, but is slower."""
    try:
        from torchcodec.decoders import decode_jpeg
    except (ImportError, OSError, RuntimeError):  # absent, or its libraries cannot be loaded
        try:
            from torchvision.io import decode_jpeg  # half a second to import; much of the code needs no JPEG
        except ImportError:
            return None
    return decode_jpeg


def read_jpeg(data: np.ndarray, channels: int) -> Tensor:
    """By jpeg_decoder(), or by Pillow if there is none or it rejects the file."""
    turning = check_jpeg(data.tobytes())
    if channels not in (1, 3) or not (decoder := jpeg_decoder()):
        return read_by_pillow(data, channels)
    unturned = data
    if turning:
        unturned = data.copy()
        unturned[turning] = 0xEF  # a marker that decoders skip: torchcodec would turn the image by the first segment
    try:
        image = decoder(torch.from_numpy(unturned), mode="RGB" if channels == 3 else "GRAY")
    except RuntimeError:
        return read_by_pillow(data, channels)
    if not turning:
        return image
    with open_by_pillow(data) as file:
        return upright(image, file)


def check_jpeg(data: bytes) -> list[int]:
    """Walks through the segments as libjpeg does, skipping bytes between them. Raises ValueError if there are too many
    pixels, scans or segments. Returns the positions of the markers of segments that hold an orientation."""
    at, n, turning, components, progressive = 2, 0, [], b"", False
    while found := MARKER.search(data, at):
        at, n, marker = found.end(), n + 1, found[0][1]
        if n > MAX_SEGMENTS:
            raise ValueError("more segments than MAX_SEGMENTS in support/images.py")
        if marker == 0xDA:  # the first scan, with which the header ends. Others follow only in these cases:
            if progressive or components != data[at + 2 : at + 3]:
                marks = [mark[0] for mark in itertools.islice(SCAN_OR_END.finditer(data, at), MAX_SCANS)]
                if len(marks) == MAX_SCANS and b"\xff\xd9" not in marks:
                    raise ValueError("more scans than MAX_SCANS in support/images.py")
            break
        length = int.from_bytes(data[at : at + 2], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            check_size(int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 3 : at + 5], "big"))
            components, progressive = data[at + 7 : at + 8], marker % 4 == 2
        if marker == 0xE1 and ORIENTATION.search(data, at, at + length):
            turning.append(at - 1)
        if marker != 0x01 and not 0xD0 <= marker <= 0xD9:  # these have no content
            at += length
    return turning


@contextlib.contextmanager
def open_by_pillow(data: np.ndarray) -> Iterator[Image.Image]:
    """Opens an image file without Pillow's warnings."""
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = MAX_UNPACKED  # Pillow's limits reject valid files
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            file = Image.open(io.BytesIO(data), formats=FORMATS)
        except (UnidentifiedImageError, KeyError):  # the message holds an address; no AVIF before Pillow 11.3
            raise ValueError("cannot identify the image format") from None
        with file:
            yield file


def read_by_pillow(data: np.ndarray, channels: int) -> Tensor:
    with open_by_pillow(data) as file:
        check_frame(file)
        if channels in (1, 3, 4) or getattr(file, "n_frames", 1) != channels:
            if channels == 1:
                file.draft("L", None)  # from a JPEG, the gray that the other decoders return
            swapped = swapped_tiles(file)
            return read_deep(data, file, swapped) if swapped else from_pillow(file, channels)
        pages = []
        for i in range(channels):
            file.seek(i)
            check_frame(file)
            pages.append(as_channels(from_pillow(file, 1), 1))
        return torch.cat(pages)


def check_frame(file: Image.Image) -> None:
    check_size(*file.size)
    tags = getattr(file, "tag_v2", {})  # of a TIFF: a small image can lie in a huge tile
    check_size(tags.get(322, 1), tags.get(323, 1))


def swapped_tiles(file: Image.Image) -> list[tuple]:
    """The tiles of an open file with 16-bit color, declared as the other byte order; [] for other files."""
    swapped = []
    for tile in file.tile:  # (codec, extents, offset, args)
        name, *others = tile[3] if tile[3] and isinstance(tile[3], tuple) else (tile[3],)
        if name not in SWAPPED:
            return []
        swapped.append(tile._replace(args=(SWAPPED[name], *others)))
    return swapped


def read_deep(data: np.ndarray, file: Image.Image, swapped: list[tuple]) -> Tensor:
    """16-bit color (c, H, W). Pillow returns the high bytes; told the other byte order, it returns the low ones."""
    high = np.asarray(file)
    with open_by_pillow(data) as low:
        low.tile = swapped
        pixels = high.astype(np.uint16)
        pixels <<= 8
        pixels |= np.asarray(low)
    return upright(from_deep(pixels, file.info.get("transparency")), file)


def from_deep(pixels: np.ndarray, transparent: int | tuple | None) -> Tensor:
    """uint16 (H, W) or (H, W, C) -> (C, H, W), or (4, H, W) if one value or color is transparent."""
    image = from_array(pixels)
    if transparent is None:
        return image
    alpha = (pixels.reshape(*pixels.shape[:2], -1) != transparent).any(-1) * np.uint16(65535)
    return torch.cat([image.expand(3, -1, -1), torch.from_numpy(alpha)[None]])


def from_pillow(image: Image.Image, channels: int) -> Tensor:
    """An image, or the current page of an open file, upright: gray if it is or if `channels` is 1, RGBA if that is 4 or
    something is transparent, else RGB; uint16 for 16-bit gray."""
    image.load()
    transparent = image.info.get("transparency")
    if image.mode[0] in "IF":  # 16-bit gray is I;16, in older versions I
        pixels = np.asarray(image)
        if pixels.dtype.kind == "f" or pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"{pixels.dtype} pixels, or values outside 0 to 65535; save as 16-bit integers")
        return upright(from_deep(pixels.astype(np.uint16), transparent), image)
    if channels == 4 or transparent is not None or image.mode[-1] in "Aa":
        mode = "RGBA"
    else:
        mode = "L" if channels == 1 or image.mode in ("1", "L") else "RGB"
    return upright(from_array(np.array(image.convert(mode))), image)


def upright(image: Tensor, file: Image.Image) -> Tensor:
    """(c, H, W) transposed as ImageOps.exif_transpose() does to `file`, but not if its Exif data are damaged."""
    try:
        orientation = file.getexif().get(0x0112, 1)
    except Exception:  # damaged data can raise anything
        return image
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 2)
    flipped = {2: [2], 3: [1, 2], 4: [1], 6: [2], 7: [1, 2], 8: [1]}.get(orientation)
    return image.flip(flipped) if flipped else image


def from_array(pixels: np.ndarray) -> Tensor:
    """uint8 or uint16 (H, W) or (H, W, C) -> (C, H, W). Raises ValueError for other arrays."""
    if pixels.dtype not in (np.uint8, np.uint16) or pixels.ndim not in (2, 3) or pixels.size == 0:
        raise ValueError(f"array of {pixels.dtype} {pixels.shape}; images are uint8 or uint16, (H, W) or (H, W, C)")
    check_size(*pixels.shape[:2])
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)


def as_channels(image: Tensor, channels: int) -> Tensor:
    """(c, H, W) -> (channels, H, W). Raises ValueError if there is no usual conversion."""
    c = len(image)
    if c == channels:
        return image
    if c == 4 and channels in (1, 3):
        return as_channels(on_white(image), channels)
    if channels == 4 and c in (1, 3):
        opaque = torch.full_like(image[:1], 65535 if image.dtype == torch.uint16 else 255)
        return torch.cat([image.expand(3, -1, -1), opaque])
    if c == 1:
        return image.expand(channels, -1, -1)
    if c == 3 and channels == 1:
        weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
        return (image.float() * weights).sum(0, keepdim=True).round().to(image.dtype)
    raise ValueError(f"it has {c} channels, not {channels}")


def on_white(image: Tensor) -> Tensor:
    """RGBA (4, H, W) -> RGB (3, H, W)."""
    white = 65535 if image.dtype == torch.uint16 else 255
    if (image[3] == white).all():
        return image[:3]
    alpha = image[3].float() / white
    return torch.stack([(white - (white - color.float()) * alpha).round().to(image.dtype) for color in image[:3]])


# ----------------------------------------------------------------------------------------------------------------------
# Fitting an image to the patch grid


FITS = ("crop", "pad", "resize")


class PatchFit(NamedTuple):
    """How an image gets sides that are multiples of the patch size. Pixel (x, y) of a W x H image moves to
    (left + x * scaled[1] / W, top + y * scaled[0] / H)."""
    scaled: tuple[int, int]  # height and width after resizing
    top: int  # where its corner then lies on the canvas; negative: rows are cut off
    left: int
    canvas: tuple[int, int]  # height and width of what the network sees


def plan_fit(height: int, width: int, patch: int, how: str = "crop", size: tuple[int, ...] = ()) -> PatchFit:
    """Scales an image to `size`, which is () for its own, (short side,) or (height, width), and makes both sides
    multiples of `patch`: "crop" cuts the rest off, "pad" adds to it, both evenly on all sides; "resize" stretches.
    Raises ValueError if nothing would be left, or if a given height and width are not multiples."""
    if len(size) == 2:
        if off := [s for s in size if s % patch or s < patch]:
            raise ValueError(f"size {off[0]} is not a multiple of the patch size {patch}; the nearest is "
                             f"{max(round(off[0] / patch), 1) * patch}")
        scaled = canvas = tuple(size)
        if how != "resize":
            scale = (max if how == "crop" else min)(size[0] / height, size[1] / width)
            scaled = max(round(height * scale), 1), max(round(width * scale), 1)
    else:
        scale = size[0] / min(height, width) if size else 1
        unit = patch if how == "resize" else 1
        scaled = tuple(max(round(n * scale / unit), 1) * unit for n in (height, width))
        canvas = tuple((-(-n // patch) if how == "pad" else n // patch) * patch for n in scaled)
        if not all(canvas):
            raise ValueError(f"an image of {scaled[0]}x{scaled[1]} pixels is less than one patch of {patch}x{patch}; "
                             "enlarge it by --size, or choose --fit pad or resize")
    return PatchFit(scaled, (canvas[0] - scaled[0]) // 2, (canvas[1] - scaled[1]) // 2, canvas)


def fit_image(image: Tensor, fit: PatchFit, mean) -> Tensor:
    """An image (C, H, W), uint8 or uint16, resized and placed as `fit` says. Padding has the color `mean`, which
    normalization turns to zero."""
    is_16_bit = image.dtype == torch.uint16
    x = image.float() if is_16_bit else image  # torch cannot resize uint16
    if tuple(x.shape[-2:]) != fit.scaled:
        x = F.interpolate(x[None], fit.scaled, mode="bicubic", antialias=True)[0]
    padding = (torch.tensor(mean) * (65535 if is_16_bit else 255)).round().to(x.dtype)
    out = padding[:, None, None].repeat(1, *fit.canvas)  # (C, height, width)
    (h, w), (height, width), top, left = fit.scaled, fit.canvas, fit.top, fit.left
    out[:, max(top, 0) : top + h, max(left, 0) : left + w] = (
        x[:, max(-top, 0) : height - top, max(-left, 0) : width - left])
    return out.round().clamp(0, 65535).to(torch.uint16) if is_16_bit else out


class FittedImages(torch.utils.data.Dataset):
    """fitted[i] -> the i-th of `paths` as fit_image() makes it, and ""; or None and the reason, if it cannot be read or
    is too small."""

    def __init__(self, paths: list[str], channels: int, patch: int, how: str, size, mean):
        self.paths, self.channels, self.mean, self.fit = paths, channels, mean, (patch, how, size)
        plan_fit(2 * patch, 2 * patch, *self.fit)  # raises now if `size` is wrong: no image is at fault

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor | None, str]:
        try:
            image = read_image(self.paths[i], self.channels)
            return fit_image(image, plan_fit(*image.shape[-2:], *self.fit), self.mean), ""
        except ValueError as error:
            return None, str(error) if self.paths[i] in str(error) else f"{self.paths[i]}: {error}"
