"""Several processes give the results of one, and none waits for a process that has failed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from .ddp_worker import results, through_training

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ddp")]  # these tests share the results of a few launches

WORKER = Path(__file__).with_name("ddp_worker.py")

# Solves of twenty iterations, and several solves in a row, amplify rounding, as another batch size does.
LOOSE, AMPLIFIED = 1e-2, ("by default", "unseen")


class Launched(NamedTuple):
    """The results of a launch of several processes."""

    world: int
    folder: Path
    code: int
    errors: str

    def answer(self, story: str, rank: int) -> dict[str, Any]:
        return torch.load(self.folder / f"{story} {self.world} {rank}.pt")

    def answers(self, story: str) -> list[dict[str, Any]]:
        assert self.code == 0, self.errors[-3000:]
        return [self.answer(story, rank) for rank in range(self.world)]


def launch(world: int, folder: Path, *stories: str, strategy: str = "ddp") -> Launched:
    """Runs scenarios, one after the other, in a number of processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, str(WORKER), str(world), str(folder), strategy, *stories],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        env=environment,
    )
    return Launched(world, folder, done.returncode, done.stderr)


@pytest.fixture(scope="session")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Launched]:
    """What so many processes left: one launch for all tests, in whatever order these come.

    All stories run in it, since a process takes longer to start than a story; the last one kills a process. The answer
    of a single process is computed in the process of the tests.
    """

    @cache
    def launched(world: int) -> Launched:
        folder = tmp_path_factory.mktemp("ddp")
        if world > 1:
            return launch(world, folder, "results", "failures", "unreadable", "unkept", "logged", "unreported", "death")
        torch.save(results(world, folder), folder / f"results {world} 0.pt")
        return Launched(world, folder, 0, "")

    return launched


@pytest.fixture
def one(launched: Callable[[int], Launched]) -> Launched:
    return launched(1)


@pytest.fixture
def several(request: pytest.FixtureRequest, launched: Callable[[int], Launched]) -> Launched:
    return launched(request.param)


SEVERAL = pytest.mark.parametrize("several", [2, 4], indirect=True)


@SEVERAL
def test_several_processes_give_the_results_of_one(one: Launched, several: Launched) -> None:
    [single], found = one.answers("results"), several.answers("results")
    assert single["entries"].tolist() == [1, 2, 3, 4, 2]  # one process writes them, and undoing is one too
    assert single["written"] == 2  # likewise
    for name, expected in single.items():
        share = LOOSE if any(part in name for part in AMPLIFIED) else 1e-5
        tolerance = share * float(expected.double().nan_to_num().norm()) + 1e-12
        for other in found:
            torch.testing.assert_close(
                other[name],
                expected,
                rtol=share,
                atol=tolerance,
                equal_nan=True,
                msg=f"not that of one process: {name}",
            )
            torch.testing.assert_close(
                other[name], found[0][name], rtol=0, atol=0, equal_nan=True, msg=f"other ranks: {name}"
            )


@SEVERAL
def test_a_checkpoint_of_several_processes_has_the_statistics_of_all(one: Launched, several: Launched) -> None:
    files = [run.folder / f"{run.world}.ckpt" for run in (one, several)]
    states = [torch.load(file, weights_only=True)["lightning_gif"] for file in files]
    for kind in ("outputs", "gradients", "output_counts", "gradient_counts"):
        for name, expected in states[0]["neurons"][kind].items():
            torch.testing.assert_close(states[1]["neurons"][kind][name], expected, rtol=1e-6, atol=1e-9)
    assert all(torch.equal(states[1]["targets"][name], entries) for name, entries in states[0]["targets"].items())


@SEVERAL
def test_an_error_in_one_process_stops_all_with_the_same_reason(several: Launched) -> None:
    found = several.answers("failures")
    last = found[-1]
    for name in [name for name in last if name.startswith("missing")]:
        assert last[name] == "FileNotFoundError: image 7 is missing"
        for other in found[:-1]:
            assert other[name].startswith(f"RankError (GIFError): Rank {several.world - 1} failed"), other[name]
            assert "image 7 is missing" in other[name]
    assert found[0]["interrupted"].startswith("KeyboardInterrupt")
    assert all("Rank 0" in other["interrupted"] and "KeyboardInterrupt" in other["interrupted"] for other in found[1:])
    expected = {
        "nan": ("NonFiniteError", "not finite"),
        "other batch": ("ConfigurationError", "must have the same batch"),
        "other settings": ("ConfigurationError", "must have the same arguments"),
        "other indices": ("ConfigurationError", "must have the same indices"),
        "other record": ("ConfigurationError", "must have the same record"),
        "other labels": ("ConfigurationError", "must have the same new labels"),
        "other loader": ("ConfigurationError", "must have the same batch or loader"),
        "other data": ("ConfigurationError", "must have the same training data"),
        "other weights": ("ConfigurationError", "must have the same weights"),
        "out of step": ("RankError", "out of step"),
        "no record": ("RecordError", "cannot be written"),
        "no undo": ("RecordError", "cannot be written"),
    }
    for other in found:
        for name, (kind, text) in expected.items():
            assert other[name].startswith(f"{kind} (GIFError)"), (name, other[name])
            assert text in other[name], (name, other[name])
        assert other["still edited"]
        assert other["same scores afterwards"]
        assert other["same weights afterwards"]


@SEVERAL
def test_if_one_process_cannot_gather_statistics_all_continue_training_in_sync(several: Launched) -> None:
    found = several.answers("unreadable")
    assert [one["warned"] for one in found] == [0] * (several.world - 1) + [1]
    for one in found:
        assert (one["epochs"], one["targets of"], one["gathers"]) == (3, 0, False)
        assert torch.equal(one["scores"], found[0]["scores"])


@SEVERAL
def test_if_one_process_cannot_keep_a_snapshot_none_does_and_training_continues(several: Launched) -> None:
    for one in several.answers("unkept"):
        assert (one["epochs"], one["gathers"], one["kept"], one["told"]) == (3, False, [0], 1)


@SEVERAL
def test_a_report_that_fails_in_one_process_fails_in_all_and_training_continues(several: Launched) -> None:
    answers = several.answers("unreported")
    for answer in answers:
        assert answer["FileNotFoundError epochs"] == answer["LookupError epochs"] == 2
        assert answer["FileNotFoundError reports"] == 1  # that of the second epoch
        assert answer["LookupError reports"] == 0
    (missing,), (lookup,) = answers[0]["FileNotFoundError warned"], answers[0]["LookupError warned"]
    assert "at the end of epoch 0: " in missing
    assert "image 7 is missing" in missing
    assert "none later in this fit" in lookup
    assert "no such image" in lookup


@SEVERAL
def test_a_logger_in_one_process_only_gets_the_predicted_labels(several: Launched) -> None:
    first, *others = several.answers("logged")
    assert all(other == first for other in others)
    assert len(first["predicted"]) == 4
    assert [row[0] for row in first["forgotten"]] == [4, 7, 30]
    assert all(None not in row[2:] for row in first["forgotten"])


@SEVERAL
def test_a_process_that_is_killed_is_noticed_by_all_others(several: Launched) -> None:
    for rank in range(several.world - 1):
        told = several.answer("death", rank)["dead"]
        assert told.startswith("RankError (GIFError)"), told
        assert "one has ended" in told


def test_scores_through_training_of_several_processes_are_those_of_one(tmp_path: Path) -> None:
    expected = through_training(1, tmp_path)
    launched = launch(2, tmp_path, "through training", "recorded")
    for found in launched.answers("through training"):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-11, msg=f"not that of one: {name}")
    for rank, found in enumerate(launched.answers("recorded")):
        assert found["difference"] < 1e-12
        torch.testing.assert_close(found["scores"][0, [0, 7, 30]], found["slopes"], rtol=1e-5, atol=1e-9)
        assert "the steps from 0 on of process 1 are missing" in found["missing"]
        assert found["epochs"] == 2
        assert len(found["warned"]) == rank  # the process whose disk is full
        assert "is incomplete" in found["incomplete"]
        assert "All processes must have the same folder `trajectory`" in found["other folder"]
