"""Start states for cards that have none: estimated once, cached, and written with their evidence."""

import json

from mapo_jax import rate
from mapo_jax.environment.scenario import load_scenarios, to_mapping


def write_cards(folder):
    cards = [to_mapping(card) for card in load_scenarios()[:3]]
    del cards[0]["start"], cards[2]["start"]
    file = folder / "cards.jsonl"
    file.write_text("".join(json.dumps(card) + "\n" for card in cards))
    return file


def arguments(server, file, output):
    judge = {"url": server.url, "model": "m"}
    return [str(file), "--output", str(output), *(f"environment.judge.{k}={v}" for k, v in judge.items())]


def test_missing_starts_are_estimated_once(serve, well_formed, tmp_path, capsys):
    server = serve(well_formed, latency=0.2)
    file, output = write_cards(tmp_path), tmp_path / "rated.jsonl"
    assert rate.main(arguments(server, file, output)) == 0
    assert server.most == 2  # at once
    rated = load_scenarios(output)
    known = load_scenarios()[:3]
    assert [card.start for card in rated] == [(2,) * 9, known[1].start, (2,) * 9]
    words = [json.loads(line) for line in output.with_suffix(".evidence.jsonl").read_text().splitlines()]
    assert [row["id"] for row in words] == [known[0].id, known[2].id] and words[0]["reasons"] == ["r"] * 9
    asked = server.count
    assert rate.main(arguments(server, file, output)) == 0
    assert server.count == asked + 1  # whether it is there; the estimates come from the cache


def test_what_fails_is_named_and_the_rest_is_kept(serve, well_formed, tmp_path, capsys):
    server = serve(well_formed)
    file, output = write_cards(tmp_path), tmp_path / "rated.jsonl"
    name = load_scenarios()[2].person.name

    def answer(request, number):
        broken = name in json.dumps(request["messages"], ensure_ascii=False)
        return "no" if broken else well_formed(request, number)

    server.answer = answer
    assert rate.main(arguments(server, file, output)) == 2
    error = capsys.readouterr().err
    assert "1 of 3 cards" in error and load_scenarios()[2].id in error and not output.exists()
