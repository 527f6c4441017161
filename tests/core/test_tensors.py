"""Image layouts and the messages of the checks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from slipstream.core import checks
from slipstream.core.tensors import composite, image_to_numpy, image_to_pixels, numpy_to_image, pixels_to_image


class TestLayouts:
    def test_there_and_back(self) -> None:
        image = torch.rand(2, 5, 7, 3, generator=torch.Generator().manual_seed(0))
        pixels = image_to_pixels(image)
        assert pixels.shape == (2, 3, 5, 7)
        assert float(pixels.min()) >= -1
        torch.testing.assert_close(pixels_to_image(pixels), image)
        assert pixels_to_image(pixels).is_contiguous()

    def test_grey_is_repeated_and_alpha_dropped(self) -> None:
        grey = torch.full((1, 2, 2, 1), 0.25)
        assert torch.equal(image_to_pixels(grey), torch.full((1, 3, 2, 2), -0.5))
        assert torch.equal(image_to_pixels(torch.ones(2, 2, 4)), torch.ones(1, 3, 2, 2))

    def test_out_of_range_is_clamped_on_the_way_out(self) -> None:
        assert pixels_to_image(torch.tensor([[[[-3.0]], [[0.0]], [[3.0]]]])).tolist() == [[[[0, 0.5, 1]]]]

    def test_bytes(self) -> None:
        array = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
        assert np.array_equal(image_to_numpy(numpy_to_image(array)), array)
        assert numpy_to_image(array[0]).shape == (1, 16, 16, 3)

    @pytest.mark.parametrize("shape", [(2, 2), (1, 2, 2, 2), (1, 1, 2, 2, 3)])
    def test_bad_shapes(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="`image`"):
            image_to_pixels(torch.zeros(shape))

    def test_nan_is_named(self) -> None:
        with pytest.raises(ValueError, match="`image` to be finite everywhere, but got 1 NaN or infinite values"):
            image_to_pixels(torch.tensor([[[[0.0, math.nan, 0.0]]]]))

    def test_composite_is_exact_at_the_ends(self) -> None:
        base, image = torch.rand(1, 1, 3, 3), torch.rand(1, 1, 3, 3)
        found = composite(base, image, torch.tensor([[[0.0, 1.0, 0.5]]]))
        assert torch.equal(found[0, 0, 0], base[0, 0, 0])
        assert torch.equal(found[0, 0, 1], image[0, 0, 1])
        torch.testing.assert_close(found[0, 0, 2], (base + image)[0, 0, 2] / 2)
        untouched = composite(base, torch.full_like(base, math.nan), torch.zeros(1, 1, 3))
        assert torch.equal(untouched, base), "what is not painted must not matter"


class TestChecks:
    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: checks.check_range("delta", 3.0, 0, 1), "Expected `delta` between 0 and 1, but got 3.0."),
            (lambda: checks.check_range("delta", math.nan, 0, 1), "Expected `delta` between 0 and 1, but got nan."),
            (lambda: checks.check_range("delta", "1", 0), "Expected `delta` of at least 0, but got '1'."),
            (
                lambda: checks.check_range("delta", -1, 0, remedy="Raise it."),
                "Expected `delta` of at least 0, but got -1. Raise it.",
            ),
            (lambda: checks.check_integer("steps", 2.0, 1), "Expected `steps` to be an integer, but got 2.0."),
            (lambda: checks.check_integer("steps", True, 1), "Expected `steps` to be an integer, but got True."),
            (lambda: checks.check_integer("steps", 0, 1, 9), "Expected `steps` between 1 and 9, but got 0."),
            (
                lambda: checks.check_choice("mode", "x", ("a", "b")),
                "Expected `mode` to be one of 'a', 'b', but got 'x'.",
            ),
            (
                lambda: checks.check_shape("x", torch.zeros(2, 3), (None, 4)),
                "Expected `x` of shape (any, 4), but got (2, 3).",
            ),
            (
                lambda: checks.check_sigmas("sigmas", torch.tensor([1.0, 0.5, 0.7])),
                "Expected `sigmas` to descend strictly to 0 or above, but got [0.5, 0.7] at 1. "
                "Flip or sort the levels and drop duplicates.",
            ),
            (
                lambda: checks.check_sigmas("sigmas", torch.tensor([1.0, -1.0])),
                "Expected `sigmas` to descend strictly to 0 or above, but got [-1.0] at 1. "
                "Flip or sort the levels and drop duplicates.",
            ),
            (
                lambda: checks.check_sigmas("sigmas", [1.0, 0.0]),  # type: ignore[arg-type]
                "Expected `sigmas` to be a 1-D tensor of at least 2 noise levels, but got list.",
            ),
        ],
    )
    def test_messages(self, call: object, message: str) -> None:
        with pytest.raises(ValueError) as caught:
            call()  # type: ignore[operator]
        assert str(caught.value) == message

    def test_numbers_of_numpy_are_numbers(self) -> None:
        checks.check_range("delta", np.float32(0.5), 0, 1)
        checks.check_integer("steps", np.int64(5), 1)

    def test_legal_values_pass(self) -> None:
        checks.check_range("delta", 1, 0, 1)
        checks.check_choice("mode", "a", ("a",))
        checks.check_shape("x", torch.zeros(2, 4), (None, 4))
        checks.check_sigmas("sigmas", torch.tensor([2.0, 1.0, 0.0]))
        checks.check_finite("x", torch.zeros(3))
