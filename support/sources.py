"""Where images come from. A source is named by one string:

    /any/folder                   all images below it; class sub-folders give labels, train/ and val/ sub-folders splits
    photos.txt                    a text file with one image per line: a path, or columns of a CSV or TSV, with a label
    /data/shards/*.tar            tar shards (WebDataset), also x-{000..099}.tar, with labels from .cls members; 16 are
                                  read at a time, front to back, and mixed; :interleave=0 reads in fully random order;
                                  :image=left.jpg reads only these, where a sample has several images
    ImageNet:split=TRAIN:root=/data/imagenet[:extra=/data/extra]       train/<wnid>/*.JPEG, val/<wnid>/*.JPEG, test/
    ImageNet22k:root=/data/in22k[:extra=/data/extra]                   <wnid>.tar
    CIFAR10, CIFAR100, MNIST, FashionMNIST[:root=…][:download=yes]     as torchvision stores them
    digits                        1,797 scans shipped with scikit-learn, of which split=VAL holds out a fifth
    my_data.py:photos             any torch Dataset, returned by the function photos() in my_data.py; see TorchDataset
    A*0.7,B*0.3                   any of these, mixed in exactly these proportions; A,B: all of both once per pass

    python -m support.sources stats /my/photos     # mean and standard deviation per channel, for --mean and --std
    python -m support.sources check /my/photos     # reads every image, lists those it cannot; exit code 1 if any
    python -m support.sources extra ImageNet:root=/data/imagenet:extra=/data/extra     # official metadata, also of 22k

The kinds of sources are in support/datasets.py, the listing of files in support/listings.py. Apache License 2.0.
"""
import csv
import glob
import gzip
import importlib.util
import itertools
import os
import re
import shlex
import signal
import sys
import traceback
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from support.cli import Parser, at_least, nearest, note, printable, run
from support.datasets import ImageFiles, ImageNetEntries, InMemory, InTars, Mix, Source, TorchDataset, shuffled
from support.images import MAX_BYTES, SUFFIXES, short_reason
from support.listings import (
    MAX_CLASSES, Damaged, cached_listing, hidden, list_folder, list_tars, note_once, read_list, stamp, tar_members)
from support.parallel import in_turns, on_all_ranks, worker_count, world

COMPRESSED = (".gz", ".tgz", ".bz2", ".tbz", ".tbz2", ".xz", ".txz", ".zst", ".zip", ".7z", ".rar")
SPLIT_FOLDERS = {"TRAIN": ("train", "training"), "VAL": ("val", "valid", "validation", "test")}


# ----------------------------------------------------------------------------------------------------------------------
# Opening a source


CODE = r"(.+\.py):(\w+)"  # file and function


def open_source(spec: str, channels: int = 3) -> Source:
    """The source that `spec` names (see the top of this file). Raises ValueError with the fix in the message. Notes say
    what was left out, and how a list was understood."""
    source = open_quietly(spec, channels)
    for text in source.notes:
        note_once(text)
    return source


def open_quietly(spec: str, channels: int) -> Source:
    parts = split_mixture(spec)
    try:
        if len(parts) > 1 or parts[0][1]:
            source = Mix([open_quietly(part, channels) for part, _ in parts], [w for _, w in parts if w])
        else:
            source = open_single(spec)
    except OSError as error:
        raise ValueError(f"--data {spec!r}: {error.filename!r} cannot be read ({error.strerror or error})") from None
    source.spec, source.channels = spec, channels
    return source


def reopen(spec: str, channels: int, fingerprint: int) -> Source:
    source = open_quietly(spec, channels)
    if source.fingerprint != fingerprint:
        raise ValueError(f"{source.name} has changed while the run was starting; start it again")
    return source


def split_mixture(spec: str) -> list[tuple[str, Fraction | None]]:
    """"A*0.7,B*0.3" -> [(A, 7/10), (B, 3/10)]; "A" -> [(A, None)], also if A is a path that looks like a mixture."""
    if os.path.exists(os.path.expanduser(spec)):
        return [(spec, None)]
    parts = [part.strip() for part in spec.split(",")]
    weighted = [re.fullmatch(r"(.+)\*(\d*\.?\d+)", part) for part in parts]
    weights = [Fraction(w[2]).limit_denominator(1000) if w else None for w in weighted]
    if not all(parts):
        raise ValueError(f"--data {spec!r}: there is nothing before or after a comma")
    if any(weighted) and not all(weighted):
        raise ValueError(f"--data {spec!r}: give all sources a weight, as in A*0.7,B*0.3, or none")
    if any(w == 0 for w in weights):
        raise ValueError(f"--data {spec!r}: weights must be 0.001 or more")
    return [(w[1] if w else part, weight) for w, part, weight in zip(weighted, parts, weights)]


def open_single(spec: str) -> Source:
    name, options = parse_spec(spec)
    if name.endswith(".py") or re.fullmatch(CODE, name):
        opener, keys = open_dataset, ()
    else:
        opener, keys = NAMED.get(name, (open_path, ("interleave", "image") if name.endswith(".tar") else ("split",)))
    if unknown := options.keys() - set(keys):
        raise ValueError(f"--data {spec!r}: unknown key {min(unknown)!r}; {name} takes {', '.join(keys) or 'none'}"
                         + nearest(name, NAMED) * (name not in NAMED))
    return opener(name, options)


def parse_spec(spec: str) -> tuple[str, dict[str, str]]:
    """"Name:key=value:key=value" or "path:key=value" -> (name or path, {key: value})."""
    name, *rest = re.split(r":(\w+)=", spec)
    return name, dict(zip(rest[::2], rest[1::2]))


def eval_specs(spec: str, train: str = "", val: str = "") -> tuple[str, str | None]:
    """The specs of labeled images for training and for testing (None: leave-one-out): those given, else the TRAIN and
    VAL splits of the training source `spec`, if it has them."""
    if any(part != (train or spec) for part, _ in split_mixture(train or spec)):  # a mixture has no splits
        return train or spec, val or None
    name, options = parse_spec(train or spec)
    if train and "split" in options:
        return train, val or None
    if val:
        return eval_specs(train or spec)[0], val
    specs = [":".join([name, *map("=".join, (options | {"split": split}).items())]) for split in ("TRAIN", "VAL")]
    if "split" in NAMED.get(name, ((), ()))[1]:
        return tuple(specs)
    has = [any((Path(name).expanduser() / f).is_dir() for f in SPLIT_FOLDERS[s]) for s in ("TRAIN", "VAL")]
    return tuple(specs) if all(has) else (train or spec, None)


def open_on_all_ranks(specs: list[str | None], channels: int) -> list[Source | None]:
    """open_source() of each spec, None for None. One process of each machine opens them first, so that the others find
    its listings. Raises ValueError on all ranks if one of them cannot open them, or if they do not see the same files.
    """
    sources = in_turns(lambda: [None if spec is None else open_source(spec, channels) for spec in specs])
    if world()[1] > 1:
        seen = on_all_ranks(lambda: [(len(s), s.fingerprint) if s is not None else 0 for s in sources])
        if any(other != seen[0] for other in seen):
            raise ValueError(f"the machines see different files in {specs}; give all of them the same copy")
    return sources


def check_readable(source) -> None:
    """Raises ValueError if none of ten images can be read. They are drawn at random, always the same."""
    for i in range(min(10, len(source))):
        try:
            return source.image(shuffled(i, len(source), key=1))
        except Exception as error:  # decoders raise anything on damaged files
            reason = short_reason(error)
    if isinstance(source, ImageFiles) and os.path.isfile(source.name):
        raise ValueError(f"{source.name} is read as a list of image paths, but none of the lines tried names a "
                         f"readable image; the last: {reason}")
    raise ValueError(f"no readable image in {source.name}; the last one tried: {reason}")


def without_code(spec: str, flag: str) -> str:
    """A spec read from a checkpoint, which anyone may have written. Raises ValueError if opening it would run code;
    `flag` is what the user can give it by instead."""
    if ".py:" in spec:
        raise ValueError(f"the checkpoint's images come from a function; if you trust it, pass {flag} {spec}")
    return spec


def choose_split(name: str, options: dict[str, str], splits=("TRAIN", "VAL")) -> str:
    split = options.get("split", "TRAIN")
    if split not in splits:
        raise ValueError(f"{name} has the splits {', '.join(splits[:-1])} and {splits[-1]}, not {split}")
    return split


def open_dataset(name: str, options: dict[str, str]) -> TorchDataset:
    """FILE.py:FUNCTION, where FUNCTION, called without arguments, returns the Dataset."""
    match = re.fullmatch(CODE, name)
    if not match:
        raise ValueError(f"--data {name}: name the function that returns the Dataset, as in {name}:photos")
    path = Path(match[1]).expanduser()
    if not path.is_file():
        raise ValueError(f"--data {name}: {path} does not exist")
    module_spec = importlib.util.spec_from_file_location(f"dataset {path.stem}", path)
    module = sys.modules[module_spec.name] = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        make = vars(module).get(match[2])
        dataset = make and make()
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        at = f" at line {lines[-1]} of {path}" if lines else ""
        raise ValueError(f"--data {name}: {type(error).__name__}{at}: {short_reason(error)}") from None
    if make is None:
        raise ValueError(f"--data {name}: {path} has no function {match[2]}{nearest(match[2], vars(module))}")
    return TorchDataset(dataset, name)


def open_digits(name: str, options: dict[str, str]) -> InMemory:
    split = choose_split(name, options)
    from sklearn.datasets import load_digits  # takes a second to import
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    halves = train_test_split(np.arange(len(digits.target)), test_size=0.2, random_state=0, stratify=digits.target)
    rows = halves[("TRAIN", "VAL").index(split)]
    pixels = (digits.images[rows] * (255 / 16)).round().astype(np.uint8)  # (n, 8, 8) of 17 shades
    return InMemory(pixels, digits.target[rows], f"{name} {split}", side=32)  # crops may begin between two pixels


def open_torchvision(name: str, options: dict[str, str]) -> InMemory:
    """CIFAR10, CIFAR100, MNIST and FashionMNIST; the last two also as plain idx files in a folder."""
    split, download = choose_split(name, options), options.get("download") == "yes"
    if options.get("download", "yes") != "yes":
        raise ValueError(f"{name}: download is yes or left out, not {options['download']}")
    debian = name == "FashionMNIST" and not download
    root = Path(options.get("root", "/usr/share/datasets/fashion-mnist" if debian else "~/data")).expanduser()
    if name.endswith("MNIST") and not download:
        prefix = "train" if split == "TRAIN" else "t10k"
        arrays = [read_idx(root, name, f"{prefix}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")]
        if len(arrays[0]) != len(arrays[1]):
            raise ValueError(f"{root} has {len(arrays[0])} images of {name} {split}, but {len(arrays[1])} labels; copy "
                             "or download them again")
        return InMemory(*arrays, f"{name} {split}")
    import torchvision  # takes half a second to import

    try:
        dataset = getattr(torchvision.datasets, name)(root, split == "TRAIN", download=download)
    except (RuntimeError, OSError) as error:
        hint = f"try again later ({short_reason(error)})" if download else "give its root=FOLDER, or add :download=yes"
        raise ValueError(f"{name} is not in {root}, or damaged; {hint}") from None
    return InMemory(np.asarray(dataset.data), np.asarray(dataset.targets), f"{name} {split}", classes=dataset.classes)


def read_idx(root: Path, dataset: str, name: str) -> np.ndarray:
    """An idx file of LeCun's format as an array; plain or .gz, in `root` or in torchvision's raw/ folder below it."""
    for folder, suffix in itertools.product(("", f"{dataset}/raw", "raw"), ("", ".gz")):
        path = root / folder / (name + suffix)
        if path.is_file():
            try:
                with (gzip.open if suffix else open)(path, "rb") as file:
                    raw = file.read(MAX_BYTES)  # a small .gz may unpack to any size
                shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)  # raw[3] is the number of dimensions
                return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy()
            except (OSError, EOFError, IndexError, ValueError):
                raise ValueError(f"{path} is damaged or no idx file; copy or download it again") from None
    debian = "install Debian's dataset-fashion-mnist, " if dataset == "FashionMNIST" else ""
    raise ValueError(f"no {name}[.gz] in {root}; {debian}give another root=FOLDER, or add :root=FOLDER:download=yes")


def open_imagenet(name: str, options: dict[str, str]) -> Source:
    split = choose_split(name, options, ("TRAIN", "VAL", "TEST"))
    root = imagenet_root(name, options, "ImageNet:split=TRAIN:root=/path (splits: TRAIN, VAL, TEST)")
    folder = root / split.lower()
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist; ImageNet's root must hold the folders train and val")
    if "extra" not in options:
        return open_folder(folder)
    numbers = ("actual_index",) if split == "TEST" else ("actual_index", "class_index")
    return ImageNetEntries(root, load_entries(options, f"entries-{split}.npy", numbers), split)


def imagenet_root(name: str, options: dict[str, str], example: str) -> Path:
    """root=..., else a folder or link beside train.py that has the name of the data set in lower case."""
    beside = Path(__file__).parents[1] / name.lower()
    if "root" not in options and not beside.is_dir():
        raise ValueError(f"{name} is not at {beside}, where a folder or a link may be; name it by {example}, or use "
                         "any other folder of images: --data /my/photos")
    return Path(options.get("root", beside)).expanduser()


def load_entries(options: dict[str, str], name: str, numbers: tuple[str, ...]) -> np.ndarray:
    """An official table, mapped into memory: columns of unsigned integers, named by `numbers`, and class_id. Raises
    ValueError for any other file, and for impossible numbers of classes."""
    path = Path(options["extra"]).expanduser() / name
    fix = "write it by python -m support.sources extra"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; leave out :extra= to do without, or {fix}")
    try:
        entries = np.load(path, mmap_mode="r")
        kinds = {column: kind.kind for column, (kind, *_) in (entries.dtype.fields or {}).items()}
        fits = (entries.ndim == 1 and len(entries) > 0 and kinds.get("class_id") == "U"
                and all(kinds.get(column) == "u" for column in numbers)
                and ("class_index" not in numbers or int(entries["class_index"].max()) < MAX_CLASSES))
    except Exception:  # NumPy raises anything on damaged headers
        fits = False
    if not fits:
        raise ValueError(f"{path} is damaged, or not such a table; {fix}")
    return entries


def open_imagenet22k(name: str, options: dict[str, str]) -> InTars:
    root = imagenet_root(name, options, "ImageNet22k:root=/path (the folder of the <wnid>.tar files)")
    if "extra" not in options:
        tars = sorted(glob.glob(f"{glob.escape(str(root))}/*.tar"))
        if not tars:
            raise ValueError(f"{root} holds no <wnid>.tar; if it holds folders of images, give --data {root}")
        source = open_tars(str(root), tars, interleave=0)
        source.labels, source.classes = source.shard, [Path(t).stem for t in tars]
        return source
    path = Path(options["extra"]).expanduser() / "entries.npy"
    entries = load_entries(options, "entries.npy", ("class_index", "start_offset", "end_offset"))

    def convert() -> dict:
        shard, start = entries["class_index"].astype(np.int32), entries["start_offset"].astype(np.int64) + 512
        size = entries["end_offset"].astype(np.int64) - start  # 512: the member's header
        if size.min() < 0 or (np.diff(shard) < 0).any():
            raise ValueError(f"{path} is damaged: an image of negative size, or rows out of order; copy it again")
        wnids = [""] * (int(shard.max()) + 1)
        for row in np.unique(shard, return_index=True)[1]:
            wnids[shard[row]] = str(entries["class_id"][row])
        return dict(stamps={str(path): stamp(path)}, wnids=wnids, fingerprint=zlib.crc32(start), shard=shard,
                    start=start, size=size)

    table = cached_listing(f"entries {path.resolve()}", convert)
    tars = [str(root / f"{wnid}.tar") for wnid in table["wnids"]]
    return InTars(str(root), tars, table["shard"], table["start"], table["size"], table["fingerprint"],
                  labels=table["shard"])


def open_path(name: str, options: dict[str, str]) -> Source:
    path = Path(name).expanduser()
    if name.endswith(".tar"):
        interleave = options.get("interleave", "16")
        if not interleave.isdecimal():
            raise ValueError(f"--data {name!r}: interleave is the number of tars to read in turn, or 0")
        return open_tars(name, expand_tars(str(path)), int(interleave), options.get("image", ""))
    if not path.is_dir() and name.lower().endswith(COMPRESSED):
        raise ValueError(f"--data {name!r} is a compressed tar or zip; unpack it and name the folder or the .tar")
    if path.is_file():
        if options:
            raise ValueError(f"--data {name!r}: a list has no splits; name another list")
        return open_list(path)
    if not path.is_dir():
        raise ValueError(f"--data {name!r} is not a folder, a file, FILE.py:FUNCTION, or one of: {', '.join(NAMED)}"
                         + nearest(name, NAMED))
    folders = {s: next((path / f for f in SPLIT_FOLDERS[s] if (path / f).is_dir()), None) for s in SPLIT_FOLDERS}
    if "split" in options and folders.get(options["split"]) is None:
        names = ", ".join(SPLIT_FOLDERS.get(options["split"], ("TRAIN and VAL are the splits of a folder",)))
        raise ValueError(f"{path} has no sub-folder for split {options['split']} ({names})")
    return open_folder(folders[options.get("split", "TRAIN")] if "split" in options or all(folders.values()) else path)


def expand_tars(pattern: str) -> list[str]:
    """x-{000..099}.tar and wildcards -> the files. Raises ValueError if one is missing."""
    numbered, tars = [pattern], []
    if found := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        numbers = range(int(found[1]), int(found[2]) + 1)
        if not numbers:
            raise ValueError(f"--data {pattern!r}: {found[0]} is empty; write the smaller number first")
        numbered = (pattern.replace(found[0], str(n).zfill(len(found[1]))) for n in numbers)
    for name in numbered:  # one at a time: a mistyped range ends at the first that is missing
        tars += (matches := sorted(glob.glob(name)) or [name])
        if missing := [tar for tar in matches if not os.path.isfile(tar)]:
            raise ValueError(f"--data {pattern!r}: there is no file {missing[0]}")
    return tars


def open_folder(root: Path) -> ImageFiles:
    """All images below `root`, the files of each folder in the order of their names, before its sub-folders. Their
    first sub-folder is their label, if every image is in one and there are at least two."""
    root = root.resolve()
    try:
        source = ImageFiles(root, cached_listing(f"folder {root}", lambda: list_folder(root)))
    except PermissionError as error:
        raise ValueError(f"{error.filename} may not be read by this user; move it or change its mode") from None
    if len(source) == 0:
        tars = f"; its tar files are named {root}/*.tar" if any(root.glob("*.tar")) else ""
        left_out = f"; left out: {source.left_out}" if source.left_out else ""
        raise ValueError(f"{root} holds no image ({', '.join(SUFFIXES)}){left_out}{tars}")
    return source


def open_list(path: Path) -> ImageFiles:
    """A text file with one image per line; paths are absolute or relative to the file."""
    path = path.resolve()
    source = ImageFiles(path.parent, cached_listing(f"list {path}", lambda: read_list(path)))
    source.name, source.how_to_label = str(path), "add a label to each line, in a column that a header calls label"
    if len(source) == 0:
        raise ValueError(f"{path} names no image; write one path per line")
    return source


def open_tars(name: str, tars: list[str], interleave: int, image: str = "") -> InTars:
    tars = [os.path.abspath(tar) for tar in tars]
    table = cached_listing("\n".join(["tars", image, *tars]), lambda: list_tars(tars, image))
    if len(table["shard"]) == 0:
        left_out = f"; left out: {table['left_out']}" if table["left_out"] else ""
        raise ValueError(f"{name}: there is no image in {tars[0]}" + " or the others" * (len(tars) > 1) + left_out)
    labels = table["labels"] if len(table["labels"]) else None
    source = InTars(name, tars, *(table[key] for key in ("shard", "start", "size")), table["fingerprint"], labels,
                    interleave=interleave)
    source.notes = table["notes"]
    return source


def image_paths(names: list[str]) -> list[str]:
    """The files named, and all images below the folders named, in order, each once. Raises ValueError for names that
    do not exist."""
    paths = {}
    for name in names:
        if not os.path.exists(name):
            raise ValueError(f"no such image or folder: {name}")
        folder = open_folder(Path(name)) if os.path.isdir(name) else None
        for text in folder.notes if folder else ():
            note_once(text)
        for path in [name] if folder is None else map(folder.describe, range(len(folder))):
            paths.setdefault(os.path.realpath(path), path)
    return list(paths.values())


NAMED = {  # name: (function that opens it, the keys it takes)
    "digits": (open_digits, ("split",)), "ImageNet": (open_imagenet, ("split", "root", "extra")),
    "ImageNet22k": (open_imagenet22k, ("root", "extra")),
    **{name: (open_torchvision, ("split", "root", "download"))
       for name in ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST")}}


# ----------------------------------------------------------------------------------------------------------------------
# The official metadata of ImageNet


ENTRY = [("actual_index", "<u4"), ("class_index", "<u4")]


def write_extra(spec: str) -> None:
    """Writes the .npy files that the official code reads instead of listing folders. Raises ValueError."""
    name, options = parse_spec(spec)
    if name not in ("ImageNet", "ImageNet22k") or not {"root", "extra"} <= options.keys():
        raise ValueError(f"extra needs ImageNet:root=FOLDER:extra=FOLDER, or the same for ImageNet22k, not {spec!r}")
    root, extra = Path(options["root"]).expanduser(), Path(options["extra"]).expanduser()
    arrays = extra_of_imagenet22k(root) if name == "ImageNet22k" else {}
    if name == "ImageNet":
        splits = ("TRAIN", "VAL", "TEST")
        splits = (choose_split(name, options, splits),) if "split" in options else splits
        for split in [s for s in splits if (root / s.lower()).is_dir()]:
            arrays |= extra_of_imagenet(root, split)
    if not arrays:
        raise ValueError(f"{root} has no folder train, val or test")
    extra.mkdir(parents=True, exist_ok=True)
    for name, values in arrays.items():
        np.save(extra / name, values)
        print(f"{extra / name}: {len(values):,} entries")


def extra_of_imagenet(root: Path, split: str) -> dict[str, np.ndarray]:
    """Class names come from root/labels.txt (rows "wnid,name"); without it they are the wnids."""
    source = open_folder(root / split.lower())
    paths = [Path(source.describe(i)) for i in range(len(source))]
    if strange := [path for path in paths if not re.fullmatch(r".+_\d+", path.stem)]:
        raise ValueError(f"{printable(str(strange[0]))} is not named like an ImageNet file, such as n01440764_10.JPEG; "
                         "move it away")
    numbers = [int(path.stem.rpartition("_")[2]) for path in paths]
    if split == "TEST":
        rows = [(number, 2**32 - 1, "", "") for number in sorted(numbers)]
        return {"entries-TEST.npy": np.array(rows, [*ENTRY, ("class_id", "<U1"), ("class_name", "<U1")])}
    if source.classes is None:
        raise ValueError(f"{root / split.lower()} has no class folders; sort its images into <wnid>/ first")
    labels = root / "labels.txt"
    rows = csv.reader(labels.read_text().splitlines()) if labels.is_file() else ()
    names = {row[0]: row[1] for row in rows if len(row) > 1}
    names = [names.get(wnid, wnid) for wnid in source.classes]
    text = [("class_id", f"<U{max(map(len, source.classes))}"), ("class_name", f"<U{max(map(len, names))}")]
    rows = [(n, c, source.classes[c], names[c]) for n, c in zip(numbers, source.labels.tolist())]
    return {f"entries-{split}.npy": np.array(rows, [*ENTRY, *text]), f"class-ids-{split}.npy": np.array(source.classes),
            f"class-names-{split}.npy": np.array(names)}


def extra_of_imagenet22k(root: Path) -> dict[str, np.ndarray]:
    """From root/blocks/<wnid>.log, the output of `tar -tR`, where it exists; else from the tar itself."""
    tars = sorted(tar for tar in root.glob("*.tar") if not hidden(tar.name))
    if not tars:
        raise ValueError(f"{root} holds no <wnid>.tar")
    rows = []
    for j, tar in enumerate(tqdm(tars, desc="reading tars", unit="tar", disable=None)):
        log = root / "blocks" / f"{tar.stem}.log"
        if log.is_file():
            lines = re.findall(r"^block (\d+): (.*)$", log.read_text(), re.MULTILINE)
            starts, names = [512 * int(block) for block, _ in lines], [name for _, name in lines]
        else:
            try:
                with open(tar, "rb") as file:
                    members = [m for m in tar_members(file, os.path.getsize(tar)) if m.kind == "file" and
                               not hidden(m.name.rpartition("/")[2])]
            except Damaged as error:
                raise ValueError(f"{tar} is damaged ({error}); copy it again") from None
            starts, names = [m.start - 512 for m in members], [m.name for m in members]
            starts.append(members[-1].start + -(-members[-1].size // 512) * 512 if members else 0)
        for name, start, end in zip(names, starts, starts[1:]):
            if name != "n06470073_47249.JPEG":  # known to be damaged; the official tables leave it out as well
                rows.append((j, tar.stem, start, end, name))
    if rows and max(row[3] for row in rows) >= 2**32:
        raise ValueError(f"a tar in {root} is larger than the format's 4 GB; leave out :extra= when training")
    widths = [f"<U{max((len(row[k]) for row in rows), default=1)}" for k in (1, 4)]
    fields = [("class_index", "<u4"), ("class_id", widths[0]), ("start_offset", "<u4"), ("end_offset", "<u4"),
              ("filename", widths[1])]
    return {"entries.npy": np.array(rows, fields), "class-ids.npy": np.array([tar.stem for tar in tars])}


# ----------------------------------------------------------------------------------------------------------------------
# Commands: stats, check, extra


class PixelSums(torch.utils.data.Dataset):
    """sums[k] -> (i, sums, reason) for image i = indices[k]: per channel the sum of its pixels, of their squares, and
    their number, (3, C) float64; and the reason if it cannot be read, else ""."""

    def __init__(self, source: Source, indices):
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, k: int) -> tuple[int, Tensor, str]:
        try:
            image = self.source.image(self.indices[k])
        except Exception as error:  # decoders raise anything on damaged files
            return self.indices[k], torch.zeros(3, self.source.channels, dtype=torch.float64), short_reason(error)
        sums = torch.zeros(3, len(image), dtype=torch.float64)
        for rows in image.split(256, dim=1):  # a whole large image would take much memory as float64
            x = rows.double().div_(65535 if rows.dtype == torch.uint16 else 255).flatten(1)  # (C, 256*W)
            sums += torch.stack([x.sum(1), x.square().sum(1), torch.full_like(x[:, 0], x.shape[1])])
        return self.indices[k], sums, ""


def ignore_interrupt(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the main one responds


def read_all(source: Source, indices, num_workers: int):
    """The items of PixelSums, with a progress bar."""
    loader = torch.utils.data.DataLoader(PixelSums(source, indices), batch_size=None, worker_init_fn=ignore_interrupt,
                                         num_workers=worker_count(num_workers))
    return tqdm(loader, desc=f"reading {source.name}", unit=" images", disable=None)


def measure_stats(source: Source, n: int, num_workers: int = 0) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, in [0, 1], over all pixels of n random images (0: of all images)."""
    n = min(n, len(source)) or len(source)
    indices = range(n) if n == len(source) else [shuffled(i, len(source), 0) for i in range(n)]
    total, n_bad = 0, 0
    for _, sums, reason in read_all(source, indices, num_workers):
        total, n_bad = total + sums, n_bad + bool(reason)
    if n_bad:
        note(f"{n_bad:,} of {n:,} images cannot be read; to list them: python -m support.sources check "
             f"{shlex.quote(source.spec)}{f' --in-chans {source.channels}' * (source.channels != 3)}")
    if not total[2].any():
        raise ValueError(f"no image of {source.name} can be read")
    mean = total[0] / total[2]
    return mean.tolist(), (total[1] / total[2] - mean**2).clamp(min=0).sqrt().tolist()


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("command", choices=("stats", "check", "extra"), help="see above")
    parser.add_argument("spec", help="the source")
    parser.add_argument("--in-chans", type=at_least(1), default=3, help="channels of the images")
    parser.add_argument("--images", type=at_least(0), default=10_000, help="stats: images to measure; 0: all")
    parser.add_machine_flags("num-workers")
    args = parser.parse_args(argv)
    if args.command == "extra":
        return write_extra(args.spec)
    source = open_source(args.spec, args.in_chans)
    if args.command == "stats":
        mean, std = measure_stats(source, args.images, args.num_workers)
        print(*(f"--{name} {' '.join(f'{v:.4g}' for v in values)}" for name, values in (("mean", mean), ("std", std))))
    else:
        rows = read_all(source, range(len(source)), args.num_workers)
        bad = [f"{printable(source.describe(i))}\t{printable(reason)}" for i, _, reason in rows if reason]
        print(*bad, sep="\n", end="\n" * bool(bad))
        print(f"{len(bad):,} of {len(source):,} images of {printable(source.name)} cannot be read")
        sys.exit(bool(bad))


if __name__ == "__main__":
    run(main)
