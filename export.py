"""Exports weights in other layouts, features as arrays, and networks as standalone programs.

    python export.py convert IN OUT --to official|hf|timm|safetensors      # with hf, OUT is a new folder
    python export.py features IMG... --model dinov2_vits14 --out feats.npz # of images and folders; or --out FOLDER
    python export.py program OUT.pt2 --model dinov2_vits14 --size 518      # torch.export; or OUT.onnx

IN and --model: anything that hub.load takes, a released name, a checkpoint of train.py, a file or folder in any layout.
`python export.py COMMAND --help` lists the flags. Apache License 2.0.
"""
import contextlib
import json
import os
import re
import sys
import tempfile
import uuid
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data import make_loader, normalize, to_float
from hub import image_rules, load, read
from model import DinoVisionTransformer
from support.cli import DTYPES, Parser, note, printable, run, run_subcommand
from support.evaluation import check_finite
from support.images import FITS, FittedImages
from support.machine import many_patches
from support.parallel import pick_device, worker_count
from support.files import refuse_inputs, replacing, write_file
from support.sources import image_paths


# ----------------------------------------------------------------------------------------------------------------------
# Weights in other layouts


def renamed(weights: dict[str, Tensor], *pairs: tuple[str, str]) -> dict[str, Tensor]:
    for pattern, name in pairs:
        weights = {re.sub(pattern, name, key): value for key, value in weights.items()}
    return weights


def as_timm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names -> timm's, which has no mask_token and, with registers, no position embedding for CLS."""
    weights = renamed(weights, (r"\.mlp\.w12\.", ".mlp.fc1."), (r"\.mlp\.w3\.", ".mlp.fc2."),
                      (r"^register_tokens$", "reg_token"))
    del weights["mask_token"]
    if "reg_token" in weights:
        positions = weights["pos_embed"]  # (1, 1+h*w, D)
        weights |= dict(cls_token=weights["cls_token"] + positions[:, :1], pos_embed=positions[:, 1:].clone())
    return weights


def as_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names -> those that the files of transformers have, which all its versions read."""
    split = {}
    for key, value in weights.items():
        for part, third in zip(("query", "key", "value"), value.chunk(3)) if ".attn.qkv." in key else [("", value)]:
            split[key.replace("attn.qkv", f"attention.attention.{part}")] = third.clone() if part else third
    for i in {key.split(".")[1] for key in weights if key.startswith("blocks.")}:  # LayerScale is not optional there
        for n in "12":
            split.setdefault(f"blocks.{i}.ls{n}.gamma", torch.ones(weights["cls_token"].shape[-1]))
    return renamed(
        split, (r"^blocks\.", "encoder.layer."), (r"^norm\.", "layernorm."), (r"\.mlp\.w12\.", ".mlp.weights_in."),
        (r"\.mlp\.w3\.", ".mlp.weights_out."), (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^pos_embed$", "embeddings.position_embeddings"),
        (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"))


def transformers_config(model: DinoVisionTransformer) -> dict:
    """config.json of Dinov2Model or Dinov2WithRegistersModel."""
    weights, registers = model.state_dict(), model.num_register_tokens
    gated = "blocks.0.mlp.w3.weight" in weights
    if not {"blocks.0.attn.proj.bias", f"blocks.0.mlp.{'w3' if gated else 'fc2'}.bias"} <= weights.keys():
        raise ValueError("transformers cannot represent a DINOv2 without feed-forward layers, or without the biases of "
                         "these or of attn.proj; choose another layout")
    return dict(
        architectures=[f"Dinov2{'WithRegisters' * bool(registers)}Model"],
        model_type=f"dinov2{'_with_registers' * bool(registers)}", hidden_size=model.embed_dim,
        num_hidden_layers=model.n_blocks, num_attention_heads=model.num_heads, mlp_ratio=4, hidden_act="gelu",
        layer_norm_eps=1e-6, image_size=model.patch_embed.img_size[0], patch_size=model.patch_size,
        num_channels=model.patch_embed.in_chans, qkv_bias="blocks.0.attn.qkv.bias" in weights, layerscale_value=1.0,
        use_swiglu_ffn=gated,
        **dict(num_register_tokens=registers) if registers else {})


def image_config(in_chans: int, mean, std, eval_resize: int, eval_crop: int, **others) -> dict:
    """preprocessor_config.json of transformers, for evaluation: short side resized, center crop."""
    return dict(image_processor_type="BitImageProcessor", do_convert_rgb=in_chans == 3, do_resize=True, resample=3,
                size=dict(shortest_edge=eval_resize), do_center_crop=True,
                crop_size=dict(height=eval_crop, width=eval_crop), do_rescale=True, rescale_factor=1 / 255,
                do_normalize=True, image_mean=list(mean), image_std=list(std))


def save_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Writes a safetensors or a PyTorch file, depending on the suffix. Raises ValueError if a package is missing."""
    if path.suffix != ".safetensors":
        return write_file(path, partial(torch.save, weights))
    try:
        from safetensors.torch import save
    except ImportError:
        raise ValueError(f"{path} needs the package safetensors: pip install safetensors") from None
    content = save({key: value.contiguous() for key, value in weights.items()}, dict(format="pt"))
    write_file(path, lambda file: file.write(content))


def convert(argv: list[str]) -> None:
    """Writes a backbone in another layout, in float32: official or timm (a .pth or .safetensors file), safetensors (the
    official names), or hf (a folder for AutoModel.from_pretrained)."""
    parser = Parser(convert.__doc__, usage="python export.py convert ...")
    parser.add_argument("source", metavar="IN", help="anything that hub.load takes")
    parser.add_argument("out", metavar="OUT", type=Path, help="the file to write, or with --to hf the folder")
    parser.add_argument("--to", required=True, choices=("official", "hf", "timm", "safetensors"))
    args = parser.parse_args(argv)
    path, ckpt = read(args.source)
    model = load(path, ckpt)
    height, width = model.patch_embed.img_size
    refuse_inputs(args.out, path)
    if args.to == "hf":
        if height != width:
            raise ValueError(f"transformers cannot resize the position table for {height}x{width} pixels, which is not "
                             "square; choose another layout")
        write_transformers(model, args.out, image_rules(model, ckpt))
    else:
        if args.to == "safetensors" and args.out.suffix != ".safetensors":
            raise ValueError(f"{args.out} must end in .safetensors")
        if args.out.suffix not in (".pth", ".pt", ".bin", ".safetensors"):
            raise ValueError(f"{args.out} must end in .pth or .safetensors")
        weights = as_timm(model.state_dict()) if args.to == "timm" else model.state_dict()
        check_heads(model, args.to)
        save_weights(weights, args.out)
    again = load(args.out, img_size=(height, width))
    if height != width:
        note(f"{args.out} does not say that its position table is for {height}x{width} pixels; load it by "
             f"hub.load({str(args.out)!r}, img_size=({height}, {width}))")
    rules = [(m.interpolate_offset, m.interpolate_antialias) for m in (model, again)]
    if rules[0] != rules[1]:
        note(f"features are the same at {height}x{width} pixels; at other sizes, programs that read this layout "
             "interpolate positions differently")
    print(f"{args.out}: {sum(v.numel() for v in again.state_dict().values()):,} weights, layout {args.to}")


def check_heads(model: DinoVisionTransformer, layout: str) -> None:
    if model.num_heads != max(model.embed_dim // 64, 1):
        raise ValueError(f"this network has {model.num_heads} heads for a width of {model.embed_dim}, which the layout "
                         f"{layout} cannot express: its readers assume heads 64 wide; use --to hf")


def write_transformers(model: DinoVisionTransformer, folder: Path, rules: dict) -> None:
    """Writes config.json, preprocessor_config.json and model.safetensors; the folder appears once all are complete."""
    if folder.exists():
        raise ValueError(f"{folder} exists; name a new folder")
    configs = {"config.json": transformers_config(model), "preprocessor_config.json": image_config(**rules)}
    try:
        with replacing(folder) as temporary:
            save_weights(as_transformers(model.state_dict()), temporary / "model.safetensors")
            for name, config in configs.items():
                write_file(temporary / name, lambda file, text=json.dumps(config, indent=1): file.write(text.encode()))
    except OSError as error:
        raise ValueError(f"could not write {folder} ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(str(error).replace(str(temporary), str(folder))) from None


# ----------------------------------------------------------------------------------------------------------------------
# Arrays of features


@torch.inference_mode()
def features(argv: list[str]) -> None:
    """Computes features of images, and of all images in folders; unreadable ones in folders are skipped.

    --out FILE.npz holds files (n,), cls (n, D), registers (n, R, D) and patches (n, h, w, D); all images must have the
    same h x w patches. --out FOLDER gets one file per image with cls (D,), registers (R, D), patches (h, w, D); after
    an error, files already written stay. All features are after the final norm, in float32.
    """
    parser = Parser(features.__doc__, usage="python export.py features ...")
    parser.add_argument("images", nargs="+", help="image files and folders")
    parser.add_argument("--model", required=True, help="anything that hub.load takes")
    parser.add_argument("--out", required=True, type=Path, help="a file ending in .npz, or a folder")
    parser.add_argument("--size", type=int, nargs="+", default=None, help="height and width in pixels, or one number "
                        "for the short side, or 0 to keep the size of each image; default: that "
                        "of training")
    parser.add_argument("--fit", choices=FITS, default="crop", help="how images are brought to that size and to "
                        "multiples of the patch size: center crop, centered padding, or resizing")
    parser.add_machine_flags("device", "dtype", "num-workers")
    parser.add_argument("--batch-size", type=int, default=32, help="images of the same size per forward pass")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise ValueError("--batch-size must be 1 or more")
    stacked, out = args.out.suffix == ".npz", args.out
    if out.is_dir() if stacked else out.is_file() or out.suffix and not out.is_dir():
        raise ValueError(f"--out {args.out} must be a file that ends in .npz, or a folder")
    device = pick_device(args.device)
    path, ckpt = read(args.model)
    model = load(path, ckpt).to(device)
    rules, paths = image_rules(model, ckpt), image_paths(args.images)
    refuse_inputs(args.out, path, *paths)
    dataset = FittedImages(paths, rules["in_chans"], model.patch_size, args.fit, image_size(args.size, model),
                           rules["mean"])
    few = args.num_workers < 0 and len(paths) < 64  # starting workers would take longer than reading
    loader = make_loader(dataset, 0 if few else worker_count(args.num_workers), batch_size=None)
    batches = same_size_batches(loader, paths, args.images, args.batch_size)
    results = image_features(model, batches, rules, device, DTYPES[args.dtype], args.model)
    if stacked:
        n = write_stacked(args.out, results)
    else:
        n = write_each(args.out, results, os.path.commonpath([os.path.dirname(os.path.abspath(p)) for p in paths]))
    print(f"{args.out}: {n:,} image{'s' * (n != 1)}")


def image_size(given: list[int] | None, model: DinoVisionTransformer) -> tuple[int, ...]:
    """--size as FittedImages takes it."""
    if given is None:
        return tuple(model.patch_embed.img_size)
    if len(given) > 2 or min(given) < 0 or (len(given) == 2 and min(given) == 0):
        raise ValueError("--size takes height and width in pixels, or one number for the short side, or 0")
    return tuple(given) if given != [0] else ()


def image_features(model: DinoVisionTransformer, batches, rules: dict, device, dtype: torch.dtype, spec: str):
    """Yields (path, CLS (D,), registers (R, D), patches (h, w, D)) per image, float32 arrays, for the batches of
    same_size_batches. Raises ValueError if features are not finite."""
    for i, (paths, images) in enumerate(batches):
        if i == 0 and (warning := many_patches(model, images.shape, paths[0])):
            note(warning)
        images = normalize(to_float(images.to(device)), rules["mean"], rules["std"])  # (b, C, H, W)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            out = model.forward_features(images)
        check_finite(out["x_norm_clstoken"], spec)
        grid = [side // model.patch_size for side in images.shape[-2:]]
        tensors = (out["x_norm_clstoken"], out["x_norm_regtokens"], out["x_norm_patchtokens"].unflatten(1, grid))
        yield from zip(paths, *(tensor.float().cpu().numpy() for tensor in tensors))


def same_size_batches(loader, paths: list[str], named: list[str], batch_size: int):
    """Yields ([paths], images (b, C, H, W)) of consecutive images of the same size. Unreadable images are reported and
    skipped. Raises ValueError if the user named one of them, or none is left."""
    names, images, left_out = [], [], 0
    for path, (image, reason) in zip(tqdm(paths, desc="features", unit=" images", disable=None), loader):
        if image is None and path in named:
            raise ValueError(reason)
        if image is None:
            left_out += 1
            print(f"left out: {printable(reason)}", file=sys.stderr)
            continue
        if images and (len(images) == batch_size or (image.shape, image.dtype) != (images[0].shape, images[0].dtype)):
            yield names, torch.stack(images)
            names, images = [], []
        names.append(path)
        images.append(image)
    if left_out == len(paths):
        raise ValueError(f"none of the {left_out:,} images can be used")
    if images:
        yield names, torch.stack(images)


def write_stacked(out: Path, results) -> int:
    """Writes all images into one .npz. The patches, which may not fit into memory, go through a temporary file. Returns
    the number of images."""
    temporary, paths, cls, registers, shape = out.with_name(f".{out.name}.{uuid.uuid4().hex}.patches"), [], [], [], None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            for path, c, r, patches in results:  # (D,), (R, D), (h, w, D)
                shape = shape or patches.shape
                if patches.shape != shape:
                    raise ValueError(f"{path} has {patches.shape[0]}x{patches.shape[1]} patches, {paths[0]} has "
                                     f"{shape[0]}x{shape[1]}, so they cannot be stacked; give --size HEIGHT WIDTH, or "
                                     "a folder as --out for one file per image")
                file.write(patches.tobytes())
                paths.append(path), cls.append(c), registers.append(r)
        stacked = np.memmap(temporary, np.float32, "r", shape=(len(paths), *shape))
        write_file(out, lambda file: np.savez(file, files=np.array(paths), cls=np.stack(cls),
                                              registers=np.stack(registers), patches=stacked))
    except OSError as error:
        raise ValueError(f"could not write --out {out} ({error.strerror})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return len(paths)


def write_each(folder: Path, results, root: str) -> int:
    """Writes FOLDER/sub/photo.jpg.npz for root/sub/photo.jpg. Returns the number of images."""
    n = 0
    for path, cls, registers, patches in results:
        file = folder / f"{os.path.relpath(path, root)}.npz"
        write_file(file, lambda f, c=cls, r=registers, p=patches: np.savez(f, cls=c, registers=r, patches=p))
        n += 1
    return n


# ----------------------------------------------------------------------------------------------------------------------
# Programs


class FixedSize(nn.Module):
    """The module that is exported: a backbone for images (B, C, height, width) of one fixed size, whose position
    embedding is interpolated once. Returns cls (B, D), patches (B, h*w, D) and, if there are any, registers (B, R, D),
    after the final norm."""

    def __init__(self, model: DinoVisionTransformer, height: int, width: int):
        super().__init__()
        tokens = model.pos_embed.new_empty(1, 1 + height * width // model.patch_size**2, model.embed_dim)
        self.model = model
        self.register_buffer("positions", model.interpolate_pos_encoding(tokens, height, width).detach().clone())
        model.interpolate_pos_encoding = lambda x, height, width: self.positions

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        out = self.model.forward_features(images)
        tokens = dict(cls=out["x_norm_clstoken"], patches=out["x_norm_patchtokens"])
        return tokens | (dict(registers=out["x_norm_regtokens"]) if self.model.num_register_tokens else {})


@torch.inference_mode()
def program(argv: list[str]) -> None:
    """Exports a backbone as a program that runs without this code: OUT.pt2 for torch.export.load, or OUT.onnx (pip
    install onnx onnxscript onnxruntime). It takes batches of any number of normalized images (B, C, height, width) of
    one fixed size and returns cls (B, D), patches (B, h*w, D) in row-major order and, if there are any, registers
    (B, R, D). The program is run and compared with the network before it is kept."""
    parser = Parser(program.__doc__, usage="python export.py program ...")
    parser.add_argument("out", metavar="OUT", type=Path, help="a file that ends in .onnx or .pt2")
    parser.add_argument("--model", required=True, help="anything that hub.load takes")
    parser.add_argument("--size", type=int, nargs="+", default=None, help="side, or height and width, in pixels; "
                        "default: the size the model was trained at")
    args = parser.parse_args(argv)
    if args.out.suffix not in (".onnx", ".pt2") or args.out.is_dir():
        raise ValueError(f"{args.out} must be a file that ends in .onnx or .pt2")
    path, ckpt = read(args.model)
    refuse_inputs(args.out, path)
    model = load(path, ckpt)
    size = args.size or list(model.patch_embed.img_size)
    if len(size) > 2 or any(side < 1 or side % model.patch_size for side in size):
        raise ValueError(f"--size takes one or two multiples of this model's patch size, {model.patch_size}")
    module = FixedSize(model, size[0], size[-1]).eval()
    batches = [torch.randn(b, model.patch_embed.in_chans, size[0], size[-1]) for b in (2, 1, 3)]
    check_finite(module(batches[0])["cls"], args.model)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=".") as folder:
        export = export_onnx if args.out.suffix == ".onnx" else export_torch
        exported = export(module, batches[0], Path(folder, args.out.name))
        worst = max(largest_difference(module(images), exported(images)) for images in batches)
        for file in sorted(Path(folder).iterdir(), reverse=True):  # a large .onnx comes with an .onnx.data
            os.replace(file, args.out.with_name(file.name))
    print(f"saved {args.out}; its outputs equal the model's within {worst:.1e} of the largest value, for batches of 1, "
          f"2 and 3 images {size[0]}x{size[-1]}")


def largest_difference(expected: dict[str, Tensor], found: dict[str, Tensor]) -> float:
    """Over all outputs, relative to the largest value of each. Raises ValueError above 1e-3."""
    worst = 0.0
    for name, value in expected.items():
        difference = float((found[name] - value).abs().max() / value.abs().max())
        if not difference < 1e-3:  # or not finite
            raise ValueError(f"{name} of the exported program differs by {difference:.1e} of the largest value: "
                             "nothing was written")
        worst = max(worst, difference)
    return worst


def export_torch(module: FixedSize, images: Tensor, path: Path):
    batch = torch.export.Dim("batch", min=1)
    torch.export.save(torch.export.export(module, (images,), dynamic_shapes=dict(images={0: batch})), path)
    return torch.export.load(path).module()


def export_onnx(module: FixedSize, images: Tensor, path: Path):
    try:
        import onnxruntime
        import onnxscript  # noqa: F401, needed by torch.onnx
    except ImportError:
        raise ValueError(f"{path.name} needs more packages: pip install onnx onnxscript onnxruntime") from None
    names = list(module(images))
    large = sum(p.numel() * p.element_size() for p in module.parameters()) > 2**30  # a protobuf is limited to 2 GB
    torch.onnx.export(module, (images,), path, dynamo=True, external_data=large, verbose=False, input_names=["images"],
                      output_names=names, dynamic_shapes=dict(images={0: torch.export.Dim("batch", min=1)}))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda batch: dict(zip(names, map(torch.from_numpy, session.run(names, {"images": batch.numpy()}))))


COMMANDS = dict(convert=convert, features=features, program=program)


def main(argv: list[str] | None = None) -> None:
    run_subcommand(COMMANDS, __doc__, argv)


if __name__ == "__main__":
    run(main, less_memory="lower --size or --batch-size")
