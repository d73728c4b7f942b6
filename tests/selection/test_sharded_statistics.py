"""Statistics of sharded parameters are those of whole ones. Several processes are in ``tests/test_fsdp.py``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lightning_gif.distributed import ProcessGroup
from lightning_gif.selection import GradientStatistics
from lightning_gif.selection.training_length import TrainingLength


@pytest.fixture
def sharded(tmp_path: Path) -> Iterator[type]:
    """Shards tensors over a single process."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)])  # type: ignore[misc]
    dist.destroy_process_group()


def test_sharded_gradients_have_the_mean_squares_of_whole_ones(sharded: type) -> None:
    gradients = torch.randn(4, 5, 3).unbind()
    parts, whole = GradientStatistics(), GradientStatistics()
    for gradient in (*gradients, torch.full((5, 3), torch.inf)):  # what is not finite counts nowhere
        parts.add([("weight", sharded(gradient)), ("none", None)])
        whole.add([("weight", gradient), ("none", None)])
    assert isinstance(parts.squares["weight"], DTensor)
    gathered = parts.whole(ProcessGroup())
    expected = whole.root_mean_square("weight")
    assert expected is not None
    assert torch.equal(gathered.root_mean_square("weight"), expected)  # type: ignore[arg-type]
    assert gathered.root_mean_square("none") is None
    assert torch.equal(gathered.state()["squares"]["weight"], whole.state()["squares"]["weight"])


def test_a_parameter_whose_sharded_gradients_were_never_finite_has_no_mean_square(sharded: type) -> None:
    parts = GradientStatistics()
    parts.add([("weight", sharded(torch.full((2, 2), torch.nan)))])
    gathered = parts.whole(ProcessGroup())
    assert gathered.root_mean_square("weight") is None
    assert gathered.state() == {"squares": {}, "steps": {}}


def test_sums_from_a_checkpoint_go_on_in_parts(sharded: type) -> None:
    first, second = torch.randn(2, 3, 2).unbind()
    module = nn.Linear(2, 3, bias=False)
    before = GradientStatistics()
    before.add([("weight", first)])
    resumed = GradientStatistics()
    resumed.load_state(before.state(), module)
    resumed.add([("weight", sharded(second))])
    before.add([("weight", second)])
    found = resumed.whole(ProcessGroup()).root_mean_square("weight")
    assert torch.equal(found, before.root_mean_square("weight"))  # type: ignore[arg-type]


def trained_by(optimizer: torch.optim.Optimizer, weight: Tensor) -> None:
    for step in range(3):
        weight.grad = torch.full_like(weight, 0.1 * (step + 1))
        optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_the_length_of_a_training_of_sharded_parameters_is_that_of_whole_ones(
    kind: type[torch.optim.Optimizer], sharded: type
) -> None:
    found = []
    for shard in (False, True):
        module = nn.Linear(2, 3, bias=False)
        if shard:
            module.weight = nn.Parameter(sharded(module.weight.detach()))
        optimizer, length = kind(module.parameters(), lr=0.1), TrainingLength()  # type: ignore[call-arg]
        length.start()
        trained_by(optimizer, module.weight)
        length.add(optimizer)
        length.read(module)
        length.sum_over(ProcessGroup())
        length.close(module)
        found.append(length.lengths["weight"])
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_an_interrupted_training_of_sharded_parameters_has_no_length(sharded: type) -> None:
    module = nn.Linear(2, 3, bias=False)
    module.weight = nn.Parameter(sharded(module.weight.detach()))
    optimizer, length = torch.optim.Adam(module.parameters()), TrainingLength()
    length.start()
    trained_by(optimizer, module.weight)
    length.add(optimizer)
    length.end(module)  # without the sums of the other processes, which may have ended
    assert math.isnan(length.lengths["weight"])
    assert "Adam" in length.gap
