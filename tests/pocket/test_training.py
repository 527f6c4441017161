"""The pieces of the training recipe that have a closed form, and that a killed training continues."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from slipstream_tools.pocket import sampling, scenes
from slipstream_tools.pocket.models import make_scheduler, make_unet
from slipstream_tools.pocket.muon import Muon, orthogonalise
from slipstream_tools.pocket.train_text import CLASSES, caption_classes
from slipstream_tools.pocket.train_unet import draw_timesteps, loss_weights, make_optimizers, timestep_density
from slipstream_tools.pocket.train_vae import anchor_loss, reconstruction_loss
from slipstream_tools.pocket.training import Average, Loop, apply_gradients, cosine
from torch import nn


def test_a_killed_loop_continues(tmp_path):
    def build():
        net = nn.Linear(3, 3)
        return net, torch.optim.AdamW(net.parameters(), lr=0.1)

    net, optimizer = build()
    loop = Loop(tmp_path / "x.pt", 60.0, {"net": net, "optimizer": optimizer})
    for _ in loop:
        apply_gradients(net(torch.ones(1, 3)).square().mean(), 0.1, optimizer)
        loop.report(every=2, loss=torch.ones(()))
        if loop.step == 4:
            loop.save()
            break  # the kill
    other, other_optimizer = build()
    again = Loop(tmp_path / "x.pt", 60.0, {"net": other, "optimizer": other_optimizer})
    assert again.step == 4
    assert again.seconds == loop.seconds
    assert torch.equal(other.weight, net.weight)
    assert other_optimizer.state_dict()["state"][0]["step"] == optimizer.state_dict()["state"][0]["step"]
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 3, 4]
    assert lines[-1]["resumed"]


def test_a_finished_loop_does_nothing(tmp_path):
    net = nn.Linear(1, 1)
    loop = Loop(tmp_path / "x.pt", 1e-4, {"net": net})
    for _ in loop:
        pass
    assert list(Loop(tmp_path / "x.pt", 1e-4, {"net": net})) == []


def test_learning_rate_rises_and_falls():
    shares = np.linspace(0, 1, 101)
    factors = [cosine(s) for s in shares]
    assert max(factors) == pytest.approx(1.0)
    assert factors.index(max(factors)) == 3
    assert factors[3:] == sorted(factors[3:], reverse=True)
    assert factors[-1] == pytest.approx(0.01)


def test_the_average_of_a_constant_is_the_constant():
    net = nn.Linear(2, 2)
    average = Average(net, 0.99)
    before = net.weight.detach().clone()
    for _ in range(20):
        average.update()
    nn.init.zeros_(net.weight)
    average.copy_to(net)
    torch.testing.assert_close(net.weight.detach(), before)


def test_orthogonalised_matrices_have_singular_values_near_one():
    matrices = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalise(matrices))
    assert singular.min() > 0.6
    assert singular.max() < 1.25


def test_muon_lowers_a_quadratic():
    target = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    weight = nn.Parameter(torch.zeros(6, 4, 3, 3))
    muon = Muon([weight], lr=0.05)
    losses = []
    for i in range(200):
        loss = (weight - target).square().mean()
        losses.append(loss.item())
        apply_gradients(loss, 0.05 * (1 - i / 200), muon)
    assert losses[-1] < 0.1 * losses[0]


def test_every_weight_has_exactly_one_optimizer():
    unet = make_unet((16, 32, 32))
    seen = [p for o in make_optimizers(unet, 1e-3) for g in o.param_groups for p in g["params"]]
    assert len(seen) == len({id(p) for p in seen}) == len(list(unet.parameters()))


def test_loss_weights_make_an_x0_loss():
    alphas = make_scheduler().alphas_cumprod
    weights = loss_weights(alphas)
    snr = alphas / (1 - alphas)
    # |x0 error|^2 = |eps error|^2 / snr
    torch.testing.assert_close(weights * snr, (snr + 1).clamp(max=5))


def test_timesteps_are_stratified():
    density = timestep_density()
    torch.manual_seed(0)
    t = draw_timesteps(4000, density)
    assert t.min() >= 0
    assert t.max() <= 999
    shares = torch.bincount(t // 50, minlength=20) / 4000
    torch.testing.assert_close(shares, density.view(20, 50).sum(1), atol=2e-3, rtol=0)


def test_boundary_scalings_are_the_schedulers():
    scheduler = pytest.importorskip("diffusers").LCMScheduler()
    t = torch.tensor([0, 1, 19, 999])
    skip, out = sampling.boundary_scalings(t)
    for i, step in enumerate(t):
        wanted = scheduler.get_scalings_for_boundary_condition_discrete(step)
        assert skip[i].item() == pytest.approx(float(wanted[0]), abs=1e-6)
        assert out[i].item() == pytest.approx(float(wanted[1]), abs=1e-6)


def test_vae_losses_are_zero_for_the_truth():
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    assert reconstruction_loss(pictures, pictures) == 0
    latents = torch.cat([torch.nn.functional.avg_pool2d(pictures, 8), torch.zeros(2, 1, 4, 4)], 1)
    assert anchor_loss(latents, pictures) < 1e-10
    assert anchor_loss(latents + 1, pictures) > 0.5


def test_caption_classes_tell_said_from_unsaid():
    item = scenes.Item("star", "red", "small", "left", 0.13, 0.25, 0.5)
    scene = scenes.Scene("blue", (item,))
    full = caption_classes(scene, scenes.caption(scene))
    bare = caption_classes(scene, "a red star on a blue background")
    assert len(full) == len(CLASSES)
    assert all(0 <= value < classes for value, classes in zip(full, CLASSES))
    assert [i for i, (a, b) in enumerate(zip(full, bare)) if a != b] == [5, 9]
