"""Kinds of magnitude on whole models."""

import pytest
import torch
from torch import nn

import mnp_fast
from mnp_fast.demo.resnet import ResNet18
from mnp_fast.stats import MAGNITUDES, magnitudes

from .models import NoNorm, PreActivation, Shared, randomize
from .ops.cases import relative_error


class Volumes(nn.Module):
    """Convolutions of one to three dimensions, grouped and transposed, with their norms."""

    def __init__(self):
        super().__init__()
        self.conv3 = nn.Conv3d(2, 6, 3, groups=2)
        self.norm3 = nn.BatchNorm3d(6)
        self.up = nn.ConvTranspose2d(6, 4, 3, groups=2)
        self.norm2 = nn.BatchNorm2d(4, affine=False)
        self.conv1 = nn.Conv1d(4, 5, 3)
        self.norm1 = nn.BatchNorm1d(5)
        self.hidden = nn.Linear(5, 7)
        self.norm0 = nn.BatchNorm1d(7)
        self.bare = nn.BatchNorm1d(7)
        self.fc = nn.Linear(7, 3)

    def forward(self, x):
        x = torch.relu(self.norm3(self.conv3(x))).mean(2)
        x = torch.relu(self.norm2(self.up(x))).mean(2)
        x = torch.relu(self.norm1(self.conv1(x))).mean(2)
        return self.fc(self.bare(torch.relu(self.norm0(self.hidden(x)))))


def random_norms(model):
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_var, 1e-3, 2)
            nn.init.normal_(module.running_mean)
            if module.affine:
                nn.init.normal_(module.weight)
    return model.double().eval()


def rows_of(layer):
    """A neuron's weights (neurons, channels, taps), by its definition."""
    weight = layer.weight.detach()
    if isinstance(layer, nn.ConvTranspose2d):
        parts = weight.chunk(layer.groups, 0)
        weight = torch.cat([part.transpose(0, 1) for part in parts])
    return weight.reshape(len(weight), weight.shape[1], -1)


PAIRS = {"norm3": "conv3", "norm2": "up", "norm1": "conv1", "norm0": "hidden"}


@pytest.mark.parametrize("site", ["auto", "filter"])
def test_every_kind_by_definition(site):
    model = random_norms(Volumes())
    masked = mnp_fast.wrap(model, site)
    found = {kind: magnitudes(masked, kind) for kind in MAGNITUDES}
    for norm_name, layer_name in PAIRS.items():
        rows, norm = rows_of(getattr(model, layer_name)), getattr(model, norm_name)
        gamma = torch.ones(len(rows)) if norm.weight is None else norm.weight.detach().abs()
        scale = gamma / (norm.running_var + norm.eps).sqrt()
        expected = {
            "l1": rows.abs().sum((1, 2)),
            "l2": rows.square().sum((1, 2)).sqrt(),
            "linf": rows.abs().amax((1, 2)),
            "effective": (rows * scale[:, None, None]).square().sum((1, 2)).sqrt(),
            "spectral": torch.linalg.svdvals(rows)[:, 0] * gamma / norm.running_var.sqrt(),
        }
        name = layer_name if site == "filter" else norm_name
        for kind in MAGNITUDES:
            assert relative_error(found[kind][name], expected[kind].double()) <= 1e-8, (name, kind)


def test_a_norm_without_a_layer_in_front_is_its_scale():
    model = random_norms(Volumes())
    masked, norm = mnp_fast.wrap(model), model.bare
    gamma = norm.weight.detach().abs()
    for kind in ("l1", "l2", "linf"):
        assert relative_error(magnitudes(masked, kind)["bare"], gamma) <= 1e-12
    scale = gamma / (norm.running_var + norm.eps).sqrt()
    assert relative_error(magnitudes(masked, "effective")["bare"], scale) <= 1e-12


def clp_scores(model):
    """Channel Lipschitz constants as CLP computes them, one decomposition a channel."""
    scores, conv = {}, None
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            conv = module
        elif isinstance(module, nn.BatchNorm2d):
            scale = (module.weight / module.running_var.sqrt()).abs()
            filters = conv.weight.reshape(len(scale), conv.in_channels, -1)
            channels = zip(filters, scale, strict=True)
            scores[name] = torch.stack([torch.svd(w * s)[1].max() for w, s in channels])
    return scores


def test_spectral_is_the_score_of_clp():
    torch.manual_seed(1)
    model = randomize(ResNet18(16)).eval()
    model.bn1.running_var[:3] = 1e-4  # eps would count here
    found, expected = magnitudes(mnp_fast.wrap(model), "spectral"), clp_scores(model)
    assert list(found) == list(expected)
    for name in found:
        assert ((found[name] - expected[name]).abs() <= 1e-4 * expected[name]).all()


def test_a_variance_of_0_is_replaced_by_eps():
    model = random_norms(Volumes())
    model.norm1.running_var[2] = 0
    found = magnitudes(mnp_fast.wrap(model), "spectral")["norm1"]
    expected = torch.linalg.svdvals(rows_of(model.conv1)[2])[0] * model.norm1.weight[2].abs()
    assert found[2].item() == pytest.approx(expected.item() / model.norm1.eps**0.5)


@pytest.mark.parametrize("kind", ["effective", "spectral"])
def test_rescaling_a_filter_and_its_norm_changes_nothing(kind):
    model, x = random_norms(Volumes()), torch.randn(2, 2, 7, 8, 9).double()
    masked = mnp_fast.wrap(model)
    before, outputs = magnitudes(masked, kind), masked(x)
    plain = magnitudes(masked, "l2")["norm3"]
    factor = torch.rand(6).double() + 0.5
    with torch.no_grad():
        conv, norm = masked.conv3, masked.norm3
        conv.weight *= factor.reshape(-1, 1, 1, 1, 1)
        conv.bias *= factor
        norm.running_mean *= factor
        # So that the outputs stay: eps is not rescaled. Without eps, what CLP's score looks at.
        eps = norm.eps if kind == "effective" else 0.0
        norm.running_var.copy_(factor**2 * (norm.running_var + eps) - eps)
    assert relative_error(magnitudes(masked, kind)["norm3"], before["norm3"]) <= 1e-8
    assert relative_error(masked(x), outputs) <= (1e-12 if kind == "effective" else 1e-2)
    assert relative_error(magnitudes(masked, "l2")["norm3"], plain * factor) <= 1e-12


@pytest.mark.parametrize("kind", MAGNITUDES)
@pytest.mark.parametrize("site", ["auto", "filter"])
@pytest.mark.parametrize("make", [PreActivation, NoNorm, Shared])
def test_permuted_neurons_permute_the_results(make, site, kind):
    model = randomize(make()).double().eval()
    masked = mnp_fast.wrap(model, site)
    before = magnitudes(masked, kind)
    orders = {}
    for name, module in masked.named_modules():
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        sizes = [len(t) for t in tensors if t.dim()]
        if sizes:
            # One order for all layers of a size: norms keep to their layers.
            orders[name] = torch.randperm(sizes[0], generator=torch.Generator().manual_seed(3))
            for tensor in tensors:
                if tensor.dim():
                    tensor.data = tensor.data[orders[name]].clone()
    after = magnitudes(masked, kind)
    for name in before:
        assert relative_error(after[name], before[name][orders[name]]) <= 1e-10


def test_unknown_kind():
    with pytest.raises(ValueError, match="kind must be one of l1, l2, linf, effective, spectral"):
        magnitudes(mnp_fast.wrap(PreActivation()), "l3")
