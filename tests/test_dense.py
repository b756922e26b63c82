import itertools
import json
import math
import os
import random
import re
import shutil
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import eval_dense
import heads
import hub
import mask2former
import model
from tests.common import (M2F_TINY, Launched, assert_close, exit_code, fill_by_names, golden_dense, photographs,
                          pixels_of, results, same, size_of)


def dense(*argv) -> dict:
    return eval_dense.main([str(a) for a in argv])


def put(path: Path, pixels, palette: bool = False) -> Path:
    """A file of an array, by its suffix; with `palette` an indexed PNG in the colors of VOC."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, pixels)
    else:
        picture = Image.fromarray(np.asarray(pixels))
        if palette:
            picture.putpalette([c for color in heads.colors(256) for c in color])
        picture.save(path)
    return path


def noise(seed: int, *shape: int, high: int = 256, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape, dtype=dtype)


@pytest.fixture(scope="session")
def dense_pairs(tmp_path_factory) -> Path:
    """18 pieces, 48 x 64, of scikit-learn's two photographs, 14 to train with. Depth: 1 m and 6 m times the smoothed
    brightness; classes: the thirds of that brightness."""
    root, pieces = tmp_path_factory.mktemp("pairs"), []
    for photo in photographs():
        small = np.asarray(Image.fromarray(photo.permute(1, 2, 0).numpy()).resize((213, 142), Image.BOX))
        pieces += [small[y : y + 48, x : x + 64] for y in (0, 48, 94) for x in (0, 64, 128)]
    bright = torch.from_numpy(np.stack(pieces)).float().mean(-1, keepdim=True).movedim(-1, 1) / 255
    pad = torch.nn.functional.pad(bright, [4] * 4, mode="replicate")
    bright = torch.nn.functional.avg_pool2d(pad, 9, 1)[:, 0].numpy()
    thirds = np.digitize(bright, np.quantile(bright, [1 / 3, 2 / 3]))
    for i, piece in enumerate(pieces):
        end = f"{'val' if i % 4 == 3 else 'train'}/{i:02d}.png"
        put(root / "images" / end, piece)
        put(root / "depth" / end, (1000 + 6000 * bright[i]).round().astype(np.uint16))
        put(root / "labels" / end, thirds[i].astype(np.uint8))
    (root / "classes.txt").write_text("dark\nmiddling\n\nbright\n")
    return root


@pytest.fixture
def dense_vit(desk) -> Path:
    """A small backbone with random weights, in a folder of its own."""
    torch.manual_seed(0)
    vit = model.build("vit_nano", patch_size=8, img_size=32)
    (desk / "model").mkdir()
    torch.save(vit.state_dict(), desk / "model/vit.pth")
    return desk / "model/vit.pth"


QUICK = ("--num-workers", 0, "--device", "cpu", "--eval-every", 2, "--steps", 4, "--batch-size", 4, "--crop", 32, 32)
TASKS = {"depth": ("--task", "depth"), "seg": ("--task", "seg", "--short", 32)}


# Measures


def test_eval_dense_depth_measures_golden():
    gt, pred = golden_dense["depth_metrics/gt"], golden_dense["depth_metrics/pred"]
    measures = eval_dense.depth_measures(pred[0], gt[0], (gt[0] > 0.001) & (gt[0] < 10))
    keys = set(golden_dense.keys("depth_metrics/")) - {"gt", "pred"}
    assert keys == set(eval_dense.DEPTH_MEASURES)
    for name, value in zip(eval_dense.DEPTH_MEASURES, measures):
        assert_close(value, golden_dense[f"depth_metrics/{name}"][0], 1e-5, name)


@pytest.mark.parametrize("name, size, rows, columns", [
    ("nyu", (480, 640), (45, 471), (41, 601)), ("garg", (352, 1216), (143, 349), (43, 1172)),
    ("eigen", (352, 1216), (117, 321), (43, 1172)), ("none", (5, 7), (0, 5), (0, 7)),
    ("garg", (375, 1242), (int(0.40810811 * 375), int(0.99189189 * 375)),
     (int(0.03594771 * 1242), int(0.96405229 * 1242)))])
def test_eval_dense_crops(name, size, rows, columns):
    expected = torch.zeros(size, dtype=torch.bool)
    expected[slice(*rows), slice(*columns)] = True
    assert torch.equal(eval_dense.crop_of(torch.ones(size), name), expected)


def plain_depth(p: np.ndarray, d: np.ndarray) -> dict[str, float]:
    """The measures of one image's known pixels, as they are written in the papers."""
    p, d = p.astype(np.float64), d.astype(np.float64)
    worse, e = np.maximum(p / d, d / p), np.log(p) - np.log(d)
    return dict(a1=np.mean(worse < 1.25), a2=np.mean(worse < 1.25**2), a3=np.mean(worse < 1.25**3),
                abs_rel=np.mean(abs(p - d) / d), sq_rel=np.mean((p - d) ** 2 / d), rmse=np.sqrt(np.mean((p - d) ** 2)),
                rmse_log=np.sqrt(np.mean(e**2)), log_10=np.mean(abs(np.log10(p) - np.log10(d))), silog=100 * np.std(e))


def test_eval_dense_depth_summary_is_a_mean_over_images():
    """Not over pixels; images without a known pixel are left out."""
    rng, table, expected = np.random.default_rng(0), [], []
    for n_known in (1, 100, 0, 7):
        p, d = (torch.from_numpy(rng.uniform(0.5, 9, (10, 12)).astype(np.float32)) for _ in range(2))
        valid = torch.arange(120).view(10, 12) < n_known
        table.append(eval_dense.depth_measures(p, d, valid))
        if n_known:
            expected.append(plain_depth(p[valid].numpy(), d[valid].numpy()) | dict(d=d[valid].double().numpy()))
    result = eval_dense.depth_summary("x", torch.stack(table))
    for name in eval_dense.DEPTH_MEASURES:
        assert result[name] == pytest.approx(np.mean([e[name] for e in expected]), abs=1e-6), name
    middle = np.mean([e["d"].mean() for e in expected])
    constant = dict(depth=middle, rmse=np.mean([np.sqrt(np.mean((e["d"] - middle) ** 2)) for e in expected]))
    assert result["images_left_out"] == 1 and result["constant_everywhere"] == pytest.approx(constant)
    with pytest.raises(ValueError, match="no image of x has a pixel with a depth in the evaluated range"):
        eval_dense.depth_summary("x", torch.stack(table[2:3]))


def test_eval_dense_segmentation_measures_equal_confusion_matrix():
    """Also of images of several sizes; class 4 occurs nowhere, 5 is predicted alone, 6 never predicted."""
    from sklearn.metrics import confusion_matrix
    rng, counts, matrix = np.random.default_rng(1), torch.zeros(3, 7, dtype=torch.int64), np.zeros((7, 7), int)
    for shape in ((9, 14), (20, 5), (3, 3)):
        labels, answers = rng.choice([0, 1, 2, 3, 6, 255], shape), rng.choice([0, 1, 2, 3, 5], shape)
        answers = np.where(rng.random(shape) < 0.5, np.where(labels > 3, 0, labels), answers)
        counts += eval_dense.count_labels(torch.from_numpy(answers), torch.from_numpy(labels.astype(np.uint8)), 7)
        known = labels != 255
        matrix += confusion_matrix(labels[known], answers[known], labels=range(7))
    result = eval_dense.segmentation_summary("x", counts)
    right, labeled, answered = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    iou = [100 * r / (a + b - r) if a + b else None for r, a, b in zip(right, labeled, answered)]
    assert [None if v is None else round(v, 4) for v in iou] == result["IoU"]
    assert iou[4] is None and iou[5] == iou[6] == 0
    assert result["mIoU"] == pytest.approx(np.mean([v for v in iou if v is not None]))
    assert result["aAcc"] == pytest.approx(100 * right.sum() / matrix.sum())
    assert result["mAcc"] == pytest.approx(np.mean([100 * right[k] / labeled[k] for k in range(7) if labeled[k]]))


# Data sets on disk


def test_eval_dense_nyu_on_disk(tmp_path):
    for i in range(3):
        put(tmp_path / f"room_{i}/rgb_{i}.png", noise(i, 6, 8, 3))
        put(tmp_path / f"room_{i}/sync_depth_{i}.png", noise(i, 6, 8, high=9000, dtype=np.uint16) * (i < 2))
    line = "{0}room_{1}/rgb_{1}.png {0}room_{1}/sync_depth_{1}.png 518.8579\n"
    (tmp_path / "nyu_train.txt").write_text(line.format("/", 1) + "\n" + line.format("", 0))
    (tmp_path / "nyu_test.txt").write_text(line.format("/", 2))
    pairs, val = (eval_dense.open_pairs(str(tmp_path), "depth", split) for split in ("TRAIN", "VAL"))
    assert (pairs.dataset, len(pairs), len(val)) == ("nyu", 2, 1)
    assert [Path(p).name for item in pairs.items for p in item] == [
        "rgb_0.png", "sync_depth_0.png", "rgb_1.png", "sync_depth_1.png"]
    image, depth = pairs[0]
    assert torch.equal(image, torch.from_numpy(noise(0, 6, 8, 3)).permute(2, 0, 1))
    assert_close(depth, noise(0, 6, 8, high=9000, dtype=np.uint16) / 1000, 1e-6)
    assert not val[0][1].any()
    (tmp_path / "nyu_test.txt").unlink()
    with pytest.raises(ValueError, match=r"nyu_test.txt' cannot be read \(No such file"):
        eval_dense.open_pairs(str(tmp_path), "depth", "VAL")
    for text, says in (("a b 1\n", "names 2 files that do not exist, the first: .*/a$"), ("\n", "names no pairs"),
                       ("a\n", "has a line 'a'; lines must be `photo depth focal`")):
        (tmp_path / "nyu_train.txt").write_text(text)
        with pytest.raises(ValueError, match=f"nyu_train.txt {says}"):
            eval_dense.open_pairs(str(tmp_path), "depth", "TRAIN")


def test_eval_dense_kitti_on_disk(tmp_path):
    """Rows without a depth are left out; of photograph and depth the lowest 352 rows and the middle 1216 columns are
    taken."""
    y, x = np.mgrid[:375, :1242]
    put(tmp_path / "input/day/drive/image_02/data/7.png", np.stack([x % 256, y % 256, x // 256], -1).astype(np.uint8))
    put(tmp_path / "gt_depth/drive/proj_depth/groundtruth/image_02/7.png", (x + 10 * y).astype(np.uint16))
    put(tmp_path / "input/small.png", noise(0, 100, 1300, 3))
    put(tmp_path / "gt_depth/small.png", noise(0, 100, 1300, dtype=np.uint16))
    (tmp_path / "kitti_eigen_train.txt").write_text("small.png small.png 1")
    (tmp_path / "kitti_eigen_test.txt").write_text(
        "day/drive/image_02/data/7.png drive/proj_depth/groundtruth/image_02/7.png 721\nday/drive/8.png None 721\n")
    pairs = eval_dense.open_pairs(str(tmp_path), "depth", "VAL")
    image, depth = pairs[0]
    assert (pairs.dataset, len(pairs), image.shape, depth.shape) == ("kitti", 1, (3, 352, 1216), (352, 1216))
    columns, rows = 256 * image[2].int() + image[0], 23 + torch.arange(352)[:, None].expand(-1, 1216)
    assert torch.equal(columns, 13 + torch.arange(1216, dtype=torch.int32).expand(352, -1))
    assert torch.equal(depth, (columns + 10 * rows) / 256)
    with pytest.raises(ValueError, match="small.png is smaller than 352x1216 pixels"):
        eval_dense.open_pairs(str(tmp_path), "depth", "TRAIN")[0]


def test_eval_dense_ade20k_on_disk(tmp_path, cache):
    raw = np.array([[0, 1, 2], [150, 255, 77]], np.uint8)
    for part in ("training", "validation"):
        put(tmp_path / f"images/{part}/a.jpg", noise(0, 2, 3, 3))
        put(tmp_path / f"annotations/{part}/a.png", raw)
    for split in ("TRAIN", "VAL"):
        pairs = eval_dense.open_pairs(str(tmp_path), "seg", split)
        assert (pairs.dataset, len(pairs), len(pairs.classes)) == ("ade20k", 1, 150)
        assert pairs[0][1].tolist() == [[255, 0, 1], [149, 255, 76]]
    raw[0, 0] = 151
    put(tmp_path / "annotations/training/a.png", raw)
    with pytest.raises(ValueError, match="annotations/training/a.png has the label 150, but there are 150 classes"):
        eval_dense.open_pairs(str(tmp_path), "seg", "TRAIN")[0]
    shutil.rmtree(tmp_path / "images/validation")
    with pytest.raises(ValueError, match="no such folder: .*images/validation"):
        eval_dense.open_pairs(str(tmp_path), "seg", "VAL")


def test_eval_dense_voc2012_on_disk(tmp_path):
    """Photographs of train and aug; the numbers of the palette are the classes."""
    labels = np.array([[0, 20], [255, 7]], np.uint8)
    for part, folder, name in (("train", "SegmentationClass", "a"), ("aug", "SegmentationClassAug", "b"),
                               ("val", "SegmentationClass", "c")):
        put(tmp_path / f"JPEGImages/{name}.jpg", noise(0, 2, 2, 3))
        put(tmp_path / folder / f"{name}.png", labels, palette=True)
        listing = tmp_path / f"ImageSets/Segmentation/{part}.txt"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text(f"{name}\n")
    assert Image.open(tmp_path / "SegmentationClass/a.png").mode == "P"
    pairs, val = (eval_dense.open_pairs(str(tmp_path), "seg", split) for split in ("TRAIN", "VAL"))
    assert [Path(p).stem for p, _ in pairs.items] == ["a", "b"] and [Path(p).stem for p, _ in val.items] == ["c"]
    assert (pairs.dataset, len(pairs.classes)) == ("voc2012", 21)
    assert all(p[i][1].tolist() == labels.tolist() for p, i in ((pairs, 0), (pairs, 1), (val, 0)))
    shutil.rmtree(tmp_path / "SegmentationClassAug")
    with pytest.raises(ValueError, match="names 1 files that do not exist, the first: .*SegmentationClassAug/b.png"):
        eval_dense.open_pairs(str(tmp_path), "seg", "TRAIN")
    (tmp_path / "ImageSets/Segmentation/aug.txt").unlink()
    assert len(eval_dense.open_pairs(str(tmp_path), "seg", "TRAIN")) == 1


def test_eval_dense_plain_folders(tmp_path, cache):
    """Parts of several names, sub-folders, deep photographs, depth as an array; folders without parts."""
    deep = noise(0, 4, 6, high=65536, dtype=np.uint16)
    meters = np.array([[1.5, np.nan, -2, np.inf, 0, 70]] * 4, np.float32)
    for part in ("training", "valid"):
        put(tmp_path / f"images/{part}/x/a.png", deep)
        put(tmp_path / f"images/{part}/b.jpg", noise(1, 4, 6, 3))
        put(tmp_path / f"depth/{part}/x/a.npy", meters)
        put(tmp_path / f"depth/{part}/b.png", deep)
        put(tmp_path / f"labels/{part}/x/a.png", np.full((4, 6), 2, np.uint8), palette=True)
        put(tmp_path / f"labels/{part}/b.npy", noise(1, 4, 6, high=2, dtype=np.int64))
    for split in ("TRAIN", "VAL"):
        pairs = eval_dense.open_pairs(str(tmp_path), "depth", split, depth_scale=500)
        read = {Path(pairs.describe(i)).name: pairs[i] for i in range(len(pairs))}
        image, depth = read["a.png"]
        assert image.dtype == torch.uint16 and image.shape == (3, 4, 6)
        assert depth.tolist() == [[1.5, 0, 0, 0, 0, 70]] * 4
        assert_close(read["b.jpg"][1], deep / 500, 1e-5)
        pairs = eval_dense.open_pairs(str(tmp_path), "seg", split)
        assert pairs.classes is None and eval_dense.count_classes(pairs) == ["class 0", "class 1", "class 2"]
    (tmp_path / "classes.txt").write_text(" one \n\ntwo\nthree")
    assert eval_dense.open_pairs(str(tmp_path), "seg", "TRAIN").classes == ["one", "two", "three"]
    flat = tmp_path / "images/training", tmp_path / "depth/training"
    for folder in flat:
        shutil.copytree(folder, tmp_path / "flat" / folder.parent.name)
    assert len(eval_dense.open_pairs(str(tmp_path / "flat"), "depth", "TRAIN")) == 2
    assert eval_dense.open_pairs(str(tmp_path / "flat"), "depth", "VAL") is None


def spoil(root: Path, what: str) -> None:
    """Something that is wrong with a copy of `dense_pairs`."""
    label, depth = root / "labels/train/00.png", root / "depth/train/00.png"
    if what == "no partner":
        label.unlink()
    elif what == "no photograph":
        put(root / "labels/train/more.png", np.zeros((4, 4), np.uint8))
    elif what == "sizes":
        put(label, np.zeros((48, 63), np.uint8))
    elif what == "colors":
        put(label, np.zeros((48, 64, 3), np.uint8))
    elif what == "label":
        put(label, np.full((48, 64), 3, np.uint8))
    elif what == "negative":
        label.unlink(), put(label.with_suffix(".npy"), np.full((48, 64), -1))
    elif what == "fractions":
        label.unlink(), put(label.with_suffix(".npy"), np.full((48, 64), 0.5))
    elif what == "damaged":
        depth.write_bytes(depth.read_bytes()[:300])
    elif what == "photograph damaged":
        (root / "images/train/00.png").write_bytes(b"none")
    elif what == "no val":
        shutil.rmtree(root / "images/val")
    elif what == "no train":
        shutil.rmtree(root / "images/train")
    elif what == "classes":
        (root / "classes.txt").write_text("\n")
    elif what in ("ignored", "all ignored"):
        (root / "classes.txt").unlink()
        for path in (root / "labels").rglob("val/*.png" if what == "ignored" else "*.png"):
            put(path, np.full((48, 64), 255, np.uint8))
    elif what == "unknown":
        for path in (root / "depth/val").iterdir():
            put(path, np.zeros((48, 64), np.uint16))


@pytest.mark.parametrize("task, what, text", [
    ("seg", "no partner", "images/train/00.* has no partner of the same name in .*labels/train"),
    ("seg", "no photograph", "labels/train/more.png has no partner of the same name in .*images/train"),
    ("seg", "sizes", "images/train/00.png has 48x64 pixels, .*labels/train/00.png has 48x63; .* the same size"),
    ("seg", "colors", r"labels/train/00.png has shape \(48, 64, 3\).* as a gray or palette PNG"),
    ("seg", "label", r"labels/train/00.png has the label 3, but there are 3 classes, 0 to 2 \(255"),
    ("seg", "negative", "labels/train/00.npy: labels must be integers >= 0, not int64 from -1"),
    ("seg", "fractions", "labels/train/00.npy: labels must be integers >= 0, not float64 from 0.5"),
    ("depth", "damaged", "depth/train/00.png cannot be read"),
    ("depth", "photograph damaged", "images/train/00.png cannot be read as an image"),
    ("seg", "no val", "has no split to evaluate on, such as images/val; name one by --val"),
    ("depth", "no train", "has no split to train on, such as images/train"),
    ("seg", "classes", "classes.txt names 0 classes; it must be 1 to 255"),
    ("seg", "ignored", "all pixels of .*VAL.* are labeled 255, which is ignored"),
    ("seg", "all ignored", "all pixels of .*TRAIN.* are labeled 255, which is ignored"),
    ("depth", "unknown", "no image of .*VAL.* has a pixel with a depth in the evaluated range")])
def test_eval_dense_wrong_data_is_named(task, what, text, dense_pairs, dense_vit, desk):
    root = Path(shutil.copytree(dense_pairs, desk / "pairs"))
    spoil(root, what)
    with pytest.raises(ValueError, match=text):
        dense(dense_vit, "--data", root, *TASKS[task], *QUICK, "--batch-size", 14)
    assert [p.name for p in dense_vit.parent.iterdir()] == ["vit.pth"]


@pytest.mark.parametrize("argv, text", [
    (("--task", "depth", "--data", "nowhere"), "no such folder: nowhere"),
    (("--task", "depth", "--data", "."), "is not a known data set for --task depth, and has no folders images/"),
    (("--task", "seg", "--data", "{depth}"), "has no folders images/ and labels/; see --help"),
    (("--task", "seg", "--decoder", "dpt"), "--decoder dpt is not for --task seg; use linear or ms"),
    (("--task", "depth", "--data", "{flat}", "--val", "{flat}"), "contains pairs of --data .*; name others"),
    (("--task", "depth", "--data", "{flat}"), "has no split to evaluate on, such as images/val; name one by --val"),
    (("--task", "seg", "--val", "{other}"), r"other \(VAL\) has other classes than .* \(TRAIN\), or in another order"),
    (("--task", "seg", "--gradient-weight", 1), "is only for --task depth"),
    (("--task", "depth", "--scales", 1), "is only for --task seg"),
    (("--task", "depth", "--steps", 0), "--steps: must be 1 or more"),
    (("--task", "depth", "--warmup", 2), "is a fraction, 0 to 1"),
    (("--task", "seg", "--ratios", 2, 1), "the smaller first"),
    (("--task", "depth", "--depth-range", 9, 1), "two positive numbers"),
    (("--task", "seg", "--head", "x", "--lr", 1), "--lr is for training, but the head is given"),
    (("--task", "depth", "--decoder", "linear4"), "--channels is only for --decoder dpt"),
    (("--task", "seg", "--depth-scale", 5), "is only for --task depth"),
    (("--task", "depth", "--predictions", "{file}"), "is a file; name a folder"),
    (("--task", "depth", "--out", "none/x"), "--out none/x cannot be written: No such file"),
    (("--task", "depth", "--device", "tpu"), "is not a device"),
    (("--task", "depth", "--head", "no.pth"), "no such dense head: no.pth"),
    (("--task", "depth", "--lr", 1e30, "--clip", 0), "predictions for .*03.png are not finite; use a smaller"),
    (("--task", "seg", "--lr", 1e30, "--steps", 9, "--eval-every", 9), "the loss of step .* is .*; use a smaller")])
def test_eval_dense_wrong_flags_are_named(argv, text, dense_pairs, dense_vit, desk):
    (desk / "file").touch()
    half = Path(shutil.copytree(dense_pairs, desk / "half"))
    shutil.rmtree(half / "labels")
    for name in ("images", "depth"):
        shutil.copytree(dense_pairs / name / "val", desk / "flat" / name)
    shutil.copytree(dense_pairs, desk / "other")
    (desk / "other/classes.txt").write_text("dark\nbright\nmiddling")
    argv = [str(a).format(other=desk / "other", flat=desk / "flat", depth=half, file=desk / "file") for a in argv]
    with pytest.raises(ValueError, match=text):
        dense(dense_vit, *([] if "--data" in argv else ["--data", dense_pairs]), *(() if "--head" in argv else QUICK),
              *(["--channels", 8] if "linear4" in argv else []), *argv)


def test_eval_dense_wrong_input_is_one_line_and_exit_code_2(dense_pairs, dense_vit, capsys):
    assert exit_code("eval_dense.py", dense_vit, "--task", "seg", "--data", "nowhere") == 2
    assert capsys.readouterr().err == "error: no such folder: nowhere\n"


# Recipes


class Coins:
    """Random numbers whose random() is as given; the others, by a seed, are noted."""

    def __init__(self, seed: int, *coins: bool):
        self.coins, self.rest, self.drawn = [0.1 if c else 0.9 for c in coins], random.Random(seed), []

    def random(self) -> float:
        return self.coins.pop(0)

    def uniform(self, low: float, high: float) -> float:
        self.drawn.append((low, high, self.rest.uniform(low, high)))
        return self.drawn[-1][2]

    def randint(self, low: int, high: int) -> int:
        return self.rest.randint(low, high)


@pytest.mark.parametrize("task, steps, warm, start", [("depth", 38400, 12800, 1e-3), ("seg", 40000, 1500, 1e-6)])
def test_eval_dense_schedules(task, steps, warm, start):
    """Those of the configurations: cosine to 1e-8, or a straight line to 0, times a linear warm-up; Adam's first beta
    0.95, 0.85 after three tenths, 0.95."""
    recipe = eval_dense.TRAINING_RECIPES["nyu" if task == "depth" else "ms"]
    assert recipe.steps == steps and recipe.start == start and recipe.warmup * steps == pytest.approx(warm)
    between = lambda a, b, share: b + (a - b) * (1 + math.cos(math.pi * share)) / 2  # noqa: E731
    bottom = int(0.3 * steps) - 1
    for t in (0, 1, 700, 1499, 1500, 5000, bottom, bottom + 1, 12799, 12800, 20000, steps - 1):
        rate = between(1, 1e-8, t / steps) if task == "depth" else 1 - t / steps
        if t < warm:
            rate *= 1 - (1 - t / warm) * (1 - start)
        beta = between(0.95, 0.85, t / bottom) if t <= bottom else between(
            0.85, 0.95, (t - bottom) / (steps - 1 - bottom))
        assert eval_dense.learning_rate(t, recipe._replace(steps=steps), task) == pytest.approx(rate, rel=1e-9)
        assert eval_dense.beta1(t, steps, task) == pytest.approx(beta if task == "depth" else 0.9, rel=1e-9)
    for short in (1, 2, 3):  # of a few steps too
        assert all(0 < eval_dense.learning_rate(t, recipe._replace(steps=short), task) <= 1 and
                   0.85 <= eval_dense.beta1(t, short, task) <= 0.95 for t in range(short))


RECIPE_ROWS = {  # steps, rate, decay, clip, crop; range of depth or short side, windows, stride, scales, ratios, flip
    ("depth", "nyu", "linear4"): (38400, 1e-4, 0.01, 35, (416, 544), (0.001, 10)),
    ("depth", "kitti", "dpt"): (38400, 1e-4, 0.01, 35, (352, 704), (0.001, 80)),
    ("depth", "", "linear"): (38400, 1e-4, 0.01, 35, (416, 500), (0.001, 10)),
    ("seg", "ade20k", "linear"): (40000, 1e-3, 1e-4, 0, (512, 512), (512, 512, 341, (1,), (0.5, 2), False)),
    ("seg", "voc2012", "linear"): (40000, 1e-3, 1e-4, 0, (512, 512), (512, 512, 341, (1,), (0.5, 2), False)),
    ("seg", "", "ms"): (40000, 1e-3, 1e-4, 0, (640, 640), (640, 640, 320, (1, 1.32, 1.73, 2.28, 3), (1, 3), True))}


@pytest.mark.parametrize("task, dataset, decoder", RECIPE_ROWS)
def test_eval_dense_default_recipes(task, dataset, decoder):
    args = eval_dense.parse(["ckpt.pth", "--task", task, "--data", "x", "--decoder", decoder])
    train = type("Photos", (), dict(dataset=dataset, __getitem__=lambda self, i: (
        None, torch.zeros(600, 1216 if dataset else 500))))()
    job = types.SimpleNamespace(args=args, task=task, train=train)
    eval_dense.DenseEvaluation.choose_recipe(job)
    r = job.recipe
    row = (r.steps, r.lr, r.weight_decay, r.clip, r.crop)
    if task == "depth":
        assert RECIPE_ROWS[task, dataset, decoder] == (*row, job.limits) and job.test is None
    else:
        t = job.test
        assert RECIPE_ROWS[task, dataset, decoder] == (*row, (t.short, t.crop, t.stride, t.ratios, job.ratios, t.flip))
    assert args.batch_size == 16 and args.gradient_weight == 0 and args.channels == 256


def test_eval_dense_training_follows_its_recipe(dense_pairs, dense_vit, monkeypatch):
    """Rates and betas that the optimizer gets, norms of gradients, sizes of photographs in training."""
    seen, norms, step, augment = [], [], torch.optim.AdamW.step, eval_dense.augment_labels

    def noted(self, *a):
        seen.extend((g["lr"], *g["betas"], g["weight_decay"]) for g in self.param_groups)
        norms.append(math.sqrt(sum(p.grad.square().sum() for g in self.param_groups for p in g["params"])))
        return step(self, *a)
    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    flags = (*QUICK, "--steps", 10, "--eval-every", 10, "--batch-size", 2)
    dense(dense_vit, "--data", dense_pairs, "--task", "depth", *flags, "--lr", 0.5, "--weight-decay", 0.25, "--clip",
          1e-3, "--warmup", 0.4)
    recipe = eval_dense.DEPTH._replace(steps=10, warmup=0.4)
    assert seen == [(0.5 * eval_dense.learning_rate(t, recipe, "depth"), eval_dense.beta1(t, 10, "depth"),
                     0.999, 0.25) for t in range(10)]
    assert max(norms) < 1.001e-3
    sizes = []
    monkeypatch.setattr(eval_dense, "augment_labels", lambda *a, **k: sizes.append(k) or augment(*a, **k))
    for decoder, long in (("linear", 4 * 20), ("ms", 99999999)):
        dense(dense_vit, "--data", dense_pairs, "--task", "seg", "--decoder", decoder, *flags, "--steps", 1,
              "--short", 20)
        assert sizes[-1] == dict(short=20, long=long, ratios=eval_dense.RATIOS[decoder])


def coordinates(height: int, width: int, dtype=torch.uint16) -> torch.Tensor:
    """A photograph whose first two channels are column and row, times 64."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (64 * torch.stack([columns, rows, columns])).to(dtype)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("dataset, size, crop", [("", (60, 90), (40, 50)), ("nyu", (480, 640), (416, 544)),
                                                 ("", (60, 90), (65, 90))])
def test_eval_dense_photograph_and_depth_stay_together(turned, mirrored, dataset, size, crop):
    photo = coordinates(*size)
    depth = (photo[0].float() + 1000 * photo[1].float()) / 64 + 1e6  # 0 is what comes from outside
    x, d = eval_dense.augment_depth(Coins(3, turned, mirrored, False), photo, depth, crop, dataset)
    assert x.shape == (3, *map(min, crop, size)) and d.shape == x.shape[1:]
    known = d > 0
    columns, rows = (d - 1e6) % 1000, ((d - 1e6) / 1000).floor()
    far = [(x[i] * 65535 / 64 - place).abs()[known] for i, place in enumerate((columns, rows))]
    if not turned:
        assert known.all() and max(f.max() for f in far) < 0.01
        assert (columns.diff(dim=1) == (-1 if mirrored else 1)).all() and (rows.diff(dim=0) == 1).all()
    else:
        assert known.float().mean() > 0.9 and (rows.diff(dim=1) != 0).any()
        assert all(f.quantile(0.97) < 0.75 for f in far)  # but for the rim, where photographs fade to 0
        angle = math.degrees(math.atan((rows[:, -9] - rows[:, 9]).median() / (columns[:, -9] - columns[:, 9]).median()))
        assert 0.2 < abs(angle) < 2.6
    if dataset == "nyu":  # the white frame is cut off
        assert columns[known].min() >= 43 and columns.max() < 608 and rows[known].min() >= 45 and rows.max() < 472


def test_eval_dense_colors_of_depth_photographs():
    """The power of values up to 255, then factors for all and for each channel; of KITTI narrower ones."""
    image = torch.from_numpy(noise(0, 3, 5, 7))
    for dataset, spread in (("nyu", 0.25), ("kitti", 0.1), ("", 0.25)):
        big = torch.nn.functional.pad(image, (43, 32, 45, 8)) if dataset == "nyu" else image
        rng = Coins(5, False, False, True)
        x, _ = eval_dense.augment_depth(rng, big, torch.ones(big.shape[1:]), (5, 7), dataset)
        ranges = [draw[:2] for draw in rng.drawn]
        assert ranges == [(0.9, 1.1), (1 - spread, 1 + spread)] + [(0.9, 1.1)] * 3
        gamma, bright, *shades = (draw[2] for draw in rng.drawn)
        expected = image.numpy().astype(np.float64) ** gamma * bright * np.reshape(shades, (3, 1, 1))
        if dataset != "nyu":
            assert_close(x, expected.clip(0, 255) / 255, 1e-5)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_eval_dense_photograph_and_labels_stay_together(mirrored, seed):
    photo, sizes = coordinates(100, 160), []
    for channel in (0, 1):  # column and row
        rng = Coins(seed, mirrored, *[False] * 5)
        labels = (photo[channel].int() // 64).to(torch.uint8)
        x, y = eval_dense.augment_labels(rng, photo, labels, (90, 90), 100, 400, (0.7, 2.0))
        assert rng.drawn[0][:2] == (0.7, 2.0) and not rng.coins
        ratio = rng.drawn[0][2]
        assert x.shape[1:] == y.shape == (min(90, int(int(100 * ratio) + 0.5)), min(90, y.shape[1]))
        assert (x[channel] * 65535 / 64 - y.float()).abs().max() < 0.5 + 1 / ratio
        slope = y.float().diff(dim=1 - channel).mean().item()
        assert slope == pytest.approx((-1 if mirrored and channel == 0 else 1) / ratio, rel=0.1)
        sizes.append(x.shape)
    assert sizes[0] == sizes[1]


def test_eval_dense_sizes_of_training_photographs():
    """Both limits times the ratio, the short side as mmcv rounds it."""
    for size, short, long, ratio, expected in (
            ((100, 160), 64, 256, 1.0, (64, 102)), ((20, 100), 64, 256, 1.0, (51, 256)),
            ((20, 100), 64, 256, 0.5, (26, 128)), ((48, 64), 32, 999, 2.0, (64, 85))):
        x, y = eval_dense.augment_labels(random.Random(0), torch.zeros(3, *size, dtype=torch.uint8),
                                         torch.zeros(size, dtype=torch.uint8), (999, 999), short, long, (ratio, ratio))
        assert x.shape == (3, *expected) and y.shape == expected


def test_eval_dense_crops_of_one_class_are_drawn_again():
    """What is ignored does not count; with no better place the tenth is taken."""
    labels = torch.zeros(64, 64, dtype=torch.uint8)
    labels[:, 32:] = 1
    labels[::2] = 255  # half of every crop
    image, shares = torch.zeros(3, 64, 64, dtype=torch.uint8), []
    for seed in range(100):
        _, y = eval_dense.augment_labels(random.Random(seed), image, labels, (32, 32), 64, 64, (1, 1))
        counts = y[y != 255].long().bincount(minlength=2)
        shares.append((counts.max() / counts.sum()).item())
    assert sum(s >= 0.75 for s in shares) <= 5 and max(shares) > 0.7  # 55 would be, of first draws
    for y in (torch.zeros_like(labels), torch.full_like(labels, 255)):
        cropped = eval_dense.augment_labels(random.Random(0), image, y, (32, 32), 64, 64, (1, 1))[1]
        assert torch.equal(cropped, y[:32, :32])


def slow_distortion(pixel, shift, gain, saturation, turn, first: bool) -> list[float]:
    import colorsys
    cut = lambda v: min(max(v, 0.0), 1.0)  # noqa: E731
    pixel = [cut(v + shift) for v in pixel]
    if first:
        pixel = [cut(v * gain) for v in pixel]
    h, s, v = colorsys.rgb_to_hsv(*pixel)
    pixel = colorsys.hsv_to_rgb((h + turn) % 1, min(s * saturation, 1), v)
    return list(pixel) if first else [cut(v * gain) for v in pixel]


@pytest.mark.parametrize("coins", [(1, 1, 1, 1, 1), (1, 0, 1, 1, 1), (0, 1, 1, 0, 0), (0, 0, 0, 1, 0), (0, 0, 0, 0, 1),
                                   (1, 0, 0, 0, 0), (0, 0, 0, 0, 0)])
def test_eval_dense_distortion_equals_slow_one(coins):
    """Also of gray pixels, black ones, and those with two equal channels."""
    brightness, first, contrast, saturation, hue = coins
    pixels = torch.cat([torch.rand(60, 3, generator=torch.Generator().manual_seed(0)), torch.eye(3), torch.zeros(1, 3),
                        torch.full((2, 3), 0.4), torch.tensor([[0.2, 0.7, 0.7], [1, 0.5, 1]])])
    for seed in range(3):
        rng = Coins(seed, *coins)
        out = eval_dense.distort(rng, pixels.T[..., None].clone())
        drawn = dict(zip([name for name, on in zip(("shift", "gain", "saturation", "turn"), (
            brightness, contrast, saturation, hue)) if on], rng.drawn))
        for name, low, high in (("shift", -32 / 255, 32 / 255), ("gain", 0.5, 1.5), ("saturation", 0.5, 1.5),
                                ("turn", -18 / 180, 18 / 180)):
            assert name not in drawn or drawn[name][:2] == pytest.approx((low, high))
        values = {k: drawn[k][2] if k in drawn else off for k, off in (
            ("shift", 0), ("gain", 1), ("saturation", 1), ("turn", 0))}
        expected = torch.tensor([slow_distortion(p, **values, first=bool(first)) for p in pixels.tolist()])
        assert_close(out[..., 0].T, expected, 1e-5)
    gray = eval_dense.distort(Coins(0, 1, 1, 1, 1, 1), torch.rand(1, 4, 4))
    assert gray.shape == (1, 4, 4) and 0 <= gray.min() and gray.max() <= 1


def test_eval_dense_samples_go_by_their_number(dense_pairs, cache):
    """Whatever the step, the size of the batch and the number of processes; what a crop lacks is 0 in the photograph,
    unknown in the target. Of every pass each photograph comes once."""
    for task, augment, absent in (("depth", eval_dense.augment_depth, 0), (
            "seg", partial(eval_dense.augment_labels, short=40, long=99, ratios=(1, 1)), 255)):
        pairs = eval_dense.open_pairs(str(dense_pairs), task, "TRAIN")
        make = partial(eval_dense.TrainPairs, pairs, augment, (60, 70), seed=0, mean=data.MEAN, std=data.STD)
        four, two = make(batch_size=4), make(batch_size=2)
        images, targets = four[1]
        assert images.shape == (4, 3, 60, 70) and targets.shape == (4, 60, 70)
        later, earlier = two[3], two[2]
        assert all(torch.equal(x, torch.cat([a, b])) for x, a, b in zip((images, targets), earlier, later))
        assert not torch.equal(make(batch_size=4, seed=1)[1][0], images)
        height, width = (48, 64) if task == "depth" else (40, 53)
        for part, value in ((images, 0), (targets, absent)):
            assert (part[..., height:, :] == value).all() and (part[..., width:] == value).all()
        assert sorted(pairs.pick(s, 0) for s in range(14)) == list(range(14))


# Training


TRAINED_HEADS = {  # flags; part of a constant's, or the commonest class's, errors that is left at most
    "depth linear": ("--task", "depth", "--steps", 130, "--lr", 0.03, "--batch-size", 2, "--crop", 32, 32),
    "depth dpt": ("--task", "depth", "--decoder", "dpt", "--channels", 8, "--steps", 70, "--lr", 0.01,
                  "--batch-size", 2, "--crop", 16, 24),
    "seg linear": ("--task", "seg", "--steps", 50, "--lr", 0.05, "--batch-size", 4, "--short", 48, "--crop", 48, 48),
    "seg ms": ("--task", "seg", "--decoder", "ms", "--steps", 50, "--lr", 0.05, "--batch-size", 4, "--short", 48,
               "--crop", 48, 48, "--scales", 1, 1.5)}


@pytest.mark.parametrize("kind", TRAINED_HEADS)
def test_eval_dense_training_learns(kind, dense_pairs, dense_vit, monkeypatch):
    """Depth and classes of pieces of photographs that are not trained with, from a network with random weights; against
    what can be said without looking."""
    if kind == "depth dpt":  # which is slow: without the 100 steps that only learn the mean
        monkeypatch.setattr(eval_dense, "sig_loss", lambda *a, warm_up: heads.sig_loss(*a))
    result = dense(dense_vit, "--data", dense_pairs, "--num-workers", 0, *TRAINED_HEADS[kind], "--eval-every", 70)
    task = kind.split()[0]
    folder = dense_pairs / ("depth" if task == "depth" else "labels") / "val"
    targets = [pixels_of(p) for p in sorted(folder.iterdir())]
    if task == "depth":
        middle = np.mean([t.mean() for t in targets]) / 1000
        constant = dict(depth=middle, rmse=np.mean([np.sqrt(np.mean((t / 1000 - middle) ** 2)) for t in targets]))
        assert result["constant_everywhere"] == pytest.approx(constant, rel=1e-6)
        assert result["rmse"] < 0.7 * constant["rmse"] and result["abs_rel"] == min(v for _, v in result["curve"])
    else:
        most = 100 * np.bincount(np.concatenate(targets).ravel(), minlength=3).max() / sum(t.size for t in targets)
        assert result["commonest_class_everywhere"] == pytest.approx(dict(aAcc=most, mIoU=most / 3))
        assert result["aAcc"] > 80 > most + 20 and result["mIoU"] > 60 and result["mIoU"] == result["curve"][-1][1]


def test_eval_dense_batches_are_means_over_pairs(dense_pairs, dense_vit, monkeypatch):
    """The gradient of four photographs is the mean of those of two and two, each with a loss of its own."""
    seen, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: seen.append(
        torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]])) or step(self))
    flags = [dense_vit, "--data", dense_pairs, *QUICK, *TASKS["depth"], "--lr", 1e-30, "--clip", 0, "--eval-every", 9]
    result = dense(*flags, "--steps", 1, "--batch-size", 4)
    dense(*flags, "--steps", 2, "--batch-size", 2)
    assert_close(seen[0], (seen[1] + seen[2]) / 2, 1e-6)
    assert seen[1].abs().max() > 1e-3 < (seen[1] - seen[2]).abs().max() and result["curve"][0][0] == 1


def test_eval_dense_batch_statistics_equal_those_of_pytorch():
    """Of groups together, as in training mode on all at once; outside of it the running ones count."""
    torch.manual_seed(0)
    ours, theirs = torch.nn.BatchNorm2d(6).eval(), torch.nn.BatchNorm2d(6).train()
    for _ in range(3):
        groups = [[(3 + 2 * torch.randn(2, 4, 5, 7), None), (torch.randn(2, 2, 5, 7), None)] for _ in range(3)]
        whole = [torch.cat([patches for patches, _ in group], 1) for group in groups]
        finish = eval_dense.batch_statistics(ours, groups)
        with torch.no_grad():
            assert_close(torch.cat([ours(x) for x in whole]), theirs(torch.cat(whole)), 1e-5)
        finish()
        for name, value in theirs.state_dict().items():
            assert_close(ours.state_dict()[name], value, 1e-5, name)


def remember_listings_at(folder: Path) -> None:
    os.environ["XDG_CACHE_HOME"] = str(folder)


def head_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.parametrize("kind", ["depth linear", "seg ms"])
def test_eval_dense_two_processes_and_resuming_equal_one(kind, dense_pairs, dense_vit, cache, monkeypatch, capsys):
    """One process, two, and one that is interrupted after a save: the same head, the same measures."""
    task, decoder = kind.split()
    flags = [*QUICK, "--task", task, "--decoder", decoder, "--data", dense_pairs, "--lr", 0.01, "--warmup", 0.25,
             *(["--short", 32, "--scales", 1] if task == "seg" else [])]
    file, folder = f"vit.{task}_{decoder}_head.pth", dense_vit.parent
    alone = dense(dense_vit, *flags)
    (head,) = [head_of(folder / file)]
    shutil.copytree(folder, folder.parent / "two")
    Launched(folder.parent / "log", eval_dense.main, folder.parent / "two/vit.pth", *flags, world=2,
             before=partial(remember_listings_at, cache)).wait()
    one, two = results(folder.parent / "two/vit", "dense")
    other = head_of(folder.parent / "two" / file)
    assert one["processes"] == 1 and two["processes"] == 2 and one["result"] == json.loads(json.dumps(alone))
    for key, value in head.items():
        assert_close(other[key].double(), value.double(), 2e-5 * max(1, value.abs().max().item()), key)
    for key in ("rmse", "abs_rel") if task == "depth" else ("mIoU", "aAcc"):
        assert two["result"][key] == pytest.approx(alone[key], rel=1e-3), key
    assert two["result"]["curve"][0] == [2, pytest.approx(alone["curve"][0][1], rel=1e-3)]
    if task == "seg":
        assert head["decode_head.bn.num_batches_tracked"] == 4

    evaluate, calls = eval_dense.evaluate_dense, []

    def interrupted(job, predictions=""):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(job, predictions)
    monkeypatch.setattr(eval_dense, "evaluate_dense", interrupted)
    start = dense_vit.rename(folder.parent / "again.pth")
    with pytest.raises(KeyboardInterrupt):
        dense(start, *flags)
    assert len(list(folder.parent.glob("*.resume"))) == 1
    again = dense(start, *flags)
    assert "resuming after step 2 of 4" in capsys.readouterr().err and len(calls) == 3
    assert {k: v for k, v in again.items() if k != "head"} == {k: v for k, v in alone.items() if k != "head"}
    assert same(head, head_of(folder.parent / file.replace("vit", "again")))
    assert not list(folder.parent.rglob("*.resume"))


def test_eval_dense_resumes_only_what_is_its_own(dense_pairs, dense_vit, monkeypatch, capsys):
    """Other flags start anew; a save that is damaged is named; --no-resume does without."""
    evaluate = eval_dense.evaluate_dense
    saves = lambda: sorted(dense_vit.parent.glob("*.resume"))  # noqa: E731

    def interrupted(job):
        if len(saves()) > n_before and not job.args.no_resume:
            raise KeyboardInterrupt
        return evaluate(job)
    monkeypatch.setattr(eval_dense, "evaluate_dense", interrupted)
    flags = [dense_vit, *QUICK, *TASKS["depth"], "--data", dense_pairs]
    for n_before, argv in enumerate(([], ["--lr", 0.5], ["--seed", 1], ["--no-flip"], ["--eval-crop", "garg"],
                                     ["--depth-range", 1, 7])):
        with pytest.raises(KeyboardInterrupt):
            dense(*flags, *argv)
        assert "resuming" not in capsys.readouterr().err and len(saves()) == n_before + 1, argv
    first, *others = sorted(saves(), key=lambda path: path.stat().st_mtime_ns)
    for path in others:
        path.unlink()
    n_before = 0
    with pytest.raises(KeyboardInterrupt):
        dense(*flags)
    assert "resuming after step 2" in capsys.readouterr().err and saves() == [first]
    good = saves()[0].read_bytes()
    for damaged in (good[: len(good) // 2], b"", b"x" * 99):
        saves()[0].write_bytes(damaged)
        with pytest.raises(ValueError, match=r"\.resume is damaged; remove it to start from scratch"):
            dense(*flags)
    for state in (dict(head={}), [1, 2], dict(head=None, optimizer=None)):
        torch.save(state, saves()[0])
        with pytest.raises(ValueError, match=r"\.resume is damaged; remove it to start from scratch"):
            dense(*flags)
    dense(*flags, "--no-resume")
    assert not saves()


def test_eval_dense_best_head_survives_an_interruption(dense_pairs, dense_vit, monkeypatch):
    """In depth the best so far is kept, though the later ones are worse."""
    evaluate, errors = eval_dense.evaluate_dense, [-1, None, 5]

    def scripted(job):
        if (error := errors.pop(0)) is None:
            raise KeyboardInterrupt
        return evaluate(job) | dict(abs_rel=error)
    monkeypatch.setattr(eval_dense, "evaluate_dense", scripted)
    flags = [dense_vit, *QUICK, *TASKS["depth"], "--data", dense_pairs]
    with pytest.raises(KeyboardInterrupt):
        dense(*flags)
    (save,) = dense_vit.parent.glob("*.resume")
    best = {f"decode_head.{k}": v for k, v in torch.load(save, weights_only=True)["weights"].items()}
    result = dense(*flags)
    assert result["abs_rel"] == -1 and result["curve"] == [(2, -1), (4, 5)]
    assert same(best, head_of(Path(result["head"])))


# The head, and what else comes out


def observed_predictions(network, about, pairs, flip=True):
    """Of each image of --val: what the network of the hub predicts, and the target."""
    for i in range(len(pairs)):
        image, target = pairs[i]
        if about.task == "seg":
            yield heads.segment(network, image, about.recipe).argmax(0).numpy(), target.numpy()
        else:
            x = data.normalize(data.to_float(image[None]))
            yield heads.estimate_depth(network, x, flip)[0, 0].numpy(), target.numpy()


@pytest.mark.parametrize("kind", ["depth linear", "depth dpt", "seg linear"])
def test_eval_dense_head_is_one_of_the_hub(kind, dense_pairs, dense_vit, desk, capsys):
    """What is written gives by the hub the predictions that were counted, and the same figures by --head."""
    task, decoder = kind.split()
    own = [*(["--channels", 8] if decoder == "dpt" else []), *(["--depth-range", 1.5, 4] if task == "depth" else
                                                                ["--short", 32, "--crop", 24, 24, "--flip"])]
    result = dense(dense_vit, *QUICK, "--task", task, "--decoder", decoder, "--data", dense_pairs, "--lr", 0.02, *own,
                   "--predictions", desk / "drawn")
    printed = capsys.readouterr().out
    file = dense_vit.with_name(f"vit.{task}_{decoder}_head.pth")
    assert result["head"] == str(file) and str(file) in printed and "vit.eval_dense.jsonl" in printed
    assert sorted(p.name for p in dense_vit.parent.iterdir()) == sorted(["vit.pth", "vit.eval_dense.jsonl", file.name])
    network, about = hub.load_dense(dense_vit, file)
    pairs = eval_dense.open_pairs(str(dense_pairs), task, "VAL")
    pairs.classes = pairs.classes or ["x"]
    seen = list(observed_predictions(network, about, pairs))
    drawn = [pixels_of(desk / "drawn" / f"{Path(pairs.describe(i)).stem}.png") for i in range(len(pairs))]
    assert len(list((desk / "drawn").iterdir())) == len(pairs) + 1 and size_of(desk / "drawn/sheet.png")[0] > 400
    if task == "depth":
        assert network.decode_head.depth_range == (1.5, 4) and about == hub.About("depth")
        known = [(t > 1.5) & (t < 4) for _, t in seen]
        assert all(0 < k.sum() < k.size for k in known)
        expected = [plain_depth(p[k], t[k]) for (p, t), k in zip(seen, known)]
        for name in eval_dense.DEPTH_MEASURES:
            assert result[name] == pytest.approx(np.mean([e[name] for e in expected]), rel=1e-4, abs=1e-5), name
        assert all(abs(d - 1000 * p).max() < 0.6 for d, (p, _) in zip(drawn, seen))
        assert Image.open(desk / "drawn/03.png").mode.startswith("I")
    else:
        assert about.classes == ["dark", "middling", "bright"] and about.colors == heads.colors(3)
        assert about.recipe == heads.Recipe(32, crop=24, stride=16, flip=True)
        right = sum((p == t).sum() for p, t in seen)
        assert result["aAcc"] == pytest.approx(100 * right / sum(t.size for _, t in seen))
        assert all((d == p).all() for d, (p, _) in zip(drawn, seen)) and Image.open(desk / "drawn/03.png").mode == "P"
    again = dense(dense_vit, "--task", task, "--data", dense_pairs, "--head", file, "--num-workers", 0, "--json")
    assert {k: result[k] for k in again} == again
    record = results(dense_vit.with_suffix(""), "dense")[-1]
    assert json.loads(capsys.readouterr().out) == record and record["protocol"]["head"] == str(file)
    assert record["data"]["val"]["images"] == 4 and "train" not in record["data"] and record["result"] == again


def test_eval_dense_heads_that_do_not_fit(dense_pairs, dense_vit, desk):
    flags = ["--data", dense_pairs, "--num-workers", 0]
    dense(dense_vit, *QUICK, *TASKS["seg"], *flags)
    file = dense_vit.with_name("vit.seg_linear_head.pth")
    torch.save(model.build("vit_nano", patch_size=8, img_size=32).state_dict(), desk / "other.pth")
    torch.save(model.build("vit_micro", patch_size=8, img_size=32).state_dict(), desk / "wide.pth")
    put(desk / "ade/images/validation/a.png", noise(0, 9, 9, 3))
    put(desk / "ade/annotations/validation/a.png", noise(0, 9, 9, high=9))
    shutil.copytree(dense_pairs, desk / "four")
    (desk / "four/classes.txt").write_text("a\nb\nc\nd")
    broken = torch.load(file, weights_only=True)
    broken["state_dict"]["decode_head.conv_seg.weight"].fill_(math.nan)
    torch.save(broken, desk / "nan.pth")
    for argv, text in (
            ((desk / "other.pth", "--task", "seg"), "trained on the features of another backbone, of the same width"),
            ((desk / "wide.pth", "--task", "seg"), "is the head of another backbone: it takes 64 channels; this one"),
            ((dense_vit, "--task", "depth"), "vit.seg_linear_head.pth is for --task seg"),
            ((dense_vit, "--task", "seg", "--data", desk / "ade"), "knows the classes of other data, not those of"),
            ((dense_vit, "--task", "seg", "--data", desk / "four"), ".*four.* has other classes than"),
            ((dense_vit, "--task", "seg", "--head", desk / "nan.pth"), "predictions for .*03.png are not finite")):
        with pytest.raises(ValueError, match=text):
            dense(argv[0], *flags, "--head", file, *argv[1:])


def test_eval_dense_on_known_data_sets(dense_vit, desk):
    """NYUv2, of which an image without a pixel that counts is left out, and ADE20K, in miniature."""
    torch.save(model.build("vit_nano", patch_size=40, img_size=80).state_dict(), dense_vit)
    for i, part in enumerate(("train", "train", "test", "test")):
        put(desk / f"nyu/{i}.jpg", noise(i, 480, 640, 3))
        depth = noise(i, 480, 640, high=9000, dtype=np.uint16)
        depth[45:471, 41:601] *= i < 3  # of the last one, all that is known is outside of the crop
        put(desk / f"nyu/{i}.png", depth)
        with open(desk / f"nyu/nyu_{part}.txt", "a") as file:
            file.write(f"/{i}.jpg /{i}.png 518.8\n")
    quick = ["--num-workers", 0, "--steps", 1, "--batch-size", 2]
    result = dense(dense_vit, "--task", "depth", "--data", desk / "nyu", *quick, "--crop", 32, 48)
    record = results(dense_vit.with_suffix(""), "dense")[-1]
    assert result["images_left_out"] == 1 and record["protocol"]["eval_crop"] == "nyu"
    assert record["protocol"]["flip"] is True and record["protocol"]["crop"] == [32, 48]
    known = pixels_of(desk / "nyu/2.png")[45:471, 41:601] / 1000
    assert result["constant_everywhere"]["depth"] == pytest.approx(known[known > 0.001].mean(), rel=1e-5)
    assert hub.load_dense(dense_vit, result["head"])[1] == hub.About("depth", "nyu")
    for part in ("training", "validation"):
        put(desk / f"ade/images/{part}/a.jpg", noise(1, 40, 50, 3))
        put(desk / f"ade/annotations/{part}/a.png", noise(2, 40, 50, high=4))
    result = dense(dense_vit, "--task", "seg", "--data", desk / "ade", *quick, "--short", 32, "--crop", 32, 32)
    share = np.bincount(noise(2, 40, 50, high=4).ravel())[1:]
    trivial = result["commonest_class_everywhere"]
    assert trivial["aAcc"] == pytest.approx(100 * share.max() / share.sum()) and len(result["IoU"]) == 150
    about = hub.load_dense(dense_vit, result["head"])[1]
    assert about.dataset == "ade20k" and about.classes == heads.CLASSES["ade20k"] and about.recipe.stride == 21
    assert about.colors == heads.colors(150, "ade20k")


# Flags


FLAGS = {  # what each is changed to, and in which of the bases below
    "task": ("depth", "seg"), "data": ("depth", "{other}"), "val": ("depth", "{other}"),
    "decoder": ("depth", "linear4"),
    "head": ("head", "{second}"), "channels": ("dpt", 4), "depth-range": ("head", 0.5, 3),
    "depth-scale": ("depth", 500), "steps": ("depth", 3), "batch-size": ("seg", 4), "lr": ("seg", 0.001),
    "weight-decay": ("seg", 0.9), "warmup": ("seg", 0.9), "clip": ("depth", 1e-4), "crop": ("seg", 24, 32),
    "short": ("seg", 40), "ratios": ("seg", 1, 1.1), "gradient-weight": ("depth", 1), "scales": ("seg", 1, 2),
    "flip": ("seg",), "no-flip": ("depth",), "eval-crop": ("depth", "garg"), "eval-every": ("depth", 1),
    "predictions": ("head", "{desk}/drawn"), "seed": ("depth", 1), "device": ("depth", "tpu"),
    "dtype": ("depth", "bf16"), "num-workers": ("depth", 1), "out": ("head", "{desk}/elsewhere"), "json": ("head",)}
ELSEWHERE_DENSE = {"no-resume"}  # a test of its own
DENSE_BASE = {
    "depth": ("--task", "depth", "--lr", 0.01, "--crop", 24, 32),
    "dpt": ("--task", "depth", "--decoder", "dpt", "--channels", 8, "--crop", 24, 32),
    "seg": ("--task", "seg", "--lr", 0.1, "--short", 32, "--crop", 32, 32),
    "head": ("--task", "depth", "--head", "{first}")}


def test_eval_dense_every_flag_has_an_effect(dense_pairs, dense_vit, desk, capsys):
    """On the figures, the head, the files or what is printed; only the number of reading processes has none."""
    with pytest.raises(SystemExit):
        eval_dense.parse(["--help"])
    flags = re.findall(r"^  --([a-z-]+)", capsys.readouterr().out, re.MULTILINE)
    assert set(flags) | {"no-flip"} == FLAGS.keys() | ELSEWHERE_DENSE
    for what, part in itertools.product(("images", "depth"), ("train", "val")):
        for name in ("01.png", "03.png") if part == "val" else ("02.png", "04.png"):
            home = "val" if name == "03.png" else "train"
            (desk / "few" / what / part).mkdir(parents=True, exist_ok=True)
            shutil.copy(dense_pairs / what / home / name, desk / "few" / what / part)
            put(desk / "other" / what / part / name, pixels_of(dense_pairs / what / home / name)[::-1].astype(
                np.uint8 if what == "images" else np.uint16))
    for part, names in (("train", ("02", "04")), ("val", ("01", "03"))):
        for name in names:
            put(desk / f"few/labels/{part}/{name}.png", noise(int(name), 48, 64, high=3) // 2 * 2)
    names = dict(desk=desk, other=desk / "other", first=desk / "first.pth", second=desk / "second.pth")
    for name, seed in (("first", 1), ("second", 2)):
        torch.manual_seed(seed)
        weights = {f"decode_head.{k}": v for k, v in heads.LinearDepthHead(64, 1).state_dict().items()}
        torch.save(dict(state_dict=weights, about=dict(task="depth", dim=64, depth_range=(0.001, 10))), names[name])

    def outcome(base: str, *argv):
        common = (dense_vit, "--data", desk / "few", "--num-workers", 0, "--device", "cpu",
                  *(() if base == "head" else ("--steps", 2, "--batch-size", 2, "--eval-every", 2)))
        try:
            result = dense(*(str(a).format(**names) for a in (*common, *DENSE_BASE[base], *argv)))
        except ValueError as error:
            return str(error)
        file = result.pop("head", None)
        weights = {k: v.double().sum().item() for k, v in head_of(Path(file)).items()} if file else {}
        found = sorted(p.name for p in desk.iterdir())
        shutil.rmtree(desk / "drawn", ignore_errors=True)
        return result, weights, found, re.sub(r"\d+\.\d+", "", capsys.readouterr().out).count("\n")
    before = {base: outcome(base) for base in DENSE_BASE}
    assert all(isinstance(v, tuple) for v in before.values()), before
    for flag, (base, *values) in FLAGS.items():
        after = outcome(base, f"--{flag}", *values)
        assert (after != before[base]) == (flag != "num-workers"), flag
        assert isinstance(after, tuple) or flag in ("device", "task"), (flag, after)


# Other photographs, networks and numbers


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("task", ["depth", "seg"])
def test_eval_dense_deep_gray_photographs_in_bf16(task, channels, dense_pairs, desk):
    """Of 16 bits, for networks of one and three channels; the same gray in 8 bits gives nearly the same."""
    torch.manual_seed(0)
    torch.save(model.build("vit_nano", patch_size=8, img_size=32, in_chans=channels).state_dict(), desk / "vit.pth")
    what, rmses = "depth" if task == "depth" else "labels", []
    for bits, factor, dtype in ((16, 257, np.uint16), (8, 1, np.uint8)):
        for part in ("train", "val"):
            for path in sorted((dense_pairs / "images" / part).iterdir()):
                put(desk / str(bits) / "images" / part / path.name, (factor * pixels_of(path)[..., 1]).astype(dtype))
        shutil.copytree(dense_pairs / what, desk / str(bits) / what)
        result = dense(desk / "vit.pth", *QUICK, "--steps", 2, "--dtype", "bf16", *TASKS[task],
                       "--data", desk / str(bits))
        rmses.append(result["rmse" if task == "depth" else "aAcc"])
    assert rmses[0] == pytest.approx(rmses[1], rel=0.02)


def test_eval_dense_of_a_network_that_holds_its_head(desk, monkeypatch):
    """Mask2Former, with a small network in its place: the figures are those of heads.segment."""
    monkeypatch.setattr(hub, "Mask2Former", type("Small", (mask2former.Mask2Former,), dict(
        __init__=lambda self: mask2former.Mask2Former.__init__(self, **M2F_TINY | dict(n_classes=150)))))
    small = fill_by_names(hub.Mask2Former())
    torch.save(dict(state_dict=small.state_dict()), desk / "m2f.pth")
    photo, labels = noise(1, 40, 50, 3), noise(2, 40, 50, high=151)
    put(desk / "ade/images/validation/a.png", photo), put(desk / "ade/annotations/validation/a.png", labels)
    result = dense(desk / "m2f.pth", "--task", "seg", "--data", desk / "ade", "--short", 32, "--num-workers", 0)
    recipe = heads.RECIPES["ade20k", "m2f"]._replace(short=32)
    answers = heads.segment(small, torch.from_numpy(photo).permute(2, 0, 1), recipe).argmax(0).numpy()
    assert result["aAcc"] == pytest.approx(100 * (answers == labels - 1.0)[labels > 0].mean())
    with pytest.raises(ValueError, match="m2f.pth is for --task seg"):
        dense(desk / "m2f.pth", "--task", "depth", "--data", desk / "ade")


# What lies beside


def test_eval_dense_folders_that_mislead(dense_pairs, dense_vit, desk):
    """Two photographs of one name, predictions into the data, files that only other programs can read."""
    shutil.copytree(dense_pairs, "mine")
    first = next(Path("mine/images/train").iterdir())
    Image.open(first).save(first.with_suffix(".bmp"))
    with pytest.raises(ValueError, match="differ only in their extensions"):
        dense(dense_vit, *QUICK, *TASKS["seg"], "--data", "mine")
    first.with_suffix(".bmp").unlink()
    before = {p: p.read_bytes() for p in Path("mine").rglob("*.png")}
    for folder in ("mine/labels/val", "mine/images/val"):
        with pytest.raises(ValueError, match=f"--predictions {folder} would overwrite {folder}/.*png, which is data"):
            dense(dense_vit, *QUICK, *TASKS["seg"], "--data", "mine", "--predictions", folder)
    assert {p: p.read_bytes() for p in Path("mine").rglob("*.png")} == before
    (desk / "mine/annotations").mkdir()  # of something else than ADE20K
    assert eval_dense.open_pairs("mine", "seg", "TRAIN").dataset == ""
    Path("eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(ValueError, match="eps.png cannot be read"):
        eval_dense.read_numbers("eps.png")
    Image.fromarray(np.full((9, 9), 100, np.uint8)).save("flat.png")
    with pytest.raises(ValueError, match="flat.png has 8 bits, too few for depth"):
        eval_dense.read_depth("flat.png", 1000)
    np.save("mm.npy", np.full((9, 9), 3000, np.uint16))
    assert (eval_dense.read_depth("mm.npy", 1000) == 3).all()
    with pytest.raises(ValueError, match="--predictions eps.png/x cannot be created in .*eps.png"):
        dense(dense_vit, *QUICK, *TASKS["seg"], "--data", "mine", "--predictions", "eps.png/x", "--out", "new.jsonl")
    assert not Path("new.jsonl").exists()  # a command that is refused leaves no empty file of results
    os.mkdir(dense_vit.with_name(f"{dense_vit.stem}.depth_linear_head.pth"))
    with pytest.raises(ValueError, match="depth_linear_head.pth cannot be written"):
        dense(dense_vit, *QUICK, *TASKS["depth"], "--data", "mine")


def test_eval_dense_frame_of_nyu_comes_off_before_scaling():
    size = eval_dense.train_size((480, 640), "nyu", 240)
    assert size == (214, 282) and eval_dense.train_size((480, 640)) == (480, 640)
    assert eval_dense.train_size((480, 640), "kitti", 120) == (120, 160)
    x, depth = eval_dense.augment_depth(random.Random(0), torch.zeros(3, 480, 640, dtype=torch.uint8),
                                        torch.ones(480, 640), (999, 999), "nyu", 240)
    assert x.shape[-2:] == depth.shape == size
