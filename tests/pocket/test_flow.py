"""The recipe of pocket-flow: scenes with exact masks, the closed forms of flow matching, and a training that continues where it stopped."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from slipstream_tools import train_pocket
from slipstream_tools.pocket import emoji, flow_checker, flow_models, flow_sampling, flow_scenes, train_flow
from slipstream_tools.pocket import train_flow_text as text_stage
from slipstream_tools.pocket import train_flow_vae as vae_stage
from slipstream_tools.pocket.models import build_tokenizer, make_text_encoder, make_vae, tokenize
from torch import nn


@pytest.fixture(autouse=True)
def no_font(monkeypatch):
    """Objects are squares of one grey each: the tests need no font."""

    def tiles(side, font=None):
        grey = torch.linspace(0.2, 0.8, len(emoji.OBJECTS)).view(-1, 1, 1, 1).expand(-1, 4, side, side).clone()
        grey[:, 3] = 1
        return grey

    monkeypatch.setattr(flow_scenes, "object_tiles", tiles)


@pytest.fixture
def scenes():
    return flow_scenes.sample_scenes(64, np.random.default_rng(0), pairs=0.5, shapes=0.5)


def test_there_are_sixty_objects_of_one_word_each():
    assert len(emoji.OBJECTS) == 60
    assert len(set(flow_scenes.NOUNS)) == 66
    assert all(word.isalpha() and word.islower() for word in flow_scenes.WORDS)


def test_a_missing_font_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="Install fonts-noto-color-emoji"):
        emoji.draw_object("cat", tmp_path / "none.ttf")


def test_objects_lie_whole_on_the_grid_on_their_side(scenes):
    for k, there in ((0, torch.ones(64, dtype=torch.bool)), (1, scenes.noun[:, 1] >= 0)):
        side = torch.tensor(flow_scenes.SIDES)[scenes.size[there, k]][:, None]
        corner = scenes.corner[there, k]
        assert ((corner >= 0) & (corner + side <= 128)).all()
        assert (corner % 8 == 0).all()
        off = corner + side / 2 - 64
        place = scenes.place[there, k]
        assert (off[place == 1, 0] < 0).all()
        assert (off[place == 2, 0] > 0).all()
        assert (off[place == 3, 1] < 0).all()
        assert (off[place == 4, 1] > 0).all()


def test_an_image_is_its_background_outside_of_the_masks(scenes):
    atlas = flow_scenes.make_atlas()
    images, masks = flow_scenes.render(scenes, atlas), flow_scenes.coverage(scenes, atlas)
    outside = (masks.amax(1, keepdim=True) == 0).expand_as(images)
    assert torch.equal(images[outside], (flow_scenes.backgrounds(scenes) * 2 - 1)[outside])
    assert images.abs().max() <= 1


def test_a_coloured_shape_is_drawn_in_its_colour_where_the_scene_says():
    one = flow_scenes.sample_scenes(1, np.random.default_rng(1), pairs=0, shapes=1)
    atlas = flow_scenes.make_atlas()
    inside = flow_scenes.coverage(one, atlas)[0, 0] == 1
    colour = torch.tensor(flow_scenes.PALETTE[flow_scenes.COLOURS[one.colour[0, 0]]]) / 127.5 - 1
    torch.testing.assert_close(
        flow_scenes.render(one, atlas)[0][:, inside], colour[:, None].expand(3, int(inside.sum()))
    )
    side = flow_scenes.SIDES[one.size[0, 0]]
    rows = inside.nonzero() - one.corner[0, 0].flip(0)
    assert rows.min() >= 0
    assert rows.max() < side


def test_captions_say_everything_and_fit_the_text_encoder(scenes):
    assert flow_scenes.caption(scenes, 0, full=True).startswith("a ")
    for i in range(64):
        text = flow_scenes.caption(scenes, i)
        assert len(text.split()) + 2 <= text_stage.LENGTH
        assert set(text.split()) <= set(flow_scenes.WORDS)
        classes = text_stage.caption_classes(scenes, i, text)
        wanted = [int(scenes.background[i]), int(scenes.kind[i]), int(scenes.noun[i, 1] >= 0)]
        for k in range(2):
            values = (scenes.noun[i, k], scenes.size[i, k], scenes.colour[i, k], scenes.place[i, k])
            wanted += [int(v) if v >= 0 else n - 1 for v, n in zip(values, text_stage.CLASSES[3:7])]
        assert classes == wanted


def test_words_are_the_tokenizers_tokens(tmp_path, scenes):
    tokenizer = build_tokenizer(tmp_path, flow_scenes.WORDS, text_stage.LENGTH)
    texts = [flow_scenes.caption(scenes, i) for i in range(8)]
    table = train_flow.word_table(tokenizer)
    assert tokenize(tokenizer, texts).tolist() == [train_flow.word_ids(t, table, tokenizer) for t in texts]


def test_the_training_pass_equals_the_class():
    model = flow_models.make_transformer(64, 2, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    x, t, context = torch.randn(3, 16, 16, 16), torch.tensor([0.0, 0.4, 0.9]), torch.randn(3, 24, 128)
    with torch.no_grad():
        wanted = model(x, t, context, torch.ones(3, 24, dtype=torch.long)).sample
        torch.testing.assert_close(flow_models.Trainer(model)(x, t, context), wanted, atol=1e-5, rtol=1e-5)


def test_times_are_logit_normal():
    times = train_flow.draw_times(20_000, 0.4, "cpu")
    logits = torch.log((1 - times) / times)
    assert logits.mean().item() == pytest.approx(0.4, abs=0.01)
    assert logits.std().item() == pytest.approx(1.0, abs=0.01)


def test_the_loss_of_the_exact_velocity_is_zero():
    clean = torch.randn(4, 2, 3, 3)
    times = torch.tensor([0.1, 0.4, 0.7, 0.95])
    t = times.view(-1, 1, 1, 1)
    exact = lambda x, at, context: clean - (x - t * clean) / (1 - t)  # noqa: E731
    assert train_flow.flow_loss(exact, clean, clean, times) < 1e-8
    wrong = lambda x, at, context: exact(x, at, context) + 1  # noqa: E731
    assert train_flow.flow_loss(wrong, clean, clean, times).item() == pytest.approx(1.0, abs=1e-4)


def test_euler_reaches_data_of_one_point_and_guidance_leads_away_from_the_empty_text():
    class Point(nn.Module):
        def forward(self, x, times, text):
            return (text[..., None] - x) / (1 - times.view(-1, 1, 1, 1)).clamp(min=1e-6)

    noise, target = torch.randn(2, 1, 2, 2), torch.full((2, 1, 1), 3.0)
    sigmas = flow_sampling.shifted_sigmas(5, 2.0)
    assert sigmas[1].item() == pytest.approx(2 * 0.8 / 1.8)
    # one point per text: with scale 1 the text's own, with 2 as far beyond it
    for scale, wanted in ((1.0, 3.0), (2.0, 5.0)):
        found = flow_sampling.euler_latents(Point(), target, torch.ones(1, 1, 1), noise, sigmas, scale)
        torch.testing.assert_close(found, torch.full_like(found, wanted), atol=1e-4, rtol=0)


def test_the_widened_autoencoder_starts_as_the_narrow_one():
    old = make_vae((4, 8, 8, 8))
    wide = vae_stage.widened(old)
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        latents = wide.encode(images).latent_dist.mean
        torch.testing.assert_close(latents[:, :4], old.encode(images).latent_dist.mean)
        wide.decoder.conv_in.weight[:, 4:] = 0
        wide.post_quant_conv.weight[:4, 4:] = 0
        torch.testing.assert_close(wide.decode(latents).sample, old.decode(latents[:, :4]).sample)


def test_the_checker_asks_for_what_is_there(scenes):
    truth = flow_checker.labels(scenes)
    assert list(truth) == list(flow_checker.HEADS)
    for name, classes in flow_checker.HEADS.items():
        asked = truth[name][truth[name] != flow_scenes.UNSAID]
        assert ((asked >= 0) & (asked < classes)).all()
    assert (truth["count"] == (truth["object2"] >= 0)).all()
    single = scenes[truth["count"] == 0]
    assert (flow_checker.labels(single)["object2"] == flow_scenes.UNSAID).all()


def test_pixels_of_rendered_shapes_say_what_is_there():
    scenes, captions = flow_sampling.plain_shapes(24)
    assert len(captions) == 24
    images = flow_scenes.render(scenes, flow_scenes.make_atlas())
    found = flow_sampling.read_by_pixels(images, scenes)
    assert list(found) == ["background", "colour", "place"]
    assert min(found.values()) >= 0.95
    assert max(flow_sampling.read_by_pixels(images.flip(0), scenes).values()) < 0.5


def test_a_gpu_needs_less_than_nine_minutes():
    settings = [train_pocket.flow_settings(stage, "cuda", None) for stage in train_pocket.FLOW_STAGES]
    assert sum(s.minutes for s in settings) <= 8


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A work folder as the stages before the transformer leave it, with random weights and small shards."""
    monkeypatch.setattr(train_flow, "_SHARD", 8)
    tokenizer = build_tokenizer(tmp_path / "tokenizer", flow_scenes.WORDS, text_stage.LENGTH)
    make_text_encoder(tokenizer, text_stage.WIDTH).save_pretrained(tmp_path / "text_encoder")
    vae = make_vae((4, 8, 8, 8), 16)
    vae.register_to_config(scaling_factor=1.5)
    vae.save_pretrained(tmp_path / "vae")
    return tmp_path


TINY = train_flow.FlowSettings(
    minutes=0.02, width=32, layers=1, heads=1, first=8, latents=16, grow_every=1, batch=2, save_every=60.0
)


def test_training_writes_a_folder_and_continues_on_the_same_latents(work):
    out = work / "out"
    train_flow.train_flow(work, out, "cpu", TINY)
    pipe = flow_sampling.FlowPipeline(out)
    images = pipe.draw(["a large cat on a blue background"], steps=2)
    assert images.shape == (1, 3, 128, 128)
    assert images.isfinite().all()
    shards = {p.name: p.stat().st_mtime_ns for p in (work / "latents").iterdir()}
    assert len(shards) == 2
    step = torch.load(work / "dit.pt")["step"]
    train_flow.train_flow(work, out, "cpu", dataclasses.replace(TINY, minutes=0.04))
    assert torch.load(work / "dit.pt")["step"] > step
    assert {p.name: p.stat().st_mtime_ns for p in (work / "latents").iterdir()} == shards
    assert not list(work.glob("out.*"))
