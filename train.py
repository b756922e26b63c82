"""Self-supervised training of DINOv2, whole: presets, the method, sharding, checkpoints.

    python train.py                                                         # 1,437 scanned digits on a CPU, minutes
    python train.py --preset vits16_short --data /my/photos --batch-size 256           # one GPU, a folder of photos
    torchrun --nproc-per-node 8 train.py --preset vitb16_short --data ImageNet:split=TRAIN:root=/data/imagenet
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py \\
        --preset vitl16_short --data ImageNet:split=TRAIN:root=/data/imagenet       # the official ViT-L/16 recipe
    python train.py --preset vitl14 --help                                  # every field, its meaning, its value there

The method is step_losses(), the recipe is Config and PRESETS. `--batch-size` counts the images of all processes, and
`--gradient-accumulation-steps` has each of them compute its share in parts: the same command on 1, 8 or 32 GPUs is the same run. Output, in
--out: ckpt.pth (teacher and config, all that evaluations need), metrics.jsonl, resume/ (to continue),
eval/training_N/teacher_checkpoint.pth. Running the same command again continues the run, after whatever ended it, on
any number of processes. SIGTERM, SIGUSR1 and Ctrl-C save it first.

DINOv2: Oquab et al. 2023, arXiv 2304.07193. Apache License 2.0.
"""
import argparse
import contextlib
import dataclasses
import errno
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
import uuid
import warnings
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.profiler import record_function
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from tqdm import tqdm

import losses
from data import (
    MEAN, STD, Batch, InMemory, Parser, Prefetcher, TrainBatches, Unreadable, augment, augment_at_once, check_groups,
    draw_batch, eval_specs, keep_memory, nearest, open_source, prepare, reason, train_loader, worker_count)
from eval_knn import evaluate, knn_accuracy
from hub import pick_device
from model import ARCHS, FORMAT, DINOHead, build, init_linear, load_backbone, load_strictly

# ----------------------------------------------------------------------------------------------------------------------
# Recipe. The defaults are the official defaults (ssl_default_config, which is vitl16_short); presets are differences.


@dataclass(frozen=True)
class Config:
    # data
    data: str = "ImageNet:split=TRAIN"  # a folder, a list, tars, ImageNet:split=…:root=…, A*0.7,B*0.3: see data.py
    in_chans: int = 3  # channels of the images; with other than 3, hue, saturation and gray stay as they are
    mean: tuple = MEAN  # per channel, in [0, 1]; measure your own by: python data.py stats DATA
    std: tuple = STD  # likewise
    max_bad_share: float = 0.1  # the run stops if more of the images cannot be read
    eval_train: str = ""  # labeled images for k-NN; empty: the TRAIN split of --data
    eval_val: str = ""  # labeled images to classify; empty: the VAL split of --data, or leave one out
    eval_resize: int = 256  # evaluation: short side in pixels, before ...
    eval_crop: int = 224  # ... the central square of this side is cut out
    batch_size: int = 2048  # images per step over all processes; official 64 x 32 GPUs
    group_size: int = 64  # images that share a mask quota and a KoLeo search; official: the batch of one GPU
    num_workers: int = -1  # data loading processes per training process; -1: as many as there are cores; 0: none
    seed: int = 0  # of weights, order, crops, colors, masks and dropped paths
    # crops
    global_crops_size: int = 224  # side in pixels of the 2 global crops, which teacher and student see
    global_crops_scale: tuple = (0.32, 1.0)  # share of the image's area; on tiny images 0.5 1 or more
    local_crops_number: int = 8  # local crops per image, which only the student sees
    local_crops_size: int = 96  # side in pixels of the local crops
    local_crops_scale: tuple = (0.05, 0.32)  # share of the image's area
    flip_prob: float = 0.5  # probability of mirroring a crop; 0 where left and right matter, as for digits
    jitter_prob: float = 0.8  # probability of color jitter
    jitter: tuple = (0.4, 0.4, 0.2, 0.1)  # largest change of brightness, contrast, saturation, hue
    gray_prob: float = 0.2  # probability of turning gray
    blur_probs: tuple = (0.0, 0.9, 0.5)  # of blurring global crop 1, 2, local; the paper's 1.0 0.1 0.5 got inverted
    solarize_prob: float = 0.2  # probability of solarizing global crop 2
    # backbone
    arch: str = "vit_large"  # one of vit_nano, vit_micro, vit_tiny, vit_small, vit_base, vit_large, vit_giant2
    patch_size: int = 16  # side of a patch in pixels; must divide all crop sizes
    ffn_layer: str = "mlp"  # mlp, swiglu, swiglufused (the same) or identity
    qkv_bias: bool = True  # bias in the query, key, value projection
    proj_bias: bool = True  # bias in the attention's output projection
    ffn_bias: bool = True  # bias in the feed-forward layers
    layerscale: float = 1e-5  # LayerScale start, 0 for none; small nets learn faster with 1
    drop_path_rate: float = 0.3  # stochastic depth of the student; 0 for ViT-S and smaller
    drop_path_uniform: bool = True  # the same rate in all blocks, or rising from 0
    num_register_tokens: int = 0  # 4 for cleaner attention maps (Darcet et al. 2023)
    interpolate_antialias: bool = False  # how the position table is resized to the local crops
    interpolate_offset: float = 0.1  # likewise; 0.1 as in the official recipes
    init_std: float = 0.02  # spread of new Linear weights; narrow networks want about 1 / sqrt(width)
    pos_embed_std: float = 0.02  # spread of new position embeddings; short runs want that of the patch embeddings, 0.5
    init: str = ""  # start student and teacher from the backbone in this checkpoint; its architecture must be the same
    # heads
    head_n_prototypes: int = 65536  # K; small data wants few, about 10 times the number of classes
    head_bottleneck_dim: int = 256  # width before the prototypes
    head_nlayers: int = 3  # layers of the projection MLP
    head_hidden_dim: int = 2048  # their width
    ibot_separate_head: bool = False  # patches get a head of their own, of the next four fields; else they share
    ibot_head_n_prototypes: int = 65536  # K of the separate head
    ibot_head_bottleneck_dim: int = 256  # its width before the prototypes
    ibot_head_nlayers: int = 3  # its layers
    ibot_head_hidden_dim: int = 2048  # their width
    # losses
    dino_loss_weight: float = 1.0  # CLS tokens of one crop against those of another
    ibot_loss_weight: float = 1.0  # masked patches against the teacher's view of them; 0 for none
    koleo_loss_weight: float = 0.1  # spreads the features of a group of images; no effect if --group-size is 1
    mask_sample_probability: float = 0.5  # share of the global crops that are masked
    mask_ratio_min_max: tuple = (0.1, 0.5)  # share of their patches
    centering: str = "centering"  # how targets are kept from collapsing: centering or sinkhorn_knopp
    # teacher
    momentum_teacher: float = 0.992  # the teacher is the running mean of the student; short runs want less
    final_momentum_teacher: float = 1.0  # reached along a cosine
    warmup_teacher_temp: float = 0.04  # sharpness of the targets at first; if they stay uniform, lower it
    teacher_temp: float = 0.07  # and after ...
    warmup_teacher_temp_steps: int = 37500  # ... this many steps
    # optimizer
    steps: int = 125_000  # optimizer steps of the whole run; all schedules count steps
    warmup_steps: int = 12_500  # the learning rate rises linearly over these, then falls along a cosine
    lr: float = 4e-3  # for a batch of 1024; scaled by sqrt(batch_size / 1024)
    min_lr: float = 1e-6  # at the end, not scaled
    weight_decay: float = 0.04  # at the start
    weight_decay_end: float = 0.4  # at the end
    layerwise_decay: float = 0.9  # each block's lr over that of the block above
    patch_embed_lr_mult: float = 0.2  # additional factor for the patch embedding
    clip_grad: float = 3.0  # largest gradient norm, separately for backbone and heads; 0 for no limit
    freeze_last_layer_steps: int = 1250  # steps during which the prototypes have lr 0
    betas: tuple = (0.9, 0.999)  # of AdamW
    # machine
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # of backbone weights and activations in the step: bf16, fp32, auto: bf16 on a GPU
    compile: bool = False  # torch.compile each block; a minute to start, faster steps
    kernels: bool = False  # attention by kernels/attention.cu: bf16 on an NVIDIA GPU; nvcc compiles it once
    gradient_accumulation_steps: int = 1  # parts of a GPU's share of the batch; less memory, same result
    activation_checkpointing: str = "none"  # none; selective: all but matrix products; full: blocks keep only inputs
    sharding: str = "zero2"  # ddp, zero2, zero3 or hsdp: what each GPU holds of weights and optimizer, docs/scaling.md
    deterministic: bool = False  # the same run twice gives the same bits; slower on a GPU
    # output
    out: str = "out"  # folder for everything this run writes
    log_every: int = 10  # steps between lines of metrics.jsonl
    eval_every: int = 0  # steps between k-NN evaluations, also at step 0 and at the end; 0 for none
    export_every: int = 12_500  # steps between eval/training_N/teacher_checkpoint.pth; 0 for none
    save_every: int = 3750  # steps between saves of ckpt.pth and resume/, also at the end
    save_minutes: float = 30.0  # a save also when the last one is this old; 0: by steps alone
    save_patience: float = 60.0  # minutes during which saves may fail (full disk, …) and are retried; then it stops
    keep: int = 3  # saves kept in resume/
    max_nonfinite: int = 10  # steps with non-finite loss or gradient are skipped; after so many in a row the run stops


SMALL = dict(  # for networks that see tiny images on a laptop: judge by k-NN, not by the loss
    num_workers=1, flip_prob=0.0, jitter=(0.3, 0.3, 0.0, 0.0), gray_prob=0.0, blur_probs=(0.0, 0.0, 0.0),
    solarize_prob=0.0, layerscale=1.0, init_std=0.1, pos_embed_std=0.5, drop_path_rate=0.0, layerwise_decay=1.0,
    patch_embed_lr_mult=1.0, centering="sinkhorn_knopp", head_hidden_dim=128, head_bottleneck_dim=32,
    warmup_teacher_temp=0.02, teacher_temp=0.03, freeze_last_layer_steps=0, weight_decay_end=0.04, export_every=0)

PRESETS = {
    "digits": SMALL | dict(
        data="digits", eval_resize=12, eval_crop=12, batch_size=128, group_size=64, global_crops_size=12,
        global_crops_scale=(0.5, 1.0), local_crops_number=2, local_crops_size=8, local_crops_scale=(0.25, 0.6),
        arch="vit_nano", patch_size=4, head_n_prototypes=512, momentum_teacher=0.98, steps=1000, warmup_steps=100,
        warmup_teacher_temp_steps=500, lr=1.2e-2, eval_every=250, save_every=250),
    "fashion": SMALL | dict(
        data="FashionMNIST:split=TRAIN", eval_resize=28, eval_crop=28, batch_size=64, group_size=64, flip_prob=0.5,
        global_crops_size=28, global_crops_scale=(0.5, 1.0), local_crops_number=2, local_crops_size=14,
        local_crops_scale=(0.3, 0.7), arch="vit_nano", patch_size=7, head_n_prototypes=256, momentum_teacher=0.992,
        warmup_teacher_temp=0.03, teacher_temp=0.04, warmup_teacher_temp_steps=3200, steps=6400, warmup_steps=400,
        lr=1.2e-2, eval_every=1600, save_every=1600),
    # ViT-S/16 and ViT-B/16 by the ViT-L/16 recipe; no official counterpart, accuracy not yet measured here
    "vits16_short": dict(arch="vit_small", drop_path_rate=0.0, batch_size=1024),
    "vitb16_short": dict(arch="vit_base", drop_path_rate=0.1, batch_size=1024),
    # official: 32 A100, a day, ImageNet-1k: k-NN 81.6, linear 82.9
    "vitl16_short": dict(),
    # official: 96 A100, 3.3 days, ImageNet-22k: k-NN 82.0, linear 84.5. Note SwiGLU: the released ViT-L is an MLP one
    "vitl14": dict(
        data="ImageNet22k", batch_size=32 * 96, group_size=32, local_crops_size=98, patch_size=14,
        ffn_layer="swiglufused", drop_path_rate=0.4, head_n_prototypes=131072, head_bottleneck_dim=384,
        ibot_separate_head=True, ibot_head_n_prototypes=131072, centering="sinkhorn_knopp", momentum_teacher=0.994,
        steps=625_000, warmup_steps=100_000, lr=2e-4, weight_decay_end=0.2, layerwise_decay=1.0),
}
# official: 12 images per GPU, number of GPUs not stated; 256 of them make the paper's batch of 3k
PRESETS["vitg14"] = PRESETS["vitl14"] | dict(arch="vit_giant2", batch_size=12 * 256, group_size=12)

CHANGEABLE = {  # without --resume: not what is computed, but where, how long and what is written
    "out", "steps", "num_workers", "gradient_accumulation_steps", "device", "compile", "kernels",
    "activation_checkpointing", "sharding", "deterministic", "log_every", "eval_every", "export_every", "save_every", "save_minutes", "save_patience", "keep", "max_nonfinite",
    "max_bad_share"}


def field_comments() -> dict[str, str]:
    """{field: its trailing comment}: the comments in Config are the help of the command line."""
    return dict(re.findall(r"^    (\w+): [^#\n]*# (.*)$", inspect.getsource(Config), re.MULTILINE))


def parse(argv: list[str] | None) -> tuple[Config, argparse.Namespace]:
    """Command line -> (config, arguments with preset, resume, overwrite). Raises ValueError with the nearest name."""
    parser = Parser(__doc__, usage="train.py [--preset NAME] [--resume | --overwrite] [--any-field-below VALUE ...]")
    parser.add_argument("--preset", default="digits", help=f"one of {', '.join(PRESETS)} (default digits)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out although the config changed")
    parser.add_argument("--overwrite", action="store_true", help="delete the run in --out and start anew")
    given = sys.argv[1:] if argv is None else argv  # the other defaults, also those --help shows, depend on the preset
    preset = parser.parse_known_args([a for a in given if a not in ("-h", "--help")])[0].preset
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}{nearest(preset, PRESETS)}; presets: {', '.join(PRESETS)}")
    defaults = Config(**PRESETS[preset])

    comments = field_comments()
    for field in dataclasses.fields(Config):
        value = getattr(defaults, field.name)
        kind = dict(action=argparse.BooleanOptionalAction) if field.type is bool else dict(type=field.type, metavar="X")
        if field.type is tuple:
            kind = dict(type=float, nargs="+" if field.name in ("mean", "std") else len(value), metavar="X")
        text = f"{comments[field.name]} (default {value})".replace("%", "%%")
        parser.add_argument("--" + field.name.replace("_", "-"), default=value, help=text, **kind)
    args = parser.parse_args(argv)
    values = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    for field, ours in (("mean", MEAN), ("std", STD)):  # ImageNet's, in gray, for every channel of other images
        if values["in_chans"] != 3 and values[field] == ours:
            values[field] = (round(sum(ours) / 3, 3),) * values["in_chans"]
    return Config(**values), args


RANGES = {field: (0.0, 1.0) for field in (
    "flip_prob", "jitter_prob", "jitter", "gray_prob", "blur_probs", "solarize_prob", "mask_sample_probability",
    "mask_ratio_min_max", "momentum_teacher", "final_momentum_teacher", "max_bad_share", "mean")}
RANGES |= {field: (1, math.inf) for field in (
    "in_chans", "batch_size", "group_size", "patch_size", "steps", "log_every", "save_every", "keep",
    "gradient_accumulation_steps", "max_nonfinite", "local_crops_number", "head_nlayers", "head_n_prototypes", "head_bottleneck_dim",
    "head_hidden_dim", "ibot_head_nlayers", "ibot_head_n_prototypes", "ibot_head_bottleneck_dim",
    "ibot_head_hidden_dim")}
RANGES |= {field: (0.0, math.inf) for field in (
    "warmup_steps", "warmup_teacher_temp_steps", "freeze_last_layer_steps", "eval_every", "export_every",
    "num_register_tokens", "layerscale", "init_std", "pos_embed_std", "dino_loss_weight", "ibot_loss_weight",
    "koleo_loss_weight", "lr", "min_lr", "weight_decay", "weight_decay_end", "layerwise_decay", "patch_embed_lr_mult",
    "clip_grad", "save_minutes", "save_patience")}
RANGES |= dict(global_crops_scale=(1e-6, 1.0), local_crops_scale=(1e-6, 1.0), teacher_temp=(1e-3, 10.0),
               warmup_teacher_temp=(1e-3, 10.0), drop_path_rate=(0.0, 0.99), betas=(0.0, 0.999999), std=(1e-6, 1.0),
               seed=(0, 2**63 - 1), num_workers=(-1, math.inf))


def check(cfg: Config, n_ranks: int) -> None:
    """Raises ValueError, naming flag and fix, for values that cannot work, alone or together."""
    for field in ("data", "out"):
        if not getattr(cfg, field):
            raise ValueError(f"--{field} must not be empty")
    for field, (least, most) in RANGES.items():
        value = getattr(cfg, field)
        if not all(least <= v <= most for v in (value if isinstance(value, tuple) else [value])):
            fits = f"lie between {least} and {most}" if most < math.inf else f"be {least:g} or more"
            raise ValueError(f"--{field.replace('_', '-')} must {fits}, got {value}")
    for field in ("mean", "std"):
        if len(getattr(cfg, field)) != cfg.in_chans:
            raise ValueError(f"--{field} has {len(getattr(cfg, field))} values, --in-chans is {cfg.in_chans}; give one "
                             f"per channel: python data.py stats {cfg.data} --in-chans {cfg.in_chans} measures them")
    for field in ("global_crops_size", "local_crops_size", "eval_crop"):
        size, p = getattr(cfg, field), cfg.patch_size
        if size < p or size % p:
            fits = " or ".join(str(n * p) for n in (size // p, size // p + 1) if n > 0)
            raise ValueError(f"--{field.replace('_', '-')} {size} is not a multiple of --patch-size {p}; use {fits}")
    check_groups(cfg.batch_size, cfg.group_size, n_ranks, cfg.gradient_accumulation_steps)
    choices = dict(centering=("centering", "sinkhorn_knopp"), dtype=("auto", "bf16", "fp32"), arch=tuple(ARCHS),
                   ffn_layer=("mlp", "swiglu", "swiglufused", "identity"),
                   activation_checkpointing=CHECKPOINTING, sharding=SHARDINGS)
    for field, allowed in choices.items():
        if (value := getattr(cfg, field)) not in allowed:
            flag = "--" + field.replace("_", "-")
            raise ValueError(f"{flag} {value!r}{nearest(value, allowed)}; one of {', '.join(allowed)}")
    if cfg.warmup_steps > cfg.steps:
        raise ValueError(f"--warmup-steps {cfg.warmup_steps} is more than --steps {cfg.steps}; lower it too")
    for field in ("global_crops_scale", "local_crops_scale", "mask_ratio_min_max"):
        if getattr(cfg, field)[0] > getattr(cfg, field)[1]:
            raise ValueError(f"--{field.replace('_', '-')} wants the smaller value first, got {getattr(cfg, field)}")
    if cfg.eval_resize < cfg.eval_crop:
        raise ValueError(f"--eval-resize {cfg.eval_resize} is less than --eval-crop {cfg.eval_crop}")


# ----------------------------------------------------------------------------------------------------------------------
# Schedules and parameter groups


def cosine_schedule(base: float, final: float, steps: int, warmup: int = 0) -> np.ndarray:
    """(steps,) values: linear from 0 to base over `warmup` steps, both included, then half a cosine towards final."""
    n = steps - warmup
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(n) / max(n, 1)))
    return np.concatenate([np.linspace(0, base, warmup), final + (base - final) * cosine])


def schedules(cfg: Config) -> dict[str, np.ndarray]:
    """One value per step, (steps,) each: lr, last_layer_lr, weight_decay, momentum, teacher_temp."""
    lr = cosine_schedule(cfg.lr * math.sqrt(cfg.batch_size / 1024), cfg.min_lr, cfg.steps, cfg.warmup_steps)
    warm = np.linspace(cfg.warmup_teacher_temp, cfg.teacher_temp, cfg.warmup_teacher_temp_steps)[: cfg.steps]
    return dict(
        lr=lr, last_layer_lr=np.where(np.arange(cfg.steps) < cfg.freeze_last_layer_steps, 0.0, lr),
        weight_decay=cosine_schedule(cfg.weight_decay, cfg.weight_decay_end, cfg.steps),
        momentum=cosine_schedule(cfg.momentum_teacher, cfg.final_momentum_teacher, cfg.steps),
        teacher_temp=np.concatenate([warm, np.full(cfg.steps - len(warm), cfg.teacher_temp)]))


def param_groups(student: nn.ModuleDict, cfg: Config, matrices: bool | None = None) -> list[dict]:
    """Parameters with equal (lr_mult, wd_mult, is_last_layer), in order of first appearance. `matrices` selects the
    weight matrices of the blocks (True), all other parameters (False), or both (None).

    The lr of a block is layerwise_decay times that of the block above; tokens and patch embedding lie below block 0.
    Biases, norms and LayerScale are not decayed; tokens, positions and the prototypes' weight_g are.
    """
    groups: dict[tuple, dict] = {}
    for part, module in student.items():
        depth = module.n_blocks if part == "backbone" else 0
        for name, p in module.named_parameters():
            if matrices is not None and matrices != (name.startswith("blocks.") and p.ndim == 2):
                continue
            key = param_options(name, depth, cfg.layerwise_decay, cfg.patch_embed_lr_mult)
            group = dict(zip(("lr_mult", "wd_mult", "is_last_layer"), key))
            sharded = isinstance(p, DTensor)  # a fused optimizer does not take a mixture
            groups.setdefault((*key, sharded), group | dict(params=[]))["params"].append(p)
    return list(groups.values())


def param_options(name: str, depth: int, decay: float, patch_embed_mult: float) -> tuple[float, float, bool]:
    """(lr multiplier, weight decay multiplier, belongs to the last layer) of a parameter; depth 0 for heads."""
    layer = depth + 1  # final norm and heads
    if depth and name.startswith("blocks."):
        layer = int(re.match(r"blocks\.(?:\d+\.)?(\d+)\.", name)[1]) + 1  # flat or chunked key
    elif depth and not name.startswith("norm."):
        layer = 0  # cls, pos, mask, register tokens, patch_embed
    lr_mult = decay ** (depth + 1 - layer) * (patch_embed_mult if "patch_embed" in name else 1.0)
    wd_mult = 0.0 if name.endswith(".bias") or "norm" in name or "gamma" in name else 1.0
    return lr_mult, wd_mult, "last_layer" in name


# ----------------------------------------------------------------------------------------------------------------------
# The method. Change the losses in step_losses(), the augmentation in data.draw_ops(), the teacher in update_teacher().


def build_network(cfg: Config, drop_path_rate: float = 0.0) -> nn.ModuleDict:
    """Backbone and heads, named as in the official teacher files: backbone, dino_head, and ibot_head if separate."""
    dino_head = partial(DINOHead, out_dim=cfg.head_n_prototypes, nlayers=cfg.head_nlayers,
                        hidden_dim=cfg.head_hidden_dim, bottleneck_dim=cfg.head_bottleneck_dim)
    ibot_head = partial(DINOHead, out_dim=cfg.ibot_head_n_prototypes, nlayers=cfg.ibot_head_nlayers,
                        hidden_dim=cfg.ibot_head_hidden_dim, bottleneck_dim=cfg.ibot_head_bottleneck_dim)
    backbone = build(**backbone_arguments(cfg), drop_path_rate=drop_path_rate, drop_path_uniform=cfg.drop_path_uniform)
    network = nn.ModuleDict(dict(backbone=backbone, dino_head=dino_head(backbone.embed_dim)))
    if cfg.ibot_separate_head and cfg.ibot_loss_weight:
        network["ibot_head"] = ibot_head(backbone.embed_dim)
    backbone.init_weights(cfg.init_std, cfg.pos_embed_std)
    for head in list(network.values())[1:]:
        head.mlp.apply(partial(init_linear, std=cfg.init_std))
    return network


def backbone_arguments(cfg: Config) -> dict:
    """Arguments of model.build for the teacher; they go into the checkpoint, which so describes itself."""
    return dict(arch=cfg.arch, img_size=cfg.global_crops_size, patch_size=cfg.patch_size, in_chans=cfg.in_chans,
                ffn_layer=cfg.ffn_layer, init_values=cfg.layerscale, qkv_bias=cfg.qkv_bias, proj_bias=cfg.proj_bias,
                ffn_bias=cfg.ffn_bias, num_register_tokens=cfg.num_register_tokens,
                interpolate_antialias=cfg.interpolate_antialias, interpolate_offset=cfg.interpolate_offset,
                block_chunks=0)


def build_centers(cfg: Config, device: torch.device) -> dict[str, Tensor]:
    """Running means of the teacher's logits, (K,) each, for centering="centering"."""
    k_patch = cfg.ibot_head_n_prototypes if cfg.ibot_separate_head else cfg.head_n_prototypes
    return dict(cls=torch.zeros(cfg.head_n_prototypes, device=device), patch=torch.zeros(k_patch, device=device))


def head_outputs(network: nn.ModuleDict, cls: Tensor, patches: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The two factors of the logits of CLS tokens (rows, D) and of masked patches (M, D), by one shared head or a head
    for each: tokens in the bottleneck (rows, d) or (M, d), and prototypes (K, d), all float32."""
    cls, patches = cls.float(), patches.float()
    if "ibot_head" in network:
        return [network["dino_head"](cls, factored=True), network["ibot_head"](patches, factored=True)]
    tokens, prototypes = network["dino_head"](torch.cat([cls, patches]), factored=True)
    return [(part, prototypes) for part in tokens.split([len(cls), len(patches)])]


def masked_patches(out: dict[str, Tensor], batch: Batch, cfg: Config) -> Tensor:
    """(M, D) features of the masked patches; none without the iBOT loss."""
    index = batch.mask_index if cfg.ibot_loss_weight > 0 else batch.mask_index[:0]
    return out["x_norm_patchtokens"].flatten(0, 1)[index]


@torch.no_grad()
def teacher_targets(
        teacher: nn.ModuleDict, batches: list[Batch], cfg: Config, temp: float, centers: dict[str, Tensor],
) -> tuple[list[tuple[losses.LazyRows, losses.LazyRows]], dict[str, Tensor]]:
    """What the student should predict: for each batch, probabilities over the prototypes for the CLS tokens of both
    global crops (2B, K) and for the masked patches (M, K). The teacher sees the global crops without masks.

    `batches` are the gradient accumulation steps of one process. Sinkhorn-Knopp balances the rows of all batches of all
    processes. Centering treats each row by itself; the totals for update_center() are returned, too.
    """
    tokens, prototypes = dict(cls=[], patch=[]), {}
    for batch in batches:
        out = teacher["backbone"](batch.global_crops, is_training=True)
        factors = head_outputs(teacher, out["x_norm_clstoken"], masked_patches(out, batch, cfg))
        for name, (rows, table) in zip(tokens, factors):
            tokens[name].append(rows)
            prototypes[name] = table  # the same for each batch: keep one
    logits = {name: [losses.lazy_logits(rows, prototypes[name]) for rows in tokens[name]] for name in tokens}
    if cfg.centering == "sinkhorn_knopp":
        targets, totals = [losses.sinkhorn_knopp(z, temp) for z in logits.values()], {}
    else:
        targets = [[z.map(partial(losses.softmax_center, center=centers[name], temp=temp)) for z in logits[name]]
                   for name in logits]
        totals = {name: losses.center_total(torch.cat(tokens[name]), prototypes[name]) for name in tokens}
    return list(zip(*targets)), totals


def step_losses(student: nn.ModuleDict, batch: Batch, targets: tuple[losses.LazyRows, losses.LazyRows],
                cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """The DINOv2 loss of one process's batch, (), and its four weighted terms, without gradient.

    With L local crops there are 2L + 2 pairs (student crop, teacher crop) of different crops of the same image; the
    DINO terms are the mean over these pairs. Rows of a batch are crop-major: L*B rows unflatten to (L, B). All terms
    are means over images or groups of images, so the loss of a step is the mean over its gradient accumulation steps
    and over processes. `targets` are those of teacher_targets().
    """
    n_images, n_local = len(batch.samples), len(batch.local_crops) // len(batch.samples)
    n_pairs, n_crops = 2 * n_local + 2, 2 * n_images

    # The student sees the global crops through masks, and the local crops, in one pass.
    orders = None if batch.global_orders is None else [batch.global_orders, batch.local_orders]
    with record_function("student"):
        out, out_local = student["backbone"]([batch.global_crops, batch.local_crops], [batch.masks, None],
                                             is_training=True, drop_orders=orders)
    cls = out["x_norm_clstoken"]  # (2B, D)
    (cls_tokens, prototypes), (patch_tokens, patch_prototypes) = head_outputs(
        student, torch.cat([out_local["x_norm_clstoken"], cls]), masked_patches(out, batch, cfg))
    local, both = cls_tokens.unflatten(0, (-1, n_images)).split([n_local, 2])  # (L, B, d), (2, B, d)
    cls_targets, patch_targets = targets  # (2B, K), (M, K)
    dino_loss, ibot_loss = (compiled(f) if cfg.compile else f for f in (losses.dino_loss, losses.ibot_loss))

    # Logits and targets exist for a few images or masked patches at a time: what these add to the means over all.
    def dino(teacher_crops: tuple[int, ...], logits: Tensor, images: slice) -> Tensor:  # logits (L, b, K)
        rows = [slice(images.start + i * n_images, images.stop + i * n_images) for i in teacher_crops]
        targets = torch.stack([cls_targets[crop] for crop in rows])  # (T, b, K)
        return cfg.dino_loss_weight / n_pairs * dino_loss(logits, targets) * (logits.shape[1] / n_images)

    def ibot(logits: Tensor, rows: slice) -> Tensor:  # (m, K)
        weight = batch.mask_weight[rows].clone()  # torch.compile would compile again for a slice with an offset
        return cfg.ibot_loss_weight * ibot_loss(logits, patch_targets[rows], weight, n_crops)

    # Every local crop against both teacher crops; every global crop against the other one, never against itself.
    loss, (dino_local, dino_first, dino_second, patch) = losses.chunked_losses([
        (local, prototypes, partial(dino, (0, 1))),
        (both[:1], prototypes, partial(dino, (1,))),
        (both[1:], prototypes, partial(dino, (0,))),
        (patch_tokens, patch_prototypes, ibot)])
    terms = dict(dino_local=dino_local, dino_global=dino_first + dino_second)
    if cfg.ibot_loss_weight > 0:
        terms["ibot"] = patch
    if cfg.koleo_loss_weight > 0:
        koleo = sum(losses.koleo_loss(crop, cfg.group_size) for crop in cls.chunk(2))  # an image's crops may be close
        loss = loss + cfg.koleo_loss_weight * koleo
        terms["koleo"] = cfg.koleo_loss_weight * koleo.detach()
    return loss, terms


@functools.cache
def compiled(loss):
    return torch.compile(loss, fullgraph=True, dynamic=True)  # the number of masked patches varies from step to step


# ----------------------------------------------------------------------------------------------------------------------
# Optimization: everything here works on the shards that each process holds


def local_shards(params) -> list[Tensor]:
    """This process's shard of each parameter or gradient, sharing its memory."""
    return [p.to_local() if isinstance(p, DTensor) else p for p in params]


def n_replicas(module: nn.Module) -> int:
    """How many replicas of a module's weights exist over all processes."""
    p = next(module.parameters())
    return p.device_mesh.size(0) if isinstance(p, DTensor) and p.device_mesh.ndim == 2 else 1


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student."""
    torch._foreach_lerp_(local_shards(teacher.parameters()), local_shards(student.parameters()), 1 - momentum)


@torch.no_grad()
def clip_gradients(modules: dict[str, nn.Module], max_norm: float, loss: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Scales the gradients of each module to a joint L2 norm of at most max_norm (0: no limit). Returns the norms
    before clipping, over all shards, and whether all gradients and every process's `loss` are finite, (): the same on
    all processes. With several replicas, the sums over all of them are divided by their number: sums within each
    replica could be rounded differently, and the replicas would drift apart."""
    grads = {name: local_shards(p.grad for p in m.parameters() if p.grad is not None) for name, m in modules.items()}
    squares = [torch.stack(torch._foreach_norm(g)).square().sum() for g in grads.values()]
    sums = torch.stack([*squares, loss.float()])
    if dist.is_initialized():
        dist.all_reduce(sums)
    norms = dict(zip(grads, (sums[:-1] / n_replicas(next(iter(modules.values())))).sqrt()))
    for name, norm in norms.items():
        if max_norm:
            torch._foreach_mul_(grads[name], (max_norm / (norm + 1e-6)).clamp(max=1))
    return norms, sums.isfinite().all()


def build_optimizers(student: nn.ModuleDict, cfg: Config) -> list[torch.optim.Optimizer]:
    """The official recipe has one optimizer. Others of torch.optim do, too, as long as each parameter belongs to one:

        [torch.optim.Muon(param_groups(student, cfg, matrices=True), lr=0.0),
         torch.optim.AdamW(param_groups(student, cfg, matrices=False), lr=0.0, betas=cfg.betas, fused=True)]

    apply_schedule() sets the learning rate and the weight decay of every group at every step.
    """
    return [torch.optim.AdamW(param_groups(student, cfg), lr=0.0, betas=cfg.betas, fused=True)]


def apply_schedule(optimizers: list[torch.optim.Optimizer], now: dict[str, float]) -> None:
    for group in itertools.chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
        group["lr"] = now["last_layer_lr" if group["is_last_layer"] else "lr"] * group["lr_mult"]
        group["weight_decay"] = now["weight_decay"] * group["wd_mult"]


def step_if_finite(optimizers: list[torch.optim.Optimizer], finite: Tensor) -> None:
    """Changes nothing if `finite`, (), is false. A fused optimizer reads that on the device, from found_inf, as with
    torch.amp. For others, and for a first step, which creates the optimizer's state, the host waits for the answer."""
    for optimizer in optimizers:
        if optimizer.defaults.get("fused") and optimizer.state:
            optimizer.found_inf = 1.0 - finite.float()
            optimizer.step()
        elif finite:
            optimizer.step()


def all_reduce_in_backward(student: nn.ModuleDict, wanted: bool) -> None:
    """Whether the next backward pass sums gradients over replicas: only that of the last gradient accumulation step
    does, for all of them."""
    for module in student.values():
        if isinstance(module, FSDPModule):
            module.set_requires_all_reduce(wanted)


def train_step(student: nn.ModuleDict, teacher: nn.ModuleDict, optimizers: list[torch.optim.Optimizer],
               batches: list[Batch], cfg: Config, now: dict[str, float],
               centers: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """One optimizer step on this process's share of the global batch, then the EMA update of the teacher. `batches` are
    the gradient accumulation steps. Returns the loss terms and gradient norms, and whether all of it was finite on all
    processes, ().

    If it was not, the step is skipped: student, optimizers and centers stay as they are. The names in record_function()
    are those in profiler traces and in `bench.py train`.
    """
    apply_schedule(optimizers, now)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    with record_function("teacher"):
        targets, totals = teacher_targets(teacher, batches, cfg, now["teacher_temp"], centers)
    terms = {}
    for batch in batches:
        all_reduce_in_backward(student, batch is batches[-1])
        with record_function("heads and losses"):  # nothing keeps the targets: the backward pass needs the memory
            loss, parts = step_losses(student, batch, targets.pop(0), cfg)
        with record_function("backward"):
            (loss / len(batches)).backward()
        terms = {k: terms.get(k, 0) + v / len(batches) for k, v in parts.items()}
    with record_function("clip and optimizer"):
        norms, finite = clip_gradients(student, cfg.clip_grad, sum(terms.values()))
        step_if_finite(optimizers, finite)
    for name, total in totals.items():
        before = centers[name].clone()
        losses.update_center(centers[name], total)
        centers[name].copy_(torch.where(finite, centers[name], before))
    with record_function("teacher's average"):
        update_teacher(teacher, student, now["momentum"])
    return terms | {f"grad_norm/{k}": v for k, v in norms.items()}, finite


# ----------------------------------------------------------------------------------------------------------------------
# Processes and sharding


LONG = timedelta(hours=2)  # that processes wait for each other, as when one lists a folder or writes a large file


def start_processes(device: torch.device, mode: str = "zero2") -> DeviceMesh:
    """The process group of torchrun, or a group of one: both are the same code from here on. Returns who shares weights
    with whom, see share_mesh()."""
    # Features leave the backbone as views of one tensor; nothing here changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    alone = {} if "WORLD_SIZE" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=LONG,
                            device_id=device if device.type == "cuda" else None, **alone)
    return share_mesh(device.type, mode)


SHARDINGS = ("ddp", "zero2", "zero3", "hsdp")


def share_mesh(device_type: str, mode: str) -> DeviceMesh:
    """The mesh for --sharding `mode`: (processes,), or (replicas, shards of one) where there are several:
    for "hsdp" one copy on each machine, for "ddp" one on each process. Raises ValueError on all processes if the
    machines differ in their number of processes."""
    n, rank, here = dist.get_world_size(), dist.get_rank(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if mode == "hsdp":
        places = together(lambda: (here, rank - int(os.environ.get("LOCAL_RANK", 0))))  # and where a machine begins
        if any(size != here or first % here for size, first in places):
            raise ValueError("--sharding hsdp wants as many processes on each machine, numbered machine by machine, but "
                             f"there are {' '.join(str(size) for size, _ in places)} beside the {n} processes; give "
                             "torchrun one --nproc-per-node, or take --sharding zero2")
    n_shards = dict(ddp=1, hsdp=here).get(mode, n)
    if n_shards == n:
        return init_device_mesh(device_type, (n,))
    return init_device_mesh(device_type, (n // n_shards, n_shards), mesh_dim_names=("replicate", "shard"))


def together(work, group=None) -> list:
    """The results of work() on all processes. If it raises on any, raises Failed on all."""
    try:
        mine = work(), ""
    except Exception as error:
        mine = None, why(error)
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine, group=group)
    if reasons := [text for _, text in gathered if text]:
        raise Failed(reasons[0])
    return [result for result, _ in gathered]


class Failed(RuntimeError):
    """Something went wrong on one of the processes, which all know now."""


def why(error: BaseException) -> str:
    """In a few words, what the system said: PyTorch hides "No space left on device" behind errors of its own."""
    while isinstance(error, CheckpointException) and error.failures:  # of one process each
        error = next(iter(error.failures.values()))[0]
    cause = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror + (f": {cause.filename}" if cause.filename else "")
        cause = cause.__cause__ or cause.__context__
    return reason(error)


class Agreement:
    """What one process noticed during a step, all know at the end of the next one; so nobody waits for an answer."""

    def __init__(self):
        self.group, self.work, self.flags = dist.new_group(backend="gloo", timeout=LONG), None, torch.zeros(0)

    def tell(self, *noticed: bool) -> list[bool]:
        """Tells the others. Returns what at least one process told at the call before."""
        heard = self.heard() or [False] * len(noticed)
        self.flags = torch.tensor(noticed, dtype=torch.uint8)
        self.work = dist.all_reduce(self.flags, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return heard

    def heard(self) -> list[bool]:
        if self.work is not None:
            self.work.wait()
        return self.flags.bool().tolist()


AHEAD = 2  # blocks whose weights are gathered while one computes; one hides all but a hitch in the network


def shard(network: nn.ModuleDict, mesh: DeviceMesh, dtype: torch.dtype, checkpointing: str = "none",
          compile_blocks: bool = False, with_backward: bool = True, mode: str = "zero2") -> None:
    """Applies, from outside and in this order, recomputation, torch.compile and FSDP2, to each block and each head.

    Master weights and gradient reduction stay float32; the backbone computes in `dtype`. Heads compute in float32
    (TF32 on a GPU): bfloat16 logits divided by a temperature of 0.04 would be off by 0.1. The student keeps its
    gathered weights until the backward pass, with `mode` "zero3" only those of the heads, with which that begins; the
    teacher, which has none, must give them up after each forward: FSDP2 would keep those of the root, and
    update_teacher() would change copies. What computes in float32 on a process alone has nothing to share or to cast:
    it needs no FSDP2, which would copy its weights and gradients.
    """
    backbone, blocks = network["backbone"], network["backbone"].block_list()
    if compile_blocks:  # with rates of stochastic depth that rise from block to block, each has a graph of its own
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 + 2 * len(blocks))
    for block in blocks:
        if checkpointing != "none":
            block.forward = checkpointed(block.forward, checkpointing)
        if compile_blocks:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)  # one for all blocks
    alone = mesh.size() == 1
    if alone and dtype == torch.float32:
        return
    policy = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
    for module in [*blocks, backbone]:
        fully_shard(module, **policy, reshard_after_forward=mode == "zero3" or not with_backward)
    heads = [module for name, module in network.items() if name != "backbone" and not alone]
    policy["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
    for head in heads:
        fully_shard(head, **policy, reshard_after_forward=not with_backward)
    prefetch(backbone, blocks, heads)


def prefetch(backbone: nn.Module, blocks: list[nn.Module], heads: list[nn.Module]) -> None:
    """Has the weights of the next blocks gathered while one computes, in both directions, and those of the heads, the
    largest, while the backbone does: FSDP2 sees roots of their own in them, which would wait for its end."""
    def gather_heads(*_):
        for head in heads:
            head.unshard(async_op=True)  # every head is called after the backbone, and waits for this

    backbone.set_modules_to_forward_prefetch(blocks[:AHEAD])
    for i, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 1 + AHEAD])
        block.set_modules_to_backward_prefetch(blocks[max(i - AHEAD, 0) : i][::-1])
    backbone.register_forward_pre_hook(gather_heads)


CHECKPOINTING = ("none", "selective", "full")
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
ATTENTION = ("aten::_scaled_dot_product_", "dinov2::attention")  # has a name per device; and ours


def checkpointed(forward, way: str):
    """`forward`, which keeps for its backward pass only its input, or with "selective" also the results of matrix
    products and attention, which take nearly all of the time. A function, since torch.compile passes over a partial."""
    contexts = dict(context_fn=partial(create_selective_checkpoint_contexts, keep_products))

    def forward_and_forget(*arguments):
        return checkpoint(forward, *arguments, use_reentrant=False, **contexts if way == "selective" else {})

    return forward_and_forget


def keep_products(context, op, *args, **kwargs) -> CheckpointPolicy:
    kept = op in PRODUCTS or op.name().startswith(ATTENTION)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


# ----------------------------------------------------------------------------------------------------------------------
# Output folder: who may write here, what is kept


OUTPUTS = (  # and config.json, which marks a run
    "ckpt.pth", "metrics.jsonl", "resume", "eval", "bad_samples.txt", "first_batch.png", "nonfinite")


def check_output(cfg: Config, resume: bool, overwrite: bool) -> None:
    """Raises ValueError if --out holds another run and neither flag allows to touch it. Writes nothing."""
    out = Path(cfg.out)
    if resume and overwrite:
        raise ValueError("--resume continues the run in --out, --overwrite deletes it; give one of the two")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    if not (out / "config.json").exists():
        if resume:
            raise ValueError(f"--resume: {out} holds no run; leave the flag out to start one")
        if foreign := [name for name in OUTPUTS if (out / name).exists()]:
            raise ValueError(f"--out {out} holds {foreign[0]} but no config.json, so it is no run of this program; "
                             "choose another --out")
    elif not (resume or overwrite):
        try:
            theirs = json.loads((out / "config.json").read_text())
        except ValueError:
            raise ValueError(f"{out}/config.json is damaged; --resume continues the run with these settings") from None
        mine, defaults = (json.loads(json.dumps(dataclasses.asdict(c))) for c in (cfg, Config()))
        theirs = defaults | theirs  # a run of an older version did not know all fields
        changed = [f"{k} {theirs[k]} -> {v}" for k, v in mine.items() if theirs[k] != v and k not in CHANGEABLE]
        if changed:
            some = ", ".join(changed[:12]) + " …" * (len(changed) > 12)
            raise ValueError(f"--out {out} holds a different run ({some}); choose another --out, or --overwrite it, or "
                             "--resume it with the new values")


def restarted() -> bool:
    """Whether torchrun has started this command anew because a process of this machine failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def claim_output(cfg: Config, overwrite: bool) -> None:
    """Makes --out this run's folder, emptied of the run before if `overwrite`."""
    out = Path(cfg.out)
    for path in [out / name for name in OUTPUTS if (out / name).exists()] if overwrite else []:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = json.dumps(dataclasses.asdict(cfg), indent=1) + "\n"
    write_atomically(out / "config.json", lambda file: file.write(text.encode()))


def write_atomically(path: Path, write) -> None:
    """write(file) under a neighboring name, then rename: `path` is never half-written, not even by a power cut."""
    partial_path = path.with_name(path.name + ".partial")
    try:
        with open(partial_path, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial_path, path)
    except BaseException:
        partial_path.unlink(missing_ok=True)  # on a full disk, every byte counts
        raise
    make_durable(path.parent)


def make_durable(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


class OutputLock:
    """The file `lock` in --out: while it is there, and its owner lives, no other run may write there.

    It names machine, process and moment of start, and is touched every few seconds. An owner on this machine is looked
    up; of one elsewhere is waited for a sign of life. A dead owner's lock is taken over. Raises ValueError if the owner
    lives, OSError if the folder cannot be written. To be used by one process of a run.
    """

    BEAT, DEATH = 10.0, 60.0  # seconds between signs of life; without one until it counts as dead

    def __init__(self, out: Path):
        self.new = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
        self.path, self.device, self.above = out / "lock", os.stat(out).st_dev, os.stat(out.parent).st_dev
        self.key = uuid.uuid4().hex
        self.mine = json.dumps(dict(zip(("host", "boot", "space"), machine()), pid=os.getpid(), start=born(os.getpid()),
                                    key=self.key))
        self.lost, self.stop = False, threading.Event()
        while not self.create():
            self.take_over_from_dead()
        self.thread = threading.Thread(target=self.beat, daemon=True)
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.release()

    def create(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, self.mine.encode())
        except OSError:
            self.path.unlink()
            raise
        finally:
            os.close(descriptor)
        return True

    def take_over_from_dead(self) -> None:
        """Removes the lock of a dead owner; raises ValueError if the owner lives."""
        try:
            text = self.path.read_text()
        except FileNotFoundError:
            return  # released just now
        try:
            owner = json.loads(text)
            named = f"process {owner['pid']} on {owner['host']}"
        except (ValueError, TypeError, KeyError):
            owner, named = {}, "an unknown process"
        if machine() == tuple(owner.get(key) for key in ("host", "boot", "space")):
            alive = born(owner["pid"]) in (owner["start"], "unknown")
        else:
            alive = self.moves(named)
        if alive:
            raise ValueError(f"--out {self.path.parent} is in use by {named}; wait for it, or choose another --out")
        aside = self.path.with_name(f"lock.{self.key}")
        with contextlib.suppress(FileNotFoundError):  # somebody else may be as quick
            os.rename(self.path, aside)
            if aside.read_text() == text:
                aside.unlink()
            else:  # somebody has taken over in between: put it back
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self.path)
                aside.unlink()

    def moves(self, named: str) -> bool:
        """Whether the lock is touched, or removed by its owner, while we watch. Opened each time: a network file system
        then asks its server. Clocks of different machines are not compared."""
        def touched() -> float:
            with open(self.path, "rb") as file:
                return os.fstat(file.fileno()).st_mtime

        with contextlib.suppress(FileNotFoundError):
            before = touched()
            for _ in tqdm(range(int(self.DEATH)), desc=f"is {named} alive", unit="s", disable=None, leave=False):
                time.sleep(1)
                if touched() != before:
                    return True
        return False

    def beat(self) -> None:
        while not self.stop.wait(self.BEAT):
            with contextlib.suppress(OSError):  # check() will say
                self.check()
                os.utime(self.path)

    def check(self) -> None:
        """Raises OSError if the folder is gone or another process has taken over, as it may after this one was frozen.
        Makes the lock again where it vanished together with the folder."""
        out = self.path.parent
        if self.path.exists():
            self.lost = self.path.read_text() != self.mine
        elif os.stat(out.parent).st_dev != self.above or out.exists() and os.stat(out).st_dev != self.device:
            raise OSError(errno.ENODEV, "its file system is gone", str(out))  # and what is mounted may come back
        elif (out / "config.json").exists():
            self.lost = True  # the other one has already ended
        else:
            out.mkdir(exist_ok=True)
            self.create()
        if self.lost:
            raise OSError(errno.EBUSY, "another process has taken over", str(out))

    def release(self) -> None:
        self.stop.set()
        with contextlib.suppress(OSError):
            if self.path.read_text() == self.mine:
                self.path.unlink()
            if self.new:
                self.path.parent.rmdir()  # if nothing was written


def machine() -> tuple[str, str, str]:
    """Name, number of the current boot and process name space: where these are the same, process numbers compare."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return socket.gethostname(), boot, os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        return socket.gethostname(), "", ""


def born(pid: int) -> str:
    """When a process of this machine started, as the system counts, "" if there is none: numbers are used again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]  # Z: dead, but its parent has not asked
    except OSError:
        try:
            os.kill(pid, 0)
        except PermissionError:
            return "unknown"  # another user's, which the system may hide
        except OSError:
            return ""
        return "unknown"


# ----------------------------------------------------------------------------------------------------------------------
# State of a run: what is saved and loaded


def teacher_checkpoint(teacher: nn.ModuleDict, cfg: Config, preset: str, step: int) -> dict:
    """What ckpt.pth holds: the teacher's full weights under the official names, as they are now, on rank 0 (other
    processes must call too), with all that is needed to use them."""
    weights = get_model_state_dict(teacher, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    arguments, on_cpu = backbone_arguments(cfg), next(teacher.parameters()).device.type == "cpu"  # the living weights
    return dict(format=FORMAT, preset=preset, config=dataclasses.asdict(cfg), step=step,
                teacher={k: v.clone() if on_cpu else v for k, v in weights.items()},
                model=ARCHS[arguments.pop("arch")] | arguments, torch=str(torch.__version__))


class TrainState:
    """What a run is at one step: networks, optimizer, centers. Everything else follows from the config and the step."""

    def __init__(self, cfg: Config, mesh: DeviceMesh, device: torch.device, kernel=None):
        torch.manual_seed(cfg.seed)
        self.student = build_network(cfg, cfg.drop_path_rate)
        if cfg.init:
            load_strictly(self.student["backbone"], load_backbone(cfg.init).state_dict(), cfg.init, assign=False)
        with torch.device("meta"):
            self.teacher = build_network(cfg)
        self.teacher.load_state_dict({k: v.clone() for k, v in self.student.state_dict().items()}, assign=True)
        self.teacher.requires_grad_(False).eval()
        dtype = compute_dtype(cfg, device)
        if kernel is not None:
            for block in self.student["backbone"].block_list() + self.teacher["backbone"].block_list():
                block.attn.kernel = kernel
        self.n_shards = mesh.shape[-1]  # processes that hold one copy of the weights; the first ones save it
        shard(self.student.to(device), mesh, dtype, cfg.activation_checkpointing, cfg.compile, mode=cfg.sharding)
        shard(self.teacher.to(device), mesh, dtype, compile_blocks=cfg.compile, with_backward=False)
        self.optimizers = build_optimizers(self.student, cfg)
        self.centers = build_centers(cfg, device)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """{part: {name: tensor}}, no copies: saving reads them, loading fills them. Nothing but tensors is saved, so
        that nothing else need be read."""
        return self.networks() | self.optimizer_tensors()

    def networks(self) -> dict[str, dict[str, Tensor]]:
        return dict(student=dict(self.student.named_parameters()), teacher=dict(self.teacher.named_parameters()),
                    centers=self.centers)

    def optimizer_state(self) -> dict[str, dict]:
        """{parameter: its state}, for the parameters that have had a gradient."""
        states = [optimizer.state for optimizer in self.optimizers]
        return {name: state[p] for name, p in self.student.named_parameters() for state in states if p in state}

    def optimizer_tensors(self) -> dict[str, dict[str, Tensor]]:
        """{entry of the state, as exp_avg: {parameter: tensor}}. Numbers become tensors; None is left out."""
        tensors: dict[str, dict[str, Tensor]] = {}
        for name, entries in self.optimizer_state().items():
            for key, value in entries.items():
                if value is not None:
                    value = value if torch.is_tensor(value) else torch.tensor(value, dtype=torch.float64)
                    tensors.setdefault(key, {})[name] = value
        return tensors

    def create_optimizer_state(self) -> None:
        """Has each optimizer create its own state for all parameters, in a step with zero gradients and lr 0."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
                for p in group["params"]:
                    p.grad = torch.zeros_like(p)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def load(self, save: Path) -> None:
        """Fills networks, centers and optimizers from a save. Raises ValueError if other optimizers made it."""
        self.create_optimizer_state()
        saved = dcp.FileSystemReader(save).read_metadata().state_dict_metadata.keys()
        saved = {name for name in saved if name.partition(".")[0] not in self.networks()}
        created = [(key, name, t) for key, named in self.optimizer_tensors().items() for name, t in named.items()]
        with_state = {name for key, name, _ in created if f"{key}.{name}" in saved}
        created = {f"{key}.{name}": (key, name, t) for key, name, t in created if name in with_state}
        if saved != created.keys():
            raise ValueError(f"its optimizer is another: {min(saved ^ created.keys())}")
        tensors = self.networks()
        for key, name, tensor in created.values():
            tensors.setdefault(key, {})[name] = tensor
        dcp.load(tensors, checkpoint_id=str(save))
        for name, entries in self.optimizer_state().items():
            entries.update({key: type(value)(tensors[key][name].item()) for key, value in entries.items()
                            if isinstance(value, (int, float)) and name in with_state})
        for optimizer in self.optimizers:  # parameters that had no gradient yet start without state
            for name, p in self.student.named_parameters():
                if name not in with_state:
                    optimizer.state.pop(p, None)

    def load_newest(self, folder: Path) -> tuple[dict, list[str]]:
        """Loads the newest save that is whole, made by any number of processes. Returns what its file `complete` says,
        {} if there is no save, and the names of newer ones that are damaged. Raises ValueError if all are damaged, or
        if it is foreign or holds anything but tensors."""
        names = [sorted((path.name for path in folder.glob("step_*")), reverse=True)]
        dist.broadcast_object_list(names)  # one process looks, lest a slow network file system give two answers
        damaged = []
        for name in names[0]:
            try:
                complete = verify(folder / name)
            except Failed as error:
                raise ValueError(f"{folder / name} cannot be read ({error}); try again") from None
            if isinstance(complete, str):
                damaged.append(name)
                if dist.get_rank() == 0:
                    print(f"note: {folder / name} is damaged ({complete}) and skipped", file=sys.stderr, flush=True)
                continue
            try:
                check_metadata(folder / name / ".metadata")
                self.load(folder / name)
            except (Exception, CheckpointException) as error:  # a foreign save can fail in any way
                raise ValueError(f"{folder / name} cannot be continued from ({why(error)}), although it is whole: "
                                 f"if settings have changed, go back to those in {folder.parent}/config.json") from None
            return complete, damaged
        if damaged:
            raise ValueError(f"no save in {folder} is whole; copy {folder.parent}/ckpt.pth, the teacher, if you want "
                             "to keep it, then start anew with --overwrite")
        return {}, []


def verify(save: Path) -> dict | str:
    """What the file `complete` of a save says, if the other files are as it says, else what is wrong with them. All
    processes must call, each reads a share of the files. Raises Failed on all if one cannot read them now."""
    def contents() -> dict | str:
        try:
            complete = json.loads((save / "complete").read_text())
            files, _ = dict(complete["files"]), (int(complete["step"]), dict(complete["counters"]))
        except FileNotFoundError:
            return "complete: missing"
        except (ValueError, TypeError, KeyError):
            return "complete: not readable"
        missing = files.keys() - {path.name for path in save.iterdir()}
        return f"{min(missing)}: missing" if missing else complete

    def check_share() -> str:
        for name in sorted(complete["files"])[dist.get_rank() :: dist.get_world_size()]:
            for _ in range(60):  # seconds for which other machines may not yet see what one has renamed
                if (save / name).exists():
                    break
                time.sleep(1)
            if sha256(save / name) != complete["files"][name]:
                return f"{name}: its SHA-256 differs"
        return ""

    complete = together(lambda: contents() if dist.get_rank() == 0 else None)[0]
    return complete if isinstance(complete, str) else next(filter(None, together(check_share)), complete)


def sha256(path: Path) -> str:
    digest, size = hashlib.sha256(), path.stat().st_size
    with open(path, "rb") as file, tqdm(total=size, unit="B", unit_scale=True, desc=f"verifying {path.name}", delay=1,
                                        disable=None, leave=False) as bar:
        while piece := file.read(1 << 22):
            digest.update(piece)
            bar.update(len(piece))
    return digest.hexdigest()


class MetadataOnly(pickle.Unpickler):
    """Reads the table of contents of a save, which PyTorch writes as a pickle, and refuses whatever else it holds."""

    def find_class(self, module: str, name: str):
        known = {"torch.distributed.checkpoint.metadata": (
            "Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex",
            "StorageMeta", "_MEM_FORMAT_ENCODING"), "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
            "torch": ("Size", "float32", "float64"), "torch.serialization": ("_get_layout",),
            "pathlib": ("PosixPath", "WindowsPath"), "pathlib._local": ("PosixPath", "WindowsPath")}
        if name in known.get(module, ()):  # exact names: a dotted one would reach through the module to others
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds code, {module}.{name}; nothing in it was run")


def check_metadata(path: Path) -> None:
    """To be called before PyTorch's own reader, which would execute what a pickle says, there or in any entry that is
    no tensor. Raises UnpicklingError."""
    with open(path, "rb") as file:
        metadata = MetadataOnly(file).load()
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise pickle.UnpicklingError(f"its entry {name} is no tensor; nothing in it was run")


# ----------------------------------------------------------------------------------------------------------------------
# Saving, while training goes on


class Saver:
    """Saves a run to resume/step_N, and the teacher to ckpt.pth, by a thread of each process.

    The trainer waits only while tensors are copied to the host. A save is written under another name: the shards by
    PyTorch's distributed checkpoint, and last the file `complete`, with the step and the SHA-256 of all others; then
    all is made durable, and renamed. A save that fails is tried again later, from the step reached by then. All methods
    are called by all processes; rank 0 decides.
    """

    RETRY = 30.0  # seconds after which a failed save is tried again

    def __init__(self, cfg: Config, preset: str, state: TrainState, lock: OutputLock | None, start: int,
                 damaged: list[str], say):
        self.cfg, self.preset, self.state, self.lock, self.damaged, self.say = cfg, preset, state, lock, damaged, say
        self.folder, self.main = Path(cfg.out) / "resume", dist.get_rank() == 0
        self.group = dist.new_group(backend="gloo", timeout=LONG)  # of the threads' own: the trainers talk meanwhile
        holds = dist.get_rank() < state.n_shards  # a share of the copy that is saved; they need not talk to each other
        self.mesh = DeviceMesh("cpu", range(state.n_shards), _init_backend=False) if holds else None
        self.key, self.attempt = together(lambda: lock.key if lock else "", self.group)[0], 0
        self.copies: dict[str, dict[str, Tensor]] = {}  # on the host
        self.owed: dict[Path, dict] = {}  # checkpoints of the teacher that are not written yet
        self.thread, self.step, self.good = None, start, start  # of the last attempt, and of the last success
        self.error, self.trouble = "", ""  # of the last attempt, and of the last failure
        self.last, self.failing_since, self.stall, self.seconds = time.monotonic(), None, 0.0, 0.0
        self.asked = False  # for a save, which the others hear a step later

    def __enter__(self):
        return self

    def __exit__(self, kind, *error) -> None:
        """A save under way is completed whatever happens, unless processes it needs no longer answer."""
        if self.thread is not None:
            self.thread.join(None if kind in (None, Failed) else 60)

    def due(self) -> bool:
        """Whether the time has come for a save between the regular ones."""
        if not self.main:
            return False
        self.collect(wait=False)
        age = time.monotonic() - self.last
        if self.thread is not None or self.asked:
            return False
        self.asked = age > self.RETRY if self.failing_since is not None else 0 < 60 * self.cfg.save_minutes < age
        return self.asked

    def hopeless(self) -> str:
        """Why saving has no future, or nothing."""
        since = self.failing_since
        if not self.main:
            return ""
        if self.lock.lost:
            return f"another process has taken over --out {self.cfg.out}; this one stops without touching it"
        if since is not None and self.thread is None and time.monotonic() - since > 60 * self.cfg.save_patience:
            return (f"saving has failed for {self.cfg.save_patience:g} minutes ({self.trouble}). The last good save is "
                    f"that of step {self.good}; make room or mend the disk, and run the same command again")
        return ""

    def start(self, step: int, counters: dict, exports: list[Path]) -> None:
        """Begins to save the state after `step` steps, after waiting for the save before."""
        began = time.perf_counter()
        self.collect()
        self.error, self.step, self.last, self.asked = "", step, time.monotonic(), False
        self.attempt += 1  # a name of its own: other machines may remember a name for a while, and what it once meant
        self.partial = self.folder / f"partial_{self.key}_{self.attempt}"
        ckpt = teacher_checkpoint(self.state.teacher, self.cfg, self.preset, step)
        if self.main:
            self.owed |= {path: ckpt for path in [Path(self.cfg.out) / "ckpt.pth", *exports]}
        self.thread = threading.Thread(target=self.write, args=(step, dict(counters), self.copy()), daemon=True)
        self.thread.start()
        self.stall = time.perf_counter() - began

    def copy(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of the run as they are now, on the host, in the same memory each time; those of one copy of the
        weights, nothing on the processes that hold others."""
        def empty_copy(tensor: Tensor) -> Tensor:
            local = local_shards([tensor])[0]
            copy = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
            return DTensor.from_local(copy, self.mesh, tensor.placements[-1:], run_check=False, shape=tensor.shape,
                                      stride=tensor.stride()) if isinstance(tensor, DTensor) else copy

        if self.mesh is None:
            return {}
        state = self.state.tensors()
        if not self.copies:
            self.copies = {part: {k: empty_copy(t.detach()) for k, t in named.items()} for part, named in state.items()}
        flat = [[t for named in tree.values() for t in local_shards(named.values())] for tree in (self.copies, state)]
        with torch.no_grad():
            torch._foreach_copy_(*flat, non_blocking=True)
        if flat[1][0].is_cuda:
            torch.cuda.synchronize()
        return self.copies

    def write(self, step: int, counters: dict, copies: dict) -> None:
        """The thread. Leaves the reason in self.error, on all processes, if it fails on any."""
        rank, began, device = dist.get_rank(), time.perf_counter(), next(self.state.student.parameters()).device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # which threads do not inherit
        try:
            together(lambda: self.make_folder() if self.main else None, self.group)
            dcp.save(copies, checkpoint_id=str(self.partial), process_group=self.group)
            files = together(lambda: {p.name: sha256(p) for p in self.partial.glob(f"__{rank}_*")}, self.group)
            together(lambda: self.publish(step, counters, files) if self.main else None, self.group)
        except (Exception, CheckpointException) as error:  # also what PyTorch makes of a full disk
            self.error = why(error)
            if self.main and self.partial.exists():
                self.error = self.refusal(self.partial / "probe") or self.error
                shutil.rmtree(self.partial, ignore_errors=True)  # it takes room
        self.seconds = time.perf_counter() - began

    def refusal(self, path: Path) -> str:
        """What the system says to a small file, if it refuses that; where PyTorch says "unexpected pos"."""
        try:
            path.write_bytes(bytes(1 << 16))
        except OSError as error:
            return why(error)
        return ""

    def make_folder(self) -> None:
        """An empty folder for the save, in an --out that may have to be made again."""
        self.lock.check()
        if not (Path(self.cfg.out) / "config.json").exists():
            claim_output(self.cfg, overwrite=False)
            self.say(f"note: {self.cfg.out} had vanished and is made again; the saves that were in it are lost")
        for path in self.folder.glob("partial*"):  # what a killed run may have left
            shutil.rmtree(path, ignore_errors=True)
        self.partial.mkdir(parents=True)

    def publish(self, step: int, counters: dict, digests: list[dict[str, str]]) -> None:
        """Writes ckpt.pth, completes the save, gives it its name, and deletes those beyond the newest `keep`."""
        files = {name: digest for part in digests for name, digest in part.items()}
        for _ in range(60):  # seconds in which files of other machines become visible here
            if not (unseen := files.keys() - {path.name for path in self.partial.iterdir()}):
                break
            time.sleep(1)
        else:
            raise OSError(errno.ENOENT, "written by another machine, not to be seen here; --out must be a folder that "
                          "all machines share", str(self.partial / min(unseen)))
        self.lock.check()
        for path, ckpt in list(self.owed.items()):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, partial(torch.save, ckpt))
            del self.owed[path]
        files[".metadata"] = sha256(self.partial / ".metadata")
        for path in (Path(self.cfg.out) / "metrics.jsonl", Path(self.cfg.out) / "bad_samples.txt"):
            if path.exists():
                make_durable(path)  # a save must not survive a power cut without them
        complete = dict(step=step, counters=counters, files=files, processes=dist.get_world_size(),
                        torch=str(torch.__version__), config=dataclasses.asdict(self.cfg))
        write_atomically(self.partial / "complete", lambda file: file.write(json.dumps(complete, indent=1).encode()))
        self.lock.check()
        final = self.folder / f"step_{step:09d}"
        for name in self.damaged:  # out of the way, for whoever may want to look
            os.replace(self.folder / name, self.folder / f"damaged_{name}_{self.key[:8]}")
        self.damaged = []
        shutil.rmtree(final, ignore_errors=True)
        self.partial.rename(final)
        make_durable(self.folder)
        for old in sorted(self.folder.glob("step_*"))[: -self.cfg.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def collect(self, wait: bool = True) -> None:
        """Takes note of how a save ended; waits for one under way unless told not to."""
        if self.thread is None or self.thread.is_alive() and not wait:
            return
        self.thread.join()
        self.thread, now = None, time.monotonic()
        if not self.error:
            self.good, self.failing_since = self.step, None
            self.say(f"saved step {self.step}: training waited {self.stall:.2f} s, writing took {self.seconds:.1f} s")
            return
        self.last, self.failing_since, self.trouble = now, self.failing_since or now, self.error
        self.say(f"note: step {self.step} could not be saved ({self.error}); the last good save is that of step "
                 f"{self.good}. Trying again every {self.RETRY:g} s, for {self.cfg.save_patience:g} minutes")

    def finish(self, step: int, counters: dict) -> None:
        """Waits until the state after `step` steps is saved. Raises Failed when that has become hopeless."""
        while True:
            self.collect()
            if self.good == step and not self.error:
                return
            hopeless = together(self.hopeless, self.group)[0]
            if hopeless:
                raise Failed(hopeless)
            if self.error:
                time.sleep(self.RETRY)
            self.start(step, counters, [])


class StopSignals:
    """While in use, SIGTERM, SIGUSR1 and a first SIGINT (Ctrl-C) ask for an orderly stop: `name` tells. A second
    SIGINT, which is not the echo of the first by torchrun, ends the program at once."""

    ECHO = 0.5  # seconds

    def __init__(self, lock: OutputLock | None):
        self.name, self.interrupted, self.lock = "", math.inf, lock

    def __enter__(self):
        self.before = {n: signal.signal(n, self.receive) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame) -> None:
        if not self.name and self.lock:  # of rank 0; no print(), which the signal may have interrupted
            os.write(2, b"\nfinishing the step, then saving; Ctrl-C (again) ends at once\n")
        self.name = self.name or signal.Signals(number).name
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if now - self.interrupted > self.ECHO:
            if self.lock:
                self.lock.release()
            os.write(2, b"\nstopped at once; the same command continues from the last save, if there is one\n")
            os._exit(130)
        self.interrupted = min(self.interrupted, now)


def same_command() -> str:
    """What to type to continue this run."""
    words = [word for word in sys.argv[1:] if word != "--overwrite"]
    nodes, here = int(os.environ.get("GROUP_WORLD_SIZE", 1)), os.environ.get("LOCAL_WORLD_SIZE", "1")
    launcher = ["python"]
    if nodes > 1:
        launcher = ["torchrun", "--nnodes", str(nodes), "--nproc-per-node", here, "--rdzv-backend", "c10d",
                    "--rdzv-endpoint", f"{os.environ.get('MASTER_ADDR', 'HOST')}:29500"]
    elif "WORLD_SIZE" in os.environ:
        launcher = ["torchrun", "--standalone", "--nproc-per-node", here]
    return shlex.join([*launcher, sys.argv[0], *words])


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation and logging during the run


class Knn:
    """k-NN of the teacher during the run, and of raw pixels once. Every process extracts a share of the features."""

    def __init__(self, cfg: Config, device: torch.device, sources: list):
        self.cfg, self.device, self.sources = cfg, device, sources
        for source in self.sources:
            if source is not None and source.labels is None:
                raise ValueError(f"--eval-every needs labels, and {source.name} has none; make one sub-folder per "
                                 "class, or set --eval-every 0")

    def teacher(self, teacher: nn.ModuleDict) -> dict[str, float]:
        cfg = self.cfg
        weights = get_model_state_dict(teacher["backbone"], options=StateDictOptions(full_state_dict=True))
        with torch.device("meta"):
            backbone = build(**backbone_arguments(cfg))
        backbone.load_state_dict(weights, assign=True)
        return evaluate(backbone.eval(), *self.sources, cfg.eval_resize, cfg.eval_crop, self.device,
                        local_workers(cfg), mean=cfg.mean, std=cfg.std)

    def raw_pixels(self) -> dict[str, float] | None:
        """The same vote on the pixels themselves; None for sources that are not in memory."""
        if not all(isinstance(source, InMemory) for source in self.sources):
            return None
        tables = [F.normalize(s.pixels.flatten(1).float(), dim=-1).to(self.device) for s in self.sources]
        return knn_accuracy(tables[0], self.sources[0].labels, tables[1], self.sources[1].labels)


class Log:
    """metrics.jsonl and the progress bar, both on rank 0 only. A resumed run drops the lines it is going to repeat."""

    def __init__(self, path: Path, start: int, steps: int, counters: dict[str, int]):
        self.main = dist.get_rank() == 0
        self.path, self.records, self.behind = path, [], False
        if self.main:
            lines = path.read_text().splitlines() if path.exists() else []
            records = []
            for line in lines:
                with contextlib.suppress(ValueError):  # a killed run may leave half a line
                    records.append(json.loads(line))
            self.records = [r for r in records if r["step"] < start + ("knn" in r and start > 0)]
            self.rewrite()
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=None if self.main else True, smoothing=0.05)
        self.steps, self.told = steps, time.monotonic()
        self.bad_path, self.new_bad, self.unlisted = path.with_name("bad_samples.txt"), [], {}
        self.counters = dict(bad_samples=0, skipped_steps=0, skipped_in_a_row=0) | counters
        self.bad_before = self.counters["bad_samples"]
        listed = self.bad_path.read_text("utf-8", "surrogateescape") if self.bad_path.exists() else ""
        self.listed = {line.partition("\t")[0] for line in listed.split("\n")}

    def rewrite(self) -> None:
        write_atomically(self.path, lambda file: file.writelines(json.dumps(r).encode() + b"\n" for r in self.records))

    def write(self, record: dict) -> None:
        """Adds a line. On a disk that refuses, it is kept in memory and written with a later one."""
        if not self.main:
            return
        self.records.append({k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in record.items()})
        try:
            if self.behind or not self.path.exists():
                self.rewrite()
            else:
                with open(self.path, "a") as file:
                    file.write(json.dumps(self.records[-1]) + "\n")
            self.behind = False
        except OSError as error:
            if not self.behind:
                self.say(f"note: {self.path} cannot be written ({why(error)}); its lines wait in memory")
            self.behind = True

    def knn(self, step: int, key: str = "knn") -> dict | None:
        return next((r[key] for r in self.records if r["step"] == step and key in r), None)

    def step(self, step: int, now: dict[str, float], means: dict[str, float], images_per_s: float,
             data_wait: float) -> None:
        """One line for this step: `now` the schedules, `means` the losses over all processes and the gradient norms;
        `images_per_s` and `data_wait`, the share of the time spent waiting for images, since the last line. A number
        that is not finite becomes null."""
        loss = sum(v for k, v in means.items() if not k.startswith("grad_norm"))
        self.write(dict(step=step, loss=loss, **means, **now, images_per_s=images_per_s, data_wait=data_wait,
                        bad_samples=self.counters["bad_samples"], skipped_steps=self.counters["skipped_steps"]))
        text = f"loss {loss:.3f}, {images_per_s:.0f} images/s, data wait {data_wait:.0%}"
        self.bar.set_postfix_str(text)
        if self.main and self.bar.disable and time.monotonic() - self.told > 60:  # no terminal: a line a minute
            print(f"step {step + 1} of {self.steps}: {text}", flush=True)
            self.told = time.monotonic()

    def count_bad(self, n_samples: int) -> float:
        """Adds up what all processes could not read since the last line, and lists each file once, with the reason, in
        bad_samples.txt. Returns the share of bad ones among all that this command read for its `n_samples` samples."""
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, self.new_bad)
        new = [item for bad in gathered for item in bad]
        self.new_bad = []
        self.counters["bad_samples"] += len(new)
        for name, text in new:
            plain = re.sub(r"\s", " ", name)  # a line each, whatever is in a name
            if plain not in self.listed:
                self.unlisted[plain] = text
        if self.main and self.unlisted:
            with contextlib.suppress(OSError):  # then with the next ones
                with open(self.bad_path, "a", encoding="utf-8", errors="surrogateescape") as file:
                    file.writelines(f"{name}\t{self.unlisted[name]}\n" for name in sorted(self.unlisted))
                self.listed.update(self.unlisted)
                self.unlisted = {}
        bad = self.counters["bad_samples"] - self.bad_before
        return bad / (bad + n_samples)

    def evaluation(self, knn: Knn, teacher: nn.ModuleDict, done: int) -> None:
        self.write(dict(step=done, knn=knn.teacher(teacher)) | (
            dict(knn_raw_pixels=knn.raw_pixels()) if done == 0 else {}))
        if done:
            self.say(f"step {done}: {summary(self, done)}")

    def say(self, text: str) -> None:
        if self.main:
            self.bar.write(text, file=sys.stdout)


class NonFinite:
    """Counts the steps that were skipped because a loss or a gradient was not finite, and writes to out/nonfinite/ what
    they were. It looks at a step one step later, when the GPU has long finished it."""

    def __init__(self, cfg: Config, log: Log, batches: TrainBatches, saver: Saver):
        self.cfg, self.log, self.batches, self.saver, self.pending = cfg, log, batches, saver, None

    def watch(self, step: int, finite: Tensor, terms: dict[str, Tensor]) -> None:
        self.settle()
        seen = torch.empty((), dtype=torch.bool, pin_memory=finite.is_cuda).copy_(finite, non_blocking=True)
        copied = torch.cuda.current_stream().record_event() if finite.is_cuda else None
        self.pending = step, seen, copied, terms

    def settle(self) -> None:
        """Counts the step watched last. Raises Failed after --max-nonfinite in a row."""
        if self.pending is None:
            return
        (step, seen, copied, terms), self.pending, counters = self.pending, None, self.log.counters
        if copied:
            copied.synchronize()
        if seen:
            counters["skipped_in_a_row"] = 0
            return
        counters["skipped_steps"] += 1
        counters["skipped_in_a_row"] += 1
        source, seed = self.batches.source, self.batches.seed
        mine = dict(rank=dist.get_rank(), terms={k: str(v.item()) for k, v in terms.items()},
                    samples={s: str(source.describe(source.pick(s, seed))) for s in self.batches.samples_of(step)})
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        folder = self.log.path.with_name("nonfinite")
        if self.log.main:
            self.log.say(f"note: loss or gradients of step {step} are not finite; the step is skipped, its samples are "
                         f"listed in {folder}")
            with contextlib.suppress(OSError):
                folder.mkdir(exist_ok=True)
                text = json.dumps(dict(step=step, processes=everyone), indent=1)
                write_atomically(folder / f"step_{step:09d}.json", lambda file: file.write(text.encode()))
        if counters["skipped_in_a_row"] >= self.cfg.max_nonfinite:
            self.saver.collect()
            raise Failed(f"loss or gradients were not finite in {counters['skipped_in_a_row']} steps in a row, the "
                         f"last {step}; see {folder}. The last good save is that of step {self.saver.good}: lower --lr "
                         "and continue from it with --resume")


def summary(log: Log, steps: int) -> str:
    """The last line of a run: where it ended, where it began, what the pixels alone are worth."""
    named = (("trained teacher", log.knn(steps)), ("untrained network", log.knn(0)),
             ("raw pixels", log.knn(0, "knn_raw_pixels")))
    return "k-NN top-1 (k=20): " + " | ".join(f"{name} {knn['top1_k20']:.1f} %" for name, knn in named if knn)


# ----------------------------------------------------------------------------------------------------------------------


class TooManyBad(Exception):
    """More images than allowed cannot be read; all processes know and have saved."""


@dataclass
class Run:
    """A command that has passed all checks."""

    cfg: Config
    preset: str
    device: torch.device
    source: object
    knn: Knn | None
    state: TrainState
    lock: OutputLock | None  # of rank 0
    start: int  # steps already done
    counters: dict[str, int]  # bad images and skipped steps so far
    damaged: list[str]  # saves that could not be used


def training_batches(cfg: Config, source, rank: int, n_ranks: int) -> TrainBatches:
    n_drops = 2 * ARCHS[cfg.arch]["depth"] if cfg.drop_path_rate else 0  # two branches in each block
    return TrainBatches(
        source, batch_size=cfg.batch_size, group_size=cfg.group_size, seed=cfg.seed, rank=rank, world=n_ranks,
        accumulation_steps=cfg.gradient_accumulation_steps, n_drops=n_drops,
        global_size=cfg.global_crops_size, global_scale=cfg.global_crops_scale, n_local=cfg.local_crops_number,
        local_size=cfg.local_crops_size, local_scale=cfg.local_crops_scale, patch_size=cfg.patch_size,
        mask_prob=cfg.mask_sample_probability, mask_ratio=cfg.mask_ratio_min_max,
        ops=dict(flip_prob=cfg.flip_prob, jitter_prob=cfg.jitter_prob, jitter=cfg.jitter, gray_prob=cfg.gray_prob,
                 blur_probs=cfg.blur_probs, solarize_prob=cfg.solarize_prob))


def local_workers(cfg: Config) -> int:
    return worker_count(cfg.num_workers, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def check_shared_memory(cfg: Config, n_ranks: int) -> None:
    """Raises ValueError if the batches that wait in the workers do not fit into shared memory, which containers often
    limit to 64 MB; the workers would die of a bus error."""
    pixels = 2 * cfg.global_crops_size**2 + cfg.local_crops_number * cfg.local_crops_size**2
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    images = cfg.batch_size // (n_ranks * cfg.gradient_accumulation_steps)
    need = (2 * local_workers(cfg) + 1) * here * images * pixels * cfg.in_chans  # 2 batches per worker wait
    if cfg.num_workers and os.path.isdir("/dev/shm") and need > (free := shutil.disk_usage("/dev/shm").free):
        raise ValueError(f"/dev/shm has {free / 2**20:.0f} MB free, batches in the making need {need / 2**20:.0f} MB; "
                         "start the container with --ipc=host or a larger --shm-size, or lower --num-workers")


def check_readable(source) -> None:
    """Raises ValueError if none of ten images can be read."""
    for i in range(0, len(source), max(len(source) // 10, 1)):
        try:
            return source.image(i)
        except Exception as error:  # decoders raise all sorts on damaged files
            why = reason(error)
    raise ValueError(f"no readable image in {source.name}; the last of those tried says: {why}")


def mean_over_processes(metrics: dict[str, Tensor], n_ranks: int) -> dict[str, float]:
    values = torch.stack(list(metrics.values())) / n_ranks
    dist.all_reduce(values)
    return dict(zip(metrics, values.tolist()))


def open_everywhere(specs: list[str | None], channels: int) -> list:
    """The sources, listed by rank 0 first so that the others find the listing. Raises ValueError, on all processes, if
    they do not see the same files."""
    error = [None]
    if dist.get_rank() == 0:
        try:
            sources = [open_source(spec, channels) if spec is not None else None for spec in specs]
        except ValueError as wrong:
            error = [str(wrong)]
    dist.broadcast_object_list(error)
    if error[0]:
        raise ValueError(error[0])
    if dist.get_rank() > 0:
        sources = [open_source(spec, channels) if spec is not None else None for spec in specs]
    seen = [None] * dist.get_world_size()
    dist.all_gather_object(seen, [(len(s), s.fingerprint) if s is not None else 0 for s in sources])
    if any(other != seen[0] for other in seen):
        raise ValueError(f"the machines see different files in {specs}; give all of them the same copy")
    return sources


def set_up(argv: list[str] | None) -> Run:
    """All that can be wrong with a command is found here, before anything is written. Raises ValueError."""
    cfg, args = parse(argv)
    check(cfg, int(os.environ.get("WORLD_SIZE", 1)))
    device = pick_device(cfg.device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {cfg.device}: training runs on cpu and cuda, evaluation also on mps")
    keep_memory(spare_memory(cfg))
    check_output(cfg, args.resume, args.overwrite)
    check_shared_memory(cfg, int(os.environ.get("WORLD_SIZE", 1)))
    be_deterministic(cfg.deterministic)
    kernel = load_kernel(cfg, device) if cfg.kernels else None
    mesh = start_processes(device, cfg.sharding)
    evals = eval_specs(cfg.data, cfg.eval_train, cfg.eval_val) if cfg.eval_every else ()
    source, *eval_sources = open_everywhere([cfg.data, *evals], cfg.in_chans)
    check_readable(source)
    knn = Knn(cfg, device, eval_sources) if cfg.eval_every else None
    state = TrainState(cfg, mesh, device, kernel)
    lock = take_output(cfg)
    try:
        overwrite = args.overwrite and not any(together(restarted))  # else what is there, this command has written
        check_output(cfg, args.resume, overwrite)  # once more: another run may have just ended
        newest, damaged = ({}, []) if overwrite else state.load_newest(Path(cfg.out) / "resume")
        start = newest.get("step", 0)
        if start > cfg.steps:
            raise ValueError(f"--steps {cfg.steps} is less than the {start} steps that {cfg.out} has done")
        together(lambda: claim_output(cfg, overwrite) if lock else None)
    except BaseException as error:
        if lock:
            lock.release()
        if isinstance(error, Failed):
            raise ValueError(f"--out {cfg.out} cannot be written ({error}); choose another folder") from None
        raise
    return Run(cfg, args.preset, device, source, knn, state, lock, start, newest.get("counters", {}), damaged)


def compute_dtype(cfg: Config, device: torch.device) -> torch.dtype:
    """Of weights and activations of the backbones."""
    bf16 = cfg.dtype == "bf16" or cfg.dtype == "auto" and device.type != "cpu"
    return torch.bfloat16 if bf16 else torch.float32


def load_kernel(cfg: Config, device: torch.device):
    """The attention of kernels/attention.py, see model.Attention. Raises ValueError with the reason if it can't be."""
    if device.type != "cuda":
        raise ValueError(f"--kernels needs an NVIDIA GPU, and this runs on {device.type}; leave it out")
    if compute_dtype(cfg, device) != torch.bfloat16:
        raise ValueError("--kernels computes in bf16; leave --dtype fp32 out, or --kernels")
    torch.cuda.set_device(device)
    name, arch = "_dinov2_attention", ARCHS[cfg.arch]
    if (module := sys.modules.get(name)) is None:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "kernels/attention.py")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)  # where torch.compile looks for it
        spec.loader.exec_module(module)
    try:
        return module.load(arch["embed_dim"] // arch["num_heads"])
    except ValueError as error:
        raise ValueError(f"--kernels: {error}; leave it out") from None


def take_output(cfg: Config) -> OutputLock | None:
    """The lock on --out, for rank 0. Raises ValueError on all processes if it is another's or cannot be written."""
    def take():
        try:
            return "", OutputLock(Path(cfg.out)) if dist.get_rank() == 0 else None
        except ValueError as error:
            return str(error), None
        except OSError as error:
            return f"--out {cfg.out} cannot be written ({why(error)}); choose another folder", None

    error, lock = take()
    if error := next(filter(None, together(lambda: error)), ""):
        raise ValueError(error)
    return lock


def be_deterministic(wanted: bool) -> None:
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the GPU is first used
    torch.use_deterministic_algorithms(wanted)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written


def train(run: Run) -> None:
    """The loop: from run.start to the last step, or to the step at which a signal asks to stop; all is saved then.
    Raises Failed and TooManyBad on all processes, Unreadable on the one concerned."""
    cfg, state, knn, out = run.cfg, run.state, run.knn, Path(run.cfg.out)
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    log = Log(out / "metrics.jsonl", run.start, cfg.steps, run.counters)
    log.say(f"preset {run.preset} on {run.source.name}: {len(run.source):,} images, {cfg.arch}, step {run.start} of "
            f"{cfg.steps}, batch {cfg.batch_size} on {n_ranks} x {run.device.type}"
            f"{f' in {cfg.gradient_accumulation_steps} parts' if cfg.gradient_accumulation_steps > 1 else ''}, lr {cfg.lr * math.sqrt(cfg.batch_size / 1024):.2e}")
    if run.start:
        log.say(f"continued from {out}/resume/step_{run.start:09d}")
    batches = training_batches(cfg, run.source, rank, n_ranks)
    loader = train_loader(batches, run.start, cfg.steps, local_workers(cfg), run.device.type == "cuda")
    on_gpu = cfg.compile and run.device.type == "cuda"  # compiled for the two sizes of crops
    color = torch.compile(augment_at_once, dynamic=False) if on_gpu else augment
    loader = Prefetcher(loader, partial(prepare, device=run.device, mean=cfg.mean, std=cfg.std, augment=color),
                        run.device)
    saver = Saver(cfg, run.preset, state, run.lock, run.start, run.damaged, log.say)
    guard, agreement, schedule, parts = NonFinite(cfg, log, batches, saver), Agreement(), schedules(cfg), iter(loader)
    done, stop, too_bad, hopeless = run.start, False, False, ""
    with run.lock or contextlib.nullcontext(), StopSignals(run.lock) as signals, saver:
        if knn and evaluated_at(cfg, done) and together(lambda: not log.knn(done))[0]:
            log.evaluation(knn, state.teacher, done)  # at the start; or what a run that was killed left out
        clock, waited, logged = time.perf_counter(), loader.waited, done
        for step in range(run.start, cfg.steps):
            batch = list(itertools.islice(parts, cfg.gradient_accumulation_steps))
            if step == 0 and rank == 0:
                look_at_first(batch[0], cfg, log)
            log.new_bad += itertools.chain.from_iterable(part.bad for part in batch)
            now = {name: float(values[step]) for name, values in schedule.items()}
            metrics, finite = train_step(state.student, state.teacher, state.optimizers, batch, cfg, now, state.centers)

            done = step + 1
            log.bar.update()
            guard.watch(step, finite, metrics)
            hopeless, told = saver.hopeless(), hopeless  # rank 0 knows why; all hear that it is so one step later
            stop, due, end = agreement.tell(bool(signals.name), saver.due(), bool(hopeless))
            if end:
                raise Failed(told)
            export = cfg.export_every and done % cfg.export_every == 0
            save = done == cfg.steps or done % cfg.save_every == 0 or export or stop or due
            line, evaluate = done == cfg.steps or done % cfg.log_every == 0, knn and evaluated_at(cfg, done)
            if line or save:
                guard.settle()
                n_samples = (done - run.start) * cfg.batch_size
                bad_share = log.count_bad(n_samples)
                too_bad = bad_share > cfg.max_bad_share and n_samples >= 100 and done < cfg.steps
            if line:
                means, seconds = mean_over_processes(metrics, n_ranks), time.perf_counter() - clock
                log.step(step, now, means, cfg.batch_size * (done - logged) / seconds,
                         (loader.waited - waited) / seconds)
            if save or too_bad:
                saver.start(done, log.counters, [out / f"eval/training_{step}/teacher_checkpoint.pth"] * bool(export))
            if stop or too_bad:
                break
            if evaluate:
                log.evaluation(knn, state.teacher, done)
            if line or save or evaluate:
                clock, waited, logged = time.perf_counter(), loader.waited, done
        saver.finish(done, log.counters)
    log.bar.close()
    agreement.heard()
    if too_bad:
        raise TooManyBad(f"{bad_share:.0%} of the images that were tried cannot be read; they are listed, with the "
                         f"reasons, in {log.bad_path}. All is saved: mend or remove them and run the same command "
                         "again, or allow more by --max-bad-share")
    if rank == 0 and done < cfg.steps:
        print(f"{signals.name or 'a signal'} after step {done} of {cfg.steps}: all is saved. To continue:\n"
              f"    {same_command()}", flush=True)
    elif rank == 0:
        print(summary(log, cfg.steps) if knn else f"done; the teacher is in {out}/ckpt.pth")
        if cfg.deterministic:
            print(f"weights {fingerprint(out / 'ckpt.pth')}")
    dist.barrier()
    dist.destroy_process_group()


def evaluated_at(cfg: Config, done: int) -> bool:
    return done in (0, cfg.steps) or done % cfg.eval_every == 0


def look_at_first(batch: Batch, cfg: Config, log: Log) -> None:
    """Draws first_batch.png, and tells if the images are far from normalized."""
    with contextlib.suppress(OSError):
        draw_batch(batch, cfg.mean, cfg.std).save(log.path.with_name("first_batch.png"))
    if not 0.3 < (spread := batch.global_crops.std().item()) < 3:
        log.say(f"note: the normalized images have a spread of {spread:.2g}, which should be about 1; measure "
                f"--mean and --std by: python data.py stats {cfg.data} --in-chans {cfg.in_chans}")


def fingerprint(ckpt: Path) -> str:
    """SHA-256 of the teacher's weights in a checkpoint."""
    digest = hashlib.sha256()
    for name, tensor in sorted(torch.load(ckpt, map_location="cpu", weights_only=True)["teacher"].items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def spare_memory(cfg: Config) -> int | None:
    """Megabytes of the largest pieces of host memory that data.keep_memory() keeps. Holes among freed activations may
    take as much as these; who has them computed anew would rather wait a little for memory."""
    return 4 if cfg.activation_checkpointing != "none" else None


def main(argv: list[str] | None = None) -> None:
    try:
        run = set_up(argv)
    except ValueError as error:
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(print("\nstopped before the first step", file=sys.stderr) or 130)
    try:
        train(run)
    except (Unreadable, TooManyBad, Failed) as error:
        if isinstance(error, Unreadable) or dist.get_rank() == 0:  # the first is one process's, the others those of all
            last_line = str(error).strip().splitlines()[-1]  # a worker sends its whole stack along
            print(f"error: {last_line.removeprefix('data.Unreadable: ')}", file=sys.stderr)
        sys.exit(1 if isinstance(error, Failed) else 2)


if __name__ == "__main__":
    main()
