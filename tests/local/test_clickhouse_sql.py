"""What the front reads out of a statement without the engine."""

import pytest

from gpuledger.local.clickhouse.sql import insert_from_file, parse, quote_identifier, quote_string


@pytest.mark.parametrize(
    ("text", "sql", "output_format"),
    [
        (b"SELECT 1", "SELECT 1", None),
        (b"SELECT 1 FORMAT JSON", "SELECT 1", "JSON"),
        (b"select 1\n format Native", "select 1", "Native"),
        (b"SELECT 1 FORMAT CSV SETTINGS max_threads = 1", "SELECT 1   SETTINGS max_threads = 1", "CSV"),
        (b"SELECT 1 FORMAT CSV;", "SELECT 1  ;", "CSV"),
        (b"SELECT 1 AS format", "SELECT 1 AS format", None),
        (b"SELECT format FROM t", "SELECT format FROM t", None),
        (b"SELECT 'x FORMAT JSON'", "SELECT 'x FORMAT JSON'", None),
        (b"SELECT 1 -- FORMAT JSON", "SELECT 1 -- FORMAT JSON", None),
        (b"SELECT (SELECT 1 FORMAT JSON)", "SELECT (SELECT 1 FORMAT JSON)", None),
    ],
)
def test_the_output_format_is_cut_out(text: bytes, sql: str, output_format: str | None) -> None:
    statement = parse(text)
    assert (statement.sql, statement.format, statement.data_start) == (sql, output_format, None)


@pytest.mark.parametrize(
    ("text", "sql", "data_format", "data"),
    [
        (b"INSERT INTO t FORMAT Native\n\x01\x00'", "INSERT INTO t", "Native", b"\x01\x00'"),
        (b"INSERT INTO t (a, b) VALUES (1, ';')", "INSERT INTO t (a, b)", "Values", b" (1, ';')"),
        (b"insert into t(`values`) format CSV\r\n1\n", "insert into t(`values`)", "CSV", b"1\n"),
        (b"INSERT INTO t FORMAT Values\n(1)", "INSERT INTO t", "Values", b"(1)"),
        (b"INSERT INTO t FORMAT TSV\n\n1\n", "INSERT INTO t", "TSV", b"\n1\n"),
        (b"/* FORMAT x */ INSERT INTO t FORMAT CSV", "/* FORMAT x */ INSERT INTO t", "CSV", b""),
    ],
)
def test_inline_data_begin_behind_the_head(text: bytes, sql: str, data_format: str, data: bytes) -> None:
    statement = parse(text)
    assert statement.is_insert
    assert statement.data_start is not None
    assert (statement.sql, statement.format, text[statement.data_start :]) == (sql, data_format, data)


def test_an_insert_of_a_query_has_no_data() -> None:
    assert parse(b"INSERT INTO t SELECT 1").data_start is None
    assert parse(b"WITH 1 AS x INSERT INTO t SELECT x").is_insert


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        (b"SELECT 'outfile'", True),
        (b"SELECT /* outfile */ 1", True),
        (b"SELECT 1 -- outfile\n", True),
        (b"SELECT $tag$ outfile $tag$", True),
        (b"SELECT 'a\\' outfile'", True),
        (b"SELECT 'a'' outfile'", True),
        # Typographic quotes are quotes, so the apostrophes inside them open nothing.
        ("SELECT ‘'’ outfile ‘'’".encode(), False),
        (b"SELECT 1 outfile", False),
        (b"SELECT 1 OutFile", False),
        (b'SELECT 1 "outfile"', False),
        (b"SELECT 1 `outfile`", False),
        (b"SELECT '\\\\' outfile ''", False),
    ],
)
def test_words_in_strings_and_comments_do_not_count(text: bytes, hidden: bool) -> None:
    assert ("OUTFILE" not in parse(text).words) == hidden


def test_calls_totals_and_temporary_tables_are_seen() -> None:
    assert "PYTHON" in parse(b"SELECT * FROM `Python` /**/ (x)").calls
    assert parse(b"SELECT a, count() FROM t GROUP BY a WITH TOTALS").with_totals
    assert parse(b"CREATE OR REPLACE TEMPORARY TABLE t (a Int8)").temporary
    assert not parse(b"CREATE TABLE temporary (a Int8)").temporary
    assert parse(b"CREATE DICTIONARY d (a Int8) PRIMARY KEY a SOURCE(HTTP(url 'x'))").sources == {"HTTP"}


def test_quoting() -> None:
    assert quote_string("it's \\") == "'it\\'s \\\\'"
    assert quote_identifier("a`b") == "`a\\`b`"


@pytest.mark.parametrize(
    ("head", "statement"),
    [
        ("INSERT INTO t", "INSERT INTO t\nFROM INFILE 'f' COMPRESSION 'none'\n"),
        ("INSERT INTO t (a) -- why", "INSERT INTO t (a) -- why\nFROM INFILE 'f' COMPRESSION 'none'\n"),
        ("INSERT INTO t settings x = 1", "INSERT INTO t\nFROM INFILE 'f' COMPRESSION 'none'\nsettings x = 1"),
        ("INSERT INTO settings (a, b)", "INSERT INTO settings (a, b)\nFROM INFILE 'f' COMPRESSION 'none'\n"),
    ],
)
def test_the_file_of_an_insert_goes_before_its_settings(head: str, statement: str) -> None:
    assert insert_from_file(head, "f") == statement
