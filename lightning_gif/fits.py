"""Influence over several fits: scores with error bars that show how much they depend on chance in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .attribution.report import InfluenceReport
from .errors import ConfigurationError

__all__ = ["influence_over_fits"]


def influence_over_fits(
    fit: Callable[[int], Any], query: Any, seeds: Sequence[int] = (0, 1, 2), **arguments: Any
) -> InfluenceReport:
    """Fits a network once with each seed, and averages the scores over the fits.

    Scores of one fit depend on its initial weights and on the order of its batches. The mean over fits depends less on
    them: it predicts the average effect of removing an example. Its standard errors come from the spread of the fits.

    Args:
        fit: A function that takes a seed, and returns a fitted trainer with a ``GIFCallback``. It must make a new
            model, and use the seed for the initial weights and the order of batches.
        query: The query, as for ``trainer.influence``.
        seeds: Two or more different seeds; 0, 1 and 2 by default.
        **arguments: Other arguments of ``trainer.influence``, except ``keep``.

    Returns:
        The mean report, see :meth:`InfluenceReport.mean`. Each trainer logs its own report. To log the mean, call
        ``report.log()``.

    Raises:
        GIFError: As in ``trainer.influence`` and :meth:`InfluenceReport.mean`, or if there are not two or more
            different ``seeds``, or ``keep`` is given.

    Example::

        def fit(seed):
            seed_everything(seed)
            trainer = Trainer(callbacks=[GIFCallback()], max_epochs=10)
            trainer.fit(Classifier(), datamodule=data)
            return trainer


        report = influence_over_fits(fit, batch, seeds=range(5))
    """
    seeds = list(seeds)
    if len(set(seeds)) != len(seeds) or len(seeds) < 2:
        raise ConfigurationError(f"`seeds` must be two or more different seeds, got {seeds}.")
    if arguments.get("keep") is not None:
        raise ConfigurationError("Scores of several fits can only be averaged if all are kept. Call without `keep`.")
    return InfluenceReport.mean([fit(seed).influence(query, **arguments) for seed in seeds])
