"""Lists the images in a folder, a list or tar files once, and maps the listing into memory from then on.

    listing = cached_listing("folder /photos", lambda: list_folder(Path("/photos")))
    listing["names"], listing["ends"]           # arrays; listing["classes"], ["notes"], ... are plain data

The cache is ~/.cache/dinov2 (XDG_CACHE_HOME moves it). If a cached file does not match its digest, or a listed file or
folder has changed since, it is made again. Apache License 2.0.
"""
import codecs
import csv
import errno
import functools
import hashlib
import itertools
import json
import os
import re
import stat
import zlib
from array import array
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from support.cli import note, printable
from support.files import write_file
from support.images import SUFFIXES

JUNK = {"__MACOSX", "@eaDir", "$RECYCLE.BIN"}  # folders that macOS, Synology and Windows leave behind
MAX_CLASSES = 2**20  # numeric labels must be smaller: tables with a row per class would fill the memory


@functools.cache
def note_once(text: str) -> None:
    """Prints a note once per machine and command, however many processes open the source, and how often."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        note(text)


def counted(n: int, what: str, plural: str = "s") -> str:
    return f"{n:,} {what}{plural * (n != 1)}"


# ----------------------------------------------------------------------------------------------------------------------
# The cache


def cached_listing(what: str, make) -> dict:
    """make()'s listing: {"stamps": {path: stamp(path)}, name: array or plain data}, from the cache unless a stamp has
    changed. If the cache cannot be written, prints a note."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dinov2"
    except RuntimeError:  # this user has no home
        note_once("no home folder to cache the listing in, so every process lists; XDG_CACHE_HOME can name a folder")
        return make()
    path = folder / f"{hashlib.sha1(os.fsencode(what)).hexdigest()[:16]}.listing5"
    listing = read_listing(path)
    if listing and listing["what"] == what and is_fresh(listing["stamps"]):
        return listing
    listing = dict(what=what, **make())
    try:
        write_file(path, functools.partial(write_listing, listing))
    except ValueError as error:
        note_once(f"{error}, so every process lists; to cache listings elsewhere than {folder}, set XDG_CACHE_HOME")
        return listing
    written = read_listing(path)  # or what another machine, with other files of that name, has just written
    return written if written and written["stamps"] == listing["stamps"] else listing


def stamp(path: str) -> list[int]:
    """What tells that a file or folder has changed: its time in ns, and the size of a file."""
    info = os.stat(path)
    return [info.st_mtime_ns, info.st_size if stat.S_ISREG(info.st_mode) else 0]


def is_fresh(stamps: dict[str, list[int]]) -> bool:
    try:
        return all(stamp(path) == before for path, before in stamps.items())
    except OSError:  # a path is gone
        return False


def write_listing(listing: dict, file) -> None:
    """SHA-256 of all that follows (32 bytes), length of the header (8), header (JSON), tables. All starts are multiples
    of 8."""
    tables = {name: value for name, value in listing.items() if isinstance(value, np.ndarray)}
    tables = dict(sorted(tables.items(), key=lambda item: -item[1].itemsize))  # keeps them aligned
    plain = {name: value for name, value in listing.items() if name not in tables}
    header = json.dumps([plain, [(name, table.dtype.str, len(table)) for name, table in tables.items()]]).encode()
    header += b" " * (-len(header) % 8)
    parts = [len(header).to_bytes(8, "little"), header]
    parts += [np.ascontiguousarray(table).view(np.uint8) for table in tables.values()]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    for part in (digest.digest(), *parts):
        file.write(part)


def read_listing(path: Path) -> dict | None:
    """The listing in a file, its tables mapped into memory. None if there is none, or it is damaged. Nothing is parsed
    before the digest is verified."""
    try:
        if not path.is_file():
            return None
        data = np.memmap(path, np.uint8, "c").view(np.ndarray)  # private, as torch takes no read-only arrays
    except (OSError, ValueError):  # not readable by this user; empty
        return None
    if hashlib.sha256(data[32:]).digest() != data[:32].tobytes():
        note_once(f"{path} is damaged; listing again")
        return None
    at = 40 + int.from_bytes(data[32:40].tobytes(), "little")
    listing, tables = json.loads(data[40:at].tobytes())
    for name, dtype, n in tables:
        listing[name] = np.frombuffer(data, dtype, n, at)
        at += listing[name].nbytes
    return listing


class ListingBuilder:
    """Collects file names and labels into the tables of a listing."""

    def __init__(self):
        self.names, self.ends, self.labels = bytearray(), array("q", [0]), array("i")

    def add(self, name: str, label: int) -> None:
        self.names += os.fsencode(name)
        self.ends.append(len(self.names))
        self.labels.append(label)

    def tables(self, classes: dict[str, int] | None, numeric: bool = False) -> dict:
        """`classes` maps names to the labels used so far, which are renumbered in the order of the names; with
        `numeric`, if all are numbers, in that of the numbers. "" is no label."""
        names = sorted(c for c in classes or () if c)
        if numeric and all(re.fullmatch("0|[1-9][0-9]*", name) for name in names):
            names.sort(key=len)  # stays sorted among those of equal length
        numbers = {name: i for i, name in enumerate(names)}
        renumbered = np.array([numbers.get(c, -1) for c in classes or ()], np.int32)
        labels = renumbered[np.array(self.labels, np.int32)] if classes else renumbered
        return dict(names=np.frombuffer(self.names or b"\0", np.uint8), ends=np.array(self.ends), labels=labels,
                    classes=names, fingerprint=zlib.crc32(labels, zlib.crc32(self.names)))


# ----------------------------------------------------------------------------------------------------------------------
# What is left out


BESIDE = {"." + ending for ending in (  # of files that often accompany images: nobody misses them
    "txt text md rst json jsonl xml csv tsv yaml yml toml ini cfg log html htm pdf py sh db cls id url pkl pickle pyd "
    "npz pt pth mat md5 sha256 bib xmp aae").split()}
UNNAMED = ("readme", "license", "licence", "copying", "notice", "authors", "changelog", "makefile")


class LeftOut(Counter):
    """Counts the files that are not read as images by extension, except those nobody would expect to be read."""

    def add(self, name: str) -> None:
        """`name` in lower case."""
        ending = os.path.splitext(name)[1]
        if ending not in BESIDE and name not in UNNAMED:
            ending = ending if re.fullmatch(r"\.(?=\d*[a-z])\w{1,9}", ending) else "without a known extension"
            self[ending if len(self) < 100 or ending in self else "others"] += 1

    def __str__(self) -> str:
        """"120 .heic, 3 .tga", the most frequent first, at most five; "" if there are none."""
        most = sorted(self.items(), key=lambda item: (-item[1], item[0]))
        rest = sum(n for _, n in most[5:])
        most = [f"{n:,} {what}" if what[0] == "." or what[-1] != "s" else counted(n, what[:-1]) for what, n in most[:5]]
        return ", ".join(most + [counted(rest, "other")] * (rest > 0))

    def notes(self, where: str, n_images: int) -> list[str]:
        return [f"{where}: {counted(n_images, 'image')}; left out: {self}"] if self else []


def hidden(name: str) -> bool:
    """Whether a folder or file is left out, such as the ._ files of macOS."""
    return name.startswith(".") or name in JUNK


# ----------------------------------------------------------------------------------------------------------------------
# Folders


def list_folder(root: Path) -> dict:
    """All images below `root`, the files of each folder in the order of their names, before its sub-folders."""
    listing, classes, stamps, seen, others = ListingBuilder(), {}, {}, set(), LeftOut()
    todo, links, linked, loose = [""], [], False, ""
    with tqdm(desc=f"listing {root}", unit=" images", disable=None) as bar:
        while todo or links:
            linked = linked or not todo  # links come last: a folder is listed by its real name, if it has one
            folder = todo.pop() if todo else links.pop(0)
            info = os.stat(root / folder)
            if linked and (info.st_dev, info.st_ino) in seen:  # two links to one folder, or one that leads back up
                continue
            seen.add((info.st_dev, info.st_ino))
            stamps[str(root / folder)] = [info.st_mtime_ns, 0]
            files, folders, new_links = scan(root / folder, folder, others)
            for name in sorted(files):
                listing.add(name, classes.setdefault(folder.split(os.sep)[0], len(classes)))
            loose = loose if folder or not files else min(files)
            todo += sorted(folders, reverse=True)
            links = sorted(links + new_links) if new_links else links
            bar.update(len(files))
    labeled = len(classes) > 1 and "" not in classes
    why = f": {root / loose} lies beside its class folders" if loose and len(classes) > 1 else ""
    return dict(stamps=stamps, why_unlabeled=why, notes=others.notes(str(root), len(listing.labels)),
                left_out=str(others), **listing.tables(classes if labeled else None))


def scan(path: Path, folder: str, others: LeftOut) -> tuple[list[str], list[str], list[str]]:
    """The images, the folders and the links to folders in a folder, as paths below `folder`. `others` counts the rest.
    """
    files, folders, links, prefix = [], [], [], os.path.join(folder, "")
    for entry in os.scandir(path):
        name, is_image = entry.name, entry.name.lower().endswith(SUFFIXES)
        if hidden(name):
            continue
        if is_image and entry.is_file(follow_symlinks=False):  # nearly all of them
            files.append(prefix + name)
        elif links_to_itself(entry):
            others["broken links"] += 1
        elif entry.is_dir():
            (links if entry.is_symlink() else folders).append(prefix + name)
        elif not is_image:
            others.add(name.lower())
        elif entry.is_file():  # a link to one
            files.append(prefix + name)
        elif entry.is_symlink():
            others["broken links"] += 1
    return files, folders, links


def links_to_itself(entry: os.DirEntry) -> bool:
    try:
        return entry.is_symlink() and not os.stat(entry.path)
    except OSError as error:
        return error.errno == errno.ELOOP


# ----------------------------------------------------------------------------------------------------------------------
# Lists


MAX_LINE = 2**16  # characters
PROBED = 32  # lines from which the layout is guessed
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
SEPARATORS = {"\t": "tabs", "": "", ",": "commas", ";": "semicolons",  # "": a line is a path
              " ": "a space", "  ": "spaces"}  # one before the label, after a path that may contain some; between all
LABEL_NAMES = ("label", "labels", "class", "class_name", "classname", "category", "target", "class_id", "category_id",
               "y")  # of columns, in lower case


class Layout(NamedTuple):
    """How to read the lines of a list."""
    separator: str
    path: int  # number of the column
    label: int | None
    n_columns: int
    header: list[str]  # the columns of the first line, if that is a header


def read_list(path: Path) -> dict:
    """A text file with one image per line: see docs/data.md for what is understood. Raises ValueError, naming the line,
    for what is not."""
    listing, classes, others = ListingBuilder(), {}, LeftOut()
    stamps = {str(path): stamp(path)}
    try:
        layout = guess_layout(path)
        rows = list_rows(path, layout) if layout else ()
        for name, label in tqdm(rows, desc=f"reading {path}", unit=" images", disable=None):
            label = "" if re.fullmatch("-[0-9]+", label) else label  # as in tar files
            listing.add(name, classes.setdefault(label, len(classes)))
            if not (lower := name.lower()).endswith(SUFFIXES):
                others.add(lower)
    except (UnicodeError, PermissionError):
        raise ValueError(f"{path} is not readable as text; --data takes a folder, a list with one image path per line, "
                         "or uncompressed tars named *.tar") from None
    n_unlabeled = listing.labels.count(classes.get("", -1))
    tables = listing.tables(classes if n_unlabeled < len(listing.labels) else None, numeric=True)
    return dict(stamps=stamps, notes=list_notes(path, layout, tables, n_unlabeled, others), left_out="",
                why_unlabeled="", **tables)


def list_notes(path: Path, layout: Layout | None, tables: dict, n_unlabeled: int, others: LeftOut) -> list[str]:
    """What was understood, unless the list is one of plain paths."""
    said, n = [], len(tables["labels"]) or len(tables["ends"]) - 1
    if tables["classes"]:
        named = layout.label < len(layout.header)
        column = f"column {layout.header[layout.label]!r}" if named else f"{ordinal(layout.label)} column"
        said = [f"{counted(len(tables['classes']), 'class', 'es')}, from the {column}"]
        said += [f"{n_unlabeled:,} without a label"] * (n_unlabeled > 0)
    if layout and layout.header:
        said.append(f"the first line, {' '.join(layout.header)!r}, is a header")
        if layout.path < len(layout.header) > 1:
            said.append(f"the paths are from the column {layout.header[layout.path]!r}")
        if layout.label is None and len(layout.header) > 1:
            said.append(f"no labels, as no column is called {', '.join(LABEL_NAMES[:-1])} or {LABEL_NAMES[-1]}")
    said += [f"read although their extensions are unknown: {others}"] * bool(others)
    return [f"{path}: {counted(n, 'image')}, {'; '.join(said)}"] if said else []


def ordinal(column: int) -> str:
    return ORDINALS[column] if column < len(ORDINALS) else f"{column + 1}th"


def text_lines(path: Path):
    """Yields (number, line) for the lines that are not blank. Raises UnicodeError if the file is not text, ValueError
    if a line is too long."""
    with open(path, "rb") as file:
        utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # as Windows writes it
    with open(path, encoding="utf-16" if utf16 else "utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(iter(functools.partial(file.readline, MAX_LINE), ""), 1):
            if "\0" in line:
                raise UnicodeError
            if len(line) == MAX_LINE:
                raise ValueError(f"{path}, line {number}, is longer than {MAX_LINE:,} characters; write one path per "
                                 "line")
            if (line := line.strip(" \r\n")) and not line.isspace():
                yield number, line


def split_line(line: str, separator: str) -> list[str]:
    """The columns of a line, without spaces around them and without quotes."""
    if '"' in line:  # line by line: a quote that is never closed must not swallow the rest of the file
        spaced = separator[:1] == " "  # Python 3.13 refuses to skip spaces if they separate
        fields = next(csv.reader([line], delimiter=separator[:1] or "\x1f", skipinitialspace=not spaced))
        return [field.strip() for field in fields]
    if not separator or separator == " " and line.lower().endswith(SUFFIXES):
        return [line]
    if separator.isspace() and separator != "\t":
        return line.rsplit(None, 1) if separator == " " else line.split()
    return [field.strip() for field in line.split(separator)]


def guess_layout(path: Path) -> Layout | None:
    """The layout in which the first lines of a list name the most existing files, then the most image extensions. None
    for an empty list. Raises ValueError if in no column half of the lines name any."""
    lines = [line for (_, line), _ in zip(text_lines(path), range(PROBED))]
    best, found = (0, 0), None
    for separator in SEPARATORS:
        rows = [split_line(line, separator) for line in lines]
        for column in range(min(max(map(len, rows), default=0), 32)):
            cells = [row[column] for row in rows if len(row) > column]
            there = [is_there(path, cell) for cell in cells[:16]]
            score = sum(there), sum(cell.lower().endswith(SUFFIXES) for cell in cells)
            if score > best:
                best, found = score, (separator, column, rows)
    if not lines:
        return None
    separator, column, rows = found or ("", 0, [])
    n = sum(len(row) > column and (row[column].lower().endswith(SUFFIXES) or is_there(path, row[column]))
            for row in rows)
    if 2 * n < len(lines):  # prose, or code
        raise ValueError(f"{path} is not a list of images: {f'only {n}' if n else 'none'} of the first {len(lines)} "
                         f"lines could be read as an image's path; --data takes a folder, tars named *.tar, or a list "
                         f"with one path per line, absolute or relative to {path.parent}")
    first = rows[0][column] if len(rows[0]) > column else ""
    named = len(rows) > 1 and not re.search(r"[./\\]", first) and not is_there(path, first)
    n_columns = max(*map(len, rows), 1 + (separator == "\t" and not named))  # labels after tabs may come later
    label = label_column(column, n_columns, rows[0] * named, rows[-1])
    return Layout(separator, column, label, n_columns, rows[0] * named)


def is_there(path: Path, name: str) -> bool:
    return bool(name) and os.path.isfile(os.path.join(path.parent, name))


def label_column(path: int, n_columns: int, header: list[str], row: list[str]) -> int | None:
    """Which column holds the labels: one that the header calls so, else the one after the paths, else the first; none
    that names an image in `row`, such as a mask."""
    names = [name.lower() for name in header]
    by_name = [names.index(name) for name in LABEL_NAMES if name in names and names.index(name) != path]
    others = [i for i in (path + 1, 0) if i < n_columns and i != path
              and not (i < len(row) and row[i].lower().endswith(SUFFIXES))]
    return (by_name + others + [None])[0]


def list_rows(path: Path, layout: Layout):
    """Yields (path, label), the label "" if there is none."""
    separator, column, label, n_columns, header = layout
    optional = separator in ("\t", " ") and not header and column == 0  # the label, together with its separator
    for number, line in itertools.islice(text_lines(path), bool(header), None):
        fields = split_line(line, separator)
        n = len(fields)
        if n <= column or not fields[column]:
            raise ValueError(f"{path}, line {number}, {line[:80]!r}, has no path in the {ordinal(column)} column, as "
                             "the first lines have; fix or remove it")
        if n > n_columns and any(fields[n_columns:]):
            raise ValueError(f"{path}, line {number}, {line[:80]!r}, has {n} columns, the first lines at most "
                             f"{n_columns}, separated by {SEPARATORS[separator]}; quote a path or label that contains "
                             "one")
        if n < n_columns and not (optional and n == 1 and (separator == "\t" or line.lower().endswith(SUFFIXES))):
            raise ValueError(f"{path}, line {number}, {line[:80]!r}, has {counted(n, 'column')}, the first lines "
                             f"{n_columns}, separated by {SEPARATORS[separator]}; complete or remove it (a column may "
                             "be empty)")
        yield fields[column], "" if label is None or label >= n else fields[label]


# ----------------------------------------------------------------------------------------------------------------------
# Tar files


MAX_HEADER = 2**20  # bytes of a long name or of the attributes of a file
MAX_NAME = 4096  # characters, as for paths on Linux; looking up a label takes time with the square of it
MAX_LABEL = 64  # bytes of a .cls member
MASK = re.compile("seg|mask|depth|label|normal|edge")  # in the endings of images that are rarely wanted


class Damaged(ValueError):
    """What is wrong with a tar file."""


class Member(NamedTuple):
    name: str
    start: int  # of the data
    size: int
    kind: str  # file, link, sparse, or "": a folder, a device


def tar_members(file, total: int):
    """Yields the Members of an open tar file of `total` bytes (ustar, GNU or pax), seeking from header to header. Never
    reads more than MAX_HEADER bytes at once, whatever the headers claim. Raises Damaged."""
    at, long_name, records = 0, "", {}
    while at + 512 <= total:
        block = read_at(file, at, 512)
        if not block.strip(b"\0"):
            return
        kind, size = block[156:157], checked_size(block, at)
        at += 512
        if kind in b"xLKXg":
            if size > MAX_HEADER:
                raise Damaged(f"a header of {size:,} bytes at byte {at - 512}")
            content = read_at(file, at, size)
            if kind == b"L":
                long_name = content.split(b"\0")[0].decode("utf-8", "surrogateescape")
            elif kind in b"xX":
                records = pax_records(content)
        else:
            name = records.get("path") or long_name or member_name(block)
            if len(name) > MAX_NAME:
                raise Damaged(f"a name of {len(name):,} characters at byte {at - 512}")
            sparse = kind == b"S" or any(key.startswith("GNU.sparse.") for key in records)
            if "size" in records:
                size = number(os.fsencode(records["size"]), at - 512, 10)
            more = kind == b"S" and block[482]  # maps of holes, between header and data
            while more and at + 512 <= total:
                more = read_at(file, at, 512)[504]
                at += 512
            if kind in b"123456":
                size = 0  # these have no data
            if at + size > total:
                raise Damaged("its end is missing")
            is_file = kind in b"07\0" and not name.endswith("/")
            yield Member(name, at, size, "sparse" if sparse else "file" if is_file else "link" if kind in b"12" else "")
            long_name, records = "", {}
        at += -(-size // 512) * 512
    raise Damaged("its end is missing")


def read_at(file, at: int, n: int) -> bytes:
    file.seek(at)
    data = file.read(n)
    if len(data) < n:
        raise Damaged("its end is missing")
    return data


def checked_size(block: bytes, at: int) -> int:
    """The size in a header. Raises Damaged if the checksum is wrong."""
    rest = block[:148] + b" " * 8 + block[156:]
    stated = number(block[148:156], at)
    if stated != sum(rest) and stated != sum(rest) - 256 * sum(byte > 127 for byte in rest):  # some add signed bytes
        raise Damaged(f"no header at byte {at}")
    return number(block[124:136], at)


def number(field: bytes, at: int, base: int = 8) -> int:
    """A number in a header: digits, or binary if large, as GNU writes it. Raises Damaged if it is neither, or negative.
    """
    if field[0] == 0x80 and base == 8:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0")[0].strip() or b"0"
    if not re.fullmatch(rb"[0-7]+" if base == 8 else rb"[0-9]{1,20}", digits):
        raise Damaged(f"no number, {field[:12]!r}, in the header at byte {at}")
    return int(digits, base)


def member_name(block: bytes) -> str:
    name, prefix = block[:100].split(b"\0")[0], block[345:500].split(b"\0")[0]
    if prefix and block[257:263] == b"ustar\0":
        name = prefix + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def pax_records(content: bytes) -> dict[str, str]:
    """Lines "LENGTH KEY=VALUE"; the length counts itself. Anything else ends the records."""
    records, at = {}, 0
    while found := re.compile(rb"(\d{1,7}) ([^=]{1,200})=").match(content, at):
        end = at + int(found[1])
        if not found.end() < end <= len(content):
            break
        records[found[2].decode("utf-8", "replace")] = content[found.end() : end - 1].decode("utf-8", "surrogateescape")
        at = end
    return records


def list_tars(tars: list[str], image: str = "") -> dict:
    """Where the images are, with labels from the .cls members. `image`: which one of a sample with several images."""
    columns = {"shard": array("i"), "start": array("q"), "size": array("q"), "labels": array("i")}
    stamps, others, several, notes = {}, LeftOut(), Several(image), []
    for j, path in enumerate(tqdm(tars, desc="listing tars", unit="tar", disable=None)):
        stamps[path] = stamp(path)
        images, labels, damage = list_tar(path, others)
        if damage and not images:
            raise ValueError(f"{path} is not a plain tar file ({damage}); unpack it if it is compressed")
        if damage:
            notes.append(f"{path} is damaged after {counted(len(images), 'image')} ({damage}); the rest is skipped")
        for name, start, size in several.choose(images):
            for column, value in zip(columns.values(), (j, start, size, label_of(name, labels))):
                column.append(value)
    tables = {name: np.array(column) for name, column in columns.items()}
    if several.endings and not len(tables["shard"]):
        raise ValueError(f"no image of {tars[0]}{' and the others' * (len(tars) > 1)} is named *.{image}; there are "
                         f"{several}")
    if (tables["labels"] < 0).all():
        tables["labels"] = tables["labels"][:0]
    where = tars[0] + f" and {len(tars) - 1:,} others" * (len(tars) > 1)
    notes = notes[:3] + [f"{len(notes) - 3:,} more of these tar files are damaged"] * (len(notes) > 3)
    notes += others.notes(where, len(tables["shard"])) + several.notes(where)
    fingerprint = functools.reduce(lambda crc, table: zlib.crc32(table, crc), tables.values(), 0)
    return dict(stamps=stamps, fingerprint=fingerprint, notes=notes, left_out=str(others), **tables)


def list_tar(path: str, others: LeftOut) -> tuple[list[tuple[str, int, int]], dict[str, int], str]:
    """(name, start, size) of each image of a tar; labels by the names of their members without .cls; what is damaged.
    """
    images, labels = [], {}
    try:
        with open(path, "rb") as file:
            for member in tar_members(file, os.path.getsize(path)):
                name = member.name.lower()
                if not member.kind or any(hidden(part) for part in member.name.split("/") if part.strip(".")):
                    continue
                if member.kind != "file" and name.endswith((*SUFFIXES, ".cls")):
                    others[f"{member.kind} members"] += 1
                elif member.kind != "file":
                    continue
                elif name.endswith(SUFFIXES):
                    images.append((member.name, member.start, member.size))
                elif name.endswith(".cls"):
                    labels[member.name[:-4]] = read_label(path, file, member)
                else:
                    others.add(name.rpartition("/")[2])
    except Damaged as error:
        return images, labels, str(error)
    return images, labels, ""


def read_label(path: str, file, member: Member) -> int:
    content = read_at(file, member.start, min(member.size, MAX_LABEL))
    try:
        label = int(content if member.size <= MAX_LABEL else "")
    except ValueError:
        text = printable(content.decode("utf-8", "surrogateescape").strip())
        text = text if len(text) <= 40 else text[:37] + "..."
        raise ValueError(f"{path}: {member.name} holds '{text}', not a number; number the classes from 0") from None
    if label >= MAX_CLASSES:
        raise ValueError(f"{path}: the label {member.name!r} is {label}; number the classes from 0 to at most "
                         f"{MAX_CLASSES - 1:,}")
    return max(label, -1)


def label_of(name: str, labels: dict[str, int]) -> int:
    """The label of image a.b.jpg: that of a.b.jpg.cls, a.b.cls or a.cls, the first there is; else -1."""
    folder, slash, base = name.rpartition("/")
    parts = base.split(".")
    return next((labels[stem] for n in range(len(parts), 0, -1)
                 if (stem := folder + slash + ".".join(parts[:n])) in labels), -1)


class Several:
    """Samples with several images, as WebDataset has them: names that are equal up to the first dot are one sample.
    Chooses those whose name ends as `image` says, "all" for all; by default key.jpg before key.seg.png."""

    def __init__(self, image: str):
        self.image, self.endings, self.n_samples, self.read = image.lower().lstrip("."), Counter(), 0, set()

    def choose(self, images: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
        """Those of one tar to read."""
        if self.image == "all":
            return images
        keys, samples = [], {}
        for name, _, _ in images:
            folder, slash, base = name.rpartition("/")
            key, _, ending = base.partition(".")
            keys.append((folder + slash + key, ending.lower()))
            samples.setdefault(keys[-1][0], set()).add(keys[-1][1])
        if self.image:
            self.count(ending for _, ending in keys)
            return [item for item in images if item[0].lower().endswith(f".{self.image}")]
        chosen = {key: preferred(endings) for key, endings in samples.items() if len(endings) > 1}
        self.n_samples += len(chosen)
        self.count(ending for key, ending in keys if key in chosen)
        self.read = self.read.union(*chosen.values()) if len(self.read) < 1000 else self.read
        return [item for item, (key, ending) in zip(images, keys) if ending in chosen.get(key, (ending,))]

    def count(self, endings) -> None:
        for ending in endings:
            if len(self.endings) < 1000 or ending in self.endings:  # names may merely have dots
                self.endings[ending] += 1

    def by_count(self) -> list[str]:
        return sorted(self.endings, key=lambda ending: (-self.endings[ending], ending))

    def __str__(self) -> str:
        return ", ".join(f"{self.endings[ending]:,} .{ending}" for ending in self.by_count()[:5])

    def notes(self, where: str) -> list[str]:
        """None where names merely have dots: no ending comes twice, and all are read."""
        left = [ending for ending in self.by_count() if ending not in self.read]
        if self.image or not self.n_samples or not left and max(self.endings.values()) == 1:
            return []
        read = f"only those named .{' or .'.join(sorted(self.read)[:5])}" if left else "all"
        example = min(left or self.by_count(), key=lambda ending: bool(MASK.search(ending)))
        return [f"{where}: {counted(self.n_samples, 'sample')} with several images ({self}), of which {read} are read; "
                f"to choose, add :image={example}{' or :image=all' * bool(left)}"]


def preferred(endings: set[str]) -> set[str]:
    """Which images of a sample to read: one that is named by its key alone, where there is one; else all."""
    plain = sorted((ending for ending in endings if "." not in ending), key=lambda e: SUFFIXES.index(f".{e}"))
    return set(plain[:1]) or endings
