import importlib.util
import os
import re
import subprocess
import sys
import urllib.error
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import export
import hub
import model
import support.images
from tests.common import (HERE, HUB_VIT, RELEASED, Payload, assert_close, exit_code, golden, hub_vit, randn, randomize,
                          write_images)


def renamed(weights: dict, *pairs) -> dict:
    for pattern, name in pairs:
        weights = {re.sub(pattern, name, k): v for k, v in weights.items()}
    return weights


def as_transformers(weights: dict, new_names: bool = False) -> dict:
    """The names in its files, or those that its models have since 5.0."""
    weights, split = dict(weights), {}
    parts = "qkv" if new_names else ("query", "key", "value")
    for key in [k for k in weights if ".qkv." in k]:
        for part, tensor in zip(parts, weights.pop(key).chunk(3)):
            name = f"attention.{part}_proj" if new_names else f"attention.attention.{part}"
            split[key.replace("attn.qkv", name)] = tensor
    for key in [k for k in weights if ".w12." in k and new_names]:
        for part, tensor in zip(("gate_proj", "up_proj"), weights.pop(key).chunk(2)):
            split[key.replace("w12", part)] = tensor
    return renamed(
        weights | split, (r"^blocks", "encoder.layer"), (r"^norm\.", "layernorm."), (r"w12", "weights_in"),
        (r"w3", "down_proj" if new_names else "weights_out"), (r"ls(.)\.gamma", r"layer_scale\1.lambda1"),
        (r"attn\.proj", "attention.o_proj" if new_names else "attention.output.dense"),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
        (r"^pos_embed", "embeddings.position_embeddings"),
        (r"^(cls_token|mask_token|register_tokens)", r"embeddings.\1"))


def as_timm(weights: dict) -> dict:
    weights = renamed(weights, (r"w12", "fc1"), (r"w3", "fc2"), (r"register_tokens", "reg_token"))
    del weights["mask_token"]
    if "reg_token" in weights:
        weights["cls_token"] = weights["cls_token"] + weights["pos_embed"][:, :1]
        weights["pos_embed"] = weights["pos_embed"][:, 1:]
    return weights


def prefixed(prefix: str, weights: dict, *more: str) -> dict:
    return {prefix + k: v for k, v in weights.items()} | {k: torch.ones(2) for k in more}


HUB_LAYOUTS = {
    "released": lambda w: w,
    "train": lambda w: dict(teacher=prefixed("backbone.", w, "dino_head.mlp.0.weight", "ibot_head.mlp.0.weight")),
    "chunks": lambda w: dict(teacher=renamed(prefixed("backbone.", w), (r"\.blocks\.([01])", r".blocks.0.\1"),
                                             (r"\.blocks\.2", ".blocks.1.2"))),
    "fsdp": lambda w: prefixed(
        "teacher.backbone._fsdp_wrapped_module.", renamed(w, (r"^blocks\.(\d)", (
            r"blocks.0._fsdp_wrapped_module._orig_mod.\1._fsdp_wrapped_module"))),
        "student.backbone.norm.bias", "teacher.dino_head.mlp.0.weight", "dino_loss.center"),
    "ddp, compiled": lambda w: prefixed("module._orig_mod.", w),
    "classifier": lambda w: prefixed("backbone.", w, "linear_head.bias"),
    "transformers": as_transformers,
    "transformers 5": partial(as_transformers, new_names=True),
    "transformers classifier": lambda w: prefixed("dinov2.", as_transformers(w), "classifier.weight"),
    "transformers registers": lambda w: prefixed("dinov2_with_registers.", as_transformers(w), "classifier.bias"),
    "timm": as_timm,
    "timm classifier": lambda w: as_timm(w) | {"head.weight": torch.ones(2)},
    "double": lambda w: {k: v.double() for k, v in w.items()},
}


@pytest.mark.parametrize("registers,ffn", [(0, "mlp"), (4, "mlp"), (4, "swiglu")])
@pytest.mark.parametrize("layout", HUB_LAYOUTS)
def test_hub_layouts(layout, registers, ffn, tmp_path):
    """The same weights in every layout give the same model, with the position rule of whose layout it is."""
    vit, images = hub_vit(registers, ffn), randn(1, (2, 3, 42, 70))[0]
    if not registers and (foreign := [k for k in hub.POSITIONS if k in layout]):
        official = vit(images)
        vit.interpolate_offset, vit.interpolate_antialias = hub.POSITIONS[foreign[0]].values()
        assert (vit(images) - official).abs().max() > 1e-3
    torch.save(HUB_LAYOUTS[layout](vit.state_dict()), tmp_path / "pytorch_model.bin")
    loaded = hub.load(tmp_path)
    assert not loaded.training and {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert_close(loaded(images), vit(images), 1e-5 if "timm" in layout and registers else 0, layout)
    assert loaded.state_dict().keys() == vit.state_dict().keys()
    for key, value in loaded.state_dict().items():
        if "timm" not in layout:
            assert torch.equal(value, vit.state_dict()[key]), key
    assert "timm" not in layout or not loaded.mask_token.any()


def test_hub_checkpoints_of_train(trained):
    for path in (trained / "ckpt.pth", trained / "eval/training_2/teacher_checkpoint.pth"):
        file, ckpt = hub.read(path)
        assert file == str(path) and ckpt["config"]["data"] == "digits"
        ours, theirs, images = hub.load(file, ckpt), model.load_backbone(file), randn(1, (2, 3, 16, 16))[0]
        assert ours.num_heads == theirs.num_heads == 2  # of width 32, which only the checkpoint knows
        assert torch.equal(ours(images), theirs(images))


HUB_SIZES = (1, 3, 518, 518), (2, 3, 224, 224), (1, 3, 252, 182), (1, 3, 28, 28)
TRANSFORMERS = dict(hidden_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14)


@pytest.mark.parametrize("kind,swiglu", [
    ("Dinov2", False), ("Dinov2WithRegisters", True), pytest.param("Dinov2", True, marks=pytest.mark.slow),
    pytest.param("Dinov2WithRegisters", False, marks=pytest.mark.slow)])
def test_hub_equals_transformers(kind, swiglu, tmp_path):
    """At 518 pixels, the size of the weights, at 224 and at a size that is not square. Its folder, and its model's own
    names."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**TRANSFORMERS | dict(image_size=518), use_swiglu_ffn=swiglu)
    theirs = randomize(getattr(transformers, f"{kind}Model")(config))
    theirs.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "own_names.pth")
    for spec in (tmp_path, tmp_path / "own_names.pth"):
        ours = hub.load(spec)
        for images in randn(1, *HUB_SIZES):
            out, expected = ours.forward_features(images), theirs(images).last_hidden_state.detach()
            assert expected.std() > 0.5
            assert_close(out["x_norm_clstoken"], expected[:, 0], 1e-5, "CLS")
            assert_close(out["x_norm_patchtokens"], expected[:, 1 + ours.num_register_tokens :], 1e-5, "patches")
            assert_close(out["x_norm_regtokens"], expected[:, 1 : 1 + ours.num_register_tokens], 1e-5, "registers")


@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters"])
def test_hub_equals_transformers_classifier(kind, tmp_path):
    """Its classifier is ours of one layer; the registers are no patches."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**TRANSFORMERS, num_labels=5)
    theirs = randomize(getattr(transformers, f"{kind}ForImageClassification")(config))
    theirs.save_pretrained(tmp_path)
    torch.save(theirs.classifier.state_dict(), tmp_path / "head.pth")
    images = randn(1, (2, 3, 56, 56))[0]
    assert_close(hub.load_classifier(tmp_path, tmp_path / "head.pth")(images), theirs(images).logits.detach(), 1e-5)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("kind", [pytest.param("registered", marks=pytest.mark.slow), "mlp", "swiglu"])
def test_hub_equals_timm(kind, registers, tmp_path):
    timm = pytest.importorskip("timm")
    if kind == "registered":
        name = f"vit_small_patch14_{'reg4_' * bool(registers)}dinov2"
        theirs = timm.create_model(name, pretrained=False, dynamic_img_size=True)
    else:  # the gate and the value of SwiGLU lie in a matrix of 688 rows, as in ours
        gated = dict(mlp_ratio=5.375, mlp_layer=timm.layers.SwiGLUPacked, act_layer=torch.nn.SiLU)
        theirs = timm.models.VisionTransformer(
            img_size=518, patch_size=14, embed_dim=128, depth=3, num_heads=2, init_values=1.0, num_classes=0,
            reg_tokens=registers, no_embed_class=registers > 0, dynamic_img_size=True,
            **gated if kind == "swiglu" else {})
    torch.save(randomize(theirs).state_dict(), tmp_path / "timm.pth")
    ours = hub.load(tmp_path / "timm.pth")
    assert ours.num_register_tokens == registers and ("w12" in str(ours)) == (kind == "swiglu")
    for images in randn(1, *HUB_SIZES):
        expected = theirs.forward_features(images).detach()
        assert expected.std() > 0.5
        assert_close(ours(images), expected[:, 0], 1e-5, "CLS")
        patches = ours.forward_features(images)["x_norm_patchtokens"]
        assert_close(patches, expected[:, 1 + registers :], 1e-5, "patches")


@pytest.mark.parametrize("name", ["dinov2_vitb14_reg", "dinov2_vitg14", "dinov2_vitg14_reg"])
def test_hub_released_shapes(name):
    """timm's and transformers' networks of the released sizes have the weights that we take them to have."""
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    size, reg = {"b": "base", "g": "giant"}[name[10]], name.endswith("_reg")
    sizes = dict(base=(768, 12), giant=(1536, 40))[size]
    config = dict(zip(("hidden_size", "num_hidden_layers"), sizes), num_attention_heads=sizes[0] // 64, image_size=518)
    kind = f"Dinov2{'WithRegisters' * reg}"
    with torch.device("meta"):
        of_timm = timm.create_model(f"vit_{size}_patch14_{'reg4_' * reg}dinov2", pretrained=False)
        of_transformers = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(
            **config, patch_size=14, use_swiglu_ffn=size == "giant"))
    for theirs in (of_timm, of_transformers):
        weights = hub.to_official(name, theirs.state_dict())
        assert {k: list(v.shape) for k, v in weights.items()} == golden.json("shapes")[name]


def test_hub_safetensors(tmp_path, monkeypatch):
    vit, path = hub_vit(4), tmp_path / "model.safetensors"
    path.write_bytes((99).to_bytes(8, "little") + b'{"cls_token": {"dty')
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="pip install safetensors"):
        patch.setitem(sys.modules, "safetensors", None)
        patch.setitem(sys.modules, "safetensors.torch", None)
        hub.load(path)
    safetensors = pytest.importorskip("safetensors.torch")
    with pytest.raises(ValueError, match="model.safetensors is truncated or not a safetensors file"):
        hub.load(path)
    safetensors.save_file(as_transformers(vit.state_dict()), path)
    for spec in (path, tmp_path):
        assert hub.read(spec)[0] == str(path)
        assert all(torch.equal(v, vit.state_dict()[k]) for k, v in hub.load(spec).state_dict().items())


@pytest.mark.parametrize("layout", ["released", "transformers", "transformers 5", "timm"])
def test_hub_is_strict(layout):
    """Any weight missing, of another shape or too much is an error, never a guess. (A file without registers is one of
    a network without.)"""
    vit = model.DinoVisionTransformer(**HUB_VIT | dict(depth=2), num_register_tokens=4, ffn_layer="swiglu")
    weights = HUB_LAYOUTS[layout](vit.state_dict())
    for key in [k for k in weights if ".0." not in k]:
        wrong = [weights | {key: torch.zeros(shape)} for shape in ((), (3,), (2, 2, 2))]
        wrong.append({k + "_" * (k == key): v for k, v in weights.items()})
        if not key.endswith(("mask_token", "register_tokens")):
            wrong.append({k: v for k, v in weights.items() if k != key})
        for i, ckpt in enumerate(wrong):
            with pytest.raises(ValueError):
                hub.load("x.pth", ckpt)
                pytest.fail(f"{key}, case {i}, went unnoticed")


def test_hub_names_what_does_not_fit(tmp_path):
    weights = hub_vit().state_dict()
    hf = as_transformers(weights)
    del weights["norm.bias"], hf["encoder.layer.1.attention.attention.key.weight"]
    whole = hub_vit().state_dict()
    for ckpt, text in (
        (weights, r"x.pth is from another architecture: of the weights, 1 is missing \(such as norm.bias\)$"),
        (hf, r"1 is missing \(such as blocks.1.attn.qkv.weight\), 2 are unexpected \(such as blocks.1.attn.q.weight\)"),
        (whole | {"neck.0.weight": torch.ones(2)}, r"1 is unexpected \(such as neck.0.weight\)"),
        (whole | {"blocks.2.mlp.fc1.weight": torch.ones(9, 128)}, r"another shape or type \(such as blocks.2.mlp.fc1"),
        (whole | {"pos_embed": torch.ones(1, 12, 128)}, "a position table of 11 entries, not a square: .* img_size="),
        (whole | {"pos_embed": torch.ones(1, 10, 100)}, r"1 has another shape or type \(such as pos_embed\)"),
        (whole | {"pos_embed": torch.ones(17, 128)}, "pos_embed missing or of another shape"),
        (whole | {"module.norm.bias": torch.ones(128)}, "holds norm.bias twice, the second time as module.norm.bias"),
        (whole | {"blocks.0.attn.q.bias": torch.ones(128)}, r"unexpected \(such as blocks.0.attn.q.bias"),
        (as_transformers(whole) | {"blocks.0.attn.qkv.bias": torch.ones(384)}, r"unexpected \(such as blocks.0.attn.k"),
        (dict(fc=torch.ones(2)), r"holds no DINOv2 backbone \(it starts with: fc\)"),
        (whole | {"norm.weight": torch.ones(2, 64)}, "no DINOv2 backbone: norm.weight missing or of another shape"),
        (dict(model=dict(fc=torch.ones(2))), "holds no DINOv2 backbone"),
        (dict(teacher=torch.ones(2)), "holds no DINOv2 backbone"),
        ({1: torch.ones(2)}, "holds no DINOv2 backbone"),
        ({}, "holds no DINOv2 backbone"),
    ):
        with pytest.raises(ValueError, match=text):
            hub.load("x.pth", ckpt)


def test_hub_heads_of_transformers_are_in_its_config(tmp_path):
    wide = hub_vit().state_dict()
    torch.save(as_transformers(wide), tmp_path / "pytorch_model.bin")
    for text, n in (('{"num_attention_heads": 4, "hidden_size": 128}', 4), ('{"hidden_size": 128}', 2), ("[", 2),
                    ('{"num_attention_heads": 4, "hidden_size": 64}', 2)):
        (tmp_path / "config.json").write_text(text)
        assert hub.load(tmp_path).num_heads == n, text
    assert hub.load(tmp_path, num_heads=8).num_heads == 8


def test_hub_refuses_code_and_what_is_no_checkpoint(tmp_path):
    Path("/tmp/dinov2_test_was_executed").unlink(missing_ok=True)
    torch.save(dict(teacher=Payload()), tmp_path / "pytorch_model.bin")
    (tmp_path / "empty").mkdir()
    for spec, text in ((tmp_path, "pytorch_model.bin holds pickled code, posix.system, .*: refused, nothing .* run$"),
                       (tmp_path / "empty", "empty is a folder; name .* in it, such as .*empty/ckpt.pth"),
                       (tmp_path / "none.pth", r"no such checkpoint: .*none.pth; give a file, .*\[_reg\]$"),
                       ("dinov2_vitx14_reg", "no such checkpoint: .* did you mean dinov2_vit.14_reg?"),
                       ("\0", "no such checkpoint")):
        with pytest.raises(ValueError, match=text):
            hub.load(spec)
    assert not Path("/tmp/dinov2_test_was_executed").exists()


def test_hub_released_names(tmp_path, monkeypatch):
    """Where each of the eight comes from and goes to; a file that is there is not downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    asked = []

    def offline(url, *args, **kwargs):
        asked.append(url)
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    for name in hub.RELEASED:
        file = f"{name.replace('_reg', '_reg4')}_pretrain.pth"
        with pytest.raises(ValueError, match=f"no route to host.* put it at {tmp_path}/hub/checkpoints/{file}$"):
            hub.load(name)
        assert asked.pop() == f"https://dl.fbaipublicfiles.com/dinov2/{name.removesuffix('_reg')}/{file}"
    assert len(hub.RELEASED) == len(RELEASED) == 8 and list((tmp_path / "hub/checkpoints").iterdir()) == []
    torch.save(hub_vit(4).state_dict(), tmp_path / "hub/checkpoints/dinov2_vits14_reg4_pretrain.pth")
    assert hub.load("dinov2_vits14_reg").num_register_tokens == 4 and asked == []


def test_hub_download(tmp_path, monkeypatch):
    """By torch.hub's own function, from a folder instead of the network. What is cut short is not kept."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hub, "URL", (tmp_path / "there").as_uri())
    file = tmp_path / "there/dinov2_vitb14/dinov2_vitb14_pretrain.pth"
    file.parent.mkdir(parents=True)
    torch.save(hub_vit().state_dict(), file)
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"<html>Please log in</html>"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="could not download .* is (truncated|an HTML page)"):
            hub.load("dinov2_vitb14")
        assert list((tmp_path / "home/hub/checkpoints").iterdir()) == []
    file.write_bytes(whole)
    path, ckpt = hub.read("dinov2_vitb14")
    assert [str(p) for p in (tmp_path / "home/hub/checkpoints").iterdir()] == [path]
    assert ckpt.keys() == hub_vit().state_dict().keys()


@pytest.mark.parametrize("layers", [1, 4])
def test_hub_classifier(layers, tmp_path):
    vit = randomize(model.DinoVisionTransformer(**HUB_VIT | dict(depth=5), num_register_tokens=4))
    head = dict(zip(("weight", "bias"), randn(2, (7, (1 + layers) * 128), (7,))))
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    torch.save(head, tmp_path / "head.pth")
    images = randn(1, (2, 3, 56, 56))[0]
    tokens, normed = vit.prepare_tokens_with_masks(images), []
    for block in vit.blocks:
        tokens = block(tokens)
        normed.append(vit.norm(tokens))  # (B, 1+4+16, D)
    features = [t[:, 0] for t in normed[-layers:]] + [normed[-1][:, 5:].sum(1) / 16]
    expected = torch.cat(features, 1) @ head["weight"].T + head["bias"]
    classifier = hub.load_classifier(tmp_path / "vit.pth", tmp_path / "head.pth")
    assert classifier.layers == layers and not classifier.training
    assert expected.std() > 1
    assert_close(classifier(images), expected, 1e-4)
    assert {k.split(".")[0] for k in classifier.state_dict()} == {"backbone", "linear_head"}
    assert all(torch.equal(v, head[k]) for k, v in classifier.linear_head.state_dict().items())


def test_hub_classifier_errors(tmp_path):
    torch.save(hub_vit().state_dict(), tmp_path / "vit.pth")
    for head, text in (
        (dict(weight=torch.zeros(5, 768), bias=torch.zeros(5)), "takes 768 features; this one, 128 wide"),
        (dict(weight=torch.zeros(5, 256)), "holds no linear head"),
        (dict(weight=torch.zeros(5, 256), bias=torch.zeros(4)), "holds no linear head"),
        (dict(weight=torch.zeros(5), bias=torch.zeros(5)), "holds no linear head"),
        (dict(weight=torch.zeros(5, 256), bias=torch.zeros(5), scale=torch.ones(1)), "holds no linear head"),
        (hub_vit().state_dict(), "holds no linear head.*it starts with: cls_token, pos_embed"),
        (dict(weight=Payload()), "holds pickled code"),
    ):
        torch.save(head, tmp_path / "head.pth")
        with pytest.raises(ValueError, match=text):
            hub.load_classifier(tmp_path / "vit.pth", tmp_path / "head.pth")
    with pytest.raises(ValueError, match="1 or 4 layers, not 2"):
        hub.LinearClassifier(hub_vit(), torch.nn.Linear(3, 3), 2)


def test_hub_entry_points(tmp_path, monkeypatch):
    """All 25 official names and 9 of ours; networks have the released keys and shapes, kwargs and layers are used."""
    points = hub.entry_points()
    assert len(points) == 34 and all(points[n].__name__ == n and points[n].__doc__ for n in points)
    for name in hub.RELEASED:
        with torch.device("meta"):
            vit, linear = points[name](pretrained=False), points[f"{name}_lc"](pretrained=False, layers=1)
        assert {k: list(v.shape) for k, v in vit.state_dict().items()} == golden.json("shapes")[name]
        assert linear.linear_head.weight.shape == (1000, 2 * vit.embed_dim) and vit.training and linear.training
        rule = (vit.interpolate_offset, vit.interpolate_antialias)
        assert rule == ((0.0, True) if name.endswith("_reg") else (0.1, False))
    assert points["dinov2_vits14"](pretrained=False, drop_path_rate=0.5).blocks[-1].sample_drop_ratio == 0.5
    with pytest.raises(NotImplementedError, match="dinotxt_tet1280d20h24l is not available here"):
        points["dinov2_vitl14_reg4_dinotxt_tet1280d20h24l"](pretrained=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(hub, "URL", "file:///nowhere")
    for kwargs, file in ((dict(), "dinov2_vits14_reg4_pretrain"), (dict(weights="LVD142M"), "dinov2_vits14_reg4_pre")):
        with pytest.raises(ValueError, match=f"file:///nowhere/dinov2_vits14/{file}.* put it at {tmp_path}"):
            points["dinov2_vits14_reg"](**kwargs)
    for kwargs, text in ((dict(weights="XRay"), "is neither 'LVD142M' .released. nor an existing file"),
                         (dict(weights=os.devnull), "is empty")):
        with pytest.raises(ValueError, match=text):
            points["dinov2_vits14"](**kwargs)


def test_hub_entry_points_load(tmp_path, monkeypatch):
    """With small networks in the place of ViT-S: backbone and both heads from the cache or from named files."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(model.ARCHS, "vit_small", dict(embed_dim=64, depth=4, num_heads=1))
    cache, points = tmp_path / "hub/checkpoints", hub.entry_points()
    cache.mkdir(parents=True)
    vit = randomize(points["dinov2_vits14"](pretrained=False))
    torch.save(vit.state_dict(), cache / "dinov2_vits14_pretrain.pth")
    for layers, name in ((1, "linear"), (4, "linear4")):
        head = dict(zip(("weight", "bias"), randn(layers, (1000, (1 + layers) * 64), (1000,))))
        torch.save(head, cache / f"dinov2_vits14_{name}_head.pth")
    images = randn(1, (2, 3, 28, 42))[0]
    ours = points["dinov2_vits14"]()
    assert ours.training and torch.equal(ours(images), vit(images)) and next(ours.parameters()).requires_grad
    for layers, name in ((1, "linear"), (4, "linear4")):
        file = cache / f"dinov2_vits14_{name}_head.pth"
        expected = hub.load_classifier("dinov2_vits14", file)(images)
        assert torch.equal(points["dinov2_vits14_lc"](layers=layers)(images), expected)
        assert torch.equal(points["dinov2_vits14_lc"](layers=layers, weights=str(file))(images), expected)
    with pytest.raises(ValueError, match="a head for 4 layers; call this with layers=4"):
        points["dinov2_vits14_lc"](layers=1, weights=str(file))
    with pytest.raises(ValueError, match="1 or 4 layers, not 2"):
        points["dinov2_vits14_lc"](layers=2)
    with pytest.raises(ValueError, match="from another architecture"):
        points["dinov2_vits14"](img_size=224)


@pytest.mark.parametrize("order,kind", [("before", "package"), pytest.param("before", "file", marks=pytest.mark.slow),
                                        pytest.param("after", "package", marks=pytest.mark.slow),
                                        pytest.param("after", "file", marks=pytest.mark.slow)])
def test_hub_by_torch_hub_beside_modules_of_the_same_names(order, kind, tmp_path):
    """From a foreign folder whose modules have our names, and are imported before or after. Nothing else changes."""
    names = ("model", "data", "losses", "train", "hub", "heads", "mask2former", "export", "hubconf")
    files = [f"{name}.py" for name in names] + (
        ["support/__init__.py", "support/cli.py"] if kind == "package" else ["support.py"])
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("mine = __name__")
    modules = [file[:-3].replace("/__init__", "").replace("/", ".") for file in files]
    mine = f"import sys\nfor name in {modules}:\n    assert __import__(name) and sys.modules[name].mine == name\n"
    load = (f"import torch, copy, pickle\nbefore, path = set(sys.modules), list(sys.path)\n"
            f"vit, linear = (torch.hub.load({str(HERE)!r}, n, source='local', "
            "pretrained=False) for n in ('dinov2_vits14', 'dinov2_vits14_reg_lc'))\n"
            "assert vit(torch.zeros(1, 3, 28, 28)).shape == (1, 384) and type(linear.backbone) is type(vit)\n"
            "pickle.loads(pickle.dumps(copy.deepcopy(vit)))\n"
            "ours = lambda n: getattr(sys.modules[n], '__file__', None) or ''\n"
            f"added = {{n for n in set(sys.modules) - before if {str(HERE)!r} in ours(n)}}"
            "\nassert added and all(n.startswith('_dinov2_') for n in added) and sys.path == path\n"
            "assert 'torchvision' not in sys.modules and 'PIL' not in sys.modules\n")
    code = mine + load + mine if order == "before" else "import sys\n" + load + mine
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("to", ["official", "safetensors", "timm", "hf"])
@pytest.mark.parametrize("registers,ffn", [(0, "mlp"), (4, "swiglu")])
def test_hub_convert_there_and_back(to, registers, ffn, tmp_path, capsys):
    """The features at the size of the weights stay the same, and all weights that the layout has."""
    if to in ("safetensors", "hf"):
        pytest.importorskip("safetensors")
    vit, images = hub_vit(registers, ffn), randn(1, (2, 3, 56, 56))[0]
    out = tmp_path / {"official": "b.pth", "safetensors": "b.safetensors", "timm": "b.pth", "hf": "b"}[to]
    torch.save(dict(teacher=prefixed("backbone.", vit.state_dict())), tmp_path / "a.pth")
    export.main(["convert", str(tmp_path / "a.pth"), str(out), "--to", to])
    told = capsys.readouterr()
    assert f"layout {to}" in told.out and ("at other sizes" in told.err) == (not registers and to in ("timm", "hf"))
    assert hub.layout_of(hub.read(out)[1]) == dict(timm="timm", hf="transformers").get(to, "official")
    again = hub.load(out)
    assert_close(again(images), vit(images), 1e-5 if to == "timm" and registers else 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["a.pth", out.name])
    export.main(["convert", str(out), str(tmp_path / "c.pth"), "--to", "official"])
    assert_close(hub.load(tmp_path / "c.pth")(images), vit(images), 1e-5 if to == "timm" and registers else 0)


def test_hub_convert_is_read_by_transformers(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    vit, images = randomize(hub.load(trained / "ckpt.pth")), randn(1, (2, 3, 12, 12))[0]
    ckpt = torch.load(trained / "ckpt.pth", weights_only=True)
    torch.save(ckpt | dict(teacher=prefixed("backbone.", vit.state_dict())), tmp_path / "a.pth")
    export.main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "hf"), "--to", "hf"])
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    assert_close(theirs(images).last_hidden_state[:, 0].detach(), vit(images), 1e-5)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    assert processor.crop_size["height"] == 12 and processor.size["shortest_edge"] == 12
    assert_close(hub.load(tmp_path / "hf")(images), vit(images), 0)  # 2 heads, 32 wide
    with pytest.raises(ValueError, match="2 heads for a width of .*; use --to hf"):
        export.main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "b.pth"), "--to", "official"])


@pytest.mark.slow
@pytest.mark.parametrize("registers", [0, 4])
def test_hub_convert_is_read_by_registered_timm(registers, tmp_path):
    timm = pytest.importorskip("timm")
    big = timm.create_model(f"vit_small_patch14_{'reg4_' * bool(registers)}dinov2", pretrained=False)
    torch.save(hub.backbone(f"dinov2_vits14{'_reg' * bool(registers)}", pretrained=False).state_dict(),
               tmp_path / "s.pth")
    export.main(["convert", str(tmp_path / "s.pth"), str(tmp_path / "t.pth"), "--to", "timm"])
    big.load_state_dict(torch.load(tmp_path / "t.pth", weights_only=True))
    x = randn(1, (1, 3, 518, 518))[0]
    assert_close(big.eval()(x).detach(), hub.load(tmp_path / "s.pth")(x).detach(), 1e-5)


def test_hub_info(trained, tmp_path, capsys):
    torch.save(hub_vit(4, "swiglu").state_dict(), tmp_path / "a.pth")
    torch.save(dict(weight=torch.ones(7, 1920), bias=torch.ones(7)), tmp_path / "head.pth")
    with torch.device("meta"):
        shapes = hub.backbone("dinov2_vits14", pretrained=False).state_dict()
    chunked = {re.sub(r"blocks\.(\d+)", r"blocks.0.\1", f"backbone.{k}"): torch.zeros(v.shape).half()
               for k, v in shapes.items()}
    torch.save(dict(teacher=chunked), tmp_path / "s.pth")
    for path, texts in (
        (trained / "ckpt.pth", ("layout       train.py", "digits, ", "2 heads, MLP", "ignored")),
        (tmp_path / "a.pth", ("official", "128 wide, 3 blocks, 2 heads, SwiGLU, 4 registers", "with antialiasing")),
        (tmp_path / "head.pth", ("7 classes, 1,920 features: 4 CLS of a backbone 384 wide",)),
        (tmp_path / "s.pth", ("official, blocks in chunks", "22,056,576 in float16", "shapes of    dinov2_vits14")),
    ):
        hub.main(["info", str(path)])
        told = capsys.readouterr().out
        assert all(text in told for text in texts), told


def test_hub_features(tmp_path, cache, capsys):
    """Of images and folders, in one file or one each: equal to the model's, whatever the batch."""
    vit, photos, paths = hub_vit(4), tmp_path / "photos", {}
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    write_images(photos, ["b.png", "sub/a.png", "sub/c.png"], size=(60, 90))
    write_images(tmp_path, ["own.png"], size=(90, 60))
    (photos / "bad.png").write_bytes(b"no image")
    for k in ("b.png", "sub/a.png", "sub/c.png"):
        paths[k] = photos / k
    model_flags = ["--model", str(tmp_path / "vit.pth"), "--batch-size", "2", "--num-workers", "0"]
    export.main(["features", str(photos), str(tmp_path / "own.png"), *model_flags, "--out", str(tmp_path / "f.npz")])
    assert "4 images" in (told := capsys.readouterr()).out and "bad.png cannot be read" in told.err
    stacked = np.load(tmp_path / "f.npz")
    assert [Path(f).name for f in stacked["files"]] == ["b.png", "a.png", "c.png", "own.png"]
    assert stacked["cls"].shape == (4, 128) and stacked["patches"].shape == (4, 4, 4, 128)
    export.main(["features", str(photos), str(tmp_path / "own.png"), *model_flags, "--out", str(tmp_path / "each"),
              "--size", "0", "--fit", "pad"])
    for i, (path, name) in enumerate(((tmp_path / "own.png", "own.png"), (photos / "sub/c.png", "photos/sub/c.png"))):
        one = np.load(tmp_path / f"each/{name}.npz")
        image = support.images.read_image(str(path))
        row = {k: stacked[k][3 - i] for k in one}
        for plan, given in ((("pad",), one), (("crop", (56, 56)), row)):
            fit = support.images.plan_fit(*image.shape[1:], 14, *plan)
            image_at_size = support.images.fit_image(image, fit, data.MEAN)
            out = vit.forward_features(data.normalize(data.to_float(image_at_size[None])))
            for key, whole in (("cls", "clstoken"), ("registers", "regtokens"), ("patches", "patchtokens")):
                expected = out[f"x_norm_{whole}"][0].detach()
                assert_close(torch.from_numpy(given[key]).view(expected.shape), expected, 1e-5, key)
    for argv, text in (
        ([str(photos), str(tmp_path / "own.png"), "--size", "0"],
         "own.png has 6x4 patches, .* give --size HEIGHT WIDTH"),
        ([str(photos / "bad.png")], "bad.png cannot be read as an image"),
        ([str(tmp_path / "none.png")], "no such image or folder: .*none.png"),
        ([str(tmp_path / "own.png"), "--size", "10", "--fit", "crop"], "10x10 pixels is less than one patch"),
        ([str(tmp_path / "own.png"), "--size", "50", "56"], "size 50 is not a multiple"),
        ([str(tmp_path / "own.png"), "--size", "1", "2", "3"], "--size takes height and width"),
        ([str(tmp_path / "own.png"), "--fit", "stretch"], "invalid choice: 'stretch'"),
    ):
        with pytest.raises(ValueError, match=text):
            export.main(["features", *argv, *model_flags, "--out", str(tmp_path / "g.npz")])
    assert not list(tmp_path.glob("*g.npz*")) and sorted(p.name for p in (tmp_path / "each").rglob("*.npz")) == [
        "a.png.npz", "b.png.npz", "c.png.npz", "own.png.npz"]


@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=pytest.mark.slow)])
def test_hub_export(suffix, tmp_path, capsys):
    """A program for images of one size, not square, and batches of any; its outputs are the model's."""
    vit, out = hub_vit(4), tmp_path / f"vit{suffix}"
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    argv = ["program", str(out), "--model", str(tmp_path / "vit.pth"), "--size", "42", "70"]
    if suffix == ".onnx":
        if importlib.util.find_spec("onnxscript") is None:
            with pytest.raises(ValueError, match="pip install onnx onnxscript onnxruntime"):
                export.main(argv)
        onnxruntime = pytest.importorskip("onnxruntime")
    export.main(argv)
    assert "for batches of 1, 2 and 3 images 42x70" in capsys.readouterr().out
    images = randn(1, (5, 3, 42, 70))[0]
    if suffix == ".pt2":
        given = torch.export.load(out).module()(images)
    else:
        session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
        names = [o.name for o in session.get_outputs()]
        given = dict(zip(names, map(torch.from_numpy, session.run(names, {"images": images.numpy()}))))
    expected = vit.forward_features(images)
    for key, whole in (("cls", "clstoken"), ("registers", "regtokens"), ("patches", "patchtokens")):
        assert_close(given[key].detach(), expected[f"x_norm_{whole}"].detach(), 1e-5, key)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["vit.pth", out.name])


def test_hub_refuses_features_that_are_not_finite(tmp_path):
    weights = hub_vit().state_dict()
    torch.save(weights | {"norm.weight": torch.full((128,), torch.nan)}, tmp_path / "nan.pth")
    write_images(tmp_path, ["a.png"])
    flags = ["--model", str(tmp_path / "nan.pth")]
    for argv in (["features", str(tmp_path / "a.png"), "--out", str(tmp_path / "f.npz")],
                 ["program", str(tmp_path / "f.pt2"), "--size", "28"]):
        with pytest.raises(ValueError, match="nan.pth are not finite"):
            export.main([*argv, *flags])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "nan.pth"]


def test_hub_command_errors(tmp_path, capsys):
    torch.save(hub_vit().state_dict(), tmp_path / "vit.pth")
    vit = str(tmp_path / "vit.pth")
    for argv, text in (
        (["info", vit], "unknown command 'info'.*; commands: convert, features, program"),
        (["convert", vit, vit, "--to", "official"], "is one of the input files; choose another name"),
        (["convert", vit, str(tmp_path / "b.txt"), "--to", "timm"], "must end in .pth or .safetensors"),
        (["convert", vit, str(tmp_path / "b.pth"), "--to", "safetensors"], "must end in .safetensors"),
        (["convert", vit, str(tmp_path), "--to", "hf"], "exists; name a new folder"),
        (["convert", vit, "/proc/b.pth", "--to", "official"], "/proc/b.pth could not be written"),
        (["program", "b.pt", "--model", vit], "must be a file that ends in .onnx or .pt2"),
        (["convert", vit, f"{vit}/b.pth", "--to", "official"], "vit.pth/b.pth could not be written"),
        (["features", str(HERE / "pictures"), "--model", vit, "--device", "meta", "--out", "f.npz"],
         "'meta' is not a device"),
        (["program", "b.pt2", "--model", vit, "--size", "50"], "multiples of this model's patch size, 14"),
        (["features", "a.png", "--model", vit, "--out", vit], "must be a file that ends in .npz, or a folder"),
        (["features", "a.png", "--model", vit, "--out", "f.txt"], "must be a file that ends in .npz, or a folder"),
        (["features", "a.png", "--out", "f.npz"], "required: --model"),
    ):
        with pytest.raises(ValueError, match=text):
            export.main(argv)
    for argv, text in ((["inform", vit], "unknown command 'inform', did you mean info?"),
                       (["info", "none.pth"], "no such checkpoint: none.pth")):
        with pytest.raises(ValueError, match=text):
            hub.main(argv)
    assert [p.name for p in tmp_path.iterdir()] == ["vit.pth"]
    assert exit_code("hub.py", "info", "none") == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: no such checkpoint") and not told.out
