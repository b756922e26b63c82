"""Suggestions for unknown names: nearest(). Apache License 2.0."""
import difflib
import re
from typing import Iterable

SYNONYMS = {  # what people type: what it may be called here; each command has at most one of the latter
    "lr learning-rate base-lr blr peak-lr max-lr": "--lr --learning-rates",
    "steps epochs epoch n-epochs num-epochs max-epochs iters iterations max-iters max-steps num-steps total-steps":
        "--steps --epochs --max-iter",
    "bs b batch batch-size-per-gpu per-gpu-batch-size global-batch-size train-batch-size": "--batch-size",
    "workers j nw n-workers data-workers dataloader-workers loader-workers": "--num-workers",
    "wd": "--weight-decay",
    "final-weight-decay final-wd wd-end": "--weight-decay-end",
    "amp fp16 bf16 half precision mixed-precision use-fp16 use-bf16 float16 bfloat16 autocast": "--dtype",
    "accum accumulate accumulation grad-accum accum-iter accum-steps update-freq accumulate-grad-batches":
        "--gradient-accumulation-steps",
    "recompute checkpointing gradient-checkpointing grad-checkpointing use-checkpoint": "--activation-checkpointing",
    "shard fsdp zero deepspeed ddp strategy": "--sharding",
    "arch model network backbone architecture model-name arch-name": "--arch --model checkpoint",
    "checkpoint ckpt pretrained weights pretrained-weights finetune load load-from model-path checkpoint-path":
        "--init --model checkpoint",
    "out output o save save-dir output-dir out-dir work-dir log-dir run-dir": "--out out",
    "data train data-path data-dir data-root dataset datasets dataset-path train-data train-dir train-path root "
    "image-folder training-data": "--data --train images",
    "val valid validation test val-data val-dir val-path": "--val --eval-val",
    "images image input inputs img i": "images --data --train",
    "size image-size img-size imgsz input-size crop-size resolution global-crop-size":
        "--global-crops-size --size --crop",
    "local-crops n-local-crops num-local-crops n-crops": "--local-crops-number",
    "ema momentum ema-decay ema-momentum": "--momentum-teacher",
    "temperature temp": "--temperature --teacher-temp",
    "clip-grad clip grad-clip clip-norm max-grad-norm": "--clip-grad --clip",
    "warmup warmup-epochs warmup-iters": "--warmup-steps --warmup",
    "out-dim prototypes n-prototypes": "--head-n-prototypes",
    "registers n-registers num-registers": "--num-register-tokens",
    "stochastic-depth": "--drop-path-rate",
    "s rng random-seed manual-seed": "--seed",
    "gpu cpu cuda mps no-cuda accelerator": "--device",
    "config cfg yaml config-file recipe": "--preset",
    "save-freq saveckp-freq save-interval checkpoint-every": "--save-every",
    "print-freq log-interval log-freq": "--log-every",
    "eval-freq eval-interval val-every": "--eval-every",
    "k neighbors n-neighbors nb-knn": "--ks --k",
    "fp16 float16 half bfloat16 16 amp mixed": "bf16",
    "float32 float single 32": "fp32",
    "fsdp full-shard": "zero3",
    "hybrid hybrid-shard": "hsdp",
    "none no dp": "ddp",
    "sk": "sinkhorn_knopp",
    "imagenet-1k in1k inet ilsvrc imagenet2012": "ImageNet",
    "imagenet-22k imagenet-21k in22k in21k": "ImageNet22k",
    "fmnist": "FashionMNIST",
    "plot plots loss losses metrics": "curves",
    "knn nn retrieval": "neighbors",
    "attn": "attention",
    "onnx torchscript jit": "program",
    "extract embed embeddings": "features"}

INSTEAD = {  # what people type: a name that only the commands concerned know, and what to do instead
    "epochs epoch n-epochs num-epochs max-epochs warmup-epochs": (
        "--steps", "one epoch is the number of images / --batch-size steps"),
    "gpus devices ngpu n-gpus num-gpus nproc nproc-per-node world-size": (
        "--num-workers", "torchrun --nproc-per-node N starts one process per GPU"),
    "nodes nnodes num-nodes dist-url dist-backend local-rank rank node-rank master-addr master-port distributed": (
        "--num-workers", "torchrun sets the processes up, see docs/scaling.md"),
    "wandb use-wandb tensorboard tb logger": (
        "--log-every", "a run writes metrics.jsonl, which python visualize.py curves OUT draws"),
    "resume-from auto-resume continue": ("--resume", "the same command continues a run"),
    "resume resume-from auto-resume continue": ("--no-resume", "the same command resumes by itself"),
    "imagenet imagenet-1k in1k cifar cifar10 cifar100 mnist": (
        "vits16_short", "a data set is given by --data, and --preset vits16_short suits one of photographs")}

NEVER_GUESSED = {"--overwrite", "--no-resume"}  # they discard work

VIT = re.compile(r"(?:[\w-]+/)?.*?(?:vit|dinov2)(?:[-_]with[-_]registers)?[-_]?"
                 r"(nano|micro|tiny|small|base|large|huge|giant|ti|[nsblhg])(?![a-z])2?"
                 r"(?:[-_/]?(?:patch|p)?(\d+))?(?!.*\.(?:pth?|bin|safetensors)$)([^/]*)")


def nearest(name: str, names: Iterable[str]) -> str:
    """A suggestion to append to an error message about an unknown `name`: ", did you mean X?", where X is the one of
    `names` that is a synonym, the same size of ViT, or spelled alike; or what to do instead; "" if nothing is close.
    `names` may be flags, values, or positional arguments that were given as a flag."""
    names, word = list(names), plain(name)
    remark = next((f" ({text})" for words, (known, text) in INSTEAD.items()
                   if word in map(plain, words.split()) and known in names), "")
    guesses = [known for known in names if known not in NEVER_GUESSED]
    close = by_synonym(word, guesses) or by_vit(name, guesses)
    if close is None:
        close = by_spelling(word, guesses)
    if close and name.startswith("-") and not close.startswith("-"):
        return f" ({close} is given without a flag)"
    patch = (VIT.fullmatch(name.lower()) or {2: None})[2] if close.startswith("vit_") else None
    return (f", did you mean {close}{f' with --patch-size {patch}' * bool(patch)}?" if close else "") + remark


def plain(name: str) -> str:
    return name.lower().strip("-_").replace("-", "").replace("_", "")


def by_synonym(word: str, names: list[str]) -> str | None:
    """The name that differs only in case, dashes and underscores; else a synonym; else None."""
    for known in names:
        if plain(known) == word:
            return known
    rows = (known.split() for words, known in SYNONYMS.items() if word in map(plain, words.split()))
    return next((known for row in rows for known in row if known in names), None)


def vit_of(name: str) -> tuple[str, str | None, bool] | None:
    """(first letter of the size, patch size, whether with registers) if this names a ViT."""
    found = VIT.fullmatch(name.lower())
    return found and (found[1][0], found[2], "reg" in name.lower())


def by_vit(name: str, names: list[str]) -> str | None:
    """The ViT of the same size, preferably with the same patch size and registers; "" if there is none of that size;
    None if `name` is not a ViT."""
    if not (wanted := vit_of(name)):
        return None
    same = [(known, vit) for known in names if (vit := vit_of(known)) and vit[0] == wanted[0]]
    return max(same, key=lambda pair: (pair[1][1] == wanted[1], pair[1][2] == wanted[2]), default=("",))[0]


def by_spelling(word: str, names: list[str]) -> str:
    """The name that begins with `word` (the shortest, if the others begin with that); else the closest; else ""."""
    spelled = {plain(known): known for known in names
               if not plain(known).startswith("no") or word.startswith("no")}  # never the opposite
    begun = sorted((known for known in spelled if known.startswith(word)), key=len) if len(word) > 2 else []
    if begun and all(known.startswith(begun[0]) for known in begun):
        return spelled[begun[0]]
    if close := difflib.get_close_matches(word, spelled, n=1, cutoff=0.65):
        return spelled[close[0]]
    others = {plain(other) for words in SYNONYMS for other in words.split()}  # another word, misspelled
    close = difflib.get_close_matches(word, others, n=1, cutoff=0.8)
    return close and by_synonym(close[0], names) or ""
