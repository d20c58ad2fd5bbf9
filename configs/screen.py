"""What is printed for people: tables."""


def show_table(title: str, rows: list[dict[str, str]], lines: bool = False) -> None:
    """Prints a table from rows by head, whose heads are those of the first; lines: one between rows."""
    from rich.console import Console  # takes a tenth of a second
    from rich.table import Table

    table = Table(*rows[0], title=title, show_lines=lines)
    for row in rows:
        table.add_row(*(row.get(head, "") for head in rows[0]))
    Console(width=max(100, Console().width)).print(table)
