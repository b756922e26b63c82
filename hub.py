"""Released DINOv2 models by name, and their weights from a file, whoever wrote it.

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

The architecture is read off the names and shapes of the weights, and each of them must find its place: nothing is
left out but projection heads, classifiers and the student. A missing mask_token, which only training uses, becomes
zeros. What is loaded is in eval mode, in float32, on the CPU. Pickled code is refused. Released files are kept in
torch.hub's folder, ~/.cache/torch/hub/checkpoints; without a network put them there by hand. `.safetensors` needs the
package safetensors.

At another image size than that of the weights (518 pixels for released ones) the position table is interpolated as in
the official code, whatever the layout of the file. With registers, transformers and timm do the same. Without, they
sample at other places (the official code adds 0.1 to the grid, they do not; timm also uses antialiasing), and there the
features differ from theirs. Apache License 2.0.
"""
import http.client
import json
import os
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import nearest
from model import DinoVisionTransformer, load_backbone, read_checkpoint

URL = "https://dl.fbaipublicfiles.com/dinov2"
RELEASED = tuple(f"dinov2_vit{size}14{reg}" for size in "sblg" for reg in ("", "_reg"))
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
        if str(spec) not in RELEASED:
            raise ValueError(f"no such checkpoint: {spec}; give a file, a folder, or one of "
                             f"dinov2_vit{{s,b,l,g}}14[_reg]{nearest(str(spec), RELEASED)}")
        path = released_file(str(spec))
    return str(path), (read_safetensors if path.suffix == ".safetensors" else read_checkpoint)(str(path))


def released_file(name: str) -> Path:
    """The file of a released backbone in torch.hub's folder, downloaded unless it is there. Raises ValueError."""
    base = name.removesuffix("_reg")
    file = f"{base}{'_reg4' if name != base else ''}_pretrain.pth"
    url, path = f"{URL}/{base}/{file}", Path(torch.hub.get_dir(), "checkpoints", file)
    if path.exists():
        return path
    partial = path.with_name(f"{file}.{os.getpid()}.partial")  # of this process alone
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(partial))
        read_checkpoint(str(partial))  # a transfer that broke off looks like one that ended
        partial.replace(path)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ValueError(f"{url} could not be downloaded ({error}); fetch it on another machine and put it at "
                         f"{path}") from None
    finally:
        partial.unlink(missing_ok=True)
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


def load(spec: str | Path, ckpt: dict | None = None) -> DinoVisionTransformer:
    """The backbone of a file, folder or released name, see above, in eval mode. `ckpt` saves reading it again.

    Raises ValueError if it cannot be read, holds no DINOv2 backbone, or anything in it is missing or too much.
    """
    path, ckpt = read(spec) if ckpt is None else (str(spec), ckpt)
    if "format" in ckpt:  # train.py wrote it, in the official layout and with the arguments of the constructor
        return load_backbone(path, ckpt)
    check_heads(path)
    return load_backbone(path, to_official(path, ckpt))


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


def check_heads(path: str) -> None:
    """The weights do not tell the number of heads. All of DINOv2 are 64 wide, which infer_arguments relies on; where
    transformers left a config.json beside the file, that can be checked. Raises ValueError."""
    file = Path(path).with_name("config.json")
    try:
        config = json.loads(file.read_text())
        heads, width = config["num_attention_heads"], config["hidden_size"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or somebody else's
        return
    if heads * 64 != width:
        raise ValueError(f"{file} says {heads} heads for a width of {width}; those of DINOv2 are 64 wide")


# ----------------------------------------------------------------------------------------------------------------------
# Linear classifier


class LinearClassifier(nn.Module):
    """Images (B, C, h*p, w*p) -> logits (B, classes), by a linear layer on the normalised CLS tokens of the last
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


def load_classifier(spec: str | Path, head_path: str | Path) -> LinearClassifier:
    """A backbone, as load() takes it, under an official linear head: a file of weight (classes, (1+layers)*D) and bias
    (classes,); its width tells the layers. In eval mode. Raises ValueError if the head is none, or another backbone's.
    """
    backbone, head = load(spec), read_checkpoint(str(head_path))
    shapes = [tuple(head[k].shape) if torch.is_tensor(head.get(k)) else () for k in ("weight", "bias")]
    if head.keys() != {"weight", "bias"} or len(shapes[0]) != 2 or shapes[1] != shapes[0][:1]:
        raise ValueError(f"{head_path} holds no linear head, which is weight (classes, features) and bias (classes,) "
                         f"(its entries: {', '.join(map(str, list(head)[:3]))})")
    (classes, width), dim, most = shapes[0], backbone.embed_dim, min(4, backbone.n_blocks)
    layers = {2 * dim: 1, (1 + most) * dim: most}.get(width)
    if layers is None:
        raise ValueError(f"{head_path} is the head of another backbone: it takes {width} features, those of {spec}, "
                         f"{dim} wide, are {2 * dim} (1 layer) or {(1 + most) * dim} ({most} layers)")
    with torch.device("meta"):
        linear_head = nn.Linear(width, classes)
    linear_head.load_state_dict({k: v.float() for k, v in head.items()}, assign=True)
    return LinearClassifier(backbone, linear_head, layers).eval()
