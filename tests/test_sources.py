import gzip
import io
import os
import pickle
import random
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import support.parallel
import support.sources
from support.evaluation import common_labels
from tests.common import exit_code, golden, png, write_images


def test_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    photos = tmp_path / "photos"
    write_images(photos, ["b/2.png", "a/1.jpg", "a/deep/er/0.webp", "a/ä.png"])
    (photos / "notes.txt").write_text("no image")
    source = support.sources.open_source(str(photos))
    assert [Path(source.describe(i)).name for i in range(4)] == ["1.jpg", "ä.png", "0.webp", "2.png"]
    assert source.labels.tolist() == [0, 0, 0, 1] and source.image(3).shape == (3, 40, 32)
    write_images(photos, ["a/deep/er/new.jpg"])  # the cached listing notices
    assert len(support.sources.open_source(str(photos))) == 5
    write_images(photos, ["loose.jpg"])
    assert support.sources.open_source(str(photos)).labels is None
    (photos / "a/.hidden.jpg").write_bytes(b"")
    (photos / "a/dangling.jpg").symlink_to("nowhere")
    assert support.sources.eval_specs(str(photos)) == (str(photos), None)
    assert support.sources.eval_specs("digits", str(photos)) == (str(photos), None)
    (photos / "a/deep/back").symlink_to(photos)
    (photos / "twice").symlink_to(photos / "b")
    assert len(support.sources.open_source(str(photos))) == 6  # links are followed, each folder once
    write_images(tmp_path / "split", ["train/x/1.jpg", "train/y/2.jpg", "val/x/3.jpg", "val/y/4.jpg"])
    train_spec, val_spec = support.sources.eval_specs(str(tmp_path / "split"))
    assert support.sources.eval_specs("digits", str(tmp_path / "split")) == (train_spec, val_spec)
    assert support.sources.eval_specs("digits", "digits:split=VAL") == ("digits:split=VAL", None)
    assert support.sources.eval_specs("digits", "", "x") == ("digits:split=TRAIN", "x")
    assert [len(support.sources.open_source(s)) for s in (str(tmp_path / "split"), train_spec, val_spec)] == [2, 2, 2]


def test_data_listing_is_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_images(tmp_path / "p", ["1.png", "2.png"])
    support.sources.open_source(str(tmp_path / "p"))
    monkeypatch.setattr(support.sources, "list_folder", lambda root: pytest.fail("listed again"))
    assert len(support.sources.open_source(str(tmp_path / "p"))) == 2


def test_data_imagenet(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root, extra = tmp_path / "in1k", tmp_path / "extra"
    write_images(root,
                 ["train/n01/n01_10.JPEG", "train/n01/n01_2.JPEG", "train/n02/n02_7.JPEG",
                  "val/n02/ILSVRC2012_val_00000003.JPEG"])
    listed = support.sources.open_source(f"ImageNet:split=TRAIN:root={root}")
    assert listed.labels.tolist() == [0, 0, 1]
    extra.mkdir()
    fields = [("actual_index", "<u4"), ("class_index", "<u4"), ("class_id", "U3"), ("class_name", "U3")]
    np.save(extra / "entries-TRAIN.npy",
            np.array([(10, 0, "n01", "x"), (2, 0, "n01", "x"), (7, 1, "n02", "y")], fields))
    np.save(extra / "entries-VAL.npy", np.array([(3, 1, "n02", "y")], fields))
    entries = support.sources.open_source(f"ImageNet:split=TRAIN:root={root}:extra={extra}")
    assert entries.labels.tolist() == [0, 0, 1]
    assert [Path(entries.describe(i)) for i in range(3)] == [Path(listed.describe(i)) for i in range(3)]
    train_spec, val_spec = support.sources.eval_specs(f"ImageNet:split=TRAIN:root={root}:extra={extra}")
    assert support.sources.open_source(val_spec).image(0).shape == (3, 40, 32)
    assert len(support.sources.open_source(train_spec)) == 3


def test_data_fashion_mnist_files(tmp_path, monkeypatch):
    images = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
    header = b"\0\0\x08\x03" + np.array(images.shape, ">i4").tobytes()
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(header + images.tobytes())
    with gzip.open(tmp_path / "t10k-labels-idx1-ubyte.gz", "wb") as file:
        file.write(b"\0\0\x08\x01" + np.array([2], ">i4").tobytes() + bytes([9, 4]))
    source = support.sources.open_source(f"FashionMNIST:split=VAL:root={tmp_path}")
    assert source.labels.tolist() == [9, 4] and torch.equal(source.image(1)[2], torch.from_numpy(images[1]))
    with gzip.open(tmp_path / "t10k-labels-idx1-ubyte.gz", "wb") as file:
        file.write(b"\0\0\x08\x01" + np.array([3], ">i4").tobytes() + bytes([9, 4, 1]))
    with pytest.raises(ValueError, match="2 images of FashionMNIST VAL, but 3 labels"):
        support.sources.open_source(f"FashionMNIST:split=VAL:root={tmp_path}")
    monkeypatch.setattr(support.sources, "MAX_BYTES", 1000)
    with gzip.open(tmp_path / "t10k-labels-idx1-ubyte.gz", "wb") as file:
        file.write(b"\0\0\x08\x01" + np.array([10**6], ">i4").tobytes() + bytes(10**6))  # not unpacked any further
    with pytest.raises(ValueError, match="is damaged or no idx file"):
        support.sources.open_source(f"FashionMNIST:split=VAL:root={tmp_path}")


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_data_file_list(tmp_path, cache):
    write_images(tmp_path, ["a/1.png", "b/2 x.png"])
    listed = tmp_path / "list.txt"
    listed.write_text(f"a/1.png\tcat\n\n{tmp_path}/b/2 x.png\tant\r\n")
    source = support.sources.open_source(str(listed))
    assert source.labels.tolist() == [1, 0] and source.classes == ["ant", "cat"]
    assert source.image(1).shape == (3, 40, 32)
    listed.write_text("b/2 x.png\n")
    os.utime(listed, ns=(1, 1))
    source = support.sources.open_source(str(listed))
    assert len(source) == 1 and source.labels is None
    listed.write_text("a/1.png\tcat\nb/2 x.png\na/1.png\tant\n")
    os.utime(listed, ns=(2, 2))
    source = support.sources.open_source(str(listed))
    assert source.labels.tolist() == [1, -1, 0] and source.classes == ["ant", "cat"]
    listed.write_text("a\0b")
    os.utime(listed, ns=(3, 3))
    with pytest.raises(ValueError, match="is not readable as text"):
        support.sources.open_source(str(listed))


def test_data_tar_shards(tmp_path, cache, capsys):
    """Shards of unequal length: every image once per pass, in a new order each time, each shard from front to back."""
    lengths, i = [700, 1, 0, 1500, 900], 0
    for j, n in enumerate(lengths):
        members = {}
        for k in range(n):
            members |= {f"{j}/{k:05}.cls": b"%d" % (i % 10), f"{j}/{k:05}.png": png(i)}
            i += 1
        write_tar(tmp_path / f"s-{j:03}.tar", members | {"notes.txt": b"x"})
    source = support.sources.open_source(f"{tmp_path}/s-{{000..004}}.tar:interleave=2")
    n = sum(lengths)
    assert len(source) == n and source.labels[:12].tolist() == [*range(10), 0, 1]
    assert [source.image(i)[0, 0, 0].item() for i in (0, 699, 701, n - 1)] == [i % 256 for i in (0, 699, 701, n - 1)]
    passes = [[source.pick(epoch * n + s, seed=5) for s in range(n)] for epoch in range(3)]
    assert all(sorted(order) == list(range(n)) for order in passes) and passes[0] != passes[1] != passes[2]
    tars, starts = source.tars_in_order(random.Random("5/epoch/0").getrandbits(64))
    row = [source.first[j] + k for j in tars for k in range(lengths[j])]  # the tars, one behind the other
    half, place = -(-n // 2), {int(i): k for k, i in enumerate(row)}
    for window in range(n // 512 - 1):  # the next 256 images of either half, in no order
        picks = [place[i] for i in passes[0][512 * window : 512 * (window + 1)]]
        depth = [k % half for k in picks]
        assert sum(k < half for k in picks) == 256 and picks != sorted(picks)
        assert (min(depth), max(depth)) == (256 * window, 256 * window + 255)
    sequence = passes[0]  # so reading advances in each tar
    for j, n_images in enumerate(lengths):
        if n_images > 512:
            read = np.array([i for i in sequence if source.shard[i] == j])
            assert np.corrcoef(np.arange(n_images), read)[0, 1] > 0.5, j
    at_random = support.sources.open_source(f"{tmp_path}/s-*.tar:interleave=0")
    assert sorted(at_random.pick(s, 0) for s in range(n)) == list(range(n))
    assert "s-000.tar at byte" in source.describe(3)
    whole = (tmp_path / "s-000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    cut = support.sources.open_source(f"{tmp_path}/cut.tar")
    assert 300 < len(cut) < 400 and "is damaged after" in capsys.readouterr().err
    (tmp_path / "zip.tar").write_bytes(b"\x1f\x8b no tar")
    for spec, text in ((f"{tmp_path}/zip.tar", "not a plain tar"), (f"{tmp_path}/none.tar", "there is no file"),
                       (f"{tmp_path}/s-{{000..99999999999}}.tar", "there is no file .*s-005.tar"),
                       (f"{tmp_path}/s-{{9..0}}.tar", "is empty; write the smaller"),
                       (f"{tmp_path}/s-002.tar", "no image"), (f"{tmp_path}/cut.tar:interleave=x", "interleave is")):
        with pytest.raises(ValueError, match=text):
            support.sources.open_source(spec)
    with pytest.raises(ValueError, match=r"named .*/\*\.tar"):
        support.sources.open_source(str(tmp_path))


def test_data_mixtures(tmp_path, cache):
    """Exact shares in every round; within its share each source is gone through once per pass."""
    write_images(tmp_path, ["a/1.png", "a/2.png", "a/3.png", "b/4.png"])
    mix = support.sources.open_source(f"{tmp_path}/a*0.7,{tmp_path}/b*0.2,digits*.1")
    picks = [mix.pick(s, seed=1) for s in range(300)]
    for start in range(0, 300, 10):
        whose = [0 if i < 3 else 1 if i == 3 else 2 for i in picks[start : start + 10]]
        assert sorted(whose) == [0] * 7 + [1] * 2 + [2]
    assert [sorted(i for i in picks if i < 3).count(k) for k in range(3)] == [70] * 3
    assert len({i for i in picks if i > 3}) == 30  # digits: no repetition within a pass
    assert mix.image(3).shape == (3, 40, 32) and mix.image(4).shape == (3, 32, 32) and mix.labels is None
    both = support.sources.open_source(f"{tmp_path}/a,{tmp_path}/b")
    assert sorted(both.pick(s, 0) for s in range(4)) == [0, 1, 2, 3] and both.describe(3).endswith("4.png")
    write_images(tmp_path / "x,y*2", ["5.png"])  # a folder's name comes first
    assert len(support.sources.open_source(f"{tmp_path}/x,y*2")) == 1
    split = f"{tmp_path}/s"
    write_images(tmp_path / "s", ["train/1.png", "val/2.png"])
    halves = support.sources.open_source(f"{split}:split=TRAIN*0.5, {split}:split=VAL*0.5")
    assert halves.describe(1).endswith("val/2.png")
    for spec in ("ImageNet:root=/a,ImageNet22k:root=/b", "CIFAR10:root=/d*0.5,CIFAR100:root=/d*0.5", "CIFAR10*1"):
        assert support.sources.eval_specs(spec) == (spec, None)
    (tmp_path / "a/1.png").write_bytes(b"damaged")
    lame = support.sources.open_source(f"{tmp_path}/a*0.9,digits*0.1")
    assert {lame.replacement(0, random.Random(i)) for i in range(50)} == {0, 1, 2}  # the shares stay what they are
    for spec, text in (("digits*0.5,digits", "or none"), ("digits*0.5,digits*0", "0.001 or more"),
                       ("digits,", "nothing before or after")):
        with pytest.raises(ValueError, match=text):
            support.sources.open_source(spec)


def test_data_imagenet_extra_golden(tmp_path, cache, capsys):
    """The command extra writes what the official classes dumped from the same tree, to the byte."""
    for split in ("train/", "val/"):
        write_images(tmp_path, [f for f in golden.json("extra/files") if f.startswith(split)])
    (tmp_path / "labels.txt").write_text(golden.json("extra/labels"))
    support.sources.main(["extra", f"ImageNet:root={tmp_path}:extra={tmp_path}/extra"])
    for name, rows in golden.json("extra/imagenet").items():
        ours = np.load(tmp_path / "extra" / name)
        assert [str(ours.dtype), ours.tolist()] == [rows[0], [tuple(r) if isinstance(r, list) else r for r in rows[1]]]
    source = support.sources.open_source(f"ImageNet:split=TRAIN:root={tmp_path}:extra={tmp_path}/extra")
    listed = support.sources.open_source(f"ImageNet:split=TRAIN:root={tmp_path}")
    assert [source.describe(i) for i in range(9)] == [listed.describe(i) for i in range(9)]
    write_images(tmp_path, ["test/ILSVRC2012_test_00000002.JPEG", "test/ILSVRC2012_test_00000001.JPEG"])
    support.sources.main(["extra", f"ImageNet:split=TEST:root={tmp_path}:extra={tmp_path}/extra"])
    test = support.sources.open_source(f"ImageNet:split=TEST:root={tmp_path}:extra={tmp_path}/extra")
    assert test.labels is None and test.describe(1).endswith("test_00000002.JPEG")
    assert test.image(1).shape == (3, 40, 32)


@pytest.mark.parametrize("logs", [True, False])
def test_data_imagenet22k_golden(logs, tmp_path, cache):
    """entries.npy from the block logs, or from the tars alone, equals the official one; images come from the tars."""
    for wnid, log in golden.json("extra/blocks").items():
        names = re.findall(r"\w+\.JPEG", log)
        files = {name: png(7 * k, (20, 20)).ljust(600, b"\0") for k, name in enumerate(names)}
        write_tar(tmp_path / f"{wnid}.tar", files)
        if logs:
            (tmp_path / "blocks").mkdir(exist_ok=True)
            (tmp_path / "blocks" / f"{wnid}.log").write_text(log)
    support.sources.main(["extra", f"ImageNet22k:root={tmp_path}:extra={tmp_path}/extra"])
    for name, (dtype, rows) in golden.json("extra/imagenet22k").items():
        ours = np.load(tmp_path / "extra" / name)
        assert str(ours.dtype) == dtype and ours.tolist() == [tuple(r) if isinstance(r, list) else r for r in rows]
    for spec in (f"ImageNet22k:root={tmp_path}:extra={tmp_path}/extra", f"ImageNet22k:root={tmp_path}"):
        source = support.sources.open_source(spec)
        assert source.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert [source.image(i)[0, 0, 0].item() for i in range(6)] == [0, 7, 14] * 2
    packed = gzip.compress(png(9))  # as a few of its files are
    write_tar(tmp_path / "n00000003.tar", {"a.JPEG": packed})
    assert support.sources.open_source(f"ImageNet22k:root={tmp_path}").image(6)[0, 0, 0] == 9


def test_data_torchvision_sets(tmp_path, monkeypatch):
    import torchvision

    with pytest.raises(ValueError, match="download=yes"):
        support.sources.open_source(f"CIFAR10:root={tmp_path}")
    pixels = np.arange(3 * 32 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(3, 32, 32, 3)

    class Fake:
        def __init__(self, root, train, download):
            n = 3 if train else 1
            self.data, self.targets, self.classes = pixels[:n], [1, 0, 1][:n], ["a", "b"]
            assert Path(root) == tmp_path and not download

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", Fake)
    source = support.sources.open_source(f"CIFAR100:root={tmp_path}")
    assert source.labels.tolist() == [1, 0, 1] and source.classes == ["a", "b"]
    assert np.array_equal(source.image(2).permute(1, 2, 0).numpy(), pixels[2])
    assert len(support.sources.open_source(f"CIFAR100:split=VAL:root={tmp_path}", channels=1)) == 1
    assert support.sources.eval_specs("CIFAR100:root=x") == ("CIFAR100:root=x:split=TRAIN", "CIFAR100:root=x:split=VAL")


def test_data_stats_and_check_commands(tmp_path, cache, capsys):
    for i, value in enumerate((0, 51, 102)):
        Image.new("RGB", (10, 10 + i), (value, 255, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff no more")
    support.sources.main(["stats", str(tmp_path), "--num-workers", "0"])
    out = capsys.readouterr().out
    pixels = np.repeat([0, 0.2, 0.4], [100, 110, 120])
    assert f"--mean {pixels.mean():.4g} 1 0 --std {pixels.std():.4g} 0 0" in out
    with pytest.raises(SystemExit) as stop:
        support.sources.main(["check", str(tmp_path), "--num-workers", "1"])
    out = capsys.readouterr().out
    assert "bad.jpg\tcannot identify" in out and "1 of 4 images" in out
    assert stop.value.code == 1
    assert exit_code("support/sources.py", "stats", tmp_path / "no") == 2
    told = capsys.readouterr().err
    assert told.startswith("error: --data") and told.count("\n") == 1


def test_data_listing_is_shared_and_small(tmp_path, cache):
    """What a worker gets is the spec alone; the listing is mapped from the file, not copied."""
    write_images(tmp_path / "p", [f"{c}/{i}.png" for c in "ab" for i in range(3)])
    source = support.sources.open_source(str(tmp_path / "p"))
    pickled = pickle.dumps(source)
    assert len(pickled) < 300 and [pickle.loads(pickled).describe(i) for i in range(6)] == [
        source.describe(i) for i in range(6)]
    maps = Path("/proc/self/maps")
    assert not maps.exists() or ".listing" in maps.read_text()
    torch.from_numpy(source.labels)  # without a warning that it is read-only


def test_data_unreadable_sources_end_the_run(tmp_path, cache):
    write_images(tmp_path / "p", ["1.png", "2.png"])
    source = support.sources.open_source(str(tmp_path / "p"))
    shutil.rmtree(tmp_path / "p")  # the disk is gone
    batches = data.TrainBatches(source, batch_size=2, group_size=2, global_size=16, local_size=8, patch_size=8)
    with pytest.raises(data.Unreadable, match="50 images in a row"):
        batches[0]


@pytest.mark.parametrize("spec,text", [
    ("no/such/folder", "is not a folder"), ("cifar10", "did you mean CIFAR10?"),
    ("{tmp}/file.txt", "names no image"), ("{tmp}/z.tar.gz", "is a compressed tar or zip; unpack it"),
    ("{tmp}/*.TGZ", "is a compressed tar"), ("{tmp}/z.tar.bz2", "is a compressed tar"), ("z.zip*1", "is a compressed"),
    ("{tmp}/empty", "holds no image"),
    ("digits:split=TEST", "splits TRAIN and VAL"), ("digits:sprit=VAL", "unknown key 'sprit'; digits takes split"),
    ("FashionMNIST:root={tmp}", "dataset-fashion-mnist"), ("ImageNet:split=TRAIN", "ImageNet:split=TRAIN:root="),
    ("ImageNet:split=VAL:root={tmp}", "train and val"), ("{tmp}/empty:split=VAL", "no sub-folder for split VAL")])
def test_data_errors_name_the_fix(spec, text, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(ValueError, match=re.escape(text)):
        support.sources.open_source(spec.format(tmp=tmp_path))


def test_sources_say_how_to_label_them(tmp_path, cache):
    write_images(tmp_path / "p", ["a.png", "b.png"])
    (tmp_path / "plain.txt").write_text("p/a.png\np/b.png\n")
    write_tar(tmp_path / "x.tar", {"a.png": png(0)})
    (tmp_path / "mine.py").write_text("import torch\nfrom torch.utils.data import Dataset\nclass Mine(Dataset):\n"
                                      "    __len__ = lambda self: 2\n"
                                      "    __getitem__ = lambda self, i: torch.full((3, 8, 8), i, dtype=torch.uint8)\n")
    for spec, fix in ((tmp_path / "p", "make one sub-folder per class"), (tmp_path / "x.tar", "add a member KEY.cls"),
                      (tmp_path / "plain.txt", "add a label to each line, in a column"),
                      (f"{tmp_path}/mine.py:Mine", "make its items (image, label)"),
                      (f"{tmp_path}/p,{tmp_path}/x.tar", "use a labeled source")):
        source = support.sources.open_source(str(spec))
        with pytest.raises(ValueError, match=f"^{re.escape(source.name)} has no labels; {re.escape(fix)}"):
            common_labels(source, None)


def test_data_image_paths_come_once(tmp_path, cache):
    write_images(tmp_path / "a", ["0.png", "1.png"])
    found = support.sources.image_paths([str(tmp_path / "a/1.png"), str(tmp_path / "a")])
    assert [Path(p).name for p in found] == ["1.png", "0.png"]


# ----------------------------------------------------------------------------------------------------------------------
# Any torch Dataset


DATASETS = '''
import numpy as np
import torch
from PIL import Image

class Squares(torch.utils.data.Dataset):
    def __init__(self, make, n=12):
        self.make, self.n = make, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.make(i)

def gray(i):
    return np.full((20, 24), 20 * i, np.uint8)

def pil():
    return Squares(lambda i: Image.fromarray(gray(i)))

def labeled():
    return Squares(lambda i: (torch.from_numpy(gray(i)).expand(3, -1, -1), torch.tensor(i % 3), "more"))

def arrays():
    dataset = Squares(lambda i: [gray(i)[..., None].repeat(3, 2), None])
    dataset.targets = list(range(12))
    return dataset

def deep():
    return Squares(lambda i: (np.full((20, 24), 257 * 20 * i, np.uint16), i))

def damaged():
    return Squares(lambda i: 1 / 0 if i % 6 == 0 else (gray(i), i % 2))

def random():
    return Squares(lambda i: torch.randint(256, (3, 20, 24), dtype=torch.uint8))

def floats():
    return Squares(lambda i: torch.rand(3, 20, 24))

def dicts():
    return Squares(lambda i: {"image": gray(i)})

def words():
    return Squares(lambda i: (gray(i), "cat"))

def huge():
    return Squares(lambda i: (gray(i), 2**40))

def stream():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield gray(0)
    return Stream()

def empty():
    return Squares(gray, 0)

def broken():
    return missing

def absent():
    return open("/nonexistent/file.txt")

def pairs():
    return Squares(lambda i: (gray(i), [1, 2]))

def ragged():
    return Squares(lambda i: (gray(i), [1] * (i + 1)))
'''


@pytest.fixture
def my_data(tmp_path, cache) -> str:
    (tmp_path / "my_data.py").write_text(DATASETS)
    return f"{tmp_path}/my_data.py"


@pytest.mark.parametrize("name,labels", [("pil", None), ("labeled", [0, 1, 2] * 4), ("arrays", [*range(12)]),
                                         ("deep", [*range(12)]), ("damaged", [-1, 1, 0, 1, 0, 1] * 2)])
def test_data_torch_datasets(name, labels, my_data):
    source = support.sources.open_source(f"{my_data}:{name}")
    image = source.image(5)
    assert image.shape == (3, 20, 24) and image.unique().tolist() == [100 * (257 if name == "deep" else 1)]
    assert image.dtype == (torch.uint16 if name == "deep" else torch.uint8)
    assert support.sources.open_source(f"{my_data}:{name}", channels=1).image(5).shape == (1, 20, 24)
    assert len(source) == 12 and (source.labels if labels is None else source.labels.tolist()) == labels
    assert support.sources.eval_specs(f"{my_data}:{name}") == (f"{my_data}:{name}", None)
    again = pickle.loads(pickle.dumps(source))  # as a worker that is not forked gets it
    assert again.fingerprint == source.fingerprint and torch.equal(again.image(5), image)
    others = [support.sources.open_source(f"{my_data}:{other}") for other in ("pil", "labeled", "deep", "damaged")]
    assert len({other.fingerprint for other in others}) == 4
    mix = support.sources.open_source(f"{my_data}:{name}*0.5,digits*0.5")
    assert sorted(mix.pick(s, 0) < 12 for s in range(2)) == [False, True]


def test_data_torch_dataset_trains_with_spawned_workers(my_data):
    """The workers open the source again; unreadable items are replaced."""
    source = support.sources.open_source(f"{my_data}:damaged")
    batches = data.TrainBatches(source, batch_size=12, group_size=12, global_size=16, local_size=8, n_local=1,
                                patch_size=8)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(2), num_workers=1,
                                         multiprocessing_context="spawn")
    for step, batch in enumerate(loader):
        assert torch.equal(batch.global_crops, batches[step].global_crops)
        assert {name for name, _ in batch.bad} == {f"{my_data}:damaged[0]", f"{my_data}:damaged[6]"}
        assert {reason for _, reason in batch.bad} == {"division by zero"}


@pytest.mark.parametrize("name,text", [
    (":nothing", "has no function nothing"), (":lable", "did you mean labeled?"), ("", "as in {}:photos"),
    (":random", "returns a different image each time"),
    (":floats", "is a Tensor torch.float32 (3, 20, 24); return an image"),
    (":dicts", "is a dict; return an image"), (":stream", "returns a Stream, which has no length"),
    (":empty", "is empty"), (":labeled:split=VAL", "takes none"),
    (":broken", "NameError at line 61 of {}: name 'missing' is not defined"),
    (":absent", "--data {0}:absent: FileNotFoundError at line 64 of {0}: [Errno 2] No such file or directory: "
     "'/nonexistent/file.txt'")])
def test_data_torch_dataset_errors_name_the_fix(name, text, my_data):
    with pytest.raises(ValueError, match=re.escape(text.format(my_data))) as error:
        support.sources.open_source(my_data + name)
    assert "\n" not in str(error.value)
    assert support.parallel.root_cause(error.value) == str(error.value)  # which on_all_ranks() passes on


def test_data_torch_dataset_mistakes_around_the_file(my_data):
    with pytest.raises(ValueError, match="no/such.py does not exist"):
        support.sources.open_source("no/such.py:photos")
    with pytest.raises(ValueError, match="a file, FILE.py:FUNCTION, or one of: digits"):
        support.sources.open_source("no/such/folder")
    with pytest.raises(ValueError, match="labels of .* go up to 1099511627776; number the classes"):
        support.sources.open_source(f"{my_data}:huge").labels
    for name in ("words", "pairs", "ragged"):
        with pytest.raises(ValueError, match=f"one integer per image, but the labels of {my_data}:{name} are") as error:
            support.sources.open_source(f"{my_data}:{name}").labels
        assert "\n" not in str(error.value)
    Path(my_data).write_text("def photos(:")
    with pytest.raises(ValueError, match="SyntaxError"):
        support.sources.open_source(f"{my_data}:photos")


def test_data_code_named_by_a_checkpoint_is_not_run(my_data):
    assert [support.sources.without_code(spec, "--train") for spec in ("digits", "/data/a*0.5,b*0.5", "")] == [
        "digits", "/data/a*0.5,b*0.5", ""]
    for spec in (f"{my_data}:pil", f"digits*0.5,{my_data}:pil*0.5"):
        with pytest.raises(ValueError, match=re.escape(f"if you trust it, pass --train {spec}")):
            support.sources.without_code(spec, "--train")
