"""Weight files from anywhere: what a file is, where the backbone lies in it, which other network it may hold.

    kind_of_file("photo.pth")       # "a PNG image", by its content; "" for what may be a PyTorch file
    find_backbone(path, ckpt)       # the backbone in nested dicts, under any prefix: Found(prefix, weights, others)
    name_of_network(keys)           # "DINOv3", "CLIP", ...; "" if unknown
    weights_hash(model)             # SHA-256 of the weights

Apache License 2.0.
"""
import hashlib
import itertools
import json
import re
import shlex
import zipfile
from typing import NamedTuple

import torch
from torch import Tensor, nn

from support.cli import printable


# ----------------------------------------------------------------------------------------------------------------------
# What a file is

SAFETENSORS = "a safetensors file"
UNPACK = "; unpack it first"
SIGNATURES = [(start, magic, kind) for start, kind, *magics in (  # after "; ": what to do
    (0, "a PNG image", b"\x89PNG"), (0, "a JPEG image", b"\xff\xd8\xff"), (0, "a GIF image", b"GIF8"),
    (8, "a WebP image", b"WEBP"), (0, "a TIFF image", b"II*\0", b"MM\0*"), (0, "a BMP image", b"BM"),
    (0, "a PDF", b"%PDF"), (4, "a video or a HEIF or AVIF image", b"ftyp"), (0, "a NumPy array", b"\x93NUMPY"),
    (0, "an HDF5 file, as of Keras", b"\x89HDF"), (0, "a GGUF file", b"GGUF"),
    (0, f"a gzip archive{UNPACK}", b"\x1f\x8b"), (0, f"a bzip2 archive{UNPACK}", b"BZh"),
    (0, f"an xz archive{UNPACK}", b"\xfd7zXZ"), (0, f"a zstd archive{UNPACK}", b"\x28\xb5\x2f\xfd"),
    (0, f"a 7z archive{UNPACK}", b"7z\xbc\xaf"), (257, f"a tar archive{UNPACK}", b"ustar")) for magic in magics]
LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # near the start of the files of torch.save before version 1.6
TEXTS = ((r"version https://git-lfs", "a Git LFS pointer; fetch the file itself with: git lfs pull"),
         (r"\s*<(!doctype )?html", "an HTML page, as servers send instead of a file; open the link in a browser"),
         (r"\s*<", "XML"), (r"\s*[\[{]", "JSON"), (r"", "text"))


def kind_of_file(path: str) -> str:
    """What a file is by its content, and after "; " what to do about it; SAFETENSORS for those; "" for what may be a
    PyTorch file, damaged or not, and for what cannot be opened."""
    try:
        with open(path, "rb") as file:
            head = file.read(1024)
    except OSError:
        return ""  # reading it will report why
    if not head:
        return "empty; copy or download it again"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 10**8:  # the length of a JSON header: may equal "PK"
        return SAFETENSORS
    if kinds := [kind for start, magic, kind in SIGNATURES if head.startswith(magic, start)]:
        return kinds[0]
    if head.startswith(b"PK"):
        return kind_of_zip(path)
    if head.startswith(b"\x80"):
        return "" if LEGACY in head[:32] else "a Python pickle that torch.save did not write"
    text = head.decode("utf-8-sig", errors="replace")
    if "\0" in text or text.count("\ufffd") > 1:  # one, where `head` cuts a character in two
        return ""
    return next(kind for pattern, kind in TEXTS if re.match(pattern, text, re.IGNORECASE))


def kind_of_zip(path: str) -> str:
    """kind_of_file() of a zip archive, as PyTorch files are."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.rsplit("/")[-1] for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, UnicodeError):  # its end is missing
        return "truncated; copy or download it again"
    if "constants.pkl" in names:
        return "a TorchScript program; save its weights: torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')"
    if "archive_format" in names:
        return "a program of torch.export"
    return "" if "data.pkl" in names else "a zip archive that torch.save did not write"


def how_to_extract(path: str, error: str) -> str:
    """What to do about a pickle that holds more than weights, such as the settings of a run: a shell command that runs
    the pickled code and saves the weights alone. "" if no model would need such code."""
    if re.search(r"pickled code, (posix|nt|os|subprocess|sys|builtins|runpy|shutil|socket)\.", error):
        return ""
    return ". If you trust it, save its weights alone: python -c " + shlex.quote(
        f'import torch as t; d = t.load({json.dumps(path)}, "cpu", weights_only=False); '
        "d = d if isinstance(d, dict) else d.state_dict(); w = lambda d: {k: w(v) if isinstance(v, dict) else v "
        'for k, v in d.items() if isinstance(v, (dict, t.Tensor))}; t.save(w(d), "weights.pth")')


# ----------------------------------------------------------------------------------------------------------------------
# Where a backbone lies in it

WRAPPERS = re.compile(r"(?<![^.])(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|module)\.")  # at any depth
ANCHOR = re.compile(r"(?:^|.*\.)(?=(?:patch_embed\.proj|embeddings\.patch_embeddings\.projection)\.weight$)")
TEACHER, STUDENT = (re.compile(rf"(^|[._])({names})([._]|$)") for names in ("teacher|ema|momentum|target", "student"))
NETWORKS = [(re.compile(rf"(^|\.)({pattern})"), name) for pattern, name in (
    (r"storage_tokens$|rope_embed\.|.*qkv\.bias_mask$|(?<!encoder\.)layer\.\d+\.layer_scale1\.", "DINOv3"),
    (r"text_projection|(visual|embeddings)\.class_embedding$|class_embedding$|norm_pre\.weight$", "CLIP"),
    (r"head\.probe$|attn_pool\.latent$|logit_bias$", "SigLIP"),
    (r"spm\.stem\.", "a ViT adapter, as of Mask2Former, for hub.load_dense"),
    (r"decoder_(pos_)?embed|decoder_blocks\.", "MAE with its decoder"), (r"predictor_(pos_)?embed", "I-JEPA"),
    (r".*attn\.rel_pos_h$|image_encoder\.", "SAM"),
    (r".*attn\.q_bias$|.*relative_position_bias_table$", "BEiT, EVA or Swin"),
    (r"blocks\.\d+\.gamma_1$", "DINOv3, EVA or BEiT"), (r"layer1\.0\.conv1\.weight$", "a ResNet"),
    (r"stages\.\d+\.(blocks\.)?\d+\.(dwconv|conv_dw)\.", "a ConvNeXt"),
    (r"layernorm_before\.weight$", "a ViT of Hugging Face other than DINOv2"),
    (r"self_attn\.q_proj\.weight$|h\.\d+\.attn\.c_attn\.", "a language model"))]


class Found(NamedTuple):
    prefix: str  # of the keys in the file, with those of the dicts around them, such as "state_dict.encoder."
    weights: dict[str, Tensor]  # without it, and without the names that FSDP, DDP and torch.compile insert
    others: list[str]  # keys of the other tensors in the file


def name_of_network(keys) -> str:
    """What a network that is not DINOv2 is called, by the names of its weights; "" for an unknown one."""
    return next((name for pattern, name in NETWORKS if any(pattern.search(key) for key in keys)), "")


def dicts_of_tensors(ckpt: dict) -> list[tuple[str, dict[str, Tensor]]]:
    """The dicts with tensors in nested dicts, each with the path of keys to it, such as "checkpoint.model."."""
    found, seen, waiting = [], set(), [("", 0, ckpt)]
    for path, depth, part in waiting:
        if id(part) in seen or depth > 8:  # a file may hold dicts that contain themselves
            continue
        seen.add(id(part))
        if tensors := {shown_key(k): v for k, v in part.items() if torch.is_tensor(v)}:
            found.append((path, tensors))
        waiting += [(f"{path}{shown_key(k)}.", depth + 1, v) for k, v in part.items() if isinstance(v, dict)]
    return found


def shown_key(key) -> str:
    """A key of a dict, fit for a message of one line."""
    return printable(str(key))[:200]


def find_backbone(path: str, ckpt: dict) -> Found:
    """The vision transformer in a file's nested dicts: all tensors of the dict that have the prefix of its patch
    embedding. Of several, the teacher's (or EMA's), and never a student's if there is another. Raises ValueError if
    there is none, or more than one that could be meant."""
    found, keys = {}, []
    for where, tensors in dicts_of_tensors(ckpt):
        names = {}
        for key, value in tensors.items():
            name = WRAPPERS.sub("", key)
            if name in names:
                raise ValueError(f"{path} holds {name} twice, the second time as {key}")
            names[name] = value
        keys += [where + name for name in names]
        for prefix in dict.fromkeys(match[0] for match in map(ANCHOR.match, names) if match):
            found[where + prefix] = {n.removeprefix(prefix): v for n, v in names.items() if n.startswith(prefix)}
    whole = {p: w for p, w in found.items() if w.keys() & {"cls_token", "embeddings.cls_token"}} or found
    meant = [p for p in whole if not STUDENT.search(p)] or list(whole)
    meant = [p for p in meant if TEACHER.search(p)] or meant
    if len(meant) > 1:
        names = " and ".join(repr(p.removesuffix(".")) if p else "no prefix" for p in meant[:3])
        raise ValueError(f"{path} holds {len(meant)} backbones, under {names}; save one of them alone")
    if not meant:
        raise ValueError(no_backbone(path, keys or ckpt))
    return Found(meant[0], whole[meant[0]], [key for key in keys if not key.startswith(meant[0])])


def no_backbone(path: str, keys, why: str = "") -> str:
    """The line for a file without a DINOv2 backbone."""
    if name := name_of_network(keys):
        return f"{path} holds {name}, not DINOv2"
    return f"{path} holds no DINOv2 backbone{why}{starts_with(keys)}"


def starts_with(keys) -> str:
    """The first keys of a file that is not what it should be, as an addition to a message."""
    return f" (it starts with: {', '.join(map(shown_key, itertools.islice(keys, 3)))})" if keys else ": it is empty"


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of the names, shapes and values of the weights, independent of the file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
