from __future__ import annotations

import math

import pytest
import torch
from slipstream.lmd import drag_field, optical_flow, stretch_map
from slipstream.lmd.stretch import compose, parse_points, warp


def places(height: int = 12, width: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    return x - width / 2, y - height / 2


def field(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.stack([u, v])[None]


@pytest.mark.parametrize("rate", [0.5, 0.1, -0.3])
def test_a_saddle_flow_gives_its_closed_form_everywhere(rate: float) -> None:
    # dx/dt = rate x, dy/dt = -rate y for unit time: the map (x e^rate, y e^-rate) stretches by e^|rate|.
    x, y = places()
    result = stretch_map(field(x * (math.exp(rate) - 1), y * (math.exp(-rate) - 1)))
    assert torch.allclose(result.stretch, torch.tensor(abs(rate)), atol=1e-6)
    assert not result.fold.any()


@pytest.mark.parametrize("rate", [0.5, -0.3])
def test_the_way_back_of_a_saddle_stretches_as_the_way_there(rate: float) -> None:
    x, y = places()
    back = field(x * (math.exp(-rate) - 1), y * (math.exp(rate) - 1))
    assert torch.allclose(stretch_map(back, backward=True).stretch, torch.tensor(abs(rate)), atol=1e-6)
    # Everything doubled in size comes from half the distance: stretched by 2.
    half = field(-x / 2, -y / 2)
    assert torch.allclose(stretch_map(half, backward=True).stretch, torch.tensor(math.log(2)), atol=1e-6)


def test_one_step_of_a_saddle_stretches_by_one_plus_its_rate() -> None:
    x, y = places()
    assert torch.allclose(stretch_map(field(0.5 * x, -0.5 * y)).stretch, torch.tensor(math.log(1.5)), atol=1e-6)


def test_shear_equals_its_singular_value() -> None:
    x, y = places()
    # [[1, k], [0, 1]] has sigma_max = k/2 + sqrt(1 + k^2 / 4).
    expected = math.log(0.7 / 2 + math.sqrt(1 + 0.7**2 / 4))
    assert torch.allclose(stretch_map(field(0.7 * y, 0 * x)).stretch, torch.tensor(expected), atol=1e-6)


def test_moving_and_turning_stretch_nothing() -> None:
    x, y = places()
    turn = field(x * (math.cos(1) - 1) - y * math.sin(1), x * math.sin(1) + y * (math.cos(1) - 1))
    for rigid in (field(0 * x + 3, 0 * x - 7), turn):
        result = stretch_map(rigid)
        assert torch.allclose(result.stretch, torch.tensor(0.0), atol=1e-6)
        assert not result.fold.any()


def test_a_mirror_folds_everywhere_and_a_collapse_counts_as_a_fold() -> None:
    x, y = places()
    assert stretch_map(field(-2 * x, 0 * y)).fold.all()
    assert stretch_map(field(-x, 0 * y)).fold.all()


def test_frames_divide_the_exponent_of_a_composed_flow() -> None:
    x, y = places()
    step = field(x * (math.exp(0.2) - 1), y * (math.exp(-0.2) - 1))
    twice = field(x * (math.exp(0.4) - 1), y * (math.exp(-0.4) - 1))
    assert torch.allclose(stretch_map(twice, frames=2).stretch, stretch_map(step).stretch, atol=1e-6)


def test_composing_constant_flows_adds_them_and_a_saddle_squares_itself() -> None:
    x, y = places()
    constant = field(0 * x + 1.5, 0 * x - 0.5).float()
    assert torch.allclose(compose([constant, constant, constant]), 3 * constant, atol=1e-5)
    step = field(0.1 * x, -0.1 * y).float()
    both = compose([step, step])[..., 3:-3, 4:-4]
    assert torch.allclose(both, field(0.21 * x, -0.19 * y).float()[..., 3:-3, 4:-4], atol=1e-5)


def test_a_drag_moves_every_handle_to_its_target_and_far_cells_stay() -> None:
    handles = torch.tensor([[10.0, 8.0], [14.0, 9.0], [30.0, 20.0]])
    targets = torch.tensor([[13.0, 8.0], [14.0, 12.0], [28.0, 25.0]])
    moved = drag_field(handles, targets, 40, 60, radius=4.0)
    assert moved.shape == (1, 2, 40, 60)
    for (x, y), target in zip(handles.long().tolist(), targets):
        assert torch.allclose(moved[0, :, y, x] + torch.tensor([x, y]), target, atol=1e-4)
    assert moved[0, :, 39, 59].abs().max() < 1e-6


@pytest.mark.parametrize(("length", "folds"), [(0.9, False), (1.1, True)])
def test_one_drag_folds_beyond_radius_times_the_root_of_e(length: float, folds: bool) -> None:
    radius = 12.0
    reach = length * radius * math.sqrt(math.e)
    moved = drag_field(torch.tensor([[60.0, 60.0]]), torch.tensor([[60.0 + reach, 60.0]]), 121, 161, radius)
    result = stretch_map(moved)
    assert bool(result.fold.any()) == folds
    # The fold begins ahead of the handle, at one radius.
    if folds:
        assert result.fold[0, 60, 72]


def test_drags_that_contradict_each_other_give_their_mean() -> None:
    moved = drag_field(torch.tensor([[5.0, 5.0], [5.0, 5.0]]), torch.tensor([[7.0, 5.0], [5.0, 7.0]]), 12, 12, 2.0)
    assert torch.allclose(moved[0, :, 5, 5], torch.tensor([1.0, 1.0]), atol=1e-4)
    assert not drag_field(torch.zeros(0, 2), torch.zeros(0, 2), 4, 4, 1.0).any()


def test_drags_are_read_from_lines() -> None:
    handles, targets = parse_points(" 60, 60 -> 90.5, 60\n\n-1,2->3 , 4")
    assert handles.tolist() == [[60, 60], [-1, 2]]
    assert targets.tolist() == [[90.5, 60], [3, 4]]
    assert parse_points("")[0].shape == (0, 2)
    with pytest.raises(ValueError, match=r"lines of 'x, y -> x, y', but got '60 60 90'. Example"):
        parse_points("1,1->2,2\n60 60 90")


def texture(height: int = 64, width: int = 80) -> torch.Tensor:
    """A smooth image that is defined at every real place."""
    y, x = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    return scene(x, y)


def scene(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    waves = [torch.sin(0.31 * x + 0.12 * y), torch.sin(0.23 * y - 0.17 * x + 1), torch.cos(0.11 * x * 0.9 + 0.29 * y)]
    return torch.stack(waves)[None]


@pytest.mark.parametrize("shift", [(0.4, -0.3), (3.0, 2.0), (-6.5, 4.0)])
def test_optical_flow_finds_a_shift(shift: tuple[float, float]) -> None:
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(80.0), indexing="ij")
    flow = optical_flow(scene(x, y), scene(x - shift[0], y - shift[1]))
    inner = flow[..., 12:-12, 12:-12]
    assert torch.allclose(inner, torch.tensor(shift).reshape(1, 2, 1, 1).expand_as(inner), atol=0.03)


def test_optical_flow_of_a_zoom_stretches_by_the_zoom() -> None:
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="ij")
    zoomed = scene(48 + (x - 48) / 1.1, 48 + (y - 48) / 1.1)
    result = stretch_map(optical_flow(scene(x, y), zoomed))
    assert float(result.stretch[:, 20:-20, 20:-20].median()) == pytest.approx(math.log(1.1), abs=0.01)
    assert not result.fold[:, 20:-20, 20:-20].any()


def test_equal_or_flat_frames_do_not_flow() -> None:
    assert optical_flow(texture(), texture()).abs().max() < 1e-4
    flat = torch.full((1, 3, 40, 40), 0.5)
    assert optical_flow(flat, flat).abs().max() == 0
    assert torch.isfinite(optical_flow(flat, flat + 0.1)).all()


def test_warping_by_nothing_is_the_picture_itself() -> None:
    assert torch.allclose(warp(texture(), torch.zeros(1, 2, 64, 80)), texture(), atol=1e-5)


def test_bad_input_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"`displacement` of shape"):
        stretch_map(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"at least 2 x 2 cells"):
        stretch_map(torch.zeros(1, 2, 1, 8))
    with pytest.raises(ValueError, match=r"`displacement` to be finite"):
        stretch_map(torch.full((1, 2, 8, 8), torch.nan))
    with pytest.raises(ValueError, match=r"`targets` of shape"):
        drag_field(torch.zeros(2, 2), torch.zeros(1, 2), 8, 8, 1.0)
    with pytest.raises(ValueError, match=r"`radius` of at least"):
        drag_field(torch.zeros(1, 2), torch.zeros(1, 2), 8, 8, 0.0)
    with pytest.raises(ValueError, match=r"Both frames need one size"):
        optical_flow(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9))


def test_optical_flow_stops_between_its_passes() -> None:
    calls: list[int] = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optical_flow(torch.rand(1, 1, 32, 32), torch.rand(1, 1, 32, 32), callback=stop)
    assert len(calls) == 3
