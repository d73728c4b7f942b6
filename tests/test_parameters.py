"""The flat vector, the targets in it, and edits that are undone bit for bit."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_gif import EditError, NonFiniteError, SelectionError
from lightning_gif.edit import Edit
from lightning_gif.parameters import ParameterSpace, Targets, match_names, weights_digest
from lightning_gif.storage.digests import digest, raw


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))


def test_flatten_and_unflatten_are_inverse_and_keep_the_order_of_the_module() -> None:
    module = net()
    space = ParameterSpace(module)
    theta = space.flatten(module, torch.float64)
    assert torch.equal(theta, torch.cat([p.detach().double().flatten() for p in module.parameters()]))
    for name, parameter in module.named_parameters():
        assert torch.equal(space.unflatten(theta)[name], parameter.double())
    theta.zero_()
    assert module[0].weight.any()  # a copy, not a view


def test_the_space_excludes_frozen_parameters_and_counts_tied_ones_once() -> None:
    module = net()
    module[0].weight.requires_grad_(False)
    module.append(nn.Linear(4, 2, bias=False))
    module[3].weight = module[2].weight
    assert list(ParameterSpace(module).slots) == ["0.bias", "1.weight", "1.bias", "2.weight"]
    with pytest.raises(SelectionError, match="requires_grad=False"):
        ParameterSpace(module.requires_grad_(False))


def test_targets_are_sorted_positions_in_the_flat_vector() -> None:
    module = net()
    space = ParameterSpace(module)
    targets = Targets(
        {"2.weight": torch.tensor([5, 0]), "0.bias": torch.tensor([3, 1, 3]), "0.weight": torch.tensor([])}
    )
    assert targets.flat(space).tolist() == [12 + 1, 12 + 3, 24 + 0, 24 + 5]
    assert targets.count == 4
    assert list(targets) == ["2.weight", "0.bias"]
    assert torch.equal(Targets.whole(space).flat(space), torch.arange(space.size))


def test_targets_of_another_model_are_refused() -> None:
    space = ParameterSpace(net())
    with pytest.raises(SelectionError, match=r"'0\.weigth' is not a trainable parameter.*'0\.weight'"):
        Targets({"0.weigth": torch.tensor([0])}).flat(space)
    with pytest.raises(SelectionError, match="include index 12, but the parameter has 12"):
        Targets({"0.weight": torch.tensor([12])}).flat(space)
    with pytest.raises(SelectionError, match="Raise `ratio`"):
        Targets({"0.weight": torch.tensor([], dtype=torch.long)})


def test_jaccard_compares_entries_across_parameters() -> None:
    one = Targets({"a": torch.tensor([0, 1, 2]), "b": torch.tensor([0])})
    other = Targets({"a": torch.tensor([1, 2, 3]), "c": torch.tensor([0])})
    assert one.jaccard(other) == pytest.approx(2 / 6)
    assert one.jaccard(one) == 1
    assert one.jaccard(Targets({"c": torch.tensor([0])})) == 0


def test_patterns_keep_the_order_of_the_names() -> None:
    assert match_names(["x.b", "x.a", "y"], ["y", "x.*"]) == ["x.b", "x.a", "y"]
    with pytest.raises(SelectionError, match="'z' matches no"):
        match_names(["x.b", "x.a", "y"], ["x.*", "z"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_an_edit_rounds_once_and_is_undone_bit_by_bit(dtype: torch.dtype) -> None:
    module = net().to(dtype)
    space = ParameterSpace(module)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    targets = Targets({"0.weight": torch.tensor([0, 7, 11]), "1.bias": torch.tensor([2])})
    change = torch.tensor([0.1, -1e-9, 3.0, 1e-3], dtype=torch.float64)
    edit = Edit.plan(module, targets, space, change)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    edit.apply(module)
    expected = before["0.weight"].flatten()[[0, 7, 11]].double() + change[:3]
    assert torch.equal(module[0].weight.detach().flatten()[[0, 7, 11]], expected.to(dtype))
    untouched = [1, 2, 3, 4, 5, 6, 8, 9, 10]
    assert torch.equal(module[0].weight.flatten()[untouched], before["0.weight"].flatten()[untouched])
    edit.undo(module)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert module[0].weight.requires_grad


def test_a_parameter_that_is_not_contiguous_is_edited_too() -> None:
    module = nn.Linear(3, 4, bias=False)
    module.weight = nn.Parameter(torch.randn(3, 4).T)
    before = module.weight.detach().clone()
    edit = Edit.plan(module, Targets({"weight": torch.tensor([1])}), ParameterSpace(module), torch.tensor([5.0]))
    edit.apply(module)
    assert float((module.weight - before)[0, 1]) == pytest.approx(5.0)
    edit.undo(module)
    assert torch.equal(module.weight, before)


def test_many_edits_are_undone_in_reverse_order() -> None:
    module = net()
    space = ParameterSpace(module)
    before = digest(dict(module.named_parameters()))
    edits = []
    for _ in range(50):
        targets = Targets({"0.weight": torch.randperm(12)[:4], "2.weight": torch.randperm(8)[:3]})
        edits.append(Edit.plan(module, targets, space, torch.randn(targets.count)))
        edits[-1].apply(module)
    for edit in reversed(edits):
        edit.undo(module)
    assert digest(dict(module.named_parameters())) == before


def test_an_edit_knows_whether_it_is_in_the_weights() -> None:
    module = net()
    edit = Edit.plan(module, Targets({"2.weight": torch.tensor([0])}), ParameterSpace(module), torch.tensor([1.0]))
    with pytest.raises(EditError, match="not in the weights"):
        edit.undo(module)
    edit.apply(module)
    with pytest.raises(EditError, match="in the weights already"):
        edit.apply(module)
    with torch.no_grad():
        module[2].weight[1, 1] += 1  # the same parameter, another entry
    with pytest.raises(EditError, match="have changed since"):
        edit.undo(module)


def test_an_edit_refuses_another_model() -> None:
    module = net()
    edit = Edit.plan(module, Targets({"2.weight": torch.tensor([0])}), ParameterSpace(module), torch.tensor([1.0]))
    with pytest.raises(EditError, match="does not have"):
        edit.apply(nn.Linear(3, 4))
    with pytest.raises(EditError, match=r"shape \(2, 4\)"):
        edit.apply(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3, bias=False)))
    with pytest.raises(EditError, match="float64"):
        edit.apply(net().double())


def damaged(edit: Edit, part: str) -> Edit:
    """The edit with one bit of one number flipped."""
    tensors = {name: value.clone() for name, value in getattr(edit, part).items()}
    tensors["0.weight"].view(torch.uint8)[0] ^= 1
    return replace(edit, **{part: tensors})


@pytest.mark.parametrize("part", ["indices", "old", "new"])
def test_an_edit_produces_the_recorded_weights_or_changes_nothing(part: str) -> None:
    module = net()
    space = ParameterSpace(module)
    targets = Targets({"0.weight": torch.tensor([0, 7]), "2.weight": torch.tensor([3])})
    edit = Edit.plan(module, targets, space, torch.tensor([0.1, 0.2, 0.3]))
    start = digest(dict(module.named_parameters()))
    if part != "old":
        with pytest.raises(EditError, match="Cannot apply the edit: its indices or values were changed"):
            damaged(edit, part).apply(module)
        assert digest(dict(module.named_parameters())) == start
    edit.apply(module)
    end = digest(dict(module.named_parameters()))
    if part != "new":
        with pytest.raises(EditError, match="Cannot undo the edit: its indices or values were changed"):
            damaged(edit, part).undo(module)
        assert digest(dict(module.named_parameters())) == end
    edit.undo(module)
    assert digest(dict(module.named_parameters())) == start


def test_an_edit_without_entries_can_be_made_and_undone() -> None:
    module = net()
    edit = Edit.plan(module, Targets({"2.weight": torch.tensor([0])}), ParameterSpace(module), torch.zeros(1))
    edit.apply(module)
    edit.apply(module)
    edit.undo(module)


@pytest.mark.parametrize("entries", [torch.tensor([0.5]), torch.tensor([True, False])])
def test_targets_that_are_not_indices_are_refused(entries: torch.Tensor) -> None:
    with pytest.raises(SelectionError, match="must be flat indices, whole numbers; got torch"):
        Targets({"0.weight": entries})


def test_targets_below_zero_are_refused() -> None:
    with pytest.raises(SelectionError, match="include index -1"):
        Targets({"0.weight": torch.tensor([-1, 2])}).flat(ParameterSpace(net()))


def test_edits_in_any_order_are_refused_or_correct() -> None:
    module = net()
    space = ParameterSpace(module)
    start = {name: value.detach().clone() for name, value in module.named_parameters()}
    generator = random.Random(0)
    made: list[Edit] = []  # the edits in the weights, in their order
    undone: list[Edit] = []
    outcomes = Counter[str]()
    for _ in range(1000):
        kind = generator.choice(["apply", "undo", "undo out of order", "redo"])
        present = {name: value.detach().clone() for name, value in module.named_parameters()}
        if kind == "apply" and len(made) < 8:
            names = generator.sample(["0.weight", "0.bias", "2.weight"], generator.choice([1, 2]))
            targets = Targets({name: torch.randperm(space.slots[name].size)[:3] for name in names})
            edit = Edit.plan(module, targets, space, torch.randn(targets.count))
            edit.apply(module)
            made.append(edit)
            outcomes["made"] += 1
        elif kind == "redo" and undone:
            edit = undone.pop(generator.randrange(len(undone)))
            try:
                edit.apply(module)
                made.append(edit)
                outcomes["redone"] += 1
            except EditError:
                assert all(torch.equal(present[name], value) for name, value in module.named_parameters())
                outcomes["redo refused"] += 1
        elif kind.startswith("undo") and made:
            position = len(made) - 1 if kind == "undo" else generator.randrange(len(made))
            edit = made[position]
            overlapped = any(edit.shapes.keys() & later.shapes.keys() for later in made[position + 1 :])
            if overlapped:
                with pytest.raises(EditError, match="have changed since"):
                    edit.undo(module)
                assert all(torch.equal(present[name], value) for name, value in module.named_parameters())
                outcomes["undo refused"] += 1
            else:
                edit.undo(module)
                undone.append(made.pop(position))
                outcomes["undone"] += 1
    assert min(outcomes.values()) > 20
    assert len(outcomes) == 5
    for edit in reversed(made):
        edit.undo(module)
    assert all(torch.equal(start[name], value) for name, value in module.named_parameters())


def test_an_edit_that_overflows_is_refused() -> None:
    module = net().half()
    with pytest.raises(NonFiniteError, match=r"'0\.bias' non-finite in torch\.float16"):
        Edit.plan(module, Targets({"0.bias": torch.tensor([1])}), ParameterSpace(module), torch.tensor([1e6]))


def test_the_digest_depends_on_every_bit() -> None:
    values = {"a": torch.zeros(3), "b": torch.ones(2, 2)}
    mark = digest(values)
    assert digest({"b": values["b"], "a": values["a"]}) == mark
    for changed in (
        {"a": torch.tensor([0.0, 0.0, -0.0]), "b": values["b"]},
        {"a": torch.zeros(3, dtype=torch.float64), "b": values["b"]},
        {"a": values["a"], "b": torch.ones(4)},
        {"a": values["a"]},
    ):
        assert digest(changed) != mark


@pytest.mark.parametrize(
    ("shape", "strides"), [((1, 1), (0, 0)), ((1,), (5,)), ((5, 1), (1, 0)), ((), ()), ((2, 3), (1, 2))]
)
def test_the_bytes_of_a_tensor_do_not_depend_on_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    value = torch.arange(3, 20).as_strided(shape, strides)
    plain = torch.tensor(value.tolist())
    rows = shape[0] if shape else 1
    assert raw(value, rows).numpy().tobytes() == plain.numpy().tobytes()
    assert raw(value, rows).shape == (rows, 8 * value.numel() // rows)
    assert digest({"value": value}) == digest({"value": plain})
    assert raw(torch.zeros(2, 0), 2).shape == (2, 0)


def test_an_edit_applies_to_a_state_dict_as_to_a_module() -> None:
    module = net()
    space = ParameterSpace(module)
    targets = Targets({"0.weight": torch.tensor([1, 5]), "2.weight": torch.tensor([0])})
    edit = Edit.plan(module, targets, space, torch.ones(3))
    state = {name: value.clone() for name, value in module.state_dict().items()}
    before = weights_digest(state)
    assert before == weights_digest(module)
    edit.apply(state)
    edit.apply(module)
    assert weights_digest(state) == weights_digest(module) != before
    assert edit.is_in(state)
    edit.undo(state)
    assert weights_digest(state) == before
    with pytest.raises(EditError, match=r"'2\.weight', which the checkpoint does not have"):
        edit.apply({"0.weight": state["0.weight"]})
