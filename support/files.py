"""Writing files so that no reader ever sees half of one; checksums. Apache License 2.0."""
import contextlib
import hashlib
import json
import os
import shutil
import uuid
import zipfile
from pathlib import Path

from tqdm import tqdm


@contextlib.contextmanager
def replacing(path: Path, durable: bool = False):
    """Yields a temporary path, where the caller writes a file or a folder, and then renames it to `path`: readers
    never see a partial file, with `durable` not even after a power cut, and a failure leaves nothing behind."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield temporary
        if durable:
            make_durable(temporary)
        os.replace(temporary, path)
        if durable:
            make_durable(path.parent)
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()


def make_durable(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, write) -> None:
    """Calls write(file), then renames the finished file to `path`. Raises ValueError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            write(file)
    except (OSError, RuntimeError) as error:  # PyTorch raises RuntimeError on a full disk
        raise ValueError(f"{path} could not be written ({getattr(error, 'strerror', None) or error})") from None


def write_json(path: Path, content: dict) -> None:
    with replacing(path, durable=True) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def refuse_inputs(out: Path, *inputs) -> None:
    """Raises ValueError if the output file `out` is one of the inputs."""
    if out.exists() and any(os.path.exists(path) and out.samefile(path) for path in inputs):
        raise ValueError(f"{out} is one of the input files; choose another name")


def check_sums(path: Path) -> None:
    """Raises BadZipFile or ValueError if a file written by torch.save has changed since. It holds a CRC-32 of each of
    its parts, which torch.load does not check."""
    with zipfile.ZipFile(path) as file:
        if part := file.testzip():
            raise ValueError(f"{path} has changed since it was written, in {part}")


def sha256(path: Path, show_progress: bool = False) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file, tqdm(total=path.stat().st_size, desc=f"verifying {path.name}", unit="B", delay=1,
                                        unit_scale=True, leave=False, disable=None if show_progress else True) as bar:
        while piece := file.read(1 << 22):
            digest.update(piece)
            bar.update(len(piece))
    return digest.hexdigest()
