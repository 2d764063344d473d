"""What the front must know of a statement before the engine sees it: its verb, its output or input format, where
inline data begins, and which words it uses.

Only a tokenizer, on bytes, because data may follow the statement; whether it is valid is the engine's business.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Statement", "insert_from_file", "parse", "quote_identifier", "quote_string"]

# ClickHouse's lexer also takes typographic quotes; a tokenizer that does not could be talked past.
_TOKEN = re.compile(
    rb"""
    (?P<skip>\s+ | --[^\n]* | \#[!\ ][^\n]* | /\*.*?(?:\*/|\Z))
  | (?P<string>'(?:[^'\\]|\\.|'')*' | \xe2\x80\x98.*?\xe2\x80\x99 | \$(?P<tag>\w*)\$.*?\$(?P=tag)\$)
  | (?P<quoted>`(?:[^`\\]|\\.|``)*` | "(?:[^"\\]|\\.|"")*" | \xe2\x80\x9c.*?\xe2\x80\x9d)
  | (?P<word>[A-Za-z_\x80-\xff][\w\x80-\xff]*)
  | (?P<number>\d[\w.]*)
  | (?P<other>.)
    """,
    re.VERBOSE | re.DOTALL,
)
_QUERIES = frozenset({"SELECT", "WITH", "FROM", "SHOW", "DESCRIBE", "DESC", "EXPLAIN", "EXISTS", "CHECK", "VALUES"})


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    start: int
    end: int
    depth: int


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement as it came in.

    `sql` is the text without its FORMAT clause and without inline data; `format` is what that clause named, None where
    there was none. `data_start` is the offset of an INSERT's inline data in the bytes parsed, None for every other
    statement. `words` are its keywords, names and quoted names in upper case; `calls` those followed by a parenthesis.
    """

    verb: str
    sql: str
    format: str | None
    data_start: int | None
    words: frozenset[str]
    calls: frozenset[str]
    sources: frozenset[str]
    with_totals: bool
    temporary: bool

    @property
    def is_query(self) -> bool:
        return self.verb in _QUERIES

    @property
    def is_insert(self) -> bool:
        return self.verb == "INSERT"


def parse(text: bytes) -> Statement:
    """Reads the first statement of `text`. Bytes behind an INSERT's VALUES or FORMAT clause are not looked at."""
    tokens: list[_Token] = []
    verb = ""
    for token in _tokens(text):
        tokens.append(token)
        if not verb and token.kind == "word":
            verb = token.text.upper()
        elif verb == "WITH" and token.depth == 0 and _is(token, "INSERT"):
            verb = "INSERT"
        if verb == "INSERT":
            found = _insert_data(text, tokens)
            if found is not None:
                sql_end, data_format, data_start = found
                return _statement(verb, tokens, _decode(text[:sql_end]), data_format, data_start)
    if verb == "INSERT":
        return _statement(verb, tokens, _decode(text), None, None)
    cut = _output_format(tokens)
    if cut is None:
        return _statement(verb, tokens, _decode(text), None, None)
    start, end, name = cut
    return _statement(verb, tokens, _decode(text[:start] + b" " + text[end:]), name, None)


def insert_from_file(head: str, path: str) -> str:
    """The INSERT of `head` (without FORMAT), its data in the file at `path`: that goes before the SETTINGS."""
    text = head.encode("utf-8", "surrogateescape")
    tokens = list(_tokens(text))
    at = len(text)
    for token, name, sign in zip(tokens, tokens[1:], tokens[2:], strict=False):
        # A table may be called so too.
        if _is(token, "SETTINGS") and token.depth == 0 and name.kind == "word" and sign.text == "=":
            at = token.start
    # On a line of its own: a comment may be before it.
    clause = f"\nFROM INFILE {quote_string(path)} COMPRESSION 'none'\n"
    return _decode(text[:at]) + clause + _decode(text[at:])


def quote_string(value: str) -> str:
    """`value` as a ClickHouse string literal."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def quote_identifier(name: str) -> str:
    """`name` as a quoted ClickHouse identifier."""
    escaped = name.replace("\\", "\\\\").replace("`", "\\`")
    return f"`{escaped}`"


def _tokens(text: bytes) -> Iterator[_Token]:
    depth = 0
    for found in _TOKEN.finditer(text):
        kind = found.lastgroup if found.lastgroup != "tag" else "string"
        if kind is None or kind == "skip":
            continue
        raw = found.group()
        if raw in (b")", b"]", b"}"):
            depth -= 1
        yield _Token(kind, raw.decode("latin-1"), found.start(), found.end(), depth)
        if raw in (b"(", b"[", b"{"):
            depth += 1


def _is(token: _Token, word: str) -> bool:
    return token.kind == "word" and token.text.upper() == word


def _insert_data(text: bytes, tokens: list[_Token]) -> tuple[int, str, int] | None:
    """(end of the SQL, format, start of the data) once the tokens so far end an INSERT's head."""
    last = tokens[-1]
    if last.depth != 0 or last.kind != "word" or len(tokens) < 3:
        return None
    if _is(last, "VALUES") and not _is(tokens[-2], "FORMAT"):
        return last.start, "Values", last.end
    if _is(tokens[-2], "FORMAT"):
        # The data begins behind the first line break, or at once where there is none.
        start = last.end
        while start < len(text) and text[start : start + 1] in (b" ", b"\t", b"\r", b";"):
            start += 1
        if text[start : start + 1] == b"\n":
            start += 1
        return tokens[-2].start, last.text, start
    return None


def _output_format(tokens: list[_Token]) -> tuple[int, int, str] | None:
    """(start, end, name) of the FORMAT clause that ends a query."""
    for index in range(len(tokens) - 2, 0, -1):
        if not _is(tokens[index], "FORMAT") or tokens[index].depth != 0 or tokens[index + 1].kind != "word":
            continue
        behind = tokens[index + 2] if index + 2 < len(tokens) else None
        if behind is None or behind.text == ";" or _is(behind, "SETTINGS"):
            return tokens[index].start, tokens[index + 1].end, tokens[index + 1].text
    return None


def _statement(verb: str, tokens: list[_Token], sql: str, data_format: str | None, data_start: int | None) -> Statement:
    words: set[str] = set()
    calls: set[str] = set()
    sources: set[str] = set()
    for index, token in enumerate(tokens):
        if token.kind not in ("word", "quoted"):
            continue
        name = (token.text if token.kind == "word" else token.text[1:-1]).upper()
        words.add(name)
        if index + 1 < len(tokens) and tokens[index + 1].text == "(":
            calls.add(name)
        if name == "SOURCE" and index + 2 < len(tokens) and tokens[index + 1].text == "(":
            sources.add(tokens[index + 2].text.strip("`\"'").upper())
    totals = any(_is(a, "WITH") and _is(b, "TOTALS") for a, b in pairwise(tokens))
    temporary = verb == "CREATE" and any(_is(a, "TEMPORARY") and _is(b, "TABLE") for a, b in pairwise(tokens[1:5]))
    return Statement(
        verb, sql, data_format, data_start, frozenset(words), frozenset(calls), frozenset(sources), totals, temporary
    )


def _decode(text: bytes) -> str:
    return text.decode("utf-8", "surrogateescape").strip()
