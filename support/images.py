"""From an image file to an upright tensor, and from that to the grid of patches.

    image = read_image("photo.jpg")                               # uint8 or uint16 (channels, H, W)
    fit = plan_fit(*image.shape[-2:], patch=14, how="crop")       # which size, which part
    image = fit_image(image, fit, MEAN)                           # (channels, h*14, w*14)

Apache License 2.0.
"""
import io
import os
import stat
import struct
import zlib
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 2**27  # larger images are refused, so that a small file cannot fill the memory; Pillow's limit is 2**27.4
MAX_BYTES = 2**30  # larger files are refused as well
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP", "AVIF")  # what Pillow may detect, whatever the file name
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".avif", ".bmp", ".gif", ".tif",
            ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".npy")  # of files in these formats and NumPy's


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
        raise OSError("not a file")
    if info.st_size > MAX_BYTES:
        raise ValueError(f"{info.st_size:,} bytes, more than MAX_BYTES in support/images.py")
    return np.fromfile(path, np.uint8)


def decode(data: np.ndarray, channels: int = 3) -> Tensor:
    """The bytes of an image file, uint8 (n,), as an upright image (channels, H, W): uint8, or uint16 for 16-bit gray.

    Gray is repeated, alpha dropped or set to opaque, color converted to gray, as `channels` requires. Other numbers of
    channels are read from .npy arrays (H, W, C), which may also hold 16-bit color, and from the pages of a TIFF. Raises
    whatever the decoder raises if the file cannot be decoded.
    """
    if data[:2].tobytes() == b"\x1f\x8b":  # some files of ImageNet-22k are gzipped
        data = np.frombuffer(bytearray(zlib.decompressobj(31).decompress(data, MAX_BYTES)), np.uint8)
    kind = data[:6].tobytes()
    if not kind:
        raise ValueError("empty file")
    if kind == b"\x93NUMPY":
        image = from_array(np.load(io.BytesIO(data), allow_pickle=False))
    elif kind.startswith(b"\xff\xd8\xff") and channels in (1, 3):  # a damaged PNG would crash torchvision's decoder
        image = read_jpeg(data, channels)
    else:
        image = read_by_pillow(data, channels)
    return as_channels(image, channels)


def check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, more than MAX_PIXELS in support/images.py")


def read_jpeg(data: np.ndarray, channels: int) -> Tensor:
    """By torchvision, which is faster; by Pillow if torchvision refuses the file, or no longer has a decoder (0.29
    announces so)."""
    at = 2
    while at + 9 < len(data) and data[at] == 0xFF:  # the segments, up to the one with the size
        marker, length, _, height, width = struct.unpack_from(">xBHBHH", data, at)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            check_size(width, height)
            break
        at += 2 + length
    else:
        return read_by_pillow(data, channels)
    try:
        from torchvision.io import ImageReadMode, decode_jpeg  # half a second to import; much of the code needs no JPEG

        return decode_jpeg(torch.from_numpy(data), ImageReadMode.RGB if channels == 3 else ImageReadMode.GRAY,
                           apply_exif_orientation=True)
    except (RuntimeError, ImportError):
        return read_by_pillow(data, channels)


def read_by_pillow(data: np.ndarray, channels: int) -> Tensor:
    try:
        file = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError("cannot identify the image format") from None  # Pillow's message differs from run to run
    with file:
        check_size(*file.size)
        n_pages = getattr(file, "n_frames", 1) if channels not in (1, 3, 4) else 1
        if n_pages != channels:
            return from_pillow(file, channels)
        pages = []
        for i in range(n_pages):
            file.seek(i)
            check_size(*file.size)
            pages.append(from_pillow(file, 1))
        return torch.cat(pages)


def from_pillow(image: Image.Image, channels: int) -> Tensor:
    """An image, or the current page of an open file: gray if it is or if `channels` is 1, RGBA if that is 4, else RGB;
    uint16 for 16-bit gray."""
    if image.mode[0] in "IF":  # 16-bit gray is I;16, in older versions I
        pixels = np.asarray(image)
        if pixels.dtype.kind == "f" or pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"pixels of type {pixels.dtype} outside of 0 to 65535; save them as 16-bit integers")
        return torch.from_numpy(pixels.astype(np.uint16))[None]
    gray = channels == 1 or image.mode in ("1", "L")
    image = ImageOps.exif_transpose(image).convert("L" if gray else "RGBA" if channels == 4 else "RGB")
    return from_array(np.array(image))


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
    if channels == 4 and c in (1, 3):
        opaque = torch.full_like(image[:1], 65535 if image.dtype == torch.uint16 else 255)
        return torch.cat([image.expand(3, -1, -1), opaque])
    if c == 1:
        return image.expand(channels, -1, -1)
    if c == 3 and channels == 1:
        weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
        return (image.float() * weights).sum(0, keepdim=True).round().to(image.dtype)
    if c == 4 and channels == 3:
        return image[:3]
    raise ValueError(f"it has {c} channels, not {channels}")


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
