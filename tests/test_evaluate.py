# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The evaluation's figures against independent computations of them, and what it leaves behind."""

import functools
import json
import urllib.error
import weakref
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
import torchmetrics
import torchmetrics.functional.image.lpips as torchmetrics_lpips
import torchmetrics.image.lpip as torchmetrics_lpip
import transformers
from helpers import ON_CPU, ROOT, draw_triptych, run
from hub_server import HubServer
from huggingface_hub import ModelCard
from quick_python import run_python
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from pipeline_flux_fill_semantic import SEMANTIC_MODES, FluxFillSemanticPipeline
from semantic_fill import evaluate, metrics, publish
from semantic_fill.sampling import seed_of


COUNT = 5
# The maps of the tests' triptychs have the eight corners of the color cube.
PALETTE = {f"class {i}": [255 * (i >> 2), 255 * (i >> 1 & 1), 255 * (i & 1)] for i in range(8)}


@functools.cache
def alexnet_features() -> torch.nn.Sequential:
    """The convolutional part of torchvision's AlexNet, with the same random weights in every call."""
    torch.manual_seed(0)
    layers = []
    for channels, width, size, stride, padding, pool in (
        (3, 64, 11, 4, 2, True),
        (64, 192, 5, 1, 2, True),
        (192, 384, 3, 1, 1, False),
        (384, 256, 3, 1, 1, False),
        (256, 256, 3, 1, 1, True),
    ):
        layers += [torch.nn.Conv2d(channels, width, size, stride, padding), torch.nn.ReLU()]
        layers += [torch.nn.MaxPool2d(3, 2)] if pool else []
    return torch.nn.Sequential(*layers)


@pytest.fixture(scope="module")
def files(base_folder, tmp_path_factory):
    """A trained folder, triptychs whose targets are label maps, a palette, and a network for FID and KID."""
    folder = tmp_path_factory.mktemp("evaluate")
    data = folder / "test"
    data.mkdir()
    rows = []
    for index in range(COUNT):
        triptych = draw_triptych(index)
        labels = triptych.crop((64, 0, 96, 32))
        # The target is the mirrored map, so that the two differ.
        triptych.paste(labels.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT), (32, 0))
        triptych.save(data / f"{index}.png")
        rows.append(json.dumps({"file_name": f"{index}.png", "text": f"caption {index}"}))
    (data / "metadata.jsonl").write_text("\n".join(rows))
    (folder / "palette.json").write_text(json.dumps(PALETTE))
    boxes = [
        {"file_name": f"{i}.png", "boxes": [{"class": "sign", "box": [4 * i, 9, 4 * i + 8, 17]}]} for i in range(COUNT)
    ]
    (folder / "boxes.jsonl").write_text("\n".join(map(json.dumps, boxes)))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(folder / "dinov2")
    run(base_folder, folder / "out", "--max_train_steps", 2, "--semantic_scale_learning_rate", 1, data=data)
    return folder


def arguments(base_folder, files, *more, output_dir="evaluation"):
    options = ["--pretrained_model_name_or_path", base_folder, "--trained", files / "out", "--resolution", 32]
    options += ["--train_data_dir", files / "test", "--num_inference_steps", 2, "--output_dir", files / output_dir]
    return evaluate.parse_args([str(option) for option in (*options, *more)])


@pytest.fixture(scope="module")
def torchvision():
    """Gives torchmetrics the backbone that it takes from torchvision."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchmetrics_lpip, "_TORCHVISION_AVAILABLE", True)
        patch.setattr(torchmetrics_lpips, "_get_tv_model_features", lambda net, pretrained: alexnet_features())
        yield


def everything(files) -> list:
    """The options of an evaluation with all metrics, whose last batch holds one sample."""
    options = ["--fid_model", files / "dinov2", "--palette", files / "palette.json", "--batch_size", 2]
    return [*options, "--boxes", files / "boxes.jsonl"]


@pytest.fixture(scope="module")
def evaluated(base_folder, files, torchvision):
    """A whole evaluation: its report, and all paintings and targets `(count, 32, 32, 3)` by kind of map."""
    painted, paint = {}, evaluate.paint

    def keep(pipeline, dataset, kind, args):
        for rows, *batch in paint(pipeline, dataset, kind, args):
            painted.setdefault(kind, []).append(batch)
            yield rows, *batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "paint", keep)
        report = evaluate.main(arguments(base_folder, files, *everything(files)))
    pictures = {
        kind: [torch.cat(side).permute(0, 2, 3, 1).numpy() for side in zip(*batches)]
        for kind, batches in painted.items()
    }
    return report, pictures


def test_boxes_against_their_surroundings(evaluated, base_folder, files):
    report, pictures = evaluated
    for kind, sides in pictures.items():
        # The wrong map is the next sample's, and its box is apart from that of the sample where four places lie between.
        judged = {"own": [(i, i) for i in range(COUNT) if kind != "wrong" or i == COUNT - 1]}
        if kind == "wrong":
            judged["map"] = [(i, (i + 1) % COUNT) for i in range(COUNT)]
        found = report["figures"][kind]["boxes"]
        assert found.keys() == judged.keys()
        for part, rows in judged.items():
            for side, name in zip(sides, ("painted", "target")):
                differences = []
                for row, place in rows:
                    gray, x = side[row].astype(float).mean(axis=2), 4 * place
                    around = np.zeros_like(gray, dtype=bool)
                    around[5:21, max(0, x - 4) : x + 12] = True
                    inside = np.zeros_like(around)
                    inside[9:17, x : x + 8] = True
                    differences.append(gray[inside].mean() - gray[around & ~inside].mean())
                figures = found[part]["sign"]
                assert figures["count"] == len(rows)
                assert figures[f"{name}_difference"] == pytest.approx(np.mean(differences), abs=1e-3)
                assert figures[f"{name}_share"] == np.mean(np.array(differences) >= 15)
    assert "| wrong | sign of the wrong map | 5 | " in evaluate.table(report)

    (files / "fewer.jsonl").write_text("\n".join((files / "boxes.jsonl").read_text().splitlines()[:-1]))
    with pytest.raises(ValueError, match=r"fewer.jsonl has no line for 1 samples, such as 4.png\."):
        evaluate.main(arguments(base_folder, files, "--boxes", files / "fewer.jsonl", "--metrics", "psnr"))


def test_psnr_and_ssim_are_those_of_skimage(evaluated):
    report, pictures = evaluated
    assert list(report["figures"]) == ["right", "wrong", "none"]
    for kind, (painted, target) in pictures.items():
        psnr = [peak_signal_noise_ratio(t, p) for p, t in zip(painted, target)]
        gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "win_size": 11}
        ssim = [structural_similarity(t, p, channel_axis=2, **gaussian) for p, t in zip(painted, target)]
        samples = report["samples"][kind]
        assert [sample["row"] for sample in samples] == list(range(COUNT))
        np.testing.assert_allclose([sample["psnr"] for sample in samples], psnr, rtol=1e-5)
        np.testing.assert_allclose([sample["ssim"] for sample in samples], ssim, atol=1e-5)
        assert report["figures"][kind]["psnr"] == pytest.approx(np.mean(psnr), rel=1e-5)
        assert report["figures"][kind]["ssim"] == pytest.approx(np.mean(ssim), abs=1e-5)


def test_miou_is_that_of_the_confusion_matrix(evaluated):
    report, pictures = evaluated
    for kind, (painted, target) in pictures.items():
        # The nearest corner of a cube is that of each channel's nearer end.
        ours, theirs = (((x > 127) @ np.array([4, 2, 1])).ravel() for x in (painted, target))
        confusion = np.zeros((8, 8))
        np.add.at(confusion, (ours, theirs), 1)
        hit = confusion.diagonal()
        iou = hit / (confusion.sum(0) + confusion.sum(1) - hit)
        assert report["figures"][kind]["iou"] == pytest.approx(dict(zip(PALETTE, iou)))
        assert report["figures"][kind]["miou"] == pytest.approx(iou.mean())


def test_lpips_is_that_of_its_formula(evaluated):
    report, pictures = evaluated
    folder = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models"
    linear = torch.load(folder / "alex.pth", map_location="cpu", weights_only=True)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])

    def normed_features(picture):
        x, found = ((torch.from_numpy(picture) / 127.5 - 1 - shift) / scale).permute(0, 3, 1, 2), []
        # The last pooling comes after the last features.
        for layer in alexnet_features()[:-1]:
            x = layer(x)
            if isinstance(layer, torch.nn.ReLU):
                found.append(x / torch.sqrt(1e-8 + (x**2).sum(dim=1, keepdim=True)))
        return found

    for kind, sides in pictures.items():
        pairs = zip(*map(normed_features, sides))
        distances = [F.conv2d((a - b) ** 2, linear[f"lin{i}.model.1.weight"]) for i, (a, b) in enumerate(pairs)]
        expected = sum(distance.mean(dim=(1, 2, 3)) for distance in distances).tolist()
        assert [sample["lpips"] for sample in report["samples"][kind]] == pytest.approx(expected, rel=1e-4)
        assert report["figures"][kind]["lpips"] == pytest.approx(np.mean(expected), rel=1e-4)


def test_fid_and_kid_are_those_of_their_formulas(evaluated, files):
    report, pictures = evaluated
    network = metrics.VisionFeatures(str(files / "dinov2"), None)
    for kind in pictures:
        painted, target = (
            network(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy().astype(np.float64) for x in pictures[kind]
        )
        means, covariances = zip(*((x.mean(0), np.cov(x, rowvar=False)) for x in (painted, target)))
        root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
        fid = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
        assert report["figures"][kind]["fid"] == pytest.approx(fid, rel=1e-2, abs=1e-3)
        # Fewer samples than a subset holds: every subset is the whole set.
        same = [((x @ x.T / 16 + 1) ** 3 * (1 - np.eye(COUNT))).sum() / COUNT / (COUNT - 1) for x in (painted, target)]
        kid = sum(same) - 2 * ((painted @ target.T / 16 + 1) ** 3).mean()
        assert report["figures"][kind]["kid"] == pytest.approx(kid, rel=1e-3, abs=1e-4)


def test_features_depend_on_the_picture(files):
    network = metrics.VisionFeatures(str(files / "dinov2"), None)
    pictures = torch.randint(0, 256, (3, 3, 40, 48), dtype=torch.uint8)
    features = network(pictures)
    assert features.shape == (3, 16) and (features[0] - features[1]).abs().max() > 1e-3


def test_maps_and_seeds(evaluated, base_folder, files):
    report, pictures = evaluated
    assert len({figures["psnr"] for figures in report["figures"].values()}) == 3
    pipe = FluxFillSemanticPipeline.from_pretrained(base_folder)
    pipe.load_lora_weights(files / "out")
    pipe.set_progress_bar_config(disable=True)
    triptychs = [PIL.Image.open(files / "test" / f"{index}.png").convert("RGB") for index in range(COUNT)]
    maps = [triptych.crop((64, 0, 96, 32)) for triptych in triptychs]
    for index in (1, COUNT - 1):
        for kind, semantic in (("right", maps[index]), ("wrong", maps[(index + 1) % COUNT]), ("none", None)):
            picture = pipe(
                prompt=f"caption {index}",
                image=triptychs[index].crop((0, 0, 32, 32)),
                semantic_image=semantic,
                num_inference_steps=2,
                generator=torch.Generator().manual_seed(seed_of(0, "evaluate", index)),
            ).images[0]
            # Batches round differently than single samples.
            difference = np.asarray(picture).astype(int) - pictures[kind][0][index]
            assert abs(difference).max() <= 1


def test_reruns_agree(evaluated, base_folder, files):
    report, _ = evaluated
    again = evaluate.main(arguments(base_folder, files, *everything(files), output_dir="again"))
    assert again["figures"] == report["figures"] and again["samples"] == report["samples"]
    more = ["--seed", 1, "--metrics", "psnr", "--maps", "none"]
    other = evaluate.main(arguments(base_folder, files, *more, output_dir="other"))
    assert other["figures"]["none"]["psnr"] != report["figures"]["none"]["psnr"]


def test_only_the_paintings_that_are_shown_are_kept(base_folder, files, monkeypatch):
    paint, draw_grid = evaluate.paint, evaluate.draw_grid
    batches, shown = [], {}

    def watched(*args):
        for rows, painted, target in paint(*args):
            batches.append(weakref.ref(painted))
            yield rows, painted, target

    def drawn(columns):
        shown.update({name: len(column) for name, column in columns.items()})
        # A variable still holds the last one.
        assert len(batches) == 3 and not any(batch() is not None for batch in batches[:-1])
        assert sum(tile.untyped_storage().nbytes() for tile in columns["no map"]) <= 2 * 2 * 3 * 32 * 32
        return draw_grid(columns)

    monkeypatch.setattr(evaluate, "paint", watched)
    monkeypatch.setattr(evaluate, "draw_grid", drawn)
    options = ["--maps", "none", "--metrics", "psnr", "--batch_size", 2, "--grid_rows", 2]
    evaluate.main(arguments(base_folder, files, *options, output_dir="shown"))
    assert shown == {"visible": 2, "semantic": 2, "target": 2, "no map": 2}


def test_what_is_left(evaluated, files):
    report, pictures = evaluated
    folder = files / "evaluation"
    assert json.loads((folder / "evaluation.json").read_text())["figures"] == report["figures"]
    lines = (folder / "evaluation.md").read_text().splitlines()
    assert lines[0] == "| map | PSNR (dB) ↑ | SSIM ↑ | LPIPS ↓ | FID ↓ | KID ↓ | mIoU ↑ |"
    right = report["figures"]["right"]
    assert lines[2].startswith(f"| right | {right['psnr']:.2f} | {right['ssim']:.4f} | {right['lpips']:.4f} |")
    assert [line.split(" |")[0] for line in lines[2:5]] == ["| right", "| wrong", "| none"]
    assert "FID and KID see with dinov2" in lines[6] and str(files) not in "".join(lines)
    sheet = np.asarray(PIL.Image.open(folder / "evaluation.png"))
    # The columns visible, semantic, target, right, wrong and none are three times as large as the pictures.
    assert sheet.shape == (16 + COUNT * 96, 6 * 96, 3)
    np.testing.assert_array_equal(sheet[16::3, 3 * 96 : 4 * 96 : 3], pictures["right"][0].reshape(-1, 32, 3))
    np.testing.assert_array_equal(sheet[16::3, 2 * 96 : 3 * 96 : 3], pictures["right"][1].reshape(-1, 32, 3))


@pytest.mark.parametrize("fault", ["no torchvision", "no connection"])
def test_what_cannot_be_loaded_is_absent(base_folder, files, fault, monkeypatch):
    def no_connection(*args, **kwargs):
        raise urllib.error.URLError("no connection")

    monkeypatch.setattr(torchmetrics_lpip, "_TORCHVISION_AVAILABLE", fault == "no connection")
    monkeypatch.setattr(torchmetrics_lpips, "_get_tv_model_features", no_connection)
    monkeypatch.setattr(metrics, "load_features", no_connection)
    report = evaluate.main(arguments(base_folder, files, "--maps", "none", output_dir=fault))
    assert set(report["figures"]["none"]) == {"psnr", "ssim"} and set(report["absent"]) == {"lpips", "fid", "kid"}
    text = (files / fault / "evaluation.md").read_text()
    assert "| absent | absent | absent |" in text
    reason = "URLError: <urlopen error no connection>" if fault == "no connection" else "torchvision is installed"
    (line,) = (
        line for line in text.splitlines() if line.startswith("LPIPS is absent: its network could not be loaded")
    )
    assert reason in line and "--inception_weights takes a file" in text


class Planted:
    def __reduce__(self):
        return (print, ("planted code ran",))


def test_wrong_weights_are_refused(base_folder, files, capsys):
    torch.save(Planted(), files / "planted.pth")
    for name in ("planted.pth", "missing.pth"):
        options = arguments(base_folder, files, "--inception_weights", files / name, "--metrics", "psnr", "fid")
        with pytest.raises(ValueError, match=f"{name} is no network for fid"):
            metrics.load_networks(options, options.device)
    assert "planted code ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        ("--metrics miou", "needs the --palette"),
        ("--batch_size 0", "--batch_size has to be at least 1"),
        ("--resolution 30", "--resolution has to be a positive multiple of 16"),
        ("--max_train_samples 0", "--max_train_samples has to be at least 1"),
        ("--maps left", "argument --maps: invalid choice: 'left'"),
        (
            "--update_model_card --trained {tmp_path}",
            "--update_model_card needs {tmp_path}/README.md, which is not there",
        ),
        (
            "--train_data_dir {tmp_path} --output_dir {tmp_path}/evaluation",
            "cannot lie in --train_data_dir {tmp_path}: a later run would take this run's pictures for data",
        ),
        ("--trained nowhere", "--trained nowhere is neither a folder nor a repository"),
        ("--adapters nowhere", "--adapters nowhere is neither a file nor a folder nor a repository"),
        (
            "--adapter_weights 1 2",
            "--adapter_weights has to hold a number for --trained and for each of --adapters, 1",
        ),
    ],
)
def test_contradicting_options_are_refused(base_folder, files, tmp_path, options, message, capsys):
    with pytest.raises(SystemExit):
        arguments(base_folder, files, *options.format(tmp_path=tmp_path).split())
    assert message.format(tmp_path=tmp_path) in " ".join(capsys.readouterr().err.split())


def test_what_does_not_fit_the_data_is_refused_before_painting(base_folder, files, triptych_folder, monkeypatch):
    def evaluated(*more):
        return evaluate.main(arguments(base_folder, files, *more))

    same_map = files / "same_map"
    same_map.mkdir()
    for index in range(2):
        draw_triptych(0).save(same_map / f"{index}.png")
    captions = ["--instance_prompt", "a map"]
    monkeypatch.setattr(evaluate, "load_pipeline", None)
    for data in (["--max_train_samples", 1], ["--train_data_dir", same_map, *captions]):
        with pytest.raises(ValueError, match="all samples have the same one. Pass --maps right none"):
            evaluated("--metrics", "psnr", *data)
    with pytest.raises(ValueError, match="FID and KID compare sets"):
        evaluated("--max_train_samples", 1, "--metrics", "kid")
    (files / "same.json").write_text('{"a": "red", "b": "#ff0000"}')
    with pytest.raises(ValueError, match="same.json has to give each class a color of its own"):
        evaluated("--palette", files / "same.json", "--metrics", "psnr", "miou")
    more = ["--train_data_dir", triptych_folder, "--palette", files / "palette.json", "--metrics", "miou"]
    with pytest.raises(ValueError, match="of the target of row 0 has none of the colors of --palette"):
        evaluated(*more)
    plain = run(base_folder, files / "no_map", "--max_train_steps", 1, "--semantic_mode", "none", data=triptych_folder)
    with pytest.raises(ValueError, match='--maps right needs weights that use a map, but `semantic_mode="none"`'):
        evaluated("--trained", plain, "--maps", "right")
    with pytest.raises(
        ValueError, match='--semantic_scale 1.25 has no effect, because `semantic_mode="none"` uses no'
    ):
        evaluated("--trained", plain, "--semantic_scale", 1.25)
    # Not every mode has weights here.
    for mode in ("in_context", "pixel_fusion"):
        with pytest.raises(ValueError, match=f'--semantic_scale has to be 0 or 1 with `semantic_mode="{mode}"`.* 0.5'):
            evaluate.choose_maps(arguments(base_folder, files, "--semantic_scale", 0.5), mode)
    for mode in sorted(SEMANTIC_MODES.keys() - {"none"}):
        assert evaluate.choose_maps(arguments(base_folder, files, "--semantic_scale", 0), mode) == ["none"]
    scaled = arguments(base_folder, files, "--semantic_scale", 1.25)
    assert evaluate.choose_maps(scaled, "projection") == ["right", "wrong", "none"]


def test_the_card_over_the_hub(base_folder, files, tmp_path):
    folder = files / "out"
    trained = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    options = ["--pretrained_model_name_or_path", base_folder, "--train_data_dir", files / "test"]
    options += ["--num_inference_steps", 1, "--metrics", "psnr", "ssim", "--update_model_card"]
    command = ["-m", "semantic_fill.evaluate", *options, "--output_dir", tmp_path / "evaluation"]
    with HubServer(token="hf_planted_secret") as hub:
        hub.add_repo("user/fill", {name: trained[name] for name in trained if not name.startswith("cache/")})
        env = hub.environment(tmp_path / "home", hub.token) | ON_CPU | {"PYTHONPATH": str(ROOT)}
        done = run_python(*command, "--trained", "user/fill", env=env, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        pushed = hub.files("user/fill")
    report = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert "Painting at 32x32 pixels a view, the size that user/fill was trained at." in done.stderr
    assert "| right |" in done.stdout and b"hf_planted_secret" not in b"".join(pushed.values())
    assert pushed["samples/evaluation.png"] == (tmp_path / "evaluation" / "evaluation.png").read_bytes()
    card = ModelCard(pushed["README.md"].decode())
    assert (tmp_path / "evaluation" / "evaluation.md").read_text() in card.text
    figures = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert figures == {name: report["figures"]["right"][name] for name in ("psnr", "ssim")}
    assert str(files) not in card.content

    # In the card of a folder, a second evaluation takes the place of the first, and nothing else changes.
    before = ModelCard(trained["README.md"].decode()).text
    for _ in range(2):
        evaluate.main(arguments(base_folder, files, "--metrics", "psnr", "--maps", "none", "--update_model_card"))
        text = ModelCard.load(folder / "README.md").text
        start, end = text.index(publish.EVALUATION_START), text.index(publish.EVALUATION_END)
        assert (text[:start] + text[end:].removeprefix(publish.EVALUATION_END)).split() == before.split()
        assert text[end:].count("## Training") == 1 and text.count("## Figures") == 1
    assert Path(folder, "samples", "evaluation.png").is_file()


def test_adapters_and_their_weights(base_folder, files):
    lora = files / "out" / "pytorch_lora_weights.safetensors"
    options = arguments(base_folder, files, "--adapters", lora, "--adapter_weights", 0.5, -2)
    pipeline = evaluate.load_pipeline(options)
    assert pipeline.get_active_adapters() == ["0", "1"]
    assert [weight for _, weight in pipeline._acting_adapters()] == [0.5, -2]
    assert evaluate.choose_mode(options) == "cross_attention"
    assert evaluate.choose_mode(arguments(base_folder, files, "--adapter_weights", 0)) == "none"
    report = {"figures": {}, "count": 1, "data": "test", "features": None, "absent": {}, "adapters": [["out", 0.5]]}
    report["settings"] = vars(options) | {"width": 32, "metrics": ()}
    assert "Painted with out at weight 0.5." in evaluate.table(report)
