"""What a policy is worth: EMPA, EmoBench, EQ-Bench, and real conversations judged turn by turn.

    python -m mapo_jax.evaluate empa                            --model FOLDER|RUN | --trajectories FILE.jsonl
    python -m mapo_jax.evaluate emobench  --items FILE.jsonl    --model FOLDER|RUN | --answers FILE.jsonl
    python -m mapo_jax.evaluate eqbench   --questions FILE.json --model FOLDER|RUN | --answers FILE.json
                                          [--parsing benchmark|strict]
    python -m mapo_jax.evaluate dialogues --transcripts FILE.jsonl

`--endpoint URL` instead of `--model` asks an OpenAI-compatible server. Whatever a model says is saved before
it is scored, so that an evaluation which was stopped goes on with the same command, and what was saved can be
scored again without any model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from rich.console import Console

from mapo_jax.commands import Stopped, prepare_jax, printable, run_command
from mapo_jax.config import ENGINE, HELD_OUT, ROLES, Config, held_out, load_config, updated
from mapo_jax.environment.card_schema import SPLITS
from mapo_jax.environment.live.guard import WorldFailing
from mapo_jax.environment.scenario import load_scenarios
from mapo_jax.errors import UserError
from mapo_jax.evaluation import conversations, tables, transcripts
from mapo_jax.evaluation import judged_page as page
from mapo_jax.evaluation.answers import ANSWERS, Answerer, Folder, Prompt, ask
from mapo_jax.evaluation.items import HOMES, find_items
from mapo_jax.evaluation.role_loop import RoleLoop
from mapo_jax.evaluation.subject import TRUST, Subject, add_options, find_subject
from mapo_jax.files import encodable, write_whole
from mapo_jax.model.sharding import make_mesh
from mapo_jax.running.stop import Interrupted, StopRequest
from mapo_jax.scores import emobench, empa, eqbench
from mapo_jax.world import open_judge, open_world

# Most tokens of an answer. Four ratings take about 40; with a critique and a revision, several hundred.
EQBENCH_TOKENS, EQBENCH_REVISION_TOKENS = 128, 1024
EMOBENCH_TOKENS = 128

SCORES, PAGE = "scores.json", "report.html"

# EMPA's own limits, where no configuration says otherwise; replies and rows as in the published recipe.
BENCHMARK_DIALOGUES = (
    "rollout.min_turns=12",
    "rollout.max_turns=45",
    "rollout.max_reply_tokens=512",
    "rollout.max_tokens=25000",
    "evaluation.rollouts=1",
)


def run_eqbench(options: argparse.Namespace, console: Console) -> None:
    """EQ-Bench v2: asks, or scores saved answers."""
    questions = eqbench.read_questions(find_items(options.questions, console.print))
    if options.answers is not None:
        answers, folder = eqbench.read_answers(options.answers), None
        revision = options.revision or None
    else:
        subject = find_subject(options)
        revision = options.revision
        max_tokens = options.max_tokens or (EQBENCH_REVISION_TOKENS if revision else EQBENCH_TOKENS)
        prompts = [
            Prompt(question.id, question.prompt(revision), {"id": question.id}) for question in questions
        ]
        settings = {"benchmark": "eqbench", "revision": revision, "questions": _fingerprint(prompts)}
        folder = _ask(options, console, subject, "eqbench", prompts, settings, 0.0, max_tokens)
        answers = eqbench.read_answers(folder.file)
    scores = eqbench.score_answers(
        questions, answers, revision=revision, parsing=options.parsing, seed=options.seed
    )
    _show(console, tables.eqbench_tables(scores))
    if scores["answered"] < scores["questions"]:
        console.print(f"only {scores['answered']} of {scores['questions']} questions have an answer")
    _say_no_answer(console, scores["no_answer"], len(answers))
    _write(options, folder, scores, console)


def run_emobench(options: argparse.Namespace, console: Console) -> None:
    """EmoBench: asks, or scores saved answers."""
    items = emobench.read_items([find_items(source, console.print) for source in options.items])
    if options.answers is not None:
        answers, folder = emobench.read_answers(options.answers, items), None
    else:
        subject = find_subject(options)
        protocol = emobench.PROTOCOLS[options.protocol]
        prompts = [
            Prompt(
                asking.id,
                asking.prompt(),
                {
                    "task": asking.item.task,
                    "qid": asking.item.qid,
                    "language": asking.item.language,
                    "order": asking.order,
                    "sample": asking.sample,
                },
            )
            for asking in emobench.askings(items, protocol)
        ]
        settings = {"benchmark": "emobench", "protocol": options.protocol, "items": _fingerprint(prompts)}
        max_tokens = options.max_tokens or EMOBENCH_TOKENS
        folder = _ask(
            options, console, subject, "emobench", prompts, settings, protocol.temperature, max_tokens
        )
        answers = emobench.read_answers(folder.file, items)
    scores = emobench.score_answers(items, answers, seed=options.seed)
    _show(console, tables.emobench_tables(scores))
    _say_no_answer(console, scores["no_answer"], len(answers))
    _write(options, folder, scores, console)


def _ask(
    options: argparse.Namespace,
    console: Console,
    subject: Subject,
    benchmark: str,
    prompts: Sequence[Prompt],
    settings: dict[str, Any],
    temperature: float,
    max_tokens: int,
) -> Folder:
    """Has every prompt answered; the folder that then holds the answers."""
    if options.temperature is not None:
        temperature = options.temperature
    folder = Folder(options.output or subject.output(benchmark), ANSWERS)
    settings = {
        **subject.identity,
        **settings,
        "temperature": temperature,
        "max_tokens": max_tokens,
        "seed": options.seed,
        "system_prompt": subject.config.rollout.system_prompt,
    }

    def make_answerer() -> Answerer:
        return subject.answerer(options, console, temperature=temperature, max_tokens=max_tokens)

    prepare_jax(subject.config.run.compilation_cache)
    with stoppable(folder) as check:
        ask(make_answerer, prompts, folder, settings, console, check)
    return folder


def run_empa(options: argparse.Namespace, console: Console) -> None:
    """EMPA's indices and EPM-Q: holds the dialogues, or scores saved levels."""
    folder = None
    if options.trajectories is not None:
        cases = empa.read_cases(options.trajectories)
    else:
        folder, expected, unanswered = _converse(options, console)
        rows = conversations.saved_rows(folder)
        if not rows:
            why = f" (in {unanswered} the model gave no answer: {_NO_ANSWER})" if unanswered else ""
            raise UserError(f"no dialogue came to an end in {folder.path}{why}; the same command tries again")
        cases = [empa.make_case(row, f"dialogue {row['case']}") for row in rows]
    models = empa.summarize_models(cases, seed=options.seed)
    _show(console, tables.empa_tables(models))
    if left_out := sum(case is None for case in cases):
        console.print(f"{left_out} dialogues left out: they ended in an error or have no scored turn")
    if folder is not None and (broken := expected - len(rows)):
        why = [f"in {unanswered} the model gave no answer ({_NO_ANSWER})"] if unanswered else []
        if broken > unanswered:
            why.append("the user or the director failed")
        console.print(
            f"{broken} of {expected} dialogues broke off, as {' and in others '.join(why)}; the same "
            "command tries them again",
            soft_wrap=True,
        )
    if folder is not None and (short := sum(row["rule"] == "max_tokens" for row in rows)):
        console.print(
            f"{short} of {len(rows)} dialogues ended because no further reply fitted the model's row"
        )
    _write(options, folder, models, console)


_NO_ANSWER = "empty, or reasoning alone: raise --max-tokens, or switch its reasoning off"


def _say_no_answer(console: Console, count: int, total: int) -> None:
    if count:
        console.print(
            f"{count} of {total} answers hold nothing ({_NO_ANSWER}); they count as unparseable",
            soft_wrap=True,
        )


def _converse(options: argparse.Namespace, console: Console) -> tuple[Folder, int, int]:
    """Has dialogues held with every card.

    Returns:
      The folder that then holds them, how many there should be, and how many now broke off for want of an
      answer.
    """
    subject = find_subject(options, BENCHMARK_DIALOGUES)
    config = subject.config
    scripted = config.environment.family == "scripted"
    unused = subject.unused_world if scripted else None
    try:
        cards = load_scenarios(
            options.cards or config.environment.scenarios,
            None if options.cards else options.split,
            scripted=scripted,
        )
    except UserError as error:
        if unused is None:
            raise
        raise UserError(
            f"{subject.name} was trained in a live world ({unused}), which is asked only with {TRUST} or by "
            f"--config, and the scripted world cannot stand in for it: {error}"
        ) from error
    if unused is not None:
        console.print(
            f"note: {printable(subject.name)} was trained in a live world ({printable(unused)}); without "
            f"{TRUST} nobody named in its own config.yaml is asked or imported, and the scripted world "
            "takes its place",
            soft_wrap=True,
        )
    temperature = config.evaluation.temperature if options.temperature is None else options.temperature
    if options.max_tokens is not None:
        config = updated(config, {"rollout.max_reply_tokens": options.max_tokens})
    rollouts, limits = config.evaluation.rollouts, conversations.limits_of(config)
    live = config.environment.family == "live"
    console.print(
        f"{printable(subject.name)}: {rollouts} dialogues with each of {len(cards)} cards, "
        f"{limits.min_turns} to {limits.max_turns} turns, {config.environment.family} world"
        + (", held-out judge" if live and held_out(config.environment) else ""),
        soft_wrap=True,
    )
    folder = Folder(options.output or subject.output("empa"), conversations.DIALOGUES)
    settings = {
        **subject.identity,
        "benchmark": "empa",
        "cards": [card.id for card in cards],
        "rollouts": rollouts,
        "temperature": temperature,
        "seed": options.seed,
        **_flat("rollout", config.rollout),
        **_flat("environment", config.environment),
    }
    prepare_jax(config.run.compilation_cache)
    with folder.opened(settings):  # whose folder it is, before a live world puts its files there
        if not conversations.missing_cards(folder, cards, rollouts):
            return folder, len(cards) * rollouts, 0
    with stoppable(folder) as check, open_world(_unhurried(config), folder.path, _mesh(config)) as w:
        world = RoleLoop(w.evaluation_roles, w.run)
        session = conversations.Session(
            subject.name,
            cards,
            rollouts,
            world,
            limits,
            options.seed,
            temperature,
            folder,
            settings,
            console,
            check,
        )
        if subject.endpoint is not None:
            endpoint = subject.reached(
                options, temperature=temperature, max_tokens=config.rollout.max_reply_tokens
            )
            unanswered = conversations.hold_remotely(session, endpoint)
        else:
            unanswered = conversations.hold_locally(session, subject.load, config, slots=options.concurrency)
    return folder, len(cards) * rollouts, unanswered


def run_dialogues(options: argparse.Namespace, console: Console) -> None:
    """Real conversations: has the configured judge score every reply."""
    config = load_config(options.config, options.overrides)
    role = config.environment.judge
    judge = role.model or role.implementation or "scripted judge"
    scripted = judge == "scripted judge"
    chats = transcripts.read_transcripts(
        options.transcripts,
        load_scenarios(config.environment.scenarios, scripted=scripted),
        need_card=scripted,
    )
    default = Path("evaluations") / f"dialogues-{Path(options.transcripts).stem}"
    folder = Folder(options.output or default, transcripts.JUDGED)
    settings = {
        "benchmark": "dialogues",
        "transcripts": transcripts.fingerprint(chats),
        **_flat("environment", config.environment),
    }
    with folder.opened(settings):
        pass  # whose folder it is, before a judge's cache is put there
    with stoppable(folder) as check, open_judge(_unhurried(config), folder.path, _mesh(config)) as w:
        world = RoleLoop(w.roles, w.run)
        rows = transcripts.judge_all(
            chats, world, folder, settings, console, concurrency=config.environment.concurrency, check=check
        )
    cases = [empa.make_case(row, f"conversation {row['case']}") for row in rows]
    models = empa.summarize_models(cases, seed=options.seed)
    worst = transcripts.worst_turns(rows, options.worst)
    title = f"{len(rows)} conversations of {Path(options.transcripts).name}, judged by {judge}"
    _show(console, [*tables.empa_tables(models), tables.worst_table(worst)])
    silent = sum(failure == transcripts.NO_ANSWER for row in rows for failure in row["failures"])
    if silent:
        console.print(f"{silent} replies are no answers (null, or reasoning alone) and were not judged")
    unjudged = sum(levels is None for row in rows for levels in row["levels"]) - silent
    if unjudged or len(rows) < len(chats):
        console.print(
            f"not judged: {unjudged} turns, and {len(chats) - len(rows)} conversations of which every call "
            "of the judge failed; the same command tries these again",
            soft_wrap=True,
        )
    (figures,) = models.values()
    write_whole(folder.path / PAGE, page.render_page(title, figures, rows, worst))
    console.print(f"page written to {folder.path / PAGE}", soft_wrap=True)
    _write(options, folder, {**figures, "worst": worst}, console)


@contextmanager
def stoppable(folder: Folder) -> Iterator[Callable[[], None]]:
    """Ends well on a signal, and where a live world keeps failing; yields what to call at safe points."""
    with StopRequest() as stop:
        try:
            yield stop.check
        except Interrupted as interruption:
            raise Stopped(
                str(interruption),
                f"stopped by {interruption}: what was finished is saved in {folder.path}; the same command "
                "goes on from there",
            ) from interruption
        except WorldFailing as failing:
            raise UserError(
                f"{printable(str(failing))}; what was finished is saved in {folder.path}, and the same "
                "command goes on from there"
            ) from failing


def _mesh(config: Config) -> Mesh | None:
    """Devices for roles on our own engine; none are touched where there is no such role."""
    models = [getattr(config.environment, name).model or "" for name in (*ROLES, HELD_OUT)]
    return make_mesh(config.mesh) if any(model.startswith(ENGINE) for model in models) else None


def _unhurried(config: Config) -> Config:
    """Without the time of a training step: each call and each dialogue has its own."""
    return updated(config, {"environment.step_seconds": math.inf})


def _flat(section: str, values: Any) -> dict[str, Any]:
    return {f"{section}.{name}": value for name, value in values.model_dump().items()}


def _fingerprint(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for prompt in prompts:
        digest.update(json.dumps([prompt.id, prompt.text]).encode())
    return digest.hexdigest()


def _show(console: Console, shown: Sequence[Any]) -> None:
    for table in shown:
        console.print(table)


def _write(options: argparse.Namespace, folder: Folder | None, scores: Any, console: Console) -> None:
    content = json.dumps(encodable(scores), indent=1, ensure_ascii=False) + "\n"
    files = [file for file in (folder and folder.path / SCORES, options.json) if file]
    for file in files:
        write_whole(file, content)
        console.print(f"scores written to {file}", soft_wrap=True)
    if folder is not None:
        console.print(f"everything kept in {folder.path}", soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mapo_jax.evaluate", description=__doc__.split("\n\n")[0].replace("\n", " ")
    )
    commands = parser.add_subparsers(required=True, metavar="{empa,emobench,eqbench,dialogues}")
    homes = ", ".join(HOMES)

    command = commands.add_parser("empa", help="EMPA: long dialogues with users on scenario cards")
    command.set_defaults(command=run_empa)
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--trajectories", metavar="FILE", help="score saved levels again: JSONL of model, start, levels"
    )
    command.add_argument("--split", choices=SPLITS, default="test", help="of our cards (default: test)")
    command.add_argument("--cards", metavar="PATH", help="other cards: a file or a folder, all of them")
    add_options(command, source)
    command.add_argument(
        TRUST,
        action="store_true",
        help="of a run with a live world: send requests to the servers that its own config.yaml names, with "
        "the keys in the environment variables named there, and import and run the classes named there",
    )
    _common(command)

    command = commands.add_parser("emobench", help="EmoBench: what helps best, which emotion, and why")
    command.set_defaults(command=run_emobench)
    command.add_argument(
        "--items", nargs="+", required=True, metavar="FILE", help=f"JSONL as published, or a name: {homes}"
    )
    command.add_argument(
        "--protocol",
        choices=emobench.PROTOCOLS,
        default="current",
        help="current: choices as given, greedy; permuted: in four orders; earlier: majority of five samples "
        "in each of four orders",
    )
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--answers", metavar="FILE", help="score saved answers: JSONL of qid, language, answer"
    )
    add_options(command, source)
    _common(command)

    command = commands.add_parser("eqbench", help="EQ-Bench v2: how strongly emotions are felt")
    command.set_defaults(command=run_eqbench)
    command.add_argument(
        "--questions", required=True, metavar="FILE", help=f"JSON as published, or a name: {homes}"
    )
    command.add_argument(
        "--revision", action="store_true", help="ask for a first pass, a critique and revised scores"
    )
    command.add_argument(
        "--parsing",
        choices=eqbench.PARSINGS,
        default="benchmark",
        help="benchmark (default): without * and #, names in any case; strict: as the answer stands",
    )
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--answers", metavar="FILE", help="score saved answers: JSON of {question id: text}")
    add_options(command, source)
    _common(command)

    command = commands.add_parser("dialogues", help="real conversations, judged turn by turn")
    command.set_defaults(command=run_dialogues)
    command.add_argument(
        "--transcripts",
        required=True,
        metavar="FILE",
        help="JSONL of chats (`messages`), each with the id of a card (`scenario`) or start levels (`start`)",
    )
    command.add_argument("--worst", type=int, default=10, metavar="N", help="turns shown (default: 10)")
    command.add_argument("--output", metavar="FOLDER", help="for judgements, scores and the page")
    command.add_argument(
        "--config", metavar="FILE", help="configuration, whose `environment` names the judge"
    )
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as environment.concurrency=8"
    )
    _common(command)
    return parser


def _common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", metavar="FILE", help="write the scores there too")
    command.add_argument("--seed", type=int, default=0, help="of sampling and intervals (default: 0)")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0 done, 2 bad input, 128 + n stopped by signal n."""
    options = _parser().parse_args(arguments)
    console = Console(highlight=False, markup=False)  # names and texts of others are no markup
    return run_command(lambda: options.command(options, console))


if __name__ == "__main__":
    raise SystemExit(main())
