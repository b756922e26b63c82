"""The DINOv2 vision transformer and its projection head, in plain PyTorch.

    model = build("vit_small", patch_size=14, img_size=518)   # random weights, ready to train
    cls = model(images)                                       # (B, D), images (B, 3, h*14, w*14)
    out = model.forward_features(images)                      # dict: x_norm_clstoken, x_norm_patchtokens, ...
    outs = model.forward_features([globals_, locals_], [masks, None])  # two resolutions in one pass
    model = load_backbone("out/ckpt.pth")                     # a checkpoint of train.py, or a released DINOv2 backbone

Letters in shape comments
    B  images       N     tokens per image    D  width         H  attention heads
    R  registers    h, w  patch grid          p  patch size    T  tokens of all crop batches, packed
    C  channels     K     prototypes
Tokens are ordered [CLS, R registers, h*w patches in row-major order].

This file needs only torch and can be copied on its own. Attributes and parameters have the names of the released DINOv2
weights, so loading is strict and renames nothing. Papers: DINOv2 (Oquab et al. 2023, arXiv 2304.07193), ViT
(Dosovitskiy et al. 2020, arXiv 2010.11929), registers (Darcet et al. 2023, arXiv 2309.16588). Apache License 2.0.
"""
import re
import warnings
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ARCHS = {
    "vit_nano": dict(embed_dim=64, depth=3, num_heads=2),        # 0.15 M parameters: digits, tests
    "vit_micro": dict(embed_dim=128, depth=4, num_heads=4),      # 0.8 M: Fashion-MNIST on a laptop
    "vit_tiny": dict(embed_dim=192, depth=12, num_heads=3),      # 5.5 M
    "vit_small": dict(embed_dim=384, depth=12, num_heads=6),     # 22 M, released
    "vit_base": dict(embed_dim=768, depth=12, num_heads=12),     # 86 M, released
    "vit_large": dict(embed_dim=1024, depth=24, num_heads=16),   # 304 M, released
    "vit_giant2": dict(embed_dim=1536, depth=40, num_heads=24),  # 1.1 B, released, with ffn_layer="swiglufused"
}


def build(arch: str, **kwargs) -> "DinoVisionTransformer":
    """A network with random weights. `kwargs` go to DinoVisionTransformer. Raises ValueError for an unknown name."""
    if arch not in ARCHS:
        raise ValueError(f"unknown architecture {arch!r}; choose one of {', '.join(ARCHS)}")
    return DinoVisionTransformer(**{**ARCHS[arch], **kwargs})


# ----------------------------------------------------------------------------------------------------------------------
# Packing. Crop batches of different resolutions go through the token-wise layers as one (1, T, D) tensor; `shapes`
# lists the (B, N) of each batch. A single batch stays (B, N, D), which is also what forward hooks expect.


def pack(batches: list[Tensor]) -> Tensor:
    """Tensors (B, N, D) -> (1, T, D); a single one is returned as it is."""
    return batches[0] if len(batches) == 1 else torch.cat([x.flatten(0, 1) for x in batches])[None]


def unpack(x: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
    """The inverse of pack: (1, T, D) -> tensors (B, N, D)."""
    if len(shapes) == 1:
        return [x]
    return [rows.view(b, n, -1) for rows, (b, n) in zip(x.split([b * n for b, n in shapes], dim=1), shapes)]


# ----------------------------------------------------------------------------------------------------------------------
# Layers


class PatchEmbed(nn.Module):
    """Images (B, C, h*p, w*p) -> patch tokens (B, h*w, D). Raises ValueError if a side is not a multiple of p."""

    def __init__(self, img_size=224, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768):
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if height % patch_size or width % patch_size:
            raise ValueError(f"image size {height}x{width} is not a multiple of the patch size {patch_size}")
        self.img_size, self.patch_size = (height, width), (patch_size, patch_size)
        self.patches_resolution = (height // patch_size, width // patch_size)
        self.num_patches = self.patches_resolution[0] * self.patches_resolution[1]
        self.in_chans, self.embed_dim, self.flatten_embedding = in_chans, embed_dim, True
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        height, width, p = *x.shape[-2:], self.patch_size[0]
        if height % p or width % p:
            better = f"{max(height // p, 1) * p}x{max(width // p, 1) * p}"
            raise ValueError(f"{height}x{width} is not a multiple of the patch size {p}; resize or crop to {better}")
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))  # (B, h*w, D)


class Attention(nn.Module):
    """Multi-head self-attention within each image.

    PyTorch's attention runs once per crop batch. If `kernel` is set on a module, it replaces that and handles all crop
    batches in one call: kernel(qkv (T, 3, H, D/H), [B of each batch], [N of each batch], scale) -> (T, H, D/H). See
    kernels/attention.py for one.
    """

    kernel = None

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = True, proj_bias: bool = True):
        super().__init__()
        if not isinstance(num_heads, int) or num_heads < 1 or dim % num_heads:
            raise ValueError(f"width {dim} is not a multiple of the number of heads {num_heads!r}")
        self.dim, self.num_heads, self.scale = dim, num_heads, (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(0.0)  # these dropouts exist for hooks; at rate 0 they cost nothing
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor, shapes: list[tuple[int, int]] | None = None) -> Tensor:
        shapes, qkv, heads = shapes or [x.shape[:2]], self.qkv(x), (3, self.num_heads, -1)  # qkv (..., 3*D)
        if self.kernel is not None:
            batches, lengths = map(list, zip(*shapes))
            out = self.kernel(qkv.flatten(0, 1).unflatten(-1, heads), batches, lengths, self.scale)  # (T, H, D/H)
            return self.proj_drop(self.proj(out.view(x.shape)))
        outs = []
        for batch in unpack(qkv, shapes):
            q, k, v = batch.unflatten(-1, heads).unbind(2)  # each (B, N, H, D/H)
            # Views, no copies: unbinding before transposing makes the backward pass write one gradient laid out as qkv.
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # each (B, H, N, D/H)
            outs.append(self.attend(q, k, v).transpose(1, 2).flatten(2))  # (B, N, D)
        return self.proj_drop(self.proj(pack(outs)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Softmax attention, (B, H, N, D/H). The probabilities (B, H, N, N) are computed only if attn_drop has hooks,
        which then see them."""
        if not (self.attn_drop._forward_hooks or self.attn_drop._forward_pre_hooks):
            return F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.attn_drop((self.scale * q @ k.transpose(-2, -1)).softmax(-1)) @ v


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, act_layer=nn.GELU, bias: bool = True):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden, dim, bias=bias)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class SwiGLUFFN(nn.Module):
    """Gated feed-forward layer (Shazeer 2020). Its hidden width is 2/3 of the MLP's, rounded up to a multiple of 8, so
    that both have about the same number of parameters. The gate is always SiLU, whatever `act_layer` says, as in the
    released models."""

    def __init__(self, dim: int, hidden: int, act_layer=None, bias: bool = True):
        super().__init__()
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * hidden, bias=bias)
        self.w3 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


FFNS = {"mlp": Mlp, "swiglu": SwiGLUFFN, "swiglufused": SwiGLUFFN, "identity": lambda *_, **__: nn.Identity()}


class LayerScale(nn.Module):
    def __init__(self, dim: int, init_values: float):
        super().__init__()
        self.init_value, self.gamma = float(init_values), nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.init_value)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale and stochastic depth.

    `x` is (B, N, D), or (1, T, D) with `shapes` listing the (B, N) of the crop batches packed in it; the output has the
    same shape. Stochastic depth skips dropped images (DINOv2, section 5), see add_to_subset; `orders` holds a pair per
    crop batch, for the attention and the feed-forward branch.
    """

    def __init__(self, dim, num_heads, mlp_ratio=4.0, qkv_bias=True, proj_bias=True, ffn_bias=True, drop_path=0.0,
                 init_values=None, act_layer=nn.GELU, ffn_layer=Mlp):
        super().__init__()
        self.sample_drop_ratio = drop_path
        self.drop_path1, self.drop_path2 = nn.Identity(), nn.Identity()  # for other code; see add_to_subset
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias, proj_bias)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ffn_layer(dim, int(dim * mlp_ratio), act_layer=act_layer, bias=ffn_bias)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()

    def attn_branch(self, x: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        return self.ls1(self.attn(self.norm1(x), shapes))

    def ffn_branch(self, x: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        return self.ls2(self.mlp(self.norm2(x)))

    def forward(self, x: Tensor, shapes: list[tuple[int, int]] | None = None, orders: list | None = None) -> Tensor:
        shapes = shapes or [x.shape[:2]]
        for i, branch in enumerate((self.attn_branch, self.ffn_branch)):
            if self.training and self.sample_drop_ratio > 0.0:
                x = add_to_subset(x, shapes, branch, self.sample_drop_ratio, orders and [o[i] for o in orders])
            else:
                x = x + branch(x, shapes)
        return x


class BlockChunk(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


def add_to_subset(x: Tensor, shapes: list[tuple[int, int]], branch, rate: float, orders: list | None = None) -> Tensor:
    """Stochastic depth: adds `branch` to a random subset of floor(B * (1 - rate)) images (at least one) of each crop
    batch, scaled up by B over their number. The other images pass unchanged and cost nothing.

    `orders` fixes the subset: for each crop batch an int64 tensor (groups, B / groups), whose rows list the images of a
    group in random order; the first ones of each group are computed. Without it, the subset is drawn at each call.
    """
    indices, subset_shapes, start = [], [], 0  # per crop batch: the tokens to compute, as indices into T
    for i, (b, n) in enumerate(shapes):
        order = orders[i] if orders else torch.randperm(b, device=x.device)[None]  # (groups, B / groups)
        images = order[:, : max(int(order.shape[1] * (1 - rate)), 1)].flatten()
        indices.append((start + images[:, None] * n + torch.arange(n, device=x.device)).flatten())
        subset_shapes.append((len(images), n))
        start += b * n
    flat = x.flatten(0, 1)  # (T, D)
    subset = flat[torch.cat(indices)]
    subset = subset.view(*subset_shapes[0], -1) if len(shapes) == 1 else subset[None]
    updates = branch(subset, subset_shapes).flatten(0, 1).to(x.dtype).split([len(index) for index in indices])
    scales = [b / m for (b, _), (m, _) in zip(shapes, subset_shapes)]
    flat = flat.index_add(0, indices[0], updates[0], alpha=scales[0])  # copies x once; further batches add in place
    for index, update, scale in zip(indices[1:], updates[1:], scales[1:]):
        flat.index_add_(0, index, update, alpha=scale)
    return flat.view_as(x)


# ----------------------------------------------------------------------------------------------------------------------
# Backbone


class DinoVisionTransformer(nn.Module):
    """The DINOv2 vision transformer; arguments, attributes and parameters have the names of the official release.
    Arguments beyond those of a plain ViT:
        img_size: side, or (height, width), in pixels, of the images that the position embedding is for.
        init_values: initial LayerScale; None or 0 for no LayerScale. Training uses 1e-5.
        ffn_layer: "mlp", "swiglu" (= "swiglufused": gate and value in one matrix) or "identity".
        block_chunks: n > 0 stores the blocks as n nested lists with keys `blocks.{chunk}.{block}.…`; 0, as a flat list.
        drop_path_rate, drop_path_uniform: rate of stochastic depth, the same in all blocks or rising linearly from 0.
        num_register_tokens: extra learned tokens after CLS, without position embedding.
        interpolate_offset, interpolate_antialias: how the position embedding is resized for other image sizes:
            (0.1, False) for training and for the released models without registers, (0.0, True) for those with.
    """

    def __init__(self, img_size=224, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768, depth: int = 12,
                 num_heads: int = 12, mlp_ratio: float = 4.0, qkv_bias: bool = True, ffn_bias: bool = True,
                 proj_bias: bool = True, drop_path_rate: float = 0.0, drop_path_uniform: bool = False,
                 init_values: float | None = None, embed_layer=PatchEmbed, act_layer=nn.GELU, block_fn=Block,
                 ffn_layer: str = "mlp", block_chunks: int = 1, num_register_tokens: int = 0,
                 interpolate_antialias: bool = False, interpolate_offset: float = 0.1):
        super().__init__()
        if ffn_layer not in FFNS:
            raise ValueError(f"unknown ffn_layer {ffn_layer!r}; choose one of {', '.join(FFNS)}")
        if not 0 <= interpolate_offset < 1 or not 0 <= drop_path_rate <= 1:
            raise ValueError(f"impossible: interpolate_offset {interpolate_offset}, drop_path_rate {drop_path_rate}")
        self.num_features = self.embed_dim = embed_dim
        self.num_tokens = 1  # CLS only, also with registers, as officially
        self.n_blocks, self.num_heads, self.patch_size = depth, num_heads, patch_size
        self.num_register_tokens = num_register_tokens
        self.interpolate_antialias, self.interpolate_offset = bool(interpolate_antialias), interpolate_offset
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.position_grid = (height // patch_size, width // patch_size)
        patch_embed = embed_layer(img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patch_embed.num_patches, embed_dim))
        self.register_tokens = (
            nn.Parameter(torch.zeros(1, num_register_tokens, embed_dim)) if num_register_tokens else None)
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))
        self.patch_embed = patch_embed

        ramp = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        blocks = [
            block_fn(dim=embed_dim, num_heads=num_heads, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, proj_bias=proj_bias,
                     ffn_bias=ffn_bias, drop_path=drop_path_rate if drop_path_uniform else ramp[i],
                     init_values=init_values, act_layer=act_layer, ffn_layer=FFNS[ffn_layer])
            for i in range(depth)]
        self.chunked_blocks = block_chunks > 0
        if self.chunked_blocks:  # padding with Identity keeps the block number in the inner key
            size = max(depth // block_chunks, 1)
            blocks = [BlockChunk([nn.Identity()] * i + blocks[i : i + size]) for i in range(0, depth, size)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Identity()
        self.init_weights()

    def init_weights(self, std: float = 0.02, pos_std: float = 0.02) -> None:
        self.apply(partial(init_parameters, std=std, pos_std=pos_std))

    def block_list(self) -> list[nn.Module]:
        """The transformer blocks in order, whether they are stored flat or in chunks."""
        if not self.chunked_blocks:
            return list(self.blocks)
        return [block for chunk in self.blocks for block in chunk if not isinstance(block, nn.Identity)]

    def interpolate_pos_encoding(self, x: Tensor, height: int, width: int) -> Tensor:
        """The position embedding (1, 1+h*w, D) for images of height x width pixels, in the dtype of x (B, 1+h*w, D)."""
        sides = [int(side) if isinstance(side, Tensor) else side for side in (height, width)]  # tensors if traced
        grid, table_grid = tuple(side // self.patch_size for side in sides), self.position_grid
        if (n := int(self.pos_embed.shape[1]) - 1) != table_grid[0] * table_grid[1]:  # replaced by hand
            table_grid = (round(n**0.5), round(n**0.5))
        if grid == table_grid:
            return self.pos_embed
        table = self.pos_embed.float()
        patches = table[:, 1:].unflatten(1, table_grid).permute(0, 3, 1, 2)  # (1, D, rows, columns)
        # Released models without registers were trained with scale factors of (grid + 0.1) / side, not grid / side.
        offset = self.interpolate_offset
        scales = tuple((wanted + offset) / given for wanted, given in zip(grid, table_grid))
        target = dict(scale_factor=scales) if offset else dict(size=grid)
        interpolate = partial(F.interpolate, mode="bicubic", antialias=self.interpolate_antialias, **target)
        if torch.are_deterministic_algorithms_enabled():  # interpolation is not, on GPUs; so as a matrix product
            eye = torch.eye(patches[0, 0].numel(), device=table.device)
            basis = interpolate(eye.unflatten(1, (1, *table_grid)))  # (rows * columns, 1, h, w)
            patches = (patches.flatten(2).double() @ basis.flatten(1).double()).unflatten(2, basis.shape[2:]).float()
        elif torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():  # by the exporter without dynamo
            patches = untraced(interpolate, patches)
        else:
            patches = interpolate(patches)  # (1, D, h, w)
        assert patches.shape[-2:] == grid, f"interpolated to {tuple(patches.shape[-2:])}, wanted {grid}"
        return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1).to(x.dtype)  # (1, 1+h*w, D)

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Images (B, C, h*p, w*p) -> tokens (B, 1+R+h*w, D). Where `masks` (B, h*w) is True, mask_token replaces the
        patch."""
        height, width = x.shape[-2:]
        x = self.patch_embed(x)
        if masks is not None:
            x = torch.where(masks[..., None], self.mask_token.to(x.dtype)[None], x)
        x = torch.cat([self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self.interpolate_pos_encoding(x, height, width)
        if self.register_tokens is not None:
            x = torch.cat([x[:, :1], self.register_tokens.to(x.dtype).expand(x.shape[0], -1, -1), x[:, 1:]], dim=1)
        return x

    def forward_features_list(self, x_list: list[Tensor], masks_list: list) -> list[dict]:
        return self.forward_features(x_list, masks_list)

    def forward_features(self, x, masks=None, drop_orders=None):
        """Features of a batch of images, or of a list of batches of different sizes in one pass.

        Args:
            x: (B, C, h*p, w*p), or a list of such tensors; then `masks` and `drop_orders` are lists too.
            masks: (B, h*w) bool or None; where True, mask_token replaces the patch.
            drop_orders: (2 * depth, groups, B / groups) int64 or None: which images each branch of each block computes
                under stochastic depth, see add_to_subset. None: random ones.
        Returns: a dict (or a list of dicts) of x_norm_clstoken (B, D), x_norm_regtokens (B, R, D),
            x_norm_patchtokens (B, h*w, D), x_prenorm (B, 1+R+h*w, D) before the final norm, and masks as given.
        """
        if not isinstance(x, list):
            return self.forward_features([x], [masks], None if drop_orders is None else [drop_orders])[0]
        masks = masks or [None] * len(x)
        tokens = [self.prepare_tokens_with_masks(images, m) for images, m in zip(x, masks, strict=True)]
        shapes = [t.shape[:2] for t in tokens]
        packed = pack(tokens)  # (1, T, D)
        for i, block in enumerate(self.block_list()):
            packed = block(packed, shapes, drop_orders and [orders[2 * i : 2 * i + 2] for orders in drop_orders])
        first = 1 + self.num_register_tokens  # patch
        return [
            dict(x_norm_clstoken=normed[:, 0], x_norm_regtokens=normed[:, 1:first],
                 x_norm_patchtokens=normed[:, first:], x_prenorm=raw, masks=m)
            for normed, raw, m in zip(unpack(self.norm(packed), shapes), unpack(packed, shapes), masks)]

    def get_intermediate_layers(self, x: Tensor, n=1, reshape: bool = False, return_class_token: bool = False,
                                norm: bool = True) -> tuple:
        """Patch tokens of the last `n` blocks, or of the blocks whose numbers `n` lists, in ascending order.

        Returns: a tuple of (B, h*w, D), or with `reshape` of (B, D, h, w), one per block; with `return_class_token` of
        pairs (patches, CLS (B, D)). `norm` applies the final LayerNorm to each. Raises ValueError if a block does not
        exist.
        """
        outs = [self.norm(out) if norm else out for out in self._get_intermediate_layers_not_chunked(x, n)]
        patches = [out[:, 1 + self.num_register_tokens :] for out in outs]
        if reshape:
            h, w = x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size
            patches = [p.transpose(1, 2).unflatten(2, (h, w)).contiguous() for p in patches]
        return tuple(zip(patches, [out[:, 0] for out in outs])) if return_class_token else tuple(patches)

    def _get_intermediate_layers_not_chunked(self, x: Tensor, n=1) -> list[Tensor]:
        """All tokens (B, 1+R+h*w, D) of the same blocks, before the final norm."""
        wanted = range(self.n_blocks - n, self.n_blocks) if isinstance(n, int) else n
        if not all(0 <= i < self.n_blocks for i in wanted):
            raise ValueError(f"no such blocks: {list(wanted)}; the model has blocks 0 to {self.n_blocks - 1}")
        tokens, outs = self.prepare_tokens_with_masks(x), []
        for i, block in enumerate(self.block_list()):
            tokens = block(tokens)
            outs += [tokens] * (i in wanted)
        return outs

    _get_intermediate_layers_chunked = _get_intermediate_layers_not_chunked

    def forward(self, x, masks=None, is_training: bool = False, drop_orders=None):
        """CLS features (B, D) after the final norm; with `is_training`, the dict(s) of forward_features."""
        out = self.forward_features(x, masks, drop_orders)
        return out if is_training else self.head(out["x_norm_clstoken"])


def untraced(function, x: Tensor) -> Tensor:
    """function(x), recorded as a constant in the program being traced."""
    tracer = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        return function(x).detach()
    finally:
        torch._C._set_tracing_state(tracer)


def init_parameters(module: nn.Module, std: float = 0.02, pos_std: float = 0.02) -> None:
    """The official initialization of the parameters that a module holds itself, not those of its children. Standard
    deviations: `std` for the weights of linear layers and `pos_std` for the position embedding, both truncated at 2;
    1e-6 for CLS and registers. mask_token and the biases of linear layers are 0. The patch embedding, norms, LayerScale
    and prototypes start as in their constructors."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, DinoVisionTransformer):
        nn.init.trunc_normal_(module.pos_embed, std=pos_std)
        nn.init.normal_(module.cls_token, std=1e-6)
        nn.init.zeros_(module.mask_token)
        if module.register_tokens is not None:
            nn.init.normal_(module.register_tokens, std=1e-6)
    elif isinstance(module, (nn.Conv2d, nn.LayerNorm, LayerScale, WeightNormLinear)):
        module.reset_parameters()


# ----------------------------------------------------------------------------------------------------------------------
# Projection head


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose row k is weight_g[k] * weight_v[k] / |weight_v[k]| (Salimans & Kingma 2016).
    Both are plain parameters, named as in the released heads, so that the layer can be deep-copied and sharded."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(out_features, 1))
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight_g)
        nn.init.kaiming_uniform_(self.weight_v, a=5**0.5)  # the default of nn.Linear, as officially

    def weight(self) -> Tensor:
        """The rows, (out_features, in_features). Costs a pass over all of them, so call it once per step."""
        return torch._weight_norm(self.weight_v, self.weight_g)  # the fused operator behind nn.utils.weight_norm

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight())


class DINOHead(nn.Module):
    """MLP, L2 normalization, K = out_dim prototypes: (..., in_dim) -> logits (..., K) (DINO, section 3.1, appendix C).

    With weight_g = 1, a logit is the cosine of the projected token and the prototype. With `factored`, forward returns
    the factors of the logits instead: projected tokens (..., bottleneck_dim) and prototypes (K, bottleneck_dim).
    """

    def __init__(self, in_dim: int, out_dim: int, use_bn: bool = False, nlayers: int = 3, hidden_dim: int = 2048,
                 bottleneck_dim: int = 256, mlp_bias: bool = True):
        super().__init__()
        dims = [in_dim] + [hidden_dim] * (max(nlayers, 1) - 1) + [bottleneck_dim]
        layers: list[nn.Module] = []
        for a, b in zip(dims[:-2], dims[1:-1]):
            layers += [nn.Linear(a, b, bias=mlp_bias)] + [nn.BatchNorm1d(b)] * use_bn + [nn.GELU()]
        layers.append(nn.Linear(dims[-2], dims[-1], bias=mlp_bias))
        self.mlp = nn.Sequential(*layers) if len(layers) > 1 else layers[0]
        self.mlp.apply(init_parameters)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)

    def forward(self, x: Tensor, factored: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        x = F.normalize(self.mlp(x), dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)
        return (x, self.last_layer.weight()) if factored else self.last_layer(x)


# ----------------------------------------------------------------------------------------------------------------------
# Loading


FORMAT = 1  # version of the checkpoints that train.py writes, stored in them as "format"


def read_checkpoint(path: str) -> dict:
    """Reads a .pth file onto the CPU, without executing anything in it. Raises ValueError, naming the cause, if it is
    missing, truncated, not a checkpoint, or holds anything but tensors and plain values."""
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:  # open: torch.load goes by the file's extension
            warnings.simplefilter("ignore")
            ckpt = torch.load(file, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise ValueError(f"no such checkpoint: {path} ({error.strerror})") from None
    except Exception as error:  # a damaged file can fail in any way
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):  # torch.load's word for a class or a function
            raise ValueError(f"{path} holds pickled code, {found[1]}, not just weights: refused, nothing in it was run"
                             ) from None
        raise ValueError(f"{path} is truncated or is not a PyTorch checkpoint; copy or download it again") from None
    if not isinstance(ckpt, dict):
        raise ValueError(f"{path} holds a {type(ckpt).__name__}, not a dict of weights")
    return ckpt


def is_weight(value) -> bool:
    """Whether `value` is a plain floating-point tensor, no larger than its storage in the file."""
    return type(value) in (Tensor, nn.Parameter) and value.is_floating_point() and value.layout == torch.strided and (
        value.nbytes <= value.untyped_storage().nbytes())


def load_backbone(path: str, ckpt: dict | None = None, arguments: dict | None = None) -> DinoVisionTransformer:
    """The backbone of a checkpoint of train.py (the teacher) or of a released DINOv2 file, in float32, in eval mode.

    `ckpt` is the content of the file, if it has been read already; `arguments` override the constructor arguments found
    in it. Raises ValueError if anything is missing, left over, or impossible.
    """
    ckpt = read_checkpoint(path) if ckpt is None else ckpt
    arguments, heads = arguments or {}, ("dino_head.", "ibot_head.")
    if ckpt.get("format", FORMAT) != FORMAT:
        raise ValueError(f"{path} has format {ckpt['format']!r}, this code reads {FORMAT}: use the code that wrote it")
    weights = ckpt["teacher"] if isinstance(ckpt.get("teacher"), dict) else ckpt
    weights = {str(k).removeprefix("backbone."): v for k, v in weights.items() if not str(k).startswith(heads)}
    inferred = infer_arguments(path, weights, arguments.get("img_size"))
    try:
        kwargs = dict(ckpt["model"]) if "format" in ckpt else inferred
        for key in ("depth", "embed_dim", "patch_size", "in_chans", "num_register_tokens"):
            if kwargs.get(key, 0) != inferred[key]:
                raise ValueError(f"{key} is {kwargs.get(key)!r}, but {inferred[key]} by the weights")
        with torch.device("meta"):
            model = DinoVisionTransformer(**kwargs | arguments)
    except Exception as error:  # impossible arguments can fail in any way
        raise ValueError(f"{path} describes an impossible network: {str(error).partition(chr(10))[0]}") from None
    load_strictly(model, {k: v.float() for k, v in weights.items()}, path)
    return model.eval()


def load_strictly(model: nn.Module, weights: dict[str, Tensor], path: str, assign: bool = True) -> None:
    """load_state_dict(strict=True) that says in one line what does not fit. Raises ValueError."""
    check_names_and_shapes(model, weights, path)
    model.load_state_dict(weights, assign=assign)


def check_names_and_shapes(model: nn.Module, weights: dict[str, Tensor], path: str) -> None:
    """Raises ValueError if the names, shapes or types of the weights are not those of the model."""
    expected = model.state_dict()
    missing, unexpected = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    both = [(k, expected[k], weights[k]) for k in expected.keys() & weights.keys()]
    shapes = [k for k, a, b in both if a.shape != b.shape or b.is_meta or not (
        is_weight(b) if a.is_floating_point() else a.dtype == b.dtype)]
    if missing or unexpected or shapes:
        kinds = ((missing, "is missing", "are missing"), (unexpected, "is unexpected", "are unexpected"),
                 (shapes, "has another shape or type", "have another shape or type"))
        faults = [f"{len(keys)} {many if len(keys) > 1 else one} (such as {min(keys)})" for keys, one, many in kinds
                  if keys]
        raise ValueError(f"{path} is from another architecture: of the weights, {', '.join(faults)}")


def infer_arguments(path: str, weights: dict[str, Tensor], img_size=None) -> dict:
    """The constructor arguments of a DINOv2 backbone, from the names and shapes of its weights. What these leave open
    is as in the released models: a square position table (unless img_size is given), heads 64 wide, and the
    interpolation of positions that goes with or without registers. Raises ValueError if the weights are not those of a
    DINOv2 backbone."""
    blocks = {tuple(m[1].split(".")) for k in weights if (m := re.match(r"blocks\.(\d+(?:\.\d+)?)\.[a-z]", k))}
    needed = dict(cls_token=3, pos_embed=3, mask_token=2) | {"patch_embed.proj.weight": 4, "norm.weight": 1}
    wrong = [k for k in weights if not is_weight(weights[k])] or [
        k for k, n in needed.items() if k not in weights or weights[k].ndim != n or not weights[k].numel()]
    if wrong:
        raise ValueError(f"{path} holds no DINOv2 backbone: {', '.join(wrong[:5])} missing or of another type or shape "
                         f"(it starts with: {', '.join(list(weights)[:3])})")
    dim, in_chans, patch = weights["patch_embed.proj.weight"].shape[:3]
    entries = weights["pos_embed"].shape[1] - 1
    if img_size is None and round(entries**0.5) ** 2 != entries:
        raise ValueError(f"{path} has a position table of {entries} entries, not a square: give hub.load "
                         "img_size=(height, width) in pixels, or write {\"image_size\": [height, width]} into a "
                         "config.json beside it")
    chunks = len({b[0] for b in blocks}) if any(len(b) == 2 for b in blocks) else 0
    first = f"blocks.{'0.0' if chunks else '0'}."
    ffn = next((f for k, f in (("w12", "swiglu"), ("fc1", "mlp")) if f"{first}mlp.{k}.weight" in weights), "identity")
    registers = weights["register_tokens"].shape[-2] if "register_tokens" in weights else 0
    return dict(
        img_size=round(entries**0.5) * patch if img_size is None else img_size, patch_size=patch, in_chans=in_chans,
        embed_dim=dim, depth=len(blocks), num_heads=max(dim // 64, 1), block_chunks=chunks, ffn_layer=ffn,
        init_values=1.0 if first + "ls1.gamma" in weights else None, qkv_bias=first + "attn.qkv.bias" in weights,
        proj_bias=first + "attn.proj.bias" in weights,
        ffn_bias=first + ("mlp.w3.bias" if ffn == "swiglu" else "mlp.fc2.bias") in weights,
        num_register_tokens=registers, interpolate_antialias=registers > 0,
        interpolate_offset=0.0 if registers else 0.1)
