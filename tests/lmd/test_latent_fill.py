from __future__ import annotations

import dataclasses
import json
import pathlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from slipstream.lmd import FillConfig, LatentFill, latents_kind
from slipstream.lmd.latent_fill import FORMAT, interpolate, position_embedding, read_tensors
from slipstream_tests.noisy_masks import NOISY, noisy

TINY = FillConfig(
    channels=3, height=8, width=12, patch=2, dim=16, depth=2, heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2,
    interpolate=False, mean=(0.5, -1.0, 2.0), std=(2.0, 0.5, 1.0), latents="3 channels, scale 1, shift 0",
)  # fmt: skip


def latents_of(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 8, 12, generator=torch.Generator().manual_seed(1))


def hole(batch: int = 1) -> torch.Tensor:
    mask = torch.zeros(batch, 8, 12)
    mask[:, 2:5, 3:7] = 1
    return mask


def test_visible_cells_are_bit_exact_after_a_fill_and_the_hole_is_new() -> None:
    latents, mask = latents_of(), hole()
    filled = LatentFill(TINY).fill(latents, mask)
    seen = (mask == 0)[:, None].expand_as(latents)
    assert torch.equal(filled[seen], latents[seen])
    assert (filled[~seen] != latents[~seen]).all()


@pytest.mark.parametrize("kind", NOISY)
def test_a_noisy_mask_fills_what_the_clean_one_does(kind: str) -> None:
    latents, fill = latents_of(), LatentFill(TINY)
    assert torch.equal(fill.fill(latents, noisy(hole(), kind)), fill.fill(latents, hole()))


def test_what_lies_under_the_mask_has_no_say() -> None:
    latents, mask = latents_of(), hole()
    spoilt = torch.where(mask[:, None] > 0, torch.full_like(latents, torch.nan), latents)
    fill = LatentFill(TINY)
    assert torch.equal(fill.fill(latents, mask), fill.fill(spoilt, mask))


def test_an_empty_mask_returns_the_input_bit_for_bit() -> None:
    latents = latents_of()
    assert torch.equal(LatentFill(TINY).fill(latents, torch.zeros(1, 8, 12)), latents)


def test_a_full_mask_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"at least one patch visible.*Paint less"):
        LatentFill(TINY).fill(latents_of(), torch.ones(1, 8, 12))


def test_rows_are_independent_and_may_hide_different_amounts() -> None:
    latents = latents_of(2)
    masks = torch.zeros(2, 8, 12)
    masks[0, :2, :2] = 1
    masks[1, 4:, :] = 1
    fill = LatentFill(TINY)
    together = fill.fill(latents, masks)
    for row in range(2):
        alone = fill.fill(latents[row : row + 1], masks[row : row + 1])
        assert torch.allclose(together[row], alone[0], atol=1e-6)


def test_prediction_does_not_see_hidden_tokens_and_depends_on_visible_ones() -> None:
    fill = LatentFill(TINY)
    tokens = torch.randn(2, 24, 12, generator=torch.Generator().manual_seed(0))
    hidden = torch.zeros(2, 24, dtype=torch.bool)
    hidden[:, 5:9] = True
    base = fill.predict(tokens, hidden)
    other = tokens.clone()
    other[:, 6] += 1
    assert torch.equal(fill.predict(other, hidden), base)
    other[:, 0] += 1
    assert not torch.allclose(fill.predict(other, hidden), base)


def test_interpolation_equals_its_definition_cell_by_cell() -> None:
    latents = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(2))
    visible = (torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(3)) > 0.6).float()
    places = torch.stack(torch.meshgrid(torch.arange(5.0), torch.arange(7.0), indexing="ij"), -1).reshape(-1, 2)
    weights = 1 / (torch.cdist(places, places) + 0.1) ** 3
    weights = weights.fill_diagonal_(0)[None] * visible.flatten(2)
    weights = weights / weights.sum(-1, keepdim=True)
    expected = torch.einsum("bij,bcj->bci", weights, latents.flatten(2)).unflatten(2, (5, 7))
    assert torch.allclose(interpolate(latents, visible), expected, atol=1e-5)


def test_an_untrained_fill_is_the_interpolation_and_a_plain_one_is_not() -> None:
    latents, mask = latents_of(), hole()
    mask[:, 2:6, 2:8] = 1  # whole tokens
    expected = interpolate(latents, 1 - mask[:, None].expand(2, -1, -1, -1))
    inside = mask[:, None].expand_as(latents) > 0
    smooth = LatentFill(dataclasses.replace(TINY, interpolate=True)).fill(latents, mask)
    assert torch.allclose(smooth[inside], expected[inside], atol=1e-5)
    plain = LatentFill(TINY).fill(latents, mask)
    assert not torch.allclose(plain[inside], expected[inside], atol=0.1)


def test_masks_at_pixel_size_count_every_touched_cell() -> None:
    latents = latents_of(1)
    pixels = torch.zeros(1, 64, 96)
    pixels[0, 17, 25] = 1  # one pixel, in cell (2, 3)
    changed = (LatentFill(TINY).fill(latents, pixels) != latents).any(1)[0]
    assert changed.nonzero().tolist() == [[2, 3]]


def test_positions_are_distinct_unit_phases() -> None:
    places = position_embedding(8, 12, 16)
    assert places.shape == (96, 16)
    assert torch.allclose((places**2).sum(1), torch.tensor(8.0))
    assert torch.cdist(places, places).fill_diagonal_(9).min() > 0.1


def test_building_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    first, second = LatentFill(TINY), LatentFill(TINY)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert all(bool(torch.isfinite(p).all()) and not p.is_meta for p in first.parameters())


def test_a_file_gives_the_same_fill_and_carries_its_config(tmp_path: pathlib.Path) -> None:
    fill, path = LatentFill(TINY), tmp_path / "a.safetensors"
    fill.save(path, note="x")
    loaded = LatentFill.load(path)
    assert loaded.config == TINY
    assert torch.equal(loaded.fill(latents_of(), hole()), fill.fill(latents_of(), hole()))
    assert read_tensors(path)[1]["note"] == "x"
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_size_patch_and_model_mismatches_are_refused_by_name() -> None:
    fill = LatentFill(TINY)
    with pytest.raises(ValueError, match=r"8 x 12 cells, the size this fill was trained on, but got 7 x 12"):
        fill.fill(torch.zeros(1, 3, 7, 12), torch.zeros(1, 7, 12))
    with pytest.raises(ValueError, match=r"8 x 12 cells, the size this fill was trained on, but got 8 x 8. Resize"):
        fill.fill(torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 8))
    with pytest.raises(ValueError, match=r"another model's VAE"):
        fill.fill(torch.zeros(1, 4, 8, 12), torch.zeros(1, 8, 12))
    with pytest.raises(
        ValueError, match=r"trained on \(3 channels, scale 1, shift 0\), but got 3 channels, scale 0.18215"
    ):
        fill.fill(latents_of(), hole(), latents_kind(3, 0.18215))
    fill.fill(latents_of(), hole(), latents_kind(3, 1.0))
    with pytest.raises(ValueError, match=r"`latents` to be finite"):
        fill.fill(torch.full((1, 3, 8, 12), torch.nan), hole())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"height": 9}, "`height` to be a multiple of 2, but got 9. Use 8"),
        ({"dim": 20}, "`dim` to be a multiple of 8"),
        ({"depth": 0}, "`depth` between 1"),
        ({"mean": (1.0,)}, "`mean` with 3 values"),
        ({"std": (1.0, 0.0, 1.0)}, "`std` of at least"),
        ({"patch": 1.5}, "`patch` to be an integer"),
    ],
)
def test_illegal_configs_are_refused_by_name(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **fields)


def rewrite(path: pathlib.Path, tensors: dict | None = None, **metadata: object) -> None:
    """Write a fill file again with other tensors or metadata."""
    old_tensors, old = read_tensors(path)
    text = {k: json.dumps(v) for k, v in {**old, **metadata}.items() if v is not None}
    save_file(old_tensors if tensors is None else tensors, path, {"format": FORMAT, **text})


def test_damaged_and_foreign_files_are_refused_with_their_name(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "f.safetensors"
    with pytest.raises(FileNotFoundError, match=r"nothing at .*f.safetensors. Train one first"):
        LatentFill.load(path)

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=f"Expected `f.safetensors` to be a latent fill, but got {message}"):
            LatentFill.load(path)

    for junk in (b"", b"hello", bytes(100)):
        path.write_bytes(junk)
        refused("a damaged file")
    LatentFill(TINY).save(path)
    whole = path.read_bytes()
    for size in (10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused("a damaged file")
    save_file({"a": torch.zeros(2)}, path)
    refused("a safetensors file of something else")

    def fresh() -> dict[str, torch.Tensor]:
        LatentFill(TINY).save(path)
        return load_file(path)

    fresh()
    rewrite(path, config=None)
    refused("a config that is not legal")
    fresh()
    rewrite(path, config={**dataclasses.asdict(TINY), "surprise": 1})
    refused("a config that is not legal")
    fresh()
    rewrite(path, config={**dataclasses.asdict(TINY), "dim": 4096, "depth": 64})
    refused("tensors that do not fit")
    tensors = fresh()
    rewrite(path, {k: v for k, v in tensors.items() if k != "mask_token"})
    refused("tensors that do not fit its config: mask_token")
    tensors = fresh()
    rewrite(path, {**tensors, "extra": torch.zeros(1)})
    refused("tensors that do not fit its config: extra")
    tensors = fresh()
    rewrite(path, {**tensors, "mask_token": torch.full((16,), torch.nan)})
    refused("NaN")


def test_the_suffix_is_part_of_the_format(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"end in .safetensors, but got 'a.pt'"):
        LatentFill(TINY).save(tmp_path / "a.pt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_in_half_precision_is_run_in_float32(tmp_path: pathlib.Path, dtype: torch.dtype) -> None:
    LatentFill(TINY).save(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / "a.safetensors")
    save_file({name: value.to(dtype) for name, value in tensors.items()}, tmp_path / "half.safetensors", metadata)
    whole, half = (
        LatentFill.load(tmp_path / name).fill(latents_of(), hole()) for name in ("a.safetensors", "half.safetensors")
    )
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, whole, rtol=0.05, atol=0.05)
    save_file({name: value.long() for name, value in tensors.items()}, tmp_path / "whole.safetensors", metadata)
    with pytest.raises(ValueError, match="tensors that do not fit its config"):
        LatentFill.load(tmp_path / "whole.safetensors")


def test_weights_that_overflow_are_named() -> None:
    fill = LatentFill(TINY)
    fill.head.weight.data.fill_(1e38)
    with pytest.raises(ValueError, match="Expected `the filled latents` to be finite everywhere"):
        fill.fill(latents_of(), hole())
