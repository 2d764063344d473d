"""ClickHouse's own error numbers and the HTTP statuses its server answers them with, so that clients react alike."""

import re

__all__ = ["CODES", "EngineError", "http_status"]

_CODE = re.compile(r"Code: (\d+)\. ")
_NAME = re.compile(r"\(([A-Z][A-Z0-9_]+)\)\s*$")
_NESTED = re.compile(r"^Code: \d+\. DB::Exception: (?=Code: \d+\. )")
_VERSION = re.compile(r"\s*\(version [^()]*(?:\([^()]*\))?\)(?:\. \([A-Z_]+\))?\s*$")

# ClickHouse's numbers of the errors that the front raises itself or answers with a status of their own.
CODES: dict[str, int] = {
    "UNSUPPORTED_METHOD": 1,
    "CANNOT_PARSE_TEXT": 6,
    "THERE_IS_NO_COLUMN": 8,
    "DUPLICATE_COLUMN": 15,
    "CANNOT_PARSE_ESCAPE_SEQUENCE": 25,
    "CANNOT_PARSE_QUOTED_STRING": 26,
    "CANNOT_PARSE_INPUT_ASSERTION_FAILED": 27,
    "BAD_ARGUMENTS": 36,
    "UNKNOWN_ELEMENT_IN_AST": 37,
    "CANNOT_PARSE_DATE": 38,
    "CANNOT_PARSE_DATETIME": 41,
    "ILLEGAL_COLUMN": 44,
    "UNKNOWN_FUNCTION": 46,
    "UNKNOWN_IDENTIFIER": 47,
    "NOT_IMPLEMENTED": 48,
    "UNKNOWN_TYPE": 50,
    "TYPE_MISMATCH": 53,
    "UNKNOWN_STORAGE": 56,
    "UNKNOWN_TABLE": 60,
    "SYNTAX_ERROR": 62,
    "UNKNOWN_AGGREGATE_FUNCTION": 63,
    "CANNOT_PARSE_NUMBER": 72,
    "UNKNOWN_FORMAT": 73,
    "CANNOT_OPEN_FILE": 76,
    "UNKNOWN_TYPE_OF_QUERY": 78,
    "UNKNOWN_DATABASE": 81,
    "UNKNOWN_SETTING": 115,
    "INCORRECT_DATA": 117,
    "UNKNOWN_TYPE_OF_AST_NODE": 123,
    "UNKNOWN_DIRECTION_OF_SORTING": 152,
    "TIMEOUT_EXCEEDED": 159,
    "READONLY": 164,
    "TOO_DEEP_AST": 167,
    "TOO_BIG_AST": 168,
    "UNKNOWN_USER": 192,
    "WRONG_PASSWORD": 193,
    "REQUIRED_PASSWORD": 194,
    "TOO_MANY_SIMULTANEOUS_QUERIES": 202,
    "SOCKET_TIMEOUT": 209,
    "UNEXPECTED_AST_STRUCTURE": 223,
    "QUERY_IS_TOO_LARGE": 229,
    "ABORTED": 236,
    "NOT_ENOUGH_SPACE": 243,
    "CANNOT_DECOMPRESS": 271,
    "VALUE_IS_OUT_OF_RANGE_OF_DATA_TYPE": 321,
    "UNKNOWN_DATABASE_ENGINE": 336,
    "INTO_OUTFILE_NOT_ALLOWED": 358,
    "SESSION_NOT_FOUND": 372,
    "SESSION_IS_LOCKED": 373,
    "INVALID_SESSION_TIMEOUT": 374,
    "CANNOT_PARSE_UUID": 376,
    "HTTP_LENGTH_REQUIRED": 381,
    "QUERY_WAS_CANCELLED": 394,
    "TOO_MANY_ROWS_OR_BYTES": 396,
    "CANNOT_COMPILE_REGEXP": 427,
    "CANNOT_SCHEDULE_TASK": 439,
    "CANNOT_PARSE_DOMAIN_VALUE_FROM_STRING": 441,
    "ACCESS_DENIED": 497,
    "UNKNOWN_ROLE": 511,
    "SET_NON_GRANTED_ROLE": 512,
    "AUTHENTICATION_FAILED": 516,
    "CANNOT_PARSE_IPV4": 675,
    "CANNOT_PARSE_IPV6": 676,
    "UNSUPPORTED_MEDIA_TYPE": 779,
    "UNKNOWN_EXCEPTION": 1002,
}

# As ClickHouse's HTTP port has them; every other error gets 500.
_STATUSES: dict[int, tuple[str, ...]] = {
    400: (
        "BAD_ARGUMENTS",
        "CANNOT_COMPILE_REGEXP",
        "DUPLICATE_COLUMN",
        "ILLEGAL_COLUMN",
        "INCORRECT_DATA",
        "SYNTAX_ERROR",
        "THERE_IS_NO_COLUMN",
        "TOO_BIG_AST",
        "TOO_DEEP_AST",
        "TYPE_MISMATCH",
        "UNEXPECTED_AST_STRUCTURE",
        "UNKNOWN_ELEMENT_IN_AST",
        "UNKNOWN_TYPE_OF_AST_NODE",
        "VALUE_IS_OUT_OF_RANGE_OF_DATA_TYPE",
        *(name for name in CODES if name.startswith("CANNOT_PARSE_")),
    ),
    401: ("REQUIRED_PASSWORD",),
    403: ("ACCESS_DENIED", "AUTHENTICATION_FAILED", "SET_NON_GRANTED_ROLE", "UNKNOWN_USER", "WRONG_PASSWORD"),
    404: (
        "UNKNOWN_AGGREGATE_FUNCTION",
        "UNKNOWN_DATABASE",
        "UNKNOWN_DATABASE_ENGINE",
        "UNKNOWN_DIRECTION_OF_SORTING",
        "UNKNOWN_FORMAT",
        "UNKNOWN_FUNCTION",
        "UNKNOWN_IDENTIFIER",
        "UNKNOWN_ROLE",
        "UNKNOWN_SETTING",
        "UNKNOWN_STORAGE",
        "UNKNOWN_TABLE",
        "UNKNOWN_TYPE",
        "UNKNOWN_TYPE_OF_QUERY",
    ),
    408: ("TIMEOUT_EXCEEDED",),
    411: ("HTTP_LENGTH_REQUIRED",),
    413: ("QUERY_IS_TOO_LARGE",),
    415: ("UNSUPPORTED_MEDIA_TYPE",),
    501: ("NOT_IMPLEMENTED",),
    503: ("CANNOT_OPEN_FILE", "CANNOT_SCHEDULE_TASK", "SOCKET_TIMEOUT"),
}
_STATUS_OF = {CODES[name]: status for status, names in _STATUSES.items() for name in names}


class EngineError(Exception):
    """A failure as ClickHouse words it: `code` is its number, `text` starts with `Code: N. DB::Exception:`."""

    def __init__(self, code: int, text: str, status: int | None = None) -> None:
        self.code = code
        self.text = text
        self.status = http_status(code) if status is None else status
        super().__init__(text)

    @property
    def name(self) -> str:
        """ClickHouse's name for the code as the text gives it, or an empty string."""
        found = _NAME.search(self.text)
        return found.group(1) if found else ""

    @classmethod
    def of(cls, name: str, message: str, status: int | None = None) -> "EngineError":
        """An error of the front itself, worded as the server would; `name` is one of CODES."""
        code = CODES[name]
        return cls(code, f"Code: {code}. DB::Exception: {message} ({name})", status)

    @classmethod
    def from_engine(cls, error: BaseException) -> "EngineError":
        """What the engine raised, without the wrapper's words around ClickHouse's own text."""
        if isinstance(error, EngineError):
            return error
        text = str(error).strip()
        found = _CODE.search(text)
        if found is None:
            return cls.of("UNKNOWN_EXCEPTION", text or type(error).__name__)
        text = text[found.start() :]
        while _NESTED.match(text):
            # The engine wraps some errors once more and appends its version in between.
            text = _VERSION.sub("", _NESTED.sub("", text))
        return cls(int(found.group(1)), _VERSION.sub("", text))


def http_status(code: int) -> int:
    """The HTTP status that goes with an error number."""
    return _STATUS_OF.get(code, 500)
