"""The user's ``training_step``: every form that Lightning takes, manual optimisation, and what has no loss."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_gif import ConfigurationError, GIFWarning, ObjectiveError

from ..conftest import Classifier, batch_of, blobs, fitted, loader, make_trainer, same_weights, weights
from ..doubles import TwoOptimizers, quick, untouched


def step_tensor(self: Any, batch: Any, batch_idx: int) -> Any:
    return F.cross_entropy(self(batch[0]), batch[1])


def step_dict(self: Any, batch: Any, batch_idx: int) -> Any:
    return {"loss": F.cross_entropy(self(batch[0]), batch[1]), "extra": "text"}


def step_without_index(self: Any, batch: Any) -> Any:
    return F.cross_entropy(self(batch[0]), batch[1])


def step_with_other_names(self: Any, examples: Any, i: int) -> Any:
    return F.cross_entropy(self(examples[0]), examples[1]) + 0 * i


def step_with_star(self: Any, *args: Any) -> Any:
    batch, batch_idx = args
    return F.cross_entropy(self(batch[0]), batch[1]) + 0 * batch_idx


def step_logging(self: Any, batch: Any, batch_idx: int) -> Any:
    loss = F.cross_entropy(self(batch[0]), batch[1])
    self.log("a", loss, prog_bar=True, on_step=True)
    self.log_dict({"b": loss, "c": loss.detach() * 2})
    return loss


def step_skipping(self: Any, batch: Any, batch_idx: int) -> Any:
    return None if batch_idx == 1 else F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize(
    "step",
    [step_dict, step_without_index, step_with_other_names, step_with_star, step_logging, step_skipping],
    ids=lambda step: step.__name__,
)
def test_every_form_of_training_step_gives_the_same_scores(step: Any) -> None:
    torch.manual_seed(0)
    net = Classifier().net
    batch = batch_of(blobs(), slice(4))

    def scores(function: Any) -> Tensor:
        module = type("Formed", (Classifier,), {"training_step": function})(copy.deepcopy(net))
        trainer = make_trainer(quick(), max_epochs=1)
        trainer.fit(module, loader(blobs()))
        module.net.load_state_dict(net.state_dict())
        return trainer.influence(batch, selector=["net.*"]).scores

    with warnings.catch_warnings():
        warnings.simplefilter("error", GIFWarning)
        assert torch.equal(scores(step), scores(step_tensor))


@pytest.mark.filterwarnings("ignore::lightning_gif.GIFWarning")
def test_a_step_that_returns_none_or_something_else_is_named() -> None:
    def wrong(self: Any, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1], reduction="none")

    trainer, module, data = fitted(callback=quick())
    batch = batch_of(data, slice(4))
    for step, words in ((lambda batch, batch_idx: None, "does not depend"), (wrong.__get__(module), "scalar loss")):
        module.training_step = step
        with untouched(trainer, module, trainer.callbacks[0].loaders.train), pytest.raises(ObjectiveError, match=words):
            trainer.influence(batch)
        del module.training_step


def test_manual_optimisation_is_refused_without_a_loss_of_its_own() -> None:
    class Manual(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    module = Manual()
    before = weights(module)
    with pytest.raises(MisconfigurationException, match=r"Manual optimises manually.*influence_loss"):
        make_trainer(quick()).fit(module, loader(blobs()))
    assert same_weights(before, weights(module))
    trainer = make_trainer(quick())
    trainer.validate(module, loader(blobs()), verbose=False)  # nothing is asked of training_step here
    with pytest.raises(ConfigurationError, match="influence_loss"):
        trainer.influence(batch_of(blobs(), slice(4)), targets="batch", dataloader=loader(blobs()))
    assert same_weights(before, weights(module))


def test_manual_optimisation_works_with_a_loss_of_its_own_and_never_steps() -> None:
    module = TwoOptimizers()
    trainer, _, data = fitted(module, callback=quick())
    steps, before = module.steps, weights(module)
    assert trainer.influence(batch_of(data, slice(4))).scores.abs().sum() > 0
    trainer.unlearn(batch_of(data, slice(4)), dry_run=True)
    assert module.steps == steps
    assert same_weights(before, weights(module))
