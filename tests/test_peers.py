import sys

import pytest
import torch

from benchmarks.architectures import build
from benchmarks.defenses import GROUPS, PEERS, defense, names
from benchmarks.peers import anp, bnp, clp, fine_pruning, fine_tuning, rnp, rule
from benchmarks.peers.norms import cut, masked, ones, outliers
from mnp_fast.wrap import masks, wrap

from .models import randomize
from .trained import small_net, stripes

pytestmark = pytest.mark.usefixtures("one_thread")


def network():
    torch.manual_seed(0)
    return randomize(small_net()).eval()


def test_masked_is_wrap_at_the_norms():
    model, images = network(), torch.rand(5, 3, 8, 8)
    scales = {name: torch.rand_like(mask) for name, mask in ones(model).items()}
    wrapped = wrap(model, "norm").eval()
    with torch.no_grad():
        for name, mask in masks(wrapped).items():
            mask.copy_(scales[name])
    torch.testing.assert_close(masked(model, images, scales), wrapped(images))
    shifts = {name: torch.zeros_like(scale) for name, scale in scales.items()}
    silent = cut(model, {n: torch.ones_like(s, dtype=torch.bool) for n, s in scales.items()}, True)
    zeros = {name: torch.zeros_like(scale) for name, scale in scales.items()}
    torch.testing.assert_close(masked(model, images, zeros, shifts), silent(images))


def test_cut_leaves_the_model_and_other_channels():
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gone = torch.tensor([True, *[False] * 7])
    pruned = cut(model, {"1": gone}, bias=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert pruned[1].weight[0] == 0
    assert torch.equal(pruned[1].weight[1:], model[1].weight[1:])
    assert torch.equal(pruned[1].bias, model[1].bias)
    assert cut(model, {"1": gone}, bias=True)[1].bias[0] == 0


def test_clp_takes_the_filter_in_front_of_a_norm():
    model = network().double()
    found = clp.scores(model, torch.empty(0), torch.empty(0), 0)
    for conv, norm in ((0, 1), (3, 4)):
        expected = []
        for channel in range(len(model[norm].weight)):
            matrix = model[conv].weight[channel].reshape(model[conv].in_channels, -1)
            gain = model[norm].weight[channel].abs() / model[norm].running_var[channel].sqrt()
            expected.append(torch.linalg.svdvals(matrix * gain)[0])
        expected = -torch.stack(expected)
        expected = (expected - expected.mean()) / expected.std()
        torch.testing.assert_close(found[str(norm)], expected)


def test_clp_reads_pre_activation_networks_by_their_data_flow():
    model = build("preact-resnet18", 4, 0)
    # What the other norms read is read by a shortcut too, so that they belong to no convolution.
    found = clp.scores(model, torch.empty(0), torch.empty(0), 0)
    assert set(found) == {f"{block}.bn2" for block in range(1, 9)}


def test_outliers_are_low():
    scores = torch.cat([torch.ones(30), torch.tensor([-4.0, 5.0])])
    assert outliers({"a": scores}, 3.0)["a"].nonzero().tolist() == [[30]]


def test_bnp_is_the_divergence_of_two_normal_distributions():
    model, images = network().double(), torch.rand(9, 3, 8, 8).double()
    found = bnp.scores(model, images, torch.empty(0), 0)
    with torch.no_grad():
        inputs, norm = model[0](images), model[1]
    clean = torch.distributions.Normal(
        inputs.mean((0, 2, 3)), (inputs.var((0, 2, 3)) + norm.eps).sqrt()
    )
    running = torch.distributions.Normal(norm.running_mean, (norm.running_var + norm.eps).sqrt())
    expected = -torch.distributions.kl_divergence(clean, running)
    torch.testing.assert_close(found["1"], (expected - expected.mean()) / expected.std())


def test_fine_pruning_looks_at_the_norm_that_runs_last():
    model, images = network(), torch.rand(5, 3, 8, 8)
    ((name, activity),) = fine_pruning.scores(model, images, torch.empty(0), 0).items()
    assert name == "4"
    with torch.no_grad():
        torch.testing.assert_close(activity, model[:6](images).mean((0, 2, 3)))


@pytest.fixture
def short(monkeypatch):
    """Few steps in every peer."""
    monkeypatch.setattr(anp, "ITERATIONS", 4)
    monkeypatch.setattr(rnp, "UNLEARN_EPOCHS", 2)
    monkeypatch.setattr(rnp, "RECOVER_EPOCHS", 2)
    monkeypatch.setattr(fine_tuning, "EPOCHS", 2)


@pytest.mark.parametrize("name", PEERS)
def test_peers_leave_their_model_and_depend_on_the_seed_alone(name, short):
    model, clean = network(), stripes(24, seed=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    results = []
    for state in (1, 2):
        torch.manual_seed(state)
        results.append(PEERS[name].defend(model, clean.images, clean.labels, 5).state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not model.training
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())


@pytest.mark.parametrize("peer", [anp, rnp])
def test_fitted_masks_are_in_range_and_differ(peer, short):
    model, clean = network(), stripes(24, seed=2)
    found = torch.cat(list(peer.scores(model, clean.images, clean.labels, 0).values()))
    assert found.min() >= 0
    assert found.max() <= 1
    assert found.std() > 0


def test_anp_perturbs_within_epsilon(short, monkeypatch):
    seen = []
    perturbed = anp._perturbed

    def spy(model, images, labels, scales, delta, xi):
        seen.append(torch.cat([*delta.values(), *xi.values()]).detach())
        return perturbed(model, images, labels, scales, delta, xi)

    monkeypatch.setattr(anp, "_perturbed", spy)
    clean = stripes(24, seed=2)
    anp.scores(network(), clean.images, clean.labels, 0)
    assert len(seen) == 8
    assert all(noise.abs().max() <= anp.EPSILON for noise in seen)
    assert (seen[1].abs() == anp.EPSILON).any()
    assert not torch.equal(seen[0], seen[1])


def test_rule_cuts_in_the_given_order(monkeypatch):
    model, clean = network(), stripes(24, seed=2)
    orders = []

    def keep(masked, order, *_):
        orders.append([(neuron.layer, neuron.index) for neuron in order])
        return iter([])

    # The package's function has the name of the module.
    monkeypatch.setattr(sys.modules["mnp_fast.defend"], "cut_points", keep)
    scores = {"4": torch.arange(16.0).flip(0) - 20}
    with pytest.raises(IndexError):  # no curve, no cut
        rule.prune_by_rule(model, clean.images, clean.labels, 0, scores, bias=False)
    assert orders[0][:15] == [("4", index) for index in range(15, 0, -1)]


def test_names_of_defenses():
    assert names("mnp;ablation;clp") == ["mnp", *GROUPS["ablation"], "clp"]
    for wrong in (
        "anpp",
        "fine-tuning+rule",
        "mnp:alpha=2",
        "mnp:beta=1",
        "mnp:seed=3",
        "mnp+rule",
    ):
        with pytest.raises(ValueError, match="defense|alpha"):
            defense(wrong)
