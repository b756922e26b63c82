import contextlib
import gzip
import io
import multiprocessing
import os
import random
import resource
import struct
import sys
import time
import tracemalloc
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

import data
import support.evaluation
import support.images
import support.sources
from tests.common import assert_close


def test_data_odd_image_files(tmp_path):
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    variants = {"gray.png": rgb.convert("L"), "palette.png": rgb.convert("P"), "rgba.png": rgb.convert("RGBA"),
                "cmyk.jpg": rgb.convert("CMYK"), "one.png": rgb.crop((0, 0, 1, 1)), "t.tif": rgb, "b.bmp": rgb}
    for name, image in variants.items():
        image.save(tmp_path / name)
        for channels in (1, 3, 4):
            shape = load(tmp_path / name, channels).shape
            assert shape == (channels, image.height, image.width), (name, channels)
    rgb.save(tmp_path / "animated.gif", save_all=True, append_images=[rgb.transpose(Image.Transpose.ROTATE_180)] * 2)
    assert load(tmp_path / "animated.gif").shape == (3, 6, 8)
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright
    rgb.save(tmp_path / "exif.jpg", exif=turned)
    assert load(tmp_path / "exif.jpg").shape == (3, 8, 6)


def load(path: Path, channels: int = 3) -> torch.Tensor:
    return support.images.decode(support.images.read_file(str(path)), channels)


def test_data_deep_and_many_channelled_images(tmp_path):
    """16 bits stay 16 bits, any number of channels arrives, and what cannot be meant is refused."""
    rng = np.random.default_rng(0)
    deep = rng.integers(0, 65536, (6, 8), dtype=np.uint16)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(deep).save(tmp_path / name)
        for channels in (1, 3):
            assert np.array_equal(load(tmp_path / name, channels)[-1].numpy(), deep), name
    for dtype in (np.uint8, np.uint16):
        pages = rng.integers(0, 256, (7, 6, 8), dtype=dtype)
        first, *others = [Image.fromarray(p) for p in pages]
        first.save(tmp_path / "seven.tif", save_all=True, append_images=others)
        assert np.array_equal(load(tmp_path / "seven.tif", 7).numpy(), pages)
    moving = [Image.fromarray(p) for p in rng.integers(0, 256, (5, 6, 8, 3), dtype=np.uint8)]
    moving[0].save(tmp_path / "moving.webp", save_all=True, append_images=moving[1:], lossless=True)
    assert load(tmp_path / "moving.webp", 5).shape == (5, 6, 8) and load(tmp_path / "moving.webp").shape == (3, 6, 8)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    rgba = load(tmp_path / "deep.png", 4)
    assert rgba.dtype == torch.uint16 and (rgba[3] == 65535).all() and load(tmp_path / "deep.png", 2).shape == (2, 6, 8)
    bands = rng.integers(0, 65536, (6, 8, 12), dtype=np.uint16)
    np.save(tmp_path / "twelve.npy", bands)
    assert np.array_equal(load(tmp_path / "twelve.npy", 12).permute(1, 2, 0).numpy(), bands)
    np.save(tmp_path / "float.npy", bands.astype(np.float32))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    Image.fromarray(deep.astype(np.float32)).save(tmp_path / "float.tif")
    for name, channels, text in (("twelve.npy", 3, "12 channels, not 3"), ("float.npy", 12, "uint8 or uint16"),
                                 ("objects.npy", 1, "OBJECT array"), ("float.tif", 1, "16-bit integers")):
        with pytest.raises(ValueError, match=text):
            load(tmp_path / name, channels)


def test_data_decompression_bombs_are_refused(tmp_path, monkeypatch):
    """By their headers: nothing is decoded. A long narrow image is none."""
    Image.new("1", (20_000, 10_000)).save(tmp_path / "bomb.png")
    Image.new("L", (12_000, 12_000)).save(tmp_path / "bomb.jpg")
    Image.new("L", (20_000, 3)).save(tmp_path / "long.jpg")
    monkeypatch.setattr(support.images, "jpeg_decoder", lambda: lambda *args, **kwargs: pytest.fail("decoded"))
    for name in ("bomb.png", "bomb.jpg"):
        with pytest.raises(Exception, match="MAX_PIXELS|decompression bomb"):
            load(tmp_path / name)
    monkeypatch.undo()
    with open(tmp_path / "sparse.jpg", "wb") as file:
        file.truncate(support.images.MAX_BYTES + 1)
    with pytest.raises(ValueError, match="MAX_BYTES"):
        load(tmp_path / "sparse.jpg")
    long = load(tmp_path / "long.jpg")
    assert data.cut_crop(random.Random(0), long, 32, (0.05, 0.3)).shape == (32, 32, 3)
    (tmp_path / "long.txt").write_text("long.jpg")
    source = support.sources.open_source(str(tmp_path / "long.txt"))
    image, ok = support.evaluation.EvalImages(source, 64, 48)[0]
    assert ok and image.shape == (3, 48, 48)


def jpeg_of_size(width: int, height: int, before: bytes = b"") -> bytes:
    """A JPEG whose header claims this size; `before` follows the first marker."""
    content = bytearray(encoded(Image.new("L", (16, 16)), "JPEG"))
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(content[:2] + before + content[2:])


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def decode(content: bytes, channels: int = 3) -> torch.Tensor:
    return support.images.decode(np.frombuffer(bytearray(content), np.uint8), channels)


def segment(content: bytes) -> bytes:
    """Of a JPEG: Exif or XMP data."""
    return b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content


def chunk(name: bytes, content: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_with(*chunks: bytes, image: Image.Image = Image.new("RGB", (8, 8))) -> bytes:
    content = encoded(image, "PNG")
    return content[:33] + b"".join(chunks) + content[33:]


def npy(shape: str, kind: str = "|u1") -> bytes:
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64)


def tiff_tile(side: int) -> bytes:
    """16 x 16 pixels in a tile of this side."""
    values = {256: 16, 257: 16, 258: 8, 259: 5, 262: 1, 277: 1, 284: 1, 322: side, 323: side, 324: 146, 325: 100}
    tags = b"".join(struct.pack("<HHLL", tag, 4, 1, value) for tag, value in values.items())
    return b"II*\0" + struct.pack("<LH", 8, len(values)) + tags + bytes(300)


def test_data_sizes_are_checked_before_any_decoder(monkeypatch):
    """Whatever lies between the segments of a JPEG, whatever a header claims."""
    fake = b"\xff\xc0\x00\x0b\x08\x00\x10\x00\x10\x01\x01\x11\x00"  # 16 x 16
    fill = [b"", b"\xff", b"\xff" * 9, b"\xff\x01", b"\xff\xd0", b"\xff\xe0\x00\x00", b"\xff\xe5\x00\x01",
            b"\xff\x00\xff\x00", b"\xff" + b"\xff\xe5" + struct.pack(">H", len(fake) + 2) + fake]
    files = {f"jpeg {i}": jpeg_of_size(30000, 30000, before) for i, before in enumerate(fill)}
    assert decode(jpeg_of_size(16, 16, fill[-1])).shape == (3, 16, 16)
    small = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    webp = bytearray(encoded(small[0], "WEBP", save_all=True, append_images=small[1:]))
    webp[24:30] = (11999).to_bytes(3, "little") * 2
    gif = bytearray(encoded(small[0], "GIF"))
    gif[6:10] = struct.pack("<HH", 60000, 60000)
    bmp = bytearray(encoded(small[0], "BMP"))
    bmp[18:26] = struct.pack("<ii", 12000, -12000)
    ihdr = chunk(b"IHDR", struct.pack(">IIBBBBB", 12000, 12000, 8, 2, 0, 0, 0))
    files |= {"webp": bytes(webp), "gif": bytes(gif), "bmp": bytes(bmp), "tile": tiff_tile(30000),
              "png": png_with()[:8] + ihdr + png_with()[33:], "ppm": b"P6 12000 12000 255\n" + bytes(99)}
    monkeypatch.setattr(support.images, "jpeg_decoder", lambda: lambda *args, **kwargs: pytest.fail("decoded"))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    for name, content in files.items():
        for channels in (1, 3, 4, 5):
            with pytest.raises(Exception, match="MAX_PIXELS|decompression bomb"):
                decode(content, channels)
    scans = encoded(Image.new("RGB", (64, 64)), "JPEG", progressive=True)
    last = scans.rindex(b"\xff\xda")
    for channels in (3, 4):
        with pytest.raises(ValueError, match="MAX_SCANS"):
            decode(scans[:-2] + scans[last:-2] * 100 + scans[-2:], channels)
    for junk in (b"\xff\xe1\0\2", b"\xff\0", b"\xff"):  # of which each byte must not cost a step of Python
        began = time.process_time()
        with pytest.raises(ValueError, match="MAX_SEGMENTS") if len(junk) == 4 else contextlib.nullcontext():
            support.images.check_jpeg(scans[:2] + junk * 2_000_000)
        assert time.process_time() - began < 0.4
    endless = scans[:-2] + b"\xff\xda" * 500_000
    tracemalloc.start()
    with pytest.raises(ValueError, match="MAX_SCANS"):
        support.images.check_jpeg(endless)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_data_what_unpacks_is_bounded(monkeypatch):
    """Memory is not taken for what a header or a compressed stream claims; large but honest text is read."""
    zeros = bytes(20_000_000)
    packed = zlib.compress(zeros)
    honest = zlib.compress(bytes(1_500_000))
    image = encoded(Image.new("RGB", (8, 8)), "PNG")
    monkeypatch.setattr(support.images, "MAX_UNPACKED", 2_000_000)
    files = {"gzip": (gzip.compress(zeros), "MAX_UNPACKED"), "after": (gzip.compress(image + zeros), "MAX_UNPACKED"),
             "zTXt": (png_with(chunk(b"zTXt", b"a\0\0" + packed)), "too large"),
             "iTXt": (png_with(chunk(b"iTXt", b"a\0\1\0\0\0" + packed)), "too large"),
             "iCCP": (png_with(chunk(b"iCCP", b"a\0\0" + packed)), "too large"),
             "many": (png_with(*[chunk(b"zTXt", b"%d\0\0" % i + honest) for i in range(50)]), "Too much memory"),
             **{shape: (npy(shape), "smaller|too large") for shape in ("(100000, 100000)", f"({9**30}, 3)")}}
    exif = b"II*\0" + struct.pack("<LH", 8, 20_000) + b"".join(
        struct.pack("<HHLL", i, 7, 200_000, 0) for i in range(20_000))  # 20,000 times the same bytes
    files["Exif"] = png_with(chunk(b"eXIf", exif)), None
    tracemalloc.start()
    for name, (content, text) in files.items():
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        if text is None:
            assert decode(content).shape == (3, 8, 8)
        else:
            with pytest.raises(Exception, match=text):
                decode(content)
        assert tracemalloc.get_traced_memory()[1] - before < 10_000_000 + 3 * len(content), name
    tracemalloc.stop()
    for content in (gzip.compress(image), png_with(chunk(b"zTXt", b"a\0\0" + honest)),
                    png_with(chunk(b"iTXt", b"a\0\1\0\0\0" + honest)),
                    png_with(chunk(b"tEXt", b"a\0" + b"x" * 1_500_000)),
                    png_with(chunk(b"iCCP", b"a\0\0" + honest))):
        assert decode(content).shape == (3, 8, 8)


DECODERS = {"torchcodec": lambda: pytest.importorskip("torchcodec.decoders").decode_jpeg,
            "torchvision": lambda: torchvision.io.decode_jpeg, "pillow": lambda: None}


@pytest.fixture(params=DECODERS)
def decoder(request, monkeypatch):
    function = DECODERS[request.param]()
    monkeypatch.setattr(support.images, "jpeg_decoder", lambda: function)


def test_data_jpeg_decoders_give_the_same(tmp_path, decoder):
    """Bit by bit."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).resize((50, 61), Image.Resampling.BICUBIC)
    for mode in ("RGB", "L", "CMYK"):
        for options in ({}, {"progressive": True}, {"quality": 30}):
            content = encoded(smooth.convert(mode), "JPEG", **options)
            for channels, name in ((1, "GRAY"), (3, "RGB")):
                expected = torchvision.io.decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), name)
                assert torch.equal(decode(content, channels), expected), (mode, options, name)
            assert decode(content, 4).shape == (4, 61, 50)
            with pytest.raises(Exception):
                decode(content[: len(content) // 2])


def test_data_order_of_jpeg_decoders(monkeypatch):
    """torchcodec if it can be loaded, then torchvision while it has a decoder, then Pillow."""
    def chosen():
        support.images.jpeg_decoder.cache_clear()
        return support.images.jpeg_decoder()

    other = types.ModuleType("torchcodec.decoders")
    other.decode_jpeg = lambda data, mode: torch.zeros(len(mode) if mode == "RGB" else 1, 2, 2, dtype=torch.uint8)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
        patch.setitem(sys.modules, "torchcodec.decoders", other)
        assert chosen() is other.decode_jpeg and decode(jpeg_of_size(16, 16), 1).shape == (1, 2, 2)
        del other.decode_jpeg  # an early version
        assert chosen() is torchvision.io.decode_jpeg
        patch.setitem(sys.modules, "torchcodec.decoders", None)  # not installed
        assert chosen() is torchvision.io.decode_jpeg
        patch.delattr(torchvision.io, "decode_jpeg")
        assert chosen() is None and decode(jpeg_of_size(16, 16)).shape == (3, 16, 16)
    support.images.jpeg_decoder.cache_clear()


def exif_data(orientation: int, order: str) -> bytes:
    start = struct.pack(order + "2sHL", b"II" if order == "<" else b"MM", 42, 8)
    return b"Exif\0\0" + start + struct.pack(order + "HHHLHHL", 1, 0x0112, 3, 1, orientation, 0, 0)


def oriented_files(orientation: int):
    """(name, content), of every format that can say how the camera was held."""
    squares = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    rgb = Image.fromarray(np.kron(squares, np.ones((8, 8, 1), np.uint8)))
    deep = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation="%d"/>'
    for order in "<>":
        exif = exif_data(orientation, order)
        for mode in ("L", "RGB", "CMYK"):
            jpeg = encoded(rgb.convert(mode), "JPEG")
            for name, segments in {"exif": [exif], "xmp first": [xmp % (orientation % 8 + 1), exif],
                                   "xmp without": [xmp[:29] + b"<x/>", exif], "only xmp": [xmp % orientation]}.items():
                yield f"jpeg {name} {mode} {order}", jpeg[:2] + b"".join(map(segment, segments)) + jpeg[2:]
        for image in (rgb, deep, *map(rgb.convert, ("L", "P", "RGBA", "LA", "1"))):
            yield f"png {image.mode} {order}", encoded(image, "PNG", exif=exif)
            if image.mode in ("RGB", "RGBA", "L"):
                yield f"webp {image.mode} {order}", encoded(image, "WEBP", lossless=True, exif=exif[6:])
                yield f"avif {image.mode} {order}", encoded(image, "AVIF", exif=exif)
    for image in (rgb, deep, *map(rgb.convert, ("L", "P", "RGBA"))):
        for compression in (None, "tiff_lzw"):
            yield f"tiff {image.mode} {compression}", encoded(image, "TIFF", tiffinfo={0x0112: orientation},
                                                             compression=compression)
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", f'<x tiff:Orientation="{orientation}"/>')
    yield "png xmp", encoded(rgb, "PNG", pnginfo=info)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_data_images_are_turned_as_by_pillow(orientation, decoder):
    for name, content in oriented_files(orientation):
        with Image.open(io.BytesIO(content)) as file:
            turned = ImageOps.exif_transpose(file)
        for channels in (1, 3):
            deep = turned.mode.startswith("I")
            expected = torch.from_numpy(np.array(turned if deep else turned.convert("L" if channels == 1 else "RGB")))
            expected = expected[None] if expected.ndim == 2 else expected.permute(2, 0, 1)
            image = decode(content, channels)
            assert image.shape == (channels, *expected.shape[1:]), name
            assert_close(image.float(), expected.float().expand_as(image), 3 if "jpeg" in name else 1)
        assert decode(content, 4).shape == (4, *expected.shape[1:]), name


@pytest.mark.filterwarnings("error::UserWarning")
def test_data_damaged_exif_turns_nothing(decoder):
    """And prints nothing, though Pillow would warn."""
    image = encoded(Image.new("RGB", (16, 8)), "JPEG")
    for exif in (b"", b"II", b"XX*\0", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff\x01\x12\x00\x03",
                 exif_data(9, "<")[6:],
                 exif_data(6, "<")[6:16] + exif_data(6, "<")[16:30].replace(b"\1\0\0\0", b"\xff\0\0\0")):
        assert decode(image[:2] + segment(b"Exif\0\0" + exif) + image[2:]).shape == (3, 8, 16), exif


def deep_png(pixels: np.ndarray, *chunks: bytes) -> bytes:
    """uint16 (H, W, 3 or 4), which Pillow cannot save."""
    rows = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels))
    header = struct.pack(">IIBBBBB", *pixels.shape[1::-1], 16, 2 if pixels.shape[2] == 3 else 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join([chunk(b"IHDR", header), *chunks, chunk(b"IDAT", rows), chunk(b"IEND", b"")])


def deep_tiff(pixels: np.ndarray, order: str, deflate: bool = False) -> bytes:
    """uint16 (H, W, 3 or 4), which Pillow cannot save, in either byte order."""
    height, width, c = pixels.shape
    content = pixels.astype(order + "u2").tobytes()
    content = zlib.compress(content) if deflate else content
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, c, 200), (259, 4, 1, 8 if deflate else 1), (262, 4, 1, 2),
            (273, 4, 1, 208), (277, 4, 1, c), (278, 4, 1, height), (279, 4, 1, len(content))]
    tags += [(338, 4, 1, 2)] * (c == 4)  # the fourth is alpha
    header = struct.pack(order + "2sHLH", b"II" if order == "<" else b"MM", 42, 8, len(tags))
    header += b"".join(struct.pack(order + "HHLL", *tag) for tag in tags)
    return header.ljust(200, b"\0") + struct.pack(order + "4H", *[16] * 4) + content


def test_data_16_bit_color_keeps_all_bits():
    pixels = np.random.default_rng(0).integers(0, 65536, (6, 8, 4), dtype=np.uint16)
    for c in (3, 4):
        part = pixels[..., :c]
        tiffs = [deep_tiff(part, order, deflate) for order in "<>" for deflate in (False, True)]
        for content in (deep_png(part), *tiffs):
            image = decode(content, c)
            assert image.dtype == torch.uint16 and np.array_equal(image.permute(1, 2, 0).numpy(), part), content[:4]
            assert decode(content, 1).dtype == torch.uint16
    turned = decode(deep_png(pixels[..., :3], chunk(b"eXIf", exif_data(6, ">")[6:])))
    assert np.array_equal(turned.permute(1, 2, 0).numpy(), np.rot90(pixels[..., :3], -1))


@pytest.mark.filterwarnings("error")
def test_data_transparent_images_lie_on_white(recwarn):
    """In every mode that knows transparency: alpha channels, one transparent color, palettes; 8 and 16 bits. With 4
    channels alpha stays. Nothing is printed."""
    rgba = np.zeros((6, 8, 4), np.uint8)
    rgba[..., :3], rgba[..., 3] = (200, 100, 50), 255
    rgba[:, :4] = (0, 255, 0, 0)  # garbage below
    image = Image.fromarray(rgba)
    keyed = Image.fromarray(rgba[..., :3])
    gray = Image.fromarray(np.where(rgba[..., 3] == 0, 7, 100).astype(np.uint8))
    palette = image.quantize(4)
    deep = Image.fromarray(np.where(rgba[..., 3] == 0, 7, 40000).astype(np.uint16))
    deep_rgb = np.where(rgba[..., 3:] == 0, (1, 2, 3), (40000, 1, 2))
    files = {"rgba png": encoded(image, "PNG"), "webp": encoded(image, "WEBP", lossless=True, exact=True),
             "la": encoded(image.convert("LA"), "PNG"), "gif": encoded(image, "GIF"), "avif": encoded(image, "AVIF"),
             "tif": encoded(image, "TIFF"), "rgb key": encoded(keyed, "PNG", transparency=(0, 255, 0)),
             "gray key": encoded(gray, "PNG", transparency=7), "deep key": encoded(deep, "PNG", transparency=7),
             "palette bytes": encoded(palette, "PNG"),
             "palette index": encoded(keyed.quantize(2), "PNG", transparency=keyed.quantize(2).getpixel((0, 0))),
             "deep rgb key": deep_png(deep_rgb, chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3)))}
    for name, content in files.items():
        for channels in (1, 3):
            shown = decode(content, channels)
            white = 65535 if shown.dtype == torch.uint16 else 255
            assert shown.shape == (channels, 6, 8) and (shown[:, :, :4].int() == white).all(), (name, channels)
            assert (shown[:, :, 4:].int() < 0.85 * white).all(), (name, channels)
        alpha = decode(content, 4)[3].int()
        assert (alpha[:, :4] == 0).all() and (alpha[:, 4:] == white).all(), name
    half = decode(encoded(Image.new("RGBA", (1, 1), (0, 100, 255, 128)), "PNG"))
    assert half.flatten().tolist() == [127, 177, 255]  # 255 - (255 - color) * 128 / 255
    assert torch.equal(support.images.as_channels(torch.tensor([9, 8, 7, 65535], dtype=torch.uint16)[:, None, None], 3),
                       torch.tensor([9, 8, 7], dtype=torch.uint16)[:, None, None])
    assert decode(png_with(chunk(b"tRNS", bytes(3) + b"\x80\xff"), image=keyed.quantize(8))).shape == (3, 6, 8)
    large = Image.new("1", (11000, 11000))
    assert decode(encoded(large, "PNG")).shape == (3, 11000, 11000) and not recwarn.list


def test_data_endings_are_those_of_all_formats():
    """But for .pfm, of floats."""
    registered = {ending for ending, form in Image.registered_extensions().items() if form in support.images.FORMATS}
    assert registered - {".pfm"} == set(support.images.SUFFIXES) - {".mpo", ".npy"}


def mutated_files(folder: Path, n: int) -> None:
    """n image files of all formats, three of four of them damaged in some way."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)
    originals = []
    for mode, suffixes in (("RGB", ("jpg", "png", "gif", "webp", "bmp", "tif", "ppm")),
                           ("L", ("jpg", "png", "tif", "pgm")), ("CMYK", ("jpg", "tif")), ("P", ("png", "gif")),
                           ("RGBA", ("png", "webp", "tif")),
                           ("I;16", ("png", "tif"))):
        for suffix in suffixes:
            image = Image.fromarray(pixels).convert("L" if mode == "I;16" else mode)
            image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257) if mode == "I;16" else image
            file = io.BytesIO()
            image.save(file, {"jpg": "JPEG", "tif": "TIFF", "pgm": "PPM"}.get(suffix, suffix.upper()))
            originals.append((suffix, file.getvalue()))
    for i in range(n):
        suffix, content = originals[i % len(originals)]
        content = bytearray(content)
        kind, place = int(rng.integers(8)), int(rng.integers(len(content)))
        if kind == 0:
            content = content[:place]
        elif kind == 1:
            content[place] ^= 1 << rng.integers(8)
        elif kind == 2:
            content[place : place + 16] = rng.bytes(16)
        elif kind == 3:
            content = content[:place] + originals[int(rng.integers(len(originals)))][1][place:]
        elif kind == 4:
            suffix = originals[int(rng.integers(len(originals)))][0]  # a wrong extension harms nobody
        elif kind == 5 and i % 3 == 0:
            content = bytearray(rng.bytes(place) if i % 2 else b"")
        (folder / f"{i:04}.{suffix}").write_bytes(content)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("n", [400, pytest.param(2000, marks=pytest.mark.slow)])
def test_data_fuzz_damaged_files(n, tmp_path, cache):
    """No crash, no hang, no silent loss: one pass over all, with workers, reports exactly the unreadable ones."""
    (tmp_path / "p").mkdir()
    mutated_files(tmp_path / "p", n)
    source = support.sources.open_source(str(tmp_path / "p"))
    unreadable = set()
    for i in range(len(source)):
        try:
            image = source.image(i)
            assert image.dtype in (torch.uint8, torch.uint16) and len(image) == 3
        except Exception:
            unreadable.add(source.describe(i))
    assert 0.1 * n < len(unreadable) < 0.75 * n
    batches = data.TrainBatches(source, batch_size=40, group_size=40, global_size=16, local_size=8, n_local=1,
                                patch_size=8)
    bad = []
    for batch in data.train_loader(batches, 0, n // 40, num_workers=2, pin_memory=False):
        assert batch.global_crops.shape == (80, 16, 16, 3)
        bad += batch.bad
    assert {name for name, why in bad} == unreadable and all(why for name, why in bad)
    assert len(bad) > len(unreadable)  # a replacement may be bad, too


def fuzz_originals() -> dict[str, list[bytes]]:
    """Small files of every format, with what decoders stumble over: orientation, text, palettes, pages, 16 bits."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
    rgba = Image.fromarray(rng.integers(0, 256, (20, 24, 4), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, (20, 24), dtype=np.uint16))
    pages = dict(save_all=True, append_images=[rgb.transpose(Image.Transpose.ROTATE_180)] * 4)
    exif = exif_data(6, "<")
    text = [chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(99))), chunk(b"eXIf", exif_data(6, ">")[6:])]
    deep_rgb = rng.integers(0, 65536, (20, 24, 3), dtype=np.uint16)
    files = {"jpeg": [encoded(rgb, "JPEG", exif=exif), encoded(rgb, "JPEG", progressive=True),
                      encoded(rgb.convert("L"), "JPEG"), encoded(rgb.convert("CMYK"), "JPEG")],
             "png": [png_with(*text, image=image) for image in (rgb, rgba, rgba.quantize(9), rgb.convert("1"))] +
             [encoded(rgb, "PNG", **pages)],
             "png16": [png_with(*text, image=deep), deep_png(deep_rgb, *text)],
             "gif": [encoded(rgb, "GIF", **pages), encoded(rgba, "GIF")],
             "bmp": [encoded(image, "BMP") for image in (rgb, rgba, rgb.convert("P"), rgb.convert("1"))],
             "tiff": [encoded(rgb, "TIFF", compression=c, **more) for c in (None, "tiff_lzw", "tiff_deflate", "jpeg")
                      for more in ({}, pages)] + [encoded(rgba, "TIFF"), encoded(deep, "TIFF"),
                                                    deep_tiff(deep_rgb, ">"), tiff_tile(16)],
             "webp": [encoded(rgb, "WEBP", exif=exif), encoded(rgba, "WEBP", lossless=True),
                      encoded(rgb, "WEBP", **pages)],
             "avif": [encoded(rgb, "AVIF", exif=exif), encoded(rgba, "AVIF")],
             "ppm": [encoded(rgb, "PPM"), encoded(deep, "PPM"), b"P3 2 2 9 " + b"1 2 3 " * 4, b"P1 3 2 0 1 0 1 0 1"]}
    arrays = [io.BytesIO(), io.BytesIO()]
    np.save(arrays[0], np.asarray(rgb))
    np.save(arrays[1], np.asarray(deep))
    files["npy"] = [array.getvalue() for array in arrays]
    files["gz"] = [gzip.compress(files[name][0]) for name in ("jpeg", "png", "bmp", "npy")]
    return files


def damaged(content: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    """Cut off, or with flipped bits, foreign bytes or huge numbers, mostly near the start, where headers are. The
    checksums of most PNGs are made right again, so that the damage gets past them."""
    content = bytearray(content)
    for i in rng.integers(0, 99, size=int(rng.integers(1, 4))):
        place = int(rng.integers(min(len(content), 200) if rng.random() < 0.7 else len(content)))
        kind = int(rng.integers(6))
        if kind == 0:
            content = content[: place + 1]
        elif kind == 1:
            content[place] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            content[place : place + 8] = rng.bytes(8)
        elif kind == 3:
            n = int(rng.integers(1, 5))
            content[place : place + n] = (b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", bytes(4))[i % 4][:n]
        elif kind == 4:
            content[place:place] = content[place : place + int(rng.integers(1, 99))]
        else:
            content = content[:place] + others[int(rng.integers(len(others)))][place:] or content
    if content[:8] == b"\x89PNG\r\n\x1a\n" and rng.random() < 0.8:
        at = 8
        while at + 12 <= len(content):
            n = int.from_bytes(content[at : at + 4], "big")
            if at + 12 + n <= len(content):
                content[at + 8 + n : at + 12 + n] = zlib.crc32(content[at + 4 : at + 8 + n]).to_bytes(4, "big")
            at += 12 + n
    return bytes(content)


def fuzz(name: str, n: int, originals: dict[str, list[bytes]]) -> None:
    """Decodes n damaged files in this process, which is to survive, in bounded memory and time."""
    support.images.MAX_PIXELS = 2**22
    rng = np.random.default_rng(sorted(originals).index(name))
    others = [content for contents in originals.values() for content in contents]
    for content in others:  # all is loaded, then
        for channels in (1, 3, 4, 5):
            with contextlib.suppress(Exception):
                decode(content, channels)
    before, read = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for i in range(n):
        content = originals[name][i // 2 % len(originals[name])]
        inside = name == "gz" and i % 2
        content = damaged(gzip.decompress(content) if inside else content, others, rng)
        start, image = time.monotonic(), None
        with contextlib.suppress(Exception):
            image = decode(gzip.compress(content, 1) if inside else content, int(rng.choice((3, 1, 4, 5))))
        if image is not None:
            assert image.dtype in (torch.uint8, torch.uint16) and image.numel()
            read += 1
        if time.monotonic() - start > 5:
            os._exit(77)
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    print(f"{name}: {read} of {n} read, {growth} MB more")
    os._exit(78 if growth > 300 else 0 if 0 < read < 0.98 * n else 79)


@pytest.mark.parametrize("n", [60, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["jpeg", "png", "png16", "gif", "bmp", "tiff", "webp", "avif", "ppm", "npy", "gz"])
def test_data_fuzz_every_format(n, name):
    """Every damaged file is decoded or raises an exception: no crash, no hang, no more memory than its pixels need."""
    process = multiprocessing.get_context("fork").Process(target=fuzz, args=(name, n, fuzz_originals()))
    process.start()
    process.join()
    assert process.exitcode == 0, {77: "seconds for a file", 78: "memory", 79: "all or none read"}


def test_data_fit_brings_images_to_multiples_of_the_patch():
    """Where a pixel goes is what PatchFit says; padding has the mean color; sizes that are given are kept."""
    image = torch.zeros(3, 40, 90, dtype=torch.uint8)
    image[:, 20:24, 60:64] = 255  # a square whose middle is (62, 22)
    for how, size, canvas in (("crop", (), (28, 84)), ("pad", (), (42, 98)), ("resize", (), (42, 84)),
                              ("crop", (80,), (70, 168)), ("pad", (80,), (84, 182)), ("resize", (80,), (84, 182)),
                              *((how, (56, 70), (56, 70)) for how in ("crop", "pad", "resize"))):
        fit = support.images.plan_fit(40, 90, 14, how, size)
        out = support.images.fit_image(image, fit, data.MEAN)
        assert out.shape[1:] == fit.canvas == canvas and out.dtype == torch.uint8
        x, y = fit.left + 62 * fit.scaled[1] / 90, fit.top + 22 * fit.scaled[0] / 40
        if 0 <= x < canvas[1]:
            bright = (out[0].float() * (torch.arange(canvas[1]) - x).abs().lt(20)).clamp(min=130) - 130
            ys, xs = torch.meshgrid(*(torch.arange(n) + 0.5 for n in canvas), indexing="ij")
            assert abs((bright * xs).sum() / bright.sum() - x) < 1 and abs((bright * ys).sum() / bright.sum() - y) < 1
        if how == "pad":
            assert out[:, 0, 0].tolist() == [124, 116, 104]
    deep = support.images.fit_image(image.to(torch.uint16) * 257, support.images.plan_fit(40, 90, 14, "pad"), data.MEAN)
    assert deep.dtype == torch.uint16 and deep[0, 0, 0] == round(0.485 * 65535)
    for hw, args, text in (((10, 90), (), "10x90 pixels is less than one patch of 14x14"),
                           ((40, 90), ("crop", (50, 70)),
                            "size 50 is not a multiple of the patch size 14; the nearest is 56")):
        with pytest.raises(ValueError, match=text):
            support.images.plan_fit(*hw, 14, *args)
    assert support.images.plan_fit(10, 90, 14, "pad").canvas == (14, 98)
