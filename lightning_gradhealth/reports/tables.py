"""A table for the terminal that fits its width: names stay whole, and columns that do not fit are left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len, chop_cells
from rich.console import Console, ConsoleOptions
from rich.text import Text

from lightning_gradhealth.messages import printable

_GAP = "  "
_SHORTEST_NAME = 12  # characters on a line, before a number is given up for the name
_PREFIX = 6  # characters that names must share to be shown without them
_COMFORT = 20  # characters of a column of words, before a further number is given up for it


@dataclass(frozen=True)
class Column:
    """A column beside the names.

    Attributes:
        title: Its title.
        cells: A text for each row.
        rank: Its importance: those of the greatest rank are left out first.
        words: Words, which stand on the left and go on in a second line; else numbers, which are never broken.
        below: Where it has no room, its cells stand below their rows.
    """

    title: str
    cells: Sequence[str]
    rank: int = 0
    words: bool = False
    below: bool = False

    @property
    def natural(self) -> int:
        """Its width where every cell has one line; its title may have two."""
        return max(_longest_word(_breakable(self.title)), *map(cell_len, self.cells), 1)

    @property
    def least(self) -> int:
        """The width that it can do with."""
        if not self.words:
            return self.natural
        longest = max(map(_longest_word, (_breakable(self.title), *self.cells)), default=1)
        return min(longest, _SHORTEST_NAME)

    @property
    def comfortable(self) -> int:
        """The width that it should have before a less important column is shown."""
        return max(self.least, min(self.natural, _COMFORT)) if self.words else self.natural


class FittedTable:
    r"""Rows of a name and some columns, made for the width at which they are shown.

    A common beginning of long names is told once; what is still too long goes on in the next line. Columns that do not
    fit are named below the table.

    Args:
        title: The title of the names.
        names: A name for each row.
        columns: The columns, in the order in which they are shown.
        styles: A style of rich for each row.

    Example:
        >>> table = FittedTable("layer", ["net.0", "net.2"], [Column("grad norm", ["0.5", "2"])], ["", ""])
        >>> print(*(line.plain for line in table.lines(40)), sep="\n")
        layer  grad norm
        net.0        0.5
        net.2          2
    """

    def __init__(self, title: str, names: Sequence[str], columns: Sequence[Column], styles: Sequence[str]) -> None:
        self._title = title
        self._names = [printable(name) for name in names]
        self._columns = list(columns)
        self._styles = list(styles)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield from self.lines(options.max_width)

    def lines(self, width: int) -> Iterator[Text]:
        """The table, line by line; none is longer than the width.

        Args:
            width: Characters a line.
        """
        names, prefix = self._shortened(width)
        if prefix:
            yield from _told(f"each name begins with {prefix}", width)
        full = max(cell_len(self._title), *map(cell_len, names), 1)
        shown = self._chosen(full, width)
        hidden = [column for column in self._columns if column not in shown]
        widths = _widths(full, shown, width)
        all_titles = (self._title, *(column.title for column in shown))
        titles = [_title(title, room) for title, room in zip(all_titles, widths, strict=True)]
        height = max(map(len, titles))
        left = [True, *(column.words for column in shown)]
        yield from _rows([[""] * (height - len(title)) + title for title in titles], widths, left, "bold")
        for row, name in enumerate(names):
            cells = [fold(name, widths[0])]
            cells += [_words(column.cells[row], room) for column, room in zip(shown, widths[1:], strict=True)]
            yield from _rows(cells, widths, left, self._styles[row])
            for column in hidden:
                if column.below and column.cells[row].strip():
                    yield from _told(column.cells[row], width, indent=2)
        if missing := [column.title for column in hidden if not column.below]:
            yield from _told(f"no room for {'; '.join(missing)}", width)

    def _shortened(self, width: int) -> tuple[list[str], str]:
        """The names without what all of them begin with, where they have no room otherwise; and that beginning."""
        full = max(map(cell_len, self._names), default=0)
        if full + sum(len(_GAP) + column.comfortable for column in self._columns) <= width:
            return self._names, ""
        parts = [name.split(".") for name in self._names]
        common = 0
        for level in zip(*(part[:-1] for part in parts), strict=False):
            if len(set(level)) > 1:
                break
            common += 1
        prefix = "".join(f"{part}." for part in parts[0][:common]) if len(parts) > 1 else ""
        rest = [name[len(prefix) :] for name in self._names]
        return (rest, prefix) if cell_len(prefix) >= _PREFIX and all(rest) else (self._names, "")

    def _chosen(self, full: int, width: int) -> list[Column]:
        """The columns that have room beside the names, the most important first to be chosen."""
        chosen: list[Column] = []
        for column in sorted(self._columns, key=lambda column: column.rank):
            wanted = [*chosen, column]
            tight = len(chosen) < 2  # the two that matter most come before a name in one line
            name = min(full, max(_SHORTEST_NAME, width // 4 if tight else width // 2))
            rooms = (each.least if tight else each.comfortable for each in wanted)
            if name + sum(len(_GAP) + room for room in rooms) <= width:
                chosen = wanted
        return [column for column in self._columns if column in chosen]


def _widths(full: int, columns: Sequence[Column], width: int) -> list[int]:
    """The widths of the names and of the columns: what is left over goes to names, words and titles, in this order."""
    rooms = [column.least for column in columns]
    name = max(1, min(full, _SHORTEST_NAME, width))
    spare = max(0, width - name - sum(rooms) - len(_GAP) * len(rooms))

    def grown(now: int, wanted: int) -> int:
        nonlocal spare
        more = max(0, min(spare, wanted - now))
        spare -= more
        return now + more

    name = grown(name, min(full, width // 2))
    by_rank = sorted(range(len(columns)), key=lambda place: columns[place].rank)
    for place in by_rank:
        rooms[place] = grown(rooms[place], columns[place].comfortable)
    name = grown(name, full)
    for place in by_rank:
        rooms[place] = grown(rooms[place], columns[place].natural)
    for place in by_rank:
        title = cell_len(columns[place].title)
        if title - rooms[place] <= spare:
            rooms[place] = grown(rooms[place], title)
    return [name, *rooms]


def _rows(cells: Sequence[Sequence[str]], widths: Sequence[int], left: Sequence[bool], style: str) -> Iterator[Text]:
    """One row of a table, in as many lines as its cells have."""
    for number in range(max(map(len, cells))):
        parts = []
        for lines, width, on_left in zip(cells, widths, left, strict=True):
            part = lines[number] if number < len(lines) else ""
            space = " " * (width - cell_len(part))
            parts.append(part + space if on_left else space + part)
        yield _line(_GAP.join(parts).rstrip(" "), style)


def _line(text: str, style: str) -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ignore")


def _told(text: str, width: int, indent: int = 0) -> Iterator[Text]:
    for part in _words(text, width - indent):
        yield _line(" " * indent + part, "dim")


def _breakable(title: str) -> str:
    return title.replace("/", "/ ")


def _title(title: str, width: int) -> list[str]:
    """A title in lines of at most a width, which may be broken behind a stroke, too."""
    return [title] if cell_len(title) <= width else _words(_breakable(title), width)


def _longest_word(text: str) -> int:
    return max(map(cell_len, text.split()), default=1)


def _words(text: str, width: int) -> list[str]:
    """A text in lines of at most a width, broken between words, and in words that are longer.

    Example:
        >>> _words("vanishing gradients", 11), _words("abcdef", 4)
        (['vanishing', 'gradients'], ['abcd', 'ef'])
    """
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if cell_len(joined) <= width:
            lines[-1] = joined
        else:
            lines += chop_cells(word, width)
    return [part for part in lines if part] or [""]


def fold(name: str, width: int) -> list[str]:
    """A name in lines of at most a width, broken behind a dot where one is near.

    Example:
        >>> fold("encoder.layers.11.linear1", 16)
        ['encoder.layers.', '11.linear1']
    """
    lines = []
    while cell_len(name) > width:
        line = chop_cells(name, width)[0] or name[0]  # a wide character may be wider than the column
        dot = line.rfind(".") + 1
        line = line[:dot] if dot > len(line) // 2 else line
        lines.append(line)
        name = name[len(line) :]
    return [*lines, name] if name or not lines else lines
