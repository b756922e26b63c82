"""Released DINOv2 models by name, and weights from a file, whoever wrote it.

    import hub
    model = hub.load("dinov2_vits14")             # downloaded once; also b, l, g for s, and dinov2_vits14_reg
    model = hub.load("out/ckpt.pth")              # a checkpoint of train.py (its teacher)
    model = hub.load("teacher_checkpoint.pth")    # of the official training; its blocks may be stored in chunks
    model = hub.load("/models/dinov2-small")      # a folder of Hugging Face transformers, or the file in it
    model = hub.load("timm.safetensors")          # of timm's vit_*_patch14_dinov2 and vit_*_patch14_reg4_dinov2
    cls = model(images)                           # (B, D), images (B, 3, h*14, w*14)
    path, ckpt = hub.read("out/ckpt.pth")         # the file and its whole content, which load(path, ckpt) takes too
    classifier = hub.load_classifier("dinov2_vits14", "dinov2_vits14_linear4_head.pth")
    logits = classifier(images)                   # (B, classes)
    depther, about = hub.load_dense("dinov2_vits14", "nyu_dpt")    # a released dense head, or a file of eval_dense.py
    meters = depther(images)                      # (B, 1, H, W), images (B, 3, H, W) of any size

    python hub.py info FILE                                             # what a file holds
    python hub.py convert IN OUT --to official|hf|timm|safetensors      # hf: OUT becomes a folder
    python hub.py features IMG... --model dinov2_vits14 --out feats.npz # images and folders of them; a file or a folder
    python hub.py export --model dinov2_vits14 --size 518 OUT.onnx      # or OUT.pt2, which torch.export.load reads

From elsewhere, without a copy of these files: torch.hub.load("/path/to/here", "dinov2_vits14", source="local"), and all
other official names, see hubconf.py.

The architecture is read off the names and shapes of the weights, and each of them must find its place: nothing is
left out but projection heads, classifiers and the student. A missing mask_token, which only training uses, becomes
zeros, and the file is taken for one of timm, which drops it. What is loaded is in eval mode, in float32, on the CPU.
Pickled code is refused. Released files are kept in torch.hub's folder, ~/.cache/torch/hub/checkpoints; without a
network put them there by hand. `.safetensors` needs the package safetensors.

At another image size than that of the weights (518 pixels for released ones) the position table is interpolated as by
the library that the layout is of. With registers, official code, transformers and timm do the same. Without, the
official code samples at (i + 0.1) / size, the others at i / size, timm with antialiasing besides: features of the same
weights differ. load(file, interpolate_offset=0.1, interpolate_antialias=False) has the official rule for any file.
Apache License 2.0.
"""
import enum
import functools
import hashlib
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

from heads import CLASSES, RANGES, RECIPES, DPTHead, Dense, LinearDepthHead, Recipe, SegmentationHead, colors
from mask2former import Mask2Former
from model import ARCHS, FORMAT, DinoVisionTransformer, load_backbone, load_strictly, read_checkpoint
from support.cli import Parser, nearest, run, run_subcommand
from support.run import replacing

# data.py, which reads images, brings torchvision along, and that takes a second. So only the commands below import it,
# and when they run; what torch.hub calls does without.

URL = "https://dl.fbaipublicfiles.com/dinov2"
RELEASED = tuple(f"dinov2_vit{size}14{reg}" for size in "sblg" for reg in ("", "_reg"))
MASK2FORMER = "dinov2_vitg14_m2f"  # the one that is backbone and head in one
SIZES = dict(s="vit_small", b="vit_base", l="vit_large", g="vit_giant2")
FOLDER_FILES = ("pytorch_model.bin", "model.safetensors")  # of Hugging Face; the first needs no further package


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def read(spec: str | Path) -> tuple[str, dict]:
    """(path of the file, its content) of a file, a Hugging Face folder or a released backbone, by the name that
    torch.hub knows it by, which is downloaded first if need be. A file or folder of that name comes first.

    Raises ValueError, naming the cause, if there is no such thing or it cannot be read."""
    path = Path(spec)
    if os.path.isdir(path):
        found = [path / name for name in FOLDER_FILES if (path / name).exists()]
        if not found:
            raise ValueError(f"{path} is a folder; name the checkpoint in it, as {path / 'ckpt.pth'}, or a folder with "
                             f"{' or '.join(FOLDER_FILES)}")
        path = found[0]
    elif not os.path.exists(path):
        if str(spec) not in (*RELEASED, MASK2FORMER):
            raise ValueError(f"no such checkpoint: {spec}; give a file, a folder, or one of "
                             f"dinov2_vit{{s,b,l,g}}14[_reg]{nearest(str(spec), RELEASED)}")
        whole = spec == MASK2FORMER
        path = released_file(str(spec).removesuffix("_m2f"), "ade20k_m2f" if whole else "pretrain")
    return str(path), (read_safetensors if path.suffix == ".safetensors" else read_pth)(str(path))


def read_pth(path: str) -> dict:
    """A file of PyTorch, also with numbers of numpy in it, which the tools that trained the dense heads leave there.
    Raises ValueError, naming the cause; nothing in it is executed."""
    scalar = np.float64(0).__reduce__()[0]  # what rebuilds one; its module's name has changed with numpy 2
    allowed = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    with torch.serialization.safe_globals([*allowed, np.dtype, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}]):
        return read_checkpoint(path)


def released_file(name: str, part: str) -> Path:
    """The file of a released backbone, part "pretrain", or of one of its heads, such as "linear4_head" (of ImageNet) or
    "nyu_dpt_head", in torch.hub's folder; downloaded, with a progress bar, unless it is there. Raises ValueError,
    saying where to put it by hand."""
    base = name.removesuffix("_reg")
    file = f"{base}{'_reg4' if name != base else ''}_{part}.pth"
    url, path = f"{URL}/{base}/{file}", Path(torch.hub.get_dir(), "checkpoints", file)
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            torch.hub.download_url_to_file(url, str(partial))
            read_pth(str(partial))  # a transfer that broke off looks like one that ended
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ValueError(f"{url} could not be downloaded ({error}); fetch it on another machine and put it at "
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
        text = f"{path} is truncated or is no safetensors file ({error}); copy or download it again"
        raise ValueError(text) from None


# ----------------------------------------------------------------------------------------------------------------------
# Layouts. Each is turned into the official one, with a flat list of blocks, key by key; then all are loaded alike.

RENAMES = [(re.compile(pattern), name) for pattern, name in (
    (r"(?<![^.])(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|module)\.", ""),  # of FSDP, compile, DDP
    (r"^teacher\.", ""),
    (r"^(backbone|dinov2|dinov2_with_registers)\.", ""),
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # chunks; the second number counts through all of them
    (r"^reg_token$", "register_tokens"),  # timm
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),  # this and the rest: transformers
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.attention\.([qkv])(uery|ey|alue)\.", r".attn.\1."),  # its files; the next: its models since 5.0
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.gate_proj\.", ".mlp.w1."),
    (r"\.mlp\.up_proj\.", ".mlp.w2."),
    (r"\.mlp\.(weights_out|down_proj)\.", ".mlp.w3."),
    (r"^layernorm\.", "norm."),
)]
DROPPED = ("dino_head.", "ibot_head.", "student.", "dino_loss.", "ibot_patch_loss.",  # the rest of a training
           "head.", "linear_head.", "classifier.")  # of timm, of the official classifiers, of transformers
FUSED = {".attn.qkv.": (".attn.q.", ".attn.k.", ".attn.v."), ".mlp.w12.": (".mlp.w1.", ".mlp.w2.")}
NEEDED = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, "norm.weight": 1}  # and their dimensions
POSITIONS = {  # how these interpolate the position table of networks without registers, see above
    "transformers": dict(interpolate_offset=0.0, interpolate_antialias=False),
    "timm": dict(interpolate_offset=0.0, interpolate_antialias=True)}


def load(spec: str | Path, ckpt: dict | None = None, **arguments) -> DinoVisionTransformer:
    """The backbone of a file, folder or released name, see above, in eval mode. `ckpt` saves reading it again;
    `arguments` of the constructor go before those that the weights tell.

    Raises ValueError if it cannot be read, holds no DINOv2 backbone, or anything in it is missing or too much.
    """
    path, ckpt = read(spec) if ckpt is None else (str(spec), ckpt)
    if "format" in ckpt:  # train.py wrote it, in the official layout and with the arguments of the constructor
        return load_backbone(path, ckpt, arguments)
    weights, layout = to_official(path, ckpt), layout_of(ckpt)
    known = {} if "register_tokens" in weights else POSITIONS.get(layout, {})
    if layout == "transformers":
        known = known | heads_beside(path, weights)
    return load_backbone(path, weights, known | arguments)


def layout_of(ckpt: dict) -> str:
    """Who has written such names: "train.py", "official", "transformers" or "timm", which drops the mask_token."""
    if "format" in ckpt:
        return "train.py"
    keys = ckpt.get("teacher", ckpt).keys()
    if any("embeddings." in key for key in keys):
        return "transformers"
    timm = any(key.endswith("reg_token") for key in keys) or not any(key.endswith("mask_token") for key in keys)
    return "timm" if timm else "official"


def to_official(path: str, ckpt: dict) -> dict[str, Tensor]:
    """The backbone's weights in float32, under the names and in the shapes of the released files."""
    source, weights = ckpt.get("teacher", ckpt), {}
    if not isinstance(source, dict) or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in source.items()):
        raise ValueError(f"{path} holds no DINOv2 backbone (its entries: {', '.join(map(str, list(ckpt)[:3]))})")
    for key, value in source.items():
        name = official_name(key)
        if name in weights:
            raise ValueError(f"{path} holds {name} twice, the second time as {key}")
        if not name.startswith(DROPPED):
            weights[name] = value.float()
    dims = NEEDED | {"register_tokens": 3} if "register_tokens" in weights else NEEDED
    if wrong := [k for k, n in dims.items() if k not in weights or weights[k].ndim != n]:
        raise ValueError(f"{path} holds no DINOv2 backbone: {', '.join(wrong)} missing or of another shape (its "
                         f"entries: {', '.join(list(source)[:3])})")
    fuse(weights)
    if any(key.endswith("reg_token") for key in source):  # timm has added the position of CLS to CLS itself
        weights["pos_embed"] = F.pad(weights["pos_embed"], (0, 0, 1, 0))  # (1, 1+h*w, D)
    weights.setdefault("mask_token", weights["cls_token"].new_zeros(1, weights["cls_token"].shape[-1]))
    return name_gate(weights)


def official_name(key: str) -> str:
    for pattern, name in RENAMES:
        key = pattern.sub(name, key)
    return key


def fuse(weights: dict[str, Tensor]) -> None:
    """Query, key and value become one matrix, gate and value of SwiGLU too, in place. What has no counterpart of the
    same shape stays, for load_strictly to name."""
    for whole, parts in FUSED.items():
        for key in [k for k in weights if parts[0] in k]:
            keys, fused = [key.replace(parts[0], part) for part in parts], key.replace(parts[0], whole)
            shapes = {weights[k].shape if k in weights else None for k in keys}
            if len(shapes) == 1 and fused not in weights:
                weights[fused] = torch.cat([weights.pop(k) for k in keys])  # ([2 or 3] * n, D), or the bias


def name_gate(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names for SwiGLU are those of an MLP, fc1 (2*hidden, D) and fc2 (D, hidden), but not its shapes."""
    fc1, fc2 = (weights.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    if fc1 is None or fc2 is None or not fc1.ndim == fc2.ndim == 2 or len(fc1) != 2 * fc2.shape[1]:
        return weights
    return {k.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3."): v for k, v in weights.items()}


def heads_beside(path: str, weights: dict[str, Tensor]) -> dict[str, int]:
    """The number of heads as config.json beside the file tells it, where transformers left one. The weights do not;
    without it they are taken to be 64 wide, as in all released models."""
    try:
        config = json.loads(Path(path).with_name("config.json").read_text())
        heads, width = config["num_attention_heads"], config["hidden_size"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or somebody else's
        return {}
    return dict(num_heads=heads) if width == weights["cls_token"].shape[-1] else {}


# ----------------------------------------------------------------------------------------------------------------------
# Linear classifiers


class LinearClassifier(nn.Module):
    """Images (B, C, h*p, w*p) -> logits (B, classes), by a linear layer on the normalized CLS tokens of the last
    `layers` blocks, 1 or 4, in ascending order, and the mean of the last one's patch tokens (DINOv2, section 7.1). Of a
    network of 2 or 3 blocks, 1 or all."""

    def __init__(self, backbone: DinoVisionTransformer, linear_head: nn.Linear, layers: int = 4):
        super().__init__()
        if layers not in (1, min(4, backbone.n_blocks)):
            raise ValueError(f"the classifiers take CLS tokens of 1 or 4 layers, not {layers}")
        self.backbone, self.linear_head, self.layers = backbone, linear_head, layers

    def forward(self, x: Tensor) -> Tensor:
        outs = self.backbone.get_intermediate_layers(x, self.layers, return_class_token=True)
        patches = outs[-1][0].mean(1)  # (B, D)
        return self.linear_head(torch.cat([cls for _, cls in outs] + [patches], dim=-1))  # of (B, (1+layers)*D)


def read_head(path: str | Path, dim: int, n_blocks: int) -> tuple[Tensor, Tensor, int]:
    """weight (classes, (1+layers)*D), bias (classes,), both float32, and the number of layers of a linear head's file,
    for a backbone `dim` wide. Raises ValueError if it is no head, or another backbone's."""
    head = read_checkpoint(str(path))
    weight, bias = head.get("weight"), head.get("bias")
    if head.keys() != {"weight", "bias"} or not torch.is_tensor(weight) or not torch.is_tensor(bias) or (
            weight.ndim != 2 or bias.shape != weight.shape[:1]):
        raise ValueError(f"{path} holds no linear head, which is weight (classes, features) and bias (classes,) "
                         f"(its entries: {', '.join(map(str, list(head)[:3]))})")
    most = min(4, n_blocks)
    layers = {2 * dim: 1, (1 + most) * dim: most}.get(weight.shape[1])
    if layers is None:
        raise ValueError(f"{path} is the head of another backbone: it takes {weight.shape[1]} features, those of this "
                         f"one, {dim} wide, are {2 * dim} (1 layer) or {(1 + most) * dim} ({most} layers)")
    return weight.float(), bias.float(), layers


def load_classifier(spec: str | Path, head_path: str | Path) -> LinearClassifier:
    """A backbone, as load() takes it, under a linear head, a released one or one of eval_linear.py; its width tells the
    layers. In eval mode. Raises ValueError if the head is none, or another backbone's."""
    return put_head(load(spec), head_path)


def put_head(backbone: DinoVisionTransformer, head_path: str | Path) -> LinearClassifier:
    weight, bias, layers = read_head(head_path, backbone.embed_dim, backbone.n_blocks)
    with torch.device("meta"):
        linear_head = nn.Linear(weight.shape[1], len(weight))
    linear_head.load_state_dict(dict(weight=weight, bias=bias), assign=True)
    return LinearClassifier(backbone, linear_head, layers).eval()


# ----------------------------------------------------------------------------------------------------------------------
# Dense heads: depth and segmentation


DEPTH_HEADS, SEG_HEADS = ("linear", "linear4", "dpt"), ("linear", "ms")
DENSE_HEADS = [f"{data}_{kind}" for datasets, kinds in ((("nyu", "kitti"), DEPTH_HEADS), (CLASSES, SEG_HEADS))
               for data in datasets for kind in kinds]  # those released of each backbone without registers


HEAD_KEYS = (("conv_depth.weight",), ("conv_seg.weight",), (
    "conv_depth.head.0.weight", "convs.0.conv.weight", "reassemble_blocks.projects.3.conv.weight"))


class About(NamedTuple):
    """What a dense network was trained for."""
    task: str  # "depth" or "seg"
    dataset: str = ""  # "nyu", "kitti", "ade20k", "voc2012", or whatever eval_dense.py was given
    classes: list[str] = []  # of segmentation: names, and red, green, blue of each
    colors: list[tuple[int, int, int]] = []
    recipe: Recipe | None = None  # and how photographs are to be segmented


def load_dense(spec: str | Path, head: str | Path | None = None, depth_range=None,
               ckpt: dict | None = None) -> tuple[Dense | Mask2Former, About]:
    """A backbone, as load() takes it, under a dense head; in eval mode. `head`: a file, of the release or of
    eval_dense.py, or one of DENSE_HEADS, as "nyu_dpt", which is downloaded if `spec` is a released backbone; None for
    "dinov2_vitg14_m2f" and its file, which hold both. `depth_range` in meters goes before the head's own; `ckpt` saves
    reading `spec` again.

    Raises ValueError if the head is none, is of another backbone, or does not say which range of depth it is for.
    """
    if head is None:
        path, ckpt = read(spec) if ckpt is None else (str(spec), ckpt)
        return put_mask2former(path, ckpt)
    if not os.path.exists(head):
        if head in DENSE_HEADS and (spec not in RELEASED or str(spec).endswith("_reg")):
            raise ValueError(f"{head} is a head of the released dinov2_vit{{s,b,l,g}}14, {spec} is none of these; give "
                             "the file of its own head")
        if head not in DENSE_HEADS:
            raise ValueError(f"no such dense head: {head}{nearest(str(head), DENSE_HEADS)}; give a file, or with "
                             f"dinov2_vit{{s,b,l,g}}14 one of {', '.join(DENSE_HEADS)}")
        head = released_file(str(spec), f"{head}_head")
    return put_dense_head(load(spec, ckpt), head, depth_range)


def is_mask2former(ckpt: dict) -> bool:
    return "decode_head.query_feat.weight" in inner(ckpt)


def inner(ckpt: dict) -> dict:
    """The weights in a file of the tools that trained the dense heads, or the file itself."""
    return ckpt["state_dict"] if isinstance(ckpt.get("state_dict"), dict) else ckpt


def put_mask2former(path: str, ckpt: dict) -> tuple[Mask2Former, About]:
    if not is_mask2former(ckpt):
        raise ValueError(f"{path} has no dense head in it; name one beside it: a file, or with dinov2_vit{{s,b,l,g}}14 "
                         f"one of {', '.join(DENSE_HEADS)}")
    with torch.device("meta"):
        network = Mask2Former()
    weights = {k: v for k, v in inner(ckpt).items() if torch.is_tensor(v)}
    load_strictly(network, {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}, path)
    names = CLASSES["ade20k"]
    return network.eval(), About("seg", "ade20k", names, colors(len(names), "ade20k"), RECIPES["ade20k", "m2f"])


def put_dense_head(backbone: DinoVisionTransformer, path: str | Path, depth_range=None) -> tuple[Dense, About]:
    head, about = read_dense_head(path, backbone, depth_range)
    return Dense(backbone, head).eval(), about


def read_dense_head(path: str | Path, backbone: DinoVisionTransformer, depth_range=None) -> tuple[nn.Module, About]:
    """The head in a file for a backbone, and what it is for: as eval_dense.py wrote there, else as the name says that a
    released file has. Raises ValueError as load_dense() does."""
    ckpt, dim = read_pth(str(path)), backbone.embed_dim
    weights, own = head_weights(path, ckpt), own_words(ckpt)
    named = re.search(rf"({'|'.join((*RANGES, *CLASSES))})_(linear4?|dpt|ms)_head", Path(path).name)
    dataset, width = own.get("dataset", named[1] if named else ""), weights_width(weights)
    segments, dpt = "conv_seg.weight" in weights, "convs.0.conv.weight" in weights
    unit = dim if segments or dpt else 2 * dim  # channels of a block
    layers = {"linear": 1, "linear4": 4, "ms": 4}.get(named[2]) if named and not own else None
    if width not in ((unit,) if dpt else (unit, 4 * unit)) or own.get("dim", dim) != dim or (
            layers and width != layers * unit):  # 4 blocks of ViT-S are as wide as one of ViT-g
        raise ValueError(f"{path} is the head of another backbone: it takes {width} channels, this one, {dim} wide, "
                         f"gives {unit}" + f" or {4 * unit}" * (not dpt))
    if own.get("backbone") and own["backbone"] != weights_hash(backbone):
        raise ValueError(f"{path} was trained on the features of another backbone, of the same width")
    if segments:
        n, kind = len(weights["conv_seg.bias"]), "linear" if width == unit else "ms"
        if not own and len(CLASSES.get(dataset, ())) != n:
            dataset = next((name for name in CLASSES if len(CLASSES[name]) == n), "")
        names = own.get("classes") or CLASSES.get(dataset) or [f"class {k}" for k in range(n)]
        recipe = Recipe(*own["recipe"]) if own else RECIPES.get((dataset, kind), Recipe())
        about = About("seg", dataset, names, colors(n, dataset), recipe)
        make, arguments = SegmentationHead, dict(n_classes=n, layers=width // unit)
    else:
        limits = depth_range or own.get("depth_range") or RANGES.get(dataset)
        if limits is None:
            raise ValueError(f"{path} does not say for which depths it is; give their range in meters, as 0.001 10, "
                             "which is that of heads for NYU (0.001 80: KITTI)")
        about, arguments = About("depth", dataset), dict(min_depth=limits[0], max_depth=limits[1])
        if dpt:
            make, arguments["channels"] = DPTHead, len(weights["convs.0.conv.weight"])
        else:
            make, n_bins = LinearDepthHead, len(weights["conv_depth.bias"])
            arguments |= dict(layers=width // unit, n_bins=n_bins)
    with torch.device("meta"):
        head = make(dim, **arguments)
    load_strictly(head, weights, str(path))
    return head, about


def own_words(ckpt: dict) -> dict:
    """What eval_dense.py wrote about a head; of other files nothing."""
    return ckpt["about"] if isinstance(ckpt.get("about"), dict) else {}


def head_weights(path: str | Path, ckpt: dict) -> dict[str, Tensor]:
    """The weights of a depth or segmentation head, in float32, without the prefix that they have in released files,
    and without all else that lies there. Raises ValueError if it is none."""
    weights = inner(ckpt)
    if not isinstance(weights, dict) or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in weights.items()):
        weights = {}
    weights = {k.removeprefix("decode_head."): v.float() if v.is_floating_point() else v for k, v in weights.items()}
    dims = {k: v.ndim for k, v in weights.items()}
    heads = (dict.fromkeys(names, 4) | {names[0].replace("weight", "bias"): 1} for names in HEAD_KEYS)
    if not any(keys.items() <= dims.items() for keys in heads):
        raise ValueError(f"{path} holds no depth or segmentation head (its entries: "
                         f"{', '.join(map(str, list(ckpt)[:3]))})")
    return weights


def weights_width(weights: dict[str, Tensor]) -> int:
    """How many channels a head takes; of DPT, those of a patch."""
    return next(weights[names[-1]].shape[1] for names in HEAD_KEYS if names[0] in weights)


# ----------------------------------------------------------------------------------------------------------------------
# The official entry points, for hubconf.py


def backbone(name: str, *, pretrained: bool = True, weights: str = "LVD142M", **kwargs) -> DinoVisionTransformer:
    """A DINOv2 backbone: images (B, 3, h*14, w*14), normalized by ImageNet's mean and deviation, -> CLS (B, D).

    pretrained: False gives random weights. weights: "LVD142M", the released ones, downloaded once, or a file.
    kwargs: of the constructor, such as drop_path_rate=0.1. In train mode, as officially; call .eval() for features.
    """
    size, registers = name.removeprefix("dinov2_vit")[0], 4 * name.endswith("_reg")
    rule = dict(interpolate_antialias=True, interpolate_offset=0.0) if registers else {}
    arguments = ARCHS[SIZES[size]] | rule | dict(
        img_size=518, patch_size=14, init_values=1.0, block_chunks=0, num_register_tokens=registers,
        ffn_layer="swiglufused" if size == "g" else "mlp") | kwargs
    if not pretrained:
        return DinoVisionTransformer(**arguments)
    return load(choose_weights(weights, name, {"LVD142M": "pretrain"}), **arguments).train()


def classifier(name: str, *, layers: int = 4, pretrained: bool = True, weights: str = "IMAGENET1K",
               **kwargs) -> LinearClassifier:
    """A DINOv2 backbone under a linear classifier: normalized images (B, 3, h*14, w*14) -> logits (B, 1000).

    layers: 4 or 1, whose CLS tokens are taken. pretrained: False gives random weights, of both. weights: "IMAGENET1K",
    the released head, downloaded once, or a file. kwargs: of the backbone. In train mode, as officially.
    """
    if layers not in (1, 4):
        raise ValueError(f"the classifiers take CLS tokens of 1 or 4 layers, not {layers}")
    vit = backbone(name, pretrained=pretrained, **kwargs)
    if not pretrained:
        return LinearClassifier(vit, nn.Linear((1 + layers) * vit.embed_dim, 1000), layers)
    path = choose_weights(weights, name, {"IMAGENET1K": f"linear{'4' * (layers == 4)}_head"})
    model = put_head(vit, path)
    if model.layers != layers:
        raise ValueError(f"{path} is a head for {model.layers} layers; call this with layers={model.layers}")
    return model.train()


def linear_depther(name: str, *, layers: int = 4, pretrained: bool = True, weights: str = "NYU", depth_range=None,
                   **kwargs) -> Dense:
    """A DINOv2 backbone under a linear depth head: normalized images (B, 3, H, W) -> depth (B, 1, H, W) in meters.

    layers: 4 or 1, whose features are taken. pretrained: False gives random weights, of both. weights: "NYU" or
    "KITTI", the released heads, downloaded once, or a file. depth_range: nearest and farthest depth in meters; without,
    (0.001, 10) for NYU and (0.001, 80) for KITTI, as these heads were trained. The official entry point takes the
    latter for both, and returns NYU's depths eight times too large: depth_range=(0.001, 80) does so too. kwargs: of the
    backbone. In eval mode.
    """
    if layers not in (1, 4):
        raise ValueError(f"the linear depth heads take the features of 1 or 4 layers, not {layers}")
    model = depther(name, f"linear{'4' * (layers == 4)}", pretrained, weights, depth_range, kwargs)
    if (found := getattr(model.decode_head, "layers", "dpt")) != layers:
        raise ValueError(f"{weights} is a head for " + ("dinov2_*_dd" if found == "dpt" else f"layers={found}"))
    return model


def dpt_depther(name: str, *, pretrained: bool = True, weights: str = "NYU", depth_range=None, **kwargs) -> Dense:
    """A DINOv2 backbone under a DPT depth head: normalized images (B, 3, H, W) -> depth (B, 1, H, W) in meters.

    pretrained: False gives random weights, of both. weights: "NYU" or "KITTI", the released heads, downloaded once, or
    a file. depth_range: nearest and farthest depth in meters; without, (0.001, 10) for NYU and (0.001, 80) for KITTI.
    kwargs: of the backbone. In eval mode.
    """
    model = depther(name, "dpt", pretrained, weights, depth_range, kwargs)
    if not isinstance(model.decode_head, DPTHead):
        raise ValueError(f"{weights} is a linear head; call dinov2_*_ld for it")
    return model


def depther(name: str, kind: str, pretrained: bool, weights: str, depth_range, kwargs: dict) -> Dense:
    vit = backbone(name, pretrained=pretrained, **kwargs)
    if pretrained:
        path = choose_weights(weights, name, {data.upper(): f"{data}_{kind}_head" for data in RANGES})
        return only("depth", path, *put_dense_head(vit, path, depth_range))
    if choose_name(weights).lower() not in RANGES:
        raise ValueError(f"weights={weights!r}: without pretrained weights it says for which depths, 'NYU' or 'KITTI'")
    limits = depth_range or RANGES[choose_name(weights).lower()]
    head = DPTHead(vit.embed_dim, *limits) if kind == "dpt" else LinearDepthHead(
        vit.embed_dim, 4 if kind == "linear4" else 1, *limits)
    return Dense(vit, head).eval()


def segmenter(name: str, kind: str, *, pretrained: bool = True, weights: str = "ADE20K", **kwargs) -> Dense:
    """A DINOv2 backbone under a segmentation head: normalized images (B, 3, H, W) -> logits (B, classes, H, W). Names
    that end in _ls have a linear head, in _ms one on the features of 4 blocks, for photographs in several sizes
    (heads.segment does all of that). Not among the official entry points.

    pretrained: False gives random weights, of both. weights: "ADE20K" (150 classes) or "VOC2012" (21), the released
    heads, downloaded once, or a file. kwargs: of the backbone. In eval mode.
    """
    vit = backbone(name, pretrained=pretrained, **kwargs)
    if pretrained:
        path = choose_weights(weights, name, {data.upper(): f"{data}_{kind}_head" for data in CLASSES})
        model = only("seg", path, *put_dense_head(vit, path))
        if model.decode_head.layers != (4 if kind == "ms" else 1):
            raise ValueError(f"{weights} is a head for dinov2_*_{'ls' if kind == 'ms' else 'ms'}")
        return model
    if choose_name(weights).lower() not in CLASSES:
        raise ValueError(f"weights={weights!r}: without pretrained weights it says the classes, 'ADE20K' or 'VOC2012'")
    classes = CLASSES[choose_name(weights).lower()]
    return Dense(vit, SegmentationHead(vit.embed_dim, len(classes), 4 if kind == "ms" else 1)).eval()


def mask2former(name: str, *, pretrained: bool = True, weights: str = "ADE20K") -> Mask2Former:
    """Mask2Former over ViT-g: normalized images (B, 3, h*32, w*32) -> scores of the 150 classes of ADE20K (B, 150, H,
    W). Photographs go through heads.segment with heads.RECIPES["ade20k", "m2f"]. Not among the official entry points.

    pretrained: False gives random weights. weights: "ADE20K", the released ones, downloaded once, or a file. In eval
    mode.
    """
    if not pretrained:
        return Mask2Former().eval()
    path = choose_weights(weights, name.removesuffix("_m2f"), {"ADE20K": "ade20k_m2f"})
    return put_mask2former(path, read_pth(path))[0]


def only(task: str, path: str, network: Dense, about: About) -> Dense:
    if about.task != task:
        raise ValueError(f"{path} is a head for {'segmentation' if task == 'depth' else 'depth'}")
    return network


def choose_name(weights: str | enum.Enum) -> str:
    return weights.name if isinstance(weights, enum.Enum) else weights  # officially a member of an enum, or its name


def choose_weights(weights: str | enum.Enum, name: str, released: dict[str, str]) -> str:
    """The file of what is asked for: one of `released`, {name: part of the file's name}, or a file."""
    weights = choose_name(weights)
    if weights in released:
        return str(released_file(name, released[weights]))
    if not os.path.exists(weights):
        raise ValueError(f"weights={weights!r}: neither {' nor '.join(map(repr, released))}, the released ones, nor a "
                         "file that exists")
    return weights


def not_yet(name: str, *args, **kwargs):
    """Not here yet."""
    raise NotImplementedError(f"{name} is not here: text belongs to another network than these")


def entry_points() -> dict[str, Callable]:
    """The 25 official names as functions: backbones, classifiers, depth estimators; dino.txt says that it is not here.
    And ours, segmentation."""
    chosen = {name: (backbone, name) for name in RELEASED} | {f"{name}_lc": (classifier, name) for name in RELEASED}
    for name in RELEASED:
        if not name.endswith("_reg"):
            chosen |= {f"{name}_ld": (linear_depther, name), f"{name}_dd": (dpt_depther, name),
                       f"{name}_ls": (segmenter, name, "linear"), f"{name}_ms": (segmenter, name, "ms")}
    chosen[MASK2FORMER] = (mask2former, MASK2FORMER)
    chosen["dinov2_vitl14_reg4_dinotxt_tet1280d20h24l"] = (not_yet, "dinov2_vitl14_reg4_dinotxt_tet1280d20h24l")
    points = {}
    for name, (make, *arguments) in chosen.items():
        points[name] = functools.partial(make, *arguments)
        points[name].__doc__, points[name].__name__ = make.__doc__, name  # which torch.hub.help and list show
    return points


def image_rules(model: DinoVisionTransformer | Mask2Former, ckpt: dict) -> dict:
    """What images the network expects: in_chans, mean and std, eval_resize and eval_crop in pixels, flip_prob; as a
    checkpoint of train.py says, else as the released models want them."""
    from data import MEAN, STD
    channels = 3 if isinstance(model, Mask2Former) else model.patch_embed.in_chans
    mean, std = (v if channels == 3 else (sum(v) / 3,) * channels for v in (MEAN, STD))  # ImageNet's, in gray
    rules = dict(in_chans=channels, mean=mean, std=std, eval_resize=256, eval_crop=224, flip_prob=0.5)
    return rules | {k: v for k, v in ckpt["config"].items() if k in rules} if ckpt.get("format") == FORMAT else rules


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of names, shapes and values of the weights, whatever file they came in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Commands


def info(argv: list[str]) -> None:
    """What a file holds: who wrote it, network, image size, number of weights; of a head what it fits."""
    parser = Parser(info.__doc__, usage="python hub.py info FILE")
    parser.add_argument("file", help="whatever hub.load takes, or a head")
    args = parser.parse_args(argv)
    path, ckpt = read(args.file)
    lines = {"file": f"{path}, {os.path.getsize(path) / 1e6:,.1f} MB"}
    if is_mask2former(ckpt):
        network, about = put_mask2former(path, ckpt)
        lines["Mask2Former"] = f"over ViT-g/14, {len(about.classes)} classes of ADE20K"
        lines["weights"] = f"{sum(v.numel() for v in network.state_dict().values()):,}"
    elif any(names[0] in str(key) for names in HEAD_KEYS for key in inner(ckpt)):
        lines |= describe_dense_head(path, ckpt)
    elif ckpt.keys() == {"weight", "bias"} and torch.is_tensor(ckpt["weight"]) and ckpt["weight"].ndim == 2:
        classes, width = ckpt["weight"].shape
        fits = [f"{n} CLS of a backbone {width // (n + 1)} wide" for n in (4, 3, 2, 1) if width % (8 * (n + 1)) == 0]
        lines["linear head"] = f"{classes} classes, {width:,} features: {' or '.join(fits)}, and the mean patch"
    else:
        lines |= describe(path, ckpt)
    print(*(f"{name:<12} {value}" for name, value in lines.items()), sep="\n")


def describe_dense_head(path: str, ckpt: dict) -> dict[str, str]:
    weights = head_weights(path, ckpt)
    width, n = weights_width(weights), f"{sum(v.numel() for v in weights.values()):,}"
    if "convs.0.conv.weight" in weights:
        lines = {"depth head": "DPT", "takes": f"4 blocks of a backbone {width} wide"}
    else:
        depth = "conv_depth.weight" in weights
        what = {"depth head": "linear"} if depth else {"segmentation": f"{len(weights['conv_seg.bias'])} classes"}
        unit, own = width // (1 + depth), own_words(ckpt).get("dim")
        lines = what | {"takes": f"{unit // own} block(s) of a backbone {own} wide" if own else
                        f"the last block of a backbone {unit} wide, or 4 blocks of one {unit // 4} wide"}
    own = {k: v for k, v in own_words(ckpt).items() if v and k != "dim"}
    own |= dict(recipe=Recipe(*own["recipe"])) if "recipe" in own else {}
    own |= dict(classes=", ".join(own["classes"])) if "classes" in own else {}
    return lines | {"weights": n} | {k.replace("_", " "): str(v) for k, v in own.items()}


def describe(path: str, ckpt: dict) -> dict[str, str]:
    """A backbone's file in words, {what: value}."""
    model, source = load(path, ckpt), ckpt.get("teacher", ckpt)
    kept, (side, _) = model.state_dict(), model.patch_embed.img_size
    kinds = sorted({str(value.dtype).removeprefix("torch.") for value in source.values()})
    left = [key for key in source if official_name(key).startswith(DROPPED)]
    chunks = any(re.search(r"\bblocks\.\d+\.\d+\.", key) for key in source)
    gated = "blocks.0.mlp.w3.weight" in kept
    lines = {"layout": layout_of(ckpt) + ", blocks in chunks" * chunks}
    if "format" in ckpt:
        lines["trained on"] = f"{ckpt['config']['data']}, {ckpt['step']:,} steps"
    lines |= {
        "network": f"{model.embed_dim} wide, {model.n_blocks} blocks, {model.num_heads} heads, "
                   f"{'SwiGLU' if gated else 'MLP'}, {model.num_register_tokens} registers",
        "images": f"{model.patch_embed.in_chans} channels, patches of {model.patch_size}x{model.patch_size} pixels, "
                  f"best at {side}x{side}; positions for others with offset {model.interpolate_offset:g}, "
                  f"{'with' if model.interpolate_antialias else 'without'} antialiasing",
        "weights": f"{sum(value.numel() for value in kept.values()):,} in {', '.join(kinds)}",
        "SHA-256": weights_hash(model)}
    if alike := [name for name in RELEASED if same_network(name, kept)]:
        lines["same as"] = f"{alike[0]}, but for the values"
    if left:
        lines["left out"] = f"{len(left)} tensors, such as {left[0]}"
    return lines


def same_network(name: str, weights: dict[str, Tensor]) -> bool:
    """Are these the names and shapes of a released backbone?"""
    with torch.device("meta"):
        released = backbone(name, pretrained=False).state_dict()
    return {k: v.shape for k, v in released.items()} == {k: v.shape for k, v in weights.items()}


COMMANDS = dict(info=info)


def main(argv: list[str] | None = None) -> None:
    run_subcommand(COMMANDS, __doc__, argv)


if __name__ == "__main__":
    run(main)
