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
import functools
import hashlib
import inspect
import itertools
import math
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from data import (
    MEAN, STD, Batch, Prefetcher, TrainBatches, Unreadable, augment, augment_at_once, check_groups, keep_memory,
    prepare, train_loader)
from eval_knn import evaluate, knn_accuracy
from losses import (
    Rows, center_total, koleo_loss, logits_of, part_loss, prototype_loss, sinkhorn_targets, softmax_center,
    update_center)
from model import ARCHS, FORMAT, DINOHead, build, init_linear, load_backbone, load_strictly
from support.cli import Parser, nearest
from support.draw import draw_batch
from support.images import short_reason
from support.parallel import (
    CHECKPOINTING, SHARDINGS, Agreement, Failed, be_deterministic, load_kernel, local_shards, mean_over_processes,
    n_replicas, pick_device, reduce_across_replicas, shard, start_processes, together, why, worker_count)
from support.run import (
    Log, NonFinite, OutputLock, Saver, StopSignals, TooManyBad, check_metadata, check_output, claim_output, restarted,
    same_command, summary, take_output, verify)
from support.sources import InMemory, eval_specs, open_source


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


def param_groups(student: nn.ModuleDict, cfg: Config) -> list[dict]:
    """Parameters with equal (lr_mult, wd_mult, is_last_layer), in order of first appearance.

    The lr of a block is layerwise_decay times that of the block above; tokens and patch embedding lie below block 0.
    Biases, norms and LayerScale are not decayed; tokens, positions and the prototypes' weight_g are.
    """
    groups: dict[tuple, dict] = {}
    for part, module in student.items():
        depth = module.n_blocks if part == "backbone" else 0
        for name, p in module.named_parameters():
            key = param_options(name, depth, cfg.layerwise_decay, cfg.patch_embed_lr_mult)
            group = dict(zip(("lr_mult", "wd_mult", "is_last_layer"), key))
            sharded = isinstance(p, DTensor)  # of which a fused optimizer takes all or none at a time
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


def project(network: nn.ModuleDict, cls: Tensor, patches: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Factors of the logits of CLS tokens (rows, D) and of masked patches (M, D), through one shared head or one each:
    for both, projected tokens (rows, d) and prototypes (K, d), float32."""
    cls, patches = cls.float(), patches.float()
    if "ibot_head" in network:
        return [network["dino_head"](cls, factored=True), network["ibot_head"](patches, factored=True)]
    tokens, prototypes = network["dino_head"](torch.cat([cls, patches]), factored=True)
    return [(part, prototypes) for part in tokens.split([len(cls), len(patches)])]


def masked_patches(batch: Batch, cfg: Config) -> Tensor:
    """(M,) positions of the masked patches; none without the iBOT loss."""
    return batch.mask_index if cfg.ibot_loss_weight > 0 else batch.mask_index[:0]


def teacher_targets(teacher: nn.ModuleDict, batches: list[Batch], cfg: Config, temp: float, centers: dict[str, Tensor],
                    totals: dict[str, Tensor]):
    """Probabilities over the prototypes, for one batch after the other: of both crops' CLS (2, B, K), and of the masked
    patches Rows (M, K), computed a few at a time. The teacher sees the crops without masks.

    `batches` are the parts of one process's share of a step. Centering treats each row alone; what update_center() will
    want of the rows is added up in `totals`. Sinkhorn-Knopp balances the rows of all parts of all processes.
    """
    @torch.no_grad()
    def factors(batch: Batch) -> list[tuple[Tensor, Tensor]]:
        out = teacher["backbone"](batch.global_crops, is_training=True)
        patches = out["x_norm_patchtokens"].flatten(0, 1)[masked_patches(batch, cfg)]  # (M, D)
        return project(teacher, out["x_norm_clstoken"], patches)

    def centered(name: str, tokens: Tensor, prototypes: Tensor) -> Rows:
        totals[name] = totals.get(name, 0) + center_total(tokens, prototypes)
        return logits_of(tokens, prototypes).map(partial(softmax_center, center=centers[name], temp=temp))

    @torch.no_grad()
    def whole_cls(cls: Rows, patches: Rows) -> tuple[Tensor, Rows]:
        return cls[:].unflatten(0, (2, -1)), patches

    # Nothing here may hold on to what was yielded: it may be as large as the logits, and the backward pass wants room.
    if cfg.centering == "centering":
        for batch in batches:
            yield whole_cls(*(centered(name, *pair) for name, pair in zip(("cls", "patch"), factors(batch))))
    else:
        cls, patches = (sinkhorn_targets(list(parts), temp) for parts in zip(*(
            [logits_of(*pair) for pair in factors(batch)] for batch in batches)))
        while cls:
            yield whole_cls(cls.pop(0), patches.pop(0))


def step_losses(student: nn.ModuleDict, batch: Batch, targets: tuple[Tensor, Tensor | Rows],
                cfg: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """The DINOv2 loss of one process's batch, (), and its four terms, weighted, without gradient.

    With L local crops there are 2L + 2 pairs (student crop, teacher crop) of different crops of the same image; the
    DINO terms are the mean over these pairs. Since the loss of a pair is linear in the target, each student crop is
    compared once, with the sum of its targets. Rows of a batch are crop-major: (L+2)*B rows unflatten to (L+2, B).
    `targets` are the teacher's. All terms are means over images or groups of them, so the loss of a whole step is the
    mean over its parts, and over processes. What the terms are, is dino_loss() and ibot_loss() in losses.py.
    """
    n_images, n_local = len(batch.samples), len(batch.local_crops) // len(batch.samples)
    targets, patch_targets = targets  # (2, B, K), (M, K)

    # The student sees the global crops through masks, and the local crops, in one pass.
    orders = None if batch.global_orders is None else [batch.global_orders, batch.local_orders]
    with record_function("student"):
        out, out_local = student["backbone"]([batch.global_crops, batch.local_crops], [batch.masks, None],
                                             is_training=True, drop_orders=orders)
    cls, cls_local = out["x_norm_clstoken"], out_local["x_norm_clstoken"]  # (2B, D), (L*B, D)
    patches = out["x_norm_patchtokens"].flatten(0, 1)[masked_patches(batch, cfg)]  # (M, D)
    (cls_tokens, prototypes), (patch_tokens, patch_prototypes) = project(student, torch.cat([cls_local, cls]), patches)

    # Every local crop against both teacher crops; every global crop against the other one, never against itself.
    sums = torch.stack([targets.sum(0), targets[1], targets[0]]).flatten(0, 1)  # (3B, K)
    rows = torch.arange(len(cls_tokens), device=cls.device)
    which = (rows // n_images - n_local + 1).clamp(min=0) * n_images + rows % n_images  # ((L+2)*B,) rows of `sums`
    cls_targets = Rows((len(which), sums.shape[1]), sums.device, lambda rows: sums[which[rows]])
    cls_weight = torch.full_like(cls_tokens[:, 0], cfg.dino_loss_weight / ((2 * n_local + 2) * n_images))
    n_crops = 2 * n_images  # with or without a mask
    patch_weight = batch.mask_weight[: len(patches)] * (cfg.ibot_loss_weight / n_crops)  # (M,)
    losses = [(cls_tokens, cls_targets, cls_weight), (patch_tokens, patch_targets, patch_weight)]
    compare = partial(prototype_loss, part_loss=compiled(part_loss) if cfg.compile else part_loss)
    if "ibot_head" in student:
        (loss, (cls_rows,)), (patch_loss, (patch_rows,)) = map(compare, (prototypes, patch_prototypes), zip(losses))
        loss = loss + patch_loss
    else:
        loss, (cls_rows, patch_rows) = compare(prototypes, losses)

    n = n_local * n_images
    terms = dict(dino_local=cls_rows[:n].sum(), dino_global=cls_rows[n:].sum())
    if cfg.ibot_loss_weight > 0:
        terms["ibot"] = patch_rows.sum()
    if cfg.koleo_loss_weight > 0:
        koleo = sum(koleo_loss(crop, cfg.group_size) for crop in cls.chunk(2))  # an image's two crops may be close
        loss = loss + cfg.koleo_loss_weight * koleo
        terms["koleo"] = cfg.koleo_loss_weight * koleo.detach()
    return loss, terms


@functools.cache
def compiled(function):
    return torch.compile(function, dynamic=True)  # the number of masked patches differs from step to step


# ----------------------------------------------------------------------------------------------------------------------
# Optimization, on the shards each process holds


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student."""
    torch._foreach_lerp_(local_shards(teacher.parameters()), local_shards(student.parameters()), 1 - momentum)


@torch.no_grad()
def clip_gradients(modules: dict[str, nn.Module], max_norm: float, loss: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Scales the gradients of each module to a joint L2 norm of at most max_norm (0: no limit). Returns the norms
    before, over all shards, and whether all gradients and the `loss` of all processes are finite, (): both the same on
    all processes. Where several copies of the weights exist, all of them are added up and divided by their number:
    sums within each copy could differ in their rounding, and the copies with them."""
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


def apply_schedule(optimizer: torch.optim.Optimizer, now: dict[str, float]) -> None:
    for group in optimizer.param_groups:
        group["lr"] = now["last_layer_lr" if group["is_last_layer"] else "lr"] * group["lr_mult"]
        group["weight_decay"] = now["weight_decay"] * group["wd_mult"]


def train_step(student, teacher, optimizer, batches: list[Batch], cfg: Config, now: dict[str, float],
               centers: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """One optimizer step over the parts of this process's share, and the teacher's update after it. Returns the loss
    terms of the share with the gradient norms, and whether all was finite on all processes, ().

    If it was not, the step is skipped: student, optimizer and centers stay as they are. The decision stays on the
    device, which is not waited for. The parts of a step that record_function() names are those of traces and of
    `bench.py train`.
    """
    apply_schedule(optimizer, now)
    optimizer.zero_grad(set_to_none=True)
    terms, totals = {}, {}
    all_targets = teacher_targets(teacher, batches, cfg, now["teacher_temp"], centers, totals)
    for batch in batches:
        reduce_across_replicas(student, batch is batches[-1])
        with record_function("teacher"):
            targets = next(all_targets)
        with record_function("heads and losses"):
            loss, part = step_losses(student, batch, targets, cfg)
        del targets  # for the backward pass wants room
        with record_function("backward"):
            (loss / len(batches)).backward()
        terms = {k: terms.get(k, 0) + v / len(batches) for k, v in part.items()}
    with record_function("clip and optimizer"):
        norms, finite = clip_gradients(student, cfg.clip_grad, sum(terms.values()))
        optimizer.found_inf = 1.0 - finite.float()  # as torch.amp does it: a fused optimizer then changes nothing
        optimizer.step()
    for name, total in totals.items():
        before = centers[name].clone()
        update_center(centers[name], total)
        centers[name].copy_(torch.where(finite, centers[name], before))
    with record_function("teacher's average"):
        update_teacher(teacher, student, now["momentum"])
    return terms | {f"grad_norm/{k}": v for k, v in norms.items()}, finite


# ----------------------------------------------------------------------------------------------------------------------
# Processes and sharding


# ----------------------------------------------------------------------------------------------------------------------
# Output folder: who may write here, what is kept


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
        self.optimizer = torch.optim.AdamW(param_groups(self.student, cfg), lr=0.0, betas=cfg.betas, fused=True)
        self.centers = build_centers(cfg, device)

        for p in self.student.parameters():  # what AdamW would make at its first step; here it can be loaded into
            step = torch.zeros((), dtype=torch.float32, device=device)
            self.optimizer.state[p] = dict(step=step, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of the run themselves, no copies: saving reads them, loading fills them. Nothing else is saved,
        so that nothing but tensors need be read."""
        named = dict(self.student.named_parameters())
        moments = {key: {name: self.optimizer.state[p][key] for name, p in named.items()}
                   for key in ("step", "exp_avg", "exp_avg_sq")}
        return dict(student=named, teacher=dict(self.teacher.named_parameters()), centers=self.centers) | moments

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
                dcp.load(self.tensors(), checkpoint_id=str(folder / name))
            except (Exception, CheckpointException) as error:  # a foreign save can fail in any way
                raise ValueError(f"{folder / name} cannot be continued from ({why(error)}), although it is whole: "
                                 f"if settings have changed, go back to those in {folder.parent}/config.json") from None
            return complete, damaged
        if damaged:
            raise ValueError(f"no save in {folder} is whole; copy {folder.parent}/ckpt.pth, the teacher, if you want "
                             "to keep it, then start anew with --overwrite")
        return {}, []


# ----------------------------------------------------------------------------------------------------------------------
# Saving, while training goes on


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


# ----------------------------------------------------------------------------------------------------------------------


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
            why = short_reason(error)
    raise ValueError(f"no readable image in {source.name}; the last of those tried says: {why}")


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
    check_output(cfg, args.resume, args.overwrite, CHANGEABLE)
    check_shared_memory(cfg, int(os.environ.get("WORLD_SIZE", 1)))
    be_deterministic(cfg.deterministic)
    kernel = load_kernel(ARCHS[cfg.arch], compute_dtype(cfg, device), device) if cfg.kernels else None
    mesh = start_processes(device, cfg.sharding)
    evals = eval_specs(cfg.data, cfg.eval_train, cfg.eval_val) if cfg.eval_every else ()
    source, *eval_sources = open_everywhere([cfg.data, *evals], cfg.in_chans)
    check_readable(source)
    knn = Knn(cfg, device, eval_sources) if cfg.eval_every else None
    state = TrainState(cfg, mesh, device, kernel)
    lock = take_output(cfg)
    try:
        overwrite = args.overwrite and not any(together(restarted))  # else what is there, this command has written
        check_output(cfg, args.resume, overwrite, CHANGEABLE)  # once more: another run may have just ended
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
    saver = Saver(cfg, state, partial(teacher_checkpoint, state.teacher, cfg, run.preset), run.lock, run.start, run.damaged, log.say)
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
            metrics, finite = train_step(state.student, state.teacher, state.optimizer, batch, cfg, now, state.centers)

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
