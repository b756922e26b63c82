"""Files of weights from elsewhere, and damaged ones of ours: each is loaded, or refused in one line."""
import argparse
import gzip
import io
import json
import pathlib
import pickle
import random
import shlex
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import export
import hub
import model
import support.evaluation
from tests.common import assert_close, hub_vit, randn, randomize
from tests.test_hub import as_timm, as_transformers, prefixed


def content_of(save, *arguments) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *arguments)
    return buffer.getvalue()


def foreign_files() -> dict[str, tuple[bytes, str]]:
    """{name: (content, what it is called)}."""
    image, weights = Image.new("RGB", (8, 8)), hub_vit().state_dict()
    whole = content_of(lambda f: torch.save(weights, f))
    images = {kind: (content_of(image.save, kind), f"a {kind} image, not a weight file$")
              for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP")}
    tar, archive = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as file:
        file.addfile(tarfile.TarInfo("a.jpg"))
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.txt", "a")
    traced = torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2))
    return images | dict(
        webp=(content_of(image.save, "WEBP"), "a WebP image"), empty=(b"", "is empty; copy or download it again$"),
        tar=(tar.getvalue(), "a tar archive, not a weight file; unpack it first$"),
        gzip=(gzip.compress(whole[:999]), "a gzip archive, .*unpack it first"),
        zip=(archive.getvalue(), "a zip archive that torch.save did not write"),
        npz=(content_of(np.savez, np.ones(3)), "a zip archive that torch.save did not write"),
        npy=(content_of(np.save, np.ones(3)), "a NumPy array"), text=("Grüße".encode(), "is text, not"),
        json=(b'{"model": 1}', "is JSON, not"), html=(b"\n<!DOCTYPE html><html>", "is an HTML page, .*open the link"),
        lfs=(b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer, .* git lfs pull$"),
        xml=(b"<?xml version='1.0'?>", "is XML"),
        pickle=(pickle.dumps({"a": 1}), "a Python pickle that torch.save did"),
        torchscript=(content_of(lambda f: torch.jit.save(traced, f)), "a TorchScript program, .* save its weights"),
        half=(whole[: len(whole) // 2], "is truncated; copy or download it again$"),
        few=(whole[:40], "is truncated;"), noise=(b"\x07\xfe\xff" * 300, "truncated or is not a PyTorch checkpoint"))


@pytest.mark.filterwarnings("ignore")
def test_files_are_called_what_they_are(tmp_path):
    """Whatever the name ends in; as a backbone, as a head of either kind, and to the command `info`."""
    vit = hub_vit()
    for name, (content, text) in foreign_files().items():
        for suffix, load in ((".pth", hub.load), (".safetensors", hub.load), ("", lambda p: hub.main(["info", str(p)])),
                             ("_linear_head.pth", lambda p: hub.attach_linear_head(vit, p)),
                             ("_nyu_linear_head.pth", lambda p: hub.attach_dense_head(vit, p))):
            path = tmp_path / f"{name}{suffix}"
            path.write_bytes(content)
            with pytest.raises(ValueError, match=text) as error:
                load(path)
            assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_content_counts_not_the_ending(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    weights = hub_vit().state_dict()
    safetensors.save_file(weights, tmp_path / "a.pth")
    torch.save(weights, tmp_path / "b.safetensors")
    torch.save(weights, tmp_path / "c", _use_new_zipfile_serialization=False)
    data = (tmp_path / "a.pth").read_bytes()
    n = int.from_bytes(data[:8], "little")
    length = int.from_bytes(b"PK", "little") + 2**16 * (n > 19_280)  # of the header: the file begins like a zip archive
    (tmp_path / "d").write_bytes(length.to_bytes(8, "little") + data[8 : 8 + n].ljust(length) + data[8 + n :])
    for path in tmp_path.iterdir():
        assert torch.equal(hub.load(path).pos_embed, weights["pos_embed"])


def wrapped() -> dict[str, dict]:
    """The weights of hub_vit() in wrappers; those of others beside them are never to be taken."""
    weights = hub_vit().state_dict()
    other = {k: v + 1 for k, v in weights.items()}
    moments = dict(state={0: dict(exp_avg=torch.ones(3))}, param_groups=[dict(lr=1.0)])
    cases = {name: {name: weights, "epoch": 3} for name in ("state_dict", "model", "teacher", "module", "net")}
    cases |= {prefix: prefixed(prefix, weights) for prefix in ("module.", "_orig_mod.")}
    cases |= {prefix: prefixed(prefix, weights, "neck.weight") for prefix in (
        "encoder.", "backbone.", "model.encoder.backbone.", "module.encoder._orig_mod.", "x.y.")}
    itself = dict(weights)
    itself["self"] = itself
    return cases | dict(
        nested=dict(checkpoint=dict(state_dict=dict(model=weights)), optimizer=moments), itself=itself,
        beside_optimizer=weights | dict(optimizer=moments), ema=dict(model=other, model_ema=weights),
        ema_keys=prefixed("model.", other) | prefixed("ema.", weights),
        student=dict(student=prefixed("module.", weights)),
        pair=dict(model=prefixed("student.backbone.", other) | prefixed("teacher.backbone.", weights, "dino_loss.x")),
        lightning=dict(state_dict=prefixed("model.backbone.", weights, "criterion.weight"), optimizer_states=[moments],
                       hyper_parameters=dict(lr=1.0), **{"pytorch-lightning_version": "2.0"}),
        depth=prefixed("pretrained.", weights, "depth_head.scratch.weight"),
        format=dict(format="pt", state_dict=weights),
        chunks=dict(model={re_chunk(k): v for k, v in prefixed("encoder.", weights).items()}),
        transformers=dict(state_dict=prefixed("net.dinov2.", as_transformers(weights), "classifier.weight")),
        timm=dict(state_dict=prefixed("encoder.", as_timm(weights))))


def re_chunk(key: str) -> str:
    return key.replace("blocks.", "blocks.0.")


@pytest.mark.parametrize("case", wrapped())
def test_any_wrapper_and_prefix_is_understood(case, tmp_path):
    vit, images, ckpt = hub_vit(), randn(1, (1, 3, 56, 56))[0], wrapped()[case]
    torch.save(ckpt, tmp_path / "a.pth")
    for loaded in (hub.load("a.pth", ckpt), hub.load(tmp_path / "a.pth")):
        assert torch.equal(loaded(images), vit(images))
    assert hub.describe_backbone(str(tmp_path / "a.pth"), ckpt)["SHA-256"] == (
        hub.weights_hash(loaded) if case == "timm" else hub.weights_hash(vit))


def test_what_is_not_one_backbone_is_named():
    """Two that could be meant, by their prefixes; none, by keys, which may hold anything."""
    weights = hub_vit().state_dict()
    for ckpt, text in ((dict(model=weights, net=weights | {}), "2 backbones, under 'model' and 'net'; save one"),
                       (prefixed("a.", weights) | prefixed("b.c.", weights), "under 'a' and 'b.c'"),
                       (dict(ema=prefixed("a.", weights) | prefixed("b.", weights)), "under 'ema.a' and 'ema.b'")):
        with pytest.raises(ValueError, match=text):
            hub.load("x.pth", ckpt)
    for ckpt in ({"a\n\x1b[31mb": torch.ones(2)}, {"a\nb": 1}, {"a\nb": dict(c=torch.ones(2))}, {"x" * 10**5: 1}):
        for load in (hub.load, hub.load_mask2former):
            with pytest.raises(ValueError) as error:
                load("x.pth", ckpt)
            assert str(error.value).isprintable() and len(str(error.value)) < 500
    part = {"stem.patch_embed.proj.weight": torch.ones(2, 3, 4, 4)}
    assert hub.load("x.pth", prefixed("vit.", weights) | part).n_blocks == 3  # only one is whole


def test_settings_beside_weights_are_refused_with_the_command_that_helps(tmp_path, monkeypatch):
    vit, images = hub_vit(), randn(1, (1, 3, 56, 56))[0]
    monkeypatch.chdir(tmp_path)
    for content, name in ((dict(model=vit.state_dict(), args=argparse.Namespace(lr=1)), "argparse.Namespace"),
                          (vit.state_dict() | dict(path=pathlib.Path("/a")), "pathlib.PosixPath"),
                          (dict(hyper_parameters=dict(root=pathlib.Path("/a")), state_dict=prefixed(
                              "encoder.", vit.state_dict())), "pathlib.PosixPath"),
                          (vit, "model.DinoVisionTransformer")):
        torch.save(content, "it's mine.pth")
        with pytest.raises(ValueError, match=f"holds pickled code, {name}, .* nothing in it was run") as error:
            hub.load("it's mine.pth")
        assert "\n" not in str(error.value)
        python, flag, code = shlex.split(str(error.value).partition("save its weights alone: ")[2])
        assert (python, flag) == ("python", "-c")
        exec(code, {})
        assert torch.equal(hub.load("weights.pth")(images), vit(images))


OTHER_NETWORKS = {  # weights that tell them
    "DINOv3": [["cls_token", "storage_tokens", "patch_embed.proj.weight", "rope_embed.periods"],
               ["embeddings.cls_token", "embeddings.patch_embeddings.weight", "layer.0.layer_scale1.lambda1"]],
    "DINOv3, EVA or BEiT": [["cls_token", "reg_token", "patch_embed.proj.weight", "blocks.0.gamma_1"]],
    "CLIP": [["visual.class_embedding", "visual.conv1.weight", "text_projection"], ["cls_token", "norm_pre.weight"],
             ["vision_model.embeddings.class_embedding", "vision_model.encoder.layers.0.self_attn.q_proj.weight"]],
    "SigLIP": [["vision_model.embeddings.patch_embedding.weight", "vision_model.head.probe"],
               ["pos_embed", "patch_embed.proj.weight", "attn_pool.latent"]],
    "MAE with its decoder": [["cls_token", "pos_embed", "patch_embed.proj.weight", "decoder_embed.weight"]],
    "SAM": [["image_encoder.patch_embed.proj.weight", "image_encoder.blocks.0.attn.rel_pos_h"]],
    "BEiT, EVA or Swin": [["patch_embed.proj.weight", "layers.0.blocks.0.attn.relative_position_bias_table"]],
    "a ResNet": [["conv1.weight", "layer1.0.conv1.weight", "fc.weight"]],
    "a ConvNeXt": [["stages.0.0.dwconv.weight"]], "I-JEPA": [["patch_embed.proj.weight", "predictor_pos_embed"]],
    "a ViT of Hugging Face other than DINOv2": [["vit.embeddings.cls_token", "vit.layer.0.layernorm_before.weight"]]}


@pytest.mark.parametrize("name", OTHER_NETWORKS)
def test_other_networks_are_called_by_their_names(name):
    for keys in OTHER_NETWORKS[name]:
        for ckpt in ({k: torch.ones(2) for k in keys}, dict(state_dict={f"module.{k}": torch.ones(2) for k in keys})):
            with pytest.raises(ValueError, match=f"^x.pth holds {name}, not DINOv2$"):
                hub.load("x.pth", ckpt)


@pytest.mark.slow
def test_other_networks_as_timm_and_transformers_have_them():
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    small = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64)
    for name, kinds in {"DINOv3": ["vit_small_patch16_dinov3", "DINOv3ViT"], "CLIP": ["vit_base_patch32_clip_224",
                        "CLIPVision"], "SigLIP": ["vit_base_patch16_siglip_224", "SiglipVision"],
                        "a ResNet": ["resnet18"], "a ConvNeXt": ["convnext_tiny"],
                        "SAM": ["samvit_base_patch16"]}.items():
        for kind in kinds:
            with torch.device("meta"):
                network = timm.create_model(kind, pretrained=False) if kind.islower() or "_" in kind else getattr(
                    transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**small))
            with pytest.raises(ValueError, match=f"holds {name}.*, not DINOv2"):
                hub.load("x.pth", network.state_dict())


def test_dino_of_2021_is_loaded():
    """A plain ViT, patches of 8: the same function, and positions by its own rule, which is the official one."""
    vit = randomize(model.DinoVisionTransformer(img_size=32, patch_size=8, embed_dim=128, depth=2, num_heads=2,
                                                block_chunks=0))
    weights = vit.state_dict()
    del weights["mask_token"]
    for ckpt in (weights, dict(student=prefixed("module.backbone.", {k: v + 1 for k, v in weights.items()}),
                               teacher=prefixed("backbone.", weights, "head.mlp.0.weight"))):
        loaded = hub.load("x.pth", ckpt)
        for images in randn(1, (1, 3, 32, 32), (1, 3, 48, 24)):
            assert torch.equal(loaded(images), vit(images))
        assert hub.layout_of(ckpt) == "dino"
    of_timm = hub.load("x.pth", weights | {"head.weight": torch.ones(2, 128)})  # a classifier
    assert of_timm.interpolate_antialias and not loaded.interpolate_antialias
    timm = pytest.importorskip("timm")
    theirs = randomize(timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=128, depth=2, num_heads=2,
                                                     num_classes=0))
    images = randn(1, (1, 3, 32, 32))[0]
    assert_close(hub.load("x.pth", theirs.state_dict())(images), theirs(images).detach(), 1e-5)


@pytest.mark.parametrize("registers", [0, 4])
def test_position_tables_that_are_not_square(registers, tmp_path, capsys):
    """Of 2x3 patches: by an argument, or the config.json of either library; converted there and back; in info."""
    rule = dict(interpolate_antialias=registers > 0, interpolate_offset=0.0 if registers else 0.1)
    vit = randomize(model.DinoVisionTransformer(img_size=(28, 42), patch_size=14, embed_dim=128, depth=2, num_heads=2,
                                                init_values=1.0, block_chunks=0, num_register_tokens=registers, **rule))
    weights, images, folder = vit.state_dict(), randn(1, (2, 3, 28, 42))[0], tmp_path / "hf"
    folder.mkdir()
    for layout in (dict, as_timm, as_transformers):
        torch.save(layout(weights), folder / "pytorch_model.bin")
        for config in ({}, dict(image_size=28), dict(image_size=[28, 28]), dict(image_size="x", model_args=[])):
            (folder / "config.json").write_text(json.dumps(config))
            with pytest.raises(ValueError, match=r"a position table of 6 entries, not a square: .* img_size=\(height"):
                hub.load(folder)
        for config in (dict(image_size=[28, 42]), dict(model_args=dict(img_size=[28, 42])),
                       dict(architecture="vit", pretrained_cfg=dict(input_size=[3, 28, 42]))):
            (folder / "config.json").write_text(json.dumps(config))
            assert_close(hub.load(folder)(images), vit(images), 1e-5)
        (folder / "config.json").unlink()
        loaded = hub.load(folder, img_size=(28, 42))
        assert_close(loaded(images), vit(images), 1e-5)
        assert loaded.patch_embed.img_size == (28, 42)
    (folder / "config.json").write_text('{"image_size": [28, 42]}')
    hub.main(["info", str(folder)])
    assert "positions for 28x42" in capsys.readouterr().out
    for to in ("official", "timm"):
        export.main(["convert", str(folder), str(tmp_path / f"{to}.pth"), "--to", to])
        assert "img_size=(28, 42))" in capsys.readouterr().err
        assert_close(hub.load(tmp_path / f"{to}.pth", img_size=(28, 42))(images), vit(images), 1e-5)
    with pytest.raises(ValueError, match="transformers cannot resize the position table for 28x42"):
        export.main(["convert", str(folder), str(tmp_path / "new"), "--to", "hf"])


def test_position_tables_that_are_not_square_equal_timm(tmp_path):
    """At other sizes too, with as many patches as a square has."""
    timm = pytest.importorskip("timm")
    for registers in (0, 4):
        theirs = randomize(timm.models.VisionTransformer(
            img_size=(28, 112), patch_size=14, embed_dim=128, depth=2, num_heads=2, init_values=1.0, num_classes=0,
            reg_tokens=registers, no_embed_class=registers > 0, dynamic_img_size=True))
        ours = hub.load("x.pth", theirs.state_dict(), img_size=(28, 112))
        for images in randn(1, (1, 3, 28, 112), (1, 3, 56, 56), (1, 3, 42, 70)):
            assert_close(ours(images), theirs.forward_features(images)[:, 0].detach(), 1e-5)


VALUES = [None, 0, -1, 1, 2, 10**7, 10**9, 2**63, 10**30, 0.5, 1.5, float("nan"), float("inf"), "", "2", "x" * 99, b"x",
          True, [], [1], [2, 2], (), {}, dict(a=1), torch.ones(2), torch.tensor(3), "vit_small", [float("nan")] * 3]
TENSORS = [
    lambda t: t.long(), lambda t: t.bool(), lambda t: t.half(), lambda t: t * torch.nan, lambda t: t[None][:0],
    lambda t: t[None], torch.flatten, lambda t: t.to(torch.complex64), lambda t: t.to_sparse(), lambda t: t.to("meta"),
    lambda t: torch.ones(1).expand(10**6, 10**6), lambda t: torch.ones(1).double().expand(t.shape), torch.Tensor.double,
    lambda t: t.to(torch.float8_e4m3fn), lambda t: torch.tensor(1.0), lambda t: torch.zeros(0, 3, 0, 0)]


def corrupt(ckpt: dict, rng: random.Random) -> dict:
    """A copy with one to three entries removed, renamed or replaced."""
    ckpt = {k: dict(v) if isinstance(v, dict) else v for k, v in ckpt.items()}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        part = ckpt[key] if rng.random() < 0.85 and isinstance(ckpt.get(key := rng.choice(
            ("model", "model", "config", "teacher"))), dict) else ckpt
        name, action = rng.choice(sorted(part, key=str) or ["x"]), rng.random()
        if action < 0.3:
            value = part.pop(name, None)
            part |= {f"{name}x": value} if action < 0.1 else {}
        elif torch.is_tensor(part.get(name)) and action < 0.9:
            part[name] = rng.choice(TENSORS)(part[name])
        else:
            part[name] = rng.choice(VALUES)
    return ckpt


def outcome(ckpt: dict, images: torch.Tensor) -> str:
    """Loads and uses a checkpoint. What is refused, is in one line that names the file."""
    try:
        vit = hub.load("x.pth", ckpt)
        rules = hub.image_rules(vit, ckpt)
        assert len(rules["mean"]) == len(rules["std"]) == vit.patch_embed.in_chans
        assert vit.num_heads == ckpt["model"].get("num_heads", 12)
        assert vit(images).shape == (1, 64) and {p.dtype for p in vit.parameters()} == {torch.float32}
    except ValueError as error:
        assert str(error).startswith("x.pth") and "\n" not in str(error) and len(str(error)) < 500, error
        return "refused"
    return "used"


def test_damaged_checkpoints_are_refused_in_one_line(trained):
    """Of 400 copies with entries that are missing, renamed, or of another type, size or value, all are refused or used
    as they should be: those without an error have the right number of heads, which only the notes tell."""
    ckpt, images, rng = hub.read(trained / "ckpt.pth")[1], torch.ones(1, 3, 12, 16), random.Random(0)
    outcomes = [outcome(corrupt(ckpt, rng), images) for _ in range(400)]
    assert 150 < outcomes.count("refused") < 390
    for changes, text in ((dict(format=2), "has format 2, this code reads 1"), (dict(format="1"), "its format is '1'"),
                          (dict(step=-1), "its step is -1"), (dict(config=[]), "its in_chans is None"),
                          (dict(model=ckpt["model"] | dict(num_heads=0)), "impossible network: width 64 .* heads 0"),
                          (dict(model=ckpt["model"] | dict(num_heads="2")), "number of heads '2'"),
                          (dict(model=ckpt["model"] | dict(num_heads=-1)), "number of heads -1"),
                          (dict(model=ckpt["model"] | dict(patch_size=0)), "patch_size is 0, but 4 by the weights"),
                          (dict(model=ckpt["model"] | dict(depth=10**7)), "depth is 10000000, but 3 by the weights"),
                          (dict(model=ckpt["model"] | dict(neck=3)), "impossible network: .* 'neck'"),
                          (dict(config=ckpt["config"] | dict(std=(0.1, 0, 1))), r"its std is \(0.1, 0, 1\)")):
        with pytest.raises(ValueError, match=text):
            hub.load("x.pth", ckpt | changes)
    assert hub.load("x.pth", {k: v for k, v in ckpt.items() if k != "optimizer"}).num_heads == 2


def test_damaged_configs_of_transformers(tmp_path):
    """Beside the weights of a network with 4 heads of 32: used, ignored if it is of something else, or refused."""
    torch.save(as_transformers(hub_vit().state_dict()), tmp_path / "pytorch_model.bin")
    config, rng, seen = tmp_path / "config.json", random.Random(0), set()
    whole = dict(num_attention_heads=4, hidden_size=128, image_size=56, model_args=dict(img_size=56), pretrained_cfg={})
    values = [v for v in VALUES if not torch.is_tensor(v) and not isinstance(v, bytes)]
    texts = [json.dumps(whole | {rng.choice(sorted(whole)): rng.choice(values)}) for _ in range(60)]
    for text in [*texts, "[" * 10**5, "", "null", "[]", '"x"', "\0", '{"hidden_size": ']:
        config.write_text(text)
        try:
            seen.add(hub.load(tmp_path).num_heads)
        except ValueError as error:
            assert "config.json is damaged: " in str(error) and "\n" not in str(error)
            seen.add("refused")
    assert seen == {1, 2, 4, "refused"}


@pytest.mark.parametrize("task", ["depth", "seg"])
def test_damaged_notes_of_heads(task, tmp_path):
    vit, rng, path, outcomes = hub_vit(), random.Random(0), tmp_path / "head.pth", []
    head = hub.LinearDepthHead(128, 1, 0.1, 10.0) if task == "depth" else hub.SegmentationHead(128, 3, 1)
    about = dict(task=task, decoder="linear", dim=128, dataset="", backbone=hub.weights_hash(vit),
                 classes=["a", "b", "c"], depth_range=None, recipe=tuple(hub.Recipe()))
    about |= dict(classes=None, depth_range=(0.1, 10.0), recipe=None) if task == "depth" else {}
    whole = dict(state_dict=prefixed("decode_head.", head.state_dict()), about=about)
    torch.save(whole, path)
    assert hub.attach_dense_head(vit, path)[1].task == task
    for i in range(60):
        part = {k: dict(v) for k, v in whole.items()}
        key = rng.choice(sorted(about) if i % 2 else sorted(whole["state_dict"]))
        if i % 2:
            part["about"][key] = rng.choice(VALUES + [["a"] * 3, [1] * 8, (3.0, 1.0), ("a", "b")])
        else:
            part["state_dict"][key] = rng.choice(TENSORS)(part["state_dict"][key].float())
        torch.save(part, path)
        try:
            network, found = hub.attach_dense_head(vit, path)
            assert network(torch.ones(1, 3, 28, 28)).shape[-2:] == (28, 28) and found.task == task
            outcomes.append("used")
        except ValueError as error:
            assert "head.pth" in str(error) and "\n" not in str(error)
            outcomes.append("refused")
    assert 20 < outcomes.count("refused") < 60


def test_linear_heads_under_any_prefix_and_damaged(tmp_path):
    vit = hub_vit()
    weights = dict(weight=torch.ones(5, 256), bias=torch.ones(5))
    for ckpt in (weights, dict(state_dict=prefixed("module.linear.", weights)), prefixed("classifier.", weights)):
        torch.save(ckpt, tmp_path / "head.pth")
        assert hub.attach_linear_head(vit, tmp_path / "head.pth").layers == 1
    for key in weights:
        for change in TENSORS:
            torch.save(weights | {key: change(weights[key])}, tmp_path / "head.pth")
            try:
                head = hub.attach_linear_head(vit, tmp_path / "head.pth").linear_head
                assert head.weight.dtype == head.bias.dtype == torch.float32 and head.weight.shape == (5, 256)
            except ValueError as error:
                assert "holds no linear head" in str(error)


def test_damaged_states_of_evaluations(tmp_path):
    like = dict(values=torch.zeros(3, 2), optimizer=dict(state={}, groups=[1]), done=0, curve=[], chosen={})
    whole = like | dict(done=7, curve=[(5, 1.0)], chosen=dict(a=1), optimizer=dict(state={0: 1}, groups=[2]))
    saved = support.evaluation.ResumeFile(str(tmp_path / "a"), [])
    fits = dict(done=lambda v: isinstance(v, int) and 0 <= v <= 9, curve=lambda v: isinstance(v, list),
                chosen=lambda v: isinstance(v, dict))
    changes = [{k: v} for k in like for v in VALUES if k not in fits or not fits[k](v)]
    for change in ({}, *changes, dict(more=1), dict(values=torch.zeros(3, 3))):
        torch.save(whole | change | dict(settings=saved.settings), saved.path)
        restored = []
        restore = lambda state: restored.append(state) or state["done"]  # noqa: E731
        if not change:
            saved.load(restore, like, 9)
            assert restored[0]["done"] == 7
            continue
        with pytest.raises(ValueError, match=r"\.resume is damaged; remove it to start from scratch$"):
            saved.load(restore, like, 9)
            pytest.fail(str(change))
        assert not restored
    saved.path.write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="is damaged; remove it"):
        saved.load(lambda state: 0, like, 9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("registers", [0, 4])
def test_onnx_by_both_exporters_at_any_size(registers, dynamo, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    vit = hub_vit(registers)
    for images in randn(1, (2, 3, 56, 56), (2, 3, 28, 28), (1, 3, 42, 70)):
        rest = dict(external_data=False) if dynamo else dict(opset_version=17)
        torch.onnx.export(vit, (images,), str(tmp_path / "a.onnx"), dynamo=dynamo, verbose=False, **rest)
        session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
        found = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
        assert_close(torch.from_numpy(found), vit(images).detach(), 1e-5)


def test_a_missing_weight_is_the_only_one_reported(tmp_path):
    """Whichever it is: also the names by which the blocks are counted."""
    for missing in ("blocks.1.norm1.weight", "blocks.2.attn.qkv.weight", "blocks.0.ls1.gamma"):
        weights = model.build("vit_nano", patch_size=8, img_size=16, init_values=1.0, block_chunks=0).state_dict()
        del weights[missing]
        torch.save(weights, tmp_path / "a.pth")
        with pytest.raises(ValueError) as error:
            hub.load(tmp_path / "a.pth")
        assert missing == "blocks.0.ls1.gamma" or f"1 is missing (such as {missing})" in str(error.value)
        assert "unexpected" not in str(error.value) or missing == "blocks.0.ls1.gamma"


def test_mistyped_entry_points_are_named():
    for name in ("dinov2_vit_s14", "dinov2_vitx14", "vits14", ""):
        with pytest.raises(ValueError, match="no released backbone is called"):
            hub.backbone(name, pretrained=False)
