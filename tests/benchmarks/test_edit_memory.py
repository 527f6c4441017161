"""What mode draft holds in memory beside a plain sampling, counted at every network call."""

from __future__ import annotations

from slipstream_tests.conftest import load_benchmark


def test_a_draft_holds_a_few_images_more_than_a_plain_sampling_and_calls_as_it_does() -> None:
    more, network = load_benchmark("edit_memory").draft_bytes(256)
    assert more < 0.1 * (1 << 30) / 16  # of 1024 x 1024, which may take 0.1 GiB: it grows with the area
    assert network.held > 4 * 3 * 256 * 256  # the photo itself was counted
    assert network.most == 2  # cond and uncond, as in plain sampling
    assert 0 < network.rows <= 32
