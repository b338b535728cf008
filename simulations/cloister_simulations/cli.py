"""``cloister-sim``: run a study on this machine, list the scenarios that come with Cloister, check one.

Nothing slow is imported before a command knows that it needs it.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import typer.core

from cloister_shared.console import REFUSED, one_core, plain_errors
from cloister_shared.errors import PlanRefused, Refusal

if TYPE_CHECKING:
    from rich.console import Console

    from cloister_simulations.federation import Arm, Comparison, Done, Notice, Options, Result
    from cloister_simulations.scenario import Scenario

typer.core.HAS_RICH = False  # or help loads rich, to put a backslash before every bracket
app = typer.Typer(
    name="cloister-sim",
    help="Train across simulated hospitals on this machine, with the code that real ones run.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
)

ARMS = ("pooled", "alone", "federated", "private")
ATTACKS = ("secure-sum",)
PLANTS = ("noise", "twice", "shuffled", "batchnorm")  # as mechanism.Plant names them
SUCCEEDED = 3
"""Exit code of an attack suite of which one attack got through."""
ENGINES = ("in-process", "ray")  # as engines.ENGINES names them; that module takes seconds to import
_WIDTH = 100


@app.command()
def run(
    scenario: Annotated[str, typer.Argument(help="A scenario that comes with Cloister, or a file.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the results.  [default: runs/NAME]")] = None,
    engine: Annotated[str, typer.Option(help="in-process, or ray: a worker process for each hospital.")] = ENGINES[0],
    resume: Annotated[bool, typer.Option("--resume", help="Keep what is finished in the folder and go on.")] = False,
    seed: Annotated[list[str] | None, typer.Option(metavar="N", help="Only this seed; may be repeated.")] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(metavar="ARM", help=f"Only this way: {', '.join(ARMS)}; may be repeated."),
    ] = None,
    fault: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND:HOSPITAL:ROUND", help="Let a reply drop, delay, corrupt or nan; may be repeated."),
    ] = None,
    reproducible_noise: Annotated[
        str | None,
        typer.Option(metavar="N", help="Draw the noise from a seed. VOIDS ALL PRIVACY; for debugging."),
    ] = None,
) -> None:
    """Train pooled, alone, federated and with privacy; write a report."""
    with plain_errors():
        one_core()
        seeds = tuple(dict.fromkeys(_whole_number(text, "--seed") for text in seed or ()))
        noise = None if reproducible_noise is None else _whole_number(reproducible_noise, "--reproducible-noise")
        _one_of("arm", arm or (), ARMS)
        _one_of("engine", (engine,), ENGINES)
        if noise is not None:
            typer.secho("NOISE REPRODUCIBLE: this run gives no privacy.", err=True, bold=True, fg="red")
        from cloister_simulations.scenario import read_scenario

        read = read_scenario(scenario)
        folder = _writable(out or Path("runs") / read.name)
        from cloister_simulations.federation import Options
        from cloister_simulations.grid import read_fault

        faults = tuple(read_fault(text) for text in fault or ())
        if faults:
            _check_faults([(f.site, f.round) for f in faults], read, folder)
        _hush()
        _run(scenario, read, Options(folder, engine, resume, faults, noise, seeds or None, tuple(arm) if arm else None))


@app.command("list")
def list_() -> None:
    """Name the scenarios that come with Cloister."""
    with plain_errors():
        one_core()
        from cloister_simulations.scenario import read_scenario, shipped

        for name in shipped():
            read = read_scenario(name)
            typer.echo(f"{name}\n  {read.plan.title}\n  {_hospitals(read)}")
            seeds = len(read.simulation.seeds)
            typer.echo(f"  {read.plan.rounds} rounds, {seeds} seeds, ε {_epsilons(read)}")


@app.command()
def check(file: Annotated[str, typer.Argument(help="A scenario file, or a scenario's name.")]) -> None:
    """Read a scenario and say what it would run, or what is wrong with it."""
    with plain_errors():
        one_core()
        from cloister_shared.plan_file import amend
        from cloister_shared.plan_text import guarantee, paragraphs, standings, turned_off
        from cloister_simulations.scenario import read_scenario

        read = read_scenario(file)
        plan = read.plan
        facts = {
            "study": f"{plan.study}: {plan.title}",
            "plan digest": plan.digest,
            "hospitals": _hospitals(read),
            "features": str(len(plan.table.features)),
            "rounds": str(plan.rounds),
            "seeds": ", ".join(map(str, read.simulation.seeds)),
            "epsilon": _epsilons(read) + (f" at delta {plan.privacy.delta:g}" if plan.privacy.delta else ""),
            **{term.lower(): said for term, said in guarantee(plan).items()},
            "secure sum": "on" if plan.aggregation.secure_sum else "off",
        }
        typer.echo(paragraphs(facts))
        for epsilon in _levels(read) if plan.shared_noise else ():
            typer.echo(f"\nFederated, ε = {epsilon:g}\n{standings(amend(plan, privacy={'epsilon': epsilon}))}")
        for sentence in turned_off(plan):
            typer.secho(sentence, fg="red", bold=True)


@app.command()
def consortium(
    scenario: Annotated[str, typer.Argument(help="A scenario that comes with Cloister, or a file.")] = "breast-cancer",
    out: Annotated[Path | None, typer.Option(help="Folder for everything that is made.  [default: a new one]")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the study.")] = 5,
    fresh_noise: Annotated[bool, typer.Option(help="Noise as hospitals draw it; nothing to compare.")] = False,
) -> None:
    """A coordinator and a scenario's hospitals as real processes: keys, enrolment, approval, a study."""
    with plain_errors():
        one_core()
        from cloister_simulations.consortium import demonstrate, told

        folder = _writable(out or Path(tempfile.mkdtemp(prefix="cloister-consortium-")))
        _hush()
        typer.echo(f"In {folder}: one coordinator, real processes, mutual TLS on this machine's loopback.\n")

        def say(what: str, took: float) -> None:
            typer.echo(f"{took:6.1f} s  {what}")

        shown = demonstrate(folder, scenario, rounds, say, fresh=fresh_noise)
        typer.echo(told(shown, folder))
        if shown.difference:
            raise SystemExit(1)


@app.command()
def attack(
    name: Annotated[str, typer.Argument(help=f"What to attack: {', '.join(ATTACKS)}.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown instead of a table.")] = False,
) -> None:
    """Attack the code that real hospitals run, and show who refused and why. Exits with 3 if one got through."""
    with plain_errors():
        one_core()
        _one_of("attack", (name,), ATTACKS)
        _hush()
        from cloister_simulations.attacks import shown

        if shown.tell("json" if json else "markdown" if markdown else "table", _console()):
            raise typer.Exit(SUCCEEDED)


@app.command()
def audit(
    epsilon: Annotated[
        list[float] | None, typer.Option(metavar="E", help="A claim to audit; may be repeated.  [default: 2 and 8]")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time for all claims together.")] = 60,
    plant: Annotated[
        str | None, typer.Option(metavar="BUG", help=f"Plant a bug that must be caught: {', '.join(PLANTS)}.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Bound epsilon from below by what the real optimiser releases of canaries. Exits with 1 unless all is well."""
    with plain_errors():
        one_core()
        _one_of("plant", (plant,) if plant else (), PLANTS)
        for claim in epsilon or ():
            if not 0.01 <= claim <= 100:
                raise PlanRefused(f"--epsilon {claim:g} cannot be audited.", mend="Write a number from 0.01 to 100.")
        _hush()
        from cloister_simulations.audit import told

        if not told.tell(tuple(epsilon or (2.0, 8.0)), plant, seconds, _console(), as_json=json):
            raise typer.Exit(REFUSED)


def main() -> None:
    """The program."""
    app()


# --- running -----------------------------------------------------------------------------------------------
def _run(typed: str, scenario: Scenario, options: Options) -> None:
    from cloister_simulations.federation import arms_of, compare

    console = _console()
    if not (arms := arms_of(scenario, options.arms)):
        raise PlanRefused("The plan has no privacy, so there is no arm private.", mend="Leave out --arm private.")
    try:
        with _watched(scenario, options.seeds or scenario.simulation.seeds, arms, console) as (notice, done):
            found = compare(scenario, options, notice, done)
        _tell(typed, found, console)
    except KeyboardInterrupt:
        typer.echo("\nInterrupted; the same command with --resume goes on.", err=True)
        if options.engine == "ray":
            os._exit(130)  # Flower's coordinator thread would wait for the workers that are gone
        raise typer.Exit(130) from None


@contextmanager
def _watched(
    scenario: Scenario, seeds: Sequence[int], arms: Sequence[Arm], console: Console
) -> Iterator[tuple[Notice, Done]]:
    """A bar for each arm on a terminal; elsewhere a line for each finished arm and seed."""
    from cloister_shared.outcomes.outcome import outcome_of, title

    headline = outcome_of(scenario.plan.table).headline
    if not console.is_terminal:
        yield lambda *_: None, lambda result: print(_line(result, headline), flush=True)  # noqa: T201
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    rounds = scenario.plan.rounds
    said = (TextColumn("{task.completed:.0f}/{task.total:.0f} rounds"), TextColumn("{task.fields[told]}"))
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), *said, console=console) as bars:
        tasks = {arm: bars.add_task(arm.name, total=len(seeds) * rounds, told="", start=False) for arm in arms}

        def notice(arm: Arm, seed: int, number: int, metrics: object) -> None:
            value = metrics.get(headline) if isinstance(metrics, dict) else None
            bars.start_task(tasks[arm])
            told = "" if value is None else f"{title(headline)} {value:.3f}"
            bars.update(tasks[arm], completed=seeds.index(seed) * rounds + min(number, rounds), told=told)

        def done(result: Result) -> None:
            value = result.overall[headline].value if headline in result.overall else None
            told = "" if value is None else f"{title(headline)} {value:.3f}"
            bars.start_task(tasks[result.arm])
            bars.update(tasks[result.arm], completed=(seeds.index(result.seed) + 1) * rounds, told=told)

        yield notice, done


def _line(result: Result, headline: str) -> str:
    from cloister_shared.outcomes.outcome import title

    value = result.overall[headline]
    return f"{result.arm.name}, seed {result.seed}: {title(headline)} {value}, {result.seconds:.1f} s"


def _tell(typed: str, found: Comparison, console: Console) -> None:
    """The tables, where the report is, and what to try next."""
    from cloister_simulations import learned, models, report
    from cloister_simulations.scenario import shipped

    path, exported = report.write(found), models.export(found)
    if told := learned.readiness(found):
        console.print(f"\nWhat each hospital told before training ({told.arm.name})\n")
        console.print(told.page, markup=False, soft_wrap=True)
    for table in report.tables(found):
        console.print()
        console.print(table)
    if found.reproducible_noise:
        console.print("NOISE REPRODUCIBLE: this run gives no privacy.", style="bold red")
    console.print(f"\nReport   {path}", soft_wrap=True)
    for folder in exported:
        console.print(f"Model    {folder}", soft_wrap=True)
    name, site = found.scenario.name, max(found.rows, key=lambda site: found.rows[site]["train"])
    other = next((n for n in ("generated-ehr", "breast-cancer") if n != name and n in shipped()), name)
    console.print("\nWhat to try next", style="bold")
    # As it was called: after `make demo` the command lies in .venv/bin.
    called = Path(sys.argv[0])
    program = os.path.relpath(called) if called.name == "cloister-sim" and called.parent != Path() else "cloister-sim"
    tries = {
        f"{program} run {other}": f"other hospitals ({program} list names all)",
        f"{program} run {typed} --arm federated --fault drop:{site}:3": "a hospital misses a round",
        "docs/guides/researcher.md": "how to change the plan",
    }
    for command, why in tries.items():
        console.print(f"  {command}\n      {why}", soft_wrap=True)


def _console() -> Console:
    """The terminal; what is no terminal is as wide as our tables."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(highlight=False, width=_WIDTH)


# --- what can be wrong with a command ----------------------------------------------------------------------
def _hush() -> None:
    """Leave out what tells a user nothing: Opacus on inputs that need no gradient, and Flower's log."""
    os.environ.setdefault("FLWR_LOG_LEVEL", "ERROR")
    os.environ.setdefault("PYTHONWARNINGS", "ignore:Full backward hook is firing")  # for Ray's worker processes
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    logging.getLogger("flwr").setLevel(logging.ERROR)


def _whole_number(text: str, option: str) -> int:
    if text.isdecimal() and int(text) < 2**31:
        return int(text)
    raise PlanRefused(f"{option} {text} is not a whole number from 0 to {2**31 - 1}.", mend=f"Write {option} 0.")


def _one_of(what: str, words: Sequence[str], known: Sequence[str]) -> None:
    for word in words:
        if word not in known:
            raise PlanRefused(f"There is no {what} {word}.", mend=f"Write one of {', '.join(known)}.")


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise Refusal(
            f"Nothing can be written in {folder} ({error.strerror}).", mend="Name another with --out."
        ) from None
    return folder


def _check_faults(faults: Sequence[tuple[str, int]], scenario: Scenario, folder: Path) -> None:
    """A fault at a hospital or in a round that is not there would quietly test nothing."""
    from cloister_client.site_file import read_site
    from cloister_simulations.hospitals import build

    sites = [read_site(path).site for path in build(scenario.simulation.hospitals, folder / "hospitals")]
    for site, number in faults:
        _one_of("hospital", (site,), sites)
        if not 1 <= number <= scenario.plan.rounds:
            raise PlanRefused(f"There is no round {number}.", mend=f"Write one from 1 to {scenario.plan.rounds}.")


def _hospitals(scenario: Scenario) -> str:
    source = scenario.simulation.hospitals
    sites = getattr(source, "sites", "")
    words = {
        "heart-disease": "four real hospitals",
        "readmission": "six proxy hospitals (admission sources)",
        "tables": ", ".join(sites) if isinstance(sites, tuple) else "",
    }
    return f"{source.source}: {words.get(source.source, f'{sites} invented hospitals')}"


def _levels(scenario: Scenario) -> list[float]:
    return [level for level in scenario.simulation.epsilons or (scenario.plan.privacy.epsilon,) if level]


def _epsilons(scenario: Scenario) -> str:
    return ", ".join(f"{level:g}" for level in _levels(scenario)) or "none"


if __name__ == "__main__":
    main()
