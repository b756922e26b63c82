"""Self-supervised training of DINOv2: the recipes, the method, the loop.

    python train.py                                                         # 1,437 scanned digits on a CPU, minutes
    python train.py --preset vits16_short --data /my/photos --batch-size 256           # one GPU, a folder of photos
    torchrun --nproc-per-node 8 train.py --preset vitb16_short --data ImageNet:split=TRAIN:root=/data/imagenet
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py \\
        --preset vitl16_short --data ImageNet:split=TRAIN:root=/data/imagenet       # the official ViT-L/16 recipe
    python train.py --preset vitl14 --help                # every setting, what it means, and its value in that preset

The method is step_losses() and train_step(); the recipe is Config and PRESETS. `--batch-size` is the global batch, so
the same command is the same experiment on 1, 8 or 32 GPUs; `--gradient-accumulation-steps` lets fewer GPUs hold it.
A run writes to --out: ckpt.pth (the teacher and its config: all that evaluations need), metrics.jsonl, resume/ (the
full state) and eval/training_N/teacher_checkpoint.pth. Type the same command again to continue, whatever ended the run
and on any number of GPUs. SIGTERM, SIGUSR1 and Ctrl-C save first.

DINOv2: Oquab et al. 2023, arXiv 2304.07193. Apache License 2.0.
"""
import argparse
import contextlib
import dataclasses
import functools
import itertools
import math
import os
import re
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

import hub
import losses
from data import (
    MEAN, STD, Batch, Prefetcher, TrainBatches, Unreadable, augment, augment_at_once, check_groups, keep_memory,
    prepare, train_loader)
from eval_knn import KNN_SAMPLE, evaluate_knn, knn_accuracy
from model import ARCHS, FORMAT, DINOHead, build, check_names_and_shapes, init_parameters
from support.cli import Parser, check_fields, flag, last_line, nearest
from support.draw import draw_batch
from support.evaluation import at_most
from support.log import Log, NonFinite, TooManyBad, summary
from support.machine import foreseen
from support.parallel import (
    CHECKPOINTING, SHARDINGS, Failed, Lost, SharedFlags, all_reduce_in_backward, be_deterministic, full_weights,
    is_sharded, leave_processes, load_kernel, load_whole, local_shards, materialize, mean_over_processes, n_replicas,
    noticing_losses, on_all_ranks, pick_device, shard, start_processes, worker_count)
from support.run import (
    OutputLock, StopSignals, check_output, claim_output, last_words, restarted, same_command, stop_for, take_output)
from support.saves import Saver, load_newest
from support.sources import InMemory, check_readable, eval_specs, open_on_all_ranks


# ----------------------------------------------------------------------------------------------------------------------
# Recipe. The defaults are the official defaults (ssl_default_config, which is vitl16_short); presets are differences.

Fraction, Fractions = Annotated[float, (0, 1)], Annotated[tuple, (0, 1)]  # a type and its smallest and largest value
PositiveFractions = Annotated[tuple, (1e-6, 1)]
Count = Annotated[int, (1, math.inf)]
NonNegativeInt = Annotated[int, (0, math.inf)]
NonNegative = Annotated[float, (0, math.inf)]
Temperature = Annotated[float, (1e-3, 10)]


@dataclass(frozen=True)
class Config:
    # data
    data: str = "ImageNet:split=TRAIN"  # a folder, list, tars, FILE.py:FUNCTION, A*0.7,B*0.3: support/sources.py
    in_chans: Count = 3  # image channels; if not 3, hue, saturation and grayscale augmentation are off
    mean: Fractions = MEAN  # per channel, in [0, 1]; measure your own with: python -m support.sources stats DATA
    std: PositiveFractions = STD  # standard deviation per channel
    max_bad_share: Fraction = 0.1  # stop if more than this share of the images cannot be read
    eval_train: str = ""  # labeled images for k-NN; empty: the TRAIN split of --data
    eval_val: str = ""  # labeled images to classify; empty: the VAL split of --data, or leave-one-out
    eval_resize: Count = 256  # evaluation: first resize the short side to this many pixels
    eval_crop: Count = 224  # evaluation: then crop the center square of this side in pixels
    batch_size: Count = 2048  # images per optimizer step over all GPUs
    group_size: Count = 64  # images that share a mask quota and a KoLeo search; officially the batch per GPU
    num_workers: Annotated[int, (-1, math.inf)] = -1  # data-loading workers per GPU; -1: one per CPU core; 0: none
    seed: Annotated[int, (0, 2**63 - 1)] = 0  # seed of weights, order, crops, colors, masks and stochastic depth
    # crops
    global_crops_size: Count = 224  # side in pixels of the 2 global crops, seen by teacher and student
    global_crops_scale: PositiveFractions = (0.32, 1.0)  # share of the image area; tiny images need 0.5 1 or so
    local_crops_number: Count = 8  # local crops per image, seen by the student only
    local_crops_size: Count = 96  # side in pixels of the local crops
    local_crops_scale: PositiveFractions = (0.05, 0.32)  # share of the image area
    flip_prob: Fraction = 0.5  # probability of a horizontal flip; 0 where left and right matter, as for digits
    jitter_prob: Fraction = 0.8  # probability of color jitter
    jitter: Fractions = (0.4, 0.4, 0.2, 0.1)  # largest change of brightness, contrast, saturation, hue
    gray_prob: Fraction = 0.2  # probability of grayscale
    blur_probs: Fractions = (0.0, 0.9, 0.5)  # blur of global crop 1, 2, local crops; inverts the paper's 1.0 0.1 0.5
    solarize_prob: Fraction = 0.2  # probability of solarizing global crop 2
    # backbone
    arch: Literal[tuple(ARCHS)] = "vit_large"  # see model.ARCHS
    patch_size: Count = 16  # side of a patch in pixels; must divide all crop sizes
    ffn_layer: Literal["mlp", "swiglu", "swiglufused", "identity"] = "mlp"  # swiglu and swiglufused are the same
    qkv_bias: bool = True  # bias in the query, key and value projection
    proj_bias: bool = True  # bias in the output projection of attention
    ffn_bias: bool = True  # bias in the feed-forward layers
    layerscale: NonNegative = 1e-5  # initial LayerScale, 0 for none; small networks learn faster with 1
    drop_path_rate: Annotated[float, (0, 0.99)] = 0.3  # stochastic depth of the student; 0 for ViT-S and smaller
    drop_path_uniform: bool = True  # the same rate in all blocks, or rising linearly from 0
    num_register_tokens: NonNegativeInt = 0  # 4 for cleaner attention maps (Darcet et al. 2023)
    interpolate_antialias: bool = False  # antialias when the position embedding is resized to the local crops
    interpolate_offset: float = 0.1  # added to the grid size when it is resized; 0.1 in the official recipes
    init_std: NonNegative = 0.02  # std of new Linear weights; narrow networks want about 1 / sqrt(width)
    pos_embed_std: NonNegative = 0.02  # std of new position embeddings; short runs need about 0.5
    init: str = ""  # file of a backbone of the same architecture, in any layout, to start student and teacher from
    # heads
    head_n_prototypes: Count = 65536  # K; for small data sets about 10 times the number of classes
    head_bottleneck_dim: Count = 256  # width before the prototypes
    head_nlayers: Count = 3  # layers of the projection MLP
    head_hidden_dim: Count = 2048  # hidden width of the projection MLP
    ibot_separate_head: bool = False  # give patches a head of their own, set by the next four fields
    ibot_head_n_prototypes: Count = 65536  # K of the iBOT head
    ibot_head_bottleneck_dim: Count = 256  # width before the prototypes of the iBOT head
    ibot_head_nlayers: Count = 3  # layers of the iBOT head
    ibot_head_hidden_dim: Count = 2048  # hidden width of the iBOT head
    # losses
    dino_loss_weight: NonNegative = 1.0  # CLS tokens of one crop against those of another
    ibot_loss_weight: NonNegative = 1.0  # masked patches against the teacher's view of them; 0 for none
    koleo_loss_weight: NonNegative = 0.1  # spreads the features within a group; no effect if --group-size is 1
    mask_sample_probability: Fraction = 0.5  # share of the global crops that are masked
    mask_ratio_min_max: Fractions = (0.1, 0.5)  # smallest and largest share of patches masked in a masked crop
    centering: Literal["centering", "sinkhorn_knopp"] = "centering"  # what keeps the targets from collapsing
    # teacher
    momentum_teacher: Fraction = 0.992  # EMA momentum of the teacher; use less for short runs
    final_momentum_teacher: Fraction = 1.0  # EMA momentum at the end, reached along a cosine
    warmup_teacher_temp: Temperature = 0.04  # temperature of the targets at the start; lower it if they stay uniform
    teacher_temp: Temperature = 0.07  # temperature of the targets after the warmup
    warmup_teacher_temp_steps: NonNegativeInt = 37500  # steps of the temperature warmup
    # optimizer
    steps: Count = 125_000  # optimizer steps of the whole run; all schedules count steps
    warmup_steps: NonNegativeInt = 12_500  # linear warmup of the learning rate, which then falls along a cosine
    lr: NonNegative = 4e-3  # peak learning rate for a batch of 1024; scaled by sqrt(batch_size / 1024)
    min_lr: NonNegative = 1e-6  # final learning rate, not scaled by the batch size
    weight_decay: NonNegative = 0.04  # weight decay at the start, which rises along a cosine
    weight_decay_end: NonNegative = 0.4  # weight decay at the end
    layerwise_decay: NonNegative = 0.9  # factor between the learning rates of a block and the one above
    patch_embed_lr_mult: NonNegative = 0.2  # additional learning-rate factor for the patch embedding
    clip_grad: NonNegative = 3.0  # largest gradient norm of the backbone and of each head; 0 for no limit
    freeze_last_layer_steps: NonNegativeInt = 1250  # steps during which the prototypes are frozen
    betas: Annotated[tuple, (0, 0.999999)] = (0.9, 0.999)  # AdamW's beta1 and beta2
    # machine
    device: str = "auto"  # auto, cpu or cuda
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # of the backbone's compute; auto: bf16 on a GPU
    compile: bool = False  # torch.compile each block; a minute to start, faster steps
    kernels: bool = False  # attention by kernels/attention.cu: bf16 on an NVIDIA GPU; nvcc compiles it once
    gradient_accumulation_steps: Count = 1  # forward and backward passes per optimizer step; same result, less memory
    activation_checkpointing: Literal[CHECKPOINTING] = "none"  # selective: recompute all but matmuls; full: all
    sharding: Literal[SHARDINGS] = "zero2"  # DDP, ZeRO-2, ZeRO-3, or HSDP (ZeRO-2 within each machine); docs/scaling.md
    deterministic: bool = False  # the same bits from run to run; slower on a GPU
    # output
    out: str = "out"  # folder for everything this run writes
    log_every: Count = 10  # steps between lines of metrics.jsonl
    eval_every: NonNegativeInt = 0  # steps between k-NN evaluations, also at step 0 and at the end; 0 for none
    export_every: NonNegativeInt = 12_500  # steps between eval/training_N/teacher_checkpoint.pth; 0 for none
    save_every: Count = 3750  # steps between saves of ckpt.pth and resume/, also at the end
    save_minutes: NonNegative = 30.0  # also save when the last save is this old; 0: by steps alone
    save_patience: NonNegative = 60.0  # minutes to retry failing saves (full disk, ...) before the run stops
    keep: Count = 3  # saves kept in resume/
    max_nonfinite: Count = 10  # stop after so many skipped steps (non-finite loss or gradient) in a row


SMALL = dict(  # for small networks on tiny images on a laptop; judge them by k-NN, not by the loss
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
    # ViT-S/16 and ViT-B/16 by the ViT-L/16 recipe; no official counterpart, accuracy not yet measured
    "vits16_short": dict(arch="vit_small", drop_path_rate=0.0, batch_size=1024),
    "vitb16_short": dict(arch="vit_base", drop_path_rate=0.1, batch_size=1024),
    # official: 32 A100, one day, ImageNet-1k: k-NN 81.6, linear 82.9
    "vitl16_short": dict(),
    # official: 96 A100, 3.3 days, ImageNet-22k: k-NN 82.0, linear 84.5. Note SwiGLU: the released ViT-L has an MLP
    "vitl14": dict(
        data="ImageNet22k", batch_size=32 * 96, group_size=32, local_crops_size=98, patch_size=14,
        ffn_layer="swiglufused", drop_path_rate=0.4, head_n_prototypes=131072, head_bottleneck_dim=384,
        ibot_separate_head=True, ibot_head_n_prototypes=131072, centering="sinkhorn_knopp", momentum_teacher=0.994,
        steps=625_000, warmup_steps=100_000, lr=2e-4, weight_decay_end=0.2, layerwise_decay=1.0),
}
# official: 12 images per GPU, number of GPUs not stated; 256 of them make the paper's batch of 3k
PRESETS["vitg14"] = PRESETS["vitl14"] | dict(arch="vit_giant2", batch_size=12 * 256, group_size=12)

CHANGEABLE = {  # a run continues with other values of these; any other change needs --resume
    "out", "steps", "num_workers", "gradient_accumulation_steps", "device", "compile", "kernels",
    "activation_checkpointing", "sharding", "deterministic", "log_every", "eval_every", "export_every", "save_every",
    "save_minutes", "save_patience", "keep", "max_nonfinite", "max_bad_share"}


def parse(argv: list[str] | None) -> tuple[Config, argparse.Namespace]:
    """Command line -> (config, arguments with preset, resume, overwrite). Raises ValueError with the nearest name."""
    parser = Parser(__doc__, usage="train.py [--preset NAME] [--resume | --overwrite] [--any-field-below VALUE ...]")
    parser.add_argument("--preset", default="digits", help=f"one of {', '.join(PRESETS)} (default digits)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out although the config changed")
    parser.add_argument("--overwrite", action="store_true", help="delete the run in --out and start over")
    given = sys.argv[1:] if argv is None else argv  # the other defaults, also those --help shows, depend on the preset
    preset = parser.parse_known_args([a for a in given if a not in ("-h", "--help")])[0].preset
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}{nearest(preset, PRESETS)}; presets: {', '.join(PRESETS)}")
    defaults = Config(**PRESETS[preset])
    parser.add_fields(defaults, any_length=("mean", "std"))
    if stray := [word for word in parser.parse_known_args(argv)[1] if word in PRESETS]:
        raise ValueError(f"unknown argument {stray[0]!r}, did you mean --preset {stray[0]}?")
    args = parser.parse_args(argv)
    values = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    for field, ours in (("mean", MEAN), ("std", STD)):  # for other images, ImageNet's in gray, for every channel
        if values["in_chans"] != 3 and values[field] == ours:
            values[field] = (round(sum(ours) / 3, 3),) * values["in_chans"]
    return Config(**values), args


def check(cfg: Config, n_ranks: int) -> None:
    """Raises ValueError, naming flag and fix, for values that cannot work, alone or together."""
    check_fields(cfg)
    for field in ("data", "out"):
        if not getattr(cfg, field):
            raise ValueError(f"--{field} must not be empty")
    for field in ("mean", "std"):
        if len(getattr(cfg, field)) != cfg.in_chans:
            raise ValueError(f"--{field} has {len(getattr(cfg, field))} values, --in-chans is {cfg.in_chans}; give one "
                             "per channel (measure them with: python -m support.sources stats "
                             f"{cfg.data} --in-chans {cfg.in_chans})")
    for field in ("global_crops_size", "local_crops_size", "eval_crop"):
        size, p = getattr(cfg, field), cfg.patch_size
        if size < p or size % p:
            fits = " or ".join(str(n * p) for n in (size // p, size // p + 1) if n > 0)
            raise ValueError(f"{flag(field)} {size} is not a multiple of --patch-size {p}; use {fits}")
    check_groups(cfg.batch_size, cfg.group_size, n_ranks, cfg.gradient_accumulation_steps)
    if cfg.warmup_steps > cfg.steps:
        raise ValueError(f"--warmup-steps {cfg.warmup_steps} is more than --steps {cfg.steps}; lower it too")
    for field in ("global_crops_scale", "local_crops_scale", "mask_ratio_min_max"):
        if getattr(cfg, field)[0] > getattr(cfg, field)[1]:
            raise ValueError(f"{flag(field)} takes the smaller value first, got {getattr(cfg, field)}")
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
            sharded = is_sharded(p)  # a fused optimizer does not take a mixture
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
    network.apply(initialization(cfg))
    return network


def initialization(cfg: Config):
    """The function that initializes the parameters a module holds itself, not those of its children."""
    return partial(init_parameters, std=cfg.init_std, pos_std=cfg.pos_embed_std)


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

    `batches` are the micro-batches of one process, one per gradient accumulation step. Sinkhorn-Knopp balances the rows
    of all of them, over all processes. Centering treats each row by itself; the totals for update_center() come, too.
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
    are means over images or groups of images, so the loss of a step is the mean over its micro-batches and over
    processes. `targets` are those of teacher_targets().
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
    dino_loss, ibot_loss = (compile_loss(f) if cfg.compile else f for f in (losses.dino_loss, losses.ibot_loss))

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
        # separately for the two crops, since those of the same image may be close
        koleo = sum(losses.koleo_loss(crop, cfg.group_size) for crop in cls.chunk(2))
        loss = loss + cfg.koleo_loss_weight * koleo
        terms["koleo"] = cfg.koleo_loss_weight * koleo.detach()
    return loss, terms


@functools.cache
def compile_loss(loss):
    return torch.compile(loss, fullgraph=True, dynamic=True)  # the number of masked patches varies from step to step


# ----------------------------------------------------------------------------------------------------------------------
# Optimization: everything here works on the shards that each process holds


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


def train_step(student: nn.ModuleDict, teacher: nn.ModuleDict, optimizers: list[torch.optim.Optimizer],
               batches: list[Batch], cfg: Config, now: dict[str, float],
               centers: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """One optimizer step on this process's share of the global batch, then the EMA update of the teacher. `batches` are
    its micro-batches, one per gradient accumulation step. Returns the loss terms and gradient norms, and whether all of
    it was finite on all processes, ().

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
# The state of a run


class TrainState:
    """Networks, optimizers and centers. All else about a run at some step follows from the config and the step."""

    def __init__(self, cfg: Config, mesh, device: torch.device, kernel=None):
        with torch.device("meta"):  # no process ever holds more than its shards and one module's parameters
            self.student, self.teacher = build_network(cfg, cfg.drop_path_rate), build_network(cfg)
        self.teacher.requires_grad_(False).eval()
        if kernel is not None:
            for block in self.student["backbone"].block_list() + self.teacher["backbone"].block_list():
                block.attn.kernel = kernel
        dtype, self.n_shards = compute_dtype(cfg, device), mesh.shape[-1]
        shard(self.student, mesh, dtype, cfg.activation_checkpointing, cfg.compile, mode=cfg.sharding)
        shard(self.teacher, mesh, dtype, compile_blocks=cfg.compile, with_backward=False)
        torch.manual_seed(cfg.seed)
        materialize(self.student, device, initialization(cfg))
        if cfg.init:
            pretrained = hub.load(cfg.init).state_dict()
            check_names_and_shapes(self.student["backbone"], pretrained, cfg.init)
            load_whole(dict(self.student["backbone"].named_parameters()), pretrained)
        self.teacher.to_empty(device=device)
        with torch.no_grad():
            torch._foreach_copy_(*(local_shards(n.parameters()) for n in (self.teacher, self.student)))
        self.optimizers = build_optimizers(self.student, cfg)
        self.centers = build_centers(cfg, device)


def compute_dtype(cfg: Config, device: torch.device) -> torch.dtype:
    """Of the backbones' weights and activations in a step; master weights are float32."""
    bf16 = cfg.dtype == "bf16" or cfg.dtype == "auto" and device.type != "cpu"
    return torch.bfloat16 if bf16 else torch.float32


def teacher_checkpoint(teacher: nn.ModuleDict, cfg: Config, preset: str, step: int) -> dict:
    """The content of ckpt.pth: the teacher's weights under the official names, and all that is needed to use them. Call
    it on all ranks; rank 0 gets the weights, on the CPU."""
    weights = full_weights(teacher, cpu_offload=True)
    arguments, on_cpu = backbone_arguments(cfg), next(teacher.parameters()).device.type == "cpu"
    return dict(format=FORMAT, preset=preset, config=dataclasses.asdict(cfg), step=step,
                teacher={k: v.clone() if on_cpu else v for k, v in weights.items()},  # not the weights being trained
                model=ARCHS[arguments.pop("arch")] | arguments, torch=str(torch.__version__))


class Knn:
    """k-NN accuracy of the teacher during the run, and of raw pixels. Each process extracts a share of the features."""

    def __init__(self, cfg: Config, device: torch.device, sources: list):
        self.cfg, self.device = cfg, device
        for source in sources:
            if source is not None and source.labels is None:
                raise ValueError(f"--eval-every needs labels: {source.unlabeled()}, or set --eval-every 0")
        self.sources = [at_most(source, n) for source, n in zip(sources, KNN_SAMPLE)]

    def teacher(self, teacher: nn.ModuleDict) -> dict[str, float]:
        cfg = self.cfg
        with torch.device("meta"):
            backbone = build(**backbone_arguments(cfg))
        backbone.load_state_dict(full_weights(teacher["backbone"]), assign=True)
        return evaluate_knn(backbone.eval(), *self.sources, cfg.eval_resize, cfg.eval_crop, self.device,
                            local_workers(cfg), mean=cfg.mean, std=cfg.std)

    def raw_pixels(self) -> dict[str, float] | None:
        """The same vote on the pixels themselves; None for sources that are not in memory."""
        if not all(isinstance(source, InMemory) for source in self.sources):
            return None
        tables = [F.normalize(s.pixels.flatten(1).float(), dim=-1).to(self.device) for s in self.sources]
        return knn_accuracy(tables[0], self.sources[0].labels, tables[1], self.sources[1].labels)


# ----------------------------------------------------------------------------------------------------------------------
# A run


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
    counters: dict[str, int]  # unreadable images and skipped steps so far
    damaged: list[str]  # saves that could not be used


def training_batches(cfg: Config, source, rank: int, n_ranks: int) -> TrainBatches:
    n_drops = 2 * ARCHS[cfg.arch]["depth"] if cfg.drop_path_rate else 0  # two residual branches per block
    return TrainBatches(
        source, batch_size=cfg.batch_size, group_size=cfg.group_size, seed=cfg.seed, rank=rank, world=n_ranks,
        accumulation_steps=cfg.gradient_accumulation_steps, n_drops=n_drops,
        global_size=cfg.global_crops_size, global_scale=cfg.global_crops_scale, n_local=cfg.local_crops_number,
        local_size=cfg.local_crops_size, local_scale=cfg.local_crops_scale, patch_size=cfg.patch_size,
        mask_prob=cfg.mask_sample_probability, mask_ratio=cfg.mask_ratio_min_max,
        ops=dict(flip_prob=cfg.flip_prob, jitter_prob=cfg.jitter_prob, jitter=cfg.jitter, gray_prob=cfg.gray_prob,
                 blur_probs=cfg.blur_probs, solarize_prob=cfg.solarize_prob))


def prepared_batches(run: Run, batches: TrainBatches) -> Prefetcher:
    """The batches of the steps still to be done, on the device, augmented."""
    cfg, on_gpu = run.cfg, run.device.type == "cuda"
    color = torch.compile(augment_at_once, dynamic=False) if cfg.compile and on_gpu else augment  # a graph per size
    loader = train_loader(batches, run.start, cfg.steps, local_workers(cfg), pin_memory=on_gpu)
    move = partial(prepare, device=run.device, mean=cfg.mean, std=cfg.std, augment=color)
    return Prefetcher(loader, move, run.device)


def local_workers(cfg: Config) -> int:
    return worker_count(cfg.num_workers, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def check_shared_memory(cfg: Config, n_ranks: int) -> None:
    """Raises ValueError if the batches that wait in the workers do not fit into shared memory, which containers often
    limit to 64 MB: the workers would die of a bus error."""
    pixels = 2 * cfg.global_crops_size**2 + cfg.local_crops_number * cfg.local_crops_size**2
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    images = cfg.batch_size // (n_ranks * cfg.gradient_accumulation_steps)
    need = (2 * local_workers(cfg) + 1) * here * images * pixels * cfg.in_chans  # 2 batches per worker wait
    if cfg.num_workers and os.path.isdir("/dev/shm") and need > (free := shutil.disk_usage("/dev/shm").free):
        raise ValueError(f"/dev/shm has {free / 2**20:.0f} MB free, prefetched batches need {need / 2**20:.0f} MB; "
                         "start the container with --ipc=host or a larger --shm-size, or lower --num-workers")


def set_up(argv: list[str] | None) -> Run:
    """Finds everything that can be wrong with a command before anything is written. Raises ValueError."""
    cfg, args = parse(argv)
    n_ranks = int(os.environ.get("WORLD_SIZE", 1))
    check(cfg, n_ranks)
    device = pick_device(cfg.device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {cfg.device}: training runs on cpu and cuda, evaluation also on mps")
    # With activation checkpointing memory is tight, so large freed blocks go back to the system.
    keep_memory(largest=4 if cfg.activation_checkpointing != "none" else None)
    check_output(cfg, args.resume, args.overwrite, CHANGEABLE)
    check_shared_memory(cfg, n_ranks)
    be_deterministic(cfg.deterministic)
    kernel = load_kernel(ARCHS[cfg.arch], compute_dtype(cfg, device), device) if cfg.kernels else None
    mesh = start_processes(device, cfg.sharding)
    evals = eval_specs(cfg.data, cfg.eval_train, cfg.eval_val) if cfg.eval_every else ()
    source, *eval_sources = open_on_all_ranks([cfg.data, *evals], cfg.in_chans)
    check_readable(source)
    knn = Knn(cfg, device, eval_sources) if cfg.eval_every else None
    if dist.get_rank() == 0 and (shortage := foreseen(cfg, ARCHS[cfg.arch], device, mesh.shape[-1])):
        print(f"note: {shortage}", file=sys.stderr, flush=True)
    state = TrainState(cfg, mesh, device, kernel)
    lock = take_output(cfg)
    try:
        overwrite = args.overwrite and not any(on_all_ranks(restarted))  # after a restart, the run there is this one
        check_output(cfg, args.resume, overwrite, CHANGEABLE)  # again: another run may have just ended
        newest, damaged = ({}, []) if overwrite else load_newest(state, Path(cfg.out) / "resume")
        start = newest.get("step", 0)
        if start > cfg.steps:
            raise ValueError(f"--steps {cfg.steps} is less than the {start} steps that {cfg.out} has done")
        on_all_ranks(lambda: claim_output(cfg, overwrite) if lock else None)
    except BaseException as error:
        if lock:
            lock.release()
        if type(error) is Failed:  # not Lost
            raise ValueError(f"--out {cfg.out} cannot be written ({error}); choose another folder") from None
        raise
    return Run(cfg, args.preset, device, source, knn, state, lock, start, newest.get("counters", {}), damaged)


def train(run: Run) -> None:
    """The loop: from run.start to the last step, or to the step at which a signal requests a stop; saves in both cases.
    Raises Failed, TooManyBad, and ValueError for features that are not finite, on all ranks; Unreadable on one."""
    cfg, state, knn, out = run.cfg, run.state, run.knn, Path(run.cfg.out)
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    log = Log(out / "metrics.jsonl", run.start, cfg.steps, run.counters, lock=run.lock)
    log.say(first_line(run, n_ranks))
    batches, schedule = training_batches(cfg, run.source, rank, n_ranks), schedules(cfg)
    loader = prepared_batches(run, batches)
    make_checkpoint = partial(teacher_checkpoint, state.teacher, cfg, run.preset)
    saver = Saver(cfg, state, make_checkpoint, run.lock, run.start, run.damaged, log.say)
    guard, flags, prepared = NonFinite(cfg, log, batches, saver), SharedFlags(), iter(loader)
    done, stop, too_bad = run.start, False, False
    with run.lock or contextlib.nullcontext(), StopSignals(run.lock) as signals, saver:
        if knn and evaluated_at(cfg, done) and on_all_ranks(lambda: not log.knn(done))[0]:
            log.evaluation(knn, state.teacher, done)  # at the start; or one that a killed run never reached
        log.start_clock(done, loader.waited)
        for step in range(run.start, cfg.steps):
            micro_batches = list(itertools.islice(prepared, cfg.gradient_accumulation_steps))
            if step == 0 and rank == 0:
                inspect_first_batch(micro_batches[0], cfg, log)
            log.new_bad += itertools.chain.from_iterable(batch.bad for batch in micro_batches)
            now = {name: float(values[step]) for name, values in schedule.items()}
            metrics, finite = train_step(
                state.student, state.teacher, state.optimizers, micro_batches, cfg, now, state.centers)

            done = step + 1
            log.bar.update()
            guard.watch(step, finite, metrics)
            stop, due, end = flags.share(bool(signals.name), saver.due(), bool(saver.hopeless()))
            if end:
                raise Failed(saver.reason)
            export = cfg.export_every and done % cfg.export_every == 0
            save = done == cfg.steps or done % cfg.save_every == 0 or export or stop or due
            line, evaluate = done == cfg.steps or done % cfg.log_every == 0, knn and evaluated_at(cfg, done)
            if line or save:
                guard.settle()
                n_samples = (done - run.start) * cfg.batch_size
                bad_share = log.count_bad(n_samples)
                too_bad = bad_share > cfg.max_bad_share and n_samples >= 100 and done < cfg.steps
            if line:
                log.step(step, now, mean_over_processes(metrics, n_ranks), cfg.batch_size, loader.waited)
            if save or too_bad:
                saver.start(done, log.counters, [out / f"eval/training_{step}/teacher_checkpoint.pth"] * bool(export))
            if stop or too_bad:
                break
            if evaluate:
                log.evaluation(knn, state.teacher, done)
            if line or save or evaluate:
                log.start_clock(done, loader.waited)
        saver.finish(done, log.counters)
    log.bar.close()
    flags.wait()
    if too_bad:
        raise TooManyBad(f"{bad_share:.0%} of the images cannot be read; {log.bad_path} lists them, with the reasons. "
                         "The run is saved: repair or remove them and run the same command again, or allow more with "
                         "--max-bad-share")
    if rank == 0:
        print(closing_message(run, log, done, signals.name), flush=True)
    leave_processes(wait_for_others=True)


def first_line(run: Run, n_ranks: int) -> str:
    cfg, n_passes = run.cfg, run.cfg.gradient_accumulation_steps
    per_gpu = f"{n_ranks} x {run.device.type}, {cfg.batch_size // n_ranks} each"
    return (f"preset {run.preset} on {run.source.name}: {len(run.source):,} images, {cfg.arch}, step {run.start} of "
            f"{cfg.steps}, global batch {cfg.batch_size} ({per_gpu}"
            f"{f' in {n_passes} micro-batches' if n_passes > 1 else ''}), "
            f"lr {cfg.lr * math.sqrt(cfg.batch_size / 1024):.2e}"
            + (f"\ncontinued from {cfg.out}/resume/step_{run.start:09d}" if run.start else ""))


def closing_message(run: Run, log: Log, done: int, signal_name: str) -> str:
    if done < run.cfg.steps:
        return (f"{signal_name or 'a signal'} after step {done} of {run.cfg.steps}: everything is saved. To continue:\n"
                f"    {same_command()}")
    lines = [summary(log, done)] * bool(run.knn)
    if run.cfg.deterministic:
        lines.append(f"weights {hub.weights_hash(hub.load(f'{run.cfg.out}/ckpt.pth'))}")  # as `python hub.py info` says
    return "\n".join([*lines, last_words(run.cfg.out, run.source.labels is not None)])


def evaluated_at(cfg: Config, done: int) -> bool:
    return done in (0, cfg.steps) or done % cfg.eval_every == 0


def inspect_first_batch(batch: Batch, cfg: Config, log: Log) -> None:
    """Draws first_batch.png, and warns of images that are far from normalized."""
    with contextlib.suppress(OSError):
        draw_batch(batch, cfg.mean, cfg.std).save(log.path.with_name("first_batch.png"))
    if not 0.3 < (std := batch.global_crops.std().item()) < 3:
        log.say(f"note: the normalized images have a standard deviation of {std:.2g}, which should be about 1; measure "
                f"--mean and --std with: python -m support.sources stats {cfg.data} --in-chans {cfg.in_chans}")


def main(argv: list[str] | None = None) -> None:
    try:
        with noticing_losses():
            run = set_up(argv)
    except ValueError as error:
        leave_processes(wait_for_others=False)
        sys.exit(print(f"error: {last_line(error)}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(print("\nstopped before the first step", file=sys.stderr) or 130)
    except (RuntimeError, MemoryError, OSError) as error:
        stop_for(error, parse(argv)[0])
    try:
        with noticing_losses():
            train(run)
    except Lost as error:
        stop_for(error, run.cfg)
    except (ValueError, TooManyBad, Failed) as error:
        if isinstance(error, Unreadable) or dist.get_rank() == 0:  # an unreadable image concerns this rank alone
            print(f"error: {last_line(error)}", file=sys.stderr)
        sys.exit(1 if isinstance(error, Failed) else 2)
    except (RuntimeError, MemoryError, OSError) as error:
        stop_for(error, run.cfg)


if __name__ == "__main__":
    main()
