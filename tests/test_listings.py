"""What folders, lists and tar files of others hold, and what becomes of the listing cache. With SLOW=1 also a fuzz of
thousands of damaged ones."""
import contextlib
import io
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import tarfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

import eval_knn
import support.cli
import support.listings
import support.sources
from support.cli import printable
from tests.common import Launched, png, write_images
from tests.test_sources import write_tar

open_source = support.sources.open_source


def names(source) -> list[str]:
    return [os.path.relpath(source.describe(i), source.root) for i in range(len(source))]


def told(capsys) -> str:
    support.listings.note_once.cache_clear()
    return capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Tar files


def test_tars_of_a_mac_and_of_others(tmp_path, cache, capsys):
    """What folders skip, tars skip; ./ is no hidden folder; long names of both formats are read."""
    names = {"photo.png": True, "./b.png": True, "../c.png": True, "._photo.png": False, "a/._photo.png": False,
             ".hidden/x.png": False, "__MACOSX/x.png": False, "a/__MACOSX/._y.png": False, "@eaDir/z.png": False,
             "n" * 120 + ".png": True, "p/" * 70 + "q" * 200 + "é.PNG": True}
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "x.tar", "w", format=form) as tar:
            for i, name in enumerate(names):
                info = tarfile.TarInfo(name)
                info.size = len(png(i))
                tar.addfile(info, io.BytesIO(png(i)))
        source = open_source(f"{tmp_path}/x.tar")
        wanted = [i for i, name in enumerate(names) if names[name]]
        assert [source.image(k)[0, 0, 0].item() for k in range(len(source))] == wanted
        os.utime(tmp_path / "x.tar", ns=(form, form))
    write_images(tmp_path / "f", ["a.png", "__MACOSX/b.png", "@eaDir/c.png", "._d.png", "x/__MACOSX/e.png"])
    assert len(open_source(str(tmp_path / "f"))) == 1
    assert told(capsys) == ""


def test_samples_to_check_are_drawn_at_random():
    """Of every other image damaged, or only the first tenth in each hundred readable, some are drawn."""
    class Half(support.sources.Source):
        name = "half"

        def __len__(self):
            return 1000

        def image(self, i):
            if i % 100 % 2 == 0:
                raise ValueError("damaged")
            return i

    assert support.sources.check_readable(Half()) % 2 == 1


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_members_are_those_of_the_standard_library(form, tmp_path):
    rng = random.Random(form)
    with tarfile.open(tmp_path / "x.tar", "w", format=form) as tar:
        for i in range(60):
            info = tarfile.TarInfo("/".join(f"{'ä' * rng.randrange(5)}{i}x" * rng.randrange(1, 4) for _ in range(
                rng.randrange(1, 4 if form == tarfile.USTAR_FORMAT else 30))))
            info.type = rng.choice([tarfile.REGTYPE] * 5 + [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE])
            info.size = rng.randrange(2000) if info.isreg() else 0
            info.mtime, info.uname, info.linkname = rng.choice((0, 1.5)), "ö", "l" * 10
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    with tarfile.open(tmp_path / "x.tar") as tar, open(tmp_path / "x.tar", "rb") as file:
        ours = support.listings.tar_members(file, os.path.getsize(tmp_path / "x.tar"))
        assert [(m.name.rstrip("/"), m.start, m.size, m.kind == "file") for m in ours] == [
            (m.name, m.offset_data, m.size, m.isreg()) for m in tar.getmembers()]


def header(name: str, size: int | bytes, kind: bytes = b"0", more: bytes = b"") -> bytes:
    """A header with a valid checksum, whatever it claims."""
    block = bytearray(512)
    block[: len(name)] = name.encode()
    block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size if size < 8**11 else (
        b"\x80" + size.to_bytes(11, "big"))
    block[156:157], block[257:265] = kind, b"ustar\x0000"
    block[345 : 345 + len(more)] = more
    block[148:156] = b"%06o\0 " % (sum(block) + 8 * 32)
    return bytes(block)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


GOOD = header("a.png", len(png(1))) + padded(png(1))
END = bytes(1024)


@pytest.mark.parametrize("content,what", [
    (GOOD + header("b.png", b"\xff" * 12) + END, "damaged after 1 image (no number"),
    (GOOD + header("b.png", b"-0000000512\0") + END, "damaged after 1 image (no number"),
    (GOOD + header("b.png", 2**40) + END, "damaged after 1 image (its end is missing"),
    (GOOD + header("b.png", 2**88 - 1) + END, "damaged after 1 image (its end is missing"),
    (GOOD + header("long", 2**33, b"L") + END, "damaged after 1 image (a header of 8,589,934,592 bytes"),
    (GOOD + header("pax", 2**21, b"x") + bytes(2**21) + END, "damaged after 1 image (a header of 2,097,152 bytes"),
    (GOOD + header("pax", 21, b"x") + padded(b"21 size=999999999999\n") + header("b.png", 0) + END, "end is missing"),
    (GOOD + header("pax", 11, b"x") + padded(b"11 size=-1\n") + header("b.png", 0) + END, "no number"),
    (GOOD + header("pax", 30, b"x") + padded(b"30 GNU.sparse.size=8000000000\n") + header("b.png", 512) + padded(b"x") +
     END, "left out: 1 sparse member\n"),
    (GOOD + header("a.cls", 512, b"S") + bytes(512) + END, "left out: 1 sparse member\n"),
    (GOOD + header("b.png", 0, b"2") + header("c.png", 0, b"1") + END, "left out: 2 link members"),
    (GOOD + header("pax", 10_000, b"x") + padded(b"10000 path=" + b"a." * 4992 + b"png\n\n") + header("b.png", 0) + END,
     "a name of"),
    (GOOD + GOOD[:-512], "its end is missing")], ids=range(13))
def test_tars_that_claim_too_much(content, what, tmp_path, cache, capsys):
    """No memory is taken for what a header claims, no header leads back; what comes before is used."""
    (tmp_path / "x.tar").write_bytes(content)
    tracemalloc.start()
    try:
        source = open_source(f"{tmp_path}/x.tar")
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()
    assert len(source) == 1 and what in told(capsys)
    open_source(f"{tmp_path}/x.tar")
    assert what in told(capsys)  # the second time as well


@pytest.mark.parametrize("label,text", [(b"china\n", "a.cls holds 'china', not a number"), (b"", "holds '', not"),
                                        (b"1" * 100, f"holds '{'1' * 37}...', not"),
                                        (b"\x1b[2J\xff\na", r"holds '\x1b[2J\xff\na', not"),
                                        (b"%d" % 2**40, "is 1099511627776; number the classes from 0"),
                                        (b"1048576", "at most 1,048,575")])
def test_labels_that_are_no_classes(label, text, tmp_path, cache):
    write_tar(tmp_path / "x.tar", {"a.cls": label, "a.png": png(0)})
    with pytest.raises(ValueError, match=re.escape(text)):
        open_source(f"{tmp_path}/x.tar")


def test_a_label_of_eight_gigabytes_is_not_read(tmp_path, cache):
    with open(tmp_path / "x.tar", "wb") as file:
        file.write(GOOD + header("a.cls", 2**33))
        file.seek(2**33, 1)
        file.write(END)
    with pytest.raises(ValueError, match="not a number"):
        open_source(f"{tmp_path}/x.tar")


def test_labels_in_tars_by_both_rules(tmp_path, cache):
    """The key of a sample ends at its first dot, as in WebDataset, or at its last; endings in any case."""
    write_tar(tmp_path / "x.tar", {
        "a.b.png": png(0), "a.b.cls": b"1", "d/c.left.png": png(0), "d/c.cls": b" 2\n", "D.PNG": png(0), "D.CLS": b"3",
        "e.png": png(0), "x/e.cls": b"4", "a.c.png": png(0), "a.c.cls": b"5", "f.cls": b"-7", "f.png": png(0)})
    assert open_source(f"{tmp_path}/x.tar").labels.tolist() == [1, 2, 3, -1, 5, -1]


def test_one_of_several_images_of_a_sample(tmp_path, cache, capsys):
    def opened(endings, option="", n=2):
        write_tar(tmp_path / "x.tar", {f"d/{k}{e}": b"1" if e == ".cls" else png(k) for k in range(n) for e in endings})
        os.utime(tmp_path / "x.tar", ns=(time.time_ns(), time.time_ns()))
        source = open_source(f"{tmp_path}/x.tar{option}")
        return len(source), told(capsys)

    n, text = opened([".png", ".cls", ".seg.png"])
    assert n == 2 and text.count("\n") == 1
    assert "2 samples with several images (2 .png, 2 .seg.png), of which only those named .png are read" in text
    assert "add :image=seg.png or :image=all" in text
    assert opened([".png", ".seg.png"], ":image=all") == (4, "")
    assert opened([".png", ".seg.png"], ":image=SEG.png") == (2, "")
    assert opened([".png", ".jpg"])[0] == 2 and opened([".png", ".jpg"], ":image=png") == (2, "")
    n, text = opened([".left.png", ".right.png"])
    assert n == 4 and "of which all are read; to choose, add :image=left.png\n" in text
    n, text = opened([".depth.png", ".right.png", ".seg.png", ".left.png"])
    assert n == 8 and "(2 .depth.png, 2 .left.png, 2 .right.png, 2 .seg.png), of which all" in text
    assert text.endswith("to choose, add :image=left.png\n")
    assert opened([".left.png", ".right.png"], ":image=right.png") == (2, "")
    assert opened([".2019.png", ".2020.png"], n=1)[0] == 2
    write_tar(tmp_path / "y.tar", {f"IMG.{k}.png": png(k) for k in range(5)})  # merely dots in names
    assert len(open_source(f"{tmp_path}/y.tar")) == 5 and told(capsys) == ""
    with pytest.raises(ValueError, match=r"no image of .* is named \*\.top\.png; there are 2 \.left\.png, 2 \.right\."):
        opened([".left.png", ".right.png"], ":image=top.png")


# ----------------------------------------------------------------------------------------------------------------------
# Endings


def test_left_out_files_are_told(tmp_path, cache, capsys):
    write_images(tmp_path / "p", ["1.JPG", "2.jfif.png", "3.Jpeg"])
    (tmp_path / "p/1.JPG").rename(tmp_path / "p/1.JFIF")
    for i in range(6):
        (tmp_path / f"p/{i}.HEIC").touch()
    for name in ("labels.txt", "a.json", "b.xml", "README", "x.tga", "noending", ".hidden.heic"):
        (tmp_path / "p" / name).touch()
    (tmp_path / "p/gone.png").symlink_to("nowhere")
    for _ in range(2):  # also when the listing comes from the cache
        assert len(open_source(str(tmp_path / "p"))) == 3
        assert told(capsys) == (f"note: {tmp_path}/p: 3 images; left out: 6 .heic, 1 .tga, 1 broken link, "
                                    "1 without a known extension\n")
    for name in ("1.JFIF", "2.jfif.png", "3.Jpeg"):
        (tmp_path / "p" / name).unlink()
    with pytest.raises(ValueError, match=r"holds no image \(.*; left out: 6 \.heic"):
        open_source(str(tmp_path / "p"))
    write_tar(tmp_path / "x.tar", {"a.png": png(0), "a.cls": b"0", "a.json": b"", "b.heic": b"", "c.HEIC": b""})
    open_source(f"{tmp_path}/x.tar")
    assert told(capsys) == f"note: {tmp_path}/x.tar: 1 image; left out: 2 .heic\n"
    write_tar(tmp_path / "y.tar", {"b.heic": b""})
    with pytest.raises(ValueError, match=r"no image in .*; left out: 1 \.heic"):
        open_source(f"{tmp_path}/y.tar")
    write_images(tmp_path, ["b.png"])
    (tmp_path / "list.txt").write_text("a.heic\nb.png\n")
    assert len(open_source(f"{tmp_path}/list.txt")) == 2
    assert told(capsys).endswith("2 images, read although their extensions are unknown: 1 .heic\n")


# ----------------------------------------------------------------------------------------------------------------------
# Lists


LISTS = {  # content: (paths, labels by name, what is said)
    "a/1.png\nb 2.png\n": (None, ""),
    "﻿a/1.png\tcat\r\nb 2.png\tdog\r\n": (["cat", "dog"], "2 images, 2 classes, from the second column"),
    "a/1.png,cat\nb 2.png,dog": (["cat", "dog"], "2 images, 2 classes, from the second column"),
    "a/1.png , cat\n b 2.png ,dog \n\n": (["cat", "dog"], "2 classes, from the second column"),
    "a/1.png,0\nb 2.png,-1": (["0", None], "1 class, from the second column; 1 without a label"),
    "a/1.png;3\nb 2.png;12": (["3", "12"], "2 classes, from the second column"),
    "a/1.png 3\nb 2.png 12": (["3", "12"], "2 classes, from the second column"),
    "a/1.png cat 0.9\nx,y.png dog 0.7": (["cat", "dog"], "2 classes, from the second column"),
    "3 a/1.png\n12 x,y.png": (["3", "12"], "2 classes, from the first column"),
    "a/1.png\tmask1.png\nb 2.png\tmask2.png": (None, ""),
    "path,label\na/1.png,cat\nb 2.png,dog": (["cat", "dog"], "2 classes, from the column 'label'; the first line"),
    ",width,Label,file\n0,640,cat,a/1.png\n1,480,dog,b 2.png": (["cat", "dog"], "2 classes, from the column 'Label'"),
    "\tpath\tlabel\n0\ta/1.png\tcat\n1\tb 2.png\tdog": (["cat", "dog"], "2 classes, from the column 'label'"),
    "a/1.png,cat,0.9\nb 2.png,dog,0.7": (["cat", "dog"], "2 classes, from the second column"),
    "7\ta/1.png\n12\tb 2.png": (["7", "12"], "2 classes, from the first column"),
    '"a/1.png","cat, small"\n"b 2.png","dog ""Rex"""': (["cat, small", 'dog "Rex"'], "2 classes"),
    "image\na/1.png\nb 2.png": (None, "the first line, 'image', is a header"),
    "x,y.png\na/1.png": (None, ""),
    "x,y.png\tcat\na/1.png": (["cat", None], "1 class, from the second column; 1 without a label"),
    '"x,y.png",cat\na/1.png,dog': (["cat", "dog"], "2 classes, from the second column"),
    "image_left,image_right,mask,species\na/1.png,b 2.png,m1.png,cat\nb 2.png,a/1.png,m2.png,dog": (
        None, "the paths are from the column 'image_left'; no labels, as no column is called label, labels, class"),
    "a/1.png,cat\nb 2.png,": (["cat", None], "1 class, from the second column; 1 without a label"),
    "a/1.png cat\nx,y.png": (["cat", None], "1 class, from the second column; 1 without a label"),
    "gone/1.jpg,cat\ngone/2.jpg,dog": (["cat", "dog"], "2 classes, from the second column"),
}


@pytest.mark.parametrize("k", range(len(LISTS)))
def test_lists_are_understood(k, tmp_path, cache, capsys):
    content, (labels, said) = list(LISTS.items())[k]
    write_images(tmp_path, ["a/1.png", "b 2.png", "x,y.png"])
    path = tmp_path / "photos.csv"
    for encoding in ("utf-8", "utf-16"):
        path.write_bytes(content.removeprefix("﻿" if encoding == "utf-16" else "").encode(encoding))
        os.utime(path, ns=(time.time_ns(), time.time_ns()))
        source = open_source(str(path))
        assert len(source) == 2
        if "gone" not in content:
            assert all(source.image(i).shape == (3, 40, 32) for i in range(2))
        found = None if source.labels is None else [source.classes[i] if i >= 0 else None for i in source.labels]
        assert found == labels
        text = told(capsys)
        assert text.count("\n") == bool(said) and said in text and (str(path) in text) == bool(said)


def test_numbers_of_a_list_stay_in_their_order(tmp_path, cache):
    (tmp_path / "l.txt").write_text("".join(f"{i}.jpg\t{i}\n" for i in range(12)))
    source = open_source(str(tmp_path / "l.txt"))
    assert source.labels.tolist() == [*range(12)] and source.classes == [str(i) for i in range(12)]


def test_a_list_may_have_labels_late_only(tmp_path, cache):
    (tmp_path / "l.txt").write_text("a.jpg\n" * 40 + "b.jpg\tcat\n")
    assert open_source(str(tmp_path / "l.txt")).labels.tolist() == [-1] * 40 + [0]


@pytest.mark.parametrize("content,text", [
    (b"a.png,cat\nb.png,dog\nc.png,dog,small\n", "line 3, 'c.png,dog,small', has 3 columns, the first lines at most 2"),
    (b"a.png,cat\nb.png,dog\n,dog\n", "line 3, ',dog', has no path in the first column"),
    (b"1,a.png\n2,b.png\n3\n", "line 3, '3', has no path in the second column"),
    (b"path,label\na.png,cat\noops\n", "line 3, 'oops', has 1 column, the first lines 2, separated by commas"),
    (b"path\tlabel\na.png\tcat\noops\n", "line 3, 'oops', has 1 column, the first lines 2, separated by tabs"),
    (b"path;w;label\na.png;5;cat\nb.png;cat\n", "line 3, 'b.png;cat', has 2 columns, the first lines 3"),
    (b"a.png,cat\nb.png\n", "line 2, 'b.png', has 1 column, the first lines 2"),
    (b"a.png cat\nb.png dog\noops\n", "line 3, 'oops', has 1 column, the first lines 2, separated by a space"),
    (b"hello\nworld\n", "is not a list of images: none of the first 2 lines could be read as an image's path"),
    (b"a.png\n" + b"b" * 70000, "line 2, is longer than 65,536 characters"),
    (b"a.png\n\xff\xd8\0", "is not readable as text"), (b"\xff\xfea", "is not readable as text"),
    (b"", "names no image")])
def test_lists_that_are_not_understood(content, text, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(support.listings, "PROBED", 2)  # lines from which the layout is guessed
    write_images(tmp_path, ["a.png", "b.png"])
    (tmp_path / "l.csv").write_bytes(content)
    with pytest.raises(ValueError) as error:
        open_source(str(tmp_path / "l.csv"))
    assert text in str(error.value) and "\n" not in str(error.value)


def test_a_picture_beside_class_folders_is_named(tmp_path, cache):
    from support.evaluation import common_labels

    write_images(tmp_path / "p", ["a/1.png", "b/2.png", "stray.png"])
    with pytest.raises(ValueError, match=r"has no labels: .*/p/stray.png lies beside its class folders; make"):
        common_labels(open_source(str(tmp_path / "p")), None)


def test_prose_is_no_list(tmp_path, cache):
    """A page that mentions images, and names few of them in a column."""
    write_images(tmp_path, ["a.png"])
    lines = ["A page", "shows ![x](a.png)", "one, two.", "- see b.png", "the end; a.png", "bye", "and more", "done"]
    for name in ("README.md", "script.sh", "notes"):
        (tmp_path / name).write_text("\n\n".join(lines))
        with pytest.raises(ValueError, match="is not a list of images: only . of the first 8 lines could be read"):
            open_source(str(tmp_path / name))


# ----------------------------------------------------------------------------------------------------------------------
# Names


def test_printable_names():
    assert printable("é 日本 \U0001f600 a\\b") == "é 日本 \U0001f600 a\\b"
    assert printable("a\n\t\x1b[2J\x7f\x85\u202e" + os.fsdecode(b"\xff")) == r"a\n\t\x1b[2J\x7f\x85\u202e\xff"


def check(argv: list[str]) -> None:
    sys.stdout = open(1, "w", encoding=argv[1], closefd=False)
    support.cli.run(lambda: support.sources.main(["check", argv[0], "--num-workers", "0"]))


def test_foreign_names_reach_no_terminal(tmp_path, cache, capsys):
    """A name that is not UTF-8 and one with an escape sequence and a line break: all are reported, one line each, even
    where the terminal knows ASCII only."""
    (tmp_path / "p").mkdir()
    for name in (b"\xe9.png", b"a\x1b[2J\nb.png", "é日.png".encode()):
        (tmp_path / "p" / os.fsdecode(name)).write_bytes(b"no image")
    with pytest.raises(SystemExit):
        support.sources.main(["check", f"{tmp_path}/p", "--num-workers", "0"])
    ascii_only = Launched(tmp_path / "ascii.log", check, tmp_path / "p", "ascii").wait(ok=1)
    for encoding, text in (("utf-8", capsys.readouterr().out), ("ascii", ascii_only)):
        lines = text.splitlines()
        assert len(lines) == 4 and "\x1b" not in text, text
        assert rf"{tmp_path}/p/a\x1b[2J\nb.png" + "\tcannot" in lines[0] and r"/\xe9.png" in lines[2]
        assert ("é日.png" if encoding == "utf-8" else r"\xe9\u65e5.png") in lines[1]
        assert lines[3].startswith("3 of 3 images")


# ----------------------------------------------------------------------------------------------------------------------
# The cache


def no_home(patch, tmp_path):
    patch.delenv("XDG_CACHE_HOME")
    patch.setattr(Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError("no home")))


def a_file(patch, tmp_path):
    (tmp_path / "cache").write_text("")


def no_folder(patch, tmp_path):
    patch.setenv("XDG_CACHE_HOME", "/proc/nowhere")


def full_disk(patch, tmp_path):
    patch.setattr(support.listings, "write_listing", lambda listing, file: open("/dev/full", "wb", 0).write(b"x"))


def read_only(patch, tmp_path):
    patch.setattr(Path, "mkdir", lambda *a, **k: (_ for _ in ()).throw(OSError(30, "Read-only file system")))


def a_folder_in_its_place(patch, tmp_path):
    write = support.listings.write_file

    def blocked(path, content):
        path.mkdir(parents=True, exist_ok=True)
        (path / "x").touch()
        write(path, content)

    patch.setattr(support.listings, "write_file", blocked)


@pytest.mark.parametrize("spoil", [no_home, a_file, no_folder, full_disk, read_only, a_folder_in_its_place])
def test_a_cache_that_cannot_be_written_is_a_note(spoil, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_images(tmp_path / "p", ["1.png", "2.png"])
    write_tar(tmp_path / "x.tar", {"1.png": png(0)})
    (tmp_path / "l.txt").write_text("p/1.png\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        folder, tars = support.sources.open_folder, support.sources.open_tars
        spoil(patch, tmp_path)
        assert len(folder(tmp_path / "p")) == 2 and len(support.sources.open_list(tmp_path / "l.txt")) == 1
        assert len(tars("x", [str(tmp_path / "x.tar")], 0)) == 1
        text = told(capsys)
    assert text.startswith("note: ") and "XDG_CACHE_HOME" in text and "Traceback" not in text


def test_a_damaged_cache_is_listed_anew(tmp_path, cache, capsys):
    """Every byte counts: with any one changed, and cut anywhere, the listing is made again."""
    write_images(tmp_path / "p", ["a/1.png", "b/2.png"])
    wanted, (path,) = names(open_source(str(tmp_path / "p"))), (cache / "dinov2").iterdir()
    whole = path.read_bytes()
    assert json.loads(whole[40 : 40 + int.from_bytes(whole[32:40], "little")])[0]["what"] == f"folder {tmp_path}/p"
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        assert names(open_source(str(tmp_path / "p"))) == wanted and path.read_bytes() == whole, at
        if at % 8 == 0:
            path.write_bytes(whole[:at])
            assert names(open_source(str(tmp_path / "p"))) == wanted and path.read_bytes() == whole, at
    assert f"{path} is damaged; listing again" in told(capsys)
    write_images(tmp_path / "q", ["c/3.png", "d/4.png"])
    open_source(str(tmp_path / "q"))
    other, = set((cache / "dinov2").iterdir()) - {path}
    other.write_bytes(whole)  # whole, but of another folder
    assert names(open_source(str(tmp_path / "q"))) == ["c/3.png", "d/4.png"]


def test_a_tar_of_the_same_time_and_another_size_is_listed_anew(tmp_path, cache):
    for n in (1, 2):
        write_tar(tmp_path / "x.tar", {f"{i}.png": png(i).ljust(20000) for i in range(n)})
        os.utime(tmp_path / "x.tar", ns=(5, 5))
        assert len(open_source(f"{tmp_path}/x.tar")) == n


def four_processes(argv: list[str]) -> None:
    """Of two machines, each with a cache of its own unless `how` says otherwise. listed.txt gets a line per listing."""
    folder, how = Path(argv[0]), argv[1]
    rank = int(os.environ["RANK"])
    machine = rank // 2
    os.environ |= dict(LOCAL_RANK=str(rank % 2), XDG_CACHE_HOME=str(folder / f"cache{machine * (how != 'shared')}"))
    if how == "unwritable" and machine:
        os.environ["XDG_CACHE_HOME"] = "/proc/nowhere"
    list_folder = support.sources.list_folder

    def counted(root):
        with open(folder / "listed.txt", "a") as file:
            file.write(f"{rank}\n")
        if how == "failing" and rank == 2:
            raise OSError(5, "Input/output error", str(root))
        return list_folder(root)

    support.sources.list_folder = counted
    dist.init_process_group("gloo")
    try:
        sources = support.sources.open_on_all_ranks([str(folder / "p"), None, "digits"], 3)
        print(f"rank {rank}: {len(sources[0])} {names(sources[0])}\n", end="", flush=True)
    except ValueError as error:
        print(f"rank {rank}: {error}\n", end="", flush=True)
    dist.destroy_process_group()


def count_listings() -> None:
    list_folder = support.sources.list_folder
    support.sources.list_folder = lambda root: print("listing", root) or list_folder(root)


def test_an_evaluation_lists_once(trained, tmp_path, cache):
    for split in ("train", "val"):
        write_images(tmp_path / "p" / split, [f"{c}/{i}.png" for c in "ab" for i in range(2)])
    text = Launched(tmp_path / "log", eval_knn.main, trained / "ckpt.pth", "--train", tmp_path / "p", "--device", "cpu",
                    "--num-workers", "0", "--out", tmp_path / "o.jsonl", world=2, before=count_listings).wait()
    assert text.count("listing ") == 2, text  # of two folders


@pytest.mark.parametrize("how,listed", [("own", [0, 2]), ("shared", [0]), ("unwritable", [0, 2, 3]),
                                        ("failing", [0, 2])])
def test_each_machine_lists_once(how, listed, tmp_path):
    write_images(tmp_path / "p", ["1.png", "2.png"])
    text = Launched(tmp_path / "log", four_processes, tmp_path, how, world=4).wait()
    assert sorted(map(int, (tmp_path / "listed.txt").read_text().split())) == listed
    if how == "failing":
        assert text.count("cannot be read (Input/output error)") == 4
    else:
        assert text.count("2 ['1.png', '2.png']") == 4
        assert text.count("note: ") == (how == "unwritable")


# ----------------------------------------------------------------------------------------------------------------------
# Tables of NumPy


FIELDS = [("class_index", "<u4"), ("class_id", "U3"), ("start_offset", "<u4"), ("end_offset", "<u4"),
          ("filename", "U5")]


@pytest.mark.parametrize("rows,fields", [
    ([(2**32 - 1, "n01", 0, 1024, "a")], FIELDS), ([(2**20, "n01", 0, 1024, "a")], FIELDS),
    ([(0, "n01", 1024, 512, "a")], FIELDS), ([(1, "n02", 0, 1024, "a"), (0, "n01", 0, 1024, "a")], FIELDS),
    ([], FIELDS),
    ([(0.0, "n01", 0, 1024, "a")], [("class_index", "<f4"), *FIELDS[1:]]), ([(0, 1024)], [FIELDS[0], FIELDS[2]])],
    ids=range(7))
def test_official_tables_with_impossible_numbers(rows, fields, tmp_path, cache):
    np.save(tmp_path / "entries.npy", np.array(rows, fields))
    with pytest.raises(ValueError, match="entries.npy is damaged"):
        open_source(f"ImageNet22k:root={tmp_path}:extra={tmp_path}")


def test_official_tables_larger_than_their_file(tmp_path, cache):
    np.save(tmp_path / "entries.npy", np.array([(0, "n01", 0, 1024, "a")], FIELDS))
    content = (tmp_path / "entries.npy").read_bytes()
    shape, claimed = b"'shape': (1,), }" + b" " * 12, b"'shape': (2000000000000,), }"
    assert len(shape) == len(claimed) and shape in content
    (tmp_path / "entries.npy").write_bytes(content.replace(shape, claimed))
    with pytest.raises(ValueError, match="entries.npy is damaged"):
        open_source(f"ImageNet22k:root={tmp_path}:extra={tmp_path}")


# ----------------------------------------------------------------------------------------------------------------------
# Fuzz


def damaged(rng: random.Random, whole: bytes) -> bytes:
    """`whole` with one kind of damage: bits flipped, bytes replaced, a piece cut out, doubled, swapped or zeroed."""
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, n = rng.randrange(len(data) + 1), rng.choice((1, 2, 8, 12, 100, 512, 513))
        piece = data[at : at + n]
        kind = rng.randrange(7)
        if kind == 0 and piece:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + n] = rng.choice((b"\xff", b"\x80", b"7", b"-", b"\n", b'"', b",", b"\0", b"9")) * len(piece)
        elif kind == 2:
            del data[at : at + n]
        elif kind == 3:
            data[at:at] = piece * rng.choice((1, 2, 50))
        elif kind == 4:
            del data[at:]
        elif kind == 5:
            data[at : at + n] = rng.randbytes(len(piece))
        else:
            data[at:at] = rng.randbytes(n)
    return bytes(data)


def fuzzed_tar(rng: random.Random, folder: Path) -> str:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))) as tar:
        for i in range(4):
            for name, data in ((f"{'n' * rng.choice((1, 150))}{i}.a.png", png(i)), (f"{i}.a.CLS", b"%d" % i)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    data = bytearray(damaged(rng, content.getvalue()))
    for at in range(0, len(data) - 511, 512):  # most damage would end at the checksum
        if data[at + 257 : at + 262] == b"ustar" and rng.random() < 0.9:
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    (folder / "x.tar").write_bytes(data)
    return f"{folder}/x.tar{rng.choice(('', '', ':image=a.png'))}"


def fuzzed_list(rng: random.Random, folder: Path) -> str:
    separator = rng.choice("\t,; ")
    rows = [["path", "label", "score"]] * rng.randrange(2) + [[f"{i}.png", f"c{i % 3}", str(i)] for i in range(20)]
    rows = [row[: rng.randrange(1, 4)] if rng.random() < 0.05 else row for row in rows]
    text = rng.choice(("\n", "\r\n")).join(separator.join(row) for row in rows).encode(rng.choice(("utf-8", "utf-16")))
    (folder / "l.csv").write_bytes(damaged(rng, text))
    return f"{folder}/l.csv"


def fuzzed_table(rng: random.Random, folder: Path) -> str:
    rows = np.array([(i // 3, f"n0{i // 3}", 1024 * i, 1024 * i + 1024, "a") for i in range(9)], FIELDS)
    name = rng.choice(("entries.npy", "entries-TRAIN.npy"))
    content = io.BytesIO()
    np.save(content, rows if name == "entries.npy" else rows.astype([("class_index", "<u4"), ("class_id", "U3"), (
        "actual_index", "<u4"), ("x", "<u4"), ("class_name", "U5")]))
    (folder / name).write_bytes(damaged(rng, content.getvalue()))
    (folder / "train").mkdir(exist_ok=True)
    return f"ImageNet{'22k' if name == 'entries.npy' else ''}:root={folder}:extra={folder}"


def fuzzed_cache(rng: random.Random, folder: Path) -> str:
    """A damaged listing of the folder p; after opening it, its images must be the right ones."""
    path, = (folder / "cache/dinov2").iterdir()
    whole = folder / "whole"
    if not whole.exists():
        whole.write_bytes(path.read_bytes())
    path.write_bytes(damaged(rng, whole.read_bytes()))
    return f"{folder}/p"


def fuzz(make, folder: Path, n: int, tell) -> None:
    """Opens n damaged sources with half a gigabyte to spare and ten seconds each; tells how many could be opened."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    opened, rng = 0, random.Random(0)
    wanted = names(open_source(f"{folder}/p"))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, resource.RLIM_INFINITY))
    for _ in range(n):
        spec = make(rng, folder)
        signal.alarm(10)
        try:
            source = open_source(spec)
            assert make is not fuzzed_cache or names(source) == wanted
            opened += 1
            for i in range(min(len(source), 3)):
                with contextlib.suppress(Exception):  # as training does
                    source.image(i)
                label_or_none = source.labels is None or source.labels[i] >= -1
                assert label_or_none and source.describe(i)
        except ValueError as error:
            assert "\n" not in printable(str(error))
        signal.alarm(0)
    tell.put(opened)


@pytest.mark.slow
@pytest.mark.parametrize("make", [fuzzed_tar, fuzzed_list, fuzzed_table, fuzzed_cache], ids=lambda f: f.__name__)
def test_thousands_of_damaged_files(make, tmp_path, monkeypatch):
    """Each is read, in part with a note, or is a ValueError; a damaged listing is never believed."""
    write_images(tmp_path / "p", [f"{c}/{i}.png" for c in "ab" for i in range(3)])
    write_images(tmp_path, [f"{i}.png" for i in range(20)])
    fork = multiprocessing.get_context("fork")
    tell = fork.SimpleQueue()
    process = fork.Process(target=fuzz, args=(make, tmp_path, 2000, tell))
    process.start()
    process.join(300)
    assert process.exitcode == 0
    assert tell.get() >= (2000 if make is fuzzed_cache else 200)
