"""Loads DINOv2 models: released ones by name, and weights in any common layout from a file.

    import hub
    model = hub.load("dinov2_vits14")             # downloaded once; also vitb14, vitl14, vitg14, each also with _reg
    model = hub.load("out/ckpt.pth")              # a checkpoint of train.py (the teacher)
    model = hub.load("teacher_checkpoint.pth")    # a checkpoint of the official code; blocks may be stored in chunks
    model = hub.load("/models/dinov2-small")      # a folder of Hugging Face transformers, or the file in it
    model = hub.load("timm.safetensors")          # weights of timm's vit_*_patch14_dinov2 or vit_*_patch14_reg4_dinov2
    model = hub.load("lightning.ckpt")            # in any dicts, under any prefix; the teacher rather than the student
    cls = model(images)                           # (B, D), images (B, 3, h*14, w*14)
    path, ckpt = hub.read("out/ckpt.pth")         # the path and everything in the file; load(path, ckpt) takes both
    classifier = hub.load_classifier("dinov2_vits14", "dinov2_vits14_linear4_head.pth")
    logits = classifier(images)                   # (B, classes)
    depther, about = hub.load_dense("dinov2_vits14", "nyu_dpt")    # a released dense head, or a file of eval_dense.py
    meters = depther(images)                      # (B, 1, H, W), images (B, 3, H, W) of any size

    python hub.py info FILE                       # what a file holds; export.py converts it

From another project, without copying these files: torch.hub.load("/path/to/this/folder", "dinov2_vits14",
source="local"), likewise all other official names, see hubconf.py.

The architecture is inferred from the names and shapes of the weights, and every weight that has the prefix of the
backbone must find its place; only projection heads and classifiers are ignored. If mask_token, which only training
uses, is missing, the file is taken to be timm's, or without LayerScale DINO's of 2021, and zeros replace it. A position
table that is not square needs img_size=(height, width), or a config.json beside the file that tells it. Models come in
eval mode, in float32, on the CPU. Pickled code is refused. Released files are kept in ~/.cache/torch/hub/checkpoints
(torch.hub's folder); on a machine without network access, put them there by hand. `.safetensors` files need the package
safetensors.

At image sizes other than that of the weights (518 pixels for the released ones), the position embedding is interpolated
as in the library that the layout belongs to. With registers, the official code, transformers and timm agree. Without,
they do not, and features of the same weights differ: the official code samples at (i + 0.1) / size, the others at
i / size, timm also with antialiasing. load(file, interpolate_offset=0.1, interpolate_antialias=False) applies the
official rule to any file. Apache License 2.0.
"""
import enum
import functools
import http.client
import json
import os
import re
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import MEAN, STD
from heads import CLASSES, RANGES, RECIPES, DPTHead, Dense, LinearDepthHead, Recipe, SegmentationHead, colors
from mask2former import Mask2Former
from model import ARCHS, DinoVisionTransformer, is_weight, load_backbone, load_strictly, read_checkpoint
from support.cli import Parser, nearest, printable, run, run_subcommand
from support.files import replacing
from support.weights import (SAFETENSORS, dicts_of_tensors, find_backbone, how_to_extract, kind_of_file,
                             name_of_network, no_backbone, starts_with, weights_hash)

URL = "https://dl.fbaipublicfiles.com/dinov2"
RELEASED = tuple(f"dinov2_vit{size}14{reg}" for size in "sblg" for reg in ("", "_reg"))
MASK2FORMER = "dinov2_vitg14_m2f"  # backbone and segmentation head in one file
SIZES = dict(s="vit_small", b="vit_base", l="vit_large", g="vit_giant2")
FOLDER_FILES = ("pytorch_model.bin", "model.safetensors")  # of Hugging Face; the first needs no extra package


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def read(spec: str | Path) -> tuple[str, dict]:
    """Finds and reads weights. Returns (path of the file, its content).

    `spec` is a file, a Hugging Face folder, or the torch.hub name of a released backbone, which is downloaded if
    necessary. A file or folder of that name takes precedence. Raises ValueError, naming the cause, if nothing is found
    or it cannot be read."""
    path = Path(spec)
    if os.path.isdir(path):
        found = [path / name for name in FOLDER_FILES if (path / name).exists()]
        if not found:
            raise ValueError(f"{path} is a folder; name the checkpoint in it, such as {path / 'ckpt.pth'}, or a folder "
                             f"with {' or '.join(FOLDER_FILES)}")
        path = found[0]
    elif not os.path.exists(path):
        if str(spec) not in (*RELEASED, MASK2FORMER):
            raise ValueError(f"no such checkpoint: {spec}; give a file, a folder, or one of "
                             f"dinov2_vit{{s,b,l,g}}14[_reg]{nearest(str(spec), RELEASED)}")
        path = released_file(str(spec).removesuffix("_m2f"), "ade20k_m2f" if spec == MASK2FORMER else "pretrain")
    return str(path), read_file(str(path))


def read_file(path: str) -> dict:
    """Reads a safetensors or a PyTorch file, whatever its name ends in. The latter may also hold NumPy numbers, as
    those of the dense heads do. Nothing in it is executed. Raises ValueError, naming the cause."""
    kind, _, advice = kind_of_file(path).partition("; ")
    if kind == SAFETENSORS:
        return read_safetensors(path)
    if kind:
        what = kind if kind in ("empty", "truncated") else f"{kind}, not a weight file"
        raise ValueError(f"{path} is {what}" + f"; {advice}" * bool(advice))
    scalar = np.float64(0).__reduce__()[0]  # unpickles NumPy numbers; numpy 2 renamed its module
    allowed = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    with torch.serialization.safe_globals([*allowed, np.dtype, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}]):
        try:
            return read_checkpoint(path)
        except ValueError as error:
            advice = how_to_extract(path, str(error)) if "pickled code" in str(error) else ""
            raise ValueError(f"{error}{advice}") from None


def released_file(name: str, part: str) -> Path:
    """The path of a released backbone (part "pretrain") or of one of its heads (such as "linear4_head", ImageNet's, or
    "nyu_dpt_head") in torch.hub's folder. Downloads it, with a progress bar, if it is not there. Raises ValueError,
    which says where to put the file by hand."""
    base = name.removesuffix("_reg")
    file = f"{base}{'_reg4' if name != base else ''}_{part}.pth"
    url, path = f"{URL}/{base}/{file}", Path(torch.hub.get_dir(), "checkpoints", file)
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            torch.hub.download_url_to_file(url, str(temporary))
            read_file(str(temporary))  # an interrupted download looks like a finished one
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ValueError(f"could not download {url} ({error}); fetch it on another machine and put it at "
                         f"{path}") from None
    return path


def read_safetensors(path: str) -> dict[str, Tensor]:
    """The weights of a .safetensors file, on the CPU. Raises ValueError if it is damaged or the package is missing."""
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError(f"{path} needs the package safetensors: pip install safetensors") from None
    try:
        return load_file(path)
    except Exception as error:  # a damaged file can fail in any way
        text = f"{path} is truncated or not a safetensors file ({error}); copy or download it again"
        raise ValueError(text) from None


# ----------------------------------------------------------------------------------------------------------------------
# Layouts. Each is converted, key by key, to the official one with a flat list of blocks, which is then loaded.

RENAMES = [(re.compile(pattern), name) for pattern, name in (
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # chunks; the second number is that of the block
    (r"^reg_token$", "register_tokens"),  # timm
    (r"^masked_embed$", "mask_token"),  # iBOT
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),  # transformers, as all that follow
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.attention\.([qkv])(uery|ey|alue)\.", r".attn.\1."),  # in its files
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),  # in its models since version 5.0
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.gate_proj\.", ".mlp.w1."),
    (r"\.mlp\.up_proj\.", ".mlp.w2."),
    (r"\.mlp\.(weights_out|down_proj)\.", ".mlp.w3."),
    (r"^layernorm\.", "norm."),
)]
IGNORED = ("dino_head.", "ibot_head.", "student.", "dino_loss.", "ibot_patch_loss.",  # training
           "head.", "linear_head.", "classifier.")  # classifiers of timm, the official code, transformers
FUSED = {".attn.qkv.": (".attn.q.", ".attn.k.", ".attn.v."), ".mlp.w12.": (".mlp.w1.", ".mlp.w2.")}
REQUIRED = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, "norm.weight": 1}  # {name: dimensions}
POSITIONS = {  # how other libraries interpolate the position embedding of networks without registers, see above
    "transformers": dict(interpolate_offset=0.0, interpolate_antialias=False),
    "timm": dict(interpolate_offset=0.0, interpolate_antialias=True)}


def load(spec: str | Path, ckpt: dict | None = None, **arguments) -> DinoVisionTransformer:
    """The backbone of a file, folder or released name, see above, in eval mode.

    `ckpt` is the content of the file, if it has been read already; `arguments` override the constructor arguments
    inferred from the weights. Raises ValueError if the file cannot be read or holds no DINOv2 backbone, or if any
    weight is missing or left over.
    """
    path, ckpt = read(spec) if ckpt is None else (str(spec), ckpt)
    if is_of_train(ckpt):  # in the official layout, and with the arguments of the constructor
        check_notes(path, ckpt)
        return load_backbone(path, ckpt, arguments)
    found = find_backbone(path, ckpt)
    weights = to_official(path, found.weights)
    inferred = {} if "register_tokens" in weights else POSITIONS.get(layout_of_keys(found.weights), {})
    return load_backbone(path, weights, inferred | arguments_in_config(path, weights) | arguments)


def is_of_train(ckpt: dict) -> bool:
    """Whether train.py wrote it, even if parts are missing."""
    arguments = ckpt["model"] if isinstance(ckpt.get("model"), dict) else {}
    marks = ({"format", "teacher"}, {"format", "config"}, {"preset", "config"})  # others also have a "format"
    return any(keys <= ckpt.keys() for keys in marks) or {"embed_dim", "num_heads"} <= arguments.keys()


def check_notes(path: str, ckpt: dict) -> None:
    """Raises ValueError unless a checkpoint of train.py notes its format, step, data, and how images are prepared, as
    train.py does. (load_backbone checks the rest.)"""
    config = ckpt["config"] if isinstance(ckpt.get("config"), dict) else {}
    for key, possible in NOTES.items():
        value = (ckpt if key in ("format", "step") else config).get(key)
        if not possible(value) or key in ("mean", "std") and len(value) != config["in_chans"]:
            raise ValueError(f"{path} is damaged: its {key} is {repr(value)[:50]}")


def are_numbers(values, low: float, high: float) -> bool:
    return isinstance(values, (list, tuple)) and all(type(v) in (int, float) and low <= v <= high for v in values)


NOTES = dict(format=lambda v: type(v) is int, step=lambda v: type(v) is int and v >= 0) | dict.fromkeys(
    ("in_chans", "eval_resize", "eval_crop"), lambda v: type(v) is int and 0 < v < 10**5) | dict(
    mean=lambda v: are_numbers(v, -1e3, 1e3), std=lambda v: are_numbers(v, 1e-6, 1e3),
    flip_prob=lambda v: are_numbers([v], 0, 1)) | dict.fromkeys(
    ("data", "eval_train", "eval_val"), lambda v: isinstance(v, str))


def layout_of(ckpt: dict) -> str:
    """Whose names the weights have: "train.py", "official", "transformers", "timm" (or mask_token is missing), or
    "dino" (also without LayerScale and classifier: DINO of 2021, or the encoder of an MAE)."""
    return "train.py" if is_of_train(ckpt) else layout_of_keys(find_backbone("the file", ckpt).weights)


def layout_of_keys(keys) -> str:
    if any(key.startswith("embeddings.") for key in keys):
        return "transformers"
    if "mask_token" in keys or "masked_embed" in keys:
        return "official"
    plain = not any(key.endswith(".gamma") or key.startswith(("head.", "reg_token")) for key in keys)
    return "dino" if plain else "timm"


def to_official(path: str, source: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the backbone in float32, with the names and shapes of the released files."""
    weights = {}
    if name_of_network(source):
        raise ValueError(no_backbone(path, source))
    for key, value in source.items():
        name = official_name(key)
        if name in weights:
            raise ValueError(f"{path} holds {name} twice, the second time as {key}")
        if not name.startswith(IGNORED):
            if not is_weight(value):
                raise ValueError(f"{path} is damaged: {key} is not a tensor of floating-point weights")
            weights[name] = value.float()
    dims = REQUIRED | {"register_tokens": 3} if "register_tokens" in weights else REQUIRED
    if wrong := [k for k, n in dims.items() if k not in weights or weights[k].ndim != n]:
        raise ValueError(no_backbone(path, source, f": {', '.join(wrong)} missing or of another shape"))
    fuse(weights)
    if "reg_token" in source:  # timm has added the position of CLS to CLS itself
        weights["pos_embed"] = F.pad(weights["pos_embed"], (0, 0, 1, 0))  # (1, 1+h*w, D)
    weights.setdefault("mask_token", weights["cls_token"].new_zeros(1, weights["cls_token"].shape[-1]))
    return rename_timm_swiglu(weights)


def official_name(key: str) -> str:
    for pattern, name in RENAMES:
        key = pattern.sub(name, key)
    return key


def fuse(weights: dict[str, Tensor]) -> None:
    """Joins query, key and value, and SwiGLU's gate and value, to one matrix each, in place. Those that do not match
    stay, for load_strictly to report."""
    for whole, parts in FUSED.items():
        for key in [k for k in weights if parts[0] in k]:
            keys, fused = [key.replace(parts[0], part) for part in parts], key.replace(parts[0], whole)
            shapes = {weights[k].shape if k in weights else None for k in keys}
            if len(shapes) == 1 and fused not in weights:
                weights[fused] = torch.cat([weights.pop(k) for k in keys])  # (2 or 3 times n, D), or the bias


def rename_timm_swiglu(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm calls SwiGLU's matrices fc1 and fc2, as in an MLP; the shapes (2*hidden, D) and (D, hidden) tell."""
    fc1, fc2 = (weights.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    if fc1 is None or fc2 is None or not fc1.ndim == fc2.ndim == 2 or len(fc1) != 2 * fc2.shape[1]:
        return weights
    return {k.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3."): v for k, v in weights.items()}


def arguments_in_config(path: str, weights: dict[str, Tensor]) -> dict:
    """What the weights do not tell, from the config.json of transformers or timm next to the file: the number of
    attention heads, and the image size of a position table that is not square. Without that file, heads are assumed to
    be 64 wide, as in all released models. Raises ValueError if its number of heads is impossible."""
    try:
        with open(Path(path).with_name("config.json"), "rb") as file:
            config = json.loads(file.read(10**6))
        of_timm, found = [config.get(k) or {} for k in ("model_args", "pretrained_cfg")], {}
        sizes = [config.get("image_size"), of_timm[0].get("img_size"), (of_timm[1].get("input_size") or [])[1:]]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):  # no such file, or another program's
        return {}
    width, patch = weights["cls_token"].shape[-1], weights["patch_embed.proj.weight"].shape[-1]
    if config.get("hidden_size") == width and (heads := config.get("num_attention_heads")) is not None:
        if type(heads) is not int or heads < 1 or width % heads:
            raise ValueError(f"{Path(path).with_name('config.json')} is damaged: {repr(heads)[:20]} attention heads "
                             f"are impossible for a width of {width}")
        found["num_heads"] = heads
    for size in sizes:
        sides = [size, size] if type(size) is int else size
        if are_numbers(sides, patch, 10**6) and len(sides) == 2 and {type(v) for v in sides} == {int} and (
                (sides[0] // patch) * (sides[1] // patch) == weights["pos_embed"].shape[1] - 1):
            return found | dict(img_size=tuple(side // patch * patch for side in sides))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Linear classifiers


class LinearClassifier(nn.Module):
    """Images (B, C, h*p, w*p) -> logits (B, classes): a linear layer on the normalized CLS tokens of the last 1 or 4
    blocks, in ascending order, and the mean of the last block's patch tokens (DINOv2, section 7.1). `layers` is the
    number of blocks; a network of 2 or 3 blocks takes all of them instead of 4."""

    def __init__(self, backbone: DinoVisionTransformer, linear_head: nn.Linear, layers: int = 4):
        super().__init__()
        if layers not in (1, min(4, backbone.n_blocks)):
            raise ValueError(f"a linear classifier uses the CLS tokens of 1 or 4 layers, not {layers}")
        self.backbone, self.linear_head, self.layers = backbone, linear_head, layers

    def forward(self, x: Tensor) -> Tensor:
        outs = self.backbone.get_intermediate_layers(x, self.layers, return_class_token=True)
        patches = outs[-1][0].mean(1)  # (B, D)
        return self.linear_head(torch.cat([cls for _, cls in outs] + [patches], dim=-1))  # from (B, (1+layers)*D)


def read_head(path: str | Path, dim: int, n_blocks: int) -> tuple[Tensor, Tensor, int]:
    """Reads a linear head for a backbone of width `dim`. Returns weight (classes, (1+layers)*D) and bias (classes,),
    both float32, and the number of layers. Raises ValueError if it is not a linear head, or is for another backbone."""
    head = read_file(str(path))
    if (pair := linear_head_in(head)) is None:
        raise ValueError(f"{path} holds no linear head, which is weight (classes, features) and bias (classes,)"
                         + starts_with(head))
    weight, bias = pair
    most = min(4, n_blocks)
    layers = {2 * dim: 1, (1 + most) * dim: most}.get(weight.shape[1])
    if layers is None:
        raise ValueError(f"{path} is the head of another backbone: it takes {weight.shape[1]} features; this one, "
                         f"{dim} wide, gives {2 * dim} (1 layer) or {(1 + most) * dim} ({most} layers)")
    return weight.float(), bias.float(), layers


def linear_head_in(ckpt: dict) -> tuple[Tensor, Tensor] | None:
    """Weight (classes, features) and bias (classes,), if these are all tensors in a file; under any prefix."""
    tensors = [(key, value) for _, part in dicts_of_tensors(ckpt) for key, value in part.items()]
    pair = {key.split(".")[-1]: value for key, value in tensors}
    if len(tensors) != 2 or pair.keys() != {"weight", "bias"} or not all(map(is_weight, pair.values())):
        return None
    weight, bias = pair["weight"], pair["bias"]
    return (weight, bias) if weight.ndim == 2 and bias.shape == weight.shape[:1] and weight.numel() else None


def load_classifier(spec: str | Path, head_path: str | Path) -> LinearClassifier:
    """The backbone that load(spec) gives, with a linear head, a released one or one of eval_linear.py, in eval mode.
    The width of the head tells the number of layers. Raises ValueError if the head does not fit."""
    return attach_linear_head(load(spec), head_path)


def attach_linear_head(backbone: DinoVisionTransformer, head_path: str | Path) -> LinearClassifier:
    weight, bias, layers = read_head(head_path, backbone.embed_dim, backbone.n_blocks)
    with torch.device("meta"):
        linear_head = nn.Linear(weight.shape[1], len(weight))
    linear_head.load_state_dict(dict(weight=weight, bias=bias), assign=True)
    return LinearClassifier(backbone, linear_head, layers).eval()


# ----------------------------------------------------------------------------------------------------------------------
# Dense heads: depth and segmentation


DEPTH_HEADS, SEG_HEADS = ("linear", "linear4", "dpt"), ("linear", "ms")
DENSE_HEADS = [f"{dataset}_{kind}" for datasets, kinds in ((("nyu", "kitti"), DEPTH_HEADS), (CLASSES, SEG_HEADS))
               for dataset in datasets for kind in kinds]  # released for each backbone without registers
HEAD_KEYS = (("conv_depth.weight",), ("conv_seg.weight",), (  # weights that tell a linear depth, segmentation, DPT head
    "conv_depth.head.0.weight", "convs.0.conv.weight", "reassemble_blocks.projects.3.conv.weight"))


class About(NamedTuple):
    """What a dense network was trained for."""
    task: str  # "depth" or "seg"
    dataset: str = ""  # "nyu", "kitti", "ade20k", "voc2012", or what eval_dense.py was given
    classes: list[str] = []  # segmentation only, as the rest: names of the classes
    colors: list[tuple[int, int, int]] = []  # red, green, blue of each class
    recipe: Recipe | None = None  # how to segment photographs


def load_dense(spec: str | Path, head: str | Path | None = None, depth_range=None,
               ckpt: dict | None = None) -> tuple[Dense | Mask2Former, About]:
    """A backbone with a dense head, in eval mode, and what it was trained for.

    spec: whatever load() takes, or "dinov2_vitg14_m2f" or its file, which hold both; then `head` is None.
    head: a file, released or of eval_dense.py, or one of DENSE_HEADS, such as "nyu_dpt", which is downloaded for a
        released backbone.
    depth_range: nearest and farthest depth in meters; overrides that of the head.
    ckpt: the content of `spec`, if it has been read already.

    Raises ValueError if the file holds no dense head, the head is for another backbone, or its depth range is unknown.
    """
    if head is None:
        path, ckpt = read(spec) if ckpt is None else (str(spec), ckpt)
        return load_mask2former(path, ckpt)
    if not os.path.exists(head):
        if head in DENSE_HEADS and (spec not in RELEASED or str(spec).endswith("_reg")):
            raise ValueError(f"{head} is a head of the released dinov2_vit{{s,b,l,g}}14, {spec} is none of them; give "
                             "the file of a head trained for it")
        if head not in DENSE_HEADS:
            raise ValueError(f"no such dense head: {head}{nearest(str(head), DENSE_HEADS)}; give a file, or with "
                             f"dinov2_vit{{s,b,l,g}}14 one of {', '.join(DENSE_HEADS)}")
        head = released_file(str(spec), f"{head}_head")
    return attach_dense_head(load(spec, ckpt), head, depth_range)


def is_mask2former(ckpt: dict) -> bool:
    return "decode_head.query_feat.weight" in unwrap(ckpt)


def unwrap(ckpt: dict) -> dict:
    """The weights of a dense head or Mask2Former in a file; those released have them under "state_dict"."""
    marks = ("query_feat.weight", *(names[0] for names in HEAD_KEYS))
    return next((part for _, part in dicts_of_tensors(ckpt) if any(key.endswith(marks) for key in part)), {})


def load_mask2former(path: str, ckpt: dict) -> tuple[Mask2Former, About]:
    if not is_mask2former(ckpt):
        raise ValueError(f"{path} holds no dense head; name one too: a file, or with dinov2_vit{{s,b,l,g}}14 one of "
                         f"{', '.join(DENSE_HEADS)}")
    with torch.device("meta"):
        network = Mask2Former()
    weights = {k: v.float() if is_weight(v) else v for k, v in unwrap(ckpt).items()}
    load_strictly(network, weights, path)
    names = CLASSES["ade20k"]
    return network.eval(), About("seg", "ade20k", names, colors(len(names), "ade20k"), RECIPES["ade20k", "m2f"])


def attach_dense_head(backbone: DinoVisionTransformer, path: str | Path, depth_range=None) -> tuple[Dense, About]:
    head, about = read_dense_head(path, backbone, depth_range)
    return Dense(backbone, head).eval(), about


def read_dense_head(path: str | Path, backbone: DinoVisionTransformer, depth_range=None) -> tuple[nn.Module, About]:
    """The head in a file, and what it was trained for: as eval_dense.py noted in the file, or as the file names of the
    release tell. Raises ValueError as load_dense() does."""
    ckpt, dim = read_file(str(path)), backbone.embed_dim
    weights, notes = head_weights(path, ckpt), notes_of(path, ckpt)
    named = re.search(rf"({'|'.join((*RANGES, *CLASSES))})_(linear4?|dpt|ms)_head", Path(path).name)
    dataset, width = notes.get("dataset", named[1] if named else ""), input_width(weights)
    segments, dpt = "conv_seg.weight" in weights, "convs.0.conv.weight" in weights
    unit = dim if segments or dpt else 2 * dim  # channels per block
    layers = {"linear": 1, "linear4": 4, "ms": 4}.get(named[2]) if named and not notes else None
    if width not in ((unit,) if dpt else (unit, 4 * unit)) or notes.get("dim", dim) != dim or (
            layers and width != layers * unit):  # 4 blocks of ViT-S are as wide as one of ViT-g
        raise ValueError(f"{path} is the head of another backbone: it takes {width} channels; this one, {dim} wide, "
                         f"gives {unit}" + f" or {4 * unit}" * (not dpt))
    if notes.get("backbone") and notes["backbone"] != weights_hash(backbone):
        raise ValueError(f"{path} was trained on the features of another backbone, of the same width")
    if segments:
        about = about_segmentation(dataset, "linear" if width == unit else "ms", len(weights["conv_seg.bias"]), notes)
        make, arguments = SegmentationHead, dict(n_classes=len(about.classes), layers=width // unit)
    else:
        limits = depth_range or notes.get("depth_range") or RANGES.get(dataset)
        if limits is None:
            raise ValueError(f"{path} does not say which depths it was trained for; give their range in meters, "
                             "such as 0.001 10, which heads for NYU have (0.001 80: KITTI)")
        about, arguments = About("depth", dataset), dict(min_depth=limits[0], max_depth=limits[1])
        if dpt:
            make, arguments["channels"] = DPTHead, len(weights["convs.0.conv.weight"])
        else:
            make, n_bins = LinearDepthHead, len(weights["conv_depth.bias"])
            arguments |= dict(layers=width // unit, n_bins=n_bins)
    try:
        with torch.device("meta"):
            head = make(dim, **arguments)
    except (RuntimeError, ZeroDivisionError) as error:  # of sizes that are zero
        raise ValueError(f"{path} describes an impossible head: {error}") from None
    load_strictly(head, weights, str(path))
    return head, about


def about_segmentation(dataset: str, kind: str, n: int, notes: dict) -> About:
    """About a segmentation head of n classes. If neither notes nor the file name tell the data set, n does."""
    if not notes and len(CLASSES.get(dataset, ())) != n:
        dataset = next((name for name in CLASSES if len(CLASSES[name]) == n), "")
    names = notes.get("classes") or CLASSES.get(dataset) or [f"class {k}" for k in range(n)]
    recipe = Recipe(*notes["recipe"]) if "recipe" in notes else RECIPES.get((dataset, kind), Recipe())
    return About("seg", dataset, names, colors(n, dataset), recipe)


def notes_of(path: str | Path, ckpt: dict) -> dict:
    """What eval_dense.py noted about a head; empty for other files. Raises ValueError if it cannot be that."""
    notes = ckpt["about"] if isinstance(ckpt.get("about"), dict) else {}
    possible = dict(
        dim=lambda v: type(v) is int and v > 0, dataset=lambda v: isinstance(v, str),
        backbone=lambda v: isinstance(v, str), recipe=is_recipe,
        classes=lambda v: isinstance(v, list) and all(isinstance(name, str) for name in v),
        depth_range=lambda v: are_numbers(v, 0, 1e6) and len(v) == 2 and v[0] < v[1])
    for key, test in possible.items():
        if notes.get(key) is not None and not test(notes[key]):
            raise ValueError(f"{path} is damaged: its {key} is {repr(notes[key])[:50]}")
    return {key: value for key, value in notes.items() if value is not None}


def is_recipe(values) -> bool:
    if not isinstance(values, (list, tuple)) or len(values) != len(Recipe._fields):
        return False
    recipe = Recipe(*values)
    sizes = (recipe.short, recipe.long, recipe.crop, recipe.stride, recipe.multiple, recipe.at_once)
    return {type(v) for v in sizes} == {int} and min(sizes) > 0 and type(recipe.flip) is bool and (
        are_numbers(recipe.ratios, 0.01, 100) and len(recipe.ratios) > 0)


def head_weights(path: str | Path, ckpt: dict) -> dict[str, Tensor]:
    """The weights of a depth or segmentation head in float32, without the prefix that they have in released files.
    Raises ValueError if the file holds none."""
    weights = unwrap(ckpt)
    if named := [key for key in weights if "decode_head." in key]:  # under any prefix, and beside other parts
        weights = {key.partition("decode_head.")[2]: weights[key] for key in named}
    weights = {k: v.float() if is_weight(v) else v for k, v in weights.items()}
    dims = {k: v.ndim for k, v in weights.items()}
    heads = (dict.fromkeys(names, 4) | {names[0].replace("weight", "bias"): 1} for names in HEAD_KEYS)
    if not any(keys.items() <= dims.items() for keys in heads):
        raise ValueError(f"{path} holds no depth or segmentation head{starts_with(ckpt)}")
    return weights


def input_width(weights: dict[str, Tensor]) -> int:
    """How many channels a head takes; a DPT head, per block."""
    return next(weights[names[-1]].shape[1] for names in HEAD_KEYS if names[0] in weights)


# ----------------------------------------------------------------------------------------------------------------------
# The official entry points, for hubconf.py


def backbone(name: str, *, pretrained: bool = True, weights: str = "LVD142M", **kwargs) -> DinoVisionTransformer:
    """A DINOv2 backbone: images (B, 3, h*14, w*14), normalized with ImageNet's mean and std -> CLS (B, D).

    pretrained: False for random weights. weights: "LVD142M" (the released ones, downloaded once) or a file.
    kwargs: for the constructor, such as drop_path_rate=0.1. Comes in train mode, as in the official code;
    call .eval() for features.
    """
    if name not in RELEASED:
        raise ValueError(f"no released backbone is called {name!r}{nearest(str(name), RELEASED)}; there are "
                         f"dinov2_vit{{s,b,l,g}}14[_reg]")
    size, registers = name.removeprefix("dinov2_vit")[0], 4 * name.endswith("_reg")
    rule = dict(interpolate_antialias=True, interpolate_offset=0.0) if registers else {}
    arguments = ARCHS[SIZES[size]] | rule | dict(
        img_size=518, patch_size=14, init_values=1.0, block_chunks=0, num_register_tokens=registers,
        ffn_layer="swiglufused" if size == "g" else "mlp") | kwargs
    if not pretrained:
        return DinoVisionTransformer(**arguments)
    return load(weights_file(weights, name, {"LVD142M": "pretrain"}), **arguments).train()


def classifier(name: str, *, layers: int = 4, pretrained: bool = True, weights: str = "IMAGENET1K",
               **kwargs) -> LinearClassifier:
    """A DINOv2 backbone with a linear classifier: normalized images (B, 3, h*14, w*14) -> logits (B, 1000).

    layers: CLS tokens of the last 4 blocks, or of the last 1. pretrained: False for random weights in both.
    weights: "IMAGENET1K" (the released head, downloaded once) or a file. kwargs: for the backbone. Comes in train mode,
    as in the official code.
    """
    if layers not in (1, 4):
        raise ValueError(f"a linear classifier uses the CLS tokens of 1 or 4 layers, not {layers}")
    vit = backbone(name, pretrained=pretrained, **kwargs)
    if not pretrained:
        return LinearClassifier(vit, nn.Linear((1 + layers) * vit.embed_dim, 1000), layers)
    path = weights_file(weights, name, {"IMAGENET1K": f"linear{'4' * (layers == 4)}_head"})
    model = attach_linear_head(vit, path)
    if model.layers != layers:
        raise ValueError(f"{path} is a head for {model.layers} layers; call this with layers={model.layers}")
    return model.train()


def linear_depther(name: str, *, layers: int = 4, pretrained: bool = True, weights: str = "NYU", depth_range=None,
                   **kwargs) -> Dense:
    """A DINOv2 backbone with a linear depth head: normalized images (B, 3, H, W) -> depth (B, 1, H, W) in meters.

    layers: features of the last 4 blocks, or of the last 1. pretrained: False for random weights in both.
    weights: "NYU" or "KITTI" (the released heads, downloaded once) or a file. depth_range: nearest and farthest depth
    in meters; by default those that the heads were trained for, (0.001, 10) for NYU and (0.001, 80) for KITTI. (The
    official entry point uses the latter for both, so its NYU depths are eight times too large; depth_range=(0.001, 80)
    reproduces that.) kwargs: for the backbone. Comes in eval mode.
    """
    if layers not in (1, 4):
        raise ValueError(f"a linear depth head uses the features of 1 or 4 layers, not {layers}")
    model = depther(name, f"linear{'4' * (layers == 4)}", pretrained, weights, depth_range, kwargs)
    if (found := getattr(model.decode_head, "layers", "dpt")) != layers:
        raise ValueError(f"{weights} is a head for " + ("dinov2_*_dd" if found == "dpt" else f"layers={found}"))
    return model


def dpt_depther(name: str, *, pretrained: bool = True, weights: str = "NYU", depth_range=None, **kwargs) -> Dense:
    """A DINOv2 backbone with a DPT depth head: normalized images (B, 3, H, W) -> depth (B, 1, H, W) in meters.

    pretrained: False for random weights in both. weights: "NYU" or "KITTI" (the released heads, downloaded once) or a
    file. depth_range: nearest and farthest depth in meters; by default (0.001, 10) for NYU and (0.001, 80) for KITTI.
    kwargs: for the backbone. Comes in eval mode.
    """
    model = depther(name, "dpt", pretrained, weights, depth_range, kwargs)
    if not isinstance(model.decode_head, DPTHead):
        raise ValueError(f"{weights} is a linear head; call dinov2_*_ld for it")
    return model


def depther(name: str, kind: str, pretrained: bool, weights: str, depth_range, kwargs: dict) -> Dense:
    vit = backbone(name, pretrained=pretrained, **kwargs)
    if pretrained:
        path = weights_file(weights, name, {dataset.upper(): f"{dataset}_{kind}_head" for dataset in RANGES})
        return require_task("depth", path, *attach_dense_head(vit, path, depth_range))
    if member_name(weights).lower() not in RANGES:
        raise ValueError(f"weights={weights!r}: with pretrained=False this sets the depth range, 'NYU' or 'KITTI'")
    limits = depth_range or RANGES[member_name(weights).lower()]
    head = DPTHead(vit.embed_dim, *limits) if kind == "dpt" else LinearDepthHead(
        vit.embed_dim, 4 if kind == "linear4" else 1, *limits)
    return Dense(vit, head).eval()


def segmenter(name: str, kind: str, *, pretrained: bool = True, weights: str = "ADE20K", **kwargs) -> Dense:
    """A DINOv2 backbone with a segmentation head: normalized images (B, 3, H, W) -> logits (B, classes, H, W). Names
    that end in _ls have a linear head; in _ms, a head on the features of 4 blocks that is meant for images at several
    scales, which heads.segment does. Not among the official entry points.

    pretrained: False for random weights in both. weights: "ADE20K" (150 classes) or "VOC2012" (21) for the released
    heads, downloaded once, or a file. kwargs: for the backbone. Comes in eval mode.
    """
    vit = backbone(name, pretrained=pretrained, **kwargs)
    if pretrained:
        path = weights_file(weights, name, {dataset.upper(): f"{dataset}_{kind}_head" for dataset in CLASSES})
        model = require_task("seg", path, *attach_dense_head(vit, path))
        if model.decode_head.layers != (4 if kind == "ms" else 1):
            raise ValueError(f"{weights} is a head for dinov2_*_{'ls' if kind == 'ms' else 'ms'}")
        return model
    if member_name(weights).lower() not in CLASSES:
        raise ValueError(f"weights={weights!r}: with pretrained=False this sets the classes, 'ADE20K' or 'VOC2012'")
    classes = CLASSES[member_name(weights).lower()]
    return Dense(vit, SegmentationHead(vit.embed_dim, len(classes), 4 if kind == "ms" else 1)).eval()


def mask2former(name: str, *, pretrained: bool = True, weights: str = "ADE20K") -> Mask2Former:
    """Mask2Former on ViT-g: normalized images (B, 3, h*32, w*32) -> scores (B, 150, H, W) of the classes of ADE20K. For
    photographs call heads.segment with heads.RECIPES["ade20k", "m2f"]. Not among the official entry points.

    pretrained: False for random weights. weights: "ADE20K" (the released ones, downloaded once) or a file. Comes in
    eval mode.
    """
    if not pretrained:
        return Mask2Former().eval()
    path = weights_file(weights, name.removesuffix("_m2f"), {"ADE20K": "ade20k_m2f"})
    return load_mask2former(path, read_file(path))[0]


def require_task(task: str, path: str, network: Dense, about: About) -> Dense:
    if about.task != task:
        raise ValueError(f"{path} is a head for {'segmentation' if task == 'depth' else 'depth'}")
    return network


def member_name(weights: str | enum.Enum) -> str:
    return weights.name if isinstance(weights, enum.Enum) else weights  # the official code takes an enum or its name


def weights_file(weights: str | enum.Enum, name: str, released: dict[str, str]) -> str:
    """The path of what the argument `weights` asks for: a released file, by its key in `released`, {key: part of the
    file name}, or any file. Raises ValueError if it is neither."""
    weights = member_name(weights)
    if weights in released:
        return str(released_file(name, released[weights]))
    if not os.path.exists(weights):
        raise ValueError(f"weights={weights!r} is neither {' nor '.join(map(repr, released))} (released) nor an "
                         "existing file")
    return weights


def not_available(name: str, *args, **kwargs):
    """Not available here."""
    raise NotImplementedError(f"{name} is not available here: it needs a text encoder")


def entry_points() -> dict[str, Callable]:
    """{name: function} for the 25 official names (backbones, classifiers, depth estimators; dino.txt only raises) and
    our own for segmentation."""
    chosen = {name: (backbone, name) for name in RELEASED} | {f"{name}_lc": (classifier, name) for name in RELEASED}
    for name in RELEASED:
        if not name.endswith("_reg"):
            chosen |= {f"{name}_ld": (linear_depther, name), f"{name}_dd": (dpt_depther, name),
                       f"{name}_ls": (segmenter, name, "linear"), f"{name}_ms": (segmenter, name, "ms")}
    for name, function in ((MASK2FORMER, mask2former), ("dinov2_vitl14_reg4_dinotxt_tet1280d20h24l", not_available)):
        chosen[name] = (function, name)
    points = {}
    for name, (make, *arguments) in chosen.items():
        points[name] = functools.partial(make, *arguments)
        points[name].__doc__, points[name].__name__ = make.__doc__, name  # for torch.hub.help and torch.hub.list
    return points


def image_rules(model: DinoVisionTransformer | Mask2Former, ckpt: dict) -> dict:
    """How images are prepared for a network: in_chans, mean and std, eval_resize and eval_crop in pixels, flip_prob;
    from a checkpoint of train.py, or else as for the released models."""
    channels = 3 if isinstance(model, Mask2Former) else model.patch_embed.in_chans
    mean, std = (v if channels == 3 else (sum(v) / 3,) * channels for v in (MEAN, STD))  # ImageNet's, averaged to gray
    rules = dict(in_chans=channels, mean=mean, std=std, eval_resize=256, eval_crop=224, flip_prob=0.5)
    return rules | {k: v for k, v in ckpt["config"].items() if k in rules} if is_of_train(ckpt) else rules


# ----------------------------------------------------------------------------------------------------------------------
# The command `info`


def info(argv: list[str]) -> None:
    """Prints what a file holds: layout, network, image size, number of weights; for a head, what backbone it fits."""
    parser = Parser(info.__doc__, usage="python hub.py info FILE")
    parser.add_argument("file", help="whatever hub.load takes, or a head")
    args = parser.parse_args(argv)
    path, ckpt = read(args.file)
    lines = {"file": f"{path}, {os.path.getsize(path) / 1e6:,.1f} MB"}
    if is_mask2former(ckpt):
        network, about = load_mask2former(path, ckpt)
        lines["Mask2Former"] = f"on ViT-g/14, {len(about.classes)} classes of ADE20K"
        lines["weights"] = f"{sum(v.numel() for v in network.state_dict().values()):,}"
    elif unwrap(ckpt):
        lines |= describe_dense_head(path, ckpt)
    elif pair := linear_head_in(ckpt):
        classes, width = pair[0].shape
        fits = [f"{n} CLS of a backbone {width // (n + 1)} wide" for n in (4, 3, 2, 1) if width % (8 * (n + 1)) == 0]
        lines["linear head"] = f"{classes} classes, {width:,} features: {' or '.join(fits)}, and the mean patch"
    else:
        lines |= describe_backbone(path, ckpt)
    print(*(f"{name:<12} {printable(str(value))}" for name, value in lines.items()), sep="\n")


def describe_dense_head(path: str, ckpt: dict) -> dict[str, str]:
    """{label: value} of a depth or segmentation head."""
    weights, notes = head_weights(path, ckpt), notes_of(path, ckpt)
    width, n = input_width(weights), f"{sum(v.numel() for v in weights.values()):,}"
    if "convs.0.conv.weight" in weights:
        lines = {"depth head": "DPT", "takes": f"4 blocks of a backbone {width} wide"}
    else:
        depth = "conv_depth.weight" in weights
        what = {"depth head": "linear"} if depth else {"segmentation": f"{len(weights['conv_seg.bias'])} classes"}
        unit, dim = width // (1 + depth), notes.get("dim")
        lines = what | {"takes": f"{unit // dim} block(s) of a backbone {dim} wide" if dim else
                        f"the last block of a backbone {unit} wide, or 4 blocks of one {unit // 4} wide"}
    notes = {k: v for k, v in notes.items() if v and k != "dim"}
    notes |= dict(recipe=Recipe(*notes["recipe"])) if "recipe" in notes else {}
    notes |= dict(classes=", ".join(notes["classes"])) if "classes" in notes else {}
    return lines | {"weights": n} | {k.replace("_", " "): str(v) for k, v in notes.items()}


def describe_backbone(path: str, ckpt: dict) -> dict[str, str]:
    """{label: value} of a backbone."""
    model, (prefix, source, others) = load(path, ckpt), find_backbone(path, ckpt)
    weights, (height, width) = model.state_dict(), model.patch_embed.img_size
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in source.values()})
    ignored = [key for key in source if official_name(key).startswith(IGNORED)] + others
    chunks = any(re.match(r"blocks\.\d+\.\d+\.", key) for key in source)
    gated = "blocks.0.mlp.w3.weight" in weights
    lines = {"layout": layout_of(ckpt) + ", blocks in chunks" * chunks}
    lines |= {"prefix": prefix} if prefix else {}
    if is_of_train(ckpt):
        lines["trained on"] = f"{ckpt['config']['data']}, {ckpt['step']:,} steps"
    lines |= {
        "network": f"{model.embed_dim} wide, {model.n_blocks} blocks, {model.num_heads} heads, "
                   f"{'SwiGLU' if gated else 'MLP'}, {model.num_register_tokens} registers",
        "images": f"{model.patch_embed.in_chans} channels, patches of {model.patch_size}x{model.patch_size} pixels, "
                  f"positions for {height}x{width}, interpolated for other sizes with offset "
                  f"{model.interpolate_offset:g}, {'with' if model.interpolate_antialias else 'without'} antialiasing",
        "weights": f"{sum(value.numel() for value in weights.values()):,} in {', '.join(dtypes)}",
        "SHA-256": weights_hash(model)}
    if alike := [name for name in RELEASED if same_network(name, weights)]:
        lines["shapes of"] = alike[0]
    if ignored:
        lines["ignored"] = f"{len(ignored)} tensors, such as {ignored[0]}"
    return lines


def same_network(name: str, weights: dict[str, Tensor]) -> bool:
    """Whether the weights have the names and shapes of a released backbone."""
    if ARCHS[SIZES[name.removeprefix("dinov2_vit")[0]]]["embed_dim"] != weights["cls_token"].shape[-1]:
        return False
    with torch.device("meta"):
        released = backbone(name, pretrained=False).state_dict()
    return {k: v.shape for k, v in released.items()} == {k: v.shape for k, v in weights.items()}


COMMANDS = dict(info=info)


def main(argv: list[str] | None = None) -> None:
    run_subcommand(COMMANDS, __doc__, argv)


if __name__ == "__main__":
    run(main)
