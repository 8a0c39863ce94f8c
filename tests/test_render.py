"""The report: self-contained, escaped, the same numbers in all three forms."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from transformer_lens import HookedTransformer

import analyses
from analyses import contract, render
from mechgrok import plotting
from mechgrok.reproducible import made_with
from mechgrok.types import Stage, Study


@pytest.fixture(scope="module", params=["tiny_run", "language_run"])
def a_run(request: pytest.FixtureRequest) -> tuple:
    """A study of modular addition, and one of language."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def reports(a_run: tuple) -> list:
    """Every analysis that applies to the study."""
    study = a_run[1]
    applicable = [name for name in analyses.REGISTRY if study.task.name in contract.load(name).TASKS]
    return [analyses.run(name, study) for name in applicable]


class Page(HTMLParser):
    """Collects addresses, the text, and whether tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses, self.text, self.open_tags, self.images = [], [], [], 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.images += tag == "img"
        self.addresses += [value for key, value in attrs if key in ("src", "href")]
        if tag not in ("img", "meta", "br", "link"):
            self.open_tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open_tags and self.open_tags[-1] not in ("script", "style"):
            self.text.append(data)


def page_of(study: Study, reports: list) -> Page:
    page = Page()
    page.feed(render.to_html(study, reports))
    page.close()
    return page


def test_the_page_needs_no_network_and_closes_every_tag(a_run: tuple, reports: list) -> None:
    page = page_of(a_run[1], reports)
    assert page.open_tags == []
    assert page.images >= 6
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    text = render.to_html(a_run[1], reports)
    assert text.count("</script>") == 2  # the bundle once, and the call
    outside_bundle = re.sub(r"<script>.*?</script>", "", text, flags=re.S)
    assert not re.search(r"https?://(?!www\.w3\.org)", outside_bundle)


def test_what_the_page_shows_is_escaped(a_run: tuple, reports: list) -> None:
    evil = '<script>alert("x")</script>'
    study: Study = a_run[1]
    labels = tuple(evil for _ in study.split.labels)
    claims = tuple(replace(claim, text=evil) for claim in reports[0].claims)
    spoiled = replace(
        study, split=replace(study.split, labels=labels), config=study.config.model_copy(update={"name": evil})
    )
    text = render.to_html(spoiled, [replace(reports[0], claims=claims), *reports[1:]])
    assert evil not in text
    assert "&lt;script&gt;alert" in text
    page = page_of(spoiled, [replace(reports[0], claims=claims)])
    assert page.open_tags == []
    assert text.count("</script>") == 2


def test_the_three_forms_bear_the_same_claims(a_run: tuple, reports: list) -> None:
    study = a_run[1]
    data = json.loads(json.dumps(render.to_json(study, reports), allow_nan=False))
    markdown, page = render.to_markdown(study, reports), " ".join(page_of(study, reports).text)
    for report in reports:
        for claim, stored in zip(report.claims, data["reports"][report.analysis]["claims"], strict=True):
            assert stored["holds"] == claim.holds
            assert stored["value"] == (claim.value if math.isfinite(claim.value) else None)
            assert f"| {claim.text} |" in markdown
            assert claim.text in page
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    starts = [i for i, line in enumerate(rows) if set(line) <= set("| -")]  # the line below a table's titles
    for begin, end in zip(starts, [*starts[1:], len(rows) + 1], strict=True):
        assert len({row.replace("\\|", "").count("|") for row in rows[begin - 1 : end - 1]}) == 1
    assert len(starts) > len(reports)
    assert data["curves"]["main"]["llc"][0] == study.curve.llc[0].tolist()
    assert data["config"]["llc"]["sampling"]["nbeta"] == study.config.llc.sampling.nbeta
    assert data["provenance"]["torch"] and data["provenance"]["seed"] == "0"


def test_versions_that_made_the_numbers_are_told_from_those_that_made_the_report(a_run: tuple) -> None:
    study = a_run[1]
    now = made_with()
    assert set(study.made_with) == {"training", "sampling"} and all(each == [now] for each in study.made_with.values())
    assert render.provenance(study).items() >= now.items()
    before = {"training": [now | {"torch": "1.0"}], "sampling": [now | {"torch": "1.0"}, now]}
    found = render.provenance(replace(study, made_with=before))
    assert found["torch"] == f"1.0 (training, sampling); {now['torch']} (sampling, report)"
    assert found["numpy"] == now["numpy"]


def test_rendering_twice_gives_the_same_page(a_run: tuple, reports: list) -> None:
    assert render.to_html(a_run[1], reports) == render.to_html(a_run[1], reports)


def test_a_run_without_stages_says_so(a_run: tuple, reports: list) -> None:
    study = replace(a_run[1], stages=())
    assert "No stage was found" in render.to_html(study, reports)


def test_pictures_span_what_is_drawn_and_shade_what_stages_cover() -> None:
    _, (ax,) = plotting.panels(1)
    ax.plot([0, 10, 100, 3000], [1.0, 2.0, 3.0, 4.0])
    plotting.developmental_axis(ax, [Stage("S1", "rising", 10.0, 100.0, None, None, 1.0, None)], "LLC")
    assert ax.get_xlim() == (0, 3000)
    (band,) = ax.patches
    assert (band.get_x(), band.get_x() + band.get_width()) == (10, 100)
    _, (empty,) = plotting.panels(1)
    plotting.developmental_axis(empty, [], "LLC")
    assert empty.get_xlim() == (0, 1)


@pytest.mark.parametrize(("direction", "hidden"), [("causal", True), ("bidirectional", False)])
def test_attention_to_later_positions_is_shown_where_there_is_any(a_run: tuple, direction: str, hidden: bool) -> None:
    study: Study = a_run[1]

    def load(step: int) -> HookedTransformer:
        model = study.trajectory.model_at(step)
        model.cfg.attention_dir = direction
        return model

    shown = render._attention(replace(study, trajectory=replace(study.trajectory, load=load)))
    assert json.loads(shown["props"])["maskUpperTri"] is hidden
