import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mnp_fast.data import check_model, clean_set, evaluate

from .models import resnet

IMAGES, LABELS = torch.rand(6, 3, 16, 16), torch.arange(6) % 4


def test_pairs_and_loaders_give_the_same_set():
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4)
    for data in ((IMAGES, LABELS), [IMAGES, LABELS.to(torch.int32)], loader, list(loader)):
        found = clean_set(data)
        assert torch.equal(found.images, IMAGES)
        assert torch.equal(found.labels, LABELS)
        assert found.labels.dtype == torch.int64


def test_batches_depend_on_the_seed_alone():
    data = clean_set((IMAGES, LABELS))
    orders = [
        torch.cat([labels for _, labels in data.batches(4, *seed)])
        for seed in ((0, 1, 2), (0, 1, 2), (0, 1, 3), (0, 2, 1))
    ]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert [len(labels) for _, labels in data.batches(4, 0)] == [4, 2]
    state = torch.get_rng_state()
    data.batches(4, 0)
    assert torch.equal(state, torch.get_rng_state())


def with_nan(tensor):
    tensor = tensor.clone()
    tensor[3, 0, 0, 0] = float("nan")
    return tensor


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (7, TypeError, "pair .* or an iterable .* not int"),
        ([IMAGES], TypeError, "every batch must be a pair"),
        ([], ValueError, "data is empty"),
        ((IMAGES[:0], LABELS[:0]), ValueError, "at least 2 samples .* got 0"),
        ((IMAGES[:1], LABELS[:1]), ValueError, "at least 2 samples .* got 1"),
        ((IMAGES, LABELS[:5]), ValueError, "6 images but 5 labels"),
        ((IMAGES.mul(255).byte(), LABELS), ValueError, "floating-point .* not torch.uint8"),
        ((IMAGES, LABELS.float()), ValueError, "labels must be an integer tensor"),
        ((IMAGES, LABELS[:, None]), ValueError, "labels must be an integer tensor"),
        ((IMAGES, LABELS - 1), ValueError, "must not be negative, found -1"),
        ((with_nan(IMAGES), LABELS), ValueError, "1 images hold NaN .* image 3"),
        ((IMAGES / 0, LABELS), ValueError, "6 images hold NaN or infinity"),
        ((IMAGES.to("meta"), LABELS), ValueError, "images are on meta, labels on cpu"),
    ],
)
def test_bad_data_is_named(data, kind, message):
    with pytest.raises(kind, match=message):
        clean_set(data)


def test_check_model_returns_the_classes_and_changes_nothing():
    model = resnet().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert check_model(model, clean_set((IMAGES, LABELS))) == 10
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def broken(name, value):
    model = resnet()
    model.state_dict()[name].view(-1)[0] = value
    return model


@pytest.mark.parametrize(
    ("model", "data", "kind", "message"),
    [
        ("model", (IMAGES, LABELS), TypeError, "must be a torch.nn.Module, not str"),
        (broken("bn1.weight", float("nan")), (IMAGES, LABELS), ValueError, "bn1.weight holds NaN"),
        (
            broken("bn1.running_var", float("inf")),
            (IMAGES, LABELS),
            ValueError,
            "bn1.running_var holds NaN or infinity",
        ),
        (
            resnet().bfloat16(),
            (IMAGES.bfloat16(), LABELS),
            ValueError,
            "conv1.weight is torch.bfloat16, too coarse .* use float32 or float64",
        ),
        (resnet(), (IMAGES[:, :2], LABELS), ValueError, r"shape \(2, 16, 16\): .*channels"),
        (resnet(), (IMAGES, LABELS + 10), ValueError, "label 13 is beyond the model's 10 classes"),
        (resnet().to("meta"), (IMAGES, LABELS), ValueError, "different devices: .* on meta"),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(768, 1)),
            (IMAGES, LABELS),
            ValueError,
            "at least 2 classes apart, not 1",
        ),
        (nn.Identity(), (IMAGES, LABELS), ValueError, r"logits \(N, classes\) .* not \(2, 3, 16"),
    ],
)
def test_bad_models_are_named(model, data, kind, message):
    with pytest.raises(kind, match=message):
        check_model(model, clean_set(data))


def test_evaluate():
    images = torch.eye(4)
    model = nn.Linear(4, 4, bias=False)
    model.weight.data = torch.eye(4) * 3
    accuracy, loss = evaluate(model, clean_set((images, torch.tensor([0, 1, 2, 0]))))
    assert accuracy == 75
    logits = (3 * images).double()
    assert loss == pytest.approx(
        nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).item()
    )
