"""Regions of blocks against the same blocks one by one, which have tests of their own."""

import pytest
import torch
from torch import nn

import mnp_fast
from mnp_fast.fusion import run_region
from mnp_fast.region import Region, Step

from .cases import relative_error, torch_threads


def layers(channels, neurons, site, *, stride=1, bias=False, affine=True, norm=True, groups=1):
    """A convolution and a norm, masked at a site, with random masks, vectors and statistics."""
    conv = nn.Conv2d(channels, neurons, 3, stride, 1, groups=groups, bias=bias)
    parts = [conv, nn.BatchNorm2d(neurons, affine=affine)] if norm else [conv]
    parts.append(nn.Conv2d(neurons, 1, 1))  # what makes the output gets no mask
    masked = mnp_fast.wrap(nn.Sequential(*parts).double().eval(), site=site, fuse=False)
    for tensor in (*masked.parameters(), *masked.buffers()):
        if tensor.is_floating_point() and tensor.dim() == 1:
            nn.init.uniform_(tensor, 0.2, 1.5)
    for mask in mnp_fast.masks(masked).values():
        mask.data[::3] = 0
    return masked[0], masked[1] if norm else None


def chain(site, **options):
    """X -> a -> b, with a as residual of b, and x once more beside them."""
    first, second = (layers(c, 6, site, **options) for c in (4, 6))
    side = layers(4, 6, site, stride=1)
    steps = [
        Step(*first, 0, None, True, "auto"),
        Step(*second, 1, 1, True, "auto"),
        Step(*side, 0, 2, False, "auto"),
    ]
    return steps, [2, 3]


def one_by_one(steps, inputs, outputs, means=()):
    region = Region(steps, outputs, means)
    region.plan = lambda inputs: None
    return run_region(region, inputs)


def tensors_of(steps):
    modules = [module for step in steps for module in (step.conv, step.norm) if module is not None]
    return [parameter for module in modules for parameter in module.parameters()]


def outputs_and_gradients(run, steps, outputs, x, means=()):
    x = x.clone().requires_grad_(True)
    made = run(steps, [x], outputs, means)
    wanted = [t for t in (x, *tensors_of(steps)) if t.requires_grad]
    generator = torch.Generator().manual_seed(2)
    seeds = [torch.randn(y.shape, dtype=y.dtype, generator=generator) for y in made]
    grads = torch.autograd.grad(made, wanted, seeds, allow_unused=True, materialize_grads=True)
    return [*made, *grads]


def together(steps, inputs, outputs, means=()):
    region = Region(steps, outputs, means)
    assert region.plan(inputs) is not None
    return run_region(region, inputs)


def images(dtype=torch.float64, batch=3):
    return torch.randn(batch, 4, 7, 6, dtype=dtype)


def assert_equal_to_one_by_one(steps, outputs, means=(), batch=3):
    x = images(batch=batch)
    ours, theirs = (
        outputs_and_gradients(run, steps, outputs, x, means) for run in (together, one_by_one)
    )
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape
        assert relative_error(mine, other) <= 1e-12


@pytest.mark.parametrize("site", ["norm", "neuron", "filter"])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True}, {"affine": False, "bias": True}, {"groups": 2}],
    ids=["plain", "biases", "no affine", "groups"],
)
def test_equal_to_one_by_one(site, options):
    assert_equal_to_one_by_one(*chain(site, **options))


@pytest.mark.parametrize("site", ["neuron", "filter"])
def test_without_norms(site):
    assert_equal_to_one_by_one(*chain(site, norm=False, bias=True))


@pytest.mark.parametrize("kind", ["mask", "scale", "bias", "weight", "image"])
def test_gradients_of_one_kind_alone(kind):
    steps, outputs = chain("norm", bias=True)
    of_kind = {
        "mask": lambda step: step.norm.mask,
        "scale": lambda step: step.norm.weight,
        "bias": lambda step: step.conv.bias,
        "weight": lambda step: step.conv.weight,
    }
    for tensor in tensors_of(steps):
        tensor.requires_grad_(False)
    if kind in of_kind:
        # The last block has no bias of its convolution.
        chosen = [t for t in map(of_kind[kind], steps) if t is not None]
        for tensor in chosen:
            tensor.requires_grad_(True)
    assert_equal_to_one_by_one(steps, outputs)


def shortcut(site):
    """X -> a -> b without ReLU, c of a, the sum of both; then a block whose output is returned."""
    first, second, third, last = (layers(c, 6, site, bias=True) for c in (4, 6, 6, 6))
    steps = [
        Step(*first, 0, None, True, "auto"),
        Step(*second, 1, None, False, "auto"),
        Step(*third, 1, 2, True, "auto"),
        Step(*last, 3, 3, True, "auto"),
    ]
    for step in steps:
        for part in (step.conv, step.norm):
            for name, parameter in part.named_parameters():
                parameter.requires_grad_(name == "mask")
                if name == "mask":
                    nn.init.uniform_(parameter, 0.125, 1)
    return steps, [4]


def tensors_kept(steps, outputs, batch=3):
    """The output, and what is kept for the backward."""
    x = images(batch=batch)
    plan = Region(steps, outputs).plan([x])
    made = plan.forward([x], [False, *(part.requires_grad for part in plan.parts)])
    return made[0], made[len(outputs) :]


def images_kept(steps, outputs):
    """How many images as large as the output are kept for the backward."""
    output, kept = tensors_kept(steps, outputs)
    return sum(image.numel() == output.numel() for image in kept)


@pytest.mark.parametrize("site", ["norm", "neuron", "filter"])
def test_u_is_recovered_from_outputs(site):
    steps, outputs = shortcut(site)
    assert_equal_to_one_by_one(steps, outputs)
    # The outputs of the first three blocks; of the last one u, and which outputs are active.
    assert images_kept(steps, outputs) == 5


@pytest.mark.parametrize("value", [0.0, 0.1, -0.5, 1.5, torch.nan, torch.inf])
def test_u_is_kept_where_a_mask_is_small_or_strange(value):
    steps, outputs = shortcut("norm")
    steps[2].norm.mask.data[3] = value
    # That block's u and activity, where its output was enough; the next one adds that output.
    assert images_kept(steps, outputs) == 6
    if abs(value) <= 1.5:
        assert_equal_to_one_by_one(steps, outputs)


def test_an_output_may_be_changed_in_place():
    steps, _ = shortcut("norm")
    masks = [step.norm.mask for step in steps]

    def gradients(change):
        made = together(steps, [images().fill_(0.5)], [1, 2, 3, 4])
        total = sum(y.sum() for y in made)
        if change:
            for y in made:
                y.add_(1)
        return torch.autograd.grad(total, masks)

    for changed, plain in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(changed, plain)


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"groups": 2}])
@pytest.mark.parametrize("outputs", [[2, 3], [1], []], ids=str)
def test_means_of_convolutions(options, outputs):
    # Masks at 0, which a mean does not see, and blocks that only a mean comes back from.
    steps, _ = chain("norm", **options)
    assert_equal_to_one_by_one(steps, outputs, means=[2, 0, 1])


def test_means_where_u_is_recovered():
    steps, outputs = shortcut("norm")
    assert_equal_to_one_by_one(steps, outputs, means=[1, 2])


def test_a_mask_a_sample():
    steps, outputs = chain("norm")
    for step in steps:
        step.norm.mask = nn.Parameter(torch.rand(3, 6, dtype=torch.float64))
    assert_equal_to_one_by_one(steps, outputs)


@pytest.fixture(params=[2, 3], ids="{} threads".format)
def threads(request):
    with torch_threads(request.param):
        yield request.param


MANY = 199  # samples with which small blocks are enough work to be shared by samples


def slices_of(steps, outputs, batch=MANY):
    """The numbers of samples of which images are kept, each by one thread."""
    _, kept = tensors_kept(steps, outputs, batch)
    return sorted({image.shape[0] for image in kept if image.dim() == 4})


def without_weights(steps):
    for step in steps:
        step.conv.weight.requires_grad_(False)


@pytest.mark.parametrize("site", ["norm", "neuron", "filter"])
@pytest.mark.parametrize("options", [{"bias": True}, {"groups": 2}], ids=str)
def test_samples_are_shared_by_threads(threads, site, options):
    steps, outputs = chain(site, **options)
    without_weights(steps)
    assert slices_of(steps, outputs) == sorted({MANY // threads, -(-MANY // threads)})
    assert_equal_to_one_by_one(steps, outputs, batch=MANY)
    if site == "norm":
        assert_equal_to_one_by_one(steps, [3], means=[2, 0, 1], batch=MANY)
        assert_equal_to_one_by_one(steps, [1], means=[2], batch=MANY)


def test_samples_are_shared_where_u_is_recovered(threads):
    steps, outputs = shortcut("norm")
    assert len(slices_of(steps, outputs)) == 2
    assert_equal_to_one_by_one(steps, outputs, means=[1], batch=MANY)


def test_samples_are_not_shared_where_all_are_needed(threads):
    steps, outputs = chain("norm")
    assert slices_of(steps, outputs) == [MANY]  # gradients of weights
    without_weights(steps)
    assert slices_of(steps, outputs, 3) == [3]  # little work


def test_masks_of_shared_samples(threads):
    steps, outputs = chain("norm")
    without_weights(steps)
    for step in steps[:2]:
        step.norm.mask = nn.Parameter(torch.rand(MANY, 6, dtype=torch.float64))
    assert len(slices_of(steps, outputs)) == 2
    assert_equal_to_one_by_one(steps, outputs, batch=MANY)
    assert_equal_to_one_by_one(steps, [1], means=[2], batch=MANY)


def test_a_backward_with_other_threads_than_the_forward(threads):
    steps, outputs = shortcut("norm")
    x = images(batch=MANY).requires_grad_(True)
    wanted = [x, *(step.norm.mask for step in steps)]
    (y,) = together(steps, [x], outputs)
    expected = torch.autograd.grad(y.sum(), wanted, retain_graph=True)
    with torch_threads(1):
        grads = torch.autograd.grad(y.sum(), wanted)
    assert all(map(torch.equal, grads, expected))


def test_shared_samples_are_the_same_in_inference_mode(threads):
    steps, outputs = shortcut("norm")
    x = images(batch=MANY)
    with torch.inference_mode():
        (y,) = together(steps, [x], outputs)
        assert y.is_inference()
    assert torch.equal(y, together(steps, [x], outputs)[0])


def test_an_error_in_a_slice_is_raised(threads):
    steps, outputs = shortcut("norm")
    x = images(torch.float32, MANY)
    for step in steps:
        step.conv.float(), step.norm.float()
    plan = Region(steps, outputs).plan([x])
    _, second = plan.weights[1]
    plan.parts[second] = plan.parts[second][..., :2]  # its output, a residual, becomes wider
    with pytest.raises(RuntimeError, match="residual must have the output's shape"):
        plan.forward([x], [False] * (1 + len(plan.parts)))


@pytest.mark.parametrize("change", [lambda kept: kept[:-1], lambda kept: kept + kept[:1]])
def test_what_the_forward_did_not_return_is_refused(threads, change):
    steps, outputs = shortcut("norm")
    x = images(batch=MANY)
    plan = Region(steps, outputs).plan([x])
    needed = [False, *(part.requires_grad for part in plan.parts)]
    y, *kept = plan.forward([x], needed)
    assert plan.backward([y], kept, needed, x.shape)
    with pytest.raises(RuntimeError, match="kept is not what the forward returned"):
        plan.backward([y], change(kept), needed, x.shape)


def test_gradcheck():
    steps, outputs = chain("norm", bias=True)
    x = images().requires_grad_(True)
    parameters = tensors_of(steps)

    def function(x, *_):
        return together(steps, [x], outputs)

    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)


def test_an_output_that_nothing_comes_back_from():
    steps, outputs = chain("norm")
    x = images().requires_grad_(True)
    first, last = together(steps, [x], outputs)
    masks = [step.norm.mask for step in steps]
    grads = torch.autograd.grad(first.sum(), masks, allow_unused=True, retain_graph=True)
    assert [grad is None for grad in grads] == [False, False, True]
    assert torch.autograd.grad(last.sum(), x)[0].abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mask", r"mask must have shape \(6,\)"),
        ("weight", r"the norm's weight must have shape \(6,\)"),
        ("running_var", r"running_var must have shape \(6,\)"),
    ],
)
def test_vectors_that_do_not_fit_are_named(name, message):
    steps, outputs = chain("norm")
    getattr(steps[1].norm, name).data = torch.ones(5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=message):
        together(steps, [images()], outputs)


def set_stride(step):
    step.conv.stride = (2, 1)


def set_site(step):
    step.norm.site = "neuron"


def set_eps(step):
    step.norm.eps = 0.5


def replace_weight(step):
    step.conv.weight = nn.Parameter(torch.randn_like(step.conv.weight))


def replace_mean(step):
    step.norm.running_mean = torch.randn_like(step.norm.running_mean)


def add_bias(step):
    step.conv.bias = nn.Parameter(torch.randn(6, dtype=torch.float64))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrize(step):
    torch.nn.utils.parametrize.register_parametrization(step.conv, "weight", Doubled())


CHANGES = [set_stride, set_site, set_eps, replace_weight, replace_mean, add_bias, parametrize]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_plan_is_made_anew_where_something_changed(change):
    steps, _ = chain("norm")
    region, x = Region(steps[:1], [1]), images()
    with torch.no_grad():
        (before,) = run_region(region, [x])
        plan = region.plan([x])
        assert region.plan([images()]) is plan
        change(steps[0])
        for _ in range(2):
            (after,) = run_region(region, [x])
            assert region.plan([x]) is not plan
            assert after.shape != before.shape or not torch.equal(after, before)
            assert torch.allclose(after, one_by_one(steps[:1], [x], [1])[0], rtol=1e-12)
            if change is parametrize:
                # Its weight is computed anew in each call: nothing to go by.
                assert region.plan([x]) is not region.plan([x])
                steps[0].conv.parametrizations.weight.original.data.mul_(3)


def test_images_of_another_size_have_another_plan():
    steps, outputs = chain("norm")
    region = Region(steps, outputs)
    for size in ((7, 6), (4, 9), (7, 6)):
        x = torch.randn(2, 4, *size, dtype=torch.float64)
        for mine, other in zip(
            run_region(region, [x]), one_by_one(steps, [x], outputs), strict=True
        ):
            assert relative_error(mine, other) <= 1e-12


def test_what_the_backward_reads_may_not_be_changed_before_it():
    for name in ("weight", "bias", "mask"):
        steps, outputs = chain("norm")
        for step in steps:
            step.norm.weight.requires_grad_(False), step.norm.bias.requires_grad_(False)
        total = sum(y.sum() for y in together(steps, [images()], outputs))
        with torch.no_grad():
            getattr(steps[1].norm, name).mul_(2)
        with pytest.raises(RuntimeError, match=r"in.?place"):
            total.backward()


def test_statistics_that_take_gradients_run_one_by_one():
    steps, outputs = chain("norm")
    steps[0].norm.running_mean.requires_grad_(True)
    assert Region(steps, outputs).plan([images()]) is None
    with torch.no_grad():
        assert Region(steps, outputs).plan([images()]) is not None


def test_half_types_are_refused():
    steps, outputs = chain("norm")
    plan = Region(steps, outputs).plan([images()])
    plan.parts = [part.half() for part in plan.parts]
    with pytest.raises(RuntimeError, match="inputs must be float32 or float64"):
        plan.forward([images(torch.float16)], [False] * (1 + len(plan.parts)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plan": [0] * 13}, "plan is too long"),
        ({"plan": [5]}, "a block reads value 5, of 1"),
        ({"parts": []}, "needed must have a number for each input and part"),
        ({"eps": []}, "eps and algorithms must be one a block"),
        ({"outputs": [3]}, "there is no value 3"),
    ],
)
def test_plans_that_do_not_fit_are_refused(change, message):
    x = images()
    plan = Region(chain("norm")[0][:1], [1]).plan([x])
    given = {"parts": plan.parts, "plan": plan.numbers, "eps": plan.eps}
    given |= {"algorithms": plan.algorithms, "outputs": plan.outputs}
    given |= {"needed": [0] * (1 + len(plan.parts))}
    torch.ops.mnp_fast.region_forward([x], **given)
    if change.get("plan") == [0] * 13:
        change = {"plan": plan.numbers + change["plan"]}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.mnp_fast.region_forward([x], **{**given, **change})
