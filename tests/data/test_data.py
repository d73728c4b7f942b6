"""Batches of every structure, and training data in an order that does not depend on its loader."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_gif import BatchError, GIFWarning, TrainingDataError
from lightning_gif.data.batch import Batch, joined
from lightning_gif.data.examples import Examples, warn_if_random
from lightning_gif.data.identity import contents_digest, data_digest, fingerprints, locate
from lightning_gif.data.relabel import relabelled
from lightning_gif.data.structure import (
    batch_size,
    describe,
    map_tensors,
    same_structure,
    slice_batch,
    take,
    tensors,
)
from lightning_gif.data.targets import class_targets, find_targets, replace_targets

Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Record:
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Frozen:
    """What is known of the batch beside its tensors is computed once; the constructor counts that."""

    x: Tensor
    y: Tensor = field(init=False)
    unset: Tensor = field(init=False)

    def __post_init__(self) -> None:
        assert not hasattr(self, "y")
        object.__setattr__(self, "y", Y.clone())


class Named(dict[str, Any]):
    def __init__(self, name: str) -> None:
        super().__init__(x=X)
        self.name = name


class Wrapped(Mapping[str, Any]):
    """Its copy shares the items."""

    def __init__(self, items: dict[str, Any]) -> None:
        self.items_of = items

    def __getitem__(self, key: str) -> Any:
        return self.items_of[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_of)

    def __len__(self) -> int:
        return len(self.items_of)


class Sealed(Wrapped):
    def __init__(self) -> None:
        super().__init__({"x": X})


X, Y = torch.arange(12.0).view(4, 3), torch.tensor([0, 1, 2, 1])
STRUCTURES: dict[str, Any] = {
    "tuple": (X, Y),
    "list": [X, Y],
    "namedtuple": Pair(X, Y),
    "dict": {"x": X, "label": Y},
    "dataclass": Record(X, Y),
    "frozen dataclass": Frozen(X),
    "defaultdict": defaultdict(list, x=X, label=Y),
    "OrderedDict": OrderedDict(x=X, label=Y),
    "UserDict": UserDict(x=X, label=Y),
    "dictionary with an argument": Named("a"),
    "mapping": Wrapped({"x": X, "label": Y}),
    "read-only mapping": MappingProxyType({"x": X, "label": Y}),
    "nested": ({"tokens": X, "mask": X > 3}, [Y]),
    "with strings": (X, ["a", "b", "c", "d"], Y),
    "with a scalar": (X, torch.tensor(3.0), Y),
}


@pytest.mark.parametrize("name", list(STRUCTURES))
def test_taking_rows_keeps_the_structure(name: str) -> None:
    taken = take(STRUCTURES[name], torch.tensor([3, 1]))
    assert type(taken) is type(STRUCTURES[name])
    assert batch_size(taken) == 2
    assert torch.equal(tensors(taken)[0], X[[3, 1]])
    if name == "with strings":
        assert taken[1] == ["d", "b"]


@pytest.mark.parametrize("name", list(STRUCTURES))
def test_slicing_keeps_the_structure(name: str) -> None:
    batch = STRUCTURES[name]
    assert batch_size(batch) == 4
    piece = slice_batch(batch, 1, 3)
    assert type(piece) is type(batch)
    assert same_structure(piece, batch)
    assert batch_size(piece) == 2
    for part, whole in zip(tensors(piece), tensors(batch), strict=True):
        assert torch.equal(part, whole[1:3] if whole.ndim else whole)
    if name == "with strings":
        assert piece[1] == ["b", "c"]


def test_mapping_does_not_change_the_original() -> None:
    batch = {"x": X.clone(), "y": [Y.clone()]}
    mapped = map_tensors(batch, lambda tensor: tensor * 2)
    assert torch.equal(batch["x"], X)  # type: ignore[arg-type]
    assert torch.equal(mapped["y"][0], Y * 2)


def test_containers_keep_what_is_no_tensor_and_the_original_its_tensors() -> None:
    assert slice_batch(STRUCTURES["defaultdict"], 1, 3).default_factory is list
    assert slice_batch(STRUCTURES["dictionary with an argument"], 1, 3).name == "a"
    piece = slice_batch(STRUCTURES["frozen dataclass"], 1, 3)
    assert torch.equal(piece.y, Y[1:3])
    assert not hasattr(piece, "unset")
    for name, batch in STRUCTURES.items():
        before = [tensor.data_ptr() for tensor in tensors(batch)]
        map_tensors(batch, lambda tensor: tensor * 2)
        assert [tensor.data_ptr() for tensor in tensors(batch)] == before, name


def test_a_mapping_that_cannot_be_built_is_named() -> None:
    with pytest.raises(BatchError, match=r"A Sealed cannot be built from a dictionary.*Collate examples to a dict"):
        slice_batch(Sealed(), 1, 3)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((X, Y[:3]), r"disagree.*\(float32\[4, 3\], int64\[3\]\)"),
        ((X[:0], Y[:0]), "empty"),
        ("text", "at least one tensor.*got str"),
        ((torch.tensor(1.0),), "at least one tensor"),
    ],
)
def test_an_object_that_is_not_a_batch_is_described(batch: Any, message: str) -> None:
    with pytest.raises(BatchError, match=message):
        batch_size(batch)


def test_structures_are_compared_and_described() -> None:
    assert describe({"x": X, "y": [Y, "s"]}) == "{'x': float32[4, 3], 'y': [int64[4], str]}"
    assert same_structure((X, Y), [X[:2], Y[:2]])  # collate functions give one or the other
    for other in ((X,), X, (X, X), {"x": X, "y": Y}, (Y, X), (X, (Y,))):
        assert not same_structure((X, Y), other)
    assert not same_structure({"x": X}, {"z": X})


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ((X, Y), Y),
        ({"labels": Y, "x": X}, Y),
        ((X, Y[:, None]), Y),
        ((X, X), None),
        ((X, Y - 1), None),
        (X, None),
        ({"x": X}, None),
        ((X, Y > 0), None),
        ((X, Y + 10_000), None),  # ids or counts rather than labels
    ],
)
def test_targets_that_are_whole_numbers_are_labels(batch: Any, expected: Tensor | None) -> None:
    found = class_targets(batch)
    assert found is None if expected is None else torch.equal(found, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["tuple", "list", "namedtuple", "dict", "defaultdict", "UserDict", "with strings"])
def test_new_targets_replace_the_old_ones(name: str) -> None:
    batch = STRUCTURES[name]
    changed = replace_targets(batch, torch.tensor([3, 3, 0, 0]))
    assert type(changed) is type(batch)
    assert find_targets(changed).tolist() == [3, 3, 0, 0]  # type: ignore[union-attr]
    assert torch.equal(tensors(changed)[0], X)
    assert torch.equal(Y, torch.tensor([0, 1, 2, 1]))
    assert find_targets(replace_targets(batch, 5)).tolist() == [5] * 4  # type: ignore[union-attr]


def test_targets_that_cannot_be_replaced_raise_with_the_reason() -> None:
    with pytest.raises(BatchError, match=r"shape \[3\], but the targets of the batch have shape \[4\]"):
        replace_targets((X, Y), torch.tensor([1, 2, 3]))
    with pytest.raises(BatchError, match="The structure of this batch does not show which tensor has the targets"):
        replace_targets({"x": X}, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Examples
# ----------------------------------------------------------------------------------------------------------------------


def numbered(n: int = 10) -> TensorDataset:
    return TensorDataset(torch.arange(float(n))[:, None], torch.arange(n) % 2)


def examples(loader: Any, **options: Any) -> Examples:
    return Examples.from_loader(loader, lambda batch: batch, **{"batch_size": 4, **options})


def read(found: Examples) -> list[float]:
    return [value for batch in found.batches() for value in batch.data[0].squeeze(1).tolist()]


@pytest.mark.parametrize("options", [{"shuffle": True}, {"shuffle": False}, {"drop_last": True}, {"num_workers": 1}])
def test_examples_always_have_the_order_of_the_dataset(options: dict[str, Any]) -> None:
    found = examples(DataLoader(numbered(), 3, **options))
    assert read(found) == read(found) == list(range(10))
    assert [batch.size for batch in found.batches()] == [4, 4, 2]
    assert torch.cat([batch.ids for batch in found.batches()]).tolist() == list(range(10))


class Named(TensorDataset):
    """Also names the process that reads an item, in the last column."""

    def __getitem__(self, index: int) -> Any:
        return (*super().__getitem__(index), os.getpid())


@pytest.mark.parametrize(("batch_size", "workers"), [(10, 0), (5, 2), (4, 3), (1, 4)])
def test_a_pass_starts_no_more_workers_than_it_has_batches_and_none_for_one(batch_size: int, workers: int) -> None:
    loader = DataLoader(Named(*numbered().tensors), 3, num_workers=4, timeout=60, multiprocessing_context="fork")
    found = examples(loader, batch_size=batch_size)
    read_by = {process for batch in found.batches() for process in batch.data[2].tolist()}
    assert len(read_by - {os.getpid()}) == workers
    assert (os.getpid() in read_by) == (workers == 0)
    assert not multiprocessing.active_children()


class Augmented(TensorDataset):
    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return x + torch.rand(1), y


@pytest.mark.parametrize("batch_size", [3, 10])
def test_random_augmentation_draws_the_same_values_in_each_pass_with_persistent_workers(batch_size: int) -> None:
    loader = DataLoader(Augmented(*numbered().tensors), 3, num_workers=2, persistent_workers=True)
    found = examples(loader, batch_size=batch_size)
    assert read(found) == read(found) != list(range(10))


def test_persistent_workers_are_kept_between_passes_and_end_with_the_examples() -> None:
    options: dict[str, Any] = {"num_workers": 2, "persistent_workers": True, "multiprocessing_context": "fork"}
    found = examples(DataLoader(Named(*numbered().tensors), 3, **options), batch_size=3)
    passes = [{process for batch in found.batches() for process in batch.data[2].tolist()} for _ in range(3)]
    sample = found.subset(torch.tensor([8, 1, 5, 6]))
    passes.append({process for batch in sample.batches() for process in batch.data[2].tolist()})
    assert len(set().union(*passes)) == 2
    next(found.batches())  # a pass that is not finished
    assert read(found) == list(range(10))
    outer = found.batches()
    assert [batch.ids.tolist() for batch in outer if read(found)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    found.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("batch_size", [3, 10])
def test_random_augmentation_draws_the_same_values_in_all_processes(batch_size: int) -> None:
    data = Augmented(*numbered().tensors)
    alone = read(examples(DataLoader(data, 3), batch_size=batch_size))
    for persistent in (False, True):
        loader = DataLoader(data, 3, num_workers=2, persistent_workers=persistent)
        assert read(examples(loader, batch_size=batch_size)) == alone


def test_reading_examples_does_not_iterate_the_loader_or_advance_its_generator() -> None:
    class Counting(DataLoader[Any]):
        iterations = 0

        def __iter__(self) -> Any:
            type(self).iterations += 1
            return super().__iter__()

    generator = torch.Generator().manual_seed(7)
    loader = Counting(numbered(), 3, shuffle=True, generator=generator)
    state = generator.get_state()
    read(examples(loader))
    assert Counting.iterations == 0
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 2, "sampler": SubsetRandomSampler([7, 2, 5])},
        {"batch_size": 2, "sampler": [7, 2, 5]},
        {"batch_sampler": BatchSampler(SubsetRandomSampler([7, 2, 5]), 2, drop_last=False)},
    ],
    ids=["SubsetRandomSampler", "list", "batch sampler"],
)
def test_a_sampler_over_a_subset_keeps_dataset_indices(options: dict[str, Any]) -> None:
    found = examples(DataLoader(numbered(), **options))
    assert found.ids.tolist() == [2, 5, 7]
    assert read(found) == [2, 5, 7]


def test_weights_of_a_sampler_cause_a_warning() -> None:
    with pytest.warns(GIFWarning, match="WeightedRandomSampler"):
        found = examples(DataLoader(numbered(), 2, sampler=WeightedRandomSampler([0.1] * 10, 10)))
    assert len(found) == 10


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(numbered())


class Endless(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return torch.zeros(1), 0


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (lambda: DataLoader(Stream(), 2), "Stream is an IterableDataset"),
        (lambda: DataLoader(numbered(), batch_size=None), "batch_size=None"),
        (lambda: DataLoader(DataLoader(numbered()), 2), "is a DataLoader, which has no `__getitem__`"),
        (lambda: [DataLoader(numbered())], "Expected a torch DataLoader, got several in a list"),
        (lambda: DataLoader(Subset(numbered(), []), 2), "no examples"),
        (lambda: DataLoader(Endless(), 2, sampler=SubsetRandomSampler([])), "no examples"),
    ],
)
def test_data_without_a_stable_order_is_refused(loader: Any, message: str) -> None:
    with pytest.raises(TrainingDataError, match=message):
        examples(loader())


def test_subsets_and_samples_keep_ids() -> None:
    found = examples(DataLoader(numbered(), 3))
    assert read(found.subset(torch.tensor([8, 1]))) == [8, 1]
    sample = found.sample(4, seed=3)
    assert len(sample) == 4
    assert sample.ids.tolist() == sorted(sample.ids.tolist()) == [int(v) for v in read(sample)]
    assert torch.equal(sample.ids, found.sample(4, seed=3).ids)
    assert not torch.equal(sample.ids, found.sample(4, seed=4).ids)
    assert found.sample(None, seed=0) is found
    assert read(sample.cached()) == read(sample)


@pytest.mark.parametrize("held", [True, False])
def test_examples_are_assigned_to_groups_in_turn(held: bool) -> None:
    found = examples(DataLoader(numbered(), 3))
    kept = found.cached() if held else found
    with pytest.MonkeyPatch.context() as patch:
        if held:  # nothing is read again
            patch.setattr(TensorDataset, "__getitem__", None)
        groups = kept.round_robin(4)
        assert [read(group) for group in groups] == [[0, 4, 8], [1, 5, 9], [2, 6], [3, 7]]
    assert [len(group) for group in kept.round_robin(99)] == [1] * 10


def test_examples_are_cached_within_a_memory_budget_only() -> None:
    found = examples(DataLoader(numbered(), 3))
    size = sum(tensor.nbytes for batch in found.batches() for tensor in tensors(batch.data))
    assert found.cached(size).in_memory is not None
    assert found.cached(size - 1) is found
    assert found.cached(0) is found


@dataclass(frozen=True)
class Doubled(Batch):
    twice: Tensor


@pytest.mark.parametrize("held", [True, False])
def test_mapped_batches_of_cached_examples_are_computed_once(held: bool) -> None:
    made: list[int] = []

    def doubled(batch: Batch) -> Doubled:
        made.append(batch.size)
        return Doubled(batch.data, batch.ids, batch.size, 2 * batch.data[0])

    found = examples(DataLoader(numbered(), 3))
    mapped = (found.cached() if held else found).map(doubled)
    assert made == ([4, 4, 2] if held else [])
    for part in (mapped, mapped, mapped.sample(5, seed=1)):
        for batch in part.batches():
            assert isinstance(batch, Doubled)
            values, _ = batch.data
            assert torch.equal(values.squeeze(1), batch.ids.float())
            assert torch.equal(batch.twice, 2 * values)
    assert made == ([4, 4, 2] if held else [4, 4, 2, 4, 4, 2, 4, 1])


def test_a_subset_of_cached_examples_is_taken_from_the_cache() -> None:
    found = Examples.from_batch((X, Y), lambda batch: batch, batch_size=3)
    some = found.subset(torch.tensor([3, 1]))
    assert some.ids.tolist() == [1, 3]
    assert torch.equal(torch.cat([batch.data[0] for batch in some.batches()]), X[[1, 3]])
    assert len(found.sample(2, seed=0)) == 2


class Noisy(TensorDataset):
    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return x + torch.rand(1), y


def test_random_augmentation_is_reproduced_and_causes_a_warning() -> None:
    found = examples(DataLoader(Noisy(*numbered().tensors), 3))
    assert read(found) == read(found)
    with pytest.warns(GIFWarning, match="augmentation"):
        warn_if_random(found)
    warn_if_random(examples(DataLoader(numbered(), 3)))


def test_a_batch_in_memory_is_split_but_not_changed() -> None:
    found = Examples.from_batch((X, Y), lambda batch: batch, batch_size=3)
    assert [batch.size for batch in found.batches()] == [3, 1]
    assert torch.equal(torch.cat([batch.data[0] for batch in found.batches()]), X)


def test_relabelling_caches_all_examples_with_new_targets() -> None:
    found = examples(DataLoader(numbered(), 3))
    new = torch.arange(10) + 5
    for targets in (new, lambda batch: batch[0].squeeze(1).long() + 5):
        changed = relabelled(found, targets)
        assert torch.equal(torch.cat([batch.data[1] for batch in changed.batches()]), new)
        assert read(changed) == read(found)
    assert all((batch.data[1] == 3).all() for batch in relabelled(found, 3).batches())
    with pytest.raises(BatchError, match="3 targets for 10 examples"):
        relabelled(found, torch.tensor([1, 2, 3]))


def test_examples_are_located_by_index_or_by_content() -> None:
    dataset = numbered(12)
    train = examples(DataLoader(Subset(dataset, [11, 3, 5, 7, 9]), 2, shuffle=True))
    cases = {
        "the same view": (DataLoader(train.dataset, 2, sampler=[1, 3]), [1, 3]),
        "the dataset below": (DataLoader(Subset(dataset, [7, 4, 11]), 2), [0, 3]),
        "a view of the view": (DataLoader(Subset(train.dataset, [4]), 2), [4]),
        "equal content": (DataLoader(TensorDataset(*(t[[5, 6]].clone() for t in dataset.tensors)), 2), [2]),
    }
    for name, (loader, expected) in cases.items():
        assert locate(examples(loader), train).tolist() == expected, name
    batch = Examples.from_batch(
        (torch.tensor([[9.0], [3.0], [8.0]]), torch.tensor([1, 1, 0])), lambda b: b, batch_size=2
    )
    assert locate(batch, train).tolist() == [1, 4]


def test_content_includes_the_label_and_the_dtype() -> None:
    train = examples(DataLoader(numbered(4), 2))
    for x, y in ((torch.tensor([[1.0]]), [0]), (torch.tensor([[1.0]], dtype=torch.float64), [1])):
        batch = Examples.from_batch((x, torch.tensor(y)), lambda b: b, batch_size=2)
        assert locate(batch, train).tolist() == []


def test_the_digest_of_contents_does_not_depend_on_order_or_batches() -> None:
    x, y = torch.randn(7, 3), torch.arange(7)
    one = Examples.from_batch((x, y), lambda data: data, batch_size=3)
    order = torch.randperm(7)
    other = Examples.from_loader(DataLoader(TensorDataset(x[order], y[order])), lambda data: data, batch_size=2)
    assert contents_digest(one) == contents_digest(other)
    x[4, 1] += 1
    assert contents_digest(one) != contents_digest(other)
    twice = Examples.from_batch((x[[0, 0]], y[[0, 0]]), lambda data: data, batch_size=3)
    assert contents_digest(twice) != contents_digest(twice.subset(torch.tensor([0])))


def test_the_digest_of_data_depends_on_ids_and_on_the_contents_of_a_spread_sample() -> None:
    x = torch.zeros(1000, 2)
    train = Examples.from_loader(DataLoader(TensorDataset(x)), lambda data: data, batch_size=100)
    seen = {data_digest(train), data_digest(train.subset(torch.arange(999)))}
    for first in (0, 300, 600, 900):  # any 16 in a row include one of the 64 that are hashed
        x[first : first + 16] += 1
        seen.add(data_digest(train))
    assert len(seen) == 6
    assert data_digest(train) == data_digest(Examples.from_loader(DataLoader(TensorDataset(x)), list, batch_size=7))


def test_examples_whose_tensors_are_not_one_row_each_are_recognised_too() -> None:
    """Graphs have different numbers of nodes: a batch of graphs does not say which node belongs to which graph."""
    graphs = [
        (torch.ones(nodes, 2) * value, torch.tensor([value])) for nodes, value in ((2, 1), (3, 1), (2, 2), (2, 1))
    ]

    def collate(items: list[Any]) -> Any:
        return torch.cat([nodes for nodes, _ in items]), torch.cat([label for _, label in items])

    data = DataLoader(graphs, collate_fn=collate)  # type: ignore[arg-type]
    one, two, three, four = fingerprints(Examples.from_loader(data, lambda batch: batch, batch_size=4))
    assert one == four
    assert len({one, two, three}) == 3


# ----------------------------------------------------------------------------------------------------------------------
# Batches of any structure
# ----------------------------------------------------------------------------------------------------------------------

quick = settings(max_examples=40, derandomize=True, deadline=None, database=None)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]


@st.composite
def column(draw: st.DrawFn, size: int) -> Any:
    """A value with an entry for each of ``size`` examples (a tensor or strings), or another value."""
    kind = draw(st.sampled_from(["tensor", "tensor", "texts", "words", "scalar", "number", "other texts", "none"]))
    texts = st.text("ab", max_size=2)
    if kind == "tensor":
        shape = draw(st.lists(st.integers(0, 2), max_size=2))
        values = torch.randint(0, 2, (size, *shape), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
        return values.to(draw(st.sampled_from(DTYPES)))
    if kind == "texts":
        return draw(st.sampled_from([list, tuple]))(draw(st.lists(texts, min_size=size, max_size=size)))
    if kind == "words":
        return [draw(st.lists(texts, max_size=2)) for _ in range(size)]
    if kind == "other texts":
        return draw(st.lists(texts, min_size=size + 1, max_size=size + 3))
    return {"scalar": torch.tensor(2.0), "number": 3, "none": None}[kind]


@st.composite
def structure(draw: st.DrawFn, size: int, depth: int = 2) -> Any:
    if not depth:
        return draw(column(size))
    kind = draw(st.sampled_from([tuple, list, dict, Pair, None]))
    inner = structure(size, depth - 1)
    if kind is None:
        return draw(column(size))
    if kind is Pair:
        return Pair(draw(inner), draw(inner))
    # Two columns of texts for two examples, or one for one example, are ambiguous.
    items = draw(st.lists(inner, min_size=size + 1, max_size=size + 2))
    return {str(i): item for i, item in enumerate(items)} if kind is dict else kind(items)


@st.composite
def any_batch(draw: st.DrawFn) -> tuple[Any, int]:
    size = draw(st.integers(2, 5))
    return (draw(structure(size)), torch.arange(size) % 2), size


def same(one: Any, other: Any) -> bool:
    """Equal bit by bit, in equal containers."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def rows_of(draw: Any, size: int) -> Tensor:
    return torch.tensor(draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=size)))


@quick
@given(batch=any_batch(), data=st.data())
def test_taking_rows_equals_indexing_in_every_structure(batch: tuple[Any, int], data: st.DataObject) -> None:
    batch, size = batch
    assert batch_size(batch) == size
    assert same(map_tensors(batch, lambda tensor: tensor, lambda items: items, size), batch)
    assert same(take(batch, torch.arange(size)), batch)
    rows = rows_of(data.draw, size)
    assert batch_size(take(batch, rows)) == len(rows)
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    part = slice_batch(batch, start, stop)
    assert same(part, take(batch, torch.arange(start, stop)))
    changed = replace_targets(batch, 7)
    assert same(changed[0], batch[0])
    assert changed[1].tolist() == [7] * size


@quick
@given(batch=any_batch(), data=st.data())
def test_parts_of_a_batch_can_be_joined_again(batch: tuple[Any, int], data: st.DataObject) -> None:
    batch, size = batch
    cuts = sorted({0, size, *data.draw(st.lists(st.integers(1, size - 1), max_size=2))})
    ids = torch.arange(size)
    parts = [
        Batch(slice_batch(batch, start, stop), ids[start:stop], stop - start)
        for start, stop in itertools.pairwise(cuts)
    ]
    (whole,) = joined(parts, size)
    assert same(whole.data, batch)
    assert torch.equal(whole.ids, ids)
    assert whole.size == size


@quick
@given(batch=any_batch(), data=st.data())
def test_equal_examples_have_equal_fingerprints(batch: tuple[Any, int], data: st.DataObject) -> None:
    batch, size = batch
    marks = fingerprints(Examples.from_batch(batch, lambda given: given, batch_size=size))
    singles = [slice_batch(batch, i, i + 1) for i in range(size)]
    rows = rows_of(data.draw, size)
    again = fingerprints(Examples.from_batch(take(batch, rows), lambda given: given, batch_size=size))
    assert again == [marks[row] for row in rows]
    for i, j in itertools.combinations(range(size), 2):
        assert (marks[i] == marks[j]) == same(singles[i], singles[j])


def test_pairs_of_texts_are_columns_and_not_examples() -> None:
    pairs = [("a", "b"), ("c", "d"), ("e", "f")]
    batch = next(iter(DataLoader([(pair, i % 2) for i, pair in enumerate(pairs)], 3)))
    texts, targets = slice_batch(batch, 1, 3)
    assert [list(column) for column in texts] == [["c", "e"], ["d", "f"]]
    assert targets.tolist() == [1, 0]
    marks = fingerprints(Examples.from_batch((batch[0], torch.zeros(3)), lambda given: given, batch_size=3))
    assert len(set(marks)) == 3


def test_examples_without_entries_have_fingerprints() -> None:
    marks = fingerprints(Examples.from_batch((torch.zeros(2, 0), torch.arange(2)), lambda given: given, batch_size=2))
    assert len(set(marks)) == 2
