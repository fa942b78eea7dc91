import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mnp_fast import DefenseConfig, masks, wrap
from mnp_fast.data import CleanSet
from mnp_fast.demo.resnet import ResNet18
from mnp_fast.exposure import OffsetExposure, WeightExposure
from mnp_fast.objectives import MaskFit, exposed_loss
from mnp_fast.seeds import FIT

from .models import NoNorm, randomize

EPOCHS = 3


def networks():
    """A network and one with other weights, as suppression leaves it."""
    model = randomize(ResNet18(4)).double().eval()
    suppressed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in suppressed.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model, suppressed


def random_set(count=23):
    return CleanSet(torch.rand(count, 3, 16, 16).double(), torch.randint(10, (count,)))


def frozen(model, site="auto"):
    """The model wrapped as a defense has it: in eval mode, gradients for masks only."""
    masked = wrap(model, site).eval().requires_grad_(False)
    for mask in masks(masked).values():
        mask.requires_grad_(True)
    return masked


def norms(model):
    return {k: m for k, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


def scaled(model, values, images):
    """The plain model's logits with every batch norm's gamma multiplied by its mask."""
    gammas = {f"{k}.weight": norm.weight * values[k] for k, norm in norms(model).items()}
    return torch.func.functional_call(model, gammas, (images,))


def close(actual, expected):
    return (actual - expected).abs().max().item() <= 1e-10


def test_without_alpha_and_penalty_it_is_rnps_recovering_step():
    """Masks on the gamma of the unlearned network, clean cross-entropy, SGD, clamp to [0, 1]."""
    model, unlearned = networks()
    data = random_set()
    config = DefenseConfig(
        exposure="weights", alpha=0, weight_penalty=0, fit_batch_size=5, fit_lr=0.2, seed=3
    )
    masked = frozen(model)
    fit = MaskFit(masked, WeightExposure(masked, unlearned, data, 0, config), data, config)

    theirs = {
        name: nn.Parameter(torch.ones_like(norm.weight)) for name, norm in norms(unlearned).items()
    }
    optimizer = torch.optim.SGD(theirs.values(), lr=config.fit_lr, momentum=config.fit_momentum)
    for epoch in range(EPOCHS):
        total = 0.0
        for images, labels in data.batches(5, config.seed, FIT, epoch):
            optimizer.zero_grad()
            loss = F.cross_entropy(scaled(unlearned, theirs, images), labels)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for mask in theirs.values():
                    mask.clamp_(0, 1)
            total += loss.item() * len(labels)
        assert fit.epoch(epoch) == pytest.approx(total / len(data), rel=1e-10)
        assert masks(masked).keys() == theirs.keys()
        assert all(close(mask, theirs[name]) for name, mask in masks(masked).items())
    values = torch.cat([mask.detach() for mask in theirs.values()])
    assert 0 < (values == 0).sum() < (values < 1).sum()  # the clamp was at work, on few


def magnitude_by_hand(model):
    """Share of each neuron's l1 norm in the whole network's, by name of its batch norm."""
    convs = dict(model.named_modules())
    sums = {}
    for name in norms(model):
        conv = name.replace("bn", "conv") if "bn" in name else f"{name[:-1]}0"
        sums[name] = convs[conv].weight.abs().sum((1, 2, 3)).detach()
    total = sum(s.sum() for s in sums.values())
    return {name: s / total for name, s in sums.items()}


@pytest.mark.parametrize("exposure", ["weights", "offset"])
def test_full_objective_is_its_formula_under_autograd(exposure):
    model, suppressed = networks()
    data = random_set(17)
    config = DefenseConfig(
        exposure=exposure, alpha=0.5, weight_penalty=0.3, fit_batch_size=6, fit_lr=0.1,
        offset_steps=6,
    )  # fmt: skip
    masked = frozen(model)
    if exposure == "weights":
        exposed = WeightExposure(masked, suppressed, data, 1, config)
    else:
        exposed = OffsetExposure(masked, data, 1, config)
        exposed.start()
    fit = MaskFit(masked, exposed, data, config)

    shares = magnitude_by_hand(model)
    theirs = {n: nn.Parameter(torch.ones_like(m.weight)) for n, m in norms(model).items()}
    optimizer = torch.optim.SGD(theirs.values(), lr=config.fit_lr, momentum=config.fit_momentum)
    low, high = data.images.min(), data.images.max()
    step = 0
    for epoch in range(EPOCHS):
        objective = fit.epoch(epoch)
        total = 0.0
        for images, labels in data.batches(6, config.seed, FIT, epoch):
            if exposure == "weights":
                other = scaled(suppressed, theirs, images)
            else:
                offset = exposed.offsets[step % len(exposed.offsets)]
                other = scaled(model, theirs, (images + offset).clamp(low, high))
            kept = sum((m * shares[n]).sum() for n, m in theirs.items())
            loss = (
                0.5 * F.cross_entropy(scaled(model, theirs, images), labels)
                + (1 - 0.5) * F.cross_entropy(other, labels)
                + 0.3 * len(theirs) * kept
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for mask in theirs.values():
                    mask.clamp_(0, 1)
            total += loss.item() * len(labels)
            step += 1
        assert all(close(mask, theirs[name]) for name, mask in masks(masked).items())
        assert objective == pytest.approx(total / len(data), rel=1e-9)


class Logits:
    """An exposure that counts how often it is asked."""

    def __init__(self):
        self.asked = self.renewed = 0

    def renew(self, epoch):
        self.renewed += 1

    def logits(self, images, step):
        self.asked += 1
        return torch.zeros(len(images), 10, dtype=images.dtype)


@pytest.mark.parametrize(("alpha", "clean", "exposed"), [(1, 4, 0), (0.5, 4, 4)])
def test_parts_without_weight_are_not_computed(alpha, clean, exposed):
    masked, stub, runs = frozen(networks()[0]), Logits(), []
    masked.register_forward_hook(lambda *_: runs.append(1))
    config = DefenseConfig(alpha=alpha, fit_batch_size=6)
    MaskFit(masked, stub, random_set(), config).epoch(0)
    assert (len(runs), stub.asked, stub.renewed) == (clean, exposed, 1)


def test_alpha_0_does_not_run_the_clean_network():
    model, suppressed = networks()
    masked, data = frozen(model), random_set(4)
    config = DefenseConfig(exposure="weights", alpha=0)
    fit = MaskFit(masked, WeightExposure(masked, suppressed, data, 0, config), data, config)
    masked.register_forward_hook(lambda *_: pytest.fail("the clean network was run"))
    fit.epoch(0)


@pytest.mark.parametrize("network", [lambda: ResNet18(4), NoNorm])
def test_penalty_is_between_0_and_the_number_of_layers(network):
    masked = frozen(network().double())
    parameters = list(masks(masked).values())
    fit = MaskFit(masked, Logits(), random_set(), DefenseConfig())
    assert fit.penalty() == pytest.approx(len(parameters), rel=1e-12)
    for mask in parameters:
        nn.init.uniform_(mask)
    expected = sum((m * s).sum().item() for m, s in zip(parameters, fit.magnitudes, strict=True))
    assert fit.penalty() == pytest.approx(expected, rel=1e-12)
    assert 0 < expected < len(parameters)
    for mask in parameters:
        nn.init.zeros_(mask)
    assert fit.penalty() == 0


def test_penalty_of_a_network_without_weights_is_0():
    model = ResNet18(4)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    masked = frozen(model)
    data = CleanSet(torch.rand(4, 3, 16, 16), torch.arange(4))
    fit = MaskFit(masked, Logits(), data, DefenseConfig(alpha=1))
    assert fit.penalty() == 0
    fit.epoch(0)
    assert all(torch.equal(m, torch.ones_like(m)) for m in masks(masked).values())


def test_weights_have_no_gradients_and_stay():
    model, suppressed = networks()
    masked, data = frozen(model), random_set(8)
    config = DefenseConfig(exposure="weights")
    exposure = WeightExposure(masked, suppressed, data, 0, config)
    before = [copy.deepcopy(net.state_dict()) for net in (masked, exposure.model, suppressed)]
    fit = MaskFit(masked, exposure, data, config)
    loss = exposed_loss(masked, exposure, data.images, data.labels, 0, config.alpha)
    loss.backward()
    names = {f"{name}.mask" for name in masks(masked)}
    for net in (masked, exposure.model):
        assert {k for k, p in net.named_parameters() if p.grad is not None} == names
    for mask in fit.masks:
        mask.grad = None
    fit.epoch(0)
    assert all(p.grad is None for p in (*masked.parameters(), *exposure.model.parameters()))
    for net, old in zip((masked, exposure.model, suppressed), before, strict=True):
        changed = {k for k, v in net.state_dict().items() if not torch.equal(v, old[k])}
        assert changed == (set() if net is suppressed else names)


def test_repeatable_by_seed():
    model, suppressed = networks()
    data = random_set()

    def fitted(seed):
        masked = frozen(model)
        config = DefenseConfig(exposure="weights", seed=seed, fit_batch_size=5)
        fit = MaskFit(masked, WeightExposure(masked, suppressed, data, 0, config), data, config)
        fit.epoch(0)
        return torch.cat([m.detach() for m in fit.masks])

    assert torch.equal(fitted(0), fitted(0))
    assert not torch.equal(fitted(0), fitted(1))


def test_a_layer_that_the_output_does_not_depend_on_keeps_its_masks():
    class DeadEnd(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.dead = nn.Linear(3 * 256, 5), nn.Linear(3 * 256, 5)
            self.end, self.fc = nn.Linear(5, 4), nn.Linear(5, 4)

        def forward(self, x):
            x = x.flatten(1)
            self.end(self.dead(x))
            return self.fc(F.relu(self.body(x)))

    model = DeadEnd().double().eval()
    masked, data = frozen(model), CleanSet(random_set().images, torch.arange(23) % 4)
    config = DefenseConfig(exposure="weights", weight_penalty=0, fit_lr=0.5)
    exposure = WeightExposure(masked, copy.deepcopy(model), data, 1, config)
    MaskFit(masked, exposure, data, config).epoch(0)
    assert (masks(masked)["dead"] == 1).all()
    assert (masks(masked)["body"] != 1).any()
