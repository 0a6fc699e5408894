# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""An independent reading of the method in plain torch, against which the project's tensors are compared.

Imports torch and math only: nothing of the project and nothing of diffusers' pipelines. A frozen model (VAE,
transformer) is applied through the object that the caller passes. Written for clarity, in the order in which the
data travels; every function keeps the dtype that it is given, so all of it can run in float64.

Letters in the shapes: B batch, H and W the height and width of one panel in pixels, h = H / 16 and w = W / 16 the
token rows and columns of one panel, L = h * 2w the tokens of a diptych.
"""

import math

import torch


# Read ---------------------------------------------------------------------------------------------------------------


def cut_triptych(triptych: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[B, 3, H, 3W] -> visible, target and semantic view, each [B, 3, H, W], from left to right."""
    width = triptych.shape[3] // 3
    assert triptych.shape[3] == 3 * width
    return triptych[..., 0:width], triptych[..., width : 2 * width], triptych[..., 2 * width : 3 * width]


def make_diptych(visible: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Two [B, 3, H, W] -> [B, 3, H, 2W], visible left and target right."""
    batch, channels, height, width = visible.shape
    diptych = visible.new_empty(batch, channels, height, 2 * width)
    diptych[..., :width] = visible
    diptych[..., width:] = target
    return diptych


def make_mask(diptych: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, 2W] -> [B, 1, H, 2W]: 0 on the visible half, 1 on the target half."""
    batch, _, height, width = diptych.shape
    column = torch.arange(width, device=diptych.device)
    return (column >= width // 2).to(diptych.dtype).expand(batch, 1, height, width).clone()


# Encode -------------------------------------------------------------------------------------------------------------


def encode_image(vae, image: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] in [-1, 1] -> scaled latent [B, 16, H/8, W/8]; the posterior's mode, never a draw."""
    latent = vae.encode(image).latent_dist.mode()
    return (latent - vae.config.shift_factor) * vae.config.scaling_factor


def pack(latent: torch.Tensor) -> torch.Tensor:
    """[B, C, 2h, 2w] -> [B, h*w, 4C].

    The token at (row, column) holds the 2x2 block of positions below it, row by row in the grid. Its channels run
    over the latent's channels first, then the block's upper left, upper right, lower left and lower right position.
    """
    corners = [latent[:, :, dy::2, dx::2] for dy in (0, 1) for dx in (0, 1)]  # 4 x [B, C, h, w]
    by_channel = torch.stack(corners, dim=2).flatten(1, 2)  # [B, 4C, h, w], corner fastest
    return by_channel.flatten(2).transpose(1, 2)


def unpack(tokens: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The inverse of `pack`: [B, rows*columns, 4C] -> [B, C, 2*rows, 2*columns]."""
    batch, _, channels = tokens.shape
    latent = tokens.new_empty(batch, channels // 4, 2 * rows, 2 * columns)
    grid = tokens.transpose(1, 2).reshape(batch, channels, rows, columns)
    for corner in range(4):
        latent[:, :, corner // 2 :: 2, corner % 2 :: 2] = grid[:, corner::4]
    return latent


def mask_tokens(mask: torch.Tensor) -> torch.Tensor:
    """[B, 1, H, W] of pixels -> [B, h*w, 256]: each 8x8 block of pixels unfolded into 64 channels, row by row, then
    packed."""
    pixels = [mask[:, 0, y::8, x::8] for y in range(8) for x in range(8)]  # 64 x [B, H/8, W/8]
    return pack(torch.stack(pixels, dim=1))


def condition(vae, diptych: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """x_cond, [B, L, 320]: 64 channels of the visible half's latent (the hidden half is 0, mid-gray), 256 of the
    mask."""
    return torch.cat([pack(encode_image(vae, diptych * (1 - mask))), mask_tokens(mask)], dim=2)


def image_ids(rows: int, columns: int) -> torch.Tensor:
    """[rows*columns, 3]: (0, row, column) of every token, one plain grid over the whole diptych."""
    return torch.tensor([[0.0, row, column] for row in range(rows) for column in range(columns)])


def lay_under_both_panels(tokens: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """One panel's [B, rows*columns, C] -> the diptych's [B, rows*2*columns, C]: each place gets its own panel's
    token."""
    index = [row * columns + column % columns for row in range(rows) for column in range(2 * columns)]
    return tokens[:, index]


def encode_semantic(vae, semantic: torch.Tensor) -> torch.Tensor:
    """The semantic view [B, 3, H, W] in [-1, 1] -> semantic_tokens [B, L, 64]."""
    latent = encode_image(vae, semantic)
    return lay_under_both_panels(pack(latent), latent.shape[2] // 2, latent.shape[3] // 2)


# Noise --------------------------------------------------------------------------------------------------------------


def shift_timestep(t: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """FLUX's shift of t in (0, 1) for an image of `num_tokens` tokens: mu goes from 0.5 at 256 to 1.15 at 4096
    tokens."""
    mu = 0.5 + (1.15 - 0.5) * (num_tokens - 256) / (4096 - 256)
    return math.exp(mu) * t / (1 + (math.exp(mu) - 1) * t)


def add_noise(x_0: torch.Tensor, x_1: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t = (1 - t) x_0 + t x_1, with x_0 and x_1 [B, L, 64] and t [B]."""
    return (1 - t)[:, None, None] * x_0 + t[:, None, None] * x_1


# Attend -------------------------------------------------------------------------------------------------------------


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise each token's channels to mean 0 and (biased) variance 1, then weight and bias."""
    centered = x - x.mean(dim=-1, keepdim=True)
    return centered / torch.sqrt((centered**2).mean(dim=-1, keepdim=True) + eps) * weight + bias


def panel_positions(rows: int, columns: int) -> torch.Tensor:
    """[rows*2*columns, 2]: (row, column within the panel) of every token of a diptych."""
    return torch.tensor([[row, column % columns] for row in range(rows) for column in range(2 * columns)])


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """2-D RoPE on [B, L, heads, head_dim]: the first half of the channels turns by the row, the second by the column.

    Within a half of size d, the pair (x[2i], x[2i + 1]) turns by position * 100 ** (-2i / d).
    """
    half = x.shape[-1] // 2
    turned = x.clone()
    for axis in (0, 1):
        for i in range(half // 2):
            angle = positions[:, axis].to(x.dtype) * 100.0 ** (-2 * i / half)
            cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]
            even, odd = x[..., axis * half + 2 * i], x[..., axis * half + 2 * i + 1]
            turned[..., axis * half + 2 * i] = even * cos - odd * sin
            turned[..., axis * half + 2 * i + 1] = even * sin + odd * cos
    return turned


def cross_attention(
    x: torch.Tensor,
    s: torch.Tensor,
    *,
    norm_x_weight: torch.Tensor,
    norm_x_bias: torch.Tensor,
    norm_s_weight: torch.Tensor,
    norm_s_bias: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    v_weight: torch.Tensor,
    out_weight: torch.Tensor,
    scale: torch.Tensor,
    heads: int = 8,
    positions: torch.Tensor | None = None,
    strength: float = 1.0,
    eps: float = 1e-5,
) -> torch.Tensor:
    """x + strength * scale * Out(softmax(Q(LN(x)) K(LN(s))^T / sqrt(head_dim)) V(LN(s))).

    x and s are [B, L, 64]; the norms' weights and biases and `scale` [64]; q, k and v [heads * head_dim, 64]; out
    [64, heads * head_dim]; `positions` [L, 2] turns queries and keys, `None` leaves them. All projections are
    bias-free.
    """
    batch, length, _ = x.shape
    head_dim = q_weight.shape[0] // heads
    image = layer_norm(x, norm_x_weight, norm_x_bias, eps)
    semantic = layer_norm(s, norm_s_weight, norm_s_bias, eps)
    q = (image @ q_weight.T).reshape(batch, length, heads, head_dim)
    k = (semantic @ k_weight.T).reshape(batch, s.shape[1], heads, head_dim)
    v = (semantic @ v_weight.T).reshape(batch, s.shape[1], heads, head_dim)
    if positions is not None:
        q, k = rotate(q, positions), rotate(k, positions)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(head_dim)
    weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    weights = weights / weights.sum(dim=-1, keepdim=True)
    attended = torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, heads * head_dim)
    return x + strength * scale * (attended @ out_weight.T)


def enhance(x_t: torch.Tensor, semantic_tokens: torch.Tensor, layers: list[dict], **kwargs) -> torch.Tensor:
    """x_t_enhanced: `cross_attention` once for every dict of weights in `layers`, one after the other."""
    for weights in layers:
        x_t = cross_attention(x_t, semantic_tokens, **weights, **kwargs)
    return x_t


def projection(
    c: torch.Tensor,
    s: torch.Tensor,
    *,
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale: torch.Tensor,
    strength: float = 1.0,
) -> torch.Tensor:
    """c + strength * scale * (W s + b), place by place: c are the picture channels of x_cond, s the semantic tokens.

    c and s are [B, L, 64], `weight` is [64, 64], `bias` and `scale` are [64].
    """
    return c + strength * scale * (torch.einsum("blc,dc->bld", s, weight) + bias)


def project(x_cond: torch.Tensor, semantic_tokens: torch.Tensor, layers: list[dict], **kwargs) -> torch.Tensor:
    """x_cond [B, L, 320] with its 64 picture channels enhanced: `projection` once for every dict in `layers`."""
    picture, mask = x_cond[..., :64], x_cond[..., 64:]
    for weights in layers:
        picture = projection(picture, semantic_tokens, **weights, **kwargs)
    return torch.cat([picture, mask], dim=2)


def with_maps(x: torch.Tensor, maps: list[tuple[torch.Tensor, list[dict], float]], step, **kwargs) -> torch.Tensor:
    """Several maps (tokens, layers, strength), whose updates of the same x add up. `step` is `enhance` or `project`."""
    return x + sum(step(x, tokens, layers, strength=strength, **kwargs) - x for tokens, layers, strength in maps)


# Predict and compare ------------------------------------------------------------------------------------------------


def predict(
    transformer,
    x: torch.Tensor,
    x_cond: torch.Tensor,
    t: torch.Tensor,
    prompt_embeds: torch.Tensor,
    pooled_prompt_embeds: torch.Tensor,
    img_ids: torch.Tensor,
    guidance: float | None = None,
) -> torch.Tensor:
    """The transformer's velocity [B, L, 64] for x [B, L, 64] (enhanced or not), x_cond [B, L, 320] and t [B] in (0,
    1)."""
    return transformer(
        hidden_states=torch.cat([x, x_cond], dim=2),
        timestep=t,
        guidance=None if guidance is None else torch.full_like(t, guidance),
        encoder_hidden_states=prompt_embeds,
        pooled_projections=pooled_prompt_embeds,
        txt_ids=torch.zeros(prompt_embeds.shape[1], 3, dtype=x.dtype),
        img_ids=img_ids,
        return_dict=False,
    )[0]


def loss(
    pred: torch.Tensor, x_0: torch.Tensor, x_1: torch.Tensor, rows: int, columns: int, region: str = "diptych"
) -> torch.Tensor:
    """Mean squared error to the velocity x_1 - x_0, over the whole diptych or over its target half only.

    `rows` and `columns` are one panel's token rows and columns.
    """
    error = (pred - (x_1 - x_0)) ** 2
    if region == "target":
        error = error[:, [row * 2 * columns + column for row in range(rows) for column in range(columns, 2 * columns)]]
    return error.mean()


# Inference ----------------------------------------------------------------------------------------------------------


def inference_sigmas(num_inference_steps: int, num_tokens: int) -> torch.Tensor:
    """[num_inference_steps + 1]: FLUX's even steps from 1 to 1 / n, shifted for the number of tokens, then 0."""
    even = torch.linspace(1.0, 1 / num_inference_steps, num_inference_steps, dtype=torch.float64)
    return torch.cat([shift_timestep(even, num_tokens), torch.zeros(1, dtype=torch.float64)])


def sample(x: torch.Tensor, sigmas: torch.Tensor, enhance_latents, predict_velocity) -> torch.Tensor:
    """Euler's method from noise x [B, L, 64] along falling `sigmas`: the step is taken on x, never on the enhanced
    one.

    `enhance_latents(x)` gives x_t_enhanced; `predict_velocity(x_t_enhanced, t)` the velocity for t [B].
    """
    for sigma, next_sigma in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
        velocity = predict_velocity(enhance_latents(x), x.new_full((x.shape[0],), sigma))
        x = x + (next_sigma - sigma) * velocity
    return x


def target_half(image: torch.Tensor) -> torch.Tensor:
    """The right half of a decoded diptych [B, 3, H, 2W]."""
    return image[..., image.shape[3] // 2 :]
