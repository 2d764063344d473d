"""ClickHouse's own error numbers and the HTTP statuses its server answers them with, so that clients react alike."""

import re

__all__ = ["EngineError", "http_status"]

_CODE = re.compile(r"Code: (\d+)\. ")
_NAME = re.compile(r"\(([A-Z][A-Z0-9_]+)\)\s*$")
_NESTED = re.compile(r"^Code: \d+\. DB::Exception: (?=Code: \d+\. )")
_VERSION = re.compile(r"\s*\(version [^()]*(?:\([^()]*\))?\)(?:\. \([A-Z_]+\))?\s*$")

_UNKNOWN_EXCEPTION = 1002

# Which numbers get which status on ClickHouse's HTTP port; every other one gets 500.
_STATUSES: dict[int, tuple[int, ...]] = {
    # BAD_ARGUMENTS, SYNTAX_ERROR, TYPE_MISMATCH, INCORRECT_DATA, what cannot be parsed, what does not fit a column.
    400: (6, 8, 15, 25, 26, 27, 36, 38, 41, 44, 53, 62, 72, 117, 157, 168, 223, 321, 376, 427, 441, 630, 675, 676),
    401: (194,),
    403: (192, 193, 497, 512, 516),
    # UNKNOWN_…: table, database, identifier, function, type, storage, setting, format …
    404: (46, 47, 50, 56, 60, 63, 73, 78, 81, 115, 336, 511),
    408: (159,),
    411: (381,),
    413: (161,),
    415: (696,),
    501: (48,),
    503: (76, 202, 209, 439),
}
_STATUS_OF = {code: status for status, codes in _STATUSES.items() for code in codes}


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
    def of(cls, code: int, name: str, message: str, status: int | None = None) -> "EngineError":
        """An error of the front itself, worded as the server would."""
        return cls(code, f"Code: {code}. DB::Exception: {message} ({name})", status)

    @classmethod
    def from_engine(cls, error: BaseException) -> "EngineError":
        """What the engine raised, without the wrapper's words around ClickHouse's own text."""
        if isinstance(error, EngineError):
            return error
        text = str(error).strip()
        found = _CODE.search(text)
        if found is None:
            return cls.of(_UNKNOWN_EXCEPTION, "UNKNOWN_EXCEPTION", text or type(error).__name__)
        text = text[found.start() :]
        while _NESTED.match(text):
            # The engine wraps some errors once more and appends its version in between.
            text = _VERSION.sub("", _NESTED.sub("", text))
        return cls(int(found.group(1)), _VERSION.sub("", text))


def http_status(code: int) -> int:
    """The HTTP status that goes with an error number."""
    return _STATUS_OF.get(code, 500)
