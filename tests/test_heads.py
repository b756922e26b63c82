import io
import os
import shutil
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import heads
import hub
import model
from tests.common import as_released, assert_close, dense_close, fill_by_names, golden_dense, hub_vit, randn, randomize

# What the two notebooks of the release show. The weights do not come along: see hub.py on where to put them.


def notebook(name: str) -> torch.Tensor:
    """A picture of the notebooks: (H, W, 3) uint8 the photograph, (H, W) what was predicted for it."""
    with Image.open(io.BytesIO(golden_dense.numpy(f"notebook/{name}").tobytes())) as image:
        return torch.from_numpy(np.array(image))


def official(*files: str) -> None:
    """Skips the test unless these files of the release are in torch.hub's folder."""
    folder = Path(torch.hub.get_dir(), "checkpoints")
    if missing := [file for file in files if not (folder / file).exists()]:
        pytest.skip(f"needs official weights, {' and '.join(missing)}, in {folder}")


RULES = hub.image_rules(types.SimpleNamespace(patch_embed=types.SimpleNamespace(in_chans=3)), {})


def test_notebook_depth():
    """Depth of the photograph by the ViT-S with its DPT head for NYU: in the colors of the notebook, at most two of
    their 256 apart, all but one pixel in a hundred."""
    official("dinov2_vits14_pretrain.pth", "dinov2_vits14_nyu_dpt_head.pth")
    network, _ = hub.load_dense("dinov2_vits14", "nyu_dpt")
    meters = heads.predict_depth(network, notebook("example_640x480").permute(2, 0, 1), RULES["mean"], RULES["std"])
    gray = 255 * (meters - meters.min()) / (meters.max() - meters.min())
    near = (gray - notebook("depth_nyu_dpt_vits14_u8")).abs() <= 2
    assert near.float().mean() >= 0.99, f"{near.float().mean():.1%} of the pixels"


@torch.inference_mode()
def test_notebook_depth_before_it_is_resized():
    """The first numbers that the head gives, as transformers' test of the same weights has them, which adds no
    millimeter."""
    official("dinov2_vits14_pretrain.pth", "dinov2_vits14_nyu_dpt_head.pth")
    network, _ = hub.load_dense("dinov2_vits14", "nyu_dpt")
    x = data.normalize(notebook("example_640x480").permute(2, 0, 1)[None] / 255, RULES["mean"], RULES["std"])
    out = network.decode_head(network.features(x))
    assert out.shape == (1, 1, 576, 736)
    expected = [[3.3576, 3.4741, 3.4345], [3.4324, 3.5012, 3.2775], [3.2560, 3.3563, 3.2354]]
    assert_close(out[0, 0, :3, :3] - 0.001, expected, 1e-3)


@pytest.mark.parametrize("spec, head, recipe, expected, files", [
    ("dinov2_vits14", "voc2012_ms", heads.MULTI_SCALE._replace(ratios=(1.0, 1.32, 1.73)), "voc2012_ms3scales_vits14",
     ["dinov2_vits14_pretrain.pth", "dinov2_vits14_voc2012_ms_head.pth"]),
    ("dinov2_vitg14_m2f", None, heads.RECIPES["ade20k", "m2f"], "ade20k_m2f_vitg14", ["dinov2_vitg14_ade20k_m2f.pth"])])
def test_notebook_segmentation(spec, head, recipe, expected, files):
    """Classes of the photograph: the same in all but one pixel in a hundred."""
    official(*files)
    network, _ = hub.load_dense(spec, head)
    chances = heads.segment(network, notebook("example_640x480").permute(2, 0, 1), recipe, RULES["mean"], RULES["std"])
    same = chances.argmax(0) == notebook(f"{expected}_pred")
    assert same.float().mean() >= 0.99, f"{same.float().mean():.1%} of the pixels"


def golden_features(name: str, n: int, with_cls: bool = True) -> list:
    blank = torch.zeros(2, 384)
    return [(golden_dense[f"{name}/{'patch' if with_cls else 'f'}{i}"],
             golden_dense[f"{name}/cls{i}"] if with_cls else blank) for i in range(n)]


def kept_by(module: torch.nn.Module, keep: dict, name: str) -> None:
    module.register_forward_hook(lambda m, args, out: keep.__setitem__(name, (args[0], out)))


@pytest.mark.parametrize("name,layers", [("depth_linear", 1), ("depth_linear4", 4)])
@torch.no_grad()
def test_heads_linear_depth_golden(name, layers):
    features, keep = golden_features(name, layers), {}
    for kind, limits in (*heads.RANGES.items(), ("hub_bug_max80", (0.001, 80))):
        head = fill_by_names(heads.LinearDepthHead(384, layers, *limits), "decode_head.")
        kept_by(head.conv_depth, keep, "logits")
        dense_close(f"{name}/out_{kind}", head(features))
    x, logits = keep["logits"]
    dense_close(f"{name}/feat", heads.bilinear(x, (20, 28))[:, ::97])
    dense_close(f"{name}/logit_nobins", heads.bilinear(logits, (20, 28))[:, ::17])
    assert x.shape[-2:] == (5, 7)  # the convolution sees the small map: 16 times less memory than officially


@torch.no_grad()
def test_heads_dpt_golden():
    head, keep = fill_by_names(heads.DPTHead(384), "decode_head."), {}
    for what, modules in (("conv", head.convs), ("fusion", head.fusion_blocks)):
        for i, module in enumerate(modules):
            kept_by(module, keep, f"{what}{i}")
    out = head(golden_features("depth_dpt", 4))
    for what, (x, y) in keep.items():
        dense_close(f"depth_dpt/{what}_every16ch", y[:, ::16])
        if what.startswith("conv"):
            dense_close(f"depth_dpt/{what.replace('conv', 'reassemble')}", x)
    dense_close("depth_dpt/out", out)


@pytest.mark.parametrize("kind", ["linear", "linear4", "dpt"])
@torch.no_grad()
def test_heads_depth_of_images_golden(kind):
    vit = fill_by_names(model.build("vit_small", patch_size=14, img_size=518, init_values=1.0, block_chunks=0))
    head = heads.DPTHead(384) if kind == "dpt" else heads.LinearDepthHead(384, 4 if kind == "linear4" else 1)
    network = heads.Dense(vit, fill_by_names(head, "decode_head.")).eval()
    images = golden_dense["depth_e2e/img"]
    dense_close("depth_e2e/centerpad_out", heads.center_pad(images, 14))
    if kind == "dpt":
        for i, (patches, cls) in enumerate(network.features(images)):
            dense_close(f"depth_e2e/tap{i}_patch", patches)
            dense_close(f"depth_e2e/tap{i}_cls", cls)
    dense_close(f"depth_e2e/out_{kind}", network(images))
    dense_close(f"depth_e2e/out_{kind}", network.whole_inference(images, img_meta=None, rescale=True))
    dense_close(f"depth_e2e/out_{kind}_norescale", network.whole_inference(images, rescale=False))
    dense_close(f"depth_e2e/out_{kind}_fliptta", heads.estimate_depth(network, images, flip=True))


@pytest.mark.parametrize("most,kind", [(None, "maxNone"), (10.0, "max10")])
def test_heads_depth_losses_golden(most, kind):
    at = lambda name: golden_dense[f"depth_losses/{name}"]  # noqa: E731
    depth, target = at("pred").requires_grad_(), at("gt")
    dense_close(f"depth_losses/sig_warm_{kind}", heads.sig_loss(depth, target, most, warm_up=True))
    dense_close(f"depth_losses/sig_main_{kind}", heads.sig_loss(depth, target, most))
    wrong = lambda *pair: heads.gradient_loss(*(x.permute(2, 3, 0, 1) for x in pair), most)  # noqa: E731, the official
    dense_close(f"depth_losses/grad4d_B2_{kind}", 0.5 * wrong(depth, target))
    dense_close(f"depth_losses/grad2d_{kind}", 0.5 * heads.gradient_loss(depth[0], target[0], most))
    dense_close("depth_losses/sig_w10_nowarm", 10 * heads.sig_loss(depth, target))
    dense_close("depth_losses/grad4d_B3", 0.5 * heads.gradient_loss(
        *(at(name).permute(2, 3, 0, 1) for name in ("pred3", "gt3"))))
    (heads.sig_loss(depth, target, most) + heads.gradient_loss(depth, target, most)).backward()
    assert depth.grad.isfinite().all() and depth.grad[target <= 0].abs().max() == 0


def test_heads_depth_losses_without_a_known_pixel():
    depth = torch.rand(1, 1, 9, 9, requires_grad=True)
    (heads.sig_loss(depth, torch.zeros(1, 1, 9, 9)) + heads.gradient_loss(depth, torch.zeros(1, 1, 9, 9))).backward()
    assert (depth.grad == 0).all()
    one = torch.zeros(1, 1, 9, 9)
    one[..., 4, 4] = 2.0
    assert heads.sig_loss(depth, one).isfinite()
    assert heads.sig_loss(one, one) < 1e-5 and heads.sig_loss(one.requires_grad_(), one.detach()).requires_grad


@pytest.mark.parametrize("name,layers,n_classes", [("seg_linear_voc2012", 1, 21), ("seg_ms_ade20k", 4, 150)])
@torch.no_grad()
def test_heads_segmentation_golden(name, layers, n_classes):
    head, keep = fill_by_names(heads.SegmentationHead(384, n_classes, layers), "decode_head."), {}
    kept_by(head.conv_seg, keep, "conv")
    features = golden_features(name, 4, with_cls=False) if layers == 4 else [
        (golden_dense[f"{name}/f3"], torch.zeros(2, 384))]
    dense_close(f"{name}/out", head(features))
    dense_close(f"{name}/feat_every32", keep["conv"][0][:, ::32])


class ToyBackbone(torch.nn.Module):
    """Of the golden numbers of sliding windows: four maps that are polynomials of averages of 14 x 14 pixels."""
    n_blocks, patch_size = 4, 14

    def get_intermediate_layers(self, x, n, reshape, return_class_token, norm):
        a = torch.nn.functional.avg_pool2d(x, 14)
        return [((k + 1) * a + 0.1 * k * a**2, a.mean((2, 3))) for k in n]


@torch.no_grad()
def test_heads_slide_and_views_golden():
    network = heads.Dense(ToyBackbone(), fill_by_names(heads.SegmentationHead(3, 5, 4), "decode_head."))
    at = lambda name: golden_dense[f"seg_slide_tta_toy/{name}"]  # noqa: E731
    dense_close("seg_slide_tta_toy/crop_logits", network(at("img")[..., :50, :56]))
    whole = [heads.slide(network, at(name), 56, 28, batch) for name, batch in (("img", 3), ("img2", 1))]
    dense_close("seg_slide_tta_toy/slide_norescale", whole[0])
    views = [heads.bilinear(x, (71, 59)) for x in whole]
    dense_close("seg_slide_tta_toy/slide_rescale", views[0])
    first, second = views[0].softmax(1), views[1].softmax(1).flip(-1)
    dense_close("seg_slide_tta_toy/prob1", first)
    dense_close("seg_slide_tta_toy/prob2_flipped_back", second)
    assert (first.argmax(1) == at("simple_pred")).all()
    assert ((first + second).argmax(1) == at("aug_pred")).all()


@torch.no_grad()
def test_heads_segment_is_these_steps(tmp_path):
    """segment() against its parts, written out, on a photograph."""
    network = heads.Dense(ToyBackbone(), fill_by_names(heads.SegmentationHead(3, 5, 4), "decode_head."))
    photo = torch.from_numpy(golden_dense.numpy("preprocess_mmcv/img_bgr").copy()).permute(2, 0, 1)
    recipe = heads.Recipe(40, 70, crop=28, stride=21, ratios=(1.0, 1.5), flip=True)
    mean, std = torch.tensor(data.MEAN)[:, None, None], torch.tensor(data.STD)[:, None, None]
    views = []
    for size in ((40, 57), (60, 86)):
        x = (heads.resize_as_opencv(photo, size) / 255 - mean) / std
        for flip in (False, True):
            y = heads.slide(network, (x.flip(-1) if flip else x)[None], 28, 21)
            y = heads.bilinear(y, (37, 53)).softmax(1)[0]
            views.append(y.flip(-1) if flip else y)
    found = heads.segment(network, photo, recipe)
    assert_close(found, torch.stack(views).mean(0), 1e-6)
    assert_close(found.sum(0), torch.ones(37, 53), 1e-5)
    deep = heads.segment(network, data.widen(photo), recipe)
    assert_close(deep, found, 1e-3)
    stretched = heads.Recipe(40, 70, 64, 64, multiple=32)  # to sides of 64 and 64
    view = (heads.resize_as_opencv(heads.resize_as_opencv(photo, (40, 57)), (64, 64)) / 255 - mean) / std
    expected = heads.bilinear(heads.slide(network, view[None], 64, 64), (37, 53)).softmax(1)[0]
    assert_close(heads.segment(network, photo, stretched), expected, 1e-6)


def test_heads_sizes_are_those_of_mmcv():
    for h, w, long, short, *expected in golden_dense.numpy(
            "preprocess_mmcv/rescale_size_table__h_w_scalelong_scaleshort_newh_neww").tolist():
        assert list(heads.scaled_size(h, w, long, short)) == expected
    photo = torch.from_numpy(golden_dense.numpy("preprocess_mmcv/img_bgr").copy()).permute(2, 0, 1)
    for key in golden_dense.keys("preprocess_mmcv/rescale_"):
        if not key.startswith("size"):
            long, short = map(int, key.split("_"))
            found = heads.resize_as_opencv(photo, heads.scaled_size(37, 53, long, short)).permute(1, 2, 0)
            assert_close(found, golden_dense[f"preprocess_mmcv/rescale_{key}"].float(), 1)
    assert_close(heads.resize_as_opencv(photo, (64, 64)).permute(1, 2, 0),
                 golden_dense["preprocess_mmcv/resize_to_multiple32"].float(), 1)
    rgb = photo.flip(0)[None]
    assert_close(data.normalize(data.to_float(rgb))[0].permute(1, 2, 0),
                 golden_dense["preprocess_mmcv/normalized_from_bgr"], 1e-5)


def test_heads_segmentation_loss_golden():
    loss = heads.segmentation_loss(golden_dense["seg_loss/logit"], golden_dense["seg_loss/label"][:, 0])
    dense_close("seg_loss/loss_ce", loss)
    labels = golden_dense["seg_loss/label"][:, 0]
    right = (heads.bilinear(golden_dense["seg_loss/logit"], (8, 10)).argmax(1) == labels)[labels != 255]
    dense_close("seg_loss/acc_seg", 100 * right.float().mean())
    ignored = torch.full((2, 8, 10), 255, dtype=torch.uint8)
    assert heads.segmentation_loss(golden_dense["seg_loss/logit"], ignored) == 0


def test_heads_names_and_colors_of_classes():
    tables = golden_dense.json("classes")
    for name, table in tables.items():
        assert heads.CLASSES[name] == [s.strip() for s in table["names"]]
        assert [list(c) for c in heads.colors(len(table["rgb"]), name)] == table["rgb"]
    assert len(set(heads.colors(256))) == 256


@pytest.mark.parametrize("n_blocks,even", [(12, (2, 5, 8, 11)), (24, (4, 11, 17, 23)), (40, (9, 19, 29, 39))])
def test_heads_taps(n_blocks, even):
    assert heads.LinearDepthHead(8, 4).taps(n_blocks) == heads.DPTHead(8).taps(n_blocks) == even
    assert heads.LinearDepthHead(8, 1).taps(n_blocks) == heads.SegmentationHead(8, 2).taps(n_blocks) == (n_blocks - 1,)
    assert heads.SegmentationHead(8, 2, 4).taps(n_blocks) == tuple(range(n_blocks - 4, n_blocks))


@pytest.mark.parametrize("make", [lambda: heads.DPTHead(64, channels=16), lambda: heads.LinearDepthHead(64),
                                  lambda: heads.SegmentationHead(64, 3, 4)])
def test_heads_on_small_networks_and_odd_sizes(make):
    network = heads.Dense(model.build("vit_nano", img_size=32, patch_size=8), make()).eval()  # of 3 blocks
    for size in ((1, 1), (8, 8), (37, 50)):
        assert network(torch.randn(2, 3, *size)).shape[-2:] == size
    assert heads.even_taps(3) == (0, 1, 2, 2)


@pytest.mark.parametrize("call", [lambda: heads.LinearDepthHead(8, 2), lambda: heads.SegmentationHead(8, 2, 3),
                                  lambda: heads.DPTHead(8, 0, 10), lambda: heads.LinearDepthHead(8, 1, 10, 1),
                                  lambda: heads.Dense(None, None).whole_inference(None, {})])
def test_heads_errors(call):
    with pytest.raises(ValueError, match="1 or 4 blocks|two positive numbers|leave it None"):
        call()


DENSE_SHAPES = golden_dense.json("shapes")
POINTS = {"linear": ("_ld", dict(layers=1)), "linear4": ("_ld", {}), "dpt": ("_dd", {})}


@pytest.mark.parametrize("key", [k for k in DENSE_SHAPES if k.endswith("_head")])
def test_dense_entry_points_have_the_released_keys(key):
    """The 40 heads: names in order, shapes; the depth range is that of the data, not the 80 m of the official hub."""
    name, dataset, kind, _ = key.rsplit("_", 3)
    suffix, kwargs = POINTS[kind] if dataset in heads.RANGES else (f"_{kind[0]}s", {})
    with torch.device("meta"):
        network = hub.entry_points()[name + suffix](pretrained=False, weights=dataset.upper(), **kwargs)
    keys = {f"decode_head.{k}": list(v.shape) for k, v in network.decode_head.state_dict().items()}
    assert list(keys.items()) == list(DENSE_SHAPES[key].items()) and not network.training
    assert network.decode_head.depth_range == heads.RANGES.get(dataset)


class Foreign:
    """Something that a pickle would run."""

    def __reduce__(self):
        return os.system, ("touch /tmp/should_not_exist",)


@pytest.fixture
def small_released(tmp_path, monkeypatch):
    """dinov2_vits14 in torch.hub's folder, a small network in its place; and that folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(model.ARCHS, "vit_small", dict(embed_dim=64, depth=4, num_heads=1))
    cache = tmp_path / "hub/checkpoints"
    cache.mkdir(parents=True)
    torch.save(randomize(hub.backbone("dinov2_vits14", pretrained=False)).state_dict(),
               cache / "dinov2_vits14_pretrain.pth")
    return cache


HEADS = {"linear": lambda: heads.LinearDepthHead(64, 1), "linear4": lambda: heads.LinearDepthHead(64),
         "dpt": lambda: heads.DPTHead(64)}


@pytest.mark.parametrize("kind", HEADS)
@torch.no_grad()
def test_dense_released_depth_files(kind, small_released):
    points, (suffix, kwargs) = hub.entry_points(), POINTS[kind]
    head = fill_by_names(HEADS[kind](), "decode_head.")
    file = as_released(head, small_released / f"dinov2_vits14_nyu_{kind}_head.pth")
    as_released(head, small_released / f"dinov2_vits14_kitti_{kind}_head.pth")
    images, make = randn(1, (1, 3, 50, 61))[0], partial(points[f"dinov2_vits14{suffix}"], **kwargs)
    expected = heads.Dense(hub.load("dinov2_vits14"), head).eval()(images)
    assert torch.equal(make()(images), expected) and torch.equal(make(weights=str(file))(images), expected)
    network, about = hub.load_dense("dinov2_vits14", f"nyu_{kind}")
    assert torch.equal(network(images), expected) and about == hub.About("depth", "nyu")
    assert make(weights="KITTI").decode_head.depth_range == (0.001, 80)
    literal = make(depth_range=(0.001, 80))(images)  # the official hub's way with NYU's linear heads
    assert (literal / expected).min() > 7.9 if kind != "dpt" else torch.equal(literal, expected)
    other = small_released / "mine.pth"
    shutil.copy(file, other)
    with pytest.raises(ValueError, match="does not say which depths it was trained for; give their range"):
        hub.load_dense("dinov2_vits14", other)
    assert torch.equal(hub.load_dense("dinov2_vits14", other, (0.001, 10))[0](images), expected)


@pytest.mark.parametrize("kind,layers", [("linear", 1), ("ms", 4)])
@pytest.mark.parametrize("dataset", heads.CLASSES)
@torch.no_grad()
def test_dense_released_segmentation_files(kind, layers, dataset, small_released):
    names = heads.CLASSES[dataset]
    head = fill_by_names(heads.SegmentationHead(64, len(names), layers), "decode_head.")
    file = as_released(head, small_released / f"dinov2_vits14_{dataset}_{kind}_head.pth", CLASSES=tuple(names))
    images = randn(1, (1, 3, 50, 61))[0]
    network, about = hub.load_dense("dinov2_vits14", f"{dataset}_{kind}")
    assert about == hub.About("seg", dataset, names, heads.colors(len(names), dataset), heads.RECIPES[dataset, kind])
    made = hub.entry_points()[f"dinov2_vits14_{kind[0]}s"](weights=dataset.upper())
    assert torch.equal(made(images), network(images)) and network(images).shape == (1, len(names), 50, 61)
    file = file.rename(small_released / "mine.pth")
    assert hub.load_dense("dinov2_vits14", file)[1] == about  # by the number of classes


def test_dense_files_that_do_not_fit(small_released, tmp_path):
    save = lambda head, name, **meta: as_released(head, tmp_path / name, **meta)  # noqa: E731
    load = partial(hub.load_dense, "dinov2_vits14")
    wide = save(heads.LinearDepthHead(96), "nyu_linear4_head.pth")
    short = heads.SegmentationHead(64, 21)
    del short.bn
    more = heads.DPTHead(64)
    more.extra = torch.nn.Linear(1, 1)
    for path, text in (
            (wide, "is the head of another backbone: it takes 768 channels; this one, 64 wide, gives 128 or 512"),
            (save(heads.DPTHead(96), "a_nyu_dpt_head.pth"), "takes 96 channels; this one, 64 wide, gives 64$"),
            (save(heads.SegmentationHead(96, 21), "voc2012_linear_head.pth"), "gives 64 or 256"),
            (save(short, "short.pth"), r"5 are missing"), (save(more, "b_nyu_dpt_head.pth"), "2 are unexp"),
            (small_released / "dinov2_vits14_pretrain.pth", "holds no depth or segmentation head"),
            ("nyu_dbt", "no such dense head: nyu_dbt, did you mean nyu_dpt"), ("missing.pth", "no such dense head")):
        with pytest.raises(ValueError, match=text):
            load(path)
    with pytest.raises(ValueError, match="nyu_dpt is a head of the released dinov2_vit{s,b,l,g}14, "
                                         "dinov2_vits14_reg is none"):
        hub.load_dense("dinov2_vits14_reg", "nyu_dpt")
    linear = save(heads.LinearDepthHead(64, 1), "nyu_linear_head.pth")
    segments = save(heads.SegmentationHead(64, 21), "s")
    points = {k: partial(v, weights=str(segments)) for k, v in hub.entry_points().items() if "vits14_" in k}
    for call, text in ((partial(points["dinov2_vits14_ld"], weights=str(linear)), "a head for layers=1"),
                       (partial(points["dinov2_vits14_dd"], weights=str(linear)), "is a linear head; call dinov2_._ld"),
                       (points["dinov2_vits14_dd"], "is a head for segmentation"),
                       (points["dinov2_vits14_ms"], "is a head for dinov2_._ls"),
                       (partial(points["dinov2_vits14_ls"], weights=str(linear)), "is a head for depth"),
                       (partial(points["dinov2_vits14_ld"], layers=2), "1 or 4 layers, not 2"),
                       (partial(points["dinov2_vits14_ld"], weights="SUN"), "neither 'NYU' nor 'KITTI'"),
                       (partial(points["dinov2_vits14_dd"], weights=str(linear), depth_range=(10, 1)), "two positive")):
        with pytest.raises(ValueError, match=text):
            call()


def test_dense_files_run_no_code(small_released, tmp_path):
    file = as_released(HEADS["linear"](), tmp_path / "nyu_linear_head.pth", hooks=Foreign())
    with pytest.raises(ValueError, match="holds pickled code, .* refused"):
        hub.load_dense("dinov2_vits14", file)
    assert not os.path.exists("/tmp/should_not_exist")


def test_dense_info(small_released, tmp_path, capsys):
    for head, texts in ((HEADS["linear4"](), ("linear", "one 64 wide")), (HEADS["dpt"](), ("DPT", "64 wide")),
                        (heads.SegmentationHead(64, 21), ("21 classes", "the last block of a backbone 64 wide"))):
        hub.main(["info", str(as_released(head, tmp_path / "head.pth"))])
        out = capsys.readouterr().out
        assert all(text in out for text in texts), out


def test_dense_heads_of_wider_backbones_are_told_by_their_names(tmp_path):
    """Four blocks of a network are as wide as one of a network four times as wide."""
    vit = model.build("vit_nano", embed_dim=256, num_heads=4, patch_size=8, img_size=16)
    for head, name in ((heads.SegmentationHead(64, 150, 4), "ade20k_ms"),
                       (heads.LinearDepthHead(64, 4), "nyu_linear4")):
        with pytest.raises(ValueError, match="is the head of another backbone"):
            hub.attach_dense_head(vit, as_released(head, tmp_path / f"dinov2_vits14_{name}_head.pth"))
    odd = as_released(heads.SegmentationHead(256, 151), tmp_path / "dinov2_vits14_ade20k_linear_head.pth")
    about = hub.attach_dense_head(vit, odd)[1]
    assert about.dataset == "" and len(about.classes) == len(set(about.colors)) == 151


def test_dense_odd_files_are_no_heads(tmp_path, capsys):
    for content in (dict(state_dict=None), dict(about=3), dict(state_dict=[1]), {}):
        torch.save(content, tmp_path / "odd.pth")
        with pytest.raises(ValueError, match="odd.pth holds no"):
            hub.read_dense_head(tmp_path / "odd.pth", hub_vit())
        with pytest.raises(ValueError, match="odd.pth holds no"):
            hub.main(["info", str(tmp_path / "odd.pth")])


@torch.no_grad()
def test_heads_of_extreme_photographs():
    network = heads.Dense(ToyBackbone(), fill_by_names(heads.SegmentationHead(3, 5, 4), "decode_head."))
    assert heads.scaled_size(2, 20000, 2048, 512) == (1, 2048)
    wide = torch.zeros(3, 2, 2000, dtype=torch.uint8)
    assert heads.segment(network, wide, heads.Recipe(20, 100, 20, 15)).shape == (5, 2, 2000)
    images = torch.zeros(1, 3, 30, 30)
    assert network.whole_inference(images, rescale=False).shape == (1, 5, 3, 3)
