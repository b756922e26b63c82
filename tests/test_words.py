"""What the commands say: suggestions, last words, notes, and what happens when memory runs out."""
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import eval_dense
import eval_knn
import eval_linear
import eval_logreg
import export
import hub
import model
import support.sources
import train
import visualize
from support.suggest import nearest
from tests.common import HERE, write_images

COMMANDS = {
    "train": train.parse, "knn": eval_knn.parse, "linear": eval_linear.parse, "logreg": eval_logreg.parse,
    "dense": eval_dense.parse, "pca": lambda argv: visualize.parse(["pca", *argv]),
    "curves": lambda argv: visualize.parse(["curves", *argv]), "features": export.features, "program": export.program,
    "neighbors": lambda argv: visualize.parse(["neighbors", *argv])}

FLAGS = """
train: --learning-rate --lr, -lr --lr, --blr --lr, --epochs --steps, --epochs=100 --steps, --max_steps --steps, --bs --batch-size
train: -b --batch-size, --batch --batch-size, --batchsize --batch-size, --batch_size --batch-size, --bach-size --batch-size
train: --workers --num-workers, -j --num-workers, --num_worker --num-workers, --wd --weight-decay, --weigth-decay --weight-decay
train: --amp --dtype, --fp16 --dtype, --precision --dtype, --accum --gradient-accumulation-steps, --grad_accum --gradient-accumulation-steps
train: --recompute --activation-checkpointing, --gradient-checkpointing --activation-checkpointing, --shard --sharding, --fsdp --sharding
train: --model --arch, --output --out, --save-dir --out, --output_dir --out, -o --out, --checkpoint --init, --pretrained --init
train: --weights --init, --data-path --data, --data_dir --data, --dataset --data, --train --data, --root --data, --images --data
train: --image-size --global-crops-size, --img_size --global-crops-size, --crop-size --global-crops-size, --ema --momentum-teacher
train: --momentum --momentum-teacher, --config --preset, --config-file --preset, --save-freq --save-every, --gpu --device
train: --no-cuda --device, --sed --seed, --random-seed --seed, --clip --clip-grad, --warmup-epochs --warmup-steps, --compil --compile
train: --nocompile --no-compile, --patch --patch-size, --grad --gradient-accumulation-steps, --registers --num-register-tokens
knn: --data --train, --dataset --train, --val-dir --val, --k --ks, --temp --temperature, --batch_size -, --image-size --crop
knn: --output --out, --overwrite -, --workers --num-workers, --fp16 --dtype, --learning-rate -, --sharding -
linear: --lr --learning-rates, --steps --epochs, --bs --batch-size, --data --train, --no-resum -, --overwrite -
logreg: --max-iters --max-iter, --epochs --max-iter, --c --cs
dense: --learning-rate --lr, --train --data, --epochs --steps, --warmup-steps --warmup, --clip-grad --clip
pca: --checkpoint --model, --weights --model, --arch --model, --image-size --size, --output --out, --gpu --device, --foregroud --foreground
neighbors: --dataset --data, --knn -, --n-neighbors --k, --query --queries
curves: --output --out, --lr -
features: --checkpoint --model, --batch --batch-size, --workers --num-workers, --output-dir --out, --resolution --size
program: --checkpoint --model, --resolution --size
train: --overwrit -, --force -, --clobber -, --foo -, --xyzzy -, --delete -, --resum --resume
"""


@pytest.mark.parametrize("command,typed,meant", [
    (line.partition(":")[0], *pair.split()) for line in FLAGS.strip().splitlines()
    for pair in line.partition(":")[2].split(",")])
def test_suggested_flags(command, typed, meant):
    """Another word for a flag, or one spelled alike, suggests it; "-": nothing is close, so nothing is suggested. The
    unknown flag is named before a required one that is missing."""
    with pytest.raises(ValueError) as told:
        COMMANDS[command]([typed])
    assert f"unknown argument {typed!r}" in str(told.value) and "--overwrite" not in str(told.value).partition("'; ")[2]
    assert re.findall(r"did you mean (\S+)\?", str(told.value)) == [meant] * (meant != "-"), told.value


@pytest.mark.parametrize("command,typed,text", [
    ("train", "--epochs", "did you mean --steps? (one epoch is the number of images / --batch-size steps)"),
    ("train", "--gpus", "(torchrun --nproc-per-node N starts one process per GPU)"),
    ("linear", "--devices", "(torchrun --nproc-per-node N starts one process per GPU)"),
    ("train", "--dist-url", "(torchrun sets the processes up"), ("train", "--local_rank", "(torchrun sets"),
    ("train", "--wandb", "python visualize.py curves"), ("train", "--tensorboard", "metrics.jsonl"),
    ("linear", "--resume", "(the same command resumes by itself)"),
    ("train", "--auto-resume", "(the same command continues a run)"),
    ("knn", "--checkpoint", "(checkpoint is given without a flag)"), ("knn", "--model", "(checkpoint is given without"),
    ("pca", "--input", "(images is given without a flag)"), ("program", "--output", "(out is given without a flag)")])
def test_what_to_do_instead_of_a_flag(command, typed, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        COMMANDS[command]([typed])


def test_a_path_without_a_flag_is_data(tmp_path):
    with pytest.raises(ValueError, match=f"did you mean --data {tmp_path}"):
        train.parse([str(tmp_path)])


@pytest.mark.parametrize("names,typed,meant", [
    (model.ARCHS, "vit_s", "vit_small"), (model.ARCHS, "vits16", "vit_small with --patch-size 16"),
    (model.ARCHS, "ViT-S/14", "vit_small with --patch-size 14"), (model.ARCHS, "vit_b", "vit_base"),
    (model.ARCHS, "vit_b_16", "vit_base with --patch-size 16"), (model.ARCHS, "vitl14", "vit_large with --patch-size 14"),
    (model.ARCHS, "vit_g", "vit_giant2"), (model.ARCHS, "ViT-Ti", "vit_tiny"), (model.ARCHS, "vit_nan", "vit_nano"),
    (model.ARCHS, "dinov2_vits14", "vit_small with --patch-size 14"), (model.ARCHS, "vit_huge", ""),
    (model.ARCHS, "vit_small_patch16_224", "vit_small with --patch-size 16"), (model.ARCHS, "resnet50", ""),
    (train.PRESETS, "vits", "vits16_short"), (train.PRESETS, "vits16", "vits16_short"),
    (train.PRESETS, "vitl16", "vitl16_short"), (train.PRESETS, "vit_large", "vitl16_short"),
    (train.PRESETS, "ViT-L/14", "vitl14"), (train.PRESETS, "vitg16", "vitg14"), (train.PRESETS, "digit", "digits"),
    (train.PRESETS, "fashionmnist", "fashion"), (train.PRESETS, "default", ""),
    (support.sources.NAMED, "imagenet1k", "ImageNet"), (support.sources.NAMED, "imagenet", "ImageNet"),
    (support.sources.NAMED, "ImageNet-21k", "ImageNet22k"), (support.sources.NAMED, "cifar", "CIFAR10"),
    (support.sources.NAMED, "cifar-100", "CIFAR100"), (support.sources.NAMED, "fashion_mnist", "FashionMNIST"),
    (support.sources.NAMED, "inat", ""), (support.sources.NAMED, "/my/photos", ""), (support.sources.NAMED, "laion", ""),
    (hub.RELEASED, "dinov2_vits", "dinov2_vits14"), (hub.RELEASED, "vits14", "dinov2_vits14"),
    (hub.RELEASED, "dinov2_vitb14_reg4", "dinov2_vitb14_reg"), (hub.RELEASED, "facebook/dinov2-small", "dinov2_vits14"),
    (hub.RELEASED, "dinov2-with-registers-large", "dinov2_vitl14_reg"), (hub.RELEASED, "dinov2_vits16", "dinov2_vits14"),
    (hub.RELEASED, "vit_small_patch14_reg4_dinov2.lvd142m", "dinov2_vits14_reg"), (hub.RELEASED, "none.pth", ""),
    (hub.RELEASED, "out/ckpt.pth", ""), (hub.RELEASED, "runs/vitb.pth", ""), (hub.RELEASED, "vits16/ckpt.pth", ""),
    (hub.DENSE_HEADS, "nyu_dbt", "nyu_dpt"), (hub.DENSE_HEADS, "ade20k", "ade20k_ms"),
    (("auto", "bf16", "fp32"), "fp16", "bf16"), (("auto", "bf16", "fp32"), "float32", "fp32"),
    (("ddp", "zero2", "zero3", "hsdp"), "fsdp", "zero3"), (("ddp", "zero2", "zero3", "hsdp"), "none", "ddp"),
    (("centering", "sinkhorn_knopp"), "sinkhorn", "sinkhorn_knopp"), (visualize.COMMANDS, "attn", "attention"),
    (visualize.COMMANDS, "loss", "curves"), (visualize.COMMANDS, "seg", "segment"), (export.COMMANDS, "onnx", "program")])
def test_suggested_values(names, typed, meant):
    assert nearest(typed, names) == (f", did you mean {meant}?" if meant else "")


def test_a_data_set_as_preset():
    assert "--preset vits16_short suits" in nearest("imagenet", train.PRESETS)


# ----------------------------------------------------------------------------------------------------------------------
# ImageNet beside train.py


def checkout(folder: Path) -> Path:
    """A copy of the program."""
    ignored = shutil.ignore_patterns("__pycache__", "tests", "docs", "pictures", "out*", ".*")
    return Path(shutil.copytree(HERE, folder, ignore=ignored))


def small_run(folder: Path, *flags) -> subprocess.CompletedProcess:
    """`torchrun train.py --preset vitl16_short`, with all that is large made small by flags, started elsewhere."""
    small = ("--arch vit_nano --batch-size 4 --group-size 4 --steps 1 --warmup-steps 0 --num-workers 0 --global-crops-size 32 "
             "--local-crops-size 16 --head-n-prototypes 16 --head-hidden-dim 16 --head-bottleneck-dim 8").split()
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", folder / "train.py", "--preset", "vitl16_short", *small, *flags],
        capture_output=True, text=True, cwd=folder.parent, env=os.environ | dict(PYTHONPATH="", OMP_NUM_THREADS="1"))


@pytest.mark.slow
def test_imagenet_beside_train(tmp_path, cache):
    """The model card's command: --data may be left out where ImageNet, or a link to it, lies beside train.py."""
    program = checkout(tmp_path / "program")
    write_images(tmp_path / "elsewhere", [f"train/n0{i % 2}/{i}.JPEG" for i in range(8)])
    (program / "imagenet").symlink_to(tmp_path / "elsewhere")
    done = small_run(program, "--out", "out")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/config.json").read_text())["data"] == "ImageNet:split=TRAIN"
    assert f"on {tmp_path}/elsewhere/train: 8 images" in done.stdout


@pytest.mark.parametrize("preset", ["vitl16_short", "vitl14"])
def test_imagenet_beside_train_is_found(preset, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(support.sources, "__file__", str(tmp_path / "support/sources.py"))
    write_images(tmp_path, ["imagenet/train/n01/a.JPEG", "imagenet/val/n01/b.JPEG", "n01/c.png"])
    (tmp_path / "imagenet22k").mkdir()
    with tarfile.open(tmp_path / "imagenet22k/n01.tar", "w") as tar:
        tar.add(tmp_path / "n01/c.png", "n01_c.JPEG")
    train_spec, val_spec = support.sources.eval_specs(train.parse(["--preset", preset])[0].data)
    source = support.sources.open_source(train_spec)
    assert len(source) == 1 and source.image(0).shape == (3, 40, 32)
    assert val_spec is None or len(support.sources.open_source(val_spec)) == 1


@pytest.mark.parametrize("preset,beside", [("vitl16_short", "imagenet"), ("vits16_short", "imagenet"),
                                           ("vitl14", "imagenet22k")])
def test_no_imagenet_beside_train(preset, beside):
    cfg = train.parse(["--preset", preset])[0]
    with pytest.raises(ValueError, match=f"{beside}, where a folder or a link may be; .*images: --data /my/photos$"):
        support.sources.open_source(cfg.data)
