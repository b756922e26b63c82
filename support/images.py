"""An image file as pixels, upright; and an image fitted to the grid of patches. Apache License 2.0."""
import io
import os
import re
import stat
import struct
import zlib
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

MAX_PIXELS = 2**27  # an image of more is refused, lest a small file fill the memory; Pillow refuses 2**27.4 itself

MAX_BYTES = 2**30  # likewise a file

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # what Pillow may take a file for, whatever its name


# ----------------------------------------------------------------------------------------------------------------------
# Decoding


def read_file(path: str) -> np.ndarray:
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):  # reading a pipe would wait for ever
        raise OSError("not a file")
    if about.st_size > MAX_BYTES:
        raise ValueError(f"{about.st_size:,} bytes are more than data.MAX_BYTES")
    return np.fromfile(path, np.uint8)


def decode(data: np.ndarray, channels: int = 3) -> Tensor:
    """The bytes of an image file, uint8 (n,), as an upright image (channels, H, W), uint8 or, of deep gray, uint16.

    Gray is repeated, alpha dropped or made opaque, color turned to gray as `channels` wants it; other numbers of
    channels come from .npy arrays (H, W, C), also for 16-bit color, and the pages of a TIFF. Raises whatever a decoder
    does if the file cannot be decoded.
    """
    if data[:2].tobytes() == b"\x1f\x8b":  # some files of ImageNet-22k are compressed once more
        data = np.frombuffer(bytearray(zlib.decompressobj(31).decompress(data, MAX_BYTES)), np.uint8)
    kind = data[:6].tobytes()
    if not kind:
        raise ValueError("empty file")
    if kind == b"\x93NUMPY":
        image = read_array(data)
    elif kind.startswith(b"\xff\xd8\xff") and channels in (1, 3):  # a damaged PNG would crash torchvision's decoder
        image = read_jpeg(data, channels)
    else:
        image = read_by_pillow(data, channels)
    return as_channels(image, channels)


def check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than data.MAX_PIXELS")


def read_jpeg(data: np.ndarray, channels: int) -> Tensor:
    """By torchvision, which is faster; what it refuses, or all if it has no decoder any more (0.29 says it will go), by
    Pillow."""
    at = 2
    while at + 9 < len(data) and data[at] == 0xFF:  # the segments, until the one with the size
        marker, length, _, height, width = struct.unpack_from(">xBHBHH", data, at)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            check_size(width, height)
            break
        at += 2 + length
    else:
        return read_by_pillow(data, channels)
    try:
        modes = torchvision.io.ImageReadMode
        return torchvision.io.decode_jpeg(torch.from_numpy(data), modes.RGB if channels == 3 else modes.GRAY,
                                          apply_exif_orientation=True)
    except (RuntimeError, AttributeError):
        return read_by_pillow(data, channels)


def read_by_pillow(data: np.ndarray, channels: int) -> Tensor:
    with Image.open(io.BytesIO(data), formats=FORMATS) as file:
        check_size(*file.size)
        n_pages = getattr(file, "n_frames", 1) if channels not in (1, 3, 4) else 1
        if n_pages != channels:
            return page(file, channels)
        pages = []
        for i in range(n_pages):
            file.seek(i)
            check_size(*file.size)
            pages.append(page(file, 1))
        return torch.cat(pages)


def page(file: Image.Image, channels: int) -> Tensor:
    """One page of an open file: gray if it is so or `channels` is 1, RGBA if that is 4, else RGB; deep gray uint16."""
    if file.mode[0] in "IF":  # 16-bit gray is I;16, in older versions I
        pixels = np.asarray(file)
        if pixels.dtype.kind == "f" or pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"pixels of type {pixels.dtype} outside of 0 to 65535; save them as 16-bit integers")
        return torch.from_numpy(pixels.astype(np.uint16))[None]
    gray = channels == 1 or file.mode in ("1", "L")
    return TF.pil_to_tensor(ImageOps.exif_transpose(file).convert("L" if gray else "RGBA" if channels == 4 else "RGB"))


def read_array(data: np.ndarray) -> Tensor:
    """A .npy file of uint8 or uint16 (H, W) or (H, W, C) as (C, H, W)."""
    pixels = np.load(io.BytesIO(data), allow_pickle=False)
    if pixels.dtype not in (np.uint8, np.uint16) or pixels.ndim not in (2, 3) or pixels.size == 0:
        raise ValueError(f"array of {pixels.dtype} {pixels.shape}; images are uint8 or uint16, (H, W) or (H, W, C)")
    check_size(*pixels.shape[:2])
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)


def as_channels(image: Tensor, channels: int) -> Tensor:
    """(c, H, W) -> (channels, H, W). Raises ValueError if there is no usual way."""
    c = len(image)
    if c == channels:
        return image
    if channels == 4 and c in (1, 3):  # opaque
        white = torch.full_like(image[:1], 65535 if image.dtype == torch.uint16 else 255)
        return torch.cat([image.expand(3, -1, -1), white])
    if c == 1:
        return image.expand(channels, -1, -1)
    if c == 3 and channels == 1:
        return (image.float() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True).round().to(image.dtype)
    if c == 4 and channels == 3:
        return image[:3]
    raise ValueError(f"it has {c} channels, not {channels}")


def reason(error: Exception) -> str:
    """The first line of what a decoder said."""
    line = str(error).partition("\n")[0].replace("\t", " ")
    return re.sub(r" <_io\.BytesIO object at \w+>", "", line)[:200] or type(error).__name__


def read_image(path: str, channels: int = 3) -> Tensor:
    """An image file as decode() gives it. Raises ValueError, with the reason, if it cannot be read."""
    try:
        return decode(read_file(path), channels)
    except Exception as error:  # decoders raise all sorts on damaged files
        raise ValueError(f"{path} cannot be read as an image ({reason(error)})") from None


# ----------------------------------------------------------------------------------------------------------------------
# Fitting an image to the patch grid


class Fit(NamedTuple):
    """How an image comes to sides that are multiples of the patch. Pixel (x, y) of a W x H image goes to
    (left + x * scaled[1] / W, top + y * scaled[0] / H)."""
    scaled: tuple[int, int]  # height and width that the image is resized to
    top: int  # where its corner then lies on the canvas; negative: rows are cut away
    left: int
    canvas: tuple[int, int]  # height and width of what the network sees

FITS = ("crop", "pad", "resize")


def plan_fit(height: int, width: int, patch: int, how: str = "crop", size: tuple[int, ...] = ()) -> Fit:
    """Brings an image to `size`: () as it is, (short side,) or (height, width); and to multiples of `patch`. "crop"
    cuts off the rest, "pad" adds to it, both in the middle; "resize" stretches. Raises ValueError if nothing would be
    left, or if height and width are given and are no multiples."""
    if len(size) == 2:
        if off := [s for s in size if s % patch or s < patch]:
            raise ValueError(f"size {off[0]} is no multiple of the patch size {patch}; the nearest is "
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
    return Fit(scaled, (canvas[0] - scaled[0]) // 2, (canvas[1] - scaled[1]) // 2, canvas)


def fit_image(image: Tensor, fit: Fit, mean) -> Tensor:
    """An image (C, H, W), uint8 or uint16, as `fit` says; what is added has the color `mean`, which becomes zero when
    the image is normalized."""
    deep = image.dtype == torch.uint16
    x = image.float() if deep else image  # torchvision resizes no uint16
    if tuple(x.shape[-2:]) != fit.scaled:
        x = TF.resize(x, list(fit.scaled), InterpolationMode.BICUBIC, antialias=True)
    out = (torch.tensor(mean) * (65535 if deep else 255)).round().to(x.dtype)[:, None, None].repeat(1, *fit.canvas)
    (h, w), (height, width), top, left = fit.scaled, fit.canvas, fit.top, fit.left
    out[:, max(top, 0) : top + h, max(left, 0) : left + w] = (
        x[:, max(-top, 0) : height - top, max(-left, 0) : width - left])
    return out.round().clamp(0, 65535).to(torch.uint16) if deep else out


class FittedImages(torch.utils.data.Dataset):
    """fitted[i] -> the i-th of `paths` as fit_image() makes it, uint8 or uint16 (C, h*patch, w*patch), and "". If it
    cannot be read, or is too small: None, and why."""

    def __init__(self, paths: list[str], channels: int, patch: int, how: str, size, mean):
        self.paths, self.channels, self.mean, self.fit = paths, channels, mean, (patch, how, size)
        plan_fit(2 * patch, 2 * patch, *self.fit)  # a wrong size is no image's fault

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor | None, str]:
        try:
            image = read_image(self.paths[i], self.channels)
            return fit_image(image, plan_fit(*image.shape[-2:], *self.fit), self.mean), ""
        except ValueError as error:
            return None, str(error) if self.paths[i] in str(error) else f"{self.paths[i]}: {error}"
