"""Evaluates a policy: EMPA, EmoBench, EQ-Bench, and real conversations judged turn by turn.

    python -m mapo_jax.evaluate empa                            --model FOLDER|RUN | --trajectories FILE.jsonl
    python -m mapo_jax.evaluate emobench  --items FILE.jsonl    --model FOLDER|RUN | --answers FILE.jsonl
    python -m mapo_jax.evaluate eqbench   --questions FILE.json --model FOLDER|RUN | --answers FILE.json
                                          [--parsing benchmark|strict]
    python -m mapo_jax.evaluate dialogues --transcripts FILE.jsonl

`--endpoint URL` instead of `--model` calls an OpenAI-compatible server. Answers and dialogues are saved
before they are scored. So the same command continues an evaluation that was stopped, and saved answers can be
scored again without any model.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console, Group

from mapo_jax.commands import Stopped, command_parser, prepare_jax, printable, run_command, show
from mapo_jax.config import ENGINE, HELD_OUT, ROLES, Config, held_out, load_config, updated
from mapo_jax.environment.card_schema import SPLITS
from mapo_jax.environment.live.guard import WorldFailing
from mapo_jax.environment.roles import limits_of
from mapo_jax.environment.scenario import Scenario, load_scenarios
from mapo_jax.errors import UserError
from mapo_jax.evaluation import conversations, tables, transcripts
from mapo_jax.evaluation import judged_page as page
from mapo_jax.evaluation.answers import ANSWERS, Folder, Prompt, ask, fingerprint
from mapo_jax.evaluation.items import HOMES, find_items
from mapo_jax.evaluation.subject import (
    TRUST,
    Subject,
    add_options,
    check_numbers,
    find_subject,
    refuse_idle_options,
)
from mapo_jax.files import encodable, write_whole
from mapo_jax.idle import refuse_unread, show_unread
from mapo_jax.model.sharding import make_mesh
from mapo_jax.running.stop import Interrupted, StopRequest
from mapo_jax.scores import emobench, empa, eqbench
from mapo_jax.world import open_judge, open_world

T = TypeVar("T")

# Maximum tokens of an answer. Four ratings take about 40; with a critique and a revision, several hundred.
EQBENCH_TOKENS, EQBENCH_REVISION_TOKENS = 128, 1024
EMOBENCH_TOKENS = 128

SCORES, PAGE = "scores.json", "report.html"
_NO_ANSWER = "empty, or reasoning alone: raise --max-tokens, or switch its reasoning off"

# EMPA's own limits, unless a configuration sets others; replies and rows as in the published recipe.
BENCHMARK_DIALOGUES = (
    "rollout.min_turns=12",
    "rollout.max_turns=45",
    "rollout.max_reply_tokens=512",
    "rollout.max_tokens=25000",
    "evaluation.rollouts=1",
    "evaluation.temperature=1.0",
)


def run_eqbench(options: argparse.Namespace, console: Console) -> None:
    """EQ-Bench v2: gets answers, or scores saved ones."""
    questions = eqbench.read_questions(find_items(options.questions, partial(show, console)))
    revision = options.revision
    prompts = []
    if options.answers is None:  # saved answers are scored even if a prompt cannot be built
        prompts = [Prompt(one.id, one.prompt(revision), {"id": one.id}) for one in questions]
    settings = {"benchmark": "eqbench", "revision": revision, "questions": _fingerprint(prompts)}
    settings |= {"temperature": 0.0, "max_tokens": EQBENCH_REVISION_TOKENS if revision else EQBENCH_TOKENS}
    file, folder = _answers(options, console, prompts, settings)
    answers = eqbench.read_answers(file)
    if options.answers is not None:
        revision = revision or None  # None: read from the answers
    scores = eqbench.score_answers(
        questions, answers, revision=revision, parsing=options.parsing, seed=options.seed
    )
    console.print(Group(*tables.eqbench_tables(scores)))
    if scores["answered"] < scores["questions"]:
        show(console, f"only {scores['answered']} of {scores['questions']} questions have an answer")
    _write(options, console, folder, scores, answers=len(answers))


def run_emobench(options: argparse.Namespace, console: Console) -> None:
    """EmoBench: gets answers, or scores saved ones."""
    items = emobench.read_items([find_items(source, partial(show, console)) for source in options.items])
    protocol = emobench.PROTOCOLS[options.protocol]
    prompts = [_emobench_prompt(asking) for asking in emobench.askings(items, protocol)]
    settings = {"benchmark": "emobench", "protocol": options.protocol, "items": _fingerprint(prompts)}
    settings |= {"temperature": protocol.temperature, "max_tokens": EMOBENCH_TOKENS}
    file, folder = _answers(options, console, prompts, settings)
    answers = emobench.read_answers(file, items)
    scores = emobench.score_answers(items, answers, seed=options.seed)
    console.print(Group(*tables.emobench_tables(scores)))
    _write(options, console, folder, scores, answers=len(answers))


def _emobench_prompt(asking: emobench.Asking) -> Prompt:
    name = {field: getattr(asking.item, field) for field in ("task", "qid", "language")}
    return Prompt(asking.id, asking.prompt(), name | {"order": asking.order, "sample": asking.sample})


def _fingerprint(prompts: Sequence[Prompt]) -> str:
    return fingerprint([prompt.id, prompt.text] for prompt in prompts)


def _answers(
    options: argparse.Namespace, console: Console, prompts: Sequence[Prompt], settings: dict[str, Any]
) -> tuple[Path | str, Folder | None]:
    """The file with the answers, and the folder of this evaluation; none for saved answers.

    `settings` has the benchmark's own `temperature` and `max_tokens`; options take their place.
    """
    if options.answers is not None:
        return options.answers, None
    subject = find_subject(options)
    given = {"temperature": options.temperature, "max_tokens": options.max_tokens}
    sampling = {name: settings[name] if value is None else value for name, value in given.items()}
    folder = Folder(options.output or subject.output(settings["benchmark"]), ANSWERS)
    prompt = subject.config.rollout.system_prompt
    settings = {**subject.identity, **settings, **sampling, "seed": options.seed, "system_prompt": prompt}
    prepare_jax(subject.config.run.compilation_cache)
    with stoppable(folder) as check:
        ask(lambda: subject.answerer(options, console, **sampling), prompts, folder, settings, console, check)
    return folder.file, folder


def run_empa(options: argparse.Namespace, console: Console) -> None:
    """EMPA's indices and EPM-Q: holds the dialogues, or scores saved levels."""
    folder, notes = None, []
    if options.trajectories is not None:
        cases = empa.read_cases(options.trajectories)
    else:
        folder, expected, unanswered = _converse(options, console)
        rows = conversations.saved_rows(folder)
        why = [f"in {unanswered} the model gave no answer ({_NO_ANSWER})"] if unanswered else []
        broken = expected - len(rows)
        if broken > unanswered:
            why.append("the user or the director failed")
        reasons = " and in others ".join(why)
        if not rows:
            raise UserError(f"no dialogue ended in {folder.path} as {reasons}; the same command tries again")
        if broken:
            notes.append(
                f"{broken} of {expected} dialogues broke off, as {reasons}; the same command tries them again"
            )
        if short := sum(row["rule"] == "max_tokens" for row in rows):
            notes.append(f"{short} of {len(rows)} dialogues ended as no further reply fitted the model's row")
        cases = [empa.make_case(row, f"dialogue {row['case']}") for row in rows]
    models = empa.summarize_models(cases, seed=options.seed)
    console.print(Group(*tables.empa_tables(models)))
    if left_out := sum(case is None for case in cases):
        notes.insert(0, f"{left_out} dialogues left out: they ended in an error or have no scored turn")
    for note in notes:
        show(console, note)
    _write(options, console, folder, models)


def _converse(options: argparse.Namespace, console: Console) -> tuple[Folder, int, int]:
    """Holds the missing dialogues with every card.

    Returns:
      The folder with the dialogues, how many there should be, and how many now broke off because the model
      gave no answer.
    """
    subject = find_subject(options, BENCHMARK_DIALOGUES)
    config, name = subject.config, printable(subject.name)
    cards = _cards(options, subject)
    given = {"evaluation.temperature": options.temperature, "rollout.max_reply_tokens": options.max_tokens}
    config = updated(config, {key: value for key, value in given.items() if value is not None})
    rollouts, family = config.evaluation.rollouts, config.environment.family
    limits = limits_of(config)
    if family == "scripted" and subject.unused_world is not None:
        show(
            console,
            f"note: {name} was trained in a live world ({printable(subject.unused_world)}); without {TRUST} "
            "no server or class named in its own config.yaml is used, and the scripted world takes its place",
        )
    show(
        console,
        f"{name}: {rollouts} dialogues with each of {len(cards)} cards, "
        f"{limits.min_turns} to {limits.max_turns} turns, {family} world"
        + (", held-out judge" if family == "live" and held_out(config.environment) else ""),
    )
    folder = Folder(options.output or subject.output("empa"), conversations.DIALOGUES)
    settings = {
        **subject.identity,
        "benchmark": "empa",
        "cards": [card.id for card in cards],
        "rollouts": rollouts,
        "temperature": config.evaluation.temperature,
        "seed": options.seed,
        **_flat("rollout", config.rollout),
        **_flat("environment", config.environment),
    }
    expected = len(cards) * rollouts
    prepare_jax(config.run.compilation_cache)
    # Refuses the folder of another evaluation before a live world writes to it.
    with folder.opened(settings) as file:
        missing = conversations.missing_cards(folder, cards, rollouts)
        if not missing:
            return folder, expected, 0
        if len(missing) < len(cards):
            show(console, f"{len(cards) - len(missing)} of {len(cards)} cards are there already")
        with stoppable(folder) as check, _opened(open_world, config, folder) as world:
            session = conversations.Session(
                subject.name, missing, world.evaluation_roles, config, options.seed, file, console, check
            )
            if subject.endpoint is None:
                holding = conversations.hold_locally(session, subject.load(), slots=options.concurrency)
            else:
                tokens = config.rollout.max_reply_tokens
                endpoint = subject.connection(options, config.evaluation.temperature, tokens)
                holding = conversations.hold_remotely(session, endpoint)
            unanswered = world.run(holding, check)
    return folder, expected, unanswered


def _cards(options: argparse.Namespace, subject: Subject) -> list[Scenario]:
    environment = subject.config.environment
    scripted = environment.family == "scripted"
    try:
        split = None if options.cards else options.split
        return load_scenarios(options.cards or environment.scenarios, split, scripted=scripted)
    except UserError as error:
        if not scripted or subject.unused_world is None:
            raise
        raise UserError(
            f"{subject.name} was trained in a live world ({subject.unused_world}), which is used only with "
            f"{TRUST} or --config, and the scripted world cannot replace it: {error}"
        ) from error


def run_dialogues(options: argparse.Namespace, console: Console) -> None:
    """Real conversations: the configured judge scores every reply."""
    config = load_config(options.config, options.overrides)
    role = config.environment.judge
    judge = role.model or role.implementation or "scripted judge"
    scripted = judge == "scripted judge"
    cards = load_scenarios(config.environment.scenarios, scripted=scripted)
    chats = transcripts.read_transcripts(options.transcripts, cards, need_card=scripted)
    default = Path("evaluations") / f"dialogues-{Path(options.transcripts).stem}"
    folder = Folder(options.output or default, transcripts.JUDGED)
    texts = ([chat.id, chat.turns, chat.scenario.id, chat.scenario.start] for chat in chats)
    settings = {"benchmark": "dialogues", "transcripts": fingerprint(texts)}
    settings |= _flat("environment", config.environment)
    with (
        folder.opened(settings) as file,  # refuses another evaluation's folder before a judge writes to it
        stoppable(folder) as check,
        _opened(open_judge, config, folder) as world,
    ):
        done = {row["case"] for row in transcripts.saved_rows(folder)}
        missing = [chat for chat in chats if chat.id not in done]
        concurrency = config.environment.concurrency
        judging = transcripts.judge_all(missing, world.roles.judge, file, console, concurrency, check)
        world.run(judging, check)
    saved = {row["case"]: row for row in transcripts.saved_rows(folder)}
    rows = [saved[chat.id] for chat in chats if chat.id in saved]
    cases = [empa.make_case(row, f"conversation {row['case']}") for row in rows]
    models = empa.summarize_models(cases, seed=options.seed)
    worst = transcripts.worst_turns(rows, options.worst)
    title = f"{len(rows)} conversations of {Path(options.transcripts).name}, judged by {judge}"
    console.print(Group(*tables.empa_tables(models), tables.worst_table(worst)))
    unanswered = sum(failure == transcripts.NO_ANSWER for row in rows for failure in row["failures"])
    if unanswered:
        show(console, f"{unanswered} replies are no answers (null, or reasoning alone) and were not judged")
    unjudged = sum(levels is None for row in rows for levels in row["levels"]) - unanswered
    if unjudged or len(rows) < len(chats):
        show(
            console,
            f"not judged: {unjudged} turns, and {len(chats) - len(rows)} conversations of which every call "
            "of the judge failed; the same command tries these again",
        )
    (figures,) = models.values()
    write_whole(folder.path / PAGE, page.render_page(title, figures, rows, worst))
    show(console, f"page written to {folder.path / PAGE}")
    _write(options, console, folder, {**figures, "worst": worst})


@contextmanager
def stoppable(folder: Folder) -> Iterator[Callable[[], None]]:
    """Reports a signal or a failing live world, and what is saved; yields a function for safe points."""
    saved = f"what was finished is saved in {folder.path}, and the same command goes on from there"
    with StopRequest(answer=partial(print, file=sys.stderr, flush=True)) as stop:
        try:
            yield stop.check
        except Interrupted as interruption:
            raise Stopped(str(interruption), f"stopped by {interruption}: {saved}") from interruption
        except WorldFailing as failing:
            raise UserError(f"{printable(str(failing))}; {saved}") from failing


def _opened(open_world: Callable[..., T], config: Config, folder: Folder) -> T:
    """A world, with devices only for roles on our own engine, and without the deadline of a training step.

    Calls and dialogues have their own deadlines.
    """
    models = [getattr(config.environment, name).model or "" for name in (*ROLES, HELD_OUT)]
    mesh = make_mesh(config.mesh) if any(model.startswith(ENGINE) for model in models) else None
    return open_world(updated(config, {"environment.step_seconds": math.inf}), folder.path, mesh)


def _flat(section: str, values: Any) -> dict[str, Any]:
    return {f"{section}.{name}": value for name, value in values.model_dump().items()}


def _write(
    options: argparse.Namespace, console: Console, folder: Folder | None, scores: Any, *, answers: int = 0
) -> None:
    if answers and scores["no_answer"]:
        note = f"answers hold nothing ({_NO_ANSWER}); they count as unparseable"
        show(console, f"{scores['no_answer']} of {answers} {note}")
    content = json.dumps(encodable(scores), indent=1, ensure_ascii=False) + "\n"
    for file in (folder and folder.path / SCORES, options.json):
        if file:
            write_whole(file, content)
            show(console, f"scores written to {file}")
    if folder is not None:
        show(console, f"all files are in {folder.path}")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("evaluate", __doc__.split("\n\n")[0].replace("\n", " "))
    commands = parser.add_subparsers(required=True, metavar="{empa,emobench,eqbench,dialogues}")
    homes = ", ".join(HOMES)

    command = commands.add_parser("empa", help="EMPA: long dialogues with users on scenario cards")
    option = command.add_argument
    option("--split", choices=SPLITS, default="test", help="of our cards (default: test)")
    option("--cards", metavar="PATH", help="other cards: a file or a folder, all of them")
    option(
        TRUST,
        action="store_true",
        help="of a run with a live world: send requests to the servers that its own config.yaml names, with "
        "the keys in the environment variables named there, and import and run the classes named there",
    )
    add_options(command, "--trajectories", "score saved levels again: JSONL of model, start, levels")
    _common(command, "empa", run_empa)

    command = commands.add_parser("emobench", help="EmoBench: what helps best, which emotion, and why")
    option = command.add_argument
    option("--items", nargs="+", required=True, metavar="FILE", help=f"JSONL as published or a name: {homes}")
    option(
        "--protocol",
        choices=emobench.PROTOCOLS,
        default="current",
        help="current: choices as given, greedy; permuted: in four orders; earlier: majority of five samples "
        "in each of four orders",
    )
    add_options(command, "--answers", "score saved answers: JSONL of qid, language, answer")
    _common(command, "emobench", run_emobench)

    command = commands.add_parser("eqbench", help="EQ-Bench v2: how strongly emotions are felt")
    option = command.add_argument
    option("--questions", required=True, metavar="FILE", help=f"JSON as published, or a name: {homes}")
    option("--revision", action="store_true", help="ask for a first pass, a critique and revised scores")
    option(
        "--parsing",
        choices=eqbench.PARSINGS,
        default="benchmark",
        help="benchmark (default): without * and #, names in any case; strict: as the answer stands",
    )
    add_options(command, "--answers", "score saved answers: JSON of {question id: text}")
    _common(command, "eqbench", run_eqbench)

    command = commands.add_parser("dialogues", help="real conversations, judged turn by turn")
    option = command.add_argument
    option(
        "--transcripts",
        required=True,
        metavar="FILE",
        help="JSONL of chats (`messages`), each with the id of a card (`scenario`) or start levels (`start`)"
        ", or the folder of `mapo_jax.serve --conversations`",
    )
    option("--worst", type=int, default=10, metavar="N", help="turns shown (default: 10)")
    _common(command, "dialogues", run_dialogues)
    return parser


def _common(command: argparse.ArgumentParser, name: str, run: Callable[..., None]) -> None:
    command.set_defaults(command=run, name=name, default=command.get_default)
    option = command.add_argument
    option("--output", metavar="FOLDER", help="for results; an evaluation in it is continued")
    option("--config", metavar="FILE|NAME", help="configuration (default: a run's own, else the defaults)")
    option("--json", metavar="FILE", help="write the scores there too")
    option("--seed", type=int, default=0, help="of sampling and intervals (default: 0)")
    option("overrides", nargs="*", metavar="key=value", help="such as environment.concurrency=8")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; settings may stand anywhere among them, which argparse does not allow in a subcommand."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if unknown := [text for text in rest if text.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.overrides += rest
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0 done, 2 bad input, 128 + n stopped by signal n."""
    options = _parse(arguments)
    console = Console(highlight=False, markup=False)  # names and texts from outside are not markup

    def command() -> None:
        check_numbers(options)
        refuse_idle_options(options)
        if vars(options).get("cards") and options.split != options.default("split"):
            raise UserError("--split has no effect with --cards; leave one of them out")
        refuse_unread("evaluate", options.overrides)
        mode = f"evaluate {options.name}" + (" --endpoint" if vars(options).get("endpoint") else "")
        show_unread(console, mode, options.overrides)
        options.command(options, console)

    return run_command(command)


if __name__ == "__main__":
    raise SystemExit(main())
