"""Two processes that share the work, compared with one; over gloo."""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import mnp_fast
from benchmarks import shards
from mnp_fast import DefenseConfig, defend
from mnp_fast.data import CleanSet, predict
from mnp_fast.distributed import Processes
from mnp_fast.io import load_weights, save_weights
from mnp_fast.stats import ablation, neuron_stats, saliency

from .commands import call
from .test_cli import FACTORY, settings
from .trained import backdoored, small_net, stripes

SIZE = 2
CLEAN = stripes(41, seed=2)  # odd, and with batches of 10 the last one has fewer than processes
DATA = (CLEAN.images, CLEAN.labels)
CONFIGS = {
    exposure: DefenseConfig(
        exposure=exposure, suppress_lr=0.1, suppress_accuracy=60.0, suppress_batch_size=16,
        suspects=2, offset_steps=60, fit_epochs=3, fit_batch_size=10, fit_lr=0.1, max_pruned=0.5,
        few=1, max_exposed=50.0, max_drop=100.0,
    )
    for exposure in ("offset", "weights")
}  # fmt: skip
# Of the masks, after rounding has gone through all steps of search and fit.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-7}
CASES = [(exposure, dtype) for exposure in CONFIGS for dtype in TOLERANCE]


def model_of(folder):
    model = small_net()
    model.load_state_dict(load_weights(folder / "model.safetensors"))
    return model.eval()


def facts(result):
    return {
        "masks": {name: mask.tolist() for name, mask in result.masks.items()},
        "saliency": {name: layer.saliency.tolist() for name, layer in result.neurons.items()},
        "pruned": [(neuron.layer, neuron.index) for neuron in result.pruned],
        "target": result.target,
        "offset_sizes": [result.offset_sizes.get(label, -1.0) for label in range(4)],
        "curve": [(point.accuracy, point.exposed) for point in result.curve],
        "losses": [record.loss for record in result.history],
        "weights": {name: value.tolist() for name, value in result.model.state_dict().items()},
    }


def all_facts(folder, group):
    model, shared = model_of(folder), CleanSet(*DATA, Processes(group))
    masked = mnp_fast.wrap(model)
    found = {
        "saliency": {name: [part.tolist() for part in layer] for name, layer in
                     saliency(masked, shared, 8).items()},
        "ablation": {name: values.tolist() for name, values in
                     ablation(masked, shared, batch_size=9).items()},
        "precise": {name: values.tolist() for name, values in
                    ablation(masked, shared, batch_size=9, precision=0.02).items()},
        "stats": neuron_stats(model, DATA, "fisher", bootstrap=3, group=group).content()["layers"],
        "few": predict(model, CLEAN.images[:1], shared.processes).tolist(),
    }  # fmt: skip
    for exposure, dtype in CASES:
        data = (CLEAN.images.to(dtype), CLEAN.labels)
        result = defend(model_of(folder).to(dtype), data, CONFIGS[exposure], group=group)
        found[f"{exposure} {dtype}"] = facts(result)
    return found


def mask_gradients(masked, images, labels):
    """Through `forward` of a wrapped model, or of a DistributedDataParallel of it."""
    F.cross_entropy(masked(images), labels).backward()
    return {
        name.removeprefix("module."): parameter.grad.tolist()
        for name, parameter in masked.named_parameters()
        if parameter.requires_grad
    }


def wrapped_for_masks(folder):
    masked = mnp_fast.wrap(model_of(folder)).requires_grad_(False)
    for mask in mnp_fast.masks(masked).values():
        mask.requires_grad_(True)
    return masked


def error_of(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def interrupted_and_resumed(folder, group):
    """A run that stops in every process after an epoch of fitting, and its second half."""
    module = import_module("mnp_fast.defend")
    epoch, path = module.MaskFit.epoch, folder / "checkpoint.pt"

    def stops(self, number):
        if number == 1:
            raise InterruptedError
        return epoch(self, number)

    config = CONFIGS["offset"]
    module.MaskFit.epoch = stops
    try:
        defend(model_of(folder), DATA, config, checkpoint=path, group=group)
    except InterruptedError:
        pass
    finally:
        module.MaskFit.epoch = epoch
    assert path.exists()
    return facts(defend(model_of(folder), DATA, config, checkpoint=path, group=group))


def join(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=SIZE,
        timeout=timedelta(seconds=120),
    )  # fmt: skip
    return dist.group.WORLD


def work(rank, folder):
    group = join(rank, folder)
    found = all_facts(folder, group)
    found["resumed"] = interrupted_and_resumed(folder, group)
    (((images, labels), _),) = Processes(group).parts(CLEAN.images[:40], CLEAN.labels[:40])
    parallel = DistributedDataParallel(wrapped_for_masks(folder))
    found["parallel"] = mask_gradients(parallel, images, labels)
    found["refused"] = error_of(defend, parallel, DATA, group=group)
    other = DefenseConfig(seed=rank)
    found["differing"] = error_of(defend, model_of(folder), DATA, other, group=group)
    strided = torch.full((2, 3, 4, 5), float(rank)).to(memory_format=torch.channels_last)
    Processes(group).equalize([strided])
    found["equalized"] = strided.unique().tolist()
    groups = [dist.new_group([member]) for member in range(SIZE)]
    found["outside"] = error_of(Processes, groups[1 - rank])
    found["odd"] = error_of(Processes, group, 3)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@contextmanager
def one_thread():
    """What runs here then takes as long as in a process beside others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What one process finds, and what each of two does."""
    folder = tmp_path_factory.mktemp("distributed")
    save_weights(backdoored().state_dict(), folder / "model.safetensors")
    mp.spawn(work, (folder,), SIZE)
    with one_thread():
        alone = all_facts(folder, None)
        config = replace(CONFIGS["offset"], shards=SIZE)
        for dtype in TOLERANCE:
            data = (CLEAN.images.to(dtype), CLEAN.labels)
            alone[f"offset {dtype}, shards"] = facts(
                defend(model_of(folder).to(dtype), data, config)
            )
        alone = json.loads(json.dumps(alone))
        masked = wrapped_for_masks(folder)
        alone["parallel"] = mask_gradients(masked, CLEAN.images[:40], CLEAN.labels[:40])
    return alone, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(SIZE)]


def assert_close(actual, expected, tolerance):
    torch.testing.assert_close(
        {name: torch.tensor(value) for name, value in actual.items()},
        {name: torch.tensor(value) for name, value in expected.items()},
        rtol=tolerance, atol=tolerance, equal_nan=True,
    )  # fmt: skip


@pytest.mark.parametrize(("exposure", "dtype"), CASES)
def test_two_processes_find_what_one_does(exposure, dtype, runs):
    case, tolerance = f"{exposure} {dtype}", TOLERANCE[dtype]
    alone, both = runs[0][case], [found[case] for found in runs[1]]
    assert both[0] == both[1]  # bit for bit
    for name in ("target", "pruned"):
        assert both[0][name] == alone[name]
    assert len(alone["pruned"]) > 0
    assert min(map(min, alone["masks"].values())) < 0.5
    assert_close(both[0]["weights"], alone["weights"], 1e-6)
    for name in ("masks", "saliency"):
        assert_close(both[0][name], alone[name], tolerance)
    for name in ("offset_sizes", "curve", "losses"):
        assert_close({name: both[0][name]}, {name: alone[name]}, tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_with_as_many_shards_everything_is_the_same(dtype, runs):
    name = f"offset {dtype}"
    assert runs[0][f"{name}, shards"] == runs[1][0][name]  # bit for bit


def test_statistics_are_those_of_one_process(runs):
    alone, both = runs
    for found in both:
        for layer, expected in alone["saliency"].items():
            assert_close({layer: found["saliency"][layer]}, {layer: expected}, 1e-5)


def test_exact_ablation_is_that_of_one_process(runs):
    alone, both = runs
    for kind in ("ablation", "precise"):
        for found in both:
            assert_close(found[kind], alone[kind], 1e-6)
    assert np.isnan(alone["precise"]["1"]).any()
    for found in both:
        for layer, expected in zip(found["stats"], alone["stats"], strict=True):
            for column in ("saliency", "z", "spectral"):
                assert_close({column: layer[column]}, {column: expected[column]}, 1e-5)


def test_fewer_samples_than_processes(runs):
    alone, both = runs
    assert both[0]["few"] == both[1]["few"] == alone["few"]


def test_a_resumed_run_is_the_same(runs):
    for found in runs[1]:
        assert found["resumed"] == found["offset torch.float32"]


def test_tensors_become_those_of_the_first_process(runs):
    assert [found["equalized"] for found in runs[1]] == [[0.0], [0.0]]


def test_masks_in_a_distributed_data_parallel(runs):
    alone, both = runs
    for found in both:
        assert_close(found["parallel"], alone["parallel"], 1e-6)


def test_misuse_is_named(runs):
    for found in runs[1]:
        assert found["refused"].startswith("TypeError: model is a DistributedDataParallel")
        assert found["differing"].startswith("ValueError: processes were given different models")
        assert found["outside"] == "ValueError: group: this process is not in it"
        assert (
            found["odd"] == "ValueError: shards must be 1 or a multiple of the 2 processes, not 3"
        )


def fail(rank, folder):
    """One process fails and lives on; the other must not wait for it forever."""
    join(rank, folder)
    group = dist.new_group(timeout=timedelta(seconds=5))
    model, done = model_of(folder), folder / "done"
    if rank == 1:
        model[0].register_forward_hook(lambda *_: torch.zeros(1)[5])
        (folder / "own").write_text(error_of(defend, model, DATA, group=group))
        while not done.exists():
            time.sleep(0.1)
    else:
        (folder / "others").write_text(error_of(defend, model, DATA, group=group))
        done.touch()
    os._exit(0)  # gloo's threads may abort an orderly exit after a timeout


def test_a_process_that_fails_does_not_hang_the_others(tmp_path):
    save_weights(backdoored().state_dict(), tmp_path / "model.safetensors")
    mp.spawn(fail, (tmp_path,), SIZE)
    assert "index 5 is out of bounds" in (tmp_path / "own").read_text()
    expected = "ConnectionError: process 0 of 2 lost the others: one of them failed"
    assert (tmp_path / "others").read_text().startswith(expected)


def run_command(launcher, folder, out):
    command = [
        *launcher, "-m", "mnp_fast.cli", "defend", "--model", f"{folder / 'factory.py'}:small_net",
        "--checkpoint", folder / "model.safetensors", "--data", folder / "data.npz", "--out", out,
        *settings(),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_under_torchrun(tmp_path):
    save_weights(backdoored().state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "factory.py").write_text(FACTORY)
    np.savez(tmp_path / "data.npz", images=CLEAN.images.numpy(), labels=CLEAN.labels.numpy())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    outputs = [
        run_command(launcher, tmp_path, tmp_path / out)
        for launcher, out in (([sys.executable], "one"), (torchrun, "two"))
    ]
    one, two = (
        [line for line in text.splitlines() if "neurons pruned" in line] for text in outputs
    )
    assert len(one) == 1
    assert one == two
    masks = [load_weights(tmp_path / out / "masks.safetensors") for out in ("one", "two")]
    torch.testing.assert_close(*masks, rtol=0, atol=1e-4)
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(
        p.name for p in (tmp_path / "one").iterdir()
    )


THREADS = """
import os
from pathlib import Path

import torch
from torch import distributed as dist

from mnp_fast.distributed import Processes, launched


def names():
    return sorted(path.read_text() for path in Path("/proc/self/task").glob("*/comm"))


before = names()
with launched() as processes:
    cycle = Processes(processes.group)
    cycle.cycle = cycle  # as a defense may leave some
    del cycle
    dist.all_reduce(torch.ones(3), group=processes.group)
    assert names() != before
assert names() == before, names()
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_no_thread_of_a_group_outlives_it():
    # One that is about to drop a tensor while the interpreter ends would abort the process.
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    environment = {**os.environ, **alone, "TORCHELASTIC_RUN_ID": "test"}
    root = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", THREADS], cwd=root, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_shards_make_a_defense_equal_to_the_last_bit():
    with one_thread():  # as the command sets it
        result = call(shards.main, "--quick")
    assert result.exit_code == 0, result.output
    (row,) = [line for line in result.output.splitlines() if line.startswith("│ 2 ")]
    assert "0.0e+00" in row
    assert "yes" in row
