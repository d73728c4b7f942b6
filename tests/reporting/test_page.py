"""Reports as HTML, in notebooks and as pages that need nothing else."""

from __future__ import annotations

import base64
import importlib.util
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from lightning_gif import InfluenceReport, UnlearnReport
from lightning_gif.attribution.validation import ValidationReport
from lightning_gif.reporting.contents import Table
from lightning_gif.reporting.page import Page
from lightning_gif.reporting.previews import Shown

from ..conftest import batch_of, fitted
from ..reports import answer_on_images, image_net, images, report_of

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Read(HTMLParser):
    """All tags with their attributes, all texts, and whether each tag that was opened is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.opened: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.opened.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def read(page: str) -> Read:
    """The page, after a check that it loads nothing, runs no script and is well-formed."""
    found = Read(page)
    assert not found.opened
    assert not {tag for tag, _ in found.tags} & {"script", "link", "iframe", "object", "embed"}
    for _, attributes in found.tags:
        assert not any(name.startswith("on") or name == "href" for name in attributes)
        assert (attributes.get("src") or "data:image/png;base64,").startswith("data:image/png;base64,")
    assert "url(" not in page
    assert "@import" not in page
    return found


def pictures(found: Read) -> list[bytes]:
    sources = [attributes["src"] for tag, attributes in found.tags if tag == "img"]
    return [base64.b64decode(str(source).partition(",")[2]) for source in sources]


def test_a_notebook_shows_an_influence_report_with_its_picture_and_tables() -> None:
    report, _ = answer_on_images()
    found = read(report._repr_html_())
    (picture,) = pictures(found)
    assert picture.startswith(b"\x89PNG")
    assert {"Influence report", "Proponents", "Opponents", "Sum of scores by class"} <= set(found.texts)
    for end in (report.proponents(), report.opponents()):
        for index, score in zip(end.indices[0].tolist(), end.scores[0].tolist(), strict=True):
            assert {str(index), f"{score:+.2g}"} <= set(found.texts)
    assert str(report) in found.texts


@pytest.mark.slow
def test_the_page_of_several_queries_has_a_picture_of_each(tmp_path: Path) -> None:
    trainer, _, dataset = fitted(image_net(), images())
    report = trainer.influence(batch_of(dataset, [4, 5, 6]), per_example=True, k=2)
    assert len(pictures(read(report._repr_html_()))) == 1
    report.to_html(tmp_path / "new" / "report.html")
    page = (tmp_path / "new" / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    found = read(page)
    assert len(pictures(found)) == 3
    assert "Proponents of query 2" in found.texts
    report.save(tmp_path / "report")
    InfluenceReport.load(tmp_path / "report").to_html(tmp_path / "loaded.html")
    assert len(pictures(read((tmp_path / "loaded.html").read_text()))) == 3


def test_texts_are_shown_as_they_are_and_run_nothing() -> None:
    strange = Shown("<b>", None, "<script>alert('&')</script> $x$")
    report = report_of([[0.1, 0.2]], queries=[strange], examples={100: strange, 101: strange})
    found = read(report._repr_html_())
    assert {"<b>", "<script>alert('&')</script> $x$"} <= set(found.texts)


def test_the_page_of_an_edit_has_its_verdict_losses_notes_and_pictures(tmp_path: Path) -> None:
    trainer, *_ = fitted(image_net(), images(), max_epochs=10)
    report = trainer.unlearn(lambda batch: batch[1] == 1)
    found = read(report._repr_html_())
    assert {"Unlearning report", report.verdict, *report.notes} <= set(found.texts)
    assert {f"{report.forget.before:.4g}", f"{report.retain.after:.4g}"} <= set(found.texts)
    assert len(pictures(found)) == 1
    report.save(tmp_path / "edit")
    UnlearnReport.load(tmp_path / "edit").to_html(tmp_path / "edit.html")
    assert len(pictures(read((tmp_path / "edit.html").read_text()))) == 3


def test_groups_and_checks_are_shown_as_html() -> None:
    trainer, _, dataset = fitted()
    groups = trainer.influence(batch_of(dataset, [0])).by_group()
    found = read(groups._repr_html_())
    assert {f"{total:+.3g}" for total in groups.totals.tolist()} <= set(found.texts)
    check = trainer.influence.check()
    assert str(check) in read(check._repr_html_()).texts


def test_a_validation_is_shown_with_its_verdict_and_the_correlation_of_each_query() -> None:
    predicted = torch.randn(6, 30, dtype=torch.float64)
    report = ValidationReport(
        predicted=predicted,
        losses=(predicted + torch.randn(6, 30, dtype=torch.float64))[:, None],
        present=torch.zeros(30, dtype=torch.float64),
        removed=torch.ones(6, 10, dtype=torch.bool),
        indices=torch.arange(10),
        share=0.5,
        n_trained=6,
        seconds=1.0,
        settings={},
    )
    assert report.verdict in read(report._repr_html_()).texts
    for whole, count in ((False, 20), (True, 30)):
        (table,) = report.page(whole=whole).tables.values()
        assert [row[1] for row in table.rows] == [f"{value:+.2f}" for value in report.correlations[:count].tolist()]


def test_without_matplotlib_a_page_says_how_to_get_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    report, _ = answer_on_images()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = read(report._repr_html_())
    assert not pictures(found)
    assert "pip install matplotlib" in found.texts
    assert str(int(report.proponents().indices[0, 0])) in found.texts


def test_numbers_are_aligned_and_missing_values_are_empty() -> None:
    table = Table(["a", "b", "c"], [[1, "x", 0.5], [None, "2", None], ["+0.1 ± 0.2?", None, 1 / 3]])
    page = Page("t", tables={"": table}).document()
    assert page.count('<td class="number">') == 6
    assert "None" not in page
    assert ">0.3333<" in page


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"there is no browser: {', '.join(BROWSERS)}")
    return found


def test_a_browser_shows_a_page_with_its_picture(browser: str, tmp_path: Path) -> None:
    report, _ = answer_on_images()
    page, screenshot = tmp_path / "report.html", tmp_path / "shot.png"
    report.to_html(page)
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    size = ["--window-size=1200,1400", f"--screenshot={screenshot}"]
    for more in (["--dump-dom"], size):
        command = [browser, *options, *more, page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        if more == ["--dump-dom"]:
            read_by_it = Read(done.stdout)
            assert {"Influence report", "Proponents"} <= set(read_by_it.texts)
            assert len(pictures(read_by_it)) == 1
    from matplotlib.image import imread

    seen = torch.tensor(imread(screenshot))[..., :3]
    blue = torch.tensor([0x21, 0x66, 0xAC]) / 255
    assert int(((seen - blue).abs().amax(-1) < 0.02).sum()) > 1000  # the bars of the picture
    assert float((seen.amin(-1) > 0.98).float().mean()) > 0.3  # on white
