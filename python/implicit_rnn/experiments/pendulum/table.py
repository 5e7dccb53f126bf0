"""A table of numbers in a text file, however it was written: its separators, decimal sign, header and preamble.

Nothing is asked of the file but rows of numbers below each other. How cells are separated and decimals written is what
turns most of them into numbers; what stands before the rows is a preamble, whose last line of as many cells names them.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from implicit_rnn.experiments.pendulum.units import unit_of

Array = np.ndarray

BLANKS, COMMA_BLANK = " ", ", "
_LAYOUTS = [
    ("\t", "."),
    ("\t", ","),
    (";", "."),
    (";", ","),
    (COMMA_BLANK, ","),
    (",", "."),
    (",", ","),
    ("|", "."),
    ("|", ","),
    (BLANKS, "."),
    (BLANKS, ","),
]
"""Separators of cells with decimal signs; of two that fit a file equally well the first is taken."""
SEPARATORS = {"\t": "tabs", ";": "semicolons", ",": "commas", COMMA_BLANK: "commas", "|": "bars", BLANKS: "blanks"}
_MISSING = re.compile(
    r"|nan|na|n/a|#n/a|#nv|none|null|-+|—|\?|undefined|#value!|#wert!|#div/0!|missing|lost", re.IGNORECASE
)
_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[ed][+-]?\d+)?)\s*([a-zµμ°º/]*)", re.IGNORECASE)
_GROUPED = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+\.\d+")
_CLOCK = re.compile(
    r"(?:\S+[T ]\s*)?(?:(\d{1,2}):)?(\d{1,2}):(\d{1,2}(?:\.\d*)?)(?: ?([AaPp])\.?[Mm]\.?|Z|[+-]\d{2}:?\d{2})?"
)
DAY = 86400.0
"""Seconds."""
_SAMPLE = 400
"""Lines by which the layout is judged."""
_SHARE = 0.1
"""Share of the rows that must reach to a column for it to be one."""
_SIGNATURES = {
    b"PK": "an archive or a workbook: save the sheet with the record as CSV",
    b"%PDF": "a PDF: export the record as CSV",
    b"\xd0\xcf\x11\xe0": "an Excel workbook: save the sheet with the record as CSV",
    b"\x1f\x8b": "compressed: unpack it",
    b"<": "XML or HTML: export the record as CSV (in Tracker: File, Export, Data File)",
    b"{": "JSON: export the record as CSV",
}


@dataclass(frozen=True)
class Table:
    """The rows of numbers in a file, as text, and what stands above them."""

    file: str
    header: tuple[str, ...]
    """Above each column, with its unit; empty where nothing is."""
    cells: tuple[tuple[str, ...], ...]
    lines: Array
    """(rows,) the line of the file in which each row stands."""
    separator: str
    decimal: str
    numeric: tuple[bool, ...]
    """The columns that hold numbers."""

    @property
    def comma_hint(self) -> str:
        """The end of a message where the commas between whole numbers could be decimal signs as well; else nothing."""
        if self.separator != "," or not _whole(self.cells):
            return ""
        return "; if the commas are decimal commas, export it with semicolons or tabs"

    def title(self, column: int) -> str:
        """How messages name a column."""
        return f"column {column + 1}" + (f" ({self.header[column]!r})" if self.header[column] else "")

    def numbers(self, column: int) -> tuple[Array, str]:
        """(rows,) the numbers of a column, NaN for empty cells, and the unit written in its cells, if any.

        Times of day come in seconds, and run on past midnight. ``ValueError`` names the first cell that is not a number.
        """
        values = np.empty(len(self.cells))
        units: set[str] = set()
        for row, cells in enumerate(self.cells):
            number = _number(cells[column], self.decimal)
            if number is None:
                raise ValueError(
                    f"{self.file}, line {self.lines[row]}: {cells[column]!r} in {self.title(column)}; "
                    "expected a number or an empty cell"
                )
            values[row] = number[0]
            units.add(number[1])
        if any(":" in cells[column] for cells in self.cells):
            there = np.isfinite(values)
            values[there] = np.unwrap(values[there], period=DAY)
        return values, max(units, default="")


def read_table(path: Path) -> Table:
    """The table in a file; ``ValueError`` says what is wrong with a file that has none."""
    lines = [(number, line) for number, line in enumerate(_text(path).splitlines(), 1) if line.strip()]
    if lines and lines[0][1].strip().lower().startswith("sep="):  # a hint to Excel
        del lines[0]
    if not lines:
        raise ValueError(f"{path} is empty; expected rows of times and angles")
    separator, decimal = _layout([line for _, line in lines])
    rows = [(number, _split(line.lstrip("#%!/ "), separator)) for number, line in lines]
    comments = {number for number, line in lines if line.lstrip().startswith(("#", "%", "//"))}
    width = Counter(
        len(_trimmed(cells)) for number, cells in rows if number not in comments and _quality(cells, decimal) > -1
    )
    if not width:
        raise ValueError(f"{path} has no rows of numbers; expected a table of times and angles, as CSV or text")
    columns = max(count for count, times in width.items() if times >= _SHARE * sum(width.values()))
    numeric = _numeric_columns(rows, columns, decimal)
    first, last = _block(path, rows, comments, numeric, decimal)
    body = [
        (number, _padded(cells, columns))
        for number, cells in rows[first:last]
        if number not in comments and not all(_missing(cell) for cell in cells)
    ]
    for number, cells in body:
        if len(cells) > columns:
            raise ValueError(
                f"{path}, line {number} has {len(cells)} cells; expected {columns}, as elsewhere in the file"
            )
    preamble = [(line, cells) for (_, line), (_, cells) in zip(lines[:first], rows[:first], strict=True)]
    header = _header(preamble, columns, separator)
    if separator == "," and _decimal_commas(preamble, body, columns):
        raise ValueError(
            f"{path}, line {body[0][0]} has {columns} whole numbers between commas under {columns // 2} names; if the "
            "commas are decimal commas, export the record with semicolons or tabs between the columns"
        )
    header = header or ("",) * columns
    return Table(
        str(path),
        header,
        tuple(cells for _, cells in body),
        np.array([n for n, _ in body]),
        separator,
        decimal,
        numeric,
    )


def _text(path: Path) -> str:
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    else:
        for signature, what in _SIGNATURES.items():
            if data.lstrip(b"\xef\xbb\xbf \r\n").startswith(signature):
                raise ValueError(f"{path} is {what}")
        if b"\0" in data:
            raise ValueError(f"{path} is not a text file: export the record as CSV")
        encoding = "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        text = data.decode("cp1252", errors="replace")
    # Only these end a line; str.splitlines knows more.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    for blank in "\u00a0\u2007\u202f\u2009\u2003":
        text = text.replace(blank, " ")
    return re.sub("[\x0b\x0c\x1c-\x1e\x85\u2028\u2029\ufeff]", " ", text.replace("\u2212", "-"))


def _layout(lines: Sequence[str]) -> tuple[str, str]:
    """The separator and the decimal sign that make most of the lines rows of numbers."""
    middle = lines[len(lines) // 2 - _SAMPLE // 2 :] if len(lines) > _SAMPLE else lines
    sample = [line for line in middle[:_SAMPLE] if not line.lstrip().startswith(("#", "%", "//"))]

    def quality(layout: tuple[str, str]) -> float:
        return sum(_quality(_split(line, layout[0]), layout[1]) for line in sample)

    return max(_LAYOUTS, key=lambda layout: (round(quality(layout), 9), -_LAYOUTS.index(layout)))


def _quality(cells: Sequence[str], decimal: str) -> float:
    """How much of a row is numbers, from -1 to 1; half of that for a single number."""
    present = [cell for cell in cells if not _missing(cell)]
    if not present:
        return -1.0
    numbers = sum(_number(cell, decimal) is not None for cell in present)
    balance = (2 * numbers - len(present)) / len(present)
    return balance / 2 if numbers == 1 and balance > 0 else balance


def _split(line: str, separator: str) -> tuple[str, ...]:
    if separator == BLANKS:
        return tuple(cell.strip("\"'") for cell in line.split())
    if separator == COMMA_BLANK:
        return tuple(cell.strip() for cell in re.split(r",\s+", line.strip()))
    # A quote that is never closed, as in 12", is a sign like any other.
    closed = line.count('"') % 2 == 0
    cells = next(csv.reader([line], delimiter=separator, skipinitialspace=True)) if closed else line.split(separator)
    return tuple(cell.strip().strip("'") for cell in cells)


def _number(cell: str, decimal: str) -> tuple[float, str] | None:
    """The number in a cell and its unit; NaN for an empty one, None for anything else."""
    text = cell.strip().lstrip("'")
    if _missing(text):
        return float("nan"), ""
    if decimal == ",":
        if "." in text and "," not in text and ":" not in text and not re.fullmatch(r"[+-]?\d+", text):
            return None
        text = text.translate(str.maketrans(",.", ".,"))
    if _GROUPED.fullmatch(text):
        text = text.replace(",", "")
    if match := _NUMBER.fullmatch(text):
        unit = match[2].lower()
        if unit and unit_of(unit) is None:
            return None
        return float(match[1].lower().replace("d", "e")), unit
    if match := _CLOCK.fullmatch(text):
        hour = int(match[1] or 0)
        if match[4]:  # 12 AM is midnight
            hour = hour % 12 + (12 if match[4] in "Pp" else 0)
        return 3600.0 * hour + 60 * float(match[2]) + float(match[3]), "s"
    return None


def _missing(cell: str) -> bool:
    return _MISSING.fullmatch(cell.strip()) is not None


def _trimmed(cells: Sequence[str]) -> tuple[str, ...]:
    """Without the empty cells at the end."""
    count = len(cells)
    while count and not cells[count - 1].strip():
        count -= 1
    return tuple(cells[:count])


def _padded(cells: Sequence[str], columns: int) -> tuple[str, ...]:
    return (*_trimmed(cells), *("",) * (columns - len(_trimmed(cells))))


def _numeric_columns(rows: Sequence[tuple[int, tuple[str, ...]]], columns: int, decimal: str) -> tuple[bool, ...]:
    """Whether at least as many of the cells of a column are numbers as words."""
    balance, numbers = np.zeros(columns), np.zeros(columns)
    for _, cells in rows:
        for column, cell in enumerate(cells[:columns]):
            if not _missing(cell):
                is_number = _number(cell, decimal) is not None
                balance[column] += 1 if is_number else -1
                numbers[column] += is_number
    return tuple((balance >= 0) & (numbers > 0))


def _block(
    path: Path, rows: Sequence[tuple[int, tuple[str, ...]]], comments: set[int], numeric: Sequence[bool], decimal: str
) -> tuple[int, int]:
    """Where the rows of numbers begin and end; ``ValueError`` for words in their midst."""

    def is_row(index: int) -> bool:
        number, cells = rows[index]
        entries = [_number(cell, decimal) for cell, wanted in zip(cells, numeric, strict=False) if wanted]
        there = [entry for entry in entries if entry is None or not np.isnan(entry[0])]
        return number not in comments and bool(there) and None not in there

    def passable(index: int) -> bool:
        number, cells = rows[index]
        return number in comments or all(_missing(cell) for cell in cells) or is_row(index)

    runs: list[tuple[int, int]] = []
    index = 0
    while index < len(rows):
        begin = index
        while index < len(rows) and passable(index):
            index += 1
        # Comments before the first row are part of the preamble.
        row = next((k for k in range(begin, index) if is_row(k)), index)
        if row < index:
            runs.append((row, index))
        index += 1
    if not runs:
        raise ValueError(f"{path} has no rows of numbers; expected a table of times and angles, as CSV or text")
    # A preamble may have rows of numbers too, but few.
    longest = max(runs, key=lambda run: run[1] - run[0])
    first, end = next((run for run in runs if run[1] - run[0] > 3), longest)
    if end < len(rows):
        number, cells = rows[end]
        wrong = next(
            (cell for cell, wanted in zip(cells, numeric, strict=False) if wanted and _number(cell, decimal) is None),
            "",
        )
        raise ValueError(
            f"{path}, line {number}: {wrong!r} in the midst of numbers; expected a number or an empty cell, and one "
            "record per file: correct the line, or take away what does not belong to the record"
        )
    return first, end


def _header(preamble: Sequence[tuple[str, tuple[str, ...]]], columns: int, separator: str) -> tuple[str, ...]:
    """The names of the columns, each with the unit that stands beneath it; empty if there are none."""
    rows = [found for line, cells in preamble if (found := _names(line, cells, columns, separator))]
    if not rows:
        return ()
    units = [unit_of(cell) for cell in rows[-1]]
    if len(rows) > 1 and any(units) and all(unit or not cell for unit, cell in zip(units, rows[-1], strict=True)):
        return tuple(
            f"{name} ({cell.strip('()[]')})" if cell else name for name, cell in zip(rows[-2], rows[-1], strict=True)
        )
    return rows[-1]


def _names(line: str, cells: tuple[str, ...], columns: int, separator: str) -> tuple[str, ...]:
    """A line of the preamble as names of the columns; empty if it is not one."""
    bare = line.lstrip("#%!/ ").strip()
    ways = [
        cells,
        *(_split(bare, separator) for separator in ("\t", ";", ",", "|")),
        tuple(re.split(r"\s{2,}|\t", bare)),
        tuple(re.findall(r"\S+(?:\s*[(\[][^)\]]*[)\]])?", bare)),
    ]
    for way in ways:
        names = _trimmed(way)
        # Unlike words between blanks, cells beyond the last number are names of empty columns.
        more = way is cells and separator != BLANKS and len(cells) > columns > 1
        if names and (len(way) == columns or len(names) == columns or more):
            names = _padded(names, columns)[:columns]
            if all(re.search(r"[^\W\d_]|°", name) or not name for name in names):
                return names
    return ()


def _whole(cells: Sequence[Sequence[str]]) -> bool:
    return all(re.fullmatch(r"[+-]?\d*", cell) for row in cells for cell in row)


def _decimal_commas(
    preamble: Sequence[tuple[str, tuple[str, ...]]], body: Sequence[tuple[int, tuple[str, ...]]], columns: int
) -> bool:
    """Whether twice as many whole numbers as names stand between commas: 0,5,1,25 under time,angle."""
    if columns % 2 or not preamble:
        return False
    return _whole([cells for _, cells in body]) and len(_trimmed(preamble[-1][1])) == columns // 2 > 1
