# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The reference itself, held against diffusers and against torch where they state the same thing."""

import reference as ref
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxFillPipeline
from diffusers.pipelines.flux.pipeline_flux_fill import calculate_shift


def fill_pipeline() -> FluxFillPipeline:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        latent_channels=16,
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        shift_factor=0.1159,
        scaling_factor=0.3611,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    return FluxFillPipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, None)


def test_packing_equals_diffusers():
    latent = torch.randn(2, 16, 6, 10)
    packed = ref.pack(latent)
    assert torch.equal(packed, FluxFillPipeline._pack_latents(latent, 2, 16, 6, 10))
    assert torch.equal(ref.unpack(packed, 3, 5), latent)
    assert torch.equal(ref.image_ids(3, 5), FluxFillPipeline._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32))


@torch.no_grad()
def test_condition_equals_fill_pipeline():
    pipe = fill_pipeline()
    visible = torch.rand(2, 3, 32, 48) * 2 - 1
    diptych = ref.make_diptych(visible, torch.rand_like(visible) * 2 - 1)
    mask = (torch.rand(2, 1, 32, 96) > 0.5).float()  # any mask, so that a wrong order of its 256 channels shows
    masked_image = ref.encode_image(pipe.vae, diptych * (1 - mask))
    unscaled = masked_image / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    theirs = pipe.prepare_mask_latents(mask, unscaled, 2, 16, 1, 32, 96, torch.float32, "cpu", None)
    ours = ref.condition(pipe.vae, diptych, mask)
    assert ours.shape == (2, 12, 320)
    assert torch.equal(ours[..., 64:], theirs[0])
    torch.testing.assert_close(ours[..., :64], theirs[1])


def test_triptych_and_mask():
    triptych = torch.arange(2 * 3 * 16 * 48.0).reshape(2, 3, 16, 48)
    visible, target, semantic = ref.cut_triptych(triptych)
    diptych = ref.make_diptych(visible, target)
    assert torch.equal(torch.cat([diptych, semantic], dim=3), triptych)
    mask = ref.make_mask(diptych)
    assert mask.shape == (2, 1, 16, 32) and mask[..., :16].max() == 0 and mask[..., 16:].min() == 1
    assert torch.equal(ref.target_half(diptych), target)


def test_semantic_tokens_lie_under_both_panels():
    grid = torch.arange(6.0).reshape(1, 6, 1)
    laid = ref.lay_under_both_panels(grid, 2, 3).flatten().tolist()
    assert laid == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert ref.panel_positions(2, 3).tolist() == [[r, c] for r in (0, 1) for c in (0, 1, 2, 0, 1, 2)]


def attention_weights(head_dim: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    def randn(*shape):
        return torch.randn(*shape, dtype=dtype) / 8

    return {
        "norm_x_weight": 1 + randn(64),
        "norm_x_bias": randn(64),
        "norm_s_weight": 1 + randn(64),
        "norm_s_bias": randn(64),
        "q_weight": randn(8 * head_dim, 64),
        "k_weight": randn(8 * head_dim, 64),
        "v_weight": randn(8 * head_dim, 64),
        "out_weight": randn(64, 8 * head_dim),
        "scale": randn(64),
    }


def test_cross_attention_equals_torch():
    torch.manual_seed(0)
    weights = attention_weights(16, torch.float64)
    assert sum(weight.numel() for weight in weights.values()) == 33088
    assert sum(weight.numel() for weight in attention_weights(8, torch.float64).values()) == 16704
    x, s = torch.randn(2, 12, 64, dtype=torch.float64), torch.randn(2, 12, 64, dtype=torch.float64)
    functional = torch.nn.functional
    image = functional.layer_norm(x, (64,), weights["norm_x_weight"], weights["norm_x_bias"])
    semantic = functional.layer_norm(s, (64,), weights["norm_s_weight"], weights["norm_s_bias"])
    q, k, v = (
        functional.linear(tokens, weights[name]).unflatten(2, (8, 16)).transpose(1, 2)
        for tokens, name in ((image, "q_weight"), (semantic, "k_weight"), (semantic, "v_weight"))
    )
    attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    expected = x + 0.5 * weights["scale"] * functional.linear(attended, weights["out_weight"])
    torch.testing.assert_close(ref.cross_attention(x, s, **weights, strength=0.5), expected)
    assert torch.equal(ref.cross_attention(x, s, **weights | {"scale": torch.zeros(64, dtype=torch.float64)}), x)


def test_projection_equals_torch():
    torch.manual_seed(0)
    x_cond, s = torch.randn(2, 12, 320, dtype=torch.float64), torch.randn(2, 12, 64, dtype=torch.float64)
    weight, bias, scale = (torch.randn(*shape, dtype=torch.float64) for shape in ((64, 64), (64,), (64,)))
    projected = ref.project(x_cond, s, [{"weight": weight, "bias": bias, "scale": scale}], strength=0.5)
    expected = x_cond[..., :64] + 0.5 * scale * torch.nn.functional.linear(s, weight, bias)
    torch.testing.assert_close(projected[..., :64], expected)
    assert torch.equal(projected[..., 64:], x_cond[..., 64:])
    # Each place gets its own semantic token, so another order of the places gives another order of the updates.
    order = torch.randperm(12)
    shuffled = ref.project(x_cond[:, order], s[:, order], [{"weight": weight, "bias": bias, "scale": scale}])
    torch.testing.assert_close(
        shuffled, ref.project(x_cond, s, [{"weight": weight, "bias": bias, "scale": scale}])[:, order]
    )


def test_rope_depends_on_the_difference_of_places_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(place_q, place_k):
        return (ref.rotate(q, torch.tensor([place_q])) * ref.rotate(k, torch.tensor([place_k]))).sum()

    torch.testing.assert_close(score([3, 5], [1, 9]), score([13, 2], [11, 6]))
    assert not torch.isclose(score([3, 5], [1, 9]), score([3, 5], [1, 8]))
    assert not torch.isclose(score([3, 5], [1, 9]), score([3, 5], [2, 9]))


def test_sigmas_and_euler_steps_equal_the_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=256, max_image_seq_len=4096, base_shift=0.5, max_shift=1.15
    )
    even = torch.linspace(1.0, 1 / 7, 7).tolist()
    scheduler.set_timesteps(sigmas=even, mu=calculate_shift(2048, 256, 4096, 0.5, 1.15))
    sigmas = ref.inference_sigmas(7, 2048)
    torch.testing.assert_close(sigmas.float(), scheduler.sigmas)

    def velocity(x, t):
        return torch.sin(3 * x) + t[:, None, None]

    x = noise = torch.randn(2, 4, 64)
    for timestep in scheduler.timesteps:
        t = (timestep / 1000).expand(2)
        x = scheduler.step(velocity(x + 0.25, t), timestep, x, return_dict=False)[0]
    torch.testing.assert_close(ref.sample(noise, sigmas, lambda x: x + 0.25, velocity), x, rtol=1e-4, atol=1e-5)


def test_loss_regions():
    x_0, x_1, pred = torch.randn(3, 2, 2 * 6, 64)
    assert ref.loss(x_1 - x_0, x_0, x_1, 2, 3) == 0
    torch.testing.assert_close(ref.loss(pred, x_0, x_1, 2, 3), torch.nn.functional.mse_loss(pred, x_1 - x_0))
    right = (pred - x_1 + x_0).reshape(2, 2, 6, 64)[:, :, 3:]
    torch.testing.assert_close(ref.loss(pred, x_0, x_1, 2, 3, region="target"), right.square().mean())
    x_t = ref.add_noise(x_0, x_1, torch.tensor([0.0, 1.0]))
    assert torch.equal(x_t[0], x_0[0]) and torch.equal(x_t[1], x_1[1])
