# SPDX-License-Identifier: Apache-2.0
"""``data check`` and ``data show``: what is trained, before it is."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specforge_core.cli.data_report import render_report
from specforge_core.cli.prompt_view import Piece, print_prompt, render_prompt_page
from specforge_core.cli.run_commands import Overrides, RunArgument
from specforge_core.cli.session import console, messages, open_run
from specforge_core.contracts import ConfigError, Split
from specforge_core.contracts.redaction import show_value

if TYPE_CHECKING:
    from specforge_core.contracts import ChatTokenizer, Prompt
    from specforge_core.prompts.prompt_set import PromptSet
    from specforge_core.run.assemble import Run

_SPLITS: tuple[Split, ...] = ("train", "eval")

data = typer.Typer(rich_markup_mode=None, no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(data, name="data")


@data.callback()
def look_at_data() -> None:
    """Look at prompts and at what of them is trained."""


@data.command("check")
def check_data(
    ctx: typer.Context,
    run: RunArgument,
    *,
    overrides: Overrides = None,
    sample: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="The first N prompts of each split only, kept nowhere.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")] = False,
) -> None:
    """Prepare a run's prompts and say what became of them: per source rows, tokens, what is trained, cut and left out.

    Prompts that are prepared already are not prepared again; a run finds what is prepared here. With
    data.on_bad_row=skip, rows that cannot be used are counted, and listed in rejects.jsonl beside the prompts.

    Example: specforge data check run.yaml --sample 1000
    """
    found: dict[str, dict[str, Any]] = {}
    with open_run(ctx.obj, run, overrides or []) as opened:
        config = opened.plan.config.data
        for split in _SPLITS[: 2 if config.eval else 1]:
            with _prepared(opened, split, sample) as prompts:
                found[split] = describe_prompts(prompts)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for name, described in found.items():
        console.print(render_report(name, described), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _prepared(run: Run, split: Split, sample: int | None) -> Iterator[PromptSet]:
    if sample is None:
        yield run.prompts(split)
        return
    with tempfile.TemporaryDirectory(prefix="specforge-data-") as directory:
        yield run.prompts.prepare(split, Path(directory) / split, most=sample)


def describe_prompts(prompts: PromptSet) -> dict[str, Any]:
    """The report of each source, of all together, and what of it is to be warned of."""
    from specforge_core.prompts.report import total_of, warnings_of

    total = total_of(prompts.report, prompts.lengths().tolist())
    return {
        "directory": str(prompts.directory),
        "fingerprint": prompts.fingerprint,
        "total": total,
        "sources": prompts.report,
        "warnings": {report["name"]: said for report in prompts.report if (said := warnings_of(report))},
    }


@data.command("show")
def show_data(
    ctx: typer.Context,
    run: RunArgument,
    *,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROMPT] [KEY=VALUE]...",
            help="The prompt's id, or its number, from 1 (default: the first); then overrides.",
        ),
    ] = None,
    split: Annotated[str, typer.Option("--split", help="train or eval.")] = "train",
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page that needs nothing else, too.")
    ] = None,
) -> None:
    """Print a prompt as the target sees it, with what is trained in colour (in brackets where there is none).

    Example: specforge data show run.yaml 12 --html prompt.html
    """
    given = arguments or []
    named = [argument for argument in given if "=" not in argument]
    chosen = next((known for known in _SPLITS if known == split), None)
    if chosen is None:
        raise typer.BadParameter(f"{show_value(split)} is not train or eval", param_hint="--split")
    if len(named) > 1:
        raise typer.BadParameter(f"{len(named)} prompts are named, show one", param_hint="PROMPT")
    with open_run(ctx.obj, run, [argument for argument in given if "=" in argument]) as opened:
        if chosen == "eval" and not opened.plan.config.data.eval:
            raise ConfigError(
                "the run has no held-out prompts", where="data.eval", hint="name some, or show --split train"
            )
        prompts = opened.prompts(chosen)
        prompt = prompts[find_prompt(prompts, named[0] if named else "1")]
        pieces = cut_into_pieces(prompt, opened.prompts.tokenizer())
    title = f"{prompt.prompt_id}: {prompt.num_tokens} tokens, {sum(prompt.loss_mask)} trained"
    print_prompt(title, pieces, console)
    if html is not None:
        _write_page(html, render_prompt_page(title, pieces))


def find_prompt(prompts: PromptSet, named: str) -> int:
    """The number, from 0, of what a user calls a prompt. :raises ConfigError: there is no such prompt."""
    found = prompts.find(named)
    if found is None and named.isascii() and named.isdigit() and 1 <= int(named) <= len(prompts):
        found = int(named) - 1
    if found is None:
        raise ConfigError(
            f"there is no prompt {show_value(named)}",
            where=str(prompts.directory),
            hint=f"a number from 1 to {len(prompts)}, or an id such as {prompts.prompt_id(0)}",
        )
    return found


def cut_into_pieces(prompt: Prompt, tokenizer: ChatTokenizer) -> list[Piece]:
    """The prompt's text, in pieces that are trained or not."""
    pieces: list[Piece] = []
    begin = 0
    for end in range(1, prompt.num_tokens + 1):
        if end == prompt.num_tokens or prompt.loss_mask[end] != prompt.loss_mask[begin]:
            pieces.append(Piece(tokenizer.decode(prompt.input_ids[begin:end]), trained=bool(prompt.loss_mask[begin])))
            begin = end
    return pieces


def _write_page(path: Path, page: str) -> None:
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", where=str(path), hint="name another file") from error
    messages.print(f"written: {path}", markup=False, highlight=False, soft_wrap=True)
