import gzip
import io
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import data
import support.evaluation
import support.images
import support.sources
from tests.common import assert_close, png, write_images


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
    monkeypatch.setattr(torchvision.io, "decode_jpeg", lambda *args, **kwargs: pytest.fail("decoded"))
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
    monkeypatch.setattr(support.images, "MAX_BYTES", 10**6)
    (tmp_path / "zip.jpg").write_bytes(gzip.compress(png(1) + bytes(10**7)))
    assert load(tmp_path / "zip.jpg").shape == (3, 8, 8)  # of which no more was unpacked than the bound


def test_data_decodes_without_torchvision_too(tmp_path, monkeypatch):
    """torchvision 0.29 announces that its decoders will go; Pillow takes over."""
    write_images(tmp_path, ["a.jpg"])
    image = load(tmp_path / "a.jpg")
    monkeypatch.delattr(torchvision.io, "decode_jpeg")
    monkeypatch.delattr(torchvision.io, "ImageReadMode")
    assert_close(load(tmp_path / "a.jpg").float(), image.float(), 2)


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
