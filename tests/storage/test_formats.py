"""Files from untrusted sources or with damage: they are read correctly, or refused with a clear error."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lightning_gif import ConfigurationError, EditError, GIFWarning, InfluenceReport, UnlearnReport
from lightning_gif.attribution.score_store import ScoreStore
from lightning_gif.edit import Edit
from lightning_gif.parameters import ParameterSpace, Targets
from lightning_gif.solvers.solution import Solution, Status
from lightning_gif.storage.artifact import read_folder, write_folder
from lightning_gif.storage.digests import digest
from lightning_gif.storage.schema import MOST_BYTES, parse, read, restored, restored_fields
from lightning_gif.unlearning.protocol import GoalName, Trial
from lightning_gif.unlearning.record import Change, EditContext

quick = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

KIND = "lightning-gif influence 2"
SOLVE: dict[str, Any] = {
    "solver": "cg",
    "status": "converged",
    "iterations": 3,
    "hvps": 3,
    "examples": 9,
    "residual": 1e-3,
    "unexplained": 0.5,
    "sigma_max": 2.0,
    "rtol": 1e-3,
    "damping": 0.0,
    "seconds": 0.1,
}


def some_edit() -> tuple[nn.Module, UnlearnReport]:
    """A report as ``trainer.unlearn`` makes it, without the trainer."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    space = ParameterSpace(module)
    targets = Targets({"0.weight": torch.tensor([0, 5]), "2.bias": torch.tensor([1])})
    edit = Edit.plan(module, targets, space, torch.randn(3), {"1.running_mean": torch.ones(4)})
    report = UnlearnReport(
        edit=edit,
        goal=GoalName.LABELS,
        step_sizes=[1.0, 0.5],
        forget=Change(0.1, 2.0, math.nan),
        retain=Change(0.1, 0.11, 0.1),
        relabelled=Change(3.0, 0.2, 0.1),
        unseen=None,
        memorization=(1.0, 0.0),
        n_forget=3,
        n_found=3,
        n_retain=20,
        n_unseen=0,
        n_parameters=space.size,
        trials=[Trial((), 0.1, 0.1, 0.4, 1.0), Trial((1.0, 0.5), 2.0, 0.11, 0.2, 0.0)],
        solves=[dict(SOLVE), dict(SOLVE)],
        residuals=[1.0, 0.1],
        curvature={"curvature": "hessian", "examples": 9},
        settings={"method": "gif", "rtol": None},
        notes=["ünïcode"],
        seconds=0.5,
        context=EditContext(module=module),
    )
    return module, report


def some_scores(queries: int = 2, examples: int = 5, seed: int = 0) -> InfluenceReport:
    generator = torch.Generator().manual_seed(seed)
    solution = Solution.of_record({**SOLVE, "residuals": [1.0, 1e-3]})
    return InfluenceReport(
        scores=torch.randn(queries, examples, generator=generator, dtype=torch.float64),
        indices=torch.randperm(100, generator=generator)[:examples].sort().values,
        n_train=examples,
        solutions=[solution] * queries,
        curvature={"curvature": "ggn"},
        targets=Targets({"net.weight": torch.tensor([0, 3, 64])}),
        k=2,
        dataset=[(torch.full((8, 8), float(i)), i % 3) for i in range(100)],
        queries=[],
        settings={"method": "if"},
        seconds=0.1,
    )


def told(report: UnlearnReport) -> str:
    return str(replace(report, context=EditContext()))


# --------------------------------------------------------------------------------------------------------------------
# Plain records
# --------------------------------------------------------------------------------------------------------------------

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@quick
@given(PLAIN)
def test_json_values_are_restored(value: Any) -> None:
    assert parse(json.dumps(value)) == value
    assert restored(Any, value, "it") is value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the same key twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        (b"\xff\xfe\xff", "utf|codec|Expecting"),
        ("9" * 10_000, "digits"),
        ("", "Expecting"),
    ],
)
def test_invalid_records_raise_a_value_error(text: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_a_record_that_would_not_fit_into_memory_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "large.json", "wb") as file:
        file.truncate(MOST_BYTES + 1)  # takes no space on the disk
    with pytest.raises(ValueError, match=r"but at most \d+ are read"):
        read(tmp_path / "large.json")
    with pytest.raises(ConfigurationError, match=r"but at most \d+ can be read"):
        write_folder(tmp_path / "report", KIND, {"text": "x" * (MOST_BYTES // 4)}, {"scores": torch.zeros(1)})
    assert os.listdir(tmp_path) == ["large.json"]


class Two(NamedTuple):
    one: int
    other: float


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (int, 3, 3),
        (float, 3, 3.0),
        (float | None, None, None),
        (list[float], [1, 2.5], [1.0, 2.5]),
        (tuple[float, ...], [1.0], (1.0,)),
        (tuple[int, str], [1, "a"], (1, "a")),
        (dict[str, list[int]], {"a": [1]}, {"a": [1]}),
        (Status, "converged", Status.CONVERGED),
        (Two, [1, 2], Two(1, 2.0)),
        (
            Trial,
            {"step_sizes": [1], "forget_loss": 1, "retain_loss": 1, "risk": 1, "memorization": 1},
            Trial((1,), 1, 1, 1, 1),
        ),
    ],
)
def test_values_are_restored_with_their_types(hint: Any, value: Any, expected: Any) -> None:
    found = restored(hint, value, "it")
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (int, 3.0),
        (int, True),
        (float, True),
        (float, "1"),
        (float, 10**400),
        (str, 1),
        (float | None, "a"),
        (list[float], {"a": 1}),
        (list[float], [None]),
        (tuple[int, str], [1]),
        (tuple[float, ...], 1.0),
        (dict[str, int], [1]),
        (Two, [1]),
        (Two, [1, "a"]),
        (Status, ["converged"]),
        (Trial, {"steps": [1]}),
        (Trial, None),
    ],
)
def test_values_of_another_type_are_named(hint: Any, value: Any) -> None:
    with pytest.raises(TypeError, match=r"it|steps|Trial"):
        restored(hint, value, "it")


def test_records_of_unknown_fields_are_refused() -> None:
    with pytest.raises(TypeError, match="a record of Solution must have status"):
        restored_fields(Solution, {**SOLVE, "residuals": [], "peak_memory": None, "x": 1}, without=("x",))


# --------------------------------------------------------------------------------------------------------------------
# Edits
# --------------------------------------------------------------------------------------------------------------------


def parts_of(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["report"])
        return record, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def forge(path: Path, record: Any, tensors: dict[str, Tensor]) -> None:
    """An edit file with arbitrary contents and a correct checksum."""
    metadata = {"format": "lightning-gif edit 4", "report": json.dumps(record), "digest": digest(tensors, record)}
    path.write_bytes(save({name: value.clone() for name, value in tensors.items()}, metadata=metadata))


def test_a_loaded_edit_has_the_same_text_and_effect(tmp_path: Path) -> None:
    module, report = some_edit()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    report.save(tmp_path / "edit")
    loaded = UnlearnReport.load(tmp_path / "edit", module)
    assert told(loaded) == told(report)
    assert str(loaded.summary()) == str(report.summary())
    loaded.apply()
    assert report.edit.is_in(module)
    report.undo()
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


@quick
@given(data=st.data())
def test_any_damage_to_an_edit_file_is_detected(data: st.DataObject, tmp_path: Path) -> None:
    _, report = some_edit()
    path = tmp_path / "edit"
    report.save(path)
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["bit", "byte", "cut", "more", "hole"]))
    at = data.draw(st.integers(0, len(content) - 1))
    if kind == "bit":
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "byte":
        content[at] = data.draw(st.integers(0, 255))
    elif kind == "cut":
        content = content[:at]
    elif kind == "more":
        content += data.draw(st.binary(min_size=1, max_size=9))
    else:
        content[at : at + 64] = bytes(len(content[at : at + 64]))
    path.write_bytes(content)
    try:
        loaded = UnlearnReport.load(path)
    except EditError:
        return
    assert told(loaded) == told(report)
    for part in ("indices", "old", "new"):
        for name, value in getattr(report.edit, part).items():
            assert torch.equal(getattr(loaded.edit, part)[name], value)


HOSTILE: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], Any]] = {
    "an unknown field": lambda record, _: record.update(module="os.system"),
    "loggers": lambda record, _: record.update(loggers=[]),
    "a missing field": lambda record, _: record.pop("trials"),
    "no step sizes": lambda record, _: record.update(step_sizes=[]),
    "step sizes in words": lambda record, _: record.update(step_sizes=["1"]),
    "an unknown goal": lambda record, _: record.update(goal="world"),
    "a change of two": lambda record, _: record.update(forget=[1.0, 2.0]),
    "a change in words": lambda record, _: record.update(retain=["a", "b", "c"]),
    "no change": lambda record, _: record.update(retain=None),
    "a number of examples that is none": lambda record, _: record.update(n_forget=1.5),
    "no parameters": lambda record, _: record.update(n_parameters=0),
    "trials of words": lambda record, _: record.update(trials=["a"]),
    "solves without numbers": lambda record, _: record.update(solves=[{}, {}]),
    "no solves": lambda record, _: record.update(solves=[]),
    "settings of another kind": lambda record, _: record.update(settings=[]),
    "settings without rtol": lambda record, _: record.update(settings={}),
    "notes that are numbers": lambda record, _: record.update(notes=[1]),
    "no edit": lambda record, _: record.update(edit=None),
    "no shapes": lambda record, _: record["edit"].update(shapes={}),
    "shapes below zero": lambda record, _: record["edit"]["shapes"].update({"0.weight": [-4, -3]}),
    "shapes in words": lambda record, _: record["edit"]["shapes"].update({"0.weight": "43"}),
    "shapes that are too small": lambda record, _: record["edit"]["shapes"].update({"0.weight": [1, 1]}),
    "buffers that are not there": lambda record, _: record["edit"].update(buffers=["2.running_var"]),
    "a digest that is no string": lambda record, _: record["edit"].update(digest_before=3),
    "a path for a name": lambda _, tensors: tensors.update({"../../x": tensors["old/2.bias"]}),
    "a name without a part": lambda _, tensors: tensors.update({"x": tensors["old/2.bias"]}),
    "a part too many": lambda _, tensors: tensors.update({"old/x": tensors["old/2.bias"]}),
    "NaN": lambda _, tensors: tensors["new/2.bias"].fill_(torch.nan),
    "infinity": lambda _, tensors: tensors["new/2.bias"].fill_(-torch.inf),
    "indices below zero": lambda _, tensors: tensors.update({"indices/2.bias": torch.tensor([-1])}),
    "indices out of range": lambda _, tensors: tensors.update({"indices/2.bias": torch.tensor([2**62])}),
    "indices that are no whole numbers": lambda _, tensors: tensors.update({"indices/2.bias": torch.tensor([1.0])}),
    "values that are whole numbers": lambda _, tensors: tensors.update(
        {"old/2.bias": torch.tensor([1]), "new/2.bias": torch.tensor([2])}
    ),
    "values of two dimensions": lambda _, tensors: tensors.update({"new/2.bias": torch.zeros(1, 1)}),
    "nothing": lambda _, tensors: tensors.update(
        {f"{part}/2.bias": torch.zeros(0) for part in ("indices", "old", "new")}
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_edits_are_refused_although_their_checksum_is_correct(kind: str, tmp_path: Path) -> None:
    module, report = some_edit()
    report.save(tmp_path / "edit")
    record, tensors = parts_of(tmp_path / "edit")
    forge(tmp_path / "edit", record, tensors)
    UnlearnReport.load(tmp_path / "edit", module)
    HOSTILE[kind](record, tensors)
    forge(tmp_path / "edit", record, tensors)
    with pytest.raises(EditError):
        UnlearnReport.load(tmp_path / "edit", module)


@quick
@given(data=st.data())
def test_an_arbitrary_record_is_an_edit_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    _, report = some_edit()
    report.save(tmp_path / "edit")
    record, tensors = parts_of(tmp_path / "edit")
    owner = data.draw(st.sampled_from([record, record["edit"], record["solves"][0], record["trials"][0]]))
    owner[data.draw(st.sampled_from(sorted(owner)))] = data.draw(PLAIN)
    forge(tmp_path / "edit", record, tensors)
    try:
        loaded = UnlearnReport.load(tmp_path / "edit")
    except EditError:
        return
    assert isinstance(str(loaded), str)
    loaded.summary()


def header(content: bytes, claimed: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if claimed is None else claimed) + content


@pytest.mark.parametrize(
    "content",
    [
        header(b"{}", 2**63),
        header(b"{}", 2**40),
        header(b"[" * 50_000),
        header(b'{"__metadata__": ' + b'{"a":' * 50_000),
        header(b'{"a": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 16]}}') + bytes(16),
        header(b'{"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}') + bytes(16),
        header(b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1099511627776]}}') + bytes(16),
        header(b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}') + bytes(16),
        header(b'{"a": {"dtype": "X9", "shape": [4], "data_offsets": [0, 16]}}') + bytes(16),
    ],
    ids=range(9),
)
def test_arbitrary_headers_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "edit").write_bytes(content)
    with pytest.raises(EditError, match="edit"):
        UnlearnReport.load(tmp_path / "edit")
    some_scores().save(tmp_path / "report")
    (tmp_path / "report" / "scores.safetensors").write_bytes(content)
    with pytest.raises(ConfigurationError, match="damaged"):
        InfluenceReport.load(tmp_path / "report")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_reading_does_not_block_on_special_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(EditError, match="not a file"):
            UnlearnReport.load(path)
    some_scores().save(tmp_path / "report")
    (tmp_path / "report" / "report.json").unlink()
    os.mkfifo(tmp_path / "report" / "report.json")
    with pytest.raises(ConfigurationError, match="missing"):
        InfluenceReport.load(tmp_path / "report")


# --------------------------------------------------------------------------------------------------------------------
# Reports of influence
# --------------------------------------------------------------------------------------------------------------------


@quick
@given(queries=st.integers(1, 12), examples=st.integers(1, 9), seed=st.integers(0, 99))
def test_scores_of_any_shape_are_restored(queries: int, examples: int, seed: int, tmp_path: Path) -> None:
    report = some_scores(queries, examples, seed)
    report.save(tmp_path / "report")
    loaded = InfluenceReport.load(tmp_path / "report")
    assert torch.equal(loaded.scores, report.scores)
    assert torch.equal(loaded.indices, report.indices)
    assert str(loaded) == str(report)
    assert loaded.summary() == report.summary()


@quick
@given(data=st.data())
def test_any_damage_to_a_report_is_detected(data: st.DataObject, tmp_path: Path) -> None:
    report = some_scores()
    shutil.rmtree(tmp_path / "report", ignore_errors=True)
    report.save(tmp_path / "report")
    path = tmp_path / "report" / data.draw(st.sampled_from(["report.json", "scores.safetensors"]))
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        content = content[:at]
    path.write_bytes(content)
    try:
        loaded = InfluenceReport.load(tmp_path / "report")
    except ConfigurationError:
        return
    assert torch.equal(loaded.scores, report.scores)
    assert str(loaded) == str(report)


@quick
@given(data=st.data())
def test_an_arbitrary_record_is_a_report_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    some_scores().save(tmp_path / "report")
    record, tensors = read_folder(tmp_path / "report", KIND)
    owner = data.draw(st.sampled_from([record, record["solutions"][0], next(iter(record["looks"].values()))]))
    owner[data.draw(st.sampled_from([*sorted(owner), "another"]))] = data.draw(PLAIN)
    write_folder(tmp_path / "report", KIND, record, tensors)
    try:
        loaded = InfluenceReport.load(tmp_path / "report")
    except ConfigurationError:
        return
    assert isinstance(str(loaded), str)
    loaded.summary()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scores_that_are_not_finite_are_refused(bad: float, tmp_path: Path) -> None:
    some_scores().save(tmp_path / "report")
    record, tensors = read_folder(tmp_path / "report", KIND)
    tensors["scores"][0, 1] = bad
    write_folder(tmp_path / "report", KIND, record, tensors)
    with pytest.raises(ConfigurationError, match="all finite"):
        InfluenceReport.load(tmp_path / "report")


def test_an_interrupted_save_leaves_the_earlier_report_and_its_path(tmp_path: Path) -> None:
    some_scores().save(tmp_path / "report")
    (tmp_path / "report").rename(tmp_path / ".report.0123.old")
    with pytest.raises(FileNotFoundError, match=r"interrupted save left an earlier report at '.*\.report\.0123\.old'"):
        InfluenceReport.load(tmp_path / "report")


def test_replacing_files_follows_no_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    report = some_scores()
    report.save(tmp_path / "report")
    scores = tmp_path / "report" / "scores.safetensors"
    scores.rename(outside / "scores")
    scores.symlink_to(outside / "scores")
    kept = (outside / "scores").read_bytes()
    some_scores(seed=1).save(tmp_path / "report")
    assert not scores.is_symlink()
    assert (outside / "scores").read_bytes() == kept
    assert (outside / "mine").read_text() == "mine"


# --------------------------------------------------------------------------------------------------------------------
# Score stores
# --------------------------------------------------------------------------------------------------------------------


def some_store(folder: Path) -> ScoreStore:
    return ScoreStore.open(folder, 2, 6, {"weights": "mark"})


def test_written_scores_are_marked_as_done(tmp_path: Path) -> None:
    store = some_store(tmp_path / "scores")
    assert not store.done.any()
    store.write(1, torch.arange(6.0).view(2, 3))
    again = some_store(tmp_path / "scores")
    assert again.done.tolist() == [False, True, True, True, False, False]
    assert again.scores[:, 1:4].tolist() == [[0, 1, 2], [3, 4, 5]]


@quick
@given(data=st.data())
def test_any_damage_to_scores_is_detected(data: st.DataObject, tmp_path: Path) -> None:
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    store = some_store(folder)
    values = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    store.write(0, values[:, :4])
    finished = data.draw(st.booleans())
    if finished:
        store.write(4, values[:, 4:])
    directions = torch.ones(0 if finished else 2, 3)
    store.save_directions(0, directions, {"damping": 0.1})
    path = folder / data.draw(st.sampled_from(["scores.bin", "done.bin", "manifest.json", "directions-0.safetensors"]))
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        content = content[:at]
    del store
    path.write_bytes(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GIFWarning)
            again = some_store(folder)
        found = again.load_directions(0, 3)
    except ConfigurationError:
        return
    assert torch.equal(again.scores[:, again.done], values[:, again.done])
    if finished and not again.done.all():
        assert found is None
        return
    assert found is not None
    assert torch.equal(found[0], directions)
    assert found[1] == {"damping": 0.1}


@pytest.mark.parametrize(
    "directions", [torch.ones(1, 3), torch.ones(2, 4), torch.ones(4, 3), torch.full((2, 3), math.nan)], ids=str
)
def test_invalid_ihvps_or_ihvps_of_another_shape_are_damage(directions: Tensor, tmp_path: Path) -> None:
    store = some_store(tmp_path / "scores")
    assert store.load_directions(0, 3) is None
    store.save_directions(0, directions, {})
    with pytest.raises(ConfigurationError, match=r"directions-0.*Delete it: its solves are repeated"):
        store.load_directions(0, 3)


def test_damaged_scores_are_computed_again_with_a_warning(tmp_path: Path) -> None:
    some_store(tmp_path / "scores").write(0, torch.ones(2, 6))
    content = bytearray((tmp_path / "scores" / "scores.bin").read_bytes())
    content[8] ^= 1
    (tmp_path / "scores" / "scores.bin").write_bytes(content)
    with pytest.warns(GIFWarning, match=r"scores of 1 of 6 examples in .* are damaged\. They are computed again"):
        store = some_store(tmp_path / "scores")
    assert store.done.tolist() == [False] + [True] * 5


@pytest.mark.parametrize("name", ["manifest.json", "scores.bin", "done.bin", "directions-0.safetensors"])
def test_scores_are_not_written_through_links(name: str, tmp_path: Path) -> None:
    some_store(tmp_path / "scores")
    path = tmp_path / "scores" / name
    outside = tmp_path / "outside"
    outside.write_bytes(path.read_bytes() if path.exists() else b"")
    path.unlink(missing_ok=True)
    path.symlink_to(outside)
    with pytest.raises(ConfigurationError, match=f"holds links .{name}"):
        some_store(tmp_path / "scores")


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"version": 2, "version": 2}', "null", '{"version": "2"}'],
    ids=["deep", "twice", "null", "type"],
)
def test_hostile_manifests_are_refused(text: str, tmp_path: Path) -> None:
    some_store(tmp_path / "scores")
    (tmp_path / "scores" / "manifest.json").write_text(text)
    with pytest.raises(ConfigurationError, match=r"holds no scores of an earlier call|cannot resume from"):
        some_store(tmp_path / "scores")
