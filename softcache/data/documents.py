"""Texts, chats and token ids as samples of tokens.

    text:FILE_OR_FOLDER        a document per file, or per line with ?documents=lines
    jsonl:FILE?text=FIELD      a document per line
    jsonl:FILE?messages=FIELD  a chat per line, a list of turns with role and content
    jsonl:FILE?words=FIELD&tags=FIELD   words with a label each, for a token classifier
    ids:FILE                   token ids: npy, jsonl with input_ids and optionally loss_mask, or Parquet; or a
                               folder of Parquet files

Options: tokenizer=ID_OR_FOLDER, length=TOKENS, stride=TOKENS, loss_on=all|assistant|completion.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from softcache.data.rows import NO_ROW, TokenSource
from softcache.data.token_dicts import TOKENS, document_of, token_ids
from softcache.data.tokenizer import TextTokenizer, load_tokenizer
from softcache.data.tokens import DEFAULT_LENGTH, Document, labelled_source, language_source
from softcache.errors import DataError, SettingsError
from softcache.util.extras import import_extra
from softcache.util.log import inform
from softcache.util.messages import one_line
from softcache.util.spec import Spec

LOSS_ON = ("all", "assistant", "completion")
DOCUMENTS = ("files", "lines")
TOKEN_OPTIONS = ("tokenizer", "length", "stride", "loss_on")
COLUMNS = ("text", "messages", "words", "tags")  # options that name a field or column of tokens
OF_TOKENS = (
    *TOKENS,
    "attention_mask",
    "loss_mask",
    "labels",
)  # what is read of a table of token ids

Records = Iterable[Mapping[str, Any]]


def is_documents(options: Mapping[str, str]) -> bool:
    """Whether options of a table name columns of texts, chats or words, and not of classified samples."""
    return any(name in options for name in COLUMNS)


def is_text(spec: Spec) -> bool:
    """Whether a specification of data names texts, chats, words or token ids."""
    return spec.kind in ("text", "jsonl", "ids") or (
        spec.kind == "hfds" and is_documents(spec.options)
    )


def open_text(spec: Spec) -> TokenSource:
    """Open a text file, or the .txt files of a folder in the order of their names.

    Raises:
        SettingsError: an option is invalid, or there is no tokenizer.
        DataError: a file cannot be read as UTF-8.
    """
    kind = spec.options.get("documents", DOCUMENTS[0])
    if kind not in DOCUMENTS:
        raise SettingsError(f"{spec.text!r}: documents={kind}; expected {' or '.join(DOCUMENTS)}")
    path = spec.path.expanduser()
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"data {spec.text}: the folder has no .txt files")
    texts = [_read(file, spec) for file in files]
    if kind == "lines":
        texts = [line for text in texts for line in text.splitlines() if line.strip()]
    return source_of_texts(spec, texts)


def open_jsonl(spec: Spec) -> TokenSource:
    """Open a file of JSON objects, one per line, with texts, chats or labelled words.

    Raises:
        SettingsError: no field is named, an option is invalid, or there is no tokenizer.
        DataError: a line is not such an object.
    """
    if not is_documents(spec.options):
        raise SettingsError(
            f"data {spec.text!r} does not say which field of each line to take; expected ?text=FIELD, "
            "?messages=FIELD, or ?words=FIELD&tags=FIELD"
        )
    return source_of_records(spec, list(read_records(spec)))


def source_of_records(
    spec: Spec, records: Sequence[Mapping[str, Any]], class_names: tuple[str, ...] = ()
) -> TokenSource:
    """Samples from the fields of records that the options name.

    Args:
        class_names: names of the classes of `tags`, if the table has them.
    """
    asked = [name for name in COLUMNS if name in spec.options]
    if asked not in (["text"], ["messages"], ["words", "tags"]):
        raise SettingsError(
            f"data {spec.text!r} has {', '.join(asked)}; expected text=, messages=, or words= and tags="
        )
    columns = [spec.options[name] for name in asked]
    for number, record in enumerate(records):
        missing = [column for column in columns if record.get(column) is None]
        if missing:
            raise DataError(
                f"data {spec.text}: sample {number} has no {missing[0]}; it has "
                f"{', '.join(map(str, record))[:200]}"
            )
    values = [[record[column] for record in records] for column in columns]
    if asked == ["text"]:
        return source_of_texts(spec, values[0])
    if asked == ["messages"]:
        return source_of_chats(spec, values[0])
    return source_of_words(spec, values[0], values[1], class_names)


def source_of_texts(spec: Spec, texts: Sequence[str]) -> TokenSource:
    """Samples of texts, of which a model predicts every token but the first."""
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(
                f"data {spec.text}: sample {number} is {type(text).__name__}; expected a text"
            )
    asked = option(spec, "loss_on", "all")
    if "loss_on" in spec.options and asked != "all":
        raise SettingsError(
            f"data {spec.text!r}: loss_on={asked} of texts, which have no turns; use messages=, or "
            "leave it out"
        )
    tokenizer = tokenizer_of(spec)
    documents = [Document(ids) for ids in tokenizer.encode(texts)]
    length, stride = window(spec)
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    facts = tokenizer.facts() | {
        "bytes": size,
        "loss_on": "all",
        "length": length,
        "stride": stride,
    }
    return language_source(spec.public_name, documents, facts, length=length, stride=stride)


def source_of_chats(spec: Spec, chats: Sequence[Any]) -> TokenSource:
    """Samples of chats, of which a model predicts the assistant's tokens, or those that loss_on names."""
    loss_on = option(spec, "loss_on", "assistant")
    if loss_on not in LOSS_ON:
        raise SettingsError(f"data {spec.text!r}: loss_on={loss_on}; expected {', '.join(LOSS_ON)}")
    tokenizer = tokenizer_of(spec)
    documents = []
    for number, chat in enumerate(chats):
        if not isinstance(chat, list | tuple) or not all(
            isinstance(turn, Mapping) for turn in chat
        ):
            raise DataError(
                f"data {spec.text}: sample {number} is no chat; expected a list of turns with role and "
                "content"
            )
        try:
            documents.append(
                Document(*tokenizer.encode_chat([dict(turn) for turn in chat], loss_on))
            )
        except DataError as error:
            raise DataError(f"data {spec.text}: sample {number}: {error}") from error
    length, stride = window(spec)
    facts = tokenizer.facts(chat=True) | {"loss_on": loss_on, "length": length, "stride": stride}
    return language_source(spec.public_name, documents, facts, length=length, stride=stride)


def source_of_words(
    spec: Spec, words: Sequence[Any], tags: Sequence[Any], class_names: tuple[str, ...] = ()
) -> TokenSource:
    """Samples of words with a label each, which becomes that of the word's first token."""
    tokenizer, (length, _) = tokenizer_of(spec), window(spec)
    _check_lists(spec, words, "words")
    _check_lists(spec, tags, "tags")
    names = class_names or _names_of_tags(spec, tags)
    numbers = {name: number for number, name in enumerate(names)}
    ids, labels = [], []
    for number, (sample_words, sample_tags) in enumerate(zip(words, tags, strict=True)):
        if len(sample_words) != len(sample_tags):
            raise DataError(
                f"data {spec.text}: sample {number} has {len(sample_words)} words and {len(sample_tags)} "
                "tags; expected one tag for each word"
            )
        encoded = tokenizer.tokenizer(
            list(map(str, sample_words)),
            is_split_into_words=True,
            truncation=True,
            max_length=length,
        )
        of_token = encoded.word_ids()
        tokens = np.full(len(of_token), NO_ROW, np.int64)
        for place, word in enumerate(of_token):
            if word is not None and (place == 0 or of_token[place - 1] != word):
                tag = sample_tags[word]
                tokens[place] = tag if isinstance(tag, int) else numbers[str(tag)]
        ids.append(np.array(encoded["input_ids"], np.int32))
        labels.append(tokens)
    cut = sum(map(len, words)) - sum(int((tokens != NO_ROW).sum()) for tokens in labels)
    if cut:
        inform(
            f"note: {spec.public_name}: {cut:,} words are left out, beyond {length} tokens of a sample or "
            "without a token or a tag (?length=TOKENS takes longer ones)"
        )
    facts = tokenizer.facts() | {"length": length}
    return labelled_source(spec.public_name, ids, labels, facts, names)


def _check_lists(spec: Spec, values: Sequence[Any], what: str) -> None:
    for number, sample in enumerate(values):
        if not isinstance(sample, Sequence) or isinstance(sample, str):
            kind = "a text" if isinstance(sample, str) else type(sample).__name__
            raise DataError(
                f"data {spec.text}: sample {number} has {kind} for {what}; expected a list of {what}"
            )


def _names_of_tags(spec: Spec, tags: Sequence[Any]) -> tuple[str, ...]:
    """The names of the classes: those that the tags are, in sorted order; none if they are numbers."""
    kinds = {type(tag) for sample in tags for tag in sample}
    if kinds <= {int}:
        return ()
    if kinds <= {str}:
        return tuple(sorted({tag for sample in tags for tag in sample}))
    raise DataError(
        f"data {spec.text}: tags are of several types; expected words, or numbers of classes"
    )


def open_ids(spec: Spec) -> TokenSource:
    """Open token ids that were made elsewhere.

    Raises:
        SettingsError: the file has an unknown suffix, or an option is invalid.
        DataError: the file holds no token ids.
    """
    path = spec.path.expanduser()
    documents: list[Document] = []
    if path.is_dir():
        files = sorted(path.glob("*.parquet"))
        records = (record for file in files for record in _read_parquet(file, spec))
        documents = [
            document_of(record, number, spec.text) for number, record in enumerate(records)
        ]
    elif path.suffix == ".npy":
        documents = [Document(row) for row in _read_npy(path, spec)]
    elif path.suffix in (".jsonl", ".json", ".parquet"):
        lines = _read_parquet(path, spec) if path.suffix == ".parquet" else read_records(spec)
        documents = [document_of(record, number, spec.text) for number, record in enumerate(lines)]
    else:
        raise SettingsError(
            f"data {spec.text!r}: expected a file ending in .npy, .jsonl or .parquet"
        )
    place = option(spec, "tokenizer", "")
    facts = load_tokenizer(place).facts() if place else {}
    longest = max((len(document.ids) for document in documents), default=1)
    # token ids are taken as they are, unless the specification itself says where to cut them
    length, stride = window(replace(spec, defaults={}), max(2, longest))
    return language_source(spec.public_name, documents, facts, length=length, stride=stride)


def tokenizer_of(spec: Spec) -> TextTokenizer:
    """The tokenizer that the data names, or else that of the model it is for.

    Raises:
        SettingsError: neither names one, or it cannot be loaded.
    """
    place = option(spec, "tokenizer", "")
    if not place:
        raise SettingsError(
            f"data {spec.text!r} needs a tokenizer, and no hf: model brings one; name it with "
            "?tokenizer=ID_OR_FOLDER"
        )
    return load_tokenizer(place)


def window(spec: Spec, default: int = DEFAULT_LENGTH) -> tuple[int, int]:
    """The most tokens of a sample, and the tokens between the starts of two of one document.

    Raises:
        SettingsError: they are no whole numbers, or the stride is longer than a sample.
    """
    numbers: dict[str, int] = {}
    for name in ("length", "stride"):
        written = option(spec, name, str(numbers.get("length", default)))
        if not re.fullmatch(r"[1-9]\d{0,6}", written):
            raise SettingsError(
                f"data {spec.text!r}: {name}={written}; expected a number of tokens from 1"
            )
        numbers[name] = int(written)
    if numbers["length"] < 2 or numbers["stride"] > numbers["length"]:
        raise SettingsError(
            f"data {spec.text!r}: length={numbers['length']} and stride={numbers['stride']}; expected a "
            "length of 2 or more and a stride of at most as much, or tokens would be left out"
        )
    return numbers["length"], numbers["stride"]


def option(spec: Spec, name: str, default: str) -> str:
    """An option of the data; else what the model or the cache that it is for asks for; else the default."""
    return spec.options.get(name) or spec.defaults.get(name) or default


def read_records(spec: Spec) -> Iterator[Mapping[str, Any]]:
    """The objects of a JSON Lines file.

    Raises:
        DataError: the file cannot be read, or a line is no object.
    """
    for number, line in enumerate(_read(spec.path.expanduser(), spec).splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"data {spec.text}: line {number} is not JSON: {str(error)[:200]}"
            ) from error
        if not isinstance(record, dict):
            raise DataError(
                f"data {spec.text}: line {number} is {type(record).__name__}; expected an object"
            )
        yield record


def _read(path: Path, spec: Spec) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"data {spec.text}: {path.name} is not UTF-8 ({one_line(error)})"
        ) from error
    except OSError as error:
        raise DataError(f"data {spec.text}: {path} cannot be read ({error.strerror})") from error


def _read_npy(path: Path, spec: Spec) -> list[npt.NDArray[np.int32]]:
    """Token ids of a file: (tokens,) as one document, (samples, tokens) as one each."""
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"data {spec.text}: {path} cannot be read ({one_line(error)})") from error
    if values.ndim not in (1, 2):
        raise DataError(
            f"data {spec.text}: an array of shape {values.shape}; expected (tokens,) or (samples, tokens)"
        )
    rows = values[None] if values.ndim == 1 else values
    return [token_ids(row, f"data {spec.text}: row {number}") for number, row in enumerate(rows)]


def _read_parquet(path: Path, spec: Spec) -> Iterator[Mapping[str, Any]]:
    parquet = import_extra("pyarrow.parquet", extra="data", what=f"data {spec.text}")
    try:
        file = parquet.ParquetFile(path)
        # lists of log-probabilities may lie beside them, which are many
        columns = [name for name in file.schema_arrow.names if name in OF_TOKENS]
        for batch in file.iter_batches(columns=columns or None):
            yield from batch.to_pylist()
    except Exception as error:  # pyarrow raises errors of many types
        raise DataError(
            f"data {spec.text}: {path} cannot be read ({one_line(error)[:300]})"
        ) from error
