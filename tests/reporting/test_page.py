import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources

import pytest

from mapo_jax.reporting.charts import format_value, signed
from mapo_jax.reporting.curves import curve_groups
from mapo_jax.reporting.folder import read_run
from mapo_jax.reporting.page import render
from mapo_jax.reporting.study import Study
from mapo_jax.reporting.summary import against_first, comparison_sentences, settings_that_differ
from mapo_jax.validation import verdict


class Elements(HTMLParser):
    """Tags and attributes, as a parser sees them."""

    def __init__(self, html):
        super().__init__()
        self.tags = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


@pytest.fixture(scope="module")
def page(run_folder):
    return render([read_run(run_folder, dialogues=1000)])


def test_nothing_is_loaded_from_anywhere(page):
    for tag, attributes in Elements(page).tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img")
        assert "src" not in attributes and "srcset" not in attributes
        href = attributes.get("href") or "#"
        assert href.startswith("#"), href
    assert "default-src 'none'" in page
    assert "url(" not in page and "@import" not in page


def test_only_the_one_script_may_run(page):
    script = page.rsplit("<script>", 1)[1].rsplit("</script>", 1)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert not any(name.startswith("on") for _, attributes in Elements(page).tags for name in attributes)


def test_hostile_text_adds_no_element(poison, run_copy, page):
    poison(run_copy)
    html = render([read_run(run_copy, dialogues=1000)])
    html.encode("utf-8")  # the lone surrogate is gone
    tags = [tag for tag, _ in Elements(html).tags]
    assert tags.count("script") == [tag for tag, _ in Elements(page).tags].count("script")
    assert "img" not in tags
    assert "evil.example" in html  # it is there, as text


def test_the_summary_says_what_happened(page, run_folder):
    run = read_run(run_folder, dialogues=1000)
    study = Study.of(0, run)
    word, sentence, _ = study.verdict
    assert word == "It got better" and word in page
    change = study.changes["return/mean"]
    # The same mean over dialogues as the trainer's own, as every card has equally many.
    assert change.before == pytest.approx(run.evaluations[0]["return/mean"], abs=1e-4)
    assert change.after == pytest.approx(run.evaluations[6]["return/mean"], abs=1e-4)
    assert study.changes["epm_q"].after == pytest.approx(run.evaluations[6]["epm_q"], abs=1e-4)
    assert signed(change.change) in sentence and "4 cards" in sentence


def test_how_far_it_came_is_said_only_of_a_run_that_got_better(run_copy):
    helper = run_copy / "evaluations" / "helper.json"
    helper.write_text(json.dumps({"return/mean": 9.0, "reward/mean": 3.0, "epm_q": 90.0}))

    def said():
        run = read_run(run_copy, dialogues=1000)
        return verdict(Study.of(0, run)), render([run])

    sentence, page = said()
    assert re.match(r"It got better, \d+% of the way to the good helper\. On 4 cards", sentence)
    assert "of the way to the good helper (9" in page
    for kind in ("json", "jsonl"):  # before and after change places
        first, last, aside = (
            run_copy / "evaluations" / f"{name}.{kind}" for name in ("step_000000", "step_000006", "aside")
        )
        first.rename(aside), last.rename(first), aside.rename(last)
    sentence, page = said()
    assert sentence.startswith("It got worse. On 4 cards")
    assert "farther from the good helper than before (9" in page


@pytest.mark.parametrize("gone", ["config.yaml", "metrics.jsonl", "dialogues", "evaluations", "model"])
def test_a_part_that_is_missing_leaves_the_rest(run_copy, gone):
    (run_copy / gone).rename(run_copy / "elsewhere")
    html = render([read_run(run_copy, dialogues=1000)])
    assert "What is missing" in html or gone == "model"
    assert html.count("<section") == 7


def test_a_run_that_has_only_begun(run_copy):
    for name in ("dialogues", "evaluations", "metrics.jsonl"):
        (run_copy / name).rename(run_copy / f"elsewhere-{name}")
    html = render([read_run(run_copy, dialogues=1000)])
    assert "Not known yet" in html and "0 of 6 steps" in html


def test_charts_of_several_runs_have_one_scale(run_folder, run_copy):
    short = read_run(run_copy, dialogues=10)
    batch = short.validation[-1]
    short = replace(short, validation=(replace(batch, dialogues=batch.dialogues[:1]),))
    html = render([read_run(run_folder, dialogues=1000), short])
    data = json.loads(re.search(r'id="data">(.*?)</script>', html)[1])["charts"]
    for name in ("distance", "distinct", "repeats"):
        one, other = (data[f"{name}-{number}"]["domain"][2:] for number in (0, 1))
        assert one == other, name


def test_the_best_checkpoint_and_the_origin_are_named(run_copy):
    row = {
        "command": "python -m mapo_jax.train a=<b>",
        "devices": "8 x TPU",
        "versions": {"jax": "9.9"},
        "commit": "c0ffee",
    }
    (run_copy / "starts.jsonl").write_text(json.dumps(row) + "\n")
    run = read_run(run_copy, dialogues=10)
    better = {step: dict(figures) for step, figures in run.evaluations.items()}
    better[3]["return/mean"] = 99.0
    html = render([replace(run, evaluations=better)])
    assert "Validation was best after step 3" in html and "--step best" in html
    assert "a=&lt;b&gt;; on 8 x TPU; jax 9.9; commit c0ffee" in html
    assert "Validation was best" not in render([run])


def test_runs_beside_each_other(run_folder, run_copy):
    html = render([read_run(folder, dialogues=1000) for folder in (run_folder, run_copy)])
    assert "comparison of 2 runs" in html
    # A copy differs from its original by nothing.
    assert re.search(r"≈</span>\s*0</span>\s*<small>\(0 to 0\)", html)


def test_runs_are_compared_in_a_sentence_and_by_their_settings(run_folder, run_copy):
    config = run_copy / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("turn_weight: 0.3333333333333333", "turn_weight: 0.7"))
    assert config.read_text() != text
    studies = [Study.of(i, read_run(f, dialogues=1000)) for i, f in enumerate((run_folder, run_copy))]
    differing = settings_that_differ(studies)
    assert differing == [("algorithm.turn_weight", ["0.3333333333333333", "0.7"])]
    (sentence,) = comparison_sentences(against_first(studies))
    assert sentence.startswith("broken and small end alike within the noise: 0 in the return")


def test_known_metrics_have_a_curve_of_their_own_and_absent_ones_none(run_folder):
    run = read_run(run_folder, dialogues=1000)
    more = {"perf/mfu": 0.4, "own/metric": 1.0, "timing_s/unix": 1.8e9}
    with_more = replace(run, steps=tuple({**row, **more} for row in run.steps))
    for given, shown in ((run, False), (with_more, True)):
        groups = curve_groups([Study.of(0, given)])
        named = {chart.title for _, group, folded in groups if not folded for chart in group if chart.series}
        assert ("Model FLOP utilisation" in named) == shown
        assert "own/metric" not in named and "Entropy" in named
        others = {chart.title for _, group, folded in groups if folded for chart in group}
        assert ("own/metric" in others) == shown and not others & {"step", "timing_s/unix"}


def test_a_figure_of_training_never_stands_for_one_of_validation(page, run_folder):
    run = read_run(run_folder, dialogues=1000)
    captions = re.findall(r'<figcaption><b>(.*?)</b><span class="now">(.*?)</span>', page)
    both = [now for title, now in captions if title in ("Return of a dialogue", "Reward of a turn", "EPM-Q")]
    assert len(both) == 4 and all(now.startswith("training ") for now in both)
    assert f"training {format_value(run.steps[0]['return/mean'])} → " in both[0]
    assert 'validation dialogues, before and after training</p>\n    <ul class="tiles">' in page


@pytest.mark.parametrize(
    ("change", "state", "said"),
    [
        ({}, "look", "To look at: judge."),
        (
            {"judge/failure_rate": 0.0, "dialogues/left_out": 0.0},
            "fine",
            "Nothing looks suspicious in 9 checks.",
        ),
        ({"actor/skipped": 1.0}, "alarm", "To look at: gradients, judge."),
    ],
)
def test_the_first_lines_say_whether_anything_is_suspicious(run_folder, change, state, said):
    run = read_run(run_folder, dialogues=1000)
    study = Study.of(0, replace(run, steps=tuple({**row, **change} for row in run.steps)))
    assert study.suspicion == (said, state)


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    """Ratio of WCAG 2.2."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(theme):
    style = (resources.files("mapo_jax.reporting") / "assets" / "style.css").read_text()
    colours = {
        name: (light, dark)[theme]
        for name, light, dark in re.findall(
            r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)",
            style.replace("#fff)", "#ffffff)").replace("(#fff,", "(#ffffff,"),
        )
    }
    assert len(colours) > 20
    for text in ("ink", "soft", "accent", "before", "after", "good", "bad", "warn"):
        for ground in ("ground", "panel", "sunk"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for text, ground in (
        ("warn", "warn-ground"),
        ("bad", "alarm-ground"),
        ("accent", "fine-ground"),
        ("soft", "unknown-ground"),
        ("on-strong", "bad"),
        ("on-strong", "good"),
    ):
        assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for number in range(1, 9):
        assert contrast(colours[f"series-{number}"], colours["panel"]) >= 3, number
