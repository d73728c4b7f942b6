"""The statistics that selectors use, computed on given examples."""

from __future__ import annotations

from ..data.examples import Examples
from ..selection import GradientStatistics, NeuronStatistics
from ..storage.interrupts import uninterrupted
from .autograd import gradient_of
from .losses import LossFunction

__all__ = ["observe"]


def observe(loss: LossFunction, examples: Examples) -> tuple[NeuronStatistics, GradientStatistics]:
    """The statistics of neurons and parameters on the examples, by one forward and backward pass over them.

    They are those that training on the examples would gather, but in evaluation mode and at constant parameters.
    """
    shadow, processes = loss.shadow, examples.processes
    neurons, gradients = NeuronStatistics(), GradientStatistics()
    try:
        with uninterrupted():
            neurons.attach(shadow.module)
        for batch in examples.strided_batches():
            theta = shadow.theta.detach().requires_grad_()
            batch = loss.whole(batch)
            neurons.record(batch.classes, batch.size)
            gradient = gradient_of(loss.evaluate(theta, batch).mean(), theta)
            gradients.add(shadow.space.unflatten(gradient).items())
    finally:
        with uninterrupted():
            neurons.detach()
    neurons.sum_over(processes)
    gradients.sum_over(processes)
    return neurons, gradients
