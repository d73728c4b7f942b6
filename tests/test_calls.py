"""The calls as an editor, a type checker and a console show them, and on which trainer they act."""

from __future__ import annotations

import copy
import inspect
import pickle
import pydoc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_gif import ConfigurationError, GIFCallback, attach
from lightning_gif.config import Overrides

from .conftest import Classifier, batch_of, blobs, fitted, loader, make_trainer
from .doubles import quick

CALLS = ("influence", "self_influence", "validate_influence", "unlearn", "store_gradients")

ROOT = Path(__file__).parent.parent


def bound() -> tuple[GIFCallback, Any]:
    callback, trainer = quick(), make_trainer()
    attach(trainer, Classifier(), train_dataloaders=loader(blobs()), callback=callback)
    return callback, trainer


# --------------------------------------------------------------------------------------------------------------------
# help() and completion
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_help_of_a_call_lists_each_setting_with_type_and_meaning(name: str) -> None:
    callback, trainer = bound()
    for call in (getattr(callback, name), getattr(trainer, name), getattr(GIFCallback, name)):
        shown = pydoc.plain(pydoc.render_doc(call))
        first = shown.split("\n")[2]
        assert first.startswith(f"{name}(")
        assert "k: int = 10" in first or name in ("unlearn", "validate_influence", "store_gradients")
        assert "damping: float | None = ..." in first
        assert "**overrides" not in first
        for setting in Overrides.__annotations__:
            assert shown.count(f"\n        {setting}: ") == 1
        assert "rtol: The relative residual of the normal equations at which a solve has converged" in shown


def test_help_of_the_check_lists_the_settings_too() -> None:
    callback, trainer = bound()
    for check in (callback.influence.check, trainer.influence.check):
        assert set(Overrides.__annotations__) < set(inspect.signature(check).parameters)


@pytest.mark.parametrize("name", CALLS)
def test_a_console_completes_the_arguments_of_a_call(name: str) -> None:
    callback, trainer = bound()
    parameters = inspect.signature(getattr(trainer, name)).parameters
    assert set(Overrides.__annotations__) < set(parameters)
    assert {"self", "trainer", "overrides"}.isdisjoint(parameters)
    assert parameters == inspect.signature(getattr(callback, name)).parameters


# --------------------------------------------------------------------------------------------------------------------
# Type checkers
# --------------------------------------------------------------------------------------------------------------------

USER = """
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_gif import GIFCallback, GradientStore, InfluenceReport, UnlearnReport, ValidationReport, attach
from lightning_gif.inspection.check import CheckReport


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def retrain(indices: list[int], seed: int) -> LightningModule:
    return Net()


def use() -> None:
    data = TensorDataset(torch.randn(24, 4), torch.arange(24) % 3)
    gif = GIFCallback(selector=["layer.*"], ratio=0.5, log_reports=False)
    trainer = Trainer(callbacks=[gif], max_epochs=1, logger=False, enable_checkpointing=False)
    trainer.fit(Net(), DataLoader(data, 8))
    batch = data[:4]
    found: InfluenceReport = gif.influence(batch, k=3, damping=0.1, max_iter=5)
    own: InfluenceReport = gif.self_influence(k=3, seed=1)
    tested: ValidationReport = gif.validate_influence(batch, retrain, n_subsets=3, rtol=0.1)
    cost: CheckReport = gif.influence.check(n_queries=4, solver="cg")
    edit: UnlearnReport = gif.unlearn([3, 5], step="natural", dry_run=True, record=Path("log.jsonl"), ratio=0.2)
    store: GradientStore = gif.store_gradients("gradients", rank=64, damping=0.1)
    answer: InfluenceReport = gif.influence(batch, store=store.folder, batch_size=8)
    print(found, own, tested, cost, edit, answer)
    attach(trainer, Net(), train_dataloaders=DataLoader(data, 8)).unlearn(batch, unconverged="raise")
"""

WRONG = USER.replace("damping=0.1", "dampin=0.1").replace('unconverged="raise"', 'unconverged="shout"')


def mypy(file: Path) -> list[str]:
    cache = ROOT / ".mypy_cache"
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", f"--cache-dir={cache}", file.name]
    return lines_of(command, file.parent)


def pyright(file: Path) -> list[str]:
    pytest.importorskip("basedpyright", reason="pip install basedpyright")
    (file.parent / "pyrightconfig.json").write_text(f'{{"typeCheckingMode": "strict", "extraPaths": ["{ROOT}"]}}')
    command = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable, file.name]
    return lines_of(command, file.parent)


def lines_of(command: list[str], folder: Path) -> list[str]:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return [line for line in done.stdout.splitlines() if "error" in line and not line.startswith("0 errors")]


@pytest.mark.slow
@pytest.mark.parametrize("checker", [mypy, pyright])
def test_a_type_checker_knows_the_calls(checker: Callable[[Path], list[str]], tmp_path: Path) -> None:
    file = tmp_path / "user.py"
    file.write_text(USER)
    assert checker(file) == []
    file.write_text(WRONG)
    found = "\n".join(checker(file))
    assert "dampin" in found
    assert "shout" in found or "unconverged" in found


def test_the_file_that_type_checkers_read_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "user"}
    exec(USER.replace("n_subsets=3", "n_subsets=3, snapshots=False").replace('"raise"', '"ignore"'), names)
    names["use"]()


# --------------------------------------------------------------------------------------------------------------------
# Whose calls they are
# --------------------------------------------------------------------------------------------------------------------


def test_the_calls_of_the_callback_and_of_the_trainer_give_the_same() -> None:
    trainer, _, data = fitted(callback=quick())
    callback, batch = trainer.callbacks[0], batch_of(data, slice(4))
    assert torch.equal(callback.influence(batch).scores, trainer.influence(batch).scores)
    assert torch.equal(callback.self_influence().scores, trainer.self_influence().scores)
    edit = {"step": "natural", "dry_run": True}
    one, other = callback.unlearn([3, 5], **edit).edit, trainer.unlearn([3, 5], **edit).edit
    assert all(torch.equal(one.new[name], other.new[name]) for name in one.new)


def test_a_trainer_keeps_its_calls_when_the_callback_goes_to_another() -> None:
    callback = quick()
    first, _, data = fitted(callback=callback, max_epochs=1)
    batch = batch_of(data, slice(4))
    expected = first.influence(batch, snapshots=False).scores
    second = make_trainer(callback)
    attach(second, Classifier(), train_dataloaders=loader(data), callback=callback)
    assert torch.equal(first.influence(batch, snapshots=False).scores, expected)
    newer = second.influence(batch, snapshots=False).scores
    assert not torch.equal(newer, expected)
    assert torch.equal(callback.influence(batch, snapshots=False).scores, newer)


def test_a_setting_that_is_changed_on_the_callback_counts_for_the_trainer(tmp_path: Path) -> None:
    callback, trainer = bound()
    callback.record = log = str(tmp_path / "log.jsonl")
    report = trainer.unlearn([3], step="natural", dry_run=True)
    assert report.record == log


def test_the_callback_pickles_and_copies_with_its_calls() -> None:
    trainer, _, data = fitted(callback=quick())
    callback, batch = trainer.callbacks[0], batch_of(data, slice(4))
    expected = callback.influence(batch).scores
    for other in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
        assert torch.equal(other.influence(batch).scores, expected)


# --------------------------------------------------------------------------------------------------------------------
# Too early, or misspelled
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CALLS, "check"])
def test_a_call_before_fit_says_what_to_do(name: str) -> None:
    callback = quick()
    call: Any = callback.influence.check if name == "check" else getattr(callback, name)
    given: dict[str, tuple[Any, ...]] = {"influence": (blobs()[:4],), "unlearn": ([3],)}
    given["store_gradients"] = ("gradients",)
    given["validate_influence"] = (blobs()[:4], lambda indices, seed: Classifier())
    with pytest.raises(
        ConfigurationError, match=r"belongs to no trainer yet.*Trainer\(callbacks=\[gif\]\).*fit.*attach\("
    ):
        call(*given.get(name, ()))


def test_both_remedies_for_a_call_before_fit_work() -> None:
    gif, batch = quick(), batch_of(blobs(), slice(4))
    trainer = make_trainer(gif)
    trainer.fit(Classifier(), loader(blobs()))
    assert gif.influence(batch).n_train == 48
    gif = quick()
    attach(make_trainer(), Classifier(), train_dataloaders=loader(blobs()), callback=gif)
    assert gif.influence(batch).n_train == 48


def test_a_misspelled_argument_of_the_callback_has_a_suggestion() -> None:
    wrong: dict[str, Any] = {"raito": 0.05}
    with pytest.raises(ConfigurationError, match=r"no argument 'raito', got raito=0\.05\. Did you mean 'ratio'\?"):
        GIFCallback(**wrong)
    assert GIFCallback(ratio=0.05).settings.ratio == 0.05


def test_a_misspelled_argument_of_a_call_has_a_suggestion() -> None:
    callback, _ = bound()
    wrong: dict[str, Any] = {"dampin": 0.05}
    with pytest.raises(ConfigurationError, match=r"'dampin'\. Did you mean 'damping'\?"):
        callback.influence(batch_of(blobs(), slice(4)), **wrong)


def test_the_class_itself_cannot_be_called() -> None:
    with pytest.raises(TypeError, match="call it on one"):
        GIFCallback.influence(blobs()[:4])
