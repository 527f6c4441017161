"""Mask conventions and geometry."""

from __future__ import annotations

import itertools

import pytest
import torch
from slipstream.core.masks import as_mask, bounding_box, clean, feather, grow, painted, resize_mask, snapped, touched


def box(height: int = 9, width: int = 12) -> torch.Tensor:
    mask = torch.zeros(1, height, width)
    mask[:, 3:6, 4:8] = 1
    return mask


class TestClean:
    def test_noise_becomes_exact_and_soft_edges_keep_their_weight(self) -> None:
        values = torch.tensor([0, 3, 16, 25, 26, 64, 128, 229, 230, 235, 252, 255]) / 255
        wanted = torch.tensor([0, 0, 0, 0, 26, 64, 128, 229, 255, 255, 255, 255]) / 255
        assert torch.equal(clean(values), wanted)
        assert torch.equal(clean(clean(values)), clean(values))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_any_float_type(self, dtype: torch.dtype) -> None:
        found = clean(torch.tensor([0.0625, 0.5, 0.9375], dtype=dtype))
        assert found.dtype == torch.float32
        assert found.tolist() == [0, 0.5, 1]

    def test_the_residue_of_a_resize_is_snapped_and_touches_nothing(self) -> None:
        values = torch.tensor([0, 1e-7, 0.009, 1 / 64, 0.5, 63 / 64, 0.995, 1])
        assert torch.equal(snapped(values), torch.tensor([0, 0, 0, 1 / 64, 0.5, 63 / 64, 1, 1]))
        assert touched(values).tolist() == [False] * 3 + [True] * 5


class TestPainted:
    def test_bytes_count_to_255_unless_they_are_zeros_and_ones(self) -> None:
        assert painted(torch.tensor([[0, 3, 128, 235, 255]], dtype=torch.uint8))[0].tolist() == [
            [0, 0, pytest.approx(128 / 255), 1, 1]
        ]
        for kind in (torch.uint8, torch.int64, torch.bool, torch.float16):
            assert painted(torch.tensor([[0, 1]]).to(kind)).tolist() == [[[0, 1]]]

    def test_the_overshoot_of_a_resize_is_cut_off(self) -> None:
        hard = torch.zeros(1, 1, 16, 16)
        hard[..., 4:12, 4:12] = 1
        bicubic = torch.nn.functional.interpolate(hard, (48, 48), mode="bicubic")
        assert float(bicubic.min()) < -0.05
        found = painted(bicubic)
        assert float(found.min()) == 0
        assert float(found.max()) == 1
        assert torch.equal(found[0, :9], torch.zeros(9, 48))

    @pytest.mark.parametrize("values", [[0.0, 255.0], [-1.0, 1.0], [0.0, 2.0], [0, 1000]])
    def test_another_scale_is_named(self, values: list[float]) -> None:
        with pytest.raises(ValueError, match=r"`keep` with values between 0 and 1, but got .* to .*\. Divide it"):
            painted(torch.tensor([values]), "keep")


class TestAsMask:
    @pytest.mark.parametrize("shape", [(6, 8), (1, 6, 8), (1, 1, 6, 8), (3, 6, 8), (3, 1, 6, 8)])
    def test_shapes(self, shape: tuple[int, ...]) -> None:
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        found = as_mask(mask, 3, 6, 8)
        assert found.shape == (3, 6, 8)
        assert torch.equal(found, clean(mask).reshape(-1, 6, 8).expand(3, 6, 8))

    def test_noise_is_gone_before_the_mask_is_resized(self) -> None:
        mask = torch.full((1, 64, 64), 16 / 255)
        mask[:, 16:48, 16:47] = 235 / 255
        found = as_mask(mask, 1, 8, 8)[0]
        assert set(found.unique().tolist()) == {0, 7 / 8, 1}
        assert int(touched(found).sum()) == 16

    def test_masks_are_repeated_to_the_images(self) -> None:
        masks = torch.stack([torch.zeros(4, 4), torch.ones(4, 4)])
        assert as_mask(masks, 4, 4, 4).mean((1, 2)).tolist() == [0, 1, 0, 1]

    @pytest.mark.parametrize(
        ("mask", "said"),
        [
            (torch.zeros(5), "shape"),
            (torch.zeros(2, 3, 4, 4), "shape"),
            (torch.zeros(0, 4, 4), "shape"),
            (torch.zeros(2, 4, 4), "1 or 3 masks, but got 2"),
            (torch.full((4, 4), torch.nan), "finite"),
        ],
    )
    def test_bad_masks_are_named(self, mask: torch.Tensor, said: str) -> None:
        with pytest.raises(ValueError, match=f"`keep`.*{said}"):
            as_mask(mask, 3, 4, 4, name="keep")


class TestResize:
    def test_shrinking_averages(self) -> None:
        mask = torch.zeros(1, 16, 16)
        mask[:, :, 3] = 1  # one pixel wide: nearest would drop or keep all of it
        assert resize_mask(mask, 2, 2)[0].tolist() == [[0.125, 0], [0.125, 0]]

    def test_growing_keeps_the_mean_and_the_range(self) -> None:
        mask = box()
        grown = resize_mask(mask, 36, 48)
        assert grown.shape == (1, 36, 48)
        assert float(grown.min()) == 0
        assert float(grown.max()) == 1
        assert float(grown.mean()) == pytest.approx(float(mask.mean()), rel=0.02)

    @pytest.mark.parametrize("size", [(24, 3), (3, 24), (9, 4), (18, 24)])
    def test_a_thin_line_keeps_its_share_when_one_side_grows(self, size: tuple[int, int]) -> None:
        mask = torch.zeros(1, 9, 12)
        mask[:, :, 5] = 1
        assert float(resize_mask(mask, *size).mean()) == pytest.approx(1 / 12, rel=0.02)

    def test_the_same_size_is_the_same_mask(self) -> None:
        mask = box()
        assert resize_mask(mask, 9, 12) is mask


class TestGrow:
    def test_square_radius(self) -> None:
        wanted = torch.zeros(1, 9, 12)
        wanted[:, 1:8, 2:10] = 1
        assert torch.equal(grow(box(), 2), wanted)
        assert torch.equal(grow(wanted, -2), box())
        assert grow(box(), 0) is not None

    @pytest.mark.parametrize("cells", [1, 2, 3, 4, 5, 8, 11, 40])
    def test_the_largest_value_within_the_square_counts(self, cells: int) -> None:
        mask = torch.rand(2, 9, 12, generator=torch.Generator().manual_seed(cells))
        before = mask.clone()
        wanted = torch.empty_like(mask)
        for y, x in itertools.product(range(9), range(12)):
            square = mask[:, max(y - cells, 0) : y + cells + 1, max(x - cells, 0) : x + cells + 1]
            wanted[:, y, x] = square.amax((1, 2))
        assert torch.equal(grow(mask, cells), wanted)
        assert torch.equal(grow(mask, -cells), 1 - grow(1 - mask, cells))
        assert torch.equal(grow(mask > 0.9, cells), wanted > 0.9)
        assert torch.equal(grow(mask > 0.1, -cells), ~grow(mask <= 0.1, cells))
        assert torch.equal(mask, before)

    @pytest.mark.parametrize("cells", [1, -1, 3, -3])
    def test_the_border_of_the_image_is_no_edge(self, cells: int) -> None:
        for value in (0.0, 1.0):
            full = torch.full((1, 5, 7), value)
            assert torch.equal(grow(full, cells), full)
        left = torch.zeros(1, 6, 8)
        left[:, :, :4] = 1
        wanted = torch.zeros(1, 6, 8)
        wanted[:, :, : 4 + cells] = 1
        assert torch.equal(grow(left, cells), wanted)

    @pytest.mark.parametrize("cells", [12, 13, 10**9])
    def test_a_radius_beyond_the_picture_reaches_all_of_it(self, cells: int) -> None:
        """A feather of 20 pixels on an image of 16 was an error about `cells`, which nobody had set."""
        assert torch.equal(grow(box(), cells), torch.ones(1, 9, 12))
        assert torch.equal(grow(box(), -cells), torch.zeros(1, 9, 12))
        assert torch.equal(grow(torch.ones(1, 1, 33), -cells), torch.ones(1, 1, 33))

    def test_a_radius_is_an_integer(self) -> None:
        with pytest.raises(ValueError, match=r"Expected `cells` to be an integer, but got 1\.5"):
            grow(box(), 1.5)  # type: ignore[arg-type]


class TestFeather:
    def test_it_is_a_gaussian(self) -> None:
        point = torch.zeros(1, 21, 21)
        point[0, 10, 10] = 1
        blurred = feather(point, 6)
        assert float(blurred.sum()) == pytest.approx(1, abs=1e-5)
        assert torch.equal(blurred, blurred.transpose(1, 2))
        ratio = float(blurred[0, 10, 13] / blurred[0, 10, 10])
        assert ratio == pytest.approx(2.718281828 ** (-0.5 * (3 / 3) ** 2), rel=1e-4)

    @pytest.mark.parametrize("radius", [0, 1, 4, 100])
    def test_constants_stay(self, radius: int) -> None:
        for value in (0.0, 1.0):
            full = torch.full((2, 5, 7), value)
            torch.testing.assert_close(feather(full, radius), full)

    def test_bad_radius(self) -> None:
        with pytest.raises(ValueError, match="`radius`"):
            feather(box(), -1)


class TestBoundingBox:
    def test_ends_are_exclusive(self) -> None:
        assert bounding_box(box()[0]) == (3, 4, 6, 8)
        assert bounding_box(torch.ones(5, 7)) == (0, 0, 5, 7)

    def test_an_empty_mask_is_named(self) -> None:
        with pytest.raises(ValueError, match="at least one painted pixel"):
            bounding_box(torch.zeros(4, 4))
