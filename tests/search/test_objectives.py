from __future__ import annotations

import pathlib
import sys
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from slipstream.core.images import save_image
from slipstream.search import features
from slipstream.search.features import LatentFeatures, NetworkFeatures, PixelFeatures, grid_features, load_images
from slipstream.search.inception import inception_embedding
from slipstream.search.objectives import Paired, ReferenceImages, SelfDistribution, score_or_worst
from slipstream.search.statistics import frechet_distance, median_bandwidth, mmd, moments
from torch import Tensor


class Pairs:
    """A bank whose teacher is known."""

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents

    def teacher(self) -> Tensor:
        return self.latents


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decode(latents: Tensor) -> Tensor:
    return latents[:, :3].movedim(1, -1).sigmoid()


def test_paired_is_the_mean_squared_error_of_the_first_pairs() -> None:
    teacher = noise(8, 4, 4, 4)
    score = Paired().prepare(Pairs(teacher))
    assert score(teacher) == 0
    assert score(teacher + 0.5) == pytest.approx(0.25)
    assert score(teacher[:2] + 2) == pytest.approx(4)


def embed(images: Tensor) -> Tensor:
    return images.flatten(1)[:, :8]


@pytest.mark.parametrize("features", [LatentFeatures(), PixelFeatures(decode), NetworkFeatures(decode, embed, "net")])
def test_objectives_on_all_features(features: object) -> None:
    teacher = noise(32, 4, 8, 8)
    for objective in (Paired(features), SelfDistribution(features), SelfDistribution(features, "mmd")):
        score = objective.prepare(Pairs(teacher))
        same, far = score(teacher), score(teacher * 3 + 1)
        assert same < far
        assert features.id in objective.id
        assert np.isfinite(score(teacher[:8]))


def test_mean_shift_has_its_closed_form() -> None:
    """Equal covariances and means apart by d: the Frechet distance is |d|^2."""
    mean, cov = moments(noise(500, 6))
    assert frechet_distance(mean, cov, mean + 2, cov) == pytest.approx(24)
    scale = torch.diag(torch.arange(1.0, 7.0).double())
    assert frechet_distance(mean, scale, mean, 4 * scale) == pytest.approx(float(scale.trace()))  # (2 - 1)^2 tr


def test_mmd_is_unbiased_and_orders() -> None:
    values = [mmd(noise(60, 3, seed=2 * i), noise(60, 3, seed=2 * i + 1), 1.5) for i in range(40)]
    assert abs(sum(values) / 40) < 0.004
    assert min(values) < 0
    assert mmd(noise(60, 3), noise(60, 3, seed=1) + 1, 1.5) > 0.05
    two = torch.tensor([[0.0], [1.0]])
    k = lambda d: float(np.exp(-d * d / 2))  # noqa: E731
    assert mmd(two, two + 2, 1.0) == pytest.approx(2 * k(1) - 2 * (2 * k(2) + k(3) + k(1)) / 4)


def test_bandwidth_is_the_median_distance() -> None:
    assert median_bandwidth(torch.tensor([[0.0], [1.0], [3.0]])) == pytest.approx(2.0)
    assert median_bandwidth(torch.zeros(5, 2)) > 0


def test_too_few_samples_for_a_distribution() -> None:
    with pytest.raises(ValueError, match="at least 2 samples"):
        moments(noise(1, 4))
    with pytest.raises(ValueError, match="at least 2 samples"):
        mmd(noise(1, 4), noise(5, 4), 1.0)
    with pytest.raises(ValueError, match="at least 2 reference images"):
        ReferenceImages([torch.rand(8, 8, 3)], PixelFeatures(decode))


def test_not_finite_is_worst() -> None:
    assert score_or_worst(lambda x: 0.0, torch.tensor([float("nan")])) == float("inf")
    assert score_or_worst(lambda x: float("nan"), torch.zeros(1)) == float("inf")
    assert score_or_worst(lambda x: 3.0, torch.zeros(1)) == 3.0


def test_grid_features_see_colour_and_grain() -> None:
    flat, grain = torch.zeros(1, 3, 16, 16), noise(1, 3, 16, 16) * 0.2
    assert grid_features(flat).shape == (1, 3 * 16 + 4)
    assert (grid_features(flat + 1) - grid_features(flat))[0, :48].allclose(torch.ones(48))
    assert (grid_features(grain) - grid_features(flat))[0, 48:].min() > 0.1
    assert grid_features(torch.zeros(2, 64, 1, 1)).shape == (2, 64 * 16)


def test_folder_of_mixed_sizes(tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    for i, size in enumerate([(64, 64), (120, 30), (17, 200)]):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    Image.fromarray(rng.integers(0, 255, (20, 20), dtype=np.uint8)).save(tmp_path / "grey.jpg")
    (tmp_path / "notes.txt").write_text("not an image")
    images = load_images(tmp_path)
    assert [tuple(i.shape) for i in images] == [(64, 64, 3), (120, 30, 3), (17, 200, 3), (20, 20, 3)]
    objective = ReferenceImages(images, PixelFeatures(decode), "mmd")
    assert objective.reference.shape == (4, 52)
    assert np.isfinite(objective.prepare(Pairs(noise(1, 4, 8, 8)))(noise(4, 4, 8, 8)))
    assert len(load_images(tmp_path, limit=2)) == 2
    other = ReferenceImages([*images, torch.rand(9, 9, 3)], PixelFeatures(decode), "mmd")
    assert other.id != objective.id


def test_folders_that_cannot_be_used(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="Expected `folder` with images"):
        load_images(tmp_path)
    with pytest.raises(ValueError, match="to be a folder"):
        load_images(tmp_path / "nowhere")
    (tmp_path / "a.png").write_bytes(b"\x89PNG nonsense")
    with pytest.raises(ValueError, match=r"a\.png to be an image, but it cannot be read"):
        list(load_images(tmp_path))


def test_a_folder_of_photos_is_never_held_whole(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(6):
        save_image(torch.rand(1, 8, 9, 3), tmp_path / f"{i}.png")
    alive: list[weakref.ref] = []
    read = features.read_image

    def reading(path: pathlib.Path) -> torch.Tensor:
        assert sum(ref() is not None for ref in alive) <= 2
        alive.append(weakref.ref(image := read(path)))
        return image

    monkeypatch.setattr(features, "read_image", reading)
    network = NetworkFeatures(decode, lambda images: images.mean((1, 2)), "mean", (4, 4), batch=1)
    for each in (PixelFeatures(decode), LatentFeatures(lambda images: images.movedim(-1, 1), (8, 8)), network):
        assert len(each.of_images(load_images(tmp_path))) == 6
    assert len(alive) == 18


def test_latent_features_of_pictures_need_a_vae() -> None:
    with pytest.raises(ValueError, match="Expected a VAE"):
        LatentFeatures().of_images([torch.rand(8, 8, 3)])
    made = LatentFeatures(lambda images: images.movedim(-1, 1)[..., ::8, ::8], (64, 64))
    assert made.of_images([torch.rand(70, 90, 3), torch.rand(30, 30, 3)]).shape == (2, 52)


# ------------------------------------------------------------------------------------------------- Inception


def test_inception_needs_a_file_that_is_there() -> None:
    with pytest.raises(ValueError, match="Slipstream downloads none"):
        inception_embedding("/nowhere/inception.pth")


def test_fid_weights_need_torch_fidelity(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, tmp_path / "fid.pth")
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ValueError, match="pip install torch-fidelity"):
        inception_embedding(tmp_path / "fid.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_fid_weights_give_torch_fidelity_s_features(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    module = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", reason="TORCH-FIDELITY IS NOT INSTALLED: FID weights were not run",
        exc_type=ImportError,
    )  # fmt: skip
    torch.save({}, tmp_path / "none.pth")
    with monkeypatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(tmp_path / "none.pth"))
    path = tmp_path / f"fid{suffix}"
    (torch.save if suffix == ".pth" else save_file)(network.state_dict(), path)
    images = torch.rand(2, 40, 40, 3, generator=torch.Generator().manual_seed(0))
    found = inception_embedding(path)(images)
    assert found.shape == (2, 2048)
    expected = network((images * 255).round().to(torch.uint8).movedim(-1, 1))[0]
    torch.testing.assert_close(found, expected)
    assert found.std() > 0


def test_a_pickle_that_holds_more_than_tensors_is_refused(tmp_path: pathlib.Path) -> None:
    marker = tmp_path / "marker"

    class Evil:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return pathlib.Path.touch, (marker,)

    torch.save({"fc.weight": torch.zeros(1008, 2048), "evil": Evil()}, tmp_path / "fid.pth")
    with pytest.raises(ValueError, match="Expected `weights`"):
        inception_embedding(tmp_path / "fid.pth")
    assert not marker.exists()


def test_torchvision_weights_give_pool3_features(tmp_path: pathlib.Path) -> None:
    try:
        from torchvision.models import inception_v3
    except (ImportError, RuntimeError):
        torch.save({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "inception.pth")
        with pytest.raises(ValueError, match="Expected torchvision"):
            inception_embedding(tmp_path / "inception.pth")
        return
    network = inception_v3(weights=None, init_weights=False, aux_logits=False).eval()
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    images = torch.rand(1, 299, 299, 3)
    found = inception_embedding(tmp_path / "inception.pth")(images)
    assert found.shape == (1, 2048)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    network.fc = torch.nn.Identity()
    with torch.no_grad():
        expected = network(((images - mean) / deviation).movedim(-1, 1))
    torch.testing.assert_close(found, expected)
