"""The page in a real browser: it renders, filters, sorts, links, and keeps hostile text as text."""

import csv
import json
import re
from pathlib import Path

import pytest

from mapo_jax.reporting.write import write_report

pytestmark = pytest.mark.browser


@pytest.fixture
def visit(chromium):
    """Opens a file and returns the page once its dialogues can be read; browser errors fail the test."""
    contexts, troubles = [], []

    def opened(file, fragment="", *, width=1280, height=900, scheme="light"):
        context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: troubles.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: troubles.append(f"dialog: {dialog.message}"))
        page.on("request", lambda r: None if r.url.startswith("file://") else troubles.append(r.url))
        page.goto(f"file://{file}{fragment}")
        page.wait_for_selector("html[data-ready]", timeout=60_000)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert troubles == []


@pytest.fixture(scope="module")
def report(run_folder, tmp_path_factory):
    return write_report([run_folder], tmp_path_factory.mktemp("report") / "report.html")


def returns(page):
    cells = page.locator("#list tbody tr td:nth-child(5)").all_inner_texts()
    return [float(text.replace("\u2212", "-")) for text in cells if text != "\u2013"]


def test_it_filters(report, visit):
    page = visit(report)
    assert page.inner_text("#count") == "78 of 78 dialogues"
    page.select_option("#filter-set", "1")
    assert page.inner_text("#count") == "24 of 78 dialogues"
    page.select_option("#filter-step", "6")
    assert page.inner_text("#count") == "8 of 78 dialogues"
    page.select_option("#filter-scenario", page.inner_text("#list tbody tr:first-child a"))
    assert page.inner_text("#count") == "2 of 78 dialogues"
    page.click("#filters button[type=reset]")
    page.locator("#count", has_text="78 of 78").wait_for()
    page.select_option("#filter-failure", "unscored")
    shown = page.locator("#list tbody tr").all_inner_texts()
    assert shown and all("unscored" in text for text in shown)
    page.select_option("#filter-domain", index=1)
    domain = page.input_value("#filter-domain")
    assert all(domain in text for text in page.locator("#list tbody tr").all_inner_texts())


def test_it_sorts(report, visit):
    page = visit(report)
    page.click("[data-sort=value]")
    assert returns(page) == sorted(returns(page), reverse=True)
    page.click("[data-sort=value]")
    assert returns(page) == sorted(returns(page))
    assert page.get_attribute("th:has([data-sort=value])", "aria-sort") == "ascending"


def test_words_are_found_in_all_dialogues(report, visit, run_folder):
    saved = [
        json.loads(line) for file in run_folder.glob("*/*.jsonl") for line in file.open() if '"state"' in line
    ]
    words = saved[5]["state"]["turns"][1]["reply"].rstrip(".").lower()
    having = sum(
        any(words in turn[side].lower() for turn in row["state"]["turns"] for side in ("user", "reply"))
        for row in saved
    )
    page = visit(report)
    page.fill("#filter-text", words)
    page.press("#filter-text", "Enter")
    page.locator("#count", has_text=f"{having} of 78").wait_for()
    page.locator("#reader mark").first.wait_for()
    assert {text.lower() for text in page.locator("#reader mark").all_inner_texts()} == {words}
    page.click("#filters button[type=reset]")
    page.wait_for_function("!document.querySelector('#reader mark')")


def test_every_table_can_be_taken_as_csv(run_copy, visit, tmp_path):
    """Whole, and with one value in each cell."""
    helper = {"dialogues/left_out": 0.0, "turns/mean": 5.0, "judge/failure_rate": 0.0, "kind/most": 0.5}
    helper |= {"kind/reframe": 0.5, "naming/situation": 0.875, "naming/situation_rate": 0.2}
    (run_copy / "evaluations" / "helper.json").write_text(json.dumps(helper))
    page = visit(write_report([run_copy], tmp_path / "report.html"))
    links = page.locator("a.csv")
    assert links.count() == page.locator("main table").count() > 3

    def table(link):
        with page.expect_download() as download:
            link.click()
        return list(csv.DictReader(Path(download.value.path()).read_text().splitlines(), strict=True))

    tables = list(map(table, links.all()))
    for rows in tables:
        assert all(None not in row and None not in row.values() for row in rows)  # as wide as the heading
        assert not any(re.search(r"\d \(|\d of \d|\d to \d", cell) for row in rows for cell in row.values())
    naming, kinds, *_, dialogues = tables
    situation = next(row for row in naming if row["it names the"] == "situation")
    assert situation["good helper: number"] == "7" and situation["good helper: of"] == "8"
    reframe = next(row for row in kinds if row["kind"] == "reframe")
    assert [reframe[f"good helper{part}"] for part in ("", ": number", ": of")] == ["50 %", "20", "40"]
    assert reframe["meaning"] and " " in reframe["the commonest reply"]
    assert page.locator("#list tbody tr").count() == 60 and len(dialogues) == 78
    assert {row["set"] for row in dialogues} == {"training", "validation"}
    page.select_option("#filter-set", "1")
    assert len(table(links.last)) == 24
    shown = returns(page)
    assert [round(float(row["return"]), 2) for row in table(links.last)] == pytest.approx(shown, abs=0.01)


def test_a_link_opens_a_dialogue_with_all_there_is_to_know(report, visit, run_folder):
    row = json.loads((run_folder / "dialogues" / "step_000002.jsonl").read_text().splitlines()[4])
    page = visit(report, "#d=0.t2.1.1&turn=2")
    reader = page.locator("#reader")
    turns = row["state"]["turns"]
    assert reader.locator(".turn").count() == len(turns)
    assert reader.locator(".turn .reply").all_inner_texts() == [turn["reply"] for turn in turns]
    assert "here" in page.get_attribute("[data-turn='2']", "class")
    text = reader.locator(".turn").nth(0).inner_text()
    for name in (
        "reward",
        "return",
        "turn-level advantage",
        "batch-level advantage",
        "mixed advantage",
        "director",
    ):
        assert name in text
    judged = next((turn for turn in turns if turn["judgement"] and any(turn["judgement"]["levels"])), None)
    level = next(k for k, level in enumerate(judged["judgement"]["levels"]) if level)
    assert judged["judgement"]["reasons"][level] in reader.inner_text()


def test_tokens_show_the_loss_mask_and_log_probabilities(report, visit, run_folder):
    row = json.loads((run_folder / "dialogues" / "step_000002.jsonl").read_text().splitlines()[0])
    page = visit(report, "#d=0.t2.0.0")
    page.click("#tokens")
    page.wait_for_selector(".tokens")
    scored = {t for t, turn in enumerate(row["state"]["turns"]) if turn["judgement"]}
    in_loss = [
        logprob
        for sampled, turn, logprob in zip(
            *(row["row"][k] for k in ("sampled", "turn", "logprob")), strict=True
        )
        if sampled and turn in scored
    ]
    shown = [float(t.replace("\u2212", "-")) for t in page.locator(".tokens .in small").all_inner_texts()]
    assert shown == pytest.approx(in_loss, abs=0.0051)


def test_before_and_after_stand_side_by_side(report, visit):
    page = visit(report, "#d=0.v6.2.1")
    page.click("#twin")
    page.wait_for_selector(".columns.two")
    tags = page.locator("#reader .dialogue .meta:first-of-type .tag").all_inner_texts()
    assert tags == ["before", "after"]
    assert page.evaluate("location.hash") == "#d=0.v6.2.1&with=0.v0.2.1"
    titles = page.locator("#reader .dialogue h3").all_inner_texts()
    assert titles[0] == titles[1]
    page.click(".back")
    assert page.evaluate("location.hash") == "#dialogues"


def test_it_works_by_keyboard_alone(report, visit):
    page = visit(report)
    page.focus("[data-chart=hero] .plot")
    page.keyboard.press("End")
    assert "step 6" in page.inner_text("#tip")
    page.keyboard.press("ArrowLeft")
    assert re.search(r"step 5\b", page.inner_text("#tip"))
    page.keyboard.press("Escape")
    assert page.is_hidden("#tip")
    page.focus("#list tbody tr:nth-child(3) a")
    page.keyboard.press("Enter")
    page.locator("#reader:focus").wait_for()
    first = page.evaluate("location.hash")
    page.keyboard.press("j")
    assert page.evaluate("location.hash") not in ("", first)
    focusable = page.evaluate(
        "[...document.querySelectorAll('button, select, input')]"
        ".every(e => e.labels?.length || e.textContent.trim() || e.ariaLabel)"
    )
    assert focusable  # every control has a name


def test_hovering_shows_values(report, visit):
    page = visit(report)
    page.hover("[data-chart=hero] .plot", position={"x": 200, "y": 100})
    assert "training" in page.inner_text("#tip")
    page.mouse.move(2, 2)
    assert page.is_hidden("#tip")


def test_the_slider_goes_through_the_steps(report, visit):
    page = visit(report)
    page.fill("[data-steps] input", "0")
    assert page.inner_text("[data-steps] output") == "1"
    assert page.locator("[data-repeats='0'] tbody tr").count() > 0


@pytest.mark.parametrize("fragment", ["", "#d=0.v6.2.1&with=0.v0.2.1"])
def test_nothing_sticks_out_sideways(report, visit, fragment):
    page = visit(report, fragment, width=390, height=844)
    for width in (390, 768, 1280):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_theme_can_be_chosen(report, visit):
    page = visit(report, scheme="light")
    page.click("#theme")
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 21, 26)"


def test_hostile_text_in_every_field_stays_text(run_copy, poison, visit, tmp_path):
    poison(run_copy)
    file = write_report([run_copy], tmp_path / "report.html")
    page = visit(file, "#d=0.t2.1.1&with=0.t1.1.1")
    assert "evil.example" in page.inner_text("#reader")
    page = visit(file, "#d=0.t2.1.1")
    page.click("#tokens")
    page.fill("[data-steps] input", "0")
    page.hover("[data-chart=hero] .plot")
    assert page.locator("img, iframe").count() == 0  # `visit` also fails on any alert, error or request


def test_two_runs_beside_each_other(run_folder, run_copy, visit, tmp_path):
    file = write_report([run_folder, run_copy], tmp_path / "report.html")
    page = visit(file)
    assert page.locator("#learnt .study:visible").count() == 1
    page.select_option("#run", "1")
    assert page.locator("#learnt .study[data-run='1']").is_visible()
    page.select_option("#filter-run", "1")
    assert page.inner_text("#count") == "78 of 156 dialogues"


# The contrast of every visible text with what lies behind it, as painted: WCAG 2.2's ratio.
CONTRASTS = r"""() => {
  const parse = (text) => {
    const numbers = text.match(/[\d.]+/g).map(Number);
    const scale = text.startsWith("color(srgb") ? 255 : 1;
    return [...numbers.slice(0, 3).map((x) => x * scale), numbers[3] ?? 1];
  };
  const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
  const luminance = (colour) => {
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = colour.map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((under, layer) => over(layer, under), [255, 255, 255, 1]);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    if (!text || element.closest("script, style, option, noscript")) continue;
    if (!element.checkVisibility({ checkOpacity: true })) continue;
    const style = getComputedStyle(element);
    const under = ground(element);
    const ink = over(parse(element.closest("svg") ? style.fill : style.color), under);
    const [light, dark] = [luminance(ink), luminance(under)].sort((a, b) => b - a);
    found.push([(light + 0.05) / (dark + 0.05), `${element.className}: ${text.slice(0, 40)}`]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_on_the_page_stands_out_from_what_is_behind_it(report, visit, scheme):
    page = visit(report, "#d=0.t2.1.1", scheme=scheme)
    page.click("#tokens")
    page.wait_for_selector(".tokens")
    page.evaluate("document.querySelectorAll('details').forEach((details) => (details.open = true))")
    found = page.evaluate(CONTRASTS)
    assert len(found) > 500
    assert [entry for entry in found if entry[0] < 4.5] == []
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) > 384) == (scheme == "light")
    page.add_style_tag(content=":root { --soft: light-dark(#999, #666) !important; }")
    assert any(ratio < 4.5 for ratio, _ in page.evaluate(CONTRASTS))  # it can tell


def test_on_paper_the_dialogues_are_only_those_that_are_open(report, visit):
    page = visit(report)
    page.emulate_media(media="print")
    assert page.is_hidden("#dialogues") and page.is_visible("#learnt")
    page = visit(report, "#d=0.v6.2.1&with=0.v0.2.1")
    page.emulate_media(media="print")
    assert page.is_visible("#reader .columns.two") and page.is_hidden("#list")


def test_tables_are_whole_on_paper_and_break_no_word_on_a_phone(report, visit):
    cut = "all => all.filter(t => t.offsetParent && t.scrollWidth > t.clientWidth + 1).map(t => t.innerText)"
    narrow = "all => all.filter(t => t.offsetParent && t.clientWidth < 90).map(t => t.innerText)"
    page = visit(report, width=703)  # A4 within the margins
    page.emulate_media(media="print")
    assert page.locator(".scroll").evaluate_all(cut) == []
    page = visit(report, width=390)
    heads = page.locator(".kinds tbody th:has(small)")
    assert heads.count() > 3 and heads.evaluate_all(narrow) == []


def test_dialogues_are_found_by_what_failed_in_them(report, visit, run_folder):
    saved = [
        json.loads(line) for file in run_folder.glob("*/*.jsonl") for line in file.open() if '"state"' in line
    ]
    kinds = {
        turn["failure"].split(":")[0] for row in saved for turn in row["state"]["turns"] if turn["failure"]
    }
    kind = min(kinds)
    having = sum(
        any((turn["failure"] or "").split(":")[0] == kind for turn in row["state"]["turns"]) for row in saved
    )
    page = visit(report)
    page.select_option("#filter-failure", f"is:{kind}")
    assert page.inner_text("#count") == f"{having} of 78 dialogues"
