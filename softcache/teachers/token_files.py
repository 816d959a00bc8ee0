"""Files of the largest log-probabilities of each token, as trainers and servers write them.

One object or row a document, with its token ids in `input_ids` or `prompt_token_ids`, and

    target_token_ids, target_logprobs, target_mask   as axolotl trains from: lists for each token
    token_ids, top_values (or logprobs)              as DistillKit trains from: lists for each token
    compressed_logprobs, bytepacked_indices          as DistillKit captures them, see distillkit.py
    prompt_logprobs                                  as vLLM returns them: an object for each token
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from softcache.cache.layout import RowLayout
from softcache.data.documents import read_records
from softcache.data.huggingface import load
from softcache.data.token_dicts import TOKENS, token_ids
from softcache.errors import DataError, MissingFileError, ModelError, SettingsError
from softcache.teachers.distillkit import COMPRESSED, Codec, read_codec
from softcache.teachers.token_columns import (
    SERVED,
    Nested,
    arrow_records,
    nested,
    offsets_of,
    served,
)
from softcache.util.extras import import_extra
from softcache.util.messages import one_line
from softcache.util.spec import Spec

LISTS = (  # columns of ids, of log-probabilities, and of which entries count
    ("target_token_ids", "target_logprobs", "target_mask"),
    ("token_ids", "top_values", ""),
    ("token_ids", "logprobs", ""),
)
LEGACY = ("packed_indices", "exact_values", "coeffs")
BATCH = 256  # documents of a table that are read at a time
ABOVE_ZERO = 1e-3  # a log-probability that rounding may explain
LARGEST_SUM = 1.02  # of the probabilities of a row
ROWS = {"next": 1, "same": 0}  # how far ahead of a row the token is that it is about

Indices = npt.NDArray[np.int64]
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Columns:
    """The columns of a file: `tokens`, and those of the entries, as one of LISTS, or SERVED or compressed."""

    tokens: str
    ids: str
    log_probs: str = ""
    mask: str = ""

    @property
    def names(self) -> list[str]:
        """All columns to read."""
        return [name for name in (self.tokens, self.ids, self.log_probs, self.mask) if name]

    @property
    def compressed(self) -> bool:
        """Whether the entries are packed as DistillKit captures them."""
        return self.ids == COMPRESSED[0]


@dataclass(frozen=True)
class TokenFile:
    """The largest log-probabilities of the tokens of documents.

    Attributes:
        name: of the file, for messages.
        tokens: (tokens,) int32 token ids of all documents.
        token_offsets: (documents + 1,) the first token of each.
        row_offsets: (documents + 1,) the first row of each; a row is about one token.
        entry_offsets: (rows + 1,) the first entry of each row.
        ids: (entries,) int32 token ids.
        log_probs: (entries,) float32.
        ahead: the row at position i of a document is about token i + ahead; None if that is not stated.
        has_token: whether each row is sure to have an entry for the token that it is about.
    """

    name: str
    tokens: npt.NDArray[np.int32]
    token_offsets: Indices
    row_offsets: Indices
    entry_offsets: Indices
    ids: npt.NDArray[np.int32]
    log_probs: npt.NDArray[np.float32]
    ahead: int | None
    has_token: bool

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.token_offsets) - 1

    @property
    def counts(self) -> Indices:
        """The number of entries of each row, (rows,)."""
        return np.diff(self.entry_offsets)

    @property
    def largest(self) -> int:
        """The most entries of a row."""
        return int(self.counts.max(initial=0))

    def document(self, number: int) -> npt.NDArray[np.int32]:
        """The tokens of a document."""
        return self.tokens[self.token_offsets[number] : self.token_offsets[number + 1]]

    def rows(self) -> RowLayout:
        """Which rows belong to which document, and where each stands in it."""
        firsts = self.row_offsets[:-1][np.diff(self.row_offsets) > 0]
        return RowLayout(self.row_offsets, firsts, np.zeros(len(firsts), np.int64))

    def where(self, row: int) -> str:
        """A row in words, for messages."""
        document = int(np.searchsorted(self.row_offsets, row, "right")) - 1
        return f"teacher {self.name}: document {document}, row {row - self.row_offsets[document]}"

    def check(self, vocabulary: int) -> None:
        """Check that each row holds log-probabilities of different tokens.

        Raises:
            ModelError: an id is not in the vocabulary or repeated, or a log-probability is NaN or above 0, or
                the probabilities of a row sum to more than 1; the message names document and row.
        """
        rows = np.repeat(np.arange(len(self.counts)), self.counts)
        outside = (self.ids < 0) | (self.ids >= vocabulary)
        if outside.any():
            entry = int(outside.argmax())
            raise ModelError(
                f"{self.where(rows[entry])} has token id {self.ids[entry]}; expected 0 to {vocabulary - 1}, "
                "the vocabulary of the data: are these the ids of another tokenizer?"
            )
        invalid = ~(self.log_probs <= ABOVE_ZERO)
        if invalid.any():
            entry = int(invalid.argmax())
            raise ModelError(
                f"{self.where(rows[entry])} has log-probability {self.log_probs[entry]:.4g} of token id "
                f"{self.ids[entry]}; expected natural logarithms of probabilities, 0 or less"
            )
        sums = np.bincount(rows, np.exp(self.log_probs), len(self.counts))
        if (sums > LARGEST_SUM).any():
            row = int((sums > LARGEST_SUM).argmax())
            raise ModelError(
                f"{self.where(row)} has probabilities that sum to {sums[row]:.4g}; expected at most 1"
            )
        keys = np.sort(rows * vocabulary + self.ids)
        repeated = np.flatnonzero(keys[1:] == keys[:-1])
        if len(repeated):
            row, token = divmod(int(keys[repeated[0]]), vocabulary)
            raise ModelError(
                f"{self.where(row)} has token id {token} twice; expected distinct token ids"
            )


def read_token_file(spec: Spec) -> TokenFile:
    """Read the token ids and the entries of all documents.

    Options: rows=next or rows=same (the row at position i is about token i + 1, or token i), ids=COLUMN and
    log_probs=COLUMN, config=FILE (the configuration of a compression).

    Raises:
        SettingsError: an option is invalid, or the columns are not known.
        MissingFileError: there is no such file.
        ModelError: a document has no such lists, or lists of other lengths.
    """
    stated = spec.options.get("rows")
    if stated is not None and stated not in ROWS:
        raise SettingsError(
            f"teacher {spec.text}: rows={stated}; expected rows=next (the row at position i is about token "
            "i + 1) or rows=same (about token i itself)"
        )
    names, records = _open(spec)
    columns = columns_of(names, spec)
    codec = read_codec(spec) if columns.compressed else None
    parts = [
        _document(record, columns, codec, f"teacher {spec.text}: document {number}")
        for number, record in enumerate(records(columns.names))
    ]
    if not parts:
        raise ModelError(f"teacher {spec.text} has no documents; expected one on each line or row")
    missing = [_missing_rows(part, number, spec) for number, part in enumerate(parts)]
    long = [number for number, part in enumerate(parts) if len(part.tokens) > 1]
    other = [number for number in long if missing[number] != missing[long[0]]]
    if other:
        first, number = long[0], other[0]
        raise ModelError(
            f"teacher {spec.text}: document {number} has {_described(parts[number])}, and document {first} "
            f"has {_described(parts[first])}: rows are missing; expected as many rows as tokens in every "
            "document, or one less in every document"
        )
    ahead = ROWS[stated] if stated else None
    if columns.ids == SERVED and stated is None:
        ahead = 1 if long and missing[long[0]] else 0  # without the null of the first token
    return TokenFile(
        spec.text,
        np.concatenate([part.tokens for part in parts]),
        offsets_of([len(part.tokens) for part in parts]),
        offsets_of([len(part.counts) for part in parts]),
        offsets_of(np.concatenate([part.counts for part in parts])),
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.log_probs for part in parts]),
        ahead,
        columns.ids == SERVED,
    )


def columns_of(names: Iterable[str], spec: Spec) -> Columns:
    """Which columns hold the tokens and the entries.

    Raises:
        SettingsError: it cannot be told.
    """
    names = list(names)
    tokens = next((name for name in TOKENS if name in names), None)
    shown = ", ".join(map(str, names))[:200]
    if tokens is None:
        raise SettingsError(
            f"teacher {spec.text} has no {' or '.join(TOKENS)}, by which its documents are compared with the "
            f"data; it has {shown}"
        )
    if "ids" in spec.options:
        given = spec.options["ids"], spec.options["log_probs"]
        absent = [name for name in given if name not in names]
        if absent:
            raise SettingsError(f"teacher {spec.text} has no column {absent[0]!r}; it has {shown}")
        mask = LISTS[0][2] if given == LISTS[0][:2] and LISTS[0][2] in names else ""
        return Columns(tokens, *given, mask)
    for ids, log_probs, mask in LISTS:
        if ids in names and log_probs in names:
            return Columns(tokens, ids, log_probs, mask if mask in names else "")
    if SERVED in names:
        return Columns(tokens, SERVED)
    if set(COMPRESSED) <= set(names):
        return Columns(tokens, *COMPRESSED)
    if set(LEGACY) <= set(names):
        raise SettingsError(
            f"teacher {spec.text} has the columns {', '.join(LEGACY)} of DistillKit's legacy compression, "
            "which is not read; decompress it with DistillKit to token_ids and top_values"
        )
    known = "; ".join(" and ".join(filter(None, group[:2])) for group in LISTS)
    raise SettingsError(
        f"teacher {spec.text} has the columns {shown}; expected {known}; {SERVED}; or ?ids=COLUMN&"
        "log_probs=COLUMN"
    )


class _Part(NamedTuple):
    """The tokens of a document without its padding, and its rows."""

    tokens: npt.NDArray[np.int32]
    counts: Indices
    ids: npt.NDArray[np.int32]
    log_probs: npt.NDArray[np.float32]


def _document(record: Record, columns: Columns, codec: Codec | None, where: str) -> _Part:
    """The tokens and rows of a document.

    Raises:
        ModelError: a list is missing, or has another length than expected.
    """
    absent = [name for name in columns.names if record.get(name) is None]
    if absent:
        raise ModelError(f"{where} has no {absent[0]}; expected {', '.join(columns.names)}")
    tokens = token_ids(record[columns.tokens], where)
    if columns.ids == SERVED:
        counts, ids, log_probs = served(record[SERVED], where)
    elif codec is not None:
        first, second = (nested(record[name], where, name) for name in COMPRESSED)
        counts, ids, log_probs = codec.unpack(first, second, where)
    else:
        lists = nested(record[columns.ids], where, columns.ids)
        values = nested(record[columns.log_probs], where, columns.log_probs)
        counts, ids, log_probs = *lists, np.asarray(values.values, np.float32)
        _check_counts(lists, values, columns.ids, columns.log_probs, where)
        if len(ids) and ids.dtype.kind not in "iu":
            raise ModelError(f"{where}: {columns.ids} holds {ids.dtype}; expected token ids")
    keep = log_probs != -np.inf  # stands for an entry that is not there
    if columns.mask:
        mask = nested(record[columns.mask], where, columns.mask)
        _check_counts(mask, Nested(counts, ids), columns.mask, columns.ids, where)
        keep &= mask.values.astype(np.bool_)
    rows = np.repeat(np.arange(len(counts)), counts)[keep]
    part = _Part(
        tokens,
        np.bincount(rows, minlength=len(counts)).astype(np.int64),
        np.clip(ids[keep], -1, (1 << 31) - 1).astype(np.int32),
        log_probs[keep],
    )
    present = record.get("attention_mask")
    return part if present is None else _without_padding(part, np.asarray(present), where)


def _without_padding(part: _Part, present: npt.NDArray[Any], where: str) -> _Part:
    """The document without the tokens that `attention_mask` leaves out, and without their rows."""
    present = present.reshape(-1)
    if len(present) != len(part.tokens):
        raise ModelError(
            f"{where} has {len(part.tokens)} token ids and {len(present)} of attention_mask; expected as many"
        )
    if present.max(initial=0) > 1:
        raise ModelError(
            f"{where} is packed from several documents, which attention_mask numbers 1 to {present.max()}; "
            "import the file from before they were packed"
        )
    kept = present.astype(np.bool_)
    # the row between padding and the first token of the document is about neither
    rows = kept[1:] & kept[:-1] if len(part.counts) == len(kept) - 1 else kept
    if kept.all() or len(rows) != len(part.counts):
        return part
    entries = np.repeat(rows, part.counts)
    return _Part(part.tokens[kept], part.counts[rows], part.ids[entries], part.log_probs[entries])


def _check_counts(first: Nested, second: Nested, name: str, other: str, where: str) -> None:
    """Raise ModelError if two columns of a document have lists of different lengths."""
    if len(first.counts) != len(second.counts):
        raise ModelError(
            f"{where} has {len(first.counts)} lists of {name} and {len(second.counts)} of {other}; expected "
            "as many"
        )
    differs = np.flatnonzero(first.counts != second.counts)
    if len(differs):
        row = differs[0]
        raise ModelError(
            f"{where}, row {row} has {first.counts[row]} entries of {name} and {second.counts[row]} of "
            f"{other}; expected as many"
        )


def _missing_rows(part: _Part, number: int, spec: Spec) -> int:
    """How many rows a document has less than tokens, 0 or 1.

    Raises:
        ModelError: it is another number.
    """
    missing = len(part.tokens) - len(part.counts)
    if missing not in (0, 1):
        raise ModelError(
            f"teacher {spec.text}: document {number} has {_described(part)}; expected as many rows as "
            "tokens, or one less, without the first token, which nothing predicts"
        )
    return missing


def _described(part: _Part) -> str:
    return f"{len(part.tokens):,} tokens and {len(part.counts):,} rows"


def _open(spec: Spec) -> tuple[list[str], Callable[[list[str]], Iterator[Record]]]:
    """The columns of a file, and a function that reads some of them."""
    if spec.kind == "hfds":
        table = load(spec.place, spec.split, spec.options.get("name"))

        def read_table(names: list[str]) -> Iterator[Record]:
            wanted = table.select_columns(_with_mask(names, table.column_names))
            for part in wanted.with_format("arrow").iter(BATCH):
                yield from arrow_records(part)

        return list(table.column_names), read_table
    if not spec.path.is_file():
        raise MissingFileError(f"teacher {spec.text}: no such file")
    if spec.path.suffix == ".jsonl":
        try:
            records = list(read_records(spec))
        except DataError as error:
            raise ModelError(str(error).replace("data ", "teacher ", 1)) from error
        return list(records[0]) if records else list(TOKENS), lambda names: iter(records)
    parquet = import_extra("pyarrow.parquet", extra="data", what=f"teacher {spec.text}")
    try:
        file = parquet.ParquetFile(spec.path)
    except Exception as error:  # pyarrow raises errors of many types
        raise ModelError(f"teacher {spec.text} cannot be read ({one_line(error)[:300]})") from error
    present = list(file.schema_arrow.names)

    def read_file(names: list[str]) -> Iterator[Record]:
        for part in file.iter_batches(BATCH, columns=_with_mask(names, present)):
            yield from arrow_records(part)

    return present, read_file


def _with_mask(names: list[str], present: list[str]) -> list[str]:
    return [*names, *(name for name in ("attention_mask",) if name in present)]
