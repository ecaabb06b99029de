# SPDX-License-Identifier: Apache-2.0
"""``specforge report``: a run directory in, ``report/index.html`` and its pictures out. Read, draw, write the page."""

from __future__ import annotations

from pathlib import Path

from specforge_core.contracts import DataError
from specforge_core.contracts.files import make_directory, replace_file
from specforge_core.reporting.html import render_page
from specforge_core.reporting.plots import draw_plots
from specforge_core.reporting.records import read_run


def write_report(run_directory: Path) -> Path:
    """Write a run's report beside its results; what the run did not record is left out and said so.

    :returns: the page.
    :raises DataError: no run, damaged records, nowhere to write, or matplotlib is missing.
    """
    records = read_run(run_directory)
    pictures = draw_plots(records)
    directory = run_directory / "report"
    try:
        make_directory(directory)
        for name, content in pictures.items():
            replace_file(directory / name, content)
        page = directory / "index.html"
        replace_file(page, render_page(records, pictures).encode())
    except OSError as error:
        raise DataError(
            f"the report cannot be written: {error.strerror or error}",
            where=str(directory),
            hint="free space or correct the permissions there",
        ) from error
    return page
