"""DINOv2's dense heads: depth and segmentation from the features of a frozen backbone, in plain PyTorch.

    head = LinearDepthHead(384, layers=4)            # or DPTHead(384), SegmentationHead(384, n_classes=150, layers=1)
    features = backbone.get_intermediate_layers(images, head.taps(12), reshape=True, return_class_token=True,
                                                norm=head.norm)
    depth = head(features)                           # (B, 1, 4h, 4w), meters
    network = Dense(backbone, head)                  # both in one module: images (B, 3, H, W) of any size
    depth = network(images)                          # (B, 1, H, W)
    meters = predict_depth(network, photo)                                  # photo (3, H, W) uint8 -> (H, W)
    probabilities = segment(network, photo, RECIPES["ade20k", "linear"])    # (150, H, W)

This file needs only torch and may be copied on its own. Heads take features, not models: a list of pairs, patch tokens
(B, D, h, w) and CLS (B, D), one pair for each block that head.taps() names. Parameter names are those of the released
heads after `decode_head.`. Papers: DINOv2 (Oquab et al. 2023, arXiv 2304.07193, section 7.4), DPT (Ranftl et al. 2021,
arXiv 2103.13413), depth bins (Li et al. 2022, arXiv 2203.14211), the scale-invariant loss (Eigen et al. 2014, arXiv
1406.2283). Apache License 2.0.

Letters in shape comments
    B  images          D  width of the backbone      h, w  patch grid           H, W  pixels
    n  tapped blocks   c  channels of DPT            bins  candidate depths
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
RANGES = {"nyu": (0.001, 10.0), "kitti": (0.001, 80.0)}  # smallest and largest depth, in meters


def bilinear(x: Tensor, size, align_corners: bool = False) -> Tensor:
    """Resizes (B, c, H, W) to (B, c, *size) without antialiasing, as the heads do throughout."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)


def double(x: Tensor) -> Tensor:
    """Upsamples by 2 with aligned corners, which only DPT does."""
    return bilinear(x, [2 * n for n in x.shape[-2:]], align_corners=True)


def center_pad(x: Tensor, multiple: int) -> Tensor:
    """Zero-pads (B, C, H, W) on all sides to multiples of `multiple`; an odd pixel goes to the right or bottom."""
    (top, bottom), (left, right) = ((p // 2, p - p // 2) for p in (-n % multiple for n in x.shape[-2:]))
    return F.pad(x, (left, right, top, bottom))


# ----------------------------------------------------------------------------------------------------------------------
# Tapped blocks


def even_taps(n_blocks: int) -> tuple[int, ...]:
    """The last block of each quarter, except that the release taps block 4, not 5, of 24. Repeats if n_blocks < 4."""
    return (4, 11, 17, 23) if n_blocks == 24 else tuple(-(-(i + 1) * n_blocks // 4) - 1 for i in range(4))


def last_taps(n_blocks: int, n: int) -> tuple[int, ...]:
    return tuple(max(n_blocks - n + i, 0) for i in range(n))


# ----------------------------------------------------------------------------------------------------------------------
# Depth


class LinearDepthHead(nn.Module):
    """Features of 1 or 4 blocks -> depth (B, 1, 4h, 4w) in meters: a 1x1 convolution weights 256 bins, evenly spaced
    from `min_depth` to `max_depth`, and depth is their weighted mean (DINOv2, section 7.4, after AdaBins).

    `norm`: features are taken before the final LayerNorm. Raises ValueError unless `layers` is 1 or 4 and the depths
    form a range.
    """
    norm = False

    def __init__(self, dim: int, layers: int = 4, min_depth: float = 0.001, max_depth: float = 10.0, n_bins: int = 256):
        super().__init__()
        self.layers, self.depth_range = check_layers(layers), check_range(min_depth, max_depth)
        self.conv_depth = nn.Conv2d(2 * dim * layers, n_bins, 1)

    def taps(self, n_blocks: int) -> tuple[int, ...]:
        return even_taps(n_blocks) if self.layers == 4 else last_taps(n_blocks, 1)

    def forward(self, features: list[tuple[Tensor, Tensor]]) -> Tensor:
        x = torch.cat([t for patches, cls in features for t in (patches, expand(cls, patches))], 1)  # (B, 2*n*D, h, w)
        # The official code upsamples all 2*n*D channels (12,288 for ViT-g) before the convolution. The order does not
        # matter, since both are linear and bilinear weights sum to 1; this way only 256 channels are upsampled.
        x = bilinear(self.conv_depth(x), [4 * n for n in x.shape[-2:]])  # (B, bins, 4h, 4w)
        x = F.relu(x) + 0.1
        depths = torch.linspace(*self.depth_range, x.shape[1], device=x.device, dtype=x.dtype)
        return (x * depths[:, None, None]).sum(1, keepdim=True) / x.sum(1, keepdim=True)


class DPTHead(nn.Module):
    """Features of 4 blocks -> depth (B, 1, 32*ceil(h/2), 32*ceil(w/2)) in meters, at least `min_depth`. The dense
    prediction transformer reassembles four maps, fine to coarse, and fuses them from coarse to fine (DPT, section 3,
    with the CLS token as readout). Raises ValueError unless the depths form a range."""
    norm = False

    def __init__(self, dim: int, min_depth: float = 0.001, max_depth: float = 10.0, channels: int = 256):
        super().__init__()
        self.depth_range = check_range(min_depth, max_depth)
        widths = [dim // 8, dim // 4, dim // 2, dim]
        self.conv_depth = DepthOutput(channels)
        self.reassemble_blocks = Reassemble(dim, widths)
        self.convs = nn.ModuleList(Conv(width, channels, 3, bias=False) for width in widths)
        self.fusion_blocks = nn.ModuleList(Fusion(channels, first=i == 0) for i in range(4))
        self.project = Conv(channels, channels, 3)

    def taps(self, n_blocks: int) -> tuple[int, ...]:
        return even_taps(n_blocks)

    def forward(self, features: list[tuple[Tensor, Tensor]]) -> Tensor:
        maps = [conv(x) for conv, x in zip(self.convs, self.reassemble_blocks(features))]  # (B, c, 4h, 4w), ..., (h/2)
        x = self.fusion_blocks[0](maps[3])
        for fuse, finer in zip(self.fusion_blocks[1:], maps[2::-1]):
            x = fuse(x, finer)
        return F.relu(self.conv_depth(F.relu(self.project(x)))) + self.depth_range[0]


class Conv(nn.Module):
    """A size-preserving convolution, under the parameter names of the released weights."""

    def __init__(self, dim: int, out_dim: int, kernel: int, bias: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, kernel, padding=kernel // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Reassemble(nn.Module):
    """Four pairs of patches (B, D, h, w) and CLS (B, D) -> maps with `widths` channels at 4, 2, 1 and 1/2 times the
    resolution of the patch grid."""

    def __init__(self, dim: int, widths: list[int]):
        super().__init__()
        self.projects = nn.ModuleList(Conv(dim, width, 1) for width in widths)
        self.resize_layers = nn.ModuleList([
            nn.ConvTranspose2d(widths[0], widths[0], 4, stride=4),
            nn.ConvTranspose2d(widths[1], widths[1], 2, stride=2), nn.Identity(),
            nn.Conv2d(widths[3], widths[3], 3, stride=2, padding=1)])
        self.readout_projects = nn.ModuleList(nn.Sequential(nn.Linear(2 * dim, dim), nn.GELU()) for _ in widths)

    def forward(self, features: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        maps = []
        for (patches, cls), read, project, change in zip(features, self.readout_projects, self.projects,
                                                         self.resize_layers, strict=True):
            x = torch.cat([patches, expand(cls, patches)], 1).permute(0, 2, 3, 1)  # (B, h, w, 2D)
            maps.append(change(project(read(x).permute(0, 3, 1, 2))))
        return maps


class Fusion(nn.Module):
    """A map (B, c, h, w) and, except for the first, a finer map of about that size to add -> (B, c, 2h, 2w)."""

    def __init__(self, channels: int, first: bool):
        super().__init__()
        self.project = Conv(channels, channels, 1)
        if not first:
            self.res_conv_unit1 = Residual(channels)
        self.res_conv_unit2 = Residual(channels)

    def forward(self, x: Tensor, finer: Tensor | None = None) -> Tensor:
        if finer is not None:  # if the grid is odd, the upsampled coarsest map is slightly larger than the next
            x = x + self.res_conv_unit1(bilinear(finer, x.shape[-2:]) if finer.shape != x.shape else finer)
        return self.project(double(self.res_conv_unit2(x)))


class Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = Conv(channels, channels, 3, bias=False)
        self.conv2 = Conv(channels, channels, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class DepthOutput(nn.Module):
    """(B, c, h, w) -> (B, 1, 2h, 2w)."""

    def __init__(self, channels: int):
        super().__init__()
        upsample = nn.UpsamplingBilinear2d(scale_factor=2)  # with aligned corners
        self.head = nn.Sequential(nn.Conv2d(channels, channels // 2, 3, padding=1), upsample,
                                  nn.Conv2d(channels // 2, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def expand(cls: Tensor, patches: Tensor) -> Tensor:
    """CLS (B, D) repeated at every position of the grid, (B, D, h, w)."""
    return cls[..., None, None].expand_as(patches)


def check_layers(layers: int) -> int:
    if layers not in (1, 4):
        raise ValueError(f"linear heads take the features of 1 or 4 blocks, not {layers}")
    return layers


def check_range(min_depth: float, max_depth: float) -> tuple[float, float]:
    if not 0 < min_depth < max_depth < float("inf"):
        raise ValueError(f"a depth range is two positive numbers, such as 0.001 10, not {min_depth} {max_depth}")
    return float(min_depth), float(max_depth)


# ----------------------------------------------------------------------------------------------------------------------
# Segmentation


class SegmentationHead(nn.Module):
    """Features -> logits (B, classes, h, w): batch normalization and a 1x1 convolution on the patch tokens of the last
    block (layers=1, the "linear" head) or of the last 4 (layers=4, "+ms"; DINOv2, section 7.4).

    `norm`: features are taken after the final LayerNorm. CLS is not used. Raises ValueError unless `layers` is 1 or 4.
    """
    norm, depth_range = True, None

    def __init__(self, dim: int, n_classes: int, layers: int = 1):
        super().__init__()
        self.layers = check_layers(layers)
        self.conv_seg = nn.Conv2d(layers * dim, n_classes, 1)
        self.bn = nn.BatchNorm2d(layers * dim)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def taps(self, n_blocks: int) -> tuple[int, ...]:
        return last_taps(n_blocks, self.layers)

    def forward(self, features: list[tuple[Tensor, Tensor]]) -> Tensor:
        return self.conv_seg(self.bn(torch.cat([patches for patches, _ in features], 1)))


# ----------------------------------------------------------------------------------------------------------------------
# Backbone and head together


class Dense(nn.Module):
    """Normalized images (B, C, H, W) of any size -> depth (B, 1, H, W) in meters within the head's range, or logits
    (B, classes, H, W). Images are zero-padded to multiples of the patch size. As in the official code, the prediction
    for the padded image is then resized to the size of the image, not cropped."""

    def __init__(self, backbone: nn.Module, decode_head: nn.Module):
        super().__init__()
        self.backbone, self.decode_head = backbone, decode_head

    def features(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The head's input: (patches (B, D, h, w), CLS (B, D)) of each block that it taps."""
        taps, images = self.decode_head.taps(self.backbone.n_blocks), center_pad(images, self.backbone.patch_size)
        blocks = sorted(set(taps))
        outs = self.backbone.get_intermediate_layers(images, blocks, reshape=True, return_class_token=True,
                                                     norm=self.decode_head.norm)
        return [outs[blocks.index(tap)] for tap in taps]

    def predict(self, features: list[tuple[Tensor, Tensor]], size=None) -> Tensor:
        """The head's prediction, resized to `size` (height, width); without `size`, at the head's own resolution."""
        x, limits = self.decode_head(features), self.decode_head.depth_range
        x = x if limits is None else x.clamp(*limits)
        return x if size is None else bilinear(x, size)

    def forward(self, images: Tensor) -> Tensor:
        return self.predict(self.features(images), images.shape[-2:])

    def whole_inference(self, img: Tensor, img_meta: None = None, rescale: bool = True) -> Tensor:
        """forward() under its official name; without `rescale`, at the head's own resolution."""
        if img_meta is not None:
            raise ValueError("img_meta belongs to mmcv, which is not used here; leave it None")
        return self(img) if rescale else self.predict(self.features(img))


# ----------------------------------------------------------------------------------------------------------------------
# Inference on whole photographs


class Recipe(NamedTuple):
    """How a photograph is segmented. It is resized so that the short side is `short` pixels (but the long side at most
    `long`), times each of `ratios`, and cut into windows of `crop` pixels every `stride`, averaged where they overlap.
    With `flip`, its mirror image is segmented too. Probabilities are averaged over all views. Sides are rounded up to a
    multiple of `multiple`, for networks that do not pad. `at_once`: windows per batch."""
    short: int = 512
    long: int = 99999999
    crop: int = 512
    stride: int = 341
    ratios: tuple[float, ...] = (1.0,)
    flip: bool = False
    multiple: int = 1
    at_once: int = 4


MULTI_SCALE = Recipe(640, crop=640, stride=320, ratios=(1.0, 1.32, 1.73, 2.28, 3.0), flip=True)
RECIPES = {("ade20k", "linear"): Recipe(), ("voc2012", "linear"): Recipe(long=2048), ("ade20k", "ms"): MULTI_SCALE,
           ("voc2012", "ms"): MULTI_SCALE, ("ade20k", "m2f"): Recipe(896, 3584, 896, 512, multiple=32, at_once=1)}


def scaled_size(height: int, width: int, long: int, short: int) -> tuple[int, int]:
    """The largest size of this aspect ratio with a long side <= `long` and a short side <= `short`, rounded as mmcv
    does."""
    factor = min(long / max(height, width), short / min(height, width))
    return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)


def resize_as_opencv(image: Tensor, size) -> Tensor:
    """Resizes pixels (C, H, W) to whole numbers in float32, (C, *size); bilinear without antialiasing. Within one gray
    level of OpenCV, which the released segmentation heads were trained and tested with."""
    return bilinear(image[None].float(), size)[0].round()


def to_input(pixels: Tensor, dtype: torch.dtype, mean, std) -> Tensor:
    """Pixels (C, H, W) in float32, of an image of uint8 or uint16 (`dtype`) -> normalized (1, C, H, W)."""
    mean, std = (pixels.new_tensor(v)[:, None, None] for v in (mean, std))
    return ((pixels / torch.iinfo(dtype).max - mean) / std)[None]


def slide(network, images: Tensor, crop: int, stride: int, batch_size: int = 4) -> Tensor:
    """Sliding-window inference, (B, C, H, W) -> (B, c, H, W): windows of `crop` pixels (at most the side of the image)
    every `stride`, averaged where they overlap. The last window is shifted to end at the border."""
    starts = []
    for side in images.shape[-2:]:
        ends = [min(i * stride + crop, side) for i in range(max(side - crop + stride - 1, 0) // stride + 1)]
        starts.append([max(end - crop, 0) for end in ends])
    height, width = (min(crop, side) for side in images.shape[-2:])
    places, total = [(y, x) for y in starts[0] for x in starts[1]], None
    count = images.new_zeros(images.shape[-2:])
    for some in (places[i : i + batch_size] for i in range(0, len(places), batch_size)):
        out = network(torch.cat([images[..., y : y + height, x : x + width] for y, x in some])).float()
        total = out.new_zeros(len(images), out.shape[1], *images.shape[-2:]) if total is None else total
        for (y, x), part in zip(some, out.split(len(images))):
            total[..., y : y + height, x : x + width] += part
            count[y : y + height, x : x + width] += 1
    return total.div_(count)


@torch.inference_mode()
def segment(network, image: Tensor, recipe: Recipe, mean=MEAN, std=STD) -> Tensor:
    """Class probabilities (classes, H, W) of a photograph (C, H, W), uint8 or uint16, on its device. `network` maps
    normalized images to logits of the same size, as Dense does."""
    size, total = image.shape[-2:], None
    for ratio in recipe.ratios:
        scaled = scaled_size(*size, int(recipe.long * ratio), int(recipe.short * ratio))
        view = resize_as_opencv(image, scaled)
        if any(n % recipe.multiple for n in scaled):
            view = resize_as_opencv(view, [-(-n // recipe.multiple) * recipe.multiple for n in scaled])
        view = to_input(view, image.dtype, mean, std)
        for mirrored in (False, True) if recipe.flip else (False,):
            x = slide(network, view.flip(-1) if mirrored else view, recipe.crop, recipe.stride, recipe.at_once)
            x = bilinear(x, size)[0]  # (classes, H, W), possibly most of the memory: softmax in place
            x = x.sub_(x.amax(0)).exp_().div_(x.sum(0))
            x = x.flip(-1) if mirrored else x
            total = x if total is None else total.add_(x)
    return total.div_(len(recipe.ratios) * (1 + recipe.flip))


@torch.inference_mode()
def predict_depth(network, image: Tensor, mean=MEAN, std=STD, short: int = 0,
                  flip: bool = False) -> Tensor:
    """Depth (H, W), in meters, of a photograph (C, H, W), uint8 or uint16, on its device. `network` maps normalized
    images to depth of the same size, as Dense does. `short`: resize to this short side first (bicubic, antialiased);
    `flip`: average with the prediction for the mirror image."""
    size, pixels = image.shape[-2:], image.float()
    if short:
        scaled = [max(round(n * short / min(size)), 1) for n in size]
        pixels = F.interpolate(pixels[None], scaled, mode="bicubic", antialias=True)[0]
        pixels = pixels.round().clamp(0, torch.iinfo(image.dtype).max)
    return bilinear(estimate_depth(network, to_input(pixels, image.dtype, mean, std), flip), size)[0, 0]


@torch.inference_mode()
def estimate_depth(network, images: Tensor, flip: bool = False) -> Tensor:
    """Normalized images (B, C, H, W) -> depth (B, 1, H, W), with `flip` averaged with that of the mirror images."""
    if not flip:
        return network(images)
    depth, mirrored = network(torch.cat([images, images.flip(-1)])).chunk(2)
    return (depth + mirrored.flip(-1)) / 2


# ----------------------------------------------------------------------------------------------------------------------
# Losses


def log_difference(depth: Tensor, target: Tensor, max_depth: float | None) -> tuple[Tensor, Tensor]:
    """log(depth + 1 mm) - log(target + 1 mm), and where the target is known (bool); both shaped like the target."""
    known = target > 0 if max_depth is None else (target > 0) & (target <= max_depth)
    difference = torch.log(depth + 0.001) - torch.log(torch.where(known, target, depth.detach()) + 0.001)
    return difference, known


def sig_loss(depth: Tensor, target: Tensor, max_depth: float | None = None, warm_up: bool = False) -> Tensor:
    """The scale-invariant log-depth loss (Eigen et al. 2014, equation 4, with a square root and 0.15 for lambda), over
    pixels with 0 < target <= `max_depth`; 0 if there are none. `warm_up`: only the term of the mean, as in the first
    hundred official steps. Both tensors are (B, 1, H, W), in meters."""
    difference, known = log_difference(depth, target, max_depth)
    g = difference[known]
    if g.numel() == 0:
        return 0.0 * depth.sum()
    if warm_up or g.numel() == 1:
        return 0.15**0.5 * g.mean().abs()
    return (g.var() + 0.15 * g.mean() ** 2).clamp(min=1e-12).sqrt()  # the gradient of sqrt is infinite at 0


def gradient_loss(depth: Tensor, target: Tensor, max_depth: float | None = None) -> Tensor:
    """Difference between the gradients of log-depth, over two pixels, at strides 1, 2, 4 and 6 (MegaDepth, Li and
    Snavely 2018, arXiv 1804.00607, equation 5). The official code differentiates along the wrong axes, which yields 0
    for its batches of two images: the released heads were trained without this loss."""
    difference, known = log_difference(depth, target, max_depth)
    total, mask = difference.new_zeros(()), known.to(difference.dtype)
    for stride in (1, 2, 4, 6):
        g, m = difference[..., ::stride, ::stride], mask[..., ::stride, ::stride]
        down = ((g[..., :-2, :] - g[..., 2:, :]).abs() * m[..., :-2, :] * m[..., 2:, :]).sum()
        across = ((g[..., :-2] - g[..., 2:]).abs() * m[..., :-2] * m[..., 2:]).sum()
        total = total + (down + across) / m.sum().clamp(min=1)
    return total


def segmentation_loss(logits: Tensor, labels: Tensor, ignore: int = 255) -> Tensor:
    """Cross-entropy of logits (B, classes, h, w), upsampled to the labels (B, H, W). As in the official code, the sum
    over labeled pixels is divided by the number of all pixels."""
    return F.cross_entropy(bilinear(logits, labels.shape[-2:]), labels.long(), ignore_index=ignore,
                           reduction="sum") / labels.numel()


# ----------------------------------------------------------------------------------------------------------------------
# Names and colors of classes


ADE20K = """wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth,
door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field,
armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of
drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table,
pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench,
countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light,
truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel, pole, land,
bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer,
plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank,
trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic
light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag"""
VOC2012 = """background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse,
motorbike, person, pottedplant, sheep, sofa, train, tvmonitor"""
CLASSES = {name: [s.strip() for s in text.replace("\n", " ").split(",")] for name, text in
           (("ade20k", ADE20K), ("voc2012", VOC2012))}
ADE20K_COLORS = (  # of class 0, 1, ..., six hexadecimal digits each
    "787878b4787806e6e650323204c8037878508c8c8ccc05ffe6e6e604fa07e005ffebff0796053d78784608ff33ff06528fff8cccff04"
    "ff3307cc46030066c83de6faff06330b66ffff0747ff09e00907e6dcdcdcff095c7009ff08ffd607ffe0ffb8060aff47ff290a07ffff"
    "e0ff086608ffff3d06ffc207ff7a0800ff14ff0829ff05990633ffeb0cffa0961400a3ff8c8c8cfa0a0f14ff001fff00ff1f00ffe000"
    "99ff000000ffff470000ebff00adff1f00ff0bc8c8ff520000fff5003dff00ff7000ff85ff0000ffa300ff6600c2ff00008fff33ff00"
    "0052ff00ff2900ffad0a00ffadff0000ff99ff5c00ff00ffff00f5ff0066ffad00ff0014ffb8b8001fff00ff3d0047ffff00cc00ffc2"
    "00ff52000aff0070ff3300ff00c2ff007aff00ffa3ff990000ff0aff70008fff005200ffa3ff00ffeb0008b8aa8500ff00ff5cb800ff"
    "ff001f00b8ff00d6ffff00705cff0000e0ff70e0ff46b8a0a300ff9900ff47ff00ff00a3ffcc00ff008f00ffeb85ff00ff00ebf500ff"
    "ff007afff5000abed4d6ff0000ccff1400ffffff000099ff0029ff00ffcc2900ff29ff00ad00ff00f5ff4700ff7a00ff00ffb8005cff"
    "b8ff000085ffffd60019c2c266ff005c00ff")


def colors(n_classes: int, dataset: str = "") -> list[tuple[int, int, int]]:
    """(red, green, blue), 0 to 255, of each class: ADE20K's own palette, otherwise VOC's, which spreads the bits of the
    class number over the three channels and so extends beyond 21 classes."""
    if dataset == "ade20k":
        return [tuple(bytes.fromhex(ADE20K_COLORS[6 * k : 6 * k + 6])) for k in range(n_classes)]
    return [tuple(sum((k >> 3 * bit + channel & 1) << 7 - bit for bit in range(8)) for channel in range(3))
            for k in range(n_classes)]
