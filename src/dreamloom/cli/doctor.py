"""The command that looks at the installation: carry out the checks, show what they found."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from dreamloom.cli.checks import Finding, carry_out, list_checks
from dreamloom.cli.options import LoomCommand, device_option, json_option
from dreamloom.cli.output import PRINT, deliver

_COLOURS = {"ok": "green", "lacking": "yellow", "broken": "red"}


@click.command(cls=LoomCommand)
@device_option
@json_option
@click.pass_context
def doctor(ctx: click.Context, device: str | None, json_target: str | None) -> None:
    """Say what is here, and what mends what is missing.

    Looks at packages and extras, the device, compilers, models, caches and free disk. Ends with 0
    where all that is needed works, and with 1 where something needed is broken.
    """
    checks = list(list_checks(device or "auto"))
    width = max(len(name) for _, name, _ in checks)
    found: list[tuple[str, Finding]] = []
    for part, name, check in checks:
        finding = carry_out(name, check)
        if json_target != PRINT:
            # At once, for importing takes some seconds; and without the library that other
            # commands print with, which may be what is broken.
            if not found or found[-1][0] != part:
                click.secho(part, bold=True)
            _show(finding, width)
        found.append((part, finding))
    broken = [finding.name for _, finding in found if finding.state == "broken"]
    told = {
        "works": not broken,
        "findings": [{"part": part, **asdict(finding)} for part, finding in found],
    }
    if json_target == PRINT:
        click.echo(json.dumps(told, indent=2))
    else:
        _conclude(broken, sum(finding.state == "lacking" for _, finding in found))
    if json_target not in (None, PRINT):
        deliver(told, lambda: None, json_target)
    if broken:
        ctx.exit(1)


def _show(finding: Finding, width: int) -> None:
    """Print what a check found, and on a line of its own what mends it."""
    state = click.style(f"{finding.state:<8}", fg=_COLOURS[finding.state])
    click.echo(f"  {state}{finding.name:<{width}}  {finding.detail}")
    if finding.mend:
        click.echo(f"  {'':<8}{'':<{width}}  to mend it: {finding.mend}")


def _conclude(broken: list[str], lacking: int) -> None:
    """Print how it stands."""
    if broken:
        click.secho(f"Broken: {', '.join(broken)}.", fg="red")
    elif lacking:
        click.echo(f"All that is needed works; what is lacking ({lacking}) can be added.")
    else:
        click.echo("All that is needed works, and nothing is lacking.")
